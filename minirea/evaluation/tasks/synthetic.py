"""Three synthetic tasks as InfiniteBench (Zhang et al., arXiv 2402.13718) defines them, at any length."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Final

from minirea.errors import InputError
from minirea.evaluation.frame import plots
from minirea.evaluation.frame.cells import Cell, Prompt, Question, prompt_cells
from minirea.evaluation.frame.records import Place, Record
from minirea.evaluation.frame.tasks import Task, option, require, rng
from minirea.evaluation.lengths import grid
from minirea.evaluation.tasks.needle import MOST_DEPTHS, Passkey, even_depths
from minirea.evaluation.text.encoder import Encoder
from minirea.evaluation.text.values import random_value

if TYPE_CHECKING:
    from minirea.tokenizer import Tokenizer


# ---------------------------------------------------------------------------------------------------------------
# Number string
# ---------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class NumberString(Passkey):
    """A pass key in which digits repeat, which is easily copied one too few or too many times."""

    name: ClassVar[str] = "number-string"
    about: ClassVar[str] = "a number with repeated digits hidden in sentences that repeat without end"
    introduction: ClassVar[str] = "A sequence of digits is hidden in many idle words. Find it and keep it in mind."
    hidden: ClassVar[str] = " The sequence of digits is {value}. Remember it: {value} is the sequence of digits."
    question: ClassVar[str] = "\nWhat is the sequence of digits? The sequence of digits is"

    digits: int = option(10, "of what is hidden", metavar="N", parse=int)

    def value(self, random: Random) -> str:
        """Runs of one to four equal digits."""
        text = random.choice("123456789")
        while len(text) < self.digits:
            digit = random.choice([d for d in "0123456789" if d != text[-1]])
            text += digit * random.randint(1, 4)
        return text[: self.digits]


# ---------------------------------------------------------------------------------------------------------------
# Key-value retrieval
# ---------------------------------------------------------------------------------------------------------------
KV_ROOM: Final = 50
KV_INTRODUCTION: Final = "The JSON object below maps keys to values. You will be asked for the value of one key.\n\n{"
ASK_KV: Final = '\n}}\n\nKey: "{key}"\nThe value of this key is: "'


@dataclass(frozen=True, kw_only=True)
class KeyValue(Task):
    """A JSON object of random UUIDs that fills the whole length; keys at even depths are asked for."""

    name: ClassVar[str] = "kv"
    about: ClassVar[str] = "the value of a key in a JSON object of random UUIDs"

    depths: int = option(10, "evenly spread keys that are asked for, from first to last", metavar="N", parse=int)

    def check(self) -> None:
        super().check()
        require("depths", self.depths, 1 <= self.depths <= MOST_DEPTHS, f"1 to {MOST_DEPTHS:,}")
        self.check_answers(self.depths)

    def cells(self, tokenizer: Tokenizer) -> list[Cell]:
        places = (
            tuple({"length": length, "depth": depth, "sample": sample} for depth in even_depths(self.depths))
            for length, sample in grid(self.lengths, self.samples)
        )
        return prompt_cells(places, partial(self._prompt, Encoder(tokenizer)))

    def _prompt(self, encode: Encoder, places: Sequence[Place]) -> Prompt:
        length, sample = int(places[0]["length"]), places[0]["sample"]
        random = rng(self.seed, self.name, length, sample)
        context = [*encode.beginning, *encode(KV_INTRODUCTION)]
        pairs: list[tuple[str, str]] = []
        longest = 0  # question so far, in tokens
        while True:
            key, value = random_value(random, "uuids", ()), random_value(random, "uuids", ())
            ids = encode(f'{"," if pairs else ""}\n"{key}": "{value}"')
            longest = max(longest, len(encode(ASK_KV.format(key=key))))
            if len(context) + len(ids) + longest + KV_ROOM > length:
                break
            context += ids
            pairs.append((key, value))
        if len(pairs) < len(places):
            raise InputError(f"lengths is too short: {length} tokens hold {len(pairs)} pairs, expected {len(places)}")
        questions = []
        for place in places:
            key, value = pairs[round(float(place["depth"]) * (len(pairs) - 1))]
            ids = encode(ASK_KV.format(key=key))
            ids = encode.filling(length - KV_ROOM - len(context) - len(ids)) + ids
            questions.append(Question(ids, [value], partial(has_word, value), KV_ROOM, extra={"key": key}))
        return Prompt(context, questions)

    def plot(self, records: Sequence[Record], folder: Path, about: Mapping[str, Any]) -> list[Path]:
        return [plots.heat_map(records, folder, self.name, about), *super().plot(records, folder, about)]


def has_word(value: str, answer: str) -> float:
    """1 if the value is one of the answer's words, which punctuation and quotes end too, else 0."""
    return float(value in re.split(r"[\s:\"'.,?!{}]+", answer))


