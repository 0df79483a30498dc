"""`bench.py kernel`: one layer's attention by the fused kernel, its phases, its floor, and torch's full attention.

Every time is the median of replays of a CUDA graph that holds one launch for each of several pairs of key and value
caches in turn, so that nothing lies in the L2 cache when a launch needs it. Decode's floor is the bytes that a step
must read (keys that are scored, keys and values of the scope) over the measured copy bandwidth; prefill is given in
TFLOP/s. A phase alone runs with the tiles and the grid of the fused launch, in which phases overlap: their times do not
add up to the launch's, and each holds the price of a launch of its own. A decode step is also timed with int8 sketches
of the keys; its output must be the same. And as one whose layers add up the votes of the last 8 tokens, in blocks of 32
for 16 spans of 64, with the launch that counts those of earlier tokens once for all layers.

Full attention is torch's scaled_dot_product_attention by each fused backend that takes it, fastest first. Left to
itself, torch chooses by what a backend can do, not by its speed: a decode step is fast only where the keys of one head
are split among multiprocessors.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bench_machine import Lengths, lengths, new_command, print_machine, print_result

from minirea.attention import step_chunks
from minirea.config import DTYPES, SPAN_SCOPES, ReAttentionConfig, RopeConfig
from minirea.errors import InputError
from minirea.kernels.sketch import width

Step = Callable[..., Any]  # something to do with one pair of caches, and its sketch
Caches = tuple[Any, ...]

CONTEXTS = {"decode": lengths("8k,16k,32k,128k,1m"), "prefill": lengths("32k,128k")}
MAX_PAIRS = 16
VOTERS = 8  # tokens whose votes count; the other numbers are in `voting`
MAX_REPLAYS = 20
SECONDS_PER_TIME = 0.25  # of replays, at least three and at most MAX_REPLAYS
FUSED_BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")  # the other one copies keys to float32


def add_command(subparsers: Any) -> argparse.ArgumentParser:
    parser = new_command(subparsers, "kernel", "the fused attention kernel", __doc__)
    parser.add_argument("--only", choices=tuple(CONTEXTS), help="default: both")
    add_shape(parser, "default: 8k,16k,32k,128k,1m for decode, 32k,128k for prefill")
    return parser


def add_shape(parser: argparse.ArgumentParser, contexts: str) -> None:
    """The flags that `Layer.of` reads, and which contexts are measured."""
    parser.add_argument(
        "--contexts",
        type=lengths,
        nargs="+",
        action=Lengths,
        metavar="N",
        help=f"cached tokens ({contexts})",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    for name, default, what in (
        ("queries", 512, "of a chunk of a prompt"),
        ("heads", 32, "query heads"),
        ("kv-heads", 8, "key/value heads"),
        ("head-dim", 128, "elements of a head"),
        ("global-size", 32, "first tokens, always seen"),
        ("local-size", 4096, "last tokens, always seen"),
        ("span-top-k", 4, "winners per head and query"),
        ("span-size", 32, "tokens around each winner"),
        ("max-spans", 128, "winners kept after the vote"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: {default})")
    parser.add_argument("--span-scope", choices=SPAN_SCOPES, default="layer", help="which heads vote together")


def run(arguments: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("bench.py kernel needs an NVIDIA GPU, and torch finds no CUDA device here")
    try:
        print_measurements(Layer.of(arguments), arguments)
    except InputError as error:
        raise SystemExit(f"bench.py kernel: {error}") from None


def print_measurements(layer: Layer, arguments: argparse.Namespace) -> None:
    machine = print_machine("cuda")
    bytes_per_us = machine["copy_gb_per_s"] * 1e3
    rows = []
    # One stream for all: a workspace belongs to a stream, and capturing needs one that is not the default.
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        for row in measure(layer, arguments):
            rows.append(row)
            print(row_text(row, bytes_per_us), flush=True)
    print_result(machine, arguments, rows)


@dataclass(frozen=True)
class Layer:
    """The shape of the attention that is measured."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    config: ReAttentionConfig

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Layer:
        """Raises InputError."""
        names = ("global_size", "local_size", "span_top_k", "span_size", "max_spans", "span_scope")
        config = ReAttentionConfig(**{name: getattr(arguments, name) for name in names})
        dtype = getattr(torch, arguments.dtype)
        layer = cls(arguments.heads, arguments.kv_heads, arguments.head_dim, dtype, config)
        for flag, value in (("--heads", layer.num_heads), ("--kv-heads", layer.num_kv_heads)):
            if value < 1 or layer.num_heads % max(1, layer.num_kv_heads):
                raise InputError(f"{flag} is {value}, expected heads to be a multiple of key/value heads")
        if layer.head_dim < 2 or layer.head_dim % 2:
            raise InputError(f"--head-dim is {layer.head_dim}, expected an even number")
        if not config.max_selected:
            raise InputError("--span-top-k or --max-spans is 0: nothing would be scored, expected more")
        if not 1 <= arguments.queries <= config.local_size:
            raise InputError(f"--queries is {arguments.queries}, expected 1 to --local-size ({config.local_size})")
        shortest = min(arguments.contexts or [layer.edge + 1])
        if shortest <= layer.edge:
            raise InputError(f"--contexts has {shortest}, expected more than global and local size ({layer.edge})")
        return layer

    @property
    def edge(self) -> int:
        """Tokens up to which nothing is scored."""
        return self.config.global_size + self.config.local_size

    @property
    def key_bytes(self) -> int:
        """Of one token's keys; its values have as many."""
        return self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def decode_bytes(self, seq_len: int, scope: float, sketch_bytes: int | None = None) -> dict[str, float]:
        """What a decode step must read: keys of the middle or their sketches, keys and values of the scope."""
        scored = self.num_kv_heads * sketch_bytes if sketch_bytes else self.key_bytes
        return {
            "score, pick": (seq_len - self.edge) * scored,
            "attend, local part": 2 * self.config.local_size * self.key_bytes,
            "attend, far part": 2 * (scope - self.config.local_size) * self.key_bytes,
        }

    def score_flops(self, seq_len: int, queries: int) -> float:
        return 2.0 * self.num_heads * queries * (seq_len - self.edge) * self.head_dim

    def attend_flops(self, keys: float, queries: int) -> float:
        """Causal: of `keys` keys the last query sees all, the one before it all but one."""
        return 4.0 * self.num_heads * queries * (keys - (queries - 1) / 2) * self.head_dim

    def step_chunks(self, chunk_size: int) -> int:
        """Chunks of a prompt in a step of a model with such layers."""
        return step_chunks(self.num_heads, self.num_kv_heads, self.head_dim, chunk_size, torch.device("cuda"))

    def queries(self, num_queries: int) -> torch.Tensor:
        return torch.randn(num_queries, self.num_heads, self.head_dim, device="cuda", dtype=self.dtype)

    def cache_pairs(self, seq_len: int) -> list[Caches]:
        """Random keys and values, as many pairs as fit into less than half of the memory that is free."""
        torch.cuda.empty_cache()
        room = 0.45 * torch.cuda.mem_get_info()[0]
        count = max(2, min(MAX_PAIRS, int(room // (2 * seq_len * self.key_bytes))))
        shape = (self.num_kv_heads, seq_len, self.head_dim)

        def cache() -> torch.Tensor:
            return torch.empty(shape, device="cuda", dtype=self.dtype).normal_()

        return [(cache(), cache()) for _ in range(count)]


def measure(layer: Layer, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All rows: for each kind of step how many kernels it launches, then its times at each context."""
    for kind, queries in (("decode", 1), ("prefill", arguments.queries)):
        if arguments.only in (None, kind):
            yield launches_row(layer, kind, queries)
            for seq_len in arguments.contexts or CONTEXTS[kind]:
                yield measure_one(layer, kind, queries, seq_len)


def measure_one(layer: Layer, kind: str, queries: int, seq_len: int) -> dict[str, Any]:
    """One row, or why there is none."""
    row = {"kind": kind, "context": seq_len, "queries": queries}
    try:
        return row | (decode_row(layer, seq_len) if kind == "decode" else prefill_row(layer, seq_len, queries))
    except torch.OutOfMemoryError as error:
        return row | {"skipped": f"out of memory: {str(error).splitlines()[0]}"}


def launches_row(layer: Layer, kind: str, queries: int) -> dict[str, Any]:
    """Everything that the GPU does in one step, once compiled, as the profiler sees it."""
    step = attention_step(layer, layer.queries(queries), 2 * layer.edge)
    pair = layer.cache_pairs(2 * layer.edge)[0]
    step(*pair)  # compiles, and makes the workspace
    return {"kind": kind, "launches": gpu_activities(functools.partial(step, *pair))}


def decode_row(layer: Layer, seq_len: int) -> dict[str, Any]:
    """Times and bytes of one decode step, without sketches and with them."""
    from kernel_phases import phases_of, recorded

    pairs, q_1HD = layer.cache_pairs(seq_len), layer.queries(1)
    step = attention_step(layer, q_1HD, seq_len)
    launch_us = graph_us(step, pairs)
    scope = scope_length(step, pairs[0])
    launch = recorded(functools.partial(step, *pairs[0]))
    return {
        "pairs": len(pairs),
        "scope": scope,
        "bytes": layer.decode_bytes(seq_len, scope),
        "phase_us": {name: graph_us(phase, pairs) for name, phase in phases_of(launch).items()},
        "launch_us": launch_us,
        "sketched": sketched(layer, step, pairs, seq_len, scope),
        "voting": voting(layer, pairs, seq_len),
        "sdpa_bytes": 2 * seq_len * layer.key_bytes,
        "sdpa_us": sdpa_times(decode_forms(layer, q_1HD), pairs),
    }


def sketched(layer: Layer, step: Step, pairs: list[Caches], seq_len: int, scope: float) -> dict[str, Any]:
    """Times and bytes of a decode step with sketches, how many keys of a slice survive, of how many slices all keys are
    scored, and what it takes to make the sketches of all keys.
    """
    from kernel_phases import recorded

    from minirea.kernels import new_sketch, sketch_keys

    shape = layer.num_kv_heads, layer.head_dim, seq_len
    caches = [(k, v, new_sketch(*shape, k.device)) for k, v in pairs]

    def make(k_GND: torch.Tensor, _v: torch.Tensor, sketch: Any) -> None:
        sketch_keys(k_GND, sketch, 0, seq_len, impl="triton")

    for k, v, sketch in caches:
        make(k, v, sketch)
        if not torch.equal(step(k, v, sketch), step(k, v)):
            raise SystemExit(f"bench.py kernel: with a sketch of {seq_len:,} keys the output is another one")
    launch = recorded(functools.partial(step, *caches[-1]))
    found, most = launch.arguments["scratch"].found.flatten(), launch.arguments["c"].SURVIVORS
    return {
        "launch_us": graph_us(step, caches),
        "bytes": layer.decode_bytes(seq_len, scope, width(layer.head_dim) + 4),
        "make_us": graph_us(make, caches),
        "survivors": int(found[found <= most].max()) if bool((found <= most).any()) else 0,
        "slices": len(found),
        "scored_slices": int((found > most).sum()),
    }


def voting(layer: Layer, pairs: list[Caches], seq_len: int) -> dict[str, Any]:
    """Times and bytes of a layer of a decode step that counts the votes of earlier tokens, and of counting them once;
    each pair of caches is a layer of a model.
    """
    from minirea.kernels import count_winners, new_votes, reattention, winners_shape

    spans = min(16, layer.config.max_spans)
    votes: dict[str, Any] = {"vote_size": 32, "vote_window": VOTERS, "carry_votes": True}
    config = dataclasses.replace(layer.config, **votes, span_size=64, max_spans=spans, decode_spans=spans)
    q_1HD, (cos, sin) = layer.queries(1), scope_tables(layer, config, 1)
    shape = len(pairs), *winners_shape(layer.num_heads, config, 2 * VOTERS)
    winners = torch.randint(seq_len, shape, dtype=torch.int32, device="cuda")
    length = torch.full((1,), seq_len, dtype=torch.int32, device="cuda")
    sizes = layer.num_heads, layer.num_kv_heads, config, len(pairs), seq_len, q_1HD.device
    cast = new_votes(*sizes)

    def count() -> None:
        for tensor in cast:
            tensor.zero_()
        count_winners(cast, winners, length, config, "triton")

    def step(k_GND: torch.Tensor, v_GND: torch.Tensor, index: int) -> Any:
        arguments = (q_1HD, k_GND, v_GND, length, cos, sin, config, "triton")
        return reattention(*arguments, votes=cast, winners=winners[index])

    count_us = graph_us(count, [()])
    return {
        "votes_us": graph_us(step, [(*pair, index) for index, pair in enumerate(pairs)]),
        "count_us": count_us,
        "layers": len(pairs),
        "bytes": layer.decode_bytes(seq_len, min(seq_len, config.max_scope)),
    }


def prefill_row(layer: Layer, seq_len: int, queries: int) -> dict[str, Any]:
    """Times and operations of a launch of one chunk, and of each chunk of a launch of several, as the engine has it."""
    from kernel_phases import phases_of, recorded

    pairs, q_THD = layer.cache_pairs(seq_len), layer.queries(queries)
    step = attention_step(layer, q_THD, seq_len)
    launch_us = graph_us(step, pairs)
    scope = scope_length(step, pairs[0])
    launch = recorded(functools.partial(step, *pairs[0]))
    score_flops = layer.score_flops(seq_len, queries)
    chunks = min(layer.step_chunks(queries), seq_len // queries)
    together = attention_step(layer, layer.queries(chunks * queries), seq_len, queries)
    return {
        "pairs": len(pairs),
        "scope": scope,
        "phase_us": {name: graph_us(phase, pairs) for name, phase in phases_of(launch).items()},
        "score_flops": score_flops,
        "launch_us": launch_us,
        "chunks": chunks,
        "chunk_us": graph_us(together, pairs) / chunks,
        "launch_flops": score_flops + layer.attend_flops(scope, queries),
        "sdpa_flops": layer.attend_flops(seq_len, queries),
        "sdpa_us": sdpa_times(prefill_forms(q_THD, seq_len), pairs),
    }


# --------------------------------------------------------------------------------------------------- what is measured


def attention_step(
    layer: Layer, q_THD: torch.Tensor, seq_len: int, chunk_size: int | None = None
) -> Callable[..., Any]:
    """The fused step over one pair of caches; decode reads seq_len from the GPU's memory, as in the engine's graph."""
    from minirea.kernels import reattention

    cos, sin = scope_tables(layer, layer.config, len(q_THD))
    length = seq_len if len(q_THD) > 1 else torch.tensor([seq_len], dtype=torch.int32, device="cuda")

    def step(k_GND: torch.Tensor, v_GND: torch.Tensor, sketch: Any = None, return_selection: bool = False) -> Any:
        arguments = (q_THD, k_GND, v_GND, length, cos, sin, layer.config, "triton", return_selection)
        return reattention(*arguments, chunk_size=chunk_size, sketch=sketch)

    return step


def scope_tables(layer: Layer, config: ReAttentionConfig, num_queries: int) -> list[torch.Tensor]:
    """cos and sin."""
    from minirea.rope import inverse_frequencies, rope_table

    scope = config.max_scope
    table = rope_table(*inverse_frequencies(RopeConfig(), layer.head_dim, scope), 0, scope + num_queries)
    return [x.cuda() for x in table]


def scope_length(step: Callable[..., Any], pair: Caches) -> float:
    """Rows of the scope; with a scope for each key/value head their mean."""
    _, selection = step(*pair, return_selection=True)
    scopes = selection if isinstance(selection, list) else [selection]
    return statistics.mean(len(scope) for scope in scopes)


class Form(NamedTuple):
    """One way to compute full attention with torch."""

    name: str
    backends: tuple[str, ...]
    step: Step


def decode_forms(layer: Layer, q_1HD: torch.Tensor) -> list[Form]:
    """A group's query heads as rows of one head, so that keys are read once for all of them, or left to torch."""
    G, group = layer.num_kv_heads, layer.num_heads // layer.num_kv_heads
    rows = q_1HD.view(1, G, group, layer.head_dim)
    heads = q_1HD.view(1, layer.num_heads, 1, layer.head_dim)

    def as_rows(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(rows, k[None], v[None])

    def grouped(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(heads, k[None], v[None], enable_gqa=True)

    return [Form("heads as rows", FUSED_BACKENDS, as_rows), Form("enable_gqa", FUSED_BACKENDS, grouped)]


def prefill_forms(q_THD: torch.Tensor, seq_len: int) -> list[Form]:
    """Causal attention of the last T tokens: only the flash backend has it; others need a mask in memory.

    "no mask" is not the same function, but shows what a backend without a mask can do: the queries see each other's
    later keys too, T / 2 of seq_len keys more than they should.
    """
    from torch.nn.attention.bias import causal_lower_right

    T = len(q_THD)
    q = q_THD.transpose(0, 1)[None]
    mask = torch.zeros(1, 1, T, seq_len, device=q.device, dtype=q.dtype)
    mask[..., seq_len - T :] = torch.full((T, T), -torch.inf, device=q.device, dtype=q.dtype).triu(1)
    causal = causal_lower_right(T, seq_len)

    def attend(attn_mask: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k[None], v[None], attn_mask=attn_mask, enable_gqa=True)

    return [
        Form("causal", ("FLASH_ATTENTION",), functools.partial(attend, causal)),
        Form("causal by a mask", ("CUDNN_ATTENTION", "EFFICIENT_ATTENTION"), functools.partial(attend, mask)),
        Form("no mask", ("FLASH_ATTENTION", "CUDNN_ATTENTION"), functools.partial(attend, None)),
    ]


# ---------------------------------------------------------------------------------------------------- how it is timed


def graph_us(step: Step, pairs: list[Caches]) -> float:
    """Median microseconds of `step` on one pair, all pairs captured one after the other in one CUDA graph."""
    stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    for pair in pairs:  # compiles, and makes workspaces, which a capture could not
        step(*pair)
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for pair in pairs:
            step(*pair)
    replay_ms(graph)
    repeat = max(3, min(MAX_REPLAYS, int(SECONDS_PER_TIME * 1e3 / replay_ms(graph))))
    return statistics.median(replay_ms(graph) for _ in range(repeat)) * 1e3 / len(pairs)


def replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def sdpa_times(forms: list[Form], pairs: list[Caches]) -> dict[str, float]:
    """Microseconds by form and backend, fastest first; a backend that refuses a form is left out."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    times = {}
    for form in forms:
        for backend in form.backends:
            with contextlib.suppress(RuntimeError), warnings.catch_warnings():  # it warns why it refuses
                warnings.simplefilter("ignore")
                with sdpa_kernel(getattr(SDPBackend, backend)):
                    times[f"{form.name}, {backend.split('_')[0].lower()}"] = graph_us(form.step, pairs)
    return dict(sorted(times.items(), key=lambda item: item[1]))


def gpu_activities(run: Callable[[], Any]) -> list[str]:
    """Names of all kernels, copies and fills that the GPU runs for `run`. Memory comes from torch's pool: no launch."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        run()
        torch.cuda.synchronize()
    return [event.name for event in profiler.events() if event.device_type.name == "CUDA"]


# --------------------------------------------------------------------------------------------------- what is printed


def row_text(row: dict[str, Any], bytes_per_us: float) -> str:
    """A row as text, a block of lines."""
    if "launches" in row:
        names = ", ".join(row["launches"]) or "the profiler saw nothing"
        return f"\none {row['kind']} step: {len(row['launches'])} kernels, copies and fills by torch.profiler: {names}"
    queries = f", {row['queries']:,} queries" if row["kind"] == "prefill" else ""
    title = f"\n{row['kind']}, {row['context']:,} keys{queries}"
    if "skipped" in row:
        return f"{title}: skipped, {row['skipped']}"
    lines = decode_lines(row, bytes_per_us) if row["kind"] == "decode" else prefill_lines(row)
    return "\n".join([f"{title}, scope {row['scope']:,.0f}, {row['pairs']} pairs of caches", *lines])


def line(name: str, us: float, note: str = "") -> str:
    return f"  {name:<44}{us:>10,.1f} us  {note}".rstrip()


def decode_lines(row: dict[str, Any], bytes_per_us: float) -> list[str]:
    floors = {name: nbytes / bytes_per_us for name, nbytes in row["bytes"].items()}
    floor, sdpa_floor = sum(floors.values()), row["sdpa_bytes"] / bytes_per_us
    lines = [line("floor", floor)]
    for name, us in row["phase_us"].items():
        lines.append(line(name + ", alone", us, f"floor {floors[name]:,.1f}" if name in floors else ""))
    lines.append(line("whole launch", row["launch_us"], f"{row['launch_us'] / floor:.2f} x floor"))
    lines += sketch_lines(row["sketched"], row["launch_us"], bytes_per_us) if "sketched" in row else []
    lines += voting_lines(row["voting"], bytes_per_us) if "voting" in row else []
    for name, us in row["sdpa_us"].items():
        ratio = us / row["launch_us"]
        lines.append(line(f"all keys, SDPA {name}", us, f"{ratio:.2f} x the launch, floor {sdpa_floor:,.1f}"))
    return lines


def sketch_lines(sketched: dict[str, Any], without_us: float, bytes_per_us: float) -> list[str]:
    us, floor = sketched["launch_us"], sum(sketched["bytes"].values()) / bytes_per_us
    where = f"{sketched['scored_slices']} of {sketched['slices']} slices scored whole"
    note = f"{us / floor:.2f} x floor {floor:,.1f}, {us / without_us:.2f} x without"
    return [
        line("whole launch with sketches", us, f"{note}, at most {sketched['survivors']} survivors, {where}"),
        line("sketches of all keys", sketched["make_us"]),
    ]


def voting_lines(voting: dict[str, Any], bytes_per_us: float) -> list[str]:
    us, floor = voting["votes_us"], sum(voting["bytes"].values()) / bytes_per_us
    return [
        line(f"votes of {VOTERS} tokens", us, f"{us / floor:.2f} x floor {floor:,.1f}"),
        line("counting those of earlier ones, for all layers", voting["count_us"], f"{voting['layers']} layers"),
    ]


def prefill_lines(row: dict[str, Any]) -> list[str]:
    def tflops(flops: float, us: float) -> str:
        return f"{flops / us / 1e6:.0f} TFLOP/s"

    lines = [line(f"{name}, alone", us, tflops(row["score_flops"], us)) for name, us in row["phase_us"].items()]
    lines.append(line("whole launch", row["launch_us"], tflops(row["launch_flops"], row["launch_us"])))
    lines.append(line(f"each of {row['chunks']} chunks in one launch", row["chunk_us"]))
    for name, us in row["sdpa_us"].items():
        ratio = f"{us / row['launch_us']:.2f} x the launch"
        lines.append(line(f"all keys, SDPA {name}", us, f"{ratio}, {tflops(row['sdpa_flops'], us)}"))
    return lines
