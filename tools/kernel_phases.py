"""The phases of the fused kernel, each as a launch of its own, for `bench.py kernel`.

A phase's kernel here deals out work as `decode_kernel` or `chunk_kernel` does and calls the phase's own functions. It
gets the very arguments of the fused launch, found by name; so each phase reads what the phase before it has written.
No barrier is in them, so they need no cooperative launch.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl

from minirea.kernels.fused import launch as launching
from minirea.kernels.fused.arguments import VARYING, Softmax
from minirea.kernels.fused.attend import attend, combine, store_partial
from minirea.kernels.fused.decode import rope_of_a_tile
from minirea.kernels.fused.memory import load_rows, of_head, slice_of
from minirea.kernels.fused.scope import locate, select
from minirea.kernels.fused.score import pick, score_slice
from minirea.kernels.fused.vote import sort_winners
from minirea.kernels.launching import start

Phase = Callable[[torch.Tensor, torch.Tensor], None]  # of one pair of caches


@triton.jit(do_not_specialize=[*VARYING, "workers"])
def score_keys(q, k, scratch, seq_len, workers, global_size, local_size, c: tl.constexpr):
    """`score` and `pick` of a decode step."""
    n = tl.load(seq_len).to(tl.int32) if c.SEQ_LEN_IN_MEMORY else seq_len
    program = tl.program_id(0)
    block_ptr = scratch.block + program * (c.BLOCK_M * c.K_PAD * c.BLOCK_N)
    tag_ptr = scratch.tag + program * (c.BLOCK_M * c.K_PAD)
    for unit in range(program, c.G * c.SLICES, workers):
        g = unit % c.G
        part = unit // c.G
        lo, hi = slice_of(global_size, n - local_size, part, c.SLICES)
        score_slice(q, of_head(k, g), block_ptr, tag_ptr, g, 0, c.GROUP, lo, hi, c)
        pick(block_ptr, tag_ptr, scratch.candidate + (g * c.GROUP * c.SLICES + part) * c.K_PAD, c.GROUP, lo, c)


@triton.jit(do_not_specialize=VARYING)
def elect_winners(scratch, max_spans, c: tl.constexpr):
    """`sort_winners`, as the selecting programs do it."""
    sort_winners(scratch, None, 0, tl.program_id(0), tl.num_programs(0), 0, 1, max_spans, c)


@triton.jit(do_not_specialize=[*VARYING, "workers"])
def lay_out(scratch, seq_len, workers, global_size, local_size, span_size, max_scope, c: tl.constexpr):
    """`select` and `locate`: each program the rows of the scope that it will attend to."""
    mid_hi = (tl.load(seq_len).to(tl.int32) if c.SEQ_LEN_IN_MEMORY else seq_len) - local_size
    for unit in range(tl.program_id(0), c.G * c.SLICES, workers):
        g = unit % c.G
        part = unit // c.G
        ballot = g if c.BY_HEAD else 0
        num_kept = tl.load(scratch.num_kept + ballot)
        kept_ptr = scratch.kept + ballot * c.W_PAD
        start, offset, rows = select(kept_ptr, num_kept, global_size, mid_hi, span_size, c.W_PAD)
        num_far = global_size + tl.sum(rows, axis=0)
        first, last = slice_of(0, num_far, part, c.SLICES)
        selection_ptr = scratch.selection + ballot * max_scope
        locate(selection_ptr, start, offset, rows, first, last, global_size, span_size, c.W_PAD)
        if part == 0:
            tl.store(scratch.num_far + ballot, num_far)


@triton.jit(do_not_specialize=[*VARYING, "workers"])
def attend_rows(
    q, k, v, rope, scratch, seq_len, workers, local_size, max_scope, num_positions, c: tl.constexpr,
    LOCAL: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """`attend` to the scope's local part, to its far part (global and selected), or to both."""
    n = tl.load(seq_len).to(tl.int32) if c.SEQ_LEN_IN_MEMORY else seq_len
    offs_m = tl.arange(0, c.BLOCK_M)
    offs_h = tl.arange(0, c.HALF_PAD)
    offs_d = tl.arange(0, c.BLOCK_D)
    mask_m = offs_m < c.GROUP
    tile_rope = rope_of_a_tile(rope, num_positions, c)
    for unit in range(tl.program_id(0), c.G * c.SLICES, workers):
        g = unit % c.G
        part = unit // c.G
        heads = g * c.GROUP + offs_m
        k_head = of_head(k, g)
        v_head = of_head(v, g)
        selection_ptr = scratch.selection + (g * max_scope if c.BY_HEAD else 0)
        num_far = tl.load(scratch.num_far + (g if c.BY_HEAD else 0))
        length = num_far + local_size
        q_a = load_rows(q.ptr, heads, q.stride_h, mask_m, offs_h, q.stride_d, c.D // 2)
        q_b = load_rows(q.ptr + c.D // 2 * q.stride_d, heads, q.stride_h, mask_m, offs_h, q.stride_d, c.D // 2)
        state = Softmax(
            tl.full([c.BLOCK_M, c.BLOCK_D], 0, tl.float32),
            tl.full([c.BLOCK_M], -1.0e38, tl.float32),
            tl.full([c.BLOCK_M, c.BLOCK_A], 0, tl.float32),
        )
        if LOCAL:
            lo, hi = slice_of(n - local_size, n, part, c.SLICES)
            state = attend(state, q_a, q_b, k_head, v_head, rope, tile_rope, lo, hi, n - 1,
                           0 if c.RELATIVE else length - n, selection_ptr, False, c.RELATIVE, c)  # fmt: skip
        if FAR:
            lo, hi = slice_of(0, num_far, part, c.SLICES)
            state = attend(state, q_a, q_b, k_head, v_head, rope, tile_rope, lo, hi, length - 1, 0, selection_ptr,
                           True, c.RELATIVE, c)  # fmt: skip
        store_partial(scratch, state, heads * c.SLICES + part, mask_m, offs_d, c)


@triton.jit
def combine_heads(out_ptr, scratch, c: tl.constexpr):
    """`combine`: one program for each key/value head."""
    combine(scratch, out_ptr, tl.program_id(0), c)


@triton.jit
def nothing(scratch):
    """What a launch costs by itself."""
    if tl.program_id(0) < 0:
        tl.store(scratch.counters, 0)


@triton.jit(do_not_specialize=[*VARYING, "T"])
def score_chunk(q, k, scratch, seq_len, T, global_size, local_size, c: tl.constexpr):
    """`score` and `pick` of a chunk."""
    n = tl.load(seq_len).to(tl.int32) if c.SEQ_LEN_IN_MEMORY else seq_len
    num_rows = T * c.GROUP
    program = tl.program_id(0)
    block_ptr = scratch.block + tl.cast(program, tl.int64) * (c.BLOCK_M * c.K_PAD * c.BLOCK_N)
    tag_ptr = scratch.tag + program * (c.BLOCK_M * c.K_PAD)
    for unit in range(program, c.G * tl.cdiv(num_rows, c.BLOCK_M) * c.SLICES, tl.num_programs(0)):
        part = unit % c.SLICES
        g = unit // c.SLICES % c.G
        first_row = unit // c.SLICES // c.G * c.BLOCK_M
        lo, hi = slice_of(global_size, n - local_size, part, c.SLICES)
        score_slice(q, of_head(k, g), block_ptr, tag_ptr, g, first_row, num_rows, lo, hi, c)
        row = tl.cast(g * num_rows + first_row, tl.int64)
        candidate_ptr = scratch.candidate + (row * c.SLICES + part) * c.K_PAD
        pick(block_ptr, tag_ptr, candidate_ptr, num_rows - first_row, lo, c)


class Launch(NamedTuple):
    """One launch of a fused kernel: its grid, and its arguments by the names that the kernel gives them."""

    kernel: str
    programs: int
    arguments: dict[str, Any]


def recorded(step: Callable[[], Any]) -> Launch:
    """What `step` would launch. Nothing is launched; the output that `step` returns is not written."""
    found = []

    def record(kernel: Any, programs: int, _device: torch.device, **arguments: Any) -> None:
        found.append(Launch(kernel.fn.__name__, programs, arguments))

    with mock.patch.object(launching, "launch", record):
        step()
    (launch,) = found
    return launch


def phases_of(launch: Launch) -> dict[str, Phase]:
    """The phases that can run alone, in the order of the fused launch."""
    arguments = launch.arguments

    def phase(kernel: Any, programs: int, **constants: bool) -> Phase:
        return functools.partial(launch_phase, kernel, programs, arguments | constants)

    if launch.kernel == "chunk_kernel":
        return {"score, pick": phase(score_chunk, launch.programs)}
    workers = arguments["workers"]
    return {
        "score, pick": phase(score_keys, workers),
        "merge, sort": phase(elect_winners, max(1, launch.programs - workers)),
        "select, locate": phase(lay_out, workers),
        "attend, local part": phase(attend_rows, workers, LOCAL=True, FAR=False),
        "attend, far part": phase(attend_rows, workers, LOCAL=False, FAR=True),
        "combine": phase(combine_heads, arguments["c"].G),
        "an empty launch": phase(nothing, launch.programs),
    }


def launch_phase(
    kernel: Any, programs: int, arguments: dict[str, Any], k_GND: torch.Tensor, v_GND: torch.Tensor
) -> None:
    """Launch a kernel of this file on other caches of the same shape and strides."""
    caches = {name: arguments[name]._replace(ptr=x) for name, x in (("k", k_GND), ("v", v_GND))}
    arguments = arguments | caches
    named = {name: arguments[name] for name in [*inspect.signature(kernel.fn).parameters, "num_warps"]}
    constants: dict[str, Any] = {name: named.pop(name) for name in ("c", "LOCAL", "FAR", "num_warps") if name in named}
    start(kernel, programs, k_GND.device, tuple(named.values()), constants)
