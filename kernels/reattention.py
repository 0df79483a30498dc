"""ReAttention as one fused Triton kernel: one cooperative launch per layer and step, decode or prefill.

The kernel at the bottom reads like section 3 of the design; every phase is a function of its own above it:

    score   -> per query row, the span_top_k best keys of one slice of the middle      (every program, its own slice)
    merge   -> the slices' candidates -> the winners of a row
    vote    -> the max_spans positions that most rows chose
    select  -> where each span starts, in the cache and in the scope
    locate  -> row of the scope -> cache position
    rotate  -> RoPE with positions inside the scope
    attend  -> flash attention over rows of the scope
    combine -> the partial results of a head (split-KV)

Programs are persistent: the grid is what fits on the GPU at once, work is dealt out in units, and between phases all
programs meet at a barrier in global memory. That is safe only because the launch is cooperative: a grid that does not
fit fails to launch instead of waiting for programs that never start.

A decode step (T = 1) keeps winners and layout in registers, computed by every program alike, which is cheaper than
a second barrier. A chunk (T > 1) has too many winners for that: it counts votes in memory and gathers the scope,
rotated once, into scratch.

Shapes, beside the project's letters: R rows of one key/value head (row r is query r // (H / G)), K winners per row,
B ballots (1 for span_scope "layer", G for "kv_head"), W winners of one ballot, P spans. Names in capitals ending in
_PAD are the next powers of two, with the surplus masked.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM102  (an `if` on constants is decided at compile time; joined with one on data it would not be)

from __future__ import annotations

import contextlib
import functools
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl

from minirea.config import ReAttentionConfig
from minirea.errors import InputError

# A score and its position are compared as one int64: the score's bits, ordered, above the inverted position, so that of
# equal scores the lower position is the larger number. NO_KEY is a score of -inf at a position below zero.
NO_KEY: tl.constexpr = tl.constexpr(-(2139095041 << 32))
TAKEN: tl.constexpr = tl.constexpr(-(1 << 63))
NEVER_REPLACED: tl.constexpr = tl.constexpr((1 << 63) - 1)
NOWHERE: tl.constexpr = tl.constexpr((1 << 31) - 1)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)

# Arguments that change from model to model or from step to step; without this every other value compiles anew.
SIZES: Final = ("seq_len", "global_size", "local_size", "span_size", "max_spans", "max_scope")

# Counters in global memory, all zero between launches: one per barrier, one for the programs that have left, and
# from HEADS_DONE on one per key/value head.
BARRIERS: Final = 6
LEFT: tl.constexpr = tl.constexpr(BARRIERS)
HEADS_DONE: tl.constexpr = tl.constexpr(BARRIERS + 1)


# ---------------------------------------------------------------------------------------------------------- barrier


@triton.jit
def arrive(counter_ptr):
    """Publish what this program has written. The debug barrier puts all its threads' writes before the one release."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter_ptr):
    """Until every program has arrived; then what they published is visible here."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < tl.num_programs(0):
        pass
    tl.debug_barrier()


@triton.jit
def leave(counters_ptr, num_counters: tl.constexpr):
    """The last program to leave zeroes the counters: nobody can still be waiting on one of them."""
    tl.debug_barrier()
    if tl.atomic_add(counters_ptr + LEFT, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        for i in range(num_counters):
            tl.store(counters_ptr + i, 0)


# ---------------------------------------------------------------------------------------------- scores with positions


@triton.jit
def pack(score, position):
    """float32 and int32 -> one int64 that orders by score, then by lowest position. -0 + 0 is +0: they must tie."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - tl.cast(position, tl.int64))


