"""From the arguments of a call to launches: tiles, sizes, scratch memory, one launch for each step."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

import torch
import triton

from minirea.config import ReAttentionConfig
from minirea.errors import InputError
from minirea.kernels import Gather, launching
from minirea.kernels.fused.arguments import (
    MAX_CANDIDATES,
    MAX_PARTIALS,
    ChunkScratch,
    ChunkSizes,
    CountSizes,
    DecodeScratch,
    DecodeSizes,
    Heads,
    PlainScratch,
    Rope,
    SketchRows,
    SketchSizes,
    SketchTiles,
    Tiles,
)
from minirea.kernels.fused.chunks import chunk_kernel
from minirea.kernels.fused.decode import decode_kernel
from minirea.kernels.fused.plain import plain_kernel
from minirea.kernels.fused.recent import count_kernel
from minirea.kernels.fused.sketch import sketch_kernel
from minirea.kernels.launching import cdiv, launch_cooperatively
from minirea.kernels.launching import next_power_of_2 as pad
from minirea.kernels.near import Near, near_rows
from minirea.kernels.sketch import Sketch, hadamard, width
from minirea.kernels.votes import Votes

# Under TRITON_INTERPRET=1 programs run one after another, so there may be only one: a second could never arrive.
INTERPRETED: Final = not isinstance(decode_kernel, triton.JITFunction)
# Which of two kernels that share functions Triton 3.6 hashes first decides under which names it keeps them on the disk.
# Threads that compile would leave that to chance, and compile again in the next process.
if not INTERPRETED:
    hash(decode_kernel)
    hash(chunk_kernel)
    hash(count_kernel)
    hash(plain_kernel)
# The most winners of a ballot that a decode step may hold in registers, where every one is compared with every other:
# with twice as many a comparison takes 256 registers of every thread, and Triton 3.6 spills them all.
MAX_WINNERS_IN_REGISTERS: Final = 128
# The most positions that a decode step counts votes for and keeps: it compares every one with every other as well.
MAX_ELECTED: Final = 64
MAX_COUNTING: Final = 64  # programs of a ballot that count winners of earlier tokens
# What every slice of a block of rows costs besides the products with its keys, as a share of those with all keys: the
# tiles that it begins with are stored, and its candidates picked and merged. From launches of 144 blocks on 132
# programs over 131,072 keys: with 4 slices they take 9 % longer than with 2.
SLICE_COST: Final = 1 / 8
# Scratch that holds nothing from one launch to the next and is the same for many kinds of launch.
PASSING: Final = (
    "block", "tag", "upper", "tile", "tile_upper", "live", "threshold", "survivor", "lower", "q_rot", "k_rot", "v_far",
)  # fmt: skip
# Chunks of a launch, with which its scratch grows.
MAX_CHUNKS: Final = 16

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # of the tensors of a scratch


def decode_tiles(group: int, block_d: int, itemsize: int) -> Tiles:
    """A key tile of 32 KiB, three of which are in flight while one is used; the matrix unit takes 16 rows."""
    block_n = max(16, min(128, 32768 // (block_d * itemsize)))
    return Tiles(max(16, pad(group)), block_n, max(16, block_n // 2), num_warps=8, num_stages=3, programs_per_sm=1)


def plain_tiles(group: int, block_d: int, itemsize: int) -> Tiles:
    """Small ones, of two programs that a multiprocessor runs; in float32, which takes twice the registers, of one."""
    rows = max(16, pad(group))
    if itemsize == 4:
        return Tiles(rows, 16, 16, num_warps=8, num_stages=2, programs_per_sm=1)
    block = max(16, min(32, 4096 // block_d))
    return Tiles(rows, block, block, num_warps=4, num_stages=3, programs_per_sm=2)


def sketch_tiles(head_dim: int) -> SketchTiles:
    """A tile of 32 KiB as in `decode_tiles`. Room for several times what real keys need; see kernels/NOTEBOOK.md."""
    block_n = max(32, min(256, 32768 // width(head_dim)))
    return SketchTiles(block_n, ROOM=128, SURVIVORS=512, LEAST=8 * block_n, num_stages=3)


def chunk_tiles(block_d: int, itemsize: int) -> Tiles:
    """Tiles for the tensor cores in half precision; in float32, whose products are not theirs, tiles that fit."""
    if itemsize == 4:
        return Tiles(32, 32, 32, num_warps=4, num_stages=1, programs_per_sm=1)
    block_m = 128 if block_d <= 128 else 64
    return Tiles(block_m, 128 if block_d <= 128 else 64, 64, num_warps=8, num_stages=3, programs_per_sm=1)


class Work(NamedTuple):
    """What of a step a launch does; see Sizes."""

    searches: bool = True
    attends: bool = True


WHOLE: Final = Work()
SEARCH: Final = Work(attends=False)
ATTEND: Final = Work(searches=False)
# Scratch.
_OF_THE_SEARCH: Final = ("block", "tag", "candidate")
_OF_THE_SKETCH: Final = ("upper", "tile", "tile_upper", "live", "threshold", "survivor", "lower", "found")


def fits_registers(rows: int, span_top_k: int) -> bool:
    """Whether a decode step can hold the winners of a ballot in registers."""
    return pad(rows) * pad(span_top_k) <= MAX_WINNERS_IN_REGISTERS


class Layer(NamedTuple):
    """The attention of one layer, as far as it decides how a step is launched.

    `ranks` processes have so many heads each, which vote together.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    config: ReAttentionConfig
    ranks: int = 1

    @classmethod
    def of(
        cls, q_THD: torch.Tensor, k_cache_GND: torch.Tensor, config: ReAttentionConfig, gather: Gather | None = None
    ) -> Layer:
        together = gather is not None and config.span_scope == "layer" and config.max_selected > 0
        ranks = gather.ranks if gather is not None and together else 1
        return cls(q_THD.shape[1], k_cache_GND.shape[0], q_THD.shape[2], q_THD.dtype, config, ranks)

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def block_d(self) -> int:
        return max(16, pad(self.head_dim))

    @property
    def by_head(self) -> bool:
        return self.config.span_scope == "kv_head"

    @property
    def selects(self) -> bool:
        return self.config.max_selected > 0

    @property
    def ballots(self) -> int:
        """Of a token or a chunk."""
        return self.num_kv_heads if self.by_head else 1

    def decodes(self, num_queries: int) -> bool:
        """Whether a step takes the decode kernel."""
        rows = self.group if self.by_head else self.num_heads * self.ranks
        return num_queries == 1 and self.selects and fits_registers(rows, self.config.span_top_k)

    def is_plain(self, num_queries: int) -> bool:
        """Whether a step takes the plain kernel."""
        return num_queries == 1 and not self.selects

    def counts(self) -> bool:
        """Whether a step of one query with votes takes the decode kernel."""
        return self.decodes(1) and self.config.max_spans <= MAX_ELECTED

    def check_sketched(self) -> None:
        """Raises InputError where one query has no decode kernel, which is the one that reads sketches."""
        if not self.decodes(1):
            rows, K = self.group if self.by_head else self.num_heads * self.ranks, self.config.span_top_k
            raise InputError(
                f"{rows} heads vote with {K} winners each, expected at most {MAX_WINNERS_IN_REGISTERS} winners with"
                " sketches (both numbers count as the next power of two); lower span_top_k or use span_scope kv_head"
            )

    def winners(self, num_rows: int, device: torch.device) -> torch.Tensor:
        """Room for those of a launch that searches: int32 [rows, K_PAD]."""
        return torch.empty(num_rows, pad(max(1, self.config.span_top_k)), dtype=torch.int32, device=device)

    def constants(self, seq_len_in_memory: bool, work: Work, recent: int = 0) -> dict[str, Any]:
        """Fields of `Sizes` that both kernels have alike."""
        config = self.config
        return {
            "G": self.num_kv_heads,
            "GROUP": self.group,
            "D": self.head_dim,
            "K": max(1, config.span_top_k),
            "BY_HEAD": self.by_head,
            "VOTE_SIZE": config.vote_size,
            "SELECTS": self.selects,
            "RELATIVE": self.dtype != torch.float32,
            "SEQ_LEN_IN_MEMORY": seq_len_in_memory,
            "PRECISION": "ieee" if self.dtype == torch.float32 else "tf32",
            "SEARCHES": work.searches,
            "ATTENDS": work.attends,
            "RANKS": self.ranks if work.attends else 1,
            "RECENT": recent if work.attends else 0,
        }


