"""Small tokenizers of every kind, trained on the fly, and texts that are hard to keep."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then the other foxes do the same thing again.",
    "    indented text\twith tabs,  double  spaces and trailing ones   ",
    "números, naïve façade, Größe, ångström; пример текста; 日本語の文章です。中文字符。한국어",
    "0 1 2 33 444 5,555.5 + x == y != z // comments [INST] (parentheses) {braces} <tags> \"quotes\" 'single'",
    "She said it was the best of times, it was the worst of times, and nobody knew which was which.",
] * 20

HARD_TEXTS = [
    "",
    "a",
    " ",
    "    ",
    " leading",
    "   three leading",
    "trailing   ",
    "runs   of     spaces",
    "\n",
    "\n\n\nlines\r\nand\r\rreturns\n",
    "\ttabs\t\tand \t mixed \n\t ",
    "emoji 🙂🙃 family 👩‍👩‍👧‍👦 flag 🇫🇷 skin 👍🏽",
    "e\u0301 combining \u0301\u0327 a\u030a, नमस्ते, ไทย",
    "日本語 中文 한국어 𠀋 ﬁ ﷺ",
    "nul \x00 bell \x07 escape \x1b del \x7f c1 \x85 nbsp \xa0 zwsp \u200b bom \ufeff",
    "replacement \ufffd, private \ue000, last \U0010ffff",
    "▁ lower one eighth block ▁▁x",
    "<0x41> is not a byte, <0xGG> neither",
    "café CAFÉ don't they're I'LL 12345 3.14 x=1;y+=2 https://a.b/c?d=e&f",
    "The quick brown fox" * 40,
]


def byte_level() -> Any:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<extra>"])
    return tokenizer


def llama_style(prefix: str) -> Any:
    """A tokenizer.json as converted from SentencePiece; `prefix` is how it puts the dummy prefix."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    strip = [decoders.Strip(" ", 1, 0)] if prefix != "none" else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    replace = normalizers.Replace(" ", "▁")
    if prefix == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    elif prefix == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    else:
        tokenizer.normalizer = replace
    all_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<s>", "</s>", *all_bytes],
        max_token_length=8,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    tokenizer.add_tokens([AddedToken("<extra>", normalized=False)])
    return tokenizer


def word_level() -> Any:
    """No decoder: tokens are joined with spaces."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    tokenizer.add_tokens(["<extra>"])
    return tokenizer


def unigram() -> Any:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<extra>"])
    return tokenizer


JSON_KINDS = {
    "word_level": word_level,
    "unigram": unigram,
    "byte_level": byte_level,
    "llama_prepend": lambda: llama_style("prepend"),
    "llama_metaspace": lambda: llama_style("metaspace"),
    "llama_no_prefix": lambda: llama_style("none"),
}


def train_sentencepiece(path: Path, **options: Any) -> Any:
    model = io.BytesIO()
    defaults: dict[str, Any] = {
        "vocab_size": 600,
        "byte_fallback": True,
        "character_coverage": 0.99,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=model, **defaults | options)
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


SENTENCEPIECE_KINDS: dict[str, dict[str, Any]] = {
    "bpe": {"model_type": "bpe"},
    "bpe_no_prefix": {"model_type": "bpe", "add_dummy_prefix": False},
    "bpe_user_symbols": {"model_type": "bpe", "user_defined_symbols": ["<tool>"], "control_symbols": ["[INST]"]},
    "unigram": {"model_type": "unigram"},
    "unigram_no_prefix": {"model_type": "unigram", "add_dummy_prefix": False},
    "unigram_trainer_defaults": {
        "model_type": "unigram",
        "byte_fallback": False,
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
    },
}
