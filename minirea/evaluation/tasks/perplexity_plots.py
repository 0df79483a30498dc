"""The picture of perplexity against position."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minirea.evaluation.frame.plots import heading, length_axis, line_style, mark_trained, new_figure, save
from minirea.evaluation.frame.records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TARGET = 0.03  # the change that the shaded band allows


def against_position(records: Sequence[Record], path: Path, about: Mapping[str, Any]) -> Path:
    """Nats per token by position, and their change against the same tokens read within the trained context.

    Only the longest length is drawn. Error bars are standard errors over windows.
    """
    longest = max(record["length"] for record in records)
    whole = [record for record in records if record["length"] == longest]
    compared = all(bucket["nll_in_range"] is not None for record in whole for bucket in record["buckets"])
    figure, axes = new_figure(1, 2 if compared else 1, width=12 if compared else 6, height=4.6)
    windows = {(record["kind"], record["sample"]) for record in whole}
    texts = ", ".join(sorted({record["kind"] for record in whole}))
    title = f"{texts}: {longest:,} tokens read in one go"
    figure.suptitle(heading(title, about, f"mean of {len(windows)} place{'s' * (len(windows) != 1)}"))
    trained = whole[0]["trained_context"]
    for mode in dict.fromkeys(record["attention"] for record in whole):
        of = [record for record in whole if record["attention"] == mode]
        _line(axes[0][0], mode, of, _per_token)
        if compared:
            _line(axes[0][1], mode, of, _change)
    axes[0][0].set_ylabel("nats per token")
    axes[0][0].set_title("Negative log-likelihood")
    if compared:
        axes[0][1].axhspan(-100 * _TARGET, 100 * _TARGET, color="gray", alpha=0.2, label=f"±{100 * _TARGET:.0f}%")
        axes[0][1].set_ylabel("change (%)")
        axes[0][1].set_title(f"Against the same tokens, never more than {trained:,} read at once")
    edges = [bucket["to"] for bucket in whole[0]["buckets"]]
    for ax in axes[0]:
        length_axis(ax, edges[:: max(1, math.ceil(len(edges) / 10))], "position (tokens)")
        mark_trained(ax, trained)
        ax.legend(fontsize=9)
    return save(figure, path)


def _line(ax: Axes, mode: str, records: Sequence[Record], value_of: Callable[[Record], float]) -> None:
    """A mode's mean over windows at the middle of each bucket."""
    x, y, errors = [], [], []
    for buckets in zip(*(record["buckets"] for record in records), strict=True):
        values = [value_of(bucket) for bucket in buckets]
        x.append(math.sqrt(max(buckets[0]["from"], buckets[0]["to"] / 2) * buckets[0]["to"]))
        y.append(statistics.mean(values))
        errors.append(statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0)
    ax.errorbar(x, y, errors, capsize=3, label=mode, **line_style(mode))


def _per_token(bucket: Record) -> float:
    return float(bucket["nll"] / bucket["tokens"])


def _change(bucket: Record) -> float:
    """Percent."""
    return 100 * float(bucket["nll"] / bucket["nll_in_range"] - 1)
