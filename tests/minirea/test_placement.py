"""Where caches lie: what is chosen from what memory there is, and that nothing of a text depends on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shapes import named
from testing import random_ids, tiny_model, write_checkpoint

import minirea
from minirea import api, memory, plan
from minirea.attention import STEP_CHUNKS, Attention
from minirea.cache import KVCache, array_bytes
from minirea.checkpoint_config import load_config
from minirea.cli import main
from minirea.cli.output import footer
from minirea.config import ModelConfig, ReAttentionConfig
from minirea.errors import InputError, MemoryLimitError
from minirea.generate import Stats
from minirea.kernels.near import near_size
from minirea.placement import Placement, placements
from minirea.weights import weight_bytes

pytestmark = pytest.mark.filterwarnings("ignore:sketch is 'int8' on a CPU")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SCOPE = {"global_size": 4, "local_size": 8, "span_top_k": 2, "span_size": 4, "max_spans": 5, "chunk_size": 8}
SCOPE |= {"dense_size": 20}
# Neither is read by minirea.cpu_attention, so that everything has to be equal bit for bit.
KINDS: list[dict[str, Any]] = [{"span_scope": "kv_head"}, {"dtype": "bfloat16"}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", tiny_model(num_hidden_layers=3))


def test_as_little_as_possible_is_far() -> None:
    """Values first, then keys of layers with sketches; none where a step could not look at them, or read them."""
    device, near = [Placement(True), Placement(False)], 256
    both = [True, False]
    assert placements(3, "device", both, both, near) == device
    assert placements(3, "host", both, both, 0) == device
    far = [Placement(True, 1, 0, 256), Placement(True, 2, 0, 256), Placement(True, 3, 0, 256)]
    keys = [Placement(True, 3, 1, 256), Placement(True, 3, 2, 256)]
    unsketched = [Placement(False, count, 0, 256) for count in (1, 2, 3)]
    assert placements(3, "auto", both, both, near) == [*device, *far, *keys, *unsketched]
    assert placements(3, "auto", both, both[::-1], near) == [*device, *unsketched, *far, *keys]
    assert placements(3, "host", [False], [False], near) == [unsketched[-1]]
    assert placements(3, "host", [True], [True], near) == [far[-1], *keys]
    assert placements(3, "host", both, both[::-1], near) == [far[-1], *keys, unsketched[-1]]


def test_far_layers() -> None:
    for num_layers in (2, 7, 32):
        for count in range(num_layers):
            layers = Placement(True, num_layers, count, 256).layers_of_far_keys(num_layers)
            assert len(set(layers)) == count and all(1 <= layer < num_layers for layer in layers)
    assert Placement(True, 33, 16, 1).layers_of_far_keys(33) == list(range(1, 33, 2))  # others between them
    assert [Placement(False, 2, 0, 1).values_are_far(layer, 5) for layer in range(5)] == [False] * 3 + [True] * 2


# ------------------------------------------------------------------------------------------------------------ engine


def far(count: int, keys: int = 0, rows: int = 48) -> Any:
    """In place of Attention.placements: so many layers' values and keys are far."""
    return lambda self, _: [Placement(self.sketched and self.sketch == "int8", count, keys, rows)]


def check_near(cache: KVCache) -> None:
    """Near rows hold what a step reads there: the last 28 tokens at least, which is dense_size and a chunk."""
    for layer, near in enumerate(cache.near):
        for rows, whole in zip(near or (None, None), (cache.k[layer], cache.v[layer]), strict=True):
            if rows is not None:
                tokens = torch.arange(max(0, cache.seq_len - 28), cache.seq_len)
                assert torch.equal(rows[:, tokens % rows.shape[1]], whole[:, tokens])


