"""From the arguments of a call to launches: inputs by the kernels' names, scratch memory, and launches of a step."""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any, Final, NamedTuple

import torch

from minirea.config import ReAttentionConfig
from minirea.errors import InputError
from minirea.kernels import Gather, driver, launching
from minirea.kernels.fused import plan
from minirea.kernels.fused.arguments import (
    ChunkScratch,
    CountSizes,
    DecodeScratch,
    Heads,
    PlainScratch,
    Rope,
    SketchRows,
    SketchSizes,
)
from minirea.kernels.fused.chunks import chunk_kernel
from minirea.kernels.fused.decode import decode_kernel
from minirea.kernels.fused.plain import plain_kernel
from minirea.kernels.fused.plan import ATTEND, MAX_ELECTED, PASSING, SEARCH, WHOLE, Layer, Shapes, Work
from minirea.kernels.fused.recent import count_kernel
from minirea.kernels.fused.sketch import sketch_kernel
from minirea.kernels.launching import cdiv, launch_cooperatively
from minirea.kernels.launching import next_power_of_2 as pad
from minirea.kernels.near import Near, near_rows
from minirea.kernels.sketch import Sketch, hadamard
from minirea.kernels.votes import Votes
from minirea.threads import enqueueing

# Which of two kernels that share functions Triton 3.6 hashes first decides under which names it keeps them on the disk.
# Threads that compile would leave that to chance, and compile again in the next process.
if not plan.INTERPRETED:
    for kernel in (decode_kernel, chunk_kernel, count_kernel, plain_kernel):
        hash(kernel)
EARLY_HEAD_DIM: Final = 128  # of attention that is faster if it starts early; smaller heads' programs come in twos
MAX_COUNTING: Final = 64  # programs of a ballot that count winners of earlier tokens


class Inputs(NamedTuple):
    """A step as `minirea.kernels.reattention` is given it, and where its output goes."""

    q: torch.Tensor  # [T, H, D]
    k_cache: torch.Tensor  # [G, N, D]
    v_cache: torch.Tensor
    out: torch.Tensor  # like q
    seq_len: int | torch.Tensor
    rope: Rope
    config: ReAttentionConfig
    gather: Gather | None = None
    sketch: Sketch | None = None
    votes: Votes | None = None
    near: Near | None = None
    winners: torch.Tensor | None = None
    starts_early: bool = False

    @property
    def layer(self) -> Layer:
        return Layer.of(self.q, self.k_cache, self.config, self.gather)

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def seq_len_in_memory(self) -> bool:
        return isinstance(self.seq_len, torch.Tensor)

    @property
    def recent(self) -> int:
        """Tokens that there is room for to leave winners of."""
        return 0 if self.winners is None else len(self.winners)

    def arguments(self) -> dict[str, Any]:
        """What all kernels of a step are given, by the names that they have for it."""
        stride_t, stride_h, stride_d = self.q.stride()
        q = Heads(self.q, stride_h, stride_t, stride_d)
        k, v = (Heads(cache, *cache.stride()) for cache in (self.k_cache, self.v_cache))
        # The numbers of a config that kernels are not compiled for.
        names = ("global_size", "local_size", "dense_size", "span_size", "max_spans", "max_scope")
        varying = {name: getattr(self.config, name) for name in names}
        return {"q": q, "k": k, "v": v, "near": self.near, "rope": self.rope, "seq_len": self.seq_len, **varying}


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
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | list[torch.Tensor] | None]:
    """Arguments and results are those of `minirea.kernels.reattention`, `options` those of Inputs. A token or a chunk
    is one launch, and in half precision up to MAX_CHUNKS chunks are; where heads elsewhere vote too, it is two, with
    `gather` between them. A token that selects nothing takes the plain kernel, one that does the decode kernel, all
    others the chunk kernel.

    Only return_selection waits for the GPU: the scope's length decides the shape of the result.

    Raises:
        InputError: head_dim beyond 256, or a GPU or Triton without cooperative launches.
    """
    T, D = len(q_THD), q_THD.shape[2]
    if not (q_THD.is_cuda or plan.INTERPRETED):
        raise InputError(f"the tensors are on {q_THD.device}, expected a CUDA device for impl 'triton'")
    if D > 256:
        raise InputError(f"head_dim is {D}, expected at most 256 with impl 'triton'; impl 'torch' takes any")
    rope = Rope(cos.contiguous(), sin.contiguous())
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    inputs = Inputs(q_THD, k_cache_GND, v_cache_GND, out_THD, seq_len, rope, config, **options)
    # A workspace belongs to the current stream of the tensors' device. Threads that share a stream take turns, so that
    # none finds what another's launch has left there; ranks wait for each other in `gather`.
    with (
        torch.cuda.device(q_THD.device) if q_THD.is_cuda else contextlib.nullcontext(),
        contextlib.nullcontext() if driver.is_compiling() or inputs.gather is not None else enqueueing,
    ):
        scratch = launch_step(inputs, chunk_size or T)
        if not return_selection:
            return out_THD, None
        scopes = scopes_of(scratch, int(seq_len), inputs.layer)
    return out_THD, scopes if config.span_scope == "kv_head" else scopes[0]


