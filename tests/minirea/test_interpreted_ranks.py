"""Decode steps of ranks, in Triton's interpreter: `python -m pytest -m interpret`."""

from __future__ import annotations

import functools
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import at_once
from testing import in_threads, random_ids, tiny_model, write_checkpoint

import minirea
from minirea.attention import Attention
from minirea.cache import KVCache
from minirea.kernels.fused import launch, plan
from minirea.kernels.fused.arguments import SketchTiles
from minirea.kernels.steps import peers
from minirea.model import Model, _layer
from minirea.placement import Placement
from minirea.sampling import Sampler, SamplingConfig
from minirea.steps import DecodeStep, PromptStep
from minirea.weights import load_weights

SCOPE = {"global_size": 4, "local_size": 24, "span_top_k": 2, "span_size": 4, "max_spans": 5, "chunk_size": 16}
SCOPE |= {"dense_size": 28}
SMALL = {"hidden_size": 32, "intermediate_size": 22, "vocab_size": 41, "head_dim": 8, "num_key_value_heads": 2}
CPU = torch.device("cpu")


class ThreadRanks:
    """Ranks that are threads of one process. One at a time computes; all wait where they exchange."""

    def __init__(self, size: int) -> None:
        self.size, self.device, self.given = size, CPU, [torch.empty(0)] * size
        self.barrier, self.turn = threading.Barrier(size), threading.RLock()
        self.local = threading.local()

    def exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.turn.release()
        self.given[self.local.rank] = x.clone()
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()
        self.turn.acquire()
        return found

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(torch.stack(self.exchange(x)).sum(0))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.exchange(x))

    def run(self, work: Any) -> list[Any]:
        """work(rank) of every rank."""
        results: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            self.local.rank = rank
            with self.turn, torch.inference_mode():
                try:
                    results[rank] = work(rank)
                except BaseException:
                    self.barrier.abort()
                    raise

        in_threads(one, range(self.size))
        return results


def part_of_model(directory: Path, llm: minirea.LLM, ranks: ThreadRanks, rank: int, sketch: str = "off") -> Model:
    """A rank's part of the model of `llm`, with impl "triton", its matrices by rows as a GPU has them."""
    config = llm.config.of_rank(rank, ranks.size)
    attention = Attention(config, "reattention", llm.model.attention.config, "triton", CPU, sketch=sketch)
    model = Model(config, load_weights(directory, config, CPU, torch.float32), attention, ranks=ranks)  # type: ignore[arg-type]
    weights = load_weights(directory, config, CPU, torch.float32)
    model.layers = [_layer(weights, index) for index in range(config.num_layers)]
    model.embed, model.head = weights["embed.weight"], weights["head.weight"]
    attention.gather = model.gather
    return model


@pytest.mark.parametrize("votes", [{}, {"vote_window": 2, "carry_votes": True}])
def test_ranks_decode_what_one_process_does(tmp_path: Path, votes: dict[str, Any]) -> None:
    """A prompt in a step of chunks, then tokens, in launches that are split around the vote; biases are added once."""
    fields = SMALL | {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 3 if votes else 2}
    directory = write_checkpoint(tmp_path, tiny_model(**fields))
    llm, ids, ranks = minirea.load(directory, **SCOPE | votes, tail_size=0), random_ids(41, 41), ThreadRanks(2)

    def decode(rank: int) -> tuple[list[int], torch.Tensor]:
        model = part_of_model(directory, llm, ranks, rank)
        sizes, shape = (model.config, 44, model.attention.dense_limit), model.attention.winners_shape
        cache = KVCache(*sizes, CPU, torch.float32, winners_shape=shape)
        prompt = PromptStep(model, cache, 40, 16)
        prompt.set(torch.tensor(ids[:-1]))
        prompt.run()
        cache.seq_len = 40
        step = DecodeStep(model, cache, ids[-1], Sampler(SamplingConfig(), ids, 41, CPU))
        found = []
        for _ in range(3):
            step.run()
            cache.seq_len += 1
            found.append(int(step.new.token))
        return found, cache.winners

    session = llm.session()
    expected = session.generate(ids, max_tokens=3, ignore_eos=True)
    for found, winners in ranks.run(decode):
        assert found == expected.token_ids
        assert torch.equal(winners, session.cache.winners)


