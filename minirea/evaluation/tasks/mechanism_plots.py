"""Pictures of the mechanism studies, drawn from their records."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from minirea.evaluation.frame.plots import (
    heading,
    length_axis,
    line_style,
    log_axis,
    mark_trained,
    new_figure,
    percent_grid,
    save,
)
from minirea.evaluation.frame.records import Record
from minirea.evaluation.lengths import short_length
from minirea.evaluation.tasks.mechanism_summary import Numbers, mean, mean_per_head, summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_NUMBERS: Final = 64  # heat maps of more heads show colours only
_LENGTH_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def draw(records: Sequence[Record], folder: Path, about: Mapping[str, Any]) -> list[Path]:
    """A picture of each study that has records."""
    whole = [record for record in records if "skipped" not in record]
    of = {study: [r for r in whole if r["study"] == study] for study in ("overlap", "spread", "sweep", "cost")}
    paths = []
    for kind in sorted({r["kind"] for r in of["overlap"]}):
        for attention in sorted({r["attention"] for r in of["overlap"]}):
            chosen = [r for r in of["overlap"] if (r["kind"], r["attention"]) == (kind, attention)]
            if chosen:
                paths.append(overlap(chosen, folder / f"overlap-{kind}-{attention}.png", about))
    if of["spread"]:
        paths.append(spread(of["spread"], folder / "spread.png", about))
    if of["sweep"] or of["cost"]:
        paths.append(sweeps(of["sweep"], of["cost"], folder / "sweep.png", about))
    return paths


# ---------------------------------------------------------------------------------------------------------------
# Overlap
# ---------------------------------------------------------------------------------------------------------------
def _ratio(records: Sequence[Record], name: str) -> Numbers:
    """Mean attention on the selected spans over mean attention on the middle, by layer and head."""
    over, under = (mean_per_head([record["per_head"][key] for record in records]) for key in (name, "middle"))
    return [[a / b if b else 0.0 for a, b in zip(*rows, strict=True)] for rows in zip(over, under, strict=True)]


def _plain(records: Sequence[Record], name: str) -> Numbers:
    return mean_per_head([record["per_head"][name] for record in records])


# Heading, how to get it, and which chance stands below it.
_PANELS: Final[tuple[tuple[str, Callable[[Sequence[Record]], Numbers], str | None], ...]] = (
    ("winning keys that also\nwin with RoPE", lambda records: _plain(records, "shared"), "shared"),
    ("attention that falls\non the middle", lambda records: _plain(records, "middle"), None),
    ("part of it covered by\nselection without RoPE", lambda records: _ratio(records, "covered"), "covered"),
    ("part of it covered by\nselection with RoPE", lambda records: _ratio(records, "covered_by_rope"), "covered"),
)


def overlap(records: Sequence[Record], path: Path, about: Mapping[str, Any]) -> Path:
    """Heat maps of layers and heads, of one kind and mode: a row for each length, a column for each measure."""
    kind, attention = records[0]["kind"], records[0]["attention"]
    lengths = sorted({record["length"] for record in records})
    figure, axes = new_figure(len(lengths), len(_PANELS), width=2.6 * len(_PANELS) + 0.9, height=2.5 * len(lengths) + 1)
    prompts = "while answering a needle's question" if kind == "needle" else "in running text"
    title = f"Selection without RoPE against attention with RoPE, in %, {prompts}"
    figure.suptitle(heading(title, about, f"mode {attention}"))
    for row, length in zip(axes, lengths, strict=True):
        chosen = [record for record in records if record["length"] == length]
        for ax, (title, measure, chance) in zip(row, _PANELS, strict=True):
            image = _heat_map(ax, measure(chosen))
            below = "" if chance is None else f" (by chance {mean(r['chance'][chance] for r in chosen):.1%})"
            ax.set_xlabel(f"head{below}")
            if length == lengths[0]:
                ax.set_title(title, fontsize=10)
        row[0].set_ylabel(f"{short_length(length)} tokens\nlayer")
    figure.colorbar(
        image, ax=[ax for row in axes for ax in row], fraction=0.03, pad=0.02, label="%, mean over the observed tokens"
    )
    return save(figure, path)


def _heat_map(ax: Axes, values: Numbers) -> Any:
    layers, heads = len(values), len(values[0])
    image = percent_grid(ax, [[100 * value for value in row] for row in values], layers * heads <= _MOST_NUMBERS)
    ax.set_xticks(_ticks(heads), [str(tick + 1) for tick in _ticks(heads)])
    ax.set_yticks(_ticks(layers), [str(tick + 1) for tick in _ticks(layers)])
    return image


def _ticks(count: int) -> list[int]:
    """At most nine of 0..count-1."""
    return list(range(0, count, math.ceil(count / 9)))


# ---------------------------------------------------------------------------------------------------------------
# Spread
# ---------------------------------------------------------------------------------------------------------------
def spread(records: Sequence[Record], path: Path, about: Mapping[str, Any]) -> Path:
    """Highest position and entropy of attention against context length, a line for each attention mode."""
    figure, axes = new_figure(1, 2, width=11, height=4.6)
    figure.suptitle(heading("Positions and entropy of attention", about))
    positions, entropy = axes[0]
    rows = sorted(summarize(records), key=lambda row: row["length"])
    lengths = [row["length"] for row in rows]
    trained = rows[0]["trained_context"]
    for mode in dict.fromkeys(row["attention"] for row in rows):
        of = [row for row in rows if row["attention"] == mode]
        style = line_style(mode)
        x = [row["length"] for row in of]
        positions.plot(x, [row["highest_position"] + 1 for row in of], label=mode, **style)
        entropy.plot(x, [row["entropy"] for row in of], label=mode, **style)
        low, high = zip(*(_middle_half(records, mode, length) for length in x), strict=True)
        entropy.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    positions.axhline(trained, color="black", linestyle="--", linewidth=1)
    positions.annotate("trained context", (max(lengths), trained), ha="right", va="bottom", fontsize=9)
    positions.set_yscale("log", base=2)
    positions.set_ylabel("highest position + 1")
    positions.set_title("Positions that RoPE has to represent")
    uniform = [math.log(length) for length in sorted(set(lengths))]
    entropy.plot(sorted(set(lengths)), uniform, color="gray", linestyle=":", label="log(length): all keys alike")
    entropy.set_ylabel("entropy of attention (nats)")
    entropy.set_title("Entropy: mean, and the middle half of all heads")
    entropy.set_ylim(bottom=0)
    for ax in (positions, entropy):
        length_axis(ax, lengths, "context (tokens)")
        mark_trained(ax, trained)
        ax.legend(fontsize=9)
    positions.yaxis.set_major_formatter(lambda value, _: short_length(round(value)))
    return save(figure, path)


def _middle_half(records: Sequence[Record], mode: str, length: int) -> tuple[float, float]:
    """Quartiles of the heads' entropies."""
    chosen = [record["entropy"] for record in records if (record["attention"], record["length"]) == (mode, length)]
    values = sorted(value for row in mean_per_head(chosen) for value in row)
    return values[len(values) // 4], values[-1 - len(values) // 4]


# ---------------------------------------------------------------------------------------------------------------
# Sweeps
# ---------------------------------------------------------------------------------------------------------------
_SWEPT: Final = (
    ("sweep", "needle score (%)", lambda row: 100 * row["score"]),
    ("cost", "reading the prompt (s)", lambda row: row["prefill_seconds"]),
    ("cost", "a token (ms)", lambda row: 1000 * row["token_seconds"]),
)


def sweeps(scores: Sequence[Record], costs: Sequence[Record], path: Path, about: Mapping[str, Any]) -> Path:
    """Score and time of each setting: a column for each field, a line for each length."""
    rows = [*summarize(scores), *summarize(costs)]
    measures = [measure for measure in _SWEPT if any(row["study"] == measure[0] for row in rows)]
    fields = list(dict.fromkeys(row["field"] for row in rows))
    lengths = sorted({row["length"] for row in rows})
    figure, axes = new_figure(len(measures), len(fields), width=2.7 * len(fields), height=2.4 * len(measures) + 0.8)
    for line, (study, label, value_of) in zip(axes, measures, strict=True):
        for ax, field in zip(line, fields, strict=True):
            _lines(ax, [row for row in rows if (row["study"], row["field"]) == (study, field)], lengths, value_of)
            if study == "sweep":
                ax.set_ylim(-5, 105)
            else:
                log_axis(ax)
        _share_y(line)
        line[0].set_ylabel(label)
    for ax, field in zip(axes[-1], fields, strict=True):
        ax.set_xlabel(field)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), title=heading("context", about))
    return save(figure, path)


