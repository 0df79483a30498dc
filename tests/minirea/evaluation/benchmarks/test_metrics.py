"""Metrics against examples worked out by hand, and against what must hold for any text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minirea.errors import InputError
from minirea.evaluation.benchmarks import metrics

TEXTS = st.text(alphabet="abcdeA .,:\n12北京大学。", max_size=40)
TWO_TEXTS = [
    metrics.qa_f1,
    metrics.qa_f1_zh_words,
    metrics.qa_f1_zh_characters,
    metrics.rouge_l_union,
    metrics.rouge_l_union_zh,
    metrics.rouge_l,
    metrics.rouge_l_sum,
    metrics.number_share,
    metrics.code_similarity,
    metrics.first_number,
    metrics.has_word,
    metrics.has_words_upper,
    metrics.single_choice,
    metrics.multiple_choice,
    metrics.math_answer,
    metrics.holds_reference,
    metrics.code_output,
    metrics.judgement,
]


# --- F1 ---
def test_f1_counts_a_token_as_often_as_it_occurs() -> None:
    # 2 in common of 3 and 4: precision 2/3, recall 1/2, harmonic mean 4/7
    assert metrics.token_f1(["x", "x", "y"], ["x", "x", "z", "z"]) == pytest.approx(4 / 7)


def test_f1_does_not_count_case_punctuation_and_articles() -> None:
    assert metrics.qa_f1("The Eiffel-Tower, in Paris!", "a eiffeltower in paris") == 1
    assert metrics.qa_f1("in Paris, France", "Paris") == pytest.approx(0.5)
    assert metrics.qa_f1("theatre", "atre") == 0  # only whole words are articles


def test_f1_of_chinese_words() -> None:
    # 我 来到 北京 清华大学, against 清华大学 alone: 1 in common of 4 and 1
    assert metrics.qa_f1_zh_words("我来到北京\uff0c清华大学。", "清华大学") == pytest.approx(2 / 5)


def test_f1_of_chinese_characters() -> None:
    assert metrics.qa_f1_zh_characters("清华。", "清华大学") == pytest.approx(2 / 3)
    assert metrics.qa_f1_zh_characters("《", "《") == 1  # the one bracket that the benchmarks do not remove
    assert metrics.qa_f1_zh_characters("》", "》") == 0


@given(st.lists(st.sampled_from("abc"), max_size=8), st.lists(st.sampled_from("abc"), max_size=8))
def test_f1_is_symmetric(answer: list[str], reference: list[str]) -> None:
    assert metrics.token_f1(answer, reference) == metrics.token_f1(reference, answer)


# --- ROUGE ---
def test_rouge_l_is_the_longest_common_subsequence() -> None:
    # "a c" is common: 2 of 3 and 2 of 2
    assert metrics.rouge_l("x b y", "x y") == pytest.approx(4 / 5)
    assert metrics.rouge_l("y x", "x y") == pytest.approx(1 / 2)


def test_rouge_l_sum_takes_lines_for_sentences() -> None:
    # 3 of 4 words are in common, line by line in whatever order the lines are
    assert metrics.rouge_l_sum("c d\na b", "a b\nc e") == pytest.approx(3 / 4)
    assert metrics.rouge_l("c d\na b", "a b\nc e") == pytest.approx(2 / 4)


def test_rouge_l_union_counts_different_words_once() -> None:
    # answer {x, y}, reference {x, y, z}; the union of what is common has 2 words: 2/2 and 2/3
    assert metrics.rouge_l_union("x x y. y", "x y z") == pytest.approx(4 / 5)


def test_rouge_l_union_of_long_sentences() -> None:
    assert metrics.rouge_l_union("w " * 700, "v " * 700 + "w") == pytest.approx(2 / 3)


def test_rouge_l_union_of_chinese_words() -> None:
    assert metrics.rouge_l_union_zh("我来到北京清华大学", "清华大学") == pytest.approx(2 / 5)


@pytest.mark.parametrize("empty", ["", " ", ".", " . "])
def test_rouge_of_nothing_is_0(empty: str) -> None:
    for metric in (metrics.rouge_l, metrics.rouge_l_sum, metrics.rouge_l_union, metrics.rouge_l_union_zh):
        assert metric(empty, "a word") == metric("a word", empty) == 0


@pytest.mark.parametrize("text", ["one two three", "A first. A second.", "line\nline two"])
def test_rouge_of_a_text_with_itself_is_1(text: str) -> None:
    for metric in (metrics.rouge_l, metrics.rouge_l_sum, metrics.rouge_l_union):
        assert metric(text, text) == pytest.approx(1)


# --- labels, numbers and code ---
def test_number_share() -> None:
    assert metrics.number_share("Paragraph 3 or 4, no: 3", "Paragraph 3") == pytest.approx(2 / 3)
    assert metrics.number_share("33", "3") == 0
    assert metrics.number_share("none", "3") == 0


def test_classification_shares_the_point_among_the_classes_named() -> None:
    classes = ["City", "State", "Other location", "location"]
    assert metrics.classification("City", "City", classes) == 1
    assert metrics.classification("City or State", "City", classes) == pytest.approx(1 / 2)
    assert metrics.classification("Other location", "Other location", classes) == 1  # "location" is a part of it
    assert metrics.classification("Other location", "location", classes) == pytest.approx(1 / 2)
    assert metrics.classification("none of them", "City", classes) == 0


def test_code_similarity_compares_the_first_line_of_code() -> None:
    assert metrics.code_similarity("\n```python\n# a comment\nreturn x\nmore", "return x") == 1
    # 3 of 4 characters match on either side: 2 * 3 / 8
    assert metrics.code_similarity("abcd", "abce") == pytest.approx(0.75)
    assert metrics.code_similarity("", "x") == 0


@pytest.mark.parametrize(
    ("metric", "answer", "reference", "score"),
    [
        (metrics.first_number, "is 71432. 5", "71432", 1),
        (metrics.first_number, "1 71432", "71432", 0),
        (metrics.first_number, "071432", "71432", 0),  # a pass key is text
        (metrics.first_value, "about 3.50", "3.5", 1),
        (metrics.first_value, "3", "3.5", 0),
        (metrics.first_value, "9" * 5000, "3", 0),
        (metrics.last_value, "it returns `-12`.", "-12", 1),
        (metrics.last_value, "-12 it is", "-12", 0),
        (metrics.last_value, "9" * 5000, "9", 0),
        (metrics.has_word, '{"key": "a-b-c"}', "a-b-c", 1),
        (metrics.has_word, "xa-b-c", "a-b-c", 0),
        (metrics.has_words_upper, "It is Jane.", "JANE", 1),
        (metrics.has_words_upper, "It is old Mr. Jones, I think", "MR. JONES", 1),
        (metrics.has_words_upper, "It is Mr. Smith or Jones", "MR. JONES", 0),
        (metrics.has_words_upper, "Mr.", "MR. JONES", 0),
        (metrics.has_words_upper, "Anything", "...", 0),
        (metrics.leading_values, "[1, 3, 9, 8]", "1 3 7 8", 0.5),
        (metrics.leading_values, "", "1 3", 0),
        (metrics.single_choice, "the answer is B", "B.", 1),
        (metrics.single_choice, "no letter", "A", 0),
        (metrics.multiple_choice, "ACD", "ACD", 1),
        (metrics.multiple_choice, "CA", "ACD", 0.25),
        (metrics.multiple_choice, "C", "ACD", 0.25),
        (metrics.multiple_choice, "AB", "ACD", 0),
        (metrics.multiple_choice, "none", "AC", 0),
        (metrics.multiple_choice, "right are A. and C) too", "AC", 1),
        (metrics.math_answer, "so 3 and 4. The answer is $1,200.50", "... The answer is 1200", 1),
        (metrics.math_answer, "it costs 7\n\nQuestion: 8", "The answer is 7", 1),
        (metrics.math_answer, "no idea", "The answer is 7", 0),
        (metrics.holds_reference, "The benefits of  Volunteering.\nmore", "the benefits of volunteering", 1),
        (metrics.holds_reference, "other\nthe benefits", "the benefits", 0),
        (metrics.code_output, "the output of the code is [1, 2]", "[1, 2]", 1),
        (metrics.code_output, "[1, 2] and a great many words that come after it", "[1, 2]", 0),
        (metrics.judgement, "It is false, not true", "False", 1),
        (metrics.judgement, "maybe", "True", 0),
    ],
)
def test_examples(metric: metrics.Metric, answer: str, reference: str, score: float) -> None:
    assert metric(answer, reference) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("B", 1),
        (" B. a cat", 1),
        ("C", 0),
        ("a cat", 1),
        ("the answer is: B", 1),
        ("the answer is: C, B", 0),
        ("so I say B indeed", 1),
        ("", 0),
        ("the answer is:", 0),
        ("it", 0),
    ],
)
def test_named_choice(answer: str, score: float) -> None:
    assert metrics.named_choice(answer, "B", "a cat") == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (" B. f", 1),
        ("B: f", 1),
        ("C.", 0),
        ("the answer is: f.run", 1),
        ("answer: Option B", 1),
        ("is: C", 0),
        ("B", 0),
    ],
)
def test_named_function(answer: str, score: float) -> None:
    assert metrics.named_function(answer, "B", "f.run") == score


# --- any text ---
@pytest.mark.parametrize("metric", TWO_TEXTS, ids=lambda metric: metric.__name__)
@given(answer=TEXTS, reference=TEXTS)
@settings(max_examples=40, deadline=None)
def test_every_score_is_between_0_and_1(metric: metrics.Metric, answer: str, reference: str) -> None:
    assert 0 <= metric(answer, reference) <= 1


def test_best_takes_the_best_reference() -> None:
    assert metrics.best(metrics.qa_f1, "in Paris", ("Rome", "Paris", "in Paris")) == 1
    assert metrics.best(metrics.qa_f1, "in Paris", ()) == 0


def test_a_missing_package_is_one_line() -> None:
    with pytest.raises(InputError, match=r"'no_such_rouge' is not installed.*pip install 'minirea\[eval\]'$"):
        metrics.check_packages("no_such_rouge")
