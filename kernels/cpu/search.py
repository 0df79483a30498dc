"""What queries search for: the keys of the cache that score highest with each, of equal scores the first.

A key is scored the same wherever it lies, and however many others there are, so that equal keys have equal scores.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minirea.kernels.cpu.code import F32, I64, LANES, Arguments, Code, Value, vector
from minirea.kernels.cpu.compile import Call, Kernel, kind_of, multiplies_bytes
from minirea.kernels.cpu.heads import Heads, heads_of, rows_of
from minirea.kernels.cpu.many import Many, tile_size
from minirea.kernels.cpu.rows import Rows
from minirea.kernels.cpu.search_bytes import search_bytes
from minirea.kernels.cpu.threads import workers
from minirea.kernels.cpu.winners import LEAST, clear, insert


class Search(NamedTuple):
    """The keys that score highest with each query of one token.

    Each worker searches a part of the keys; the first one's lists [H, K], of scores and positions, then take what is
    better in the others'.

    Attributes:
        num_winners: K.
    """

    heads: Heads
    num_winners: int

    def write(self, code: Code, a: Arguments) -> None:
        heads, K = self.heads, self.num_winners
        num_rows = a["num_kv_heads"] * heads.rows
        own = a["worker"] * num_rows * K
        best, found = a["best"] + own * 4, a["found"] + own * 8
        each = (a["stop"] - a["start"] + (a["workers"] - 1)) // a["workers"]
        start = code.smaller(a["start"] + a["worker"] * each, a["stop"])
        clear(code, (best, found), code.number(0), num_rows * K, a["start"])
        with code.range(0, a["num_kv_heads"]) as g:
            queries, keys = a["q"] + g * (heads.rows * heads.dim * 4), a["k"] + g * a["k_stride"]
            lists = [
                (best + (g * heads.rows + row) * K * 4, found + (g * heads.rows + row) * K * 8)
                for row in range(heads.rows)
            ]
            least = [code.variable(code.number(LEAST, F32)) for _ in range(heads.rows)]
            with code.range(start, code.smaller(start + each, a["stop"])) as j:
                score_R = heads.scores(code, queries, heads.key(code, keys + j * (heads.dim * heads.item)))
                for row, score in enumerate(score_R):
                    with code.when(score > least[row].value):
                        insert(code, score, j, lists[row], K)
                        least[row].value = code.load(lists[row][0] + (K - 1) * 4, F32)
        code.wait_for_all(a["workers"])
        with code.range(a["worker"], num_rows, a["workers"]) as h:
            mine = a["best"] + h * K * 4, a["found"] + h * K * 8
            with code.range(1, a["workers"]) as other, code.range(0, K) as i:
                at = (other * num_rows + h) * K + i
                score = code.load(a["best"] + at * 4, F32)
                with code.when(score > code.load(mine[0] + (K - 1) * 4, F32)):
                    insert(code, score, code.load(a["found"] + at * 8, I64), mine, K)


class SearchMany(NamedTuple):
    """The keys that score highest with each of many queries: products by tiles, as those with a matrix are.

    Attributes:
        panel: of keys.
        num_winners: K.
    """

    panel: Many
    num_winners: int

    @property
    def scratch_floats(self) -> int:
        """Of a thread: a panel, and a tile's scores."""
        return self.panel.scratch_floats + self.panel.height * self.panel.width

    def write(self, code: Code, a: Arguments) -> None:
        panel, D, K, T = self.panel, self.panel.rows.columns, self.num_winners, a["num_rows"]
        keys = a["scratch"] + a["worker"] * (4 * self.scratch_floats)
        scores = keys + 4 * panel.scratch_floats
        each = (T + (a["workers"] - 1)) // a["workers"]
        first = code.smaller(a["worker"] * each, T)
        last = code.smaller(first + each, T)
        with code.range(0, a["num_kv_heads"]) as g:
            of_head = {"matrix": a["k"] + g * a["k_stride"], "num_outputs": a["stop"]}
            clear(code, (a["best"], a["found"]), (g * T + first) * K, (g * T + last) * K, a["start"])
            with code.range(a["start"], a["stop"], panel.width) as n:
                panel.fill(code, of_head, keys, n, code.number(0))
                start = first
                for height in (panel.height, 1):
                    stop = start + (last - start) // height * height
                    with code.range(start, stop, height) as t:
                        first_row = g * T + t
                        tile = panel.sums(code, a["q"] + first_row * (D * 4), keys, code.number(D), height)
                        self._take(code, a, tile, scores, first_row, n)
                    start = stop

    def _take(self, code: Code, a: Arguments, tile: list[list[Value]], scores: Value, row: Value, n: Value) -> None:
        """What is better than the worst of a row."""
        width, K = self.panel.width, self.num_winners
        for i, part_C in enumerate(tile):
            for c, part in enumerate(part_C):
                code.store(part, scores + (i * width + c * LANES) * 4)
        with code.range(0, len(tile)) as in_tile:
            at = (row + in_tile) * K
            best, found, of_row = a["best"] + at * 4, a["found"] + at * 8, scores + in_tile * (width * 4)
            least = best + (K - 1) * 4
            worst = code.splat(code.load(least, F32))
            better = [code.load(of_row + c * 4, vector(F32)) > worst for c in range(0, width, LANES)]
            with code.when(code.any(functools.reduce(lambda x, y: x | y, better))):
                with code.range(0, width) as m:
                    score = code.load(of_row + m * 4, F32)
                    with code.when(score > code.load(least, F32)):
                        with code.when(n + m < a["stop"]):  # columns behind the last are like it
                            insert(code, score, n + m, (best, found), K)


