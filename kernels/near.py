"""The newest tokens of a cache that lies far from the device: in the host's memory, which kernels reach by its address.

Every step attends to its local part, and reads it again in the next one. What of a cache is far is therefore held twice
for the newest tokens: token j also in row j modulo R of R rows on the device. Kernels read the local part there, all of
a context up to dense_size tokens included, and the global part and the selected spans, which are few, where they lie.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch


class Near(NamedTuple):
    """Keys and values of the newest tokens, [G, R, D] each, token j in row j modulo R; None for those that the cache
    itself has near. R is at least the longest local part of a step's chunks together.
    """

    k: Any
    v: Any


def near_rows(near: Near | None) -> dict[str, int]:
    """The rows of a Near by the names of kernels' constants, 0 where there are none."""
    keys, values = near or Near(None, None)
    return {"NEAR_K": 0 if keys is None else keys.shape[1], "NEAR_V": 0 if values is None else values.shape[1]}


TAKEN_BACK: Final = 256  # of the newest tokens so many can be taken back without reading near rows anew


def near_size(local_size: int, dense_size: int, step_tokens: int) -> int:
    """R for steps of up to so many tokens: their local parts, and the tokens that may be taken back."""
    return -(-(max(local_size, dense_size) + step_tokens + TAKEN_BACK) // 256) * 256


def new_near(num_kv_heads: int, rows: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Room for near keys or values, [G, R, D]."""
    return torch.empty(num_kv_heads, rows, head_dim, dtype=dtype, device=device)


def write_near(near: Near, start: int, k_GTD: torch.Tensor, v_GTD: torch.Tensor) -> None:
    """Put keys and values of tokens [start, start + T), T at most R, where they go."""
    for rows_GRD, new_GTD in zip(near, (k_GTD, v_GTD), strict=True):
        if rows_GRD is not None:
            R, T = rows_GRD.shape[1], new_GTD.shape[1]
            first = start % R
            before = min(T, R - first)  # the end of the rows
            rows_GRD[:, first : first + before] = new_GTD[:, :before]
            rows_GRD[:, : T - before] = new_GTD[:, before:]
