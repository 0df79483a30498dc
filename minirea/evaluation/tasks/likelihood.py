"""How surprised a model is by each token of a text, at any length of text, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minirea.api import LLM
from minirea.cache import KVCache
from minirea.errors import InputError
from minirea.isolation import isolated
from minirea.progress import bar
from minirea.steps import chunks

# Logits held at a time, in float32 elements. A chunk of 512 tokens and a vocabulary of 128,000 have twice as many.
TILE_LOGITS = 1 << 25


@isolated()
def token_nlls(llm: LLM, ids: Sequence[int], progress: bool = False) -> Tensor:
    """Negative log-likelihood of each token after the first, given all before it, through the steps of `generate`.

    Args:
        ids: T tokens, at least 2.

    Returns:
        float32 [T - 1] on the CPU, nats; entry t is of token t + 1.

    Raises:
        InputError: the logits are not finite.
    """
    model, num_read = llm.model, len(ids) - 1  # nothing follows the last token
    cache = KVCache(model.config, num_read, model.attention.dense_limit, model.device, model.dtype)
    ids_T = torch.tensor(ids, dtype=torch.long, device=model.device)
    rows = max(1, TILE_LOGITS // model.config.vocab_size)
    nll_T = torch.empty(num_read, dtype=torch.float32)
    with bar(num_read, progress, desc="reading", unit="tok", unit_scale=True) as tokens:
        for start, stop, chunk_size in chunks(model.attention, 0, num_read, to_follow=1):
            x_TE = model.forward(ids_T[start:stop], cache, len(ids), chunk_size)
            parts = zip(x_TE.split(rows), ids_T[start + 1 : stop + 1].split(rows), strict=True)
            losses = [F.cross_entropy(model.logits(x_RE), next_R, reduction="none") for x_RE, next_R in parts]
            nll_T[start:stop] = torch.cat(losses).cpu()
            tokens.update(stop - start)
    if not nll_T.isfinite().all():
        position = int(nll_T.isfinite().logical_not().nonzero()[0])
        raise InputError(
            f"the logits are not finite at token {position}: the weights are damaged, or too large for "
            f'{str(model.dtype).removeprefix("torch.")} (try dtype="float32")'
        )
    return nll_T


@isolated()
def nlls_in_range(llm: LLM, ids: Sequence[int], context: int, beginning: int = 0) -> Tensor:
    """The same tokens' negative log-likelihoods where the model never reads more than `context` tokens in one go.

    The text is read in pieces of `context` tokens that overlap by half. What counts is the second half of each piece,
    so that every token has at least half of `context` before it, as far as the text goes. The first `beginning` of
    `ids` (BOS) begin each piece, as they begin each text in training.

    Returns:
        float32 [T - 1], as from token_nlls.
    """
    parts = [token_nlls(llm, ids[:context])]
    for start in range(context, len(ids), max(1, context // 2)):
        stop = min(start + max(1, context // 2), len(ids))
        piece = [*ids[:beginning], *ids[stop - context + beginning : stop]]
        parts.append(token_nlls(llm, piece)[start - stop :])
    return torch.cat(parts)
