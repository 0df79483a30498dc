"""What a tokenizer library has to offer, and how what it does with a hostile file becomes one line."""

from __future__ import annotations

import codecs
import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

from minirea.errors import InputError, MinireaError
from minirea.tokenizer.config import one_line


class Backend(Protocol):
    """What Tokenizer needs of a library."""

    vocab_size: int
    special_ids: frozenset[int]
    own_tokens: tuple[int | None, int | None]  # BOS and EOS where no config file names them
    frames_text: bool  # encode's add_special_tokens does something
    drops_every_leading_space: bool  # not only a dummy prefix

    def encode(self, text: str, add_special_tokens: bool, continues: bool) -> list[int]:
        """Token ids; where the text `continues` another one, without what goes before a text."""

    def token_to_id(self, token: str) -> int | None: ...

    def piece(self, token_id: int) -> str | bytes:
        """What a token adds to a text."""

    def first_piece(self, token_id: int) -> str:
        """The same for a token that is text and starts it, where a dummy prefix is taken back."""

    def byte_decoder(self) -> codecs.IncrementalDecoder: ...


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Make one line of whatever a library does with a hostile file. A Rust panic is not even an Exception."""
    try:
        with _muted_stderr():
            yield
    except (MinireaError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise InputError(f"{path}: cannot be read as a tokenizer: {one_line(error)}") from None


@contextlib.contextmanager
def _muted_stderr() -> Iterator[None]:
    """Native code prints panics and logs on file descriptor 2, past sys.stderr; what it raises says the same."""
    with _STDERR_LOCK, open(os.devnull, "wb") as null:
        try:
            saved = os.dup(2)
        except OSError:  # standard error is closed: there is nothing to mute
            yield
            return
        os.dup2(null.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


_STDERR_LOCK: Final = threading.Lock()  # two threads at once would restore each other's silence
