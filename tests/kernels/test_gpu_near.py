"""Caches in the host's memory on a GPU: the kernels read them there, and compute the same bit for bit."""

from __future__ import annotations

import gc

import pytest
import torch
from kernel_cases import Case, rope_table
from near_cases import check_near, on_host
from sketch_cases import sketch_of

from minirea.kernels import ReAttentionConfig
from minirea.pinned import host_tensor

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
SHAPES = [(32, 8, 128, "layer"), (9, 3, 64, "kv_head")]
ROWS = 1400  # near ones, for every case: other numbers of them would be compiled anew


def make(config: ReAttentionConfig, seq_len: int, T: int, H: int, G: int, D: int) -> Case:
    """Normal keys, queries and values, in the device's memory. Beyond seq_len lies NaN."""
    generator = torch.Generator(DEVICE).manual_seed(seq_len)
    tensors = [torch.randn(s, generator=generator, device=DEVICE) for s in ((T, H, D), *[(G, seq_len + 9, D)] * 2)]
    for cache in tensors[1:]:
        cache[:, seq_len:] = torch.nan
    tables = (x.to(DEVICE) for x in rope_table(config.max_scope + T, D))
    return Case(*(x.to(torch.bfloat16) for x in tensors), seq_len, *tables, config)


@pytest.mark.parametrize(("H", "G", "D", "span_scope"), SHAPES)
def test_steps_read_the_hosts_memory(H: int, G: int, D: int, span_scope: str) -> None:
    """One query, and several chunks, in the dense part and beyond it, wherever the near rows begin anew."""
    config = ReAttentionConfig(32, 256, 4, 32, 24, span_scope=span_scope, dense_size=1056)
    for seq_len in (900, 1400, 4000, 5611):
        check_near(make(config, seq_len, 1, H, G, D), 1, None, ROWS, on_host, [(False, True), (True, True)])
    for seq_len, T in ((1100, 200), (4300, 256), (9000, 201)):
        check_near(make(config, seq_len, T, H, G, D), 64, None, ROWS, on_host, [(False, True)])


@pytest.mark.parametrize(("H", "G", "D", "span_scope"), SHAPES)
def test_survivors_are_scored_in_the_hosts_memory(H: int, G: int, D: int, span_scope: str) -> None:
    """And slices that have too many."""
    case = make(ReAttentionConfig(32, 256, 4, 32, 24, span_scope=span_scope), 150_000, 1, H, G, D)
    check_near(case, None, sketch_of(case, "triton"), ROWS, on_host, [(True, True)])
    case.k_cache[:, : case.seq_len] = 1.0
    check_near(case, None, sketch_of(case, "triton"), ROWS, on_host, [(True, True)])


def test_pinned_memory_is_given_back() -> None:
    host = host_tensor((1000, 1000), torch.bfloat16, DEVICE)
    view, (on_device, on_cpu) = host.on_device[3], host
    on_device.zero_()
    torch.cuda.synchronize()
    assert on_device.is_cuda and on_cpu.is_pinned() and not on_cpu.any()
    address = on_cpu.data_ptr()
    del host, on_device
    gc.collect()
    assert on_cpu.is_pinned() and not view.any()  # a view still holds it
    del view
    gc.collect()
    assert not on_cpu.is_pinned()
    assert int(torch.cuda.cudart().cudaHostRegister(address, 2_000_000, 0)) == 0
    torch.cuda.cudart().cudaHostUnregister(address)
