"""A model on several ranks, over gloo: what one process gives, and one line where a rank ends."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import at_once, follower_of, wait_for
from testing import random_ids, tiny_model, write_checkpoint, write_tokenizer

import minirea
from minirea import memory
from minirea.cache import KVCache
from minirea.checkpoint_config import load_config
from minirea.errors import InputError, MemoryLimitError, RankError
from minirea.evaluation import evaluate
from minirea.follower import Follower
from minirea.leader import Leader, together, versions_here
from minirea.placement import FIRST_SKETCHED_LAYER
from minirea.plan import plan_run
from minirea.ranks import Launched, Ranks

SCOPE: dict[str, Any] = {"global_size": 4, "local_size": 24, "span_top_k": 2, "span_size": 4, "max_spans": 5}
SCOPE |= {"chunk_size": 16, "tail_size": 12, "tail_chunk_size": 5, "dense_size": 40}
HEADS: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 114}
# Each shape of model once, in some dtype.
MODELS: list[tuple[dict[str, Any], torch.dtype]] = [
    (HEADS, torch.float32),
    (HEADS | {"attention_bias": True, "mlp_bias": True}, torch.bfloat16),
    (HEADS | {"tie_word_embeddings": True}, torch.float32),
    (HEADS | {"tie_word_embeddings": True, "head_dim": 12}, torch.float16),
]
LENGTHS = (1, 29, 41, 60, 110)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(write_checkpoint(tmp_path_factory.mktemp("model"), tiny_model(**HEADS)))


@pytest.fixture(autouse=True, scope="module")
def _followers_find_this_file() -> Iterator[None]:
    """Some of their steps are here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield


@pytest.fixture(autouse=True)
def _no_models_left() -> Iterator[None]:
    """So that the next test may ask for another number of ranks."""
    yield
    gc.collect()


def tokens(llm: minirea.LLM, ids: list[int], **options: Any) -> Any:
    out = llm.generate(ids, max_tokens=4, ignore_eos=True, **options)
    return out.token_ids, out.stats.scope


@pytest.mark.parametrize("gpus", [2, 4])
def test_ranks_give_the_tokens_of_one_process(tmp_path: Path, gpus: int) -> None:
    """In every mode at several lengths for the first model; the others differ only in their weights."""
    modes = [("reattention", "layer"), ("reattention", "kv_head"), ("streaming", None), ("full", None)]
    for index, (fields, dtype) in enumerate(MODELS if gpus == 2 else MODELS[:2]):
        path = write_checkpoint(tmp_path / str(index), tiny_model(index, **fields), dtype)
        one, several = (minirea.load(path, device="cpu", gpus=n, **SCOPE) for n in (1, gpus))
        assert several.config == one.config
        assert several.model.nbytes < one.model.nbytes
        for mode, span_scope in modes[: 1 if index else None]:
            pair = [llm.with_attention(mode, **SCOPE | {"span_scope": span_scope}) for llm in (one, several)]
            for length in LENGTHS[-1:] if index or mode != "reattention" or gpus > 2 else LENGTHS:
                ids = random_ids(length, seed=length)
                expected, found = (tokens(llm, ids) for llm in pair)
                assert found == expected, (fields, mode, span_scope, length)
        found, expected = (llm.logits(random_ids(70)) for llm in (several, one))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def of_all_ranks(model: Any, cache: KVCache) -> Iterator[list[tuple[int, ...]]]:
    """What the cache is on each of them: capacity, sketched tokens, layers with sketches."""
    mine = [cache.capacity, cache.sketched_len, sum(sketch is not None for sketch in cache.sketches)]
    yield [tuple(row) for row in model.ranks.all_gather(torch.tensor([mine])).tolist()]


