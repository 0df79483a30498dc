"""tools/make_checkpoint.py writes what other readers read, and what minirea runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import make_checkpoint
import pytest
import torch
from safetensors.torch import load_file
from shapes import named

import minirea

SHAPE = named("demo", layers=2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tied", [True, False])
def test_other_readers_read_it(tmp_path: Path, tied: bool, dtype: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = SHAPE | {"tie_word_embeddings": tied}
    nbytes = make_checkpoint.write_checkpoint(tmp_path, config, dtype, shard_bytes=1_500_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    tensors = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert sum(tensor.nbytes for tensor in tensors.values()) == nbytes
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name: path.name for path in files for name in load_file(path)} == index
    expected = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).state_dict()
    if tied:
        del expected["lm_head.weight"]
    assert {name: t.shape for name, t in tensors.items()} == {name: t.shape for name, t in expected.items()}
    for name, tensor in tensors.items():
        assert tensor.dtype == getattr(torch, dtype)
        if tensor.dim() == 1:
            assert (tensor == 1).all(), name
        else:
            assert 0.015 < tensor.float().std() < 0.025, name
            assert len(tensor.float().unique(dim=0)) == len(tensor), name


def test_minirea_runs_it(tmp_path: Path) -> None:
    make_checkpoint.write_checkpoint(tmp_path, SHAPE, "bfloat16", shard_bytes=10**9)
    out = minirea.load(tmp_path, device="cpu").generate("Any text é", max_tokens=5, ignore_eos=True)
    assert len(out.token_ids) == 5


def test_a_directory_in_use_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    arguments: list[Any] = ["make_checkpoint.py", "--shape", "demo", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit):
        make_checkpoint.main()
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
