"""Heads of keys and queries as the kernels of a decode step read them."""

from __future__ import annotations

from typing import Final, NamedTuple

from torch import Tensor

from minirea.kernels.cpu.code import F32, LANES, Code, Value, vector
from minirea.kernels.cpu.compile import address, kind_of

AHEAD: Final = 4096  # bytes that memory is asked for before they are read


class Heads(NamedTuple):
    """What kernels are made for.

    Attributes:
        kind: torch's dtype of keys and values. Queries and results are float32.
        rows: query heads that share a key/value head, R.
        dim: D.
    """

    kind: str
    rows: int
    dim: int

    @property
    def item(self) -> int:
        """Bytes of a number in the cache."""
        return 4 if self.kind == "float32" else 2

    @property
    def halves(self) -> list[tuple[int, int]]:
        """Vectors of half a head: first column and lanes."""
        return [(at, min(LANES, self.dim // 2 - at)) for at in range(0, self.dim // 2, LANES)]

    def key(self, code: Code, address: Value) -> tuple[list[Value], list[Value]]:
        """The halves of a key, and later ones are asked for."""
        for at in range(0, self.dim * self.item, 64):
            code.prefetch(address + (at + AHEAD))
        return self.key_alone(code, address)

    def key_alone(self, code: Code, address: Value) -> tuple[list[Value], list[Value]]:
        """The halves of a key."""
        half = self.dim // 2 * self.item
        first, second = (
            [code.floats(address + (start + at * self.item), self.kind, lanes) for at, lanes in self.halves]
            for start in (0, half)
        )
        return first, second

    def query(self, code: Code, address: Value, row: Value | int) -> tuple[list[Value], list[Value]]:
        """The halves of a row of queries [R, D]."""
        first, second = (
            [
                code.load(address + (code.integer(row) * self.dim + start + at) * 4, vector(F32), n)
                for at, n in self.halves
            ]
            for start in (0, self.dim // 2)
        )
        return first, second

    def scores(self, code: Code, queries: Value, key: tuple[list[Value], list[Value]]) -> list[Value]:
        """Of each row with a key."""
        return [code.sum(self.products(code, self.query(code, queries, row), key)) for row in range(self.rows)]

    def products(
        self, code: Code, query: tuple[list[Value], list[Value]], key: tuple[list[Value], list[Value]]
    ) -> Value:
        """A vector whose lanes add up to a score."""
        total = code.zeros()
        for half in (0, 1):
            for q, k in zip(query[half], key[half], strict=True):
                total = code.fma(q, k, total)
        return total


def rotated(
    code: Code, halves: tuple[list[Value], list[Value]], tables: tuple[list[Value], list[Value]]
) -> tuple[list[Value], list[Value]]:
    """RoPE of a key or query by cos and sin of its position, rounded as minirea.rope.apply_rope is on a CPU."""
    first, second = [], []
    for a, b, cos, sin in zip(*halves, *tables, strict=True):
        first.append(code.fma(b, sin * -1.0, a * cos))
        second.append(code.fma(a, sin, b * cos))
    return first, second


def heads_of(q_HD: Tensor, k_GND: Tensor) -> Heads:
    return Heads(kind_of(k_GND), len(q_HD) // len(k_GND), q_HD.shape[1])


def rows_of(name: str, x_GND: Tensor | None) -> dict[str, int]:
    return {name: address(x_GND), f"{name}_stride": 0 if x_GND is None else x_GND.stride(0) * x_GND.itemsize}
