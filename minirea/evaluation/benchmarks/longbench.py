"""LongBench (Bai et al., arXiv 2308.14508): 21 datasets in English, Chinese and code, of about 200 questions each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Final

from minirea.evaluation.benchmarks import metrics
from minirea.evaluation.benchmarks.base import Benchmark, Dataset, Item
from minirea.evaluation.benchmarks.files import Entry
from minirea.evaluation.benchmarks.metrics import Metric

_QA: Final = "{context}\n\nQuestion: {input}\nThe answer in a few words:"
_QA_ZH: Final = "{context}\n\n问: {input}\n简短的答案:"
_SUMMARY: Final = "{context}\n\nA summary of all of the above:"
_SHOTS: Final = "{context}\n{input}"  # examples, then the question in the same form
_COUNT: Final = "{context}\n\nSome paragraphs above occur twice or more. How many different ones are there? Number:"
_RETRIEVAL: Final = "{context}\n\nA summary of one of these paragraphs: {input}\nWhich one, as Paragraph N?"
_ROUGE: Final = ("rouge",)
_ROUGE_ZH: Final = ("jieba", "rouge")

# Metric and longest answer of each dataset are LongBench's; it gives no chat template to few-shot and code prompts.
_METRICS: Final[Mapping[str, Metric]] = {
    "F1": metrics.qa_f1,
    "F1 zh": metrics.qa_f1_zh_words,
    "ROUGE-L": metrics.rouge_l_union,
    "ROUGE-L zh": metrics.rouge_l_union_zh,
    "numbers": metrics.number_share,
    "edit similarity": metrics.code_similarity,
}
_METRIC_OF: Final = {
    "narrativeqa": "F1",
    "qasper": "F1",
    "multifieldqa_en": "F1",
    "multifieldqa_zh": "F1 zh",
    "hotpotqa": "F1",
    "2wikimqa": "F1",
    "musique": "F1",
    "dureader": "ROUGE-L zh",
    "gov_report": "ROUGE-L",
    "qmsum": "ROUGE-L",
    "multi_news": "ROUGE-L",
    "vcsum": "ROUGE-L zh",
    "trec": "class",
    "triviaqa": "F1",
    "samsum": "ROUGE-L",
    "lsht": "class",
    "passage_count": "numbers",
    "passage_retrieval_en": "numbers",
    "passage_retrieval_zh": "numbers",
    "lcc": "edit similarity",
    "repobench-p": "edit similarity",
}
_FIRST_LINE: Final = ("trec", "triviaqa", "samsum", "lsht")  # only it counts: models go on with further examples


@dataclass(frozen=True, kw_only=True)
class LongBench(Benchmark):
    """Lines hold input, context, answers and, to classify, all_classes. The templates are its dataset2prompt.json.

    The rows are those of its paper. They are all in the evaluation that ReAttention's authors publish, with prompts of
    at most 31500 tokens; whether their paper prints each of them or the averages only, this table has both.
    """

    name: ClassVar[str] = "longbench"
    about: ClassVar[str] = "LongBench: 21 datasets of question answering, summaries, examples, retrieval and code"
    FIELDS: ClassVar[tuple[str, ...]] = ("context", "input")
    PROMPT_FILE: ClassVar[str] = "dataset2prompt.json"
    DATASETS: ClassVar[Mapping[str, Dataset]] = {
        "narrativeqa": Dataset("NarrativeQA", 128, _QA),
        "qasper": Dataset("Qasper", 128, _QA),
        "multifieldqa_en": Dataset("MultiFieldQA-en", 64, _QA),
        "multifieldqa_zh": Dataset("MultiFieldQA-zh", 64, _QA_ZH, packages=("jieba",)),
        "hotpotqa": Dataset("HotpotQA", 32, _QA),
        "2wikimqa": Dataset("2WikiMultihopQA", 32, _QA),
        "musique": Dataset("MuSiQue", 32, _QA),
        "dureader": Dataset("DuReader", 128, _QA_ZH, packages=_ROUGE_ZH),
        "gov_report": Dataset("GovReport", 512, _SUMMARY, packages=_ROUGE),
        "qmsum": Dataset("QMSum", 512, "{context}\n\nAsked about this meeting: {input}\nAnswer:", packages=_ROUGE),
        "multi_news": Dataset("MultiNews", 512, _SUMMARY, packages=_ROUGE),
        "vcsum": Dataset("VCSUM", 512, "{context}\n\n以上会议的总结:", packages=_ROUGE_ZH),
        "trec": Dataset("TREC", 64, _SHOTS, chat=False),
        "triviaqa": Dataset("TriviaQA", 32, _SHOTS, chat=False),
        "samsum": Dataset("SAMSum", 128, _SHOTS, chat=False, packages=_ROUGE),
        "lsht": Dataset("LSHT", 64, _SHOTS, chat=False),
        "passage_count": Dataset("PassageCount", 32, _COUNT),
        "passage_retrieval_en": Dataset("PassageRetrieval-en", 32, _RETRIEVAL),
        "passage_retrieval_zh": Dataset("PassageRetrieval-zh", 32, "{context}\n\n摘要: {input}\n出自哪一段, 如段落1:"),
        "lcc": Dataset("LCC", 64, "{context}", chat=False),
        "repobench-p": Dataset("RepoBench-P", 64, "{context}{input}", chat=False),
    }
    # LongBench's own figure for a model is the mean over its six categories.
    AVERAGES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Single-Document QA": ("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh"),
        "Multi-Document QA": ("hotpotqa", "2wikimqa", "musique", "dureader"),
        "Summarization": ("gov_report", "qmsum", "multi_news", "vcsum"),
        "Few-shot Learning": ("trec", "triviaqa", "samsum", "lsht"),
        "Synthetic": ("passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
        "Code": ("lcc", "repobench-p"),
        "Average of categories": (
            *("Single-Document QA", "Multi-Document QA", "Summarization"),
            *("Few-shot Learning", "Synthetic", "Code"),
        ),
    }

    def items(self, name: str, entry: Entry) -> list[Item]:
        """The one question of a line."""
        fields = {key: entry.string(key) for key in self.FIELDS}
        answers = entry.strings("answers")
        kind = _METRIC_OF[name]
        if kind == "numbers" and not all(re.search(r"\d", answer) for answer in answers):
            raise entry.fail("answers", "answers with a number in them")
        metric = (
            partial(metrics.classification, classes=entry.strings("all_classes")) if kind == "class" else _METRICS[kind]
        )
        return [Item(fields, answers, kind, partial(_score, metric, answers, name in _FIRST_LINE))]


def _score(metric: Metric, references: tuple[str, ...], first_line: bool, answer: str) -> float:
    if first_line:
        answer = answer.lstrip("\n").split("\n")[0]
    return metrics.best(metric, answer, references)
