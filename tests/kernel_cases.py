"""Random ReAttention steps with one right answer: small integers, whose dot products float32 computes without error."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from oracle import reattention_oracle

from minirea.kernels import ReAttentionConfig, Votes, new_votes, new_winners, reattention


@dataclass
class Case:
    """The arguments of one `reattention` call."""

    q: torch.Tensor  # q_THD
    k_cache: torch.Tensor  # k_cache_GND
    v_cache: torch.Tensor  # v_cache_GND
    seq_len: int
    cos: torch.Tensor
    sin: torch.Tensor
    config: ReAttentionConfig

    def arguments(self) -> tuple[Any, ...]:
        return (*self.tensors(), self.config)

    def tensors(self) -> tuple[Any, ...]:
        return self.q, self.k_cache, self.v_cache, self.seq_len, self.cos, self.sin

    def chunks(self, chunk_size: int) -> list[Case]:
        """The steps that its queries are in chunks."""
        T = self.q.shape[0]
        starts = range(0, T, chunk_size)
        stops = [min(start + chunk_size, T) for start in starts]
        return [
            replace(self, q=self.q[start:stop], seq_len=self.seq_len - T + stop)
            for start, stop in zip(starts, stops, strict=True)
        ]

    def oracle(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """float64 output and the scopes as a list, one for the layer or one per key/value head."""
        out_THD, selection = reattention_oracle(*self.arguments())
        return out_THD, as_list(selection)


def as_list(selection: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
    return selection if isinstance(selection, list) else [selection]


def rope_table(positions: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, with an attention factor that is not 1 so that forgetting it shows."""
    frequency = 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    return (1.1 * angle.cos()).float(), (1.1 * angle.sin()).float()


