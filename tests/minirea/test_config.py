"""What config.json and params.json may hold, and the limits of ReAttentionConfig."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from testing import TINY

from minirea.config import TAIL_CHUNK_SIZE, TAIL_SIZE, ReAttentionConfig, RopeConfig, load_config
from minirea.errors import InputError, MissingFileError

HF = TINY | {"architectures": ["LlamaForCausalLM"], "rope_theta": 10000.0}
MISTRAL = {
    "dim": 64,
    "n_layers": 2,
    "hidden_dim": 112,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 97,
    "norm_eps": 1e-5,
    "rope_theta": 1e6,
}


def config_of(tmp_path: Path, **edits: Any) -> Any:
    values = {key: value for key, value in (HF | edits).items() if value != "absent"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    return load_config(tmp_path)


def test_defaults_of_absent_keys(tmp_path: Path) -> None:
    config = config_of(tmp_path, num_key_value_heads="absent", rms_norm_eps="absent", rope_theta="absent")
    assert (config.num_kv_heads, config.head_dim, config.norm_eps) == (4, 16, 1e-6)
    assert config.rope == RopeConfig()
    assert not (config.tie_word_embeddings or config.attention_bias or config.mlp_bias)
    assert config.sliding_window is None


def test_null_is_absent(tmp_path: Path) -> None:
    nulls = dict.fromkeys(("num_key_value_heads", "head_dim", "rope_scaling", "sliding_window", "eos_token_id"))
    config = config_of(tmp_path, **nulls)
    assert (config.num_kv_heads, config.head_dim, config.eos_token_ids) == (4, 16, frozenset())


def test_explicit_head_dim(tmp_path: Path) -> None:
    assert config_of(tmp_path, head_dim=40).head_dim == 40


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_rope_scaling_old_and_new(tmp_path: Path, place: str, key: str) -> None:
    rope = config_of(tmp_path, **{place: {key: "linear", "factor": 4.0, "rope_theta": 5e5}}).rope
    assert (rope.type, rope.factor, rope.theta) == ("linear", 4.0, 5e5)


def test_unscaled_rope_parameters(tmp_path: Path) -> None:
    parameters = {"rope_type": "default", "rope_theta": 1e6}
    assert config_of(tmp_path, rope_parameters=parameters, rope_theta="absent").rope == RopeConfig(theta=1e6)


def test_yarn_keeps_its_extras(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.2}
    rope = config_of(tmp_path, rope_scaling=yarn).rope
    assert (rope.original_context, rope.attention_factor, rope.beta_fast) == (64, 1.2, 32.0)


@pytest.mark.parametrize(("key", "value"), [("dtype", "bfloat16"), ("torch_dtype", "torch.bfloat16")])
def test_dtype_keys(tmp_path: Path, key: str, value: str) -> None:
    assert config_of(tmp_path, **{key: value}).dtype == "bfloat16"


def test_end_of_text_ids_are_a_union(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert config_of(tmp_path, eos_token_id=2).eos_token_ids == {2, 7, 8}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"eos_token_id": "two"}'])
def test_an_invalid_generation_config_is_no_failure(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    assert config_of(tmp_path, eos_token_id=[2, 3]).eos_token_ids == {2, 3}


def test_trained_context_is_the_window_where_there_is_one(tmp_path: Path) -> None:
    assert config_of(tmp_path).trained_context == 256
    assert config_of(tmp_path, sliding_window=100).trained_context == 100
    assert config_of(tmp_path, sliding_window=1000).trained_context == 256


@pytest.mark.parametrize(
    ("edits", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures"),
        ({"architectures": "absent", "model_type": "gpt2"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": "absent"}, "num_hidden_layers is absent"),
        ({"num_hidden_layers": "two"}, 'num_hidden_layers is "two"'),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is true"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"torch_dtype": "int8"}, "torch_dtype"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "longrope"),
        ({"rope_scaling": {"type": "linear"}}, "factor is absent"),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, 'factor is "x"'),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "original_max_position_embeddings"),
        (
            {
                "rope_scaling": {
                    "type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 4,
                    "high_freq_factor": 1,
                    "original_max_position_embeddings": 64,
                }
            },
            "low_freq_factor",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"sliding_window": -5}, "sliding_window"),
    ],
)
def test_bad_keys_are_named(tmp_path: Path, edits: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as error:
        config_of(tmp_path, **edits)
    assert named in str(error.value)
    assert "config.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_hostile_json(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(InputError, match=r"config\.json"):
        load_config(tmp_path)


def test_directories_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such model directory"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(MissingFileError, match=r"neither config\.json nor params\.json"):
        load_config(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        load_config(tmp_path / "file")


def test_mistral_params(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(MISTRAL))
    config = load_config(tmp_path)
    assert (config.hidden_size, config.mlp_size, config.head_dim, config.rope.theta) == (64, 112, 16, 1e6)


@pytest.mark.parametrize(("key", "value"), [("moe", {"num_experts": 8}), ("n_heads", 0), ("dim", None)])
def test_bad_mistral_params(tmp_path: Path, key: str, value: Any) -> None:
    (tmp_path / "params.json").write_text(json.dumps(MISTRAL | {key: value}))
    with pytest.raises(InputError, match=key):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("trained", "expected", "bound"),
    [
        (131072, (32, 8192, 256, 512), 16416),
        (32768, (32, 8192, 256, 512), 16416),
        (8192, (32, 4096, 127, 512), 8192),
        (2048, (32, 1024, 31, 512), 2048),
        (256, (4, 128, 3, 128), 228),
    ],
)
def test_defaults_follow_the_trained_context(trained: int, expected: tuple[int, ...], bound: int) -> None:
    c = ReAttentionConfig.for_context(trained)
    assert (c.global_size, c.local_size, c.max_spans, c.chunk_size) == expected
    assert (c.span_top_k, c.span_size, c.span_scope) == (4, 32, "layer")
    assert c.max_scope == c.dense_size == bound <= trained
    assert (c.tail_size, c.tail_chunk_size) == (TAIL_SIZE, TAIL_CHUNK_SIZE)


def test_fields_that_follow_from_others() -> None:
    """The kernels' own call is the paper's: dense as long as nothing can be selected. The engine's fills the scope."""
    direct = ReAttentionConfig(4, 24, max_spans=3)
    assert (direct.chunk_size, direct.tail_chunk_size, direct.dense_size, direct.max_scope) == (24, 8, 28, 28 + 96)
    assert ReAttentionConfig(4, 24, span_top_k=0).max_scope == 28
    assert ReAttentionConfig(4, 24, chunk_size=3).tail_chunk_size == 3
    assert ReAttentionConfig(4, 24, max_spans=0, dense_size=100).max_scope == 100
    assert ReAttentionConfig.for_context(2048, span_top_k=0).dense_size == 32 + 1024
    assert ReAttentionConfig.for_context(2048, max_spans=2).dense_size == 32 + 1024 + 64
    assert ReAttentionConfig.for_context(2048, dense_size=1100).dense_size == 1100


@pytest.mark.parametrize(
    "fields",
    [
        {"global_size": -1},
        {"local_size": 0},
        {"span_top_k": -1},
        {"span_size": 7},
        {"span_size": 0},
        {"max_spans": -1},
        {"chunk_size": 0},
        {"chunk_size": 2000},
        {"span_scope": "head"},
        {"tail_size": -1},
        {"tail_size": True},
        {"tail_chunk_size": 0},
        {"tail_chunk_size": 1025},
        {"dense_size": 1055},
        {"dense_size": 2000.0},
        {"local_size": 1.5},
        {"span_topk": 4},
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(fields))):
        ReAttentionConfig.for_context(2048, **fields)


def test_a_scope_beyond_the_trained_context_is_refused_with_both_numbers() -> None:
    config = ReAttentionConfig.for_context(2048, max_spans=64)
    with pytest.raises(InputError, match=r"3104 .* 2048 .*--allow-out-of-distribution"):
        config.check_fits(2048, "max_position_embeddings")
    with pytest.raises(InputError, match=r"2049 .*dense_size 2049.* 2048 .*--allow-out-of-distribution"):
        ReAttentionConfig.for_context(2048, dense_size=2049).check_fits(2048, "max_position_embeddings")
