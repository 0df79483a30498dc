"""What every measurement shares: the machine and its copy bandwidth, lengths on the command line, timing, the end."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minirea.config import DEVICES, DTYPES


def tokens(text: str) -> int:
    """64k is 65,536 and 1m is 1,048,576."""
    scale = {"k": 1024, "m": 1024 * 1024}.get(text[-1:].lower())
    return int(text[:-1]) * scale if scale else int(text)


def lengths(text: str) -> list[int]:
    """Lengths with commas between them."""
    return [tokens(part) for part in text.split(",")]


class Lengths(argparse.Action):
    """`1k,32k`, `1k 32k` or both, as one ascending list."""

    def __call__(self, _: Any, namespace: argparse.Namespace, values: Any, __: str | None = None) -> None:
        setattr(namespace, self.dest, sorted({length for part in values for length in part}))


def add_device(parser: argparse.ArgumentParser) -> None:
    """The flags that say where, and in which precision."""
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=DEVICES[1:], default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16" if on_gpu else "float32")


def describe_machine(device: str) -> dict[str, Any]:
    """What numbers are measured on, with the copy bandwidth that floors are made of."""
    machine: dict[str, Any] = {"device": device_name(device), "python": platform.python_version()}
    for package in ("torch", "triton", "transformers"):
        machine[package] = package_version(package)
    machine["copy_gb_per_s"] = round(copy_bandwidth(device) / 1e9, 1)
    return machine


def build() -> str | None:
    """The commit of this checkout; None where git does not say."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=7"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()} x {torch.get_num_threads()} threads"


def package_version(package: str) -> str | None:
    """None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def copy_bandwidth(device: str) -> float:
    """Bytes per second that a copy within the device's memory reads and writes, together."""
    buffer = torch.empty((2**30 if device == "cuda" else 2**27) // 4, device=device).normal_()
    target = torch.empty_like(buffer)
    return 2 * buffer.nbytes / median_seconds(lambda: target.copy_(buffer), 10, device)


def host_bandwidth(device: str) -> float:
    """Bytes per second that a copy from the host's pinned memory brings to a device."""
    source = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    return source.nbytes / median_seconds(lambda: target.copy_(source, non_blocking=True), 5, device)


def new_command(subparsers: Any, name: str, about: str, description: str | None) -> argparse.ArgumentParser:
    """A command of bench.py; `description` is its module's docstring."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=about, description=description, formatter_class=formatter
    )
    return parser


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def median_seconds(run: Callable[[], Any], repeat: int, device: str) -> float:
    """Median seconds of one call, the device waited for before and after each, three calls before them left out."""
    seconds = []
    for index in range(3 + repeat):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        if index >= 3:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def print_machine(device: str) -> dict[str, Any]:
    """The first line of every command; returns what it says."""
    machine = describe_machine(device)
    print(", ".join(f"{key} {value or 'not installed'}" for key, value in machine.items()), flush=True)
    return machine


def print_result(machine: dict[str, Any], arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The last line of every command: one JSON object with all that was measured, and how."""
    options = {name: value for name, value in vars(arguments).items() if isinstance(value, (str, int, float, list))}
    command = shlex.join(["python", "tools/bench.py", *sys.argv[1:]])
    print(json.dumps({"machine": machine, "command_line": command, "options": options, "rows": rows}), flush=True)
