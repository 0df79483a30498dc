"""What a checkpoint says about itself: config.json (Hugging Face) or params.json (Mistral's own) as a ModelConfig.

A family of models is one record in FAMILIES. Everything that it does not say is LLaMA's, as is the forward pass.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from minirea.config import DTYPES, ROPE_TYPES, ModelConfig, Packing, RopeConfig
from minirea.errors import InputError, MinireaWarning, MissingFileError
from minirea.files import is_there, list_directory
from minirea.json_object import JsonObject, shown

# Ranges of what is read. Every published model lies far inside, and within them no arithmetic of a table or a norm
# leaves float32.
_NORM_EPS: Final = {"lowest": 1e-20, "highest": 1.0}
_THETA: Final = {"lowest": 1.0, "highest": 1e15}
_FACTOR: Final = {"lowest": 1e-4, "highest": 1e6}
_LARGEST_HEAD_DIM: Final = 4096

# Matrices in 8 bits, float or integer, with a scale per tensor or row; and in 4 bits (_packing).
_QUANT_METHODS: Final = ("compressed-tensors", "fp8", "fbgemm_fp8", "gptq", "awq")
_QUANT_FORMATS: Final = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
_PACKED_GROUP: Final = 32  # columns, the least that products with 4 bits take on all devices
_FLOAT64: Final = "float64"  # nothing is computed in it: such a checkpoint runs in float32
_SENSIBLE_LENGTHS: Final = range(16, 10**9)  # of a tokenizer's model_max_length; 10^30 says that there is none


def _window_of_all_layers(c: JsonObject) -> int | None:
    """Mistral's: null is none, absent is what transformers takes for absent."""
    return None if c.values.get("sliding_window", 0) is None else c.integer("sliding_window", 4096)


def _window_from_a_layer_on(c: JsonObject) -> int | None:
    """Qwen2's: layers of `layer_types`, else those from max_window_layers on, and only with use_sliding_window."""
    window = _window_of_all_layers(c) if c.boolean("use_sliding_window", False) else None
    if window is None:
        return None
    num_layers, kinds = c.integer("num_hidden_layers"), c.values.get("layer_types")
    if kinds is None:
        key, windowed = "max_window_layers", max(0, num_layers - c.integer("max_window_layers", 28, lowest=0))
    else:
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in known for kind in kinds):
            raise c.fail("layer_types", f"a list of num_hidden_layers ({num_layers}) times {' or '.join(known)}")
        key, windowed = "layer_types", kinds.count("sliding_attention")
    if 0 < windowed < num_layers:
        raise c.fail(key, f"the same sliding window for all {num_layers} layers: here {windowed} of them have one")
    return window if windowed else None


@dataclass(frozen=True)
class Family:
    """What sets the config.json of one family of models apart.

    Attributes:
        model_type: as in config.json.
        architectures: the class of the whole model, and that of a base model.
        max_position_embeddings, num_kv_heads: where config.json has no such key, as transformers takes them; None
            means num_attention_heads.
        qkv_bias, o_bias, mlp_bias: whether these matrices have a bias, or the key that says it.
        sliding_window: reads how many tokens a query sees, None if all; None for a family without windows.
    """

    model_type: str
    architectures: tuple[str, str]
    max_position_embeddings: int
    num_kv_heads: int | None = None
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    sliding_window: Callable[[JsonObject], int | None] | None = None


