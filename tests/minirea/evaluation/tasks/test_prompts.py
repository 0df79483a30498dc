"""The prompts of the generated tasks: exact to the token, solvable, and the same whatever else is asked for."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minirea.errors import InputError
from minirea.evaluation.frame.cells import PromptCell, Question, sha256_of_ids
from minirea.evaluation.frame.records import Place
from minirea.evaluation.frame.tasks import make_task
from minirea.evaluation.registry import task_class
from minirea.evaluation.tasks.needle import NEEDLE, QUESTION, even_depths, first_is
from minirea.evaluation.tasks.ruler import KINDS, NEEDLE_KINDS, match_all, match_part, zeta_counts
from minirea.evaluation.tasks.synthetic import Function, NumberString, has_word, last_integer_is
from minirea.evaluation.text.encoder import Encoder
from minirea.evaluation.text.facts import WORDINGS
from minirea.tokenizer import Tokenizer, load_tokenizer

PROMPTS = {
    "needle": "93c6f53e42b3",
    "needle separate": "c9e2422697c8",
    "needle share": "20865346b4e2",
    "needle facts": "92386ee22303",
    "passkey": "dfbf2b512866",
    "kv": "2012f900b089",
    "number-string": "ce49d0133cdf",
    "code-run": "0425d2ba89cd",
    "ruler": "53703caef999",
}
DEMO = Path(__file__).parents[4] / "weights" / "demo"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(DEMO)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small files in the formats of SQuAD and HotpotQA."""
    folder = tmp_path_factory.mktemp("questions")

    def paragraph(town: str, bridges: int) -> dict[str, Any]:
        asked = {"question": f"How many bridges has {town}?", "answers": [{"text": f"{bridges} bridges"}]}
        nothing = {"question": f"Who is king of {town}?", "answers": [], "is_impossible": True}
        return {"context": f"The town of {town} has {bridges} bridges.", "qas": [asked, nothing]}

    articles = [
        {"paragraphs": [paragraph(f"{name}-{part}", 101 + 10 * i + j) for j, part in enumerate(("on-sea", "hill"))]}
        for i, name in enumerate(("Arn", "Bex", "Cob", "Dun"))
    ]
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    hops = [
        {
            "question": f"Where was the author of Book {i} born?",
            "answer": f"Town {i}",
            "context": [
                [f"Book {i}", [f"Book {i} is by Author {i}. ", "It is long."]],
                ["Weather", ["It rains."]],
                [f"Author {i}", [f"Author {i} was born in Town {i}."]],
            ],
            "supporting_facts": [[f"Book {i}", 0], [f"Author {i}", 0]],
        }
        for i in range(5)
    ]
    (folder / "hotpot.json").write_text(json.dumps(hops))
    return {"squad": folder / "squad.json", "hotpotqa": folder / "hotpot.json"}


def prompts(name: str, tokenizer: Tokenizer, **options: Any) -> Iterator[tuple[Place, list[int], Question]]:
    """Every place of a task with its whole prompt and its question."""
    for cell in make_task(task_class(name), options).cells(tokenizer):
        assert isinstance(cell, PromptCell)
        prompt = cell.build()
        for place, question in zip(cell.places, prompt.questions, strict=True):
            yield place, [*prompt.context, *question.context, *question.ids], question


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("needle", {"depths": 4}),
        ("needle", {"depths": 3, "share": 2, "keys": "numbers", "values": "words"}),
        ("needle", {"at": "0.1,0.9", "separate": True, "needles": 5, "keys": "uuids", "values": "uuids"}),
        ("passkey", {"depths": 3}),
        ("kv", {"depths": 4}),
        ("number-string", {"depths": 3}),
        ("code-run", {"calls": "1,3"}),
    ],
)
def test_prompt_and_answer_fill_the_length_to_the_token(
    tokenizer: Tokenizer, name: str, options: dict[str, Any]
) -> None:
    lengths = (1537, 2048)
    count = 0
    for place, ids, question in prompts(name, tokenizer, lengths=lengths, samples=2, **options):
        count += 1
        assert len(ids) + question.max_tokens == place["length"]
        assert ids[0] == tokenizer.bos_id
        assert tokenizer.bos_id not in ids[1:]
        assert all(question.score(f" {right}.") == 1 for right in question.expected)
        assert question.score(" no idea") == 0
    assert count == len(lengths) * 2 * {"needle": options.get("depths", 2), "code-run": 2}.get(
        name, options.get("depths")
    )


