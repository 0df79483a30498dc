"""How the CPU's threads wait and how many there are: the command decides, a program's own state is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from testing import tiny_model, write_checkpoint, write_tokenizer

from minirea.cli import main
from minirea.cpu_steps import CpuDecodeStep
from minirea.model import Model
from minirea.threads import limited_to, thread_pool, wait_asleep

WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(write_checkpoint(tmp_path_factory.mktemp("model"), tiny_model()))


def generate(model: Path, *arguments: str) -> list[str]:
    return ["generate", "--model", str(model), "--text", "Hello", "--max-tokens", "2", *arguments]


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP tells its settings, others differ")
@pytest.mark.parametrize(("given", "spins"), [({}, "0"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_threads_of_the_command_sleep_unless_the_environment_says_otherwise(
    model: Path, given: dict[str, str], spins: str
) -> None:
    """What OpenMP itself says that it read, when torch started it."""
    environment = {name: value for name, value in os.environ.items() if name not in WAIT_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-m", "minirea", *generate(model)],
        env=environment | given | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


def test_what_the_environment_says_counts() -> None:
    for name in WAIT_VARIABLES:
        environment = {name: "1"}
        wait_asleep(environment)
        assert environment == {name: "1"}


def test_number_of_threads_holds_for_the_command_only(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen, environment = torch.get_num_threads(), [], dict(os.environ)

    def count(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def counting(*args: Any, **options: Any) -> Any:
            seen.append(torch.get_num_threads())
            return function(*args, **options)

        monkeypatch.setattr(owner, name, counting)

    count(Model, "read")
    count(Model, "forward")
    count(CpuDecodeStep, "run")
    for threads in (1, os.cpu_count()):
        seen.clear()
        assert main(generate(model, "--threads", str(threads))) == 0
        assert set(seen) == {threads}
        assert torch.get_num_threads() == before
    assert dict(os.environ) == environment


@pytest.mark.parametrize("threads", [0, -1, 10**6, 10**30])
def test_impossible_numbers_of_threads(model: Path, threads: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(generate(model, "--threads", str(threads))) == 1
    assert f"--threads is {threads}, expected 1 to" in capsys.readouterr().err


def test_threads_come_back_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), limited_to(1):
        raise RuntimeError
    assert torch.get_num_threads() == before


def test_a_pool_outlasts_repeated_ctrl_c() -> None:
    """The second and the third strike while the main thread waits for the pool's to end."""
    interrupts, submitted = threading.Semaphore(0), threading.Event()
    done: list[int] = []

    def interrupt(*_: object) -> None:
        interrupts.release()
        raise KeyboardInterrupt

    def work(number: int) -> None:
        submitted.wait()
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            while not interrupts.acquire(timeout=0.1):  # a signal during a handler may go unseen until the next one
                os.kill(os.getpid(), signal.SIGINT)
            while signal.getsignal(signal.SIGINT) is interrupt:
                time.sleep(0.001)
        done.append(number)

    def run() -> None:
        with thread_pool(1, "worker") as pool:
            results = pool.map(work, range(3))
            submitted.set()
            list(results)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            run()
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == [0]  # what had begun is finished, the rest is dropped
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("worker")]


IN_FORKED_PROCESSES = """
import os, threading, torch
from minirea.threads import thread_pool

torch.ones(100_000).aminmax()
for _ in range(20):
    child = os.fork()
    if not child:
        begin = threading.Barrier(8)

        def compute(_):
            begin.wait()
            torch.ones(1000).aminmax()

        status = 1
        try:
            with thread_pool(8, "compute") as pool:
                list(pool.map(compute, range(8)))
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_threads_of_a_pool_compute_at_once_in_a_forked_process() -> None:
    """torch renews its own threads there."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", IN_FORKED_PROCESSES], check=True, env=environment)
