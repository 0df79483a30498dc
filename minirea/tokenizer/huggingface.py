"""tokenizer.json and Mistral's tekken.json, encoded by the `tokenizers` library."""

from __future__ import annotations

import base64
import codecs
import functools
import json
import re
from pathlib import Path
from typing import Any, Final

from minirea.errors import InputError
from minirea.files import read_file
from minirea.json_object import JsonObject
from minirea.tokenizer.backend import LARGEST_FILE, one_line_of
from minirea.tokenizer.config import TokenizerConfig
from minirea.tokenizer.pieces import may_cut_normalizer, may_cut_tokens, may_cut_vocabulary, splits_words
from minirea.tokenizer.stream import utf8_decoder
from minirea.tokenizer.tekken import BYTE_OF_CHARACTER, read_tekken

# Regular expressions of `tokenizers` end in a panic after 10**7 steps back, which those that split words take in white
# space that no line end follows. The library prints that before anything can catch it.
_LONGEST_RUN: Final = 10**7 - 100
_TOO_LONG_RUN: Final = re.compile(rf"[^\S\r\n]{{{_LONGEST_RUN}}}")
_MARK: Final = "\x00section\x00"  # an added token that stands for the special token before a section


class ContradictionError(InputError):
    """An added token does not have the id that tokenizer_config.json gives it."""


