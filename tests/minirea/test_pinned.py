"""Pinned memory of the host, with a CUDA runtime that is none: what is asked of it, and when."""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import pytest
import torch

from minirea import pinned
from minirea.errors import MemoryLimitError
from minirea.pinned import host_tensor
from minirea.threads import enqueueing

CUDA = torch.device("cuda")


class Runtime:
    """Records what is registered; a `limit` of bytes can be."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.limit = 1 << 30
        self.waits = 0
        self.alone: list[bool] = []
        self.capturing = False

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        assert flags == 0
        if sum(self.registered.values()) + size > self.limit:
            return 2
        self.registered[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        assert not self.capturing and self.waits  # nothing that may still be read is given back
        del self.registered[address]
        return 0

    def synchronize(self, device: torch.device | None = None) -> None:
        assert device is None
        assert not self.capturing
        self.waits += 1
        self.alone.append(enqueueing._is_owned())  # type: ignore[attr-defined]


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    found = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", found.synchronize)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing)
    monkeypatch.setattr(pinned, "_to_unpin", [])
    monkeypatch.setattr(pinned, "_clear_error", lambda: None)

    def as_tensor(memory: Any, device: torch.device) -> torch.Tensor:
        """A tensor over the memory that the interface names."""
        interface = memory.__cuda_array_interface__
        assert device == CUDA and interface["typestr"] == "|u1" and interface["data"][0] == memory.on_cpu.data_ptr()
        return memory.on_cpu[:]

    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    return found


@pytest.mark.parametrize("shape", [(0, 2, 8), (3,), (5, 1000, 4)])
@pytest.mark.usefixtures("runtime")
def test_shapes_of_any_size(shape: tuple[int, ...]) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        host = host_tensor(shape, dtype, CUDA)
        assert (host.on_device.shape, host.on_device.dtype) == (host.on_cpu.shape, host.on_cpu.dtype) == (shape, dtype)
        host.on_device.fill_(3)
        assert torch.equal(host.on_cpu, torch.full(shape, 3, dtype=dtype))
        assert host.on_device.data_ptr() == host.on_cpu.data_ptr()


def test_memory_is_given_back_after_the_device_has_read_it(runtime: Runtime) -> None:
    memory = pinned._Pinned(10_000)
    assert len(runtime.registered) == 1
    del memory
    gc.collect()
    assert not runtime.registered and runtime.waits == 1
    during = pinned._Pinned(10_000)
    runtime.capturing = True  # a graph, in this thread
    del during
    gc.collect()
    assert len(runtime.registered) == 1 and len(pinned._to_unpin) == 1
    runtime.capturing = False
    after = pinned._Pinned(10_000)
    del after
    gc.collect()
    assert not runtime.registered and not pinned._to_unpin
    assert runtime.alone == [True, True]  # where no other thread captures


def test_a_refusal_says_how_much_was_wanted(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.limit = 100_000
    host_tensor((10_000,), torch.float32, CUDA)
    refused = r"not enough memory on the host: 400.0 kB more for the KV cache cannot be pinned \(2\); .* cache 'device'"
    with pytest.raises(MemoryLimitError, match=refused):
        host_tensor((100_000,), torch.float32, CUDA)

    def no_map(*_: Any, **__: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(pinned.mmap, "mmap", no_map)
    with pytest.raises(MemoryLimitError, match="Cannot allocate memory"):
        host_tensor((10,), torch.float32, CUDA)
