"""Section 3, step 5, for a decode step whose token votes together with those before it, or layer after layer.

Votes are counted in memory, by position. Those of earlier tokens, whose winners every step leaves, are counted once,
before a step's first layer (`count_kernel`); each layer adds its own. A list of the max_spans positions that have most
goes from layer to layer: votes only grow, so a position that is not on the list and gets no vote in a layer cannot get
onto it.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM102  (an `if` on constants is decided at compile time only if it stands alone)

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from minirea.kernels.fused.order import NOWHERE, pack
from minirea.kernels.fused.score import leave_winners, winners_of
from minirea.kernels.fused.sync import wait
from minirea.kernels.fused.vote import pool, sort

# In a ballot's row of Votes.voted: how many positions have votes, how many programs have counted; these positions.
FINISHED: tl.constexpr = tl.constexpr(1)
POSITIONS: tl.constexpr = tl.constexpr(2)


VARYING: Final = ("seq_len", "global_size", "local_size", "max_spans", "num_winners", "levels", "bits", "vote_bits")


@triton.jit(do_not_specialize=[*VARYING])
def count_kernel(
    winner_ptr, counts_ptr, elected_ptr, voted_ptr, num_votes_ptr, stride_counts, stride_elected, stride_voted,
    stride_votes, seq_len, global_size, local_size, max_spans, num_winners, levels, bits, vote_bits, c: tl.constexpr,
):  # fmt: skip
    """Count the num_winners of earlier tokens of each ballot, in all layers: winner_ptr int32 [L, RECENT, H, K].

    Several programs for each ballot; the last of them elects, which compares positions of so many `bits` by numbers of
    votes of so many vote_bits.
    """
    n = tl.load(seq_len).to(tl.int32) if c.SEQ_LEN_IN_MEMORY else seq_len
    ballot = tl.program_id(0) % c.BALLOTS
    part = tl.program_id(0) // c.BALLOTS
    parts = tl.num_programs(0) // c.BALLOTS
    counts_ptr += ballot * stride_counts
    voted_ptr += ballot * stride_voted
    mid_hi = n - local_size
    for first in range(part * c.BLOCK, num_winners, parts * c.BLOCK):
        index = first + tl.arange(0, c.BLOCK)
        token = index // c.OF_TOKEN % c.EARLIER
        row = (n - 1 - c.EARLIER + token + c.RECENT) % c.RECENT
        row = (index // (c.OF_TOKEN * c.EARLIER) * c.RECENT + row) * c.BALLOTS + ballot
        winner = tl.load(winner_ptr + row * c.OF_TOKEN + index % c.OF_TOKEN, mask=index < num_winners, other=-1)
        # After tokens were taken back, winners of those before may be in the local part.
        winner = tl.where((winner >= global_size) & (winner < mid_hi), winner, NOWHERE)
        winner = pool(winner, global_size, mid_hi, c.VOTE_SIZE)
        cast = winner != NOWHERE
        before = tl.atomic_add(counts_ptr + winner, 1, mask=cast, sem="relaxed")
        if c.BY_LEVEL:
            levels_ptr = num_votes_ptr + ballot * stride_votes + 1
            tl.atomic_add(levels_ptr + before, 1, mask=cast & (before < levels), sem="relaxed")
        else:
            entering = (cast & (before == 0)).to(tl.int32)
            num_before = tl.atomic_add(voted_ptr, tl.sum(entering, axis=0), sem="relaxed")
            slot = num_before + tl.cumsum(entering, axis=0) - 1
            tl.store(voted_ptr + POSITIONS + slot, winner, mask=entering > 0)
    if not c.BY_LEVEL:
        tl.debug_barrier()  # all threads' numbers before this program's one release
        if tl.atomic_add(voted_ptr + FINISHED, 1, sem="acq_rel", scope="gpu") == parts - 1:
            elect_most(voted_ptr, counts_ptr, elected_ptr + ballot * stride_elected, max_spans, bits, vote_bits, c)


@triton.jit
def elect_most(voted_ptr, counts_ptr, elected_ptr, max_spans, bits, vote_bits, c: tl.constexpr):
    """Write the list for `add_votes` from all positions that have votes.

    These are ordered by numbers that no two share; the bits of the last one that is kept are found one by one.
    """
    num_voted = tl.load(voted_ptr)
    threshold = tl.cast(0, tl.int64)
    reached = num_voted
    bit = bits + vote_bits - 1
    while (bit >= 0) & (reached > max_spans):
        higher = threshold | (tl.cast(1, tl.int64) << bit)
        count = 0
        for first in range(0, num_voted, c.BLOCK_V):
            _, ranked = ranked_positions(voted_ptr, counts_ptr, first, num_voted, bits, c)
            count += tl.sum((ranked >= higher).to(tl.int32), axis=0)
        threshold = tl.where(count >= max_spans, higher, threshold)
        reached = tl.where(count >= max_spans, count, reached)
        bit -= 1
    place = 0
    for first in range(0, num_voted, c.BLOCK_V):
        position, ranked = ranked_positions(voted_ptr, counts_ptr, first, num_voted, bits, c)
        kept = ranked >= threshold
        tl.store(elected_ptr + place + tl.cumsum(kept.to(tl.int32), axis=0) - 1, position + 1, mask=kept)
        place += tl.sum(kept.to(tl.int32), axis=0)


@triton.jit
def ranked_positions(voted_ptr, counts_ptr, first, num_voted, bits, c: tl.constexpr):
    """Positions [BLOCK_V], and int64 by which one with more votes, or of equal votes the lower, is larger; -1 beyond
    the last.
    """
    offs_v = first + tl.arange(0, c.BLOCK_V)
    position = tl.load(voted_ptr + POSITIONS + offs_v, mask=offs_v < num_voted, other=0)
    votes = tl.load(counts_ptr + position, mask=offs_v < num_voted, other=0).to(tl.int64)
    ranked = (votes << bits) | ((tl.cast(1, tl.int64) << bits) - 1 - position)
    return position, tl.where(offs_v < num_voted, ranked, -1)


@triton.jit
def elect_by_counts(scratch, winner_ptr, stride_counts, step, first_ballot, all_arrived, c: tl.constexpr):
    """Steps 4 and 5 for every step.selectors-th ballot: its winners are added to the votes that there are.

    Where other programs score meanwhile, the first round has no winners: it brings the code into the cache.
    """
    for ballot in range(first_ballot, c.BALLOTS, step.selectors):
        counts_ptr = scratch.counts + ballot * stride_counts
        elected_ptr = scratch.elected + ballot * c.P_PAD
        last_row = (ballot + 1) * c.BALLOT_ROWS
        for time in range(1 if c.ALONE else 0, c.ROUNDS + 1):
            if not c.ALONE:
                if time == 1:
                    wait(scratch.counters, all_arrived)
            first_row = ballot * c.BALLOT_ROWS + (time - 1) * c.ROUND_ROWS
            stop_row = tl.where(time == 0, first_row, last_row)
            winner = winners_of(scratch.candidate, first_row, stop_row, c.ROUND_ROWS, c)
            if c.RECENT:
                heads = first_row + tl.arange(0, c.ROUND_ROWS)
                leave_winners(winner, winner_ptr, step.n - 1, heads, heads < stop_row, c)
            winner = pool(tl.reshape(winner, [c.ROUND_PAD]), step.mid_lo, step.mid_hi, c.VOTE_SIZE)
            add_votes(winner, counts_ptr, elected_ptr, step.max_spans, c)
        kept = load_elected(elected_ptr, c.P_PAD, c)
        sort(kept, scratch.kept + ballot * c.KEPT_PAD, scratch.num_kept + ballot, c.KEPT_PAD)
    tl.debug_barrier()  # before these writes are published


@triton.jit
def load_elected(elected_ptr, SIZE: tl.constexpr, c: tl.constexpr):
    """The positions with most votes so far, int32 [SIZE], NOWHERE where there are fewer."""
    offs_p = tl.arange(0, SIZE)
    elected = tl.load(elected_ptr + offs_p, mask=offs_p < c.P_PAD, other=0) - 1
    return tl.where(elected < 0, NOWHERE, elected)


@triton.jit
def add_votes(winner, counts_ptr, elected_ptr, max_spans, c: tl.constexpr):
    """Cast the votes of winner int32 [ROUND_PAD], and bring the list of positions with most votes up to date.

    elected_ptr int32 [P_PAD] has up to max_spans of them, each with 1 added, no two alike; zeros follow.
    """
    # Both by turns, in one row: what is elected counts as coming before all winners, so that of equal positions one,
    # the first, stands for all.
    both = tl.reshape(tl.join(load_elected(elected_ptr, c.ROUND_PAD, c), winner), [2 * c.ROUND_PAD])
    turn = tl.arange(0, 2 * c.ROUND_PAD)
    order = turn // 2 + turn % 2 * c.ROUND_PAD
    same = both[:, None] == both[None, :]
    weight = (turn % 2)[None, :] + ((order[None, :] < order[:, None]).to(tl.int32) << 16)
    seen = tl.sum(tl.where(same, weight, 0), axis=1)  # votes of this round, and above them how many come before
    first = (seen < (1 << 16)) & (both != NOWHERE)
    votes = tl.load(counts_ptr + both, mask=first, other=0) + seen
    tl.debug_barrier()  # all have read: of so few numbers several threads have the same, of which one writes
    tl.store(counts_ptr + both, votes, mask=first)
    ranked = tl.where(first, pack(votes, both), 0)
    ahead = tl.sum((ranked[None, :] > ranked[:, None]).to(tl.int32), axis=1)
    tl.store(elected_ptr + ahead, both + 1, mask=first & (ahead < max_spans))
    tl.debug_barrier()  # before other threads of this program read list and counts
