"""Decode steps whose tokens vote together, with winners kept from step to step, in Triton's interpreter."""

from __future__ import annotations

import pytest
from kernel_cases import check_decode_steps, decode_layers

from minirea.kernels import ReAttentionConfig
from minirea.kernels.fused import launch


@pytest.mark.parametrize(
    ("span_scope", "window", "carries", "K"),
    [("layer", 4, True, 2), ("kv_head", 3, True, 3), ("layer", 3, False, 1), ("kv_head", 4, False, 2)],
)
def test_steps_in_a_row_select_what_the_oracle_does(span_scope: str, window: int, carries: bool, K: int) -> None:
    """Across the dense bound, where all is searched for, and on; then back by one, far ahead and on."""
    config = ReAttentionConfig(3, 9, K, 4, 4, span_scope=span_scope, vote_size=4, dense_size=20)
    layers = decode_layers(config, 50, 2, H=6, G=2, D=8, largest=1)
    check_decode_steps(layers, window, carries, (20, 21, 22, 23, 24, 23, 48, 49, 50))


def test_a_token_that_votes_alone_adds_to_the_layers_before() -> None:
    config = ReAttentionConfig(0, 9, 2, 4, 3, vote_size=1)
    check_decode_steps(decode_layers(config, 30, 2, H=3, G=3, D=8), 1, True, (9, 10, 29, 30))


def test_more_winners_than_vote_in_a_round() -> None:
    """40 of each token, in rounds of 32."""
    config = ReAttentionConfig(1, 9, 4, 2, 5)
    check_decode_steps(decode_layers(config, 70, 1, H=10, G=2, D=8, largest=1), 2, True, (68, 69, 70))


def test_more_spans_than_are_compared_take_the_chunk_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[int] = []
    chunks = launch.launch_chunks
    monkeypatch.setattr(launch, "launch_chunks", lambda *args: (launched.append(len(args[0])), chunks(*args))[1])
    config = ReAttentionConfig(1, 9, 2, 2, launch.MAX_ELECTED + 1)
    check_decode_steps(decode_layers(config, 70, 1, D=8), 2, True, (69, 70))
    assert launched == [2, 2]
