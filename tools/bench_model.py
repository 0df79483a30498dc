"""`bench.py model`: decode and prefill of minirea and of transformers, on the same weights or on the same shape.

Each engine runs in a process of its own, so that its memory is its own, and goes through the contexts in ascending
order. A decode step is timed over a cache of random keys and values, so that no prompt has to be read first (--no-fill
reads one). With --sketch the first of the steps that are not timed makes the sketches. The floor of a step is what it
must read (weights, the keys that are scored or their sketches, keys and values of the scope) over the machine's
measured copy bandwidth, and what of the scope lies in the host's memory over the bandwidth of that link. With several
--rounds engines take turns at each length, in processes that load the model anew, and the fastest of each counts: so
other load on the machine hits all alike.

    python tools/bench.py model --model DIR --device cpu --dtype float32 --threads 1 2 --rounds 3 \\
        --engines minirea minirea-full transformers --contexts 512,8k,32k --prefill 512,2k,4k,8k,16k
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_machine import (
    Lengths,
    add_device,
    host_bandwidth,
    lengths,
    new_command,
    print_machine,
    print_result,
    synchronize,
)
from make_checkpoint import write_checkpoint
from shapes import SHAPES, named

from minirea.cache import all_sketch_bytes
from minirea.config import CACHES, SKETCHES
from minirea.placement import FIRST_SKETCHED_LAYER

# minirea-full: with full attention; minirea-alone: a token of an answer votes alone, and each layer by itself.
ENGINES = ("minirea", "minirea-full", "minirea-alone", "transformers")
WARMUP_STEPS = 8
SHARD_BYTES = 5 * 10**9
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def add_command(subparsers: Any) -> argparse.ArgumentParser:
    parser = new_command(subparsers, "model", "decode and prefill", __doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="DIR", help="Hugging Face model directory")
    source.add_argument("--shape", choices=SHAPES, help="random weights, made on the device")
    parser.add_argument("--layers", type=int, metavar="N", help="with --shape: other than its own number")
    length: dict[str, Any] = {"type": lengths, "nargs": "+", "action": Lengths, "metavar": "N"}
    parser.add_argument("--contexts", default=[512], **length, help="decode with so many tokens cached: 1k,32k,128k")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="decode steps timed; the median counts")
    parser.add_argument(
        "--fill",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="decode over random keys and values instead of reading a prompt (default)",
    )
    parser.add_argument("--prefill", default=[], **length, help="also read prompts of so many random tokens: 8k,32k")
    parser.add_argument(
        "--last-chunks",
        type=int,
        metavar="N",
        help="read only the last N chunks of those prompts, over random keys and values: the speed at that depth",
    )
    parser.add_argument("--chunk-size", type=int, metavar="N", help="prompt tokens per step of minirea")
    sketch = "decode steps of minirea read int8 copies of the keys"
    parser.add_argument("--sketch", choices=SKETCHES, default="auto", help=sketch)
    cache = "where keys and values of minirea lie"
    parser.add_argument("--cache", choices=CACHES, default="auto", help=cache)
    quantize = "of minirea's matrices; transformers keeps its own"
    parser.add_argument("--quantize", choices=("int8", "int4"), help=quantize)
    parser.add_argument("--attention", default="reattention", help="of minirea; transformers always attends to all")
    gpus = (
        "devices that share the model in minirea, whose floors are of each; of a --shape a checkpoint is written first"
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help=gpus)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["minirea", "transformers"])
    parser.add_argument("--threads", type=int, nargs="+", metavar="N", help="of a CPU; several: one after the other")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="of all engines; the fastest counts")
    parser.add_argument("--limit", type=int, default=600, metavar="S", help="seconds that an engine may take")
    clock = "cpu: of the processor, for a CPU that others use too"
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help=clock)
    add_device(parser)
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)  # the process that measures one of them
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)  # and nothing else
    return parser


def run(arguments: argparse.Namespace) -> None:
    if arguments.engine:
        for row in measure(arguments):
            print(json.dumps(row), flush=True)
        return
    machine = print_machine(arguments.device)
    rows: list[dict[str, Any]] = []
    turns = [["--cell", *cell] for cell in cells(arguments)] * arguments.rounds if arguments.rounds > 1 else [[]]
    for turn, threads, engine in itertools.product(turns, arguments.threads or [None], arguments.engines):
        own = ["--engine", engine, *turn, *(["--threads", str(threads)] if threads else [])]
        for row in run_engine(own, arguments.limit):
            found = {"engine": engine} | ({"threads": threads} if threads else {}) | row
            rows.append(found)
            print(row_text(found, rows, machine["copy_gb_per_s"]), flush=True)
    print_result(machine, arguments, fastest(rows))


def cells(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """What is measured of an engine, in order: the kind, of MEASURES, and the tokens."""
    decode, prefill = arguments.contexts, arguments.prefill
    return [("decode", str(count)) for count in decode] + [("prefill", str(count)) for count in prefill]


def fastest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the rows of several rounds those with the least time, in the order of the first."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = row["engine"], row.get("threads"), row.get("context"), "prefill_seconds" in row, "skipped" in row
        if key not in best or seconds_of(row) < seconds_of(best[key]):
            best[key] = row
    return list(best.values())


def seconds_of(row: dict[str, Any]) -> float:
    """What a row is about; infinite where there is nothing."""
    return row.get("prefill_seconds") or row.get("decode_ms", math.inf) / 1e3


def run_engine(own: list[str], limit: int) -> Iterator[dict[str, Any]]:
    """The rows of one engine, measured by this program in another process with flags of its own, as they come."""
    command = [sys.executable, str(Path(__file__).with_name("bench.py")), *sys.argv[1:], *own]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            ["timeout", str(limit), *command], stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            yield json.loads(line)
        if process.wait():
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["no message"])[-1]
            reason = f"took more than {limit} s" if process.returncode == 124 else last
            yield {"skipped": reason}


def row_text(row: dict[str, Any], rows: list[dict[str, Any]], copy_gb_per_s: float) -> str:
    """A row as text, one line; ratios are to minirea's row of the same context."""
    if "skipped" in row:
        where = f"{row['context']:>9,} tokens  " if "context" in row else " " * 18
        return f"{where}{named_engine(row):<12}  skipped: {row['skipped']}"
    parts = []
    if "decode_ms" in row:
        floor = row["step_bytes"] / copy_gb_per_s / 1e6 + row.get("host_ms", 0)
        parts.append(f"decode {row['decode_ms']:8.3f} ms/token, floor {floor:.3f} ({row['decode_ms'] / floor:.2f}x)")
    if "prefill_seconds" in row:
        read = row["prefill_tokens"]
        whole = read == row["context"]
        parts.append(f"prefill {read / row['prefill_seconds']:,.0f} tokens/s")
        parts.append(
            f"first token after {row['prefill_seconds']:.3f} s" if whole else f"of the last {read:,} tokens only"
        )
    kind = "decode_ms" if "decode_ms" in row else "prefill_seconds"
    cell = ENGINES[0], row["context"], row.get("threads")
    same = [r for r in rows if kind in r and (r["engine"], r["context"], r.get("threads")) == cell]
    if same and row["engine"] != ENGINES[0]:
        parts.append(f"{row[kind] / same[0][kind]:.2f}x minirea's time")
    if "cache" in row:
        parts.append(row["cache"])
    what = f"{row['context']:>9,} tokens  {named_engine(row):<12}"
    return f"{what}  {', '.join(parts)}, peak {row['peak_bytes'] / 1e9:.2f} GB"


