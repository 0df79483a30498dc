"""Evaluation: does a model keep its ability far beyond its trained length? `minirea eval`, and `evaluate` in Python.

A task (registry.py lists them) makes prompts from texts (text/), its own (tasks/) or published ones (benchmarks/). The
frame (frame/) says what a task is, puts its prompts to a model in every attention mode, keeps each answer as one line
of JSON, and draws the pictures.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minirea.checks import items, path_like, shown
from minirea.config import MODES, SCOPE_FIELDS, ReAttentionConfig
from minirea.errors import InputError
from minirea.evaluation.frame.cells import Cell
from minirea.evaluation.frame.records import Record
from minirea.evaluation.frame.tasks import Task, make_task
from minirea.evaluation.lengths import parse_length
from minirea.evaluation.registry import task_class

if TYPE_CHECKING:
    from minirea.api import LLM, ModelFiles

__all__ = ["Evaluation", "evaluate", "report"]


@dataclass(frozen=True)
class Evaluation:
    """What came out: every record, the rows of the summary, and the settings that all records have in common."""

    task: Task
    records: list[Record]
    rows: list[Record]
    settings: Record

    @property
    def table(self) -> str:
        """The summary for the terminal."""
        from minirea.evaluation.frame.runner import render

        return render(self.task.table(self.rows))

    def plot(self, folder: str | Path) -> list[Path]:
        """Draw the pictures as PNG files into an existing folder. Raises MissingExtraError without matplotlib."""
        from minirea.evaluation.frame.plots import own_style

        with own_style():
            return self.task.plot(self.records, Path(folder), self.settings)


def evaluate(
    task: str,
    model: str | Path | LLM,
    *,
    attention: str | Sequence[str] = ("reattention",),
    out: str | Path | None = None,
    at_most: Mapping[str, int | str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    impl: str = "auto",
    allow_out_of_distribution: bool = False,
    gpus: int = 1,
    quantize: str | None = None,
    sketch: str = "auto",
    cache: str = "auto",
    progress: bool = False,
    **options: Any,
) -> Evaluation:
    """Put a task to a model, as `minirea eval` does, and return the same records: all that `out` holds.

    Args:
        task: "needle", "ruler", ...: one of minirea.evaluation.registry.names().
        model: a directory, or a model that is loaded already. Then device, dtype, impl, gpus, quantize, sketch and
            cache are its own, whatever is given here, and fields that are not given are as it has them.
        attention: modes to compare: "reattention", "streaming", "full".
        out: directory for settings.json, records.jsonl and summary.json. Answers that it holds are not asked for again.
            None keeps everything in memory.
        at_most: the longest length by attention mode; longer ones are recorded as skipped.
        device, dtype, impl, allow_out_of_distribution, gpus, quantize, sketch, cache: as for minirea.load.
        progress: show a bar on stderr.
        options: fields of the task (lengths, samples, seed, ...) and of ReAttentionConfig.

    Raises:
        MissingFileError, InputError, MemoryLimitError: with one line that says what to fix. A length that does not fit
            into memory raises nothing: its records say `skipped`.
    """
    expected = f"{', '.join(MODES)} or several with commas"
    given = attention.split(",") if isinstance(attention, str) else attention
    modes = tuple(map(str, items("attention", given, expected)))
    if not set(modes) <= set(MODES):
        raise InputError(f"attention is {','.join(modes)!r}, expected {expected}")
    if not modes or len(set(modes)) < len(modes):
        raise InputError(f"attention is {','.join(modes)!r}, expected different modes")
    fields = {name: options.pop(name) for name in SCOPE_FIELDS if name in options}
    chosen = make_task(task_class(task), options)
    limits = _limits({} if at_most is None else at_most)
    folder = None if out is None else Path(path_like("out", out, "the name of a directory"))

    import minirea.api as api  # imports torch, which a bad option need not wait for
    from minirea.evaluation.frame.records import Results, check_settings
    from minirea.evaluation.frame.runner import Runner, known_settings

    fields["allow_out_of_distribution"] = allow_out_of_distribution
    if isinstance(model, api.LLM):
        llm, attention_of_model = model, model.model.attention
        scope = _chosen_fields(attention_of_model.config, llm.config.trained_context)
        if attention_of_model.mode == "streaming":
            scope.pop("span_top_k", None)  # 0 there, whatever was given
        fields = scope | {name: value for name, value in fields.items() if value is not None}
        cells = _cells_for(chosen, llm)
    else:
        lies: dict[str, Any] = {"gpus": gpus, "quantize": quantize, "sketch": sketch, "cache": cache}
        files = api.read_model(model, device, dtype, modes[0], impl, **lies, **fields)
        cells = _cells_for(chosen, files)
        if folder is not None:
            check_settings(folder, known_settings(chosen, files), some=True)
        llm = files.load(progress)
    runner = Runner(chosen, cells, llm, modes, limits, fields)
    settings = runner.settings
    with Results(folder, settings, chosen.check_record) as results:
        records = runner.run(results, progress)
        environment = results.environment(runner.environment)
        evaluation = Evaluation(chosen, records, chosen.summarize(records), settings)
        results.summarize({"settings": settings, "environment": environment, "rows": evaluation.rows})
    return evaluation


def _chosen_fields(config: ReAttentionConfig, trained_context: int) -> dict[str, Any]:
    """Those that are not the default which follows from the others: what is overridden besides may change it."""
    fields = dataclasses.asdict(config)
    for name in reversed(SCOPE_FIELDS):
        others = {other: value for other, value in fields.items() if other != name}
        with contextlib.suppress(InputError):
            if ReAttentionConfig.for_context(trained_context, **others) == config:
                fields = others
    return fields


def _cells_for(task: Task, model: LLM | ModelFiles) -> Sequence[Cell]:
    """The task's cells. Raises InputError where this model cannot run one of them."""
    cells = task.cells(model.tokenizer)
    for what in filter(None, (cell.looks_inside for cell in cells)):
        model.check_one_device(what)
    return cells


