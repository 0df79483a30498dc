"""ReAttention in plain torch: the twins of the fused kernel's phases, under their names.

    score   -> the span_top_k best keys of the middle for every query row (a bounded tile of keys at a time)
    leave   -> winners for later tokens' votes
    pool    -> winners as the middles of their blocks
    vote    -> the max_spans positions that most rows chose
    elect   -> the same, of the rows of earlier layers and tokens too
    select  -> where each part of the scope starts, in the cache and in the scope
    locate  -> row of the scope -> cache position
    rotate  -> RoPE with positions inside the scope
    attend  -> causal softmax attention over the gathered scope

Shapes, besides the project's letters: R rows of one key/value head (its H / G query heads times T queries; row
r is query r // (H / G)), K winners per row, B ballots (sets of rows that vote together: 1 for span_scope "layer", G for
"kv_head"), W winners of one ballot, P parts of the scope (global, the spans that the ballot keeps, local), J earlier
tokens, U positions with votes, C elements of a sketch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F

from minirea.config import ReAttentionConfig
from minirea.kernels.sketch import (
    LARGEST_KEY,
    LARGEST_QUERY,
    LEVELS,
    MEAN_KEYS,
    SLACK,
    SMALLEST,
    SMALLEST_KEY,
    SMALLEST_QUERY,
    Sketch,
    hadamard,
    query_error,
    sum_error,
    width,
)
from minirea.kernels.votes import Votes

# Keys whose scores share one maximum in `score`. Only the K blocks with the largest maxima can hold winners.
BLOCK: Final = 64
# Scores held at a time. On a CPU they should still be in the cache when they are reduced; on a GPU the tile should be
# large enough to fill the device.
TILE_SCORES: Final = {"cpu": 1 << 20, "cuda": 1 << 26}
# Rows of a head scored together. More rows make the tile's share of keys shorter, and merging costs more.
TILE_ROWS: Final = {"cpu": 128, "cuda": 1 << 14}
# A score and its key are compared as one int64: the score's bits, ordered, above the inverted index, so that of
# equal scores the lower index is the larger number. NO_KEY loses to every key.
INDEX_MASK: Final = 0xFFFFFFFF
NO_KEY: Final = -(1 << 63)
# Keys of a row that `score_by_sketch` scores exactly at most.
SURVIVORS: Final = 1024
# Keys whose sketches are made, or read, at a time, which bounds the memory that it takes.
SKETCHED_AT_ONCE: Final = 4096

ScoreFunction = Callable[..., torch.Tensor]  # with the arguments and the result of `score_rows`


def reattention_reference(
    q_THD: torch.Tensor,
    k_cache_GND: torch.Tensor,
    v_cache_GND: torch.Tensor,
    seq_len: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    config: ReAttentionConfig,
    return_selection: bool = False,
    chunk_size: int | None = None,
    gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
    sketch: Sketch | None = None,
    votes: Votes | None = None,
    winners: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | list[torch.Tensor] | None]:
    """ReAttention, phase by phase. Arguments and results are those of `minirea.kernels.reattention`."""
    T, H, D = q_THD.shape
    if chunk_size is not None and chunk_size < T:
        caches, n, outs_THD = (k_cache_GND, v_cache_GND), seq_len - T, []
        for q_chunk in q_THD.split(chunk_size):
            n += len(q_chunk)
            out_THD, _ = reattention_reference(q_chunk, *caches, n, cos, sin, config, gather=gather, winners=winners)
            outs_THD.append(out_THD)
        return torch.cat(outs_THD), None
    G = k_cache_GND.shape[0]
    q_GRD = q_THD.unflatten(1, (G, H // G)).transpose(0, 1).reshape(G, -1, D)
    B = G if config.span_scope == "kv_head" else 1

    score_function: ScoreFunction | None = None
    if sketch is not None and T == 1:
        score_function = functools.partial(score_by_sketch, sketch=sketch)
    if seq_len <= config.dense_size:
        lengths, source_BS = [seq_len] * B, None
        k_GSD, v_GSD = k_cache_GND[:, :seq_len].clone(), v_cache_GND[:, :seq_len]
    else:
        start_BP, offset_BP, length_B = choose_scope(
            q_GRD, k_cache_GND, seq_len, config, score_function, gather, votes, winners
        )
        lengths = length_B.tolist()  # on a GPU the one wait of the step: the scope's length decides the shapes below
        offs_s = torch.arange(max(lengths), device=q_THD.device)
        source_BS = locate(offs_s, start_BP, offset_BP).clamp_(max=seq_len - 1)
        k_GSD, v_GSD = _gather(k_cache_GND, source_BS), _gather(v_cache_GND, source_BS)

    S = max(lengths)
    ragged = min(lengths) < S
    pos_BT = _query_positions(lengths, T, q_THD.device) if ragged or T > 1 else None
    pos = pos_BT if ragged else slice(S - T, S)
    q_rot = rotate(q_GRD.unflatten(1, (T, -1)).clone(), cos[pos].unsqueeze(-2), sin[pos].unsqueeze(-2))
    k_rot = rotate(k_GSD, cos[:S], sin[:S])
    mask = None if pos_BT is None else _causal_mask(pos_BT, S, H // G)
    out_GRD = attend(q_rot.flatten(1, 2), k_rot, v_GSD, mask)
    out_THD = out_GRD.unflatten(1, (T, -1)).transpose(0, 1).reshape(T, H, D)
    if not return_selection:
        return out_THD, None
    if source_BS is None:
        source_BS = torch.arange(S, device=q_THD.device).expand(B, -1)
    scopes = [source[:length] for source, length in zip(source_BS, lengths, strict=True)]
    return out_THD, scopes if config.span_scope == "kv_head" else scopes[0]


def choose_scope(
    q_GRD: torch.Tensor,
    k_cache_GND: torch.Tensor,
    seq_len: int,
    config: ReAttentionConfig,
    score: ScoreFunction | None = None,
    gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
    votes: Votes | None = None,
    winners: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score, vote and select. Where nothing may be selected (streaming), the scope has two parts, global and local.

    `score` takes the place of this module's, for a sketch or for a device that has its own. `gather` adds the winners
    of heads that are elsewhere, where all heads vote together. `votes` are those of earlier layers and tokens, to which
    these are added. `winners` takes what these rows have found.
    """
    mid_lo, mid_hi = config.global_size, seq_len - config.local_size
    B = k_cache_GND.shape[0] if config.span_scope == "kv_head" else 1
    if config.max_selected:
        winner_GRK = (score or score_rows)(
            q_GRD, k_cache_GND, mid_lo=mid_lo, mid_hi=mid_hi, span_top_k=config.span_top_k
        )
        if gather is not None and config.span_scope == "layer":
            winner_GRK = gather(winner_GRK)
        if winners is not None:
            leave(winner_GRK, winners, seq_len)
        winner_BW = pool(winner_GRK.view(B, -1), config.vote_size, mid_lo, mid_hi)
        if votes is None:
            kept_BP = vote(winner_BW, config.max_spans)
        else:
            votes.counts.scatter_add_(1, winner_BW, torch.ones_like(winner_BW, dtype=torch.int32))
            kept_BP = elect(votes.counts[:, :mid_hi], config.max_spans)
    else:
        kept_BP = torch.empty(B, 0, dtype=torch.int64, device=q_GRD.device)
    return select(kept_BP, mid_lo, mid_hi, seq_len, config.span_size)


