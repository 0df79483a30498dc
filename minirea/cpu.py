"""What a CPU does in its own way: half-precision matrices for float32 arithmetic, and attention and norm of one row.

A decode step reads every matrix once, so its speed is that of memory. torch's float32 matrix-vector product runs on one
core; FBGEMM, which x86 builds of torch bring along, has a product of float32 vectors with float16 matrices that
accumulates in float32, runs on all cores and reads half as many bytes. For weights that a checkpoint stores in bfloat16
or float16 the change of format loses nothing (see `pack`): it is float32 arithmetic at half the memory.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

HALF_TYPES: Final = (torch.bfloat16, torch.float16)
PACKING_THREADS: Final = min(2, os.cpu_count() or 1)  # each holds one matrix in float32
_LARGEST_EXPONENT: Final = 15  # packed weights lie in (-2^15, 2^15)
_LARGEST_SCALE: Final = 126  # as an exponent: its inverse is a normal float32

_ZERO: Final = torch.zeros(())


class PackedMatrix:
    """A matrix [N, K] in FBGEMM's layout of float16, times `scale`, a power of two. Made by `pack`."""

    def __init__(self, packed: Any, scale: float, nbytes: int) -> None:
        self.packed = packed
        self.inverse_scale = 1 / scale
        self.nbytes = nbytes

    def multiply(self, x_TK: Tensor) -> Tensor:
        """x_TK times the matrix transposed times the scale, float32 [T, N]."""
        # torch looks for __torch_function__ on every argument. On the packed one the search ends in two C++ exceptions,
        # which cost 9 us, more than a small matrix takes.
        with torch._C.DisableTorchFunctionSubclass():
            return torch.ops.quantized.linear_dynamic_fp16(x_TK, self.packed)


def can_pack() -> bool:
    """Whether this machine's torch has FBGEMM."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def pack(matrix_NK: Tensor) -> PackedMatrix:
    """Pack a bfloat16 or float16 matrix for products with float32 vectors.

    float16 keeps 11 significant bits, bfloat16 has 8, so only exponents could be lost. Scaled until the largest weight
    is just below 2^15, every weight within 2^-32 of it is kept exactly, and the error of a smaller one is at most 2^-40
    of the largest: far below the rounding of a float32 sum that the largest takes part in.
    """
    low, high = torch.aminmax(matrix_NK)
    largest = max(-float(low), float(high))
    scale = 2.0 ** min(_LARGEST_SCALE, _LARGEST_EXPONENT - math.frexp(largest)[1])
    scaled = torch.empty(matrix_NK.shape, dtype=torch.float32)
    torch.mul(matrix_NK, scale, out=scaled)
    packed = torch.ops.quantized.linear_prepack_fp16(scaled, None)
    return PackedMatrix(packed, scale, matrix_NK.numel() * torch.float16.itemsize)


def prepare(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """Every matrix as this CPU multiplies by it fastest, for arithmetic in `dtype`. `weights` is emptied on the way.

    Half-precision matrices are packed for float32 arithmetic; the embedding, of which rows are looked up, stays.
    Others are stored column by column, which MKL multiplies one row by twice as fast as row by row.

    Returns:
        name -> Tensor or PackedMatrix. A tied head is one object with the embedding unless it is packed.
    """
    halves = dtype == torch.float32 and weights["embed.weight"].dtype in HALF_TYPES
    tied = weights["head.weight"] is weights["embed.weight"] and not halves
    if tied:
        del weights["head.weight"]

    def fastest(name: str) -> Tensor | PackedMatrix:
        tensor = weights.pop(name)
        half = dtype == torch.float32 and tensor.dtype in HALF_TYPES
        if tensor.dim() == 1 or (half and name == "embed.weight"):
            return tensor
        return pack(tensor) if half else tensor.t().contiguous().t()

    names = list(weights)
    with ThreadPoolExecutor(PACKING_THREADS) as pool:
        prepared = dict(zip(names, pool.map(fastest, names), strict=True))
    if tied:
        prepared["head.weight"] = prepared["embed.weight"]
    return prepared


def linear(x_TK: Tensor, matrix_NK: Tensor | PackedMatrix, bias_N: Tensor | None = None) -> Tensor:
    """x_TK times the matrix transposed, plus the bias: [T, N]. On any device; only a CPU has packed matrices."""
    if isinstance(matrix_NK, PackedMatrix):
        out_TN = matrix_NK.multiply(x_TK).mul_(matrix_NK.inverse_scale)
        return out_TN if bias_N is None else out_TN.add_(bias_N)
    return F.linear(x_TK, matrix_NK, bias_N)


def add_linear(sum_TN: Tensor, x_TK: Tensor, matrix_NK: Tensor | PackedMatrix, bias_N: Tensor | None = None) -> None:
    """sum_TN += linear(...), by a product that ends in the sum where there is one: one rounding, no pass of its own."""
    if bias_N is not None:
        sum_TN += linear(x_TK, matrix_NK, bias_N)
    elif isinstance(matrix_NK, PackedMatrix):
        sum_TN.add_(matrix_NK.multiply(x_TK), alpha=matrix_NK.inverse_scale)
    else:
        sum_TN.addmm_(x_TK, matrix_NK.t())


def norm_linear(
    x_TE: Tensor, norm_E: Tensor, eps: float, matrix_NE: Tensor | PackedMatrix, bias_N: Tensor | None = None
) -> Tensor:
    """linear(rms_norm(x_TE), ...): [T, N]. The scale of a packed matrix is undone in the norm, where it costs least.

    A power of two commutes with the product, exactly but for elements so small that they turn subnormal.
    """
    if not isinstance(matrix_NE, PackedMatrix):
        return linear(rms_norm(x_TE, norm_E, eps), matrix_NE, bias_N)
    out_TN = matrix_NE.multiply(rms_norm(x_TE, norm_E, eps, matrix_NE.inverse_scale))
    return out_TN if bias_N is None else out_TN.add_(bias_N)


def attend(q_GRD: Tensor, k_GND: Tensor, v_GND: Tensor) -> Tensor:
    """Softmax attention of R rows per key/value head over all N keys, float32, scale 1 / sqrt(D): [G, R, D].

    For the few rows of a decode step two matrix products beat torch's flash attention, which splits its work by rows.
    """
    p_GRN = torch.bmm(q_GRD, k_GND.mT).mul_(q_GRD.shape[-1] ** -0.5).softmax(-1)
    return torch.bmm(p_GRN, v_GND)


def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float, factor: float = 1.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight * factor per row.

    torch composes its own of nine operations on a CPU. One float32 row takes two: its mean square as a number, which
    costs no wait where there is no device to wait for, and 0 + x * weight * number as one operation.
    """
    if x_TE.shape[0] > 1 or x_TE.dtype != torch.float32:
        out_TE = F.rms_norm(x_TE, weight_E.shape, weight_E, eps)
        return out_TE if factor == 1 else out_TE.mul_(factor)
    x_E = x_TE[0]
    inverse = (torch.dot(x_E, x_E).item() / len(x_E) + eps) ** -0.5
    return torch.addcmul(_ZERO, x_TE, weight_E, value=inverse * factor)
