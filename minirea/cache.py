"""The KV cache: per layer, keys and values of every token read so far."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from minirea.config import ModelConfig
from minirea.memory import MemoryPlan

ALL_TOKENS: Final = sys.maxsize


def cache_bytes(config: ModelConfig, capacity: int, dense_limit: int, dtype: torch.dtype) -> int:
    """How many bytes a KVCache of `capacity` tokens allocates."""
    values, keys = capacity, capacity if dense_limit < ALL_TOKENS else 0
    tokens = values + keys + min(capacity, dense_limit)
    return tokens * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


class KVCache:
    """Keys and values of one conversation, [G, N, D] per layer, of which the first `seq_len` tokens are filled.

    `k` are keys without RoPE, to be placed anew in every step. `k_rotated` are the first `dense_limit` keys with RoPE
    at their true positions, for steps that are ordinary attention; where that is all (ALL_TOKENS), `k` is not kept.

    Args:
        config: gives L, G and D.
        capacity: N, tokens. It is allocated at once and doubles when a conversation outgrows it.
        dense_limit: tokens up to which keys are also kept with RoPE.
        workspace: bytes that a step needs beside a cache of so many tokens, and that must stay free.

    Raises:
        MemoryLimitError: the device cannot hold it.
    """

    def __init__(
        self,
        config: ModelConfig,
        capacity: int,
        dense_limit: int,
        device: torch.device,
        dtype: torch.dtype,
        workspace: Callable[[int], int] = lambda _: 0,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.capacity = capacity
        self.dense_limit = dense_limit
        self.seq_len = 0
        self._config = config
        self._workspace = workspace
        self.k: list[Tensor] = []
        self.k_rotated: list[Tensor] = []
        self.v: list[Tensor] = []
        self._plan(capacity, 0).check(device)
        for tensors, tokens in self._parts(capacity):
            tensors += [self._allocate(tokens) for _ in range(config.num_layers)]

    @property
    def nbytes(self) -> int:
        return cache_bytes(self._config, self.capacity, self.dense_limit, self.dtype)

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.k, *self.k_rotated, *self.v]

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens, one layer at a time so that the peak stays low.

        The room doubles at least, as long as memory allows: a conversation grows token by token.
        """
        if capacity <= self.capacity:
            return
        doubled = max(capacity, 2 * self.capacity)
        if self._plan(doubled, self.capacity).fits(self.device):
            capacity = doubled
        self._plan(capacity, self.capacity).check(self.device)
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
        shape = (self._config.num_kv_heads, tokens, self._config.head_dim)
        return torch.empty(shape, device=self.device, dtype=self.dtype)

    def _plan(self, capacity: int, held: int) -> MemoryPlan:
        """What it takes to go from `held` tokens to `capacity`: the difference, and a layer that is there twice."""
        old, new = (cache_bytes(self._config, tokens, self.dense_limit, self.dtype) for tokens in (held, capacity))
        twice = old // self._config.num_layers
        workspace = self._workspace(capacity)
        return MemoryPlan(cache=new - old + twice, workspace=workspace, num_tokens=capacity, held_tokens=held)
