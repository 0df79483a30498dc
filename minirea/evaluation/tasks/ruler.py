"""The thirteen task kinds of RULER (Hsieh et al., arXiv 2404.06654), made anew from the paper's description.

Eight hide needles, in noise, in running text or among needles of the same form; variable tracking follows assignments;
two ask for the most common words of a list; two answer questions from one of many documents. An answer's score is the
share of the expected strings that it contains (string_match_all), for questions whether it contains any
(string_match_part). As in RULER, a length counts prompt and answer together; here it is met to the token.
"""

from __future__ import annotations

import bisect
import itertools
import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, ClassVar, Final

from minirea.errors import InputError
from minirea.evaluation.frame.cells import QUICKLY_MADE, Cell, Prompt, PromptCell, Question
from minirea.evaluation.frame.records import Place
from minirea.evaluation.frame.tasks import Task, option, parse_path, require, rng
from minirea.evaluation.tasks.needle import NOISE
from minirea.evaluation.text.documents import Documents, read_hotpotqa, read_squad
from minirea.evaluation.text.encoder import Encoder
from minirea.evaluation.text.haystack import Haystack, Stretch, hide, read_haystack
from minirea.evaluation.text.values import distinct, random_value

if TYPE_CHECKING:
    from minirea.tokenizer import Tokenizer


@dataclass(frozen=True)
class NeedleKind:
    """A variant of the needle task.

    Args:
        haystack: "noise", "text" or "needles": what surrounds the needles that count.
        keys, values: what they are; see text.KINDS.
        hidden: keys in the haystack.
        asked: how many of them are asked for.
        values_each: values of a key.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    hidden: int = 1
    asked: int = 1
    values_each: int = 1


NEEDLE_KINDS: Final = {
    "niah_single_1": NeedleKind("noise"),
    "niah_single_2": NeedleKind("text"),
    "niah_single_3": NeedleKind("text", values="uuids"),
    "niah_multikey_1": NeedleKind("text", hidden=4),
    "niah_multikey_2": NeedleKind("needles"),
    "niah_multikey_3": NeedleKind("needles", keys="uuids", values="uuids"),
    "niah_multivalue": NeedleKind("text", values_each=4),
    "niah_multiquery": NeedleKind("text", hidden=4, asked=4),
}
QUESTION_KINDS: Final = ("qa_1", "qa_2")
KINDS: Final = (*NEEDLE_KINDS, "vt", "cwe", "fwe", *QUESTION_KINDS)
# Tokens of room for an answer.
ROOM: Final = {**dict.fromkeys(NEEDLE_KINDS, 128), "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}

DIGITS: Final = 7
NOUNS: Final = {"numbers": "number", "uuids": "uuid"}
HOPS: Final = 4  # assignments after the first, in variable tracking
COMMON_WORDS: Final = 10
COMMON, UNCOMMON = 30, 3  # how often they occur; less in lists too short for that
FREQUENT_WORDS: Final = 3
ZETA_EXPONENT: Final = 2.0
CODED_WORDS: Final = 2000  # vocabulary of the frequent-words kind
CODED_LETTERS: Final = 6


def match_all(expected: Sequence[str], answer: str) -> float:
    """The share of the expected strings that the answer contains, in whatever case."""
    return sum(one.lower() in answer.lower() for one in expected) / len(expected)


def match_part(expected: Sequence[str], answer: str) -> float:
    """1 if the answer contains any of the expected strings, in whatever case, else 0."""
    return float(any(one.lower() in answer.lower() for one in expected))


@dataclass(frozen=True, kw_only=True)
class Ruler(Task):
    """Every kind at every length, each prompt with a haystack of its own."""

    name: ClassVar[str] = "ruler"
    about: ClassVar[str] = "the thirteen task kinds of RULER: needles, variables, common words, questions"
    GROWS: ClassVar[tuple[str, ...]] = ("lengths", "samples", "kinds")

    kinds: tuple[str, ...] = option(
        (), "which kinds (default: all whose files are given)", metavar="KIND,KIND", many="comma", choices=KINDS
    )
    haystack: tuple[Path, ...] = option(
        (), "UTF-8 text to hide needles in (default: generated text)", metavar="FILE", parse=parse_path, many="list"
    )
    squad: Path | None = option(None, "SQuAD's JSON file, for qa_1", metavar="FILE", parse=parse_path)
    hotpotqa: Path | None = option(None, "HotpotQA's JSON file, for qa_2", metavar="FILE", parse=parse_path)

    def check(self) -> None:
        super().check()
        for kind, file in self._files().items():
            valid = file is not None or kind not in self.kinds
            require("kinds", self.kinds, valid, f"{kind} only with a file (--squad for qa_1, --hotpotqa for qa_2)")
        self.check_answers(len(self.chosen()))

    def _files(self) -> dict[str, Path | None]:
        return {"qa_1": self.squad, "qa_2": self.hotpotqa}

    def chosen(self) -> list[str]:
        """The kinds to run, in the paper's order."""
        missing = [kind for kind, file in self._files().items() if file is None]
        return [kind for kind in KINDS if (kind in self.kinds if self.kinds else kind not in missing)]

    def cells(self, tokenizer: Tokenizer) -> list[Cell]:
        chosen, makers = self.chosen(), dict[str, Maker]()
        for kind, read, file in (("qa_1", read_squad, self.squad), ("qa_2", read_hotpotqa, self.hotpotqa)):
            if kind in chosen and file is not None:
                makers[kind] = partial(question_prompt, read(file))
        encode = Encoder(tokenizer)
        haystack = read_haystack(self.haystack, encode)
        makers |= {kind: partial(needle_prompt, haystack, how) for kind, how in NEEDLE_KINDS.items()}
        makers |= {
            "vt": tracking_prompt,
            "cwe": partial(common_words_prompt, haystack.words),
            "fwe": frequent_words_prompt,
        }
        cells: list[Cell] = []
        for length in sorted(set(self.lengths)):
            for kind in chosen:
                for sample in range(self.samples):
                    place: Place = {"kind": kind, "length": length, "sample": sample}
                    cells.append(PromptCell((place,), length, partial(self._prompt, makers[kind], encode, place)))
        for kind in chosen if min(self.lengths) <= QUICKLY_MADE else ():  # says now if the shortest has no room
            makers[kind](rng(self.seed), encode, min(self.lengths) - ROOM[kind])
        return cells

    def _prompt(self, make: Maker, encode: Encoder, place: Place) -> Prompt:
        kind, length = str(place["kind"]), int(place["length"])
        ids, expected = make(rng(self.seed, self.name, *place.values()), encode, length - ROOM[kind])
        score = partial(match_part if kind in self._files() else match_all, expected)
        return Prompt([], [Question(ids, expected, score, ROOM[kind])])


