"""Checkpoints that come in 4 bits: GPTQ, AWQ and pack-quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from packed_checkpoints import KINDS, compressed_config, write_packed
from safetensors.torch import load_file, save_file
from testing import edit_json, oracle_logits, planned_beyond, random_ids, tiny_model, write_checkpoint

import minirea
from minirea import api
from minirea.checkpoint_config import load_config
from minirea.errors import InputError
from minirea.quantize import QuantizedMatrix
from minirea.weights import load_weights, loader

CPU = torch.device("cpu")


def widened(matrix: Any) -> torch.Tensor:
    return matrix.widen(torch.float32) if isinstance(matrix, QuantizedMatrix) else matrix.float()


@pytest.mark.parametrize("at_once", [1, loader.UNPACKED_AT_ONCE], ids=["many parts", "one part"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_that_the_checkpoint_means(
    kind: str, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit where a scale times a zero point is a bfloat16 number, and else but for its rounding."""
    monkeypatch.setattr(loader, "UNPACKED_AT_ONCE", at_once)
    packed, wide = write_packed(tmp_path, kind, attention_bias=True)
    weights = load_weights(packed, load_config(packed), CPU, torch.float16, quantize="int4")
    expected = load_weights(wide, load_config(wide), CPU, torch.float32)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        is_matrix = name.startswith("layers.") and tensor.dim() == 2
        assert isinstance(weights[name], QuantizedMatrix) == is_matrix
        found = widened(weights[name])
        if is_matrix:
            K, size = tensor.shape[1], weights[name].group_size
            assert size == (64 if (KINDS[kind][2] or K) % 64 == 0 else 32)
            scale_offset = weights[name].scale_offset.float().repeat_interleave(size, 1)[:, :K]
            assert bool(((found - tensor).abs() <= scale_offset[..., 1].abs() * 2**-8).all()), name
            exact = scale_offset[..., 1] == 0
            assert exact.any() or "rows" in kind
            tensor, found = tensor[exact], found[exact]
        torch.testing.assert_close(found, tensor.half().float() if not is_matrix else tensor, atol=0, rtol=0)


