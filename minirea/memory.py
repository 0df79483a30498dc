"""How much memory there is, and the one-line refusal before something does not fit."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from minirea.errors import MemoryLimitError


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on `device`; None where the system does not say."""
    if device.type == "cuda":
        reserved_unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved_unused
    limits = [value for value in (_meminfo_available(), _cgroup_available()) if value is not None]
    return min(limits, default=None)


def peak_bytes(device: torch.device) -> int:
    """The most memory held so far: of the process on a CPU, of torch's allocations on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def check_fits(device: torch.device, weights: int, cache: int, change: str) -> None:
    """Refuse an allocation of `weights` + `cache` bytes that `device` cannot hold.

    Args:
        weights: bytes of weights still to be allocated; 0 once they are loaded.
        cache: bytes of KV cache to be allocated.
        change: what the user can do about it, the end of the sentence.

    Raises:
        MemoryLimitError: with what was needed, what there is and `change`.
    """
    available = available_bytes(device)
    if available is not None and weights + cache > available:
        parts = [f"{human(size)} for {name}" for name, size in (("weights", weights), ("the KV cache", cache)) if size]
        raise MemoryLimitError(
            f"not enough memory on {device}: needs {' and '.join(parts)}, {human(available)} is free; {change}"
        )


def human(size: float) -> str:
    """A size in bytes, for people: 1.50 GB."""
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


def _cgroup_available() -> int | None:
    """A container's own limit (cgroup v2), which /proc/meminfo does not show. Page cache in it can be reclaimed."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = int((root / "memory.max").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return limit - int((root / "memory.current").read_text()) + int(stat["file"])
    except (OSError, ValueError, KeyError):
        return None
