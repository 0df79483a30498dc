"""What the kernels are given: tensors with their strides, scratch memory, and everything known when they are compiled.

A NamedTuple of pointers and strides is one argument of a kernel; Triton specializes each member as if it stood alone.
A frozen dataclass is one `tl.constexpr`, here always called `c`; what follows from its fields is a property, computed
by Python at compile time. Numbers that change from step to step are members of neither, since `do_not_specialize`
does not reach into a tuple.

Letters, besides the project's: M, N tiles of rows and keys; R rows of one key/value head (row r is query
r // (H / G)); K winners per row; P spans. A *ballot* is the set of rows that vote together, and what they elect is one
selection: a chunk has one ballot, or with span_scope "kv_head" one for each key/value head. Names in capitals ending in
_PAD are the next powers of two, with the surplus masked.
"""

# ruff: noqa: N802  (constants of a kernel, some of which are computed)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from minirea.kernels.launching import next_power_of_2 as pad
from minirea.kernels.sketch import query_error, sum_error, width
from minirea.kernels.votes import elected_size

# Arguments that change from model to model or from step to step; without this every other value compiles anew.
VARYING: Final = (
    *("seq_len", "global_size", "local_size", "dense_size", "span_size", "max_spans", "max_scope", "num_positions"),
)

# Packed candidates, and elements of partial results, that one program holds in registers at a time.
MAX_CANDIDATES: Final = 8192
MAX_PARTIALS: Final = 16384
# Winners whose votes a decode step counts at a time; with twice as many, and as many elected, registers would spill.
ROUND_WINNERS: Final = 32


class Heads(NamedTuple):
    """Vectors by head and token: queries, or cached keys or values."""

    ptr: Any
    stride_h: Any
    stride_n: Any
    stride_d: Any


class SketchRows(NamedTuple):
    """Sketches by head and token: minirea.kernels.sketch says what they are. A head's lie side by side.

    The stride is that of the codes, a multiple of C, so that caches of all lengths have one kernel.
    """

    codes_ptr: Any  # int8 [C] each
    scales_ptr: Any  # int32
    mean_ptr: Any  # float32 [G, C]
    signs_ptr: Any  # of the rotation, 1 and -1 in the keys' dtype, [BLOCK_D, C]
    stride_h: Any  # C times tokens


class Rope(NamedTuple):
    """Tables of RoPE, float32 [positions, D / 2]."""

    cos_ptr: Any
    sin_ptr: Any


class Softmax(NamedTuple):
    """State of the online softmax of M rows: sums of values and of weights relative to the maximum so far."""

    acc: Any  # float32 [M, BLOCK_D]
    row_max: Any  # float32 [M], in units of log2
    row_sum: Any  # float32 [M], or [M, N] where columns are added up at the end


class DecodeScratch(NamedTuple):
    """Memory of a decode step."""

    counters: Any  # int64 [2 + G], with a sketch [2 + 2 G]; see minirea.kernels.fused.decode
    block: Any  # float32 [programs, M, K_PAD, N]
    tag: Any  # int32 [programs, M, K_PAD]
    candidate: Any  # int64 [H, SLICES, K_PAD]
    kept: Any  # int32 [ballots, KEPT_PAD]
    num_kept: Any  # int32 [ballots]
    partial_acc: Any  # float32 [H, SLICES, D]
    partial_max: Any  # float32 [H, SLICES]
    partial_sum: Any  # float32 [H, SLICES]
    selection: Any  # int64 [ballots, max_scope]
    num_far: Any  # int32 [ballots]
    # With a sketch:
    upper: Any = None  # float32 [programs, GROUP, ROOM, SKETCH_N]: upper bounds in the kept tiles
    tile: Any = None  # int32 [programs, GROUP, ROOM]
    tile_upper: Any = None  # float32 [programs, GROUP, ROOM]: the largest of each tile
    live: Any = None  # int32 [programs, GROUP, ROOM]: which of the kept tiles the threshold leaves
    threshold: Any = None  # float32 [programs, P]
    survivor: Any = None  # int32 [programs, 2, SURVIVORS]: positions and rows
    lower: Any = None  # float32 [H, SLICES, K_PAD]: the best lower bounds of each slice
    found: Any = None  # int32 [G, SLICES]: survivors; more than SURVIVORS where all keys were scored
    # Where votes are counted in memory, the caller's:
    counts: Any = None  # int32 [ballots, N]: votes of each position
    elected: Any = None  # int32 [ballots, P_PAD]: positions with most votes, see `add_votes`


class PlainScratch(NamedTuple):
    """Memory of a decode step that selects nothing, as in DecodeScratch."""

    counters: Any
    partial_acc: Any
    partial_max: Any
    partial_sum: Any


