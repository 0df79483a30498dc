"""What votes add up in from layer to layer, and the winners of earlier tokens, which vote with them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from minirea.config import ReAttentionConfig


class Votes(NamedTuple):
    """The votes of one step's layers so far, by ballot: one for the layer, or one for each key/value head."""

    counts: torch.Tensor  # int32 [ballots, N or more]: of each cache position
    # With impl "triton" only, the first where the decode kernel votes, `num_votes` where the chunk kernel does:
    elected: torch.Tensor  # int32 [ballots, max_spans or more]: the positions that have most, each with 1 added
    voted: torch.Tensor  # int32 [ballots, 2 or more]: scratch of `count_winners`
    num_votes: torch.Tensor  # int32 [ballots, levels + 1]: positions that have at least so many


def new_votes(
    num_heads: int,
    num_kv_heads: int,
    config: ReAttentionConfig,
    num_layers: int,
    capacity: int,
    device: torch.device,
) -> Votes:
    """Votes of a step before its first layer: all zero.

    Args:
        num_heads: that vote, of all processes where they vote together.
        num_kv_heads: whose ballots are counted here, with span_scope "kv_head".
        config: of the step; its vote_window says how many tokens vote.
        capacity: of the cache, tokens.
    """
    by_head = config.span_scope == "kv_head"
    ballots, rows = (num_kv_heads, num_heads // num_kv_heads) if by_head else (1, num_heads)
    winners = rows * config.span_top_k * num_layers  # of one token
    # More votes than so many max_spans positions cannot have.
    levels = winners * config.vote_window // max(1, config.max_spans)
    # Whole blocks of 16 numbers, so that caches of all lengths have one kernel. One tensor, to be zeroed at once.
    sizes = (capacity, elected_size(config.max_spans), 2 + winners * (config.vote_window - 1))
    widths = (*(-(-size // 16) * 16 for size in sizes), levels + 1)
    parts = torch.zeros(ballots * sum(widths), dtype=torch.int32, device=device).split([ballots * n for n in widths])
    return Votes(*(part.view(ballots, -1) for part in parts))


def voting_ranks(config: ReAttentionConfig, ranks: int) -> int:
    """How many of the processes that have heads of a layer vote together."""
    return ranks if config.span_scope == "layer" and config.max_selected > 0 else 1


def elected_size(max_spans: int) -> int:
    """Room for a ballot's positions with most votes."""
    return max(16, 1 << (max_spans - 1).bit_length())


def winners_shape(num_heads: int, config: ReAttentionConfig, rows: int) -> tuple[int, int, int]:
    """Of the winners [R, H, K] that `reattention` leaves of a layer's last R = `rows` tokens: int32 cache positions,
    token j's in row j modulo R, best first, -1 where there are fewer than K.

    Args:
        num_heads: that vote, of all processes where they vote together.
    """
    return rows, num_heads, max(1, config.span_top_k)
