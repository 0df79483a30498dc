"""Run by test_driver.py in a process of its own, where libcuda is a stub: launches by Triton's own driver and by ours.

Its argument names a function below, whose result it prints as JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.backends.nvidia.driver import CudaDriver
from triton.language.extra.cuda import gdc_wait

from minirea.errors import CudaError, InputError
from minirea.kernels import driver

STREAM = 0x7F0000001234  # of the first device, and one more of the second
PRIMARY = 0x100, 0x200  # contexts of the devices
LOG = Path(os.environ["STUB_CUDA_LOG"])
stub = ctypes.CDLL("libcuda.so.1")


class Matrix(NamedTuple):
    ptr: Any
    stride_m: Any
    stride_n: Any


@dataclass(frozen=True)
class Sizes:
    BLOCK: int
    PRECISION: str


@triton.jit(do_not_specialize=["steps"])
def every_kind(a, out_ptr, bias_ptr, n, steps, eps, small, large, negative, huge, flag, nothing, c: tl.constexpr):
    """Uses all that it is given, so that nothing is optimized away."""
    offs = tl.arange(0, c.BLOCK)
    x = tl.load(a.ptr + offs * a.stride_m + offs * a.stride_n, mask=offs < n, other=0.0).to(tl.float32) + eps
    if nothing is None:
        x += tl.load(bias_ptr + offs).to(tl.float32)
    x += (steps + small + negative).to(tl.float32) + large.to(tl.float32) + huge.to(tl.float32)
    tl.store(out_ptr + offs, tl.where(flag, x, 0.0).to(out_ptr.dtype.element_ty))


@triton.jit
def product(a_ptr, b_ptr, out_ptr, N: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr):
    """So large that it needs more shared memory than every kernel may have."""
    m, k = tl.arange(0, 128)[:, None], tl.arange(0, 64)
    acc = tl.zeros([128, N], tl.float32)
    for start in tl.range(0, K, 64, num_stages=STAGES):
        a = tl.load(a_ptr + m * K + start + k[None, :])
        b = tl.load(b_ptr + (start + k)[:, None] * N + tl.arange(0, N)[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(out_ptr + m * N + tl.arange(0, N)[None, :], acc)


@triton.jit(do_not_specialize=["number"])
def store(out_ptr, number):
    tl.store(out_ptr, number)


@triton.jit
def copy(x_ptr, out_ptr, EARLY: tl.constexpr):
    if EARLY:
        gdc_wait()
    tl.store(out_ptr + tl.arange(0, 256), tl.load(x_ptr + tl.arange(0, 256)))


def arguments_of_every_kind() -> list[tuple[Any, ...]]:
    x, half = torch.zeros(4096), torch.zeros(4096, dtype=torch.bfloat16)
    c = Sizes(64, "tf32")
    tail = (0.1, 3, 2**40, -16, 2**63 + 5, True)
    return [
        ((Matrix(x, 64, 1), x, half, 100, 7, *tail, None), {"c": c}),
        ((Matrix(half[1:], 63, 1), x[4:], half[8:], 1, 1, *tail, None), {"c": c}),
        ((Matrix(half, 2**33, 16), half, x, 2**31, 16, 1e-30, 1, 2**31, -(2**31), 2**63, False, 5), {"c": c}),
        ((Matrix(half, 1, 1), half, x, 16, -3, -2.5, -7, -(2**40), -1, 2**64 - 1, False, None), {"c": c}),
        *(((Matrix(half, tl.constexpr(stride), 1), half, x, 16, -3, *tail, None), {"c": c}) for stride in (0, 5)),
    ]


Case = tuple[triton.JITFunction, tuple[Any, ...], dict[str, Any]]  # a kernel, arguments, constants


def cases() -> list[Case]:
    x, half = torch.zeros(65536), torch.zeros(65536, dtype=torch.float16)
    return [
        *((every_kind, arguments, constants) for arguments, constants in arguments_of_every_kind()),
        (product, (half, half, x), {"N": 128, "K": 512, "STAGES": 3, "num_warps": 8, "launch_cooperative_grid": True}),
        (copy, (x, half), {"EARLY": True, "launch_pdl": True, "num_warps": 2}),
        (copy, (x, half), {"EARLY": False, "launch_pdl": True, "launch_cooperative_grid": True}),
        (copy, (half, x), {"EARLY": False, "num_ctas": 2}),
        (copy, (half,), {"EARLY": False, "out_ptr": x}),
        (copy, (), {"num_warps": 4, "out_ptr": x, "EARLY": False, "x_ptr": half}),
    ]


def set_up_torch() -> None:
    """As torch is on a machine with two GPUs, the first of which is current."""
    current = [0]

    def choose(index: int) -> None:
        current[0] = index
        stub.cuCtxSetCurrent(ctypes.c_void_p(PRIMARY[index]))

    @contextlib.contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        before = current[0]
        choose(wanted.index)
        yield
        choose(before)

    torch.cuda.device = device
    torch.cuda.current_device = lambda: current[0]
    torch.cuda.get_device_capability = lambda _=None: (9, 0)
    torch._C._cuda_getCurrentRawStream = lambda index: STREAM + index


def set_up_triton() -> None:
    """Its own driver, which it builds with a C compiler."""
    theirs = CudaDriver()
    theirs.get_current_device = lambda: 0
    theirs.get_current_stream = lambda _: STREAM
    theirs.get_device_capability = lambda _: (9, 0)
    triton.runtime.driver.set_active(theirs)


def recorded(run: Callable[[], Any]) -> list[str]:
    """What the stub is asked to do meanwhile."""
    before = len(LOG.read_text().splitlines()) if LOG.exists() else 0
    run()
    return LOG.read_text().splitlines()[before:] if LOG.exists() else []


def param_sizes(ptx: str) -> list[int]:
    """Bytes of each parameter of a kernel, from its assembly."""
    entry = ptx[ptx.index(".entry") : ptx.index(")", ptx.index(".entry"))]
    return [int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", entry)]


def ours(kernel: triton.JITFunction, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    driver.launch(kernel, 5, torch.device("cuda", 0), arguments, constants)


def cubins(kernel: triton.JITFunction) -> list[bytes]:
    return [future.result().cubin for future in driver._kernels[id(kernel)].variants.values()]


def compared(launches: list[Case]) -> list[dict[str, Any]]:
    """Each launched by Triton's own driver and by ours."""
    result = []
    for case in launches:
        kernel, arguments, constants = case
        constants = constants | {"enable_fp_fusion": True}
        compiled = kernel.warmup(*arguments, grid=(5,), **constants)
        sizes = param_sizes(compiled.asm["ptx"])
        stub.stub_param_sizes(len(sizes), (ctypes.c_size_t * len(sizes))(*sizes))
        row = {"kernel": kernel.__name__, "sizes": sizes}
        row["theirs"] = recorded(lambda: kernel[(5,)](*arguments, **constants))  # noqa: B023
        for name in ("ours", "again"):
            row[name] = recorded(lambda: ours(*case))  # noqa: B023
        row["same_code"] = cubins(kernel)[-1] == compiled.asm["cubin"]
        result.append(row)
    return result