def score_rows(
    q_GRD: torch.Tensor, k_cache_GND: torch.Tensor, mid_lo: int, mid_hi: int, span_top_k: int
) -> torch.Tensor:
    """`score`, a bounded number of rows at a time."""
    tiles = q_GRD.split(TILE_ROWS[q_GRD.device.type], 1)
    return torch.cat([score(q, k_cache_GND, mid_lo, mid_hi, span_top_k) for q in tiles], 1)


def score(q_GRD: torch.Tensor, k_cache_GND: torch.Tensor, mid_lo: int, mid_hi: int, span_top_k: int) -> torch.Tensor:
    """Cache positions of each row's span_top_k largest q . k over the middle, the lowest position first among equals.

    Section 3, steps 3 and 4: neither side has RoPE, products are accumulated in float32. Returns int64 [G, R, K], best
    first, with K = min(span_top_k, keys of the middle).
    """
    G, R, _ = q_GRD.shape
    tile = max(BLOCK, TILE_SCORES[q_GRD.device.type] // (G * R) // BLOCK * BLOCK)
    best_GRK = torch.full((G, R, min(span_top_k, mid_hi - mid_lo)), NO_KEY, dtype=torch.int64, device=q_GRD.device)
    for lo in range(mid_lo, mid_hi, tile):
        score_GNR = _dot(k_cache_GND[:, lo : min(lo + tile, mid_hi)], q_GRD)
        _merge(best_GRK, score_GNR, lo, skip_rows=lo > mid_lo and not q_GRD.is_cuda)
    return unpack_index(best_GRK)


def _dot(k_GND: torch.Tensor, q_GRD: torch.Tensor) -> torch.Tensor:
    """float32 [G, N, R]. Keys on the left: a decode step then streams the cache once, at memory speed."""
    if k_GND.is_cuda and k_GND.dtype != torch.float32:
        return torch.bmm(k_GND, q_GRD.mT, out_dtype=torch.float32)
    return torch.matmul(k_GND.float(), not_alone(q_GRD).float().mT)[..., : q_GRD.shape[1]]


def not_alone(q_GRD: torch.Tensor) -> torch.Tensor:
    """Rows to multiply keys by, on a CPU: a single one twice. Its product would sum in an order that depends on where a
    key lies, and equal keys would score otherwise.
    """
    return q_GRD.expand(-1, 2, -1) if q_GRD.shape[1] == 1 else q_GRD


def _merge(best_GRK: torch.Tensor, score_GNR: torch.Tensor, lo: int, skip_rows: bool) -> None:
    """Merge the scores of the keys from position `lo` on into each row's packed best K, in place.

    Blocks of keys are ranked by their maxima, the lower block first among equals. A winner outside the first K blocks
    would have K better keys before it, so only their keys are ranked, and those after the last whole block.
    `skip_rows` leaves out the rows that the tile cannot improve: cheap on a CPU, but a GPU would have to be waited for.
    """
    G, N, R = score_GNR.shape
    K = best_GRK.shape[-1]
    num_blocks = N // BLOCK
    block_GNMR = score_GNR[:, : num_blocks * BLOCK].view(G, num_blocks, BLOCK, R)
    rest_GMR = score_GNR[:, num_blocks * BLOCK :]
    max_GNR = _block_max(block_GNMR)

    if skip_rows:
        row_max_GR = torch.cat([max_GNR, rest_GMR], 1).amax(1)
        g_p, r_p = (_ordered(row_max_GR) > best_GRK[..., -1] >> 32).nonzero(as_tuple=True)
        max_pn, best_pk = max_GNR[g_p, :, r_p], best_GRK[g_p, r_p]
    else:
        max_pn, best_pk = max_GNR.mT, best_GRK

    offs_n = torch.arange(num_blocks, device=score_GNR.device)
    block_pk = unpack_index(pack_score(max_pn, offs_n).topk(min(K, num_blocks)).values)
    offs_m = torch.arange(BLOCK, device=score_GNR.device)
    offs_rest = torch.arange(num_blocks * BLOCK, N, device=score_GNR.device).expand(*best_pk.shape[:-1], -1)
    offs_pm = torch.cat([(block_pk[..., None] * BLOCK + offs_m).flatten(-2), offs_rest], -1)
    score_pm = score_GNR[g_p[:, None], offs_pm, r_p[:, None]] if skip_rows else score_GNR.mT.gather(-1, offs_pm)
    best_pk = torch.cat([best_pk, pack_score(score_pm, lo + offs_pm)], -1).topk(K).values
    if skip_rows:
        best_GRK[g_p, r_p] = best_pk
    else:
        best_GRK.copy_(best_pk)


def _block_max(block_GNMR: torch.Tensor) -> torch.Tensor:
    """Maximum over the keys of each block. Over few rows amax is slow on a CPU: its inner runs are too short."""
    if block_GNMR.is_cuda or block_GNMR.shape[-1] >= BLOCK:
        return block_GNMR.amax(2)
    while block_GNMR.shape[2] > 1:
        block_GNMR = torch.maximum(*block_GNMR.chunk(2, 2))
    return block_GNMR[:, :, 0]


def _ordered(score: torch.Tensor) -> torch.Tensor:
    """float32 -> int32 of the same order. Adding 0 makes one number of -0 and +0, which must tie."""
    bits = (score + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def pack_score(score: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return (_ordered(score).long() << 32) | (INDEX_MASK - index)


def unpack_index(packed: torch.Tensor) -> torch.Tensor:
    return INDEX_MASK - (packed & INDEX_MASK)


def leave(winner_GRK: torch.Tensor, winners_RHK: torch.Tensor, seq_len: int) -> None:
    """Put the winners of a step's last tokens where `count_winners` takes them from."""
    G, (size, H, _) = len(winner_GRK), winners_RHK.shape
    winner_THK = winner_GRK.unflatten(1, (-1, H // G)).transpose(0, 1).flatten(1, 2)[-size:]
    row_T = torch.arange(seq_len - len(winner_THK), seq_len, device=winner_GRK.device) % size
    missing = winners_RHK.shape[-1] - winner_THK.shape[-1]  # where the middle has fewer keys
    winners_RHK[row_T] = F.pad(winner_THK, (0, missing), value=-1).int()


def count_winners(votes: Votes, winners_LRHK: torch.Tensor, seq_len: int, config: ReAttentionConfig) -> None:
    """Count the votes of the vote_window - 1 tokens before the last of seq_len, of all layers. Winners that are not in
    the middle, as after tokens were taken back, do not count.
    """
    mid_lo, mid_hi, B = config.global_size, seq_len - config.local_size, len(votes.counts)
    if mid_hi <= mid_lo:
        return
    token_J = torch.arange(seq_len - config.vote_window, seq_len - 1, device=winners_LRHK.device)
    winner_LJHK = winners_LRHK[:, token_J % winners_LRHK.shape[1]].long()
    winner_BW = winner_LJHK.unflatten(2, (B, -1)).movedim(2, 0).flatten(1)
    counts_BW = ((winner_BW >= mid_lo) & (winner_BW < mid_hi)).int()
    pooled_BW = pool(winner_BW.clamp_(mid_lo, mid_hi - 1), config.vote_size, mid_lo, mid_hi)
    votes.counts.scatter_add_(1, pooled_BW, counts_BW)


def pool(winner_BW: torch.Tensor, vote_size: int, mid_lo: int, mid_hi: int) -> torch.Tensor:
    """Each winner as the middle of its block of vote_size keys, or as the key of the middle that is next to it."""
    if vote_size == 1:
        return winner_BW
    return (winner_BW // vote_size * vote_size + vote_size // 2).clamp_(mid_lo, mid_hi - 1)


def rotate_for_sketch(x: torch.Tensor) -> torch.Tensor:
    """R x: float32 [..., C] from x [..., D]."""
    D, C = x.shape[-1], width(x.shape[-1])
    return x.float() @ hadamard(D, C, x.device) * C**-0.5


def set_mean(k_cache_GND: torch.Tensor, sketch: Sketch, num_keys: int) -> None:
    """The mean of up to MEAN_KEYS of the first num_keys keys. It has to stay as long as any sketch made with it."""
    sample_GND = k_cache_GND[:, : num_keys : -(-num_keys // MEAN_KEYS)]
    sketch.mean.copy_(rotate_for_sketch(sample_GND.float().mean(1)).nan_to_num_(0.0, 0.0, 0.0))


def sketch_keys(k_cache_GND: torch.Tensor, sketch: Sketch, start: int, stop: int) -> None:
    """Write the sketches of keys [start, stop). minirea.kernels.sketch says what they are."""
    for lo in range(start, stop, SKETCHED_AT_ONCE):
        part = slice(lo, min(lo + SKETCHED_AT_ONCE, stop))
        sketch.codes[:, part], sketch.scales[:, part] = sketch_of(k_cache_GND[:, part].float(), sketch.mean)


def sketch_of(k_GND: torch.Tensor, mean_GC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [G, N, C] and scales int32 [G, N, 1] of keys."""
    D = k_GND.shape[-1]
    y_GNC = rotate_for_sketch(k_GND) - mean_GC[:, None]
    top_GN1 = y_GNC.abs().amax(-1, keepdim=True)
    scale_GN1 = torch.where((top_GN1 > SMALLEST_KEY) & (top_GN1 < LARGEST_KEY), _round_up(top_GN1 / 127), 0.0)
    code_GNC = torch.where(scale_GN1 > 0, torch.floor(y_GNC / scale_GN1 + 0.5), 0.0)
    rest_GNC = y_GNC - scale_GN1 * code_GNC
    error_GN1 = SLACK * _norm(rest_GNC) + query_error(D) * _norm(y_GNC) + SMALLEST
    error_GN1 += sum_error(D) * (k_GND.abs().sum(-1, keepdim=True) + _norm(k_GND))
    error_GN1 = torch.where(error_GN1 < torch.inf, _round_up(error_GN1), torch.inf)
    return code_GNC.to(torch.int8), scale_GN1.view(torch.int32) | (error_GN1.view(torch.int32) >> 16)


def _norm(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def _round_up(x: torch.Tensor) -> torch.Tensor:
    """Positive float32 numbers to the next bfloat16 that is no smaller."""
    return ((x.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


def quantize_queries(q_GRD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rq as integers, float32 [G, R, C] of at most LEVELS, and |q| in the same units, [G, R, 1]: infinite where the
    integers are no use, since the query is too small, too large or not finite.
    """
    z_GRC, norm_GR1 = rotate_for_sketch(q_GRD), _norm(q_GRD.float())
    top_GR1 = z_GRC.abs().amax(-1, keepdim=True)
    usable_GR1 = (top_GR1 > SMALLEST_QUERY) & (norm_GR1 < LARGEST_QUERY)
    inverse_GR1 = torch.where(usable_GR1, LEVELS / top_GR1, 0.0)
    x_GRC = torch.where(usable_GR1, torch.floor(z_GRC * inverse_GR1 + 0.5), 0.0)
    return x_GRC, torch.where(usable_GR1, SLACK * norm_GR1 * inverse_GR1, torch.inf)


def score_bounds(
    x_GRC: torch.Tensor, norm_GR1: torch.Tensor, sketch: Sketch, lo: int, hi: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower and upper bounds of the scores of keys [lo, hi), float32 [G, R, N], up to what all keys of a row share.

    x_GRC and norm_GR1 are those of `quantize_queries`. Sums of the integers exceed float32, not float64.
    """
    scale_GN, error_GN = scales_of(sketch, lo, hi)
    total_GRN = x_GRC.double() @ sketch.codes[:, lo:hi].double().mT
    base_GRN = total_GRN.float() * scale_GN[:, None]
    margin_GRN = norm_GR1 * error_GN[:, None]
    return base_GRN - margin_GRN, base_GRN + margin_GRN


def scales_of(sketch: Sketch, lo: int, hi: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and errors of keys [lo, hi), float32 [G, N]."""
    both = sketch.scales[:, lo:hi, 0]
    return (both & ~0xFFFF).view(torch.float32), (both << 16).view(torch.float32)


def score_by_sketch(
    q_GRD: torch.Tensor, k_cache_GND: torch.Tensor, sketch: Sketch, mid_lo: int, mid_hi: int, span_top_k: int
) -> torch.Tensor:
    """`score` with only the keys read that can win by their sketches; all of them if a row has more than SURVIVORS."""
    (G, R, _), K = q_GRD.shape, min(span_top_k, mid_hi - mid_lo)
    tile = min(SKETCHED_AT_ONCE, max(BLOCK, TILE_SCORES[q_GRD.device.type] // (G * R) // BLOCK * BLOCK))
    queries, device = quantize_queries(q_GRD), q_GRD.device
    lower_GRK = torch.empty(G, R, 0, dtype=torch.float32, device=device)
    upper_GRS, index_GRS = lower_GRK, torch.empty(G, R, 0, dtype=torch.int64, device=device)
    for lo in range(mid_lo, mid_hi, tile):
        hi = min(lo + tile, mid_hi)
        lower_GRN, upper_GRN = score_bounds(*queries, sketch, lo, hi)
        lower_GRK = torch.cat([lower_GRK, lower_GRN], -1)
        lower_GRK = lower_GRK.topk(min(K, lower_GRK.shape[-1])).values
        upper_GRS = torch.cat([upper_GRS, upper_GRN], -1)
        index_GRS = torch.cat([index_GRS, torch.arange(lo, hi, device=device).expand(G, R, -1)], -1)
        upper_GRS, best_GRS = upper_GRS.topk(min(SURVIVORS + 1, upper_GRS.shape[-1]))
        index_GRS = index_GRS.gather(-1, best_GRS)
    survives_GRS = upper_GRS >= lower_GRK[..., -1:]
    if bool((survives_GRS.sum(-1) > SURVIVORS).any()):
        return score_rows(q_GRD, k_cache_GND, mid_lo, mid_hi, span_top_k)
    rows_GRSD = k_cache_GND[torch.arange(G, device=device)[:, None, None], index_GRS].float()
    score_GRS = torch.matmul(rows_GRSD, q_GRD.float()[..., None])[..., 0]
    packed_GRS = pack_score(score_GRS, index_GRS).masked_fill_(~survives_GRS, NO_KEY)
    return unpack_index(packed_GRS.topk(K).values)


def vote(winner_BW: torch.Tensor, max_spans: int) -> torch.Tensor:
    """The max_spans positions that most of a ballot's winners name, the lowest position first among equals.

    Section 3, step 5. Returns int64 [B, min(W, max_spans)] in any order. A position may be listed more than once:
    `select` gives a repeated one no keys of its own, so the number of distinct ones is not needed.
    """
    if winner_BW.shape[1] <= max_spans:
        return winner_BW
    winner_BW = winner_BW.sort(1).values
    votes_BW = torch.searchsorted(winner_BW, winner_BW, right=True) - torch.searchsorted(winner_BW, winner_BW)
    repeated_BW = F.pad(winner_BW[:, 1:] == winner_BW[:, :-1], (1, 0))
    ranked_BW = ((votes_BW << 32) | (INDEX_MASK - winner_BW)).masked_fill_(repeated_BW, NO_KEY)
    elected_BP = ranked_BW.topk(max_spans).values
    return unpack_index(torch.where(elected_BP == NO_KEY, elected_BP[:, :1], elected_BP))


def elect(counts_BN: torch.Tensor, max_spans: int) -> torch.Tensor:
    """The max_spans positions with most votes, the lowest position first among equals; every ballot has some votes.

    Returns int64 [B, at most max_spans] like `vote`. Of N positions few, U, have any vote.
    """
    voted_U = (counts_BN > 0).any(0).nonzero()[:, 0]
    ranked_BU = (counts_BN[:, voted_U].long() << 32) | (INDEX_MASK - voted_U)
    elected_BP = ranked_BU.topk(min(max_spans, len(voted_U))).values
    return unpack_index(torch.where(elected_BP >> 32 == 0, elected_BP[:, :1], elected_BP))


def select(
    kept_BP: torch.Tensor, mid_lo: int, mid_hi: int, seq_len: int, span_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Layout of the scope, global ++ selected ++ local. Section 3, step 6, as a prefix sum instead of a union of sets.

    Covers have equal lengths, so in ascending order each adds what lies at or after both its own start and the end
    of the one before. Global and local are the first and the last part. Returns int64 start_BP (cache position where
    part p starts), offset_BP (the row of the scope which that position fills) and length_B (S of each ballot).
    """
    half = span_size // 2
    kept_BP = kept_BP.sort(1).values
    start_BP = F.pad(kept_BP - half, (1, 1))
    stop_BP = F.pad((kept_BP + half).clamp_(max=mid_hi), (1, 1), value=seq_len)
    start_BP[:, -1] = mid_hi
    stop_BP[:, 0] = mid_lo
    torch.maximum(start_BP[:, 1:], stop_BP[:, :-1], out=start_BP[:, 1:])
    rows_BP = stop_BP - start_BP
    end_BP = rows_BP.cumsum(1)
    return start_BP, end_BP - rows_BP, end_BP[:, -1]


def locate(offs_s: torch.Tensor, start_BP: torch.Tensor, offset_BP: torch.Tensor) -> torch.Tensor:
    """Cache positions of the scope's rows offs_s: int64 [B, S]. Section 3, step 7.

    A part without rows has the offset of the next one, so the last part at or before a row is the one that has it.
    """
    offs_BS = offs_s.expand(start_BP.shape[0], -1).contiguous()
    part_BS = torch.searchsorted(offset_BP, offs_BS, right=True) - 1
    return offs_BS + (start_BP - offset_BP).gather(1, part_BS)


def _gather(cache_GND: torch.Tensor, source_BS: torch.Tensor) -> torch.Tensor:
    """The scope's rows of a cache, [G, S, D], from one list of positions or from one list per head."""
    if source_BS.shape[0] == 1:
        return cache_GND.index_select(1, source_BS[0])  # several times faster than the general form on a CPU
    heads_G1 = torch.arange(cache_GND.shape[0], device=cache_GND.device)[:, None]
    return cache_GND[heads_G1, source_BS]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of x [..., D] by cos and sin [..., D / 2] in float32: element i turns with element i + D / 2.

    A float32 x is overwritten: a decode step on a CPU spends its time on memory that is not in the cache.
    """
    rotated = x.float()
    a, b = rotated.chunk(2, -1)
    b_sin = b * sin
    b.mul_(cos).addcmul_(a, sin)
    a.mul_(cos).sub_(b_sin)
    return rotated.to(x.dtype)


def attend(q_GRD: torch.Tensor, k_GSD: torch.Tensor, v_GSD: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Softmax attention with scale 1 / sqrt(D): [G, R, D]. The rows of a group share their head's keys unrepeated."""
    return F.scaled_dot_product_attention(q_GRD[None], k_GSD[None], v_GSD[None], attn_mask=mask)[0]


def _query_positions(lengths: list[int], T: int, device: torch.device) -> torch.Tensor:
    """int64 [B, T]: the last T positions of each ballot's scope. Section 3, step 7."""
    return torch.tensor(lengths, dtype=torch.int64, device=device)[:, None] + torch.arange(-T, 0, device=device)


def _causal_mask(pos_BT: torch.Tensor, S: int, group: int) -> torch.Tensor:
    """bool [1, B, R, S]: the rows of a query at position p, `group` of them, see scope rows 0..p."""
    pos_BR = pos_BT.repeat_interleave(group, 1)
    return (torch.arange(S, device=pos_BT.device) <= pos_BR[..., None])[None]
