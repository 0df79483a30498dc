"""Random ReAttention steps with one right answer: small integers, whose dot products float32 computes without error."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from oracle import Found, earlier_votes, reattention_oracle

from minirea.kernels import ReAttentionConfig, Votes, count_winners, new_votes, reattention, winners_shape


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

    def on_gpu(self, dtype: torch.dtype = torch.bfloat16) -> Case:
        tensors = {name: getattr(self, name).to("cuda", dtype) for name in ("q", "k_cache", "v_cache")}
        return replace(self, **tensors, cos=self.cos.cuda(), sin=self.sin.cuda())

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
    (_, H, _), (G, N, _) = case.q.shape, case.k_cache.shape
    return new_votes(H, G, case.config, num_layers, N, case.q.device)


def check_votes(votes: Votes, cast: list[dict[int, int]], impl: str, config: ReAttentionConfig) -> None:
    """They are those that were cast, and what the kernels keep beside them follows."""
    for b, ballot in enumerate(cast):
        assert {j: count for j, count in enumerate(votes.counts[b].tolist()) if count} == ballot
        if impl != "triton":
            continue
        elected, num_votes = votes.elected[b].tolist(), votes.num_votes[b].tolist()
        best = sorted(ballot, key=lambda j: (-ballot[j], j))[: config.max_spans]
        reached = [sum(count >= level for count in ballot.values()) for level in range(1, len(num_votes))]
        if any(elected):
            assert sorted(j - 1 for j in elected if j) == sorted(best) and not any(num_votes)
        else:
            assert num_votes == [0, *reached]


def check_layers(case: Case, impl: str, num_layers: int = 3) -> None:
    """Layers of a step of one query, with other queries, each of which selects by the votes of those before it too."""
    votes, eps = votes_of(case, num_layers), torch.finfo(case.q.dtype).eps
    cast: list[dict[int, int]] = [{} for _ in votes.counts]
    for layer in range(num_layers):
        this = replace(case, q=case.q.roll(layer, -1))
        out_1HD, selection = reattention(*this.arguments(), impl=impl, return_selection=True, votes=votes)
        exact_1HD, scopes = reattention_oracle(*this.arguments(), votes=cast)
        scopes = as_list(scopes)
        assert [s.tolist() for s in as_list(selection)] == [s.tolist() for s in scopes]
        assert error(out_1HD, exact_1HD) <= 2 * error(plain_attention(this, scopes), exact_1HD) + 4 * eps
    check_votes(votes, cast if case.config.max_selected else [{} for _ in cast], impl, case.config)


def decode_layers(config: ReAttentionConfig, capacity: int, num_layers: int, **sizes: Any) -> list[Case]:
    """Layers with keys, values and queries of so many tokens, of which steps see some; see `decode_steps`."""
    layers = [make_case(config, capacity, T=capacity, capacity=capacity, seed=i, **sizes) for i in range(num_layers)]
    for layer in layers:
        layer.cos, layer.sin = rope_table(capacity, layer.q.shape[2])
    return layers


def cut_off(layer: Case, seq_len: int, num_queries: int = 1) -> Case:
    """The step of so many queries that ends with token seq_len - 1. What lies behind it is NaN."""
    k, v = layer.k_cache.clone(), layer.v_cache.clone()
    k[:, seq_len:] = v[:, seq_len:] = torch.nan
    return replace(layer, q=layer.q[seq_len - num_queries : seq_len], k_cache=k, v_cache=v, seq_len=seq_len)


class Steps:
    """Steps over several layers, whose tokens leave winners, each checked against the oracle.

    Attributes:
        winners: int32 [L, R, H, K].
    """

    def __init__(self, layers: list[Case], impl: str, rows: int) -> None:
        self.layers, self.impl, self.config, self.stop = layers, impl, layers[0].config, 0
        (_, H, _), (G, *_), device = layers[0].q.shape, layers[0].k_cache.shape, layers[0].q.device
        self.heads = H, G
        shape = len(layers), *winners_shape(H, self.config, rows)
        self.winners = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.found: list[Found] = [{} for _ in layers]

    def go_to(self, seq_len: int) -> None:
        """Take tokens from seq_len on back, or go on behind tokens that leave nothing."""
        low, high, R = min(seq_len, self.stop), max(seq_len, self.stop), self.winners.shape[1]
        for token in range(max(low, high - R), high):
            self.winners[:, token % R] = -1
        for layer in self.found:
            for token, head in list(layer):
                if token >= low or token < high - R:
                    del layer[token, head]

    def chunk(self, seq_len: int, num_queries: int, **options: Any) -> None:
        """Queries of one or several chunks, in which every layer votes alone."""
        self.go_to(seq_len - num_queries)
        for layer, winners, found in zip(self.layers, self.winners, self.found, strict=True):
            this = cut_off(layer, seq_len, num_queries)
            out_THD = reattention(*this.arguments(), impl=self.impl, winners=winners, **options)
            chunks = this.chunks(options.get("chunk_size", num_queries))
            for chunk in chunks:
                reattention_oracle(*chunk.arguments(), found=found)
            check_chunks(this, options.get("chunk_size", num_queries), out_THD)
        self.check_winners(seq_len)

    def token(self, seq_len: int) -> None:
        """One query, with the votes of tokens and layers before."""
        self.go_to(seq_len - 1)
        votes = votes_of(cut_off(self.layers[0], seq_len), len(self.layers))
        count_winners(votes, self.winners, seq_len, self.config, self.impl)
        cast = earlier_votes(self.found, seq_len, *self.heads, self.config)
        check_votes(votes, cast, self.impl, self.config)
        for layer, winners, found in zip(self.layers, self.winners, self.found, strict=True):
            this = cut_off(layer, seq_len)
            options = {"return_selection": True, "votes": votes, "winners": winners}
            out_1HD, selection = reattention(*this.arguments(), impl=self.impl, **options)
            exact_1HD, scopes = reattention_oracle(*this.arguments(), votes=cast, found=found)
            scopes = as_list(scopes)
            assert [s.tolist() for s in as_list(selection)] == [s.tolist() for s in scopes], seq_len
            limit = 2 * error(plain_attention(this, scopes), exact_1HD) + 4 * torch.finfo(this.q.dtype).eps
            assert out_1HD.shape == exact_1HD.shape and error(out_1HD, exact_1HD) <= limit
        if seq_len > self.config.dense_size:
            check_votes(votes, cast, self.impl, self.config)
        self.check_winners(seq_len)

    def check_winners(self, seq_len: int) -> None:
        """Those of the last R tokens are the oracle's, in any case of equal scores."""
        self.stop = seq_len
        (_, R, H, K), kept = self.winners.shape, self.winners.tolist()
        for layer, found in zip(kept, self.found, strict=True):
            for token in range(max(0, seq_len - R), seq_len):
                expected = [found.get((token, h), []) for h in range(H)]
                assert layer[token % R] == [winners + [-1] * (K - len(winners)) for winners in expected], token


def check_decode_steps(
    layers: list[Case], impl: str, seq_lens: Iterable[int], chunks: Iterable[tuple[int, int]] = ()
) -> Steps:
    """Chunks, (seq_len, queries) each, then tokens, whose lengths may jump: all is the oracle's."""
    steps = Steps(layers, impl, 2 * layers[0].config.vote_window)
    for seq_len, num_queries in chunks:
        steps.chunk(seq_len, num_queries)
    for seq_len in seq_lens:
        steps.token(seq_len)
    return steps


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
