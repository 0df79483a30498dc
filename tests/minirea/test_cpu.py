"""What a CPU does in its own way computes what plain float32 torch computes."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tqdm import tqdm

from minirea import api, cpu, cpu_attention, progress
from minirea.attention import Attention
from minirea.config import ReAttentionConfig
from minirea.cpu import PackedMatrix, can_pack, pack, packed_bytes, prepare, preparing_bytes, rms_norm
from minirea.cpu_attention import attend, attend_causal
from minirea.kernels import new_votes, winners_shape
from minirea.kernels.reference import reattention_reference, rotate, score_rows
from minirea.kernels.steps import reference
from minirea.linear import add_linear, linear, norm_linear, norm_swiglu
from minirea.model import Model
from minirea.rope import apply_rope, for_whole_heads
from minirea.weights import load_weights

DEMO = Path(__file__).parents[2] / "weights" / "demo"
HALVES = [torch.bfloat16, torch.float16]
needs_tiled_layout = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="this torch multiplies no bfloat16 by oneDNN",
)
needs_fbgemm = pytest.mark.skipif(not can_pack(), reason="this torch has no FBGEMM")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@needs_fbgemm
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7, 130])
def test_packed_products_of_integers_are_exact(dtype: torch.dtype, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    matrix = torch.randint(-127, 128, (70, 45), generator=generator).to(dtype)
    x = torch.randint(-100, 101, (rows, 45), generator=generator).float()
    assert torch.equal(linear(x, pack(matrix)), x @ matrix.float().t())


@needs_fbgemm
@pytest.mark.parametrize(
    ("dtype", "largest"),
    [
        *[(torch.bfloat16, largest) for largest in (2.0**-120, 1e-30, 0.3, 1.0, 60000.0, 2.0**120)],
        *[(torch.float16, largest) for largest in (1e-4, 0.3, 1.0, 60000.0)],
    ],
)
def test_packed_products_are_as_exact_as_those_of_float32(dtype: torch.dtype, largest: float) -> None:
    """Weights over 40 binary orders of magnitude: what float16 alone would flush to zero or overflow must count."""
    spread = 2.0 ** -(40 * torch.rand(96, 256, generator=torch.Generator().manual_seed(1)))
    matrix = (random(96, 256).clamp(-1, 1) * spread * largest).to(dtype)
    x = random(3, 256, seed=2)
    exact = x.double() @ matrix.double().t()
    # FBGEMM sums in one chain of fused multiply-adds: float32 products are summed so here as well, and what packing
    # may add is less than two roundings of a sum of magnitudes. The chain itself is as exact as a float32 sum can be.
    chain = torch.zeros(3, 96)
    for x_column, weight_column in zip(x.double().t(), matrix.double().t(), strict=True):
        chain = (chain.double() + torch.outer(x_column, weight_column)).float()
    rounding = 2**-24 * (x.abs().double() @ matrix.abs().double().t())
    assert ((linear(x, pack(matrix)).double() - chain.double()).abs() <= 2 * rounding).all()
    assert ((chain.double() - exact).abs() <= 16 * rounding).all()  # the root of 256 roundings


@needs_fbgemm
def test_zero_matrix_and_bias() -> None:
    x, bias = random(2, 8), random(5)
    assert torch.equal(linear(x, pack(torch.zeros(5, 8, dtype=torch.bfloat16)), bias), bias.expand(2, 5))


@needs_fbgemm
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_where_the_scale_is_undone_does_not_matter(packed: bool, biased: bool, rows: int) -> None:
    x, norm, total = random(rows, 64), random(64, seed=1), random(rows, 45, seed=2)
    half = (random(45, 64, seed=3) / 16).bfloat16()
    matrix, bias = pack(half) if packed else half.float(), random(45, seed=4) if biased else None
    normed = linear(rms_norm(x, norm, 1e-5), matrix, bias)
    assert torch.equal(norm_linear(x, norm, 1e-5, matrix, bias), normed)
    expected = total + linear(x, matrix, bias)
    add_linear(total, x, matrix, bias)
    torch.testing.assert_close(total, expected)


def model_weights(dtype: torch.dtype, tied: bool) -> dict[str, torch.Tensor]:
    weights = {
        "embed.weight": random(11, 4).to(dtype),
        "norm.weight": random(4),
        "a.qkv.weight": random(6, 4).to(dtype),
    }
    return weights | {"head.weight": weights["embed.weight"] if tied else random(11, 4, seed=1).to(dtype)}


@needs_fbgemm
@pytest.mark.parametrize("tied", [False, True])
def test_half_precision_weights_are_packed_but_for_the_embedding(tied: bool) -> None:
    weights = model_weights(torch.bfloat16, tied)
    before = dict(weights)
    prepared = prepare(weights, torch.float32)
    assert not weights
    assert prepared.keys() == before.keys()
    assert prepared["embed.weight"] is before["embed.weight"]
    assert prepared["norm.weight"] is before["norm.weight"]
    x = random(1, 4, seed=3)
    for name in ("head.weight", "a.qkv.weight"):
        assert isinstance(prepared[name], PackedMatrix)
        torch.testing.assert_close(linear(x, prepared[name]), F.linear(x, before[name].float()))


@pytest.mark.parametrize("tied", [False, True])
def test_the_bar_of_preparing_shows_all_bytes(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Bar] = []

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options | {"disable": False, "delay": 0, "file": io.StringIO()})
            shown.append(self)

    monkeypatch.setattr(progress, "tqdm", Bar)
    weights = model_weights(torch.bfloat16, tied)
    nbytes = sum(tensor.nbytes for tensor in weights.values())
    prepare(weights, torch.float32, progress=True)
    assert [(bar.total, bar.n) for bar in shown] == [(nbytes, nbytes)]


@needs_fbgemm
def test_packed_bytes_are_what_the_library_takes() -> None:
    """Blocks that are filled up: of 513 columns nearly half is padding. In a process that gives memory back at once."""
    code = (
        "import torch; from minirea.cpu import pack, packed_bytes\n"
        "def held(): return int(open('/proc/self/status').read().split('RssAnon:')[1].split()[0]) * 1024\n"
        "for N, K in ((4096, 512), (4096, 513), (4096, 576), (1000, 1500)):\n"
        "    matrix = torch.ones(N, K, dtype=torch.bfloat16); first = pack(matrix); before = held()\n"
        "    kept = [pack(matrix) for _ in range(8)]; print((held() - before) / 8 / packed_bytes(N, K)); del kept"
    )
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert [float(ratio) for ratio in done.stdout.split()] == pytest.approx([1] * 4, abs=0.05)
    assert packed_bytes(4096, 4096) == 4096 * 4096 * torch.float16.itemsize


def test_preparing_holds_a_matrix_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    for threads, elements in ((1, 50), (2, 90), (64, 130)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert preparing_bytes([10, 20, 50, 20, 10, 40]) == 6 * elements


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_other_matrices_are_stored_by_columns(tied: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_has_tiles", lambda: False)
    weights = model_weights(dtype, tied)
    before = dict(weights)
    prepared = prepare(weights, dtype)
    assert not weights
    assert (prepared["head.weight"] is prepared["embed.weight"]) == tied
    for name, matrix in before.items():
        assert torch.equal(prepared[name], matrix)
        assert matrix.dim() == 1 or prepared[name].stride() == (1, len(matrix))


@needs_tiled_layout
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "N", "K"), [(1, 70, 45), (5, 32, 64), (130, 96, 100)])
def test_tiled_products_of_integers_are_exact(rows: int, N: int, K: int, biased: bool) -> None:
    """And a gated MLP's is that of its parts; results are rounded to bfloat16."""
    generator = torch.Generator().manual_seed(rows)
    gate_up = torch.randint(-8, 9, (2 * N, K), generator=generator).bfloat16()
    x = torch.randint(-4, 5, (rows, K), generator=generator).bfloat16()
    bias = torch.randint(-9, 10, (2 * N,), generator=generator).bfloat16() if biased else None
    exact = F.linear(x.float(), gate_up.float(), None if bias is None else bias.float())
    assert torch.equal(linear(x, cpu.tile(gate_up), bias), exact.bfloat16())
    total = torch.full((rows, 2 * N), 0.125)
    add_linear(total, x, cpu.tile(gate_up), bias)
    assert torch.equal(total, exact.bfloat16().float() + 0.125)
    norm = torch.ones(K, dtype=torch.bfloat16)
    pair, wide = cpu.tile_gate_up(gate_up), rms_norm(x.float(), norm, 1e-5)
    gate, up = F.linear(wide.float(), gate_up.float(), None if bias is None else bias.float()).chunk(2, -1)
    swiglu = norm_swiglu(x.float(), norm, 1e-5, pair, bias, reference)
    torch.testing.assert_close(swiglu, (F.silu(gate) * up).bfloat16(), rtol=2**-7, atol=2**-7)
    assert pair.shape == gate_up.shape
    for matrix in (cpu.tile(gate_up), *pair):
        assert matrix.nbytes == torch.ops.mkldnn._nbytes(matrix.packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 128, 300])
