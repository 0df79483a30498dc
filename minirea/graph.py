"""Steps as CUDA graphs, one for reading a prompt and one for decoding, which the CPU follows one step behind.

A graph replays what was captured: the same kernels with the same addresses.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Final

import torch

from minirea.cache import KVCache
from minirea.model import Model
from minirea.ranks import SharedSampler
from minirea.sampling import Sampler
from minirea.steps import DecodeStep, Part, PromptStep, compile_decode_step, leaving
from minirea.threads import enqueueing

# Equal steps of a prompt from which on it pays to capture one: the first two are launched.
WORTH_CAPTURING: Final = 5
MOST_CAPTURES: Final = 20  # of one step, where other threads end them


def read_captured(
    model: Model, cache: KVCache, ids: Sequence[int], parts: Sequence[Part], horizon: int = 0
) -> Iterator[int]:
    """Read a prompt's parts, each in steps of several chunks; yields the length of each step.

    The CPU would need longer to launch a step of a small model, or of a short context, than the GPU to compute it. It
    stays one step ahead, not more: what is shown or interrupted should be what the GPU is at. A capture takes as long
    as a launch and gives the GPU nothing to do, so it comes third, when the CPU is ahead.
    """
    del horizon  # a dynamic RoPE is not captured
    cache.mark()
    dense = cache.seq_len + len(ids) <= model.attention.dense_size
    ids_T = torch.tensor(ids, dtype=torch.long, device=model.device)
    steps = [step for part in parts for step in part.split(model.attention.step_tokens(part.chunk_size))]
    sizes = [(part.stop - part.start, part.chunk_size) for part in steps]
    leaves_winners = leaving(cache, steps, len(ids))  # which is not captured
    # Keys that are brought are counted on the host.
    captured = bool(sizes) and sizes.count(sizes[0]) >= WORTH_CAPTURING and not cache.placement.far_keys
    done, step = [torch.cuda.Event(), torch.cuda.Event()], None
    with contextlib.ExitStack() as graphs:
        for index, (part, size) in enumerate(zip(steps, sizes, strict=True)):
            if step is None or size != sizes[index - 1]:
                step = PromptStep(model, cache, *size, dense)
                graph = graphs.enter_context(contextlib.closing(StepGraph(step.run, cache)))
            cache.reserve(cache.seq_len + size[0])
            step.set(ids_T[part.start : part.stop])
            step.leaves_winners = leaves_winners[index]
            if captured and index != 1 and size == sizes[0] and not step.leaves_winners:
                graph.launch()
            else:
                run_aside(step.run, cache.device)
            cache.seq_len += size[0]
            done[index % 2].record()
            if index:
                done[1 - index % 2].synchronize()
            yield size[0]


def decode_ahead(
    model: Model, cache: KVCache, last_id: int, sampler: Sampler | SharedSampler, limit: int
) -> Generator[int, None, None]:
    """Feed `last_id`, then every sampled token, and yield at most `limit` samples.

    When a token is yielded, the GPU is at work on the next one. If the caller stops before that one, it is taken back.
    """
    with contextlib.closing(DecodeGraph(model, cache, last_id, sampler)) as step:
        step.launch()
        yield step.read()  # by itself: what follows is captured, and the first token should not wait for that
        for launched in range(1, limit):
            step.launch()
            if launched > 1:
                yield step.read()
        if limit > 1:
            yield step.read()


_compiling: weakref.WeakSet[Model] = weakref.WeakSet()


@contextlib.contextmanager
def compiling_decode_step(model: Model, cache: KVCache) -> Iterator[None]:
    """While a prompt compiles its kernels, compile those of a decode step in a thread, once for a model.

    They are half of what a first start waits for. At the end it waits for the thread, unless it ends with an error.
    """
    with enqueueing:
        # Of several ranks' steps some parts would run, on this rank alone.
        known = not model.attention.can_capture or model.ranks is not None or model in _compiling
        if not known:
            _compiling.add(model)
    if known:
        yield
        return
    thread = threading.Thread(target=compile_decode_step, args=(model, cache.placement))
    thread.start()
    yield
    thread.join()


class StepGraph:
    """Launches of a step over a cache, as a graph.

    The first step runs launch by launch, which compiles the kernels and allocates their workspaces, as a capture may
    not. The second is captured while the GPU computes the first. When the cache grows, it has new addresses, and the
    next step is a first one.

    Args:
        run: launches the step's kernels, without waiting for the device and without a value from it.
        generator: what the kernels draw random numbers from, if they do.
    """

    def __init__(self, run: Callable[[], None], cache: KVCache, generator: torch.Generator | None = None) -> None:
        self.run, self.cache, self.generator = run, cache, generator
        self.graph: torch.cuda.CUDAGraph | None = None
        self.capacity = 0  # of the cache when the step last ran; 0 before the first

    def launch(self) -> None:
        """Start a step on the current stream. The cache has room for it."""
        if self.capacity != self.cache.capacity:
            self.close()
            self.capacity = self.cache.capacity
            run_aside(self.run, self.cache.device)
            return
        with in_order(self.cache.device):
            if self.graph is None:
                self.graph = self._capture()
            self.graph.replay()

    def close(self) -> None:
        """Free the graph: torch keeps a list of those that there are, which threads may not change at the same time."""
        with enqueueing:
            self.graph = None

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Another thread that waits for the whole device gets an error, and ends the capture, which is made again."""
        for _ in range(MOST_CAPTURES - 1):
            with contextlib.suppress(CaptureEndedError):
                return self._capture_once()
        return self._capture_once()

    def _capture_once(self) -> torch.cuda.CUDAGraph:
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        if self.generator is not None:
            graph.register_generator_state(self.generator)  # type: ignore[attr-defined]
        current, aside = torch.cuda.current_stream(self.cache.device), capture_stream(self.cache.device)
        # A generator's offset is written there before anything is captured, to memory of the current stream, on which
        # what was freed may still be read.
        aside.wait_stream(current)
        with torch.cuda.stream(aside), nothing_collected():
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                self.run()
            finally:
                end_capture(graph, pool)
        current.wait_stream(aside)  # a replay sets the offset on this one
        return graph


