"""Contexts in files: they go on as if they had never been closed, or are refused in one line; nothing is lost."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from testing import in_threads, random_ids, tiny_model, write_checkpoint, write_tokenizer

import minirea
from minirea import api, cli, context, files
from minirea.errors import InputError
from minirea.weights import fingerprint

SCOPE = {"global_size": 4, "local_size": 24, "span_size": 8, "max_spans": 4, "chunk_size": 16, "dense_size": 60}
VOTES = SCOPE | {"vote_window": 5, "vote_size": 4, "decode_spans": 2, "carry_votes": True}
MUTATIONS = int(os.environ.get("MINIREA_MUTATIONS", "150"))  # of one file; more by hand


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", tiny_model()))


@pytest.fixture(scope="module")
def llm(directory: Path) -> minirea.LLM:
    return minirea.load(directory, **SCOPE)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks in a head, the last of them shorter."""
    monkeypatch.setattr(context, "BLOCK_BYTES", 1024)


@pytest.fixture
def saved(llm: minirea.LLM, tmp_path: Path) -> Path:
    session = llm.session()
    session.prefill(random_ids(90))
    session.notes = {"messages": "[]"}
    session.save(tmp_path / "book.ctx")
    return tmp_path / "book.ctx"


def assert_same_cache(one: minirea.Session, other: minirea.Session) -> None:
    assert one.ids == other.ids
    assert one.cache.seq_len == other.cache.seq_len
    for name in ("k", "v", "k_rotated"):
        for a, b in zip(getattr(one.cache, name), getattr(other.cache, name), strict=True):
            filled = min(one.cache.seq_len, a.shape[1], b.shape[1])
            assert torch.equal(a[:, :filled], b[:, :filled]), name


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix == ".part"]


@pytest.mark.parametrize("attention", ["reattention", "streaming", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_context_goes_on_as_if_it_had_not_been_closed(
    directory: Path, tmp_path: Path, attention: str, dtype: str
) -> None:
    """In the dense part, at its end and beyond; after a prompt, and after an answer, whose last token is not read."""
    llm = minirea.load(directory, attention=attention, dtype=dtype, **SCOPE)
    for length in (1, 59, 60, 61, 150):
        session = llm.session()
        session.prefill(random_ids(length))
        for _ in range(2):
            session.save(tmp_path / "a.ctx")
            opened = llm.open_session(tmp_path / "a.ctx")
            assert_same_cache(session, opened)
            question = random_ids(7, seed=length)
            expected = session.generate(question, max_tokens=9, ignore_eos=True)
            assert opened.generate(question, max_tokens=9, ignore_eos=True).token_ids == expected.token_ids


def test_winners_are_in_the_file(directory: Path, tmp_path: Path) -> None:
    """An answer begins with the votes of the tokens before it, also right after a context was opened."""
    llm = minirea.load(directory, **VOTES)
    for length in (3, 100, 150):
        session = llm.session()
        session.prefill(random_ids(length))
        for _ in range(3):
            session.save(tmp_path / "a.ctx")
            opened = llm.open_session(tmp_path / "a.ctx")
            assert torch.equal(session.cache.winners, opened.cache.winners)
            assert bool((session.cache.winners >= 0).any()) == (session.cache.seq_len > 60)
            expected = session.generate(random_ids(1), max_tokens=4, ignore_eos=True)
            assert opened.generate(random_ids(1), max_tokens=4, ignore_eos=True).token_ids == expected.token_ids
    with pytest.raises(
        InputError,
        match="with vote_window=5, vote_size=4, decode_spans=2, carry_votes=True, expected vote_window=1, ",
    ):
        minirea.load(directory, **SCOPE).open_session(tmp_path / "a.ctx")


@pytest.mark.parametrize("head_dim", [6, 10, 34, 80])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_are_rotated_again_bit_for_bit(tmp_path: Path, head_dim: int, dtype: str) -> None:
    """Also where a head is no multiple of what a CPU computes at once."""
    model = write_checkpoint(tmp_path, tiny_model(head_dim=head_dim))
    llm = minirea.load(model, dtype=dtype, **SCOPE)
    session = llm.session()
    session.prefill(random_ids(47))
    session.generate(random_ids(3), max_tokens=4, ignore_eos=True)
    session.save(tmp_path / "a.ctx")
    assert_same_cache(session, llm.open_session(tmp_path / "a.ctx"))


def test_other_programs_can_read_it(saved: Path, llm: minirea.LLM) -> None:
    opened = llm.open_session(saved, capacity=200)
    assert (opened.cache.capacity, opened.notes) == (200, {"messages": "[]"})
    with safe_open(saved, "pt") as file:
        assert json.loads(file.metadata()["settings"])["local_size"] == 24
        assert file.get_tensor("ids").tolist() == opened.ids
        assert torch.equal(file.get_tensor("k.1"), opened.cache.k[1][:, :90])


def test_the_same_weights_elsewhere_are_the_same_model(saved: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "sharded", tiny_model(), shard_size="50KB")
    assert len(list(other.glob("*.safetensors"))) > 1
    assert minirea.load(other, **SCOPE).open_session(saved).ids


def resaved(saved: Path, edit: Callable[[dict[str, str]], object]) -> None:
    """Change a file's metadata and keep the rest."""
    raw = saved.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    edit(header["__metadata__"])
    text = json.dumps(header).encode()
    saved.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])


