"""The command line as a user has it: streams, statistics, JSON, and how it ends when interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from testing import tiny_model, write_checkpoint, write_tokenizer

import minirea
from minirea.cli import main

PROMPT = "It was a quiet day in the harbour, and nothing at all had happened since noon. " * 3
FAST = ("--local-size", "24", "--global-size", "4", "--max-spans", "4", "--chunk-size", "16")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_checkpoint(tmp_path_factory.mktemp("model"), tiny_model())
    write_tokenizer(directory)
    return directory


def run(capsys: pytest.CaptureFixture[str], model: Path, *arguments: str) -> tuple[int, str, str]:
    status = main(["generate", "--model", str(model), "--ignore-eos", *FAST, *arguments])
    return status, *capsys.readouterr()


def command(model: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "minirea", "generate", "--model", str(model), "--ignore-eos", *FAST, *arguments]


def test_text_goes_to_stdout_and_statistics_to_stderr(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, model, "--text", PROMPT, "--max-tokens", "12")
    expected = minirea.load(model, local_size=24, global_size=4, max_spans=4, chunk_size=16).generate(
        PROMPT, max_tokens=12, ignore_eos=True
    )
    assert (status, out) == (0, expected.text + "\n")
    prompt_tokens = expected.stats.prompt_tokens
    assert f"prompt      {prompt_tokens:,} tokens" in err
    assert "generation  12 tokens" in err
    assert f"of {prompt_tokens + 11:,} tokens" in err
    assert "weights " in err
    assert "cache " in err
    assert "peak " in err


def test_quiet_prints_no_statistics(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, model, "--text", PROMPT, "--max-tokens", "2", "--quiet")[2] == ""


def test_json_is_one_object(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, text, _ = run(capsys, model, "--text", PROMPT, "--max-tokens", "12")
    _, out, _ = run(capsys, model, "--text", PROMPT, "--max-tokens", "12", "--json")
    record = json.loads(out)
    assert record["text"] + "\n" == text
    assert len(record["token_ids"]) == record["generated_tokens"] == 12
    assert record["finish_reason"] == "length"
    for key in (
        "prompt_tokens",
        "time_to_first_token",
        "tokens_per_second",
        "weight_bytes",
        "cache_bytes",
        "peak_bytes",
    ):
        assert record[key] > 0
    assert set(record["scope"]) == {"global", "selected", "local", "seq_len"}


def test_file_and_standard_input_are_the_same_prompt(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    _, expected, _ = run(capsys, model, "--text", PROMPT, "--max-tokens", "9")
    assert run(capsys, model, "--prompt", str(file), "--max-tokens", "9")[1] == expected
    with file.open() as standard_input:
        done = subprocess.run(
            command(model, "--prompt", "-", "--max-tokens", "9"), stdin=standard_input, capture_output=True, text=True
        )
    assert (done.returncode, done.stdout) == (0, expected)


def test_stop_strings_end_the_text(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, model, "--text", PROMPT, "--max-tokens", "30")
    stop = out[10:13]  # three tokens: the tokenizer's are single characters
    _, cut, _ = run(capsys, model, "--text", PROMPT, "--max-tokens", "30", "--stop", "never", "--stop", stop)
    assert cut == out[: out.index(stop)] + "\n"


def test_same_seed_same_text(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sample(seed: str) -> str:
        return run(capsys, model, "--text", PROMPT, "--max-tokens", "30", "--temperature", "1.5", "--seed", seed)[1]

    assert sample("7") == sample("7") != sample("8")


def test_chat_uses_the_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_checkpoint(tmp_path, tiny_model())
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    write_tokenizer(model, chat_template=template)
    _, chat, _ = run(capsys, model, "--text", "hello", "--chat", "--system", "be kind", "--max-tokens", "9", "--json")
    ids = minirea.load(model).tokenizer.encode("[system] be kind\n[user] hello\n[assistant]")
    assert json.loads(chat)["prompt_tokens"] == len(ids)


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_what_was_printed(model: Path, as_json: bool) -> None:
    process = subprocess.Popen(
        command(model, "--text", PROMPT, "--max-tokens", "10000000", *(["--json"] if as_json else [])),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    if as_json:
        while b"prefill" not in process.stderr.read1():  # type: ignore[union-attr]
            pass
        start = b""
    else:
        start = process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err
    if as_json and out:  # interrupted while it was still reading the prompt, there is nothing to report
        assert json.loads(out)["finish_reason"] == "interrupted"
    if not as_json:
        assert len(start + out) > 5
        assert b"ended by interrupted" in err


def test_ctrl_c_while_loading(model: Path) -> None:
    """A pipe that never ends holds the program before anything is loaded."""
    process = subprocess.Popen(command(model, "--prompt", "-"), stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_a_reader_that_leaves_is_no_crash(model: Path) -> None:
    read_end, write_end = os.pipe()
    process = subprocess.Popen(
        command(model, "--text", PROMPT, "--max-tokens", "100000"), stdout=write_end, stderr=subprocess.PIPE
    )
    os.close(write_end)
    assert os.read(read_end, 3)
    os.close(read_end)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"Traceback" not in err
    assert b"Exception" not in err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"minirea {minirea.__version__}\n"
