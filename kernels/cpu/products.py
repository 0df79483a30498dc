"""Products of float32 rows with a matrix as its checkpoint has it: in half precision, or in 8 or 4 bits."""

from __future__ import annotations

import functools
from typing import Any, Final, TypeGuard

import torch
from torch import Tensor

from minirea.compact import CompactMatrix
from minirea.kernels.cpu.code import F32, LANES, Arguments, Code, vector
from minirea.kernels.cpu.compile import Call, Kernel, address, available, bits_of
from minirea.kernels.cpu.few import Few, silu
from minirea.kernels.cpu.many import Many, tile_size
from minirea.kernels.cpu.rows import Matrix, Rows
from minirea.kernels.cpu.threads import workers
from minirea.quantize import QuantizedMatrix

MOST_FEW: Final = 8  # rows of x that are few
_OF_MATRIX: Final = "matrix", "scale", "unit", "first", "column", "value"
_HALVES: Final = (torch.bfloat16, torch.float16)


def _write_swiglu(code: Code, a: Arguments) -> None:
    F = a["num_outputs"]
    with code.range(a["worker"], a["num_rows"], a["workers"]) as row:
        with code.range(0, F, LANES) as at:
            gate_at, lanes = a["gate_up"] + (row * F * 2 + at) * 4, F - at
            gate, up = (code.load(address, vector(F32), lanes) for address in (gate_at, gate_at + F * 4))
            code.store(silu(code, gate) * up, a["out"] + (row * F + at) * 4, lanes)