def test_rows_in_blocks_turn_as_all_do(dtype: torch.dtype, rows: int) -> None:
    x, angles = random(rows, 3, 16).to(dtype), random(rows, 1, 8, seed=1)
    cos, sin = angles.cos(), angles.sin()
    whole = for_whole_heads(cos, sin)
    assert torch.equal(cpu_attention.place_rope(x, *whole), apply_rope(x, *whole))
    assert torch.equal(cpu_attention._rotate_in_blocks(x.clone(), cos, sin), rotate(x.clone(), cos, sin))


@pytest.mark.parametrize("keys", [1, 7, 500])
def test_attend(keys: int) -> None:
    """Against float64, over a cache whose rows are not side by side."""
    q, k, v = random(2, 3, 16), random(2, 600, 16, seed=1)[:, :keys], random(2, 600, 16, seed=2)[:, :keys]
    scores = torch.einsum("grd,gnd->grn", q.double(), k.double()) / 4
    exact = torch.einsum("grn,gnd->grd", scores.softmax(-1), v.double())
    torch.testing.assert_close(attend(q, k, v), exact.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1, 30])  # scores so large that one part has all the weight
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (2, 2), (7, 8), (64, 500), (70, 70), (1, 300)])
def test_attend_causal(queries: int, keys: int, scale: float, dtype: torch.dtype) -> None:
    """Against float64, over a cache whose rows are not side by side."""
    q, k, v = random(queries, 6, 16), random(2, 600, 16, seed=1), random(2, 600, 16, seed=2)
    q, k, v = (q * scale).to(dtype), k.to(dtype)[:, :keys], v.to(dtype)[:, :keys]
    scores = torch.einsum("tgmd,gnd->gmtn", q.double().unflatten(1, (2, 3)), k.double()) / 4
    scores.masked_fill_(torch.ones(queries, keys).triu(keys - queries + 1).bool(), -torch.inf)
    exact = torch.einsum("gmtn,gnd->tgmd", scores.softmax(-1), v.double()).flatten(1, 2)
    tolerance = {} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    if dtype == torch.float32 and scale > 1:
        tolerance = {"atol": 3e-5, "rtol": 1e-5}  # a score of 500 is off by 3e-5
    torch.testing.assert_close(attend_causal(q, k, v), exact.to(dtype), **tolerance)


