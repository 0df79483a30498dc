"""The demo table: how many hidden numbers does a model find, by context length and attention mode?

    python tools/needle.py --text moby_dick.txt --lengths 4K 16K 64K 256K --json results.json
    python tools/needle.py --text moby_dick.txt --lengths 2K 4K --attention full streaming

A haystack is a stretch of the text (or of generated text where no --text is given) with needles, " The special magic
number for KEY is 123456.", between its sentences, one in every equal part of it. Keys are two random words of the text,
so that the haystack is full of half matches. Each question is asked as if its prompt had been given to `minirea
generate`: whole chunks of the haystack are read once, and its rest together with the question after rewinding.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from demo_data import strip_gutenberg
from demo_text import generate_text
from tqdm import tqdm

import minirea
from minirea.errors import InputError, MinireaError, MissingFileError

ATTENTION: Final = ("reattention", "full", "streaming")
SUBJECT: Final = "special magic number for {key}"
NEEDLE: Final = " The " + SUBJECT + " is {value}."
QUESTION: Final = "\nQuestion: What is the " + SUBJECT + "? Answer: The " + SUBJECT + " is"
ANSWER_TOKENS: Final = 16
DIGITS: Final = 6


@dataclass(frozen=True)
class Needle:
    """A hidden sentence; `depth` is where it stands, from 0 (start of the haystack) to 1."""

    key: str
    value: str
    depth: float


@dataclass(frozen=True)
class Answer:
    """One question's outcome, `seconds` after the reading of its haystack began."""

    attention: str
    length: int
    haystack: int
    depth: float
    key: str
    value: str
    answer: str
    correct: bool
    seconds: float


@dataclass(frozen=True)
class Haystack:
    """A prompt without its question, as token ids, and what it hides."""

    ids: list[int]
    needles: list[Needle]


class Field:
    """Where haystacks come from: a text cut into sentences, each with its length in tokens."""

    def __init__(self, text: str, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._sentences = re.findall(r"\S.*?(?:[.!?]['\"\u201d\u2019)]*(?=\s)|\n\s*\n|\Z)\s*", text, re.DOTALL)
        self._sizes = [len(tokenizer.encode(part, add_special_tokens=False)) for part in self._sentences]
        self._words = sorted(set(re.findall(r"\b[a-z]{4,9}\b", text)))
        if len(self._words) < 100:
            raise InputError(f"--text: found {len(self._words)} different words, expected at least 100 to make keys of")

    @property
    def tokens(self) -> int:
        return sum(self._sizes)

    def haystack(self, rng: random.Random, length: int, count: int) -> Haystack:
        """At most `length` tokens, question and answer included, with `count` needles."""
        keys: list[str] = []
        while len(keys) < count:
            key = f"{rng.choice(self._words)}-{rng.choice(self._words)}"
            keys += [key] if key not in keys else []
        values = ["".join(rng.choice("0123456789") for _ in range(DIGITS)) for _ in keys]
        asking = max(self._size(QUESTION.format(key=key)) for key in keys) + ANSWER_TOKENS
        hiding = sum(self._size(NEEDLE.format(key=k, value=v)) for k, v in zip(keys, values, strict=True))
        budget = length - asking - hiding - 1  # 1: the token that begins a text
        sentences = self._stretch(rng, budget)
        while True:
            cuts = [int(len(sentences) * (index + rng.random()) / count) for index in range(count)]
            ids = self._tokenizer.encode(_hide(sentences, cuts, keys, values))
            if len(ids) + asking <= length:
                depths = [cut / len(sentences) for cut in cuts]
                return Haystack(ids, [Needle(*of) for of in zip(keys, values, depths, strict=True)])
            sentences = sentences[:-1]  # tokens at the seams of two sentences were counted apart

    def _stretch(self, rng: random.Random, budget: int) -> list[str]:
        """Consecutive sentences of at most `budget` tokens, and not much less."""
        if self.tokens < budget:
            raise InputError(f"--text: found {self.tokens} tokens, expected at least {budget} for the longest haystack")
        latest, left = len(self._sizes), budget
        while latest and left >= self._sizes[latest - 1]:
            latest -= 1
            left -= self._sizes[latest]
        start = end = rng.randrange(latest + 1)
        while end < len(self._sizes) and budget >= self._sizes[end]:
            budget -= self._sizes[end]
            end += 1
        if start == end:
            raise InputError(f"--lengths: too short for a sentence of {self._sizes[start]} tokens beside the needles")
        return self._sentences[start:end]

    def _size(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False))


def _hide(sentences: Sequence[str], cuts: Sequence[int], keys: Sequence[str], values: Sequence[str]) -> str:
    """The sentences with needle i behind sentence cuts[i], before the white space that follows it."""
    parts = list(sentences)
    for cut, key, value in zip(cuts, keys, values, strict=True):
        sentence = parts[cut].rstrip()
        space = sentences[cut][len(sentences[cut].rstrip()) :]
        parts[cut] = sentence + NEEDLE.format(key=key, value=value) + space
    return "".join(parts)


