# mypy: disable-error-code="no-untyped-def"
"""The fused kernel in Triton's interpreter with its programs at once, each in a process of its own, on shared memory.

In test_interpreted_fused.py one program does everything and waits for none. Here counters, barriers and the program
that sorts the winners do what they do on a GPU, if at another pace.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import (
    Case,
    as_list,
    check_chunks,
    error,
    make_case,
    plain_attention,
    votes_of,
)
from oracle import reattention_oracle
from processes import at_once
from sketch_cases import real_case, sketch_of
from triton.runtime import interpreter

from minirea.kernels import ReAttentionConfig, Sketch, reattention, winners_shape
from minirea.kernels.fused import launch as launching
from minirea.kernels.fused import plan
from minirea.kernels.fused.arguments import Rope, SketchTiles


@pytest.fixture(autouse=True, scope="module")
def _functions_are_read_before_processes_start() -> None:
    """Triton reads a function, and imports what it needs for that, when it is first called."""
    config = ReAttentionConfig(2, 8, 3, 4, 5)
    for T in (1, 5):
        case = make_case(config, 60, T=T, H=6, G=2, D=16, largest=2)
        winners = torch.empty(6, *winners_shape(6, config, 1)[1:], dtype=torch.int32)
        for options in ({"votes": votes_of(case, 1), "winners": winners} if T == 1 else {"winners": winners}, {}):
            reattention(*case.arguments(), impl="triton", chunk_size=2, **options)
    case = real_case(config, 60, 3, H=6, G=2, D=16)
    reattention(*case.arguments(), impl="triton", sketch=sketch_of(case, "torch"))


def run_program(program: int, programs: int, step: Any, arguments: tuple[Any, ...]) -> None:
    """One program of a launch: the interpreter's loop over the grid comes to it alone."""
    loop = interpreter.GridExecutor.__call__.__code__

    def in_grid(*bounds: int) -> Any:  # the interpreter lends its globals to kernels, whose loops stay whole
        return (program,) if sys._getframe(1).f_code is loop and bounds == (programs,) else range(*bounds)

    interpreter.range = in_grid
    interpreter.GridExecutor._restore_args_dev = lambda *_: None  # which copies memory that others still write to
    builder = interpreter.interpreter_builder
    add = builder.create_atomic_rmw

    def add_and_let_others_run(*arguments: Any) -> Any:
        """A program that waits adds zeros; it is not to take the core of one that is waited for."""
        time.sleep(1e-4)
        return add(*arguments)

    builder.create_atomic_rmw = add_and_let_others_run
    step(*arguments)


