"""Refusals before memory runs out, and the cache's own accounting."""

from __future__ import annotations

import pytest
import torch

from minirea.cache import ALL_TOKENS, KVCache
from minirea.config import ModelConfig, RopeConfig
from minirea.errors import MemoryLimitError
from minirea.memory import available_bytes, check_fits, human, peak_bytes

CPU = torch.device("cpu")
CONFIG = ModelConfig(3, 64, 112, 4, 2, 16, 97, 1e-5, RopeConfig(), 256)


def test_available_and_peak_are_plausible() -> None:
    available = available_bytes(CPU)
    assert available is None or 10**6 < available < 10**14
    before = peak_bytes(CPU)
    torch.ones(50_000_000)
    assert peak_bytes(CPU) >= before > 10**6


def test_refusal_says_what_was_needed_what_there_is_and_what_to_do() -> None:
    with pytest.raises(MemoryLimitError) as error:
        check_fits(CPU, 10**15, 10**14, "buy more")
    message = str(error.value)
    assert "1000000.00 GB for weights and 100000.00 GB for the KV cache" in message
    assert message.endswith("is free; buy more")
    assert isinstance(error.value, MemoryError)


@pytest.mark.parametrize("dense_limit", [0, 10, ALL_TOKENS])
def test_cache_bytes_are_those_of_its_tensors(dense_limit: int) -> None:
    cache = KVCache(CONFIG, 40, dense_limit, CPU, torch.float16)
    assert cache.nbytes == sum(t.nbytes for t in cache.tensors)
    per_token = 3 * 2 * 16 * 2  # layers x G x D x float16
    assert cache.nbytes == per_token * {0: 80, 10: 90, ALL_TOKENS: 80}[dense_limit]


def test_cache_doubles_and_keeps_its_tokens() -> None:
    cache = KVCache(CONFIG, 4, 50, CPU, torch.float32)
    k_TGD, k_rotated_TGD, v_TGD = torch.randn(3, 2, 16), torch.randn(3, 2, 16), torch.randn(3, 2, 16)
    for layer in range(3):
        cache.write(layer, k_TGD, k_rotated_TGD, v_TGD)
    cache.seq_len = 3
    cache.reserve(5)
    assert cache.capacity == 8
    cache.reserve(100)
    assert cache.capacity == 100
    assert cache.k_rotated[0].shape[1] == 50
    for layer in range(3):
        assert torch.equal(cache.k[layer][:, :3], k_TGD.transpose(0, 1))
        assert torch.equal(cache.k_rotated[layer][:, :3], k_rotated_TGD.transpose(0, 1))
        assert torch.equal(cache.v[layer][:, :3], v_TGD.transpose(0, 1))


def test_rewind_is_checked() -> None:
    cache = KVCache(CONFIG, 4, 0, CPU, torch.float32)
    with pytest.raises(ValueError, match="cannot rewind to 1"):
        cache.rewind(1)


@pytest.mark.parametrize(("size", "text"), [(12, "12 B"), (3456, "3.5 kB"), (7.25e6, "7.2 MB"), (1.5e10, "15.00 GB")])
def test_sizes_for_people(size: float, text: str) -> None:
    assert human(size) == text
