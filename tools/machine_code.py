"""What kernels compile to for Hopper, without a GPU: registers, stack, spills, instructions, and loads behind the wait
for the kernel before. Those of attention, and products of a decode step.

    python tools/machine_code.py             the counts, with those that are kept for this version of Triton
    python tools/machine_code.py --write     keeps them in kernels/machine_code.json, which a test compares with

A change of structure should leave the counts as they are; one that is meant to change them is written with them.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from minirea.config import ReAttentionConfig
from minirea.kernels import Gather, driver, launching
from minirea.kernels.fused import launch, plan
from minirea.kernels.fused.arguments import Rope
from minirea.kernels.near import Near, near_size
from minirea.kernels.sketch import new_sketch
from minirea.kernels.steps import matvec
from minirea.kernels.votes import new_votes, winners_shape
from minirea.quantize import QuantizedMatrix

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "kernels" / "machine_code.json"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
HOPPER = GPUTarget("cuda", 90, 32)
PROCESSORS = 132


class Shape(NamedTuple):
    """Attention of a model's layer, and the queries of a step."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_queries: int
    chunk_size: int
    sketch: bool = False
    votes: bool = False  # of earlier layers and tokens, to which it adds
    near: tuple[bool, bool] = (False, False)  # keys, values of local parts are there once more
    winners: bool = False  # which it leaves for later steps
    selects: bool = True
    ranks: int = 1  # with so many heads each; of several the launch that searches counts


COUNTING = "votes of 7 earlier tokens of 32 layers, 9/3 heads of 64"
SHAPES = {
    "decode, 32/8 heads of 128": Shape(32, 8, 128, 1, 1),
    "decode that selects nothing, 32/8 heads of 128": Shape(32, 8, 128, 1, 1, selects=False),
    "decode that selects nothing, 9/3 heads of 64": Shape(9, 3, 64, 1, 1, selects=False),
    "decode that selects nothing, near values, 32/8 heads of 128": Shape(
        32, 8, 128, 1, 1, near=(False, True), selects=False
    ),
    "four chunks of 512, 32/8 heads of 128": Shape(32, 8, 128, 2048, 512),
    "decode, 9/3 heads of 64": Shape(9, 3, 64, 1, 1),
    "four chunks of 512, 9/3 heads of 64": Shape(9, 3, 64, 2048, 512),
    "decode with votes, 9/3 heads of 64": Shape(9, 3, 64, 1, 1, votes=True, winners=True),
    "decode with votes, 32/8 heads of 128": Shape(32, 8, 128, 1, 1, votes=True, winners=True),
    "four chunks of 512 that leave winners, 9/3 heads of 64": Shape(9, 3, 64, 2048, 512, winners=True),
    COUNTING: Shape(9, 3, 64, 1, 1, votes=True, winners=True),
    "decode with a sketch, 32/8 heads of 128": Shape(32, 8, 128, 1, 1, sketch=True),
    "decode with a sketch, 9/3 heads of 64": Shape(9, 3, 64, 1, 1, sketch=True),
    "decode with near values, 32/8 heads of 128": Shape(32, 8, 128, 1, 1, near=(False, True)),
    "decode with a sketch, near keys and values, 32/8 heads of 128": Shape(
        32, 8, 128, 1, 1, sketch=True, near=(True, True)
    ),
    "four chunks of 512 with near values, 32/8 heads of 128": Shape(32, 8, 128, 2048, 512, near=(False, True)),
    "search with a sketch, near keys and values, two ranks of 12/4 heads of 128": Shape(
        12, 4, 128, 1, 1, sketch=True, near=(True, True), ranks=2
    ),
}


PRODUCTS = {
    f"{what} of an 8B model, {form}": functools.partial(kernel, bits)
    for form, bits in (("bfloat16", 0), ("8 bits", 8), ("4 bits", 4))
    for what, kernel in {
        "q, k and v": lambda bits: matvec.norm_qkv(
            *(tensor(4096), tensor(4096), matrix(6144, 4096, bits), None, 1e-5, tensor(1, dtype=torch.int32)),
            *(tensor(32, 128), tensor(8, 131072, 128), tensor(8, 131072, 128)),
        ),
        "output": lambda bits: matvec.add_product(tensor(4096), matrix(4096, 4096, bits), None, tensor(4096)),
        "gate and up": lambda bits: matvec.norm_gate_up(
            tensor(4096), tensor(4096), matrix(28672, 4096, bits), None, 1e-5, tensor(14336)
        ),
        "down": lambda bits: matvec.add_product(tensor(14336), matrix(4096, 14336, bits), None, tensor(4096)),
    }.items()
}


