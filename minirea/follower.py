"""A rank that follows: it does what the leader says until the leader ends."""

from __future__ import annotations

import json
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Client, Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final, NoReturn

from minirea.errors import MinireaError, RankError, memory_limit_of

if TYPE_CHECKING:
    from minirea.cache import KVCache
    from minirea.config import ModelConfig, ReAttentionConfig
    from minirea.model import Model
    from minirea.ranks import Ranks

_ASKED: Final = ("load", "open", "vary", "allocate", "reserve")  # what the leader waits for


def spawned(descriptor: str, rank: str, size: str, device: str, threads: str, path: str) -> None:
    """The whole life of a follower that the leader has started. Arguments come from its command line."""
    connection = Connection(int(descriptor))
    inbox = _listen(connection)
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(int(threads))
        store = dist.FileStore(path, int(size))  # type: ignore[attr-defined]
    except Exception as error:
        _stop(connection, _failure(int(rank), error))
    _follow(connection, inbox, int(rank), int(size), device, store)


def launched() -> NoReturn:
    """The whole life of a follower that torchrun has started."""
    from minirea.ranks import ADDRESS, Launched

    here = Launched.here()
    assert here is not None
    store = here.store()
    address, key = json.loads(store.get(ADDRESS))
    connection: Connection = Client(address, authkey=bytes.fromhex(key))  # type: ignore[assignment]
    connection.send(here.rank)
    inbox = _listen(connection)
    import torch

    device = f"cuda:{os.environ.get('LOCAL_RANK', here.rank)}" if torch.cuda.is_available() else "cpu"
    _follow(connection, inbox, here.rank, here.size, device, store)


def _listen(connection: Connection) -> SimpleQueue[Any]:
    """What the leader says, in order. When it ends, so does this process, whatever it is at."""
    inbox: SimpleQueue[Any] = SimpleQueue()

    def listen() -> None:
        try:
            while True:
                message = connection.recv()
                if message[1] == "end":
                    os._exit(0)
                inbox.put(message)
        except BaseException:
            os._exit(1)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the leader says what Ctrl-C means
    threading.Thread(target=listen, daemon=True).start()
    return inbox


def _stop(connection: Connection, error: RankError, kind: str = "failed") -> NoReturn:
    """Say what happened, and wait for the leader to end this process."""
    connection.send((kind, error))
    while True:
        signal.pause()


def _failure(rank: int, error: BaseException) -> RankError:
    text = str(error) if isinstance(error, MinireaError) else str(memory_limit_of(error) or repr(error))
    return RankError(f"rank {rank} failed: {text}")


def _follow(connection: Connection, inbox: SimpleQueue[Any], rank: int, size: int, device: str, store: Any) -> NoReturn:
    try:
        import torch

        from minirea.leader import versions_here
        from minirea.ranks import LostRankError, Ranks

        warnings.simplefilter("ignore")  # the leader's are shown
        connection.send(("reply", versions_here()))
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        follower = Follower(Ranks(rank, size, torch.device(device), store))
        while True:
            dropped, name, *arguments = inbox.get()
            follower.drop(dropped)
            if name in _ASKED:
                connection.send(("reply", follower.answer(name, arguments)))
            else:
                getattr(follower, name)(*arguments)
    except LostRankError as error:
        _stop(connection, error, "lost")
    except BaseException as error:
        _stop(connection, _failure(rank, error))


class Follower:
    """This rank's part of the leader's models and caches, under the leader's numbers. Methods are what it can say."""

    def __init__(self, ranks: Ranks) -> None:
        from minirea.ranks import SharedSampler

        SharedSampler.here = ranks
        self.ranks = ranks
        self.models: dict[int, Model] = {}
        self.caches: dict[int, KVCache] = {}
        self.steps: dict[int, Iterator[Any]] = {}

    def answer(self, name: str, arguments: list[Any]) -> MinireaError | None:
        """Do what the leader waits for; returns what it is to raise."""
        from minirea.ranks import LostRankError

        try:
            getattr(self, name)(*arguments)
        except LostRankError:
            raise
        except Exception as error:
            if isinstance(error, MinireaError):
                return error
            return memory_limit_of(error) or _failure(self.ranks.rank, error)
        return None

    def drop(self, numbers: list[int]) -> None:
        for number in numbers:
            self.models.pop(number, None)
            self.caches.pop(number, None)

    def load(
        self, number: int, path: str, config: ModelConfig, attention: tuple[Any, ...], dtype: str, digest: str
    ) -> None:
        """This rank's part of the model in a directory that must hold the leader's."""
        import torch

        from minirea.loading import load_model
        from minirea.plan import fit_steps, plan_run
        from minirea.weights import fingerprint

        if fingerprint(path, config) != digest:
            raise RankError(f"{path}: holds another model for rank {self.ranks.rank} than for the first one")
        made, arithmetic = self._attention(config, *attention), getattr(torch, dtype)
        if made.device.type == "cuda":
            fit_steps(made, lambda: plan_run(path, made, arithmetic)).check(made.device)
        self.models[number] = load_model(path, made, arithmetic, ranks=self.ranks)

    def open(self, number: int) -> None:
        self.models[number].open_peers()

    def vary(self, number: int, old: int, attention: tuple[Any, ...]) -> None:
        """The same weights under another attention."""
        import copy

        model = copy.copy(self.models[old])
        model.attention = self._attention(model.config, *attention)
        model.attention.gather = model.gather
        self.models[number] = model

    def allocate(self, number: int, model: int, capacity: int) -> None:
        from minirea.loading import new_cache

        self.caches[number] = new_cache(self.models[model], capacity)

    def reserve(self, number: int, capacity: int) -> None:
        self.caches[number].reserve(capacity)

    def limit(self, number: int, capacity: int) -> None:
        """A cache has room for so many tokens on all ranks, and here perhaps for more."""
        self.caches[number].capacity = capacity

    def begin(
        self,
        number: int,
        function: Callable[..., Iterator[Any]],
        model: int,
        cache: int,
        rewound: list[tuple[int, int]],
        arguments: tuple[Any, ...],
    ) -> None:
        """A generator of steps, over a cache that holds what the leader's does."""
        for seq_len, stop in rewound:
            if seq_len <= self.caches[cache].seq_len:
                self.caches[cache].rewind(seq_len, stop)
        self.caches[cache].seq_len = rewound[-1][0]
        self.steps[number] = iter(function(self.models[model], self.caches[cache], *arguments))

    def advance(self, number: int) -> None:
        from minirea.isolation import isolated

        with isolated():
            next(self.steps[number], None)

    def close(self, number: int) -> None:
        steps = self.steps.pop(number)
        if hasattr(steps, "close"):
            steps.close()

    def _attention(
        self, config: ModelConfig, mode: str, scope: ReAttentionConfig, impl: str, sketch: str, cache: str
    ) -> Any:
        from minirea.attention import Attention

        part = config if config.part else config.of_rank(self.ranks.rank, self.ranks.size)
        return Attention(part, mode, scope, impl, self.ranks.device, sketch=sketch, cache=cache)
