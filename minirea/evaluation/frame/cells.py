"""Cells: work on one context. A PromptCell asks questions about a context that is read once."""

from __future__ import annotations

import hashlib
import sys
import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minirea.evaluation.frame.records import Place, Record

if TYPE_CHECKING:
    from minirea.api import LLM
    from minirea.generate import Stats


@dataclass(frozen=True)
class Cell(ABC):
    """Work on one context, which gives one record for each of `places`.

    Args:
        places: where each record stands. Every place of a task is different from all others. "length" (tokens, int) and
            "kind" (row of the summary) are what the default summary and pictures group by; either may be absent.
        tokens: length of the context.
        modes: the attention modes that it applies to; None: all that the user asked for.
        fields: ReAttentionConfig fields that replace the user's for this cell (a sweep's), and
            allow_out_of_distribution where they need it. Name them in `places` too.
    """

    places: tuple[Place, ...]
    tokens: int
    modes: tuple[str, ...] | None = field(default=None, kw_only=True)
    fields: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    @abstractmethod
    def run(self, llm: LLM, wanted: Sequence[int], progress: bool) -> Iterator[Record]:
        """One record for each index in `wanted`, in that order; it is saved as soon as it is yielded.

        The runner adds the place, the attention mode and the settings, and turns a MemoryLimitError or torch's
        OutOfMemoryError into records that say `skipped`. A record needs `score` (float, higher is better, 1 is
        perfect; or None), everything else is up to the cell.
        """


@dataclass(frozen=True)
class Question:
    """What is asked after a context.

    Args:
        ids: the tokens that follow the context, at least one.
        expected: the right answers, as they go into the record.
        score: of an answer's text, 0 to 1.
        max_tokens: of the answer.
        stop: strings that end it.
        extra: goes into the record beside what the frame puts there.
    """

    ids: Sequence[int]
    expected: Sequence[str]
    score: Callable[[str], float]
    max_tokens: int
    stop: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """A context and the questions about it. A prompt that shares nothing has all of its tokens in its one question."""

    context: Sequence[int]
    questions: Sequence[Question]


@dataclass(frozen=True)
class PromptCell(Cell):
    """Questions to be answered greedily; the context that they share is read once.

    Args:
        build: makes the prompt, with one question for each place. Called when the cell is run, once.
    """

    build: Callable[[], Prompt]

    def run(self, llm: LLM, wanted: Sequence[int], progress: bool) -> Iterator[Record]:
        """The answers, each the same as if its whole prompt had been read from the beginning."""
        prompt = self.build()
        questions = [prompt.questions[index] for index in wanted]
        context = list(prompt.context)
        session = llm.session(len(context) + max(len(q.ids) + q.max_tokens for q in questions))
        # Whole steps of the context are shared. Its rest is read again with each question, so that the prompt is cut
        # into the same steps as one that is read alone: a step's queries vote together.
        shared = len(context) // llm.chunk_size * llm.chunk_size if llm.can_share_prefix else 0
        started = time.perf_counter()
        if shared:
            session.prefill(context[:shared], progress)
            llm.synchronize()
        shared_seconds = time.perf_counter() - started
        for question in questions:
            rest = [*context[shared:], *question.ids]
            out = session.generate(rest, question.max_tokens, progress=progress, stop=question.stop)
            session.rewind(shared)
            yield {
                "prompt_sha256": sha256_of_ids([*context, *question.ids]),
                "prompt_tokens": out.stats.prompt_tokens,
                "expected": list(question.expected),
                "answer": out.text,
                "score": float(question.score(out.text)),
                "finish_reason": out.finish_reason,
                **question.extra,
                **_costs(out.stats, shared, shared_seconds),
            }


def _costs(stats: Stats, shared: int, shared_seconds: float) -> Record:
    """What an answer took: the first `shared` tokens were read once for all questions, in `shared_seconds`."""
    return {
        "shared_tokens": shared,
        "shared_seconds": round(shared_seconds, 4),
        "first_token_seconds": round(stats.time_to_first_token, 4),  # after the shared tokens
        "generated_tokens": stats.generated_tokens,
        "decode_seconds": round(stats.decode_seconds, 4),
        "scope": stats.scope,
        "weight_bytes": stats.weight_bytes,
        "cache_bytes": stats.cache_bytes,
        "peak_bytes": stats.peak_bytes,
    }


def sha256_of_ids(ids: Iterable[int]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of token ids, each as 4 bytes, lowest first."""
    words = array("I", ids)
    if sys.byteorder == "big":
        words.byteswap()
    return hashlib.sha256(words.tobytes()).hexdigest()[:16]
