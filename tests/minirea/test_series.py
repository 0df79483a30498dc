"""`minirea read`, `generate --context` and answers in series, as a user has them."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from testing import tiny_model, write_checkpoint, write_tokenizer

import minirea
from minirea.cli import main

BOOK = "It was a quiet day in the harbour, and nothing at all had happened since noon. " * 3
FAST = ("--local-size", "24", "--global-size", "4", "--max-spans", "4", "--chunk-size", "16")
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", tiny_model())
    write_tokenizer(directory, chat_template="{% for m in messages %}<s>[{{ m.content }}]{% endfor %}")
    return directory


@pytest.fixture
def book(model: Path, tmp_path: Path, capsys: Captured) -> Path:
    (tmp_path / "book.txt").write_text(BOOK)
    read = run(capsys, model, "read", "--prompt", tmp_path / "book.txt", "--save", tmp_path / "book.ctx")
    assert read[:2] == (0, "") and f"context     {len(BOOK):,} tokens in {tmp_path}/book.ctx, " in read[2]
    return tmp_path / "book.ctx"


def run(capsys: Captured, model: Path, command: str, *arguments: str | Path) -> tuple[int, str, str]:
    try:
        status = main([command, "--model", str(model), *FAST, *map(str, arguments)])
    except SystemExit as stop:
        status = int(stop.code or 0)
    return status, *capsys.readouterr()


def generate(capsys: Captured, model: Path, *arguments: str | Path) -> tuple[int, str, str]:
    return run(capsys, model, "generate", "--ignore-eos", "--max-tokens", "9", *arguments)


def assert_one_line(result: tuple[int, str, str], *named: object) -> None:
    status, out, err = result
    assert (status, out) == (1, "")
    assert err.startswith("minirea: error: ") and err.count("\n") == 1
    assert all(str(name) in err for name in named), err


def test_a_context_from_a_file_is_the_session_that_was_saved(model: Path, book: Path, capsys: Captured) -> None:
    llm = minirea.load(model, local_size=24, global_size=4, max_spans=4, chunk_size=16)
    session = llm.session()
    session.prefill(BOOK)
    expected = session.generate("Who?", max_tokens=9, ignore_eos=True)
    status, out, err = generate(capsys, model, "--context", book, "--text", "Who?")
    assert (status, out) == (0, expected.text + "\n")
    assert f"prompt      {len(BOOK) + 4} tokens, {len(BOOK)} of them read before" in err
    record = json.loads(generate(capsys, model, "--context", book, "--text", "Who?", "--json")[1])
    assert (record["token_ids"], record["cached_tokens"]) == (expected.token_ids, len(BOOK))


def test_a_context_can_be_read_on(model: Path, book: Path, capsys: Captured) -> None:
    assert run(capsys, model, "read", "--context", book, "--text", " More.", "--save", book)[0] == 0
    session = minirea.load(model, local_size=24, global_size=4, max_spans=4, chunk_size=16).open_session(book)
    assert session.ids == session.llm.tokenizer.encode(BOOK + " More.")


def test_a_chat_after_a_context_begins_no_text(model: Path, book: Path, capsys: Captured) -> None:
    record = json.loads(generate(capsys, model, "--context", book, "--text", "a", "--chat", "--json")[1])
    assert record["prompt_tokens"] == len(BOOK) + len("[a]")


def test_contexts_that_do_not_fit_are_one_line_with_the_flag(
    model: Path, book: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minirea.loading.load_weights", lambda *_: pytest.fail("the weights were read"))
    assert_one_line(generate(capsys, model, "--context", book, "--text", "a", "--span-size", "16"), "--span-size 32")
    assert_one_line(
        generate(capsys, model, "--context", tmp_path / "none", "--text", "a"), "--context", "none: no such file"
    )
    assert_one_line(generate(capsys, model, "--context", tmp_path / "book.txt", "--text", "a"), "is no context")
    assert_one_line(run(capsys, model, "read", "--text", "a", "--save", tmp_path), "is a directory")
    assert_one_line(run(capsys, model, "read", "--text", "a", "--save", "/none/a"), "cannot be written")


def test_the_flags_of_a_refusal_can_be_pasted(model: Path, tmp_path: Path, capsys: Captured) -> None:
    read = ("--attention", "streaming", "--tail-size", "0", "--dense-size", "40", "--max-spans", "3")
    assert run(capsys, model, "read", "--text", BOOK, "--save", tmp_path / "a.ctx", *read)[0] == 0
    refused = generate(capsys, model, "--context", tmp_path / "a.ctx", "--text", "a", "--dtype", "bfloat16")
    assert_one_line(
        refused, "was read with --attention streaming --dtype float32 ", "expected --attention reattention "
    )
    flags = refused[2].rsplit(": load the model with ", 1)[1].split()
    assert (
        generate(capsys, model, "--context", tmp_path / "a.ctx", "--text", "a", "--dtype", "bfloat16", *flags)[0] == 0
    )


def test_a_dry_run_counts_the_context(model: Path, book: Path, capsys: Captured) -> None:
    record = json.loads(generate(capsys, model, "--context", book, "--text", "abc", "--dry-run", "--json")[1])
    assert record["prompt_tokens"] == len(BOOK) + 3


def write_questions(path: Path, *prompts: str) -> Path:
    path.write_text("\n".join(json.dumps({"id": i, "prompt": prompt}) for i, prompt in enumerate(prompts)) + "\n\n")
    return path


def test_answers_in_series_are_those_of_single_runs(model: Path, book: Path, tmp_path: Path, capsys: Captured) -> None:
    prompts = ("Who?", "Where was it then?", "Why?")
    questions = write_questions(tmp_path / "q.jsonl", *prompts)
    for context in ((), ("--context", book)):
        _, out, err = generate(capsys, model, *context, "--questions", questions)
        records = [json.loads(line) for line in out.splitlines()]
        assert [record["id"] for record in records] == [0, 1, 2]
        assert [line for line in err.splitlines() if "of 3 answered" in line] == [
            f"minirea: {n} of 3 answered" for n in (1, 2, 3)
        ]
        for record, prompt in zip(records, prompts, strict=True):
            alone = json.loads(generate(capsys, model, *context, "--text", prompt, "--json")[1])
            assert record["token_ids"] == alone["token_ids"] and record["prompt_tokens"] == alone["prompt_tokens"]


def test_several_prompt_files(model: Path, tmp_path: Path, capsys: Captured) -> None:
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file in files:
        file.write_text(file.name * 9)
    arguments = [word for file in files for word in ("--prompt", file)]
    records = [json.loads(line) for line in generate(capsys, model, *arguments, "--quiet")[1].splitlines()]
    assert [record["id"] for record in records] == list(map(str, files))
    assert_one_line(generate(capsys, model, *arguments, "--prompt", files[0]), files[0], "expected once")


def test_a_series_goes_on_where_it_was(
    model: Path, book: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After two of three answers, and after a third whose line was torn at any place."""
    questions, out = write_questions(tmp_path / "q.jsonl", "a", "b", "c"), tmp_path / "out.jsonl"
    arguments = ("--context", book, "--questions", questions, "--out", out)
    assert generate(capsys, model, *arguments)[:2] == (0, "")
    whole = out.read_bytes()
    assert whole.count(b"\n") == 3
    two = whole[: whole[:-1].rindex(b"\n") + 1]
    without_time = [{**json.loads(line), "time_to_first_token": 0} for line in whole.splitlines()]
    for torn in (two, two + b"{", whole[:-1], two + b"\0" * 40):
        out.write_bytes(torn)
        status, _, err = generate(capsys, model, *arguments)
        opened, answered = err.splitlines()
        assert (status, answered) == (0, "minirea: 3 of 3 answered")
        assert re.fullmatch(rf"context     237 tokens of {book}, .* in \d+\.\d\d s, .*B/s", opened)
        assert out.read_bytes().startswith(two)
        for line, before in zip(out.read_text().splitlines(), without_time, strict=True):
            assert json.loads(line)["token_ids"] == before["token_ids"]
    done = out.read_bytes()
    monkeypatch.setattr("minirea.loading.load_weights", lambda *_: pytest.fail("nothing is left to answer"))
    assert generate(capsys, model, *arguments) == (0, "", f"minirea: 3 of 3 are answered in {out}\n")
    assert generate(capsys, model, *arguments, "--quiet") == (0, "", "")
    assert out.read_bytes() == done


