"""The limits and defaults of ReAttentionConfig."""

from __future__ import annotations

from typing import Any

import pytest

from minirea.config import TAIL_CHUNK_SIZE, TAIL_SIZE, ReAttentionConfig
from minirea.errors import InputError


@pytest.mark.parametrize(
    ("trained", "expected", "bound"),
    [
        (131072, (32, 8192, 256, 512), 16416),
        (32768, (32, 8192, 256, 512), 16416),
        (8192, (32, 1024, 55, 512), 4576),
        (2048, (32, 1024, 15, 512), 1536),
        (256, (4, 128, 1, 128), 164),
    ],
)
def test_defaults_follow_the_trained_context(trained: int, expected: tuple[int, ...], bound: int) -> None:
    c = ReAttentionConfig.for_context(trained)
    assert (c.global_size, c.local_size, c.max_spans, c.chunk_size) == expected
    assert (c.span_top_k, c.span_size, c.span_scope) == ((2, 64) if trained == 8192 else (4, 32)) + ("layer",)
    assert c.max_scope == c.dense_size == bound <= trained
    assert (c.tail_size, c.tail_chunk_size) == (TAIL_SIZE, TAIL_CHUNK_SIZE)
    votes = (8, 32, 16, True) if trained == 8192 else (1, 1, c.max_spans, False)
    assert (c.vote_window, c.vote_size, c.decode_spans, c.carry_votes) == votes


def test_defaults_of_votes_follow_the_sizes_that_are_given() -> None:
    c = ReAttentionConfig.for_context(8192, local_size=4, span_size=16, max_spans=3)
    assert (c.vote_window, c.vote_size, c.decode_spans, c.carry_votes) == (8, 8, 3, True)
    c = ReAttentionConfig.for_context(8192, vote_window=1, vote_size=1, decode_spans=55, carry_votes=False)
    assert (c.vote_window, c.vote_size, c.decode_spans, c.carry_votes) == (1, 1, 55, False)
    c = ReAttentionConfig.for_context(8192, carry_votes=False)
    assert (c.vote_window, c.vote_size, c.decode_spans, c.carry_votes) == (1, 32, 16, False)


def test_fields_that_follow_from_others() -> None:
    """The kernels' own call is the paper's: dense as long as nothing can be selected. The engine's fills the scope."""
    direct = ReAttentionConfig(4, 24, max_spans=3)
    assert (direct.chunk_size, direct.tail_chunk_size, direct.dense_size, direct.max_scope) == (24, 16, 28, 28 + 96)
    assert ReAttentionConfig(4, 24, span_top_k=0).max_scope == 28
    assert ReAttentionConfig(4, 24, chunk_size=3).tail_chunk_size == 3
    assert ReAttentionConfig(4, 24, max_spans=0, dense_size=100).max_scope == 100
    assert ReAttentionConfig.for_context(2048, span_top_k=0).dense_size == 32 + 1024
    assert ReAttentionConfig.for_context(2048, max_spans=2).dense_size == 32 + 1024 + 64
    assert ReAttentionConfig.for_context(2048, dense_size=1100).dense_size == 1100


@pytest.mark.parametrize(
    "fields",
    [
        {"global_size": -1},
        {"local_size": 0},
        {"span_top_k": -1},
        {"span_size": 7},
        {"span_size": 0},
        {"max_spans": -1},
        {"chunk_size": 0},
        {"chunk_size": 2000},
        {"span_scope": "head"},
        {"vote_window": 2},
        {"vote_window": 0},
        {"carry_votes": 1},
        {"carry_votes": "no"},
        {"tail_size": -1},
        {"tail_size": True},
        {"tail_chunk_size": 0},
        {"tail_chunk_size": 1025},
        {"dense_size": 543},
        {"dense_size": 2000.0},
        {"local_size": 1.5},
        {"span_topk": 4},
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(fields))):
        ReAttentionConfig.for_context(2048, **fields)


def test_a_scope_beyond_the_trained_context_is_refused_with_both_numbers() -> None:
    config = ReAttentionConfig.for_context(2048, max_spans=64)
    with pytest.raises(InputError, match=r"3104 .* 2048 .*allow_out_of_distribution=True"):
        config.check_fits(2048, "max_position_embeddings")
    with pytest.raises(InputError, match=r"2049 .*dense_size 2049.* 2048 .*allow_out_of_distribution=True"):
        ReAttentionConfig.for_context(2048, dense_size=2049).check_fits(2048, "max_position_embeddings")


def test_a_scope_beyond_what_kernels_count_is_refused_by_its_parts() -> None:
    with pytest.raises(
        InputError, match=r"^the scope can reach 32000001056 .*max_spans 1000000000 .*at most 2147483647$"
    ):
        ReAttentionConfig.for_context(2048, max_spans=10**9)
