"""The prefill step's kernels in Triton's interpreter: `python -m pytest -m interpret`."""

from __future__ import annotations

import pytest
import torch
from rows_cases import CACHE_SHAPES, SHAPES, check_rms_norm, check_swiglu, check_widen, check_write_kv


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("T", "E"), SHAPES)
def test_rms_norm_equals_its_twin(T: int, E: int, dtype: torch.dtype) -> None:
    check_rms_norm(T, E, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("N", "K"), [(3, 200), (1, 1), (2, 4100), (2, 2304)])
def test_widen_equals_its_twin(N: int, K: int, bits: int, dtype: torch.dtype) -> None:
    check_widen(N, K, bits, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("T", "F"), SHAPES)
def test_swiglu_equals_its_twin(T: int, F: int, dtype: torch.dtype) -> None:
    check_swiglu(T, F, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("T", "G", "D"), CACHE_SHAPES)
def test_write_kv_equals_its_twin(T: int, G: int, D: int, dtype: torch.dtype) -> None:
    check_write_kv(T, G, D, dtype, "cpu")
