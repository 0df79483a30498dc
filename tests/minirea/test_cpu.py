"""What a CPU does in its own way computes what plain float32 torch computes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tqdm import tqdm

from minirea import api, cpu, cpu_attention, progress
from minirea.attention import Attention
from minirea.compact import CompactMatrix
from minirea.config import ReAttentionConfig
from minirea.cpu import prepare, preparing_bytes, rms_norm
from minirea.cpu_attention import attend, attend_causal
from minirea.kernels import new_votes, winners_shape
from minirea.kernels.cpu.compile import available
from minirea.kernels.reference import reattention_reference, rotate
from minirea.kernels.steps import reference
from minirea.linear import add_linear, linear, norm_swiglu
from minirea.model import Model
from minirea.quantize import QuantizedMatrix
from minirea.rope import apply_rope, for_whole_heads
from minirea.weights import load_weights

DEMO = Path(__file__).parents[2] / "weights" / "demo"
needs_kernels = pytest.mark.skipif(not available(), reason="needs llvmlite")
needs_tiles = pytest.mark.skipif(
    not cpu._has_tiles(), reason="this processor has no tiles: oneDNN's layouts are others"
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where llvmlite is not installed."""
    monkeypatch.setattr("minirea.kernels.cpu.compile.is_installed", lambda: False)


@pytest.fixture(params=["kernels", "torch"])
def with_and_without_kernels(request: pytest.FixtureRequest) -> None:
    if request.param == "torch":
        request.getfixturevalue("no_kernels")


def model_weights(dtype: torch.dtype, tied: bool, E: int = 4) -> dict[str, torch.Tensor]:
    weights = {
        "embed.weight": random(11, E).to(dtype),
        "norm.weight": random(E),
        "a.qkv.weight": random(6, E).to(dtype),
    }
    return weights | {"head.weight": weights["embed.weight"] if tied else random(11, E, seed=1).to(dtype)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.usefixtures("no_kernels")
def test_the_bar_of_preparing_shows_all_bytes(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Bar] = []

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options | {"disable": False, "delay": 0, "file": io.StringIO()})
            shown.append(self)

    monkeypatch.setattr(progress, "tqdm", Bar)
    weights = model_weights(torch.bfloat16, tied)
    nbytes = sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in weights.values()}.values())
    prepare(weights, torch.float32, progress=True)
    assert [(bar.total, bar.n) for bar in shown] == [(nbytes, nbytes)]


