"""A CPU's decode step as a list of kernels is the model's ordinary forward pass, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from testing import random_ids, tiny_model, write_checkpoint

import minirea
from minirea.api import LLM
from minirea.cache import KVCache
from minirea.cpu_steps import CpuDecodeStep
from minirea.kernels.cpu.compile import Calls, available
from minirea.loading import new_cache

pytestmark = pytest.mark.skipif(not available(), reason="needs llvmlite")

SCOPE: dict[str, Any] = {"global_size": 4, "local_size": 24, "span_top_k": 2, "span_size": 8, "max_spans": 3}
SCOPE |= {"chunk_size": 16, "tail_size": 0}


def model_of(directory: Path, dtype: torch.dtype, options: dict[str, Any], **fields: Any) -> LLM:
    write_checkpoint(directory, tiny_model(**fields), dtype)
    scope = {} if options.get("attention") == "full" else SCOPE
    return minirea.load(directory, device="cpu", dtype="float32", **{**scope, **options})


def caches(llm: LLM, capacity: int, num_tokens: int) -> list[KVCache]:
    """Two of the same prompt."""
    ids = torch.tensor(random_ids(num_tokens))
    made = [new_cache(llm.model, capacity) for _ in range(2)]
    for cache in made:
        for part in ids.split(16):
            llm.model.forward(part, cache)
    return made


def assert_same(first: KVCache, second: KVCache) -> None:
    n = first.seq_len
    assert n == second.seq_len
    for ours, theirs in zip([*first.k, *first.v], [*second.k, *second.v], strict=True):
        assert torch.equal(ours[:, :n], theirs[:, :n])
    for ours, theirs in zip(first.k_rotated, second.k_rotated, strict=True):
        n_rotated = min(n, first.dense_limit)
        assert torch.equal(ours[:, :n_rotated], theirs[:, :n_rotated])
    assert torch.equal(first.winners, second.winners)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({}, {}),
        ({"vote_window": 4, "carry_votes": True, "vote_size": 4}, {}),
        ({"vote_window": 3, "carry_votes": True, "decode_spans": 1}, {"num_key_value_heads": 1}),
        ({"attention": "streaming"}, {}),
        ({"attention": "full"}, {}),
        (
            {"attention": "full"},
            {"sliding_window": 20, "architectures": ["MistralForCausalLM"], "model_type": "mistral"},
        ),
        ({"quantize": "int8"}, {}),
        ({"quantize": "int4"}, {"num_hidden_layers": 6}),
        ({"dense_size": 60}, {"attention_bias": True, "mlp_bias": True}),
        ({}, {"tie_word_embeddings": True}),
        ({"global_size": 0}, {}),
    ],
)
def test_steps_are_those_of_forward(
    options: dict[str, Any], fields: dict[str, Any], threads: int, tmp_path: Path
) -> None:
    """From within the dense range to beyond it, over a cache that grows on the way, with what other calls leave."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            llm = model_of(tmp_path, torch.bfloat16, options, **fields)
            model, (first, second) = llm.model, caches(llm, 40, 20)
            assert CpuDecodeStep.serves(model, second)
            step = CpuDecodeStep(model, second)
            for token in random_ids(70):
                ids = torch.tensor([token])
                assert torch.equal(step.run(ids), model.logits(model.forward(ids, first))), first.seq_len
            assert_same(first, second)
            for cache in (first, second):
                cache.rewind(75)
                model.forward(torch.tensor(random_ids(9)), cache)
            for token in random_ids(20):
                ids = torch.tensor([token])
                assert torch.equal(step.run(ids), model.logits(model.forward(ids, first)))
            assert_same(first, second)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_weights_of_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    with torch.inference_mode():
        llm = model_of(tmp_path, dtype, {})
        first, second = caches(llm, 90, 50)
        step = CpuDecodeStep(llm.model, second)
        for token in random_ids(9):
            ids = torch.tensor([token])
            assert torch.equal(step.run(ids), llm.model.logits(llm.model.forward(ids, first)))


def test_threads_that_change_on_the_way(tmp_path: Path) -> None:
    """Each has scratch of its own, of which there is as much as there are threads."""
    before = torch.get_num_threads()
    try:
        with torch.inference_mode():
            llm = model_of(tmp_path, torch.bfloat16, {})
            first, second = caches(llm, 120, 50)
            torch.set_num_threads(1)
            step = CpuDecodeStep(llm.model, second)
            for threads in (1, 7, 2, 13, 1):
                torch.set_num_threads(threads)
                for token in random_ids(5):
                    ids = torch.tensor([token])
                    assert torch.equal(step.run(ids), llm.model.logits(llm.model.forward(ids, first)))
                assert step.threads == threads
    finally:
        torch.set_num_threads(before)


def test_fewer_keys_than_winners(tmp_path: Path) -> None:
    """The first steps beyond the dense range search some keys, then more."""
    with torch.inference_mode():
        llm = model_of(tmp_path, torch.bfloat16, {"span_top_k": 8, "dense_size": 28})
        first, second = caches(llm, 90, 20)
        step = CpuDecodeStep(llm.model, second)
        for token in random_ids(25):
            ids = torch.tensor([token])
            assert torch.equal(step.run(ids), llm.model.logits(llm.model.forward(ids, first))), first.seq_len
        assert_same(first, second)


@pytest.mark.filterwarnings("ignore:sketch")
@pytest.mark.parametrize("options", [{"span_scope": "kv_head"}, {"dtype": "float16"}, {"sketch": "int8"}])
def test_what_it_does_not_serve(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, tiny_model(), torch.bfloat16)
    scope = SCOPE | ({"vote_window": 1, "carry_votes": False} if "sketch" in options else {})
    llm = minirea.load(tmp_path, device="cpu", **{"dtype": "float32", **scope, **options})
    assert not CpuDecodeStep.serves(llm.model, new_cache(llm.model, 50))
    expected = llm.generate(random_ids(60), max_tokens=5, ignore_eos=True).token_ids
    monkeypatch.setattr("minirea.kernels.cpu.compile.is_installed", lambda: False)
    other = minirea.load(tmp_path, device="cpu", **{"dtype": "float32", **scope, **options})
    assert other.generate(random_ids(60), max_tokens=5, ignore_eos=True).token_ids == expected


def test_a_step_that_is_interrupted_leaves_the_cache_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        llm = model_of(tmp_path, torch.bfloat16, {})
        first, second = caches(llm, 90, 50)
        step, ids = CpuDecodeStep(llm.model, second), torch.tensor([7])
        run = Calls.__call__

        def interrupted(calls: Calls) -> None:
            run(calls)
            raise KeyboardInterrupt  # Python's, when what was called returns

        monkeypatch.setattr(Calls, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            step.run(ids)
        monkeypatch.undo()
        assert second.seq_len == 50
        assert torch.equal(step.run(ids), llm.model.logits(llm.model.forward(ids, first)))
        assert_same(first, second)
