"""The KV cache: per layer, keys and values of every token read so far. Keys are kept without RoPE."""

from __future__ import annotations

import torch
from torch import Tensor

from minirea.config import ModelConfig
from minirea.memory import check_fits


class KVCache:
    """Keys and values of one conversation, [G, N, D] per layer, of which the first `seq_len` tokens are filled.

    Args:
        config: gives L, G and D.
        capacity: N, tokens. It is allocated at once and doubles when a conversation outgrows it.

    Raises:
        MemoryLimitError: the device cannot hold it.
    """

    def __init__(self, config: ModelConfig, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self.capacity = capacity
        self.seq_len = 0
        self._token_shape = (config.num_kv_heads, config.head_dim)
        self._num_layers = config.num_layers
        self._check(capacity)
        self.k = [self._allocate(capacity) for _ in range(config.num_layers)]
        self.v = [self._allocate(capacity) for _ in range(config.num_layers)]

    @property
    def nbytes(self) -> int:
        return self._bytes(self.capacity)

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens, at least doubling, one layer at a time so that the peak stays low."""
        if capacity <= self.capacity:
            return
        capacity = max(capacity, 2 * self.capacity)
        self._check(capacity)
        for tensors in (self.k, self.v):
            for layer, old in enumerate(tensors):
                tensors[layer] = self._allocate(capacity)
                tensors[layer][:, : self.seq_len] = old[:, : self.seq_len]
        self.capacity = capacity

    def write(self, layer: int, k_TGD: Tensor, v_TGD: Tensor) -> None:
        """Put this step's T tokens at [seq_len, seq_len + T). `seq_len` itself moves once all layers are done."""
        tokens = slice(self.seq_len, self.seq_len + k_TGD.shape[0])
        self.k[layer][:, tokens] = k_TGD.transpose(0, 1)
        self.v[layer][:, tokens] = v_TGD.transpose(0, 1)

    def rewind(self, seq_len: int) -> None:
        """Forget every token from `seq_len` on."""
        if not 0 <= seq_len <= self.seq_len:
            raise ValueError(f"cannot rewind to {seq_len}: the cache holds {self.seq_len} tokens")
        self.seq_len = seq_len

    def _allocate(self, capacity: int) -> Tensor:
        num_kv_heads, head_dim = self._token_shape
        return torch.empty(num_kv_heads, capacity, head_dim, device=self.device, dtype=self.dtype)

    def _bytes(self, capacity: int) -> int:
        num_kv_heads, head_dim = self._token_shape
        return 2 * self._num_layers * num_kv_heads * head_dim * capacity * self.dtype.itemsize

    def _check(self, capacity: int) -> None:
        change = f"shorten the prompt ({capacity} tokens with --max-tokens), or lower --max-tokens"
        check_fits(self.device, 0, self._bytes(capacity), change)
