"""The loader against the safetensors library, and against files that are not what they claim to be."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from testing import part_of, tiny_config, to_mistral
from tqdm import tqdm

from minirea import progress, threads
from minirea.config import ModelConfig
from minirea.errors import InputError, MemoryLimitError, MinireaError, MinireaWarning, MissingFileError
from minirea.weights import checkpoint_dtype, load_weights, loader, stored_weight_bytes, weight_bytes
from minirea.weights import safetensors as stored

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EMBED, HEAD, Q0 = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"
# H * D, G * D, E, F and V are all different.
CONFIG = tiny_config(2, 20, hidden_size=16, head_dim=6, vocab_size=11)
BIASED = dataclasses.replace(CONFIG, qkv_bias=True, o_bias=True, mlp_bias=True)
TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True)


def hugging_face_tensors(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A random checkpoint, written out by hand so that it shares nothing with the table under test."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    width, mlp = config.hidden_size, config.mlp_size
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    tensors = {EMBED: random(config.vocab_size, width), "model.norm.weight": random(width)}
    if not config.tie_word_embeddings:
        tensors[HEAD] = random(config.vocab_size, width)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = random(width)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = random(width)
        modules = [
            ("self_attn.q_proj", q_width, width, config.qkv_bias),
            ("self_attn.k_proj", kv_width, width, config.qkv_bias),
            ("self_attn.v_proj", kv_width, width, config.qkv_bias),
            ("self_attn.o_proj", width, q_width, config.o_bias),
            ("mlp.gate_proj", mlp, width, config.mlp_bias),
            ("mlp.up_proj", mlp, width, config.mlp_bias),
            ("mlp.down_proj", width, mlp, config.mlp_bias),
        ]
        for module, rows, columns, has_bias in modules:
            tensors[f"{prefix}.{module}.weight"] = random(rows, columns)
            if has_bias:
                tensors[f"{prefix}.{module}.bias"] = random(rows)
    return tensors


def fused(tensors: dict[str, torch.Tensor], config: ModelConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What load_weights must return for Hugging Face tensors."""
    result = {"embed.weight": tensors[EMBED], "norm.weight": tensors["model.norm.weight"]}
    result["head.weight"] = tensors[EMBED if config.tie_word_embeddings else HEAD]
    for layer in range(config.num_layers):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        result[f"{ours}.attn_norm.weight"] = tensors[f"{theirs}.input_layernorm.weight"]
        result[f"{ours}.mlp_norm.weight"] = tensors[f"{theirs}.post_attention_layernorm.weight"]
        for name, modules, has_bias in (
            ("qkv", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], config.qkv_bias),
            ("o", ["self_attn.o_proj"], config.o_bias),
            ("gate_up", ["mlp.gate_proj", "mlp.up_proj"], config.mlp_bias),
            ("down", ["mlp.down_proj"], config.mlp_bias),
        ):
            for kind in ["weight", "bias"] if has_bias else ["weight"]:
                result[f"{ours}.{name}.{kind}"] = torch.cat([tensors[f"{theirs}.{m}.{kind}"] for m in modules])
    return {name: tensor.to(dtype) for name, tensor in result.items()}


def write(directory: Path, tensors: dict[str, torch.Tensor], file_name: str = "model.safetensors") -> Path:
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / file_name, metadata={"format": "pt"})
    return directory


def write_shards(directory: Path, tensors: dict[str, torch.Tensor], count: int = 3, index: bool = True) -> Path:
    weight_map: dict[str, str] = {}
    for shard in range(count):
        name = f"model-{shard + 1:05}-of-{count:05}.safetensors"
        part = dict(list(tensors.items())[shard::count])
        write(directory, part, name)
        weight_map |= dict.fromkeys(part, name)
    if index:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name
        assert not actual[name].requires_grad


# --- What well-formed checkpoints give --------------------------------------------------------------------------------


@pytest.mark.parametrize("block_bytes", [100, loader.STAGING_BYTES], ids=["many blocks", "one block"])
@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("stored", [*DTYPES, torch.float64], ids=str)
def test_every_dtype_pair_equals_the_library(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stored: torch.dtype,
    target: torch.dtype,
    block_bytes: int,
) -> None:
    monkeypatch.setattr(loader, "STAGING_BYTES", block_bytes)
    write(tmp_path, hugging_face_tensors(BIASED, stored))
    library = load_file(tmp_path / "model.safetensors")
    assert_same(load_weights(tmp_path, BIASED, CPU, target), fused(library, BIASED, target))


@pytest.mark.parametrize("config", [CONFIG, BIASED, TIED], ids=["plain", "biased", "tied"])
@pytest.mark.parametrize("layout", ["one file", "shards", "shards without index", "base model"])
def test_layouts(tmp_path: Path, config: ModelConfig, layout: str) -> None:
    tensors = hugging_face_tensors(config)
    if layout == "one file":
        write(tmp_path, tensors)
    elif layout == "base model":
        write(tmp_path, {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    else:
        write_shards(tmp_path, tensors, index=layout == "shards")
    weights = load_weights(tmp_path, config, CPU, torch.float32)
    assert_same(weights, fused(tensors, config, torch.float32))
    assert (weights["head.weight"] is weights["embed.weight"]) == config.tie_word_embeddings


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("head_first", [True, False])
def test_redundant_head_is_the_embedding(tmp_path: Path, head_first: bool, target: torch.dtype) -> None:
    tensors = hugging_face_tensors(TIED)
    head = {HEAD: tensors[EMBED].clone()}
    write(tmp_path, head if head_first else tensors, "model-00001-of-00002.safetensors")
    write(tmp_path, tensors if head_first else head, "model-00002-of-00002.safetensors")
    weights = load_weights(tmp_path, TIED, CPU, target)
    assert weights["head.weight"] is weights["embed.weight"]
    assert_same(weights, fused(tensors, TIED, target))


def test_mixed_dtypes_and_ignored_buffers(tmp_path: Path) -> None:
    tensors = hugging_face_tensors(CONFIG, torch.bfloat16)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
    tensors[EMBED] = tensors[EMBED].half()
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3),
        "model.rotary_emb.inv_freq": torch.ones(3, dtype=torch.int64),
        "rope.freqs": torch.ones(3),
    }
    write(tmp_path, tensors | buffers)
    assert_same(load_weights(tmp_path, CONFIG, CPU, torch.float32), fused(tensors, CONFIG, torch.float32))


