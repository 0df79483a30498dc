"""Checkpoints that come quantized to 8 bits: the same model as one that stores the products of values and scales."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing import edit_json, oracle_logits, part_of, random_ids, tiny_model, write_checkpoint

import minirea
from minirea.checkpoint_config import load_config
from minirea.errors import InputError
from minirea.weights import load_weights, loader, stored_weight_bytes, weight_bytes

IDS = random_ids(60)
CPU = torch.device("cpu")
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
FLOAT_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}},
    "ignore": ["lm_head"],
}
INT_CONFIG = FLOAT_CONFIG | {"format": "int-quantized"}
FP8_CONFIG = {"quant_method": "fp8", "activation_scheme": "static"}
FBGEMM_CONFIG = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}


def quantize(
    weight: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and a scale of `shape`: one number, or one per row where a dimension is -1."""
    per_row = -1 in shape
    largest = weight.abs().amax(1, keepdim=True) if per_row else weight.abs().max()
    scale = (largest / LARGEST[dtype]).to(scale_dtype)
    values = weight / scale.float()
    values = values.round().clamp(-127, 127) if dtype == torch.int8 else values.clamp(-448, 448)
    return values.to(dtype), scale.reshape(shape)


def write_quantized(
    directory: Path,
    quantization_config: dict[str, Any],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    scale_dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> tuple[Path, Path]:
    """A quantized checkpoint, and one in float32 that holds the products."""
    model = tiny_model(**fields)
    quantized, wide = write_checkpoint(directory / "quantized", model), write_checkpoint(directory / "wide", model)
    tensors = load_file(wide / "model.safetensors")
    stored, products = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if "_proj.weight" in name:
            stored[name], scale = quantize(tensor, dtype, shape, scale_dtype)
            stored[f"{name}_scale"] = scale
            factor = scale.float().view(-1, 1) if -1 in shape else scale.float().view(())
            products[name] = stored[name].float() * factor
    save_file(stored, quantized / "model.safetensors")
    save_file(products, wide / "model.safetensors")
    edit_json(quantized / "config.json", quantization_config=quantization_config)
    return quantized, wide


KINDS: dict[str, tuple[dict[str, Any], torch.dtype, tuple[int, ...], torch.dtype]] = {
    "compressed-tensors, float per row": (FLOAT_CONFIG, torch.float8_e4m3fn, (-1, 1), torch.bfloat16),
    "compressed-tensors, float per tensor": (FLOAT_CONFIG, torch.float8_e4m3fn, (1,), torch.bfloat16),
    "compressed-tensors, int per row": (INT_CONFIG, torch.int8, (-1, 1), torch.float32),
    "fp8 per tensor": (FP8_CONFIG, torch.float8_e4m3fn, (), torch.float32),
    "fbgemm_fp8": (FBGEMM_CONFIG, torch.float8_e4m3fn, (-1, 1), torch.float32),
    "a scale per row in one dimension": (FBGEMM_CONFIG, torch.float8_e4m3fn, (-1,), torch.float16),
}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers_with_the_products(kind: str, tmp_path: Path) -> None:
    quantized, wide = write_quantized(tmp_path, *KINDS[kind])
    llm = minirea.load(quantized, attention="full")
    torch.testing.assert_close(llm.logits(IDS), oracle_logits(wide, IDS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("block_bytes", [100, loader.STAGING_BYTES], ids=["many blocks", "one block"])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_products(
    kind: str, target: torch.dtype, block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "STAGING_BYTES", block_bytes)
    quantized, wide = write_quantized(tmp_path, *KINDS[kind], attention_bias=True)
    weights = load_weights(quantized, load_config(quantized), CPU, target)
    expected = load_weights(wide, load_config(wide), CPU, target)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_quantized_matrices(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "STAGING_BYTES", 300)
    quantized, _ = write_quantized(tmp_path, *KINDS[kind])
    config = load_config(quantized)
    whole = load_weights(quantized, config, CPU, torch.float32)
    for rank in range(2):
        found = load_weights(quantized, config.of_rank(rank, 2), CPU, torch.float32)
        for name, tensor in part_of(whole, config, rank, 2).items():
            assert torch.equal(found[name], tensor) or name == "head.weight", (rank, name)
        rows = config.of_rank(rank, 2).head_rows
        assert torch.equal(found["head.weight"], whole["head.weight"][rows.start : rows.stop])


def test_the_memory_plan_counts_what_is_allocated(tmp_path: Path) -> None:
    quantized, _ = write_quantized(tmp_path, *KINDS["fbgemm_fp8"])
    config = load_config(quantized)
    for keep_half in (False, True):
        weights = load_weights(quantized, config, CPU, torch.float32, keep_half=keep_half)
        storages = {tensor.data_ptr(): tensor.nbytes for tensor in weights.values()}
        assert sum(storages.values()) == weight_bytes(config, torch.float32)
        assert sum(storages.values()) == stored_weight_bytes(quantized, config, torch.float32)


def test_scales_of_activations_and_cache_are_left_out(tmp_path: Path) -> None:
    quantized, wide = write_quantized(tmp_path, *KINDS["fp8 per tensor"])
    tensors = load_file(quantized / "model.safetensors")
    block = "model.layers.0.self_attn"
    names = ("q_proj.input_scale", "q_proj.output_scale", "o_proj.input_scale_ub", "q_scale", "k_scale", "v_scale")
    save_file(tensors | {f"{block}.{name}": torch.ones(1) for name in names}, quantized / "model.safetensors")
    expected = load_weights(wide, load_config(wide), CPU, torch.float32)
    weights = load_weights(quantized, load_config(quantized), CPU, torch.float32)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("edits", "named"),
    [
        *(({"quant_method": method, "bits": 4}, f'quant_method is "{method}"') for method in ("bitsandbytes", "mxfp4")),
        ({"bits": 4}, "quant_method is absent"),
        ({"quant_method": ["fp8"]}, "quant_method"),
        (FLOAT_CONFIG | {"format": "nvfp4-pack-quantized"}, 'format is "nvfp4-pack-quantized"'),
        (FLOAT_CONFIG | {"format": None}, "format is null"),
        (FLOAT_CONFIG | {"format": {"a": 1}}, "format"),
        (FP8_CONFIG | {"weight_block_size": [128, 128]}, r"weight_block_size is \[128, 128\]"),
        ("fp8", '_config is "fp8"'),
    ],
)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_other_methods_are_refused_by_name(edits: Any, named: str, key: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, tiny_model())
    edit_json(directory / "config.json", **{key: edits})
    with pytest.raises(InputError, match=rf"config\.json.*{named}"):
        load_config(directory)


Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(f"{Q0}_scale"), f"'{Q0}' has dtype F8_E4M3, expected .* with a weight_scale"),
        (lambda t: t.update({f"{Q0}_scale": torch.ones(5)}), f"'{Q0}_scale' is F32 \\[5\\], expected"),
        (lambda t: t.update({f"{Q0}_scale": torch.ones(1, 64)}), f"'{Q0}_scale' is F32 \\[1, 64\\], expected"),
        (lambda t: t.update({f"{Q0}_scale": torch.ones(1, dtype=torch.int32)}), f"'{Q0}_scale' is I32"),
        (lambda t: t.update({f"{Q0}_scale": torch.tensor([float("nan")])}), f"'{Q0}' has a NaN"),
        (lambda t: t.update({Q0: t[Q0].view(torch.uint8)}), f"'{Q0}' has dtype U8"),
        (lambda t: t.update({Q0: torch.ones(64, 64)}), f"holds '{Q0}_scale'"),
        (
            lambda t: t.update({f"{Q0[:-7]}.weight_zero_point": torch.ones(64, 1, dtype=torch.int8)}),
            "weight_zero_point",
        ),
    ],
)
def test_what_does_not_fit_is_named(change: Any, named: str, tmp_path: Path) -> None:
    quantized, _ = write_quantized(tmp_path, *KINDS["fbgemm_fp8"])
    tensors = load_file(quantized / "model.safetensors")
    change(tensors)
    save_file(tensors, quantized / "model.safetensors")
    with pytest.raises(InputError, match=named):
        load_weights(quantized, load_config(quantized), CPU, torch.float32)


def test_values_without_a_method_in_the_config_are_refused(tmp_path: Path) -> None:
    quantized, _ = write_quantized(tmp_path, *KINDS["fbgemm_fp8"])
    config = dataclasses.replace(load_config(quantized), quantized=False)
    with pytest.raises(InputError, match="quantized weights are not supported"):
        load_weights(quantized, config, CPU, torch.float32)
