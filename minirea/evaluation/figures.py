"""What the study pictures share: colours that colour-blind readers can tell apart, axes of lengths, saving."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from minirea.errors import MissingExtraError
from minirea.evaluation.task import short_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette. Every mode also has a marker and a line of its own, and shows under those drawn over it.
_STYLES: Final[dict[str, dict[str, Any]]] = {
    "reattention": {"color": "#0072B2", "marker": "o", "markersize": 5, "zorder": 4},
    "streaming": {"color": "#E69F00", "marker": "s", "markersize": 9, "markerfacecolor": "none", "linestyle": "--"},
    "full": {"color": "#D55E00", "marker": "^", "markersize": 7, "linestyle": "-."},
}


def line_style(mode: str) -> dict[str, Any]:
    """How a line of an attention mode looks, as keyword arguments of matplotlib."""
    return _STYLES[mode]


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """A figure of `width` x `height` inches and its axes, [rows][columns].

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError(
            "matplotlib is not installed, expected the plot extra: pip install 'minirea[plot]'"
        ) from None
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def length_axis(ax: Axes, lengths: Iterable[int], label: str) -> None:
    """A logarithmic x axis that names each of the lengths."""
    ticks = sorted(set(lengths))
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [short_length(tick) for tick in ticks])
    ax.set_xticks([], minor=True)
    ax.set_xlabel(label)
    ax.grid(True, alpha=0.3)


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
