"""The search of many queries where the processor multiplies bytes: products of bytes rule out most keys, and the others
are scored as a decode step scores them. Winners are those of these scores.

A mean key m adds the same to all scores of a query, so what matters is q.(k - m). Each query, and the k - m of each
panel of keys, are rounded to multiples of a unit of their own, which are bytes: q = q' + e_q and k - m = k' + e_k. By
Cauchy and Schwarz

    q.(k - m) = q'.k' + q.e_k + e_q.k' <= q'.k' + |q| |e_k| + |e_q| |k'|,

where q'.k' is a sum of integers and the rest has one bound for a query and a panel. A key whose bound is not above the
worst of the winners so far is not better than it: it is not scored.

What float32 adds, with u = 2^-24: a score, q.m, k - m and the units' multiples are off by u times the size of what they
are made of, at most D + 16 times together, where sizes are |q| (|m| + |k'| + |e_k|). `_ROUNDING` is four times u. Norms
are off by less than `_OF_NORMS` of them, what the worst score allows by less than `_OF_SCORES` of it, and `_ABSOLUTE`
covers that it becomes an integer, and underflow. Where a score might overflow, or units do, or something is not finite,
all keys of the panel are scored; but one with NaN, whose score never wins, need not be.
"""

from __future__ import annotations

import functools
from typing import Final, NamedTuple

import torch
from torch import Tensor

from minirea.kernels.cpu.code import F32, I8, I32, I64, LANES, Arguments, Code, Value, Variable, vector
from minirea.kernels.cpu.compile import Kernel, kind_of
from minirea.kernels.cpu.heads import Heads, rows_of
from minirea.kernels.cpu.many import transposed
from minirea.kernels.cpu.threads import workers
from minirea.kernels.cpu.winners import LEAST, clear, insert

_HEIGHT: Final = 8  # rows of a tile
_WIDTH: Final = 48  # keys of a panel
_FEW: Final = 8  # keys of the first panel, all of which are scored
_KEY_BITS: Final = 6  # of a noted number, which say which key of a panel it is
_WORD: Final = 4  # bytes that are multiplied at once
_LARGEST: Final = 127.0  # byte
_OFFSET: Final = 128  # is added to keys' bytes, which have no sign
_MOST_SAMPLES: Final = 256  # keys that the mean is of
_ROUNDING: Final = 2.0**-22
_OF_NORMS: Final = 2.0**-10
_OF_SCORES: Final = 2.0**-20
_ABSOLUTE: Final = 2.0
_LARGE: Final = 2.0**100  # what is less does not overflow while it is added up
_NONE: Final = 2.0**28  # more than any sum of products


class QueryBound(NamedTuple):
    """What a query's bounds are made of; or those of several, as vectors. Lengths are in its unit.

    Attributes:
        least: the worst winner's score.
        mean: q.m.
        per_unit: one over the unit.
        size: |q|.
        error: |e_q|.
        total: of its bytes.
    """

    least: Value
    mean: Value
    per_unit: Value
    size: Value
    error: Value
    total: Value


class PanelBound(NamedTuple):
    """What the bounds of a panel's keys are made of. Lengths are in its unit.

    Attributes:
        per_unit: one over the unit.
        rounded: the largest |k'|.
        error: the largest |e_k|.
        size: at least |m| + |k'| + |e_k|.
    """

    per_unit: Value
    rounded: Value
    error: Value
    size: Value


