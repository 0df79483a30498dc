"""ReAttention as one fused Triton kernel: one cooperative launch per layer and step, decode or prefill.

The kernel at the bottom reads like section 3 of the design; every phase is a function of its own above it:

    score   -> per query row, the span_top_k best keys of one slice of the middle
    merge   -> the slices' candidates -> the winners of a row
    vote    -> the max_spans positions that most rows chose
    select  -> where each span starts, in the cache and in the scope
    locate  -> row of the scope -> cache position
    rotate  -> RoPE with positions inside the scope
    attend  -> flash attention over rows of the scope
    combine -> the partial results of a head (split-KV)

Programs are persistent: the grid is what fits on the GPU at once, work is dealt out in units, and programs wait for
each other at counters in global memory. That is safe only because the launch is cooperative: a grid that does not fit
fails to launch instead of waiting for programs that never start.

A decode step (T = 1) has few winners. Most programs are workers, with a slice of one key/value head each; the one or
few that are left over sort the winners of all workers, who attend to the local part meanwhile. A chunk (T > 1) has too
many winners for one program: it counts votes in memory and gathers the scope, rotated once, into scratch. Chunks that
follow one another share a launch, and go through each phase together.

Shapes, beside the project's letters: R rows of one key/value head (row r is query r // (H / G)), K winners per row,
B ballots (of a chunk 1 for span_scope "layer", G for "kv_head"), W winners of one ballot, P spans. Names in capitals
ending in _PAD are the next powers of two, with the surplus masked.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM102, RET505  (an `if` on constants is decided at compile time, and only with an `else` wholly)

from __future__ import annotations

import contextlib
import functools
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl

from minirea.config import ReAttentionConfig
from minirea.errors import InputError
from minirea.kernels.launching import cdiv
from minirea.kernels.launching import next_power_of_2 as _pad

# Scores are compared by their bits, as int32, and with their positions as one int64: the inverted position is below
# the score, so that of equal scores the lower position is the larger number. NO_SCORE is -inf, NO_KEY has no position.
NO_SCORE: tl.constexpr = tl.constexpr(-2139095041)
NO_KEY: tl.constexpr = tl.constexpr(-2139095041 << 32)
TAKEN: tl.constexpr = tl.constexpr(-(1 << 63))
NOWHERE: tl.constexpr = tl.constexpr((1 << 31) - 1)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
# Lines of assembly have another way, or none, in the interpreter, which runs no assembly.
COMPILED: tl.constexpr = tl.constexpr(not triton.knobs.runtime.interpret)

# Arguments that change from model to model or from step to step; without this every other value compiles anew.
SIZES: Final = ("seq_len", "global_size", "local_size", "span_size", "max_spans", "max_scope", "num_positions")

# Counters in global memory that only ever grow: one for barriers, one for ballots whose winners are sorted, and from
# HEADS_DONE on one per key/value head.
SORTED: tl.constexpr = tl.constexpr(1)
HEADS_DONE: tl.constexpr = tl.constexpr(2)


# ---------------------------------------------------------------------------------------------------------- barrier


@triton.jit
def arrive(counter_ptr):
    """Publish what this program has written; returns the count at which every program has.

    Every program adds one per barrier and nobody passes before all have, so that the counts of a barrier end at the
    next multiple of the number of programs, launch after launch. The debug barrier puts the writes of all threads of
    the program before its one release.
    """
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
    return (arrived // tl.num_programs(0) + 1) * tl.num_programs(0)


@triton.jit
def wait(counter_ptr, count):
    """Until the counter has come to count; then what those who added to it have published is visible here."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < count:
        pass
    tl.debug_barrier()


# ---------------------------------------------------------------------------------------------- scores with positions