def report(
    folders: str | Path | Sequence[str | Path], out: str | Path, differing: str | Sequence[str] = ()
) -> Evaluation:
    """Put the results of directories together and summarize them anew, without a model.

    For modes, lengths or seeds that ran apart, and to draw pictures where matplotlib is.

    Args:
        folders: directories that `evaluate` wrote, with the same settings; or one.
        out: where the whole goes; may be one of them.
        differing: names of settings in which they may differ, or one; the whole's settings list the different values.
            With "seed" each record's id names its own, so that the answers of all seeds count.

    Raises:
        MissingFileError, InputError: not results, or those of different evaluations.
    """
    from minirea.evaluation.frame.records import Results, read_results

    def task_of(settings: Record) -> Task:
        """Only what comes from the records is used: its options may name files that are elsewhere."""
        return object.__new__(task_class(str(settings.get("task"))))

    expected = "directories of results"
    given = [folders] if isinstance(folders, (str, Path)) else items("folders", folders, expected)
    paths = [Path(path_like("folders", folder, expected)) for folder in given]
    if not paths:
        raise InputError(f"folders is empty, expected {expected}")
    names = [differing] if isinstance(differing, str) else [*map(str, items("differing", differing, "settings"))]
    settings, records, environment = read_results(paths, names, lambda found: task_of(found).check_record)
    task = task_of(settings)
    evaluation = Evaluation(task, records, task.summarize(records), settings)
    with Results(Path(path_like("out", out, "the name of a directory")), settings) as results:
        for record in records:
            if not results.finished(record["id"]):
                results.add(record)
        results.summarize({"settings": settings, "environment": environment, "rows": evaluation.rows})
    return evaluation


def _limits(at_most: Mapping[str, int | str]) -> dict[str, int]:
    if not isinstance(at_most, Mapping):
        raise InputError(f"at_most is {shown(at_most)}, expected a length for each of some modes")
    limits = {}
    for mode, length in at_most.items():
        if mode not in MODES:
            raise InputError(f"at_most is {mode!r}, expected one of {', '.join(MODES)}")
        try:
            limits[mode] = parse_length(str(length))
        except ValueError as error:
            raise InputError(f"at_most is '{mode}={length}', expected {error}") from None
    return limits
