"""Products with a model's matrices, on any device and in whatever form the device keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from minirea import cpu
from minirea.cpu import PackedMatrix, PackedPlanes, TiledGateUp, TiledMatrix
from minirea.kernels.steps import reference as twins
from minirea.quantize import QuantizedMatrix, parts

Matrix = Tensor | PackedMatrix | TiledMatrix | PackedPlanes | QuantizedMatrix

# Weights of a quantized matrix that are made wide at a time, by torch and by a GPU's kernels.
WIDENED_AT_ONCE: Final = 1 << 24
WIDENED_BY_KERNELS: Final = 1 << 25
# Rows of a part are a multiple of one of these: of the first so that the product of a step fills a large GPU's
# multiprocessors evenly; of the last because cuBLAS is slow where columns of a product begin off 16 bytes.
_ROWS_OF_PARTS: Final = (2048, 256, 8)


def linear(x_TK: Tensor, matrix_NK: Matrix, bias_N: Tensor | None = None, kernels: ModuleType = twins) -> Tensor:
    """x_TK times the matrix transposed, plus the bias: [T, N]. `kernels` has what widens a quantized matrix."""
    if isinstance(matrix_NK, Tensor):
        return F.linear(x_TK, matrix_NK, bias_N)
    if isinstance(matrix_NK, TiledMatrix):
        return matrix_NK.multiply(x_TK, bias_N)
    if isinstance(matrix_NK, PackedMatrix):
        out_TN = matrix_NK.multiply(x_TK).mul_(matrix_NK.inverse_scale)
    elif isinstance(matrix_NK, PackedPlanes):
        out_TN = matrix_NK.multiply(x_TK).to(x_TK.dtype)
    else:
        out_TN = _widened_product(x_TK, matrix_NK, kernels)
    return out_TN if bias_N is None else out_TN.add_(bias_N)


def add_linear(
    sum_TN: Tensor, x_TK: Tensor, matrix_NK: Matrix, bias_N: Tensor | None = None, kernels: ModuleType = twins
) -> None:
    """sum_TN += linear(...), by a product that ends in the sum where there is one: one rounding, no pass of its own."""
    if bias_N is not None or x_TK.dtype != sum_TN.dtype:
        sum_TN += linear(x_TK, matrix_NK, bias_N, kernels)
    elif isinstance(matrix_NK, QuantizedMatrix):
        for columns, wide_NK in _widened(matrix_NK, x_TK, kernels):
            sum_TN[:, columns].addmm_(x_TK, wide_NK.t())
    elif isinstance(matrix_NK, PackedPlanes):
        sum_TN += matrix_NK.multiply(x_TK)
    elif isinstance(matrix_NK, PackedMatrix):
        sum_TN.add_(matrix_NK.multiply(x_TK), alpha=matrix_NK.inverse_scale)
    elif isinstance(matrix_NK, TiledMatrix):
        sum_TN += matrix_NK.multiply(x_TK)
    else:
        sum_TN.addmm_(x_TK, matrix_NK.t())


def norm_linear(
    x_TE: Tensor,
    norm_E: Tensor,
    eps: float,
    matrix_NE: Matrix,
    bias_N: Tensor | None = None,
    kernels: ModuleType = twins,
) -> Tensor:
    """linear(rms_norm(x_TE), ...): [T, N]. `kernels` has a GPU's norm; a CPU has its own.

    The scale of a packed matrix is undone in the norm, where it costs least. A power of two commutes with the product,
    exactly but for elements so small that they turn subnormal.
    """
    if isinstance(matrix_NE, PackedMatrix):
        out_TN = matrix_NE.multiply(cpu.rms_norm(x_TE, norm_E, eps, matrix_NE.inverse_scale))
        return out_TN if bias_N is None else out_TN.add_(bias_N)
    return linear((cpu if x_TE.is_cpu else kernels).rms_norm(x_TE, norm_E, eps), matrix_NE, bias_N, kernels)


def norm_swiglu(
    x_TE: Tensor,
    norm_E: Tensor,
    eps: float,
    matrix_ME: Matrix | TiledGateUp,
    bias_M: Tensor | None,
    kernels: ModuleType,
) -> Tensor:
    """silu(gate) * up of rms_norm(x_TE), [T, F], by a product with both, M = 2F."""
    if isinstance(matrix_ME, TiledGateUp):
        return matrix_ME.swiglu(cpu.rms_norm(x_TE, norm_E, eps), bias_M)
    swiglu: Tensor = kernels.swiglu(norm_linear(x_TE, norm_E, eps, matrix_ME, bias_M, kernels))
    return swiglu


def _widened_product(x_TK: Tensor, matrix_NK: QuantizedMatrix, kernels: ModuleType) -> Tensor:
    """[T, N]."""
    out_TN = x_TK.new_empty(len(x_TK), matrix_NK.shape[0])
    for columns, wide_NK in _widened(matrix_NK, x_TK, kernels):
        torch.mm(x_TK, wide_NK.t(), out=out_TN[:, columns])
    return out_TN


def _widened(matrix_NK: QuantizedMatrix, like: Tensor, kernels: ModuleType) -> Iterator[tuple[slice, Tensor]]:
    """Parts of the matrix, each made wide just before its product, and the columns of the product that are theirs."""
    N, K = matrix_NK.shape
    most = max(1, (WIDENED_AT_ONCE if kernels is twins else WIDENED_BY_KERNELS) // K)
    unit = next((rows for rows in _ROWS_OF_PARTS if rows <= most), 1)
    for start, stop in parts(N, 1, most // unit * unit):
        wide_NK = like.new_empty(stop - start, K)
        kernels.widen(matrix_NK.rows(start, stop), wide_NK)
        yield slice(start, stop), wide_NK
