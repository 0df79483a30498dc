"""What belongs to the caller: torch's state, and the context of every other thread."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import at_once
from testing import random_ids, tiny_model, write_checkpoint

import minirea
from minirea.config import ReAttentionConfig
from minirea.evaluation.tasks.likelihood import nlls_in_range, token_nlls
from minirea.graph import nothing_collected
from minirea.isolation import isolated
from minirea.kernels import reattention

SCOPE: dict[str, Any] = {"global_size": 4, "local_size": 24, "span_top_k": 2, "span_size": 4, "max_spans": 5}
SCOPE |= {"chunk_size": 16, "tail_size": 12, "tail_chunk_size": 5}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), tiny_model(), torch.bfloat16)


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


STATES: dict[str, Callable[[], Any]] = {
    "default device": lambda: default_device("meta"),
    "device": lambda: torch.device("meta"),
    "default dtype": lambda: default_dtype(torch.float64),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "gradients": torch.enable_grad,
}


def state() -> tuple[Any, ...]:
    flags = torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    return (torch.get_default_device(), torch.get_default_dtype(), *flags, torch.zeros(1).device)


def results(directory: Path, attention: str, ids: list[int], context: Path) -> list[Any]:
    """Of every public call that computes; `context` is where one is saved."""
    llm = minirea.load(directory, device="cpu", attention=attention, **SCOPE)
    before = state()
    session = llm.session()
    session.prefill(ids[:50])
    pieces = []
    for piece in session.stream(ids[50:], max_tokens=5, ignore_eos=True, temperature=0.8, top_p=0.9, seed=3):
        assert state() == before
        pieces += piece.token_ids
    greedy = llm.with_attention(attention, **SCOPE).generate(ids, max_tokens=5, ignore_eos=True)
    session.save(context)
    again = llm.open_session(context).generate(ids[:9], max_tokens=5, ignore_eos=True, sources=3)
    found = [pieces, greedy.token_ids, greedy.stats.scope, again.token_ids, again.sources, llm.logits(ids)]
    assert state() == before
    return found


@pytest.mark.parametrize("attention", ["reattention", "full"])
def test_torchs_state_is_the_callers(directory: Path, attention: str, tmp_path: Path) -> None:
    ids = random_ids(70)
    *expected, logits = results(directory, attention, ids, tmp_path / "context")
    for name, enter in STATES.items():
        with enter():
            *found, other = results(directory, attention, ids, tmp_path / "context")
        assert found == expected, name
        assert torch.equal(other, logits), name


def test_a_forked_process_computes_without_the_threads_that_stayed_behind(directory: Path) -> None:
    """On the two that torch would take it waited without end."""
    llm, ids, numbers = minirea.load(directory, device="cpu", **SCOPE), random_ids(70), torch.zeros(2**20)
    expected = llm.generate(ids, max_tokens=5, ignore_eos=True).token_ids

    def forked(_: int) -> None:
        with isolated():
            assert torch.get_num_threads() == 1
            numbers.exp()
        assert torch.get_num_threads() == 2
        out = llm.generate(ids, max_tokens=5, ignore_eos=True)
        assert (out.token_ids, out.stats.threads) == (expected, 1)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with isolated():
            assert torch.get_num_threads() == 2
            numbers.exp()
        at_once(1, forked)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_as_the_caller_has_it_after_a_capture(enabled: bool) -> None:
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with contextlib.suppress(ValueError), nothing_collected():
            assert not gc.isenabled()
            raise ValueError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_a_stream_that_is_open_when_the_process_ends(directory: Path) -> None:
    """Python closes it so late that nothing can be imported any more."""
    code = "import sys, minirea; s = minirea.load(sys.argv[1]).stream([3, 4], max_tokens=9, ignore_eos=True); next(s)"
    done = subprocess.run([sys.executable, "-c", code, directory], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_logits_are_the_callers_to_change_and_to_differentiate(directory: Path) -> None:
    logits = minirea.load(directory, device="cpu", **SCOPE).logits(random_ids(5))
    logits += 1
    scale = torch.ones((), requires_grad=True)
    (scale * logits).sum().backward()
    assert scale.grad is not None
    assert torch.equal(scale.grad, logits.sum())


def test_torchs_state_does_not_matter_to_the_kernel_and_the_likelihoods(directory: Path) -> None:
    """Called by themselves, in both span scopes, for a chunk and for a decode step."""
    llm, ids = minirea.load(directory, device="cpu", **SCOPE), random_ids(90)
    generator = torch.Generator().manual_seed(0)
    q_THD, k_GND, v_GND = (torch.randn(shape, generator=generator) for shape in ((8, 4, 16), (2, 90, 16), (2, 90, 16)))
    cos, sin = llm.model.attention.scope_tables(90)

    def found() -> list[torch.Tensor]:
        out = [token_nlls(llm, ids), nlls_in_range(llm, ids, 32)]
        for span_scope in ("layer", "kv_head"):
            config = ReAttentionConfig(**{**SCOPE, "span_scope": span_scope})
            for queries in (q_THD, q_THD[-1:]):
                out_THD, selection = reattention(
                    queries, k_GND, v_GND, 90, cos, sin, config, impl="torch", return_selection=True
                )
                out += [out_THD, *(selection if isinstance(selection, list) else [selection])]
        return out

    expected = found()
    for name, enter in STATES.items():
        with enter():
            before = state()
            others = found()
            assert state() == before
        for ours, theirs in zip(expected, others, strict=True):
            assert torch.equal(ours, theirs), name


ON_GPU = pytest.param(
    "cuda",
    20,
    marks=pytest.mark.gpu,
)


@pytest.mark.parametrize(("device", "longer"), [("cpu", 5), ON_GPU])
def test_threads_share_a_model_and_get_their_own_tokens(directory: Path, device: str, longer: int) -> None:
    """Eight at a time: whole calls, sessions, sampled ones, other attention modes, and streams that are left in the
    middle.
    """
    llms = [minirea.load(directory, device=device, dtype="float32", **SCOPE)]
    llms += [llms[0].with_attention("full"), llms[0].with_attention("streaming", **SCOPE)]

    def generate(i: int) -> list[int]:
        ids, llm = random_ids(40 + longer * i, seed=i), llms[i % 3]
        if i % 4 == 1:
            session = llm.session()
            session.prefill(ids[:30])
            return session.generate(ids[30:], max_tokens=12, ignore_eos=True).token_ids
        if i % 4 == 2:
            stream = llm.stream(ids, max_tokens=12, ignore_eos=True)
            left.append(stream)  # never closed
            return [next(stream).token_ids[0] for _ in range(4)]
        options = {"temperature": 1.0, "seed": i, "repetition_penalty": 1.2} if i % 4 == 3 else {}
        return llm.generate(ids, max_tokens=12, ignore_eos=True, **options).token_ids

    left: list[Any] = []
    expected = [generate(i) for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(generate, [*range(16), *range(16)])) == [*expected, *expected]


FEATURES: list[dict[str, Any]] = [
    {},
    {"dtype": "float32", "vote_window": 8, "vote_size": 4, "carry_votes": True, "decode_spans": 3},
    {"dtype": "float32", "quantize": "int8"},
    {"quantize": "int4"},
    {"dtype": "float32", "sketch": "int8"},
    {"cache": "host"},
    {"cache": "host", "sketch": "int8"},
    {"dtype": "float32", "impl": "torch"},
]


@pytest.mark.gpu
def test_calls_of_all_kinds_beside_each_other(tmp_path: Path) -> None:
    """What a model gives alone it gives beside other models and calls: prompts, samples, sources, contexts in files,
    rewinds, abandoned streams, and caches on the host that are freed.
    """
    directory = write_checkpoint(tmp_path / "model", tiny_model(head_dim=32), torch.bfloat16)
    llms = [minirea.load(directory, device="cuda", **SCOPE, **features) for features in FEATURES]
    llms += [llms[0].with_attention("full"), llms[0].with_attention("streaming", **SCOPE)]

    def call(i: int) -> Any:
        llm, ids, options = llms[i % len(llms)], random_ids(20 + 37 * (i % 9), seed=i), {"ignore_eos": True}
        options |= {"max_tokens": (1, 5, 12)[i % 3]}
        kind = i // len(llms)
        if kind == 0:
            return llm.generate(ids, temperature=0.8, repetition_penalty=1.2, top_p=0.9, seed=i, **options).token_ids
        if kind == 1:
            return llm.generate(ids, sources=2, **options).sources
        if kind == 2:
            stream = llm.stream(ids, max_tokens=12, ignore_eos=True, temperature=1.0, seed=i)
            return [next(stream).token_ids for _ in range(2)]
        session = llm.session()
        session.prefill(ids)
        if kind == 3:
            session.rewind(len(ids) - 3)
            return session.generate(ids[:5], **options).token_ids
        path = tmp_path / f"{i}-{threading.get_ident()}"
        session.save(path)
        return llm.open_session(path).generate(ids[:5], **options).stats.scope

    calls = range(5 * len(llms))
    expected = [call(i) for i in calls]
    with ThreadPoolExecutor(8) as pool:
        for turn in range(4):
            order = sorted(calls, key=lambda i: (i * 7919 + turn * 31) % 101)
            assert dict(zip(order, pool.map(call, order), strict=True)) == dict(enumerate(expected))
