"""Bad tokenizer files, texts and ids: one line each, naming what is wrong, and nothing printed by native code."""

from __future__ import annotations

import base64
import contextlib
import copy
import io
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minirea.errors import InputError, MinireaError, MissingFileError
from minirea.tokenizer import NoTokenizerError, load_tokenizer

ADDED_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [{"id": 3, "content": "<s>", **ADDED_FLAGS}],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
}
TEKKEN: dict[str, Any] = {
    "config": {"pattern": "[a-z]+|.", "default_vocab_size": 260, "default_num_special_tokens": 4},
    "vocab": [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None} for i in range(256)],
    "special_tokens": [{"rank": i, "token_str": t, "is_control": True} for i, t in enumerate(["<unk>", "<s>", "</s>"])],
}


def edited(values: dict[str, Any], **edits: Any) -> dict[str, Any]:
    """A copy with keys set, "a.b" reaching into objects; None as value stays None."""
    values = copy.deepcopy(values)
    for path, value in edits.items():
        *parents, key = path.split("__")
        target = values
        for parent in parents:
            target = target[parent]
        target[key] = value
    return values


def check_refused(directory: Path, capfd: pytest.CaptureFixture[str], match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        load_tokenizer(directory)
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value)
    assert capfd.readouterr() == ("", ""), "native code has printed"


