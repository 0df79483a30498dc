"""Tasks and their options. A Task lists Cells; a Cell reads one context and yields a record for each answer.

A task is a frozen dataclass. Its fields are its options: `option(...)` makes one, and every option is both a flag of
`minirea eval NAME` and a keyword argument of `minirea.evaluate`. Modules that define tasks are imported for `--help`.
So they must not import torch or numpy themselves, only in the function that needs it or in another module.

The runner gives every cell to a model in every attention mode, writes one JSON line for each record the moment it
comes, and on restart asks a cell only for the records that are missing. Therefore:

- `Task.cells` is cheap. It says which records there will be, and leaves prompts to be built when a cell is run.
- What a record holds is a pure function of the task's options, of its place and of the model: seed random numbers with
  `rng(task.seed, *place)`, never with anything that depends on what ran before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from minirea.checks import known_options, shown
from minirea.errors import InputError
from minirea.evaluation.frame import plots
from minirea.evaluation.frame.cells import Cell
from minirea.evaluation.frame.records import Record
from minirea.evaluation.lengths import parse_length, short_length

if TYPE_CHECKING:
    from minirea.tokenizer import Tokenizer


# ---------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Option:
    """How an option looks on the command line.

    Args:
        help: one line for --help.
        metavar: what stands for its value there.
        parse: str -> value; raises ValueError whose message says what was expected. Of a value given in Python it gets
            what str makes of that, so that a number means what it does when it is typed.
        many: "" (one value), "comma" (a,b,c) or "list" (A B C: for files). The field is a tuple then.
        choices: the only values allowed, each of them where there are many.
        required: the default is no value that can be used.
    """

    help: str
    metavar: str = ""
    parse: Callable[[str], Any] = str
    many: str = ""
    choices: tuple[Any, ...] = ()
    required: bool = False


def option(default: Any, help: str, **how: Any) -> Any:  # noqa: A002  as argparse calls it
    """A field of a Task. See Option for the keyword arguments. A bool with default False becomes a switch."""
    if default is False:
        how["parse"] = parse_switch
    return field(default=default, metadata={"option": Option(help, **how)})


def rng(seed: int, *place: object) -> random.Random:
    """The random numbers of one place in a run, the same in every mode and in every order of running."""
    return random.Random(" ".join(map(str, (seed, *place))))


# ---------------------------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """One kind of evaluation. Subclasses are frozen dataclasses (kw_only=True) and are listed in registry.py.

    A subclass may declare a field again to give it another default or help, and checks its values in `check`.
    """

    name: ClassVar[str]  # as on the command line
    about: ClassVar[str]  # one line for --help
    notes: ClassVar[str] = ""  # more of --help, after that line
    # Whether every record that was not skipped has a score.
    SCORED: ClassVar[bool] = True
    # More prompts of these leave the others as they are, so a directory of results may grow by them.
    GROWS: ClassVar[tuple[str, ...]] = ("lengths", "samples")

    lengths: tuple[int, ...] = option(
        (4096, 16384), "prompt and answer together, in tokens", metavar="N,N", parse=parse_length, many="comma"
    )
    samples: int = option(5, "how often everything is asked, each time with another prompt", metavar="N", parse=int)
    seed: int = option(0, "same seed: same prompts", metavar="S", parse=int)

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise InputError for values that cannot be used. Extend it with super().check().

        Messages begin "NAME is VALUE, expected ...", with the field's name: the command line turns it into the flag.
        """
        require("lengths", self.lengths, bool(self.lengths) and min(self.lengths) >= 1, "lengths of at least 1 token")
        require("samples", self.samples, self.samples >= 1, "at least 1")

    def check_answers(self, each: int) -> None:
        """Raise InputError if `each` answers for every length and sample are more than a run can list."""
        answers = len(set(self.lengths)) * self.samples * each
        expected = f"at most {MOST_ANSWERS:,} answers in each mode: these are {answers:,}"
        require("samples", self.samples, answers <= MOST_ANSWERS, expected)

    @abstractmethod
    def cells(self, tokenizer: Tokenizer) -> Sequence[Cell]:
        """All the work, the same in every attention mode, in the order in which it is to be done: shortest first.

        Raises:
            InputError, MissingFileError: options that do not fit this tokenizer, or files that cannot be used.
        """

    def summarize(self, records: Sequence[Record]) -> list[Record]:
        """Rows for summary.json: the mean score of every attention mode, kind and length.

        Here, in `table` and in `plot` options must not be read: results are also summarized without them.
        `records` holds one record for each place and mode, skipped ones (with "skipped": reason) included.
        """
        groups: dict[tuple[Any, ...], list[Record]] = {}
        for record in records:
            groups.setdefault(tuple(record.get(name) for name in _GROUPED_BY), []).append(record)
        rows = []
        for group, members in groups.items():
            scores = [r["score"] for r in members if "skipped" not in r and r["score"] is not None]
            rows.append(
                {name: value for name, value in zip(_GROUPED_BY, group, strict=True) if value is not None}
                | {"score": sum(scores) / len(scores) if scores else None, "answers": len(scores)}
                | {"skipped": sum("skipped" in r for r in members)}
            )
        return rows

    def check_record(self, record: Record) -> None:
        """Raise an exception, of whatever type, for a record of another form than `summarize` and `table` need."""
        if self.SCORED and record["score"] is None and "skipped" not in record:
            raise ValueError("score is null, expected a number, or `skipped` with the reason")
        self.table(self.summarize([record]))

    def table(self, rows: Sequence[Record]) -> list[list[str]]:
        """The summary for the terminal: cells of text, the heading first. By default scores in percent by length."""
        lengths = sorted({row["length"] for row in rows if "length" in row})
        heads = [name for name in _GROUPED_BY[:2] if any(name in row for row in rows)]
        lines: dict[tuple[str, ...], dict[int | None, str]] = {}
        for row in rows:
            shown = "skipped" if row["score"] is None else f"{100 * row['score']:.1f}"
            lines.setdefault(tuple(row.get(name, "") for name in heads), {})[row.get("length")] = shown
        columns: list[int | None] = [*lengths] if lengths else [None]
        titles = [short_length(length) for length in lengths] if lengths else ["score"]
        return [[*heads, *titles], *([*head, *(of.get(c, "-") for c in columns)] for head, of in lines.items())]

    def plot(self, records: Sequence[Record], folder: Path, about: Mapping[str, Any]) -> list[Path]:
        """Draw pictures into `folder` and return their paths. By default score, speed and memory against length.

        Args:
            about: settings of the evaluation; pictures name its model_name and mark its trained_context.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        return plots.against_length(records, folder, self.name, about)

    def identity(self) -> Record:
        """What a directory of results belongs to: every option but those it may grow by; files by their content."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.GROWS}
        return {"task": self.name} | {name: _identified(value) for name, value in values.items()}


