"""Section 3, steps 3 to 5, for a decode step whose token votes together with those before it, or layer after layer.

The winners of earlier tokens are kept from step to step (`new_winners` in minirea.kernels.votes). Between two steps one
key enters the middle, so that a list of winners is brought up to date by one score, and a step searches for its own
token alone. Votes are counted in memory, and a list of the max_spans positions that have most goes from round to round
and from layer to layer: votes only grow, so a position that is not on the list and gets no vote in a round cannot get
onto it.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM102  (an `if` on constants is decided at compile time only if it stands alone)

from __future__ import annotations

import triton
import triton.language as tl

from minirea.kernels.fused.memory import load_rows, of_head
from minirea.kernels.fused.order import NO_KEY, NO_SCORE, NOWHERE, pack, position_of, take_best, to_order
from minirea.kernels.fused.sync import wait
from minirea.kernels.fused.vote import pool, sort

# Where the lists of winners begin; before them lies, for how many cached tokens they hold.
LISTS: tl.constexpr = tl.constexpr(2)
LARGEST: tl.constexpr = tl.constexpr((1 << 63) - 1)


@triton.jit
def lists_of(winner_ptr, n, token, head, c: tl.constexpr):
    """Where the winners of rows (token, head) lie; token 0 is the oldest that votes, the last one this step's.

    Each is where its place in the context says, modulo WINDOW, so that it stays there until the token votes no more.
    """
    return winner_ptr + LISTS + ((n + token) % c.WINDOW * (c.G * c.GROUP) + head) * c.K_PAD


@triton.jit
def elect_with_recent(
    scratch, winner_ptr, stride_counts, step, first_ballot, ballot_stride, all_arrived, fresh, c: tl.constexpr
):  # fmt: skip
    """Steps 4 and 5 for some ballots: in rounds, earlier tokens' winners first, while the workers still search for this
    token's. Where no list holds (fresh), the workers search for all.
    """
    for ballot in range(first_ballot, c.BALLOTS, ballot_stride):
        counts_ptr = scratch.counts + ballot * stride_counts
        elected_ptr = scratch.elected + ballot * c.P_PAD
        # There is an early round in any case: it brings the code into the cache.
        for time in range(c.EARLY_ROUNDS + c.OWN_ROUNDS):
            own = time >= c.EARLY_ROUNDS
            searched = own | fresh
            if not c.ALONE:
                if searched:
                    wait(scratch.counters, all_arrived)
            first_row = time * c.ROUND_ROWS + tl.where(own, c.EARLY_ROWS - c.EARLY_ROUNDS * c.ROUND_ROWS, 0)
            stop_row = tl.where(own, c.EARLY_ROWS + c.BALLOT_ROWS, c.EARLY_ROWS)
            rows = first_row + tl.arange(0, c.ROUND_ROWS)
            token = rows // c.BALLOT_ROWS
            head = ballot * c.BALLOT_ROWS + rows % c.BALLOT_ROWS
            list_ptrs = lists_of(winner_ptr, step.n, token, head, c)[:, None] + tl.arange(0, c.K_PAD)[None, :]
            is_kept = (rows < tl.where(searched, 0, stop_row))[:, None]
            is_found = (rows < tl.where(searched, stop_row, 0))[:, None]
            best = tl.load(list_ptrs, mask=is_kept, other=NO_KEY)
            if searched | (time == 0):
                found = merge_rows(scratch.candidate, token, head, is_found, c)
                tl.store(list_ptrs, found, mask=is_found)
                best = tl.where(searched, found, best)
            winner = position_of(tl.reshape(best, [c.ROUND_PAD]))
            winner = tl.where(winner < 0, NOWHERE, winner)
            add_votes(pool(winner, step.mid_lo, step.mid_hi, c.VOTE_SIZE), counts_ptr, elected_ptr, step.max_spans, c)
        kept = load_elected(elected_ptr, c.P_PAD, c)
        sort(kept, scratch.kept + ballot * c.KEPT_PAD, scratch.num_kept + ballot, c.KEPT_PAD)
    tl.debug_barrier()  # before these writes are published


@triton.jit
def merge_rows(candidate_ptr, token, head, present, c: tl.constexpr):
    """The winners of rows (token, head) from all slices' candidates: int64 [rows, K_PAD], NO_KEY where not present."""
    offs_c = tl.arange(0, c.CANDIDATES_PAD)
    row = (head // c.GROUP * c.WINDOW + token) * c.GROUP + head % c.GROUP
    ptrs = candidate_ptr + row.to(tl.int64)[:, None] * c.CANDIDATES + offs_c[None, :]
    return take_best(tl.load(ptrs, mask=present & (offs_c < c.CANDIDATES)[None, :], other=NO_KEY), c.K, c.K_PAD)


@triton.jit
def load_elected(elected_ptr, SIZE: tl.constexpr, c: tl.constexpr):
    """The positions with most votes so far, int32 [SIZE], NOWHERE where there are fewer."""
    offs_p = tl.arange(0, SIZE)
    elected = tl.load(elected_ptr + offs_p, mask=offs_p < c.P_PAD, other=0) - 1
    return tl.where(elected < 0, NOWHERE, elected)


@triton.jit
def add_votes(winner, counts_ptr, elected_ptr, max_spans, c: tl.constexpr):
    """Cast the votes of winner int32 [ROUND_PAD], and bring the list of positions with most votes up to date.

    elected_ptr int32 [P_PAD] has up to max_spans of them, each with 1 added, most votes first and of equal votes the
    lowest position first; zeros follow.
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


@triton.jit
def prepare_next(q, k, scratch, winner_ptr, stride_counts, step, first_ballot, ballot_stride, c: tl.constexpr):
    """Leave lists of winners for the next step, and no votes unless later layers add to them.

    q has this step's token and those before it. It is done while the workers attend.
    """
    for ballot in range(first_ballot, c.BALLOTS, ballot_stride):
        if not c.CARRIES:
            clear_votes(scratch, winner_ptr, stride_counts, step, ballot, c)
        if c.WINDOW > 1:
            for g in range(ballot * (c.G // c.BALLOTS), (ballot + 1) * (c.G // c.BALLOTS)):
                for first_row in range(c.GROUP, c.WINDOW * c.GROUP, c.UPDATED_M):
                    enter_key(q, of_head(k, g), winner_ptr, step.n, step.mid_hi, g, first_row, c)
    if first_ballot == 0:
        tl.store(winner_ptr, step.n.to(tl.int64))


@triton.jit
def enter_key(q, k, winner_ptr, n, position, g, first_row, c: tl.constexpr):
    """Bring rows [first_row, first_row + UPDATED_M) of head g up to date with the key at `position`, which enters the
    middle with the next step. It comes after all others, so that it loses to its equals.

    The product is the one of `score`, so that it rounds as there.
    """
    rows = first_row + tl.arange(0, c.UPDATED_M)
    mask_m = rows < c.WINDOW * c.GROUP
    heads = g * c.GROUP + rows % c.GROUP
    offs_k = tl.arange(0, c.K_PAD)[None, :]
    offs_n = tl.arange(0, 16)
    offs_d = tl.arange(0, c.BLOCK_D)
    q_ptrs = q.ptr + (rows // c.GROUP).to(tl.int64)[:, None] * q.stride_n + heads[:, None] * q.stride_h
    mask_md = mask_m[:, None] & (offs_d < c.D)[None, :]
    queries = tl.load(q_ptrs + offs_d[None, :] * q.stride_d, mask=mask_md, other=0.0)
    keys = load_rows(k.ptr, position + offs_n, k.stride_n, offs_n < 1, offs_d, k.stride_d, c.D)
    scores = tl.dot(queries, tl.trans(keys), input_precision=c.PRECISION)
    order = to_order(tl.max(tl.where(offs_n[None, :] < 1, scores, float("-inf")), axis=1))
    entering = tl.where(order > NO_SCORE, pack(order, position), NO_KEY)[:, None]
    list_ptrs = lists_of(winner_ptr, n, rows // c.GROUP, heads, c)[:, None] + offs_k
    best = tl.load(list_ptrs, mask=mask_m[:, None] & (offs_k < c.K), other=LARGEST)
    worst = tl.min(best, axis=1)[:, None]
    slot = tl.min(tl.where(best == worst, offs_k, c.K_PAD), axis=1)[:, None]
    tl.store(list_ptrs, tl.broadcast_to(entering, list_ptrs.shape),
             mask=mask_m[:, None] & (offs_k == slot) & (entering > worst))  # fmt: skip


@triton.jit
def clear_votes(scratch, winner_ptr, stride_counts, step, ballot, c: tl.constexpr):
    """Zero the counts of the positions that have any, and the list."""
    for first_row in range(0, c.EARLY_ROWS + c.BALLOT_ROWS, c.ROUND_ROWS):
        rows = first_row + tl.arange(0, c.ROUND_ROWS)
        head = ballot * c.BALLOT_ROWS + rows % c.BALLOT_ROWS
        list_ptrs = lists_of(winner_ptr, step.n, rows // c.BALLOT_ROWS, head, c)
        present = (rows < c.EARLY_ROWS + c.BALLOT_ROWS)[:, None]
        best = tl.load(list_ptrs[:, None] + tl.arange(0, c.K_PAD)[None, :], mask=present, other=NO_KEY)
        winner = position_of(best)
        position = pool(tl.where(winner < 0, NOWHERE, winner), step.mid_lo, step.mid_hi, c.VOTE_SIZE)
        tl.store(scratch.counts + ballot * stride_counts + position, 0, mask=position != NOWHERE)
    offs_p = tl.arange(0, c.P_PAD)
    tl.store(scratch.elected + ballot * c.P_PAD + offs_p, tl.zeros_like(offs_p))
    tl.debug_barrier()  # before `enter_key` writes lists