@pytest.mark.parametrize(("tied", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_near_those_of_transformers_with_the_weights(
    kind: str, tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    packed, wide = write_packed(tmp_path, kind, dtype, tie_word_embeddings=tied)
    files = api.read_model(packed, device="cpu", attention="full")
    llm = files.load(num_tokens=77)
    assert llm.model.quantize == "int4"
    assert llm.model.nbytes + planned_beyond(llm.model) == files.plan(77).weights
    found, expected = llm.logits(random_ids(60)), oracle_logits(wide, random_ids(60))
    assert (found - expected).norm() / expected.norm() < 0.03


def test_biases_that_are_zero_and_in_no_model_are_left_out(tmp_path: Path) -> None:
    packed, _ = write_packed(tmp_path, "gptq", attention_bias=True)
    tensors = load_file(packed / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_proj.bias"):  # which the model has
            tensor.zero_()
    bias = "model.layers.0.mlp.down_proj.bias"
    save_file(tensors | {bias: torch.zeros(64)}, packed / "model.safetensors")
    load_weights(packed, load_config(packed), CPU, quantize="int4")
    save_file(tensors | {bias: torch.ones(64)}, packed / "model.safetensors")
    with pytest.raises(InputError, match=f"holds '{bias}'"):
        load_weights(packed, load_config(packed), CPU, quantize="int4")


@pytest.mark.parametrize(
    ("kind", "edits", "named"),
    [
        ("gptq", {"bits": 3}, "bits is 3, expected 4"),
        ("gptq", {"bits": True}, "bits is true"),
        ("gptq", {"group_size": 48}, "group_size is 48, expected a multiple of 32"),
        ("gptq", {"group_size": 0}, "group_size is 0"),
        ("gptq", {"checkpoint_format": "marlin"}, 'checkpoint_format is "marlin", expected "gptq" or "gptq_v2"'),
        ("gptq", {"desc_act": 1}, "desc_act is 1"),
        ("awq", {"zero_point": False}, "zero_point is false"),
        ("awq", {"version": "gemv"}, 'version is "gemv"'),
        ("awq", {"group_size": None}, "group_size is null"),
        ("compressed-tensors", compressed_config(32, num_bits=8), "num_bits is 8"),
        ("compressed-tensors", compressed_config(32, type="float"), 'type is "float"'),
        ("compressed-tensors", compressed_config(32, strategy="block"), 'strategy is "block", expected "group" or "ch'),
        ("compressed-tensors", compressed_config(32, symmetric=0), "symmetric is 0"),
        ("compressed-tensors", {"config_groups": {}}, "config_groups is {}"),
        ("compressed-tensors", {"config_groups": {"a": {"targets": []}}}, "expected a group with weights"),
        ("compressed-tensors", {"config_groups": {"a": 1}}, "a is 1, expected an object"),
    ],
)
def test_other_kinds_are_refused_by_name(kind: str, edits: dict[str, Any], named: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, tiny_model())
    edit_json(directory / "config.json", quantization_config=KINDS[kind][0] | edits)
    with pytest.raises(InputError, match=rf"config\.json.*{named}"):
        load_config(directory)


Q0 = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(f"{Q0}.qzeros"), f"'{Q0}.qweight' comes without '{Q0}.qzeros'"),
        (lambda t: t.pop(f"{Q0}.scales"), f"comes without '{Q0}.scales'"),
        (lambda t: t.pop(f"{Q0}.qweight"), f"'{Q0}.weight'"),
        (lambda t: t.update({f"{Q0}.qweight": t[f"{Q0}.qweight"].view(torch.uint8)}), "qweight' is U8"),
        (lambda t: t.update({f"{Q0}.qweight": t[f"{Q0}.qweight"][:, :7]}), r"qweight' is I32 .* I32 \[8, 64\]"),
        (lambda t: t.update({f"{Q0}.qweight": t[f"{Q0}.qweight"][:7]}), r"qweight' is I32 .* expected I32 \[8, 64\]"),
        (lambda t: t.update({f"{Q0}.qweight": t[f"{Q0}.qweight"].flatten()}), r"qweight' is I32 .* I32 \[8, 64\]"),
        (lambda t: t.update({f"{Q0}.qzeros": t[f"{Q0}.qzeros"][:1]}), "qzeros' is I32 .*groups of 32"),
        (lambda t: t.update({f"{Q0}.scales": t[f"{Q0}.scales"].int()}), "scales' is I32 .* floating-point numbers"),
        (lambda t: t.update({f"{Q0}.scales": t[f"{Q0}.scales"] * torch.inf}), "scales' has a NaN or infinity"),
        (lambda t: t.update({f"{Q0}.g_idx": t[f"{Q0}.g_idx"].flip(0)}), "g_idx' mixes columns"),
        (lambda t: t.update({f"{Q0}.g_idx": t[f"{Q0}.g_idx"][:5]}), "g_idx' is I32"),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(160, 64)}),
            "up_proj.weight' (is also there|has dtype F32)",
        ),
        (
            lambda t: t.update({f"lm_head.{k}": t[f"{Q0}.{k}"].clone() for k in ("qweight", "qzeros", "scales")}),
            "lm_head",
        ),
        (
            lambda t: t.update({f"{Q0[:-6]}o2.{k}": t[f"{Q0}.{k}"].clone() for k in ("qweight", "qzeros", "scales")}),
            "o2.weight', for which the config has no place",
        ),
    ],
)
def test_what_does_not_fit_is_named(change: Any, named: str, tmp_path: Path) -> None:
    packed, _ = write_packed(tmp_path, "gptq")
    tensors = load_file(packed / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, packed / "model.safetensors")
    with pytest.raises(InputError, match=named):
        load_weights(packed, load_config(packed), CPU, quantize="int4")


@pytest.mark.parametrize(
    ("kind", "config", "name"),
    [
        ("gptq", {"desc_act": True}, "g_idx"),
        ("compressed-tensors", {}, "weight_zero_point"),
        ("compressed-tensors", compressed_config(32, actorder="group"), "weight_g_idx"),
    ],
)
def test_what_the_config_promises_is_there(kind: str, config: dict[str, Any], name: str, tmp_path: Path) -> None:
    packed, _ = write_packed(tmp_path, kind)
    edit_json(packed / "config.json", quantization_config=KINDS[kind][0] | config)
    tensors = load_file(packed / "model.safetensors")
    tensors.pop(f"{Q0}.{name}", None)
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(InputError, match=f"comes without '.*{name}'"):
        load_weights(packed, load_config(packed), CPU, quantize="int4")


@pytest.mark.parametrize("options", [{"quantize": "int8"}, {"quantize": "int4"}, {"gpus": 2}])
def test_they_are_used_as_they_are(options: dict[str, Any], tmp_path: Path) -> None:
    packed, _ = write_packed(tmp_path, "awq")
    with pytest.raises(InputError, match=r"come in 4 bits \(awq\)"):
        minirea.load(packed, **options)


def test_contexts_are_kept_and_opened(tmp_path: Path) -> None:
    packed, _ = write_packed(tmp_path, "awq")
    session = minirea.load(packed).session()
    session.prefill(random_ids(20))
    session.save(tmp_path / "kept")
    llm = minirea.load(packed)
    expected = session.generate(random_ids(5), max_tokens=5, ignore_eos=True).token_ids
    assert (
        llm.open_session(tmp_path / "kept").generate(random_ids(5), max_tokens=5, ignore_eos=True).token_ids == expected
    )