def check_sketched(directory: Path, gpus: int) -> None:
    """Each rank has sketches of its own heads' keys, and the answers are those without any, also after growth and
    rewinds; in float32 those of one process, where half precision rounds the sums of ranks elsewhere.
    """
    kinds: list[tuple[str, int, dict[str, Any]]] = [
        ("float32", 1, {"span_scope": "kv_head", "vote_size": 3}),
        ("float16", gpus, {}),  # which minirea.cpu_attention does not read
    ]
    for dtype, devices, fields in kinds[: 2 if gpus == 2 else 1]:
        sizes = SCOPE | fields
        without = minirea.load(directory, device="cpu", dtype=dtype, gpus=devices, **sizes)
        streaming = minirea.load(
            directory, device="cpu", dtype=dtype, gpus=gpus, sketch="int8", attention="streaming", **sizes
        )
        sessions = [llm.session() for llm in (without, streaming.with_attention("reattention", **sizes))]
        for keep, num_tokens, max_tokens in ((0, 60, 4), (50, 90, 9), (130, 5, 5)):
            outs = []
            for session in sessions:
                session.rewind(keep)
                out = session.generate(random_ids(num_tokens, seed=keep), max_tokens, ignore_eos=True)
                outs.append((out.token_ids, out.stats.scope))
            assert outs[0] == outs[1], (dtype, keep)
        assert out.stats.sketch_bytes > 0
        _, sketched, layers = everywhere_the_same(streaming, sessions[1].cache)
        assert sketched > 100 and layers == without.config.num_layers - FIRST_SKETCHED_LAYER


def follower_ids() -> list[int]:
    assert Leader._current is not None
    return [process.pid for process in Leader._current._processes]


def kill_rank_two(model: Any, _: Any) -> Iterator[int]:
    """Steps in which every rank waits for all, and the third one ends."""
    while True:
        yield 1
        if model.ranks.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        model.ranks.all_reduce(torch.ones(3))


def check_that_all_end(llm: minirea.LLM, steps: Any, kind: type[Exception], message: str) -> None:
    """In the middle of a step, in which the others wait for the one that ends."""
    session, pids = llm.session(10), follower_ids()
    with pytest.raises(kind, match=message):
        list(together(steps, llm.model, session.cache))
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    for _ in range(2):
        with pytest.raises(RankError):
            llm.generate([3])


# Tests of as many ranks follow one another, so that these need not start again.
@pytest.mark.filterwarnings("ignore:sketch is 'int8' on a CPU")
def test_four_ranks_with_sketches_give_what_they_give_without(directory: Path) -> None:
    check_sketched(directory, 4)


def test_a_rank_that_is_killed_ends_all(directory: Path) -> None:
    llm = minirea.load(directory, device="cpu", gpus=4, **SCOPE)
    check_that_all_end(llm, kill_rank_two, RankError, "^rank 2 of 4 was ended by SIGKILL$")


def test_the_demo_models_text_is_that_of_one_process() -> None:
    demo = Path(minirea.__file__).parent.parent / "weights" / "demo"
    one, two = (minirea.load(demo, device="cpu", gpus=gpus) for gpus in (1, 2))
    for length in (7, 1500):
        ids = random_ids(length, one.config.vocab_size, seed=length)
        assert tokens(one, ids) == tokens(two, ids)


@pytest.mark.filterwarnings("ignore:sketch is 'int8' on a CPU")
def test_two_ranks_with_sketches_give_what_they_give_without(directory: Path) -> None:
    check_sketched(directory, 2)


def test_draws_are_those_of_one_process(directory: Path) -> None:
    one, two = (minirea.load(directory, device="cpu", gpus=gpus, **SCOPE) for gpus in (1, 2))
    options = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 5}
    assert tokens(one, random_ids(60), **options) == tokens(two, random_ids(60), **options)
    assert len(tokens(two, random_ids(60), temperature=1.0)[0]) == 4


