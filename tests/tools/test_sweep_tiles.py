"""tools/sweep_tiles.py: which variants it measures, what it refuses, and that a variant is what is launched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sweep_tiles
import torch
from bench_kernel import Layer

from minirea.errors import InputError
from minirea.kernels.fused import plan
from minirea.kernels.fused.arguments import Tiles

SCRIPT = Path(sweep_tiles.__file__)


def variants(*options: str) -> list[sweep_tiles.Variant]:
    arguments = sweep_tiles.parser().parse_args([*options])
    return sweep_tiles.variants(arguments, Layer.of(arguments))


def layer_of(*options: str) -> plan.Layer:
    bench = Layer.of(sweep_tiles.parser().parse_args([*options]))
    return plan.Layer(bench.num_heads, bench.num_kv_heads, bench.head_dim, bench.dtype, bench.config)


def test_every_combination_and_first_what_ships() -> None:
    shipped = plan.decode_tiles(layer_of("decode"))
    found = variants("decode", "--block-a", "32,64", "--stages", "3,4")
    assert found[0] == (shipped, None)
    assert len(found) == len(set(found)) == 4
    assert {(v.tiles.BLOCK_A, v.tiles.num_stages) for v in found} == {(32, 3), (32, 4), (64, 3), (64, 4)}
    small = "prefill", "--heads", "9", "--kv-heads", "3", "--head-dim", "64", "--slices", "1,2"
    assert variants(*small) == [(plan.chunk_tiles(layer_of(*small)), slices) for slices in (None, 1, 2)]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["decode", "--block-n", "48"], "argument --block-n: 48 is not a power of two"),
        (["decode", "--block-m", "8"], "argument --block-m: 8 is below 16"),
        (["prefill", "--warps", "0"], "argument --warps: 0 is not positive"),
        (["decode", "--slices", "2"], "sweep_tiles.py: --slices is given, expected none for decode"),
        (["decode", "--heads", "6", "--kv-heads", "4"], "sweep_tiles.py: --heads is 6"),
        (["bothe"], "invalid choice"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    options: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sweep_tiles.py", *options])
    with pytest.raises(SystemExit) as stop:
        sweep_tiles.main()
    assert complaint in capsys.readouterr().err + str(stop.value)


def test_a_variant_is_what_is_launched() -> None:
    """Slices change what a chunk's rows leave in scratch; without them the kernel's own choice stays."""
    layer, tiles = layer_of("prefill", "--slices", "8"), Tiles(64, 64, 32, 4, 2, 2)
    own = plan.plan_chunks(layer, tiles, 264, True, 4, 512, 32768)
    for slices in (None, 8):
        with sweep_tiles.launched_as(sweep_tiles.Variant(tiles, slices)):
            assert plan.chunk_tiles(layer) == plan.decode_tiles(layer) == tiles
            made = plan.plan_chunks(layer, tiles, 264, True, 4, 512, 32768)
        chosen = made.c.SLICES
        assert chosen == (slices or own.c.SLICES)
        assert made.scratch["candidate"] == (torch.int64, (4 * 8 * 512 * 4, made.c.CANDIDATES))
        assert {name for name in made.scratch if made.scratch[name] != own.scratch[name]} <= {"candidate"}
    assert plan.plan_chunks(layer, tiles, 264, True, 4, 512, 32768) == own


def test_rows_are_readable() -> None:
    variant = sweep_tiles.Variant(Tiles(16, 128, 64, 8, 3, 1), 2)
    tiles = "BLOCK_M 16, BLOCK_N 128, BLOCK_A 64, num_warps 8, num_stages 3, programs_per_sm 1, slices 2"
    assert sweep_tiles.row_text(variant, {"launch_us": {8192: 28.81}}) == f"{tiles}: 8,192 keys 28.8 us"
    skipped = {"launch_us": {}, "skipped": "too large"}
    assert sweep_tiles.row_text(variant, skipped) == f"{tiles}: too large"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_machine_without_a_gpu_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sweep_tiles.py", "decode"])
    with pytest.raises(SystemExit, match=r"^sweep_tiles.py needs an NVIDIA GPU, and torch finds no CUDA device here$"):
        sweep_tiles.main()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_variants_on_a_gpu(kind: str) -> None:
    small = ["--heads", "8", "--kv-heads", "2", "--head-dim", "64", "--local-size", "512", "--queries", "64"]
    options = [kind, *small, "--contexts", "2k", "--stages", "2", *(["--slices", "2"] if kind == "prefill" else [])]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" keys ") == 2 and "skipped" not in done.stdout


def test_slices_for_decode_are_refused() -> None:
    with pytest.raises(InputError, match="--slices"):
        variants("decode", "--slices", "1")
