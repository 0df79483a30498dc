"""tools/bench_launch.py without a GPU: what it launches how often, and what it leaves as it was."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import bench_launch
import pytest
import torch

pytest.importorskip("triton")

from minirea.kernels import driver


def count_token(kernel: Any, programs: int, device: torch.device, arguments: Any, constants: dict[str, Any]) -> None:
    """A launch that changes what it is given."""
    assert (kernel.fn.__name__, programs, device, constants) == ("embed", 3, torch.device("cpu"), {"E": 64})
    arguments[0].add_(1)


@pytest.mark.parametrize("has_compiler", [True, False])
def test_both_drivers_repeat_a_launch(has_compiler: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def by(name: str, works: bool = True) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            if not works:
                raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")
            calls.append(name)
            count_token(*arguments)

        return launch

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(driver, "launch", by("minirea"))
    monkeypatch.setattr(bench_launch, "launch_by_triton", by("triton", works=has_compiler))
    seq_len, x = torch.tensor([7]), torch.ones(64)
    kernel = SimpleNamespace(fn=SimpleNamespace(__name__="embed"), params=[1, 2, 3])
    launch = bench_launch.Launch(kernel, 3, torch.device("cpu"), (seq_len, (x, 1)), {"E": 64})
    row = bench_launch.measure(launch)
    assert int(seq_len) == 7
    assert row["kernel"] == "embed"
    assert row["minirea_us"] >= 0
    assert ("triton_us" in row) == has_compiler
    total = bench_launch.LAUNCHES * bench_launch.REPEATS
    assert calls.count("minirea") == total
    assert calls.count("triton") == (total + 1) * has_compiler
    assert ("none" in bench_launch.row_text(row)) != has_compiler


def test_all_launches_can_be_by_tritons_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "launch", driver.launch)
    bench_launch.use_tritons_driver()
    assert driver.launch is bench_launch.launch_by_triton
