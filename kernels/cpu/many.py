"""Products of many rows with a matrix: a panel of the matrix's rows is made wide and transposed, and stays in the
processor's cache while all of x is multiplied by it, a tile of rows at a time, whose sums are registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from minirea.kernels.cpu.code import F32, LANES, Arguments, Code, Value, vector
from minirea.kernels.cpu.compile import lanes_of_processor
from minirea.kernels.cpu.rows import Rows

_PANEL_COLUMNS: Final = 1024  # of a matrix, made wide at a time


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
        whole = rows.stored // rows.unit * rows.unit
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
            if whole < rows.stored:
                with code.when(k + self.depth > whole):
                    unit(code.number(whole), rows.columns - whole)
            if rows.kind == "12":
                self._put_apart(code, a, panel + block * 4, row_of, k)

    def _put_apart(self, code: Code, a: Arguments, panel: Value, row_of: Sequence[Value], k: Value) -> None:
        """The weights of some rows that are apart, where they belong in a panel of columns from k on."""
        for i, row in enumerate(row_of):
            with self.rows.apart(code, a, row) as (column, value):
                with code.when((column - k < self.depth) & (column > k - 1)):
                    code.store(value, panel + ((column - k) * self.width + i) * 4)

    def _read(self, code: Code, a: Arguments, row: Value, at: Value, columns: int) -> list[Value]:
        """A unit of the matrix, wide."""
        rows = self.rows
        weights = rows.read(code, a["matrix"] + row * rows.nbytes + (at * rows.bits >> 3), columns)
        if rows.kind == "12":
            scale = code.splat(code.load(a["scale"] + row * 4, F32))
            return [part * 2.0**rows.power * scale for part in weights]
        if not rows.group:
            return weights
        scale, offset = rows.scales(code, a, row * rows.groups + at // rows.group)
        if rows.coded:
            unit = code.load(a["unit"] + row * 4, F32)
            scale, offset = scale * unit, offset * unit
        scale, offset = code.splat(scale), code.splat(offset)
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


def tile_size() -> tuple[int, int]:
    """Height and width of a tile whose sums are registers, as many as this processor has."""
    return (8, 48) if lanes_of_processor() == LANES else (6, 16)
