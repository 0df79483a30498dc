"""One model on several devices of one machine: tensor parallel by key/value head, over torch.distributed.

A *rank* is a process with one device, or on a CPU with a share of its cores. It holds its key/value heads with their
query heads and their cache, its features of the MLP, its rows of the head, and the whole embedding. In each layer three
things cross between ranks: the winners of all query heads, before the layer's one vote, and two sums into the residual
stream, after attention and after the MLP. In each step the logits do, and the sampled token.

The program runs in rank 0, the leader. The others follow: minirea.leader tells them what to do, step by step, and
minirea.follower does it. Between two steps the leader may stop, take another cache, or end. Here is what crosses inside
a step, and how torchrun numbers its processes.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from minirea.config import ModelConfig, Part
from minirea.errors import InputError, MinireaWarning, RankError
from minirea.kernels import peer_kernels
from minirea.sampling import Sampler

# An idle rank waits for the next step inside no collective, but a stopped process may keep the others there.
_FOREVER: Final = datetime.timedelta(days=365)
# Of a rank in a launch that exchanges them through a room; more go through a collective.
MOST_WINNERS: Final = 1024
ADDRESS: Final = "leader"  # under which the leader says in the store where to call it


# Its name before torch 2.13, where it is deprecated.
_gather: Final = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class LostRankError(RankError):
    """A collective failed, as it does where another rank has ended; the leader's error says which."""


class Ranks:
    """All ranks of a model, seen from one of them. Every rank makes the same calls in the same order.

    Args:
        rank: this one.
        size: how many there are.
        device: of this rank.
        store: where they meet.
    """

    def __init__(self, rank: int, size: int, device: torch.device, store: Any) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.flags: list[Tensor] = []  # for which other ranks' kernels may wait
        backend = "nccl" if device.type == "cuda" else "gloo"
        where: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
        with _over_loopback():
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=_FOREVER, group_name="minirea", **where
            )

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, bit for bit the same on all; x is overwritten with it."""
        with self._exchange():
            dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """The rows of all ranks [size * M, ...], those of rank 0 first, from each one's [M, ...]."""
        out = x.new_empty(self.size * len(x), *x.shape[1:])
        with self._exchange():
            _gather(out, x.contiguous())
        return out

    def first(self, x: Tensor) -> Tensor:
        """Rank 0's x, which overwrites that of the others."""
        with self._exchange():
            dist.broadcast(x, 0)
        return x

    def least(self, measure: Callable[[], list[int]]) -> list[int]:
        """What `measure` returns on each rank, the least of each number. None measures before all have come here, or
        goes on before all have measured.
        """
        with self._exchange():  # a rank that fails here leaves the others waiting
            self.all_reduce(torch.zeros(1, dtype=torch.float32, device=self.device)).item()
            numbers = torch.tensor(measure(), dtype=torch.int64, device=self.device)
            dist.all_reduce(numbers, dist.ReduceOp.MIN)
            found: list[int] = numbers.tolist()
            return found

    def meet(self) -> None:
        """Nothing that a rank is given after this begins before all ranks have done what they were given before it."""
        self.all_reduce(torch.zeros(1, dtype=torch.float32, device=self.device))

    def open_peers(self, config: ModelConfig) -> Peers | None:
        """Rooms for the decode steps of a model; None where there are none, and what is small goes like the large.

        Every rank calls it, and all get rooms or none does.
        """
        if self.device.type != "cuda":
            return None
        devices = range(torch.cuda.device_count())
        reached = all(
            torch.cuda.can_device_access_peer(a, b)
            for a in devices[: self.size]
            for b in devices[: self.size]
            if a != b
        )
        if not reached:
            about = "these GPUs do not reach each other's memory (no NVLink, or no peer access over PCIe)"
            warnings.warn(f"{about}: their sums go through NCCL, which takes longer", MinireaWarning, stacklevel=3)
        opened = torch.zeros(1, dtype=torch.float32, device=self.device)
        peers = None
        with contextlib.suppress(Exception):
            if reached:
                peers = Peers.open(self, config)
                opened += 1
        return peers if int(self.all_reduce(opened)) == self.size else None

    def gather_logits(self, logits_TV: Tensor, part: Part) -> Tensor:
        """The logits of the whole vocabulary, [T, V], from each rank's rows of the head."""
        T, each = len(logits_TV), part.logits_each
        padded = F.pad(logits_TV, (0, each - logits_TV.shape[1]))
        gathered = self.all_gather(padded).view(self.size, T, each)
        return gathered.transpose(0, 1).reshape(T, -1)[:, : part.whole.vocab_size]

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise LostRankError(f"rank {self.rank} lost contact with another: {error}") from None


