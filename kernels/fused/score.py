"""Section 3, steps 3 and 4: for every query row the best keys of the middle, exact and with ties settled."""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: RET505  (an `if` on constants is decided at compile time only with its `else`)

from __future__ import annotations

import triton
import triton.language as tl

from minirea.kernels.fused.memory import load_rows, prefetch_rows, store_in_place
from minirea.kernels.fused.order import NO_KEY, NO_SCORE, NOWHERE, pack, position_of, take_best, to_order


@triton.jit
def score_slice(q, k, block_ptr, tag_ptr, g, first_row, num_rows, lo, hi, c: tl.constexpr):
    """`score` for rows [first_row, first_row + BLOCK_M) of head g's num_rows and keys [lo, hi) of that head, k."""
    prefetch_rows(k.ptr, k.stride_n, lo, tl.minimum(lo + c.BLOCK_N, hi), c.D, c.BLOCK_N)  # while queries are loaded
    rows = first_row + tl.arange(0, c.BLOCK_M)
    offs_d = tl.arange(0, c.BLOCK_D)
    heads = g * c.GROUP + rows % c.GROUP
    q_ptrs = q.ptr + (rows // c.GROUP).to(tl.int64)[:, None] * q.stride_n + heads[:, None] * q.stride_h
    mask_md = (rows < num_rows)[:, None] & (offs_d < c.D)[None, :]
    queries = tl.load(q_ptrs + offs_d[None, :] * q.stride_d, mask=mask_md, other=0.0)
    score(queries, k, lo, hi, block_ptr, tag_ptr, c)


@triton.jit
def score(queries, k, lo, hi, block_ptr, tag_ptr, c: tl.constexpr):
    """Keep, for each row of queries [M, D], the K key tiles of [lo, hi) with the largest maxima and all their scores.

    Step 3. A winner in any other tile would have K better keys before it, so these tiles hold all winners. A tile costs
    one matrix product and one maximum per row; only rows that the tile improves do more: they write their scores over
    those of the tile that drops out. Later tiles must be strictly better, and of equal ones the latest drops out, so
    ties keep the lower.

    Writes block_ptr float32 [M, K_PAD, N] and tag_ptr int32 [M, K_PAD]: tile * K_PAD + slot, below zero in a slot
    without a tile.
    """
    offs_m = tl.arange(0, c.BLOCK_M)
    offs_k = tl.arange(0, c.K_PAD)
    offs_n = tl.arange(0, c.BLOCK_N)
    offs_d = tl.arange(0, c.BLOCK_D)
    tag = tl.full([c.BLOCK_M, c.K_PAD], 0, tl.int32) + (offs_k - c.K_PAD)[None, :]
    best = tl.full([c.BLOCK_M, c.K_PAD], 0, tl.float32) + tl.where(offs_k < c.K, float("-inf"), float("inf"))[None, :]
    for tile in tl.range(0, tl.cdiv(hi - lo, c.BLOCK_N), num_stages=c.STAGES):
        start = lo + tile * c.BLOCK_N
        k_tile = k.ptr + tl.cast(start, tl.int64) * k.stride_n
        # Keys beyond hi get no score, so where there are some they may be loaded: a mask takes registers and time.
        mask_n = offs_n < (c.BLOCK_N if c.WHOLE_TILES else hi - start)
        keys = load_rows(k_tile, offs_n, k.stride_n, mask_n, offs_d, k.stride_d, c.D)
        scores = tl.dot(queries, tl.trans(keys), input_precision=c.PRECISION)
        if start + c.BLOCK_N > hi:
            scores = tl.where((offs_n < hi - start)[None, :], scores, float("-inf"))
        row_max = tl.max(scores, axis=1)
        threshold = tl.min(best, axis=1)
        better = row_max > threshold
        worst = tl.max(tl.where(best == threshold[:, None], tag, -c.K_PAD), axis=1)
        slot = worst & (c.K_PAD - 1)
        row_ptrs = block_ptr + (offs_m * c.K_PAD + slot) * c.BLOCK_N
        store_in_place(row_ptrs, scores, better, queries.dtype != tl.float32)
        replaced = (tag == worst[:, None]) & better[:, None]
        tag = tl.where(replaced, (tile * c.K_PAD + slot)[:, None], tag)
        best = tl.where(replaced, row_max[:, None], best)
    tl.store(tag_ptr + offs_m[:, None] * c.K_PAD + offs_k[None, :], tag)


@triton.jit
def kept_tiles(block_ptr, tag_ptr, first, stop, c: tl.constexpr):
    """What `score` kept for rows [first, first + PICK_M) below stop: tags int32 [PICK_M, K_PAD, 1], scores float32
    [PICK_M, K_PAD, N].
    """
    offs_m = first + tl.arange(0, c.PICK_M)
    offs_k = tl.arange(0, c.K_PAD)
    offs_n = tl.arange(0, c.BLOCK_N)[None, None, :]
    slot = (offs_m[:, None] * c.K_PAD + offs_k[None, :])[:, :, None]
    kept = ((offs_m < stop)[:, None] & (offs_k < c.K)[None, :])[:, :, None]
    tag = tl.load(tag_ptr + slot, mask=kept, other=-1)
    # Slots without a tile are not read: they were not written, so no cache has them.
    return tag, tl.load(block_ptr + slot * c.BLOCK_N + offs_n, mask=tag >= 0, other=float("-inf"))


@triton.jit
def pick(block_ptr, tag_ptr, candidate_ptr, num_rows, lo, c: tl.constexpr):
    """The K best keys of each row within the tiles that `score` kept. Step 4, for one slice of the middle.

    Writes candidate_ptr int64, K_PAD packed numbers per row; rows lie CANDIDATES apart.
    """
    tl.debug_barrier()  # other threads of this program wrote what is read here
    # Of three such axes the compiler gives the first to the warps, the second to each thread and the last to the
    # threads of a warp. So warps have rows of their own, and none waits for another in a reduction.
    offs_k = tl.arange(0, c.K_PAD)
    offs_n = tl.arange(0, c.BLOCK_N)[None, None, :]
    stop = tl.minimum(num_rows, c.BLOCK_M)
    tag, scores = kept_tiles(block_ptr, tag_ptr, 0, stop, c)
    for first in range(0, stop, c.PICK_M):
        # The next rows are on their way while these are reduced.
        next_tag, next_scores = kept_tiles(block_ptr, tag_ptr, first + c.PICK_M, stop, c)
        # Hardware has the maximum of a warp's integers as one instruction, of its floats as ten.
        order = to_order(scores)
        position = lo + tag // c.K_PAD * c.BLOCK_N + offs_n
        best = tl.full([c.PICK_M, c.K_PAD], NO_KEY, tl.int64)
        for i in range(c.K):
            top = tl.max(tl.max(order, axis=1), axis=1)
            lowest = tl.where(order == top[:, None, None], position, NOWHERE)
            lowest = tl.min(tl.min(lowest, axis=1), axis=1)
            packed = tl.where(top > NO_SCORE, pack(top, lowest), NO_KEY)
            best = tl.where(offs_k[None, :] == i, packed[:, None], best)
            order = tl.where(position == lowest[:, None, None], NO_SCORE, order)
        offs_m = first + tl.arange(0, c.PICK_M)
        candidate_ptrs = candidate_ptr + offs_m[:, None] * c.CANDIDATES + offs_k[None, :]
        tl.store(candidate_ptrs, best, mask=(offs_m < num_rows)[:, None])
        tag = next_tag
        scores = next_scores
    tl.debug_barrier()  # before this program's next unit writes there again


@triton.jit
def merge(candidate_ptr, first_row, last_row, ROWS: tl.constexpr, c: tl.constexpr):
    """The winners of rows [first_row, last_row) from all slices' candidates. Step 4.

    Returns int32 [ROWS, K_PAD] cache positions, NOWHERE in the places of masked rows and absent keys.
    """
    rows = first_row + tl.arange(0, ROWS)
    offs_c = tl.arange(0, c.CANDIDATES_PAD)
    packed = tl.load(
        candidate_ptr + rows.to(tl.int64)[:, None] * c.CANDIDATES + offs_c[None, :],
        mask=(rows < last_row)[:, None] & (offs_c < c.CANDIDATES)[None, :],
        other=NO_KEY,
    )
    winner = position_of(take_best(packed, c.K, c.K_PAD))
    return tl.where(winner < 0, NOWHERE, winner)


@triton.jit
def winners_of(candidate_ptr, first_row, last_row, ROWS: tl.constexpr, c: tl.constexpr):
    """`merge`, or what a launch that searched has left of it in the candidates' place."""
    if c.SEARCHES:
        return merge(candidate_ptr, first_row, last_row, ROWS, c)
    else:
        rows = first_row + tl.arange(0, ROWS)
        ptrs = candidate_ptr + rows.to(tl.int64)[:, None] * c.K_PAD + tl.arange(0, c.K_PAD)[None, :]
        return tl.load(ptrs, mask=(rows < last_row)[:, None], other=NOWHERE)


@triton.jit
def leave_winners(winner, winner_ptr, position, head, present, c: tl.constexpr):
    """Leave rows' winners int32 [rows, K_PAD], by the position of their token and their head, for later tokens' votes.

    winner_ptr int32 [RECENT, heads, K], -1 where there is no winner.
    """
    offs_k = tl.arange(0, c.K_PAD)[None, :]
    row = position % c.RECENT * (c.VOTING_HEADS * c.GROUP) + head
    found = tl.where(winner == NOWHERE, -1, winner)
    tl.store(winner_ptr + row[:, None] * c.K + offs_k, found, mask=present[:, None] & (offs_k < c.K))


@triton.jit
def store_winners(candidate_ptr, winner_ptr, first_row, last_row, ROWS: tl.constexpr, c: tl.constexpr):
    """Leave the winners of rows [first_row, last_row) for `winners_of`."""
    winner = merge(candidate_ptr, first_row, last_row, ROWS, c)
    rows = first_row + tl.arange(0, ROWS)
    ptrs = winner_ptr + rows.to(tl.int64)[:, None] * c.K_PAD + tl.arange(0, c.K_PAD)[None, :]
    tl.store(ptrs, winner, mask=(rows < last_row)[:, None])