def launch(monkeypatch: pytest.MonkeyPatch, step: Any, programs: int, arguments: tuple[Any, ...]) -> Any:
    """step(*arguments) as `programs` processes at once; returns the workspace."""
    monkeypatch.setattr(plan, "num_programs", lambda *_: programs)
    with monkeypatch.context() as patch:  # the workspace first, for all processes to share
        for module, name in ((launching, "launch"), (launching.launching, "start")):
            patch.setattr(module, name, lambda *_, **__: None)
        workspace = step(*arguments)
    for tensor in workspace:
        if tensor is not None:  # of a sketch that there is not
            tensor.share_memory_()
    grid = 2 * max(1, programs // 2) if step is launching.launch_plain else programs
    at_once(grid, lambda program: run_program(program, grid, step, arguments))
    return workspace


def inputs(case: Case, out_THD: torch.Tensor, **options: Any) -> launching.Inputs:
    rope = Rope(case.cos, case.sin)
    return launching.Inputs(case.q, case.k_cache, case.v_cache, out_THD, case.seq_len, rope, case.config, **options)


def check_growing(
    monkeypatch: pytest.MonkeyPatch, case: Case, programs: int, seq_lens: tuple[int, ...], sketch: Sketch | None = None
) -> Any:
    """Launches with more and more keys find the right scope and output, whatever the one before left behind. Returns
    the last workspace.
    """
    launching._workspaces.clear()  # whose counters have counted to another number of programs
    T = case.q.shape[0]
    step, sizes = (launching.launch_decode, ()) if T == 1 else (launching.launch_chunks, (T,))
    if T == 1 and not case.config.max_selected:
        step = launching.launch_plain
    for seq_len in seq_lens:
        case = replace(case, seq_len=seq_len)
        out_THD = torch.full_like(case.q, torch.nan).share_memory_()
        workspace = launch(monkeypatch, step, programs, (inputs(case, out_THD, sketch=sketch), *sizes))
        exact_THD, scopes = case.oracle()
        found = launching.scopes_of(workspace, seq_len, launching.Layer.of(case.q, case.k_cache, case.config))
        assert [s.tolist() for s in found] == [s.tolist() for s in scopes]
        assert error(out_THD, exact_THD) <= 2 * error(plain_attention(case, scopes), exact_THD) + 1e-7
        assert not torch.equal(workspace.counters, torch.zeros_like(workspace.counters))
    return workspace


@pytest.mark.parametrize(("span_scope", "programs"), [("layer", 5), ("kv_head", 6), ("kv_head", 5), ("kv_head", 3)])
def test_decode_workers_and_selectors(monkeypatch: pytest.MonkeyPatch, span_scope: str, programs: int) -> None:
    """Two key/value heads in two slices each are four workers; one or two more sort the winners. Three programs are as
    many as each row has winners.
    """
    for max_spans in (2, 40):
        config = ReAttentionConfig(2, 8, 3, 4, max_spans, span_scope=span_scope)
        case = make_case(config, 200, T=1, H=6, G=2, D=16, largest=2, seed=max_spans)
        check_growing(monkeypatch, case, programs, (60, 61, 9, 150, 200))


@pytest.mark.parametrize("programs", [1, 2, 6])
def test_slices_where_nothing_is_selected(monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    """Up to three of each of two key/value heads, some of which are empty: of global and local tokens, or of all."""
    config = ReAttentionConfig(2, 30, 0, 4, 5, dense_size=60)
    case = make_case(config, 200, T=1, H=6, G=2, D=16, seed=programs)
    check_growing(monkeypatch, case, programs, (60, 61, 1, 35, 200))


@pytest.mark.parametrize(("span_scope", "programs"), [("layer", 5), ("kv_head", 3)])
def test_decode_with_sketches(monkeypatch: pytest.MonkeyPatch, span_scope: str, programs: int) -> None:
    """Two slices of each head, or one worker for both heads."""
    for ROOM, seq_lens in ((32, (9, 150, 151)), (1, (150,))):
        tiles = SketchTiles(BLOCK_N=32, ROOM=ROOM, SURVIVORS=512, LEAST=64, num_stages=2, LIVE_M=4)
        case = real_case(ReAttentionConfig(2, 8, 3, 4, 5, span_scope=span_scope), 300, 3, H=6, G=2, D=16)
        sketch = sketch_of(case, "torch", 143)
        monkeypatch.setattr(plan, "sketch_tiles", lambda _, tiles=tiles: tiles)
        workspace = check_growing(monkeypatch, case, programs, seq_lens, sketch)
        assert torch.all((workspace.found > tiles.SURVIVORS) == (ROOM == 1))


@pytest.mark.parametrize("best", [0, 1])
def test_slices_know_each_others_bounds(monkeypatch: pytest.MonkeyPatch, best: int) -> None:
    """Where all large keys are in one slice, nothing survives in the other, before it or behind it."""
    tiles = SketchTiles(BLOCK_N=16, ROOM=32, SURVIVORS=512, LEAST=64, num_stages=2, LIVE_M=4)
    case = real_case(ReAttentionConfig(2, 8, 3, 4, 5), 150, 3, H=6, G=2, D=16)
    case.k_cache[:, 2 + 70 * (1 - best) : 72 + 70 * (1 - best)] *= 1e-2
    monkeypatch.setattr(plan, "sketch_tiles", lambda _: tiles)
    workspace = check_growing(monkeypatch, case, 5, (150, 150), sketch_of(case, "torch"))
    assert torch.all(workspace.found[:, 1 - best] == 0)
    assert torch.all((workspace.found[:, best] >= 3) & (workspace.found[:, best] < 70))


@pytest.mark.parametrize("span_scope", ["layer", "kv_head"])
def test_chunk_barriers(monkeypatch: pytest.MonkeyPatch, span_scope: str) -> None:
    config = ReAttentionConfig(2, 8, 3, 4, 5, span_scope=span_scope)
    case = make_case(config, 200, T=6, H=4, G=2, D=16, largest=2)
    check_growing(monkeypatch, case, 5, (60, 66, 9, 200))


@pytest.mark.parametrize(
    ("kernel", "span_scope", "programs"),
    [("decode", "layer", 5), ("decode", "kv_head", 6), ("chunks", "layer", 5), ("chunks", "kv_head", 3)],
)
def test_votes_that_add_up(monkeypatch: pytest.MonkeyPatch, kernel: str, span_scope: str, programs: int) -> None:
    """From layer to layer of a step of one query; the next one begins with zeros again. In the decode kernel there are
    four workers, and one or two programs that count votes.
    """
    launching._workspaces.clear()
    config = ReAttentionConfig(2, 8, 3, 4, 4, span_scope=span_scope, vote_size=4)
    case = make_case(config, 170, H=6, G=2, D=16, largest=2)
    votes, winners = votes_of(case, 3), torch.full((4, 6, 3), -1, dtype=torch.int32).share_memory_()
    for tensor in votes:
        tensor.share_memory_()
    for seq_len in (170, 150):
        cast: list[dict[int, int]] = [{} for _ in votes.counts]
        for tensor in votes:
            tensor.zero_()
        for layer in range(3):
            this, found = replace(case, q=case.q.roll(layer, -1), seq_len=seq_len), {}
            out_1HD = torch.full_like(case.q, torch.nan).share_memory_()
            given = inputs(this, out_1HD, votes=votes, winners=winners)
            step, sizes = (launching.launch_decode, ()) if kernel == "decode" else (launching.launch_chunks, (1,))
            workspace = launch(monkeypatch, step, programs, (given, *sizes))
            exact_1HD, selection = reattention_oracle(*this.arguments(), votes=cast, found=found)
            scopes = as_list(selection)
            selected = launching.scopes_of(workspace, seq_len, launching.Layer.of(case.q, case.k_cache, config))
            assert [s.tolist() for s in selected] == [s.tolist() for s in scopes]
            assert error(out_1HD, exact_1HD) <= 2 * error(plain_attention(this, scopes), exact_1HD) + 1e-7
            assert winners[(seq_len - 1) % 4].tolist() == [found[seq_len - 1, h] for h in range(6)]


def test_chunks_leave_winners(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last four tokens of two chunks."""
    launching._workspaces.clear()
    config = ReAttentionConfig(2, 8, 3, 4, 4)
    case = make_case(config, 60, T=7, H=6, G=2, D=16, largest=2, dtype=torch.float16)
    winners, found = torch.full((4, 6, 3), -1, dtype=torch.int32).share_memory_(), {}
    out_THD = torch.full_like(case.q, torch.nan).share_memory_()
    launch(monkeypatch, launching.launch_chunks, 4, (inputs(case, out_THD, winners=winners), 5))
    for chunk in case.chunks(5):
        reattention_oracle(*chunk.arguments(), found=found)
    for token in range(56, 60):
        assert winners[token % 4].tolist() == [found[token, h] for h in range(6)]


@pytest.mark.parametrize(("span_scope", "programs"), [("layer", 5), ("kv_head", 7), ("kv_head", 4)])
def test_chunks_together(monkeypatch: pytest.MonkeyPatch, span_scope: str, programs: int) -> None:
    """Three chunks, the last one shorter: more programs than ballots, or fewer. The first may be dense."""
    launching._workspaces.clear()
    config = ReAttentionConfig(2, 8, 3, 4, 5, span_scope=span_scope)
    case = make_case(config, 150, T=11, H=4, G=2, D=16, largest=2, dtype=torch.float16)
    for seq_len in (60, 14, 11, 150):
        case = replace(case, seq_len=seq_len)
        out_THD = torch.full_like(case.q, torch.nan).share_memory_()
        launch(monkeypatch, launching.launch_chunks, programs, (inputs(case, out_THD), 4))
        check_chunks(case, 4, out_THD)
