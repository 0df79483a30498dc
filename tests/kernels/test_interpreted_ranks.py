"""Steps of several ranks, one rank after the other in one process: `python -m pytest -m interpret`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import Case, as_list, make_case, random_case, rope_table, votes_of
from near_cases import far_case, near_of
from rank_cases import on_ranks, part_of
from sketch_cases import CHANGES, all_equal, changed, few_stand_out, real_case, sketch_of

from minirea.errors import InputError
from minirea.kernels import ReAttentionConfig, new_votes, reattention, winners_shape
from minirea.kernels.fused import launch, plan
from minirea.kernels.fused.arguments import SketchTiles


def check(case: Case, ranks: int, impls: tuple[str, ...] = ("triton", "torch"), layers: int = 0) -> None:
    """Output and selection are those of one launch for all heads, bit for bit; of layers whose votes add up, if any."""
    by_head, H, (G, N, _) = case.config.span_scope == "kv_head", case.q.shape[1], case.k_cache.shape
    heads = H // ranks if by_head else H
    for impl in impls:
        whole: dict[str, Any] = {"winners": no_winners(case, H)}
        parts: list[dict[str, Any]] = [{"winners": no_winners(case, heads)} for _ in range(ranks)]
        for layer in range(max(1, layers)):
            if layers and not layer:
                whole["votes"] = votes_of(case, layers)
                for part in parts:
                    part["votes"] = new_votes(heads, G // ranks, case.config, layers, N, case.q.device)
            check_layer(replace(case, q=case.q.roll(layer, -1)), ranks, impl, whole, parts)
            found = [part["winners"] for part in parts]
            joined = torch.cat(found, 1) if by_head else found[0]
            assert torch.equal(joined, whole["winners"]) and (by_head or all(torch.equal(x, joined) for x in found))


def no_winners(case: Case, heads: int) -> torch.Tensor:
    """Of half of the queries."""
    return torch.full(winners_shape(heads, case.config, -(-len(case.q) // 2)), -1, dtype=torch.int32)


def check_layer(case: Case, ranks: int, impl: str, whole: dict[str, Any], parts: Sequence[dict[str, Any]]) -> None:
    """`whole` are one launch's votes and winners, `parts` those of the ranks."""
    expected_THD, expected = reattention(*case.arguments(), impl=impl, return_selection=True, **whole)
    found = on_ranks(case, ranks, impl, parts, return_selection=True)
    assert torch.equal(torch.cat([out for out, _ in found], 1), expected_THD)
    scopes = [as_list(selection) for _, selection in found]
    if case.config.span_scope == "kv_head":
        scopes = [[scope for part in scopes for scope in part]]
    for selection in scopes:
        assert [s.tolist() for s in selection] == [s.tolist() for s in as_list(expected)]


@pytest.mark.parametrize("seed", range(8))
def test_random_steps_are_those_of_one_launch(seed: int) -> None:
    """Heads are doubled, so that they can be dealt out; beyond what a decode step sorts in registers, too."""
    case = random_case(seed, head_dims=(8, 16))
    doubled = {
        name: torch.cat([x, x.roll(1, -1)], dim)
        for name, x, dim in (("q", case.q, 1), ("k_cache", case.k_cache, 0), ("v_cache", case.v_cache, 0))
    }
    check(replace(case, **doubled), 2)


def test_lengths_around_dense_size() -> None:
    config = ReAttentionConfig(3, 8, 4, 4, 3, dense_size=50)
    for dtype, ranks, n, T in (
        (torch.float32, 2, 49, 1),
        (torch.float16, 4, 51, 1),
        (torch.float16, 2, 100, 1),
        (torch.float32, 4, 52, 5),
        (torch.float16, 2, 100, 3),
    ):
        check(make_case(config, n, T=T, H=8, G=4, dtype=dtype, seed=n + T), ranks, ("triton",))


@pytest.mark.parametrize("span_scope", ["layer", "kv_head"])
def test_votes_of_earlier_layers_are_those_of_all_ranks(span_scope: str) -> None:
    for H in (8, 40):  # by either kernel
        check(make_case(ReAttentionConfig(3, 8, 4, 4, 3, span_scope=span_scope), 100, H=H, G=4), 2, layers=3)


def test_heads_that_vote_alone_gather_nothing() -> None:
    config = ReAttentionConfig(3, 8, 4, 4, 3, span_scope="kv_head")
    for T in (1, 3):
        check(make_case(config, 60, T=T, H=4, G=2), 2)


def test_chunks_that_share_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """In two launches, in one of which some are dense; the length is read from memory as in a captured step."""
    monkeypatch.setattr(plan, "MAX_CHUNKS", 2)
    case = make_case(ReAttentionConfig(3, 8, 2, 4, 4, dense_size=40), 46, T=11, H=4, G=2, dtype=torch.float16)
    case.cos, case.sin = rope_table(60, 16)
    expected_THD = reattention(*case.arguments(), impl="triton", chunk_size=3)
    in_memory = replace(case, seq_len=torch.tensor([46], dtype=torch.int32))  # type: ignore[arg-type]
    found = on_ranks(in_memory, 2, "triton", chunk_size=3)
    assert torch.equal(torch.cat(found, 1), expected_THD)


