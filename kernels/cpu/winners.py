"""Lists of winners: a row's highest scores and their positions, the best first, of equal scores the lowest position."""

from __future__ import annotations

from typing import Final

from minirea.kernels.cpu.code import F32, I64, Code, Value

MOST_WINNERS: Final = 16  # of a row; lists of more are not for insertion
LEAST: Final = float("-inf")


def clear(code: Code, lists: tuple[Value, Value], start: Value, stop: Value, position: Value) -> None:
    """Entries of several rows' lists: a score that all others exceed, at some position."""
    with code.range(start, stop) as entry:
        code.store(code.number(LEAST, F32), lists[0] + entry * 4)
        code.store(position, lists[1] + entry * 8)


def insert(code: Code, score: Value, j: Value, lists: tuple[Value, Value], count: int) -> Value:
    """Behind those that are as good, if it is better than the worst, in whose place the one before it comes; the worst
    score then. Without branches, which could not be foreseen.
    """
    scores = [code.load(lists[0] + i * 4, F32) for i in range(count)]
    places = [code.load(lists[1] + i * 8, I64) for i in range(count)]
    better = [score > other for other in scores]
    for i in range(count):
        worst, place = code.select(better[i], score, scores[i]), code.select(better[i], j, places[i])
        if i:
            worst = code.select(better[i - 1], scores[i - 1], worst)
            place = code.select(better[i - 1], places[i - 1], place)
        code.store(worst, lists[0] + i * 4)
        code.store(place, lists[1] + i * 8)
    return worst
