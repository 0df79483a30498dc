"""Two GPUs of one machine: `python -m pytest -m gpu tests/minirea/test_gpu_ranks.py`.

With MINIREA_RUNS=200 in the environment 200 runs start and end instead of 20, of which every tenth loses a rank;
`-k start_and_end` does nothing else.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import family, follower_of, wait_for
from testing import random_ids, tiny_model, write_checkpoint

import minirea
from minirea import cache as caches
from minirea import memory
from minirea.cache import KVCache, cache_bytes, far_bytes
from minirea.errors import MemoryLimitError
from minirea.evaluation.text.diary import generate_text
from minirea.leader import together
from minirea.pinned import host_tensor
from minirea.plan import workspace_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
DEMO = Path(minirea.__file__).parent.parent / "weights" / "demo"
SCOPE: dict[str, Any] = {"global_size": 4, "local_size": 24, "span_top_k": 2, "span_size": 4, "max_spans": 5}
SCOPE |= {"chunk_size": 16, "tail_size": 12, "tail_chunk_size": 5, "dense_size": 40}
RUNS = int(os.environ.get("MINIREA_RUNS", "20"))


@pytest.fixture(autouse=True, scope="module")
def _followers_find_this_file() -> Iterator[None]:
    """Some of their steps are here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield


def test_the_demo_models_text_is_that_of_one_gpu() -> None:
    """500 tokens after prompts of six lengths, in graphs, sums by memory that both GPUs reach where they do."""
    sizes: dict[str, Any] = {"local_size": 512, "max_spans": 23}
    one, two = (minirea.load(DEMO, dtype="float32", gpus=gpus, **sizes) for gpus in (1, 2))
    text_ids = one.encode(generate_text(0, 240_000))
    for length in (1, 100, 700, 3000, 10_000, 40_000):
        ids = text_ids[:length]
        expected, found = (llm.generate(ids, max_tokens=500, ignore_eos=True) for llm in (one, two))
        assert found.token_ids == expected.token_ids, length
        assert length > 3000 or found.stats.scope == expected.stats.scope


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_mode_and_sampling(tmp_path: Path, dtype: str) -> None:
    """Half precision rounds partial sums elsewhere, so there only runs of the same kind are compared.

    No token is in the prompt twice: the first-layer keys of equal ones are equal within a prompt, and in float32, but
    those of an answer are rounded otherwise.
    """
    path = write_checkpoint(tmp_path, tiny_model(attention_bias=True, mlp_bias=True, vocab_size=1000))
    one, two = (minirea.load(path, dtype=dtype, gpus=gpus, **SCOPE) for gpus in (1, 2))
    expected_of = one if dtype == "float32" else two
    ids = (torch.randperm(997, generator=torch.Generator().manual_seed(0)) + 3)[:150].tolist()
    votes = {"vote_window": 4, "decode_spans": 3, "carry_votes": True}
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("reattention", fields) for fields in ({}, {"span_scope": "kv_head"}, votes)
    ]
    for mode, fields in (*kinds, ("streaming", {}), ("full", {})):
        for options in ({}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}):
            out = [llm.with_attention(mode, **SCOPE | fields).generate(ids, max_tokens=30, ignore_eos=True, **options)
                   for llm in (expected_of, two)]  # fmt: skip
            assert out[0].token_ids == out[1].token_ids, (mode, fields, options)


def kept_of_all(model: Any, cache: KVCache) -> Iterator[tuple[torch.Tensor, list[tuple[int, ...]]]]:
    """Of each rank the sums of the bits of each layer's keys and of its values, and how its cache is laid out."""
    torch.cuda.synchronize()
    stored = [x for layer in range(len(cache.v)) for x in cache.stored(layer).values()]
    bits = torch.int16 if model.dtype.itemsize == 2 else torch.int32
    sums = [int(x[:, : cache.seq_len].contiguous().view(bits).long().sum()) for x in stored]
    laid = [[*cache.placement, cache.capacity, cache.sketched_len]]
    found = model.ranks.all_gather(torch.tensor([sums], device=model.device)).cpu()
    yield found, [tuple(row) for row in model.ranks.all_gather(torch.tensor(laid, device=model.device)).tolist()]


def kept(session: minirea.Session) -> tuple[torch.Tensor, tuple[int, ...]]:
    """What all ranks keep, which lay it out alike."""
    ((sums, laid),) = together(kept_of_all, session.llm.model, session.cache)
    assert len(set(laid)) == 1
    return sums, laid[0]


