"""Haystacks: running text as token ids, cut at sentences, of any exact length.

Prompts are put together from token ids, not from characters: that makes every length exact, and a text is encoded once
for all prompts. What is set in starts with its own white space and goes where a sentence has ended, so the ids are
those of the text that a reader sees.
"""

from __future__ import annotations

import bisect
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from minirea.errors import InputError, MinireaError
from minirea.evaluation.text.diary import diary_entries
from minirea.evaluation.text.encoder import Encoder
from minirea.files import as_text, read_file

# A sentence with the white space before it; a blank line ends one too.
_SENTENCE: Final = re.compile(r"\s*\S.*?(?:[.!?]['\"\u201d\u2019)]*(?=\s)|(?=\n\s*\n)|\Z)", re.DOTALL)
_DIARY_SEED: Final = 2  # the demo model was trained on seed 1000
# Tokens in which stretches start and words are looked for. A constant, so that a prompt depends on no other's length.
_FIRST_PART: Final = 2**16
_FEWEST_WORDS: Final = 100
_LARGEST_FILE: Final = 2**32  # bytes


@dataclass(frozen=True)
class Stretch:
    """Part of a haystack: token ids, their text (or a little more), and where sentences start in them."""

    ids: list[int]
    text: str
    starts: list[int]

    @staticmethod
    def of(encode: Encoder, sentences: Iterable[str], tokens: int) -> Stretch:
        """The first `tokens` ids of sentences; fewer if they run out."""
        ids: list[int] = []
        starts: list[int] = []
        parts: list[str] = []
        for sentence in sentences:
            if len(ids) >= tokens:
                break
            starts.append(len(ids))
            parts.append(sentence)
            ids += encode(sentence)
        return Stretch(ids[:tokens], "".join(parts), starts)

    def start_near(self, depth: float) -> int:
        """The sentence start nearest to `depth`, from 0 (the beginning) to 1 (the last sentence)."""
        wanted = depth * len(self.ids)
        after = bisect.bisect_left(self.starts, wanted)
        return min(self.starts[max(0, after - 1) : after + 1], key=lambda start: abs(start - wanted))

    def head(self, tokens: int) -> Stretch:
        """The first `tokens` ids; the text is not cut."""
        return Stretch(self.ids[:tokens], self.text, self.starts[: bisect.bisect_left(self.starts, tokens)])


class Haystack:
    """A text in sentences, encoded as far as it is needed. Where more is asked for than there is, it begins anew.

    Args:
        sentences: in order, each with the white space before it; there may be infinitely many.

    Attributes:
        words: the different words of 4 to 9 small letters of its first part, in alphabetical order.
    """

    def __init__(self, encode: Encoder, sentences: Iterator[str]) -> None:
        self._encode = encode
        self._source = sentences
        self._ids: list[int] = []
        self._sentences: list[str] = []
        self._starts: list[int] = []  # of each sentence, in _ids
        self._read(_FIRST_PART)
        self.words = sorted({word for part in self._sentences for word in re.findall(r"\b[a-z]{4,9}\b", part)})

    def stretch(self, rng: random.Random, tokens: int) -> Stretch:
        """`tokens` consecutive ids from the start of a random sentence: the same, whatever was asked for before."""
        self._read(_FIRST_PART + tokens)
        sentence = rng.randrange(self._candidates(tokens))
        ids: list[int] = []
        starts: list[int] = []
        parts: list[str] = []
        while len(ids) < tokens:
            starts.append(len(ids))
            ids += self._ids_of(sentence)
            parts.append(self._sentences[sentence])
            sentence = (sentence + 1) % len(self._sentences)
        return Stretch(ids[:tokens], "".join(parts), starts)

    def _candidates(self, tokens: int) -> int:
        """How many of the first sentences a stretch may start at: not so late that it would have to begin anew."""
        latest = min(len(self._ids), _FIRST_PART + tokens) - tokens
        return bisect.bisect_right(self._starts, latest) or len(self._starts)

    def _ids_of(self, sentence: int) -> list[int]:
        end = self._starts[sentence + 1] if sentence + 1 < len(self._starts) else len(self._ids)
        return self._ids[self._starts[sentence] : end]

    def _read(self, tokens: int) -> None:
        """Encode sentences until there are `tokens` ids or no more sentences."""
        while len(self._ids) < tokens and (sentence := next(self._source, "")):
            if ids := self._encode(sentence):
                self._starts.append(len(self._ids))
                self._sentences.append(sentence)
                self._ids += ids


def read_haystack(files: Sequence[Path], encode: Encoder) -> Haystack:
    """The user's files one after another, or generated text where there are none.

    Raises:
        MissingFileError, InputError: a file that is not there, is not UTF-8 or holds no text to speak of.
    """
    text = "\n\n".join(read_text("haystack", path).strip() for path in files)
    haystack = Haystack(encode, split_sentences("\n\n" + text) if files else _diary_sentences())
    if len(haystack.words) < _FEWEST_WORDS:
        found = f"found {len(haystack.words)} different words"
        raise InputError(f"haystack is {', '.join(map(str, files))!r}: {found}, expected at least {_FEWEST_WORDS}")
    return haystack


def read_text(name: str, path: Path) -> str:
    """A UTF-8 file. Raises MissingFileError or InputError that begins with `name`, the option it came by."""
    try:
        return as_text(read_file(path, _LARGEST_FILE, "text", pipes=True), str(path)).replace("\r\n", "\n")
    except MinireaError as error:
        raise type(error)(f"{name} is {error}") from None


def split_sentences(text: str) -> Iterator[str]:
    """Sentences with the white space before each; joined they are the text, less white space at its end."""
    return (match[0] for match in _SENTENCE.finditer(text))


def _diary_sentences() -> Iterator[str]:
    for entry in diary_entries(_DIARY_SEED):
        yield from split_sentences("\n\n" + entry.rstrip())


def hide(encode: Encoder, stretch: Stretch, tokens: int, hidden: Sequence[tuple[float, str]]) -> list[int]:
    """The beginning of a text, exactly `tokens` ids: as much of the stretch as goes with the hidden sentences.

    Args:
        hidden: (depth, sentence with the space before it). A sentence goes where one of the stretch starts; of equal
            depths the first comes first.

    Raises:
        InputError: no room for a stretch besides them, or the stretch is too short.
    """
    pieces = [(depth, encode(sentence)) for depth, sentence in hidden]
    left = tokens - len(encode.beginning) - sum(len(ids) for _, ids in pieces)
    if left < 1:
        raise InputError(f"lengths is too short: {1 - left} tokens more are needed, expected room for some haystack")
    stretch = stretch.head(left)
    out, previous = [*encode.beginning], 0
    for depth, ids in sorted(pieces, key=lambda piece: piece[0]):
        start = stretch.start_near(depth)
        out += stretch.ids[previous:start]
        out += ids
        previous = start
    return out + stretch.ids[previous:]
