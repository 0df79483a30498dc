"""tools/bench.py measures both engines and ends in one JSON line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench import tokens
from testing import tiny_model, write_checkpoint

BENCH = Path(__file__).parents[2] / "tools" / "bench.py"


@pytest.mark.parametrize(("text", "expected"), [("512", 512), ("64k", 65536), ("64K", 65536), ("1m", 1048576)])
def test_lengths(text: str, expected: int) -> None:
    assert tokens(text) == expected


def test_it_ends_in_one_json_line(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, tiny_model())
    options = ["--contexts", "100", "2000", "--tokens", "3", "--device", "cpu", "--dtype", "float32", "--prefill"]
    command = [sys.executable, str(BENCH), "model", "--model", str(model), *options]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result = json.loads(out.splitlines()[-1])
    assert result["machine"]["copy_gb_per_s"] > 0
    cells = [(row["engine"], row["context"]) for row in result["rows"]]
    assert cells == [(engine, context) for context in (100, 2000) for engine in ("minirea", "transformers")]
    for row in result["rows"]:
        assert row["decode_ms"] > 0
        assert row["prefill_seconds"] > 0
        assert row["peak_bytes"] > 10**7
    assert result["rows"][0]["step_bytes"] == result["rows"][1]["step_bytes"]  # both read all of 100 tokens
    assert result["rows"][2]["step_bytes"] < result["rows"][3]["step_bytes"]
