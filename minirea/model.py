"""The transformer: LLaMA and Mistral, one sequence at a time.

Shapes: T tokens of this step, E model width, F MLP width, H query heads, G key/value heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minirea.attention import Attention
from minirea.cache import KVCache
from minirea.config import ModelConfig


class Layer(NamedTuple):
    """Weights of one block. q, k and v share one matrix, and so do gate and up: one read, one launch."""

    attn_norm: Tensor  # [E]
    qkv: Tensor  # [(H + 2G) D, E]
    qkv_bias: Tensor | None
    o: Tensor  # [E, H D]
    o_bias: Tensor | None
    mlp_norm: Tensor  # [E]
    gate_up: Tensor  # [2F, E]
    gate_up_bias: Tensor | None
    down: Tensor  # [E, F]
    down_bias: Tensor | None


class Model:
    """A model's weights and its forward pass.

    Args:
        weights: what minirea.weights.load_weights returns.
    """

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], attention: Attention) -> None:
        self.config = config
        self.attention = attention
        if weights["embed.weight"].device.type == "cpu":
            weights = _columns_first(weights)
        self.embed = weights["embed.weight"]  # [V, E]
        self.norm = weights["norm.weight"]  # [E]
        self.head = weights["head.weight"]  # [V, E]
        self.layers = [_layer(weights, index) for index in range(config.num_layers)]

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.device

    @property
    def nbytes(self) -> int:
        tensors = {t.data_ptr(): t for layer in self.layers for t in layer if t is not None}
        tensors |= {t.data_ptr(): t for t in (self.embed, self.norm, self.head)}  # a tied head counts once
        return sum(t.nbytes for t in tensors.values())

    def forward(self, ids_T: Tensor, cache: KVCache) -> Tensor:
        """Read T tokens, append them to the cache, and return their hidden states [T, E], before the final norm."""
        seq_len = cache.seq_len + len(ids_T)
        cache.reserve(seq_len)
        self.attention.begin(seq_len, len(ids_T))
        x_TE = F.embedding(ids_T, self.embed)
        for index, layer in enumerate(self.layers):
            x_TE = x_TE + self._attend(index, layer, x_TE, cache)
            x_TE = x_TE + self._mlp(layer, x_TE)
        cache.seq_len = seq_len
        return x_TE

    def logits(self, x_TE: Tensor) -> Tensor:
        """Scores of the next token, float32 [T, V]."""
        return F.linear(self._norm(x_TE, self.norm), self.head).float()

    def _attend(self, index: int, layer: Layer, x_TE: Tensor, cache: KVCache) -> Tensor:
        qkv = F.linear(self._norm(x_TE, layer.attn_norm), layer.qkv, layer.qkv_bias)
        out_THD = self.attention(index, qkv.unflatten(-1, (-1, self.config.head_dim)), cache)
        return F.linear(out_THD.flatten(1), layer.o, layer.o_bias)

    def _mlp(self, layer: Layer, x_TE: Tensor) -> Tensor:
        gate_TF, up_TF = F.linear(self._norm(x_TE, layer.mlp_norm), layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
        return F.linear(F.silu(gate_TF) * up_TF, layer.down, layer.down_bias)

    def _norm(self, x_TE: Tensor, weight_E: Tensor) -> Tensor:
        return F.rms_norm(x_TE, weight_E.shape, weight_E, self.config.norm_eps)


def _layer(weights: dict[str, Tensor], index: int) -> Layer:
    def get(name: str) -> Tensor | None:
        return weights.get(
            f"layers.{index}.{name.removesuffix('_bias')}.{'bias' if name.endswith('_bias') else 'weight'}"
        )

    return Layer(**{name: get(name) for name in Layer._fields})  # type: ignore[arg-type]


def _columns_first(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same matrices, each stored column by column, as a CPU's matrix-vector product reads them fastest.

    All matrices of the demo model once: 1.2 ms so, 2.2 ms row by row. One by one, and emptying `weights`, so that no
    second copy of the model comes to be.
    """
    stored: dict[int, Tensor] = {}
    for name in list(weights):
        matrix = weights.pop(name)
        if id(matrix) not in stored:  # a tied head stays one tensor with the embedding
            stored[id(matrix)] = matrix.t().contiguous().t() if matrix.dim() == 2 else matrix
        weights[name] = stored[id(matrix)]
    return weights
