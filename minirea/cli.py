"""The command line. stdout carries the generated text (or one JSON object) only; all else goes to stderr."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from minirea import __version__
from minirea.checks import integer
from minirea.config import DEVICES, DTYPES, IMPLS, MODES, SCOPE_FIELDS, SPAN_SCOPES, TAIL_CHUNK_SIZE, TAIL_SIZE
from minirea.errors import InputError, MinireaError, MinireaWarning, MissingExtraError, memory_limit_of, printable
from minirea.files import check_replaceable, read_all, read_file
from minirea.terminal import EXIT_INTERRUPTED, Interrupts, discard_output, open_streams, put, put_now, say
from minirea.threads import limited_to, wait_asleep

if TYPE_CHECKING:
    from minirea.api import ModelFiles, Session
    from minirea.evaluation import Evaluation
    from minirea.evaluation.frame.tasks import Option, Task
    from minirea.generate import Piece, Stats
    from minirea.series import Question

EXIT_ERROR, EXIT_USAGE = 1, 2
PROMPT_LIMIT = 2**30  # bytes

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
    parser = _parser(with_tasks=argv[:1] == ["eval"])
    arguments = parser.parse_args(argv)
    if arguments.command in ("generate", "explain"):
        _check_usage(arguments)
    run = _COMMANDS[arguments.command]
    try:
        with limited_to(getattr(arguments, "threads", None)), _warnings_as_lines():
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
        return _fail(as_flags(explained(error), set(vars(arguments))))


def _check_usage(arguments: argparse.Namespace) -> None:
    """Flags of `generate` that mean nothing without others are wrong usage."""
    series = len(arguments.prompts) > 1 or arguments.questions is not None
    for flag, given, allowed, needed in (
        ("--system", arguments.system is not None, arguments.chat, "--chat"),
        ("--allow-special-tokens", arguments.allow_special_tokens, arguments.chat, "--chat"),
        ("--out", arguments.answers is not None, series, "--questions, or --prompt several times"),
    ):
        if given and not allowed:
            arguments.parser.error(f"{flag} needs {needed}")


def run_generate(arguments: argparse.Namespace, interrupts: Interrupts) -> int:
    """`minirea generate` and `explain`: load, read the prompt, print the text as it comes, say where it came from."""
    if sys.stdout is None:
        raise InputError("standard output is closed, expected somewhere to write the text to")
    if len(arguments.prompts) > 1 or arguments.questions is not None:
        return run_series(arguments, interrupts)
    prompt = read_prompt(arguments)
    # Imports torch, which --help and a bad prompt need not wait for.
    from minirea.api import generation_config, read_model
    from minirea.generate import Interrupted

    options = vars(arguments)
    generation_options = {name: options[name] for name in _GENERATION_OPTIONS}
    generation_config(generation_options)  # a bad value should not wait for the weights to load
    integer("sources", arguments.sources, 0)
    if arguments.out is not None:
        from minirea.explain import make_folder

        make_folder(Path(arguments.out))
    progress = not arguments.quiet
    files = read_model(arguments.model, **{name: options[name] for name in _LOAD_OPTIONS + SCOPE_FIELDS})
    context = files.open_context(arguments.context) if arguments.context else None
    ids = _encode(files, prompt, arguments, continues=context is not None)
    prompt_tokens = len(ids) + (len(context.ids) if context else 0)
    num_tokens = prompt_tokens + arguments.max_tokens
    _warn_beyond_training(files, num_tokens)
    if arguments.dry_run:
        return _print_plan(files, prompt_tokens, arguments)
    llm = files.load(progress, num_tokens)
    session = llm.open_session(context, num_tokens, progress=progress) if context else llm.session()
    answer = Answer(prompt_tokens, arguments.json, arguments.quiet)
    interrupts.finish = answer.finish_now
    pieces = session.stream(ids, progress=progress, **generation_options)
    try:
        for piece in pieces:
            answer.add(piece)
            interrupts.defer()
            if interrupts.pending and piece.finish_reason is None:
                pieces.throw(KeyboardInterrupt)
    except KeyboardInterrupt as struck:
        answer.finish_reason = "interrupted"
        try:
            if not isinstance(struck, Interrupted):
                pieces.throw(KeyboardInterrupt)  # it struck outside the stream, which can complete its statistics yet
        except KeyboardInterrupt as passed_on:
            struck = passed_on
        if isinstance(struck, Interrupted):
            answer.add(struck.piece)
    if answer.finish_reason != "interrupted" and (arguments.sources or arguments.out is not None):
        before = llm.tokenizer.decode(context.ids) if context else ""
        _look_back(session, before + prompt, answer, arguments)
    interrupts.ignore()
    answer.finish()
    return EXIT_INTERRUPTED if answer.finish_reason == "interrupted" else 0


def _look_back(session: Session, prompt: str, answer: Answer, arguments: argparse.Namespace) -> None:
    """--sources and --out: what the answer used of its prompt."""
    from minirea.sources import as_records, sources_of

    tokenizer, ids = session.llm.tokenizer, session.ids
    votes = session.votes()
    answer.sources = as_records(sources_of(votes, ids, arguments.sources, tokenizer), prompt, ids, tokenizer)
    if arguments.out is None:
        return
    from minirea.explain import Explanation

    name, start = Path(arguments.model).resolve().name, answer.prompt_tokens
    explanation = Explanation(name, ids, start, answer.text, votes, session.llm.config.num_layers, answer.sources)
    try:
        explanation.write(Path(arguments.out), tokenizer)
    except MissingExtraError as error:  # a server may well have no matplotlib, and the rest is there
        say(f"minirea: no picture: {error}")


def run_series(arguments: argparse.Namespace, interrupts: Interrupts) -> int:
    """`minirea generate` for several prompts: each follows the context, if there is one, and no other prompt."""
    from minirea.api import generation_config, read_model
    from minirea.series import Answers, key_of

    questions = _questions(arguments)
    options, progress = vars(arguments), not arguments.quiet
    generation_options = {name: options[name] for name in _GENERATION_OPTIONS}
    generation_config(generation_options)
    files = read_model(arguments.model, **{name: options[name] for name in _LOAD_OPTIONS + SCOPE_FIELDS})
    context = files.open_context(arguments.context) if arguments.context else None
    before = context.ids if context else []
    prompts = [_encode(files, question.prompt, arguments, continues=context is not None) for question in questions]
    prompt_tokens = len(before) + max(map(len, prompts))
    _warn_beyond_training(files, prompt_tokens + arguments.max_tokens)
    if arguments.dry_run:
        return _print_plan(files, prompt_tokens, arguments)
    origin, context_key = files.origin(), key_of(before)
    settings = origin.model, origin.settings, context_key, generation_options
    with Answers(arguments.answers) if arguments.answers else contextlib.nullcontext() as answers:
        keys = [key_of(*settings, ids) for ids in prompts]
        left = [i for i, key in enumerate(keys) if answers is None or not answers.has(questions[i], key)]
        if left:
            llm = files.load(progress, prompt_tokens + arguments.max_tokens)
            capacity = prompt_tokens + arguments.max_tokens
            session = llm.open_session(context, capacity, progress=progress) if context else llm.session(capacity)
        interrupts.finish = functools.partial(_tell_of_series, arguments, len(questions))
        for done, index in enumerate(left, len(questions) - len(left) + 1):
            out = session.generate(prompts[index], progress=progress, sources=arguments.sources, **generation_options)
            record: dict[str, Any] = {
                "id": questions[index].id,
                "key": keys[index],
                "text": out.text,
                "token_ids": out.token_ids,
            }
            record |= {"finish_reason": out.finish_reason} | out.stats.as_dict()
            record |= {"sources": [source._asdict() for source in out.sources]} if arguments.sources else {}
            answers.add(record) if answers else put(json.dumps(record) + "\n")
            session.rewind(len(before))
            if progress:
                say(f"minirea: {done} of {len(questions)} answered")
    return 0


def _questions(arguments: argparse.Namespace) -> list[Question]:
    from minirea.series import Question, check_ids, read_questions

    if arguments.questions is not None:
        try:
            return read_questions(arguments.questions)
        except MinireaError as error:
            raise type(error)(f"--questions {error}") from None
    named = [(path, argparse.Namespace(prompt=path, text=None)) for path in arguments.prompts]
    questions = [Question(path, read_prompt(one), f"--prompt {path}") for path, one in named]
    check_ids(questions)
    return questions


def _tell_of_series(arguments: argparse.Namespace, count: int) -> None:
    kept = f"; {arguments.answers} keeps the answers, the same command goes on" if arguments.answers else ""
    say(f"\nminirea: interrupted in a series of {count}{kept}")


def run_read(arguments: argparse.Namespace, interrupts: Interrupts) -> int:
    """`minirea read`: load, read the prompt, keep the context in a file."""
    check_replaceable(arguments.save)  # should not wait for the prompt to be read
    prompt = read_prompt(arguments)
    from minirea.api import read_model
    from minirea.memory import human

    options, progress = vars(arguments), not arguments.quiet
    files = read_model(arguments.model, **{name: options[name] for name in _LOAD_OPTIONS + SCOPE_FIELDS})
    context = files.open_context(arguments.context) if arguments.context else None
    ids = files.encode(prompt, continues=context is not None)
    num_tokens = len(ids) + (len(context.ids) if context else 0)
    _warn_beyond_training(files, num_tokens)
    check_replaceable(arguments.save, files.context_bytes(num_tokens))
    llm = files.load(progress, num_tokens)
    interrupts.raises = True  # an incomplete file is to be removed
    session = llm.open_session(context, num_tokens, progress=progress) if context else llm.session(num_tokens)
    session.prefill(ids, progress=progress)
    session.save(arguments.save, progress=progress)
    if progress:
        size = human(os.stat(arguments.save).st_size)
        say(f"context     {num_tokens:,} tokens, {size} in {printable(arguments.save)}")
    return 0


def run_chat(arguments: argparse.Namespace, interrupts: Interrupts) -> int:
    """`minirea chat`: load, then answer line by line."""
    if sys.stdout is None:
        raise InputError("standard output is closed, expected somewhere to write the answers to")
    from minirea.api import generation_config, read_model
    from minirea.chat import Chat, Conversation

    options, progress = vars(arguments), not arguments.quiet
    generation_options = {name: options[name] for name in _GENERATION_OPTIONS}
    generation_config(generation_options)
    files = read_model(arguments.model, **{name: options[name] for name in _LOAD_OPTIONS + SCOPE_FIELDS})
    num_tokens = len(_encode(files, "?", arguments)) + arguments.max_tokens  # raises where there is no chat template
    context = files.open_context(arguments.context) if arguments.context else None
    num_tokens += len(context.ids) if context else 0
    llm = files.load(progress, num_tokens)
    session = llm.open_session(context, num_tokens, progress=progress) if context else llm.session(num_tokens)
    conversation = Conversation(session, arguments.system, arguments.allow_special_tokens)
    return Chat(conversation, interrupts, generation_options, footer, progress).run()


@dataclasses.dataclass
class Answer:
    """What has been generated so far, and how it is printed: piece by piece, or as one JSON object."""

    prompt_tokens: int
    as_json: bool
    quiet: bool
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    stats: Stats | None = None
    finish_reason: str | None = None
    sources: list[dict[str, Any]] | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.stats, self.finish_reason = piece.stats, piece.finish_reason
        if not self.as_json:
            put(piece.text)

    def finish(self) -> None:
        """Print what is left to print."""
        put(self._rest())
        if self.sources is not None and not self.as_json:
            say(source_lines(self.sources))
        if self.stats and not self.quiet:
            say(footer(self.stats, self.finish_reason))

    def finish_now(self) -> None:
        """The same from a signal's handler, with the statistics as far as they are known."""
        self.finish_reason = "interrupted"
        put_now(self._rest())
        say("\nminirea: interrupted")

    def _rest(self) -> str:
        if not self.as_json:
            return "\n" if self.text or self.finish_reason != "interrupted" else ""
        record: dict[str, Any] = {"text": self.text, "token_ids": self.token_ids, "finish_reason": self.finish_reason}
        record |= {"prompt_tokens": self.prompt_tokens} | (self.stats.as_dict() if self.stats else {})
        record |= {} if self.sources is None else {"sources": self.sources}
        return json.dumps(record) + "\n"


