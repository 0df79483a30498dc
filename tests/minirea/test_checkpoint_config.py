"""What config.json and params.json may hold: every key's kinds of values, and which model they are."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from testing import TINY

from minirea.checkpoint_config import load_config
from minirea.config import RopeConfig
from minirea.errors import InputError, MinireaWarning, MissingFileError

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


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
EXTREMES = (1e-320, 1e-9, 1e300, 10**400, -1.0, math.inf, math.nan, "32", [1], True)


def nested(depth: int) -> list[Any]:
    """A list in a list in a list, `depth` times."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def config_of(tmp_path: Path, **edits: Any) -> Any:
    values = {key: value for key, value in (HF | edits).items() if value != "absent"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    return load_config(tmp_path)


def test_defaults_of_absent_keys(tmp_path: Path) -> None:
    config = config_of(tmp_path, num_key_value_heads="absent", rms_norm_eps="absent", rope_theta="absent")
    assert (config.num_kv_heads, config.head_dim, config.norm_eps) == (4, 16, 1e-6)
    assert config.rope == RopeConfig()
    assert not (config.tie_word_embeddings or config.qkv_bias or config.o_bias or config.mlp_bias)
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


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("dtype", "bfloat16", "bfloat16"),
        ("torch_dtype", "torch.bfloat16", "bfloat16"),
        ("torch_dtype", "float64", "float32"),  # nothing is computed in float64
        ("dtype", "torch.float64", "float32"),
    ],
)
def test_dtype_keys(tmp_path: Path, key: str, value: str, expected: str) -> None:
    assert config_of(tmp_path, **{key: value}).dtype == expected


def test_end_of_text_ids_outside_the_vocabulary_are_left_out_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(MinireaWarning, match=r"config\.json: eos_token_id 97 is not in the vocabulary"):
        assert config_of(tmp_path, eos_token_id=[2, 97, 10**30]).eos_token_ids == {2}


def test_end_of_text_ids_are_a_union(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert config_of(tmp_path, eos_token_id=2).eos_token_ids == {2, 7, 8}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"eos_token_id": "two"}'])
def test_an_invalid_generation_config_is_no_failure(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.warns(MinireaWarning, match=r"generation_config\.json: .*; the file is ignored"):
        assert config_of(tmp_path, eos_token_id=[2, 3]).eos_token_ids == {2, 3}


def test_trained_context_is_the_window_where_there_is_one(tmp_path: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert config_of(tmp_path).trained_context == 256
    assert config_of(tmp_path, sliding_window=100).trained_context == 256
    assert config_of(tmp_path, **mistral, sliding_window=100).trained_context == 100
    assert config_of(tmp_path, **mistral, sliding_window=1000).trained_context == 256


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        ({"model_type": "llama"}, (2048, 4, None)),
        ({"model_type": "mistral", "num_attention_heads": 8}, (131072, 8, 4096)),
        ({"model_type": "mistral", "num_attention_heads": 8, "num_key_value_heads": None}, (131072, 8, 4096)),
        ({"model_type": "qwen2", "num_attention_heads": 32}, (32768, 32, None)),
    ],
)
def test_defaults_are_those_of_the_family(tmp_path: Path, edits: dict[str, Any], expected: tuple[Any, ...]) -> None:
    absent = {"architectures": "absent", "max_position_embeddings": "absent", "num_key_value_heads": "absent"}
    config = config_of(tmp_path, **absent | edits)
    assert (config.max_position_embeddings, config.num_kv_heads, config.sliding_window) == expected


@pytest.mark.parametrize(
    ("architectures", "model_type", "family"),
    [
        (["LlamaForCausalLM"], "absent", "llama"),
        (["LlamaModel"], "llama", "llama"),
        ([], "mistral", "mistral"),
        (None, "qwen2", "qwen2"),
        ("LlamaForCausalLM", "absent", "llama"),
        (["CustomModel", "Qwen2ForCausalLM"], "custom", "qwen2"),
        (["LlamaForCausalLM"], "mistral", "mistral"),  # by model_type, as transformers chooses
    ],
)
def test_families_by_model_type_and_architectures(
    tmp_path: Path, architectures: Any, model_type: str, family: str
) -> None:
    edits = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0, "attention_bias": True}
    config = config_of(tmp_path, architectures=architectures, model_type=model_type, **edits)
    expected = {"llama": (None, True, True), "mistral": (9, False, False), "qwen2": (9, True, False)}
    assert (config.sliding_window, config.qkv_bias, config.o_bias) == expected[family]


