"""ReAttention in plain torch: the twins of the fused kernel's phases, and the naive oracle that guards both.

The twins have the names, argument order and variable names of the phases in reattention.py and read in its order:

    score   -> the span_top_k best keys of the middle for every query row (a bounded tile of keys at a time)
    vote    -> the max_spans positions that most rows chose
    select  -> where each span's new part starts and which rows of the scope it fills
    locate  -> row of the scope -> cache position
    rotate  -> RoPE with positions inside the scope
    attend  -> causal softmax attention over the gathered scope

Shapes, beside the project's letters: R rows of one key/value head (its H / G query heads times T queries; row
r is query r // (H / G)), K winners per row, B ballots (1 for span_scope "layer", G for "kv_head"), W winners of one
ballot, P spans that a ballot keeps.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F

from minirea.config import ReAttentionConfig

# Keys whose scores share one maximum in `score`. Only the K blocks with the largest maxima can hold winners.
BLOCK: Final = 64
# Scores held at a time: on a CPU they should stay in the second-level cache until they are reduced, on a GPU the
# tile should be large enough to fill the device.
TILE_SCORES: Final = {"cpu": 1 << 20, "cuda": 1 << 26}
# Rows scored together on a CPU. More rows would make the key tiles of that size too short to be worth merging.
TILE_ROWS: Final = {"cpu": 128, "cuda": 1 << 14}
# A score and its key are compared as one int64: the score's bits, ordered, above the inverted index, so that of
# equal scores the lower index is the larger number. NO_KEY loses to every key.
INDEX_MASK: Final = 0xFFFFFFFF
NO_KEY: Final = -(1 << 63)


def reattention_reference(
    q_THD: torch.Tensor,
    k_cache_GND: torch.Tensor,
    v_cache_GND: torch.Tensor,
    seq_len: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    config: ReAttentionConfig,
    return_selection: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | list[torch.Tensor] | None]:
    """One step of ReAttention, phase by phase. Arguments and results are those of `minirea.kernels.reattention`."""
    T, H, D = q_THD.shape
    G = k_cache_GND.shape[0]
    q_GRD = q_THD.view(T, G, H // G, D).transpose(0, 1).reshape(G, T * (H // G), D)
    mid_lo, mid_hi = config.global_size, seq_len - config.local_size
    B = G if config.span_scope == "kv_head" else 1

    if mid_hi <= mid_lo:
        length_B1 = torch.full((B, 1), seq_len, device=q_THD.device)
        source_BS = torch.arange(seq_len, device=q_THD.device).expand(B, -1)
        k_GSD, v_GSD = k_cache_GND[:, :seq_len], v_cache_GND[:, :seq_len]
    else:
        start_BP, offset_BP, selected_B1 = _choose(q_GRD, k_cache_GND, mid_lo, mid_hi, B, config)
        length_B1 = mid_lo + selected_B1 + config.local_size
        offs_s = torch.arange(int(length_B1.max()), device=q_THD.device)
        source_BS = locate(offs_s, start_BP, offset_BP, selected_B1, mid_lo, mid_hi).clamp_(max=seq_len - 1)
        k_GSD, v_GSD = _gather(k_cache_GND, source_BS), _gather(v_cache_GND, source_BS)

    S = source_BS.shape[1]
    ragged = B > 1 and mid_hi > mid_lo
    pos_BT = length_B1 - T + torch.arange(T, device=q_THD.device)
    q_rot = rotate(q_GRD.view(G, T, H // G, D), cos[pos_BT][:, :, None], sin[pos_BT][:, :, None])
    k_rot = rotate(k_GSD, cos[:S], sin[:S])
    mask = _causal_mask(pos_BT, S, H // G) if T > 1 or ragged else None
    out_GRD = attend(q_rot.view(G, -1, D), k_rot, v_GSD, mask)
    out_THD = out_GRD.view(G, T, H // G, D).transpose(0, 1).reshape(T, H, D)
    return out_THD, _selection(source_BS, length_B1, config) if return_selection else None


def _choose(
    q_GRD: torch.Tensor, k_cache_GND: torch.Tensor, mid_lo: int, mid_hi: int, B: int, config: ReAttentionConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score, vote and select; without anything to select (streaming), the layout of no span."""
    if not config.max_selected:
        empty = torch.zeros(B, 0, dtype=torch.int64, device=q_GRD.device)
        return empty, empty, torch.zeros(B, 1, dtype=torch.int64, device=q_GRD.device)
    rows = TILE_ROWS[q_GRD.device.type]
    winner_GRK = torch.cat([score(q, k_cache_GND, mid_lo, mid_hi, config.span_top_k) for q in q_GRD.split(rows, 1)], 1)
    kept_BP = vote(winner_GRK.view(B, -1), config.max_spans)
    return select(kept_BP, mid_lo, mid_hi, config.span_size)


