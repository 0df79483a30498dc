"""What a run needs in memory, from the config and the lengths alone, so that it can be refused before it begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from minirea.attention import Attention
from minirea.cache import cache_bytes, far_bytes
from minirea.config import ModelConfig
from minirea.cpu import MAX_PREPARING_THREADS, is_prepared, multiplies_tiles, preparing_bytes, tiled_bytes
from minirea.kernels import scratch_bytes
from minirea.linear import WIDENED_AT_ONCE, WIDENED_BY_KERNELS
from minirea.memory import MemoryPlan, first_that_fits
from minirea.placement import Placement
from minirea.weights import quantizing_bytes, stored_weight_bytes, weight_bytes

# Kernels that are loaded on first use, cuBLAS's workspaces, and what an allocator cannot use for its blocks' sizes.
RESERVED: Final = {"cpu": 64 * 2**20, "cuda": 768 * 2**20}


def keeps_half(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether half-precision matrices stay so: float32 arithmetic on a CPU that multiplies by them (minirea.cpu)."""
    return device.type == "cpu" and is_prepared(dtype)


def plan_run(
    path: str | Path, attention: Attention, dtype: torch.dtype, num_tokens: int = 0, quantize: str | None = None
) -> MemoryPlan:
    """Weights, what loading them takes besides, and the cache and workspace of `num_tokens`; 0: not known yet.

    Raises what load_weights raises for the files' headers.
    """
    if quantize:
        weights, loading = _quantized_model_bytes(path, attention.model, dtype, attention.device, quantize)
    else:
        weights, loading = _model_bytes(path, attention.model, dtype, attention.device)
    if not num_tokens:
        return MemoryPlan(weights, loading, ranks=attention.model.ranks)
    return plan_cache(attention, dtype, num_tokens, quantize, weights, loading)[1]


def plan_cache(
    attention: Attention,
    dtype: torch.dtype,
    num_tokens: int,
    quantize: str | None = None,
    weights: int = 0,
    loading: int = 0,
) -> tuple[Placement, MemoryPlan]:
    """Of what a cache of `num_tokens` may be the first that fits, with its workspace and these bytes, or the one that
    comes closest.
    """
    workspace, sizes = workspace_bytes(attention, dtype, num_tokens, quantize), (attention.dense_limit, dtype)
    found, plans = attention.placements(num_tokens), []
    for placement in found:
        far = far_bytes(attention.model, num_tokens, dtype, placement)
        cache = cache_bytes(attention.model, num_tokens, *sizes, attention.winners_shape, placement) - far
        sizes_of_run = weights, loading, cache, workspace, num_tokens
        plans.append(MemoryPlan(*sizes_of_run, host_cache=far, ranks=attention.model.ranks))
    index = first_that_fits(plans, attention.device)
    return found[index], plans[index]


def fit_steps(attention: Attention, plan: Callable[[], MemoryPlan]) -> MemoryPlan:
    """A plan with as many chunks in a step of a prompt as fit, and not more from then on; with one if none fits.

    Steps of fewer chunks hold less and take longer, though not as long as with a cache in the host's memory. Ranks,
    which read in step, keep to STEP_CHUNKS.

    Args:
        plan: makes one for `attention` as it is.
    """
    most, fixed = attention.step_chunks, not attention.can_capture or attention.model.part is not None
    for on_host in (False, True):
        attention.step_chunks = most
        while not ((made := plan()).fits(attention.device) and (on_host or not made.host_cache)):
            if fixed or attention.step_chunks == 1:
                break
            attention.step_chunks //= 2
        else:
            return made
    return made


