"""The engine against transformers, in float32: every kind of checkpoint it claims to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from testing import oracle_greedy, oracle_logits, random_ids, tiny_model, write_checkpoint, write_mistral

import minirea

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}

# Name -> (fields of the model, edits of the saved config.json). An edit of None removes the key.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, {}),
    "legacy-theta": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_parameters": None, "rope_theta": 500000.0},
    ),
    "linear": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}, {}),
    "legacy-linear": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
    "dynamic": ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}, {}),
    "dynamic-beyond": (
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
            "max_position_embeddings": 64,
        },
        {},
    ),
    "llama3": ({"rope_parameters": LLAMA3}, {}),
    "llama3-factor-32": ({"rope_parameters": LLAMA3 | {"factor": 32.0}}, {}),
    "yarn": ({"rope_parameters": YARN}, {}),
    "yarn-attention-factor": ({"rope_parameters": YARN | {"attention_factor": 1.3}}, {}),
    "yarn-mscale": ({"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.9}}, {}),
    "head-dim": ({"head_dim": 24}, {}),
    "head-dim-absent": ({}, {"head_dim": None}),
    "kv-heads-absent": ({"num_key_value_heads": 4}, {"num_key_value_heads": None}),
    "biases": ({"attention_bias": True, "mlp_bias": True}, {}),
    "tied": ({"tie_word_embeddings": True}, {}),
    "gqa-1": ({"num_key_value_heads": 4}, {}),
    "gqa-4": ({"num_key_value_heads": 1}, {}),
    "gqa-8": ({"num_attention_heads": 8, "num_key_value_heads": 1}, {}),
    "mistral": ({"mistral": True, "sliding_window": None}, {}),
    "sliding-window": ({"mistral": True, "sliding_window": 40}, {}),
    "eps": ({"rms_norm_eps": 1e-2}, {}),
    "torch-dtype-key": ({}, {"dtype": None, "torch_dtype": "float32"}),
}


@pytest.fixture(params=VARIANTS)
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    fields, edits = VARIANTS[request.param]
    return write_checkpoint(tmp_path, tiny_model(**fields), **edits)


def test_full_attention_is_transformers(directory: Path) -> None:
    ids = random_ids(120)
    llm = minirea.load(directory, attention="full", chunk_size=200, local_size=200, allow_out_of_distribution=True)
    torch.testing.assert_close(llm.logits(ids), oracle_logits(directory, ids), atol=1e-4, rtol=0)
    generation = llm.generate(ids, max_tokens=20, ignore_eos=True)
    assert generation.token_ids == oracle_greedy(directory, ids, 20)


def test_reattention_is_transformers_while_everything_is_in_scope(directory: Path) -> None:
    """Up to global + local tokens nothing is selected, so ReAttention is ordinary attention, chunked or not."""
    ids = random_ids(38)  # inside every variant's window and trained range
    expected = oracle_logits(directory, ids)
    for chunk_size in (38, 7):
        llm = minirea.load(directory, global_size=0, local_size=40, max_spans=0, chunk_size=chunk_size)
        torch.testing.assert_close(llm.logits(ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(tmp_path: Path, dtype: torch.dtype) -> None:
    directory = write_checkpoint(tmp_path, tiny_model(), dtype)
    ids = random_ids(60)
    torch.testing.assert_close(
        minirea.load(directory, attention="full").logits(ids), oracle_logits(directory, ids), atol=1e-4, rtol=0
    )


def test_shards_give_the_same_logits(tmp_path: Path) -> None:
    model = tiny_model()
    one = write_checkpoint(tmp_path / "one", model)
    many = write_checkpoint(tmp_path / "many", model, shard_size="50KB")
    assert len(list(many.glob("*.safetensors"))) > 1
    ids = random_ids(60)
    assert torch.equal(minirea.load(one).logits(ids), minirea.load(many).logits(ids))


@pytest.mark.parametrize("fields", [{}, {"head_dim": 24}, {"num_key_value_heads": 4}])
def test_mistrals_own_format_gives_the_same_logits(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = tiny_model(mistral=True, sliding_window=None, **fields)
    theirs = write_checkpoint(tmp_path / "hugging-face", model)
    own = write_mistral(tmp_path / "mistral", model)
    ids = random_ids(120)
    logits = minirea.load(own, attention="full").logits(ids)
    assert torch.equal(logits, minirea.load(theirs, attention="full").logits(ids))
    torch.testing.assert_close(logits, oracle_logits(theirs, ids), atol=1e-4, rtol=0)
