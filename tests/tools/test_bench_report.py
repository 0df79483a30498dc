"""tools/bench.py report: the page of benchmarks is what the kept results say, and results of all commands are read."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import bench
import bench_report
import pytest
from bench_machine import build
from testing import tiny_model, write_checkpoint

MACHINE = {"device": "a GPU", "python": "3.11", "torch": "2.11", "triton": None, "copy_gb_per_s": 2000.0}


def keep(folder: Path, name: str, command: str, rows: list[dict[str, Any]]) -> Path:
    options = {"command": command, "build": "1234567"}
    result = {"machine": MACHINE, "command_line": f"bench.py {command}", "options": options, "rows": rows}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result))
    return path


def section(path: Path) -> str:
    return bench_report.section(path.stem, path.read_text())


def test_every_command_that_measures_has_tables() -> None:
    commands = {command.__name__.removeprefix("bench_") for command in bench.COMMANDS}
    assert set(bench_report.TABLES) == commands - {"report"}


def test_the_page_is_what_the_results_say() -> None:
    files = sorted((bench_report.KERNELS / "benchmarks").glob("*.json"))
    assert files
    assert (bench_report.KERNELS / "BENCHMARKS.md").read_text() == bench_report.report(files)


def test_kernel(tmp_path: Path) -> None:
    nbytes = {"score, pick": 6e6, "attend, local part": 2e6}
    decode = {"kind": "decode", "queries": 1, "scope": 5000, "launch_us": 8.0, "sdpa_us": {"a": 16.0, "b": 20.0}}
    prefill = {
        "kind": "prefill",
        "context": 9000,
        "queries": 512,
        "phase_us": {"score, pick": 40.0},
        "launch_us": 100.0,
    }
    rows = [
        {"kind": "decode", "launches": ["decode_kernel"]},
        decode | {"context": 8192, "bytes": nbytes, "phase_us": {"score, pick": 6.0, "combine": 7.0}},
        decode | {"context": 16384, "bytes": nbytes, "phase_us": {"score, pick": 9.0}},
        prefill | {"score_flops": 4e9, "chunks": 4, "chunk_us": 90.0, "sdpa_us": {"causal, flash": 200.0}},
        {"kind": "prefill", "context": 10000, "skipped": "out of memory"},
    ]
    text = section(keep(tmp_path, "kernel-x", "kernel", rows))
    assert text.splitlines()[:5] == [
        "## kernel-x", "",
        "Build 1234567; a GPU; python 3.11, torch 2.11; copy bandwidth 2,000 GB/s.", "",
        "`bench.py kernel`",
    ]  # fmt: skip
    assert "One decode step launches: `decode_kernel`." in text
    assert "| 8,192 | 5,000 | 4.0 us | 8.0 us | 2.00 | 16.0 us (a) | 2.00 |" in text
    assert "with sketches" not in text
    assert "| score, pick | 6.0 us (3.0) | 9.0 us (3.0) |\n| combine | 7.0 us | - |" in text
    assert "| 9,000 | 512 | 40 us, 100 TFLOP/s | 100 us | 90 us (4) | 200 us (causal, flash) |" in text
    assert "Skipped: prefill 10000 out of memory." in text
    rows[2]["sketched"] = {
        "launch_us": 5.0,
        "bytes": {"score, pick": 3e6, "attend, local part": 2e6},
        "make_us": 70.0,
        "survivors": 44,
        "slices": 128,
        "scored_slices": 2,
    }
    text = section(keep(tmp_path, "kernel-x", "kernel", rows))
    assert "\n| 16,384 | 2.5 us | 5.0 us | 2.00 | 1.60 | 44 | 2 of 128 | 70 us |\n" in text
    rows[2]["voting"] = {"votes_us": 6.0, "count_us": 18.0, "layers": 4, "bytes": {"score, pick": 6e6}}
    text = section(keep(tmp_path, "kernel-x", "kernel", rows))
    assert "\n| 16,384 | 3.0 us | 6.0 us | 2.00 | 18.0 us, 4 layers |\n" in text


def test_other_commands(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"engine": "minirea", "context": 2048, "decode_ms": 2.0, "step_bytes": 2e9, "peak_bytes": 3e9},
        {"engine": "minirea", "context": 1024, "prefill_tokens": 512, "prefill_seconds": 0.5, "peak_bytes": 3e9},
        {"engine": "transformers", "context": 2048, "decode_ms": 4.0},
    ]
    text = section(keep(tmp_path, "model-x", "model", rows))
    assert (
        "| 2,048 | minirea | 2.000 ms | 1.000 ms | 2.00 | 3.0 GB |\n| 2,048 | transformers | 4.000 ms | - | - | - |"
        in text
    )
    assert "| 1,024, the last 512 | minirea | 1,024 | 0.500 s | 3.0 GB |" in text
    rows[0] |= {"host_ms": 0.6, "cache": "cache 5.0 GB, 2.0 of it on the host"}
    text = section(keep(tmp_path, "model-x", "model", rows))
    assert "| 2,048 | minirea | 2.000 ms | 1.600 ms | 1.25 | 5.0 GB, 2.0 of it on the host | 3.0 GB |" in text
    assert "| 2,048 | transformers | 4.000 ms | - | - | - | - |" in text
    rows = [
        {"kernel": "embed", "arguments": 3, "minirea_us": 2.0, "triton_us": 9.0},
        {"kernel": "b", "arguments": 1, "minirea_us": 3.0},
    ]
    text = section(keep(tmp_path, "launch-x", "launch", rows))
    assert "| `embed` | 3 | 2.0 us | 9.0 us |\n| `b` | 1 | 3.0 us | - |" in text
    rows = [{"reader": "minirea", "state": "warm", "seconds": 2.0, "gb_per_s": 8.03}]
    assert "| minirea | warm | 2.00 s | 8.03 GB/s |" in section(keep(tmp_path, "load-x", "load", rows))
    rows = [{"context": 65536, "what": "open, warm", "seconds": 0.25, "bytes": 10**9, "gb_per_s": 4.0}]
    assert "| 65,536 | open, warm | 0.250 s | 4.00 GB/s |" in section(keep(tmp_path, "c", "context", rows))


def test_what_a_command_prints_last_is_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_checkpoint(tmp_path / "model", tiny_model())
    on_cpu = ["--device", "cpu", "--dtype", "float32", "--states", "warm", "--readers", "floor"]
    monkeypatch.setattr(sys, "argv", ["bench.py", "--build", "mine", "load", "--model", str(model), *on_cpu])
    bench.main()
    kept, page, log = tmp_path / "kept", tmp_path / "page.md", tmp_path / "load.log"
    kept.mkdir()
    log.write_text(capsys.readouterr().out)
    assert len(log.read_text().splitlines()) > 2
    monkeypatch.setattr(sys, "argv", ["bench.py", "report", str(log), "--results", str(kept), "--out", str(page)])
    bench.main()
    text = page.read_text()
    assert [path.name for path in kept.iterdir()] == ["load.json"] and "\n## load\n" in text
    shutil.copy(kept / "load.json", tmp_path / "again.json")  # the line alone, or what was kept
    monkeypatch.setattr(sys, "argv", [*sys.argv[:2], str(tmp_path / "again.json"), *sys.argv[3:]])
    bench.main()
    assert (kept / "again.json").read_text() == (kept / "load.json").read_text()
    assert text.startswith(bench_report.HEAD) and "\nBuild mine; " in text and "| floor | warm | " in text
    assert f"`python tools/bench.py --build mine load --model {model} --device cpu" in text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"machine": {}, "options": {"command": "kernel"}, "rows": []}',
        '{"machine": {}, "options": {"command": "report"}, "rows": []}',
    ],
)
def test_a_file_without_a_result_is_named(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text(text)
    page = tmp_path / "page.md"
    kept = tmp_path / "kept"
    kept.mkdir()
    for words in (["--results", str(tmp_path)], [str(tmp_path / "a.json"), "--results", str(kept)]):
        monkeypatch.setattr(sys, "argv", ["bench.py", "report", *words, "--out", str(page)])
        with pytest.raises(SystemExit, match=r"bench.py report: a is no result of bench.py"):
            bench.main()
        assert not page.exists() and not list(kept.iterdir())


def test_a_build_without_git_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert build() is None
