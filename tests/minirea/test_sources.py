"""Where an answer came from: votes, passages, ranges that can be cited."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from testing import random_ids, tiny_model, write_checkpoint, write_tokenizer

import minirea
from minirea.errors import InputError
from minirea.sources import SPAN, Votes, line_of, passages, question_start, token_texts

DEMO = Path(__file__).parents[2] / "weights" / "demo"
SCOPE = {"global_size": 4, "local_size": 32, "span_top_k": 2, "span_size": 8, "max_spans": 6, "dense_size": 36}


@pytest.fixture(scope="module")
def demo() -> minirea.LLM:
    return minirea.load(DEMO, device="cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> minirea.LLM:
    directory = write_checkpoint(tmp_path_factory.mktemp("tiny"), tiny_model())
    write_tokenizer(directory)
    return minirea.load(directory, device="cpu", **SCOPE)


def needle_prompt(needles: dict[str, int], at: int, question: str = "green-river") -> str:
    """A haystack of the demo model's kind with needles, of which one is asked for."""
    text = (DEMO / "prompts" / "needle-16k.txt").read_text().split("\nQuestion")[0]
    sentences = text.split(". ")[:150]
    for key, value in needles.items():
        sentences.insert(at, f"The special magic number for {key} is {value}")
        at += 40
    asked = f"What is the special magic number for {question}? Answer: The special magic number for {question} is"
    return ". ".join(sentences) + f".\nQuestion: {asked}"


def votes_at(weights: dict[int, float], stop: int = 10_000) -> Votes:
    position = torch.tensor(list(weights))
    zero = torch.zeros_like(position)
    return Votes(zero, zero, position, torch.tensor(list(weights.values())), stop)


@pytest.mark.parametrize("at", [10, 60, 105])
def test_a_needle_is_the_first_source_and_can_be_cited(demo: minirea.LLM, at: int) -> None:
    prompt = needle_prompt({"green-river": 381920, "blue-mountain": 557043}, at)
    session = demo.session()
    out = session.generate(prompt, 12, stop=["\n"], sources=4)
    assert out.text.strip() == "381920."
    best = out.sources[0]
    assert best.text == "The special magic number for green-river is 381920."
    assert best.share > 0.5
    assert best.share >= out.sources[-1].share > 0
    assert sum(source.share for source in out.sources) <= 1 + 1e-6
    decoded = demo.tokenizer.decode(session.ids[best.start : best.end])
    assert decoded.strip() == best.text
    taken = [j for start, end, *_ in out.sources for j in range(start, end)]
    assert len(taken) == len(set(taken))
    lines = prompt.split("\n")
    for source in out.sources:
        line = line_of(prompt, session.ids, source, demo.tokenizer)
        assert line is not None
        assert "\n".join(lines[line - 1 :]).find(source.text) <= len(lines[line - 1])
        assert source.text in prompt


@pytest.mark.parametrize("attention", ["full", "streaming", "reattention"])
def test_every_mode_has_sources_of_what_it_sees(demo: minirea.LLM, attention: str) -> None:
    """A prompt within dense_size: each mode attends to all of it, so each says the same."""
    prompt = (DEMO / "prompts" / "two-needles.txt").read_text()
    out = demo.with_attention(attention).generate(prompt, 12, stop=["\n"], sources=3)
    assert out.sources[0].text == "The special magic number for green-river is 381920."


def test_streaming_has_no_sources_in_what_it_does_not_see(demo: minirea.LLM) -> None:
    prompt = needle_prompt({"green-river": 381920}, 70)
    session = demo.with_attention("streaming").session()
    out = session.generate(prompt, 4, sources=5)
    unseen = range(32, len(session.ids) - 1024 - 4 - 33)
    assert not any(source.start in unseen for source in out.sources)


def test_sources_of_a_session_leave_it_as_it_was(demo: minirea.LLM) -> None:
    prompt = needle_prompt({"green-river": 381920, "blue-mountain": 557043}, 50)
    book, question = prompt.split("\nQuestion")
    session = demo.session()
    session.prefill(book)
    read = len(session.ids)
    with pytest.raises(InputError, match="generate first"):
        session.sources()
    for key, value in (("green-river", "381920"), ("blue-mountain", "557043")):
        out = session.generate(f"\nQuestion{question}".replace("green-river", key), 12, stop=["\n"], sources=2)
        assert out.sources[0].text == f"The special magic number for {key} is {value}."
        assert out.sources[0].end <= read
        cached, tensors = session.cache.seq_len, [tensor.clone() for tensor in session.cache.tensors]
        assert session.sources(2) == out.sources
        assert session.cache.seq_len == cached
        for tensor, before in zip(session.cache.tensors, tensors, strict=True):
            assert torch.equal(tensor[..., :cached, :], before[..., :cached, :])
        session.rewind(read)
        with pytest.raises(InputError, match="generate first"):
            session.sources()


