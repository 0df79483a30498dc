"""A decode step's kernels together, in Triton's interpreter. test_graph.py runs it in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from testing import random_ids, tiny_model, write_checkpoint

import minirea
from minirea.attention import Attention
from minirea.cache import KVCache
from minirea.generate import prefill
from minirea.graph import DecodeStep
from minirea.model import Model, _layer
from minirea.sampling import Sampler, SamplingConfig
from minirea.weights import load_weights

SCOPE = {"global_size": 4, "local_size": 24, "span_top_k": 2, "span_size": 4, "max_spans": 5, "chunk_size": 16}
# Programs are slow to interpret: the fewer rows, the better.
SMALL = {"hidden_size": 32, "intermediate_size": 20, "vocab_size": 40, "head_dim": 8}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"attention_bias": True, "mlp_bias": True, "head_dim": 6},
    {"tie_word_embeddings": True, "num_key_value_heads": 4},
]


@pytest.mark.parametrize(("fields", "prompt_tokens"), zip(VARIANTS, (1, 26, 60), strict=True))
@torch.inference_mode()
def test_steps_give_the_tokens_of_the_torch_path(tmp_path: Path, fields: dict[str, Any], prompt_tokens: int) -> None:
    directory = write_checkpoint(tmp_path, tiny_model(**SMALL | fields))
    llm, ids = minirea.load(directory, **SCOPE), random_ids(prompt_tokens, 40)
    options = {"repetition_penalty": 1.3 if prompt_tokens == 26 else 1.0}
    expected = llm.generate(ids, max_tokens=4, ignore_eos=True, **options).token_ids

    config, cpu = llm.model.config, torch.device("cpu")
    attention = Attention(config, "reattention", llm.model.attention.config, "triton", cpu)
    model = Model(config, load_weights(directory, config, cpu, torch.float32), attention)
    weights = load_weights(directory, config, cpu, torch.float32)  # by rows, as a GPU has them
    model.layers = [_layer(weights, index) for index in range(config.num_layers)]
    model.embed, model.head = weights["embed.weight"], weights["head.weight"]
    cache = KVCache(config, prompt_tokens + 3, attention.dense_limit, cpu, torch.float32)
    attention.impl = "torch"
    prefill(model, cache, ids[:-1], 16, 1)
    attention.impl = "triton"
    step = DecodeStep(model, cache, ids[-1], Sampler(SamplingConfig(**options), ids, config.vocab_size, cpu))
    found = []
    for _ in expected:
        step.run()
        found.append(int(step.token))
    assert found == expected
    assert int(step.seq_len) == prompt_tokens + 3