def search(q_HD: Tensor, k_GND: Tensor, start: int, stop: int, count: int) -> np.ndarray:
    """Cache positions of the keys in [start, stop) that score highest with each query, [H, K], the best first; of equal
    scores the lowest position first.

    Args:
        q_HD: float32.
        k_GND: float32, float16 or bfloat16, each head's keys side by side.
    """
    best, found = winner_lists(len(q_HD), min(count, stop - start))
    bind_search(q_HD, k_GND, best, found, start, stop)()
    return found


def search_many(q_GRD: Tensor, k_GND: Tensor, mid_lo: int, mid_hi: int, span_top_k: int) -> Tensor:
    """`search` of many rows for each key/value head, as the reference's `score`: int64 [G, R, K]."""
    search_rows = search_bytes if multiplies_bytes() else search_floats
    return search_rows(q_GRD.contiguous(), k_GND, mid_lo, mid_hi, min(span_top_k, mid_hi - mid_lo))


def search_floats(q_GRD: Tensor, k_GND: Tensor, start: int, stop: int, count: int) -> Tensor:
    """What `search_bytes` does, on any processor."""
    G, R, D = q_GRD.shape
    many = SearchMany(Many(Rows(kind_of(k_GND), D, 0), *tile_size()), count)
    best_GRK, found_GRK = torch.empty(G, R, count, dtype=torch.float32), torch.empty(G, R, count, dtype=torch.int64)
    scratch = torch.empty(workers() * many.scratch_floats, dtype=torch.float32)
    _search_many_kernel(many).bind(
        q=q_GRD.data_ptr(),
        **rows_of("k", k_GND),
        num_kv_heads=G,
        num_rows=R,
        start=start,
        stop=stop,
        best=best_GRK.data_ptr(),
        found=found_GRK.data_ptr(),
        scratch=scratch.data_ptr(),
    )()
    return found_GRK


def winner_lists(num_heads: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Memory for `bind_search`: scores and positions, [H, K]. Behind it lie the lists of other workers."""
    shape = workers(), num_heads, count
    return np.empty(shape, np.float32)[0], np.empty(shape, np.int64)[0]


def bind_search(
    q_HD: Tensor, k_GND: Tensor, best: np.ndarray, found: np.ndarray, start: int = 0, stop: int = 0
) -> Call:
    kernel = _search_kernel(Search(heads_of(q_HD, k_GND), best.shape[1]))
    sizes = {"num_kv_heads": len(k_GND), "start": start, "stop": stop}
    return kernel.bind(
        q=q_HD.data_ptr(), **rows_of("k", k_GND), best=best.ctypes.data, found=found.ctypes.data, **sizes
    )


@functools.cache
def _search_kernel(search_: Search) -> Kernel:
    return Kernel(search_.write, ("q", "k", "k_stride", "num_kv_heads", "start", "stop", "best", "found"))


@functools.cache
def _search_many_kernel(search: SearchMany) -> Kernel:
    names = "q", "k", "k_stride", "num_kv_heads", "num_rows", "start", "stop", "best", "found", "scratch"
    return Kernel(search.write, names)
