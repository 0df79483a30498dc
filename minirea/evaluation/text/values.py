"""Random keys and values of needles, and what a value looks like in an answer."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Sequence
from typing import Final

from minirea.errors import InputError

_TRIES: Final = 1000  # for each key or value
KINDS: Final = ("numbers", "words", "uuids")
# What a value looks like in an answer, so that 1234567 is not taken for 123456.
PATTERNS: Final = {
    "numbers": r"\d+",
    "words": r"[a-z]+-[a-z]+",
    "uuids": r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
}


def random_value(rng: random.Random, kind: str, words: Sequence[str], digits: int = 6) -> str:
    """A random number of `digits` digits (the first is not 0), two words with a hyphen, or a UUID (version 4)."""
    if kind == "numbers":
        return str(rng.randrange(10 ** (digits - 1), 10**digits))
    if kind == "words":
        return f"{rng.choice(words)}-{rng.choice(words)}"
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def distinct(make: Callable[[], str], count: int, text: str) -> list[str]:
    """`count` different results of `make` that do not occur in `text`."""
    return same_size(make, count, lambda _: 0, text)


def same_size(make: Callable[[], str], count: int, size: Callable[[str], int], text: str) -> list[str]:
    """Like `distinct`, all of one size: questions of one size give prompts of one length on a shared context.

    Raises:
        InputError: `make` does not have as many.
    """
    by_size: dict[int, dict[str, None]] = {}
    for _ in range(_TRIES * count):
        if (made := make()) not in text:
            group = by_size.setdefault(size(made), {})
            group[made] = None
            if len(group) == count:
                return list(group)
    raise InputError(f"there are not {count} different keys or values like {made!r}, expected fewer or longer ones")
