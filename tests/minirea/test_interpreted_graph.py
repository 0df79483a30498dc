"""The kernels of a step together, in Triton's interpreter: `python -m pytest -m interpret`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from testing import random_ids, tiny_model, write_checkpoint

import minirea
from minirea.attention import Attention
from minirea.cache import KVCache
from minirea.generate import decode_one_by_one, prefill
from minirea.graph import StepGraph, decode_ahead
from minirea.kernels.fused import launch, plan
from minirea.kernels.fused.arguments import SketchTiles
from minirea.model import Model, _layer
from minirea.placement import NEAR, Placement
from minirea.sampling import Sampler, SamplingConfig
from minirea.steps import DecodeStep, PromptStep
from minirea.threads import enqueueing
from minirea.weights import load_weights

SCOPE = {"global_size": 4, "local_size": 24, "span_top_k": 2, "span_size": 4, "max_spans": 5, "chunk_size": 16}
SCOPE |= {"dense_size": 28}
CARRIED = {"carry_votes": True}
VOTES = CARRIED | {"vote_window": 3, "vote_size": 4, "decode_spans": 2}
# Programs are slow to interpret: the fewer rows, the better.
SMALL = {"hidden_size": 32, "intermediate_size": 20, "vocab_size": 40, "head_dim": 8}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"attention_bias": True, "mlp_bias": True, "head_dim": 6},
    {"tie_word_embeddings": True, "num_key_value_heads": 4},
]


def triton_model(directory: Path, llm: minirea.LLM, dtype: torch.dtype = torch.float32) -> Model:
    """The model of `llm` with impl "triton", its matrices by rows as a GPU has them."""
    config, cpu = llm.model.config, torch.device("cpu")
    attention = Attention(config, "reattention", llm.model.attention.config, "triton", cpu)
    model = Model(config, load_weights(directory, config, cpu, dtype), attention)
    weights = load_weights(directory, config, cpu, dtype)
    model.layers = [_layer(weights, index) for index in range(config.num_layers)]
    model.embed, model.head = weights["embed.weight"], weights["head.weight"]
    return model


@pytest.mark.parametrize(
    ("fields", "prompt_tokens", "votes"),
    [
        *zip(VARIANTS, (1, 26, 60), ({}, {}, {}), strict=True),
        *(({}, 26, VOTES), ({}, 60, VOTES)),
        *(({"num_hidden_layers": 3}, n, votes | CARRIED) for n, votes in ((26, {}), (60, {"vote_window": 3}))),
    ],
)
@torch.inference_mode()
def test_steps_give_the_tokens_of_the_torch_path(
    tmp_path: Path, fields: dict[str, Any], prompt_tokens: int, votes: dict[str, int]
) -> None:
    directory = write_checkpoint(tmp_path, tiny_model(**SMALL | fields))
    session, ids = minirea.load(directory, **SCOPE | votes).session(), random_ids(prompt_tokens, 40)
    options = {"repetition_penalty": 1.3 if prompt_tokens == 26 else 1.0}
    out = session.generate(ids, max_tokens=4, ignore_eos=True, **options)
    expected = out.token_ids

    model = triton_model(directory, session.llm)
    config, attention, cpu = model.config, model.attention, model.device
    sizes = config, prompt_tokens + 3, attention.dense_limit
    cache = KVCache(*sizes, cpu, torch.float32, winners_shape=attention.winners_shape)
    attention.impl = "torch"
    prefill(model, cache, ids[:-1], 1)
    attention.impl = "triton"
    step = DecodeStep(model, cache, ids[-1], Sampler(SamplingConfig(**options), ids, config.vocab_size, cpu))
    found: list[int] = []
    for _ in expected:  # whether a step within dense_size is known to be, its result is the same
        step.dense = cache.seq_len < attention.dense_size and len(found) % 2 == 0
        step.run()
        cache.seq_len += 1
        found.append(int(step.new.token))
    assert found == expected
    assert int(step.new.seq_len) == cache.seq_len == prompt_tokens + 3
    check_equal(session.cache, cache, 1e-3)
    assert torch.equal(session.cache.winners, cache.winners)
    assert attention.scope(cache, model.first_query(expected[-2])) == out.stats.scope


@torch.inference_mode()
def test_steps_with_sketches_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit."""
    tiles = SketchTiles(BLOCK_N=16, ROOM=16, SURVIVORS=64, LEAST=32, num_stages=2, LIVE_M=4)
    monkeypatch.setattr(plan, "sketch_tiles", lambda _: tiles)
    monkeypatch.setattr(launch, "_workspaces", {})
    directory = write_checkpoint(tmp_path, tiny_model(**SMALL))
    llm, ids, caches, tokens = minirea.load(directory, **SCOPE), random_ids(90, 40), [], []
    for sketch in (False, True):
        model = triton_model(directory, llm)
        config, scope, cpu = model.config, llm.model.attention.config, model.device
        model.attention = Attention(config, "reattention", scope, "triton", cpu, sketch="int8" if sketch else "off")
        sizes = config, 91, model.attention.dense_limit
        cache = KVCache(*sizes, cpu, torch.float32, placements=model.attention.placements)
        model.attention.impl = "torch"
        prefill(model, cache, ids[:-1], 1)
        model.attention.impl = "triton"
        step = DecodeStep(model, cache, ids[-1], Sampler(SamplingConfig(), ids, config.vocab_size, cpu))
        for _ in range(2):
            model.attention.sketch_keys(cache)
            step.run()
            cache.seq_len += 1
            tokens.append(int(step.new.token))
        caches.append(cache)
    assert tokens[:2] == tokens[2:]
    check_equal(*caches, 0)
    (found,) = (scratch.found for scratch in launch._workspaces.values() if getattr(scratch, "found", None) is not None)
    assert torch.all((found >= 2) & (found <= tiles.SURVIVORS))
    assert caches[1].sketched_len == 89


