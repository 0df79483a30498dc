"""`bench.py report`: kernels/BENCHMARKS.md from the results in kernels/benchmarks, one section for each file.

A result is the last line that another command of bench.py prints. What was printed, all of it or that line, is kept and
rendered by one command; each file becomes a section under its own name, and replaces the one of that name:

    python tools/bench.py kernel > kernel-h100.log
    python tools/bench.py model --shape llama-3.1-8b > model-8b-h100.log
    python tools/bench.py report kernel-h100.log model-8b-h100.log

So each section is of one build and one machine. A file may also hold a "note", a line for its section.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench_machine import new_command
from bench_model import named_engine

KERNELS = Path(__file__).parent.parent / "kernels"
HEAD = """\
# Benchmarks

Rendered by `python tools/bench.py report` from the results in [benchmarks/](benchmarks/): each section is one file, of
one build and one machine. `python tools/bench.py COMMAND --help` says how a number is measured;
[NOTEBOOK.md](NOTEBOOK.md) says what was expected, and what was tried besides.
"""

Result = dict[str, Any]
Row = dict[str, Any]


def add_command(subparsers: Any) -> argparse.ArgumentParser:
    parser = new_command(subparsers, "report", "tables of the results that are kept", __doc__)
    about = "what other commands printed: kept as a result of that name first"
    parser.add_argument("logs", nargs="*", type=Path, metavar="LOG", help=about)
    parser.add_argument("--results", type=Path, default=KERNELS / "benchmarks", metavar="DIR", help="of JSON files")
    parser.add_argument("--out", type=Path, default=KERNELS / "BENCHMARKS.md", metavar="FILE")
    return parser


def run(arguments: argparse.Namespace) -> None:
    try:
        for log in arguments.logs:
            keep(log, arguments.results)
        files = sorted(arguments.results.glob("*.json"))
        text = report(files)
    except ValueError as error:
        raise SystemExit(f"bench.py report: {error}") from None
    arguments.out.write_text(text)
    print(f"{arguments.out}: {len(files)} results")


def keep(log: Path, results: Path) -> None:
    """Put the result that a command printed among those that are kept.

    Raises:
        ValueError: there is none in `log`; what is kept stays as it is.
    """
    try:
        printed = log.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{log} cannot be read: {error}") from None
    line = printed if printed.startswith("{") else printed.rpartition("\n")[2]
    section(log.stem, line)
    (results / f"{log.stem}.json").write_text(json.dumps(json.loads(line), indent=1) + "\n")


def report(files: Iterable[Path]) -> str:
    """All sections. Raises ValueError: a file that holds no result, by name."""
    return "\n".join([HEAD, *(section(path.stem, path.read_text()) for path in files)])


def section(name: str, text: str) -> str:
    """A result as tables. Raises ValueError: it is none."""
    try:
        result: Result = json.loads(text)
        machine, options, rows = result["machine"], result["options"], result["rows"]
        tables = TABLES[options["command"]](rows, machine)
        skipped = [f"Skipped: {' '.join(map(str, row.values()))}.\n" for row in rows if "skipped" in row]
        parts = [f"## {name}\n", origin(result), *tables, *skipped]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} is no result of bench.py ({type(error).__name__}: {error})") from None
    return "\n".join(parts)


def origin(result: Result) -> str:
    """Which build, on which machine, by which command."""
    machine = dict(result["machine"])
    bandwidth = machine.pop("copy_gb_per_s")
    device = machine.pop("device")
    versions = ", ".join(f"{name} {version}" for name, version in machine.items() if version)
    build = result["options"].get("build") or "unknown"
    lines = [
        f"Build {build}; {device}; {versions}; copy bandwidth {bandwidth:,.4g} GB/s.",
        f"`{result['command_line']}`",
        *([result["note"]] if "note" in result else []),
    ]
    return "\n".join(line + "\n" for line in lines)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown of a table, none if it has no rows."""
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return ["\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines, ""])] if lines else []


def kernel_tables(rows: list[Row], machine: Row) -> list[str]:
    bytes_per_us = machine["copy_gb_per_s"] * 1e3
    timed = [row for row in rows if "launch_us" in row]
    decode, prefill = ([row for row in timed if row["kind"] == kind] for kind in ("decode", "prefill"))
    launches = [
        f"One {row['kind']} step launches: {', '.join(f'`{name}`' for name in row['launches'])}.\n"
        for row in rows
        if "launches" in row
    ]
    return [
        *launches,
        *table(
            (
                "decode, keys",
                "scope",
                "floor",
                "launch",
                "times the floor",
                "full attention, fastest SDPA",
                "faster by",
            ),
            (decode_cells(row, bytes_per_us) for row in decode),
        ),
        *sketch_table(decode, bytes_per_us),
        *voting_table(decode, bytes_per_us),
        *phase_table(decode, bytes_per_us),
        *table(
            ("prefill, keys", "queries", "score and pick", "one chunk's launch", "each of several", "SDPA"),
            (prefill_cells(row) for row in prefill),
        ),
    ]


def decode_cells(row: Row, bytes_per_us: float) -> list[str]:
    floor, launch = sum(row["bytes"].values()) / bytes_per_us, row["launch_us"]
    name, us = min(row["sdpa_us"].items(), key=lambda item: item[1])
    cells = [f"{row['context']:,}", f"{row['scope']:,.0f}", f"{floor:,.1f} us", f"{launch:,.1f} us"]
    return [*cells, f"{launch / floor:.2f}", f"{us:,.1f} us ({name})", f"{us / launch:.2f}"]


def sketch_table(decode: list[Row], bytes_per_us: float) -> list[str]:
    """The same steps with sketches, in results that have them."""

    def cells(row: Row) -> list[str]:
        sketched = row["sketched"]
        floor, us = sum(sketched["bytes"].values()) / bytes_per_us, sketched["launch_us"]
        times = f"{floor:,.1f} us", f"{us:,.1f} us", f"{us / floor:.2f}", f"{row['launch_us'] / us:.2f}"
        slices = f"{sketched['scored_slices']} of {sketched['slices']}"
        return [f"{row['context']:,}", *times, str(sketched["survivors"]), slices, f"{sketched['make_us']:,.0f} us"]

    times = "floor", "launch", "times the floor", "faster than without by"
    counts = "survivors of a slice, at most", "slices of which all keys are scored"
    head = "decode with sketches, keys", *times, *counts, "sketches of all keys"
    return table(head, (cells(row) for row in decode if "sketched" in row))


def voting_table(decode: list[Row], bytes_per_us: float) -> list[str]:
    """Steps in which several tokens vote, in results that have them."""

    def cells(row: Row) -> list[str]:
        voting = row["voting"]
        floor, us = sum(voting["bytes"].values()) / bytes_per_us, voting["votes_us"]
        return [
            f"{row['context']:,}",
            f"{floor:,.1f} us",
            f"{us:,.1f} us",
            f"{us / floor:.2f}",
            f"{voting['count_us']:,.1f} us, {voting['layers']} layers",
        ]

    head = (
        "decode with votes of earlier tokens, keys",
        "floor",
        "launch",
        "times the floor",
        "counting them, once a step",
    )
    return table(head, (cells(row) for row in decode if "voting" in row))


def phase_table(decode: list[Row], bytes_per_us: float) -> list[str]:
    """Phases alone, a column for each context; a floor follows where the phase has one."""

    def cell(row: Row, name: str) -> str:
        if name not in row["phase_us"]:
            return "-"
        floor = f" ({row['bytes'][name] / bytes_per_us:,.1f})" if name in row["bytes"] else ""
        return f"{row['phase_us'][name]:,.1f} us{floor}"

    names = list(dict.fromkeys(name for row in decode for name in row.get("phase_us", {})))
    head = ["phase alone (floor)", *(f"{row['context']:,} keys" for row in decode)]
    return table(head, ([name, *(cell(row, name) for row in decode)] for name in names))


def prefill_cells(row: Row) -> list[str]:
    score = row["phase_us"]["score, pick"]
    tflops = row["score_flops"] / score / 1e6
    cells = [f"{row['context']:,}", f"{row['queries']:,}", f"{score:,.0f} us, {tflops:,.0f} TFLOP/s"]
    sdpa = ", ".join(f"{us:,.0f} us ({name})" for name, us in row["sdpa_us"].items())
    return [*cells, f"{row['launch_us']:,.0f} us", f"{row['chunk_us']:,.0f} us ({row['chunks']})", sdpa]


def model_tables(rows: list[Row], machine: Row) -> list[str]:
    bytes_per_ms, told = machine["copy_gb_per_s"] * 1e6, any("cache" in row for row in rows)

    def peak(row: Row) -> str:
        return f"{row['peak_bytes'] / 1e9:.1f} GB" if "peak_bytes" in row else "-"

    def caches(row: Row) -> list[str]:
        return [row.get("cache", "-").removeprefix("cache ")] if told else []

    def decode_row(row: Row) -> list[str]:
        cells = [f"{row['context']:,}", named_engine(row), f"{row['decode_ms']:.3f} ms"]
        if "step_bytes" not in row:
            return [*cells, "-", "-", *caches(row), peak(row)]
        floor = row["step_bytes"] / bytes_per_ms + row.get("host_ms", 0)
        return [*cells, f"{floor:.3f} ms", f"{row['decode_ms'] / floor:.2f}", *caches(row), peak(row)]

    def prefill_row(row: Row) -> list[str]:
        read, seconds = row["prefill_tokens"], row["prefill_seconds"]
        part = "" if read == row["context"] else f", the last {read:,}"
        return [f"{row['context']:,}{part}", named_engine(row), f"{read / seconds:,.0f}", f"{seconds:.3f} s", peak(row)]

    by_context = sorted(rows, key=lambda row: row.get("context", 0))  # stable: engines stay in order
    return [
        *table(
            ("tokens cached", "engine", "per token", "floor", "times the floor", *["cache"] * told, "peak memory"),
            (decode_row(row) for row in by_context if "decode_ms" in row),
        ),
        *table(
            ("prompt", "engine", "tokens/s", "first token", "peak memory"),
            (prefill_row(row) for row in by_context if "prefill_seconds" in row),
        ),
    ]


def load_tables(rows: list[Row], _: Row) -> list[str]:
    cells = ((r["reader"], r["state"], f"{r['seconds']:.2f} s", f"{r['gb_per_s']:.2f} GB/s") for r in rows)
    return table(("reader", "page cache", "time", "rate"), cells)


def context_tables(rows: list[Row], _: Row) -> list[str]:
    cells = ((f"{r['context']:,}", r["what"], f"{r['seconds']:.3f} s", f"{r['gb_per_s']:.2f} GB/s") for r in rows)
    return table(("tokens", "of a context's file", "time", "rate"), cells)


def launch_tables(rows: list[Row], _: Row) -> list[str]:
    def us(row: Row, name: str) -> str:
        return f"{row[name]:.1f} us" if name in row else "-"

    cells = ((f"`{r['kernel']}`", str(r["arguments"]), us(r, "minirea_us"), us(r, "triton_us")) for r in rows)
    return table(("kernel", "arguments", "minirea", "Triton's driver"), cells)


TABLES: dict[str, Callable[[list[Row], Row], list[str]]] = {
    "kernel": kernel_tables,
    "model": model_tables,
    "load": load_tables,
    "context": context_tables,
    "launch": launch_tables,
}
