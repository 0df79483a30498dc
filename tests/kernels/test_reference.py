"""The torch phases against the float64 oracle, and each phase against its definition."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import kernel_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    as_list,
    check_decode_steps,
    check_layers,
    check_votes,
    decode_layers,
    error,
    make_case,
    plain_attention,
    random_case,
    votes_of,
)
from torch.utils._python_dispatch import TorchDispatchMode

from minirea.errors import InputError
from minirea.kernels import ReAttentionConfig, count_winners, new_sketch, reattention, reference


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors lose more to a second thread than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(case: kernel_cases.Case) -> None:
    before = [x.clone() for x in (case.q, case.k_cache, case.v_cache)]
    out_THD, selection = reattention(*case.arguments(), impl="torch", return_selection=True)
    exact_THD, scopes = case.oracle()
    for found, expected in zip(as_list(selection), scopes, strict=True):
        assert found.dtype == torch.int64
        assert found.tolist() == expected.tolist()
    assert error(out_THD, exact_THD) < 2e-6
    assert out_THD.shape == case.q.shape and out_THD.dtype == case.q.dtype
    for x, old in zip((case.q, case.k_cache, case.v_cache), before, strict=True):
        assert torch.equal(x.nan_to_num(), old.nan_to_num())


@pytest.mark.parametrize("tile", [1, 1000, 1 << 20])
def test_equals_oracle_on_random_shapes(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tiny tiles exercise the merge of many tiles and the rows it leaves out.
    monkeypatch.setitem(reference.TILE_SCORES, "cpu", tile)
    monkeypatch.setitem(reference.TILE_ROWS, "cpu", 3 if tile == 1000 else 128)
    for seed in range(120):
        check(random_case(seed * 3 + tile % 3))


@settings(max_examples=150, deadline=None)
@given(
    seq_len=st.integers(1, 200),
    global_size=st.integers(0, 9),
    local_size=st.integers(1, 20),
    span_top_k=st.integers(0, 12),
    half_span=st.integers(1, 20),
    max_spans=st.integers(0, 12),
    T=st.integers(1, 20),
    G=st.integers(1, 3),
    group=st.integers(1, 9),
    half_dim=st.integers(1, 10),
    span_scope=st.sampled_from(["layer", "kv_head"]),
    seed=st.integers(0, 1 << 20),
)
def test_equals_oracle_property(
    seq_len: int,
    global_size: int,
    local_size: int,
    span_top_k: int,
    half_span: int,
    max_spans: int,
    T: int,
    G: int,
    group: int,
    half_dim: int,
    span_scope: str,
    seed: int,
) -> None:
    config = ReAttentionConfig(
        global_size, local_size, span_top_k, 2 * half_span, max_spans, chunk_size=1, span_scope=span_scope
    )
    T = min(T, local_size, seq_len)
    check(make_case(config, seq_len, T=T, H=G * group, G=G, D=2 * half_dim, seed=seed, largest=1 + seed % 3))


@pytest.mark.parametrize("span_scope", ["layer", "kv_head"])
@pytest.mark.parametrize("past_edge", range(-2, 6))
def test_every_length_around_the_first_middle_key(span_scope: str, past_edge: int) -> None:
    config = ReAttentionConfig(3, 5, 4, 4, 2, span_scope=span_scope)
    for T in (1, 2, 5):
        check(make_case(config, 8 + past_edge, T=T, seed=past_edge + 10 * T))


@pytest.mark.parametrize("span_scope", ["layer", "kv_head"])
@pytest.mark.parametrize("past_edge", [-3, 0, 1, 2])
def test_every_length_around_dense_size(span_scope: str, past_edge: int) -> None:
    config = ReAttentionConfig(3, 5, 4, 4, 2, span_scope=span_scope, dense_size=60)
    for T in (1, 5, *((17,) if past_edge <= 0 else ())):  # only a dense chunk may exceed local_size
        check(make_case(config, 60 + past_edge, T=T, seed=past_edge + 10 * T))


@pytest.mark.parametrize("middle", [63, 64, 65, 127, 128, 129, 640])
def test_middles_around_whole_blocks(middle: int) -> None:
    for seed in range(4):
        check(make_case(ReAttentionConfig(2, 4, 4, 8, 5), 6 + middle, T=2, largest=1, seed=seed))


SPAN_SCOPES = ("layer", "kv_head")


@pytest.mark.parametrize("seed", range(40))
def test_tokens_count_the_winners_of_those_before(seed: int) -> None:
    """Chunks, some dense, then tokens one by one, with tokens taken back or skipped in between."""
    r = random.Random(seed)
    fields = {"vote_window": r.choice([1, 2, 4, 8]), "carry_votes": True, "vote_size": r.choice([1, 4, 16])}
    config = ReAttentionConfig(
        *(r.choice([0, 3]), 9, r.choice([1, 2, 5]), r.choice([2, 8]), r.choice([1, 4, 20])),
        **fields,
        span_scope=r.choice(SPAN_SCOPES),
        dense_size=r.choice([12, 20]),
    )
    G = r.choice([1, 2])
    layers = decode_layers(config, 90, 2, H=G * r.choice([1, 3]), G=G, D=8, largest=r.choice([1, 3]))
    at = r.choice([18, 40])
    tokens = [at + 6, at + 7, at + 8, at + 9, at + 8, at + 9, at + 4, at + 5, at + 30, at + 31]
    check_decode_steps(layers, "torch", tokens, [(at - 7, 5), (at, 7), (at + 5, 5)])


def test_votes_of_earlier_layers_count() -> None:
    for seed in range(80):
        case = random_case(seed)
        check_layers(replace(case, q=case.q[-1:]), "torch")


def test_a_key_of_several_layers_wins_against_one_of_the_last() -> None:
    """Two heads of the second layer agree on a key that none wanted before; one of each layer wants another."""
    config = ReAttentionConfig(1, 4, 1, 2, 1)
    case = make_case(config, 90, H=3, G=3, D=16)
    case.k_cache[:, :90] = 0.0
    votes, selected = votes_of(case, 2), []
    for wanted in ((40, 50, 60), (70, 70, 60)):
        case.k_cache[:, 5:86] = 0.0
        for g, j in enumerate(wanted):
            case.k_cache[g, j] = case.q[0, g]
        for one in (None, votes):
            _, selection = reattention(*case.arguments(), impl="torch", return_selection=True, votes=one)
            selected.append(selection[1:-4].tolist())
    assert selected == [[39, 40], [39, 40], [69, 70], [59, 60]]


def test_winners_that_lie_in_the_local_part_do_not_count() -> None:
    """As after tokens were taken back, or as a file may have them."""
    config = ReAttentionConfig(4, 8, 2, 2, 3, vote_window=4, carry_votes=True)
    case = make_case(config, 60, H=1, G=1)
    winners = torch.full((2, 8, 1, 2), -1, dtype=torch.int32)
    winners[0, :3, 0] = torch.tensor([[51, 52], [3, 4], [2**31 - 1, -(2**31)]])
    votes = votes_of(case, 2)
    count_winners(votes, winners, 60, config, "torch")
    check_votes(votes, [{51: 1, 4: 1}], "torch", config)


def test_votes_that_do_not_fit() -> None:
    config = ReAttentionConfig(2, 4, 4, 8, 5, vote_window=3, carry_votes=True)
    case = make_case(config, 80, capacity=90)
    votes, winners = votes_of(case, 1), torch.full((6, 4, 4), -1, dtype=torch.int32)
    three, sketch = replace(case, q=case.q.expand(3, -1, -1)), new_sketch(2, 16, 90, case.q.device)
    for impl in ("torch", "triton"):
        for bad, message in (
            (votes._replace(counts=votes.counts[:, :89]), r"votes.counts is torch.int32 \[1, 89\], .* \[1, 96\] or"),
            (votes._replace(counts=votes.counts.long()), "votes.counts is torch.int64"),
            (votes._replace(counts=votes.counts.expand(2, -1)), r"votes.counts is torch.int32 \[2, 96\], not contig"),
            (votes._replace(counts=votes.counts[0]), r"votes.counts is torch.int32 \[96\]"),
            (
                votes._replace(num_votes=votes.num_votes[:, 1:]),
                r"num_votes is .*\[1, 9\], expected .* \[1, 10\] or longer",
            ),
            (votes._replace(num_votes=votes.num_votes.to("meta")), "votes.num_votes is on meta, expected cpu"),
        ):
            with pytest.raises(InputError, match=message):
                reattention(*case.arguments(), impl=impl, votes=bad)
        for wrong, message in (
            (winners[:, 1:], r"winners is torch.int32 \[6, 3, 4\], not contiguous, expected .*\[at least 1, 4, 4\]"),
            (winners.long(), "winners is torch.int64"),
            (winners.to("meta"), "winners is on meta, expected cpu"),
        ):
            with pytest.raises(InputError, match=message):
                reattention(*case.arguments(), impl=impl, winners=wrong)
            with pytest.raises(InputError, match="winners_LRHK is "):
                count_winners(votes, wrong[None], 80, config, impl)
        for wrong, message in (
            (winners[None, :2], r"winners_LRHK is .*\[1, 2, 4, 4\], expected torch.int32 \[layers, at least 3, "),
            (winners.expand(9, -1, -1, -1).contiguous(), r"votes.voted is .* expected torch.int32 \[1, at least 290\]"),
        ):
            with pytest.raises(InputError, match=message):
                count_winners(votes, wrong, 80, config, impl)
        with pytest.raises(InputError, match="q_THD has 3 queries, expected one with votes"):
            reattention(*three.arguments(), impl=impl, votes=votes)
        with pytest.raises(InputError, match="both sketch and votes are given, expected one"):
            reattention(*case.arguments(), impl=impl, sketch=sketch, votes=votes)


@pytest.mark.parametrize("vote_size", [2, 16, 1000])
def test_neighbours_vote_as_one(vote_size: int) -> None:
    """Two keys with a vote each win against one with one vote if they are neighbours; the middle bounds blocks."""
    winner_1W = torch.tensor([[40, 41, 20, 11, 89]])
    pooled = reference.pool(winner_1W, vote_size, 11, 90)
    middles = [min(max(j // vote_size * vote_size + vote_size // 2, 11), 89) for j in winner_1W[0].tolist()]
    assert pooled.tolist() == [middles]
    assert middles[0] == middles[1]
    if vote_size < 1000:
        assert reference.vote(pooled, 1).tolist() == [[middles[0]]]


def test_all_scores_equal_selects_the_lowest() -> None:
    case = make_case(ReAttentionConfig(1, 2, 3, 2, 9), 300)
    case.k_cache[:, :300] = 0.0
    case.k_cache[:, 100:200] = -0.0  # must tie with +0
    check(case)
    _, selection = reattention(*case.arguments(), impl="torch", return_selection=True)
    assert selection.tolist() == [0, 1, 2, 3, 298, 299]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("span_scope", ["layer", "kv_head"])
@pytest.mark.parametrize("T", [1, 7])
def test_error_is_within_twice_that_of_plain_torch(dtype: torch.dtype, span_scope: str, T: int) -> None:
    config = ReAttentionConfig(4, 32, 4, 8, 12, span_scope=span_scope)
    case = make_case(config, 700, T=T, H=8, G=2, D=32, dtype=dtype)
    out_THD, selection = reattention(*case.arguments(), impl="torch", return_selection=True)
    exact_THD, scopes = case.oracle()
    assert [s.tolist() for s in as_list(selection)] == [s.tolist() for s in scopes]
    limit = 2 * error(plain_attention(case, scopes), exact_THD) + torch.finfo(dtype).eps
    assert error(out_THD, exact_THD) <= limit


def test_slices_and_one_element_tensors_are_welcome() -> None:
    case = make_case(ReAttentionConfig(2, 8, 2, 4, 3), 90, T=3)
    expected = reattention(*case.arguments(), impl="torch")
    # A cache stored as [N, G, D] inside a larger buffer, and queries cut from a fused projection.
    k = torch.full((93 + 7, 2, 40), torch.nan)
    k[5:98, :, 8:24] = case.k_cache.transpose(0, 1)
    fused = torch.cat([case.q, torch.zeros(3, 2, 16)], 1)
    case.k_cache, case.q = k[5:98, :, 8:24].transpose(0, 1), fused[:, :4]
    for seq_len in (90, torch.tensor(90), torch.tensor([90], dtype=torch.int32)):
        case.seq_len = seq_len  # type: ignore[assignment]
        assert torch.equal(reattention(*case.arguments(), impl="torch"), expected)


def test_decode_equals_the_last_row_of_a_dense_chunk() -> None:
    case = make_case(ReAttentionConfig(4, 64, 2, 4, 3), 60, T=60)
    chunk = reattention(*case.arguments(), impl="torch")
    case.q = case.q[-1:]
    torch.testing.assert_close(reattention(*case.arguments(), impl="torch")[0], chunk[-1])


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that any operator returns, views of the caches aside."""

    def __init__(self, *caches: torch.Tensor) -> None:
        super().__init__()
        self.caches = {x.untyped_storage().data_ptr() for x in caches}
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.caches:
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_does_not_grow_with_the_context(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reference.TILE_SCORES, "cpu", 1 << 12)
    largest = []
    for seq_len in (2000, 16000):
        case = make_case(ReAttentionConfig(4, 32, 2, 8, 4), seq_len, T=4, dtype=dtype, capacity=seq_len)
        with LargestTensor(case.k_cache, case.v_cache) as mode:
            reattention(*case.arguments(), impl="torch")
        largest.append(mode.numel)
    assert largest[0] == largest[1] < 1 << 14


