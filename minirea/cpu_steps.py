"""A decode step of a CPU as a list of kernels, whose arguments hardly change from step to step."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minirea.attention import Attention, Step
from minirea.cache import KVCache
from minirea.kernels.cpu.attend import attend_scratch, bind_attend, bind_write
from minirea.kernels.cpu.choose import bind_choose, new_counts, new_elected, new_runs
from minirea.kernels.cpu.compile import Call, Calls
from minirea.kernels.cpu.products import bind_few, few_scratch, multiplies
from minirea.kernels.cpu.rows import Matrix
from minirea.kernels.cpu.search import bind_search, winner_lists
from minirea.kernels.cpu.threads import workers
from minirea.kernels.cpu.winners import MOST_WINNERS
from minirea.model import Layer, Model


class _Attending(NamedTuple):
    """One layer's calls between the products with `qkv` and `o`."""

    write: Call
    attend: Call
    search: Call | None = None
    choose: Call | None = None

    @property
    def in_order(self) -> list[Call]:
        return [call for call in (self.write, self.search, self.choose, self.attend) if call is not None]


class CpuDecodeStep:
    """The kernels of one decode step over one cache, and the memory between them: what `Model.forward` and
    `Model.logits` compute for one token, to the bit.
    """

    def __init__(self, model: Model, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        c = model.config
        self.config = model.attention.config.of_decode_step
        self.x_1E = _floats(1, c.hidden_size)
        self.qkv_XD = _floats(c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        self.q_HD, self.out_HD = self.qkv_XD[: c.num_heads], _floats(c.num_heads, c.head_dim)
        self.act_1F, self.logits_1V = _floats(1, c.mlp_size), _floats(1, c.vocab_size)
        self._bind()

    @staticmethod
    def serves(model: Model, cache: KVCache) -> bool:
        """Whether all that a step of this model over this cache takes is here."""
        attention = model.attention
        if type(attention) is not Attention or model.ranks or cache.sketched or model.dtype != torch.float32:
            return False
        if attention.config.of_decode_step.span_top_k > MOST_WINNERS:
            return False
        x_11 = torch.empty(1, 1, dtype=torch.float32, device=model.device)
        return attention.on_cpu(model.dtype) and all(multiplies(matrix, x_11) for matrix in _matrices(model))

    def _bind(self) -> None:
        """To the tensors of the cache, which it has until it grows, and to so many threads, each of which has its own
        scratch.
        """
        model, cache, attention = self.model, self.cache, self.model.attention
        self.capacity, self.threads = cache.capacity, workers()
        self.scratch = max((few_scratch(_plain(matrix)) for matrix in _matrices(model)), key=len)
        self.best_HK, self.found_HK = winner_lists(model.config.num_heads, max(1, self.config.span_top_k))
        most = self.capacity if attention.mode == "full" else max(attention.dense_size, self.config.max_scope)
        self.scores = attend_scratch(self.q_HD, min(self.capacity, most))
        self.counts_N, self.runs_X2 = new_counts(self.capacity), new_runs(self.config, self.capacity)
        self.elected_P = new_elected(self.config, self.capacity)
        layers = range(len(model.layers))
        self.dense = [self._bind_dense(index) for index in layers] if attention.dense_limit else []
        self.sparse = [self._bind_sparse(index) for index in layers] if cache.k else []
        self.dense_calls, self.sparse_calls = (self._bind_step(attending) for attending in (self.dense, self.sparse))

    def _bind_step(self, attending: list[_Attending]) -> Calls:
        """All of a step."""
        model, x_1E, eps = self.model, self.x_1E, self.model.config.norm_eps
        bind = functools.partial(bind_few, scratch=self.scratch)
        calls = []
        for layer, of_layer in zip(model.layers, attending, strict=False):  # none, where there are no such steps
            qkv_1X, out_1X = self.qkv_XD.view(1, -1), self.out_HD.view(1, -1)
            calls.append(bind(x_1E, _plain(layer.qkv), layer.qkv_bias, qkv_1X, norm=(layer.attn_norm, eps)))
            calls += of_layer.in_order
            calls.append(bind(out_1X, _plain(layer.o), layer.o_bias, x_1E, end="add"))
            gate_up = _plain(layer.gate_up), layer.gate_up_bias, self.act_1F
            calls.append(bind(x_1E, *gate_up, norm=(layer.mlp_norm, eps), end="swiglu"))
            calls.append(bind(self.act_1F, _plain(layer.down), layer.down_bias, x_1E, end="add"))
        return Calls([*calls, bind(x_1E, _plain(model.head), None, self.logits_1V, norm=(model.norm, eps))])

    def _bind_dense(self, index: int) -> _Attending:
        """A layer of a step that attends to all tokens."""
        cache = self.cache
        k_GND, v_GND, rotated_GND = cache.k[index] if cache.k else None, cache.v[index], cache.k_rotated[index]
        attend = bind_attend(self.q_HD, rotated_GND, v_GND, self.runs_X2, self.scores, self.out_HD)
        return _Attending(bind_write(self.qkv_XD, k_GND, v_GND, rotated_GND), attend)

    def _bind_sparse(self, index: int) -> _Attending:
        """A layer of a step that searches for what it attends to."""
        cache, attention, config = self.cache, self.model.attention, self.config
        k_GND, v_GND, tables = cache.k[index], cache.v[index], attention.scope_tables(self.capacity)
        write = bind_write(self.qkv_XD, k_GND, v_GND, None)
        attend = bind_attend(self.q_HD, k_GND, v_GND, self.runs_X2, self.scores, self.out_HD, tables)
        if not config.max_selected:
            return _Attending(write, attend)
        search = bind_search(self.q_HD, k_GND, self.best_HK, self.found_HK)
        kept = cache.winners_shape[2] if cache.recent_size else 0
        room = self.found_HK, self.runs_X2, self.elected_P
        return _Attending(write, attend, search, bind_choose(config, *room, kept, attention.carries_votes))

    def run(self, ids_1: Tensor) -> Tensor:
        """Read one token, append it to the cache, and return the logits, float32 [1, V]: until the next run."""
        model, cache, attention, config = self.model, self.cache, self.model.attention, self.config
        seq_len = cache.seq_len + 1
        cache.reserve(seq_len)
        if (cache.capacity, workers()) != (self.capacity, self.threads):
            self._bind()
        is_dense = seq_len <= attention.dense_limit
        num_searched = seq_len - config.global_size - config.local_size
        if config.max_selected and not is_dense and num_searched < config.span_top_k:  # fewer winners
            return model.logits(model.forward(ids_1, cache))
        step = attention.begin(attention.step(seq_len, 1), cache)
        (self._set_dense if is_dense else self._set_sparse)(seq_len, step)
        self.x_1E.copy_(model.embed[ids_1])
        (self.dense_calls if is_dense else self.sparse_calls)()
        cache.seq_len = seq_len
        return self.logits_1V

    def _set_dense(self, seq_len: int, step: Step) -> None:
        start = self.model.attention.first_visible(seq_len, 1)
        self.runs_X2[:2] = (1, seq_len - start), (start, seq_len)
        self._held = step
        # [1, 1, D] of whole heads, the first half of which has sin with the other sign.
        cos, sin = step.cos.data_ptr(), step.sin.data_ptr() + step.sin.nbytes // 2
        for layer in self.dense:
            layer.write.set(position=seq_len - 1, cos=cos, sin=sin)

    def _set_sparse(self, seq_len: int, step: Step) -> None:
        config, winners_LRHK = self.config, self.cache.winners
        start, stop = config.global_size, seq_len - config.local_size
        if not config.max_selected:
            self.runs_X2[:3] = (2, seq_len - stop + start), (0, start), (stop, seq_len)
        self._held = step  # kernels know addresses alone
        counts_N = self.counts_N if step.votes is None else step.votes.counts
        for index, layer in enumerate(self.sparse):
            layer.write.set(position=seq_len - 1)
            if layer.search is not None and layer.choose is not None:
                layer.search.set(start=start, stop=stop)
                layer.choose.set(start=start, stop=stop, seq_len=seq_len, counts=counts_N.data_ptr())
                if step.leaves_winners:
                    row_HK = winners_LRHK[index, (seq_len - 1) % winners_LRHK.shape[1]]
                    layer.choose.set(winners=row_HK.data_ptr())


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


def _matrices(model: Model) -> list[Any]:
    return [model.head, *(matrix for layer in model.layers for matrix in _matrices_of(layer))]


def _matrices_of(layer: Layer) -> tuple[Any, ...]:
    return layer.qkv, layer.o, layer.gate_up, layer.down


def _plain(matrix: Any) -> Matrix:
    """One of which CpuDecodeStep.serves has said that kernels multiply it."""
    plain: Matrix = matrix
    return plain
