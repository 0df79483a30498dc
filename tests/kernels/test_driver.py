"""Kernels loaded and launched through libcuda: without a GPU, a stub of it records what it is asked to do.

What is recorded for Triton's own driver, built by the C compiler that the stub needs too, is what ours has to ask for.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

triton = pytest.importorskip("triton")

import torch  # noqa: E402
import triton.language as tl  # noqa: E402
from testing import in_threads  # noqa: E402

from minirea.errors import CudaError, InputError  # noqa: E402
from minirea.kernels import driver  # noqa: E402

HERE = Path(__file__).parent
CUDA_HEADERS = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
COMPILER = shutil.which("cc") or shutil.which("gcc")
KERNELS = Path(driver.__file__).resolve().parent
PROJECT = {  # stub_launches.project has to launch each
    name
    for path in KERNELS.rglob("*.py")
    if path.parent.name != "cpu"
    for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
}
TARGET = driver.GPUTarget("cuda", 90, 32)


@triton.jit(do_not_specialize=["steps"])
def scale(x_ptr, out_ptr, n, steps, eps, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(out_ptr + offs, x * x * eps + x * steps, mask=offs < n)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where kernels are kept; empty at first."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def stub(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Runs a function of stub_launches.py where libcuda is the stub, and returns what it returns."""
    if not COMPILER or not (CUDA_HEADERS / "cuda.h").is_file():
        pytest.skip("needs a C compiler and Triton's cuda.h")
    folder = tmp_path_factory.mktemp("stub")
    library = folder / "libcuda.so.1"
    source = HERE / "stub_libcuda.c"
    build = [COMPILER, "-shared", "-fPIC", "-I", CUDA_HEADERS, f"-Wl,-soname,{library.name}", "-o", library, source]
    subprocess.run(build, check=True)

    def run(function: str, **environment: str) -> Any:
        log = folder / f"{function}.log"
        log.unlink(missing_ok=True)
        settings = without("TRITON_INTERPRET") | {
            "STUB_CUDA_LOG": str(log),
            "LD_LIBRARY_PATH": str(folder),
            "TRITON_LIBCUDA_PATH": str(folder),
            "TRITON_CACHE_DIR": str(compiled),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-W", "error", str(HERE / "stub_launches.py"), function]
        done = subprocess.run(command, env=settings | environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="module")
def found(stub: Callable[..., Any], compiled: Path) -> dict[str, Any]:
    """What our driver asks for, with an empty PATH, no CC and nothing compiled before. Triton's driver is not asked."""
    assert not list(compiled.iterdir())
    found = stub("without_triton", PATH="", CC="")
    assert list(compiled.rglob("*.cubin"))
    assert not list(compiled.rglob("*.so"))
    return found


def without(*names: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in names}


@pytest.mark.usefixtures("found")  # first, since it compiles
def test_launches_are_those_of_tritons_own_driver(stub: Callable[..., Any]) -> None:
    """The same grid, block, shared memory, stream, attributes and bytes of every parameter, the same attributes of the
    loaded function, and the same machine code; for pointers, numbers of all types, members of tuples and constants, and
    for every kernel of the project as it is launched."""
    if not Path(sys.base_prefix, "include").is_dir():
        pytest.skip("needs Python's headers, which Triton's driver is built with")
    rows = stub("beside_triton")
    names = [row["kernel"] for row in rows]
    assert names.count("every_kind") == 6
    assert sum(name.endswith("_kernel") for name in names) == len(PROJECT) == len(PROJECT.intersection(names))
    for row in rows:
        assert row["ours"] == row["theirs"], row["kernel"]
        assert row["again"] == row["theirs"][-1:], row["kernel"]  # loaded once
        assert row["same_code"], row["kernel"]
        assert row["theirs"][-1].count(",", row["theirs"][-1].index("params=")) == len(row["sizes"]) > 2
    everything = json.dumps(rows)
    for needed in ("config=1", "attribute=8 value=231424", "attributes=6:01", "attributes=2:01", ",2:01", "=4:02"):
        assert needed in everything  # prefers shared memory; early, cooperative and cluster launches


def test_needs_no_compiler(found: dict[str, Any]) -> None:
    """Every case is launched twice and loaded once."""
    launches, loads = (
        sum(name in line for line in found["alone"]) for name in ("cuLaunchKernelEx", "cuModuleLoadData")
    )
    assert launches == 2 * (12 + len(PROJECT))
    assert 8 + len(PROJECT) <= loads <= launches // 2  # some were loaded before


def test_each_context_loads_its_own_code(found: dict[str, Any]) -> None:
    """And a thread that has no context is given the device's primary one, as by CUDA's runtime."""
    primary, other, none = found["in_contexts"]
    for lines, context in ((primary, "0x100"), (other, "0xabc00")):
        assert [line.split()[0] for line in lines] == [
            "cuCtxSetCurrent",
            "cuModuleLoadData",
            "cuModuleGetFunction",
            "cuLaunchKernelEx",
            "cuLaunchKernelEx",
        ]
        assert all(f"context={context} " in line for line in (lines[1], *lines[3:]))
    assert [line.split()[0] for line in none] == ["cuCtxSetCurrent", "cuLaunchKernelEx", "cuLaunchKernelEx"]
    assert all("context=0x100" in line for line in none)


def test_each_device_has_its_own_code_and_stream(found: dict[str, Any]) -> None:
    lines = [line for line in found["on_devices"] if line.startswith(("cuModuleLoadData", "cuLaunchKernelEx"))]
    assert [line.split()[0] for line in lines] == 2 * ["cuModuleLoadData", "cuLaunchKernelEx"] + 2 * [
        "cuLaunchKernelEx"
    ]
    for line, device in zip(lines, (2, 2, 1, 1, 2, 1), strict=True):
        assert f"context={0x100 * device:#x} " in line
        assert f" stream={0x7F0000001233 + device:#x} " in line or line.startswith("cuModuleLoadData")


def test_threads_do_not_mix_their_arguments(found: dict[str, Any]) -> None:
    lines = found["many_threads"]
    numbers = [line.split("params=")[1].split(",")[1] for line in lines if line.startswith("cuLaunchKernelEx")]
    assert sorted(numbers) == sorted(200 * [f"0{number}000000" for number in range(4)])
    assert sum(line.startswith("cuModuleLoadData") for line in lines) == 1


def test_kernels_are_compiled_without_a_launch(found: dict[str, Any]) -> None:
    """`compiling` asks libcuda for nothing, also where a launch is already prepared; later launches compile nothing."""
    lines = found["compiled_ahead"]
    assert sum(line.startswith("cuLaunchKernelEx") for line in lines["launched"]) == 1
    assert lines["ahead"] == []
    assert sum(line.startswith("cuLaunchKernelEx") for line in lines["after"]) == 1 + lines["cases"]
    assert lines["compiled after"] == 0


def test_errors_have_cudas_name_and_text(found: dict[str, Any]) -> None:
    errors = found["errors"]
    for call, expected in {
        "cuModuleLoadData 2": "CUDA_ERROR_OUT_OF_MEMORY: loading store: CUDA_ERROR_OUT_OF_MEMORY (out of memory)",
        "cuModuleGetFunction 999": "CUDA error 999: loading store: CUDA error 999 (no description)",
        "cuLaunchKernelEx 720": "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE: launching 5 programs of store, each of 128 "
        "threads and with 0 bytes of shared memory: CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE (too many blocks in "
        "cooperative launch)",
        "cuLaunchKernelEx 700": "CUDA_ERROR_ILLEGAL_ADDRESS: launching 5 programs of store, each of 256 threads and "
        "with 0 bytes of shared memory: CUDA_ERROR_ILLEGAL_ADDRESS (an illegal memory access was encountered)",
    }.items():
        assert errors[call] == expected
    assert "this GPU has 232448 for a program; use impl 'torch'" in errors["shared memory"]
    assert errors["range"].startswith("a number for store is out of range: ")


def test_a_missing_or_old_libcuda_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(driver.ctypes, "CDLL", missing)
    with pytest.raises(CudaError, match=r"^libcuda\.so\.1 cannot be loaded \(.*\), expected NVIDIA's driver"):
        driver.libcuda.__wrapped__()
    old = SimpleNamespace(**{name: SimpleNamespace() for name in driver.FUNCTIONS if name != "cuLaunchKernelEx"})
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda _: old)
    with pytest.raises(CudaError, match=r"^libcuda\.so\.1 has no cuLaunchKernelEx, expected NVIDIA's driver for CUDA"):
        driver.libcuda.__wrapped__()