@pytest.mark.parametrize("scores_at_a_time", [1, 2000, 1 << 21])
@pytest.mark.parametrize("rows", [1, 3, 50, 130])
@pytest.mark.parametrize(("lo", "hi"), [(5, 6), (5, 8), (4, 68), (3, 400), (64, 1000)])
def test_winners_of_integers_are_the_reference_s(
    lo: int, hi: int, rows: int, scores_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of few values: nearly all tie, within blocks, across them and across tiles, and the lowest key wins."""
    monkeypatch.setattr(cpu_attention, "_SCORES", scores_at_a_time)
    generator = torch.Generator().manual_seed(hi + rows)
    q = torch.randint(-1, 2, (3, rows, 4), generator=generator).float()
    k = torch.randint(-1, 2, (3, 1100, 4), generator=generator).float()
    for span_top_k in (1, 4, 7, 12):
        assert torch.equal(cpu_attention.score(q, k, lo, hi, span_top_k), score_rows(q, k, lo, hi, span_top_k))


@pytest.fixture(params=[1, 2], ids=["one-thread", "two-threads"])
def halved(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Keys are copied at once, however few they are, and on any CPU."""
    monkeypatch.setattr(cpu_attention, "HALVED_FROM", 256)
    monkeypatch.setattr(cpu_attention, "_STEPS_BEFORE_HALVES", 1)
    monkeypatch.setattr(cpu_attention, "_HALVED_AT_ONCE", 300)
    monkeypatch.setattr(cpu, "_has_tiles", lambda: True)
    threads = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("halved")
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e15])
@pytest.mark.parametrize(("G", "R", "D", "span_top_k"), [(3, 3, 64, 2), (2, 6, 32, 4), (1, 8, 128, 1), (8, 4, 128, 2)])
def test_keys_in_half_precision_find_the_winners_of_all(G: int, R: int, D: int, span_top_k: int, scale: float) -> None:
    """Keys with a large mean, some of them equal; the middle grows, and the cache does once."""
    mean, halves = random(G, 1, D, seed=5) * 4, cpu_attention.HalfKeys()
    k_GND = (random(G, 9900, D) + mean) * scale
    # For the first query of each head: the best keys, of which half precision does not tell the very best.
    best_G1D = random(G, 1, D, seed=7) * 1.2 * scale
    k_GND[:, 107:6000:500] = best_G1D * (1 + 0.002 * random(G, 12, D, seed=8)) + mean * scale
    k_GND[:, 7700:7900] = k_GND[:, 300:500]
    looked_at = 0
    for hi in (8000, 8001, 8050, 8200, 8800, 9300):
        cache_GND = k_GND[:, : 8500 if hi < 8500 else 9400].clone()
        cache_GND[:, hi + 40 :] = torch.nan  # nothing is there yet
        q_GRD = random(G, R, D, seed=hi) * scale
        q_GRD[:, 0] = best_G1D[:, 0] + random(G, D, seed=hi + 1) * 0.01 * scale
        q_GRD[:, 1:2] = k_GND[:, 300:301] - mean * scale  # the best key is one of two that are equal
        found = halves.search(q_GRD, cache_GND, 5, hi, span_top_k)
        if found is None:
            continue
        looked_at += 1
        assert torch.equal(found, cpu_attention.score(q_GRD, cache_GND, 5, hi, span_top_k))
    assert looked_at == 6


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Chunks are searched by products in half precision, however small. Rows of those that had to be searched anew."""
    monkeypatch.setattr(cpu_attention, "MANY_ROWS", 20)
    monkeypatch.setattr(cpu_attention, "MANY_KEYS", 100)
    monkeypatch.setattr(cpu_attention, "_HALVED_AT_ONCE", 320)
    monkeypatch.setattr(cpu, "_has_tiles", lambda: True)
    anew, score_all = [], cpu_attention._score_all
    monkeypatch.setattr(cpu_attention, "_score_all", lambda q, *rest: (anew.append(q.shape[1]), score_all(q, *rest))[1])
    return anew


@pytest.mark.parametrize("scale", [2.0**-40, 1.0, 2.0**50])
@pytest.mark.parametrize(("G", "D", "span_top_k"), [(2, 64, 2), (1, 128, 4), (3, 32, 1)])
def test_rows_of_a_chunk_find_the_winners_of_all_keys(
    G: int, D: int, span_top_k: int, scale: float, many: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys with a large mean; the best are close to each other, some are equal, some lie behind all whole blocks."""
    mean_G1D, best_G1D = (random(G, 1, D, seed=5) * 4).round(), random(G, 1, D, seed=7) * 1.2
    k_GND = random(G, 9000, D) + mean_G1D
    k_GND[:, 107:6000:500] = best_G1D * (1 + 0.002 * random(G, 12, D, seed=8)) + mean_G1D
    k_GND[:, 300:500] = k_GND[:, 7700:7900] = k_GND[:, 300:500].round()  # so that their scores are exact
    k_GND[:, 8510:8527] = k_GND[:, 8510:8527].round()
    q_GRD = random(G, 150, D, seed=1)
    q_GRD[:, ::3] = best_G1D + random(G, 50, D, seed=2) * 0.01
    q_GRD[:, 1::9] = k_GND[:, 300:317] - mean_G1D
    q_GRD[:, 2::9] = k_GND[:, 8510:8527] - mean_G1D
    monkeypatch.setattr(cpu_attention, "_PRODUCTS", 100 * 8520)
    arguments = q_GRD * scale, k_GND * scale, 7, 8527, span_top_k
    assert torch.equal(cpu_attention.score(*arguments), cpu_attention._score_all(*arguments))
    assert many == [150]  # by the test alone
    # Keys that are in half precision themselves, their mean with them: some rows' best score is below zero.
    arguments = (q_GRD * scale).bfloat16().float(), (k_GND * scale).bfloat16(), 7, 8527, span_top_k
    many.clear()
    assert torch.equal(cpu_attention.score(*arguments), cpu_attention._score_all(*arguments))
    assert many == [150]


