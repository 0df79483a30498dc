"""Running an evaluation: shared contexts, records, interruptions, refusals, the command line and its pictures."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from testing import random_ids, tiny_model, write_checkpoint

import minirea
from minirea.cli import main
from minirea.errors import InputError, MemoryLimitError, MissingExtraError, MissingFileError
from minirea.evaluation import report
from minirea.evaluation.frame import plots
from minirea.evaluation.frame import records as records_module
from minirea.evaluation.frame.cells import Prompt, PromptCell, Question, common_prefix, find_ids
from minirea.evaluation.frame.records import RECORDS, Results, read_results
from minirea.evaluation.frame.runner import render
from minirea.evaluation.frame.tasks import make_task, parse_switch, parsed
from minirea.evaluation.lengths import parse_length, short_length
from minirea.evaluation.registry import names, task_class
from minirea.evaluation.text.haystack import Haystack, Stretch

DEMO = Path(__file__).parents[3] / "weights" / "demo"
SCOPE: dict[str, Any] = {"global_size": 4, "local_size": 64, "span_size": 8, "max_spans": 6, "chunk_size": 32}
NEEDLE: dict[str, Any] = {"lengths": (300, 450), "depths": 3, "samples": 2, "seed": 5} | SCOPE
FLAGS = ["--lengths", "300,450", "--depths", "3", "--samples", "2", "--seed", "5", "--quiet", "--device", "cpu"]
FLAGS += [part for name, value in SCOPE.items() for part in (f"--{name.replace('_', '-')}", str(value))]
MODES = ("reattention", "streaming", "full")
NEEDS_MATPLOTLIB = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
TIMES = ("shared_seconds", "first_token_seconds", "decode_seconds", "peak_bytes")


def write_model(directory: Path, seed: int = 0, **fields: Any) -> Path:
    """A random model with the demo's tokenizer."""
    write_checkpoint(directory, tiny_model(seed, vocab_size=2048, max_position_embeddings=128, **fields))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, directory)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(model: Path) -> minirea.LLM:
    return minirea.load(model, device="cpu", **SCOPE)


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def json_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def lines(folder: Path) -> list[str]:
    return (folder / "records.jsonl").read_text().splitlines()


# ---------------------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("context_tokens", [0, 20, 32, 245])
def test_an_answer_on_a_shared_context_is_that_of_a_fresh_prompt(
    llm: minirea.LLM, mode: str, context_tokens: int
) -> None:
    llm = llm.with_attention(mode, **SCOPE)
    context = random_ids(context_tokens, 2048, seed=1)
    asked = [random_ids(size, 2048, seed=size) for size in (1, 9, 40)]
    questions = [Question(ids, [""], lambda _: 0.0, max_tokens=12) for ids in asked]
    cell = PromptCell(tuple({"question": i} for i in range(3)), context_tokens, lambda: Prompt(context, questions))
    for order in ([0, 1, 2], [2, 0, 2]):
        shared = [record["answer"] for record in cell.run(llm, order, progress=False)]
        assert shared == [llm.generate([*context, *asked[i]], max_tokens=12).text for i in order]


