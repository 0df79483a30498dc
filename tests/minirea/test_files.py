"""Files that are read whole: what is no file, or too much of one, is a line and no hang; so are messages themselves."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from minirea.errors import InputError, MemoryLimitError, MinireaError, MissingExtraError, MissingFileError
from minirea.files import is_there, read_file, replace_file

LIMIT = 1000


def _socket(path: Path) -> None:
    os.chdir(path.parent)  # a socket's address may have 107 bytes
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


MADE: dict[str, tuple[Callable[[Path], object], type[MinireaError], str]] = {
    "absent": (lambda _: None, MissingFileError, "no such file"),
    "directory": (Path.mkdir, InputError, "a directory"),
    "named pipe": (os.mkfifo, InputError, "a named pipe"),
    "endless": (lambda path: path.symlink_to("/dev/zero"), InputError, "a device"),
    "socket": (_socket, InputError, "a socket"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), MissingFileError, "a link to nowhere, which is not"),
    "link to itself": (lambda path: path.symlink_to(path), InputError, "symbolic links"),
    "large": (lambda path: path.write_bytes(b"x" * (LIMIT + 1)), InputError, "more than 1,000 bytes"),
}


@pytest.mark.parametrize("case", MADE)
@pytest.mark.parametrize("pipes", [False, True])
def test_what_is_no_file_is_refused(case: str, pipes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, error, found = MADE[case]
    make(tmp_path / "name")
    with pytest.raises(error, match=f"^{tmp_path}/name: .*{found}"):
        read_file(tmp_path / "name", LIMIT, "a config", pipes)
    assert is_there(tmp_path / "name") == (case != "absent")


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path: Path) -> None:
    path, mask = tmp_path / "name", os.umask(0o022)
    try:
        replace_file(path, b"new")
        assert path.stat().st_mode & 0o777 == 0o644
        for mode in (0o600, 0o440, 0o664):
            path.chmod(mode)
            replace_file(path, f"{mode}".encode())
            assert (path.stat().st_mode & 0o777, path.read_bytes()) == (mode, f"{mode}".encode())
    finally:
        os.umask(mask)


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * LIMIT)
    assert len(read_file(str(tmp_path / "file"), LIMIT, "a config")) == LIMIT
    for name, reason in (("x" * 5000, "too long"), ("a\0b", "no name that a file can have")):
        for ask in (lambda path: read_file(path, LIMIT, "a config"), is_there):
            with pytest.raises(InputError, match=reason) as caught:
                ask(tmp_path / name)
            assert len(str(caught.value)) < 1300
    assert not is_there(tmp_path / "file" / "below")
    with pytest.raises(MissingFileError):
        read_file(tmp_path / "file" / "below", LIMIT, "a config")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable(tmp_path: Path) -> None:
    (tmp_path / "file").touch(mode=0)
    with pytest.raises(InputError, match="Permission denied"):
        read_file(tmp_path / "file", LIMIT, "a config")


def test_pipes_that_are_open_already() -> None:
    code = "import sys; from minirea.files import read_file; print(len(read_file(sys.argv[1], 1000, 'a prompt', True)))"
    for name in ("/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"):
        for text, status in (b"12345", 0), (b"x" * 1001, 1):
            done = subprocess.run([sys.executable, "-c", code, name], input=text, capture_output=True, check=False)
            assert (done.returncode, done.stdout) == (status, b"5\n" if status == 0 else b"")
            assert (b"/dev/stdin: holds more than 1,000" in done.stderr) == (status == 1 and name == "/dev/stdin")


def test_messages_are_one_short_printable_line() -> None:
    for kind in (InputError, MissingFileError, MemoryLimitError, MissingExtraError):
        message = str(kind("key: \x1b[31mred\n\u202ehidden " + "x\x07" * 100_000 + "\udce9, expected a é"))
        assert message.isprintable()
        assert message.startswith(r"key: \x1b[31mred\n\u202ehidden x\x07")
        assert message.endswith(r"\udce9, expected a é")
        assert len(message) <= 1200
        assert str(kind(message)) == message
