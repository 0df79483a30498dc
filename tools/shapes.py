"""The shapes of well-known models, as their config.json says them, for measurements without a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parent.parent / "weights" / "demo"


def llama3(hidden: int, mlp: int, layers: int, heads: int, head_dim: int, factor: float, tied: bool) -> dict[str, Any]:
    """What the members of the LLaMA 3.1 and 3.2 family share, and where they differ."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 131072,
        "tie_word_embeddings": tied,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
    }


MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 32768,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": llama3(4096, 14336, 32, 32, 128, 8.0, tied=False),
    "llama-3.2-3b": llama3(3072, 8192, 28, 24, 128, 32.0, tied=True),
    "llama-3.2-1b": llama3(2048, 8192, 16, 32, 64, 32.0, tied=True),
    "mistral-7b": MISTRAL_7B,
    "smollm2-135m": SMOLLM2_135M,
    "demo": json.loads((DEMO / "config.json").read_text()),
}


def named(name: str, layers: int | None = None) -> dict[str, Any]:
    """The config.json of a shape, with another number of layers where one is given."""
    config = dict(SHAPES[name])
    if layers is not None:
        config["num_hidden_layers"] = layers
    return config
