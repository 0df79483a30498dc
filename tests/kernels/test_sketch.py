"""Sketches of keys: the bounds against float64, and that a step with a sketch selects what one without does."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from kernel_cases import Case, as_list, error, make_case, plain_attention, random_case
from sketch_cases import CHANGES, Change, changed, real_case, sketch_of

from minirea.errors import InputError
from minirea.kernels import ReAttentionConfig, Sketch, new_sketch, reattention, reference, sketch_keys
from minirea.kernels.sketch import SLACK, hadamard, sketch_bytes, width

CONFIG = ReAttentionConfig(4, 8, 4, 4, 20)


def rotated(x: torch.Tensor) -> torch.Tensor:
    """R x in float64."""
    C = width(x.shape[-1])
    return x.double() @ hadamard(x.shape[-1], C, x.device).double() / C**0.5


def check_bounds(case: Case, sketch: Sketch) -> None:
    """Every score in float64, and as torch sums it in float32, lies within the bounds of its sketch."""
    (_, H, D), (G, _, _) = case.q.shape, case.k_cache.shape
    q_GRD, n = case.q[0].view(G, H // G, D), case.seq_len
    x_GRC, norm_GR1 = reference.quantize_queries(q_GRD)
    lower_GRN, upper_GRN = reference.score_bounds(x_GRC, norm_GR1, sketch, 0, n)
    unit_GR1 = SLACK * q_GRD.double().norm(dim=-1, keepdim=True) / norm_GR1
    shared_GR1 = rotated(q_GRD) @ sketch.mean.double()[..., None]
    for scores in (q_GRD.double() @ case.k_cache[:, :n].double().mT, q_GRD.float() @ case.k_cache[:, :n].float().mT):
        score_GRN = (scores.double() - shared_GR1) / unit_GR1
        assert torch.all((lower_GRN.double() <= score_GRN) & (score_GRN <= upper_GRN.double()))


def check_selection(case: Case, sketch: Sketch) -> None:
    """Selection and output are those of a step without a sketch."""
    out_THD, selection = reattention(*case.arguments(), impl="torch", return_selection=True)
    found_THD, found = reattention(*case.arguments(), impl="torch", return_selection=True, sketch=sketch)
    assert [s.tolist() for s in as_list(found)] == [s.tolist() for s in as_list(selection)]
    assert torch.equal(found_THD, out_THD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("change", [None, *CHANGES])
def test_bounds_hold(dtype: torch.dtype, change: Change | None) -> None:
    for seed, D in enumerate((2, 16, 20, 64, 80, 128, 256, 300)):
        case = real_case(CONFIG, 300, seed, dtype, H=4, G=2, D=D)
        case = case if change is None else changed(case, change, seed)
        check_bounds(case, sketch_of(case, "torch", case.seq_len))
        zero_mean = new_sketch(2, D, case.k_cache.shape[1], case.q.device)
        sketch_keys(case.k_cache, zero_mean, 0, case.seq_len, impl="torch")
        check_bounds(case, zero_mean)


def test_bounds_are_worth_something() -> None:
    """Of keys as real ones are, few survive, whatever channel is large in all of them."""
    for change in (None, CHANGES[0]):
        case = real_case(CONFIG, 4000, 0, torch.bfloat16, H=8, G=2, D=128)
        case = case if change is None else changed(case, change)
        queries = reference.quantize_queries(case.q[0].view(2, 4, 128))
        lower, upper = reference.score_bounds(*queries, sketch_of(case, "torch"), 4, 3992)
        survivors = (upper >= lower.topk(4).values[..., -1:]).sum(-1)
        assert survivors.min() >= 4 and survivors.max() <= 40


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_selection_of_real_keys_is_the_exact_one(change: Change | None) -> None:
    for seed, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16)):
        case = real_case(CONFIG, 1500, seed, dtype, H=8, G=2, D=64)
        case = case if change is None else changed(case, change, seed)
        check_selection(case, sketch_of(case, "torch"))


@pytest.mark.parametrize("tile", [1, 1 << 20])
def test_selection_equals_the_oracle(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers, of which many tie; dense, streaming and selecting steps; with room for few survivors, too."""
    monkeypatch.setitem(reference.TILE_SCORES, "cpu", tile)
    for seed in range(80):
        monkeypatch.setattr(reference, "SURVIVORS", random.Random(seed).choice([9, 40, 1024]))
        case = random_case(seed, longest_middle=600)
        case = replace(case, q=case.q[-1:])
        exact_THD, scopes = case.oracle()
        out_THD, found = reattention(
            *case.arguments(), impl="torch", return_selection=True, sketch=sketch_of(case, "torch")
        )
        assert [s.tolist() for s in as_list(found)] == [s.tolist() for s in scopes]
        assert error(out_THD, exact_THD) <= 2 * error(plain_attention(case, scopes), exact_THD) + 1e-6


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_keys_that_int8_cannot_hold_are_always_scored(value: float) -> None:
    case = real_case(CONFIG, 300, 0, torch.bfloat16)
    case.k_cache[:, 100, 3] = value
    sketch = sketch_of(case, "torch", 299)
    scale_GN, error_GN = reference.scales_of(sketch, 0, 299)
    assert torch.all(scale_GN[:, 100] == 0) and torch.all(error_GN[:, 100] == torch.inf)
    assert sketch.mean.isfinite().all()
    if abs(value) != 3e38:  # which makes a mean that is far from all keys
        assert error_GN[:, torch.arange(299) != 100].isfinite().all()


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e20, torch.inf, torch.nan])
def test_queries_that_integers_cannot_hold_read_all_keys(value: float) -> None:
    x_GRC, norm_GR1 = reference.quantize_queries(torch.full((1, 2, 16), value))
    assert torch.all(x_GRC == 0) and torch.all(norm_GR1 == torch.inf)