def run_eval(arguments: argparse.Namespace, interrupts: Interrupts) -> int:
    """`minirea eval`: put a task to a model, print the summary, draw the pictures."""
    from minirea.evaluation import evaluate, report

    if arguments.task == "report":
        return _show(report(arguments.results, arguments.out, arguments.differing), arguments.out)
    options = vars(arguments)
    names = {*_LOAD_OPTIONS, *SCOPE_FIELDS, *arguments.task_options, "attention", "out", "at_most"} - {"task"}

    def tell() -> None:
        if Path(arguments.out).exists():
            say(f"\nminirea: interrupted; {arguments.out} keeps the answers, the same command goes on")

    interrupts.finish = tell
    try:
        evaluation = evaluate(
            arguments.task, arguments.model, progress=not arguments.quiet, **{name: options[name] for name in names}
        )
    except KeyboardInterrupt:
        tell()
        raise
    return _show(evaluation, arguments.out)


def _show(evaluation: Evaluation, folder: str) -> int:
    """The table to standard output and the pictures to the folder."""
    put(evaluation.table + "\n")
    try:
        evaluation.plot(folder)
    except MissingExtraError as error:  # a server may well have no matplotlib, and the results are complete
        say(f"minirea: no pictures: {error}")
    return 0


def read_prompt(arguments: argparse.Namespace) -> str:
    """The prompt's text from --text, a file or standard input, without a byte order mark.

    Raises:
        MissingFileError, InputError: no such file, not readable, too large, not UTF-8, or empty.
    """
    if arguments.text is not None:
        source, text = "--text", arguments.text
    else:
        source = "--prompt " + ("standard input" if arguments.prompt == "-" else arguments.prompt)
        try:
            raw = _prompt_bytes(arguments.prompt).removeprefix(codecs.BOM_UTF8)
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            found = f"byte 0x{raw[error.start]:02x} at offset {error.start}"
            raise InputError(f"{source}: not UTF-8 text: found {found}") from None
        except MinireaError as error:
            raise type(error)(f"--prompt {error}") from None
    if not text:
        raise InputError(f"{source}: the prompt is empty, expected some text")
    return text


