"""tokenizer.model, encoded by the `sentencepiece` library."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from minirea.tokenizer.backend import reading
from minirea.tokenizer.config import AddedToken, TokenizerConfig

# Appended to a serialized SentencePiece model this turns its dummy prefix off: protocol buffers merge a field that
# comes twice, the last value winning; this is field 3 (normalizer_spec) with its field 3 (add_dummy_prefix) at false.
_NO_DUMMY_PREFIX: Final = b"\x1a\x02\x18\x00"
_DUMMY_PREFIX: Final = b"\x1a\x02\x18\x01"


class SentencePiece:
    """A SentencePiece model, with special and added tokens found in the text before the library sees it.

    The dummy prefix goes before a text but not before what follows a special token in it: `"legacy": false` of
    tokenizer_config.json, the default of transformers 5. `"legacy": true` has it in both places, and
    `"add_prefix_space": false` in neither.
    """

    frames_text = False

    def __init__(self, path: Path, config: TokenizerConfig) -> None:
        from sentencepiece import SentencePieceProcessor

        with reading(path):
            serialized = path.read_bytes()
            self._model = model = SentencePieceProcessor(model_proto=serialized)
            bare = SentencePieceProcessor(model_proto=serialized + _NO_DUMMY_PREFIX)
            self._bare = bare
            self._trims = bare.encode(" a") == bare.encode("a")
            self._prefixed = SentencePieceProcessor(model_proto=serialized + _DUMMY_PREFIX) if self._trims else bare
            self._num_pieces = model.piece_size()
            if not serialized or not self._num_pieces:
                raise ValueError("the vocabulary is empty")
        self._first = model if config.flag("add_prefix_space", True) else bare
        self._rest = model if config.flag("legacy", False) else bare
        bos_id, eos_id = model.bos_id(), model.eos_id()
        self.own_tokens = (bos_id if bos_id >= 0 else None, eos_id if eos_id >= 0 else None)
        self._added = {token.content: token for token in self._matched_tokens(config)}
        self._content = {token.id: token.content for token in self._added.values()}
        self._pattern = _any_of(self._added.values())
        self.special_ids = frozenset(token.id for token in self._added.values() if token.special)
        self.vocab_size = max(self._num_pieces, *(token_id + 1 for token_id in self._content))
        self._drops_prefix, self.drops_every_leading_space = self._leading_space()

    def _matched_tokens(self, config: TokenizerConfig) -> list[AddedToken]:
        """Tokens that are found in a text as they are: the model's own for control, and what the config files add."""
        unknown = self._model.unk_id()
        named = {unknown, *(self._model.piece_to_id(token) for token in config.special_tokens())}
        ids = [i for i in range(self._num_pieces) if i in named or self._model.is_control(i)]
        own = [AddedToken(i, self._model.id_to_piece(i), "tokenizer.model", special=i != unknown) for i in ids]
        return own + config.added_tokens()

    def _leading_space(self) -> tuple[bool, bool]:
        """Whether decoding takes back a leading space, and whether it goes on doing so; the library does not tell."""
        pieces = (self._model.id_to_piece(i) for i in range(self._num_pieces))
        space = min((piece for piece in pieces if piece.startswith("▁")), key=len, default="▁")
        lost = 2 * len(space) - len(self._first.decode_pieces([space, space]))
        return lost > 0, lost > 1

    def encode(self, text: str, add_special_tokens: bool, continues: bool) -> list[int]:  # noqa: ARG002  Tokenizer adds them
        ids: list[int] = []
        start = 0
        for match in self._pattern.finditer(text):
            ids += self._encode_plain(text[start : match.start()], start, continues)
            token = self._added.get(match.group()) or self._added[match.group().strip()]
            ids.append(token.id)
            start = match.end()
        return ids + self._encode_plain(text[start:], start, continues)

    def _encode_plain(self, text: str, start: int, continues: bool) -> list[int]:
        if not text:
            return []
        if start:
            return self._rest.encode(text)
        if not continues:
            return self._first.encode(text)
        # A model that drops white space at the start of a text has the prefix to stand for it.
        return (self._prefixed if self._trims and text[0].isspace() else self._bare).encode(text)

    def token_to_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token].id
        token_id = self._model.piece_to_id(token)
        return token_id if token_id != self._model.unk_id() else None

    def piece(self, token_id: int) -> str | bytes:
        if token_id == self._model.unk_id():
            return self._model.decode_ids([token_id]).encode()  # " ⁇ " as bytes: this space is no dummy prefix
        if token_id in self._content:
            return self._content[token_id]
        if token_id >= self._num_pieces:
            return ""
        piece = self._model.id_to_piece(token_id)
        return bytes.fromhex(piece[3:5]) if self._model.is_byte(token_id) else piece.replace("▁", " ")

    def first_piece(self, token_id: int) -> str:
        piece = str(self.piece(token_id))
        return piece.removeprefix(" ") if self._drops_prefix else piece

    def byte_decoder(self) -> codecs.IncrementalDecoder:
        return codecs.getincrementaldecoder("utf-8")("minirea.replace_each_byte")


def sentencepiece_file(directory: Path) -> Path:
    """tokenizer.model, or the newest of those that Mistral publishes with a version at the end of the name."""
    versions = sorted(directory.glob("tokenizer.model.v*"), key=lambda path: (len(path.name), path.name))
    plain = directory / "tokenizer.model"
    return versions[-1] if versions and not plain.exists() else plain


def _any_of(tokens: Iterable[AddedToken]) -> re.Pattern[str]:
    """Matches each of `tokens`, the longest first, with the white space that it swallows."""
    longest_first = sorted(tokens, key=lambda token: len(token.content), reverse=True)
    return re.compile("|".join(r"\s*" * t.lstrip + re.escape(t.content) + r"\s*" * t.rstrip for t in longest_first))
