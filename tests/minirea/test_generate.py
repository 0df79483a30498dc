"""The decode loop: invariances, stopping, sessions and statistics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testing import TINY, random_ids, tiny_model, write_checkpoint

import minirea
from minirea.generate import StopStrings, chunks, prompt_steps

# Small enough that a prompt of 100 tokens selects: 4 + 24 dense, then spans.
SCOPE = {"global_size": 4, "local_size": 24, "span_top_k": 2, "span_size": 4, "max_spans": 5, "chunk_size": 16}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), tiny_model())


@pytest.fixture(scope="module")
def llm(directory: Path) -> minirea.LLM:
    return minirea.load(directory, **SCOPE)


@given(num_tokens=st.integers(1, 300), chunk_size=st.integers(1, 70))
def test_prompt_steps_cover_the_prompt_once(num_tokens: int, chunk_size: int) -> None:
    steps = prompt_steps(num_tokens, chunk_size)
    assert [token for start, stop in steps for token in range(start, stop)] == list(range(num_tokens))
    assert steps[-1] == (num_tokens - 1, num_tokens)
    assert all(0 < stop - start <= chunk_size for start, stop in steps)


def test_no_tokens_take_no_step() -> None:
    assert chunks(0, 8) == []


def test_logits_end_where_generate_begins(llm: minirea.LLM) -> None:
    ids = random_ids(100)
    assert llm.generate(ids, max_tokens=1).token_ids == [int(llm.logits(ids)[-1].argmax())]


@pytest.mark.parametrize("attention", ["full", "reattention", "streaming"])
def test_decode_is_prefill(directory: Path, attention: str) -> None:
    """Feeding the generated tokens one by one gives the logits of reading them as a prompt in steps of one."""
    llm = minirea.load(directory, attention=attention, **SCOPE | {"chunk_size": 1})
    ids = random_ids(60)
    out = llm.generate(ids, max_tokens=12, ignore_eos=True).token_ids
    expected = llm.logits(ids + out)[len(ids) - 1 : -1].argmax(-1).tolist()
    assert out == expected


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 24])
def test_dense_chunks_do_not_matter(directory: Path, chunk_size: int) -> None:
    ids = random_ids(28)
    one_shot = minirea.load(directory, attention="full", chunk_size=24).logits(ids)
    chunked = minirea.load(directory, **SCOPE | {"chunk_size": chunk_size}).logits(ids)
    torch.testing.assert_close(chunked, one_shot, atol=1e-4, rtol=0)


def test_full_attention_chunks_do_not_matter(directory: Path) -> None:
    ids = random_ids(100)
    logits = [minirea.load(directory, attention="full", chunk_size=size).logits(ids) for size in (1, 9, 100)]
    torch.testing.assert_close(logits[0], logits[2], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[1], logits[2], atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["reattention", "full"])
@pytest.mark.parametrize("num_layers", [1, 2])
@torch.inference_mode()
def test_reading_a_prompt_fills_the_cache_as_a_whole_forward_pass_does(
    tmp_path: Path, num_layers: int, attention: str
) -> None:
    llm = minirea.load(
        write_checkpoint(tmp_path, tiny_model(num_hidden_layers=num_layers)), attention=attention, **SCOPE
    )
    ids_T = torch.tensor(random_ids(60))
    read, forward = (llm.session(60).cache for _ in range(2))
    for tensor in (*read.tensors, *forward.tensors):
        tensor.fill_(torch.nan)
    for start, stop in chunks(60, 16):
        llm.model.read(ids_T[start:stop], read)
        llm.model.forward(ids_T[start:stop], forward)
    assert read.seq_len == forward.seq_len == 60
    for ours, theirs in zip(read.tensors, forward.tensors, strict=True):
        assert torch.equal(ours, theirs) and not theirs.isnan().any()


def test_streaming_forgets_the_middle(directory: Path) -> None:
    """One layer of streaming attention cannot see the middle of the prompt, whatever it holds."""
    one_layer = write_checkpoint(directory.parent / "one-layer", tiny_model(num_hidden_layers=1))
    streaming = minirea.load(one_layer, attention="streaming", **SCOPE)
    ids, other = random_ids(100), random_ids(100, seed=1)
    changed = ids[:4] + other[4:70] + ids[70:]
    assert torch.equal(streaming.logits(ids)[-1], streaming.logits(changed)[-1])


def test_cache_growth_changes_nothing(llm: minirea.LLM) -> None:
    ids = random_ids(90)
    grown, roomy = llm.session(), llm.session(capacity=400)
    for part in (ids[:30], ids[30:31], ids[31:80]):
        grown.prefill(part)
        roomy.prefill(part)
    assert grown.cache.capacity < 200
    out = [session.generate(ids[80:], max_tokens=30, ignore_eos=True).token_ids for session in (grown, roomy)]
    assert out[0] == out[1]


def test_garbage_beyond_the_cached_tokens_changes_nothing(llm: minirea.LLM) -> None:
    ids = random_ids(90)
    out = []
    for garbage in (0.0, float("nan")):
        session = llm.session(capacity=200)
        for tensor in session.cache.tensors:
            tensor.fill_(garbage)
        out.append(session.generate(ids, max_tokens=20, ignore_eos=True).token_ids)
    assert out[0] == out[1]


def test_rewind_forgets_exactly_what_came_after(llm: minirea.LLM) -> None:
    ids, question = random_ids(90), random_ids(9, seed=3)
    session = llm.session()
    session.prefill(ids)
    first = session.generate(question, max_tokens=10, ignore_eos=True).token_ids
    session.rewind(len(ids))
    session.generate(random_ids(5, seed=4), max_tokens=4, ignore_eos=True)
    session.rewind(len(ids))
    assert session.generate(question, max_tokens=10, ignore_eos=True).token_ids == first


def test_a_session_continues_its_own_output(directory: Path) -> None:
    llm = minirea.load(directory, attention="full")
    ids, more = random_ids(40), random_ids(7, seed=2)
    session = llm.session()
    first = session.generate(ids, max_tokens=6, ignore_eos=True).token_ids
    second = session.generate(more, max_tokens=6, ignore_eos=True).token_ids
    assert second == llm.generate(ids + first + more, max_tokens=6, ignore_eos=True).token_ids


def test_end_of_text_stops_and_can_be_ignored(directory: Path) -> None:
    llm = minirea.load(directory, **SCOPE)
    ids = random_ids(40)
    free = llm.generate(ids, max_tokens=8, ignore_eos=True)
    assert (free.finish_reason, len(free.token_ids)) == ("length", 8)
    eos = free.token_ids[3]
    llm.model.config = type(llm.model.config)(**vars(llm.model.config) | {"eos_token_ids": frozenset({eos})})
    stopped = llm.generate(ids, max_tokens=8)
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(eos) + 1]
    assert llm.generate(ids, max_tokens=8, ignore_eos=True).token_ids == free.token_ids


def test_stats_count_what_was_done(llm: minirea.LLM) -> None:
    stats = llm.generate(random_ids(100), max_tokens=5, ignore_eos=True).stats
    assert (stats.prompt_tokens, stats.generated_tokens) == (100, 5)
    scope = stats.scope  # the last decode step feeds the fourth token
    assert (scope["global"], scope["local"], scope["seq_len"]) == (4, 24, 104)
    assert 0 < scope["selected"] <= SCOPE["max_spans"] * SCOPE["span_size"]
    assert stats.cache_bytes == (105 * 2 + 28) * 2 * 2 * 16 * 4  # (k, v, dense k) x layers x G x D x float32
    assert stats.weight_bytes == sum(p.nbytes for p in tiny_model().parameters())


def test_scope_before_anything_is_selected(llm: minirea.LLM) -> None:
    assert llm.generate(random_ids(10), max_tokens=1).stats.scope == {
        "global": 0,
        "selected": 0,
        "local": 10,
        "seq_len": 10,
    }


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "the prompt is empty"), ("", "the prompt is empty"), ([3, TINY["vocab_size"]], "token id 97"), ([-1], "-1")],
)
def test_unusable_prompts(llm: minirea.LLM, prompt: str | list[int], message: str) -> None:
    with pytest.raises(minirea.InputError, match=message):
        llm.generate(prompt)


def test_ids_may_be_any_integers(llm: minirea.LLM) -> None:
    ids = random_ids(20)
    expected = llm.generate(ids, max_tokens=3).token_ids
    for prompt in (torch.tensor(ids), torch.tensor(ids).numpy(), tuple(ids)):
        assert llm.generate(prompt, max_tokens=3).token_ids == expected
    with pytest.raises(minirea.InputError, match=r"token id 1\.5"):
        llm.generate([3, 1.5])  # type: ignore[list-item]


def test_unknown_options_are_named(llm: minirea.LLM) -> None:
    with pytest.raises(minirea.InputError, match="unknown option 'max_token'"):
        llm.generate([3], max_token=5)
    with pytest.raises(minirea.InputError, match="wrong type"):
        llm.generate([3], temperature="hot")


def test_logits_that_are_not_finite_are_reported(directory: Path) -> None:
    llm = minirea.load(directory, **SCOPE)
    with torch.inference_mode():
        llm.model.norm.fill_(float("inf"))
    with pytest.raises(minirea.InputError, match="not finite after 3 tokens"):
        llm.generate([3, 4, 5])


@settings(max_examples=200)
@given(
    parts=st.lists(st.text("ab.", max_size=4), max_size=12),
    stops=st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_cut_where_the_first_one_appears(parts: list[str], stops: list[str]) -> None:
    """Fed piece by piece, the text ends before the first stop string that completes."""
    matcher = StopStrings(tuple(stops))
    out = ""
    fed = ""
    for part in parts:
        out += matcher.put(part)
        fed += part
        if matcher.found:
            break
    out += matcher.flush()
    hits = [fed.find(stop) for stop in stops if stop in fed]
    assert matcher.found == bool(hits)
    assert out == fed[: min(hits, default=len(fed))]
