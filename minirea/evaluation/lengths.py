"""Lengths in tokens: how they are written and read, and which samples of each length there are."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence


def parse_length(text: str) -> int:
    """Tokens from "4096", "4k" or "1m" (k is 1024, m is 1024 * 1024)."""
    match = re.fullmatch(r"([1-9]\d*)([kKmM]?)", text)
    if match is None:
        raise ValueError("a number of tokens such as 4096, 16k or 1m")
    return int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2].lower()]


def short_length(length: int) -> str:
    """4096 as 4K, the reverse of parse_length."""
    for size, unit in ((1024**2, "M"), (1024, "K")):
        if length % size == 0:
            return f"{length // size}{unit}"
    return str(length)


def grid(lengths: Sequence[int], samples: int) -> Iterator[tuple[int, int]]:
    """Every (length, sample), each length once and the shortest first."""
    return itertools.product(sorted(set(lengths)), range(samples))
