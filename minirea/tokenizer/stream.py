"""Text from tokens as they come: what is certain is handed out at once, half a character is held back."""

from __future__ import annotations

import codecs
from collections.abc import Callable

from minirea.tokenizer.backend import Backend


class StreamDecoder:
    """Text from tokens as they come. What `put` and `flush` return, joined, is what `Tokenizer.decode` returns.

    A character is handed out once its bytes are all there and no later token can change it, so at most three bytes
    are held back, and a token costs the same anywhere in a text.
    """

    def __init__(
        self, piece: Callable[[int], str | bytes], backend: Backend, skip_special_tokens: bool, at_start: bool
    ) -> None:
        self._piece = piece
        self._backend = backend
        self._skipped = frozenset(backend.special_tokens.values()) if skip_special_tokens else frozenset()
        self._bytes = backend.byte_decoder()
        self._at_start = at_start

    def put(self, token_id: int) -> str:
        """The text that is certain now that `token_id` has come, maybe "".

        An id that the tokenizer does not have is no error here, unlike in `decode`: embeddings are often padded beyond
        the vocabulary, and what a model picks from there has no text.
        """
        if token_id in self._skipped:
            return ""
        piece = self._piece(token_id)
        if isinstance(piece, bytes):
            self._at_start = False
            return self._bytes.decode(piece)
        if self._at_start and piece:
            piece = self._backend.first_piece(token_id)
            self._at_start = self._backend.drops_every_leading_space and not piece
        return self._bytes.decode(b"", final=True) + piece

    def flush(self) -> str:
        """What was held back; call it after the last token."""
        return self._bytes.decode(b"", final=True)


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """UTF-8 error handler: one U+FFFD for each bad byte, as in sentencepiece, where Python has one for several."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("minirea.replace_each_byte", _replace_each_byte)


def utf8_decoder(replace_each_byte: bool) -> codecs.IncrementalDecoder:
    """Bytes to text, with one U+FFFD for each bad byte, or for each bad sequence as the Unicode standard has it."""
    return codecs.getincrementaldecoder("utf-8")("minirea.replace_each_byte" if replace_each_byte else "replace")