def named_engine(row: dict[str, Any]) -> str:
    """An engine with its threads, where they were chosen."""
    threads = row.get("threads")
    return row["engine"] + (f", {threads} thread{'s' * (threads > 1)}" if threads else "")


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one engine: decode at every context, then prefill of every length, or one of them."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads[0])
    with model_directory(arguments) as directory:
        engine = (Transformers if arguments.engine == "transformers" else Minirea)(arguments, directory)
    for kind, length in [arguments.cell] if arguments.cell else cells(arguments):
        yield measure_one(arguments, int(length), functools.partial(MEASURES[kind], arguments, engine, int(length)))


def measure_one(arguments: argparse.Namespace, context: int, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """One row, with its peak memory, or with the reason why there is none."""
    from minirea.errors import MemoryLimitError
    from minirea.memory import peak_bytes

    row: dict[str, Any] = {"context": context}
    try:
        row |= run()
    except (MemoryLimitError, torch.OutOfMemoryError) as error:
        return row | {"skipped": f"out of memory: {str(error).splitlines()[0]}"}
    return row | {"peak_bytes": peak_bytes(torch.device(arguments.device))}


def count_peak_anew(device: torch.device) -> None:
    """From what is allocated now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure_decode(arguments: argparse.Namespace, engine: Engine, context: int) -> dict[str, Any]:
    """Milliseconds per step, and the bytes that it must read.

    Clocked from token to token, not with the device waited for in between: an engine may read a token while the next
    one is computed.
    """
    engine.open(context, WARMUP_STEPS + arguments.tokens + 8)
    if arguments.fill:
        engine.fill(context)
    else:
        engine.read(random_ids(context, engine.vocab_size))
    steps, clock = engine.steps(), CLOCKS[arguments.clock]
    seconds = []
    for index in range(WARMUP_STEPS + arguments.tokens):
        start = clock()
        next(steps)
        if index >= WARMUP_STEPS:
            seconds.append(clock() - start)
    steps.close()
    row: dict[str, Any] = {"decode_ms": statistics.median(seconds) * 1e3, "step_bytes": engine.step_bytes(context)}
    if isinstance(engine, Minirea):
        host_bytes = engine.host_bytes(context)
        row |= {"host_ms": host_bytes / host_bandwidth(arguments.device) * 1e3} if host_bytes else {}
        row |= {"cache": engine.cache_text()}
    return row


def measure_prefill(arguments: argparse.Namespace, engine: Engine, context: int) -> dict[str, Any]:
    """Seconds until the first token of a prompt, once everything is compiled, or of its last chunks."""
    read = min(context, arguments.last_chunks * engine.chunk_size) if arguments.last_chunks else context
    ids = random_ids(context, engine.vocab_size)
    engine.open(context, 1)
    for _ in range(2):  # once to warm up: an engine may compile, choose kernels and allocate for these very shapes
        engine.fill(context - read)
        synchronize(arguments.device)
        seconds = engine.read(ids[context - read :])
    return {"prefill_seconds": seconds, "prefill_tokens": read}


MEASURES = {"decode": measure_decode, "prefill": measure_prefill}


@contextlib.contextmanager
def model_directory(arguments: argparse.Namespace) -> Iterator[Path]:
    """Where config.json lies: the model's directory, or one that is made for the shape, with weights if several ranks
    share it.
    """
    if arguments.model:
        yield Path(arguments.model)
        return
    with tempfile.TemporaryDirectory() as directory:
        config = named(arguments.shape, arguments.layers) | {"dtype": arguments.dtype}
        if arguments.gpus > 1:
            write_checkpoint(Path(directory), config, arguments.dtype, SHARD_BYTES)
        else:
            Path(directory, "config.json").write_text(json.dumps(config))
        yield Path(directory)


def random_ids(count: int, vocab_size: int) -> list[int]:
    return torch.randint(3, vocab_size, (count,), generator=torch.Generator().manual_seed(0)).tolist()


class Minirea:
    """minirea, through the loops that `generate` runs."""

    def __init__(self, arguments: argparse.Namespace, directory: Path) -> None:
        from minirea import api

        attention = "full" if arguments.engine == "minirea-full" else arguments.attention
        options = {"device": arguments.device, "dtype": arguments.dtype, "attention": attention}
        options |= {"gpus": arguments.gpus, "sketch": arguments.sketch, "cache": arguments.cache}
        if arguments.engine == "minirea-alone":
            options |= {"vote_window": 1, "carry_votes": False}
        if arguments.chunk_size is not None:
            options["chunk_size"] = arguments.chunk_size
        if arguments.quantize is not None:
            options["quantize"] = arguments.quantize
        if arguments.model or arguments.gpus > 1:
            self.llm = api.load(directory, **options)
        else:
            self.llm = random_model(api.read_model(directory, **options))
        self.clock, self.chunk_size = CLOCKS[arguments.clock], self.llm.chunk_size
        self.vocab_size = self.llm.config.vocab_size

    def open(self, context: int, to_follow: int) -> None:
        """Make room for a context and the tokens after it; the room of the last context is given back first."""
        self.session: Any = None
        count_peak_anew(self.llm.model.device)
        self.session = self.llm.session(context + to_follow)

    def fill(self, context: int) -> None:
        """Random keys and values for so many tokens, none of which is read."""
        from minirea.leader import together

        list(together(fill_randomly, self.llm.model, self.session.cache, context))
        self.session.ids = [3] * context

    def read(self, ids: list[int]) -> float:
        """Seconds to the first token after a prompt."""
        start = self.clock()
        stats = self.session.generate(ids, max_tokens=1, ignore_eos=True).stats
        return stats.time_to_first_token if self.clock is time.perf_counter else self.clock() - start

    def steps(self) -> Generator[int, None, None]:
        from minirea.generate import decode
        from minirea.sampling import Sampler, SamplingConfig

        model = self.llm.model
        return decode(model, self.session.cache, 3, Sampler(SamplingConfig(), [], self.vocab_size, model.device))

    def step_bytes(self, context: int) -> int:
        """Weights but for an embedding that is not the head, keys that are scored or their sketches, keys and values of
        the scope: what of them lies on the device.
        """
        model = self.llm.model
        c, scope = model.config, model.attention.config.of_decode_step
        weights = model.nbytes - (model.embed.nbytes if model.embed is not model.head else 0)
        key_bytes = scored = c.num_layers * c.num_kv_heads * c.head_dim * model.dtype.itemsize
        if self.session.cache.sketched:
            scored = key_bytes // c.num_layers * FIRST_SKETCHED_LAYER
            scored += all_sketch_bytes(c, 2) - all_sketch_bytes(c, 1)
        if context <= model.attention.dense_size:
            middle, seen = 0, context
        else:
            middle = context - scope.global_size - scope.local_size if scope.span_top_k else 0
            seen = min(context, scope.global_size + scope.max_selected + scope.local_size)
        return weights + middle * scored + 2 * seen * key_bytes - self.host_bytes(context)

    def host_bytes(self, context: int) -> int:
        """What a step reads in the host's memory: of the scope all but the local part, as far as it can be selected."""
        model = self.llm.model
        c, scope, placement = model.config, model.attention.config.of_decode_step, self.session.cache.placement
        if context <= model.attention.dense_size:
            return 0
        voters = c.part.whole.num_heads if c.part and scope.span_scope == "layer" else c.num_heads
        selected = min(scope.max_selected, voters * scope.span_top_k * scope.span_size)
        far = min(context - scope.local_size, scope.global_size + selected)
        return placement.far_arrays * c.num_kv_heads * c.head_dim * model.dtype.itemsize * far

    def cache_text(self) -> str:
        cache, placement = self.session.cache, self.session.cache.placement
        far = f", {cache.far_nbytes / 1e9:.1f} of it on the host" if placement.far_arrays else ""
        far += f" ({placement.far_values} layers' values, {placement.far_keys} layers' keys)" if far else ""
        return f"cache {cache.nbytes / 1e9:.1f} GB{far}{', sketches' if placement.sketched else ''}"


@torch.inference_mode()
def fill_randomly(model: Any, cache: Any, context: int) -> Iterator[None]:
    """A step of all ranks that share the model."""
    del model
    for tensor in cache.tensors:
        tensor.normal_()
    cache.filled(context)
    cache.sketched_len = 0
    if cache.recent_size and context:  # as many places as there can be, which real ones are not
        cache.winners.random_(0, context)
    yield


def random_model(files: Any) -> Any:
    """A model that was never on a disk: norms are 1, matrices random, of a spread that keeps activations finite."""
    from minirea.api import LLM
    from minirea.model import Model
    from minirea.plan import keeps_half
    from minirea.quantize import QuantizedMatrix, parts
    from minirea.weights import empty_weights

    device, dtype = files.attention.device, files.dtype
    # On a CPU in float32, what a checkpoint in bfloat16 would give.
    half = torch.bfloat16 if keeps_half(dtype, device) else dtype
    shapes = empty_weights(files.config, dtype, torch.device("meta"))
    matrices = {name: half for name, tensor in shapes.items() if tensor.dim() == 2}
    weights = empty_weights(files.config, dtype, device, matrices, files.quantize)
    for tensor in weights.values():
        if isinstance(tensor, QuantizedMatrix):
            for start, stop in parts(*tensor.shape, 1 << 24):
                wide_NK = torch.empty(stop - start, tensor.shape[1], dtype=half, device=device)
                tensor.rows(start, stop).round(wide_NK.normal_(0, tensor.shape[1] ** -0.5))
        elif tensor.dim() == 2:
            tensor.normal_(0, tensor.shape[1] ** -0.5)
        else:
            tensor.fill_(1 if tensor.shape[0] == files.config.hidden_size else 0)
    return LLM(Model(files.config, weights, files.attention), None)


class Transformers:
    """Hugging Face transformers with its default cache and attention."""

    chunk_size = 512  # in which --last-chunks counts; it reads a prompt in one piece

    def __init__(self, arguments: argparse.Namespace, directory: Path) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.clock, dtype = CLOCKS[arguments.clock], getattr(torch, arguments.dtype)
        with torch.device(arguments.device):
            if arguments.model:
                self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
            else:
                self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=dtype)
        self.model = self.model.to(arguments.device).eval()
        self.vocab_size = self.model.config.vocab_size

    def open(self, context: int, to_follow: int) -> None:
        """Its cache has no capacity: it is copied and grows with every token."""
        del context, to_follow
        self.cache: Any = None
        count_peak_anew(self.model.device)

    def fill(self, context: int) -> None:
        from transformers import DynamicCache

        c = self.model.config
        self.cache = DynamicCache()
        shape = (1, c.num_key_value_heads, context, c.head_dim)
        for layer in range(c.num_hidden_layers if context else 0):
            k, v = (torch.randn(shape, device=self.model.device, dtype=self.model.dtype) for _ in range(2))
            self.cache.update(k, v, layer)

    @torch.inference_mode()
    def read(self, ids: list[int]) -> float:
        """Seconds to the first token after a prompt."""
        if self.cache is None:
            self.fill(0)
        start = self.clock()
        int(self._feed(torch.tensor([ids], device=self.model.device)))
        return self.clock() - start

    @torch.inference_mode()
    def steps(self) -> Generator[int, None, None]:
        ids = torch.tensor([[3]], device=self.model.device)
        while True:
            ids = self._feed(ids)
            yield int(ids)

    def _feed(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1:].argmax(-1)

    def step_bytes(self, context: int) -> int:
        model, c = self.model, self.model.config
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        weights = sum(p.nbytes for p in model.parameters()) - (embedding.nbytes if embedding is not head else 0)
        return weights + 2 * context * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * model.dtype.itemsize


Engine = Minirea | Transformers
