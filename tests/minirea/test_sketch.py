"""Sketches in the engine, on a CPU: every token and every cached number is what it is without them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from testing import random_ids, tiny_model, write_checkpoint, write_tokenizer

import minirea
from minirea.cache import KVCache, cache_bytes
from minirea.cli import main
from minirea.errors import InputError
from minirea.kernels import reference
from minirea.placement import FIRST_SKETCHED_LAYER, Placement

SCOPE = {"global_size": 4, "local_size": 8, "span_top_k": 2, "span_size": 4, "max_spans": 5, "chunk_size": 8}
pytestmark = pytest.mark.filterwarnings("ignore:sketch is 'int8' on a CPU")
# Neither is read by minirea.cpu_attention, whose sums are others, so that everything has to be equal bit for bit.
KINDS: list[dict[str, Any]] = [{"span_scope": "kv_head", "vote_size": 3, "decode_spans": 3}, {"dtype": "float16"}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(
        write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", tiny_model(num_hidden_layers=3))
    )


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The keys of every step that looked at a sketch."""
    seen: list[torch.Tensor] = []
    score = reference.score_by_sketch

    def spy(q_GRD: torch.Tensor, k_GND: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        seen.append(k_GND)
        return score(q_GRD, k_GND, *arguments, **options)

    monkeypatch.setattr(reference, "score_by_sketch", spy)
    return seen


def pair(directory: Path, **fields: Any) -> tuple[minirea.LLM, minirea.LLM]:
    """The model without sketches and with them."""
    without = minirea.load(directory, **SCOPE | {"dense_size": 20} | fields)
    return without, minirea.load(directory, sketch="int8", **SCOPE | {"dense_size": 20} | fields)


def check_equal(one: minirea.Session, other: minirea.Session) -> None:
    assert one.ids == other.ids
    assert one.cache.seq_len == other.cache.seq_len
    for name in ("k", "v"):
        for a, b in zip(getattr(one.cache, name), getattr(other.cache, name), strict=True):
            assert torch.equal(a[:, : one.cache.seq_len], b[:, : one.cache.seq_len])


def check_sketches(cache: KVCache) -> None:
    """Those that the cache counts are what keys and mean make of them."""
    for k_GND, sketch in zip(cache.k, cache.sketches, strict=True):
        if sketch is not None:
            again = sketch._replace(codes=sketch.codes.clone(), scales=sketch.scales.clone())
            reference.sketch_keys(k_GND, again, 0, cache.sketched_len)
            assert torch.equal(sketch.codes[:, : cache.sketched_len], again.codes[:, : cache.sketched_len])
            assert torch.equal(sketch.scales[:, : cache.sketched_len], again.scales[:, : cache.sketched_len])


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_is_the_same_with_sketches(directory: Path, kind: dict[str, Any], looks: list[torch.Tensor]) -> None:
    """Through answers, growth, continuations and rewinds: to what is sketched, to nothing, and in the dense part."""
    sessions = [llm.session() for llm in pair(directory, **kind)]
    for keep, prompt, max_tokens in ((0, 15, 9), (24, 60, 20), (70, 5, 30), (50, 1, 12), (0, 90, 4), (10, 40, 6)):
        outs = []
        for session in sessions:
            session.rewind(keep)
            outs.append(session.generate(random_ids(prompt, seed=keep), max_tokens, ignore_eos=True).token_ids)
        assert outs[0] == outs[1]
        check_equal(*sessions)
        check_sketches(sessions[1].cache)
    layers = sessions[1].llm.config.num_layers
    assert len(looks) > 50 and len(looks) % (layers - FIRST_SKETCHED_LAYER) == 0


def test_the_first_layer_and_prompts_have_no_sketch(directory: Path, looks: list[torch.Tensor]) -> None:
    llm = pair(directory)[1]
    session = llm.session(100)
    session.prefill(random_ids(80))
    assert not looks and session.cache.sketched_len == 0
    session.generate(random_ids(3), 4, ignore_eos=True)
    assert len(looks) == 4 * (llm.config.num_layers - FIRST_SKETCHED_LAYER)
    assert session.cache.sketches[0] is None
    assert {k.data_ptr() for k in looks} == {k.data_ptr() for k in session.cache.k[FIRST_SKETCHED_LAYER:]}


@pytest.mark.parametrize("kind", KINDS)
def test_a_context_in_a_file_gets_its_sketches_anew(directory: Path, tmp_path: Path, kind: dict[str, Any]) -> None:
    """A file is of either, and opened by either."""
    answers = []
    for writer in pair(directory, **kind):
        session = writer.session()
        session.generate(random_ids(70), 3, ignore_eos=True)
        session.save(tmp_path / "book.ctx")
        for reader in pair(directory, **kind):
            opened = reader.open_session(tmp_path / "book.ctx")
            answers.append(opened.generate(random_ids(4, seed=1), 8, ignore_eos=True).token_ids)
            check_sketches(opened.cache)
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize("attention", ["streaming", "full"])
def test_nothing_to_look_for_needs_no_sketch(directory: Path, attention: str) -> None:
    llm = pair(directory)[1].with_attention(attention, **SCOPE)
    assert llm.session(50).cache.sketches == [None] * 3
    assert llm.session(50).cache.sketch_nbytes == 0
    again = llm.with_attention("reattention", **SCOPE).session(50).cache
    assert again.sketches[-1] is not None


def test_logits_take_no_sketch_that_is_not_there(directory: Path) -> None:
    ids = random_ids(60)
    without, with_sketch = (llm.logits(ids) for llm in pair(directory, **KINDS[0]))
    assert torch.equal(without, with_sketch)


def bytes_of_tensors(cache: KVCache) -> int:
    sketches = [tensor for sketch in cache.sketches if sketch is not None for tensor in sketch]
    return sum(tensor.nbytes for tensor in (*cache.tensors, *sketches))


@pytest.mark.parametrize("dense_limit", [0, 30])
def test_bytes_are_those_of_the_tensors(dense_limit: int, directory: Path) -> None:
    llm = pair(directory)[1]
    for capacity in (1, 40):
        cache = KVCache(
            llm.config,
            capacity,
            dense_limit,
            llm.model.device,
            torch.float32,
            placements=lambda _: [Placement(sketched=True)],
        )
        assert cache.nbytes == bytes_of_tensors(cache)
        plain = cache_bytes(llm.config, capacity, dense_limit, torch.float32)
        assert cache.nbytes == plain + cache.sketch_nbytes and cache.sketch_nbytes > 0
        cache.reserve(100)
        assert cache.nbytes == bytes_of_tensors(cache)
        assert all(sketch is None or sketch.codes.shape[1] == 100 for sketch in cache.sketches)


def test_the_plan_counts_them(directory: Path) -> None:
    plans = [minirea.api.read_model(directory, sketch=sketch, **SCOPE).plan(500) for sketch in ("off", "int8")]
    cache = pair(directory)[1].session(500).cache
    assert plans[1].cache - plans[0].cache == cache.sketch_nbytes


def test_flags_and_footer(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "".join(f" word{i}" for i in range(40))
    sizes = ["--local-size", "8", "--global-size", "4", "--max-spans", "5", "--span-size", "4", "--dense-size", "20"]
    outputs = {}
    for sketch in ("auto", "off", "int8"):
        arguments = ["generate", "--model", str(directory), "--text", text, "--max-tokens", "6", "--ignore-eos"]
        assert main([*arguments, "--span-scope", "kv_head", *sizes, "--sketch", sketch]) == 0
        out, err = capsys.readouterr()
        outputs[sketch] = out
        assert ("of it int8 sketches" in err) == (sketch == "int8")
        assert ("minirea: warning: --sketch is 'int8' on a CPU, where it saves nothing" in err) == (sketch == "int8")
    assert len(set(outputs.values())) == 1


def test_what_cannot_be_is_refused_in_one_line(directory: Path) -> None:
    with pytest.raises(InputError, match="sketch is 'fp8', expected one of auto, off, int8"):
        minirea.load(directory, sketch="fp8")
    for load in (functools.partial(minirea.load, directory, sketch="int8"), pair(directory)[1].with_attention):
        for votes, said in (
            ({"vote_window": 4, "carry_votes": True}, "4, carry_votes=True"),
            ({"carry_votes": True}, "1, carry_votes=True"),
        ):
            with pytest.raises(InputError, match=rf"sketch is 'int8', expected 'off' .* \(vote_window={said}\)"):
                load(attention="reattention", **SCOPE | votes)
        load(attention="streaming", vote_window=4, carry_votes=True, **SCOPE)
