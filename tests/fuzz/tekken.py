"""A small tekken.json: the single bytes and a few merges."""

from __future__ import annotations

import base64
from typing import Any


def tekken() -> dict[str, Any]:
    tokens = [*(bytes([byte]) for byte in range(256)), b"th", b"the", b" th", b"ou", b"se"]
    vocab = [{"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for i, t in enumerate(tokens)]
    special = [{"rank": i, "token_str": t, "is_control": True} for i, t in enumerate(("<unk>", "<s>", "</s>"))]
    config = {"pattern": r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+", "default_vocab_size": 265}
    return {"config": config | {"default_num_special_tokens": 4}, "vocab": vocab, "special_tokens": special}