def test_answers_of_another_run_are_refused_and_kept(model: Path, book: Path, tmp_path: Path, capsys: Captured) -> None:
    questions, out = write_questions(tmp_path / "q.jsonl", "a", "b"), tmp_path / "out.jsonl"
    generate(capsys, model, "--questions", questions, "--out", out)
    kept = out.read_bytes()
    for change in (("--context", book), ("--temperature", "1", "--seed", "3"), ("--span-size", "16"), ("--chat",)):
        refused = generate(capsys, model, "--questions", questions, "--out", out, *change)
        assert_one_line(refused, out, "answers 0 with another prompt, context, model or settings")
    write_questions(questions, "x", "b")
    assert_one_line(generate(capsys, model, "--questions", questions, "--out", out), out, "answers 0")
    assert out.read_bytes() == kept


BAD_LINES = {
    "[1]": "line 2: holds a JSON list",
    '{"id": 1, "prompt": "a': "line 2: not valid JSON: Unterminated string starting at column 21",
    '{"id": 1, "prompt": "a \\ud800"}': "line 2: text: character 2 is the lone surrogate",
    "{": "line 2: not valid JSON",
    '{"prompt": "a"}': "line 2: id is absent, expected a string or an integer that names the answer, as in {",
    '{"id": true, "prompt": "a"}': "line 2: id is true",
    '{"id": 1}': "line 2: prompt is absent, expected some text",
    '{"id": 1, "prompt": ""}': 'line 2: prompt is ""',
    '{"id": 0, "prompt": "b"}': "line 2: id 0 is also at",
    "[" * 100_000: "line 2: not valid JSON",
}


