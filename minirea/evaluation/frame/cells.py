"""Cells: work on one context. A PromptCell asks questions about a context that is read once."""

from __future__ import annotations

import hashlib
import sys
import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from minirea.evaluation.frame.records import Place, Record

if TYPE_CHECKING:
    from minirea.api import LLM, Generation, Session
    from minirea.generate import Stats
    from minirea.sources import Source

QUICKLY_MADE: Final = 2**16  # tokens of a prompt that is made only to see whether its length has room for it


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

    @property
    def looks_inside(self) -> str:
        """What in it, a plural, needs more of the model than its answers, which several devices do not have; or ""."""
        return ""

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
        extra: goes into the record besides what the frame puts there.
        context: tokens of its own that stand between the prompt's context and `ids`.
        passage: the tokens of the context that hold the answer, where there are such.
    """

    ids: Sequence[int]
    expected: Sequence[str]
    score: Callable[[str], float]
    max_tokens: int
    stop: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    context: Sequence[int] = ()
    passage: Sequence[int] = ()


@dataclass(frozen=True)
class Prompt:
    """A context and the questions about it. A prompt that shares nothing has all of its tokens in its one question."""

    context: Sequence[int]
    questions: Sequence[Question]


@dataclass(frozen=True)
class PromptCell(Cell):
    """Questions to be answered greedily. What a prompt has in common with the one before it is read once.

    Args:
        build: makes the prompt, with one question for each place. Called when the cell is run, once.
        as_session: a question's context is read as a piece of its own, as a session that is asked a question later
            reads it, instead of as the beginning of one prompt.
        sources: so many passages that each answer used go into its record, and the rank of its question's passage.
    """

    build: Callable[[], Prompt]
    as_session: bool = field(default=False, kw_only=True)
    sources: int = field(default=0, kw_only=True)

    @property
    def looks_inside(self) -> str:
        return "sources" if self.sources else ""

    def run(self, llm: LLM, wanted: Sequence[int], progress: bool) -> Iterator[Record]:
        """The answers, each the same as if its whole prompt had been read from the beginning."""
        session = llm.session(self.tokens)  # refuses what does not fit before a prompt is made
        prompt = self.build()
        needed = max(len(prompt.context) + len(q.context) + len(q.ids) + q.max_tokens for q in prompt.questions)
        if needed != self.tokens:
            del session  # two of them may not fit
            session = llm.session(needed)
        reader = _Reader(llm, session, prompt, self.as_session, self.sources, progress)
        for index in wanted:
            question = prompt.questions[index]
            shared, context_seconds, out = reader.ask(index)
            ids = [*prompt.context, *question.context, *question.ids]
            yield {
                "prompt_sha256": sha256_of_ids(ids),
                "prompt_tokens": out.stats.prompt_tokens,
                "expected": list(question.expected),
                "answer": out.text,
                "score": float(question.score(out.text)),
                "finish_reason": out.finish_reason,
                **question.extra,
                **(_used(out.sources, ids, question.passage) if self.sources else {}),
                **_costs(out.stats, *shared, context_seconds),
            }


def prompt_cells(
    places: Iterable[tuple[Place, ...]], build: Callable[[Sequence[Place]], Prompt], **how: Any
) -> list[Cell]:
    """A cell for each group of places, which are of one length; the first group is of the shortest.

    `how` are further fields of PromptCell.

    Raises:
        InputError: from `build`, of the shortest prompt: lengths without room for it are to be known at once.
    """
    cells: list[Cell] = [PromptCell(group, int(group[0]["length"]), partial(build, group), **how) for group in places]
    if cells[0].tokens <= QUICKLY_MADE:
        build(cells[0].places)
    return cells


class _Reader:
    """Puts a prompt's questions to a session, which keeps what the next one begins with.

    A piece is what is read in one go: context and question, but for the last token, which is a step of its own; with
    `as_session` it is the context alone. Of the one before it a piece shares whole chunks that lie before the tail of
    both. Every piece is then cut into the chunks of one that is read alone, whose queries vote together. What is shared
    does not depend on which questions are asked.
    """

    def __init__(
        self, llm: LLM, session: Session, prompt: Prompt, as_session: bool, sources: int, progress: bool
    ) -> None:
        self.llm, self.session, self.prompt, self.as_session, self.progress = llm, session, prompt, as_session, progress
        self.sources = sources
        self._lengths = [len(self._piece(index)) for index in range(len(prompt.questions))]
        self._held: list[int] = []  # the piece that the session begins with
        self._read = 0, 0.0  # tokens that were read to be shared, and the seconds that this took

    def ask(self, index: int) -> tuple[tuple[int, float], float, Generation]:
        """The answer to a question.

        Returns:
            Tokens that it shares and the seconds that they took (0 if an earlier answer had read them), the seconds
            that the rest of the context took if that is a piece of its own, and the answer.
        """
        piece, question, session = self._piece(index), self.prompt.questions[index], self.session
        shared = self._shared(index, piece)
        held = shared
        if piece != self._held or shared < len(piece):
            common = common_prefix(self._held, piece)
            held = min(shared, self.llm.num_shared(common, [len(self._held), len(piece)]))
        session.rewind(held)
        if held < shared:
            to_follow = len(piece) - shared + (not self.as_session)  # the last token is not part of the piece
            self._read = shared, self._prefill(piece[held:shared], to_follow)
        seconds = self._prefill(piece[shared:]) if self.as_session else 0.0
        rest = question.ids if self.as_session else [*piece[shared:], *question.ids[-1:]]
        self._held = piece
        out = session.generate(
            rest, question.max_tokens, progress=self.progress, sources=self.sources, stop=question.stop
        )
        return (shared, self._read[1] if shared == self._read[0] else 0.0), seconds, out

    def _piece(self, index: int) -> list[int]:
        question = self.prompt.questions[index]
        return [*self.prompt.context, *question.context, *(() if self.as_session else question.ids[:-1])]

    def _shared(self, index: int, piece: list[int]) -> int:
        """Tokens of a piece that need not be read for it alone: of all pieces' context, or of the piece before."""
        of_all = self.llm.num_shared(len(self.prompt.context), self._lengths)
        if index == 0:
            return of_all
        before = self._piece(index - 1)
        if self.as_session and before == piece:  # one context, which is a piece, and another question
            return len(piece)
        return max(of_all, self.llm.num_shared(common_prefix(before, piece), [len(before), len(piece)]))

    def _prefill(self, ids: list[int], to_follow: int = 0) -> float:
        """Read tokens of a piece, `to_follow` of which come later; the seconds that it took."""
        started = time.perf_counter()
        if ids:
            self.session.prefill(ids, self.progress, to_follow)
            self.llm.synchronize()
        return time.perf_counter() - started


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # slices compare a hundred times faster than a loop over tokens
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def _costs(stats: Stats, shared: int, shared_seconds: float, context_seconds: float) -> Record:
    """What an answer took: the first `shared` tokens were there, from an earlier answer or read for all of them."""
    return {
        "shared_tokens": shared,
        "shared_seconds": round(shared_seconds, 4),
        "first_token_seconds": round(context_seconds + stats.time_to_first_token, 4),  # after the shared tokens
        "generated_tokens": stats.generated_tokens,
        "decode_seconds": round(stats.decode_seconds, 4),
        "scope": stats.scope,
        "weight_bytes": stats.weight_bytes,
        "cache_bytes": stats.cache_bytes,
        "peak_bytes": stats.peak_bytes,
    }


def _used(sources: Sequence[Source], ids: Sequence[int], passage: Sequence[int]) -> Record:
    """What an answer used, and the rank from 1 of the first source that overlaps `passage`; None if none does."""
    start = find_ids(passage, ids) if passage else None
    ranks = (
        rank
        for rank, s in enumerate(sources, 1)
        if start is not None and s.start < start + len(passage) and start < s.end
    )
    return {"sources": [[s.start, s.end, round(s.share, 4)] for s in sources], "source_rank": next(ranks, None)}


def find_ids(part: Sequence[int], ids: Sequence[int]) -> int | None:
    """Where `part` first stands in `ids`; None if it does not."""
    whole, wanted = array("I", ids), array("I", part)
    data, size, at = whole.tobytes(), whole.itemsize, -1
    while (at := data.find(wanted.tobytes(), at + 1)) >= 0:
        if at % size == 0:
            return at // size
    return None


def sha256_of_ids(ids: Iterable[int]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of token ids, each as 4 bytes, lowest first."""
    words = array("I", ids)
    if sys.byteorder == "big":
        words.byteswap()
    return hashlib.sha256(words.tobytes()).hexdigest()[:16]