@pytest.mark.parametrize("values", [1, 3])
def test_rows_of_a_chunk_with_equals_find_the_first(values: int, many: list[int]) -> None:
    """Nearly all scores tie: they are searched for among all keys."""
    generator = torch.Generator().manual_seed(values)
    q_GRD, k_GND = (torch.randint(-values, values + 1, (2, n, 4), generator=generator).float() for n in (40, 1000))
    for hi in (300, 323, 999):
        assert torch.equal(cpu_attention.score(q_GRD, k_GND, 3, hi, 3), score_rows(q_GRD, k_GND, 3, hi, 3))
    assert set(many) == {40}


def test_rows_of_a_chunk_that_are_not_finite_or_score_below_zero(many: list[int]) -> None:
    q_GRD, k_GND = random(1, 30, 16), random(1, 900, 16, seed=1)
    for row, value in ((3, torch.nan), (4, torch.inf), (5, 0.0)):
        spoiled = q_GRD.clone()
        spoiled[0, row] = value
        many.clear()
        index_GRK = cpu_attention.score(spoiled, k_GND, 0, 900, 2)
        assert many == [30] and bool(((index_GRK >= 0) & (index_GRK < 900)).all())


@pytest.mark.usefixtures("halved")
def test_keys_in_half_precision_are_of_no_use() -> None:
    """Few keys; more that may win than an eighth; what is not finite. All keys are searched then."""
    k_GND, q_GRD = random(2, 1000, 16), random(2, 3, 16, seed=1)
    assert cpu_attention.HalfKeys().search(q_GRD, k_GND, 5, 200, 2) is None
    assert cpu_attention.HalfKeys().search(q_GRD, k_GND.sign()[:, :1].expand_as(k_GND), 5, 999, 2) is None
    for span_top_k in (15, 16, 500):  # of 15 blocks
        assert cpu_attention.HalfKeys().search(q_GRD, k_GND, 5, 999, span_top_k) is None
    for value in (torch.nan, torch.inf):
        spoiled = k_GND.clone()
        spoiled[1, 77, 3] = value
        halves = cpu_attention.HalfKeys()
        assert halves.search(q_GRD, spoiled, 5, 999, 2) is None
        assert halves.search(q_GRD, k_GND, 5, 999, 2) is None  # and it stays so


