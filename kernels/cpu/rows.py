"""How a matrix lies in memory, in any of its forms, and how products read its numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final, NamedTuple

from torch import Tensor

from minirea.compact import MIDDLE, UNIT, CompactMatrix
from minirea.kernels.cpu.code import F32, I8, I16, I32, I64, LANES, Arguments, Code, Value, vector
from minirea.kernels.cpu.compile import kind_of
from minirea.quantize import LEAST_BITS, STEPS, ZERO, QuantizedMatrix

Matrix = Tensor | QuantizedMatrix | CompactMatrix
_UPPER_HALF: Final = -(1 << 16)  # of 32 bits


class Rows(NamedTuple):
    """How a matrix [N, K] lies in memory.

    Attributes:
        kind: "bfloat16", "float16" or "float32", "12" bits of bfloat16, or "8" or "4" bits.
        group: columns that share scale and offset; 0: there are none.
        coded: both are codes, and rows have units.
    """

    kind: str
    columns: int
    group: int
    coded: bool = False

    @classmethod
    def of(cls, matrix_NK: Matrix) -> Rows:
        if isinstance(matrix_NK, QuantizedMatrix):
            return cls(str(matrix_NK.bits), matrix_NK.num_columns, matrix_NK.group_size, matrix_NK.units is not None)
        if isinstance(matrix_NK, CompactMatrix):
            return cls("12", matrix_NK.num_columns, 0)
        return cls(kind_of(matrix_NK), matrix_NK.shape[1], 0)

    @property
    def unit(self) -> int:
        """Columns that are read at once."""
        return {"4": 2 * LANES, "12": UNIT}.get(self.kind, LANES)

    @property
    def bits(self) -> int:
        return int(self.kind) if self.kind.isdigit() else 32 if self.kind == "float32" else 16

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
        return self.stored * self.bits // 8

    @property
    def stored(self) -> int:
        """Columns that are in memory."""
        return self.padded if self.kind.isdigit() else self.columns

    @property
    def power(self) -> int:
        """Of two, by which x is multiplied before its products with what `read` gives."""
        return MIDDLE if self.kind == "12" else 0

    @property
    def lanes(self) -> list[list[int]]:
        """Which column of a unit each lane of its vectors has; see minirea.quantize."""
        if self.kind == "8":
            return [[4 * (m % 4) + m // 4 for m in range(LANES)]]
        if self.kind == "4":
            return [[8 * (m % 4) + half + m // 4 for m in range(LANES)] for half in (0, 4)]
        return [list(range(first, first + LANES)) for first in range(0, self.unit, LANES)]

    def read(self, code: Code, address: Value, columns: int) -> list[Value]:
        """A unit's vectors, float32: the weights of its first `columns`; or their q - ZERO; or those in 12 bits times
        2^-base.
        """
        if self.kind == "12":
            return _compact_weights(code, address)
        if self.group:
            q = code.wider(code.load(address, vector(I8)), I32)
            parts = [q] if self.kind == "8" else [q & 15, q >> 4]
            return [code.to_float(part - ZERO[self.bits]) for part in parts]
        return [code.floats(address, self.kind, min(columns, LANES))]

    @property
    def scale_bytes(self) -> int:
        """Of a group."""
        return 2 if self.coded else 4

    def scales(self, code: Code, a: Arguments, group: Value, count: int | None = None) -> tuple[Value, Value]:
        """Scale and offset of a group of all rows' groups, or vectors of `count` groups from there on; of codes without
        the row's unit.
        """
        type_, address = I16 if self.coded else I32, a["scale"] + group * self.scale_bytes
        bits = code.load(address, type_) if count is None else code.load(address, vector(type_), count)
        if not self.coded:
            scale, offset = bits << 16, bits & _UPPER_HALF
            return scale.bits(F32.like(bits.type)), offset.bits(F32.like(bits.type))
        bits = code.signed(bits, I32)
        s = (((bits & 255) << 18) | LEAST_BITS).bits(F32.like(bits.type))
        return s * float(STEPS), s * (code.to_float(bits & -256) * 2.0**-8)

    @contextlib.contextmanager
    def apart(self, code: Code, a: Arguments, row: Value) -> Iterator[tuple[Value, Value]]:
        """A loop over the weights of a row that `read` leaves out, zeros there: column and value."""
        first, stop = (code.wider(code.load(a["first"] + (row + i) * 4, I32), I64) for i in range(2))
        with code.range(first, stop) as entry:
            yield code.wider(code.load(a["column"] + entry * 4, I32), I64), code.load(a["value"] + entry * 4, F32)


def _compact_weights(code: Code, address: Value) -> list[Value]:
    """Of a unit in 12 bits: see minirea.compact."""
    low, pairs = code.load(address, vector(I8, UNIT)), code.load(address + UNIT, vector(I8, UNIT // 2))
    twice = code.shuffle(pairs, pairs, range(UNIT)).bits(vector(I16, UNIT // 2))
    shifts = code.number([0] * (UNIT // 4) + [4] * (UNIT // 4), twice.type)
    high = ((twice >> shifts).bits(vector(I8, UNIT)) & 15) + 120 & -121  # so that the sign is at bit 7
    weights = []
    for first in (0, 8):  # of 16 bytes of each
        bytes_of = [at for lane in range(first, UNIT, 16) for i in range(lane, lane + 8) for at in (i, UNIT + i)]
        pair = code.shuffle(low, high, bytes_of).bits(vector(I32))
        weights += [(pair << 16).bits(vector(F32)), (pair & _UPPER_HALF).bits(vector(F32))]
    return weights
