# mypy: disable-error-code="no-untyped-def"
"""Sketches in Triton's interpreter, as one program: what they are, what they leave to be scored, what is selected."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import Case, as_list, error, plain_attention, random_case
from sketch_cases import CHANGES, Change, all_equal, changed, few_stand_out, found, real_case, sketch_of

from minirea.errors import InputError
from minirea.kernels import ReAttentionConfig, Sketch, new_sketch, reattention, reference, sketch_keys
from minirea.kernels.fused import launch, plan
from minirea.kernels.fused.arguments import SketchTiles

TILES = SketchTiles(BLOCK_N=32, ROOM=32, SURVIVORS=128, LEAST=64, num_stages=2, LIVE_M=4)
CONFIG = ReAttentionConfig(4, 8, 4, 4, 20)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "sketch_tiles", lambda _: TILES)
    launch._workspaces.clear()


def step(case: Case, sketch: Sketch | None, **options: Any) -> tuple[torch.Tensor, list[list[int]]]:
    out_THD, selection = reattention(*case.arguments(), impl="triton", return_selection=True, sketch=sketch, **options)
    return out_THD, [s.tolist() for s in as_list(selection)]


def check_equal(case: Case, steps: int = 1) -> None:
    """Bit for bit what a step without a sketch does, also if it is repeated."""
    expected = step(case, None)
    sketch = sketch_of(case, "triton")
    for _ in range(steps):
        out_THD, scopes = step(case, sketch)
        assert scopes == expected[1]
        assert torch.equal(out_THD.nan_to_num(), expected[0].nan_to_num())


@pytest.mark.parametrize("D", [20, 64])
def test_sketches_equal_their_twins(D: int) -> None:
    """By a unit at most, where float32 sums round to either side; their errors say so."""
    for seed, change in enumerate((None, *CHANGES)):
        dtype = (torch.float32, torch.float16)[seed % 2]
        case = real_case(CONFIG, 70, seed, dtype, H=2, G=2, D=D)
        case = case if change is None else changed(case, change, seed)
        ours, twin = (sketch_of(case, impl, 70) for impl in ("triton", "torch"))
        assert torch.equal(ours.mean, twin.mean)
        differ = (ours.codes.int() - twin.codes.int()).abs()
        assert int(differ.max()) <= 1 and float((differ > 0).float().mean()) < 1e-2
        for a, b in zip(reference.scales_of(ours, 0, 70), reference.scales_of(twin, 0, 70), strict=True):
            torch.testing.assert_close(a, b, rtol=2**-6, atol=0)
        assert torch.all(ours.scales[:, 70:] == -1)  # nothing beyond


def test_ranges_of_keys_make_the_sketches_of_all() -> None:
    for G in (1, 3):
        case = real_case(CONFIG, 80, 0, H=G, G=G, D=16)
        whole = sketch_of(case, "triton", 80)
        parts = sketch_of(case, "triton", 0)
        parts.mean.copy_(whole.mean)
        for start, stop in ((0, 1), (1, 70), (70, 79), (79, 80)):
            sketch_keys(case.k_cache, parts, start, stop, impl="triton")
        assert all(map(torch.equal, parts, whole))


def test_few_survive_and_all_are_scored_where_many_do() -> None:
    case = real_case(CONFIG, 400, 1, torch.float16, H=4, G=1, D=64)
    for change, scored in ((None, False), (few_stand_out, False), (all_equal, True)):
        check_equal(case if change is None else changed(case, change), 1 if change else 2)
        slices, most = found(case)
        assert all((survivors > most) == scored and survivors >= 4 for survivors in slices)


@pytest.mark.parametrize("change", CHANGES)
def test_selection_is_the_exact_one(change: Change) -> None:
    dtype = (torch.float32, torch.float16)[CHANGES.index(change) % 2]
    check_equal(changed(real_case(CONFIG, 200, 2, dtype, H=6, G=2, D=32), change))


@pytest.mark.parametrize("seed", range(8))
def test_equals_oracle_on_random_shapes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers, of which many tie, dense and streaming steps, one slice or several, room for few tiles or survivors."""
    r = random.Random(seed)
    tiles = TILES._replace(ROOM=r.choice([4, 32]), SURVIVORS=r.choice([16, 128]), LEAST=r.choice([1, 64]))
    monkeypatch.setattr(plan, "sketch_tiles", lambda _: tiles)
    monkeypatch.setattr(plan, "MAX_CANDIDATES", r.choice([256, 8192]))
    plan.plan_decode.cache_clear()
    case = random_case(seed, head_dims=(8, 16, 20, 32))
    dtype = r.choice([torch.float32, torch.float16])
    case = replace(case, **{name: getattr(case, name).to(dtype) for name in ("q", "k_cache", "v_cache")})
    case.q = case.q[-1:]
    sketch = sketch_of(case, "triton")
    if not launch.Layer.of(case.q, case.k_cache, case.config).decodes(1):
        with pytest.raises(InputError, match="expected at most 128 winners with sketches"):
            step(case, sketch)
        return
    exact_THD, scopes = case.oracle()
    out_THD, selection = step(case, sketch)
    assert selection == [s.tolist() for s in scopes]
    limit = 2 * error(plain_attention(case, scopes), exact_THD) + torch.finfo(dtype).eps
    assert error(out_THD, exact_THD) <= limit


@pytest.mark.parametrize("middle", [63, 64, 97, 161])
def test_middles_around_whole_tiles(middle: int) -> None:
    """What lies in the tile behind the middle is better than all before it, and must not win."""
    case = real_case(CONFIG, 12 + middle, middle, H=4, G=2, D=16)
    case.k_cache[:, 4 + middle :] *= 16
    case.k_cache[:, :4] *= 16
    check_equal(case)
    if middle >= 160:  # in fewer tiles than winners, all keys survive
        assert found(case)[0][0] <= TILES.SURVIVORS


def test_one_sketch_serves_steps_that_follow_each_other() -> None:
    """From memory, as a captured launch reads it. Keys are sketched when the first of them is before the local part."""
    case = real_case(CONFIG, 140, 5, H=2, G=1, D=16)
    sketch = new_sketch(1, 16, case.k_cache.shape[1], case.q.device)
    sketch.scales.fill_(-1)  # NaN, NaN
    sketch_keys(case.k_cache, sketch, 0, 120, new_mean=True, impl="triton")
    for n in (121, 128, 129, 136):
        if n == 129:
            sketch_keys(case.k_cache, sketch, 120, 128, impl="triton")
        now = replace(case, seq_len=torch.tensor([n], dtype=torch.int32))  # type: ignore[arg-type]
        out_THD = reattention(*now.arguments(), impl="triton", sketch=sketch)
        assert torch.equal(out_THD, reattention(*replace(case, seq_len=n).arguments(), impl="triton"))
        assert found(case)[0][0] <= TILES.SURVIVORS


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of sums that overflow
@pytest.mark.parametrize("value", [torch.inf, 3e38])
def test_keys_that_int8_cannot_hold_are_scored(value: float) -> None:
    case = real_case(CONFIG, 300, 0)
    case.k_cache[:, 100:103, 3] = value
    case.q[..., 3] = 0.5
    check_equal(case)


def test_sizes_of_a_real_model_are_those_that_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes for a GPU, over a slice just long enough for them."""
    monkeypatch.undo()
    tiles = plan.sketch_tiles(64)
    case = real_case(CONFIG, 12 + tiles.LEAST, 0, H=2, G=1, D=64)
    check_equal(case)
    assert all(4 <= survivors <= tiles.SURVIVORS for survivors in found(case)[0])
