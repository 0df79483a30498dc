"""Rank 0, in which the program runs: it starts the other ranks, tells them every step, and learns when one ends.

A connection to each follower carries what to do, as pickled tuples, and what came of it. A thread reads what followers
say. When one fails or its connection ends, all are ended, which also ends the collective in which the leader may be
waiting; the step then raises RankError, with one line about the rank that was first.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from multiprocessing import connection as connections
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Final, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from minirea.cache import KVCache
from minirea.config import ModelConfig
from minirea.errors import InputError, MinireaError, RankError
from minirea.model import Model
from minirea.ranks import ADDRESS, Launched, LostRankError, Ranks
from minirea.threads import delayed_keyboard_interrupt, wait_asleep

_FOLLOWER: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from minirea.follower import spawned; spawned(*sys.argv[2:])"
)
_EVERY_TURN: Final = 2**31 - 1  # a flag for which no kernel waits
_FileStore: Any = dist.FileStore  # type: ignore[attr-defined]
# Seconds. Followers end at once; these only bound how long one that the system holds on to is waited for.
_GRACE: Final = 10.0


def together(
    function: Callable[..., Iterator[Any]], model: Model, cache: KVCache, *arguments: Any
) -> Generator[Any, None, None]:
    """The generator `function(model, cache, *arguments)`, which all ranks of the model advance together.

    Args:
        function: of a module, so that followers find it by name.
        arguments: that can be pickled; a list instead of a tensor.
    """
    if not isinstance(model.ranks, Leader):
        yield from function(model, cache, *arguments)
        return
    if not isinstance(cache, SharedCache):
        raise model.ranks.refusal()
    yield from model.ranks.run(function, model, cache, arguments)


class Leader(Ranks):
    """Rank 0, and the others as it sees them. A process has one at a time; see `Leader.of`."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.failure: RankError | None = None
        self.rank, self.size, self.device = 0, size, device
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._lock, self._failed, self._ended = threading.RLock(), threading.Event(), False
        self._stepping = 0  # the thread that is in a step
        self._ids, self._dropped = itertools.count(1), deque[int]()
        self._folder = tempfile.mkdtemp(prefix="minirea-")
        self.models: weakref.WeakSet[Model] = weakref.WeakSet()
        atexit.register(self.end)
        try:
            launched = Launched.here()
            store = self._join(launched) if launched else self._spawn(size, device)
            threading.Thread(target=self._watch, daemon=True).start()
            for _ in self._connections:
                self._check_versions(self._reply())
            self._meet(size, device, store)
        except BaseException:
            self.end()
            raise

    @classmethod
    def of(cls, size: int, device: torch.device) -> Leader:
        """The process's leader of so many ranks: the one there is, or a new one.

        Raises:
            InputError: there are others, in use; torch.distributed is in use by the program.
            RankError: a rank could not be started.
        """
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        old = cls._current
        if old is not None and not old.ended and (old.size, old.device) != (size, device):
            if len(old.models):
                raise InputError(f"gpus is {size}, but this process has a model on {old.size}: load it in another one")
            old.end()
        if old is None or old.ended:
            if old is not None:
                old.end()
            if dist.is_initialized():
                raise InputError(f"gpus is {size}, but this program has initialized torch.distributed for itself")
            cls._current = cls(size, device)
        assert cls._current is not None
        return cls._current

    _current: Leader | None = None

    @classmethod
    def _stays_behind(cls) -> None:
        """In a forked process, which has copies of its connections: it tells the ranks nothing, nor ends them."""
        if cls._current is not None:
            atexit.unregister(cls._current.end)
            cls._current._lock, cls._current._ended = threading.RLock(), True

    @property
    def ended(self) -> bool:
        return self._ended or self.failure is not None

    @property
    def is_stepping(self) -> bool:
        """Whether this thread is in a step."""
        return self._stepping == threading.get_ident()

    def refusal(self) -> InputError:
        return InputError(f"gpus is {self.size}, expected 1: what looks inside the model works on one device")

    # What crosses inside a step crosses in none else: followers would not be there.

    def all_reduce(self, x: Tensor) -> Tensor:
        self._check_in_step()
        return super().all_reduce(x)

    def all_gather(self, x: Tensor) -> Tensor:
        self._check_in_step()
        return super().all_gather(x)

    def _check_in_step(self) -> None:
        if not self.is_stepping:
            raise self.refusal()

    # ------------------------------------------------------------------------------------------------------- telling

    def run(
        self, function: Callable[..., Iterator[Any]], model: Model, cache: SharedCache, arguments: tuple[Any, ...]
    ) -> Generator[Any, None, None]:
        """See `together`. The caller may stop between two steps."""
        number, begun = next(self._ids), False
        steps = iter(function(model, cache, *arguments))
        try:
            while True:
                with self._step():
                    if not begun:
                        where = model.id, cache.id, cache.rewound()
                        self._tell("begin", number, function, *where, arguments)
                        begun = True
                    self._tell("advance", number)
                    value = next(steps, self)
                if value is self:
                    return
                yield value
        finally:
            with delayed_keyboard_interrupt():  # so that all ranks end it
                if hasattr(steps, "close"):
                    steps.close()
                if begun and not self.ended:
                    with self._lock:
                        self._tell("close", number)

    @contextlib.contextmanager
    def asking(self, name: str, *arguments: Any) -> Iterator[None]:
        """Within it followers do what the caller does here. At the end an error of any of them is raised here."""
        with self._lock, delayed_keyboard_interrupt():
            self._check()
            self._tell(name, *arguments)
            try:
                self._stepping = threading.get_ident()
                yield
            except LostRankError as lost:
                self._lose(lost)
            finally:
                self._stepping = 0
                replies = [self._reply() for _ in self._connections]
            for error in replies:
                if error is not None:
                    raise error

    def tell_capacity(self, number: int, capacity: int) -> None:
        """Followers count on no more room in a cache than this."""
        with self._lock:
            if not self.ended:
                self._tell("limit", number, capacity)

    def adopt(self, model: Model, number: int) -> None:
        """Followers have their parts of the model under this number, until it is dropped here."""
        model.id = number
        self.models.add(model)
        weakref.finalize(model, self.drop, number)

    def new_id(self) -> int:
        return next(self._ids)

    def drop(self, number: int) -> None:
        """Followers forget a model or a cache before they do what they are told next. For finalizers, which may run
        while something is being told.
        """
        self._dropped.append(number)

    @contextlib.contextmanager
    def _step(self) -> Iterator[None]:
        """One step of all ranks. Whatever ends it early leaves them in different places, so it ends them."""
        with self._lock, delayed_keyboard_interrupt():
            self._check()
            self._stepping = threading.get_ident()
            try:
                yield
                self._check()  # on a GPU what waited for a rank that ended has gone on without it
            except LostRankError as error:
                self._lose(error)
            except BaseException:
                failure = self.failure
                self.end()
                if failure is not None:
                    raise RankError(str(failure)) from None
                raise
            finally:
                self._stepping = 0

    def _lose(self, error: LostRankError) -> NoReturn:
        """Something that crosses has failed, which usually has another reason, on another rank."""
        self._failed.wait(_GRACE)
        self._stepping = 0  # this thread waits for nothing
        self._fail(error)
        self._check()
        raise error

    def _check(self) -> None:
        if self.failure is not None:
            raise RankError(str(self.failure))
        if self._ended:
            found = "the processes that shared this model have been ended, or belong to the process that loaded it"
            raise RankError(f"{found}: load it again")

    def _tell(self, *message: Any) -> None:
        dropped = [self._dropped.popleft() for _ in range(len(self._dropped))]
        try:
            for connection in self._connections:
                connection.send((dropped, *message))
        except OSError:  # `_watch` records why
            self._failed.wait(_GRACE)
            self._check()
            raise

    def _reply(self) -> Any:
        reply = self._inbox.get()
        if reply is self:  # woken by a failure
            self._inbox.put(self)
            self._check()
        return reply

    # ------------------------------------------------------------------------------------------------------ watching

    def _watch(self) -> None:
        rank_of: dict[Any, int] = {c: rank for rank, c in enumerate(self._connections, 1)}
        lost: RankError | None = None
        while not self.ended:
            # A rank that lost contact has lost it to one that ends, which is what should be said.
            ready: list[Any] = connections.wait(list(rank_of), _GRACE if lost else None)
            if lost is not None and not ready:
                self._fail(lost)
            for connection in ready:
                try:
                    kind, value = connection.recv()
                except (EOFError, OSError):
                    self._fail(RankError(self._how_it_ended(rank_of[connection])))
                    return
                if kind == "reply":
                    self._inbox.put(value)
                elif kind == "lost":
                    lost = value
                else:
                    self._fail(value)
                    return

    def _how_it_ended(self, rank: int) -> str:
        about = f"rank {rank} of {len(self._connections) + 1}"
        if not self._processes:
            return f"{about} ended"
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._processes[rank - 1].wait(_GRACE)
            if status < 0:
                name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
                return f"{about} was ended by {name}"
            return f"{about} ended with status {status}"
        return f"{about} closed its connection"

    def _fail(self, error: RankError) -> None:
        """From any thread: the model is lost. Ends all ranks, and what the leader may be waiting in."""
        if self.ended:
            return
        self.failure = error
        self._end_followers()
        self._failed.set()
        self._inbox.put(self)
        if self.device.type == "cuda":
            self._wake(error)

    def _wake(self, error: RankError) -> None:
        """On a GPU a collective without its peers, and what waits for it, would never end."""
        with contextlib.suppress(Exception):
            with torch.cuda.stream(torch.cuda.Stream(self.device)):
                for flags in self.flags:
                    flags.fill_(_EVERY_TURN)
            _abort()
        if self._stepping:
            deadline = time.monotonic() + _GRACE
            while self._stepping and time.monotonic() < deadline:
                time.sleep(0.1)
            if self._stepping:
                with contextlib.suppress(OSError):
                    os.write(2, f"minirea: error: {error}\n".encode())
                os._exit(1)

    def _end_followers(self) -> None:
        """They end with their connection, or where they are stopped or stuck by force."""
        for connection in self._connections:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as ours:
                ours.shutdown(socket.SHUT_RDWR)
        for process in self._processes:
            process.kill()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)

    def end(self) -> None:
        """End all other ranks, and leave the group. For good: every later step raises RankError."""
        atexit.unregister(self.end)
        if not self._ended:
            failed, self._ended = self.failure is not None, True
            self._failed.set()
            self._inbox.put(self)
            if not failed:
                for connection in self._connections if not self._processes else ():
                    with contextlib.suppress(OSError):
                        connection.send(((), "end"))
                self._end_followers()
            with contextlib.suppress(Exception):
                _abort() if self.device.type == "cuda" else dist.destroy_process_group()
            shutil.rmtree(self._folder, ignore_errors=True)

    # ------------------------------------------------------------------------------------------------------ starting

    def _spawn(self, size: int, device: torch.device) -> Any:
        """Start followers as processes of their own, without a shell and without the program's main module."""
        if not sys.executable:
            raise InputError(f"gpus is {size}, but Python does not know its own program: use torchrun")
        path = os.path.join(self._folder, "store")
        environment = dict(os.environ)
        wait_asleep(environment)
        threads = max(1, torch.get_num_threads() // size)
        for rank in range(1, size):
            ours, theirs = socket.socketpair()
            values = theirs.fileno(), rank, size, _device_of(rank, device), threads, path
            command = [sys.executable, "-c", _FOLLOWER, json.dumps(sys.path), *map(str, values)]
            process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                process_group=0,  # Ctrl-C is for the leader
            )
            theirs.close()
            self._processes.append(process)
            self._connections.append(Connection(ours.detach()))
        return _FileStore(path, size)

    def _join(self, launched: Launched) -> Any:
        """Wait for the processes that torchrun has started to call."""
        store, key = launched.store(), secrets.token_bytes(32)
        with connections.Listener(os.path.join(self._folder, "leader"), authkey=key) as listener:
            store.set(ADDRESS, json.dumps([listener.address, key.hex()]))
            accepted: dict[int, Connection] = {}
            while len(accepted) < launched.size - 1:
                connection = listener.accept()
                accepted[connection.recv()] = connection  # type: ignore[assignment]
        self._connections = [accepted[rank] for rank in sorted(accepted)]
        return store

    def _check_versions(self, versions: Any) -> None:
        if isinstance(versions, MinireaError):
            raise versions
        ours = versions_here()
        if versions != ours:
            raise RankError(f"a rank runs {versions}, expected {ours} like the first one")

    def _meet(self, size: int, device: torch.device, store: Any) -> None:
        """Join the group in a thread, which is left behind where a follower ends instead of joining."""
        joined: SimpleQueue[Any] = SimpleQueue()

        def join() -> None:
            try:
                Ranks.__init__(self, 0, size, device, store)
                joined.put(None)
            except Exception as error:
                joined.put(RankError(f"the ranks do not find each other: {error}"))

        threading.Thread(target=join, daemon=True).start()
        while joined.empty():
            if self._failed.wait(0.02):
                self._check()
        error = joined.get()
        if error is not None:
            raise error