def test_bad_questions_and_answers_are_one_line(model: Path, tmp_path: Path, capsys: Captured) -> None:
    questions, out = tmp_path / "q.jsonl", tmp_path / "out.jsonl"
    for line, message in BAD_LINES.items():
        questions.write_text('{"id": 0, "prompt": "a"}\n' + line)
        assert_one_line(generate(capsys, model, "--questions", questions), "--questions", questions, message)
    questions.write_text("\n")
    assert_one_line(generate(capsys, model, "--questions", questions), "holds no questions")
    write_questions(questions, "a")
    for text, message in (("{}\n", "line 1: is no answer"), ("hello\n", "line 1: not valid JSON")):
        out.write_text(text)
        assert_one_line(generate(capsys, model, "--questions", questions, "--out", out), out, message)
        assert out.read_text() == text
    assert_one_line(
        generate(capsys, model, "--questions", questions, "--out", "/dev/null"), "--out /dev/null: is a device"
    )
    for path, message in (
        (tmp_path, f"--out {tmp_path}: is a directory, expected a file with answers"),
        (tmp_path / "none" / "a", f"cannot be written: {tmp_path}/none is no directory"),
        (questions / "a", f"cannot be written: {questions} is no directory"),
    ):
        assert_one_line(generate(capsys, model, "--questions", questions, "--out", path), message)
    questions.write_text('{"id": 0, "prompt": "a"}\n', encoding="utf-16")
    assert_one_line(generate(capsys, model, "--questions", questions), "line 1: is UTF-16 text, expected")
    write_questions(questions, "a")
    out.write_text("")
    with open(out) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert_one_line(generate(capsys, model, "--questions", questions, "--out", out), "another process is writing")
    assert generate(capsys, model, "--text", "a", "--out", out)[0] == 2


def test_questions_from_standard_input(
    model: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_questions(tmp_path / "q.jsonl", "abc", "de").read_bytes()
    expected = generate(capsys, model, "--questions", tmp_path / "q.jsonl", "--max-tokens", "2")
    for data in (text, b"\xef\xbb\xbf" + text):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        found = generate(capsys, model, "--questions", "-", "--max-tokens", "2")
        assert [json.loads(line)["text"] for line in found[1].splitlines()] == [
            json.loads(line)["text"] for line in expected[1].splitlines()
        ]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text + b"[]")))
    assert_one_line(
        generate(capsys, model, "--questions", "-"), "--questions standard input: line 4: holds a JSON list"
    )


def test_a_series_that_is_killed_keeps_what_it_answered(model: Path, tmp_path: Path, capsys: Captured) -> None:
    questions, out = write_questions(tmp_path / "q.jsonl", *("abcdefgh" * 3)), tmp_path / "out.jsonl"
    words = ["generate", "--model", str(model), "--ignore-eos", *FAST]
    words += ["--questions", str(questions), "--out", str(out), "--max-tokens", "40"]
    command = [sys.executable, "-m", "minirea", *words]
    for strike in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stderr is not None
        process.stderr.readline()  # one more is answered
        os.kill(process.pid, strike)
        _, err = process.communicate()
        assert process.returncode in (-9, 130)
        assert strike == signal.SIGKILL or b"the same command goes on" in err
    assert main(words) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["id"] for record in records] == list(range(24))
    assert capsys.readouterr().err.count("answered") <= 22
