"""Files that are read whole: regular, readable and of a size that real ones have, or one line that says what is not."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import Final

from minirea.errors import InputError, MissingFileError

# Names of what the process has open already. Shells hand over a pipe so: `--prompt <(command)`.
_DESCRIPTOR: Final = re.compile(r"/dev/stdin|/dev/fd/\d+|/proc/(self|\d+)/fd/\d+")
_BLOCK: Final = 2**20
_KINDS: Final = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def is_there(path: str | Path) -> bool:
    """Whether a directory holds such a name, be it a link to nothing, which `read_file` then refuses.

    Raises:
        InputError: the system does not tell: an unreadable directory, a name that is too long.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    return True


def list_directory(path: str | Path, what: str) -> list[str]:
    """Names in a directory, sorted.

    Args:
        what: is expected there, for messages: "model directory".

    Raises:
        MissingFileError: there is nothing of that name.
        InputError: it is no directory, or not readable.
    """
    try:
        return sorted(os.listdir(path))
    except NotADirectoryError:
        raise InputError(f"{path}: is a file, expected a {what}") from None
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such {what}") from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def read_file(path: str | Path, limit_bytes: int, what: str, pipes: bool = False) -> bytes:
    """All bytes of a regular file.

    Args:
        limit_bytes: the most that is read, and memory that is used, whatever the file is.
        what: is expected there, for messages: "a tokenizer".
        pipes: also read what the process was given open, as /dev/stdin or /dev/fd/N, to its end.

    Raises:
        MissingFileError: no such file.
        InputError: no regular file, not readable, or larger than limit_bytes. Both messages begin with the path.
    """
    try:
        found = os.stat(path)
        allowed = stat.S_ISREG(found.st_mode) or (pipes and _DESCRIPTOR.fullmatch(str(path)) is not None)
        if not allowed or stat.S_ISDIR(found.st_mode):
            kind = _KINDS.get(stat.S_IFMT(found.st_mode), "no regular file")
            raise InputError(f"{path}: is {kind}, expected a file with {what}")
        # Should another process put a pipe in its place meanwhile: opening it must not wait for a writer.
        with open(path, "rb", buffering=0, opener=None if pipes else _open_at_once) as file:
            return read_all(file, limit_bytes, str(path), what)
    except (OSError, ValueError) as error:
        if isinstance(error, (InputError, MissingFileError)):
            raise
        raise unreadable(path, error) from None


def read_start(path: str | Path, count: int) -> bytes:
    """The first `count` bytes of a regular file, by which kinds of files are told apart. Errors as for read_file."""
    try:
        with open(path, "rb", buffering=0, opener=_open_at_once) as file:
            return file.read(count)
    except OSError as error:
        raise unreadable(path, error) from None


def read_all(file: object, limit_bytes: int, name: str, what: str) -> bytes:
    """The rest of an open binary file, raw or buffered, in blocks, so that an endless one takes no more than its limit.

    Raises:
        InputError: more than limit_bytes; the message begins with `name`.
        OSError: as `read` does.
    """
    data = bytearray()
    while block := file.read(_BLOCK):  # type: ignore[attr-defined]  # io.RawIOBase and io.BufferedIOBase share no type
        data += block
        if len(data) > limit_bytes:
            raise InputError(f"{name}: holds more than {limit_bytes:,} bytes, which is too much for {what}")
    return bytes(data)


def unreadable(path: str | Path, error: OSError | ValueError) -> InputError | MissingFileError:
    """The error to raise for `path` when the system's was `error`."""
    if isinstance(error, ValueError):  # a NUL in the name
        return InputError(f"{path}: no name that a file can have")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        found = f"is a link to {os.readlink(path)}, which is not there" if os.path.islink(path) else "no such file"
        return MissingFileError(f"{path}: {found}")
    return InputError(f"{path}: cannot be read: {error.strerror}")


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
