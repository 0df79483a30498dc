"""How much memory there is, what a run needs, and the one-line refusal before something does not fit."""

from __future__ import annotations

import dataclasses
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import torch

from minirea.errors import MemoryLimitError

# Of the host's memory: what is left to the system and the process, besides a cache that is pinned there.
HOST_RESERVED: Final = 2 * 2**30
HOST: Final = torch.device("cpu")
UNKNOWN: Final = sys.maxsize


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on `device`; None where the system does not say."""
    if device.type == "cuda":
        reserved_unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved_unused
    found = _meminfo_available(), _cgroup_available(), _address_space_available()
    limits = [value for value in found if value is not None]
    return min(limits, default=None)


def peak_bytes(device: torch.device) -> int:
    """The most memory held so far: of the process on a CPU, of torch's allocations on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Room(NamedTuple):
    """Bytes that can still be allocated on a device, and pinned on its host; UNKNOWN where the system does not say."""

    device: int
    host: int

    @classmethod
    def of(cls, device: torch.device) -> Room:
        return cls(*(UNKNOWN if free is None else free for free in (available_bytes(device), _available_to_pin())))


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs of one device, in bytes, before any of it is allocated.

    Methods take the room that there is, where the caller knows it, for several ranks the least of all their devices;
    else they ask.

    Args:
        weights: of the model; 0 once they are loaded.
        loading: held besides the weights only while they are loaded.
        cache: keys and values of `num_tokens`.
        workspace: activations, logits and what kernels keep, besides weights and cache.
        num_tokens: prompt and generated tokens together.
        held_tokens: those of them whose keys and values are not in `cache`, because they have their place already.
        host_cache: keys and values in the host's memory instead, besides `cache`.
        ranks: that have a plan like this each, for devices of one host.
    """

    weights: int = 0
    loading: int = 0
    cache: int = 0
    workspace: int = 0
    num_tokens: int = 0
    held_tokens: int = 0
    host_cache: int = 0
    ranks: int = 1

    def together(self) -> MemoryPlan:
        """Of all ranks, where they share a device."""
        names = ("weights", "loading", "cache", "workspace", "host_cache")
        return dataclasses.replace(self, **{name: self.ranks * getattr(self, name) for name in names}, ranks=1)

    def fits(self, device: torch.device, room: Room | None = None) -> bool:
        """Whether `device`, and its host, can hold it; true where the system does not say how much it has."""
        room = room or Room.of(device)
        return self.peak <= room.device and (self.host_cache <= 0 or self.ranks * self.host_cache <= room.host)

    def tokens_that_fit(self, device: torch.device, room: Room | None = None) -> int:
        """About how many of `num_tokens` fit; 0 where even none would."""
        room = room or Room.of(device)
        left = room.device - self.weights - self.workspace
        if left <= 0 or self.weights + self.loading > room.device:
            return 0
        new = self.num_tokens - self.held_tokens
        fit = [left * new // self.cache] if self.cache > 0 else []
        fit += [room.host * new // (self.ranks * self.host_cache)] if self.host_cache > 0 else []
        return self.held_tokens + min(new, *fit)

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        return self.weights + max(self.loading, self.cache + self.workspace)

    def check(self, device: torch.device, room: Room | None = None) -> None:
        """Refuse what `device` cannot hold.

        Raises:
            MemoryLimitError: with what each part needs, what is free and what to change.
        """
        room = room or Room.of(device)
        if self.fits(device, room):
            return
        change = self._change(device, room)
        if self.peak <= room.device:
            part = f"{human(self.ranks * self.host_cache)} for the part of the KV cache there"
            part += f", of {self.ranks} devices together" if self.ranks > 1 else ""
            raise MemoryLimitError(
                f"not enough memory on the host: needs {part}, {human(room.host)} can be pinned; {change}"
            )
        beside = f" beside {human(self.host_cache)} on the host" if self.host_cache > 0 else ""
        parts = [
            f"{human(size)} {purpose}"
            for size, purpose in (
                (self.weights, "for weights"),
                (self.cache, "for the KV cache" + beside),
                (self.workspace if self.cache else self.loading, "to work in"),
            )
            if size
        ]
        where = device if self.ranks == 1 else f"each of {self.ranks} devices"
        raise MemoryLimitError(
            f"not enough memory on {where}: needs {' and '.join(filter(None, (', '.join(parts[:-1]), parts[-1])))}, "
            f"{human(room.device)} is free; {change}"
        )

    def _change(self, device: torch.device, room: Room) -> str:
        fit = self.tokens_that_fit(device, room) if self.cache else 0
        if fit:
            return f"shorten the prompt or lower max_tokens: about {fit:,} of {self.num_tokens:,} tokens fit"
        # So large a workspace grows with its cache.
        if min(self.cache, self.workspace) > room.device - self.weights > 0:
            return "shorten the prompt or lower max_tokens"
        return "use a smaller `dtype`, another `device` or a smaller model"


def first_that_fits(plans: Sequence[MemoryPlan], device: torch.device, room: Room | None = None) -> int:
    """Which of several plans to take, best first: if none fits, the one that comes closest."""
    room = room or Room.of(device)
    for index, plan in enumerate(plans):
        if plan.fits(device, room):
            return index
    return max(range(len(plans)), key=lambda index: plans[index].tokens_that_fit(device, room))


def _available_to_pin() -> int | None:
    available = available_bytes(HOST)
    return None if available is None else max(0, available - HOST_RESERVED)


def human(size: float) -> str:
    """A size in bytes, as text: 1.50 GB."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _address_space_available() -> int | None:
    """What `ulimit -v` leaves to this process."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return None
    return max(0, limit - pages * resource.getpagesize())


def _cgroup_available() -> int | None:
    """A container's own limit (cgroup v2), which /proc/meminfo does not show. Page cache in it can be reclaimed."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = int((root / "memory.max").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return limit - int((root / "memory.current").read_text()) + int(stat["file"])
    except (OSError, ValueError, KeyError):
        return None