def project() -> list[Case]:
    """The first launch of each kernel of the project: small shapes in half precision."""
    from minirea.config import ReAttentionConfig
    from minirea.kernels.fused import launch as fused
    from minirea.kernels.fused import plan
    from minirea.kernels.fused.arguments import Rope
    from minirea.kernels.sketch import new_sketch
    from minirea.kernels.steps import matvec, peers, rows
    from minirea.kernels.votes import new_votes, winners_shape
    from minirea.quantize import QuantizedMatrix

    found: dict[str, Any] = {}

    def record(kernel: Any, _programs: int, _device: Any, arguments: Any, constants: dict[str, Any]) -> None:
        found.setdefault(kernel.__name__, (kernel, arguments, constants))

    def half(*sizes: int) -> torch.Tensor:
        return torch.zeros(sizes, dtype=torch.float16)

    heads, kv_heads, dim, width = 4, 2, 16, 64
    x, seq_len, token = half(width), torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    caches = half(kv_heads, 256, dim), half(kv_heads, 256, dim)
    rope, config = Rope(torch.zeros(300, dim // 2), torch.zeros(300, dim // 2)), ReAttentionConfig(4, 64, 2, 8, 4)
    with mock.patch.object(driver, "launch", record), mock.patch.object(plan, "num_programs", return_value=8):
        matvec.embed(token, half(97, width), seq_len, x)
        matvec.norm_qkv(x, x, half(128, width), None, 1e-5, seq_len, half(heads, dim), *caches)
        matvec.add_product(x, half(width, width), None, x)
        matvec.norm_gate_up(x, x, half(2 * 112, width), None, 1e-5, half(112))
        matvec.norm_logits(x, x, half(97, width), 1e-5, torch.zeros(97))
        new = matvec.NewToken.on(x.device, 0, 0)
        matvec.best_token(torch.zeros(97), matvec.BestTokenWorkspace.on(x.device), new)
        matvec.keep_token(token, new)
        rows.rms_norm(half(3, width), x, 1e-5)
        rows.write_kv(half(3, heads + 2 * kv_heads, dim), *caches, seq_len)
        rows.swiglu(half(3, 2 * 112))
        step = fused.Inputs(half(1, heads, dim), *caches, half(1, heads, dim), seq_len, rope, config)
        fused.launch_decode(step)
        fused.launch_plain(step._replace(config=ReAttentionConfig(4, 64, 0)))
        fused.launch_chunks(step._replace(q=half(48, heads, dim), out=half(48, heads, dim)), 16)
        fused.sketch_keys(caches[0], new_sketch(kv_heads, dim, 256, x.device), 0, 100)
        voting = ReAttentionConfig(4, 64, 2, 8, 4, vote_window=4, carry_votes=True)
        winners = torch.zeros(3, *winners_shape(heads, voting, 8), dtype=torch.int32)
        fused.count_winners(new_votes(heads, kv_heads, voting, 3, 256, x.device), winners, seq_len, voting)
        rows.widen(QuantizedMatrix.empty(8, width, 8, 64, x.device), half(8, width))
        addresses, turns = torch.zeros(2, dtype=torch.int64), torch.zeros(peers.MAX_PROGRAMS, dtype=torch.int32)
        room = peers.Room(torch.zeros(4096, dtype=torch.int32), addresses, addresses, turns, 0)
        peers.add_sums(x, room, 0)
        peers.gather(torch.zeros(64, dtype=torch.int32), room)
    return [*found.values()]


def alone() -> list[str]:
    """Every case and every kernel of the project, twice."""
    launches = [*cases(), *project()]
    return recorded(lambda: [ours(*case) for case in launches * 2])


def in_contexts() -> list[list[str]]:
    """Launches of one kernel in a thread of the device's primary context, in one of another context, and in one of
    none, each twice; then in four threads at once, each with a number of its own."""
    x = torch.zeros(256)
    case = (copy, (x, x), {"EARLY": False})
    result = []
    for context in (0x100, 0xABC00, None):

        def run(context: int | None = context) -> None:
            if context is not None:
                stub.cuCtxSetCurrent(ctypes.c_void_p(context))
            ours(*case)
            ours(*case)

        result.append(recorded(lambda: in_threads([run])))
    return result


def on_devices() -> list[str]:
    """Launches of one kernel on the second device, while the first is current, and on the first, alternately."""
    x = torch.zeros(256)

    def run() -> None:
        for index in (1, 0, 1, 0):
            driver.launch(copy, 5, torch.device("cuda", index), (x, x), {"EARLY": False, "num_warps": 8})
        assert torch.cuda.current_device() == 0

    return recorded(lambda: in_threads([run]))


def compiled_ahead() -> dict[str, Any]:
    """All cases as `compiling` takes them, the first of them launched before, then as they are launched."""
    first, *others = cases()[-4:]
    launched = recorded(lambda: ours(*first))
    with driver.compiling():
        ahead = recorded(lambda: [ours(*case) for case in (first, *others)])
    compile_it, compiled = triton.compile, []
    triton.compile = lambda *arguments, **options: compiled.append(1) or compile_it(*arguments, **options)
    after = recorded(lambda: [ours(*case) for case in (first, *others)])
    return {"launched": launched, "ahead": ahead, "after": after, "cases": len(others), "compiled after": len(compiled)}


def many_threads() -> list[str]:
    """Launches of four threads at once, each with a number of its own."""
    x = torch.zeros(4096)
    sizes = [8, 4, 8, 8]
    stub.stub_param_sizes(len(sizes), (ctypes.c_size_t * len(sizes))(*sizes))

    def run(number: int) -> None:
        for _ in range(200):
            ours(store, (x, number), {})

    return recorded(lambda: in_threads([lambda number=number: run(number) for number in range(4)]))


def in_threads(runs: list[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(len(runs)) as pool:
        for future in [pool.submit(run) for run in runs]:
            future.result()


def errors() -> dict[str, str]:
    """What is raised when a function of libcuda fails at the first launch of a kernel, and that the next one works."""
    x = torch.zeros(4096)
    result = {}
    for index, (function, code) in enumerate(
        (
            ("cuModuleLoadData", 2),
            ("cuModuleGetFunction", 999),
            ("cuLaunchKernelEx", 720),
            ("cuLaunchKernelEx", 700),
            ("cuCtxGetCurrent", 201),
        )
    ):
        case = (store, (x, 1.0), {"num_warps": 2**index})
        stub.stub_fail(function.encode(), code)
        try:
            ours(*case)
        except CudaError as error:
            result[f"{function} {code}"] = f"{error.name}: {error}"
        ours(*case)
    ours(store, (x, 2), {})
    for name, case in (
        ("shared memory", (product, (x.half(), x.half(), x), {"N": 256, "K": 512, "STAGES": 8, "num_warps": 8})),
        ("range", (store, (x, 2**31), {})),
    ):
        try:
            ours(*case)
        except InputError as error:
            result[name] = str(error)
    return result


class Unwanted:
    """In place of Triton's driver: fails the test that asks it for anything."""

    def __getattribute__(self, name: str) -> Any:
        print(f"Triton's driver was asked for {name}", file=sys.stderr)
        os._exit(1)


def without_triton() -> dict[str, Any]:
    """All that needs no driver of Triton's, in one process: starting one takes longer than the rest."""
    theirs = Unwanted()
    triton.runtime.driver.set_active(theirs)
    result = {
        function.__name__: function()
        for function in (compiled_ahead, alone, in_contexts, on_devices, many_threads, errors)
    }
    assert triton.runtime.driver._active is theirs
    assert triton.runtime.driver._default is None
    return result


def beside_triton() -> list[dict[str, Any]]:
    set_up_triton()
    stub.cuCtxSetCurrent(ctypes.c_void_p(0x100))
    return compared([*cases(), *project()])


if __name__ == "__main__":
    set_up_torch()
    json.dump(globals()[sys.argv[1]](), sys.stdout)
