"""The plan of a run is what the run then takes, and what does not fit is refused before it is read."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from testing import TINY, planned_beyond, random_ids, tiny_model, write_checkpoint, write_tokenizer

import minirea
from minirea import api, loading, memory
from minirea.attention import LEAST_ROWS
from minirea.cli import main
from minirea.errors import MemoryLimitError
from minirea.kernels.cpu.compile import available
from minirea.plan import fit_steps, plan_run, workspace_bytes

SCOPE: dict[str, Any] = {"global_size": 4, "local_size": 24, "span_size": 8, "max_spans": 4, "chunk_size": 16}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(write_checkpoint(tmp_path_factory.mktemp("model"), tiny_model(), torch.bfloat16))


@pytest.mark.parametrize("attention", ["reattention", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_weights_and_cache_are_what_is_allocated(
    tmp_path: Path, stored: torch.dtype, tied: bool, dtype: str, attention: str
) -> None:
    write_checkpoint(tmp_path, tiny_model(tie_word_embeddings=tied), stored)
    files = api.read_model(tmp_path, device="cpu", dtype=dtype, attention=attention, **SCOPE)
    plan = plan_run(tmp_path, files.attention, files.dtype, 77)
    llm = files.load(num_tokens=77)
    assert plan.weights == llm.model.nbytes + planned_beyond(llm.model)
    assert plan.cache == llm.session(77).cache.nbytes
    assert plan.num_tokens == 77


def test_votes_that_add_up_are_in_the_plan(directory: Path) -> None:
    """int32 of each token of the context, for every ballot."""
    for scope, ballots in (("layer", 1), ("kv_head", TINY["num_key_value_heads"])):
        without, carrying = (
            api.read_model(directory, device="cpu", span_scope=scope, carry_votes=carry, **SCOPE).attention
            for carry in (False, True)
        )
        for num_tokens in (10**6, 2 * 10**6):
            sizes = [workspace_bytes(attention, torch.float32, num_tokens) for attention in (without, carrying)]
            assert 0 <= sizes[1] - sizes[0] - 4 * ballots * num_tokens < 10_000


def test_what_does_not_fit_is_refused_before_weights_are_read(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = api.read_model(directory, device="cpu", **SCOPE)
    needed = plan_run(directory, files.attention, files.dtype)
    monkeypatch.setattr(memory, "available_bytes", lambda _: needed.weights + needed.loading - 1)
    monkeypatch.setattr(loading, "load_weights", lambda *_: pytest.fail("read"))
    with pytest.raises(MemoryLimitError, match=r"for weights.* use a smaller `dtype`"):
        api.load(directory, device="cpu", **SCOPE)


def test_command_line_counts_the_prompt_first(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights alone would fit; with the cache of this prompt they do not, and nothing is read."""
    arguments = ["generate", "--model", str(directory), "--device", "cpu", "--text", "a" * 1000, "--max-tokens", "24"]
    options = ["--local-size", "24", "--global-size", "4", "--max-spans", "4", "--span-size", "8", "--chunk-size", "16"]
    files = api.read_model(directory, device="cpu", **SCOPE)
    plan = plan_run(directory, files.attention, files.dtype, 1024)
    room = plan.weights + plan.cache + plan.workspace
    assert plan.loading < plan.cache + plan.workspace
    monkeypatch.setattr(memory, "available_bytes", lambda _: room - 1)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_weights", lambda *_: pytest.fail("read"))
        assert main([*arguments, *options]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("minirea: error: not enough memory on cpu: needs ")
    assert err.endswith("shorten the prompt or lower --max-tokens: about 1,023 of 1,024 tokens fit\n")
    monkeypatch.setattr(memory, "available_bytes", lambda _: room)
    assert main([*arguments, *options, "--quiet", "--ignore-eos"]) == 0


def test_a_step_that_can_be_captured_reads_several_chunks(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = api.read_model(directory, device="cpu", **SCOPE).attention
    assert not attention.can_capture
    assert attention.step_tokens(16) == 16
    one_chunk = workspace_bytes(attention, torch.float32, 1000)
    monkeypatch.setattr(type(attention), "can_capture", True)
    assert attention.step_tokens(16) == 64
    assert attention.step_tokens(8) == 32  # of a tail
    assert workspace_bytes(attention, torch.float32, 1000) > one_chunk
    for chunk_size, tokens in ((512, 2048), (1000, 2000), (1500, 1500), (5000, 5000)):
        attention.config = dataclasses.replace(
            attention.config, local_size=8192, chunk_size=chunk_size, dense_size=None
        )
        assert attention.step_tokens(chunk_size) == tokens


def test_steps_have_as_many_chunks_as_fit(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four, two or one, from the plan before the weights are read and from a cache's; none but one is refused."""
    monkeypatch.setattr("minirea.attention.Attention.can_capture", True)
    monkeypatch.setattr("minirea.attention.step_chunks", lambda *_: 4)
    files = api.read_model(directory, device="cpu", tail_size=0, **SCOPE)
    needed = {}
    for chunks in (1, 2, 4):
        files.attention.step_chunks = chunks
        needed[chunks] = plan_run(directory, files.attention, files.dtype, 1000).peak
    assert needed[1] < needed[2] < needed[4]
    for chunks, room in ((4, needed[4]), (2, needed[4] - 1), (2, needed[2]), (1, needed[2] - 1), (1, needed[1] - 1)):
        files.attention.step_chunks = 4
        monkeypatch.setattr(memory, "available_bytes", lambda _, room=room: room)
        assert files.plan(1000).peak == needed[chunks]
        assert files.attention.step_tokens(16) == 16 * chunks
    with pytest.raises(MemoryLimitError, match=r"about 99[0-9] of 1,000 tokens fit"):
        files.plan(1000).check(files.attention.device)

    monkeypatch.setattr(memory, "available_bytes", lambda _: None)
    llm = files.load()
    files.attention.step_chunks = 4
    weights = plan_run(directory, files.attention, files.dtype).weights
    monkeypatch.setattr(memory, "available_bytes", lambda _: needed[2] - weights)
    llm.session(1000)
    assert files.attention.step_tokens(16) == 32


@pytest.mark.parametrize(("room", "chunks", "host_cache"), [(40, 4, 0), (35, 2, 0), (25, 4, 1), (14, 2, 1), (5, 1, 1)])
def test_steps_of_fewer_chunks_come_before_the_host(
    room: int, chunks: int, host_cache: int, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache takes 30, or 10 with values on the host, and a step 2 for each chunk."""
    monkeypatch.setattr("minirea.attention.Attention.can_capture", True)
    monkeypatch.setattr("minirea.attention.step_chunks", lambda *_: 4)
    monkeypatch.setattr(memory, "_available_to_pin", lambda: None)
    monkeypatch.setattr(memory, "available_bytes", lambda _: room)
    attention = api.read_model(directory, device="cpu", **SCOPE).attention

    def plan() -> memory.MemoryPlan:
        near = memory.MemoryPlan(cache=30, workspace=2 * attention.step_chunks)
        far = dataclasses.replace(near, cache=10, host_cache=1)
        return near if near.fits(attention.device) else far

    assert fit_steps(attention, plan).host_cache == host_cache
    assert attention.step_chunks == chunks


def test_tables_are_as_long_as_the_cache_can_reach(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the scope may be; and a cache that grows beyond them has larger ones, with equal results."""
    ids = random_ids(200)
    for fields in (SCOPE, {"local_size": 2_000_000_000, "allow_out_of_distribution": True}):
        llm = minirea.load(directory, **fields)
        attention = llm.model.attention
        expected = llm.generate(ids, max_tokens=20, ignore_eos=True).token_ids
        assert [len(cos) for cos, _ in attention._tables.values()] == [
            min(LEAST_ROWS, attention.config.max_scope + attention.step_limit)
        ]
        attention._tables.clear()
        with monkeypatch.context() as patch:
            patch.setattr("minirea.attention.LEAST_ROWS", 64)
            patch.setattr(attention, "step_limit", 16)
            session = llm.session()
            for part in (ids[:50], ids[50:100]):
                session.prefill(part)
            found = session.generate(ids[100:], max_tokens=20, ignore_eos=True).token_ids
            assert len(attention._tables) > 1
            longest = max(attention._tables)
            assert longest == attention.table_rows(session.cache.capacity)
            assert sum(attention._tables) <= 2 * longest
        if fields is not SCOPE:  # how a text is cut into pieces decides what is selected
            assert found == expected
        rows = [attention.table_rows(num_tokens) for num_tokens in (10**6, 2 * 10**6)]
        added = workspace_bytes(attention, torch.float32, 2 * 10**6) - workspace_bytes(attention, torch.float32, 10**6)
        assert added >= 2 * 2 * (rows[1] - rows[0]) * llm.config.head_dim // 2 * 4


CHILD = """
import contextlib, io, json, resource, sys
from pathlib import Path
import minirea.api
from minirea.cli import main

arguments, runs = json.loads(sys.argv[1])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
for flags in runs:
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        status = main([*arguments, *flags])
    print(json.dumps([status, error.getvalue()]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")
def test_sizes_beyond_all_bounds_end_well_under_a_limit_on_memory(directory: Path) -> None:
    """In one process with 1 GB to spend: an answer, or one line that names the flag."""
    sizes = [10**9, 2 * 10**9, 10**12, 10**30]
    refused = ["--chunk-size", "--tail-chunk-size", "--max-spans", "--max-tokens", "--threads"]
    allowed = ["--global-size", "--local-size", "--span-top-k", "--span-size", "--tail-size", "--dense-size", "--top-k"]
    runs = [[flag, str(size)] for flag in (*allowed, *refused) for size in sizes]
    runs += [["--local-size", str(size), "--chunk-size", str(size)] for size in sizes]
    arguments = ["generate", "--model", str(directory), "--device", "cpu", "--text", "a", "--allow-out-of-distribution"]
    arguments += ["--max-tokens", "2", "--temperature", "1", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps([arguments, runs])],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(runs)
    for (flag, size, *more), (status, error) in zip(runs, found, strict=True):
        fits = flag not in refused and (int(size) < 2**31 or flag == "--top-k")
        assert status == (0 if fits else 1), (flag, size, error)
        assert error.count("\n") == status, error
        if status:
            assert flag in error or "memory" in error, error
        assert not more or flag in error or fits


def test_an_allocation_that_fails_anywhere_is_one_line(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the cache and its growth, in steps and in logits; the session stays as it was and goes on."""
    huge = 2**60
    llm = minirea.load(directory, device="cpu", **SCOPE)
    session = llm.session()
    session.prefill(random_ids(30))

    def fails(name: str, call: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(name, lambda *_, **__: torch.zeros(huge, dtype=torch.uint8))
            with pytest.raises(minirea.MemoryLimitError, match=r"^out of memory \(.*lower max_tokens") as caught:
                call()
        assert "\n" not in str(caught.value)
        assert len(session.ids) == 30

    fails("torch.empty", lambda: llm.session(10))
    fails("torch.empty", lambda: session.prefill(random_ids(200)))
    fails("minirea.model.Model._embed", lambda: session.prefill(random_ids(20)))
    step = "minirea.cpu_steps.CpuDecodeStep.run" if available() else "minirea.model.Model.logits"
    fails(step, lambda: session.generate(random_ids(20), max_tokens=2))
    fails("minirea.model.Model.logits", lambda: llm.logits(random_ids(20)))
    fails("minirea.cpu_attention.reattention", lambda: session.prefill(random_ids(100)))
    assert session.generate(random_ids(20), max_tokens=2, ignore_eos=True).token_ids


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_workspace_on_a_gpu_is_an_upper_bound(directory: Path, impl: str) -> None:
    files = api.read_model(directory, impl=impl, **SCOPE)
    plan = plan_run(directory, files.attention, files.dtype, 1000)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    files.load().generate(random_ids(900), max_tokens=100, ignore_eos=True)
    assert torch.cuda.max_memory_allocated() - before <= plan.weights + plan.cache + plan.workspace
