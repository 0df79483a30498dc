"""The engine on a CUDA device: the same tokens as on the CPU, and the same answer from the demo model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from testing import random_ids, tiny_model, write_checkpoint

import minirea
from minirea.attention import full_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
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
