"""The bar's estimate: work that grows with the context as attention does."""

from __future__ import annotations

import dataclasses
import functools
import sys

import pytest
import tqdm
from testing import tiny_config

from minirea.cache import ALL_TOKENS
from minirea.config import ReAttentionConfig
from minirea.progress import ReadingBar, bar, bar_of_bytes, work_of

MODEL = tiny_config()
SCOPE = ReAttentionConfig(global_size=4, local_size=24, span_top_k=2, span_size=4, max_spans=5, chunk_size=16)


def token_cost(n: int, mode: str, scope: ReAttentionConfig, dense_size: int, window: int | None = None) -> int:
    """Multiplications of the n-th token in a layer."""
    products = 64 * (4 + 2 + 2) * 16 + 64 * 64 + 3 * 64 * 112
    beyond = mode != "full" and n > dense_size
    seen = min(n, scope.global_size + scope.max_selected + scope.local_size) if beyond else min(n, window or n)
    scored = n - 28 if mode == "reattention" and n > dense_size else 0
    return products + 4 * 16 * (2 * seen + scored)


@pytest.mark.parametrize("dense_size", [28, 48, 200])
@pytest.mark.parametrize("mode", ["reattention", "streaming", "full", "window"])
def test_work_is_the_sum_of_what_tokens_cost(mode: str, dense_size: int) -> None:
    scope = dataclasses.replace(SCOPE, span_top_k=0) if mode == "streaming" else SCOPE
    window = 40 if mode == "window" else None
    model = dataclasses.replace(MODEL, sliding_window=window)
    mode = "full" if mode == "window" else mode
    dense_size = ALL_TOKENS if mode == "full" else dense_size
    work = work_of(model, mode, scope, dense_size)
    for n in (10, 28, 48, 49, 300, 5000):
        expected = sum(token_cost(i, mode, scope, dense_size, window) for i in range(1, n + 1))
        assert work(n) == pytest.approx(expected, rel=0.01)


def test_hidden_bars_start_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(tqdm.tqdm, "monitor", None)
    monkeypatch.setattr("tqdm.std.TMonitor", lambda *arguments: started.append(arguments))
    for progress in (False, True):
        with bar(3, progress) as one, bar_of_bytes(5, "bytes", progress) as other:
            one.update(2)
            other.update(5)
        assert bool(started) == progress


def test_bars_are_hidden_where_they_cannot_or_must_not_be_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as program:
        program.setattr(sys, "stderr", None)
        with bar(3, True) as one, bar_of_bytes(5, "bytes", True) as other:
            one.update(2)
            other.update(5)
    disabled = type("Disabled", (tqdm.tqdm,), {"__init__": functools.partialmethod(tqdm.tqdm.__init__, disable=True)})
    monkeypatch.setattr("minirea.progress.tqdm", disabled)  # what TQDM_DISABLE makes of it
    with bar(3, True) as one:
        one.update(2)
    assert capsys.readouterr().err == ""


def test_the_bar_counts_tokens_and_work(capsys: pytest.CaptureFixture[str]) -> None:
    work = work_of(MODEL, "full", SCOPE, ALL_TOKENS)
    with ReadingBar(work, 100, 10_000, hide=False) as bar:
        bar.update(5_000)
        assert bar._bar.n < 0.4 * bar._bar.total
        bar.update(5_000)
        assert bar._bar.n == pytest.approx(bar._bar.total)
    assert "0 of 10,000 tokens" in capsys.readouterr().err
