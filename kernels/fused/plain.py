"""The plain kernel: one query per head where nothing is selected, so that the scope is known from the start: all cached
tokens up to dense_size, else the first global_size and the last local_size ones.

No program waits for another, so the launch is not cooperative; and without the search a program is small.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from minirea.kernels.fused.arguments import VARYING, Heads
from minirea.kernels.fused.decode import Step, attend_slice, rope_of_a_tile


@triton.jit(do_not_specialize=[*VARYING])
def plain_kernel(
    q, k, v, near, out_ptr, rope, scratch, seq_len, global_size, local_size, dense_size, num_positions,
    c: tl.constexpr,
):  # fmt: skip
    """One step of one query per head: q [1, H, D] against k and v [G, N, D], to out [1, H, D]. near is None without.

    Each program attends to one slice of the scope of one key/value head.
    """
    n = tl.load(seq_len).to(tl.int32) if c.SEQ_LEN_IN_MEMORY else seq_len
    q = Heads(q.ptr, q.stride_h, 0, q.stride_d)  # one token: its stride does not matter
    dense = n <= dense_size
    step = Step(
        n=n,
        dense=dense,
        local_lo=tl.where(dense, 0, n - local_size),
        mid_lo=global_size,
        mid_hi=global_size,
        span_size=0,
        max_spans=0,
        max_scope=0,
        program=tl.program_id(0),
        workers=tl.num_programs(0),
        selectors=0,
    )
    tile_rope = rope_of_a_tile(rope, num_positions, c)
    g = step.program % c.G
    part = step.program // c.G
    attend_slice(q, k, v, near, out_ptr, rope, tile_rope, scratch, step, g, part, 0, c)
