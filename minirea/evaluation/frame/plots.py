"""Pictures: what all of them share, and those of any task whose records have a length.

Shared are colours that colour-blind readers can tell apart, axes of lengths, grids of percentages, the mark of the
trained context, and saving. Pictures of one task's own are in modules next to it and are made of these.
"""

from __future__ import annotations

import contextlib
import io
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from minirea.errors import InputError, MissingExtraError, printable
from minirea.evaluation.frame.records import Record
from minirea.evaluation.lengths import short_length
from minirea.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette. Every mode also has a marker and a line of its own, and shows under those drawn over it.
_STYLES: Final[dict[str, dict[str, Any]]] = {
    "reattention": {"color": "#0072B2", "marker": "o", "markersize": 5, "zorder": 4},
    "streaming": {"color": "#E69F00", "marker": "s", "markersize": 9, "markerfacecolor": "none", "linestyle": "--"},
    "full": {"color": "#D55E00", "marker": "^", "markersize": 7, "linestyle": "-."},
}
_PANELS_IN_A_ROW: Final = 4
_COSTS: Final = (
    *("prompt_tokens", "shared_tokens", "shared_seconds", "first_token_seconds"),
    *("generated_tokens", "decode_seconds", "cache_bytes", "peak_bytes"),
)
_DARK: Final = 55  # percent, below which a cell's number is white


# ---------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------
def line_style(mode: str) -> dict[str, Any]:
    """How a line of an attention mode looks, as keyword arguments of matplotlib."""
    return _STYLES[mode]


@contextlib.contextmanager
def own_style() -> Iterator[None]:
    """Within it matplotlib has its own defaults: a user's file may ask for LaTeX, or for fonts that are not there.

    Raises:
        MissingExtraError: matplotlib is not installed.
        InputError: it does not start, as with an unknown MPLBACKEND.
    """
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError:
        raise MissingExtraError(
            "matplotlib is not installed, expected the plot extra: pip install 'minirea[plot]'"
        ) from None
    except ValueError as error:
        raise InputError(f"matplotlib cannot be imported: {error}") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """A figure of `width` x `height` inches and its axes, [rows][columns]. Within `own_style`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def heading(what: str, about: Mapping[str, Any], detail: str = "") -> str:
    """A picture's title: what it shows, then the model and `detail` in brackets."""
    inside = ", ".join(part for part in (str(about.get("model_name") or ""), detail) if part)
    return as_it_is(f"{what} ({inside})" if inside else what)


def as_it_is(text: str) -> str:
    """A text that pictures show and neither take for a formula nor fail on."""
    return printable(text).replace("$", r"\$")


def length_axis(ax: Axes, lengths: Iterable[int], label: str) -> None:
    """A logarithmic x axis that names each of the lengths."""
    ticks = sorted(set(lengths))
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [short_length(tick) for tick in ticks])
    ax.set_xticks([], minor=True)
    ax.set_xlabel(label)
    ax.grid(True, alpha=0.3)


def mark_trained(ax: Axes, trained: int | None) -> None:
    """A dashed vertical line at the trained context on a length axis, if it lies in the axis' range or at its edge."""
    if trained is None:
        return
    low, high = ax.get_xlim()
    if low <= trained <= high:
        ax.axvline(trained, color="black", linestyle="--", linewidth=1, label="trained context", zorder=1)


