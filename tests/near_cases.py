"""Steps over a cache that is far, whose newest tokens are near as well: rows hold NaN where they are not to be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from kernel_cases import Case, as_list

from minirea.kernels import Near, Sketch, reattention
from minirea.kernels.near import write_near
from minirea.pinned import host_tensor


def near_of(case: Case, keys: bool, values: bool, chunk_size: int | None = None, size: int = 0) -> Near:
    """Rows for the local parts of a case's chunks, `size` or about as many as it takes; NaN where no step reads."""
    T, config = len(case.q), case.config
    first = case.seq_len - T + min(T, chunk_size or T)  # cached tokens with the first chunk
    start = 0 if first <= config.dense_size else first - config.local_size
    size = size or max(config.local_size, config.dense_size) + T + case.seq_len % 9
    rows = Near(*(torch.full_like(case.k_cache[:, :1], torch.nan).repeat(1, size, 1) for _ in range(2)))
    kept = slice(start, case.seq_len)
    write_near(rows, start, case.k_cache[:, kept], case.v_cache[:, kept])
    return Near(rows.k if keys else None, rows.v if values else None)


def far_case(case: Case, keys: bool, values: bool) -> Case:
    """The case with NaN in its cache wherever only near rows are to be read.

    The chunk kernel reads all keys from the cache, and the last tile of a far part, which has the first rows of the
    local part.
    """
    from minirea.kernels.fused import plan

    seq_len, config = case.seq_len, case.config
    decodes = plan.Layer.of(case.q, case.k_cache, config).decodes(len(case.q))
    start = 0 if seq_len <= config.dense_size else seq_len - config.local_size
    k_GND, v_GND = case.k_cache.clone(), case.v_cache.clone()
    if keys and decodes:
        k_GND[:, start:] = torch.nan
    if values:
        v_GND[:, start + (0 if decodes or seq_len <= config.dense_size else 128) :] = torch.nan
    return replace(case, k_cache=k_GND, v_cache=v_GND)


def on_host(case: Case) -> Case:
    """A GPU's case with its cache in the host's memory, token by token."""
    caches = []
    for cache in (case.k_cache, case.v_cache):
        G, N, D = cache.shape
        host = host_tensor((N, G, D), cache.dtype, cache.device)
        host.on_device.copy_(cache.transpose(0, 1))
        torch.cuda.synchronize()
        assert torch.equal(host.on_cpu.nan_to_num(), cache.transpose(0, 1).cpu().nan_to_num())
        caches.append(host.on_device.transpose(0, 1))
    return replace(case, k_cache=caches[0], v_cache=caches[1])


def check_near(
    case: Case,
    chunk_size: int | None = None,
    sketch: Sketch | None = None,
    size: int = 0,
    to_host: Callable[[Case], Case] = lambda case: case,
    kinds: Sequence[tuple[bool, bool]] = ((False, True), (True, True), (True, False)),
) -> None:
    """A step does bit for bit what it does with all of the cache near.

    Args:
        size: see near_of; every one is compiled anew.
        to_host: moves a case's cache.
        kinds: whether there are near keys, and near values.
    """
    whole = chunk_size is None or chunk_size >= len(case.q)

    def step(case: Case, near: Near | None) -> tuple[torch.Tensor, list[list[int]]]:
        options = {"impl": "triton", "chunk_size": chunk_size, "sketch": sketch, "near": near}
        if not whole:
            return reattention(*case.arguments(), **options), []
        out_THD, selection = reattention(*case.arguments(), return_selection=True, **options)
        return out_THD, [s.tolist() for s in as_list(selection)]

    expected = step(case, None)
    assert not expected[0].isnan().any()
    for keys, values in kinds:
        found = step(to_host(far_case(case, keys, values)), near_of(case, keys, values, chunk_size, size))
        assert found[1] == expected[1]
        assert torch.equal(found[0], expected[0])
