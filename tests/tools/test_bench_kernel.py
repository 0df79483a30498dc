"""tools/bench.py kernel: what it counts, what it refuses, and that its phases are those of the fused kernel."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import bench
import pytest
import torch
from bench_kernel import Layer, graph_us, row_text

from minirea.errors import InputError

HERE = Path(__file__).parent


def parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.bench_kernel.add_command(parser.add_subparsers())
    return parser.parse_args(["kernel", *options])


def test_floors_and_operations_by_hand() -> None:
    """The shape of the kernel's table: a key is 8 heads of 128 numbers of two bytes."""
    layer = Layer.of(parse())
    nbytes = layer.decode_bytes(131072, 8147)
    assert sum(nbytes.values()) == (131072 - 4128) * 2048 + 8147 * 4096
    assert nbytes["attend, local part"] == 4096 * 4096
    sketched = layer.decode_bytes(131072, 8147, 132)
    assert sketched == nbytes | {"score, pick": (131072 - 4128) * 8 * 132}
    assert layer.score_flops(131072, 512) == 2 * 32 * 512 * (131072 - 4128) * 128
    # Three queries at the end of five keys see 3, 4 and 5 of them; a key costs a product with q and one with v.
    assert Layer.of(parse("--heads", "1", "--kv-heads", "1")).attend_flops(5, 3) == (3 + 4 + 5) * 4 * 128


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--contexts", "4128,8k"], "--contexts has 4128, expected more than global and local size \\(4128\\)"),
        (["--heads", "6", "--kv-heads", "4"], "--heads is 6, expected heads to be a multiple"),
        (["--kv-heads", "0"], "--kv-heads is 0"),
        (["--head-dim", "7"], "--head-dim is 7"),
        (["--span-top-k", "0"], "--span-top-k or --max-spans is 0"),
        (["--span-size", "3"], "span_size is 3"),
        (["--queries", "5000"], "--queries is 5000, expected 1 to --local-size \\(4096\\)"),
    ],
)
def test_shapes_that_cannot_be_measured_are_refused(options: list[str], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        Layer.of(parse(*options))


def test_rows_are_readable() -> None:
    """Ratios are to the launch and to the floor: 4.128 MB at 1 GB/ms are 4,128 us."""
    decode = {
        "kind": "decode",
        "context": 8192,
        "queries": 1,
        "pairs": 2,
        "scope": 5000,
        "bytes": {"score, pick": 3e6, "attend, local part": 1e6, "attend, far part": 1.28e5},
        "phase_us": {"score, pick": 4000.0, "combine": 7.0},
        "launch_us": 8256.0,
        "sdpa_bytes": 6e6,
        "sdpa_us": {"heads as rows, flash": 16512.0},
    }
    lines = row_text(decode, 1000.0).splitlines()
    assert lines[1:3] == ["decode, 8,192 keys, scope 5,000, 2 pairs of caches", line("floor", "4,128.0")]
    assert lines[3] == line("score, pick, alone", "4,000.0", "floor 3,000.0")
    assert lines[4] == line("combine, alone", "7.0")
    assert lines[5] == line("whole launch", "8,256.0", "2.00 x floor")
    assert lines[6] == line("all keys, SDPA heads as rows, flash", "16,512.0", "2.00 x the launch, floor 6,000.0")
    sketched = {
        "launch_us": 4128.0,
        "bytes": {"score, pick": 1.5e6, "attend, local part": 5.64e5},
        "make_us": 70.0,
        "survivors": 44,
        "slices": 128,
        "scored_slices": 2,
    }
    with_sketches = row_text(decode | {"sketched": sketched}, 1000.0).splitlines()
    note = "2.00 x floor 2,064.0, 0.50 x without, at most 44 survivors, 2 of 128 slices scored whole"
    assert with_sketches[6] == line("whole launch with sketches", "4,128.0", note)
    assert with_sketches[7] == line("sketches of all keys", "70.0")
    assert with_sketches[:6] + with_sketches[8:] == lines
    prefill = {
        "kind": "prefill",
        "context": 8192,
        "queries": 512,
        "pairs": 2,
        "scope": 5000,
        "phase_us": {"score, pick": 40.0},
        "score_flops": 4e9,
        "launch_us": 100.0,
        "launch_flops": 2e10,
        "chunks": 4,
        "chunk_us": 90.0,
        "sdpa_flops": 8e10,
        "sdpa_us": {"causal, flash": 200.0},
    }
    assert row_text(prefill, 1.0).splitlines()[1:] == [
        "prefill, 8,192 keys, 512 queries, scope 5,000, 2 pairs of caches",
        line("score, pick, alone", "40.0", "100 TFLOP/s"),
        line("whole launch", "100.0", "200 TFLOP/s"),
        line("each of 4 chunks in one launch", "90.0"),
        line("all keys, SDPA causal, flash", "200.0", "2.00 x the launch, 400 TFLOP/s"),
    ]
    skipped = {"kind": "prefill", "context": 9000, "queries": 3, "skipped": "out of memory: too much"}
    assert row_text(skipped, 1.0).endswith("prefill, 9,000 keys, 3 queries: skipped, out of memory: too much")


def line(name: str, us: str, note: str = "") -> str:
    return f"  {name:<44}{us:>10} us  {note}".rstrip()


def run_bench(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE.parents[1] / "tools" / "bench.py"), "kernel", *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
@pytest.mark.parametrize("command", ["kernel", "launch"])
def test_a_machine_without_a_gpu_is_told_so(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", command])
    message = rf"^bench.py {command} needs an NVIDIA GPU, and torch finds no CUDA device here$"
    with pytest.raises(SystemExit, match=message):
        bench.main()


@pytest.mark.gpu
def test_every_row_on_a_gpu() -> None:
    small = ["--heads", "8", "--kv-heads", "2", "--head-dim", "64", "--local-size", "512", "--queries", "64"]
    done = run_bench(*small, "--contexts", "2k,3k")
    assert done.returncode == 0, done.stderr
    assert "\n| " in bench.bench_report.section("kernel", done.stdout.splitlines()[-1])
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [(row["kind"], row.get("context")) for row in rows] == [
        (kind, context) for kind in ("decode", "prefill") for context in (None, 2048, 3072)
    ]
    assert [row["launches"] for row in rows if "launches" in row] == [["decode_kernel"], ["chunk_kernel"]]
    timed = [row for row in rows if "launch_us" in row]
    assert len(timed) == 4 and all(row["launch_us"] > 0 and row["sdpa_us"] for row in timed)
    assert [len(row["phase_us"]) for row in timed] == [7, 7, 1, 1]
    assert all(row["sketched"]["launch_us"] > 0 and row["sketched"]["make_us"] > 0 for row in timed[:2])
    chunks = [row.get("chunks") for row in timed]
    assert chunks[:2] == [None, None] and chunks[2] == chunks[3] >= 4 and timed[-1]["chunk_us"] > 0
    assert all(us > 0 for row in timed for us in [*row["phase_us"].values(), *row["sdpa_us"].values()])


@pytest.mark.gpu
def test_graph_us_runs_every_pair() -> None:
    """Once before the capture and once in each replay, of which there are at least five."""
    pairs = [(torch.zeros(1, device="cuda"), torch.zeros(1, device="cuda")) for _ in range(3)]

    def step(k: torch.Tensor, v: torch.Tensor) -> None:
        k += 1
        v -= 1

    with torch.cuda.stream(torch.cuda.Stream()):
        assert graph_us(step, pairs) > 0
    assert len({int(k) for k, _ in pairs}) == 1 and int(pairs[0][0]) >= 6 and int(pairs[0][1]) <= -6
