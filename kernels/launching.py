"""What launches of the kernels have in common."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Final

import torch
import triton

# Triton's own take 3 us a call, and a launch can make a dozen.
cdiv: Final = functools.cache(triton.cdiv)
next_power_of_2: Final = functools.cache(triton.next_power_of_2)


def launch(kernel: Any, programs: int, device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel that takes EARLY: whether it starts before its turn, and has to wait for what it reads."""
    early = _starts_early(device)
    if early:
        constants["launch_pdl"] = True
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*arguments, **constants, EARLY=early)


@functools.cache
def _starts_early(device: torch.device) -> bool:
    """Whether the device knows programmatic dependent launch (Hopper and later)."""
    return not triton.knobs.runtime.interpret and torch.cuda.get_device_capability(device) >= (9, 0)
