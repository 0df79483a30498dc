"""Matrices as a CPU multiplies by them fastest, and its norm. Its attention is in minirea.cpu_attention.

A decode step reads every matrix once, so its speed is that of memory. torch's float32 matrix-vector product runs on one
core; FBGEMM, which x86 builds of torch bring along, has a product of float32 vectors with float16 matrices that
accumulates in float32, runs on all cores and reads half as many bytes. For weights that a checkpoint stores in bfloat16
or float16 the change of format loses nothing (see `pack`): it is float32 arithmetic at half the memory, but for
matrices of a few hundred columns, which the format pads to 512.

A processor with tiles for bfloat16 (AMX) multiplies it seven times as fast as float32. Arithmetic in bfloat16 is there
that of products, attention and the cache; what they add up in, norms and the search's scores are float32.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minirea.pages import collapsed
from minirea.progress import bar_of_bytes
from minirea.quantize import ZERO, QuantizedMatrix, quantized_bytes
from minirea.threads import thread_pool

HALF_TYPES: Final = (torch.bfloat16, torch.float16)
GATE_UP: Final = "gate_up.weight"
MAX_PREPARING_THREADS: Final = 4  # each holds one matrix in float32
_LARGEST_EXPONENT: Final = 15  # packed weights lie in (-2^15, 2^15)
_LARGEST_SCALE: Final = 126  # as an exponent: its inverse is a normal float32

_FEW_ROWS: Final = 16  # up to which torch's product with 4-bit weights is the fastest
PLANES_WIDENED_AT_ONCE: Final = 1 << 21  # weights

_ZERO: Final = torch.zeros((), dtype=torch.float32, device="cpu")
_ROWS_AT_ONCE: Final = 128  # that several operations go over while they stay in the processor's second cache
_LARGEST: Final = torch.finfo(torch.float32).max
_MULTIPLY_TILED: Final = torch.ops.mkldnn._linear_pointwise
_ROWS_TILED_FOR: Final = 512  # of the left matrix: a layout for so many is as fast for one


class PackedMatrix:
    """A matrix [N, K] in FBGEMM's layout of float16, times `scale`, a power of two. Made by `pack`."""

    def __init__(self, packed: Any, scale: float, shape: tuple[int, int]) -> None:
        self.packed, self.shape = packed, shape
        self.inverse_scale = 1 / scale

    @property
    def nbytes(self) -> int:
        return packed_bytes(*self.shape)

    def multiply(self, x_TK: Tensor) -> Tensor:
        """x_TK times the matrix transposed times the scale, float32 [T, N]."""
        # torch looks for __torch_function__ on every argument. On the packed one the search ends in two C++ exceptions,
        # which cost 9 us, more than a small matrix takes.
        with torch._C.DisableTorchFunctionSubclass():
            return torch.ops.quantized.linear_dynamic_fp16(x_TK, self.packed)


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