def log_axis(ax: Axes) -> None:
    """A logarithmic y axis with plain numbers on it, some of them however narrow the range is."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.set_ylim(low / 1.15, high * 1.15)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def percent_grid(ax: Axes, percents: Sequence[Sequence[float | None]], numbers: bool = True) -> Any:
    """Rows of percentages as colours, and as numbers where `numbers`; None is a blank cell. Returns the image."""
    values = [[float("nan") if p is None else p for p in row] for row in percents]
    image = ax.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for y, row in enumerate(percents if numbers else ()):
        for x, value in enumerate(row):
            text, colour = ("not run", "black") if value is None else (f"{value:.0f}", _ink(value))
            ax.text(x, y, text, ha="center", va="center", fontsize=6 if value is None else 8, color=colour)
    return image


def _ink(percent: float) -> str:
    return "white" if percent < _DARK else "black"


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG and return its path. Raises InputError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    replace_file(path, content.getvalue())
    return path


# ---------------------------------------------------------------------------------------------------------------
# Scores and costs of any task
# ---------------------------------------------------------------------------------------------------------------
def heat_map(records: Sequence[Record], folder: Path, title: str, about: Mapping[str, Any]) -> Path:
    """Mean score by length and depth, one panel for each attention mode, as heatmap.png."""
    modes = list(dict.fromkeys(r["attention"] for r in records))
    lengths = sorted({r["length"] for r in records})
    depths = sorted({r["depth"] for r in records})
    cells: dict[tuple[Any, ...], list[float]] = {}
    for r in records:
        if "skipped" not in r:
            cells.setdefault((r["attention"], r["length"], r["depth"]), []).append(r["score"])
    width, height = 1.4 + len(modes) * (0.9 + 0.5 * len(lengths)), 1.6 + 0.34 * max(6, len(depths))
    figure, axes = new_figure(1, len(modes), max(width, 5.0), height)
    figure.suptitle(
        heading(f"{title}: answers that are right, in percent", about, _answers_each(cells.values())), wrap=True
    )
    for ax, mode in zip(axes[0], modes, strict=True):
        scores = [[cells.get((mode, length, depth)) for length in lengths] for depth in depths]
        image = percent_grid(ax, [[100 * statistics.fmean(of) if of else None for of in row] for row in scores])
        ax.set_title(mode, pad=14)  # above what _mark_trained_column writes
        ax.set_xlabel("length (tokens)")
        ax.set_xticks(range(len(lengths)), [short_length(length) for length in lengths])
        ax.set_yticks(range(len(depths)), [f"{100 * depth:.0f}%" for depth in depths])
        ax.set_xticks([x - 0.5 for x in range(1, len(lengths))], minor=True)
        ax.set_yticks([y - 0.5 for y in range(1, len(depths))], minor=True)
        ax.grid(which="minor", color="white", linewidth=1)
        ax.tick_params(which="minor", length=0)
        _mark_trained_column(ax, lengths, about.get("trained_context"))
    axes[0][0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=axes[0], label="right answers (%)", aspect=30)
    return save(figure, folder / "heatmap.png")


def _mark_trained_column(ax: Axes, lengths: Sequence[int], trained: int | None) -> None:
    """A line in a heat map to the right of the last length that the model was trained on, which it names."""
    if trained is None:
        return
    within = sum(length <= trained for length in lengths)
    ax.axvline(within - 0.5, color="#D55E00", linestyle="--", linewidth=2)
    side = "right" if within > len(lengths) / 2 else "left"
    text = f"trained to {short_length(trained)}" + (" " if side == "right" else "")
    ax.annotate(text, (within - 0.5, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 2), fontsize=7,
                textcoords="offset points", ha=side, va="bottom", color="#D55E00")  # fmt: skip


def _answers_each(cells: Iterable[Sequence[float]]) -> str:
    """ "10 answers in each cell" or "5 to 10 answers in each cell"."""
    counts = sorted({len(scores) for scores in cells})
    if not counts:
        return ""
    most = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    return f"{most} answer{'s' * (most != '1')} in each cell"


def against_length(records: Sequence[Record], folder: Path, title: str, about: Mapping[str, Any]) -> list[Path]:
    """score.png (a panel for each kind) and cost.png (speed and memory); what records do not hold is left out."""
    records = [r for r in records if "length" in r and "skipped" not in r]
    pictures = []
    if scored := [r for r in records if r["score"] is not None]:
        pictures.append(_scores(scored, folder / "score.png", title, about))
    if costing := [r for r in records if _tells_costs(r)]:
        pictures.append(_costs(costing, folder / "cost.png", title, about))
    return pictures


def _scores(records: Sequence[Record], path: Path, title: str, about: Mapping[str, Any]) -> Path:
    kinds = list(dict.fromkeys(r.get("kind", "") for r in records))
    columns = min(len(kinds), _PANELS_IN_A_ROW)
    rows = -(-len(kinds) // columns)
    figure, axes = new_figure(rows, columns, max(6.0, 3.3 * columns), 1.4 + 2.8 * rows)
    cells: dict[tuple[Any, ...], list[float]] = {}
    for r in records:
        cells.setdefault((r["attention"], r.get("kind"), r["length"]), []).append(r["score"])
    each = _answers_each(cells.values()).replace("cell", "point")
    figure.suptitle(heading(f"{title}: score against length", about, each), wrap=True)
    panels = [ax for row in axes for ax in row]
    for ax, kind in zip(panels, kinds, strict=False):
        _lines(ax, [r for r in records if r.get("kind", "") == kind], lambda r: 100 * r["score"])
        mark_trained(ax, about.get("trained_context"))
        ax.set_ylim(-4, 104)
        ax.set_ylabel("score (%)")
        ax.set_title(as_it_is(kind), fontsize=10)
    for ax in panels[len(kinds) :]:
        ax.set_axis_off()
    panels[0].legend(fontsize=9)
    return save(figure, path)


def _costs(records: Sequence[Record], path: Path, title: str, about: Mapping[str, Any]) -> Path:
    """Speed of reading, time of an answer's token, and memory."""
    figure, axes = new_figure(1, 3, 12.0, 4.2)
    device, dtype = (str(records[0]["settings"].get(name)) for name in ("device", "dtype"))
    machines = ", ".join(sorted({str(r.get("machine", device)) for r in records}))
    detail = f"{machines}; {dtype}"
    figure.suptitle(heading(f"{title}: what it costs", about, detail), wrap=True)
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
        mark_trained(ax, about.get("trained_context"))
        log_axis(ax)
    drawn = reading.get_legend_handles_labels()[0]  # nothing where a shared part was less than half of each prompt
    (reading if drawn else memory).legend(fontsize=9)
    return save(figure, path)


def _tells_costs(record: Record) -> bool:
    numbers = all(isinstance(record.get(name), (int, float)) for name in _COSTS)
    return numbers and isinstance(record.get("settings"), dict)


def read_tokens_per_second(record: Record) -> float | None:
    """How fast the prompt was read: its shared part where that is most of it, otherwise all up to the first token."""
    if record["shared_tokens"] >= record["prompt_tokens"] / 2:
        tokens, seconds = record["shared_tokens"], record["shared_seconds"]
    else:
        tokens, seconds = 0 if record["shared_tokens"] else record["prompt_tokens"], record["first_token_seconds"]
    return tokens / seconds if tokens and seconds else None


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
