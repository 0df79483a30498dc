"""Observes a model's attention: every layer's queries, its keys without RoPE, and what it attended to."""

from __future__ import annotations

import copy
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from minirea.attention import Attention
from minirea.attention import Step as AttentionStep
from minirea.cache import KVCache
from minirea.kernels import ReAttentionConfig, Votes, reattention
from minirea.model import Model
from minirea.rope import apply_rope, for_whole_heads


class Step:
    """One layer's attention in one step: T queries, the last of `seq_len` tokens.

    Attributes:
        q_THD: queries without RoPE.
        q_GRD: the last of them, the only one of a decode step; R query heads for each key/value head.
        k_GND: the keys of all seq_len tokens without RoPE; empty where the cache keeps none (mode "full").
    """

    def __init__(
        self, attention: ObservedAttention, layer: int, q_THD: Tensor, cache: KVCache, selected_by: Selection | None
    ) -> None:
        self.attention = attention
        self.layer = layer
        self.q_THD = q_THD
        self.seq_len = cache.seq_len + len(q_THD)
        self.k_GND = cache.k[layer][:, : self.seq_len] if cache.k else cache.v[layer][:, :0]
        self.q_GRD = q_THD[-1].unflatten(0, (len(self.k_GND), -1))
        self._cache = cache
        self._selected_by = selected_by

    @property
    def is_decode(self) -> bool:
        return len(self.q_THD) == 1

    def scopes(self) -> list[Tensor]:
        """Cache positions that the step attended to, ascending, one int64 [S] for each key/value head.

        In the mode "full" these are all tokens, or those in the sliding window of any of the step's queries.
        """
        attention, T, G = self.attention, len(self.q_THD), len(self.k_GND)
        if attention.mode == "full":
            first = max(0, self.seq_len - T + 1 - (attention.sliding_window or self.seq_len))
            return [torch.arange(first, self.seq_len, device=self.q_THD.device)] * G
        if self.seq_len <= attention.dense_size:
            return [torch.arange(self.seq_len, device=self.q_THD.device)] * G
        k_GND, v_GND = self._cache.k[self.layer], self._cache.v[self.layer]
        # On the device: as a number, each value would be compiled anew by the fused kernel.
        seq_len = torch.tensor([self.seq_len], dtype=torch.int32, device=self.q_THD.device)
        assert self._selected_by is not None
        config, votes = self._selected_by
        arguments = (self.q_THD, k_GND, v_GND, seq_len, *attention.scope_tables(self._cache.capacity), config)
        _, selection = reattention(*arguments, attention.impl, return_selection=True, votes=copy_of(votes))
        return selection if isinstance(selection, list) else [selection] * G

    def last_position(self, scope: Tensor) -> int:
        """The position of the step's last query and key, the highest there is."""
        return self.seq_len - 1 if self.attention.mode == "full" else len(scope) - 1

    def tables(self, scope: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, [S, D/2], of the positions that the keys of a scope have in this mode."""
        if self.attention.mode == "full":
            cos, sin = self.attention.all_tables(self.seq_len)
            return cos[scope], sin[scope]
        cos, sin = self.attention.scope_tables(self._cache.capacity)
        return cos[: len(scope)], sin[: len(scope)]

    def weights(self, group: int, scope: Tensor) -> Tensor:
        """Attention of a key/value head's query heads over its scope, float32 [T, R, S], as the engine has it.

        Section 3 of the design, steps 7 and 8: keys take the positions that the mode gives them, RoPE, scale, softmax.

        Args:
            scope: of the head, one of `scopes()`.
        """
        (T, _, D), attention = self.q_THD.shape, self.attention
        cos, sin = for_whole_heads(*self.tables(scope))
        if self.seq_len <= attention.dense_limit:
            k_SD = self._cache.k_rotated[self.layer][group, scope]
        else:
            k_SD = apply_rope(self.k_GND[group, scope], cos, sin)
        q_TRD = self.q_THD.unflatten(1, (len(self.q_GRD), -1))[:, group]
        q_TRD = apply_rope(q_TRD, cos[-T:, None], sin[-T:, None])
        score_TRS = q_TRD.float() @ k_SD.float().mT / D**0.5
        query_T1 = torch.arange(self.seq_len - T, self.seq_len, device=scope.device)[:, None]
        hidden_TS = scope > query_T1
        if attention.sliding_window:
            hidden_TS |= scope <= query_T1 - attention.sliding_window
        return score_TRS.masked_fill_(hidden_TS[:, None], -torch.inf).softmax(-1)


class Selection(NamedTuple):
    """What a scope was selected by."""

    config: ReAttentionConfig
    votes: Votes | None  # of the layers and tokens before


def copy_of(votes: Votes | None) -> Votes | None:
    return None if votes is None else Votes(*(tensor.clone() for tensor in votes))


class Observer(Protocol):
    """Called after each layer of each observed step."""

    def __call__(self, step: Step) -> None: ...


class ObservedAttention(Attention):
    """A model's attention with an observer of every step. The model's own attention is not changed."""

    def __init__(self, attention: Attention, observer: Observer, horizon: int) -> None:
        super().__init__(attention.model, attention.mode, attention.config, attention.impl, attention.device)
        self.horizon = horizon  # tokens in context once the whole prompt is read
        self.observer = observer
        self._selected_by: Selection | None = None
        self._last_tables: tuple[int, tuple[Tensor, Tensor]] = (0, self.true_tables(0, 0, 0))

    def __call__(self, layer: int, qkv_TXD: Tensor, cache: KVCache, step: AttentionStep) -> Tensor:
        out_THD = super().__call__(layer, qkv_TXD, cache, step)
        self.observer(Step(self, layer, qkv_TXD[:, : self.model.num_heads], cache, self._selected_by))
        return out_THD

    def over_cache(self, layer: int, q_THD: Tensor, cache: KVCache, step: AttentionStep) -> Tensor:
        self._selected_by = Selection(self.config_of(step), copy_of(step.votes))
        return super().over_cache(layer, q_THD, cache, step)

    def all_tables(self, seq_len: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the true positions 0..seq_len-1, [seq_len, D/2], made once for all layers of a step."""
        if self._last_tables[0] != seq_len:
            self._last_tables = (seq_len, self.true_tables(0, seq_len, max(seq_len, self.horizon)))
        return self._last_tables[1]


def observed(model: Model, observer: Observer, horizon: int) -> Model:
    """The same model, of which `observer` sees every layer of every step, in a context of `horizon` tokens.

    The weights are shared. What is not run through the model that this returns is not observed.
    """
    watched = copy.copy(model)
    watched.attention = ObservedAttention(model.attention, observer, horizon)
    return watched