def test_the_files_that_the_others_spoil_are_good(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    assert load_tokenizer(tmp_path).encode("ab<s>a") == [2, 3, 0]
    (tmp_path / "tekken.json").write_text(json.dumps(TEKKEN))
    assert load_tokenizer(tmp_path).encode("a") == [1, 4 + ord("a")]


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"nowhere: no such model directory"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(
        MissingFileError, match=r"no tokenizer, expected tokenizer.json, tekken.json or tokenizer.model"
    ):
        load_tokenizer(tmp_path)


SPLIT = {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": []}


@pytest.mark.parametrize(
    ("contents", "match"),
    [
        ("", "tokenizer.json: not valid JSON"),
        (json.dumps(TOKENIZER)[:-9], "tokenizer.json: not valid JSON"),
        ("[]", "tokenizer.json: holds a JSON list, expected an object"),
        ('{"model":' * 20000, "tokenizer.json: not valid JSON"),
        ("{}", "tokenizer.json: cannot be read as a tokenizer: Model missing"),
        (edited(TOKENIZER, model=None), "cannot be read as a tokenizer"),
        (edited(TOKENIZER, model__type="Nonesuch"), "cannot be read as a tokenizer"),
        (edited(TOKENIZER, model__vocab=["a"]), "cannot be read as a tokenizer"),
        (edited(TOKENIZER, model__vocab={"a": -1}), "cannot be read as a tokenizer"),
        (edited(TOKENIZER, model__merges=["a c"]), "Token `c` out of vocabulary"),
        (edited(TOKENIZER, model__merges=[], model__vocab={}, added_tokens=[]), "the vocabulary is empty"),
        (edited(TOKENIZER, added_tokens=[{"id": 3}]), "cannot be read as a tokenizer: missing field"),
        (edited(TOKENIZER, added_tokens=[{"id": 9, "content": "<s>", **ADDED_FLAGS}]), "'<s>' has id 9, expected 3"),
        (edited(TOKENIZER, pre_tokenizer=SPLIT), "cannot be read as a tokenizer: Oniguruma error"),
        (edited(TOKENIZER, normalizer=CHARSMAP), 'precompiled_charsmap is "AAAA", expected a character map'),
        (edited(TOKENIZER, post_processor=TEMPLATE | {"special_tokens": {}}), "special_tokens is {}, expected"),
        (edited(TOKENIZER, decoder={"type": "CTC", "pad_token": "a", "word_delimiter_token": "b", "cleanup": True}),
         "decoder has a CTC step, expected only ByteFallback"),
    ],
)  # fmt: skip
def test_tokenizer_json(tmp_path: Path, capfd: pytest.CaptureFixture[str], contents: Any, match: str) -> None:
    (tmp_path / "tokenizer.json").write_text(contents if isinstance(contents, str) else json.dumps(contents))
    check_refused(tmp_path, capfd, match)


@pytest.mark.parametrize("name", ["tokenizer.json", "tekken.json", "tokenizer.model", "chat_template.jinja"])
def test_a_directory_in_the_place_of_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / name).mkdir()
    if name.startswith("chat"):
        (tmp_path / "tekken.json").write_text(json.dumps(TEKKEN))
    check_refused(tmp_path, capfd, f"{name}: is a directory, expected a file with")


@pytest.mark.parametrize(
    ("contents", "match"),
    [
        ("{", "tekken.json: not valid JSON"),
        (edited(TEKKEN, config=3), "tekken.json: config is 3, expected an object"),
        (edited(TEKKEN, config={}), "tekken.json: config: pattern is absent, expected a regular expression"),
        (edited(TEKKEN, config__pattern="(("), "tekken.json: cannot be read as a tokenizer"),
        (edited(TEKKEN, config__pattern="\ud800"), "tekken.json: cannot be read as a tokenizer"),
        (edited(TEKKEN, config__default_vocab_size=100), "default_vocab_size is 100"),
        (edited(TEKKEN, config__default_vocab_size=999), "default_vocab_size is 999, expected at most 260"),
        (edited(TEKKEN, config__default_num_special_tokens=1), "default_num_special_tokens is 1"),
        (edited(TEKKEN, config__default_num_special_tokens=2**30), "default_num_special_tokens is 1073741824"),
        (edited(TEKKEN, special_tokens={"a": 1}), "special_tokens is .*, expected a list of objects"),
        (edited(TEKKEN, special_tokens=[{"rank": 1, "token_str": "<s>"}]), "special_tokens is"),
        (edited(TEKKEN, special_tokens=[{"rank": 0, "token_str": ["x"]}]), "expected distinct strings"),
        (edited(TEKKEN, special_tokens=[{"rank": i, "token_str": "x"} for i in (0, 1)]), "expected distinct strings"),
        (edited(TEKKEN, special_tokens=[{"rank": 0, "token_str": "\udc00"}]), "expected distinct strings"),
        (edited(TEKKEN, vocab=None), "vocab is null, expected a list of objects"),
        (edited(TEKKEN, vocab=[]), "expected distinct tokens, those of a single byte first"),
        (edited(TEKKEN, vocab=TEKKEN["vocab"][:-1]), "expected distinct tokens"),
        (edited(TEKKEN, vocab=[*TEKKEN["vocab"], {"rank": 256, "token_bytes": "YQ=="}]), "expected distinct tokens"),
        (edited(TEKKEN, vocab=[*TEKKEN["vocab"], {"rank": 256, "token_bytes": "%"}]), "expected token_bytes in base64"),
        (edited(TEKKEN, vocab=[*TEKKEN["vocab"], {"rank": 256, "token_bytes": 5}]), "expected token_bytes in base64"),
        (edited(TEKKEN, vocab=[*TEKKEN["vocab"], {"rank": 300, "token_bytes": "YWI="}]), "expected a list of objects"),
        (edited(TEKKEN, vocab=[*TEKKEN["vocab"], {"rank": [], "token_bytes": "YWI="}]), "expected a list of objects"),
    ],
)
def test_tekken(tmp_path: Path, capfd: pytest.CaptureFixture[str], contents: Any, match: str) -> None:
    (tmp_path / "tekken.json").write_text(contents if isinstance(contents, str) else json.dumps(contents))
    check_refused(tmp_path, capfd, match)


@pytest.fixture(scope="module")
def sentencepiece_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox", "jumps over the lazy dog"] * 9),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda model: model[:1000],
        lambda model: model[:-3],
        lambda model: model[:20] + b"\xff" * 20 + model[40:],
        lambda model: model[:0],
        lambda _: b"\x1a\x02\x18\x00",
        lambda _: b"\x00" * 64,
        lambda _: b"\xff" * 64,
        lambda _: b"aGVsbG8= 0\nd29ybGQ= 1\n",
    ],
)
def test_sentencepiece(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], sentencepiece_model: bytes, spoil: Callable[[bytes], bytes]
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(spoil(sentencepiece_model))
    check_refused(tmp_path, capfd, "tokenizer.model: cannot be read as a tokenizer")


