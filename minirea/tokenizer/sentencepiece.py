"""tokenizer.model, encoded by the `sentencepiece` library."""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from minirea.errors import InputError
from minirea.files import read_file
from minirea.tokenizer.backend import LARGEST_FILE, one_line_of
from minirea.tokenizer.config import AddedToken, TokenizerConfig
from minirea.tokenizer.pieces import may_cut_tokens, may_cut_vocabulary
from minirea.tokenizer.stream import utf8_decoder

# Appended to a serialized SentencePiece model this turns its dummy prefix off or on: protocol buffers merge a field
# that comes twice, the last value winning; this is field 3 (normalizer_spec) with its field 3 (add_dummy_prefix).
_NO_DUMMY_PREFIX: Final = b"\x1a\x02\x18\x00"
_DUMMY_PREFIX: Final = b"\x1a\x02\x18\x01"
_WHITE_SPACE: Final = re.compile(r"\s*")


class SentencePiece:
    """A SentencePiece model, with special and added tokens found in the text before the library sees it.

    The dummy prefix goes before a text but not before what follows a special token in it: `"legacy": false` of
    tokenizer_config.json, the default of transformers 5. `"legacy": true` has it in both places, and
    `"add_prefix_space": false` in neither.
    """

    frames_text = False

    def __init__(self, path: Path, config: TokenizerConfig) -> None:
        from sentencepiece import SentencePieceProcessor

        self._path = path
        serialized = read_file(path, LARGEST_FILE, "a tokenizer")
        with one_line_of(path, "cannot be read as a tokenizer"):
            if not serialized:
                raise ValueError("the file is empty")
            self._model = model = SentencePieceProcessor(model_proto=serialized)
            self._bare = SentencePieceProcessor(model_proto=serialized + _NO_DUMMY_PREFIX)
            self._prefixed = SentencePieceProcessor(model_proto=serialized + _DUMMY_PREFIX)
            self._spelling = [model.id_to_piece(i) for i in range(model.piece_size())]
            if not self._spelling:
                raise ValueError("the vocabulary is empty")
            self._trims = self._bare.encode(" a") == self._bare.encode("a")  # white space at the start of a text
            self._unknown = model.decode_ids([model.unk_id()])
            bos_id, eos_id = model.bos_id(), model.eos_id()
            self.own_tokens = (bos_id if bos_id >= 0 else None, eos_id if eos_id >= 0 else None)
            self._first = model if config.flag("add_prefix_space", True) else self._bare
            self._rest = model if config.flag("legacy", False) else self._bare
            self._added = {token.content: token for token in self._matched_tokens(config)}
            self._drops_prefix, self.drops_every_leading_space = self._leading_space()
        self._content = {token.id: token.content for token in self._added.values()}
        self._any_added = _Matcher(list(self._added.values()))
        self._any_plain = _Matcher([token for token in self._added.values() if not token.special])
        self.special_tokens = {token.content: token.id for token in self._added.values() if token.special}
        self.vocab_size = max(len(self._spelling), *(token_id + 1 for token_id in self._content))

    @functools.cached_property
    def may_cut(self) -> bool:
        return may_cut_tokens(self._added.values()) and may_cut_vocabulary(self._spelling)

    def _matched_tokens(self, config: TokenizerConfig) -> list[AddedToken]:
        """Tokens that are found in a text as they are: the model's own for control, and what the config files add."""
        unknown = self._model.unk_id()
        named = {unknown, *(self._model.piece_to_id(token) for token in config.special_tokens())}
        ids = [i for i in range(len(self._spelling)) if i in named or self._model.is_control(i)]
        own = [AddedToken(i, self._spelling[i], "tokenizer.model", special=i != unknown) for i in ids]
        added = config.added_tokens()
        taken = dict(enumerate(self._spelling))
        for token in added:
            if (found := taken.setdefault(token.id, token.content)) != token.content:
                raise InputError(f"{token.source}: {token.content!r} has id {token.id}, which is {found!r} already")
        return own + added

    def _leading_space(self) -> tuple[bool, bool]:
        """Whether decoding takes back a leading space, and whether it goes on doing so, by trying it out."""
        space = min((piece for piece in self._spelling if piece.startswith("▁")), key=len, default="▁")
        lost = 2 * len(space) - len(self._first.decode_pieces([space, space]))
        return lost > 0, lost > 1

    def encode(self, text: str, frame: bool, at: str, match_special: bool) -> list[int]:  # noqa: ARG002  Tokenizer does
        ids: list[int] = []
        for part in (self._any_added if match_special else self._any_plain).split(text):
            if isinstance(part, AddedToken):
                ids.append(part.id)
            elif part:
                with one_line_of(self._path, "cannot encode the text"):
                    ids += self._model_at(at, part).encode(part)
            at = "section"
        return ids

    def _model_at(self, at: str, text: str) -> Any:
        if at == "seam":  # where white space at the start is dropped, a prefix stands for it
            return self._prefixed if self._trims and text[0].isspace() else self._bare
        return self._first if at == "start" else self._rest

    def token_to_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token].id
        token_id = self._model.piece_to_id(token)
        return token_id if token_id != self._model.unk_id() else None

    def piece(self, token_id: int) -> str | bytes:
        if token_id == self._model.unk_id():
            return self._unknown.encode()  # " ⁇ " as bytes: this space is no dummy prefix
        if token_id in self._content:
            return self._content[token_id]
        if token_id >= len(self._spelling):
            return ""
        piece = self._spelling[token_id]
        if self._model.is_byte(token_id):
            return bytes.fromhex(piece[3:5])
        return piece.replace("▁", " ")

    def first_piece(self, token_id: int) -> str:
        piece = str(self.piece(token_id))
        return piece.removeprefix(" ") if self._drops_prefix else piece

    def byte_decoder(self) -> codecs.IncrementalDecoder:
        return utf8_decoder(replace_each_byte=True)


class _Matcher:
    """Finds tokens in a text, the longest first, with the white space that they swallow."""

    def __init__(self, tokens: list[AddedToken]) -> None:
        self._tokens = sorted(tokens, key=lambda token: len(token.content), reverse=True)
        self._pattern = re.compile("|".join(f"({re.escape(token.content)})" for token in self._tokens) or "(?!)")

    def split(self, text: str) -> Iterator[str | AddedToken]:
        """Text and tokens in turn, beginning and ending with text, which may be empty."""
        start = 0
        for match in self._pattern.finditer(text):
            if match.start() < start:  # begins in white space that the token before has swallowed
                continue
            assert match.lastindex is not None
            token = self._tokens[match.lastindex - 1]
            before = text[start : match.start()]
            yield before.rstrip() if token.lstrip else before
            yield token
            start = match.end()
            if token.rstrip:
                start = _WHITE_SPACE.match(text, start).end()  # type: ignore[union-attr]  # matches "" too
        yield text[start:]


def sentencepiece_file(directory: Path) -> Path:
    """tokenizer.model, or the newest of those that Mistral publishes with a version at the end of the name."""
    versions = sorted(directory.glob("tokenizer.model.v*"), key=lambda path: (len(path.name), path.name))
    plain = directory / "tokenizer.model"
    return versions[-1] if versions and not plain.exists() else plain
