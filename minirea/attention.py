"""The three ways to attend: reattention, streaming and full. Layers reach the attention kernels through here."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from minirea import cpu
from minirea.cache import ALL_TOKENS, KVCache
from minirea.config import ModelConfig, ReAttentionConfig
from minirea.kernels import prefill_kernels, reattention, resolve_impl
from minirea.rope import apply_rope, for_whole_heads, inverse_frequencies, rope_table

# Chunks of a prompt in a step on a GPU. Their matrix products are one, which reads the weights once and has enough rows
# for all multiprocessors, and so is their attention's launch. Twice as many would be 1% faster and hold twice as much
# (kernels/README.md).
STEP_CHUNKS: Final = 4
STEP_TOKENS: Final = 2048


class Attention:
    """Attention of one model: what a layer calls with its q, k and v.

    As long as everything is in scope, each mode is ordinary attention at true positions, so keys that get RoPE once
    when they are written serve every later step. Beyond `dense_limit` tokens positions change from step to step, and
    minirea.kernels.reattention places keys kept without RoPE. `full` never leaves the first case. The fused kernel
    rotates as fast as it reads and needs no second copy of the keys, so with it the first case never comes.

    Args:
        mode: one of config.MODES; "streaming" is reattention that selects nothing.
        config: scope sizes; with "full" only chunk_size matters.
        impl: "auto", "triton" or "torch", as minirea.kernels.reattention takes it.
    """

    def __init__(
        self, model: ModelConfig, mode: str, config: ReAttentionConfig, impl: str, device: torch.device
    ) -> None:
        self.model = model
        self.mode = mode
        self.config = config
        self.impl = resolve_impl(impl, device)
        self.device = device
        self.horizon = 0  # tokens in context once the prompt is read
        self.sliding_window = model.sliding_window if mode == "full" else None
        in_scope = 0 if self.impl == "triton" else config.global_size + config.local_size
        self.dense_limit = ALL_TOKENS if mode == "full" else in_scope
        # A dynamic RoPE stretches only beyond the trained range, which a bounded scope never leaves.
        # The scopes of a step's chunks lie in one row of positions, each a chunk behind the one before.
        positions = config.max_scope + self.prompt_step_tokens - config.chunk_size
        self.cos, self.sin = self._table(0, 0 if mode == "full" else positions, config.max_scope)
        self.dense_cos, self.dense_sin = for_whole_heads(self.cos[:in_scope, None], self.sin[:in_scope, None])

    @property
    def can_capture(self) -> bool:
        """Whether a step can be a CUDA graph.

        The fused kernel reads the number of cached tokens on the device. "full" attention and impl "torch" give their
        tensors shapes that grow with it, so their steps are launched one operation at a time.
        """
        return self.device.type == "cuda" and self.impl == "triton" and self.mode != "full"

    @property
    def prompt_step_tokens(self) -> int:
        """How many tokens of a prompt a step reads: a chunk, or where steps can be captured, up to STEP_CHUNKS of them.

        Every chunk has a scope of its own in either case, so that a step is only how the work is divided.
        """
        chunk_size = self.config.chunk_size
        return chunk_size * (max(1, min(STEP_CHUNKS, STEP_TOKENS // chunk_size)) if self.can_capture else 1)

    def begin(self, seq_len: int, num_tokens: int) -> None:
        """Prepare a step of `num_tokens` queries that ends at `seq_len`: cos and sin of their true positions.

        A dynamic RoPE depends on the length of the context. The whole prompt's counts, in whatever steps it is read.
        """
        start, stop = seq_len - num_tokens, min(seq_len, self.dense_limit)
        if self.mode == "full":
            cos, sin = self._table(start, stop, max(seq_len, self.horizon))
            self.true_cos, self.true_sin = for_whole_heads(cos[:, None], sin[:, None])
        else:  # [T, 1, D], fewer rows beyond dense_limit
            self.true_cos, self.true_sin = self.dense_cos[start:stop], self.dense_sin[start:stop]

    def __call__(self, layer: int, qkv_TXD: Tensor, cache: KVCache, seq_len: Tensor | None = None) -> Tensor:
        """Write keys and values to the cache and attend.

        Args:
            qkv_TXD: query, key and value heads side by side, X = H + 2G, without RoPE.
            seq_len: cached tokens with these T, int32 [1], where the device counts them; T may be several chunks then.
                Without, T is one chunk or one decode step, and the cache says.

        Returns:
            [T, H, D].
        """
        H, T = self.model.num_heads, len(qkv_TXD)
        q_rotated = self.write(layer, qkv_TXD, cache, seq_len)
        if seq_len is not None:
            return self.over_cache(layer, qkv_TXD[:, :H], cache, seq_len)
        stop = cache.seq_len + T
        if stop <= self.dense_limit:
            assert q_rotated is not None
            start = self._first_visible(stop, T)
            keys = (1, start, stop - start)
            k_GND, v_GND = cache.k_rotated[layer].narrow(*keys), cache.v[layer].narrow(*keys)
            return full_attention(q_rotated, k_GND, v_GND, self.sliding_window)
        return self.over_cache(layer, qkv_TXD[:, :H], cache, stop)

    def write(self, layer: int, qkv_TXD: Tensor, cache: KVCache, seq_len: Tensor | None = None) -> Tensor | None:
        """Write keys and values to the cache. Arguments are those of a call.

        Returns:
            The queries below dense_limit with RoPE, None if there are none.
        """
        if seq_len is not None:
            prefill_kernels(self.impl).write_kv(qkv_TXD, cache.k[layer], cache.v[layer], seq_len)
            return None
        H, G = self.model.num_heads, self.model.num_kv_heads
        dense_rows = self.true_cos.shape[0]
        if not dense_rows:
            cache.write(layer, qkv_TXD, None)
            return None
        qk_rotated = apply_rope(qkv_TXD[:dense_rows, : H + G], self.true_cos, self.true_sin)
        q_rotated, k_rotated = qk_rotated.split_with_sizes((H, G), 1)
        cache.write(layer, qkv_TXD, k_rotated)
        return q_rotated

    def over_cache(self, layer: int, q_THD: Tensor, cache: KVCache, seq_len: int | Tensor) -> Tensor:
        """ReAttention of a step whose keys and values the cache already holds. Not for mode "full".

        A seq_len on the GPU is read there, so that a captured launch follows it.
        """
        arguments = (q_THD, cache.k[layer], cache.v[layer], seq_len, self.cos, self.sin, self.config, self.impl)
        out_THD: Tensor = reattention(*arguments, chunk_size=self.config.chunk_size)
        return out_THD

    def scope(self, cache: KVCache, q_1HD: Tensor) -> dict[str, int]:
        """What the last step could see: tokens in the global, selected and local part, of how many.

        It is asked once, after the last step, whose selection in the first layer is made again: no step waits for it.

        Args:
            q_1HD: the first layer's query of that step, without RoPE.
        """
        seq_len = cache.seq_len
        if self.mode == "full":
            return {"global": 0, "selected": 0, "local": seq_len - self._first_visible(seq_len, 1), "seq_len": seq_len}
        local = min(seq_len, self.config.local_size)
        first = min(seq_len - local, self.config.global_size)
        return {"global": first, "selected": self._selected(cache, q_1HD), "local": local, "seq_len": seq_len}

    def _selected(self, cache: KVCache, q_1HD: Tensor) -> int:
        outside = self.config.global_size + self.config.local_size
        if cache.seq_len <= outside:
            return 0
        k_GND, v_GND = cache.k[0], cache.v[0]
        seq_len = torch.tensor([cache.seq_len], dtype=torch.int32, device=self.device)  # a number would compile anew
        arguments = (q_1HD, k_GND, v_GND, seq_len, self.cos, self.sin, self.config, self.impl)
        _, selection = reattention(*arguments, return_selection=True)
        return max(map(len, selection if isinstance(selection, list) else [selection])) - outside

    def _first_visible(self, seq_len: int, num_tokens: int) -> int:
        """The first key that any of the last `num_tokens` queries can see."""
        return max(0, seq_len - num_tokens + 1 - (self.sliding_window or seq_len))

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
        from torch.nn.attention.bias import causal_lower_right  # takes 1.7 s, which a CPU need not wait for

        q_HTD, bias = q_THD.transpose(0, 1), causal_lower_right(T, N)
        out = F.scaled_dot_product_attention(q_HTD[None], k_GND[None], v_GND[None], attn_mask=bias, enable_gqa=True)
        return out[0].transpose(0, 1)
    # The query heads of a group become extra rows of one head, so that keys and values are never repeated.
    if T == 1 and q_THD.is_cpu and q_THD.dtype == torch.float32:
        return cpu.attend(q_THD.reshape(G, H // G, D), k_GND, v_GND).view(1, H, D)
    if T > 1 and q_THD.is_cpu and (sliding_window is None or sliding_window >= N):
        return cpu.attend_causal(q_THD, k_GND, v_GND)
    q_GRD = q_THD.unflatten(1, (G, H // G)).permute(1, 2, 0, 3).reshape(G, H // G * T, D)
    mask = None if T == 1 else _causal_mask(T, N, sliding_window, q_THD.device).repeat(H // G, 1)
    out_GRD = F.scaled_dot_product_attention(q_GRD[None], k_GND[None], v_GND[None], attn_mask=mask)[0]
    return out_GRD.view(G, H // G, T, D).permute(2, 0, 1, 3).reshape(T, H, D)


def _causal_mask(num_queries: int, num_keys: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """bool [T, N], true where a query may look: query t is token N - T + t."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key = torch.arange(num_keys, device=device)
    mask = key <= query
    return mask if sliding_window is None else mask & (key > query - sliding_window)