def test_caches_on_the_host_and_sketches_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt and tokens after it, on ranks that look at sketches of their own keys and have values and a layer's keys
    far: all keys and values are those of ranks that do not.
    """
    tiles = SketchTiles(BLOCK_N=16, ROOM=16, SURVIVORS=64, LEAST=32, num_stages=2, LIVE_M=4)
    monkeypatch.setattr(plan, "sketch_tiles", lambda _: tiles)
    monkeypatch.setattr(launch, "_workspaces", {})
    directory = write_checkpoint(tmp_path, tiny_model(**SMALL | {"num_hidden_layers": 3}))
    llm, ids, ranks = minirea.load(directory, **SCOPE, tail_size=0), random_ids(81, 41), ThreadRanks(2)

    def decode(placement: Placement, rank: int) -> tuple[list[int], list[torch.Tensor]]:
        model = part_of_model(directory, llm, ranks, rank, "int8" if placement.sketched else "off")
        cache = KVCache(model.config, 84, 0, CPU, torch.float32, placements=lambda _: [placement])
        prompt = PromptStep(model, cache, 40, 16)
        for start in (0, 40):
            prompt.set(torch.tensor(ids[start : start + 40]))
            prompt.run()
            cache.seq_len += 40
        step, found = DecodeStep(model, cache, ids[-1], Sampler(SamplingConfig(), ids, 41, CPU)), []
        for _ in range(2):
            model.attention.sketch_keys(cache)
            step.run()
            cache.seq_len += 1
            found.append(int(step.new.token))
        assert cache.sketched_len == 80 * placement.sketched
        return found, [x[:, : cache.seq_len].clone() for x in (*cache.k, *cache.v)]

    expected = ranks.run(functools.partial(decode, Placement()))
    assert not any(getattr(scratch, "found", None) is not None for scratch in launch._workspaces.values())
    for ours, theirs in zip(ranks.run(functools.partial(decode, Placement(True, 3, 1, 96))), expected, strict=True):
        assert ours[0] == theirs[0]
        assert all(map(torch.equal, ours[1], theirs[1]))
    (found,) = (scratch.found for scratch in launch._workspaces.values() if getattr(scratch, "found", None) is not None)
    assert torch.all((found >= 2) & (found <= tiles.SURVIVORS))


@torch.inference_mode()
def test_equal_tokens_have_equal_keys_however_many_rows_a_product_has(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, tiny_model(**SMALL | {"attention_bias": True}))
    llm = minirea.load(directory, **SCOPE)
    model = part_of_model(directory, llm, ThreadRanks(2), 1)
    layer, H, found = model.layers[0], model.config.num_heads, []
    ids_T = torch.tensor(random_ids(150, 41))
    for num_rows in (150, 64, 31, 1):
        x_TE = model._embed(ids_T[:num_rows])
        qkv_TXD = model._qkv(layer, x_TE)
        made = qkv_TXD.clone()
        model._make_keys_alike(layer, x_TE, made)
        torch.testing.assert_close(made, qkv_TXD)
        assert torch.equal(made[:, :H], qkv_TXD[:, :H])
        found.append(made[:, H : H + model.config.num_kv_heads])
    assert all(torch.equal(keys, found[0][: len(keys)]) for keys in found)
    first = [ids_T.tolist().index(token) for token in ids_T.tolist()]
    assert torch.equal(found[0], found[0][first])


# The kernels that reach other ranks' memory: each rank a process, on memory that they share at equal addresses.


def shared(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype).share_memory_()


_flags: list[torch.Tensor] = []  # which rooms reach by their addresses alone


def rooms(ranks: int, elements: int) -> list[peers.Room]:
    own, flags = ([shared(n) for _ in range(ranks)] for n in (elements, peers.MAX_PROGRAMS * ranks))
    _flags.extend(flags)
    where, at = (torch.tensor([x.data_ptr() for x in tensors]) for tensors in (own, flags))
    return [peers.Room(own[rank], where, at, shared(peers.MAX_PROGRAMS), rank) for rank in range(ranks)]


@pytest.fixture(autouse=True)
def _no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    # It copies memory back that others write to meanwhile.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)


@pytest.mark.parametrize(("ranks", "E"), [(2, 40), (4, 1500)])
def test_sums_reach_all_ranks_alike(ranks: int, E: int) -> None:
    """Over several turns, in which ranks overtake each other; each rank then has the same x, to the bit."""
    turns = 4
    generator = torch.Generator().manual_seed(E)
    parts = torch.randn(turns, ranks, E, generator=generator)
    x_E = torch.randn(E, generator=generator).half()
    expected = x_E.clone()
    for turn in range(turns):
        total = expected.float()
        for part in parts[turn]:
            total = total + part
        expected = total.half()
    every, found = rooms(ranks, 2 * E), shared(ranks, E, dtype=torch.float16)

    def work(rank: int) -> None:
        mine, room = x_E.clone(), every[rank]
        partials = room.own.view(torch.float32).view(2, E)
        for turn in range(turns):
            assert not partials[turn % 2].any()
            partials[turn % 2] += parts[turn, rank]
            peers.add_sums(mine, room, turn % 2)
        found[rank] = mine

    at_once(ranks, work)
    for mine in found:
        assert torch.equal(mine, expected)


@pytest.mark.parametrize(("ranks", "most"), [(2, 24), (3, 2100)])
def test_values_of_all_ranks_are_gathered(ranks: int, most: int) -> None:
    """Again and again, as many as a room holds or fewer, while some ranks are late to read what they got."""
    every = rooms(ranks, 2 * ranks * most)
    counts = [most, most, most // 3, most, most // 2, most]

    def values(rank: int, turn: int) -> torch.Tensor:
        return torch.arange(counts[turn], dtype=torch.float32).view(-1, 2) + 1e6 * rank + 1e4 * turn

    def work(rank: int) -> None:
        for turn in range(len(counts)):
            found = peers.gather(values(rank, turn), every[rank])
            time.sleep(0.05 * ((turn + rank) % 2))
            assert torch.equal(found, torch.cat([values(other, turn) for other in range(ranks)]))

    at_once(ranks, work)
