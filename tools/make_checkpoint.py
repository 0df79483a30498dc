"""Write a checkpoint of a well-known shape with random weights, to measure loading or to try a size.

    python tools/make_checkpoint.py --shape llama-3.1-8b --out DIR

The directory looks like a downloaded one: shards with an index, config.json, and a tokenizer (single bytes), so that
`minirea generate --model DIR` runs and prints nonsense at full speed. The weights repeat one block of random numbers:
16 GB are written as fast as the disk takes them, and no number is zero, so no file system can leave them out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from shapes import SHAPES, named

from minirea.checkpoint_config import load_config
from minirea.config import DTYPES
from minirea.weights.names import NameTable

SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
BLOCK_ELEMENTS = 2**23 + 9  # not a multiple of any row, so that no two rows of a matrix are equal
SPREAD = 0.02
Shard = list[tuple[str, tuple[int, ...]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty directory")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--layers", type=int, metavar="N", help="other than the shape's own number")
    parser.add_argument("--shard-gb", type=float, default=5.0, metavar="X", help="largest file")
    arguments = parser.parse_args()
    if arguments.out.is_dir() and any(arguments.out.iterdir()):
        parser.error(f"--out {arguments.out} is not empty")
    start = time.perf_counter()
    nbytes = write_checkpoint(
        arguments.out, named(arguments.shape, arguments.layers), arguments.dtype, int(arguments.shard_gb * 1e9)
    )
    seconds = time.perf_counter() - start
    print(f"{arguments.out}: {nbytes / 1e9:.2f} GB written in {seconds:.1f} s, {nbytes / seconds / 1e9:.2f} GB/s")


def write_checkpoint(directory: Path, config: dict[str, object], dtype: str, shard_bytes: int) -> int:
    """Write a whole model directory; returns the bytes of its weights. The files are on the disk when it returns."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2))
    write_tokenizer(directory)
    generator = torch.Generator().manual_seed(0)
    block = torch.empty(BLOCK_ELEMENTS).normal_(0, SPREAD, generator=generator).to(getattr(torch, dtype))
    shards = list(split(tensors(directory), block.itemsize, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys((tensor for tensor, _ in shard), name)
        write_shard(directory / name, shard, dtype, block)
    total = block.itemsize * sum(math.prod(shape) for shard in shards for _, shape in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def tensors(directory: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the model whose config.json lies in `directory`: Hugging Face's name, and shape."""
    for name, place in NameTable(load_config(directory)).expected([]):
        yield name, place.shape


def split(named_shapes: Iterator[tuple[str, tuple[int, ...]]], itemsize: int, shard_bytes: int) -> Iterator[Shard]:
    """Consecutive tensors that fit one file together; a larger one has a file to itself."""
    shard: Shard = []
    size = 0
    for name, shape in named_shapes:
        nbytes = math.prod(shape) * itemsize
        if shard and size + nbytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append((name, shape))
        size += nbytes
    yield shard


def write_shard(path: Path, shard: Shard, dtype: str, block: torch.Tensor) -> None:
    """One safetensors file. Norms are 1; matrices are consecutive stretches of `block` repeated."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shard:
        begin, end = end, end + math.prod(shape) * block.itemsize
        header[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data that begins at a multiple of 8, as other readers like it
    random = block.view(torch.uint8).numpy().data
    ones = torch.ones_like(block[:65536]).view(torch.uint8).numpy().data
    with open(path, "wb", buffering=0) as file:
        write_all(file.fileno(), memoryview(len(text).to_bytes(8, "little") + text))
        at = 0
        for _, shape in shard:
            remaining = math.prod(shape) * block.itemsize
            if len(shape) == 1:
                write_all(file.fileno(), ones[:remaining])
                continue
            while remaining:
                piece = random[at : at + remaining]
                write_all(file.fileno(), piece)
                remaining -= len(piece)
                at = (at + len(piece)) % len(random)
        os.fsync(file.fileno())


def write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def write_tokenizer(directory: Path) -> None:
    """A tokenizer.json whose tokens are the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))


if __name__ == "__main__":
    main()
