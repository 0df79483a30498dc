"""Inputs for the kernels of a decode step, and the judgement of what they write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from kernel_cases import error

from minirea.kernels.steps import reference as twins
from minirea.quantize import QuantizedMatrix

EPS = 1e-5
# H, G, D, E, F, V: sizes that tiles divide, sizes that they do not, and rows that take several tiles.
SMALL = [(4, 2, 16, 64, 112, 64), (3, 1, 10, 40, 51, 33), (2, 1, 4, 2600, 7, 9)]


def check(kernel: Callable[..., None], out: list[int], *arguments: Any) -> None:
    """`kernel` writes arguments `out`: everything that its twin writes, nothing else, and no less exactly.

    The error is judged against the twin in float64: at most twice that of the twin in the tensors' dtype, and rounding.
    """
    twin = getattr(twins, kernel.__name__)
    exact = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else _copy(x) for x in arguments]
    plain, got = [_copy(x) for x in arguments], [_copy(x) for x in arguments]
    twin(*exact)
    twin(*plain)
    kernel(*got)
    for index, argument in enumerate(arguments):
        if index in out:
            assert torch.equal(got[index].isnan(), exact[index].isnan())
            found, rough, right = (x[index].nan_to_num() for x in (got, plain, exact))
            assert error(found, right) <= 2 * error(rough, right) + torch.finfo(found.dtype).eps
        elif isinstance(argument, torch.Tensor):
            assert torch.equal(got[index], plain[index])


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


class Inputs:
    """Random vectors and matrices of one dtype on one device, of a size that keeps products near 1."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        spread = shape[-1] ** -0.5 if len(shape) > 1 else 1.0
        return (torch.randn(shape, generator=self.generator) * spread).to(self.device, self.dtype)

    def poison(self, *shape: int) -> torch.Tensor:
        return torch.full(shape, torch.nan, device=self.device, dtype=self.dtype)

    def count(self, value: int) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.int32, device=self.device)

    def token(self, value: int) -> torch.Tensor:
        return torch.tensor([value], device=self.device)

    def matrix(self, N: int, K: int, bits: int = 0, size: int = 0) -> torch.Tensor | QuantizedMatrix:
        """Of the dtype, or quantized to so many bits, in groups as QuantizedMatrix.empty has them; then it lies between
        words and NaNs that are not its own.
        """
        if not bits:
            return self.normal(N, K)
        made = QuantizedMatrix.empty(N + 2, K, bits, size, torch.device(self.device))
        made.words.fill_(-1)
        made.scale_offset.fill_(torch.nan if made.units is None else -1)
        if made.units is not None:
            made.units.fill_(torch.nan)
        made.rows(1, N + 1).round(self.normal(N, K))
        return made.rows(1, N + 1)


def check_all(shape: tuple[int, ...], dtype: torch.dtype, device: str, bias: bool, bits: int = 0) -> None:
    """Every kernel of the step, once, with matrices of the dtype or of so many bits."""
    from minirea.kernels.steps import matvec as step

    H, G, D, E, F, V = shape
    r = Inputs(dtype, device, seed=sum(shape))
    x_E, norm_E = r.normal(E), r.normal(E)

    def matrix(N: int, K: int) -> torch.Tensor | QuantizedMatrix:
        return r.matrix(N, K, bits)

    def maybe(size: int) -> torch.Tensor | None:
        return r.normal(size) if bias else None

    for token in (V - 1, -1):
        check(step.embed, [3], r.token(token), r.normal(V, E), r.count(5), r.poison(E))
    caches = (r.poison(H, D), r.poison(G, 9, D), r.poison(9, G, D).transpose(0, 1))
    X = (H + 2 * G) * D
    check(step.norm_qkv, [6, 7, 8], x_E, norm_E, matrix(X, E), maybe(X), EPS, r.count(7), *caches)
    check(step.norm_gate_up, [5], x_E, norm_E, matrix(2 * F, E), maybe(2 * F), EPS, r.poison(F))
    for N, K in ((min(E, 64), H * D), (5, F), (5, E), (11, 8500)):
        check(step.add_product, [3], r.normal(K), matrix(N, K), maybe(N), r.normal(N))
    check(step.norm_logits, [4], x_E, norm_E, matrix(V, E), EPS, torch.full((V,), torch.nan, device=device))


