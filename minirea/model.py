"""The transformer: LLaMA, Mistral and Qwen2, one sequence at a time.

Shapes: T tokens of this step, E model width, F MLP width, H query heads, G key/value heads, D head dim, V vocabulary.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minirea.attention import Attention, Step
from minirea.cache import KVCache
from minirea.config import ModelConfig
from minirea.cpu import Winners, prepare
from minirea.kernels import Gather, prefill_kernels
from minirea.linear import Matrix, add_linear, linear, norm_linear

if TYPE_CHECKING:
    from minirea.ranks import Peers, Ranks


class Layer(NamedTuple):
    """Weights of one block. q, k and v share one matrix, and so do gate and up: one read, one launch.

    What a Matrix is, minirea.linear says.
    """

    attn_norm: Tensor  # [E]
    qkv: Matrix  # [(H + 2G) D, E]
    qkv_bias: Tensor | None
    o: Matrix  # [E, H D]
    o_bias: Tensor | None
    mlp_norm: Tensor  # [E]
    gate_up: Matrix  # [2F, E]
    gate_up_bias: Tensor | None
    down: Matrix  # [E, F]
    down_bias: Tensor | None


# Of a part of a step, at least: so many keep all multiprocessors busy in the products between two sums over ranks.
ROWS_OF_PARTS: Final = 512


class Residual:
    """The residual stream of a step, x [T, E], to which products are added.

    Of several ranks, the sum of theirs. A large step has two parts, taken and added to in turns: the sum of one
    crosses between ranks while the other is computed, and is waited for when its part is taken.
    """

    def __init__(self, x_TE: Tensor, ranks: Ranks | None = None) -> None:
        self._x_TE, self._ranks = x_TE, ranks
        self._parts = x_TE.chunk(2 if ranks is not None and len(x_TE) >= 2 * ROWS_OF_PARTS else 1)
        self._arriving: dict[int, Callable[[], Tensor]] = {}
        self.count = len(self._parts)

    def rows(self, part: int) -> slice:
        """Which of the T rows a part has."""
        each = len(self._parts[0])
        return slice(part * each, part * each + len(self._parts[part]))

    def part(self, part: int) -> Tensor:
        """Its rows, with everything that was added to them, [P, E]."""
        if part in self._arriving:
            self._parts[part].add_(self._arriving.pop(part)())
        return self._parts[part]

    def whole(self) -> Tensor:
        """[T, E]."""
        for part in range(self.count):
            self.part(part)
        return self._x_TE

    def add_linear(
        self, part: int, y_PK: Tensor, matrix_EK: Matrix, bias_E: Tensor | None, kernels: ModuleType
    ) -> None:
        """x += the product, of whose matrix each rank has some columns."""
        if self._ranks is None:
            add_linear(self._parts[part], y_PK, matrix_EK, bias_E, kernels)
            return
        product_PE = linear(y_PK, matrix_EK, bias_E, kernels)
        if self.count == 1:  # nothing is computed meanwhile
            self._x_TE += self._ranks.all_reduce(product_PE)
        else:
            self._arriving[part] = self._ranks.start_sum(product_PE)


class Model:
    """A model's weights and its forward pass.

    Args:
        weights: what minirea.weights.load_weights returns; on a CPU it is emptied. Arithmetic is in the norms' dtype.
        progress: show a bar on stderr while a CPU rearranges them.
        ranks: that share the model, of which `config` and `weights` are this one's part.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Any],
        attention: Attention,
        progress: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config
        self.attention = attention
        self.ranks = ranks
        self.peers: Peers | None = None
        self.id = 0  # under which other ranks know it
        self.kernels = prefill_kernels(attention.impl)
        if weights["norm.weight"].is_cpu:
            weights = prepare(weights, weights["norm.weight"].dtype, progress)
        self.embed: Tensor = weights["embed.weight"]  # [V, E]
        self.norm: Tensor = weights["norm.weight"]  # [E]
        self.head: Matrix = weights["head.weight"]  # [V, E]
        self.layers = [_layer(weights, index) for index in range(config.num_layers)]

    def open_peers(self) -> None:
        """Let decode steps use memory that all ranks reach, where there is such. Every rank calls it."""
        if self.ranks is not None and self.attention.impl == "triton":
            self.peers = self.ranks.open_peers(self.config)
            self.attention.gather = self.gather

    @property
    def gather(self) -> Gather | None:
        """How its layers' votes reach the heads of other ranks."""
        if self.ranks is None:
            return None
        rows = self.ranks.all_gather
        if self.peers is not None:
            rows = functools.partial(self.peers.gather_winners, otherwise=rows)
        return Gather(rows, self.ranks.size)

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic and the cache; matrices may be stored in another."""
        return self.norm.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.device

    @property
    def quantize(self) -> str | None:
        """What its matrices are rounded to, of config.QUANTIZE."""
        bits = getattr(self.layers[-1].qkv, "bits", None)  # the first ones may have more
        return None if bits is None else f"int{bits}"

    @property
    def nbytes(self) -> int:
        tensors = [self.embed, self.norm, self.head, *itertools.chain.from_iterable(self.layers)]
        return sum(t.nbytes for t in {id(t): t for t in tensors if t is not None}.values())  # a tied head counts once

    def forward(
        self,
        ids_T: Tensor,
        cache: KVCache,
        horizon: int = 0,
        chunk_size: int | None = None,
        winners_on_cpu: list[Winners] | None = None,
    ) -> Tensor:
        """Read T tokens, append them to the cache, and return their hidden states [T, E], before the final norm.

        `horizon` and `chunk_size` are those of Attention.step, for one chunk; `winners_on_cpu` are what
        Attention.new_winners_on_cpu made before the first of several decode steps.
        """
        step = self._begin(ids_T, cache, horizon, chunk_size)._replace(winners_on_cpu=winners_on_cpu)
        x = Residual(self._embed(ids_T), self.ranks)
        for index in range(len(self.layers)):
            self._block(index, x, cache, step)
        cache.seq_len += len(ids_T)
        return x.whole()

    def read(self, ids_T: Tensor, cache: KVCache, horizon: int = 0, chunk_size: int | None = None) -> None:
        """Like `forward` for tokens whose output is not needed: the last layer only writes their keys and values."""
        self.read_at(ids_T, cache, self._begin(ids_T, cache, horizon, chunk_size))
        cache.seq_len += len(ids_T)

    def read_at(self, ids_T: Tensor, cache: KVCache, step: Step) -> None:
        """`read` of a step that the cache has room for. The host's count of cached tokens stays as it is.

        Where the device counts, no launch depends on a number that the host has: a graph can repeat it.
        """
        x, last = Residual(self._embed(ids_T), self.ranks), len(self.layers) - 1
        for index in range(last):
            self._block(index, x, cache, step)
        self.attention.write(last, self._qkv_of(self.layers[last], x), cache, step)

    def logits(self, x_TE: Tensor) -> Tensor:
        """Scores of the next token, float32 [T, V]."""
        logits_TV = self._norm_linear(x_TE, self.norm, self.head).float()
        if self.ranks is None or self.config.part is None:
            return logits_TV
        return self.ranks.gather_logits(logits_TV, self.config.part)

    def first_query(self, token_id: int) -> Tensor:
        """The first layer's query of a token, without RoPE, [1, H, D]; it does not depend on other tokens."""
        x_1E = self._embed(torch.tensor([token_id], device=self.device))
        return self._qkv(self.layers[0], x_1E)[:, : self.config.num_heads]

    def _begin(self, ids_T: Tensor, cache: KVCache, horizon: int, chunk_size: int | None) -> Step:
        """Make room for a step of one chunk."""
        seq_len = cache.seq_len + len(ids_T)
        cache.reserve(seq_len)
        step = self.attention.step(seq_len, len(ids_T), chunk_size, horizon)
        return self.attention.with_votes(step, cache.capacity)

    def _embed(self, ids_T: Tensor) -> Tensor:
        return F.embedding(ids_T, self.embed).to(self.dtype)

    def _block(self, index: int, x: Residual, cache: KVCache, step: Step) -> None:
        """One layer, added to the residual stream."""
        layer = self.layers[index]
        out_TK = self.attention(index, self._qkv_of(layer, x), cache, step).flatten(1)
        for part in range(x.count):
            x.add_linear(part, out_TK[x.rows(part)], layer.o, layer.o_bias, self.kernels)
        for part in range(x.count):
            gate_up_PM = self._norm_linear(x.part(part), layer.mlp_norm, layer.gate_up, layer.gate_up_bias)  # M = 2F
            x.add_linear(part, self.kernels.swiglu(gate_up_PM), layer.down, layer.down_bias, self.kernels)

    def _qkv_of(self, layer: Layer, x: Residual) -> Tensor:
        parts = [self._qkv(layer, x.part(part)) for part in range(x.count)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _qkv(self, layer: Layer, x_TE: Tensor) -> Tensor:
        """Query, key and value heads side by side, [T, H + 2G, D]."""
        qkv = self._norm_linear(x_TE, layer.attn_norm, layer.qkv, layer.qkv_bias)
        return qkv.view(len(x_TE), -1, self.config.head_dim)

    def _norm_linear(self, x_TE: Tensor, norm_E: Tensor, matrix_NE: Matrix, bias_N: Tensor | None = None) -> Tensor:
        return norm_linear(x_TE, norm_E, self.config.norm_eps, matrix_NE, bias_N, self.kernels)


def _layer(weights: dict[str, Any], index: int) -> Layer:
    def get(name: str) -> Any:
        return weights.get(
            f"layers.{index}.{name.removesuffix('_bias')}.{'bias' if name.endswith('_bias') else 'weight'}"
        )

    return Layer(**{name: get(name) for name in Layer._fields})
