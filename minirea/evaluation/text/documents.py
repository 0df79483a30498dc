"""Questions and the documents that answer them, from files in the formats of SQuAD and HotpotQA."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minirea.errors import InputError
from minirea.evaluation.text.haystack import read_text


@dataclass(frozen=True)
class AskedQuestion:
    """A question; `needed` are indices of the documents that answer it, `related` of those from the same source."""

    text: str
    answers: list[str]
    needed: list[int]
    related: list[int]


@dataclass(frozen=True)
class Documents:
    """All documents of a file, each of them once, and the questions about them."""

    texts: list[str]
    questions: list[AskedQuestion]


class _Collector:
    """Numbers documents in the order in which they are first seen."""

    def __init__(self) -> None:
        self.index: dict[str, int] = {}
        self.questions: list[AskedQuestion] = []

    def number(self, text: str) -> int:
        return self.index.setdefault(text.strip(), len(self.index))

    def ask(self, text: str, answers: list[str], needed: list[int], source: list[int]) -> None:
        answers = list(dict.fromkeys(answer for answer in answers if answer))
        if answers:
            related = [i for i in dict.fromkeys(source) if i not in needed]
            self.questions.append(AskedQuestion(text.strip(), answers, needed, related))


def read_squad(path: Path) -> Documents:
    """SQuAD (1.1 or 2.0): paragraphs of articles; questions without an answer are left out."""

    def collect(data: Any, to: _Collector) -> None:
        for article in data["data"]:
            numbers = [to.number(paragraph["context"]) for paragraph in article["paragraphs"]]
            for number, paragraph in zip(numbers, article["paragraphs"], strict=True):
                for asked in paragraph["qas"]:
                    answers = [answer["text"] for answer in asked["answers"]]
                    to.ask(asked["question"], answers, [number], numbers)

    return _read(path, "squad", collect)


def read_hotpotqa(path: Path) -> Documents:
    """HotpotQA (distractor setting): every question needs the paragraphs that its supporting facts name."""

    def collect(data: Any, to: _Collector) -> None:
        for asked in data:
            numbers = {title: to.number(f"{title}\n{''.join(sentences)}") for title, sentences in asked["context"]}
            titles = {title for title, _ in asked.get("supporting_facts", [])} & set(numbers) or set(numbers)
            needed = [number for title, number in numbers.items() if title in titles]
            to.ask(asked["question"], [asked["answer"]], needed, list(numbers.values()))

    return _read(path, "hotpotqa", collect)


def _read(path: Path, name: str, collect: Callable[[Any, _Collector], None]) -> Documents:
    """The documents that `collect` finds in a JSON file. Raises InputError if it is not of that format."""
    collector = _Collector()
    try:
        collect(json.loads(read_text(name, path)), collector)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        found = f"{type(error).__name__}: {error}"
        raise InputError(f"{name} is {str(path)!r}, expected JSON in the format of {name}: {found}") from None
    if not collector.questions:
        raise InputError(f"{name} is {str(path)!r}, expected questions with answers: found none")
    return Documents(list(collector.index), collector.questions)
