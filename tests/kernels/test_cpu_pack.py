"""bfloat16 matrices in 12 bits a weight: the same numbers, and the same products."""

from __future__ import annotations

import pytest
import torch

from minirea.compact import CompactMatrix, compact_bytes, most_apart, pays
from minirea.kernels.cpu import products
from minirea.kernels.cpu.compile import available
from minirea.kernels.cpu.pack import pack

pytestmark = pytest.mark.skipif(not available(), reason="needs llvmlite")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(matrix: torch.Tensor) -> CompactMatrix:
    made = pack(matrix)
    assert made is not None
    return made


def assert_same(matrix: torch.Tensor) -> CompactMatrix:
    """To the bit, in as many bytes as was said."""
    made = packed(matrix)
    assert torch.equal(made.widen().view(torch.int16), matrix.view(torch.int16))
    unused = 8 * (most_apart(*matrix.shape) - len(made.column))
    assert made.shape == matrix.shape and made.nbytes + unused == compact_bytes(*matrix.shape)
    return made


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("N", "K"), [(1, 64), (70, 60), (33, 127), (9, 128), (203, 576), (64, 1030), (6, 14336)])
def test_numbers_stay(N: int, K: int) -> None:
    """Zeros of both signs, what is apart at every edge, a row of zeros, and of one weight."""
    matrix = (random(N, K) / 30).bfloat16()
    made = assert_same(matrix)
    assert made.nbytes < 0.88 * matrix.nbytes and (K != 576 or made.nbytes < 0.76 * matrix.nbytes)
    matrix[0, ::3], matrix[-1, 1::5] = 0.0, -0.0
    for i, k in enumerate((0, 15, 16, 31, 32, 47, 48, K - 1)):
        matrix[i % N, k] = (-1) ** i * (1e-40 if i == 5 else 1e-9)
    assert len(assert_same(matrix).column) >= min(N, 8)
    matrix[0] = 0
    matrix[-1] = torch.where(torch.arange(K) == K - 1, -3.0, 0.0)
    assert_same(matrix)


@pytest.mark.parametrize("largest", [2.0**-110, 1e-20, 1.0, 3e4, 2.0**78])
def test_every_magnitude_of_a_row(largest: float) -> None:
    """15 binary orders are within, and two are apart."""
    orders = 2.0 ** -torch.arange(17).repeat(4)[:64]
    matrix = (orders * largest).bfloat16().repeat(40, 1)
    matrix[1:] = largest
    made = assert_same(matrix)
    x = random(1, 64)
    exact = x.double() @ matrix.double().t()
    magnitude = x.double().abs() @ matrix.double().abs().t()
    for rows in (x, x.expand(20, 64)):
        assert ((products.linear(rows, made).double() - exact).abs() <= 2**-21 * magnitude + 2.0**-149).all()


def test_what_does_not_pack() -> None:
    """Numbers that are not finite, or huge; weights that lie far apart; rows that do not fill their units."""
    matrix = (random(40, 128) / 30).bfloat16()
    for value in (torch.nan, torch.inf, -torch.inf, 2.0**80):
        other = matrix.clone()
        other[7, 100] = value
        assert pack(other) is None
    spread = 2.0 ** -(40 * torch.rand(40, 128, generator=torch.Generator().manual_seed(1)))
    assert pack((matrix * spread).bfloat16()) is None
    assert pack((matrix * 2.0**-126).bfloat16()) is None  # without an exponent
    assert pack(matrix[:, :40].contiguous()) is None
    assert [K for K in (16, 40, 54, 55, 64, 65, 109, 110, 4096) if pays(K)] == [55, 64, 110, 4096]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("end", ["store", "add"])
@pytest.mark.parametrize("T", [1, 3, 8, 9, 30])
@pytest.mark.parametrize(("N", "K"), [(70, 64), (203, 576), (38, 2100)])
def test_products_are_those_of_the_wide_matrix(N: int, K: int, T: int, end: str) -> None:
    """To the bit; of few rows those of matrix rows with nothing apart, which is added last."""
    matrix, x = (random(N, K, seed=1) / 30).bfloat16(), random(T, K)
    made = packed(matrix)
    found, expected = torch.zeros(2, T, N)
    for out, weights in ((found, made), (expected, matrix)):
        if end == "add":
            products.add_linear(out, x, weights)
        else:
            out.copy_(products.linear(x, weights))
    whole = slice(None) if T > products.MOST_FEW else made.first.diff() == 0
    assert torch.equal(found[:, whole], expected[:, whole])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("T", [1, 4, 30])
def test_weights_that_are_apart_count(T: int) -> None:
    """Each alone, where all others of its row meet zeros."""
    matrix = random(20, 1100).bfloat16()
    columns = torch.arange(20) * 57
    matrix[torch.arange(20), columns] = (2.0**-30 * (1 + torch.arange(20))).bfloat16()
    made = packed(matrix)
    x = torch.zeros(T, 1100)
    for row, column in enumerate(columns.tolist()):
        x.zero_()
        x[:, column] = 3.0
        assert torch.equal(products.linear(x, made)[:, row], torch.full((T,), 3 * 2.0**-30 * (1 + row)))


@pytest.mark.parametrize("T", [1, 4, 30])
def test_products_of_integers_are_exact(T: int) -> None:
    generator = torch.Generator().manual_seed(T)
    matrix = torch.randint(-127, 128, (70, 120), generator=generator).bfloat16()
    x = torch.randint(-100, 101, (T, 120), generator=generator).float()
    assert torch.equal(products.linear(x, packed(matrix)), x @ matrix.float().t())


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_small_and_large_activations(scale: float) -> None:
    """Powers of two between weights and activations neither overflow nor vanish."""
    matrix, x = (random(40, 256) / 30).bfloat16(), random(2, 256, seed=1) * scale
    exact, magnitude = x.double() @ matrix.double().t(), x.abs().double() @ matrix.abs().double().t()
    assert ((products.linear(x, packed(matrix)).double() - exact).abs() <= 2**-21 * magnitude).all()
