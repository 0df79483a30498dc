"""Errors and warnings as the command line says them: one line each, in its own words."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

from minirea.errors import MinireaError, MinireaWarning, memory_limit_of, printable
from minirea.terminal import say


def as_flags(message: str, names: set[str]) -> str:
    """A message that names Python's fields, as the command line spells them.

    `max_tokens` is --max-tokens wherever it stands, dtype="float32" is --dtype float32, carry_votes=False is
    --no-carry-votes; a list of these loses its commas, so that it can be pasted. A name of one word, which might be a
    word, counts at the beginning of a message that says what it is, and in backquotes anywhere.
    """

    def flag(match: re.Match[str]) -> str:
        name, value = match[1], match[2] if match.re.groups > 1 else "True"
        flag = ("--no-" if value == "False" else "--") + name.replace("_", "-")
        return flag + ("" if value in ("True", "False") else " " + value.strip("\"'"))

    known, several_words = ("|".join(group) or "(?!)" for group in (names, {name for name in names if "_" in name}))
    before = r"(?<![\w./-])"  # neither in a path nor in another name
    assigned = rf"{before}({known})=([\w.]+|\"[^\"]*\"|'[^']*')"
    message = re.sub(rf"({assigned}),(?= ({known})=)", r"\1", message)
    for pattern in (
        rf"`({known})`",
        assigned,
        rf"{before}({several_words})(?![\w/-])",
        rf"^({known})(?= is )",
    ):
        message = re.sub(pattern, flag, message)
    return message


def explained(error: Exception) -> str:
    """The line for an error: its own message, or what a library's means."""
    text = printable(" ".join(str(error).split()), 400)
    if isinstance(error, MinireaError):
        return str(error)
    if (limit := memory_limit_of(error)) is not None:
        return str(limit)
    if "C compiler" in text or (isinstance(error, subprocess.CalledProcessError) and "-shared" in text):
        return f'Triton cannot compile: {text}; install a C compiler such as gcc, or use impl="torch"'
    text = f"{type(error).__name__}: {text}"
    imported, last = _packages(error)
    settings = ", ".join(name for name in sorted(os.environ) if name.startswith(f"{imported or last}_".upper()))
    if imported:
        return f"{imported} cannot be imported{f' with {settings} in the environment' * bool(settings)}: {text}"
    suspects = f"a fault of minirea{f', or of {settings} in the environment' * bool(settings)}"
    return f"{text} ({suspects}; --debug shows where)"


def _packages(error: Exception) -> tuple[str, str]:
    """Which package, none of ours, was being imported when an error was raised, or ""; and which raised it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame in frames]
    importing = [name for frame, name in zip(frames, packages, strict=True) if frame.f_code.co_name == "<module>"]
    if isinstance(error, ImportError):
        importing.append(str(error.name).partition(".")[0])
    imported = next((name for name in reversed(importing) if name not in ("minirea", "__main__", "None")), "")
    return imported, packages[-1] if packages else "minirea"


@contextlib.contextmanager
def warnings_as_lines(names: set[str]) -> Iterator[None]:
    """Within it minirea's own warnings are a line on standard error each, like its errors; `names` as for as_flags."""

    def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if issubclass(category, MinireaWarning):
            say(f"minirea: warning: {printable(as_flags(str(message), names))}")
        else:
            shown_by_python(message, category, *place)

    shown_by_python = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always", MinireaWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield
