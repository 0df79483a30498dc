"""The prefill step's kernels on a GPU, at the sizes of real models too."""

from __future__ import annotations

import pytest
import torch
from rows_cases import CACHE_SHAPES, SHAPES, check_rms_norm, check_swiglu, check_widen, check_write_kv

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("T", "E"), [*SHAPES, (512, 4096), (1024, 8192)])
def test_rms_norm_equals_its_twin(T: int, E: int, dtype: torch.dtype) -> None:
    check_rms_norm(T, E, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("T", "F"), [*SHAPES, (512, 14336), (1024, 688)])
def test_swiglu_equals_its_twin(T: int, F: int, dtype: torch.dtype) -> None:
    check_swiglu(T, F, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("T", "G", "D"), [*CACHE_SHAPES, (512, 8, 128)])
def test_write_kv_equals_its_twin(T: int, G: int, D: int, dtype: torch.dtype) -> None:
    check_write_kv(T, G, D, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("N", "K"), [(3, 200), (1, 1), (2, 4100), (4096, 14336)])
def test_widen_equals_its_twin(N: int, K: int, bits: int, dtype: torch.dtype) -> None:
    check_widen(N, K, bits, dtype, "cuda")
