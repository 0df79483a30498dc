"""The KV cache: per layer, keys and values of every token read so far."""

from __future__ import annotations

import sys
from typing import Final

import torch
from torch import Tensor

from minirea.config import ModelConfig
from minirea.memory import check_fits

ALL_TOKENS: Final = sys.maxsize


class KVCache:
    """Keys and values of one conversation, [G, N, D] per layer, of which the first `seq_len` tokens are filled.

    `k` are keys without RoPE, to be placed anew in every step. `k_rotated` are the first `dense_limit` keys with RoPE
    at their true positions, for steps that are ordinary attention; where that is all (ALL_TOKENS), `k` is not kept.

    Args:
        config: gives L, G and D.
        capacity: N, tokens. It is allocated at once and doubles when a conversation outgrows it.
        dense_limit: tokens up to which keys are also kept with RoPE.

    Raises:
        MemoryLimitError: the device cannot hold it.
    """

    def __init__(
        self, config: ModelConfig, capacity: int, dense_limit: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.capacity = capacity
        self.dense_limit = dense_limit
        self.seq_len = 0
        self._token_shape = (config.num_kv_heads, config.head_dim)
        self._num_layers = config.num_layers
        self.k: list[Tensor] = []
        self.k_rotated: list[Tensor] = []
        self.v: list[Tensor] = []
        self._check(capacity)
        for tensors, tokens in self._parts(capacity):
            tensors += [self._allocate(tokens) for _ in range(self._num_layers)]

    @property
    def nbytes(self) -> int:
        return self._bytes(self.capacity)

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.k, *self.k_rotated, *self.v]

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens, at least doubling, one layer at a time so that the peak stays low."""
        if capacity <= self.capacity:
            return
        capacity = max(capacity, 2 * self.capacity)
        self._check(capacity)
        for tensors, tokens in self._parts(capacity):
            for layer, old in enumerate(tensors):
                filled = min(self.seq_len, old.shape[1])
                tensors[layer] = self._allocate(tokens)
                tensors[layer][:, :filled] = old[:, :filled]
        self.capacity = capacity

    def write(self, layer: int, k_TGD: Tensor, k_rotated_TGD: Tensor | None, v_TGD: Tensor) -> None:
        """Put this step's T tokens at [seq_len, seq_len + T). `seq_len` itself moves once all layers are done.

        `k_rotated_TGD` holds as many of the keys as lie below dense_limit.
        """
        start = self.seq_len
        stop = start + k_TGD.shape[0]
        self.v[layer][:, start:stop] = v_TGD.transpose(0, 1)
        if self.k:
            self.k[layer][:, start:stop] = k_TGD.transpose(0, 1)
        if k_rotated_TGD is not None:
            self.k_rotated[layer][:, start : start + k_rotated_TGD.shape[0]] = k_rotated_TGD.transpose(0, 1)

    def rewind(self, seq_len: int) -> None:
        """Forget every token from `seq_len` on."""
        if not 0 <= seq_len <= self.seq_len:
            raise ValueError(f"cannot rewind to {seq_len}: the cache holds {self.seq_len} tokens")
        self.seq_len = seq_len

    def _parts(self, capacity: int) -> list[tuple[list[Tensor], int]]:
        """Each kind of tensor that is kept, with its length in tokens at `capacity`."""
        parts = [(self.v, capacity)]
        if self.dense_limit < ALL_TOKENS:
            parts.append((self.k, capacity))
        if self.dense_limit:
            parts.append((self.k_rotated, min(capacity, self.dense_limit)))
        return parts

    def _allocate(self, tokens: int) -> Tensor:
        num_kv_heads, head_dim = self._token_shape
        return torch.empty(num_kv_heads, tokens, head_dim, device=self.device, dtype=self.dtype)

    def _bytes(self, capacity: int) -> int:
        num_kv_heads, head_dim = self._token_shape
        tokens = sum(tokens for _, tokens in self._parts(capacity))
        return tokens * self._num_layers * num_kv_heads * head_dim * self.dtype.itemsize

    def _check(self, capacity: int) -> None:
        change = f"shorten the prompt ({capacity} tokens with --max-tokens), or lower --max-tokens"
        check_fits(self.device, 0, self._bytes(capacity), change)