def test_score_returns_the_best_keys_in_order() -> None:
    q_GRD, k_cache_GND = torch.randn(2, 5, 8), torch.randn(2, 500, 8)
    winner_GRK = reference.score(q_GRD, k_cache_GND, 20, 460, 6)
    ranked = torch.matmul(q_GRD, k_cache_GND[:, 20:460].mT).sort(dim=2, descending=True, stable=True).indices
    assert torch.equal(winner_GRK, 20 + ranked[..., :6])


@pytest.mark.parametrize("max_spans", [1, 3, 7, 40])
def test_vote_counts_rows_and_prefers_low_positions(max_spans: int) -> None:
    winner_BW = torch.randint(0, 12, (3, 40), generator=torch.Generator().manual_seed(max_spans))
    for winners, kept in zip(winner_BW, reference.vote(winner_BW, max_spans), strict=True):
        votes = Counter(winners.tolist())
        assert set(kept.tolist()) == set(sorted(votes, key=lambda j: (-votes[j], j))[:max_spans])


@pytest.mark.parametrize("kept", [[], [10], [10, 10], [13, 12, 40, 44, 99, 98], [99, 10, 14, 18], list(range(10, 100))])
@pytest.mark.parametrize("span_size", [2, 4, 32])
def test_select_and_locate_lay_out_the_union_of_covers(kept: list[int], span_size: int) -> None:
    kept_BP = torch.tensor([kept], dtype=torch.int64)
    start_BP, offset_BP, length_B = reference.select(kept_BP, 10, 100, 107, span_size)
    half = span_size // 2
    covers = {i for j in kept for i in range(max(10, j - half), min(100, j + half))}
    expected = [*range(10), *sorted(covers), *range(100, 107)]
    assert reference.locate(torch.arange(int(length_B)), start_BP, offset_BP).tolist() == [expected]


def test_rotate_is_complex_multiplication() -> None:
    x = torch.randn(3, 5, 8)
    cos, sin = kernel_cases.rope_table(5, 8)
    product = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos, sin)
    expected = torch.cat([product.real, product.imag], -1)
    torch.testing.assert_close(reference.rotate(x.clone(), cos, sin), expected)
    torch.testing.assert_close(reference.rotate(x.bfloat16(), cos, sin), expected.bfloat16(), atol=0.05, rtol=0.05)
