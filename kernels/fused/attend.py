"""Section 3, steps 7 and 8: RoPE inside the scope, and flash attention over its rows."""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: RET505  (an `if` on constants is decided at compile time only with its `else`)

from __future__ import annotations

import triton
import triton.language as tl

from minirea.kernels.fused.arguments import Softmax
from minirea.kernels.fused.memory import load_rows

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def rotate_halves(a, b, cos, sin):
    """RoPE of the two halves of rows, in float32: element i turns with element i + D / 2."""
    a = a.to(tl.float32)
    b = b.to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def rotate(a, b, cos, sin, dtype: tl.constexpr):
    """RoPE of rows that come in two halves [M, HALF_PAD]; the rotated rows [M, 2 * HALF_PAD] in one piece."""
    a, b = rotate_halves(a, b, cos, sin)
    both = tl.permute(tl.join(a.to(dtype), b.to(dtype)), (0, 2, 1))
    return tl.reshape(both, [a.shape[0], 2 * a.shape[1]])


@triton.jit
def add_product(a, b, acc, rescale, c: tl.constexpr):
    """acc * rescale + a @ b, where acc sums over many tiles.

    In float32 one chain of additions over all rows of the scope would lose several bits. A tile's sum on its own, then
    one addition per tile, does not; as a multiply-add, for a plain one would be folded back into the product.
    """
    if a.dtype == tl.float32:
        return tl.fma(acc, tl.broadcast_to(rescale, acc.shape), tl.dot(a, b, input_precision=c.PRECISION))
    else:
        return tl.dot(a, b, acc * rescale)


@triton.jit
def softmax_step(logits, v, state, c: tl.constexpr):
    """One step of the online softmax: the state with a tile's logits [M, N] and v [N, D] added.

    In base 2, which is what the GPU computes: row_max is in units of log2. The fused multiply-add rounds only the
    distance to the maximum, not the logit, and the maximum's own rounding cancels in the final division.
    """
    new_max = tl.maximum(state.row_max, tl.max(logits, axis=1) * (c.SCALE * LOG2_E))
    rescale = tl.exp2(state.row_max - new_max)
    probability = tl.exp2(tl.fma(logits, c.SCALE * LOG2_E, -new_max[:, None]))
    row_sum = state.row_sum * rescale + tl.sum(probability, axis=1)
    acc = add_product(probability.to(v.dtype), v, state.acc, rescale[:, None], c)
    return Softmax(acc, new_max, row_sum)


