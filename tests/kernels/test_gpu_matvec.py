"""The decode step's kernels on a GPU, at the sizes of real models, and in graphs."""

from __future__ import annotations

import pytest
import torch
from matvec_cases import EPS, SMALL, Inputs, check_all, check_best_token, check_spread, check_tiles

pytestmark = pytest.mark.gpu
# H, G, D, E, F, V of the demo model, LLaMA 3.2 3B with a small vocabulary, and sizes that nothing divides.
REAL = [(4, 2, 64, 256, 688, 2048), (24, 8, 128, 3072, 8192, 4096), (32, 8, 80, 2560, 14336, 32003)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SMALL, *REAL])
def test_every_kernel_equals_its_twin(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_all(shape, dtype, "cuda", bias=dtype == torch.float16 or shape == SMALL[1])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SMALL, *REAL])
def test_every_kernel_equals_its_twin_with_quantized_matrices(
    shape: tuple[int, ...], dtype: torch.dtype, bits: int
) -> None:
    check_all(shape, dtype, "cuda", dtype == torch.float16, bits)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_quantized_matrices_with_any_tile(dtype: torch.dtype, bits: int) -> None:
    check_tiles(dtype, "cuda", bits)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("span_top_k", [0, 2])
@pytest.mark.parametrize("cached", [40, 4000])  # all of them in scope, and not
@pytest.mark.parametrize("starts_early", [False, True])
def test_attention_between_products_reads_nothing_early(
    D: int, span_top_k: int, cached: int, starts_early: bool
) -> None:
    """A layer's kernels, 60 times in a graph, give what they give one by one."""
    from minirea.config import ReAttentionConfig
    from minirea.kernels import reattention
    from minirea.kernels.steps import matvec as step

    r = Inputs(torch.bfloat16, "cuda")
    H, G, E, N = 4, 2, 512, 4096
    norm_E, qkv, o = r.normal(E), r.normal((H + 2 * G) * D, E), r.normal(E, H * D)
    start_E, x_E, k_GND, v_GND = r.normal(E), r.poison(E), r.normal(G, N, D), r.normal(G, N, D)
    seq_len, q_HD = r.count(cached), r.poison(H, D)
    angle = torch.outer(torch.arange(2048.0), 10000.0 ** -torch.arange(0, 1, 2 / D)).cuda()
    cos, sin, config = angle.cos(), angle.sin(), ReAttentionConfig(4, 256, span_top_k, 16, 32)

    def chain(wait: bool) -> None:
        x_E.copy_(start_E)
        for _ in range(60):
            step.norm_qkv(x_E, norm_E, qkv, None, EPS, seq_len, q_HD, k_GND, v_GND)
            if wait:
                torch.cuda.synchronize()
            arguments = (q_HD[None], k_GND, v_GND, seq_len, cos, sin, config)
            out_1HD = reattention(*arguments, impl="triton", starts_early=starts_early and not wait)
            if wait:
                torch.cuda.synchronize()
            step.add_product(out_1HD.view(-1), o, None, x_E)
            if wait:
                torch.cuda.synchronize()

    chain(wait=True)
    expected = x_E.clone()
    torch.cuda.synchronize()  # before another stream changes it
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        chain(wait=False)  # its workspace
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        chain(wait=False)
    for _ in range(10):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(x_E, expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_of_quantized_matrices_with_x_of_any_spread(dtype: torch.dtype, bits: int) -> None:
    check_spread(dtype, "cuda", bits)


def test_best_token_is_the_lowest_of_the_best() -> None:
    check_best_token("cuda")


def test_a_chain_that_starts_early_reads_nothing_early() -> None:
    """Each kernel begins before the one that feeds it has ended; 400 of them in a graph give what one by one give."""
    from minirea.kernels.steps import matvec as step

    r = Inputs(torch.float32, "cuda")
    E, F = 1024, 2048
    norm_E, gate_up, down = r.normal(E), r.normal(2 * F, E), r.normal(E, F)
    start_E, x_E, act_F = r.normal(E), r.poison(E), r.poison(F)

    def chain(wait: bool) -> None:
        x_E.copy_(start_E)
        for _ in range(200):
            step.norm_gate_up(x_E, norm_E, gate_up, None, EPS, act_F)
            if wait:
                torch.cuda.synchronize()
            step.add_product(act_F, down, None, x_E)
            if wait:
                torch.cuda.synchronize()

    chain(wait=True)
    expected = x_E.clone()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        chain(wait=False)
    for _ in range(20):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(x_E, expected)
