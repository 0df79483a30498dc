"""tokenizer.json and Mistral's tekken.json, encoded by the `tokenizers` library."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any

from minirea.errors import InputError
from minirea.json_object import JsonObject
from minirea.tokenizer.backend import reading
from minirea.tokenizer.config import TokenizerConfig, one_line
from minirea.tokenizer.stream import ByteRun
from minirea.tokenizer.tekken import BYTE_OF_CHARACTER, read_tekken


class HuggingFace:
    """A `tokenizers.Tokenizer`, from tokenizer.json or built from tekken.json."""

    drops_every_leading_space = False

    def __init__(
        self, tokenizer: Any, path: Path, config: TokenizerConfig, frames_text: bool, has_prefix: bool = False
    ) -> None:
        tokenizer.no_truncation()  # a file may ask for both; they are meant for training batches
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._path = path
        self._add_tokens(config)
        self.vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1
        self.special_ids = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self.frames_text = frames_text
        self.own_tokens = (None, None) if frames_text else (self.token_to_id("<s>"), self.token_to_id("</s>"))
        steps = _decoder_steps(tokenizer.decoder, path)
        self._byte_level = "ByteLevel" in steps
        self._byte_fallback = "ByteFallback" in steps
        self._join = " ".join if tokenizer.decoder is None else tokenizer.decoder.decode
        self._bare = _without_prefix(tokenizer) if has_prefix else tokenizer

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
                raise InputError(f"{self._path}: {token.content!r} gets id {found}, {token.source} has {token.id}")
        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        named = [token for token in config.special_tokens() if self.token_to_id(token) is not None]
        self._tokenizer.add_special_tokens([token for token in named if token not in known])

    def encode(self, text: str, add_special_tokens: bool, continues: bool) -> list[int]:
        if not continues:
            return self._encoded(self._tokenizer, text, add_special_tokens).ids
        ids = self._encoded(self._bare, text, False).ids
        # A prefix that goes before every section still belongs after the added tokens of the text.
        added = self._tokenizer.get_added_tokens_decoder()
        first = next((index for index, token_id in enumerate(ids) if token_id in added), None)
        if first is None or self._bare is self._tokenizer:
            return ids
        start = self._encoded(self._bare, text, False, with_offsets=True).offsets[first][0]
        return ids[:first] + self._encoded(self._tokenizer, text[start:], False).ids

    def _encoded(self, tokenizer: Any, text: str, add_special_tokens: bool, with_offsets: bool = False) -> Any:
        encode_batch = tokenizer.encode_batch if with_offsets else tokenizer.encode_batch_fast
        try:
            return encode_batch([text], add_special_tokens=add_special_tokens)[0]
        except Exception as error:  # the library raises nothing more exact
            raise InputError(f"{self._path}: cannot encode the text: {one_line(error)}") from None

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
        return self._join(["a", token])[1:]  # after another token, so that it is not taken for the start of a text

    def first_piece(self, token_id: int) -> str:
        return self._join([self._tokenizer.id_to_token(token_id)])

    def byte_decoder(self) -> codecs.IncrementalDecoder:
        return codecs.getincrementaldecoder("utf-8")("replace") if self._byte_level else ByteRun()


def load_tekken(path: Path, config: TokenizerConfig) -> HuggingFace:
    with reading(path):
        tokenizer = read_tekken(path)
    return HuggingFace(tokenizer, path, config, frames_text=False)


def load_json(path: Path, config: TokenizerConfig) -> HuggingFace:
    import tokenizers

    declared = JsonObject.read(path)
    with reading(path):
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        tokenizer.encode("")  # fails if the post-processor names a token that it does not define
    for token in declared.values.get("added_tokens") or []:
        if (found := tokenizer.token_to_id(token["content"])) != token["id"]:  # the library renumbers in silence
            raise InputError(f"{path}: added token {token['content']!r} has id {token['id']}, expected {found}")
    if not tokenizer.get_vocab_size():
        raise InputError(f"{path}: the vocabulary is empty")
    has_prefix = _drop_prefix(declared.values.get("normalizer")) or _drop_prefix(declared.values.get("pre_tokenizer"))
    return HuggingFace(tokenizer, path, config, frames_text=True, has_prefix=has_prefix)


def _without_prefix(tokenizer: Any) -> Any:
    """The same tokenizer, its model shared, that puts nothing before a text."""
    import tokenizers

    steps = {"normalizer": tokenizer.normalizer, "pre_tokenizer": tokenizer.pre_tokenizer}
    declared = {name: json.loads(step.__getstate__()) if step else None for name, step in steps.items()}
    for name, step in declared.items():
        if _drop_prefix(step) and step["type"] == "Prepend":
            declared[name] = None
    empty = {"type": "WordLevel", "vocab": {"": 0}, "unk_token": ""}
    bare = tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", "model": empty} | declared))
    bare.model = tokenizer.model
    added = tokenizer.get_added_tokens_decoder()
    bare.add_tokens([added[token_id] for token_id in sorted(added)])
    return bare


def _drop_prefix(step: Any) -> bool:
    """Edit a declared normalizer or pre-tokenizer so that it puts no space before a text; whether it did."""
    if not isinstance(step, dict):
        return False
    kind = step.get("type")
    if kind == "Sequence":
        parts = next(value for value in step.values() if isinstance(value, list))
        dropped = [_drop_prefix(part) for part in parts]
        parts[:] = [part for part in parts if part["type"] != "Prepend"]
        return any(dropped)
    if kind == "Metaspace":
        had_prefix = step.pop("prepend_scheme", "always") != "never" and step.pop("add_prefix_space", True)
        step |= {"prepend_scheme": "never"}
        return had_prefix
    if kind == "ByteLevel":
        had_prefix = step.get("add_prefix_space", True)
        step["add_prefix_space"] = False
        return had_prefix
    return kind == "Prepend"


def _decoder_steps(decoder: Any, path: Path) -> set[str]:
    """The types of a decoder's steps, all of which `HuggingFace.piece` can do token by token."""
    if decoder is None:
        return set()
    steps, pending = set(), [json.loads(decoder.__getstate__())]
    while pending:
        step = pending.pop()
        pending += step.get("decoders", [])
        steps.add(step["type"])
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
