"""The decode step's kernels in Triton's interpreter: `python -m pytest -m interpret`."""

from __future__ import annotations

import pytest
import torch
from matvec_cases import SMALL, check_all, check_best_token


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SMALL)
def test_every_kernel_equals_its_twin(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_all(shape, dtype, "cpu", bias=shape[0] != 3)


def test_best_token_is_the_lowest_of_the_best() -> None:
    check_best_token("cpu")
