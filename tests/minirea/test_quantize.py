"""Quantized matrices: rounding, packing and products; models that are quantized while they load."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from testing import random_ids, tiny_model, write_checkpoint, write_mistral, write_tokenizer

import minirea
from minirea import api, quantize
from minirea.checkpoint_config import load_config
from minirea.cli import main
from minirea.errors import InputError
from minirea.kernels.steps import reference as twins
from minirea.linear import add_linear, linear
from minirea.model import Model
from minirea.quantize import ZERO, QuantizedMatrix, bits_of, group_size, quantized_bytes
from minirea.weights import load_weights, loader

CPU = torch.device("cpu")
# N, K: whole blocks and groups, and sizes that neither divides.
SHAPES = [(64, 128), (70, 45), (1, 1), (3, 32), (130, 200), (33, 2304), (2, 2100)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized(wide_NK: torch.Tensor, bits: int, size: int = 0) -> QuantizedMatrix:
    """In groups as QuantizedMatrix.empty has them."""
    matrix = QuantizedMatrix.empty(*wide_NK.shape, bits, size, CPU)
    matrix.round(wide_NK)
    return matrix


def assert_same(found: QuantizedMatrix, expected: QuantizedMatrix) -> None:
    assert torch.equal(found.words, expected.words)
    assert torch.equal(found.scale_offset, expected.scale_offset)
    assert (found.units is None) == (expected.units is None)
    assert found.units is None or torch.equal(found.units, expected.units)


def relative_error(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.double() - right.double()).norm() / right.double().norm())


@pytest.mark.parametrize(("bits", "size"), [(8, 0), (4, 0), (4, 32)])
@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_is_within_half_a_step(
    shape: tuple[int, int], bits: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide_NK = random(*shape) + 0.3
    given = wide_NK.clone()
    matrix = quantized(wide_NK, bits, size)
    assert matrix.shape == shape
    assert matrix.nbytes == quantized_bytes(*shape, bits, size)
    step_NK = matrix.scales()[0].repeat_interleave(matrix.group_size, 1)[:, : shape[1]]
    q_NK = matrix.unpack()[:, : shape[1]]
    inside = (q_NK > 0) & (q_NK < 2**bits - 1)  # an end of the range may stand for what is beyond it
    off = (matrix.widen(torch.float64) - wide_NK.double()).abs()
    assert (off <= 0.5001 * step_NK)[inside].all()
    monkeypatch.setitem(quantize._AT_ONCE, "cpu", 1)  # row by row
    again = quantized(wide_NK, bits, size)
    assert torch.equal(wide_NK, given)
    assert_same(again, matrix)


@pytest.mark.parametrize(("K", "bits"), [(192, 8), (2048, 8), (2304, 8), (2112, 8), (96, 4), (2048, 4)])
def test_a_row_of_fields_is_where_the_layout_says(K: int, bits: int) -> None:
    """Values that are on a grid come back, each from its field."""
    size = group_size(K, bits)
    assert size == {8: 256 if K in (2048, 2304) else 64, 4: 32}[bits]
    q_NK = torch.randint(0, 2**bits, (5, K), generator=torch.Generator().manual_seed(1))
    q_NK[:, ::size], q_NK[:, 1::size] = 0, 2**bits - 1  # the whole range in each group
    wide_NK = (q_NK - ZERO[bits]) * 0.25
    matrix = quantized(wide_NK, bits)
    assert torch.equal(matrix.unpack().long(), q_NK)
    torch.testing.assert_close(matrix.widen(torch.float32), wide_NK, rtol=0, atol=1e-4)  # an offset of nearly zero
    four = 4 * 32 // bits  # columns of four words
    for k in (0, 1, 5, four - 1, four, size - 1, 2 * size + 5):
        word = matrix.words[:, k // four * 4 + k % 4].long()
        assert torch.equal(word >> bits * (k % four // 4) & (2**bits - 1), q_NK[:, k])


@pytest.mark.parametrize(("bits", "size"), [(8, 0), (4, 0), (4, 32)])
@pytest.mark.parametrize("value", [0.0, -3.0, 1e-30, 1e30])
def test_equal_weights_stay_what_they_are(value: float, bits: int, size: int) -> None:
    found = quantized(torch.full((3, 70), value), bits, size).widen(torch.float32)
    torch.testing.assert_close(found, torch.full((3, 70), value), rtol=2**-8, atol=0)


def test_codes_cost_a_hundredth_of_what_rounding_does() -> None:
    """In squared error, of normal weights; and groups of other sizes, of zeros and far from zero keep what they are."""
    wide_NK = random(64, 1024)
    coded, exact = (relative_error(quantized(wide_NK, 4, size).widen(torch.float32), wide_NK) ** 2 for size in (0, 32))
    assert coded < 1.02 * exact
    rows = torch.cat([wide_NK[:, :32], wide_NK[:, 32:64] * 1e-3, torch.zeros(64, 32), wide_NK[:, 64:96] * 0.1 - 3], 1)
    matrix = quantized(rows, 4)
    found, step_NG = matrix.widen(torch.float32), matrix.scales()[0]
    off = (found - rows).abs().unflatten(1, (4, 32)).amax(2)
    assert (off <= 0.6 * step_NG).all()
    assert (step_NG <= torch.tensor([0.5, 0.05, 0.05, 0.5])).all()
    assert (found[:, 64:96] == 0).all()


def test_regression_lowers_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    wide_NK = random(64, 256)
    errors = []
    for rounds in (0, 1, 4):
        monkeypatch.setitem(quantize._ROUNDS, 4, rounds)
        errors.append(relative_error(quantized(wide_NK, 4).widen(torch.float32), wide_NK))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.076  # of normal weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
def test_products_are_those_of_the_wide_matrix(bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch; what a CPU's kernels do is in test_cpu_products."""
    monkeypatch.setattr("minirea.kernels.cpu.compile.is_installed", lambda: False)
    monkeypatch.setattr("minirea.linear.WIDENED_AT_ONCE", 500)  # several parts
    matrix, x, bias, total = quantized(random(70, 45), bits), random(3, 45, seed=1), random(70, seed=2), random(3, 70)
    x, bias, total = x.to(dtype), bias.to(dtype), total.to(dtype)
    expected = F.linear(x, matrix.widen(dtype))
    torch.testing.assert_close(linear(x, matrix, bias), expected + bias)
    grown = total.clone()
    add_linear(grown, x, matrix)
    exact = total.double() + F.linear(x.double(), matrix.widen(dtype).double())
    torch.testing.assert_close(grown, exact.to(dtype))  # rounded once