def score(q_GRD: torch.Tensor, k_cache_GND: torch.Tensor, mid_lo: int, mid_hi: int, span_top_k: int) -> torch.Tensor:
    """Cache positions of each row's span_top_k largest q . k over the middle, the lowest position first among equals.

    Section 3, steps 3 and 4: neither side has RoPE, products are accumulated in float32. Returns int64 [G, R, K], best
    first, with K = min(span_top_k, keys of the middle).
    """
    G, R, _ = q_GRD.shape
    tile = max(BLOCK, TILE_SCORES[q_GRD.device.type] // (G * R) // BLOCK * BLOCK)
    best_GRK = torch.full((G, R, min(span_top_k, mid_hi - mid_lo)), NO_KEY, device=q_GRD.device)
    for lo in range(mid_lo, mid_hi, tile):
        score_GNR = _dot(k_cache_GND[:, lo : min(lo + tile, mid_hi)], q_GRD)
        _merge(best_GRK, score_GNR, lo)
    return _unpack_index(best_GRK)


def _dot(k_GND: torch.Tensor, q_GRD: torch.Tensor) -> torch.Tensor:
    """float32 [G, N, R]. Keys on the left: a decode step then streams the cache once, at memory speed."""
    if k_GND.is_cuda and k_GND.dtype != torch.float32:
        return torch.bmm(k_GND, q_GRD.mT, out_dtype=torch.float32)
    return torch.matmul(k_GND.float(), q_GRD.float().mT)


def _merge(best_GRK: torch.Tensor, score_GNR: torch.Tensor, lo: int) -> None:
    """Merge the scores of the keys from position `lo` on into each row's packed best K, in place.

    Blocks of keys are ranked by their maxima, the lower block first among equals. A winner outside the first K blocks
    would have K better keys before it, so only those blocks are looked at, and the keys after the last whole block.
    On a CPU, rows that the tile cannot improve are left out; on a GPU, finding them would cost a wait for it.
    """
    G, N, R = score_GNR.shape
    K = best_GRK.shape[-1]
    num_blocks = N // BLOCK
    block_GNMR = score_GNR[:, : num_blocks * BLOCK].unflatten(1, (num_blocks, BLOCK))
    rest_GMR = score_GNR[:, num_blocks * BLOCK :]
    # In two steps, so that each reduces over runs of at least 8 numbers also where R is 1.
    max_GNR = block_GNMR.view(G, num_blocks, 8, BLOCK // 8 * R).amax(2).view(G, num_blocks, BLOCK // 8, R).amax(2)

    offs_p = torch.arange(G * R, device=score_GNR.device)
    if score_GNR.device.type == "cpu":
        row_max_GR = torch.cat([max_GNR, rest_GMR], 1).amax(1)
        offs_p = offs_p[(_ordered(row_max_GR) > best_GRK[..., -1] >> 32).view(-1)]
    g_p, r_p = offs_p // R, offs_p % R

    offs_n = torch.arange(num_blocks, device=score_GNR.device)
    block_pk = _unpack_index(_pack(max_GNR[g_p, :, r_p], offs_n).topk(min(K, num_blocks)).values)
    offs_m = torch.arange(BLOCK, device=score_GNR.device)
    in_blocks = _pack(block_GNMR[g_p[:, None], block_pk, :, r_p[:, None]], lo + block_pk[..., None] * BLOCK + offs_m)
    offs_m = torch.arange(num_blocks * BLOCK, N, device=score_GNR.device)
    in_rest = _pack(rest_GMR[g_p, :, r_p], lo + offs_m)
    flat_best = best_GRK.view(G * R, K)
    flat_best[offs_p] = torch.cat([flat_best[offs_p], in_blocks.flatten(1), in_rest], 1).topk(K).values


def _ordered(score: torch.Tensor) -> torch.Tensor:
    """float32 -> int32 of the same order. Adding 0 makes one number of -0 and +0, which must tie."""
    bits = (score + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _pack(score: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return (_ordered(score).long() << 32) | (INDEX_MASK - index)


def _unpack_index(packed: torch.Tensor) -> torch.Tensor:
    return INDEX_MASK - (packed & INDEX_MASK)


def vote(winner_BW: torch.Tensor, max_spans: int) -> torch.Tensor:
    """The max_spans positions that most of a ballot's winners name, the lowest position first among equals.

    Section 3, step 5. Returns int64 [B, P] in any order, P = min(W, max_spans). A position may be listed more than
    once: `select` gives a repeated one no keys of its own, so nobody needs to know how many distinct ones there are.
    """
    if winner_BW.shape[1] <= max_spans:
        return winner_BW
    winner_BW = winner_BW.sort(1).values
    votes_BW = torch.searchsorted(winner_BW, winner_BW, right=True) - torch.searchsorted(winner_BW, winner_BW)
    repeated_BW = F.pad(winner_BW[:, 1:] == winner_BW[:, :-1], (1, 0))
    ranked_BW = ((votes_BW << 32) | (INDEX_MASK - winner_BW)).masked_fill_(repeated_BW, NO_KEY)
    elected_BP = ranked_BW.topk(max_spans).values
    return _unpack_index(torch.where(elected_BP == NO_KEY, elected_BP[:, :1], elected_BP))


def select(
    kept_BP: torch.Tensor, mid_lo: int, mid_hi: int, span_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Layout of the selected part of the scope. Section 3, step 6, as a prefix sum instead of a union of sets.

    Covers have equal lengths, so in ascending order each adds what lies at or after both its own start and the end
    of the one before. Returns int64 start_BP (first cache position that span p adds), offset_BP (the row of the
    selected part which that position fills) and selected_B1 (rows of the selected part).
    """
    kept_BP = kept_BP.sort(1).values
    half = span_size // 2
    stop_BP = (kept_BP + half).clamp_(max=mid_hi)
    start_BP = (kept_BP - half).clamp_(min=mid_lo)
    torch.maximum(start_BP[:, 1:], stop_BP[:, :-1], out=start_BP[:, 1:])
    end_BP = (stop_BP - start_BP).cumsum(1)
    return start_BP, end_BP - (stop_BP - start_BP), end_BP[:, -1:]


def locate(
    offs_s: torch.Tensor,
    start_BP: torch.Tensor,
    offset_BP: torch.Tensor,
    selected_B1: torch.Tensor,
    mid_lo: int,
    mid_hi: int,
) -> torch.Tensor:
    """Cache positions of the scope's rows offs_s: int64 [B, S]. Section 3, step 7: global ++ selected ++ local."""
    row_BS = (offs_s - mid_lo).expand(selected_B1.shape[0], -1)
    source_BS = torch.where(row_BS < 0, offs_s, row_BS - selected_B1 + mid_hi)
    if not start_BP.shape[1]:
        return source_BS
    # A span without rows has the offset of the next one, so the last span at or before a row is the one that has it.
    span_BS = torch.searchsorted(offset_BP, row_BS.contiguous(), right=True).sub_(1).clamp_(min=0)
    selected_BS = row_BS + (start_BP - offset_BP).gather(1, span_BS)
    return torch.where((row_BS >= 0) & (row_BS < selected_B1), selected_BS, source_BS)


def _gather(cache_GND: torch.Tensor, source_BS: torch.Tensor) -> torch.Tensor:
    """The scope's rows of a cache, [G, S, D], from one list of positions or from one list per head."""
    if source_BS.shape[0] == 1:
        return cache_GND.index_select(1, source_BS[0])  # several times faster than the general form on a CPU
    heads_G1 = torch.arange(cache_GND.shape[0], device=cache_GND.device)[:, None]
    return cache_GND[heads_G1, source_BS]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of x [..., D] by cos and sin [..., D / 2], half-split: element i turns with element i + D / 2, in float32."""
    halves = x.float().unflatten(-1, (2, -1))
    rotated = halves * cos.unsqueeze(-2)
    rotated[..., 0, :].addcmul_(halves[..., 1, :], sin, value=-1)
    rotated[..., 1, :].addcmul_(halves[..., 0, :], sin)
    return rotated.flatten(-2).to(x.dtype)


def attend(q_GRD: torch.Tensor, k_GSD: torch.Tensor, v_GSD: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Softmax attention with scale 1 / sqrt(D): [G, R, D]. The rows of a group share their head's keys unrepeated."""
    return F.scaled_dot_product_attention(q_GRD[None], k_GSD[None], v_GSD[None], attn_mask=mask)[0]


def _causal_mask(pos_BT: torch.Tensor, S: int, group: int) -> torch.Tensor:
    """bool [1, B, R, S]: the row of a query at position p sees scope rows 0..p; R counts `group` rows per query."""
    pos_BR = pos_BT.repeat_interleave(group, 1)
    return (torch.arange(S, device=pos_BT.device) <= pos_BR[..., None])[None]


def _selection(
    source_BS: torch.Tensor, length_B1: torch.Tensor, config: ReAttentionConfig
) -> torch.Tensor | list[torch.Tensor]:
    scopes = [source[:length] for source, length in zip(source_BS, length_B1.flatten().tolist(), strict=True)]
    return scopes if config.span_scope == "kv_head" else scopes[0]


def reattention_oracle(
    q_THD: torch.Tensor,
    k_cache_GND: torch.Tensor,
    v_cache_GND: torch.Tensor,
    seq_len: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    config: ReAttentionConfig,
) -> tuple[torch.Tensor, torch.Tensor | list[torch.Tensor]]:
    """Section 3 word for word in float64, one head at a time, with sets instead of layouts. For tests only.

    Arguments as for `minirea.kernels.reattention`. Returns float64 [T, H, D] and the selection.
    """
    T, H, D = q_THD.shape
    group = H // k_cache_GND.shape[0]
    q, k, v, cos, sin = (x.double() for x in (q_THD, k_cache_GND[:, :seq_len], v_cache_GND[:, :seq_len], cos, sin))
    by_head = config.span_scope == "kv_head"
    ballots = [range(g * group, g * group + group) for g in range(H // group)] if by_head else [range(H)]
    scopes = [_oracle_scope(q, k, seq_len, heads, config) for heads in ballots]

    out_THD = torch.empty(T, H, D, dtype=torch.float64, device=q.device)
    for h in range(H):
        scope = scopes[h // group if by_head else 0]
        S = len(scope)
        q_rot = _oracle_rope(q[:, h], cos[S - T : S], sin[S - T : S])
        k_rot = _oracle_rope(k[h // group, scope], cos[:S], sin[:S])
        logits_TS = q_rot @ k_rot.T / D**0.5
        logits_TS.masked_fill_(torch.ones_like(logits_TS, dtype=torch.bool).triu(S - T + 1), -torch.inf)
        out_THD[:, h] = logits_TS.softmax(1) @ v[h // group, scope]
    return out_THD, scopes if by_head else scopes[0]


def _oracle_scope(
    q: torch.Tensor, k: torch.Tensor, seq_len: int, heads: range, config: ReAttentionConfig
) -> torch.Tensor:
    """Steps 1 to 7: the cache positions that one ballot attends to, ascending."""
    mid_lo, mid_hi = config.global_size, seq_len - config.local_size
    if mid_hi <= mid_lo:
        return torch.arange(seq_len, device=q.device)
    group = q.shape[1] // k.shape[0]
    votes: dict[int, int] = {}
    for h in heads:
        for score_n in q[:, h] @ k[h // group, mid_lo:mid_hi].T:
            for j in score_n.sort(descending=True, stable=True).indices[: config.span_top_k].tolist():
                votes[mid_lo + j] = votes.get(mid_lo + j, 0) + 1
    kept = sorted(votes, key=lambda j: (-votes[j], j))[: config.max_spans]
    half = config.span_size // 2
    selected = {i for j in kept for i in range(max(j - half, mid_lo), min(j + half, mid_hi))}
    scope = [*range(mid_lo), *sorted(selected), *range(mid_hi, seq_len)]
    return torch.tensor(scope, device=q.device)


def _oracle_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
