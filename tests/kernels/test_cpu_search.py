"""A CPU's search against the reference's and float64, and by products of bytes against that of a decode step, whose
scores it has: whatever keys and queries are, their winners are the same.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from minirea.kernels.cpu import search as searches
from minirea.kernels.cpu import search_bytes as by_bytes
from minirea.kernels.cpu.code import I64, Arguments, Code, Value
from minirea.kernels.cpu.compile import available, multiplies_bytes
from minirea.kernels.cpu.search import search, search_floats, search_many
from minirea.kernels.cpu.search_bytes import SearchBytes, search_bytes
from minirea.kernels.reference import score_rows

pytestmark = [
    pytest.mark.skipif(not available(), reason="needs llvmlite"),
    pytest.mark.usefixtures("threads"),
]

needs_bytes = pytest.mark.skipif(
    not available() or not multiplies_bytes(), reason="this processor does not multiply bytes"
)
OF_ROWS = [search_floats, pytest.param(search_bytes, marks=needs_bytes)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(3, 3, 64), (2, 4, 128), (1, 1, 16), (2, 7, 80), (1, 20, 32), (2, 1, 24), (1, 2, 256)]
SearchRows = Callable[[Tensor, Tensor, int, int, int], Tensor]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def as_decode_steps(q: Tensor, k: Tensor, start: int, stop: int, count: int, at_once: int = 11) -> Tensor:
    """`search` of so many rows of a head at a time."""
    found = [
        torch.from_numpy(search(rows.reshape(-1, q.shape[2]), k, start, stop, count)).view(len(k), rows.shape[1], -1)
        for rows in q.split(at_once, 1)
    ]
    return torch.cat(found, 1)


@pytest.mark.parametrize("of_rows", OF_ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("G", "R", "D"), SHAPES)
@pytest.mark.parametrize(("lo", "hi"), [(5, 6), (5, 8), (4, 68), (0, 400), (64, 690)])
def test_winners_of_integers_are_the_reference_s(
    lo: int, hi: int, G: int, R: int, D: int, dtype: torch.dtype, of_rows: SearchRows
) -> None:
    """Scores of few values: nearly all tie, and the lowest key wins; one query of a head, and many."""
    generator = torch.Generator().manual_seed(hi + R)
    k = torch.randint(-1, 2, (G, 760, D), generator=generator).to(dtype)
    k[:, hi:] = torch.nan
    for rows in (R, 37):
        q = torch.randint(-1, 2, (G, rows, D), generator=generator).float()
        for span_top_k in (1, 4, 9):
            expected = score_rows(q, k.float(), lo, hi, span_top_k)
            assert torch.equal(of_rows(q, k, lo, hi, min(span_top_k, hi - lo)), expected)
            if rows == R:
                found = torch.from_numpy(search(q.view(G * R, D), k, lo, hi, span_top_k))
                assert torch.equal(found.view_as(expected), expected)


@pytest.mark.parametrize("of_rows", OF_ROWS)
@pytest.mark.parametrize("rows", [1, 3, 30])
def test_of_equal_keys_the_first_wins(rows: int, of_rows: SearchRows) -> None:
    """Wherever they are: a key's score does not depend on its place, nor on how keys are divided."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        D, N = (32, 48, 64, 80, 96, 128)[seed % 6], 700 + 7 * seed
        k, q = random(3, N, D, seed=seed), random(3, rows, D, seed=1000 + seed)
        places = torch.cat([torch.randperm(N - 100, generator=generator)[: 5 * rows] + 30, N - 1 - torch.arange(rows)])
        places = places.view(-1, rows).t().sort(1).values
        for row, place in enumerate(places):
            k[:, place] = q[:, row, None] * 3
        expected = places[:, :6].expand(3, -1, -1)
        assert torch.equal(of_rows(q, k, 30, N, 6), expected), (D, N)
        found = torch.from_numpy(search(q.view(3 * rows, D), k, 30, N, 6))
        assert torch.equal(found.view_as(expected), expected), (D, N)


@pytest.mark.parametrize("of_rows", OF_ROWS)
def test_a_search_over_what_is_not_finite_stays_in_the_middle(of_rows: SearchRows) -> None:
    q, k = random(2, 9, 16), random(2, 500, 16, seed=1)
    for place, value in (((0, 40), torch.nan), ((1, 77), torch.inf), ((0, slice(None)), torch.nan)):
        spoiled = k.clone()
        spoiled[place] = value
        for found in (of_rows(q, spoiled, 30, 300, 3), as_decode_steps(q, spoiled, 30, 300, 3, 9)):
            assert bool(((found >= 30) & (found < 300)).all())


@pytest.mark.parametrize("of_rows", OF_ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [24, 64, 80])
def test_winners_are_those_of_float64(D: int, dtype: torch.dtype, of_rows: SearchRows) -> None:
    """Or others that score as high but for float32's rounding."""
    for N in (9, 57, 1000):
        q, k = random(2, 37, D), (random(2, N, D, seed=1) + 2 * random(D, seed=2)).to(dtype)
        scores = q.double() @ k.double().mT
        found = of_rows(q, k, 3, N, 4)
        assert all(len(set(row)) == 4 for row in found.flatten(0, 1).tolist())
        highest = scores[..., 3:].topk(4).values
        torch.testing.assert_close(scores.gather(2, found), highest, atol=2e-5, rtol=2e-6)


def spoil(x: Tensor, value: float, *place: int) -> Tensor:
    x = x.clone()
    x[place] = value
    return x