MOST_ANSWERS: Final = 200_000
_GROUPED_BY: Final = ("attention", "kind", "length")


def require(name: str, value: object, valid: bool, expected: str) -> None:
    """Raise InputError "NAME is VALUE, expected ..." unless `valid`."""
    if not valid:
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        raise InputError(f"{name} is {shown!r}, expected {expected}")


def make_task(cls: type[Task], options: Mapping[str, Any]) -> Task:
    """A task from options as they come from Python or, as str, from the command line.

    Raises:
        InputError: an unknown option, or a value that cannot be used; names it.
    """
    known = {f.name: f.metadata["option"] for f in dataclasses.fields(cls)}
    known_options(options, known, f" of {cls.name}")
    return cls(**{name: parsed(name, value, known[name]) for name, value in options.items() if value is not None})


def parse_path(text: str) -> Path:
    if not text:
        raise ValueError("the name of a file or directory")
    return Path(text)


def parse_switch(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError("True or False")
    return text == "True"


def parsed(name: str, value: Any, how: Option) -> Any:
    """The value of an option. Raises InputError "NAME is VALUE, expected ..."."""
    given = [value]
    if how.many == "comma" and isinstance(value, str):
        given = value.split(",")
    elif how.many and isinstance(value, Iterable) and not isinstance(value, str):
        given = list(value)
    try:
        values = [how.parse(os.fspath(v) if isinstance(v, os.PathLike) else str(v)) for v in given]
    except ValueError as error:
        found = ",".join(map(str, given)) if how.many else value
        expected = "an integer" if how.parse is int else "a number" if how.parse is float else str(error)
        raise InputError(f"{name} is {shown(found)}, expected {expected}") from None
    for one in values:
        require(name, one, not how.choices or one in how.choices, f"one of {', '.join(map(str, how.choices))}")
    return tuple(values) if how.many else values[0]


def _identified(value: Any) -> Any:
    """JSON that says what a value is; a file is what it holds, wherever it lies."""
    if isinstance(value, tuple):
        return [_identified(v) for v in value]
    if isinstance(value, Path) and value.is_dir():
        return {p.name: _identified(p) for p in sorted(value.iterdir()) if p.is_file()}
    if isinstance(value, Path):
        return hashlib.sha256(value.read_bytes()).hexdigest()[:16] if value.is_file() else str(value)
    return json.loads(json.dumps(value))
