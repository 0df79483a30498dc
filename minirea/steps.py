"""Steps: how a prompt is cut into them, and those of a GPU, which a graph can repeat.

Everything that changes from step to step is kept on the device: token ids, which decoding leaves for its next step, and
the number of cached tokens. A step owns what its kernels change, so that threads can share a model.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minirea.attention import Attention
from minirea.cache import KVCache
from minirea.kernels import decode_kernels, peer_kernels
from minirea.linear import Matrix
from minirea.model import Model
from minirea.placement import Placement
from minirea.ranks import SharedSampler
from minirea.sampling import Sampler, SamplingConfig


class Part(NamedTuple):
    """Tokens [start, stop) of a piece, which share scopes by chunks of `chunk_size`."""

    start: int
    stop: int
    chunk_size: int

    def split(self, size: int) -> list[Part]:
        """Parts of `size` tokens, the last of which may be shorter; none of an empty part."""
        return [
            Part(start, min(start + size, self.stop), self.chunk_size) for start in range(self.start, self.stop, size)
        ]


def cut(attention: Attention, cached: int, num_tokens: int, to_follow: int = 0) -> list[Part]:
    """How a piece, the tokens that one call appends to a context, is read.

    Its body is read in chunks of chunk_size. Its tail, the last tail_size tokens, is read in chunks of tail_chunk_size,
    so that a question at the end does not share its vote with hundreds of tokens before it; and the very last token,
    from which the answer comes, is a decode step. A piece that ends within dense_size has no tail: chunks of any size
    see the same there.

    Args:
        cached: tokens in the cache before the piece.
        num_tokens: of the piece that are to be read now.
        to_follow: of the piece that another call reads. The last of them is that decode step in any case.

    Returns:
        Parts, none of them empty, that cover the `num_tokens`.
    """
    total, config = num_tokens + to_follow, attention.config
    dense = cached + total <= attention.dense_size
    tail = 0 if dense else min(config.tail_size, total)
    last = total - (1 if tail or to_follow else 0)
    body = min(total - tail, last)
    parts = Part(0, body, config.chunk_size), Part(body, last, config.tail_chunk_size), Part(last, total, 1)
    return [p._replace(stop=min(p.stop, num_tokens)) for p in parts if p.start < min(p.stop, num_tokens)]


def chunks(attention: Attention, cached: int, num_tokens: int, to_follow: int = 0) -> list[Part]:
    """The parts of `cut`, each of them one chunk."""
    return [chunk for part in cut(attention, cached, num_tokens, to_follow) for chunk in part.split(part.chunk_size)]


def leaving(cache: KVCache, parts: Sequence[Part], stop: int) -> list[bool]:
    """Which parts of a piece leave winners in the cache: those that hold tokens which may vote with one that is read by
    itself, in this piece or behind its last token, stop - 1.
    """
    first = min((part.start for part in parts if part.chunk_size == 1), default=stop)
    return [cache.recent_size > 0 and part.stop > first - cache.recent_size for part in parts]


def num_shared(attention: Attention, shared: int, lengths: Sequence[int]) -> int:
    """How many of the first `shared` tokens of prompts can be read once for all of them: whole chunks before any tail.

    The rest of each prompt is then cut into the chunks of one that is read alone.

    Args:
        lengths: of the prompts, in tokens.
    """
    if attention.depends_on_context:
        return 0
    config = attention.config
    before_tails = min(lengths) - max(1, config.tail_size)
    return max(0, min(shared, before_tails)) // config.chunk_size * config.chunk_size


class PromptStep:
    """The kernels of one or several chunks of a prompt over one cache.

    Args:
        dense: the prompt ends within dense_size.
    """

    def __init__(self, model: Model, cache: KVCache, num_tokens: int, chunk_size: int, dense: bool = False) -> None:
        self.model, self.cache, self.leaves_winners = model, cache, True
        self.ids_T = torch.zeros(num_tokens, dtype=torch.int64, device=model.device)
        self.seq_len = torch.zeros(1, dtype=torch.int32, device=model.device)
        self.step = model.attention.step(self.seq_len, num_tokens, chunk_size)._replace(dense=dense and chunk_size == 1)

    def set(self, ids_T: Tensor) -> None:
        """Which tokens the next run reads, behind those that the cache holds."""
        self.ids_T.copy_(ids_T)
        self.seq_len.fill_(self.cache.seq_len + len(ids_T))

    def run(self) -> None:
        """One step, without waiting for the device and without a value from it."""
        step = self.model.attention.begin(self.step, self.cache, self.leaves_winners)
        self.model.read_at(self.ids_T, self.cache, step)


class DecodeStep:
    """The kernels of one decode step over one cache, and the memory between them.

    Attributes:
        new: the token to feed, afterwards the sampled one, and how many are cached, to which `run` adds it.
        dense: the next run is within dense_size, which the device does not tell.
    """

    def __init__(self, model: Model, cache: KVCache, last_id: int, sampler: Sampler | SharedSampler) -> None:
        self.kernels = decode_kernels()
        self.model, self.cache, self.sampler = model, cache, sampler
        c, device = model.config, model.device
        self.new = self.kernels.NewToken.on(device, last_id, cache.seq_len)
        self.x_E = torch.empty(c.hidden_size, dtype=model.dtype, device=device)
        self.step, self.dense = model.attention.step(self.new.seq_len, 1), False
        self.q_1HD = torch.empty(1, c.num_heads, c.head_dim, dtype=model.dtype, device=device)
        self.act_F = torch.empty(c.mlp_size, dtype=model.dtype, device=device)
        # Of several ranks: this one's rows of the head, as many as every rank gives to all.
        self.logits_V = torch.zeros(c.part.logits_each if c.part else c.vocab_size, dtype=torch.float32, device=device)
        self.sums = RankSums(model) if model.ranks else None
        self.best = self.kernels.BestTokenWorkspace.on(device)

    def run(self) -> None:
        """One step, without waiting for the device and without a value from it."""
        model, kernels, x_E, eps = self.model, self.kernels, self.x_E, self.model.config.norm_eps
        if self.sums is not None:
            self.sums.turn = 0  # also where a capture was ended in the middle of a step
        kernels.embed(self.new.token, model.embed, self.new.seq_len, x_E)
        step = self.step._replace(sketched=self.cache.sketched, dense=self.dense)
        step = model.attention.begin(step, self.cache)
        for i, layer in enumerate(model.layers):
            k_GND, v_GND = self.cache.k[i], self.cache.v[i]
            kernels.norm_qkv(
                *(x_E, layer.attn_norm, layer.qkv, layer.qkv_bias, eps, self.new.seq_len, self.q_1HD[0], k_GND, v_GND),
                self.cache.near[i],
            )
            # The first layer's attention starts behind all before it, which later ones rely on (kernels.fused.plain).
            out_1HD = model.attention.over_cache(i, self.q_1HD, self.cache, step._replace(starts_early=i > 0))
            self._add_product(out_1HD.view(-1), layer.o, layer.o_bias)
            kernels.norm_gate_up(x_E, layer.mlp_norm, layer.gate_up, layer.gate_up_bias, eps, self.act_F)
            self._add_product(self.act_F, layer.down, layer.down_bias)
        kernels.norm_logits(x_E, model.norm, model.head, eps, self.logits_V[: len(model.config.head_rows)])
        logits_V = self.logits_V if self.sums is None else self.sums.all_logits(self.logits_V)
        if self.sampler.takes_best:
            kernels.best_token(logits_V, self.best, self.new)
        else:
            kernels.keep_token(self.sampler(logits_V), self.new)

    def _add_product(self, x_K: Tensor, matrix_EK: Matrix, bias_E: Tensor | None) -> None:
        """x += the product; of several ranks, the sum of theirs."""
        if self.sums is None:
            self.kernels.add_product(x_K, matrix_EK, bias_E, self.x_E)
        else:
            self.kernels.add_product(x_K, matrix_EK, bias_E, self.sums.partial_E)
            self.sums.add_to(self.x_E)


class RankSums:
    """What the ranks of a decode step add up and put together, in memory that they reach, or by torch.distributed.

    Where there are rooms, they are used in turn: a step makes an even number of sums.
    """

    def __init__(self, model: Model) -> None:
        assert model.ranks is not None
        self.ranks, self.peers, self.vocab_size = model.ranks, model.peers, model.config.vocab_size
        self.turn, E = 0, model.config.hidden_size
        own = self.peers.sums.own if self.peers else torch.zeros(2 * E, dtype=torch.int32, device=model.device)
        self._partials_2E = own.view(torch.float32).view(2, E)

    @property
    def partial_E(self) -> Tensor:  # noqa: N802
        """float32, zero; takes this rank's part of the next sum."""
        return self._partials_2E[self.turn]

    def add_to(self, x_E: Tensor) -> None:
        """x += the partial sums of all ranks, to the bit the same on all of them."""
        if self.peers is None:
            x_E += self.ranks.all_reduce(self.partial_E)
            self.partial_E.zero_()
            return
        peer_kernels().add_sums(x_E, self.peers.sums, self.turn)
        self.turn = 1 - self.turn

    def all_logits(self, logits_V: Tensor) -> Tensor:
        """Those of the whole vocabulary, from as many of each rank."""
        if self.peers is None:
            return self.ranks.all_gather(logits_V)[: self.vocab_size]
        return peer_kernels().gather(logits_V, self.peers.logits)[: self.vocab_size]


