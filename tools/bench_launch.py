"""`bench.py launch`: what a launch of each kernel costs the host, by minirea's driver and by Triton's own.

The launches are those of a model that reads a prompt and generates a few tokens. Each is repeated alone, with the
arguments that it had, by both drivers in turn. Time is what the calling thread takes until the launch is queued; the
GPU is waited for before and after, and never has more to do than its queue holds. Triton's own driver needs a C
compiler and Python's headers; where it cannot be built, its column is empty.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from bench_machine import new_command, print_machine, print_result

import minirea

LAUNCHES = 100  # in a row; the queue of a stream holds about a thousand
REPEATS = 15


def add_command(subparsers: Any) -> argparse.ArgumentParser:
    parser = new_command(subparsers, "launch", "host time of each kernel's launch", __doc__)
    parser.add_argument("--model", default=str(Path(__file__).parents[1] / "weights" / "demo"), metavar="DIR")
    return parser


def run(arguments: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("bench.py launch needs an NVIDIA GPU, and torch finds no CUDA device here")
    machine = print_machine("cuda")
    rows = []
    for launch in recorded(arguments.model):
        rows.append(measure(launch))
        print(row_text(rows[-1]), flush=True)
    print_result(machine, arguments, rows)


class Launch(NamedTuple):
    """Arguments of minirea.kernels.driver.launch."""

    kernel: Any
    programs: int
    device: torch.device
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


def recorded(model: str) -> list[Launch]:
    """The first launch of every kernel in a prompt of three chunks and four generated tokens."""
    from minirea.kernels import driver

    found: dict[str, Launch] = {}
    launch_it = driver.launch

    def record(*arguments: Any) -> None:
        launch = Launch(*arguments)
        found.setdefault(launch.kernel.fn.__name__, launch)
        launch_it(*arguments)

    with mock.patch.object(driver, "launch", record):
        llm = minirea.load(model, device="cuda")
        llm.generate([5] * (3 * llm.model.attention.config.chunk_size), max_tokens=4, ignore_eos=True)
    return list(found.values())


def launch_by_triton(
    function: Any, programs: int, device: torch.device, arguments: Sequence[Any], constants: dict[str, Any]
) -> None:
    """What takes the place of minirea.kernels.driver.launch, to compare with."""
    with torch.cuda.device(device):
        function[(programs,)](*arguments, **constants, enable_fp_fusion=True)


def use_tritons_driver() -> None:
    """Every later launch of this process is by Triton's own driver. For measurements only."""
    from minirea.kernels import driver

    driver.launch = launch_by_triton


def measure(launch: Launch) -> dict[str, Any]:
    """Microseconds of a launch by both drivers, in turn, so that both run on the same machine."""
    from minirea.kernels import driver

    ways: dict[str, Callable[..., None]] = {"minirea_us": driver.launch, "triton_us": launch_by_triton}
    with torch.inference_mode():
        kept = {x: x.clone() for x in tensors(launch) if x.numel() == 1}  # a launch of `embed` counts a token
        try:
            launch_by_triton(*launch)
        except (RuntimeError, OSError) as error:
            print(f"Triton's own driver: {error}".splitlines()[0])
            del ways["triton_us"]
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(REPEATS):
            for name, way in ways.items():
                times[name].append(microseconds(way, launch))
                for x, value in kept.items():
                    x.copy_(value)
    row = {"kernel": launch.kernel.fn.__name__, "arguments": len(launch.kernel.params)}
    return row | {name: round(statistics.median(values), 2) for name, values in times.items()}


def tensors(launch: Launch) -> list[torch.Tensor]:
    given = (*launch.arguments, *launch.constants.values())
    members = [member for item in given for member in (item if isinstance(item, tuple) else (item,))]
    return [member for member in members if isinstance(member, torch.Tensor)]


def microseconds(way: Callable[..., None], launch: Launch) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(LAUNCHES):
        way(*launch)
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds / LAUNCHES * 1e6


def row_text(row: dict[str, Any]) -> str:
    theirs = f"{row['triton_us']:6.1f} us" if "triton_us" in row else "     none"
    return f"{row['kernel']:24} minirea {row['minirea_us']:6.1f} us   Triton {theirs}"