CONFIGS: list[tuple[str, Any, str]] = [
    ("tokenizer_config.json", "{", "not valid JSON"),
    ("tokenizer_config.json", [], "holds a JSON list"),
    ("tokenizer_config.json", {"bos_token": 1.5}, "bos_token is 1.5, expected a token"),
    ("tokenizer_config.json", {"bos_token": ""}, 'bos_token is "", expected a token'),
    ("tokenizer_config.json", {"bos_token": {"text": "<s>"}}, "bos_token is .*, expected a token"),
    ("tokenizer_config.json", {"eos_token": "<end>"}, 'eos_token is "<end>", expected a token of the vocabulary'),
    ("tokenizer_config.json", {"eos_token": "\ud83d"}, "eos_token is"),
    ("tokenizer_config.json", {"pad_token": ["x"]}, "pad_token is"),
    ("tokenizer_config.json", {"add_bos_token": "yes"}, 'add_bos_token is "yes", expected true or false'),
    ("tokenizer_config.json", {"extra_special_tokens": 4}, "extra_special_tokens is 4, expected a list of tokens"),
    ("tokenizer_config.json", {"additional_special_tokens": [4]}, "additional_special_tokens is"),
    ("tokenizer_config.json", {"added_tokens_decoder": []}, "added_tokens_decoder is .*, expected an object"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "y"}}}, "added_tokens_decoder: x is"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"9": "y"}}, "added_tokens_decoder: 9 is"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"9": {"content": ""}}}, "added_tokens_decoder: 9 is"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"9": {"content": "y", "lstrip": 1}}}, "lstrip is 1"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 30: {"content": "y"}}}, "added_tokens_decoder"),
    ("special_tokens_map.json", {"bos_token": 10**6}, "bos_token is 1000000, expected a token of the vocabulary"),
    ("special_tokens_map.json", {"eos_token": -1}, "eos_token is -1"),
    ("added_tokens.json", {"<x>": "9"}, '<x> is "9", expected an integer'),
    ("added_tokens.json", {"": 9}, "expected a token"),
    ("chat_template.json", {"chat_template": 1}, "chat_template is 1"),
]


@pytest.mark.parametrize(("name", "contents", "match"), CONFIGS)
@pytest.mark.parametrize("kind", ["tekken.json", "tokenizer.model"])
def test_companion_files(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    sentencepiece_model: bytes,
    kind: str,
    name: str,
    contents: Any,
    match: str,
) -> None:
    (tmp_path / kind).write_bytes(json.dumps(TEKKEN).encode() if kind == "tekken.json" else sentencepiece_model)
    load_tokenizer(tmp_path)
    (tmp_path / name).write_text(contents if isinstance(contents, str) else json.dumps(contents))
    check_refused(tmp_path, capfd, match)
    with pytest.raises(InputError, match=name):
        load_tokenizer(tmp_path)