class ChunkScratch(NamedTuple):
    """Memory of the chunks of a launch; chunks have R rows of each key/value head."""

    counters: Any  # int64 [1]: of the barrier
    block: Any  # float32 [programs, M, K_PAD, N]
    tag: Any  # int32 [programs, M, K_PAD]
    candidate: Any  # int64 [chunks * G * R, SLICES * K_PAD]
    counts: Any  # int32 [ballots, N]: votes of each position
    num_votes: Any  # int32 [ballots, levels + 1]: positions that have at least so many votes
    tally: Any  # int32 [ballots, programs, 2]
    kept: Any  # int32 [ballots, P_PAD]
    num_kept: Any  # int32 [ballots]
    q_rot: Any  # [chunks * G * R, D]
    k_rot: Any  # [G * local_rows + chunks * G * far_rows, D]
    v_far: Any  # [chunks, G, far_rows, D]
    selection: Any  # int64 [ballots, max_scope]
    num_far: Any  # int32 [ballots]


class Tiles(NamedTuple):
    """Tile sizes and launch parameters of one variant; BLOCK_N and BLOCK_A count keys, BLOCK_M query rows."""

    BLOCK_M: int
    BLOCK_N: int  # while scoring
    BLOCK_A: int  # while attending
    num_warps: int
    num_stages: int
    programs_per_sm: int


class SketchTiles(NamedTuple):
    """Sizes for decoding with a sketch."""

    BLOCK_N: int  # keys of a tile
    ROOM: int  # tiles that are kept for a row of a slice
    SURVIVORS: int  # of a slice, of all rows together
    LEAST: int  # keys of a slice; shorter ones are scored without the sketch, unless keys are far
    num_stages: int
    LIVE_M: int = 8  # kept tiles whose bounds a program holds in registers