def make_case(
    config: ReAttentionConfig,
    seq_len: int,
    T: int = 1,
    H: int = 4,
    G: int = 2,
    D: int = 16,
    capacity: int | None = None,
    largest: int = 3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """q and k are integers up to `largest` (ties are common), over 4 to keep softmax soft. Beyond seq_len lies NaN."""
    generator = torch.Generator().manual_seed(seed)
    N = capacity or seq_len + 3
    q_THD = torch.randint(-largest, largest + 1, (T, H, D), generator=generator) / 4
    k_cache_GND = torch.randint(-largest, largest + 1, (G, N, D), generator=generator) / 4
    v_cache_GND = torch.randn(G, N, D, generator=generator)
    k_cache_GND[:, seq_len:] = v_cache_GND[:, seq_len:] = torch.nan
    cos, sin = rope_table(min(seq_len, config.max_scope + T - 1), D)  # as many as T chunks need
    q_THD, k_cache_GND, v_cache_GND = (x.to(dtype) for x in (q_THD, k_cache_GND, v_cache_GND))
    return Case(q_THD, k_cache_GND, v_cache_GND, seq_len, cos, sin, config)


def random_case(seed: int, head_dims: tuple[int, ...] = (2, 8, 16, 20), longest_middle: int = 300) -> Case:
    """A case of any shape: dense, streaming or selecting, both scopes, lengths often right at a boundary."""
    r = random.Random(seed)
    config = ReAttentionConfig(
        global_size=r.choice([0, 1, 4, 7]),
        local_size=r.choice([1, 3, 8, 16]),
        span_top_k=r.choice([0, 1, 2, 4, 9]),
        span_size=r.choice([2, 4, 8, 32]),
        max_spans=r.choice([0, 1, 2, 5, 40]),
        span_scope=r.choice(["layer", "kv_head"]),
    )
    dense_size = config.dense_size + r.choice([0, 0, 1, 30, 200])
    config = replace(config, dense_size=dense_size, vote_size=random.Random(-1 - seed).choice([1, 1, 3, 32]))
    seq_len = r.choice(
        [r.randint(1, dense_size), dense_size + r.randint(0, 3), dense_size + r.randint(0, longest_middle)]
    )
    T = r.randint(1, min(24, dense_size) if seq_len <= dense_size else config.local_size)
    return make_case(
        config,
        max(T, seq_len),
        T=T,
        G=(G := r.choice([1, 2, 3])),
        H=G * r.choice([1, 2, 3, 4, 8]),
        D=r.choice(head_dims),
        largest=r.choice([1, 2, 5]),
        seed=seed,
    )


def votes_of(case: Case, num_layers: int) -> Votes:
    """Before the first of so many layers."""
    (T, H, _), (G, N, _) = case.q.shape, case.k_cache.shape
    return new_votes(H, G, case.config, T, num_layers, N, case.q.device)


def check_layers(case: Case, impl: str, num_layers: int = 3, attending: int = 1) -> None:
    """Layers with other queries, each of which selects by the votes of those before it too."""
    votes, eps = votes_of(case, num_layers), torch.finfo(case.q.dtype).eps
    cast: list[dict[int, int]] = [{} for _ in votes.counts]
    for layer in range(num_layers):
        this = replace(case, q=case.q.roll(layer, -1))
        out_THD, selection = reattention(
            *this.arguments(), impl=impl, return_selection=True, attending=attending, votes=votes
        )
        exact_THD, scopes = reattention_oracle(*this.arguments(), attending=attending, votes=cast)
        scopes = as_list(scopes)
        assert [s.tolist() for s in as_list(selection)] == [s.tolist() for s in scopes]
        limit = 2 * error(plain_attention(this, scopes)[-attending:], exact_THD) + eps
        assert out_THD.shape == exact_THD.shape and error(out_THD, exact_THD) <= limit
    for counts, num_votes, ballot in zip(votes.counts.tolist(), votes.num_votes.tolist(), cast, strict=True):
        ballot = ballot if case.config.max_selected else {}
        assert {j: count for j, count in enumerate(counts) if count} == ballot
        if impl == "triton":
            reached = [sum(count >= level for count in ballot.values()) for level in range(1, len(num_votes))]
            assert num_votes == [0, *reached]


def decode_layers(config: ReAttentionConfig, capacity: int, num_layers: int, **sizes: Any) -> list[Case]:
    """Layers with keys, values and queries of so many tokens, of which steps see some; see `decode_steps`."""
    layers = [make_case(config, capacity, T=capacity, capacity=capacity, seed=i, **sizes) for i in range(num_layers)]
    for layer in layers:
        layer.cos, layer.sin = rope_table(min(capacity, config.max_scope), layer.q.shape[2])
    return layers


def cut_off(layer: Case, seq_len: int, window: int) -> Case:
    """The step of `window` queries that ends with token seq_len - 1. What lies behind it is NaN."""
    k, v = layer.k_cache.clone(), layer.v_cache.clone()
    k[:, seq_len:] = v[:, seq_len:] = torch.nan
    return replace(layer, q=layer.q[seq_len - window : seq_len], k_cache=k, v_cache=v, seq_len=seq_len)


def check_decode_steps(layers: list[Case], window: int, carries: bool, seq_lens: Iterable[int]) -> None:
    """Steps in which the last `window` tokens vote, whose winners are kept, select what the oracle does; in the order
    of seq_lens, which may go on or jump.
    """
    config, (_, H, _), device = layers[0].config, layers[0].q.shape, layers[0].q.device
    winners = new_winners(H, config, window, len(layers), device)
    votes = votes_of(cut_off(layers[0], window, window), len(layers)) if carries else None
    for seq_len in seq_lens:
        cast: list[dict[int, int]] | None = None
        if votes is not None:
            cast = [{} for _ in votes.counts]
            for tensor in votes:
                tensor.zero_()
        for layer, kept in zip(layers, winners, strict=True):
            this = cut_off(layer, seq_len, window)
            options = {"return_selection": True, "attending": 1, "votes": votes, "winners": kept}
            out_1HD, selection = reattention(*this.arguments(), impl="triton", **options)
            exact_1HD, scopes = reattention_oracle(*this.arguments(), attending=1, votes=cast)
            scopes = as_list(scopes)
            assert [s.tolist() for s in as_list(selection)] == [s.tolist() for s in scopes], seq_len
            limit = 2 * error(plain_attention(this, scopes)[-1:], exact_1HD) + torch.finfo(this.q.dtype).eps
            assert out_1HD.shape == exact_1HD.shape and error(out_1HD, exact_1HD) <= limit
        for counts, ballot in zip(votes.counts.tolist(), cast or [], strict=True) if votes is not None else ():
            assert {j: count for j, count in enumerate(counts) if count} == ballot


def popular_keys_case() -> Case:
    """Three positions with 320, 160 and 160 votes, of which two are kept: more than a chunk's blocks count alone."""
    case = make_case(ReAttentionConfig(1, 40, 2, 2, 2), 200, T=40, H=8)
    case.q.abs_().add_(0.25)
    case.k_cache[:, 70] = 2.0
    case.k_cache[0, 100] = case.k_cache[1, 90] = 1.5
    return case


def plain_attention(case: Case, scopes: list[torch.Tensor]) -> torch.Tensor:
    """Ordinary torch in the cache's own dtype over given scopes: the yardstick for the error of faster code."""
    T, H, D = case.q.shape
    group = H // case.k_cache.shape[0]
    out_THD = torch.empty_like(case.q)
    for h in range(H):
        scope = scopes[h // group if len(scopes) > 1 else 0]
        S = len(scope)
        q_TD = _rope(case.q[:, h], case.cos[S - T : S], case.sin[S - T : S])
        k_SD = _rope(case.k_cache[h // group, scope], case.cos[:S], case.sin[:S])
        logits_TS = (q_TD @ k_SD.T) * D**-0.5
        causal_TS = torch.ones(T, S, dtype=torch.bool, device=scope.device).tril(S - T)
        out_THD[:, h] = logits_TS.masked_fill(~causal_TS, -torch.inf).softmax(1) @ case.v_cache[h // group, scope]
    return out_THD


def _rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def check_chunks(case: Case, chunk_size: int, out_THD: torch.Tensor) -> None:
    """Each chunk's output is that of its own scope, by the error that plain torch has over it."""
    eps = torch.finfo(out_THD.dtype).eps
    for chunk, out_chunk in zip(case.chunks(chunk_size), out_THD.split(chunk_size), strict=True):
        exact_THD, scopes = chunk.oracle()
        assert error(out_chunk, exact_THD) <= 2 * error(plain_attention(chunk, scopes), exact_THD) + eps


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error in the Euclidean norm; NaN stays NaN, which no comparison passes."""
    return float((out.double() - exact).norm() / exact.norm())
