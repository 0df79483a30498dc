"""The engine on a CUDA device: the same tokens as on the CPU, and the same answer from the demo model."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packed_checkpoints import KINDS, write_packed
from testing import random_ids, tiny_model, write_checkpoint

import minirea
from minirea.attention import Attention, full_attention
from minirea.evaluation.text.diary import generate_text
from minirea.generate import decode, decode_one_by_one, read_one_by_one
from minirea.graph import WORTH_CAPTURING, DecodeGraph, StepGraph, compiling_decode_step, read_captured
from minirea.sampling import Sampler, SamplingConfig
from minirea.steps import DecodeStep, Part, cut

pytestmark = pytest.mark.gpu
DEMO = Path(__file__).parents[2] / "weights" / "demo"
SCOPE = {"global_size": 4, "local_size": 24, "span_top_k": 2, "span_size": 4, "max_spans": 5, "chunk_size": 16}


@pytest.mark.parametrize("attention", ["reattention", "streaming", "full"])
def test_logits_are_those_of_the_cpu(attention: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, tiny_model())
    ids = random_ids(100)
    logits = [
        minirea.load(directory, device=device, dtype="float32", attention=attention, **SCOPE).logits(ids).cpu()
        for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(logits[0], logits[1], atol=2e-4, rtol=0)


def test_auto_dtype_is_the_checkpoints(tmp_path: Path) -> None:
    llm = minirea.load(write_checkpoint(tmp_path, tiny_model(), torch.bfloat16))
    assert (llm.model.device.type, llm.model.dtype) == ("cuda", torch.bfloat16)


def test_same_seed_same_tokens(tmp_path: Path) -> None:
    llm = minirea.load(write_checkpoint(tmp_path, tiny_model()), **SCOPE)
    out = [llm.generate(random_ids(60), max_tokens=30, temperature=1.0, seed=seed).token_ids for seed in (3, 3, 4)]
    assert out[0] == out[1] != out[2]


@pytest.mark.parametrize("sliding_window", [None, 50])
@pytest.mark.parametrize("num_queries", [1, 7, 64])
def test_full_attention_is_that_of_the_cpu(num_queries: int, sliding_window: int | None) -> None:
    q, k, v = torch.randn(num_queries, 8, 32), torch.randn(2, 200, 32), torch.randn(2, 200, 32)
    expected = full_attention(q, k, v, sliding_window)
    got = full_attention(q.cuda(), k.cuda(), v.cuda(), sliding_window)
    torch.testing.assert_close(got.cpu(), expected, atol=1e-5, rtol=0)


def test_not_enough_memory_is_said_before_it_is_tried(tmp_path: Path) -> None:
    llm = minirea.load(write_checkpoint(tmp_path, tiny_model()))
    with pytest.raises(minirea.MemoryLimitError, match=r"not enough memory on cuda:\d+: .* is free; "):
        llm.generate([3, 4, 5], max_tokens=10**12)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_the_demo_finds_the_needle(impl: str) -> None:
    prompt = (DEMO / "prompts" / "needle-16k.txt").read_text()
    assert minirea.load(DEMO, impl=impl).generate(prompt, max_tokens=8).text.startswith(" 604218")


def eager(llm: minirea.LLM, ids: list[int], max_tokens: int, **options: float) -> list[int]:
    """The tokens of one forward pass after another, without a graph."""
    session = llm.session(len(ids) + max_tokens)
    if ids[:-1]:
        session.prefill(ids[:-1], to_follow=1)
    model = llm.model
    sampler = Sampler(SamplingConfig(**options), ids, model.config.vocab_size, model.device)  # type: ignore[arg-type]
    with torch.inference_mode():
        return list(decode_one_by_one(model, session.cache, ids[-1], sampler, max_tokens))


@torch.inference_mode()
def test_captured_steps_fill_the_cache_as_launched_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prompt whose last step is shorter, into a cache that grows on the way and one that is roomy.

    Steps of one chunk, of two and of four, all of them with captured ones.
    """
    llm = minirea.load(write_checkpoint(tmp_path, tiny_model()), dtype="float32", **SCOPE)
    ids_T = torch.tensor(random_ids(406), device="cuda")
    expected = llm.session(406).cache
    parts = [Part(0, 406, 16)]
    assert list(read_one_by_one(llm.model, expected, ids_T.tolist(), parts)) == [16] * 25 + [6]
    llm.model.attention.step_chunks = 4
    assert llm.model.attention.step_tokens(16) == 64
    for capacity, size in ((50, 16), (70, 32), (500, 64)):
        lengths = [len(ids) for ids in ids_T.split(size)]
        assert len(lengths) > WORTH_CAPTURING
        monkeypatch.setattr(Attention, "step_tokens", lambda _, chunk_size, size=size: size)  # noqa: ARG005
        cache = llm.session(capacity).cache
        assert list(read_captured(llm.model, cache, ids_T.tolist(), parts)) == lengths
        assert cache.seq_len == 406
        for name in ("k", "v"):
            for found, wanted in zip(getattr(cache, name), getattr(expected, name), strict=True):
                torch.testing.assert_close(found[:, :406], wanted[:, :406], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_a_tail_in_captured_steps_is_read_as_chunk_by_chunk(tmp_path: Path) -> None:
    """The prompt's body in captured steps, its tail in one of small chunks; then the same text."""
    tail = {"tail_size": 23, "tail_chunk_size": 4}
    llm = minirea.load(write_checkpoint(tmp_path, tiny_model()), dtype="float32", **SCOPE | tail)
    model, ids = llm.model, random_ids(406)
    ids_T, sampler = torch.tensor(ids, device="cuda"), Sampler(SamplingConfig(), ids, 97, llm.model.device)
    model.attention.step_chunks = 4
    parts = cut(model.attention, 0, 405, to_follow=1)
    assert [(part.stop - part.start, part.chunk_size) for part in parts] == [(383, 16), (22, 4)]
    found, expected = llm.session(450).cache, llm.session(450).cache
    assert list(read_captured(model, found, ids_T[:-1].tolist(), parts)) == [64] * 5 + [63, 22]
    assert list(read_one_by_one(model, expected, ids_T[:-1].tolist(), parts)) == [16] * 23 + [15] + [4] * 5 + [2]
    for name in ("k", "v"):
        for ours, theirs in zip(getattr(found, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(ours[:, :405], theirs[:, :405], atol=1e-5, rtol=0)
    text = list(decode_one_by_one(model, expected, ids[-1], sampler, 30))
    assert llm.generate(ids, max_tokens=30, ignore_eos=True).token_ids == text


@pytest.mark.parametrize("context", [1, 500, 2048, 9000, 70_000])
@torch.inference_mode()
def test_graph_gives_the_text_of_the_torch_path(context: int) -> None:
    """500 greedy tokens of the demo model in float32: fused kernels in a graph against plain torch, on one GPU.

    The graph is fed the plain path's tokens. Beyond dense_size a step compares some 10^5 scores with their neighbours,
    and of those that are equal but for rounding each path may choose another one; so a few tokens may differ there.
    """
    sentences = (DEMO / "prompts" / "needle-16k.txt").read_text().split(". ")
    text = ". ".join(". ".join(Random(seed).sample(sentences, len(sentences))) for seed in range(5))
    fused, plain = (minirea.load(DEMO, dtype="float32", impl=impl) for impl in ("triton", "torch"))
    ids = fused.tokenizer.encode(text)[:context]
    expected = eager(plain, ids, 500)
    session, model = fused.session(context + 500), fused.model
    if ids[:-1]:
        session.prefill(ids[:-1], to_follow=1)
    sampler = Sampler(SamplingConfig(), [], model.config.vocab_size, model.device)
    graph, found = DecodeGraph(model, session.cache, ids[-1], sampler), []
    for token_id in [ids[-1], *expected[:-1]]:
        graph.step.new.token.fill_(token_id)
        graph.launch()
        found.append(graph.read())
    differ = sum(a != b for a, b in zip(found, expected, strict=True))
    assert differ <= (0 if context + 500 <= model.attention.dense_size else 5)


VOTES = {"vote_window": 3, "vote_size": 4, "decode_spans": 3, "carry_votes": True}
VARIANTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("reattention", {}, {}),
    ("reattention", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}, {}),
    ("reattention", {"family": "Qwen2"}, {}),
    ("reattention", {"tie_word_embeddings": True, "num_key_value_heads": 4}, {}),
    ("reattention", {"hidden_size": 80, "intermediate_size": 5000, "num_key_value_heads": 1, "head_dim": 20}, {}),
    ("reattention", {"num_hidden_layers": 4}, VOTES),
    ("reattention", {"num_hidden_layers": 4}, {"carry_votes": True}),
    ("reattention", {"num_hidden_layers": 4}, VOTES | {"span_scope": "kv_head"}),
    ("streaming", {}, {}),
]


@pytest.mark.parametrize(("attention", "fields", "votes"), VARIANTS)
@torch.inference_mode()
def test_graph_gives_the_logits_of_the_torch_path(
    attention: str, fields: dict[str, Any], votes: dict[str, Any], tmp_path: Path
) -> None:
    """Fed the same tokens, none of them twice: equal tokens have equal keys in the first layer, and rounding would
    choose between them."""
    directory = write_checkpoint(tmp_path, tiny_model(vocab_size=200, **fields))
    fused, plain = (
        minirea.load(directory, impl=impl, dtype="float32", attention=attention, **SCOPE | votes)
        for impl in ("triton", "torch")
    )
    ids = torch.randperm(197, generator=torch.Generator().manual_seed(0)).add(3).tolist()
    for start in (1, 24, 90):
        sessions = [llm.session(150) for llm in (fused, plain)]
        for session in sessions:
            session.prefill(ids[:start])
        graph = DecodeGraph(fused.model, sessions[0].cache, 0, Sampler(SamplingConfig(), [], 200, fused.model.device))
        for token_id in ids[start : start + 12]:
            graph.step.new.token.fill_(token_id)
            graph.launch()
            graph.read()
            x_1E = plain.model.forward(torch.tensor([token_id], device="cuda"), sessions[1].cache)
            torch.testing.assert_close(graph.step.logits_V, plain.model.logits(x_1E)[0], atol=2e-4, rtol=0)


@torch.inference_mode()
def launch_by_launch(llm: minirea.LLM, ids: list[int], max_tokens: int, **options: float) -> list[int]:
    """The tokens of a graph's kernels without the graph."""
    session = llm.session(len(ids) + max_tokens)
    session.prefill(ids[:-1], to_follow=1)
    sampler = Sampler(SamplingConfig(**options), ids, llm.model.config.vocab_size, llm.model.device)  # type: ignore[arg-type]
    step = DecodeStep(llm.model, session.cache, ids[-1], sampler)
    token_ids = []
    for _ in range(max_tokens):
        step.run()
        token_ids.append(int(step.new.token))
    return token_ids


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
        {"repetition_penalty": 1.5},
        {"temperature": 1.2, "repetition_penalty": 1.2},
    ],
)
def test_graph_samples_as_its_kernels_do(options: dict[str, float], tmp_path: Path) -> None:
    llm = minirea.load(write_checkpoint(tmp_path, tiny_model()), dtype="float32", **SCOPE)
    ids = random_ids(60)
    out = [llm.generate(ids, max_tokens=60, ignore_eos=True, seed=seed, **options).token_ids for seed in (3, 3, 4)]
    assert out[0] == out[1] == launch_by_launch(llm, ids, 60, seed=3, **options)
    assert (out[2] == out[0]) == (options.get("temperature", 0) == 0)


