"""bfloat16 matrices in 12 bits a weight, exactly.

A bfloat16 number has a sign, 8 bits of exponent and 7 of mantissa. The exponents of a row's weights lie close together:
counted from 14 below the row's largest they fit into 4 bits, 1 to 15, with 0 for a zero. The few weights that are
smaller yet, one in some thousands, are kept apart, with their columns.

A row is a sequence of units of UNIT columns: a byte of each column, the lower half of its number, which is the last bit
of the exponent and the mantissa; then bytes with the upper halves of two columns, those of bytes i and UNIT / 2 + i:
sign and three bits of the exponent each. Both halves side by side, with zeros for the rest of the exponent, are the
weight times 2^-base, with a base for each row, so that unpacking takes no table.

Columns of a unit are in the order in which a processor pairs bytes of two registers, and numbers of 16 bits become
float32, even ones by a shift and odd ones by a mask: vectors of 16 of them are then neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

UNIT: Final = 64
BITS: Final = 12  # of a weight
# The byte of each column of a unit: pairs of 8 bytes, and which half of a register, change places.
ORDER: Final = torch.arange(UNIT).view(4, 2, 4, 2).permute(1, 3, 0, 2).flatten().tolist()
# Weights times 2^-base are near the lower end of float32's range, so that products take x times 2^MIDDLE.
MIDDLE: Final = 64
EXPONENTS: Final = 15  # besides zero


@dataclass(frozen=True)
class CompactMatrix:
    """[N, K]: units uint8 [N, bytes of a row]; scale float32 [N], which is 2^(base - MIDDLE); and the weights that are
    apart: of row n entries first[n] to first[n + 1], first int32 [N + 1], of column int32 [A] and value float32 [A].
    """

    units: Tensor
    scale: Tensor
    first: Tensor
    column: Tensor
    value: Tensor
    num_columns: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.units), self.num_columns

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.units, self.scale, self.first, self.column, self.value))

    def widen(self) -> Tensor:
        """The bfloat16 matrix."""
        low_NUC, pairs = self.units.view(len(self.units), -1, UNIT * BITS // 8).int().split((UNIT, UNIT // 2), 2)
        high_NUC = torch.cat([pairs & 15, pairs >> 4], 2)
        code_NUC = ((high_NUC & 7) << 1) | (low_NUC >> 7)
        base_N11 = ((self.scale.view(torch.int32) >> 23) - (127 - MIDDLE)).view(-1, 1, 1)
        exponent_NUC = torch.where(code_NUC > 0, code_NUC + base_N11, 0)
        bits_NUC = ((high_NUC >> 3) << 15) | (exponent_NUC << 7) | (low_NUC & 127)
        wide_NK = bits_NUC.to(torch.int16)[:, :, ORDER].flatten(1)[:, : self.num_columns].contiguous()
        row_A = torch.repeat_interleave(torch.arange(len(self.units)), self.first.diff())
        wide_NK.view(torch.bfloat16)[row_A, self.column] = self.value.bfloat16()
        return wide_NK.view(torch.bfloat16)


def packed_bytes(K: int) -> int:
    """Of a row of K columns, without what is apart."""
    return -(-K // UNIT) * UNIT * BITS // 8


def pays(K: int) -> bool:
    """Whether rows of K columns become shorter; short ones do not fill their units."""
    return 8 * packed_bytes(K) <= 7 * K * torch.bfloat16.itemsize


def compact_bytes(N: int, K: int) -> int:
    """What a bfloat16 matrix takes at most, where `pays` and no more than `most_apart` of its weights are apart."""
    return N * (packed_bytes(K) + 8) + 4 + 8 * most_apart(N, K)


def most_apart(N: int, K: int) -> int:
    """Weights of a matrix; with more it stays as it is, and takes two bytes a weight, whatever `compact_bytes` says."""
    return N * K // 256 + 8