def test_preparing_holds_a_matrix_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    for threads, elements in ((1, 50), (2, 90), (64, 130)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert preparing_bytes([10, 20, 50, 20, 10, 40]) == 4 * elements


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.usefixtures("no_kernels")
def test_without_kernels_matrices_are_stored_by_columns(
    tied: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_has_tiles", lambda: False)
    weights = model_weights(dtype, tied)
    before = dict(weights)
    prepared = prepare(weights, dtype)
    assert not weights
    assert (prepared["head.weight"] is prepared["embed.weight"]) == tied
    for name, matrix in before.items():
        assert torch.equal(prepared[name], matrix)
        assert matrix.dim() == 1 or prepared[name].stride() == (1, len(matrix))


@needs_kernels
@pytest.mark.parametrize("tied", [False, True])
def test_with_kernels_matrices_of_bfloat16_become_compact(tied: bool) -> None:
    """All but the embedding, which a tied head is no more. Those of other dtypes stay."""
    weights = model_weights(torch.bfloat16, tied, 64)
    before = dict(weights)
    prepared = prepare(weights, torch.float32)
    assert not weights and prepared.keys() == before.keys()
    for name, tensor in before.items():
        is_compact = tensor.dim() == 2 and name != "embed.weight"
        assert isinstance(prepared[name], CompactMatrix) == is_compact
        assert torch.equal(prepared[name].widen(), tensor) if is_compact else prepared[name] is tensor
    wide = {name: tensor.float() for name, tensor in before.items()}
    kept = prepare(dict(wide), torch.float32)
    assert all(kept[name] is tensor for name, tensor in wide.items())


@needs_tiles
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


@pytest.mark.usefixtures("with_and_without_kernels")
@pytest.mark.parametrize("keys", [1, 7, 500])
def test_attend(keys: int) -> None:
    """Against float64, over a cache whose rows are not side by side."""
    q, k, v = random(2, 3, 16), random(2, 600, 16, seed=1)[:, :keys], random(2, 600, 16, seed=2)[:, :keys]
    scores = torch.einsum("grd,gnd->grn", q.double(), k.double()) / 4
    exact = torch.einsum("grn,gnd->grd", scores.softmax(-1), v.double())
    torch.testing.assert_close(attend(q.view(1, 6, 16), k, v), exact.float().view(1, 6, 16))


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


@pytest.mark.usefixtures("with_and_without_kernels")
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


@pytest.mark.usefixtures("with_and_without_kernels")
@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize(("global_size", "span_top_k"), [(0, 0), (4, 0), (4, 4), (0, 4)])
def test_reattention_in_bfloat16_is_the_reference_s(queries: int, global_size: int, span_top_k: int) -> None:
    """Of the same numbers in float64, as near as the reference's own in bfloat16; what is selected is the same."""
    config = ReAttentionConfig(
        global_size=global_size, local_size=100, span_top_k=span_top_k, span_size=8, max_spans=12, chunk_size=64
    )
    angles = torch.outer(torch.arange(config.max_scope).float(), 1e4 ** (-torch.arange(0, 64, 2) / 64))
    tables = angles.cos(), angles.sin()
    q, k, v = (random(queries + 5, 6, 64), random(2, 900, 64, seed=1), random(2, 900, 64, seed=2))
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    for seq_len in range(800, 805 if queries == 1 else 801):
        arguments = q[seq_len - 800 :][:queries], k, v, seq_len, *tables, config
        exact, _ = reattention_reference(*[x.double() for x in arguments[:3]], *arguments[3:])
        plain, _ = reattention_reference(*arguments)
        ours = cpu_attention.reattention(*arguments)
        assert ours.dtype == torch.bfloat16
        allowed = 2 * (plain - exact).abs().max() + 2**-9 * exact.abs().max()
        assert (ours - exact).abs().max() <= allowed


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_rms_norm(dtype: torch.dtype, rows: int, scale: float) -> None:
    x, weight = (random(rows, 256) * scale).to(dtype), random(256, seed=1).to(dtype)
    wide = x.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), exact.to(dtype))


@pytest.mark.parametrize("rows", [1, 2])
def test_rms_norm_passes_on_what_is_not_finite(rows: int) -> None:
    for value in (torch.nan, torch.inf):
        x = torch.ones(rows, 8)
        x[0, 3] = value
        assert rms_norm(x, torch.ones(8), 1e-5).isnan().any()


@pytest.mark.usefixtures("with_and_without_kernels")
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_demo_model_computes_what_wide_weights_do(quantize: str | None) -> None:
    """Prefill in chunks and decode steps, inside and beyond the dense range, of weights as they lie in the file."""
    ours = api.load(DEMO, device="cpu", chunk_size=64, quantize=quantize)
    old = ours.model.attention
    attention = Attention(ours.config, old.mode, old.config, "torch", old.device)
    weights = load_weights(DEMO, ours.config, old.device, torch.float32, quantize=quantize)
    wide = {n: w.widen(torch.float32) if isinstance(w, QuantizedMatrix) else w for n, w in weights.items()}
    plain = api.LLM(Model(ours.config, wide, attention), None)
    ids = ours.encode((DEMO / "prompts" / "needle-16k.txt").read_text())[:1500]
    torch.testing.assert_close(ours.logits(ids), plain.logits(ids), atol=1e-4, rtol=0)
    generated = [llm.generate(ids, max_tokens=40, ignore_eos=True).token_ids for llm in (ours, plain)]
    assert generated[0] == generated[1]


@needs_tiles
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
