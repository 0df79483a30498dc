"""Runs a task's cells on a model, one attention mode after another, and keeps every record the moment it comes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from minirea.api import LLM, ModelFiles
from minirea.errors import MemoryLimitError
from minirea.evaluation.frame.cells import Cell
from minirea.evaluation.frame.records import Place, Record, Results
from minirea.evaluation.frame.tasks import Task
from minirea.evaluation.lengths import short_length
from minirea.files import model_name
from minirea.isolation import isolated
from minirea.progress import bar


class Runner:
    """One evaluation: a task, a model, and where the results go.

    Args:
        cells: the task's, for this model's tokenizer.
        llm: any attention mode; its weights serve all of them.
        attention: the modes to run, each on every cell.
        at_most: longest length by mode; what is longer is recorded as skipped.
        fields: ReAttentionConfig fields as the user gave them, and allow_out_of_distribution.
    """

    def __init__(
        self,
        task: Task,
        cells: Sequence[Cell],
        llm: LLM,
        attention: Sequence[str],
        at_most: Mapping[str, int],
        fields: Mapping[str, Any],
    ) -> None:
        self.task = task
        self.llm = llm
        self.at_most = at_most
        self.fields = fields
        # Every mode reads a cell before the next, longer one: what is there after an interruption can be compared.
        self.work = [(cell, mode) for cell in cells for mode in attention if cell.modes is None or mode in cell.modes]
        self._models: dict[str, LLM] = {}

    @cached_property
    def settings(self) -> Record:
        """What every record of a directory has in common."""
        return {
            **known_settings(self.task, self.llm),
            "model": fingerprint(self.llm),
            **dataclasses.asdict(self._model("full", {}).model.attention.config),  # full attention refuses no scope
        }

    @cached_property
    def environment(self) -> dict[str, str]:
        """Where and with what records are made."""
        device = self.llm.model.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
        return {"machine": name, "torch": torch.__version__, "python": platform.python_version()}

    @isolated()
    def run(self, results: Results, progress: bool) -> list[Record]:
        """All records, in the order of the work; those that `results` has already are not made again."""
        ids = [record_id(mode, place) for cell, mode in self.work for place in cell.places]
        done = sum(map(results.finished, ids))
        with bar(len(ids), progress, initial=done, unit="answer", dynamic_ncols=True, leave=True) as answers:
            for cell, mode in self.work:
                wanted = [i for i, p in enumerate(cell.places) if not results.finished(record_id(mode, p))]
                if not wanted:
                    continue
                answers.set_description(f"{mode} {short_length(cell.tokens)}")
                for index, record in zip(wanted, self._records(cell, mode, wanted, progress), strict=True):
                    results.add(self._complete(record, cell, mode, cell.places[index]))
                    answers.update()
        return results.records(ids)

    def _records(self, cell: Cell, mode: str, wanted: Sequence[int], progress: bool) -> Iterator[Record]:
        """A record for each index in `wanted`. Once memory runs out the rest say so."""
        longest = self.at_most.get(mode)
        if longest is not None and cell.tokens > longest:
            yield from [_skipped(f"longer than {short_length(longest)} tokens (at_most)")] * len(wanted)
            return
        done = 0
        try:
            llm = self._model(mode, cell.fields)
            _forget_peak(llm)
            for record in cell.run(llm, wanted, progress):
                yield record
                done += 1
        except MemoryLimitError as error:
            reason = str(error)
        except torch.OutOfMemoryError as error:
            reason = f"not enough memory: {str(error).splitlines()[0]}"
        else:
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # in blocks of the failed length, of no use to what follows
        yield from [_skipped(reason)] * (len(wanted) - done)

    def _model(self, mode: str, fields: Mapping[str, Any]) -> LLM:
        """The model in that mode; one is kept for each mode and scope, on the same weights."""
        options = {**self.fields, **fields}
        key = f"{mode} {sorted(options.items())}"
        if key not in self._models:
            self._models[key] = self.llm.with_attention(mode, **options)
        return self._models[key]

    def _complete(self, record: Record, cell: Cell, mode: str, place: Place) -> Record:
        """The record with the frame's own fields."""
        head = {"id": record_id(mode, place), "task": self.task.name, "attention": mode, **place}
        return head | record | {"settings": self._settings_of(mode, cell), "machine": self.environment["machine"]}

    def _settings_of(self, mode: str, cell: Cell) -> Record:
        config = dataclasses.asdict(self._model(mode, cell.fields).model.attention.config)
        if mode == "full":
            config = {"chunk_size": config["chunk_size"]}
        common = {
            name: value
            for name, value in self.settings.items()
            if name in ("dtype", "quantize", "device", "impl", "seed")
        }
        return config | common


def record_id(mode: str, place: Place) -> str:
    """Names a record within its evaluation: "full length=4096 depth=0.5 sample=0"."""
    return " ".join([mode, *(f"{name}={value}" for name, value in place.items())])


def known_settings(task: Task, model: LLM | ModelFiles) -> Record:
    """What is known of a run's settings before the weights are read."""
    if isinstance(model, ModelFiles):
        attention, dtype, quantize = model.attention, model.dtype, model.quantize
    else:
        attention, dtype, quantize = model.model.attention, model.model.dtype, model.model.quantize
    return {
        **task.identity(),
        "model_name": "" if model.path is None else model_name(model.path),
        "model_config": _digest_of_config(model).hexdigest()[:16],
        "trained_context": model.config.trained_context,
        "dtype": str(dtype).removeprefix("torch."),
        "device": attention.device.type,
        "impl": attention.impl,
        **({"quantize": quantize} if quantize else {}),
    }


def _digest_of_config(model: LLM | ModelFiles) -> hashlib._Hash:
    """Of a model's shape and its tokenizer."""
    config = dataclasses.asdict(model.config) | {"eos_token_ids": sorted(model.config.eos_token_ids)}
    digest = hashlib.sha256(repr(sorted(config.items())).encode())
    digest.update(repr(model.tokenizer.encode("The quick brown fox jumps over 1234567890 lazy dogs.\n")).encode())
    return digest


def fingerprint(llm: LLM) -> str:
    """Tells models apart by their shape, their norms, rows of their embedding and their tokenizer, wherever they lie.

    Not by their other matrices, which a device may keep in a layout of its own.
    """
    model, digest = llm.model, _digest_of_config(llm)
    norms = [norm for layer in model.layers for norm in (layer.attn_norm, layer.mlp_norm)]
    for tensor in (*model.embed[:8], model.norm, *norms):
        digest.update(tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _cpu_name() -> str:
    """Its model, where the system says it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def render(table: Sequence[Sequence[str]]) -> str:
    """Lines of columns, the first ones flush left and numbers flush right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    numeric = [all(c[:1].isdigit() or c in ("-", "skipped") for c in column[1:]) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _skipped(reason: str) -> Record:
    return {"score": None, "skipped": reason}


def _forget_peak(llm: LLM) -> None:
    """Let the peak of memory count from here; a CPU's process cannot forget it."""
    if llm.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(llm.model.device)
