"""The command line. stdout carries the generated text (or one JSON object) only; all else goes to stderr."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from minirea import __version__
from minirea.config import DEVICES, DTYPES, IMPLS, MODES, SCOPE_FIELDS, SPAN_SCOPES, TAIL_CHUNK_SIZE, TAIL_SIZE
from minirea.errors import InputError, MinireaError, MinireaWarning, MissingExtraError, MissingFileError
from minirea.threads import limited_to, wait_asleep

if TYPE_CHECKING:
    from minirea.api import ModelFiles
    from minirea.evaluation import Evaluation
    from minirea.evaluation.frame.tasks import Option, Task
    from minirea.generate import Stats

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

_LOAD_OPTIONS = ("device", "dtype", "attention", "impl", "allow_out_of_distribution")
_GENERATION_OPTIONS = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "ignore_eos",
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 (bad input), 2 (usage) or 130 (Ctrl-C).

    Without argv this is the `minirea` command, the process is its own, and torch is yet to start.
    """
    if argv is None:
        wait_asleep(os.environ)
        argv = sys.argv[1:]
    parser = _parser(with_tasks=argv[:1] == ["eval"])
    arguments = parser.parse_args(argv)
    if arguments.command == "generate" and arguments.system is not None and not arguments.chat:
        parser.error("--system needs --chat")
    try:
        with _warnings_as_lines(), limited_to(getattr(arguments, "threads", None)):
            return run_generate(arguments) if arguments.command == "generate" else run_eval(arguments)
    except MinireaError as error:
        if arguments.debug:
            raise
        return _fail(_as_flag(str(error), set(vars(arguments))))
    except KeyboardInterrupt:
        if arguments.debug:
            raise
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR


def run_generate(arguments: argparse.Namespace) -> int:
    """`minirea generate`: load, read the prompt, print the text as it comes."""
    prompt = read_prompt(arguments)
    # Imports torch, which --help and a bad prompt need not wait for.
    from minirea.api import generation_config, read_model

    options = vars(arguments)
    generation_options = {name: options[name] for name in _GENERATION_OPTIONS}
    generation_config(generation_options)  # a bad value should not wait for the weights to load
    progress = not arguments.quiet
    files = read_model(arguments.model, **{name: options[name] for name in _LOAD_OPTIONS + SCOPE_FIELDS})
    ids = _encode(files, prompt, arguments)
    llm = files.load(progress, len(ids) + arguments.max_tokens)
    pieces = llm.stream(ids, progress=progress, **generation_options)
    text, token_ids, stats, finish_reason = "", [], None, None
    try:
        for piece in pieces:
            stats, finish_reason = piece.stats, piece.finish_reason
            token_ids += piece.token_ids
            text += piece.text
            if not arguments.json:
                sys.stdout.write(piece.text)
                sys.stdout.flush()
    except KeyboardInterrupt:
        finish_reason = "interrupted"
        with contextlib.suppress(KeyboardInterrupt):
            pieces.throw(KeyboardInterrupt)  # wherever it struck, the stream completes its statistics
    if arguments.json:
        _print_json(text, token_ids, finish_reason, len(ids), stats)
    else:
        print(flush=True)
    if stats and not arguments.quiet:
        print(footer(stats, finish_reason), file=sys.stderr)
    return EXIT_INTERRUPTED if finish_reason == "interrupted" else 0


def run_eval(arguments: argparse.Namespace) -> int:
    """`minirea eval`: put a task to a model, print the summary, draw the pictures."""
    from minirea.evaluation import evaluate, report

    if arguments.task == "report":
        return _show(report(arguments.results, arguments.out, arguments.differing), arguments.out)
    options = vars(arguments)
    names = {*_LOAD_OPTIONS, *SCOPE_FIELDS, *arguments.task_options, "attention", "out", "at_most"} - {"task"}
    try:
        evaluation = evaluate(
            arguments.task, arguments.model, progress=not arguments.quiet, **{name: options[name] for name in names}
        )
    except KeyboardInterrupt:
        if Path(arguments.out).exists():
            print(f"minirea: interrupted; {arguments.out} keeps the answers, the same command goes on", file=sys.stderr)
        raise
    return _show(evaluation, arguments.out)


def _show(evaluation: Evaluation, folder: str) -> int:
    """The table to standard output and the pictures to the folder."""
    print(evaluation.table, flush=True)
    try:
        evaluation.plot(folder)
    except MissingExtraError as error:  # a server may well have no matplotlib, and the results are complete
        print(f"minirea: no pictures: {error}", file=sys.stderr)
    return 0