def test_one_needle_stands_in_each_copy_of_a_sample_s_text(tokenizer: Tokenizer) -> None:
    options = {"lengths": 4096, "samples": 2, "depths": 5, "separate": True}
    texts: dict[Any, set[str]] = {}
    keys, depths = set(), []
    for place, ids, question in prompts("needle", tokenizer, **options):
        text, key, (value,) = tokenizer.decode(ids), question.extra["key"], question.expected
        hidden = NEEDLE.format(key=key, value=value)
        assert text.count(hidden) == text.count(value) == 1
        assert text.count("The special magic number for") == 1 + 1
        assert abs(text.index(hidden) / len(text) - float(place["depth"])) < 0.06
        texts.setdefault(place["sample"], set()).add(text.split("\nQuestion")[0].replace(hidden, "")[:12000])
        keys.add(key)
        depths.append(place["depth"])
    assert [len(of) for of in texts.values()] == [1, 1]
    assert texts[0] != texts[1]
    assert len(keys) == 10
    assert depths == [1.0, 0.75, 0.5, 0.25, 0.0] * 2  # what one shares with the one before is longest so


@pytest.fixture
def chat_tokenizer(tmp_path: Path) -> Tokenizer:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, tmp_path)
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n{{ m.content }}\n--\n{% endfor %}[assistant]:"
    (tmp_path / "chat_template.jinja").write_text(template)
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize("options", [{}, {"separate": True}, {"facts": True}, {"facts": True, "separate": True}])
def test_a_chat_prompt_is_a_message_in_the_template(chat_tokenizer: Tokenizer, options: dict[str, Any]) -> None:
    for place, ids, question in prompts(
        "needle", chat_tokenizer, lengths=2000, samples=1, depths=3, chat=True, **options
    ):
        text = chat_tokenizer.decode(ids)
        assert text.startswith("[user]\n")
        assert re.search(r"\n\nQuestion about the text above: [A-Z].*\?\n--\n\[assistant\]:$", text)
        message = text.removeprefix("[user]\n").removesuffix("\n--\n[assistant]:")
        assert chat_tokenizer.encode_chat([{"role": "user", "content": message}])[:1] == ids[:1]
        assert ids[0] == chat_tokenizer.bos_id
        assert ids.count(chat_tokenizer.bos_id) == 1
        assert question.stop == ()
        assert place["length"] - 20 < len(ids) + question.max_tokens <= place["length"]
        assert question.score(f"It is {question.expected[0]}.") == 1


def test_a_chat_prompt_has_the_ids_that_the_tokenizer_gives_to_the_conversation(chat_tokenizer: Tokenizer) -> None:
    encode = Encoder(chat_tokenizer, chat=True)
    for content in ("One two three.", "1 + 1", "A line\nand another."):
        expected = chat_tokenizer.encode_chat([{"role": "user", "content": content}])
        assert [*encode.beginning, *encode(content), *encode.end] == expected


def test_without_a_chat_template_a_chat_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"^chat is on, but this model has no chat template"):
        make_task(task_class("needle"), {"chat": True}).cells(tokenizer)


def test_facts_are_told_and_asked_in_plain_words(tokenizer: Tokenizer) -> None:
    told = set()
    for place, ids, question in prompts("needle", tokenizer, lengths=3000, samples=4, depths=5, facts=True):
        text, key, (value,) = tokenizer.decode(ids), question.extra["key"], question.expected
        (wording,) = [w for w in WORDINGS if w.told.format(key=key, value=value) in text]
        assert text.endswith(f"\nQuestion: {wording.asked.format(key=key)} Answer:")
        assert abs(text.index(wording.told.format(key=key, value=value)) / len(text) - float(place["depth"])) < 0.1
        assert text.count(key) == 2
        assert question.score(f" {value.upper()}!") == 1
        assert question.score(f" un{value}") == question.score("") == 0
        told.add(wording)
    assert len(told) > 3
    assert all(len(set(w.values)) == len(w.values) >= 10 and "{key}" in w.asked for w in WORDINGS)


