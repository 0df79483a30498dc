"""The command line. stdout carries the generated text (or one JSON object) only; all else goes to stderr."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Final

from minirea.cli.commands import run_chat, run_eval, run_generate, run_read
from minirea.cli.flags import EXIT_ERROR
from minirea.cli.inputs import decode_texts
from minirea.cli.messages import as_flags, explained, warnings_as_lines
from minirea.cli.parser import check_usage, make_parser
from minirea.errors import InputError
from minirea.terminal import EXIT_INTERRUPTED, Interrupts, discard_output, open_streams, say
from minirea.threads import limited_to, wait_asleep

_COMMANDS: Final = {
    "generate": run_generate,
    "explain": run_generate,
    "read": run_read,
    "chat": run_chat,
    "eval": run_eval,
}


def run_process() -> int:
    """The `minirea` command, in a process of its own where torch is yet to start; returns the exit status."""
    interrupts = Interrupts()
    interrupts.take_over()
    open_streams()
    wait_asleep(os.environ)
    try:
        status = main(sys.argv[1:], interrupts)
    except SystemExit as stop:  # --help and usage
        status = stop.code if isinstance(stop.code, int) else 0
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # what could not be written has been reported, or was help
        discard_output()
        return status or EXIT_ERROR
    return status


def main(argv: list[str] | None = None, interrupts: Interrupts | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 (bad input), 2 (usage) or 130 (Ctrl-C).

    Args:
        argv: what follows the program's name; None: sys.argv has it.
        interrupts: what Ctrl-C does; without, it is a KeyboardInterrupt.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser(with_tasks=argv[:1] == ["eval"])
    arguments = parser.parse_args(argv)
    if arguments.command in ("generate", "explain"):
        check_usage(arguments)
    run, names = _COMMANDS[arguments.command], set(vars(arguments))
    try:
        _check_directory()
        _follow_if_launched(arguments)
        with limited_to(getattr(arguments, "threads", None)), warnings_as_lines(names):
            decode_texts(arguments)
            return run(arguments, interrupts or Interrupts())
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        discard_output()
        return EXIT_ERROR
    except KeyboardInterrupt:
        if arguments.debug:
            raise
        return EXIT_INTERRUPTED
    except Exception as error:
        if arguments.debug:
            raise
        return _fail(as_flags(explained(error), names))


def _check_directory() -> None:
    """Raises InputError where torch would abort the process that imports it."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise InputError("the current directory has been deleted, expected one that is there: cd to another") from None


def _follow_if_launched(arguments: argparse.Namespace) -> None:
    """Of torchrun's processes the first runs the command; this does not return in the others."""
    if getattr(arguments, "gpus", 1) > 1:
        from minirea.ranks import follows

        if follows(arguments.gpus):
            from minirea.follower import launched

            launched()


def _fail(message: str) -> int:
    say(f"minirea: error: {message}")
    return EXIT_ERROR
