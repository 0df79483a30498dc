"""How pieces are cut into steps: by the rule, over the engine's own attention, and so that tokens agree."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testing import random_ids, tiny_model, write_checkpoint

import minirea
from minirea.attention import Attention
from minirea.config import ModelConfig, ReAttentionConfig, RopeConfig
from minirea.cpu_steps import CpuDecodeStep
from minirea.errors import InputError
from minirea.loading import new_cache
from minirea.steps import Part, chunks, cut, num_shared

# Small enough that a prompt of 100 tokens selects: 48 tokens dense, then spans.
SCOPE: dict[str, Any] = {"global_size": 4, "local_size": 24, "span_top_k": 2, "span_size": 4, "max_spans": 5}
SCOPE |= {"chunk_size": 16, "tail_size": 20, "tail_chunk_size": 6}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), tiny_model())


def attention(mode: str = "reattention", **fields: Any) -> Attention:
    model = ModelConfig(2, 64, 112, 4, 2, 16, 97, 1e-6, RopeConfig(), 2048)
    return Attention(model, mode, ReAttentionConfig.for_context(2048, **SCOPE | fields), "torch", CPU)


@pytest.mark.parametrize(
    ("fields", "cached", "num_tokens", "to_follow", "expected"),
    [
        ({}, 0, 100, 0, [(0, 80, 16), (80, 99, 6), (99, 100, 1)]),
        ({}, 0, 99, 1, [(0, 80, 16), (80, 99, 6)]),
        ({}, 0, 64, 36, [(0, 64, 16)]),  # shared with other prompts
        ({}, 0, 90, 10, [(0, 80, 16), (80, 90, 6)]),
        ({}, 100, 7, 0, [(0, 6, 6), (6, 7, 1)]),  # a piece shorter than the tail
        ({}, 100, 1, 0, [(0, 1, 1)]),
        ({}, 100, 0, 1, []),
        ({}, 0, 48, 0, [(0, 48, 16)]),  # everything is attended to
        ({}, 0, 47, 1, [(0, 47, 16)]),
        ({}, 0, 49, 0, [(0, 29, 16), (29, 48, 6), (48, 49, 1)]),
        ({}, 40, 8, 0, [(0, 8, 16)]),
        ({}, 40, 9, 0, [(0, 8, 6), (8, 9, 1)]),
        ({"dense_size": 28}, 0, 48, 0, [(0, 28, 16), (28, 47, 6), (47, 48, 1)]),
        ({"tail_size": 0}, 0, 100, 0, [(0, 100, 16)]),
        ({"tail_size": 0}, 0, 99, 1, [(0, 99, 16)]),
        ({"tail_size": 0}, 0, 1, 0, [(0, 1, 16)]),
        ({"tail_size": 1}, 0, 100, 0, [(0, 99, 16), (99, 100, 1)]),
        ({"tail_size": 1}, 0, 99, 1, [(0, 99, 16)]),
        ({"tail_size": 1000}, 0, 100, 0, [(0, 99, 6), (99, 100, 1)]),
    ],
)
def test_parts_of_a_piece(
    fields: dict[str, Any], cached: int, num_tokens: int, to_follow: int, expected: list[tuple[int, int, int]]
) -> None:
    assert cut(attention(**fields), cached, num_tokens, to_follow) == expected
    parts = cut(attention("full", **fields), cached, num_tokens, to_follow)
    assert parts == ([(0, num_tokens, 16)] if num_tokens else [])


def test_a_streaming_scope_is_dense_up_to_its_two_parts() -> None:
    assert cut(attention("streaming", span_top_k=0), 0, 28) == [(0, 28, 16)]
    assert cut(attention("streaming", span_top_k=0), 0, 29) == [(0, 9, 16), (9, 28, 6), (28, 29, 1)]


lengths = st.integers(0, 200)


@settings(max_examples=300)
@given(st.data(), lengths, lengths, lengths, st.integers(0, 60), st.integers(1, 24), st.integers(1, 24))
def test_a_piece_is_covered_once_and_read_alike_however_it_is_divided(
    data: st.DataObject, cached: int, num_tokens: int, to_follow: int, tail: int, chunk: int, tail_chunk: int
) -> None:
    where = attention(tail_size=tail, chunk_size=chunk, tail_chunk_size=tail_chunk)
    parts = chunks(where, cached, num_tokens, to_follow)
    assert [token for start, stop, _ in parts for token in range(start, stop)] == list(range(num_tokens))
    assert all(0 < stop - start <= size <= 24 for start, stop, size in parts)
    if num_tokens < 2:
        return
    whole = chunks(where, 0, num_tokens - 1, 1)
    shared = num_shared(where, data.draw(st.integers(0, num_tokens - 1)), [num_tokens, num_tokens + 5])
    first = chunks(where, 0, shared, num_tokens - shared)
    second = [
        Part(start + shared, stop + shared, size)
        for start, stop, size in chunks(where, shared, num_tokens - shared - 1, 1)
    ]
    ends = [stop for _, stop, _ in whole]
    assert [stop for _, stop, _ in [*first, *second]] == ends


def by_hand(llm: minirea.LLM, pieces: list[list[int]], ends: list[int]) -> torch.Tensor:
    """Logits of the last token where steps end at `ends`."""
    cache, ids_T = llm.session(200).cache, torch.tensor([i for piece in pieces for i in piece])
    with torch.inference_mode():
        for start, stop in itertools.pairwise([0, *ends]):
            x_TE = llm.model.forward(ids_T[start:stop], cache)
        return llm.model.logits(x_TE)[-1]


@pytest.mark.parametrize("mode", ["reattention", "streaming"])
def test_prompts_sessions_and_logits_read_the_tail(directory: Path, mode: str) -> None:
    """Votes of other steps would give other logits: bit for bit those of steps that are cut by hand."""
    llm = minirea.load(directory, attention=mode, **SCOPE)
    ids, question = random_ids(100), random_ids(9, seed=1)
    ends = [16, 32, 48, 64, 80, 86, 92, 98, 99, 100]
    expected = by_hand(llm, [ids], ends)
    assert torch.equal(llm.logits(ids)[-1], expected)
    assert llm.generate(ids, max_tokens=1, ignore_eos=True).token_ids == [int(expected.argmax())]
    others = minirea.load(directory, attention=mode, **SCOPE | {"tail_size": 0}), [*range(16, 97, 16), 99, 100]
    assert torch.equal(others[0].logits(ids)[-1], by_hand(others[0], [ids], others[1]))
    assert not torch.equal(others[0].logits(ids)[-1], expected)

    session = llm.session()
    session.prefill(ids)
    with torch.inference_mode():
        cached = [kv.clone() for kv in session.cache.tensors]
    out = session.generate(question, max_tokens=1, ignore_eos=True).token_ids
    assert out == [int(by_hand(llm, [ids, question], [*ends, 106, 108, 109]).argmax())]
    again = llm.session(session.cache.capacity)
    again.prefill(ids[:64], to_follow=36)
    again.prefill(ids[64:])
    for ours, theirs in zip(again.cache.tensors, cached, strict=True):
        n = min(100, ours.shape[-2])
        assert torch.equal(ours[..., :n, :], theirs[..., :n, :])


def test_up_to_dense_size_a_step_attends_to_everything(directory: Path) -> None:
    """Logits are those of full attention up to there, and no longer after."""
    ids = random_ids(100)
    full = minirea.load(directory, attention="full").logits(ids)
    for fields, dense in (({}, 48), ({"dense_size": 28}, 28), ({"dense_size": 53}, 53)):
        llm = minirea.load(directory, **SCOPE | {"chunk_size": 1, "tail_chunk_size": 1} | fields)
        same = (llm.logits(ids) - full).abs().amax(-1) < 1e-4
        assert same[:dense].all()
        assert not same[dense + 20 :].any()
        assert llm.generate(ids[:dense], max_tokens=1).stats.scope["selected"] == dense - 28


def test_a_loaded_model_has_no_tables_before_its_weights(directory: Path) -> None:
    """What grows with the trained context is made after the memory plan is checked."""
    files = minirea.api.read_model(directory)
    assert not files.attention._tables
    files.load()
    assert not files.attention._tables


def test_a_token_counts_what_those_before_it_found(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In all layers, in whatever chunk; those of the dense part found nothing, and those that are taken back count no
    more, nor those that are too far back to be kept.
    """
    fields = {"vote_window": 5, "vote_size": 4, "decode_spans": 1, "carry_votes": True}
    llm = minirea.load(directory, **SCOPE, **fields)
    model, leave, count_winners = llm.model, minirea.kernels.reference.leave, minirea.attention.count_winners
    num_layers, found, sums = llm.config.num_layers, {}, []

    def record(winner_GRK: torch.Tensor, winners_RHK: torch.Tensor, seq_len: int) -> None:
        layer = next(i for i in range(num_layers) if cache.winners[i].data_ptr() == winners_RHK.data_ptr())
        of_tokens = winner_GRK.unflatten(1, (-1, 2)).unbind(1)
        found.update({(seq_len - t, layer): x.flatten().tolist() for t, x in enumerate(reversed(of_tokens), 1)})

    def of_chunk(winner_GRK: torch.Tensor, winners_RHK: torch.Tensor, seq_len: int) -> None:
        record(winner_GRK, winners_RHK, seq_len)
        leave(winner_GRK, winners_RHK, seq_len)

    def of_query(config: Any, found_HK: Any, seq_len: int, counts: Any, winners_HK: torch.Tensor) -> Any:
        layer = next(
            i for i in range(num_layers) if cache.winners[i, (seq_len - 1) % 10].data_ptr() == winners_HK.data_ptr()
        )
        found[seq_len - 1, layer] = found_HK.flatten().tolist()
        return choose(config, found_HK, seq_len, counts, winners_HK)

    def check(votes: Any, winners: torch.Tensor, seq_len: int, config: Any, impl: str) -> None:
        count_winners(votes, winners, seq_len, config, impl)
        last = [
            x for token in range(seq_len - 5, seq_len - 1) for i in range(num_layers) for x in found.get((token, i), ())
        ]
        mid_hi = seq_len - SCOPE["local_size"]
        counted = Counter(min(max(j // 4 * 4 + 2, SCOPE["global_size"]), mid_hi - 1) for j in last if j < mid_hi)
        assert {j: n for j, n in enumerate(votes.counts[0].tolist()) if n} == counted
        sums.append(counted.total())

    choose = minirea.cpu_attention.choose
    monkeypatch.setattr(minirea.kernels.reference, "leave", of_chunk)
    monkeypatch.setattr(minirea.cpu_attention, "choose", of_query)
    monkeypatch.setattr(minirea.attention, "count_winners", check)
    cache, ids = new_cache(model, 10), random_ids(120)

    def rewind(keep: int) -> None:
        for token, layer in list(found):
            if token >= keep or token < cache.seq_len - 10:
                del found[token, layer]
        cache.rewind(keep)

    with torch.inference_mode():
        for part in (40, 6, 1, 1, 1, 1, 12, 1, 1, 3, 1, 1):
            model.forward(torch.tensor(ids[cache.seq_len : cache.seq_len + part]), cache)
        rewind(cache.seq_len - 3)
        for token in ids[100:108]:
            model.forward(torch.tensor([token]), cache)
        rewind(50)
        assert bool((cache.winners == -1).all())
        for token in ids[:4]:
            model.forward(torch.tensor([token]), cache)
    of_token = 4 * SCOPE["span_top_k"] * num_layers
    assert sums[-4:] == [0, of_token, 2 * of_token, 3 * of_token] and sums[4] == 4 * of_token


@pytest.mark.parametrize("tail", [{}, {"tail_size": 0}, {"tail_size": 3}, {"tail_chunk_size": 1, "tail_size": 20}])
@pytest.mark.parametrize("lengths", [(120,), (90, 3, 1, 40)])
def test_a_prompt_leaves_the_winners_of_its_last_tokens(
    directory: Path, tail: dict[str, int], lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In all layers, as a forward pass of all its chunks does, though steps before its end do without."""
    llm = minirea.load(directory, **SCOPE | tail, vote_window=4, carry_votes=True)
    session, cache, attended = llm.session(), llm.session().cache, []
    last, attend = llm.config.num_layers - 1, Attention.__call__
    for length in lengths:
        ids = random_ids(length, seed=length)
        with torch.inference_mode():
            for start, stop, chunk_size in chunks(llm.model.attention, cache.seq_len, length):
                llm.model.forward(torch.tensor(ids[start:stop]), cache, chunk_size=chunk_size)
        with monkeypatch.context() as patch:
            patch.setattr(
                Attention,
                "__call__",
                lambda self, layer, qkv, *rest: (attended.append((layer, len(qkv))), attend(self, layer, qkv, *rest))[
                    1
                ],
            )
            session.prefill(ids)
        assert torch.equal(session.cache.winners, cache.winners)
        assert bool((cache.winners >= 0).all())
    chunked = sum(tokens for layer, tokens in attended if layer == last)
    assert 0 < chunked <= (8 + 20 + 16) * len(lengths)


@pytest.mark.parametrize(("span_scope", "window"), [("layer", 1), ("layer", 3), ("kv_head", 1), ("kv_head", 3)])
def test_votes_of_an_answer_add_up_from_layer_to_layer(
    directory: Path, monkeypatch: pytest.MonkeyPatch, span_scope: str, window: int
) -> None:
    """Each token's begin with those of the tokens before it. Chunks of a prompt have none."""
    seen: list[tuple[int, int, int | None]] = []

    def spy(q_GRD: torch.Tensor, k: torch.Tensor, seq_len: int, *rest: Any) -> Any:
        votes = rest[-2]
        seen.append((seq_len, q_GRD.shape[1] // 2, None if votes is None else int(votes.counts.sum())))
        return choose_scope(q_GRD, k, seq_len, *rest)

    def of_query(config: Any, found_HK: Any, seq_len: int, counts_N: Any, winners_HK: Any) -> Any:
        seen.append((seq_len, 1, None if counts_N is None else int(counts_N.sum())))
        return choose(config, found_HK, seq_len, counts_N, winners_HK)

    choose_scope, choose = minirea.kernels.reference.choose_scope, minirea.cpu_attention.choose
    monkeypatch.setattr(minirea.cpu_attention, "choose", of_query)
    monkeypatch.setattr(CpuDecodeStep, "serves", lambda *_: False)
    for module in ("kernels.reference", "cpu_attention"):
        monkeypatch.setattr(f"minirea.{module}.choose_scope", spy)
    fields = SCOPE | {"span_scope": span_scope, "tail_size": 7}
    alone, carrying = (
        minirea.load(directory, **fields, **votes) for votes in ({}, {"vote_window": window, "carry_votes": True})
    )
    ids = random_ids(100)
    logits_TV = carrying.logits(ids)
    of_chunks, of_the_end = [x for x in seen if x[0] < 100], [x for x in seen if x[0] == 100]
    num_layers, cast = carrying.config.num_layers, 4 * SCOPE["span_top_k"]  # in a layer
    expected = [(1, cast * ((window - 1) * num_layers + layer)) for layer in range(num_layers)]
    assert of_chunks and all(votes is None and queries > 1 for _, queries, votes in of_chunks)
    assert [x[1:] for x in of_the_end] == expected
    differs_V = (logits_TV - alone.logits(ids)).abs().amax(1) > 1e-3
    assert differs_V.tolist() == [False] * 99 + [True]

    seen.clear()
    out = carrying.generate(ids, max_tokens=3, ignore_eos=True)
    assert out.token_ids[0] == int(logits_TV[-1].argmax())
    steps = [x for x in seen if x[0] >= 100][: 3 * num_layers]  # the selection of the last one is made again
    assert steps == [(100 + step, *counts) for step in range(3) for counts in expected]


def test_an_answer_keeps_fewer_spans(directory: Path) -> None:
    scope = {"vote_window": 6, "vote_size": 4, "carry_votes": True}
    for decode_spans in (0, 1, 3, 5):
        llm = minirea.load(directory, **SCOPE, **scope, decode_spans=decode_spans)
        stats = llm.generate(random_ids(100), max_tokens=3, ignore_eos=True).stats
        assert 4 * decode_spans - 3 <= stats.scope["selected"] <= 4 * decode_spans
    with pytest.raises(InputError, match="decode_spans is 6, expected at most max_spans"):
        minirea.load(directory, **SCOPE, decode_spans=6)
