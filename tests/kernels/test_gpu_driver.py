"""Launches through libcuda on a GPU: next to Triton's own, in graphs, on streams, in threads, and when they fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from minirea.errors import CudaError  # noqa: E402
from minirea.kernels import driver  # noqa: E402

pytestmark = pytest.mark.gpu
HAS_COMPILER = (
    bool(shutil.which("cc") or shutil.which("gcc")) and Path(sysconfig.get_path("include"), "Python.h").is_file()
)
BLOCK = 1024


@triton.jit
def add_number(x_ptr, number, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs, mask=offs < n) + number, mask=offs < n)


@triton.jit
def add_program(counter_ptr):
    """Waits for all programs, so all must run at once."""
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < tl.num_programs(0):
        pass


@triton.jit
def product(a_ptr, b_ptr, out_ptr, K: tl.constexpr):
    """[128, K] times [K, 128], with three stages of 32 KiB in shared memory."""
    m, k = tl.arange(0, 128)[:, None], tl.arange(0, 64)
    acc = tl.zeros([128, 128], tl.float32)
    for start in tl.range(0, K, 64, num_stages=4):
        a = tl.load(a_ptr + m * K + start + k[None, :])
        b = tl.load(b_ptr + (start + k)[:, None] * 128 + tl.arange(0, 128)[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(out_ptr + m * 128 + tl.arange(0, 128)[None, :], acc)


def add(x: torch.Tensor, number: float, device: torch.device | None = None) -> None:
    arguments = (x, number, x.numel())
    driver.launch(add_number, triton.cdiv(x.numel(), BLOCK), device or x.device, arguments, {"BLOCK": BLOCK})


@pytest.mark.skipif(not HAS_COMPILER, reason="Triton's own driver needs a C compiler and Python's headers")
@pytest.mark.filterwarnings("ignore")  # of torch.compile
def test_a_programs_own_kernels_keep_their_driver() -> None:
    """A Triton kernel and a compiled function run before and after ours, by the driver that Triton chose."""
    x, y = torch.zeros(3000, device="cuda"), torch.zeros(3000, device="cuda")
    compiled = torch.compile(lambda t: t * 2 + 1)
    add_number[(3,)](y, 1.0, 3000, BLOCK=BLOCK, enable_fp_fusion=True)
    theirs = triton.runtime.driver.active
    assert torch.equal(compiled(y), y * 2 + 1)
    for _ in range(3):
        add(x, 2.5)
        add_number[(3,)](y, 1.0, 3000, BLOCK=BLOCK, enable_fp_fusion=True)
        assert torch.equal(compiled(y + 1), (y + 1) * 2 + 1)
    assert triton.runtime.driver.active is theirs
    assert type(theirs).__module__.startswith("triton.")
    assert torch.equal(x, torch.full_like(x, 7.5))
    assert torch.equal(y, torch.full_like(y, 4.0))


def test_a_graph_replays_a_launch() -> None:
    x = torch.zeros(5000, device="cuda")
    add(x, 0.0)  # loads the code, as a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add(x, 3.0)
        add(x, 0.5)
    assert not x.any()
    for _ in range(3):
        graph.replay()
    assert torch.equal(x, torch.full_like(x, 10.5))


def test_a_launch_is_on_the_current_stream() -> None:
    """What it adds to is copied on that stream, after long work on it; another stream would read it too early."""
    x, big = torch.zeros(5000, device="cuda"), torch.randn(4096, 4096, device="cuda")
    add(x, 0.0)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    targets = []
    for number, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            target = torch.zeros_like(x)
            for _ in range(20):
                big @ big
            target.fill_(1.0)
            add(target, number + 1.0)
            targets.append(target.clone())
    torch.cuda.synchronize()
    for number, target in enumerate(targets):
        assert torch.equal(target, torch.full_like(x, number + 2.0))


def test_threads_launch_at_once() -> None:
    """Threads that have made no call of CUDA before, each with numbers of its own."""
    tensors = [torch.zeros(5000, device="cuda") for _ in range(6)]
    torch.cuda.synchronize()

    def run(x: torch.Tensor, number: int) -> None:
        for _ in range(300):
            add(x, float(number))

    threads = [threading.Thread(target=run, args=(x, number)) for number, x in enumerate(tensors)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for number, x in enumerate(tensors):
        assert torch.equal(x, torch.full_like(x, 300.0 * number))


def test_memory_of_the_host_is_reached_where_it_is_pinned() -> None:
    x = torch.zeros(5000).pin_memory()
    add(x, 2.0, torch.device("cuda", torch.cuda.current_device()))
    torch.cuda.synchronize()
    assert torch.equal(x, torch.full_like(x, 2.0))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_launch_is_on_the_device_of_its_tensors() -> None:
    tensors = [torch.zeros(5000, device=f"cuda:{index}") for index in range(2)]
    for x in tensors:
        add(x, 1.5)
    assert torch.cuda.current_device() == 0
    for x in tensors:
        assert torch.equal(x, torch.full_like(x, 1.5))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_made_the_only_one() -> None:
    """The second GPU, as the first that the process can see."""
    plugins = ["-p", "no:cacheprovider", "-p", "no:benchmark"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, "-k", "graph or threads", __file__]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert "2 passed" in run.stdout


def test_more_shared_memory_than_every_kernel_has() -> None:
    a, b = torch.randn(128, 512, device="cuda").half(), torch.randn(512, 128, device="cuda").half()
    out = torch.empty(128, 128, device="cuda")
    driver.launch(product, 1, a.device, (a, b, out), {"K": 512, "num_warps": 8})
    exact = a.double() @ b.double()
    assert (out - exact).abs().max() <= 1e-3 * exact.abs().max()


def test_programs_that_do_not_fit_together_are_refused() -> None:
    """By name, before any of them runs; the GPU is as before."""
    counter = torch.zeros(1, dtype=torch.int32, device="cuda")
    options = {"launch_cooperative_grid": True}
    driver.launch(add_program, 4, counter.device, (counter,), options)
    assert int(counter) == 4
    with pytest.raises(CudaError, match="too many blocks in cooperative launch") as raised:
        driver.launch(add_program, 1_000_000, counter.device, (counter,), options)
    assert raised.value.name == "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE"
    counter.zero_()
    driver.launch(add_program, 4, counter.device, (counter,), options)
    assert int(counter) == 4
