"""Attention of a CPU, and the search for what it attends to: the phases of minirea.kernels.reference, faster.

Decode steps share copies of keys (`KeyCopies`): the local part with RoPE, and where the processor has tiles for
bfloat16 (AMX) the middle in it, which says which few keys have to be scored in float32. A chunk of a prompt is searched
likewise. Equal keys score the same, however many of them, or rows, a product has.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minirea.config import ReAttentionConfig
from minirea.cpu import multiplies_tiles, row_blocks
from minirea.kernels.reference import BLOCK, INDEX_MASK, choose_scope, locate, not_alone, rotate
from minirea.kernels.votes import Votes
from minirea.pages import advise
from minirea.rope import apply_rope

_SCORES: Final = 1 << 21  # held at a time
_SCORE_ROWS: Final = 128  # in so many rows at most
_FEW_WINNERS: Final = 8  # of a row, up to which a search for each is faster than a sort
HALVED_FROM: Final = 2048  # keys to search, for which a copy of them in bfloat16 saves time
_STEPS_BEFORE_HALVES: Final = 8
MANY_ROWS: Final = 1024  # and keys, of a chunk, for which products in bfloat16 before those in float32 save time
MANY_KEYS: Final = 3072
_PRODUCTS: Final = 1 << 25  # of a chunk, at a time: a number is kept of each block of them
_ALIKE_ROWS: Final = 16  # products of fewer sum in another order: keys that are equal would score otherwise
_SHARE_OF_KEYS: Final = 8  # of a decode step's, so many parts at most are scored again
_ROWS_COMPARED: Final = 16  # with one repeated row, a divisor of BLOCK
_PARTS_AT_ONCE: Final = 64  # of keys' blocks that are scored again, 1 MB
_SHARE_OF_BLOCKS: Final = 6  # of them so many parts at most are scored again
_HALVED_AT_ONCE: Final = 512  # keys, whose products with a chunk stay in the processor's cache
MORE_POSITIONS: Final = 256  # than the local part's, after which its keys are rotated anew
_HALF_ROUNDING: Final = 1.01 * 2**-8  # of a number to bfloat16, relative to either
_SMALLEST_NORM: Final = 2.0**-40  # squares of smaller numbers, and their products in tiles, may be zero
_FLASH: Final = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # also gives the sums of exponentials


def computes_in(dtype: torch.dtype) -> bool:
    """Whether attention in `dtype` has its own way here; any other is the reference's."""
    return dtype == torch.float32 or multiplies_tiles(dtype)


