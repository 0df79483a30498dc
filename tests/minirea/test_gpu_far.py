"""Caches in the host's memory on a GPU, from prompt to answer: all keys and values are those of one on the device."""

from __future__ import annotations

import functools
import gc
from pathlib import Path

import pytest
import torch
from testing import random_ids

import minirea
from minirea.attention import Attention
from minirea.evaluation.text.diary import generate_text
from minirea.memory import peak_bytes
from minirea.placement import Placement

pytestmark = pytest.mark.gpu
DEMO = Path(__file__).parents[2] / "weights" / "demo"


@functools.cache
def loaded(sketch: str, cache: str = "device") -> minirea.LLM:
    return minirea.load(DEMO, sketch=sketch, cache=cache)


def poisoned(llm: minirea.LLM, capacity: int) -> minirea.api.Session:
    """A session whose memory holds NaN."""
    session = llm.session(capacity)
    with torch.inference_mode():
        for tensor in session.cache.tensors:
            tensor.fill_(torch.nan)
        for rows in (rows for near in session.cache.near for rows in near or () if rows is not None):
            rows.fill_(torch.nan)
    return session


def check_equal(ours: minirea.api.Session, theirs: minirea.api.Session) -> None:
    assert ours.ids == theirs.ids
    torch.cuda.synchronize()
    tokens = ours.cache.seq_len
    for layer in range(len(ours.cache.v)):
        for a, b in zip(ours.cache.stored(layer).values(), theirs.cache.stored(layer).values(), strict=True):
            assert torch.equal(a[:, :tokens].cpu(), b[:, :tokens].cpu())


@pytest.mark.parametrize("far_keys", [0, 3])
def test_the_demo_computes_the_same_on_the_host(far_keys: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Prompts in captured steps, answers, rewinds near and far, growth from the device to the host, and files."""
    far = loaded("int8" if far_keys else "off", "host")
    near_size = far.model.attention.placements(1)[0].near_size
    lies = Placement(bool(far_keys), 6, far_keys, near_size)
    ids = loaded("off").encode(generate_text(0, 400_000))[:90_000]
    device = poisoned(loaded("off"), 92_000)
    on_device = Placement(bool(far_keys))
    monkeypatch.setattr(Attention, "placements", lambda _, capacity: [lies if capacity > 60_500 else on_device])
    host, moving = poisoned(far, 92_000), poisoned(far, 60_000)
    assert not moving.cache.placement.far_arrays and host.cache.placement == lies
    for session in (device, host, moving):
        session.prefill(ids)
        for start, keep in ((0, 90_000), (3000, 89_990), (500, 60_000), (70_000, 60_700)):
            session.rewind(keep)
            session.generate(ids[start : start + 700], max_tokens=16, ignore_eos=True)
    assert moving.cache.placement == lies
    for session in (host, moving):
        check_equal(session, device)
    host.save(tmp_path / "context")
    opened = far.open_session(tmp_path / "context")
    for session in (opened, device):
        session.generate(ids[:90], max_tokens=16, ignore_eos=True)
    check_equal(opened, device)


def test_auto_moves_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the device holds no more than the plan says."""
    llm = loaded("off", "auto")
    torch.cuda.empty_cache()
    capacity = 200_000
    whole = llm.session(capacity).cache
    assert not whole.placement.far_arrays
    layer = whole.nbytes // 6
    del whole
    gc.collect()
    torch.cuda.empty_cache()
    from minirea import memory
    from minirea.plan import workspace_bytes

    attention, held = llm.model.attention, torch.cuda.memory_allocated()
    workspace, free = workspace_bytes(attention, llm.model.dtype, capacity), memory.available_bytes
    room = workspace + 4 * layer
    monkeypatch.setattr(memory, "available_bytes", lambda d: min(free(d), room) if d.type == "cuda" else free(d))
    session = llm.session(capacity)
    assert 0 < session.cache.placement.far_values <= 6 and not session.cache.placement.far_keys
    torch.cuda.reset_peak_memory_stats()
    out = session.generate(random_ids(150_000, 2000), max_tokens=8, ignore_eos=True)
    assert peak_bytes(llm.model.device) - held <= room
    assert out.stats.host_cache_bytes == session.cache.far_nbytes > 0


def test_threads_and_streams_with_a_cache_on_the_host() -> None:
    """Two sessions take turns, each with its own near rows."""
    llm, ids = loaded("off", "host"), random_ids(30_000, 2000)
    sessions = [llm.session(31_000), llm.session()]
    streams = [s.stream(ids[i:], max_tokens=40, ignore_eos=True) for i, s in enumerate(sessions)]
    for _ in range(40):
        for stream in streams:
            next(stream)
    for index, session in enumerate(sessions):
        alone = loaded("off").session(31_000)
        alone.generate(ids[index:], max_tokens=40, ignore_eos=True)
        assert session.ids == alone.ids
