"""Steps of several ranks, one rank after the other in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from kernel_cases import Case

from minirea.kernels import Gather, reattention


class _NotYetGathered(Exception):  # noqa: N818
    pass


def part_of(case: Case, rank: int, ranks: int) -> Case:
    q, k, v = (x.chunk(ranks, dim)[rank] for x, dim in ((case.q, 1), (case.k_cache, 0), (case.v_cache, 0)))
    return replace(case, q=q, k_cache=k, v_cache=v)


def on_ranks(
    case: Case,
    ranks: int,
    impl: str,
    of_ranks: Sequence[dict[str, Any]] = (),
    to_host: Callable[[Case], Case] = lambda part: part,
    **options: Any,
) -> list[Any]:
    """What `reattention` returns on each rank. All go up to where they gather, then all go on from there.

    Args:
        of_ranks: options of each rank.
        to_host: moves a rank's cache.
    """
    gathered: list[torch.Tensor] = []
    while True:
        found, given = [], []
        for rank in range(ranks):
            calls = iter(range(99))

            def rows(x: torch.Tensor, calls: Any = calls, given: Any = given) -> torch.Tensor:
                if (call := next(calls)) < len(gathered):
                    return gathered[call].clone()
                given.append(x.clone())
                raise _NotYetGathered

            part = to_host(part_of(case, rank, ranks))
            options |= of_ranks[rank] if of_ranks else {}
            try:
                found.append(reattention(*part.arguments(), impl=impl, gather=Gather(rows, ranks), **options))
            except _NotYetGathered:
                continue
        if not given:
            return found
        assert len(given) == ranks, "some ranks gather where others do not"
        gathered.append(torch.cat(given))
