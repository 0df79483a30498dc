# mypy: disable-error-code="no-untyped-def"
"""The fused kernel in Triton's interpreter, as one program: `python -m pytest -m interpret`.

bfloat16 is left to the GPU: the interpreter's dot multiplies its bit patterns.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import (
    Case,
    as_list,
    check_chunks,
    check_layers,
    error,
    make_case,
    plain_attention,
    popular_keys_case,
    random_case,
    rope_table,
    votes_of,
)

from minirea.errors import InputError
from minirea.kernels import ReAttentionConfig, reattention, reference
from minirea.kernels.fused import launch, plan
from minirea.kernels.fused.arguments import ChunkScratch
from minirea.kernels.fused.attend import rotate
from minirea.kernels.fused.order import NOWHERE, pack, position_of, take_best, to_order
from minirea.kernels.fused.scope import locate, select
from minirea.kernels.fused.vote import sort, vote
from minirea.threads import enqueueing


def check(case: Case) -> None:
    for dtype in (torch.float32, torch.float16):
        cast = replace(case, q=case.q.to(dtype), k_cache=case.k_cache.to(dtype), v_cache=case.v_cache.to(dtype))
        out_THD, selection = reattention(*cast.arguments(), impl="triton", return_selection=True)
        exact_THD, scopes = cast.oracle()
        assert [s.tolist() for s in as_list(selection)] == [s.tolist() for s in scopes]
        limit = 2 * error(plain_attention(cast, scopes), exact_THD) + torch.finfo(dtype).eps
        assert error(out_THD, exact_THD) <= limit


def test_threads_take_turns_from_a_launch_to_its_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    """They share scratch where they share a stream."""
    alone: list[bool] = []

    def recorded(call: Any, *arguments: Any) -> Any:
        alone.append(enqueueing._is_owned())  # type: ignore[attr-defined]
        return call(*arguments)

    for name in ("launch_step", "scopes_of"):
        monkeypatch.setattr(launch, name, functools.partial(recorded, getattr(launch, name)))
    check(make_case(ReAttentionConfig(3, 5, 4, 4, 2), 90))
    assert alone == [True] * 4


@pytest.mark.parametrize("seed", range(28))
def test_equals_oracle_on_random_shapes(seed: int) -> None:
    check(random_case(seed, head_dims=(8, 16, 20, 32)))


@pytest.mark.parametrize("span_scope", ["layer", "kv_head"])
@pytest.mark.parametrize("past_edge", [-7, -1, 0, 1, 2, 130])
def test_lengths_around_the_first_middle_key(span_scope: str, past_edge: int) -> None:
    config = ReAttentionConfig(3, 5, 4, 4, 2, span_scope=span_scope)
    for T in (1, 3):
        check(make_case(config, max(T, 8 + past_edge), T=T, seed=past_edge + T))


@pytest.mark.parametrize("span_scope", ["layer", "kv_head"])
@pytest.mark.parametrize("past_edge", [-40, -1, 0, 1, 40])
def test_lengths_around_dense_size(span_scope: str, past_edge: int) -> None:
    """One captured launch serves both sides: the length is read from memory. A dense chunk may exceed local_size."""
    config = ReAttentionConfig(3, 5, 4, 4, 2, span_scope=span_scope, dense_size=50)
    for T in (1, 3, 9):
        n = max(T, 50 + past_edge)
        if n <= config.dense_size or config.local_size >= T:
            case = make_case(config, n, T=T, capacity=100, seed=past_edge + T)
            check(case)
            case.cos, case.sin = rope_table(config.max_scope, 16)
            in_memory = replace(case, seq_len=torch.tensor([n], dtype=torch.int32))  # type: ignore[arg-type]
            found, expected = (reattention(*one.arguments(), impl="triton") for one in (in_memory, case))
            assert torch.equal(found, expected)
        if T == 1 and n <= config.dense_size:  # as a step that is known to be
            check(replace(case, config=config.of_dense_step))


@pytest.mark.parametrize("seed", range(4))
def test_votes_of_earlier_layers_count(seed: int) -> None:
    """Whatever a decode step would be launched as, and dense or with nothing to select too."""
    case = random_case(seed, head_dims=(8, 16), longest_middle=120)
    check_layers(replace(case, q=case.q[-1:]), "triton")
    for span_scope in ("layer", "kv_head"):
        config = ReAttentionConfig(3, 20, 2, 8, 3, span_scope=span_scope, vote_size=(1, 8)[seed % 2])
        check_layers(make_case(config, 200, seed=seed), "triton")


def test_votes_that_were_not_zeroed_stay_in_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """More votes than there are levels: still max_spans spans, of the middle, and nothing is written beside them."""
    monkeypatch.setattr(launch, "_workspaces", {})
    guarded, scratch_of = torch.full((50,), -7, dtype=torch.int32), launch.scratch_of
    kept = guarded[20:22].view(1, 2)
    monkeypatch.setattr(launch, "scratch_of", lambda *args: scratch_of(*args)._replace(kept=kept))
    case = make_case(ReAttentionConfig(3, 50, 4, 2, 2), 60, H=40, G=4)  # more winners than the decode kernel takes
    votes = votes_of(case, 1)
    for layer in range(9):
        case.q = case.q.roll(layer, -1)
        _, selection = reattention(*case.arguments(), impl="triton", return_selection=True, votes=votes)
        assert torch.equal(selection[:3], torch.arange(3)) and torch.equal(selection[-50:], torch.arange(10, 60))
        assert torch.all(selection.diff() > 0) and 55 <= len(selection) <= 57
    assert votes.num_votes[0, -1] > 2
    assert torch.all(guarded[:20] == -7) and torch.all(guarded[22:] == -7)


@pytest.mark.parametrize("span_scope", ["layer", "kv_head"])
@pytest.mark.parametrize("seq_len", [41, 60, 200])  # dense, with a far part that fills up a tile, and with spans
def test_chunks_read_nothing_that_other_launches_left(
    span_scope: str, seq_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What launches of many kinds share may hold anything, NaN as well."""
    monkeypatch.setattr(launch, "_workspaces", {})
    case = make_case(ReAttentionConfig(3, 20, 2, 8, 3, span_scope=span_scope, dense_size=41), seq_len, T=7)
    expected_THD = reattention(*case.arguments(), impl="triton", chunk_size=4)
    for byte in (0xFF, 0x7F):
        scratches = [scratch for scratch in launch._workspaces.values() if isinstance(scratch, ChunkScratch)]
        assert scratches
        for scratch in scratches:
            for name, tensor in scratch._asdict().items():
                if name in plan.PASSING:
                    tensor.view(torch.uint8).fill_(byte)
        assert torch.equal(reattention(*case.arguments(), impl="triton", chunk_size=4), expected_THD)


