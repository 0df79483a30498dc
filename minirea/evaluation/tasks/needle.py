"""Needles: facts hidden in a long text at given depths, and asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Final

from minirea.evaluation.frame import plots
from minirea.evaluation.frame.cells import Cell, Place, Prompt, PromptCell, Question
from minirea.evaluation.frame.records import Record
from minirea.evaluation.frame.tasks import Task, option, require, rng
from minirea.evaluation.lengths import grid
from minirea.evaluation.text.encoder import Encoder
from minirea.evaluation.text.haystack import Haystack, Stretch, hide, read_haystack
from minirea.evaluation.text.values import KINDS, PATTERNS, distinct, random_value, same_size

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
    share: int = option(
        1, "so many samples share a haystack: less to read, and more needles in it", metavar="N", parse=int
    )
    align: int = option(
        1,
        "cut the haystack to a multiple of N tokens: at the chunk size questions cost least, and prompts are shorter",
        metavar="N",
        parse=int,
    )
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
        require("share", self.share, self.share >= 1, "at least 1")
        require("align", self.align, 1 <= self.align <= min(self.lengths), "1 to the shortest length")
        require("share", self.share, self.share == 1 or not self.separate, "1 with separate (see --separate)")
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
        cells: list[Cell] = []
        for length in sorted(set(self.lengths)):
            for group in self._groups():
                places = tuple({"length": length, "depth": depth, "sample": sample} for sample, depth in group)
                cells.append(PromptCell(places, length, partial(self._prompt, haystack, encode, places)))
        self._prompt(haystack, encode, cells[0].places)  # the shortest: says now if there is no room
        return cells

    def _groups(self) -> list[list[tuple[int, float]]]:
        """The (sample, depth) of each question, by haystack."""
        samples, depths = range(self.samples), self.all_depths()
        if self.separate:
            return [[(sample, depth)] for sample in samples for depth in depths]
        return [
            [(s, d) for s in samples[start : start + self.share] for d in depths] for start in samples[:: self.share]
        ]

    def _prompt(self, haystack: Haystack, encode: Encoder, places: Sequence[Place]) -> Prompt:
        """A haystack with a needle at each of the places and, with --separate, `needles` - 1 others anywhere."""
        length, first = int(places[0]["length"]), int(places[0]["sample"])
        random = rng(self.seed, self.name, length, first, *([places[0]["depth"]] if self.separate else []))
        stretch = haystack.stretch(random, length)
        depths = self._hidden_at(random, float(places[0]["depth"]))
        key = partial(random_value, random, self.keys, haystack.words, self.digits)
        value = partial(random_value, random, self.values, haystack.words, self.digits)
        keys = same_size(key, len(depths), lambda key: len(self._asked(encode, key)), stretch.text)
        values = distinct(value, len(depths), " ".join([stretch.text, *keys]))
        hidden = [self.needle.format(key=k, value=v) for k, v in zip(keys, values, strict=True)]
        context = (length - self.room - len(self._asked(encode, keys[0]))) // self.align * self.align
        questions = [
            Question(
                ids=self._asked(encode, key),
                expected=[value],
                score=partial(first_is, self.values, value),
                max_tokens=self.room,
                stop=("\n",),
                extra={"key": key},
            )
            for key, value, _ in zip(keys, values, places, strict=False)
        ]
        return Prompt(hide(encode, stretch, context, list(zip(depths, hidden, strict=True))), questions)

    def _hidden_at(self, random: Random, depth: float) -> list[float]:
        """Where needles go; the first of them are asked for.

        Always as many as a whole haystack has, so that more samples leave those alone that are there. The needles of
        one depth that share a haystack stand a little apart.
        """
        if self.separate:
            return [depth, *(random.random() for _ in range(self.needles - 1))]
        depths = self.all_depths()
        apart = 0.5 / max(1, len(depths) - 1)
        offsets = [((sample + 0.5) / self.share - 0.5) * apart for sample in range(self.share)]
        return [min(1.0, max(0.0, depth + offset)) for offset in offsets for depth in depths]

    def _asked(self, encode: Encoder, key: str) -> list[int]:
        return encode(self.question.format(key=key))

    def summarize(self, records: Sequence[Record]) -> list[Record]:
        rows = super().summarize(records)
        for row in rows:
            row["score_by_depth"] = by_depth(
                [r for r in records if all(r[name] == row[name] for name in ("attention", "length"))]
            )
        return rows

    def plot(self, records: Sequence[Record], folder: Path, about: Mapping[str, Any]) -> list[Path]:
        return [plots.heat_map(records, folder, self.name, about), *super().plot(records, folder, about)]


NOISE: Final = (
    " The grass is green.",
    " The sky is blue.",
    " The sun is bright.",
    " Off we go.",
    " There and back again.",
)


@dataclass(frozen=True, kw_only=True)
class Passkey(Task):
    """The classic form (Mohtashami and Jaggi, arXiv 2305.16300): a number in sentences repeated without end."""

    name: ClassVar[str] = "passkey"
    about: ClassVar[str] = "a number hidden in sentences that repeat without end"
    introduction: ClassVar[str] = (
        "A pass key is hidden in many idle words. Find it and keep it in mind: you will need it."
    )
    hidden: ClassVar[str] = " The pass key is {value}. Remember it: {value} is the pass key."
    question: ClassVar[str] = "\nWhat is the pass key? The pass key is"

    depths: int = option(10, "evenly spread places for what is hidden, from start to end", metavar="N", parse=int)
    digits: int = option(5, "of what is hidden", metavar="N", parse=int)

    def check(self) -> None:
        super().check()
        require("depths", self.depths, self.depths >= 1, "at least 1")
        require("digits", self.digits, 1 <= self.digits <= 100, "1 to 100")

    def cells(self, tokenizer: Tokenizer) -> list[Cell]:
        encode = Encoder(tokenizer)
        cells: list[Cell] = []
        for length, sample in grid(self.lengths, self.samples):
            for depth in even_depths(self.depths):
                place = {"length": length, "depth": depth, "sample": sample}
                cells.append(PromptCell((place,), length, partial(self._prompt, encode, place)))
        self._prompt(encode, cells[0].places[0])
        return cells

    def value(self, random: Random) -> str:
        """What is to be hidden."""
        return random_value(random, "numbers", (), self.digits)

    def _prompt(self, encode: Encoder, place: Place) -> Prompt:
        length, depth = int(place["length"]), float(place["depth"])
        value = self.value(rng(self.seed, self.name, length, depth, place["sample"]))
        introduction, question = encode(self.introduction), encode(self.question)
        room = ANSWER_TOKENS["numbers"] + self.digits
        tokens = length - room - len(question) - len(introduction)
        noise = Stretch.of(encode, cycle(NOISE), length)
        body = hide(encode, noise, tokens, [(depth, self.hidden.format(value=value))])
        start = len(encode.beginning)
        ids = [*body[:start], *introduction, *body[start:], *question]
        return Prompt([], [Question(ids, [value], partial(first_is, "numbers", value), room, stop=("\n",))])

    def plot(self, records: Sequence[Record], folder: Path, about: Mapping[str, Any]) -> list[Path]:
        return [plots.heat_map(records, folder, self.name, about), *super().plot(records, folder, about)]


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
