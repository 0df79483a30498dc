"""The picture of an answer: which layer, and which of its tokens, looked where in the prompt."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from minirea.evaluation.frame.plots import as_it_is, new_figure, own_style
from minirea.files import replace_file
from minirea.sources import Votes

_COLUMNS: Final = 400  # of the picture: parts of the prompt, however long that is
_MOST_ROWS: Final = 64  # of the answer's tokens: more are put together
_NAMED: Final = 40


@own_style()
def draw(path: Path, model: str, votes: Votes, num_tokens: int, num_layers: int, answer: Sequence[str]) -> None:
    """Two maps over the prompt's positions: by layer, and by the answer's tokens.

    Args:
        num_tokens: of the prompt.
        answer: what each of the answer's tokens adds to the text.

    Raises:
        MissingExtraError: matplotlib is not installed.
        InputError: the file cannot be written, or matplotlib does not start.
    """
    rows = min(len(answer), _MOST_ROWS)
    height = 2.5 + 0.16 * num_layers + 0.2 * rows
    figure, axes = new_figure(2, 1, 10, height)
    together = -(-len(answer) // _MOST_ROWS)
    panels = (
        (votes.layer, num_layers, "layer"),
        (votes.token // together, -(-len(answer) // together), "token of the answer"),
    )
    for (ax,), (row, count, label) in zip(axes, panels, strict=True):
        share = binned(votes, row, count, num_tokens)
        root, extent = share**0.5, (0, num_tokens, count - 0.5, -0.5)
        high = float(root.max()) or 1.0
        shown = ax.imshow(
            root, aspect="auto", interpolation="nearest", cmap="magma", extent=extent, vmin=0.0, vmax=high
        )
        ticks = [high * part / 4 for part in range(5)]
        bar = figure.colorbar(shown, ax=ax, label="share of the answer's votes", pad=0.01)
        bar.set_ticks(ticks, labels=[f"{tick**2:.1%}" for tick in ticks])
        ax.set_ylabel(label)
        ax.set_xlim(0, max(1, num_tokens))
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if together == 1 and len(answer) <= _NAMED:
        names = [as_it_is(name.replace(" ", "\u2423").replace("\n", "\u21b5")) for name in answer]
        axes[1][0].set_yticks(range(len(names)), names)
    axes[0][0].set_title(f"Where {as_it_is(model)} looked for its answer, in a prompt of {num_tokens:,} tokens")
    axes[1][0].set_xlabel("position in the prompt, tokens")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    replace_file(path, content.getvalue())


def binned(votes: Votes, row: Tensor, num_rows: int, num_tokens: int) -> Tensor:
    """Shares of the votes by row and part of the prompt, float64 [num_rows, columns]; they sum to 1."""
    columns = max(1, min(_COLUMNS, num_tokens))
    index = row * columns + votes.position * columns // max(1, num_tokens)
    share = torch.zeros(num_rows * columns, dtype=torch.float64).index_add_(0, index, votes.weight.double())
    return (share / share.sum().clamp_(min=1e-30)).view(num_rows, columns)
