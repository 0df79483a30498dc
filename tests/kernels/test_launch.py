"""How steps are launched, without launching them: how work is divided, and what scratch memory is kept."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from minirea.errors import InputError
from minirea.kernels import (
    Gather,
    ReAttentionConfig,
    check_sketched,
    chunks_of_step,
    new_sketch,
    new_votes,
    scratch_bytes,
)
from minirea.kernels.fused import launch, plan  # (which imports triton)

META = torch.device("meta")


@pytest.mark.parametrize(
    ("units", "programs", "slices"),
    [
        (512, 132, 1),  # four chunks of 512 with 32/8 heads
        (144, 132, 2),  # with 9/3 heads: one slice would leave 120 programs idle for half of the time
        (128, 132, 1),
        (36, 132, 2),
        (32, 132, 4),  # four chunks of a tail, 32/8 heads
        (12, 132, 8),  # 9/3 heads
        (1, 132, 128),
        (1, 1, 1),
    ],
)
def test_slices_even_out_the_turns(units: int, programs: int, slices: int) -> None:
    assert plan.chunk_slices(units, programs, 2048) == slices
    assert plan.chunk_slices(units, programs, 1) == 1


@pytest.mark.parametrize(
    ("heads", "most", "chunks"),
    [
        ((32, 8, 128), 12, 4),  # 512 blocks of rows, four rounds of 132 but for 16; no more chunks do better
        ((9, 3, 64), 12, 11),  # 36 blocks a chunk: 396 are three full rounds
        ((9, 3, 64), 8, 7),
        ((4, 2, 64), 12, 8),
        ((16, 8, 128), 8, 4),
        ((24, 8, 128), 5, 4),
    ],
)
def test_chunks_of_a_step_fill_rounds(
    monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int, int], most: int, chunks: int
) -> None:
    monkeypatch.setattr(plan, "num_programs", lambda *_: 132)
    assert chunks_of_step(*heads, 512, META, 4, most) == chunks


def test_a_slice_never_costs_more_than_it_saves() -> None:
    for programs in (1, 5, 78, 114, 132):
        for units in range(1, 600):
            slices = plan.chunk_slices(units, programs, 512)
            assert slices & (slices - 1) == 0
            assert math.ceil(units * slices / programs) / slices <= math.ceil(units / programs)


HEADS = [
    (32, 8, 128, torch.bfloat16),
    (9, 3, 64, torch.bfloat16),
    (40, 8, 16, torch.float16),
    (6, 2, 32, torch.float32),
]
CONFIGS = [
    ReAttentionConfig(32, 512, 4, 32, 128),
    ReAttentionConfig(32, 512, 4, 32, 128, span_scope="kv_head", dense_size=4096),
    ReAttentionConfig(32, 512, 2, 32, 16),
    ReAttentionConfig(3, 512, 0, 32, 0),
]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("steps", "sketched", "carries", "ranks"),
    [
        ([(1, 512)], False, False, 1),
        ([(1, 512)], True, False, 1),
        ([(70, 16), (13, 4)], True, False, 1),
        ([(70, 16), (13, 4)], True, False, 2),
        ([(2048, 512)], False, False, 1),
        ([(5000, 512), (31, 8)], False, False, 1),
        ([(1, 1)], False, True, 1),
    ],
)
def test_scratch_bytes_are_those_of_all_steps(
    monkeypatch: pytest.MonkeyPatch,
    heads: tuple[int, int, int, torch.dtype],
    config: ReAttentionConfig,
    steps: Iterable[tuple[int, int]],
    sketched: bool,
    carries: bool,
    ranks: int,
) -> None:
    num_heads, num_kv_heads, head_dim, dtype = heads
    monkeypatch.setattr(launch, "_workspaces", {})
    monkeypatch.setattr(plan, "INTERPRETED", True)  # takes tensors that are not on a GPU
    monkeypatch.setattr(plan, "num_programs", lambda *_: 132)
    monkeypatch.setattr(launch, "launch", lambda *_, **__: None)
    monkeypatch.setattr(launch.launching, "start", lambda *_: None)
    monkeypatch.setattr(launch.launching, "starts_early", lambda _: True)
    k_cache = torch.empty(num_kv_heads, 10_000, head_dim, dtype=dtype, device=META)
    table = torch.empty(20_000, head_dim // 2, device=META)
    gather = Gather(lambda x: x.new_empty(ranks * len(x), x.shape[1]), ranks) if ranks > 1 else None
    for longest, chunk_size in steps:
        for T in {*range(1, min(longest, 80) + 1), *range(1, longest + 1, 256), *range(256, longest + 1, 256)}:
            q_THD = torch.empty(T, num_heads, head_dim, dtype=dtype, device=META)
            votes = new_votes(num_heads, num_kv_heads, config, 2, 10_000, META) if carries else None
            given = q_THD, k_cache, k_cache, 9_000, table, table, config
            launch.reattention_triton(*given, chunk_size=chunk_size, gather=gather, votes=votes)
            if T == 1:
                launch.reattention_triton(*given[:3], 500, *given[4:6], config.of_dense_step, gather=gather)
            if sketched and plan.Layer.of(q_THD, k_cache, config, gather).decodes(T):
                sketch = new_sketch(num_kv_heads, head_dim, 10_000, META)
                launch.reattention_triton(*given, gather=gather, sketch=sketch)
    workspaces = list(launch._workspaces.values())
    kept = [x for x in workspaces if isinstance(x, torch.Tensor)]
    kinds = {"ranks": ranks, "sketched": sketched, "carries": carries}
    expected = scratch_bytes(num_heads, num_kv_heads, head_dim, dtype, config, 10_000, steps, META, **kinds)
    assert expected == sum(x.nbytes for x in kept)
    stored = {id(x) for workspace in workspaces if isinstance(workspace, tuple) for x in workspace}
    stored.discard(id(None))  # of a sketch that there is not
    assert stored == {id(x) for x in kept}


@pytest.mark.parametrize(
    ("fields", "ranks", "counted"),
    [
        ({}, 1, True),
        ({"span_scope": "kv_head"}, 1, True),
        ({}, 2, False),  # whose heads, 64, have 256 winners
        ({"max_spans": plan.MAX_ELECTED}, 1, True),
        ({"max_spans": plan.MAX_ELECTED + 1}, 1, False),
        ({"span_top_k": 2}, 2, True),
        ({"span_top_k": 8}, 1, False),  # 32 heads have 256 winners
        ({"span_top_k": 8, "span_scope": "kv_head"}, 1, True),
    ],
)
def test_which_steps_with_votes_take_the_decode_kernel(fields: dict[str, Any], ranks: int, counted: bool) -> None:
    config = replace(ReAttentionConfig(32, 512, 4, 32, 16), **fields)
    assert plan.Layer(32, 8, 128, torch.bfloat16, config, ranks).counts() == counted


def test_more_winners_than_a_decode_step_sorts_take_no_sketch() -> None:
    """40 heads count as 64, which with 4 winners each are 256."""
    config = ReAttentionConfig(32, 512, 4, 32, 64)
    check_sketched(32, 8, 128, config)
    check_sketched(40, 8, 128, replace(config, span_scope="kv_head"))
    message = "40 heads vote with 4 winners each, expected at most 128 winners with sketches"
    with pytest.raises(InputError, match=message):
        check_sketched(40, 8, 128, config)