@torch.inference_mode()
def compile_decode_step(model: Model, placement: Placement) -> None:
    """Compile what a step over one token launches, all at the same time; nothing is launched. It has three layers: the
    first one, which has no sketches and whose attention does not start early, one after it, and one whose matrices may
    have fewer bits than those of the first two (minirea.quantize). Of layers whose values are far, or keys, and others
    besides them, it takes the former.
    """
    from minirea.kernels.driver import compiling  # imports triton

    first_layers = copy.copy(model)
    first_layers.layers = model.layers[:3]
    layers = len(first_layers.layers)
    alike = placement._replace(far_values=min(layers, placement.far_values), far_keys=min(1, placement.far_keys))
    config = dataclasses.replace(model.config, num_layers=layers)
    with contextlib.suppress(Exception), compiling():  # the step itself will raise it
        sizes = config, 16, model.attention.dense_limit
        shape = model.attention.winners_shape
        cache = KVCache(*sizes, model.device, model.dtype, winners_shape=shape, placements=lambda _: [alike])
        model.attention.write_sketches(cache, 1)
        sampler = Sampler(SamplingConfig(), [], config.vocab_size, model.device)
        step = DecodeStep(first_layers, cache, 0, sampler)
        for dense in (False, True):
            step.dense = dense
            step.run()
        step.kernels.keep_token(step.new.token, step.new)  # of a sampler that does not take the best