@pytest.mark.parametrize(
    ("edits", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures"),
        ({"architectures": "absent", "model_type": "gpt2"}, "model_type"),
        ({"architectures": []}, "model_type is absent"),
        ({"architectures": [["LlamaForCausalLM"]]}, "architectures"),
        ({"architectures": [{"a": 1}]}, "architectures"),
        ({"architectures": {"a": 1}}, "architectures"),
        ({"architectures": 5}, "architectures is 5"),
        ({"architectures": "absent", "model_type": ["llama"]}, "model_type"),
        ({"architectures": "absent", "model_type": {"llama": 1}}, "model_type"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": "absent"}, "num_hidden_layers is absent"),
        ({"num_hidden_layers": "two"}, 'num_hidden_layers is "two"'),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is true"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"head_dim": 10**6}, "head_dim is 1000000, expected an integer of at least 1 and at most 4096"),
        ({"hidden_size": 2**31}, "hidden_size is 2147483648, expected an integer of at least 1 and at most 2147483647"),
        ({"hidden_size": 2**31 - 1}, "head_dim"),
        ({"num_attention_heads": 128}, "head_dim"),
        *(({"rms_norm_eps": eps}, "rms_norm_eps") for eps in (-1, 0, 1e-100, 1e-300, 5, 10**400, math.inf, math.nan)),
        *(({"rope_theta": theta}, "rope_theta") for theta in (0.5, 1e40, 10**400, math.inf, math.nan, "1e4", [1e4])),
        *(({"rope_scaling": YARN | {"factor": factor}}, "factor") for factor in (0, 1e-9, 1e300, 10**400, -2)),
        *(({"rope_scaling": YARN | {key: beta}}, key) for key in ("beta_fast", "beta_slow") for beta in EXTREMES),
        *(({"rope_scaling": YARN | {"mscale": 1, "mscale_all_dim": beta}}, "mscale_all_dim") for beta in EXTREMES),
        *(({"rope_scaling": YARN | {"attention_factor": beta}}, "attention_factor") for beta in (0, *EXTREMES)),
        ({"rope_scaling": YARN, "rope_theta": 1}, "rope_theta is 1"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 0}}, "original_max_position_embeddings"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2}, "head_dim is 2"),
        ({"rope_scaling": {"type": "dynamic", "factor": 1e300}}, "factor"),
        ({"rope_scaling": {"type": ["yarn"], "factor": 2.0}}, "type"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_parameters": []}, "rope_parameters"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"torch_dtype": "int8"}, "torch_dtype"),
        ({"torch_dtype": ["float32"]}, "torch_dtype"),
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
        ({"sliding_window": -5, "model_type": "mistral"}, "sliding_window"),
        ({"hidden_size": "5" * 10**6}, "hidden_size"),
        ({"hidden_size": nested(900)}, "hidden_size"),
    ],
)
def test_bad_keys_are_named(tmp_path: Path, edits: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as error:
        config_of(tmp_path, **edits)
    assert named in str(error.value)
    assert "config.json" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_hostile_json(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(InputError, match=r"config\.json"):
        load_config(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "params.json"])
@pytest.mark.parametrize(
    ("make", "found"),
    [
        (os.mkfifo, "is a named pipe"),
        (Path.mkdir, "is a directory"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device"),
        (lambda path: path.symlink_to("gone"), "is a link to gone, which is not there"),
        (lambda path: path.write_bytes(b" " * (2**24 + 1)), "holds more than 16,777,216 bytes"),
    ],
)
def test_configs_that_are_no_files(tmp_path: Path, name: str, make: Any, found: str) -> None:
    make(tmp_path / name)
    with pytest.raises((InputError, MissingFileError), match=rf"{name}: {found}"):
        load_config(tmp_path)


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "is a named pipe"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device"),
    "directory": (Path.mkdir, "is a directory"),
    "link to nothing": (lambda path: path.symlink_to("gone"), "is a link to gone, which is not there"),
    "link to itself": (lambda path: path.symlink_to(path.name), "cannot be read: Too many levels of symbolic links"),
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_a_generation_config_that_is_no_file_is_a_warning(tmp_path: Path, kind: str) -> None:
    make, found = NO_FILES[kind]
    make(tmp_path / "generation_config.json")
    with pytest.warns(MinireaWarning, match=rf"generation_config\.json: {found}.*; the file is ignored"):
        assert config_of(tmp_path, eos_token_id=[2, 3]).eos_token_ids == {2, 3}


@pytest.mark.parametrize("kind", NO_FILES)
def test_a_tokenizer_config_that_is_no_file_says_no_length(tmp_path: Path, kind: str) -> None:
    """The tokenizer itself refuses it."""
    NO_FILES[kind][0](tmp_path / "tokenizer_config.json")
    assert config_of(tmp_path, max_position_embeddings=None).max_position_embeddings == 2048


@pytest.mark.parametrize("directory", ["x" * 5000, "x/" * 3000, "a\0b", "\x1b[31mred"])
def test_names_that_no_directory_has(tmp_path: Path, directory: str) -> None:
    with pytest.raises((InputError, MissingFileError)) as error:
        load_config(tmp_path / directory)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 2000


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_directory(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir(mode=0)
    for directory in (tmp_path / "model", tmp_path / "model" / "inside"):
        with pytest.raises(InputError, match="Permission denied"):
            load_config(directory)


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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("moe", {"num_experts": 8}), ("n_heads", 0), ("dim", None), ("max_seq_len", "long"), ("max_seq_len", [1])),
        *(("norm_eps", 1e-100), ("rope_theta", 10**400), ("head_dim", 2**31), ("sliding_window", {}), ("dim", [])),
    ],
)
def test_bad_mistral_params(tmp_path: Path, key: str, value: Any) -> None:
    (tmp_path / "params.json").write_text(json.dumps(MISTRAL | {key: value}))
    with pytest.raises(InputError, match=key):
        load_config(tmp_path)