@pytest.mark.parametrize(("kind", "keys"), zip(KINDS, (2, 0), strict=True))
def test_a_session_is_the_same_wherever_its_cache_lies(
    directory: Path, kind: dict[str, Any], keys: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Through prompts, answers, growth out of the device, rewinds near and far, looks at sources, and a file."""
    monkeypatch.setattr("minirea.cache.TAKEN_BACK", 6)
    llm = minirea.load(directory, sketch="int8" if keys else "off", **SCOPE | kind)
    ids, sessions = random_ids(230), []
    for lies in (far(0), far(3, keys), None):
        # The last one moves to the host as it grows beyond 100 tokens: values of two layers, then all.
        moving = lambda self, n: far((n > 100) + (n > 100) + (n > 150), keys if n > 150 else 0)(self, n)  # noqa: E731
        monkeypatch.setattr(Attention, "placements", lies or moving)
        session = llm.session()
        session.prefill(ids[:70])
        texts = [session.generate(ids[70:90], max_tokens=9, ignore_eos=True, sources=2)]
        for keep, start, stop in ((95, 95, 160), (158, 160, 168), (60, 170, 230)):
            session.rewind(keep)
            texts.append(session.generate(ids[start:stop], max_tokens=7, ignore_eos=True))
        session.save(tmp_path / "context")
        opened = llm.open_session(tmp_path / "context")
        texts.append(opened.generate([5], max_tokens=5, ignore_eos=True))
        assert texts[-1].stats.host_cache_bytes == opened.cache.far_nbytes
        for cache in (session.cache, opened.cache):
            check_near(cache)
            assert cache.nbytes == sum(tensor.nbytes for tensor in all_tensors(cache))
        sessions.append((session, texts))
    near, host, moved = sessions
    assert host[0].cache.placement.far_arrays == moved[0].cache.placement.far_arrays == 3 + keys
    for session, texts in (host, moved):
        assert [(out.token_ids, out.sources) for out in texts] == [(out.token_ids, out.sources) for out in near[1]]
        for layer in range(3):
            for ours, theirs in zip(*(s.cache.stored(layer).values() for s in (session, near[0])), strict=True):
                tokens = session.cache.seq_len
                assert torch.equal(ours[:, :tokens], theirs[:, :tokens])


def test_a_move_that_fails_leaves_a_session_as_it_was(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where some layers have moved to the host already: their near rows are filled before the next step."""
    llm, ids = minirea.load(directory, **SCOPE | KINDS[0]), random_ids(90)
    monkeypatch.setattr(Attention, "placements", lambda _, n: far(3 * (n > 100))(llm.model.attention, n))
    session, alone = llm.session(100), llm.session(100)
    grow, moved = KVCache._grow_layer, []

    def grow_two(cache: KVCache, layer: int, *arguments: Any) -> None:
        if len(moved) == 2:
            raise MemoryLimitError("no more")
        moved.append(layer)
        grow(cache, layer, *arguments)

    monkeypatch.setattr(KVCache, "_grow_layer", grow_two)
    session.prefill(ids[:70])
    with pytest.raises(MemoryLimitError, match="no more"):
        session.generate(ids, max_tokens=9)
    assert session.cache.capacity == 100 and len(session.ids) == session.cache.seq_len == 70
    assert [near is not None for near in session.cache.near] == [True] * 3
    alone.prefill(ids[:70])
    outs = [s.generate(ids[70:], max_tokens=9, ignore_eos=True).token_ids for s in (session, alone)]
    assert outs[0] == outs[1]
    check_near(session.cache)


@pytest.mark.parametrize("keep", [50, 45])
def test_near_rows_of_tokens_that_no_step_has_written_are_read_anew(directory: Path, keep: int) -> None:
    """As those of an opened context, also where some are taken back, or where a rank is told how many there are."""
    cache = KVCache(
        load_config(directory), 60, 0, CPU, torch.float32, placements=lambda _: [Placement(False, 3, 0, 48)]
    )
    for tensor in cache.tensors:
        tensor.normal_()
    cache.filled(50)
    cache.rewind(keep)
    cache.seq_len = keep
    cache.reserve(keep + 1)
    check_near(cache)


def all_tensors(cache: KVCache) -> list[torch.Tensor]:
    sketches = [tensor for sketch in cache.sketches if sketch is not None for tensor in sketch]
    near = [rows for both in cache.near if both is not None for rows in both if rows is not None]
    return [*cache.tensors, *sketches, *near, *([] if cache._brought is None else [cache._brought._rows_NGD])]


def test_keys_are_brought_whatever_was_brought_before(directory: Path) -> None:
    config = load_config(directory)
    cache = KVCache(config, 40, 0, CPU, torch.float32, placements=lambda _: [Placement(True, 3, 2, 48)])
    for tensor in cache.tensors:
        tensor.normal_()
    cache.filled(20)
    for layer in (1, 2):
        for stop in (20, 24):
            cache.bring_ahead(0)
            assert torch.equal(cache.keys_to_score(layer, stop)[:, :stop], cache.k[layer][:, :stop])
    assert cache.keys_to_score(0, 20) is cache.k[0]
    cache.bring_ahead(1)
    cache.k[1][:, :20].normal_()  # other tokens in the place of what is on its way
    cache.rewind(5)
    cache.filled(20)
    cache.bring_ahead(1)
    assert torch.equal(cache.keys_to_score(1, 20)[:, :20], cache.k[1][:, :20])


# -------------------------------------------------------------------------------------------------------------- plans

CARD, HOST = 84_000_000_000, 130_000_000_000  # free on a card of 80 GB, and beside it


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """The shape of an 8B model, on a card that is not there."""
    pytest.importorskip("triton")
    from minirea.kernels.fused import plan as launches

    monkeypatch.setattr(launches, "num_programs", lambda *_: 132)
    monkeypatch.setattr(memory, "available_bytes", lambda device: CARD if device.type == "cuda" else HOST)
    (tmp_path / "config.json").write_text(json.dumps(named("llama-3.1-8b")))
    return load_config(tmp_path)


@pytest.fixture
def cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], ModelConfig]:
    """The shape of a 3B model, its first rank's part of two; takes what is free on each of two cards and their host."""
    pytest.importorskip("triton")
    from minirea.kernels.fused import plan as launches

    monkeypatch.setattr(launches, "num_programs", lambda *_: 132)
    (tmp_path / "config.json").write_text(json.dumps(named("llama-3.2-3b")))

    def free(card: int, host: int) -> ModelConfig:
        monkeypatch.setattr(memory, "available_bytes", lambda device: card if device.type == "cuda" else host)
        return load_config(tmp_path).of_rank(0, 2)

    return free


