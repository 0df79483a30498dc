"""What the three benchmarks share: from data files and templates to prompts, and from records to the papers' rows."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from minirea.errors import InputError, MissingFileError
from minirea.evaluation.benchmarks import files, metrics
from minirea.evaluation.benchmarks.files import Entry, Template
from minirea.evaluation.frame.cells import Prompt, PromptCell, Question, common_prefix
from minirea.evaluation.frame.records import Record
from minirea.evaluation.frame.tasks import Task, option, parse_path, require
from minirea.evaluation.lengths import parse_length, short_length

if TYPE_CHECKING:
    from minirea.tokenizer import Tokenizer


@dataclass(frozen=True)
class Dataset:
    """One data file of a benchmark.

    Args:
        row: its name in papers' tables.
        max_tokens: of an answer, as the benchmark has it.
        template: minirea's own wording, for those who bring none.
        chat: whether its prompts go into a chat template where the user asks for that.
        packages: what its metric needs beyond minirea's own dependencies.
    """

    row: str
    max_tokens: int
    template: str
    chat: bool = True
    packages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Item:
    """One question of a data file.

    Args:
        fields: what a template may use.
        expected: the right answers.
        metric: name of the score, for the record.
        score: of an answer, 0 to 1.
    """

    fields: Mapping[str, str]
    expected: tuple[str, ...]
    metric: str
    score: Callable[[str], float]


@dataclass(frozen=True)
class _Where:
    """Where a question stands in its file: the line's number and first byte, and the question's number in the line."""

    line: int
    offset: int
    index: int


@dataclass(frozen=True)
class _Source:
    """A data file that is to be run: its dataset, its template, its questions by the context that they share."""

    name: str
    path: Path
    template: Template
    max_tokens: int
    groups: tuple[tuple[_Where, ...], ...]
    sizes: tuple[int, ...]  # bytes of each group's longest line: no prompt has more tokens than that, or hardly any


@dataclass(frozen=True, kw_only=True)
class Benchmark(Task):
    """A benchmark's data files, with its rules and metrics.

    Questions about one context are asked after reading it once. Prompts are read from the files when they are asked.
    """

    DATASETS: ClassVar[Mapping[str, Dataset]]  # by the name of the data file
    FIELDS: ClassVar[tuple[str, ...]]  # that templates may use; the first is the long one, and must be there
    AVERAGES: ClassVar[Mapping[str, tuple[str, ...]]]  # row of the summary -> datasets, or rows above it
    PROMPT_FILE: ClassVar[str] = ""  # of templates, if the benchmark publishes one as data

    lengths: tuple[int, ...] = option(
        (31500,),
        "the longest prompt, in tokens; a longer one is cut as the benchmark does",
        metavar="N,N",
        parse=parse_length,
        many="comma",
    )
    samples: int = option(0, "lines of each data file, from the first; 0 is all", metavar="N", parse=int)
    data: Path | None = option(
        None, "directory of the published data files", metavar="DIR", parse=parse_path, required=True
    )
    datasets: tuple[str, ...] = option((), "only these, by file name", metavar="A,B", many="comma")
    prompts: Path | None = option(
        None,
        "JSON object of dataset: template (default: the one published in DIR, if there is, else minirea's wording)",
        metavar="FILE",
        parse=parse_path,
    )
    chat: bool = option(False, "put prompts into the model's chat template, where the benchmark does")

    def check(self) -> None:
        """As Task.check, but 0 samples are all there are."""
        require("lengths", self.lengths, bool(self.lengths) and min(self.lengths) >= 2, "lengths of at least 2 tokens")
        require("samples", self.samples, self.samples >= 0, "at least 0")
        require("data", self.data, self.data is not None, "the directory of the published data files")
        for name in self.datasets:
            require("datasets", name, name in self.DATASETS, f"one of {', '.join(self.DATASETS)}")

    @abstractmethod
    def items(self, name: str, entry: Entry) -> list[Item]:
        """The questions of one line of data file `name`; none if the benchmark does not score them automatically.

        Raises:
            InputError: a field is missing or malformed.
        """

    def texts(
        self,
        name: str,  # noqa: ARG002  L-Eval cuts one dataset otherwise
        items: Sequence[Item],
        template: Template,
        tokenizer: Tokenizer,
        length: int,
    ) -> list[tuple[str, int]]:
        """The prompt of each item, at most `length` tokens, and how many tokens were cut out of it.

        LongBench and InfiniteBench keep as much of the beginning as of the end.
        """
        return [cut_middle(template.fill(item.fields), tokenizer, length) for item in items]

    def cells(self, tokenizer: Tokenizer) -> Sequence[PromptCell]:
        """A cell for each length and context. Reads every line that will be asked, and keeps where it stands."""
        if self.chat and not tokenizer.has_chat_template:
            raise InputError("chat is on, but this model has no chat template; expected a chat model or no chat")
        sources = self._sources()
        metrics.check_packages(*(p for source in sources for p in self.DATASETS[source.name].packages))
        return [
            PromptCell(
                tuple(
                    {"kind": source.name, "length": length, "line": where.line, "question": where.index}
                    for where in group
                ),
                min(length, size),
                build=partial(self._prompt, source, group, tokenizer, length),
            )
            for length in sorted(self.lengths)
            for source in sources
            for group, size in zip(source.groups, source.sizes, strict=True)
        ]

    def identity(self) -> Record:
        """As Task.identity; the directory is what the files used in it hold."""
        prompts = self._prompt_file()
        return {
            "task": self.name,
            "seed": self.seed,
            "datasets": list(self.datasets),
            "chat": self.chat,
            "data": {source.path.name: _sha256(source.path) for source in self._sources(index=False)},
            "prompts": _sha256(prompts) if prompts else None,
        }

    def summarize(self, records: Sequence[Record]) -> list[Record]:
        """The mean of every attention mode, dataset and length in the papers' order, and the benchmark's averages."""
        told: dict[str, Record] = {}  # what a dataset's answers were scored by and asked with
        for record in records:
            if "metric" in record:
                told.setdefault(record["kind"], {key: record[key] for key in ("metric", "prompts", "prompts_sha256")})
        means = {(r["attention"], r["length"], r["kind"]): r for r in super().summarize(records)}
        rows: list[Record] = []
        for attention, length in dict.fromkeys((attention, length) for attention, length, _ in means):
            found = {
                name: means[attention, length, name] | {"row": dataset.row} | told.get(name, {})
                for name, dataset in self.DATASETS.items()
                if (attention, length, name) in means
            }
            for label, members in self.AVERAGES.items():
                if average := _average(label, members, found):
                    found[label] = {"attention": attention, "kind": label, "length": length} | average
            rows += found.values()
        return rows

    def table(self, rows: Sequence[Record]) -> list[list[str]]:
        """Scores in percent: a line for each attention mode and row, a column for each length."""
        lengths = sorted({row["length"] for row in rows})
        lines: dict[tuple[str, ...], dict[int, str]] = {}
        for row in rows:
            shown = "skipped" if row["score"] is None else f"{100 * row['score']:.2f}"
            head = (row["attention"], row["row"], row.get("metric", ""), row.get("prompts", ""))
            lines.setdefault(head, {})[row["length"]] = shown
        heading = ["attention", self.name, "metric", "prompts", *map(short_length, lengths)]
        return [heading, *([*head, *(of.get(n, "-") for n in lengths)] for head, of in lines.items())]

    # -----------------------------------------------------------------------------------------------------------
    def _sources(self, index: bool = True) -> list[_Source]:
        """The data files to be run, in the order of DATASETS; `index`: with where their questions are."""
        assert self.data is not None
        wanted = self.datasets or tuple(self.DATASETS)
        found = files.find(self.data, {f"{name}.jsonl" for name in wanted})
        if missing := [name for name in self.datasets if f"{name}.jsonl" not in found]:
            raise MissingFileError(f"{self.data}: no {missing[0]}.jsonl in it")
        if not found:
            expected = ", ".join(f"{name}.jsonl" for name in list(self.DATASETS)[:3])
            raise MissingFileError(f"{self.data}: no data file of {self.name} in it, expected {expected}, ...")
        templates = self._templates(wanted) if index else {}
        sources = []
        for name, dataset in self.DATASETS.items():
            path = found.get(f"{name}.jsonl")
            if path is not None and name in wanted:
                groups, sizes = self._groups(name, path) if index else ((), ())
                template = templates.get(name, Template(dataset.template))
                sources.append(_Source(name, path, template, dataset.max_tokens, groups, sizes))
        return sources

    def _groups(self, name: str, path: Path) -> tuple[tuple[tuple[_Where, ...], ...], tuple[int, ...]]:
        """Questions that share a context, and the size of the longest line of each group."""
        groups: dict[bytes, list[_Where]] = {}
        sizes: dict[bytes, int] = {}
        for count, (number, offset, line) in enumerate(files.entries(path)):
            if self.samples and count == self.samples:
                break
            for index, item in enumerate(self.items(name, files.parse(path, number, line))):
                key = hashlib.sha256(item.fields[self.FIELDS[0]].encode()).digest()
                groups.setdefault(key, []).append(_Where(number, offset, index))
                sizes[key] = max(sizes.get(key, 0), len(line))
        if not groups:
            raise InputError(f"{path}: holds no question that can be scored, expected at least one")
        return tuple(map(tuple, groups.values())), tuple(sizes.values())

    def _prompt_file(self) -> Path | None:
        if self.prompts is not None or not self.PROMPT_FILE or self.data is None:
            return self.prompts
        return files.find(self.data, {self.PROMPT_FILE}).get(self.PROMPT_FILE)

    def _templates(self, wanted: tuple[str, ...]) -> dict[str, Template]:
        """The user's templates. Those the user names must cover the datasets the user names."""
        path = self._prompt_file()
        templates = files.read_templates(path, self.FIELDS) if path else {}
        if self.prompts is not None and self.datasets and (missing := [n for n in wanted if n not in templates]):
            raise InputError(f"{path}: {missing[0]} is absent, expected a template")
        return templates

    def _prompt(self, source: _Source, group: Sequence[_Where], tokenizer: Tokenizer, length: int) -> Prompt:
        lines = {w.offset: self.items(source.name, files.entry_at(source.path, w.line, w.offset)) for w in group}
        items = [lines[where.offset][where.index] for where in group]
        texts = self.texts(source.name, items, source.template, tokenizer, length)
        chat = self.chat and self.DATASETS[source.name].chat
        ids = [
            tokenizer.encode_chat([{"role": "user", "content": text}]) if chat else tokenizer.encode(text)
            for text, _ in texts
        ]
        shared = _common(ids) if len(ids) > 1 else 0
        questions = [
            Question(
                own[shared:],
                item.expected,
                item.score,
                source.max_tokens,
                extra={
                    "metric": item.metric,
                    "prompts": source.template.origin,
                    "prompts_sha256": source.template.sha256,
                    "chat": chat,
                    "cut_tokens": cut,
                },
            )
            for item, own, (_, cut) in zip(items, ids, texts, strict=True)
        ]
        return Prompt(ids[0][:shared], questions)


def cut_middle(text: str, tokenizer: Tokenizer, length: int) -> tuple[str, int]:
    """A text of at most `length` tokens, BOS included, and how many were cut out of its middle.

    The kept tokens become text again, as in the benchmarks' own scripts: a chat template goes around text.
    """
    ids = tokenizer.encode(text)
    half = length // 2
    if len(ids) <= length:
        return text, 0
    return tokenizer.decode(ids[:half]) + tokenizer.decode(ids[-half:]), len(ids) - 2 * half


def _common(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with, one of each left out: a question has at least one."""
    limit = min(map(len, prompts)) - 1
    return min(limit, common_prefix(min(prompts), max(prompts)))  # what these two share, all between them share


def _average(label: str, members: Sequence[str], found: Mapping[str, Record]) -> Record | None:
    """The mean of the members that have a score; says of how many where some are missing."""
    rows = [found[name] for name in members if name in found and found[name]["score"] is not None]
    if not rows:
        return None
    counted = label if len(rows) == len(members) else f"{label} ({len(rows)} of {len(members)})"
    return {
        "row": counted,
        "score": sum(row["score"] for row in rows) / len(rows),
        "answers": sum(row["answers"] for row in rows),
        "skipped": sum(row["skipped"] for row in rows),
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
