"""Threads of a CPU's kernels: torch's own, by GNU's OpenMP."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch


def workers() -> int:
    """Threads that a kernel called now has at most."""
    return torch.get_num_threads()


def run_together(function: int, arguments: Any, threads: int) -> None:
    """Call a compiled function by its address, with the address of its arguments, on so many threads at once."""
    _openmp().GOMP_parallel(function, arguments, threads, 0)


@functools.cache
def _openmp() -> Any:
    """torch's own OpenMP, whose threads wait for work in either case."""
    return ctypes.CDLL(None)


@functools.cache
def thread_functions() -> tuple[int, int, int]:
    """Addresses of OpenMP's functions that say which thread calls, and of how many, and that wait for all; zeros where
    torch has other threads than GNU's OpenMP.
    """
    try:
        _openmp().GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        names = "omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier"
        functions = [ctypes.cast(getattr(_openmp(), name), ctypes.c_void_p).value or 0 for name in names]
    except (AttributeError, OSError, TypeError):
        return 0, 0, 0
    return functions[0], functions[1], functions[2]