@triton.jit
def to_order(score):
    """float32 -> the int32 with the same order. -0 + 0 is +0: they must tie."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def pack(order, position):
    """`to_order` of a score, and int32 -> one int64 that orders by score, then by lowest position."""
    return (order.to(tl.int64) << 32) | (0xFFFFFFFF - tl.cast(position, tl.int64))


@triton.jit
def position_of(packed):
    """The int32 position of a packed number; below zero where there is no key."""
    return (0xFFFFFFFF - (packed & 0xFFFFFFFF)).to(tl.int32)


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


@triton.constexpr_function
def masked_stores(count, pairs):
    """Assembly that stores `count` float32 of a thread, each under its own mask; a warp without any skips all of them.

    Operands: count results (zero), addresses, values, masks. With `pairs`, two elements at a time lie side by side.
    """
    address, value, mask = (range(i * count, (i + 1) * count) for i in (1, 2, 3))
    step, kind = (2, "v2.f32") if pairs else (1, "f32")
    lines = ["{ .reg .pred any, wanted; .reg .b32 all; mov.b32 all, 0;"]
    lines += [f"or.b32 all, all, ${mask[i]};" for i in range(0, count, step)]
    lines += ["setp.ne.b32 any, all, 0; vote.sync.any.pred any, any, -1; @!any bra.uni NONE;"]
    for i in range(0, count, step):
        values = f"{{${value[i]}, ${value[i + 1]}}}" if pairs else f"${value[i]}"
        lines += [f"setp.ne.b32 wanted, ${mask[i]}, 0; @wanted st.global.{kind} [${address[i]}], {values};"]
    return " ".join([*lines, "NONE:", *(f"mov.b32 ${i}, 0;" for i in range(count)), "}"])


@triton.constexpr_function
def repeat_operands(constraints, count):
    """Constraints of assembly that works on `count` elements at a time, from those for one."""
    return ",".join(constraint for constraint in constraints.split(",") for _ in range(count))


@triton.jit
def store_in_place(ptrs, values, mask, PAIRS: tl.constexpr):
    """`tl.store` of a matrix whose rows are nearly all masked, each thread what it holds.

    `tl.store` first brings the whole tile into memory order through shared memory, which takes longer than the matrix
    product that made it. PAIRS: each thread holds two neighbours of a row at a time, as the matrix unit leaves them.
    """
    if COMPILED:
        COUNT: tl.constexpr = min(16, max(1, values.numel // tl.extra.cuda.num_threads()))
        tl.inline_asm_elementwise(
            masked_stores(COUNT, PAIRS and COUNT > 1),
            repeat_operands("=r,l,f,r", COUNT),
            [ptrs.to(tl.int64), values, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=COUNT,
        )
    else:
        tl.store(ptrs, values, mask=mask)


@triton.jit
def slice_of(lo, hi, part, parts):
    """Bounds of slice `part` of [lo, hi); the last ones may be short or empty."""
    size = tl.cdiv(hi - lo, parts)
    first = lo + part * size
    return first, tl.minimum(first + size, hi)


@triton.jit
def prefetch(ptr, stride_n, offs_n, D: tl.constexpr):
    """Have rows offs_n of a [N, D] cache brought to the L2 cache while something else is computed."""
    LINE: tl.constexpr = 1024 // ptr.dtype.element_ty.primitive_bitwidth  # elements of 128 bytes
    offs_line = tl.minimum(tl.arange(0, triton.next_power_of_2(triton.cdiv(D, LINE))) * LINE, D - 1)
    ptrs = ptr + offs_n.to(tl.int64)[:, None] * stride_n + offs_line[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ptrs.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def prefetch_rows(ptr, stride_n, lo, hi, D: tl.constexpr, BLOCK_N: tl.constexpr):
    """`prefetch` for rows [lo, hi)."""
    if COMPILED:
        for first in range(lo, hi, BLOCK_N):
            prefetch(ptr, stride_n, tl.minimum(first + tl.arange(0, BLOCK_N), hi - 1), D)


@triton.jit
def prefetch_spans(
    k_ptr, stride_kn, v_ptr, stride_vn, kept_ptr, max_kept, part, mid_lo, mid_hi, span_size,
    D: tl.constexpr, SLICES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`prefetch_rows` for keys and values of slice `part` of the spans, before it is known which rows they fill.

    max_kept is how many positions kept_ptr may hold: how many it does is not waited for, and NOWHERE does no harm.
    """
    if COMPILED:
        rows = tl.cdiv(max_kept * span_size, SLICES)
        for first in range(part * rows, (part + 1) * rows, BLOCK_N):
            row = tl.minimum(first + tl.arange(0, BLOCK_N), max_kept * span_size - 1)
            position = tl.load(kept_ptr + row // span_size) - span_size // 2 + row % span_size
            prefetch(k_ptr, stride_kn, tl.minimum(tl.maximum(position, mid_lo), mid_hi - 1), D)
            prefetch(v_ptr, stride_vn, tl.minimum(tl.maximum(position, mid_lo), mid_hi - 1), D)


@triton.jit
def load_rows(ptr, offs_row, stride_row, mask_row, offs_d, stride_d, D: tl.constexpr):
    """Rows of a [rows, D] matrix, zero where masked. Row offsets are int64: caches exceed 2^31 elements."""
    ptrs = ptr + offs_row.to(tl.int64)[:, None] * stride_row + offs_d[None, :] * stride_d
    return tl.load(ptrs, mask=mask_row[:, None] & (offs_d < D)[None, :], other=0.0)


# ------------------------------------------------------------------------------------------------------------- score


@triton.jit
def score(
    q, k_ptr, stride_kn, stride_kd, lo, hi, block_ptr, tag_ptr,
    D: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keep, for each row of q [M, D], the K key tiles of [lo, hi) with the largest maxima and all scores in them.

    Section 3, step 3. A winner in any other tile would have K better keys before it, so these tiles hold all winners.
    A tile costs one matrix product and one maximum per row; only rows that the tile improves do more: they write
    their scores over those of the tile that drops out. Later tiles must be strictly better, and of equal ones the
    latest drops out, so ties keep the lower.

    Writes block_ptr float32 [M, K_PAD, N] and tag_ptr int32 [M, K_PAD]: tile * K_PAD + slot, below zero in a slot
    without a tile.
    """
    offs_m = tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, K_PAD)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    tag = tl.zeros([BLOCK_M, K_PAD], tl.int32) + (offs_k - K_PAD)[None, :]
    best = tl.zeros([BLOCK_M, K_PAD], tl.float32) + tl.where(offs_k < K, float("-inf"), float("inf"))[None, :]
    threshold = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for tile in tl.range(0, tl.cdiv(hi - lo, BLOCK_N), num_stages=STAGES):
        start = lo + tile * BLOCK_N
        k_tile = k_ptr + tl.cast(start, tl.int64) * stride_kn
        k = load_rows(k_tile, offs_n, stride_kn, offs_n < hi - start, offs_d, stride_kd, D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if start + BLOCK_N > hi:
            scores = tl.where((offs_n < hi - start)[None, :], scores, float("-inf"))
        row_max = tl.max(scores, axis=1)
        better = row_max > threshold
        worst = tl.max(tl.where(best == threshold[:, None], tag, -K_PAD), axis=1)
        slot = worst & (K_PAD - 1)
        row_ptrs = block_ptr + (offs_m * K_PAD + slot) * BLOCK_N
        store_in_place(row_ptrs[:, None] + offs_n[None, :], scores, better[:, None], q.dtype != tl.float32)
        replaced = (tag == worst[:, None]) & better[:, None]
        tag = tl.where(replaced, (tile * K_PAD + slot)[:, None], tag)
        best = tl.where(replaced, row_max[:, None], best)
        threshold = tl.min(best, axis=1)
    tl.store(tag_ptr + offs_m[:, None] * K_PAD + offs_k[None, :], tag)


@triton.jit
def kept_tiles(
    block_ptr, tag_ptr, first, stop,
    K: tl.constexpr, K_PAD: tl.constexpr, BLOCK_N: tl.constexpr, PICK_M: tl.constexpr,
):  # fmt: skip
    """What `score` kept for rows [first, first + PICK_M) below stop: tags int32 [PICK_M, K_PAD, 1], scores float32
    [PICK_M, K_PAD, N].
    """
    offs_m = first + tl.arange(0, PICK_M)
    offs_k = tl.arange(0, K_PAD)
    offs_n = tl.arange(0, BLOCK_N)[None, None, :]
    slot = (offs_m[:, None] * K_PAD + offs_k[None, :])[:, :, None]
    kept = ((offs_m < stop)[:, None] & (offs_k < K)[None, :])[:, :, None]
    tag = tl.load(tag_ptr + slot, mask=kept, other=-1)
    # Slots without a tile are not read: nobody wrote there, so no cache has them.
    return tag, tl.load(block_ptr + slot * BLOCK_N + offs_n, mask=tag >= 0, other=float("-inf"))


@triton.jit
def pick(
    block_ptr, tag_ptr, candidate_ptr, stride_row, num_rows, lo,
    K: tl.constexpr, K_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PICK_M: tl.constexpr,
):  # fmt: skip
    """The K best keys of each row within the tiles that `score` kept. Section 3, step 4, for one slice of the middle.

    Writes candidate_ptr int64, K_PAD packed numbers per row; rows lie stride_row apart.
    """
    tl.debug_barrier()  # other threads of this program wrote what is read here
    # Of three such axes the compiler gives the first to the warps, the second to each thread and the last to the
    # threads of a warp. So warps have rows of their own, and none waits for another in a reduction.
    offs_k = tl.arange(0, K_PAD)
    offs_n = tl.arange(0, BLOCK_N)[None, None, :]
    stop = tl.minimum(num_rows, BLOCK_M)
    tag, scores = kept_tiles(block_ptr, tag_ptr, 0, stop, K, K_PAD, BLOCK_N, PICK_M)
    for first in range(0, stop, PICK_M):
        # The next rows are on their way while these are reduced.
        next_tag, next_scores = kept_tiles(block_ptr, tag_ptr, first + PICK_M, stop, K, K_PAD, BLOCK_N, PICK_M)
        # Hardware has the maximum of a warp's integers as one instruction, of its floats as ten.
        order = to_order(scores)
        position = lo + tag // K_PAD * BLOCK_N + offs_n
        best = tl.full([PICK_M, K_PAD], NO_KEY, tl.int64)
        for i in range(K):
            top = tl.max(tl.max(order, axis=1), axis=1)
            lowest = tl.where(order == top[:, None, None], position, NOWHERE)
            lowest = tl.min(tl.min(lowest, axis=1), axis=1)
            packed = tl.where(top > NO_SCORE, pack(top, lowest), NO_KEY)
            best = tl.where(offs_k[None, :] == i, packed[:, None], best)
            order = tl.where(position == lowest[:, None, None], NO_SCORE, order)
        offs_m = first + tl.arange(0, PICK_M)
        candidate_ptrs = candidate_ptr + offs_m[:, None] * stride_row + offs_k[None, :]
        tl.store(candidate_ptrs, best, mask=(offs_m < num_rows)[:, None])
        tag = next_tag
        scores = next_scores
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
def sort(kept, sorted_ptr, num_kept_ptr, W_PAD: tl.constexpr):
    """Write kept int32 [W_PAD] to sorted_ptr in ascending order, so that NOWHERE comes last, and how many there are.

    The place of each is how many come before it.
    """
    offs_w = tl.arange(0, W_PAD)
    before = (kept[None, :] < kept[:, None]) | ((kept[None, :] == kept[:, None]) & (offs_w[None, :] < offs_w[:, None]))
    tl.store(sorted_ptr + tl.sum(before.to(tl.int32), axis=1), kept)
    tl.store(num_kept_ptr, tl.sum((kept != NOWHERE).to(tl.int32), axis=0))


@triton.jit
def sort_winners(
    candidate_ptr, kept_ptr, num_kept_ptr, first_ballot, ballots, step, max_spans,
    ROWS: tl.constexpr, ROWS_PAD: tl.constexpr, CANDIDATES: tl.constexpr, CANDIDATES_PAD: tl.constexpr,
    K: tl.constexpr, K_PAD: tl.constexpr, VOTES: tl.constexpr, W_PAD: tl.constexpr,
):  # fmt: skip
    """`merge`, `vote` and `sort` for every step-th ballot; VOTES where there may be more winners than are kept."""
    for ballot in range(first_ballot, ballots, step):
        winner = merge(
            candidate_ptr, ballot * ROWS, (ballot + 1) * ROWS, ROWS_PAD, CANDIDATES, CANDIDATES_PAD, K, K_PAD
        )
        kept = tl.reshape(winner, [W_PAD])
        if VOTES:
            kept = vote(kept, max_spans, W_PAD)
        sort(kept, kept_ptr + ballot * W_PAD, num_kept_ptr + ballot, W_PAD)
    tl.debug_barrier()  # before these writes are published


@triton.jit
def select(kept_ptr, num_kept, mid_lo, mid_hi, span_size, P_PAD: tl.constexpr):
    """Layout of the selected part from num_kept ascending positions in kept_ptr int32 [P_PAD]. Section 3, step 6.

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
    """Write the cache positions of the scope's rows [lo, hi), global and selected part. Section 3, step 7.

    start, offset and rows [P] are those of `select`.
    """
    offs_i = tl.arange(0, 16)
    for first in range(lo, tl.minimum(hi, global_size), 16):
        tl.store(selection_ptr + first + offs_i, first + offs_i, mask=first + offs_i < tl.minimum(hi, global_size))
    for first in range(0, span_size, 16):
        i = tl.broadcast_to((first + offs_i)[None, :], [P_PAD, 16])
        row = offset[:, None] + i
        tl.store(selection_ptr + row, start[:, None] + i, mask=(i < rows[:, None]) & (row >= lo) & (row < hi))
    tl.debug_barrier()  # before other threads of this program read it


# ----------------------------------------------------------------------------- vote and select: chunks, through memory


@triton.jit
def count_votes(
    candidate_ptr, counts_ptr, num_votes_ptr, first_row, last_row, levels,
    ROWS: tl.constexpr, CANDIDATES: tl.constexpr, CANDIDATES_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr,
):  # fmt: skip
    """Cast the votes of some rows of one ballot. Section 3, step 5.

    counts_ptr int32 [N] counts by position; num_votes_ptr int32 [levels + 1] counts the positions that have at least
    so many votes. The votes of all programs would add to the same few of these numbers one after the other, so the
    lowest BINS levels are counted here first.
    """
    winner = merge(candidate_ptr, first_row, last_row, ROWS, CANDIDATES, CANDIDATES_PAD, K, K_PAD)
    cast = winner != NOWHERE
    level = tl.atomic_add(counts_ptr + winner, 1, mask=cast, sem="relaxed") + 1
    level = tl.where(cast, level, levels + 1)
    BINS: tl.constexpr = 128
    bins = tl.arange(0, BINS)
    reached = tl.histogram(tl.reshape(level, [ROWS * K_PAD]), BINS, mask=tl.reshape(level < BINS, [ROWS * K_PAD]))
    tl.atomic_add(num_votes_ptr + bins, reached, mask=(reached > 0) & (bins <= levels), sem="relaxed")
    tl.atomic_add(num_votes_ptr + level, 1, mask=(level >= BINS) & (level <= levels), sem="relaxed")


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
    counts_ptr, tally_ptr, kept_ptr, num_kept_ptr, lo, hi, needed, max_spans, member, members,
    PROGRAMS_PAD: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the kept positions of [lo, hi), ascending, to their places in kept_ptr [P]. Section 3, step 5.

    All positions with more than the needed votes are kept, and of those with exactly the needed ones the lowest, as
    many as there is room for. The tallies of the members before this one, of all programs that look at this ballot,
    tell where to go on. Zeroes the counts.
    """
    program = tl.arange(0, PROGRAMS_PAD)
    present = program < members
    before = program < member
    more = tl.load(tally_ptr + 2 * program, mask=present, other=0)
    exactly = tl.load(tally_ptr + 2 * program + 1, mask=present, other=0)
    room = max_spans - tl.sum(more, axis=0)
    exactly_before = tl.sum(tl.where(before, exactly, 0), axis=0)
    if member == 0:
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


# ------------------------------------------------------------------------------------------------------------- attend


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
def add_product(a, b, acc, rescale, PRECISION: tl.constexpr):
    """acc * rescale + a @ b, where acc sums over many tiles.

    In float32 one chain of additions over all rows of the scope would lose several bits. A tile's sum on its own, then
    one addition per tile, does not; as a multiply-add, for a plain one would be folded back into the product.
    """
    if a.dtype == tl.float32:
        return tl.fma(acc, tl.broadcast_to(rescale, acc.shape), tl.dot(a, b, input_precision=PRECISION))
    else:
        return tl.dot(a, b, acc * rescale)


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
    acc = add_product(probability.to(v.dtype), v, acc, rescale[:, None], PRECISION)
    return acc, new_max, row_sum


@triton.jit
def attend(
    acc, row_max, row_sum, q_a, q_b, k_ptr, stride_kn, stride_kd, v_ptr, stride_vn, stride_vd, cos_ptr, sin_ptr,
    cos, sin, row_lo, row_hi, q_row, shift, selection_ptr,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr, HALF_PAD: tl.constexpr,
    GATHER: tl.constexpr, RELATIVE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Flash attention of the rows of q over rows [row_lo, row_hi), which lie in the cache where selection_ptr says if
    GATHER, else at the rows themselves. Section 3, steps 7 and 8.

    row_sum [M, N] keeps the columns of the tiles apart; the caller adds them up, once instead of once per tile.

    Only the distance between query and key matters to RoPE. RELATIVE uses that: keys get positions 0, 1, ... within
    their tile, so that all tiles share one small table, cos and sin [N, HALF_PAD], that stays in registers, and the
    query, at row q_row, gets its distance to the tile's first row. Else positions are rows + shift: in float32 the
    tables' own rounding would show.
    """
    dtype = k_ptr.dtype.element_ty
    offs_h = tl.arange(0, HALF_PAD)
    offs_d = tl.arange(0, BLOCK_D)
    mask_h = offs_h < D // 2
    for first in tl.range(row_lo, row_hi, BLOCK_A, num_stages=STAGES):
        offs_r = first + tl.arange(0, BLOCK_A)
        mask_r = offs_r < row_hi
        source = offs_r
        if GATHER:
            source = tl.load(selection_ptr + offs_r, mask=mask_r, other=0)
        k_a = load_rows(k_ptr, source, stride_kn, mask_r, offs_h, stride_kd, D // 2)
        k_b = load_rows(k_ptr + D // 2 * stride_kd, source, stride_kn, mask_r, offs_h, stride_kd, D // 2)
        v = load_rows(v_ptr, source, stride_vn, mask_r, offs_d, stride_vd, D)
        if RELATIVE:
            q_position = q_row - first
        else:
            q_position = q_row + shift
            cos = load_rows(cos_ptr, offs_r + shift, D // 2, mask_r, offs_h, 1, D // 2)
            sin = load_rows(sin_ptr, offs_r + shift, D // 2, mask_r, offs_h, 1, D // 2)
        q_cos = tl.load(cos_ptr + q_position * (D // 2) + offs_h, mask=mask_h, other=0.0)[None, :]
        q_sin = tl.load(sin_ptr + q_position * (D // 2) + offs_h, mask=mask_h, other=0.0)[None, :]
        k = rotate(k_a, k_b, cos, sin, dtype)
        q = rotate(q_a, q_b, q_cos, q_sin, dtype)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        logits = tl.where(mask_r[None, :], logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, axis=1) * (SCALE * LOG2_E))
        rescale = tl.exp2(row_max - new_max)[:, None]
        probability = tl.exp2(tl.fma(logits, SCALE * LOG2_E, -new_max[:, None]))
        row_sum = row_sum * rescale + probability
        acc = add_product(probability.to(dtype), v, acc, rescale, PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def store_partial(
    partial_acc_ptr, partial_max_ptr, partial_sum_ptr, acc, row_max, row_sum, partial, mask_m, offs_d, D: tl.constexpr
):  # fmt: skip
    """Keep what `attend` has of one slice for `combine`: rows `partial` [M] of the three tables."""
    tl.store(partial_max_ptr + partial, row_max, mask=mask_m)
    tl.store(partial_sum_ptr + partial, tl.sum(row_sum, axis=1), mask=mask_m)
    mask_md = mask_m[:, None] & (offs_d < D)[None, :]
    tl.store(partial_acc_ptr + partial[:, None] * D + offs_d[None, :], acc, mask=mask_md)


@triton.jit
def combine(
    partial_acc_ptr, partial_max_ptr, partial_sum_ptr, out_ptr, g,
    GROUP: tl.constexpr, HEADS: tl.constexpr, SLICES: tl.constexpr, SLICES_PAD: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Join the slices' partial attention of one key/value head's query heads: weights by maximum, then one division.

    HEADS query heads at a time, since what a head costs is mostly the wait for its loads; at least as many as there are
    warps where registers allow, so that each warp has a head of its own (see `pick`).
    """
    offs_s = tl.arange(0, SLICES_PAD)
    offs_d = tl.arange(0, BLOCK_D)
    mask_s = (offs_s < SLICES)[None, :]
    mask_d = offs_d < D
    for first in range(0, GROUP, HEADS):
        heads = g * GROUP + tl.minimum(first + tl.arange(0, HEADS), GROUP - 1)  # surplus ones repeat the last
        partial = heads[:, None] * SLICES + offs_s[None, :]
        row_max = tl.load(partial_max_ptr + partial, mask=mask_s, other=float("-inf"))
        row_sum = tl.load(partial_sum_ptr + partial, mask=mask_s, other=0.0)
        acc = tl.load(
            partial_acc_ptr + partial[:, :, None] * D + offs_d[None, None, :],
            mask=mask_s[:, :, None] & mask_d[None, None, :],
            other=0.0,
        )
        weight = tl.exp2(row_max - tl.max(row_max, axis=1)[:, None])
        out = tl.sum(acc * weight[:, :, None], axis=1) / tl.sum(row_sum * weight, axis=1)[:, None]
        out_ptrs = out_ptr + heads[:, None] * D + offs_d[None, :]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_d[None, :])


@triton.jit
def rows_before_local(front_ptr, ballot, dense, global_size, SELECTS: tl.constexpr):
    """Rows of a ballot's scope before its local part."""
    front = tl.where(dense, 0, global_size)
    if SELECTS:
        if not dense:
            front = tl.load(front_ptr + ballot)
    return front


@triton.jit
def gather(
    k_ptr, stride_kn, stride_kd, v_ptr, stride_vn, stride_vd, cos_ptr, sin_ptr, k_rot_ptr, v_copy_ptr,
    source, position, offs_r, mask_r,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HALF_PAD: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Copy keys from rows `source` of the cache, rotated to `position`, to rows offs_r of k_rot [S, D], and with VALUES
    values to v_copy [S, D]. Section 3, step 7.
    """
    dtype = k_rot_ptr.dtype.element_ty
    offs_h = tl.arange(0, HALF_PAD)
    offs_d = tl.arange(0, BLOCK_D)
    k_a = load_rows(k_ptr, source, stride_kn, mask_r, offs_h, stride_kd, D // 2)
    k_b = load_rows(k_ptr + D // 2 * stride_kd, source, stride_kn, mask_r, offs_h, stride_kd, D // 2)
    if VALUES:
        v = load_rows(v_ptr, source, stride_vn, mask_r, offs_d, stride_vd, D)
    cos = load_rows(cos_ptr, position, D // 2, mask_r, offs_h, 1, D // 2)
    sin = load_rows(sin_ptr, position, D // 2, mask_r, offs_h, 1, D // 2)
    k_a, k_b = rotate_halves(k_a, k_b, cos, sin)
    mask_rh = mask_r[:, None] & (offs_h < D // 2)[None, :]
    rows = offs_r.to(tl.int64)[:, None] * D
    k_ptrs = k_rot_ptr + rows + offs_h[None, :]
    tl.store(k_ptrs, k_a.to(dtype), mask=mask_rh)
    tl.store(k_ptrs + D // 2, k_b.to(dtype), mask=mask_rh)
    if VALUES:
        tl.store(v_copy_ptr + rows + offs_d[None, :], v, mask=mask_r[:, None] & (offs_d < D)[None, :])


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
    q_a, q_b = rotate_halves(q_a, q_b, cos, sin)
    q_rot_ptrs = q_rot_ptr + row.to(tl.int64)[:, None] * D + offs_h[None, :]
    tl.store(q_rot_ptrs, q_a.to(dtype), mask=mask_rh)
    tl.store(q_rot_ptrs + D // 2, q_b.to(dtype), mask=mask_rh)


@triton.jit
def attend_tiles(
    acc, row_max, row_sum, q, k_ptr, v_front_ptr, v_ptr, stride_vn, stride_vd, front, local, num_copied,
    lo, hi, last_key,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Flash attention of q [M, D] over rows [lo, hi) of the scope; CAUSAL hides keys after last_key [M].

    Row r below num_copied is row front + r of k_ptr and v_front_ptr, a later one row local + r of k_ptr and v_ptr.
    num_copied and lo are multiples of BLOCK_A.
    """
    offs_d = tl.arange(0, BLOCK_D)
    for first in tl.range(lo, hi, BLOCK_A, num_stages=STAGES):
        offs_r = first + tl.arange(0, BLOCK_A)
        mask_r = offs_r < hi
        copied = first < num_copied
        row = first + tl.where(copied, front, local) + tl.arange(0, BLOCK_A)
        k = load_rows(k_ptr, row, D, mask_r, offs_d, 1, D)
        v = load_rows(tl.where(copied, v_front_ptr, v_ptr), row, tl.where(copied, D, stride_vn), mask_r,
                      offs_d, tl.where(copied, 1, stride_vd), D)  # fmt: skip
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if CAUSAL:
            logits = tl.where(offs_r[None, :] <= last_key[:, None], logits, float("-inf"))
        acc, row_max, row_sum = softmax_step(logits, v, acc, row_max, row_sum, SCALE, PRECISION)
    return acc, row_max, row_sum


# ------------------------------------------------------------------------------------------- the two forms of the step


@triton.jit
def score_unit(
    q_ptr, stride_qt, stride_qh, stride_qd, k_ptr, stride_kn, stride_kd, block_ptr, tag_ptr,
    g, first_row, num_rows, lo, hi,
    D: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Score rows [first_row, first_row + BLOCK_M) of head g's num_rows against keys [lo, hi)."""
    prefetch_rows(k_ptr, stride_kn, lo, tl.minimum(lo + BLOCK_N, hi), D, BLOCK_N)  # while the queries are loaded
    rows = first_row + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    q_ptrs = q_ptr + (rows // GROUP).to(tl.int64)[:, None] * stride_qt + (g * GROUP + rows % GROUP)[:, None] * stride_qh
    q = tl.load(
        q_ptrs + offs_d[None, :] * stride_qd, mask=(rows < num_rows)[:, None] & (offs_d < D)[None, :], other=0.0
    )
    score(q, k_ptr, stride_kn, stride_kd, lo, hi, block_ptr, tag_ptr,
          D, K, K_PAD, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, PRECISION)  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, "workers"])
def decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, seq_len, workers, cos_ptr, sin_ptr, stride_qh, stride_qd,
    stride_kg, stride_kn, stride_kd, stride_vg, stride_vn, stride_vd, counters_ptr, block_ptr, tag_ptr,
    candidate_ptr, kept_ptr, num_kept_ptr, partial_acc_ptr, partial_max_ptr, partial_sum_ptr, selection_ptr, front_ptr,
    global_size, local_size, span_size, max_spans, max_scope, num_positions,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr,
    BY_HEAD: tl.constexpr, SELECTS: tl.constexpr, SEQ_LEN_IN_MEMORY: tl.constexpr,
    SLICES: tl.constexpr, SLICES_PAD: tl.constexpr, CANDIDATES_PAD: tl.constexpr, BALLOT_ROWS: tl.constexpr,
    BALLOT_ROWS_PAD: tl.constexpr, VOTES: tl.constexpr, W_PAD: tl.constexpr, SCALE: tl.constexpr,
    RELATIVE: tl.constexpr, ALONE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr, HALF_PAD: tl.constexpr,
    PICK_M: tl.constexpr, COMBINE_HEADS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of one query per head: q [1, H, D] against k and v [G, N, D], to out [1, H, D].

    A worker's unit of work is one slice of one key/value head: first of the middle to score, then of the local part to
    attend to, then of the global and selected parts. Attending to the local part needs no selection, so it fills the
    time until the last worker has scored and the selecting program has sorted the winners.
    """
    n = tl.load(seq_len).to(tl.int32) if SEQ_LEN_IN_MEMORY else seq_len
    dense = n <= global_size + local_size
    local_lo = tl.where(dense, 0, n - local_size)
    mid_lo = global_size
    mid_hi = n - local_size
    program = tl.program_id(0)
    units = G * SLICES
    ballots: tl.constexpr = G if BY_HEAD else 1
    # The programs after the workers select; a program that is alone does both.
    selectors = 1 if ALONE else tl.num_programs(0) - workers
    # This scratch is the program's own and stays in its cache.
    block_ptr += program * (BLOCK_M * K_PAD * BLOCK_N)
    tag_ptr += program * (BLOCK_M * K_PAD)
    offs_m = tl.arange(0, BLOCK_M)
    offs_h = tl.arange(0, HALF_PAD)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < GROUP
    offs_tile = tl.arange(0, BLOCK_A)
    cos = load_rows(cos_ptr, offs_tile, D // 2, offs_tile < num_positions, offs_h, 1, D // 2)
    sin = load_rows(sin_ptr, offs_tile, D // 2, offs_tile < num_positions, offs_h, 1, D // 2)
    everyone = tl.cast(0, tl.int64)

    if SELECTS:
        if not dense:
            if program < workers:
                for unit in range(program, units, workers):
                    g = unit % G
                    part = unit // G
                    k_head = k_ptr + tl.cast(g, tl.int64) * stride_kg
                    lo, hi = slice_of(mid_lo, mid_hi, part, SLICES)
                    score_unit(q_ptr, 0, stride_qh, stride_qd, k_head, stride_kn, stride_kd, block_ptr, tag_ptr,
                               g, 0, GROUP, lo, hi,
                               D, GROUP, K, K_PAD, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, PRECISION)  # fmt: skip
                    # The memory would be idle from here until this program attends to its local slice.
                    local_first, local_last = slice_of(local_lo, n, part, SLICES)
                    prefetch_rows(k_head, stride_kn, local_first, local_last, D, BLOCK_N)
                    v_head = v_ptr + tl.cast(g, tl.int64) * stride_vg
                    prefetch_rows(v_head, stride_vn, local_first, local_last, D, BLOCK_N)
                    pick(block_ptr, tag_ptr, candidate_ptr + (g * GROUP * SLICES + part) * K_PAD, SLICES * K_PAD, GROUP,
                         lo, K, K_PAD, BLOCK_M, BLOCK_N, PICK_M)  # fmt: skip
            everyone = arrive(counters_ptr)
            if ALONE:
                sort_winners(candidate_ptr, kept_ptr, num_kept_ptr, 0, ballots, 1, max_spans, BALLOT_ROWS,
                             BALLOT_ROWS_PAD, SLICES * K_PAD, CANDIDATES_PAD, K, K_PAD, VOTES, W_PAD)  # fmt: skip
                tl.atomic_add(counters_ptr + SORTED, 1, sem="release", scope="gpu")

    if program < workers:
        for unit in range(program, units, workers):
            g = unit % G
            part = unit // G
            heads = g * GROUP + offs_m
            k_head = k_ptr + tl.cast(g, tl.int64) * stride_kg
            v_head = v_ptr + tl.cast(g, tl.int64) * stride_vg
            selection_head = selection_ptr + (g * max_scope if BY_HEAD else 0)
            q_a = load_rows(q_ptr, heads, stride_qh, mask_m, offs_h, stride_qd, D // 2)
            q_b = load_rows(q_ptr + D // 2 * stride_qd, heads, stride_qh, mask_m, offs_h, stride_qd, D // 2)
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            row_max = tl.full([BLOCK_M], -1.0e38, tl.float32)
            row_sum = tl.zeros([BLOCK_M, BLOCK_A], tl.float32)

            lo, hi = slice_of(local_lo, n, part, SLICES)
            if RELATIVE:
                acc, row_max, row_sum = attend(
                    acc, row_max, row_sum, q_a, q_b, k_head, stride_kn, stride_kd, v_head, stride_vn, stride_vd,
                    cos_ptr, sin_ptr, cos, sin, lo, hi, n - 1, 0, selection_head,
                    SCALE, D, BLOCK_A, BLOCK_D, HALF_PAD, False, True, STAGES, PRECISION)  # fmt: skip
            front = tl.where(dense, 0, global_size)  # rows of the scope before its local part
            if SELECTS:
                if not dense:
                    wait(counters_ptr + SORTED, everyone // tl.num_programs(0) * selectors)
                    ballot = g if BY_HEAD else 0
                    num_kept = tl.load(num_kept_ptr + ballot)
                    prefetch_spans(k_head, stride_kn, v_head, stride_vn, kept_ptr + ballot * W_PAD,
                                   tl.minimum(max_spans, BALLOT_ROWS * K), part,
                                   mid_lo, mid_hi, span_size, D, SLICES, BLOCK_N)  # fmt: skip
                    start, offset, rows = select(kept_ptr + ballot * W_PAD, num_kept, mid_lo, mid_hi, span_size, W_PAD)
                    front += tl.sum(rows, axis=0)
                    first, last = slice_of(0, front, part, SLICES)
                    locate(selection_head, start, offset, rows, first, last, global_size, span_size, W_PAD)
                    if part == 0:
                        tl.store(front_ptr + ballot, front)
            length = front + n - local_lo
            if not RELATIVE:
                acc, row_max, row_sum = attend(
                    acc, row_max, row_sum, q_a, q_b, k_head, stride_kn, stride_kd, v_head, stride_vn, stride_vd,
                    cos_ptr, sin_ptr, cos, sin, lo, hi, n - 1, length - n, selection_head,
                    SCALE, D, BLOCK_A, BLOCK_D, HALF_PAD, False, False, STAGES, PRECISION)  # fmt: skip
            lo, hi = slice_of(0, front, part, SLICES)
            acc, row_max, row_sum = attend(
                acc, row_max, row_sum, q_a, q_b, k_head, stride_kn, stride_kd, v_head, stride_vn, stride_vd,
                cos_ptr, sin_ptr, cos, sin, lo, hi, length - 1, 0, selection_head,
                SCALE, D, BLOCK_A, BLOCK_D, HALF_PAD, SELECTS, RELATIVE, STAGES, PRECISION)  # fmt: skip
            store_partial(partial_acc_ptr, partial_max_ptr, partial_sum_ptr, acc, row_max, row_sum,
                          heads * SLICES + part, mask_m, offs_d, D)  # fmt: skip
            tl.debug_barrier()
            done = tl.atomic_add(counters_ptr + HEADS_DONE + g, 1, sem="acq_rel", scope="gpu")
            if done % SLICES == SLICES - 1:  # the last of this launch
                combine(partial_acc_ptr, partial_max_ptr, partial_sum_ptr, out_ptr, g,
                        GROUP, COMBINE_HEADS, SLICES, SLICES_PAD, D, BLOCK_D)  # fmt: skip

    # Last, since of a kernel's code only the first 64 KiB are fetched ahead, and the workers need those. The first turn
    # sorts what the launch before has left: it brings the code into the cache while the workers still score.
    if SELECTS and not ALONE:
        if not dense and program >= workers:
            for turn in range(2):
                if turn == 1:
                    wait(counters_ptr, everyone)
                sort_winners(candidate_ptr, kept_ptr, num_kept_ptr, program - workers, ballots, selectors, max_spans,
                             BALLOT_ROWS, BALLOT_ROWS_PAD, SLICES * K_PAD, CANDIDATES_PAD, K, K_PAD, VOTES,
                             W_PAD)  # fmt: skip
            tl.atomic_add(counters_ptr + SORTED, 1, sem="release", scope="gpu")


@triton.jit
def chunk_at(index, chunks, chunk_size, T, n):
    """A chunk's first query, how many it has, and the tokens that are cached with its last one; n are with the last."""
    first = index * chunk_size
    # In a form that lets ptxas see that all threads share these: loops between such bounds are faster.
    last = index + 1 == chunks
    return first, tl.where(last, T - first, chunk_size), tl.where(last, n, n - T + first + chunk_size)


@triton.jit(do_not_specialize=[*SIZES, "T", "chunks", "chunk_size", "levels", "local_rows", "front_rows"])
def chunk_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, seq_len, T, chunks, chunk_size, levels, cos_ptr, sin_ptr,
    stride_qt, stride_qh, stride_qd, stride_kg, stride_kn, stride_kd, stride_vg, stride_vn, stride_vd,
    counters_ptr, block_ptr, tag_ptr, candidate_ptr, counts_ptr, stride_counts, num_votes_ptr, stride_votes,
    tally_ptr, kept_ptr, num_kept_ptr,
    q_rot_ptr, k_rot_ptr, local_rows, v_front_ptr, front_rows, selection_ptr, front_ptr,
    global_size, local_size, span_size, max_spans, max_scope,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr,
    BY_HEAD: tl.constexpr, SELECTS: tl.constexpr, SEQ_LEN_IN_MEMORY: tl.constexpr,
    SLICES: tl.constexpr, CANDIDATES_PAD: tl.constexpr, COUNT_ROWS: tl.constexpr, P_PAD: tl.constexpr,
    PROGRAMS_PAD: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr,
    HALF_PAD: tl.constexpr, BLOCK_C: tl.constexpr, PICK_M: tl.constexpr, RELATIVE: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """T queries in chunks, each with a scope of its own: q [T, H, D] against k and v [G, N, D], to out [T, H, D].

    No chunk needs another, so that they go through every phase together, and wait for each other's programs only as
    often as one would. A chunk has one ballot, or one for each key/value head.
    """
    n = tl.load(seq_len).to(tl.int32) if SEQ_LEN_IN_MEMORY else seq_len
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    # Scratch of `score` is the program's own, so that it stays in its cache.
    block_ptr += tl.cast(program, tl.int64) * (BLOCK_M * K_PAD * BLOCK_N)
    tag_ptr += program * (BLOCK_M * K_PAD)
    mid_lo = global_size
    longest_dense = global_size + local_size
    chunk_rows = chunk_size * GROUP  # of one key/value head in a chunk; row r is query r // GROUP
    CHUNK_BALLOTS: tl.constexpr = G if BY_HEAD else 1
    heads_per_ballot: tl.constexpr = 1 if BY_HEAD else G
    ballots = chunks * CHUNK_BALLOTS
    offs_d = tl.arange(0, BLOCK_D)

    if SELECTS:
        if n > longest_dense:  # of the last chunk; those before it may be dense all the same
            turn = program
            for chunk in range(chunks):
                first_query, num_queries, chunk_n = chunk_at(chunk, chunks, chunk_size, T, n)
                if chunk_n > longest_dense:
                    q_chunk = q_ptr + tl.cast(first_query, tl.int64) * stride_qt
                    num_rows = num_queries * GROUP
                    units = tl.cdiv(num_rows, BLOCK_M) * G * SLICES
                    for unit in range(turn, units, programs):
                        turn = unit + programs
                        part = unit % SLICES
                        g = unit // SLICES % G
                        first_row = unit // SLICES // G * BLOCK_M
                        k_head = k_ptr + tl.cast(g, tl.int64) * stride_kg
                        lo, hi = slice_of(mid_lo, chunk_n - local_size, part, SLICES)
                        score_unit(q_chunk, stride_qt, stride_qh, stride_qd, k_head, stride_kn, stride_kd, block_ptr,
                                   tag_ptr, g, first_row, num_rows, lo, hi,
                                   D, GROUP, K, K_PAD, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, PRECISION)  # fmt: skip
                        row = tl.cast((chunk * G + g) * chunk_rows + first_row, tl.int64)
                        pick(block_ptr, tag_ptr, candidate_ptr + (row * SLICES + part) * K_PAD, SLICES * K_PAD,
                             num_rows - first_row, lo, K, K_PAD, BLOCK_M, BLOCK_N, PICK_M)  # fmt: skip
                    turn -= units
            wait(counters_ptr, arrive(counters_ptr))

            turn = program
            for chunk in range(chunks):
                _, num_queries, chunk_n = chunk_at(chunk, chunks, chunk_size, T, n)
                if chunk_n > longest_dense:
                    units = tl.cdiv(num_queries * GROUP, COUNT_ROWS) * G
                    for unit in range(turn, units, programs):
                        turn = unit + programs
                        g = unit % G
                        ballot = chunk * CHUNK_BALLOTS + (g if BY_HEAD else 0)
                        row = (chunk * G + g) * chunk_rows
                        first_row = row + unit // G * COUNT_ROWS
                        last_row = tl.minimum(first_row + COUNT_ROWS, row + num_queries * GROUP)
                        count_votes(candidate_ptr, counts_ptr + ballot * stride_counts,
                                    num_votes_ptr + ballot * stride_votes, first_row, last_row, levels,
                                    COUNT_ROWS, SLICES * K_PAD, CANDIDATES_PAD, K, K_PAD)  # fmt: skip
                    turn -= units
            wait(counters_ptr, arrive(counters_ptr))

            # Every ballot has a team of programs, or every program some ballots.
            teams = tl.minimum(ballots, programs)
            team = program % teams
            member = program // teams
            members = tl.cdiv(programs - team, teams)
            for ballot in range(team, ballots, teams):
                _, _, chunk_n = chunk_at(ballot // CHUNK_BALLOTS, chunks, chunk_size, T, n)
                mid_hi = chunk_n - local_size
                lo, hi = slice_of(mid_lo, mid_hi, member, members)
                needed = votes_needed(num_votes_ptr + ballot * stride_votes, levels, max_spans, BLOCK_C)
                tally(counts_ptr + ballot * stride_counts, tally_ptr + 2 * (ballot * programs + member), lo, hi,
                      needed, BLOCK_C)  # fmt: skip
            wait(counters_ptr, arrive(counters_ptr))

            for ballot in range(team, ballots, teams):
                _, _, chunk_n = chunk_at(ballot // CHUNK_BALLOTS, chunks, chunk_size, T, n)
                mid_hi = chunk_n - local_size
                lo, hi = slice_of(mid_lo, mid_hi, member, members)
                needed = votes_needed(num_votes_ptr + ballot * stride_votes, levels, max_spans, BLOCK_C)
                elect(counts_ptr + ballot * stride_counts, tally_ptr + 2 * ballot * programs, kept_ptr + ballot * P_PAD,
                      num_kept_ptr + ballot, lo, hi, needed, max_spans, member, members,
                      PROGRAMS_PAD, BLOCK_C)  # fmt: skip
            wait(counters_ptr, arrive(counters_ptr))

            for ballot in range(team, ballots, teams):
                _, _, chunk_n = chunk_at(ballot // CHUNK_BALLOTS, chunks, chunk_size, T, n)
                mid_hi = chunk_n - local_size
                start, offset, rows = select(kept_ptr + ballot * P_PAD, tl.load(num_kept_ptr + ballot), mid_lo, mid_hi,
                                             span_size, P_PAD)  # fmt: skip
                front = global_size + tl.sum(rows, axis=0)
                first, last = slice_of(0, front, member, members)
                locate(selection_ptr + ballot * max_scope, start, offset, rows, first, last, global_size, span_size,
                       P_PAD)  # fmt: skip
                if member == 0:
                    tl.store(front_ptr + ballot, front)
                    for first in range(0, levels + 1, BLOCK_C):
                        level = first + tl.arange(0, BLOCK_C)
                        tl.store(num_votes_ptr + ballot * stride_votes + level, 0, mask=level <= levels)
            wait(counters_ptr, arrive(counters_ptr))

    # Local parts overlap: together they are the cache from local_lo on. RELATIVE moves scopes, so that a key there has
    # one position for all chunks and is rotated once. Else there is one chunk, whose scope begins at position 0.
    _, _, first_n = chunk_at(0, chunks, chunk_size, T, n)
    local_lo = tl.where(first_n <= longest_dense, 0, first_n - local_size)
    local_position = tl.minimum(local_lo, max_scope - local_size)
    turn = program
    units = tl.cdiv(n - local_lo, BLOCK_R) * G
    for unit in range(turn, units, programs):
        turn = unit + programs
        g = unit % G
        offs_r = unit // G * BLOCK_R + tl.arange(0, BLOCK_R)
        if not RELATIVE:
            local_position = rows_before_local(front_ptr, g if BY_HEAD else 0, n <= longest_dense, global_size, SELECTS)
        gather(k_ptr + tl.cast(g, tl.int64) * stride_kg, stride_kn, stride_kd, v_ptr, stride_vn, stride_vd,
               cos_ptr, sin_ptr, k_rot_ptr + tl.cast(g, tl.int64) * local_rows * D, v_front_ptr,
               local_lo + offs_r, local_position + offs_r, offs_r, offs_r < n - local_lo, D, BLOCK_D,
               HALF_PAD, False)  # fmt: skip
    turn -= units
    for ballot in range(ballots):
        chunk = ballot // CHUNK_BALLOTS
        _, _, chunk_n = chunk_at(chunk, chunks, chunk_size, T, n)
        dense = chunk_n <= longest_dense
        front = rows_before_local(front_ptr, ballot, dense, global_size, SELECTS)
        chunk_lo = tl.where(dense, 0, chunk_n - local_size)
        # Whole tiles, the last of which may reach into the local part.
        num_copied = tl.minimum(tl.cdiv(front, BLOCK_A) * BLOCK_A, front + chunk_n - chunk_lo)
        position = local_position + chunk_lo - local_lo - front if RELATIVE else 0
        units = tl.cdiv(num_copied, BLOCK_R) * heads_per_ballot
        for unit in range(turn, units, programs):
            turn = unit + programs
            g = ballot % G if BY_HEAD else unit % G
            offs_r = unit // heads_per_ballot * BLOCK_R + tl.arange(0, BLOCK_R)
            mask_r = offs_r < num_copied
            source = tl.where(offs_r < front, offs_r, chunk_lo + offs_r - front)
            if SELECTS:
                source = tl.load(selection_ptr + ballot * max_scope + offs_r, mask=offs_r < front, other=source)
            head = tl.cast(chunk * G + g, tl.int64) * front_rows
            gather(k_ptr + tl.cast(g, tl.int64) * stride_kg, stride_kn, stride_kd,
                   v_ptr + tl.cast(g, tl.int64) * stride_vg, stride_vn, stride_vd, cos_ptr, sin_ptr,
                   k_rot_ptr + (G * local_rows + head) * D, v_front_ptr + head * D,
                   source, position + offs_r, offs_r, mask_r, D, BLOCK_D, HALF_PAD, True)  # fmt: skip
        turn -= units
    everyone = arrive(counters_ptr)

    # This program's own queries, while others still gather. Through scratch: from registers the product would take them
    # anew for every tile.
    turn = program
    for chunk in range(chunks):
        first_query, num_queries, chunk_n = chunk_at(chunk, chunks, chunk_size, T, n)
        units = tl.cdiv(num_queries * GROUP, BLOCK_M) * G
        for unit in range(turn, units, programs):
            turn = unit + programs
            g = unit % G
            rows = unit // G * BLOCK_M + tl.arange(0, BLOCK_M)
            t = rows // GROUP
            if not RELATIVE:
                ballot = g if BY_HEAD else 0
                local_position = rows_before_local(front_ptr, ballot, n <= longest_dense, global_size, SELECTS)
            rotate_queries(q_ptr, stride_qt, stride_qh, stride_qd, cos_ptr, sin_ptr, q_rot_ptr,
                           first_query + t, g * GROUP + rows % GROUP,
                           local_position + chunk_n - local_lo - num_queries + t,
                           (chunk * G + g) * chunk_rows + rows, t < num_queries, D, HALF_PAD)  # fmt: skip
        turn -= units
    wait(counters_ptr, everyone)

    turn = program
    for chunk in range(chunks):
        first_query, num_queries, chunk_n = chunk_at(chunk, chunks, chunk_size, T, n)
        dense = chunk_n <= longest_dense
        chunk_lo = tl.where(dense, 0, chunk_n - local_size)
        units = tl.cdiv(num_queries * GROUP, BLOCK_M) * G
        for unit in range(turn, units, programs):
            turn = unit + programs
            g = unit % G
            first_row = unit // G * BLOCK_M
            rows = first_row + tl.arange(0, BLOCK_M)
            t = rows // GROUP
            mask_m = t < num_queries
            ballot = chunk * CHUNK_BALLOTS + (g if BY_HEAD else 0)
            front = rows_before_local(front_ptr, ballot, dense, global_size, SELECTS)
            length = front + chunk_n - chunk_lo
            last_key = length - num_queries + t
            q = load_rows(q_rot_ptr, (chunk * G + g) * chunk_rows + rows, D, mask_m, offs_d, 1, D)
            # Row r of the scope is row front_row + r of k_rot if it was copied, else local_row + r. Its value has the
            # same number, in v_front or in the cache, where those of the local part lie as they are wanted.
            front_row = G * local_rows + (chunk * G + g) * front_rows
            local_row = g * local_rows + chunk_lo - local_lo - front
            v_front = v_front_ptr - tl.cast(G * local_rows, tl.int64) * D
            v_head = v_ptr + tl.cast(g, tl.int64) * stride_vg + tl.cast(local_lo - g * local_rows, tl.int64) * stride_vn
            num_copied = tl.cdiv(front, BLOCK_A) * BLOCK_A
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            row_max = tl.full([BLOCK_M], -1.0e38, tl.float32)
            row_sum = tl.zeros([BLOCK_M], tl.float32)
            # Keys that every row sees need no mask; the block's own queries are at most a tile or two more.
            seen_by_all = (length - num_queries + first_row // GROUP + 1) // BLOCK_A * BLOCK_A
            seen_by_any = tl.minimum(length, length - num_queries + (first_row + BLOCK_M - 1) // GROUP + 1)
            acc, row_max, row_sum = attend_tiles(acc, row_max, row_sum, q, k_rot_ptr, v_front, v_head, stride_vn,
                                                 stride_vd, front_row, local_row, num_copied, 0, seen_by_all, last_key,
                                                 SCALE, D, BLOCK_A, BLOCK_D, False, STAGES, PRECISION)  # fmt: skip
            acc, row_max, row_sum = attend_tiles(acc, row_max, row_sum, q, k_rot_ptr, v_front, v_head, stride_vn,
                                                 stride_vd, front_row, local_row, num_copied, seen_by_all, seen_by_any,
                                                 last_key,
                                                 SCALE, D, BLOCK_A, BLOCK_D, True, STAGES, PRECISION)  # fmt: skip
            out_rows = (first_query + t) * (G * GROUP) + g * GROUP + rows % GROUP
            out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + out_rows.to(tl.int64)[:, None] * D + offs_d[None, :], out,
                     mask=mask_m[:, None] & (offs_d < D)[None, :])  # fmt: skip
        turn -= units


# ------------------------------------------------------------------------------------------------------------ launcher

# Under TRITON_INTERPRET=1 programs run one after another, so there may be only one: a second could never arrive.
INTERPRETED: Final = not isinstance(decode_kernel, triton.JITFunction)
# Which of two kernels that share functions Triton 3.6 hashes first decides under which names it keeps them on the disk.
# Threads that compile would leave that to chance, and compile again in the next process.
if not INTERPRETED:
    hash(decode_kernel)
    hash(chunk_kernel)
# The most winners of a ballot that a decode step may hold in registers, where every one is compared with every other:
# with twice as many a comparison takes 256 registers of every thread, and Triton 3.6 spills them all.
MAX_WINNERS_IN_REGISTERS: Final = 128
# Chunks of a launch, with which its scratch grows.
MAX_CHUNKS: Final = 8
# Packed candidates that one program holds in registers at a time.
MAX_CANDIDATES: Final = 8192
# Elements of partial results that one program holds in registers at a time.
MAX_PARTIALS: Final = 16384


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
    chunk_size: int | None = None,
    tiles: Tiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor | list[torch.Tensor] | None]:
    """Arguments and results are those of `minirea.kernels.reattention`. A token or a chunk is one launch, and in half
    precision up to MAX_CHUNKS chunks are.

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
    decodes = T == 1 and (in_registers or not config.max_selected)
    cos, sin = cos.contiguous(), sin.contiguous()
    out_THD = torch.empty(T, H, D, dtype=q_THD.dtype, device=q_THD.device)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(q_THD.device) if q_THD.is_cuda else contextlib.nullcontext():
        if decodes:
            workspace = _decode(q_THD, k_cache_GND, v_cache_GND, out_THD, seq_len, cos, sin, config, tiles)
        else:
            # In float32 the tables' rounding would show if chunks shared positions: there each is a launch.
            chunk_size = chunk_size or T
            together = chunk_size * (MAX_CHUNKS if q_THD.dtype != torch.float32 else 1)
            for start in range(0, T, together):
                stop = min(start + together, T)
                workspace = _chunk(
                    q_THD[start:stop],
                    k_cache_GND,
                    v_cache_GND,
                    out_THD[start:stop],
                    seq_len - (T - stop) if stop < T else seq_len,
                    cos,
                    sin,
                    config,
                    tiles,
                    chunk_size,
                )
    if not return_selection:
        return out_THD, None
    scopes = _scopes(workspace, int(seq_len), config)
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
    tiles: Tiles | None,
) -> Workspace:
    _, H, D = q_THD.shape
    G = k_cache_GND.shape[0]
    group = H // G
    common = _common(q_THD, k_cache_GND, seq_len, config)
    tiles = tiles or decode_tiles(group, common["BLOCK_D"], q_THD.element_size())
    programs = _programs(q_THD.device, tiles)
    ballot_rows = group if common["BY_HEAD"] else H
    winners_pad = _pad(ballot_rows) * common["K_PAD"]
    slices = max(1, min((programs - 1) // G, MAX_CANDIDATES // winners_pad))
    ballots = G if common["BY_HEAD"] else 1
    workers = max(1, min(programs - 1, G * slices))
    programs = min(programs, workers + ballots)
    scratch = (programs, tiles.BLOCK_M, common["K_PAD"])
    workspace = _workspace(
        ("decode", tiles, config, q_THD.dtype, H, G, D),
        q_THD.device,
        counters=(torch.int64, (2 + G,)),
        block=(torch.float32, (*scratch, tiles.BLOCK_N)),
        tag=(torch.int32, scratch),
        candidate=(torch.int64, (H, slices, common["K_PAD"])),
        kept=(torch.int32, (ballots, winners_pad)),
        num_kept=(torch.int32, (ballots,)),
        partial_acc=(torch.float32, (H, slices, D)),
        partial_max=(torch.float32, (H, slices)),
        partial_sum=(torch.float32, (H, slices)),
        selection=(torch.int64, (ballots, config.max_scope)),
        front=(torch.int32, (ballots,)),
    )
    _launch(
        decode_kernel,
        programs,
        q_THD,
        k_cache_GND,
        v_cache_GND,
        out_THD,
        seq_len,
        workers,
        cos,
        sin,
        q_THD.stride(1),
        q_THD.stride(2),
        *k_cache_GND.stride(),
        *v_cache_GND.stride(),
        workspace.counters,
        workspace.block,
        workspace.tag,
        workspace.candidate,
        workspace.kept,
        workspace.num_kept,
        workspace.partial_acc,
        workspace.partial_max,
        workspace.partial_sum,
        workspace.selection,
        workspace.front,
        **common,
        num_positions=cos.shape[0],
        SLICES=slices,
        SLICES_PAD=_pad(slices),
        CANDIDATES_PAD=_pad(slices * common["K_PAD"]),
        BALLOT_ROWS=ballot_rows,
        BALLOT_ROWS_PAD=_pad(ballot_rows),
        VOTES=ballot_rows * config.span_top_k > config.max_spans,
        W_PAD=winners_pad,
        RELATIVE=q_THD.dtype != torch.float32,
        ALONE=programs == 1,
        BLOCK_M=tiles.BLOCK_M,
        BLOCK_N=tiles.BLOCK_N,
        BLOCK_A=tiles.BLOCK_A,
        PICK_M=max(1, min(tiles.BLOCK_M, tiles.num_warps, MAX_CANDIDATES // (common["K_PAD"] * tiles.BLOCK_N))),
        COMBINE_HEADS=max(
            1, min(max(_pad(group), tiles.num_warps), MAX_PARTIALS // (_pad(slices) * common["BLOCK_D"]))
        ),
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
    tiles: Tiles | None,
    chunk_size: int | None = None,
) -> Workspace:
    T, H, D = q_THD.shape
    G, N, _ = k_cache_GND.shape
    group = H // G
    chunk_size = min(T, chunk_size or T)
    chunks = _pad(cdiv(T, chunk_size))
    common = _common(q_THD, k_cache_GND, seq_len, config)
    tiles = tiles or chunk_tiles(common["BLOCK_D"], q_THD.element_size())
    programs = _programs(q_THD.device, tiles)
    # Sizes by the next powers of two, so that prompts of all lengths share few workspaces and kernels.
    rows = _pad(chunk_size) * group  # of one key/value head in a chunk
    row_blocks = cdiv(rows, tiles.BLOCK_M)
    slices = max(1, min(programs // (chunks * G * row_blocks), MAX_CANDIDATES // common["K_PAD"]))
    slices = _pad(slices + 1) // 2
    candidates = slices * common["K_PAD"]
    heads_per_ballot = 1 if common["BY_HEAD"] else G
    ballots = chunks * (G // heads_per_ballot)
    winners = rows * heads_per_ballot * config.span_top_k  # of one ballot
    levels = winners // max(1, config.max_spans)
    spans_pad = _pad(max(1, config.max_spans))
    scratch = (programs, tiles.BLOCK_M, common["K_PAD"])
    local_rows = config.global_size + config.local_size + (chunks - 1) * _pad(chunk_size)  # a dense chunk's are all
    front_rows = cdiv(config.global_size + config.max_selected, tiles.BLOCK_A) * tiles.BLOCK_A
    workspace = _workspace(
        ("chunk", tiles, config, q_THD.dtype, H, G, D, chunks, _pad(chunk_size), _pad(N)),
        q_THD.device,
        counters=(torch.int64, (1,)),
        block=(torch.float32, (*scratch, tiles.BLOCK_N)),
        tag=(torch.int32, scratch),
        candidate=(torch.int64, (chunks * G * rows, candidates)),
        counts=(torch.int32, (ballots, _pad(N))),
        num_votes=(torch.int32, (ballots, levels + 1)),
        tally=(torch.int32, (ballots, programs, 2)),
        kept=(torch.int32, (ballots, spans_pad)),
        num_kept=(torch.int32, (ballots,)),
        q_rot=(q_THD.dtype, (chunks * G * rows, D)),
        k_rot=(q_THD.dtype, (G * local_rows + chunks * G * front_rows, D)),
        v_front=(q_THD.dtype, (chunks, G, front_rows, D)),
        selection=(torch.int64, (ballots, config.max_scope)),
        front=(torch.int32, (ballots,)),
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
        cdiv(T, chunk_size),
        chunk_size,
        levels,
        cos,
        sin,
        *q_THD.stride(),
        *k_cache_GND.stride(),
        *v_cache_GND.stride(),
        workspace.counters,
        workspace.block,
        workspace.tag,
        workspace.candidate,
        workspace.counts,
        workspace.counts.stride(0),
        workspace.num_votes,
        workspace.num_votes.stride(0),
        workspace.tally,
        workspace.kept,
        workspace.num_kept,
        workspace.q_rot,
        workspace.k_rot,
        local_rows,
        workspace.v_front,
        front_rows,
        workspace.selection,
        workspace.front,
        **common,
        SLICES=slices,
        CANDIDATES_PAD=candidates,
        COUNT_ROWS=max(1, min(128, MAX_CANDIDATES // candidates)),
        P_PAD=spans_pad,
        PROGRAMS_PAD=_pad(programs),
        BLOCK_M=tiles.BLOCK_M,
        BLOCK_N=tiles.BLOCK_N,
        BLOCK_R=64,
        BLOCK_A=tiles.BLOCK_A,
        BLOCK_C=1024,
        PICK_M=max(1, min(tiles.BLOCK_M, MAX_CANDIDATES // (common["K_PAD"] * tiles.BLOCK_N))),
        RELATIVE=q_THD.dtype != torch.float32,
        STAGES=tiles.num_stages,
        num_warps=tiles.num_warps,
    )
    return workspace


def _scopes(workspace: Workspace, seq_len: int, config: ReAttentionConfig) -> list[torch.Tensor]:
    """The scope of each ballot: what the kernel wrote for the global and the selected part, then the local part."""
    selection = workspace.selection
    local_size = min(seq_len, config.local_size)
    local = torch.arange(seq_len - local_size, seq_len, device=selection.device)
    if seq_len <= config.global_size + config.local_size:
        return [torch.arange(seq_len, device=selection.device) for _ in selection]
    if not config.max_selected:
        return [torch.cat([torch.arange(config.global_size, device=selection.device), local]) for _ in selection]
    selected = workspace.front.tolist()
    return [torch.cat([positions[:rows], local]) for positions, rows in zip(selection, selected, strict=True)]


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
        "SCALE": D**-0.5,
        "BLOCK_D": max(16, _pad(D)),
        "HALF_PAD": max(16, _pad(D // 2)),
        "PRECISION": "ieee" if q_THD.dtype == torch.float32 else "tf32",
    }


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
