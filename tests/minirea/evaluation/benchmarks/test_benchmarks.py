"""LongBench, L-Eval and InfiniteBench on small files of their formats, made here."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from testing import tiny_model, write_checkpoint

import minirea
from minirea.errors import InputError, MissingFileError
from minirea.evaluation.benchmarks import files
from minirea.evaluation.benchmarks.base import Benchmark, cut_middle
from minirea.evaluation.benchmarks.infinitebench import InfiniteBench
from minirea.evaluation.benchmarks.leval import LEval
from minirea.evaluation.benchmarks.longbench import LongBench
from minirea.evaluation.frame.cells import Prompt, PromptCell
from minirea.evaluation.frame.tasks import make_task
from minirea.tokenizer import Tokenizer, load_tokenizer

LONGBENCH = {"context": "Anna lives in Rome.", "input": "Where is Anna?", "answers": ["Rome", "in Rome"]}
LEVAL = {
    "input": "A long document.",
    "instructions": ["Which?\nA. one\nB. two", "And then?\nA. one\nB. two"],
    "outputs": ["B", "A"],
    "evaluation": "exam",
    "source": "made here",
}
INFINITE = {"id": 0, "context": "The pass key is 71432.", "input": "What is the pass key?", "answer": ["71432"]}
CHOICE = {"context": "A book.", "input": "Who?", "options": ["Ann", "Bob", "Cid", "Dan"], "answer": ["Cid"]}


def write(path: Path, *lines: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def character_tokenizer(folder: Path, **config: Any) -> Tokenizer:
    """A token for each printable ASCII character and the newline; BOS goes before a text."""
    from tokenizers import Tokenizer as Builder
    from tokenizers import decoders, models, processors

    folder.mkdir(exist_ok=True)
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "\n", *map(chr, range(32, 127))])}
    built = Builder(models.BPE(vocab, [], unk_token="<unk>"))
    built.add_special_tokens(["<unk>", "<s>", "</s>"])
    built.decoder = decoders.Fuse()
    built.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    built.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"} | config))
    return load_tokenizer(folder)


VOCAB_SIZE = 3 + 1 + 95


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return character_tokenizer(tmp_path / "model")


def task(cls: type[Benchmark], data: Path, **options: Any) -> Benchmark:
    made = make_task(cls, {"data": data, "lengths": (4096,), **options})
    assert isinstance(made, Benchmark)
    return made


def cells(cls: type[Benchmark], data: Path, tokenizer: Tokenizer, **options: Any) -> Sequence[PromptCell]:
    return task(cls, data, **options).cells(tokenizer)


def text(prompt: Prompt, tokenizer: Tokenizer, question: int = 0) -> str:
    return tokenizer.decode([*prompt.context, *prompt.questions[question].ids])


@pytest.mark.parametrize("labels", [["MR. JONES"], ["ANN", "MR. JONES"], [["MR. JONES", "ANN"]]])
def test_every_label_of_a_dialogue_counts_and_may_have_several_words(
    tmp_path: Path, tokenizer: Tokenizer, labels: list[Any]
) -> None:
    write(tmp_path / "longdialogue_qa_eng.jsonl", INFINITE | {"answer": labels})
    (cell,) = cells(InfiniteBench, tmp_path, tokenizer)
    (question,) = cell.build().questions
    assert question.score("That would be Mr. Jones.") == 1
    assert question.score("Ann!") == float("ANN" in str(labels))
    assert question.score("Mr. Smith") == 0


# --- LongBench ---
def test_longbench_uses_the_published_templates_where_they_are(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "data" / "hotpotqa.jsonl", LONGBENCH | {"all_classes": None, "length": 4, "_id": "x"})
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "dataset2prompt.json").write_text('{"hotpotqa": "<{context}> {{}} {input}"}')
    (cell,) = cells(LongBench, tmp_path, tokenizer)
    prompt = cell.build()
    assert text(prompt, tokenizer) == "<Anna lives in Rome.> {} Where is Anna?"
    (question,) = prompt.questions
    assert question.expected == ("Rome", "in Rome")
    assert question.max_tokens == 32
    assert question.score("Rome!") == question.score("In Rome") == 1
    assert question.extra["prompts"] == "dataset2prompt.json"
    assert len(question.extra["prompts_sha256"]) == 16


def test_minireas_own_wording_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "hotpotqa.jsonl", LONGBENCH)
    (cell,) = cells(LongBench, tmp_path, tokenizer)
    question = cell.build().questions[0]
    assert (question.extra["prompts"], question.extra["prompts_sha256"]) == ("minirea", "")
    assert cell.places == ({"kind": "hotpotqa", "length": 4096, "line": 1, "question": 0},)


def test_a_file_of_prompts_goes_before_the_one_in_the_directory(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "hotpotqa.jsonl", LONGBENCH)
    (tmp_path / "dataset2prompt.json").write_text('{"hotpotqa": "{context} first"}')
    (tmp_path / "mine.json").write_text('{"hotpotqa": "{context} second"}')
    (cell,) = cells(LongBench, tmp_path, tokenizer, prompts=tmp_path / "mine.json")
    prompt = cell.build()
    assert text(prompt, tokenizer) == "Anna lives in Rome. second"
    assert prompt.questions[0].extra["prompts"] == "mine.json"


def test_what_fills_a_template_is_not_a_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "lcc.jsonl", LONGBENCH | {"context": "if (x) {input} {{ {0}"})
    (cell,) = cells(LongBench, tmp_path, tokenizer)
    assert text(cell.build(), tokenizer) == "if (x) {input} {{ {0}"


def test_only_the_first_line_counts_in_few_shot_datasets(tmp_path: Path, tokenizer: Tokenizer) -> None:
    classes = {"all_classes": ["City", "State"], "answers": ["City"]}
    write(tmp_path / "trec.jsonl", LONGBENCH | classes)
    write(tmp_path / "triviaqa.jsonl", LONGBENCH)
    by_kind = {c.places[0]["kind"]: c.build().questions[0] for c in cells(LongBench, tmp_path, tokenizer)}
    assert by_kind["trec"].score("\nCity\nState") == by_kind["triviaqa"].score("\nRome\nQuestion: again") == 1
    assert by_kind["trec"].score("City or State") == 0.5


def test_the_middle_is_cut(tokenizer: Tokenizer) -> None:
    assert cut_middle("0123456789", tokenizer, 11) == ("0123456789", 0)  # BOS is a token too
    assert cut_middle("0123456789", tokenizer, 10) == ("012356789", 1)
    assert cut_middle("0123456789", tokenizer, 7) == ("01789", 5)


def test_a_cut_prompt_keeps_both_ends(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "lcc.jsonl", LONGBENCH | {"context": "a" * 500 + "b" * 500})
    write(tmp_path / "vcsum.jsonl", LONGBENCH)
    found = cells(LongBench, tmp_path, tokenizer, lengths=(100, 40), datasets=("lcc",))
    assert [cell.tokens for cell in found] == [40, 100]
    prompt = found[0].build()
    assert text(prompt, tokenizer) == "a" * 19 + "b" * 20
    assert prompt.questions[0].extra["cut_tokens"] == 1001 - 40


def test_only_other_than_few_shot_and_code_prompts_become_chats(tmp_path: Path) -> None:
    write(tmp_path / "data" / "hotpotqa.jsonl", LONGBENCH)
    write(tmp_path / "data" / "lcc.jsonl", LONGBENCH)
    chat = character_tokenizer(tmp_path / "model", chat_template="[{{ messages[0].content }}]")
    qa, code = cells(LongBench, tmp_path / "data", chat, chat=True)
    assert text(qa.build(), chat).startswith("[Anna")
    assert text(code.build(), chat) == "Anna lives in Rome."
    assert (qa.build().questions[0].extra["chat"], code.build().questions[0].extra["chat"]) == (True, False)


def test_chat_needs_a_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "hotpotqa.jsonl", LONGBENCH)
    with pytest.raises(InputError, match="no chat template"):
        cells(LongBench, tmp_path, tokenizer, chat=True)


# --- L-Eval ---
def test_leval_shares_the_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "LEval-data" / "Closed-ended-tasks" / "quality.jsonl", LEVAL)
    (cell,) = cells(LEval, tmp_path, tokenizer)
    assert [place["question"] for place in cell.places] == [0, 1]
    prompt = cell.build()
    assert tokenizer.decode(prompt.context).startswith("A long document.")
    assert "Which?" in text(prompt, tokenizer, 0)
    assert "And then?" in text(prompt, tokenizer, 1)
    assert [question.score("B") for question in prompt.questions] == [1, 0]


def test_leval_cuts_the_documents_end_for_all_questions_alike(tmp_path: Path, tokenizer: Tokenizer) -> None:
    line = LEVAL | {"input": "0123456789" * 50, "instructions": ["x", "y" * 20]}
    write(tmp_path / "quality.jsonl", line)
    (tmp_path / "p.json").write_text('{"quality": "{document}|{instruction}", "codeU": "{document}|{instruction}"}')
    (cell,) = cells(LEval, tmp_path, tokenizer, lengths=(100,), prompts=tmp_path / "p.json")
    prompt = cell.build()
    room = 100 - 1 - len("|" + "y" * 20)  # BOS is one token
    assert text(prompt, tokenizer, 0) == ("0123456789" * 50)[:room] + "|x"
    assert len(prompt.context) + len(prompt.questions[1].ids) == 100
    assert prompt.questions[0].extra["cut_tokens"] == 500 - room
    write(tmp_path / "quality.jsonl")
    write(tmp_path / "codeU.jsonl", line)
    (cell,) = cells(LEval, tmp_path, tokenizer, lengths=(100,), prompts=tmp_path / "p.json", datasets=("codeU",))
    assert text(cell.build(), tokenizer, 0) == ("0123456789" * 50)[-room:] + "|x"


def test_leval_tells_how_long_the_reference_is(tmp_path: Path, tokenizer: Tokenizer) -> None:
    summary = LEVAL | {"instructions": ["Sum it up."], "outputs": ["four words it has"], "evaluation": "rouge"}
    write(tmp_path / "patent_summ.jsonl", summary, summary | {"evaluation": "human"})
    (cell,) = cells(LEval, tmp_path, tokenizer)
    prompt = cell.build()
    assert " 4 words" in text(prompt, tokenizer)
    (question,) = prompt.questions  # what people are to judge is left out
    assert question.extra["metric"] == "ROUGE-L"
    assert question.score("four words it has") == 1


def test_leval_says_when_a_question_alone_is_too_long(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "quality.jsonl", LEVAL)
    (cell,) = cells(LEval, tmp_path, tokenizer, lengths=(8,))
    with pytest.raises(
        InputError, match=r"^lengths is 8, expected more than the [0-9]+ tokens of a question of quality"
    ):
        cell.build()


# --- InfiniteBench ---
def test_infinitebench_reads_questions_of_one_book_together(tmp_path: Path, tokenizer: Tokenizer) -> None:
    other = CHOICE | {"context": "Another book."}
    write(tmp_path / "longbook_choice_eng.jsonl", CHOICE, other, CHOICE | {"input": "Whom?", "answer": "Ann"})
    found = cells(InfiniteBench, tmp_path, tokenizer)
    assert [[place["line"] for place in cell.places] for cell in found] == [[1, 3], [2]]
    prompt = found[0].build()
    assert tokenizer.decode(prompt.context).startswith("A book.")
    assert "A. Ann" in text(prompt, tokenizer)
    assert [question.expected for question in prompt.questions] == [("C", "Cid"), ("A", "Ann")]
    assert prompt.questions[0].score("C. Cid") == 1


@pytest.mark.parametrize(
    ("name", "changes", "answer"),
    [
        ("passkey", {}, " 71432."),
        ("number_string", {"answer": "0012"}, "0012"),
        ("kv_retrieval", {"answer": "a-b"}, '"a-b"'),
        ("longbook_qa_eng", {"answer": ["Jane", "Jane Eyre"]}, "Jane Eyre"),
        ("longbook_sum_eng", {"answer": ["It is short."]}, "it is short"),
        ("longbook_qa_chn", {"answer": ["北京"]}, "北京。"),
        ("longdialogue_qa_eng", {"answer": ["JANE"]}, "Jane"),
        ("code_run", {"input": "Please return func_3(-2) now", "answer": -14}, "it is -14"),
        ("code_debug", {"options": ["f", "g", "h", "i"], "answer": ["g", "B"]}, "B. g"),
        ("math_find", {"input": "You should answer with the largest number of the list.", "answer": 62}, "62"),
        ("math_calc", {"answer": [[1, -3, 4]]}, "[1, 3, 4]"),
    ],
)
def test_infinitebench_tasks(
    tmp_path: Path, tokenizer: Tokenizer, name: str, changes: dict[str, Any], answer: str
) -> None:
    write(tmp_path / f"{name}.jsonl", INFINITE | changes)
    (cell,) = cells(InfiniteBench, tmp_path, tokenizer)
    question = cell.build().questions[0]
    assert question.score(answer) == (pytest.approx(1 / 3) if name == "math_calc" else 1)
    assert question.score("nothing of the kind") == 0


def test_infinitebench_names_what_it_asks_for(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "code_run.jsonl", INFINITE | {"input": "What is func_3(-2)?", "answer": 1})
    write(tmp_path / "math_find.jsonl", INFINITE | {"input": "The second largest number of it?", "answer": 1.5})
    call, target = (text(cell.build(), tokenizer) for cell in cells(InfiniteBench, tmp_path, tokenizer))
    assert "func_3(-2) returns" in call
    assert "the second largest number is" in target


# --- options and files ---
def test_samples_are_the_first_lines(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [LONGBENCH | {"context": f"{i}"} for i in range(5)]
    path = write(tmp_path / "hotpotqa.jsonl", *lines)
    path.write_text("\n" + path.read_text())  # blank lines are not counted
    assert len(cells(LongBench, tmp_path, tokenizer)) == 5
    assert [cell.places[0]["line"] for cell in cells(LongBench, tmp_path, tokenizer, samples=2)] == [2, 3]


def test_results_belong_to_what_the_files_hold(tmp_path: Path) -> None:
    path = write(tmp_path / "a" / "hotpotqa.jsonl", LONGBENCH)
    here = task(LongBench, tmp_path / "a").identity()
    assert here == json.loads(json.dumps(here))
    write(tmp_path / "b" / "hotpotqa.jsonl", LONGBENCH)
    assert task(LongBench, tmp_path / "b", samples=1).identity() == here
    write(path, LONGBENCH, LONGBENCH)
    assert task(LongBench, tmp_path / "a").identity() != here
    write(path, LONGBENCH)
    (tmp_path / "a" / "dataset2prompt.json").write_text("{}")
    assert task(LongBench, tmp_path / "a").identity() != here


@pytest.mark.parametrize(
    ("cls", "name", "line", "message"),
    [
        (LongBench, "hotpotqa", LONGBENCH | {"answers": "Rome"}, 'answers is "Rome", expected a list of strings'),
        (LongBench, "hotpotqa", LONGBENCH | {"answers": []}, r"answers is \[\], expected a list of strings"),
        (LongBench, "hotpotqa", {"context": "x", "answers": ["x"]}, "input is absent, expected a string"),
        (LongBench, "trec", LONGBENCH | {"all_classes": None}, "all_classes is null, expected a list of strings"),
        (LongBench, "passage_count", LONGBENCH, "answers is .*, expected answers with a number in them"),
        (LongBench, "hotpotqa", LONGBENCH | {"context": "\ud800"}, "context is .*, expected a string of valid Unicode"),
        (LongBench, "hotpotqa", [1], "holds a JSON list, expected an object"),
        (LEval, "quality", LEVAL | {"outputs": ["B"]}, r"outputs is \[\"B\"\], expected as many as .* instructions, 2"),
        (LEval, "quality", LEVAL | {"evaluation": "taste"}, "evaluation is .*, expected one of f1, rouge, exam, human"),
        (LEval, "patent_summ", LEVAL, "evaluation is .*, expected one of f1, rouge, human, LLM"),
        (InfiniteBench, "passkey", INFINITE | {"answer": {}}, "answer is {}, expected a string, a number or a list"),
        (InfiniteBench, "math_find", INFINITE | {"input": "the first of", "answer": "x"}, "expected numbers"),
        (InfiniteBench, "math_find", INFINITE, "input is .*, expected words such as"),
        (InfiniteBench, "code_run", INFINITE, "input is .*, expected a call such as"),
        (InfiniteBench, "longbook_choice_eng", CHOICE | {"options": ["Cid"]}, "options is .*, expected four texts"),
        (InfiniteBench, "longbook_choice_eng", CHOICE | {"answer": "Eve"}, "answer is .*, expected one of the options"),
    ],
)
def test_a_bad_line_is_named(
    tmp_path: Path, tokenizer: Tokenizer, cls: type[Benchmark], name: str, line: Any, message: str
) -> None:
    path = write(tmp_path / f"{name}.jsonl", line)
    with pytest.raises(InputError, match=message) as caught:
        cells(cls, tmp_path, tokenizer)
    assert str(caught.value).startswith(f"{path}, line 1: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", [b"{", b'{"context": "\xff"}', b"[" * 100_000, b"nothing"])
def test_a_line_that_is_no_json_is_named(tmp_path: Path, tokenizer: Tokenizer, line: bytes) -> None:
    path = write(tmp_path / "hotpotqa.jsonl", LONGBENCH)
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(InputError, match=r"hotpotqa\.jsonl, line 2: not (valid JSON|UTF-8 text)"):
        cells(LongBench, tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{context} {answers}", "has the field {answers}, expected none but {context}, {input}"),
        ("{context!r}", "has the field {context}"),
        ("{context:>1000000000}", "has the field {context}"),
        ("{context.__class__}", "has the field {context.__class__}"),
        ("{context} {", "expected a template with fields"),
        ("{context} {}", "has the field {}"),
        ("{input}", "has no {context}"),
        (["{context}"], "hotpotqa is .*, expected a template, as a string"),
    ],
)
def test_a_bad_template_is_named(tmp_path: Path, tokenizer: Tokenizer, template: Any, message: str) -> None:
    write(tmp_path / "hotpotqa.jsonl", LONGBENCH)
    (tmp_path / "mine.json").write_text(json.dumps({"hotpotqa": template}))
    with pytest.raises(InputError, match=message) as caught:
        cells(LongBench, tmp_path, tokenizer, prompts=tmp_path / "mine.json")
    assert str(caught.value).startswith(f"{tmp_path / 'mine.json'}: hotpotqa")


def test_templates_must_cover_the_datasets_that_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "hotpotqa.jsonl", LONGBENCH)
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(InputError, match=r"mine.json: hotpotqa is absent, expected a template"):
        cells(LongBench, tmp_path, tokenizer, prompts=tmp_path / "mine.json", datasets=("hotpotqa",))


def test_directories_that_cannot_be_used(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="data is None, expected the directory"):
        make_task(LongBench, {})
    with pytest.raises(MissingFileError, match="no such directory"):
        cells(LongBench, tmp_path / "nowhere", tokenizer)
    with pytest.raises(InputError, match="is a file, expected a directory of data files"):
        cells(LongBench, Path(__file__), tokenizer)
    with pytest.raises(InputError, match="is a file, expected a model directory"):
        load_tokenizer(__file__)
    with pytest.raises(MissingFileError, match="no data file of longbench in it, expected narrativeqa"):
        cells(LongBench, tmp_path, tokenizer)
    write(tmp_path / "one" / "hotpotqa.jsonl", LONGBENCH)
    with pytest.raises(MissingFileError, match=r"no lcc.jsonl in it$"):
        cells(LongBench, tmp_path, tokenizer, datasets=("hotpotqa", "lcc"))
    with pytest.raises(InputError, match="datasets is 'lc', expected one of narrativeqa"):
        task(LongBench, tmp_path, datasets=("lc",))
    write(tmp_path / "two" / "hotpotqa.jsonl", LONGBENCH)
    with pytest.raises(InputError, match=r"holds hotpotqa.jsonl twice, in .*one and .*two"):
        cells(LongBench, tmp_path, tokenizer)
    write(tmp_path / "two" / "hotpotqa.jsonl")
    with pytest.raises(InputError, match="holds no question that can be scored"):
        cells(LongBench, tmp_path / "two", tokenizer)
    os.mkfifo(tmp_path / "two" / "lcc.jsonl")
    with pytest.raises(InputError, match=r"lcc.jsonl: is a named pipe, expected a file with data"):
        cells(LongBench, tmp_path / "two", tokenizer)


def test_a_deep_folder_is_not_searched(tmp_path: Path) -> None:
    write(tmp_path / "1" / "2" / "3" / "4" / "a.jsonl")
    write(tmp_path / "1" / "2" / "3" / "4" / "5" / "b.jsonl")
    assert list(files.find(tmp_path, {"a.jsonl", "b.jsonl"})) == ["a.jsonl"]


@pytest.mark.parametrize("cls", [LongBench, LEval, InfiniteBench])
def test_own_templates_have_fields_that_there_are(cls: type[Benchmark]) -> None:
    for name, dataset in cls.DATASETS.items():
        files.Template(dataset.template).check(name, cls.FIELDS)


# --- the table ---
def record(kind: str, score: float | None, length: int = 100, **more: Any) -> dict[str, Any]:
    told = {} if score is None else {"metric": "F1", "prompts": "minirea", "prompts_sha256": ""}
    skipped = {"skipped": "no memory"} if score is None else {}
    return {"attention": "full", "kind": kind, "length": length, "score": score, **told, **skipped, **more}


def test_the_table_has_the_papers_rows_in_their_order(tmp_path: Path) -> None:
    longbench = task(LongBench, tmp_path)
    records = [record("lcc", 0.5), record("repobench-p", 0.25), record("hotpotqa", 1.0), record("hotpotqa", 0.0)]
    records += [record("musique", 0.25), record("lcc", 0.75, 200), record("trec", None)]
    rows = longbench.summarize(records)
    assert longbench.table(rows) == [
        ["attention", "longbench", "metric", "prompts", "100", "200"],
        ["full", "HotpotQA", "F1", "minirea", "50.00", "-"],
        ["full", "MuSiQue", "F1", "minirea", "25.00", "-"],
        ["full", "TREC", "", "", "skipped", "-"],
        ["full", "LCC", "F1", "minirea", "50.00", "75.00"],
        ["full", "RepoBench-P", "F1", "minirea", "25.00", "-"],
        ["full", "Multi-Document QA (2 of 4)", "", "", "37.50", "-"],
        ["full", "Code", "", "", "37.50", "-"],
        ["full", "Average of categories (2 of 6)", "", "", "37.50", "-"],
        ["full", "Code (1 of 2)", "", "", "-", "75.00"],
        ["full", "Average of categories (1 of 6)", "", "", "-", "75.00"],
    ]


# --- end to end ---
def test_evaluate_runs_a_benchmark_on_a_model(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", tiny_model(vocab_size=VOCAB_SIZE))
    character_tokenizer(model)
    line = LONGBENCH | {"context": "It was a long day. " * 20}
    write(tmp_path / "data" / "hotpotqa.jsonl", line, line | {"input": "Where is Rome?"})
    options = {
        "attention": "reattention,full",
        "data": str(tmp_path / "data"),
        "lengths": "200",
        "out": tmp_path / "out",
    }
    done = minirea.evaluate("longbench", model, **options)
    assert len(done.records) == 4
    assert all(r["prompt_tokens"] <= 200 and r["cut_tokens"] > 0 for r in done.records)
    assert all(r["generated_tokens"] <= 32 and 0 <= r["score"] <= 1 for r in done.records)
    assert [row.split()[:2] for row in done.table.splitlines() if "Hotpot" in row] == [
        ["reattention", "HotpotQA"],
        ["full", "HotpotQA"],
    ]
    assert minirea.evaluate("longbench", model, **options).records == done.records
