"""What the commands print: an answer as it comes, its statistics and sources, and the plan of a run."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from minirea.errors import MinireaError, printable
from minirea.terminal import Interrupts, put, put_now, say

if TYPE_CHECKING:
    from minirea.api import ModelFiles
    from minirea.generate import Piece, Stats


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

    def take(self, pieces: Generator[Piece, None, None], interrupts: Interrupts) -> None:
        """Print a stream as it comes; Ctrl-C ends it, and what it had held back follows."""
        from minirea.generate import Interrupted

        try:
            for piece in pieces:
                self.add(piece)
                interrupts.defer()
                if interrupts.pending and piece.finish_reason is None:
                    pieces.throw(KeyboardInterrupt)
        except KeyboardInterrupt as struck:
            self.finish_reason = "interrupted"
            try:
                if not isinstance(struck, Interrupted):
                    pieces.throw(KeyboardInterrupt)  # it struck outside the stream, which can complete its statistics
            except KeyboardInterrupt as passed_on:
                struck = passed_on
            if isinstance(struck, Interrupted):
                self.add(struck.piece)

    def end_line(self) -> None:
        """Before an error's line, which would stand behind what has been printed."""
        if self.text and not self.as_json:
            with contextlib.suppress(MinireaError, BrokenPipeError):  # which may be that error
                put("\n")

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
        if self.stats:  # which the next token may have been counted in when a signal struck
            record["generated_tokens"] = len(self.token_ids)
        record |= {} if self.sources is None else {"sources": self.sources}
        return json.dumps(record) + "\n"


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
    device = f"{s.gpus} x {s.device}" if s.gpus > 1 else s.device
    ran_on = [device, s.dtype, *([f"{s.quantize} weights"] if s.quantize else []), f"{s.attention} attention", s.impl]
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
    parts = [f"{human(s.host_cache_bytes)} of it in the host's memory"] if s.host_cache_bytes else []
    parts += [f"{human(s.sketch_bytes)} of it int8 sketches"] if s.sketch_bytes else []
    cache = f"cache {human(s.cache_bytes)}" + (f" ({', '.join(parts)})" if parts else "")
    lines += [f"memory      weights {human(s.weight_bytes)}, {cache}, peak {human(s.peak_bytes)}"]
    return "\n".join(lines)


def warn_beyond_training(files: ModelFiles, num_tokens: int) -> None:
    seen, trained = files.seen_tokens(num_tokens), files.config.trained_context
    if seen > trained:
        say(
            f"minirea: warning: {files.attention.mode} attention will see up to {seen:,} tokens at once, more than the "
            f"{trained:,} that this model was trained on: expect damaged text"
        )


def print_plan(files: ModelFiles, prompt_tokens: int, arguments: argparse.Namespace) -> int:
    """--dry-run: what the run would need, and an error if there is less."""
    from minirea.memory import available_bytes, human

    num_tokens, device = prompt_tokens + arguments.max_tokens, files.attention.device
    plan, free = files.plan(num_tokens), available_bytes(device)
    dtype = str(files.dtype).removeprefix("torch.")
    runs_on = f"{device.type}, {dtype}" + (f", {files.quantize} weights" if files.quantize else "")
    if arguments.json:
        sizes = {
            name: getattr(plan, name) for name in ("weights", "loading", "cache", "host_cache", "workspace", "peak")
        }
        record = {f"{name}_bytes": size for name, size in sizes.items()}
        record |= {"device": device.type, "dtype": dtype, "quantize": files.quantize}
        record |= {"prompt_tokens": prompt_tokens, "num_tokens": num_tokens}
        put(json.dumps(record | {"free_bytes": free}) + "\n")
    else:
        each = f"each of {files.gpus} x " if files.gpus > 1 and device.type != "cpu" else ""
        lines = (
            f"device      {each}{runs_on}, {files.attention.mode} attention, {files.attention.impl}",
            f"tokens      {prompt_tokens:,} in the prompt and {arguments.max_tokens:,} to generate",
            f"weights     {human(plan.weights)}, and {human(plan.loading)} more while they are loaded",
            f"cache       {human(plan.cache)}"
            + (f", and {human(plan.host_cache)} in the host's memory" if plan.host_cache else ""),
            f"workspace   {human(plan.workspace)}",
            f"at most     {human(plan.peak)}" + ("" if free is None else f" of {human(free)} that are free"),
        )
        put("\n".join(lines) + "\n")
    plan.check(device)
    return 0