# Random numbers, encoder, tokens of the prompt -> its ids, which are exactly as many, and the right answers.
Maker = Callable[[Random, Encoder, int], tuple[list[int], list[str]]]


# ---------------------------------------------------------------------------------------------------------------
# Needles
# ---------------------------------------------------------------------------------------------------------------
def needle_prompt(
    haystack: Haystack, how: NeedleKind, random: Random, encode: Encoder, tokens: int
) -> tuple[list[int], list[str]]:
    """Needles at random depths. Those of one key come with different values; only the keys asked for count."""
    key = partial(random_value, random, how.keys, haystack.words, DIGITS)
    value = partial(random_value, random, how.values, haystack.words, DIGITS)
    noun = NOUNS[how.values]
    text = haystack.stretch(random, tokens).text if how.haystack == "text" else ""
    keys = distinct(key, how.hidden, text)
    values = distinct(value, how.hidden * how.values_each, text)
    pairs = list(zip([key for key in keys for _ in range(how.values_each)], values, strict=True))
    if how.haystack == "text":
        stretch = haystack.stretch(random, tokens)
    else:
        others = (_needle(noun, key(), value()) for _ in itertools.count())
        stretch = Stretch.of(encode, others if how.haystack == "needles" else itertools.cycle(NOISE), tokens)
    question = encode(_needle_question(noun, keys[: how.asked], how.values_each))
    hidden = [(random.random(), _needle(noun, key, value)) for key, value in pairs]
    expected = [value for key, value in pairs if key in keys[: how.asked]]
    return hide(encode, stretch, tokens - len(question), hidden) + question, expected


def _needle(noun: str, key: str, value: str) -> str:
    return f" The special magic {noun} for {key} is {value}."


