"""Rotary position embedding: every kind of section "What real checkpoints contain", as cos/sin tables.

Frequencies and angles are float32, in the order of operations that the checkpoints were trained with: at position
100,000 a "more precise" float64 angle would differ from the trained one by more than the tolerance we hold to.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from minirea.config import RopeConfig

_LARGEST: Final = torch.finfo(torch.float32).max


def inverse_frequencies(rope: RopeConfig, head_dim: int, max_position: int, seq_len: int = 0) -> tuple[Tensor, float]:
    """Angle per position of each rotated pair, and the factor on cos and sin.

    Args:
        rope: the checkpoint's declaration.
        head_dim: D.
        max_position: max_position_embeddings; only "dynamic" uses it.
        seq_len: tokens in context; only "dynamic" uses it, and only beyond max_position.

    Returns:
        float32 [D/2] on the CPU, and the attention factor (1 for every type but yarn, arXiv 2309.00071 section 3.4).
    """
    theta = rope.theta
    if rope.type == "dynamic":  # grow the base with the context (NTK-aware scaling)
        stretch = rope.factor * max(seq_len, max_position) / max_position - (rope.factor - 1)
        theta = min(theta * stretch ** (head_dim / (head_dim - 2)), _LARGEST)
    base = theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if rope.type == "linear":
        return 1.0 / base / rope.factor, 1.0
    if rope.type == "llama3":
        return _llama3(1.0 / base, rope), 1.0
    if rope.type == "yarn":
        return _yarn(base, rope, head_dim), _yarn_attention_factor(rope)
    return 1.0 / base, 1.0


def _llama3(frequency: Tensor, rope: RopeConfig) -> Tensor:
    """Keep high frequencies, divide low ones by the factor, blend those between (LLaMA 3.1)."""
    wavelength = 2 * math.pi / frequency
    keep = (rope.original_context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - keep) * frequency / rope.factor + keep * frequency
    blended = torch.where(wavelength > rope.original_context / rope.low_freq_factor, frequency / rope.factor, blended)
    return torch.where(wavelength < rope.original_context / rope.high_freq_factor, frequency, blended)


def _yarn(base: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    """Interpolate the pairs that turn fewer than beta_slow times in the original context, keep those that turn more
    than beta_fast times, and ramp between (arXiv 2309.00071, section 3.2)."""

    def pair_with(rotations: float) -> float:
        ratio = rope.original_context / (rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = float(max(low, 0)), float(min(high, head_dim - 1))
    width = (high - low) or 0.001  # equal ends would divide by zero
    keep = 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return 1.0 / (rope.factor * base) * (1 - keep) + 1.0 / base * keep


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def rope_table(frequencies: Tensor, attention_factor: float, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """cos and sin of positions start..stop-1, each float32 [stop - start, D/2] on the device of `frequencies`."""
    positions = torch.arange(start, stop, device=frequencies.device).float()
    angles = torch.outer(positions, frequencies)
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def for_whole_heads(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of every element of a head and of its partner, [..., D], from tables [..., D/2]."""
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [..., D] by tables `for_whole_heads`, in float32. The partner of element i is i + D/2, modulo D."""
    wide = x.float()
    return (wide * cos).addcmul_(wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)
