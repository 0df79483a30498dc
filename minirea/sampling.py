"""From logits to the next token: penalty, temperature, top-k, top-p, min-p, and a seeded draw.

A new filter is a field of SamplingConfig with its check, an `if` in `keep_likely`, and a flag of the field's name in
`add_sampling` (minirea/cli/flags.py); `generate` and `stream` in Python take it as it is. Its tests belong into
tests/minirea/test_sampling.py. It may not wait for the GPU: a CUDA graph holds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minirea.checks import integer, real

NON_FINITE = -1  # stands for the token when the logits hold NaN or infinity
# A probability of 1 as an integer. A GPU adds in no fixed order, and only integers have the same sum in every order.
FIXED_POINT = 2.0**60
LARGEST = 1e250  # repetition penalty that a float64 applies to any logit without overflow; beyond, nothing changes


@dataclass(frozen=True)
class SamplingConfig:
    """How to pick a token. The filters apply in the order of the fields.

    Args:
        repetition_penalty: divides positive and multiplies negative logits of tokens already in context (1: off).
        temperature: divides the logits; 0 always takes the best token, and the filters below have no effect.
        top_k: keep the k best tokens (0: off).
        top_p: keep the fewest best tokens whose probabilities reach p (1: off).
        min_p: keep tokens at least this probable relative to the best (0: off).
        seed: of the draw; None draws a new one. Same seed, same device: same tokens.

    Raises:
        InputError: a value out of range; the message names the field.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        self._real("repetition_penalty", lambda x: 0 < x < math.inf, "a positive number")
        self._real("temperature", lambda x: 0 <= x < math.inf, "a number of at least 0")
        self._real("top_p", lambda x: 0 < x <= 1, "a number above 0 and at most 1")
        self._real("min_p", lambda x: 0 <= x <= 1, "a number from 0 to 1")
        self._set("top_k", integer("top_k", self.top_k, 0))
        self._set("seed", None if self.seed is None else integer("seed", self.seed, 0, 2**63 - 1))

    def _real(self, name: str, valid: Callable[[float], bool], expected: str) -> None:
        self._set(name, real(name, getattr(self, name), valid, expected))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the class is frozen


class Sampler:
    """Draws the tokens of one generation.

    Args:
        context: ids already in context, for the repetition penalty.
        vocab_size: V.
    """

    def __init__(self, config: SamplingConfig, context: list[int], vocab_size: int, device: torch.device) -> None:
        self.config = config
        self.seen_V: Tensor | None = None
        if config.repetition_penalty != 1:
            self.seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen_V[torch.tensor(context, dtype=torch.long, device=device)] = True
        self.generator = torch.Generator(device)
        if config.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(config.seed)

    @property
    def takes_best(self) -> bool:
        """Whether the next token is simply that of the largest logit."""
        return self.config.temperature == 0 and self.seen_V is None

    def __call__(self, logits_V: Tensor) -> Tensor:
        """The next token, int64 [1] on the device; NON_FINITE where the logits are not usable.

        The mark travels with the token, so that checking it costs no extra wait for a GPU; nothing here waits for one,
        so a CUDA graph can hold it.
        """
        best = logits_V.max()
        logits_V = self._penalise(logits_V)
        token = self._draw(logits_V) if self.config.temperature > 0 else logits_V.argmax(keepdim=True)
        if self.seen_V is not None:
            self.seen_V.index_fill_(0, token, True)
        return torch.where(best.abs() < math.inf, token, NON_FINITE)

    def _penalise(self, logits_V: Tensor) -> Tensor:
        if self.seen_V is None:
            return logits_V
        penalty, wide_V = min(max(self.config.repetition_penalty, 1 / LARGEST), LARGEST), logits_V.double()
        return torch.where(self.seen_V, torch.where(wide_V > 0, wide_V / penalty, wide_V * penalty), wide_V)

    def _draw(self, logits_V: Tensor) -> Tensor:
        wide_V = logits_V.double()  # differences to the best may grow without end, and the best stays 0
        scaled_V = (wide_V - wide_V.max()) / self.config.temperature
        probs_V = keep_likely(scaled_V.float().softmax(-1), self.config)
        # Token i comes first in a race of exponential clocks with probability p_i: a draw that no GPU has to wait for.
        clock_V = torch.empty_like(probs_V).exponential_(generator=self.generator)
        return (probs_V / clock_V).argmax(keepdim=True)


def keep_likely(probs_V: Tensor, config: SamplingConfig) -> Tensor:
    """Zero what top-k, top-p and min-p exclude. The best token always stays. Not normalised; [V]."""
    if 0 < config.top_k < len(probs_V):
        probs_V = probs_V.where(probs_V >= probs_V.topk(config.top_k).values[-1], 0.0)
    if config.top_p < 1:
        sorted_V, order_V = probs_V.sort(descending=True, stable=True)
        mass_V = (sorted_V * FIXED_POINT).long()
        before_V = mass_V.cumsum(-1) - mass_V  # probability of all tokens better than this one
        sorted_V = sorted_V.where(before_V < (config.top_p * mass_V.sum().double()).long().clamp(min=1), 0.0)
        probs_V = torch.zeros_like(probs_V).scatter(0, order_V, sorted_V)
    if config.min_p > 0:
        probs_V = probs_V.where(probs_V >= config.min_p * probs_V.max(), 0.0)
    return probs_V
