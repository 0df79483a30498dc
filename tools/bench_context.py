"""`bench.py context`: a context saved to a file and opened again, in GB/s of the file.

The cache holds random numbers: it takes the time of one that a prompt has filled. "cold" has the file's pages dropped
from the page cache first, so the disk is measured; "warm" has them there. The floor is one thread that writes, or
reads, a file of that size from beginning to end in blocks of 8 MiB, as `dd bs=8M` does; writing ends when the disk has
it (fsync). What is opened is compared with what was saved.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_load import drop_pages
from bench_machine import Lengths, add_device, lengths, new_command, print_machine, print_result, synchronize

import minirea
from minirea.api import LLM, Session
from minirea.memory import human

BLOCK_BYTES = 8 * 2**20
DEMO = Path(__file__).parents[1] / "weights" / "demo"


def add_command(subparsers: Any) -> argparse.ArgumentParser:
    parser = new_command(subparsers, "context", "contexts in files", __doc__)
    parser.add_argument("--model", type=Path, default=DEMO, metavar="DIR", help="default: the demo model")
    parser.add_argument("--contexts", type=lengths, nargs="+", action=Lengths, default=[2**16], help="default: 64k")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="on the disk that is measured; default: temporary")
    add_device(parser)
    return parser


def run(arguments: argparse.Namespace) -> None:
    machine = print_machine(arguments.device)
    llm = minirea.load(arguments.model, device=arguments.device, dtype=arguments.dtype)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for num_tokens in arguments.contexts:
            rows += measure(llm, num_tokens, Path(folder))
    print_result(machine, arguments, rows)


def measure(llm: LLM, num_tokens: int, folder: Path) -> list[dict[str, Any]]:
    """One row for each thing that is timed; files are removed before the next one is written."""
    file, plain = folder / "context", folder / "plain"
    seconds: dict[str, float] = {}
    seconds["save"], expected = timed_save(llm, num_tokens, file)
    nbytes = file.stat().st_size
    drop_pages([file])
    seconds["open, cold"] = timed_open(llm, file, expected)
    seconds["open, warm"] = timed_open(llm, file, expected)
    file.unlink()
    seconds["floor: write"] = timed(lambda: write_plain(plain, nbytes))
    drop_pages([plain])
    seconds["floor: read, cold"] = timed(lambda: read_plain(plain))
    plain.unlink()
    print(f"{num_tokens:,} tokens, {human(nbytes)}")
    for what, taken in seconds.items():
        print(f"  {what:<18} {taken:8.3f} s  {nbytes / taken / 1e9:6.2f} GB/s", flush=True)
    return [
        {"context": num_tokens, "what": what, "seconds": taken, "bytes": nbytes, "gb_per_s": nbytes / taken / 1e9}
        for what, taken in seconds.items()
    ]


def timed_save(llm: LLM, num_tokens: int, file: Path) -> tuple[float, list[float]]:
    """Seconds until the disk has it, and the sums of what was saved; the session is gone: two may not fit."""
    session = random_session(llm, num_tokens)

    def save() -> None:
        session.save(file)
        sync(file)

    return timed(save), sums(session)


def timed_open(llm: LLM, file: Path, expected: list[float]) -> float:
    start = time.perf_counter()
    session = llm.open_session(file)
    synchronize(llm.model.device.type)
    seconds = time.perf_counter() - start
    assert sums(session) == expected, f"{file}: what was opened differs from what was saved"
    return seconds


@torch.inference_mode()
def random_session(llm: LLM, num_tokens: int) -> Session:
    """A session of so many tokens that no model has read."""
    session = llm.session(num_tokens)
    for tensor in session.cache.tensors:
        tensor.normal_()
    session.ids = torch.randint(llm.config.vocab_size, (num_tokens,)).tolist()
    session.cache.filled(num_tokens)
    return session


def sums(session: Session) -> list[float]:
    """Of the ids, and of every tensor that a file keeps."""
    cache = session.cache
    parts = [part[:, : cache.seq_len] for layer in range(len(cache.v)) for part in cache.stored(layer).values()]
    return [float(sum(session.ids)), *(float(part.sum(dtype=torch.float64)) for part in parts)]


def sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_plain(file: Path, nbytes: int) -> None:
    block = memoryview(os.urandom(BLOCK_BYTES))
    with open(file, "wb", buffering=0) as out:
        for start in range(0, nbytes, BLOCK_BYTES):
            out.write(block[: nbytes - start])
    sync(file)


def read_plain(file: Path) -> None:
    buffer = bytearray(BLOCK_BYTES)
    with open(file, "rb", buffering=0) as source:
        while source.readinto(buffer):
            pass


def timed(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
