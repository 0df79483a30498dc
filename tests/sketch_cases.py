"""Steps with a sketch, of integers and of real numbers, and keys that try its bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from kernel_cases import Case, make_case

from minirea.kernels import ReAttentionConfig, Sketch, new_sketch, sketch_keys

Change = Callable[[torch.Tensor, torch.Generator], Any]  # of keys [G, N, D] in place


def sketch_of(case: Case, impl: str, stop: int | None = None) -> Sketch:
    """The sketch of the first `stop` keys, or of those before the local part, which a step does not search; beyond it
    garbage.
    """
    sketch = new_sketch(case.k_cache.shape[0], case.k_cache.shape[2], case.k_cache.shape[1], case.k_cache.device)
    sketch.codes.fill_(127)
    sketch.scales.fill_(-1)  # NaN, NaN
    stop = max(0, case.seq_len - case.config.local_size) if stop is None else stop
    sketch_keys(case.k_cache, sketch, 0, stop, new_mean=True, impl=impl)
    return sketch


def real_case(
    config: ReAttentionConfig, seq_len: int, seed: int, dtype: torch.dtype = torch.float32, **shape: int
) -> Case:
    """Normal keys, half of them close to directions that heads share, as real ones are."""
    case = make_case(config, seq_len, dtype=dtype, seed=seed, **shape)
    generator = torch.Generator().manual_seed(seed)
    G, N, D = case.k_cache.shape
    keys = torch.randn(G, N, D, generator=generator)
    keys += 2 * torch.randn(G, 4, D, generator=generator)[:, torch.randint(0, 4, (N,), generator=generator)]
    case.q = torch.randn(case.q.shape, generator=generator).to(dtype)
    case.k_cache[:, :seq_len] = keys[:, :seq_len].to(dtype)
    return case


def found(case: Case) -> tuple[list[int], int]:
    """Survivors of each slice in the last step with a sketch; more than the second number, which is the room for them,
    where all keys were scored.
    """
    from minirea.kernels.fused import launch
    from minirea.kernels.fused.arguments import SketchTiles

    layer = launch.Layer.of(case.q, case.k_cache, case.config, None)
    ((key, scratch),) = (
        (key, scratch)
        for key, scratch in launch._workspaces.items()
        if isinstance(scratch, launch.DecodeScratch) and layer in key and scratch.found is not None
    )
    room = next(part.SURVIVORS for part in key if isinstance(part, SketchTiles))
    survivors: list[int] = scratch.found.flatten().tolist()
    return survivors, room


def one_huge_channel(k: torch.Tensor, _: torch.Generator) -> None:
    k[..., 1] = 200.0


def one_huge_channel_of_either_sign(k: torch.Tensor, generator: torch.Generator) -> None:
    k[..., 1] = 200.0 * (2 * torch.randint(0, 2, k.shape[:2], generator=generator, device=k.device) - 1)


def all_equal(k: torch.Tensor, _: torch.Generator) -> None:
    k[:] = k[:, :1].clone()


def many_equal(k: torch.Tensor, generator: torch.Generator) -> None:
    """As layer 0 has of a text's few thousand tokens."""
    k[:] = k[:, torch.randint(0, 9, (k.shape[1],), generator=generator, device=k.device)].clone()


def barely_different(k: torch.Tensor, generator: torch.Generator) -> None:
    """By much less than int8 can tell: every key lies within the bounds of every other."""
    k[:] = k[:, :1] + 1e-3 * torch.randn(k.shape, generator=generator, device=k.device).to(k.dtype)


def few_stand_out(k: torch.Tensor, generator: torch.Generator) -> None:
    """Winners beyond the bounds of all others, which are nothing but noise."""
    k *= 1e-2
    k[:, torch.randint(0, k.shape[1], (12,), generator=generator, device=k.device)] *= 500


def ladder(k: torch.Tensor, _: torch.Generator) -> None:
    """Keys that grow by half a step of int8 each: just within a bound of their neighbours, beyond that of others."""
    k[:] = k[:, :1] * (1 + torch.arange(k.shape[1], device=k.device) / 254)[:, None].to(k.dtype)


def zero(k: torch.Tensor, _: torch.Generator) -> None:
    k[:] = 0.0
    k[:, ::2] = -0.0


def tiny(k: torch.Tensor, _: torch.Generator) -> None:
    k *= 1e-6


def of_all_sizes(k: torch.Tensor, generator: torch.Generator) -> None:
    k *= (10.0 ** (8 * torch.rand(*k.shape[:2], 1, generator=generator, device=k.device) - 5)).to(k.dtype)


CHANGES: tuple[Change, ...] = (
    *(one_huge_channel, one_huge_channel_of_either_sign, all_equal, many_equal, barely_different, few_stand_out),
    *(ladder, zero, tiny, of_all_sizes),
)


def changed(case: Case, change: Change, seed: int = 0) -> Case:
    """The case with its keys changed; what lies beyond seq_len stays."""
    k_cache = case.k_cache.clone()
    change(k_cache[:, : case.seq_len], torch.Generator(k_cache.device).manual_seed(seed))
    return replace(case, k_cache=k_cache)
