"""Token ids of a piece of text as they are in the middle of a longer text."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from minirea.tokenizer import Tokenizer

_REMEMBERED: Final = 4096  # pieces of text: noise repeats them without end


class Encoder:
    """Token ids of text that stands inside a longer text.

    Some tokenizers put a space before whatever they encode. Encoding a piece behind an anchor and taking the anchor's
    ids away again gives the ids that the piece has in place.

    Attributes:
        beginning: ids that the tokenizer puts before a text (BOS).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._remembered = lru_cache(_REMEMBERED)(self._encode)
        self._anchors = [(a, tokenizer.encode(a, add_special_tokens=False)) for a in ("\n", "a", ".", "1")]
        framed = tokenizer.encode("a")
        bare = tokenizer.encode("a", add_special_tokens=False)
        self.beginning = framed[: len(framed) - len(bare)] if framed[len(framed) - len(bare) :] == bare else []

    def __call__(self, text: str) -> list[int]:
        """The ids of `text` in the middle of a text."""
        return self._remembered(text)[:]

    def filling(self, tokens: int) -> list[int]:
        """`tokens` ids of empty lines: what makes up for items that do not fit a length exactly."""
        return (self("\n")[-1:] * tokens)[: max(0, tokens)]

    def _encode(self, text: str) -> list[int]:
        for anchor, anchor_ids in self._anchors:
            ids = self._tokenizer.encode(anchor + text, add_special_tokens=False)
            if ids[: len(anchor_ids)] == anchor_ids:  # otherwise a token straddles anchor and text
                return ids[len(anchor_ids) :]
        return self._tokenizer.encode(text, add_special_tokens=False)