def planned(config: ModelConfig, num_tokens: int, weights: int, **options: str) -> tuple[Placement, memory.MemoryPlan]:
    """What a run would choose, and its plan."""
    scope = ReAttentionConfig.for_context(config.trained_context)
    attention = Attention(config, "reattention", scope, "triton", CUDA, **options)
    return plan.plan_cache(attention, torch.bfloat16, num_tokens, None, weights)


def test_a_million_tokens_of_an_8b_model_fit_on_one_card(llama: ModelConfig) -> None:
    million, half, quarter = 1 << 20, 16_100_000_000, 9_100_000_000
    for weights in (half, quarter):
        placement, found = planned(llama, million, weights, cache="auto", sketch="auto")
        assert placement.sketched and placement.far_values == 32 and 10 < placement.far_keys < 31
        assert found.fits(CUDA) and found.peak <= CARD and found.host_cache <= HOST - memory.HOST_RESERVED
        assert found.host_cache == (32 + placement.far_keys) * array_bytes(llama, million, torch.bfloat16)
    placement, _ = planned(llama, million, quarter, cache="auto", sketch="off")
    assert placement.far_values > 28 and not placement.far_keys and not placement.sketched
    placement, found = planned(llama, million, half, cache="device", sketch="auto")
    assert placement == Placement(False) and not found.fits(CUDA)
    with pytest.raises(MemoryLimitError, match=r"not enough memory on cuda: .*about 500,[0-9]{3} of 1,048,576"):
        found.check(CUDA)
    placement, found = planned(llama, 4 * million, half, cache="auto", sketch="auto")
    said = (
        r"on cuda: needs 16.10 GB for weights, [0-9.]+ GB for the KV cache beside [0-9.]+ GB on the host and .* to work"
    )
    with pytest.raises(MemoryLimitError, match=said + r" in, .*about 1,[0-9]{3},[0-9]{3} of 4,194,304 tokens fit"):
        found.check(CUDA)


