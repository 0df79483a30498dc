"""Bars on stderr. The one of a prompt that is read counts that later tokens cost more than earlier ones."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tqdm import tqdm

from minirea.config import ModelConfig, ReAttentionConfig


class _Hidden(tqdm):  # type: ignore[misc]  # it has no types
    """tqdm starts a thread with a program's first bar, be it hidden, unless its class has no interval for it."""

    monitor_interval = 0


def bar(total: float, progress: bool, **how: Any) -> Any:
    """A bar of tqdm's, which disappears at its end; without `progress` it shows nothing and starts no thread.

    Nor does it show anything where a program has no standard error, or where TQDM_DISABLE says so.
    """
    shown = progress and sys.stderr is not None
    kind = tqdm if shown else _Hidden
    return kind(**{"total": total, "leave": False} | ({} if shown else {"disable": True}) | how)


def bar_of_bytes(total: int, what: str, progress: bool) -> Any:
    """The same for bytes, shown after a second: what is small is done before a bar could be read."""
    return bar(total, progress, desc=what, unit="B", unit_scale=True, delay=1)


def work_of(model: ModelConfig, mode: str, scope: ReAttentionConfig, dense_size: int) -> Callable[[int], float]:
    """How much work it is to read the first n tokens, as a function of n: multiplications per layer.

    A token takes its share of the matrix products, attends to what it sees, and beyond `dense_size` tokens scores the
    keys of the middle.
    """
    E, F, H, G, D = model.hidden_size, model.mlp_size, model.num_heads, model.num_kv_heads, model.head_dim
    products = E * (2 * H + 2 * G) * D + 3 * E * F
    # A token sees those before it, up to so many tokens; one beyond them, only so many.
    dense = model.sliding_window if mode == "full" else max(dense_size, scope.selecting_scope)
    seen = dense if mode == "full" else scope.selecting_scope
    selects = mode != "full" and scope.max_selected > 0
    outside = scope.global_size + scope.local_size

    def work(n: int) -> float:
        first = n if dense is None else min(n, dense)
        attended = first * first / 2 + (seen or 0) * (n - first)
        scored = ((n - outside) ** 2 - (dense_size - outside) ** 2) / 2 if selects and n > dense_size else 0.0
        return products * n + H * D * (2 * attended + scored)

    return work


class ReadingBar:
    """A bar on stderr for the reading of `num_tokens` tokens behind `cached` others; `work` is that of `work_of`."""

    def __init__(self, work: Callable[[int], float], cached: int, num_tokens: int, hide: bool) -> None:
        self._work, self._cached, self._read, self._num_tokens = work, cached, 0, num_tokens
        shape = "{desc}: {percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]"
        total = work(cached + num_tokens) - work(cached)
        self._bar = bar(total, not hide, desc="prefill", bar_format=shape)
        self._bar.set_postfix_str(self._tokens())

    def update(self, num_read: int) -> None:
        """Count tokens that have been read."""
        before = self._cached + self._read
        self._read += num_read
        self._bar.set_postfix_str(self._tokens(), refresh=False)
        self._bar.update(self._work(before + num_read) - self._work(before))

    def _tokens(self) -> str:
        return f"{self._read:,} of {self._num_tokens:,} tokens"

    def __enter__(self) -> ReadingBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()
