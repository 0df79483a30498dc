"""A CPU's layout and attention against torch and the reference's phases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from minirea.config import ReAttentionConfig
from minirea.kernels.cpu import attend as kernels
from minirea.kernels.cpu.choose import choose, new_counts
from minirea.kernels.cpu.code import F32, vector
from minirea.kernels.cpu.compile import Kernel, available
from minirea.kernels.reference import choose_scope, locate, rotate
from minirea.rope import apply_rope, for_whole_heads

pytestmark = [
    pytest.mark.skipif(not available(), reason="needs llvmlite"),
    pytest.mark.usefixtures("threads"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(3, 3, 64), (2, 4, 128), (1, 1, 16), (2, 7, 80), (1, 20, 32), (2, 1, 24), (1, 2, 256)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cache_of(G: int, D: int, dtype: torch.dtype, filled: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a cache, and behind the filled ones NaN."""
    both = random(2, G, filled + 60, D, seed=1).to(dtype)
    both[:, :, filled:] = torch.nan
    return both[0], both[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("G", "R", "D"), SHAPES)
def test_attend(G: int, R: int, D: int, dtype: torch.dtype) -> None:
    """Against float64: one key, all, and runs of any length, with RoPE and without; large scores as well."""
    k, v = cache_of(G, D, dtype, 700)
    angles = random(700, D // 2, seed=4) * 3
    for scale in (1.0, 60.0):
        q = random(G * R, D) * scale
        for runs in ([(0, 1)], [(0, 700)], [(0, 5), (33, 49), (49, 52), (300, 700)]):
            index = torch.cat([torch.arange(*run) for run in runs])
            runs_X2 = np.array([(len(runs), len(index)), *runs], np.int64)
            for tables in (None, (angles.cos(), angles.sin())):
                ours = kernels.attend(q, k, v, runs_X2, tables)
                q_GRD, k_GSD = q.double().view(G, R, D), k.double()[:, index]
                if tables:
                    cos, sin = (table.double()[: len(index)] for table in tables)
                    k_GSD = rotated(k_GSD, cos, sin)
                    q_GRD = rotated(q_GRD, cos[-1:], sin[-1:])
                exact = (q_GRD @ k_GSD.mT / math.sqrt(D)).softmax(-1) @ v.double()[:, index]
                tolerance = 3e-6 if scale == 1 else 2e-4  # a score of some hundreds is off by 3e-5
                torch.testing.assert_close(ours.double(), exact.view(G * R, D), atol=tolerance, rtol=tolerance)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def test_attention_to_what_is_not_finite_is_not() -> None:
    k, v = cache_of(2, 64, torch.float32, 50)
    k[0, 20, 3] = torch.nan
    out = kernels.attend(random(4, 64), k, v, kernels.all_of(50))
    assert out[:2].isnan().all() and out[2:].isfinite().all()


@pytest.mark.parametrize("max_spans", [1, 3, 12, 200])
@pytest.mark.parametrize("vote_size", [1, 8])
@pytest.mark.parametrize("middle", [1, 7, 500])
@pytest.mark.parametrize("global_size", [0, 5])
def test_the_scope_is_the_reference_s(global_size: int, middle: int, vote_size: int, max_spans: int) -> None:
    """Votes that tie, covers that meet, with and without votes of layers before; the row of winners is left."""
    options = {"span_size": 8, "max_spans": max_spans, "chunk_size": 8, "vote_size": vote_size}
    config = ReAttentionConfig(global_size=global_size, local_size=20, span_top_k=4, **options)
    seq_len = global_size + middle + 20
    k_GND, mid = random(2, seq_len, 16), (global_size, seq_len - 20)
    counts_N, no_counts = new_counts(seq_len), None
    layers = []
    for layer in range(4):
        generator = torch.Generator().manual_seed(layer)
        near = int(torch.randint(*mid, (1,), generator=generator))
        winner_GRK = (near + torch.randint(-9, 10, (2, 3, min(4, middle)), generator=generator)).clamp_(
            mid[0], mid[1] - 1
        )
        layers.append(winner_GRK)
        for counts in (no_counts, counts_N):
            row_HK = torch.full((6, 4), 7, dtype=torch.int32)
            runs_X2 = choose(config, winner_GRK.flatten(0, 1).numpy(), seq_len, counts, row_HK)
            ours = torch.cat([torch.arange(*run) for run in runs_X2[1:].tolist()])
            assert len(ours) == runs_X2[0, 1] and len(runs_X2) == 1 + runs_X2[0, 0]
            assert torch.equal(row_HK[:, : winner_GRK.shape[2]].long(), winner_GRK.flatten(0, 1))
            assert (row_HK[:, winner_GRK.shape[2] :] == -1).all()
            voting = torch.cat(layers if counts is counts_N else [winner_GRK], 1)
            scope = choose_scope(voting, k_GND, seq_len, config, lambda q, *_, **__: q)  # winners instead of queries
            length = int(scope[2])
            expected = locate(torch.arange(length), *scope[:2])[0]
            assert torch.equal(ours, expected)


@pytest.mark.parametrize(("G", "R", "D"), SHAPES)
def test_write(G: int, R: int, D: int) -> None:
    """Only the token's place is written; rotated as apply_rope does."""
    H, angles = G * R, random(1, D // 2, seed=4) * 3
    cos, sin = angles.cos(), angles.sin()
    for keeps, rotates in ((True, False), (True, True), (False, True)):
        qkv, k, v, turned = random(H + 2 * G, D), *(torch.full((G, 9, D), torch.nan) for _ in range(3))
        before = qkv.clone()
        call = kernels.bind_write(qkv, k if keeps else None, v, turned if rotates else None)
        call.set(position=6, cos=cos.data_ptr(), sin=sin.data_ptr())
        call()
        assert torch.equal(v[:, 6], before[H + G :]) and torch.equal(qkv[H:], before[H:])
        assert not keeps or torch.equal(k[:, 6], before[H : H + G])
        expected = apply_rope(before[: H + G], *for_whole_heads(cos, sin)) if rotates else before
        torch.testing.assert_close(qkv[:H], expected[:H], atol=1e-6, rtol=1e-6)
        if rotates:
            torch.testing.assert_close(turned[:, 6], expected[H:][:G], atol=1e-6, rtol=1e-6)
        for cache in (v, k if keeps else v, turned if rotates else v):
            assert cache[:, [*range(6), 7, 8]].isnan().all()


def test_exp() -> None:
    """Within two units of the last place, of numbers and vectors."""

    def write(code, a) -> None:  # type: ignore[no-untyped-def]
        with code.range(0, a["count"], 16) as at:
            code.store(code.exp(code.load(a["x"] + at * 4, vector(F32))), a["many"] + at * 4)
        with code.range(0, a["count"]) as at:
            code.store(code.exp(code.load(a["x"] + at * 4, F32)), a["one"] + at * 4)

    x = torch.cat(
        [torch.linspace(-87, 88.3, 100_000), random(4000) * 1e-3, torch.tensor([-1e9, -88.0, 88.5, torch.inf])]
    )
    x = torch.cat([x, torch.zeros(-len(x) % 16)])
    many, one = torch.empty_like(x), torch.empty_like(x)
    kernel = Kernel(write, ("x", "count", "many", "one"), alone=True)
    kernel.bind(x=x.data_ptr(), count=len(x), many=many.data_ptr(), one=one.data_ptr())()
    exact = x.double().clamp(-87).exp()
    assert torch.equal(many.isinf(), x > 88.4)
    assert ((many.double() / exact - 1).abs() < 2.5e-7)[x < 88.3].all()
    assert torch.equal(one, many)


def test_rotation_is_the_reference_s() -> None:
    """In float32, by the reference's `rotate` and a softmax of torch."""
    k, v = cache_of(1, 32, torch.float32, 40)
    q, angles = random(2, 32), random(40, 16, seed=4) * 3
    tables = angles.cos(), angles.sin()
    ours = kernels.attend(q, k, v, kernels.all_of(40), tables)
    k_rotated = rotate(k[:, :40].clone(), *tables)
    q_rotated = rotate(q[None].clone(), tables[0][39], tables[1][39])[0]
    expected = torch.softmax(q_rotated @ k_rotated[0].T / math.sqrt(32), -1) @ v[0, :40]
    torch.testing.assert_close(ours, expected, atol=3e-6, rtol=3e-6)
