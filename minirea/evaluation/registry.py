"""Every task of `minirea eval`, by name. A new task is one module and one line here."""

from __future__ import annotations

from importlib import import_module
from typing import Final

from minirea.errors import InputError
from minirea.evaluation.frame.tasks import Task

# Task name -> module of this package and its Task subclass. In the order in which --help lists them.
_TASKS: Final[dict[str, tuple[str, str]]] = {
    "needle": ("tasks.needle", "Needle"),
    "passkey": ("tasks.needle", "Passkey"),
    "ruler": ("tasks.ruler", "Ruler"),
    "kv": ("tasks.synthetic", "KeyValue"),
    "number-string": ("tasks.synthetic", "NumberString"),
    "code-run": ("tasks.synthetic", "CodeRun"),
    "perplexity": ("tasks.perplexity", "Perplexity"),
    "mechanism": ("tasks.mechanism", "Mechanism"),
    "longbench": ("benchmarks.longbench", "LongBench"),
    "leval": ("benchmarks.leval", "LEval"),
    "infinitebench": ("benchmarks.infinitebench", "InfiniteBench"),
}


def names() -> list[str]:
    """Names of all tasks."""
    return list(_TASKS)


def task_class(name: str) -> type[Task]:
    """The task of that name. Raises InputError that lists what there is."""
    if not isinstance(name, str) or name not in _TASKS:
        raise InputError(f"task is {name!r}, expected one of {', '.join(_TASKS)}")
    module, attribute = _TASKS[name]
    found: type[Task] = getattr(import_module(f"minirea.evaluation.{module}"), attribute)
    return found
