"""The decode step's kernels in Triton's interpreter: `python -m pytest -m interpret`."""

from __future__ import annotations

import pytest
import torch
from matvec_cases import SMALL, check_all, check_best_token, check_spread, check_tiles


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SMALL)
def test_every_kernel_equals_its_twin(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_all(shape, dtype, "cpu", bias=shape[0] != 3)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("shape", "dtype"), zip(SMALL, [torch.bfloat16, torch.float16, torch.float32], strict=True))
def test_every_kernel_equals_its_twin_with_quantized_matrices(
    shape: tuple[int, ...], dtype: torch.dtype, bits: int
) -> None:
    check_all(shape, dtype, "cpu", shape[0] != 3, bits)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 4), (torch.float32, 4)])
def test_products_of_quantized_matrices_with_any_tile(dtype: torch.dtype, bits: int) -> None:
    check_tiles(dtype, "cpu", bits)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 4), (torch.float16, 8), (torch.float32, 8)])
def test_products_of_quantized_matrices_with_x_of_any_spread(dtype: torch.dtype, bits: int) -> None:
    check_spread(dtype, "cpu", bits)


def test_best_token_is_the_lowest_of_the_best() -> None:
    check_best_token("cpu")
