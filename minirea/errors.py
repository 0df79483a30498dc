"""Errors a caller can act on. Each message is one line: what is wrong, what was found, what was expected."""

from typing import Final

_LONGEST: Final = 1200  # characters of a message; a path of 4,096 is legal, and its end tells less than the reason


def printable(text: str, longest: int = _LONGEST) -> str:
    """`text` on one line that a terminal shows and does not obey, without its middle if it is too long.

    Messages quote files from anywhere: escape sequences, line ends and invisible characters appear as Python writes
    them.
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    cut = " [...] "
    return text if len(text) <= longest else text[: longest * 2 // 3] + cut + text[-(longest // 3) + len(cut) :]


class MinireaError(Exception):
    """Base of every error that minirea raises on purpose. Its message is one printable line."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable(arg) if isinstance(arg, str) else arg for arg in args))


class InputError(MinireaError, ValueError):
    """A file, key, flag or argument holds something that cannot be used."""


class MissingFileError(MinireaError, FileNotFoundError):
    """A file or directory that is needed is not there."""


class MemoryLimitError(MinireaError, MemoryError):
    """Weights or cache do not fit; the message says how much was needed, how much there is and what to change."""


class MissingExtraError(MinireaError, ImportError):
    """A library that only an extra installs is needed; the message names the extra."""


class CudaError(MinireaError, RuntimeError):
    """A call of CUDA's driver failed; the message says what was tried and gives CUDA's name and text.

    Attributes:
        name: of the error in CUDA, like CUDA_ERROR_OUT_OF_MEMORY; empty where CUDA has none.
    """

    def __init__(self, message: str, name: str = "") -> None:
        super().__init__(message)
        self.name = name


class MinireaWarning(UserWarning):
    """Something that works but that a user should know; the message is like an error's."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))