@dataclass(frozen=True)
class Sizes:
    """What both kernels are compiled for."""

    tiles: Tiles
    G: int
    GROUP: int  # query heads of one key/value head
    D: int
    K: int
    BY_HEAD: bool  # one ballot for each key/value head
    VOTE_SIZE: int  # neighbouring keys that are one to the vote
    SELECTS: bool
    RELATIVE: bool  # RoPE by distances inside a tile or a launch; else by true positions inside the scope
    SEQ_LEN_IN_MEMORY: bool
    PRECISION: str  # of float32 products
    SLICES: int  # parts of the middle
    WHOLE_TILES: bool  # so many cached keys follow the middle that none of its tiles reaches beyond them
    # A launch of both does a whole step. Where other processes have heads that vote too, one launch searches and leaves
    # its winners, int32 [rows, K_PAD], where a whole step leaves its output; when those of all heads are gathered, in
    # the place of its candidates, another one attends.
    SEARCHES: bool  # steps 3 and 4
    ATTENDS: bool  # steps 5 to 8
    RANKS: int  # processes with so many heads each
    RECENT: int  # tokens that there is room for to leave winners of, 0 to leave none

    @property
    def BLOCK_M(self) -> int:
        return self.tiles.BLOCK_M

    @property
    def BLOCK_N(self) -> int:
        return self.tiles.BLOCK_N

    @property
    def BLOCK_A(self) -> int:
        return self.tiles.BLOCK_A

    @property
    def STAGES(self) -> int:
        return self.tiles.num_stages

    @property
    def K_PAD(self) -> int:
        return pad(self.K)

    @property
    def BLOCK_D(self) -> int:
        return max(16, pad(self.D))

    @property
    def HALF_PAD(self) -> int:
        return max(16, pad(self.D // 2))

    @property
    def SCALE(self) -> float:
        return self.D**-0.5

    @property
    def CANDIDATES(self) -> int:
        """Packed numbers of a row, of all slices, or its winners where the launch only attends."""
        return (self.SLICES if self.SEARCHES else 1) * self.K_PAD

    @property
    def CANDIDATES_PAD(self) -> int:
        return pad(self.CANDIDATES)

    @property
    def VOTING_HEADS(self) -> int:
        """Key/value heads, of all ranks."""
        return self.RANKS * self.G

    @property
    def BALLOTS(self) -> int:
        """Of one step or chunk."""
        return self.G if self.BY_HEAD else 1

    @property
    def SKETCH_D(self) -> int:
        """Elements of a sketch, C."""
        return width(self.D)

    @property
    def ROTATION(self) -> float:
        """What makes an orthonormal matrix of one of 1 and -1."""
        return float(self.SKETCH_D**-0.5)

    @property
    def QUERY_ERROR(self) -> float:
        return query_error(self.D)

    @property
    def SUM_ERROR(self) -> float:
        return sum_error(self.D)


@dataclass(frozen=True)
class DecodeSizes(Sizes):
    """What the decode kernel is compiled for, and the plain kernel."""

    VOTES: bool  # whether there may be more winners than are kept
    ALONE: bool  # one program does everything
    sketch: SketchTiles | None = None
    NEAR_K: int = 0  # rows of the near keys, 0 where the cache itself is near
    NEAR_V: int = 0  # of the near values
    COUNTS: bool = False  # votes are counted in memory, the caller's, and add up from launch to launch
    MAX_SPANS: int = 0  # with COUNTS, to lay out lists

    @property
    def SKETCH(self) -> bool:
        return self.sketch is not None

    @property
    def _sketch(self) -> SketchTiles:
        assert self.sketch is not None
        return self.sketch

    @property
    def SKETCH_M(self) -> int:
        """Query heads of a key/value head, P: the matrix unit takes 16 rows, and each head has two."""
        return max(8, pad(self.GROUP))

    @property
    def SKETCH_N(self) -> int:
        return self._sketch.BLOCK_N

    @property
    def SKETCH_STAGES(self) -> int:
        return self._sketch.num_stages

    @property
    def ROOM(self) -> int:
        return self._sketch.ROOM

    @property
    def SURVIVORS(self) -> int:
        return self._sketch.SURVIVORS

    @property
    def LEAST(self) -> int:
        return 1 if self.NEAR_K else self._sketch.LEAST

    @property
    def LIVE_M(self) -> int:
        return self._sketch.LIVE_M

    @property
    def BALLOT_ROWS(self) -> int:
        return self.GROUP if self.BY_HEAD else self.VOTING_HEADS * self.GROUP

    @property
    def SORTS(self) -> int:
        """How often a step's winners are sorted: a whole step begins with those of the one before."""
        return 2 if self.SEARCHES else 1

    @property
    def BALLOT_ROWS_PAD(self) -> int:
        return pad(self.BALLOT_ROWS)

    @property
    def W_PAD(self) -> int:
        """Winners of a ballot."""
        return self.BALLOT_ROWS_PAD * self.K_PAD

    @property
    def P_PAD(self) -> int:
        return elected_size(self.MAX_SPANS)

    @property
    def KEPT_PAD(self) -> int:
        """Positions that a ballot can keep."""
        return self.P_PAD if self.COUNTS else self.W_PAD

    @property
    def ROUND_PAD(self) -> int:
        """Winners that vote in a round: every one is compared with every other, and with all that are elected."""
        return max(self.P_PAD, self.K_PAD, min(ROUND_WINNERS, self.W_PAD))

    @property
    def ROUND_ROWS(self) -> int:
        return self.ROUND_PAD // self.K_PAD

    @property
    def ROUNDS(self) -> int:
        return -(-self.BALLOT_ROWS // self.ROUND_ROWS)

    @property
    def SLICES_PAD(self) -> int:
        return pad(self.SLICES)

    @property
    def PICK_M(self) -> int:
        """Rows that `pick` reduces at a time: one for each warp."""
        return max(1, min(self.BLOCK_M, self.tiles.num_warps, MAX_CANDIDATES // (self.K_PAD * self.BLOCK_N)))

    @property
    def COMBINE_HEADS(self) -> int:
        """Query heads that `combine` joins at a time."""
        most = MAX_PARTIALS // (self.SLICES_PAD * self.BLOCK_D)
        return max(1, min(max(pad(self.GROUP), self.tiles.num_warps), most))


@dataclass(frozen=True)
class CountSizes:
    """What the kernel that counts the votes of earlier tokens is compiled for."""

    BALLOTS: int
    OF_TOKEN: int  # winners of a token in a layer, of one ballot
    EARLIER: int  # tokens
    RECENT: int  # tokens that winners are kept of
    VOTE_SIZE: int
    SEQ_LEN_IN_MEMORY: bool
    BY_LEVEL: bool  # for the chunk kernel; else there is a list of the positions with most votes
    BLOCK: int = 256  # winners that are counted at a time
    BLOCK_V: int = 1024  # positions with votes that are compared at a time


@dataclass(frozen=True)
class SketchSizes(Sizes):
    """What the kernel that makes sketches is compiled for."""

    SKETCHED: int = 64  # keys of a program


@dataclass(frozen=True)
class ChunkSizes(Sizes):
    """What the chunk kernel is compiled for."""

    P_PAD: int
    PROGRAMS_PAD: int
    CARRIES: bool  # votes are the caller's, and add up from launch to launch
    NEAR_V: int = 0  # rows of the near values, 0 where the cache itself is near
    BLOCK_R: int = 64  # rows of the scope that are gathered at a time
    BLOCK_C: int = 1024  # counts that are read at a time

    @property
    def COUNT_ROWS(self) -> int:
        """Rows whose candidates are merged, or votes counted, at a time."""
        return max(1, min(128, MAX_CANDIDATES // self.CANDIDATES))

    @property
    def PICK_M(self) -> int:
        """Rows that `pick` reduces at a time."""
        return max(1, min(self.BLOCK_M, MAX_CANDIDATES // (self.K_PAD * self.BLOCK_N)))
