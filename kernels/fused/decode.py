"""The decode kernel: one query per head that selects, in one cooperative launch.

A decode step has few winners. Most programs are workers, with a slice of one key/value head each; the one or few that
are left over sort the winners of all workers, which attend to the local part meanwhile. Where earlier tokens or layers
vote too, they add the winners to the votes that there are (recent.py).
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM102  (an `if` on constants is decided at compile time only if it stands alone)

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from minirea.kernels.fused.arguments import VARYING, Heads, Rope
from minirea.kernels.fused.attend import attend, halves_of_queries, join_slices, nothing_attended
from minirea.kernels.fused.memory import load_rows, near_or, of_head, prefetch_rows, prefetch_spans, slice_of
from minirea.kernels.fused.recent import elect_by_counts
from minirea.kernels.fused.scope import locate, select
from minirea.kernels.fused.score import pick, score_slice, store_winners
from minirea.kernels.fused.sketch import (
    live_tiles,
    prefetch_sketches,
    quantize_queries,
    scan,
    score_survivors,
    survivors,
    threshold_of_slices,
)
from minirea.kernels.fused.sync import arrive, wait
from minirea.kernels.fused.vote import sort_winners

# Counters besides that of the barrier: ballots whose winners are sorted, finished slices of each key/value head, and,
# with a sketch, from SLICES_DONE + G on, slices of each whose sketches were scanned.
SORTED: tl.constexpr = tl.constexpr(1)
SLICES_DONE: tl.constexpr = tl.constexpr(2)


class Step(NamedTuple):
    """The numbers of one launch: what the kernel was given, and what follows from it."""

    n: Any  # cached tokens
    dense: Any  # all of them are in scope
    local_lo: Any
    mid_lo: Any
    mid_hi: Any
    span_size: Any
    max_spans: Any
    max_scope: Any
    program: Any
    workers: Any
    selectors: Any  # programs that sort winners


@triton.jit(do_not_specialize=[*VARYING, "workers"])
def decode_kernel(
    q, k, v, near, sketch, out_ptr, rope, scratch, winner_ptr, stride_counts,
    seq_len, workers, global_size, local_size, dense_size, span_size, max_spans, max_scope, num_positions,
    c: tl.constexpr,
):  # fmt: skip
    """One step of one query per head: q [1, H, D] against k and v [G, N, D], to out [1, H, D]. near and sketch are
    None without. winner_ptr takes what the query finds, or is None; stride_counts is None where votes are not counted.

    A worker's unit of work is one slice of one key/value head: first of the middle to score, then of the local part to
    attend to, then of the far part. Attending to the local part needs no selection, so it fills the time until the last
    worker has scored and the selecting program has sorted the winners.
    """
    n = tl.load(seq_len).to(tl.int32) if c.SEQ_LEN_IN_MEMORY else seq_len
    q = Heads(q.ptr, q.stride_h, 0, q.stride_d)  # one token: its stride does not matter
    dense = n <= dense_size
    program = tl.program_id(0)
    step = Step(
        n=n,
        dense=dense,
        local_lo=tl.where(dense, 0, n - local_size),
        mid_lo=global_size,
        mid_hi=n - local_size,
        span_size=span_size,
        max_spans=max_spans,
        max_scope=max_scope,
        program=program,
        workers=workers,
        # The programs after the workers select; a program that is alone does both.
        selectors=1 if c.ALONE else tl.num_programs(0) - workers,
    )
    if not c.SKETCH:
        tile_rope = rope_of_a_tile(rope, num_positions, c)  # while this program has nothing else to wait for
    all_arrived = tl.cast(0, tl.int64)

    if not dense:
        if c.SEARCHES:
            if program < workers:
                score_slices(q, k, v, near, sketch, scratch, step, c)
        all_arrived = arrive(scratch.counters)
        if c.ALONE and c.ATTENDS:
            elect_winners(scratch, winner_ptr, stride_counts, step, 0, all_arrived, c)
        if not c.ATTENDS:
            if c.ALONE or program >= workers:
                wait(scratch.counters, all_arrived)
                store_winners(scratch.candidate, out_ptr, 0, c.G * c.GROUP, c.BALLOT_ROWS_PAD, c)

    if c.SKETCH and c.ATTENDS:
        tile_rope = rope_of_a_tile(rope, num_positions, c)  # scanning sketches takes the registers
    if c.ATTENDS and program < workers:
        for unit in range(program, c.G * c.SLICES, workers):
            attend_slice(
                q, k, v, near, out_ptr, rope, tile_rope, scratch, step, unit % c.G, unit // c.G, all_arrived, c
            )

    # Last, since of a kernel's code only the first 64 KiB are fetched ahead, and the workers need those.
    if c.ATTENDS and not c.ALONE:
        if not dense and program >= workers:
            elect_winners(scratch, winner_ptr, stride_counts, step, program - workers, all_arrived, c)


@triton.jit
def rope_of_a_tile(rope, num_positions, c: tl.constexpr):
    """cos and sin [BLOCK_A, HALF_PAD] of positions 0, 1, ..., which stay in registers."""
    offs_tile = tl.arange(0, c.BLOCK_A)
    offs_h = tl.arange(0, c.HALF_PAD)
    cos = load_rows(rope.cos_ptr, offs_tile, c.D // 2, offs_tile < num_positions, offs_h, 1, c.D // 2)
    sin = load_rows(rope.sin_ptr, offs_tile, c.D // 2, offs_tile < num_positions, offs_h, 1, c.D // 2)
    return Rope(cos, sin)


@triton.jit
def elect_winners(scratch, winner_ptr, stride_counts, step, first_ballot, all_arrived, c: tl.constexpr):
    """Step 5: the winners of every step.selectors-th ballot that are kept.

    Where other programs score meanwhile, the first time sorts what the launch before has left: it brings the code into
    the cache.
    """
    if c.COUNTS:
        elect_by_counts(scratch, winner_ptr, stride_counts, step, first_ballot, all_arrived, c)
    else:
        for time in range(1 if c.ALONE else c.SORTS):
            if time == 1:
                wait(scratch.counters, all_arrived)
            sort_winners(scratch, winner_ptr, step.n, first_ballot, step.selectors, step.mid_lo, step.mid_hi,
                         step.max_spans, c)  # fmt: skip
    tl.atomic_add(scratch.counters + SORTED, 1, sem="release", scope="gpu")


@triton.jit
def score_slices(q, k, v, near, sketch, scratch, step, c: tl.constexpr):
    """Steps 3 and 4: the candidates of this program's slices of the middle."""
    # This scratch is the program's own and stays in its cache.
    block_ptr = scratch.block + step.program * (c.BLOCK_M * c.K_PAD * c.BLOCK_N)
    tag_ptr = scratch.tag + step.program * (c.BLOCK_M * c.K_PAD)
    for unit in range(step.program, c.G * c.SLICES, step.workers):
        g = unit % c.G
        part = unit // c.G
        if c.SKETCH:
            score_with_sketch(q, k, v, near, sketch, block_ptr, tag_ptr, scratch, step, g, part, c)
        else:
            lo, hi = slice_of(step.mid_lo, step.mid_hi, part, c.SLICES)
            score_slice(q, of_head(k, g), block_ptr, tag_ptr, g, 0, c.GROUP, lo, hi, c)
            prefetch_local(k, v, near, step, g, part, c)
            candidate_ptr = scratch.candidate + (g * c.GROUP * c.SLICES + part) * c.K_PAD
            pick(block_ptr, tag_ptr, candidate_ptr, c.GROUP, lo, c)


