"""Huge pages for the memory that a CPU's steps read from end to end: they have fewer addresses to look up.

Linux gives them by default to what asks for them, as matrices and caches do here. Where it cannot, nothing changes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Final

from torch import Tensor

HUGE: Final = 1 << 21  # bytes of a page; a multiple of it serves where pages are smaller
MAPS: Final = "/proc/self/maps"
_HUGEPAGE: Final = 14  # Linux's MADV_HUGEPAGE: pages that are touched from now on
_COLLAPSE: Final = 25  # MADV_COLLAPSE: what is there, by a copy; since Linux 6.1

Range = tuple[int, int]  # addresses [start, stop)


def advise(tensor: Tensor) -> Tensor:
    """A tensor of the CPU that has just been allocated."""
    start = tensor.data_ptr()
    _advise((start, start + tensor.nbytes), _HUGEPAGE)
    return tensor


@contextlib.contextmanager
def collapsed() -> Iterator[None]:
    """What the process allocates meanwhile is moved to huge pages afterwards, 1 to 2.5 s a GB: libraries do not tell
    where they keep matrices. The system has to say what memory there is; where it does not, nothing is moved.
    """
    before = mappings()
    yield
    for added in new_parts(before, mappings()):
        _advise(added, _COLLAPSE)


def mappings() -> list[Range]:
    """The process's memory that no file is behind and that it may write, ascending."""
    try:
        with open(MAPS) as file:
            lines = [line.split() for line in file]
    except OSError:
        return []
    anonymous = [line[0].split("-") for line in lines if line[1] == "rw-p" and line[5:] in ([], ["[heap]"])]
    return [(int(start, 16), int(stop, 16)) for start, stop in anonymous]


def new_parts(before: list[Range], after: list[Range]) -> list[Range]:
    """What of the ranges `after` was in none of those `before`; both ascend."""
    parts = []
    for start, stop in after:
        for old_start, old_stop in before:
            if old_start < stop and old_stop > start:
                parts.append((start, old_start))
                start = max(start, old_stop)
        parts.append((start, stop))
    return [(start, stop) for start, stop in parts if start < stop]


def _advise(part: Range, advice: int) -> None:
    """For the whole huge pages of a range."""
    start, stop = -(-part[0] // HUGE) * HUGE, part[1] // HUGE * HUGE
    madvise = _madvise()
    if madvise is not None and start < stop:
        madvise(start, stop - start, advice)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):  # another C library
        return None
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function