@pytest.mark.usefixtures("halved")
@pytest.mark.parametrize("span_top_k", [2, 9, 12])
def test_keys_in_half_precision_find_many_winners(span_top_k: int) -> None:
    best_G1D, k_GND = random(2, 1, 64, seed=7), random(2, 4400, 64, seed=1)
    k_GND[:, 107:4300:200] = best_G1D * (2 + 0.004 * random(2, 21, 64, seed=8))
    arguments = best_G1D + random(2, 3, 64) * 0.001, k_GND, 4, 4390, span_top_k
    found = cpu_attention.HalfKeys().search(*arguments)
    assert found is not None and torch.equal(found, cpu_attention._score_all(*arguments))


@pytest.mark.usefixtures("halved", "many")
@pytest.mark.parametrize("scale", [1e-10, 1e-20, 1e-30, 1e-37, 1e-42])
def test_winners_of_small_numbers_are_those_of_float32(scale: float) -> None:
    """Half precision takes numbers near the smallest for zero, and squares of small ones are zero in float32. Scores
    are differences of large products, or what small elements make of them.
    """
    q_GRD, k_GND, uneven_GRD = random(3, 30, 64), random(3, 4400, 64, seed=1), random(3, 30, 64, seed=2)
    q_GRD[..., 3], q_GRD[..., 4], uneven_GRD[..., 1] = 1, -1, 100
    wide_GND = k_GND.clone()
    wide_GND[..., 3:5] += 1000 * random(3, 4400, 1, seed=3)
    cases = (q_GRD * scale, wide_GND), (q_GRD, wide_GND * scale), (uneven_GRD * scale, k_GND)
    for (q, k), rows in itertools.product(cases, (3, 30)):
        arguments = q[:, :rows].contiguous(), k, 4, 4390, 2
        expected, found = cpu_attention._score_all(*arguments), cpu_attention.HalfKeys().search(*arguments)
        assert found is None or torch.equal(found, expected)
        assert torch.equal(cpu_attention.score(*arguments), expected)


