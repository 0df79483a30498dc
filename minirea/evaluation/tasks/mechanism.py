"""Why ReAttention works, or where it does not: studies of what a model's attention does with a long prompt.

- overlap: do q . k without RoPE choose the keys that attention with RoPE would look at?
- spread: do positions stay in the range that the model knows, and does attention stay as concentrated?
- sweep: what is each size of the scope good for? The score of the task `needle` under each setting.
- cost: what does each of these settings cost? The time of reading a prompt and of a token.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

from minirea.evaluation.frame.cells import Cell, sha256_of_ids
from minirea.evaluation.frame.records import Place, Record
from minirea.evaluation.frame.tasks import Task, option, parse_path, require, rng
from minirea.evaluation.lengths import grid
from minirea.evaluation.tasks import mechanism_plots, mechanism_summary
from minirea.evaluation.tasks.needle import MOST_DEPTHS, Needle
from minirea.evaluation.text.encoder import Encoder
from minirea.evaluation.text.haystack import read_haystack
from minirea.evaluation.text.windows import radical_inverse

if TYPE_CHECKING:
    from minirea.api import LLM
    from minirea.tokenizer import Tokenizer

STUDIES: Final = ("overlap", "spread", "sweep", "cost")
# Small enough for every model with a trained context of 2,048 tokens or more.
SWEEPS: Final = (
    "span_size=2,8,32,64",
    "span_top_k=0,1,2,4,8",
    "max_spans=1,2,4,8,16,31",
    "local_size=64,128,256,512,1024",
    "chunk_size=32,128,512",
    "span_scope=layer,kv_head",
)
_SIZES: Final = (
    *("global_size", "local_size", "span_top_k", "span_size", "max_spans", "chunk_size"),
    *("tail_size", "tail_chunk_size", "dense_size"),
)
_TEXT_STEPS: Final = 16  # tokens at the end of running text that are observed
_TIMED_TOKENS: Final = 32
_TIMED_RUNS: Final = 3


def parse_sweep(text: str) -> str:
    """Check "span_size=8,32,64"; raises ValueError."""
    try:
        settings(text)
    except ValueError:
        raise ValueError(f"FIELD=VALUE,VALUE with a field of {', '.join(_SIZES)} or span_scope") from None
    return text


def settings(sweep: str) -> list[tuple[str, int | str]]:
    """Field and value of each setting of a sweep."""
    name, _, values = sweep.partition("=")
    field = name.replace("-", "_")
    if field == "span_scope" and values:
        return [(field, value) for value in values.split(",")]
    if field not in _SIZES:
        raise ValueError
    return [(field, int(value)) for value in values.split(",")]


@dataclass(frozen=True)
class Watched:
    """A prompt of which the last `steps` tokens are to be observed as decode steps."""

    ids: list[int]
    steps: int


class _Prompt(NamedTuple):
    """What is read: its length, which of the samples of this length it is, and what makes it."""

    length: int
    sample: int
    build: Callable[[], Watched]


@dataclass(frozen=True)
class WatchedCell(Cell):
    """One record about a prompt, from inside the model."""

    build: Callable[[], Watched]

    @property
    def looks_inside(self) -> str:
        return "studies of attention"


class OverlapCell(WatchedCell):
    """For each layer and head, what the selection has in common with attention."""

    def run(self, llm: LLM, wanted: Sequence[int], progress: bool) -> Iterator[Record]:  # noqa: ARG002  one place
        from minirea.evaluation.tasks.mechanism_measures import Overlap
        from minirea.evaluation.tasks.observe import observe_end

        prompt = self.build()
        config = llm.model.attention.config
        needed = config.global_size + config.local_size + prompt.steps + 1
        if len(prompt.ids) < needed or not config.span_top_k:
            reason = f"nothing is selected from {len(prompt.ids)} tokens, expected at least {needed} and a span_top_k"
            yield {"score": None, "skipped": reason}
            return
        overlap = Overlap(llm.model.config)
        observe_end(llm.model, prompt.ids, prompt.steps, overlap, progress)
        head = {"prompt_sha256": sha256_of_ids(prompt.ids), "score": None, "steps": prompt.steps}
        yield head | {"chance": overlap.chance, "per_head": overlap.per_head}


class SpreadCell(WatchedCell):
    """The positions that keys got, and for each layer and head the entropy of attention."""

    def run(self, llm: LLM, wanted: Sequence[int], progress: bool) -> Iterator[Record]:  # noqa: ARG002  one place
        from minirea.evaluation.tasks.mechanism_measures import Spread
        from minirea.evaluation.tasks.observe import observe_end

        prompt, model = self.build(), llm.model
        spread = Spread(model.config)
        observe_end(model, prompt.ids, prompt.steps, spread, progress)
        yield {
            "prompt_sha256": sha256_of_ids(prompt.ids),
            "score": None,
            "steps": prompt.steps,
            "trained_context": model.config.trained_context,
            "bound": None if model.attention.mode == "full" else model.attention.config.max_scope,
            "highest_position": spread.highest_position,
            "widest_scope": spread.widest_scope,
            "entropy": spread.entropy,
        }


@dataclass(frozen=True)
class CostCell(Cell):
    """One record: the time to the first token, and the median time of a token after it; the best of some runs."""

    build: Callable[[], Watched]

    def run(self, llm: LLM, wanted: Sequence[int], progress: bool) -> Iterator[Record]:  # noqa: ARG002  one place
        ids = self.build().ids
        runs = [_timed(llm, ids, progress) for _ in range(_TIMED_RUNS)]  # the first one compiles
        prefill_seconds, token_seconds = map(min, zip(*runs, strict=True))
        yield {
            "prompt_sha256": sha256_of_ids(ids),
            "score": None,
            "prompt_tokens": len(ids),
            "prefill_seconds": prefill_seconds,
            "token_seconds": token_seconds,
        }


def _timed(llm: LLM, ids: list[int], progress: bool) -> tuple[float, float]:
    """Seconds to the first token, and of a later one: the median, since an early one waits for a graph's capture."""
    times = [time.perf_counter()]
    for _ in llm.stream(ids, _TIMED_TOKENS, progress=progress, ignore_eos=True):
        times.append(time.perf_counter())  # noqa: PERF401  each when it comes
    first, *later = [stop - start for start, stop in itertools.pairwise(times)]
    return first, statistics.median(later)


