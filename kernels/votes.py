"""What the votes of a step add up in, from layer to layer; shared by both implementations."""

from __future__ import annotations

from typing import NamedTuple

import torch

from minirea.config import ReAttentionConfig


class Votes(NamedTuple):
    """The votes of one step's layers so far, by ballot: one for the layer, or one for each key/value head."""

    counts: torch.Tensor  # int32 [ballots, N or more]: of each cache position
    num_votes: torch.Tensor  # int32 [ballots, levels + 1]: positions that have at least so many; impl "triton" only


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
    # Whole blocks of 16 positions, so that caches of all lengths have one kernel.
    counts = torch.zeros(ballots, -(-capacity // 16) * 16, dtype=torch.int32, device=device)
    return Votes(counts, torch.zeros(ballots, levels + 1, dtype=torch.int32, device=device))
