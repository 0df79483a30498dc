"""L-Eval (An et al., arXiv 2307.11088): 20 datasets, with several instructions about every document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final

from minirea.errors import InputError
from minirea.evaluation.benchmarks import metrics
from minirea.evaluation.benchmarks.base import Benchmark, Dataset, Item
from minirea.evaluation.benchmarks.files import Entry, Template
from minirea.evaluation.benchmarks.metrics import Metric

if TYPE_CHECKING:
    from minirea.tokenizer import Tokenizer

_MAX_TOKENS: Final = 512  # of every answer
_CHOICE: Final = "{document}\n\n{instruction}\nThe letter of the right option (letters, if several are right):"
_SHORT: Final = "{document}\n\n{instruction}\nThe answer, and nothing else:"
# The benchmark tells how long the reference is wherever F1 or ROUGE compares with it, since both reward its length.
_OPEN: Final = "{document}\n\n{instruction}\nThe answer, in {words} words:"
_EXAMS: Final[Mapping[str, Metric]] = {
    "tpo": metrics.single_choice,
    "gsm100": metrics.math_answer,
    "quality": metrics.single_choice,
    "coursera": metrics.multiple_choice,
    "topic_retrieval_longchat": metrics.holds_reference,
    "codeU": metrics.code_output,
    "sci_fi": metrics.judgement,
}
_NOT_AUTOMATIC: Final = ("human", "LLM")  # what a line's "evaluation" says where people or a model judge


def _open(row: str) -> Dataset:
    return Dataset(row, _MAX_TOKENS, _OPEN, packages=("rouge_score.rouge_scorer",))


@dataclass(frozen=True, kw_only=True)
class LEval(Benchmark):
    """Lines hold input (the document), instructions, outputs and evaluation: exam, f1 or rouge; others are left out.

    ReAttention's authors evaluate 12 of the datasets, those that come first and that the last row averages.

    Two rules differ from L-Eval's scripts. An answer without a letter is wrong, not "A". And SFiction is scored on what
    holds in the document only; the benchmark also asks what holds in the real world, without the document.
    """

    name: ClassVar[str] = "leval"
    about: ClassVar[str] = "L-Eval: 20 datasets of examinations, questions and summaries, several to each document"
    FIELDS: ClassVar[tuple[str, ...]] = ("document", "instruction", "words")
    DATASETS: ClassVar[Mapping[str, Dataset]] = {
        "tpo": Dataset("TOEFL", _MAX_TOKENS, _CHOICE),
        "gsm100": Dataset("GSM", _MAX_TOKENS, "{document}\n\n{instruction}"),
        "quality": Dataset("QuALITY", _MAX_TOKENS, _CHOICE),
        "coursera": Dataset("Coursera", _MAX_TOKENS, _CHOICE),
        "topic_retrieval_longchat": Dataset("TopicRet", _MAX_TOKENS, _SHORT),
        "scientific_qa": _open("Qasper"),
        "multidoc_qa": _open("MultiDoc2Dial"),
        "paper_assistant": _open("Openreview"),
        "natural_question": _open("NQ"),
        "financial_qa": _open("LongFQA"),
        "legal_contract_qa": _open("CUAD"),
        "narrative_qa": _open("NarrativeQA"),
        "codeU": Dataset("CodeU", _MAX_TOKENS, _SHORT),
        "sci_fi": Dataset("SFiction", _MAX_TOKENS, _SHORT),
        "gov_report_summ": _open("GovReport"),
        "meeting_summ": _open("QMSum"),
        "news_summ": _open("Multi-News"),
        "patent_summ": _open("BigPatent"),
        "review_summ": _open("SPACE"),
        "tv_show_summ": _open("SummScreen"),
    }
    AVERAGES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Closed-ended": tuple(_EXAMS),
        "Open-ended": tuple(name for name in DATASETS if name not in _EXAMS),
        "ReAttention's 12": tuple(DATASETS)[:12],
    }

    def items(self, name: str, entry: Entry) -> list[Item]:
        """A question for each instruction."""
        evaluation = entry.string("evaluation")
        document = entry.string("input")
        instructions, outputs = entry.strings("instructions"), entry.strings("outputs")
        if len(instructions) != len(outputs):
            raise entry.fail("outputs", f"as many as there are instructions, {len(instructions)}")
        if evaluation in _NOT_AUTOMATIC:
            return []
        scores: dict[str, Metric] = {"f1": metrics.qa_f1, "rouge": metrics.rouge_l}
        scores |= {"exam": _EXAMS[name]} if name in _EXAMS else {}
        if evaluation not in scores:
            raise entry.fail("evaluation", f"one of {', '.join([*scores, *_NOT_AUTOMATIC])}")
        metric = {"exam": "exam", "f1": "F1", "rouge": "ROUGE-L"}[evaluation]
        return [
            Item(
                {"document": document, "instruction": instruction, "words": str(len(output.split()))},
                (output,),
                metric,
                partial(metrics.best, scores[evaluation], references=(output,)),
            )
            for instruction, output in zip(instructions, outputs, strict=True)
        ]

    def texts(
        self, name: str, items: Sequence[Item], template: Template, tokenizer: Tokenizer, length: int
    ) -> list[tuple[str, int]]:
        """As in Benchmark; L-Eval keeps the document's beginning, of a code base the end, the same for all questions.

        Raises:
            InputError: an instruction alone is longer than `length`.
        """
        document = items[0].fields["document"]
        ids = tokenizer.encode(document, add_special_tokens=False)
        around = max(len(tokenizer.encode(template.fill({**item.fields, "document": ""}))) for item in items)
        room = length - around
        if room < 0:
            raise InputError(
                f"lengths is {length}, expected more than the {around} tokens of a question of {name} alone"
            )
        if len(ids) > room:
            kept = ids[-room:] if name == "codeU" and room else ids[:room]
            document = tokenizer.decode(kept)
        cut = max(0, len(ids) - room)
        return [(template.fill({**item.fields, "document": document}), cut) for item in items]
