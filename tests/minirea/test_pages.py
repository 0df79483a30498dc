"""Huge pages: what memory they are asked for."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

from minirea import pages
from minirea.pages import HUGE, advise, collapsed, mappings, new_parts

Advised = list[tuple[int, int, int]]


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> Advised:
    """What the system is asked for: start, stop, advice."""
    calls: Advised = []
    monkeypatch.setattr(
        pages, "_madvise", lambda: lambda start, size, advice: calls.append((start, start + size, advice))
    )
    return calls


def test_new_parts_are_what_was_in_no_range_before() -> None:
    def ranges(present: tuple[bool, ...]) -> list[tuple[int, int]]:
        edges = [i for i, (a, b) in enumerate(itertools.pairwise((False, *present, False))) if a != b]
        return list(zip(edges[::2], edges[1::2], strict=True))

    cases = [tuple(bool(number >> bit & 1) for bit in range(6)) for number in range(64)]
    for before, after in itertools.product(cases, cases):
        found = new_parts(ranges(before), ranges(after))
        assert found == sorted(found)
        inside = [any(start <= i < stop for start, stop in found) for i in range(6)]
        assert inside == [new and not old for old, new in zip(before, after, strict=True)], (before, after)


def test_whole_huge_pages_of_a_tensor(advised: Advised) -> None:
    tensor = torch.empty(3 * HUGE + 100, dtype=torch.uint8)
    assert advise(tensor) is tensor
    ((start, stop, _),) = advised
    first = tensor.data_ptr()
    assert start % HUGE == stop % HUGE == 0
    assert first <= start < first + HUGE and stop <= first + len(tensor) < stop + HUGE
    advise(torch.empty(HUGE // 2, dtype=torch.uint8)[: HUGE // 4])
    assert len(advised) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not say what memory there is")
def test_what_is_allocated_meanwhile(advised: Advised) -> None:
    old = torch.ones(4 * HUGE, dtype=torch.uint8)
    with collapsed():
        new = torch.ones(64 * HUGE, dtype=torch.uint8)  # so large that it is a mapping of its own

    def share(tensor: torch.Tensor) -> float:
        first, last = tensor.data_ptr(), tensor.data_ptr() + len(tensor)
        return sum(max(0, min(stop, last) - max(start, first)) for start, stop, _ in advised) / len(tensor)

    assert share(new) > 0.95 and share(old) == 0
    with collapsed():
        pass
    assert sum(stop - start for start, stop, _ in advised) < 70 * HUGE


def test_values_stay() -> None:
    """By the system itself, whether or not it takes advice."""
    with collapsed():
        numbers = advise(torch.empty(2 * HUGE, dtype=torch.int32)).copy_(torch.arange(2 * HUGE))
    assert torch.equal(numbers, torch.arange(2 * HUGE, dtype=torch.int32))


def test_a_system_that_does_not_say_what_there_is(
    advised: Advised, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pages, "MAPS", str(tmp_path / "none"))
    with collapsed():
        torch.ones(64 * HUGE, dtype=torch.uint8)
    assert mappings() == [] and not advised


def test_a_library_without_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages.ctypes, "CDLL", lambda _: object())
    assert pages._madvise.__wrapped__() is None
