"""A matrix as its checkpoint has it, in half precision, or in 8 or 4 bits, as products read it."""

from __future__ import annotations

from typing import Final, NamedTuple

from torch import Tensor

from minirea.kernels.cpu.code import I8, I32, LANES, Code, Value, vector
from minirea.kernels.cpu.compile import kind_of
from minirea.quantize import ZERO, QuantizedMatrix

Matrix = Tensor | QuantizedMatrix
UPPER_HALF: Final = -(1 << 16)  # of 32 bits


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
