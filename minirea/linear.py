"""Products with a model's matrices, on any device and in whatever form the device keeps them."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from minirea import cpu
from minirea.cpu import PackedMatrix

Matrix = Tensor | PackedMatrix


def linear(x_TK: Tensor, matrix_NK: Matrix, bias_N: Tensor | None = None) -> Tensor:
    """x_TK times the matrix transposed, plus the bias: [T, N]."""
    if isinstance(matrix_NK, PackedMatrix):
        out_TN = matrix_NK.multiply(x_TK).mul_(matrix_NK.inverse_scale)
        return out_TN if bias_N is None else out_TN.add_(bias_N)
    return F.linear(x_TK, matrix_NK, bias_N)


def add_linear(sum_TN: Tensor, x_TK: Tensor, matrix_NK: Matrix, bias_N: Tensor | None = None) -> None:
    """sum_TN += linear(...), by a product that ends in the sum where there is one: one rounding, no pass of its own."""
    if bias_N is not None:
        sum_TN += linear(x_TK, matrix_NK, bias_N)
    elif isinstance(matrix_NK, PackedMatrix):
        sum_TN.add_(matrix_NK.multiply(x_TK), alpha=matrix_NK.inverse_scale)
    else:
        sum_TN.addmm_(x_TK, matrix_NK.t())


def norm_linear(
    x_TE: Tensor,
    norm_E: Tensor,
    eps: float,
    matrix_NE: Matrix,
    bias_N: Tensor | None = None,
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = cpu.rms_norm,
) -> Tensor:
    """linear(rms_norm(x_TE), ...): [T, N]. `rms_norm` is a GPU's; a CPU has its own.

    The scale of a packed matrix is undone in the norm, where it costs least. A power of two commutes with the product,
    exactly but for elements so small that they turn subnormal.
    """
    if isinstance(matrix_NE, PackedMatrix):
        out_TN = matrix_NE.multiply(cpu.rms_norm(x_TE, norm_E, eps, matrix_NE.inverse_scale))
        return out_TN if bias_N is None else out_TN.add_(bias_N)
    return linear((cpu.rms_norm if x_TE.is_cpu else rms_norm)(x_TE, norm_E, eps), matrix_NE, bias_N)
