"""What a CPU does in its own way: half-precision matrices for float32 arithmetic, and attention and norm of one row.

A decode step reads every matrix once, so its speed is that of memory. torch's float32 matrix-vector product runs on one
core; FBGEMM, which x86 builds of torch bring along, has a product of float32 vectors with float16 matrices that
accumulates in float32, runs on all cores and reads half as many bytes. For weights that a checkpoint stores in bfloat16
or float16 the change of format loses nothing (see `pack`): it is float32 arithmetic at half the memory.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minirea.threads import thread_pool

HALF_TYPES: Final = (torch.bfloat16, torch.float16)
MAX_PREPARING_THREADS: Final = 4  # each holds one matrix in float32
_LARGEST_EXPONENT: Final = 15  # packed weights lie in (-2^15, 2^15)
_LARGEST_SCALE: Final = 126  # as an exponent: its inverse is a normal float32

_ZERO: Final = torch.zeros((), dtype=torch.float32, device="cpu")
_LARGEST: Final = torch.finfo(torch.float32).max
_FLASH: Final = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # also gives the sums of exponentials


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
    scaled = matrix_NK.float().mul_(scale)  # three times faster than one product of both dtypes
    packed = torch.ops.quantized.linear_prepack_fp16(scaled, None)
    return PackedMatrix(packed, scale, matrix_NK.numel() * torch.float16.itemsize)


def preparing_bytes(sizes: Iterable[int]) -> int:
    """What `prepare` holds at most beside its arguments and results, for matrices of so many elements.

    Each of its threads has a matrix in float32, and the packed one beside the one that it replaces.
    """
    largest = heapq.nlargest(_preparing_threads(), sizes)
    return sum(largest) * (torch.float32.itemsize + torch.float16.itemsize)


def _preparing_threads() -> int:
    return min(MAX_PREPARING_THREADS, torch.get_num_threads())


def prepare(weights: dict[str, Tensor], dtype: torch.dtype, progress: bool = False) -> dict[str, Any]:
    """Every matrix as this CPU multiplies by it fastest, for arithmetic in `dtype`. `weights` is emptied on the way.

    Half-precision matrices are packed for float32 arithmetic; the embedding, of which rows are looked up, stays.
    Others are stored column by column, which MKL multiplies one row by twice as fast as row by row.

    Args:
        progress: show a bar of bytes on stderr: packing takes longer than reading.

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

    sizes = {name: tensor.nbytes for name, tensor in weights.items()}
    names = sorted(sizes, key=sizes.__getitem__, reverse=True)  # no thread should be left with the largest at the end
    prepared = {}
    with (
        thread_pool(_preparing_threads(), "prepare") as pool,
        tqdm(
            total=sum(sizes.values()),
            unit="B",
            unit_scale=True,
            desc="packing",
            delay=1,
            leave=False,
            disable=not progress,
        ) as bar,
    ):
        for name, matrix in zip(names, pool.map(fastest, names), strict=True):
            prepared[name] = matrix
            bar.update(sizes[name])
    if tied:
        prepared["head.weight"] = prepared["embed.weight"]
    return prepared


def attend(q_GRD: Tensor, k_GND: Tensor, v_GND: Tensor) -> Tensor:
    """Softmax attention of R rows per key/value head over all N keys, float32, scale 1 / sqrt(D): [G, R, D].

    For the few rows of a decode step two matrix products beat torch's flash attention, which splits its work by rows.
    """
    p_GRN = torch.bmm(q_GRD, k_GND.mT).mul_(q_GRD.shape[-1] ** -0.5).softmax(-1)
    return torch.bmm(p_GRN, v_GND)


def attend_causal(q_THD: Tensor, k_GND: Tensor, v_GND: Tensor) -> Tensor:
    """Causal softmax attention of the last T of N tokens over all N, scale 1 / sqrt(D): [T, H, D].

    Two calls of torch's flash attention, and no mask: every query sees the N - T tokens before the chunk, and the
    chunk itself is a square, whose upper half is skipped. The logarithms of both sums of exponentials say what share
    each has of the whole.
    """
    (T, H, D), (G, N, _) = q_THD.shape, k_GND.shape
    q_GMTD = q_THD.unflatten(1, (G, H // G)).permute(1, 2, 0, 3)  # M = H / G query heads that share keys
    shape = (G, H // G, T, D)
    k_GMTD, v_GMTD = (x[:, None, N - T :].expand(shape) for x in (k_GND, v_GND))
    out_GMTD, sum_GMT = _FLASH(q_GMTD, k_GMTD, v_GMTD, 0.0, is_causal=True)
    if N > T:
        q_G1RD = q_GMTD.flatten(1, 2)[:, None]  # query heads as rows of one head: larger products
        before, before_sum = _FLASH(q_G1RD, k_GND[:, None, : N - T], v_GND[:, None, : N - T], 0.0)
        share_GMT = torch.sigmoid(sum_GMT - before_sum.view(shape[:3]))
        out_GMTD = torch.lerp(before.view(shape), out_GMTD, share_GMT[..., None].to(out_GMTD.dtype))
    return out_GMTD.permute(2, 0, 1, 3).reshape(T, H, D)


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
    return torch.addcmul(_ZERO, x_TE, weight_E, value=min(inverse * factor, _LARGEST))