def swiglu(gate_up_TM: Tensor) -> Tensor:
    """silu(gate) * up of rows that have both side by side, M = 2F, float32: [T, F]."""
    T, M = gate_up_TM.shape
    out_TF = torch.empty(T, M // 2, dtype=torch.float32)
    addresses = {"gate_up": gate_up_TM.data_ptr(), "out": out_TF.data_ptr()}
    _swiglu_kernel().bind(**addresses, num_rows=T, num_outputs=M // 2)()
    return out_TF


def linear(x_TK: Tensor, matrix_NK: Matrix, bias_N: Tensor | None = None) -> Tensor:
    """x_TK times the matrix transposed, plus the bias: [T, N] in x's dtype, where `multiplies`."""
    T, N = len(x_TK), matrix_NK.shape[0]
    if T <= MOST_FEW:
        bias_N = None if bias_N is None else bias_N.float()
        return _few(x_TK.float(), matrix_NK, bias_N, torch.empty(T, N, dtype=torch.float32)).to(x_TK.dtype)
    out_TN = torch.empty(T, N, dtype=torch.float32) if bias_N is None else bias_N.repeat(T, 1)
    return _many(x_TK, matrix_NK, out_TN, adds=bias_N is not None)


def add_linear(sum_TN: Tensor, x_TK: Tensor, matrix_NK: Matrix, bias_N: Tensor | None = None) -> None:
    """sum_TN += linear(...), all in float32."""
    if len(x_TK) <= MOST_FEW:
        _few(x_TK, matrix_NK, bias_N, sum_TN, end="add")
    else:
        _many(x_TK, matrix_NK, sum_TN if bias_N is None else sum_TN.add_(bias_N), adds=True)


def norm_linear(x_1E: Tensor, norm_E: Tensor, eps: float, matrix_NE: Matrix, bias_N: Tensor | None = None) -> Tensor:
    """`linear` of the RMS norm of one row: float32 [1, N]."""
    return _few(x_1E, matrix_NE, bias_N, torch.empty(1, matrix_NE.shape[0], dtype=torch.float32), (norm_E, eps))


def norm_swiglu(x_1E: Tensor, norm_E: Tensor, eps: float, matrix_ME: Matrix, bias_M: Tensor | None = None) -> Tensor:
    """silu(gate) * up of the RMS norm of one row, by a product with both, M = 2F: float32 [1, F]."""
    out_1F = torch.empty(1, matrix_ME.shape[0] // 2, dtype=torch.float32)
    return _few(x_1E, matrix_ME, bias_M, out_1F, (norm_E, eps), "swiglu")


def multiplies(matrix_NK: object, x_TK: Tensor) -> TypeGuard[Matrix]:
    """Whether `linear` of these is here: of float32 rows, and of few rows in any precision with a quantized matrix."""
    if not (x_TK.is_cpu and available()):
        return False
    if isinstance(matrix_NK, QuantizedMatrix):
        return x_TK.dtype == torch.float32 or (x_TK.dtype in _HALVES and len(x_TK) <= MOST_FEW)
    if isinstance(matrix_NK, CompactMatrix):
        return x_TK.dtype == torch.float32
    if not isinstance(matrix_NK, Tensor):
        return False
    return x_TK.dtype == torch.float32 and matrix_NK.dtype in (*_HALVES, torch.float32) and matrix_NK.is_contiguous()


def few_scratch(matrix_NK: Matrix, num_rows: int = 1) -> Tensor:
    """For `bind_few`; several calls may share the largest."""
    few = Few(Rows.of(matrix_NK), num_rows, False, "store", False)
    return torch.empty(workers() * few.scratch_floats, dtype=torch.float32)


def bind_few(
    x_TK: Tensor,
    matrix_NK: Matrix,
    bias_N: Tensor | None,
    out_TN: Tensor,
    scratch: Tensor,
    norm: tuple[Tensor, float] | None = None,
    end: str = "store",
) -> Call:
    """The product of few rows with a matrix into `out_TN`, as Few has it. `norm`: weights, of one row, and eps."""
    few = Few(Rows.of(matrix_NK), len(x_TK), norm is not None, end, bias_N is not None)
    norm_E, eps = norm or (None, 0.0)
    return _few_kernel(few).bind(
        **_addresses(matrix_NK),
        x=x_TK.data_ptr(),
        norm=address(norm_E),
        eps=bits_of(eps),
        bias=address(bias_N),
        out=out_TN.data_ptr(),
        num_outputs=out_TN.shape[1],
        scratch=scratch.data_ptr(),
    )


def _few(x_TK: Tensor, matrix_NK: Matrix, bias_N: Tensor | None, out_TN: Tensor, *options: Any, **named: Any) -> Tensor:
    x_TK, scratch = x_TK.contiguous(), few_scratch(matrix_NK, len(x_TK))
    bind_few(x_TK, matrix_NK, bias_N, out_TN, scratch, *options, **named)()
    return out_TN


def _many(x_TK: Tensor, matrix_NK: Matrix, out_TN: Tensor, adds: bool) -> Tensor:
    """out_TN, which is the product or to which it was added."""
    many = Many(Rows.of(matrix_NK), *tile_size())
    scratch = torch.empty(workers() * many.scratch_floats, dtype=torch.float32)
    x_TK = x_TK.contiguous()
    _many_kernel(many).bind(
        **_addresses(matrix_NK),
        x=x_TK.data_ptr(),
        out=out_TN.data_ptr(),
        num_rows=len(x_TK),
        num_outputs=out_TN.shape[1],
        adds=int(adds),
        scratch=scratch.data_ptr(),
    )()
    return out_TN


def _addresses(matrix_NK: Matrix) -> dict[str, int]:
    """What kernels take of a matrix; `scale` is scale and offset of groups, or the scale of rows."""
    parts: dict[str, Tensor | None] = dict.fromkeys(_OF_MATRIX)
    if isinstance(matrix_NK, QuantizedMatrix):
        parts |= {"matrix": matrix_NK.words, "scale": matrix_NK.scale_offset, "unit": matrix_NK.units}
    elif isinstance(matrix_NK, CompactMatrix):
        parts |= {"matrix": matrix_NK.units, "scale": matrix_NK.scale, "first": matrix_NK.first}
        parts |= {"column": matrix_NK.column, "value": matrix_NK.value}
    else:
        parts["matrix"] = matrix_NK
    return {name: address(part) for name, part in parts.items()}


@functools.cache
def _few_kernel(few: Few) -> Kernel:
    names = *_OF_MATRIX, "x", "norm", "eps", "bias", "out", "num_outputs", "scratch"
    return Kernel(few.write, names)


@functools.cache
def _many_kernel(many: Many) -> Kernel:
    names = *_OF_MATRIX, "x", "out", "num_rows", "num_outputs", "adds", "scratch"
    return Kernel(many.write, names)


@functools.cache
def _swiglu_kernel() -> Kernel:
    return Kernel(_write_swiglu, ("gate_up", "out", "num_rows", "num_outputs"))