def _prompt_bytes(path: str) -> bytes:
    if path != "-":
        return read_file(path, PROMPT_LIMIT, "a prompt", pipes=True)
    if sys.stdin is None:
        raise InputError("standard input: is closed, expected the prompt's text")
    try:
        return read_all(sys.stdin.buffer, PROMPT_LIMIT, "standard input", "a prompt")
    except OSError as error:
        raise InputError(f"standard input: cannot be read: {error.strerror}") from None


def _warn_beyond_training(files: ModelFiles, num_tokens: int) -> None:
    seen, trained = files.seen_tokens(num_tokens), files.config.trained_context
    if seen > trained:
        say(
            f"minirea: warning: {files.attention.mode} attention will see up to {seen:,} tokens at once, more than the "
            f"{trained:,} that this model was trained on: expect damaged text"
        )


def _print_plan(files: ModelFiles, prompt_tokens: int, arguments: argparse.Namespace) -> int:
    """--dry-run: what the run would need, and an error if there is less."""
    from minirea.memory import available_bytes, human

    num_tokens, device = prompt_tokens + arguments.max_tokens, files.attention.device
    plan, free = files.plan(num_tokens), available_bytes(device)
    dtype = str(files.dtype).removeprefix("torch.")
    if arguments.json:
        sizes = {name: getattr(plan, name) for name in ("weights", "loading", "cache", "workspace", "peak")}
        record = {f"{name}_bytes": size for name, size in sizes.items()}
        record |= {"device": device.type, "dtype": dtype, "prompt_tokens": prompt_tokens, "num_tokens": num_tokens}
        put(json.dumps(record | {"free_bytes": free}) + "\n")
    else:
        lines = (
            f"device      {device.type}, {dtype}, {files.attention.mode} attention, {files.attention.impl}",
            f"tokens      {prompt_tokens:,} in the prompt and {arguments.max_tokens:,} to generate",
            f"weights     {human(plan.weights)}, and {human(plan.loading)} more while they are loaded",
            f"cache       {human(plan.cache)}",
            f"workspace   {human(plan.workspace)}",
            f"at most     {human(plan.peak)}" + ("" if free is None else f" of {human(free)} that are free"),
        )
        put("\n".join(lines) + "\n")
    plan.check(device)
    return 0