def test_a_context_is_saved_and_opened_whatever_becomes_of_the_models_directory(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be another one under the name that it had, as after a change of the current directory, or none."""
    shutil.copytree(directory, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    llm = minirea.load("model", device="cpu", **SCOPE)
    session = llm.session()
    session.prefill(random_ids(40))
    write_checkpoint(tmp_path / "model", tiny_model(5))
    session.save("first")
    shutil.rmtree("model")
    session.save("second")
    assert Path("first").read_bytes() == Path("second").read_bytes()
    assert llm.open_session("second").ids == session.ids
    assert minirea.load(directory, device="cpu", **SCOPE).open_session("first").ids == session.ids


def test_each_mismatch_names_both_values(directory: Path, saved: Path, tmp_path: Path) -> None:
    for change, named in (
        ({"local_size": 25}, ("local_size=24", "local_size=25")),
        ({"local_size": 25, "span_size": 6}, ("with local_size=24, span_size=", "expected local_size=25, span_size=6")),
        ({"carry_votes": True}, ("carry_votes=False", "carry_votes=True")),
        ({"span_scope": "kv_head"}, ("span_scope='layer'", "span_scope='kv_head': load the model with ")),
        ({"dtype": "bfloat16"}, ("dtype='float32'", "dtype='bfloat16': load the model with dtype='float32', ")),
        ({"attention": "full"}, ("='reattention'", "='full': load the model with attention='reattention', ")),
        ({"quantize": "int8"}, ("with no `quantize`, expected quantize='int8': load", " and without `quantize`")),
    ):
        with pytest.raises(minirea.InputError) as caught:
            minirea.load(directory, **SCOPE | change).open_session(saved)
        assert all(part in str(caught.value) for part in (str(saved), *named)), caught.value
    quantized = minirea.load(directory, quantize="int8", **SCOPE).session()
    quantized.prefill(random_ids(9))
    quantized.save(tmp_path / "int8.ctx")
    message = "with quantize='int8', expected no `quantize`: load the model with quantize='int8', "
    with pytest.raises(minirea.InputError, match=message):
        minirea.load(directory, **SCOPE).open_session(tmp_path / "int8.ctx")
    other = write_checkpoint(tmp_path / "another", tiny_model(seed=1))
    with pytest.raises(minirea.InputError, match=r"'tiny' .* expected 'another'"):
        minirea.load(other, **SCOPE).open_session(saved)
    resaved(saved, lambda metadata: metadata.update(version="1"))
    with pytest.raises(minirea.InputError, match="version '1', expected '2': read it anew"):
        minirea.load(directory, **SCOPE).open_session(saved)


MEDIUM = {"max_position_embeddings": 8192}  # where defaults follow from other fields
# Settings that a context is read with, and those that it is opened with.
RETRIES: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"span_size": 32, "vote_size": 32}, {}),
    ({}, {"span_size": 32}),
    ({"span_size": 32}, {"vote_size": 8}),
    ({"max_spans": 7}, {"max_spans": 7, "decode_spans": 3}),
    ({"local_size": 40, "chunk_size": 20}, {"local_size": 600}),
    ({"dense_size": 300, "local_size": 100}, {"tail_size": 0}),
    ({"span_size": 32, "attention": "streaming", "local_size": 300}, {"carry_votes": False}),
    ({"attention": "full", "dtype": "bfloat16"}, {"local_size": 300}),
    ({"carry_votes": False, "vote_window": 1}, {"attention": "full"}),
    ({"quantize": "int8", "span_scope": "kv_head"}, {"attention": "streaming"}),
    ({"max_spans": 500, "allow_out_of_distribution": True}, {"quantize": "int8"}),
)


def test_a_refusal_names_all_that_has_to_be_given(tmp_path: Path) -> None:
    """Added to what was given, it opens the file: at the first try."""
    directory = write_checkpoint(tmp_path / "medium", tiny_model(**MEDIUM))
    for read_with, opened_with in RETRIES:
        session = minirea.load(directory, **read_with).session()
        session.prefill([1, 2, 3])
        session.save(tmp_path / "a.ctx")
        with pytest.raises(minirea.InputError) as caught:
            api.read_model(directory, **opened_with).open_context(tmp_path / "a.ctx")
        advice = str(caught.value).rsplit(": load the model ", 1)[1]
        passed, _, without = advice.removeprefix("with ").partition(" and ")
        arguments = eval(f"dict({'' if passed.startswith('without') else passed})")  # as a reader would paste it
        left = {name: value for name, value in opened_with.items() if f"`{name}`" not in without + passed}
        api.read_model(directory, **left | arguments).open_context(tmp_path / "a.ctx").close()


def test_hostile_settings_are_no_advice(directory: Path, saved: Path) -> None:
    raw = saved.read_bytes()
    for change, message in (
        ({"local_size": None}, "was read by a build without `local_size`"),
        ({"local_size": "25; rm"}, "settings are none that a model can have: local_size is "),
        ({"local_size": 25, "chunk_size": 26}, "settings are none that a model can have: chunk_size is 26"),
        ({"attention": "other"}, "settings have attention 'other', expected one of "),
        ({"dtype": [1]}, "settings have dtype "),
        ({"quantize": "`x`"}, "settings have quantize "),
    ):
        saved.write_bytes(raw)
        resaved(
            saved,
            lambda metadata, change=change: metadata.update(
                settings=json.dumps(json.loads(metadata["settings"]) | change)
            ),
        )
        with pytest.raises(minirea.InputError, match=message):
            minirea.load(directory, **SCOPE).open_session(saved)


def test_a_fingerprint_sees_config_names_shapes_and_values(directory: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    def of(path: Path) -> str:
        return fingerprint(path, minirea.api.load_config(path))  # type: ignore[attr-defined]

    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    (copy / "model.safetensors").touch()
    assert of(copy) == of(directory)
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.001
    save_file(weights, copy / "model.safetensors")
    assert of(copy) != of(directory)
    copy = Path(shutil.copytree(directory, tmp_path / "config"))
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(values | {"rms_norm_eps": 1e-6}))
    assert of(copy) != of(directory)


BAD_FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "is empty, expected a file that `minirea read --save` has written$"),
    "no safetensors": (lambda _: b"hello, this is a text\n" * 9, "is no context, expected a file that"),
    "cut short": (lambda raw: raw[:-1], r"is cut short: it has [\d,]+ bytes, expected [\d,]+$"),
    "cut in half": (lambda raw: raw[: len(raw) // 2], r"is cut short: it has [\d,]+ bytes, expected [\d,]+$"),
    "cut in its header": (lambda raw: raw[:99], r"is cut short: it has 99 bytes, expected more than [\d,]+$"),
    "cut in its length": (lambda raw: raw[:7], "is no context, expected a file that"),
    "a header without an end": (lambda raw: raw.replace(b'":', b'" ', 9), "the header is not valid JSON"),
    "more": (lambda raw: raw + b"x", "its header describes"),
    "a bit of a key": (lambda raw: raw[:-5] + bytes([raw[-5] ^ 1]) + raw[-4:], "is damaged: bytes from"),
    "zeros at the end": (lambda raw: raw[:-512] + bytes(512), "is damaged: bytes from"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_damage_is_one_line(case: str, saved: Path, llm: minirea.LLM) -> None:
    damage, message = BAD_FILES[case]
    saved.write_bytes(damage(saved.read_bytes()))
    with pytest.raises(minirea.InputError, match=message) as caught:
        llm.open_session(saved)
    assert str(saved) in str(caught.value)


def test_what_is_no_context_is_one_line(directory: Path, llm: minirea.LLM, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "book.txt").write_text("It was a quiet day.")
    (tmp_path / "empty").write_text("")
    for path, message in (
        (tmp_path / "book.txt", "is no context, expected a file that `minirea read --save` has written$"),
        (tmp_path / "empty", "is empty, expected a file that `minirea read --save` has written$"),
        (directory / "model.safetensors", "is no context"),
        (tmp_path / "nothing", "no such file"),
        (tmp_path, "is a directory, expected a file with a context"),
        (tmp_path / "pipe", "is a named pipe, expected a file"),
        (Path("/dev/zero"), "is a device, expected a file"),
    ):
        with pytest.raises(minirea.MinireaError, match=message):
            llm.open_session(path)


def test_what_is_no_name_and_no_note_is_one_line(llm: minirea.LLM, saved: Path) -> None:
    """And changes no file: notes of other kinds would be saved, and not be opened again."""
    session, before = llm.open_session(saved), saved.read_bytes()
    for name in (None, 5, b"a.ctx", ""):
        for call in (session.save, llm.open_session):
            with pytest.raises(minirea.InputError, match=r"is .*, expected the name of a file"):
                call(name)  # type: ignore[arg-type]
        with pytest.raises(minirea.InputError, match=r"path is .*, expected a model directory"):
            minirea.load(name)  # type: ignore[arg-type]
    for call in (session.save, llm.open_session):
        with pytest.raises(minirea.InputError, match="no name that a file can have"):
            call("a\0b")
    notes: list[Any] = [None, {"a": 5}, {1: "a"}, ["a"], {"a": None}]
    for session.notes in notes:
        with pytest.raises(minirea.InputError, match=r"not saved: notes are .*, expected a dictionary of strings"):
            session.save(saved)
    assert saved.read_bytes() == before
    with pytest.raises(minirea.InputError, match="to_follow is -1, expected an integer of at least 0"):
        session.prefill("a", to_follow=-1)
    with pytest.raises(minirea.InputError, match="text is 5, expected a string"):
        llm.tokenizer.encode(5)  # type: ignore[arg-type]


def test_notes_that_no_header_can_hold_are_not_saved(llm: minirea.LLM, saved: Path, monkeypatch: Any) -> None:
    """As of a conversation about a very long document: such a file could not be opened."""
    session, before = llm.open_session(saved), saved.read_bytes()
    length = int.from_bytes(before[:8], "little")
    monkeypatch.setattr(context, "MAX_HEADER_BYTES", length)
    session.save(saved)
    session.notes["messages"] += " " * 8
    with pytest.raises(InputError, match=r"not saved: its notes take .*, expected at most"):
        session.save(saved)
    assert saved.read_bytes() == before


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut, repeated or inserted, or a value of the header replaced by a hostile one."""
    end = 8 + int.from_bytes(raw[:8], "little")
    if rng.random() < 0.5:
        header = json.loads(raw[8:end])
        entry = rng.choice(list(header.values()))
        key = rng.choice(list(entry))
        values: list[Any] = [None, 0, -1, 2**63, 10**400, "", "F32", "I64", [], [2**62, 2**62], [0, 8], {}, "[" * 9999]
        hostile = rng.choice([*values, rng.choice(list(header.values())).get(key, "x"), json.dumps({"a": 1})])
        if rng.random() < 0.2:
            header[rng.choice(["v.0", "k.7", "x", "../x"])] = header.pop(rng.choice(list(header)))
        else:
            entry[key] = hostile
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + raw[end:]
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(min(len(data), rng.choice((8, end, len(data)))))
        kind = rng.randrange(4)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at:at] = rng.randbytes(rng.randint(1, 9))
        elif kind == 2:
            del data[at : at + rng.randint(1, 99)]
        else:
            data = data[: max(9, at)]
        if not data:
            break
    return bytes(data)


