"""Files that are read whole, or replaced whole: regular, and of a size that real ones have, or one line about it."""

from __future__ import annotations

import codecs
import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Final

from minirea.errors import InputError, MissingFileError, printable

# Names of what the process has open already. Shells hand over a pipe so: `--prompt <(command)`.
_DESCRIPTOR: Final = re.compile(r"/dev/stdin|/dev/fd/\d+|/proc/(self|\d+)/fd/\d+")
_BLOCK: Final = 2**20
# How UTF-8 is to have the bytes of a file's name that are none: as JSON spells them.
LONE_SURROGATES: Final = "backslashreplace"
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


def model_name(directory: str | Path) -> str:
    """What people call a model: the name of its directory, links followed, on one printable line."""
    return printable(Path(directory).resolve().name)


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
        check_regular(path, what, pipes)
        # Should another process put a pipe in its place meanwhile: opening it must not wait for a writer.
        with open(path, "rb", buffering=0, opener=None if pipes else _open_at_once) as file:
            return read_all(file, limit_bytes, str(path), what)
    except (OSError, ValueError) as error:
        if isinstance(error, (InputError, MissingFileError)):
            raise
        raise unreadable(path, error) from None


def as_text(data: bytes, name: str, errors: str = "strict") -> str:
    """UTF-8 text without its byte order mark. Raises InputError, whose message begins with `name`, for other bytes."""
    try:
        return data.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise InputError(
                f"{name}: is UTF-16 text, expected UTF-8: `iconv -f UTF-16 -t UTF-8` makes it that"
            ) from None
        found = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise InputError(f"{name}: not UTF-8 text: found {found}") from None


def check_regular(path: str | Path, what: str, pipes: bool = False) -> None:
    """Raise what read_file raises for a path that is no file to read. Opening some of these would not return."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    allowed = stat.S_ISREG(mode) or (pipes and _DESCRIPTOR.fullmatch(str(path)) is not None)
    if not allowed or stat.S_ISDIR(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise InputError(f"{path}: is {kind}, expected a file with {what}")


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


def unwritable(path: str | Path, error: OSError | ValueError) -> InputError:
    """The error to raise for `path` when the system's was `error`."""
    if isinstance(error, ValueError):  # a NUL in the name
        return InputError(f"{path}: no name that a file can have")
    parent = Path(path).parent
    reason = error.strerror if os.path.isdir(os.path.realpath(parent)) else f"{parent} is no directory"
    return InputError(f"{path}: cannot be written: {reason}")


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[FileIO]:
    """A new file that takes the place of `path` when the block ends well: whatever happens, the old one or the new.

    It is written under a name of its own in the same directory, brought to the disk and renamed. Who may read and write
    an old file may so with the new one. What a process that was killed has left there is removed by the next call for
    the same path.

    Raises:
        InputError: `path` is no regular file, or its directory cannot be written to, or the disk is full.
    """
    try:
        target = Path(os.path.realpath(path))
        if str(path).endswith(os.sep):
            raise InputError(f"{path}: is the name of a directory, expected a file")
        if target.exists() and not target.is_file():
            raise InputError(f"{path}: is {_KINDS.get(stat.S_IFMT(os.stat(target).st_mode))}, expected a file")
        _remove_left_over(target)
        file, name = _temporary(target)
        try:
            with file:
                _permit_as(target, file)
                yield file
                os.fsync(file.fileno())
                os.replace(name, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except (OSError, ValueError) as error:
        if isinstance(error, (InputError, MissingFileError)):
            raise
        raise unwritable(path, error) from None


def replace_file(path: str | Path, content: bytes) -> None:
    """Write all of a file, or leave the old one. Raises what `replacing` raises."""
    with replacing(path) as file:
        rest = memoryview(content)
        while rest:
            rest = rest[file.write(rest) :]


def check_replaceable(path: str | Path, size: int = 0) -> None:
    """Raise at once what `replacing` would raise for `size` bytes. The file stays as it is."""

    class Enough(Exception):  # noqa: N818  not an error
        pass

    with contextlib.suppress(Enough), replacing(path) as file:
        check_room(file, path, size)
        raise Enough


def check_room(file: FileIO, path: str | Path, size: int) -> None:
    """Before gigabytes are written in vain. What an old file takes is not free until the new one is complete.

    Raises:
        InputError: the disk has less than `size` bytes.
    """
    found = os.fstatvfs(file.fileno())
    free = found.f_bavail * found.f_frsize
    if found.f_blocks and size > free:
        raise InputError(f"{path}: cannot be written: it takes {size:,} bytes, and {free:,} are free on that disk")


def _temporary(target: Path) -> tuple[FileIO, Path]:
    """A new file next to `target`, locked as long as it is open, so that one that was left over can be recognized."""
    while True:
        name = target.with_name(f"{_temporary_prefix(target)}{secrets.token_hex(4)}.part")
        file = FileIO(os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), "r+")
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:  # else another process took it for left over before it was locked
            return file, name
        file.close()


def _permit_as(target: Path, file: FileIO) -> None:
    """Give a new file the permissions of the one that it replaces, before it holds anything."""
    with contextlib.suppress(OSError):  # there is none, or a file system without permissions
        os.fchmod(file.fileno(), os.stat(target).st_mode & 0o777)


def _remove_left_over(target: Path) -> None:
    for name in os.listdir(target.parent):
        if not (name.startswith(_temporary_prefix(target)) and name.endswith(".part")):
            continue
        with contextlib.suppress(OSError), open(target.with_name(name), "rb") as file:  # OSError: in use, or just gone
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(target.with_name(name))


def _temporary_prefix(target: Path) -> str:
    return f".minirea-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]}-"