@triton.jit
def attend(
    state, q_a, q_b, k, v, rope, tile_rope, row_lo, row_hi, q_row, shift, selection_ptr,
    GATHER: tl.constexpr, RELATIVE: tl.constexpr, c: tl.constexpr, K_ROWS: tl.constexpr = 0, V_ROWS: tl.constexpr = 0,
):  # fmt: skip
    """Flash attention of the rows of q over rows [row_lo, row_hi), which lie in the cache where selection_ptr says if
    GATHER, else at the rows themselves; modulo K_ROWS of k and V_ROWS of v, if there are so many.

    row_sum [M, N] keeps the columns of the tiles apart; the caller adds them up, once instead of once per tile.

    Only the distance between query and key matters to RoPE. RELATIVE uses that: keys get positions 0, 1, ... within
    their tile, so that all tiles share one small table, tile_rope [N, HALF_PAD], that stays in registers, and the
    query, at row q_row, gets its distance to the tile's first row. Else positions are rows + shift: in float32 the
    tables' own rounding would show.
    """
    offs_h = tl.arange(0, c.HALF_PAD)
    for first in tl.range(row_lo, row_hi, c.BLOCK_A, num_stages=c.STAGES):
        offs_r = first + tl.arange(0, c.BLOCK_A)
        mask_r = offs_r < row_hi
        source = offs_r
        if GATHER:
            source = tl.load(selection_ptr + offs_r, mask=mask_r, other=0)
        k_row = source % K_ROWS if K_ROWS else source
        v_row = source % V_ROWS if V_ROWS else source
        k_a = load_rows(k.ptr, k_row, k.stride_n, mask_r, offs_h, k.stride_d, c.D // 2)
        k_b = load_rows(k.ptr + c.D // 2 * k.stride_d, k_row, k.stride_n, mask_r, offs_h, k.stride_d, c.D // 2)
        values = load_rows(v.ptr, v_row, v.stride_n, mask_r, tl.arange(0, c.BLOCK_D), v.stride_d, c.D)
        tile = (k_a, k_b, values)
        state = attend_tile(state, q_a, q_b, tile, rope, tile_rope, first, row_hi, q_row, shift, RELATIVE, c)
    return state


@triton.jit
def attend_tile(
    state, q_a, q_b, tile, rope, tile_rope, first, row_hi, q_row, shift, RELATIVE: tl.constexpr, c: tl.constexpr,
):  # fmt: skip
    """The state of `attend` with one tile added: rows from `first` on, below row_hi, of which there are both halves of
    the keys [N, HALF_PAD] and the values [N, D].
    """
    k_a, k_b, values = tile
    dtype = k_a.dtype
    offs_r = first + tl.arange(0, c.BLOCK_A)
    offs_h = tl.arange(0, c.HALF_PAD)
    mask_r = offs_r < row_hi
    mask_h = offs_h < c.D // 2
    if RELATIVE:
        q_position = q_row - first
        cos, sin = tile_rope
    else:
        q_position = q_row + shift
        cos = load_rows(rope.cos_ptr, offs_r + shift, c.D // 2, mask_r, offs_h, 1, c.D // 2)
        sin = load_rows(rope.sin_ptr, offs_r + shift, c.D // 2, mask_r, offs_h, 1, c.D // 2)
    q_cos = tl.load(rope.cos_ptr + q_position * (c.D // 2) + offs_h, mask=mask_h, other=0.0)[None, :]
    q_sin = tl.load(rope.sin_ptr + q_position * (c.D // 2) + offs_h, mask=mask_h, other=0.0)[None, :]
    keys = rotate(k_a, k_b, cos, sin, dtype)
    q = rotate(q_a, q_b, q_cos, q_sin, dtype)
    logits = tl.dot(q, tl.trans(keys), input_precision=c.PRECISION)
    logits = tl.where(mask_r[None, :], logits, float("-inf"))
    new_max = tl.maximum(state.row_max, tl.max(logits, axis=1) * (c.SCALE * LOG2_E))
    rescale = tl.exp2(state.row_max - new_max)[:, None]
    probability = tl.exp2(tl.fma(logits, c.SCALE * LOG2_E, -new_max[:, None]))
    row_sum = state.row_sum * rescale + probability
    acc = add_product(probability.to(dtype), values, state.acc, rescale, c)
    return Softmax(acc, new_max, row_sum)


@triton.jit
def nothing_attended(c: tl.constexpr):
    """The state of `attend` before its first tile."""
    acc = tl.full([c.BLOCK_M, c.BLOCK_D], 0, tl.float32)
    row_max = tl.full([c.BLOCK_M], -1.0e38, tl.float32)
    return Softmax(acc, row_max, tl.full([c.BLOCK_M, c.BLOCK_A], 0, tl.float32))


@triton.jit
def halves_of_queries(q, g, c: tl.constexpr):
    """The queries of key/value head g of a decode step, [M, HALF_PAD] each."""
    offs_m = tl.arange(0, c.BLOCK_M)
    offs_h = tl.arange(0, c.HALF_PAD)
    heads = g * c.GROUP + offs_m
    mask_m = offs_m < c.GROUP
    q_a = load_rows(q.ptr, heads, q.stride_h, mask_m, offs_h, q.stride_d, c.D // 2)
    return q_a, load_rows(q.ptr + c.D // 2 * q.stride_d, heads, q.stride_h, mask_m, offs_h, q.stride_d, c.D // 2)


@triton.jit
def join_slices(state, out_ptr, scratch, counter_ptr, g, part, c: tl.constexpr):
    """Leave the state of slice `part` of head g; the last program of a head to do so combines those of all slices."""
    offs_m = tl.arange(0, c.BLOCK_M)
    partial = (g * c.GROUP + offs_m) * c.SLICES + part
    store_partial(scratch, state, partial, offs_m < c.GROUP, tl.arange(0, c.BLOCK_D), c)
    tl.debug_barrier()
    done = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    if done % c.SLICES == c.SLICES - 1:  # the last of this launch
        combine(scratch, out_ptr, g, c)


@triton.jit
def store_partial(scratch, state, partial, mask_m, offs_d, c: tl.constexpr):
    """Keep what `attend` has of one slice for `combine`: rows `partial` [M] of the three tables."""
    tl.store(scratch.partial_max + partial, state.row_max, mask=mask_m)
    tl.store(scratch.partial_sum + partial, tl.sum(state.row_sum, axis=1), mask=mask_m)
    mask_md = mask_m[:, None] & (offs_d < c.D)[None, :]
    tl.store(scratch.partial_acc + partial[:, None] * c.D + offs_d[None, :], state.acc, mask=mask_md)


@triton.jit
def combine(scratch, out_ptr, g, c: tl.constexpr):
    """Join the slices' partial attention of one key/value head's query heads: weights by maximum, then one division.

    COMBINE_HEADS at a time, since what a head costs is mostly the wait for its loads; at least as many as there are
    warps where registers allow, so that each warp has a head of its own (see `pick`).
    """
    offs_s = tl.arange(0, c.SLICES_PAD)
    offs_d = tl.arange(0, c.BLOCK_D)
    mask_s = (offs_s < c.SLICES)[None, :]
    mask_d = offs_d < c.D
    for first in range(0, c.GROUP, c.COMBINE_HEADS):
        heads = g * c.GROUP + tl.minimum(
            first + tl.arange(0, c.COMBINE_HEADS), c.GROUP - 1
        )  # surplus ones repeat the last
        partial = heads[:, None] * c.SLICES + offs_s[None, :]
        row_max = tl.load(scratch.partial_max + partial, mask=mask_s, other=float("-inf"))
        row_sum = tl.load(scratch.partial_sum + partial, mask=mask_s, other=0.0)
        acc = tl.load(
            scratch.partial_acc + partial[:, :, None] * c.D + offs_d[None, None, :],
            mask=mask_s[:, :, None] & mask_d[None, None, :],
            other=0.0,
        )
        weight = tl.exp2(row_max - tl.max(row_max, axis=1)[:, None])
        out = tl.sum(acc * weight[:, :, None], axis=1) / tl.sum(row_sum * weight, axis=1)[:, None]
        out_ptrs = out_ptr + heads[:, None] * c.D + offs_d[None, :]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_d[None, :])


@triton.jit
def gather(k, v, rope, k_rot_ptr, v_copy_ptr, source, position, offs_r, mask_r, VALUES: tl.constexpr, c: tl.constexpr):
    """Copy keys from rows `source` of the cache, rotated to `position`, to rows offs_r of k_rot [S, D], and with VALUES
    values to v_copy [S, D]. Step 7.
    """
    dtype = k_rot_ptr.dtype.element_ty
    offs_h = tl.arange(0, c.HALF_PAD)
    offs_d = tl.arange(0, c.BLOCK_D)
    k_a = load_rows(k.ptr, source, k.stride_n, mask_r, offs_h, k.stride_d, c.D // 2)
    k_b = load_rows(k.ptr + c.D // 2 * k.stride_d, source, k.stride_n, mask_r, offs_h, k.stride_d, c.D // 2)
    if VALUES:
        values = load_rows(v.ptr, source, v.stride_n, mask_r, offs_d, v.stride_d, c.D)
    cos = load_rows(rope.cos_ptr, position, c.D // 2, mask_r, offs_h, 1, c.D // 2)
    sin = load_rows(rope.sin_ptr, position, c.D // 2, mask_r, offs_h, 1, c.D // 2)
    k_a, k_b = rotate_halves(k_a, k_b, cos, sin)
    mask_rh = mask_r[:, None] & (offs_h < c.D // 2)[None, :]
    rows = offs_r.to(tl.int64)[:, None] * c.D
    k_ptrs = k_rot_ptr + rows + offs_h[None, :]
    tl.store(k_ptrs, k_a.to(dtype), mask=mask_rh)
    tl.store(k_ptrs + c.D // 2, k_b.to(dtype), mask=mask_rh)
    if VALUES:
        tl.store(v_copy_ptr + rows + offs_d[None, :], values, mask=mask_r[:, None] & (offs_d < c.D)[None, :])


@triton.jit
def rotate_queries(q, rope, q_rot_ptr, t, head, position, row, mask_r, c: tl.constexpr):
    """Copy queries (t, head), rotated to their positions, to rows of q_rot [G * R, D]."""
    dtype = q_rot_ptr.dtype.element_ty
    offs_h = tl.arange(0, c.HALF_PAD)
    mask_rh = mask_r[:, None] & (offs_h < c.D // 2)[None, :]
    q_ptrs = q.ptr + (t.to(tl.int64) * q.stride_n + head * q.stride_h)[:, None] + offs_h[None, :] * q.stride_d
    q_a = tl.load(q_ptrs, mask=mask_rh, other=0.0)
    q_b = tl.load(q_ptrs + c.D // 2 * q.stride_d, mask=mask_rh, other=0.0)
    cos = load_rows(rope.cos_ptr, position, c.D // 2, mask_r, offs_h, 1, c.D // 2)
    sin = load_rows(rope.sin_ptr, position, c.D // 2, mask_r, offs_h, 1, c.D // 2)
    q_a, q_b = rotate_halves(q_a, q_b, cos, sin)
    q_rot_ptrs = q_rot_ptr + row.to(tl.int64)[:, None] * c.D + offs_h[None, :]
    tl.store(q_rot_ptrs, q_a.to(dtype), mask=mask_rh)
    tl.store(q_rot_ptrs + c.D // 2, q_b.to(dtype), mask=mask_rh)


@triton.jit
def attend_tiles(
    state, q, k_ptr, v_far_ptr, v, far, local, shift, num_copied, lo, hi, last_key,
    CAUSAL: tl.constexpr, c: tl.constexpr,
):  # fmt: skip
    """Flash attention of q [M, D] over rows [lo, hi) of the scope; CAUSAL hides keys after last_key [M].

    Row r below num_copied is row far + r of k_ptr and v_far_ptr, a later one row local + r of k_ptr and v. With near
    values it is row local + r + shift of those, modulo NEAR_V. num_copied and lo are multiples of BLOCK_A.
    """
    offs_d = tl.arange(0, c.BLOCK_D)
    for first in tl.range(lo, hi, c.BLOCK_A, num_stages=c.STAGES):
        offs_r = first + tl.arange(0, c.BLOCK_A)
        mask_r = offs_r < hi
        copied = first < num_copied
        row = first + tl.where(copied, far, local) + tl.arange(0, c.BLOCK_A)
        k = load_rows(k_ptr, row, c.D, mask_r, offs_d, 1, c.D)
        v_row = tl.where(copied, row, (row + shift) % c.NEAR_V) if c.NEAR_V else row
        values = load_rows(tl.where(copied, v_far_ptr, v.ptr), v_row, tl.where(copied, c.D, v.stride_n), mask_r,
                           offs_d, tl.where(copied, 1, v.stride_d), c.D)  # fmt: skip
        logits = tl.dot(q, tl.trans(k), input_precision=c.PRECISION)
        if CAUSAL:
            logits = tl.where(offs_r[None, :] <= last_key[:, None], logits, float("-inf"))
        state = softmax_step(logits, values, state, c)
    return state
