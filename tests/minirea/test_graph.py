"""How a captured step is counted, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from minirea.graph import DecodeGraph


class Event:
    """Counts its records and waits; a wait is interrupted if it is to be."""

    def __init__(self) -> None:
        self.records = self.waits = 0
        self.interrupted = False

    def record(self) -> None:
        self.records += 1

    def synchronize(self) -> None:
        self.waits += 1
        if self.interrupted:
            self.interrupted = False
            raise KeyboardInterrupt


class Cache:
    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len

    def reserve(self, _num_tokens: int) -> None:
        pass

    def rewind(self, seq_len: int) -> None:
        assert seq_len <= self.seq_len
        self.seq_len = seq_len


class Launches:
    """Of a step; the last one is interrupted."""

    def __init__(self, count: int) -> None:
        self.left = count

    def launch(self) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def close(self) -> None:
        pass


def graph_over(cache: Cache, launches: int) -> Any:
    """A DecodeGraph whose device is not there."""
    graph = object.__new__(DecodeGraph)
    attention = SimpleNamespace(sketch_keys=lambda _: None, dense_size=0)
    new = SimpleNamespace(on_host=[40, 41])
    graph.cache, graph.start = cache, cache.seq_len  # type: ignore[assignment]
    graph.step = SimpleNamespace(model=SimpleNamespace(attention=attention), new=new)  # type: ignore[assignment]
    graph.launched = graph.read_back = 0
    graph.graphs = {False: Launches(launches)}  # type: ignore[dict-item]
    graph.arrived = [Event(), Event()]  # type: ignore[list-item]
    return graph


@pytest.mark.parametrize("start", [6, 7])
def test_a_token_counts_once_its_wait_has_ended(start: int) -> None:
    """What a stream has yielded, and nothing else, is what the cache keeps but for the last one."""
    cache = Cache(start)
    graph = graph_over(cache, launches=9)
    graph.launch()
    graph.launch()
    assert graph.read() == 40 + (start + 1) % 2
    graph.launch()
    graph.arrived[start % 2].interrupted = True
    with pytest.raises(KeyboardInterrupt):
        graph.read()
    graph.close()
    assert cache.seq_len == start + 1
    assert sum(event.waits for event in graph.arrived) == 4  # the interrupted one again


def test_a_launch_that_is_interrupted_is_waited_for() -> None:
    """It may be on its way, and writes to memory of the host that is freed afterwards."""
    cache = Cache(6)
    graph = graph_over(cache, launches=3)
    graph.launch()
    graph.launch()
    assert graph.read() == 41
    with pytest.raises(KeyboardInterrupt):
        graph.launch()
    assert [event.records for event in graph.arrived] == [1, 2]
    graph.close()
    assert cache.seq_len == 7
    assert [event.waits for event in graph.arrived] == [1, 2]
