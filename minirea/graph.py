"""Steps on a GPU as CUDA graphs, one for reading a prompt and one for decoding, which the CPU follows one step behind.

A graph replays what was captured: the same kernels with the same addresses. Everything that changes from step to step
is therefore kept on the device: token ids, which decoding leaves for its next replay, and the number of cached tokens.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from minirea.cache import KVCache
from minirea.model import Model
from minirea.sampling import Sampler, SamplingConfig

# Steps of a prompt from which on it pays to capture one: the first two are launched, and the last, which is shorter.
WORTH_CAPTURING: Final = 6


def read_captured(model: Model, cache: KVCache, steps_T: Sequence[Tensor]) -> Iterator[int]:
    """Read a prompt's steps, of which all but the last are equally long; yields the length of each.

    The CPU would need longer to launch a step of a small model, or of a short context, than the GPU to compute it. It
    stays one step ahead, not more: whoever watches or interrupts it should find it where the GPU is. A capture takes as
    long as a launch and gives the GPU nothing to do, so it comes third, when the CPU is ahead.
    """
    captured = len(steps_T) >= WORTH_CAPTURING
    step, done = None, [torch.cuda.Event(), torch.cuda.Event()]
    for index, ids_T in enumerate(steps_T):
        if step is None or len(ids_T) != len(step.ids_T):
            step = PromptStep(model, cache, len(ids_T))
            graph = StepGraph(step.run, cache)
        cache.reserve(cache.seq_len + len(ids_T))
        step.set(ids_T)
        if captured and index != 1 and len(ids_T) == len(steps_T[0]):
            graph.launch()
        else:
            run_aside(step.run, cache.device)
        cache.seq_len += len(ids_T)
        done[index % 2].record()
        if index:
            done[1 - index % 2].synchronize()
        yield len(ids_T)


def decode_ahead(
    model: Model, cache: KVCache, last_id: int, sampler: Sampler, limit: int
) -> Generator[int, None, None]:
    """Feed `last_id`, then every sampled token, and yield at most `limit` samples.

    When a token is yielded, the GPU is at work on the next one. If nobody asks for that one, it is taken back.
    """
    step = DecodeGraph(model, cache, last_id, sampler)
    try:
        step.launch()
        yield step.read()  # by itself: what follows is captured, and the first token should not wait for that
        for launched in range(1, limit):
            step.launch()
            if launched > 1:
                yield step.read()
        if limit > 1:
            yield step.read()
    finally:
        step.take_back()


_compiling: weakref.WeakSet[Model] = weakref.WeakSet()


@contextlib.contextmanager
def compiling_decode_step(model: Model) -> Iterator[None]:
    """While a prompt compiles its kernels, compile those of a decode step in a thread, once for a model.

    They are half of what a first start waits for. At the end it waits for the thread, unless it ends with an error.
    """
    if not model.attention.can_capture or model in _compiling:
        yield
        return
    _compiling.add(model)
    thread = threading.Thread(target=_compile_decode_step, args=(model,))
    thread.start()
    yield
    thread.join()


@torch.inference_mode()
def _compile_decode_step(model: Model) -> None:
    """Compile what a step over one layer and one token launches, all at the same time; nothing is launched."""
    from minirea.kernels.driver import compiling  # imports triton

    first_layer = copy.copy(model)
    first_layer.layers = model.layers[:1]
    config = dataclasses.replace(model.config, num_layers=1)
    with contextlib.suppress(Exception), compiling():  # the step itself will have and tell it
        cache = KVCache(config, 16, model.attention.dense_limit, model.device, model.dtype)
        sampler = Sampler(SamplingConfig(), [], config.vocab_size, model.device)
        DecodeStep(first_layer, cache, 0, sampler).run()


class DecodeStep:
    """The kernels of one decode step over one cache, and the memory between them.

    Attributes:
        token: int64 [1], the token to feed; afterwards the sampled one.
        seq_len: int32 [1], cached tokens, on the device; `run` adds this step's.
    """

    def __init__(self, model: Model, cache: KVCache, last_id: int, sampler: Sampler) -> None:
        from minirea.kernels.steps import matvec as decode_step  # imports triton

        self.kernels = decode_step
        self.model, self.cache, self.sampler = model, cache, sampler
        c, device = model.config, model.device
        # Filled there: a copy from the host would wait for the prompt, and the first step's launches with it.
        self.token = torch.full((1,), last_id, device=device)
        self.seq_len = torch.full((1,), cache.seq_len, dtype=torch.int32, device=device)
        self.x_E = torch.empty(c.hidden_size, dtype=model.dtype, device=device)
        self.q_1HD = torch.empty(1, c.num_heads, c.head_dim, dtype=model.dtype, device=device)
        self.act_F = torch.empty(c.mlp_size, dtype=model.dtype, device=device)
        self.logits_V = torch.empty(c.vocab_size, dtype=torch.float32, device=device)
        self.best = decode_step.BestTokenWorkspace.on(device)

    def run(self) -> None:
        """One step, without waiting for the device and without a value from it."""
        model, kernels, x_E, eps = self.model, self.kernels, self.x_E, self.model.config.norm_eps
        kernels.embed(self.token, model.embed, self.seq_len, x_E)
        for i, layer in enumerate(model.layers):
            k_GND, v_GND = self.cache.k[i], self.cache.v[i]
            kernels.norm_qkv(
                x_E, layer.attn_norm, layer.qkv, layer.qkv_bias, eps, self.seq_len, self.q_1HD[0], k_GND, v_GND
            )
            out_1HD = model.attention.over_cache(i, self.q_1HD, self.cache, self.seq_len)
            kernels.add_product(out_1HD.view(-1), layer.o, layer.o_bias, x_E)
            kernels.norm_gate_up(x_E, layer.mlp_norm, layer.gate_up, layer.gate_up_bias, eps, self.act_F)
            kernels.add_product(self.act_F, layer.down, layer.down_bias, x_E)
        kernels.norm_logits(x_E, model.norm, model.head, eps, self.logits_V)
        if self.sampler.takes_best:
            kernels.best_token(self.logits_V, self.best, self.token)
        else:
            self.token.copy_(self.sampler(self.logits_V))


class PromptStep:
    """The kernels of one or several chunks of a prompt over one cache."""

    def __init__(self, model: Model, cache: KVCache, num_tokens: int) -> None:
        self.model, self.cache = model, cache
        self.ids_T = torch.zeros(num_tokens, dtype=torch.int64, device=model.device)
        self.seq_len = torch.zeros(1, dtype=torch.int32, device=model.device)

    def set(self, ids_T: Tensor) -> None:
        """Which tokens the next run reads, behind those that the cache holds."""
        self.ids_T.copy_(ids_T)
        self.seq_len.fill_(self.cache.seq_len + len(ids_T))

    def run(self) -> None:
        """One step, without waiting for the device and without a value from it."""
        self.model.read_at(self.ids_T, self.cache, self.seq_len)


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
            self.capacity, self.graph = self.cache.capacity, None
            run_aside(self.run, self.cache.device)
            return
        if self.graph is None:
            self.graph = self._capture()
        self.graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        if self.generator is not None:
            graph.register_generator_state(self.generator)  # type: ignore[attr-defined]
        aside = capture_stream(self.cache.device)
        with torch.cuda.stream(aside):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.run()
            finally:
                graph.capture_end()
        # To begin with, torch has set the generator's offset on that stream; a replay sets it on this one.
        torch.cuda.current_stream(self.cache.device).wait_stream(aside)
        return graph


class DecodeGraph:
    """A DecodeStep that is launched as a graph, and the tokens on their way to the CPU."""

    def __init__(self, model: Model, cache: KVCache, last_id: int, sampler: Sampler) -> None:
        self.cache = cache
        self.step = DecodeStep(model, cache, last_id, sampler)
        self.graph = StepGraph(self.step.run, cache, generator=None if sampler.takes_best else sampler.generator)
        self.start = cache.seq_len
        self.launched = self.read_back = 0
        # Two tokens can be on their way: the one that is read next, and the one that is being computed.
        self.arrived = [torch.cuda.Event(), torch.cuda.Event()]
        self.token_ids = torch.empty(2, dtype=torch.int64, pin_memory=True)

    def launch(self) -> None:
        """Start a step on the current stream. The cache counts its token from now on."""
        self.cache.reserve(self.cache.seq_len + 1)
        self.graph.launch()
        slot = self.launched % 2
        self.token_ids[slot : slot + 1].copy_(self.step.token, non_blocking=True)
        self.arrived[slot].record()
        self.launched += 1
        self.cache.seq_len = self.start + self.launched

    def read(self) -> int:
        """The next token that was launched and not read; waits for it."""
        slot = self.read_back % 2
        self.arrived[slot].synchronize()
        self.read_back += 1
        return int(self.token_ids[slot])

    def take_back(self) -> None:
        """Wait for the step that nobody has read, and let the cache forget its token."""
        self.cache.rewind(self.start + self.read_back)
        while self.read_back < self.launched:
            self.read()


def run_aside(run: Callable[[], None], device: torch.device) -> None:
    """Run launch by launch on the stream that captures, since kernels' workspaces belong to a stream."""
    current, aside = torch.cuda.current_stream(device), capture_stream(device)
    aside.wait_stream(current)
    with torch.cuda.stream(aside):
        run()
    current.wait_stream(aside)


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures: kernels keep a workspace for every stream that they ever ran on."""
    return torch.cuda.Stream(device)