def _needle_question(noun: str, keys: Sequence[str], values_each: int) -> str:
    """The question and the beginning of its answer; for one value that is the needle's own words."""
    names = ", ".join(keys[:-1]) + (" and " if len(keys) > 1 else "") + keys[-1]
    if len(keys) == 1 and values_each == 1:
        subject = f"special magic {noun} for {names}"
        return f"\nQuestion: What is the {subject}? Answer: The {subject} is"
    subject = f"special magic {noun}s for {names}"
    return f"\nQuestion: What are all the {subject}? Answer: The {subject} are"


# ---------------------------------------------------------------------------------------------------------------
# Variable tracking
# ---------------------------------------------------------------------------------------------------------------
TRACKING: Final = "Some variables are assigned in the text below, among words that do not matter. Keep track of them.\n"


@dataclass(frozen=True)
class Chain:
    """A value, and the variables that get it one from another."""

    value: str
    names: list[str]

    @staticmethod
    def make(random: Random) -> Chain:
        def name() -> str:
            return "".join(random.choice(string.ascii_uppercase) for _ in range(5))

        return Chain(str(random.randrange(10000, 100000)), distinct(name, HOPS + 1, ""))

    def lines(self) -> list[str]:
        sources = [self.value, *(f"VAR {name}" for name in self.names)]
        return [f" VAR {name} = {source}." for name, source in zip(self.names, sources, strict=False)]

    def question(self) -> str:
        return f"\nQuestion: Which variables have the value {self.value}? Answer: The variables are"


def tracking_prompt(random: Random, encode: Encoder, tokens: int) -> tuple[list[int], list[str]]:
    """A chain of assignments scattered in noise, in order, after a short worked example."""
    example, chain = Chain.make(random), Chain.make(random)
    worked = " ".join([TRACKING.strip(), NOISE[0].strip()]) + "".join(example.lines()) + example.question()
    introduction = encode(f"{worked} {', '.join(example.names)}.\n\n{TRACKING}")
    question = encode(chain.question())
    depths = sorted(random.random() for _ in chain.names)
    stretch = Stretch.of(encode, itertools.cycle(NOISE), tokens)
    room = tokens - len(introduction) - len(question)
    body = hide(encode, stretch, room, list(zip(depths, chain.lines(), strict=True)))
    start = len(encode.beginning)
    return [*body[:start], *introduction, *body[start:], *question], chain.names


# ---------------------------------------------------------------------------------------------------------------
# Common and frequent words
# ---------------------------------------------------------------------------------------------------------------
LIST: Final = "A numbered list of words follows. Some words occur in it more often than others; remember those.\n"
ASK_COMMON: Final = f"\nQuestion: Which {COMMON_WORDS} words occur most often in the list? Answer: The words are"
CODED: Final = "A coded text follows. Count how often each coded word occurs.\n"
ASK_FREQUENT: Final = (
    f"\nQuestion: Which {FREQUENT_WORDS} coded words, dots aside, occur most often? Answer: The coded words are"
)


def common_words_prompt(
    words: Sequence[str], random: Random, encode: Encoder, tokens: int
) -> tuple[list[int], list[str]]:
    """A shuffled list in which ten words occur more often than all others, after a short worked example.

    30 times against 3, as in the paper; where that fills more than half of the room, two thirds or a third of it.
    """
    pool = random.sample(words, len(words))
    shown, common, uncommon = (
        pool[: 2 * COMMON_WORDS],
        pool[-COMMON_WORDS:],
        iter(pool[2 * COMMON_WORDS : -COMMON_WORDS]),
    )
    worked = _numbered(random, [*shown[:COMMON_WORDS] * 2, *shown[COMMON_WORDS:]])
    introduction = encode(f"{LIST}{worked}{ASK_COMMON} {', '.join(shown[:COMMON_WORDS])}.\n\n{LIST}")
    introduction = [*encode.beginning, *introduction]
    question = encode(ASK_COMMON)
    room = tokens - len(introduction) - len(question)
    listed: list[str] = []
    for part in (3, 2, 1):
        often, seldom = COMMON * part // 3, UNCOMMON * part // 3
        listed = common * often
        size = sum(_size(encode, i, word) for i, word in enumerate(listed, 1))
        if size <= room // 2:
            break
    more = itertools.chain(uncommon, (_coded_word(random) for _ in itertools.count()))
    while True:
        added = [next(more)] * seldom
        size += sum(_size(encode, i, word) for i, word in enumerate(added, len(listed) + 1))
        if size > room:
            break
        listed += added
    if len(listed) <= len(common) * often:
        raise InputError(f"lengths is too short for cwe: no room for {len(listed)} words, expected longer ones")
    random.shuffle(listed)
    body = [i for number, word in enumerate(listed, 1) for i in encode(f" {number}.") + encode(f" {word}")]
    return [*introduction, *body, *encode.filling(room - len(body)), *question], common


