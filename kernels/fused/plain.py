"""The plain kernel: one query per head where nothing is selected, so that the scope is known from the start: all cached
tokens up to dense_size, else the first global_size and the last local_size ones.

No program waits for another, so the launch is not cooperative, and programs are small: beside them there is room on a
multiprocessor for programs of the next kernel, which load their first weights meanwhile.

EARLY, programs start while q/k/v's kernel (`norm_qkv`) runs, and read before they wait for it what it does not write:
seq_len, tables of RoPE, and the earlier tokens' keys and values. Why all of that has been written by then: a kernel
starts early only once every program of the one before it has begun, so every program of every kernel since the last one
that started late has begun. The first layer's plain kernel starts late (minirea.steps). Before it began, `embed`, which
counts seq_len, had ended, and so had all kernels of steps before, and copies of a cache that moved. Kernels after it
write q, activations, sums of ranks, and the newest token's keys and values, which in near rows take no row of another
token that is read (minirea.kernels.near). Early loads go to the L2 cache, past what an SM's own may hold since a step
before.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minirea.kernels.fused.arguments import VARYING, Heads
from minirea.kernels.fused.attend import attend_tile, halves_of_queries, join_slices, nothing_attended
from minirea.kernels.fused.decode import SLICES_DONE, rope_of_a_tile
from minirea.kernels.fused.memory import near_or, of_head


@triton.jit(do_not_specialize=[*VARYING])
def plain_kernel(
    q, k, v, near, out_ptr, rope, scratch, seq_len, global_size, local_size, dense_size, num_positions,
    c: tl.constexpr, NEXT_STARTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One step of one query per head: q [1, H, D] against k and v [G, N, D], to out [1, H, D]. near is None without.

    The tiles of the scope of a key/value head are dealt out to its programs. The next one of a program is on its way to
    registers while it attends to this one: for a few tiles that is sooner than through shared memory. NEXT_STARTS lets
    the next kernel start, which waits for this one before it reads anything but weights (minirea.kernels.steps.matvec).
    EARLY: see above.
    """
    if NEXT_STARTS:
        gdc_launch_dependents()
    n = tl.load(seq_len, cache_modifier=".cg").to(tl.int32) if c.SEQ_LEN_IN_MEMORY else seq_len
    tile_rope = rope_of_a_tile(rope, num_positions, c)
    dense = n <= dense_size
    num_far = tl.where(dense, 0, global_size)
    length = tl.where(dense, n, global_size + local_size)
    g = tl.program_id(0) % c.G
    part = tl.program_id(0) // c.G
    k_near = near_or(k, near.k if c.NEAR_K else None, g, c.NEAR_K, c.D)
    v_near = near_or(v, near.v if c.NEAR_V else None, g, c.NEAR_V, c.D)
    k = of_head(k, g)
    v = of_head(v, g)

    begin = part * c.BLOCK_A
    tile = load_tile(k, v, k_near, v_near, begin, 0, length - 1, num_far, n - length, c)
    if EARLY:
        gdc_wait()
    newest = load_tile(k, v, k_near, v_near, begin, length - 1, length, num_far, n - length, c)
    tile = with_newest(tile, newest, begin, length, c)
    q = Heads(q.ptr, q.stride_h, 0, q.stride_d)  # one token: its stride does not matter
    q_a, q_b = halves_of_queries(q, g, c)
    state = nothing_attended(c)
    for first in tl.range(begin, length, c.SLICES * c.BLOCK_A):
        following = load_tile(k, v, k_near, v_near, first + c.SLICES * c.BLOCK_A, 0, length, num_far, n - length, c)
        state = attend_tile(state, q_a, q_b, tile, rope, tile_rope, first, length, length - 1, 0, c.RELATIVE, c)
        tile = following
    join_slices(state, out_ptr, scratch, scratch.counters + SLICES_DONE + g, g, part, c)


@triton.jit
def load_tile(k, v, k_near, v_near, first, row_lo, row_hi, num_far, shift, c: tl.constexpr):
    """Both halves of the keys [N, HALF_PAD], and the values [N, D], of rows of the scope from `first` on: those in
    [row_lo, row_hi), others are zero.
    """
    offs_r = first + tl.arange(0, c.BLOCK_A)
    mask_r = ((offs_r >= row_lo) & (offs_r < row_hi))[:, None]
    offs_h = tl.arange(0, c.HALF_PAD)[None, :]
    offs_d = tl.arange(0, c.BLOCK_D)[None, :]
    k_ptrs = pointers_to_rows(k, k_near, offs_r, num_far, shift, c.NEAR_K)[:, None] + offs_h * k.stride_d
    v_ptrs = pointers_to_rows(v, v_near, offs_r, num_far, shift, c.NEAR_V)[:, None] + offs_d * v.stride_d
    mask_h = mask_r & (offs_h < c.D // 2)
    k_a = tl.load(k_ptrs, mask=mask_h, other=0.0, cache_modifier=".cg")
    k_b = tl.load(k_ptrs + c.D // 2 * k.stride_d, mask=mask_h, other=0.0, cache_modifier=".cg")
    return k_a, k_b, tl.load(v_ptrs, mask=mask_r & (offs_d < c.D), other=0.0, cache_modifier=".cg")


@triton.jit
def with_newest(tile, newest, first, length, c: tl.constexpr):
    """A tile from row `first` on whose row length - 1, if it has that, is the other's."""
    is_newest = (first + tl.arange(0, c.BLOCK_A) == length - 1)[:, None]
    k_a, k_b, v = tile
    new_k_a, new_k_b, new_v = newest
    return tl.where(is_newest, new_k_a, k_a), tl.where(is_newest, new_k_b, k_b), tl.where(is_newest, new_v, v)


@triton.jit
def pointers_to_rows(cache, near, offs_r, num_far, shift, ROWS: tl.constexpr):
    """Where rows of the scope lie: the first num_far in the cache, others, `shift` rows later, where they are near."""
    far = offs_r < num_far
    position = tl.where(far, offs_r, offs_r + shift)
    ptrs = cache.ptr + position.to(tl.int64) * cache.stride_n
    return tl.where(far, ptrs, near.ptr + position % ROWS * near.stride_n) if ROWS else ptrs