def test_mutated_files_are_refused_in_one_line_or_are_the_same_context(llm: minirea.LLM, saved: Path) -> None:
    raw, original = saved.read_bytes(), llm.open_session(saved)
    refused: list[str] = []
    for seed in range(MUTATIONS):
        data = mutated(raw, random.Random(seed))
        saved.write_bytes(data)
        try:
            assert_same_cache(original, llm.open_session(saved))
        except minirea.InputError as error:
            refused.append(str(error))
        assert saved.read_bytes() == data
    assert len(refused) > MUTATIONS * 0.7
    assert all(str(saved) in line and line.isprintable() and len(line) < 1500 for line in refused)


def test_a_save_that_fails_leaves_the_old_file(llm: minirea.LLM, saved: Path) -> None:
    before, session = saved.read_bytes(), llm.session()
    with pytest.raises(minirea.InputError, match="the context is empty"):
        session.save(saved)
    session.prefill(random_ids(200))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 100, 5000, 40_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(minirea.InputError, match=r"book\.ctx: cannot be written: File too large"):
                session.save(saved)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert saved.read_bytes() == before and not left_over(saved.parent)
    session.save(saved)
    assert llm.open_session(saved).ids == session.ids


def test_a_full_disk_is_told_before_anything_is_written(
    llm: minirea.LLM, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, session, found = saved.read_bytes(), llm.open_session(saved), os.statvfs(saved)
    monkeypatch.setattr(os, "fstatvfs", lambda _: os.statvfs_result((*found[:4], 1, *found[5:])))
    with pytest.raises(minirea.InputError, match=r"it takes [\d,]+ bytes, and [\d,]+ are free on that disk"):
        session.save(saved)
    assert saved.read_bytes() == before and not left_over(saved.parent)


def test_what_cannot_be_written_is_one_line(llm: minirea.LLM, saved: Path, tmp_path: Path) -> None:
    session = llm.open_session(saved)
    for path, message in (
        (tmp_path, "is a directory, expected a file"),
        (Path("/dev/null"), "is a device, expected a file"),
        (tmp_path / "none" / "a.ctx", "cannot be written: .*none is no directory$"),
        (Path(__file__) / "a.ctx", r"cannot be written: .*test_context\.py is no directory$"),
        (tmp_path / ("x" * 300), "cannot be written: File name too long"),
        (f"{saved}/", r"book\.ctx/: is the name of a directory, expected a file"),
        (f"{tmp_path}/new/", r"new/: is the name of a directory, expected a file"),
    ):
        with pytest.raises(minirea.InputError, match=message):
            session.save(path)
        with pytest.raises(minirea.InputError, match=message):
            files.check_replaceable(path)
    files.check_replaceable(saved)
    files.check_replaceable(tmp_path / "new.ctx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["book.ctx"]


def test_what_is_no_context_is_not_replaced(
    llm: minirea.LLM, directory: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a slip of the keys: `--save book.txt`. Contexts are, also those that are damaged or that others wrote."""
    from safetensors.torch import load_file, save_file

    session, whole = llm.open_session(saved), saved.read_bytes()
    book, weights = tmp_path / "book.txt", tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(3)}, weights, metadata={"format": "pt"})
    for path, content in ((book, b"It was"), (book, b"{" * 99), (weights, weights.read_bytes())):
        path.write_bytes(content)
        with pytest.raises(minirea.InputError, match="not saved: is there and no context, expected a new name"):
            session.save(path)
        words = ["read", "--model", str(directory), "--text", "a", "--save", str(path)]
        assert cli.main(words) == 1
        assert capsys.readouterr().err.startswith(f"minirea: error: {path}: not saved: is there and no context")
        assert path.read_bytes() == content
    with safe_open(saved, "pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(saved), weights, metadata=metadata)
    for path, content in ((book, b""), (book, whole[:20]), (book, whole[:-5]), (book, whole), (weights, None)):
        if content is not None:
            path.write_bytes(content)
        session.save(path)
        assert llm.open_session(path).ids == session.ids


def test_a_link_stays_and_what_it_leads_to_is_replaced(llm: minirea.LLM, saved: Path) -> None:
    session = llm.open_session(saved)
    session.prefill(random_ids(3))
    link = saved.with_name("link.ctx")
    link.symlink_to(saved.name)
    session.save(link)
    assert link.is_symlink() and llm.open_session(saved).ids == session.ids


def test_a_process_that_is_killed_while_it_saves(llm: minirea.LLM, directory: Path, saved: Path) -> None:
    """At its first block, in the middle, and before the rename: the old file stays, and the next save clears up."""
    before = saved.read_bytes()
    code = f"""
import os, signal, minirea.api
from minirea import context
from pathlib import Path
def save(strike):
    session = minirea.load({str(directory)!r}, **{SCOPE!r}).session()
    session.prefill(list(range(3, 90)) * 3)
    strike()
    session.save({str(saved)!r})
def at_the_first_block(): context._write_at = end
def in_the_middle(): context._checksum = lambda view, c=iter(range(9)): end() if next(c) == 5 else 0
def before_the_rename(): os.replace = end
def end(*_): os.kill(os.getpid(), signal.SIGKILL)
for strike in at_the_first_block, in_the_middle, before_the_rename:
    if not (pid := os.fork()):  # torch is imported once, and computes in these children only
        save(strike)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    print(status, len(list(Path({str(saved.parent)!r}).glob(".*.part"))), flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == 3 * "9 1\n", done.stderr  # each has removed what the one before has left
    assert saved.read_bytes() == before
    assert len(left_over(saved.parent)) == 1
    llm.open_session(saved).save(saved)
    assert not left_over(saved.parent)


def test_several_may_save_and_open_one_file_at_once(llm: minirea.LLM, saved: Path) -> None:
    """Each opens a whole file, of whichever saved last."""
    sessions = []
    for seed in range(3):
        sessions.append(llm.session())
        sessions[-1].prefill(random_ids(40 + 30 * seed, seed=seed))
    possible = [llm.open_session(saved).ids, *(session.ids for session in sessions)]
    failures: list[object] = []

    def work(session: minirea.Session) -> None:
        try:
            for _ in range(12):
                session.save(saved)
                if llm.open_session(saved).ids not in possible:
                    failures.append("another context")
        except BaseException as error:
            failures.append(error)

    in_threads(work, sessions)
    assert not failures and not left_over(saved.parent)


def test_a_file_that_is_replaced_after_its_header_was_read(llm: minirea.LLM, directory: Path, saved: Path) -> None:
    first = llm.open_session(saved)
    model_files = minirea.api.read_model(directory, **SCOPE)  # type: ignore[attr-defined]
    opened = model_files.open_context(saved)
    other = llm.session()
    other.prefill(random_ids(30, seed=5))
    other.save(saved)
    assert_same_cache(first, llm.open_session(opened))
    assert llm.open_session(saved).ids == other.ids


@pytest.fixture
def on_a_small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_fills_while_it_saves(
    llm: minirea.LLM, on_a_small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "check_room", lambda *_: None)  # the room that was there is taken meanwhile
    path, session = on_a_small_disk / "a.ctx", llm.session()
    session.prefill(random_ids(20))
    session.save(path)
    before = path.read_bytes()
    session.prefill(random_ids(400))
    with pytest.raises(minirea.InputError, match="cannot be written: No space left on device"):
        session.save(path)
    assert path.read_bytes() == before and not left_over(on_a_small_disk)
