"""Matrices that come in 4 bits: GPTQ, AWQ, and the pack-quantized format of compressed-tensors.

All of them store a matrix [N, K] as q of 4 bits, eight to an int32 from the lowest bits on, and for each group of
neighbouring columns of a row a scale s and a zero point z, so that a weight is s (q - z):

    method            q                                 z                                  s
    gptq, gptq_v2     qweight [K/8, N]: columns         qzeros [groups, N/8]: rows         scales [groups, N]
    awq               qweight [K, N/8]: rows            qzeros [groups, N/8]: rows         scales [groups, N]
    pack-quantized    weight_packed [N, K/8]: columns   weight_zero_point [N/8, groups]:   weight_scale [N, groups]
                                                        rows; without it z = 8, where the config says "symmetric"

"rows" and "columns" are those of the matrix that share an int32. gptq stores z - 1, modulo 16. awq has the rows of an
int32 in the order 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor


class Form(NamedTuple):
    """How a method stores a matrix. Tensors are those of a file, transposed where `rows_last`, so that rows come first.

    Attributes:
        names: of the tensors of q, z and s, behind the module's.
        groups: the name of the one that has each column's group, where columns may be mixed.
        rows_last: in the file.
        packs_rows: eight rows of q share an int32, not eight columns.
        order: which field of an int32 has which of the rows or columns.
        added: to the zero points of the file.
    """

    names: tuple[str, str, str]
    groups: str = "g_idx"
    rows_last: bool = True
    packs_rows: bool = False
    order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)
    added: int = 0

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """N and K, from the shape of q's tensor in the file."""
        rows, columns = reversed(stored) if self.rows_last else stored
        return (8 * rows, columns) if self.packs_rows else (rows, 8 * columns)

    def shapes(self, N: int, K: int, group_size: int) -> list[tuple[int, ...]]:
        """In the file, of the tensors of q, z and s."""
        groups = -(-K // group_size)
        shapes = [(N // 8, K) if self.packs_rows else (N, K // 8), (N // 8, groups), (N, groups)]
        return [shape[::-1] for shape in shapes] if self.rows_last else list(shapes)

    def unpack(self, q_words: Tensor, zero_words: Tensor | None, scale_NG: Tensor) -> tuple[Tensor, Tensor]:
        """q [N, K] and the zero points [N, groups], uint8, of the rows that are given."""
        q_NK = self._fields_of(q_words, self.packs_rows)
        if zero_words is None:
            return q_NK, torch.full_like(scale_NG, 8, dtype=torch.uint8)
        return q_NK, (self._fields_of(zero_words, True) + self.added) & 15

    def _fields_of(self, words: Tensor, packs_rows: bool) -> Tensor:
        """The fields of int32 [A, B]: [8A, B] where they are rows, else [A, 8B]."""
        bytes_AB4 = words.clone(memory_format=torch.contiguous_format).view(torch.uint8).view(*words.shape, 4)
        fields_AB8 = torch.stack([bytes_AB4 & 15, bytes_AB4 >> 4], -1).flatten(2)[..., list(self.order)]
        return fields_AB8.transpose(1, 2).flatten(0, 1) if packs_rows else fields_AB8.flatten(1)


_OF_GPTQ: Final = ("qweight", "qzeros", "scales")
FORMS: Final = {
    "gptq": Form(_OF_GPTQ, added=1),
    "gptq_v2": Form(_OF_GPTQ),
    "awq": Form(_OF_GPTQ, packs_rows=True, order=(0, 4, 1, 5, 2, 6, 3, 7)),
    "pack-quantized": Form(
        ("weight_packed", "weight_zero_point", "weight_scale"), groups="weight_g_idx", rows_last=False
    ),
}
GROUPS_OF_COLUMNS: Final = ("g_idx", "weight_g_idx")  # of each column its group, where that is stored
SHAPES: Final = ("weight_shape",)  # [N, K] as numbers, which the tensors' own shapes say as well
