"""Speed and memory, measured.

    python tools/bench.py model --shape llama-3.1-8b --contexts 1k,32k,128k --prefill 8k,32k
    python tools/bench.py model --shape mistral-7b --prefill 128k --last-chunks 8
    python tools/bench.py model --model weights/demo --contexts 512,64k
    python tools/bench.py load --model DIR
    python tools/bench.py context --contexts 256k
    python tools/bench.py kernel --contexts 8k,128k
    python tools/bench.py launch
    python tools/bench.py report LOG ...

Every command that measures prints the machine and its versions first, each number with its floor and a baseline of the
same run, and one JSON object as its last line; `report` keeps that of each LOG in kernels/benchmarks and renders all
that are there.
`bench.py --driver triton COMMAND` launches kernels by Triton's own driver, which needs a C compiler, instead of
minirea's; that is for comparing the two and nothing else.
"""

from __future__ import annotations

import argparse

import bench_context
import bench_kernel
import bench_launch
import bench_load
import bench_model
import bench_report
from bench_machine import build

from minirea.errors import MinireaError

COMMANDS = (
    bench_model,
    bench_load,
    bench_context,
    bench_kernel,
    bench_launch,
    bench_report,
)  # each has add_command(subparsers) and run(arguments)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--driver", choices=("minirea", "triton"), default="minirea", help="default: minirea")
    made.add_argument("--build", default=build(), metavar="NAME", help="what the result calls the build: git's commit")
    subparsers = made.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_command(subparsers).set_defaults(run=command.run)
    return made


def main() -> None:
    arguments = parser().parse_args()
    if arguments.driver == "triton":
        bench_launch.use_tritons_driver()
    try:
        arguments.run(arguments)
    except MinireaError as error:
        raise SystemExit(f"bench.py: error: {error}") from None


if __name__ == "__main__":
    main()