@triton.jit
def prefetch_local(k, v, near, step, g, part, c: tl.constexpr):
    """The memory would be idle from the end of scoring until this program attends to its local slice."""
    first, last = slice_of(step.local_lo, step.n, part, c.SLICES)
    k_near = near_or(k, near.k if c.NEAR_K else None, g, c.NEAR_K, c.D)
    v_near = near_or(v, near.v if c.NEAR_V else None, g, c.NEAR_V, c.D)
    prefetch_rows(k_near.ptr, k_near.stride_n, first, last, c.D, c.BLOCK_N, c.NEAR_K)
    prefetch_rows(v_near.ptr, v_near.stride_n, first, last, c.D, c.BLOCK_N, c.NEAR_V)


@triton.jit
def score_with_sketch(
    q, k, v, near, sketch, block_ptr, tag_ptr, scratch, step, g, part, c: tl.constexpr,
):  # fmt: skip
    """The candidates of slice `part` of head g: of its survivors, or of all keys if there are too many of those."""
    k_head = of_head(k, g)
    lo, hi = slice_of(step.mid_lo, step.mid_hi, part, c.SLICES)
    candidate_ptr = scratch.candidate + (g * c.GROUP * c.SLICES + part) * c.K_PAD
    found = tl.cast(c.SURVIVORS + 1, tl.int32)
    if tl.cdiv(step.mid_hi - step.mid_lo, c.SLICES) >= c.LEAST:  # of all slices, which wait for each other
        prefetch_sketches(sketch, g, lo, hi, c)
        parts, length = quantize_queries(q, g, sketch, c)
        kept, best = scan(parts, length, sketch, g, lo, hi, scratch, step.program, c)
        prefetch_local(k, v, near, step, g, part, c)
        threshold = threshold_of_slices(best, g, part, scratch, scratch.counters + SLICES_DONE + c.G + g, c)
        if tl.max(kept, axis=0) <= c.ROOM:
            num_live = live_tiles(kept, threshold, scratch, step.program, c)
            found = survivors(num_live, lo, scratch, step.program, c)
    tl.store(scratch.found + g * c.SLICES + part, found)
    if found <= c.SURVIVORS:
        survivor_ptr = scratch.survivor + step.program * (2 * c.SURVIVORS)
        score_survivors(q, k_head, g, found, survivor_ptr, candidate_ptr, c)
    else:
        score_slice(q, k_head, block_ptr, tag_ptr, g, 0, c.GROUP, lo, hi, c)
        pick(block_ptr, tag_ptr, candidate_ptr, c.GROUP, lo, c)


