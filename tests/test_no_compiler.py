"""minirea on a machine without a C compiler: PATH is empty, CC is unset, and no kernel has been compiled before."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from testing import tiny_model, write_checkpoint, write_tokenizer

from minirea.cli.parser import make_parser

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "weights" / "demo"
NEEDLE = DEMO / "prompts" / "needle-16k.txt"
# pytest-benchmark, where it is installed, refuses to start in a worker of pytest-xdist.
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark")


def bare(tmp_path: Path, *command: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    """Runs Python where it finds no program by its name, and no home directory either; `typed` is its input."""
    hidden = ("CC", "CXX", "CUDA_HOME", "HOME", "CPATH", "C_INCLUDE_PATH")
    # pytest's own variables would tell an inner pytest that it is a worker of the outer one.
    environment = {k: v for k, v in os.environ.items() if k not in hidden and not k.startswith("PYTEST_")}
    environment |= {"PATH": "", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    return subprocess.run(
        [sys.executable, *command], env=environment, input=typed, capture_output=True, text=True, cwd=ROOT
    )


def test_every_command(tmp_path: Path) -> None:
    """One after another, in one process, the first with the demo; a command that is new has to be added here."""
    model = write_checkpoint(tmp_path / "model", tiny_model())
    write_tokenizer(model, chat_template="{% for m in messages %}<s>[{{ m.content }}]{% endfor %}")
    (tmp_path / "text.txt").write_text("It was a quiet day in the harbour. " * 5)
    files = {name: str(tmp_path / name) for name in ("text.txt", "kept", "why", "out", "all", "q.jsonl")}
    (tmp_path / "q.jsonl").write_text('{"id": 1, "prompt": "Who?"}\n')
    sampling = ["--max-tokens", "3"]
    sizes = ["--depths", "2", "--samples", "1", "--lengths", "500"]
    commands = {
        "generate": ["--text", "The old house", "--temperature", "1", "--seed", "1", *sampling],
        "read": ["--prompt", files["text.txt"], "--save", files["kept"]],
        "generate after a context": ["--context", files["kept"], "--questions", files["q.jsonl"], *sampling],
        "explain": ["--prompt", files["text.txt"], "--out", files["why"], *sampling],
        "chat": sampling,
        "eval needle": sizes,
        "eval report": [files["out"]],
    }
    known = next(action.choices for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction))
    assert {name.split()[0] for name in commands} == set(known)
    lines = [
        [*(name.removesuffix(" after a context").split()), *arguments]
        + ([] if name == "eval report" else ["--device", "cpu", "--quiet"])
        + ([] if name == "eval report" else ["--model", str(DEMO if name == "generate" else model)])
        + (["--out", files["all" if name == "eval report" else "out"]] if name.startswith("eval") else [])
        for name, arguments in commands.items()
    ]
    code = "import json, sys; from minirea.cli import main; print([main(line) for line in json.loads(sys.argv[1])])"
    run = bare(tmp_path, "-c", code, json.dumps(lines), typed="Hello\n/sources\n/stats\n")
    assert run.returncode == 0 and run.stdout.splitlines()[-1] == str([0] * len(lines)), run.stdout + run.stderr[-2000:]
    assert (tmp_path / "why" / "page.html").exists() and (tmp_path / "all" / "summary.json").exists()


def test_help(tmp_path: Path) -> None:
    run = bare(tmp_path, "-m", "minirea", "--help")
    assert (run.returncode, run.stdout[:14]) == (0, "usage: minirea"), run.stderr[-2000:]


def test_a_part_of_the_suite(tmp_path: Path) -> None:
    suite = ["tests/minirea/test_memory.py", "tests/kernels/test_reference.py", "tests/minirea/test_sampling.py"]
    options = [
        "-m",
        "not gpu and not slow",
        "-k",
        "not random_shapes and not property and not earlier_layers and not transformers",
    ]
    run = bare(tmp_path, *PYTEST, *options, *suite)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


@pytest.mark.gpu
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
def test_a_part_of_the_gpu_suite(tmp_path: Path) -> None:
    suite = [str(path) for path in sorted(ROOT.glob("tests/kernels/test_gpu_*.py"))]
    command = (*PYTEST, "-m", "gpu", "-k", "driver or matvec or rows", *suite)
    run = bare(tmp_path, *command)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
