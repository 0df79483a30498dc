"""The plan of a run is what the run then takes, and what does not fit is refused before it is read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from testing import random_ids, tiny_model, write_checkpoint, write_tokenizer

from minirea import api, memory
from minirea.cli import main
from minirea.errors import MemoryLimitError
from minirea.plan import plan_run, workspace_bytes

SCOPE: dict[str, Any] = {"global_size": 4, "local_size": 24, "span_size": 8, "max_spans": 4, "chunk_size": 16}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_checkpoint(tmp_path_factory.mktemp("model"), tiny_model(), torch.bfloat16)
    write_tokenizer(directory)
    return directory


@pytest.mark.parametrize("attention", ["reattention", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_and_cache_are_what_is_allocated(tmp_path: Path, tied: bool, dtype: str, attention: str) -> None:
    write_checkpoint(tmp_path, tiny_model(tie_word_embeddings=tied), torch.bfloat16)
    files = api.read_model(tmp_path, device="cpu", dtype=dtype, attention=attention, **SCOPE)
    plan = plan_run(tmp_path, files.attention, files.dtype, 77)
    llm = files.load(num_tokens=77)
    assert plan.weights == llm.model.nbytes
    assert plan.cache == llm.session(77).cache.nbytes
    assert plan.num_tokens == 77


def test_what_does_not_fit_is_refused_before_weights_are_read(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = api.read_model(directory, device="cpu", **SCOPE)
    needed = plan_run(directory, files.attention, files.dtype)
    monkeypatch.setattr(memory, "available_bytes", lambda _: needed.weights + needed.loading - 1)
    monkeypatch.setattr(api, "load_weights", lambda *_: pytest.fail("read"))
    with pytest.raises(MemoryLimitError, match=r"for weights and .* to work in, .* use a smaller `dtype`"):
        api.load(directory, device="cpu", **SCOPE)


def test_command_line_counts_the_prompt_first(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights alone would fit; with the cache of this prompt they do not, and nothing is read."""
    arguments = ["generate", "--model", str(directory), "--device", "cpu", "--text", "a" * 1000, "--max-tokens", "24"]
    options = ["--local-size", "24", "--global-size", "4", "--max-spans", "4", "--span-size", "8", "--chunk-size", "16"]
    files = api.read_model(directory, device="cpu", **SCOPE)
    plan = plan_run(directory, files.attention, files.dtype, 1024)
    room = plan.weights + plan.cache + plan.workspace
    assert plan.loading < plan.cache + plan.workspace
    monkeypatch.setattr(memory, "available_bytes", lambda _: room - 1)
    with monkeypatch.context() as patch:
        patch.setattr(api, "load_weights", lambda *_: pytest.fail("read"))
        assert main([*arguments, *options]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("minirea: error: not enough memory on cpu: needs ")
    assert err.endswith("shorten the prompt or lower --max-tokens: about 1,023 of 1,024 tokens fit\n")
    monkeypatch.setattr(memory, "available_bytes", lambda _: room)
    assert main([*arguments, *options, "--quiet", "--ignore-eos"]) == 0


def test_a_step_that_can_be_captured_reads_several_chunks(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = api.read_model(directory, device="cpu", **SCOPE).attention
    assert not attention.can_capture
    assert attention.step_tokens(16) == 16
    one_chunk = workspace_bytes(attention, torch.float32, 1000)
    monkeypatch.setattr(type(attention), "can_capture", True)
    assert attention.step_tokens(16) == 64
    assert attention.step_tokens(8) == 32  # of a tail
    assert workspace_bytes(attention, torch.float32, 1000) > one_chunk
    for chunk_size, tokens in ((512, 2048), (1000, 2000), (1500, 1500), (5000, 5000)):
        attention.config = dataclasses.replace(
            attention.config, local_size=8192, chunk_size=chunk_size, dense_size=None
        )
        assert attention.step_tokens(chunk_size) == tokens


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_workspace_on_a_gpu_is_an_upper_bound(directory: Path, impl: str) -> None:
    files = api.read_model(directory, impl=impl, **SCOPE)
    plan = plan_run(directory, files.attention, files.dtype, 1000)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    files.load().generate(random_ids(900), max_tokens=100, ignore_eos=True)
    assert torch.cuda.max_memory_allocated() - before <= plan.weights + plan.cache + plan.workspace
