"""The KV cache: per layer, keys and values of every token read so far."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from minirea.config import ModelConfig
from minirea.errors import memory_limit_of
from minirea.kernels.near import TAKEN_BACK, Near, new_near, write_near
from minirea.kernels.sketch import Sketch, new_sketch, sketch_bytes
from minirea.memory import MemoryPlan, Room, first_that_fits
from minirea.pages import advise
from minirea.pinned import host_tensor
from minirea.placement import FIRST_SKETCHED_LAYER, NEAR, Placement
from minirea.threads import delayed_keyboard_interrupt

ALL_TOKENS: Final = sys.maxsize
NO_WINNERS: Final = (0, 0, 0)
MARKS: Final = 8  # places that a cache can be rewound to with all the winners that were there


def cache_bytes(
    config: ModelConfig,
    capacity: int,
    dense_limit: int,
    dtype: torch.dtype,
    winners_shape: tuple[int, int, int] = NO_WINNERS,
    placement: Placement = NEAR,
) -> int:
    """How many bytes a KVCache of `capacity` tokens allocates, with the winners of its marks, on device and host."""
    values, keys = capacity, capacity if dense_limit < ALL_TOKENS else 0
    tokens = values + keys + min(capacity, dense_limit)
    rows, *sizes = winners_shape
    winners = config.num_layers * (rows + MARKS * (rows // 2)) * math.prod(sizes) * torch.int32.itemsize
    sketches = all_sketch_bytes(config, capacity) if placement.sketched else 0
    twice = placement.far_arrays * array_bytes(config, placement.near_size, dtype)
    brought = array_bytes(config, capacity, dtype) if placement.far_keys else 0
    keys_and_values = tokens * config.num_kv_heads * config.num_layers * config.head_dim * dtype.itemsize
    return keys_and_values + winners + sketches + twice + brought


def far_bytes(config: ModelConfig, capacity: int, dtype: torch.dtype, placement: Placement) -> int:
    """Those of `cache_bytes` that lie in the host's memory."""
    return placement.far_arrays * array_bytes(config, capacity, dtype)


def array_bytes(config: ModelConfig, num_tokens: int, dtype: torch.dtype) -> int:
    """Of one layer's keys or values of so many tokens."""
    return config.num_kv_heads * num_tokens * config.head_dim * dtype.itemsize


def all_sketch_bytes(config: ModelConfig, capacity: int) -> int:
    """Of the sketches of all layers that have one."""
    layers = max(0, config.num_layers - FIRST_SKETCHED_LAYER)
    return layers * sketch_bytes(config.num_kv_heads, config.head_dim, capacity)


def alone(measure: Callable[[], list[int]]) -> list[int]:
    """The least numbers of all ranks where there is one."""
    return measure()


class _Arrays(NamedTuple):
    """Keys and values of one layer: one tensor [2, G, N, D], or where either is far one each, [1, G, N, D]; values
    alone, [1, G, N, D], where no keys are kept.
    """

    tensors: list[Tensor]
    on_cpu: list[Tensor | None]  # the same memory, of those that are far

    @property
    def k(self) -> Tensor:
        return self.tensors[0][0]

    @property
    def v(self) -> Tensor:
        return self.tensors[-1][-1]

    @property
    def has_keys(self) -> bool:
        return sum(map(len, self.tensors)) == 2

    @property
    def rows(self) -> list[Tensor]:
        """By tokens, as steps write them: [N, Y, D] each, together Y = 2G or G."""
        return [tensor.flatten(0, 1).transpose(0, 1) for tensor in self.tensors]


