"""Where an answer came from: the passages of its context that its tokens looked at.

A row is what one query head of one layer looks for with one token. Its votes are the VOTES keys of its scope that get
most of its attention, each with that attention as its weight, times (1 - f) ** SHARPNESS, where f is the fraction of
the other observed rows of the same head that vote for the same key. A passage's share is its part of all votes that the
answer's rows cast on the context before the question.

So what every token looks at, such as an attention sink, counts for nothing, and what a token looks for counts in full.
Observed are the answer's tokens and the NEIGHBOURS tokens before them. Attention rather than the selection's scores
casts the votes, because it also says what the global and the local part were used for, and means the same in every
mode, and where a step attends to all tokens.

Shapes, besides the project's letters: W votes, A tokens of the answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from minirea.cache import KVCache
from minirea.isolation import isolated
from minirea.model import Model
from minirea.observer import Step, observed
from minirea.tokenizer import Tokenizer

VOTES: Final = 4  # of a row
SHARPNESS: Final = 4
NEIGHBOURS: Final = 32  # tokens before the answer
QUESTION: Final = 32  # the last tokens of a prompt, which ask and are no source; at most a quarter of it
SPAN: Final = 32  # tokens that are taken for a passage at once
_LONGEST: Final = 2 * SPAN  # of a passage, in tokens
_NEAR: Final = 8  # tokens between two spans that are one passage
_EDGE: Final = 0.02  # of a span's votes: what holds less at its ends is left out
_LEAST: Final = 0.001  # of all votes: less makes no passage
_WIDEN: Final = 32  # tokens to either side in which the sentence may begin or end


class Source(NamedTuple):
    """Tokens [start, end) of a context, the share of the answer's votes that fell on them, and their text."""

    start: int
    end: int
    share: float
    text: str


class Votes(NamedTuple):
    """What the rows of an answer looked at in [0, stop) of the context; W entries each.

    Attributes:
        token: index of the answer's token, from 0, int64.
        layer: int64.
        position: of the key in the context, int64.
        weight: float32, at most 1.
        stop: tokens of the context before the question.
    """

    token: Tensor
    layer: Tensor
    position: Tensor
    weight: Tensor
    stop: int