@pytest.mark.usefixtures("halved")
def test_keys_in_half_precision_step_by_step() -> None:
    """Integers so large that no other key comes close: scores are exact. The first steps search all keys."""
    generator = torch.Generator().manual_seed(3)
    q_GTMD = torch.randint(-40, 41, (3, 90, 3, 32), generator=generator).float()
    k_GND = torch.randint(-40, 41, (3, 4400, 32), generator=generator).float()
    halves = cpu_attention.HalfKeys()
    for step in range(90):
        arguments = q_GTMD[:, step], k_GND, 4, 150 + step if step < 40 else 4200 + step, 2
        assert torch.equal(halves.score(*arguments), cpu_attention.score(*arguments)), step
    assert halves._num_keys > 4200 and halves._useful


@pytest.mark.parametrize("span_top_k", [0, 4])
@pytest.mark.parametrize("queries", [1, 2, 40])
@pytest.mark.parametrize("seq_len", [105, 106, 300, 2000])
def test_reattention_is_the_reference_s(seq_len: int, queries: int, span_top_k: int) -> None:
    """Garbage after the cached tokens changes nothing."""
    config = ReAttentionConfig(
        global_size=4, local_size=100, span_top_k=span_top_k, span_size=8, max_spans=12, chunk_size=64
    )
    positions = torch.arange(min(seq_len, config.max_scope))
    angles = torch.outer(positions.float(), 1e4 ** (-torch.arange(0, 16, 2) / 16))
    q, k, v = random(queries, 6, 16), random(2, 2100, 16, seed=1), random(2, 2100, 16, seed=2)
    k[:, seq_len:], v[:, seq_len:] = torch.nan, torch.nan
    arguments = (q, k, v, seq_len, angles.cos(), angles.sin(), config)
    before = q.clone(), k.clone(), v.clone()
    torch.testing.assert_close(cpu_attention.reattention(*arguments), reattention_reference(*arguments)[0])
    ours, theirs = (new_votes(6, 2, config, 2, 2100, q.device) for _ in range(2))
    found, left = torch.full((2, 16, *winners_shape(6, config, 1)[1:]), -1, dtype=torch.int32)
    for layer in range(2):
        arguments = (q.roll(layer, -1), *arguments[1:])
        expected, _ = reattention_reference(*arguments, votes=theirs, winners=left)
        torch.testing.assert_close(cpu_attention.reattention(*arguments, votes=ours, winners=found), expected)
        assert torch.equal(found, left) and (found >= 0).sum() == 6 * min(queries, 16) * min(span_top_k, seq_len - 104)
    assert torch.equal(ours.counts, theirs.counts)
    assert int(ours.counts.sum()) == 2 * queries * 6 * min(span_top_k, seq_len - 104)
    for tensor, old in zip((q, k, v), before, strict=True):
        assert torch.equal(tensor.nan_to_num(9), old.nan_to_num(9))