def test_four_million_tokens_of_a_3b_model_on_two_cards(cards: Callable[[int, int], ModelConfig]) -> None:
    """Keys are 240.5 GB, and so are values, sketches 119.6: half of each for a card of 141 GB. A host of 256 GiB holds
    the values, and the cards then hold the keys and no sketches; one of 512 GiB holds the keys of ten layers too.
    """
    tokens, card, part = (1 << 22) + 80, 148_500_000_000, cards(1, 1)
    weights, each = weight_bytes(part, torch.bfloat16), array_bytes(part, tokens, torch.bfloat16)
    assert 2 * 28 * each // 10**8 == 2405 and weights // 10**7 == 360
    for host, cache, sketch, expected in (
        (270, "host", "auto", (False, 28, 0)),
        (270, "auto", "auto", (False, 23, 0)),
        (545, "host", "int8", (True, 28, 10)),
        (545, "auto", "auto", (True, 28, 10)),
    ):
        placement, found = planned(cards(card, host * 10**9), tokens, weights, cache=cache, sketch=sketch)
        assert placement[:3] == expected and found.fits(CUDA)
        assert found.host_cache == placement.far_arrays * each
        assert found.peak <= card and 2 * found.host_cache <= host * 10**9 - memory.HOST_RESERVED
    config = cards(card, 270 * 10**9)
    _, found = planned(config, tokens, weights, cache="host", sketch="int8")
    said = (
        r"^not enough memory on each of 2 devices: needs 3.61 GB for weights, .* GB for the KV cache beside .* GB on "
    )
    with pytest.raises(MemoryLimitError, match=said + r"the host .*: about 3,[0-9,]{7} of 4,194,384 tokens fit$"):
        found.check(CUDA)
    _, found = planned(cards(card, 2 * 100 * 10**9), tokens, weights, cache="host", sketch="off")
    said = (
        r"^not enough memory on the host: needs 240.52 GB for the part of the KV cache there, of 2 devices together, "
    )
    with pytest.raises(MemoryLimitError, match=said + r"197.85 GB can be pinned; .* about 3,4[0-9]{2},[0-9]{3} of 4,"):
        found.check(CUDA)
    for num_tokens, expected in ((1 << 20, (True, 0, 0)), (1 << 21, (False, 0, 0))):
        assert planned(cards(card, 0), num_tokens, weights, cache="auto", sketch="auto")[0][:3] == expected


