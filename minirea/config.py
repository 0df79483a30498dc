"""Types and choices: what a model is (ModelConfig), how it is read (ReAttentionConfig), what an option may be."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from minirea.checks import choice, integer, known_options, switch
from minirea.errors import InputError

MODES: Final = ("reattention", "streaming", "full")
IMPLS: Final = ("auto", "triton", "torch")
DEVICES: Final = ("auto", "cpu", "cuda")
ROPE_TYPES: Final = ("default", "linear", "dynamic", "llama3", "yarn")
SPAN_SCOPES: Final = ("layer", "kv_head")
CACHES: Final = ("auto", "device", "host")
SKETCHES: Final = ("auto", "off", "int8")
DTYPES: Final = ("float32", "float16", "bfloat16")
QUANTIZE: Final = ("int8", "int4")
# Defaults of ReAttentionConfig that hold for every trained context.
CHUNK_SIZE: Final = 512
TAIL_SIZE: Final = 64
TAIL_CHUNK_SIZE: Final = 16


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding as a checkpoint declares it; rope.py turns it into tables.

    `factor` stretches positions (linear), the base (dynamic) or single frequencies (llama3, yarn).
    `original_context` is the length before stretching, in tokens.
    """

    type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


class Packing(NamedTuple):
    """How the matrices of a checkpoint's layers come in 4 bits.

    Attributes:
        method: one of minirea.weights.packed.FORMS.
        group_size: columns that share a scale; 0: all of a row.
        symmetric: zero points that are not stored are 8; else each matrix has its own.
        act_order: columns may be mixed, so that each matrix stores the groups of its own.
    """

    method: str
    group_size: int
    symmetric: bool = False
    act_order: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of one checkpoint, whatever its family; checkpoint_config.py reads them.

    Letters of the project's key: L num_layers, E hidden_size, F mlp_size, H num_heads, G num_kv_heads, D head_dim,
    V vocab_size.

    `part` says of which model this is a rank's part: then H, G and F are those of the part.
    """

    num_layers: int
    hidden_size: int
    mlp_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    quantized: bool = False
    packing: Packing | None = None
    dtype: str | None = None
    eos_token_ids: frozenset[int] = frozenset()
    part: Part | None = None

    def of_rank(self, rank: int, ranks: int) -> ModelConfig:
        """The part of the model that one of several ranks holds: its key/value heads with their query heads, and its
        features of the MLP. A single rank holds all.

        Raises:
            InputError: the key/value heads cannot be dealt out evenly.
        """
        if ranks == 1:
            return self
        if ranks < 1 or self.num_kv_heads % ranks:
            raise InputError(f"gpus is {ranks}, expected a divisor of the model's {self.num_kv_heads} key/value heads")
        part = Part(self, rank, ranks)
        if not Part(self, 0, ranks).features or not Part(self, ranks - 1, ranks).tokens:
            raise InputError(f"gpus is {ranks}, expected fewer: MLP or vocabulary are too small to be dealt out")
        heads, kv_heads = self.num_heads // ranks, self.num_kv_heads // ranks
        mlp_size = len(part.features)
        return dataclasses.replace(self, num_heads=heads, num_kv_heads=kv_heads, mlp_size=mlp_size, part=part)

    @property
    def head_rows(self) -> range:
        """Which rows of the head, tokens of the vocabulary, are here."""
        return self.part.tokens if self.part else range(self.vocab_size)

    @property
    def ranks(self) -> int:
        """How many share the model that this is, or is a part of."""
        return self.part.ranks if self.part else 1

    @property
    def trained_context(self) -> int:
        """The longest distance, in tokens, between a query and a key that training has shown the model."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)