@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize(("global_size", "span_top_k"), [(0, 0), (4, 0), (4, 4), (0, 4)])
def test_reattention_in_bfloat16_is_the_reference_s(queries: int, global_size: int, span_top_k: int) -> None:
    """Of the same numbers in float64, as near as the reference's own in bfloat16; what is selected is the same."""
    config = ReAttentionConfig(
        global_size=global_size, local_size=100, span_top_k=span_top_k, span_size=8, max_spans=12, chunk_size=64
    )
    angles = torch.outer(torch.arange(config.max_scope).float(), 1e4 ** (-torch.arange(0, 64, 2) / 64))
    tables, copies = (angles.cos(), angles.sin()), cpu_attention.KeyCopies.new()
    q, k, v = (random(queries + 5, 6, 64), random(2, 900, 64, seed=1), random(2, 900, 64, seed=2))
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    for seq_len in range(800, 805 if queries == 1 else 801):
        arguments = q[seq_len - 800 :][:queries], k, v, seq_len, *tables, config
        exact, _ = reattention_reference(*[x.double() for x in arguments[:3]], *arguments[3:])
        plain, _ = reattention_reference(*arguments)
        ours = cpu_attention.reattention(*arguments, copies=copies)
        assert ours.dtype == torch.bfloat16
        allowed = 2 * (plain - exact).abs().max() + 2**-9 * exact.abs().max()
        assert (ours - exact).abs().max() <= allowed


