"""Ids and text against the libraries that own each format: tokenizers/transformers, sentencepiece, tiktoken."""

from __future__ import annotations

import base64
import codecs
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import HARD_TEXTS, JSON_KINDS, SENTENCEPIECE_KINDS, byte_level, train_sentencepiece
from tokenizers import processors

from minirea.errors import InputError
from minirea.tokenizer import Tokenizer, load_tokenizer

SHARED = Path(__file__).parents[4] / "shared" / "tokenizers"

WITH_SPECIAL = [
    "<s>",
    "a</s>b",
    "hi <s> there</s> x",
    "<s><s></s>",
    "</s>\n",
    "one <unk> two",
    "an <extra> token<extra>",
]

# Characters that every Unicode version in use assigns alike: the libraries' regexes know different versions.
known_text = st.text(
    st.one_of(
        st.sampled_from("ab the, \n\t  ▁é🙂日\u0301"),
        st.characters(exclude_categories=["Cs", "Cn"]).filter(lambda c: unicodedata.ucd_3_2_0.category(c) != "Cn"),
    ),
    max_size=40,
)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = tokenizer.stream()
    return "".join([*map(stream.put, ids), stream.flush()])


def write_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(values))


@pytest.fixture(scope="module", params=JSON_KINDS)
def json_directory(request: Any, tmp_path_factory: Any) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    tokenizer = JSON_KINDS[request.param]()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9, pad_id=2, pad_token="</s>")
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    write_json(directory / "config.json", model_type="mistral")
    return directory


@pytest.fixture(scope="module")
def json_pair(json_directory: Path) -> tuple[Tokenizer, Any]:
    return load_tokenizer(json_directory), transformers.AutoTokenizer.from_pretrained(json_directory)


class TestTokenizerJson:
    @pytest.mark.parametrize("text", HARD_TEXTS + WITH_SPECIAL)
    def test_ids_and_text_equal_transformers(self, json_pair: tuple[Tokenizer, Any], text: str) -> None:
        ours, theirs = json_pair
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == streamed(ours, ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)

    @settings(max_examples=60, deadline=None)
    @given(text=known_text)
    def test_any_text(self, json_pair: tuple[Tokenizer, Any], text: str) -> None:
        ours, theirs = json_pair
        assert ours.encode(text) == theirs.encode(text)

    @settings(max_examples=200, deadline=None)
    @given(data=st.data())
    def test_any_ids_decode_as_in_transformers(self, json_pair: tuple[Tokenizer, Any], data: Any) -> None:
        """Characters cut in the middle, invalid bytes, special tokens between the bytes of one character."""
        ours, theirs = json_pair
        byte_tokens = [i for i in range(ours.vocab_size) if isinstance(ours.piece(i), bytes)]
        # A space written as a byte at the very start is the one place where decoders differ; no text encodes to it.
        not_space = [i for i in range(ours.vocab_size) if ours.piece(i) != b" "]
        one = st.one_of(st.sampled_from(not_space), st.sampled_from(byte_tokens or not_space)).filter(
            lambda i: ours.piece(i) != b" "
        )
        ids = data.draw(st.lists(one, max_size=12))
        if "ByteFallback" in str(theirs.backend_tokenizer.decoder) and "\ufffd" in ours.decode(ids):
            return  # one bad byte spoils the whole run of bytes there, here only itself: see below
        expected = theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids) == expected
        assert streamed(ours, ids) == expected

    def test_properties(self, json_pair: tuple[Tokenizer, Any]) -> None:
        ours, theirs = json_pair
        assert (ours.bos_id, ours.eos_ids) == (1, frozenset({2}))
        assert ours.vocab_size == len(theirs)
        assert not ours.has_chat_template


@pytest.fixture(scope="module")
def fallback_pair(tmp_path_factory: Any) -> tuple[Tokenizer, Any, Any]:
    """A tokenizer.json with byte fallback, a SentencePiece model likewise, and sentencepiece itself."""
    directory = tmp_path_factory.mktemp("json")
    JSON_KINDS["llama_prepend"]().save(str(directory / "tokenizer.json"))
    other = tmp_path_factory.mktemp("model")
    model = train_sentencepiece(other / "tokenizer.model", model_type="bpe")
    return load_tokenizer(directory), load_tokenizer(other), model


