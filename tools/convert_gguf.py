"""A LLaMA in one GGUF file (llama.cpp's format) as a Hugging Face directory, which minirea loads.

    python tools/convert_gguf.py MODEL.gguf DIRECTORY

Quantized matrices are widened to bfloat16: what the file's quantization lost stays lost. It takes architecture "llama"
with a byte-level BPE tokenizer whose way to split text is known, and refuses all else by name. Needs the packages gguf
and safetensors.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file

from minirea.errors import InputError, MinireaError

# GGUF's names -> those of Hugging Face, of a layer and of the rest.
LAYER: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
MODEL: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# tokenizer.ggml.pre -> what comes before GPT-2's own split.
DIGITS: Final = {"type": "Digits", "individual_digits": True}
SPLITS: Final[dict[str, list[dict[str, Any]]]] = {"gpt-2": [], "smollm": [DIGITS]}
CONTROL_TOKEN: Final = 3  # of tokenizer.ggml.token_type


class Metadata:
    """What a GGUF file says of its model, by key."""

    def __init__(self, path: Path, reader: GGUFReader) -> None:
        self.path = path
        self._values = {key: field.contents() for key, field in reader.fields.items()}

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(key, default)

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            raise InputError(f"{self.path}: has no {key}")
        return self._values[key]

    def expect(self, key: str, expected: tuple[str, ...]) -> str:
        """The value of a key that must be one of `expected`."""
        found = self[key]
        if found not in expected:
            raise InputError(f"{self.path}: {key} is {found!r}, expected {' or '.join(map(repr, expected))}")
        return str(found)

    def refuse(self, prefix: str) -> None:
        """No key may begin like this."""
        found = next((key for key in self._values if key.startswith(prefix)), None)
        if found is not None:
            raise InputError(f"{self.path}: {found} is {self._values[found]!r}, which this tool does not convert")


def convert(source: Path, directory: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer's files. `directory` is complete or not there.

    Raises:
        InputError: `source` is no GGUF file of a model that can be converted, or `directory` is there.
    """
    if directory.exists():
        raise InputError(f"{directory}: is there already, expected the name of a new directory")
    try:
        reader = GGUFReader(source)
    except FileNotFoundError:
        raise InputError(f"{source}: no such file") from None
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError) as error:
        raise InputError(f"{source}: is no readable GGUF file ({error})") from None
    metadata = Metadata(source, reader)
    metadata.expect("general.architecture", ("llama",))
    metadata.refuse("llama.rope.scaling.")
    metadata.refuse("llama.expert_count")
    tensors = dict(_tensors(source, reader, metadata))
    files = {
        "config.json": config(metadata, tied="lm_head.weight" not in tensors),
        "generation_config.json": _token_ids(metadata),
        "tokenizer.json": tokenizer(metadata),
        "tokenizer_config.json": tokenizer_config(metadata),
    }
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, content in files.items():
        (partial / name).write_text(
            json.dumps(content, ensure_ascii=False, indent=None if name == "tokenizer.json" else 2)
        )
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    partial.rename(directory)


def config(metadata: Metadata, tied: bool) -> dict[str, Any]:
    """config.json."""
    heads, width = metadata["llama.attention.head_count"], metadata["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "head_dim": metadata.get("llama.attention.key_length", width // heads),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "max_position_embeddings": metadata["llama.context_length"],
        "rope_theta": metadata.get("llama.rope.freq_base", 10000.0),
        "rms_norm_eps": round(metadata["llama.attention.layer_norm_rms_epsilon"], 9),  # float32 in the file
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    } | _token_ids(metadata)


def tokenizer(metadata: Metadata) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE."""
    metadata.expect("tokenizer.ggml.model", ("gpt2",))
    split = SPLITS[metadata.expect("tokenizer.ggml.pre", tuple(SPLITS))]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = [{"id": token_id, **token} for token_id, token in _special_tokens(metadata).items()]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: token_id for token_id, token in enumerate(metadata["tokenizer.ggml.tokens"])},
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }


def tokenizer_config(metadata: Metadata) -> dict[str, Any]:
    """tokenizer_config.json: special tokens and the chat template."""
    tokens = metadata["tokenizer.ggml.tokens"]
    content: dict[str, Any] = {
        "added_tokens_decoder": {str(token_id): token for token_id, token in _special_tokens(metadata).items()},
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        "tokenizer_class": "GPT2Tokenizer",
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk")):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            content[f"{name}_token"] = tokens[token_id]
    if (template := metadata.get("tokenizer.chat_template")) is not None:
        content["chat_template"] = template
    return content


def _token_ids(metadata: Metadata) -> dict[str, Any]:
    names = (("bos", "bos"), ("eos", "eos"), ("padding", "pad"))
    found = {f"{name}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id") for key, name in names}
    return {key: token_id for key, token_id in found.items() if token_id is not None}


def _special_tokens(metadata: Metadata) -> dict[int, dict[str, Any]]:
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    pairs = enumerate(zip(tokens, types, strict=True))
    return {token_id: {"content": token} | flags for token_id, (token, kind) in pairs if kind == CONTROL_TOKEN}


def _tensors(source: Path, reader: GGUFReader, metadata: Metadata) -> Iterator[tuple[str, torch.Tensor]]:
    """Name of Hugging Face, and the tensor in bfloat16."""
    heads = metadata["llama.attention.head_count"]
    rotated = {"attn_q": heads, "attn_k": metadata.get("llama.attention.head_count_kv", heads)}
    for tensor in reader.tensors:
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        kind = layer[2] if layer else tensor.name.removesuffix(".weight")
        if kind not in (LAYER if layer else MODEL) or not tensor.name.endswith(".weight"):
            raise InputError(f"{source}: tensor {tensor.name} is none that this tool knows in a LLaMA")
        try:
            values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        except NotImplementedError:
            raise InputError(
                f"{source}: tensor {tensor.name} is {tensor.tensor_type.name}, which gguf cannot widen"
            ) from None
        if kind in rotated:
            values = half_split(values, rotated[kind])
        name = f"model.layers.{layer[1]}.{LAYER[kind]}" if layer else MODEL[kind]
        yield f"{name}.weight", torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)


def half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key matrix, [heads D, E], in the order of Hugging Face's RoPE.

    llama.cpp rotates neighbours, rows 2i and 2i + 1 of a head; Hugging Face rotates rows i and i + D/2.
    """
    by_pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return by_pairs.swapaxes(1, 2).reshape(rows.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the GGUF file")
    parser.add_argument("directory", type=Path, help="where the model goes; must not be there yet")
    arguments = parser.parse_args()
    try:
        convert(arguments.file, arguments.directory)
    except MinireaError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
