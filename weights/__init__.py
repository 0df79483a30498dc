"""Weights: safetensors checkpoints, in Hugging Face's or Mistral's own naming, streamed to the device."""

from minirea.weights.fingerprint import fingerprint
from minirea.weights.loader import (
    checkpoint_dtype,
    empty_weights,
    kept_weight_bytes,
    load_weights,
    quantized_weight_bytes,
    quantizing_bytes,
    weight_bytes,
)

__all__ = [
    "checkpoint_dtype",
    "empty_weights",
    "fingerprint",
    "kept_weight_bytes",
    "load_weights",
    "quantized_weight_bytes",
    "quantizing_bytes",
    "weight_bytes",
]