class HuggingFace:
    """A `tokenizers.Tokenizer`, from tokenizer.json or built from tekken.json."""

    drops_every_leading_space = False

    def __init__(self, tokenizer: Any, path: Path, config: TokenizerConfig, frames_text: bool) -> None:
        self._tokenizer = tokenizer
        self._path = path
        self._add_tokens(config)
        self._added = tokenizer.get_added_tokens_decoder()
        self.vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1
        self.special_tokens = {token.content: i for i, token in self._added.items() if token.special}
        self.frames_text = frames_text
        self.own_tokens = (None, None) if frames_text else (self.token_to_id("<s>"), self.token_to_id("</s>"))
        steps = _decoder_steps(tokenizer.decoder, path)
        self._byte_level = "ByteLevel" in steps
        self._byte_fallback = "ByteFallback" in steps
        self._decoder = tokenizer.decoder
        split = _steps(_state(tokenizer.pre_tokenizer))
        self._has_pattern = any(step.get("type") == "Split" and "Regex" in step.get("pattern", ()) for step in split)
        self._prefix_free = {name: _state(getattr(tokenizer, name)) for name in ("normalizer", "pre_tokenizer")}
        self._has_prefix = sum(_drop_prefix(self._prefix_free, name) for name in self._prefix_free) > 0

    @functools.cached_property
    def may_cut(self) -> bool:
        steps = {name: _steps(_state(getattr(self._tokenizer, name))) for name in self._prefix_free}
        split = splits_words(steps["pre_tokenizer"])
        if split is None or not may_cut_normalizer(steps["normalizer"]) or not may_cut_tokens(self._added.values()):
            return False
        return split or (may_cut_vocabulary(self._tokenizer.get_vocab()) and self.token_to_id("▁") is not None)

    def _add_tokens(self, config: TokenizerConfig) -> None:
        """Add what the config files add and mark as special what they call special, with transformers' own calls."""
        import tokenizers

        flags = ("special", "normalized", "single_word", "lstrip", "rstrip")
        added = config.added_tokens()
        self._tokenizer.add_tokens(
            [tokenizers.AddedToken(token.content, **{flag: getattr(token, flag) for flag in flags}) for token in added]
        )
        for token in added:
            if (found := self.token_to_id(token.content)) != token.id:
                raise ContradictionError(
                    f"{self._path}: {token.content!r} gets id {found}, {token.source} has {token.id}"
                )
        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        named = [token for token in config.special_tokens() if self.token_to_id(token) is not None]
        self._tokenizer.add_special_tokens([token for token in named if token not in known])

    def encode(self, text: str, frame: bool, at: str, match_special: bool) -> list[int]:
        if at == "section":
            marked = self._encoded(self._variant(True, match_special, marked=True), _MARK + text)
            return marked[1:]
        if at == "start" or not self._has_prefix:
            return self._encoded(self._variant(True, match_special), text, frame)
        # A prefix that goes before every section of a text still belongs after its first added token.
        bare = self._variant(False, match_special)
        ids = self._encoded(bare, text)
        if not any(token_id in self._added for token_id in ids):
            return ids
        with one_line_of(self._path, "cannot encode the text"):
            offsets = bare.encode(text, add_special_tokens=False).offsets
        for index, (token_id, (start, end)) in enumerate(zip(ids, offsets, strict=True)):
            if (
                token_id in self._added and text[start:end].strip() == self._added[token_id].content.strip()
            ):  # not <unk>
                return ids[:index] + self._encoded(self._variant(True, match_special), text[start:])
        return ids

    def _encoded(self, tokenizer: Any, text: str, frame: bool = False) -> list[int]:
        if self._has_pattern and len(text) >= _LONGEST_RUN and (run := _TOO_LONG_RUN.search(text)):
            found = f"text: {_LONGEST_RUN:,} or more white space characters in a row, from character {run.start():,} on"
            raise InputError(f"{found}: more than the pattern in {self._path} can split")
        with one_line_of(self._path, "cannot encode the text"):
            return tokenizer.encode_batch_fast([text], add_special_tokens=frame)[0].ids

    @functools.cache  # noqa: B019  a handful of variants, as long-lived as this object
    def _variant(self, has_prefix: bool, match_special: bool, marked: bool = False) -> Any:
        """The same tokenizer, its vocabulary shared: without prefix, without special tokens, or with _MARK added."""
        if has_prefix and match_special and not marked:
            return self._tokenizer
        import tokenizers

        state = {name: _state(getattr(self._tokenizer, name)) for name in self._prefix_free}
        state |= {} if has_prefix else self._prefix_free
        empty = {"type": "WordLevel", "vocab": {"": 0}, "unk_token": ""}
        variant = tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", "model": empty} | state))
        variant.model = self._tokenizer.model
        variant.add_tokens([self._added[token_id] for token_id in sorted(self._added)])
        if marked:
            variant.add_tokens([tokenizers.AddedToken(_MARK, special=False, normalized=False)])
        variant.encode_special_tokens = not match_special
        return variant

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def piece(self, token_id: int) -> str | bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return ""
        if self._byte_level:
            return _bytes_of(token)
        if self._byte_fallback and (match := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)):
            return bytes.fromhex(match[1])
        return self._join("a", token)[1:]  # after another token, so that it is not taken for the start of a text

    def first_piece(self, token_id: int) -> str:
        return self._join(self._tokenizer.id_to_token(token_id))

    def _join(self, *tokens: str) -> str:
        if self._decoder is None:
            return " ".join(tokens)
        with one_line_of(self._path, f"cannot decode the token {tokens[-1]!r}"):
            return self._decoder.decode(list(tokens))

    def byte_decoder(self) -> codecs.IncrementalDecoder:
        return utf8_decoder(replace_each_byte=not self._byte_level)


def load_tekken(path: Path, config: TokenizerConfig) -> HuggingFace:
    with one_line_of(path, "cannot be read as a tokenizer"):
        return HuggingFace(read_tekken(path), path, config, frames_text=False)


def load_json(path: Path, config: TokenizerConfig) -> HuggingFace:
    import tokenizers

    raw = read_file(path, LARGEST_FILE, "a tokenizer")
    declared = JsonObject.parse(raw, str(path))
    _check_steps(declared)
    with one_line_of(path, "cannot be read as a tokenizer"):
        if any(declared.values.get(key) is not None for key in ("truncation", "padding")):  # meant for training batches
            raw = json.dumps(declared.values | {"truncation": None, "padding": None}).encode()
        tokenizer = tokenizers.Tokenizer.from_str(raw.decode())
        tokenizer.encode("")  # fails if the post-processor names a token that it does not define
        for token in declared.values.get("added_tokens") or []:
            if (found := tokenizer.token_to_id(token["content"])) != token["id"]:  # the library renumbers in silence
                raise InputError(f"{path}: added token {token['content']!r} has id {token['id']}, expected {found}")
        if not tokenizer.get_vocab_size():
            raise InputError(f"{path}: the vocabulary is empty")
        return HuggingFace(tokenizer, path, config, frames_text=True)


