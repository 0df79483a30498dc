"""Products with a model's matrices, on any device and in whatever form the device keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Final, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from minirea import cpu
from minirea.cpu import TiledGateUp, TiledMatrix
from minirea.kernels.cpu import products, rows
from minirea.kernels.steps import reference as twins
from minirea.quantize import QuantizedMatrix, parts

Matrix = Tensor | TiledMatrix | QuantizedMatrix

# Weights of a quantized matrix that are made wide at a time, by torch and by a GPU's kernels.
WIDENED_AT_ONCE: Final = 1 << 24
WIDENED_BY_KERNELS: Final = 1 << 25
# Rows of a part are a multiple of one of these: of the first so that the product of a step fills a large GPU's
# multiprocessors evenly; of the last because cuBLAS is slow where columns of a product begin off 16 bytes.
_ROWS_OF_PARTS: Final = (2048, 256, 8)


def linear(x_TK: Tensor, matrix_NK: Matrix, bias_N: Tensor | None = None, kernels: ModuleType = twins) -> Tensor:
    """x_TK times the matrix transposed, plus the bias: [T, N]. `kernels` has what widens a quantized matrix."""
    if isinstance(matrix_NK, TiledMatrix):
        return matrix_NK.multiply(x_TK, bias_N)
    if products.multiplies(matrix_NK, x_TK):
        return products.linear(x_TK, matrix_NK, bias_N)
    if isinstance(matrix_NK, Tensor):
        return F.linear(x_TK, matrix_NK, bias_N)
    out_TN = _widened_product(x_TK, matrix_NK, kernels)
    return out_TN if bias_N is None else out_TN.add_(bias_N)


def add_linear(
    sum_TN: Tensor, x_TK: Tensor, matrix_NK: Matrix, bias_N: Tensor | None = None, kernels: ModuleType = twins
) -> None:
    """sum_TN += linear(...), by a product that ends in the sum where there is one: one rounding, no pass of its own."""
    if isinstance(matrix_NK, TiledMatrix):
        sum_TN += matrix_NK.multiply(x_TK, bias_N)
    elif products.multiplies(matrix_NK, x_TK) and sum_TN.dtype == x_TK.dtype == torch.float32:
        products.add_linear(sum_TN, x_TK, matrix_NK, bias_N)
    elif bias_N is not None or x_TK.dtype != sum_TN.dtype:
        sum_TN += linear(x_TK, matrix_NK, bias_N, kernels)
    elif isinstance(matrix_NK, QuantizedMatrix):
        for columns, wide_NK in _widened(matrix_NK, x_TK, kernels):
            sum_TN[:, columns].addmm_(x_TK, wide_NK.t())
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
    """linear(rms_norm(x_TE), ...): [T, N]. `kernels` has a GPU's norm; a CPU has its own, which is part of the product
    of a single row.
    """
    if _is_one_row(matrix_NE, x_TE, norm_E):
        return products.norm_linear(x_TE, norm_E, eps, matrix_NE, bias_N)
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
    if _is_one_row(matrix_ME, x_TE, norm_E):
        return products.norm_swiglu(x_TE, norm_E, eps, matrix_ME, bias_M)
    gate_up_TM = norm_linear(x_TE, norm_E, eps, matrix_ME, bias_M, kernels)
    has_own = products.multiplies(matrix_ME, x_TE) and gate_up_TM.dtype == torch.float32
    swiglu: Tensor = (products if has_own else kernels).swiglu(gate_up_TM)
    return swiglu


def _is_one_row(matrix_NE: Matrix, x_TE: Tensor, norm_E: Tensor) -> TypeGuard[rows.Matrix]:
    return len(x_TE) == 1 and norm_E.dtype == torch.float32 and products.multiplies(matrix_NE, x_TE)


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
