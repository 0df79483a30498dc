"""What a decode step writes to the cache, and attends to there.

Keys and values are read where they lie, once, and a key is rotated as it is read. Keys are shared out among threads for
scores, rows for the softmax, and columns for values: nothing is added up between threads, so that a result does not
depend on how many there are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minirea.kernels.cpu.code import F32, I64, LANES, Arguments, Code, Value, vector
from minirea.kernels.cpu.compile import Call, Kernel, address
from minirea.kernels.cpu.heads import AHEAD, Heads, heads_of, rotated, rows_of
from minirea.kernels.cpu.threads import workers

_SUMS: Final = 16  # vectors of sums over values, at most
_LEAST: Final = float("-inf")


class Write(NamedTuple):
    """Puts a token's keys and values into the cache.

    Attributes:
        keeps_keys: without RoPE.
        rotates: keys are also kept with RoPE, and the queries get theirs, in place.
    """

    heads: Heads
    keeps_keys: bool
    rotates: bool

    def write(self, code: Code, a: Arguments) -> None:
        heads, D = self.heads, self.heads.dim
        num_queries = a["num_kv_heads"] * heads.rows
        tables = self._tables(code, a) if self.rotates else None
        if tables:
            with code.range(0, num_queries) as h:
                at = a["qkv"] + h * (D * 4)
                self._store(code, rotated(code, heads.query(code, at, 0), tables), at)
        with code.range(0, a["num_kv_heads"]) as g:
            key = heads.query(code, a["qkv"] + (num_queries + g) * (D * 4), 0)
            value = heads.query(code, a["qkv"] + (num_queries + a["num_kv_heads"] + g) * (D * 4), 0)
            self._store(code, value, a["v"] + g * a["v_stride"] + a["position"] * (D * 4))
            if self.keeps_keys:
                self._store(code, key, a["k"] + g * a["k_stride"] + a["position"] * (D * 4))
            if tables:
                at = a["rotated"] + g * a["rotated_stride"] + a["position"] * (D * 4)
                self._store(code, rotated(code, key, tables), at)

    def _tables(self, code: Code, a: Arguments) -> tuple[list[Value], list[Value]]:
        cos, sin = (
            [code.load(a[name] + at * 4, vector(F32), n) for at, n in self.heads.halves] for name in ("cos", "sin")
        )
        return cos, sin

    def _store(self, code: Code, halves: tuple[list[Value], list[Value]], at: Value) -> None:
        for start, parts in zip((0, self.heads.dim // 2), halves, strict=True):
            for (column, lanes), part in zip(self.heads.halves, parts, strict=True):
                code.store(part, at + (start + column) * 4, lanes)


class Attend(NamedTuple):
    """Softmax attention of one query to runs of cached tokens.

    Attributes:
        rotates: keys and the query are without RoPE, and get that of their places in the scope.
        width: columns of values that a worker takes at a time, a divisor of D.
    """

    heads: Heads
    rotates: bool
    width: int

    def write(self, code: Code, a: Arguments) -> None:
        heads, D = self.heads, self.heads.dim
        a = {**a, "num_runs": code.load(a["runs"], I64), "num_keys": code.load(a["runs"] + 8, I64)}
        H, S = a["num_kv_heads"] * heads.rows, a["num_keys"]
        # Each worker has its own queries, as they are multiplied by keys; scores [H, S] are shared.
        queries = a["scratch"] + a["worker"] * H * (4 * D)
        scores = a["scratch"] + a["workers"] * H * (4 * D)
        sums = scores + H * S * 4
        with code.range(0, H) as h:
            self._place(code, a, queries, h)
        self._score(code, a, queries, scores)
        code.wait_for_all(a["workers"])
        with code.range(a["worker"], H, a["workers"]) as h:
            self._softmax(code, scores + h * S * 4, S, sums + h * 4)
        code.wait_for_all(a["workers"])
        slices = D // self.width
        tile = max(1, _SUMS * LANES // self.width)
        with code.range(a["worker"], a["num_kv_heads"] * slices, a["workers"]) as item:
            g = item // slices
            for first in range(0, heads.rows, tile):
                rows = range(first, min(first + tile, heads.rows))
                self._values(code, a, (g, (item - g * slices) * self.width), scores, sums, rows)

    def _tables(self, code: Code, a: Arguments, position: Value) -> tuple[list[Value], list[Value]]:
        half = self.heads.dim // 2
        cos, sin = (
            [code.load(a[name] + (position * half + at) * 4, vector(F32), n) for at, n in self.heads.halves]
            for name in ("cos", "sin")
        )
        return cos, sin

    def _place(self, code: Code, a: Arguments, queries: Value, h: Value) -> None:
        """A query, times the scale of scores, as the last token of the scope."""
        halves = self.heads.query(code, a["q"], h)
        if self.rotates:
            halves = rotated(code, halves, self._tables(code, a, a["num_keys"] - 1))
        half = self.heads.dim // 2
        for start, parts in zip((0, half), halves, strict=True):
            for (at, lanes), part in zip(self.heads.halves, parts, strict=True):
                place = queries + (h * self.heads.dim + (start + at)) * 4
                code.store(part * self.heads.dim**-0.5, place, lanes)

    def _score(self, code: Code, a: Arguments, queries: Value, scores: Value) -> None:
        heads, S = self.heads, a["num_keys"]
        place = code.variable(code.number(0))
        with code.range(0, a["num_runs"]) as run:
            start, stop = (code.load(a["runs"] + (run * 16 + at), I64) for at in (16, 24))
            count, first = stop - start, place.value
            each = (count + (a["workers"] - 1)) // a["workers"]
            mine = code.smaller(a["worker"] * each, count)
            with code.range(0, a["num_kv_heads"]) as g:
                keys = a["k"] + g * a["k_stride"] + start * (heads.dim * heads.item)
                row_of = scores + (g * heads.rows * S + first) * 4
                with code.range(mine, code.smaller(mine + each, count)) as j:
                    key = heads.key(code, keys + j * (heads.dim * heads.item))
                    if self.rotates:
                        key = rotated(code, key, self._tables(code, a, first + j))
                    for row, score in enumerate(heads.scores(code, queries + g * (heads.rows * heads.dim * 4), key)):
                        code.store(score, row_of + (S * row + j) * 4)
            place.value = first + count

    def _softmax(self, code: Code, scores: Value, count: Value, sum_at: Value) -> None:
        """Scores become exponentials, beside which is one over their sum. Lanes behind the last are left out."""
        most = code.variable(code.zeros() + _LEAST)
        whole = count // LANES * LANES
        with code.range(0, whole, LANES) as at:
            most.value = code.larger(code.load(scores + at * 4, vector(F32)), most.value)
        largest = code.variable(code.max(most.value))
        with code.range(whole, count) as at:
            largest.value = code.larger(code.load(scores + at * 4, F32), largest.value)
        total, sums = code.variable(code.number(0.0, F32)), code.variable(code.zeros())
        shift = code.splat(largest.value)
        with code.range(0, whole, LANES) as at:
            power = code.exp(code.load(scores + at * 4, vector(F32)) - shift)
            code.store(power, scores + at * 4)
            sums.value = sums.value + power
        with code.range(whole, count) as at:
            power = code.exp(code.load(scores + at * 4, F32) - largest.value)
            code.store(power, scores + at * 4)
            total.value = total.value + power
        code.store(code.number(1.0, F32) / (total.value + code.sum(sums.value)), sum_at)

    def _values(
        self,
        code: Code,
        a: Arguments,
        at: tuple[Value, Value],
        scores: Value,
        sums: Value,
        rows: Sequence[int],
    ) -> None:
        """Some columns of a head's values, added up with the shares of some rows."""
        (g, column), heads, S = at, self.heads, a["num_keys"]
        parts = [(first, min(LANES, self.width - first)) for first in range(0, self.width, LANES)]
        total = [[code.variable(code.zeros()) for _ in parts] for _ in rows]
        place = code.variable(code.number(0))
        with code.range(0, a["num_runs"]) as run:
            start, stop = (code.load(a["runs"] + (run * 16 + at), I64) for at in (16, 24))
            first = place.value
            values = a["v"] + g * a["v_stride"] + (start * heads.dim + column) * heads.item
            shares = scores + (g * heads.rows * S + first) * 4
            with code.range(0, stop - start) as j:
                row_at = values + j * (heads.dim * heads.item)
                for offset in range(0, self.width * heads.item, 64):
                    code.prefetch(row_at + (AHEAD + offset))
                value = [code.floats(row_at + offset * heads.item, heads.kind, lanes) for offset, lanes in parts]
                for row, sum_P in zip(rows, total, strict=True):
                    share = code.splat(code.load(shares + (S * row + j) * 4, F32))
                    for sum_, part in zip(sum_P, value, strict=True):
                        sum_.value = code.fma(share, part, sum_.value)
            place.value = first + (stop - start)
        for row, sum_P in zip(rows, total, strict=True):
            h = g * heads.rows + row
            factor = code.splat(code.load(sums + h * 4, F32))
            for (offset, lanes), sum_ in zip(parts, sum_P, strict=True):
                out = a["out"] + (h * heads.dim + column + offset) * 4
                code.store(sum_.value * factor, out, lanes)


