"""How much memory there is, what a run needs, and the one-line refusal before something does not fit."""

from __future__ import annotations

import dataclasses
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from minirea.errors import MemoryLimitError


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


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs of one device, in bytes, before any of it is allocated.

    Args:
        weights: of the model; 0 once they are loaded.
        loading: held besides the weights only while they are loaded.
        cache: keys and values of `num_tokens`.
        workspace: activations, logits and what kernels keep, besides weights and cache.
        num_tokens: prompt and generated tokens together.
        held_tokens: those of them whose keys and values are not in `cache`, because they have their place already.
    """

    weights: int = 0
    loading: int = 0
    cache: int = 0
    workspace: int = 0
    num_tokens: int = 0
    held_tokens: int = 0

    def times(self, count: int) -> MemoryPlan:
        """Of so many alike that share a device."""
        names = ("weights", "loading", "cache", "workspace")
        return dataclasses.replace(self, **{name: count * getattr(self, name) for name in names})

    def fits(self, device: torch.device) -> bool:
        """Whether `device` can hold it; true where the system does not say how much there is."""
        available = available_bytes(device)
        return available is None or self.peak <= available

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        return self.weights + max(self.loading, self.cache + self.workspace)

    def check(self, device: torch.device) -> None:
        """Refuse what `device` cannot hold.

        Raises:
            MemoryLimitError: with what each part needs, what is free and what to change.
        """
        if self.fits(device):
            return
        available = available_bytes(device) or 0
        parts = [
            f"{human(size)} {purpose}"
            for size, purpose in (
                (self.weights, "for weights"),
                (self.cache, "for the KV cache"),
                (self.workspace if self.cache else self.loading, "to work in"),
            )
            if size
        ]
        raise MemoryLimitError(
            f"not enough memory on {device}: needs {' and '.join(filter(None, (', '.join(parts[:-1]), parts[-1])))}, "
            f"{human(available)} is free; {self._change(available)}"
        )

    def _change(self, available: int) -> str:
        room = available - self.weights - self.workspace
        if not self.cache or room <= 0 or self.weights + self.loading > available:
            return "use a smaller `dtype`, another `device` or a smaller model"
        fit = self.held_tokens + room * (self.num_tokens - self.held_tokens) // self.cache
        return f"shorten the prompt or lower max_tokens: about {fit:,} of {self.num_tokens:,} tokens fit"


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