@torch.inference_mode()
def test_a_step_over_the_first_layers_runs(tmp_path: Path) -> None:
    """As compile_decode_step makes one."""
    llm = minirea.load(write_checkpoint(tmp_path, tiny_model(**SMALL)), **SCOPE | VOTES)
    model = copy.copy(llm.model)
    model.layers, config = model.layers[:1], dataclasses.replace(model.config, num_layers=1)
    cache = KVCache(config, 8, 0, model.device, torch.float32, winners_shape=model.attention.winners_shape)
    step = DecodeStep(model, cache, 0, Sampler(SamplingConfig(), [], config.vocab_size, model.device))
    assert len(cache.winners) == 1
    step.run()


@torch.inference_mode()
def test_chunks_give_the_hidden_states_of_the_torch_path(tmp_path: Path) -> None:
    """Tokens that differ: equal ones have equal keys in the first layer, and rounding would choose between them."""
    directory = write_checkpoint(tmp_path, tiny_model(**SMALL))
    llm = minirea.load(directory, **SCOPE | {"chunk_size": 8, "local_size": 8, "dense_size": 12})
    ids_T = torch.arange(3, 37)
    models = (llm.model, triton_model(directory, llm))
    caches = [KVCache(m.config, 34, m.attention.dense_limit, m.device, torch.float32) for m in models]
    for ids_C in ids_T.split(8):
        expected, found = (m.forward(ids_C, cache) for m, cache in zip(models, caches, strict=True))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.float16, 2e-2)])
@torch.inference_mode()
def test_a_step_of_chunks_that_the_device_counts_fills_the_cache_as_chunks_do(
    tmp_path: Path, dtype: torch.dtype, rounding: float
) -> None:
    """In steps of three chunks, the last of them shorter, which share a launch only in half precision.

    The keys of a step's later chunks are not read.
    """
    directory = write_checkpoint(tmp_path, tiny_model(**SMALL))
    model = triton_model(
        directory,
        minirea.load(directory, **SCOPE | VOTES | {"chunk_size": 8, "local_size": 8, "dense_size": 12}),
        dtype,
    )
    ids_T = torch.arange(3, 40)
    sizes, shape = (model.config, 40, model.attention.dense_limit), model.attention.winners_shape
    caches = [KVCache(*sizes, model.device, dtype, winners_shape=shape) for _ in range(2)]
    for start, stop in ((0, 20), (20, 37)):
        for ids_C in ids_T[start:stop].split(8):
            model.read(ids_C, caches[0], chunk_size=8)
        step = PromptStep(model, caches[1], stop - start, 8)
        step.set(ids_T[start:stop])
        step.run()
        assert caches[1].seq_len == start
        caches[1].seq_len = stop
    check_equal(*caches, rounding)
    assert torch.equal(caches[0].winners, caches[1].winners) and bool((caches[0].winners >= 0).all())