@dataclass(frozen=True)
class Part:
    """Which part of the model `whole` rank `rank` of `ranks` holds."""

    whole: ModelConfig
    rank: int
    ranks: int

    @property
    def features(self) -> range:
        """Of the MLP."""
        size, rank, ranks = self.whole.mlp_size, self.rank, self.ranks
        return range(size * rank // ranks, size * (rank + 1) // ranks)

    @property
    def tokens(self) -> range:
        """Of the vocabulary, for the head: as many on every rank, but for the last ones."""
        size, each = self.whole.vocab_size, self.logits_each
        return range(min(size, each * self.rank), min(size, each * (self.rank + 1)))

    @property
    def logits_each(self) -> int:
        """Logits that each rank contributes, with those that pad the last ones."""
        return -(-self.whole.vocab_size // self.ranks)


@dataclass(frozen=True)
class ReAttentionConfig:
    """The knobs of ReAttention (arXiv 2407.15176, section 3), all in tokens unless said otherwise.

    Args:
        global_size: first tokens of the context, always in scope.
        local_size: last tokens, those of the current step included, always in scope.
        span_top_k: winners per head and query; 0 selects nothing, which is streaming attention.
        span_size: keys that one kept winner covers, half of them before it; even.
        max_spans: winners kept after the vote.
        chunk_size: queries of a prompt that share one scope, at most local_size; None means 512, or
            local_size where that is less.
        span_scope: "layer" (one vote over all heads) or "kv_head" (one vote and one selection per key/value head).
        tail_size: so many tokens at the end of a prompt are read in chunks of tail_chunk_size, and the very last one
            by itself; 0 reads them like the others, as the paper does.
        tail_chunk_size: queries of a prompt's tail that share one scope, at most local_size; None means 16, or
            chunk_size where that is less.
        vote_window: for a token of an answer, and the last one of a prompt, the votes of the tokens before it count as
            well, as each found its winners in all layers, so many in all; 1 lets it vote alone, as the paper does. More
            than 1 needs carry_votes.
        vote_size: so many neighbouring keys are one to the vote: a winner counts as the key in the middle of its block;
            1 counts every key by itself, as the paper does.
        decode_spans: winners kept after the vote of such a token; None means max_spans, which is the most it can be.
        carry_votes: in such a token each layer adds its votes to those of the layers before it, and keeps the winners
            by the sums; False lets every layer vote alone, as the paper does.
        dense_size: up to so many cached tokens a step attends to all of them, at least global_size + local_size, which
            is what None means. `for_context` sets it to what the scope can hold (`max_scope`).

    Raises:
        InputError: a value out of range; the message names the field.
    """

    global_size: int = 32
    local_size: int = 8192
    span_top_k: int = 4
    span_size: int = 32
    max_spans: int = 256
    chunk_size: int = None  # type: ignore[assignment]  # __post_init__ makes it an int
    span_scope: str = "layer"
    tail_size: int = TAIL_SIZE
    tail_chunk_size: int = None  # type: ignore[assignment]
    vote_window: int = 1
    vote_size: int = 1
    decode_spans: int = None  # type: ignore[assignment]
    carry_votes: bool = False
    dense_size: int = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        for name, lowest in _LOWEST.items():
            value = getattr(self, name)
            if name in _DERIVED and value is None:
                value = _DERIVED[name](self)
            object.__setattr__(self, name, integer(name, value, lowest, LARGEST_SIZE))
        if self.span_size % 2:
            raise InputError(f"span_size is {self.span_size}, expected an even number: a span has two equal halves")
        for name in ("chunk_size", "tail_chunk_size"):
            if getattr(self, name) > self.local_size:
                raise InputError(
                    f"{name} is {getattr(self, name)}, expected at most local_size ({self.local_size}): "
                    "queries that share a scope have to be in its local part"
                )
        if self.decode_spans > self.max_spans:
            raise InputError(f"decode_spans is {self.decode_spans}, expected at most max_spans ({self.max_spans})")
        if self.dense_size < self.global_size + self.local_size:
            raise InputError(
                f"dense_size is {self.dense_size}, expected at least global_size + local_size "
                f"({self.global_size + self.local_size}), which are always in scope"
            )
        choice("span_scope", self.span_scope, SPAN_SCOPES)
        switch("carry_votes", self.carry_votes)
        if self.vote_window > 1 and not self.carry_votes:
            raise InputError(
                f"vote_window is {self.vote_window}, expected 1 without carry_votes: the votes of earlier tokens are "
                "those of all layers; pass carry_votes=True"
            )
        if self.max_scope > LARGEST_SIZE:
            raise InputError(f"{self._reach()}, expected at most {LARGEST_SIZE}")

    @classmethod
    def for_context(cls, trained_context: int, **fields: Any) -> ReAttentionConfig:
        """The defaults for a model trained on `trained_context` tokens; `fields` that are not None override them."""
        given = {name: value for name, value in fields.items() if value is not None}
        known_options(given, SCOPE_FIELDS)
        large, medium = trained_context >= 32768, 4096 <= trained_context < 32768
        # Few local tokens, few winners and half of the room that is left: see kernels/NOTEBOOK.md, 2026-11-26.
        values = {
            "global_size": 32 if large else min(32, trained_context // 64),
            "local_size": 8192 if large else max(1, min(trained_context // 2, max(1024, trained_context // 8))),
            "span_top_k": 2 if medium else 4,
            "span_size": 64 if medium else 32,
        } | given
        # Names a bad value before it is used in arithmetic.
        rest = {"max_spans": given.get("max_spans", 0), "vote_window": 1}
        cls(**values | dict.fromkeys(_DERIVED) | rest)
        room = max(0, trained_context - values["global_size"] - values["local_size"])
        values.setdefault(
            "max_spans", (min(room, 256 * values["span_size"]) if large else room // 2) // values["span_size"]
        )
        if medium:  # earlier tokens and layers vote with an answer's, for few spans (the notebook, same date)
            # A span covers its block and half as much on either side, so that no border of blocks cuts a passage.
            blocks = {"vote_size": values["span_size"] // 2}
            votes = blocks | {"vote_window": 8 if values.get("carry_votes", True) else 1, "carry_votes": True}
            values = votes | {"decode_spans": min(16, values["max_spans"])} | values
        sparse = cls(**values)
        return sparse if "dense_size" in given else dataclasses.replace(sparse, dense_size=sparse.max_scope)

    @functools.cached_property
    def of_decode_step(self) -> ReAttentionConfig:
        """The sizes of a token that is read by itself."""
        if self.decode_spans == self.max_spans:
            return self
        return dataclasses.replace(self, max_spans=self.decode_spans)

    @functools.cached_property
    def of_dense_step(self) -> ReAttentionConfig:
        """The sizes of a token that is read by itself within dense_size, where nothing is selected."""
        return dataclasses.replace(self.of_decode_step, span_top_k=0)

    @property
    def max_scope(self) -> int:
        """The most keys that attention can see in one step (S of section 3)."""
        return max(self.selecting_scope, self.dense_size)

    @property
    def selecting_scope(self) -> int:
        """The most keys that attention can see in one step beyond dense_size."""
        return self.global_size + self.max_selected + self.local_size

    @property
    def max_selected(self) -> int:
        """The most keys that can be selected from the middle in one step; 0 means streaming."""
        return self.max_spans * self.span_size if self.span_top_k else 0

    def check_fits(self, trained_context: int, source: str) -> None:
        """Refuse a scope that would need RoPE positions the model has never seen (section 3, last paragraph)."""
        if self.max_scope > trained_context:
            raise InputError(
                f"{self._reach()}, more than the trained context of {trained_context} ({source}); lower one of them or "
                "pass allow_out_of_distribution=True"
            )

    def _reach(self) -> str:
        selecting = f"global_size {self.global_size} + max_spans {self.max_spans} x span_size {self.span_size} "
        parts = f"{selecting}+ local_size {self.local_size}, or dense_size {self.dense_size}"
        return f"the scope can reach {self.max_scope} tokens ({parts})"


LARGEST_SIZE: Final = 2**31 - 1  # tokens; kernels count them in int32
_LOWEST: Final = {
    "global_size": 0,
    "local_size": 1,
    "span_top_k": 0,
    "span_size": 2,
    "max_spans": 0,
    "chunk_size": 1,
    "tail_size": 0,
    "tail_chunk_size": 1,
    "vote_window": 1,
    "vote_size": 1,
    "decode_spans": 0,
    "dense_size": 0,
}
# Fields whose default follows from others, in the order in which they are known.
_DERIVED: Final[dict[str, Callable[[ReAttentionConfig], int]]] = {
    "chunk_size": lambda c: min(CHUNK_SIZE, c.local_size),
    "tail_chunk_size": lambda c: min(TAIL_CHUNK_SIZE, c.chunk_size),
    "decode_spans": lambda c: c.max_spans,
    "dense_size": lambda c: c.global_size + c.local_size,
}

SCOPE_FIELDS: Final = tuple(field.name for field in dataclasses.fields(ReAttentionConfig))
# Those that nothing depends on where nothing is selected.
SELECTING_FIELDS: Final = (
    *("span_top_k", "span_size", "max_spans", "span_scope", "vote_window", "vote_size", "carry_votes", "decode_spans"),
)


def fields_of(mode: str) -> tuple[str, ...]:
    """Fields of ReAttentionConfig that an attention mode depends on."""
    ignored = {"full": SCOPE_FIELDS, "streaming": SELECTING_FIELDS}.get(mode, ())
    return tuple(name for name in SCOPE_FIELDS if name not in ignored)