def test_prompts_are_what_they_were(tokenizer: Tokenizer) -> None:
    """A digest of every task's prompts and right answers: directories of results grow, so they must not change."""
    corpus = {"lengths": (1500, 2500), "samples": 2, "seed": 3}
    chosen: dict[str, dict[str, Any]] = {
        "needle": {"depths": 3},
        "needle separate": {"depths": 3, "separate": True, "needles": 2},
        "needle share": {"depths": 3, "share": 2, "keys": "numbers", "values": "words", "align": 256},
        "needle facts": {"depths": 3, "facts": True},
        "passkey": {"depths": 2},
        "kv": {"depths": 2},
        "number-string": {"depths": 2},
        "code-run": {"calls": (1, 3)},
        "ruler": {},
    }
    found = {}
    for name, options in chosen.items():
        told = [
            (sha256_of_ids(ids), q.expected) for _, ids, q in prompts(name.split()[0], tokenizer, **corpus, **options)
        ]
        found[name] = hashlib.sha256(repr(told).encode()).hexdigest()[:12]
    assert found == PROMPTS


def test_every_needle_stands_once_at_its_depth_and_is_asked_for_in_its_own_words(tokenizer: Tokenizer) -> None:
    for place, ids, question in prompts("needle", tokenizer, lengths=4096, samples=2, depths=6):
        text, key, (value,) = tokenizer.decode(ids), question.extra["key"], question.expected
        hidden = NEEDLE.format(key=key, value=value)
        assert text.count(hidden) == text.count(value) == 1
        assert text.count(key) == 3  # the needle, and twice in the question
        assert text.endswith(QUESTION.format(key=key))
        assert text.count("The special magic number for") == 6 + 1
        assert abs(text.index(hidden) / len(text) - float(place["depth"])) < 0.06


def test_shared_haystack_holds_the_needles_of_all_its_samples(tokenizer: Tokenizer) -> None:
    asked = list(prompts("needle", tokenizer, lengths=4096, samples=4, depths=3, share=2))
    contexts = {int(place["sample"]): tokenizer.decode(ids).split("\nQuestion")[0] for place, ids, _ in asked}
    assert contexts[0] == contexts[1] != contexts[2] == contexts[3]
    for place, _, question in asked:
        assert contexts[int(place["sample"])].count(question.expected[0]) == 1
    assert contexts[0].count("special magic number") == 6


def test_aligned_haystack_ends_on_a_whole_step(tokenizer: Tokenizer) -> None:
    task = make_task(task_class("needle"), {"lengths": "1500,2k", "samples": 2, "depths": 2, "align": 256})
    for cell in task.cells(tokenizer):
        assert isinstance(cell, PromptCell)
        prompt = cell.build()
        assert len(prompt.context) % 256 == 0
        for question in prompt.questions:
            left = cell.tokens - len(prompt.context) - len(question.ids) - question.max_tokens
            assert 0 <= left < 256


@pytest.mark.parametrize("share", [1, 2])
def test_more_lengths_and_samples_change_no_prompt(tokenizer: Tokenizer, share: int) -> None:
    few = {str(p): ids for p, ids, _ in prompts("needle", tokenizer, lengths="1k", samples=1, depths=2, share=share)}
    many = {
        str(p): ids for p, ids, _ in prompts("needle", tokenizer, lengths="1k,3k", samples=3, depths=2, share=share)
    }
    assert few.items() <= many.items()
    other = {str(p): ids for p, ids, _ in prompts("needle", tokenizer, lengths="1k", samples=1, depths=2, seed=1)}
    assert not set(map(tuple, few.values())) & set(map(tuple, other.values()))


