"""Each family of models against transformers: what its config.json may say, with the same weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing import edit_json, oracle_greedy, oracle_logits, random_ids, tiny_model, write_checkpoint

import minirea
from minirea.errors import InputError, MinireaWarning

IDS = random_ids(120)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
V5 = {"rope_type": "default", "rope_theta": 10000.0}


def assert_equals_transformers(directory: Path, num_tokens: int = 12) -> None:
    llm = minirea.load(directory, attention="full", chunk_size=120, local_size=120, allow_out_of_distribution=True)
    torch.testing.assert_close(llm.logits(IDS), oracle_logits(directory, IDS), atol=1e-4, rtol=0)
    generation = llm.generate(IDS, max_tokens=num_tokens, ignore_eos=True)
    assert generation.token_ids == oracle_greedy(directory, IDS, num_tokens)


# Family, fields of the model, edits of the saved config.json; an edit of None removes the key.
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}, {}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}, {}),
    "qwen2 of its first releases": (
        "Qwen2",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {
            "rope_parameters": None,
            "layer_types": None,
            "dtype": None,
            "rope_theta": 1e6,
            "sliding_window": 40,
            "use_sliding_window": False,
            "max_window_layers": 1,
            "torch_dtype": "float32",
        },
    ),
    "qwen2 yarn": ("Qwen2", {"rope_parameters": YARN | {"rope_theta": 1e6}}, {}),
    "qwen2 windows on": ("Qwen2", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 0}, {}),
    "qwen2 windows of no layer": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 2},
        {"layer_types": None},
    ),
    "qwen2 base model": ("Qwen2", {"tie_word_embeddings": True}, {"architectures": ["Qwen2Model"]}),
    "llama, no architectures": ("Llama", {}, {"architectures": []}),
    "llama, base model": ("Llama", {"tie_word_embeddings": True}, {"architectures": ["LlamaModel"]}),
    "llama, no trained context": ("Llama", {"max_position_embeddings": 2048}, {"max_position_embeddings": None}),
    "llama, attention bias": ("Llama", {"attention_bias": True}, {}),
    "llama, float64": ("Llama", {}, {"dtype": "float64"}),
    "mistral, absent window": ("Mistral", {"sliding_window": 4096}, {"sliding_window": None}),
    "yarn, mscale_all_dim 0": ("Llama", {"rope_parameters": V5 | YARN | {"mscale": 0.7, "mscale_all_dim": 0}}, {}),
    "yarn, mscale 0": ("Llama", {"rope_parameters": V5 | YARN | {"mscale": 0.0, "mscale_all_dim": 1.0}}, {}),
    "yarn, beta_fast 0": ("Llama", {"rope_parameters": V5 | YARN | {"beta_fast": 0, "beta_slow": 0}}, {}),
    "yarn, context length outside": (
        "Llama",
        {"rope_parameters": V5 | YARN | {"original_max_position_embeddings": 32}},
        {"rope_parameters": V5 | YARN, "original_max_position_embeddings": 32},
    ),
    "yarn by hand beside v5": ("Llama", {}, {"rope_scaling": YARN}),
    "linear by hand beside v5": ("Llama", {}, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "yarn and theta by hand beside v5": ("Llama", {}, {"rope_scaling": YARN | {"rope_theta": 10000.0}}),
    "rope_parameters empty": ("Llama", {}, {"rope_parameters": {}, "rope_scaling": YARN, "rope_theta": 5e5}),
    "rope_scaling empty": ("Llama", {"rope_parameters": V5 | YARN}, {"rope_scaling": {}}),
    "both empty": ("Llama", {}, {"rope_parameters": {}, "rope_scaling": {}, "rope_theta": 5e5}),
    "both the same": ("Llama", {"rope_parameters": V5 | YARN}, {"rope_scaling": V5 | YARN}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_text_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    family, fields, edits = VARIANTS[variant]
    model = tiny_model(family=family, **fields)
    directory = write_checkpoint(tmp_path, model)
    edit_json(directory / "config.json", **edits)
    if "base model" in variant:  # without "model." before every name, and without a head of its own
        weights = load_file(directory / "model.safetensors")
        save_file({name.removeprefix("model."): t for name, t in weights.items()}, directory / "model.safetensors")
    assert_equals_transformers(directory)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2"])
def test_half_precision_and_one_token_at_a_time(family: str, tmp_path: Path) -> None:
    """On a CPU with packed matrices; the tokens after the prompt are decode steps."""
    directory = write_checkpoint(tmp_path, tiny_model(family=family), torch.bfloat16, shard_size="50KB")
    assert_equals_transformers(directory, 40)


@pytest.mark.parametrize("window", [40, "wide"])
def test_a_stray_window_of_a_llama_is_none(window: Any, tmp_path: Path) -> None:
    """transformers' model ignores it too, but not its cache, so its text is that of the config without the key."""
    directory = write_checkpoint(tmp_path, tiny_model())
    expected, text = oracle_logits(directory, IDS), oracle_greedy(directory, IDS, 12)
    edit_json(directory / "config.json", sliding_window=window, use_sliding_window=True)
    llm = minirea.load(directory, attention="full", local_size=120)
    torch.testing.assert_close(llm.logits(IDS), expected, atol=1e-4, rtol=0)
    assert llm.generate(IDS, max_tokens=12, ignore_eos=True).token_ids == text
    assert llm.config.trained_context == 256