def test_equal_votes_across_ranks_go_to_the_lowest_key() -> None:
    """All keys have the same score for all heads, or each head of each rank its own favourite."""
    config = ReAttentionConfig(1, 4, 3, 2, 5)
    for T in (1, 3):
        case = make_case(config, 90, T=T, H=4, G=4)
        case.k_cache[:, :90] = 0.0
        check(case, 4)
        for g in range(4):
            case.k_cache[g, 70 - 20 * g : 90 : 7] = case.q[0, g]
        check(case, 2)


def test_as_many_winners_as_a_decode_step_sorts_and_more() -> None:
    """What is sorted in registers is decided by the heads of all ranks, as on one device."""
    for num_heads in (32, 40):
        check(make_case(ReAttentionConfig(2, 8, 4, 4, 5), 100, H=num_heads, G=4, D=8, largest=3), 4, ("triton",))


SMALL_TILES = SketchTiles(BLOCK_N=32, ROOM=32, SURVIVORS=128, LEAST=64, num_stages=2, LIVE_M=4)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "sketch_tiles", lambda _: SMALL_TILES)
    launch._workspaces.clear()


def check_sketched(case: Case, ranks: int, impls: tuple[str, ...] = ("triton", "torch")) -> None:
    """Each rank's sketches of its own keys leave output and selection what they are for all heads in one launch without
    any; so do caches that are far, of which only near rows and what is selected are read.
    """
    for impl in impls:
        parts = [part_of(case, rank, ranks) for rank in range(ranks)]
        sketches = [sketch_of(part, impl) for part in parts]
        check_layer(case, ranks, impl, {}, [{"sketch": sketch} for sketch in sketches])
        if impl == "torch":
            continue
        expected_THD = reattention(*case.arguments(), impl=impl)
        for keys in (False, True):
            options = [
                {"sketch": sketch, "near": near_of(part, keys, True)}
                for sketch, part in zip(sketches, parts, strict=True)
            ]
            found = on_ranks(far_case(case, keys, True), ranks, impl, options)
            assert torch.equal(torch.cat(found, 1), expected_THD)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("span_scope", ["layer", "kv_head"])
def test_steps_with_sketches_are_those_of_one_launch(span_scope: str) -> None:
    """Of few survivors and of many, of keys that all tie, in slices long enough to be looked at or not."""
    config = ReAttentionConfig(4, 8, 4, 4, 20, span_scope=span_scope)
    for seq_len, ranks, dtype, change in (
        (400, 2, torch.float16, few_stand_out),
        (200, 4, torch.float32, None),
        (150, 2, torch.float32, all_equal),
        (70, 2, torch.float16, None),
        (12, 2, torch.float32, None),
    ):
        case = real_case(config, seq_len, seq_len, dtype, H=8, G=4, D=16)
        check_sketched(case if change is None else changed(case, change), ranks)


@pytest.mark.usefixtures("small_tiles")
def test_only_the_search_has_room_for_sketches() -> None:
    """Where the vote is over all ranks' heads a step is two launches, of which the second attends."""
    case = changed(real_case(ReAttentionConfig(4, 8, 4, 4, 20), 300, 0, torch.float16, H=4, G=2, D=16), few_stand_out)
    check_sketched(case, 2, ("triton",))
    found = {
        key[3:5]: scratch.found
        for key, scratch in launch._workspaces.items()
        if isinstance(scratch, launch.DecodeScratch) and key[2].ranks == 2 and key[5] is not None
    }
    assert list(found) == [launch.SEARCH]
    assert 4 <= int(found[launch.SEARCH].min()) <= int(found[launch.SEARCH].max()) <= SMALL_TILES.SURVIVORS


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("change", CHANGES)
def test_keys_that_try_the_bounds_are_selected_exactly(change: Any) -> None:
    dtype = (torch.float32, torch.float16)[CHANGES.index(change) % 2]
    case = changed(real_case(ReAttentionConfig(4, 8, 4, 4, 20), 200, 2, dtype, H=6, G=2, D=16), change)
    check_layer(case, 2, "triton", {}, [{"sketch": sketch_of(part_of(case, rank, 2), "triton")} for rank in range(2)])


def test_more_winners_than_a_decode_step_sorts_have_no_sketches() -> None:
    """They are counted over the heads of all ranks."""
    case = real_case(ReAttentionConfig(4, 8, 4, 4, 20), 60, 0, H=40, G=4, D=16)
    options = [{"sketch": sketch_of(part_of(case, rank, 4), "triton")} for rank in range(4)]
    with pytest.raises(InputError, match="40 heads vote with 4 winners each, expected at most 128 winners"):
        on_ranks(case, 4, "triton", options)