@pytest.mark.parametrize("head_dim", [80, 96, 256])
def test_head_dims_that_are_masked_or_large(head_dim: int) -> None:
    for T in (1, 2):
        check(make_case(ReAttentionConfig(2, 8, 2, 4, 3), 150, T=T, D=head_dim, H=2, G=1))


@pytest.mark.parametrize("num_heads", [32, 40])
def test_winners_up_to_what_a_decode_step_sorts_and_beyond(num_heads: int) -> None:
    for max_spans in (5, 200):
        check(make_case(ReAttentionConfig(2, 8, 4, 4, max_spans), 400, H=num_heads, G=8, D=16, largest=3))


def test_keys_behind_the_middle_never_win() -> None:
    """A chunk's tiles may reach into a local part that is long enough, up to the last key of the cache."""
    for T, n in ((1, 283), (3, 283), (3, 134), (3, 260)):
        for local_size in (31, 130):  # shorter than a tile, and longer
            case = make_case(ReAttentionConfig(3, local_size, 2, 4, 5), n, T=T, capacity=n, largest=2)
            case.k_cache[:, n - local_size :] *= 16  # better than all others, or worse
            check(case)


def test_all_scores_equal_selects_the_lowest() -> None:
    for T in (1, 2):
        case = make_case(ReAttentionConfig(1, 2, 3, 2, 9), 300, T=T)
        case.k_cache[:, :300] = 0.0
        case.k_cache[:, 100:200] = -0.0
        check(case)


