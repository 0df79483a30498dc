"""A decode step's kernels besides attention: one row of activations against every matrix of the model.

    embed         token id -> x, and one more cached token
    norm_qkv      x -> q, and k and v into the cache
    (reattention  q, cache -> out)
    add_product   out -> x, through the output projection; also the MLP's last product
    norm_gate_up  x -> silu(gate) * up
    norm_logits   x -> logits
    best_token    logits -> the next token id

A token at batch one costs one read of the weights, so each kernel is a stream of weights with as little as possible
around it. They are of the model's dtype, or quantized to one byte or half of one each (minirea.quantize). A program
owns a few rows of the matrix, keeps its next tile of weights in flight while it multiplies this one, and needs no other
program. RMSNorm costs no pass of its own: W (g * x / rms) = (W (g * x)) / rms, and the program that multiplies g * x
sums the squares of x on the way.

On Hopper the kernels are launched as programmatic dependents: a kernel's programs start on the SMs that the one before
it frees, read their first weights, which no kernel writes, and only then wait for it to end. Every program waits, so
that the end of a kernel also means the end of all kernels before it.

Letters are the project's: E model width, F MLP width, V vocabulary, H, G, D heads and head dim. x is a vector in the
model's dtype, products are summed in float32.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minirea.kernels.launching import cdiv, launch, next_power_of_2
from minirea.kernels.near import Near, near_rows
from minirea.quantize import GROUP_SIZE, ZERO, QuantizedMatrix

Matrix = torch.Tensor | QuantizedMatrix

# ------------------------------------------------------------------------------------------------------------- device

GROUP_8: tl.constexpr = tl.constexpr(GROUP_SIZE[8])
GROUP_4: tl.constexpr = tl.constexpr(GROUP_SIZE[4])
ZERO_8: tl.constexpr = tl.constexpr(ZERO[8])
ZERO_4: tl.constexpr = tl.constexpr(ZERO[4])
LOWERED: tl.constexpr = tl.constexpr(69)  # x may be 2^48, far above any activation, and 2^-57 with all its bits


@triton.jit
def load_weights(w_ptrs, offs_k, K: tl.constexpr):
    """A tile of weights at columns offs_k, zero beyond K. Each is used once: the first to leave the caches."""
    return tl.load(w_ptrs + offs_k[None, :], mask=(offs_k < K)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def product(
    w_ptr, scale_ptr, rows, x_ptr, norm_ptr, eps, K: tl.constexpr, NORM: tl.constexpr, BLOCK_K: tl.constexpr,
    BITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """W[rows] . x, or with NORM W[rows] . rms_norm(x): float32 [rows]. W is row-major with K columns.

    With BITS w_ptr and scale_ptr are those of a QuantizedMatrix.
    """
    if BITS:
        out, squares = product_of_words(w_ptr, scale_ptr, rows, x_ptr, norm_ptr, K, NORM, BLOCK_K, BITS, EARLY)
    else:
        out, squares = product_of_values(w_ptr, rows, x_ptr, norm_ptr, K, NORM, BLOCK_K, EARLY)
    if NORM:
        out *= tl.rsqrt(squares / K + eps)
    return out


@triton.jit
def product_of_values(
    w_ptr, rows, x_ptr, norm_ptr, K: tl.constexpr, NORM: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """W[rows] . x, with x times the norm's weights where it is normed, and the sum of the squares of x."""
    if EARLY:
        gdc_launch_dependents()
    offs_k = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + rows.to(tl.int64)[:, None] * K
    w = load_weights(w_ptrs, offs_k, K)
    if EARLY:
        gdc_wait()
    acc = tl.zeros([rows.shape[0], BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for _ in range(0, K, BLOCK_K):
        following = load_weights(w_ptrs, offs_k + BLOCK_K, K)
        mask_k = offs_k < K
        x = tl.load(x_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x *= tl.load(norm_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        acc += w.to(tl.float32) * x[None, :]
        w = following
        offs_k += BLOCK_K
    return tl.sum(acc, axis=1), tl.sum(squares, axis=0)


@triton.jit
def load_words(
    w_ptrs, scale_ptrs, first, BLOCK_U: tl.constexpr, W: tl.constexpr, UNITS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """BLOCK_U units from `first` on: words [rows, 4 units], and a word of scale and offset of each [rows, units].

    Zero beyond W, which EVEN tiles do not reach.
    """
    offs_w = first * 4 + tl.arange(0, 4 * BLOCK_U)
    offs_u = first + tl.arange(0, BLOCK_U)
    # For the layout: threads side by side take units of one row, and of scales one each, as they do of units.
    scale_ptrs = tl.multiple_of(tl.max_contiguous(scale_ptrs + (offs_u // UNITS)[None, :], [1, 2]), [4, 4])
    if EVEN:
        w = tl.load(w_ptrs + offs_w[None, :], eviction_policy="evict_first")
        scale = tl.load(scale_ptrs)
    else:
        w = tl.load(w_ptrs + offs_w[None, :], mask=(offs_w < W)[None, :], other=0, eviction_policy="evict_first")
        scale = tl.load(scale_ptrs, mask=(offs_u < W // 4)[None, :], other=0)
    return w, scale


@triton.jit
def quarters(tile, M: tl.constexpr, N: tl.constexpr):
    """Of [M, 4 N] four tensors [M, N]: elements 4 n, 4 n + 1, 4 n + 2 and 4 n + 3 of each row."""
    even, odd = tl.split(tl.reshape(tile, [M, N, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def add_field(dot, w, x, field: tl.constexpr, BITS: tl.constexpr, EXACT: tl.constexpr):
    """dot + (q - ZERO) x for one field of words [rows, units] and x [units] of its columns, or unless EXACT, lowered.

    Lowered is dot + 2^-LOWERED q x. Converting q to a number is slow, but where q lies in the 23 lowest bits, they
    alone already are one: q times a power of two far below 1, which a product takes exactly and at full speed. To make
    up for that x is raised, once for all rows.
    """
    MASK: tl.constexpr = (1 << BITS) - 1
    ZERO: tl.constexpr = ZERO_8 if BITS == 8 else ZERO_4
    RIGHT: tl.constexpr = 0 if BITS * (field + 1) <= 23 else 16
    BIT: tl.constexpr = BITS * field - RIGHT
    RAISED: tl.constexpr = 2.0 ** (149 - BIT - LOWERED)
    if EXACT:
        q = (((w >> BITS * field) & MASK) - ZERO).to(tl.float32)
    else:
        q = ((w >> RIGHT) & (MASK << BIT)).to(tl.float32, bitcast=True)
        x *= RAISED
    return dot + q * x[None, :]


@triton.jit
def add_tile(
    acc, squares, w, scale, offs_u, x_ptr, norm_ptr, K: tl.constexpr, NORM: tl.constexpr, BITS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """acc [rows, units] and squares [units] with a tile's share of the products and of the squares of x.

    A group's scale is multiplied by the sum of a unit's (q - ZERO) x, its offset by the sum of their x. Products are
    rounded no more than those of (q - ZERO) up to float32's last bits, which count if x is float32.
    """
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    R: tl.constexpr = acc.shape[0]
    U: tl.constexpr = acc.shape[1]
    FIELDS: tl.constexpr = 32 // BITS
    ZERO: tl.constexpr = ZERO_8 if BITS == 8 else ZERO_4
    w0, w1, w2, w3 = quarters(w, R, U)
    dot = tl.zeros([R, U], tl.float32)
    sum_x = tl.zeros([U], tl.float32)
    for pair in tl.static_range(0, FIELDS, 2):
        offs_k = (offs_u * (4 * FIELDS) + 4 * pair)[:, None] + tl.arange(0, 8)[None, :]
        mask_k = None if EVEN else offs_k < K
        x = tl.load(x_ptr + offs_k, mask=mask_k, other=None if EVEN else 0.0).to(tl.float32)
        if NORM:
            squares += tl.sum(x * x, axis=1)
            x *= tl.load(norm_ptr + offs_k, mask=mask_k, other=None if EVEN else 0.0).to(tl.float32)
        sum_x += tl.sum(x, axis=1)
        x0, x1, x2, x3 = quarters(x, U, 2)
        x00, x01 = tl.split(x0)
        x10, x11 = tl.split(x1)
        x20, x21 = tl.split(x2)
        x30, x31 = tl.split(x3)
        part = tl.zeros([R, U], tl.float32) if EXACT else dot
        part = add_field(part, w0, x00, pair, BITS, EXACT)
        part = add_field(part, w1, x10, pair, BITS, EXACT)
        part = add_field(part, w2, x20, pair, BITS, EXACT)
        part = add_field(part, w3, x30, pair, BITS, EXACT)
        part = add_field(part, w0, x01, pair + 1, BITS, EXACT)
        part = add_field(part, w1, x11, pair + 1, BITS, EXACT)
        part = add_field(part, w2, x21, pair + 1, BITS, EXACT)
        part = add_field(part, w3, x31, pair + 1, BITS, EXACT)
        dot = dot + part if EXACT else part
    if not EXACT:
        LIFT: tl.constexpr = 2.0**LOWERED
        dot = dot * LIFT - (sum_x * ZERO)[None, :]
    acc += (scale << 16).to(tl.float32, bitcast=True) * dot
    acc += (scale & -65536).to(tl.float32, bitcast=True) * sum_x[None, :]
    return acc, squares


@triton.jit
def product_of_words(
    w_ptr, scale_ptr, rows, x_ptr, norm_ptr, K: tl.constexpr, NORM: tl.constexpr, BLOCK_K: tl.constexpr,
    BITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """product_of_values of a QuantizedMatrix, words with BLOCK_K columns at a time."""
    if EARLY:
        gdc_launch_dependents()
    GROUP: tl.constexpr = GROUP_8 if BITS == 8 else GROUP_4
    COLUMNS: tl.constexpr = 4 * 32 // BITS  # of a unit of four words, which a thread loads at once
    UNITS: tl.constexpr = GROUP // COLUMNS  # of a group
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    W: tl.constexpr = GROUPS * UNITS * 4
    BLOCK_U: tl.constexpr = BLOCK_K // COLUMNS
    EVEN: tl.constexpr = K % BLOCK_K == 0
    offs_u = tl.arange(0, BLOCK_U)
    w_ptrs = w_ptr + rows.to(tl.int64)[:, None] * W
    scale_ptrs = scale_ptr + rows.to(tl.int64)[:, None] * GROUPS
    w, scale = load_words(w_ptrs, scale_ptrs, 0, BLOCK_U, W, UNITS, EVEN)
    if EARLY:
        gdc_wait()
    acc = tl.zeros([rows.shape[0], BLOCK_U], tl.float32)
    squares = tl.zeros([BLOCK_U], tl.float32)
    first = 0
    for following in range(BLOCK_U, W // 4, BLOCK_U):
        next_w, next_scale = load_words(w_ptrs, scale_ptrs, following, BLOCK_U, W, UNITS, EVEN)
        acc, squares = add_tile(acc, squares, w, scale, first + offs_u, x_ptr, norm_ptr, K, NORM, BITS, EVEN)
        w, scale, first = next_w, next_scale, following
    acc, squares = add_tile(acc, squares, w, scale, first + offs_u, x_ptr, norm_ptr, K, NORM, BITS, EVEN)
    return tl.sum(acc, axis=1), tl.sum(squares, axis=0)


@triton.jit
def my_rows(N: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's rows, and which of them exist; the last program repeats row N - 1 instead of reading beyond."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    return tl.minimum(rows, N - 1), rows < N


@triton.jit
def embed_kernel(
    token_ptr, table_ptr, seq_len_ptr, x_ptr, E: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.maximum(tl.load(token_ptr), 0)  # below zero stands for a token that could not be sampled
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = tl.load(table_ptr + token.to(tl.int64) * E + offs_k, mask=offs_k < E)
    tl.store(x_ptr + offs_k, row, mask=offs_k < E)
    if tl.program_id(0) == 0:
        tl.store(seq_len_ptr, tl.load(seq_len_ptr) + 1)


@triton.jit
def norm_qkv_kernel(
    x_ptr, norm_ptr, w_ptr, scale_ptr, bias_ptr, eps, seq_len_ptr, q_ptr, k_ptr, v_ptr,
    stride_kg, stride_kn, stride_vg, stride_vn, near,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr,
    NEAR_K: tl.constexpr, NEAR_V: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    rows, mask = my_rows((H + 2 * G) * D, BLOCK_N)
    out = product(w_ptr, scale_ptr, rows, x_ptr, norm_ptr, eps, K, True, BLOCK_K, BITS, EARLY)
    if BIAS:
        out += tl.load(bias_ptr + rows).to(tl.float32)
    out = out.to(q_ptr.dtype.element_ty)
    head = rows // D
    position = tl.load(seq_len_ptr).to(tl.int64) - 1
    k_ptrs = k_ptr + (head - H).to(tl.int64) * stride_kg + position * stride_kn + rows % D
    v_ptrs = v_ptr + (head - H - G).to(tl.int64) * stride_vg + position * stride_vn + rows % D
    tl.store(q_ptr + rows, out, mask=mask & (head < H))
    tl.store(k_ptrs, out, mask=mask & (head >= H) & (head < H + G))
    tl.store(v_ptrs, out, mask=mask & (head >= H + G))
    if NEAR_K:
        near_ptrs = near.k + ((head - H).to(tl.int64) * NEAR_K + position % NEAR_K) * D + rows % D
        tl.store(near_ptrs, out, mask=mask & (head >= H) & (head < H + G))
    if NEAR_V:
        near_ptrs = near.v + ((head - H - G).to(tl.int64) * NEAR_V + position % NEAR_V) * D + rows % D
        tl.store(near_ptrs, out, mask=mask & (head >= H + G))


@triton.jit
def add_product_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, out_ptr, N: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    rows, mask = my_rows(N, BLOCK_N)
    out = product(w_ptr, scale_ptr, rows, x_ptr, x_ptr, 0.0, K, False, BLOCK_K, BITS, EARLY)
    if BIAS:
        out += tl.load(bias_ptr + rows).to(tl.float32)
    out += tl.load(out_ptr + rows).to(tl.float32)
    tl.store(out_ptr + rows, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def norm_gate_up_kernel(
    x_ptr, norm_ptr, w_ptr, scale_ptr, bias_ptr, eps, out_ptr, F: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of the matrix are BLOCK_N / 2 features: their gate rows, then their up rows."""
    half: tl.constexpr = BLOCK_N // 2
    features, mask = my_rows(F, half)
    offs_n = tl.arange(0, BLOCK_N)
    rows = tl.minimum(tl.program_id(0) * half + offs_n % half, F - 1) + offs_n // half * F
    out = product(w_ptr, scale_ptr, rows, x_ptr, norm_ptr, eps, K, True, BLOCK_K, BITS, EARLY)
    if BIAS:
        out += tl.load(bias_ptr + rows).to(tl.float32)
    offs_f = tl.arange(0, half)[:, None]
    gate = tl.sum(tl.where(offs_n[None, :] == offs_f, out[None, :], 0.0), axis=1)
    up = tl.sum(tl.where(offs_n[None, :] == offs_f + half, out[None, :], 0.0), axis=1)
    act = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + features, act.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def norm_logits_kernel(
    x_ptr, norm_ptr, w_ptr, scale_ptr, eps, logits_ptr, V: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    rows, mask = my_rows(V, BLOCK_N)
    out = product(w_ptr, scale_ptr, rows, x_ptr, norm_ptr, eps, K, True, BLOCK_K, BITS, EARLY)
    tl.store(logits_ptr + rows, out, mask=mask)


@triton.jit
def lowest_of_best(logit, token_id):
    """The largest of some logits, and the lowest id that has it."""
    best = tl.max(logit, axis=0)
    return best, tl.min(tl.where(logit == best, token_id, 2147483647), axis=0)


@triton.jit
def best_token_kernel(
    logits_ptr, best_ptr, best_id_ptr, done_ptr, token_ptr, V: tl.constexpr, SLICE: tl.constexpr,
    PROGRAMS: tl.constexpr, BLOCK_V: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Each program ranks one slice; the last one to finish ranks the slices' best."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    best = tl.full([BLOCK_V], float("-inf"), tl.float32)
    best_id = tl.zeros([BLOCK_V], tl.int32)
    first = tl.program_id(0) * SLICE
    for lo in range(first, tl.minimum(first + SLICE, V), BLOCK_V):
        offs_v = lo + tl.arange(0, BLOCK_V)
        logit = tl.load(logits_ptr + offs_v, mask=offs_v < V, other=float("-inf"))
        logit = tl.where(logit == logit, logit, float("inf"))
        best_id = tl.where(logit > best, offs_v, best_id)
        best = tl.maximum(best, logit)
    slice_best, slice_best_id = lowest_of_best(best, best_id)
    tl.store(best_ptr + tl.program_id(0), slice_best)
    tl.store(best_id_ptr + tl.program_id(0), slice_best_id)
    tl.debug_barrier()
    if tl.atomic_add(done_ptr, 1, sem="acq_rel", scope="gpu") == PROGRAMS - 1:
        tl.debug_barrier()
        programs = tl.arange(0, PROGRAMS)
        winner, token = lowest_of_best(tl.load(best_ptr + programs), tl.load(best_id_ptr + programs))
        tl.store(token_ptr, tl.where(tl.abs(winner) < float("inf"), token, -1).to(tl.int64))
        tl.store(done_ptr, 0)


# ----------------------------------------------------------------------------------------------------------- launchers

BEST_PROGRAMS: Final = 64


class Tile(NamedTuple):
    """Rows and columns of weights that a program multiplies at a time, its warps, and the bits of quantized weights.

    Registers of a thread may be bounded, where one or two fewer let all programs run at once.
    """

    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    BITS: int = 0
    maxnreg: int | None = None


def tile(matrix: Matrix, piece: int = 4096) -> Tile:
    """Two rows in pieces of up to `piece` bytes, of which two are in flight: 16 or 32 bytes per thread and row.

    Rows of 16 KiB and more are taken eight at a time: there reading x costs as much as a row, and eight share it.
    """
    K = matrix.shape[1]
    if isinstance(matrix, QuantizedMatrix):
        return tile_of_words(matrix)
    itemsize = matrix.element_size()
    if K * itemsize >= 16384:
        return Tile(8, 2048 // itemsize, 8)
    block_k = min(piece // itemsize, max(16, next_power_of_2(K)))
    return Tile(2, block_k, max(1, min(8, block_k * itemsize // 512)))


def tile_of_words(matrix: QuantizedMatrix) -> Tile:
    """Four words per thread and row, in pieces of so many warps of those listed that fill rows best.

    x takes a large part of the instructions, which more rows share: so many as leave a few programs to each
    multiprocessor. Long rows, of which there are few, take eight warps each. Measured in whole decode steps:
    kernels/NOTEBOOK.md.
    """
    (N, K), bits = matrix.shape, matrix.bits
    columns = 4 * 32 // bits * 32  # of a warp
    rows, warps = 4, [4, 2, 1]
    if bits == 4 and (N >= 24576 or (N > 5120 and K >= 4096)):
        rows = 16
    elif bits == 4 and N > 5120:
        rows, warps = 8, [2, 1]
    elif bits == 4 and K >= 8192:
        rows, warps = 8 if N >= 4096 else 4, [8]
    elif bits == 4:
        warps = [2, 1]
    elif N <= 2048 and K >= 8192:
        warps = [8]
    elif N >= 65536 and 4 * columns >= K:
        rows = 8
    elif N >= 12288 and 4 * columns >= K:
        warps = [2, 1]
    num_warps = min(warps, key=lambda count: cdiv(K, columns * count) * count)
    pieces = cdiv(K, columns * num_warps)
    # Long rows of 8 bits: 66 registers where nothing bounds them. With 64, none spilled, an eighth program has room.
    maxnreg = 64 if bits == 8 and rows == 4 and pieces > 2 else None
    return Tile(rows, columns * num_warps, num_warps, bits, maxnreg)


def operands(matrix: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
    """What a kernel takes as w_ptr and scale_ptr; a matrix of the model's dtype has no scale."""
    if isinstance(matrix, QuantizedMatrix):
        return matrix.words, matrix.scale_offset.view(torch.int32)
    return matrix, matrix


def embed(token: torch.Tensor, table_VE: torch.Tensor, seq_len: torch.Tensor, x_E: torch.Tensor) -> None:
    """x = table[token], and seq_len += 1. token int64 [1] and seq_len int32 [1] on the device."""
    E = table_VE.shape[1]
    launch(embed_kernel, cdiv(E, 1024), x_E.device, token, table_VE, seq_len, x_E, E=E, BLOCK_K=1024)


def norm_qkv(
    x_E: torch.Tensor,
    norm_E: torch.Tensor,
    qkv_XE: Matrix,
    bias_X: torch.Tensor | None,
    eps: float,
    seq_len: torch.Tensor,
    q_HD: torch.Tensor,
    k_cache_GND: torch.Tensor,
    v_cache_GND: torch.Tensor,
    near: Near | None = None,
) -> None:
    """q, k, v = qkv . rms_norm(x) + bias: q to q_HD, k and v to the caches at seq_len - 1, and where they go in `near`.
    X = (H + 2G) D.
    """
    (H, D), (G, _, _), E = q_HD.shape, k_cache_GND.shape, x_E.shape[0]
    t = tile(qkv_XE)
    launch(
        norm_qkv_kernel,
        cdiv((H + 2 * G) * D, t.BLOCK_N),
        x_E.device,
        x_E,
        norm_E,
        *operands(qkv_XE),
        bias_X if bias_X is not None else x_E,
        eps,
        seq_len,
        q_HD,
        k_cache_GND,
        v_cache_GND,
        *k_cache_GND.stride()[:2],
        *v_cache_GND.stride()[:2],
        near,
        H=H,
        G=G,
        D=D,
        K=E,
        BIAS=bias_X is not None,
        **near_rows(near),
        **t._asdict(),
    )


def add_product(x_K: torch.Tensor, w_NK: Matrix, bias_N: torch.Tensor | None, out_N: torch.Tensor) -> None:
    """out += w . x + bias."""
    N, K = w_NK.shape
    t = tile(w_NK)
    launch(
        add_product_kernel,
        cdiv(N, t.BLOCK_N),
        x_K.device,
        x_K,
        *operands(w_NK),
        bias_N if bias_N is not None else x_K,
        out_N,
        N=N,
        K=K,
        BIAS=bias_N is not None,
        **t._asdict(),
    )


def norm_gate_up(
    x_E: torch.Tensor,
    norm_E: torch.Tensor,
    gate_up_ME: Matrix,
    bias_M: torch.Tensor | None,
    eps: float,
    out_F: torch.Tensor,
) -> None:
    """out = silu(gate) * up with gate, up = gate_up . rms_norm(x) + bias. M = 2F: gate's rows, then up's."""
    F, E = out_F.shape[0], x_E.shape[0]
    t = tile(gate_up_ME)
    launch(
        norm_gate_up_kernel,
        cdiv(F, t.BLOCK_N // 2),
        x_E.device,
        x_E,
        norm_E,
        *operands(gate_up_ME),
        bias_M if bias_M is not None else x_E,
        eps,
        out_F,
        F=F,
        K=E,
        BIAS=bias_M is not None,
        **t._asdict(),
    )


def norm_logits(x_E: torch.Tensor, norm_E: torch.Tensor, head_VE: Matrix, eps: float, logits_V: torch.Tensor) -> None:
    """logits = head . rms_norm(x), float32."""
    V, E = head_VE.shape
    t = tile(head_VE, piece=8192)  # most rows of all, so one piece each where that is possible
    launch(
        norm_logits_kernel,
        cdiv(V, t.BLOCK_N),
        x_E.device,
        x_E,
        norm_E,
        *operands(head_VE),
        eps,
        logits_V,
        V=V,
        K=E,
        **t._asdict(),
    )


class BestTokenWorkspace(NamedTuple):
    """One maximum per program, and a counter that is zero between calls. It serves one call at a time."""

    best: torch.Tensor
    best_id: torch.Tensor
    done: torch.Tensor

    @classmethod
    def on(cls, device: torch.device) -> BestTokenWorkspace:
        sizes = ((torch.float32, BEST_PROGRAMS), (torch.int32, BEST_PROGRAMS), (torch.int32, 1))
        return cls(*(torch.zeros(size, dtype=dtype, device=device) for dtype, size in sizes))


def best_token(logits_V: torch.Tensor, workspace: BestTokenWorkspace, token: torch.Tensor) -> None:
    """token int64 [1] = the id of the largest logit, the lowest of equals; -1 if one is NaN or the largest infinite."""
    V = logits_V.shape[0]
    launch(
        best_token_kernel,
        BEST_PROGRAMS,
        logits_V.device,
        logits_V,
        *workspace,
        token,
        V=V,
        SLICE=cdiv(V, BEST_PROGRAMS),
        PROGRAMS=BEST_PROGRAMS,
        BLOCK_V=1024,
    )
