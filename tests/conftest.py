"""Every run has the same random numbers, and Triton's interpreter a pytest of its own: `python -m pytest -m interpret`.

Triton decides when a kernel is defined whether it is compiled or interpreted, so one process can do only one of them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# The same examples in every run, however long one takes: a change is not refused by another one's chance.
hypothesis.settings.register_profile("minirea", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("minirea")

NAMES = "test_interpreted_*.py"


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background jobs have it
        signal.signal(signal.SIGINT, signal.default_int_handler)  # tests interrupt their children
    if config.option.markexpr == "interpret":  # before a kernel is imported
        os.environ["TRITON_INTERPRET"] = "1"
        if importlib.util.find_spec("triton"):
            _quicken_interpreter()


def _quicken_interpreter() -> None:
    """Leave out of Triton's interpreter what changes no result, and takes most of its time.

    Every function that a kernel calls replaces the operations of the language by those that interpret, as the kernel
    has done already. And integers are added and multiplied a second time in 64 bits, to assert that nothing overflows,
    where assertions are off.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, languages = interpreter._patch_lang, functools.cache(_modules_in)
    patched: set[str] = set()  # the language's modules, while a kernel runs

    def patch_once(fn: Any) -> Any:
        wanted = languages(fn.__module__, tl, tl.core)
        if wanted <= patched:
            return None
        scope, outermost = patch(fn), not patched
        if hasattr(scope, "restore"):  # else there is no telling how long it holds
            patched.update(wanted)
            restore = scope.restore
            if outermost:
                scope.restore = lambda: (patched.clear(), restore())
        return scope

    interpreter._patch_lang = patch_once
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _modules_in(module: str, *wanted: Any) -> frozenset[str]:
    """Names of those of the modules `wanted` that a module has under whatever names."""
    return frozenset(
        value.__name__ for value in vars(sys.modules[module]).values() if any(value is one for one in wanted)
    )


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """What a test draws without a generator of its own does not depend on the tests before it."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """The interpreter's process imports nothing but its own tests."""
    other = collection_path.suffix == ".py" and not collection_path.match(NAMES)
    return True if interpreted() and other else None


@functools.cache
def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.path.match(NAMES):
            item.add_marker(pytest.mark.interpret)
            if not interpreted():
                item.add_marker(pytest.mark.skip(reason="needs a process of its own: python -m pytest -m interpret"))