def test_votes_with_earlier_tokens_are_those_of_one_process(directory: Path) -> None:
    """Also after tokens that were taken back, and those of earlier layers too."""
    fields = SCOPE | {"vote_window": 4, "vote_size": 4, "decode_spans": 3, "carry_votes": True}
    found = []
    for gpus in (1, 2):
        session = minirea.load(directory, device="cpu", gpus=gpus, **fields).session()
        for num_tokens, keep in ((60, 50), (1, 48), (5, 5)):
            out = session.generate(random_ids(num_tokens, seed=keep), max_tokens=4, ignore_eos=True)
            session.rewind(keep)
            found.append((out.token_ids, out.stats.scope))
    assert found[:3] == found[3:]


def winners_of_all(model: Any, cache: Any) -> Iterator[Any]:
    """Those of its tokens, and of its marks, with their places."""
    places = torch.tensor([cache.seq_len, *cache.marks]).expand(2, -1)
    marks = [mark.flatten(1)[:2] for mark in cache.marks.values()]
    yield model.ranks.all_gather(torch.cat([cache.winners.flatten(1), *marks, places], 1))


def check_that_all_hold_the_same(llm: minirea.LLM, cache: Any) -> None:
    ((first, other),) = (found.chunk(2) for found in together(winners_of_all, llm.model, cache))
    assert (first >= 0).any()
    assert torch.equal(first, other)


def decode_ahead(model: Any, cache: Any, last_id: int, sampler: Any, limit: int) -> Iterator[int]:
    """Like minirea.graph.decode_ahead, on a CPU: one step ahead of what is yielded, which is taken back."""
    ids, start, read = [torch.tensor([last_id])], cache.seq_len, 0
    try:
        for read in range(1, limit + 1):
            for _ in range(min(limit, read + 1) - len(ids) + 1):
                ids.append(sampler(model.logits(model.forward(ids[-1], cache))[-1]))
            yield int(ids[read])
    finally:
        cache.rewind(start + read)


def raising(error: Exception) -> None:
    raise error


