"""Inputs for the kernels of a prefill step, and the judgement of what they return."""

from __future__ import annotations

import torch
from kernel_cases import error
from matvec_cases import Inputs

from minirea.quantize import QuantizedMatrix

# T, and E or F: sizes that tiles divide, rows that take several programs, and sizes that nothing divides.
SHAPES = [(1, 16), (5, 4096), (3, 4099), (7, 50), (2, 1)]
CACHE_SHAPES = [(1, 1, 2), (5, 3, 20), (4, 2, 128)]  # T, G, D


def check_rms_norm(T: int, E: int, dtype: torch.dtype, device: str) -> None:
    """At most twice the error of the twin in the same dtype, and rounding; small rows and zeros too."""
    from minirea.kernels.steps.reference import rms_norm as twin
    from minirea.kernels.steps.rows import rms_norm

    inputs = Inputs(dtype, device, seed=E)
    x_TE, weight_E = 8 * inputs.normal(T, E), inputs.normal(E)
    x_TE[0] = 0
    x_TE[-1] = 1e-3 * inputs.normal(E)  # squares as small as eps
    given = x_TE.clone()
    got, plain = rms_norm(x_TE, weight_E, 1e-5), twin(x_TE, weight_E, 1e-5)
    exact = twin(x_TE.double(), weight_E.double(), 1e-5)
    assert torch.equal(x_TE, given)
    assert (got.shape, got.dtype) == ((T, E), dtype) and got.is_contiguous()
    assert error(got, exact) <= 2 * error(plain, exact) + torch.finfo(dtype).eps


def check_write_kv(T: int, G: int, D: int, dtype: torch.dtype, device: str) -> None:
    """What its twin writes, bit for bit, and nothing else of a cache whose keys and values are one tensor."""
    from minirea.kernels.steps.reference import write_kv as twin
    from minirea.kernels.steps.rows import write_kv

    inputs = Inputs(dtype, device, seed=D)
    qkv_TXD = inputs.normal(T * (3 + 2 * G), D).view(T, 3 + 2 * G, D)
    for start in (0, 5):
        caches = [torch.full((2, G, T + 7, D), torch.nan, dtype=dtype, device=device) for _ in range(2)]
        for write, kv_2GND in zip((write_kv, twin), caches, strict=True):
            write(qkv_TXD, *kv_2GND, torch.tensor([start + T], dtype=torch.int32, device=device))
        assert torch.equal(caches[0].isnan(), caches[1].isnan())
        assert torch.equal(caches[0].nan_to_num(), caches[1].nan_to_num())


def check_widen(N: int, K: int, bits: int, dtype: torch.dtype, device: str) -> None:
    """What its twin writes, up to the last bit of a product and a sum, and nothing else."""
    from minirea.kernels.steps.reference import widen as twin
    from minirea.kernels.steps.rows import widen

    inputs = Inputs(dtype, device, seed=K)
    matrix_NK, out_NK = inputs.matrix(N, K, bits), inputs.poison(N + 2, K)
    expected_NK = inputs.poison(N, K)
    assert isinstance(matrix_NK, QuantizedMatrix)
    widen(matrix_NK, out_NK[1:-1])
    twin(matrix_NK, expected_NK)
    torch.testing.assert_close(out_NK[1:-1], expected_NK, rtol=2 * torch.finfo(dtype).eps, atol=2**-22)
    assert out_NK[0].isnan().all() and out_NK[-1].isnan().all()


def check_swiglu(T: int, F: int, dtype: torch.dtype, device: str) -> None:
    """At most twice the error of the twin in the same dtype, and rounding; and gates that are not finite pass."""
    from minirea.kernels.steps.reference import swiglu as twin
    from minirea.kernels.steps.rows import swiglu

    gate_up_TM = 8 * Inputs(dtype, device, seed=F).normal(2 * F, T).t().contiguous()
    gate_up_TM[0, 0] = gate_up_TM[-1, -1] = torch.inf
    gate_up_TM[-1, F - 1] = -80
    given = gate_up_TM.clone()
    got, plain, exact = swiglu(gate_up_TM), twin(gate_up_TM), twin(gate_up_TM.double())
    assert torch.equal(gate_up_TM, given)
    assert (got.shape, got.dtype) == ((T, F), dtype) and got.is_contiguous()
    finite = exact.isfinite()
    assert torch.equal(got[~finite].double(), exact[~finite])
    allowed = 2 * error(plain[finite], exact[finite]) + torch.finfo(dtype).eps
    assert not finite.any() or error(got[finite], exact[finite]) <= allowed
