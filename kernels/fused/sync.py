"""Barriers between programs: counters in global memory that only ever grow.

Waiting is safe only because the launch is cooperative: a grid that does not fit on the GPU at once fails to launch
instead of waiting for programs that never start.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def arrive(counter_ptr, PROGRAMS: tl.constexpr = 0):
    """Publish what this program has written; returns the count at which every program has arrived, or, where only some
    share the counter, all of these PROGRAMS.

    Every program adds one per barrier and none passes before all have, so the counts of a barrier end at the next
    multiple of the number of programs, launch after launch. The debug barrier puts the writes of all threads of the
    program before its one release.
    """
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
    programs = PROGRAMS if PROGRAMS else tl.num_programs(0)
    return (arrived // programs + 1) * programs


@triton.jit
def wait(counter_ptr, count):
    """Until the counter reaches count; then what the programs that added to it have published is visible here."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < count:
        pass
    tl.debug_barrier()