def test_auto_takes_sketches_where_they_pay_and_fit(llama: ModelConfig) -> None:
    """A step of a prompt holds no less for them, and no more values are on the host for them in shorter contexts."""
    options = {"cache": "auto", "sketch": "auto"}
    assert planned(llama, 65536, 16 * 10**9, **options)[0] == Placement(True)
    assert planned(llama, 65535, 16 * 10**9, **options)[0] == Placement(False)
    assert planned(llama, 420_000, 16 * 10**9, **options)[0] == Placement(False)  # they would not fit
    for num_tokens, weights, sketched in ((65536, 76, False), (262143, 50, False), (262144, 50, True)):
        placement, off = (
            planned(llama, num_tokens, weights * 10**9, cache="auto", sketch=sketch)[0] for sketch in ("auto", "off")
        )
        assert placement.sketched == sketched and off.far_values > 0
        assert (placement.far_values > off.far_values + 1) == sketched  # one for scratch, which both may need
    scope = ReAttentionConfig.for_context(llama.trained_context)
    attention = Attention(llama, "reattention", scope, "triton", CUDA, **options)
    found = plan.fit_steps(attention, lambda: plan.plan_cache(attention, torch.bfloat16, 65536, None, 72 * 10**9)[1])
    assert found.cache == 2 * 32 * array_bytes(llama, 65536, torch.bfloat16) and attention.step_chunks == STEP_CHUNKS
    assert planned(llama, 131072, 16 * 10**9, cache="auto", sketch="off")[0] == Placement(False)
    assert planned(llama, 1000, 16 * 10**9, cache="auto", sketch="int8")[0] == Placement(True)
    near = near_size(8192, 16416, 2048)
    assert planned(llama, 131072, 16 * 10**9, cache="host", sketch="off")[0] == Placement(False, 32, 0, near)
    voting = ReAttentionConfig.for_context(8192)
    assert voting.vote_window > 1
    attention = Attention(llama, "reattention", voting, "triton", CUDA, sketch="auto", cache="auto")
    assert not any(placement.sketched for placement in attention.placements(1 << 20))


def test_a_host_without_room_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gigabyte = 10**9
    free = {"cuda": 10 * gigabyte, "cpu": 3 * gigabyte + memory.HOST_RESERVED}
    monkeypatch.setattr(memory, "available_bytes", lambda device: free[device.type])
    found = memory.MemoryPlan(0, 0, 2 * gigabyte, 0, 1000, host_cache=6 * gigabyte)
    with pytest.raises(
        MemoryLimitError,
        match=r"not enough memory on the host: needs 6.00 GB for the part of the KV cache there, 3.00 GB can be "
        "pinned; shorten the prompt or lower max_tokens: about 500 of 1,000 tokens fit",
    ):
        found.check(CUDA)


def test_what_reads_no_host_memory_is_named(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, scope = load_config(directory), ReAttentionConfig(4, 8)
    for mode, impl, said in (("full", "triton", "attention 'full'"), ("reattention", "torch", "impl 'torch'")):
        with pytest.raises(InputError, match=f"cache is 'host', expected 'auto' or 'device' with {said}"):
            Attention(config, mode, scope, impl, CUDA, cache="host")
        assert Attention(config, mode, scope, impl, CPU, cache="host").placements(99) == [Placement()]
    with pytest.raises(InputError, match="cache is 'disk', expected one of auto, device, host"):
        minirea.load(directory, cache="disk")
    with pytest.raises(SystemExit):
        main(["generate", "--model", str(directory), "--text", "x", "--cache", "disk"])
    assert "invalid choice: 'disk'" in capsys.readouterr().err


def test_the_footer_and_the_plan_say_what_lies_where(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gigabyte = 10**9
    sizes = {"cache_bytes": 180 * gigabyte, "host_cache_bytes": 105 * gigabyte, "sketch_bytes": 34 * gigabyte}
    text = footer(Stats(9, **sizes), "length")
    assert "cache 180.00 GB (105.00 GB of it in the host's memory, 34.00 GB of it int8 sketches), peak" in text
    assert "cache 180.00 GB, peak" in footer(Stats(9, cache_bytes=180 * gigabyte), "length")
    found = memory.MemoryPlan(cache=2 * gigabyte, num_tokens=9, host_cache=3 * gigabyte)
    monkeypatch.setattr(api.ModelFiles, "plan", lambda *_: found)
    command = ["generate", "--model", str(directory), "--text", "x", "--dry-run"]
    monkeypatch.setattr(memory, "available_bytes", lambda _: 100 * gigabyte)
    monkeypatch.setattr("minirea.cli.commands.encode", lambda *_, **__: [5])
    assert main(command) == 0
    assert "cache       2.00 GB, and 3.00 GB in the host's memory\n" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["host_cache_bytes"] == 3 * gigabyte
