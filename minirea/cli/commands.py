"""The commands: what `minirea generate`, `explain`, `read`, `chat` and `eval` do."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from minirea.checks import integer
from minirea.cli.inputs import encode, questions_of, read_prompt
from minirea.cli.messages import as_flags
from minirea.cli.output import Answer, footer, print_plan, warn_beyond_training
from minirea.config import SCOPE_FIELDS
from minirea.errors import InputError, MinireaError, MissingExtraError, printable
from minirea.files import check_replaceable, model_name
from minirea.terminal import EXIT_INTERRUPTED, Interrupts, put, say

if TYPE_CHECKING:
    from minirea.api import ModelFiles, Session
    from minirea.context import StoredContext
    from minirea.evaluation import Evaluation
    from minirea.series import Answers, Question

_LOAD_OPTIONS: Final = (
    "device",
    "dtype",
    "attention",
    "impl",
    "allow_out_of_distribution",
    "gpus",
    "quantize",
    "sketch",
    "cache",
)


def run_generate(arguments: argparse.Namespace, interrupts: Interrupts) -> int:
    """`minirea generate` and `explain`: load, read the prompt, print the text as it comes, say where it came from."""
    _check_output("text")
    if len(arguments.prompts) > 1 or arguments.questions is not None:
        return run_series(arguments, interrupts)
    prompt = read_prompt(arguments)
    options = _generation_options(arguments)
    integer("sources", arguments.sources, 0)
    if arguments.out is not None:
        from minirea.explain import check_folder

        check_folder(Path(arguments.out))
    files, context = _read_model(arguments)
    if arguments.sources or arguments.out is not None:
        files.check_one_device("sources")
    ids = encode(files, prompt, arguments, continues=context is not None)
    prompt_tokens = len(ids) + _length(context)
    num_tokens = prompt_tokens + arguments.max_tokens
    warn_beyond_training(files, num_tokens)
    if arguments.dry_run:
        return print_plan(files, prompt_tokens, arguments)
    session = _load(files, context, num_tokens, arguments)
    answer = Answer(prompt_tokens, arguments.json, arguments.quiet)
    interrupts.finish = answer.finish_now
    try:
        answer.take(session.stream(ids, progress=not arguments.quiet, **options), interrupts)
        if answer.finish_reason != "interrupted" and (arguments.sources or arguments.out is not None):
            _look_back(session, _text_of(context, files) + prompt, answer, arguments)
    except Exception:
        answer.end_line()
        raise
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

    name, start = model_name(arguments.model), answer.prompt_tokens
    explanation = Explanation(name, ids, start, answer.text, votes, session.llm.config.num_layers, answer.sources)
    try:
        explanation.write(Path(arguments.out), tokenizer)
    except MissingExtraError as error:  # a server may well have no matplotlib, and the rest is there
        say(f"minirea: no picture: {error}")


def run_series(arguments: argparse.Namespace, interrupts: Interrupts) -> int:
    """`minirea generate` for several prompts: each follows the context, if there is one, and no other prompt."""
    from minirea.series import key_of

    questions, options = questions_of(arguments), _generation_options(arguments)
    files, context = _read_model(arguments)
    if arguments.sources:
        files.check_one_device("sources")
    prompts = [_encode_question(files, question, arguments, context is not None) for question in questions]
    prompt_tokens = _length(context) + max(map(len, prompts))
    num_tokens = prompt_tokens + arguments.max_tokens
    warn_beyond_training(files, num_tokens)
    if arguments.dry_run:
        return print_plan(files, prompt_tokens, arguments)
    origin, context_key = files.origin(), key_of(context.ids if context else [])
    settings = origin.model, origin.settings, context_key, options
    with _answers_in(arguments.answers) if arguments.answers else contextlib.nullcontext() as answers:
        keys = [key_of(*settings, ids) for ids in prompts]
        left = [i for i, key in enumerate(keys) if answers is None or not answers.has(questions[i], key)]
        if left:
            session = _load(files, context, num_tokens, arguments)
        before = _text_of(context, files) if left and arguments.sources else ""
        interrupts.finish = functools.partial(_tell_of_series, arguments, len(questions))
        for done, index in enumerate(left, len(questions) - len(left) + 1):
            record = {"id": questions[index].id, "key": keys[index]}
            record |= _record_of_answer(session, prompts[index], before + questions[index].prompt, arguments, options)
            answers.add(record) if answers else put(json.dumps(record) + "\n")
            session.rewind(_length(context))
            if not arguments.quiet:
                say(f"minirea: {done} of {len(questions)} answered")
    if not left and not arguments.quiet:
        say(f"minirea: {len(questions)} of {len(questions)} are answered in {arguments.answers}")
    return 0


def _answers_in(path: str) -> Answers:
    from minirea.series import Answers

    try:
        return Answers(path)
    except MinireaError as error:
        raise type(error)(f"--out {error}") from None


def _encode_question(
    files: ModelFiles, question: Question, arguments: argparse.Namespace, continues: bool
) -> list[int]:
    try:
        return encode(files, question.prompt, arguments, continues)
    except MinireaError as error:
        raise type(error)(f"{question.source}: {error}") from None


def _record_of_answer(
    session: Session, ids: list[int], text: str, arguments: argparse.Namespace, options: dict[str, Any]
) -> dict[str, Any]:
    """What a line of a series says of an answer; `text` is all that it follows."""
    from minirea.sources import as_records

    out = session.generate(ids, progress=not arguments.quiet, sources=arguments.sources, **options)
    record = {"text": out.text, "token_ids": out.token_ids, "finish_reason": out.finish_reason} | out.stats.as_dict()
    if arguments.sources:
        record["sources"] = as_records(out.sources, text, session.ids, session.llm.tokenizer)
    return record


def _tell_of_series(arguments: argparse.Namespace, count: int) -> None:
    kept = f"; {arguments.answers} keeps the answers, the same command goes on" if arguments.answers else ""
    say(f"\nminirea: interrupted in a series of {count}{kept}")


def run_read(arguments: argparse.Namespace, interrupts: Interrupts) -> int:
    """`minirea read`: load, read the prompt, keep the context in a file."""
    check_replaceable(arguments.save)  # should not wait for the prompt to be read
    prompt = read_prompt(arguments)
    files, context = _read_model(arguments)
    from minirea.context import check_is_context_or_new

    ids = files.encode(prompt, continues=context is not None)
    num_tokens = len(ids) + _length(context)
    warn_beyond_training(files, num_tokens)
    check_is_context_or_new(arguments.save)
    check_replaceable(arguments.save, files.context_bytes(num_tokens))

    def tell() -> None:
        say(f"\nminirea: interrupted; {printable(arguments.save)} is not written")

    interrupts.finish = tell
    session = _load(files, context, num_tokens, arguments)
    from minirea.chat import without_conversation

    interrupts.raises = True  # an incomplete file is to be removed
    progress = not arguments.quiet
    try:
        start = time.perf_counter()
        session.prefill(ids, progress=progress)
        session.notes = without_conversation(session.notes)
        read = time.perf_counter()
        session.save(arguments.save, progress=progress)
    except KeyboardInterrupt:
        tell()
        raise
    if progress:
        saved = _at_speed(os.stat(arguments.save).st_size, time.perf_counter() - read)
        say(f"prompt      {len(ids):,} tokens, {len(ids) / (read - start):,.1f} tokens/s")
        say(f"context     {num_tokens:,} tokens in {printable(arguments.save)}, {saved}")
    return 0


def run_chat(arguments: argparse.Namespace, interrupts: Interrupts) -> int:
    """`minirea chat`: load, then answer line by line."""
    _check_output("answers")
    options = _generation_options(arguments)
    files, context = _read_model(arguments)
    num_tokens = len(encode(files, "?", arguments)) + arguments.max_tokens  # raises where there is no chat template
    session = _load(files, context, num_tokens + _length(context), arguments)
    from minirea.chat import Chat, Conversation

    try:
        conversation = Conversation(session, arguments.system, arguments.allow_special_tokens)
    except InputError as error:
        raise InputError(f"--context {arguments.context}: {error}") from None
    worded = functools.partial(as_flags, names=set(vars(arguments)))
    return Chat(conversation, interrupts, options, footer, worded, not arguments.quiet).run()


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


def _check_output(what: str) -> None:
    if sys.stdout is None:
        raise InputError(f"standard output is closed, expected somewhere to write the {what} to")


def _generation_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flag of every field of GenerationConfig, checked: a bad value should not wait for the weights to load."""
    from minirea.generate import GenerationConfig

    options = {name: getattr(arguments, name) for name in GenerationConfig.__dataclass_fields__}
    GenerationConfig(**options)
    return options