@pytest.mark.parametrize("block_bytes", [100, loader.STAGING_BYTES], ids=["many blocks", "one block"])
@pytest.mark.parametrize("config", [CONFIG, BIASED, TIED], ids=["plain", "biased", "tied"])
def test_mistral_format_equals_hugging_face(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: ModelConfig, block_bytes: int
) -> None:
    monkeypatch.setattr(loader, "STAGING_BYTES", block_bytes)
    tensors = hugging_face_tensors(config)
    write(tmp_path, to_mistral(tensors, config.head_dim), "consolidated.safetensors")
    assert_same(load_weights(tmp_path, config, CPU, torch.float32), fused(tensors, config, torch.float32))


def test_mistral_queries_and_keys_rotate_as_in_mistral(tmp_path: Path) -> None:
    """q . k after half-split RoPE on our rows equals q . k after interleaved RoPE on the file's."""
    file = to_mistral(hugging_face_tensors(CONFIG), CONFIG.head_dim)
    write(tmp_path, file, "consolidated.safetensors")
    weights = load_weights(tmp_path, CONFIG, CPU, torch.float32)
    num_heads, head_dim = CONFIG.num_heads, CONFIG.head_dim
    q_rows, kv_rows = num_heads * head_dim, CONFIG.num_kv_heads * head_dim
    x_TE = torch.randn(9, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))
    angles_TD = torch.arange(9.0)[:, None] / 10.0 ** (torch.arange(head_dim // 2) / head_dim)
    turn_TD = torch.polar(torch.ones_like(angles_TD), angles_TD)[:, None]

    def interleaved(weight: torch.Tensor) -> torch.Tensor:
        pairs = (x_TE @ weight.T).view(9, -1, head_dim // 2, 2)
        return torch.view_as_real(torch.view_as_complex(pairs) * turn_TD).flatten(2)

    def half_split(weight: torch.Tensor) -> torch.Tensor:
        first, second = (x_TE @ weight.T).view(9, -1, head_dim).chunk(2, dim=-1)
        turned = torch.complex(first, second) * turn_TD
        return torch.cat([turned.real, turned.imag], dim=-1)

    def scores(q_THD: torch.Tensor, k_TGD: torch.Tensor) -> torch.Tensor:
        return torch.einsum("thd,shd->hts", q_THD, k_TGD.repeat_interleave(num_heads // CONFIG.num_kv_heads, 1))

    qkv = weights["layers.1.qkv.weight"]
    ours = scores(half_split(qkv[:q_rows]), half_split(qkv[q_rows : q_rows + kv_rows]))
    theirs = scores(
        interleaved(file["layers.1.attention.wq.weight"]), interleaved(file["layers.1.attention.wk.weight"])
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("has_config_json", [True, False])
def test_of_two_sets_one_is_read(tmp_path: Path, has_config_json: bool) -> None:
    """Hugging Face's where config.json describes them, else Mistral's."""
    hugging_face = hugging_face_tensors(CONFIG)
    mistral = {name: tensor + 1 for name, tensor in hugging_face.items()}
    write_shards(tmp_path, hugging_face)
    write(tmp_path, to_mistral(mistral, CONFIG.head_dim), "consolidated.safetensors")
    if has_config_json:
        (tmp_path / "config.json").write_text("{}")
    expected = hugging_face if has_config_json else mistral
    assert_same(load_weights(tmp_path, CONFIG, CPU, torch.float32), fused(expected, CONFIG, torch.float32))


def test_mistral_set_serves_a_directory_whose_other_shards_are_not_downloaded(tmp_path: Path) -> None:
    tensors = hugging_face_tensors(CONFIG)
    for shard in write_shards(tmp_path, tensors).glob("*.safetensors"):
        shard.unlink()
    (tmp_path / "config.json").write_text("{}")
    write(tmp_path, to_mistral(tensors, CONFIG.head_dim), "consolidated.safetensors")
    assert_same(load_weights(tmp_path, CONFIG, CPU, torch.float32), fused(tensors, CONFIG, torch.float32))


def test_checkpoint_dtype(tmp_path: Path) -> None:
    tensors = hugging_face_tensors(CONFIG, torch.bfloat16)
    tensors = {name: t.float() if t.dim() == 1 or "k_proj" in name else t for name, t in tensors.items()}
    write(tmp_path, tensors)
    assert checkpoint_dtype(tmp_path, CONFIG) == torch.bfloat16
    assert load_weights(tmp_path, CONFIG, CPU)["norm.weight"].dtype == torch.bfloat16
    declared = dataclasses.replace(CONFIG, dtype="float16")
    assert checkpoint_dtype(tmp_path, declared) == torch.float16
    assert load_weights(tmp_path, declared, CPU)["norm.weight"].dtype == torch.float16


def test_float64_checkpoints_run_in_float32(tmp_path: Path) -> None:
    write(tmp_path, hugging_face_tensors(CONFIG, torch.float64))
    assert checkpoint_dtype(tmp_path, CONFIG) == torch.float32


@pytest.mark.parametrize("config", [CONFIG, BIASED, TIED], ids=["plain", "biased", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_bytes_is_what_is_allocated(tmp_path: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    weights = load_weights(write(tmp_path, hugging_face_tensors(config)), config, CPU, dtype)
    storages = {tensor.data_ptr(): tensor.nbytes for tensor in weights.values()}
    assert weight_bytes(config, dtype) == sum(storages.values())


def test_progress_is_a_bar_of_all_bytes_on_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = hugging_face_tensors(CONFIG)
    write(tmp_path, tensors)
    load_weights(tmp_path, CONFIG, CPU)
    assert capsys.readouterr() == ("", "")
    bars: list[Any] = []

    def shown_at_once(**options: Any) -> Any:
        bars.append(tqdm(**options | {"delay": 0}))
        return bars[0]

    monkeypatch.setattr(progress, "tqdm", shown_at_once)
    load_weights(tmp_path, CONFIG, CPU, progress=True)
    assert bars[0].n == bars[0].total == sum(tensor.nbytes for tensor in tensors.values())
    out, err = capsys.readouterr()
    assert not out
    assert "weights" in err


@pytest.mark.gpu
@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("block_bytes", [100, loader.STAGING_BYTES], ids=["many blocks", "one block"])
def test_gpu_equals_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: torch.dtype, block_bytes: int) -> None:
    monkeypatch.setattr(loader, "STAGING_BYTES", block_bytes)
    tensors = hugging_face_tensors(TIED, torch.bfloat16)
    tensors[HEAD] = tensors[EMBED].clone()
    write(tmp_path, to_mistral(tensors, TIED.head_dim), "consolidated.safetensors")
    weights = load_weights(tmp_path, TIED, torch.device("cuda"), target)
    assert all(tensor.is_cuda for tensor in weights.values())
    assert_same({name: tensor.cpu() for name, tensor in weights.items()}, fused(tensors, TIED, target))


# --- Memory -----------------------------------------------------------------------------------------------------------

# ru_maxrss would not do: a child inherits its parent's peak through exec.
MEASURE = """
import dataclasses, re, sys, torch
from minirea.config import ModelConfig, RopeConfig
from minirea.weights import load_weights, weight_bytes

def resident(kind):
    return 1024 * int(re.search(kind + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

torch.set_num_threads(1)
small, large, target = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
small_config, large_config = (eval(text) for text in sys.argv[4:])
load_weights(small, small_config, torch.device("cpu"), target)  # code and buffers of a first use are not the model's
before = resident("VmRSS")
weights = load_weights(large, large_config, torch.device("cpu"), target)
print(resident("VmHWM") - before - weight_bytes(large_config, target))
"""


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    """230 MB in bfloat16, Mistral's format: rows of wq and wk change order on the way."""
    config = dataclasses.replace(
        CONFIG, num_layers=4, hidden_size=1024, mlp_size=4096, num_heads=16, head_dim=64, vocab_size=26000
    )
    tensors = to_mistral(hugging_face_tensors(config, torch.bfloat16), config.head_dim)
    return write(tmp_path_factory.mktemp("large"), tensors, "consolidated.safetensors"), config


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("target", ["bfloat16", "float32"])
def test_peak_memory_is_the_model_and_staging_buffers(
    tmp_path: Path, large_checkpoint: tuple[Path, ModelConfig], target: str
) -> None:
    directory, config = large_checkpoint
    small = write(tmp_path, to_mistral(hugging_face_tensors(CONFIG), CONFIG.head_dim), "consolidated.safetensors")
    command = [sys.executable, "-c", MEASURE, str(small), str(directory), target, repr(CONFIG), repr(config)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    largest, slack = config.vocab_size * config.hidden_size * 2, 8 * 2**20
    assert (directory / "consolidated.safetensors").stat().st_size > 200e6
    # A staging buffer for each reader, whatever the size of the model and of its tensors.
    assert int(result.stdout) < loader.READERS["cpu"] * loader.STAGING_BYTES + slack < largest


# --- Checkpoints that do not fit the config ---------------------------------------------------------------------------


def load_error(directory: Path, config: ModelConfig = CONFIG, target: torch.dtype = torch.float32) -> MinireaError:
    """The error of loading a bad checkpoint: always one line."""
    with pytest.raises(MinireaError) as caught:
        load_weights(directory, config, CPU, target)
    assert "\n" not in str(caught.value)
    return caught.value


def test_missing_tensors_are_named_and_counted(tmp_path: Path) -> None:
    tensors = hugging_face_tensors(CONFIG)
    gone = [name for name in tensors if "layers.1." in name]
    write(tmp_path, {name: tensor for name, tensor in tensors.items() if name not in gone})
    message = str(load_error(tmp_path))
    assert "lacks 'model.layers.1.input_layernorm.weight', 'model.layers.1.self_attn.q_proj.weight'" in message
    assert message.endswith(f"and {len(gone) - 3} more")


@pytest.mark.parametrize("gone", hugging_face_tensors(BIASED))
def test_each_missing_tensor_is_named(tmp_path: Path, gone: str) -> None:
    tensors = hugging_face_tensors(BIASED)
    del tensors[gone]
    assert f"lacks {gone!r}" in str(load_error(write(tmp_path, tensors), BIASED))


@pytest.mark.parametrize("gone", ["tok_embeddings.weight", "layers.0.attention.wq.weight", "norm.weight"])
def test_missing_tensors_are_named_in_the_checkpoints_spelling(tmp_path: Path, gone: str) -> None:
    tensors = to_mistral(hugging_face_tensors(CONFIG), CONFIG.head_dim)
    del tensors[gone]
    assert f"lacks {gone!r}" in str(load_error(write(tmp_path, tensors, "consolidated.safetensors")))


@pytest.mark.parametrize("name", hugging_face_tensors(BIASED))
def test_each_misshapen_tensor_is_named(tmp_path: Path, name: str) -> None:
    tensors = hugging_face_tensors(BIASED)
    expected = list(tensors[name].shape)
    tensors[name] = torch.zeros(expected[0] + 1, *expected[1:])
    message = str(load_error(write(tmp_path, tensors), BIASED))
    assert f"tensor {name!r} has shape {[expected[0] + 1, *expected[1:]]}, expected {expected}" in message


def test_transposed_tensor_is_misshapen(tmp_path: Path) -> None:
    tensors = hugging_face_tensors(CONFIG)
    tensors[Q0] = tensors[Q0].T.contiguous()
    assert f"{Q0!r} has shape [16, 24], expected [24, 16]" in str(load_error(write(tmp_path, tensors)))


@pytest.mark.parametrize(
    "extra",
    [
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.00.self_attn.q_proj.weight",
        "model.layers.*.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "layers.0.attention.wq.lora_A",
        "model.norm.bias",
        "norm.bias",
        "lm_head.bias",
        "output.bias",
    ],
)
def test_parameters_of_another_model_are_named(tmp_path: Path, extra: str) -> None:
    """Without them the results would be others, and not those of any model."""
    message = str(load_error(write(tmp_path, hugging_face_tensors(CONFIG) | {extra: torch.ones(24)})))
    assert f"holds {extra!r}, for which the config has no place" in message


@pytest.mark.parametrize("extra", ["score.weight", "v_head.summary.bias", "line\nbreak\ud7ff", "a" * 5000])
def test_tensors_beside_the_model_are_warned_of(tmp_path: Path, extra: str) -> None:
    tensors = hugging_face_tensors(CONFIG)
    write(tmp_path, tensors | {extra: torch.full((24,), math.nan)})  # its values are not read
    with pytest.warns(MinireaWarning) as caught:
        weights = load_weights(tmp_path, CONFIG, CPU, torch.float32)
    assert_same(weights, fused(tensors, CONFIG, torch.float32))
    (message,) = (str(warning.message) for warning in caught)
    assert stored.brief(extra) in message
    assert message.isprintable()
    assert len(message) < 2000


OTHER_DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32),
    *(torch.uint64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2),
)


@pytest.mark.parametrize("name", ["buffer", "model.layers.0.self_attn.mask", "model.embed_tokens.position_ids"])
def test_buffers_of_every_other_dtype_are_warned_of(tmp_path: Path, name: str) -> None:
    """Wherever they are, and in any number: one warning."""
    tensors = hugging_face_tensors(CONFIG)
    write(tmp_path, tensors | {f"{name}_{i}": torch.zeros(3, 5, dtype=dtype) for i, dtype in enumerate(OTHER_DTYPES)})
    with pytest.warns(MinireaWarning) as caught:
        weights = load_weights(tmp_path, CONFIG, CPU, torch.float32)
    assert len(caught) == 1
    assert f"and {len(OTHER_DTYPES) - 3} more" in str(caught[0].message)
    assert_same(weights, fused(tensors, CONFIG, torch.float32))
    assert checkpoint_dtype(tmp_path, CONFIG) == torch.float32


@pytest.mark.parametrize("spelling", ["hugging face", "mistral"])
def test_a_tied_matrix_stored_as_the_head(tmp_path: Path, spelling: str) -> None:
    tensors = hugging_face_tensors(TIED)
    stored = {HEAD if name == EMBED else name: tensor for name, tensor in tensors.items()}
    if spelling == "mistral":
        write(tmp_path, to_mistral(stored, TIED.head_dim), "consolidated.safetensors")
    else:
        write(tmp_path, stored)
    weights = load_weights(tmp_path, TIED, CPU, torch.float32)
    assert weights["head.weight"] is weights["embed.weight"]
    assert_same(weights, fused(tensors, TIED, torch.float32))
    assert stored_weight_bytes(tmp_path, TIED, torch.float32) == weight_bytes(TIED, torch.float32)


def test_a_tied_matrix_stored_nowhere(tmp_path: Path) -> None:
    tensors = hugging_face_tensors(TIED)
    del tensors[EMBED]
    assert f"lacks {EMBED!r}" in str(load_error(write(tmp_path, tensors), TIED))


def test_unknown_names_are_shown_beside_the_missing_ones(tmp_path: Path) -> None:
    tensors = {name.replace("model.", "transformer."): t for name, t in hugging_face_tensors(CONFIG).items()}
    message = str(load_error(write(tmp_path, tensors)))
    assert f"lacks '{EMBED}'" in message
    assert "holds 'transformer." in message
    assert message.count("and 17 more") == 2


@pytest.mark.parametrize("where", ["one file", "another file", "another spelling"])
def test_duplicated_tensors_are_named(tmp_path: Path, where: str) -> None:
    tensors = hugging_face_tensors(CONFIG)
    if where == "one file":
        save_raw(tmp_path, b'{"a": 1, "' + EMBED.encode() + b'": {}, "' + EMBED.encode() + b'": {}}')
    elif where == "another file":
        write_shards(tmp_path, tensors, index=False)
        write(tmp_path, {EMBED: tensors[EMBED]}, "model-extra.safetensors")
    else:
        write(tmp_path, tensors | {"tok_embeddings.weight": tensors[EMBED].clone()})
    message = str(load_error(tmp_path))
    assert EMBED in message
    assert {"one file": "twice", "another file": "is also in", "another spelling": "also there as"}[where] in message


def test_tied_head_that_differs(tmp_path: Path) -> None:
    tensors = hugging_face_tensors(TIED)
    tensors[HEAD] = tensors[EMBED].clone()
    tensors[HEAD][-1, -1] += 1
    assert f"{HEAD!r} differs from the embedding" in str(load_error(write(tmp_path, tensors), TIED))


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [EMBED, Q0, "model.norm.weight"])
def test_values_that_are_not_finite(tmp_path: Path, name: str, value: float, target: torch.dtype) -> None:
    tensors = hugging_face_tensors(CONFIG)
    tensors[name].view(-1)[-1] = value
    message = str(load_error(write(tmp_path, tensors), target=target))
    assert f"model.safetensors: tensor {name!r} has a NaN or infinity" in message


def test_value_too_large_for_the_target_dtype(tmp_path: Path) -> None:
    tensors = hugging_face_tensors(CONFIG)
    tensors[Q0][3, 3] = 1e5
    load_weights(write(tmp_path, tensors), CONFIG, CPU, torch.float32)
    assert f"{Q0!r} has a NaN or infinity as float16" in str(load_error(tmp_path, target=torch.float16))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn, torch.bool], ids=str)
def test_quantized_weights_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = hugging_face_tensors(CONFIG)
    message = str(load_error(write(tmp_path, tensors | {Q0: tensors[Q0].to(dtype)})))
    assert f"{Q0!r} has dtype" in message
    assert "quantized weights are not supported" in message


def test_config_with_absurdly_many_layers(tmp_path: Path) -> None:
    """Two billion missing tensors are counted, not listed."""
    many = dataclasses.replace(CONFIG, num_layers=2**31 - 1)
    message = str(load_error(write(tmp_path, hugging_face_tensors(CONFIG)), many))
    assert f"and {9 * (2**31 - 3) - 3} more" in message


# --- Directories without the files they should hold -------------------------------------------------------------------


def drop(name: str) -> Callable[[Path], Any]:
    return lambda directory: (directory / name).unlink()


def put(name: str, content: bytes | str) -> Callable[[Path], Any]:
    return lambda directory: (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)


def replace(name: str, make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def change(directory: Path) -> None:
        drop(name)(directory)
        make(directory / name)

    return change


INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (drop(SECOND), MissingFileError, f"{INDEX}: .* is in '{SECOND}', which is not in"),
        (put(INDEX, '{"weight_map": {"a": "../../model.safetensors"}}'), MissingFileError, "'a' is in '../../model"),
        (put(INDEX, '{"weight_map": {"a": "/dev/zero"}}'), MissingFileError, "'a' is in '/dev/zero'"),
        (put(INDEX, '{"weight_map": {"a": "x\\u0000.safetensors"}}'), MissingFileError, "'a' is in"),
        (put(INDEX, '{"weight_map": {"a": ["b"]}}'), MissingFileError, r"'a' is in \['b'\]"),
        (put(INDEX, '{"weight_map": {}}'), InputError, f"{INDEX}: weight_map is {{}}, expected an object"),
        (put(INDEX, "{}"), InputError, f"{INDEX}: weight_map is absent"),
        (put(INDEX, "[]"), InputError, f"{INDEX}: holds a JSON list"),
        (put(INDEX, "{"), InputError, f"{INDEX}: not valid JSON"),
        (put(SECOND, b""), InputError, f"{SECOND}: holds 0 bytes, expected a safetensors file"),
        (replace(SECOND, Path.mkdir), InputError, f"{SECOND}: is a directory, expected a file with tensors"),
        (replace(SECOND, os.mkfifo), InputError, f"{SECOND}: is a named pipe, expected a file with tensors"),
        (
            replace(SECOND, lambda p: p.symlink_to("gone")),
            MissingFileError,
            f"{SECOND}: is a link to gone, which is not",
        ),
        (replace(SECOND, lambda p: p.symlink_to("/dev/zero")), InputError, f"{SECOND}: is a device, expected a file"),
        (replace(INDEX, os.mkfifo), InputError, f"{INDEX}: is a named pipe"),
        (replace(INDEX, lambda path: path.symlink_to("/dev/zero")), InputError, f"{INDEX}: is a device"),
        (replace(INDEX, lambda path: path.symlink_to("gone")), MissingFileError, f"{INDEX}: is a link to gone"),
    ],
)
def test_shards(tmp_path: Path, change: Callable[[Path], Any], kind: type[MinireaError], message: str) -> None:
    change(write_shards(tmp_path, hugging_face_tensors(CONFIG)))
    error = load_error(tmp_path)
    assert type(error) is kind
    assert re.search(message, str(error))


def test_index_alone_names_its_first_shard(tmp_path: Path) -> None:
    for shard in write_shards(tmp_path, hugging_face_tensors(CONFIG)).glob("*.safetensors"):
        shard.unlink()
    assert "'model-00001-of-00003.safetensors', which is not in" in str(load_error(tmp_path))


def test_missing_shard_without_an_index_names_its_tensors(tmp_path: Path) -> None:
    tensors = hugging_face_tensors(CONFIG)
    drop(SECOND)(write_shards(tmp_path, tensors, index=False))
    assert "lacks 'model.norm.weight'" in str(load_error(tmp_path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.gguf"])
def test_other_formats(tmp_path: Path, name: str) -> None:
    put(name, b"x")(tmp_path)
    error = load_error(tmp_path)
    assert isinstance(error, MissingFileError)
    assert f"holds {name}, expected *.safetensors files" in str(error)


def test_directory_that_is_none(tmp_path: Path) -> None:
    assert "holds no weights, expected *.safetensors files" in str(load_error(tmp_path))
    assert isinstance(load_error(tmp_path / "gone"), MissingFileError)
    put("file", b"")(tmp_path)
    assert "file: is a file, expected a model directory" in str(load_error(tmp_path / "file"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission(tmp_path: Path) -> None:
    write(tmp_path, hugging_face_tensors(CONFIG))
    (tmp_path / "model.safetensors").chmod(0)
    assert "model.safetensors: cannot be read: Permission denied" in str(load_error(tmp_path))


def test_disk_that_fails_and_file_that_shrinks_while_being_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, hugging_face_tensors(CONFIG))
    read = FileIO.readinto

    class FailingFile(FileIO):
        def readinto(self, buffer: Any) -> int:
            if len(buffer) > 1000:
                raise OSError(5, "Input/output error")
            return read(self, buffer)

    class ShrinkingFile(FileIO):
        def readinto(self, buffer: Any) -> int:
            return read(self, buffer[: len(buffer) // 2]) if self.tell() < 5000 else 0

    monkeypatch.setattr(stored, "FileIO", FailingFile)
    assert "model.safetensors: cannot be read: Input/output error" in str(load_error(tmp_path))
    monkeypatch.setattr(stored, "FileIO", ShrinkingFile)
    assert "it was cut short while it was being read" in str(load_error(tmp_path))


# --- Readers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of blocks, so that every reader has several."""
    monkeypatch.setattr(loader, "STAGING_BYTES", 100)


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


@pytest.mark.usefixtures("many_blocks")
def test_several_readers_work_and_none_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, hugging_face_tensors(CONFIG))
    busy = threading.Barrier(loader.READERS["cpu"])
    names: set[str] = set()

    class MeetingFile(FileIO):
        def readinto(self, buffer: Any) -> int:
            name = threading.current_thread().name
            if name.startswith("reader") and name not in names:
                names.add(name)
                busy.wait()  # until all readers read at the same time
            return super().readinto(buffer)

    monkeypatch.setattr(stored, "FileIO", MeetingFile)
    load_weights(tmp_path, CONFIG, CPU)
    assert len(names) == loader.READERS["cpu"]
    assert not reader_threads()


@pytest.mark.usefixtures("many_blocks")
def test_of_several_errors_the_first_in_the_file_is_reported(tmp_path: Path) -> None:
    tensors = hugging_face_tensors(CONFIG)
    names = list(tensors)
    for name in names:
        tensors[name].view(-1)[0] = math.nan
    write(tmp_path, tensors)
    first = min(names)  # the library writes tensors of one dtype in the order of their names
    for _ in range(5):
        assert f"tensor {first!r} has a NaN" in str(load_error(tmp_path))
    assert not reader_threads()


@pytest.mark.usefixtures("many_blocks")
def test_an_error_cancels_what_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers that have come to a quarter of the blocks wait for the main thread, which has an error as soon as the
    first block is there.
    """
    tensors = hugging_face_tensors(CONFIG)
    reads: list[int] = []
    limit: float = math.inf
    left = threading.Event()

    class CountingFile(FileIO):
        def readinto(self, buffer: Any) -> int:
            reads.append(len(buffer))
            assert len(reads) < limit or self.tell() == first or left.wait(600)
            return super().readinto(buffer)

    class Pool(ThreadPoolExecutor):
        def shutdown(self, *arguments: Any, **options: Any) -> None:
            left.set()
            super().shutdown(*arguments, **options)

    monkeypatch.setattr(stored, "FileIO", CountingFile)
    write(tmp_path, tensors)
    first = 8 + int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    load_weights(tmp_path, CONFIG, CPU, torch.float32)
    all_reads, limit = len(reads), 1.25 * len(reads)
    tensors[min(tensors)].view(-1)[0] = math.nan
    monkeypatch.setattr(threads, "ThreadPoolExecutor", Pool)
    load_error(write(tmp_path, tensors))
    assert left.is_set()
    assert len(reads) < 1.5 * all_reads


@pytest.mark.usefixtures("many_blocks")
def test_ctrl_c_stops_cleanly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, hugging_face_tensors(CONFIG))

    interrupted = threading.Event()

    def interrupt(*_: Any) -> None:  # what Python does, and the reader learns of it
        interrupted.set()
        raise KeyboardInterrupt

    numbers = itertools.count()

    class InterruptedFile(FileIO):
        def readinto(self, buffer: Any) -> int:
            if next(numbers) == 100:  # by now the main thread waits for readers
                os.kill(os.getpid(), signal.SIGINT)
                assert interrupted.wait(60)
            return super().readinto(buffer)

    monkeypatch.setattr(stored, "FileIO", InterruptedFile)
    gc.collect()  # an exception in a finalizer that strikes in between would be lost
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            load_weights(tmp_path, CONFIG, CPU, torch.float32)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not reader_threads()


def test_it_loads_under_inference_mode(tmp_path: Path) -> None:
    """The mode is a thread's own: readers must be able to fill tensors that the caller's mode made."""
    tensors = to_mistral(hugging_face_tensors(CONFIG, torch.bfloat16), CONFIG.head_dim)
    write(tmp_path, tensors, "consolidated.safetensors")
    with torch.inference_mode():
        inside = load_weights(tmp_path, CONFIG, CPU, torch.float32)
    assert_same(inside, load_weights(tmp_path, CONFIG, CPU, torch.float32))


def test_half_precision_matrices_can_be_kept(tmp_path: Path) -> None:
    """Only matrices, and only where all parts of a stacked one agree."""
    tensors = hugging_face_tensors(TIED, torch.bfloat16)
    tensors[Q0] = tensors[Q0].float()
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"].half()
    write(tmp_path, tensors)
    weights = load_weights(tmp_path, TIED, CPU, torch.float32, keep_half=True)
    assert {name: t.dtype for name, t in weights.items() if t.dtype != torch.bfloat16} == {
        "layers.1.down.weight": torch.float16,
        **dict.fromkeys(("layers.0.qkv.weight", "norm.weight"), torch.float32),
        **{f"layers.{layer}.{name}_norm.weight": torch.float32 for layer in (0, 1) for name in ("attn", "mlp")},
    }
    assert weights["head.weight"] is weights["embed.weight"]
    exact = fused(tensors, TIED, torch.float32)
    assert_same({name: t.float() for name, t in weights.items()}, exact)
    storages = {tensor.data_ptr(): tensor.nbytes for tensor in weights.values()}
    assert stored_weight_bytes(tmp_path, TIED, torch.float32) == sum(storages.values())


# --- Hostile files ----------------------------------------------------------------------------------------------------


def save_raw(directory: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    prefix = (len(text) if length is None else length).to_bytes(8, "little")
    (directory / "model.safetensors").write_bytes(prefix + text + data)
    return directory


def entry(begin: Any = 0, end: Any = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DESCRIBED = "model.safetensors: tensor 'a' is described as"


@pytest.mark.parametrize(
    ("header", "data_bytes", "length", "message"),
    [
        (b"", 0, 0, "not valid JSON"),
        (b"{}", 0, 3, "the header claims 3 bytes, expected at most 2"),
        (b"{}", 0, 2**63, "the header claims 9223372036854775808 bytes, expected at most 2"),
        (b"{}", 0, 2**64 - 1, "expected at most 2"),
        (b"{", 0, None, "the header is not valid JSON"),
        (b"\xff\xfe{}", 0, None, "the header is not valid JSON"),
        (b"[" * 100_000, 0, None, "the header is not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", 0, None, "the header is not valid JSON"),
        (b"[]", 0, None, "the header is a JSON list, expected an object"),
        (b"null", 0, None, "the header is a JSON NoneType"),
        (b'{"a": {"dtype": "F32", "dtype": "F16"}}', 0, None, "'dtype' is there twice"),
        ({"__metadata__": 1}, 0, None, "__metadata__ is 1, expected an object of strings"),
        ({"__metadata__": {"format": None}}, 0, None, r"__metadata__ is {'format': None}"),
        ({"a": 1}, 0, None, f"{DESCRIBED} 1"),
        ({"a": {}}, 0, None, f"{DESCRIBED} {{}}"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8]}}, 8, None, DESCRIBED),
        ({"a": entry(dtype=7)}, 8, None, DESCRIBED),
        ({"a": entry(shape=2)}, 8, None, DESCRIBED),
        ({"a": entry(shape=[-2])}, 8, None, DESCRIBED),
        ({"a": entry(shape=[2.0])}, 8, None, DESCRIBED),
        ({"a": entry(shape=[True, 2])}, 8, None, DESCRIBED),
        ({"a": entry(shape=[10**4000])}, 8, None, DESCRIBED),
        ({"a": entry(shape=[1] * 9)}, 4, None, DESCRIBED),
        ({"a": entry(begin=-8, end=0)}, 8, None, DESCRIBED),
        ({"a": entry(begin=None)}, 8, None, DESCRIBED),
        ({"a": entry(end="8")}, 8, None, DESCRIBED),
        ({"a": entry(dtype="F99")}, 8, None, "tensor 'a' has dtype 'F99', expected one of F64, F32, F16, BF16"),
        ({"a": entry(begin=8, end=0)}, 8, None, r"tensor 'a' has data_offsets \[8, 0\], expected 8 bytes"),
        ({"a": entry(shape=[3])}, 8, None, r"expected 12 bytes for F32 \[3\]"),
        ({"a": entry(dtype="F16")}, 8, None, r"expected 4 bytes for F16 \[2\]"),
        ({"a": entry(shape=[2**62] * 8)}, 8, None, "tensor 'a' has data_offsets"),
        ({"a": entry(), "b": entry(4, 12)}, 12, None, "tensor 'b' begins at byte .* it overlaps another tensor"),
        ({"a": entry(), "b": entry()}, 8, None, "tensor 'b' begins at byte .* it overlaps another tensor"),
        ({"a": entry(), "b": entry(12, 20)}, 20, None, "tensor 'b' begins at byte .* no tensor has the bytes between"),
        ({"a": entry(4, 12)}, 12, None, "tensor 'a' begins at byte"),
        ({"a": entry()}, 7, None, "tensor 'a' ends at byte .* is the download complete?"),
        ({"a": entry(end=2**62, shape=[2**60])}, 8, None, "tensor 'a' ends at byte"),
        ({"a": entry()}, 9, None, "model.safetensors: has .* bytes, but its header describes"),
        ({"rope.freqs": entry(8, 0, dtype="I64")}, 8, None, "tensor 'rope.freqs' has data_offsets"),
        ({}, 0, None, "lacks 'model.embed_tokens.weight'"),
        ({"a\n" * 1000: 1}, 0, None, r"tensor 'a\\n"),
        ({"\ud800": entry()}, 8, None, r"holds '\\ud800'"),
    ],
)
def test_hostile_files(tmp_path: Path, header: Any, data_bytes: int, length: int | None, message: str) -> None:
    save_raw(tmp_path, header, bytes(data_bytes), length)
    error = load_error(tmp_path)
    assert isinstance(error, InputError)
    assert len(str(error)) < 1000
    assert re.search(message, str(error))


def test_header_length_is_capped(tmp_path: Path) -> None:
    """A header that fits its file is still refused beyond the cap; the file is sparse."""
    path = tmp_path / "model.safetensors"
    path.write_bytes((stored.MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
    os.truncate(path, 2 * stored.MAX_HEADER_BYTES)
    assert "expected at most 100000000" in str(load_error(tmp_path))


def test_nothing_is_allocated_before_all_headers_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, hugging_face_tensors(CONFIG))
    last = tmp_path / "model-00003-of-00003.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("allocated"))
    assert "00003.safetensors: tensor" in str(load_error(tmp_path))


@pytest.mark.parametrize("allocator", ["cpu", "gpu"])
def test_out_of_memory_says_how_much_was_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allocator: str
) -> None:
    write(tmp_path, hugging_face_tensors(CONFIG))
    empty = torch.empty

    def fail(*_: Any, **__: Any) -> torch.Tensor:
        if allocator == "gpu":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(torch, "empty", fail)
    error = load_error(tmp_path)
    assert isinstance(error, MemoryLimitError)
    assert "the weights need 0.00 GB as float32, more than is free on cpu" in str(error)


def test_other_runtime_errors_are_not_taken_for_lack_of_memory(tmp_path: Path) -> None:
    write(tmp_path, hugging_face_tensors(CONFIG))
    with pytest.raises(RuntimeError) as caught:
        load_weights(tmp_path, CONFIG, torch.device("meta"), torch.float32)
    assert not isinstance(caught.value, MemoryError)


# --- One of several ranks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_bytes", [100, loader.STAGING_BYTES], ids=["many blocks", "one block"])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [CONFIG, BIASED, TIED], ids=["plain", "biased", "tied"])
def test_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: ModelConfig, target: torch.dtype, block_bytes: int
) -> None:
    """In both formats. Bytes of tensors that are read are those of the part."""
    monkeypatch.setattr(loader, "STAGING_BYTES", block_bytes)
    tensors = hugging_face_tensors(config)
    directories = [
        write(tmp_path / "hugging face", tensors),
        write(tmp_path / "mistral", to_mistral(tensors, config.head_dim), "consolidated.safetensors"),
    ]
    read: list[int] = []
    read_into = loader.read_into
    monkeypatch.setattr(loader, "read_into", lambda *args: (read.append(len(args[2])), read_into(*args)))
    for directory in directories:
        for rank in range(2):
            part = config.of_rank(rank, 2)
            expected = part_of(fused(tensors, config, target), config, rank, 2)
            read.clear()
            found = load_weights(directory, part, CPU, target)
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.equal(found[name], tensor), (directory.name, rank, name)
            held = {name: x for name, x in found.items() if name != "head.weight" or not config.tie_word_embeddings}
            assert sum(read) == 4 * sum(tensor.numel() for tensor in held.values())
            assert weight_bytes(part, target) == sum(tensor.nbytes for tensor in held.values())


def test_a_redundant_head_is_compared_where_it_is_held(tmp_path: Path) -> None:
    tensors: dict[str, Any] = hugging_face_tensors(TIED)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write(tmp_path, tensors)
    for rank in range(2):
        assert load_weights(tmp_path, TIED.of_rank(rank, 2), CPU)["head.weight"].shape[0] in (5, 6, 7)
    tensors["lm_head.weight"][-1] += 1
    write(tmp_path, tensors)
    with pytest.raises(InputError, match="differs from the embedding"):
        load_weights(tmp_path, TIED.of_rank(1, 2), CPU)


def test_features_that_do_not_divide_evenly() -> None:
    config = dataclasses.replace(CONFIG, num_heads=8, num_kv_heads=4, mlp_size=23)
    parts = [config.of_rank(rank, 4) for rank in range(4)]
    assert [part.mlp_size for part in parts] == [5, 6, 6, 6]
    assert sum(len(part.head_rows) for part in parts) == config.vocab_size


# --- Random damage ----------------------------------------------------------------------------------------------------

SMALL = dataclasses.replace(
    CONFIG, num_layers=1, hidden_size=2, mlp_size=1, num_heads=1, num_kv_heads=1, head_dim=2, vocab_size=3
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """A valid file with its end cut, bytes changed, added or removed, its length field or one header entry replaced."""
    header_end = 8 + int.from_bytes(valid[:8], "little")
    kind = draw(st.sampled_from(["cut", "flip", "insert", "remove", "length", "entry"]))
    if kind == "cut":
        boundaries = st.sampled_from([0, 1, 7, 8, 9, header_end - 1, header_end, header_end + 1, len(valid) - 1])
        return valid[: draw(boundaries | st.integers(0, len(valid)))]
    if kind == "length":
        return draw(st.integers(0, 2**64 - 1) | st.integers(0, 2 * header_end)).to_bytes(8, "little") + valid[8:]
    if kind == "entry":
        header = json.loads(valid[8:header_end])
        name = draw(st.sampled_from(sorted(header)))
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        value = draw(JSON_VALUES | st.sampled_from(["F16", "BF16", "I8", [0, 0], [2], [2**63]]))
        header[name] = draw(st.sampled_from([value, header[name] | {field: value}]))
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + valid[header_end:]
    if kind == "flip":
        changed = bytearray(valid)
        for at in draw(st.lists(st.integers(0, header_end - 1), min_size=1, max_size=3)):
            changed[at] = draw(st.integers(0, 255) | st.sampled_from(b'0123456789[]{},:" -.'))
        return bytes(changed)
    at = draw(st.integers(0, len(valid) - 1))
    if kind == "insert":
        return valid[:at] + draw(st.binary(min_size=1, max_size=9)) + valid[at:]
    return valid[:at] + valid[at + draw(st.integers(1, 9)) :]


@pytest.fixture(scope="module")
def damage_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("damage"), hugging_face_tensors(SMALL))


@pytest.fixture(scope="module")
def valid_file(damage_directory: Path) -> bytes:
    return (damage_directory / "model.safetensors").read_bytes()


@settings(max_examples=600, deadline=None)
@given(data=st.data())
def test_random_damage_never_crashes(damage_directory: Path, valid_file: bytes, data: st.DataObject) -> None:
    """Whatever the file: success or an error of ours, and never success where the library refuses the file."""
    path = damage_directory / "model.safetensors"
    path.write_bytes(data.draw(damaged(valid_file)))
    try:
        weights = load_weights(damage_directory, SMALL, CPU, torch.float32)
    except MinireaError:
        load_error(damage_directory, SMALL)
    else:
        assert_same(weights, fused(load_file(path), SMALL, torch.float32))
