"""What importing the kernels does and does not do, each time in a process where they are not yet imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def compiled(code: str) -> subprocess.CompletedProcess[str]:
    """A process of its own where kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_triton_on_a_cpu_without_the_interpreter_is_refused() -> None:
    code = (
        "import torch; from minirea.kernels import *\n"
        "x = torch.zeros(1, 2, 4); k = torch.zeros(1, 9, 4); t = torch.zeros(9, 2)\n"
        "reattention(x, k, k, 9, t, t, ReAttentionConfig(1, 2), impl='triton')"
    )
    run = compiled(code)
    assert "InputError: the tensors are on cpu, expected a CUDA device" in run.stderr


def test_what_compiles_first_does_not_decide_where_kernels_are_kept() -> None:
    """Both are hashed when the module is there, before a thread can be the first to use one of them."""
    code = (
        "import importlib\n"
        "module = importlib.import_module('minirea.kernels.fused.launch')\n"
        "print([bool(kernel.hash) for kernel in (module.decode_kernel, module.chunk_kernel)])\n"
    )
    run = compiled(code)
    assert run.stdout == "[True, True]\n", run.stderr[-2000:]