@triton.jit
def position_of(packed):
    """The int32 position of a packed number; below zero where there is no key."""
    return (0xFFFFFFFF - (packed & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def score_of(packed):
    ordered = (packed >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def take_best(packed, K: tl.constexpr, K_PAD: tl.constexpr):
    """The K largest of each row of packed [M, N], descending: int64 [M, K_PAD]."""
    offs_k = tl.arange(0, K_PAD)[None, :]
    best = tl.full([packed.shape[0], K_PAD], NO_KEY, tl.int64)
    for i in range(K):
        top = tl.max(packed, axis=1)[:, None]
        best = tl.where(offs_k == i, top, best)
        packed = tl.where(packed == top, TAKEN, packed)
    return best


@triton.jit
def load_rows(ptr, offs_row, stride_row, mask_row, offs_d, stride_d, D: tl.constexpr):
    """Rows of a [rows, D] matrix, zero where masked. Row offsets are int64: caches exceed 2^31 elements."""
    ptrs = ptr + offs_row.to(tl.int64)[:, None] * stride_row + offs_d[None, :] * stride_d
    return tl.load(ptrs, mask=mask_row[:, None] & (offs_d < D)[None, :], other=0.0)


# ------------------------------------------------------------------------------------------------------------- score


@triton.jit
def score(
    q, k_ptr, stride_kn, stride_kd, lo, hi, block_ptr, best_ptr,
    D: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keep, for each row of q [M, D], the K key tiles of [lo, hi) with the largest maxima and all scores in them.

    Section 3, step 3. A winner in any other tile would have K better keys before it, so these tiles hold all winners.
    A tile costs one matrix product and one maximum per row; only rows that the tile improves do more: they write
    their scores over those of the tile that drops out. Later tiles must be strictly better, so ties keep the lower.

    Writes block_ptr float32 [M, K_PAD, N] and best_ptr int64 [M, K_PAD] (packed maximum and first position of a tile).
    """
    offs_m = tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, K_PAD)
    offs_d = tl.arange(0, BLOCK_D)
    # Distinct numbers below every score, so that exactly one entry of a row is the lowest.
    empty = tl.where(offs_k < K, NO_KEY + offs_k.to(tl.int64), NEVER_REPLACED)
    best = tl.zeros([BLOCK_M, K_PAD], tl.int64) + empty[None, :]
    threshold = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for start in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        offs_n = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, offs_n, stride_kn, offs_n < hi, offs_d, stride_kd, D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if start + BLOCK_N > hi:
            scores = tl.where((offs_n < hi)[None, :], scores, float("-inf"))
        row_max = tl.max(scores, axis=1)
        better = row_max > threshold
        if tl.max(better.to(tl.int32), axis=0) > 0:
            replaced = (best == tl.min(best, axis=1)[:, None]) & better[:, None]
            slot = tl.sum(tl.where(replaced, offs_k[None, :], 0), axis=1)
            block_ptrs = block_ptr + (offs_m * K_PAD + slot)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
            tl.store(block_ptrs, scores, mask=better[:, None])
            best = tl.where(replaced, pack(row_max, start)[:, None], best)
            threshold = score_of(tl.min(best, axis=1))
    tl.store(best_ptr + offs_m[:, None] * K_PAD + offs_k[None, :], best)


@triton.jit
def pick(
    block_ptr, best_ptr, candidate_ptr, stride_row, num_rows,
    K: tl.constexpr, K_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PICK_M: tl.constexpr,
):  # fmt: skip
    """The K best keys of each row within the tiles that `score` kept. Section 3, step 4, for one slice of the middle.

    Writes candidate_ptr int64 [rows, K_PAD], packed, best first, for the first num_rows rows.
    """
    tl.debug_barrier()  # other threads of this program wrote what is read here
    offs_k = tl.arange(0, K_PAD)
    # A row's tiles as one axis from the start: reducing a [M, K, N] tensor reshaped to [M, K * N] goes wrong in Triton
    # 3.6 where the compiler deals out M between K and N, since its reduction across warps expects an axis in one piece.
    offs_c = tl.arange(0, K_PAD * BLOCK_N)
    for first in range(0, tl.minimum(num_rows, BLOCK_M), PICK_M):
        offs_m = first + tl.arange(0, PICK_M)
        start = position_of(tl.load(best_ptr + offs_m[:, None] * K_PAD + (offs_c // BLOCK_N)[None, :]))
        filled = (offs_c < K * BLOCK_N)[None, :] & (start >= 0)
        block_ptrs = block_ptr + offs_m[:, None] * (K_PAD * BLOCK_N) + offs_c[None, :]
        scores = tl.load(block_ptrs, mask=filled, other=float("-inf"))
        packed = pack(scores, start + (offs_c % BLOCK_N)[None, :])
        best = take_best(tl.where(scores > float("-inf"), packed, NO_KEY), K, K_PAD)
        candidate_ptrs = candidate_ptr + offs_m[:, None] * stride_row + offs_k[None, :]
        tl.store(candidate_ptrs, best, mask=(offs_m < num_rows)[:, None])
    tl.debug_barrier()  # before this program's next unit writes there again


@triton.jit
def merge(
    candidate_ptr, first_row, last_row, ROWS: tl.constexpr, CANDIDATES: tl.constexpr, CANDIDATES_PAD: tl.constexpr,
    K: tl.constexpr, K_PAD: tl.constexpr,
):  # fmt: skip
    """The winners of rows [first_row, last_row) from all slices' candidates. Section 3, step 4.

    Returns int32 [ROWS, K_PAD] cache positions, NOWHERE in the places of masked rows and absent keys.
    """
    rows = first_row + tl.arange(0, ROWS)
    offs_c = tl.arange(0, CANDIDATES_PAD)
    packed = tl.load(
        candidate_ptr + rows.to(tl.int64)[:, None] * CANDIDATES + offs_c[None, :],
        mask=(rows < last_row)[:, None] & (offs_c < CANDIDATES)[None, :],
        other=NO_KEY,
    )
    winner = position_of(take_best(packed, K, K_PAD))
    return tl.where(winner < 0, NOWHERE, winner)


# ------------------------------------------------------------------------------- vote and select: decode, in registers


@triton.jit
def vote(winner, max_spans, W_PAD: tl.constexpr):
    """Of winner int32 [W_PAD], keep the max_spans positions named most often, NOWHERE instead of the others.

    Section 3, step 5, by counting pairs: sorting is slower for the few winners of a decode step. Only the first of
    equal positions is kept.
    """
    offs_w = tl.arange(0, W_PAD)
    same = winner[:, None] == winner[None, :]
    votes = tl.sum(same.to(tl.int32), axis=1)
    earlier = tl.sum((same & (offs_w[None, :] < offs_w[:, None])).to(tl.int32), axis=1)
    votes = tl.where((earlier == 0) & (winner != NOWHERE), votes, 0)
    ahead = (votes[None, :] > votes[:, None]) | (
        (votes[None, :] == votes[:, None]) & (winner[None, :] < winner[:, None])
    )
    rank = tl.sum((ahead & (votes > 0)[None, :]).to(tl.int32), axis=1)
    return tl.where((votes > 0) & (rank < max_spans), winner, NOWHERE)


@triton.jit
def select(kept, mid_lo, mid_hi, span_size, W_PAD: tl.constexpr):
    """Layout of the selected part from unsorted positions kept int32 [W_PAD]. Section 3, step 6.

    Covers have equal lengths, so each adds what lies at or after both its own start and the end of the one before.
    Returns start [W_PAD] (first cache position a span adds), offset [W_PAD] (the scope's row which that position
    fills, NOWHERE where a span adds none) and the number of rows selected.
    """
    offs_w = tl.arange(0, W_PAD)
    # Of equal positions all but the first come after one whose cover is theirs too, and so add nothing.
    before = kept[None, :] < kept[:, None]
    before |= (kept[None, :] == kept[:, None]) & (offs_w[None, :] < offs_w[:, None])
    stop = tl.minimum(tl.where(kept == NOWHERE, mid_lo, kept + span_size // 2), mid_hi)
    previous_stop = tl.max(tl.where(before, stop[None, :], mid_lo), axis=1)
    start = tl.maximum(kept - span_size // 2, previous_stop)
    rows = tl.where(kept == NOWHERE, 0, tl.maximum(stop - start, 0))
    offset = mid_lo + tl.sum(tl.where(before, rows[None, :], 0), axis=1)
    return start, tl.where(rows > 0, offset, NOWHERE), tl.sum(rows, axis=0)


@triton.jit
def locate(offs_r, start, offset):
    """Cache positions of the scope's rows offs_r [M] in the global and the selected part. Section 3, step 7.

    How far a row lies from its source only grows from span to span, so it is the largest such distance of all
    spans that begin at or before the row; 0 in the global part.
    """
    begun = offset[None, :] <= offs_r[:, None]
    return offs_r + tl.max(tl.where(begun, (start - offset)[None, :], 0), axis=1)


# ----------------------------------------------------------------------------- vote and select: chunks, through memory


@triton.jit
def count_votes(
    candidate_ptr, counts_ptr, num_votes_ptr, first_row, last_row, levels,
    ROWS: tl.constexpr, CANDIDATES: tl.constexpr, CANDIDATES_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr,
):  # fmt: skip
    """Cast the votes of some rows of one ballot. Section 3, step 5.

    counts_ptr int32 [N] counts by position; num_votes_ptr int32 [levels + 1] counts the positions that have at least
    so many votes. Most positions get one or two votes and would all add to the same two numbers, so those are summed
    up before they are added.
    """
    winner = merge(candidate_ptr, first_row, last_row, ROWS, CANDIDATES, CANDIDATES_PAD, K, K_PAD)
    cast = winner != NOWHERE
    level = tl.atomic_add(counts_ptr + winner, 1, mask=cast, sem="relaxed") + 1
    level = tl.where(cast, level, levels + 1)
    for common in tl.static_range(1, 3):
        if common <= levels:
            reached = tl.sum(tl.sum((level == common).to(tl.int32), axis=1), axis=0)
            tl.atomic_add(num_votes_ptr + common, reached, sem="relaxed")
    tl.atomic_add(num_votes_ptr + level, 1, mask=(level > 2) & (level <= levels), sem="relaxed")


@triton.jit
def votes_needed(num_votes_ptr, levels, max_spans, BLOCK_C: tl.constexpr):
    """The largest number of votes that at least max_spans positions have; 0 if fewer than that have any."""
    needed = 0
    for first in range(1, levels + 1, BLOCK_C):
        level = first + tl.arange(0, BLOCK_C)
        positions = tl.load(num_votes_ptr + level, mask=level <= levels, other=0)
        needed += tl.sum((positions >= max_spans).to(tl.int32), axis=0)
    return needed


@triton.jit
def tally(counts_ptr, tally_ptr, lo, hi, needed, BLOCK_C: tl.constexpr):
    """How many positions of [lo, hi) have more than the needed votes, and how many have exactly those."""
    more = 0
    exactly = 0
    for first in range(lo, hi, BLOCK_C):
        position = first + tl.arange(0, BLOCK_C)
        votes = tl.load(counts_ptr + position, mask=position < hi, other=0)
        more += tl.sum((votes > needed).to(tl.int32), axis=0)
        exactly += tl.sum(((votes == needed) & (votes > 0)).to(tl.int32), axis=0)
    tl.store(tally_ptr, more)
    tl.store(tally_ptr + 1, exactly)


@triton.jit
def elect(
    counts_ptr, tally_ptr, kept_ptr, num_kept_ptr, lo, hi, needed, max_spans,
    PROGRAMS_PAD: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the kept positions of [lo, hi), ascending, to their places in kept_ptr [P]. Section 3, step 5.

    All positions with more than the needed votes are kept, and of those with exactly the needed ones the lowest, as
    many as there is room for. The tallies of the programs before this one tell where to go on. Zeroes the counts.
    """
    program = tl.arange(0, PROGRAMS_PAD)
    present = program < tl.num_programs(0)
    before = program < tl.program_id(0)
    more = tl.load(tally_ptr + 2 * program, mask=present, other=0)
    exactly = tl.load(tally_ptr + 2 * program + 1, mask=present, other=0)
    room = max_spans - tl.sum(more, axis=0)
    exactly_before = tl.sum(tl.where(before, exactly, 0), axis=0)
    if tl.program_id(0) == 0:
        tl.store(num_kept_ptr, tl.sum(more, axis=0) + tl.minimum(room, tl.sum(exactly, axis=0)))
    place = tl.sum(tl.where(before, more, 0), axis=0) + tl.minimum(room, exactly_before)
    for first in range(lo, hi, BLOCK_C):
        position = first + tl.arange(0, BLOCK_C)
        votes = tl.load(counts_ptr + position, mask=position < hi, other=0)
        tied = ((votes == needed) & (votes > 0)).to(tl.int32)
        keep = (votes > needed) | ((tied > 0) & (exactly_before + tl.cumsum(tied, axis=0) <= room))
        index = place + tl.cumsum(keep.to(tl.int32), axis=0) - 1
        tl.store(kept_ptr + index, position, mask=keep)
        tl.store(counts_ptr + position, 0, mask=votes > 0)
        exactly_before += tl.sum(tied, axis=0)
        place += tl.sum(keep.to(tl.int32), axis=0)


@triton.jit
def select_sorted(kept_ptr, num_kept, start_ptr, offset_ptr, mid_lo, mid_hi, span_size, P_PAD: tl.constexpr):
    """`select` for positions that already are sorted and distinct, through memory private to the program.

    Writes start and offset, [P_PAD], for `locate_sorted` to read in pieces and returns the number of rows selected.
    """
    offs_p = tl.arange(0, P_PAD)
    kept = tl.load(kept_ptr + offs_p, mask=offs_p < num_kept, other=0)
    previous = tl.load(kept_ptr + offs_p - 1, mask=(offs_p > 0) & (offs_p < num_kept), other=0)
    stop = tl.minimum(kept + span_size // 2, mid_hi)
    previous_stop = tl.where(offs_p > 0, tl.minimum(previous + span_size // 2, mid_hi), mid_lo)
    start = tl.maximum(tl.maximum(kept - span_size // 2, previous_stop), mid_lo)
    rows = tl.where(offs_p < num_kept, tl.maximum(stop - start, 0), 0)
    offset = mid_lo + tl.cumsum(rows, axis=0) - rows
    tl.debug_barrier()  # the layout of the ballot before may still be in use
    tl.store(start_ptr + offs_p, start)
    tl.store(offset_ptr + offs_p, tl.where(rows > 0, offset, NOWHERE))
    tl.debug_barrier()
    return tl.sum(rows, axis=0)


@triton.jit
def locate_sorted(offs_r, num_kept, start_ptr, offset_ptr, BLOCK_P: tl.constexpr):
    """`locate` over a layout in memory, a piece at a time."""
    distance = offs_r * 0
    for first in range(0, num_kept, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        start = tl.load(start_ptr + offs_p, mask=offs_p < num_kept, other=0)
        offset = tl.load(offset_ptr + offs_p, mask=offs_p < num_kept, other=NOWHERE)
        distance = tl.maximum(distance, locate(offs_r, start, offset) - offs_r)
    return offs_r + distance


# ------------------------------------------------------------------------------------------------------------- attend


@triton.jit
def rotate(a, b, cos, sin):
    """RoPE of the two halves of rows, in float32: element i turns with element i + D / 2."""
    a = a.to(tl.float32)
    b = b.to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def softmax_step(
    logits, v, acc, row_max, row_sum,
    SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: the state (acc, row_max, row_sum) with a tile's logits [M, N] and v [N, D] added.

    In base 2, which is what the GPU computes: row_max is in units of log2. The fused multiply-add rounds only the
    distance to the maximum, not the logit, and the maximum's own rounding cancels in the final division.
    """
    new_max = tl.maximum(row_max, tl.max(logits, axis=1) * (SCALE * LOG2_E))
    rescale = tl.exp2(row_max - new_max)
    probability = tl.exp2(tl.fma(logits, SCALE * LOG2_E, -new_max[:, None]))
    row_sum = row_sum * rescale + tl.sum(probability, axis=1)
    if v.dtype == tl.float32:
        # One chain of additions over all rows of the scope would lose several bits. A tile's sum on its own, then one
        # addition per tile, does not; as a multiply-add, for a plain one would be folded back into the product.
        acc = tl.fma(acc, rescale[:, None], tl.dot(probability, v, input_precision=PRECISION))
    else:
        acc = tl.dot(probability.to(v.dtype), v, acc * rescale[:, None])
    return acc, new_max, row_sum


@triton.jit
def attend(
    acc, row_max, row_sum, q_a, q_b, k_ptr, stride_kn, stride_kd, v_ptr, stride_vn, stride_vd, cos_ptr, sin_ptr,
    row_lo, row_hi, q_row, shift, start, offset,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr, HALF_PAD: tl.constexpr,
    GATHER: tl.constexpr, RELATIVE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Flash attention of the rows of q over rows [row_lo, row_hi), which lie in the cache where `locate` says if
    GATHER, else at the rows themselves. Section 3, steps 7 and 8.

    Only the distance between query and key matters to RoPE. RELATIVE uses that: keys get positions 0, 1, ... within
    their tile, so that all tiles share one small table that stays in registers, and the query, at row q_row, gets its
    distance to the tile's first row. Else positions are rows + shift: in float32 the tables' own
    rounding would show.
    """
    dtype = k_ptr.dtype.element_ty
    offs_h = tl.arange(0, HALF_PAD)
    offs_d = tl.arange(0, BLOCK_D)
    mask_h = offs_h < D // 2
    if RELATIVE:
        offs_tile = tl.arange(0, BLOCK_A)
        cos = load_rows(cos_ptr, offs_tile, D // 2, offs_tile < row_hi - row_lo, offs_h, 1, D // 2)
        sin = load_rows(sin_ptr, offs_tile, D // 2, offs_tile < row_hi - row_lo, offs_h, 1, D // 2)
    for first in tl.range(row_lo, row_hi, BLOCK_A, num_stages=STAGES):
        offs_r = first + tl.arange(0, BLOCK_A)
        mask_r = offs_r < row_hi
        source = offs_r
        if GATHER:
            source = locate(offs_r, start, offset)
        k_a = load_rows(k_ptr, source, stride_kn, mask_r, offs_h, stride_kd, D // 2)
        k_b = load_rows(k_ptr + D // 2 * stride_kd, source, stride_kn, mask_r, offs_h, stride_kd, D // 2)
        v = load_rows(v_ptr, source, stride_vn, mask_r, offs_d, stride_vd, D)
        if RELATIVE:
            q_position = q_row - first
        else:
            q_position = q_row + shift
            cos = load_rows(cos_ptr, offs_r + shift, D // 2, mask_r, offs_h, 1, D // 2)
            sin = load_rows(sin_ptr, offs_r + shift, D // 2, mask_r, offs_h, 1, D // 2)
        k_a, k_b = rotate(k_a, k_b, cos, sin)
        q_cos = tl.load(cos_ptr + q_position * (D // 2) + offs_h, mask=mask_h, other=0.0)[None, :]
        q_sin = tl.load(sin_ptr + q_position * (D // 2) + offs_h, mask=mask_h, other=0.0)[None, :]
        qr_a, qr_b = rotate(q_a, q_b, q_cos, q_sin)
        logits = tl.dot(qr_a.to(dtype), tl.trans(k_a.to(dtype)), input_precision=PRECISION)
        logits = tl.dot(qr_b.to(dtype), tl.trans(k_b.to(dtype)), logits, input_precision=PRECISION)
        logits = tl.where(mask_r[None, :], logits, float("-inf"))
        acc, row_max, row_sum = softmax_step(logits, v, acc, row_max, row_sum, SCALE, PRECISION)
    return acc, row_max, row_sum


@triton.jit
def combine(
    partial_acc_ptr, partial_max_ptr, partial_sum_ptr, out_ptr, g,
    GROUP: tl.constexpr, SLICES: tl.constexpr, SLICES_PAD: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Join the slices' partial attention of one key/value head's query heads: weights by maximum, then one division."""
    offs_s = tl.arange(0, SLICES_PAD)
    offs_d = tl.arange(0, BLOCK_D)
    mask_s = offs_s < SLICES
    mask_d = offs_d < D
    for h in range(g * GROUP, g * GROUP + GROUP):
        partial = h * SLICES + offs_s
        row_max = tl.load(partial_max_ptr + partial, mask=mask_s, other=float("-inf"))
        row_sum = tl.load(partial_sum_ptr + partial, mask=mask_s, other=0.0)
        acc = tl.load(
            partial_acc_ptr + partial[:, None] * D + offs_d[None, :], mask=mask_s[:, None] & mask_d[None, :], other=0.0
        )
        weight = tl.exp2(row_max - tl.max(row_max, axis=0))
        out = tl.sum(acc * weight[:, None], axis=0) / tl.sum(row_sum * weight, axis=0)
        tl.store(out_ptr + h * D + offs_d, out.to(out_ptr.dtype.element_ty), mask=mask_d)


@triton.jit
def gather(
    k_ptr, stride_kn, stride_kd, v_ptr, stride_vn, stride_vd, cos_ptr, sin_ptr, k_rot_ptr, v_sel_ptr,
    offs_r, source, mask_r, D: tl.constexpr, BLOCK_D: tl.constexpr, HALF_PAD: tl.constexpr,
):  # fmt: skip
    """Copy rows offs_r of the scope, keys rotated to their positions, to k_rot and v_sel [S, D]. Section 3, step 7."""
    dtype = k_rot_ptr.dtype.element_ty
    offs_h = tl.arange(0, HALF_PAD)
    offs_d = tl.arange(0, BLOCK_D)
    k_a = load_rows(k_ptr, source, stride_kn, mask_r, offs_h, stride_kd, D // 2)
    k_b = load_rows(k_ptr + D // 2 * stride_kd, source, stride_kn, mask_r, offs_h, stride_kd, D // 2)
    v = load_rows(v_ptr, source, stride_vn, mask_r, offs_d, stride_vd, D)
    cos = load_rows(cos_ptr, offs_r, D // 2, mask_r, offs_h, 1, D // 2)
    sin = load_rows(sin_ptr, offs_r, D // 2, mask_r, offs_h, 1, D // 2)
    k_a, k_b = rotate(k_a, k_b, cos, sin)
    mask_rh = mask_r[:, None] & (offs_h < D // 2)[None, :]
    rows = offs_r.to(tl.int64)[:, None] * D
    k_ptrs = k_rot_ptr + rows + offs_h[None, :]
    tl.store(k_ptrs, k_a.to(dtype), mask=mask_rh)
    tl.store(k_ptrs + D // 2, k_b.to(dtype), mask=mask_rh)
    tl.store(v_sel_ptr + rows + offs_d[None, :], v, mask=mask_r[:, None] & (offs_d < D)[None, :])


@triton.jit
def rotate_queries(
    q_ptr, stride_qt, stride_qh, stride_qd, cos_ptr, sin_ptr, q_rot_ptr, t, head, position, row, mask_r,
    D: tl.constexpr, HALF_PAD: tl.constexpr,
):  # fmt: skip
    """Copy queries (t, head), rotated to their positions, to rows of q_rot [G * R, D]."""
    dtype = q_rot_ptr.dtype.element_ty
    offs_h = tl.arange(0, HALF_PAD)
    mask_rh = mask_r[:, None] & (offs_h < D // 2)[None, :]
    q_ptrs = q_ptr + (t.to(tl.int64) * stride_qt + head * stride_qh)[:, None] + offs_h[None, :] * stride_qd
    q_a = tl.load(q_ptrs, mask=mask_rh, other=0.0)
    q_b = tl.load(q_ptrs + D // 2 * stride_qd, mask=mask_rh, other=0.0)
    cos = load_rows(cos_ptr, position, D // 2, mask_r, offs_h, 1, D // 2)
    sin = load_rows(sin_ptr, position, D // 2, mask_r, offs_h, 1, D // 2)
    q_a, q_b = rotate(q_a, q_b, cos, sin)
    q_rot_ptrs = q_rot_ptr + row.to(tl.int64)[:, None] * D + offs_h[None, :]
    tl.store(q_rot_ptrs, q_a.to(dtype), mask=mask_rh)
    tl.store(q_rot_ptrs + D // 2, q_b.to(dtype), mask=mask_rh)


@triton.jit
def attend_tiles(
    acc, row_max, row_sum, q, k_ptr, v_ptr, lo, hi, last_key,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Flash attention of q [M, D] over rows [lo, hi) of the gathered scope; CAUSAL hides keys after last_key [M]."""
    offs_d = tl.arange(0, BLOCK_D)
    for first in tl.range(lo, hi, BLOCK_A, num_stages=STAGES):
        offs_r = first + tl.arange(0, BLOCK_A)
        mask_r = offs_r < hi
        k = load_rows(k_ptr, offs_r, D, mask_r, offs_d, 1, D)
        v = load_rows(v_ptr, offs_r, D, mask_r, offs_d, 1, D)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if CAUSAL:
            logits = tl.where(offs_r[None, :] <= last_key[:, None], logits, float("-inf"))
        acc, row_max, row_sum = softmax_step(logits, v, acc, row_max, row_sum, SCALE, PRECISION)
    return acc, row_max, row_sum


# ------------------------------------------------------------------------------------------- the two forms of the step


@triton.jit
def score_unit(
    q_ptr, stride_qt, stride_qh, stride_qd, k_ptr, stride_kn, stride_kd, block_ptr, best_ptr, candidate_ptr,
    g, first_row, num_rows, part, mid_lo, mid_hi,
    D: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PICK_M: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Score rows [first_row, first_row + BLOCK_M) of head g's num_rows against slice `part` of the middle."""
    rows = first_row + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    q_ptrs = q_ptr + (rows // GROUP).to(tl.int64)[:, None] * stride_qt + (g * GROUP + rows % GROUP)[:, None] * stride_qh
    q = tl.load(
        q_ptrs + offs_d[None, :] * stride_qd, mask=(rows < num_rows)[:, None] & (offs_d < D)[None, :], other=0.0
    )
    slice_size = tl.cdiv(mid_hi - mid_lo, SLICES)
    lo = mid_lo + part * slice_size
    hi = tl.minimum(lo + slice_size, mid_hi)
    # Scratch is the program's own, so that it stays in its cache.
    block_ptr += tl.cast(tl.program_id(0), tl.int64) * (BLOCK_M * K_PAD * BLOCK_N)
    best_ptr += tl.program_id(0) * (BLOCK_M * K_PAD)
    score(q, k_ptr, stride_kn, stride_kd, lo, hi, block_ptr, best_ptr,
          D, K, K_PAD, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, PRECISION)  # fmt: skip
    row = tl.cast(g * num_rows + first_row, tl.int64)
    pick(block_ptr, best_ptr, candidate_ptr + (row * SLICES + part) * K_PAD, SLICES * K_PAD, num_rows - first_row,
         K, K_PAD, BLOCK_M, BLOCK_N, PICK_M)  # fmt: skip


@triton.jit
def write_selection(selection_ptr, length_ptr, ballot, length, seq_len, local_rows, start, offset, max_scope,
                    BLOCK_R: tl.constexpr):  # fmt: skip
    """The scope's cache positions, for the caller who asked for them."""
    for first in range(0, length, BLOCK_R):
        offs_r = first + tl.arange(0, BLOCK_R)
        source = tl.where(offs_r < length - local_rows, locate(offs_r, start, offset), offs_r + seq_len - length)
        tl.store(selection_ptr + ballot * max_scope + offs_r, source.to(tl.int64), mask=offs_r < length)
    tl.store(length_ptr + ballot, length)


@triton.jit(do_not_specialize=SIZES)
def decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, seq_len, cos_ptr, sin_ptr, stride_qh, stride_qd, stride_kg, stride_kn, stride_kd,
    stride_vg, stride_vn, stride_vd, counters_ptr, block_ptr, best_ptr, candidate_ptr,
    partial_acc_ptr, partial_max_ptr, partial_sum_ptr, selection_ptr, length_ptr,
    global_size, local_size, span_size, max_spans, max_scope,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr,
    BY_HEAD: tl.constexpr, SELECTS: tl.constexpr, SEQ_LEN_IN_MEMORY: tl.constexpr, RETURN_SELECTION: tl.constexpr,
    SLICES: tl.constexpr, SLICES_PAD: tl.constexpr, CANDIDATES_PAD: tl.constexpr, BALLOT_ROWS: tl.constexpr,
    BALLOT_ROWS_PAD: tl.constexpr, VOTES: tl.constexpr, W_PAD: tl.constexpr, SCALE: tl.constexpr,
    RELATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr, HALF_PAD: tl.constexpr,
    PICK_M: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of one query per head: q [1, H, D] against k and v [G, N, D], to out [1, H, D].

    A unit of work is one slice of one key/value head: first of the middle to score, then of the local part to attend
    to, then of the global and selected parts. Attending to the local part needs no selection, so it fills the time
    until the last program has scored.
    """
    n = tl.load(seq_len).to(tl.int32) if SEQ_LEN_IN_MEMORY else seq_len
    dense = n <= global_size + local_size
    local_lo = tl.where(dense, 0, n - local_size)
    mid_lo = global_size
    mid_hi = n - local_size
    units = G * SLICES
    offs_m = tl.arange(0, BLOCK_M)
    offs_h = tl.arange(0, HALF_PAD)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < GROUP

    if SELECTS:
        if not dense:
            for unit in range(tl.program_id(0), units, tl.num_programs(0)):
                g = unit % G
                k_head = k_ptr + tl.cast(g, tl.int64) * stride_kg
                score_unit(q_ptr, 0, stride_qh, stride_qd, k_head, stride_kn, stride_kd, block_ptr, best_ptr,
                           candidate_ptr, g, 0, GROUP, unit // G, mid_lo, mid_hi,
                           D, GROUP, K, K_PAD, SLICES, BLOCK_M, BLOCK_N, BLOCK_D, PICK_M, STAGES,
                           PRECISION)  # fmt: skip
            arrive(counters_ptr)

    no_start = tl.zeros([W_PAD], tl.int32)
    no_offset = no_start + NOWHERE
    if RELATIVE:
        for unit in range(tl.program_id(0), units, tl.num_programs(0)):
            g = unit % G
            part = unit // G
            heads = g * GROUP + offs_m
            q_a = load_rows(q_ptr, heads, stride_qh, mask_m, offs_h, stride_qd, D // 2)
            q_b = load_rows(q_ptr + D // 2 * stride_qd, heads, stride_qh, mask_m, offs_h, stride_qd, D // 2)
            slice_size = tl.cdiv(n - local_lo, SLICES)
            lo = local_lo + part * slice_size
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            row_max = tl.full([BLOCK_M], -1.0e38, tl.float32)
            row_sum = tl.zeros([BLOCK_M], tl.float32)
            acc, row_max, row_sum = attend(
                acc, row_max, row_sum, q_a, q_b, k_ptr + tl.cast(g, tl.int64) * stride_kg, stride_kn, stride_kd,
                v_ptr + tl.cast(g, tl.int64) * stride_vg, stride_vn, stride_vd, cos_ptr, sin_ptr,
                lo, tl.minimum(lo + slice_size, n), n - 1, 0, no_start, no_offset,
                SCALE, D, BLOCK_A, BLOCK_D, HALF_PAD, False, True, STAGES, PRECISION)  # fmt: skip
            partial = heads * SLICES + part
            tl.store(partial_max_ptr + partial, row_max, mask=mask_m)
            tl.store(partial_sum_ptr + partial, row_sum, mask=mask_m)
            mask_md = mask_m[:, None] & (offs_d < D)[None, :]
            tl.store(partial_acc_ptr + partial[:, None] * D + offs_d[None, :], acc, mask=mask_md)

    if SELECTS:
        if not dense:
            wait(counters_ptr)
    tl.debug_barrier()

    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        g = unit % G
        part = unit // G
        heads = g * GROUP + offs_m
        k_head = k_ptr + tl.cast(g, tl.int64) * stride_kg
        v_head = v_ptr + tl.cast(g, tl.int64) * stride_vg
        start = no_start
        offset = no_offset
        selected = 0
        if SELECTS:
            if not dense:
                first_row = g * GROUP if BY_HEAD else 0
                winner = merge(candidate_ptr, first_row, first_row + BALLOT_ROWS, BALLOT_ROWS_PAD, SLICES * K_PAD,
                               CANDIDATES_PAD, K, K_PAD)  # fmt: skip
                kept = tl.reshape(winner, [W_PAD])
                if VOTES:
                    kept = vote(kept, max_spans, W_PAD)
                start, offset, selected = select(kept, mid_lo, mid_hi, span_size, W_PAD)
        length = tl.where(dense, n, global_size + selected + local_size)
        begin = length - (n - local_lo)  # first row of the local part in the scope

        q_a = load_rows(q_ptr, heads, stride_qh, mask_m, offs_h, stride_qd, D // 2)
        q_b = load_rows(q_ptr + D // 2 * stride_qd, heads, stride_qh, mask_m, offs_h, stride_qd, D // 2)
        partial = heads * SLICES + part
        mask_md = mask_m[:, None] & (offs_d < D)[None, :]
        if RELATIVE:
            row_max = tl.load(partial_max_ptr + partial, mask=mask_m, other=0.0)
            row_sum = tl.load(partial_sum_ptr + partial, mask=mask_m, other=0.0)
            acc = tl.load(partial_acc_ptr + partial[:, None] * D + offs_d[None, :], mask=mask_md, other=0.0)
        else:
            row_max = tl.full([BLOCK_M], -1.0e38, tl.float32)
            row_sum = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            slice_size = tl.cdiv(n - local_lo, SLICES)
            lo = local_lo + part * slice_size
            acc, row_max, row_sum = attend(
                acc, row_max, row_sum, q_a, q_b, k_head, stride_kn, stride_kd, v_head, stride_vn, stride_vd, cos_ptr,
                sin_ptr, lo, tl.minimum(lo + slice_size, n), n - 1, length - n, start, offset,
                SCALE, D, BLOCK_A, BLOCK_D, HALF_PAD, False, False, STAGES, PRECISION)  # fmt: skip
        slice_size = tl.cdiv(begin, SLICES)
        lo = part * slice_size
        acc, row_max, row_sum = attend(
            acc, row_max, row_sum, q_a, q_b, k_head, stride_kn, stride_kd, v_head, stride_vn, stride_vd, cos_ptr,
            sin_ptr, lo, tl.minimum(lo + slice_size, begin), length - 1, 0, start, offset,
            SCALE, D, BLOCK_A, BLOCK_D, HALF_PAD, True, RELATIVE, STAGES, PRECISION)  # fmt: skip
        tl.store(partial_max_ptr + partial, row_max, mask=mask_m)
        tl.store(partial_sum_ptr + partial, row_sum, mask=mask_m)
        tl.store(partial_acc_ptr + partial[:, None] * D + offs_d[None, :], acc, mask=mask_md)
        if RETURN_SELECTION:
            if part == 0 and (BY_HEAD or g == 0):
                write_selection(selection_ptr, length_ptr, g, length, n, n - local_lo, start, offset,
                                max_scope, BLOCK_A)  # fmt: skip
        tl.debug_barrier()
        if tl.atomic_add(counters_ptr + HEADS_DONE + g, 1, sem="acq_rel", scope="gpu") == SLICES - 1:
            tl.debug_barrier()
            combine(partial_acc_ptr, partial_max_ptr, partial_sum_ptr, out_ptr, g,
                    GROUP, SLICES, SLICES_PAD, D, BLOCK_D)  # fmt: skip
    leave(counters_ptr, HEADS_DONE + G)


@triton.jit(do_not_specialize=[*SIZES, "T", "levels"])
def chunk_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, seq_len, T, levels, cos_ptr, sin_ptr, stride_qt, stride_qh, stride_qd,
    stride_kg, stride_kn, stride_kd, stride_vg, stride_vn, stride_vd, counters_ptr, block_ptr, best_ptr, candidate_ptr,
    counts_ptr, stride_counts, num_votes_ptr, stride_votes, tally_ptr, kept_ptr, num_kept_ptr, start_ptr, offset_ptr,
    q_rot_ptr, k_rot_ptr, v_sel_ptr, selection_ptr, length_ptr,
    global_size, local_size, span_size, max_spans, max_scope,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr,
    BY_HEAD: tl.constexpr, SELECTS: tl.constexpr, SEQ_LEN_IN_MEMORY: tl.constexpr, RETURN_SELECTION: tl.constexpr,
    SLICES: tl.constexpr, CANDIDATES_PAD: tl.constexpr, COUNT_ROWS: tl.constexpr, P_PAD: tl.constexpr,
    PROGRAMS_PAD: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr,
    HALF_PAD: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, PICK_M: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of T queries: q [T, H, D] against k and v [G, N, D], to out [T, H, D]."""
    n = tl.load(seq_len).to(tl.int32) if SEQ_LEN_IN_MEMORY else seq_len
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    dense = n <= global_size + local_size
    mid_lo = global_size
    mid_hi = n - local_size
    ballots: tl.constexpr = G if BY_HEAD else 1
    heads_per_ballot: tl.constexpr = 1 if BY_HEAD else G
    num_rows = T * GROUP  # of one key/value head; row r is query r // GROUP
    offs_d = tl.arange(0, BLOCK_D)

    if SELECTS:
        if not dense:
            row_blocks = tl.cdiv(num_rows, BLOCK_M)
            for unit in range(program, G * row_blocks * SLICES, programs):
                part = unit % SLICES
                g = unit // SLICES % G
                first_row = unit // SLICES // G * BLOCK_M
                k_head = k_ptr + tl.cast(g, tl.int64) * stride_kg
                score_unit(q_ptr, stride_qt, stride_qh, stride_qd, k_head, stride_kn, stride_kd, block_ptr, best_ptr,
                           candidate_ptr, g, first_row, num_rows, part, mid_lo, mid_hi,
                           D, GROUP, K, K_PAD, SLICES, BLOCK_M, BLOCK_N, BLOCK_D, PICK_M, STAGES,
                           PRECISION)  # fmt: skip
            arrive(counters_ptr)
            wait(counters_ptr)

            count_blocks = tl.cdiv(num_rows, COUNT_ROWS)
            for unit in range(program, G * count_blocks, programs):
                g = unit % G
                ballot = g if BY_HEAD else 0
                first_row = g * num_rows + unit // G * COUNT_ROWS
                count_votes(candidate_ptr, counts_ptr + ballot * stride_counts, num_votes_ptr + ballot * stride_votes,
                            first_row, tl.minimum(first_row + COUNT_ROWS, (g + 1) * num_rows), levels,
                            COUNT_ROWS, SLICES * K_PAD, CANDIDATES_PAD, K, K_PAD)  # fmt: skip
            arrive(counters_ptr + 1)
            wait(counters_ptr + 1)

            range_size = tl.cdiv(mid_hi - mid_lo, programs)
            lo = mid_lo + program * range_size
            hi = tl.minimum(lo + range_size, mid_hi)
            for ballot in range(ballots):
                needed = votes_needed(num_votes_ptr + ballot * stride_votes, levels, max_spans, BLOCK_C)
                tally(counts_ptr + ballot * stride_counts, tally_ptr + 2 * (ballot * programs + program), lo, hi,
                      needed, BLOCK_C)  # fmt: skip
            arrive(counters_ptr + 2)
            wait(counters_ptr + 2)

            for ballot in range(ballots):
                needed = votes_needed(num_votes_ptr + ballot * stride_votes, levels, max_spans, BLOCK_C)
                elect(counts_ptr + ballot * stride_counts, tally_ptr + 2 * ballot * programs, kept_ptr + ballot * P_PAD,
                      num_kept_ptr + ballot, lo, hi, needed, max_spans, PROGRAMS_PAD, BLOCK_C)  # fmt: skip
            arrive(counters_ptr + 3)
            wait(counters_ptr + 3)
            if program == 0:
                for first in range(0, ballots * stride_votes, BLOCK_C):
                    offs_c = first + tl.arange(0, BLOCK_C)
                    tl.store(num_votes_ptr + offs_c, 0, mask=offs_c < ballots * stride_votes)

    start_ptr += program * P_PAD
    offset_ptr += program * P_PAD
    for ballot in range(ballots):
        num_kept = 0
        selected = 0
        if SELECTS:
            if not dense:
                num_kept = tl.load(num_kept_ptr + ballot)
                selected = select_sorted(kept_ptr + ballot * P_PAD, num_kept, start_ptr, offset_ptr, mid_lo, mid_hi,
                                         span_size, P_PAD)  # fmt: skip
        length = tl.where(dense, n, global_size + selected + local_size)
        for unit in range(program, tl.cdiv(length, BLOCK_R) * heads_per_ballot, programs):
            g = ballot if BY_HEAD else unit % G
            offs_r = unit // heads_per_ballot * BLOCK_R + tl.arange(0, BLOCK_R)
            mask_r = offs_r < length
            source = locate_sorted(offs_r, num_kept, start_ptr, offset_ptr, BLOCK_P)
            source = tl.where(offs_r < length - local_size, source, offs_r + n - length)
            gather(k_ptr + tl.cast(g, tl.int64) * stride_kg, stride_kn, stride_kd,
                   v_ptr + tl.cast(g, tl.int64) * stride_vg, stride_vn, stride_vd, cos_ptr, sin_ptr,
                   k_rot_ptr + tl.cast(g, tl.int64) * max_scope * D, v_sel_ptr + tl.cast(g, tl.int64) * max_scope * D,
                   offs_r, source, mask_r, D, BLOCK_D, HALF_PAD)  # fmt: skip
            if RETURN_SELECTION:
                if BY_HEAD or g == 0:
                    tl.store(selection_ptr + ballot * max_scope + offs_r, source.to(tl.int64), mask=mask_r)
        if program == 0:
            tl.store(length_ptr + ballot, length)
        for unit in range(program, tl.cdiv(num_rows * heads_per_ballot, BLOCK_R), programs):
            row = unit * BLOCK_R + tl.arange(0, BLOCK_R)
            mask_r = row < num_rows * heads_per_ballot
            t = row % num_rows // GROUP
            g = ballot * heads_per_ballot + row // num_rows
            head = g * GROUP + row % GROUP
            rotate_queries(q_ptr, stride_qt, stride_qh, stride_qd, cos_ptr, sin_ptr, q_rot_ptr, t, head,
                           length - T + t, g * num_rows + row % num_rows, mask_r, D, HALF_PAD)  # fmt: skip
    arrive(counters_ptr + 4)
    wait(counters_ptr + 4)

    row_blocks = tl.cdiv(num_rows, BLOCK_M)
    for unit in range(program, G * row_blocks, programs):
        g = unit % G
        rows = unit // G * BLOCK_M + tl.arange(0, BLOCK_M)
        length = tl.load(length_ptr + (g if BY_HEAD else 0))
        last_key = length - T + rows // GROUP
        mask_m = rows < num_rows
        q = load_rows(q_rot_ptr, g * num_rows + rows, D, mask_m, offs_d, 1, D)
        k_head = k_rot_ptr + tl.cast(g, tl.int64) * max_scope * D
        v_head = v_sel_ptr + tl.cast(g, tl.int64) * max_scope * D
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        row_max = tl.full([BLOCK_M], -1.0e38, tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        # Keys that every row sees need no mask; the block's own queries are at most a tile or two more.
        seen_by_all = (length - T + unit // G * BLOCK_M // GROUP + 1) // BLOCK_A * BLOCK_A
        seen_by_any = tl.minimum(length, length - T + (unit // G * BLOCK_M + BLOCK_M - 1) // GROUP + 1)
        acc, row_max, row_sum = attend_tiles(acc, row_max, row_sum, q, k_head, v_head, 0, seen_by_all, last_key,
                                             SCALE, D, BLOCK_A, BLOCK_D, False, STAGES, PRECISION)  # fmt: skip
        acc, row_max, row_sum = attend_tiles(acc, row_max, row_sum, q, k_head, v_head, seen_by_all, seen_by_any,
                                             last_key, SCALE, D, BLOCK_A, BLOCK_D, True, STAGES, PRECISION)  # fmt: skip
        out_ptrs = out_ptr + ((rows // GROUP) * (G * GROUP) + g * GROUP + rows % GROUP).to(tl.int64)[:, None] * D
        out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptrs + offs_d[None, :], out, mask=mask_m[:, None] & (offs_d < D)[None, :])
    leave(counters_ptr, HEADS_DONE)


# ------------------------------------------------------------------------------------------------------------ launcher

# Under TRITON_INTERPRET=1 programs run one after another, so there may be only one: a second could never arrive.
INTERPRETED: Final = not isinstance(decode_kernel, triton.JITFunction)
# The most winners of a ballot that a decode step may hold in registers, where every one is compared with every other.
MAX_WINNERS_IN_REGISTERS: Final = 256
# Packed candidates that one program holds in registers at a time.
MAX_CANDIDATES: Final = 8192


class Tiles(NamedTuple):
    """Tile sizes and launch parameters of one variant; BLOCK_N and BLOCK_A count keys, BLOCK_M query rows."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_A: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


def decode_tiles(group: int, block_d: int, itemsize: int) -> Tiles:
    """A key tile of 32 KiB, three of which are in flight while one is used; the matrix unit wants 16 rows."""
    block_n = max(16, min(128, 32768 // (block_d * itemsize)))
    return Tiles(max(16, _pad(group)), block_n, max(16, block_n // 2), num_warps=8, num_stages=3, programs_per_sm=1)


def chunk_tiles(block_d: int, itemsize: int) -> Tiles:
    """Tiles for the tensor cores in half precision; in float32, whose products are not theirs, tiles that fit."""
    if itemsize == 4:
        return Tiles(32, 32, 32, num_warps=4, num_stages=1, programs_per_sm=1)
    block_m = 128 if block_d <= 128 else 64
    return Tiles(block_m, 128 if block_d <= 128 else 64, 64, num_warps=8, num_stages=3, programs_per_sm=1)


class Workspace:
    """Everything a launch needs beside its arguments, allocated once per shape, device and stream and kept.

    Captured CUDA graphs hold these addresses, so a workspace is never freed. Streams have their own, since two
    launches that run at once must not share counters.
    """

    def __init__(self, device: torch.device, **shapes: tuple[torch.dtype, tuple[int, ...]]) -> None:
        for name, (dtype, shape) in shapes.items():
            setattr(self, name, torch.zeros(shape, dtype=dtype, device=device))

    def __getattr__(self, name: str) -> torch.Tensor:
        raise AttributeError(name)


_workspaces: dict[tuple[object, ...], Workspace] = {}


def reattention_triton(
    q_THD: torch.Tensor,
    k_cache_GND: torch.Tensor,
    v_cache_GND: torch.Tensor,
    seq_len: int | torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    config: ReAttentionConfig,
    return_selection: bool = False,
    tiles: Tiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor | list[torch.Tensor] | None]:
    """One step in one launch. Arguments and results are those of `minirea.kernels.reattention`.

    Only return_selection waits for the GPU: the scope's length decides the shape of the result. `tiles` overrides the
    tile sizes, for measurements.

    Raises:
        InputError: head_dim beyond 256, or a GPU or Triton without cooperative launches.
    """
    T, H, D = q_THD.shape
    G = k_cache_GND.shape[0]
    if not (q_THD.is_cuda or INTERPRETED):
        raise InputError(f"the tensors are on {q_THD.device}, expected a CUDA device for impl 'triton'")
    if D > 256:
        raise InputError(f"head_dim is {D}, expected at most 256 with impl 'triton'; impl 'torch' takes any")
    rows = (H // G) if config.span_scope == "kv_head" else H
    in_registers = _pad(rows) * _pad(config.span_top_k) <= MAX_WINNERS_IN_REGISTERS
    step = _decode if T == 1 and (in_registers or not config.max_selected) else _chunk
    cos, sin = cos.contiguous(), sin.contiguous()
    out_THD = torch.empty(T, H, D, dtype=q_THD.dtype, device=q_THD.device)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(q_THD.device) if q_THD.is_cuda else contextlib.nullcontext():
        workspace = step(q_THD, k_cache_GND, v_cache_GND, out_THD, seq_len, cos, sin, config, return_selection, tiles)
    if not return_selection:
        return out_THD, None
    scopes = [s[:n] for s, n in zip(workspace.selection.clone(), workspace.length.tolist(), strict=True)]
    return out_THD, scopes if config.span_scope == "kv_head" else scopes[0]


def _decode(
    q_THD: torch.Tensor,
    k_cache_GND: torch.Tensor,
    v_cache_GND: torch.Tensor,
    out_THD: torch.Tensor,
    seq_len: int | torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    config: ReAttentionConfig,
    return_selection: bool,
    tiles: Tiles | None,
) -> Workspace:
    _, H, D = q_THD.shape
    G = k_cache_GND.shape[0]
    group = H // G
    common = _common(q_THD, k_cache_GND, seq_len, config, return_selection)
    tiles = tiles or decode_tiles(group, common["BLOCK_D"], q_THD.element_size())
    programs = _programs(q_THD.device, tiles)
    ballot_rows = group if common["BY_HEAD"] else H
    winners_pad = _pad(ballot_rows) * common["K_PAD"]
    slices = max(1, min(programs // G, MAX_CANDIDATES // winners_pad))
    ballots = G if common["BY_HEAD"] else 1
    scratch = (programs, tiles.BLOCK_M, common["K_PAD"])
    workspace = _workspace(
        ("decode", tiles, config, q_THD.dtype, H, G, D),
        q_THD.device,
        counters=(torch.int32, (BARRIERS + 1 + G,)),
        block=(torch.float32, (*scratch, tiles.BLOCK_N)),
        best=(torch.int64, scratch),
        candidate=(torch.int64, (H, slices, common["K_PAD"])),
        partial_acc=(torch.float32, (H, slices, D)),
        partial_max=(torch.float32, (H, slices)),
        partial_sum=(torch.float32, (H, slices)),
        selection=(torch.int64, (ballots, config.max_scope)),
        length=(torch.int32, (ballots,)),
    )
    _launch(
        decode_kernel,
        min(programs, G * slices),
        q_THD,
        k_cache_GND,
        v_cache_GND,
        out_THD,
        seq_len,
        cos,
        sin,
        q_THD.stride(1),
        q_THD.stride(2),
        *k_cache_GND.stride(),
        *v_cache_GND.stride(),
        workspace.counters,
        workspace.block,
        workspace.best,
        workspace.candidate,
        workspace.partial_acc,
        workspace.partial_max,
        workspace.partial_sum,
        workspace.selection,
        workspace.length,
        **common,
        SLICES=slices,
        SLICES_PAD=_pad(slices),
        CANDIDATES_PAD=_pad(slices * common["K_PAD"]),
        BALLOT_ROWS=ballot_rows,
        BALLOT_ROWS_PAD=_pad(ballot_rows),
        VOTES=ballot_rows * config.span_top_k > config.max_spans,
        W_PAD=winners_pad,
        RELATIVE=q_THD.dtype != torch.float32,
        BLOCK_M=tiles.BLOCK_M,
        BLOCK_N=tiles.BLOCK_N,
        BLOCK_A=tiles.BLOCK_A,
        PICK_M=max(1, min(_pad(group), MAX_CANDIDATES // (common["K_PAD"] * tiles.BLOCK_N))),
        STAGES=tiles.num_stages,
        num_warps=tiles.num_warps,
    )
    return workspace


def _chunk(
    q_THD: torch.Tensor,
    k_cache_GND: torch.Tensor,
    v_cache_GND: torch.Tensor,
    out_THD: torch.Tensor,
    seq_len: int | torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    config: ReAttentionConfig,
    return_selection: bool,
    tiles: Tiles | None,
) -> Workspace:
    T, H, D = q_THD.shape
    G, N, _ = k_cache_GND.shape
    group = H // G
    common = _common(q_THD, k_cache_GND, seq_len, config, return_selection)
    tiles = tiles or chunk_tiles(common["BLOCK_D"], q_THD.element_size())
    programs = _programs(q_THD.device, tiles)
    # Sizes by the next power of two of T and N, so that prompts of all lengths share few workspaces and kernels.
    rows = _pad(T) * group
    row_blocks = triton.cdiv(rows, tiles.BLOCK_M)
    slices = max(1, min(programs // (G * row_blocks), MAX_CANDIDATES // common["K_PAD"]))
    slices = _pad(slices + 1) // 2
    candidates = slices * common["K_PAD"]
    ballots = G if common["BY_HEAD"] else 1
    winners = rows * (G // ballots) * config.span_top_k
    levels = winners // max(1, config.max_spans)
    spans_pad = _pad(max(1, config.max_spans))
    scratch = (programs, tiles.BLOCK_M, common["K_PAD"])
    workspace = _workspace(
        ("chunk", tiles, config, q_THD.dtype, H, G, D, _pad(T), _pad(N)),
        q_THD.device,
        counters=(torch.int32, (BARRIERS + 1,)),
        block=(torch.float32, (*scratch, tiles.BLOCK_N)),
        best=(torch.int64, scratch),
        candidate=(torch.int64, (G * rows, candidates)),
        counts=(torch.int32, (ballots, _pad(N))),
        num_votes=(torch.int32, (ballots, levels + 1)),
        tally=(torch.int32, (ballots, programs, 2)),
        kept=(torch.int32, (ballots, spans_pad)),
        num_kept=(torch.int32, (ballots,)),
        start=(torch.int32, (programs, spans_pad)),
        offset=(torch.int32, (programs, spans_pad)),
        q_rot=(q_THD.dtype, (G * rows, D)),
        k_rot=(q_THD.dtype, (G, config.max_scope, D)),
        v_sel=(q_THD.dtype, (G, config.max_scope, D)),
        selection=(torch.int64, (ballots, config.max_scope)),
        length=(torch.int32, (ballots,)),
    )
    _launch(
        chunk_kernel,
        programs,
        q_THD,
        k_cache_GND,
        v_cache_GND,
        out_THD,
        seq_len,
        T,
        levels,
        cos,
        sin,
        *q_THD.stride(),
        *k_cache_GND.stride(),
        *v_cache_GND.stride(),
        workspace.counters,
        workspace.block,
        workspace.best,
        workspace.candidate,
        workspace.counts,
        workspace.counts.stride(0),
        workspace.num_votes,
        workspace.num_votes.stride(0),
        workspace.tally,
        workspace.kept,
        workspace.num_kept,
        workspace.start,
        workspace.offset,
        workspace.q_rot,
        workspace.k_rot,
        workspace.v_sel,
        workspace.selection,
        workspace.length,
        **common,
        SLICES=slices,
        CANDIDATES_PAD=candidates,
        COUNT_ROWS=max(1, min(128, MAX_CANDIDATES // candidates)),
        P_PAD=spans_pad,
        PROGRAMS_PAD=_pad(programs),
        BLOCK_M=tiles.BLOCK_M,
        BLOCK_N=tiles.BLOCK_N,
        BLOCK_R=32,
        BLOCK_A=tiles.BLOCK_A,
        BLOCK_C=1024,
        BLOCK_P=min(128, spans_pad),
        PICK_M=max(1, min(tiles.BLOCK_M, MAX_CANDIDATES // (common["K_PAD"] * tiles.BLOCK_N))),
        STAGES=tiles.num_stages,
        num_warps=tiles.num_warps,
    )
    return workspace


def _launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch cooperatively: all programs run at once or none does, so that none can wait for one that never starts."""
    try:
        kernel[(programs,)](*arguments, **constants, launch_cooperative_grid=True)
    except RuntimeError as error:
        if "cooperative" not in str(error):
            raise
        raise InputError(
            f"this GPU cannot run {programs} programs of the fused kernel at once ({error}); use impl 'torch'"
        ) from None


def _common(
    q_THD: torch.Tensor,
    k_cache_GND: torch.Tensor,
    seq_len: int | torch.Tensor,
    config: ReAttentionConfig,
    return_selection: bool,
) -> dict[str, Any]:
    """The constants that both kernels are compiled for."""
    _, H, D = q_THD.shape
    G = k_cache_GND.shape[0]
    return {
        "G": G,
        "GROUP": H // G,
        "D": D,
        "K": max(1, config.span_top_k),
        "K_PAD": _pad(max(1, config.span_top_k)),
        "global_size": config.global_size,
        "local_size": config.local_size,
        "span_size": config.span_size,
        "max_spans": config.max_spans,
        "max_scope": config.max_scope,
        "BY_HEAD": config.span_scope == "kv_head",
        "SELECTS": config.max_selected > 0,
        "SEQ_LEN_IN_MEMORY": isinstance(seq_len, torch.Tensor),
        "RETURN_SELECTION": return_selection,
        "SCALE": D**-0.5,
        "BLOCK_D": max(16, _pad(D)),
        "HALF_PAD": max(16, _pad(D // 2)),
        "PRECISION": "ieee" if q_THD.dtype == torch.float32 else "tf32",
    }


def _pad(size: int) -> int:
    return triton.next_power_of_2(size)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _programs(device: torch.device, tiles: Tiles) -> int:
    return 1 if INTERPRETED else _processors(device) * tiles.programs_per_sm


def _workspace(
    key: tuple[object, ...], device: torch.device, **shapes: tuple[torch.dtype, tuple[int, ...]]
) -> Workspace:
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (*key, device, stream)
    if key not in _workspaces:
        _workspaces[key] = Workspace(device, **shapes)
    return _workspaces[key]
