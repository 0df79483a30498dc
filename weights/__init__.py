"""Weights: safetensors checkpoints, in Hugging Face's or Mistral's own naming, streamed to the device."""

from minirea.weights.fingerprint import fingerprint
from minirea.weights.loader import (
    checkpoint_dtype,
    empty_weights,
    load_weights,
    quantizing_bytes,
    stored_weight_bytes,
    weight_bytes,
)

__all__ = [
    "checkpoint_dtype",
    "empty_weights",
    "fingerprint",
    "load_weights",
    "quantizing_bytes",
    "stored_weight_bytes",
    "weight_bytes",
]
