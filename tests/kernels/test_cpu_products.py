"""Products of a CPU's kernels against float64, in every form that a matrix can have in memory."""

from __future__ import annotations

import ctypes
import itertools
import mmap

import pytest
import torch
import torch.nn.functional as F

from minirea.kernels.cpu import products, rows
from minirea.kernels.cpu.compile import available
from minirea.kernels.cpu.pack import pack
from minirea.quantize import QuantizedMatrix

pytestmark = pytest.mark.skipif(not available(), reason="needs llvmlite")

KINDS = ["float32", "bfloat16", "compact", "float16", "int8", "int8-256", "int4", "int4-32", "int4-256"]
THREADS = pytest.mark.usefixtures("threads")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix_of(kind: str, N: int, K: int, seed: int = 3) -> tuple[rows.Matrix, torch.Tensor]:
    """A matrix, and what it is in float64."""
    wide = random(N, K, seed=seed) / 8
    if kind == "compact":
        matrix = wide.bfloat16()
        return pack(matrix) or matrix, matrix.double()
    if not kind.startswith("int"):
        matrix = wide.to(getattr(torch, kind))
        return matrix, matrix.double()
    bits, _, size = kind.removeprefix("int").partition("-")
    quantized = QuantizedMatrix.empty(N, K, int(bits), int(size or 0), torch.device("cpu"))
    quantized.round(wide)
    return quantized, quantized.widen(torch.float64)


def assert_near(found: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor) -> None:
    """Off by a few roundings of float32 of the sum of magnitudes, and all of it written."""
    assert found.dtype == torch.float32
    assert ((found.double() - exact).abs() <= 2**-21 * magnitude + 1e-30).all()


@THREADS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("N", "K"), [(70, 64), (50, 40), (33, 300), (1, 17), (5, 2100), (203, 576)])
def test_products(kind: str, N: int, K: int) -> None:
    """One row, few and many, with and without a bias, stored and added; odd sizes, and what lies behind is poison."""
    matrix, wide = matrix_of(kind, N, K)
    for T in (1, 2, 5, 8, 9, 25):
        x, bias = random(T, K), random(N, seed=1)
        exact, magnitude = x.double() @ wide.t(), x.abs().double() @ wide.abs().t() + 1
        assert_near(products.linear(x, matrix), exact, magnitude)
        assert_near(products.linear(x, matrix, bias), exact + bias, magnitude + bias.abs())
        for given in (None, bias):
            total = random(T, N, seed=2)
            expected = total.double() + exact + (0 if given is None else given.double())
            products.add_linear(total, x, matrix, given)
            assert_near(total, expected, magnitude + 8)


@THREADS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("N", "K"), [(70, 64), (38, 300), (2, 17), (406, 576)])
def test_products_of_a_norm(kind: str, N: int, K: int) -> None:
    """And what becomes of gate and up, far from zero as well."""
    matrix, wide = matrix_of(kind, N, K)
    norm, eps = random(K, seed=5) + 1, 1e-5
    for scale, given in itertools.product((1e-3, 1.0, 300.0), (None, random(N, seed=1) * 30)):
        x = random(1, K) * scale
        exact = F.linear(
            F.rms_norm(x.double(), (K,), norm.double(), eps), wide, None if given is None else given.double()
        )
        magnitude = F.rms_norm(x.double(), (K,), norm.double(), eps).abs() @ wide.abs().t() * 4 + 40
        assert_near(products.norm_linear(x, norm, eps, matrix, given), exact, magnitude)
        gate, up = exact.chunk(2, -1)
        ours = products.norm_swiglu(x, norm, eps, matrix, given)
        torch.testing.assert_close(ours.double(), F.silu(gate) * up, atol=2e-4, rtol=2e-5)