def launch_step(inputs: Inputs, chunk_size: int) -> PlainScratch | DecodeScratch | ChunkScratch:
    """The launches of a step; returns the scratch of the last."""
    layer, seq_len, dtype, T = inputs.layer, inputs.seq_len, inputs.q.dtype, len(inputs.q)
    if inputs.sketch is not None and T == 1:
        layer.check_sketched()
    if layer.is_plain(T):
        return launch_plain(inputs)
    if layer.decodes(T) if inputs.votes is None else layer.counts():
        return launch_decode(inputs)
    for start, stop, size in plan.cut(T, chunk_size, dtype):
        n = seq_len - (T - stop) if stop < T else seq_len
        scratch = launch_chunks(inputs._replace(q=inputs.q[start:stop], out=inputs.out[start:stop], seq_len=n), size)
    return scratch


def launch_plain(inputs: Inputs) -> PlainScratch:
    """One decode step that selects nothing; returns the scratch that it used."""
    layer, device = inputs.layer, inputs.device
    tiles = plan.plain_tiles(layer)
    sizes = plan.num_programs(device, tiles), inputs.seq_len_in_memory, *near_rows(inputs.near).values()
    c, programs, shapes = plan.plan_plain(layer, tiles, *sizes)
    scratch: PlainScratch = scratch_of(PlainScratch, ("plain", tiles, layer), shapes, device)
    given = inputs.arguments()
    given |= {"out_ptr": inputs.out, "scratch": scratch, "num_positions": inputs.rope.cos_ptr.shape[0]}
    ordered = tuple(given[name] for name in _names(plain_kernel))
    can_start = launching.starts_early(device)
    early = can_start and inputs.starts_early and layer.block_d >= EARLY_HEAD_DIM
    constants = {"c": c, "num_warps": tiles.num_warps, "NEXT_STARTS": can_start, "EARLY": early, "launch_pdl": early}
    launching.start(plain_kernel, programs, device, ordered, constants)
    return scratch


def launch_decode(inputs: Inputs) -> DecodeScratch:
    """One decode step that selects; returns the scratch that it used."""
    layer, device, sketch, votes = inputs.layer, inputs.device, inputs.sketch, inputs.votes
    tiles = plan.decode_tiles(layer)
    sketch_sizes = None if sketch is None else plan.sketch_tiles(layer.head_dim)
    given, counts = inputs.arguments(), votes is not None

    def do(work: Work, out: torch.Tensor, gathered: torch.Tensor | None = None) -> DecodeScratch:
        looks = sketch_sizes if work.searches else None
        near = near_rows(inputs.near).values()
        sizes = plan.num_programs(device, tiles), inputs.seq_len_in_memory, work, looks, *near, counts, inputs.recent
        c, programs, workers, shapes = plan.plan_decode(layer, tiles, *sizes)
        key = ("decode", tiles, layer, *work, looks, counts)
        scratch: DecodeScratch = scratch_of(DecodeScratch, key, shapes, device)
        used = scratch if gathered is None else scratch._replace(candidate=gathered)
        if votes is not None:
            used = used._replace(counts=votes.counts, elected=votes.elected)
        launch(
            decode_kernel,
            programs,
            device,
            **given,
            sketch=None if sketch is None or looks is None else sketch_rows(sketch, layer),
            out_ptr=out,
            scratch=used,
            winner_ptr=inputs.winners if work.attends else None,
            stride_counts=None if used.counts is None else used.counts.stride(0),
            workers=workers,
            num_positions=inputs.rope.cos_ptr.shape[0],
            c=c,
            num_warps=tiles.num_warps,
        )
        return scratch

    return in_parts(do, inputs, layer, layer.num_heads)