class PlainPlan(NamedTuple):
    """How a decode step that selects nothing is launched."""

    c: DecodeSizes
    programs: int
    scratch: Shapes


class DecodePlan(NamedTuple):
    """How a decode step that selects is launched."""

    c: DecodeSizes
    programs: int
    workers: int
    scratch: Shapes


class ChunkPlan(NamedTuple):
    """How a launch of chunks is launched."""

    c: ChunkSizes
    programs: int
    levels: int
    local_rows: int
    far_rows: int
    scratch: Shapes


@functools.lru_cache(maxsize=256)
def plan_plain(
    layer: Layer, tiles: Tiles, processors: int, seq_len_in_memory: bool, near_k: int = 0, near_v: int = 0
) -> PlainPlan:
    """A program for each slice of each key/value head, as many slices as a program can join."""
    H, G, D, *_ = layer
    slices = max(1, min(processors // G, MAX_PARTIALS // layer.block_d))
    near = {"NEAR_K": near_k, "NEAR_V": near_v}
    constants = layer.constants(seq_len_in_memory, WHOLE) | near | {"VOTES": False, "ALONE": False}
    c = DecodeSizes(tiles, **constants, SLICES=slices, WHOLE_TILES=False)
    shapes: Shapes = {
        "counters": (torch.int64, (2 + G,)),
        "partial_acc": (torch.float32, (H, slices, D)),
        "partial_max": (torch.float32, (H, slices)),
        "partial_sum": (torch.float32, (H, slices)),
    }
    return PlainPlan(c, G * slices, shapes)


@functools.lru_cache(maxsize=256)
def plan_decode(
    layer: Layer,
    tiles: Tiles,
    processors: int,
    seq_len_in_memory: bool,
    work: Work = WHOLE,
    sketch: SketchTiles | None = None,
    near_k: int = 0,
    near_v: int = 0,
    counts: bool = False,
    recent: int = 0,
) -> DecodePlan:
    """Workers with a slice of one key/value head each, and a program for each ballot besides.

    Only where heads have one slice can a worker have several units: slices of a head wait for each other.
    """
    H, G, D, _, config, _ = layer
    constants = layer.constants(seq_len_in_memory, work, recent)
    ballot_rows, ballots = (layer.group, G) if layer.by_head else (H * constants["RANKS"], 1)
    slices = max(1, min((processors - 1) // G, MAX_CANDIDATES // (pad(ballot_rows) * pad(constants["K"]))))
    workers = max(1, min(processors - 1, G * slices))
    programs = min(processors, workers + ballots)
    votes = ballot_rows * config.span_top_k > config.max_spans
    constants |= {"VOTES": votes, "ALONE": programs == 1, "sketch": sketch, "NEAR_K": near_k, "NEAR_V": near_v}
    if counts and work.attends:
        constants |= {"COUNTS": True, "MAX_SPANS": config.max_spans}
    # Slices are short: what lies behind them would be much of what is read.
    c = DecodeSizes(tiles, **constants, SLICES=slices, WHOLE_TILES=False)
    shapes: Shapes = {
        "counters": (torch.int64, (2 + (2 * G if sketch else G),)),
        "block": (torch.float32, (programs, c.BLOCK_M, c.K_PAD, c.BLOCK_N)),
        "tag": (torch.int32, (programs, c.BLOCK_M, c.K_PAD)),
        "candidate": (torch.int64, (H, slices, c.K_PAD)),
        "kept": (torch.int32, (ballots, c.KEPT_PAD)),
        "num_kept": (torch.int32, (ballots,)),
        "partial_acc": (torch.float32, (H, slices, D)),
        "partial_max": (torch.float32, (H, slices)),
        "partial_sum": (torch.float32, (H, slices)),
        "selection": (torch.int64, (ballots, config.max_scope)),
        "num_far": (torch.int32, (ballots,)),
    }
    if sketch:
        rooms = (programs, c.GROUP, sketch.ROOM)
        shapes |= {
            "upper": (torch.float32, (*rooms, sketch.BLOCK_N)),
            "tile": (torch.int32, rooms),
            "tile_upper": (torch.float32, rooms),
            "live": (torch.int32, rooms),
            "threshold": (torch.float32, (programs, c.SKETCH_M)),
            "survivor": (torch.int32, (programs, 2, sketch.SURVIVORS)),
            "lower": (torch.float32, (H, slices, c.K_PAD)),
            "found": (torch.int32, (G, slices)),
        }
    return DecodePlan(c, programs, workers, _needed(shapes, work))


def _needed(shapes: Shapes, work: Work) -> Shapes:
    """Scratch of a launch that does not do a whole step: of what it does not touch, one element."""
    if work == WHOLE:
        return shapes
    search = {*_OF_THE_SEARCH, *_OF_THE_SKETCH}
    touched = {"counters", *search} if work.searches else shapes.keys() - search
    return {name: (dtype, shape if name in touched else (1,)) for name, (dtype, shape) in shapes.items()}


def chunks_of_step(layer: Layer, chunk_size: int, device: torch.device, least: int, most: int) -> int:
    """The fewest chunks with which a launch takes least time for each, by the rounds of its programs."""
    tiles = chunk_tiles(layer.block_d, layer.dtype.itemsize)
    programs = num_programs(device, tiles)
    units = layer.num_kv_heads * cdiv(chunk_size * layer.group, tiles.BLOCK_M)

    def time_of(chunks: int) -> float:
        slices = chunk_slices(pad(chunks) * units, programs, MAX_CANDIDATES)  # as plan_chunks has them
        return cdiv(chunks * units * slices, programs) * (1 / slices + SLICE_COST) / chunks

    return min(range(least, most + 1), key=time_of)


def chunk_slices(units: int, programs: int, most: int) -> int:
    """Slices of the middle with which the programs' last round through units * slices leaves least idle.

    Powers of two, up to `most`: bounds that the kernel computes by shifts leave its loops as they are.
    """
    slices = (1 << exponent for exponent in range(max(1, min(programs, most)).bit_length()))
    return min(slices, key=lambda parts: cdiv(units * parts, programs) * (1 / parts + SLICE_COST))


@functools.lru_cache(maxsize=256)
def plan_chunks(
    layer: Layer,
    tiles: Tiles,
    programs: int,
    seq_len_in_memory: bool,
    chunks: int,
    chunk_size: int,
    capacity: int,
    work: Work = WHOLE,
    carries: bool = False,
    near_v: int = 0,
    recent: int = 0,
) -> ChunkPlan:
    """Sizes by the next powers of two, so that prompts of all lengths share few workspaces and kernels."""
    _, G, D, dtype, config, _ = layer
    constants = layer.constants(seq_len_in_memory, work, recent)
    chunks, chunk_size = pad(chunks), pad(chunk_size)
    rows = chunk_size * layer.group  # of one key/value head in a chunk
    units = chunks * G * cdiv(rows, tiles.BLOCK_M)
    slices = chunk_slices(units, programs, MAX_CANDIDATES // pad(constants["K"]))
    spans_pad = pad(max(1, config.max_spans))
    constants |= {"P_PAD": spans_pad, "PROGRAMS_PAD": pad(programs), "CARRIES": carries, "NEAR_V": near_v}
    c = ChunkSizes(tiles, **constants, SLICES=slices, WHOLE_TILES=config.local_size >= tiles.BLOCK_N)
    ballots = chunks * c.BALLOTS
    levels = rows * (c.VOTING_HEADS // c.BALLOTS) * config.span_top_k // max(1, config.max_spans)
    local_rows = config.dense_size + (chunks - 1) * chunk_size  # a dense chunk's are all
    far_rows = cdiv(config.global_size + config.max_selected, c.BLOCK_A) * c.BLOCK_A
    shapes: Shapes = {
        "counters": (torch.int64, (1,)),
        "block": (torch.float32, (programs, c.BLOCK_M, c.K_PAD, c.BLOCK_N)),
        "tag": (torch.int32, (programs, c.BLOCK_M, c.K_PAD)),
        "candidate": (torch.int64, (chunks * G * rows, c.CANDIDATES)),
        "counts": (torch.int32, (ballots, pad(capacity))),
        "num_votes": (torch.int32, (ballots, levels + 1)),
        "tally": (torch.int32, (ballots, programs, 2)),
        "kept": (torch.int32, (ballots, c.P_PAD)),
        "num_kept": (torch.int32, (ballots,)),
        "q_rot": (dtype, (chunks * G * rows, D)),
        "k_rot": (dtype, (G * local_rows + chunks * G * far_rows, D)),
        "v_far": (dtype, (chunks, G, far_rows, D)),
        "selection": (torch.int64, (ballots, config.max_scope)),
        "num_far": (torch.int32, (ballots,)),
    }
    if carries:  # the caller's are used
        shapes |= dict.fromkeys(("counts", "num_votes"), (torch.int32, (1,)))
    return ChunkPlan(c, programs, levels, local_rows, far_rows, _needed(shapes, work))


def reattention_triton(
    q_THD: torch.Tensor,
    k_cache_GND: torch.Tensor,
    v_cache_GND: torch.Tensor,
    seq_len: int | torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    config: ReAttentionConfig,
    return_selection: bool = False,
    chunk_size: int | None = None,
    gather: Gather | None = None,
    sketch: Sketch | None = None,
    votes: Votes | None = None,
    near: Near | None = None,
    winners: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor | list[torch.Tensor] | None]:
    """Arguments and results are those of `minirea.kernels.reattention`. A token or a chunk is one launch, and in half
    precision up to MAX_CHUNKS chunks are; where heads elsewhere vote too, it is two, with `gather` between them. A
    token that selects nothing takes the plain kernel, one that does the decode kernel, all others the chunk kernel.

    Only return_selection waits for the GPU: the scope's length decides the shape of the result. `tiles` overrides the
    tile sizes, for measurements.

    Raises:
        InputError: head_dim beyond 256, or a GPU or Triton without cooperative launches.
    """
    T, H, D = q_THD.shape
    if not (q_THD.is_cuda or INTERPRETED):
        raise InputError(f"the tensors are on {q_THD.device}, expected a CUDA device for impl 'triton'")
    if D > 256:
        raise InputError(f"head_dim is {D}, expected at most 256 with impl 'triton'; impl 'torch' takes any")
    rope = Rope(cos.contiguous(), sin.contiguous())
    out_THD = torch.empty(T, H, D, dtype=q_THD.dtype, device=q_THD.device)
    scratch: PlainScratch | DecodeScratch | ChunkScratch
    # A workspace belongs to the current stream of the tensors' device.
    with torch.cuda.device(q_THD.device) if q_THD.is_cuda else contextlib.nullcontext():
        layer = Layer.of(q_THD, k_cache_GND, config, gather)
        if sketch is not None and T == 1:
            layer.check_sketched()
        if layer.is_plain(T):
            scratch = launch_plain(q_THD, k_cache_GND, v_cache_GND, out_THD, seq_len, rope, config, tiles, near)
        elif layer.decodes(T) if votes is None else layer.counts():
            scratch = launch_decode(
                *(q_THD, k_cache_GND, v_cache_GND, out_THD, seq_len, rope, config, tiles, gather, sketch),
                votes=votes,
                near=near,
                winners=winners,
            )
        else:
            for start, stop, size in cut(T, chunk_size or T, q_THD.dtype):
                n = seq_len - (T - stop) if stop < T else seq_len
                queries, outputs = q_THD[start:stop], out_THD[start:stop]
                scratch = launch_chunks(
                    *(queries, k_cache_GND, v_cache_GND, outputs, n, rope, config, tiles, size, gather),
                    *(votes, near, winners),
                )
    if not return_selection:
        return out_THD, None
    scopes = scopes_of(scratch, int(seq_len), layer)
    return out_THD, scopes if config.span_scope == "kv_head" else scopes[0]


def cut(num_queries: int, chunk_size: int, dtype: torch.dtype) -> Iterator[tuple[int, int, int]]:
    """The launches of a step that takes the chunk kernel: first query, last one + 1, and queries of a chunk.

    In float32 the tables' rounding would show if chunks shared positions: there each is a launch.
    """
    together = chunk_size * (MAX_CHUNKS if dtype != torch.float32 else 1)
    for start in range(0, num_queries, together):
        stop = min(start + together, num_queries)
        yield start, stop, min(chunk_size, stop - start)


def launch_plain(
    q_1HD: torch.Tensor,
    k_cache_GND: torch.Tensor,
    v_cache_GND: torch.Tensor,
    out_1HD: torch.Tensor,
    seq_len: int | torch.Tensor,
    rope: Rope,
    config: ReAttentionConfig,
    tiles: Tiles | None = None,
    near: Near | None = None,
) -> PlainScratch:
    """One decode step that selects nothing; returns the scratch that it used."""
    layer, device = Layer.of(q_1HD, k_cache_GND, config), q_1HD.device
    tiles = tiles or plain_tiles(layer.group, layer.block_d, layer.dtype.itemsize)
    in_memory = isinstance(seq_len, torch.Tensor)
    plan = plan_plain(layer, tiles, num_programs(device, tiles), in_memory, *near_rows(near).values())
    scratch: PlainScratch = scratch_of(PlainScratch, ("plain", tiles, layer), plan.scratch, device)
    inputs = inputs_of(q_1HD, k_cache_GND, v_cache_GND, near, rope, seq_len, config)
    inputs |= {"out_ptr": out_1HD, "scratch": scratch, "num_positions": rope.cos_ptr.shape[0]}
    ordered = tuple(inputs[name] for name in _names(plain_kernel))
    launching.start(plain_kernel, plan.programs, device, ordered, {"c": plan.c, "num_warps": tiles.num_warps})
    return scratch


def launch_decode(
    q_1HD: torch.Tensor,
    k_cache_GND: torch.Tensor,
    v_cache_GND: torch.Tensor,
    out_1HD: torch.Tensor,
    seq_len: int | torch.Tensor,
    rope: Rope,
    config: ReAttentionConfig,
    tiles: Tiles | None = None,
    gather: Gather | None = None,
    sketch: Sketch | None = None,
    sketch_sizes: SketchTiles | None = None,
    votes: Votes | None = None,
    near: Near | None = None,
    winners: torch.Tensor | None = None,
) -> DecodeScratch:
    """One decode step that selects; returns the scratch that it used."""
    layer = Layer.of(q_1HD, k_cache_GND, config, gather)
    tiles = tiles or decode_tiles(layer.group, layer.block_d, layer.dtype.itemsize)
    if sketch is not None:
        sketch_sizes = sketch_sizes or sketch_tiles(layer.head_dim)
    in_memory, device = isinstance(seq_len, torch.Tensor), q_1HD.device
    inputs = inputs_of(q_1HD, k_cache_GND, v_cache_GND, near, rope, seq_len, config)
    counts = votes is not None

    def do(work: Work, out: torch.Tensor, gathered: torch.Tensor | None = None) -> DecodeScratch:
        looks = sketch_sizes if work.searches else None
        sizes = work, looks, *near_rows(near).values(), counts, recent_of(winners)
        plan = plan_decode(layer, tiles, num_programs(device, tiles), in_memory, *sizes)
        c, programs, workers, shapes = plan
        key = ("decode", tiles, layer, *work, looks, counts)
        scratch: DecodeScratch = scratch_of(DecodeScratch, key, shapes, device)
        given = scratch if gathered is None else scratch._replace(candidate=gathered)
        if votes is not None:
            given = given._replace(counts=votes.counts, elected=votes.elected)
        launch(
            decode_kernel,
            programs,
            device,
            **inputs,
            sketch=None if sketch is None or looks is None else sketch_rows(sketch, layer),
            out_ptr=out,
            scratch=given,
            winner_ptr=winners if work.attends else None,
            stride_counts=None if given.counts is None else given.counts.stride(0),
            workers=workers,
            num_positions=rope.cos_ptr.shape[0],
            c=c,
            num_warps=tiles.num_warps,
        )
        return scratch

    return in_parts(do, layer, layer.num_heads, out_1HD, gather)


def in_parts(do: Any, layer: Layer, num_rows: int, out: torch.Tensor, gather: Gather | None) -> Any:
    """A step as one launch, or where other ranks have heads that vote too, as two around `gather`.

    Args:
        do: (work, where its result goes, winners that it takes) -> scratch.
        num_rows: whose winners a launch leaves.
    """
    if gather is None or layer.ranks == 1:
        return do(WHOLE, out)
    winners = layer.winners(num_rows, out.device)
    do(SEARCH, winners)
    return do(ATTEND, out, gather(winners))


def launch_chunks(
    q_THD: torch.Tensor,
    k_cache_GND: torch.Tensor,
    v_cache_GND: torch.Tensor,
    out_THD: torch.Tensor,
    seq_len: int | torch.Tensor,
    rope: Rope,
    config: ReAttentionConfig,
    tiles: Tiles | None,
    chunk_size: int,
    gather: Gather | None = None,
    votes: Votes | None = None,
    near: Near | None = None,
    winners: torch.Tensor | None = None,
) -> ChunkScratch:
    """Chunks of chunk_size queries, the last of which may be shorter; returns the scratch that they used."""
    (T, H, _), N, device = q_THD.shape, k_cache_GND.shape[1], q_THD.device
    layer = Layer.of(q_THD, k_cache_GND, config, gather)
    tiles = tiles or chunk_tiles(layer.block_d, layer.dtype.itemsize)
    chunks, in_memory, carries = cdiv(T, chunk_size), isinstance(seq_len, torch.Tensor), votes is not None
    inputs = inputs_of(q_THD, k_cache_GND, v_cache_GND, near, rope, seq_len, config)

    def do(work: Work, out: torch.Tensor, gathered: torch.Tensor | None = None) -> ChunkScratch:
        sizes = num_programs(device, tiles), in_memory, chunks, chunk_size, N
        plan = plan_chunks(layer, tiles, *sizes, work, carries, near_rows(near)["NEAR_V"], recent_of(winners))
        key = ("chunks", tiles, layer, pad(chunks), pad(chunk_size), pad(N), *work, carries)
        scratch: ChunkScratch = scratch_of(ChunkScratch, key, plan.scratch, device)
        levels = plan.levels
        if votes is not None:
            scratch = scratch._replace(counts=votes.counts, num_votes=votes.num_votes)
            levels = votes.num_votes.shape[1] - 1
        launch(
            chunk_kernel,
            plan.programs,
            device,
            **inputs,
            out_ptr=out,
            scratch=scratch if gathered is None else scratch._replace(candidate=gathered),
            winner_ptr=winners if work.attends else None,
            stride_counts=scratch.counts.stride(0),
            stride_votes=scratch.num_votes.stride(0),
            T=T,
            chunks=chunks,
            chunk_size=chunk_size,
            levels=levels,
            local_rows=plan.local_rows,
            far_rows=plan.far_rows,
            c=plan.c,
            num_warps=tiles.num_warps,
        )
        return scratch

    return in_parts(do, layer, chunks * chunk_size * H, out_THD, gather)


def recent_of(winners: torch.Tensor | None) -> int:
    return 0 if winners is None else len(winners)


def count_winners(
    votes: Votes, winners_LRHK: torch.Tensor, seq_len: int | torch.Tensor, config: ReAttentionConfig
) -> None:
    """Arguments are those of `minirea.kernels.count_winners`."""
    (L, R, H, K), B, earlier = winners_LRHK.shape, len(votes.counts), config.vote_window - 1
    num_winners = L * earlier * (H // B) * K
    if not num_winners:
        return
    by_level = not fits_registers(H // B, K) or config.max_spans > MAX_ELECTED
    in_memory = isinstance(seq_len, torch.Tensor)
    c = CountSizes(B, H // B * K, earlier, R, config.vote_size, in_memory, by_level)
    tensors = winners_LRHK, votes.counts, votes.elected, votes.voted, votes.num_votes
    strides = (tensor.stride(0) for tensor in tensors[1:])
    sizes = config.global_size, config.local_size, config.max_spans, num_winners, votes.num_votes.shape[1] - 1
    bits = votes.counts.shape[1].bit_length(), num_winners.bit_length()
    programs = B * min(MAX_COUNTING, cdiv(num_winners, c.BLOCK))
    arguments = *tensors, *strides, seq_len, *sizes, *bits
    launching.start(count_kernel, programs, votes.counts.device, arguments, {"c": c, "num_warps": 4})


def sketch_rows(sketch: Sketch, layer: Layer) -> SketchRows:
    signs = _signs(layer.block_d, sketch.codes.shape[2], layer.dtype, sketch.codes.device)
    return SketchRows(sketch.codes, sketch.scales, sketch.mean, signs, sketch.codes.stride(0))


@functools.cache
def _signs(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    signs = hadamard(rows, columns, device).to(dtype)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other streams will read them
    return signs


def sketch_keys(k_cache_GND: torch.Tensor, sketch: Sketch, first: int, last: int) -> None:
    """Write the sketches of keys [first, last), on the current stream."""
    config = ReAttentionConfig()
    layer = Layer(len(k_cache_GND), len(k_cache_GND), k_cache_GND.shape[2], k_cache_GND.dtype, config)
    tiles = decode_tiles(layer.group, layer.block_d, layer.dtype.itemsize)
    c = SketchSizes(tiles, **layer.constants(False, WHOLE), SLICES=1, WHOLE_TILES=False)
    programs = c.G * cdiv(last - first, c.SKETCHED)
    arguments = (Heads(k_cache_GND, *k_cache_GND.stride()), sketch_rows(sketch, layer), first, last)
    launching.start(sketch_kernel, programs, k_cache_GND.device, arguments, {"c": c, "num_warps": tiles.num_warps})


def inputs_of(
    q_THD: torch.Tensor,
    k_cache_GND: torch.Tensor,
    v_cache_GND: torch.Tensor,
    near: Near | None,
    rope: Rope,
    seq_len: int | torch.Tensor,
    config: ReAttentionConfig,
) -> dict[str, Any]:
    """What both kernels are given, by the names that they have for it."""
    stride_t, stride_h, stride_d = q_THD.stride()
    k, v = (Heads(cache, *cache.stride()) for cache in (k_cache_GND, v_cache_GND))
    # The numbers of a config that kernels are not compiled for.
    names = ("global_size", "local_size", "dense_size", "span_size", "max_spans", "max_scope")
    varying = {name: getattr(config, name) for name in names}
    q = Heads(q_THD, stride_h, stride_t, stride_d)
    return {"q": q, "k": k, "v": v, "near": near, "rope": rope, "seq_len": seq_len, **varying}


@functools.cache
def _names(kernel: Any) -> tuple[str, ...]:
    """A kernel's arguments at run time, in order."""
    return tuple(name for name in inspect.signature(kernel.fn).parameters if name != "c")


def launch(kernel: Any, programs: int, device: torch.device, c: Any, num_warps: int, **arguments: Any) -> None:
    """Launch cooperatively, with arguments by name. Raises InputError where the GPU cannot run all programs at once."""
    ordered = (arguments[name] for name in _names(kernel))
    launch_cooperatively(kernel, programs, device, *ordered, c=c, num_warps=num_warps)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def num_programs(device: torch.device, tiles: Tiles) -> int:
    """As many as the device runs at once."""
    return 1 if INTERPRETED else _processors(device) * tiles.programs_per_sm


_workspaces: dict[tuple[object, ...], Any] = {}


def scratch_of(kind: Any, key: tuple[object, ...], shapes: Shapes, device: torch.device) -> Any:
    """Scratch memory, allocated once per kind of launch, device and stream and kept; what is PASSING, once per size.

    Captured CUDA graphs hold its addresses, so it is never freed. Streams have their own, since two launches that run
    at once must not share counters.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (*key, device, stream)
    if key not in _workspaces:
        tensors = {}
        for name, size in shapes.items():
            own = (name, size, device, stream) if name in PASSING else (name, *key)
            if own not in _workspaces:
                _workspaces[own] = torch.zeros(size[1], dtype=size[0], device=device)
            tensors[name] = _workspaces[own]
        _workspaces[key] = kind(**tensors)
    return _workspaces[key]


def scopes_of(scratch: PlainScratch | DecodeScratch | ChunkScratch, seq_len: int, layer: Layer) -> list[torch.Tensor]:
    """The scope of each ballot: what the kernel wrote for the far rows, if it selects, then the local part."""
    config, device = layer.config, scratch.counters.device
    if seq_len <= config.dense_size:
        return [torch.arange(seq_len, device=device)] * layer.ballots
    local = torch.arange(seq_len - min(seq_len, config.local_size), seq_len, device=device)
    if isinstance(scratch, PlainScratch) or not layer.selects:
        return [torch.cat([torch.arange(config.global_size, device=device), local])] * layer.ballots
    far = scratch.num_far.tolist()
    return [torch.cat([positions[:rows], local]) for positions, rows in zip(scratch.selection, far, strict=True)]


def scratch_bytes(
    layer: Layer,
    capacity: int,
    steps: Iterable[tuple[int, int]],
    device: torch.device,
    sketched: bool = False,
    carries: bool = False,
) -> int:
    """Bytes of scratch that steps keep on one stream; see `minirea.kernels`."""
    lengths = [(T, chunk_size) for longest, chunk_size in steps for T in range(1, longest + 1)]
    scratches = []
    works = (WHOLE,) if layer.ranks == 1 else (SEARCH, ATTEND)
    in_decode = [layer.counts() if carries else layer.decodes(T) for T, _ in lengths]
    if any(T == 1 for T, _ in lengths):
        tiles = plain_tiles(layer.group, layer.block_d, layer.dtype.itemsize)
        scratches.append(plan_plain(layer, tiles, num_programs(device, tiles), True).scratch)
    if any(in_decode):
        tiles = decode_tiles(layer.group, layer.block_d, layer.dtype.itemsize)
        programs = num_programs(device, tiles)
        plans = [plan_decode(layer, tiles, programs, True, work, counts=carries) for work in works]
        if sketched:  # beside the layers that have no sketch
            plans.append(plan_decode(layer, tiles, programs, True, works[0], sketch_tiles(layer.head_dim)))
        scratches += [plan.scratch for plan in plans]
    tiles = chunk_tiles(layer.block_d, layer.dtype.itemsize)
    launches = {
        (pad(cdiv(stop - start, size)), pad(size))
        for (T, chunk_size), decodes in zip(lengths, in_decode, strict=True)
        if not (decodes or layer.is_plain(T))
        for start, stop, size in cut(T, chunk_size, layer.dtype)
    }
    for chunks, chunk_size in launches:
        sizes = chunks, chunk_size, capacity
        programs = num_programs(device, tiles)
        scratches += [plan_chunks(layer, tiles, programs, True, *sizes, work, carries).scratch for work in works]
    own = [size for scratch in scratches for name, size in scratch.items() if name not in PASSING]
    shared = {(name, size) for scratch in scratches for name, size in scratch.items() if name in PASSING}
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in [*own, *(size for _, size in shared)])