def odd_inputs(D: int, N: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    q, k, column = random(2, 44, D), random(2, N, D, seed=1), torch.zeros(D)
    column[D // 3] = 300.0
    yield "random", q, k
    yield "a column that is large in keys", q, k * (1 + column)
    yield "a column that is large in both", q * (1 + column), k * (1 + column)
    yield "a large mean", q, k + 40 * random(D, seed=2)
    yield "a mean beside which keys are alike", q, 1e-3 * k + 1000 * random(D, seed=2).round()
    yield "a mean at right angles", q - q.mean(-1, keepdim=True), 1e-4 * k + 100
    yield "one large key of a panel", q, torch.cat([k[:, :70], k[:, 70:71] * 1e4, k[:, 71:]], 1)
    yield "the same key", q, k[:, :1].expand(-1, N, -1).contiguous()
    yield "few different keys", q, k[:, torch.arange(N) % 7].contiguous()
    yield "ever better keys", q[:, :1].expand(-1, 44, -1).contiguous(), q[:, :1] * torch.arange(N)[:, None] / N
    yield "zero keys", q, k * 0
    yield "zero queries", q * (torch.arange(44) % 3 > 0)[:, None], k
    for scale in (1e-44, 1e-38, 1e-30, 1e-20, 1e15, 1e30, 1e38):
        yield f"queries times {scale}", q * scale, k
        yield f"keys times {scale}", q, k * scale
        yield f"both times {scale}", q * scale, k * scale
    yield "keys of very different sizes", q, k * 10.0 ** (torch.arange(N) % 70 - 35)[:, None]
    yield "columns of very different sizes", q, k * 10.0 ** (torch.arange(D) % 70 - 35)
    for value in (torch.nan, torch.inf, -torch.inf, 3e38):
        yield f"a key with {value}", q, spoil(k, value, 1, N // 2, 3)
        yield f"a query with {value}", spoil(q, value, 0, 13, D - 1), k
        yield f"both with {value}", spoil(q, value, 0, 13, 3), spoil(k, value, 0, 5, 3)


@needs_bytes
@pytest.mark.parametrize(("D", "N"), [(24, 300), (64, 333), (80, 95), (16, 60), (256, 131)])
def test_bytes_rule_out_no_winner(D: int, N: int) -> None:
    """Compared with a decode step's search, which scores all keys, and alike: bit for bit, ties and all."""
    for name, q, k in odd_inputs(D, N):
        for count in (1, 4):
            expected = as_decode_steps(q, k, 2, N, count)
            assert torch.equal(search_bytes(q, k, 2, N, count), expected), (name, count)


@needs_bytes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bytes_rule_out_no_winner_in_half_precision(dtype: torch.dtype) -> None:
    for mean in (0.0, 3.0, 200.0):
        q, k = random(3, 44, 64), (random(3, 3000, 64, seed=1) + mean).to(dtype)
        assert torch.equal(search_bytes(q, k, 33, 2900, 4), as_decode_steps(q, k, 33, 2900, 4))


@needs_bytes
def test_a_winner_is_kept_when_all_that_rounding_takes_counts() -> None:
    """Errors that point along the other vector: the bound is what is reached, for one of both, and the last key wins by
    little. Keys come with their negatives, so that their mean is zero, and the largest byte is 127, the unit one.
    """
    D, N = 64, 256
    ones, error = torch.ones(D), torch.full((D,), 15 / 32)
    error[0] = 0

    def with_sum(total: float) -> Tensor:
        """Whole numbers, of which the first is the largest byte."""
        x = torch.full((D,), -2.0)
        x[0] = 127
        x[2] += total - x.sum()
        return x

    of_keys = error * -1 - with_sum(-130), with_sum(71) + error, ones  # 100.47 and 100.53; their bytes say 130 and 71
    of_query = 126 * ones, 127 * ones, with_sum(20) + error  # 126 * 50 and 127 * 50; their bytes say 127 * 20
    for other, winner, q in (of_keys, of_query):
        k = torch.zeros(1, N, D)
        k[0, 0], k[0, 1] = other, -other
        k[0, 200], k[0, 201] = winner, -winner
        assert k.mean(1).eq(0).all() and float(q @ winner) > float(q @ other)
        found = search_bytes(q.expand(1, 9, D).contiguous(), k, 0, N, 1)
        assert found.eq(200).all()


@needs_bytes
def test_bytes_rule_out_nearly_all_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    noted, score = ctypes.c_int64(0), SearchBytes._score

    def counted(self: SearchBytes, code: Code, a: Arguments, first_key: Value, count: Value) -> None:
        at = code.number(ctypes.addressof(noted))
        code.store(code.load(at, I64) + count, at)
        score(self, code, a, first_key, count)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    by_bytes._kernel.cache_clear()
    monkeypatch.setattr(SearchBytes, "_score", counted)
    try:
        search_many(random(1, 64, 64), random(1, 8000, 64, seed=1) + 5, 0, 8000, 4)
    finally:
        torch.set_num_threads(before)
        by_bytes._kernel.cache_clear()
    assert 4 * 64 <= noted.value < 0.015 * 64 * 8000


@pytest.mark.parametrize("has_bytes", [False, pytest.param(True, marks=needs_bytes)])
def test_a_chunk_is_searched_by_bytes_where_there_are_products(
    has_bytes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, called = random(2, 9, 32), random(2, 100, 32, seed=1), []

    def noting(function: SearchRows) -> SearchRows:
        return lambda *arguments: called.append(function) or function(*arguments)  # type: ignore[func-returns-value]

    monkeypatch.setattr(searches, "multiplies_bytes", lambda: has_bytes)
    monkeypatch.setattr(searches, "search_bytes", noting(search_bytes))
    monkeypatch.setattr(searches, "search_floats", noting(search_floats))
    found = search_many(q.transpose(0, 1).contiguous().transpose(0, 1), k, 3, 90, 200)
    assert called == [search_bytes if has_bytes else search_floats]
    assert torch.equal(found, score_rows(q, k, 3, 90, 200))
