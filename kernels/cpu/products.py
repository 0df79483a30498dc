"""Products of float32 rows with a matrix as its checkpoint has it: in half precision, or in 8 or 4 bits.

A few rows: sums of products along the matrix's rows, which are read once, from end to end, as fast as memory gives
them. A vector has LANES weights; sums of products with them stay apart until the row ends. What a decode step does
before (RMS norm) and after a product (adding to the residual stream, SiLU) is part of it.

More rows: a panel of the matrix's rows is made wide and transposed, and stays in the processor's cache while all of x
is multiplied by it, a tile of rows at a time, whose sums are registers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, TypeGuard

import torch
from torch import Tensor

from minirea.kernels.cpu.code import (
    F32,
    I8,
    I32,
    LANES,
    Arguments,
    Call,
    Code,
    Kernel,
    Value,
    Variable,
    address,
    available,
    bits_of,
    kind_of,
    lanes_of_processor,
    vector,
    workers,
)
from minirea.quantize import ZERO, QuantizedMatrix

Matrix = Tensor | QuantizedMatrix

MOST_FEW: Final = 8  # rows of x that are few
_SUMS: Final = 16  # vectors of sums of few rows, at most: a processor with AVX-512 has 32 registers
_AHEAD: Final = 4096  # bytes that memory is asked for before they are read: a core waits for it otherwise
_PANEL_COLUMNS: Final = 1024  # of a matrix, made wide at a time
_HALVES: Final = (torch.bfloat16, torch.float16)
_UPPER_HALF: Final = -(1 << 16)  # of 32 bits


class Rows(NamedTuple):
    """How a matrix [N, K] lies in memory.

    Attributes:
        kind: "bfloat16", "float16" or "float32", or "8" or "4" bits.
        group: columns that share scale and offset; 0: there are none.
    """

    kind: str
    columns: int
    group: int

    @classmethod
    def of(cls, matrix_NK: Matrix) -> Rows:
        if isinstance(matrix_NK, QuantizedMatrix):
            return cls(str(matrix_NK.bits), matrix_NK.num_columns, matrix_NK.group_size)
        return cls(kind_of(matrix_NK), matrix_NK.shape[1], 0)

    @property
    def unit(self) -> int:
        """Columns that are read at once."""
        return 2 * LANES if self.kind == "4" else LANES

    @property
    def bits(self) -> int:
        return {"8": 8, "4": 4, "float32": 32}.get(self.kind, 16)

    @property
    def groups(self) -> int:
        return -(-self.columns // self.group) if self.group else 0

    @property
    def padded(self) -> int:
        """Columns with those that fill up units, and groups."""
        size = self.group or self.unit
        return -(-self.columns // size) * size

    @property
    def nbytes(self) -> int:
        """Of a row."""
        return (self.padded if self.group else self.columns) * self.bits // 8

    @property
    def lanes(self) -> list[list[int]]:
        """Which column of a unit each lane of its vectors has; see minirea.quantize."""
        if self.kind == "8":
            return [[4 * (m % 4) + m // 4 for m in range(LANES)]]
        if self.kind == "4":
            return [[8 * (m % 4) + half + m // 4 for m in range(LANES)] for half in (0, 4)]
        return [list(range(LANES))]

    def read(self, code: Code, address: Value, columns: int) -> list[Value]:
        """A unit's vectors, float32: the weights of its first `columns`, or their q - ZERO."""
        if self.group:
            q = code.wider(code.load(address, vector(I8)), I32)
            parts = [q] if self.kind == "8" else [q & 15, q >> 4]
            return [code.to_float(part - ZERO[self.bits]) for part in parts]
        return [code.floats(address, self.kind, min(columns, LANES))]


