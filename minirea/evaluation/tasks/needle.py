"""Needles: facts hidden in a long text at given depths, and asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Final

from minirea.errors import InputError
from minirea.evaluation.frame import plots
from minirea.evaluation.frame.cells import Cell, Prompt, Question, prompt_cells
from minirea.evaluation.frame.records import Place, Record
from minirea.evaluation.frame.tasks import Task, option, parse_path, require, rng
from minirea.evaluation.lengths import grid
from minirea.evaluation.text.encoder import Encoder
from minirea.evaluation.text.facts import WORDINGS, random_name
from minirea.evaluation.text.haystack import Haystack, Stretch, hide, read_haystack
from minirea.evaluation.text.values import KINDS, PATTERNS, distinct, random_value, same_size

if TYPE_CHECKING:
    from minirea.tokenizer import Tokenizer

# A small model copies what followed the same words earlier, so the question ends in the needle's own words. The wording
# is the one that the demo model was trained on; larger models answer other wordings too.
NEEDLE: Final = " The special magic number for {key} is {value}."
QUESTION: Final = (
    "\nQuestion: What is the special magic number for {key}? Answer: The special magic number for {key} is"
)
CHAT_QUESTION: Final = "\n\nQuestion about the text above: What is the special magic number for {key}?"
FACT_QUESTION: Final = "\nQuestion: {asked} Answer:"
CHAT_FACT_QUESTION: Final = "\n\nQuestion about the text above: {asked}"
# Room for an answer in tokens. In a chat, and where facts are asked for, models answer in sentences.
ANSWER_TOKENS: Final = {"numbers": 16, "words": 16, "uuids": 48}
SENTENCE_TOKENS: Final = 32
MOST_DEPTHS: Final = 10_000
FEWEST_TOKENS: Final = 2  # of a needle


@dataclass(frozen=True)
class Hidden:
    """A needle: the sentence with the space before it, the question's ids, and what makes an answer right."""

    sentence: str
    asked: list[int]
    key: str
    value: str
    score: Callable[[str], float]


