"""Errors a caller can act on. Each message is one line: what is wrong, what was found, what was expected."""

from __future__ import annotations

TYPE_CHECKING = False  # see __init__.py
if TYPE_CHECKING:
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


# What torch, C++, Python's threads and the dynamic linker say where memory, or `ulimit -v`, is used up.
_OUT_OF_MEMORY: Final = (
    *("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc", "can't start new thread"),
    *("failed to map segment", "not enough memory"),
)


def memory_limit_of(error: BaseException) -> MemoryLimitError | None:
    """What an error that a library raises where an allocation fails means; None if it is another one, or ours.

    Only a GPU's allocator has an exception of its own; the others are known by their messages.
    """
    text = printable(" ".join(str(error).split()), 400)
    known = isinstance(error, MemoryError) or any(phrase in text.lower() for phrase in _OUT_OF_MEMORY)
    if isinstance(error, MinireaError) or not known:
        return None
    found = f"out of memory ({text or 'an allocation failed'})"
    return MemoryLimitError(f"{found}: shorten the prompt, lower max_tokens, or free memory")


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


class RankError(MinireaError, RuntimeError):
    """One of the processes that share a model has ended, or failed; the others have been ended too."""


class MinireaWarning(UserWarning):
    """Something that works but that a user should know; the message is like an error's."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))
