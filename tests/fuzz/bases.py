"""The good model directories that tests/fuzz damages: one for each set of files that a directory may consist of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from fuzz.tekken import tekken
from packed_checkpoints import write_packed
from safetensors.torch import load_file, save_file
from testing import edit_json, tiny_model, write_checkpoint, write_mistral
from tokenizer_kinds import JSON_KINDS, train_sentencepiece

TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% endfor %}"
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
VOCAB_SIZE = 610


def write_bases(directory: Path) -> None:
    """One for each tokenizer format, of shards and an index, in 8 bits, in 4 bits, and in Mistral's form."""
    for name in ("byte_level", "llama_metaspace"):
        JSON_KINDS[name]().save(str(_write_model(directory / name) / "tokenizer.json"))
    train_sentencepiece(_write_model(directory / "sentencepiece") / "tokenizer.model", model_type="bpe")
    _write_shards(directory / "shards")
    _write_quantized(directory / "quantized")
    packed, _ = write_packed(directory, "gptq", vocab_size=VOCAB_SIZE)
    JSON_KINDS["byte_level"]().save(str(packed / "tokenizer.json"))
    shutil.rmtree(directory / "wide")
    write_mistral(directory / "mistral", tiny_model(mistral=True, vocab_size=VOCAB_SIZE))
    _write_json(directory / "mistral" / "tekken.json", tekken())


def _write_model(directory: Path, **options: Any) -> Path:
    """All but its tokenizer."""
    write_checkpoint(directory, tiny_model(vocab_size=VOCAB_SIZE), **options)
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE, "add_bos_token": True}
    _write_json(directory / "tokenizer_config.json", config)
    _write_json(directory / "added_tokens.json", {"<s>": 1})
    return directory


def _write_shards(directory: Path) -> None:
    _write_model(directory, shard_size="150KB", rope_parameters=YARN, max_position_embeddings=256)
    assert (directory / "model.safetensors.index.json").exists()
    JSON_KINDS["byte_level"]().save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    _write_json(directory / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": {"content": "</s>"}})


def _write_quantized(directory: Path) -> None:
    """Matrices in float8, half of them with one scale and half with one per row."""
    path = _write_model(directory) / "model.safetensors"
    stored = {}
    for name, tensor in load_file(path).items():
        stored[name] = tensor
        if name.endswith("_proj.weight"):
            largest = tensor.abs().amax(1, keepdim=True) if "mlp" in name else tensor.abs().max()
            stored[f"{name}_scale"] = largest / 448.0
            stored[name] = (tensor / stored[f"{name}_scale"]).to(torch.float8_e4m3fn)
    save_file(stored, path)
    weights = {"num_bits": 8, "type": "float"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    quantization = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}
    edit_json(directory / "config.json", quantization_config=quantization | {"ignore": ["lm_head"]})
    JSON_KINDS["byte_level"]().save(str(directory / "tokenizer.json"))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values))
