"""A decode step's kernels besides attention: one row of activations against every matrix of the model.

    embed         token id -> x, and one more cached token
    norm_qkv      x -> q, and k and v into the cache
    (reattention  q, cache -> out)
    add_product   out -> x, through the output projection; also the MLP's last product
    norm_gate_up  x -> silu(gate) * up
    norm_logits   x -> logits
    best_token    logits -> the next token id, for the next step and for the host (keep_token: a sampled one)

A token at batch one costs one read of the weights, so each kernel is a stream of weights with as little as possible
around it. They are of the model's dtype, or quantized to one byte or half of one each (minirea.quantize). A program
owns a few rows of the matrix, or two blocks of rows, keeps their next piece in flight while it multiplies this one, and
needs no other program. RMSNorm costs no pass of its own: W (g * x / rms) = (W (g * x)) / rms, and the program that
multiplies g * x sums the squares of x on the way.

On Hopper the kernels are launched as programmatic dependents: a kernel's programs start on the SMs that the one before
it frees, read their first weights and those of the norm, which no kernel writes, and only then wait for it to end.
Every program waits, so that the end of a kernel also means the end of all kernels before it. What results are added to,
and where they go, is fetched with x and not where it is used, where registers allow: a load takes as long as a tenth of
a small product.

Letters are the project's: E model width, F MLP width, V vocabulary, H, G, D heads and head dim. x is a vector in the
model's dtype, products are summed in float32.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: RET505  (an `if` on constants is decided at compile time only with its `else`)

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minirea.kernels.fused.arguments import Heads
from minirea.kernels.launching import cdiv, launch, next_power_of_2
from minirea.kernels.near import Near, near_rows
from minirea.quantize import LEAST_BITS, STEPS, ZERO, QuantizedMatrix

Matrix = torch.Tensor | QuantizedMatrix


class Weights(NamedTuple):
    """A matrix as kernels are given it: values of the model's dtype, or a QuantizedMatrix."""

    ptr: Any  # values, or words
    scale: Any = None  # int32: scale and offset, bfloat16 each; int16: codes
    unit: Any = None  # of the codes of each row


class Target(NamedTuple):
    """Where a product of N rows goes, by a matrix of so many bits."""

    out: Any
    bias: Any
    N: Any
    BIAS: Any
    BITS: Any


class Caches(NamedTuple):
    """Where queries, keys and values go."""

    q: Any
    k: Any
    v: Any
    near: Any
    bias: Any
    seq_len: Any
    H: Any
    G: Any
    D: Any
    BIAS: Any
    NEAR_K: Any
    NEAR_V: Any
    BITS: Any


# ------------------------------------------------------------------------------------------------------------- device

ZERO_8: tl.constexpr = tl.constexpr(ZERO[8])
ZERO_4: tl.constexpr = tl.constexpr(ZERO[4])
STEPS_OF_SCALE: tl.constexpr = tl.constexpr(STEPS)
BITS_OF_LEAST: tl.constexpr = tl.constexpr(LEAST_BITS)
INTEGER: tl.constexpr = tl.constexpr(1.5 * 2**23)  # a float32 below 2^22 plus this is rounded to an integer
BITS_OF_INTEGER: tl.constexpr = tl.constexpr(0x4B400000)  # of INTEGER, above those of the integer
COMPILED: tl.constexpr = tl.constexpr(not triton.knobs.runtime.interpret)  # the interpreter runs no assembly


