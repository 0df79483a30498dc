"""Caches that are far, in Triton's interpreter: local parts come from rows that are near, all else from the cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import make_case, random_case, votes_of
from near_cases import check_near, far_case, near_of
from rows_cases import Inputs
from sketch_cases import found, real_case, sketch_of

from minirea.errors import InputError
from minirea.kernels import Near, ReAttentionConfig, reattention, winners_shape
from minirea.kernels.fused import launch, plan
from minirea.kernels.fused.arguments import SketchTiles
from minirea.kernels.steps import matvec, reference, rows


def test_random_steps_are_those_over_a_near_cache() -> None:
    for seed in range(6):
        case = random_case(seed, head_dims=(8,), longest_middle=60)
        case = case if seed % 2 else replace(case, q=case.q[-1:])
        check_near(case)
    streaming = ReAttentionConfig(4, 8, 0, 4, 0, dense_size=20)
    for T in (1, 6):
        check_near(make_case(streaming, 50, T=T))


def test_chunks_of_one_launch_share_near_values() -> None:
    """Dense ones before others, wherever the rows begin anew; in half precision all chunks are one launch."""
    config = ReAttentionConfig(4, 40, 2, 8, 9, dense_size=90)
    for seq_len, T, dtype in ((110, 40, torch.float16), (230, 30, torch.float32)):
        case = make_case(config, seq_len, T=T, H=2, D=16, dtype=dtype, seed=seq_len)
        check_near(case, chunk_size=16)


def test_steps_with_sketches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Survivors, and slices with too many of them, are scored where the cache lies."""
    monkeypatch.setattr(plan, "sketch_tiles", lambda _: SketchTiles(32, 32, 128, 64, num_stages=2, LIVE_M=4))
    launch._workspaces.clear()
    for G, span_scope in ((1, "layer"), (2, "kv_head")):
        case = real_case(ReAttentionConfig(4, 8, 4, 4, 20, span_scope=span_scope), 150, G, H=4, G=G, D=16)
        check_near(case, sketch=sketch_of(case, "triton"))
        case.k_cache[:, : case.seq_len] = 1.0
        check_near(case, sketch=sketch_of(case, "triton"))


@pytest.mark.parametrize("seq_len", [13, 14, 45])
def test_short_slices_of_far_keys_are_looked_at_by_their_sketches(
    monkeypatch: pytest.MonkeyPatch, seq_len: int
) -> None:
    """From one key on, also where fewer tiles than winners leave no threshold; near keys would be scored."""
    tiles = SketchTiles(32, 32, 128, 256, num_stages=2, LIVE_M=4)
    monkeypatch.setattr(plan, "sketch_tiles", lambda _: tiles)
    case = real_case(ReAttentionConfig(4, 8, 4, 4, 20), seq_len, seq_len, torch.float16, H=4, G=2, D=16)
    for keys in (False, True):
        launch._workspaces.clear()
        check_near(case, sketch=sketch_of(case, "triton"), kinds=[(keys, True)])
        assert all((survivors <= tiles.SURVIVORS) == keys for survivors in found(case)[0])


@pytest.mark.parametrize(("span_scope", "keys", "H"), [("layer", False, 4), ("kv_head", True, 4), ("layer", False, 40)])
def test_steps_with_votes(span_scope: str, keys: bool, H: int) -> None:
    """From the dense bound on, by either kernel: the same output, votes and winners."""
    votes = {"vote_size": 4, "vote_window": 3, "carry_votes": True}
    config = ReAttentionConfig(3, 9, 4, 4, 4, span_scope=span_scope, **votes, dense_size=20)
    for seq_len in (20, 21, 40):
        case, found = make_case(config, seq_len, H=H, D=8), []
        for this, near in ((case, None), (far_case(case, keys, True), near_of(case, keys, True))):
            votes_of_step, winners = votes_of(case, 2), torch.full((6, *winners_shape(H, config, 1)[1:]), -1).int()
            options = {"near": near, "winners": winners, "votes": votes_of_step}
            outs = [reattention(*this.arguments(), impl="triton", **options) for _ in range(2)]
            found.append((*outs, winners, *votes_of_step))
        assert all(map(torch.equal, *found)) and not found[0][1].isnan().any()
        assert bool((found[0][2] >= 0).any()) == (seq_len > 20)


@pytest.mark.parametrize("seq_len", [3, 13])
def test_writing_fills_near_rows_as_the_twins_do(seq_len: int) -> None:
    """Around their end, without touching any other row."""
    H, G, D, E = 4, 2, 8, 32
    r = Inputs(torch.float32, "cpu", seed=seq_len)
    at = torch.tensor([seq_len], dtype=torch.int32)
    qkv_TXD, x_E, norm_E, w = (
        r.normal(3 * (H + 2 * G), D).view(3, H + 2 * G, D),
        r.normal(E),
        r.normal(E),
        r.normal(64, E),
    )
    for keys, values in ((True, True), (False, True)):
        found = []
        for kernels, steps in ((rows, matvec), (reference, reference)):
            cache, size = torch.full((4, G, 40, D), torch.nan), 12
            near = torch.full((4, G, size, D), torch.nan)
            chosen = [Near(k if keys else None, v if values else None) for k, v in near.split(2)]
            kernels.write_kv(qkv_TXD, cache[0], cache[1], at, chosen[0])
            q_HD = torch.empty(H, D)
            steps.norm_qkv(x_E, norm_E, w, None, 1e-5, at, q_HD, cache[2], cache[3], chosen[1])
            found.append((cache, near))
        for ours, twin in zip(*found, strict=True):
            assert torch.equal(ours.isnan(), twin.isnan())
            torch.testing.assert_close(ours.nan_to_num(), twin.nan_to_num(), rtol=1e-5, atol=1e-6)
        cache, near = found[0]
        for x, there in ((0, keys), (1, values)):
            assert torch.equal(near[x, :, (seq_len - 1) % size], cache[x, :, seq_len - 1]) == there


def test_near_rows_that_do_not_fit_are_refused() -> None:
    case = make_case(ReAttentionConfig(4, 8, 2, 4, 4), 60, T=6)
    near = near_of(case, False, True)
    tables = case.arguments()
    for bad, message in (
        (near.v[:, :11].clone(), r"near.v is .* \[2, 11, 16\], expected torch.float32 \[2, at least 16, 16\]"),
        (near.v.half(), "near.v is torch.float16"),
        (near.v.transpose(0, 1).contiguous().transpose(0, 1), "not contiguous"),
        (near.v[:1], r"\[1, "),
    ):
        with pytest.raises(InputError, match=message):
            reattention(*tables, impl="triton", chunk_size=2, near=Near(None, bad))
