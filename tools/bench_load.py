"""`bench.py load`: from the files of a checkpoint to weights on the device, in GB/s of the files.

"cold" has the files' pages dropped from the page cache first, so the disk is measured; "warm" has them there. The floor
is reading the same bytes with as many threads into one buffer each, and throwing them away.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from bench_machine import add_device, new_command, print_machine, print_result, synchronize

BLOCK_BYTES = 8 * 2**20


def add_command(subparsers: Any) -> argparse.ArgumentParser:
    parser = new_command(subparsers, "load", "loading a checkpoint", __doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--states", nargs="+", choices=("cold", "warm"), default=["cold", "warm"])
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    add_device(parser)
    return parser


def run(arguments: argparse.Namespace) -> None:
    machine = print_machine(arguments.device)
    files = sorted(arguments.model.glob("*.safetensors"))
    nbytes = sum(path.stat().st_size for path in files)
    rows = []
    for reader in arguments.readers:
        for state in arguments.states:
            (drop_pages if state == "cold" else read_files)(files)
            if arguments.device == "cuda":
                torch.cuda.empty_cache()
            synchronize(arguments.device)
            start = time.perf_counter()
            held = READERS[reader](arguments, files)
            synchronize(arguments.device)
            seconds = time.perf_counter() - start
            del held
            rows.append({"reader": reader, "state": state, "seconds": seconds, "gb_per_s": nbytes / seconds / 1e9})
            print(
                f"{reader:<14} {state}  {nbytes / 1e9:6.2f} GB in {seconds:7.3f} s  {rows[-1]['gb_per_s']:6.2f} GB/s",
                flush=True,
            )
    print_result(machine, arguments, rows)


def drop_pages(files: list[Path]) -> None:
    """Drop the files from the page cache; written pages have to be on the disk for that."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_files(files: list[Path]) -> None:
    """Read every byte once, with as many threads as the loader has."""
    from minirea.weights.loader import READERS as THREADS

    blocks = [(path, at) for path in files for at in range(0, path.stat().st_size, BLOCK_BYTES)]
    buffers: dict[int, bytearray] = {}

    def read(block: tuple[Path, int]) -> None:
        buffer = buffers.setdefault(threading.get_ident(), bytearray(BLOCK_BYTES))
        with open(block[0], "rb", buffering=0) as file:
            file.seek(block[1])
            file.readinto(buffer)

    with ThreadPoolExecutor(THREADS["cuda" if torch.cuda.is_available() else "cpu"]) as pool:
        list(pool.map(read, blocks))


def load_minirea(arguments: argparse.Namespace, _: list[Path]) -> Any:
    from minirea.checkpoint_config import load_config
    from minirea.weights import load_weights

    config = load_config(arguments.model)
    return load_weights(arguments.model, config, torch.device(arguments.device), getattr(torch, arguments.dtype))


def load_safetensors(arguments: argparse.Namespace, files: list[Path]) -> Any:
    """The safetensors library, as the checkpoint is: no stacking, no conversion, no check of the values.

    On a CPU it maps the files, and nothing is read until a value is used: hence the copies.
    """
    from safetensors.torch import load_file

    on_cpu = arguments.device == "cpu"
    loaded = (load_file(path, device=arguments.device) for path in files)
    return [{name: tensor.clone() if on_cpu else tensor for name, tensor in tensors.items()} for tensors in loaded]


def read_only(_: argparse.Namespace, files: list[Path]) -> None:
    read_files(files)


READERS: dict[str, Callable[[argparse.Namespace, list[Path]], Any]] = {
    "floor": read_only,
    "minirea": load_minirea,
    "safetensors": load_safetensors,
}
