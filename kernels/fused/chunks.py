"""The chunk kernel: chunks of a prompt, each with a scope of its own, in one cooperative launch.

A chunk has too many winners for one program: votes are counted in memory, and the scope is gathered, its keys rotated
once, into scratch. No chunk needs another, so all go through every phase together, and wait for each other's programs
only as often as one would.

Every phase numbers its units of work through all chunks and deals them out to the programs in turn (`in_turn`).
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM102  (an `if` on constants is decided at compile time only if it stands alone)

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from minirea.kernels.fused.arguments import VARYING, Heads, Softmax
from minirea.kernels.fused.attend import attend_tiles, gather, rotate_queries
from minirea.kernels.fused.memory import load_rows, near_or, of_head, slice_of
from minirea.kernels.fused.scope import far_rows_of, locate, select
from minirea.kernels.fused.score import leave_winners, pick, score_slice, store_winners, winners_of
from minirea.kernels.fused.sync import arrive, wait
from minirea.kernels.fused.vote import count_votes, elect, tally, votes_needed


class Step(NamedTuple):
    """The numbers of one launch: what the kernel was given, and what all phases make of it."""

    n: Any  # tokens cached with the last chunk
    T: Any
    chunks: Any
    chunk_size: Any
    levels: Any  # votes that are told apart when positions are counted by their votes
    local_rows: Any  # of a key/value head in k_rot
    far_rows: Any  # of a chunk and key/value head in k_rot and v_far
    stride_counts: Any
    stride_votes: Any
    global_size: Any
    local_size: Any
    dense_size: Any  # cached tokens up to which a chunk attends to all
    span_size: Any
    max_spans: Any
    max_scope: Any
    ballots: Any
    chunk_rows: Any  # of one key/value head in a chunk
    program: Any
    programs: Any
    block_ptr: Any  # scratch of `score`, the program's own
    tag_ptr: Any
    offs_d: Any


class Share(NamedTuple):
    """The ballots that a program works on, and which part of each: first_ballot, first_ballot + stride, ..."""

    first_ballot: Any
    stride: Any
    part: Any
    parts: Any


@triton.jit(do_not_specialize=[*VARYING, "T", "chunks", "chunk_size", "levels", "local_rows", "far_rows"])
def chunk_kernel(
    q, k, v, near, out_ptr, rope, scratch, winner_ptr, stride_counts, stride_votes,
    seq_len, T, chunks, chunk_size, levels, local_rows, far_rows,
    global_size, local_size, dense_size, span_size, max_spans, max_scope, c: tl.constexpr,
):  # fmt: skip
    """T queries in chunks, each with a scope of its own: q [T, H, D] against k and v [G, N, D], to out [T, H, D].

    `near` has the local parts' values, or is None. winner_ptr takes what the last RECENT queries find, or is None.
    """
    n = tl.load(seq_len).to(tl.int32) if c.SEQ_LEN_IN_MEMORY else seq_len
    program = tl.program_id(0)
    # Scratch of `score` is the program's own, so that it stays in its cache.
    block_ptr = scratch.block + tl.cast(program, tl.int64) * (c.BLOCK_M * c.K_PAD * c.BLOCK_N)
    tag_ptr = scratch.tag + program * (c.BLOCK_M * c.K_PAD)
    step = Step(
        n, T, chunks, chunk_size, levels, local_rows, far_rows, stride_counts, stride_votes,
        global_size, local_size, dense_size, span_size, max_spans, max_scope,
        chunks * c.BALLOTS, chunk_size * c.GROUP,
        program, tl.num_programs(0), block_ptr, tag_ptr, tl.arange(0, c.BLOCK_D),
    )  # fmt: skip
    counters = scratch.counters
    if c.SELECTS:
        if n > step.dense_size:  # of the last chunk; those before it may be dense all the same
            if c.SEARCHES:
                score_chunks(q, k, scratch, step, c)
                wait(counters, arrive(counters))
            if c.ATTENDS:
                count_chunks(scratch, winner_ptr, step, c)
                wait(counters, arrive(counters))
                share = share_of(step)
                tally_ballots(scratch, step, share, c)
                wait(counters, arrive(counters))
                elect_ballots(scratch, step, share, c)
                wait(counters, arrive(counters))
                lay_out_scopes(scratch, step, share, c)
                wait(counters, arrive(counters))
            else:
                merge_chunks(scratch, out_ptr, step, c)
    if c.ATTENDS:
        attend_to_scopes(q, k, v, near, out_ptr, rope, scratch, step, c)


@triton.jit
def attend_to_scopes(q, k, v, near, out_ptr, rope, scratch, step, c: tl.constexpr):
    """Steps 7 and 8."""
    counters = scratch.counters
    # Local parts overlap: together they are the cache from local_lo on. RELATIVE moves scopes, so that a key there has
    # one position for all chunks and is rotated once. Else there is one chunk, whose scope begins at position 0.
    _, _, first_n = chunk_at(0, step)
    local_lo = tl.where(first_n <= step.dense_size, 0, first_n - step.local_size)
    local_position = tl.minimum(local_lo, step.max_scope - step.local_size)
    units = gather_local(k, v, rope, scratch, step, local_lo, local_position, c)
    gather_far(k, v, rope, scratch, step, local_lo, local_position, units, c)
    all_arrived = arrive(counters)
    # This program's own queries, while others still gather. Through scratch: from registers the product would take them
    # anew for every tile.
    rotate_chunks(q, rope, scratch, step, local_lo, local_position, c)
    wait(counters, all_arrived)
    attend_chunks(v, near, out_ptr, scratch, step, local_lo, c)


@triton.jit
def chunk_at(index, step):
    """A chunk's first query, how many it has, and the tokens that are cached with its last one."""
    first = index * step.chunk_size
    # In a form that lets ptxas see that all threads share these: loops between such bounds are faster.
    last = index + 1 == step.chunks
    num_queries = tl.where(last, step.T - first, step.chunk_size)
    return first, num_queries, tl.where(last, step.n, step.n - step.T + first + step.chunk_size)