def _model_bytes(path: str | Path, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Of the weights, and besides them while they are loaded."""
    if device.type != "cpu":
        return weight_bytes(config, dtype), 0
    if is_prepared(dtype):
        return _compact_model_bytes(path, config, dtype)
    if multiplies_tiles(dtype):
        return weight_bytes(config, dtype, tiled_bytes), _preparing_bytes(config)
    return weight_bytes(config, dtype), _preparing_bytes(config)


def _preparing_bytes(config: ModelConfig) -> int:
    """Of matrices that change their layout: the head, and each layer's largest."""
    rows = [config.vocab_size, *[2 * config.mlp_size] * min(config.num_layers, MAX_PREPARING_THREADS)]
    return preparing_bytes(n * config.hidden_size for n in rows)


def _quantized_model_bytes(
    path: str | Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, quantize: str
) -> tuple[int, int]:
    """_model_bytes of matrices that are rounded while they are loaded."""
    quantizing = quantizing_bytes(config, device)
    if keeps_half(dtype, device):
        weights, packing = _compact_model_bytes(path, config, dtype, quantize)
        return weights, packing + quantizing
    return stored_weight_bytes(path, config, dtype, quantize, keep_half=False), quantizing


def _compact_model_bytes(
    path: str | Path, config: ModelConfig, dtype: torch.dtype, quantize: str | None = None
) -> tuple[int, int]:
    """_model_bytes of matrices of which those of bfloat16 become compact when all are loaded."""
    stored, weights = (stored_weight_bytes(path, config, dtype, quantize, compact=compact) for compact in (False, True))
    return weights, max(0, stored - weights + _preparing_bytes(config))


def workspace_bytes(attention: Attention, dtype: torch.dtype, num_tokens: int, quantize: str | None = None) -> int:
    """What the largest step holds besides weights and cache: T tokens of a context of `num_tokens`.

    An estimate, rather too high: activations as if none were freed within a block and votes that add up, twice where a
    graph of the step has its own, logits, a part of a quantized matrix made wide, and the scratch of the fused kernel,
    or a scope's keys and values, gathered and rotated, and a causal mask.
    """
    c, scope = attention.model, attention.config
    T = min(max(map(attention.step_tokens, (scope.chunk_size, scope.tail_chunk_size))), num_tokens)
    heads = c.num_heads + 2 * c.num_kv_heads
    copies = 2 if attention.impl == "triton" else 1
    activations = copies * T * (5 * c.hidden_size + 3 * heads * c.head_dim + 3 * c.mlp_size) * dtype.itemsize
    logits = c.vocab_size * (dtype.itemsize + 2 * torch.float32.itemsize)
    S = num_tokens if attention.mode == "full" else min(num_tokens, scope.max_scope)
    if attention.mode == "full":
        gathered = 0
    elif attention.impl == "triton":
        gathered = _scratch_bytes(attention, dtype, num_tokens)
    else:  # and, on a CPU, a head's keys in bytes
        gathered = 4 * c.num_kv_heads * S * c.head_dim * torch.float32.itemsize + num_tokens * c.head_dim
    masked = attention.device.type == "cpu" or attention.impl == "torch"
    mask = T * (c.num_heads // c.num_kv_heads) * S * (1 + torch.float32.itemsize) if masked else 0
    # cos and sin, and those of a cache that grew to this one: all of them together have at most as many rows.
    tables = 2 * 2 * attention.table_rows(num_tokens) * c.head_dim // 2 * torch.float32.itemsize
    wide = _wide_bytes(attention, dtype, copies) if quantize else 0
    votes = attention.new_votes(num_tokens, torch.device("meta")) if attention.carries_votes else ()
    voted = copies * sum(tensor.nbytes for tensor in votes)
    return RESERVED[attention.device.type] + activations + logits + gathered + mask + tables + wide + voted


def _wide_bytes(attention: Attention, dtype: torch.dtype, copies: int) -> int:
    """Of the part of a quantized matrix that is wide at a time; torch's own operations hold some copies of it."""
    if attention.impl == "triton":
        return copies * WIDENED_BY_KERNELS * dtype.itemsize
    return copies * WIDENED_AT_ONCE * 4 * torch.float32.itemsize


def _scratch_bytes(attention: Attention, dtype: torch.dtype, num_tokens: int) -> int:
    """What the fused kernel keeps for steps of a prompt, of its tail and of decoding."""
    c, scope = attention.model, attention.config
    sizes = {scope.chunk_size, scope.tail_chunk_size}
    steps = [(min(attention.step_tokens(size), num_tokens), size) for size in sizes]
    sizes_of_model = c.num_heads, c.num_kv_heads, c.head_dim, dtype
    ranks, decode = c.ranks, scope.of_decode_step
    sketched = any(placement.sketched for placement in attention.placements(num_tokens))
    all_alike = decode is scope and not attention.carries_votes
    sketched_here = sketched and all_alike
    scratch = scratch_bytes(*sizes_of_model, scope, num_tokens, steps, attention.device, ranks, sketched_here)
    if all_alike:
        return scratch
    options = ranks, sketched, attention.carries_votes
    own = scratch_bytes(*sizes_of_model, decode, num_tokens, [(1, 1)], attention.device, *options)
    return scratch + own
