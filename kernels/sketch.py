"""What a sketch of keys is, and why no key that it rules out can win; shared by both implementations.

A decode step ranks all keys of the middle, and few can win. A sketch is an int8 copy of a key with a bound on what it
leaves out. It is half as many bytes, and bounds every score from both sides, so that only the keys whose upper bound
reaches the K-th largest lower bound have to be scored exactly. The selection is the exact one, ties included.

With R an orthonormal Hadamard rotation, m a vector that is the same for all keys of a head (here R times a mean key),
c the int8 codes of a key and s its scale:

    q . k = Rq . Rk = Rq . m  +  Rq . s c  +  Rq . (Rk - m - s c)

The first term is the same for all keys and changes no order. The second is computed from integers: Rq is rounded to
16 bits, in units of its largest element over LEVELS, and multiplied in two int8 parts. The third is at most |q| times
the norm of what rounding left out of Rk - m, which is measured. Arithmetic is float32, so each key's `error` also holds
what the float32 sums, of Rk, of Rq and of the exact score that it is compared with, can be off. A float32 sum of D
products in any order is off by at most D UNIT times the sum of their sizes; all three are counted twice.

    |q . k - Rq . m - s (c . rounded Rq)| <= |q| error
    error = |rest| + query_error |Rk - m| + sum_error (|k|_1 + |k|)

|k|_1 sums absolute values: an element of Rk is such a sum of all of k's, and C of them make a norm sqrt(C) larger, by
which R divides. For the query, whose error counts only by |s c|, |q|_1 <= sqrt(D) |q| does.

Scale and error are rounded up to bfloat16 and kept as the upper and lower half of one int32. A key that is not finite,
or too large for these bounds, has an infinite error: it is always scored exactly.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import torch

UNIT: Final = 2.0**-23  # a float32 operation is off by at most half of it; matrix units cut off instead of rounding
LEVELS: Final = 127 * 256  # of the largest element of a query: 256 times an int8, plus another
SMALLEST: Final = 1e-30  # added to every error: what float32 may flush to zero
SMALLEST_KEY: Final = 1e-30  # of the largest element of Rk - m; a smaller one has a scale of 0
LARGEST_KEY: Final = 1e25
SMALLEST_QUERY: Final = 1e-5  # of the largest element of Rq; keys are scored exactly for a smaller one
LARGEST_QUERY: Final = 1e15  # of |q|
SLACK: Final = 1.001  # for norms and bounds, whose own sums are rounded
MEAN_KEYS: Final = 4096  # of which the mean is taken; any vector would be right


class Sketch(NamedTuple):
    """The sketch of a cache's keys: tensors, or what a kernel is given of them."""

    codes: Any  # int8 [G, N, C]
    scales: Any  # int32 [G, N, 1]: scale above, error below, both bfloat16
    mean: Any  # float32 [G, C]: R times a mean key


def width(head_dim: int) -> int:
    """C, elements of a rotated key: a power of two, and as many as the matrix unit takes of int8."""
    return max(32, 1 << (head_dim - 1).bit_length())


def hadamard(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """The first `rows` of a Hadamard matrix, float32 [rows, columns], of 1 and -1; `columns` is a power of two."""
    both = torch.arange(rows, device=device)[:, None] & torch.arange(columns, device=device)
    for shift in (8, 4, 2, 1):
        both = both ^ (both >> shift)
    return (1 - 2 * (both & 1)).float()


def query_error(head_dim: int) -> float:
    """Bound on |Rq - rounded Rq| / |q|, in units of |Rk - m|, which |s c| may exceed by a tenth."""
    rounded = 0.52 * math.sqrt(width(head_dim)) / LEVELS
    return 1.1 * (rounded + 2 * head_dim**1.5 * UNIT + 2.0**-20)


def sum_error(head_dim: int) -> float:
    """Bound on the error of a float32 sum of D products, counted twice, relative to the sum of their sizes."""
    return 2 * head_dim * UNIT


def sketch_bytes(num_kv_heads: int, head_dim: int, capacity: int) -> int:
    """Of one layer's sketch."""
    C = width(head_dim)
    return num_kv_heads * (capacity * (C + torch.int32.itemsize) + C * torch.float32.itemsize)


def new_sketch(num_kv_heads: int, head_dim: int, capacity: int, device: torch.device) -> Sketch:
    """Memory for the sketch of a layer's keys; the mean is zero."""
    G, C = num_kv_heads, width(head_dim)
    return Sketch(
        torch.empty(G, capacity, C, dtype=torch.int8, device=device),
        torch.empty(G, capacity, 1, dtype=torch.int32, device=device),
        torch.zeros(G, C, dtype=torch.float32, device=device),
    )