os.register_at_fork(after_in_child=Leader._stays_behind)


class SharedCache(KVCache):
    """The leader's part of a cache. Followers allocate theirs when it does, and drop it when it is dropped."""

    def __init__(
        self, leader: Leader, model: Model, config: ModelConfig, capacity: int, *sizes: Any, **options: Any
    ) -> None:
        self._leader = leader
        self._rewound: list[tuple[int, int]] = []
        self.id = leader.new_id()
        try:
            with leader.asking("allocate", self.id, model.id, capacity):
                super().__init__(config, capacity, *sizes, **options | {"least": leader.least})
        except BaseException:
            leader.drop(self.id)
            raise
        weakref.finalize(self, leader.drop, self.id)

    def rewind(self, seq_len: int, begun: int = 0) -> None:
        """As KVCache.rewind; the others do it before they begin something."""
        stop = max(self.seq_len, begun)
        with delayed_keyboard_interrupt():
            super().rewind(seq_len, begun)
            self._rewound.append((seq_len, stop))

    def rewound(self) -> list[tuple[int, int]]:
        """To how many tokens it was taken back, and from how many, since this was called before; last, what it has."""
        found, self._rewound = [*self._rewound, (self.seq_len, self.seq_len)], []
        return found

    def reserve(self, capacity: int) -> None:
        """As KVCache.reserve, on all ranks. Inside a step the others do it by themselves."""
        if capacity <= self.capacity or self._leader.is_stepping:
            super().reserve(capacity)
            return
        held = self.capacity
        try:
            with self._leader.asking("reserve", self.id, capacity):
                super().reserve(capacity)
        except BaseException:  # some ranks may have grown where another could not
            self.capacity = held
            self._leader.tell_capacity(self.id, held)
            raise


def versions_here() -> str:
    from minirea import __version__

    return f"minirea {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}"


def _device_of(rank: int, leaders: torch.device) -> str:
    """The device of a rank that is spawned: the ones after the leader's."""
    if leaders.type == "cpu":
        return "cpu"
    return f"cuda:{(torch.cuda.current_device() + rank) % torch.cuda.device_count()}"


def _abort() -> None:
    """End collectives that wait for a rank, and leave the group."""
    dist.distributed_c10d._abort_process_group()
