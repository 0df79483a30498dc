"""What votes add up in from layer to layer, and winners that are kept from step to step."""

from __future__ import annotations

from typing import NamedTuple

import torch

from minirea.config import ReAttentionConfig


class Votes(NamedTuple):
    """The votes of one step's layers so far, by ballot: one for the layer, or one for each key/value head."""

    counts: torch.Tensor  # int32 [ballots, N or more]: of each cache position
    # With impl "triton" only, the first for steps that are called with winners, the second for others:
    elected: torch.Tensor  # int32 [ballots, max_spans or more]: the positions that have most, each with 1 added
    num_votes: torch.Tensor  # int32 [ballots, levels + 1]: positions that have at least so many


def new_votes(
    num_heads: int,
    num_kv_heads: int,
    config: ReAttentionConfig,
    num_queries: int,
    num_layers: int,
    capacity: int,
    device: torch.device,
) -> Votes:
    """Votes of a step before its first layer: all zero.

    Args:
        num_heads: that vote, of all processes where they vote together.
        num_kv_heads: whose ballots are counted here, with span_scope "kv_head".
        config: of the step.
        num_queries: that vote in each layer.
        capacity: of the cache, tokens.
    """
    by_head = config.span_scope == "kv_head"
    ballots, rows = (num_kv_heads, num_heads // num_kv_heads) if by_head else (1, num_heads)
    winners = num_queries * rows * config.span_top_k * num_layers
    levels = winners // max(1, config.max_spans)  # more votes than so many max_spans positions cannot have
    # Whole blocks of 16 positions, so that caches of all lengths have one kernel. One tensor, to be zeroed at once.
    widths = (-(-capacity // 16) * 16, elected_size(config.max_spans), levels + 1)
    parts = torch.zeros(ballots * sum(widths), dtype=torch.int32, device=device).split([ballots * n for n in widths])
    return Votes(*(part.view(ballots, -1) for part in parts))


def elected_size(max_spans: int) -> int:
    """Room for a ballot's positions with most votes."""
    return max(16, 1 << (max_spans - 1).bit_length())


def new_winners(
    num_heads: int, config: ReAttentionConfig, num_queries: int, num_layers: int, device: torch.device
) -> torch.Tensor:
    """Winners of no token yet: int64 [L, M], zero. `reattention` takes one layer's, and in impl "triton" keeps there
    what the next step then need not search for.

    Args:
        num_heads: of the layer, those of other processes not counted.
        config: of the step.
        num_queries: that vote in each layer.

    A layer's first number says for how many cached tokens the others hold. Those begin at the third, packed scores and
    positions [num_queries, H, span_top_k or more].
    """
    rows = num_queries * num_heads
    size = 2 + rows * (1 << (max(1, config.span_top_k) - 1).bit_length())
    return torch.zeros(num_layers, size + size % 2, dtype=torch.int64, device=device)  # each layer's 16 bytes aligned
