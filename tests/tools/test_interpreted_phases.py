"""The phases that `bench.py kernel` times, in Triton's interpreter: `python -m pytest -m interpret`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import Case, make_case
from kernel_phases import attend_rows, launch_phase, phases_of, recorded

from minirea.kernels import ReAttentionConfig, reattention

WRITTEN = ("candidate", "kept", "num_kept", "selection", "num_far", "partial_acc", "partial_max", "partial_sum")


def case_of(T: int, dtype: torch.dtype, span_scope: str = "layer", max_spans: int = 40, seed: int = 0) -> Case:
    config = ReAttentionConfig(3, 9, 2, 4, max_spans, span_scope=span_scope)
    case = make_case(config, 200, T=T, dtype=dtype, seed=seed)
    if T == 1:
        case.seq_len = torch.tensor([200], dtype=torch.int32)  # type: ignore[assignment]
    return case


def fused(case: Case) -> Any:
    return reattention(*case.arguments(), impl="triton")


@pytest.mark.parametrize("span_scope", ["layer", "kv_head"])
@pytest.mark.parametrize("max_spans", [3, 40])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_phases_of_decode_one_by_one_are_the_fused_launch(dtype: torch.dtype, max_spans: int, span_scope: str) -> None:
    case = case_of(1, dtype, span_scope, max_spans)
    caches = case.k_cache, case.v_cache
    expected = fused(case)
    launch = recorded(lambda: fused(case))
    for written in (launch.arguments["out_ptr"], *(getattr(launch.arguments["scratch"], name) for name in WRITTEN)):
        written.fill_(-7)
    phases = phases_of(launch)
    order = ["score, pick", "merge, sort", "select, locate", "attend, local part", "attend, far part", "combine"]
    assert launch.kernel == "decode_kernel" and list(phases) == [*order, "an empty launch"]
    for name in phases:
        if name != "combine":
            phases[name](*caches)
    # The fused launch attends to both parts before it stores anything.
    both = launch.arguments | {"LOCAL": True, "FAR": True}
    launch_phase(attend_rows, launch.arguments["workers"], both, *caches)
    phases["combine"](*caches)
    assert torch.equal(launch.arguments["out_ptr"], expected)


@pytest.mark.parametrize("span_scope", ["layer", "kv_head"])
@pytest.mark.parametrize("T", [1, 5])
def test_scoring_alone_finds_the_candidates_of_the_fused_launch(T: int, span_scope: str) -> None:
    """Also of caches other than those that the launch was recorded with."""
    case, other = (case_of(T, torch.float16, span_scope, seed=seed) for seed in (0, 1))
    launch = recorded(lambda: fused(case))
    candidate = launch.arguments["scratch"].candidate
    for k_cache in (case.k_cache, other.k_cache):
        case.k_cache = k_cache
        candidate.fill_(-7)
        fused(case)
        expected = candidate.clone()
        candidate.fill_(-7)
        phases_of(launch)["score, pick"](k_cache, case.v_cache)
        assert torch.equal(candidate, expected) and not (expected == -7).all()
