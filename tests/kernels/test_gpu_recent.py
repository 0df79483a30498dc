"""Decode steps whose tokens vote together, with winners kept from step to step, on a GPU."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import Case, as_list, check_decode_steps, cut_off, decode_layers, votes_of

from minirea.kernels import ReAttentionConfig, new_winners, reattention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HALF = torch.bfloat16
# Heads, key/value heads, head_dim, dtype, span_top_k, scope, whether layers add to one vote.
SHAPES = [
    (9, 3, 64, HALF, 2, "layer", True),
    (9, 3, 64, HALF, 2, "kv_head", True),
    (32, 8, 128, HALF, 4, "layer", True),
    (32, 8, 128, HALF, 4, "layer", False),
    (4, 2, 64, torch.float32, 3, "layer", True),
    (40, 1, 80, torch.float16, 2, "kv_head", False),
]
WINDOW = 8


def on_gpu(layer: Case, dtype: torch.dtype) -> Case:
    tensors = {name: getattr(layer, name).to("cuda", dtype) for name in ("q", "k_cache", "v_cache")}
    return replace(layer, **tensors, cos=layer.cos.cuda(), sin=layer.sin.cuda())


def layers_of(shape: tuple[Any, ...], capacity: int, num_layers: int, largest: int = 2) -> list[Case]:
    H, G, D, dtype, span_top_k, span_scope, _ = shape
    sizes = {"vote_size": 32, "span_scope": span_scope, "dense_size": 400}
    config = ReAttentionConfig(4, 100, span_top_k, 16, 12, **sizes)
    cases = decode_layers(config, capacity, num_layers, H=H, G=G, D=D, largest=largest)
    return [on_gpu(case, dtype) for case in cases]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step has to write before it reads is NaN or out of bounds: its output, and scratch."""
    from minirea.kernels.fused import launch

    empty, scratch_of = torch.empty, launch.scratch_of

    def spoiled(tensor: torch.Tensor) -> torch.Tensor:
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
    """From the dense bound on, and back and ahead by random numbers of tokens."""
    r = random.Random(str(shape))
    for largest in (1, 3):
        n, seq_lens = 398, []
        for _ in range(12):
            seq_lens += [n := n + 1 for _ in range(r.choice([1, 2, 5]))]
            n = max(10, min(1500, n + r.choice([-1, -2, -30, 1, 40, 600])))
        check_decode_steps(layers_of(shape, 1600, 2, largest), WINDOW, shape[-1], seq_lens)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_a_captured_graph_follows_seq_len(shape: tuple[Any, ...]) -> None:
    """Replays, each of which goes on with what the one before left, give the bits of steps that search for everything;
    these select what the torch path does.
    """
    layers, carries = layers_of(shape, 20000, 3), shape[-1]
    seq_len = torch.tensor([9000], device="cuda", dtype=torch.int32)
    winners = new_winners(shape[0], layers[0].config, WINDOW, len(layers), seq_len.device)
    votes = votes_of(cut_off(layers[0], WINDOW, WINDOW), len(layers)) if carries else None
    voters = torch.arange(-WINDOW, 0, device="cuda")

    def step() -> list[torch.Tensor]:
        for tensor in votes or ():
            tensor.zero_()
        outs = []
        for layer, kept in zip(layers, winners, strict=True):
            this = replace(layer, q=layer.q[seq_len + voters], seq_len=seq_len)  # type: ignore[arg-type]
            options = {"attending": 1, "votes": votes, "winners": kept}
            outs.append(reattention(*this.arguments(), impl="triton", **options))
        return outs

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = step()
    torch.cuda.synchronize()
    for n in (*range(395, 410), *range(9000, 9040), 9036, 19999, 20000, *range(5000, 5010)):
        seq_len.fill_(n)
        graph.replay()
        cast = [votes_of(cut_off(layers[0], WINDOW, WINDOW), len(layers)) if carries else None for _ in range(2)]
        fresh = new_winners(shape[0], layers[0].config, WINDOW, len(layers), seq_len.device)
        for layer, kept, out_1HD in zip(layers, fresh, found, strict=True):
            this = replace(layer, q=layer.q[n - WINDOW : n], seq_len=n)
            options = {"return_selection": True, "attending": 1}
            ours, selection = reattention(*this.arguments(), impl="triton", votes=cast[0], winners=kept, **options)
            _, expected = reattention(*this.arguments(), impl="torch", votes=cast[1], **options)
            assert all(map(torch.equal, as_list(selection), as_list(expected)))
            assert torch.equal(out_1HD, ours)
        if votes is not None:
            assert torch.equal(votes.counts, cast[1].counts)  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_scores_that_are_kept_are_those_of_a_search(shape: tuple[Any, ...]) -> None:
    """To the bit, for keys that are rounded when they are scored, half of which are others' copies: they must tie."""
    (layer,), seq_lens = layers_of(shape, 3000, 1), range(2000, 2200)
    generator = torch.Generator("cuda").manual_seed(0)
    for tensor in (layer.q, layer.k_cache):
        tensor.normal_(generator=generator)
    layer.k_cache[:, 1000:2900:2] = layer.k_cache[:, 50:1000]
    (kept,) = new_winners(shape[0], layer.config, WINDOW, 1, layer.q.device)
    for n in seq_lens:
        fresh = torch.zeros_like(kept)
        for lists in (kept, fresh):
            this = replace(layer, q=layer.q[n - WINDOW : n], seq_len=n)
            reattention(*this.arguments(), impl="triton", attending=1, winners=lists)
        K = 1 << (layer.config.span_top_k - 1).bit_length()
        ours, expected = (lists[2 : 2 + WINDOW * shape[0] * K].view(-1, K).sort(1).values for lists in (kept, fresh))
        assert int(kept[0]) == int(fresh[0]) == n and torch.equal(ours, expected), n
