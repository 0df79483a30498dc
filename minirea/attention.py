"""The three ways to attend: reattention, streaming and full. Layers reach the attention kernels through here."""

from __future__ import annotations

import functools
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minirea import cpu_attention as cpu
from minirea.cache import ALL_TOKENS, NO_WINNERS, KVCache, array_bytes
from minirea.config import ModelConfig, ReAttentionConfig
from minirea.errors import InputError
from minirea.kernels import (
    Gather,
    Near,
    Votes,
    check_sketched,
    chunks_of_step,
    count_winners,
    new_votes,
    prefill_kernels,
    reattention,
    resolve_impl,
    sketch_keys,
    winners_shape,
)
from minirea.kernels.near import near_size
from minirea.placement import Placement, placements
from minirea.rope import apply_rope, for_whole_heads, inverse_frequencies, rope_table

# Chunks of a prompt in a step on a GPU. Their matrix products are one, which reads the weights once and has enough rows
# for all multiprocessors, and so is their attention's launch. Twice as many would be 1% faster and hold twice as much
# (kernels/NOTEBOOK.md). Fewer hold less, where memory is short (minirea.plan.fit_steps). A model with fewer heads than
# STEP_HEADS has as many rows only with more chunks, and its launches leave fewer multiprocessors idle.
STEP_CHUNKS: Final = 4
MOST_STEP_CHUNKS: Final = 12
STEP_HEADS: Final = 32
STEP_TOKENS: Final = 2048
ROTATED_AT_ONCE: Final = 4096  # cached keys, which bounds the memory that it takes
# Positions in the smallest tables: what most models' scopes hold, so that their caches share one pair.
LEAST_ROWS: Final = 16384
# Bytes of a layer's keys from which on decode steps are faster with sketches of them: 64K tokens of 8 heads of 128 in
# half precision; and where sketches take the room of values, which go to the host for them (kernels/NOTEBOOK.md).
WORTH_SKETCHING: Final = 1 << 27
WORTH_FAR_VALUES: Final = 1 << 29
_NO_ROWS: Final = torch.empty(0, 1, 0, device="cpu", dtype=torch.float32)


class Step(NamedTuple):
    """Where the T tokens of a step stand: what attention needs besides q, k and v. Made by `Attention.step`.

    Attributes:
        seq_len: cached tokens with these T. An int32 [1] where the device counts them, so that a captured launch
            follows it.
        chunk_size: how many of them share a scope. T is one chunk unless the device counts.
        cos: of the true positions of those that lie below dense_limit, [at most T, 1, D].
        sin: like cos.
        sketched: where the device counts: every key that the step can select has a sketch (Attention._is_sketched).
        dense: where the device counts: it is a decode step within dense_size.
        votes: what its layers' votes add up in, where they do; see `Attention.begin`.
        leaves_winners: in the cache, for later tokens.
        starts_early: attention may begin in q/k/v's time; see minirea.kernels.reattention.
    """

    seq_len: int | Tensor
    chunk_size: int
    cos: Tensor = _NO_ROWS
    sin: Tensor = _NO_ROWS
    sketched: bool = False
    dense: bool = False
    votes: Votes | None = None
    leaves_winners: bool = False
    starts_early: bool = False


