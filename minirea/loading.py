"""A model in memory, or one rank's part of it, and caches for its steps."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from minirea.attention import Attention
from minirea.cache import KVCache, alone
from minirea.isolation import isolated
from minirea.leader import Leader, SharedCache
from minirea.model import Model
from minirea.plan import fit_steps, keeps_half, plan_cache, workspace_bytes
from minirea.ranks import Ranks
from minirea.weights import load_weights


@isolated()
def load_model(
    path: str | Path,
    attention: Attention,
    dtype: torch.dtype,
    quantize: str | None = None,
    progress: bool = False,
    ranks: Ranks | None = None,
) -> Model:
    """Read the weights in a directory: of the model that `attention` is of, which may be a rank's part.

    Args:
        progress: show a bar on stderr.
        ranks: that share the model. `attention` gathers winners over them from here on.

    Raises what load_weights raises.
    """
    config, device = attention.model, attention.device
    weights = load_weights(path, config, device, dtype, progress, keeps_half(dtype, device), quantize)
    model = Model(config, weights, attention, progress, ranks)
    attention.gather = model.gather
    return model


def new_cache(model: Model, capacity: int) -> KVCache:
    """A cache for a model's steps; on all its ranks, if it has several and this is the first."""
    attention = model.attention
    workspace = functools.partial(workspace_bytes, attention, model.dtype, quantize=model.quantize)
    if model.ranks is None:
        fit_steps(attention, lambda: plan_cache(attention, model.dtype, capacity, model.quantize)[1])
    sizes = model.config, capacity, attention.dense_limit, model.device, model.dtype
    options: dict[str, Any] = {"workspace": workspace, "placements": attention.placements}
    options["winners_shape"] = attention.winners_shape
    if isinstance(model.ranks, Leader):
        return SharedCache(model.ranks, model, *sizes, **options)
    return KVCache(*sizes, **options, least=model.ranks.least if model.ranks else alone)
