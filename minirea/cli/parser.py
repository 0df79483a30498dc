"""The command line's parser: the commands, and the flags of each."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from typing import TYPE_CHECKING, Any

from minirea import __version__
from minirea.cli.flags import (
    HelpFormatter,
    Parser,
    add_attention,
    add_execution,
    add_input,
    add_model,
    add_prompt,
    add_sampling,
    add_scope,
    path,
)
from minirea.config import MODES
from minirea.errors import InputError

if TYPE_CHECKING:
    from minirea.evaluation.frame.tasks import Option, Task


def make_parser(with_tasks: bool = True) -> argparse.ArgumentParser:
    """The whole command line; without the tasks of `eval` where they would only cost time."""
    parser = Parser(
        prog="minirea", description="Run a LLaMA, Mistral or Qwen2 model on prompts of any length, with ReAttention."
    )
    parser.add_argument("--version", action="version", version=f"minirea {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    _add_generate(commands)
    _add_explain(commands)
    _add_read(commands)
    _add_chat(commands)
    _add_eval(commands, with_tasks)
    return parser


def _add_command(commands: Any, name: str, about: str, description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=description, formatter_class=HelpFormatter
    )
    return parser


def _add_generation(parser: argparse.ArgumentParser) -> None:
    """Flags of the commands that answer."""
    add_sampling(parser)
    add_attention(parser)
    add_execution(parser)


def _add_generate(commands: Any) -> None:
    description = "Continue a prompt. The text goes to standard output, statistics to standard error."
    generate = _add_command(commands, "generate", "continue a prompt", description)
    add_input(generate, several=True)
    _add_generation(generate)
    generate.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    generate.add_argument("--dry-run", action="store_true", help="print what it would need of the memory, and stop")
    sources = "say which N passages of the prompt the answer used most"
    generate.add_argument("--sources", type=int, default=0, metavar="N", help=sources)
    generate.set_defaults(parser=generate, out=None)


def _add_explain(commands: Any) -> None:
    description = (
        "Continue a prompt as `generate` does, and write what the answer used of it to --out: sources.json, "
        "attention.png (by layer, and by the answer's tokens) and page.html, which shades the prompt."
    )
    explain = _add_command(commands, "explain", "continue a prompt, and show where the answer came from", description)
    add_input(explain)
    explain.add_argument(
        "--out", type=path, required=True, metavar="DIR", help="where to; it is made if it is not there"
    )
    explain.add_argument("--sources", type=int, default=10, metavar="N", help="so many passages")
    _add_generation(explain)
    explain.set_defaults(parser=explain, json=False, dry_run=False)


def _add_read(commands: Any) -> None:
    description = (
        "Read a prompt and keep the context in a file, from which `generate --context` and `chat --context` go on, "
        "with the same model and settings, as if it had just been read."
    )
    read = _add_command(commands, "read", "read a prompt once and keep the context in a file", description)
    add_model(read)
    add_prompt(read)
    read.add_argument("--save", type=path, required=True, metavar="FILE", help="where the context is kept")
    read.add_argument("--context", type=path, metavar="FILE", help="a kept context that the prompt goes on from")
    add_attention(read)
    add_execution(read)


def _add_chat(commands: Any) -> None:
    description = (
        "Talk with a model: a line is a message, /help lists the commands. Answers go to standard output, everything "
        "else to standard error; lines may come from a pipe."
    )
    chat = _add_command(commands, "chat", "talk with a model", description)
    add_model(chat)
    chat.add_argument(
        "--context", type=path, metavar="FILE", help="what `minirea read --save`, or /save, has kept, to go on from"
    )
    chat.add_argument("--system", metavar="STR", help="system message")
    special = "special tokens spelled in a message act as such, instead of being text"
    chat.add_argument("--allow-special-tokens", action="store_true", help=special)
    _add_generation(chat)
    chat.set_defaults(chat=True)


def _add_eval(commands: Any, with_tasks: bool) -> None:
    parser = commands.add_parser(
        "eval",
        help="measure what a model finds in long contexts",
        description="Put a task to a model in several attention modes. The summary goes to standard output; every "
        "answer, the summary and pictures go to --out. Run the same command again to go on after an interruption.",
    )
    if not with_tasks:
        return
    from minirea.evaluation import registry

    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK", parser_class=Parser)
    for name in registry.names():
        task = registry.task_class(name)
        about = f"{task.about}. {task.notes}" if task.notes else task.about
        command = _add_command(tasks, name, task.about, about)
        add_model(command)
        command.add_argument("--out", type=path, required=True, metavar="DIR", help="where results are kept")
        _add_task_options(command, task)
        add = add_scope(command)
        add("--attention", default="reattention", metavar="MODE,MODE", help=f"modes to compare: {', '.join(MODES)}")
        at_most = "longest length of a mode (repeatable): longer ones are recorded as skipped"
        add("--at-most", action=_Limit, default={}, metavar="MODE=N", help=at_most)
        add_execution(command)
    about = "summarize and draw again, several directories as one (modes or lengths that ran apart)"
    command = _add_command(tasks, "report", about, about)
    command.add_argument(
        "results", type=path, nargs="+", metavar="DIR", help="an --out of earlier evaluations, all of one task"
    )
    command.add_argument("--out", type=path, required=True, metavar="DIR", help="where to; may be one of them")
    differing = "a setting in which the directories may differ (repeatable), such as share or seed"
    command.add_argument("--differing", action="append", default=[], metavar="NAME", help=differing)
    command.add_argument("--debug", action="store_true", help="show tracebacks")


def _add_task_options(parser: argparse.ArgumentParser, task: type[Task]) -> None:
    """A flag for every field of the task; one that is not given is left to the task's default."""
    group = parser.add_argument_group("task")
    fields = dataclasses.fields(task)
    parser.set_defaults(task_options=[field.name for field in fields])
    for field in fields:
        how: Option = field.metadata["option"]
        flag, shown = "--" + field.name.replace("_", "-"), _default_of(field.default, how)
        if field.default is False:
            group.add_argument(flag, action="store_true", default=None, help=how.help)
        else:
            metavar = how.metavar or (",".join(map(str, how.choices)) and "{" + ",".join(map(str, how.choices)) + "}")
            parse, nargs = functools.partial(_task_option, field.name, how), "+" if how.many == "list" else None
            about = how.help + ("" if how.required else shown)
            group.add_argument(flag, type=parse, nargs=nargs, metavar=metavar, required=how.required, help=about)