class Few(NamedTuple):
    """A product of few rows.

    Attributes:
        num_rows: of x.
        norm: it is of the RMS norm of x.
        end: what becomes of it: "store", "add" (to what is there) or "swiglu" (silu(gate) * up of the matrix's halves).
        has_bias: it is added first.
    """

    rows: Rows
    num_rows: int
    norm: bool
    end: str
    has_bias: bool

    @property
    def at_once(self) -> int:
        """Rows of the matrix, or of each of its halves."""
        return max(1, _SUMS // 4 // self.num_rows // self.halves) if self.num_rows < 4 else 1

    @property
    def halves(self) -> int:
        return 2 if self.end == "swiglu" else 1

    @property
    def scratch_floats(self) -> int:
        """Of a thread: x in the order of lanes, and its sums of groups."""
        return self.num_rows * (self.rows.padded + -(-self.rows.groups // LANES) * LANES)

    def write(self, code: Code, a: Arguments) -> None:
        x = a["scratch"] + a["worker"] * (4 * self.scratch_floats)
        sums = x + 4 * self.num_rows * self.rows.padded
        for row in range(self.num_rows):
            self._prepare(code, a, row, x, sums)
        per_worker = a["workers"] * self.at_once
        each = (a["num_outputs"] + (per_worker - 1)) // per_worker * self.at_once
        start = a["worker"] * each
        stop = code.select(start + each < a["num_outputs"], start + each, a["num_outputs"])
        with code.range(start, stop, self.at_once) as first:
            outputs = [first + i for i in range(self.at_once)]
            # Those behind the last are read as the last, and not stored.
            read = [code.select(n < stop, n, stop - 1) for n in outputs]
            halves = [[n + a["num_outputs"] * half for n in read] for half in range(self.halves)]
            sum_of = self._sums(code, a, [n for half in halves for n in half], x, sums)
            for i, n in enumerate(outputs):
                with code.when(n < stop):
                    for row in range(self.num_rows):
                        parts = [sum_of[half * self.at_once + i][row] for half in range(self.halves)]
                        at = a["out"] + (n + a["num_outputs"] * row) * 4
                        if self.end == "swiglu":
                            code.store(_silu(code, parts[0]) * parts[1], at)
                        else:
                            code.store(parts[0] + code.load(at, F32) if self.end == "add" else parts[0], at)

    def _prepare(self, code: Code, a: Arguments, row: int, x: Value, sums: Value) -> None:
        """A row of x, or of its norm, in the order of lanes, with zeros behind; and the sums of groups."""
        rows, K = self.rows, self.rows.columns
        source, x = a["x"] + 4 * row * K, x + 4 * row * rows.padded
        factor = self._norm_factor(code, a, source) if self.norm else None

        def unit(at: Value, columns: int) -> None:
            parts = [
                code.load(source + (at + first) * 4, vector(F32), max(0, min(LANES, columns - first)))
                for first in range(0, rows.unit, LANES)
            ]
            if factor is not None:
                weights = [
                    code.load(a["norm"] + (at + first) * 4, vector(F32), max(0, min(LANES, columns - first)))
                    for first in range(0, rows.unit, LANES)
                ]
                parts = [part * factor * weight for part, weight in zip(parts, weights, strict=True)]
            for i, lanes in enumerate(rows.lanes):
                code.store(code.shuffle(parts[0], parts[-1], lanes), x + (at + i * LANES) * 4)

        whole = K // rows.unit * rows.unit
        with code.range(0, whole, rows.unit) as at:
            unit(at, rows.unit)
        for rest in range(whole, rows.padded, rows.unit):
            unit(code.number(rest), max(0, K - rest))
        padded = -(-rows.groups // LANES) * LANES
        with code.range(0, rows.groups) as group:
            total = code.variable(code.zeros())
            with code.range(0, rows.group, LANES) as at:
                total.value = total.value + code.load(x + (group * rows.group + at) * 4, vector(F32))
            code.store(code.sum(total.value), sums + (group + row * padded) * 4)
        with code.range(rows.groups, padded) as group:
            code.store(code.number(0.0, F32), sums + (group + row * padded) * 4)

    def _norm_factor(self, code: Code, a: Arguments, source: Value) -> Value:
        K = self.rows.columns
        squares = code.variable(code.zeros())
        with code.range(0, K // LANES * LANES, LANES) as at:
            part = code.load(source + at * 4, vector(F32))
            squares.value = code.fma(part, part, squares.value)
        if K % LANES:
            part = code.load(source + K // LANES * LANES * 4, vector(F32), K % LANES)
            squares.value = code.fma(part, part, squares.value)
        mean = code.sum(squares.value) / float(K)
        return code.splat(code.number(1.0, F32) / code.sqrt(mean + code.float_of(a["eps"])))

    def _sums(self, code: Code, a: Arguments, outputs: Sequence[Value], x: Value, sums: Value) -> list[list[Value]]:
        """Of the matrix's rows, with each row of x."""
        rows, M, K = self.rows, self.num_rows, self.rows.columns
        at_row = [a["matrix"] + n * rows.nbytes for n in outputs]
        total = [[code.variable(code.zeros()) for _ in range(M)] for _ in outputs]

        def unit(at: Value, columns: int, into: list[list[Variable]]) -> None:
            parts = [
                [
                    code.load(x + (at + row * rows.padded + first) * 4, vector(F32))
                    for first in range(0, rows.unit, LANES)
                ]
                for row in range(M)
            ]
            for address, sum_M in zip(at_row, into, strict=True):
                address = address + (at * rows.bits >> 3)
                code.prefetch(address + _AHEAD)
                for i, weights in enumerate(rows.read(code, address, columns)):
                    for row in range(M):
                        sum_M[row].value = code.fma(weights, parts[row][i], sum_M[row].value)

        if not rows.group:
            with code.range(0, K // rows.unit * rows.unit, rows.unit) as at:
                unit(at, rows.unit, total)
            if K % rows.unit:
                unit(code.number(K // rows.unit * rows.unit), K % rows.unit, total)
        else:
            at_scales = [a["scale_offset"] + n * (4 * rows.groups) for n in outputs]
            with code.range(0, rows.groups) as group:
                of_group = [[code.variable(code.zeros()) for _ in range(M)] for _ in outputs]
                with code.range(group * rows.group, (group + 1) * rows.group, rows.unit) as at:
                    unit(at, rows.unit, of_group)
                for n, address in enumerate(at_scales):
                    scale = code.splat((code.load(address + group * 4, I32) << 16).bits(F32))
                    for row in range(M):
                        total[n][row].value = code.fma(scale, of_group[n][row].value, total[n][row].value)
            padded = -(-rows.groups // LANES) * LANES
            for first in range(0, rows.groups, LANES):
                for n, address in enumerate(at_scales):
                    pairs = code.load(address + 4 * first, vector(I32), min(LANES, rows.groups - first))
                    offset = (pairs & _UPPER_HALF).bits(vector(F32))
                    for row in range(M):
                        of_x = code.load(sums + 4 * (first + row * padded), vector(F32))
                        total[n][row].value = code.fma(offset, of_x, total[n][row].value)
        out = [[code.sum(of.value) for of in sum_M] for sum_M in total]
        if self.has_bias:
            biases = [code.load(a["bias"] + n * 4, F32) for n in outputs]
            out = [[part + bias for part in sum_M] for sum_M, bias in zip(out, biases, strict=True)]
        return out


class Many(NamedTuple):
    """A product of many rows, which `adds` to what is there or not.

    Attributes:
        height: of a tile: rows of x, and
        width: columns of the product, whose sums are registers.
    """

    rows: Rows
    height: int
    width: int

    @property
    def depth(self) -> int:
        """Columns of a panel: whole units and groups."""
        size = self.rows.group or self.rows.unit
        return min(self.rows.padded, max(size, _PANEL_COLUMNS // size * size))

    @property
    def scratch_floats(self) -> int:
        """Of a thread: a panel, [depth, width]."""
        return self.depth * self.width

    def write(self, code: Code, a: Arguments) -> None:
        panel, T = a["scratch"] + a["worker"] * (4 * self.scratch_floats), a["num_rows"]
        with code.range(a["worker"] * self.width, a["num_outputs"], a["workers"] * self.width) as n:
            with code.range(0, self.rows.columns, self.depth) as k:
                depth = code.smaller(code.number(self.depth), code.number(self.rows.columns) - k)
                self.fill(code, a, panel, n, k)
                start = code.number(0)
                for height in (self.height, 1):
                    stop = start + (T - start) // height * height
                    with code.range(start, stop, height) as t:
                        self._tile(code, a, panel, (t, n, k), depth, height)
                    start = stop

    def fill(self, code: Code, a: Arguments, panel: Value, n: Value, k: Value) -> None:
        """Columns of the matrix from k on, of rows from n on, as rows of float32. Rows behind the last are like it."""
        rows = self.rows
        whole = rows.padded if rows.group else rows.columns // rows.unit * rows.unit
        stop = code.smaller(k + self.depth, code.number(whole))
        with code.range(0, self.width, LANES) as block:
            row_of = [code.smaller(n + block + i, a["num_outputs"] - 1) for i in range(LANES)]

            def unit(at: Value, columns: int) -> None:
                parts = [self._read(code, a, row, at, columns) for row in row_of]
                for lanes, columns_of in zip(rows.lanes, zip(*parts, strict=True), strict=True):
                    for lane, column in zip(lanes, transposed(code, columns_of), strict=True):
                        code.store(column, panel + ((at - k + lane) * self.width + block) * 4)

            with code.range(k, stop, rows.unit) as at:
                unit(at, rows.unit)
            if whole < rows.columns:
                with code.when(k + self.depth > whole):
                    unit(code.number(whole), rows.columns - whole)

    def _read(self, code: Code, a: Arguments, row: Value, at: Value, columns: int) -> list[Value]:
        """A unit of the matrix, wide."""
        rows = self.rows
        weights = rows.read(code, a["matrix"] + row * rows.nbytes + (at * rows.bits >> 3), columns)
        if not rows.group:
            return weights
        pair = code.load(a["scale_offset"] + (row * rows.groups + at // rows.group) * 4, I32)
        scale, offset = (code.splat(bits.bits(F32)) for bits in (pair << 16, pair & _UPPER_HALF))
        return [code.fma(part, scale, offset) for part in weights]

    def _tile(
        self, code: Code, a: Arguments, panel: Value, at: tuple[Value, Value, Value], depth: Value, height: int
    ) -> None:
        """Add a panel's part of the product of so many rows of x from t on."""
        t, n, k = at
        for i, sum_C in enumerate(self.sums(code, a["x"] + (t * self.rows.columns + k) * 4, panel, depth, height)):
            for c, part in enumerate(sum_C):
                first = n + c * LANES
                out, lanes = a["out"] + ((t + i) * a["num_outputs"] + first) * 4, a["num_outputs"] - first
                there = code.select((k > 0) | (a["adds"] > 0), lanes, code.number(0))
                code.store(part + code.load(out, vector(F32), there), out, lanes)

    def sums(self, code: Code, x: Value, panel: Value, depth: Value, height: int) -> list[list[Value]]:
        """Of so many rows of x with a panel."""
        total = [[code.variable(code.zeros()) for _ in range(0, self.width, LANES)] for _ in range(height)]
        with code.range(0, depth) as j:
            columns = [code.load(panel + (j * self.width + c) * 4, vector(F32)) for c in range(0, self.width, LANES)]
            for i, sum_C in enumerate(total):
                factor = code.splat(code.load(x + (j + i * self.rows.columns) * 4, F32))
                for part, column in zip(sum_C, columns, strict=True):
                    part.value = code.fma(factor, column, part.value)
        return [[part.value for part in sum_C] for sum_C in total]


def transposed(code: Code, rows: Sequence[Value]) -> list[Value]:
    """As many columns as rows, by exchanges of two rows' lanes at a distance, which doubles."""
    out, count = list(rows), len(rows)
    distance = 1
    while distance < count:
        for i in range(count):
            if not i & distance:
                a, b = out[i], out[i + distance]
                out[i] = code.shuffle(a, b, [count + m - distance if m & distance else m for m in range(count)])
                out[i + distance] = code.shuffle(
                    a, b, [count + m if m & distance else m + distance for m in range(count)]
                )
        distance *= 2
    return out


def _silu(code: Code, gate: Value) -> Value:
    return gate / (code.exp(gate * -1.0) + 1.0)


def _write_swiglu(code: Code, a: Arguments) -> None:
    F = a["num_outputs"]
    with code.range(a["worker"], a["num_rows"], a["workers"]) as row:
        with code.range(0, F, LANES) as at:
            gate_at, lanes = a["gate_up"] + (row * F * 2 + at) * 4, F - at
            gate, up = (code.load(address, vector(F32), lanes) for address in (gate_at, gate_at + F * 4))
            code.store(_silu(code, gate) * up, a["out"] + (row * F + at) * 4, lanes)


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


def tile_size() -> tuple[int, int]:
    """Height and width of a tile whose sums are registers, as many as this processor has."""
    return (8, 48) if lanes_of_processor() == LANES else (6, 16)


def _addresses(matrix_NK: Matrix) -> dict[str, int]:
    if isinstance(matrix_NK, QuantizedMatrix):
        return {"matrix": matrix_NK.words.data_ptr(), "scale_offset": matrix_NK.scale_offset.data_ptr()}
    return {"matrix": matrix_NK.data_ptr(), "scale_offset": 0}


@functools.cache
def _few_kernel(few: Few) -> Kernel:
    names = "matrix", "scale_offset", "x", "norm", "eps", "bias", "out", "num_outputs", "scratch"
    return Kernel(few.write, names)


@functools.cache
def _many_kernel(many: Many) -> Kernel:
    names = "matrix", "scale_offset", "x", "out", "num_rows", "num_outputs", "adds", "scratch"
    return Kernel(many.write, names)


@functools.cache
def _swiglu_kernel() -> Kernel:
    return Kernel(_write_swiglu, ("gate_up", "out", "num_rows", "num_outputs"))
