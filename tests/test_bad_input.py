"""Every mistake a user can make gets one line that names what is wrong, and the right exit status."""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from testing import edit_json, tiny_model, write_checkpoint, write_tokenizer

import minirea
from minirea.cli import main
from minirea.cli.messages import as_flags

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(write_checkpoint(tmp_path_factory.mktemp("pristine"), tiny_model()))


@pytest.fixture
def directory(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command line."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def assert_one_line(err: str, *named: str) -> None:
    assert err.startswith("minirea: error: "), err
    assert err.count("\n") == 1, err
    for name in named:
        assert name in err


def config(**edits: object) -> Damage:
    return lambda directory: edit_json(directory / "config.json", **edits)


def write(name: str, data: bytes) -> Damage:
    return lambda directory: (directory / name).write_bytes(data)


def remove(*names: str) -> Damage:
    def damage(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return damage


def both(first: Damage, second: Damage) -> Damage:
    def damage(directory: Path) -> None:
        first(directory)
        second(directory)

    return damage


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Rewrite the weights after `edit` changed the dictionary of tensors."""

    def damage(directory: Path) -> None:
        weights = load_file(directory / "model.safetensors")
        edit(weights)
        save_file(weights, directory / "model.safetensors")

    return damage


def header(edit: Callable[[dict[str, dict]], object]) -> Damage:
    """Rewrite the safetensors header after `edit`, leaving the data as it is."""

    def damage(directory: Path) -> None:
        path = directory / "model.safetensors"
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        values = json.loads(raw[8 : 8 + length])
        edit(values)
        text = json.dumps(values).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return damage


def truncate(name: str, keep: float) -> Damage:
    def damage(directory: Path) -> None:
        raw = (directory / name).read_bytes()
        (directory / name).write_bytes(raw[: int(len(raw) * keep)])

    return damage


def poison(value: float) -> Damage:
    return tensors(lambda w: w["model.layers.1.mlp.down_proj.weight"].view(-1)[77].fill_(value))


NORM, HEAD = "model.norm.weight", "lm_head.weight"

# What is wrong with the directory, and what the message has to name.
BAD_DIRECTORIES: dict[str, tuple[Damage, list[str]]] = {
    "config empty": (write("config.json", b""), ["config.json", "JSON"]),
    "config cut off": (truncate("config.json", 0.5), ["config.json", "JSON"]),
    "config not an object": (write("config.json", b"[]"), ["config.json", "object"]),
    "config not UTF-8": (write("config.json", b"\xff\xff{}"), ["config.json"]),
    "no config": (remove("config.json"), ["config.json", "params.json"]),
    "architecture": (config(architectures=["MambaForCausalLM"]), ["architectures", "Mamba", "LlamaForCausalLM"]),
    "activation": (config(hidden_act="gelu"), ["hidden_act", "gelu", "silu"]),
    "rope type": (config(rope_parameters={"rope_type": "spiral"}), ["rope_type", "spiral", "llama3"]),
    "key absent": (config(hidden_size=None), ["hidden_size", "absent"]),
    "key of wrong type": (config(num_hidden_layers="two"), ["num_hidden_layers", "two"]),
    "negative size": (config(intermediate_size=-4), ["intermediate_size", "-4"]),
    "kv heads": (config(num_key_value_heads=3), ["num_key_value_heads", "3", "4"]),
    "odd head_dim": (config(head_dim=17), ["head_dim", "17"]),
    "quantized": (config(quantization_config={"bits": 4}), ["quantization_config"]),
    "no weights": (remove("model.safetensors"), ["safetensors"]),
    "only pickled weights": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        ["pytorch_model.bin", "safetensors"],
    ),
    "weights empty": (write("model.safetensors", b""), ["model.safetensors"]),
    "weights cut off": (truncate("model.safetensors", 0.7), ["model.safetensors"]),
    "weights cut off in the header": (truncate("model.safetensors", 0.001), ["model.safetensors"]),
    "header too large": (write("model.safetensors", struct.pack("<Q", 2**60) + b"{}"), ["model.safetensors", "header"]),
    "header not JSON": (write("model.safetensors", struct.pack("<Q", 4) + b"nope"), ["model.safetensors", "JSON"]),
    "overlapping offsets": (
        header(lambda h: h[NORM].update(data_offsets=[0, 256])),
        ["model.safetensors"],
    ),
    "offsets beyond the file": (
        header(lambda h: h[NORM].update(data_offsets=[10**9, 10**9 + 256])),
        ["model.safetensors"],
    ),
    "shape and bytes disagree": (header(lambda h: h[NORM].update(shape=[63])), [NORM]),
    "missing tensor": (tensors(lambda w: w.pop(NORM)), [NORM, "missing"]),
    "parameter of another model": (
        tensors(lambda w: w.update({"model.norm.bias": torch.zeros(64)})),
        ["model.norm.bias", "the config has no place"],
    ),
    "misshapen tensor": (tensors(lambda w: w.update({HEAD: torch.zeros(97, 63)})), [HEAD, "63", "64"]),
    "integer weights": (tensors(lambda w: w.update({NORM: torch.ones(64, dtype=torch.int8)})), [NORM, "I8"]),
    "NaN weights": (poison(float("nan")), ["model.layers.1.mlp.down_proj.weight"]),
    "infinite weights": (poison(float("inf")), ["model.layers.1.mlp.down_proj.weight"]),
    "fewer layers than configured": (config(num_hidden_layers=3), ["model.layers.2."]),
    "index names a shard that is not there": (
        both(
            remove("model.safetensors"),
            write("model.safetensors.index.json", b'{"weight_map": {"lm_head.weight": "model-9.safetensors"}}'),
        ),
        ["model-9.safetensors"],
    ),
    "index not JSON": (
        both(remove("model.safetensors"), write("model.safetensors.index.json", b"{")),
        ["model.safetensors.index.json", "JSON"],
    ),
    "tokenizer cut off": (truncate("tokenizer.json", 0.5), ["tokenizer.json"]),
    "tokenizer of another kind": (write("tokenizer.json", b'{"model": 3}'), ["tokenizer.json"]),
    "tokenizer config not JSON": (write("tokenizer_config.json", b"{"), ["tokenizer_config.json"]),
    "tokenizer config a link to nothing": (
        both(remove("tokenizer_config.json"), lambda d: (d / "tokenizer_config.json").symlink_to("gone")),
        ["tokenizer_config.json", "is a link to gone"],
    ),
    "weights a link to nothing": (
        both(remove("model.safetensors"), lambda d: (d / "model.safetensors").symlink_to("gone")),
        ["model.safetensors", "is a link to gone"],
    ),
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), ["tokenizer.json", "tokenizer.model"]),
    "SentencePiece model of noise": (
        both(remove("tokenizer.json"), write("tokenizer.model", b"\x00\x01noise" * 40)),
        ["tokenizer.model"],
    ),
    "tekken.json without a vocabulary": (
        both(remove("tokenizer.json"), write("tekken.json", b'{"config": {}}')),
        ["tekken.json"],
    ),
}


@pytest.mark.parametrize("case", BAD_DIRECTORIES)
def test_bad_directories(case: str, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, named = BAD_DIRECTORIES[case]
    damage(directory)
    status, out, err = run(capsys, "generate", "--model", directory, "--text", "hello", "--max-tokens", "2", "--quiet")
    assert (status, out) == (1, "")
    assert_one_line(err, *named)


def test_what_a_model_has_no_use_for_is_one_warning(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors(lambda w: w.update(v_head=torch.zeros(2), buffer=torch.arange(3)))(directory)
    status, out, err = run(capsys, "generate", "--model", directory, "--text", "hello", "--max-tokens", "2", "--quiet")
    assert status == 0
    assert out
    assert err.startswith("minirea: warning: ")
    assert err.count("\n") == 1
    assert "'buffer', 'v_head'" in err


def test_the_undamaged_directory_is_fine(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "generate", "--model", directory, "--text", "hello", "--max-tokens", "2", "--quiet")
    assert (status, err) == (0, "")
    assert out


# Arguments after the model, the exit status, and what the message has to name.
BAD_ARGUMENTS: dict[str, tuple[list[str], int, list[str]]] = {
    "empty text": (["--text", ""], 1, ["--text", "empty"]),
    "no such prompt file": (["--prompt", "nowhere.txt"], 1, ["--prompt nowhere.txt", "no such file"]),
    "prompt is a directory": (["--prompt", "."], 1, ["--prompt .", "directory"]),
    "text that is no Unicode": (["--text", "caf\udce9"], 1, ["--text", "byte 0xe9", "3"]),
    "no tokens wanted": (["--text", "a", "--max-tokens", "0"], 1, ["--max-tokens is 0", "at least 1"]),
    "negative temperature": (["--text", "a", "--temperature", "-1"], 1, ["--temperature is -1.0"]),
    "temperature not a number": (["--text", "a", "--temperature", "nan"], 1, ["--temperature is nan"]),
    "top-k": (["--text", "a", "--top-k", "-3"], 1, ["--top-k is -3"]),
    "top-p": (["--text", "a", "--top-p", "1.5"], 1, ["--top-p is 1.5"]),
    "min-p": (["--text", "a", "--min-p", "-0.5"], 1, ["--min-p is -0.5"]),
    "penalty": (["--text", "a", "--repetition-penalty", "0"], 1, ["--repetition-penalty is 0.0"]),
    "seed": (["--text", "a", "--seed", "-1"], 1, ["--seed is -1"]),
    "empty stop string": (["--text", "a", "--stop", ""], 1, ["--stop"]),
    "no local window": (["--text", "a", "--local-size", "0"], 1, ["--local-size is 0"]),
    "odd span": (["--text", "a", "--span-size", "5"], 1, ["--span-size is 5", "even"]),
    "chunk beyond local": (
        ["--text", "a", "--chunk-size", "129", "--local-size", "128"],
        1,
        ["--chunk-size is 129", "--local-size (128)"],
    ),
    "scope beyond the trained context": (
        ["--text", "a", "--max-spans", "64", "--local-size", "128"],
        1,
        ["256", "2180", "--max-spans 64", "--local-size 128", "pass --allow-out-of-distribution"],
    ),
    "sizes beyond counting": (
        ["--text", "a", "--local-size", "1" + "0" * 30, "--allow-out-of-distribution"],
        1,
        ["--local-size is 1000", "from 1 to 2147483647"],
    ),
    "number of 5,000 digits": (["--text", "a", "--seed", "1" * 5000], 2, ["--seed"]),
    "prompt's name too long": (["--prompt", "x" * 5000], 1, ["--prompt xxx", "too long"]),
    "prompt without end": (["--prompt", "/dev/zero"], 1, ["--prompt /dev/zero", "a device"]),
    "more tokens than memory": (["--text", "a", "--max-tokens", "1" + "0" * 12], 1, ["memory", "--max-tokens"]),
    "triton on a CPU": (["--text", "a", "--impl", "triton", "--device", "cpu"], 1, ["--impl", "triton"]),
    "chat without a template": (["--text", "a", "--chat"], 1, ["chat"]),
    "system without chat": (["--text", "a", "--system", "b"], 2, ["--system", "--chat", "`minirea generate --help`"]),
    "special tokens without chat": (["--text", "a", "--allow-special-tokens"], 2, ["--allow-special-tokens", "--chat"]),
    "no prompt": ([], 2, ["--prompt", "--text"]),
    "two prompts": (["--text", "a", "--prompt", "b"], 2, ["--prompt", "--text"]),
    "number that is none": (["--text", "a", "--max-tokens", "many"], 2, ["--max-tokens", "many"]),
    "unknown flag": (["--text", "a", "--warp-speed"], 2, ["--warp-speed"]),
    "unknown attention": (["--text", "a", "--attention", "flash"], 2, ["--attention", "flash"]),
    "unknown dtype": (["--text", "a", "--dtype", "int4"], 2, ["--dtype", "int4"]),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(case: str, pristine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected_status, named = BAD_ARGUMENTS[case]
    status, out, err = run(capsys, "generate", "--model", pristine, *arguments)
    assert (status, out) == (expected_status, "")
    assert_one_line(err, *named)


@pytest.mark.parametrize("arguments", [[], ["generate"], ["dance"]])
def test_bad_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert_one_line(err)


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b"", ["empty"]),
        (b"good \xff\xfe bad", ["UTF-8", "0xff", "offset 5"]),
        (b"\xc3", ["offset 0"]),
        (b"\xef\xbb\xbf", ["empty"]),
        ("good".encode("utf-16"), ["is UTF-16 text, expected UTF-8", "iconv"]),
    ],
)
def test_bad_prompts(
    raw: bytes,
    named: list[str],
    pristine: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "prompt.txt").write_bytes(raw)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw)))
    for prompt, source in ((tmp_path / "prompt.txt", "prompt.txt"), ("-", "standard input")):
        status, out, err = run(capsys, "generate", "--model", pristine, "--prompt", prompt)
        assert (status, out) == (1, "")
        assert_one_line(err, source, *named)


def test_a_prompt_that_is_a_named_pipe_is_refused(
    pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    status, out, err = run(capsys, "generate", "--model", pristine, "--prompt", tmp_path / "pipe")
    assert (status, out) == (1, "")
    assert_one_line(err, "--prompt", "a named pipe")


GGUF, HUB = ["GGUF", "save_pretrained"], ["Hugging Face Hub", "hf download meta-llama/Llama-3.1-8B --local-dir"]
NO_MODELS = {
    "model.gguf": (lambda path: path.write_bytes(b""), GGUF),
    "renamed": (lambda path: path.write_bytes(b"GGUF and more"), GGUF),
    "of-gguf": (lambda path: (path.mkdir(), (path / "q4.gguf").touch()), [*GGUF, "q4.gguf"]),
    "model.safetensors": (lambda path: path.touch(), ["a file of a model", "its directory"]),
    "meta-llama/Llama-3.1-8B": (lambda _: None, HUB),
    "x" * 5000: (lambda _: None, ["too long"]),
    "./meta-llama/Llama-3.1-8B": (lambda _: None, ["no such model directory"]),
}


@pytest.mark.parametrize("name", NO_MODELS)
def test_what_is_passed_instead_of_a_model_is_told_apart(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, named = NO_MODELS[name]
    monkeypatch.chdir(tmp_path)
    make(Path(name))
    status, _, err = run(capsys, "generate", "--model", name, "--text", "a")
    assert status == 1
    assert_one_line(err, *named)
    assert ("Hub" in err) == (named is HUB)


def test_a_path_that_is_none() -> None:
    for path in (5, b"model", ""):
        with pytest.raises(minirea.InputError, match=r"^path is .*, expected a model directory"):
            minirea.load(path)  # type: ignore[arg-type]


def test_a_path_of_any_kind(pristine: Path) -> None:
    class Elsewhere:
        def __fspath__(self) -> str:
            return str(pristine)

    llm = minirea.load(Elsewhere(), device="cpu")  # type: ignore[arg-type]
    session = llm.session()
    session.prefill([3, 4])
    assert session.llm.path == str(pristine)


@pytest.mark.parametrize("name", ["device", "dtype", "attention", "impl", "sketch", "cache", "quantize", "span_scope"])
def test_choices_of_another_kind_are_refused_by_name(name: str, pristine: Path) -> None:
    for value in (5, [], {}, np.array(["auto", "cpu"]), torch.float32):
        with pytest.raises(minirea.InputError, match=f"^{name} is .*, expected one of "):
            minirea.load(pristine, **{name: value})
    with pytest.raises(minirea.InputError, match=r"^allow_out_of_distribution is 'no', expected True or False"):
        minirea.load(pristine, allow_out_of_distribution="no")  # type: ignore[arg-type]


def test_errors_name_flags_on_the_command_line_and_fields_in_python(pristine: Path) -> None:
    """Anywhere in a message; a word that is a field's name too is left alone, and so are paths."""
    names = {"max_tokens", "dtype", "local_size", "carry_votes", "allow_out_of_distribution", "device", "seed"}
    for message, expected in (
        ("max_tokens is 0, expected more", "--max-tokens is 0, expected more"),
        ("seed is 1.5", "--seed is 1.5"),
        ("another device, a seed is planted", "another device, a seed is planted"),
        ('another `device` or dtype="float32"', "another --device or --dtype float32"),
        ("x (local_size 5), or allow_out_of_distribution=True", "x (--local-size 5), or --allow-out-of-distribution"),
        ("x, or local_size=5 and carry_votes=False", "x, or --local-size 5 and --no-carry-votes"),
        ("with dtype='a', local_size=5, carry_votes=False, and", "with --dtype a --local-size 5 --no-carry-votes, and"),
        ("lower max_tokens: 3 fit", "lower --max-tokens: 3 fit"),
        ("/home/max_tokens/x.max_tokens: my_max_tokens", "/home/max_tokens/x.max_tokens: my_max_tokens"),
    ):
        assert as_flags(message, names) == expected
    assert as_flags("max_tokens is 0", set()) == "max_tokens is 0"
    for fields, message in (
        ({"max_spans": 64}, r"max_spans 64 .* pass allow_out_of_distribution=True"),
        ({"local_size": 8}, r"^chunk_size|expected at most local_size"),
    ):
        with pytest.raises(minirea.InputError, match=message) as caught:
            minirea.load(pristine, **fields, chunk_size=16)
        assert "--" not in str(caught.value)


def test_unexpected_errors_are_one_line_too(
    pristine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, named in (
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory:\n you tried"), ["out of memory"]),
        (MemoryError(), ["out of memory", "--max-tokens"]),
        (RuntimeError("Failed to find C compiler. Please specify via CC"), ["C compiler", "--impl torch"]),
        (KeyError("surprise\x1b[31m"), ["KeyError", "surprise", "--debug"]),
    ):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("minirea.api.ModelFiles.load", fail)
        status, out, err = run(capsys, "generate", "--model", pristine, "--text", "a")
        assert (status, out) == (1, "")
        assert_one_line(err, *named)
        with pytest.raises(type(error)):
            run(capsys, "generate", "--model", pristine, "--text", "a", "--debug")


def test_what_a_library_fails_with_names_it_and_its_settings(
    pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is imported, where it is not there, and later, when the fault may be minirea's too."""
    (tmp_path / "broken_library").mkdir()
    (tmp_path / "broken_library" / "__init__.py").write_text("import broken_library.inner")
    (tmp_path / "broken_library" / "inner.py").write_text("float('x')")
    (tmp_path / "library.py").write_text("def use():\n    return float('x')")
    monkeypatch.syspath_prepend(tmp_path)
    for settings in ({}, {"BROKEN_LIBRARY_RATE": "x", "LIBRARY_RATE": "x"}):
        for variable, value in settings.items():
            monkeypatch.setenv(variable, value)
        for package, expected, others in (
            ("broken_library", "broken_library cannot be imported", "fault"),
            ("absent_library", "absent_library cannot be imported", "fault"),
            ("library", "a fault of minirea", "cannot be imported"),
        ):

            def fail(*_: object, package: str = package) -> None:
                importlib.import_module(package).use()

            monkeypatch.setattr("minirea.api.ModelFiles.load", fail)
            status, out, err = run(capsys, "generate", "--model", pristine, "--text", "a")
            assert (status, out) == (1, "")
            assert_one_line(err, expected)
            assert others not in err
            assert ("RATE in the environment" in err) == bool(settings and package != "absent_library")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(pristine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "generate", "--model", pristine, "--text", "a", "--device", "cuda")
    assert status == 1
    assert_one_line(err, "--device is 'cuda'")


@pytest.mark.parametrize(
    ("target", "named"), [("missing", "no such model directory"), ("file", "is a file"), ("empty", "neither")]
)
def test_models_that_are_none(target: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    status, _, err = run(capsys, "generate", "--model", tmp_path / target, "--text", "a")
    assert status == 1
    assert_one_line(err, str(tmp_path / target), named)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        main(["generate", "--model", str(tmp_path / "missing"), "--text", "a", "--debug"])
