"""tools/convert_gguf.py on a tiny GGUF file, and the book of tools/real_model.sh."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from testing import tiny_model

import minirea
from minirea.errors import InputError

gguf = pytest.importorskip("gguf")
import convert_gguf  # noqa: E402  needs gguf
import make_book  # noqa: E402

DEMO = Path(__file__).parent.parent.parent / "weights" / "demo"
WORDS = ["<|end|>", "<|user|>", *"abcdefgh0123456789 "]
WORDS[-1] = "Ġ"  # a space, in the spelling of byte-level BPE
MERGES = ["a b", "ab c"]
THETA = 50000.0


def interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """A query or key matrix as llama.cpp has it: rows i and i + D/2 of a head are its rows 2i and 2i + 1."""
    first, second = rows.unflatten(0, (heads, 2, -1)).unbind(1)
    return torch.stack((first, second), 2).flatten(0, 2)


def write_gguf(path: Path, model: torch.nn.Module, change: Callable[[Any], None] = lambda _: None) -> None:
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(THETA)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*WORDS, "ab", "abc"])
    writer.add_token_types([3, 3] + [1] * len(WORDS))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}")
    ours = {f"{name}.weight": key for key, name in convert_gguf.MODEL.items()}
    for name, tensor in model.state_dict().items():
        *_, block, kind = name.split(".", 3) if ".layers." in name else ("", "", name)
        layer = {f"{hf}.weight": key for key, hf in convert_gguf.LAYER.items()}
        if block:
            key = layer[kind]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(key)
            tensor = interleaved(tensor, heads) if heads else tensor
            writer.add_tensor(f"blk.{block}.{key}.weight", tensor.numpy().astype(np.float32))
        else:
            writer.add_tensor(f"{ours[kind]}.weight", tensor.numpy().astype(np.float32))
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def model() -> torch.nn.Module:
    return tiny_model(vocab_size=len(WORDS) + 2, rope_parameters={"rope_type": "default", "rope_theta": THETA})


def test_a_converted_model_is_the_one_that_was_written(tmp_path: Path, model: torch.nn.Module) -> None:
    """Its tensors, and what it generates; its tokens, with digits one by one; its chat."""
    write_gguf(tmp_path / "tiny.gguf", model)
    convert_gguf.convert(tmp_path / "tiny.gguf", tmp_path / "model")
    found = load_file(tmp_path / "model" / "model.safetensors")
    expected = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    llm = minirea.load(tmp_path / "model", device="cpu")
    assert llm.config.rope.theta == THETA
    ids = llm.tokenizer.encode("abc 12")
    assert llm.tokenizer.decode(ids) == "abc 12"
    assert ids == [len(WORDS) + 1, WORDS.index("Ġ"), WORDS.index("1"), WORDS.index("2")]
    assert llm.tokenizer.encode_chat([{"role": "user", "content": "a"}]) == [1, 2]
    assert llm.eos_ids == {0}
    model.load_state_dict({name: tensor.float() for name, tensor in expected.items()})
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(llm.logits(ids), logits, atol=1e-4, rtol=0)


def test_what_cannot_be_converted_is_refused_by_name(tmp_path: Path, model: torch.nn.Module) -> None:
    cases: dict[str, Callable[[Any], None]] = {
        "tokenizer.ggml.pre is 'qwen2', expected 'gpt-2' or 'smollm'": lambda w: w.kv_data[0].update(
            {"tokenizer.ggml.pre": gguf.GGUFValue("qwen2", gguf.GGUFValueType.STRING)}
        ),
        "llama.rope.scaling.type is 'yarn'": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
        "tensor blk.0.attn_q.bias": lambda w: w.add_tensor("blk.0.attn_q.bias", np.zeros(4, np.float32)),
        "general.architecture is 'mamba', expected 'llama'": lambda w: w.kv_data[0].update(
            {"general.architecture": gguf.GGUFValue("mamba", gguf.GGUFValueType.STRING)}
        ),
        "has no llama.context_length": lambda w: w.kv_data[0].pop("llama.context_length"),
    }
    for index, (message, change) in enumerate(cases.items()):
        write_gguf(tmp_path / f"{index}.gguf", model, change)
        with pytest.raises(InputError) as caught:
            convert_gguf.convert(tmp_path / f"{index}.gguf", tmp_path / "model")
        assert message in str(caught.value)
        assert not list(tmp_path.glob("model*"))
    whole = (tmp_path / "0.gguf").read_bytes()
    for name, content in (("cut", whole[:500]), ("empty", b""), ("text", b"no model")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="no readable GGUF file"):
            convert_gguf.convert(tmp_path / name, tmp_path / "model")
    with pytest.raises(InputError, match="is there already"):
        convert_gguf.convert(tmp_path / "0.gguf", tmp_path)


def test_command_tells_errors_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [convert_gguf.__file__, str(tmp_path / "missing.gguf"), str(tmp_path / "model")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        convert_gguf.main()
    assert stop.value.code == 1
    assert capsys.readouterr().err == f"convert_gguf.py: error: {tmp_path / 'missing.gguf'}: no such file\n"


def test_a_book_that_cannot_be_made_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for model, tokens, file, found in (
        (tmp_path / "missing", "100", "book.txt", "missing: no such model directory"),
        (DEMO, "0", "book.txt", "tokens is 0"),
        (DEMO, "100", "missing/book.txt", "cannot be written"),
    ):
        monkeypatch.setattr(sys, "argv", [make_book.__file__, str(model), tokens, str(tmp_path / file)])
        with pytest.raises(SystemExit) as stop:
            make_book.main()
        assert stop.value.code == 1
        err = capsys.readouterr().err
        assert err.startswith("make_book.py: error: ") and found in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_book_has_its_length_its_fact_and_its_question() -> None:
    tokenizer = minirea.tokenizer.load_tokenizer(DEMO)
    for tokens in (1000, 5000):
        text = make_book.book(DEMO, tokens)
        assert 0.7 * tokens < len(tokenizer.encode(text)) < tokens + 100
        assert text.endswith(f"\n\n{make_book.QUESTION}")
        assert 0.3 < text.index(make_book.FACT) / len(text) < 0.5
        assert make_book.ANSWER in make_book.FACT