def in_parts(do: Any, inputs: Inputs, layer: Layer, num_rows: int) -> Any:
    """A step as one launch, or where other ranks have heads that vote too, as two around `gather`.

    Args:
        do: (work, where its result goes, winners that it takes) -> scratch.
        num_rows: whose winners a launch leaves.
    """
    if inputs.gather is None or layer.ranks == 1:
        return do(WHOLE, inputs.out)
    winners = layer.winners(num_rows, inputs.device)
    do(SEARCH, winners)
    return do(ATTEND, inputs.out, inputs.gather(winners))


def launch_chunks(inputs: Inputs, chunk_size: int) -> ChunkScratch:
    """Chunks of chunk_size queries, the last of which may be shorter; returns the scratch that they used."""
    (T, H, _), N, device = inputs.q.shape, inputs.k_cache.shape[1], inputs.device
    layer, votes = inputs.layer, inputs.votes
    tiles = plan.chunk_tiles(layer)
    chunks, carries, given = cdiv(T, chunk_size), votes is not None, inputs.arguments()

    def do(work: Work, out: torch.Tensor, gathered: torch.Tensor | None = None) -> ChunkScratch:
        sizes = plan.num_programs(device, tiles), inputs.seq_len_in_memory, chunks, chunk_size, N
        options = work, carries, near_rows(inputs.near)["NEAR_V"], inputs.recent
        c, programs, levels, local_rows, far_rows, shapes = plan.plan_chunks(layer, tiles, *sizes, *options)
        key = ("chunks", tiles, layer, pad(chunks), pad(chunk_size), pad(N), *work, carries)
        scratch: ChunkScratch = scratch_of(ChunkScratch, key, shapes, device)
        if votes is not None:
            scratch = scratch._replace(counts=votes.counts, num_votes=votes.num_votes)
            levels = votes.num_votes.shape[1] - 1
        launch(
            chunk_kernel,
            programs,
            device,
            **given,
            out_ptr=out,
            scratch=scratch if gathered is None else scratch._replace(candidate=gathered),
            winner_ptr=inputs.winners if work.attends else None,
            stride_counts=scratch.counts.stride(0),
            stride_votes=scratch.num_votes.stride(0),
            T=T,
            chunks=chunks,
            chunk_size=chunk_size,
            levels=levels,
            local_rows=local_rows,
            far_rows=far_rows,
            c=c,
            num_warps=tiles.num_warps,
        )
        return scratch

    return in_parts(do, inputs, layer, chunks * chunk_size * H)


def count_winners(
    votes: Votes, winners_LRHK: torch.Tensor, seq_len: int | torch.Tensor, config: ReAttentionConfig
) -> None:
    """Arguments are those of `minirea.kernels.count_winners`."""
    (L, R, H, K), B, earlier = winners_LRHK.shape, len(votes.counts), config.vote_window - 1
    num_winners = L * earlier * (H // B) * K
    if not num_winners:
        return
    by_level = not plan.fits_registers(H // B, K) or config.max_spans > MAX_ELECTED
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
    tiles = plan.decode_tiles(layer)
    c = SketchSizes(tiles, **layer.constants(False, WHOLE), SLICES=1, WHOLE_TILES=False)
    programs = c.G * cdiv(last - first, c.SKETCHED)
    arguments = (Heads(k_cache_GND, *k_cache_GND.stride()), sketch_rows(sketch, layer), first, last)
    launching.start(sketch_kernel, programs, k_cache_GND.device, arguments, {"c": c, "num_warps": tiles.num_warps})


@functools.cache
def _names(kernel: Any) -> tuple[str, ...]:
    """A kernel's arguments at run time, in order."""
    parameters = inspect.signature(kernel.fn).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.annotation != "tl.constexpr")


def launch(kernel: Any, programs: int, device: torch.device, c: Any, num_warps: int, **arguments: Any) -> None:
    """Launch cooperatively, with arguments by name. Raises InputError where the GPU cannot run all programs at once."""
    ordered = (arguments[name] for name in _names(kernel))
    launch_cooperatively(kernel, programs, device, *ordered, c=c, num_warps=num_warps)


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
