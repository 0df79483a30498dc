"""Products of a few rows with a matrix: sums of products along the matrix's rows, which are read once, from end to end,
as fast as memory gives them.

A vector has LANES weights; sums of products with them stay apart until the row ends. What a decode step does before
(RMS norm) and after a product (adding to the residual stream, SiLU) is part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from minirea.kernels.cpu.code import F32, LANES, Arguments, Code, Value, Variable, vector
from minirea.kernels.cpu.rows import Rows

_SUMS: Final = 16  # vectors of sums, at most: a processor with AVX-512 has 32 registers
_LEAST_AHEAD: Final = 4096


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
    def ahead(self) -> int:
        """Bytes that memory is asked for before they are read, or a core waits for it: those of the rows after these,
        which begin behind them.
        """
        return max(_LEAST_AHEAD, self.at_once * self.rows.nbytes)

    @property
    def scratch_floats(self) -> int:
        """Of a thread: x in the order of lanes, its sums of groups, and scales of the groups of rows that are read at
        once.
        """
        groups = -(-self.rows.groups // LANES) * LANES
        return self.num_rows * (self.rows.padded + groups) + self.at_once * self.halves * groups

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
                            code.store(silu(code, parts[0]) * parts[1], at)
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
            if factor is None and rows.power:
                parts = [part * 2.0**rows.power for part in parts]
            if factor is not None:
                weights = [
                    code.load(a["norm"] + (at + first) * 4, vector(F32), max(0, min(LANES, columns - first)))
                    for first in range(0, rows.unit, LANES)
                ]
                parts = [part * factor * weight for part, weight in zip(parts, weights, strict=True)]
            if rows.kind in ("8", "4"):
                parts = [code.shuffle(parts[0], parts[-1], lanes) for lanes in rows.lanes]
            for i, part in enumerate(parts):
                code.store(part, x + (at + i * LANES) * 4)

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
        return code.splat(code.number(2.0**self.rows.power, F32) / code.sqrt(mean + code.float_of(a["eps"])))

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
                for line in range(0, rows.unit * rows.bits // 8, 64):
                    code.prefetch(address + (line + self.ahead))
                for i, weights in enumerate(rows.read(code, address, columns)):
                    for row in range(M):
                        sum_M[row].value = code.fma(weights, parts[row][i], sum_M[row].value)

        if not rows.group:
            whole = rows.stored // rows.unit * rows.unit
            with code.range(0, whole, rows.unit) as at:
                unit(at, rows.unit, total)
            if rows.stored > whole:
                unit(code.number(whole), K - whole, total)
        else:
            padded = -(-rows.groups // LANES) * LANES
            scales = sums + 4 * M * padded
            for n, output in enumerate(outputs):
                for first in range(0, rows.groups, LANES):
                    scale, offset = rows.scales(code, a, output * rows.groups + first, min(LANES, rows.groups - first))
                    code.store(scale, scales + 4 * (n * padded + first))
                    for row in range(M):
                        of_x = code.load(sums + 4 * (first + row * padded), vector(F32))
                        total[n][row].value = code.fma(offset, of_x, total[n][row].value)
            with code.range(0, rows.groups) as group:
                of_group = [[code.variable(code.zeros()) for _ in range(M)] for _ in outputs]
                with code.range(group * rows.group, (group + 1) * rows.group, rows.unit) as at:
                    unit(at, rows.unit, of_group)
                for n in range(len(outputs)):
                    scale = code.splat(code.load(scales + (group + n * padded) * 4, F32))
                    for row in range(M):
                        total[n][row].value = code.fma(scale, of_group[n][row].value, total[n][row].value)
        out = [[code.sum(of.value) for of in sum_M] for sum_M in total]
        if rows.coded:
            units = [code.load(a["unit"] + n * 4, F32) for n in outputs]
            out = [[part * unit for part in sum_M] for sum_M, unit in zip(out, units, strict=True)]
        if rows.kind == "12":
            out = [self._with_apart(code, a, n, x, sum_M) for n, sum_M in zip(outputs, out, strict=True)]
        if self.has_bias:
            biases = [code.load(a["bias"] + n * 4, F32) for n in outputs]
            out = [[part + bias for part in sum_M] for sum_M, bias in zip(out, biases, strict=True)]
        return out

    def _with_apart(self, code: Code, a: Arguments, n: Value, x: Value, sum_M: list[Value]) -> list[Value]:
        """A row's sums, with the weights that are apart, to scale."""
        rows = self.rows
        total = [code.variable(code.number(0.0, F32)) for _ in sum_M]
        with rows.apart(code, a, n) as (column, value):
            for row, of_row in enumerate(total):
                part = code.load(x + (column + row * rows.padded) * 4, F32)
                of_row.value = code.fma(value, part, of_row.value)
        scale = code.load(a["scale"] + n * 4, F32)
        return [code.fma(part, scale, of.value * 2.0**-rows.power) for part, of in zip(sum_M, total, strict=True)]


def silu(code: Code, gate: Value) -> Value:
    return gate / (code.exp(gate * -1.0) + 1.0)
