"""What can be said of one step's attention: what its keys are chosen by, where they stand, how it is spread over them.

Shapes, besides the project's letters: R query heads of one key/value head, K winners of a query head, n cached tokens.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from minirea.config import ModelConfig, ReAttentionConfig
from minirea.kernels.reference import locate, score, select, vote
from minirea.observer import Step
from minirea.rope import apply_rope, for_whole_heads

PER_HEAD: Final = ("shared", "found", "middle", "covered", "covered_by_rope")


class Overlap:
    """Selection without RoPE against attention with RoPE at true positions, over the decode steps observed.

    `per_head` gives, for each layer and head [L][H]:

    - shared: of its span_top_k best keys in the middle by q . k without RoPE, the fraction that are also its best with
      RoPE. Softmax keeps the order, so the best with RoPE are those that get most attention.
    - found: of its best keys with RoPE, the fraction that lie in the spans selected without RoPE.
    - middle: the fraction of its attention with RoPE that falls on the middle.
    - covered: the fraction that falls on the spans selected without RoPE, which are part of the middle.
    - covered_by_rope: the same, had every head voted for its best keys with RoPE, and each token and layer alone.

    The spans are those that the engine selected, votes of other tokens and layers included. A step that attends to
    everything selects none: for it they are those that its own best keys would give.

    `chance` gives what random choice would reach: as shared, and as found and as covered / middle.
    """

    def __init__(self, model: ModelConfig) -> None:
        self._sums_LHF = torch.zeros(model.num_layers, model.num_heads, len(PER_HEAD), dtype=torch.float64)
        self._chance_2 = torch.zeros(2, dtype=torch.float64)
        self._calls = 0
        self._layers = model.num_layers

    def __call__(self, step: Step) -> None:
        if not step.is_decode:
            return
        config, n = step.attention.config, step.seq_len
        mid_lo, mid_hi = config.global_size, n - config.local_size
        cos, sin = for_whole_heads(*step.attention.all_tables(n))
        q_GRD, k_GND = step.q_GRD, step.k_GND
        q_rotated, k_rotated = apply_rope(q_GRD, cos[-1], sin[-1]), apply_rope(k_GND, cos, sin)
        winner_GRK = score(q_GRD, k_GND, mid_lo, mid_hi, config.span_top_k)
        rope_winner_GRK = score(q_rotated, k_rotated, mid_lo, mid_hi, config.span_top_k)
        selected_Gn = selected_by_step(step, winner_GRK)
        weight_GRn = attention_weights(q_rotated, k_rotated)
        fractions = (
            shared_fraction(winner_GRK, rope_winner_GRK),
            selected_Gn[:, None].expand_as(weight_GRn).gather(-1, rope_winner_GRK).float().mean(-1),
            weight_GRn[..., mid_lo:mid_hi].sum(-1),
            (weight_GRn * selected_Gn[:, None]).sum(-1),
            (weight_GRn * selected_keys(rope_winner_GRK, n, config.of_decode_step)[:, None]).sum(-1),
        )
        self._sums_LHF[step.layer] += torch.stack(fractions, -1).flatten(0, 1).double().cpu()
        chance = winner_GRK.shape[-1], selected_Gn.float().sum(1).mean()
        self._chance_2 += torch.tensor(chance, dtype=torch.float64) / (mid_hi - mid_lo)
        self._calls += 1

    @property
    def per_head(self) -> dict[str, list[list[float]]]:
        means = self._sums_LHF / (self._calls / self._layers)
        return {name: mean_LH.tolist() for name, mean_LH in zip(PER_HEAD, means.unbind(-1), strict=True)}

    @property
    def chance(self) -> dict[str, float]:
        shared, covered = (self._chance_2 / self._calls).tolist()
        return {"shared": shared, "covered": covered}


class Spread:
    """Positions that keys got and the entropy of attention, over the steps observed.

    Attributes:
        highest_position: of any query or key, in any layer and step, chunks included.
        widest_scope: the most keys that any step could see.
    """

    def __init__(self, model: ModelConfig) -> None:
        self.highest_position = 0
        self.widest_scope = 0
        self._entropy_LH = torch.zeros(model.num_layers, model.num_heads, dtype=torch.float64)
        self._calls = 0
        self._layers = model.num_layers

    def __call__(self, step: Step) -> None:
        scopes = step.scopes()
        for scope in set(scopes):
            self.widest_scope = max(self.widest_scope, len(scope))
            self.highest_position = max(self.highest_position, step.last_position(scope))
        if step.is_decode:
            weights = [step.weights(group, scope)[-1] for group, scope in enumerate(scopes)]
            self._entropy_LH[step.layer] += torch.cat([entropy(weight_RS) for weight_RS in weights]).double().cpu()
            self._calls += 1

    @property
    def entropy(self) -> list[list[float]]:
        """Mean over the decode steps, in nats, [L][H]."""
        return (self._entropy_LH / (self._calls / self._layers)).tolist()


def attention_weights(q_RD: Tensor, k_ND: Tensor) -> Tensor:
    """softmax(q . k / sqrt(D)) in float32: [..., R, N] for q [..., R, D] and k [..., N, D]."""
    return (q_RD.float() @ k_ND.float().mT / q_RD.shape[-1] ** 0.5).softmax(-1)


def entropy(weight_RS: Tensor) -> Tensor:
    """Entropy of each row of probabilities in nats: 0 for one certain key, log S for S equal ones."""
    return torch.special.entr(weight_RS).sum(-1)


def shared_fraction(winner_GRK: Tensor, other_GRK: Tensor) -> Tensor:
    """Fraction of each row's K winners that are also in the other row: [G, R]."""
    return (winner_GRK[..., :, None] == other_GRK[..., None, :]).any(-1).float().mean(-1)


def selected_by_step(step: Step, winner_GRK: Tensor) -> Tensor:
    """Keys of the middle that a decode step attended to, bool [G, n], or those of its winners; see Overlap."""
    attention, n = step.attention, step.seq_len
    if attention.mode == "full" or n <= attention.dense_size:
        return selected_keys(winner_GRK, n, attention.config.of_decode_step)
    chosen_Gn = torch.zeros(len(winner_GRK), n, dtype=torch.bool, device=winner_GRK.device)
    for chosen_n, scope in zip(chosen_Gn, step.scopes(), strict=True):
        chosen_n[scope] = True
    chosen_Gn[:, : attention.config.global_size] = False
    chosen_Gn[:, n - attention.config.local_size :] = False
    return chosen_Gn


def selected_keys(winner_GRK: Tensor, seq_len: int, config: ReAttentionConfig) -> Tensor:
    """Keys of the middle that the vote over these winners selects, bool [G, n]; the kernel's own vote and layout."""
    mid_lo, mid_hi = config.global_size, seq_len - config.local_size
    num_groups = len(winner_GRK)
    ballots = num_groups if config.span_scope == "kv_head" else 1
    kept_BP = vote(winner_GRK.reshape(ballots, -1), config.max_spans)
    start_BP, offset_BP, length_B = select(kept_BP, mid_lo, mid_hi, seq_len, config.span_size)
    chosen_Bn = torch.zeros(ballots, seq_len, dtype=torch.bool, device=winner_GRK.device)
    for ballot, length in enumerate(length_B.tolist()):
        offs_s = torch.arange(length, device=winner_GRK.device)
        row = slice(ballot, ballot + 1)
        chosen_Bn[ballot, locate(offs_s, start_BP[row], offset_BP[row])[0]] = True
    chosen_Bn[:, :mid_lo] = False
    chosen_Bn[:, mid_hi:] = False
    return chosen_Bn.expand(num_groups, -1)
