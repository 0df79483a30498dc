"""tools/bench.py: every command ends in one JSON line that holds what was measured."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench
import bench_context
import bench_machine
import bench_model
import bench_report
import pytest
import torch
from bench_machine import Lengths, lengths, tokens
from shapes import SHAPES, named
from testing import tiny_model, write_checkpoint

import minirea
from minirea.checkpoint_config import load_config
from minirea.config import ReAttentionConfig
from minirea.errors import MemoryLimitError
from minirea.placement import Placement

ON_CPU = ["--device", "cpu", "--dtype", "float32"]


@pytest.mark.parametrize(("text", "expected"), [("512", 512), ("64k", 65536), ("64K", 65536), ("1m", 1048576)])
def test_lengths(text: str, expected: int) -> None:
    assert tokens(text) == expected


@pytest.mark.parametrize("given", [["1k,32k", "8"], ["32k", "8,1k"], ["8,1k,32k,8"]])
def test_lists_of_lengths(given: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--contexts", type=lengths, nargs="+", action=Lengths)
    assert parser.parse_args(["--contexts", *given]).contexts == [8, 1024, 32768]


BenchRun = Callable[..., dict[str, Any]]
copy_bandwidth = functools.cache(bench_machine.copy_bandwidth)  # measured once


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> BenchRun:
    """Runs bench.py with such words, in this process; returns its result, for which `report` has tables."""
    monkeypatch.setattr(bench_machine, "copy_bandwidth", copy_bandwidth)

    def run(*words: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["bench.py", *words, *ON_CPU])
        bench.main()
        line = capsys.readouterr().out.splitlines()[-1]
        found: dict[str, Any] = json.loads(line)
        measured = any("skipped" not in row for row in found["rows"])
        assert ("\n| " in bench_report.section("a result", line)) == measured
        return found

    return run


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """Flags of the engines that `bench.py model` runs, in order; they run in this process, instead of their own."""
    ran: list[list[str]] = []
    threads = torch.get_num_threads()

    def run_engine(own: list[str], _: int) -> Iterator[dict[str, Any]]:
        ran.append(own)
        yield from bench_model.measure(bench.parser().parse_args([*sys.argv[1:], *own]))

    monkeypatch.setattr(bench_model, "run_engine", run_engine)
    yield ran
    torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", ["", "demo"])
def test_several_ranks_are_measured(tmp_path: Path, shape: str, measure: BenchRun) -> None:
    """In a process of its own, which starts the other ranks; of a shape it writes a checkpoint that all read."""
    model = ["--shape", shape, "--layers", "2"] if shape else ["--model", str(write_checkpoint(tmp_path, tiny_model()))]
    options = ["--contexts", "300", "--prefill", "40", "--tokens", "2", "--engines", "minirea", "--gpus", "2"]
    rows = measure("model", *model, *options)["rows"]
    assert [(row["context"], "decode_ms" in row, "skipped" in row) for row in rows] == [
        (300, True, False),
        (40, False, False),
    ]


def test_contexts_are_saved_and_opened_beside_plain_files(tmp_path: Path, measure: BenchRun) -> None:
    """On the disk that it is told, where nothing is left; both modes' caches."""
    model = write_checkpoint(tmp_path / "model", tiny_model())
    (tmp_path / "disk").mkdir()
    rows = measure("context", "--model", str(model), "--contexts", "300,100", "--folder", str(tmp_path / "disk"))[
        "rows"
    ]
    timed = ["save", "open, cold", "open, warm", "floor: write", "floor: read, cold"]
    assert [(row["context"], row["what"]) for row in rows] == [(n, what) for n in (100, 300) for what in timed]
    config = load_config(model)
    row_bytes = 2 * 4 * config.num_layers * config.num_kv_heads * config.head_dim  # keys and values, float32
    assert all(row["seconds"] > 0 and 0 < row["bytes"] - row["context"] * row_bytes < 20_000 for row in rows)
    assert not list((tmp_path / "disk").iterdir())


def test_an_opened_context_that_differs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = minirea.load(write_checkpoint(tmp_path / "model", tiny_model()), device="cpu")
    opened = minirea.LLM.open_session

    def damaged(self: minirea.LLM, *arguments: Any) -> minirea.Session:
        session = opened(self, *arguments)
        with torch.inference_mode():
            session.cache.v[0][0, 7] += 1
        return session

    monkeypatch.setattr(minirea.LLM, "open_session", damaged)
    with pytest.raises(AssertionError, match="what was opened differs"):
        bench_context.measure(llm, 64, tmp_path)


