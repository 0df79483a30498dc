"""Errors a caller can act on. Each message is one line: what is wrong, what was found, what was expected."""


class MinireaError(Exception):
    """Base of every error that minirea raises on purpose."""


class InputError(MinireaError, ValueError):
    """A file, key, flag or argument holds something that cannot be used."""


class MissingFileError(MinireaError, FileNotFoundError):
    """A file or directory that is needed is not there."""


class MemoryLimitError(MinireaError, MemoryError):
    """Weights or cache do not fit; the message says how much was needed, how much there is and what to change."""


class MissingExtraError(MinireaError, ImportError):
    """A library that only an extra installs is needed; the message names the extra."""