@triton.jit
def in_turn(before, step):
    """Which of some units is this program's first, where all programs have taken as many as `before` in turn.

    From numbers that no loop carries: Triton 3.6 takes a number that a loop over chunks changes for the one with which
    the loop began, and the first programs would do all the work.
    """
    first = step.program - before % step.programs
    return tl.where(first < 0, first + step.programs, first)


@triton.jit
def score_chunks(q, k, scratch, step, c: tl.constexpr):
    """Steps 3 and 4: the candidates of every row in every slice of its chunk's middle."""
    for chunk in range(step.chunks):
        first_query, num_queries, chunk_n = chunk_at(chunk, step)
        if chunk_n > step.dense_size:
            q_chunk = Heads(q.ptr + tl.cast(first_query, tl.int64) * q.stride_n, q.stride_h, q.stride_n, q.stride_d)
            num_rows = num_queries * c.GROUP
            units = tl.cdiv(num_rows, c.BLOCK_M) * c.G * c.SLICES
            for this in range(in_turn(chunk * units, step), units, step.programs):
                part = this % c.SLICES
                g = this // c.SLICES % c.G
                first_row = this // c.SLICES // c.G * c.BLOCK_M
                lo, hi = slice_of(step.global_size, chunk_n - step.local_size, part, c.SLICES)
                score_slice(q_chunk, of_head(k, g), step.block_ptr, step.tag_ptr, g, first_row, num_rows, lo, hi, c)
                row = tl.cast((chunk * c.G + g) * step.chunk_rows + first_row, tl.int64)
                candidate_ptr = scratch.candidate + (row * c.SLICES + part) * c.K_PAD
                pick(step.block_ptr, step.tag_ptr, candidate_ptr, num_rows - first_row, lo, c)


@triton.jit
def merge_chunks(scratch, winner_ptr, step, c: tl.constexpr):
    """Step 4, for all ranks: the winners of every row, over all slices."""
    for chunk in range(step.chunks):
        _, num_queries, chunk_n = chunk_at(chunk, step)
        if chunk_n > step.dense_size:
            units = tl.cdiv(num_queries * c.GROUP, c.COUNT_ROWS) * c.G
            for this in range(in_turn(chunk * units, step), units, step.programs):
                row = (chunk * c.G + this % c.G) * step.chunk_rows
                first_row = row + this // c.G * c.COUNT_ROWS
                last_row = tl.minimum(first_row + c.COUNT_ROWS, row + num_queries * c.GROUP)
                store_winners(scratch.candidate, winner_ptr, first_row, last_row, c.COUNT_ROWS, c)


