"""Seeded damage to model directories that knows their structure: JSON stays JSON, headers stay headers, mostly."""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from pathlib import Path
from typing import Any

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 127, 2**31 - 1, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e-300, 1e300),
    *(float("nan"), float("inf"), "", "a", "<s>", "\ud800", "\x1b[31m", "x" * 5000, "9" * 5000, [], {}, [[]], [None]),
    *({"a": []}, ["LlamaForCausalLM"], "float64", "yarn", "dynamic", "llama3", "linear", "default"),
]
STEPS: list[Any] = [
    {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
    {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"},
    {"type": "Strip", "content": "a", "start": 9, "stop": 9},
    {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "FixedLength", "length": 0},
    {"type": "Split", "pattern": {"Regex": r"\s+(?!\S)"}, "behavior": "MergedWithNext", "invert": True},
    {"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAABhYmM="},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False},
    {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "NFKC"}]},
    {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": []},
]
TEMPLATES = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**9 }}",
    "{{ messages[0].content }}" * 50,
    "{% if %}",
    "{{ ''.__class__.__mro__ }}",
]


def damage(directory: Path, rng: random.Random) -> list[str]:
    """Change one to three files of a directory in place; returns what was done."""
    names = sorted(path.name for path in directory.iterdir())
    return [_damage_file(directory / rng.choice(names), rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]


def _damage_file(path: Path, rng: random.Random) -> str:
    raw = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
    if rng.random() < 0.03 or not raw:
        return _replace(path, rng)
    if rng.random() < 0.15:
        path.write_bytes(_bytes(raw, rng))
        return f"{path.name}: bytes"
    try:
        return _structure(path, raw, rng)
    except ValueError:  # damaged before
        path.write_bytes(_bytes(raw, rng))
        return f"{path.name}: bytes"


def _structure(path: Path, raw: bytes, rng: random.Random) -> str:
    if path.suffix == ".json":
        values, done = _json(json.loads(raw), rng)
        path.write_text(json.dumps(values))
        return f"{path.name}: {done}"
    if path.suffix == ".safetensors":
        (length,) = struct.unpack("<Q", raw[:8])
        values, done = _json(json.loads(raw[8 : 8 + length]), rng)
        header = json.dumps(values).encode()
        size = len(header) if rng.random() < 0.9 else rng.choice((0, 7, 2**40, 2**63, len(raw) * 2))
        path.write_bytes(struct.pack("<Q", size) + header + raw[8 + length :])
        return f"{path.name}: header: {done}"
    path.write_bytes(_bytes(raw, rng))
    return f"{path.name}: bytes"


def _replace(path: Path, rng: random.Random) -> str:
    kind = rng.choice(("nothing", "directory", "pipe", "link", "device", "empty", "braces"))
    if path.is_dir() and not path.is_symlink():
        return f"{path.name}: stays a directory"
    path.unlink(missing_ok=True)
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in ("link", "device"):
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    elif kind != "nothing":
        path.write_text("" if kind == "empty" else "{" * 100_000)
    return f"{path.name}: {kind}"


def _bytes(raw: bytes, rng: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(data)) if data else 0
        kind = rng.randrange(4)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            data[at:at] = rng.randbytes(rng.randint(1, 9))
        elif kind == 2:
            del data[at : at + rng.randint(1, 99)]
        else:
            data[at:at] = data[at : at + rng.randint(1, 99)]
    return bytes(data[: rng.randint(0, len(data))] if rng.random() < 0.2 else data)


def _json(values: Any, rng: random.Random) -> tuple[Any, str]:
    """A value with a place or two in it changed."""
    root = [values]
    done = []
    for _ in range(rng.choice((1, 1, 2))):
        places = _places(root)
        parent, key, where = rng.choice(places)
        if rng.random() < 0.5:  # near the top, where meaning is
            parent, key, where = rng.choice([place for place in places if place[2].count("/") <= 3])
        kind = rng.randrange(6)
        if kind == 0 and len(parent) and parent is not root:
            del parent[key]
        elif kind == 1:
            other, other_key, _ = rng.choice(places)
            parent[key] = copy.deepcopy(other[other_key])
        elif kind == 2 and isinstance(parent[key], (int, float)):
            parent[key] = parent[key] * rng.choice((-1, 2, 3, 1000, 10**6)) + rng.choice((0, 1, -1))
        elif kind == 3:
            parent[key] = copy.deepcopy(rng.choice(STEPS))
        elif kind == 4 and isinstance(parent[key], str):
            parent[key] = rng.choice((parent[key] * 3, parent[key][:-1], parent[key] + "\x00", rng.choice(TEMPLATES)))
        else:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
        done.append(where)
    return root[0], ", ".join(done)


def _places(root: list[Any]) -> list[tuple[Any, Any, str]]:
    """Every place of a value: what holds it, by which key, and its path; of long lists the first and last ones."""
    found, pending = [], [(root, 0, "")]
    while pending and len(found) < 3000:
        parent, key, where = pending.pop()
        found.append((parent, key, where))
        value = parent[key]
        keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
        keys = [*keys[:20], *keys[-5:]] if len(keys) > 25 else keys
        pending += [(value, k, f"{where}/{k}"[:100]) for k in keys]
    return found
