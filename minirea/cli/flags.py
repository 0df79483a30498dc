"""Flags that several commands share, and how a parser shows and refuses them."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable
from typing import Any, Final, NoReturn

from minirea.config import (
    CACHES,
    DEVICES,
    DTYPES,
    IMPLS,
    MODES,
    QUANTIZE,
    SKETCHES,
    SPAN_SCOPES,
    TAIL_CHUNK_SIZE,
    TAIL_SIZE,
)
from minirea.errors import MinireaError
from minirea.terminal import discard_output, put

EXIT_ERROR: Final = 1
EXIT_USAGE: Final = 2


class HelpFormatter(argparse.HelpFormatter):
    """Shows the defaults that say something: not those of switches and of options that are off."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        # A value that is broken in two could not be copied.
        return textwrap.wrap(" ".join(text.split()), width, break_long_words=False, break_on_hyphens=False)

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.default not in (None, False, [], {}, argparse.SUPPRESS)
        return (action.help or "") + (" (default: %(default)s)" if shown else " (required)" if action.required else "")


class Parser(argparse.ArgumentParser):
    def _print_message(self, message: str, file: Any = None) -> None:
        """argparse's own drops what cannot be written, as --help to a full disk, and ends with status 0."""
        if file is None or file is not sys.stdout:
            super()._print_message(message, file)
            return
        try:
            put(message)
        except (MinireaError, BrokenPipeError) as error:
            discard_output()
            self.exit(EXIT_ERROR, f"minirea: error: {error}\n" if isinstance(error, MinireaError) else None)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"minirea: error: {message} (see `{self.prog} --help`)\n")


def path(text: str) -> str:
    """The name of a file or directory, which a shell makes empty where a variable is not set."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty, expected one")
    return text


class _Prompts(argparse.Action):
    """--prompt FILE: the last one as `prompt`, all of them as `prompts`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:  # noqa: ARG002
        namespace.prompt = values
        namespace.prompts = [*namespace.prompts, values]


class _OnePrompt(argparse.Action):
    """--prompt FILE where there is one prompt: of two, the first would be passed over."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:  # noqa: ARG002
        if namespace.prompt is not None:
            raise argparse.ArgumentError(self, f"given twice, {namespace.prompt!r} and {values!r}, expected once")
        namespace.prompt = values


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=path, required=True, metavar="DIR", help="Hugging Face or Mistral model directory"
    )


def add_prompt(parser: argparse.ArgumentParser, several: bool = False) -> Any:
    """The group of the flags that a prompt comes by, one of which is required; `several` takes --prompt repeatedly."""
    source = parser.add_mutually_exclusive_group(required=True)
    about = "UTF-8 text file, or - for standard input"
    action, more = (_Prompts, "; several times: one line of JSON for each") if several else (_OnePrompt, "")
    source.add_argument("--prompt", type=path, action=action, metavar="FILE", help=about + more)
    source.add_argument("--text", metavar="STRING", help="the prompt itself (one of these is required)")
    return source


def add_input(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Model and prompts; `several` adds what asks for several answers."""
    add_model(parser)
    source = add_prompt(parser, several)
    parser.set_defaults(prompts=[], questions=None, answers=None)
    if several:
        questions = 'JSON Lines of {"id": ..., "prompt": ...}, or - for standard input: one line of JSON for each'
        source.add_argument("--questions", type=path, metavar="FILE", help=questions)
        out = "of several answers: where they go; those there are not redone"
        parser.add_argument("--out", dest="answers", type=path, metavar="FILE", help=out)
    parser.add_argument(
        "--context", type=path, metavar="FILE", help="what `minirea read --save` kept, which the prompt follows"
    )
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--system", metavar="STR", help="system message, with --chat")
    special = "with --chat: special tokens spelled in the prompt act as such, instead of being text"
    parser.add_argument("--allow-special-tokens", action="store_true", help=special)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what to generate").add_argument
    add("--max-tokens", type=int, default=256, metavar="N", help="at most so many tokens")
    add("--temperature", type=float, default=0.0, metavar="T", help="0, the default, always takes the best token")
    add("--top-k", type=int, default=0, metavar="K", help="keep the K best tokens; 0: all")
    add("--top-p", type=float, default=1.0, metavar="P", help="keep the best tokens that reach probability P")
    add("--min-p", type=float, default=0.0, metavar="P", help="keep tokens at least P times as probable as the best")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: avoid tokens already there")
    add("--seed", type=int, metavar="N", help="same seed, same device: same tokens")
    add("--stop", action="append", default=[], metavar="STR", help="end before this text (repeatable)")
    add("--ignore-eos", action="store_true", help="go on past the end-of-text token")


