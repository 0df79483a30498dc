"""The phases of the fused kernel, each as a launch of its own, for `bench.py kernel`.

A phase's kernel here deals out work as `decode_kernel` or `chunk_kernel` does and calls the phase's own functions. It
gets the very arguments of the fused launch (tiles, grid, workspace), found by name; so each phase reads what the phase
before it has written. No barrier is in them, so they need no cooperative launch.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl

from minirea.kernels.reattention import (
    SIZES,
    attend,
    combine,
    load_rows,
    locate,
    pick,
    score_unit,
    select,
    slice_of,
    sort_winners,
    store_partial,
)

Phase = Callable[[torch.Tensor, torch.Tensor], None]  # of one pair of caches


@triton.jit(do_not_specialize=[*SIZES, "workers"])
def score_keys(
    q_ptr, k_ptr, seq_len, workers, stride_qh, stride_qd, stride_kg, stride_kn, stride_kd,
    block_ptr, tag_ptr, candidate_ptr, global_size, local_size,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PICK_M: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, SEQ_LEN_IN_MEMORY: tl.constexpr,
):  # fmt: skip
    """`score` and `pick` of a decode step."""
    n = tl.load(seq_len).to(tl.int32) if SEQ_LEN_IN_MEMORY else seq_len
    program = tl.program_id(0)
    block_ptr += program * (BLOCK_M * K_PAD * BLOCK_N)
    tag_ptr += program * (BLOCK_M * K_PAD)
    for unit in range(program, G * SLICES, workers):
        g = unit % G
        part = unit // G
        lo, hi = slice_of(global_size, n - local_size, part, SLICES)
        score_unit(q_ptr, 0, stride_qh, stride_qd, k_ptr + tl.cast(g, tl.int64) * stride_kg, stride_kn, stride_kd,
                   block_ptr, tag_ptr, g, 0, GROUP, lo, hi,
                   D, GROUP, K, K_PAD, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, PRECISION)  # fmt: skip
        pick(block_ptr, tag_ptr, candidate_ptr + (g * GROUP * SLICES + part) * K_PAD, SLICES * K_PAD, GROUP,
             lo, K, K_PAD, BLOCK_M, BLOCK_N, PICK_M)  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def elect_winners(
    candidate_ptr, kept_ptr, num_kept_ptr, max_spans,
    G: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, BY_HEAD: tl.constexpr, SLICES: tl.constexpr,
    CANDIDATES_PAD: tl.constexpr, BALLOT_ROWS: tl.constexpr, BALLOT_ROWS_PAD: tl.constexpr, VOTES: tl.constexpr,
    W_PAD: tl.constexpr,
):  # fmt: skip
    """`sort_winners`, as the selecting programs do it."""
    ballots: tl.constexpr = G if BY_HEAD else 1
    sort_winners(candidate_ptr, kept_ptr, num_kept_ptr, tl.program_id(0), ballots, tl.num_programs(0), max_spans,
                 BALLOT_ROWS, BALLOT_ROWS_PAD, SLICES * K_PAD, CANDIDATES_PAD, K, K_PAD, VOTES, W_PAD)  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, "workers"])
def lay_out(
    seq_len, workers, kept_ptr, num_kept_ptr, selection_ptr, front_ptr, global_size, local_size, span_size, max_scope,
    G: tl.constexpr, BY_HEAD: tl.constexpr, SLICES: tl.constexpr, W_PAD: tl.constexpr,
    SEQ_LEN_IN_MEMORY: tl.constexpr,
):  # fmt: skip
    """`select` and `locate`: each program the rows of the scope that it will attend to."""
    mid_hi = (tl.load(seq_len).to(tl.int32) if SEQ_LEN_IN_MEMORY else seq_len) - local_size
    for unit in range(tl.program_id(0), G * SLICES, workers):
        g = unit % G
        part = unit // G
        ballot = g if BY_HEAD else 0
        num_kept = tl.load(num_kept_ptr + ballot)
        start, offset, rows = select(kept_ptr + ballot * W_PAD, num_kept, global_size, mid_hi, span_size, W_PAD)
        front = global_size + tl.sum(rows, axis=0)
        first, last = slice_of(0, front, part, SLICES)
        locate(selection_ptr + ballot * max_scope, start, offset, rows, first, last, global_size, span_size, W_PAD)
        if part == 0:
            tl.store(front_ptr + ballot, front)


@triton.jit(do_not_specialize=[*SIZES, "workers"])
def attend_rows(
    q_ptr, k_ptr, v_ptr, seq_len, workers, cos_ptr, sin_ptr, stride_qh, stride_qd, stride_kg, stride_kn, stride_kd,
    stride_vg, stride_vn, stride_vd, partial_acc_ptr, partial_max_ptr, partial_sum_ptr, selection_ptr, front_ptr,
    local_size, max_scope,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BY_HEAD: tl.constexpr, SLICES: tl.constexpr,
    SCALE: tl.constexpr, RELATIVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr,
    HALF_PAD: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, SEQ_LEN_IN_MEMORY: tl.constexpr,
    LOCAL: tl.constexpr, FRONT: tl.constexpr,
):  # fmt: skip
    """`attend` to the scope's local part, to the rows before it (global and selected), or to both."""
    n = tl.load(seq_len).to(tl.int32) if SEQ_LEN_IN_MEMORY else seq_len
    offs_m = tl.arange(0, BLOCK_M)
    offs_h = tl.arange(0, HALF_PAD)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < GROUP
    offs_tile = tl.arange(0, BLOCK_A)
    cos = load_rows(cos_ptr, offs_tile, D // 2, offs_tile < tl.minimum(n, max_scope), offs_h, 1, D // 2)
    sin = load_rows(sin_ptr, offs_tile, D // 2, offs_tile < tl.minimum(n, max_scope), offs_h, 1, D // 2)
    for unit in range(tl.program_id(0), G * SLICES, workers):
        g = unit % G
        part = unit // G
        heads = g * GROUP + offs_m
        k_head = k_ptr + tl.cast(g, tl.int64) * stride_kg
        v_head = v_ptr + tl.cast(g, tl.int64) * stride_vg
        selection_head = selection_ptr + (g * max_scope if BY_HEAD else 0)
        front = tl.load(front_ptr + (g if BY_HEAD else 0))
        length = front + local_size
        q_a = load_rows(q_ptr, heads, stride_qh, mask_m, offs_h, stride_qd, D // 2)
        q_b = load_rows(q_ptr + D // 2 * stride_qd, heads, stride_qh, mask_m, offs_h, stride_qd, D // 2)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        row_max = tl.full([BLOCK_M], -1.0e38, tl.float32)
        row_sum = tl.zeros([BLOCK_M, BLOCK_A], tl.float32)
        if LOCAL:
            lo, hi = slice_of(n - local_size, n, part, SLICES)
            acc, row_max, row_sum = attend(
                acc, row_max, row_sum, q_a, q_b, k_head, stride_kn, stride_kd, v_head, stride_vn, stride_vd,
                cos_ptr, sin_ptr, cos, sin, lo, hi, n - 1, 0 if RELATIVE else length - n, selection_head,
                SCALE, D, BLOCK_A, BLOCK_D, HALF_PAD, False, RELATIVE, STAGES, PRECISION)  # fmt: skip
        if FRONT:
            lo, hi = slice_of(0, front, part, SLICES)
            acc, row_max, row_sum = attend(
                acc, row_max, row_sum, q_a, q_b, k_head, stride_kn, stride_kd, v_head, stride_vn, stride_vd,
                cos_ptr, sin_ptr, cos, sin, lo, hi, length - 1, 0, selection_head,
                SCALE, D, BLOCK_A, BLOCK_D, HALF_PAD, True, RELATIVE, STAGES, PRECISION)  # fmt: skip
        store_partial(partial_acc_ptr, partial_max_ptr, partial_sum_ptr, acc, row_max, row_sum,
                      heads * SLICES + part, mask_m, offs_d, D)  # fmt: skip


@triton.jit
def combine_heads(
    partial_acc_ptr, partial_max_ptr, partial_sum_ptr, out_ptr,
    GROUP: tl.constexpr, COMBINE_HEADS: tl.constexpr, SLICES: tl.constexpr, SLICES_PAD: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`combine`: one program for each key/value head."""
    combine(partial_acc_ptr, partial_max_ptr, partial_sum_ptr, out_ptr, tl.program_id(0),
            GROUP, COMBINE_HEADS, SLICES, SLICES_PAD, D, BLOCK_D)  # fmt: skip


@triton.jit
def nothing(counters_ptr):
    """What a launch costs by itself."""
    if tl.program_id(0) < 0:
        tl.store(counters_ptr, 0)


@triton.jit(do_not_specialize=[*SIZES, "T"])
def score_chunk(
    q_ptr, k_ptr, seq_len, T, stride_qt, stride_qh, stride_qd, stride_kg, stride_kn, stride_kd,
    block_ptr, tag_ptr, candidate_ptr, global_size, local_size,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PICK_M: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, SEQ_LEN_IN_MEMORY: tl.constexpr,
):  # fmt: skip
    """`score` and `pick` of a chunk."""
    n = tl.load(seq_len).to(tl.int32) if SEQ_LEN_IN_MEMORY else seq_len
    num_rows = T * GROUP
    program = tl.program_id(0)
    block_ptr += tl.cast(program, tl.int64) * (BLOCK_M * K_PAD * BLOCK_N)
    tag_ptr += program * (BLOCK_M * K_PAD)
    for unit in range(program, G * tl.cdiv(num_rows, BLOCK_M) * SLICES, tl.num_programs(0)):
        part = unit % SLICES
        g = unit // SLICES % G
        first_row = unit // SLICES // G * BLOCK_M
        lo, hi = slice_of(global_size, n - local_size, part, SLICES)
        score_unit(q_ptr, stride_qt, stride_qh, stride_qd, k_ptr + tl.cast(g, tl.int64) * stride_kg, stride_kn,
                   stride_kd, block_ptr, tag_ptr, g, first_row, num_rows, lo, hi,
                   D, GROUP, K, K_PAD, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, PRECISION)  # fmt: skip
        row = tl.cast(g * num_rows + first_row, tl.int64)
        pick(block_ptr, tag_ptr, candidate_ptr + (row * SLICES + part) * K_PAD, SLICES * K_PAD, num_rows - first_row,
             lo, K, K_PAD, BLOCK_M, BLOCK_N, PICK_M)  # fmt: skip


class Launch(NamedTuple):
    """One launch of a fused kernel: its grid, and its arguments by the names that the kernel gives them."""

    kernel: str
    programs: int
    arguments: dict[str, Any]


def recorded(step: Callable[[], Any]) -> Launch:
    """What `step` would launch. Nothing is launched; the output that `step` returns is not written."""
    found = []

    def record(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        names = inspect.signature(kernel.fn).parameters
        found.append(Launch(kernel.fn.__name__, programs, dict(zip(names, arguments, strict=False)) | constants))

    # Importing it by name gives the function that the package offers under the same name.
    module = importlib.import_module("minirea.kernels.reattention")
    with mock.patch.object(module, "_launch", record):
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
        "attend, local part": phase(attend_rows, workers, LOCAL=True, FRONT=False),
        "attend, front rows": phase(attend_rows, workers, LOCAL=False, FRONT=True),
        "combine": phase(combine_heads, arguments["G"]),
        "an empty launch": phase(nothing, launch.programs),
    }


def launch_phase(
    kernel: Any, programs: int, arguments: dict[str, Any], k_GND: torch.Tensor, v_GND: torch.Tensor
) -> None:
    """Launch a kernel of this file on other caches of the same shape and strides."""
    arguments = arguments | {"k_ptr": k_GND, "v_ptr": v_GND}
    named = {name: arguments[name] for name in inspect.signature(kernel.fn).parameters}
    kernel[(programs,)](**named, num_warps=arguments["num_warps"])