def source_lines(sources: list[dict[str, Any]]) -> str:
    """One line for each source: its share, where it stands, and what it says, cut."""
    if not sources:
        return "sources     none before the question"
    lines: list[str] = []
    for source in sources:
        line = f"line {source['line']:,}, " if source["line"] else ""
        place = f"{source['share']:.1%} {line}tokens {source['start']:,}-{source['end']:,}"
        lines.append(f"{'' if lines else 'sources':<11} {place}: {printable(' '.join(source['text'].split()), 100)}")
    return "\n".join(lines)


def footer(stats: Stats, finish_reason: str | None) -> str:
    """The lines of statistics after a generation."""
    from minirea.memory import human

    s, scope = stats, stats.scope
    parts = [f"{scope[name]:,} {name}" for name in ("global", "selected", "local") if scope.get(name)]
    beyond = f", more than the trained {s.trained_context:,}" if s.seen_tokens > s.trained_context else ""
    before = f", {s.cached_tokens:,} of them read before" if s.cached_tokens else ""
    ran_on = [s.device, s.dtype, f"{s.attention} attention", s.impl]
    ran_on += [f"{s.threads} threads" if s.threads != 1 else "1 thread"] if s.threads else []
    ran_on += [f"seed {s.seed}"] if s.seed is not None else []
    lines = [
        f"device      {', '.join(ran_on)}",
        f"prompt      {s.prompt_tokens:,} tokens{before}, {s.prompt_tokens_per_second:,.1f} tokens/s, "
        f"first token after {s.time_to_first_token:.2f} s",
        f"generation  {s.generated_tokens:,} tokens, {s.tokens_per_second:,.1f} tokens/s, ended by {finish_reason}",
    ]
    if scope:
        lines += [f"scope       {' + '.join(parts)} = {s.seen_tokens:,} of {scope['seq_len']:,} tokens{beyond}"]
    lines += [f"memory      weights {human(s.weight_bytes)}, cache {human(s.cache_bytes)}, peak {human(s.peak_bytes)}"]
    return "\n".join(lines)


