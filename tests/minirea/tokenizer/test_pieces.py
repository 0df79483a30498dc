"""Long texts are encoded in pieces: the same ids, whatever the pieces, and memory for one of them only."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizer_kinds import CORPUS, HARD_TEXTS, JSON_KINDS, SENTENCEPIECE_KINDS, train_sentencepiece
from tokenizers import Regex, pre_tokenizers, processors

import minirea.memory
from minirea.errors import InputError, MemoryLimitError
from minirea.tokenizer import Tokenizer, huggingface, load_tokenizer, pieces

SHARED = Path(__file__).parents[4] / "shared" / "tokenizers"
TEXT = " ".join([*HARD_TEXTS, "<s>one</s> two", "an <extra> token<extra> more", *CORPUS[:5], *HARD_TEXTS])


def split_by(pattern: str) -> Any:
    tokenizer = JSON_KINDS["byte_level"]()
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, spell])
    return tokenizer


KINDS: dict[str, Any] = {f"json {kind}": build for kind, build in JSON_KINDS.items()}
KINDS |= {f"pattern {i}": (lambda p=pattern: split_by(p)) for i, pattern in enumerate(pieces.WORD_PATTERNS)}
CUTS = ("json byte_level", "json unigram", "bpe", "unigram", "pattern 0", "pattern 1", "pattern 2", "bpe_no_prefix")


@pytest.fixture(scope="module", params=[*KINDS, *SENTENCEPIECE_KINDS])
def named(request: Any, tmp_path_factory: Any) -> tuple[str, Tokenizer]:
    directory = tmp_path_factory.mktemp("kind")
    if request.param in SENTENCEPIECE_KINDS:
        train_sentencepiece(directory / "tokenizer.model", **SENTENCEPIECE_KINDS[request.param])
    else:
        tokenizer = KINDS[request.param]()
        special = [("<s>", 1), ("</s>", 2)]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
        tokenizer.save(str(directory / "tokenizer.json"))
    return request.param, load_tokenizer(directory)


def test_the_same_ids_from_pieces_of_any_size(named: tuple[str, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    name, tokenizer = named
    expected = {(frame, more): tokenizer.encode(TEXT, frame, more) for frame in (True, False) for more in (True, False)}
    for size in (5, 17, 60, 400):
        monkeypatch.setattr(pieces, "PIECE_CHARACTERS", size)
        monkeypatch.setattr("minirea.tokenizer.tokenizer.PIECE_CHARACTERS", size)
        for (frame, more), ids in expected.items():
            assert tokenizer.encode(TEXT, frame, more) == ids
    if name in CUTS:
        assert tokenizer._backend.may_cut
        assert len(list(pieces.pieces(TEXT, True))) > 3


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_published_mistral_models(tmp_path: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    published = SHARED / f"mistral.model.{version}"
    if not published.exists():
        pytest.skip("needs the published models")
    (tmp_path / "tokenizer.model").symlink_to(published)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer._backend.may_cut
    expected = tokenizer.encode(TEXT)
    monkeypatch.setattr("minirea.tokenizer.tokenizer.PIECE_CHARACTERS", 30)
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 30)
    assert tokenizer.encode(TEXT) == expected


def test_what_reaches_across_words_is_not_cut(tmp_path: Path) -> None:
    for edit in (
        {"normalizer": {"type": "Replace", "pattern": {"String": "e q"}, "content": "x"}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a b"}, "behavior": "Isolated", "invert": False}},
    ):
        state = json.loads(JSON_KINDS["byte_level"]().to_str()) | edit
        (tmp_path / "tokenizer.json").write_text(json.dumps(state))
        assert not load_tokenizer(tmp_path)._backend.may_cut
    for content, flags in (("a b", {}), ("xyx", {"rstrip": True}), ("xyx", {"lstrip": True})):
        JSON_KINDS["byte_level"]().save(str(tmp_path / "tokenizer.json"))
        added = {"501": {"content": content, **flags}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
        assert not load_tokenizer(tmp_path)._backend.may_cut


def test_a_piece_that_does_not_fit_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    JSON_KINDS["byte_level"]().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    monkeypatch.setattr(minirea.memory, "available_bytes", lambda _: 100_000_000)
    text = " " * 2_000_000
    with pytest.raises(MemoryLimitError, match=r"2,000,000 characters without a word .* 250.* is free"):
        tokenizer.encode(text)
    monkeypatch.setattr(minirea.memory, "available_bytes", lambda _: None)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_white_space_that_the_library_panics_of_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a pattern splits words; elsewhere, and with line ends in it, white space has any length."""
    monkeypatch.setattr(huggingface, "_LONGEST_RUN", 50)
    monkeypatch.setattr(huggingface, "_TOO_LONG_RUN", re.compile(r"[^\S\r\n]{50}"))
    for kind, build in KINDS.items():
        build().save(str(tmp_path / "tokenizer.json"))
        tokenizer = load_tokenizer(tmp_path)
        for text in ("a" + " " * 49 + "b", " \n" * 60, "a" * 60):
            tokenizer.encode(text)
        for text in ("a" + " " * 50 + "b", " \t" * 25, "\u3000" * 60):
            if kind.startswith("pattern"):
                with pytest.raises(InputError, match="50 or more white space characters in a row"):
                    tokenizer.encode(text)
            else:
                tokenizer.encode(text)