class Peers(NamedTuple):
    """Rooms of one model in memory that all its ranks reach; see minirea.kernels.steps.peers."""

    sums: Any
    winners: Any
    logits: Any
    handle: Any  # of the memory, which lives as long

    @classmethod
    def open(cls, ranks: Ranks, config: ModelConfig) -> Peers:
        """Every rank calls it. Raises whatever torch raises where it has no such memory for these devices."""
        import torch.distributed._symmetric_memory as symmetric

        kernels, part = peer_kernels(), config.part
        assert part is not None
        numbers = {
            "sums": 2 * config.hidden_size,
            "winners": 2 * ranks.size * MOST_WINNERS,
            "logits": 2 * ranks.size * part.logits_each,
        }
        each = kernels.MAX_PROGRAMS * ranks.size  # flags of a room
        total = sum(numbers.values()) + len(numbers) * each
        memory = symmetric.empty(total, dtype=torch.int32, device=ranks.device)
        world = dist.group.WORLD
        assert world is not None
        handle = symmetric.rendezvous(memory, world)
        memory.zero_()
        bases = [handle.get_buffer(rank, (total,), torch.int32).data_ptr() for rank in range(ranks.size)]

        def addresses(first: int) -> Tensor:
            return torch.tensor([base + 4 * first for base in bases], dtype=torch.int64, device=ranks.device)

        rooms, first = {}, 0
        for name, count in numbers.items():
            flags = first + count
            turns = torch.zeros(kernels.MAX_PROGRAMS, dtype=torch.int32, device=ranks.device)
            own = memory[first:flags]
            rooms[name] = kernels.Room(own, addresses(first), addresses(flags), turns, ranks.rank)
            ranks.flags.append(memory[flags : flags + each])
            first = flags + each
        return cls(**rooms, handle=handle)

    def gather_winners(self, x: Tensor, otherwise: Callable[[Tensor], Tensor]) -> Tensor:
        """The winners of all ranks: through the room if they are few, as in a decode step."""
        if x.dtype != torch.int32 or x.numel() > MOST_WINNERS:
            return otherwise(x)
        gathered: Tensor = peer_kernels().gather(x, self.winners)
        return gathered


class SharedSampler:
    """The sampler of a generation on several ranks: rank 0 draws, and all take its token.

    Where simply the best token is taken, each rank could take it by itself, since all have the same logits to the bit.
    """

    here: Ranks  # of a follower

    def __init__(self, sampler: Sampler | None, takes_best: bool, ranks: Ranks | None = None) -> None:
        self._sampler = sampler
        self._ranks = ranks or SharedSampler.here
        self.takes_best = takes_best
        self.generator: Any = sampler.generator if sampler else None

    def __call__(self, logits_V: Tensor) -> Tensor:
        """The next token, int64 [1]."""
        if self._sampler is None:
            token = torch.empty(1, dtype=torch.int64, device=logits_V.device)
        else:
            token = self._sampler(logits_V)
        return self._ranks.first(token)

    def __reduce__(self) -> Any:
        """Followers get one that draws nothing."""
        return SharedSampler, (None, self.takes_best)


class Launched(NamedTuple):
    """This process as torchrun has numbered it."""

    rank: int
    size: int

    @classmethod
    def here(cls) -> Launched | None:
        """None where torchrun has not started this process.

        Raises:
            InputError: its ranks are on several machines.
        """
        values = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")]
        if not all(value.isdecimal() for value in values) or "MASTER_ADDR" not in os.environ:
            return None
        rank, size, local_size = map(int, values)
        if local_size != size:
            raise InputError(f"torchrun has {size} ranks, {local_size} of them here, expected all on one machine")
        return cls(rank, size)

    def check(self, gpus: int) -> None:
        """Raises InputError where torchrun has started another number of processes."""
        if gpus != self.size:
            raise InputError(f"gpus is {gpus}, but torchrun has started {self.size} processes, expected as many")

    def store(self) -> Any:
        """Where the ranks meet: a part of the launcher's own store."""
        distributed: Any = dist  # what it does not list is documented all the same
        store, _, _ = next(distributed.rendezvous("env://", self.rank, self.size, timeout=_FOREVER))
        return distributed.PrefixStore("minirea", store)


def follows(gpus: int) -> bool:
    """Whether this process is to follow another one: one of torchrun's, not the first.

    Raises:
        InputError: see Launched.
    """
    launched = Launched.here() if gpus > 1 else None
    if launched is not None:
        launched.check(gpus)
    return launched is not None and launched.rank > 0


@contextlib.contextmanager
def _over_loopback() -> Iterator[None]:
    """Within it gloo, which looks at this variable, does not go by what the machine's name resolves to."""
    name = "GLOO_SOCKET_IFNAME"
    if name in os.environ or not os.path.exists("/sys/class/net/lo"):
        yield
        return
    os.environ[name] = "lo"
    try:
        yield
    finally:
        del os.environ[name]