def _encode(files: ModelFiles, prompt: str, arguments: argparse.Namespace, continues: bool = False) -> list[int]:
    """Ids of a prompt; one that continues a context has no BOS of its own."""
    if not arguments.chat:
        return files.encode(prompt, continues)
    system = [{"role": "system", "content": arguments.system}] if arguments.system is not None else []
    messages = [*system, {"role": "user", "content": prompt}]
    tokenizer = files.tokenizer
    ids = files.encode(tokenizer.encode_chat(messages, allow_special_tokens=arguments.allow_special_tokens))
    return ids[1:] if continues and ids[0] == tokenizer.bos_id else ids


def as_flags(message: str, names: set[str]) -> str:
    """A message that names Python's fields, as the command line spells them.

    `max_tokens` is --max-tokens wherever it stands, dtype="float32" is --dtype float32. A name of one word, which might
    be a word, counts at the beginning of a message that says what it is, and in backquotes anywhere.
    """

    def flag(match: re.Match[str]) -> str:
        name, value = match[1], match[2] if match.re.groups > 1 else "True"
        return "--" + name.replace("_", "-") + ("" if value == "True" else " " + value.strip("\"'"))

    known, several_words = ("|".join(group) or "(?!)" for group in (names, {name for name in names if "_" in name}))
    before = r"(?<![\w./-])"  # neither in a path nor in another name
    for pattern in (
        rf"`({known})`",
        rf"{before}({known})=(True|[\w.]+|\"[^\"]*\"|'[^']*')",
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
    return f"{type(error).__name__}: {text} (a fault of minirea; --debug shows where)"


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Within it minirea's own warnings are a line on standard error each, like its errors."""

    def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if issubclass(category, MinireaWarning):
            say(f"minirea: warning: {printable(str(message))}")
        else:
            shown_by_python(message, category, *place)

    shown_by_python = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always", MinireaWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _fail(message: str) -> int:
    say(f"minirea: error: {message}")
    return EXIT_ERROR


class _HelpFormatter(argparse.HelpFormatter):
    """Shows the defaults that say something: not those of switches and of options that are off."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        # A value that is broken in two could not be copied.
        return textwrap.wrap(" ".join(text.split()), width, break_long_words=False, break_on_hyphens=False)

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.default not in (None, False, [], {}, argparse.SUPPRESS)
        return (action.help or "") + (" (default: %(default)s)" if shown else " (required)" if action.required else "")


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
    _add_input(generate, several=True)
    _add_sampling(generate)
    add = _add_attention(generate)
    add("--attention", choices=MODES, default="reattention", help="what a token can see")
    _add_execution(generate)
    generate.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    generate.add_argument("--dry-run", action="store_true", help="print what it would need of the memory, and stop")
    add_sources = "say which N passages of the prompt the answer used most"
    generate.add_argument("--sources", type=int, default=0, metavar="N", help=add_sources)
    generate.set_defaults(parser=generate, out=None)
    _add_explain(commands)
    _add_read(commands)
    _add_chat(commands)
    _add_eval(commands, with_tasks)
    return parser


def _add_explain(commands: Any) -> None:
    parser = commands.add_parser(
        "explain",
        help="continue a prompt, and show where the answer came from",
        description="Continue a prompt as `generate` does, and write what the answer used of it to --out: "
        "sources.json, attention.png (by layer, and by the answer's tokens) and page.html, which shades the prompt.",
        formatter_class=_HelpFormatter,
    )
    _add_input(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="where to; it is made if it is not there")
    parser.add_argument("--sources", type=int, default=10, metavar="N", help="so many passages")
    _add_sampling(parser)
    add = _add_attention(parser)
    add("--attention", choices=MODES, default="reattention", help="what a token can see")
    _add_execution(parser)
    parser.set_defaults(parser=parser, json=False, dry_run=False)


def _add_read(commands: Any) -> None:
    about = "read a prompt once and keep the context in a file"
    read = commands.add_parser(
        "read",
        help=about,
        description="Read a prompt and keep the context in a file, from which `generate --context` and "
        "`chat --context` go on, with the same model and settings, as if it had just been read.",
        formatter_class=_HelpFormatter,
    )
    read.add_argument("--model", required=True, metavar="DIR", help="Hugging Face or Mistral model directory")
    source = read.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="FILE", help="UTF-8 text file, or - for standard input (or --text)")
    source.add_argument("--text", metavar="STRING", help="the prompt itself (one of the two is required)")
    read.add_argument("--save", required=True, metavar="FILE", help="where the context is kept")
    read.add_argument("--context", metavar="FILE", help="a kept context that the prompt goes on from")
    add = _add_attention(read)
    add("--attention", choices=MODES, default="reattention", help="what a token can see")
    _add_execution(read)


def _add_chat(commands: Any) -> None:
    chat = commands.add_parser(
        "chat",
        help="talk with a model",
        description="Talk with a model: a line is a message, /help lists the commands. Answers go to standard output, "
        "everything else to standard error; lines may come from a pipe.",
        formatter_class=_HelpFormatter,
    )
    chat.add_argument("--model", required=True, metavar="DIR", help="Hugging Face or Mistral model directory")
    chat.add_argument("--context", metavar="FILE", help="what `minirea read --save`, or /save, has kept, to go on from")
    chat.add_argument("--system", metavar="STR", help="system message")
    special = "special tokens spelled in a message act as such, instead of being text"
    chat.add_argument("--allow-special-tokens", action="store_true", help=special)
    _add_sampling(chat)
    add = _add_attention(chat)
    add("--attention", choices=MODES, default="reattention", help="what a token can see")
    _add_execution(chat)
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


class _Prompts(argparse.Action):
    """--prompt FILE: the last one as `prompt`, all of them as `prompts`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:  # noqa: ARG002
        namespace.prompt = values
        namespace.prompts = [*namespace.prompts, values]


class _Limit(argparse.Action):
    """--at-most MODE=N into a dictionary."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:  # noqa: ARG002
        mode, equals, length = values.partition("=")
        if not equals:
            raise argparse.ArgumentError(self, f"{values!r}, expected MODE=LENGTH such as full=64k")
        setattr(namespace, self.dest, getattr(namespace, self.dest) | {mode: length})


def _add_input(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Model and prompt; `several` adds what asks for several answers."""
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face or Mistral model directory")
    source = parser.add_mutually_exclusive_group(required=True)
    about = "UTF-8 text file, or - for standard input" + (
        "; several times: one line of JSON for each" if several else ""
    )
    source.add_argument("--prompt", action=_Prompts if several else "store", metavar="FILE", help=about)
    source.add_argument("--text", metavar="STRING", help="the prompt itself (one of these is required)")
    parser.set_defaults(prompts=[], questions=None, answers=None)
    if several:
        questions = 'JSON Lines of {"id": ..., "prompt": ...}: one line of JSON for each'
        source.add_argument("--questions", metavar="FILE", help=questions)
        out = "of several answers: where they go; those there are not redone"
        parser.add_argument("--out", dest="answers", metavar="FILE", help=out)
    parser.add_argument("--context", metavar="FILE", help="what `minirea read --save` kept, which the prompt follows")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--system", metavar="STR", help="system message, with --chat")
    special = "with --chat: special tokens spelled in the prompt act as such, instead of being text"
    parser.add_argument("--allow-special-tokens", action="store_true", help=special)


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
    add(
        "--local-size",
        type=int,
        metavar="N",
        help="last tokens, always seen (default: 8192; or C/8, at least 512, at most C/4)",
    )
    add("--span-top-k", type=int, metavar="K", help="winners per head and query (default: 4; 2 for C from 4096)")
    add("--span-size", type=int, metavar="N", help="tokens around each winner (default: 32)")
    add("--max-spans", type=int, metavar="N", help="winners kept after the vote (default: 256, or half of what fits C)")
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


_COMMANDS = {"generate": run_generate, "explain": run_generate, "read": run_read, "chat": run_chat, "eval": run_eval}