def add_attention(parser: argparse.ArgumentParser) -> None:
    """One attention mode and its scope."""
    add = add_scope(parser)
    add("--attention", choices=MODES, default="reattention", help="what a token can see")


def add_scope(parser: argparse.ArgumentParser) -> Callable[..., Any]:
    """The flags of a scope; returns what adds further flags to their group."""
    about = "Sizes in tokens. Where two defaults are given, the second is for trained contexts C below 32768."
    add = parser.add_argument_group("attention", about).add_argument
    add("--global-size", type=int, metavar="N", help="first tokens, always seen (default: 32, or C/64)")
    add(
        "--local-size",
        type=int,
        metavar="N",
        help="last tokens, always seen (default: 8192; or C/8, at least 1024, at most C/2)",
    )
    add("--span-top-k", type=int, metavar="K", help="winners per head and query (default: 4; 2 for C from 4096)")
    add("--span-size", type=int, metavar="N", help="tokens around each winner (default: 32; 64 for C from 4096)")
    add("--max-spans", type=int, metavar="N", help="winners kept after the vote (default: 256, or half of what fits C)")
    add("--chunk-size", type=int, metavar="N", help="prompt tokens per scope, at most --local-size (default: 512)")
    add("--span-scope", choices=SPAN_SCOPES, help="which heads vote together (default: layer)")
    tail = f"last tokens of a prompt, read in smaller chunks; 0: none (default: {TAIL_SIZE})"
    add("--tail-size", type=int, metavar="N", help=tail)
    add("--tail-chunk-size", type=int, metavar="N", help=f"prompt tokens per scope there (default: {TAIL_CHUNK_SIZE})")
    window = "tokens whose votes count for one of the answer, itself included (default: 1; 8 for C from 4096)"
    add("--vote-window", type=int, metavar="N", help=window)
    size = "neighbouring tokens that are one to a vote (default: 1; half of --span-size for C from 4096)"
    add("--vote-size", type=int, metavar="N", help=size)
    spans = "--max-spans of the answer's tokens (default: the same; at most 16 for C from 4096)"
    add("--decode-spans", type=int, metavar="N", help=spans)
    carry = "votes of an answer's tokens add up from layer to layer (default: no; yes for C from 4096)"
    add("--carry-votes", action=argparse.BooleanOptionalAction, help=carry)
    add("--dense-size", type=int, metavar="N", help="see all of so many tokens (default: what the scope can hold)")
    add("--allow-out-of-distribution", action="store_true", help="let the scope exceed the trained context")
    return add


def add_execution(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("execution").add_argument
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="of weights and cache")
    quantize = (
        "round matrices while they are read: to one byte per weight, or half of one (head, parts of first layers: one)"
    )
    add("--quantize", choices=QUANTIZE, help=quantize)
    add("--device", choices=DEVICES, default="auto", help="where to run")
    add("--impl", choices=IMPLS, default="auto", help="the fused kernel or the torch path")
    gpus = "devices that share the model, a divisor of its key/value heads; on a CPU: processes, which share its cores"
    add("--gpus", type=int, default=1, metavar="N", help=gpus)
    sketch = "decode from int8 copies of the keys: half the bytes on a GPU, the same selection; not where tokens vote "
    sketch += "together (auto: on a GPU, for contexts so long that it is faster)"
    add("--sketch", choices=SKETCHES, default="auto", help=sketch)
    cache = (
        "where keys and values lie: host has values, and where it must some layers' keys, in the host's memory, which "
    )
    cache += "a GPU reads there: longer contexts, the same results (auto: there what does not fit on the device)"
    add("--cache", choices=CACHES, default="auto", help=cache)
    add("--threads", type=int, metavar="N", help="of the CPU's arithmetic (default: the cores, or OMP_NUM_THREADS)")
    add("--quiet", action="store_true", help="no progress bar, no statistics")
    add("--debug", action="store_true", help="show tracebacks")