def _lines(ax: Axes, rows: Sequence[Record], lengths: Sequence[int], value_of: Callable[[Record], float]) -> None:
    """Values side by side, in the order in which they were given."""
    names = list(dict.fromkeys(str(row["value"]) for row in rows))
    for index, length in enumerate(lengths):
        of = [row for row in rows if row["length"] == length and row["records"]]
        x = [names.index(str(row["value"])) for row in of]
        colour, marker = _LENGTH_COLOURS[index % len(_LENGTH_COLOURS)], "os^Dvp"[index % 6]
        y = [value_of(row) for row in of]
        size = max(4, 9 - 2 * index)  # what lies under a later line still shows
        ax.plot(x, y, color=colour, marker=marker, markersize=size, label=short_length(length), alpha=0.85)
    ax.set_xticks(range(len(names)), names)
    ax.margins(x=0.15)


def _share_y(axes: Sequence[Axes]) -> None:
    """One range for all panels of a row, with numbers at the first only."""
    bottoms, tops = zip(*(ax.get_ylim() for ax in axes), strict=True)
    for ax in axes:
        ax.set_ylim(min(bottoms), max(tops))
        ax.grid(True, axis="y", alpha=0.3)
        if ax is not axes[0]:
            ax.tick_params(labelleft=False)
