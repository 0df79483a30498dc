"""Which cached tokens a decode step attends to, from the winners of its queries: section 3's steps 5 to 7."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minirea.config import ReAttentionConfig
from minirea.kernels.cpu.code import I32, I64, LANES, Arguments, Code, Value, Variable, vector
from minirea.kernels.cpu.compile import Call, Kernel, address
from minirea.kernels.reference import INDEX_MASK

_RUN: Final = 16  # bytes


class Choose(NamedTuple):
    """Adds the winners' votes to those that there are, and lays out the scope.

    The positions with most votes are kept in a list, votes and then position as one number, which each position that
    has votes may enter.

    Attributes:
        num_heads: H.
        num_winners: K, winners of a head's row.
        kept: of them in the row that stays for later tokens; 0: it does not stay.
        carries: votes stay for the next layer, else they are taken back.
    """

    num_heads: int
    num_winners: int
    kept: int
    carries: bool
    vote_size: int
    max_spans: int
    span_size: int

    def write(self, code: Code, a: Arguments) -> None:
        if self.kept:
            self._leave(code, a)
        self._vote(code, a, 1)
        num_kept = self._elect(code, a)
        if not self.carries:
            self._vote(code, a, -1)
        self._sort(code, a, num_kept)
        self._lay_out(code, a, num_kept)

    def _leave(self, code: Code, a: Arguments) -> None:
        """The winners in the row [H, kept] of this token, int32."""
        with code.range(0, self.num_heads) as h:
            for i in range(self.kept):
                winner = (
                    code.load(a["found"] + (h * self.num_winners + i) * 8, I64)
                    if i < self.num_winners
                    else code.number(-1)
                )
                code.store(code.narrower(winner, I32), a["winners"] + (h * self.kept + i) * 4)

    def _vote(self, code: Code, a: Arguments, votes: int) -> None:
        with code.range(0, self.num_heads * self.num_winners) as i:
            at = code.load(a["found"] + i * 8, I64)
            if self.vote_size > 1:  # for the middle of its block
                at = at // self.vote_size * self.vote_size + self.vote_size // 2
                at = code.smaller(code.larger(at, a["start"]), a["stop"] - 1)
            at = a["counts"] + at * 4
            code.store(code.load(at, I32) + votes, at)

    def _elect(self, code: Code, a: Arguments) -> Variable:
        """The list, best first, in `elected`; how many there are."""
        num_kept = code.variable(code.number(0))
        with code.range(a["start"] // LANES * LANES, a["stop"], LANES) as first:
            with code.when(code.any(code.load(a["counts"] + first * 4, vector(I32)))):
                with code.range(first, first + LANES) as position:
                    votes = code.load(a["counts"] + position * 4, I32)
                    with code.when(votes > 0):
                        self._insert(code, a, (code.wider(votes, I64) << 32) | (position * -1 + INDEX_MASK), num_kept)
        return num_kept

    def _insert(self, code: Code, a: Arguments, number: Value, num_kept: Variable) -> None:
        """At its place in the list, which loses its last where it is full."""
        worst = code.load(a["elected"] + (code.larger(num_kept.value, 1) - 1) * 8, I64)
        with code.when((num_kept.value < self.max_spans) | (number > worst)):
            num_kept.value = code.smaller(num_kept.value + 1, self.max_spans)
            _insert(code, number, a["elected"], num_kept.value - 1, functools.partial(_is_smaller, number))

    def _sort(self, code: Code, a: Arguments, num_kept: Variable) -> None:
        """The list becomes one of positions, ascending."""
        with code.range(0, num_kept.value) as i:
            position = (code.load(a["elected"] + i * 8, I64) & INDEX_MASK) * -1 + INDEX_MASK
            _insert(code, position, a["elected"], i, functools.partial(_is_larger, position))

    def _lay_out(self, code: Code, a: Arguments, num_kept: Variable) -> None:
        """Runs of the scope: how many, of how many tokens, then each; those that meet are one."""
        runs = a["runs"]
        code.store(code.number(0), runs + _RUN)
        code.store(a["start"], runs + (_RUN + 8))
        last, length, end = (code.variable(n) for n in (code.number(1), a["start"], a["start"]))

        def add(start: Value, stop: Value) -> None:
            start = code.larger(start, end.value)
            with code.when(start < stop):
                with code.when(start > end.value):
                    last.value = last.value + 1
                    code.store(start, runs + last.value * _RUN)
                code.store(stop, runs + (last.value * _RUN + 8))
                length.value = length.value + (stop - start)
                end.value = stop

        half = self.span_size // 2
        with code.range(0, num_kept.value) as i:
            middle = code.load(a["elected"] + i * 8, I64)
            add(middle - half, code.smaller(middle + half, a["stop"]))
        add(a["stop"], a["seq_len"])
        code.store(last.value, runs)
        code.store(length.value, runs + 8)


def _insert(code: Code, number: Value, numbers: Value, last: Value, comes_before: Callable[[Value], Value]) -> None:
    """At its place among int64 numbers, of which those from there on move up by one, up to the `last`."""
    at = code.variable(last)

    def other() -> Value:
        return code.load(numbers + (code.larger(at.value, 1) - 1) * 8, I64)

    with code.loop(lambda: (at.value > 0) & comes_before(other())):
        code.store(other(), numbers + at.value * 8)
        at.value = at.value - 1
    code.store(number, numbers + at.value * 8)


def _is_larger(number: Value, other: Value) -> Value:
    return other > number


def _is_smaller(number: Value, other: Value) -> Value:
    return other < number


def choose(
    config: ReAttentionConfig,
    found_HK: np.ndarray,
    seq_len: int,
    counts_N: Tensor | None = None,
    winners_HK: Tensor | None = None,
) -> np.ndarray:
    """Runs of a decode step's scope as `attend` takes them.

    Args:
        found_HK: winners, int64 cache positions.
        counts_N: votes so far, int32, filled up to whole LANES, to which these are added.
        winners_HK: int32, takes the winners and -1 where there are fewer.
    """
    runs_X2, elected_P = new_runs(config, seq_len), new_elected(config, seq_len)
    carries, kept = counts_N is not None, 0 if winners_HK is None else winners_HK.shape[1]
    counts_N = new_counts(seq_len) if counts_N is None else counts_N
    call = bind_choose(config, np.ascontiguousarray(found_HK), runs_X2, elected_P, kept, carries)
    call.set(start=config.global_size, stop=seq_len - config.local_size, seq_len=seq_len)
    call.set(counts=counts_N.data_ptr(), winners=address(winners_HK))
    call()
    return runs_X2[: 1 + runs_X2[0, 0]]


def bind_choose(
    config: ReAttentionConfig, found_HK: np.ndarray, runs_X2: np.ndarray, elected_P: Tensor, kept: int, carries: bool
) -> Call:
    """`choose` into `runs_X2`, of a middle [start, stop), seq_len, and addresses of counts and the row of winners that
    have to be set.

    Args:
        elected_P: of new_elected; runs_X2 is of new_runs.
        kept: winners of a head that the row has; 0: there is none.
        carries: the counts are also the next layer's; else they are zero before and afterwards.
    """
    sizes = *found_HK.shape, kept, carries, config.vote_size, config.max_spans, config.span_size
    return _choose_kernel(Choose(*sizes)).bind(
        found=found_HK.ctypes.data,
        runs=runs_X2.ctypes.data,
        elected=elected_P.data_ptr(),
        **dict.fromkeys(("start", "stop", "seq_len", "counts", "winners"), 0),
    )


def new_runs(config: ReAttentionConfig, num_tokens: int) -> np.ndarray:
    """Room for the runs of a scope among so many tokens, as `attend` takes them."""
    return np.zeros((min(config.max_spans, num_tokens) + 3, 2), np.int64)


def new_elected(config: ReAttentionConfig, num_tokens: int) -> Tensor:
    """Room for the positions with most votes."""
    return torch.empty(max(1, min(config.max_spans, num_tokens)), dtype=torch.int64)


@functools.cache
def _choose_kernel(choose: Choose) -> Kernel:
    names = "found", "runs", "elected", "start", "stop", "seq_len", "counts", "winners"
    return Kernel(choose.write, names, alone=True)


def new_counts(capacity: int) -> Tensor:
    """Of a cache of so many tokens."""
    return torch.zeros(-(-capacity // LANES) * LANES, dtype=torch.int32)
