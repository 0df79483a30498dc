"""The KV cache: per layer, keys and values of every token read so far."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from minirea.config import ModelConfig
from minirea.errors import memory_limit_of
from minirea.kernels.sketch import Sketch, new_sketch, sketch_bytes
from minirea.memory import MemoryPlan

ALL_TOKENS: Final = sys.maxsize
MARKS: Final = 8  # places that a cache can be rewound to with all the queries that were there
# A key of the first layer follows from its token alone. A text repeats its tokens, so that hundreds of keys are equal
# to a winner there, and a sketch cannot tell them apart.
FIRST_SKETCHED_LAYER: Final = 1


def cache_bytes(
    config: ModelConfig,
    capacity: int,
    dense_limit: int,
    dtype: torch.dtype,
    recent_size: int = 0,
    sketched: bool = False,
) -> int:
    """How many bytes a KVCache of `capacity` tokens allocates, with the queries of its marks."""
    values, keys = capacity, capacity if dense_limit < ALL_TOKENS else 0
    tokens = values + keys + min(capacity, dense_limit)
    recent = recent_size + MARKS * (recent_size // 2)
    heads = tokens * config.num_kv_heads + recent * config.num_heads
    sketches = all_sketch_bytes(config, capacity) if sketched else 0
    return heads * config.num_layers * config.head_dim * dtype.itemsize + sketches


def all_sketch_bytes(config: ModelConfig, capacity: int) -> int:
    """Of the sketches of all layers that have one."""
    layers = max(0, config.num_layers - FIRST_SKETCHED_LAYER)
    return layers * sketch_bytes(config.num_kv_heads, config.head_dim, capacity)


class KVCache:
    """Keys and values of one conversation, [G, N, D] per layer, of which the first `seq_len` tokens are filled.

    `k` are keys without RoPE, to be placed anew in every step. `k_rotated` are the first `dense_limit` keys with RoPE
    at their true positions, for steps that are ordinary attention; where that is all (ALL_TOKENS), `k` is not kept.
    `k` and `v` of a layer share one tensor, so that one copy writes both.
    `q_recent` are the last R = `recent_size` queries without RoPE, [L, R, H, D], each at its position modulo R: those
    that a token which is read by itself votes together with.
    `sketches` are int8 copies of `k` for decode steps to look at, None in layers without; those of the first
    `sketched_len` tokens are filled.

    Args:
        config: gives L, G and D.
        capacity: N, tokens. It is allocated at once and doubles when a conversation outgrows it.
        dense_limit: tokens up to which keys are also kept with RoPE.
        workspace: bytes that a step needs besides a cache of so many tokens, and that must stay free.
        recent_size: queries that are kept, see `recent`.
        sketched: whether there are sketches; `k` must be kept.

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
        recent_size: int = 0,
        sketched: bool = False,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.capacity = capacity
        self.dense_limit = dense_limit
        self.seq_len = 0
        self.sketched_len = 0
        self.sketched = sketched
        self._config = config
        self._workspace = workspace
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        self.k_rotated: list[Tensor] = []
        self.recent_size = recent_size
        self._recent = [(0, 0)] * config.num_layers  # of which tokens q_recent was written: first, last + 1
        # Queries of up to R / 2 tokens before a place, [L, C, H, D], and the first of these tokens, by places.
        self.marks: dict[int, tuple[int, Tensor]] = {}
        self.sketches: list[Sketch | None] = [None] * config.num_layers
        self._kv: list[Tensor] = []  # k and v of each layer, [2, G, N, D], or [1, G, N, D] where k is not kept
        self._kv_rows: list[Tensor] = []  # the same by tokens, as steps write them: [N, Y, D], Y = 2G or G
        self._k_rotated_rows: list[Tensor] = []  # [N, G, D]
        self._plan(capacity, 0).check(device)
        for tensors, shape in self._parts(capacity):
            tensors += [self._allocate(shape) for _ in range(config.num_layers)]
        self.q_recent = self._allocate((config.num_layers, recent_size, config.num_heads, config.head_dim))
        if sketched:
            for layer in range(FIRST_SKETCHED_LAYER, config.num_layers):
                self.sketches[layer] = self._allocate_sketch(capacity)
        self._name_views()

    @property
    def nbytes(self) -> int:
        return cache_bytes(self._config, self.capacity, self.dense_limit, self.dtype, self.recent_size, self.sketched)

    @property
    def sketch_nbytes(self) -> int:
        """Those of `nbytes` that are sketches'."""
        return all_sketch_bytes(self._config, self.capacity) if self.sketched else 0

    @property
    def tensors(self) -> list[Tensor]:
        """What steps read, but for sketches, which follow from it."""
        return [*self._kv, *self.k_rotated]

    def stored(self, layer: int) -> dict[str, Tensor]:
        """What a file has to keep of a layer, each [G, N, D]: all but keys that can be rotated again from others."""
        keys = {"k": self.k[layer]} if self.k else {"k_rotated": self.k_rotated[layer]}
        return {**keys, "v": self.v[layer]}

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
        # They would keep the old tensors of all layers.
        self.k, self.v, self._kv_rows, self._k_rotated_rows = [], [], [], []
        try:
            for tensors, shape in self._parts(capacity):
                for layer, old in enumerate(tensors):
                    filled = min(self.seq_len, old.shape[-2])
                    tensors[layer] = self._allocate(shape)
                    tensors[layer][..., :filled, :] = old[..., :filled, :]
            for layer, sketch in enumerate(self.sketches):
                if sketch is not None:
                    self.sketches[layer] = grown = self._allocate_sketch(capacity)
                    for new, old in zip(grown[:2], sketch[:2], strict=True):
                        new[:, : self.seq_len] = old[:, : self.seq_len]
                    grown.mean.copy_(sketch.mean)
        finally:
            self._name_views()
        self.capacity = capacity

    def write(self, layer: int, qkv_TXD: Tensor, k_rotated_TGD: Tensor | None) -> None:
        """Put this step's T tokens at [seq_len, seq_len + T). `seq_len` itself moves once all layers are done.

        `qkv_TXD` ends with keys without RoPE and values side by side, G heads each; `k_rotated_TGD` are those keys
        that lie below dense_limit, with RoPE.
        """
        start, kv_NYD = self.seq_len, self._kv_rows[layer]
        kv_NYD[start : start + len(qkv_TXD)] = qkv_TXD[:, -kv_NYD.shape[1] :]
        if k_rotated_TGD is not None:
            self._k_rotated_rows[layer][start : start + len(k_rotated_TGD)] = k_rotated_TGD

    def remember(self, layer: int, q_THD: Tensor) -> None:
        """Keep this step's queries, those of the tokens at [seq_len, seq_len + T), for `recent` of later steps."""
        stop, kept_CHD = self.seq_len + len(q_THD), q_THD[-self.recent_size :]
        self.q_recent[layer, self._recent_rows(stop - len(kept_CHD), stop)] = kept_CHD
        self._recent[layer] = self._first_recent(layer), stop

    def remember_at(self, layer: int, q_THD: Tensor, seq_len: Tensor) -> None:
        """`remember` for tokens before `seq_len`, int32 [1], which the device counts; see `expect_recent`."""
        kept_CHD = q_THD[-self.recent_size :]
        self.q_recent[layer].index_copy_(0, self.recent_rows_at(seq_len, len(kept_CHD)), kept_CHD)

    def expect_recent(self, num_tokens: int) -> None:
        """A step is about to write the queries of so many tokens behind seq_len by itself."""
        self._recent = [(self._first_recent(layer), self.seq_len + num_tokens) for layer in range(len(self._recent))]

    def recent_rows_at(self, seq_len: Tensor, count: int) -> Tensor:
        """Where q_recent holds the queries of the last `count` tokens before `seq_len`, int64 [count]."""
        return (seq_len.long() + torch.arange(-count, 0, device=self.device)) % self.recent_size

    def recent(self, layer: int, count: int) -> Tensor:
        """The queries of up to `count` tokens before seq_len, as far as they are kept, [C, H, D]."""
        first = max(self._first_recent(layer), self.seq_len - count)
        return self.q_recent[layer, self._recent_rows(first, self.seq_len)]

    @property
    def recent_from(self) -> int:
        """The first token from which on all queries are kept: seq_len if there are none."""
        return self._first_recent(0)

    @recent_from.setter
    def recent_from(self, token: int) -> None:
        self._recent = [(token, self.seq_len)] * len(self._recent)

    def _recent_rows(self, start: int, stop: int) -> Tensor:
        """Where q_recent holds the queries of the tokens [start, stop)."""
        return torch.arange(start, stop, device=self.device) % self.recent_size

    def _first_recent(self, layer: int) -> int:
        """The first token from which on all queries up to seq_len are kept: seq_len if there are none."""
        first, stop = self._recent[layer]
        if self.seq_len > stop:  # its last tokens came otherwise
            return self.seq_len
        return min(self.seq_len, max(first, stop - self.recent_size))

    def mark(self) -> None:
        """A piece begins here, which writes over recent queries: keep them for a rewind, as the last of MARKS."""
        if not self.recent_size:
            return
        first = max(self._first_recent(0), self.seq_len - self.recent_size // 2)
        self.marks.pop(self.seq_len, None)
        self.marks[self.seq_len] = first, self.q_recent[:, self._recent_rows(first, self.seq_len)]
        while len(self.marks) > MARKS:
            del self.marks[next(iter(self.marks))]

    def begin_before(self, seq_len: int) -> int:
        """Where to rewind to so that the next piece finds what it would have found had it been the first there.

        That is seq_len, or the token before it if that one was read with a piece that began with it.
        """
        return seq_len - 1 if seq_len not in self.marks and seq_len - 1 in self.marks else seq_len

    def rewind(self, seq_len: int) -> None:
        """Forget every token from `seq_len` on.

        The queries that vote with the next token come back where a piece has begun, at the last MARKS such places, or
        where no more than recent_size / 2 tokens are forgotten. Elsewhere fewer vote, as where a context begins.
        """
        if not 0 <= seq_len <= self.seq_len:
            raise ValueError(f"cannot rewind to {seq_len}: the cache holds {self.seq_len} tokens")
        self.seq_len = seq_len
        self.marks = {place: mark for place, mark in self.marks.items() if place <= seq_len}
        if seq_len in self.marks and self.marks[seq_len][0] < self._first_recent(0):
            first, q_LCHD = self.marks[seq_len]
            with torch.inference_mode():  # in which the cache may have been made
                self.q_recent[:, self._recent_rows(first, seq_len)] = q_LCHD
            self._recent = [(first, seq_len)] * len(self._recent)
        self.sketched_len = min(self.sketched_len, seq_len)

    def _parts(self, capacity: int) -> list[tuple[list[Tensor], tuple[int, ...]]]:
        """Each kind of tensor that is kept, with its shape at `capacity`."""
        G, D = self._config.num_kv_heads, self._config.head_dim
        kinds = 2 if self.dense_limit < ALL_TOKENS else 1
        parts: list[tuple[list[Tensor], tuple[int, ...]]] = [(self._kv, (kinds, G, capacity, D))]
        if self.dense_limit:
            parts.append((self.k_rotated, (G, min(capacity, self.dense_limit), D)))
        return parts

    def _name_views(self) -> None:
        self.k = [kv[0] for kv in self._kv if len(kv) == 2]
        self.v = [kv[-1] for kv in self._kv]
        self._kv_rows = [kv.flatten(0, 1).transpose(0, 1) for kv in self._kv]
        self._k_rotated_rows = [k.transpose(0, 1) for k in self.k_rotated]

    def _allocate(self, shape: tuple[int, ...]) -> Tensor:
        try:
            return torch.empty(shape, device=self.device, dtype=self.dtype)
        except RuntimeError as error:
            raise memory_limit_of(error) or error from None

    def _allocate_sketch(self, capacity: int) -> Sketch:
        try:
            return new_sketch(self._config.num_kv_heads, self._config.head_dim, capacity, self.device)
        except RuntimeError as error:
            raise memory_limit_of(error) or error from None

    def _plan(self, capacity: int, held: int) -> MemoryPlan:
        """What it takes to go from `held` tokens to `capacity`: the difference, and a layer that is there twice."""
        sizes = (self.dense_limit, self.dtype, self.recent_size, self.sketched)
        old, new = (cache_bytes(self._config, tokens, *sizes) if tokens else 0 for tokens in (held, capacity))
        twice = old // self._config.num_layers
        workspace = self._workspace(capacity)
        return MemoryPlan(cache=new - old + twice, workspace=workspace, num_tokens=capacity, held_tokens=held)