FAMILIES: Final = (
    Family(
        "llama",
        ("LlamaForCausalLM", "LlamaModel"),
        max_position_embeddings=2048,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    Family(
        "mistral",
        ("MistralForCausalLM", "MistralModel"),
        max_position_embeddings=131072,
        num_kv_heads=8,
        sliding_window=_window_of_all_layers,
    ),
    Family(
        "qwen2",
        ("Qwen2ForCausalLM", "Qwen2Model"),
        max_position_embeddings=32768,
        num_kv_heads=32,
        qkv_bias=True,
        sliding_window=_window_from_a_layer_on,
    ),
)


def load_config(directory: str | Path) -> ModelConfig:
    """Read a model directory's config.json (Hugging Face) or params.json (Mistral's own format).

    Warns (MinireaWarning) of end-of-text ids outside the vocabulary, left out here, and of a generation_config.json
    that cannot be used.

    Raises:
        MissingFileError: no such directory, or it holds neither file.
        InputError: a key is missing, malformed, contradictory or names something this engine does not do.
    """
    directory = Path(directory)
    list_directory(directory, "model directory")
    if is_there(directory / "config.json"):
        c = JsonObject.read(directory / "config.json")
        config = _from_hugging_face(c, _tokenizer_length(directory))
        eos_token_ids = _known_ids(c, config.vocab_size) | _generation_eos(directory, config.vocab_size)
        return dataclasses.replace(config, eos_token_ids=eos_token_ids)
    if is_there(directory / "params.json"):
        return _from_mistral(JsonObject.read(directory / "params.json"))
    raise MissingFileError(f"{directory}: holds neither config.json nor params.json")


def _generation_eos(directory: Path, vocab_size: int) -> frozenset[int]:
    """Stop tokens of generation_config.json. Invalid ones do no harm but for a warning: published models ship some."""
    path = directory / "generation_config.json"
    if not is_there(path):
        return frozenset()
    try:
        return _known_ids(JsonObject.read(path), vocab_size)
    except (MissingFileError, InputError) as error:
        warnings.warn(f"{error}; the file is ignored", MinireaWarning, stacklevel=2)
        return frozenset()


def _known_ids(c: JsonObject, vocab_size: int) -> frozenset[int]:
    """The end-of-text ids of a file that a model can produce."""
    ids = c.token_ids("eos_token_id")
    unknown = [token_id for token_id in ids if token_id >= vocab_size]
    if unknown:
        found = f"{c.source}: eos_token_id {min(unknown)} is not in the vocabulary (vocab_size {vocab_size})"
        warnings.warn(f"{found}: no text can end with it", MinireaWarning, stacklevel=2)
    return ids - set(unknown)


def _tokenizer_length(directory: Path) -> int | None:
    """How many tokens the model takes, by its tokenizer's files; None if they do not say it or cannot be read."""
    try:
        length = JsonObject.read(directory / "tokenizer_config.json").values.get("model_max_length")
    except (MissingFileError, InputError):
        return None
    return length if type(length) is int and length in _SENSIBLE_LENGTHS else None


def _from_hugging_face(c: JsonObject, tokenizer_length: int | None) -> ModelConfig:
    family = _family(c)
    if c.values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise c.fail("hidden_act", '"silu"')
    hidden_size, num_heads = c.integer("hidden_size"), c.integer("num_attention_heads")
    max_position = c.integer("max_position_embeddings", tokenizer_length or family.max_position_embeddings)
    kv_heads_if_null = num_heads if "num_key_value_heads" in c.values else family.num_kv_heads or num_heads
    head_dim = c.integer("head_dim", hidden_size // num_heads, highest=_LARGEST_HEAD_DIM)
    config = ModelConfig(
        num_layers=c.integer("num_hidden_layers"),
        hidden_size=hidden_size,
        mlp_size=c.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=c.integer("num_key_value_heads", kv_heads_if_null),
        head_dim=head_dim,
        vocab_size=c.integer("vocab_size"),
        norm_eps=c.number("rms_norm_eps", 1e-6, **_NORM_EPS),
        rope=_rope(c, max_position, head_dim),
        max_position_embeddings=max_position,
        sliding_window=family.sliding_window(c) if family.sliding_window else None,
        tie_word_embeddings=c.boolean("tie_word_embeddings", False),
        qkv_bias=_has_bias(c, family.qkv_bias),
        o_bias=_has_bias(c, family.o_bias),
        mlp_bias=_has_bias(c, family.mlp_bias),
        **_quantization(c),
        dtype=_dtype(c),
    )
    return _checked(config, c, heads="num_attention_heads", kv_heads="num_key_value_heads")


def _from_mistral(params: JsonObject) -> ModelConfig:
    """params.json, as Mistral publishes it next to consolidated.safetensors."""
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
        head_dim=p.integer("head_dim", hidden_size // num_heads, highest=_LARGEST_HEAD_DIM),
        vocab_size=p.integer("vocab_size"),
        norm_eps=p.number("norm_eps", 1e-5, **_NORM_EPS),
        rope=RopeConfig(theta=p.number("rope_theta", 10000.0, **_THETA)),
        max_position_embeddings=p.integer("max_position_embeddings", p.integer("max_seq_len", 32768)),
        sliding_window=None if window is None else p.integer("sliding_window"),
        tie_word_embeddings=p.boolean("tied_embeddings", False),
    )
    return _checked(config, p, heads="n_heads", kv_heads="n_kv_heads")


def _family(c: JsonObject) -> Family:
    """By model_type, as transformers chooses; by `architectures` where that names no family."""
    architectures = c.values.get("architectures")
    named = architectures if isinstance(architectures, list) else [] if architectures is None else [architectures]
    known = [family for family in FAMILIES if any(name in family.architectures for name in named)]
    if named and not known:
        expected = ", ".join(family.architectures[0] for family in FAMILIES)
        raise c.fail("architectures", f"one of {expected}")
    by_type = [family for family in FAMILIES if c.values.get("model_type") == family.model_type]
    if not known and not by_type:
        raise c.fail("model_type", f"one of {', '.join(family.model_type for family in FAMILIES)}")
    return (by_type or known)[0]


def _has_bias(c: JsonObject, declared: bool | str) -> bool:
    return c.boolean(declared, False) if isinstance(declared, str) else declared


def _quantization(c: JsonObject) -> dict[str, Any]:
    """`quantized`: whether matrices are stored in 8 bits with a scale per tensor or row; or how in 4: `packing`.

    Other ways are refused by their name.
    """
    q = c.child("quantization_config") or c.child("compression_config")
    if q is None:
        return {}
    method = q.values.get("quant_method")
    if method not in _QUANT_METHODS:
        raise q.fail("quant_method", f"one of {', '.join(_QUANT_METHODS)}: minirea reads no other quantized weights")
    if method == "compressed-tensors" and q.values.get("format") not in _QUANT_FORMATS:
        raise q.fail("format", f"one of {', '.join(_QUANT_FORMATS)} with {method}")
    if method in ("gptq", "awq") or (method == "compressed-tensors" and q.values["format"] == "pack-quantized"):
        return {"packing": _packing(q, method)}
    if q.values.get("weight_block_size") is not None:
        raise q.fail("weight_block_size", "no such key: minirea reads one scale per tensor or row")
    return {"quantized": True}


def _packing(q: JsonObject, method: str) -> Packing:
    """Of matrices with 4 bits, whose groups of neighbouring columns are whole ones of minirea.quantize."""
    if method == "compressed-tensors":
        return _pack_quantized(_weights_of_one_group(q))
    _check_is(q, "bits", 4)
    if method == "awq":
        _check_is(q, "zero_point", True)
        if str(q.values.get("version") or "gemm").lower() != "gemm":
            raise q.fail("version", '"gemm"')
        return Packing(method, _group_size(q))
    if q.values.get("checkpoint_format") is not None:
        _check_is(q, "checkpoint_format", "gptq", "gptq_v2")
        method = q.values["checkpoint_format"]
    return Packing(method, _group_size(q, -1), act_order=q.boolean("desc_act", False))


def _pack_quantized(weights: JsonObject) -> Packing:
    _check_is(weights, "num_bits", 4)
    _check_is(weights, "type", "int")
    _check_is(weights, "strategy", "group", "channel")
    group_size = _group_size(weights) if weights.values["strategy"] == "group" else 0
    act_order = weights.values.get("actorder") in ("group", "dynamic")
    return Packing("pack-quantized", group_size, weights.boolean("symmetric", True), act_order)


def _group_size(q: JsonObject, default: int | None = None) -> int:
    group_size = q.integer("group_size", default, lowest=-1)
    if not group_size or (group_size % _PACKED_GROUP and group_size != -1):
        raise q.fail("group_size", f"a multiple of {_PACKED_GROUP}, or -1 for a whole row")
    return max(0, group_size)


def _weights_of_one_group(q: JsonObject) -> JsonObject:
    """compressed-tensors: how the weights of all modules are quantized that are."""
    groups = q.child("config_groups")
    if groups is None or len(groups.values) != 1:
        raise q.fail("config_groups", "an object of one group")
    group = groups.child(next(iter(groups.values)))
    weights = group.child("weights") if group else None
    if weights is None:
        raise q.fail("config_groups", "a group with weights")
    return weights


def _check_is(q: JsonObject, key: str, *expected: Any) -> None:
    """One of those that are expected; 1 is not true."""
    found = q.values.get(key)
    if not any(found == value and isinstance(found, bool) == isinstance(value, bool) for value in expected):
        raise q.fail(key, f"{' or '.join(map(shown, expected))}: minirea reads no other weights of this kind")


def _dtype(c: JsonObject) -> str | None:
    key = "dtype" if c.values.get("dtype") is not None else "torch_dtype"
    value = c.values.get(key)
    if value is None:
        return None
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name == _FLOAT64:
        return "float32"
    if name not in DTYPES:
        raise c.fail(key, f"one of {', '.join((*DTYPES, _FLOAT64))}")
    return str(name)


def _checked(config: ModelConfig, c: JsonObject, heads: str, kv_heads: str) -> ModelConfig:
    if config.num_heads % config.num_kv_heads:
        raise c.fail(kv_heads, f"a divisor of {heads} ({config.num_heads})")
    if config.head_dim % 2:
        raise InputError(f"{c.source}: head_dim is {config.head_dim}, expected an even number: RoPE rotates pairs")
    return config


# --- RoPE -------------------------------------------------------------------------------------------------------------


def _rope(c: JsonObject, max_position: int, head_dim: int) -> RopeConfig:
    r = _rope_object(c)
    theta = r.number("rope_theta", c.number("rope_theta", 10000.0, **_THETA), **_THETA)
    rope_type = r.values.get(_type_key(r), "default")
    if rope_type not in ROPE_TYPES:
        raise r.fail(_type_key(r), f"one of {', '.join(ROPE_TYPES)}")
    part = {"lowest": 0.0, "highest": 1.0}
    if r.number("partial_rotary_factor", c.number("partial_rotary_factor", 1.0, **part), **part) != 1.0:
        raise InputError(f"{c.source}: partial_rotary_factor is not 1, expected RoPE over the whole head")
    if rope_type == "default":
        return RopeConfig(theta=theta)
    # Both places hold it in some checkpoints; transformers takes the outer one.
    original = c.integer(
        "original_max_position_embeddings", r.integer("original_max_position_embeddings", max_position)
    )
    factor = r.number("factor", max_position / original if rope_type == "yarn" else None, **_FACTOR)
    rope = RopeConfig(type=rope_type, theta=theta, factor=factor, original_context=original)
    if rope_type == "dynamic" and head_dim < 4:
        raise InputError(f"{c.source}: head_dim is {head_dim}, expected at least 4 with dynamic RoPE")
    if rope_type == "llama3":
        return _llama3(r, rope)
    return _yarn(r, rope) if rope_type == "yarn" else rope


def _rope_object(c: JsonObject) -> JsonObject:
    """`rope_scaling`, or the newer `rope_parameters`, which holds the theta too.

    Of two that say something transformers lets rope_scaling count. So it is here, unless the other says something else.
    """
    old, new = c.child("rope_scaling"), c.child("rope_parameters")
    given = [r for r in (old, new) if r is not None and r.values]
    for r in given:
        nested = next((key for key, value in r.values.items() if isinstance(value, dict)), None)
        if nested is not None:
            raise r.fail(nested, "no object: minirea has one RoPE for all layers")
    if old is None or new is None or len(given) < 2:
        return given[0] if given else JsonObject({}, c.source)
    theta, part = c.values.get("rope_theta"), c.values.get("partial_rotary_factor")
    counts = {"rope_theta": theta or 10000.0, "partial_rotary_factor": part or 1.0} | old.values
    counts["type"] = counts["rope_type"] = old.values.get(_type_key(old), "default")
    unscaled = new.values.get(_type_key(new), "default") == "default"
    for key, value in new.values.items():
        if value is not None and value != counts.get(key) and not (unscaled and key in ("type", "rope_type")):
            raise new.fail(key, f"{shown(counts.get(key))}, which rope_scaling has or implies: make the two agree")
    return old


def _type_key(r: JsonObject) -> str:
    return "rope_type" if "rope_type" in r.values else "type"


def _llama3(r: JsonObject, rope: RopeConfig) -> RopeConfig:
    if r.values.get("original_max_position_embeddings") is None:
        raise r.fail("original_max_position_embeddings", "an integer: llama3 RoPE needs it")
    low, high = r.number("low_freq_factor", **_FACTOR), r.number("high_freq_factor", **_FACTOR)
    if low >= high:
        raise r.fail("low_freq_factor", f"less than high_freq_factor ({high})")
    return dataclasses.replace(rope, low_freq_factor=low, high_freq_factor=high)


def _yarn(r: JsonObject, rope: RopeConfig) -> RopeConfig:
    if rope.theta == 1.0:
        raise InputError(f"{r.source}: rope_theta is 1, expected more with yarn RoPE")
    attention_factor = r.values.get("attention_factor")

    def is_default(key: str) -> bool:
        return r.values.get(key) in (None, 0)

    return dataclasses.replace(
        rope,
        beta_fast=32.0 if is_default("beta_fast") else r.number("beta_fast", **_FACTOR),
        beta_slow=1.0 if is_default("beta_slow") else r.number("beta_slow", **_FACTOR),
        attention_factor=None if attention_factor is None else r.number("attention_factor", **_FACTOR),
        mscale=None if is_default("mscale") else r.number("mscale", **_FACTOR),
        mscale_all_dim=None if is_default("mscale_all_dim") else r.number("mscale_all_dim", **_FACTOR),
        truncate=r.boolean("truncate", True),
    )
