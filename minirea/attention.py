"""The three ways to attend: reattention, streaming and full. This is the only module that calls the kernels."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from minirea.cache import KVCache
from minirea.config import ModelConfig, ReAttentionConfig
from minirea.kernels import reattention
from minirea.rope import apply_rope, inverse_frequencies, rope_table

MODES: Final = ("reattention", "streaming", "full")


class Attention:
    """Attention of one model: what a layer calls with its q, k and v.

    `reattention` and `streaming` cache keys without RoPE, since their positions change from step to step. `full`
    gives every key its true position once and for all, so it caches keys already rotated.

    Args:
        mode: one of MODES; "streaming" is reattention that selects nothing.
        config: scope sizes; with "full" only chunk_size matters.
        impl: "auto", "triton" or "torch", as minirea.kernels.reattention takes it.
    """

    def __init__(
        self, model: ModelConfig, mode: str, config: ReAttentionConfig, impl: str, device: torch.device
    ) -> None:
        self.model = model
        self.mode = mode
        self.config = config
        self.impl = impl
        self.device = device
        self.horizon = 0  # tokens in context once the prompt is read
        self.selected = 0  # keys selected from the middle in the last decode step, in the first layer
        # A dynamic RoPE stretches only beyond the trained range, which a bounded scope never leaves.
        self.cos, self.sin = self._table(0, 0 if mode == "full" else config.max_scope, config.max_scope)

    def begin(self, seq_len: int, num_tokens: int) -> None:
        """Announce a step of `num_tokens` queries that ends at `seq_len`; `full` makes its rows of the table.

        A dynamic RoPE depends on the length of the context. The whole prompt's counts, in whatever steps it is read.
        """
        if self.mode == "full":
            self.cos, self.sin = self._table(seq_len - num_tokens, seq_len, max(seq_len, self.horizon))

    def __call__(self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, cache: KVCache) -> Tensor:
        """Write k and v to the cache and attend. All without RoPE; returns [T, H, D]."""
        seq_len = cache.seq_len + q_THD.shape[0]
        if self.mode == "full":
            cos, sin = self.cos[:, None], self.sin[:, None]  # [T, 1, D/2]
            cache.write(layer, apply_rope(k_TGD, cos, sin), v_TGD)
            keys = slice(self._first_visible(seq_len, q_THD.shape[0]), seq_len)
            q_THD = apply_rope(q_THD, cos, sin)
            return full_attention(q_THD, cache.k[layer][:, keys], cache.v[layer][:, keys], self.model.sliding_window)
        cache.write(layer, k_TGD, v_TGD)
        arguments = (q_THD, cache.k[layer], cache.v[layer], seq_len, self.cos, self.sin, self.config, self.impl)
        if layer > 0 or q_THD.shape[0] > 1:
            return reattention(*arguments)
        out_THD, selection = reattention(*arguments, return_selection=True)
        self._count_selected(seq_len, selection)
        return out_THD

    def scope(self, seq_len: int) -> dict[str, int]:
        """What the last decode step could see: tokens in the global, selected and local part, of how many."""
        if self.mode == "full":
            seen = seq_len - self._first_visible(seq_len, 1)
            return {"global": 0, "selected": 0, "local": seen, "seq_len": seq_len}
        local = min(seq_len, self.config.local_size)
        first = min(seq_len - local, self.config.global_size)
        return {"global": first, "selected": self.selected, "local": local, "seq_len": seq_len}

    def _count_selected(self, seq_len: int, selection: Tensor | list[Tensor]) -> None:
        lengths = [len(s) for s in selection] if isinstance(selection, list) else [len(selection)]
        self.selected = max(0, max(lengths) - min(seq_len, self.config.global_size + self.config.local_size))

    def _first_visible(self, seq_len: int, num_tokens: int) -> int:
        """The first key that any of the last `num_tokens` queries can see."""
        window = self.model.sliding_window or seq_len
        return max(0, seq_len - num_tokens + 1 - window)

    def _table(self, start: int, stop: int, seq_len: int) -> tuple[Tensor, Tensor]:
        frequencies, factor = inverse_frequencies(
            self.model.rope, self.model.head_dim, self.model.max_position_embeddings, seq_len
        )
        return rope_table(frequencies.to(self.device), factor, start, stop)


def full_attention(q_THD: Tensor, k_GND: Tensor, v_GND: Tensor, sliding_window: int | None = None) -> Tensor:
    """Ordinary causal attention of the last T of N tokens over all N, everything with RoPE already.

    A query sees itself and the sliding_window - 1 tokens before it, or all before it. Returns [T, H, D].
    """
    (T, H, D), (G, N, _) = q_THD.shape, k_GND.shape
    if T > 1 and q_THD.is_cuda and (sliding_window is None or sliding_window >= N):
        q_HTD, bias = q_THD.transpose(0, 1), causal_lower_right(T, N)
        out = F.scaled_dot_product_attention(q_HTD[None], k_GND[None], v_GND[None], attn_mask=bias, enable_gqa=True)
        return out[0].transpose(0, 1)
    # The query heads of a group become extra rows of one head, so that keys and values are never repeated.
    q_GRD = q_THD.view(T, G, H // G, D).permute(1, 2, 0, 3).reshape(G, H // G * T, D)
    mask = None if T == 1 else _causal_mask(T, N, sliding_window, q_THD.device).repeat(H // G, 1)
    out_GRD = F.scaled_dot_product_attention(q_GRD[None], k_GND[None], v_GND[None], attn_mask=mask)[0]
    return out_GRD.view(G, H // G, T, D).permute(2, 0, 1, 3).reshape(T, H, D)


def _causal_mask(num_queries: int, num_keys: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """bool [T, N], true where a query may look: query t is token N - T + t."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key = torch.arange(num_keys, device=device)
    mask = key <= query
    return mask if sliding_window is None else mask & (key > query - sliding_window)
