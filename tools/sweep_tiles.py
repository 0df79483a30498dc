"""Times of the fused kernel with other tiles than it chooses: every combination of the sizes that are given.

    python tools/sweep_tiles.py decode --contexts 8k,128k --block-a 32,64,128 --stages 3,4
    python tools/sweep_tiles.py prefill --contexts 32k --heads 9 --kv-heads 3 --head-dim 64 --slices 1,2,4

Sizes that are not given stay as the kernel chooses them for the shape. A prefill launch has as many chunks as a step of
the engine; its time is that of the whole launch. Each time is measured as by `bench.py kernel`. The first row is what
ships. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from bench_kernel import Layer, add_shape, attention_step, graph_us
from bench_machine import build, print_machine, print_result

from minirea.errors import InputError, MinireaError

CONTEXTS = {"decode": [8192, 131072], "prefill": [32768, 131072]}


class Variant(NamedTuple):
    """One way to launch."""

    tiles: Any  # minirea.kernels.fused.arguments.Tiles
    slices: int | None  # of the middle; None where the kernel chooses

    @property
    def text(self) -> str:
        slices = [] if self.slices is None else [f"slices {self.slices}"]
        return ", ".join([*(f"{name} {size}" for name, size in self.tiles._asdict().items()), *slices])


def counts(text: str) -> list[int]:
    """Positive numbers with commas between them."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{min(found)} is not positive")
    return found


def powers(text: str) -> list[int]:
    found = counts(text)
    for number in found:
        if number & (number - 1):
            raise argparse.ArgumentTypeError(f"{number} is not a power of two")
    return found


def tile_sizes(text: str) -> list[int]:
    found = powers(text)
    if min(found) < 16:
        raise argparse.ArgumentTypeError(f"{min(found)} is below 16, the least that a matrix product takes")
    return found


FLAGS = {
    "block-m": ("BLOCK_M", tile_sizes, "rows of queries"),
    "block-n": ("BLOCK_N", tile_sizes, "keys while scoring"),
    "block-a": ("BLOCK_A", tile_sizes, "keys while attending"),
    "warps": ("num_warps", powers, "warps of a program"),
    "stages": ("num_stages", counts, "tiles in flight"),
    "programs": ("programs_per_sm", counts, "programs per SM"),
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("kind", choices=tuple(CONTEXTS))
    for flag, (name, kind, what) in FLAGS.items():
        made.add_argument(
            f"--{flag}", dest=name, type=kind, metavar="N,N", help=f"{what} (default: as the kernel has it)"
        )
    made.add_argument("--slices", type=powers, metavar="N,N", help="of the middle, for prefill (default: likewise)")
    add_shape(made, "default: 8k,128k for decode, 32k,128k for prefill")
    made.add_argument("--build", default=build(), help=argparse.SUPPRESS)
    return made


def variants(arguments: argparse.Namespace, layer: Layer) -> list[Variant]:
    """What ships, then every other combination. Raises InputError."""
    from minirea.kernels.fused import plan

    if arguments.slices and arguments.kind == "decode":
        raise InputError("--slices is given, expected none for decode, whose slices follow from the number of SMs")
    ships = plan.decode_tiles if arguments.kind == "decode" else plan.chunk_tiles
    shipped = ships(plan.Layer(layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.dtype, layer.config))
    choices = [getattr(arguments, name) or [getattr(shipped, name)] for name in shipped._fields]
    tiles = [type(shipped)(*each) for each in itertools.product(*choices)]
    found = [Variant(each, slices) for each in tiles for slices in arguments.slices or [None]]
    return list(dict.fromkeys([Variant(shipped, None), *found]))


@contextlib.contextmanager
def launched_as(variant: Variant) -> Iterator[None]:
    """Launches in here are this variant's. Scratch of the variants before it is given back."""
    from minirea.kernels.fused import launch, plan

    plan_chunks = plan.plan_chunks

    def plan_variant(*arguments: Any) -> Any:
        made = plan_chunks(*arguments)
        if variant.slices is None:
            return made
        c = dataclasses.replace(made.c, SLICES=variant.slices)
        dtype, (rows, _) = made.scratch["candidate"]
        return made._replace(c=c, scratch=made.scratch | {"candidate": (dtype, (rows, c.CANDIDATES))})

    with (
        mock.patch.object(plan, "decode_tiles", return_value=variant.tiles),
        mock.patch.object(plan, "chunk_tiles", return_value=variant.tiles),
        mock.patch.object(plan, "plan_chunks", plan_variant),
        mock.patch.object(launch, "_workspaces", {}),
    ):
        yield


def measure(variant: Variant, layer: Layer, arguments: argparse.Namespace) -> dict[str, Any]:
    """Microseconds by context, or why there are none."""
    from triton.compiler.errors import CompilationError

    times: dict[int, float] = {}
    row = {"tiles": variant.tiles._asdict(), "slices": variant.slices, "launch_us": times}
    try:
        with launched_as(variant):
            for context in arguments.contexts or CONTEXTS[arguments.kind]:
                together = layer.step_chunks(arguments.queries) if arguments.kind == "prefill" else 0
                chunks = min(together, context // arguments.queries)
                q_THD = layer.queries(chunks * arguments.queries or 1)
                step = attention_step(layer, q_THD, context, arguments.queries if chunks else None)
                times[context] = graph_us(step, layer.cache_pairs(context))
    except (MinireaError, CompilationError, torch.OutOfMemoryError) as error:
        return row | {"skipped": str(error).splitlines()[0]}
    return row


def row_text(variant: Variant, row: dict[str, Any]) -> str:
    times = ", ".join(f"{context:,} keys {us:,.1f} us" for context, us in row["launch_us"].items())
    return f"{variant.text}: {', '.join(part for part in (times, row.get('skipped')) if part)}"


def main() -> None:
    arguments = parser().parse_args()
    try:
        layer = Layer.of(arguments)
        wanted = variants(arguments, layer)
    except InputError as error:
        raise SystemExit(f"sweep_tiles.py: {error}") from None
    if not torch.cuda.is_available():
        raise SystemExit("sweep_tiles.py needs an NVIDIA GPU, and torch finds no CUDA device here")
    machine = print_machine("cuda")
    rows = []
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        for variant in wanted:
            rows.append(measure(variant, layer, arguments))
            print(row_text(variant, rows[-1]), flush=True)
    print_result(machine, arguments, rows)


if __name__ == "__main__":
    main()
