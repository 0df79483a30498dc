"""Perplexity against position: does a model read the end of a long text as well as its beginning?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from minirea.evaluation.frame.cells import Cell, sha256_of_ids
from minirea.evaluation.frame.records import Record
from minirea.evaluation.frame.tasks import Task, option, parse_path, require
from minirea.evaluation.lengths import parse_length, short_length
from minirea.evaluation.tasks.perplexity_plots import against_position
from minirea.evaluation.text.windows import Text, read_texts, token_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from minirea.api import LLM
    from minirea.tokenizer import Tokenizer

LOG: Final = "log"
_FIRST_BUCKET: Final = 128  # tokens; a text's first words are too few to say more about


def parse_buckets(text: str) -> str | int:
    """ "log", or the number of tokens in each bucket."""
    return LOG if text == LOG else parse_length(text)


def bucket_edges(length: int, buckets: str | int) -> list[int]:
    """Positions at which buckets begin, and `length`, where the last one ends.

    "log" doubles: 0, 128, 256, 512, ... A number makes all buckets so wide.
    """
    if isinstance(buckets, int):
        return [*range(0, length, buckets), length]
    edges, edge = [0], _FIRST_BUCKET
    while edge < length:
        edges.append(edge)
        edge *= 2
    return [*edges, length]


@dataclass(frozen=True)
class WindowCell(Cell):
    """One stretch of text, read once from its beginning; its record holds sums over buckets of positions."""

    text: Text
    buckets: str | int
    baseline: bool

    @property
    def looks_inside(self) -> str:
        return "evaluations of perplexity"

    def run(self, llm: LLM, wanted: Sequence[int], progress: bool) -> Iterator[Record]:
        from minirea.evaluation.tasks.likelihood import nlls_in_range, token_nlls

        sample = self.places[wanted[0]]["sample"]
        assert isinstance(sample, int)
        ids = self.text.window(sample, self.tokens)
        context = llm.model.config.trained_context
        nll_T = token_nlls(llm, ids, progress)
        # Within the trained range the two readings are one.
        in_range_T = nlls_in_range(llm, ids, context, len(self.text.beginning)) if self.baseline else None
        sizes = token_bytes(llm.tokenizer, ids)
        edges = bucket_edges(self.tokens, self.buckets)
        yield {
            "prompt_sha256": sha256_of_ids(ids),
            "score": None,
            "trained_context": context,
            "buckets": [
                {
                    "from": start,
                    "to": stop,
                    "tokens": stop - max(start, 1),
                    "bytes": sum(sizes[max(start, 1) : stop]),
                    "nll": _sum(nll_T, start, stop),
                    "nll_in_range": None if in_range_T is None else _sum(in_range_T, start, stop),
                }
                for start, stop in itertools.pairwise(edges)
            ],
        }


def _sum(nll_T: Tensor, start: int, stop: int) -> float:
    """Nats of the tokens at positions start..stop-1; the one at position 0 has nothing before it and is left out."""
    return nll_T[max(start - 1, 0) : stop - 1].double().sum().item()


@dataclass(frozen=True, kw_only=True)
class Perplexity(Task):
    """Negative log-likelihood of running text, token by token, in buckets of positions.

    Every bucket also tells what the same tokens cost where the model is read anew at least every half of its trained
    context. One stretch of text is harder than another; the difference of the two readings is not about the text.
    """

    name: ClassVar[str] = "perplexity"
    about: ClassVar[str] = "how well running text is predicted, against position, in nats per token and per byte"
    SCORED: ClassVar[bool] = False

    lengths: tuple[int, ...] = option(
        (16384,), "tokens read in one go", metavar="N,N", parse=parse_length, many="comma"
    )
    samples: int = option(2, "stretches of each text, spread over it", metavar="N", parse=int)
    text: tuple[Path, ...] = option(
        (),
        "UTF-8 text files that the model has not been trained on",
        metavar="FILE",
        parse=parse_path,
        many="list",
        required=True,
    )
    buckets: str | int = option(
        LOG, "width of the buckets of positions in tokens, or log: 128, then doubling", metavar="N", parse=parse_buckets
    )
    no_baseline: bool = option(False, "do not read the same tokens in pieces of the trained context as well")

    def check(self) -> None:
        super().check()
        require("text", self.text, bool(self.text), "at least one file")
        require("lengths", self.lengths, min(self.lengths) >= 2, "lengths of at least 2 tokens")
        valid = self.buckets == LOG or (isinstance(self.buckets, int) and self.buckets >= 2)
        require("buckets", self.buckets, valid, "log, or at least 2 tokens")
        self.check_answers(len(self.text))

    def cells(self, tokenizer: Tokenizer) -> Sequence[Cell]:
        texts = read_texts(self.text, tokenizer, max(self.lengths))
        return [
            WindowCell(
                ({"kind": text.name, "length": length, "sample": sample},),
                length,
                text=text,
                buckets=self.buckets,
                baseline=not self.no_baseline,
            )
            for length in sorted(set(self.lengths))
            for text in texts
            for sample in range(self.samples)
        ]

    def summarize(self, records: Sequence[Record]) -> list[Record]:
        """Rows of attention, length and bucket, all texts and samples together; where all were skipped, one row."""
        groups: dict[tuple[str, int], list[Record]] = {}
        for record in records:
            groups.setdefault((record["attention"], record["length"]), []).append(record)
        rows: list[Record] = []
        for (attention, length), members in groups.items():
            head = {"attention": attention, "length": length, "skipped": sum("skipped" in r for r in members)}
            windows = [record["buckets"] for record in members if "skipped" not in record]
            joined = [_joined(buckets) for buckets in zip(*windows, strict=True)]
            rows += [head | bucket for bucket in joined or [{}]]
        return rows

    def table(self, rows: Sequence[Record]) -> list[list[str]]:
        """Nats per token and per byte, and the change against the trained range, by position."""
        starts = sorted({row["from"] for row in rows if "from" in row})
        lines: dict[tuple[str, int, str], dict[int, str]] = {}
        for row in rows:
            for title, key, form in _SHOWN if "from" in row else ():
                if row[key] is not None:
                    place = row["attention"], row["length"], title
                    lines.setdefault(place, {})[row["from"]] = form.format(row[key])
            if "from" not in row:
                lines[row["attention"], row["length"], "skipped"] = {}
        heads = ["attention", "length", "from position"]
        body = [
            [attention, short_length(length), title, *(line.get(start, "-") for start in starts)]
            for (attention, length, title), line in lines.items()
        ]
        return [[*heads, *(short_length(start) if start else "0" for start in starts)], *body]

    def plot(self, records: Sequence[Record], folder: Path, about: Mapping[str, Any]) -> list[Path]:
        whole = [record for record in records if "skipped" not in record]
        return [against_position(whole, folder / "perplexity.png", about)] if whole else []


_SHOWN: Final = (
    ("nats/token", "nll_per_token", "{:.3f}"),
    ("nats/byte", "nll_per_byte", "{:.3f}"),
    ("vs in range", "change", "{:+z.1%}"),
)


def _joined(buckets: Sequence[Record]) -> Record:
    """One bucket of several windows, and what follows from the sums."""
    tokens, size, nll = (sum(bucket[name] for bucket in buckets) for name in ("tokens", "bytes", "nll"))
    compared = all(bucket["nll_in_range"] is not None for bucket in buckets)
    in_range = sum(bucket["nll_in_range"] for bucket in buckets) if compared else None
    return {
        "from": buckets[0]["from"],
        "to": buckets[0]["to"],
        "windows": len(buckets),
        "tokens": tokens,
        "bytes": size,
        "nll_per_token": nll / tokens,
        "nll_per_byte": nll / size if size else None,
        "perplexity": math.exp(min(nll / tokens, 700)),  # a broken model's would overflow
        "in_range_per_token": in_range / tokens if in_range is not None else None,
        "change": nll / in_range - 1 if in_range else None,
    }