def question_start(piece_start: int, stop: int) -> int:
    """Where what asks begins: in the last tokens of the piece [piece_start, stop) from which the answer follows."""
    piece = stop - piece_start
    return stop - min(QUESTION, piece if piece_start else (piece + 3) // 4)


@isolated()
def look(model: Model, cache: KVCache, ids: Sequence[int], answer_start: int, stop: int) -> Votes:
    """Let a model look at the end of a context once more, and see where it looks.

    The tokens go through it in chunks of tail_chunk_size; the cache is as before afterwards.

    Args:
        cache: holds all of `ids`, but for the last one maybe.
        ids: the context with the answer, which is [answer_start, len(ids)).
        stop: votes count for keys before this one.
    """
    if stop <= 0 or answer_start >= len(ids):
        empty = torch.empty(0, dtype=torch.int64)
        return Votes(empty, empty, empty, torch.empty(0, dtype=torch.float32), max(0, stop))
    first = max(0, answer_start - 1 - NEIGHBOURS)
    observer = _Rows(model, stop)
    watched = observed(model, observer, horizon=answer_start)
    ids_T = torch.tensor(ids[first:-1], dtype=torch.long, device=model.device)
    before = answer_start - 1 - first
    with _written_over(cache, first):
        for part_T in (ids_T[:before], ids_T[before:]):
            for chunk_T in part_T.split(model.attention.config.tail_chunk_size) if len(part_T) else ():
                watched.forward(chunk_T, cache, answer_start)
    return observer.votes(num_rows=len(ids_T), query_start=answer_start - 1)


class _Rows:
    """Collects the votes of every row that is observed."""

    def __init__(self, model: Model, stop: int) -> None:
        self._heads = model.config.num_heads
        self._stop = stop
        self._entries: list[Tensor] = []  # int64 [4, W]: query, layer, head, position
        self._weights: list[Tensor] = []

    def __call__(self, step: Step) -> None:
        T = len(step.q_THD)
        for group, scope in enumerate(step.scopes()):
            visible = scope[: int(torch.searchsorted(scope, self._stop))]
            weight_TRS = step.weights(group, scope)[..., : len(visible)]
            weight_TRK, row_TRK = weight_TRS.topk(min(VOTES, len(visible)))
            R = weight_TRK.shape[1]
            query_TRK = torch.arange(step.seq_len - T, step.seq_len)[:, None, None].expand(weight_TRK.shape)
            head_TRK = torch.arange(group * R, (group + 1) * R)[:, None].expand(weight_TRK.shape)
            position_TRK = visible[row_TRK].cpu()
            layer_TRK = torch.full_like(position_TRK, step.layer)
            entry = torch.stack([query_TRK, layer_TRK, head_TRK, position_TRK]).flatten(1)
            weight = weight_TRK.flatten().cpu()
            self._entries.append(entry[:, weight > 0])
            self._weights.append(weight[weight > 0])

    def votes(self, num_rows: int, query_start: int) -> Votes:
        """The answer's votes, discounted; its first row is that of the token at `query_start`, which asks for it."""
        query, layer, head, position = torch.cat(self._entries, 1)
        weight = torch.cat(self._weights)
        key = (layer * self._heads + head) * self._stop + position
        _, index, count = key.unique(return_inverse=True, return_counts=True)  # a row votes once for a key
        weight = weight * (1 - (count[index] - 1).float() / max(1, num_rows - 1)) ** SHARPNESS
        kept = (query >= query_start) & (weight > 0)
        return Votes(query[kept] - query_start, layer[kept], position[kept], weight[kept], self._stop)


@contextlib.contextmanager
def _written_over(cache: KVCache, start: int) -> Iterator[None]:
    """Within it the tokens from `start` on are to be read again; afterwards they are what they were, to the bit."""
    seq_len = cache.seq_len
    kept = [tensor[..., start:seq_len, :].clone() for tensor in cache.tensors]
    winners, marks = cache.winners.clone(), cache.marks
    try:
        cache.rewind(start)
        yield
    finally:
        for tensor, old in zip(cache.tensors, kept, strict=True):
            tensor[..., start : start + old.shape[-2], :] = old
        cache.winners.copy_(winners)
        cache.filled(seq_len)
        cache.marks = marks


def passages(votes: Votes, most: int) -> list[tuple[int, int, float]]:
    """The `most` passages with the largest shares as (start, end, share), best first; they do not overlap.

    Again and again the SPAN tokens that hold most of the votes that are left become a passage, or part of a near one.
    """
    position, index = votes.position.unique(return_inverse=True)
    weight = torch.zeros(len(position), dtype=torch.float64).index_add_(0, index, votes.weight.double())
    total = float(weight.sum())
    found: list[list[float]] = []
    for _ in range(4 * most):
        sums = torch.nn.functional.pad(weight.cumsum(0), (1, 0))
        span_sums = sums[torch.searchsorted(position, position + SPAN)] - sums[:-1]
        best = int(span_sums.argmax()) if len(span_sums) else 0
        if not len(span_sums) or float(span_sums[best]) <= _LEAST * total:
            break
        inside = (position >= position[best]) & (position < position[best] + SPAN)
        share = float(span_sums[best]) / total
        core = position[inside & (weight > _EDGE * span_sums[best])]
        weight = weight.masked_fill(inside, 0)
        start, end = int(core[0]), int(core[-1]) + 1
        near = next((p for p in found if _is_near(p, start, end)), None)
        if near is not None:
            near[:] = min(near[0], start), max(near[1], end), near[2] + share
        elif len(found) < most:
            found.append([start, end, share])
    found.sort(key=lambda p: (-p[2], p[0]))
    return [(int(start), int(end), share) for start, end, share in found]


def _is_near(passage: list[float], start: int, end: int) -> bool:
    """Whether a span and a passage are neighbours, and together no longer than a passage may be."""
    apart = max(start - passage[1], passage[0] - end)
    return apart <= _NEAR and max(passage[1], end) - min(passage[0], start) <= _LONGEST


@isolated()
def sources_of(votes: Votes, ids: Sequence[int], most: int, tokenizer: Tokenizer | None) -> list[Source]:
    """The `most` best passages as sources, widened to the sentence where its ends are near.

    Args:
        tokenizer: without one, ranges are as the votes have them and texts are empty.
    """
    found = passages(votes, most)
    if tokenizer is None:
        return [Source(start, end, share, "") for start, end, share in found]
    sources: list[Source] = []
    taken = sorted((start, end) for start, end, _ in found)
    for start, end, share in found:
        at = taken.index((start, end))
        lowest = taken[at - 1][1] if at else 0
        highest = taken[at + 1][0] if at + 1 < len(taken) else votes.stop
        taken[at] = start, end = _widened(ids, start, end, lowest, highest, tokenizer)
        sources.append(Source(start, end, share, text_of(ids, start, end, tokenizer)))
    return sources


def _widened(
    ids: Sequence[int], start: int, end: int, lowest: int, highest: int, tokenizer: Tokenizer
) -> tuple[int, int]:
    """[start, end) with the rest of its sentence, or else of its first and last word, within [lowest, highest)."""
    first, last = max(lowest, start - _WIDEN), min(highest, end + _WIDEN)
    around = max(0, first - 1), min(len(ids), last + 1)
    piece = dict(zip(range(*around), token_texts(ids[around[0] : around[1]], tokenizer), strict=True))

    def between(at: int, ends: str) -> bool:
        """Whether something that `ends` stops before the token `at`."""
        before, after = piece.get(at - 1, ""), piece.get(at, "")
        if at == 0 or before.endswith("\n") or after.startswith("\n"):
            return True
        apart = after[:1].isspace() or before[-1:].isspace()
        return apart and (not ends or before.rstrip().rstrip("'\")\u201d\u2019")[-1:] in tuple(ends))

    starts, stops = range(start, first - 1, -1), range(end, last + 1)
    for ends in (".!?", ""):
        begun = next((at for at in starts if between(at, ends)), None)
        if begun is not None:
            break
    for ends in (".!?", ""):
        ended = next((at for at in stops if between(at, ends)), None)
        if ended is not None:
            break
    return start if begun is None else begun, end if ended is None else ended


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """What each token adds to the text; a character of several tokens counts for the last of them."""
    stream = tokenizer.stream(continues=True)
    return [stream.put(token_id) for token_id in ids]


def text_of(ids: Sequence[int], start: int, end: int, tokenizer: Tokenizer) -> str:
    """The text of tokens [start, end), without what the first one's spelling adds in front."""
    stream = tokenizer.stream(continues=bool(start))
    return ("".join(stream.put(token_id) for token_id in ids[start:end]) + stream.flush()).strip()


def as_records(
    sources: Sequence[Source], prompt: str, ids: Sequence[int], tokenizer: Tokenizer
) -> list[dict[str, object]]:
    """Sources as JSON has them, with the `line` of the prompt's text in which each begins, or None."""
    return [source._asdict() | {"line": line_of(prompt, ids, source, tokenizer)} for source in sources]


def line_of(prompt: str, ids: Sequence[int], source: Source, tokenizer: Tokenizer) -> int | None:
    """The line of a prompt, from 1, in which the text of a source begins; None if it is not there as it stands.

    A chat template or the tokenizer may have changed what is around it. Of several places the one nearest to where
    decoding the tokens puts it counts.
    """
    if not source.text:
        return None
    first, last = prompt.find(source.text), prompt.rfind(source.text)
    if first < last:
        before = len(text_of(ids, 0, source.start, tokenizer))
        earlier = prompt.rfind(source.text, 0, before + len(source.text))
        places = earlier if earlier >= 0 else first, prompt.find(source.text, before)
        first = min((place for place in places if place >= 0), key=lambda place: abs(place - before))
    return prompt.count("\n", 0, first) + 1 if first >= 0 else None
