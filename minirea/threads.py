"""Threads: how many compute, what they do while they wait for each other, and that ours end before the process does.

torch hands every operation's parts to OpenMP's threads. By default these spin for milliseconds between two operations,
which is fast on idle cores and slow on busy ones: the thread that all wait for gets no core from those that spin.
Threads that sleep instead cost a few microseconds more per operation.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Final

from minirea.errors import InputError

# Held while a step is put on its way to a GPU, and from a launch of attention until its selection is read; and while a
# whole device is waited for, which would end a capture in another thread.
enqueueing: Final = threading.RLock()

# OpenMP's own variable, and what the runtimes that torch comes with (GNU's on Linux, LLVM's elsewhere) prefer to it.
_WAIT_VARIABLES: Final = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_imported_in = os.getpid()


def wait_asleep(environment: MutableMapping[str, str]) -> None:
    """Make OpenMP's threads sleep while they wait, unless the environment says already how they wait.

    The runtime looks once, when torch is imported. For processes of our own only: the environment is the caller's.
    """
    if not any(name in environment for name in _WAIT_VARIABLES):
        environment["OMP_WAIT_POLICY"] = "passive"


@contextlib.contextmanager
def limited_to(threads: int | None) -> Iterator[None]:
    """Within it torch computes with so many threads; None leaves it what it has.

    Raises:
        InputError: not between 1 and the number of cores.
    """
    if threads is None:
        yield
        return
    cores = os.cpu_count() or 1
    if not 1 <= threads <= cores:
        raise InputError(f"threads is {threads}, expected 1 to {cores}, the cores of this machine")
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def thread_pool(threads: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """A pool whose threads have ended when it is left, however often Ctrl-C is pressed meanwhile.

    What has not begun by then is dropped. A thread that comes back from C++ into an interpreter that is gone would
    abort the process.
    """
    if os.getpid() != _imported_in:
        _renew_threads_of_torch()
    pool = ThreadPoolExecutor(threads, name)
    try:
        yield pool
    finally:
        with _without_keyboard_interrupt():
            pool.shutdown(cancel_futures=True)


def _renew_threads_of_torch() -> None:
    """In a forked process torch makes a pool of threads anew when a thread first computes. Where several threads do at
    the same time, all but one find none and fail ("Invalid thread pool!").
    """
    import torch

    torch.set_num_threads(torch.get_num_threads())


@contextlib.contextmanager
def delayed_keyboard_interrupt() -> Iterator[None]:
    """SIGINT still calls its handler, which may end the process, but a KeyboardInterrupt is raised only at the end."""
    with _without_keyboard_interrupt() as struck:
        yield
    if struck:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _without_keyboard_interrupt() -> Iterator[list[int]]:
    """SIGINT still calls its handler, which may end the process, but a KeyboardInterrupt goes no further.

    Yields a list of those that there were.
    """
    struck: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield struck
        return

    def call_handler(number: int, frame: FrameType | None) -> None:
        try:
            handler(number, frame)
        except KeyboardInterrupt:
            struck.append(number)

    signal.signal(signal.SIGINT, call_handler)
    try:
        yield struck
    finally:
        signal.signal(signal.SIGINT, handler)