@settings(max_examples=200, deadline=None)
@given(raw=st.one_of(st.binary(max_size=12), st.text("a\né日🙂", max_size=5).map(str.encode)))
def test_byte_fallback_is_the_same_in_both_formats(fallback_pair: tuple[Tokenizer, Any, Any], raw: bytes) -> None:
    """Text is out as soon as its UTF-8 is complete, and one bad byte spoils no others."""
    from_json, from_model, model = fallback_pair
    expected = model.decode([model.piece_to_id(f"<0x{byte:02X}>") for byte in raw])
    for tokenizer, first in ((from_json, 3), (from_model, model.piece_to_id("<0x00>"))):
        stream, text = tokenizer.stream(), ""
        for at, byte in enumerate(raw, 1):
            text += stream.put(first + byte)
            seen = codecs.getincrementaldecoder("utf-8")("replace").decode(raw[:at])
            assert len(text) >= len(seen), "certain text is held back"
        assert text + stream.flush() == tokenizer.decode([first + byte for byte in raw]) == expected


def test_a_stream_never_shows_half_a_character(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    text = "🙂 日本 e\u0301 👩‍👩‍👧‍👦"
    stream, seen = tokenizer.stream(), ""
    for token_id in tokenizer.encode(text):
        seen += stream.put(token_id)
        assert text.startswith(seen)
    assert seen == text


def test_a_stream_holds_back_at_most_one_character_of_bytes(tmp_path: Path) -> None:
    """A token costs the same after a million others: byte-level text is out as soon as its last byte is in."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    continuation = tokenizer.encode("é")[-1]
    stream = tokenizer.stream()
    assert "".join(stream.put(continuation) for _ in range(10_000)) == "\ufffd" * 10_000
    assert stream.flush() == ""


def test_ids_of_padded_embedding_rows_have_no_text_in_a_stream(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.stream().put(tokenizer.vocab_size + 5) == ""


class TestAddedTokens:
    """Tokens and flags that tokenizer_config.json and its companions add to tokenizer.json."""

    def write(self, directory: Path, **config: Any) -> tuple[Tokenizer, Any]:
        tokenizer = byte_level()
        tokenizer.save(str(directory / "tokenizer.json"))
        write_json(directory / "tokenizer_config.json", **config)
        write_json(directory / "config.json", model_type="mistral")
        return load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)

    def check(self, ours: Tokenizer, theirs: Any) -> None:
        for text in ("a <|im_start|>user\nhi<|im_end|> b", "x <tool> y", "the<extra>  the", "<s>the</s>"):
            ids = ours.encode(text)
            assert ids == theirs.encode(text)
            assert ours.decode(ids) == streamed(ours, ids) == theirs.decode(ids, skip_special_tokens=True)
            assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)

    def test_added_tokens_decoder(self, tmp_path: Path) -> None:
        added = {
            "501": {"content": "<|im_start|>", "special": True},
            "502": {"content": "<|im_end|>", "special": True, "rstrip": True},
            "503": {"content": "<tool>", "special": False, "lstrip": True},
        }
        ours, theirs = self.write(tmp_path, added_tokens_decoder=added, eos_token="<|im_end|>")
        self.check(ours, theirs)
        assert ours.encode("<|im_end|>") == [502] and ours.eos_ids == {502} and ours.vocab_size == 504

    def test_added_tokens_json(self, tmp_path: Path) -> None:
        write_json(tmp_path / "added_tokens.json", **{"<tool>": 503, "<|im_end|>": 502, "<|im_start|>": 501})
        write_json(tmp_path / "special_tokens_map.json", additional_special_tokens=["<|im_start|>", "<|im_end|>"])
        ours, theirs = self.write(tmp_path)
        text = "a <|im_start|>user\nhi<|im_end|> <tool>"
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == "a user\nhi <tool>"

    def test_a_token_of_the_vocabulary_that_is_named_special_is_matched_whole_and_hidden(self, tmp_path: Path) -> None:
        ours, theirs = self.write(tmp_path, eos_token="the", extra_special_tokens=["her"])
        for text in ("the other", " then", "other"):
            assert ours.encode(text) == theirs.encode(text)
            assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
        assert "the" not in ours.decode(ours.encode("the other"))

    @pytest.mark.parametrize("flag", [True, False])
    def test_the_files_own_post_processor_decides_about_bos(self, tmp_path: Path, flag: bool) -> None:
        ours, theirs = self.write(tmp_path, bos_token="<s>", eos_token="</s>", add_bos_token=flag, add_eos_token=flag)
        assert ours.encode("hi") == theirs.encode("hi")


class TestNamedTokens:
    """How BOS and EOS can be declared."""

    def load(self, directory: Path, config: dict[str, Any] | None, special_map: dict[str, Any] | None) -> Tokenizer:
        tokenizer = byte_level()
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.save(str(directory / "tokenizer.json"))
        if config is not None:
            write_json(directory / "tokenizer_config.json", **config)
        if special_map is not None:
            write_json(directory / "special_tokens_map.json", **special_map)
        return load_tokenizer(directory)

    @pytest.mark.parametrize(
        ("config", "special_map"),
        [
            ({"bos_token": "<s>", "eos_token": "</s>"}, None),
            ({"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": {"content": "</s>"}}, None),
            ({}, {"bos_token": "<s>", "eos_token": {"content": "</s>"}}),
            ({"bos_token": None, "eos_token": None}, {"bos_token": "<s>", "eos_token": "</s>"}),
            (None, {"bos_token": 1, "eos_token": 2}),
            ({"bos_token": "<s>", "eos_token": "</s>"}, {"bos_token": "a", "eos_token": "b"}),
        ],
    )
    def test_declared(self, tmp_path: Path, config: Any, special_map: Any) -> None:
        tokenizer = self.load(tmp_path, config, special_map)
        assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, frozenset({2}))

    @pytest.mark.parametrize("config", [None, {}, {"bos_token": None, "eos_token": None}])
    def test_undeclared(self, tmp_path: Path, config: Any) -> None:
        tokenizer = self.load(tmp_path, config, None)
        assert tokenizer.bos_id == 1, "what encode puts first"
        assert tokenizer.eos_ids == frozenset()


@pytest.fixture(scope="module", params=SENTENCEPIECE_KINDS)
def sentencepiece_pair(request: Any, tmp_path_factory: Any) -> tuple[Tokenizer, Any]:
    directory = tmp_path_factory.mktemp(request.param)
    model = train_sentencepiece(directory / "tokenizer.model", **SENTENCEPIECE_KINDS[request.param])
    return load_tokenizer(directory), model


class TestSentencePiece:
    @pytest.mark.parametrize("text", HARD_TEXTS)
    def test_ids_and_text(self, sentencepiece_pair: tuple[Tokenizer, Any], text: str) -> None:
        ours, model = sentencepiece_pair
        assert ours.encode(text) == [model.bos_id(), *model.encode(text)]
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == model.encode(text)
        assert ours.decode(ids) == streamed(ours, ids) == model.decode(ids)

    @settings(max_examples=60, deadline=None)
    @given(text=known_text)
    def test_any_text(self, sentencepiece_pair: tuple[Tokenizer, Any], text: str) -> None:
        ours, model = sentencepiece_pair
        assert ours.encode(text, add_special_tokens=False) == model.encode(text)

    @settings(max_examples=200, deadline=None)
    @given(data=st.data())
    def test_any_ids(self, sentencepiece_pair: tuple[Tokenizer, Any], data: Any) -> None:
        ours, model = sentencepiece_pair
        ordinary = [i for i in range(ours.vocab_size) if not model.is_control(i)]
        tokens_of_bytes = [i for i in ordinary if model.is_byte(i)] or ordinary
        ids = data.draw(st.lists(st.one_of(st.sampled_from(ordinary), st.sampled_from(tokens_of_bytes)), max_size=12))
        assert ours.decode(ids) == streamed(ours, ids) == model.decode(ids)

    @settings(max_examples=60, deadline=None)
    @given(text=known_text, cut=st.integers(0, 40))
    def test_a_continuation_keeps_its_leading_space(
        self, sentencepiece_pair: tuple[Tokenizer, Any], text: str, cut: int
    ) -> None:
        """What a model says after a prompt is what the whole has more than the prompt."""
        ours, _ = sentencepiece_pair
        ids = ours.encode(text, add_special_tokens=False)
        prompt, more = ids[:cut], ids[cut:]
        if not ours.decode(prompt) or "\ufffd" in ours.decode(prompt):  # cut inside a character
            return
        stream = ours.stream(continues=True)
        assert ours.decode(prompt) + "".join([*map(stream.put, more), stream.flush()]) == ours.decode(ids)

    @pytest.mark.parametrize("spaces", [1, 2, 3])
    def test_spaces_at_the_start_of_ids(self, sentencepiece_pair: tuple[Tokenizer, Any], spaces: int) -> None:
        ours, model = sentencepiece_pair
        space = model.piece_to_id("▁")
        assert space != model.unk_id()
        for end in ([], model.encode("the"), [model.unk_id()]):
            ids = [space] * spaces + end
            assert ours.decode(ids) == streamed(ours, ids) == model.decode(ids)

    def test_properties(self, sentencepiece_pair: tuple[Tokenizer, Any]) -> None:
        ours, model = sentencepiece_pair
        assert (ours.vocab_size, ours.bos_id, ours.eos_ids) == (model.piece_size(), 1, frozenset({2}))

    def test_special_tokens_in_the_text(self, sentencepiece_pair: tuple[Tokenizer, Any]) -> None:
        ours, model = sentencepiece_pair
        ids = ours.encode("the fox</s><s>the", add_special_tokens=False)
        assert ids[: len(model.encode("the fox")) + 2] == [*model.encode("the fox"), 2, 1]
        assert ours.decode(ids[-1:] and [*model.encode("the fox"), 2]) == "the fox"
        assert ours.decode(ids, skip_special_tokens=False) == "the fox</s><s>the"


@pytest.mark.parametrize(
    "config",
    [
        {"add_bos_token": True},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": False, "add_eos_token": True},
        {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        {"add_bos_token": False, "add_prefix_space": False},
    ],
)
def test_sentencepiece_as_llama_tokenizer(tmp_path: Path, config: dict[str, Any]) -> None:
    """transformers converts the model; it agrees wherever a text does not begin with the space it would swallow."""
    train_sentencepiece(tmp_path / "tokenizer.model", model_type="bpe")
    write_json(tmp_path / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", **config)
    write_json(tmp_path / "config.json", model_type="llama")
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in HARD_TEXTS + WITH_SPECIAL:
        if not text.startswith((" ", "▁")):
            assert ours.encode(text) == theirs.encode(text), text


def test_sentencepiece_with_added_tokens(tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path / "tokenizer.model", model_type="bpe")
    added = {
        "600": {"content": "<|im_start|>", "special": True},
        "601": {"content": "<|im_end|>", "special": True},
        "602": {"content": "<tool>", "special": False},
    }
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "eos_token": "<|im_end|>"}
    write_json(tmp_path / "tokenizer_config.json", added_tokens_decoder=added, **config)
    write_json(tmp_path / "config.json", model_type="llama")
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "the <|im_start|>user\nhi<|im_end|> the <tool>the"
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == "the user\nhi the <tool>the"
    assert ours.vocab_size == model.piece_size() + 3 and ours.eos_ids == {2, 601}


def test_of_two_added_tokens_the_longer_is_found(tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path / "tokenizer.model", model_type="bpe")
    write_json(tmp_path / "added_tokens.json", **{"<a>": 600, "<a><b>": 601, "<b>": 602})
    assert load_tokenizer(tmp_path).encode("<a><b><a>x<b>", add_special_tokens=False) == [
        *(601, 600, model.piece_to_id("x"), 602)
    ]


def test_a_piece_that_is_named_special_is_matched_whole_and_hidden(tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path / "tokenizer.model", model_type="bpe")
    write_json(tmp_path / "tokenizer_config.json", extra_special_tokens=["he"], pad_token="<pad>")
    tokenizer, he = load_tokenizer(tmp_path), model.piece_to_id("he")
    ids = tokenizer.encode("the")
    assert ids == [1, *model.encode("t"), he]
    assert tokenizer.decode(ids) == "t"
    assert tokenizer.decode([model.unk_id()]) == model.decode([model.unk_id()])


def test_sentencepiece_legacy_puts_the_prefix_after_special_tokens_too(tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path / "tokenizer.model", model_type="bpe")
    write_json(tmp_path / "tokenizer_config.json", legacy=True)
    assert load_tokenizer(tmp_path).encode("the</s>the") == [1, *model.encode("the"), 2, *model.encode("the")]


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_published_mistral_models(tmp_path: Path, version: str) -> None:
    published = SHARED / f"mistral.model.{version}"
    if not published.exists():
        pytest.skip("needs the published models")
    (tmp_path / f"tokenizer.model.{version}").symlink_to(published)
    ours, model = load_tokenizer(tmp_path), sentencepiece.SentencePieceProcessor(model_file=str(published))
    for text in HARD_TEXTS:
        ids = ours.encode(text)
        assert ids == [1, *model.encode(text)]
        assert ours.decode(ids) == streamed(ours, ids) == model.decode(ids)
    if version == "v3":
        assert ours.encode("[INST] hi[/INST]", add_special_tokens=False) == [3, *model.encode("hi"), 4]


def test_the_newest_version_of_a_sentencepiece_model_wins(tmp_path: Path) -> None:
    for version, options in {"v2": {"vocab_size": 500}, "v11": {"vocab_size": 550}, "v3": {"vocab_size": 600}}.items():
        train_sentencepiece(tmp_path / f"tokenizer.model.{version}", model_type="bpe", **options)
    assert load_tokenizer(tmp_path).vocab_size == 550
    train_sentencepiece(tmp_path / "tokenizer.model", model_type="bpe", vocab_size=520)
    assert load_tokenizer(tmp_path).vocab_size == 520


TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tekken(path: Path, tokens: list[bytes], pattern: str = TEKKEN_PATTERN, **values: Any) -> None:
    special = [("<unk>"), ("<s>"), ("</s>"), ("[INST]"), ("[/INST]")]
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate(tokens)
    ]
    tekken: dict[str, Any] = {
        "config": {
            "pattern": pattern,
            "num_vocab_tokens": len(tokens),
            "default_vocab_size": len(tokens) + 10,
            "default_num_special_tokens": 10,
            "version": "v3",
        },
        "vocab": vocab,
        "special_tokens": [{"rank": i, "token_str": t, "is_control": True} for i, t in enumerate(special)],
    }
    tekken["config"] |= values.pop("config", {})
    path.write_text(json.dumps(tekken | values))


SINGLE_BYTES = [bytes([byte]) for byte in range(256)]


def trained_tokens() -> list[bytes]:
    """Byte-level BPE tokens in merge order, the single bytes first."""
    state = json.loads(byte_level().to_str())["model"]
    to_byte = {character: byte for byte, character in enumerate(_gpt2_characters())}
    merged = ["".join(pair) for pair in state["merges"]]
    return SINGLE_BYTES + [bytes(to_byte[character] for character in token) for token in dict.fromkeys(merged)]


def _gpt2_characters() -> list[str]:
    """From the library's own encoder: what it writes for each byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [bytes_to_unicode()[byte] for byte in range(256)]


class TestTekken:
    @pytest.fixture(scope="class")
    def pair(self, tmp_path_factory: Any) -> tuple[Tokenizer, Any]:
        tiktoken = pytest.importorskip("tiktoken")
        directory = tmp_path_factory.mktemp("tekken")
        tokens = trained_tokens()
        write_tekken(directory / "tekken.json", tokens)
        ranks = {token: rank for rank, token in enumerate(tokens)}
        return load_tokenizer(directory), tiktoken.Encoding(
            "t", pat_str=TEKKEN_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )

    @pytest.mark.parametrize("text", HARD_TEXTS)
    def test_ids_and_text(self, pair: tuple[Tokenizer, Any], text: str) -> None:
        ours, theirs = pair
        ids = ours.encode(text)
        assert ids == [1, *(rank + 10 for rank in theirs.encode_ordinary(text))]
        assert ours.decode(ids) == streamed(ours, ids) == text

    @settings(max_examples=100, deadline=None)
    @given(text=known_text)
    def test_any_text(self, pair: tuple[Tokenizer, Any], text: str) -> None:
        ours, theirs = pair
        assert ours.encode(text, add_special_tokens=False) == [rank + 10 for rank in theirs.encode_ordinary(text)]

    @settings(max_examples=100, deadline=None)
    @given(ranks=st.lists(st.one_of(st.integers(0, 480), st.integers(128, 255)), max_size=12))
    def test_any_ids(self, pair: tuple[Tokenizer, Any], ranks: list[int]) -> None:
        ours, theirs = pair
        ids = [rank + 10 for rank in ranks]
        assert ours.decode(ids) == streamed(ours, ids) == theirs.decode(ranks, errors="replace")

    @settings(max_examples=60, deadline=None)
    @given(
        tokens=st.lists(st.text("ab", min_size=2, max_size=6), unique=True, max_size=14),
        texts=st.lists(st.text("ab", min_size=1, max_size=24), min_size=8, max_size=8),
    )
    def test_merges_recovered_from_any_ranks(self, tmp_path_factory: Any, tokens: list[str], texts: list[str]) -> None:
        """Also from tokens that no training gives, in any order: ties, overlaps, parts that come after the whole."""
        tiktoken = pytest.importorskip("tiktoken")
        directory = tmp_path_factory.mktemp("ranks")
        vocab = SINGLE_BYTES + [token.encode() for token in tokens]
        write_tekken(directory / "tekken.json", vocab, pattern="[ab]+")
        ranks = {token: rank for rank, token in enumerate(vocab)}
        theirs = tiktoken.Encoding("t", pat_str="[ab]+", mergeable_ranks=ranks, special_tokens={})
        ours = load_tokenizer(directory)
        for text in texts:
            expected = [rank + 10 for rank in theirs.encode_ordinary(text)]
            assert ours.encode(text, add_special_tokens=False) == expected

    def test_special_tokens(self, pair: tuple[Tokenizer, Any]) -> None:
        ours, theirs = pair
        assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (1, frozenset({2}), theirs.n_vocab + 10)
        ids = ours.encode("[INST]hi[/INST]</s><SPECIAL_9>", add_special_tokens=False)
        assert [ids[0], *ids[-3:]] == [3, 4, 2, 9]
        assert ours.decode(ids) == "hi"

    def test_only_the_vocabulary_in_use_is_read(self, tmp_path: Path) -> None:
        write_tekken(tmp_path / "tekken.json", [*SINGLE_BYTES, b"th", b"the"], config={"default_vocab_size": 267})
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.vocab_size == 267
        assert tokenizer.encode("the", add_special_tokens=False) == [266, 10 + ord("e")]

    def test_files_of_old_list_no_special_tokens(self, tmp_path: Path) -> None:
        write_tekken(
            tmp_path / "tekken.json",
            SINGLE_BYTES,
            special_tokens=None,
            config={"default_num_special_tokens": 1000, "default_vocab_size": 1256},
        )
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.encode("[INST][TOOL_CONTENT]<SPECIAL_20>a") == [1, 3, 19, 20, 1000 + ord("a")]

    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            ({}, [1, 75]),
            ({"add_bos_token": False}, [75]),
            ({"add_eos_token": True}, [1, 75, 2]),
            ({"bos_token": None}, [75]),
        ],
    )
    def test_flags(self, tmp_path: Path, config: dict[str, Any], expected: list[int]) -> None:
        write_tekken(tmp_path / "tekken.json", SINGLE_BYTES)
        write_json(tmp_path / "tokenizer_config.json", **config)
        assert load_tokenizer(tmp_path).encode("A") == expected


def test_which_file_is_read(tmp_path: Path) -> None:
    """The vendor's own before one that was converted from it."""
    train_sentencepiece(tmp_path / "tokenizer.model", model_type="bpe")
    assert load_tokenizer(tmp_path).vocab_size == 600
    byte_level().save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).vocab_size == 501
    write_tekken(tmp_path / "tekken.json", SINGLE_BYTES)
    assert load_tokenizer(tmp_path).vocab_size == 266


def test_a_tekken_file_older_than_the_model_gives_way(tmp_path: Path) -> None:
    """A chat fine-tune that came with its own tokenizer.json and tokens, and the base model's tekken.json."""
    write_tekken(tmp_path / "tekken.json", SINGLE_BYTES)
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", added_tokens_decoder={"501": {"content": "<|im_end|>"}})
    assert load_tokenizer(tmp_path).encode("<|im_end|>") == [501]
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"'<\|im_end\|>' gets id 266, .* has 501"):
        load_tokenizer(tmp_path)