def test_model_directory_beside_transformers(tmp_path: Path, measure: BenchRun, engines: list[list[str]]) -> None:
    model = write_checkpoint(tmp_path, tiny_model())
    options = ["--tokens", "3", "--prefill", "150", "--clock", "cpu"]
    result = measure("model", "--model", str(model), "--contexts", "2000,100", *options)
    assert engines == [["--engine", "minirea"], ["--engine", "transformers"]]
    assert result["machine"]["copy_gb_per_s"] > 0
    kinds = [("decode_ms", 100), ("decode_ms", 2000), ("prefill_seconds", 150)]
    cells = [(engine, kind, context) for engine in ("minirea", "transformers") for kind, context in kinds]
    rows = result["rows"]
    assert [(row["engine"], *next((k, row["context"]) for k, _ in kinds if k in row)) for row in rows] == cells
    assert all(row.get("decode_ms", row.get("prefill_seconds")) > 0 and row["peak_bytes"] > 10**7 for row in rows)
    assert rows[2]["prefill_tokens"] == rows[5]["prefill_tokens"] == 150
    assert rows[0]["step_bytes"] == rows[3]["step_bytes"]  # both read all of 100 tokens
    assert rows[1]["step_bytes"] < rows[4]["step_bytes"]
    assert not any("threads" in row for row in rows)


def test_engines_in_turn_on_some_threads(tmp_path: Path, measure: BenchRun, engines: list[list[str]]) -> None:
    """Each length by itself, twice; and full attention reads more."""
    model = ["--model", str(write_checkpoint(tmp_path, tiny_model())), "--contexts", "2000", "--tokens", "2"]
    turns = ["--prefill", "20", "--threads", "2", "--rounds", "2", "--engines", "minirea", "minirea-full"]
    rows = measure("model", *model, *turns)["rows"]
    names = ("minirea", "minirea-full")
    cells = [(row["engine"], row["threads"], row["context"], "decode_ms" in row) for row in rows]
    assert cells == [(name, 2, count, count == 2000) for count in (2000, 20) for name in names]
    assert rows[0]["step_bytes"] < rows[1]["step_bytes"]
    assert engines == 2 * [
        ["--engine", name, "--cell", *cell, "--threads", "2"]
        for cell in (("decode", "2000"), ("prefill", "20"))
        for name in names
    ]


def test_the_fastest_of_several_rounds_counts() -> None:
    def row(engine: str, threads: int, **rest: Any) -> dict[str, Any]:
        return {"engine": engine, "threads": threads, "context": 7, **rest}

    kept = [row("minirea", 1, decode_ms=2.0), row("minirea", 1, prefill_seconds=0.5), row("minirea", 2, decode_ms=3.0)]
    skipped = {"engine": "transformers", "threads": 1, "skipped": "not there"}
    slower = [
        row("minirea", 1, prefill_seconds=0.6),
        row("minirea", 1, decode_ms=2.5),
        row("minirea", 2, decode_ms=4.0),
    ]
    assert bench_model.fastest([slower[0], kept[0], kept[2], skipped, kept[1], slower[1], slower[2], skipped]) == [
        kept[1], kept[0], kept[2], skipped,
    ]  # fmt: skip
    assert bench_model.named_engine(kept[0]) == "minirea, 1 thread"
    assert bench_model.named_engine(kept[2]) == "minirea, 2 threads"


@pytest.mark.usefixtures("engines")
def test_shape(measure: BenchRun) -> None:
    """Random weights need no files; two chunks of 300 at the end of 2,000 tokens."""
    shape = ["--shape", "demo", "--layers", "1", "--contexts", "20", "--tokens", "2", "--no-fill"]
    ends = ["--prefill", "2000", "--last-chunks", "2", "--chunk-size", "300", "--engines", "minirea"]
    decode, prefill = measure("model", *shape, *ends)["rows"]
    assert decode["decode_ms"] > 0
    assert (prefill["context"], prefill["prefill_tokens"]) == (2000, 600)


@pytest.mark.usefixtures("engines")
def test_a_shape_whose_tokens_vote_together(measure: BenchRun) -> None:
    """Its cache keeps winners: those of random keys are anywhere, and a prompt begins with none."""
    shape = ["--shape", "smollm2-135m", "--layers", "1", "--contexts", "20", "--tokens", "2"]
    decode, prefill = measure("model", *shape, "--prefill", "40", "--engines", "minirea")["rows"]
    assert decode["decode_ms"] > 0
    assert prefill["prefill_tokens"] == 40


