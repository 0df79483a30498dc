"""Packs a bfloat16 matrix into 12 bits a weight; see minirea.compact."""

from __future__ import annotations

import functools
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from minirea.compact import EXPONENTS, MIDDLE, ORDER, UNIT, CompactMatrix, most_apart, packed_bytes, pays
from minirea.kernels.cpu.code import I8, I16, I32, I64, LANES, Arguments, Code, Value, vector
from minirea.kernels.cpu.compile import Kernel
from minirea.pages import advise

_MOST_BASE: Final = 127 + MIDDLE  # for which 2^(base - MIDDLE) is a float32
_SIGN: Final = 1 << 15
_MANTISSA: Final = 127


def pack(matrix_NK: Tensor) -> CompactMatrix | None:
    """The same numbers of a contiguous bfloat16 matrix; None where that does not pay or does not go: rows are short, or
    their weights lie far apart, are huge or not finite. On one thread.
    """
    (N, K), ints = matrix_NK.shape, functools.partial(torch.empty, dtype=torch.int32)
    if not pays(K):
        return None
    units = advise(torch.empty(N, packed_bytes(K), dtype=torch.uint8))
    base_N, count_N = ints(N), ints(N)
    matrix = {"matrix": matrix_NK.data_ptr(), "num_rows": N, "num_columns": K, "base": base_N.data_ptr()}
    _pack_kernel().bind(**matrix, units=units.data_ptr(), row_bytes=packed_bytes(K), count=count_N.data_ptr())()
    first = F.pad(count_N.cumsum(0), (1, 0)).int()
    num_apart = int(first[-1])
    if int(base_N.max()) > _MOST_BASE or num_apart > most_apart(N, K):
        return None
    column, value = ints(num_apart), torch.empty(num_apart, dtype=torch.float32)
    addresses = {"first": first.data_ptr(), "column": column.data_ptr(), "value": value.data_ptr()}
    _collect_kernel().bind(**matrix, **addresses)()
    scale_N = ((base_N + (127 - MIDDLE)) << 23).view(torch.float32)
    return CompactMatrix(units, scale_N, first, column, value, K)


def _write_pack(code: Code, a: Arguments) -> None:
    """Units of each row, its base, and how many of its weights are apart."""
    with code.range(0, a["num_rows"]) as n:
        row, units = a["matrix"] + n * a["num_columns"] * 2, a["units"] + n * a["row_bytes"]
        top, count = (code.variable(code.number(0, vector(I32))) for _ in range(2))
        with code.range(0, a["num_columns"], LANES) as k:
            top.value = code.larger(top.value, _exponent(_weights(code, a, row, k)))
        base = code.larger(code.max(top.value) - EXPONENTS, 0)
        code.store(base, a["base"] + n * 4)
        bases, at_unit = code.splat(base), code.variable(units)
        with code.range(0, a["num_columns"], UNIT) as k:
            low, high = [], []
            for i in range(0, UNIT, LANES):
                bits = _weights(code, a, row, k + i)
                is_apart = _is_apart(bits, bases)
                exponent = code.larger(_exponent(bits) - bases, 0)
                bits = code.select(is_apart, bits & 0, bits & (_SIGN | _MANTISSA) | (exponent << 7))
                low.append(code.narrower(bits & 255, I8))
                high.append(code.narrower((bits >> 12) & 8 | (bits >> 8) & 7, I8))
                count.value = count.value + code.wider(is_apart, I32)
            code.store(_ordered(code, low), at_unit.value)
            ordered = _ordered(code, high)
            halves = [code.shuffle(ordered, ordered, range(i, i + UNIT // 2)) for i in (0, UNIT // 2)]
            code.store(halves[0] | (halves[1] << 4), at_unit.value + UNIT)
            at_unit.value = at_unit.value + packed_bytes(UNIT)
        code.store(code.sum(count.value), a["count"] + n * 4)


def _write_collect(code: Code, a: Arguments) -> None:
    """Columns and values of weights that are apart."""
    with code.range(0, a["num_rows"]) as n:
        first, stop = (code.wider(code.load(a["first"] + (n + i) * 4, I32), I64) for i in range(2))
        base, row = code.load(a["base"] + n * 4, I32), a["matrix"] + n * a["num_columns"] * 2
        bases, entry = code.splat(base), code.variable(first)
        with code.range(0, code.select(stop > first, a["num_columns"], first * 0), LANES) as k:
            are_apart = _is_apart(_weights(code, a, row, k), bases)
            with code.when(code.any(code.wider(are_apart, I32))):
                with code.range(k, code.smaller(k + LANES, a["num_columns"])) as column:
                    bits = code.wider(code.load(row + column * 2, I16), I32)
                    with code.when(_is_apart(bits, base)):
                        code.store(code.narrower(column, I32), a["column"] + entry.value * 4)
                        code.store(bits << 16, a["value"] + entry.value * 4)
                        entry.value = entry.value + 1


def _weights(code: Code, a: Arguments, row: Value, k: Value) -> Value:
    """Bits of a row's weights from column k on, int32; zeros behind the last."""
    return code.wider(code.load(row + k * 2, vector(I16), a["num_columns"] - k), I32)


def _ordered(code: Code, parts: list[Value]) -> Value:
    """A unit's bytes from vectors of its columns, as they lie in memory."""
    first, second = (code.shuffle(parts[i], parts[i + 1], range(2 * LANES)) for i in (0, 2))
    return code.shuffle(first, second, sorted(range(UNIT), key=ORDER.__getitem__))


def _exponent(bits: Value) -> Value:
    return (bits >> 7) & 255


def _is_apart(bits: Value, base: Value) -> Value:
    """Whether weights are too small for their row, and not zero."""
    return (_exponent(bits) < base + 1) & ((bits & (_SIGN - 1)) > 0)


@functools.cache
def _pack_kernel() -> Kernel:
    names = "matrix", "num_rows", "num_columns", "base", "units", "row_bytes", "count"
    return Kernel(_write_pack, names, alone=True)


@functools.cache
def _collect_kernel() -> Kernel:
    names = "matrix", "num_rows", "num_columns", "base", "first", "column", "value"
    return Kernel(_write_collect, names, alone=True)
