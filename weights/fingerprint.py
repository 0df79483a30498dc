"""Which model a directory holds, in a few digits that take milliseconds and not a reading of all weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Final

from minirea.config import ModelConfig
from minirea.weights.safetensors import StoredTensor, open_file, read_headers, read_into

# Of a tensor's bytes, at even distances from its first to its last. Training and merging change every value of a
# matrix, so that a few places tell one model from another.
SAMPLES: Final = 4
SAMPLE_BYTES: Final = 256
_NOT_OF_THE_WEIGHTS: Final = ("dtype", "eos_token_ids")


def fingerprint(directory: str | Path, config: ModelConfig) -> str:
    """32 hexadecimal digits that are equal for equal models, in whatever files and directory they lie.

    A SHA-256 of the config's fields that are not at their defaults, and for every tensor, by name, of its name, stored
    dtype, shape and SAMPLES pieces of SAMPLE_BYTES. An edit that leaves all these places alone goes unseen.

    Raises what load_weights raises for the files' headers.
    """
    fields = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in _NOT_OF_THE_WEIGHTS and getattr(config, field.name) != field.default
    }
    digest = hashlib.sha256(json.dumps(fields, default=dataclasses.asdict, sort_keys=True).encode())
    for tensor in sorted(read_headers(Path(directory)), key=lambda tensor: tensor.name):
        digest.update(json.dumps([tensor.name, tensor.stored_as, tensor.shape]).encode())
        digest.update(_sample(tensor))
    return digest.hexdigest()[:32]


def _sample(tensor: StoredTensor) -> bytes:
    size = min(SAMPLE_BYTES, tensor.nbytes)
    sampled = bytearray(SAMPLES * size)
    with open_file(tensor.path) as file:
        for index in range(SAMPLES if size else 0):
            at = tensor.offset + (tensor.nbytes - size) * index // (SAMPLES - 1)
            read_into(file, at, memoryview(sampled)[index * size : (index + 1) * size])
    return bytes(sampled)