def test_an_engine_that_is_not_there_is_skipped_with_the_reason(
    tmp_path: Path, measure: BenchRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process ends; the program goes on."""
    (tmp_path / "transformers.py").write_text("raise ModuleNotFoundError('no transformers here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rows = measure("model", "--shape", "demo", "--engines", "transformers")["rows"]
    assert rows == [{"engine": "transformers", "skipped": "ModuleNotFoundError: no transformers here"}]


@pytest.mark.parametrize("error", [MemoryLimitError("needs 1 GB"), torch.OutOfMemoryError("needs 1 GB\nmore")])
def test_out_of_memory_is_a_row(error: Exception) -> None:
    def fail() -> dict[str, Any]:
        raise error

    row = bench_model.measure_one(argparse.Namespace(device="cpu"), 7, fail)
    assert row == {"context": 7, "skipped": "out of memory: needs 1 GB"}
    row["engine"] = "minirea"
    assert bench_model.row_text(row, [row], 1.0).endswith("minirea       skipped: out of memory: needs 1 GB")


def test_floor_counts_what_a_step_reads() -> None:
    """Checked by hand for LLaMA-3.1-8B in bfloat16, on a device that holds nothing."""
    c = named("llama-3.1-8b")
    layer = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336 + 2)
    head = embedding = 128256 * 4096
    key = 32 * 8 * 128 * 2
    model = argparse.Namespace(
        nbytes=2 * (32 * layer + head + embedding + 4096),
        embed=argparse.Namespace(nbytes=2 * embedding),
        head=None,
        layers=[],
        dtype=torch.bfloat16,
        config=argparse.Namespace(num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, part=None),
        attention=argparse.Namespace(
            dense_size=16416,
            config=ReAttentionConfig.for_context(131072),
        ),
    )
    engine = bench_model.Minirea.__new__(bench_model.Minirea)
    engine.llm = argparse.Namespace(model=model)
    cache = argparse.Namespace(sketched=False, placement=Placement())
    engine.session = argparse.Namespace(cache=cache)
    assert c["num_hidden_layers"] == 32
    assert engine.step_bytes(1024) == 15_009_849_344 + 2 * 1024 * key
    assert engine.step_bytes(16416) == 15_009_849_344 + 2 * 16416 * key  # all of them, and nothing is scored
    assert engine.step_bytes(16417) == 15_009_849_344 + (16417 - 8224 + 2 * 16416) * key
    assert engine.step_bytes(131072) == 15_009_849_344 + (131072 - 8224 + 2 * 16416) * key
    cache.sketched = True  # in all layers but the first
    looked_at = key // 32 + 31 * 8 * (128 + 4)
    expected = 15_009_849_344 + (131072 - 8224) * looked_at + 2 * 16416 * key
    assert engine.step_bytes(131072) == expected and engine.host_bytes(131072) == 0
    cache.placement = Placement(True, 32, 5, 20000)  # 128 winners select 32 tokens each, at most
    assert engine.host_bytes(131072) == (32 + 5) * (32 + 4096) * key // 32 and engine.host_bytes(16416) == 0
    assert engine.step_bytes(131072) == expected - engine.host_bytes(131072)
    whole, far = argparse.Namespace(num_heads=32), engine.host_bytes(131072)
    model.config = argparse.Namespace(
        num_layers=32, num_heads=8, num_kv_heads=2, head_dim=128, part=argparse.Namespace(whole=whole)
    )
    assert engine.host_bytes(131072) == far // 4  # of a rank of four, whose heads vote together


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_valid_configs(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(named(name)))
    assert load_config(tmp_path).num_layers == SHAPES[name]["num_hidden_layers"]


def test_load(tmp_path: Path, measure: BenchRun) -> None:
    rows = measure("load", "--model", str(write_checkpoint(tmp_path, tiny_model())))["rows"]
    expected = [(reader, state) for reader in ("floor", "minirea", "safetensors") for state in ("cold", "warm")]
    assert [(row["reader"], row["state"]) for row in rows] == expected
    assert all(row["gb_per_s"] > 0 for row in rows)


@pytest.mark.parametrize("command", ["model", "load"])
def test_help(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", command, "--help"])
    with pytest.raises(SystemExit):
        bench.main()
    assert f"bench.py {command}" in capsys.readouterr().out


def test_what_cannot_be_measured_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", "load", "--model", "nowhere"])
    with pytest.raises(SystemExit, match=r"^bench\.py: error: nowhere: no such model directory$"):
        bench.main()


def test_a_filled_cache_has_winners(tmp_path: Path) -> None:
    """So that what is timed counts as many votes as a step of `generate` does."""
    llm = minirea.load(write_checkpoint(tmp_path, tiny_model()), vote_window=3, carry_votes=True)
    cache = llm.session(100).cache
    assert cache.recent_size == 6 and bool((cache.winners == -1).all())
    list(bench_model.fill_randomly(llm.model, cache, 90))
    assert bool(((cache.winners >= 0) & (cache.winners < 90)).all())
