"""Speed and memory, measured: minirea beside transformers on the same weights, machine and run.

    python tools/bench.py model --model weights/demo --contexts 512 64k

Each engine runs in a process of its own, so that its peak memory is its own. Decode is timed on a cache that is
filled with random keys and values (so no prompt has to be read first); prefill is timed on random tokens. The floor is
the bytes that a step must read over the machine's measured copy bandwidth. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

ENGINES = ("minirea", "transformers")


def main() -> None:
    arguments = parse()
    if arguments.engine:
        print(json.dumps(measure(arguments)))
        return
    machine = describe_machine(arguments.device)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    rows = []
    for context in arguments.contexts:
        for engine in ENGINES:
            rows.append(run_engine(engine, context))
            print(row_text(rows[-1], rows[-1 if engine == "minirea" else -2], machine["copy_gb_per_s"]), flush=True)
    print(json.dumps({"machine": machine, "model": arguments.model, "rows": rows}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    model = commands.add_parser("model", help="decode and prefill of a model directory against transformers")
    model.add_argument("--model", required=True, help="Hugging Face model directory")
    model.add_argument("--contexts", type=tokens, nargs="+", default=[512], help="tokens in context: 512 64k ...")
    model.add_argument("--tokens", type=int, default=64, help="decode steps timed; the median is reported")
    model.add_argument("--prefill", action="store_true", help="also time reading the whole context")
    model.add_argument("--attention", default="reattention", help="of minirea; transformers always attends to all")
    model.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    model.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    model.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)  # the process that measures one of them
    return parser.parse_args()


def tokens(text: str) -> int:
    """64k is 65,536 and 1m is 1,048,576."""
    scale = {"k": 1024, "m": 1024 * 1024}.get(text[-1:].lower())
    return int(text[:-1]) * scale if scale else int(text)


def describe_machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on, with the copy bandwidth that the floors are made of."""
    on_gpu = device == "cuda"
    buffer = torch.empty((2**30 if on_gpu else 2**27) // 4, device=device).normal_()
    target = torch.empty_like(buffer)
    seconds = timed(lambda: target.copy_(buffer), 10, device)
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"{cpu_name()} x {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "copy_gb_per_s": round(2 * buffer.nbytes / seconds / 1e9, 1),
    }


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def run_engine(engine: str, context: int) -> dict[str, Any]:
    """This script again, as the process that measures one engine at one context."""
    options = [*sys.argv[1:], "--engine", engine, "--contexts", str(context)]
    done = subprocess.run([sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def row_text(row: dict[str, Any], ours: dict[str, Any], copy_gb_per_s: float) -> str:
    floor = row["step_bytes"] / copy_gb_per_s / 1e6
    ratio = row["decode_ms"] / ours["decode_ms"]
    parts = [
        f"{row['context']:>9,} tokens  {row['engine']:<12}",
        f"decode {row['decode_ms']:8.2f} ms/token (floor {floor:.3f}, {ratio:.1f}x ours)",
        f"memory {row['peak_bytes'] / 1e9:.2f} GB",
    ]
    if row["prefill_seconds"] is not None:
        parts.append(f"prefill {row['context'] / row['prefill_seconds']:,.0f} tokens/s")
    return ", ".join(parts)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time one engine at one context; milliseconds per decode step, seconds of prefill, peak bytes."""
    from minirea.memory import peak_bytes

    context = arguments.contexts[0]
    engine = (Minirea if arguments.engine == "minirea" else Transformers)(arguments)
    engine.fill(context)
    step_seconds = timed(engine.step, arguments.tokens, arguments.device)
    prefill_seconds = None
    if arguments.prefill:
        ids = torch.randint(3, engine.vocab_size, (context,), generator=torch.Generator().manual_seed(0)).tolist()
        prefill_seconds = timed(lambda: engine.prefill(ids), 1, arguments.device, warmup=0)
    return {
        "engine": arguments.engine,
        "context": context,
        "attention": arguments.attention if arguments.engine == "minirea" else "full",
        "decode_ms": step_seconds * 1e3,
        "prefill_seconds": prefill_seconds,
        "step_bytes": engine.step_bytes(context),
        "peak_bytes": peak_bytes(torch.device(arguments.device)),
    }


def timed(run: Callable[[], Any], repeat: int, device: str, warmup: int = 3) -> float:
    """Median seconds of one call."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = []
    for index in range(warmup + repeat):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        if index >= warmup:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


class Minirea:
    """Decode steps of minirea, through the loop that `generate` runs."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        import minirea

        a = arguments
        self.llm = minirea.load(a.model, attention=a.attention, device=a.device, dtype=a.dtype)
        self.num_tokens = a.tokens + 8
        self.vocab_size = self.llm.model.config.vocab_size

    def fill(self, context: int) -> None:
        from minirea.generate import decode
        from minirea.sampling import Sampler, SamplingConfig

        session = self.llm.session(context + self.num_tokens)
        with torch.inference_mode():
            for tensor in session.cache.tensors:
                tensor.normal_()
        session.cache.seq_len = context
        model = self.llm.model
        self.tokens = decode(
            model, session.cache, 3, Sampler(SamplingConfig(), [], model.config.vocab_size, model.device)
        )

    def step(self) -> None:
        next(self.tokens)

    def prefill(self, ids: list[int]) -> None:
        self.llm.generate(ids, max_tokens=1)

    def step_bytes(self, context: int) -> int:
        """Weights, the keys that are scored, and keys and values of the scope."""
        model = self.llm.model
        c, scope = model.config, model.attention.config
        key_bytes = c.num_layers * c.num_kv_heads * c.head_dim * model.dtype.itemsize
        middle = max(0, context - scope.global_size - scope.local_size)
        seen = min(context, scope.max_scope)
        if model.attention.mode == "full":
            middle, seen = 0, context
        return model.nbytes + (middle * (scope.span_top_k > 0) + 2 * seen) * key_bytes


class Transformers:
    """Decode steps of Hugging Face transformers with its default cache and attention."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM

        dtype = getattr(torch, arguments.dtype)
        self.model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(arguments.device).eval()
        self.vocab_size = self.model.config.vocab_size
        self.ids = torch.tensor([[3]], device=arguments.device)

    def fill(self, context: int) -> None:
        from transformers import DynamicCache

        c = self.model.config
        self.cache = DynamicCache()
        shape = (1, c.num_key_value_heads, context, c.head_dim)
        for layer in range(c.num_hidden_layers):
            k, v = (torch.randn(shape, device=self.model.device, dtype=self.model.dtype) for _ in range(2))
            self.cache.update(k, v, layer)

    @torch.inference_mode()
    def step(self) -> None:
        logits = self.model(self.ids, past_key_values=self.cache, use_cache=True).logits
        self.ids = logits[:, -1:].argmax(-1)
        self.ids.tolist()  # a decode loop has to see the token

    @torch.inference_mode()
    def prefill(self, ids: list[int]) -> None:
        self.model(torch.tensor([ids], device=self.model.device), use_cache=True, logits_to_keep=1)

    def step_bytes(self, context: int) -> int:
        c = self.model.config
        weights = sum(p.nbytes for p in self.model.parameters())
        itemsize = self.model.dtype.itemsize
        return weights + 2 * context * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * itemsize


if __name__ == "__main__":
    main()