@pytest.mark.parametrize("more_positions", [0, 3, 256])
def test_steps_that_share_copies_of_keys(more_positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of the local part keep their positions for some steps, or for none; some tokens come by other means."""
    monkeypatch.setattr(cpu_attention, "MORE_POSITIONS", more_positions)
    config = ReAttentionConfig(global_size=4, local_size=20, span_top_k=2, span_size=8, max_spans=5, chunk_size=8)
    angles = torch.outer(torch.arange(300).float(), 1e4 ** (-torch.arange(0, 16, 2) / 16))
    tables, copies = (angles.cos(), angles.sin()), cpu_attention.KeyCopies.new()
    k, v = random(2, 200, 16, seed=1), random(2, 200, 16, seed=2)
    for seq_len in (*range(100, 109), 130, 131, 120, 121, 121, 122):
        arguments = random(1, 6, 16, seed=seq_len), k, v, seq_len, *tables, config
        expected = reattention_reference(*arguments)[0]
        torch.testing.assert_close(cpu_attention.reattention(*arguments, copies=copies), expected)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_rms_norm(dtype: torch.dtype, rows: int, scale: float) -> None:
    x, weight = (random(rows, 256) * scale).to(dtype), random(256, seed=1).to(dtype)
    wide = x.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), exact.to(dtype))


@needs_fbgemm
@pytest.mark.parametrize("rows", [1, 2])
def test_the_norm_of_zeros_is_zeros_whatever_the_scale_of_the_matrix(rows: int) -> None:
    """1 / sqrt(eps) times the scale that a packed matrix undoes is beyond float32 here."""
    matrix = pack(torch.full((4, 8), 3e38, dtype=torch.bfloat16))
    assert torch.equal(norm_linear(torch.zeros(rows, 8), torch.ones(8), 1e-20, matrix), torch.zeros(rows, 4))


@pytest.mark.parametrize("rows", [1, 2])
def test_rms_norm_passes_on_what_is_not_finite(rows: int) -> None:
    for value in (torch.nan, torch.inf):
        x = torch.ones(rows, 8)
        x[0, 3] = value
        assert rms_norm(x, torch.ones(8), 1e-5).isnan().any()


@needs_fbgemm
def test_demo_model_computes_the_same_as_with_float32_weights() -> None:
    """Prefill in chunks and decode steps, inside and beyond the dense range."""
    packed = api.load(DEMO, device="cpu", chunk_size=64)
    assert isinstance(packed.model.head, PackedMatrix)
    old = packed.model.attention
    attention = Attention(packed.config, old.mode, old.config, "torch", old.device)
    weights = load_weights(DEMO, packed.config, old.device, torch.float32)
    plain = api.LLM(Model(packed.config, weights, attention), None)
    assert isinstance(plain.model.head, torch.Tensor)
    text = (DEMO / "prompts" / "needle-16k.txt").read_text()
    ids = packed.encode(text)[:1500]
    torch.testing.assert_close(packed.logits(ids), plain.logits(ids), atol=1e-4, rtol=0)
    generated = [llm.generate(ids, max_tokens=40, ignore_eos=True).token_ids for llm in (packed, plain)]
    assert generated[0] == generated[1]


@pytest.mark.usefixtures("halved")
@pytest.mark.parametrize("rows", [1, 2])
def test_of_equal_keys_the_first_wins(rows: int) -> None:
    """Wherever they are, in every search: a product of one row by itself would sum in an order of the key's place."""
    for seed in range(120):
        generator = torch.Generator().manual_seed(seed)
        D, N = (32, 48, 64, 80, 96, 128)[seed % 6], 700 + 7 * seed
        k_GND, q_GRD = random(3, N, D, seed=seed), random(3, rows, D, seed=1000 + seed)
        places = torch.cat([torch.randperm(N - 100, generator=generator)[: 5 * rows] + 30, N - 1 - torch.arange(rows)])
        places = places.view(-1, rows).t().sort(1).values
        for row, place in enumerate(places):
            k_GND[:, place] = q_GRD[:, row, None] * 3
        expected = places[:, :6].expand(3, -1, -1)
        half = cpu_attention.HalfKeys().search(q_GRD, k_GND, 30, N, 6)
        for found in (half, cpu_attention.score(q_GRD, k_GND, 30, N, 6), score_rows(q_GRD, k_GND, 30, N, 6)):
            assert found is None or torch.equal(found, expected), (D, N)


@needs_tiled_layout
def test_demo_model_of_tiles_is_near_to_that_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its next tokens' distributions, where all tokens are seen, where chunks select and where the last token does."""
    monkeypatch.setattr(cpu, "_has_tiles", lambda: True)
    models = [api.load(DEMO, device="cpu", chunk_size=64, dtype=dtype) for dtype in ("float32", "bfloat16")]
    assert isinstance(models[1].model.head, cpu.TiledMatrix)
    assert (models[1].model.dtype, models[1].model.sum_dtype) == (torch.bfloat16, torch.float32)
    ids = models[0].encode((DEMO / "prompts" / "needle-16k.txt").read_text())[:2500]
    exact, ours = (torch.log_softmax(llm.logits(ids), -1) for llm in models)
    divergence = (exact.exp() * (exact - ours)).sum(-1)
    assert divergence[:1000].mean() < 2e-4 and divergence[1000:].mean() < 1e-3