def check_tiles(dtype: torch.dtype, device: str, bits: int) -> None:
    """Products of quantized matrices, whatever their tiles: pieces that fill rows, that do not, and all of a row, also
    of two blocks of rows.
    """
    from minirea.kernels.steps import matvec as step

    K, warp = 3072, 32 * 4 * 32 // bits
    r = Inputs(dtype, device, seed=bits)
    x_K, norm_K = r.normal(K), r.normal(K)
    tiles = (2, 1, 32, 1), (8, 1, 64, 1), (16, 2, 128, 1), (4, 4, 256, 1), (8, 8, 64, 1), (8, bits, 0, 2), (4, 8, 64, 2)
    for rows, warps, size, blocks in tiles:
        gate_up, w = r.matrix(22, K, bits, size), r.matrix(19, K, bits, size)
        tile = step.Tile(rows, warp * warps, warps, bits, w.group_size, blocks)
        with mock.patch.object(step, "tile_of_words", return_value=tile):
            check(step.norm_gate_up, [5], x_K, norm_K, gate_up, None, EPS, r.poison(11))
            check(step.add_product, [3], x_K, w, r.normal(19), r.normal(19))
            if blocks > 1:  # and a piece that is all of a row, to its end
                caches, even = (r.poison(3, 5), r.poison(1, 9, 5), r.poison(1, 9, 5)), warp * warps
                qkv = r.matrix(25, even, bits, size)
                x = r.normal(even), r.normal(even)
                check(step.norm_qkv, [6, 7, 8], *x, qkv, r.normal(25), EPS, r.count(7), *caches)
    for size in (2**-12, 2**12) if dtype == torch.float16 else (2**-50, 2**40):
        check(step.add_product, [3], x_K * size, w, None, torch.zeros_like(x_K[:19]))


def check_spread(dtype: torch.dtype, device: str, bits: int) -> None:
    """Products of quantized matrices with x whose elements differ widely, or which is not finite."""
    from minirea.kernels.steps import matvec as step

    K = 520
    r = Inputs(dtype, device, seed=bits)
    x_K, w, zero = r.normal(K), r.matrix(3, K, bits), torch.zeros(3, dtype=dtype, device=device)
    columns = torch.arange(K, device=device)
    uneven = torch.where(columns % 41 == 7, x_K * 500, torch.where(columns % 128 < 64, x_K, 0 * x_K))
    below = torch.nextafter(torch.ones_like(x_K), zero[:1]) * x_K.sign()  # a power of two, to which it may round
    for x in (uneven, below):
        check(step.add_product, [3], x, w, None, zero)
    for value in (torch.nan, torch.inf, -torch.inf):
        spoilt, out = x_K.clone(), zero.clone()
        spoilt[K // 2 + 5] = value
        with np.errstate(invalid="ignore"):  # in the interpreter
            step.add_product(spoilt, w, None, out)
        assert not out.isfinite().any()


def check_best_token(device: str) -> None:
    """The lowest of the best; a token that is no token where the logits are not usable; and a clean second call."""
    from minirea.kernels.steps import matvec as step

    workspace = step.BestTokenWorkspace.on(torch.device(device))
    new, expected = (step.NewToken.on(torch.device(device), 7, seq_len) for seq_len in (40, 40))
    generator = torch.Generator().manual_seed(0)
    for V in (1, 97, 2048, 70_001):
        for spoil in (None, torch.nan, -torch.nan, torch.inf, -torch.inf):
            logits_V = torch.randint(-9, 9, (V,), generator=generator).float().to(device)
            if spoil is not None:
                logits_V[V // 2] = spoil
            for tokens in (new, expected):
                tokens.seq_len.add_(1)
                tokens.on_host.fill_(-9)  # the other one stays
            step.best_token(logits_V, workspace, new)
            twins.best_token(logits_V, workspace, expected)
            assert_left(new, expected)
            sampled = torch.tensor([V + 3], device=device)
            for tokens, keep in ((new, step.keep_token), (expected, twins.keep_token)):
                tokens.seq_len.add_(1)
                keep(sampled, tokens)
            assert_left(new, expected)
            assert expected.token.item() == expected.on_host[int(expected.seq_len) % 2] == V + 3


def assert_left(found: Any, expected: Any) -> None:
    if found.token.is_cuda:
        torch.cuda.synchronize()
    assert [part.tolist() for part in found] == [part.tolist() for part in expected]
