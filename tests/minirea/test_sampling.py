"""Filters against transformers' own, and the draw's reproducibility."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirea.errors import InputError
from minirea.sampling import NON_FINITE, Sampler, SamplingConfig, keep_likely

CPU = torch.device("cpu")


def sampler(context: list[int] | None = None, vocab_size: int = 50, **fields: float) -> Sampler:
    return Sampler(SamplingConfig(**fields), context or [], vocab_size, CPU)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 0.9),
    temperature=st.floats(0.2, 3.0),
)
def test_filters_are_those_of_transformers(
    seed: int, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits_V = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 3
    expected = TemperatureLogitsWarper(temperature)(None, logits_V[None])
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = MinPLogitsWarper(min_p)(None, expected)
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    got = keep_likely((logits_V / temperature).softmax(-1), config)
    torch.testing.assert_close(got / got.sum(), expected[0].softmax(-1), atol=1e-6, rtol=1e-5)


def test_repetition_penalty_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits_V = torch.randn(50)
    context = [3, 3, 7, 41]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([context]), logits_V[None].clone())[0]
    torch.testing.assert_close(sampler(context, repetition_penalty=1.7)._penalise(logits_V).float(), expected)


def test_penalty_counts_generated_tokens() -> None:
    logits_V = torch.zeros(50)
    logits_V[8], logits_V[9] = 1.0, 0.9
    draw = sampler(repetition_penalty=2.0)
    assert [int(draw(logits_V)) for _ in range(3)] == [8, 9, 8]


def test_greedy_takes_the_best() -> None:
    logits_V = torch.randn(50)
    assert int(sampler(top_k=3, top_p=0.1)(logits_V)) == int(logits_V.argmax())


def test_same_seed_same_tokens() -> None:
    logits_V = torch.randn(50)
    draws = [[int(draw(logits_V)) for _ in range(40)] for draw in (sampler(temperature=1.0, seed=s) for s in (5, 5, 6))]
    assert draws[0] == draws[1] != draws[2]


def test_frequencies_follow_the_distribution() -> None:
    logits_V = torch.tensor([0.7, 0.2, 0.1]).log()
    draw = sampler(vocab_size=3, temperature=1.0, seed=0)
    counts = torch.bincount(torch.tensor([int(draw(logits_V)) for _ in range(4000)]), minlength=3) / 4000
    torch.testing.assert_close(counts, torch.tensor([0.7, 0.2, 0.1]), atol=0.03, rtol=0)


@pytest.mark.parametrize("small", [5e-324, 1e-320, 1e-300, 1e-40, 1e-39, 1e-38, 1e-20, 1e-6])
def test_small_values_have_the_right_limit(small: float) -> None:
    """The best token, not the first one; and of tokens that were seen, the best among them."""
    logits_V = torch.tensor([-3.0, 1.0, 5.0, 4.0, -40.0])
    assert int(sampler(temperature=small, vocab_size=5)(logits_V)) == 2
    assert int(sampler(temperature=small, vocab_size=5)(logits_V - 50)) == 2
    assert int(sampler(temperature=1.0, top_p=small, vocab_size=5)(logits_V)) == 2
    for temperature in (0.0, small, 1.0):
        assert int(sampler([1, 3], temperature=temperature, repetition_penalty=small, vocab_size=5)(logits_V)) == 3
        draws = sampler([2, 3, 4], temperature=temperature, repetition_penalty=1 / max(small, 1e-300), vocab_size=5)
        # the seen tokens' logits become 0, 0 and -inf: only the last of them can never be drawn
        assert int(draws(logits_V)) in ((1,) if temperature < 1 else (0, 1, 2, 3))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_unusable_logits_are_marked(bad: float, temperature: float) -> None:
    logits_V = torch.randn(50)
    logits_V[11] = bad
    assert int(sampler(temperature=temperature)(logits_V)) == NON_FINITE


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("seed", -1),
    ],
)
def test_values_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"^{field} is "):
        SamplingConfig(**{field: value})  # type: ignore[arg-type]
