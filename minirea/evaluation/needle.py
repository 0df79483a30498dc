"""Needles: facts hidden in a long text at given depths, and asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from minirea.evaluation.task import Cell, Place, Prompt, PromptCell, Question, Record, Task, option, require, rng
from minirea.evaluation.text import (
    KINDS,
    PATTERNS,
    Encoder,
    Haystack,
    distinct,
    hide,
    random_value,
    read_haystack,
    same_size,
    split_sentences,
)

if TYPE_CHECKING:
    from minirea.tokenizer import Tokenizer

# A small model copies what followed the same words earlier, so the question ends in the needle's own words. The wording
# is the one that the demo model was trained on; larger models do not mind.
NEEDLE: Final = " The special magic number for {key} is {value}."
QUESTION: Final = (
    "\nQuestion: What is the special magic number for {key}? Answer: The special magic number for {key} is"
)
ANSWER_TOKENS: Final = {"numbers": 16, "words": 16, "uuids": 48}


def parse_file(text: str) -> Path:
    return Path(text)


@dataclass(frozen=True, kw_only=True)
class Needle(Task):
    """One needle at every depth of a haystack, each with a key of its own; each is asked for.

    All needles of a sample share one haystack, which is read once; those that are not asked for are what distracts.
    With `separate` every question has a haystack to itself with `needles` needles in it.
    """

    name: ClassVar[str] = "needle"
    about: ClassVar[str] = "facts hidden in a text at given depths (heat map of length by depth)"

    depths: int = option(
        10, "evenly spread places for needles, from the text's start to its end", metavar="N", parse=int
    )
    at: tuple[float, ...] = option((), "these depths instead, from 0 to 1", metavar="X,X", parse=float, many="comma")
    separate: bool = option(False, "a haystack for every question, instead of one for all depths")
    needles: int = option(
        1, "with --separate: so many in the haystack, of which one is asked for", metavar="N", parse=int
    )
    haystack: tuple[Path, ...] = option(
        (), "UTF-8 text to hide them in (default: generated text)", metavar="FILE", parse=parse_file, many="list"
    )
    needle: str = option(NEEDLE, "what is hidden; {key} and {value} are filled in", metavar="STR")
    question: str = option(QUESTION, "what ends the prompt; {key} is filled in", metavar="STR")
    keys: str = option("words", "what keys are", choices=KINDS)
    values: str = option("numbers", "what values are", choices=KINDS)
    digits: int = option(6, "of a number", metavar="N", parse=int)
    answer_tokens: int = option(0, "room for the answer in tokens (default: 16, for UUIDs 48)", metavar="N", parse=int)

    def check(self) -> None:
        super().check()
        require("depths", self.depths, self.depths >= 1, "at least 1")
        require("at", self.at, all(0 <= depth <= 1 for depth in self.at), "numbers from 0 to 1")
        require("at", self.at, len(set(self.at)) == len(self.at), "different depths")
        require("needles", self.needles, self.needles >= 1, "at least 1")
        require("needles", self.needles, self.needles == 1 or self.separate, "1 without separate (see --separate)")
        require("digits", self.digits, 1 <= self.digits <= 100, "1 to 100")
        require("answer_tokens", self.answer_tokens, self.answer_tokens >= 0, "at least 1, or 0 for the default")
        _check_template("needle", self.needle, ("key", "value"))
        _check_template("question", self.question, ("key",))

    @property
    def room(self) -> int:
        """Tokens that a prompt leaves for its answer."""
        return self.answer_tokens or ANSWER_TOKENS[self.values]

    def all_depths(self) -> tuple[float, ...]:
        return self.at or even_depths(self.depths)

    def cells(self, tokenizer: Tokenizer) -> list[Cell]:
        encode = Encoder(tokenizer)
        haystack = read_haystack(self.haystack, encode)
        depths = self.all_depths()
        groups = [(depth,) for depth in depths] if self.separate else [depths]
        cells: list[Cell] = []
        for length in sorted(set(self.lengths)):
            for sample in range(self.samples):
                for group in groups:
                    places = tuple({"length": length, "depth": depth, "sample": sample} for depth in group)
                    cells.append(PromptCell(places, length, partial(self._prompt, haystack, encode, places)))
        self._prompt(haystack, encode, cells[0].places)  # the shortest: says now if there is no room
        return cells

    def _prompt(self, haystack: Haystack, encode: Encoder, places: Sequence[Place]) -> Prompt:
        """A haystack with a needle at each of the places, and with --separate `needles` - 1 others anywhere."""
        length, sample = int(places[0]["length"]), places[0]["sample"]
        depths = [float(place["depth"]) for place in places]
        random = rng(self.seed, self.name, length, sample, *(depths if self.separate else ()))
        stretch = haystack.stretch(random, length)
        all_depths = [*depths, *(random.random() for _ in range(self.needles - 1))]
        key = partial(random_value, random, self.keys, haystack.words, self.digits)
        value = partial(random_value, random, self.values, haystack.words, self.digits)
        keys = same_size(key, len(all_depths), lambda key: len(self._asked(encode, key)), stretch.text)
        values = distinct(value, len(all_depths), " ".join([stretch.text, *keys]))
        hidden = [self.needle.format(key=k, value=v) for k, v in zip(keys, values, strict=True)]
        context = length - self.room - len(self._asked(encode, keys[0]))
        questions = [
            Question(
                ids=self._asked(encode, key),
                expected=[value],
                score=partial(first_is, self.values, value),
                max_tokens=self.room,
                stop=("\n",),
                extra={"key": key},
            )
            for key, value in zip(keys[: len(depths)], values, strict=False)
        ]
        return Prompt(hide(encode, stretch, context, list(zip(all_depths, hidden, strict=True))), questions)

    def _asked(self, encode: Encoder, key: str) -> list[int]:
        return encode(self.question.format(key=key))

    def summarize(self, records: Sequence[Record]) -> list[Record]:
        rows = super().summarize(records)
        for row in rows:
            row["score_by_depth"] = by_depth(
                [r for r in records if all(r[name] == row[name] for name in ("attention", "length"))]
            )
        return rows

    def plot(self, records: Sequence[Record], folder: Path) -> list[Path]:
        from minirea.evaluation import plots

        return [plots.heat_map(records, folder, self.name), *super().plot(records, folder)]


NOISE: Final = " The grass is green. The sky is blue. The sun is bright. Off we go. There and back again."
INTRODUCTION: Final = (
    "Among many idle words this text holds a pass key. Find it and keep it in mind: it will be asked for."
)
PASSKEY: Final = " The pass key is {value}. Remember it: {value} is the pass key."
ASK_PASSKEY: Final = "\nWhat is the pass key? The pass key is"


@dataclass(frozen=True, kw_only=True)
class Passkey(Task):
    """The classic form (Mohtashami and Jaggi, arXiv 2305.16300): a number in sentences repeated without end."""

    name: ClassVar[str] = "passkey"
    about: ClassVar[str] = "a number hidden in sentences that repeat without end"

    depths: int = option(10, "evenly spread places for the pass key, from start to end", metavar="N", parse=int)
    digits: int = option(5, "of the pass key", metavar="N", parse=int)

    def check(self) -> None:
        super().check()
        require("depths", self.depths, self.depths >= 1, "at least 1")
        require("digits", self.digits, 1 <= self.digits <= 100, "1 to 100")

    def cells(self, tokenizer: Tokenizer) -> list[Cell]:
        encode = Encoder(tokenizer)
        noise = Haystack(encode, cycle(split_sentences(NOISE)))
        cells: list[Cell] = []
        for length in sorted(set(self.lengths)):
            for sample in range(self.samples):
                for depth in even_depths(self.depths):
                    place = {"length": length, "depth": depth, "sample": sample}
                    cells.append(PromptCell((place,), length, partial(self._prompt, noise, encode, place)))
        self._prompt(noise, encode, cells[0].places[0])
        return cells

    def _prompt(self, noise: Haystack, encode: Encoder, place: Place) -> Prompt:
        length, depth = int(place["length"]), float(place["depth"])
        random = rng(self.seed, self.name, length, depth, place["sample"])
        value = random_value(random, "numbers", (), self.digits)
        introduction, ids = encode(INTRODUCTION), encode(ASK_PASSKEY)
        room = ANSWER_TOKENS["numbers"]
        tokens = length - room - len(ids) - len(introduction)
        context = hide(encode, noise.beginning(length), tokens, [(depth, PASSKEY.format(value=value))])
        start = len(encode.beginning)
        ids = [*context[:start], *introduction, *context[start:], *ids]
        return Prompt([], [Question(ids, [value], partial(first_is, "numbers", value), room, stop=("\n",))])

    def plot(self, records: Sequence[Record], folder: Path) -> list[Path]:
        from minirea.evaluation import plots

        return [plots.heat_map(records, folder, self.name), *super().plot(records, folder)]


def even_depths(count: int) -> tuple[float, ...]:
    """`count` depths from 0 to 1; a single one stands in the middle."""
    return tuple(round(i / (count - 1), 4) for i in range(count)) if count > 1 else (0.5,)


def first_is(kind: str, value: str, answer: str) -> float:
    """1 if the first number, pair of words or UUID of an answer is the value, else 0."""
    found = re.search(PATTERNS[kind], answer)
    return float(found is not None and found[0] == value)


def by_depth(records: Sequence[Record]) -> dict[str, float]:
    """The mean score at every depth, by the depth as text; depths that only have skipped records are left out."""
    scores: dict[str, list[float]] = {}
    for record in records:
        if "skipped" not in record:
            scores.setdefault(str(record["depth"]), []).append(record["score"])
    return {depth: sum(of) / len(of) for depth, of in scores.items()}


def _check_template(name: str, template: str, keys: Sequence[str]) -> None:
    """Raise InputError unless `template` can be filled in with `keys` and shows each of them."""
    try:
        text = template.format(**{key: f"<{key}>" for key in keys})
        valid = all(f"<{key}>" in text for key in keys)
    except (KeyError, IndexError, ValueError, AttributeError):
        valid = False
    require(name, template, valid, f"text with {' and '.join('{' + key + '}' for key in keys)} and no other braces")