def _numbered(random: Random, words: list[str]) -> str:
    random.shuffle(words)
    return "".join(f" {number}. {word}" for number, word in enumerate(words, 1))


def _size(encode: Encoder, number: int, word: str) -> int:
    return len(encode(f" {number}.")) + len(encode(f" {word}"))


def _coded_word(random: Random) -> str:
    return "".join(random.choice(string.ascii_lowercase) for _ in range(CODED_LETTERS))


def frequent_words_prompt(random: Random, encode: Encoder, tokens: int) -> tuple[list[int], list[str]]:
    """Made-up words whose frequencies follow a zeta distribution; the most frequent of all is noise, three dots."""
    words = ["...", *distinct(partial(_coded_word, random), CODED_WORDS - 1, "")]
    pieces = [encode(f" {word}") for word in words]
    introduction, question = [*encode.beginning, *encode(CODED)], encode(ASK_FREQUENT)
    room = tokens - len(introduction) - len(question)

    def size(total: int) -> int:
        return sum(count * len(ids) for count, ids in zip(zeta_counts(total, len(words)), pieces, strict=True))

    total = bisect.bisect_right(range(max(0, room)), room, key=size) - 1
    counts = zeta_counts(max(0, total), len(words))
    if not counts[FREQUENT_WORDS] > counts[FREQUENT_WORDS + 1]:
        raise InputError("lengths is too short for fwe: words would be equally frequent, expected longer ones")
    order = [index for index, count in enumerate(counts) for _ in range(count)]
    random.shuffle(order)
    body = [i for index in order for i in pieces[index]]
    filling = encode.filling(room - len(body))
    return [*introduction, *body, *filling, *question], words[1 : FREQUENT_WORDS + 1]


def zeta_counts(total: int, words: int) -> list[int]:
    """How often each word occurs among `total`: k ** -2 / zeta(2) of them for the k-th, rounded down."""
    zeta = math.pi**2 / 6  # of ZETA_EXPONENT
    return [int(total * k**-ZETA_EXPONENT / zeta) for k in range(1, words + 1)]


# ---------------------------------------------------------------------------------------------------------------
# Questions
# ---------------------------------------------------------------------------------------------------------------
ANSWERING: Final = "Answer the question at the end from the documents that follow, with nothing but the answer.\n"


def question_prompt(documents: Documents, random: Random, encode: Encoder, tokens: int) -> tuple[list[int], list[str]]:
    """The documents that a random question needs among as many others as there is room for, in random order.

    Others of the same source come first; all are repeated if they run out. A part of one more takes the room that is
    left.
    """
    introduction = [*encode.beginning, *encode(ANSWERING)]
    for asked in random.sample(documents.questions, len(documents.questions)):
        question = encode(f"\n\nQuestion: {asked.text} Answer:")
        room = tokens - len(introduction) - len(question)
        if sum(_document_size(encode, 9, documents.texts[i]) for i in asked.needed) <= room:
            break
    else:
        raise InputError("lengths is too short for questions: no document fits, expected longer ones")
    taken = {*asked.needed, *asked.related}
    unrelated = [i for i in range(len(documents.texts)) if i not in taken]
    others = [*random.sample(asked.related, len(asked.related)), *random.sample(unrelated, len(unrelated))]
    chosen, left = list(asked.needed), room
    left -= sum(_document_size(encode, number, documents.texts[i]) for number, i in enumerate(chosen, 1))
    rest: list[int] = []
    for other in itertools.cycle(others):
        ids = _document(encode, len(chosen) + 1, documents.texts[other])
        if len(ids) > left:
            rest = ids[:left]
            break
        chosen.append(other)
        left -= len(ids)
    random.shuffle(chosen)
    body = [i for number, one in enumerate(chosen, 1) for i in _document(encode, number, documents.texts[one])]
    filling = encode.filling(room - len(body) - len(rest))
    return [*introduction, *body, *rest, *filling, *question], asked.answers


def _document(encode: Encoder, number: int, text: str) -> list[int]:
    return encode(f"\n\nDocument {number}:") + encode(f" {text}")


def _document_size(encode: Encoder, number: int, text: str) -> int:
    return len(_document(encode, number, text))
