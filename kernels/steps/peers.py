"""What a decode step exchanges between GPUs that reach each other's memory: sums into x, winners, logits.

    add_sums   every rank's partial sums -> x
    gather     every rank's values -> all of them, on every rank

A program works on one block and needs only the programs of the other ranks that work on the same block: it sets its
flag on every rank, and waits until theirs are set here. Flags and turns only grow. Memory that another rank reads or
writes is used again only two turns later, when the turn between them has shown that it has finished.

Letters: E model width, M values of one rank, R ranks.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl

from minirea.kernels.launching import cdiv, start

BLOCK: Final = 1024
MAX_PROGRAMS: Final = 64  # all run at once on any GPU


@triton.jit
def meet(flags_ptr, turn_ptr, rank, RANKS: tl.constexpr):
    """Wait until the other ranks' programs of this number are here too; what they wrote before is then visible.

    flags_ptr int64 [R] points to each rank's flags, int32 [programs, R]; turn_ptr int32 [programs] is this rank's own.
    """
    program = tl.program_id(0)
    turn = tl.load(turn_ptr + program) + 1
    tl.debug_barrier()
    tl.store(turn_ptr + program, turn)
    for other in range(RANKS):
        theirs = tl.load(flags_ptr + other).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(theirs + program * RANKS + rank, turn, sem="release", scope="sys")
    ours = tl.load(flags_ptr + rank).to(tl.pointer_type(tl.int32))
    for other in range(RANKS):
        while tl.atomic_add(ours + program * RANKS + other, 0, sem="acquire", scope="sys") < turn:
            pass
    tl.debug_barrier()


@triton.jit(do_not_specialize=["rank", "this", "next_one"])
def add_sums_kernel(
    x_ptr, partials_ptr, flags_ptr, turn_ptr, rank, E, this, next_one, RANKS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """x [E] += the partial sums at `this` of all ranks, in their order; zeroes this rank's own at `next_one`.

    partials_ptr int64 [R] points to each rank's, float32.
    """
    meet(flags_ptr, turn_ptr, rank, RANKS)
    offs_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    x = tl.load(x_ptr + offs_e, mask=mask_e, other=0.0)
    acc = x.to(tl.float32)
    for other in range(RANKS):
        theirs = tl.load(partials_ptr + other).to(tl.pointer_type(tl.float32))
        acc += tl.load(theirs + this + offs_e, mask=mask_e, other=0.0)
    tl.store(x_ptr + offs_e, acc.to(x.dtype), mask=mask_e)
    ours = tl.load(partials_ptr + rank).to(tl.pointer_type(tl.float32))
    tl.store(ours + next_one + offs_e, tl.zeros([BLOCK_E], tl.float32), mask=mask_e)


@triton.jit(do_not_specialize=["rank"])
def gather_kernel(
    values_ptr, out_ptr, rooms_ptr, flags_ptr, turn_ptr, rank, M, capacity, per_program,
    RANKS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """values int32 [M] of all ranks -> out int32 [R, M], by way of every rank's room, int32 [2, R, capacity].

    A rank that is a turn ahead writes to the other half of the rooms, and none is two turns ahead of another.
    rooms_ptr int64 [R] points to the rooms.
    """
    half = tl.load(turn_ptr + tl.program_id(0)) % 2 * RANKS * capacity
    first = tl.program_id(0) * per_program
    stop = tl.minimum(first + per_program, M)
    for lo in range(first, stop, BLOCK_M):
        offs_m = lo + tl.arange(0, BLOCK_M)
        values = tl.load(values_ptr + offs_m, mask=offs_m < stop, other=0)
        for other in range(RANKS):
            theirs = tl.load(rooms_ptr + other).to(tl.pointer_type(tl.int32))
            tl.store(theirs + half + rank * capacity + offs_m, values, mask=offs_m < stop)
    meet(flags_ptr, turn_ptr, rank, RANKS)
    ours = tl.load(rooms_ptr + rank).to(tl.pointer_type(tl.int32))
    for lo in range(first, stop, BLOCK_M):
        offs_m = lo + tl.arange(0, BLOCK_M)
        for other in range(RANKS):
            values = tl.load(ours + half + other * capacity + offs_m, mask=offs_m < stop, other=0)
            tl.store(out_ptr + other * M + offs_m, values, mask=offs_m < stop)


class Room(NamedTuple):
    """Memory of this rank that the others reach, and theirs.

    Attributes:
        own: of this rank, 32-bit elements.
        all: int64 [R], the addresses of all ranks'.
        flags: int64 [R], those of their flags for this room.
        turns: int32 [MAX_PROGRAMS], zero at first.
    """

    own: torch.Tensor
    all: torch.Tensor
    flags: torch.Tensor
    turns: torch.Tensor
    rank: int


def add_sums(x_E: torch.Tensor, room: Room, parity: int) -> None:
    """x += the partial sums of all ranks, which lie at `parity` of the room, float32 [2, E]; the others become zero.

    Calls take turns between both parities, and the sums are this rank's when it calls.
    """
    E = x_E.shape[0]
    block = max(BLOCK, triton.next_power_of_2(cdiv(E, MAX_PROGRAMS)))
    arguments = x_E, room.all, room.flags, room.turns, room.rank, E, parity * E, (1 - parity) * E
    start(add_sums_kernel, cdiv(E, block), x_E.device, arguments, {"RANKS": len(room.all), "BLOCK_E": block})


def gather(x: torch.Tensor, room: Room) -> torch.Tensor:
    """The rows of all ranks [R * M, ...] from each one's x [M, ...] of 32 bits.

    The room has space for both halves of R times as many values as are gathered at most.
    """
    values = x.contiguous().view(torch.int32).view(-1)
    M, ranks = values.shape[0], len(room.all)
    out = values.new_empty(ranks * M)
    capacity = room.own.shape[0] // (2 * ranks)
    programs = min(MAX_PROGRAMS, cdiv(capacity, BLOCK))  # whatever M is, each has the same part of a room
    addresses = room.all, room.flags, room.turns
    arguments = values, out, *addresses, room.rank, M, capacity, cdiv(capacity, programs)
    start(gather_kernel, programs, x.device, arguments, {"RANKS": ranks, "BLOCK_M": BLOCK})
    return out.view(x.dtype).view(ranks * x.shape[0], *x.shape[1:])
