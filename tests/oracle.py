"""The third implementation of ReAttention, which judges the other two."""

from __future__ import annotations

import torch

from minirea.kernels import ReAttentionConfig

Found = dict[tuple[int, int], list[int]]  # of one layer: token, head -> cache positions, best first


def reattention_oracle(
    q_THD: torch.Tensor,
    k_cache_GND: torch.Tensor,
    v_cache_GND: torch.Tensor,
    seq_len: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    config: ReAttentionConfig,
    votes: list[dict[int, int]] | None = None,
    found: Found | None = None,
) -> tuple[torch.Tensor, torch.Tensor | list[torch.Tensor]]:
    """Section 3 word for word in float64, one head at a time, with sets instead of layouts.

    Arguments as for `minirea.kernels.reattention`; `votes` are positions and how many votes they had before, by ballot,
    to which new ones are added. `found` takes every query's winners. Returns float64 [T, H, D] and the selection.
    """
    T, H, D = q_THD.shape
    group = H // k_cache_GND.shape[0]
    q, k, v, cos, sin = (x.double() for x in (q_THD, k_cache_GND[:, :seq_len], v_cache_GND[:, :seq_len], cos, sin))
    by_head = config.span_scope == "kv_head"
    ballots = heads_of_ballots(H, H // group, config)
    votes, found = votes or [{} for _ in ballots], {} if found is None else found
    scopes = [
        _oracle_scope(q, k, seq_len, heads, config, cast, found) for heads, cast in zip(ballots, votes, strict=True)
    ]

    out_THD = torch.empty(T, H, D, dtype=torch.float64, device=q.device)
    for h in range(H):
        scope = scopes[h // group if by_head else 0]
        S = len(scope)
        q_rot = _oracle_rope(q[:, h], cos[S - T : S], sin[S - T : S])
        k_rot = _oracle_rope(k[h // group, scope], cos[:S], sin[:S])
        logits_TS = q_rot @ k_rot.T / D**0.5
        logits_TS.masked_fill_(torch.ones_like(logits_TS, dtype=torch.bool).triu(S - T + 1), -torch.inf)
        out_THD[:, h] = logits_TS.softmax(1) @ v[h // group, scope]
    return out_THD, scopes if by_head else scopes[0]


def heads_of_ballots(num_heads: int, num_kv_heads: int, config: ReAttentionConfig) -> list[range]:
    if config.span_scope == "layer":
        return [range(num_heads)]
    group = num_heads // num_kv_heads
    return [range(g * group, g * group + group) for g in range(num_kv_heads)]


def earlier_votes(
    found: list[Found], seq_len: int, num_heads: int, num_kv_heads: int, config: ReAttentionConfig
) -> list[dict[int, int]]:
    """Votes of the vote_window - 1 tokens before the last of seq_len, by ballot, as each found them in all layers."""
    votes = []
    for heads in heads_of_ballots(num_heads, num_kv_heads, config):
        votes.append(counted := {})
        for layer in found:
            for token in range(seq_len - config.vote_window, seq_len - 1):
                for h in heads:
                    _cast(counted, layer.get((token, h), []), seq_len, config)
    return votes


def _cast(votes: dict[int, int], winners: list[int], seq_len: int, config: ReAttentionConfig) -> None:
    """One vote each for the middle of a winner's block; winners that are not in the middle have none."""
    mid_lo, mid_hi = config.global_size, seq_len - config.local_size
    for j in winners:
        if mid_lo <= j < mid_hi:
            middle = j // config.vote_size * config.vote_size + config.vote_size // 2
            counted = min(max(middle, mid_lo), mid_hi - 1)
            votes[counted] = votes.get(counted, 0) + 1


def _oracle_scope(
    q: torch.Tensor,
    k: torch.Tensor,
    seq_len: int,
    heads: range,
    config: ReAttentionConfig,
    votes: dict[int, int],
    found: Found,
) -> torch.Tensor:
    """Steps 1 to 7: the cache positions that one ballot attends to, ascending. Adds to the votes that it had."""
    if seq_len <= config.dense_size:
        return torch.arange(seq_len, device=q.device)
    mid_lo, mid_hi = config.global_size, seq_len - config.local_size
    group = q.shape[1] // k.shape[0]
    for h in heads:
        for t, score_n in enumerate(q[:, h] @ k[h // group, mid_lo:mid_hi].T, seq_len - len(q)):
            best = score_n.sort(descending=True, stable=True).indices[: config.span_top_k]
            found[t, h] = [mid_lo + j for j in best.tolist()]
            _cast(votes, found[t, h], seq_len, config)
    kept = sorted(votes, key=lambda j: (-votes[j], j))[: config.max_spans]
    half = config.span_size // 2
    selected = {i for j in kept for i in range(max(j - half, mid_lo), min(j + half, mid_hi))}
    scope = [*range(mid_lo), *sorted(selected), *range(mid_hi, seq_len)]
    return torch.tensor(scope, device=q.device)


def _oracle_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