def all_of(num_keys: int) -> np.ndarray:
    """The one run of so many tokens."""
    return np.array([(1, num_keys), (0, num_keys)], np.int64)


def attend(
    q_HD: Tensor,
    k_GND: Tensor,
    v_GND: Tensor,
    runs_X2: np.ndarray,
    tables: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Softmax attention of the last token's queries to runs of cached tokens, side by side, scale 1 / sqrt(D): float32
    [H, D].

    Args:
        q_HD: float32.
        runs_X2: int64: how many there are and of how many tokens together, then each, [start, stop).
        k_GND: float32, float16 or bfloat16, each head's rows side by side; v_GND likewise.
        tables: cos and sin of positions in the scope, float32 [S or more, D / 2], for queries and keys without RoPE.
    """
    out_HD, scratch = torch.empty(q_HD.shape, dtype=torch.float32), attend_scratch(q_HD, int(runs_X2[0, 1]))
    bind_attend(q_HD, k_GND, v_GND, runs_X2, scratch, out_HD, tables)()
    return out_HD


def attend_scratch(q_HD: Tensor, num_keys: int) -> Tensor:
    """For `bind_attend` to up to so many keys; several calls may share it."""
    return torch.empty(workers() * q_HD.numel() + len(q_HD) * (num_keys + 1), dtype=torch.float32)


def bind_attend(
    q_HD: Tensor,
    k_GND: Tensor,
    v_GND: Tensor,
    runs_X2: np.ndarray,
    scratch: Tensor,
    out_HD: Tensor,
    tables: tuple[Tensor, Tensor] | None = None,
) -> Call:
    """`attend` to the runs that `runs_X2` has when it is called."""
    D = q_HD.shape[1]
    width = D // 2 if workers() > 1 and D % (2 * LANES) == 0 else D
    kernel = _attend_kernel(Attend(heads_of(q_HD, k_GND), tables is not None, width))
    cos, sin = tables or (None, None)
    return kernel.bind(
        q=q_HD.data_ptr(),
        **rows_of("k", k_GND),
        **rows_of("v", v_GND),
        num_kv_heads=len(k_GND),
        runs=runs_X2.ctypes.data,
        cos=address(cos),
        sin=address(sin),
        scratch=scratch.data_ptr(),
        out=out_HD.data_ptr(),
    )


def bind_write(qkv_XD: Tensor, k_GND: Tensor | None, v_GND: Tensor, rotated_GND: Tensor | None) -> Call:
    """Puts a token's keys and values, float32, to `position` of the cache; with `rotated_GND` as Write has it, by the
    rows `cos` and `sin` of the tables.
    """
    num_queries = len(qkv_XD) - 2 * len(v_GND)
    kind = Write(heads_of(qkv_XD[:num_queries], v_GND), k_GND is not None, rotated_GND is not None)
    return _write_kernel(kind).bind(
        qkv=qkv_XD.data_ptr(),
        **rows_of("k", k_GND),
        **rows_of("v", v_GND),
        **rows_of("rotated", rotated_GND),
        num_kv_heads=len(v_GND),
        **dict.fromkeys(("position", "cos", "sin"), 0),
    )


@functools.cache
def _attend_kernel(attend_: Attend) -> Kernel:
    names = "q", "k", "k_stride", "v", "v_stride", "num_kv_heads", "runs", "cos", "sin", "scratch", "out"
    return Kernel(attend_.write, names)


@functools.cache
def _write_kernel(write: Write) -> Kernel:
    names = "k", "k_stride", "v", "v_stride", "rotated", "rotated_stride", "num_kv_heads", "position", "cos", "sin"
    return Kernel(write.write, ("qkv", *names), alone=True)