def _default_of(default: Any, how: Option) -> str:
    """What --help says about a default, as it is typed: nothing where it says nothing or is said already."""
    if default in (None, "", ()) or "(default" in how.help:
        return ""
    values = list(map(str, default)) if isinstance(default, tuple) else [str(default)]
    shown = [json.dumps(value) if " " in value else value for value in values]
    return f" (default: {(' ' if how.many == 'list' else ',').join(shown)})".replace("%", "%%")


def _task_option(name: str, how: Option, text: str) -> Any:
    from minirea.evaluation.frame.tasks import parsed

    try:
        value = parsed(name, text, how)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error).split(" is ", 1)[1]) from None
    return value[0] if how.many == "list" else value


class _Limit(argparse.Action):
    """--at-most MODE=N into a dictionary."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:  # noqa: ARG002
        mode, equals, length = values.partition("=")
        if not equals:
            raise argparse.ArgumentError(self, f"{values!r}, expected MODE=LENGTH such as full=64k")
        setattr(namespace, self.dest, getattr(namespace, self.dest) | {mode: length})


def check_usage(arguments: argparse.Namespace) -> None:
    """Flags of `generate` that mean nothing without others are wrong usage."""
    series = len(arguments.prompts) > 1 or arguments.questions is not None
    for flag, given, allowed, needed in (
        ("--system", arguments.system is not None, arguments.chat, "--chat"),
        ("--allow-special-tokens", arguments.allow_special_tokens, arguments.chat, "--chat"),
        ("--out", arguments.answers is not None, series, "--questions, or --prompt several times"),
    ):
        if given and not allowed:
            arguments.parser.error(f"{flag} needs {needed}")