@pytest.mark.parametrize("mode", MODES)
def test_prompts_that_begin_alike_are_read_once_and_answered_as_if_alone(llm: minirea.LLM, mode: str) -> None:
    """Copies of one text with a needle at other depths, in the task's order and in one that shares little."""
    llm = llm.with_attention(mode, **SCOPE)
    options = {"lengths": 450, "samples": 2, "depths": 4, "separate": True, "needles": 2, "answer_tokens": 12}
    for cell in make_task(task_class("needle"), options).cells(llm.tokenizer):
        assert isinstance(cell, PromptCell)
        assert [place["depth"] for place in cell.places] == [1.0, 0.6667, 0.3333, 0.0]
        whole = [[*q.context, *q.ids] for q in cell.build().questions]
        alone = [llm.generate(ids, max_tokens=12, stop=["\n"]) for ids in whole]
        chunk, common = SCOPE["chunk_size"], [0, *itertools.starmap(common_prefix, itertools.pairwise(whole))]
        shared = [min(count, len(whole[0]) - 1) // chunk * chunk for count in common]
        for order in ([0, 1, 2, 3], [3, 0, 2], [1]):
            records = list(cell.run(llm, order, progress=False))
            assert [r["answer"] for r in records] == [alone[i].text for i in order]
            assert [r["generated_tokens"] for r in records] == [len(alone[i].token_ids) for i in order]
            assert [r["prompt_tokens"] for r in records] == [len(whole[i]) for i in order]
            assert [r["shared_tokens"] for r in records] == [shared[i] for i in order]
        assert sum(shared) > 0.7 * 450  # of 0.67 + 0.33 + 0 lengths


@pytest.mark.parametrize("tail", [{}, {"tail_size": 0}, {"tail_size": 32, "tail_chunk_size": 8}])
@pytest.mark.parametrize("sizes", [(128, 128, 128), (127, 128, 129), (96, 160, 96), (1, 33, 32), (129, 65, 129)])
def test_prompts_that_are_equal_or_begin_each_other(
    llm: minirea.LLM, tail: dict[str, int], sizes: tuple[int, ...]
) -> None:
    llm = llm.with_attention("reattention", **SCOPE | tail)
    whole = random_ids(200, 2048, seed=4)
    questions = [Question(whole[:size], [""], lambda _: 0.0, max_tokens=6) for size in sizes]
    cell = PromptCell(tuple({"question": i} for i in range(3)), 200, lambda: Prompt([], questions))
    answers = [record["answer"] for record in cell.run(llm, [0, 1, 2], progress=False)]
    assert answers == [llm.generate(whole[:size], max_tokens=6).text for size in sizes]


@pytest.mark.parametrize("separate", [False, True])
def test_as_session_a_question_is_a_piece_of_its_own(llm: minirea.LLM, separate: bool) -> None:
    options = {"lengths": 450, "samples": 1, "depths": 3, "separate": separate, "as_session": True}
    (cell,) = make_task(task_class("needle"), options).cells(llm.tokenizer)
    prompt = cell.build()
    for order in ([0, 1, 2], [2, 0]):
        for index, record in zip(order, cell.run(llm, order, progress=False), strict=True):
            session, question = llm.session(), prompt.questions[index]
            session.prefill([*prompt.context, *question.context])
            out = session.generate(question.ids, max_tokens=16, stop=["\n"])
            assert record["answer"] == out.text
            assert record["prompt_tokens"] == out.stats.prompt_tokens


def test_common_prefix() -> None:
    for one, other, shared in (([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2], 2), ([1, 2, 3], [1, 3, 3], 1)):
        assert common_prefix(one, other) == common_prefix(other, one) == shared


def test_a_dynamic_rope_shares_nothing_and_answers_alike(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    llm = minirea.load(write_model(tmp_path, rope_parameters=rope), device="cpu", attention="full")
    assert llm.num_shared(700, [705, 790]) == 0
    context = random_ids(700, 2048)
    questions = [Question(random_ids(size, 2048, seed=size), [""], lambda _: 0.0, 8) for size in (5, 90)]
    cell = PromptCell(({"question": 0}, {"question": 1}), 700, lambda: Prompt(context, questions))
    for record, question in zip(cell.run(llm, [0, 1], progress=False), questions, strict=True):
        assert record["shared_tokens"] == 0
        assert record["answer"] == llm.generate([*context, *question.ids], max_tokens=8).text


def test_records_hold_what_a_reader_needs(llm: minirea.LLM) -> None:
    records = minirea.evaluate("needle", llm, attention="reattention,full", **NEEDLE).records
    assert len({record["id"] for record in records}) == len(records) == 2 * 2 * 2 * 3
    first = records[0]
    assert first["id"] == "reattention length=300 depth=0.0 sample=0"
    assert first["prompt_tokens"] + 16 == 300
    assert first["shared_tokens"] == (300 - 16 - 64) // 32 * 32  # whole chunks before the tail
    assert first["settings"]["local_size"] == 64
    assert first["settings"]["seed"] == 5
    assert {r["attention"] for r in records} == {"reattention", "full"}
    for record in records:
        assert record["score"] in (0.0, 1.0)
        assert len(record["prompt_sha256"]) == 16
        assert record["cache_bytes"] > 0
    by_mode = {m: [r["prompt_sha256"] for r in records if r["attention"] == m] for m in ("reattention", "full")}
    assert by_mode["reattention"] == by_mode["full"]  # the same prompts
    assert len(set(by_mode["full"])) == 12


def test_a_models_own_dense_size_stays_and_a_default_follows(llm: minirea.LLM) -> None:
    """A default follows from fields that an evaluation overrides, also of a model that was loaded for streaming."""
    options: dict[str, Any] = {"lengths": 300, "samples": 1, "global_size": 2}
    for mode, fields, expected in (
        ("reattention", {}, 2 + 64 + 6 * 8),
        ("streaming", {}, 2 + 64 + 6 * 8),
        ("reattention", {"dense_size": 116}, 2 + 64 + 6 * 8),  # what the default would be
        ("reattention", {"dense_size": 100}, 100),
    ):
        varied = llm.with_attention(mode, **SCOPE | fields)
        (record,) = minirea.evaluate("needle", varied, depths=1, **options).records
        assert record["settings"]["dense_size"] == expected


def test_what_follows_from_an_overridden_field_follows(llm: minirea.LLM) -> None:
    """Of a loaded model too: fewer spans are fewer for a decode step, unless the model was loaded with a number."""
    for fields, expected in (({}, 3), ({"decode_spans": 2}, 2)):
        varied = llm.with_attention("reattention", **SCOPE | fields)
        (record,) = minirea.evaluate("needle", varied, lengths=300, samples=1, depths=1, max_spans=3).records
        assert record["settings"]["decode_spans"] == expected


@pytest.mark.parametrize("how", [{}, {"separate": True}, {"as_session": True}])
def test_sources_of_the_answers_are_noted_and_the_needle_is_the_first(how: dict[str, Any], tmp_path: Path) -> None:
    """The answers are the same without; a directory goes on with the same flags only."""
    options: dict[str, Any] = {"lengths": "1k", "depths": 3, "samples": 1, "device": "cpu"} | how
    plain = minirea.evaluate("needle", DEMO, out=tmp_path / "plain", **options)
    found = minirea.evaluate("needle", DEMO, out=tmp_path / "sourced", sources=2, **options)
    assert [r["answer"] for r in found.records] == [r["answer"] for r in plain.records]
    assert [r["score"] for r in found.records] == [1.0] * 3
    assert [r["source_rank"] for r in found.records] == [1] * 3
    for record in found.records:
        assert 1 <= len(record["sources"]) <= 2
        start, end, share = record["sources"][0]
        assert 0 <= start < end <= record["prompt_tokens"] and 0.5 < share <= 1
    (row,) = json_of(tmp_path / "sourced")["rows"]
    assert (row["right_answers"], row["needle_first"]) == (3, 1.0)
    assert "reattention, needle first  100.0" in found.table and "needle first" not in plain.table
    assert "needle_first" not in json_of(tmp_path / "plain")["rows"][0]
    with pytest.raises(InputError, match="sources is null there and 2 here"):
        minirea.evaluate("needle", DEMO, out=tmp_path / "plain", sources=2, **options)
    assert minirea.evaluate("needle", DEMO, out=tmp_path / "plain", **options).records == plain.records


def test_the_callers_default_device_does_not_matter(llm: minirea.LLM) -> None:
    tasks: dict[str, dict[str, Any]] = {
        "needle": NEEDLE | {"sources": 2},
        "mechanism": {"lengths": 300, "samples": 1, "studies": "overlap"},
    }
    for task, options in tasks.items():
        found = []
        for device in ("cpu", "meta"):
            with torch.device(device):
                found.append(timeless(minirea.evaluate(task, llm, **options).records))
        assert found[0] == found[1]


def test_how_often_the_needle_is_the_first_source() -> None:
    """Of right answers alone; none are right in the second mode, and the third has no sources."""
    rows = [("reattention", 1.0, 1), ("reattention", 1.0, 3), ("reattention", 0.0, 1), ("reattention", 1.0, None)]
    rows += [("full", 0.0, 1)]
    records = [
        {"id": str(i), "attention": mode, "length": 1024, "depth": 0.5, "score": score, "source_rank": rank}
        for i, (mode, score, rank) in enumerate(rows)
    ]
    records.append({"id": "9", "attention": "streaming", "length": 1024, "depth": 0.5, "score": 1.0})
    task = make_task(task_class("needle"), {})
    summary = {row["attention"]: row for row in task.summarize(records)}
    assert summary["reattention"]["needle_first"] == pytest.approx(1 / 3)
    assert [summary[mode].get("right_answers") for mode in MODES] == [3, None, 0]
    assert task.table(list(summary.values()))[-2:] == [
        ["reattention, needle first", "33.3"],
        ["full, needle first", "-"],
    ]


def test_ids_are_found_where_they_stand() -> None:
    """Also where their bytes stand across other ids first, and where they are the end or not there."""
    whole = [1, 256 * 5, 5, 0, 7, 7, 9]
    assert [find_ids(part, whole) for part in ([1], [5], [0, 7], [7, 9], [9, 9], [7, 7, 9, 1])] == [
        0,
        2,
        3,
        5,
        None,
        None,
    ]
    across = [0x01000000, 0x00000002, 0x01, 0x0200]
    assert find_ids([0x0200 + 0x01], across) is None
    assert find_ids([0x01], across) == 2


def test_a_loaded_model_keeps_its_scope(llm: minirea.LLM) -> None:
    options = {name: value for name, value in NEEDLE.items() if name not in SCOPE} | {"lengths": 300, "samples": 1}
    for mode in MODES:
        records = minirea.evaluate("needle", llm.with_attention(mode, **SCOPE), attention=MODES, **options).records
        assert [r["settings"].get("span_size", 8) for r in records] == [8] * 9
        assert {r["attention"]: r["settings"].get("span_top_k") for r in records} == dict(
            zip(MODES, (4, 0, None), strict=True)
        )


def test_the_demo_model_finds_needles_beyond_its_context() -> None:
    options: dict[str, Any] = {"lengths": "2500", "depths": 3, "samples": 1}
    evaluation = minirea.evaluate("needle", DEMO, attention="reattention,streaming", device="cpu", **options)
    scores = {(row["attention"]): row["score_by_depth"] for row in evaluation.rows}
    assert scores["reattention"] == {"0.0": 1.0, "0.5": 1.0, "1.0": 1.0}
    assert scores["streaming"] == {"0.0": 1.0, "0.5": 0.0, "1.0": 1.0}
    assert evaluation.table.splitlines()[0].split() == ["attention", "2500"]
    assert evaluation.table.splitlines()[1].split() == ["reattention", "100.0"]


# ---------------------------------------------------------------------------------------------------------------
# Interruptions
# ---------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def uninterrupted(llm: minirea.LLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "results"
    minirea.evaluate("needle", llm, attention=MODES, out=folder, **NEEDLE)
    return folder


def count_answers(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> Callable[[], int]:
    """Counts answers that are given from here on, and presses Ctrl-C in the middle of one."""
    asked = 0
    generate = minirea.Session.generate

    def counting(self: minirea.Session, *args: Any, **kwargs: Any) -> Any:
        nonlocal asked
        if asked == stop_after:
            raise KeyboardInterrupt
        asked += 1
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(minirea.Session, "generate", counting)
    return lambda: asked


@pytest.mark.parametrize("stop_after", [0, 1, 8, 35])
def test_resumed_run_gives_the_same_as_an_uninterrupted_one(
    llm: minirea.LLM, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    with monkeypatch.context() as patch:
        count_answers(patch, stop_after)
        with pytest.raises(KeyboardInterrupt):
            minirea.evaluate("needle", llm, attention=MODES, out=tmp_path, **NEEDLE)
    assert len(lines(tmp_path)) == stop_after
    asked = count_answers(monkeypatch)
    minirea.evaluate("needle", llm, attention=MODES, out=tmp_path, **NEEDLE)
    assert asked() == 36 - stop_after
    assert (tmp_path / "summary.json").read_bytes() == (uninterrupted / "summary.json").read_bytes()
    expected, found = ([json.loads(line) for line in lines(f)] for f in (uninterrupted, tmp_path))
    assert timeless(found) == timeless(expected)


@pytest.mark.parametrize("tear", [1, 40, 10_000])
def test_torn_last_line_is_asked_again(
    llm: minirea.LLM, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tear: int
) -> None:
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    whole = (tmp_path / "records.jsonl").read_bytes()
    cut = min(tear, len(lines(tmp_path)[-1]))
    (tmp_path / "records.jsonl").write_bytes(whole[: -1 - cut])
    asked = count_answers(monkeypatch)
    minirea.evaluate("needle", llm, attention=MODES, out=tmp_path, **NEEDLE)
    assert asked() == 1
    assert [json.loads(line)["id"] for line in lines(tmp_path)] == [
        json.loads(line)["id"] for line in lines(uninterrupted)
    ]
    assert (tmp_path / "summary.json").read_bytes() == (uninterrupted / "summary.json").read_bytes()


def test_a_directory_grows_by_lengths_samples_and_modes(
    llm: minirea.LLM, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = NEEDLE | {"lengths": (450,), "samples": 1}
    minirea.evaluate("needle", llm, attention="full", out=tmp_path, **small)
    asked = count_answers(monkeypatch)
    grown = minirea.evaluate("needle", llm, attention=MODES, out=tmp_path, **NEEDLE)
    assert asked() == 33
    expected = {json.loads(line)["id"]: json.loads(line) for line in lines(uninterrupted)}
    assert timeless(grown.records) == timeless([expected[record["id"]] for record in grown.records])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, "seed is 5 there and 6 here"),
        ({"depths": 2}, "depths is 3 there and 2 here"),
        ({"local_size": 60}, "local_size is 64 there and 60 here"),
        ({"task": "passkey"}, 'task is "needle" there and "passkey" here'),
    ],
)
def test_results_of_other_settings_are_refused(
    llm: minirea.LLM, uninterrupted: Path, change: dict[str, Any], message: str
) -> None:
    options = {"task": "needle"} | NEEDLE | change
    before = (uninterrupted / "records.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"^out is '.*', which belongs to another evaluation: ") as error:
        minirea.evaluate(model=llm, out=uninterrupted, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert (uninterrupted / "records.jsonl").read_bytes() == before


def test_results_of_another_model_are_refused(uninterrupted: Path, tmp_path: Path) -> None:
    other = minirea.load(write_model(tmp_path, seed=1), device="cpu", **SCOPE)
    with pytest.raises(InputError, match="which belongs to another evaluation: model is"):
        minirea.evaluate("needle", other, out=uninterrupted, **NEEDLE)


def test_directories_that_cannot_be_used(tmp_path: Path) -> None:
    settings = {"task": "needle"}
    with (
        Results(tmp_path / "busy", settings),
        pytest.raises(InputError, match="which another evaluation is writing to"),
    ):
        Results(tmp_path / "busy", settings)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^out is '.*file', which cannot be written"):
        Results(tmp_path / "file", settings)
    (tmp_path / "stray").mkdir()
    (tmp_path / "stray" / "records.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"has records.jsonl but no settings.json"):
        Results(tmp_path / "stray", settings)
    (tmp_path / "stray" / "settings.json").write_text("[")
    with pytest.raises(InputError, match=r"settings.json: not a JSON object"):
        Results(tmp_path / "stray", settings)
    (tmp_path / "stray" / "settings.json").write_text('{"task": "needle"}')
    for line in ("{}", "[1]", "\x00", '{"id": 3}'):
        (tmp_path / "stray" / "records.jsonl").write_text(f"{json.dumps(GOOD)}\n{line}\n")
        with pytest.raises(InputError, match=r"records.jsonl: line 2 is no record"):
            Results(tmp_path / "stray", settings)


@pytest.mark.parametrize(
    ("task", "change", "said"),
    [
        *((name, {"score": None}, "score is null, expected a number, or `skipped`") for name in names()[:6]),
        ("needle", {"depth": None}, "it has no depth"),
        ("needle", {"depth": [1]}, "depth is "),
        ("perplexity", {"score": None}, "it has no buckets"),
        ("perplexity", {"score": None, "buckets": 3}, "a field has another type or value"),
        ("mechanism", {"score": None, "study": "sweep"}, "a field has another type or value"),
    ],
)
def test_a_record_that_cannot_be_summarized_says_why(
    tmp_path: Path, task: str, change: dict[str, Any], said: str
) -> None:
    record = {"id": "a", "attention": "full", "score": 1.0, "length": 300, "depth": 0.5, "kind": "x"} | change
    record = {name: value for name, value in record.items() if value is not None or name == "score"}
    (tmp_path / "settings.json").write_text(json.dumps({"task": task}))
    (tmp_path / "records.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(
        InputError, match=re.escape(f"records.jsonl: line 1 is no record of this task: {said}")
    ) as error:
        report([tmp_path], tmp_path / "out")
    assert "Error" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("task", "options", "what"),
    [
        ("perplexity", {"text": DEMO / "README.md"}, "evaluations of perplexity"),
        *(("mechanism", {"studies": study}, "studies of attention") for study in ("spread", "overlap")),
        ("needle", {"sources": 1}, "sources"),
    ],
)
def test_what_several_devices_cannot_do_is_refused_before_the_weights_are_read(
    model: Path, monkeypatch: pytest.MonkeyPatch, task: str, options: dict[str, Any], what: str
) -> None:
    monkeypatch.setattr("minirea.api.ModelFiles.load", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(InputError, match=f"^gpus is 2, expected 1: {what} do not work on several devices$"):
        minirea.evaluate(task, model, device="cpu", gpus=2, lengths=300, **options)


@pytest.mark.parametrize("name", ["records.jsonl", "settings.json", "summary.json"])
def test_results_that_are_no_files(tmp_path: Path, name: str) -> None:
    """Of a summary only the machine counts, which is then not known."""
    settings = {"task": "needle"}
    with Results(tmp_path, settings) as results:
        results.add(GOOD)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    for read in (lambda: Results(tmp_path, settings).close(), lambda: read_results([tmp_path], [], lambda _: len)):
        if name == "summary.json":
            read()
            continue
        with pytest.raises(InputError, match=f"{name}: is a named pipe, expected a file"):
            read()


GOOD = {"id": "full length=300", "attention": "full", "length": 300, "depth": 0.5, "sample": 0, "score": 1.0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"score": ...}, "it has no score, expected a number or null"),
        ({"score": "1.0"}, 'score is "1.0", expected a number or null'),
        ({"score": [1.0]}, "score is [1.0], expected a number or null"),
        ({"score": True}, "score is true, expected a number or null"),
        ({"score": 2}, "score is 2, expected 0 to 1"),
        ({"score": float("nan")}, "it holds NaN, expected finite numbers"),
        ({"key": {"a": [float("inf")]}}, "it holds Infinity, expected finite numbers"),
        ({"attention": ...}, "it has no attention, expected text"),
        ({"attention": 3}, "attention is 3, expected text"),
        ({"length": "300"}, 'length is "300", expected an integer'),
        ({"length": None}, "length is null, expected an integer"),
        ({"depth": {}}, "depth is {}, expected a number"),
        ({"depth": ...}, "it has no depth"),
        ({"score": None}, "score is null, expected a number, or `skipped`"),
        ("[" * 100_000 + "]" * 100_000, "it is nested too deeply"),
        ("{" * 3, "not JSON: "),
        ({"score": 0.5}, "has the id of line 1 and another score"),
    ],
)
def test_records_that_are_none_are_told_by_line_and_never_averaged(
    uninterrupted: Path, tmp_path: Path, llm: minirea.LLM, line: Any, message: str
) -> None:
    shutil.copy(uninterrupted / "settings.json", tmp_path)
    first = GOOD | {"id": "first"} if message.startswith("has the id") is False else GOOD
    bad = line if isinstance(line, str) else json.dumps({k: v for k, v in (GOOD | line).items() if v is not ...})
    (tmp_path / RECORDS).write_text(f"{json.dumps(first)}\n{bad}\n")
    before = (tmp_path / RECORDS).read_bytes()
    with pytest.raises(InputError, match=rf"{RECORDS}: line 2 ") as error:
        minirea.evaluate("needle", llm, out=tmp_path, **NEEDLE)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=rf"{RECORDS}: line 2 "):
        report([tmp_path], tmp_path / "report")
    assert (tmp_path / RECORDS).read_bytes() == before
    assert not (tmp_path / "summary.json").exists()


def test_a_record_that_was_skipped_may_come_again(uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copy(uninterrupted / "settings.json", tmp_path)
    records = [GOOD | {"score": None, "skipped": "too long"}, GOOD, GOOD]
    (tmp_path / RECORDS).write_text("".join(json.dumps(record) + "\n" for record in records))
    assert [record["score"] for record in report([tmp_path], tmp_path / "report").records] == [1.0]


class FullDisk(FileIO):
    """A file that takes half of the last line and then no more."""

    room = 0

    def write(self, data: Any) -> int:
        if not FullDisk.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        FullDisk.room -= 1
        return super().write(data[: max(1, len(data) // 2)])


def test_a_full_disk_is_one_line_and_loses_no_answer(
    llm: minirea.LLM, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(records_module, "FileIO", FullDisk)
        FullDisk.room = 31
        with pytest.raises(InputError, match=r"^out is '.*', which cannot be written: No space left") as error:
            minirea.evaluate("needle", llm, attention=MODES, out=tmp_path, **NEEDLE)
    assert "the answers that records.jsonl holds stay" in str(error.value)
    kept = lines(tmp_path)
    assert 0 < len(kept) < 36
    assert all(json.loads(line)["id"] for line in kept)
    asked = count_answers(monkeypatch)
    minirea.evaluate("needle", llm, attention=MODES, out=tmp_path, **NEEDLE)
    assert asked() == 36 - len(kept)
    assert (tmp_path / "summary.json").read_bytes() == (uninterrupted / "summary.json").read_bytes()


@pytest.mark.parametrize("name", ["settings.json", "summary.json"])
def test_a_summary_that_cannot_be_written_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if name == "settings.json":
            patch.setattr(os, "replace", refuse)
        with pytest.raises(InputError, match="which cannot be written"), Results(tmp_path, {"task": "x"}) as results:  # noqa: PT012
            patch.setattr(os, "replace", refuse)
            results.summarize({})
    assert not list(tmp_path.glob("*.tmp"))


def test_records_removed_in_mid_run_are_written_anew(tmp_path: Path) -> None:
    with Results(tmp_path / "r", {"task": "x"}) as results:
        for index in range(4):
            results.add(GOOD | {"id": str(index)})
            if index == 1:
                shutil.rmtree(tmp_path / "r")
        results.summarize({})
        (tmp_path / "r" / RECORDS).unlink()
        results.summarize({})
        assert [json.loads(line)["id"] for line in lines(tmp_path / "r")] == ["0", "1", "2", "3"]
        with pytest.raises(InputError, match="which another evaluation is writing to"):
            Results(tmp_path / "r", {"task": "x"})
        (tmp_path / "other").write_text("")
        (tmp_path / "other").replace(tmp_path / "r" / RECORDS)
        with pytest.raises(InputError, match=r"whose records.jsonl another program has replaced"):
            results.add(GOOD)


def test_a_run_of_less_shows_all_that_the_directory_holds(
    llm: minirea.LLM, uninterrupted: Path, tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    (tmp_path / "summary.json").write_text(json.dumps({"environment": {"machine": "another", "torch": "1"}}))
    less = NEEDLE | {"lengths": (300,), "samples": 1}
    evaluation = minirea.evaluate("needle", llm, attention="full", out=tmp_path, **less)
    assert len(evaluation.records) == 36
    rows = {(row["attention"], row["length"]): row for row in evaluation.rows}
    expected = {(row["attention"], row["length"]): row for row in json_of(uninterrupted)["rows"]}
    assert rows == expected
    assert json_of(tmp_path)["environment"]["machine"][0] == "another"


def test_another_model_is_told_by_name_before_its_weights_are_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = NEEDLE | {"samples": 1, "lengths": (300,)}
    minirea.evaluate("needle", model, out=tmp_path / "out", device="cpu", **options)
    other = write_model(tmp_path / "other", num_hidden_layers=1)
    moved = shutil.copytree(model, tmp_path / "moved")
    minirea.evaluate("needle", moved, out=tmp_path / "out", device="cpu", **options)  # the same under another name
    monkeypatch.setattr("minirea.loading.load_weights", None)
    with pytest.raises(InputError, match=rf'evaluation: model is "{model.name}" there and "other" here'):
        minirea.evaluate("needle", other, out=tmp_path / "out", device="cpu", **options)
    with pytest.raises(InputError, match="seed is 5 there and 6 here"):
        minirea.evaluate("needle", model, out=tmp_path / "out", device="cpu", **options | {"seed": 6})


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("needle", {"samples": 10**12}),
        ("needle", {"depths": 10**12}),
        ("needle", {"share": 10**12}),
        ("needle", {"separate": True, "needles": 10**12}),
        ("needle", {"samples": 10**5, "depths": 10**4}),
        ("passkey", {"depths": 10**12}),
        ("passkey", {"samples": 10**12}),
        ("kv", {"samples": 10**12}),
        ("number-string", {"depths": 10**12}),
        ("code-run", {"samples": 10**12}),
        ("code-run", {"calls": (10**12,)}),
        ("ruler", {"samples": 10**12}),
        ("perplexity", {"samples": 10**12, "text": ("x",)}),
        ("mechanism", {"samples": 10**12}),
        ("mechanism", {"depths": 10**12}),
    ],
)
def test_more_than_a_run_could_list_is_refused_at_once(task: str, options: dict[str, Any]) -> None:
    name = "samples" if len(options) == 2 and "depths" in options else next(n for n in options if options[n] != True)  # noqa: E712
    with pytest.raises(InputError, match=rf"^{name} is .*expected .*(\d to|at most) "):
        make_task(task_class(task), options)


@pytest.mark.parametrize("name", ["needle", "passkey", "kv", "number-string", "code-run", "ruler"])
def test_what_cannot_fit_is_skipped_before_a_prompt_is_made(
    llm: minirea.LLM, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def refuse(_: minirea.LLM, capacity: int = 0) -> Any:
        raise MemoryLimitError(f"{capacity} do not fit")

    monkeypatch.setattr(minirea.LLM, "session", refuse)
    monkeypatch.setattr(Stretch, "head", None)
    monkeypatch.setattr(Haystack, "stretch", None)
    records = minirea.evaluate(name, llm, lengths="200m", samples=1).records
    assert records
    assert {record["skipped"] for record in records} == {f"{200 * 2**20} do not fit"}


def test_a_report_of_parts_is_that_of_the_whole(llm: minirea.LLM, uninterrupted: Path, tmp_path: Path) -> None:
    parts = []
    for mode in MODES:
        parts.append(tmp_path / mode)
        minirea.evaluate("needle", llm, attention=mode, out=parts[-1], at_most={"full": 300}, **NEEDLE)
    minirea.evaluate("needle", llm, attention="full", out=tmp_path / "rest", **NEEDLE | {"lengths": (450,)})
    report([*parts, tmp_path / "rest"], tmp_path / "all")
    found, expected = (json.loads((f / "summary.json").read_text()) for f in (tmp_path / "all", uninterrupted))
    assert found == expected
    before = (tmp_path / "all" / "records.jsonl").read_bytes()
    report([tmp_path / "all"], tmp_path / "all")
    assert (tmp_path / "all" / "records.jsonl").read_bytes() == before


def test_a_report_names_every_machine_and_keeps_the_first_answer(uninterrupted: Path, tmp_path: Path) -> None:
    records = [json.loads(line) for line in lines(uninterrupted)]
    assert {record["machine"] for record in records} == {json_of(uninterrupted)["environment"]["machine"]}
    parts = {"large": records[:4], "small": [*records[2:], records[0] | {"id": "full length=200", "length": 200}]}
    for machine, part in parts.items():
        folder = tmp_path / machine
        folder.mkdir()
        shutil.copy(uninterrupted / "settings.json", folder)
        named = (json.dumps(record | {"machine": machine}) + "\n" for record in part)
        (folder / "records.jsonl").write_text("".join(named))
        (folder / "summary.json").write_text(json.dumps({"environment": {"machine": machine, "torch": "2.11"}}))
    (tmp_path / "small" / "summary.json").write_text("[]")
    report([tmp_path / "large", tmp_path / "small"], tmp_path / "unsaid")
    assert json_of(tmp_path / "unsaid")["environment"] == {"machine": "large", "torch": "2.11"}
    (tmp_path / "small" / "summary.json").write_text('{"environment": {"machine": "small", "torch": "2.11"}}')
    whole = report([tmp_path / "large", tmp_path / "small"], tmp_path / "all")
    assert [record["machine"] for record in whole.records] == ["small", *["large"] * 4, *["small"] * (len(records) - 4)]
    assert [record["id"] for record in whole.records][1:] == [record["id"] for record in records]
    report([tmp_path / "all", tmp_path / "small"], tmp_path / "again")
    assert json_of(tmp_path / "again")["environment"] == {"machine": ["large", "small"], "torch": "2.11"}


def test_a_report_of_several_seeds_counts_each_answer_once(llm: minirea.LLM, tmp_path: Path) -> None:
    few = {"lengths": 300, "samples": 1, "depths": 2}
    for seed in (0, 1, 2):
        minirea.evaluate("passkey", llm, out=tmp_path / str(seed), seed=seed, **few)
    two = report([tmp_path / "0", tmp_path / "1"], tmp_path / "two", "seed")
    assert (len(two.records), two.settings["seed"]) == (4, [0, 1])
    report(tmp_path / "2", tmp_path / "alone", "seed")
    for order in (["two", "2", "1"], ["1", "2", "two"], ["alone", "two", "2"]):
        whole = report([tmp_path / name for name in order], tmp_path / order[0] / "all", differing="seed")
        assert len({record["id"] for record in whole.records}) == len(whole.records) == 6
        assert len({record["prompt_sha256"] for record in whole.records}) == 6


def test_a_report_of_different_evaluations_is_refused(llm: minirea.LLM, uninterrupted: Path, tmp_path: Path) -> None:
    minirea.evaluate("passkey", llm, out=tmp_path / "other", lengths=300, samples=1, depths=1)
    with pytest.raises(InputError, match="hold different evaluations: task is"):
        report([uninterrupted, tmp_path / "other"], tmp_path / "all")
    with pytest.raises(MissingFileError, match=r"nowhere: no settings.json"):
        report([tmp_path / "nowhere"], tmp_path / "all")
    assert not (tmp_path / "all").exists()


# ---------------------------------------------------------------------------------------------------------------
# What does not fit
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("error", [MemoryLimitError("too big"), torch.OutOfMemoryError("CUDA out of memory.\nTried")])
def test_what_does_not_fit_is_skipped_and_tried_again(
    llm: minirea.LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    session = minirea.LLM.session
    with monkeypatch.context() as patch:

        def refuse(self: minirea.LLM, capacity: int = 0) -> Any:
            if capacity > 400 and self.model.attention.mode == "full":
                raise error
            return session(self, capacity)

        patch.setattr(minirea.LLM, "session", refuse)
        evaluation = minirea.evaluate("needle", llm, attention="full,streaming", out=tmp_path, **NEEDLE)
    skipped = [record for record in evaluation.records if "skipped" in record]
    assert {(record["attention"], record["length"]) for record in skipped} == {("full", 450)}
    assert len(skipped) == 6
    assert skipped[0]["score"] is None
    assert str(error).splitlines()[0] in skipped[0]["skipped"]
    assert evaluation.table.splitlines()[1].split()[2] == "skipped"
    again = minirea.evaluate("needle", llm, attention="full,streaming", out=tmp_path, **NEEDLE)
    assert not any("skipped" in record for record in again.records)


def test_longer_than_wanted_is_skipped(llm: minirea.LLM) -> None:
    evaluation = minirea.evaluate("needle", llm, attention="full,streaming", at_most={"full": 300}, **NEEDLE)
    skipped = {(r["attention"], r["length"]) for r in evaluation.records if "skipped" in r}
    assert skipped == {("full", 450)}
    row = next(row for row in evaluation.rows if row["attention"] == "full" and row["length"] == 450)
    assert (row["score"], row["answers"], row["skipped"], row["score_by_depth"]) == (None, 0, 6, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "fast"}, r"^attention is 'fast', expected reattention, streaming, full"),
        ({"attention": ()}, r"^attention is '', expected different modes"),
        ({"attention": "full,full"}, r"^attention is 'full,full', expected different modes"),
        ({"attention": 5}, r"^attention is 5, expected reattention, streaming, full"),
        ({"attention": [5]}, r"^attention is '5', expected reattention, streaming, full"),
        ({"out": 5}, r"^out is 5, expected the name of a directory"),
        ({"at_most": 5}, r"^at_most is 5, expected a length"),
        ({"at_most": {"fast": 3}}, r"^at_most is 'fast', expected one of"),
        ({"at_most": {"full": "3x"}}, r"^at_most is 'full=3x', expected a number of tokens"),
        ({"task": "nidle"}, r"^task is 'nidle', expected one of needle, "),
        ({"task": []}, r"^task is \[\], expected one of needle, "),
        ({"at_most": np.array([1, 2])}, r"^at_most is array"),
        ({"span_size": 3}, r"^span_size is 3, expected an even number"),
        ({"model": "nowhere"}, r"nowhere"),
    ],
)
def test_arguments_that_cannot_be_used(llm: minirea.LLM, options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"task": "needle", "model": llm} | NEEDLE | options
    with pytest.raises(minirea.MinireaError, match=message):
        minirea.evaluate(**arguments)


def test_a_report_of_what_is_no_list_of_directories(uninterrupted: Path, tmp_path: Path) -> None:
    """One directory, and one setting, need no list."""
    for folders in (None, 5, [], [5], [[]], b"x", np.array(3)):
        with pytest.raises(InputError, match=r"^folders is .*, expected directories of results"):
            report(folders, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^differing is 5, expected settings"):
        report(uninterrupted, tmp_path, 5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^out is None, expected the name of a directory"):
        report(uninterrupted, None)  # type: ignore[arg-type]
    assert report(uninterrupted, tmp_path, "share").records == report([uninterrupted], tmp_path, ["share"]).records


WRONG: dict[Any, tuple[Any, ...]] = {
    int: (1.5, True, [[3]], "many"),
    float: (True, [[0.5]], "half"),
    parse_length: (1.5, -1, True, [[3]], "long"),
    parse_switch: (1, "yes", [True]),
}


@pytest.mark.parametrize("name", names())
def test_options_of_another_kind_are_refused_by_name(name: str, tmp_path: Path) -> None:
    task, count = task_class(name), 0
    needed = {f.name: tmp_path for f in dataclasses.fields(task) if f.metadata["option"].required}
    for field in dataclasses.fields(task):
        for value in WRONG.get(field.metadata["option"].parse, ()):
            with pytest.raises(minirea.InputError, match=f"^{field.name} is .*, expected "):
                make_task(task, needed | {field.name: value})
            count += 1
    assert count > 10


def test_options_may_be_numpys_and_paths_may_be_of_any_kind(tmp_path: Path) -> None:
    class Elsewhere:
        def __fspath__(self) -> str:
            return str(tmp_path)

    given = {"lengths": np.array([1024, 2048]), "samples": np.int64(2), "at": np.array([0.5]), "haystack": Elsewhere()}
    plain = {"lengths": (1024, 2048), "samples": 2, "at": (0.5,), "haystack": (tmp_path,)}
    assert make_task(task_class("needle"), given) == make_task(task_class("needle"), plain)


# ---------------------------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", names())
def test_every_task_has_flags_of_its_own(name: str) -> None:
    task = task_class(name)
    assert task.name == name
    fields = dataclasses.fields(task)
    others = {
        *SCOPE,
        "span_top_k",
        "span_scope",
        "attention",
        "out",
        "at_most",
        "model",
        "device",
        "dtype",
        "impl",
        "task",
    }
    assert not others & {field.name for field in fields}
    assert all("option" in field.metadata for field in fields)


def test_the_readme_lists_every_task() -> None:
    readme = (DEMO.parents[1] / "README.md").read_text()
    section = readme[readme.index("## Evaluation") : readme.index("## Speed")]
    assert set(names()) <= set(re.findall(r"`([\w-]+)`", section)) | set(re.findall(r"minirea eval ([\w-]+)", section))


def test_importing_the_tasks_does_not_import_torch() -> None:
    code = "import sys\nfrom minirea.evaluation import registry\n[registry.task_class(n) for n in registry.names()]\n"
    code += "print([m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_lengths_are_read_and_shown_with_their_units() -> None:
    assert [parse_length(text) for text in ("300", "4k", "64K", "1m")] == [300, 4096, 65536, 1048576]
    assert [short_length(length) for length in (300, 4096, 1048576, 3 * 2**19)] == ["300", "4K", "1M", "1536K"]
    for text in ("0", "-1", "", "4g", "1.5k"):
        with pytest.raises(ValueError, match="a number of tokens"):
            parse_length(text)


def test_table_is_aligned() -> None:
    assert render([["mode", "2K", "16K"], ["full", "100.0", "-"], ["reattention", "5.0", "skipped"]]) == (
        "mode            2K      16K\nfull         100.0        -\nreattention    5.0  skipped"
    )


# ---------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------
def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        status = main(["eval", *arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    return status, *capsys.readouterr()


@NEEDS_MATPLOTLIB
def test_command_gives_table_records_and_pictures(
    model: Path, llm: minirea.LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["needle", "--model", str(model), "--attention", "reattention,full", "--out", str(tmp_path), *FLAGS]
    status, out, err = run(capsys, *flags)
    evaluation = minirea.evaluate("needle", llm, attention="reattention,full", **NEEDLE)
    assert (status, out, err) == (0, evaluation.table + "\n", "")
    assert timeless([json.loads(line) for line in lines(tmp_path)]) == timeless(evaluation.records)
    assert json.loads((tmp_path / "summary.json").read_text())["rows"] == evaluation.rows
    for name in ("heatmap.png", "score.png", "cost.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_report_may_be_told_what_differs(uninterrupted: Path, tmp_path: Path) -> None:
    settings = json.loads((uninterrupted / "settings.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "records.jsonl").write_bytes(
        (uninterrupted / "records.jsonl").read_bytes().replace(b'"id": "', b'"id": "2 ')
    )
    (other / "settings.json").write_text(json.dumps(settings | {"share": 2, "seed": settings["seed"] + 1}))
    with pytest.raises(InputError, match="seed is"):
        report([uninterrupted, other], tmp_path / "all", differing=["share"])
    with pytest.raises(InputError, match=r"^differing is 'shares', expected settings of .*: task, seed, depths,"):
        report([uninterrupted, other], tmp_path / "all", differing=["share", "shares", "seed"])
    whole = report([uninterrupted, other], tmp_path / "all", differing=["share", "seed"])
    assert len(whole.records) == 2 * len((uninterrupted / "records.jsonl").read_bytes().splitlines())
    report([tmp_path / "all", other], tmp_path / "again", differing=["share", "seed"])
    for folder in (tmp_path / "all", tmp_path / "again"):
        assert json.loads((folder / "settings.json").read_text())["share"] == [settings["share"], 2]


@NEEDS_MATPLOTLIB
def test_names_of_models_and_texts_may_be_any_bytes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes that are no UTF-8, and what a picture would take for a formula that it cannot set."""
    named, text = (tmp_path / os.fsdecode(name) for name in (b"caf\xe9 $\\x$", b"book\xe9 $^$.txt"))
    named.mkdir()
    for file in model.iterdir():
        (named / file.name).symlink_to(file)
    text.write_text("It was a dark and stormy night. " * 99)
    tasks = {12: ["needle", *FLAGS], 1: ["perplexity", "--text", str(text), "--lengths", "300", "--samples", "1"]}
    for count, task in tasks.items():
        out = tmp_path / f"{count}"
        for _ in range(2):  # the second run finds all answers
            status, _, err = run(capsys, *task, "--model", str(named), "--out", str(out), "--quiet")
            assert (status, err, len(lines(out))) == (0, "", count)
    arguments = "explain", "--model", str(named), "--prompt", str(text), "--out", str(tmp_path / "why")
    assert main([*arguments, "--max-tokens", "2", "--quiet"]) == 0
    assert len(list((tmp_path / "why").iterdir())) == 3


@NEEDS_MATPLOTLIB
def test_pictures_do_not_depend_on_a_users_settings_and_leave_them(uninterrupted: Path, tmp_path: Path) -> None:
    import matplotlib

    settings = {"text.usetex": True, "font.family": ["a font that is not there"], "savefig.dpi": 5}
    sizes = []
    for given in ({}, settings):
        with matplotlib.rc_context(given):
            paths = report(uninterrupted, tmp_path / str(len(given))).plot(tmp_path)
            assert all(matplotlib.rcParams[name] == value for name, value in given.items())
        sizes.append([path.stat().st_size for path in paths])
    assert sizes[0] == sizes[1]


@NEEDS_MATPLOTLIB
def test_an_unknown_backend_of_matplotlib_is_one_line(uninterrupted: Path, tmp_path: Path) -> None:
    arguments = "eval", "report", uninterrupted, "--out", tmp_path
    environment = os.environ | {"MPLBACKEND": "nonsense"}
    command = [sys.executable, "-m", "minirea", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("minirea: error: matplotlib cannot be imported: Key backend: 'nonsense'")


@NEEDS_MATPLOTLIB
def test_pictures_leave_out_what_records_do_not_hold(uninterrupted: Path, tmp_path: Path) -> None:
    settings, records, _ = read_results([uninterrupted], (), lambda _: lambda _: None)
    damaged = [records[0] | {name: value} for name in (*plots._COSTS, "settings") for value in (None, "x")]
    no_speed = [record | {"shared_tokens": 1, "prompt_tokens": 9, "generated_tokens": 1} for record in records]
    for given, count in (([*damaged, *records], 2), (damaged, 1), (no_speed, 2)):
        pictures = plots.against_length(given, tmp_path, "needle", settings | {"model_name": "\udce9"})
        assert len(pictures) == count
    assert plots.read_tokens_per_second(records[0] | {"first_token_seconds": 0.0, "shared_seconds": 0.0}) is None


@NEEDS_MATPLOTLIB
def test_report_draws_again(uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "report", str(uninterrupted), "--out", str(tmp_path))
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["attention", *MODES]
    assert (tmp_path / "heatmap.png").exists()


def test_without_matplotlib_results_are_saved_and_the_extra_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, out, err = run(capsys, "needle", "--model", str(model), "--out", str(tmp_path), *FLAGS)
    assert status == 0
    assert out.startswith("attention")
    assert err.startswith("minirea: no pictures: matplotlib is not installed")
    assert "minirea[plot]" in err
    assert err.count("\n") == 1
    assert len(lines(tmp_path)) == 12
    with pytest.raises(MissingExtraError), plots.own_style():
        pass


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "the following arguments are required: TASK"),
        (["nidle"], 2, "nidle"),
        (["needle", "--out", "x"], 2, "the following arguments are required: --model"),
        (
            ["needle", "--model", "m", "--out", "x", "--lengths", "4q"],
            2,
            "--lengths: '4q', expected a number of tokens",
        ),
        (["needle", "--model", "m", "--out", "x", "--samples", "many"], 2, "--samples: 'many', expected an integer"),
        (
            ["needle", "--model", "m", "--out", "x", "--keys", "colours"],
            2,
            "--keys: 'colours', expected one of numbers",
        ),
        (["needle", "--model", "m", "--out", "x", "--at-most", "64k"], 2, "--at-most: '64k', expected MODE=LENGTH"),
        (["needle", "--model", "m", "--out", "x", "--samples", "0"], 1, "--samples is 0, expected at least 1"),
        (["needle", "--model", "m", "--out", "x", "--attention", "all"], 1, "--attention is 'all', expected"),
        (["needle", "--model", "m", "--out", "x", "--at-most", "full=x"], 1, "--at-most is 'full=x', expected"),
        (["needle", "--model", "nowhere", "--out", "x"], 1, "nowhere"),
        (
            ["needle", "--model", str(DEMO), "--out", "x", "--haystack", "no.txt"],
            1,
            "--haystack is no.txt: no such file",
        ),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    found, out, err = run(capsys, *arguments)
    assert (found, out) == (status, "")
    assert err.splitlines()[-1].startswith("minirea: error: ")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (tmp_path / "x").exists()


def test_ctrl_c_says_how_to_go_on(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    count_answers(monkeypatch, stop_after=4)
    status, out, err = run(capsys, "needle", "--model", str(model), "--out", str(tmp_path), *FLAGS)
    assert (status, out) == (130, "")
    assert f"{tmp_path} keeps the answers" in err
    assert len(lines(tmp_path)) == 4


def test_killed_in_the_middle_of_a_line_is_resumed(model: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """A process that is killed with no chance to clean up; then the same command again."""
    words = ["eval", "needle", "--model", str(model), "--out", str(tmp_path), "--attention", ",".join(MODES), *FLAGS]
    process = subprocess.Popen(
        [sys.executable, "-m", "minirea", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "records.jsonl").exists() or len(lines(tmp_path)) < 5:
        assert process.poll() is None
        time.sleep(0.01)  # rather than take its core
    process.kill()
    process.wait()
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"id": "torn')
    assert main(words) == 0
    assert (tmp_path / "summary.json").read_bytes() == (uninterrupted / "summary.json").read_bytes()


def test_help_of_a_task_shows_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "needle", "--help")
    assert status == 0
    assert "(default: 10)" in out
    assert "(default: 4096,16384)" in " ".join(out.split())


def test_help_marks_what_is_required_and_says_what_a_flag_takes(capsys: pytest.CaptureFixture[str]) -> None:
    for name in names():
        _, out, _ = run(capsys, name, "--help")
        text = " ".join(out.split())
        for field in dataclasses.fields(task_class(name)):
            flag = f"--{field.name.replace('_', '-')}"
            assert bool(re.search(rf"\[{flag}[ \]]", text)) != field.metadata["option"].required, (name, flag)
    for name, flag in (
        ("longbench", "--data"),
        ("leval", "--data"),
        ("infinitebench", "--data"),
        ("perplexity", "--text"),
    ):
        status, _, err = run(capsys, name, "--model", "m", "--out", "o")
        assert (status, f"the following arguments are required: {flag}" in err) == (2, True)
    _, out, _ = run(capsys, "needle", "--help")
    assert "share a haystack" in " ".join(out.split())


def test_the_defaults_that_help_shows_are_taken_by_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    count = 0
    for name in names():
        _, out, _ = run(capsys, name, "--help")
        for field in dataclasses.fields(task_class(name)):
            how, flag = field.metadata["option"], f"--{field.name.replace('_', '-')}"
            about = re.search(rf"^  {flag} .*?(?=\n  -|\Z|\n\n)", out, re.MULTILINE | re.DOTALL)
            assert about is not None
            shown = re.search(r"\(default: (.*)\)$", " ".join(about[0].split()))
            if shown is None or "(default" in how.help:
                continue
            typed = shown[1].split(" ") if how.many == "list" else [shown[1]]
            value = [parsed(field.name, json.loads(one) if one[:1] == '"' else one, how) for one in typed]
            if isinstance(field.default, str):
                assert value[0].split() == field.default.split()  # help breaks lines
            else:
                assert (tuple(one[0] for one in value) if how.many == "list" else value[0]) == field.default
            count += 1
    assert count > 40