def read_prompt(arguments: argparse.Namespace) -> str:
    """The prompt's text from --text, a file or standard input.

    Raises:
        MissingFileError, InputError: no such file, a directory, not UTF-8, or empty.
    """
    if arguments.text is not None:
        source, text = "--text", arguments.text
    else:
        source = "standard input" if arguments.prompt == "-" else arguments.prompt
        try:
            raw = sys.stdin.buffer.read() if arguments.prompt == "-" else Path(arguments.prompt).read_bytes()
            text = raw.decode("utf-8")
        except FileNotFoundError:
            raise MissingFileError(f"--prompt {source}: no such file") from None
        except OSError as error:
            raise InputError(f"--prompt {source}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            found = f"byte 0x{raw[error.start]:02x} at offset {error.start}"
            raise InputError(f"--prompt {source}: not UTF-8 text: found {found}") from None
    if not text:
        raise InputError(f"{source}: the prompt is empty, expected some text")
    return text


def footer(stats: Stats, finish_reason: str | None) -> str:
    """The four lines of statistics after a generation."""
    from minirea.memory import human

    s, scope = stats, stats.scope
    parts = [f"{scope[name]:,} {name}" for name in ("global", "selected", "local") if scope[name]]
    seen = scope["global"] + scope["selected"] + scope["local"]
    return "\n".join(
        (
            f"prompt      {s.prompt_tokens:,} tokens, {s.prompt_tokens_per_second:,.1f} tokens/s, "
            f"first token after {s.time_to_first_token:.2f} s",
            f"generation  {s.generated_tokens:,} tokens, {s.tokens_per_second:,.1f} tokens/s, ended by {finish_reason}",
            f"scope       {' + '.join(parts)} = {seen:,} of {scope['seq_len']:,} tokens",
            f"memory      weights {human(s.weight_bytes)}, cache {human(s.cache_bytes)}, peak {human(s.peak_bytes)}",
        )
    )


def _encode(files: ModelFiles, prompt: str, arguments: argparse.Namespace) -> list[int]:
    if not arguments.chat:
        return files.encode(prompt)
    system = [{"role": "system", "content": arguments.system}] if arguments.system is not None else []
    return files.encode(files.tokenizer.encode_chat([*system, {"role": "user", "content": prompt}]))


def _print_json(
    text: str, token_ids: list[int], finish_reason: str | None, prompt_tokens: int, stats: Stats | None
) -> None:
    record: dict[str, Any] = {"text": text, "token_ids": token_ids, "finish_reason": finish_reason}
    record |= {"prompt_tokens": prompt_tokens} | (stats.as_dict() if stats else {})
    print(json.dumps(record), flush=True)


def _as_flag(message: str, names: set[str]) -> str:
    """Name a field at the beginning of a message the way it was typed: max_tokens is --max-tokens."""
    return re.sub(r"^(\w+)(?= is )", lambda m: "--" + m[1].replace("_", "-") if m[1] in names else m[1], message)


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """minirea's own warnings on standard error, one line each and none left out; those of libraries as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", MinireaWarning)
        show = warnings.showwarning

        def show_line(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
            if issubclass(category, MinireaWarning):
                print(f"minirea: warning: {message}", file=sys.stderr)
            else:
                show(message, category, *where, **options)

        warnings.showwarning = show_line
        yield


def _fail(message: str) -> int:
    print("minirea: error:", " ".join(message.split()), file=sys.stderr)
    return EXIT_ERROR


class _HelpFormatter(argparse.HelpFormatter):
    """Shows the defaults that say something: not those of switches and of options that are off."""

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.default not in (None, False, [], {}, argparse.SUPPRESS)
        return (action.help or "") + (" (default: %(default)s)" if shown else "")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"minirea: error: {message} (see `{self.prog} --help`)\n")


def _parser(with_tasks: bool = True) -> argparse.ArgumentParser:
    """The whole command line; without the tasks of `eval` where they would only cost time."""
    parser = _Parser(
        prog="minirea", description="Run a LLaMA, Mistral or Qwen2 model on prompts of any length, with ReAttention."
    )
    parser.add_argument("--version", action="version", version=f"minirea {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    generate = commands.add_parser(
        "generate",
        help="continue a prompt",
        description="Continue a prompt. The text goes to standard output, statistics to standard error.",
        formatter_class=_HelpFormatter,
    )
    _add_input(generate)
    _add_sampling(generate)
    add = _add_attention(generate)
    add("--attention", choices=MODES, default="reattention", help="what a token can see")
    _add_execution(generate)
    generate.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    _add_eval(commands, with_tasks)
    return parser


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

    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK", parser_class=_Parser)
    for name in registry.names():
        task = registry.task_class(name)
        about = f"{task.about}. {task.notes}" if task.notes else task.about
        command = tasks.add_parser(name, help=task.about, description=about, formatter_class=_HelpFormatter)
        command.add_argument("--model", required=True, metavar="DIR", help="Hugging Face or Mistral model directory")
        command.add_argument("--out", required=True, metavar="DIR", help="where results are kept")
        _add_task_options(command, task)
        add = _add_attention(command)
        add("--attention", default="reattention", metavar="MODE,MODE", help=f"modes to compare: {', '.join(MODES)}")
        at_most = "longest length of a mode (repeatable): longer ones are recorded as skipped"
        add("--at-most", action=_Limit, default={}, metavar="MODE=N", help=at_most)
        _add_execution(command)
    about = "summarize and draw again, several directories as one (modes or lengths that ran apart)"
    command = tasks.add_parser("report", help=about, description=about, formatter_class=_HelpFormatter)
    command.add_argument("results", nargs="+", metavar="DIR", help="an --out of earlier evaluations, all of one task")
    command.add_argument("--out", required=True, metavar="DIR", help="where to; may be one of them")
    differing = "a setting in which the directories may differ (repeatable), such as share"
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
            about = how.help + (" (required)" if how.required else shown)
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


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face or Mistral model directory")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="FILE", help="UTF-8 text file, or - for standard input")
    source.add_argument("--text", metavar="STRING", help="the prompt itself")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--system", metavar="STR", help="system message, with --chat")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what to generate").add_argument
    add("--max-tokens", type=int, default=256, metavar="N", help="at most so many tokens")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 always takes the best token")
    add("--top-k", type=int, default=0, metavar="K", help="keep the K best tokens; 0: all")
    add("--top-p", type=float, default=1.0, metavar="P", help="keep the best tokens that reach probability P")
    add("--min-p", type=float, default=0.0, metavar="P", help="keep tokens at least P times as probable as the best")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: avoid tokens already there")
    add("--seed", type=int, metavar="N", help="same seed, same device: same tokens")
    add("--stop", action="append", default=[], metavar="STR", help="end before this text (repeatable)")
    add("--ignore-eos", action="store_true", help="go on past the end-of-text token")


def _add_attention(parser: argparse.ArgumentParser) -> Callable[..., Any]:
    """The flags of a scope; returns what adds further flags to their group."""
    about = "Sizes in tokens. Where two defaults are given, the second is for trained contexts C below 32768."
    add = parser.add_argument_group("attention", about).add_argument
    add("--global-size", type=int, metavar="N", help="first tokens, always seen (default: 32, or C/64)")
    add("--local-size", type=int, metavar="N", help="last tokens, always seen (default: 8192, or C/2)")
    add("--span-top-k", type=int, metavar="K", help="winners per head and query (default: 4)")
    add("--span-size", type=int, metavar="N", help="tokens around each winner (default: 32)")
    add("--max-spans", type=int, metavar="N", help="winners kept after the vote (default: 256, or what fits C)")
    add("--chunk-size", type=int, metavar="N", help="prompt tokens per scope, at most --local-size (default: 512)")
    add("--span-scope", choices=SPAN_SCOPES, help="who votes together (default: layer)")
    tail = f"last tokens of a prompt, read in smaller chunks; 0: none (default: {TAIL_SIZE})"
    add("--tail-size", type=int, metavar="N", help=tail)
    add("--tail-chunk-size", type=int, metavar="N", help=f"prompt tokens per scope there (default: {TAIL_CHUNK_SIZE})")
    add("--dense-size", type=int, metavar="N", help="see all of so many tokens (default: what the scope can hold)")
    add("--allow-out-of-distribution", action="store_true", help="let the scope exceed the trained context")
    return add


def _add_execution(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("execution").add_argument
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="of weights and cache")
    add("--device", choices=DEVICES, default="auto", help="where to run")
    add("--impl", choices=IMPLS, default="auto", help="the fused kernel or the torch path")
    add("--threads", type=int, metavar="N", help="of the CPU's arithmetic (default: the cores, or OMP_NUM_THREADS)")
    add("--quiet", action="store_true", help="no progress bar, no statistics")
    add("--debug", action="store_true", help="show tracebacks")
