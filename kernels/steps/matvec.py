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

from minirea.kernels.fused.arguments import Heads
from minirea.kernels.launching import cdiv, launch, next_power_of_2
from minirea.kernels.near import Near, near_rows
from minirea.quantize import ZERO, QuantizedMatrix

Matrix = torch.Tensor | QuantizedMatrix

# ------------------------------------------------------------------------------------------------------------- device

ZERO_8: tl.constexpr = tl.constexpr(ZERO[8])
ZERO_4: tl.constexpr = tl.constexpr(ZERO[4])
INTEGER: tl.constexpr = tl.constexpr(1.5 * 2**23)  # a float32 below 2^22 plus this is rounded to an integer
BITS_OF_INTEGER: tl.constexpr = tl.constexpr(0x4B400000)  # of INTEGER, above those of the integer
COMPILED: tl.constexpr = tl.constexpr(not triton.knobs.runtime.interpret)  # the interpreter runs no assembly


@triton.jit
def load_weights(w_ptrs, offs_k, K: tl.constexpr):
    """A tile of weights at columns offs_k, zero beyond K. Each is used once: the first to leave the caches."""
    return tl.load(w_ptrs + offs_k[None, :], mask=(offs_k < K)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def product(
    w_ptr, scale_ptr, first, rows, x_ptr, norm_ptr, eps, K: tl.constexpr, NORM: tl.constexpr, BLOCK_K: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """W[rows] . x, or with NORM W[rows] . rms_norm(x): float32 [rows]. W is row-major with K columns.

    With BITS w_ptr and scale_ptr are those of a QuantizedMatrix.
    """
    if BITS:
        out, squares = product_of_words(
            w_ptr, scale_ptr, first, rows, x_ptr, norm_ptr, K, NORM, BLOCK_K, BITS, GROUP, EARLY
        )
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
def load_x(x_ptr, norm_ptr, offs_k, K: tl.constexpr, NORM: tl.constexpr, EVEN: tl.constexpr):
    """x at offs_k [units, columns] in float32, with NORM times the norm's weights; the sums of its squares [units]."""
    mask_k = None if EVEN else offs_k < K
    x = tl.load(x_ptr + offs_k, mask=mask_k, other=None if EVEN else 0.0).to(tl.float32)
    squares = tl.zeros([x.shape[0]], tl.float32)
    if NORM:
        squares = tl.sum(x * x, axis=1)
        x *= tl.load(norm_ptr + offs_k, mask=mask_k, other=None if EVEN else 0.0).to(tl.float32)
    return x, squares


@triton.jit
def powers(x0, x1, x2, x3):
    """For x of each unit the smallest power of two that divides them into (-2^15, 2^15), and its inverse.

    Of x [units, columns] float32 [units]. The power is NaN where an x is not finite.
    """
    top = larger(larger(tl.abs(x0), tl.abs(x1)), larger(tl.abs(x2), tl.abs(x3)))
    top = tl.max(top.to(tl.int32, bitcast=True), axis=1).to(tl.float32, bitcast=True)  # of floats, NaN above all
    exponent = (top * (1 + 2.0**-14)).to(tl.int32, bitcast=True) & 0x7F800000  # so that none is rounded to 2^15
    exponent = tl.maximum(exponent, 16 << 23)  # of a normal number, as are both results
    power = (exponent - (14 << 23)).to(tl.float32, bitcast=True)
    inverse = ((134 << 23) - exponent + (134 << 23)).to(tl.float32, bitcast=True)
    return tl.where(top < float("inf"), power, float("nan")), inverse


@triton.jit
def larger(a, b):
    """NaN if one of both is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def bytes_of(x0, x1, x2, x3):
    """x [units, columns] as integers of 16 bits: words of the low bytes of x0 to x3, of the high ones, sums [units]."""
    i0, i1, i2, i3 = bits_of_integer(x0), bits_of_integer(x1), bits_of_integer(x2), bits_of_integer(x3)
    COLUMNS: tl.constexpr = 4 * x0.shape[1]
    SUM_OF_INTEGERS: tl.constexpr = (COLUMNS * BITS_OF_INTEGER + 2**31) % 2**32 - 2**31
    sum_x = tl.sum(i0 + i1 + i2 + i3, axis=1) - SUM_OF_INTEGERS
    even = (i0 & 0xFFFF) | (i2 << 16)
    odd = (i1 & 0xFFFF) | (i3 << 16)
    low = (even & 0xFF00FF) | ((odd & 0xFF00FF) << 8)
    high = ((even >> 8) & 0xFF00FF) | (odd & -0xFF0100)
    return low, high, sum_x


@triton.jit
def bits_of_integer(x):
    """The nearest integer plus BITS_OF_INTEGER, whose 16 lowest bits are zero."""
    return (x + INTEGER).to(tl.int32, bitcast=True)


@triton.jit
def rest(x):
    """What rounding to an integer took, times 2^15."""
    return (x - ((x + INTEGER) - INTEGER)) * 2.0**15


@triton.jit
def dot_words(dot, words, x, U: tl.constexpr, BITS: tl.constexpr, SIGNED: tl.constexpr):
    """dot [rows, units] + q x, for the q in four words [rows, units] and one byte of each x, in as many words."""
    w0, w1, w2, w3 = words
    if BITS == 8:
        x0, x1, x2, x3 = quarters(x, 1, U)
        dot = dot_bytes(w0, x0, dot, SIGNED)
        dot = dot_bytes(w1, x1, dot, SIGNED)
        dot = dot_bytes(w2, x2, dot, SIGNED)
        dot = dot_bytes(w3, x3, dot, SIGNED)
    else:
        x0, x1, x2, x3 = quarters(x, U, 2)
        dot = dot_nibbles(w0, x0, dot, SIGNED)
        dot = dot_nibbles(w1, x1, dot, SIGNED)
        dot = dot_nibbles(w2, x2, dot, SIGNED)
        dot = dot_nibbles(w3, x3, dot, SIGNED)
    return dot


@triton.jit
def dot_nibbles(words, x, dot, SIGNED: tl.constexpr):
    """dot + the products of the even nibbles of words [rows, units] with bytes of x [units, 2], and of the odd ones."""
    even, odd = tl.split(x)
    dot = dot_bytes(words & 0x0F0F0F0F, even[None, :], dot, SIGNED)
    return dot_bytes((words >> 4) & 0x0F0F0F0F, odd[None, :], dot, SIGNED)


@triton.jit
def dot_bytes(words, x, dot, SIGNED: tl.constexpr):
    """dot + the products of the four bytes of words with those of x, which have a sign if SIGNED."""
    if COMPILED:
        KIND: tl.constexpr = "s32" if SIGNED else "u32"
        dot = tl.inline_asm_elementwise(
            "dp4a.u32." + KIND + " $0, $1, $2, $3;", "=r,r,r,r", [words, x, dot], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        shift = tl.arange(0, 4)[None, None, :] * 8
        bytes_of_x = (x[:, :, None] << (24 - shift)) >> 24
        bytes_of_x = bytes_of_x if SIGNED else bytes_of_x & 255
        dot += tl.sum(((words[:, :, None] >> shift) & 255) * bytes_of_x, axis=2)
    return dot


@triton.jit
def add_tile(
    acc, squares, w, scale, offs_u, x_ptr, norm_ptr, K: tl.constexpr, NORM: tl.constexpr, BITS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """acc [rows, units] and squares [units] with a tile's share of the products and of the squares of x.

    x of a unit are integers of 16 bits times a power of two, off by 2^-15 of the largest of them at most; bfloat16 is
    off by 2^-9 of each. Float32 x are integers twice: what the first time took is added the second time. The sum of
    (q - ZERO) x is exact. A group's scale is multiplied by it, its offset by the sum of x.
    """
    R: tl.constexpr = acc.shape[0]
    U: tl.constexpr = acc.shape[1]
    COLUMNS: tl.constexpr = 4 * 32 // BITS  # of a unit
    PART: tl.constexpr = COLUMNS // 4
    ZERO: tl.constexpr = ZERO_8 if BITS == 8 else ZERO_4
    TIMES: tl.constexpr = 2 if x_ptr.dtype.element_ty == tl.float32 else 1
    words = quarters(w, R, U)
    offs_k = (offs_u * COLUMNS)[:, None] + tl.arange(0, PART)[None, :]
    x0, squares0 = load_x(x_ptr, norm_ptr, offs_k, K, NORM, EVEN)
    x1, squares1 = load_x(x_ptr, norm_ptr, offs_k + PART, K, NORM, EVEN)
    x2, squares2 = load_x(x_ptr, norm_ptr, offs_k + 2 * PART, K, NORM, EVEN)
    x3, squares3 = load_x(x_ptr, norm_ptr, offs_k + 3 * PART, K, NORM, EVEN)
    power, inverse = powers(x0, x1, x2, x3)
    inverse = inverse[:, None]
    x0, x1, x2, x3 = x0 * inverse, x1 * inverse, x2 * inverse, x3 * inverse
    for time in tl.static_range(TIMES):
        if time:
            x0, x1, x2, x3 = rest(x0), rest(x1), rest(x2), rest(x3)
            power *= 2.0**-15
        low, high, sum_x = bytes_of(x0, x1, x2, x3)
        dot = dot_words(tl.zeros([R, U], tl.int32), words, high, U, BITS, True)
        dot = dot_words((dot << 8) - (sum_x * ZERO)[None, :], words, low, U, BITS, False)
        acc += (scale << 16).to(tl.float32, bitcast=True) * power[None, :] * dot.to(tl.float32)
        acc += (scale & -65536).to(tl.float32, bitcast=True) * (sum_x.to(tl.float32) * power)[None, :]
    return acc, squares + (squares0 + squares1) + (squares2 + squares3)


@triton.jit
def product_of_words(
    w_ptr, scale_ptr, first_row, rows, x_ptr, norm_ptr, K: tl.constexpr, NORM: tl.constexpr, BLOCK_K: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """product_of_values of a QuantizedMatrix, words with BLOCK_K columns at a time."""
    if EARLY:
        gdc_launch_dependents()
    COLUMNS: tl.constexpr = 4 * 32 // BITS  # of a unit of four words, which a thread loads at once
    UNITS: tl.constexpr = GROUP // COLUMNS  # of a group
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    W: tl.constexpr = GROUPS * UNITS * 4
    BLOCK_U: tl.constexpr = BLOCK_K // COLUMNS
    EVEN: tl.constexpr = K % BLOCK_K == 0
    offs_u = tl.arange(0, BLOCK_U)
    w_ptrs = w_ptr + first_row.to(tl.int64) * W + (rows - first_row)[:, None] * W
    scale_ptrs = scale_ptr + first_row.to(tl.int64) * GROUPS + (rows - first_row)[:, None] * GROUPS
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
def my_rows(N: tl.constexpr, BLOCK_N: tl.constexpr, BITS: tl.constexpr):
    """This program's first row, its rows, which of them exist; the last program repeats row N - 1 instead of others."""
    first = tl.program_id(0) * BLOCK_N
    rows = first + tl.arange(0, BLOCK_N)
    exist = rows < N
    if not BITS or N % BLOCK_N:  # rows at distances that are known share the computation of their addresses
        rows = tl.minimum(rows, N - 1)
    return first, rows, exist


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
    x_ptr, norm_ptr, w_ptr, scale_ptr, bias_ptr, eps, seq_len_ptr, q_ptr, k, v, near,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr,
    NEAR_K: tl.constexpr, NEAR_V: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    first, rows, mask = my_rows((H + 2 * G) * D, BLOCK_N, BITS)
    out = product(w_ptr, scale_ptr, first, rows, x_ptr, norm_ptr, eps, K, True, BLOCK_K, BITS, GROUP, EARLY)
    if BIAS:
        out += tl.load(bias_ptr + rows).to(tl.float32)
    out = out.to(q_ptr.dtype.element_ty)
    head = rows // D
    position = tl.load(seq_len_ptr).to(tl.int64) - 1
    k_ptrs = k.ptr + (head - H).to(tl.int64) * k.stride_h + position * k.stride_n + rows % D
    v_ptrs = v.ptr + (head - H - G).to(tl.int64) * v.stride_h + position * v.stride_n + rows % D
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
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    first, rows, mask = my_rows(N, BLOCK_N, BITS)
    out = product(w_ptr, scale_ptr, first, rows, x_ptr, x_ptr, 0.0, K, False, BLOCK_K, BITS, GROUP, EARLY)
    if BIAS:
        out += tl.load(bias_ptr + rows).to(tl.float32)
    out += tl.load(out_ptr + rows).to(tl.float32)
    tl.store(out_ptr + rows, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def norm_gate_up_kernel(
    x_ptr, norm_ptr, w_ptr, scale_ptr, bias_ptr, eps, out_ptr, F: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of the matrix are BLOCK_N / 2 features: their gate rows, then their up rows."""
    half: tl.constexpr = BLOCK_N // 2
    first, features, mask = my_rows(F, half, BITS)
    offs_n = tl.arange(0, BLOCK_N)
    rows = first + offs_n % half
    if not BITS or F % half:
        rows = tl.minimum(rows, F - 1)
    rows += offs_n // half * F
    out = product(w_ptr, scale_ptr, first, rows, x_ptr, norm_ptr, eps, K, True, BLOCK_K, BITS, GROUP, EARLY)
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
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    first, rows, mask = my_rows(V, BLOCK_N, BITS)
    out = product(w_ptr, scale_ptr, first, rows, x_ptr, norm_ptr, eps, K, True, BLOCK_K, BITS, GROUP, EARLY)
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
    """Rows and columns of weights that a program multiplies at a time, its warps; quantized weights' bits, and columns
    of a group.
    """

    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    BITS: int = 0
    GROUP: int = 0


def tile(matrix: Matrix, piece: int = 4096) -> Tile:
    """Two rows in pieces of up to `piece` bytes, of which two are in flight: 16 or 32 bytes per thread and row.

    Rows of 16 KiB and more are taken eight at a time: there reading x costs as much as a row, and eight share it. Rows
    of one piece are read as two, so that there are two in flight, or where there are few, four at a time.
    """
    N, K = matrix.shape
    if isinstance(matrix, QuantizedMatrix):
        return tile_of_words(matrix)
    itemsize = matrix.element_size()
    if K * itemsize >= 16384:
        return Tile(8, 2048 // itemsize, 8)
    if K * itemsize == piece == 4096:
        return Tile(2, 2048 // itemsize, 4) if N > 2048 else Tile(4, 4096 // itemsize, 8)
    block_k = min(piece // itemsize, max(16, next_power_of_2(K)))
    return Tile(2, block_k, max(1, min(8, block_k * itemsize // 512)))


def tile_of_words(matrix: QuantizedMatrix) -> Tile:
    """Four words per thread and row, in pieces of so many warps of those listed that fill rows best.

    Making bytes of x takes a large part of the instructions, which more rows share: so many as leave a few programs to
    each multiprocessor. Measured in whole decode steps: kernels/NOTEBOOK.md.
    """
    (N, K), bits = matrix.shape, matrix.bits
    columns = 4 * 32 // bits * 32  # of a warp
    few = N <= 2048 if bits == 8 else N < 4096
    if few and K >= 8192:
        rows, warps = 4, [8]
    elif bits == 8:
        rows, warps = (4 if few else 8), [4, 2, 1]
        if N >= 12288 and 8 * columns == K:
            warps = [8]
    elif not few and K >= 4096:
        rows, warps = 8, [4]
    else:
        rows, warps = (8 if N > 5120 else 4), [2, 1]
    num_warps = min(warps, key=lambda count: cdiv(K, columns * count) * count)
    return Tile(rows, columns * num_warps, num_warps, bits, matrix.group_size)


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
        Heads(k_cache_GND, *k_cache_GND.stride()),
        Heads(v_cache_GND, *v_cache_GND.stride()),
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