@pytest.mark.parametrize("at_once", [1, 7, 60])
def test_keys_are_sketched_some_at_a_time(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(CONFIG, 60)
    expected = sketch_of(case, "torch")
    monkeypatch.setattr(reference, "SKETCHED_AT_ONCE", at_once)
    assert all(map(torch.equal, sketch_of(case, "torch"), expected))
    check_selection(case, expected)


def test_a_chunk_needs_no_sketch() -> None:
    case = make_case(CONFIG, 200, T=3)
    sketch = sketch_of(case, "torch")
    expected = reattention(*case.arguments(), impl="torch")
    assert torch.equal(reattention(*case.arguments(), impl="torch", sketch=sketch), expected)


def test_bytes_are_those_of_the_tensors() -> None:
    for G, D, N in ((2, 64, 100), (3, 80, 17), (1, 8, 1)):
        assert sketch_bytes(G, D, N) == sum(x.nbytes for x in new_sketch(G, D, N, torch.device("cpu")))


def test_a_sketch_that_does_not_fit_is_named() -> None:
    case = make_case(CONFIG, 50)
    sketch = sketch_of(case, "torch")
    for wrong, message in (
        (
            sketch._replace(codes=sketch.codes[:, :40]),
            r"sketch\.codes is torch\.int8 \[2, 40, 32\], not contiguous, exp",
        ),
        (
            sketch._replace(scales=sketch.scales.long()),
            r"sketch\.scales is torch\.int64 .* expected torch\.int32 \[2, 53",
        ),
        (sketch._replace(mean=sketch.mean[:1]), r"sketch\.mean is torch\.float32 \[1, 32\], expected .* \[2, 32\]"),
    ):
        with pytest.raises(InputError, match=message):
            reattention(*case.arguments(), impl="torch", sketch=wrong)
    with pytest.raises(InputError, match="the keys to sketch are 5 to 54, expected a range within the cache's 53"):
        sketch_keys(case.k_cache, sketch, 5, 54)