# ---------------------------------------------------------------------------------------------------------------
# Code run
# ---------------------------------------------------------------------------------------------------------------
CODE_ROOM: Final = 30
CODE_INTRODUCTION: Final = "Here are a number of Python functions. You will be asked what one of them returns.\n"
ASK_CODE: Final = "\n\nWhat does {name}({argument}) return? Answer with one integer: {name}({argument}) returns"
LARGEST_STEP: Final = 20
MOST_CALLS: Final = 10_000


@dataclass(frozen=True)
class Function:
    """def NAME(x): return CALLED(x) + ADDED, or x + ADDED where nothing is called."""

    name: str
    called: Function | None
    added: int

    @staticmethod
    def make(random: Random, name: str, called: Function | None) -> Function:
        return Function(name, called, random.choice((-1, 1)) * random.randint(1, LARGEST_STEP))

    def __call__(self, x: int) -> int:
        return (self.called(x) if self.called else x) + self.added

    def source(self) -> str:
        inner = f"{self.called.name}(x)" if self.called else "x"
        return f"\ndef {self.name}(x):\n    return {inner} {'+' if self.added >= 0 else '-'} {abs(self.added)}\n"


@dataclass(frozen=True, kw_only=True)
class CodeRun(Task):
    """Functions that call each other, in random order; the results of some of them are asked for."""

    name: ClassVar[str] = "code-run"
    about: ClassVar[str] = "what a chain of small Python functions returns, among many others"

    calls: tuple[int, ...] = option(
        (2, 4, 6, 8, 10), "functions run for an answer, a question for each", metavar="N,N", parse=int, many="comma"
    )

    def check(self) -> None:
        super().check()
        valid = bool(self.calls) and len(set(self.calls)) == len(self.calls)
        valid = valid and min(self.calls) >= 1 and max(self.calls) <= MOST_CALLS
        require("calls", self.calls, valid, f"different numbers from 1 to {MOST_CALLS:,}")
        self.check_answers(len(self.calls))

    def cells(self, tokenizer: Tokenizer) -> list[Cell]:
        places: Iterator[tuple[Place, ...]] = (
            tuple({"kind": f"{calls} calls", "length": length, "sample": sample} for calls in self.calls)
            for length, sample in grid(self.lengths, self.samples)
        )
        return prompt_cells(places, partial(self._prompt, Encoder(tokenizer)))

    def _prompt(self, encode: Encoder, places: Sequence[Place]) -> Prompt:
        length, sample = int(places[0]["length"]), places[0]["sample"]
        random = rng(self.seed, self.name, length, sample)
        argument = random.randrange(1, 10)
        names = _names(random)
        asked, functions = [], []
        for place in places:
            called = None
            for _ in range(int(str(place["kind"]).split()[0])):
                called = Function.make(random, next(names), called)
                functions.append(called)
            asked.append(functions[-1])
        questions = [encode(ASK_CODE.format(name=function.name, argument=argument)) for function in asked]
        introduction = [*encode.beginning, *encode(CODE_INTRODUCTION)]
        left = length - CODE_ROOM - max(map(len, questions)) - len(introduction)
        left -= sum(len(encode(function.source())) for function in functions)
        if left < 0:
            raise InputError(
                f"lengths is too short: {length} tokens, expected {-left} more for the functions asked for"
            )
        while True:
            other = Function.make(random, next(names), random.choice([None, *functions[-3:]]))
            left -= len(encode(other.source()))
            if left < 0:
                break
            functions.append(other)
        random.shuffle(functions)
        context = introduction + [i for function in functions for i in encode(function.source())]
        return Prompt(
            context,
            [
                Question(
                    ids=encode.filling(length - CODE_ROOM - len(context) - len(ids)) + ids,
                    expected=[result],
                    score=partial(last_integer_is, result),
                    max_tokens=CODE_ROOM,
                )
                for ids, result in zip(questions, (str(function(argument)) for function in asked), strict=True)
            ],
        )


def _names(random: Random) -> Iterator[str]:
    """Different names without end, or nearly so."""
    seen: set[int] = set()
    while len(seen) < 800_000:
        number = random.randrange(100_000, 1_000_000)
        if number not in seen:
            seen.add(number)
            yield f"func_{number}"
    raise InputError("lengths is too long for code-run, expected at most some 20m")


def last_integer_is(value: str, answer: str) -> float:
    """1 if the last integer of an answer is the value, else 0."""
    found = re.findall(r"-?\d+", answer)
    return float(bool(found) and int(found[-1]) == int(value))