def test_user_chooses_wording_and_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    words = ["".join(random.Random(i).choices("abcdefgh", k=6)) for i in range(150)]
    (tmp_path / "mine.txt").write_text(". ".join(" ".join(words[i : i + 5]) for i in range(0, 150, 5)) + ".")
    options = {
        "needle": " {key} weighs {value} kg.",
        "question": "\nHow heavy is {key}?",
        "haystack": [tmp_path / "mine.txt"],
    }
    for _, ids, question in prompts("needle", tokenizer, lengths="1k", samples=1, depths=2, **options):
        text = tokenizer.decode(ids)
        assert f". {question.extra['key']} weighs {question.expected[0]} kg." in text or text.startswith(" ")
        assert text.endswith(f"\nHow heavy is {question.extra['key']}?")
        assert set(re.findall(r"\b[a-h]{6}\b", text)) <= set(words)


def test_passkey_hides_the_number_twice_in_one_place(tokenizer: Tokenizer) -> None:
    for place, ids, question in prompts("passkey", tokenizer, lengths=1500, samples=1, depths=3):
        text, value = tokenizer.decode(ids), question.expected[0]
        assert text.count(value) == 2
        assert abs(text.index(value) / len(text) - float(place["depth"])) < 0.1
        assert re.fullmatch(r"\d{5}", value)


def test_number_strings_repeat_digits() -> None:
    task = NumberString()
    values = [task.value(random.Random(seed)) for seed in range(50)]
    assert all(re.fullmatch(r"[1-9]\d{9}", value) for value in values)
    assert sum(bool(re.search(r"(\d)\1", value)) for value in values) > 45
    assert not any(re.search(r"(\d)\1{4}", value) for value in values)


def test_kv_is_json_with_the_asked_pairs_from_first_to_last(tokenizer: Tokenizer) -> None:
    asked = list(prompts("kv", tokenizer, lengths=3000, samples=1, depths=5))
    for index, (_, ids, question) in enumerate(asked):
        text = tokenizer.decode(ids)
        pairs = json.loads(text[text.index("{") : text.index("}") + 1])
        assert pairs[question.extra["key"]] == question.expected[0]
        assert list(pairs).index(question.extra["key"]) == round(index / 4 * (len(pairs) - 1))
        assert text.endswith(f'Key: "{question.extra["key"]}"\nThe value of this key is: "')
        assert text.count(question.expected[0]) == 1


def test_code_runs_to_the_expected_result(tokenizer: Tokenizer) -> None:
    for place, ids, question in prompts("code-run", tokenizer, lengths=2500, samples=2, calls="1,2,5"):
        text = tokenizer.decode(ids)
        source = text[text.index("\ndef") : text.index("\nWhat does")]
        namespace: dict[str, Any] = {}
        exec(source, namespace)
        call = re.search(r"What does (func_\d+)\((\d)\)", text)
        assert call is not None
        assert str(namespace[call[1]](int(call[2]))) == question.expected[0]
        calls, name = 1, call[1]
        while inner := re.search(rf"def {name}\(x\):\n    return (func_\d+)", source):
            calls, name = calls + 1, inner[1]
        assert f"{calls} calls" == place["kind"]
        assert len(set(re.findall(r"def (\w+)", source))) == source.count("def ")


# ---------------------------------------------------------------------------------------------------------------
# RULER
# ---------------------------------------------------------------------------------------------------------------
def test_ruler_prompts_fill_the_length_to_the_token(tokenizer: Tokenizer, files: dict[str, Path]) -> None:
    seen = Counter()
    for place, ids, question in prompts("ruler", tokenizer, lengths="2047,3k", samples=2, **files):
        seen[place["kind"]] += 1
        assert len(ids) + question.max_tokens == place["length"], place
        assert question.score(", ".join(question.expected)) == 1
        assert question.score("nothing of the kind") == 0
        assert ids[0] == tokenizer.bos_id
    assert seen == dict.fromkeys(KINDS, 4)


@pytest.mark.parametrize("kind", NEEDLE_KINDS)
def test_ruler_needles_are_each_there_once(tokenizer: Tokenizer, kind: str) -> None:
    how = NEEDLE_KINDS[kind]
    for _, ids, question in prompts("ruler", tokenizer, lengths=3000, samples=3, kinds=kind):
        text, asked = tokenizer.decode(ids).split("\nQuestion: ")
        assert len(question.expected) == how.asked * how.values_each
        pairs = re.findall(r"special magic (number|uuid) for (\S+) is (\S+)\.", text)
        for value in question.expected:
            assert text.count(value) == 1
            key = next(k for _, k, v in pairs if v == value)
            assert key in asked
            assert sum(k == key for _, k, _ in pairs) == how.values_each
        if how.haystack == "needles":
            assert len(pairs) > 30
        else:
            assert len(pairs) == how.hidden * how.values_each


