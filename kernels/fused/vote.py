"""Section 3, step 5: which positions the rows of a ballot elect.

A decode step has few winners, which one program compares with each other in registers. A chunk has many, whose votes
all programs count in memory.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from minirea.kernels.fused.order import NOWHERE
from minirea.kernels.fused.score import leave_winners, winners_of


@triton.jit
def pool(winner, mid_lo, mid_hi, VOTE_SIZE: tl.constexpr):
    """Each winner as the middle of its block of VOTE_SIZE keys, or as the key of the middle that is next to it."""
    if VOTE_SIZE > 1:
        middle = winner // VOTE_SIZE * VOTE_SIZE + VOTE_SIZE // 2
        winner = tl.where(winner == NOWHERE, winner, tl.minimum(tl.maximum(middle, mid_lo), mid_hi - 1))
    return winner


@triton.jit
def vote(winner, max_spans, W_PAD: tl.constexpr):
    """Of winner int32 [W_PAD], keep the max_spans positions named most often, NOWHERE instead of the others.

    By counting pairs: sorting is slower for the few winners of a decode step. Only the first of equal positions is
    kept.
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
def sort_winners(scratch, winner_ptr, n, first_ballot, step, mid_lo, mid_hi, max_spans, c: tl.constexpr):
    """`winners_of`, `pool`, `vote` and `sort` for every step-th ballot of a decode step. Leaves winners at winner_ptr,
    if it is not None.
    """
    for ballot in range(first_ballot, c.BALLOTS, step):
        rows = ballot * c.BALLOT_ROWS
        winner = winners_of(scratch.candidate, rows, rows + c.BALLOT_ROWS, c.BALLOT_ROWS_PAD, c)
        if c.RECENT:
            heads = rows + tl.arange(0, c.BALLOT_ROWS_PAD)
            leave_winners(winner, winner_ptr, n - 1, heads, heads < rows + c.BALLOT_ROWS, c)
        kept = pool(tl.reshape(winner, [c.W_PAD]), mid_lo, mid_hi, c.VOTE_SIZE)
        if c.VOTES:
            kept = vote(kept, max_spans, c.W_PAD)
        sort(kept, scratch.kept + ballot * c.W_PAD, scratch.num_kept + ballot, c.W_PAD)
    tl.debug_barrier()  # before these writes are published


@triton.jit
def count_votes(winner, counts_ptr, num_votes_ptr, mid_lo, mid_hi, levels, c: tl.constexpr):
    """Cast the votes of some rows of one ballot: winner int32 [COUNT_ROWS, K_PAD].

    counts_ptr int32 [N] counts by position; num_votes_ptr int32 [levels + 1] counts the positions that have at least
    so many votes. The votes of all programs would add to the same few of these numbers one after the other, so the
    lowest BINS levels are counted here first.
    """
    winner = pool(winner, mid_lo, mid_hi, c.VOTE_SIZE)
    cast = winner != NOWHERE
    level = tl.atomic_add(counts_ptr + winner, 1, mask=cast, sem="relaxed") + 1
    level = tl.where(cast, level, levels + 1)
    BINS: tl.constexpr = 128
    bins = tl.arange(0, BINS)
    ROW_VOTES: tl.constexpr = c.COUNT_ROWS * c.K_PAD
    reached = tl.histogram(tl.reshape(level, [ROW_VOTES]), BINS, mask=tl.reshape(level < BINS, [ROW_VOTES]))
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
    counts_ptr, tally_ptr, kept_ptr, num_kept_ptr, lo, hi, needed, max_spans, part, parts,
    PARTS_PAD: tl.constexpr, BLOCK_C: tl.constexpr, CARRIES: tl.constexpr,
):  # fmt: skip
    """Write the kept positions of [lo, hi), which is one part of the middle, ascending, to their places in kept_ptr.

    All positions with more than the needed votes are kept, and of those with exactly the needed ones the lowest, as
    many as there is room for. The tallies of the parts before this one say where to begin. Zeroes the counts, unless
    later layers go on with them.
    """
    offs_part = tl.arange(0, PARTS_PAD)
    present = offs_part < parts
    before = offs_part < part
    more = tl.load(tally_ptr + 2 * offs_part, mask=present, other=0)
    exactly = tl.load(tally_ptr + 2 * offs_part + 1, mask=present, other=0)
    room = max_spans - tl.sum(more, axis=0)
    exactly_before = tl.sum(tl.where(before, exactly, 0), axis=0)
    if part == 0:
        tl.store(num_kept_ptr, tl.sum(more, axis=0) + tl.minimum(room, tl.sum(exactly, axis=0)))
    place = tl.sum(tl.where(before, more, 0), axis=0) + tl.minimum(room, exactly_before)
    for first in range(lo, hi, BLOCK_C):
        position = first + tl.arange(0, BLOCK_C)
        votes = tl.load(counts_ptr + position, mask=position < hi, other=0)
        tied = ((votes == needed) & (votes > 0)).to(tl.int32)
        keep = (votes > needed) | ((tied > 0) & (exactly_before + tl.cumsum(tied, axis=0) <= room))
        index = place + tl.cumsum(keep.to(tl.int32), axis=0) - 1
        if CARRIES:  # if the caller let more votes add up than there are levels, there is no room for all
            tl.store(kept_ptr + index, position, mask=keep & (index >= 0))
        else:
            tl.store(kept_ptr + index, position, mask=keep)
            tl.store(counts_ptr + position, 0, mask=votes > 0)
        exactly_before += tl.sum(tied, axis=0)
        place += tl.sum(keep.to(tl.int32), axis=0)