def test_a_qwen2_window_is_the_trained_context(tmp_path: Path) -> None:
    fields = {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 0}
    directory = write_checkpoint(tmp_path, tiny_model(family="Qwen2", **fields))
    assert minirea.load(directory).config.trained_context == 40


@pytest.mark.parametrize("tied", ["lm_head.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_a_tied_matrix_may_be_stored_under_either_name(family: str, tied: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, tiny_model(family=family, tie_word_embeddings=True))
    expected = oracle_logits(directory, IDS)
    weights = load_file(directory / "model.safetensors")
    weights[tied] = weights.pop("model.embed_tokens.weight")
    save_file(weights, directory / "model.safetensors")
    torch.testing.assert_close(minirea.load(directory, attention="full").logits(IDS), expected, atol=1e-4, rtol=0)


def test_tensors_beside_the_model_are_named_in_one_warning(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, tiny_model())
    expected = oracle_logits(directory, IDS)
    extra = {
        "v_head.summary.weight": torch.zeros(1, 64),
        "v_head.summary.bias": torch.zeros(1),
        "model.embed_tokens.position_ids": torch.arange(9),
        "model.layers.0.self_attn.mask": torch.ones(3, dtype=torch.bool),
    }
    save_file(load_file(directory / "model.safetensors") | extra, directory / "model.safetensors")
    with pytest.warns(MinireaWarning) as caught:
        llm = minirea.load(directory, attention="full")
    assert len(caught) == 1
    for text in ("v_head.summary.bias", "model.embed_tokens.position_ids", "and 1 more", str(directory)):
        assert text in str(caught[0].message)
    torch.testing.assert_close(llm.logits(IDS), expected, atol=1e-4, rtol=0)


def test_an_undamaged_model_warns_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minirea.load(write_checkpoint(tmp_path, tiny_model()))


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        (YARN, {"rope_type": "default", "rope_theta": 5e5}, ["rope_theta", "500000", "10000"]),
        (YARN, {"rope_type": "linear", "factor": 4.0}, ["rope_type", "linear", "yarn"]),
        ({"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 4.0}, ["factor", "4.0", "2.0"]),
        ({"type": "default"}, V5 | YARN, ["yarn", "default"]),
        (YARN, YARN | {"beta_fast": 16}, ["beta_fast", "16"]),
    ],
)
def test_two_ropes_that_differ_are_refused_with_both_values(
    old: dict[str, Any], new: dict[str, Any], named: list[str], tmp_path: Path
) -> None:
    directory = write_checkpoint(tmp_path, tiny_model(), rope_scaling=old, rope_parameters=new)
    with pytest.raises(InputError) as error:
        minirea.load(directory)
    for text in ("rope_parameters", "rope_scaling", *named):
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("edits", "named"),
    [
        ({"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1, "layer_types": None}, "max_window"),
        ({"use_sliding_window": True, "sliding_window": 40, "layer_types": ["full_attention"]}, "layer_types"),
        ({"use_sliding_window": True, "sliding_window": 40, "layer_types": ["full_attention", 3]}, "layer_types"),
        (
            {"use_sliding_window": True, "sliding_window": 40, "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types",
        ),
        ({"use_sliding_window": "yes"}, "use_sliding_window"),
        (
            {"use_sliding_window": True, "sliding_window": 40, "layer_types": None, "max_window_layers": -1},
            "max_window",
        ),
    ],
)
def test_qwen2_layers_that_differ_are_refused_by_name(edits: dict[str, Any], named: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, tiny_model(family="Qwen2"), **edits)
    with pytest.raises(InputError, match=named):
        minirea.load(directory)


@pytest.mark.parametrize(
    ("length", "expected"), [(1024, 1024), (10**30, 2048), (1e30, 2048), (0, 2048), ("many", 2048), (True, 2048)]
)
def test_an_absent_context_is_the_tokenizers_or_the_familys(length: Any, expected: int, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, tiny_model(), max_position_embeddings=None)
    (directory / "tokenizer_config.json").write_text(json.dumps({"model_max_length": length}))
    assert minirea.load(directory).config.max_position_embeddings == expected


def test_end_of_text_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, tiny_model(), eos_token_id=[2, 97])
    edit_json(directory / "generation_config.json", eos_token_id=[3, 4000])
    with pytest.warns(MinireaWarning) as caught:
        llm = minirea.load(directory)
    assert llm.eos_ids == {2, 3}
    messages = sorted(str(warning.message) for warning in caught)
    assert "/config.json: eos_token_id 97" in messages[0]
    assert "generation_config.json: eos_token_id 4000" in messages[1]