@dataclass(frozen=True, kw_only=True)
class Needle(Task):
    """One needle at every depth of a haystack, each with a key of its own; each is asked for.

    All needles of a sample share one haystack, which is read once; those that are not asked for are what distracts.
    With `separate` there is one needle in a haystack (`needles` of them, where that is given): every question of a
    sample has a copy of its text with the needle at another depth, and what the copies begin with is read once.
    """

    name: ClassVar[str] = "needle"
    about: ClassVar[str] = "facts hidden in a text at given depths (heat map of length by depth)"
    notes: ClassVar[str] = (
        "Needles share a haystack: by default each sample is one text that hides a needle at every depth (--depths, "
        "times --share), and all of them are asked for one after another. With --separate a haystack hides one needle."
    )

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
    separate: bool = option(False, "one needle in a haystack, instead of one for every depth in the same")
    needles: int = option(
        1, "with --separate: so many in the haystack, of which one is asked for", metavar="N", parse=int
    )
    haystack: tuple[Path, ...] = option(
        (), "UTF-8 text to hide them in (default: generated text)", metavar="FILE", parse=parse_path, many="list"
    )
    needle: str = option(NEEDLE, "what is hidden; {key} and {value} are filled in", metavar="STR")
    question: str = option(
        QUESTION, "what ends the prompt; {key} is filled in (with --chat another default)", metavar="STR"
    )
    facts: bool = option(False, "hide facts in plain words, told and asked in six ways, instead of --needle")
    chat: bool = option(False, "text and question are a message in the model's chat template")
    as_session: bool = option(False, "read the text first and ask later, as a session does, not as one prompt")
    keys: str = option("words", "what keys are", choices=KINDS)
    values: str = option("numbers", "what values are", choices=KINDS)
    digits: int = option(6, "of a number", metavar="N", parse=int)
    answer_tokens: int = option(
        0,
        "room for the answer in tokens (default: 16, for UUIDs 48, for sentences 32 more)",
        metavar="N",
        parse=int,
    )
    sources: int = option(
        0, "so many passages that each answer used, and how often the needle is the first", metavar="N", parse=int
    )

    def check(self) -> None:
        super().check()
        require("sources", self.sources, self.sources >= 0, "at least 0")
        require("depths", self.depths, 1 <= self.depths <= MOST_DEPTHS, f"1 to {MOST_DEPTHS:,}")
        require("at", self.at, all(0 <= depth <= 1 for depth in self.at), "numbers from 0 to 1")
        require("at", self.at, len(set(self.at)) == len(self.at), "different depths")
        require("needles", self.needles, 1 <= self.needles <= MOST_DEPTHS, f"1 to {MOST_DEPTHS:,}")
        require("needles", self.needles, self.needles == 1 or self.separate, "1 without separate (see --separate)")
        require("share", self.share, 1 <= self.share <= MOST_DEPTHS, f"1 to {MOST_DEPTHS:,}")
        require("align", self.align, 1 <= self.align <= min(self.lengths), "1 to the shortest length")
        require("share", self.share, self.share == 1 or not self.separate, "1 with separate (see --separate)")
        require("digits", self.digits, 1 <= self.digits <= 100, "1 to 100")
        require("answer_tokens", self.answer_tokens, self.answer_tokens >= 0, "at least 1, or 0 for the default")
        _check_template("needle", self.needle, ("key", "value"))
        _check_template("question", self.question, ("key",))
        plain = (self.needle, self.question) == (NEEDLE, QUESTION)
        require("facts", self.facts, plain or not self.facts, "no needle or question besides: facts have their own")
        self.check_answers(len(self.at) or self.depths)

    @property
    def room(self) -> int:
        """Tokens that a prompt leaves for its answer."""
        sentence = SENTENCE_TOKENS if self.chat or self.facts else 0
        return self.answer_tokens or ANSWER_TOKENS["words" if self.facts else self.values] + sentence

    def all_depths(self) -> tuple[float, ...]:
        return self.at or even_depths(self.depths)

    def cells(self, tokenizer: Tokenizer) -> list[Cell]:
        encode = Encoder(tokenizer, self.chat)
        haystack = read_haystack(self.haystack, encode)
        build = partial(self.copies if self.separate else self.shared, haystack, encode)
        places = (
            tuple({"length": length, "depth": depth, "sample": sample} for sample, depth in group)
            for length in sorted(set(self.lengths))
            for group in self._groups()
        )
        return prompt_cells(places, build, as_session=self.as_session, sources=self.sources)

    def _groups(self) -> list[list[tuple[int, float]]]:
        """The (sample, depth) of each question, by haystack.

        Copies of a text that hide a needle at other depths come with the last depth first: what stands before a needle
        is then common to it and to the copy before.
        """
        samples, depths = range(self.samples), self.all_depths()
        if self.separate:
            return [[(sample, depth) for depth in sorted(depths, reverse=True)] for sample in samples]
        return [
            [(s, d) for s in samples[start : start + self.share] for d in depths] for start in samples[:: self.share]
        ]

    def shared(self, haystack: Haystack, encode: Encoder, places: Sequence[Place]) -> Prompt:
        """A haystack with a needle at each of the places."""
        length, first = int(places[0]["length"]), int(places[0]["sample"])
        random = rng(self.seed, self.name, length, first)
        depths = self._hidden_at()
        stretch = haystack.stretch(random, length)
        needles = self._needles(random, haystack, encode, stretch.text, len(depths), length)
        hidden = [(depth, needle.sentence) for depth, needle in zip(depths, needles, strict=True)]
        context = hide(encode, stretch, self._context(length, needles), hidden)
        return Prompt(context, [self._question(encode, needle) for needle, _ in zip(needles, places, strict=False)])

    def copies(self, haystack: Haystack, encode: Encoder, places: Sequence[Place]) -> Prompt:
        """A copy of one text for each of the places, with a needle there and `needles` - 1 others, the same in all."""
        length, sample = int(places[0]["length"]), places[0]["sample"]
        random = rng(self.seed, self.name, "separate", length, sample)
        stretch = haystack.stretch(random, length)
        others = [random.random() for _ in range(self.needles - 1)]
        needles = self._needles(random, haystack, encode, stretch.text, len(places) + len(others), length)
        more = [(depth, needle.sentence) for depth, needle in zip(others, needles[len(places) :], strict=True)]
        size = self._context(length, needles)
        questions = []
        for needle, place in zip(needles, places, strict=False):
            context = hide(encode, stretch, size, [(float(place["depth"]), needle.sentence), *more])
            questions.append(self._question(encode, needle, context))
        return Prompt([], questions)

    def _context(self, length: int, needles: Sequence[Hidden]) -> int:
        """Tokens of a haystack with what is hidden in it."""
        return (length - self.room - max(len(needle.asked) for needle in needles)) // self.align * self.align

    def _question(self, encode: Encoder, needle: Hidden, context: Sequence[int] = ()) -> Question:
        return Question(
            ids=needle.asked,
            expected=[needle.value],
            score=needle.score,
            max_tokens=self.room,
            stop=() if self.chat else ("\n",),
            extra={"key": needle.key},
            context=context,
            passage=encode(needle.sentence) if self.sources else (),
        )

    def _hidden_at(self) -> list[float]:
        """Where needles that share a haystack go; the first of them are asked for.

        Always as many as a whole haystack has, so that more samples leave those alone that are there. The needles of
        one depth stand a little apart.
        """
        depths = self.all_depths()
        apart = 0.5 / max(1, len(depths) - 1)
        offsets = [((sample + 0.5) / self.share - 0.5) * apart for sample in range(self.share)]
        return [min(1.0, max(0.0, depth + offset)) for offset in offsets for depth in depths]

    def _needles(
        self, random: Random, haystack: Haystack, encode: Encoder, text: str, count: int, length: int
    ) -> list[Hidden]:
        """`count` needles with different keys, none of which occurs in `text`.

        Raises:
            InputError: that many needles do not fit into `length` tokens, or there are not that many keys or values.
        """
        if count * FEWEST_TOKENS > length:
            raise InputError(f"lengths is too short: {length} tokens, expected room for {count} needles")
        if self.facts:
            return self._facts(random, encode, text, count)
        key = partial(random_value, random, self.keys, haystack.words, self.digits)
        value = partial(random_value, random, self.values, haystack.words, self.digits)
        keys = same_size(key, count, lambda key: len(self._asked(encode, key)), text)
        values = distinct(value, count, " ".join([text, *keys]))
        return [
            Hidden(self.needle.format(key=k, value=v), self._asked(encode, k), k, v, partial(first_is, self.values, v))
            for k, v in zip(keys, values, strict=True)
        ]

    def _facts(self, random: Random, encode: Encoder, text: str, count: int) -> list[Hidden]:
        names = distinct(partial(random_name, random), count, text)
        form = CHAT_FACT_QUESTION if self.chat else FACT_QUESTION
        needles = []
        for name in names:
            wording = random.choice(WORDINGS)
            value, asked = random.choice(wording.values), form.format(asked=wording.asked.format(key=name))
            sentence = wording.told.format(key=name, value=value)
            needles.append(Hidden(sentence, encode(asked) + encode.end, name, value, partial(says, value)))
        return needles

    def _asked(self, encode: Encoder, key: str) -> list[int]:
        question = CHAT_QUESTION if self.chat and self.question == QUESTION else self.question
        return encode(question.format(key=key)) + encode.end

    def summarize(self, records: Sequence[Record]) -> list[Record]:
        rows = super().summarize(records)
        for row in rows:
            members = [r for r in records if all(r[name] == row[name] for name in ("attention", "length"))]
            row |= {"score_by_depth": by_depth(members)} | needle_first(members)
        return rows

    def table(self, rows: Sequence[Record]) -> list[list[str]]:
        """Below the scores, how often the needle is the first source of a right answer, in percent."""
        lines = super().table(rows)
        firsts = {(row["attention"], row["length"]): row["needle_first"] for row in rows if "needle_first" in row}
        lengths = sorted({row["length"] for row in rows})
        for mode in dict.fromkeys(mode for mode, _ in firsts):
            shares = [firsts.get((mode, length)) for length in lengths]
            lines.append([f"{mode}, needle first", *("-" if s is None else f"{100 * s:.1f}" for s in shares)])
        return lines

    def identity(self) -> Record:
        """What Task.identity has; a run without sources is told from one with them only."""
        return {name: value for name, value in super().identity().items() if (name, value) != ("sources", 0)}

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
        require("depths", self.depths, 1 <= self.depths <= MOST_DEPTHS, f"1 to {MOST_DEPTHS:,}")
        require("digits", self.digits, 1 <= self.digits <= 100, "1 to 100")
        self.check_answers(self.depths)

    def cells(self, tokenizer: Tokenizer) -> list[Cell]:
        places: Iterator[tuple[Place, ...]] = (
            ({"length": length, "depth": depth, "sample": sample},)
            for length, sample in grid(self.lengths, self.samples)
            for depth in even_depths(self.depths)
        )
        return prompt_cells(places, partial(self._prompt, Encoder(tokenizer)))

    def value(self, random: Random) -> str:
        """What is to be hidden."""
        return random_value(random, "numbers", (), self.digits)

    def _prompt(self, encode: Encoder, places: Sequence[Place]) -> Prompt:
        (place,) = places
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