@dataclass(frozen=True, kw_only=True)
class Mechanism(Task):
    """Studies of attention itself. Prompts are running text, or haystacks with a needle and its question and answer."""

    name: ClassVar[str] = "mechanism"
    about: ClassVar[str] = "what is selected and why: overlap with attention, entropy, positions, sweeps of the sizes"
    SCORED: ClassVar[bool] = False
    GROWS: ClassVar[tuple[str, ...]] = (*Task.GROWS, "studies", "sweep")

    samples: int = option(3, "prompts of each length", metavar="N", parse=int)
    studies: tuple[str, ...] = option(
        STUDIES, f"of {', '.join(STUDIES)}", metavar="NAME,NAME", many="comma", choices=STUDIES
    )
    sweep: tuple[str, ...] = option(
        SWEEPS, "settings for sweep and cost", metavar="FIELD=X,X", parse=parse_sweep, many="list"
    )
    depths: int = option(10, "needles in each haystack of a sweep, at evenly spread depths", metavar="N", parse=int)
    text: tuple[Path, ...] = option(
        (), "UTF-8 text to read (default: generated text)", metavar="FILE", parse=parse_path, many="list"
    )

    def check(self) -> None:
        super().check()
        require("studies", self.studies, bool(self.studies), f"some of {', '.join(STUDIES)}")
        require("depths", self.depths, 1 <= self.depths <= MOST_DEPTHS, f"1 to {MOST_DEPTHS:,}")
        self.check_answers(3 + (self.depths + 1) * len(self._settings()))
        require("lengths", self.lengths, min(self.lengths) >= 256, "lengths of at least 256 tokens")

    def cells(self, tokenizer: Tokenizer) -> list[Cell]:
        studies: dict[str, Callable[[Tokenizer, list[_Prompt]], Iterator[Cell]]] = {
            "overlap": self._overlap,
            "spread": self._spread,
            "sweep": self._sweep,
            "cost": self._cost,
        }
        texts = self._texts(Encoder(tokenizer))
        cells = [cell for study in STUDIES if study in self.studies for cell in studies[study](tokenizer, texts)]
        return sorted(cells, key=lambda cell: cell.tokens)

    def _overlap(self, tokenizer: Tokenizer, texts: list[_Prompt]) -> Iterator[Cell]:
        for kind, prompts in (("needle", self._questions(tokenizer)), ("text", texts)):
            for prompt in prompts:
                place: Place = {"study": "overlap", "kind": kind, "length": prompt.length, "sample": prompt.sample}
                yield OverlapCell((place,), prompt.length, prompt.build, modes=("reattention", "full"))

    def _spread(self, _: Tokenizer, texts: list[_Prompt]) -> Iterator[Cell]:
        for prompt in texts:
            place: Place = {"study": "spread", "length": prompt.length, "sample": prompt.sample}
            yield SpreadCell((place,), prompt.length, prompt.build)

    def _sweep(self, tokenizer: Tokenizer, _: list[_Prompt]) -> Iterator[Cell]:
        for cell in self._needle(samples=self.samples, depths=self.depths).cells(tokenizer):
            for field, value in self._settings():
                places = tuple({"study": "sweep", "field": field, "value": value, **place} for place in cell.places)
                yield replace(cell, places=places, modes=("reattention",), fields={field: value})

    def _cost(self, _: Tokenizer, texts: list[_Prompt]) -> Iterator[Cell]:
        for prompt in texts:
            for field, value in self._settings() if prompt.sample == 0 else ():
                place: Place = {"study": "cost", "field": field, "value": value, "length": prompt.length}
                yield CostCell((place,), prompt.length, prompt.build, modes=("reattention",), fields={field: value})

    def _settings(self) -> list[tuple[str, int | str]]:
        return [setting for sweep in self.sweep for setting in settings(sweep)]

    def _needle(self, **options: Any) -> Needle:
        return Needle(lengths=self.lengths, seed=self.seed, haystack=self.text, **options)

    def _texts(self, encode: Encoder) -> list[_Prompt]:
        """Running text."""
        haystack = read_haystack(self.text, encode)

        def build(length: int, sample: int) -> Watched:
            stretch = haystack.stretch(rng(self.seed, self.name, length, sample), length - len(encode.beginning))
            return Watched([*encode.beginning, *stretch.ids], _TEXT_STEPS)

        places = grid(self.lengths, self.samples)
        return [_Prompt(length, sample, partial(build, length, sample)) for length, sample in places]

    def _questions(self, tokenizer: Tokenizer) -> list[_Prompt]:
        """Needles at spread depths, one in each haystack; observed are the steps that give the answer's tokens."""
        encode, needle = Encoder(tokenizer), self._needle(separate=True)
        haystack = read_haystack(self.text, encode)

        def build(length: int, sample: int) -> Watched:
            place: Place = {"length": length, "depth": radical_inverse(sample + 1), "sample": sample}
            question = needle.copies(haystack, encode, [place]).questions[0]
            answer = encode(f" {question.expected[0]}")
            return Watched([*question.context, *question.ids, *answer[:-1]], len(answer))

        places = grid(self.lengths, self.samples)
        return [_Prompt(length, sample, partial(build, length, sample)) for length, sample in places]

    def summarize(self, records: Sequence[Record]) -> list[Record]:
        return mechanism_summary.summarize(records)

    def table(self, rows: Sequence[Record]) -> list[list[str]]:
        return mechanism_summary.table(rows)

    def plot(self, records: Sequence[Record], folder: Path, about: Mapping[str, Any]) -> list[Path]:
        return mechanism_plots.draw(records, folder, about)
