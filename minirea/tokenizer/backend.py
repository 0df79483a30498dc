"""What a tokenizer library has to offer, and how what it does with a hostile file becomes one line."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from minirea.errors import InputError, MinireaError
from minirea.tokenizer.config import one_line

LARGEST_FILE = 2**29  # bytes; published tokenizer files stay below 2**26


class Backend(Protocol):
    """What Tokenizer needs of a library.

    A text has three kinds of beginning, `at`: "start" begins a text, so a dummy prefix goes before it; "seam" goes on
    from another text, so nothing does; "section" comes after a special token.
    """

    vocab_size: int
    special_tokens: dict[str, int]  # by spelling
    own_tokens: tuple[int | None, int | None]  # BOS and EOS where no config file names them
    frames_text: bool  # encode's `frame` does something
    drops_every_leading_space: bool  # not only a dummy prefix

    @property
    def may_cut(self) -> bool:
        """Whether a text can be encoded in `pieces.pieces`, those after the first one from a "seam"."""

    def encode(self, text: str, frame: bool, at: str, match_special: bool) -> list[int]:
        """Token ids. With `frame`, between what the files put around a text.

        Without `match_special`, special tokens spelled in the text are ordinary text.
        """

    def token_to_id(self, token: str) -> int | None: ...

    def piece(self, token_id: int) -> str | bytes:
        """What a token adds to a text."""

    def first_piece(self, token_id: int) -> str:
        """The same for a token that is text and starts it, where a dummy prefix is taken back."""

    def byte_decoder(self) -> codecs.IncrementalDecoder: ...


@contextlib.contextmanager
def one_line_of(path: Path, failure: str) -> Iterator[None]:
    """Make InputError of whatever a library raises, a Rust panic included, which is a BaseException but no Exception.

    Args:
        path: the file that the library works with.
        failure: what it could not do: "cannot be read as a tokenizer".
    """
    try:
        yield
    except (MinireaError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{path}: {failure}: {one_line(error)}") from None