def check_equal(expected: KVCache, found: KVCache, rounding: float = 1e-5) -> None:
    """They hold the same keys and values, up to rounding."""
    assert found.seq_len == expected.seq_len
    for name in ("k", "v"):
        for ours, theirs in zip(getattr(found, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(ours[:, : found.seq_len], theirs[:, : found.seq_len], atol=rounding, rtol=0)


class Event:
    """A GPU's, on a CPU: everything before it is done when it is made."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.mark.parametrize(
    ("fields", "cached", "launched"),
    [
        ({"tail_size": 0}, 0, [16, 16, 7]),
        ({"tail_size": 6}, 0, [16, 16, 1, 5, 1]),
        (CARRIED | {"vote_window": 2, "tail_size": 9, "tail_chunk_size": 1}, 60, [1] * 6),
    ],
)
def test_a_prompt_is_read_in_captured_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], cached: int, launched: list[int]
) -> None:
    """All but a GPU: the first two steps launched, the next three replayed, the last, which are shorter, launched.
    Tokens that vote with others are steps of their own, which are not replayed.
    """
    directory = write_checkpoint(
        tmp_path, tiny_model(**SMALL | {"vocab_size": 64, "num_hidden_layers": 3 if cached else 2})
    )
    model = triton_model(
        directory, minirea.load(directory, **SCOPE | {"chunk_size": 4, "local_size": 8, "dense_size": 12} | fields)
    )
    ids, sizes = [*range(3, 60), *range(30)], (model.config, 90, model.attention.dense_limit)
    ids = ids[: cached + sum(launched)] if cached else ids
    shape = model.attention.winners_shape
    caches = [KVCache(*sizes, model.device, torch.float32, winners_shape=shape) for _ in range(2)]
    model.attention.impl = "torch"
    for cache in caches:
        prefill(model, cache, ids[:cached])
    model.attention.impl = "triton"
    prefill(model, caches[0], ids[cached:])
    captured, replayed = [], []

    def capture(graph: StepGraph) -> SimpleNamespace:
        captured.append(graph)
        return SimpleNamespace(replay=lambda: (replayed.append(graph), graph.run()))

    monkeypatch.setattr(Attention, "can_capture", True)
    monkeypatch.setattr(StepGraph, "_capture", capture)
    found: list[int] = []
    monkeypatch.setattr("minirea.graph.run_aside", lambda run, _: (found.append(len(run.__self__.ids_T)), run()))
    monkeypatch.setattr("minirea.graph.in_order", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    prefill(model, caches[1], ids[cached:])
    assert (len(captured), len(replayed)) == ((0, 0) if cached else (1, 3))
    assert found == launched
    assert caches[0].seq_len == len(ids)
    check_equal(*caches)
    assert torch.equal(caches[0].winners, caches[1].winners)


@torch.inference_mode()
def test_within_dense_size_and_beyond_are_graphs_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each replays the kernels that were captured; the cache grows behind the first step beyond dense_size. Graphs are
    freed where no other thread captures one.
    """
    directory = write_checkpoint(tmp_path, tiny_model(**SMALL))
    llm, ids = minirea.load(directory, **SCOPE), random_ids(26, 40)
    session = llm.session()
    expected = session.generate(ids, max_tokens=7, ignore_eos=True).token_ids
    model = triton_model(directory, llm)
    cache = KVCache(model.config, 29, model.attention.dense_limit, model.device, torch.float32)
    model.attention.impl = "torch"
    prefill(model, cache, ids[:-1], 1)
    model.attention.impl = "triton"
    steps: list[tuple[str, bool]] = []

    def run(step: DecodeStep, kind: str, dense: bool) -> None:
        steps.append((kind, dense))
        step.dense = dense
        step.run()

    def capture(graph: StepGraph) -> SimpleNamespace:
        step = graph.run.__self__  # type: ignore[attr-defined]
        replay = functools.partial(run, step, "replayed", step.dense)
        weakref.finalize(replay, lambda: alone.append(enqueueing._is_owned()))  # type: ignore[attr-defined]
        return SimpleNamespace(replay=replay)

    alone: list[bool] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: empty(*sizes, **options | {"pin_memory": False}))
    monkeypatch.setattr(StepGraph, "_capture", capture)
    monkeypatch.setattr("minirea.graph.run_aside", lambda of, _: run(of.__self__, "launched", of.__self__.dense))
    monkeypatch.setattr("minirea.graph.in_order", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    sampler = Sampler(SamplingConfig(), ids, model.config.vocab_size, model.device)
    assert list(decode_ahead(model, cache, ids[-1], sampler, 7)) == expected
    launched, replayed = ("launched", False), ("replayed", False)
    assert steps == [("launched", True), ("replayed", True), ("replayed", True), launched, launched, replayed, replayed]
    assert alone == [True, True]
    check_equal(session.cache, cache, 1e-3)


@torch.inference_mode()
def test_answers_follow_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer during which the cache grows, and one that goes on where that ended, but behind other tokens."""
    directory = write_checkpoint(tmp_path, tiny_model(**SMALL | {"vocab_size": 80}))
    llm = minirea.load(directory, **SCOPE | VOTES | CARRIED)
    empty, found = torch.empty, []
    monkeypatch.setattr(Attention, "can_capture", True)
    monkeypatch.setattr("minirea.graph.run_aside", lambda run, _: run())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: empty(*sizes, **options | {"pin_memory": False}))
    for model, decode in ((llm.model, decode_one_by_one), (triton_model(directory, llm), decode_ahead)):
        attention, impl = model.attention, model.attention.impl
        sizes = model.config, 50, attention.dense_limit
        cache, tokens = KVCache(*sizes, model.device, torch.float32, winners_shape=attention.winners_shape), []
        for keep, text, limit in ((0, [*range(3, 53)], 2), (49, [60, 61, 62], 1)):
            cache.rewind(keep)
            attention.impl = "torch"
            prefill(model, cache, text[:-1], 1)
            attention.impl = impl
            sampler = Sampler(SamplingConfig(), [], model.config.vocab_size, model.device)
            tokens += decode(model, cache, text[-1], sampler, limit)
        found.append((tokens, cache))
    assert found[0][0] == found[1][0]
    assert found[1][1].capacity > 50
    check_equal(found[0][1], found[1][1])
    assert torch.equal(found[0][1].winners, found[1][1].winners)


@torch.inference_mode()
def test_steps_over_a_far_cache_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: a step of two chunks, then of one token each, whose near rows begin anew in between, before and
    after some are taken back. Local parts are near alone: of the far cache they are NaN while a token is computed.
    One cache gets sketches, and its keys go to the host, when the step of a token is there already.
    """
    tiles = SketchTiles(BLOCK_N=16, ROOM=16, SURVIVORS=64, LEAST=32, num_stages=2, LIVE_M=4)
    monkeypatch.setattr(plan, "sketch_tiles", lambda _: tiles)
    monkeypatch.setattr("minirea.cache.TAKEN_BACK", 4)
    directory = write_checkpoint(tmp_path, tiny_model(**SMALL))
    llm, ids = minirea.load(directory, **SCOPE), random_ids(90, 40)
    found = []
    values, sketched = Placement(False, 2, 0, 56), Placement(True, 2, 1, 56)
    for first, lies in ((NEAR, NEAR), (sketched, sketched), (values, sketched)):
        model = triton_model(directory, llm)
        sketch, scope = "int8" if lies.sketched else "off", llm.model.attention.config
        model.attention = Attention(model.config, "reattention", scope, "triton", model.device, sketch=sketch)
        at = {90: first}
        cache = KVCache(
            *(model.config, 90, 0, model.device, torch.float32),
            placements=lambda capacity, at=at, lies=lies: [at.get(capacity, lies)],
        )
        model.attention.impl = "torch"
        prefill(model, cache, ids[:70], 30)
        model.attention.impl = "triton"
        step = PromptStep(model, cache, 20, 10)
        step.set(torch.tensor(ids[70:]))
        step.run()
        cache.seq_len += 20
        tokens = []
        for keep in (84, 60):
            cache.rewind(keep)
            token = DecodeStep(model, cache, 7, Sampler(SamplingConfig(), ids, model.config.vocab_size, model.device))
            cache.reserve(91)
            assert cache.placement == lies
            model.attention.sketch_keys(cache)
            with local_parts_of_far_arrays_are_nan(cache, lies):
                token.run()
            cache.seq_len += 1
            tokens.append(int(token.new.token))
        found.append((tokens, [tensor[:, :61] for pair in zip(cache.k, cache.v, strict=True) for tensor in pair]))
    for tokens, tensors in found[1:]:
        assert tokens == found[0][0]
        assert all(map(torch.equal, tensors, found[0][1]))


@contextlib.contextmanager
def local_parts_of_far_arrays_are_nan(cache: KVCache, lies: Placement) -> Iterator[None]:
    """Those before the step's own token."""
    local = slice(cache.seq_len + 1 - SCOPE["local_size"], cache.seq_len)
    arrays = [cache.k[layer] for layer in range(2) if lies.keys_are_far(layer, 2)]
    arrays += [cache.v[layer] for layer in range(2) if lies.values_are_far(layer, 2)]
    kept = [array[:, local].clone() for array in arrays]
    for array in arrays:
        array[:, local] = torch.nan
    yield
    for array, values in zip(arrays, kept, strict=True):
        array[:, local] = values