def test_all_ranks_take_back_what_one_does(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also several times with no step between: first to where a piece has begun, whose winners return, then further.
    Of a piece that is interrupted after its first step, all that was to be read.
    """
    votes = {"vote_window": 4, "carry_votes": True, "tail_size": 20, "tail_chunk_size": 3}
    llm = minirea.load(directory, device="cpu", gpus=2, **SCOPE | votes)
    session = llm.session()
    for num_tokens in (100, 50):
        session.prefill(random_ids(num_tokens, seed=num_tokens))
    session.rewind(100)
    session.rewind(98)
    for _ in range(2):
        check_that_all_hold_the_same(llm, session.cache)
        session.prefill(random_ids(30))
        with monkeypatch.context() as patch:
            patch.setattr("minirea.generate.ReadingBar.update", lambda *_: raising(InterruptedError()))
            with pytest.raises(InterruptedError):
                session.prefill(random_ids(12))


def test_sessions_and_streams_that_take_turns(directory: Path) -> None:
    """Rewound, grown, left early and side by side, as on one device."""

    def course(llm: minirea.LLM) -> list[Any]:
        first, second = llm.session(), llm.session(20)
        first.prefill(random_ids(50))
        streams = [
            s.stream(random_ids(9, seed=i), max_tokens=5, ignore_eos=True) for i, s in enumerate((first, second))
        ]
        found: list[Any] = [piece.token_ids for pair in zip(*streams, strict=True) for piece in pair]
        first.rewind(30)
        for piece in first.stream(random_ids(70, seed=3), max_tokens=50, ignore_eos=True):
            found.append(piece.token_ids)
            if len(found) > 13:
                break
        found.append(first.generate(random_ids(3), max_tokens=4, ignore_eos=True).token_ids)
        return [*found, first.ids, second.ids]

    one, two = (minirea.load(directory, device="cpu", gpus=gpus, **SCOPE) for gpus in (1, 2))
    assert course(one) == course(two)


def test_a_forked_process_leaves_the_ranks_alone(directory: Path) -> None:
    """Also where its end calls what the end of a program does."""
    llm = minirea.load(directory, device="cpu", gpus=2, **SCOPE)
    expected = tokens(llm, random_ids(9))

    def forked(_: int) -> None:
        with pytest.raises(RankError, match="belong to the process that loaded it"):
            llm.generate([3])
        assert Leader._current is not None
        Leader._current.end()

    at_once(1, forked)
    assert tokens(llm, random_ids(9)) == expected


def test_an_interrupted_step_ends_first(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that stopped in different places would wait for each other: the session goes on afterwards."""
    llm = minirea.load(directory, device="cpu", gpus=2, **SCOPE)
    expected, ids = tokens(llm, random_ids(60)), random_ids(60)
    forward, struck = llm.model.read, []

    def strike(*arguments: Any) -> None:
        if not struck:
            struck.append(1)
            signal.raise_signal(signal.SIGINT)
        forward(*arguments)
        struck.append(2)

    monkeypatch.setattr(llm.model, "read", strike)
    session = llm.session()
    with pytest.raises(KeyboardInterrupt):
        session.generate(ids, max_tokens=4, ignore_eos=True)
    assert struck == [1, 2]
    assert (session.ids, session.cache.seq_len) == ([], 0)
    monkeypatch.undo()
    assert session.generate(ids, max_tokens=4, ignore_eos=True).token_ids == expected[0]


@pytest.mark.parametrize("loop", ["one_by_one", "ahead"])
def test_ranks_hold_the_same_after_an_interrupted_answer(
    directory: Path, monkeypatch: pytest.MonkeyPatch, loop: str
) -> None:
    """In its first step, a later one, or while tokens are taken back; and after a further question."""
    llm = minirea.load(directory, device="cpu", gpus=2, **SCOPE | {"vote_window": 4, "carry_votes": True})
    if loop == "ahead":
        monkeypatch.setattr("minirea.generate.decode_one_by_one", decode_ahead)
    kinds: list[tuple[Any, str, int]] = [(llm.model, "forward", step) for step in (1, 2, 4)]
    for owner, name, at in [*kinds, (KVCache, "_rows_of", 1), (KVCache, "_forget_brought", 1)]:
        session, calls, original = llm.session(), [], getattr(owner, name)
        session.prefill(random_ids(60))

        def strike(*arguments: Any, original: Any = original, calls: Any = calls, at: int = at, **named: Any) -> Any:
            calls.append(1)
            if len(calls) == at:
                signal.raise_signal(signal.SIGINT)
            return original(*arguments, **named)

        with monkeypatch.context() as patch:
            if name == "forward":
                patch.setattr(owner, name, strike)
            with contextlib.suppress(KeyboardInterrupt):
                list(session.stream(random_ids(9), max_tokens=5, ignore_eos=True))
            if name != "forward":
                patch.setattr(owner, name, strike)
                with pytest.raises(KeyboardInterrupt):
                    session.rewind(len(session.ids) - 3)
        assert len(calls) >= at
        check_that_all_hold_the_same(llm, session.cache)
        session.generate(random_ids(2), max_tokens=2, ignore_eos=True)
        check_that_all_hold_the_same(llm, session.cache)


def numbers_of_ranks(model: Any, _: Any) -> Iterator[list[int]]:
    rank = model.ranks.rank
    yield model.ranks.least(lambda: [10 + rank, 10 - rank, sys.maxsize - rank])


def have_little_room(model: Any, _: Any, rank: int, room: int) -> Iterator[None]:
    if model.ranks.rank == rank:
        memory.available_bytes = (lambda _: room) if room else AVAILABLE_BYTES  # type: ignore[assignment]
    yield


def fail_to_grow(model: Any, _: Any, rank: int, fails: bool) -> Iterator[None]:
    if model.ranks.rank == rank:
        error = MemoryLimitError("no more here")
        KVCache._grow_layer = (lambda *_: raising(error)) if fails else GROW_LAYER  # type: ignore[method-assign]
    yield


AVAILABLE_BYTES, GROW_LAYER = memory.available_bytes, KVCache._grow_layer


def test_ranks_agree_on_what_fits(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the least room that any has. What one cannot hold is refused in one line, and all go on as they were: also
    where memory is refused that had been counted as free, to either of them.
    """
    for owner, name in ((memory, "available_bytes"), (KVCache, "_grow_layer")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # as it is, and afterwards again
    llm = minirea.load(directory, device="cpu", gpus=2, **SCOPE)
    alone = minirea.load(directory, device="cpu", **SCOPE).session(70)
    session, tiny = llm.session(70), llm.session(1)

    def everywhere(steps: Any, *arguments: Any) -> Any:
        (found,) = together(steps, llm.model, tiny.cache, *arguments)
        return found

    assert everywhere(numbers_of_ranks) == [10, 9, sys.maxsize - 1]
    for s in (session, alone):
        s.prefill(random_ids(60))
    for rank in (0, 1):
        everywhere(have_little_room, rank, 300_000_000)
        with pytest.raises(MemoryLimitError, match=r"^not enough memory on cpu: .* 300.0 MB is free; .* fit$"):
            llm.session(1_000_000)
        with pytest.raises(MemoryLimitError, match=r"about [0-9,]+ of 1,000,0[0-9]+ tokens fit$"):
            session.generate(random_ids(5), max_tokens=999_935)
        everywhere(have_little_room, rank, 0)
        everywhere(fail_to_grow, rank, True)
        with pytest.raises(MemoryLimitError, match=r"^no more here$"):
            session.generate(random_ids(5), max_tokens=40)
        everywhere(fail_to_grow, rank, False)
        assert everywhere_the_same(llm, session.cache)[0] == 70
        outs = [s.generate(random_ids(5, seed=rank), max_tokens=4, ignore_eos=True) for s in (session, alone)]
        assert outs[0].token_ids == outs[1].token_ids
    assert everywhere_the_same(llm, session.cache)[0] == alone.cache.capacity == 140


def everywhere_the_same(llm: minirea.LLM, cache: Any) -> tuple[int, ...]:
    """`of_all_ranks`, of any."""
    (found,) = together(of_all_ranks, llm.model, cache)
    assert len(set(found)) == 1
    return found[0]


def test_what_ranks_cannot_do_is_refused_by_name(directory: Path, tmp_path: Path) -> None:
    llm = minirea.load(directory, device="cpu", gpus=2, **SCOPE)
    session = llm.session()
    session.generate(random_ids(60), max_tokens=2)
    text = tmp_path / "text"
    text.write_text("some text " * 99)
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("gpus is 2, expected 1: sources", session.sources),
        ("gpus is 2, expected 1: contexts in files", lambda: session.save(tmp_path / "x.ctx")),
        ("gpus is 2, expected 1: contexts in files", lambda: llm.open_session(tmp_path / "x.ctx")),
        (
            "gpus is 2, expected 1: evaluations of perplexity",
            lambda: evaluate("perplexity", llm, text=(str(text),), lengths=(64,)),
        ),
        ("gpus is 2, expected 1: what looks inside", lambda: llm.model.forward(torch.tensor([3]), session.cache)),
        ("gpus is 3, expected a divisor of the model's 4", lambda: minirea.load(directory, device="cpu", gpus=3)),
        ("gpus is 0, expected an integer of at least 1", lambda: minirea.load(directory, device="cpu", gpus=0)),
        ("gpus is 4, but this process has a model on 2", lambda: minirea.load(directory, device="cpu", gpus=4)),
    ]
    for message, call in refused:
        with pytest.raises(InputError, match=message):
            call()
    assert tokens(llm, random_ids(60))  # and what they can do goes on


def test_a_rank_with_other_files_is_told(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minirea.api.fingerprint", lambda *_: "another")
    with pytest.raises(RankError, match="holds another model for rank 1 than for the first one"):
        minirea.load(directory, device="cpu", gpus=2)
    monkeypatch.undo()
    assert minirea.load(directory, device="cpu", gpus=2).generate([3], max_tokens=1).token_ids


def test_an_idle_rank_that_ends_is_seen_at_the_next_step(directory: Path) -> None:
    """The program goes on, and may load the model anew."""
    llm = minirea.load(directory, device="cpu", gpus=2, **SCOPE)
    os.kill(follower_ids()[0], signal.SIGKILL)
    with pytest.raises(RankError, match="rank 1 of 2 was ended by SIGKILL"):
        llm.generate([3])
    again = minirea.load(directory, device="cpu", gpus=2, **SCOPE)
    assert tokens(again, [3]) == tokens(minirea.load(directory, device="cpu", **SCOPE), [3])


def fail_to_measure(model: Any, _: Any, rank: int) -> Iterator[None]:
    """From then on."""
    if model.ranks.rank == rank:
        memory.available_bytes = lambda _: raising(RuntimeError("no driver"))  # type: ignore
    yield


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_say_what_fits_ends_all(directory: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """The other waits for its numbers, and it for nothing."""
    monkeypatch.setattr("minirea.leader._GRACE", 0.3)
    monkeypatch.setattr(memory, "available_bytes", memory.available_bytes)  # and afterwards again
    llm = minirea.load(directory, device="cpu", gpus=2, **SCOPE)
    session = llm.session(5)
    list(together(fail_to_measure, llm.model, session.cache, rank))
    with pytest.raises(RankError, match=f"^rank {rank} lost contact with another: no driver$"):
        llm.session(50)


def fail_on_rank_one(model: Any, _: Any) -> Iterator[int]:
    while True:
        yield 1
        if model.ranks.rank == 1:
            raise InputError("no room left")
        model.ranks.all_reduce(torch.ones(3))


def fail_on_the_leader(model: Any, _: Any) -> Iterator[int]:
    yield 1
    if model.ranks.rank == 0:
        raise InputError("not here")
    model.ranks.all_reduce(torch.ones(3))


@pytest.mark.parametrize(
    ("steps", "kind", "message"),
    [
        (fail_on_rank_one, RankError, "^rank 1 failed: no room left$"),
        (fail_on_the_leader, InputError, "^not here$"),
    ],
)
def test_a_rank_that_fails_ends_all(directory: Path, steps: Any, kind: type[Exception], message: str) -> None:
    check_that_all_end(minirea.load(directory, device="cpu", gpus=2, **SCOPE), steps, kind, message)


def test_a_rank_that_cannot_start_is_told(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if Leader._current is not None:
        Leader._current.end()
    for code in ("raise ValueError('nothing')", "raise SystemExit(3)"):
        monkeypatch.setattr("minirea.leader._FOLLOWER", code)
        with pytest.raises(RankError, match=r"^rank 1 of 2 ended with status [13]$"):
            minirea.load(directory, device="cpu", gpus=2)


def command(directory: Path, *arguments: str) -> list[str]:
    given = ["generate", "--model", str(directory), "--device", "cpu", "--ignore-eos", "--text", "some text"]
    return [sys.executable, "-m", "minirea", *given, *arguments]


@pytest.mark.parametrize(
    ("whom", "number", "status", "message"),
    [
        ("rank", signal.SIGKILL, 1, "minirea: error: rank 1 of 2 was ended by SIGKILL"),
        ("leader", signal.SIGINT, 130, ""),
        ("leader", signal.SIGKILL, -9, ""),
    ],
)
def test_no_process_outlives_a_command(directory: Path, whom: str, number: int, status: int, message: str) -> None:
    run = command(directory, "--gpus", "2", "--max-tokens", "100000", "--quiet", "--attention", "streaming")
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(20)  # it is at work
        follower = follower_of(process)
        os.kill(follower if whom == "rank" else process.pid, number)
        process.stdout.read()
        errors = process.stderr.read().decode()
        assert process.wait() == status
    assert errors.strip() == message
    wait_for(follower)


def test_under_torchrun_its_processes_are_the_ranks(directory: Path) -> None:
    run = command(directory, "--gpus", "2", "--max-tokens", "8", "--quiet")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    expected = minirea.load(directory, device="cpu").generate("some text", max_tokens=8, ignore_eos=True).text
    found = subprocess.run([*torchrun, *run[2:]], capture_output=True, check=False, text=True)
    assert (found.returncode, found.stdout) == (0, expected + "\n"), found.stderr


def test_a_program_that_torchrun_starts_gets_the_same(directory: Path, tmp_path: Path) -> None:
    """The first of its processes returns from `load`; the others serve it there, and end with it."""
    program = tmp_path / "program.py"
    program.write_text(f"""
import minirea
llm = minirea.load({str(directory)!r}, device="cpu", gpus=2)
print(llm.generate("some text", max_tokens=8, ignore_eos=True).token_ids)
""")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    expected = minirea.load(directory, device="cpu").generate("some text", max_tokens=8, ignore_eos=True).token_ids
    paths = os.pathsep.join(path for path in sys.path if path)
    found = subprocess.run(
        torchrun, capture_output=True, check=False, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert (found.returncode, found.stdout) == (0, f"{expected}\n"), found.stderr


def test_ranks_of_other_versions_are_told() -> None:
    leader = Leader.__new__(Leader)
    leader._check_versions(versions_here())
    for reply, message in (
        (
            "minirea 0, torch 1, Python 2",
            "a rank runs minirea 0, torch 1, Python 2, expected minirea .* like the first",
        ),
        (RankError("rank 1 failed: no torch"), "^rank 1 failed: no torch$"),
    ):
        with pytest.raises(RankError, match=message):
            leader._check_versions(reply)


def test_gpus_that_do_not_reach_each_other_are_told(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what would go through memory that both reach goes another way."""
    ranks, zeros = Ranks.__new__(Ranks), torch.zeros
    ranks.size, ranks.device = 2, torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: False)  # noqa: ARG005
    monkeypatch.setattr(torch, "zeros", lambda *sizes, dtype, device: zeros(*sizes, dtype=dtype))  # noqa: ARG005
    monkeypatch.setattr(ranks, "all_reduce", lambda x: 2 * x)
    with pytest.warns(minirea.MinireaWarning, match="do not reach each other's memory .*: their sums go through NCCL"):
        assert ranks.open_peers(load_config(directory)) is None


def test_the_plan_is_that_of_each_device(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, whose memory all share, of all together."""
    one, two = (minirea.api.read_model(directory, device="cpu", gpus=gpus) for gpus in (1, 2))
    plans = [files.plan(1000) for files in (one, two)]
    assert plans[0].weights < plans[1].weights < 1.5 * plans[0].weights  # the embedding is there twice
    assert plans[1].cache == plans[0].cache
    of_each = plan_run(directory, two.attention, two.dtype, 1000)
    assert (2 * of_each.weights, 2 * of_each.cache) == (plans[1].weights, plans[1].cache)
    monkeypatch.setattr(two.attention, "device", torch.device("cuda"))
    monkeypatch.setattr("minirea.api.fit_steps", lambda *_: of_each)
    assert two.plan(1000) == of_each


def test_another_number_of_ranks_than_torchruns_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="gpus is 4, but torchrun has started 2 processes"):
        minirea.load("anywhere", gpus=4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(InputError, match="torchrun has 2 ranks, 1 of them here"):
        Launched.here()


def test_followers_say_why_they_cannot_do_what_is_asked() -> None:
    follower = Follower(Ranks.__new__(Ranks))
    follower.ranks.rank = 3
    error = follower.answer("reserve", [5, 100])
    assert isinstance(error, RankError)
    assert str(error).startswith("rank 3 failed: KeyError")
