"""The transformer: LLaMA, Mistral and Qwen2, one sequence at a time.

Shapes: T tokens of this step, E model width, F MLP width, H query heads, G key/value heads, D head dim, V vocabulary.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minirea.attention import Attention, Step
from minirea.cache import KVCache
from minirea.config import ModelConfig
from minirea.cpu import TiledGateUp, multiplies_tiles, prepare
from minirea.kernels import Gather, prefill_kernels
from minirea.linear import Matrix, add_linear, linear, norm_linear, norm_swiglu

if TYPE_CHECKING:
    from minirea.ranks import Peers, Ranks


KEY_ROWS: Final = 64  # see Model._make_keys_alike


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
    gate_up: Matrix | TiledGateUp  # [2F, E]
    gate_up_bias: Tensor | None
    down: Matrix  # [E, F]
    down_bias: Tensor | None


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
    def sum_dtype(self) -> torch.dtype:
        """Of the residual stream."""
        return torch.float32 if self.embed.is_cpu and multiplies_tiles(self.dtype) else self.dtype

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
    ) -> Tensor:
        """Read T tokens, append them to the cache, and return their hidden states [T, E], before the final norm.

        `horizon` and `chunk_size` are those of Attention.step, for one chunk.
        """
        step = self._begin(ids_T, cache, horizon, chunk_size)
        x_TE = self._embed(ids_T)
        for index in range(len(self.layers)):
            self._block(index, x_TE, cache, step)
        cache.seq_len += len(ids_T)
        return x_TE

    def read(
        self,
        ids_T: Tensor,
        cache: KVCache,
        horizon: int = 0,
        chunk_size: int | None = None,
        leaves_winners: bool = True,
    ) -> None:
        """Like `forward` for tokens whose output is not needed: the last layer only writes their keys and values, and
        leaves winners.
        """
        self.read_at(ids_T, cache, self._begin(ids_T, cache, horizon, chunk_size, leaves_winners))
        cache.seq_len += len(ids_T)

    def read_at(self, ids_T: Tensor, cache: KVCache, step: Step) -> None:
        """`read` of a step that the cache has room for. The host's count of cached tokens stays as it is.

        Where the device counts, no launch depends on a number that the host has: a graph can repeat it.
        """
        x_TE, last = self._embed(ids_T), len(self.layers) - 1
        for index in range(last):
            self._block(index, x_TE, cache, step)
        searches = step.leaves_winners and self.attention.searches(step)
        (self.attention if searches else self.attention.write)(last, self._qkv(self.layers[last], x_TE), cache, step)

    def logits(self, x_TE: Tensor) -> Tensor:
        """Scores of the next token, float32 [T, V]."""
        logits_TV = self._norm_linear(x_TE, self.norm, self.head).float()
        if self.ranks is None or self.config.part is None:
            return logits_TV
        return self.ranks.gather_logits(logits_TV, self.config.part)

    def first_query(self, token_id: int) -> Tensor:
        """The first layer's query of a token, without RoPE, [1, H, D]; it does not depend on other tokens."""
        x_1E = self._embed(torch.tensor([token_id], dtype=torch.int64, device=self.device))
        return self._qkv(self.layers[0], x_1E)[:, : self.config.num_heads]

    def _begin(
        self, ids_T: Tensor, cache: KVCache, horizon: int, chunk_size: int | None, leaves_winners: bool = True
    ) -> Step:
        """A step of one chunk, for which the cache has room from then on."""
        seq_len = cache.seq_len + len(ids_T)
        cache.reserve(seq_len)
        step = self.attention.step(seq_len, len(ids_T), chunk_size, horizon)
        return self.attention.begin(step, cache, leaves_winners)

    def _embed(self, ids_T: Tensor) -> Tensor:
        return F.embedding(ids_T, self.embed).to(self.sum_dtype)

    def _block(self, index: int, x_TE: Tensor, cache: KVCache, step: Step) -> None:
        """One layer, added to the residual stream in place."""
        layer = self.layers[index]
        out_THD = self.attention(index, self._qkv(layer, x_TE), cache, step)
        self._add_linear(x_TE, out_THD.flatten(1), layer.o, layer.o_bias)
        gate_up = layer.mlp_norm, self.config.norm_eps, layer.gate_up, layer.gate_up_bias
        self._add_linear(x_TE, norm_swiglu(x_TE, *gate_up, self.kernels), layer.down, layer.down_bias)

    def _add_linear(self, x_TE: Tensor, y_TK: Tensor, matrix_EK: Matrix, bias_E: Tensor | None) -> None:
        """x_TE += the product; of several ranks, the sum of theirs, each of which has some columns of the matrix."""
        if self.ranks is None:
            add_linear(x_TE, y_TK, matrix_EK, bias_E, self.kernels)
        else:
            x_TE += self.ranks.all_reduce(linear(y_TK, matrix_EK, bias_E, self.kernels))

    def _qkv(self, layer: Layer, x_TE: Tensor) -> Tensor:
        """Query, key and value heads side by side, [T, H + 2G, D]."""
        qkv = self._norm_linear(x_TE, layer.attn_norm, layer.qkv, layer.qkv_bias)
        qkv_TXD = qkv.view(len(x_TE), -1, self.config.head_dim)
        if layer is self.layers[0] and x_TE.is_cuda and x_TE.dtype == torch.float32:
            self._make_keys_alike(layer, x_TE, qkv_TXD)
        return qkv_TXD

    def _make_keys_alike(self, layer: Layer, x_TE: Tensor, qkv_TXD: Tensor) -> None:
        """Make the first layer's keys anew, by products of KEY_ROWS rows each, so that equal tokens of a prompt have
        equal keys, as in exact arithmetic. Those of quantized matrices stay.

        Of equal scores the first key wins. How a GPU rounds a product depends on how many rows it has, and a prompt's
        steps have some or others: a later key would score higher by that, or not, as the number of ranks will have it.
        """
        if not isinstance(layer.qkv, Tensor):
            return
        c, T = self.config, len(x_TE)
        H, G, D = c.num_heads, c.num_kv_heads, c.head_dim
        rows = slice(H * D, (H + G) * D)
        bias = None if layer.qkv_bias is None else layer.qkv_bias[rows]
        y_TE = F.pad(self.kernels.rms_norm(x_TE, layer.attn_norm, c.norm_eps), (0, 0, 0, -T % KEY_ROWS))
        keys = torch.cat([F.linear(part, layer.qkv[rows], bias) for part in y_TE.split(KEY_ROWS)])
        qkv_TXD[:, H : H + G] = keys[:T].view(T, G, D)

    def _norm_linear(self, x_TE: Tensor, norm_E: Tensor, matrix_NE: Matrix, bias_N: Tensor | None = None) -> Tensor:
        return norm_linear(x_TE, norm_E, self.config.norm_eps, matrix_NE, bias_N, self.kernels)


def _layer(weights: dict[str, Any], index: int) -> Layer:
    def get(name: str) -> Any:
        return weights.get(
            f"layers.{index}.{name.removesuffix('_bias')}.{'bias' if name.endswith('_bias') else 'weight'}"
        )

    return Layer(**{name: get(name) for name in Layer._fields})