def tensor(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def matrix(rows: int, columns: int, bits: int) -> torch.Tensor | QuantizedMatrix:
    """Of bfloat16 with 0 bits."""
    if not bits:
        return tensor(rows, columns)
    return QuantizedMatrix.empty(rows, columns, bits, 0, torch.device("meta"))


def compiled(name: str) -> driver.Variant:
    """The machine code of a step in bfloat16 over a cache of 131,072 tokens, of SHAPES, or of one of PRODUCTS."""
    found: list[driver.Variant] = []

    def record_start(kernel: Any, _programs: int, _device: torch.device, arguments: Any, constants: Any) -> None:
        compiler = driver.Kernel(kernel)
        found.append(compiler._compile(HOPPER, arguments, constants, compiler.layout(arguments)))

    def record(kernel: Any, programs: int, device: torch.device, *arguments: Any, **constants: Any) -> None:
        record_start(kernel, programs, device, arguments, constants | {"launch_cooperative_grid": True})

    with (
        mock.patch.object(launch, "launch_cooperatively", record),
        mock.patch.object(launching, "start", record_start),
        mock.patch.object(launching, "starts_early", return_value=True),
        mock.patch.object(plan, "num_programs", lambda _, tiles: PROCESSORS * tiles.programs_per_sm),
    ):
        run: Callable[[], Any] = PRODUCTS.get(name) or functools.partial(attend, name)
        run()
    return found[0]


def attend(name: str) -> None:
    """Launch what SHAPES names."""
    shape = SHAPES[name]
    options: dict[str, Any] = {"vote_size": 32, "vote_window": 8, "carry_votes": True} if shape.votes else {}
    config = ReAttentionConfig(32, 4096, 4 if shape.selects else 0, 32, 16 if shape.votes else 128, **options)
    q_THD, out_THD = (tensor(shape.num_queries, shape.num_heads, shape.head_dim) for _ in range(2))
    k_GND, v_GND = (tensor(shape.num_kv_heads, 131072, shape.head_dim) for _ in range(2))
    seq_len = tensor(1, dtype=torch.int32)
    sketch = new_sketch(shape.num_kv_heads, shape.head_dim, 131072, q_THD.device) if shape.sketch else None
    voters = shape.num_heads, shape.num_kv_heads, config
    votes = new_votes(*voters, 32, 131072, q_THD.device) if shape.votes else None
    sizes = 32, *winners_shape(shape.num_heads, config, 16)
    winners = torch.empty(sizes, dtype=torch.int32, device="meta") if shape.winners else None
    rows = near_size(config.local_size, config.dense_size, 2048)
    gather = Gather(lambda x: x.new_empty(shape.ranks * len(x), x.shape[1]), shape.ranks) if shape.ranks > 1 else None
    near = Near(*(tensor(shape.num_kv_heads, rows, shape.head_dim) if there else None for there in shape.near))
    rope = Rope(*(tensor(config.max_scope + 2048, shape.head_dim // 2, dtype=torch.float32) for _ in range(2)))
    left = None if winners is None else winners[0]
    step = launch.Inputs(q_THD, k_GND, v_GND, out_THD, seq_len, rope, config, near=near, winners=left)
    if name == COUNTING:
        assert votes is not None and winners is not None
        launch.count_winners(votes, winners, seq_len, config)
    elif not shape.selects:
        launch.launch_plain(step)
    elif shape.num_queries == 1:
        launch.launch_decode(step._replace(gather=gather, sketch=sketch, votes=votes))
    else:
        launch.launch_chunks(step._replace(gather=gather), shape.chunk_size)


def counts(cubin: bytes) -> dict[str, int]:
    """Of one kernel: registers and bytes of stack of a thread, how many instructions there are, how many spill, and how
    many load from global memory behind the wait for the kernel before, x among them.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert resources is not None, usage
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*)", code, re.MULTILINE)
    return {
        "registers": int(resources[1]),
        "stack": int(resources[2]),
        "instructions": len(instructions),
        "spills": sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in instructions),
        "loads behind the wait": sum("LDG" in line for line in behind_wait(instructions)),
    }


def behind_wait(instructions: list[str]) -> list[str]:
    """No instructions where there is no wait."""
    return instructions[next((i for i, line in enumerate(instructions) if "ACQBULK" in line), len(instructions)) :]


def kept() -> dict[str, dict[str, dict[str, int]]]:
    """Version of Triton -> shape -> counts."""
    table: dict[str, dict[str, dict[str, int]]] = json.loads(TABLE.read_text())
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the counts")
    arguments = parser.parse_args()
    table = kept() if TABLE.exists() else {}
    before = table.get(triton.__version__, {})
    found = {}
    for name in (*SHAPES, *PRODUCTS):
        found[name] = counts(compiled(name).cubin)
        print(f"{name}\n  now   {found[name]}\n  kept  {before.get(name, 'nothing')}", flush=True)
    if arguments.write:
        table[triton.__version__] = found
        TABLE.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
