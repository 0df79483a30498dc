"""One HTML page that stands by itself: the answer, its sources, and the prompt shaded by how much it was used."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import jinja2
import torch

from minirea.sources import Votes, token_texts
from minirea.tokenizer import Tokenizer

_WHOLE: Final = 6000  # tokens of a prompt that is shown with all of its text
_CONTEXT: Final = 80  # tokens to either side of what was used
_MOST_PARTS: Final = 60  # excerpts of a longer prompt
_LEAST: Final = 0.002  # of the votes, for a place of its own in the excerpts
_PART: Final = 64  # tokens that are looked at together for that
# What a browser would not show, or would obey: control characters, and those that turn the direction of writing.
_INVISIBLE: Final = {
    code: f"\\u{code:04x}"
    for code in (*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}


class Excerpt(NamedTuple):
    """Tokens [start, start + len(tokens)) of the prompt; `skipped` tokens before them are not shown."""

    start: int
    skipped: int
    tokens: list[tuple[int, str]]


def render(
    model: str,
    ids: Sequence[int],
    answer_start: int,
    votes: Votes,
    sources: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
) -> str:
    """The page.

    Args:
        ids: the context with the answer, which is [answer_start, len(ids)).
        sources: start, end, share, line and text of each.
    """
    folder = Path(__file__).parent
    script = (folder / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = shown_parts(votes, answer_start, sources)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    answer = [_visible(text) or "\u2022" for text in token_texts(ids[answer_start:], tokenizer)]
    return environment.from_string((folder / "page.html").read_text(encoding="utf-8")).render(
        model=_visible(model),
        num_tokens=answer_start,
        answer=answer,
        sources=[dict(source) | {"text": _visible(source["text"])} for source in sources],
        excerpts=_excerpts(parts, ids, tokenizer),
        skipped=answer_start - (parts[-1][1] if parts else 0),
        style=(folder / "page.css").read_text(encoding="utf-8"),
        script=script,
        digest=digest,
        data=_as_json(_data(votes, len(answer), answer_start)),
    )


def shown_parts(votes: Votes, num_tokens: int, sources: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Ranges of the prompt that the page shows, ascending and apart: all of a short one.

    Of a long one: the sources and the places that got most of the other votes, each with what is around it, the
    beginning, and the question at the end.
    """
    if num_tokens <= _WHOLE:
        return [(0, num_tokens)] if num_tokens else []
    part, index = (votes.position // _PART).unique(return_inverse=True)
    weight = torch.zeros(len(part), dtype=torch.float64).index_add_(0, index, votes.weight.double())
    order = weight.argsort(descending=True, stable=True)[:_MOST_PARTS]
    used = [int(part[i]) * _PART for i in order if weight[i] > _LEAST * weight.sum()]
    wanted = [(0, _CONTEXT), (max(0, votes.stop - _CONTEXT), num_tokens)]
    wanted += [(source["start"] - _CONTEXT, source["end"] + _CONTEXT) for source in sources]
    wanted += [(start - _CONTEXT, start + _PART + _CONTEXT) for start in used]
    shown: list[tuple[int, int]] = []
    for start, end in sorted((max(0, start), min(num_tokens, end)) for start, end in wanted):
        if shown and start <= shown[-1][1]:
            shown[-1] = shown[-1][0], max(shown[-1][1], end)
        else:
            shown.append((start, end))
    return shown


def _excerpts(parts: Sequence[tuple[int, int]], ids: Sequence[int], tokenizer: Tokenizer) -> list[Excerpt]:
    excerpts, shown = [], 0
    for start, end in parts:
        texts = [_visible(text) for text in token_texts(ids[start:end], tokenizer)]
        excerpts.append(Excerpt(start, start - shown, list(enumerate(texts, start))))
        shown = end
    return excerpts


def _data(votes: Votes, num_answer: int, num_tokens: int) -> dict[str, Any]:
    """What the script needs: for each token of the answer, positions and how much each was used, as shares of all."""
    total = float(votes.weight.sum()) or 1.0
    used: list[tuple[list[int], list[float]]] = []
    for token in range(num_answer):
        own = votes.token == token
        position, index = votes.position[own].unique(return_inverse=True)
        weight = torch.zeros(len(position), dtype=torch.float64).index_add_(0, index, votes.weight[own].double())
        used.append((position.tolist(), [float(f"{w / total:.3g}") for w in weight.tolist()]))
    return {"tokens": num_tokens, "used": used}


def _as_json(value: Any) -> str:
    """JSON that can stand in a script element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _visible(text: str) -> str:
    return text.translate(_INVISIBLE)
