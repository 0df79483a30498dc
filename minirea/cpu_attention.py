"""Attention of a CPU, and the search for what it attends to: the phases of minirea.kernels.reference, faster.

What is searched for, and what a decode step attends to, are kernels of minirea.kernels.cpu, where they can be compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minirea.config import ReAttentionConfig
from minirea.cpu import multiplies_tiles, row_blocks
from minirea.kernels.cpu import attend as kernels
from minirea.kernels.cpu.choose import choose
from minirea.kernels.cpu.compile import available
from minirea.kernels.cpu.search import search, search_many
from minirea.kernels.cpu.winners import MOST_WINNERS
from minirea.kernels.reference import choose_scope, locate, rotate
from minirea.kernels.votes import Votes
from minirea.rope import apply_rope

_FLASH: Final = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # also gives the sums of exponentials


def computes_in(dtype: torch.dtype) -> bool:
    """Whether attention in `dtype` has its own way here; any other is the reference's."""
    return dtype == torch.float32 or multiplies_tiles(dtype)


def attend(q_1HD: Tensor, k_GND: Tensor, v_GND: Tensor) -> Tensor:
    """Softmax attention of one query over all N keys, scale 1 / sqrt(D): [1, H, D], in a dtype that `computes_in`."""
    if available():
        return kernels.attend(q_1HD[0].float().contiguous(), k_GND, v_GND, kernels.all_of(k_GND.shape[1]))[None].to(
            q_1HD.dtype
        )
    q_GRD = q_1HD.reshape(len(k_GND), -1, q_1HD.shape[2])
    return F.scaled_dot_product_attention(q_GRD[None], k_GND[None], v_GND[None]).view(q_1HD.shape)


def attend_causal(q_THD: Tensor, k_GND: Tensor, v_GND: Tensor) -> Tensor:
    """Causal softmax attention of the last T of N tokens over all N, scale 1 / sqrt(D): [T, H, D].

    Two calls of torch's flash attention, and no mask: every query sees the N - T tokens before the chunk, and the
    chunk itself is a square, whose upper half is skipped. The logarithms of both sums of exponentials say what share
    each has of the whole.
    """
    (T, H, D), (G, N, _) = q_THD.shape, k_GND.shape
    q_GMTD = q_THD.unflatten(1, (G, H // G)).permute(1, 2, 0, 3)  # M = H / G query heads that share keys
    shape = (G, H // G, T, D)
    k_GMTD, v_GMTD = (x[:, None, N - T :].expand(shape) for x in (k_GND, v_GND))
    out_GMTD, sum_GMT = _FLASH(q_GMTD, k_GMTD, v_GMTD, 0.0, is_causal=True)
    if N > T:
        q_G1RD = q_GMTD.flatten(1, 2)[:, None]  # query heads as rows of one head: larger products
        before, before_sum = _FLASH(q_G1RD, k_GND[:, None, : N - T], v_GND[:, None, : N - T], 0.0)
        share_GMT = torch.sigmoid(sum_GMT - before_sum.view(shape[:3]))
        out_GMTD = torch.lerp(before.view(shape), out_GMTD, share_GMT[..., None].to(out_GMTD.dtype))
    return out_GMTD.permute(2, 0, 1, 3).reshape(T, H, D)


def reattention(
    q_THD: Tensor,
    k_cache_GND: Tensor,
    v_cache_GND: Tensor,
    seq_len: int,
    cos: Tensor,
    sin: Tensor,
    config: ReAttentionConfig,
    gather: Callable[[Tensor], Tensor] | None = None,
    votes: Votes | None = None,
    winners: Tensor | None = None,
) -> Tensor:
    """`minirea.kernels.reattention` of one chunk, beyond global_size + local_size tokens, with one vote for all heads.

    The reference's phases up to the scope; then a chunk is attended to without a mask. A decode step searches and
    attends by kernels, where they can be compiled. Arguments are the reference's, in a dtype that `computes_in`.
    """
    T, H, D = q_THD.shape
    G = len(k_cache_GND)
    has_kernels = available() and config.span_top_k <= MOST_WINNERS
    if T == 1 and has_kernels:
        q_HD = q_THD[0].float().contiguous()
        runs_X2 = _scope(q_HD, k_cache_GND, seq_len, config, gather, votes, winners)
        return kernels.attend(q_HD, k_cache_GND, v_cache_GND, runs_X2, (cos, sin))[None].to(q_THD.dtype)

    q_GRD = q_THD.unflatten(1, (G, H // G)).transpose(0, 1).reshape(G, -1, D)
    score = search_many if has_kernels else None
    arguments = q_GRD.float(), k_cache_GND, seq_len, config, score, gather, votes, winners
    start_1P, offset_1P, length_1 = choose_scope(*arguments)
    S = int(length_1)
    source_S = locate(torch.arange(S), start_1P, offset_1P)[0]
    k_GSD, v_GSD = k_cache_GND.index_select(1, source_S), v_cache_GND.index_select(1, source_S)
    _rotate_in_blocks(k_GSD.transpose(0, 1), cos[:S, None], sin[:S, None])
    q_THD = _rotate_in_blocks(q_THD.clone(), cos[S - T : S, None], sin[S - T : S, None])
    return attend_causal(q_THD, k_GSD, v_GSD)


def _scope(
    q_HD: Tensor,
    k_cache_GND: Tensor,
    seq_len: int,
    config: ReAttentionConfig,
    gather: Callable[[Tensor], Tensor] | None,
    votes: Votes | None,
    winners: Tensor | None,
) -> np.ndarray:
    """Runs of a decode step's scope, as kernels.attend takes them: the reference's `choose_scope`."""
    start, stop = config.global_size, seq_len - config.local_size
    if not config.max_selected:
        return np.array([(2, seq_len - stop + start), (0, start), (stop, seq_len)], np.int64)
    found_HK = search(q_HD, k_cache_GND, start, stop, config.span_top_k)
    if gather is not None:
        found_GRK = torch.from_numpy(found_HK).view(len(k_cache_GND), -1, found_HK.shape[1])
        found_HK = gather(found_GRK).flatten(0, 1).numpy()
    row_HK = None if winners is None else winners[(seq_len - 1) % len(winners)]
    return choose(config, found_HK, seq_len, None if votes is None else votes.counts[0], row_HK)


def _rotate_in_blocks(x_TXD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The reference's `rotate` of rows by cos and sin [T, 1, D / 2], in place."""
    for rows in row_blocks(len(x_TXD)):
        rotated = rotate(x_TXD[rows], cos[rows], sin[rows])
        if rotated.dtype != torch.float32:  # which is overwritten
            x_TXD[rows] = rotated
    return x_TXD


def place_rope(x_TXD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """minirea.rope.apply_rope of rows by cos and sin [T, 1, D]."""
    if len(x_TXD) == 1:
        return apply_rope(x_TXD, cos, sin)
    out_TXD = torch.empty(x_TXD.shape, dtype=x_TXD.dtype)
    for rows in row_blocks(len(x_TXD)):
        out_TXD[rows] = apply_rope(x_TXD[rows], cos[rows], sin[rows])
    return out_TXD
