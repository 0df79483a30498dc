"""What launches of the kernels have in common."""

from __future__ import annotations

import functools
from typing import Any, Final

import torch
import triton

from minirea.errors import CudaError, InputError
from minirea.kernels import driver

# Triton's own take 3 us a call, and a launch can make a dozen.
cdiv: Final = functools.cache(triton.cdiv)
next_power_of_2: Final = functools.cache(triton.next_power_of_2)


def launch(kernel: Any, programs: int, device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel that takes EARLY: whether it starts before the one before it ends, and has to wait for its input.

    Args:
        arguments: its first arguments, in order.
        constants: the others by name, and Triton's options.
    """
    early = starts_early(device)
    if early:
        constants["launch_pdl"] = True
    start(kernel, programs, device, arguments, constants | {"EARLY": early})


def launch_cooperatively(kernel: Any, programs: int, device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel whose programs wait for each other: all run at once or none does, so that none waits for one
    that never starts. Arguments are those of `launch`.
    """
    try:
        start(kernel, programs, device, arguments, constants | {"launch_cooperative_grid": True})
    except CudaError as error:
        if "COOPERATIVE" not in error.name:
            raise
        raise InputError(f"this GPU cannot run all programs of a kernel at once ({error}); use impl 'torch'") from None


def start(
    kernel: Any, programs: int, device: torch.device, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    """Launch a kernel: compiled through libcuda, or in Triton's interpreter."""
    if isinstance(kernel, triton.JITFunction):
        driver.launch(kernel, programs, device, arguments, constants)
    else:  # TRITON_INTERPRET=1
        kernel[(programs,)](*arguments, **constants)


@functools.cache
def starts_early(device: torch.device) -> bool:
    """Whether the device has programmatic dependent launch (Hopper and later)."""
    return not triton.knobs.runtime.interpret and torch.cuda.get_device_capability(device) >= (9, 0)