def _check_steps(declared: JsonObject) -> None:
    """Refuse what would make the library panic, abort, or encode one text in several ways."""
    model = declared.values.get("model")
    if isinstance(model, dict) and model.get("dropout"):
        raise JsonObject(model, f"{declared.source}: model").fail("dropout", "0 or null: encoding would vary")
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        for step in _steps(declared.values.get(part)):
            source = JsonObject(step, f"{declared.source}: {part}: {step.get('type')}")
            pattern = step.get("pattern")
            if isinstance(pattern, dict) and "" in pattern.values():
                raise source.fail("pattern", "one that is not empty")
            if step.get("type") == "FixedLength":
                source.integer("length")
            if step.get("type") == "Precompiled" and not _is_character_map(step.get("precompiled_charsmap")):
                raise source.fail("precompiled_charsmap", "a character map of SentencePiece in base64")
            if step.get("type") == "TemplateProcessing":
                _check_template(source)


def _is_character_map(value: Any) -> bool:
    """Whether its parts are there: the size of a trie, the trie, and text."""
    try:
        raw = base64.b64decode(value, validate=True)
        size = int.from_bytes(raw[:4], "little")
        raw[4 + size :].decode()
    except (TypeError, ValueError):
        return False
    return 0 < size <= len(raw) - 4 and size % 4 == 0


def _check_template(template: JsonObject) -> None:
    defined = template.values.get("special_tokens")
    for key in ("single", "pair"):
        for piece in template.values.get(key) or []:
            token = piece.get("SpecialToken") if isinstance(piece, dict) else None
            if isinstance(token, dict) and not (isinstance(defined, dict) and token.get("id") in defined):
                raise template.fail("special_tokens", f"an entry for {token.get('id')!r}, which {key} has")


def _steps(step: Any) -> list[dict[str, Any]]:
    """A declared step and, of a sequence, all steps in it."""
    found, pending = [], [step]
    while pending:
        step = pending.pop()
        if isinstance(step, dict):
            found.append(step)
            pending += [part for value in step.values() if isinstance(value, list) for part in value]
    return found


def _state(step: Any) -> Any:
    """A normalizer, pre-tokenizer or decoder as tokenizer.json declares it."""
    return None if step is None else json.loads(step.__getstate__())


def _drop_prefix(parent: Any, key: Any) -> bool:
    """Edit the declared step at parent[key] so that it puts no space before a text; whether it did."""
    step = parent[key]
    kind = step["type"] if step else None
    if kind == "Sequence":
        parts = next(value for value in step.values() if isinstance(value, list))
        dropped = [_drop_prefix(parts, index) for index in range(len(parts))]
        parts[:] = [part for part in parts if part is not None]
        return True in dropped
    if kind == "Prepend":
        parent[key] = None
        return True
    if kind == "Metaspace":
        had_prefix = step.get("prepend_scheme", "always") != "never"
        parent[key] = {"type": kind, "replacement": step["replacement"], "prepend_scheme": "never"}
        parent[key] |= {"split": step.get("split", True)}
        return had_prefix
    if kind == "ByteLevel":
        had_prefix = step["add_prefix_space"]
        step["add_prefix_space"] = False
        return had_prefix
    return False


def _decoder_steps(decoder: Any, path: Path) -> set[str]:
    """The types of a decoder's steps, all of which `HuggingFace.piece` can do token by token."""
    steps = {step["type"] for step in _steps(_state(decoder))}
    known = {"ByteLevel", "Fuse"} if "ByteLevel" in steps else {"ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"}
    if unknown := sorted(steps - known - {"Sequence"}):
        raise InputError(f"{path}: decoder has a {unknown[0]} step, expected only {', '.join(sorted(known))}")
    return steps


def _bytes_of(token: str) -> bytes:
    """The bytes of a byte-level token. Added tokens may be spelled as plain text, and then stand for just that."""
    try:
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()
