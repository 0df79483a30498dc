"""minirea on a machine without a C compiler: PATH is empty, CC is unset, and no kernel has been compiled before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "weights" / "demo"
NEEDLE = DEMO / "prompts" / "needle-16k.txt"


def bare(tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs Python where it finds no program by its name, and no home directory either."""
    hidden = ("CC", "CXX", "CUDA_HOME", "HOME", "CPATH", "C_INCLUDE_PATH")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"PATH": "", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=ROOT)


def test_commands(tmp_path: Path) -> None:
    for arguments, expected in (
        (("--help",), "usage: minirea"),
        (("generate", "--model", str(DEMO), "--text", "The old house", "--max-tokens", "3", "--device", "cpu"), ""),
        (("eval", "--help"), "usage: minirea eval"),
    ):
        run = bare(tmp_path, "-m", "minirea", *arguments)
        assert run.returncode == 0, run.stderr[-2000:]
        assert run.stdout.startswith(expected) and run.stdout


def test_a_part_of_the_suite(tmp_path: Path) -> None:
    suite = ["tests/minirea/test_cache.py", "tests/kernels/test_reference.py", "tests/minirea/test_sampling.py"]
    suite = [name for name in suite if (ROOT / name).is_file()]
    run = bare(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu and not slow", *suite)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_demo_on_a_gpu(tmp_path: Path) -> None:
    """A first start: every kernel is compiled. The answer is the one that the prompt hides."""
    run = bare(
        tmp_path, "-m", "minirea", "generate", "--model", str(DEMO), "--prompt", str(NEEDLE), "--max-tokens", "12"
    )
    assert run.returncode == 0, run.stderr[-2000:]
    answer = run.stdout.strip().split(".")[0]
    assert answer.isdigit() and f" is {answer}." in NEEDLE.read_text()
    assert list((tmp_path / "cache").rglob("*.cubin"))
    assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_part_of_the_gpu_suite(tmp_path: Path) -> None:
    suite = [str(path) for path in sorted(ROOT.glob("tests/kernels/test_gpu_*.py"))]
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "-k", "driver or matvec or rows", *suite)
    run = bare(tmp_path, *command)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
