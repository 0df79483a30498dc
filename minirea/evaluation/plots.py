"""Pictures of any task whose records have a length: scores, and what they cost. Needles get a heat map by depth."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from minirea.evaluation.figures import length_axis, line_style, new_figure, save
from minirea.evaluation.task import Record, short_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANELS_IN_A_ROW: Final = 4


def heat_map(records: Sequence[Record], folder: Path, title: str) -> Path:
    """Mean score by length and depth, one panel for each attention mode, as heatmap.png."""
    modes = list(dict.fromkeys(r["attention"] for r in records))
    lengths = sorted({r["length"] for r in records})
    depths = sorted({r["depth"] for r in records})
    width, height = 1.4 + len(modes) * (0.9 + 0.5 * len(lengths)), 1.4 + 0.34 * max(6, len(depths))
    figure, axes = new_figure(1, len(modes), max(width, 5.0), height)
    figure.suptitle(f"{title}: answers that are right, in percent")
    for ax, mode in zip(axes[0], modes, strict=True):
        percent = [[_percent(records, mode, length, depth) for length in lengths] for depth in depths]
        image = ax.imshow([[float("nan") if p is None else p for p in row] for row in percent],
                          cmap="cividis", vmin=0, vmax=100, aspect="auto")  # fmt: skip
        ax.set_title(mode)
        ax.set_xlabel("length (tokens)")
        ax.set_xticks(range(len(lengths)), [short_length(length) for length in lengths])
        ax.set_yticks(range(len(depths)), [f"{100 * depth:.0f}%" for depth in depths])
        ax.set_xticks([x - 0.5 for x in range(1, len(lengths))], minor=True)
        ax.set_yticks([y - 0.5 for y in range(1, len(depths))], minor=True)
        ax.grid(which="minor", color="white", linewidth=1)
        ax.tick_params(which="minor", length=0)
        for y, row in enumerate(percent):
            for x, value in enumerate(row):
                text = "not run" if value is None else f"{value:.0f}"
                dark = value is not None and value < 55
                ax.text(x, y, text, ha="center", va="center", fontsize=6 if value is None else 8,
                        color="white" if dark else "black")  # fmt: skip
    axes[0][0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=axes[0], label="right answers (%)", aspect=30)
    return save(figure, folder / "heatmap.png")


def against_length(records: Sequence[Record], folder: Path, title: str) -> list[Path]:
    """score.png (a panel for each kind) and cost.png (speed and memory); what records do not hold is left out."""
    records = [r for r in records if "length" in r and "skipped" not in r]
    pictures = []
    if any(r["score"] is not None for r in records):
        pictures.append(_scores(records, folder / "score.png", title))
    if any("cache_bytes" in r for r in records):
        pictures.append(_costs([r for r in records if "cache_bytes" in r], folder / "cost.png", title))
    return pictures


def _scores(records: Sequence[Record], path: Path, title: str) -> Path:
    kinds = list(dict.fromkeys(r.get("kind", "") for r in records))
    columns = min(len(kinds), _PANELS_IN_A_ROW)
    rows = -(-len(kinds) // columns)
    figure, axes = new_figure(rows, columns, max(6.0, 3.3 * columns), 1.2 + 2.8 * rows)
    figure.suptitle(f"{title}: score against length")
    panels = [ax for row in axes for ax in row]
    for ax, kind in zip(panels, kinds, strict=False):
        of = [r for r in records if r.get("kind", "") == kind and r["score"] is not None]
        _lines(ax, of, lambda r: 100 * r["score"])
        ax.set_ylim(-4, 104)
        ax.set_ylabel("score (%)")
        ax.set_title(kind, fontsize=10)
    for ax in panels[len(kinds) :]:
        ax.set_axis_off()
    panels[0].legend(fontsize=9)
    return save(figure, path)


def _costs(records: Sequence[Record], path: Path, title: str) -> Path:
    """Speed of reading, time of an answer's token, and memory."""
    figure, axes = new_figure(1, 3, 12.0, 4.0)
    device = records[0]["settings"]["device"]
    machines = ", ".join(sorted({str(r.get("machine", device)) for r in records}))
    figure.suptitle(f"{title}: what it costs ({machines}; {records[0]['settings']['dtype']})")
    reading, decoding, memory = axes[0]
    _lines(reading, records, read_tokens_per_second)
    reading.set_title("reading the prompt")
    reading.set_ylabel("tokens per second")
    _lines(decoding, records, milliseconds_per_token)
    decoding.set_title("each token of an answer")
    decoding.set_ylabel("milliseconds")
    _lines(memory, records, lambda r: r["cache_bytes"] / 1e6)
    memory.set_title("KV cache; dotted: peak of the device" if device == "cuda" else "KV cache")
    if device == "cuda":
        _lines(memory, records, lambda r: r["peak_bytes"] / 1e6, dotted=True)
    memory.set_ylabel("MB")
    for ax in axes[0]:
        _log_axis(ax)
    reading.legend(fontsize=9)
    return save(figure, path)


def read_tokens_per_second(record: Record) -> float | None:
    """How fast the prompt was read: its shared part where that is most of it, otherwise all up to the first token."""
    if record["shared_tokens"] >= record["prompt_tokens"] / 2:
        return record["shared_tokens"] / record["shared_seconds"] if record["shared_seconds"] else None
    return record["prompt_tokens"] / record["first_token_seconds"] if not record["shared_tokens"] else None


def milliseconds_per_token(record: Record) -> float | None:
    """Of the tokens after an answer's first."""
    tokens = record["generated_tokens"] - 1
    return 1000 * record["decode_seconds"] / tokens if tokens > 0 else None


def _lines(ax: Axes, records: Iterable[Record], value_of: Callable[[Record], Any], dotted: bool = False) -> None:
    """A line for each attention mode: the mean over a length's records. Dotted ones have no place in the legend."""
    points: dict[str, dict[int, list[float]]] = {}
    for record in records:
        if (value := value_of(record)) is not None:
            points.setdefault(record["attention"], {}).setdefault(record["length"], []).append(value)
    for mode, of in points.items():
        lengths = sorted(of)
        means = [statistics.fmean(of[length]) for length in lengths]
        ax.plot(lengths, means, **line_style(mode) | ({"linestyle": ":"} if dotted else {"label": mode}))
    length_axis(ax, {length for of in points.values() for length in of}, "length (tokens)")


def _log_axis(ax: Axes) -> None:
    """A logarithmic y axis with plain numbers on it, some of them however narrow the range is."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.set_ylim(low / 1.15, high * 1.15)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _percent(records: Sequence[Record], mode: str, length: int, depth: float) -> float | None:
    """The mean score of a cell of the heat map; None where nothing was run."""
    cell = [r for r in records if (r["attention"], r["length"], r["depth"]) == (mode, length, depth)]
    scores = [r["score"] for r in cell if "skipped" not in r]
    return 100 * statistics.fmean(scores) if scores else None
