"""Token ids of a piece of text as they are in the middle of a longer text."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

from minirea.errors import InputError
from minirea.evaluation.frame.cells import common_prefix

if TYPE_CHECKING:
    from minirea.tokenizer import Tokenizer

_REMEMBERED: Final = 4096  # pieces of text: noise repeats them without end


class Encoder:
    """Token ids of text that stands inside a longer text.

    Some tokenizers put a space before whatever they encode. Encoding a piece behind an anchor and taking the anchor's
    ids away again gives the ids that the piece has in place.

    Attributes:
        beginning: ids that go before a text: BOS, or all that a chat template puts before a user's message.
        end: ids that go after a text: none, or all that a chat template puts behind that message.
    """

    def __init__(self, tokenizer: Tokenizer, chat: bool = False) -> None:
        self._tokenizer = tokenizer
        self._remembered = lru_cache(_REMEMBERED)(self._encode)
        self._anchors = [(a, tokenizer.encode(a, add_special_tokens=False)) for a in ("\n", "a", ".", "1")]
        framed = tokenizer.encode("a")
        bare = tokenizer.encode("a", add_special_tokens=False)
        self.beginning = framed[: len(framed) - len(bare)] if framed[len(framed) - len(bare) :] == bare else []
        self.end: list[int] = []
        if chat:
            self.beginning, self.end = _around_message(tokenizer)

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


def _around_message(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the chat template puts before and behind the content of a user's message.

    They are what the ids of two messages that have nothing in common begin and end with.

    Raises:
        InputError: no chat template, or one that does not show the message.
    """
    if not tokenizer.has_chat_template:
        raise InputError("chat is on, but this model has no chat template; expected a chat model or no chat")
    one, other = (tokenizer.encode_chat([{"role": "user", "content": content}]) for content in ("a", "1"))
    before = common_prefix(one, other)
    behind = common_prefix(one[before:][::-1], other[before:][::-1])
    if before == len(one):
        raise InputError("chat is on, but this model's chat template does not show a message; expected one that does")
    return one[:before], one[len(one) - behind :]
