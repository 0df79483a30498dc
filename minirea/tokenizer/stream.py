"""Text from tokens as they come: what is certain is handed out at once, half a character is held back."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Any

from minirea.tokenizer.backend import Backend


class StreamDecoder:
    """Text from tokens as they come. What `put` and `flush` return, joined, is what `Tokenizer.decode` returns.

    A character is handed out once its bytes are all there and no later token can change it. Only the current run of
    byte tokens is ever held back, so a token costs the same anywhere in a text.
    """

    def __init__(
        self, piece: Callable[[int], str | bytes], backend: Backend, skip_special_tokens: bool, at_start: bool
    ) -> None:
        self._piece = piece
        self._backend = backend
        self._skipped = backend.special_ids if skip_special_tokens else frozenset()
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


class ByteRun(codecs.IncrementalDecoder):
    """Bytes to text as the ByteFallback step of `tokenizers` does: one bad byte spoils its whole run of byte tokens.

    So nothing of a run is certain before it ends; then it is text, or one U+FFFD for each of its bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._run = bytearray()

    def decode(self, data: Any, final: bool = False) -> str:
        self._run += data
        if not final:
            return ""
        try:
            return self._run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(self._run)
        finally:
            self._run.clear()


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """UTF-8 error handler: one U+FFFD for each bad byte, as in sentencepiece, where Python has one for several."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("minirea.replace_each_byte", _replace_each_byte)