# ------------------------------------------------------------------------------------------------------------ compiling


def compile_scale(key: object = "key", **constants: Any) -> driver.Variant:
    x = torch.zeros(64)
    arguments = (x, x, 64, 3, 0.5)
    kernel = driver.Kernel(scale)
    return kernel.variant(key, TARGET, arguments, {"BLOCK": 64} | constants, kernel.layout(arguments))


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.usefixtures("cache_dir")
def test_fp_fusion_does_not_depend_on_tritons_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings, which pytest makes errors, included: 3.9 warns where it is left to the default."""
    codes = []
    for default in (None, "0", "1"):
        if default is None:
            monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION", raising=False)
        else:
            monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", default)
        codes.append(compile_scale().cubin)
    assert codes[0] == codes[1] == codes[2] != compile_scale(enable_fp_fusion=False).cubin


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(blocked / "cache"))
    with pytest.raises(InputError, match=r"^kernels cannot be compiled and kept in .*file/cache \(.*TRITON_CACHE_DIR"):
        compile_scale()


def test_no_home_directory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no directory named ~ is made where the program runs."""
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", "~/")  # what Triton finds for a user who has none
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^there is no home directory .* TRITON_CACHE_DIR to name a directory"):
        compile_scale()
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("cache_dir")
def test_threads_that_need_the_same_code_compile_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, together, compiled = driver.Kernel(scale), threading.Barrier(4), []
    compile_it = triton.compile

    def counted(*arguments: Any, **options: Any) -> Any:
        compiled.append(1)
        if len(compiled) == 1:
            raise RuntimeError("the first attempt fails")
        return compile_it(*arguments, **options)

    monkeypatch.setattr(triton, "compile", counted)
    x = torch.zeros(64)
    arguments = (x, x, 64, 3, 0.5)
    found: list[Any] = []

    def ask(_: int) -> None:
        together.wait()
        found.append(kernel.variant("key", TARGET, arguments, {"BLOCK": 64}, kernel.layout(arguments)))

    with pytest.raises(RuntimeError, match="first attempt"):
        kernel.variant("key", TARGET, arguments, {"BLOCK": 64}, kernel.layout(arguments))
    in_threads(ask, range(4))
    assert len(compiled) == 2
    assert found == 4 * found[:1]
