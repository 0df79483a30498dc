"""tools/needle.py: its haystacks hold what they should, and the shipped model finds it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import demo_text
import needle
import pytest

import minirea

DEMO = Path(needle.__file__).parent.parent / "weights" / "demo"


@pytest.fixture(scope="module")
def llm() -> minirea.LLM:
    return minirea.load(DEMO, device="cpu")


@pytest.fixture(scope="module")
def field(llm: minirea.LLM) -> needle.Field:
    return needle.Field(demo_text.generate_text(seed=3, min_chars=40_000), llm.tokenizer)


def test_haystack_fills_its_length_and_hides_every_needle_once(llm: minirea.LLM, field: needle.Field) -> None:
    for seed in range(5):
        haystack = field.haystack(random.Random(seed), 4096, 8)
        text = llm.tokenizer.decode(haystack.ids)
        question = llm.tokenizer.encode(needle.QUESTION.format(key=haystack.needles[0].key), add_special_tokens=False)
        assert 3900 < len(haystack.ids) + len(question) + needle.ANSWER_TOKENS <= 4096
        assert len({of.key for of in haystack.needles}) == 8
        for index, of in enumerate(haystack.needles):
            assert text.count(needle.NEEDLE.format(key=of.key, value=of.value)) == 1
            assert index / 8 <= of.depth + 0.01 < (index + 1) / 8 + 0.02


def test_text_that_is_too_short_is_refused(field: needle.Field) -> None:
    with pytest.raises(needle.InputError, match="expected at least"):
        field.haystack(random.Random(0), 10**6, 1)


@pytest.mark.parametrize(
    ("answer", "correct"),
    [
        (" 123456.", True),
        ("123456", True),
        (" 1234567.", False),
        (" 12345.", False),
        (" is 123456", False),
        ("", False),
    ],
)
def test_is_correct_wants_exactly_the_number(answer: str, correct: bool) -> None:
    assert needle.is_correct(answer, "123456") is correct


def test_shipped_model_finds_needles_beyond_its_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    flags = ["--lengths", "3K", "--haystacks", "1", "--needles", "4", "--device", "cpu", "--quiet", "--json", str(path)]
    assert needle.main(["--attention", "reattention", "streaming", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["attention", "3K"]
    assert lines[1].split() == ["reattention", "4/4"]
    answers = json.loads(path.read_text())["answers"]
    assert len(answers) == 8
    assert [answer["key"] for answer in answers[:4]] == [answer["key"] for answer in answers[4:]]
    lost = [answer for answer in answers[4:] if 0.1 < answer["depth"] < 0.5]
    assert lost
    assert not any(answer["correct"] for answer in lost)


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert needle.main(["--text", "nowhere.txt", "--quiet"]) == 1
    assert capsys.readouterr().err == "needle: error: --text nowhere.txt: no such file\n"


def test_lengths_are_read_with_their_unit() -> None:
    assert [needle.parse_length(text) for text in ("300", "4K", "64k")] == [300, 4096, 65536]
    for text in ("0", "4M", "-1", ""):
        with pytest.raises(needle.argparse.ArgumentTypeError):
            needle.parse_length(text)