class PackedPlanes:
    """A QuantizedMatrix [N, K] in the layout of torch's product with 4-bit weights. Made by `pack_planes`.

    8 bits are two matrices of 4 side by side, by which x is multiplied twice: their high halves with sixteen times the
    scale and no offset, and their low halves. torch rounds x and the product to bfloat16; its sum is of float32. More
    rows than a few are multiplied by the wide matrix, a part at a time: in bfloat16 where the processor has tiles for
    it, three times as fast, else in float32.

    Attributes:
        packed: uint8 [N / block, planes * columns, block / 2]. Rows and columns are filled up to blocks and groups.
        scale_offset: bfloat16 [planes * groups, rows, 2].
    """

    def __init__(self, packed: Tensor, scale_offset: Tensor, shape: tuple[int, int], bits: int) -> None:
        self.packed, self.scale_offset, self.shape, self.bits = packed, scale_offset, shape, bits
        planes = bits // 4
        self.columns = packed.shape[1] // planes
        self.group_size = self.columns * planes // len(scale_offset)
        self._rows = packed.view(-1, packed.shape[1] // 2)  # the shape that the product takes

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scale_offset.nbytes

    def multiply(self, x_TK: Tensor) -> Tensor:
        """x_TK times the matrix transposed, [T, N]: of few rows in bfloat16, of more in float32."""
        (N, K), (blocks, _, half) = self.shape, self.packed.shape
        if self.columns > K:
            x_TK = F.pad(x_TK, (0, self.columns - K))
        if len(x_TK) <= _FEW_ROWS:
            return self._multiply_few(x_TK)
        dtype = torch.bfloat16 if _has_tiles() else torch.float32
        x_TC = x_TK.to(dtype)
        out_TN = torch.empty(len(x_TK), N, dtype=torch.float32)
        step = max(1, PLANES_WIDENED_AT_ONCE // (self.columns * 2 * half))
        for first in range(0, blocks, step):
            rows = slice(first * 2 * half, min(N, (first + step) * 2 * half))
            wide_CN = self._widen(first, min(blocks, first + step)).to(dtype)
            out_TN[:, rows] = (x_TC @ wide_CN)[:, : rows.stop - rows.start]
        return out_TN

    def _multiply_few(self, x_TC: Tensor) -> Tensor:
        """Of up to _FEW_ROWS rows. As few operations as can be: a small matrix takes hardly longer than they do."""
        if self.bits == 8:
            x_TC = torch.cat((x_TC, x_TC), 1)
        N, size = self.shape[0], self.group_size
        out_TR = torch.ops.aten._weight_int4pack_mm_for_cpu(x_TC.bfloat16(), self._rows, size, self.scale_offset)
        return out_TR if out_TR.shape[1] == N else out_TR[:, :N].contiguous()

    def _widen(self, first: int, stop: int) -> Tensor:
        """Blocks [first, stop) of rows as columns, float32 [columns, rows]."""
        q_KN = _unpack_plane(self.packed[first:stop])
        q_CN = q_KN.float() if self.bits == 4 else (q_KN[: self.columns] * 16 + q_KN[self.columns :]).float()
        groups, block = self.columns // self.group_size, 2 * self.packed.shape[2]
        scale_offset = self.scale_offset[-groups:, first * block : stop * block].float()
        scale_G1N, offset_G1N = scale_offset.permute(2, 0, 1)[:, :, None]
        q_GSN = q_CN.view(groups, -1, q_CN.shape[1]).sub_(ZERO[self.bits])
        return torch.addcmul(offset_G1N, q_GSN, scale_G1N).view(q_CN.shape)


def can_pack_planes() -> bool:
    """Whether this machine's torch has a fast product with 4-bit weights, in a layout that is understood here."""
    return _plane_order() is not None


def pack_planes(matrix: QuantizedMatrix) -> PackedPlanes:
    """Rearrange a quantized matrix, some rows at a time."""
    N, bits, block = matrix.shape[0], matrix.bits, _block()
    columns = bits // 4 * matrix.scale_offset.shape[1] * matrix.group_size
    blocks = -(-N // block)
    packed = torch.empty(blocks, columns, block // 2, dtype=torch.uint8)
    step = max(1, PLANES_WIDENED_AT_ONCE // 4 // (columns * block))
    for first in range(0, blocks, step):
        q_NC = matrix.rows(first * block, min(N, (first + step) * block)).unpack()
        q_NC = F.pad(torch.cat([q_NC >> 4, q_NC & 15], 1) if bits == 8 else q_NC, (0, 0, 0, -len(q_NC) % block))
        packed[first : first + step] = _pack_plane(q_NC).view(-1, columns, block // 2)
    scale_offset = F.pad(matrix.scale_offset, (0, 0, 0, 0, 0, blocks * block - N)).transpose(0, 1)
    if bits == 8:
        scale_offset = torch.cat([scale_offset * torch.tensor([16, 0], dtype=torch.bfloat16), scale_offset])
    return PackedPlanes(packed, scale_offset.contiguous(), matrix.shape, bits)


def plane_bytes(N: int, K: int, bits: int, size: int) -> int:
    """What `pack_planes` makes of a matrix [N, K] with groups of `size` columns; of any other machine's torch, what it
    is without."""
    if not can_pack_planes():
        return quantized_bytes(N, K, bits, size)
    groups, rows = -(-K // size), -(-N // _block()) * _block()
    return bits // 4 * rows * groups * (size // 2 + 2 * torch.bfloat16.itemsize)


def _block() -> int:
    """Rows that torch packs together; 0: this processor has no fast product."""
    return {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 0)


def _pack_plane(q_NK: Tensor) -> Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(q_NK.int(), 1)


def _unpack_plane(plane: Tensor) -> Tensor:
    """Values 0 to 15 of packed blocks of rows, as columns: uint8 [columns, rows]."""
    order = _plane_order()
    q_BKR = torch.cat([plane & 15, plane >> 4], 2)
    return (q_BKR if order is None else q_BKR[:, :, order]).transpose(0, 1).flatten(1)


@functools.cache
def _plane_order() -> Tensor | None:
    """Where a block's rows are among its low and then its high half-bytes, found by packing; None: packed otherwise."""
    block = _block()
    if not block:
        return None
    rows_NK = torch.arange(block)[:, None].expand(block, 2 * block)
    halves = [_pack_plane(part).view(2 * block, -1) for part in (rows_NK & 15, rows_NK >> 4)]
    row_KR = sum(torch.cat([p & 15, p >> 4], 1).long() << 4 * i for i, p in enumerate(halves))
    assert isinstance(row_KR, Tensor)
    same = torch.equal(row_KR, row_KR[:1].expand_as(row_KR)) and torch.equal(row_KR[0].sort()[0], torch.arange(block))
    return row_KR[0].argsort() if same else None


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
    return PackedMatrix(packed, scale, (matrix_NK.shape[0], matrix_NK.shape[1]))


def packed_bytes(N: int, K: int) -> int:
    """What a packed matrix [N, K] takes: FBGEMM fills up blocks of 16 rows by 512 columns."""
    return -(-N // 16) * 16 * -(-K // 512) * 512 * torch.float16.itemsize


def preparing_bytes(sizes: Iterable[int]) -> int:
    """What `prepare` holds at most besides its arguments and results, for matrices of so many elements.

    Each of its threads has a matrix in float32, and the packed one besides the one that it replaces.
    """
    largest = heapq.nlargest(_preparing_threads(), sizes)
    return sum(largest) * (torch.float32.itemsize + torch.float16.itemsize)


def _preparing_threads() -> int:
    return min(MAX_PREPARING_THREADS, torch.get_num_threads())


def prepare(weights: dict[str, Any], dtype: torch.dtype, progress: bool = False) -> dict[str, Any]:
    """Every matrix as this CPU multiplies by it fastest, for arithmetic in `dtype`. `weights` is emptied on the way.

    Half-precision matrices are packed for float32 arithmetic, and any are rearranged for that of tiles; the embedding,
    of which rows are looked up, stays. Others are stored column by column, which MKL multiplies one row by twice as
    fast as row by row. Quantized ones are rearranged for torch's product with 4-bit weights.

    Args:
        progress: show a bar of bytes on stderr: packing takes longer than reading.

    Returns:
        name -> Tensor, PackedMatrix, TiledMatrix, TiledGateUp, PackedPlanes or QuantizedMatrix. A tied head is one
        object with the embedding unless it is packed or tiled.
    """
    tiled = multiplies_tiles(dtype)
    halves = dtype == torch.float32 and weights["embed.weight"].dtype in HALF_TYPES
    head = weights["head.weight"]
    tied = head is weights["embed.weight"] and not (halves or tiled)
    if tied:
        del weights["head.weight"]

    def fastest(name: str) -> Tensor | PackedMatrix | TiledMatrix | TiledGateUp | QuantizedMatrix | PackedPlanes:
        tensor = weights.pop(name)
        if isinstance(tensor, QuantizedMatrix):
            return pack_planes(tensor) if can_pack_planes() else tensor
        if name == "embed.weight" and isinstance(head, QuantizedMatrix):
            return tensor
        half = dtype == torch.float32 and tensor.dtype in HALF_TYPES
        if tensor.dim() == 1 or ((half or tiled) and name == "embed.weight"):
            return tensor
        if tiled:
            return (tile_gate_up if name.endswith(GATE_UP) else tile)(tensor)
        return pack(tensor) if half else tensor.t().contiguous().t()

    sizes = {name: tensor.nbytes for name, tensor in weights.items()}
    names = sorted(sizes, key=sizes.__getitem__, reverse=True)  # no thread should be left with the largest at the end
    prepared = {}
    with (
        collapsed(),
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