def ask(llm: minirea.LLM, haystack: Haystack) -> Iterator[str]:
    """The model's answer to each needle's question, through the same steps that the whole prompt would take."""
    whole_chunks = len(haystack.ids) // llm.chunk_size * llm.chunk_size
    session = llm.session(len(haystack.ids) + 256)
    if whole_chunks:
        session.prefill(haystack.ids[:whole_chunks])
    for needle in haystack.needles:
        question = llm.tokenizer.encode(QUESTION.format(key=needle.key), add_special_tokens=False)
        prompt = haystack.ids[whole_chunks:] + question
        yield session.generate(prompt, max_tokens=ANSWER_TOKENS, stop=("\n",)).text
        session.rewind(whole_chunks)


def is_correct(answer: str, value: str) -> bool:
    """Whether the first number of the answer is exactly the value."""
    number = re.match(r"\s*(\d+)", answer)
    return number is not None and number[1] == value


def measure(args: argparse.Namespace) -> list[Answer]:
    """Every answer, in the order attention, length, haystack, needle."""
    answers: list[Answer] = []
    text = read_text(args.text, max(args.lengths))
    field: Field | None = None
    total = len(args.attention) * len(args.lengths) * args.haystacks * args.needles
    with tqdm(total=total, unit="needle", dynamic_ncols=True, disable=args.quiet) as bar:
        for attention in args.attention:
            llm = minirea.load(args.model, device=args.device, impl=args.impl, attention=attention)
            field = field or Field(text, llm.tokenizer)
            for length in args.lengths:
                for number in range(args.haystacks):
                    # The same haystacks for every attention mode.
                    rng = random.Random(f"{args.seed} {length} {number}")
                    haystack = field.haystack(rng, length, args.needles)
                    place = (attention, length, number)
                    started = time.perf_counter()
                    for needle, answer in zip(haystack.needles, ask(llm, haystack), strict=True):
                        correct, seconds = is_correct(answer, needle.value), round(time.perf_counter() - started, 3)
                        asked = (round(needle.depth, 4), needle.key, needle.value)
                        answers.append(Answer(*place, *asked, answer, correct, seconds))
                        bar.update()
    return answers


def read_text(files: Sequence[Path] | None, tokens: int) -> str:
    """The files' text one after another; without files, generated text of at least `tokens` tokens."""
    if files is None:
        return generate_text(seed=0, min_chars=6 * tokens)
    for path in files:
        if not path.is_file():
            raise MissingFileError(f"--text {path}: no such file")
    return "\n\n".join(strip_gutenberg(path.read_text(encoding="utf-8", errors="replace")) for path in files)


def table(answers: Sequence[Answer]) -> str:
    """Rows of attention modes, columns of lengths, cells "found/asked"."""
    lengths = sorted({answer.length for answer in answers})
    rows = [["attention", *(_short(length) for length in lengths)]]
    for attention in dict.fromkeys(answer.attention for answer in answers):
        cells = []
        for length in lengths:
            of = [answer.correct for answer in answers if (answer.attention, answer.length) == (attention, length)]
            cells.append(f"{sum(of)}/{len(of)}")
        rows.append([attention, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def parse_length(text: str) -> int:
    """Tokens from "4096" or "4K"."""
    match = re.fullmatch(r"([1-9]\d*)([kK]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no length, expected a number such as 4096 or 4K")
    return int(match[1]) * (1024 if match[2] else 1)


def machine() -> dict[str, str]:
    """Where and with what the answers were made."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"machine": name, "torch": torch.__version__, "python": platform.python_version()}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    default_model = Path(__file__).resolve().parent.parent / "weights" / "demo"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None, allow_abbrev=False)
    parser.add_argument("--model", type=Path, default=default_model, help="model directory (default: the demo model)")
    parser.add_argument("--text", type=Path, nargs="+", help="text files for the haystacks (default: generated text)")
    parser.add_argument("--lengths", type=parse_length, nargs="+", default=[4096, 16384], help="tokens, e.g. 4K 16K")
    parser.add_argument("--attention", nargs="+", choices=ATTENTION, default=["reattention"])
    parser.add_argument("--haystacks", type=int, default=10, help="per length (default %(default)s)")
    parser.add_argument("--needles", type=int, default=10, help="per haystack (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--impl", default="auto", help="auto, triton or torch")
    parser.add_argument("--json", type=Path, help="file to write every answer to")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    if args.haystacks < 1 or args.needles < 1:
        parser.error("--haystacks and --needles: expected at least 1 each")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        answers = measure(args)
    except MinireaError as error:
        print(f"needle: error: {error}", file=sys.stderr)
        return 1
    print(table(answers))
    if args.json:
        text = [path.name for path in args.text] if args.text else "generated"
        head = {**machine(), "model": args.model.name, "impl": args.impl, "text": text, "seed": args.seed}
        lines = ",\n".join(json.dumps(asdict(answer)) for answer in answers)  # one answer a line
        args.json.write_text(f'{json.dumps(head)[:-1]}, "answers": [\n{lines}\n]}}\n', encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