def _read_model(arguments: argparse.Namespace) -> tuple[ModelFiles, StoredContext | None]:
    """--model without its weights, and --context without its cache. Imports torch, which --help need not wait for."""
    from minirea.api import read_model

    files = read_model(arguments.model, **{name: getattr(arguments, name) for name in (*_LOAD_OPTIONS, *SCOPE_FIELDS)})
    if arguments.context is None:
        return files, None
    files.check_one_device("contexts in files")
    try:
        return files, files.open_context(arguments.context)
    except MinireaError as error:
        raise type(error)(f"--context {error}") from None


def _length(context: StoredContext | None) -> int:
    return len(context.ids) if context else 0


def _text_of(context: StoredContext | None, files: ModelFiles) -> str:
    return files.tokenizer.decode(context.ids) if context else ""


def _load(files: ModelFiles, context: StoredContext | None, num_tokens: int, arguments: argparse.Namespace) -> Session:
    """The weights, and a session with room for `num_tokens` that goes on from the context, if there is one."""
    progress = not arguments.quiet
    llm = files.load(progress, num_tokens)
    if context is None:
        return llm.session(num_tokens)
    start = time.perf_counter()
    session = llm.open_session(context, num_tokens, progress=progress)
    if progress:
        opened = _at_speed(files.context_bytes(context.num_cached), time.perf_counter() - start)
        say(f"context     {len(context.ids):,} tokens of {printable(arguments.context)}, {opened}")
    return session


def _at_speed(num_bytes: int, seconds: float) -> str:
    from minirea.memory import human

    return f"{human(num_bytes)} in {seconds:.2f} s, {human(int(num_bytes / max(seconds, 1e-6)))}/s"
