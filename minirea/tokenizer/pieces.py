"""Long texts in pieces: libraries take some 115 bytes of memory for each character that they encode at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, Final

from minirea.errors import MemoryLimitError
from minirea.tokenizer.config import AddedToken

PIECE_CHARACTERS: Final = 2**20
_CHARACTER_BYTES: Final = 115  # measured: what `tokenizers` holds for one, 80 of them for where it came from
_ID_BYTES: Final = 10  # of a list of integers, at four characters a token

# A space between two letters, and the white space of vocabularies behind a letter.
_CUT: Final = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")
_JOINED: Final = re.compile(r"[A-Za-z][ ▁Ġ]")

# Patterns that split a text into words, as published models have them, none of which matches across a cut: GPT-2's is
# what ByteLevel has built in; in the order of this tuple Llama 3's, Qwen 2's and that of Mistral's tekken files.
_LETTERS_OF_TEKKEN: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
)
_LETTERS_OF_LLAMA: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
WORD_PATTERNS: Final = (
    rf"{_LETTERS_OF_LLAMA}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    rf"{_LETTERS_OF_LLAMA}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    rf"{_LETTERS_OF_TEKKEN}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
)
_NORMALIZERS: Final = {"Sequence", "Prepend", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Replace"}


def pieces(text: str, may_cut: bool) -> Iterator[str]:
    """The text, or parts of it that begin with a space between letters, where nothing reaches across.

    Raises:
        MemoryLimitError: a piece cannot be cut and is too long to be encoded at once.
    """
    start = 0
    while start < len(text):
        end = _cut_before(text, start) if may_cut and len(text) - start > PIECE_CHARACTERS else len(text)
        if end - start > PIECE_CHARACTERS:
            _check_memory(end - start, len(text))
        yield text[start:end]
        start = end


def _cut_before(text: str, start: int) -> int:
    """The last place to cut within a piece, else the first beyond it, else the end of the text."""
    limit = start + PIECE_CHARACTERS
    for width in (2**12, PIECE_CHARACTERS):
        found = [match.start() for match in _CUT.finditer(text, max(start + 1, limit - width), limit)]
        if found:
            return found[-1]
    later = _CUT.search(text, limit)
    return later.start() if later else len(text)


def _check_memory(piece: int, whole: int) -> None:
    import torch

    from minirea.memory import available_bytes, human

    needed = piece * _CHARACTER_BYTES + whole * _ID_BYTES
    available = available_bytes(torch.device("cpu"))
    if available is not None and needed > available:
        raise MemoryLimitError(
            f"text: {piece:,} characters without a word in them that could be encoded apart take {human(needed)} of "
            f"memory to tokenize, {human(available)} is free; shorten the text"
        )


def may_cut_tokens(added: Iterable[AddedToken | Any]) -> bool:
    """Whether no added token, with the white space that it swallows, reaches across a cut."""
    return not any(
        _JOINED.search(token.content)
        or (token.rstrip and token.content[-1:].isalpha())
        or (token.lstrip and token.content[:1].isalpha())
        for token in added
    )


def may_cut_vocabulary(spellings: Iterable[str]) -> bool:
    """Whether no token reaches across a cut, so that each side is tokenized as if it were alone."""
    return not any(map(_JOINED.search, spellings))


def may_cut_normalizer(steps: list[dict[str, Any]]) -> bool:
    """Whether what these steps make of each side of a cut does not depend on the other side."""
    return all(
        step.get("type") in _NORMALIZERS
        and (step["type"] != "Replace" or step.get("pattern") in ({"String": " "}, {"String": "``"}, {"String": "''"}))
        for step in steps
    )


def splits_words(steps: list[dict[str, Any]]) -> bool | None:
    """Whether these pre-tokenizer steps always split at a cut; None if they may do what depends on both sides."""
    split = False
    for step in steps:
        kind, pattern = step.get("type"), step.get("pattern")
        if kind == "ByteLevel":
            split |= bool(step.get("use_regex", True))
        elif kind == "Metaspace":
            split |= bool(step.get("split", True))
        elif kind == "Split" and isinstance(pattern, dict) and pattern.get("Regex") in WORD_PATTERNS:
            split |= step.get("behavior") == "Isolated" and not step.get("invert")
        elif kind not in ("Sequence", "Digits"):
            return None
    return split
