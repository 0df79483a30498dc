"""What the commands read besides a model: prompts and questions, and their token ids."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Final

from minirea.errors import InputError, MinireaError
from minirea.files import as_text, read_all, read_file

if TYPE_CHECKING:
    from minirea.api import ModelFiles
    from minirea.series import Question

PROMPT_LIMIT: Final = 2**30  # bytes
_TEXTS: Final = ("text", "system", "stop")  # flags whose values are tokenized


def decode_texts(arguments: argparse.Namespace) -> None:
    """Make texts of the command line what they were meant as: UTF-8, whatever the locale is.

    Raises:
        InputError: other bytes.
    """
    for name in _TEXTS if arguments.command != "eval" else ():  # where --text names files
        value = getattr(arguments, name, None)
        if isinstance(value, str):
            setattr(arguments, name, _utf8(value, f"--{name}"))
        elif value is not None:
            setattr(arguments, name, [_utf8(text, f"--{name}") for text in value])


def _utf8(argument: str, flag: str) -> str:
    """Bytes that the locale's encoding lacks are lone surrogates in sys.argv."""
    if not any("\ud800" <= character <= "\udfff" for character in argument):
        return argument
    return as_text(os.fsencode(argument), flag)


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
            raw = _bytes_of(arguments.prompt, PROMPT_LIMIT, "a prompt")
        except MinireaError as error:
            raise type(error)(f"--prompt {error}") from None
        text = as_text(raw, source)
    if not text:
        raise InputError(f"{source}: the prompt is empty, expected some text")
    return text


def _bytes_of(path: str, limit_bytes: int, what: str) -> bytes:
    """Of a file, or of standard input where it is "-"; `what` is expected there, for messages."""
    if path != "-":
        return read_file(path, limit_bytes, what, pipes=True)
    if sys.stdin is None:
        raise InputError(f"standard input: is closed, expected {what}")
    try:
        return read_all(sys.stdin.buffer, limit_bytes, "standard input", what)
    except OSError as error:
        raise InputError(f"standard input: cannot be read: {error.strerror}") from None


def questions_of(arguments: argparse.Namespace) -> list[Question]:
    """The prompts of a series: those of --questions, or of every --prompt. Errors as of read_prompt."""
    from minirea.series import LIMIT, Question, check_ids, questions_in

    if (path := arguments.questions) is not None:
        try:
            read = questions_in(_bytes_of(path, LIMIT, "questions"), "standard input" if path == "-" else path)
            return [question._replace(source=f"--questions {question.source}") for question in read]
        except MinireaError as error:
            raise type(error)(f"--questions {error}") from None
    named = [(path, argparse.Namespace(prompt=path, text=None)) for path in arguments.prompts]
    questions = [Question(path, read_prompt(one), f"--prompt {path}") for path, one in named]
    check_ids(questions)
    return questions


def encode(files: ModelFiles, prompt: str, arguments: argparse.Namespace, continues: bool = False) -> list[int]:
    """Ids of a prompt; one that continues a context has no BOS of its own."""
    if not arguments.chat:
        return files.encode(prompt, continues)
    system = [{"role": "system", "content": arguments.system}] if arguments.system is not None else []
    messages = [*system, {"role": "user", "content": prompt}]
    tokenizer = files.tokenizer
    ids = files.encode(tokenizer.encode_chat(messages, allow_special_tokens=arguments.allow_special_tokens))
    return ids[1:] if continues and ids[0] == tokenizer.bos_id else ids