class KVCache:
    """Keys and values of one conversation, [G, N, D] per layer, of which the first `seq_len` tokens are filled.

    `k` are keys without RoPE, to be placed anew in every step. `k_rotated` are the first `dense_limit` keys with RoPE
    at their true positions, for steps that are ordinary attention; where that is all (ALL_TOKENS), `k` is not kept.
    `k` and `v` of a layer share one tensor, so that one copy writes both, unless either is far: `placement` says
    which lie in the host's memory. Tensors of the device they are all the same, and `near` has the newest tokens of
    those that are far once more, in its memory: token j of the last R in row j modulo R.
    `winners` are those of the last R = `recent_size` tokens, int32 [L, R, H, K], each at its position modulo R: what
    votes with a token that is read by itself (minirea.kernels.winners_shape). -1 in the rows of tokens that are not
    there or have none.
    `sketches` are int8 copies of `k` for decode steps to read, None in layers without; those of the first
    `sketched_len` tokens are filled.

    Args:
        config: gives L, G and D.
        capacity: N, tokens. It is allocated at once and doubles when a conversation outgrows it.
        dense_limit: tokens up to which keys are also kept with RoPE.
        workspace: bytes that a step needs besides a cache of so many tokens, and that must stay free.
        winners_shape: [R, H, K] of a layer.
        placements: what a cache of so many tokens may be, best first; the first that fits is taken. Sketches, and
            anything that is far, need `k`; what is far needs a dense_limit of 0.
        least: of the numbers that each rank measures, the least of all; see Ranks.least.

    Raises:
        MemoryLimitError: neither the device nor, where something may be far, the host can hold it.
    """

    def __init__(
        self,
        config: ModelConfig,
        capacity: int,
        dense_limit: int,
        device: torch.device,
        dtype: torch.dtype,
        workspace: Callable[[int], int] = lambda _: 0,
        winners_shape: tuple[int, int, int] = NO_WINNERS,
        placements: Callable[[int], Sequence[Placement]] = lambda _: [NEAR],
        least: Callable[[Callable[[], list[int]]], list[int]] = alone,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.capacity = capacity
        self.dense_limit = dense_limit
        self._seq_len = 0
        self._near_stop = 0  # `near` holds the last near_size tokens before this one
        self.sketched_len = 0
        self._config = config
        self._workspace = workspace
        self._placements, self._least = placements, least
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        self.k_rotated: list[Tensor] = []
        self.winners_shape = winners_shape
        self.marks: dict[int, Tensor] = {}  # where pieces began: winners of the R / 2 tokens before, [L, R / 2, H, K]
        self.sketches: list[Sketch | None] = [None] * config.num_layers
        self.near: list[Near | None] = [None] * config.num_layers
        self._brought: BroughtKeys | None = None
        self._arrays: list[_Arrays] = []
        self._rows: list[list[Tensor]] = []  # of each of them
        self._k_rotated_rows: list[Tensor] = []  # [N, G, D]
        room, ((self.placement, plan),) = self._choose(0, capacity)
        plan.check(device, room)
        for layer in range(config.num_layers):
            self._arrays.append(self._allocate_layer(layer, capacity, self.placement))
            if dense_limit:
                self.k_rotated.append(self._allocate((config.num_kv_heads, self._rotated(capacity), config.head_dim)))
        self.winners = self._allocate((config.num_layers, *winners_shape), torch.int32).fill_(-1)
        self._allocate_beside(capacity, self.placement)
        self._name_views()

    @property
    def seq_len(self) -> int:
        return self._seq_len

    @seq_len.setter
    def seq_len(self, seq_len: int) -> None:
        """After a step, which has written tokens up to there, or to take some back."""
        if seq_len > self._seq_len:
            self._near_stop = max(self._near_stop, seq_len)
        self._seq_len = seq_len

    @property
    def recent_size(self) -> int:
        """Tokens whose winners are kept, R."""
        return self.winners_shape[0]

    @property
    def nbytes(self) -> int:
        sizes = self.dense_limit, self.dtype, self.winners_shape, self.placement
        return cache_bytes(self._config, self.capacity, *sizes)

    @property
    def far_nbytes(self) -> int:
        """Those of `nbytes` that lie in the host's memory."""
        return far_bytes(self._config, self.capacity, self.dtype, self.placement)

    @property
    def sketched(self) -> bool:
        return self.placement.sketched

    @property
    def sketch_nbytes(self) -> int:
        """Those of `nbytes` that are sketches'."""
        return all_sketch_bytes(self._config, self.capacity) if self.sketched else 0

    @property
    def tensors(self) -> list[Tensor]:
        """What steps read, but for sketches and `near`, which follow from it: see `filled`."""
        return [*(tensor for arrays in self._arrays for tensor in arrays.tensors), *self.k_rotated]

    def stored(self, layer: int) -> dict[str, Tensor]:
        """What a file has to keep of a layer, each [G, N, D]: all but keys that can be rotated again from others. What
        is far comes as a tensor of the CPU: synchronize first.
        """
        arrays = self._arrays[layer]
        k_cpu, v_cpu = arrays.on_cpu[0], arrays.on_cpu[-1]  # one, of neither, where they share a tensor
        keys = {"k": arrays.k if k_cpu is None else k_cpu[0]} if self.k else {"k_rotated": self.k_rotated[layer]}
        return {**keys, "v": arrays.v if v_cpu is None else v_cpu[0]}

    def filled(self, seq_len: int) -> None:
        """`tensors` have been given `seq_len` tokens by other means than steps."""
        self._seq_len, self._near_stop = seq_len, 0
        self._forget_brought()

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens, one layer at a time so that the peak stays low.

        The room doubles at least, as long as memory allows: a conversation grows token by token.
        """
        if capacity <= self.capacity:
            self._bring_near()
            return
        doubled = max(capacity, 2 * self.capacity)
        room, ((placement, plan), (of_doubled, plan_of_doubled)) = self._choose(self.capacity, capacity, doubled)
        if plan_of_doubled.fits(self.device, room) and of_doubled.far_arrays <= placement.far_arrays:
            capacity, placement, plan = doubled, of_doubled, plan_of_doubled
        plan.check(self.device, room)
        # They would keep the old tensors of all layers.
        self.k, self.v, self._rows, self._k_rotated_rows = [], [], [], []
        try:
            self._allocate_near(placement)
            # What goes to the host makes room for what stays.
            for layer in sorted(range(self._config.num_layers), key=lambda layer: -sum(self._far(layer, placement))):
                self._grow_layer(layer, capacity, placement)
            self._allocate_beside(capacity, placement)
        finally:
            self._name_views()
        self.capacity, self.placement = capacity, placement
        self._bring_near()

    def _grow_layer(self, layer: int, capacity: int, placement: Placement) -> None:
        old, filled = self._arrays[layer], self.seq_len
        self._arrays[layer] = new = self._allocate_layer(layer, capacity, placement)
        if old.has_keys:
            new.k[:, :filled] = old.k[:, :filled]
        new.v[:, :filled] = old.v[:, :filled]
        if self.dense_limit:
            old_rotated, filled = self.k_rotated[layer], min(filled, self.k_rotated[layer].shape[1])
            shape = old_rotated.shape[0], self._rotated(capacity), old_rotated.shape[2]
            self.k_rotated[layer] = self._allocate(shape)
            self.k_rotated[layer][:, :filled] = old_rotated[:, :filled]

    def write(self, layer: int, qkv_TXD: Tensor, k_rotated_TGD: Tensor | None) -> None:
        """Put this step's T tokens at [seq_len, seq_len + T). `seq_len` itself moves once all layers are done.

        `qkv_TXD` ends with keys without RoPE and values side by side, G heads each; `k_rotated_TGD` are those keys
        that lie below dense_limit, with RoPE.
        """
        start, first = self.seq_len, -sum(rows_NYD.shape[1] for rows_NYD in self._rows[layer])
        for rows_NYD in self._rows[layer]:
            stop = first + rows_NYD.shape[1]
            rows_NYD[start : start + len(qkv_TXD)] = qkv_TXD[:, first : stop or None]
            first = stop
        if k_rotated_TGD is not None:
            self._k_rotated_rows[layer][start : start + len(k_rotated_TGD)] = k_rotated_TGD
        near = self.near[layer]
        if near is not None:
            G = self._config.num_kv_heads
            write_near(near, start, *(x.transpose(0, 1) for x in (qkv_TXD[:, -2 * G : -G], qkv_TXD[:, -G:])))

    def keys_to_score(self, layer: int, stop: int) -> Tensor:
        """The layer's keys where a step of several queries can score all those before token `stop`, [G, N, D]."""
        if self._brought is None or self._arrays[layer].on_cpu[0] is None:
            return self.k[layer]
        return self._brought.take(layer, stop)

    def bring_ahead(self, layer: int) -> None:
        """Have the next keys that are far, of this layer or a later one, on their way while other layers attend."""
        if self._brought is not None:
            self._brought.begin(layer, self.seq_len)

    def _rows_of(self, start: int, stop: int) -> Tensor:
        """Where winners of the tokens [start, stop) are."""
        return torch.arange(start, stop, device=self.device) % max(1, self.recent_size)

    def _before(self, seq_len: int) -> Tensor:
        """Where those are that a rewind to seq_len needs."""
        return self._rows_of(seq_len - self.recent_size // 2, seq_len)

    def mark(self) -> None:
        """A piece begins here, which writes over recent winners, if any are kept: keep those for a rewind, as the last
        of MARKS.
        """
        self.marks.pop(self.seq_len, None)
        self.marks[self.seq_len] = self.winners[:, self._before(self.seq_len)]
        while len(self.marks) > MARKS:
            del self.marks[next(iter(self.marks))]

    def begin_before(self, seq_len: int) -> int:
        """Where to rewind to so that the next piece finds what it would have found had it been the first there.

        That is seq_len, or the token before it if that one was read with a piece that began with it.
        """
        return seq_len - 1 if seq_len not in self.marks and seq_len - 1 in self.marks else seq_len

    def rewind(self, seq_len: int, begun: int = 0) -> None:
        """Forget every token from `seq_len` on; steps that did not end may have left winners of those before `begun`.

        The winners that vote with the next token come back where a piece has begun, at the last MARKS such places, or
        where no more than recent_size / 2 tokens are forgotten. Elsewhere fewer vote, as where a context begins.
        """
        if not 0 <= seq_len <= self.seq_len:
            raise ValueError(f"cannot rewind to {seq_len}: the cache holds {self.seq_len} tokens")
        forgotten = max(self.seq_len, begun) - seq_len
        with delayed_keyboard_interrupt():
            self.seq_len = seq_len
            self.marks = {place: mark for place, mark in self.marks.items() if place <= seq_len}
            if self.recent_size and forgotten:
                stop = seq_len + min(forgotten, self.recent_size)
                with torch.inference_mode():  # in which the cache may have been made
                    self.winners.index_fill_(1, self._rows_of(seq_len, stop), -1)
                    if seq_len in self.marks:
                        self.winners[:, self._before(seq_len)] = self.marks[seq_len]
            self.sketched_len = min(self.sketched_len, seq_len)
            self._forget_brought()

    def _forget_brought(self) -> None:
        if self._brought is not None:
            self._brought.forget()

    def _bring_near(self) -> None:
        """Before a step: `near` holds what it will read, also where tokens were taken back or came by other means."""
        stop = self._seq_len
        if 0 <= self._near_stop - stop <= TAKEN_BACK:
            return
        with torch.inference_mode():  # in which the rows may have been made
            for near, arrays in zip(self.near, self._arrays, strict=True):
                if near is not None:
                    size = min(rows_GRD.shape[1] for rows_GRD in near if rows_GRD is not None)
                    tokens = slice(max(0, stop - size), stop)
                    write_near(near, tokens.start, arrays.k[:, tokens], arrays.v[:, tokens])
        self._near_stop = stop

    def _rotated(self, capacity: int) -> int:
        """Tokens whose keys are kept with RoPE."""
        return min(capacity, self.dense_limit)

    def _name_views(self) -> None:
        self.k = [arrays.k for arrays in self._arrays if arrays.has_keys]
        self.v = [arrays.v for arrays in self._arrays]
        self._rows = [arrays.rows for arrays in self._arrays]
        self._k_rotated_rows = [k.transpose(0, 1) for k in self.k_rotated]

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        try:
            tensor = torch.empty(shape, device=self.device, dtype=dtype or self.dtype)
        except RuntimeError as error:
            raise memory_limit_of(error) or error from None
        return advise(tensor) if tensor.is_cpu else tensor

    def _allocate_layer(self, layer: int, capacity: int, placement: Placement) -> _Arrays:
        """Keys and values of a layer. Those that are far lie token by token, [N, G, D]: the heads of a span that is
        read there have addresses side by side, of which a GPU looks few up at a time.
        """
        G, N, D = shape = self._config.num_kv_heads, capacity, self._config.head_dim
        far = self._far(layer, placement)
        if not any(far):
            kinds = 2 if self.dense_limit < ALL_TOKENS else 1
            return _Arrays([self._allocate((kinds, *shape))], [None])
        arrays = _Arrays([], [])
        for is_far in far:
            if is_far:
                host = host_tensor((1, N, G, D), self.dtype, self.device)
                arrays.tensors.append(host.on_device.transpose(1, 2))
                arrays.on_cpu.append(host.on_cpu.transpose(1, 2))
            else:
                arrays.tensors.append(self._allocate((1, *shape)))
                arrays.on_cpu.append(None)
        return arrays

    def _allocate_near(self, placement: Placement) -> None:
        """Rows for the newest tokens of what is far."""
        sizes = self._config.num_kv_heads, placement.near_size, self._config.head_dim, self.dtype, self.device
        for layer, near in enumerate(self.near):
            far, rows = self._far(layer, placement), near or Near(None, None)
            new = [
                (new_near(*sizes) if old is None else old) if is_far else None
                for is_far, old in zip(far, rows, strict=True)
            ]
            self.near[layer] = Near(*new) if any(far) else None
        self._near_stop = 0

    def _allocate_beside(self, capacity: int, placement: Placement) -> None:
        """Sketches, which keep what they have been made of, near rows, and room for keys that are brought."""
        self._allocate_near(placement)
        first = FIRST_SKETCHED_LAYER if placement.sketched else len(self.sketches)
        for layer, sketch in enumerate(self.sketches):
            self.sketches[layer] = grown = self._allocate_sketch(capacity) if layer >= first else None
            if sketch is not None and grown is not None:
                for new, old in zip(grown[:2], sketch[:2], strict=True):
                    new[:, : self.sketched_len] = old[:, : self.sketched_len]
                grown.mean.copy_(sketch.mean)
        if not placement.sketched:
            self.sketched_len = 0
        self._brought = None
        if placement.far_keys:
            rows_NGD = self._allocate((capacity, self._config.num_kv_heads, self._config.head_dim))
            self._brought = BroughtKeys([arrays.on_cpu[0] for arrays in self._arrays], rows_NGD)

    def _allocate_sketch(self, capacity: int) -> Sketch:
        try:
            return new_sketch(self._config.num_kv_heads, self._config.head_dim, capacity, self.device)
        except RuntimeError as error:
            raise memory_limit_of(error) or error from None

    def _far(self, layer: int, placement: Placement) -> tuple[bool, bool]:
        """Whether the keys and the values of a layer are far."""
        num_layers = self._config.num_layers
        return placement.keys_are_far(layer, num_layers), placement.values_are_far(layer, num_layers)

    def _choose(self, held: int, *capacities: int) -> tuple[Room, list[tuple[Placement, MemoryPlan]]]:
        """The room that there is, and for each of these capacities of a cache that has `held` the first placement that
        fits, or the one that comes closest. The same on all ranks: by the least room, and the most to work in.
        """
        workspaces, chosen = [self._workspace(capacity) for capacity in capacities], []
        device, host, *negated = self._least(lambda: [*Room.of(self.device), *(-size for size in workspaces)])
        room = Room(device, host)
        for capacity, size in zip(capacities, negated, strict=True):
            placements = self._placements(capacity)
            plans = [self._plan(capacity, held, placement, -size) for placement in placements]
            index = first_that_fits(plans, self.device, room)
            chosen.append((placements[index], plans[index]))
        return room, chosen

    def _plan(self, capacity: int, held: int, placement: Placement, workspace: int) -> MemoryPlan:
        """What it takes to go from `held` tokens to `capacity`: the difference, and a layer that is there twice."""
        sizes = self.dense_limit, self.dtype, self.winners_shape
        new = cache_bytes(self._config, capacity, *sizes, placement)
        far = far_bytes(self._config, capacity, self.dtype, placement)
        old, old_far = (self.nbytes, self.far_nbytes) if held else (0, 0)
        twice = 0 if placement.far_arrays else old // self._config.num_layers
        if held and placement.far_arrays:
            twice = 2 * array_bytes(self._config, held, self.dtype)
        plan = MemoryPlan(
            cache=new - far - (old - old_far) + twice,
            workspace=workspace,
            num_tokens=capacity,
            held_tokens=held,
            host_cache=far - old_far + (twice if far else 0),
            ranks=self._config.ranks,
        )
        return plan.together() if self.device.type == "cpu" else plan


class BroughtKeys:
    """Room on the device for one layer's keys at a time of those that are far: the chunks of a prompt score them all.

    The next layer's keys come while the layers before it attend, on a stream of their own, if these leave the room
    free; the step's own keys, which are written last, follow when they are scored.
    """

    def __init__(self, on_cpu: list[Tensor | None], rows_NGD: Tensor) -> None:
        """`on_cpu` are the layers' keys [1, G, N, D] that are far, None for others."""
        self._on_cpu, self._rows_NGD = on_cpu, rows_NGD
        self._stream = torch.cuda.Stream(rows_NGD.device) if rows_NGD.is_cuda else None
        if self._stream is not None:
            rows_NGD.record_stream(self._stream)  # freed, it is not used again before what is on its way has come
        self._layer, self._stop = -1, 0  # whose keys are there or on their way, and how many; none below 0

    def forget(self) -> None:
        """What is there, or on its way, is of no use to a later step, whose tokens are others."""
        self._layer = -1

    def begin(self, layer: int, stop: int) -> None:
        """Bring the first `stop` keys of the first of these layers from `layer` on, unless they are on their way."""
        layers = (index for index in range(layer, len(self._on_cpu)) if self._on_cpu[index] is not None)
        found = next(layers, -1)
        if found < 0 or (self._layer, self._stop) == (found, stop):
            return
        self._layer, self._stop = found, stop
        if self._stream is None:
            self._copy(found, 0, stop)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._rows_NGD.device))  # which still reads the room
        with torch.cuda.stream(self._stream):
            self._copy(found, 0, stop)

    def take(self, layer: int, stop: int) -> Tensor:
        """The first `stop` keys of a layer, [G, N, D], for the current stream."""
        if self._layer != layer or self._stop > stop:
            self.begin(layer, stop)
        if self._stream is not None:
            torch.cuda.current_stream(self._rows_NGD.device).wait_stream(self._stream)
        self._copy(layer, self._stop, stop)
        self._layer = -1  # a later step writes more of them
        return self._rows_NGD.transpose(0, 1)

    def _copy(self, layer: int, start: int, stop: int) -> None:
        source_GND = self._on_cpu[layer]
        assert source_GND is not None
        self._rows_NGD[start:stop].copy_(source_GND[0].transpose(0, 1)[start:stop], non_blocking=True)
