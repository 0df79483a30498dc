"""Section 3, steps 6 and 7: which rows the scope has, and where in the cache each of them lies.

The global and the selected rows, which come before the local ones, are called the far part of a scope.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM102  (an `if` on constants is decided at compile time only if it stands alone)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def select(kept_ptr, num_kept, mid_lo, mid_hi, span_size, P_PAD: tl.constexpr):
    """Layout of the selected part from num_kept ascending positions in kept_ptr int32 [P_PAD]. Step 6.

    Covers have equal lengths, so each adds what lies at or after both its own start and the end of the one before; of
    equal positions the second adds nothing. Returns, [P_PAD] each, start (the first cache position a span adds),
    offset (the scope's row which that position fills) and rows (how many it adds).
    """
    offs_p = tl.arange(0, P_PAD)
    # What lies beyond num_kept is read too and adds no rows: a mask would make these loads wait for num_kept's.
    kept = tl.load(kept_ptr + offs_p)
    previous = tl.load(kept_ptr + offs_p - 1, mask=offs_p > 0, other=0)
    stop = tl.minimum(kept + span_size // 2, mid_hi)
    previous_stop = tl.where(offs_p > 0, tl.minimum(previous + span_size // 2, mid_hi), mid_lo)
    start = tl.maximum(tl.maximum(kept - span_size // 2, previous_stop), mid_lo)
    rows = tl.where(offs_p < num_kept, tl.maximum(stop - start, 0), 0)
    offset = mid_lo + tl.cumsum(rows, axis=0) - rows
    return start, offset, rows


@triton.jit
def locate(selection_ptr, start, offset, rows, lo, hi, global_size, span_size, P_PAD: tl.constexpr):
    """Write the cache positions of the scope's far rows [lo, hi) to selection_ptr int64 [max_scope]. Step 7.

    start, offset and rows [P_PAD] are those of `select`.
    """
    offs_i = tl.arange(0, 16)
    for first in range(lo, tl.minimum(hi, global_size), 16):
        tl.store(selection_ptr + first + offs_i, first + offs_i, mask=first + offs_i < tl.minimum(hi, global_size))
    for first in range(0, span_size, 16):
        i = tl.broadcast_to((first + offs_i)[None, :], [P_PAD, 16])
        row = offset[:, None] + i
        tl.store(selection_ptr + row, start[:, None] + i, mask=(i < rows[:, None]) & (row >= lo) & (row < hi))
    tl.debug_barrier()  # before other threads of this program read it


@triton.jit
def far_rows_of(num_far_ptr, ballot, dense, global_size, SELECTS: tl.constexpr):
    """Rows of a ballot's scope before its local part."""
    num_far = tl.where(dense, 0, global_size)
    if SELECTS:
        if not dense:
            num_far = tl.load(num_far_ptr + ballot)
    return num_far
