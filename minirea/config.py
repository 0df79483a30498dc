"""What a checkpoint says about itself (ModelConfig) and how it is to be read (ReAttentionConfig)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from minirea.checks import integer
from minirea.errors import InputError, MissingFileError

# Every LLaMA-like architecture whose forward pass is the one in model.py. The two differ only in what their
# config may hold: LLaMA has biases, Mistral a sliding window.
ARCHITECTURES: Final = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}
MODEL_TYPES: Final = frozenset(ARCHITECTURES.values())
ROPE_TYPES: Final = ("default", "linear", "dynamic", "llama3", "yarn")
SPAN_SCOPES: Final = ("layer", "kv_head")
DTYPES: Final = ("float32", "float16", "bfloat16")
# Defaults of ReAttentionConfig that hold for every trained context.
CHUNK_SIZE: Final = 512
TAIL_SIZE: Final = 32
TAIL_CHUNK_SIZE: Final = 8


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


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of one LLaMA or Mistral checkpoint.

    Letters of the project's key: L num_layers, E hidden_size, F mlp_size, H num_heads, G num_kv_heads, D head_dim,
    V vocab_size.
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
    attention_bias: bool = False
    mlp_bias: bool = False
    dtype: str | None = None
    bos_token_id: int | None = None
    eos_token_ids: frozenset[int] = frozenset()

    @property
    def trained_context(self) -> int:
        """The longest distance, in tokens, between a query and a key that training has shown the model."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)


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
        tail_chunk_size: queries of a prompt's tail that share one scope, at most local_size; None means 8, or
            chunk_size where that is less.
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
                    "a larger chunk would let a query see later tokens"
                )
        if self.dense_size < self.global_size + self.local_size:
            raise InputError(
                f"dense_size is {self.dense_size}, expected at least global_size + local_size "
                f"({self.global_size + self.local_size}), which are always in scope"
            )
        if self.span_scope not in SPAN_SCOPES:
            raise InputError(f"span_scope is {self.span_scope!r}, expected one of {', '.join(SPAN_SCOPES)}")

    @classmethod
    def for_context(cls, trained_context: int, **fields: Any) -> ReAttentionConfig:
        """The defaults for a model trained on `trained_context` tokens; `fields` that are not None override them."""
        given = {name: value for name, value in fields.items() if value is not None}
        unknown = sorted(set(given) - set(_LOWEST) - {"span_scope"})
        if unknown:
            raise InputError(f"unknown option {unknown[0]!r}, expected one of {', '.join([*_LOWEST, 'span_scope'])}")
        large = trained_context >= 32768
        values = {
            "global_size": 32 if large else min(32, trained_context // 64),
            "local_size": 8192 if large else max(1, trained_context // 2),
            "span_size": 32,
        } | given
        cls(**values | dict.fromkeys(_DERIVED))  # names a bad value before it is used in arithmetic
        room = trained_context - values["global_size"] - values["local_size"]
        values.setdefault("max_spans", max(0, min(256 if large else room, room // values["span_size"])))
        sparse = cls(**values)
        return sparse if "dense_size" in given else dataclasses.replace(sparse, dense_size=sparse.max_scope)

    @property
    def max_scope(self) -> int:
        """The most keys that attention can see in one step (S of section 3)."""
        return max(self.global_size + self.max_selected + self.local_size, self.dense_size)

    @property
    def max_selected(self) -> int:
        """The most keys that can be selected from the middle in one step; 0 means streaming."""
        return self.max_spans * self.span_size if self.span_top_k else 0

    def check_fits(self, trained_context: int, source: str) -> None:
        """Refuse a scope that would need RoPE positions the model has never seen (section 3, last paragraph)."""
        if self.max_scope > trained_context:
            selecting = f"global_size {self.global_size} + max_spans {self.max_spans} x span_size {self.span_size} "
            parts = f"{selecting}+ local_size {self.local_size}, or dense_size {self.dense_size}"
            raise InputError(
                f"the scope can reach {self.max_scope} tokens ({parts}), more than the trained "
                f"context of {trained_context} ({source}); lower one of them or pass --allow-out-of-distribution"
            )


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
    "dense_size": 0,
}
# Fields whose default follows from others, in the order in which they are known.
_DERIVED: Final[dict[str, Callable[[ReAttentionConfig], int]]] = {
    "chunk_size": lambda c: min(CHUNK_SIZE, c.local_size),
    "tail_chunk_size": lambda c: min(TAIL_CHUNK_SIZE, c.chunk_size),
    "dense_size": lambda c: c.global_size + c.local_size,
}


class JsonObject:
    """A JSON object read from a file, with typed access whose errors name file, key, what was found and expected."""

    def __init__(self, values: dict[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    @classmethod
    def read(cls, path: Path) -> JsonObject:
        """Parse `path`. Raises MissingFileError or InputError naming it."""
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise MissingFileError(f"{path}: no such file") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:  # bad syntax and bad UTF-8 are both ValueErrors
            raise InputError(f"{path}: not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise InputError(f"{path}: holds a JSON {type(values).__name__}, expected an object")
        return cls(values, str(path))

    def fail(self, key: str, expected: str) -> InputError:
        found = json.dumps(self.values[key])[:80] if key in self.values else "absent"
        return InputError(f"{self.source}: {key} is {found}, expected {expected}")

    def integer(self, key: str, default: int | None = None, lowest: int = 1) -> int:
        value = self.values.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest or value >= 2**31:
            raise self.fail(key, f"an integer of at least {lowest}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self.fail(key, "a positive number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            value = default
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def child(self, key: str) -> JsonObject | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(key, "an object")
        return JsonObject(value, f"{self.source}: {key}")

    def token_ids(self, key: str) -> frozenset[int]:
        """An id, a list of ids, or nothing."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.fail(key, "a token id or a list of token ids")
        return frozenset(ids)


def load_config(directory: str | Path) -> ModelConfig:
    """Read a model directory's config.json (Hugging Face) or params.json (Mistral's own format).

    Raises:
        MissingFileError: no such directory, or it holds neither file.
        InputError: a key is missing, malformed, contradictory or names something this engine does not do.
    """
    directory = Path(directory)
    if not directory.exists():
        raise MissingFileError(f"{directory}: no such model directory")
    if not directory.is_dir():
        raise InputError(f"{directory}: is a file, expected a model directory")
    if (directory / "config.json").exists():
        config = _from_hugging_face(JsonObject.read(directory / "config.json"))
        return dataclasses.replace(config, eos_token_ids=config.eos_token_ids | _generation_eos(directory))
    if (directory / "params.json").exists():
        return _from_mistral(JsonObject.read(directory / "params.json"))
    raise MissingFileError(f"{directory}: holds neither config.json nor params.json")


def _generation_eos(directory: Path) -> frozenset[int]:
    """Stop tokens of generation_config.json. An invalid file is worth no failure: published models ship some."""
    try:
        return JsonObject.read(directory / "generation_config.json").token_ids("eos_token_id")
    except (MissingFileError, InputError):
        return frozenset()


def _from_hugging_face(json_config: JsonObject) -> ModelConfig:
    c = json_config
    _check_architecture(c)
    hidden_size, num_heads = c.integer("hidden_size"), c.integer("num_attention_heads")
    max_position = c.integer("max_position_embeddings")
    config = ModelConfig(
        num_layers=c.integer("num_hidden_layers"),
        hidden_size=hidden_size,
        mlp_size=c.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=c.integer("num_key_value_heads", num_heads),
        head_dim=c.integer("head_dim", hidden_size // num_heads),
        vocab_size=c.integer("vocab_size"),
        norm_eps=c.number("rms_norm_eps", 1e-6),
        rope=_rope(c, max_position),
        max_position_embeddings=max_position,
        sliding_window=None if c.values.get("sliding_window") is None else c.integer("sliding_window"),
        tie_word_embeddings=c.boolean("tie_word_embeddings", False),
        attention_bias=c.boolean("attention_bias", False),
        mlp_bias=c.boolean("mlp_bias", False),
        dtype=_dtype(c),
        bos_token_id=min(c.token_ids("bos_token_id"), default=None),
        eos_token_ids=c.token_ids("eos_token_id"),
    )
    return _checked(config, c, heads="num_attention_heads", kv_heads="num_key_value_heads")


def _from_mistral(params: JsonObject) -> ModelConfig:
    """params.json, as Mistral publishes it beside consolidated.safetensors."""
    p = params
    for key in ("moe", "vision_encoder", "lora", "quantization", "yarn", "llama_4_scaling"):
        if p.values.get(key) is not None:
            raise p.fail(
                key, "no such key: minirea runs dense, unquantized text models with plain RoPE from this format"
            )
    hidden_size, num_heads = p.integer("dim"), p.integer("n_heads")
    window = p.values.get("sliding_window")
    config = ModelConfig(
        num_layers=p.integer("n_layers"),
        hidden_size=hidden_size,
        mlp_size=p.integer("hidden_dim"),
        num_heads=num_heads,
        num_kv_heads=p.integer("n_kv_heads", num_heads),
        head_dim=p.integer("head_dim", hidden_size // num_heads),
        vocab_size=p.integer("vocab_size"),
        norm_eps=p.number("norm_eps", 1e-5),
        rope=RopeConfig(theta=p.number("rope_theta", 10000.0)),
        max_position_embeddings=p.integer("max_position_embeddings", p.values.get("max_seq_len") or 32768),
        sliding_window=None if window is None else p.integer("sliding_window"),
        tie_word_embeddings=p.boolean("tied_embeddings", False),
    )
    return _checked(config, p, heads="n_heads", kv_heads="n_kv_heads")


def _check_architecture(c: JsonObject) -> None:
    architectures = c.values.get("architectures")
    model_type = c.values.get("model_type")
    if architectures is not None:
        known = isinstance(architectures, list) and any(name in ARCHITECTURES for name in architectures)
        if not known:
            raise c.fail("architectures", f"one of {', '.join(ARCHITECTURES)}")
    elif model_type not in MODEL_TYPES:
        raise c.fail("model_type", f"one of {', '.join(sorted(MODEL_TYPES))}")
    if c.values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise c.fail("hidden_act", '"silu"')
    if c.values.get("quantization_config") is not None:
        raise c.fail("quantization_config", "no such key: minirea reads float32, float16 and bfloat16 weights")


def _dtype(c: JsonObject) -> str | None:
    key = "dtype" if c.values.get("dtype") is not None else "torch_dtype"
    value = c.values.get(key)
    if value is not None and (not isinstance(value, str) or value.removeprefix("torch.") not in DTYPES):
        raise c.fail(key, f"one of {', '.join(DTYPES)}")
    return None if value is None else value.removeprefix("torch.")


def _rope(c: JsonObject, max_position: int) -> RopeConfig:
    """`rope_scaling` beside `rope_theta`, or the newer `rope_parameters` with the theta inside."""
    r = c.child("rope_parameters") or c.child("rope_scaling") or JsonObject({}, c.source)
    theta = r.number("rope_theta", c.number("rope_theta", 10000.0))
    key = "rope_type" if "rope_type" in r.values else "type"
    rope_type = r.values.get(key, "default")
    if rope_type not in ROPE_TYPES:
        raise r.fail(key, f"one of {', '.join(ROPE_TYPES)}")
    if r.number("partial_rotary_factor", c.number("partial_rotary_factor", 1.0)) != 1.0:
        raise InputError(f"{c.source}: partial_rotary_factor is not 1, expected RoPE over the whole head")
    if rope_type == "default":
        return RopeConfig(theta=theta)
    original = r.integer(
        "original_max_position_embeddings", c.integer("original_max_position_embeddings", max_position)
    )
    optional = {
        key: r.number(key) for key in ("attention_factor", "mscale", "mscale_all_dim") if r.values.get(key) is not None
    }
    rope = RopeConfig(
        type=rope_type,
        theta=theta,
        factor=r.number("factor", max_position / original if rope_type == "yarn" else None),
        original_context=original,
        beta_fast=r.number("beta_fast", 32.0),
        beta_slow=r.number("beta_slow", 1.0),
        truncate=r.boolean("truncate", True),
        **optional,  # type: ignore[arg-type]
    )
    if rope_type == "llama3":
        if r.values.get("original_max_position_embeddings") is None:
            raise r.fail("original_max_position_embeddings", "an integer: llama3 RoPE needs it")
        low, high = r.number("low_freq_factor"), r.number("high_freq_factor")
        if low >= high:
            raise r.fail("low_freq_factor", f"less than high_freq_factor ({high})")
        rope = dataclasses.replace(rope, low_freq_factor=low, high_freq_factor=high)
    return rope


def _checked(config: ModelConfig, c: JsonObject, heads: str, kv_heads: str) -> ModelConfig:
    if config.num_heads % config.num_kv_heads:
        raise c.fail(kv_heads, f"a divisor of {heads} ({config.num_heads})")
    if config.head_dim % 2 or config.head_dim < 2:
        raise InputError(f"{c.source}: head_dim is {config.head_dim}, expected an even number: RoPE rotates pairs")
    return config