@pytest.mark.parametrize("attention", ["full", "streaming", "reattention"])
@pytest.mark.parametrize("fields", [{}, {"span_scope": "kv_head"}, {"vote_window": 6, "carry_votes": True}])
def test_looking_changes_no_later_token(tiny: minirea.LLM, attention: str, fields: dict[str, Any]) -> None:
    """Nor the winners that vote with later ones, to the bit."""
    llm, ids = tiny.with_attention(attention, **SCOPE | fields), random_ids(150)
    session, other = llm.session(), llm.session()
    for _ in range(2):
        out = session.generate(ids, 12, ignore_eos=True, sources=3)
        assert out.token_ids == other.generate(ids, 12, ignore_eos=True).token_ids
        assert all(0 <= s.start < s.end <= len(session.ids) - 12 - 32 for s in out.sources)
        assert torch.equal(session.cache.winners, other.cache.winners)
    assert session.ids == other.ids


def test_what_is_no_source() -> None:
    assert question_start(0, 1000) == 968
    assert question_start(0, 40) == 30
    assert question_start(900, 920) == 900
    assert question_start(900, 990) == 958


def test_prompts_too_short_to_have_sources(tiny: minirea.LLM) -> None:
    for length in range(1, 6):
        out = tiny.generate(random_ids(length), 3, ignore_eos=True, sources=4)
        assert all(source.end <= length for source in out.sources)
    assert tiny.generate([5], 1, sources=4).sources == []


@pytest.mark.parametrize("sources", [-1, 1.5, True, "3"])
def test_a_number_of_sources_is_an_integer(tiny: minirea.LLM, sources: object) -> None:
    with pytest.raises(InputError, match="sources is "):
        tiny.generate([5, 6], 1, sources=sources)


def test_passages_are_apart_and_best_first() -> None:
    weights = {100: 1.0, 104: 2.0, 3000: 4.0, 3001: 4.0, 7000: 0.5, 9000: 1e-4}
    found = passages(votes_at(weights), 10)
    assert [(start, end) for start, end, _ in found] == [(3000, 3002), (100, 105), (7000, 7001)]
    assert [share for *_, share in found] == pytest.approx([8 / 11.5, 3 / 11.5, 0.5 / 11.5], abs=1e-4)
    assert passages(votes_at(weights), 1) == found[:1]
    assert passages(votes_at({}), 3) == passages(votes_at(weights), 0) == []


@pytest.mark.parametrize("seed", range(20))
def test_passages_hold_what_was_voted_for(seed: int) -> None:
    rng = random.Random(seed)
    weights = {rng.randrange(600): rng.random() ** 4 for _ in range(200)}
    found = passages(votes_at(weights), rng.randrange(1, 30))
    total, taken = sum(weights.values()), set()
    for start, end, share in found:
        assert 0 < end - start <= 2 * SPAN
        assert not taken & set(range(start, end))
        taken |= set(range(start, end))
        inside = sum(weight for position, weight in weights.items() if start <= position < end)
        assert share == pytest.approx(inside / total, rel=0.5, abs=0.02)
    shares = [share for *_, share in found]
    assert shares == sorted(shares, reverse=True)


def test_tokens_put_together_are_the_text(demo: minirea.LLM) -> None:
    text = "A caf\u00e9 \u2014 \U0001f30a and more."
    assert "".join(token_texts(demo.tokenizer.encode(text, add_special_tokens=False), demo.tokenizer)) == text


def test_without_a_tokenizer_ranges_have_no_text(tmp_path: Path) -> None:
    llm = minirea.load(write_checkpoint(tmp_path, tiny_model()), device="cpu", **SCOPE)
    out = llm.generate(random_ids(150), 4, ignore_eos=True, sources=3)
    assert out.sources
    assert all(source.text == "" for source in out.sources)