def needle_first(records: Sequence[Record]) -> Record:
    """Of records with sources: how many answers are right, and the share of those whose first source is the needle."""
    ranked = [record for record in records if "source_rank" in record]
    ranks = [record["source_rank"] for record in ranked if record["score"] == 1]
    share = sum(rank == 1 for rank in ranks) / len(ranks) if ranks else None
    return {"right_answers": len(ranks), "needle_first": share} if ranked else {}


def even_depths(count: int) -> tuple[float, ...]:
    """`count` depths from 0 to 1; a single one stands in the middle."""
    return tuple(round(i / (count - 1), 4) for i in range(count)) if count > 1 else (0.5,)


def first_is(kind: str, value: str, answer: str) -> float:
    """1 if the first number, pair of words or UUID of an answer is the value, else 0."""
    found = re.search(PATTERNS[kind], answer)
    return float(found is not None and found[0] == value)


def says(value: str, answer: str) -> float:
    """1 if an answer has the value as a word of its own, in whatever case, else 0."""
    return float(re.search(rf"\b{re.escape(value)}\b", answer, re.IGNORECASE) is not None)


def by_depth(records: Sequence[Record]) -> dict[str, float]:
    """The mean score at every depth, by the depth as text; depths that only have skipped records are left out."""
    scores: dict[str, list[float]] = {}
    for record in sorted(records, key=lambda record: float(record["depth"])):
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