def test_an_added_token_with_an_id_that_it_cannot_have(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    added = {"added_tokens_decoder": {"7": {"content": "<x>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(added))
    check_refused(tmp_path, capfd, r"'<x>' gets id 4, .*tokenizer_config.json: added_tokens_decoder has 7")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_loads_or_is_refused(tmp_path: Path, sentencepiece_model: bytes, data: Any) -> None:
    """Whatever bytes are there: no crash, and no error but ours."""
    for name in ("tokenizer.json", "tekken.json", "tokenizer.model"):
        (tmp_path / name).unlink(missing_ok=True)
    good = {
        "tokenizer.json": json.dumps(TOKENIZER).encode(),
        "tekken.json": json.dumps(TEKKEN).encode(),
        "tokenizer.model": sentencepiece_model,
    }
    name = data.draw(st.sampled_from(sorted(good)))
    contents = bytearray(good[name])
    for _ in range(data.draw(st.integers(1, 4))):
        contents[data.draw(st.integers(0, len(contents) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / name).write_bytes(contents[: data.draw(st.integers(len(contents) // 2, len(contents)))])
    with contextlib.suppress(MinireaError):
        tokenizer = load_tokenizer(tmp_path)
        tokenizer.decode(tokenizer.encode("a b"))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize("token_id", [-1, 4, 10**12, 1.5, "1", None])
def test_ids_outside_the_vocabulary(tokenizer: Any, token_id: Any) -> None:
    with pytest.raises(InputError, match=r"token id .* is not in the vocabulary, expected 0 to 3"):
        tokenizer.decode([0, token_id])


@pytest.mark.parametrize("text", ["a\ud83d", "\udc00", "ok \ud83d\ude00 in halves"])
def test_half_a_surrogate_pair(tokenizer: Any, text: str) -> None:
    with pytest.raises(InputError, match=r"text: character \d is the lone surrogate '.ud") as caught:
        tokenizer.encode(text)
    str(caught.value).encode()


# A template, what replaces parts of a message, and what the error says.
SURROGATES_IN_CHATS: dict[str, tuple[str, dict[str, Any], str]] = {
    "content": ("{{ messages[0].content }}", {"content": "a\ud800"}, "message .*: character 1 is the lone"),
    "part": ("x", {"content": [{"type": "text", "text": "\udfff"}]}, "message .*: character 0 is the lone"),
    "role": ("x", {"role": "\ud800"}, "message .*: character 0 is the lone"),
    "another field": ("x", {"name": "\ud800"}, "message .*: character 0 is the lone"),
    "template": ("ab\ud800", {}, "tokenizer_config.json: .* template writes: character 2 is"),
    "literal": ("{{ '\\ud800' }}", {}, "tokenizer_config.json: .* template writes: character 0 is"),
}


@pytest.mark.parametrize("case", SURROGATES_IN_CHATS)
def test_half_a_surrogate_pair_in_a_chat(case: str, tmp_path: Path) -> None:
    template, message, expected = SURROGATES_IN_CHATS[case]
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(InputError, match=expected) as caught:
        load_tokenizer(tmp_path).encode_chat([{"role": "user", "content": "a"} | message])
    str(caught.value).encode()


def test_text_that_the_vocabulary_cannot_write(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a") == [0]
    with pytest.raises(InputError, match=r"tokenizer.json: cannot encode the text: WordLevel error"):
        tokenizer.encode("b")


STRIP_DECODER = {"type": "Strip", "content": "a", "start": 0, "stop": 5}

HOSTILE_JSON: dict[str, dict[str, Any]] = {
    "an empty pattern": edited(TOKENIZER, normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "x"}),
    "an empty pattern in a sequence": edited(
        TOKENIZER,
        decoder={
            "type": "Sequence",
            "decoders": [{"type": "Replace", "pattern": {"Regex": ""}, "content": "x"}, {"type": "Fuse"}],
        },
    ),
    "no length": edited(TOKENIZER, pre_tokenizer={"type": "FixedLength", "length": 0}),
    "dropout": edited(TOKENIZER, model__dropout=0.1),
    "nested steps": edited(TOKENIZER, normalizer=json.loads('{"type":"Sequence","normalizers":[' * 300 + "]}" * 300)),
    "nested tokens": edited(TOKENIZER, added_tokens=json.loads("[" * 600 + "]" * 600)),
    "an id of many digits": json.loads(json.dumps(TOKENIZER).replace('"id": 3', '"id": ' + "9" * 4000)),
    "an id beyond 32 bits": edited(TOKENIZER, model__vocab={"a": 2**32, "b": 1, "ab": 2}),
    "a trie beyond its end": edited(TOKENIZER, normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="}),
}


@pytest.mark.parametrize("name", HOSTILE_JSON)
def test_what_would_make_the_library_panic_or_abort(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(HOSTILE_JSON[name]))
    check_refused(tmp_path, capfd, "tokenizer.json")


@pytest.mark.parametrize(
    "values",
    [
        {"padding": {"strategy": {"Fixed": 20_000_000_000}, "direction": "Right", "pad_to_multiple_of": None}
         | {"pad_id": 0, "pad_type_id": 0, "pad_token": "a"}},
        {"truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 5}},
        {"truncation": {"direction": "Left", "max_length": 0, "strategy": "OnlySecond", "stride": 0}},
        {"truncation": "x", "padding": 7},
    ],
)  # fmt: skip
def test_padding_and_truncation_are_off_before_the_library_sees_them(tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER | values))
    assert load_tokenizer(tmp_path).encode("abab" * 9) == [2] * 18


def test_panics_of_the_library_are_one_line(tmp_path: Path) -> None:
    """The library prints of its own what it panics with; only what is raised is ours."""
    backtracking = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(edited(TOKENIZER, pre_tokenizer=backtracking)))
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(InputError, match=r"tokenizer.json: cannot encode the text: "):
        tokenizer.encode("a" * 200 + "b")
    (tmp_path / "tokenizer.json").write_text(json.dumps(edited(TOKENIZER, decoder=STRIP_DECODER)))
    with pytest.raises(InputError, match=r"tokenizer.json: cannot decode the token 'a': "):
        load_tokenizer(tmp_path).decode([0, 0])


def protobuf_field(number: int, payload: bytes) -> bytes:
    return bytes([number << 3 | 2, len(payload)]) + payload


def test_a_sentencepiece_piece_that_is_no_text(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], sentencepiece_model: bytes
) -> None:
    score = b"\x15" + struct.pack("<f", -9.0)
    (tmp_path / "tokenizer.model").write_bytes(
        sentencepiece_model + protobuf_field(1, protobuf_field(1, b"\xff\xfe") + score)
    )
    check_refused(tmp_path, capfd, "tokenizer.model: cannot be read as a tokenizer: 'utf-8' codec")


@pytest.mark.parametrize("content", ["<x>", "<x> ", " <x>", " ", "\n"])
@pytest.mark.parametrize("flags", [{}, {"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}])
def test_sentencepiece_added_tokens_that_swallow_white_space(
    tmp_path: Path, sentencepiece_model: bytes, content: str, flags: dict[str, bool]
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    added = {"added_tokens_decoder": {"1000": {"content": content, **flags}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(added))
    tokenizer = load_tokenizer(tmp_path)
    found = tokenizer.encode(f"the{content}fox").count(1000)
    assert found == 1
    assert tokenizer.encode("the" + " " * 200_000 + "fox")  # quadratic, this would take minutes
    if content == "<x>":
        plain = tokenizer.encode("the<x>fox")
        assert (tokenizer.encode("the  <x>fox") == plain) == flags.get("lstrip", False)
        assert (tokenizer.encode("the<x>  fox") == plain) == flags.get("rstrip", False)


def test_an_added_token_in_the_place_of_another(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], sentencepiece_model: bytes
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"Hello": 2}))
    check_refused(tmp_path, capfd, r"added_tokens.json: 'Hello' has id 2, which is '</s>' already")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"Hello": 900, "World": 900}))
    check_refused(tmp_path, capfd, r"added_tokens.json: 'World' has id 900, which is 'Hello' already")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"</s>": 2, "Hello": 900}))
    assert load_tokenizer(tmp_path).encode("</s>Hello") == [1, 2, 900]
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"Hello": 2}))
    check_refused(tmp_path, capfd, r"'Hello' gets id 4, .*added_tokens.json has 2")


@pytest.mark.parametrize(
    ("special", "tokens", "match"),
    [
        ("a", [], "none that is spelled like a byte of vocab, as 'a' is"),
        ("Ā", [], "none that is spelled like a byte"),
        ("x<", [base64.b64encode(b"y" * 2**20).decode()], "of at most 1024 bytes"),
        ("x<", [base64.b64encode(b"%06d" % i * 160).decode() for i in range(99)], "of at most 1024 bytes"),
    ],
)
def test_tekken_tokens(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], special: str, tokens: list[str], match: str
) -> None:
    more = [{"rank": 256 + i, "token_bytes": token} for i, token in enumerate(tokens)]
    listed = [*TEKKEN["special_tokens"], {"rank": 3, "token_str": special}]
    config = {"pattern": ".", "default_num_special_tokens": 4}
    values = edited(TEKKEN, special_tokens=listed, vocab=[*TEKKEN["vocab"], *more], config=config)
    (tmp_path / "tekken.json").write_text(json.dumps(values))
    check_refused(tmp_path, capfd, match)


NAMES = ["tokenizer.json", "tekken.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"]
NAMES += ["added_tokens.json", "chat_template.jinja", "chat_template.json"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["a pipe", "a device", "a link to nothing"])
def test_files_that_are_no_regular_files(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    if not name.startswith("tok") or "config" in name:
        (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    path = tmp_path / name
    if kind == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "a device" else tmp_path / "nothing")
    with pytest.raises(MinireaError, match=name) as caught:
        load_tokenizer(tmp_path)
    assert not isinstance(caught.value, NoTokenizerError)  # which would let a model load without one
    assert str(caught.value).count(name) == 1
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_split_special_tokens_makes_text_of_them(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(TEKKEN))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"split_special_tokens": True}))
    assert load_tokenizer(tmp_path).encode("</s>") == [1, *(4 + byte for byte in b"</s>")]


def test_loading_leaves_the_standard_error_of_the_process_alone(tmp_path: Path) -> None:
    """Also while a file is refused: lines of other threads and of children go where they would."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(edited(TOKENIZER, model__type="Nonesuch")))
    code = (
        "import os, sys\nfrom minirea.tokenizer import NoTokenizerError, load_tokenizer\nbefore = os.fstat(2)\n"
        "os.dup2 = os.dup = lambda *_: sys.exit('redirected')\n"
        "try: load_tokenizer(sys.argv[1])\nexcept ValueError: print('refused')\n"
        "assert os.path.samestat(before, os.fstat(2))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "refused\n", "")
