"""Damaged model directories work or are refused with one line; see run.py, which tries any number of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_damaged_directories() -> None:
    command = [sys.executable, str(Path(__file__).parent / "run.py"), "--cases", "300", "--seed", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RUST_BACKTRACE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
