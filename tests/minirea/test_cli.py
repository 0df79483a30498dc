"""The command line as a user has it: streams, statistics, JSON, and how it ends when interrupted."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from testing import tiny_model, write_checkpoint, write_tokenizer

import minirea
from minirea import terminal
from minirea.cli import main
from minirea.cli.inputs import decode_texts
from minirea.cli.parser import make_parser
from minirea.evaluation.tasks.mechanism import SWEEPS

PROMPT = "It was a quiet day in the harbour, and nothing at all had happened since noon. " * 3
FAST = ("--local-size", "24", "--global-size", "4", "--max-spans", "4", "--chunk-size", "16")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(write_checkpoint(tmp_path_factory.mktemp("model"), tiny_model()))


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


def test_a_flag_that_is_yes_or_no(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--text", PROMPT, "--max-tokens", "12", "--span-size", "4", "--dense-size", "28")
    outs = [run(capsys, model, *flags, *carry)[1] for carry in ((), ("--no-carry-votes",), ("--carry-votes",))]
    fields = {"local_size": 24, "global_size": 4, "max_spans": 4, "chunk_size": 16, "span_size": 4, "dense_size": 28}
    expected = minirea.load(model, **fields, carry_votes=True).generate(PROMPT, max_tokens=12, ignore_eos=True)
    assert outs[0] == outs[1] != outs[2] == expected.text + "\n"


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


def test_an_error_in_an_answer_has_a_line_of_its_own(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Iterator[int]:
        yield from (40, 41)
        raise minirea.InputError("no more")

    monkeypatch.setattr("minirea.generate.decode", fail)
    for flags, text in (((), " E F\n"), (("--json",), "")):
        status = main(["generate", "--model", str(model), "--text", PROMPT, "--quiet", *flags])
        assert (status, *capsys.readouterr()) == (1, text, "minirea: error: no more\n")


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


def interrupt(process: subprocess.Popen[bytes], *pauses: float) -> tuple[bytes, bytes]:
    """Send SIGINT, and again after each pause in seconds; the rest of what the process writes."""
    process.send_signal(signal.SIGINT)
    for pause in pauses:
        time.sleep(pause)
        process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert b"Exception" not in err
    return out, err


def test_special_tokens_in_a_chat_are_text_unless_they_are_let_through(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_checkpoint(tmp_path, tiny_model())
    write_tokenizer(model, chat_template="{% for m in messages %}[{{ m.content }}]{% endfor %}")
    tokenizer = minirea.load(model).tokenizer
    counts = {}
    for flags in ((), ("--allow-special-tokens",)):
        _, out, _ = run(capsys, model, "--text", "a</s>b", "--chat", "--max-tokens", "1", "--json", *flags)
        counts[flags] = json.loads(out)["prompt_tokens"]
    assert counts[()] == len(tokenizer.encode("[a", False)) + len("</s>") + len("b]")
    assert counts[("--allow-special-tokens",)] == len(tokenizer.encode("[a</s>b]"))


@pytest.mark.parametrize("pauses", [(), (0.001, 0.001)])
@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_what_was_generated(model: Path, as_json: bool, pauses: tuple[float, ...]) -> None:
    process = subprocess.Popen(
        command(model, "--text", PROMPT, "--max-tokens", "1000000", *(["--json"] if as_json else [])),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    start = process.stdout.read(5) if not as_json else process.stderr.read(1)  # a bar: it has begun to read
    out, err = interrupt(process, *pauses)
    out = (b"" if as_json else start) + out
    if as_json:
        record = json.loads(out)
        assert record["finish_reason"] == "interrupted"
        assert len(record["token_ids"]) == record.get("generated_tokens", 0)
    else:
        assert len(out) > 5
        assert out.endswith(b"\n")
        assert pauses or b"ended by interrupted" in err


def test_ctrl_c_while_a_context_is_read_says_that_it_is_not_kept(model: Path, tmp_path: Path) -> None:
    text, kept = tmp_path / "text", tmp_path / "kept.ctx"
    text.write_text(PROMPT * 2000)
    arguments = ["-m", "minirea", "read", "--model", str(model), "--prompt", str(text), "--save", str(kept)]
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    process.stderr.read(1)  # a bar: it has begun to load or to read
    _, err = interrupt(process)
    assert err.endswith(f"\nminirea: interrupted; {kept} is not written\n".encode())
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


@pytest.mark.parametrize("count", [1, 3])
def test_ctrl_c_at_any_time_of_a_start(model: Path, count: int) -> None:
    """From the first import that is minirea's own, through torch's, to loading."""
    for module in ("argparse", "torch", "minirea.weights.loader")[: 4 - count]:
        code = (
            "import os, signal, sys\n"
            "class Strike:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            f"        if name == {module!r}:\n"
            f"            for _ in range({count}): os.kill(os.getpid(), signal.SIGINT)\n"
            "from minirea.__main__ import command\n"
            f"sys.modules.pop({module!r}, None)\n"
            "sys.meta_path.insert(0, Strike())\n"
            "sys.exit(command())"
        )
        arguments = command(model, "--text", PROMPT)[3:]
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (130, b"", b""), module


def test_the_handler_of_the_caller_stays(model: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    assert main(["generate", "--model", str(model), "--text", "a", "--max-tokens", "1", "--quiet"]) == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_while_it_waits_for_the_prompt(model: Path) -> None:
    """A pipe that never ends holds the program before anything is loaded."""
    process = subprocess.Popen(command(model, "--prompt", "-"), stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None and process.stderr is not None
    process.stdin.write(b"a" * 2**21)  # more than a pipe holds, so that the program has begun to read it
    process.stdin.flush()
    process.send_signal(signal.SIGINT)
    with process:  # closes its pipes
        assert (process.wait(), process.stderr.read()) == (130, b"")


def test_a_reader_that_leaves_is_no_crash(model: Path) -> None:
    read_end, write_end = os.pipe()
    process = subprocess.Popen(
        command(model, "--text", PROMPT, "--max-tokens", "100000"), stdout=write_end, stderr=subprocess.PIPE
    )
    os.close(write_end)
    assert os.read(read_end, 3)
    os.close(read_end)
    _, err = process.communicate()
    assert process.returncode == 1
    assert b"Traceback" not in err
    assert b"Exception" not in err


# A line of bash, the exit status, standard output (None: the text of an ordinary run), and a part of standard error.
STREAMS = {
    "full disk": (
        "MINIREA --text hello --quiet >/dev/full",
        1,
        "",
        "error: standard output: cannot be written: No space",
    ),
    "full disk, JSON": ("MINIREA --text hello --json --quiet >/dev/full", 1, "", "error: standard output: cannot be"),
    "no output": ("MINIREA --text hello >&-", 1, "", "error: standard output is closed"),
    "help to a full disk": ("MINIREA --help >/dev/full", 1, "", "error: standard output: cannot be written: No space"),
    "help unbuffered": ("PYTHONUNBUFFERED=1 MINIREA --help >/dev/full", 1, "", "error: standard output: cannot be"),
    "help to nobody": ("MINIREA --help >&-", 0, "", "usage: "),
    "no UTF-8": ("MINIREA --text $'hello \\xff'", 1, "", "error: --text: not UTF-8 text: found byte 0xff at offset 6"),
    "no UTF-8 to stop at": ("MINIREA --text hello --stop ok --stop $'\\xe9'", 1, "", "error: --stop: not UTF-8 text"),
    "no input": ("MINIREA --prompt - <&-", 1, "", "error: --prompt standard input: is closed"),
    "endless input": ("MINIREA --prompt /dev/stdin </dev/zero", 1, "", "more than 100,000 bytes"),
    "pipe, no error stream": ("printf hello | MINIREA --prompt /dev/stdin 2>&-", 0, None, ""),
    "process substitution, full error stream": ("MINIREA --prompt <(printf hello) 2>/dev/full", 0, None, ""),
    "nothing but output": ("MINIREA --text hello <&- 2>&-", 0, None, ""),
    "no directory": (
        'cd "$(mktemp -d)"; rmdir "$PWD"; MINIREA --text hello',
        1,
        "",
        "error: the current directory has been deleted, expected one that is there",
    ),
    "little memory": ("ulimit -v 300000; MINIREA --text hello", 1, "", "error: "),
}


@pytest.fixture(scope="module")
def few_tokens(model: Path) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(command(model, "--text", "hello", "--max-tokens", "3", "--quiet")[3:]) == 0
    return out.getvalue()


@pytest.mark.parametrize("case", STREAMS)
def test_streams_and_limits(case: str, model: Path, few_tokens: str) -> None:
    line, status, out, err = STREAMS[case]
    code = "import sys, minirea.cli as cli; cli.inputs.PROMPT_LIMIT = 100_000; sys.exit(cli.run_process())"
    words = [sys.executable, "-c", code, *command(model, "--max-tokens", "3")[3:]]
    done = subprocess.run(
        ["bash", "-c", "unset PYTHONUNBUFFERED; " + line.replace("MINIREA", shlex.join(words))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (status, few_tokens if out is None else out), done.stderr
    assert err in done.stderr
    assert done.stderr.count("\n") <= status or "usage: " in err
    assert "Traceback" not in done.stderr


def test_texts_are_utf8_in_every_locale() -> None:
    """In the C locale Python decodes no other bytes than ASCII; they are to be UTF-8 all the same."""
    arguments = argparse.Namespace(
        command="generate", text="caf\udcc3\udca9", system=None, stop=["\udce2\udc98\udcba", "a"]
    )
    decode_texts(arguments)
    assert (arguments.text, arguments.system, arguments.stop) == ("café", None, ["☺", "a"])
    files = argparse.Namespace(command="eval", text=("caf\udce9.txt",))  # names, which may be any bytes
    decode_texts(files)
    assert files.text == ("caf\udce9.txt",)


def test_output_that_its_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, expected in (
        ("ascii", rb"na\xefve \u263a"),
        ("latin-1", b"na\xefve \\u263a"),
        ("utf-8", "naïve ☺".encode()),
    ):
        raw = io.BytesIO()
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding))
        terminal.put("naïve ☺")
        assert raw.getvalue() == expected


def test_a_byte_order_mark_is_no_text(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, mark in (("plain", b""), ("marked", b"\xef\xbb\xbf")):
        (tmp_path / name).write_bytes(mark + PROMPT.encode())
    records = [
        json.loads(run(capsys, model, "--prompt", str(tmp_path / name), "--max-tokens", "4", "--json")[1])
        for name in ("plain", "marked")
    ]
    assert records[0]["token_ids"] == records[1]["token_ids"]
    assert records[0]["prompt_tokens"] == records[1]["prompt_tokens"]


def test_dry_run_prints_the_plan_and_stops(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minirea.loading.load_weights", lambda *_: pytest.fail("the weights were read"))
    status, out, err = run(capsys, model, "--text", PROMPT, "--max-tokens", "12", "--dry-run")
    assert (status, err) == (0, "")
    for part in ("device      cpu, float32", "12 to generate", "weights ", "cache ", "workspace ", "that are free"):
        assert part in out
    record = json.loads(run(capsys, model, "--text", PROMPT, "--max-tokens", "12", "--dry-run", "--json")[1])
    assert record["num_tokens"] == record["prompt_tokens"] + 12
    assert record["peak_bytes"] >= record["weights_bytes"] + record["cache_bytes"] + record["workspace_bytes"]
    status, out, err = run(capsys, model, "--text", PROMPT, "--max-tokens", "1000000000000", "--dry-run")
    assert (status, "cache " in out) == (1, True)
    assert "not enough memory" in err


def test_the_footer_says_what_ran(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--text", "hello", "--max-tokens", "2", "--temperature", "1")
    _, _, err = run(capsys, model, *arguments, "--seed", "7")
    assert re.search(
        r"^device      cpu, float32, reattention attention, torch, \d+ threads?, seed 7$", err, re.MULTILINE
    )
    record = json.loads(run(capsys, model, *arguments, "--json")[1])
    again = json.loads(run(capsys, model, *arguments, "--json", "--seed", str(record["seed"]))[1])
    assert record["token_ids"] == again["token_ids"]
    assert (record["device"], record["dtype"], record["impl"]) == ("cpu", "float32", "torch")
    assert record["threads"] >= 1


def test_full_attention_beyond_the_trained_context_says_so(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for mode, warned in (("full", True), ("reattention", False)):
        _, _, err = run(capsys, model, "--text", PROMPT * 2, "--max-tokens", "2", "--attention", mode)
        assert err.count("minirea: warning: full attention will see up to") == warned
        assert ("more than the trained 256" in err) == warned


def test_help_marks_what_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, flag in (
        (["generate"], "--model DIR"),
        (["eval", "perplexity"], "--text FILE"),
        (["eval", "longbench"], "--data DIR"),
        (["eval", "needle"], "--out DIR"),
    ):
        with pytest.raises(SystemExit):
            main([*arguments, "--help"])
        text = " ".join(capsys.readouterr().out.split("options:")[1].split())
        assert "(required)" in text[text.index(flag) :].split(" --")[0], (arguments, flag)


def test_the_default_sweeps_that_help_shows_are_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["eval", "mechanism", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    shown = text[text.rindex("--sweep FIELD=") :].split("(default: ")[1].split(")")[0]
    parsed = make_parser().parse_args(
        ["eval", "mechanism", "--model", "m", "--out", "o", "--sweep", *shlex.split(shown)]
    )
    assert tuple(parsed.sweep) == SWEEPS


def test_empty_names_are_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """Of files and directories, as of `--context "$NOT_SET"`: none is taken for absent, or for this directory."""

    def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
        yield parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for inner in action.choices.values():
                    yield from parsers(inner)

    checked = 0
    for parser in parsers(make_parser()):
        for action in parser._actions:
            if action.metavar in ("FILE", "DIR"):
                with pytest.raises(SystemExit) as stop:
                    parser.parse_args([*action.option_strings[:1], ""])
                assert stop.value.code == 2
                assert re.search("the name is empty, expected one|'', expected the name of", capsys.readouterr().err)
                checked += 1
    assert checked > 20


@pytest.mark.parametrize("words", [["read", "--save", "a.ctx"], ["explain", "--out", "a"]])
def test_one_prompt_where_one_is_read(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    parser = make_parser()
    assert parser.parse_args([*words, "--model", "m", "--prompt", "a"]).prompt == "a"
    with pytest.raises(SystemExit) as stop:
        parser.parse_args([*words, "--model", "m", "--prompt", "a", "--prompt", "b"])
    assert stop.value.code == 2
    assert "argument --prompt: given twice, 'a' and 'b', expected once" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"minirea {minirea.__version__}\n"
