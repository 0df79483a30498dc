"""The end of a prompt under observation, step by step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minirea.cache import KVCache
from minirea.generate import prefill
from minirea.isolation import isolated
from minirea.model import Model
from minirea.observer import Observer, observed


@isolated()
def observe_end(model: Model, ids: Sequence[int], num_steps: int, observer: Observer, progress: bool = False) -> None:
    """Read a prompt as `generate` does; observe its last `num_steps` tokens as decode steps, and the chunk before.

    Args:
        ids: the prompt, longer than num_steps.
    """
    observed_stop = len(ids) - num_steps
    observed_start = (observed_stop - 1) // model.attention.config.chunk_size * model.attention.config.chunk_size
    # Up to dense_limit, keys are kept both with RoPE and without, in "full" too, whose own caches drop the latter.
    dense_limit = min(model.attention.dense_limit, len(ids))
    cache = KVCache(
        model.config, len(ids), dense_limit, model.device, model.dtype, winners_shape=model.attention.winners_shape
    )
    prefill(model, cache, list(ids[:observed_start]), len(ids) - observed_start, progress)
    ids_T = torch.tensor(ids, dtype=torch.long, device=model.device)
    watched = observed(model, observer, horizon=len(ids))
    watched.forward(ids_T[observed_start:observed_stop], cache, len(ids))
    for position in range(observed_stop, len(ids)):
        watched.forward(ids_T[position : position + 1], cache, len(ids))
