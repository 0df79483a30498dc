"""tools/sketch_survivors.py compares a model's selections with and without sketches, and fails where one differs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import sketch_survivors

from minirea.kernels import reference

DEMO = Path(__file__).parents[2] / "weights" / "demo"


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str]:
    monkeypatch.setattr(sys, "argv", ["sketch_survivors.py", "--model", str(DEMO), "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as ended:
        sketch_survivors.main()
    return ended.value.code, capsys.readouterr().out


def test_the_demos_selections(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every layer but the first, whose keys have no sketch."""
    code, printed = run(monkeypatch, capsys, "--tokens", "2012", "--prompts", "2", "--steps", "2")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
    layers = [row for row in rows if row and row[0].isdigit()]
    assert [int(row[0]) for row in layers] == [1, 2, 3, 4, 5]
    for _, shares, survivors, whole in layers:
        assert 0 < float(shares.split(", ")[0]) < 100 and int(survivors.split(", ")[2]) >= 1
        assert whole == f"0 of {2 * 2 * 2 * 64}"  # prompts, tokens, key/value heads, slices
    assert (code, printed.splitlines()[-1]) == (0, "20 of 20 selections and outputs are the exact ones")


def test_a_selection_that_differs_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    score, calls = reference.score_by_sketch, []

    def wrong(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        winners = score(*arguments, **options)
        return winners + 64 if len(calls) == 1 else winners

    monkeypatch.setattr(reference, "score_by_sketch", wrong)
    code, printed = run(monkeypatch, capsys, "--tokens", "1900", "--prompts", "1", "--steps", "1")
    assert (code, printed.splitlines()[-1]) == (1, "4 of 5 selections and outputs are the exact ones")


def test_prompts_that_select_nothing_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = run(monkeypatch, capsys, "--tokens", "1536", "--prompts", "1")
    assert code == "nothing was selected: --tokens is 1,536, expected more than 1,536"


def test_a_text_that_is_too_short_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("It was a quiet day.")
    arguments = ["--model", str(DEMO), "--device", "cpu", "--text", str(tmp_path / "text")]
    monkeypatch.setattr(sys, "argv", ["sketch_survivors.py", *arguments])
    with pytest.raises(SystemExit, match=r"^the text has \d tokens, expected at least 4,146$"):
        sketch_survivors.main()


@pytest.mark.parametrize("flag", ["--model", "--text"])
def test_files_that_are_not_there_are_one_line(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sketch_survivors.py", "--model", "weights/demo", flag, "nowhere"])
    with pytest.raises(SystemExit, match=r"^sketch_survivors\.py: error: .*nowhere"):
        sketch_survivors.main()
