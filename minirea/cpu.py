"""Matrices as a CPU multiplies by them fastest, and its norm. Its attention is in minirea.cpu_attention.

Arithmetic in float32 takes them as a checkpoint has them, those of bfloat16 in 12 bits a weight (minirea.compact), by
the kernels of minirea.kernels.cpu. A processor with tiles for bfloat16 (AMX) multiplies it seven times as fast as
float32. Arithmetic in bfloat16 is there that of products, attention and the cache; what they add up in, norms and the
search's scores are float32.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minirea.kernels.cpu.compile import available
from minirea.kernels.cpu.pack import pack
from minirea.pages import collapsed
from minirea.progress import bar_of_bytes
from minirea.quantize import QuantizedMatrix
from minirea.threads import thread_pool

GATE_UP: Final = "gate_up.weight"
MAX_PREPARING_THREADS: Final = 4  # each holds one matrix in float32
_ZERO: Final = torch.zeros((), dtype=torch.float32, device="cpu")
_ROWS_AT_ONCE: Final = 128  # that several operations go over while they stay in the processor's second cache
_LARGEST: Final = torch.finfo(torch.float32).max
_MULTIPLY_TILED: Final = torch.ops.mkldnn._linear_pointwise
_ROWS_TILED_FOR: Final = 512  # of the left matrix: a layout for so many is as fast for one


class TiledMatrix:
    """A bfloat16 matrix [N, K] in oneDNN's layout for products of tiles. Made by `tile`."""

    def __init__(self, packed: Tensor, shape: tuple[int, int]) -> None:
        self.packed, self.shape = packed, shape

    @property
    def nbytes(self) -> int:
        return _one_tiled_bytes(*self.shape)

    def multiply(self, x_TK: Tensor, bias_N: Tensor | None = None) -> Tensor:
        """x_TK times the matrix transposed plus the bias, bfloat16 [T, N]; its sums are of float32."""
        return _MULTIPLY_TILED(x_TK, self.packed, bias_N, "none", [], "")


class TiledGateUp(NamedTuple):
    """The matrices of a gated MLP, whose product can end in what follows it. Made by `tile_gate_up`."""

    gate: TiledMatrix  # [F, E] each
    up: TiledMatrix

    @property
    def nbytes(self) -> int:
        return self.gate.nbytes + self.up.nbytes

    @property
    def shape(self) -> tuple[int, int]:
        return 2 * self.gate.shape[0], self.gate.shape[1]

    def swiglu(self, x_TE: Tensor, bias_M: Tensor | None = None) -> Tensor:
        """silu(gate) * up of x, bfloat16 [T, F]."""
        gate_bias, up_bias = (None, None) if bias_M is None else bias_M.chunk(2)
        gate_TF = _MULTIPLY_TILED(x_TE, self.gate.packed, gate_bias, "swish", [], "")
        return _MULTIPLY_TILED(x_TE, gate_TF, self.up.packed, up_bias, "mul")


def tile(matrix_NK: Tensor) -> TiledMatrix:
    """Rearrange a bfloat16 matrix."""
    packed = torch.ops.mkldnn._reorder_linear_weight(matrix_NK.contiguous(), _ROWS_TILED_FOR)
    return TiledMatrix(packed, (matrix_NK.shape[0], matrix_NK.shape[1]))


def tile_gate_up(matrix_ME: Tensor) -> TiledGateUp:
    gate_FE, up_FE = matrix_ME.chunk(2)
    return TiledGateUp(tile(gate_FE), tile(up_FE))


