"""Memory of the host that a GPU reads and writes by its address: pinned, so that it stays where it is."""

from __future__ import annotations

import contextlib
import mmap
import weakref
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from minirea.errors import MemoryLimitError
from minirea.memory import human
from minirea.threads import enqueueing

PAGE: Final = 4096


class HostTensor(NamedTuple):
    """One array in the host's memory, as a tensor of the device, for kernels, and as one of the CPU."""

    on_device: Tensor
    on_cpu: Tensor


def host_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> HostTensor:
    """Of a CPU, both are one tensor. The memory is given back once nothing refers to either.

    Raises:
        MemoryLimitError: the system does not give so much, or does not let it be pinned.
    """
    if device.type == "cpu":
        on_cpu = torch.empty(shape, dtype=dtype)
        return HostTensor(on_cpu, on_cpu)
    count = dtype.itemsize * torch.Size(shape).numel()
    with torch.cuda.device(device):
        bytes_of = _Pinned(count)
        flat = torch.as_tensor(bytes_of, device=device)
    on_device, on_cpu = (x[:count].view(dtype).view(shape) for x in (flat, bytes_of.on_cpu))
    return HostTensor(on_device, on_cpu)


class _Pinned:
    """So many bytes, which torch takes for memory of the device: it has the same address there."""

    def __init__(self, count: int) -> None:
        try:
            memory = mmap.mmap(-1, max(PAGE, count), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError) as error:
            raise _refused(count, error) from None
        with contextlib.suppress(OSError, AttributeError):  # faster to pin, and a GPU has fewer addresses to look up
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.on_cpu = torch.frombuffer(memory, dtype=torch.uint8)
        # The system clears a page when it is first touched, by the core that touches it. Pinning would do so on one
        # core; after torch's threads have, both take about half as long (kernels/NOTEBOOK.md, 2026-11-26).
        self.on_cpu[::PAGE].zero_()
        address, runtime = self.on_cpu.data_ptr(), torch.cuda.cudart()
        code = runtime.cudaHostRegister(address, len(self.on_cpu), 0)
        if int(code):
            _clear_error()
            raise _refused(count, code)
        # At the end of the process the system takes it back by itself.
        weakref.finalize(self, _unpin, runtime, address, memory).atexit = False
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (len(self.on_cpu),),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


_to_unpin: Final[list[tuple[int, mmap.mmap]]] = []


def _unpin(runtime: Any, address: int, memory: mmap.mmap) -> None:
    """Once no step reads it. A thread that captures a graph must not wait for the device: the next one does it then."""
    with enqueueing:
        _to_unpin.append((address, memory))
        if not torch.cuda.is_current_stream_capturing():
            wait_for_device()
            while _to_unpin:
                runtime.cudaHostUnregister(_to_unpin.pop()[0])


def wait_for_device(device: torch.device | None = None) -> None:
    """Until the device, or the current one, has done all that it was given; a capture in another thread ends first."""
    with enqueueing:
        torch.cuda.synchronize(device)


def _clear_error() -> None:
    """A failed call of the runtime is reported once more by the next launch."""
    with contextlib.suppress(RuntimeError):
        torch.empty(1, dtype=torch.uint8, device="cuda").zero_()


def _refused(count: int, reason: object) -> MemoryLimitError:
    return MemoryLimitError(
        f"not enough memory on the host: {human(count)} more for the KV cache cannot be pinned ({reason}); shorten the "
        "prompt, lower max_tokens, or use cache 'device'"
    )
