"""A score and its position as one integer, so that one maximum finds the best score and settles ties.

Scores are compared by their bits, as int32, and with their positions as one int64: the inverted position is below the
score, so that of equal scores the lower position is the larger number.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

NO_SCORE: tl.constexpr = tl.constexpr(-2139095041)  # -inf
NO_KEY: tl.constexpr = tl.constexpr(-2139095041 << 32)  # has no position
TAKEN: tl.constexpr = tl.constexpr(-(1 << 63))
NOWHERE: tl.constexpr = tl.constexpr((1 << 31) - 1)  # a position after all others


@triton.jit
def to_order(score):
    """float32 -> the int32 with the same order. -0 + 0 is +0: they must tie."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def pack(order, position):
    """`to_order` of a score, and int32 -> one int64 that orders by score, then by lowest position."""
    return (order.to(tl.int64) << 32) | (0xFFFFFFFF - tl.cast(position, tl.int64))


@triton.jit
def position_of(packed):
    """The int32 position of a packed number; below zero where there is no key."""
    return (0xFFFFFFFF - (packed & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def take_best(packed, K: tl.constexpr, K_PAD: tl.constexpr):
    """The K largest of each row of packed [M, N], descending: int64 [M, K_PAD]."""
    offs_k = tl.arange(0, K_PAD)[None, :]
    best = tl.full([packed.shape[0], K_PAD], NO_KEY, tl.int64)
    for i in range(K):
        top = tl.max(packed, axis=1)[:, None]
        best = tl.where(offs_k == i, top, best)
        packed = tl.where(packed == top, TAKEN, packed)
    return best