class SearchBytes(NamedTuple):
    """The keys that score highest with each of many queries.

    Workers share out a head's panels while these are rounded, and then the queries.

    Attributes:
        heads: one row of queries at a time.
        num_winners: K.
    """

    heads: Heads
    num_winners: int

    @property
    def words(self) -> int:
        """Of a rounded query or key; the last may have zeros behind."""
        return -(-self.heads.dim // _WORD)

    @property
    def row_bytes(self) -> int:
        """Of a rounded query or key, as whole vectors."""
        return -(-self.words // LANES) * LANES * _WORD

    @property
    def panel_bytes(self) -> int:
        """Of a panel [words, _WIDTH]."""
        return self.words * _WIDTH * _WORD

    def write(self, code: Code, a: Arguments) -> None:
        K, D, T = self.num_winners, self.heads.dim, a["num_rows"]
        each = (T + (a["workers"] - 1)) // a["workers"]
        first = code.smaller(a["worker"] * each, T)
        last = code.smaller(first + each, T)
        own = {
            "keys": a["keys"] + a["worker"] * (_WIDTH * self.row_bytes),
            "scores": a["scores"] + a["worker"] * (LANES * 4),
            "noted": a["noted"] + (first * _WIDTH + a["worker"] * LANES) * 4,
        }
        num_panels = (a["stop"] - a["start"] + (2 * _WIDTH - _FEW - 1)) // _WIDTH
        with code.range(0, a["num_kv_heads"]) as g:
            of_head = {
                "q": a["q"] + g * T * (D * 4),
                "k": a["k"] + g * a["k_stride"],
                "mean": a["mean"] + g * (D * 4),
                "best": a["best"] + g * T * (K * 4),
                "found": a["found"] + g * T * (K * 8),
            }
            b = {**a, **own, **of_head}
            with code.range(a["worker"], num_panels, a["workers"]) as p:
                self._round_keys(code, b, p)
            with code.range(first, last) as t:
                self._round_query(code, b, t)
            clear(code, (b["best"], b["found"]), first * K, last * K, a["start"])
            code.wait_for_all(a["workers"])
            with code.range(0, num_panels) as p:
                self._search_panel(code, b, p, first, last)
            code.wait_for_all(a["workers"])

    def _first_key(self, code: Code, a: Arguments, p: Value) -> Value:
        """Position of a panel's first key. Behind its last is the first of the next panel."""
        return a["start"] + code.larger(p * _WIDTH - (_WIDTH - _FEW), 0)

    def _round_keys(self, code: Code, a: Arguments, p: Value) -> None:
        """A panel. Keys behind the last are like it."""
        first = self._first_key(code, a, p)

        def key(m: Value) -> list[Value]:
            """k - m"""
            at = a["k"] + code.smaller(first + m, a["stop"] - 1) * (self.heads.dim * self.heads.item)
            keys, means = self._vectors(code, at, self.heads.kind), self._vectors(code, a["mean"])
            return [k - mean for k, mean in zip(keys, means, strict=True)]

        largest = code.variable(code.zeros())
        with code.range(0, _WIDTH) as m:
            largest.value = _largest(code, key(m), largest.value)
        per_unit = code.number(_LARGEST, F32) / code.max(largest.value)
        rounded, error = (code.variable(code.number(0.0, F32)) for _ in range(2))
        with code.range(0, _WIDTH) as m:
            multiples = [part * code.splat(per_unit) for part in key(m)]
            bytes_ = self._round(code, multiples, a["keys"] + m * self.row_bytes, _OFFSET)
            errors = [part - byte for part, byte in zip(multiples, bytes_, strict=True)]
            rounded.value = code.larger(rounded.value, _square(code, bytes_))
            error.value = code.larger(error.value, _square(code, errors))  # of NaN neither: such a key never wins
        self._transpose(code, a["keys"], a["panels"] + p * self.panel_bytes)
        of_mean = _square(code, [part * code.splat(per_unit) for part in self._vectors(code, a["mean"])])
        lengths = [code.sqrt(square) for square in (rounded.value, error.value, of_mean)]
        bound = PanelBound(per_unit, lengths[0], lengths[1], lengths[0] + lengths[1] + lengths[2])
        for i, value in enumerate(bound):
            code.store(value, a["panel_bounds"] + (p * len(bound) + i) * 4)

    def _round_query(self, code: Code, a: Arguments, t: Value) -> None:
        query, means = self._vectors(code, a["q"] + t * (self.heads.dim * 4)), self._vectors(code, a["mean"])
        of_mean = code.zeros()
        for part, mean in zip(query, means, strict=True):
            of_mean = code.fma(part, mean, of_mean)
        per_unit = code.number(_LARGEST, F32) / code.max(_largest(code, query, code.zeros()))
        multiples = [part * code.splat(per_unit) for part in query]
        bytes_ = self._round(code, multiples, a["queries"] + t * self.row_bytes, 0)
        errors = [part - byte for part, byte in zip(multiples, bytes_, strict=True)]
        bound = QueryBound(
            least=code.number(LEAST, F32),
            mean=code.sum(of_mean),
            per_unit=per_unit,
            size=code.sqrt(_square(code, multiples)),
            error=code.sqrt(_square(code, errors)),
            total=code.to_int(code.sum(functools.reduce(Value.__add__, bytes_))),
        )
        for name, value in bound._asdict().items():
            code.store(value, _of_query(a, name, t))

    def _vectors(self, code: Code, address: Value, kind: str = "float32") -> list[Value]:
        """D numbers as vectors, with zeros behind."""
        D, item = self.heads.dim, 4 if kind == "float32" else 2
        return [code.floats(address + at * item, kind, min(LANES, D - at)) for at in range(0, D, LANES)]

    def _round(self, code: Code, multiples: list[Value], out: Value, offset: int) -> list[Value]:
        """To bytes, which are stored with an offset."""
        bytes_ = []
        for i, part in enumerate(multiples):
            above = code.larger(code.number(-_LARGEST, part.type), part)  # what is NaN becomes a number
            bytes_.append(code.round(code.smaller(above, _LARGEST)))
            code.store(code.narrower(code.to_int(bytes_[-1]) + offset, I8), out + i * LANES)
        return bytes_

    def _transpose(self, code: Code, keys: Value, panel: Value) -> None:
        """Rounded keys as columns of words."""
        with code.range(0, _WIDTH, LANES) as block:
            for first in range(0, self.words, LANES):
                at = keys + block * self.row_bytes + first * _WORD
                rows = [code.load(at + i * self.row_bytes, vector(I32)) for i in range(LANES)]
                for i, column in enumerate(transposed(code, rows)[: self.words - first]):
                    code.store(column, panel + (block + (first + i) * _WIDTH) * _WORD)

    def _search_panel(self, code: Code, a: Arguments, p: Value, first: Value, last: Value) -> None:
        """With rows from first on: note keys that are not ruled out, then score them."""
        num_bounds = len(PanelBound._fields)
        bounds = [code.load(a["panel_bounds"] + (p * num_bounds + i) * 4, F32) for i in range(num_bounds)]
        panel = PanelBound(*(code.splat(bound) for bound in bounds))
        with code.range(first, last, LANES) as t:
            code.store(self._start(code, _query_bounds(code, a, t), panel), a["starts"] + t * 4, last - t)
        first_key, next_key = self._first_key(code, a, p), self._first_key(code, a, p + 1)
        num_keys = code.splat(code.narrower(code.smaller(next_key, a["stop"]) - first_key, I32))
        count = code.variable(code.number(0))
        start = first
        for height in (_HEIGHT, 1):
            stop = start + (last - start) // height * height
            with code.range(start, stop, height) as t:
                self._note(code, a, t, self._sums(code, a, p, t, height), num_keys, count)
            start = stop
        self._score(code, a, first_key, count.value)

    def _start(self, code: Code, query: QueryBound, panel: PanelBound) -> Value:
        """What sums of products begin with, so that those below zero are ruled out: minus the least sum that is not,
        and minus what the offset of keys adds.
        """
        per_units = query.per_unit * panel.per_unit
        worst = (query.least - query.mean) * per_units
        size = query.size * panel.size
        bound = query.size * panel.error + query.error * panel.rounded + size * ((self.heads.dim + 16) * _ROUNDING)
        limit = worst - (bound * (1 + _OF_NORMS) + code.larger(worst, worst * -1.0) * _OF_SCORES + _ABSOLUTE)
        all_ = code.number(-_NONE, limit.type)
        limit = code.smaller(code.larger(all_, limit), _NONE)  # all where it is NaN
        limit = code.select(size < per_units * _LARGE, limit, all_)  # all where scores might overflow
        return (code.to_int(limit) + query.total * _OFFSET) * -1

    def _sums(self, code: Code, a: Arguments, p: Value, t: Value, height: int) -> list[list[Value]]:
        """Of so many queries with a panel."""
        starts = [code.splat(code.load(a["starts"] + (t + i) * 4, I32)) for i in range(height)]
        total = [[code.variable(start) for _ in range(0, _WIDTH, LANES)] for start in starts]
        panel, queries = a["panels"] + p * self.panel_bytes, a["queries"] + t * self.row_bytes
        with code.range(0, self.words) as j:
            keys = [code.load(panel + (j * _WIDTH + c) * _WORD, vector(I32)) for c in range(0, _WIDTH, LANES)]
            for i, sum_C in enumerate(total):
                query = code.splat(code.load(queries + (j * _WORD + i * self.row_bytes), I32))
                for part, key in zip(sum_C, keys, strict=True):
                    part.value = code.add_byte_products(part.value, key, query)
        return [[part.value for part in sum_C] for sum_C in total]

    def _note(
        self, code: Code, a: Arguments, t: Value, sums: list[list[Value]], num_keys: Value, count: Variable
    ) -> None:
        """Row and key of each sum that is not below zero."""
        highest = functools.reduce(Value.__and__, [part for sum_C in sums for part in sum_C])
        with code.when(code.any(highest > -1)):
            for i, sum_C in enumerate(sums):
                row = code.splat(code.narrower(t + i, I32) << _KEY_BITS)
                for c, part in enumerate(sum_C):
                    key = code.indices(c * LANES)
                    remains = (part > -1) & (key < num_keys)
                    code.store(code.compress(row | key, remains), a["noted"] + count.value * 4)
                    count.value = count.value + code.count_bits(code.mask(remains))

    def _score(self, code: Code, a: Arguments, first_key: Value, count: Value) -> None:
        """Noted keys, as many at once as a vector has lanes."""
        heads, K = self.heads, self.num_winners
        code.store(code.splat(code.load(a["noted"], I32)), a["noted"] + count * 4)  # read with the last ones
        with code.range(0, count, LANES) as at:
            products, least = [], []
            for i in range(LANES):
                t, j = _noted(code, a, at + i, first_key)
                key = heads.key_alone(code, a["k"] + j * (heads.dim * heads.item))
                products.append(heads.products(code, heads.query(code, a["q"], t), key))
                least.append(code.load(_of_query(a, "least", t), F32))
            scores = code.sums(products)
            code.store(scores, a["scores"])
            is_noted = code.indices() < code.splat(code.narrower(count - at, I32))
            with code.each_bit(code.mask((scores > code.vector_of(least)) & is_noted)) as lane:
                t, j = _noted(code, a, at + lane, first_key)
                lists = a["best"] + t * (K * 4), a["found"] + t * (K * 8)
                worst = insert(code, code.load(a["scores"] + lane * 4, F32), j, lists, K)
                code.store(worst, _of_query(a, "least", t))


def _largest(code: Code, parts: list[Value], largest: Value) -> Value:
    """Of numbers' sizes, by lanes."""
    for part in parts:
        largest = code.larger(largest, code.larger(part, part * -1.0))
    return largest


def _square(code: Code, parts: list[Value]) -> Value:
    """Of a vector's length."""
    total = code.zeros()
    for part in parts:
        total = code.fma(part, part, total)
    return code.sum(total)


def _of_query(a: Arguments, name: str, t: Value) -> Value:
    """Where a number of a query's bound is, and behind it that of the next query."""
    return a["query_bounds"] + (a["padded_rows"] * QueryBound._fields.index(name) + t) * 4


def _query_bounds(code: Code, a: Arguments, t: Value) -> QueryBound:
    """Those of LANES queries."""
    types = [I32 if name == "total" else F32 for name in QueryBound._fields]
    return QueryBound(
        *(
            code.load(_of_query(a, name, t), vector(type_))
            for name, type_ in zip(QueryBound._fields, types, strict=True)
        )
    )


def _noted(code: Code, a: Arguments, at: Value, first_key: Value) -> tuple[Value, Value]:
    """Row, and position of the key."""
    both = code.wider(code.load(a["noted"] + at * 4, I32), I64)
    return both >> _KEY_BITS, first_key + (both & ((1 << _KEY_BITS) - 1))


def search_bytes(q_GRD: Tensor, k_GND: Tensor, start: int, stop: int, count: int) -> Tensor:
    """Cache positions of the `count` keys in [start, stop) that score highest with each query, int64 [G, R, count], the
    best first; of equal scores the lowest position first.

    Args:
        q_GRD: float32, contiguous.
        k_GND: float32, float16 or bfloat16, each head's keys side by side.
    """
    G, R, D = q_GRD.shape
    search = SearchBytes(Heads(kind_of(k_GND), 1, D), count)
    num_panels, padded_rows = (stop - start + 2 * _WIDTH - _FEW - 1) // _WIDTH, -(-R // LANES) * LANES + LANES
    best_GRK, found_GRK = torch.empty(G, R, count, dtype=torch.float32), torch.empty(G, R, count, dtype=torch.int64)
    sample_GND = k_GND[:, start : stop : -(-(stop - start) // _MOST_SAMPLES)]
    floats = {
        "mean": sample_GND.float().mean(1),
        "panel_bounds": torch.empty(num_panels * len(PanelBound._fields), dtype=torch.float32),
        "query_bounds": torch.empty(padded_rows * len(QueryBound._fields), dtype=torch.float32),
        "scores": torch.empty(workers() * LANES, dtype=torch.float32),
    }
    integers = {
        name: torch.empty(size, dtype=type_)
        for name, size, type_ in (
            ("panels", num_panels * search.panel_bytes, torch.uint8),
            ("queries", R * search.row_bytes, torch.int8),
            ("keys", workers() * _WIDTH * search.row_bytes, torch.uint8),
            ("starts", padded_rows, torch.int32),
            ("noted", R * _WIDTH + workers() * LANES, torch.int32),
        )
    }
    _kernel(search).bind(
        q=q_GRD.data_ptr(),
        **rows_of("k", k_GND),
        num_kv_heads=G,
        num_rows=R,
        padded_rows=padded_rows,
        start=start,
        stop=stop,
        best=best_GRK.data_ptr(),
        found=found_GRK.data_ptr(),
        **{name: tensor.data_ptr() for name, tensor in {**floats, **integers}.items()},
    )()
    return found_GRK


@functools.cache
def _kernel(search: SearchBytes) -> Kernel:
    sizes = "k_stride", "num_kv_heads", "num_rows", "padded_rows", "start", "stop"
    shared = "mean", "panels", "panel_bounds", "queries", "query_bounds", "starts"
    return Kernel(search.write, ("q", "k", *sizes, "best", "found", *shared, "keys", "scores", "noted"))
