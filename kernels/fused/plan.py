"""How a step is launched: tile sizes, how work is divided among programs, and which scratch memory that takes."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

import torch
import triton

from minirea.config import ReAttentionConfig
from minirea.errors import InputError
from minirea.kernels import Gather
from minirea.kernels.fused.arguments import (
    MAX_CANDIDATES,
    MAX_PARTIALS,
    ChunkSizes,
    DecodeSizes,
    SketchTiles,
    Tiles,
)
from minirea.kernels.launching import cdiv
from minirea.kernels.launching import next_power_of_2 as pad
from minirea.kernels.sketch import width
from minirea.kernels.votes import voting_ranks

# Under TRITON_INTERPRET=1 programs run one after another, so there may be only one: a second could never arrive.
INTERPRETED: Final = triton.knobs.runtime.interpret
# The most winners of a ballot that a decode step may hold in registers, where every one is compared with every other:
# with twice as many a comparison takes 256 registers of every thread, and Triton 3.6 spills them all.
MAX_WINNERS_IN_REGISTERS: Final = 128
# The most positions that a decode step counts votes for and keeps: it compares every one with every other as well.
MAX_ELECTED: Final = 64
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


def decode_tiles(layer: Layer) -> Tiles:
    """A key tile of 32 KiB, three of which are in flight while one is used; the matrix unit takes 16 rows."""
    block_m, block_n = max(16, pad(layer.group)), max(16, min(128, 32768 // (layer.block_d * layer.dtype.itemsize)))
    return Tiles(block_m, block_n, max(16, block_n // 2), num_warps=8, num_stages=3, programs_per_sm=1)


def plain_tiles(layer: Layer) -> Tiles:
    """Two tiles at a time in registers, of which float32 takes twice as many; for small heads two programs that a
    multiprocessor runs, with a tile each, are faster than one with two.
    """
    rows = max(16, pad(layer.group))
    if layer.dtype.itemsize == 4:
        return Tiles(rows, 16, 16, num_warps=8, num_stages=1, programs_per_sm=1)
    if layer.block_d < 128:
        return Tiles(rows, 32, 32, num_warps=4, num_stages=1, programs_per_sm=2)
    block = max(16, 8192 // layer.block_d)
    return Tiles(rows, block, block, num_warps=8, num_stages=1, programs_per_sm=1)


def sketch_tiles(head_dim: int) -> SketchTiles:
    """A tile of 32 KiB as in `decode_tiles`. Room for several times what real keys need; see kernels/NOTEBOOK.md."""
    block_n = max(32, min(256, 32768 // width(head_dim)))
    return SketchTiles(block_n, ROOM=128, SURVIVORS=512, LEAST=8 * block_n, num_stages=3)


def chunk_tiles(layer: Layer) -> Tiles:
    """Tiles for the tensor cores in half precision; in float32, whose products are not theirs, tiles that fit."""
    if layer.dtype.itemsize == 4:
        return Tiles(32, 32, 32, num_warps=4, num_stages=1, programs_per_sm=1)
    block = 128 if layer.block_d <= 128 else 64
    return Tiles(block, block, 64, num_warps=8, num_stages=3, programs_per_sm=1)


class Work(NamedTuple):
    """What of a step a launch does; see Sizes."""

    searches: bool = True
    attends: bool = True


WHOLE: Final = Work()
SEARCH: Final = Work(attends=False)
ATTEND: Final = Work(searches=False)
# Scratch that only a launch touches which searches.
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
        ranks = 1 if gather is None else voting_ranks(config, gather.ranks)
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

    @property
    def voters(self) -> int:
        """Query heads of a ballot."""
        return self.group if self.by_head else self.num_heads * self.ranks

    def decodes(self, num_queries: int) -> bool:
        """Whether a step takes the decode kernel."""
        return num_queries == 1 and self.selects and fits_registers(self.voters, self.config.span_top_k)

    def is_plain(self, num_queries: int) -> bool:
        """Whether a step takes the plain kernel."""
        return num_queries == 1 and not self.selects

    def counts(self) -> bool:
        """Whether a step of one query with votes takes the decode kernel."""
        return self.decodes(1) and self.config.max_spans <= MAX_ELECTED

    def check_sketched(self) -> None:
        """Raises InputError where one query has no decode kernel, which is the one that reads sketches."""
        if not self.decodes(1):
            raise InputError(
                f"{self.voters} heads vote with {self.config.span_top_k} winners each, expected at most "
                f"{MAX_WINNERS_IN_REGISTERS} winners with sketches (both numbers count as the next power of two); "
                "lower span_top_k or use span_scope kv_head"
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
        **partial_shapes(H, slices, D),
    }
    return PlainPlan(c, G * slices, shapes)


def partial_shapes(num_heads: int, slices: int, head_dim: int) -> Shapes:
    """Of what slices leave and `combine` joins, in both kernels of a decode step."""
    return {
        "partial_acc": (torch.float32, (num_heads, slices, head_dim)),
        "partial_max": (torch.float32, (num_heads, slices)),
        "partial_sum": (torch.float32, (num_heads, slices)),
    }


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
        **partial_shapes(H, slices, D),
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
    tiles = chunk_tiles(layer)
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


def cut(num_queries: int, chunk_size: int, dtype: torch.dtype) -> Iterator[tuple[int, int, int]]:
    """The launches of a step that takes the chunk kernel: first query, last one + 1, and queries of a chunk.

    In float32 the tables' rounding would show if chunks shared positions: there each is a launch.
    """
    together = chunk_size * (MAX_CHUNKS if dtype != torch.float32 else 1)
    for start in range(0, num_queries, together):
        stop = min(start + together, num_queries)
        yield start, stop, min(chunk_size, stop - start)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def num_programs(device: torch.device, tiles: Tiles) -> int:
    """As many as the device runs at once."""
    return 1 if INTERPRETED else _processors(device) * tiles.programs_per_sm


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
        tiles = plain_tiles(layer)
        scratches.append(plan_plain(layer, tiles, num_programs(device, tiles), True).scratch)
    if any(in_decode):
        tiles = decode_tiles(layer)
        programs = num_programs(device, tiles)
        plans = [plan_decode(layer, tiles, programs, True, work, counts=carries) for work in works]
        if sketched:  # besides the layers that have no sketch
            plans.append(plan_decode(layer, tiles, programs, True, works[0], sketch_tiles(layer.head_dim)))
        scratches += [plan.scratch for plan in plans]
    tiles = chunk_tiles(layer)
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