def tiled_bytes(name: str, N: int, K: int) -> int:
    """What `prepare` makes of a matrix [N, K] for arithmetic of tiles, by its name."""
    return 2 * _one_tiled_bytes(N // 2, K) if name.endswith(GATE_UP) else _one_tiled_bytes(N, K)


def _one_tiled_bytes(N: int, K: int) -> int:
    """oneDNN fills up blocks of 32 rows by 32 columns."""
    return -(-N // 32) * 32 * -(-K // 32) * 32 * torch.bfloat16.itemsize


def multiplies_tiles(dtype: torch.dtype) -> bool:
    """Whether this CPU's arithmetic in `dtype` is that of its tiles."""
    return dtype == torch.bfloat16 and _has_tiles() and torch.backends.mkldnn.is_available()


def _has_tiles() -> bool:
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported and supported())


def preparing_bytes(sizes: Iterable[int]) -> int:
    """What `prepare` holds at most besides its arguments and results, for matrices of so many elements: each of its
    threads a matrix in both forms.
    """
    return sum(heapq.nlargest(_preparing_threads(), sizes)) * torch.float32.itemsize


def _preparing_threads() -> int:
    return min(MAX_PREPARING_THREADS, torch.get_num_threads())


def is_prepared(dtype: torch.dtype) -> bool:
    """Whether arithmetic in `dtype` is that of minirea.kernels.cpu, which takes matrices in half precision."""
    return dtype == torch.float32 and available()


def prepare(weights: dict[str, Any], dtype: torch.dtype, progress: bool = False) -> dict[str, Any]:
    """Every matrix as this CPU multiplies by it fastest, for arithmetic in `dtype`. `weights` is emptied on the way.

    For float32 rows those of bfloat16 become compact; for arithmetic of tiles they are rearranged. The embedding, of
    which rows are looked up, stays, and so do quantized ones. Where kernels for float32 rows cannot be compiled, and
    for other arithmetic, matrices are stored column by column, which MKL multiplies one row by twice as fast as row by
    row.

    Args:
        progress: show a bar of bytes on stderr.

    Returns:
        name -> Tensor, CompactMatrix, TiledMatrix, TiledGateUp or QuantizedMatrix. A tied head is one object with the
        embedding unless it is compact or tiled.
    """
    compact, tiled = is_prepared(dtype), multiplies_tiles(dtype)
    head = weights["head.weight"]
    tied = head is weights["embed.weight"] and not (compact or tiled)
    if tied:
        del weights["head.weight"]

    def fastest(name: str) -> Any:
        tensor = weights.pop(name)
        looked_up = name == "embed.weight" and (compact or tiled or isinstance(head, QuantizedMatrix))
        if isinstance(tensor, QuantizedMatrix) or tensor.dim() == 1 or looked_up:
            return tensor
        if compact:
            return (pack(tensor) if tensor.dtype == torch.bfloat16 else None) or tensor
        if tiled:
            return (tile_gate_up if name.endswith(GATE_UP) else tile)(tensor)
        return tensor.t().contiguous().t()

    sizes = {name: tensor.nbytes for name, tensor in weights.items()}
    names = sorted(sizes, key=sizes.__getitem__, reverse=True)  # no thread should be left with the largest at the end
    prepared = {}
    with (
        contextlib.nullcontext() if compact else collapsed(),
        thread_pool(_preparing_threads(), "prepare") as pool,
        bar_of_bytes(sum(sizes.values()), "packing", progress) as bar,
    ):
        for name, matrix in zip(names, pool.map(fastest, names), strict=True):
            prepared[name] = matrix
            bar.update(sizes[name])
    if tied:
        prepared["head.weight"] = prepared["embed.weight"]
    return prepared


def row_blocks(num_rows: int) -> Iterator[slice]:
    """Of up to _ROWS_AT_ONCE rows."""
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        yield slice(start, min(start + _ROWS_AT_ONCE, num_rows))


def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float, factor: float = 1.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight * factor per row.

    torch composes its own of nine operations on a CPU, twice as slow. One float32 row takes two: its mean square as a
    number, which costs no wait where there is no device to wait for, and 0 + x * weight * number as one operation. The
    result has the weight's dtype, in which products take it.
    """
    if x_TE.dtype != torch.float32:
        out_TE = F.rms_norm(x_TE, weight_E.shape, weight_E, eps)
        return out_TE if factor == 1 else out_TE.mul_(factor)
    T, E = x_TE.shape
    if T > 1:
        out_TE = torch.empty(T, E, dtype=weight_E.dtype)
        for rows in row_blocks(T):
            x_BE = x_TE[rows]
            mean_B1 = torch.linalg.vector_norm(x_BE, dim=1, keepdim=True).square_().div_(E)
            scale_B1 = mean_B1.add_(eps).rsqrt_().mul_(factor).clamp_(max=_LARGEST)
            out_TE[rows] = x_BE.mul(scale_B1).mul_(weight_E)
        return out_TE
    x_E = x_TE[0]
    inverse = (torch.dot(x_E, x_E).item() / E + eps) ** -0.5
    return torch.addcmul(_ZERO, x_TE, weight_E, value=min(inverse * factor, _LARGEST)).to(weight_E.dtype)