def test_a_capture_writes_to_nothing_that_is_still_read() -> None:
    """Memory that the caller has freed belongs to others at once, but only behind what its stream has to do with it."""
    device = torch.device("cuda", torch.cuda.current_device())
    cache: Any = SimpleNamespace(device=device, capacity=16)
    out = torch.empty(4, device=device)
    for _ in range(2):  # the first time loads kernels, which waits for the device
        generator = torch.Generator(device).manual_seed(3)
        graph = StepGraph(functools.partial(out.exponential_, generator=generator), cache, generator)
        graph.launch()
        numbers = [torch.ones(1, device=device) for _ in range(4096)]
        torch.cuda.synchronize()
        torch.cuda._sleep(500_000_000)  # a quarter of a second; on a busy machine less may show, but nothing fails
        joined = torch.cat(numbers)
        del numbers[::2]  # which leaves holes of the size that a generator's numbers take
        graph.launch()  # which captures
        assert joined.sum().item() == 4096


def test_a_capture_that_another_thread_ends_is_made_again() -> None:
    """By waiting for the whole device, which it may not: that thread has the error."""
    device, errors = torch.device("cuda", torch.cuda.current_device()), []
    generator, out = torch.Generator(device).manual_seed(3), torch.zeros(4, device=device)
    cache: Any = SimpleNamespace(device=device, capacity=16)

    def wait() -> None:
        try:
            torch.cuda.synchronize()
        except torch.AcceleratorError as error:
            errors.append(error)

    def run() -> None:
        out.add_(1)
        if torch.cuda.is_current_stream_capturing() and len(errors) < 3:
            thread = threading.Thread(target=wait)
            thread.start()
            thread.join()
        out.add_(torch.rand(4, device=device, generator=generator).ceil())

    graph = StepGraph(run, cache, generator)
    for _ in range(4):
        graph.launch()
    assert len(errors) == 3
    assert out.tolist() == [8.0] * 4
    torch.rand(4, device=device, generator=generator)
    torch.rand(4, device=device)  # the default generator is no longer captured