def room_for(llm: minirea.LLM, capacity: int, far_keys: int) -> int:
    """Bytes of a card with which so many layers' keys have to be far."""
    attention, dtype = llm.model.attention, llm.model.dtype
    placement = next(p for p in attention.placements(capacity) if p.far_keys == far_keys and p.sketched)
    config = llm.model.config
    near = cache_bytes(config, capacity, 0, dtype, attention.winners_shape, placement)
    return near - far_bytes(config, capacity, dtype, placement) + workspace_bytes(attention, dtype, capacity)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_caches_on_the_host_and_sketches_change_nothing(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, answers in graphs, growth onto the host, and rewinds: tokens, and all keys and values of both ranks, are
    those of ranks that have neither. How little room there is one of them says.
    """
    plain, far = (
        minirea.load(DEMO, dtype=dtype, gpus=2, sketch=sketch, cache=cache)
        for sketch, cache in (("off", "device"), ("int8", "host"))
    )
    ids = plain.encode(generate_text(0, 400_000))[:90_000]
    sessions = [plain.session(92_000), far.session(20_000)]
    free, room = memory.available_bytes, room_for(far, 92_000, 3)
    monkeypatch.setattr(memory, "available_bytes", lambda d: min(free(d), room) if d.type == "cuda" else free(d))
    sessions.append(far.session(92_000))
    assert [kept(s)[1][:3] for s in sessions] == [(0, 0, 0), (1, 6, 0), (1, 6, 3)]
    for session in sessions:
        session.prefill(ids)
        for start, keep in ((0, 90_000), (3000, 89_990), (500, 60_000), (70_000, 60_700)):
            session.rewind(keep)
            session.generate(ids[start : start + 700], max_tokens=16, ignore_eos=True)
    sums, _ = kept(sessions[0])
    for session in sessions[1:]:
        found, laid = kept(session)
        assert session.ids == sessions[0].ids and torch.equal(found, sums)
        assert laid[:2] == (1, 6) and laid[-1] > 60_000  # with sketches, values far


def pin_nothing(model: Any, _: Any, rank: int, refuses: bool) -> Iterator[None]:
    def refuse(*_: Any) -> Any:
        raise MemoryLimitError("nothing can be pinned here")

    if model.ranks.rank == rank:
        caches.host_tensor = refuse if refuses else host_tensor  # type: ignore[attr-defined]
    yield


def test_what_the_host_refuses_leaves_no_rank_behind() -> None:
    """To any of them, as a new cache or as one that grows; and what is too much for both."""
    far = minirea.load(DEMO, gpus=2, cache="host")
    session, tiny = far.session(2000), far.session(1)
    with pytest.raises(MemoryLimitError, match=r"^not enough memory on [^;]*; [^;]* tokens fit$"):
        far.session(500_000_000)
    for rank in (1, 0):
        list(together(pin_nothing, far.model, tiny.cache, rank, True))
        for ask in (lambda: far.session(3000), lambda: session.generate(random_ids(3000, 2000), max_tokens=9)):
            with pytest.raises(MemoryLimitError, match=r"^nothing can be pinned here$"):
                ask()
        list(together(pin_nothing, far.model, tiny.cache, rank, False))
        assert kept(session)[1][-2] == 2000
    out = session.generate(random_ids(3000, 2000), max_tokens=9, ignore_eos=True)
    assert out.token_ids == far.generate(random_ids(3000, 2000), max_tokens=9, ignore_eos=True).token_ids


def test_sessions_take_turns_with_graphs(tmp_path: Path) -> None:
    two = minirea.load(write_checkpoint(tmp_path, tiny_model()), dtype="float32", gpus=2, **SCOPE)
    alone = [two.generate(random_ids(60, seed=seed), max_tokens=9, ignore_eos=True).token_ids for seed in range(2)]
    streams = [two.stream(random_ids(60, seed=seed), max_tokens=9, ignore_eos=True) for seed in range(2)]
    pairs = list(zip(*streams, strict=True))
    assert [[token for pair in pairs for token in pair[i].token_ids] for i in range(2)] == alone
    for stream in (two.stream(random_ids(60), max_tokens=99) for _ in range(3)):
        next(stream)
        stream.close()
    assert two.generate(random_ids(60, seed=1), max_tokens=9, ignore_eos=True).token_ids == alone[1]


def run(tokens: int) -> subprocess.Popen[bytes]:
    options = ["--gpus", "2", "--ignore-eos", "--quiet", "--max-tokens", str(tokens), "--text", "The old house"]
    command = [sys.executable, "-m", "minirea", "generate", "--model", str(DEMO), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def users_of_gpus() -> set[int]:
    """Processes that have memory of a GPU, as far as nvidia-smi tells them here."""
    query = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, check=False, text=True).stdout
    except FileNotFoundError:
        return set()
    return {int(word) for word in listed.split() if word.isdecimal()}


@pytest.mark.parametrize(
    ("whom", "number", "status", "message"),
    [
        ("rank", signal.SIGKILL, 1, "minirea: error: rank 1 of 2 was ended by SIGKILL"),
        ("leader", signal.SIGINT, 130, ""),
        ("leader", signal.SIGKILL, -9, ""),
    ],
)
def test_no_process_outlives_a_command(whom: str, number: int, status: int, message: str) -> None:
    """While kernels of both GPUs wait for each other."""
    with run(100_000) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(400)
        follower = follower_of(process)
        os.kill(follower if whom == "rank" else process.pid, number)
        process.stdout.read()
        assert process.stderr.read().decode().strip() == message
        assert process.wait() == status
    wait_for(follower)


@pytest.mark.parametrize("number", range(RUNS))
def test_runs_start_and_end(number: int) -> None:
    """Every tenth loses a rank, after another number of characters each; none leaves a process behind, nor memory of a
    GPU, which others may use meanwhile.
    """
    killed = number % 10 == 0
    with run(100_000 if killed else 20) as process:
        assert process.stdout is not None
        follower = follower_of(process)
        assert process.stdout.read(1 + 37 * number % 1500 if killed else 1)
        processes = {follower, *family(process.pid)}
        seen = users_of_gpus() & processes
        if killed:
            os.kill(follower, signal.SIGKILL)
        process.stdout.read()
        assert process.wait() == (1 if killed else 0)
    for one in processes:
        wait_for(one)
    assert not seen & users_of_gpus()