@THREADS
@pytest.mark.parametrize(("T", "size"), [(1, 16), (9, 40), (50, 1536)])
def test_swiglu(T: int, size: int) -> None:
    gate_up = random(T, 2 * size) * 20
    gate, up = gate_up.double().chunk(2, -1)
    torch.testing.assert_close(products.swiglu(gate_up).double(), F.silu(gate) * up, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("T", [1, 4, 30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_integers_are_exact(dtype: torch.dtype, T: int) -> None:
    generator = torch.Generator().manual_seed(T)
    matrix = torch.randint(-127, 128, (70, 45), generator=generator).to(dtype)
    x = torch.randint(-100, 101, (T, 45), generator=generator).float()
    assert torch.equal(products.linear(x, matrix), x @ matrix.float().t())


@pytest.mark.parametrize("T", [1, 30])
@pytest.mark.parametrize("largest", [2.0**-120, 1e-30, 60000.0, 2.0**100])
def test_small_and_large_weights_count(largest: float, T: int) -> None:
    """Weights over 40 binary orders of magnitude, of what bfloat16 can hold."""
    spread = 2.0 ** -(40 * torch.rand(96, 256, generator=torch.Generator().manual_seed(1)))
    matrix = (random(96, 256).clamp(-1, 1) * spread * largest).bfloat16()
    x = random(T, 256, seed=2)
    exact, magnitude = x.double() @ matrix.double().t(), x.abs().double() @ matrix.abs().double().t()
    assert ((products.linear(x, matrix).double() - exact).abs() <= 2**-21 * magnitude).all()


@pytest.mark.parametrize("T", [1, 3, 30])
def test_what_is_not_finite_stays_so(T: int) -> None:
    """In its own row or column alone; a gate of minus infinity is zero."""
    for value in (torch.nan, torch.inf):
        matrix, x = random(40, 64).bfloat16(), random(T, 64, seed=1)
        matrix[7, 63] = value
        out = products.linear(x, matrix)
        assert not out[:, 7].isfinite().any() and out[:, :7].isfinite().all() and out[:, 8:].isfinite().all()
    x = random(1, 64, seed=1)
    assert not products.norm_swiglu(x, torch.ones(64), 1e-5, matrix)[0, 7].isfinite()
    gate_up = torch.zeros(2, 64)
    gate_up[0, 0], gate_up[1, 1] = -1e30, 1.0
    x = torch.zeros(1, 64)
    x[0, :2] = 1
    assert float(products.norm_swiglu(x, torch.ones(64), 1e-5, gate_up)) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_does_not_depend_on_threads_or_rows_beside(kind: str) -> None:
    """To the bit: equal tokens have equal keys, wherever they are in a prompt."""
    matrix, _ = matrix_of(kind, 203, 576)
    x, before = random(40, 576), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append((products.linear(x[:1], matrix), products.linear(x, matrix), products.linear(x[3:16], matrix)))
    finally:
        torch.set_num_threads(before)
    for one, many, others in found:
        assert torch.equal(one, found[0][0]) and torch.equal(many, found[0][1])
        assert torch.equal(others, found[0][1][3:16])


@pytest.mark.parametrize("K", [1023, 1024, 1025, 1030, 1039, 1040, 2049])
def test_panels_stay_within_their_memory(K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where whole units end with a panel."""
    matrix, x, made, empty = random(50, K).bfloat16(), random(20, K, seed=1), [], torch.empty

    def guarded(*shape: int, **options: torch.dtype) -> torch.Tensor:
        if len(shape) == 2:
            return empty(*shape, **options)
        made.append(torch.full((shape[0] + 4096,), 7.0))
        return made[-1]

    monkeypatch.setattr(torch, "empty", guarded)
    out = products.linear(x, matrix)
    monkeypatch.undo()
    torch.testing.assert_close(out, x @ matrix.float().t(), atol=1e-3, rtol=1e-4)
    assert len(made) == 1 and (made[0][-4096:] == 7).all()


def test_few_rows_in_half_precision_with_a_quantized_matrix() -> None:
    matrix, wide = matrix_of("int8", 70, 64)
    x, bias = random(3, 64).bfloat16(), random(70, seed=1).bfloat16()
    assert products.multiplies(matrix, x) and not products.multiplies(matrix, random(30, 64).bfloat16())
    out = products.linear(x, matrix, bias)
    torch.testing.assert_close(out, (x.double() @ wide.t() + bias.double()).bfloat16(), rtol=2**-8, atol=2**-8)


def test_what_is_not_multiplied() -> None:
    """Columns side by side, other dtypes, other devices."""
    matrix, x = random(8, 16), random(2, 16)
    assert products.multiplies(matrix, x)
    for other in (matrix.t().contiguous().t(), matrix.double(), object()):
        assert not products.multiplies(other, x)
    assert not products.multiplies(matrix, x.double())
    assert not products.multiplies(matrix, x.to("meta"))


def test_memory_behind_a_matrix_is_not_read() -> None:
    """The last row ends with a page: reading on would end the process."""
    page = mmap.PAGESIZE
    for kind, K in itertools.product(("bfloat16", "float16", "float32"), (17, 40, 100, 64)):
        memory = mmap.mmap(-1, 4 * page, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        dtype = getattr(torch, kind)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        libc = ctypes.CDLL(None)
        libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        if libc.mprotect(whole.data_ptr() + 3 * page, page, 0):
            pytest.skip("this system protects no memory")
        size = 7 * K * dtype.itemsize
        matrix = whole[3 * page - size : 3 * page].view(dtype).view(7, K)
        matrix.copy_(random(7, K))
        for T in (1, 3, 20):
            x = random(T, K, seed=1)
            torch.testing.assert_close(products.linear(x, matrix), x @ matrix.float().t(), atol=1e-4, rtol=1e-4)
        libc.mprotect(whole.data_ptr() + 3 * page, page, 3)