def step_chunks(num_heads: int, num_kv_heads: int, head_dim: int, chunk_size: int, device: torch.device) -> int:
    """Chunks of a prompt in a step of a model on a CUDA device, where memory is not short."""
    longest = STEP_TOKENS * MOST_STEP_CHUNKS // STEP_CHUNKS
    most = min(MOST_STEP_CHUNKS, STEP_CHUNKS * STEP_HEADS // num_heads, longest // chunk_size)
    if most <= STEP_CHUNKS:
        return STEP_CHUNKS
    return chunks_of_step(num_heads, num_kv_heads, head_dim, chunk_size, device, STEP_CHUNKS, most)


class Attention:
    """Attention of one model: what a layer calls with its q, k and v. It holds nothing that changes from step to step.

    As long as a step attends to everything, each mode is ordinary attention at true positions, so keys that get RoPE
    once when they are written serve every later step. Beyond `dense_limit` tokens positions change from step to step,
    and minirea.kernels.reattention places keys kept without RoPE. `full` never leaves the first case. The fused kernel
    rotates as fast as it reads and needs no second copy of the keys, so with it the first case never comes.

    Args:
        mode: one of config.MODES; "streaming" is reattention that selects nothing.
        config: scope sizes; with "full" only chunk_size matters.
        impl: "auto", "triton" or "torch", as minirea.kernels.reattention takes it.
        gather: of several ranks, each of which has some of the heads.
        sketch: one of config.SKETCHES: decode steps read int8 sketches of the keys instead, if they select any;
            "auto": with the fused kernel, and where that is faster; see KVCache.sketches.
        cache: one of config.CACHES: where keys and values may lie; see `placements`. On a CPU they lie in the host's
            memory in any case.

    Raises:
        InputError: sketches, or a cache in the host's memory, do not work with this config or model.
    """

    def __init__(
        self,
        model: ModelConfig,
        mode: str,
        config: ReAttentionConfig,
        impl: str,
        device: torch.device,
        gather: Gather | None = None,
        sketch: str = "off",
        cache: str = "device",
    ) -> None:
        self.model = model
        self.mode = mode
        self.config = config
        self.impl = resolve_impl(impl, device)
        self.device = device
        self.gather = gather
        shape = model.num_heads, model.num_kv_heads, model.head_dim
        alone = self.can_capture and model.part is None
        self.step_chunks = step_chunks(*shape, config.chunk_size, device) if alone else STEP_CHUNKS
        more = self.step_chunks > STEP_CHUNKS
        self.step_limit = max(STEP_TOKENS, self.step_chunks * config.chunk_size) if more else STEP_TOKENS  # tokens
        self.sketch, self.cache = sketch, cache
        if sketch == "int8" and self._selects:
            self._check_sketched()
        self._check_cache()
        self.sliding_window = model.sliding_window if mode == "full" else None
        self.dense_size = ALL_TOKENS if mode == "full" else config.dense_size
        self.dense_limit = 0 if self.impl == "triton" and mode != "full" else self.dense_size
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    def _check_sketched(self) -> None:
        """Sketches are for steps of one query, which votes alone."""
        c, window, carries = self.model, self.config.vote_window, self.carries_votes
        if window > 1 or carries:
            raise InputError(
                f"sketch is 'int8', expected 'off' for tokens that vote together (vote_window={window}, "
                f"carry_votes={carries}), or vote_window=1 and carry_votes=False"
            )
        if self.impl == "triton":
            check_sketched(c.num_heads, c.num_kv_heads, c.head_dim, self.config, c.ranks)

    def _check_cache(self) -> None:
        if self.cache == "host" and self.device.type != "cpu" and not self._can_be_far:
            found = "attention 'full'" if self.mode == "full" else f"impl '{self.impl}'"
            raise InputError(
                f"cache is 'host', expected 'auto' or 'device' with {found}: only the fused kernel reads the host's "
                "memory"
            )

    @property
    def _can_be_far(self) -> bool:
        """Whether kernels read a cache in the host's memory where it lies."""
        return self.impl == "triton" and self.mode != "full"

    @functools.cached_property
    def sketched(self) -> bool:
        """Whether caches may have sketches."""
        if self.sketch != "auto" or not self._selects or self.impl != "triton":
            return self.sketch == "int8" and self._selects
        try:
            self._check_sketched()
        except InputError:
            return False
        return True

    def placements(self, capacity: int) -> list[Placement]:
        """What a cache of `capacity` tokens may be, best first.

        Sketches that are not asked for are there where they make decode steps faster, if they fit, and where keys are
        far, which a step could not score without them.
        """
        c = self.model
        sketches = far_sketches = [self.sketched]
        if self.sketched and self.sketch == "auto":
            size = array_bytes(c, capacity, torch.bfloat16)
            worth, worth_far = size >= WORTH_SKETCHING, size >= WORTH_FAR_VALUES
            sketches, far_sketches = [worth, not worth], [worth_far, not worth_far]
        longest = max(map(self.step_tokens, (self.config.chunk_size, self.config.tail_chunk_size)))
        near = near_size(self.config.local_size, self.config.dense_size, longest)
        return placements(c.num_layers, self.cache, sketches, far_sketches, near if self._can_be_far else 0)

    @property
    def winners_shape(self) -> tuple[int, int, int]:
        """Of what a cache keeps of each layer for `vote_window`: twice as many tokens' winners, so that a step may be
        taken back.
        """
        if not self._selects or self.config.vote_window == 1:
            return NO_WINNERS
        return winners_shape(self._voting_heads, self.config, 2 * self.config.vote_window)

    @property
    def _voting_heads(self) -> int:
        """Query heads whose winners are known here: with one vote for all heads, those of all ranks."""
        together = self.config.span_scope == "layer" and self.model.part is not None
        return self.model.part.whole.num_heads if together and self.model.part else self.model.num_heads

    @property
    def carries_votes(self) -> bool:
        """Whether the votes of a decode step's layers add up."""
        return self._selects and self.config.carry_votes

    @property
    def _selects(self) -> bool:
        return self.mode == "reattention" and self.config.max_selected > 0

    def new_votes(self, capacity: int, device: torch.device | None = None) -> Votes:
        """For a decode step over a cache of `capacity` tokens, before its first layer: all zero."""
        c = self.model
        sizes = self._voting_heads, c.num_kv_heads, self.config.of_decode_step, c.num_layers, capacity
        return new_votes(*sizes, device or self.device)

    def begin(self, step: Step, cache: KVCache, leaves_winners: bool = True) -> Step:
        """A step before its first layer: with the votes of the tokens before it, if its layers add to any, and whether
        it leaves winners, if the cache keeps any.
        """
        if step.dense:
            return step
        step = step._replace(leaves_winners=leaves_winners and cache.recent_size > 0)
        if not self.carries_votes or step.chunk_size > 1:
            return step
        votes = self.new_votes(cache.capacity)
        if cache.recent_size and self.searches(step):
            count_winners(votes, cache.winners, step.seq_len, self.config.of_decode_step, self.impl)
        return step._replace(votes=votes)

    def searches(self, step: Step) -> bool:
        """Whether a step may have winners; False where it is known to attend to all."""
        return not step.dense and (isinstance(step.seq_len, Tensor) or step.seq_len > self.dense_size)

    def table_rows(self, capacity: int) -> int:
        """Positions in the tables that serve a cache of `capacity` tokens.

        The scopes of a step's chunks lie in one row of positions, each a chunk behind the one before.
        """
        if self.mode == "full":
            return 0
        return min(self.config.max_scope + self.step_limit, max(LEAST_ROWS, 1 << (capacity - 1).bit_length()))

    def scope_tables(self, capacity: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the positions in a scope, float32 [table_rows(capacity), D/2]; none in mode "full".

        They are made with the first step: after the memory plan is checked. They are kept, since captured graphs
        hold their addresses; a larger cache has larger ones, twice as large at least. A dynamic RoPE stretches only
        beyond the trained range, which a bounded scope never leaves.
        """
        rows = self.table_rows(capacity)
        if rows not in self._tables:
            tables = self.true_tables(0, rows, self.config.max_scope)
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()  # other streams will read them
            self._tables.setdefault(rows, tables)  # another thread's, if it was first: one address for all
        return self._tables[rows]

    @property
    def can_capture(self) -> bool:
        """Whether a step can be a CUDA graph.

        The fused kernel reads the number of cached tokens on the device. "full" attention and impl "torch" give their
        tensors shapes that grow with it, so their steps are launched one operation at a time.
        """
        return self.device.type == "cuda" and self.impl == "triton" and self.mode != "full"

    def on_cpu(self, dtype: torch.dtype) -> bool:
        """Whether minirea.cpu_attention attends, which does faster what the reference does."""
        plain = self.impl == "torch" and self.config.span_scope == "layer"
        return plain and self.device.type == "cpu" and cpu.computes_in(dtype)

    @property
    def depends_on_context(self) -> bool:
        """Whether a dynamic RoPE turns all keys by how long the whole prompt is."""
        return self.mode == "full" and self.model.rope.type == "dynamic"

    def step_tokens(self, chunk_size: int) -> int:
        """How many tokens of a prompt a step reads: a chunk, or where steps can be captured, several of them.

        Every chunk has a scope of its own in either case, so that a step is only how the work is divided. The chunks
        of a tail, which are small, make one step. A token that votes with those before it is one by itself.
        """
        if not self.can_capture or (chunk_size == 1 and self.carries_votes):
            return chunk_size
        chunks = self.step_chunks
        if chunk_size == self.config.tail_chunk_size:
            chunks = max(chunks, -(-(self.config.tail_size - 1) // chunk_size))
        return chunk_size * max(1, min(chunks, self.step_limit // chunk_size))

    def step(self, seq_len: int | Tensor, num_tokens: int, chunk_size: int | None = None, horizon: int = 0) -> Step:
        """A step of `num_tokens` queries that ends at `seq_len`.

        Args:
            seq_len: cached tokens with this step's; a tensor only where `can_capture`.
            chunk_size: tokens that share a scope, at most; all of the step without. 1 makes it a decode step, where
                a single token can also be the rest of a chunk.
            horizon: tokens in context once the whole prompt is read. A dynamic RoPE depends on it, in whatever steps
                the prompt is read.
        """
        chunk_size = chunk_size or num_tokens
        if isinstance(seq_len, Tensor):
            return Step(seq_len, chunk_size)
        start, stop = seq_len - num_tokens, min(seq_len, self.dense_limit)
        if start >= stop:
            return Step(seq_len, chunk_size)
        if self.mode == "full":
            cos, sin = self.true_tables(start, stop, max(seq_len, horizon))
        else:
            cos, sin = (table[start:stop] for table in self.scope_tables(stop))
        return Step(seq_len, chunk_size, *for_whole_heads(cos[:, None], sin[:, None]))

    def __call__(self, layer: int, qkv_TXD: Tensor, cache: KVCache, step: Step) -> Tensor:
        """Write keys and values to the cache and attend.

        Args:
            qkv_TXD: query, key and value heads side by side, X = H + 2G, without RoPE.

        Returns:
            [T, H, D].
        """
        H, T, stop = self.model.num_heads, len(qkv_TXD), step.seq_len
        q_rotated = self.write(layer, qkv_TXD, cache, step)
        if isinstance(stop, Tensor) or stop > self.dense_limit:
            return self.over_cache(layer, qkv_TXD[:, :H], cache, step)
        assert q_rotated is not None
        start = self.first_visible(stop, T)
        keys = (1, start, stop - start)
        k_GND, v_GND = cache.k_rotated[layer].narrow(*keys), cache.v[layer].narrow(*keys)
        return full_attention(q_rotated, k_GND, v_GND, self.sliding_window)

    def write(self, layer: int, qkv_TXD: Tensor, cache: KVCache, step: Step) -> Tensor | None:
        """Write keys and values to the cache. Arguments are those of a call.

        Returns:
            The queries below dense_limit with RoPE, None if there are none.
        """
        if isinstance(step.seq_len, Tensor):
            tensors = qkv_TXD, cache.k[layer], cache.v[layer]
            prefill_kernels(self.impl).write_kv(*tensors, step.seq_len, cache.near[layer])
            return None
        H, G = self.model.num_heads, self.model.num_kv_heads
        dense_rows = len(step.cos)
        if not dense_rows:
            cache.write(layer, qkv_TXD, None)
            return None
        rope = cpu.place_rope if qkv_TXD.is_cpu else apply_rope
        qk_rotated = rope(qkv_TXD[:dense_rows, : H + G], step.cos, step.sin)
        q_rotated, k_rotated = qk_rotated.split_with_sizes((H, G), 1)
        cache.write(layer, qkv_TXD, k_rotated)
        return q_rotated

    def rotate_again(self, cache: KVCache) -> None:
        """Fill `cache.k_rotated` from `cache.k`, bit for bit as `write` did."""
        if not cache.k:  # rotated keys are all there is
            return
        tables, stop = self.scope_tables(cache.capacity), min(cache.seq_len, self.dense_limit)
        for k_GND, k_rotated_GND in zip(cache.k, cache.k_rotated, strict=False):  # no layer has any without dense_limit
            for start in range(0, stop, ROTATED_AT_ONCE):
                part = slice(start, min(stop, start + ROTATED_AT_ONCE))
                cos, sin = (table[part, None] for table in tables)
                k_TGD = apply_rope(k_GND[:, part].transpose(0, 1), *for_whole_heads(cos, sin))
                k_rotated_GND[:, part] = k_TGD.transpose(0, 1)

    def sketch_keys(self, cache: KVCache) -> None:
        """Before a decode step: sketches of all cached keys, if the step reads one that has none.

        That is once for every local_size steps, since a step does not search its local part; chunks of a prompt do not
        read sketches.
        """
        searches = cache.seq_len >= self.dense_size  # with the step's own token it is more than dense_size
        if cache.sketched and searches and cache.sketched_len + self.config.local_size <= cache.seq_len:
            self.write_sketches(cache, cache.seq_len)

    def write_sketches(self, cache: KVCache, stop: int) -> None:
        """Sketches of the first `stop` keys, where they have none. They are made from a key and a mean key, which stays
        as long as any sketch does.
        """
        for k_GND, sketch in zip(cache.k, cache.sketches, strict=True):
            if sketch is not None:
                new_mean = cache.sketched_len == 0
                sketch_keys(k_GND, sketch, cache.sketched_len, stop, new_mean, self.impl)
        cache.sketched_len = stop

    def over_cache(self, layer: int, q_THD: Tensor, cache: KVCache, step: Step) -> Tensor:
        """ReAttention of a step whose keys and values the cache already holds. Not for mode "full"."""
        config = self.config_of(step)
        chunk_size = min(step.chunk_size, len(q_THD))
        k_GND, v_GND, (cos, sin) = cache.k[layer], cache.v[layer], self.scope_tables(cache.capacity)
        looks = chunk_size == step.chunk_size == 1 and not step.dense and self._is_sketched(cache, step)
        sketch = cache.sketches[layer] if looks else None
        winners = cache.winners[layer] if step.leaves_winners else None
        on_cpu = sketch is None and self.on_cpu(q_THD.dtype)
        if on_cpu and isinstance(step.seq_len, int) and step.seq_len > self.dense_size:
            arguments = (q_THD, k_GND, v_GND, step.seq_len, cos, sin, config)
            return cpu.reattention(*arguments, self.gather, step.votes, winners)
        near = cache.near[layer]
        if step.chunk_size > 1:
            cache.bring_ahead(layer)
        if sketch is None and not step.dense and near is not None and near.k is not None:
            k_GND, near = cache.keys_to_score(layer, cache.seq_len + len(q_THD)), Near(None, near.v)
        options = (self.impl, False, chunk_size, self.gather, sketch, step.votes, near, winners, step.starts_early)
        out_THD: Tensor = reattention(q_THD, k_GND, v_GND, step.seq_len, cos, sin, config, *options)
        return out_THD

    def config_of(self, step: Step) -> ReAttentionConfig:
        if step.dense:
            return self.config.of_dense_step
        return self.config.of_decode_step if step.chunk_size == 1 else self.config

    def _is_sketched(self, cache: KVCache, step: Step) -> bool:
        """Whether every key that the step can select has its sketch."""
        if isinstance(step.seq_len, Tensor):
            return step.sketched
        return cache.sketched_len >= step.seq_len - self.config.local_size

    def scope(self, cache: KVCache, q_1HD: Tensor) -> dict[str, int]:
        """What the last step could see: tokens in the global, selected and local part, of how many.

        It is called once, after the last step, whose selection in the first layer is made again: no step waits for it.

        Args:
            q_1HD: the first layer's query of that step, without RoPE.
        """
        seq_len = cache.seq_len
        if self.mode == "full":
            return {"global": 0, "selected": 0, "local": seq_len - self.first_visible(seq_len, 1), "seq_len": seq_len}
        local = min(seq_len, self.config.local_size)
        first = min(seq_len - local, self.config.global_size)
        selected = self._scope_len(cache, q_1HD) - first - local
        return {"global": first, "selected": selected, "local": local, "seq_len": seq_len}

    def _scope_len(self, cache: KVCache, q_1HD: Tensor) -> int:
        """The length of the scope."""
        if cache.seq_len <= self.dense_size:
            return cache.seq_len
        seq_len = torch.tensor([cache.seq_len], dtype=torch.int32, device=self.device)  # a number would compile anew
        tables = self.scope_tables(cache.capacity)
        arguments = (q_1HD, cache.k[0], cache.v[0], seq_len, *tables, self.config.of_decode_step, self.impl)
        votes = self.begin(Step(seq_len, 1), cache).votes
        _, selection = reattention(
            *arguments, return_selection=True, gather=self.gather, votes=votes, near=cache.near[0]
        )
        lengths = torch.tensor(
            [len(of) for of in (selection if isinstance(selection, list) else [selection])], dtype=torch.int64
        )
        if self.gather is not None and self.config.span_scope == "kv_head":
            lengths = self.gather(lengths.to(self.device))
        return int(lengths.max())

    def first_visible(self, seq_len: int, num_tokens: int) -> int:
        """The first key that any of the last `num_tokens` queries can see."""
        return max(0, seq_len - num_tokens + 1 - (self.sliding_window or seq_len))

    def true_tables(self, start: int, stop: int, context: int) -> tuple[Tensor, Tensor]:
        """cos and sin of positions start..stop-1 in a context of so many tokens, float32 [stop - start, D/2]."""
        frequencies, factor = inverse_frequencies(
            self.model.rope, self.model.head_dim, self.model.max_position_embeddings, context
        )
        return rope_table(frequencies.to(self.device), factor, start, stop)


def full_attention(q_THD: Tensor, k_GND: Tensor, v_GND: Tensor, sliding_window: int | None = None) -> Tensor:
    """Ordinary causal attention of the last T of N tokens over all N, everything with RoPE already.

    A query sees itself and the sliding_window - 1 tokens before it, or all before it. Returns [T, H, D].
    """
    (T, H, D), (G, N, _) = q_THD.shape, k_GND.shape
    if T > 1 and q_THD.is_cuda and (sliding_window is None or sliding_window >= N):
        from torch.nn.attention.bias import causal_lower_right  # takes 1.7 s, which a CPU need not wait for

        q_HTD, bias = q_THD.transpose(0, 1), causal_lower_right(T, N)
        out = F.scaled_dot_product_attention(q_HTD[None], k_GND[None], v_GND[None], attn_mask=bias, enable_gqa=True)
        return out[0].transpose(0, 1)
    # The query heads of a group become extra rows of one head, so that keys and values are never repeated.
    if T == 1 and q_THD.is_cpu and cpu.computes_in(q_THD.dtype):
        return cpu.attend(q_THD, k_GND, v_GND)
    if T > 1 and q_THD.is_cpu and (sliding_window is None or sliding_window >= N):
        return cpu.attend_causal(q_THD, k_GND, v_GND)
    q_GRD = q_THD.unflatten(1, (G, H // G)).permute(1, 2, 0, 3).reshape(G, H // G * T, D)
    mask = None if T == 1 else _causal_mask(T, N, sliding_window, q_THD.device).repeat(H // G, 1)
    out_GRD = F.scaled_dot_product_attention(q_GRD[None], k_GND[None], v_GND[None], attn_mask=mask)[0]
    return out_GRD.view(G, H // G, T, D).permute(2, 0, 1, 3).reshape(T, H, D)


def _causal_mask(num_queries: int, num_keys: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """bool [T, N], true where a query may look: query t is token N - T + t."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key = torch.arange(num_keys, device=device)
    mask = key <= query
    return mask if sliding_window is None else mask & (key > query - sliding_window)