@triton.jit
def load_weights(w_ptrs, offs_k, K: tl.constexpr):
    """A tile of weights at columns offs_k, zero beyond K. Each is used once: the first to leave the caches."""
    return tl.load(w_ptrs + offs_k[None, :], mask=(offs_k < K)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def product(
    weights, first, rows, x_ptr, norm_ptr, eps, fetch: tl.constexpr, to, K: tl.constexpr, NORM: tl.constexpr,
    BLOCK_K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """W[rows] . x, or with NORM W[rows] . rms_norm(x): float32 [rows]. W is row-major with K columns. And what
    fetch(to, rows) returns, which is called once memory has what the kernels before have written.

    With BITS it is a QuantizedMatrix.
    """
    if BITS:
        out, squares, fetched = product_of_words(
            weights, first, rows, x_ptr, norm_ptr, fetch, to, K, NORM, BLOCK_K, BITS, GROUP, EARLY
        )
    else:
        out, squares, fetched = product_of_values(
            weights.ptr, rows, x_ptr, norm_ptr, fetch, to, K, NORM, BLOCK_K, EARLY
        )
    if NORM:
        out *= tl.rsqrt(squares / K + eps)
    return out, fetched


@triton.jit
def products(
    weights, x_ptr, norm_ptr, eps, fetch: tl.constexpr, finish: tl.constexpr, to, N: tl.constexpr, APART: tl.constexpr,
    K: tl.constexpr, NORM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, BLOCKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`product` of this program's blocks of rows, one or two: each goes to finish(product, block, to, fetched).

    Rows of a block are those of `rows_of`. Two blocks are of a QuantizedMatrix and have rows of one piece: x is made
    bytes once for both of them.
    """
    block = tl.program_id(0)
    first, rows = rows_of(block, N, APART, BLOCK_N, BITS)
    if BLOCKS == 1:
        out, fetched = product(
            weights, first, rows, x_ptr, norm_ptr, eps, fetch, to, K, NORM, BLOCK_K, BITS, GROUP, EARLY
        )
        finish(out, block, to, fetched)
    else:
        if EARLY:
            gdc_launch_dependents()
        EVEN: tl.constexpr = K % BLOCK_K == 0
        tile = load_rows_of_words(weights, first, rows, K, BLOCK_K, BITS, GROUP)
        offs_u = tl.arange(0, tile[1].shape[1])
        norm = load_units(norm_ptr, offs_u, K, BITS, EVEN) if NORM else None
        if EARLY:
            gdc_wait()
        fetched = fetch(to, rows)
        x, squares = bytes_of_x(load_units(x_ptr, offs_u, K, BITS, EVEN), norm, NORM)
        SIDE: tl.constexpr = BLOCK_N // 2 if APART else BLOCK_N
        NUM_BLOCKS: tl.constexpr = (N + SIDE - 1) // SIDE
        second = block + tl.num_programs(0)
        first, rows = rows_of(tl.minimum(second, NUM_BLOCKS - 1), N, APART, BLOCK_N, BITS)
        second_tile = load_rows_of_words(weights, first, rows, K, BLOCK_K, BITS, GROUP)
        second_fetched = fetch(to, rows)
        out = product_of_tile(tile, x, BITS)
        # Behind a product, which the barrier of this sum over threads would delay.
        factor = tl.rsqrt(tl.sum(squares, axis=0) / K + eps) if NORM else 1.0
        finish(out * factor, block, to, fetched)
        if second < NUM_BLOCKS:
            finish(product_of_tile(second_tile, x, BITS) * factor, second, to, second_fetched)


@triton.jit
def rows_of(block, N: tl.constexpr, APART: tl.constexpr, BLOCK_N: tl.constexpr, BITS: tl.constexpr):
    """The first row of a block, and its BLOCK_N rows; with APART half as many, and those APART rows after them. N are
    there without the latter. The last block repeats row N - 1 instead of others.
    """
    SIDE: tl.constexpr = BLOCK_N // 2 if APART else BLOCK_N
    offs_n = tl.arange(0, BLOCK_N)
    first = block * SIDE
    rows = first + offs_n % SIDE
    if not BITS or N // SIDE * SIDE != N:  # rows at distances that are known share the computation of their addresses
        rows = tl.minimum(rows, N - 1)
    return first, rows + offs_n // SIDE * APART


@triton.jit
def product_of_values(
    w_ptr, rows, x_ptr, norm_ptr, fetch: tl.constexpr, to, K: tl.constexpr, NORM: tl.constexpr, BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """W[rows] . x, with x times the norm's weights where it is normed; the sum of the squares of x; fetch(to, rows)."""
    if EARLY:
        gdc_launch_dependents()
    offs_k = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + rows.to(tl.int64)[:, None] * K
    w = load_weights(w_ptrs, offs_k, K)
    norm = tl.load(norm_ptr + offs_k, mask=offs_k < K, other=0.0) if NORM else offs_k
    if EARLY:
        gdc_wait()
    fetched = fetch(to, rows)
    acc = tl.zeros([rows.shape[0], BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for _ in range(0, K, BLOCK_K):
        following = load_weights(w_ptrs, offs_k + BLOCK_K, K)
        x = tl.load(x_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
        offs_k += BLOCK_K
        if NORM:
            squares += x * x
            x *= norm.to(tl.float32)
            norm = tl.load(norm_ptr + offs_k, mask=offs_k < K, other=0.0)
        acc += w.to(tl.float32) * x[None, :]
        w = following
    return tl.sum(acc, axis=1), tl.sum(squares, axis=0), fetched


@triton.jit
def load_words(
    w_ptrs, scale_ptrs, first, BLOCK_U: tl.constexpr, W: tl.constexpr, UNITS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """BLOCK_U units from `first` on: words [rows, 4 units], and of each scale and offset, or a code [rows, units].

    Zero beyond W, which EVEN tiles do not reach.
    """
    offs_w = first * 4 + tl.arange(0, 4 * BLOCK_U)
    offs_u = first + tl.arange(0, BLOCK_U)
    # For the layout: threads side by side take units of one row, and of scales one each, as they do of units.
    BYTES: tl.constexpr = scale_ptrs.dtype.element_ty.primitive_bitwidth // 8
    scale_ptrs = tl.multiple_of(tl.max_contiguous(scale_ptrs + (offs_u // UNITS)[None, :], [1, 2]), [BYTES, BYTES])
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
def load_units(ptr, offs_u, K: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr):
    """Values of units offs_u of a vector, which a unit's four words have: four tensors [units, columns / 4], as they
    lie. Zero beyond K, which EVEN pieces do not reach.
    """
    PART: tl.constexpr = 32 // BITS
    offs_k = (offs_u * (4 * PART))[:, None] + tl.arange(0, PART)[None, :]
    first = load_values(ptr, offs_k, K, EVEN)
    second = load_values(ptr, offs_k + PART, K, EVEN)
    third = load_values(ptr, offs_k + 2 * PART, K, EVEN)
    return first, second, third, load_values(ptr, offs_k + 3 * PART, K, EVEN)


@triton.jit
def load_values(ptr, offs_k, K: tl.constexpr, EVEN: tl.constexpr):
    return tl.load(ptr + offs_k, mask=None if EVEN else offs_k < K, other=None if EVEN else 0.0)


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
def bytes_of(x0, x1, x2, x3, power):
    """x [units, columns] as integers of 16 bits: words of the low bytes of x0 to x3, of the high ones, their sums and
    power [units].
    """
    i0, i1, i2, i3 = bits_of_integer(x0), bits_of_integer(x1), bits_of_integer(x2), bits_of_integer(x3)
    COLUMNS: tl.constexpr = 4 * x0.shape[1]
    SUM_OF_INTEGERS: tl.constexpr = (COLUMNS * BITS_OF_INTEGER + 2**31) % 2**32 - 2**31
    sum_x = tl.sum(i0 + i1 + i2 + i3, axis=1) - SUM_OF_INTEGERS
    even = (i0 & 0xFFFF) | (i2 << 16)
    odd = (i1 & 0xFFFF) | (i3 << 16)
    low = (even & 0xFF00FF) | ((odd & 0xFF00FF) << 8)
    high = ((even >> 8) & 0xFF00FF) | (odd & -0xFF0100)
    return low, high, sum_x, power


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
def bytes_of_x(x, norm, NORM: tl.constexpr):
    """x of `load_units`, with NORM times the norm's weights, as a tuple of `bytes_of`, and the sums of its squares
    [units].

    x of a unit are integers of 16 bits times a power of two, off by 2^-15 of the largest of them at most; bfloat16 is
    off by 2^-9 of each. Float32 x are integers twice, the second time what the first took.
    """
    x0, x1, x2, x3 = x
    TWICE: tl.constexpr = x0.dtype == tl.float32
    x0, x1, x2, x3 = x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)
    squares = tl.zeros([x0.shape[0]], tl.float32)
    if NORM:
        squares = (sum_of_squares(x0) + sum_of_squares(x1)) + (sum_of_squares(x2) + sum_of_squares(x3))
        n0, n1, n2, n3 = norm
        x0, x1, x2, x3 = x0 * n0.to(tl.float32), x1 * n1.to(tl.float32), x2 * n2.to(tl.float32), x3 * n3.to(tl.float32)
    power, inverse = powers(x0, x1, x2, x3)
    inverse = inverse[:, None]
    x0, x1, x2, x3 = x0 * inverse, x1 * inverse, x2 * inverse, x3 * inverse
    x = bytes_of(x0, x1, x2, x3, power)
    if TWICE:
        return (x, bytes_of(rest(x0), rest(x1), rest(x2), rest(x3), power * 2.0**-15)), squares
    else:
        return (x,), squares


@triton.jit
def sum_of_squares(x):
    return tl.sum(x * x, axis=1)


@triton.jit
def add_products(acc, w, scale, x, BITS: tl.constexpr):
    """acc [rows, units] and the products of a tile's words with x of `bytes_of_x`.

    The sum of (q - ZERO) x is exact. A group's scale is multiplied by it, its offset by the sum of x. With codes the
    sum is still to be multiplied by the row's unit.
    """
    R: tl.constexpr = acc.shape[0]
    U: tl.constexpr = acc.shape[1]
    ZERO: tl.constexpr = ZERO_8 if BITS == 8 else ZERO_4
    words = quarters(w, R, U)
    for time in tl.static_range(len(x)):
        low, high, sum_x, power = x[time]
        dot = dot_words(tl.zeros([R, U], tl.int32), words, high, U, BITS, True)
        dot = dot_words((dot << 8) - (sum_x * ZERO)[None, :], words, low, U, BITS, False)
        if scale.dtype == tl.int16:
            s, z = decode(scale)
            acc += s * power[None, :] * (dot * STEPS_OF_SCALE + z * sum_x[None, :]).to(tl.float32)
        else:
            acc += (scale << 16).to(tl.float32, bitcast=True) * power[None, :] * dot.to(tl.float32)
            acc += (scale & -65536).to(tl.float32, bitcast=True) * (sum_x.to(tl.float32) * power)[None, :]
    return acc


@triton.jit
def decode(codes):
    """s, float32, and z of codes; see minirea.quantize."""
    bits = codes.to(tl.int32)
    return (((bits << 18) & (255 << 18)) | BITS_OF_LEAST).to(tl.float32, bitcast=True), bits >> 8


@triton.jit
def product_of_words(
    weights, first_row, rows, x_ptr, norm_ptr, fetch: tl.constexpr, to, K: tl.constexpr, NORM: tl.constexpr,
    BLOCK_K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """product_of_values of a QuantizedMatrix, words with BLOCK_K columns at a time."""
    if EARLY:
        gdc_launch_dependents()
    UNITS: tl.constexpr = GROUP * BITS // 128  # of a group: units of four words, which a thread loads at once
    W: tl.constexpr = (K + GROUP - 1) // GROUP * UNITS * 4
    BLOCK_U: tl.constexpr = BLOCK_K * BITS // 128
    EVEN: tl.constexpr = K % BLOCK_K == 0
    LATE: tl.constexpr = BITS == 4 and K > BLOCK_K  # there are no registers for `fetched` before
    offs_u = tl.arange(0, BLOCK_U)
    w_ptrs, scale_ptrs = pointers_to_words(weights, first_row, rows, K, BITS, GROUP)
    w, scale = load_words(w_ptrs, scale_ptrs, 0, BLOCK_U, W, UNITS, EVEN)
    norm = load_units(norm_ptr, offs_u, K, BITS, EVEN) if NORM else None
    if EARLY:
        gdc_wait()
    if not LATE:
        fetched = fetch(to, rows)
        if not NORM:
            tl.debug_barrier()  # keeps that load here; the compiler would move it to its use
    x = load_units(x_ptr, offs_u, K, BITS, EVEN)
    if not NORM:
        norm = x  # not used; of the kind that a loop can carry
    acc = tl.zeros([rows.shape[0], BLOCK_U], tl.float32)
    squares = tl.zeros([BLOCK_U], tl.float32)
    for first in range(BLOCK_U, W // 4, BLOCK_U):
        next_w, next_scale = load_words(w_ptrs, scale_ptrs, first, BLOCK_U, W, UNITS, EVEN)
        next_x = load_units(x_ptr, first + offs_u, K, BITS, EVEN)
        next_norm = load_units(norm_ptr, first + offs_u, K, BITS, EVEN) if NORM else next_x
        x_bytes, more = bytes_of_x(x, norm, NORM)
        acc, squares = add_products(acc, w, scale, x_bytes, BITS), squares + more
        w, scale, x, norm = next_w, next_scale, next_x, next_norm
    x_bytes, more = bytes_of_x(x, norm, NORM)
    acc, squares = add_products(acc, w, scale, x_bytes, BITS), squares + more
    out = tl.sum(acc, axis=1)
    if LATE:
        fetched = fetch(to, rows)
    if scale.dtype == tl.int16:
        out *= tl.load(weights.unit + rows)  # here, since there are no registers for it before
    return out, tl.sum(squares, axis=0), fetched


@triton.jit
def pointers_to_words(weights, first_row, rows, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Of the words and scales of rows, [rows, 1] each."""
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    W: tl.constexpr = GROUPS * (GROUP * BITS // 32)
    w_ptrs = weights.ptr + first_row.to(tl.int64) * W + (rows - first_row)[:, None] * W
    return w_ptrs, weights.scale + first_row.to(tl.int64) * GROUPS + (rows - first_row)[:, None] * GROUPS


@triton.jit
def load_rows_of_words(
    weights, first_row, rows, K: tl.constexpr, BLOCK_K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Words and scales of whole rows, of one piece of BLOCK_K columns, and their units, 1 without codes."""
    UNITS: tl.constexpr = GROUP * BITS // 128
    W: tl.constexpr = (K + GROUP - 1) // GROUP * UNITS * 4
    w_ptrs, scale_ptrs = pointers_to_words(weights, first_row, rows, K, BITS, GROUP)
    w, scale = load_words(w_ptrs, scale_ptrs, 0, BLOCK_K * BITS // 128, W, UNITS, K % BLOCK_K == 0)
    return w, scale, tl.load(weights.unit + rows) if scale.dtype == tl.int16 else 1.0


@triton.jit
def product_of_tile(tile, x, BITS: tl.constexpr):
    """Of `load_rows_of_words` with x of `bytes_of_x`: float32 [rows]."""
    w, scale, unit = tile
    return tl.sum(add_products(tl.zeros(scale.shape, tl.float32), w, scale, x, BITS), axis=1) * unit


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
    x_ptr, norm_ptr, weights, bias_ptr, eps, seq_len_ptr, q_ptr, k, v, near,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr,
    NEAR_K: tl.constexpr, NEAR_V: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    X: tl.constexpr = (H + 2 * G) * D
    products(weights, x_ptr, norm_ptr, eps, fetch_seq_len, write_qkv,
             Caches(q_ptr, k, v, near, bias_ptr, seq_len_ptr, H, G, D, BIAS, NEAR_K, NEAR_V, BITS), X, 0, K, True,
             BLOCK_N, BLOCK_K, BITS, GROUP, BLOCKS, EARLY)  # fmt: skip


@triton.jit
def fetch_seq_len(to, _rows):
    return tl.load(to.seq_len)


@triton.jit
def write_qkv(out, block, to, seq_len):
    first, rows = rows_of(block, (to.H + 2 * to.G) * to.D, 0, out.shape[0], to.BITS)
    mask = first + tl.arange(0, out.shape[0]) < (to.H + 2 * to.G) * to.D
    if to.BIAS:
        out += tl.load(to.bias + rows).to(tl.float32)
    out = out.to(to.q.dtype.element_ty)
    offs_d = rows % to.D
    position = seq_len.to(tl.int64) - 1
    k_head = rows // to.D - to.H
    v_head = k_head - to.G
    mask_k = mask & (k_head >= 0) & (v_head < 0)
    mask_v = mask & (v_head >= 0)
    k_ptrs = to.k.ptr + k_head.to(tl.int64) * to.k.stride_h + position * to.k.stride_n + offs_d
    v_ptrs = to.v.ptr + v_head.to(tl.int64) * to.v.stride_h + position * to.v.stride_n + offs_d
    tl.store(to.q + rows, out, mask=mask & (k_head < 0))
    tl.store(k_ptrs, out, mask=mask_k)
    tl.store(v_ptrs, out, mask=mask_v)
    if to.NEAR_K:
        row = k_head.to(tl.int64) * to.NEAR_K + position % to.NEAR_K
        tl.store(to.near.k + row * to.D + offs_d, out, mask=mask_k)
    if to.NEAR_V:
        row = v_head.to(tl.int64) * to.NEAR_V + position % to.NEAR_V
        tl.store(to.near.v + row * to.D + offs_d, out, mask=mask_v)


@triton.jit
def add_product_kernel(
    x_ptr, weights, bias_ptr, out_ptr, N: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    products(weights, x_ptr, x_ptr, 0.0, fetch_out, add_to_out, Target(out_ptr, bias_ptr, N, BIAS, BITS), N, 0, K,
             False, BLOCK_N, BLOCK_K, BITS, GROUP, BLOCKS, EARLY)  # fmt: skip


@triton.jit
def fetch_out(to, rows):
    return tl.load(to.out + rows).to(tl.float32)


@triton.jit
def add_to_out(out, block, to, old):
    first, rows = rows_of(block, to.N, 0, out.shape[0], to.BITS)
    if to.BIAS:
        out += tl.load(to.bias + rows).to(tl.float32)
    out += old
    mask = first + tl.arange(0, out.shape[0]) < to.N
    tl.store(to.out + rows, out.to(to.out.dtype.element_ty), mask=mask)


@triton.jit
def norm_gate_up_kernel(
    x_ptr, norm_ptr, weights, bias_ptr, eps, out_ptr, F: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of the matrix are BLOCK_N / 2 features: their gate rows, then their up rows."""
    products(weights, x_ptr, norm_ptr, eps, fetch_nothing, write_activations,
             Target(out_ptr, bias_ptr, F, BIAS, BITS), F, F, K, True,
             BLOCK_N, BLOCK_K, BITS, GROUP, BLOCKS, EARLY)  # fmt: skip


@triton.jit
def fetch_nothing(_to, _rows):
    return 0


@triton.jit
def write_activations(out, block, to, _):
    half: tl.constexpr = out.shape[0] // 2
    offs_n = tl.arange(0, 2 * half)
    first, features = rows_of(block, to.N, 0, half, to.BITS)
    if to.BIAS:
        _, rows = rows_of(block, to.N, to.N, 2 * half, to.BITS)
        out += tl.load(to.bias + rows).to(tl.float32)
    offs_f = tl.arange(0, half)[:, None]
    gate = tl.sum(tl.where(offs_n[None, :] == offs_f, out[None, :], 0.0), axis=1)
    up = tl.sum(tl.where(offs_n[None, :] == offs_f + half, out[None, :], 0.0), axis=1)
    act = gate / (1.0 + tl.exp(-gate)) * up
    mask = first + tl.arange(0, half) < to.N
    tl.store(to.out + features, act.to(to.out.dtype.element_ty), mask=mask)


@triton.jit
def norm_logits_kernel(
    x_ptr, norm_ptr, weights, eps, logits_ptr, V: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    products(weights, x_ptr, norm_ptr, eps, fetch_nothing, write_logits,
             Target(logits_ptr, logits_ptr, V, False, BITS), V, 0, K, True,
             BLOCK_N, BLOCK_K, BITS, GROUP, BLOCKS, EARLY)  # fmt: skip


@triton.jit
def write_logits(out, block, to, _):
    first, rows = rows_of(block, to.N, 0, out.shape[0], to.BITS)
    tl.store(to.out + rows, out, mask=first + tl.arange(0, out.shape[0]) < to.N)


@triton.jit
def lowest_of_best(logit, token_id):
    """The largest of some logits, and the lowest id that has it."""
    best = tl.max(logit, axis=0)
    return best, tl.min(tl.where(logit == best, token_id, 2147483647), axis=0)


@triton.jit
def best_token_kernel(
    logits_ptr, best_ptr, best_id_ptr, done_ptr, new, V: tl.constexpr, SLICE: tl.constexpr,
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
        leave_token(tl.where(tl.abs(winner) < float("inf"), token, -1).to(tl.int64), new)
        tl.store(done_ptr, 0)


@triton.jit
def keep_token_kernel(token_ptr, new, EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    leave_token(tl.load(token_ptr), new)


@triton.jit
def leave_token(token, new):
    tl.store(new.token, token)
    tl.store(new.on_host + tl.load(new.seq_len) % 2, token)


# ----------------------------------------------------------------------------------------------------------- launchers

BEST_PROGRAMS: Final = 64


class Tile(NamedTuple):
    """Rows and columns of weights that a program multiplies at a time, its warps; quantized weights' bits, and columns
    of a group; blocks of so many rows of a program.
    """

    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    BITS: int = 0
    GROUP: int = 0
    BLOCKS: int = 1

    def programs(self, num_rows: int, side: int) -> int:
        """For num_rows in blocks of `side`."""
        return cdiv(cdiv(num_rows, side), self.BLOCKS)


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
    if K >= 8192 and (few or bits == 4):
        rows, warps = (4 if few else 8), [8]
    elif bits == 8:
        rows, warps = (4 if few else 8), [4, 2, 1]
        if N >= 12288 and 8 * columns == K:
            warps = [8]
    elif not few and K >= 4096:
        rows, warps = 8, [4]
    else:
        rows, warps = (8 if N > 5120 else 4), [2, 1]
    num_warps = min(warps, key=lambda count: cdiv(K, columns * count) * count)
    one_piece = columns * num_warps >= K
    blocks = 2 if bits == 4 and one_piece and N > 5120 else 1
    return Tile(rows, columns * num_warps, num_warps, bits, matrix.group_size, blocks)


def weights_of(matrix: Matrix) -> Weights:
    if not isinstance(matrix, QuantizedMatrix):
        return Weights(matrix)
    if matrix.units is None:
        return Weights(matrix.words, matrix.scale_offset.view(torch.int32))
    return Weights(matrix.words, matrix.scale_offset, matrix.units)


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
        t.programs((H + 2 * G) * D, t.BLOCK_N),
        x_E.device,
        x_E,
        norm_E,
        weights_of(qkv_XE),
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
        t.programs(N, t.BLOCK_N),
        x_K.device,
        x_K,
        weights_of(w_NK),
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
        t.programs(F, t.BLOCK_N // 2),
        x_E.device,
        x_E,
        norm_E,
        weights_of(gate_up_ME),
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
        t.programs(V, t.BLOCK_N),
        x_E.device,
        x_E,
        norm_E,
        weights_of(head_VE),
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


class NewToken(NamedTuple):
    """Where a step leaves its token.

    Attributes:
        token: int64 [1], for the next step.
        seq_len: int32 [1], cached tokens, the one that this step is fed among them.
        on_host: int64 [2], pinned memory of the host, where it lies at seq_len % 2: a copy would take as long as a
            small product between two steps. The one before stays, which the host may not have read yet
            (minirea.graph). Not to be freed before the step has ended.
    """

    token: torch.Tensor
    seq_len: torch.Tensor
    on_host: torch.Tensor

    @classmethod
    def on(cls, device: torch.device, token: int, seq_len: int) -> NewToken:
        """Before the first step, which takes `token`."""
        # Filled there: a copy from the host would wait for the prompt, and the first step's launches with it.
        first = torch.full((1,), token, dtype=torch.int64, device=device)
        cached = torch.full((1,), seq_len, dtype=torch.int32, device=device)
        return cls(first, cached, torch.empty(2, dtype=torch.int64, pin_memory=device.type == "cuda"))


def keep_token(token: torch.Tensor, new: NewToken) -> None:
    """Leave a token int64 [1]."""
    launch(keep_token_kernel, 1, token.device, token, new)


def best_token(logits_V: torch.Tensor, workspace: BestTokenWorkspace, new: NewToken) -> None:
    """Leave the id of the largest logit, the lowest of equals; -1 if one is NaN or the largest infinite."""
    V = logits_V.shape[0]
    launch(
        best_token_kernel,
        BEST_PROGRAMS,
        logits_V.device,
        logits_V,
        *workspace,
        new,
        V=V,
        SLICE=cdiv(V, BEST_PROGRAMS),
        PROGRAMS=BEST_PROGRAMS,
        BLOCK_V=1024,
    )