def test_variables_can_be_tracked_to_the_expected_ones(tokenizer: Tokenizer) -> None:
    for _, ids, question in prompts("ruler", tokenizer, lengths=1500, samples=3, kinds="vt"):
        text = tokenizer.decode(ids)
        asked = re.findall(r"Which variables have the value (\d+)\?", text)[-1]
        values: dict[str, str] = {}
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text):
            values[name] = values.get(source, source)
        assert [name for name, value in values.items() if value == asked] == question.expected
        assert len(question.expected) == 5


def test_common_words_are_the_most_common(tokenizer: Tokenizer) -> None:
    for place, ids, question in prompts("ruler", tokenizer, lengths="2k,8k", samples=2, kinds="cwe"):
        text = tokenizer.decode(ids)
        listed = re.findall(r"\d+\. (\w+)", text[text.rindex("A numbered list") :])
        counts = Counter(listed)
        assert {word for word, _ in counts.most_common(10)} == set(question.expected)
        frequencies = set(counts.values())
        assert frequencies == ({30, 3} if place["length"] == 8192 else {10, 1})
        numbers = [int(n) for n in re.findall(r"(\d+)\. ", text[text.rindex("A numbered list") :])]
        assert numbers == list(range(1, len(listed) + 1))


def test_frequent_words_follow_the_zeta_distribution(tokenizer: Tokenizer) -> None:
    for _, ids, question in prompts("ruler", tokenizer, lengths=4096, samples=2, kinds="fwe"):
        text = tokenizer.decode(ids)
        coded = text[text.index("occurs.\n") + 8 : text.index("\nQuestion")].split()
        counts = Counter(coded).most_common()
        assert counts[0][0] == "..."
        assert [word for word, _ in counts[1:4]] == question.expected
        assert counts[1][1] / counts[0][1] == pytest.approx(1 / 4, rel=0.05)
        assert counts[3][1] > counts[4][1]


def test_zeta_counts_worked_example() -> None:
    assert zeta_counts(1000, 5) == [607, 151, 67, 37, 24]


def test_documents_needed_for_an_answer_are_there(tokenizer: Tokenizer, files: dict[str, Path]) -> None:
    for place, ids, question in prompts("ruler", tokenizer, lengths=600, samples=4, kinds="qa_1,qa_2", **files):
        text = tokenizer.decode(ids)
        if place["kind"] == "qa_1":
            town = re.search(r"How many bridges has (\S+)\?", text)
            assert town is not None
            assert f"The town of {town[1]} has {question.expected[0]}" in text
        else:
            number = re.search(r"author of Book (\d) born\?", text)
            assert number is not None
            assert f"Book {number[1]} is by Author {number[1]}." in text
            assert f"Author {number[1]} was born in {question.expected[0]}." in text
        documents = [int(n) for n in re.findall(r"Document (\d+):", text)]
        assert documents == list(range(1, len(documents) + 1))


# ---------------------------------------------------------------------------------------------------------------
# Scores and options
# ---------------------------------------------------------------------------------------------------------------
def test_ruler_scores() -> None:
    assert match_all(["12", "34"], "it is 34 or 56") == 0.5
    assert match_all(["Paris"], "PARIS!") == 1.0
    assert match_part(["Paris", "Rome"], "in rome") == 1.0
    assert match_part(["Paris"], "in rome") == 0.0


@pytest.mark.parametrize(
    ("kind", "value", "answer", "score"),
    [
        ("numbers", "123456", " 123456.", 1),
        ("numbers", "123456", " It is 123456, not 7", 1),
        ("numbers", "123456", " 1234567", 0),
        ("numbers", "123456", " 7, 123456", 0),
        ("numbers", "123456", "", 0),
        ("words", "red-fox", " red-fox.", 1),
        ("words", "red-fox", " red-foxes", 0),
        ("uuids", "2c8a94ec-5286-40cd-968b-24742e461258", "2c8a94ec-5286-40cd-968b-24742e461258", 1),
    ],
)
def test_first_of_its_kind_has_to_be_the_value(kind: str, value: str, answer: str, score: int) -> None:
    assert first_is(kind, value, answer) == score


