"""What tests share that run several programs, or ranks, at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import subprocess
import time
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path


def at_once(count: int, work: Callable[[int], object]) -> None:
    """work(i) for i below `count`, in forked processes at once. One that fails ends the others, which may wait for it.

    Raises:
        AssertionError: one has failed.
    """
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=work, args=(index,)) for index in range(count)]
    for process in running:
        process.start()
    waiting = {process.sentinel: process for process in running}
    try:
        while waiting:
            for sentinel in connection.wait(list(waiting)):
                process = waiting.pop(sentinel)  # type: ignore[index]
                process.join()
                assert process.exitcode == 0
    finally:
        for process in running:
            process.kill()
            process.join()


def family(pid: int) -> list[int]:
    """A process and all that it, and they, have started and not outlived."""
    found = [pid]
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [one for child in listed.read_text().split() for one in family(int(child))]
    return found


def follower_of(process: subprocess.Popen[bytes]) -> int:
    """The process that `minirea --gpus 2` runs its second rank in, once it has started; whatever else it starts, as
    compilers.
    """
    while process.poll() is None:
        for one in family(process.pid):
            if b"minirea.follower" in command_of(one):
                return one
        time.sleep(0.01)
    raise AssertionError(f"it ended with status {process.returncode}, without a second rank")


def command_of(pid: int) -> bytes:
    """Its command line; nothing where it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_for(pid: int) -> None:
    """Until it has ended: the whole run has a limit of time, this has none."""
    while is_alive(pid):
        time.sleep(0.01)
