"""Matrices of one byte or half of one per weight: how weights are rounded, packed, and made wide again.

A weight is w = scale * (q - ZERO) + offset, with q of 8 or 4 bits and one scale and offset for a group of columns of a
row. Only weights are rounded, from their own values alone. Scale and offset minimize the squared error of a group: the
best for given q follow by linear regression, the best q for given scale and offset by rounding, in turn. They are
what their bits hold before weights are rounded with them, so that their own rounding costs little.

With 8 bits, and in a matrix that comes with q of 4 bits, scale and offset are bfloat16 numbers. Where weights are
rounded to 4 bits, whose groups are short, both together have 16 bits, a *code*: w = unit * s * (16 * (q - ZERO) + z),
with one float32 unit for a row, z of 8 bits, and s = 2^(e - 7) * (1 + m / 32) of 3 bits e and 5 bits m.

The q of a row lie in the fields of 32-bit words, which come in fours, 16 bytes: what a thread of a GPU loads at a time.
Four words have columns in a row: field i of word j has column 4 * i + j of them, so that a thread needs x of these
columns alone, and one scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

# By bits. The q of the offset, near the middle of the range; rounds of regression, until the error stands still.
ZERO: Final = {8: 136, 4: 8}
STEPS: Final = 16  # of the offset in a scale
_LARGEST: Final = 2 - 2**-5  # s
_LEAST: Final = 2.0**-7
LEAST_BITS: Final = 120 << 23  # of the least as a float32; e and m lie in bits 18 to 25
UNIT: Final = 4  # words with columns in a row
_ROUNDS: Final = {8: 1, 4: 4}
# Weights that are rounded at a time. A CPU's stay in its caches; a GPU's make up for the launches.
_AT_ONCE: Final = {"cpu": 1 << 17, "cuda": 1 << 21}
_TEMPORARIES: Final = 6  # float32 values that rounding holds for a weight
_LEAST_SCALE: Final = 2.0**-110  # of a group of equal weights; its inverse is a normal number


@dataclass(frozen=True)
class QuantizedMatrix:
    """[N, K] in `bits` bits: words int32 [N, groups * words of a group] and scale_offset bfloat16 [N, groups, 2]; or,
    with units float32 [N], scale_offset int16 [N, groups], codes with z in the upper byte, e and m in the lower one.

    Rows are filled up to whole groups with weights that no product uses.
    """

    words: Tensor
    scale_offset: Tensor
    num_columns: int
    bits: int
    units: Tensor | None = None

    @classmethod
    def empty(cls, N: int, K: int, bits: int, size: int, device: torch.device) -> QuantizedMatrix:
        """With groups of so many columns, a multiple of 32 with 4 bits and of 16 with 8. 0: to be rounded, with groups
        of `group_size` and, in 4 bits, codes.
        """
        coded, size = is_coded(bits, size), size or group_size(K, bits)
        groups = -(-K // size)
        words = torch.empty(N, groups * size * bits // 32, dtype=torch.int32, device=device)
        if not coded:
            return cls(words, torch.empty(N, groups, 2, dtype=torch.bfloat16, device=device), K, bits)
        codes = torch.empty(N, groups, dtype=torch.int16, device=device)
        return cls(words, codes, K, bits, torch.empty(N, dtype=torch.float32, device=device))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.words), self.num_columns

    @property
    def group_size(self) -> int:
        """Columns that share scale and offset."""
        return self.words.shape[1] * 32 // (self.bits * self.scale_offset.shape[1])

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scale_offset.nbytes + (0 if self.units is None else self.units.nbytes)

    def rows(self, start: int, stop: int) -> QuantizedMatrix:
        """A view of rows [start, stop)."""
        units = None if self.units is None else self.units[start:stop]
        return QuantizedMatrix(
            self.words[start:stop], self.scale_offset[start:stop], self.num_columns, self.bits, units
        )

    def round(self, wide_NK: Tensor) -> None:
        """Become the nearest to values of any floating-point dtype, which are on the same device."""
        for start, stop in parts(len(wide_NK), self.num_columns, _AT_ONCE[wide_NK.device.type]):
            self.rows(start, stop)._round(wide_NK[start:stop].float())

    def fill(self, q_NK: Tensor, scale_NS: Tensor, zero_NS: Tensor, columns: int) -> None:
        """Become scale * (q - zero) with groups of so many columns, a multiple of our own or all; 4 bits, no codes.

        q stay as they are. Scales are rounded to bfloat16, and so are the offsets that follow from them.
        """
        (N, K), groups, size = self.shape, self.scale_offset.shape[1], self.group_size
        scale_NS = scale_NS.bfloat16()
        offset_NS = scale_NS.float() * (ZERO[self.bits] - zero_NS.float())
        stored = torch.stack([scale_NS, offset_NS.bfloat16()], -1)
        self.scale_offset.copy_(stored.repeat_interleave(-(-columns // size), 1)[:, :groups])
        q_CR = F.pad(q_NK, (0, groups * size - K)).reshape(-1, size).t()
        self.words.copy_(_packed(q_CR, self.bits).view(N, -1))

    def scales(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Scale and offset of the groups, [N, groups] each."""
        if self.units is None:
            scale, offset = self.scale_offset.to(dtype).unbind(2)
            return scale, offset
        s, z = _decoded(self.scale_offset)
        scale = s.to(dtype) * self.units.to(dtype)[:, None]
        return scale * STEPS, scale * z

    def unpack(self) -> Tensor:
        """q, uint8 [N, groups * columns of a group]."""
        bytes_UWB = self.words.view(torch.uint8).view(-1, UNIT, 4)
        if self.bits == 4:
            bytes_UWB = torch.stack([bytes_UWB & 15, bytes_UWB >> 4], -1).flatten(2)
        return bytes_UWB.transpose(1, 2).reshape(len(self.words), -1)

    def widen(self, dtype: torch.dtype) -> Tensor:
        """[N, K] in `dtype`, rounded once."""
        exact = torch.promote_types(dtype, torch.float32)
        scale_NG, offset_NG = self.scales(exact)
        q_NGC = self.unpack().view(*scale_NG.shape, -1).to(exact).sub_(ZERO[self.bits])
        wide_NGC = torch.addcmul(offset_NG[..., None], q_NGC, scale_NG[..., None])
        return wide_NGC.flatten(1)[:, : self.num_columns].to(dtype)

    def _round(self, wide_NK: Tensor) -> None:
        """Become the nearest to float32 values.

        Inside, the columns of a group lie one below the other, [C, R] for R = N * groups, so that sums over a group add
        whole vectors.
        """
        size = self.group_size
        padding = self.scale_offset.shape[1] * size - self.num_columns
        if padding:  # with a value of the group's own, which does not widen its range
            wide_NK = F.pad(wide_NK[None], (0, padding), mode="replicate")[0]
        wide_CR = wide_NK.reshape(-1, size).t().contiguous()
        mean_R = wide_CR.mean(0)
        wide_CR = wide_CR - mean_R  # makes sums of products covariances; not in place: they may be the caller's
        scale_R, offset_R = _fit(wide_CR, self.bits)
        self._set_scales(scale_R, offset_R + mean_R)
        scale_R, offset_R = (part.flatten() for part in self.scales())
        q_CR = _nearest(wide_CR, scale_R, offset_R - mean_R, self.bits).add_(ZERO[self.bits]).to(torch.uint8)
        self.words.copy_(_packed(q_CR, self.bits).view(self.words.shape))

    def _set_scales(self, scale_R: Tensor, offset_R: Tensor) -> None:
        """The nearest to scale and offset of each group."""
        if self.units is None:
            self.scale_offset.copy_(torch.stack([scale_R, offset_R], 1).view(self.scale_offset.shape))
            return
        scale_R = torch.maximum(scale_R, offset_R.abs() * (STEPS / 127))  # so that z holds the offset
        scale_R = scale_R.bfloat16().float()  # which sums in another order round alike
        scale_NG, offset_NG = scale_R.view(self.scale_offset.shape), offset_R.view(self.scale_offset.shape)
        self.units.copy_(scale_NG.amax(1) / (STEPS * _LARGEST))
        s_NG = (scale_NG / (STEPS * self.units[:, None])).clamp_(_LEAST, _LARGEST)
        code_NG = (s_NG.view(torch.int32) + (1 << 17) >> 18) - (LEAST_BITS >> 18)
        s_NG = ((code_NG << 18) + LEAST_BITS).view(torch.float32)
        z_NG = (offset_NG / (s_NG * self.units[:, None])).round_().clamp_(-128, 127)
        self.scale_offset.copy_(z_NG.int() << 8 | code_NG)


