"""Decode steps that count the votes of earlier tokens, and what steps leave for later ones, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import check_decode_steps, check_votes, decode_layers, make_case, votes_of

from minirea.kernels import ReAttentionConfig, count_winners
from minirea.kernels.fused import launch, plan
from minirea.kernels.fused.arguments import CountSizes


@pytest.mark.parametrize(("span_scope", "window", "K"), [("layer", 4, 2), ("kv_head", 3, 3), ("layer", 2, 1)])
def test_steps_in_a_row_select_what_the_oracle_does(span_scope: str, window: int, K: int) -> None:
    """Behind chunks, the first of which is dense; then back by one, far ahead and on."""
    votes = {"vote_size": 4, "vote_window": window, "carry_votes": True}
    config = ReAttentionConfig(3, 9, K, 4, 4, span_scope=span_scope, **votes, dense_size=20)
    layers = decode_layers(config, 50, 2, H=6, G=2, D=8, largest=1)
    check_decode_steps(layers, "triton", (27, 28, 29, 28, 48, 49, 50), [(20, 4), (26, 6)])


def test_chunks_of_a_launch_leave_the_winners_of_the_last_tokens() -> None:
    """Four chunks, the first dense, in half precision one launch; one of a single query takes the decode kernel."""
    config = ReAttentionConfig(3, 9, 2, 4, 4, vote_window=4, carry_votes=True, dense_size=20)
    for dtype in (torch.float16, torch.float32):
        layers = decode_layers(config, 50, 1, H=6, G=2, D=16, largest=1, dtype=dtype)
        steps = check_decode_steps(layers, "triton", (), [(20, 4)])
        steps.chunk(30, 14, chunk_size=4)
        steps.chunk(31, 1)
        steps.token(32)


def test_a_token_that_votes_alone_adds_to_the_layers_before() -> None:
    config = ReAttentionConfig(0, 9, 2, 4, 3, carry_votes=True)
    check_decode_steps(decode_layers(config, 30, 2, H=3, G=3, D=8), "triton", (9, 10, 29, 30))


def test_more_winners_than_vote_in_a_round() -> None:
    """40 of each token, in rounds of 32."""
    config = ReAttentionConfig(1, 9, 4, 2, 5, vote_window=2, carry_votes=True)
    check_decode_steps(decode_layers(config, 70, 1, H=10, G=2, D=8, largest=1), "triton", (68, 69, 70))


@pytest.mark.parametrize(("H", "max_spans"), [(4, plan.MAX_ELECTED + 1), (40, 5)])
def test_more_than_is_compared_takes_the_chunk_kernel(monkeypatch: pytest.MonkeyPatch, H: int, max_spans: int) -> None:
    """More spans, or more winners."""
    launched: list[int] = []
    chunks = launch.launch_chunks
    record = lambda step, size: (launched.append(len(step.q)), chunks(step, size))[1]  # noqa: E731
    monkeypatch.setattr(launch, "launch_chunks", record)
    config = ReAttentionConfig(1, 9, 4, 2, max_spans, vote_window=2, carry_votes=True)
    check_decode_steps(decode_layers(config, 70, 1, H=H, G=4, D=8), "triton", (69, 70))
    assert launched == [1, 1]


@pytest.mark.parametrize("span_scope", ["layer", "kv_head"])
def test_votes_of_many_winners(monkeypatch: pytest.MonkeyPatch, span_scope: str) -> None:
    """Several programs count, and positions are compared in several parts, or there are fewer of them than are kept.
    Positions with equal votes are many; seq_len is a number or in memory.
    """
    sizes = lambda *fields: CountSizes(*fields, BLOCK=64, BLOCK_V=32)  # noqa: E731
    monkeypatch.setattr(launch, "CountSizes", sizes)
    monkeypatch.setattr(launch, "MAX_COUNTING", 3)
    generator = torch.Generator().manual_seed(0)
    for largest, max_spans in ((300, 7), (300, 64), (12, 20), (40, 16), (9, 1)):
        votes = {"vote_size": 2, "vote_window": 5, "carry_votes": True}
        config = ReAttentionConfig(4, 8, 3, 2, max_spans, span_scope=span_scope, **votes)
        case = make_case(config, 310, H=4, G=2)
        winners = torch.randint(-1, largest + 4, (6, 10, 4, 3), generator=generator).int()
        expected, found = votes_of(case, 6), votes_of(case, 6)
        count_winners(expected, winners, 307, config, "torch")
        n = torch.tensor([307], dtype=torch.int32) if largest == 300 else 307
        count_winners(found, winners, n, config, "triton")
        assert torch.equal(found.counts, expected.counts)
        cast = [{j: count for j, count in enumerate(counts) if count} for counts in expected.counts.tolist()]
        check_votes(found, cast, "triton", config)


def test_winners_of_no_token() -> None:
    """As in the first steps of a cache: nothing is elected."""
    config = ReAttentionConfig(4, 8, 2, 2, 3, vote_window=4, carry_votes=True)
    case = make_case(config, 60)
    for n in (2, 12, 60):
        votes = votes_of(case, 2)
        count_winners(votes, torch.full((2, 8, 4, 2), -1, dtype=torch.int32), n, config, "triton")
        assert not votes.counts.any() and not votes.elected.any()
    alone = replace(config, vote_window=1)
    votes = votes_of(replace(case, config=alone), 2)
    count_winners(votes, torch.full((2, 8, 4, 2), 30, dtype=torch.int32), 60, alone, "triton")
    assert not votes.counts.any()
