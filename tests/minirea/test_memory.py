"""Refusals before memory runs out, and the cache's own accounting."""

from __future__ import annotations

import pytest
import torch
from testing import tiny_config

from minirea import memory
from minirea.cache import ALL_TOKENS, KVCache
from minirea.errors import MemoryLimitError
from minirea.memory import MemoryPlan, available_bytes, human, peak_bytes

CPU = torch.device("cpu")
CONFIG = tiny_config(3)


def test_available_and_peak_are_plausible() -> None:
    available = available_bytes(CPU)
    assert available is None or 10**6 < available < 10**14
    before = peak_bytes(CPU)
    torch.ones(50_000_000)
    assert peak_bytes(CPU) >= before > 10**6


def fake_free(monkeypatch: pytest.MonkeyPatch, free: int | None) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda _: free)


PLAN = MemoryPlan(weights=16_000, loading=3_000, cache=8_000, workspace=2_000, num_tokens=1_000_000)


@pytest.mark.parametrize(
    ("free", "message"),
    [
        (26_000, None),
        (None, None),
        (
            25_999,
            "not enough memory on cpu: needs 16.0 kB for weights, 8.0 kB for the KV cache and 2.0 kB to work in, "
            "26.0 kB is free; shorten the prompt or lower max_tokens: about 999,875 of 1,000,000 tokens fit",
        ),
        (19_000, "19.0 kB is free; shorten the prompt or lower max_tokens: about 125,000 of 1,000,000 tokens fit"),
        (18_999, "19.0 kB is free; use a smaller `dtype`, another `device` or a smaller model"),
        (0, "0 B is free; use a smaller `dtype`, another `device` or a smaller model"),
    ],
)
def test_plan_of_a_run(monkeypatch: pytest.MonkeyPatch, free: int | None, message: str | None) -> None:
    fake_free(monkeypatch, free)
    assert PLAN.fits(CPU) == (message is None)
    if message is None:
        PLAN.check(CPU)
        return
    with pytest.raises(MemoryLimitError) as error:
        PLAN.check(CPU)
    assert str(error.value).endswith(message)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, MemoryError)


def test_plan_of_weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_free(monkeypatch, 18_999)
    with pytest.raises(
        MemoryLimitError, match=r"needs 16.0 kB for weights and 3.0 kB to work in, 19.0 kB is free; use"
    ):
        MemoryPlan(weights=16_000, loading=3_000).check(CPU)
    with pytest.raises(MemoryLimitError, match=r"needs 20.0 kB for weights, 19.0 kB is free; use"):
        MemoryPlan(weights=20_000).check(CPU)


@pytest.mark.parametrize("dense_limit", [0, 10, ALL_TOKENS])
def test_cache_bytes_are_those_of_its_tensors(dense_limit: int) -> None:
    cache = KVCache(CONFIG, 40, dense_limit, CPU, torch.float16)
    assert cache.nbytes == sum(t.nbytes for t in cache.tensors)
    per_token = 3 * 2 * 16 * 2  # layers x G x D x float16
    assert cache.nbytes == per_token * {0: 80, 10: 90, ALL_TOKENS: 80}[dense_limit]


@pytest.mark.parametrize("shape", [(0, 0, 0), (6, 4, 2)])
def test_a_cache_needs_the_room_that_it_takes(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]) -> None:
    """With the winners that it keeps."""
    nbytes = KVCache(CONFIG, 40, 10, CPU, torch.float16, winners_shape=shape).nbytes
    fake_free(monkeypatch, nbytes)
    KVCache(CONFIG, 40, 10, CPU, torch.float16, winners_shape=shape)
    fake_free(monkeypatch, nbytes - 1)
    with pytest.raises(MemoryLimitError):
        KVCache(CONFIG, 40, 10, CPU, torch.float16, winners_shape=shape)


@pytest.mark.parametrize("dense_limit", [0, 50, ALL_TOKENS])
def test_cache_doubles_and_keeps_its_tokens(dense_limit: int) -> None:
    cache = KVCache(CONFIG, 4, dense_limit, CPU, torch.float32)
    k_TGD, k_rotated_TGD, v_TGD = torch.randn(3, 2, 16), torch.randn(3, 2, 16), torch.randn(3, 2, 16)
    for layer in range(3):
        cache.write(layer, torch.cat((k_TGD, v_TGD), 1), k_rotated_TGD if dense_limit else None)
    cache.seq_len = 3
    cache.reserve(5)
    assert cache.capacity == 8
    cache.reserve(100)
    assert cache.capacity == 100
    assert [len(tensors) for tensors in (cache.k, cache.k_rotated, cache.v)] == [
        3 * (dense_limit < ALL_TOKENS),
        3 * (dense_limit > 0),
        3,
    ]
    for written_TGD, tensors, tokens in (
        (k_TGD, cache.k, 100),
        (k_rotated_TGD, cache.k_rotated, min(dense_limit, 100)),
        (v_TGD, cache.v, 100),
    ):
        for tensor in tensors:
            assert tensor.shape == (2, tokens, 16)
            assert torch.equal(tensor[:, :3], written_TGD.transpose(0, 1))


def test_growth_takes_what_is_there_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """It doubles if that fits, else grows as far as asked, else is refused with the old cache unharmed."""
    per_token = 3 * 2 * 16 * 4 * 2  # layers x G x D x float32, keys and values
    cache = KVCache(CONFIG, 300, 0, CPU, torch.float32, workspace=lambda num_tokens: 10 * num_tokens)
    keys = cache.k[0]
    # 301 tokens: one more, one layer of 300 that is there twice, and the workspace.
    needed = per_token + 300 * per_token // 3 + 10 * 301
    fake_free(monkeypatch, needed - 1)
    with pytest.raises(MemoryLimitError, match="about 300 of 301 tokens fit"):
        cache.reserve(301)
    assert cache.capacity == 300
    assert cache.k[0] is keys
    fake_free(monkeypatch, needed)
    cache.reserve(301)
    assert cache.capacity == 301
    fake_free(monkeypatch, 10**9)
    cache.reserve(302)
    assert cache.capacity == 602


def test_rewind_is_checked() -> None:
    cache = KVCache(CONFIG, 4, 0, CPU, torch.float32)
    with pytest.raises(ValueError, match="cannot rewind to 1"):
        cache.rewind(1)


@pytest.mark.parametrize(("size", "text"), [(12, "12 B"), (3456, "3.5 kB"), (7.25e6, "7.2 MB"), (1.5e10, "15.00 GB")])
def test_sizes_for_people(size: float, text: str) -> None:
    assert human(size) == text