@pytest.mark.parametrize("span_scope", ["layer", "kv_head"])
@pytest.mark.parametrize(("T", "chunk_size"), [(12, 4), (10, 4), (9, 4), (11, 8)])
def test_chunks_in_one_launch(T: int, chunk_size: int, span_scope: str) -> None:
    """All selecting, the first ones dense, all dense, and with nothing to select; dense up to 11 or more tokens."""
    for past_edge, max_spans, dense_size in ((100, 5, 40), (T - 3, 5, None), (6, 40, 14), (0, 5, 99), (70, 0, 77)):
        config = ReAttentionConfig(3, 8, 2, 4, max_spans, span_scope=span_scope, dense_size=dense_size)
        case = make_case(config, max(T, 11 + past_edge), T=T, dtype=torch.float16, seed=T + past_edge)
        out_THD = reattention(*case.arguments(), impl="triton", chunk_size=chunk_size)
        check_chunks(case, chunk_size, out_THD)


@pytest.mark.parametrize("span_scope", ["layer", "kv_head"])
@pytest.mark.parametrize(("T", "chunk_size"), [(7, 1), (21, 2), (33, 16)])
def test_small_chunks_in_one_launch(T: int, chunk_size: int, span_scope: str) -> None:
    """As the tail of a prompt is read: fewer rows than a tile has."""
    config = ReAttentionConfig(3, 20, 4, 4, 6, span_scope=span_scope, dense_size=30)
    for n in (200, 30 + T // 2):
        case = make_case(config, max(T, n), T=T, H=6, G=3, dtype=torch.float16, seed=T)
        check_chunks(case, chunk_size, reattention(*case.arguments(), impl="triton", chunk_size=chunk_size))


def test_more_chunks_than_share_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launch_chunks, queries = launch.launch_chunks, []
    monkeypatch.setattr(plan, "MAX_CHUNKS", 2)
    record = lambda step, size: (queries.append(len(step.q)), launch_chunks(step, size))[1]  # noqa: E731
    monkeypatch.setattr(launch, "launch_chunks", record)
    case = make_case(ReAttentionConfig(3, 8, 2, 4, 5), 80, T=19, dtype=torch.float16)
    check_chunks(case, 4, reattention(*case.arguments(), impl="triton", chunk_size=4))
    assert queries == [8, 8, 3]


def test_float32_chunks_equal_launches_of_their_own() -> None:
    case = make_case(ReAttentionConfig(3, 8, 2, 4, 5), 60, T=10)
    for seq_len in (60, torch.tensor([60], dtype=torch.int32)):
        together = reattention(*replace(case, seq_len=seq_len).arguments(), impl="triton", chunk_size=4)
        alone = [reattention(*chunk.arguments(), impl="triton") for chunk in case.chunks(4)]
        assert torch.equal(together, torch.cat(alone))


def test_keys_with_hundreds_of_votes() -> None:
    case = popular_keys_case()
    check(case)
    assert reattention(*case.arguments(), impl="triton", return_selection=True)[1].tolist()[1:5] == [69, 70, 89, 90]


def test_seq_len_from_memory_strides_and_repeats() -> None:
    """A tensor seq_len, a cache stored [N, G, D] with gaps, poisoned outputs; a second launch finds clean counters."""
    for T in (1, 3):
        case = make_case(ReAttentionConfig(2, 8, 2, 4, 3), 90, T=T)
        expected = reattention(*case.arguments(), impl="triton")
        k = torch.full((100, 2, 40), torch.nan)
        k[5:98, :, 8:24] = case.k_cache.transpose(0, 1)
        strided = replace(case, k_cache=k[5:98, :, 8:24].transpose(0, 1), seq_len=torch.tensor([90]))
        strided.q = torch.cat([case.q, torch.zeros(T, 2, 16)], 1)[:, :4]
        for _ in range(2):
            assert torch.equal(reattention(*strided.arguments(), impl="triton"), expected)


@pytest.mark.parametrize("stride_n", [1 << 27, 8])
def test_offsets_beyond_2_31_elements(stride_n: int) -> None:
    """Few keys far apart, or two heads far apart, in memory that is reserved but hardly touched."""
    for T in (1, 3):
        case = make_case(ReAttentionConfig(2, 4, 2, 4, 2), 20, T=T, D=8, dtype=torch.float16)
        expected = reattention(*case.arguments(), impl="triton")
        stride_g = 8 if stride_n > 8 else (1 << 31) + 8
        memory = torch.empty(20 * stride_n + 2 * stride_g, dtype=torch.float16)
        far = torch.as_strided(memory, (2, 20, 8), (stride_g, stride_n, 1))
        for name in ("k_cache", "v_cache"):
            cast = {"k_cache": case.k_cache[:, :20], "v_cache": case.v_cache[:, :20]}
            cast[name] = far.copy_(cast[name])
            assert torch.equal(reattention(*replace(case, **cast).arguments(), impl="triton"), expected)


def test_limits_are_named() -> None:
    with pytest.raises(InputError, match="head_dim is 258, expected at most 256"):
        reattention(*make_case(ReAttentionConfig(2, 8), 5, D=258).arguments(), impl="triton")


# One phase at a time, each against its torch twin.


@triton.jit
def rank_kernel(score_ptr, winner_ptr, N: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr):
    offs_n = tl.arange(0, N)[None, :]
    best = take_best(pack(to_order(tl.load(score_ptr + offs_n)), offs_n), K, K_PAD)
    tl.store(winner_ptr + tl.arange(0, K_PAD)[None, :], position_of(best))


def test_packed_ranking_equals_the_twin() -> None:
    score = torch.randint(-3, 4, (64,)).float() * torch.tensor([1.0, 0.0, -0.0, 1e-40] * 16)
    winner = torch.empty(8, dtype=torch.int32)
    rank_kernel[(1,)](score, winner, 64, 5, 8)
    packed = reference.pack_score(score, torch.arange(64))
    assert winner[:5].tolist() == reference.unpack_index(packed.topk(5).values).tolist()


@triton.jit
def layout_kernel(winner_ptr, kept_ptr, num_kept_ptr, row_ptr, selection_ptr, max_spans, mid_lo, mid_hi, span_size,
                  W: tl.constexpr):  # fmt: skip
    kept = vote(tl.load(winner_ptr + tl.arange(0, W)), max_spans, W)
    sort(kept, kept_ptr, num_kept_ptr, W)
    start, offset, rows = select(kept_ptr, tl.load(num_kept_ptr), mid_lo, mid_hi, span_size, W)
    length = mid_lo + tl.sum(rows, axis=0)
    for lo in range(0, length, 7):
        locate(selection_ptr, start, offset, rows, lo, tl.minimum(lo + 7, length), mid_lo, span_size, W)
    tl.store(row_ptr, tl.sum(rows, axis=0))


@pytest.mark.parametrize("span_size", [2, 8, 32])
@pytest.mark.parametrize("max_spans", [1, 5, 16])
def test_vote_select_and_locate_equal_their_twins(span_size: int, max_spans: int) -> None:
    generator = torch.Generator().manual_seed(span_size + max_spans)
    for spread in (4, 20, 90):
        winner = torch.randint(10, 10 + spread, (16,), generator=generator)
        start_BP, offset_BP, length_B = reference.select(
            reference.vote(winner[None], max_spans), 10, 100, 100, span_size
        )
        length = int(length_B)
        expected = reference.locate(torch.arange(length), start_BP, offset_BP)[0]
        # A place without a winner, as absent keys leave them, changes nothing.
        padded = torch.full((32,), NOWHERE.value, dtype=torch.int32)
        padded[3:19] = winner.int()
        rows, source = torch.empty(1, dtype=torch.int32), torch.empty(128, dtype=torch.int64)
        layout_kernel[(1,)](
            padded, torch.empty_like(padded), torch.empty_like(rows), rows, source, max_spans, 10, 100, span_size, 32
        )
        assert int(rows) == length - 10
        assert source[:length].tolist() == expected.tolist()


@triton.jit
def rotate_kernel(x_ptr, cos_ptr, sin_ptr, out_ptr, N: tl.constexpr, HALF: tl.constexpr):
    offs = tl.arange(0, N)[:, None] * (2 * HALF) + tl.arange(0, HALF)[None, :]
    table = tl.arange(0, N)[:, None] * HALF + tl.arange(0, HALF)[None, :]
    a, b = tl.load(x_ptr + offs), tl.load(x_ptr + offs + HALF)
    out = rotate(a, b, tl.load(cos_ptr + table), tl.load(sin_ptr + table), tl.float32)
    tl.store(out_ptr + tl.arange(0, N)[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :], out)


def test_rotate_equals_its_twin() -> None:
    x, out = torch.randn(8, 16), torch.full((8, 16), torch.nan)
    cos, sin = rope_table(8, 16)
    rotate_kernel[(1,)](x, cos, sin, out, 8, 8)
    torch.testing.assert_close(out, reference.rotate(x.clone(), cos, sin))
