"""What tests in Triton's interpreter share that run several programs, or ranks, at once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing import connection


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