@triton.jit
def attend_slice(
    q, k, v, near, out_ptr, rope, tile_rope, scratch, step, g, part, all_arrived, c: tl.constexpr,
):  # fmt: skip
    """Steps 6 to 8 for slice `part` of head g: local rows, then far rows. The last one of a head combines all."""
    k_head = of_head(k, g)
    v_head = of_head(v, g)
    k_near = near_or(k, near.k if c.NEAR_K else None, g, c.NEAR_K, c.D)
    v_near = near_or(v, near.v if c.NEAR_V else None, g, c.NEAR_V, c.D)
    selection_ptr = scratch.selection + (g * step.max_scope if c.BY_HEAD else 0)
    q_a, q_b = halves_of_queries(q, g, c)
    state = nothing_attended(c)

    lo, hi = slice_of(step.local_lo, step.n, part, c.SLICES)
    if c.RELATIVE:
        state = attend(state, q_a, q_b, k_near, v_near, rope, tile_rope, lo, hi, step.n - 1, 0, selection_ptr,
                       False, True, c, c.NEAR_K, c.NEAR_V)  # fmt: skip
    num_far = tl.where(step.dense, 0, step.mid_lo)
    if not step.dense:
        wait(scratch.counters + SORTED, all_arrived // tl.num_programs(0) * step.selectors)
        num_far += select_and_locate(k_head, v_head, scratch, selection_ptr, step, g if c.BY_HEAD else 0, part, c)
    length = num_far + step.n - step.local_lo
    if not c.RELATIVE:
        state = attend(state, q_a, q_b, k_near, v_near, rope, tile_rope, lo, hi, step.n - 1, length - step.n,
                       selection_ptr, False, False, c, c.NEAR_K, c.NEAR_V)  # fmt: skip
    lo, hi = slice_of(0, num_far, part, c.SLICES)
    state = attend(state, q_a, q_b, k_head, v_head, rope, tile_rope, lo, hi, length - 1, 0, selection_ptr,
                   True, c.RELATIVE, c)  # fmt: skip
    join_slices(state, out_ptr, scratch, scratch.counters + SLICES_DONE + g, g, part, c)


@triton.jit
def select_and_locate(k, v, scratch, selection_ptr, step, ballot, part, c: tl.constexpr):
    """Steps 6 and 7 for one slice of the far rows; returns how many rows are selected in all."""
    num_kept = tl.load(scratch.num_kept + ballot)
    kept_ptr = scratch.kept + ballot * c.KEPT_PAD
    max_kept = step.max_spans if c.COUNTS else tl.minimum(step.max_spans, c.BALLOT_ROWS * c.K)
    prefetch_spans(k, v, kept_ptr, max_kept, part, step.mid_lo, step.mid_hi, step.span_size, c)
    start, offset, rows = select(kept_ptr, num_kept, step.mid_lo, step.mid_hi, step.span_size, c.KEPT_PAD)
    selected = tl.sum(rows, axis=0)
    first, last = slice_of(0, step.mid_lo + selected, part, c.SLICES)
    locate(selection_ptr, start, offset, rows, first, last, step.mid_lo, step.span_size, c.KEPT_PAD)
    if part == 0:
        tl.store(scratch.num_far + ballot, step.mid_lo + selected)
    return selected