@pytest.mark.parametrize(("at_once", "rows"), [(45 * 7, 7), (45 * 100, 96), (45 * 600, 512), (45 * 5000, 4096)])
def test_a_part_that_kernels_widen_begins_where_cublas_is_fast(
    at_once: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minirea.linear.WIDENED_BY_KERNELS", at_once)
    found = []

    def widen(part: QuantizedMatrix, wide_NK: torch.Tensor) -> None:
        found.append(part.shape[0])
        twins.widen(part, wide_NK)

    kernels = ModuleType("kernels")
    monkeypatch.setattr(kernels, "widen", widen, raising=False)
    monkeypatch.setattr("minirea.kernels.cpu.compile.is_installed", lambda: False)
    matrix, x = quantized(random(9001, 45), 8), random(3, 45)
    torch.testing.assert_close(linear(x, matrix, kernels=kernels), linear(x, matrix))
    assert found == [rows] * (9001 // rows) + [9001 % rows]


def checkpoint(directory: Path, dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Path:
    write_checkpoint(directory, tiny_model(**fields), dtype)
    write_tokenizer(directory)
    return directory


@pytest.mark.parametrize(("num_layers", "first"), [(1, 0), (2, 0), (3, 1), (5, 1), (6, 2), (32, 2), (80, 2)])
def test_the_first_layers_and_the_head_keep_8_bits(num_layers: int, first: int) -> None:
    def bits(choice: str, matrix: str) -> list[int]:
        return [bits_of(choice, f"layers.{layer}.{matrix}.weight", num_layers) for layer in range(num_layers)]

    for matrix in ("qkv", "o", "down"):
        assert bits("int4", matrix) == [8] * first + [4] * (num_layers - first)
    assert bits("int4", "gate_up") == [4] * num_layers
    assert bits("int8", "gate_up") == bits("int8", "down") == [8] * num_layers
    assert bits_of("int4", "head.weight", num_layers) == bits_of("int8", "head.weight", num_layers) == 8


@pytest.mark.parametrize("choice", ["int8", "int4"])
@pytest.mark.parametrize(("tied", "mistral"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("block_bytes", [1000, loader.STAGING_BYTES])
def test_loading_rounds_what_the_wide_weights_are(
    choice: str, tied: bool, mistral: bool, block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block by block, and with rows that change their order."""
    monkeypatch.setattr(loader, "STAGING_BYTES", block_bytes)
    model = tiny_model(tie_word_embeddings=tied, mistral=mistral, num_hidden_layers=3)
    write_mistral(tmp_path, model) if mistral else write_checkpoint(tmp_path, model)
    config = load_config(tmp_path)
    wide = load_weights(tmp_path, config, CPU, torch.float32)
    found = load_weights(tmp_path, config, CPU, torch.float32, quantize=choice)
    assert found.keys() == wide.keys()
    for name, tensor in wide.items():
        if tensor.dim() == 1 or name == "embed.weight":
            assert torch.equal(found[name], tensor), name
        else:
            later = name.startswith(("layers.1.", "layers.2.", "layers.0.gate_up"))
            expected = quantized(tensor, 4 if choice == "int4" and later else 8)
            assert found[name].bits == expected.bits
            assert_same(found[name], expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("choice", ["int8", "int4"])
@pytest.mark.parametrize("kernels", [False, True])
def test_a_quantized_model_is_that_of_its_wide_weights(
    kernels: bool, choice: str, tied: bool, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr("minirea.kernels.cpu.compile.is_installed", lambda: False)
    directory = checkpoint(tmp_path, tie_word_embeddings=tied, num_hidden_layers=3)
    files = api.read_model(directory, device="cpu", dtype=dtype, quantize=choice, attention="full")
    llm = files.load(num_tokens=77)
    assert llm.model.quantize == choice
    assert llm.model.nbytes == files.plan(77).weights
    weights = load_weights(directory, llm.config, CPU, llm.model.dtype, keep_half=True, quantize=choice)
    for name, matrix in weights.items():
        if isinstance(matrix, QuantizedMatrix):
            weights[name] = matrix.widen(torch.float32 if dtype == "float32" else torch.bfloat16)
    wide = api.LLM(Model(llm.config, weights, llm.model.attention), None)
    ids = random_ids(100)
    found, expected = llm.logits(ids), wide.logits(ids)
    assert relative_error(found, expected) < (0.03 if dtype == "bfloat16" else 1e-5)
    assert llm.generate(ids, max_tokens=5, ignore_eos=True).stats.quantize == choice


def test_a_redundant_head_is_compared_with_the_embedding(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, tie_word_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    from safetensors.torch import save_file

    save_file(tensors | {"lm_head.weight": embedding.clone()}, directory / "model.safetensors")
    minirea.load(directory, quantize="int8")
    save_file(tensors | {"lm_head.weight": embedding + 1}, directory / "model.safetensors")
    with pytest.raises(InputError, match="differs from the embedding"):
        minirea.load(directory, quantize="int8")


def test_a_nan_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    directory = checkpoint(tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][3, 2] = torch.nan
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(InputError, match=r"down_proj.*NaN"):
        minirea.load(directory, quantize="int4")


def test_contexts_belong_to_their_rounding(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path)
    session = minirea.load(directory, quantize="int8").session()
    session.prefill(random_ids(20))
    session.save(tmp_path / "kept")
    minirea.load(directory, quantize="int8").open_session(tmp_path / "kept")
    for other in (None, "int4"):
        with pytest.raises(InputError, match="quantize"):
            minirea.load(directory, quantize=other).open_session(tmp_path / "kept")


def test_the_command_line_tells_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--model", str(checkpoint(tmp_path)), "--device", "cpu", "--text", "abc"]
    arguments += ["--max-tokens", "3", "--quantize", "int4", "--ignore-eos"]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantize"] == "int4"
    assert main([*arguments, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["quantize"] == "int4"
    assert main(arguments) == 0
    assert "float32, int4 weights" in capsys.readouterr().err
    assert main([*arguments, "--dry-run"]) == 0
    assert "float32, int4 weights" in capsys.readouterr().out


@pytest.mark.parametrize(("value", "gpus"), [("int2", 1), ("", 1), ("int8", 2)])
def test_other_choices_are_refused(value: str, gpus: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="quantize is"):
        minirea.load(tmp_path, quantize=value, gpus=gpus)
    if value == "int8":
        words = ["generate", "--model", str(tmp_path), "--text", "x", "--quantize", value, "--gpus", str(gpus)]
        assert main(words) == 1
        assert "--quantize is 'int8' with --gpus 2, expected --gpus 1: " in capsys.readouterr().err
