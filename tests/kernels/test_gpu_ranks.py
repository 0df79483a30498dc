"""Steps of several ranks on one GPU, one rank after the other, with sketches and caches in the host's memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import as_list
from near_cases import far_case, near_of, on_host
from rank_cases import on_ranks, part_of
from sketch_cases import CHANGES, Change, changed, real_case, sketch_of

from minirea.kernels import ReAttentionConfig, reattention

pytestmark = pytest.mark.gpu
ROWS = 512  # near ones
HALF = torch.bfloat16
CONFIG = ReAttentionConfig(32, 256, 4, 32, 24)
# Heads, key/value heads, head_dim, dtype, ranks, scope.
SHAPES: list[tuple[int, int, int, torch.dtype, int, str]] = [
    (24, 8, 128, HALF, 2, "layer"),
    (16, 8, 64, HALF, 4, "layer"),
    (4, 2, 64, torch.float32, 2, "kv_head"),
]


@pytest.mark.parametrize(("H", "G", "D", "dtype", "ranks", "span_scope"), SHAPES)
def test_sketches_and_far_caches_change_nothing(
    H: int, G: int, D: int, dtype: torch.dtype, ranks: int, span_scope: str
) -> None:
    """Outputs are bit for bit those of ranks without; the selection is that of one launch for all heads."""
    config = replace(CONFIG, span_scope=span_scope)
    for seq_len in (270, 289, 9000, 60_001):
        case = real_case(config, seq_len, seq_len, dtype, H=H, G=G, D=D).on_gpu(dtype)
        _, selection = reattention(*case.arguments(), impl="triton", return_selection=True)
        expected = on_ranks(case, ranks, "triton", return_selection=True)
        scopes = [scope for _, found in expected for scope in as_list(found)]
        assert all(map(torch.equal, scopes, as_list(selection) * (ranks if span_scope == "layer" else 1)))
        parts = [part_of(case, rank, ranks) for rank in range(ranks)]
        sketches = [sketch_of(part, "triton") for part in parts]
        kinds: list[tuple[Any, list[dict[str, Any]], dict[str, Any]]] = [(case, [{"sketch": s} for s in sketches], {})]
        pairs = zip(sketches, parts, strict=True)
        far = [{"sketch": sketch, "near": near_of(part, True, True, None, ROWS)} for sketch, part in pairs]
        kinds.append((far_case(case, True, True), far, {"to_host": on_host}))
        for this, options, more in kinds:
            found = on_ranks(this, ranks, "triton", options, return_selection=True, **more)
            for (out_THD, selected), (expected_THD, wanted) in zip(found, expected, strict=True):
                assert torch.equal(out_THD, expected_THD)
                assert all(map(torch.equal, as_list(selected), as_list(wanted)))


@pytest.mark.parametrize("change", CHANGES)
def test_keys_that_try_the_bounds_are_selected_exactly(change: Change) -> None:
    case = changed(real_case(CONFIG, 30_000, 1, HALF, H=24, G=8, D=128).on_gpu(HALF), change)
    options = [{"sketch": sketch_of(part_of(case, rank, 2), "triton")} for rank in range(2)]
    pairs = zip(on_ranks(case, 2, "triton", options), on_ranks(case, 2, "triton"), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
