"""How pieces are cut into steps: by the rule, over the engine's own attention, and so that tokens agree."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testing import random_ids, tiny_model, write_checkpoint

import minirea
from minirea.api import new_cache
from minirea.attention import Attention
from minirea.config import ModelConfig, ReAttentionConfig, RopeConfig
from minirea.errors import InputError
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


def test_a_token_votes_together_with_those_before_it(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the prompt and of the dense part too, and none that was taken back: the first layer's queries show it,
    since they depend on a token alone."""
    llm = minirea.load(directory, **SCOPE, vote_window=5, vote_size=4, decode_spans=1)
    model, original = llm.model, minirea.attention.cpu.reattention
    called: list[tuple[int, torch.Tensor]] = []

    def spy(q_THD: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seq_len: int, *rest: Any) -> torch.Tensor:
        called.append((seq_len, q_THD))
        return original(q_THD, k, v, seq_len, *rest)

    monkeypatch.setattr("minirea.attention.cpu.reattention", spy)
    cache = new_cache(model, 10)

    def step(ids: list[int], held: list[int]) -> None:
        """Read ids behind those that are held, and compare who voted in the first layer."""
        called.clear()
        model.forward(torch.tensor(ids), cache)
        assert cache.seq_len == len(held) + len(ids)
        if cache.seq_len > model.attention.dense_size:
            seq_len, q_THD = called[0]
            voters = [*held, *ids][-5:] if len(ids) == 1 else ids
            assert seq_len == cache.seq_len
            torch.testing.assert_close(q_THD, torch.cat([model.first_query(token) for token in voters]))

    with torch.inference_mode():
        ids = random_ids(120)
        held: list[int] = []
        for part in (40, 6, 1, 1, 1, 1, 12, 1, 1, 3, 1, 1):
            step(new := ids[len(held) : len(held) + part], held)
            held += new
        cache.rewind(len(held) - 3)
        held = held[:-3]
        for token in ids[100:108]:
            step([token], held)
            held.append(token)
        cache.rewind(30)  # further back than queries are kept: what is left votes
        assert len(cache.recent(0, 99)) == 0
        model.forward(torch.tensor(ids[:40]), cache)
        assert cache.seq_len > model.attention.dense_size
        model.forward(torch.tensor(ids[:1]), cache)
        voters_5HD = torch.cat([model.first_query(token) for token in [*ids[36:40], ids[0]]])
        torch.testing.assert_close(called[-2][1], voters_5HD)


@pytest.mark.parametrize(("span_scope", "window"), [("layer", 1), ("layer", 3), ("kv_head", 1), ("kv_head", 3)])
def test_votes_of_an_answer_add_up_from_layer_to_layer(
    directory: Path, monkeypatch: pytest.MonkeyPatch, span_scope: str, window: int
) -> None:
    """Each token's begin with zeros. Chunks of a prompt, and its dense part, have none."""
    seen: list[tuple[int, int, int | None]] = []

    def spy(q_GRD: torch.Tensor, k: torch.Tensor, seq_len: int, *rest: Any) -> Any:
        votes = rest[-1]
        seen.append((seq_len, q_GRD.shape[1] // 2, None if votes is None else int(votes.counts.sum())))
        return choose_scope(q_GRD, k, seq_len, *rest)

    choose_scope = minirea.kernels.reference.choose_scope
    for module in ("kernels.reference", "cpu"):
        monkeypatch.setattr(f"minirea.{module}.choose_scope", spy)
    fields = SCOPE | {"span_scope": span_scope, "vote_window": window, "tail_size": 7}
    alone, carrying = (minirea.load(directory, **fields, carry_votes=carry) for carry in (False, True))
    ids = random_ids(100)
    logits_TV = carrying.logits(ids)
    of_chunks, of_the_end = [x for x in seen if x[0] < 100], [x for x in seen if x[0] == 100]
    num_layers, cast = carrying.config.num_layers, window * 4 * SCOPE["span_top_k"]  # in a layer
    expected = [(window, cast * layer) for layer in range(num_layers)]
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
    scope = {"vote_window": 6, "vote_size": 4}
    for decode_spans in (0, 1, 3, 5):
        llm = minirea.load(directory, **SCOPE, **scope, decode_spans=decode_spans)
        stats = llm.generate(random_ids(100), max_tokens=3, ignore_eos=True).stats
        assert 4 * decode_spans - 3 <= stats.scope["selected"] <= 4 * decode_spans
    with pytest.raises(InputError, match="decode_spans is 6, expected at most max_spans"):
        minirea.load(directory, **SCOPE, decode_spans=6)