def attend(q_GRD: Tensor, k_GND: Tensor, v_GND: Tensor) -> Tensor:
    """Softmax attention of R rows per key/value head over all N keys, float32, scale 1 / sqrt(D): [G, R, D].

    For the few rows of a decode step two matrix products beat torch's flash attention, which splits its work by rows.
    """
    p_GRN = torch.bmm(q_GRD, k_GND.mT).mul_(q_GRD.shape[-1] ** -0.5).softmax(-1)
    return torch.bmm(p_GRN, v_GND)


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
    copies: KeyCopies | None = None,
) -> Tensor:
    """`minirea.kernels.reattention` of one chunk, beyond global_size + local_size tokens, with one vote for all heads.

    The reference's phases up to the scope; then a chunk is attended to without a mask, and a decode step leaves the
    local part where it is. Arguments are the reference's, in a dtype that `computes_in`; `copies` are this layer's, of
    a decode step.
    """
    T, H, D = q_THD.shape
    G = len(k_cache_GND)
    if T > 1:
        q_GRD = q_THD.unflatten(1, (G, H // G)).transpose(0, 1).reshape(G, -1, D)
        arguments = q_GRD.float(), k_cache_GND, seq_len, config, score, gather, votes, winners
        start_1P, offset_1P, length_1 = choose_scope(*arguments)
        S = int(length_1)
        source_S = locate(torch.arange(S), start_1P, offset_1P)[0]
        k_GSD, v_GSD = k_cache_GND.index_select(1, source_S), v_cache_GND.index_select(1, source_S)
        _rotate_in_blocks(k_GSD.transpose(0, 1), cos[:S, None], sin[:S, None])
        q_THD = _rotate_in_blocks(q_THD.clone(), cos[S - T : S, None], sin[S - T : S, None])
        return attend_causal(q_THD, k_GSD, v_GSD)

    q_GRD, copies = q_THD.reshape(G, H // G, D), copies or KeyCopies.new()
    local = slice(seq_len - config.local_size, seq_len)
    winner_GRK = None
    if config.max_selected:
        winner_GRK = copies.half.score(q_GRD.float(), k_cache_GND, config.global_size, local.start, config.span_top_k)
        winner_GRK = winner_GRK if gather is None else gather(winner_GRK)
    source_S = _before_local(winner_GRK, seq_len, config, votes, winners)
    q_GRD, k_local_GND, position = copies.local.place(q_GRD, k_cache_GND, seq_len, config, cos, sin)
    far = len(source_S)
    at = slice(position + 1 - config.local_size - far, position + 1 - config.local_size)
    k_GSD = rotate(k_cache_GND.index_select(1, source_S), cos[at], sin[at])
    if q_THD.dtype != torch.float32:
        v_GSD = v_cache_GND.index_select(1, source_S)
        return _attend_parts(q_GRD, (k_local_GND, v_cache_GND[:, local]), (k_GSD, v_GSD)).view(1, H, D)
    p_GRS = torch.cat([torch.bmm(q_GRD, k.mT) for k in (k_GSD, k_local_GND)], -1).mul_(D**-0.5).softmax(-1)
    out_GRD = torch.bmm(p_GRS[..., :far], v_cache_GND.index_select(1, source_S))
    return out_GRD.baddbmm_(p_GRS[..., far:], v_cache_GND[:, local]).view(1, H, D)


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


def _attend_parts(q_GRD: Tensor, *parts: tuple[Tensor, Tensor]) -> Tensor:
    """Softmax attention over the keys and values of one or two parts, [G, N, D] each, in bfloat16: [G, R, D].

    torch's flash attention takes no part without keys.
    """
    (out_GRD, sum_GR), *others = (_FLASH(q_GRD[None], k[None], v[None], 0.0) for k, v in parts if k.shape[1])
    for other_GRD, other_sum_GR in others:
        share_GR = torch.sigmoid(other_sum_GR - sum_GR)
        out_GRD = torch.lerp(out_GRD, other_GRD, share_GR[..., None].to(out_GRD.dtype))
    return out_GRD


def _before_local(
    winner_GRK: Tensor | None, seq_len: int, config: ReAttentionConfig, votes: Votes | None, winners: Tensor | None
) -> Tensor:
    """Cache positions of a decode step's scope before the local part: the reference's `choose_scope` and `locate` of
    one query, by numpy, whose operations are smaller. Code is not in the processor's caches after matrices went through
    them: an operation of torch then takes some 10 us.
    """
    mid_lo, mid_hi, half = config.global_size, seq_len - config.local_size, config.span_size // 2
    parts = [np.arange(mid_lo)]
    if winner_GRK is not None:
        found = winner_GRK.numpy().reshape(-1, winner_GRK.shape[-1])
        if winners is not None:
            row_HK = winners[(seq_len - 1) % len(winners)].numpy()
            row_HK[:], row_HK[:, : found.shape[1]] = -1, found
        size = config.vote_size
        pooled = found if size == 1 else np.clip(found // size * size + size // 2, mid_lo, mid_hi - 1)
        counts = np.zeros(mid_hi, np.int32) if votes is None else votes.counts[0, :mid_hi].numpy()
        np.add.at(counts, pooled, 1)
        voted = np.flatnonzero(counts)
        ranked = np.sort((counts[voted].astype(np.int64) << 32) | (INDEX_MASK - voted))[-config.max_spans :]
        stop_before = mid_lo
        for middle in sorted((INDEX_MASK - (ranked & INDEX_MASK)).tolist()):
            stop = min(middle + half, mid_hi)
            parts.append(np.arange(max(middle - half, stop_before), stop))
            stop_before = stop
    return torch.from_numpy(np.concatenate(parts))


class KeyCopies(NamedTuple):
    """What consecutive decode steps of one layer share. Where other tokens come into the cache between them, or some
    are taken back, new copies have to be made.
    """

    half: HalfKeys
    local: LocalKeys

    @classmethod
    def new(cls) -> KeyCopies:
        return cls(HalfKeys(), LocalKeys())


class LocalKeys:
    """The local part's keys with RoPE. Only differences of positions count: keys keep theirs for some steps, and a step
    rotates the newest one.
    """

    def __init__(self) -> None:
        self._rows_GND = torch.empty(0, 0, 0, dtype=torch.float32)
        self._seq_len = self._stop = 0  # cached tokens, and rows, of the last step

    def place(
        self, q_GRD: Tensor, k_cache_GND: Tensor, seq_len: int, config: ReAttentionConfig, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, int]:
        """The next step's queries with RoPE, its local part [G, local_size, D], and the position of the queries and the
        newest key. There is room before the local part for the rest of the scope.
        """
        (G, _, D), local = k_cache_GND.shape, config.local_size
        before = min(config.max_scope, len(cos)) - local  # positions that the rest of the scope may take
        if seq_len == self._seq_len + 1 and self._stop < self._rows_GND.shape[1]:
            self._stop += 1
        else:
            self._stop = local
            shape = G, min(local + MORE_POSITIONS, len(cos) - before), D
            if self._rows_GND.shape != shape:
                self._rows_GND = k_cache_GND.new_empty(shape)
            k_GND, at = k_cache_GND[:, seq_len - local : seq_len].clone(), slice(before, before + local)
            self._rows_GND[:, :local] = rotate(k_GND, cos[at], sin[at])
        self._seq_len, position = seq_len, before + self._stop - 1
        newest_GXD = torch.cat((q_GRD, k_cache_GND[:, seq_len - 1 : seq_len]), 1)
        newest_GXD = rotate(newest_GXD, cos[position], sin[position])
        self._rows_GND[:, self._stop - 1] = newest_GXD[:, -1]
        return newest_GXD[:, :-1], self._rows_GND[:, self._stop - local : self._stop], position


class HalfKeys:
    """A copy of the middle's keys in bfloat16, which says which few keys a row's winners can be.

    It is of k - m, with a mean key m that stays: what m adds to the scores of a row changes no order. The product of a
    key and a query, both rounded, is off by |q - rounded q| |k - m| + |q| |k - m - copy| at most, and its own rounding.
    Keys are dealt out to blocks, and those that can reach the K-th best block's best are scored in float32, by the
    product of a whole search. A copy is made once it will be used for some steps more, a block at a time from then on.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._useful = multiplies_tiles(torch.bfloat16)
        self._half_NC = torch.empty(0, 0, dtype=torch.bfloat16)  # C = G D: one product for all heads
        self._num_keys = 0  # that are copied
        self._mean_G1D = torch.empty(0, 0, 0, dtype=torch.float32)
        # The largest |k - m|, and |k - m - copy|.
        self._norm_G1 = self._error_G1 = torch.empty(0, 0, dtype=torch.float32)
        self._off_G1 = np.empty((0, 0), np.float32)  # by how much products with a query of length 1 are off
        self._wide_GRGD = torch.empty(0, 0, 0, 0, dtype=torch.bfloat16)

    def score(self, q_GRD: Tensor, k_cache_GND: Tensor, mid_lo: int, mid_hi: int, span_top_k: int) -> Tensor:
        """`score` of the next step."""
        arguments = q_GRD, k_cache_GND, mid_lo, mid_hi, span_top_k
        found = self.search(*arguments)
        return score(*arguments) if found is None else found

    def search(self, q_GRD: Tensor, k_cache_GND: Tensor, mid_lo: int, mid_hi: int, span_top_k: int) -> Tensor | None:
        """`score` of the next step; None where that has to look at all keys."""
        self._steps += 1
        num_keys = (mid_hi - mid_lo) // BLOCK * BLOCK
        searches_all = num_keys < HALVED_FROM or num_keys < BLOCK * span_top_k
        if searches_all or not self._useful or self._steps < _STEPS_BEFORE_HALVES:
            return None
        self._copy(k_cache_GND, mid_lo, num_keys)
        found = self._candidates(q_GRD, num_keys, span_top_k)
        if found is None or len(found) > num_keys // _SHARE_OF_KEYS:
            self._useful = False
            return None
        # Behind them keys that are not copied; so many that products of few do not sum in another order.
        last = mid_hi - BLOCK
        copied = sorted({mid_lo + key for key in found if mid_lo + key < last})
        index_C = np.concatenate((np.array(copied, np.int64), np.arange(last, mid_hi)))
        k_GCD = k_cache_GND.index_select(1, torch.from_numpy(index_C)).float()
        score_GRC = torch.bmm(_alike(q_GRD), k_GCD.mT)
        score_GRC = score_GRC[:, : q_GRD.shape[1]].neg_()
        at_GRK = np.argsort(score_GRC.numpy(), -1, kind="stable")[..., :span_top_k]  # the first of equals first
        return torch.from_numpy(index_C[at_GRK])

    def _copy(self, k_cache_GND: Tensor, mid_lo: int, num_keys: int) -> None:
        """Go on to `num_keys` keys of the middle."""
        G, N, D = k_cache_GND.shape
        if num_keys > len(self._half_NC):  # at first, and for a cache that grew
            self._half_NC = advise(torch.empty(N - mid_lo, G * D, dtype=torch.bfloat16))
            self._mean_G1D = k_cache_GND[:, mid_lo : mid_lo + num_keys : BLOCK].float().mean(1, keepdim=True)
            self._norm_G1 = self._error_G1 = torch.zeros(G, 1, dtype=torch.float32)
            self._num_keys = 0
        for start in range(self._num_keys, num_keys, _HALVED_AT_ONCE):
            rows = slice(start, min(start + _HALVED_AT_ONCE, num_keys))
            half_GND = self._half_NC[rows].unflatten(1, (G, D)).transpose(0, 1)
            k_GND = k_cache_GND[:, mid_lo + rows.start : mid_lo + rows.stop] - self._mean_G1D
            half_GND.copy_(k_GND)
            self._norm_G1 = torch.maximum(self._norm_G1, _largest_norm(k_GND))
            self._error_G1 = torch.maximum(self._error_G1, _largest_norm(k_GND.sub_(half_GND)))
        if num_keys > self._num_keys:
            self._num_keys = num_keys
            norm, lost = torch.tensor([1, _HALF_ROUNDING / 2], dtype=torch.float32)
            self._off_G1 = _off(norm, lost, self._norm_G1, self._error_G1, self._mean_G1D).numpy()

    def _candidates(self, q_GRD: Tensor, num_keys: int, span_top_k: int) -> list[int] | None:
        """Of the copied keys those that can be a row's winners, some twice; None where products do not tell.

        What is small is done by numpy, whose operations are (see _before_local).
        """
        G, R, D = q_GRD.shape
        if self._wide_GRGD.shape != (G, R, G, D):  # each head's rows are zero in other heads' columns
            self._wide_GRGD = torch.zeros(G, R, G, D, dtype=torch.bfloat16)
        self._wide_GRGD.diagonal(dim1=0, dim2=2).copy_(q_GRD.permute(1, 2, 0))
        # As integers, which order as products above zero do and are compared several times as fast.
        product_NQ = F.linear(self._half_NC[:num_keys], self._wide_GRGD.view(G * R, G * D)).view(torch.int16)
        best_BQ = product_NQ.view(BLOCK, -1).amax(0).numpy().reshape(-1, G * R)
        reached_Q = np.partition(best_BQ, -span_top_k, 0)[-span_top_k]
        reached_Q = (reached_Q.astype(np.int32) << 16).view(np.float32)
        with np.errstate(all="ignore"):
            norm_GR = np.linalg.norm(q_GRD.numpy(), axis=-1)
            least_Q = _least_half(reached_Q, (norm_GR * self._off_G1).ravel())
        if not (0 < least_Q.min() <= least_Q.max() < np.inf and norm_GR.min() > _SMALLEST_NORM):
            return None
        # A positive number's upper half is the largest bfloat16 up to it. Repeated, for longer runs.
        least_XQ = np.empty((_ROWS_COMPARED, G * R), np.int16)
        least_XQ[:] = least_Q.view(np.int32) >> 16
        found = np.flatnonzero(product_NQ.numpy().reshape(-1, least_XQ.size) >= least_XQ.ravel())
        return (found // (G * R)).tolist()


def _off(norm_of_q: Tensor, lost: Tensor, norm: Tensor, error: Tensor, mean: Tensor) -> Tensor:
    """By how much products of queries and keys less a mean key, both in half precision, are off at most; infinite where
    either are too small to tell.

    Args:
        lost: the norm of what rounding took of a query.
        norm: of these keys, the largest.
        error: of what rounding took of a key, the largest norm.
        mean: [..., D].
    """
    # Sums of float32, of these products and of the scores themselves, are off by less than D 2^-23 of the norms.
    sums = (norm + torch.linalg.vector_norm(mean, dim=-1)) * (mean.shape[-1] * 2**-22)
    off = lost * norm + norm_of_q * (error + sums)
    return torch.where(torch.minimum(norm_of_q, norm) < _SMALLEST_NORM, torch.inf, off)


def _least_half(best: Any, off: Any) -> Any:
    """What the product of a winner is at least where `best` is reached by as many keys as there are winners; of numpy
    or of torch.
    """
    return best - abs(best) * (2 * _HALF_ROUNDING + _HALF_ROUNDING**2) - 2 * off


def copies_bytes(num_tokens: int, local_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Of the KeyCopies of one layer, of a cache of so many tokens in `dtype`, at most."""
    halves = (
        num_tokens * torch.bfloat16.itemsize if num_tokens >= HALVED_FROM and multiplies_tiles(torch.bfloat16) else 0
    )
    local = (local_size + MORE_POSITIONS) * dtype.itemsize if num_tokens > local_size else 0
    return num_kv_heads * head_dim * (halves + local)


def _largest_norm(x_GND: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x_GND, dim=-1, dtype=torch.float32).amax(1, keepdim=True)


def score(q_GRD: Tensor, k_cache_GND: Tensor, mid_lo: int, mid_hi: int, span_top_k: int) -> Tensor:
    """The reference's `score` of float32 rows, and keys of either dtype: cache positions, [G, R, K]."""
    R, K = q_GRD.shape[1], min(span_top_k, mid_hi - mid_lo)
    if R < MANY_ROWS or mid_hi - mid_lo < MANY_KEYS or not multiplies_tiles(torch.bfloat16):
        return _score_all(q_GRD, k_cache_GND, mid_lo, mid_hi, K)
    rows = max(_SCORE_ROWS, _PRODUCTS // (mid_hi - mid_lo))
    index_GRK = torch.empty(*q_GRD.shape[:2], K, dtype=torch.int64)
    for g, first in itertools.product(range(len(q_GRD)), range(0, R, rows)):
        part = g, slice(first, first + rows)
        index_GRK[part] = _score_many(q_GRD[part], k_cache_GND[g, mid_lo:mid_hi], K)
    return index_GRK.add_(mid_lo)


def _score_many(q_RD: Tensor, k_ND: Tensor, num_winners: int) -> Tensor:
    """`score` of many rows of one head, [R, K]. Products in bfloat16 say in which blocks of keys a row's winners can
    be, as in HalfKeys; the row is scored with those in float32.
    """
    num_blocks = len(k_ND) // BLOCK
    best_BR, least_R = _best_halves(q_RD, k_ND[: num_blocks * BLOCK], num_winners)
    below = (least_R <= 0).nonzero()[:, 0]
    if len(below):
        arguments = q_RD[below], k_ND[: num_blocks * BLOCK], num_winners, True
        best_BR[:, below], least_R[below] = _best_halves(*arguments)
    block_P, row_P = (best_BR >= least_R).nonzero(as_tuple=True)  # pairs, block by block
    if len(row_P) > best_BR.numel() // _SHARE_OF_BLOCKS or not bool(least_R.isfinite().all()):
        return _score_all(q_RD[None], k_ND[None], 0, len(k_ND), num_winners)[0]
    best_PK, at_PK = _largest(_score_pairs(q_RD, k_ND, row_P, block_P), num_winners)
    at_PK = at_PK.add_((block_P * BLOCK)[:, None])
    # By rows, whose blocks stay in ascending order, and behind them the keys that are no whole block.
    order_P = row_P.argsort(stable=True)
    count_R = torch.bincount(row_P, minlength=len(q_RD))
    row_P, place_P = row_P[order_P], torch.arange(len(row_P)) - (count_R.cumsum(0) - count_R)[row_P[order_P]]
    shape = len(q_RD), int(count_R.max()), best_PK.shape[1]
    best_RCK = torch.full(shape, -torch.inf, dtype=torch.float32).index_put_((row_P, place_P), best_PK[order_P])
    at_RCK = torch.zeros(shape, dtype=torch.int64).index_put_((row_P, place_P), at_PK[order_P])
    at_J = torch.arange(num_blocks * BLOCK, len(k_ND))
    score_RJ = (q_RD @ k_ND[-BLOCK:].float().t())[:, BLOCK - len(at_J) :]
    at_RK = _largest(torch.cat([best_RCK.flatten(1), score_RJ], 1), num_winners)[1]
    return torch.cat([at_RCK.flatten(1), at_J.expand(len(q_RD), -1)], 1).gather(1, at_RK)


def _score_pairs(q_RD: Tensor, k_ND: Tensor, row_P: Tensor, block_P: Tensor) -> Tensor:
    """Scores of rows with the keys of a block each, float32 [P, BLOCK]; the blocks ascend.

    The rows of a block are multiplied in parts of _ALIKE_ROWS, the last of which is filled up.
    """
    count_B = torch.bincount(block_P)
    parts_B = (count_B + (_ALIKE_ROWS - 1)) // _ALIKE_ROWS
    skipped_B = (parts_B * _ALIKE_ROWS).cumsum(0) - parts_B * _ALIKE_ROWS - (count_B.cumsum(0) - count_B)
    at_P = skipped_B[block_P].add_(torch.arange(len(block_P)))
    block_C = torch.arange(len(parts_B)).repeat_interleave(parts_B)
    row_CA = torch.zeros(len(block_C), _ALIKE_ROWS, dtype=torch.int64)
    row_CA.view(-1)[at_P] = row_P
    k_BMD = k_ND[: len(parts_B) * BLOCK].view(-1, BLOCK, k_ND.shape[1])
    score_CAM = torch.empty(*row_CA.shape, BLOCK, dtype=torch.float32)
    parts = (tensor.split(_PARTS_AT_ONCE) for tensor in (block_C, row_CA, score_CAM))
    for blocks, rows, scores in zip(*parts, strict=True):
        q_CAD = q_RD.index_select(0, rows.view(-1)).view(*rows.shape, -1)
        torch.bmm(q_CAD, k_BMD.index_select(0, blocks).float().mT, out=scores)
    return score_CAM.view(-1, BLOCK).index_select(0, at_P)


def _best_halves(q_RD: Tensor, k_ND: Tensor, num_winners: int, below_zero: bool = False) -> tuple[Tensor, Tensor]:
    """The best product of each row in each whole block of keys, in bfloat16, [N / BLOCK, R], and what that of a row's
    winner is at least, [R]. Keys in float32 are taken less their mean.

    Products are compared as integers, several times as fast, which order as they do above zero. Below they order
    inversely: without `below_zero` the best of a block is then wrong, though below zero.
    """
    rounded = k_ND.dtype != torch.bfloat16
    mean_D = k_ND[::BLOCK].mean(0) if rounded else torch.zeros(k_ND.shape[1], dtype=torch.float32)
    half_RD = q_RD.bfloat16()
    best_BR = torch.empty(len(k_ND) // BLOCK, len(q_RD), dtype=torch.int16)
    buffer_NR = torch.empty(_HALVED_AT_ONCE, len(q_RD), dtype=torch.bfloat16)
    zero = torch.zeros((), dtype=torch.float32)
    norm, error = zero if rounded else _largest_norm(k_ND[None])[0, 0], zero
    for start in range(0, len(k_ND), _HALVED_AT_ONCE):
        half_ND = k_ND[start : start + _HALVED_AT_ONCE]
        if rounded:
            tile_ND = half_ND - mean_D
            half_ND = tile_ND.bfloat16()
            norm = torch.maximum(norm, _largest_norm(tile_ND[None])[0, 0])
            error = torch.maximum(error, _largest_norm(tile_ND.sub_(half_ND)[None])[0, 0])
        product_NR = torch.mm(half_ND, half_RD.t(), out=buffer_NR[: len(half_ND)])
        product_BMR = product_NR.view(torch.int16).view(-1, BLOCK, len(q_RD))
        best = best_BR[start // BLOCK : (start + len(half_ND)) // BLOCK]
        torch.amax(product_BMR, 1, out=best)
        if below_zero:
            torch.where(best < 0, product_BMR.amin(1), best, out=best)
    norm_of_q, lost = (torch.linalg.vector_norm(x, dim=-1) for x in (q_RD, q_RD - half_RD))
    best_BR = best_BR.view(torch.bfloat16).float()
    return best_BR, _least_half(_reached(best_BR, num_winners), _off(norm_of_q, lost, norm, error, mean_D))


def _reached(best_BR: Tensor, count: int) -> Tensor:
    """What at least so many of a row's numbers reach, [R]: the `count`-th largest where none are equal."""
    for _ in range(count - 1):
        best_BR = best_BR.masked_fill(best_BR == best_BR.amax(0), -torch.inf)
    return best_BR.amax(0)


def _score_all(q_GRD: Tensor, k_cache_GND: Tensor, mid_lo: int, mid_hi: int, num_winners: int) -> Tensor:
    """`score` by products of all keys in float32.

    Keys are scored in tiles that stay in the processor's cache until they are ranked. A row's scores lie side by side:
    maxima of blocks are then reduced, and the best blocks copied, in whole runs.
    """
    (G, R, _), K = q_GRD.shape, num_winners
    rows = min(R, _SCORE_ROWS)
    heads = min(G, _SCORE_ROWS // rows)  # of a decode step all: their operations are then one
    blocks, most = -(-(mid_hi - mid_lo) // BLOCK), max(_SCORES // (heads * rows) // BLOCK, 1)
    keys = -(-blocks // -(-blocks // most)) * BLOCK  # as many in each tile: the last is no small product
    index_GRK = torch.empty(G, R, K, dtype=torch.int64)
    buffer = torch.empty(heads * rows * (min(keys, mid_hi - mid_lo) + BLOCK), dtype=torch.float32)
    for g, first in itertools.product(range(0, G, heads), range(0, R, rows)):
        part = slice(g, g + heads), slice(first, first + rows)
        q_HRD, tiles = q_GRD[part], []
        num_rows, alike_HRD = q_HRD[..., 0].numel(), _alike(q_HRD)
        for lo in range(mid_lo, mid_hi, keys):
            k_HND = k_cache_GND[part[0], lo : min(lo + keys, mid_hi)].float()
            N = k_HND.shape[1]
            blocks = -(-N // BLOCK)
            score_HRN = buffer[: num_rows * blocks * BLOCK].view(*q_HRD.shape[:2], -1)
            if alike_HRD is q_HRD:
                torch.bmm(q_HRD, k_HND.mT, out=score_HRN[..., :N])
            else:
                score_HRN[..., :N] = torch.bmm(alike_HRD, k_HND.mT)[:, : q_HRD.shape[1]]
            score_HRN[..., N:] = -torch.inf
            tiles.append(_best_of_tile(score_HRN.view(num_rows, blocks, BLOCK), lo, K))
        score_PC, offs_PC = (torch.cat(parts, 1) for parts in zip(*tiles, strict=True))
        if len(tiles) > 1:
            offs_PC = offs_PC.gather(1, _largest(score_PC, K)[1])
        index_GRK[part] = offs_PC.view(*q_HRD.shape[:2], K)
    return index_GRK


def _alike(q_GRD: Tensor) -> Tensor:
    """Rows to multiply keys by, so that a key scores the same among many as among few: some more where products of
    few rows sum in an order that depends on where a key lies (a single row), or on how threads divide them.
    """
    if torch.get_num_threads() == 1:
        return not_alone(q_GRD)
    return F.pad(q_GRD, (0, 0, 0, _ALIKE_ROWS - q_GRD.shape[1])) if q_GRD.shape[1] < _ALIKE_ROWS else q_GRD


def _best_of_tile(score_RNM: Tensor, lo: int, num_winners: int) -> tuple[Tensor, Tensor]:
    """The best scores of each row and their cache positions, [R, up to K]: the lower position first among equals.

    A winner outside the K blocks with the largest maxima would have K better keys before it.
    """
    R, N, M = score_RNM.shape
    block_RK = _largest(score_RNM.amax(-1), num_winners)[1].sort(1).values
    rows = (block_RK + torch.arange(0, R * N, N)[:, None]).flatten()
    score_RC = score_RNM.view(R * N, M).index_select(0, rows).view(R, -1)
    best_RK, at_RK = _largest(score_RC, num_winners)
    return best_RK, block_RK.gather(1, at_RK // M).mul_(M).add_(at_RK % M).add_(lo)


def _largest(x_RN: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row, or all, and where they are: the first of equals first. Overwrites x."""
    count = min(count, x_RN.shape[1])
    if count > _FEW_WINNERS:
        values_RN, index_RN = x_RN.sort(dim=1, descending=True, stable=True)
        return values_RN[:, :count], index_RN[:, :count]
    found = []
    for _ in range(count):
        found.append(x_RN.max(1, keepdim=True))  # the first of equals
        x_RN.scatter_(1, found[-1].indices, -torch.inf)
    return torch.cat([best.values for best in found], 1), torch.cat([best.indices for best in found], 1)
