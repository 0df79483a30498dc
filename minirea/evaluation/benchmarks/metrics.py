"""How far an answer agrees with a reference: the metrics of LongBench, L-Eval and InfiniteBench, each from 0 to 1.

Every metric takes the answer first and one reference second; `best` takes the best over several references. Where two
benchmarks give one name to different things, there are two functions: ROUGE-L of the package `rouge` (LongBench: words
split at blanks, every word counted once, union over sentences) is not ROUGE-L of `rouge_score` (L-Eval, InfiniteBench).
The packages are the extra `minirea[eval]` and are imported when first needed.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import re
import string
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from itertools import takewhile
from typing import Any, Final

from minirea.errors import InputError

Metric = Callable[[str, str], float]


def best(metric: Metric, answer: str, references: Sequence[str]) -> float:
    """The highest score over several references; 0 if there is none."""
    return max((metric(answer, reference) for reference in references), default=0.0)


# ---------------------------------------------------------------------------------------------------------------
# F1 over tokens
# ---------------------------------------------------------------------------------------------------------------
def token_f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over tokens, each token as often as it occurs."""
    common = sum((Counter(answer) & Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference)) if common else 0.0


def normalized(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and repeated blanks (Rajpurkar et al., SQuAD)."""
    text = text.lower().translate(_NO_ASCII_PUNCTUATION)
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", text).split())


def qa_f1(answer: str, reference: str) -> float:
    """F1 over the words of the normalized texts."""
    return token_f1(normalized(answer).split(), normalized(reference).split())


def qa_f1_zh_words(answer: str, reference: str) -> float:
    """F1 over Chinese words, as LongBench has it: cut by jieba first, punctuation taken out of every word after."""
    return token_f1(*([word for w in _words_zh(t) if (word := _normalized_zh(w))] for t in (answer, reference)))


def qa_f1_zh_characters(answer: str, reference: str) -> float:
    """F1 over Chinese characters, as InfiniteBench has it."""
    return token_f1(_normalized_zh(answer), _normalized_zh(reference))


def _normalized_zh(text: str) -> str:
    return "".join(text.lower().translate(_NO_PUNCTUATION_ZH).split())


# The Chinese punctuation that both benchmarks remove, as ranges of code points. It lacks U+3008 to U+300A, which does
# not look meant; adding them would give figures that compare with no published ones.
_RANGES_ZH: Final = (
    "2013-2014 2018-2019 201B-201F 2026 2027 3001-3003 300B-3011 3014-301F 3030 303E-303F FE4F "
    "FF01-FF0D FF0F FF1A-FF20 FF3B-FF40 FF5B-FF64"
)
_NO_ASCII_PUNCTUATION: Final = dict.fromkeys(map(ord, string.punctuation))
_NO_PUNCTUATION_ZH: Final = _NO_ASCII_PUNCTUATION | dict.fromkeys(
    code
    for first, _, last in (part.partition("-") for part in _RANGES_ZH.split())
    for code in range(int(first, 16), int(last or first, 16) + 1)
)


# ---------------------------------------------------------------------------------------------------------------
# ROUGE
# ---------------------------------------------------------------------------------------------------------------
def rouge_l_union(answer: str, reference: str) -> float:
    """F of ROUGE-L as the package `rouge` computes it; sentences end at full stops. Nothing to compare scores 0."""
    if not (_sentences(answer) and _sentences(reference)):
        return 0.0
    with _recursion(len(answer) + len(reference)):  # it walks back through its table one call for each step
        scores = _rouge().get_scores(answer, reference)
    return float(scores[0]["rouge-l"]["f"])


def rouge_l_union_zh(answer: str, reference: str) -> float:
    """`rouge_l_union` over Chinese words."""
    return rouge_l_union(" ".join(_words_zh(answer)), " ".join(_words_zh(reference)))


def rouge_l(answer: str, reference: str) -> float:
    """F of ROUGE-L (Lin 2004), no stemming, as the package `rouge_score` computes it."""
    return float(_rouge_scorer("rougeL").score(reference, answer)["rougeL"].fmeasure)


def rouge_l_sum(answer: str, reference: str) -> float:
    """F of summary-level ROUGE-L: a line is a sentence; package `rouge_score`, no stemming."""
    return float(_rouge_scorer("rougeLsum").score(reference, answer)["rougeLsum"].fmeasure)


def _sentences(text: str) -> list[str]:
    return [sentence for sentence in text.split(".") if sentence.strip()]


@cache
def _rouge() -> Any:
    return _library("rouge").Rouge(metrics=["rouge-l"])


@cache
def _rouge_scorer(kind: str) -> Any:
    return _library("rouge_score.rouge_scorer").RougeScorer([kind], use_stemmer=False)


@contextlib.contextmanager
def _recursion(depth: int) -> Iterator[None]:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(before + depth)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


# ---------------------------------------------------------------------------------------------------------------
# Labels, numbers and code
# ---------------------------------------------------------------------------------------------------------------
def number_share(answer: str, reference: str) -> float:
    """Of the numbers in the answer, how many are the reference's first. Counting and retrieval in LongBench."""
    numbers, right = re.findall(r"\d+", answer), re.search(r"\d+", reference)
    return numbers.count(right[0]) / len(numbers) if numbers and right else 0.0


def classification(answer: str, reference: str, classes: Sequence[str]) -> float:
    """1 / n if the answer names n of the classes and the right one is among them (LongBench).

    A class whose name is a part of the right one's does not count: naming the right one names it too.
    """
    named = [c for c in classes if c in answer and (c == reference or c not in reference)]
    return 1 / len(named) if reference in named else 0.0


def code_similarity(answer: str, reference: str) -> float:
    """Edit similarity of the answer's first line of code, in whole percent (LongBench).

    The first line without a backtick, "#" or "//". The ratio is that of difflib, which is what fuzzywuzzy, the package
    LongBench asks for, computes unless python-Levenshtein is installed besides.
    """
    lines = answer.lstrip("\n").split("\n")
    code = next((line for line in lines if not re.search(r"`|#|//", line)), "")
    return round(100 * difflib.SequenceMatcher(None, code, reference).ratio()) / 100 if code and reference else 0.0


def first_number(answer: str, reference: str) -> float:
    """1 if the answer's first run of digits is the reference. Passkey and number string in InfiniteBench."""
    found = re.search(r"[0-9]+", answer)
    return float(found is not None and found[0] == reference)


def first_value(answer: str, reference: str) -> float:
    """1 if the answer's first number equals the reference, with its decimal places. Math.Find in InfiniteBench."""
    found = re.search(r"[0-9]+(?:\.[0-9]+)?", answer)
    return float(found is not None and float(found[0]) == float(reference))


def last_value(answer: str, reference: str) -> float:
    """1 if the answer's last word is the reference as an integer. Code.Run in InfiniteBench."""
    words = _without(answer, "\n.`'\":").split()
    return float(bool(words) and re.fullmatch(r"[-+]?[0-9]+", words[-1]) is not None and _same(words[-1], reference))


def has_word(answer: str, reference: str) -> float:
    """1 if the reference is one of the answer's words. Retrieve.KV in InfiniteBench."""
    return float(reference in _without(answer, "\n:\"'.,?!{}").split())


def has_words_upper(answer: str, reference: str) -> float:
    """1 if the answer holds the reference's words one after another, in whatever case. En.Dia in InfiniteBench."""
    words, wanted = (_without(text.upper(), "\n:\"'.,?!{}").split() for text in (answer, reference))
    places = range(len(words) - len(wanted) + 1) if wanted else ()
    return float(any(words[place : place + len(wanted)] == wanted for place in places))


def leading_values(answer: str, reference: str) -> float:
    """Share of the reference's numbers that the answer's agree with before the first that differs. Math.Calc."""
    given, right = re.findall(r"[0-9]+", answer), reference.split()
    same = takewhile(lambda pair: _same(*pair), zip(given, right, strict=False))
    return sum(1 for _ in same) / len(right) if right else 0.0


def named_choice(answer: str, letter: str, text: str) -> float:
    """1 if a multiple-choice answer gives the right option's letter or text. En.MC in InfiniteBench.

    An answer that begins with a letter from A to D is that letter. Else what follows "answer is" or the like counts,
    else the first word that is one of the letters.
    """
    answer = answer.strip()
    if not answer or answer[0] in "ABCD":
        return float(answer[:1] == letter)
    if answer in (letter, text):
        return 1.0
    plain = _single_blanks(_without(answer, "\n\"'.,?!{}"))
    for prefix in ("answer is:", "answer:", "answer is", "option is"):
        if prefix in plain:
            return float(_after(plain, prefix).startswith((letter, text)))
    return float(next((word for word in plain.split() if word in "ABCD"), "") == letter)


def named_function(answer: str, letter: str, name: str) -> float:
    """1 if a multiple-choice answer gives the right option's letter or function. Code.Debug in InfiniteBench.

    The letter at the start needs "." or ":" behind it; else what follows "answer is:" or the like counts.
    """
    answer = answer.strip()
    if answer[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    plain = _single_blanks(_without(answer, "\n`'\"-*").replace("Option", " ").replace("option", " "))
    for prefix in ("answer is:", "is:", "answer:"):
        if prefix in plain:
            return float(_after(plain, prefix).startswith((letter, name)))
    return 0.0


def _same(given: str, right: str) -> bool:
    """Whether two integers are equal; of any length, which int() does not take."""
    return _plain_integer(given) == _plain_integer(right)


def _plain_integer(digits: str) -> str:
    sign, digits = ("-" if digits.startswith("-") else ""), digits.lstrip("+-").lstrip("0")
    return sign + digits if digits else "0"


def _without(text: str, characters: str) -> str:
    return text.translate(dict.fromkeys(map(ord, characters), " "))


def _single_blanks(text: str) -> str:
    return re.sub(" +", " ", text)


def _after(text: str, prefix: str) -> str:
    return text.split(prefix, 1)[1][1:]  # the character between is dropped, whatever it is: the benchmark's rule


# ---------------------------------------------------------------------------------------------------------------
# Examinations (L-Eval)
# ---------------------------------------------------------------------------------------------------------------
def single_choice(answer: str, reference: str) -> float:
    """1 if the first of the letters A to D in the answer is the right one.

    L-Eval takes an answer without any letter for "A"; here it is wrong.
    """
    found = re.search("[A-D]", answer)
    return float(found is not None and found[0] == _letters(reference))


def multiple_choice(answer: str, reference: str) -> float:
    """1 if the answer names all the right letters and no other, 1/4 if only some of them (L-Eval's Coursera)."""
    given, right = set(_chosen_letters(answer)), set(_letters(reference))
    return 1.0 if given == right else 0.25 if given and given < right else 0.0


def _letters(reference: str) -> str:
    return re.sub("[^A-D]", "", (reference.split() or [""])[0])


def _chosen_letters(answer: str) -> str:
    """Several letters at the start; else those that stand before a blank, "." or ")"; else the first ones there are."""
    start = re.match("[A-D]*", answer)
    assert start is not None
    if len(start[0]) > 1:
        return start[0]
    listed = re.findall(r"([A-D])(?=[\s.)])", answer.split("Question")[0])
    anywhere = re.search("[A-D]+", answer)
    return start[0] + "".join(listed) or (anywhere[0] if anywhere else "")


def math_answer(answer: str, reference: str) -> float:
    """1 if the result is right: the number after "The answer is", else the first paragraph's last (L-Eval's GSM)."""
    given, right = _result(answer), _result(reference)
    return float(bool(given) and _same(given, right))


def _result(text: str) -> str:
    said = re.search(r"The answer is (\S+)", text)
    words = [said[1]] if said else re.findall(r"\S*\d\S*", text.split("\n\n")[0])
    return re.sub(r"[^0-9]", "", words[-1].split(".")[0]) if words else ""


def holds_reference(answer: str, reference: str) -> float:
    """1 if the answer's first line of any length holds the reference, but for case and blanks (L-Eval's topics)."""
    line = next((line for line in answer.split("\n") if len(line) > 1), answer)
    return float("".join(reference.lower().split()) in "".join(line.lower().split()))


def code_output(answer: str, reference: str) -> float:
    """1 if the output of a program is among the last words of the answer (L-Eval's CodeU).

    As many words as the output has and three more; from "the final output" onwards where the answer says so.
    """
    right, given = _code_text(reference), re.sub(_FILLERS, "", _code_text(answer))
    num_words = len(reference.split()) + 3
    _, said, after = given.rpartition("the final output")
    words = after.split()[:num_words] if said else given.split()[-num_words:]
    return float("".join(right.lower().split()) in "".join(words).lower())


_FILLERS: Final = "will be|would be|of the code|the value of|the result of|printed|is"


def _code_text(text: str) -> str:
    text = re.sub(r"[,'\\]", "", re.sub(r"\s+", " ", text)).replace(".0", "")
    return re.sub(r"(?<=[\[\]]) (?=[\[\]])", "", text)


def judgement(answer: str, reference: str) -> float:
    """1 if the first word with "true" or "false" in it is the right one (L-Eval's SFiction, the document's world)."""
    found = re.search("true|false", answer.lower())
    return float(found is not None and reference.lower().startswith(found[0]))


# ---------------------------------------------------------------------------------------------------------------
# Packages of the extra `eval`
# ---------------------------------------------------------------------------------------------------------------
@cache
def _words_zh_cutter() -> Callable[[str], list[str]]:
    jieba = _library("jieba")
    jieba.setLogLevel(logging.WARNING)  # it tells of every step of loading its dictionary
    cut: Callable[[str], list[str]] = jieba.lcut
    return cut


def _words_zh(text: str) -> list[str]:
    return _words_zh_cutter()(text)


def check_packages(*modules: str) -> None:
    """Import what metrics will need, so that nothing is missing after hours of answers.

    Raises:
        InputError: one is not installed; says how to install it.
    """
    for module in modules:
        _library(module)


def _library(module: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jieba's source has escapes that Python 3.12 warns of
            return import_module(module)
    except ImportError as error:
        missing = error.name or module
        raise InputError(
            f"the package {missing!r} is not installed, expected it for this metric: pip install 'minirea[eval]'"
        ) from None