class CaptureEndedError(RuntimeError):
    """What is captured is lost by what another thread did."""


@contextlib.contextmanager
def nothing_collected() -> Iterator[None]:
    """What Python's garbage collector closes, such as an abandoned stream, must not become part of a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def end_capture(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """Raises CaptureEndedError where the capture has been ended already. Then torch leaves its pool open."""
    try:
        graph.capture_end()
    except torch.AcceleratorError as error:
        device = torch.cuda.current_device()
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
        raise CaptureEndedError(str(error).splitlines()[0]) from None


class DecodeGraph:
    """A DecodeStep that is launched as a graph, and the tokens on their way to the CPU."""

    def __init__(self, model: Model, cache: KVCache, last_id: int, sampler: Sampler | SharedSampler) -> None:
        self.cache = cache
        self.step = DecodeStep(model, cache, last_id, sampler)
        self.generator = None if sampler.takes_best else sampler.generator
        # By whether they are within dense_size, where other kernels run. The first one stays: it may not have ended.
        self.graphs: dict[bool, StepGraph] = {}
        self.start = cache.seq_len
        self.launched = self.read_back = 0
        # Two tokens can be on their way: the one that is read next, and the one that is being computed.
        self.arrived = [torch.cuda.Event(), torch.cuda.Event()]

    def launch(self) -> None:
        """Start a step on the current stream. The cache counts its token from now on."""
        self.cache.reserve(self.cache.seq_len + 1)
        attention = self.step.model.attention
        attention.sketch_keys(self.cache)
        self.step.dense = dense = self.cache.seq_len < attention.dense_size
        if dense not in self.graphs:
            self.graphs[dense] = StepGraph(self.step.run, self.cache, self.generator)
        self.launched += 1
        try:
            self.graphs[dense].launch()
        finally:  # also where an interrupt ends this: `close` waits, since the step writes to memory that is freed then
            self.arrived[self._slot(self.launched)].record()
        self.cache.seq_len = self.start + self.launched

    def read(self) -> int:
        """The next token that was launched and not read; waits for it."""
        slot = self._slot(self.read_back + 1)
        self.arrived[slot].synchronize()
        self.read_back += 1  # not before: an interrupt comes while it waits
        return int(self.step.new.on_host[slot])

    def _slot(self, step: int) -> int:
        """Where step 1, 2, ... leaves its token on the host: the kernels go by seq_len, which that step has raised."""
        return (self.start + step) % 2

    def close(self) -> None:
        """Wait for the step whose token was not read, remove that token from the cache, and free the graphs."""
        self.cache.rewind(self.start + self.read_back)
        while self.read_back < self.launched:
            self.read()
        for graph in self.graphs.values():
            graph.close()


def run_aside(run: Callable[[], None], device: torch.device) -> None:
    """Run launch by launch on the stream that captures, since kernels' workspaces belong to a stream."""
    with in_order(device):
        current, aside = torch.cuda.current_stream(device), capture_stream(device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            run()
        current.wait_stream(aside)


@contextlib.contextmanager
def in_order(device: torch.device) -> Iterator[None]:
    """Put a step on the current stream behind all that were put on any: they share the kernels' workspaces.

    Threads take turns, for as long as it takes to launch a step.
    """
    with enqueueing:
        current, last = torch.cuda.current_stream(device), _last_streams.get(device)
        if last is not None and last != current:
            current.wait_stream(last)
        _last_streams[device] = current
        yield


_last_streams: dict[torch.device, torch.cuda.Stream] = {}


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures: kernels keep a workspace for every stream that they ever ran on."""
    return torch.cuda.Stream(device)
