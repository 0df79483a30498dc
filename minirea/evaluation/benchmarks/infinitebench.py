"""InfiniteBench (Zhang et al., arXiv 2402.13718): 12 tasks, most with contexts of 100,000 tokens and more."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Final

from minirea.evaluation.benchmarks import metrics
from minirea.evaluation.benchmarks.base import Benchmark, Dataset, Item
from minirea.evaluation.benchmarks.files import Entry
from minirea.evaluation.benchmarks.metrics import Metric

_OPTIONS: Final = "A. {OPTION_A}\nB. {OPTION_B}\nC. {OPTION_C}\nD. {OPTION_D}"
_QUESTION: Final = "{context}\n\nQuestion: {question}"
_NAMES: Final = ("OPTION_A", "OPTION_B", "OPTION_C", "OPTION_D")

# What a task's answers are compared by. The two with options take the option's letter as well.
_METRICS: Final[Mapping[str, Metric]] = {
    "longbook_qa_eng": metrics.qa_f1,
    "longbook_sum_eng": metrics.rouge_l_sum,
    "longdialogue_qa_eng": metrics.has_words_upper,
    "longbook_qa_chn": metrics.qa_f1_zh_characters,
    "code_run": metrics.last_value,
    "math_calc": metrics.leading_values,
    "math_find": metrics.first_value,
    "passkey": metrics.first_number,
    "number_string": metrics.first_number,
    "kv_retrieval": metrics.has_word,
}
_CHOICES: Final[Mapping[str, Callable[[str, str, str], float]]] = {
    "longbook_choice_eng": metrics.named_choice,
    "code_debug": metrics.named_function,
}
_METRIC_NAMES: Final = {"longbook_qa_eng": "F1", "longbook_sum_eng": "ROUGE-Lsum", "longbook_qa_chn": "F1 zh"}
_ONE_ANSWER: Final = ("code_run", "math_find", "passkey", "number_string", "kv_retrieval")
_NUMERIC: Final = ("code_run", "math_calc", "math_find")


@dataclass(frozen=True, kw_only=True)
class InfiniteBench(Benchmark):
    """Lines hold context, input, answer and, to choose from, options.

    ReAttention's authors evaluate En.MC, En.QA and En.Sum, with prompts of at most 31500, 63500 and 127500 tokens.
    """

    name: ClassVar[str] = "infinitebench"
    about: ClassVar[str] = "InfiniteBench: 12 tasks on books, scripts, code, numbers and hidden facts"
    FIELDS: ClassVar[tuple[str, ...]] = ("context", "input", "question", *_NAMES, "func", "func_call", "target")
    DATASETS: ClassVar[Mapping[str, Dataset]] = {
        "longbook_choice_eng": Dataset("En.MC", 40, f"{_QUESTION}\n{_OPTIONS}\nThe letter of the right option:"),
        "longbook_qa_eng": Dataset("En.QA", 40, f"{_QUESTION}\nThe answer in a few words:"),
        "longbook_sum_eng": Dataset(
            "En.Sum", 1200, "{context}\n\nA summary of this book:", packages=("rouge_score.rouge_scorer",)
        ),
        "longdialogue_qa_eng": Dataset("En.Dia", 40, "{context}\n\nThe character whom $$MASK$$ stands for is"),
        "longbook_qa_chn": Dataset("Zh.QA", 40, "{context}\n\n问: {question}\n简短的答案:"),
        "code_debug": Dataset(
            "Code.Debug",
            5,
            f"{{context}}\n\nOne of these functions has an error that makes it fail:\n{_OPTIONS}\nThe answer is:",
        ),
        "code_run": Dataset("Code.Run", 5, "{context}\n\n{func_call} returns the number"),
        "math_calc": Dataset("Math.Calc", 30000, "{context}\n\nThe value after every operation, in order:"),
        "math_find": Dataset("Math.Find", 3, "{context}\n\n{input}\nIn this list, {target} is"),
        "passkey": Dataset("Retrieve.PassKey", 6, "{context}\n\n{input}\nIt is"),
        "number_string": Dataset("Retrieve.Number", 12, "{context}\n\n{input}\nThe digits are"),
        "kv_retrieval": Dataset("Retrieve.KV", 50, "{context}\n\n{input}\nIts value is"),
    }
    AVERAGES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "ReAttention's 3": ("longbook_choice_eng", "longbook_qa_eng", "longbook_sum_eng"),
        "Average": tuple(DATASETS),
    }

    def items(self, name: str, entry: Entry) -> list[Item]:
        """The one question of a line."""
        answers = _answers(name, entry)
        fields = {"context": entry.string("context"), "input": entry.string("input")}
        fields |= {"question": fields["input"]} | _named(name, entry)
        if name in _CHOICES:
            options = [fields[key] for key in _NAMES]
            letter = _letter(entry, answers, options)
            text = options["ABCD".index(letter)]
            return [Item(fields, (letter, text), "accuracy", partial(_choice, _CHOICES[name], letter, text))]
        metric = partial(metrics.best, _METRICS[name], references=answers)
        return [Item(fields, answers, _METRIC_NAMES.get(name, "accuracy"), metric)]


def _choice(metric: Callable[[str, str, str], float], letter: str, text: str, answer: str) -> float:
    return metric(answer, letter, text)


def _answers(name: str, entry: Entry) -> tuple[str, ...]:
    """The right answers as text; published files hold numbers or strings, alone or in a list (of one list)."""
    value = entry.values.get("answer")
    values = value if isinstance(value, list) else [value]
    if len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    if not values or not all(isinstance(v, (str, int, float)) and not isinstance(v, bool) for v in values):
        raise entry.fail("answer", "a string, a number or a list of them")
    answers = tuple(map(str, values))
    if name in _NUMERIC and not all(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", answer) for answer in answers):
        raise entry.fail("answer", "numbers")
    if name == "math_calc":
        return (" ".join(answers),)
    return answers[:1] if name in _ONE_ANSWER else answers


def _named(name: str, entry: Entry) -> dict[str, str]:
    """What templates of some tasks name: the options, the function that is called, the number that is looked for."""
    if name in _CHOICES:
        options = entry.strings("options")
        if len(options) != 4 or not all(options):
            raise entry.fail("options", "four texts")
        return dict(zip(_NAMES, options, strict=True))
    if name == "code_run":
        call = re.search(r"(func_[0-9]+)\(-?[0-9]+\)", entry.string("input"))
        if call is None:
            raise entry.fail("input", "a call such as func_1(2)")
        return {"func": call[1], "func_call": call[0]}
    if name == "math_find":
        target = re.search(r"[Tt]he .+?(?= of)|[Tt]he \w+ number", entry.string("input"))
        if target is None:
            raise entry.fail("input", 'words such as "The largest number of"')
        return {"target": target[0].lower()}
    return {}


def _letter(entry: Entry, answers: tuple[str, ...], options: list[str]) -> str:
    """The right option's letter: the answer is its text, or its text and its letter."""
    if len(answers) == 2 and answers[1] in ("A", "B", "C", "D"):
        return answers[1]
    if len(answers) != 1 or answers[0] not in options:
        raise entry.fail("answer", "one of the options")
    return "ABCD"[options.index(answers[0])]