def bits_of(quantize: str, name: str, num_layers: int) -> int:
    """How a matrix of a model is stored under a choice of config.QUANTIZE, by its name.

    With "int4" the output head has 8 bits, and so have the first two layers (one of three to five, none of fewer) but
    for gate and up: their errors are those of the logits, and of all that the other layers make of them, and in a large
    model they are small parts. What they cost in a small one is in kernels/NOTEBOOK.md.
    """
    if quantize != "int4" or not name.startswith("layers."):
        return 8
    _, layer, matrix, *_ = name.split(".")
    return 4 if int(layer) >= min(2, num_layers // 3) or matrix == "gate_up" else 8


def group_size(K: int, bits: int) -> int:
    """Columns that share scale and offset, of a row of K columns that is rounded.

    In 8 bits more of them in long rows, where the wider range costs little and fewer scales save bytes: 1.6 % of the
    weights instead of 6.3 %. In 4 bits twice as many raise what rounding costs by two fifths.
    """
    if bits == 4:
        return 32
    return 256 if K >= 2048 and K % 256 == 0 else 64


def is_coded(bits: int, size: int) -> bool:
    """Whether groups have codes, by arguments of QuantizedMatrix.empty."""
    return bits == 4 and not size


def quantized_bytes(N: int, K: int, bits: int, size: int) -> int:
    """What QuantizedMatrix.empty of these takes."""
    of_group, of_row = (2, 4) if is_coded(bits, size) else (4, 0)
    size = size or group_size(K, bits)
    return N * (-(-K // size) * (size * bits // 8 + of_group) + of_row)


def rounding_bytes(num_columns: int, device: torch.device) -> int:
    """What QuantizedMatrix.round holds at most besides its arguments, for rows of so many columns."""
    return max(_AT_ONCE[device.type], num_columns) * _TEMPORARIES * torch.float32.itemsize


def parts(num_rows: int, num_columns: int, at_once: int) -> Iterator[tuple[int, int]]:
    """Rows [start, stop) of a matrix in parts of at most `at_once` weights, and at least one row."""
    step = max(1, at_once // num_columns)
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


def _decoded(codes: Tensor) -> tuple[Tensor, Tensor]:
    """s and z of codes, float32."""
    bits = codes.int()
    return (((bits & 255) << 18) + LEAST_BITS).view(torch.float32), (bits >> 8).float()


def _packed(q_CR: Tensor, bits: int) -> Tensor:
    """Words of R groups, int32 [R, W], from the q of their columns, uint8."""
    R = q_CR.shape[1]
    if bits == 4:
        q_UFWR = q_CR.reshape(-1, 8, UNIT, R)
        q_CR = q_UFWR[:, 0::2] | (q_UFWR[:, 1::2] << 4)
    return q_CR.reshape(-1, 4, UNIT, R).permute(3, 0, 2, 1).contiguous().view(torch.int32).view(R, -1)


def _fit(wide_CR: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and offset of each group, float32 [R]: from its range, then by regression on what it rounds to.

    The mean of each group is zero.
    """
    low_R, high_R = torch.aminmax(wide_CR, dim=0)
    scale_R = (high_R - low_R) / (2**bits - 1)
    offset_R = low_R + ZERO[bits] * scale_R  # of equal weights what they are
    scale_R.clamp_(min=_LEAST_SCALE)
    for _ in range(_ROUNDS[bits]):
        q_CR = _nearest(wide_CR, scale_R, offset_R, bits)
        q_mean_R = q_CR.mean(0)
        covariance_R = (q_CR * wide_CR).sum(0)
        variance_R = q_CR.square_().sum(0) - len(wide_CR) * q_mean_R.square()
        fits_R = covariance_R > _LEAST_SCALE * variance_R
        scale_R = torch.where(fits_R, covariance_R / variance_R, scale_R)
        offset_R = torch.where(fits_R, -scale_R * q_mean_R, offset_R)
    return scale_R, offset_R


def _nearest(wide_CR: Tensor, scale_R: Tensor, offset_R: Tensor, bits: int) -> Tensor:
    """q - ZERO of each weight, float32."""
    lowest = -ZERO[bits]
    return (wide_CR - offset_R).mul_(1 / scale_R).round_().clamp_(lowest, lowest + 2**bits - 1)
