"""Steps 3 and 4 with half the bytes: keys are read as int8, and in full only those that can win.

minirea.kernels.sketch has the bounds. One pass over a slice's sketches keeps every key tile that may hold a survivor;
then the slices of a head exchange their best bounds; then the survivors are found, and scored as `score` would.
A slice with more survivors than there is room for, as with many equal keys, is scored by `score` itself.

P is the number of query heads of a key/value head, padded; a matrix of 2P rows holds the two parts of their integers.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from minirea.kernels import sketch as bounds
from minirea.kernels.fused.memory import load_rows, of_head, prefetch_rows, store_in_place
from minirea.kernels.fused.order import NO_KEY, NO_SCORE, TAKEN, pack, to_order
from minirea.kernels.fused.sync import arrive, wait

LEVELS: tl.constexpr = tl.constexpr(float(bounds.LEVELS))
SMALLEST: tl.constexpr = tl.constexpr(bounds.SMALLEST)
SMALLEST_KEY: tl.constexpr = tl.constexpr(bounds.SMALLEST_KEY)
LARGEST_KEY: tl.constexpr = tl.constexpr(bounds.LARGEST_KEY)
SMALLEST_QUERY: tl.constexpr = tl.constexpr(bounds.SMALLEST_QUERY)
LARGEST_QUERY: tl.constexpr = tl.constexpr(bounds.LARGEST_QUERY)
SLACK: tl.constexpr = tl.constexpr(bounds.SLACK)
FULL: tl.constexpr = tl.constexpr((1 << 63) - 1)  # above every packed score: it fills the places beyond K


# ---------------------------------------------------------------------------------------------------- keys to sketches


@triton.jit
def rotate_for_sketch(x, sketch, c: tl.constexpr):
    """R x of each row: float32 [M, SKETCH_D] from x [M, BLOCK_D]."""
    offs_d = tl.arange(0, c.BLOCK_D)[:, None]
    signs = tl.load(sketch.signs_ptr + offs_d * c.SKETCH_D + tl.arange(0, c.SKETCH_D)[None, :])
    return tl.dot(x, signs, input_precision=c.PRECISION) * c.ROTATION


@triton.jit
def round_up(x):
    """Positive float32 numbers to the next bfloat16 that is no smaller."""
    return ((x.to(tl.int32, bitcast=True) + 0xFFFF) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def norm(x):
    return tl.sqrt(tl.sum(x * x, axis=1))


@triton.jit
def sketch_of(keys, g, sketch, c: tl.constexpr):
    """Codes int8 [M, SKETCH_D] and scales int32 [M] of keys [M, BLOCK_D] of head g."""
    mean = tl.load(sketch.mean_ptr + g * c.SKETCH_D + tl.arange(0, c.SKETCH_D))
    y = rotate_for_sketch(keys, sketch, c) - mean[None, :]
    top = tl.max(tl.abs(y), axis=1)
    scale = tl.where((top > SMALLEST_KEY) & (top < LARGEST_KEY), round_up(top / 127), 0.0)
    inverse = 1 / tl.where(scale > 0, scale, 1.0)
    code = tl.where((scale > 0)[:, None], tl.floor(y * inverse[:, None] + 0.5), 0.0)
    rest = y - scale[:, None] * code
    keys = keys.to(tl.float32)
    error = SLACK * norm(rest) + c.QUERY_ERROR * norm(y) + SMALLEST
    error += c.SUM_ERROR * (tl.sum(tl.abs(keys), axis=1) + norm(keys))
    error = tl.where(error < float("inf"), round_up(error), float("inf"))
    return code.to(tl.int8), scale.to(tl.int32, bitcast=True) | (error.to(tl.int32, bitcast=True) >> 16)


@triton.jit(do_not_specialize=["start", "stop"])
def sketch_kernel(k, sketch, start, stop, c: tl.constexpr):
    """Sketches of keys [start, stop) of all heads; a program takes SKETCHED keys of one head."""
    g = tl.program_id(0) % c.G
    offs_n = start + tl.program_id(0) // c.G * c.SKETCHED + tl.arange(0, c.SKETCHED)
    offs_c = tl.arange(0, c.SKETCH_D)
    mask_n = offs_n < stop
    k_head = of_head(k, g)
    keys = load_rows(k_head.ptr, offs_n, k.stride_n, mask_n, tl.arange(0, c.BLOCK_D), k.stride_d, c.D)
    code, scale = sketch_of(keys, g, sketch, c)
    rows = tl.cast(g, tl.int64) * (sketch.stride_h // c.SKETCH_D) + offs_n
    tl.store(sketch.codes_ptr + rows[:, None] * c.SKETCH_D + offs_c[None, :], code, mask=mask_n[:, None])
    tl.store(sketch.scales_ptr + rows, scale, mask=mask_n)


# --------------------------------------------------------------------------------------------------------------- scores


@triton.jit
def quantize_queries(q, g, sketch, c: tl.constexpr):
    """The queries of head g as two int8 parts, [2 P, SKETCH_D], of integers high * 256 + low, and |q| in their units.

    The norm, float32 [P], is infinite where the integers are no use: the query is too small, too large or not finite.
    It is 0 for rows without a query.
    """
    rows = tl.arange(0, 2 * c.SKETCH_M)
    row = rows % c.SKETCH_M
    queries = load_rows(q.ptr, g * c.GROUP + row, q.stride_h, row < c.GROUP, tl.arange(0, c.BLOCK_D), q.stride_d, c.D)
    z = rotate_for_sketch(queries, sketch, c)
    top = tl.max(tl.abs(z), axis=1)
    length = norm(queries.to(tl.float32))
    usable = (top > SMALLEST_QUERY) & (length < LARGEST_QUERY)
    inverse = LEVELS / tl.where(usable, top, LEVELS)
    x = tl.where(usable[:, None], tl.floor(z * inverse[:, None] + 0.5), 0.0).to(tl.int32)
    high = (x + 128) >> 8
    parts = tl.where((rows < c.SKETCH_M)[:, None], high, x - (high << 8)).to(tl.int8)
    length = tl.where(usable, SLACK * length * inverse, tl.where(row < c.GROUP, float("inf"), 0.0))
    return parts, tl.max(tl.reshape(length, [2, c.SKETCH_M]), axis=0)


@triton.jit
def prefetch_sketches(sketch, g, lo, hi, c: tl.constexpr):
    """The first tiles of [lo, hi) of head g, while queries are loaded and rotated."""
    codes_ptr = sketch.codes_ptr + tl.cast(g, tl.int64) * sketch.stride_h
    prefetch_rows(codes_ptr, c.SKETCH_D, lo, tl.minimum(lo + 2 * c.SKETCH_N, hi), c.SKETCH_D, c.SKETCH_N)


@triton.jit
def scan(parts, length, sketch, g, lo, hi, scratch, program, c: tl.constexpr):
    """Bounds of the scores of keys [lo, hi) of head g, one pass. Keeps, of each row, every tile that may hold one of
    its survivors, and the upper bounds in it.

    A tile can be left out of a row if its largest upper bound is below `threshold`, the K-th largest of the largest
    lower bounds of tiles so far: then K keys have larger scores. Returns how many tiles may hold survivors, [P], of
    which the first ROOM are kept, and the K largest of those lower bounds, [P, K_PAD], infinite in all other places.
    """
    offs_m = tl.arange(0, c.SKETCH_M)
    offs_k = tl.arange(0, c.K_PAD)
    offs_n = tl.arange(0, c.SKETCH_N)
    offs_c = tl.arange(0, c.SKETCH_D)
    part = tl.where(tl.arange(0, 2) == 0, 256, 1)[:, None, None]
    slots = (program * c.GROUP + offs_m) * c.ROOM
    kept = tl.full([c.SKETCH_M], 0, tl.int32)
    best = tl.full([c.SKETCH_M, c.K_PAD], 0, tl.float32) + tl.where(
        (offs_k < c.K)[None, :] & (offs_m < c.GROUP)[:, None], float("-inf"), float("inf")
    )
    threshold = tl.min(best, axis=1)
    head = tl.cast(g, tl.int64) * (sketch.stride_h // c.SKETCH_D) + lo
    for tile in tl.range(0, tl.cdiv(hi - lo, c.SKETCH_N), num_stages=c.SKETCH_STAGES):
        present = offs_n < hi - lo - tile * c.SKETCH_N
        rows = head + tile * c.SKETCH_N + offs_n
        codes = tl.load(sketch.codes_ptr + rows[:, None] * c.SKETCH_D + offs_c[None, :], mask=present[:, None], other=0)
        scales = tl.load(sketch.scales_ptr + rows, mask=present, other=0)
        products = tl.reshape(tl.dot(parts, tl.trans(codes), out_dtype=tl.int32), [2, c.SKETCH_M, c.SKETCH_N])
        base = tl.sum(products * part, axis=0).to(tl.float32)
        base *= (scales & -65536).to(tl.float32, bitcast=True)[None, :]
        margin = length[:, None] * (scales << 16).to(tl.float32, bitcast=True)[None, :]
        upper = tl.where(present[None, :], base + margin, float("-inf"))
        largest_upper = tl.max(upper, axis=1)
        largest_lower = tl.max(tl.where(present[None, :], base - margin, float("-inf")), axis=1)
        reaches = largest_upper >= threshold
        keep = reaches & (kept < c.ROOM)
        slot = slots + tl.minimum(kept, c.ROOM - 1)
        store_in_place(scratch.upper + slot.to(tl.int64) * c.SKETCH_N, upper, keep, False)
        tl.store(scratch.tile + slot, tl.zeros_like(slot) + tile, mask=keep)
        tl.store(scratch.tile_upper + slot, largest_upper, mask=keep)
        kept += reaches.to(tl.int32)
        worst = tl.min(tl.where(best == threshold[:, None], offs_k[None, :], c.K_PAD), axis=1)
        better = (offs_k[None, :] == worst[:, None]) & (largest_lower > threshold)[:, None]
        best = tl.where(better, largest_lower[:, None], best)
        threshold = tl.min(best, axis=1)
    return kept, best


@triton.jit
def threshold_of_slices(best, g, part, scratch, counter_ptr, c: tl.constexpr):
    """The K-th largest lower bound of all slices of head g, [P], from those of each: K keys reach it, whichever slices
    they are in. Infinite for rows without a query.

    By its own bounds alone every slice has survivors, most of which other slices rule out: read one by one from all
    over the cache, they cost more than this wait.
    """
    threshold = tl.min(best, axis=1)
    if c.SLICES > 1:  # then each is another program's
        offs_m = tl.arange(0, c.SKETCH_M)
        offs_k = tl.arange(0, c.K_PAD)[None, :]
        offs_c = tl.arange(0, c.CANDIDATES_PAD)[None, :]
        mask_m = (offs_m < c.GROUP)[:, None]
        lower_ptrs = scratch.lower + (g * c.GROUP + offs_m)[:, None] * c.CANDIDATES
        tl.store(lower_ptrs + part * c.K_PAD + offs_k, best, mask=mask_m & (offs_k < c.K))
        wait(counter_ptr, arrive(counter_ptr, c.SLICES))
        present = mask_m & (offs_c < c.CANDIDATES) & (offs_c % c.K_PAD < c.K)
        lower = tl.load(lower_ptrs + offs_c, mask=present, other=float("-inf"))
        for _ in range(c.K):
            threshold = tl.max(lower, axis=1)
            place = tl.min(tl.where(lower == threshold[:, None], offs_c, c.CANDIDATES_PAD), axis=1)
            lower = tl.where(offs_c == place[:, None], float("-inf"), lower)
        threshold = tl.where(offs_m < c.GROUP, threshold, float("inf"))
    return threshold


@triton.jit
def live_tiles(kept, threshold, scratch, program, c: tl.constexpr):
    """Which of the kept tiles the threshold leaves: writes their places in scratch.live, returns how many there are."""
    first_slot = program * (c.GROUP * c.ROOM)
    offs_m = tl.arange(0, c.SKETCH_M)
    offs_r = tl.arange(0, c.ROOM)[None, :]
    slot = offs_m[:, None] * c.ROOM + offs_r
    tl.store(scratch.threshold + program * c.SKETCH_M + offs_m, threshold)
    tl.debug_barrier()  # other threads of this program wrote what is read here
    upper = tl.load(scratch.tile_upper + first_slot + slot, mask=offs_r < kept[:, None], other=float("-inf"))
    live = (offs_r < kept[:, None]) & (upper >= threshold[:, None])
    place, num_live = places(live.to(tl.int32))
    tl.store(scratch.live + first_slot + place, slot, mask=live)
    tl.debug_barrier()  # before other threads of this program read them
    return num_live


@triton.jit
def places(chosen):
    """Of the ones in int32 [M, N], row by row, the place of each; and how many there are. A prefix sum within rows, in
    which threads of one warp lie side by side, and one over rows take fewer instructions than one over all.
    """
    count = tl.sum(chosen, axis=1)
    before = tl.cumsum(count, axis=0) - count
    return before[:, None] + tl.cumsum(chosen, axis=1) - chosen, tl.sum(count, axis=0)


@triton.jit
def survivors(num_live, lo, scratch, program, c: tl.constexpr):
    """The keys of the live tiles whose upper bounds reach their row's threshold.

    Writes them to scratch.survivor, positions and then rows, unless there are more than SURVIVORS; returns how many
    there are.
    """
    first_slot = program * (c.GROUP * c.ROOM)
    survivor_ptr = scratch.survivor + program * (2 * c.SURVIVORS)
    offs_n = tl.arange(0, c.SKETCH_N)[None, :]
    found = 0
    for first in range(0, num_live, c.LIVE_M):
        offs_l = first + tl.arange(0, c.LIVE_M)
        mask_l = offs_l < num_live
        slot = tl.load(scratch.live + first_slot + offs_l, mask=mask_l, other=0)
        row = slot // c.ROOM
        tile = tl.load(scratch.tile + first_slot + slot)
        limit = tl.load(scratch.threshold + program * c.SKETCH_M + row)
        upper_ptrs = scratch.upper + (first_slot + slot).to(tl.int64)[:, None] * c.SKETCH_N + offs_n
        upper = tl.load(upper_ptrs, mask=mask_l[:, None], other=float("-inf"))
        survives = (upper >= limit[:, None]) & (upper > float("-inf"))  # beyond the slice it is -inf
        place, count = places(survives.to(tl.int32))
        place += found
        fits = survives & (place < c.SURVIVORS)
        found += count
        tl.store(survivor_ptr + place, (lo + tile * c.SKETCH_N)[:, None] + offs_n, mask=fits)
        tl.store(survivor_ptr + c.SURVIVORS + place, tl.broadcast_to(row[:, None], upper.shape), mask=fits)
    tl.debug_barrier()  # before other threads of this program read them
    return found


@triton.jit
def score_survivors(q, k, g, found, survivor_ptr, candidate_ptr, c: tl.constexpr):
    """`score` and `pick` for the survivors alone; writes what `pick` does, in another order.

    The product is the one of `score`, so that it rounds as there.
    """
    offs_m = tl.arange(0, c.BLOCK_M)
    offs_k = tl.arange(0, c.K_PAD)[None, :]
    offs_n = tl.arange(0, c.BLOCK_N)
    offs_d = tl.arange(0, c.BLOCK_D)
    queries = load_rows(q.ptr, g * c.GROUP + offs_m, q.stride_h, offs_m < c.GROUP, offs_d, q.stride_d, c.D)
    best = tl.full([c.BLOCK_M, c.K_PAD], 0, tl.int64) + tl.where(offs_k < c.K, NO_KEY, FULL)
    for first in range(0, found, c.BLOCK_N):
        present = first + offs_n < found
        position = tl.load(survivor_ptr + first + offs_n, mask=present, other=0)
        row = tl.load(survivor_ptr + c.SURVIVORS + first + offs_n, mask=present, other=-1)
        keys = load_rows(k.ptr, position, k.stride_n, present, offs_d, k.stride_d, c.D)
        order = to_order(tl.dot(queries, tl.trans(keys), input_precision=c.PRECISION))
        counts = (row[None, :] == offs_m[:, None]) & (order > NO_SCORE)
        packed = tl.where(counts, pack(order, position[None, :]), NO_KEY)
        for _ in range(c.K):
            top = tl.max(packed, axis=1)[:, None]
            packed = tl.where(packed == top, TAKEN, packed)
            worst = tl.min(best, axis=1)[:, None]
            slot = tl.min(tl.where(best == worst, offs_k, c.K_PAD), axis=1)[:, None]
            best = tl.where((offs_k == slot) & (top > worst), top, best)
    candidate_ptrs = candidate_ptr + offs_m[:, None] * c.CANDIDATES + offs_k
    tl.store(candidate_ptrs, tl.where(offs_k < c.K, best, NO_KEY), mask=(offs_m < c.GROUP)[:, None])
    tl.debug_barrier()  # before this program's next unit writes there again