@triton.jit
def count_chunks(scratch, winner_ptr, step, c: tl.constexpr):
    """Step 5: the votes of every row. Leaves the winners of the last tokens for later ones' votes."""
    for chunk in range(step.chunks):
        _, num_queries, chunk_n = chunk_at(chunk, step)
        if chunk_n > step.dense_size:
            units = tl.cdiv(num_queries * c.GROUP, c.COUNT_ROWS) * c.VOTING_HEADS
            for this in range(in_turn(chunk * units, step), units, step.programs):
                g = this % c.VOTING_HEADS
                ballot = chunk * c.BALLOTS + (g if c.BY_HEAD else 0)
                if c.RANKS > 1:
                    row = ((g // c.G * step.chunks + chunk) * c.G + g % c.G) * step.chunk_rows
                else:
                    row = (chunk * c.G + g) * step.chunk_rows
                first_row = row + this // c.VOTING_HEADS * c.COUNT_ROWS
                last_row = tl.minimum(first_row + c.COUNT_ROWS, row + num_queries * c.GROUP)
                winner = winners_of(scratch.candidate, first_row, last_row, c.COUNT_ROWS, c)
                if c.RECENT:
                    rows = first_row + tl.arange(0, c.COUNT_ROWS)
                    position = chunk_n - num_queries + (rows - row) // c.GROUP
                    present = (rows < last_row) & (position >= step.n - c.RECENT)
                    leave_winners(winner, winner_ptr, position, g * c.GROUP + (rows - row) % c.GROUP, present, c)
                count_votes(winner, scratch.counts + ballot * step.stride_counts,
                            scratch.num_votes + ballot * step.stride_votes, step.global_size,
                            chunk_n - step.local_size, step.levels, c)  # fmt: skip


@triton.jit
def share_of(step):
    """Several programs for every ballot, or several ballots for every program."""
    stride = tl.minimum(step.ballots, step.programs)
    first_ballot = step.program % stride
    return Share(first_ballot, stride, step.program // stride, tl.cdiv(step.programs - first_ballot, stride))


@triton.jit
def middle_of(ballot, share, step, c: tl.constexpr):
    """This program's part of a ballot's middle."""
    _, _, chunk_n = chunk_at(ballot // c.BALLOTS, step)
    return slice_of(step.global_size, chunk_n - step.local_size, share.part, share.parts)


@triton.jit
def tally_ballots(scratch, step, share, c: tl.constexpr):
    """Step 5: how many positions of each part of the middle are kept."""
    for ballot in range(share.first_ballot, step.ballots, share.stride):
        lo, hi = middle_of(ballot, share, step, c)
        needed = votes_needed(scratch.num_votes + ballot * step.stride_votes, step.levels, step.max_spans, c.BLOCK_C)
        tally_ptr = scratch.tally + 2 * (ballot * step.programs + share.part)
        tally(scratch.counts + ballot * step.stride_counts, tally_ptr, lo, hi, needed, c.BLOCK_C)


@triton.jit
def elect_ballots(scratch, step, share, c: tl.constexpr):
    """Step 5: which positions are kept."""
    for ballot in range(share.first_ballot, step.ballots, share.stride):
        lo, hi = middle_of(ballot, share, step, c)
        needed = votes_needed(scratch.num_votes + ballot * step.stride_votes, step.levels, step.max_spans, c.BLOCK_C)
        elect(scratch.counts + ballot * step.stride_counts, scratch.tally + 2 * ballot * step.programs,
              scratch.kept + ballot * c.P_PAD, scratch.num_kept + ballot, lo, hi, needed, step.max_spans, share.part,
              share.parts, c.PROGRAMS_PAD, c.BLOCK_C, c.CARRIES)  # fmt: skip


@triton.jit
def lay_out_scopes(scratch, step, share, c: tl.constexpr):
    """Steps 6 and 7: where the far rows of every scope lie. Zeroes the numbers of votes, unless later layers add
    to them.
    """
    for ballot in range(share.first_ballot, step.ballots, share.stride):
        _, _, chunk_n = chunk_at(ballot // c.BALLOTS, step)
        mid_hi = chunk_n - step.local_size
        start, offset, rows = select(scratch.kept + ballot * c.P_PAD, tl.load(scratch.num_kept + ballot),
                                     step.global_size, mid_hi, step.span_size, c.P_PAD)  # fmt: skip
        num_far = step.global_size + tl.sum(rows, axis=0)
        first, last = slice_of(0, num_far, share.part, share.parts)
        locate(scratch.selection + ballot * step.max_scope, start, offset, rows, first, last, step.global_size,
               step.span_size, c.P_PAD)  # fmt: skip
        if share.part == 0:
            tl.store(scratch.num_far + ballot, num_far)
            if not c.CARRIES:
                for first in range(0, step.levels + 1, c.BLOCK_C):
                    level = first + tl.arange(0, c.BLOCK_C)
                    tl.store(scratch.num_votes + ballot * step.stride_votes + level, 0, mask=level <= step.levels)


@triton.jit
def gather_local(k, v, rope, scratch, step, local_lo, local_position, c: tl.constexpr):
    """Step 7: the keys of all local parts, rotated once, to k_rot. Returns how many units of work that was."""
    units = tl.cdiv(step.n - local_lo, c.BLOCK_R) * c.G
    for this in range(step.program, units, step.programs):
        g = this % c.G
        offs_r = this // c.G * c.BLOCK_R + tl.arange(0, c.BLOCK_R)
        if not c.RELATIVE:
            local_position = far_rows_of(scratch.num_far, g if c.BY_HEAD else 0, step.n <= step.dense_size,
                                         step.global_size, c.SELECTS)  # fmt: skip
        gather(of_head(k, g), v, rope, scratch.k_rot + tl.cast(g, tl.int64) * step.local_rows * c.D, scratch.v_far,
               local_lo + offs_r, local_position + offs_r, offs_r, offs_r < step.n - local_lo, False, c)  # fmt: skip
    return units


@triton.jit
def gather_far(k, v, rope, scratch, step, local_lo, local_position, before, c: tl.constexpr):
    """Step 7: keys, rotated, and values of every scope's far part, to k_rot and v_far.

    `before` units of work have been dealt out.
    """
    heads_per_ballot: tl.constexpr = c.G // c.BALLOTS
    for ballot in range(step.ballots):
        chunk = ballot // c.BALLOTS
        _, _, chunk_n = chunk_at(chunk, step)
        dense = chunk_n <= step.dense_size
        num_far = far_rows_of(scratch.num_far, ballot, dense, step.global_size, c.SELECTS)
        chunk_lo = tl.where(dense, 0, chunk_n - step.local_size)
        # Whole tiles, the last of which may reach into the local part.
        num_copied = tl.minimum(tl.cdiv(num_far, c.BLOCK_A) * c.BLOCK_A, num_far + chunk_n - chunk_lo)
        position = local_position + chunk_lo - local_lo - num_far if c.RELATIVE else 0
        units = tl.cdiv(num_copied, c.BLOCK_R) * heads_per_ballot
        for this in range(in_turn(before + ballot * units, step), units, step.programs):
            g = ballot % c.G if c.BY_HEAD else this % c.G
            offs_r = this // heads_per_ballot * c.BLOCK_R + tl.arange(0, c.BLOCK_R)
            mask_r = offs_r < num_copied
            source = tl.where(offs_r < num_far, offs_r, chunk_lo + offs_r - num_far)
            if c.SELECTS:
                selection_ptr = scratch.selection + ballot * step.max_scope
                source = tl.load(selection_ptr + offs_r, mask=offs_r < num_far, other=source)
            head = tl.cast(chunk * c.G + g, tl.int64) * step.far_rows
            gather(of_head(k, g), of_head(v, g), rope, scratch.k_rot + (c.G * step.local_rows + head) * c.D,
                   scratch.v_far + head * c.D, source, position + offs_r, offs_r, mask_r, True, c)  # fmt: skip


@triton.jit
def rotate_chunks(q, rope, scratch, step, local_lo, local_position, c: tl.constexpr):
    """Step 7: the queries that this program will attend with, rotated, to q_rot."""
    for chunk in range(step.chunks):
        first_query, num_queries, chunk_n = chunk_at(chunk, step)
        units = tl.cdiv(num_queries * c.GROUP, c.BLOCK_M) * c.G
        for this in range(in_turn(chunk * units, step), units, step.programs):
            g = this % c.G
            rows = this // c.G * c.BLOCK_M + tl.arange(0, c.BLOCK_M)
            t = rows // c.GROUP
            if not c.RELATIVE:
                local_position = far_rows_of(scratch.num_far, g if c.BY_HEAD else 0, step.n <= step.dense_size,
                                             step.global_size, c.SELECTS)  # fmt: skip
            rotate_queries(q, rope, scratch.q_rot, first_query + t, g * c.GROUP + rows % c.GROUP,
                           local_position + chunk_n - local_lo - num_queries + t,
                           (chunk * c.G + g) * step.chunk_rows + rows, t < num_queries, c)  # fmt: skip


@triton.jit
def attend_chunks(v, near, out_ptr, scratch, step, local_lo, c: tl.constexpr):
    """Step 8 for every block of rows of every chunk."""
    for chunk in range(step.chunks):
        first_query, num_queries, chunk_n = chunk_at(chunk, step)
        dense = chunk_n <= step.dense_size
        chunk_lo = tl.where(dense, 0, chunk_n - step.local_size)
        units = tl.cdiv(num_queries * c.GROUP, c.BLOCK_M) * c.G
        for this in range(in_turn(chunk * units, step), units, step.programs):
            g = this % c.G
            ballot = chunk * c.BALLOTS + (g if c.BY_HEAD else 0)
            num_far = far_rows_of(scratch.num_far, ballot, dense, step.global_size, c.SELECTS)
            attend_block(v, near, out_ptr, scratch, step, chunk, g, this // c.G * c.BLOCK_M, first_query, num_queries,
                         num_far, num_far + chunk_n - chunk_lo, local_lo, chunk_lo, c)  # fmt: skip


@triton.jit
def attend_block(
    v, near, out_ptr, scratch, step, chunk, g, first_row, first_query, num_queries, num_far, length, local_lo, chunk_lo,
    c: tl.constexpr,
):  # fmt: skip
    """Rows [first_row, first_row + BLOCK_M) of head g in a chunk over a scope of num_far far rows, `length` in all."""
    offs_d = step.offs_d
    rows = first_row + tl.arange(0, c.BLOCK_M)
    t = rows // c.GROUP
    mask_m = t < num_queries
    last_key = length - num_queries + t
    q = load_rows(scratch.q_rot, (chunk * c.G + g) * step.chunk_rows + rows, c.D, mask_m, offs_d, 1, c.D)
    # Row r of the scope is row far_row + r of k_rot if it was copied, else local_row + r. Its value has the same
    # number, in v_far or in the cache, where those of the local part are consecutive; or it is near.
    far_row = c.G * step.local_rows + (chunk * c.G + g) * step.far_rows
    local_row = g * step.local_rows + chunk_lo - local_lo - num_far
    v_far = scratch.v_far - tl.cast(c.G * step.local_rows, tl.int64) * c.D
    if c.NEAR_V:
        shift = local_lo - g * step.local_rows
        v_local = near_or(v, near.v, g, c.NEAR_V, c.D)
    else:
        shift = tl.cast(local_lo - g * step.local_rows, tl.int64) * v.stride_n
        v_local = Heads(v.ptr + tl.cast(g, tl.int64) * v.stride_h + shift, v.stride_h, v.stride_n, v.stride_d)
    num_copied = tl.cdiv(num_far, c.BLOCK_A) * c.BLOCK_A
    state = Softmax(
        tl.full([c.BLOCK_M, c.BLOCK_D], 0, tl.float32),
        tl.full([c.BLOCK_M], -1.0e38, tl.float32),
        tl.full([c.BLOCK_M], 0, tl.float32),
    )
    # Keys that every row sees need no mask; the block's own queries are at most a tile or two more.
    seen_by_all = (length - num_queries + first_row // c.GROUP + 1) // c.BLOCK_A * c.BLOCK_A
    seen_by_any = tl.minimum(length, length - num_queries + (first_row + c.BLOCK_M - 1) // c.GROUP + 1)
    state = attend_tiles(state, q, scratch.k_rot, v_far, v_local, far_row, local_row, shift, num_copied,
                         0, seen_by_all, last_key, False, c)  # fmt: skip
    state = attend_tiles(state, q, scratch.k_rot, v_far, v_local, far_row, local_row, shift, num_copied,
                         seen_by_all, seen_by_any, last_key, True, c)  # fmt: skip
    out_rows = (first_query + t) * (c.G * c.GROUP) + g * c.GROUP + rows % c.GROUP
    out = (state.acc / state.row_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_rows.to(tl.int64)[:, None] * c.D + offs_d[None, :], out,
             mask=mask_m[:, None] & (offs_d < c.D)[None, :])  # fmt: skip