def test_infinitebench_scores() -> None:
    assert has_word("ab-1", 'ab-1", "x"') == 1
    assert has_word("ab-1", "ab-12") == 0
    assert last_integer_is("-7", "first 3, then -7") == 1
    assert last_integer_is("7", "7, or 8") == 0
    assert last_integer_is("7", "none") == 0


def test_functions_do_what_their_source_says() -> None:
    inner = Function("f", None, -4)
    outer = Function("g", inner, 9)
    namespace: dict[str, Any] = {}
    exec(outer.source() + inner.source(), namespace)
    assert namespace["g"](3) == outer(3) == 8


def test_even_depths() -> None:
    assert even_depths(1) == (0.5,)
    assert even_depths(3) == (0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("needle", {"lengths": "4q"}, r"^lengths is '4q', expected a number of tokens"),
        ("needle", {"lengths": "40"}, r"^lengths is too short"),
        ("needle", {"lengths": 0}, r"^lengths is '0', expected"),
        ("needle", {"samples": 0}, r"^samples is 0, expected at least 1"),
        ("needle", {"samples": "x"}, r"^samples is 'x', expected an integer"),
        ("needle", {"depths": 0}, r"^depths is 0"),
        ("needle", {"at": "0,2"}, r"^at is '0.0,2.0', expected numbers from 0 to 1"),
        ("needle", {"needle": "no places"}, r"^needle is 'no places', expected text with {key} and {value}"),
        ("needle", {"question": "{key} {other}"}, r"^question is '{key} {other}', expected text with {key}"),
        ("needle", {"question": "{key.x}"}, r"^question is"),
        ("needle", {"needles": 2}, r"^needles is 2, expected 1 without separate"),
        ("needle", {"share": 2, "separate": True}, r"^share is 2"),
        ("needle", {"align": 5000}, r"^align is 5000, expected 1 to the shortest length"),
        ("needle", {"keys": "colours"}, r"^keys is 'colours', expected one of numbers, words, uuids"),
        ("needle", {"sources": -1}, r"^sources is -1, expected at least 0"),
        ("needle", {"digits": 1}, r"^there are not 10 different"),
        ("needle", {"depht": 3}, r"^unknown option 'depht' of needle, expected one of"),
        ("ruler", {"kinds": "qa_1"}, r"^kinds is 'qa_1', expected qa_1 only with a file"),
        ("ruler", {"kinds": "vt,nix"}, r"^kinds is 'nix', expected one of niah_single_1"),
        ("ruler", {"lengths": "100"}, r"^lengths is too short"),
        ("ruler", {"kinds": "fwe", "lengths": "120"}, r"^lengths is too short for fwe"),
        ("ruler", {"kinds": "cwe", "lengths": "700"}, r"^lengths is too short for cwe"),
        ("kv", {"lengths": "300"}, r"^lengths is too short"),
        ("code-run", {"lengths": "300"}, r"^lengths is too short"),
        ("code-run", {"calls": "2,2"}, r"^calls is '2,2', expected different numbers"),
        ("passkey", {"depths": 0}, r"^depths is 0"),
    ],
)
def test_options_that_cannot_be_used(tokenizer: Tokenizer, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_task(task_class(name), options).cells(tokenizer)


@pytest.mark.parametrize(
    "text", ["", "[", "[]", "{}", '{"data": 3}', '[{"question": 1}]', '{"data": []}', "[[[]]]", "3"]
)
@pytest.mark.parametrize("option", ["squad", "hotpotqa"])
def test_question_files_that_are_not_of_their_format(
    tokenizer: Tokenizer, tmp_path: Path, option: str, text: str
) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(InputError, match=rf"^{option} is '.*bad.json', expected"):
        make_task(task_class("ruler"), {option: tmp_path / "bad.json"}).cells(tokenizer)
