"""Decode steps that count the votes of earlier tokens, and what steps leave for later ones, on a GPU."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import Case, as_list, check_decode_steps, check_votes, decode_layers, make_case, votes_of

from minirea.kernels import ReAttentionConfig, count_winners, reattention, winners_shape

pytestmark = pytest.mark.gpu
HALF = torch.bfloat16
# Heads, key/value heads, head_dim, dtype, span_top_k, scope; the last two take the chunk kernel.
SHAPES = [
    (9, 3, 64, HALF, 2, "layer"),
    (9, 3, 64, HALF, 2, "kv_head"),
    (32, 8, 128, HALF, 4, "layer"),
    (4, 2, 64, torch.float32, 3, "layer"),
    (40, 1, 80, torch.float16, 2, "kv_head"),
    (40, 8, 128, HALF, 4, "layer"),
    (80, 1, 64, torch.float32, 4, "layer"),
]
WINDOW = 8


def layers_of(shape: tuple[Any, ...], capacity: int, num_layers: int, largest: int = 2) -> list[Case]:
    H, G, D, dtype, span_top_k, span_scope = shape
    votes = {"vote_size": 32, "vote_window": WINDOW, "carry_votes": True}
    config = ReAttentionConfig(4, 100, span_top_k, 16, 12, span_scope=span_scope, dense_size=400, **votes)
    cases = decode_layers(config, capacity, num_layers, H=H, G=G, D=D, largest=largest)
    return [case.on_gpu(dtype) for case in cases]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step has to write before it reads is NaN or out of bounds: its output, and scratch."""
    from minirea.kernels.fused import launch

    empty, scratch_of = torch.empty, launch.scratch_of

    def spoiled(tensor: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():  # which scratch that is kept may be of
            return tensor.fill_(torch.nan if tensor.is_floating_point() else (1 << 30) - 7)

    def spoiled_scratch(*arguments: Any) -> Any:
        scratch = scratch_of(*arguments)
        for name, tensor in scratch._asdict().items():
            if tensor is not None and name not in ("counters", "counts", "num_votes", "elected"):
                spoiled(tensor)
        return scratch

    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: spoiled(empty(*sizes, **options)))
    monkeypatch.setattr(launch, "scratch_of", spoiled_scratch)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_steps_in_a_row_select_what_the_oracle_does(shape: tuple[Any, ...]) -> None:
    """Chunks, the first of which is dense, then tokens, back and ahead by random numbers of tokens."""
    r = random.Random(str(shape))
    for largest in (1, 3):
        n, seq_lens = 440, []
        for _ in range(8):
            seq_lens += [n := n + 1 for _ in range(r.choice([1, 2, 5]))]
            n = max(10, min(1500, n + r.choice([-1, -2, -30, 1, 40, 600])))
        check_decode_steps(layers_of(shape, 1600, 2, largest), "triton", seq_lens, [(400, 30), (438, 38), (440, 2)])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_a_captured_graph_follows_seq_len(shape: tuple[Any, ...]) -> None:
    """Replays, each of which counts what the ones before left, give the bits of launches with that length, and these
    select what the torch path does.
    """
    layers = layers_of(shape, 20000, 3)
    seq_len = torch.tensor([9000], device="cuda", dtype=torch.int32)
    sizes = len(layers), *winners_shape(shape[0], layers[0].config, 2 * WINDOW)
    winners = torch.full(sizes, -1, dtype=torch.int32, device="cuda")

    def step(n: Any, impl: str, winners: torch.Tensor, selects: bool = False) -> tuple[Any, list[Any]]:
        votes = votes_of(layers[0], len(layers))
        count_winners(votes, winners, n, layers[0].config, impl)
        outs = []
        for layer, left in zip(layers, winners, strict=True):
            q_1HD = layer.q[n - 1 : n] if isinstance(n, int) else layer.q[n.long() - 1]
            this = replace(layer, q=q_1HD, seq_len=n)
            options = {"impl": impl, "votes": votes, "winners": left, "return_selection": selects}
            outs.append(reattention(*this.arguments(), **options))
        return votes, outs

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(seq_len, "triton", winners)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            votes, found = step(seq_len, "triton", winners)
    torch.cuda.synchronize()
    winners.fill_(-1)
    for n in (*range(395, 410), *range(9000, 9020), 9016, 19999, 20000, *range(5000, 5010)):
        before = [winners.clone() for _ in range(2)]
        seq_len.fill_(n)
        graph.replay()
        ours, theirs = (step(n, impl, kept, True) for impl, kept in zip(("triton", "torch"), before, strict=True))
        assert torch.equal(winners, before[0]) and torch.equal(winners, before[1])
        assert torch.equal(votes.counts, ours[0].counts)
        assert torch.equal(votes.counts, theirs[0].counts)
        for out_1HD, (expected_1HD, selection), (_, expected) in zip(found, ours[1], theirs[1], strict=True):
            assert torch.equal(out_1HD, expected_1HD)
            assert all(map(torch.equal, as_list(selection), as_list(expected)))


@pytest.mark.parametrize("span_scope", ["layer", "kv_head"])
def test_votes_of_many_winners(span_scope: str) -> None:
    """Few positions with many votes, many with few or equal ones, of one layer or of eighty."""
    generator = torch.Generator("cuda").manual_seed(0)
    for layers, largest, max_spans in (
        (30, 4000, 16),
        (30, 100_000, 64),
        (80, 100_000, 5),
        (1, 60, 16),
        (80, 2000, 64),
    ):
        votes = {"vote_size": 32, "vote_window": WINDOW, "carry_votes": True, "span_scope": span_scope}
        config = ReAttentionConfig(4, 100, 2, 16, max_spans, **votes)
        case = make_case(config, 300, H=24, G=4).on_gpu()
        case = replace(case, k_cache=case.k_cache[:, :1].expand(-1, 100_000, -1))
        shape = (layers, *winners_shape(24, config, 16))
        winners = torch.randint(-1, largest, shape, generator=generator, device="cuda", dtype=torch.int32)
        for _ in range(3):
            found, expected = votes_of(case, layers), votes_of(case, layers)
            count_winners(found, winners, 99_000, config, "triton")
            count_winners(expected, winners, 99_000, config, "torch")
            assert torch.equal(found.counts, expected.counts)
            cast = [{j: n for j, n in enumerate(counts) if n} for counts in expected.counts.tolist()]
            check_votes(found, cast, "triton", config)