def test_a_chat_outgrows_its_cache_and_its_graph(tmp_path: Path) -> None:
    llm = minirea.load(write_checkpoint(tmp_path, tiny_model()), dtype="float32", **SCOPE)
    grown, roomy = llm.session(), llm.session(capacity=600)
    for turn in range(4):
        ids = random_ids(30, seed=turn)
        first, second = (s.generate(ids, max_tokens=40, ignore_eos=True).token_ids for s in (grown, roomy))
        assert first == second
    model, (cache, _) = llm.model, (grown.cache, roomy.cache)
    capacity, tokens = cache.capacity, decode(model, cache, 5, Sampler(SamplingConfig(), [], 97, model.device))
    endless = [next(tokens) for _ in range(2 * capacity)]  # beyond what was reserved: it grows under the running loop
    tokens.close()
    assert cache.capacity > capacity
    roomy.cache.reserve(5 * capacity)
    tokens = decode(model, roomy.cache, 5, Sampler(SamplingConfig(), [], 97, model.device))
    assert endless == [next(tokens) for _ in endless]


@pytest.mark.parametrize(
    ("sketch", "head_dim", "kernels"),
    [
        ("off", 16, {"norm_qkv_kernel", "decode_kernel", "best_token_kernel", "keep_token_kernel"}),
        ("int8", 32, {"decode_kernel", "sketch_kernel"}),
    ],
)
def test_a_decode_step_is_compiled_while_a_prompt_is_read(
    sketch: str, head_dim: int, kernels: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is compiled, or fetched from the disk, after the prompt but a norm that asks for the scope at the end.
    Of a shape that no other test has."""
    triton = pytest.importorskip("triton")
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda src, **_: compiled.append(src.name))
    shape = tiny_model(hidden_size=48, intermediate_size=72, num_key_value_heads=1, head_dim=head_dim, vocab_size=110)
    llm = minirea.load(write_checkpoint(tmp_path, shape), sketch=sketch, **SCOPE)
    with compiling_decode_step(llm.model, llm.session(16).cache):
        pass
    assert kernels <= set(compiled)
    compiled.clear()
    llm.generate([5], max_tokens=8, ignore_eos=True)
    assert set(compiled) <= {"rms_norm_kernel"}


def test_a_token_that_nobody_asked_for_is_taken_back(tmp_path: Path) -> None:
    llm = minirea.load(write_checkpoint(tmp_path, tiny_model()), dtype="float32", **SCOPE)
    ids, more = random_ids(60), random_ids(9, seed=1)
    session = llm.session(300)
    stream = session.stream(ids, max_tokens=100, ignore_eos=True)
    taken = [next(stream).token_ids[0] for _ in range(7)]
    stream.close()
    assert session.ids == ids + taken
    assert session.cache.seq_len == len(ids) + 6
    other = llm.session(300)
    assert other.generate(ids, max_tokens=7, ignore_eos=True).token_ids == taken
    after = [s.generate(more, max_tokens=20, ignore_eos=True).token_ids for s in (session, other)]
    assert after[0] == after[1]


def test_logits_that_are_not_finite_are_reported(tmp_path: Path) -> None:
    llm = minirea.load(write_checkpoint(tmp_path, tiny_model()), **SCOPE)
    with torch.inference_mode():
        llm.model.norm.fill_(float("inf"))
    for options in ({}, {"temperature": 1.0, "top_p": 0.9}):
        with pytest.raises(minirea.InputError, match="not finite after 3 tokens"):
            llm.generate([3, 4, 5], max_tokens=9, **options)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_quantized_model_is_that_of_the_cpu(quantize: str, impl: str, tmp_path: Path) -> None:
    """Rounded on either device from the same values; a CPU rounds what it multiplies to bfloat16 as well."""
    directory = write_checkpoint(tmp_path, tiny_model(tie_word_embeddings=True))
    ids = random_ids(100)
    llm = minirea.load(directory, device="cuda", dtype="float32", impl=impl, quantize=quantize, attention="full")
    found = llm.logits(ids).cpu()
    expected = minirea.load(directory, device="cpu", quantize=quantize, attention="full").logits(ids)
    assert float((found - expected).norm() / expected.norm()) < 0.03
    new_ids = llm.generate(ids, max_tokens=20, ignore_eos=True).token_ids
    assert new_ids == llm.logits([*ids, *new_ids])[99:-1].argmax(-1).tolist()  # decoding reads the same matrices


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_comes_in_4_bits_is_that_of_the_cpu(kind: str, tmp_path: Path) -> None:
    """Its layers' matrices packed, its head wide."""
    path, _ = write_packed(tmp_path, kind, torch.bfloat16)
    ids = random_ids(100)
    llm = minirea.load(path, device="cuda", dtype="float32", attention="full")
    assert llm.model.quantize == "int4"
    found = llm.logits(ids).cpu()
    expected = minirea.load(path, device="cpu", attention="full").logits(ids)
    assert float((found - expected).norm() / expected.norm()) < 0.03
    new_ids = llm.generate(ids, max_tokens=20, ignore_eos=True).token_ids
    assert new_ids == llm.logits([*ids, *new_ids])[99:-1].argmax(-1).tolist()
    assert len(minirea.load(path, device="cuda").generate(ids, max_tokens=8, ignore_eos=True).token_ids) == 8


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_the_quantized_demo_generates(quantize: str) -> None:
    out = minirea.load(DEMO, device="cuda", quantize=quantize).generate(
        (DEMO / "prompts" / "needle-16k.txt").read_text(), max_tokens=12
    )
    assert out.stats.quantize == quantize
    if quantize == "int8":
        assert "604218" in out.text


def test_the_demo_computes_the_same_with_sketches() -> None:
    """50 questions behind 275,000 to 300,000 tokens, whose slices are long enough for sketches. Every key and value of
    their answers is the same bit for bit: it depends on what the layers before have selected.
    """
    from minirea.kernels.fused import launch, plan

    without, with_sketches = (minirea.load(DEMO, sketch=sketch).session(301_000) for sketch in ("off", "int8"))
    ids = without.llm.encode(generate_text(0, 1_500_000))[:300_000]
    assert len(ids) == 300_000
    for session in (without, with_sketches):
        session.prefill(ids)
    for prompt in range(50):
        question = ids[5000 * prompt : 5000 * prompt + 20]
        for session in (without, with_sketches):
            session.rewind(300_000 - 500 * prompt)
            session.generate(question, max_tokens=24, ignore_eos=True)
        assert with_sketches.ids == without.ids
        new = slice(300_000 - 500 * prompt, with_sketches.cache.seq_len)
        for ours, theirs in zip(with_sketches.cache.tensors, without.cache.tensors, strict=True):
            assert torch.equal(ours[..., new, :], theirs[..., new, :])
    config = with_sketches.llm.model.attention.config
    found = [
        scratch.found.flatten()
        for key, scratch in launch._workspaces.items()
        if getattr(scratch, "found", None) is not None and any(getattr(part, "config", None) == config for part in key)
    ]
    survivors = torch.cat(found)
    survivors = survivors[survivors > 0]
    assert float((survivors <= plan.sketch_tiles(64).SURVIVORS).float().mean()) > 0.5
