"""ReAttention over a key/value cache that holds keys without RoPE: one call, two implementations.

`impl="torch"` runs the phases of reference.py on any device. `impl="triton"` runs the same phases as one fused
kernel (fused/); triton is imported only when it is given or chosen.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral
from types import ModuleType
from typing import Any, Final

import torch

from minirea.config import IMPLS, ReAttentionConfig
from minirea.errors import InputError
from minirea.kernels.near import Near
from minirea.kernels.sketch import Sketch, new_sketch, width
from minirea.kernels.votes import Votes, new_votes, voting_ranks, winners_shape

__all__ = [
    "Gather",
    "Near",
    "ReAttentionConfig",
    "Sketch",
    "Votes",
    "check_sketched",
    "chunks_of_step",
    "count_winners",
    "decode_kernels",
    "new_sketch",
    "new_votes",
    "peer_kernels",
    "prefill_kernels",
    "reattention",
    "resolve_impl",
    "scratch_bytes",
    "sketch_keys",
    "winners_shape",
]


CACHE_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Gather:
    """How the vote of a layer reaches heads that other processes have.

    `rows` returns those of all processes [ranks * M, ...], in the same order everywhere, from this one's [M, ...].
    """

    rows: Callable[[torch.Tensor], torch.Tensor]
    ranks: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.rows(x)


def reattention(
    q_THD: torch.Tensor,
    k_cache_GND: torch.Tensor,
    v_cache_GND: torch.Tensor,
    seq_len: int | torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    config: ReAttentionConfig,
    impl: str = "auto",
    return_selection: bool = False,
    chunk_size: int | None = None,
    gather: Gather | None = None,
    sketch: Sketch | None = None,
    votes: Votes | None = None,
    near: Near | None = None,
    winners: torch.Tensor | None = None,
    starts_early: bool = False,
) -> Any:
    """Attention of T new queries over a finite scope of a cache of any length (arXiv 2407.15176, section 3).

    Up to dense_size cached tokens this is ordinary causal attention. Beyond, every query scores all keys between the
    first global_size and the last local_size ones without RoPE; the best ones are put to a vote, and
    global ++ spans around the elected ++ local are attended with RoPE positions 0, 1, 2, ... No gradients flow back.

    Args:
        q_THD: this step's queries without RoPE, [T, H, D], the last T of the seq_len tokens.
        k_cache_GND: cached keys without RoPE, [G, N, D], this step's T already at [seq_len - T, seq_len).
        v_cache_GND: cached values, [G, N, D]. What lies at or beyond seq_len is never used.
        seq_len: cached tokens, this step's included: an int, or an integer tensor of one element.
        cos, sin: float32 [at least min(seq_len, config.max_scope), D / 2], half-split RoPE as in Hugging Face models.
            For several chunks, which share positions, with config.max_scope + T - chunk_size instead.
        config: sizes in tokens; see ReAttentionConfig.
        impl: "torch", "triton", or "auto": triton for CUDA tensors where it is installed, else torch.
        return_selection: also return the scope, of one chunk.
        chunk_size: how many queries share a scope, which is then as if the cache ended with the last of them, from the
            first query on; the last chunk may be shorter. All T without.
        gather: where H and G are only some of a layer's heads, and other processes have as many others each. It is
            called before the one vote over all heads, in every process or in none.
        sketch: for T = 1, int8 copies of the keys, which `sketch_keys` has made of all keys before
            seq_len - local_size. The step reads them instead of the keys, and selects exactly the same. For T > 1 it
            is ignored. Not with votes, nor in impl "triton" where more than 128 winners vote together.
        votes: for T = 1, those that the layers before cast in the same step, and earlier tokens in all layers, over
            caches of as many tokens. This layer's are added, and the sums decide what is elected. `new_votes` and
            `count_winners` make those of a first layer. Up to dense_size cached tokens there is no vote.
        near: the newest tokens' keys or values once more, for caches far from the device; see minirea.kernels.near.
            Local parts are read there, of several queries only the values; impl "torch" reads all in the caches.
        winners: takes what each of the last R of these queries has found before any vote, where `winners_shape` says,
            int32 [R, H, K], for `count_winners` of later steps; H as in the vote, with gather that of all processes.
            Queries whose chunk attends to all leave it as it is.
        starts_early: for T = 1, the kernel before it on the stream is `norm_qkv` of this step, in whose time impl
            "triton" may begin: see minirea.kernels.fused.plain for what has to be written by then.

    Returns:
        out_THD, [T, H, D] in q's dtype; with return_selection the pair (out_THD, selection). The selection holds the
        scope's cache positions, ascending, int64 [S]; with span_scope "kv_head" it is a list of G such tensors.

    Raises:
        InputError: shapes, dtypes, devices or lengths that do not fit together; the message names the argument. The
            value of a seq_len on the GPU is checked only by impl "torch": reading it makes the CPU wait.
    """
    _check_tensors(q_THD, k_cache_GND, v_cache_GND, cos, sin)
    _check_seq_len(seq_len)
    T = q_THD.shape[0]
    chunk_size = T if chunk_size is None else _checked_chunk_size(chunk_size, T, return_selection)
    _check_options(q_THD, k_cache_GND, config, T - chunk_size, gather, sketch, votes, near, winners)
    impl = resolve_impl(impl, q_THD.device)
    if impl == "torch" or not isinstance(seq_len, torch.Tensor) or seq_len.device != q_THD.device:
        seq_len = int(seq_len)
        _check_lengths(T, chunk_size, seq_len, k_cache_GND.shape[1], config)
    _check_tables(cos, seq_len, k_cache_GND.shape[1], config.max_scope + T - chunk_size)
    tensors = q_THD, k_cache_GND, v_cache_GND
    options: dict[str, Any] = {"return_selection": return_selection, "chunk_size": chunk_size, "gather": gather}
    options |= {"sketch": sketch, "votes": votes, "winners": winners}
    if impl == "torch":
        out_THD, selection = _by_torch(*tensors, int(seq_len), cos, sin, config, options)
    else:
        options |= {"near": near, "starts_early": starts_early}
        out_THD, selection = _by_triton(*tensors, seq_len, cos, sin, config, options)
    return (out_THD, selection) if return_selection else out_THD


def _by_torch(q_THD: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, Any]:
    """Of a call's arguments and options, whatever the caller's gradients and products are."""
    from minirea.kernels.reference import reattention_reference

    *positional, options = arguments
    with torch.no_grad(), torch.autocast(q_THD.device.type, enabled=False):
        return reattention_reference(q_THD, *positional, **options)


def _by_triton(*arguments: Any) -> tuple[torch.Tensor, Any]:
    """Of a call's arguments and options."""
    from minirea.kernels.fused.launch import reattention_triton

    *positional, options = arguments
    return reattention_triton(*positional, **options)


def count_winners(
    votes: Votes, winners_LRHK: torch.Tensor, seq_len: int | torch.Tensor, config: ReAttentionConfig, impl: str = "auto"
) -> None:
    """Add the votes of the vote_window - 1 tokens before a step's one, as each has found its winners in every layer.

    Args:
        votes: of the step, before its first layer, from `new_votes`.
        winners_LRHK: what `reattention` has left of the last R tokens, int32 [L, R, H, K], R at least vote_window; -1
            in the rows of tokens that attended to all, and of those that are not there.
        seq_len: cached tokens with the step's one, as for `reattention`.
        config: of the step.
        impl: as for `reattention`.

    Raises:
        InputError: shapes, dtypes or devices that do not fit together.
    """
    _check_seq_len(seq_len)
    _check_earlier(votes, winners_LRHK, config)
    if resolve_impl(impl, votes.counts.device) == "torch":
        from minirea.kernels.reference import count_winners

        count_winners(votes, winners_LRHK, int(seq_len), config)
    else:
        from minirea.kernels.fused import launch

        launch.count_winners(votes, winners_LRHK, seq_len, config)


def sketch_keys(
    k_cache_GND: torch.Tensor, sketch: Sketch, start: int, stop: int, new_mean: bool = False, impl: str = "auto"
) -> None:
    """Write the sketches of cached keys [start, stop), for `reattention`.

    Args:
        k_cache_GND: cached keys without RoPE, [G, N, D], at least the first `stop` of them filled.
        sketch: of a cache of N tokens; see `new_sketch`.
        new_mean: take the mean key anew, of the first `stop` keys. Sketches made before are of no use then. Without it
            the mean is what it was: zero in a new sketch, which is correct and lets more keys survive.
        impl: as for `reattention`.

    Raises:
        InputError: shapes, dtypes, devices or bounds that do not fit together.
    """
    _check_sketch(sketch, k_cache_GND)
    N = k_cache_GND.shape[1]
    if not 0 <= start <= stop <= N:
        raise InputError(f"the keys to sketch are {start} to {stop}, expected a range within the cache's {N}")
    if start == stop:
        return
    from minirea.kernels import reference

    if new_mean:
        reference.set_mean(k_cache_GND, sketch, stop)
    if resolve_impl(impl, k_cache_GND.device) == "torch":
        reference.sketch_keys(k_cache_GND, sketch, start, stop)
    else:
        from minirea.kernels.fused import launch

        launch.sketch_keys(k_cache_GND, sketch, start, stop)


def resolve_impl(impl: str, device: torch.device) -> str:
    """The implementation, "torch" or "triton", that `impl` means on `device`. Raises InputError."""
    if impl not in IMPLS:
        raise InputError(f"impl is {impl!r}, expected one of {', '.join(IMPLS)}")
    if impl == "auto":
        return "triton" if device.type == "cuda" and _triton_is_installed() else "torch"
    if impl == "triton" and not _triton_is_installed():
        raise InputError("impl is 'triton', but triton is not installed; install it or use impl 'torch'")
    return impl


def prefill_kernels(impl: str) -> ModuleType:
    """What a prefill step takes besides attention, by an implementation that resolve_impl gave."""
    if impl == "torch":
        from minirea.kernels.steps import reference

        return reference
    from minirea.kernels.steps import rows  # imports triton

    return rows


def scratch_bytes(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    config: ReAttentionConfig,
    capacity: int,
    steps: Iterable[tuple[int, int]],
    device: torch.device,
    ranks: int = 1,
    sketched: bool = False,
    carries: bool = False,
) -> int:
    """Bytes that impl "triton" keeps for the life of the process once steps of all these sizes have run on one stream.

    Scratch is allocated at the first step of its kind: one for decode steps, one each for steps of one, two, four and
    so on chunks, and of one chunk of two, four and so on queries. It serves all layers; another stream has its own.
    Decode steps are both those that select and those within dense_size (`ReAttentionConfig.of_dense_step`).

    Args:
        capacity: tokens that the cache has room for, N.
        steps: for every chunk_size that is used, queries of the longest step and chunk_size; shorter ones count too.
        device: a CUDA device; its number of multiprocessors counts.
        ranks: processes with so many heads each.
        sketched: decode steps are called with sketches and without.
        carries: the steps, of one query each, are called with votes, whose own bytes do not count.
    """
    from minirea.kernels.fused import plan

    layer = plan.Layer(num_heads, num_kv_heads, head_dim, dtype, config, voting_ranks(config, ranks))
    return plan.scratch_bytes(layer, capacity, steps, device, sketched, carries)


def chunks_of_step(
    num_heads: int, num_kv_heads: int, head_dim: int, chunk_size: int, device: torch.device, least: int, most: int
) -> int:
    """How many chunks of a prompt, `least` to `most`, keep a GPU busiest in one launch with impl "triton", in half
    precision; of numbers that do so alike the lowest.

    Args:
        device: a CUDA device; its number of multiprocessors counts.
    """
    from minirea.kernels.fused import plan

    layer = plan.Layer(num_heads, num_kv_heads, head_dim, torch.bfloat16, ReAttentionConfig())
    return plan.chunks_of_step(layer, chunk_size, device, least, most)


def check_sketched(num_heads: int, num_kv_heads: int, head_dim: int, config: ReAttentionConfig, ranks: int = 1) -> None:
    """Raises InputError where impl "triton" takes no sketch for steps of one query. `ranks` is as in scratch_bytes."""
    from minirea.kernels.fused import plan

    sizes = num_heads, num_kv_heads, head_dim
    plan.Layer(*sizes, torch.bfloat16, config, voting_ranks(config, ranks)).check_sketched()


def decode_kernels() -> ModuleType:
    """What a decode step takes besides attention, with impl "triton"."""
    from minirea.kernels.steps import matvec  # imports triton

    return matvec


def peer_kernels() -> ModuleType:
    """What ranks that reach each other's memory exchange in a decode step with impl "triton"."""
    from minirea.kernels.steps import peers  # imports triton

    return peers


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _check_tensors(
    q_THD: torch.Tensor, k_cache_GND: torch.Tensor, v_cache_GND: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> None:
    """Everything that follows from shapes, dtypes and devices; runs on every decode step, so it is kept short."""
    if q_THD.dim() != 3 or k_cache_GND.dim() != 3 or 0 in q_THD.shape or 0 in k_cache_GND.shape:
        raise InputError(
            f"q_THD is {_shape(q_THD)} and k_cache_GND {_shape(k_cache_GND)}, "
            "expected [T, H, D] and [G, N, D], not empty"
        )
    num_heads, head_dim = q_THD.shape[1:]
    num_kv_heads = k_cache_GND.shape[0]
    if k_cache_GND.shape[2] != head_dim or head_dim % 2:
        raise InputError(
            f"q_THD is {_shape(q_THD)} and k_cache_GND {_shape(k_cache_GND)}, expected one even head_dim at their ends"
        )
    if num_heads % num_kv_heads:
        raise InputError(f"q_THD has {num_heads} heads, expected a multiple of the {num_kv_heads} of k_cache_GND")
    if v_cache_GND.shape != k_cache_GND.shape:
        raise InputError(f"v_cache_GND is {_shape(v_cache_GND)}, expected {_shape(k_cache_GND)} like k_cache_GND")
    if cos.dim() != 2 or cos.shape[1] != head_dim // 2 or sin.shape != cos.shape:
        raise InputError(
            f"cos is {_shape(cos)} and sin {_shape(sin)}, expected [positions, {head_dim // 2}]: "
            f"half of head_dim {head_dim}"
        )
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise InputError(f"cos is {cos.dtype} and sin {sin.dtype}, expected torch.float32")
    if q_THD.dtype not in CACHE_DTYPES or not q_THD.dtype == k_cache_GND.dtype == v_cache_GND.dtype:
        raise InputError(
            f"q_THD is {q_THD.dtype}, k_cache_GND {k_cache_GND.dtype} and v_cache_GND {v_cache_GND.dtype}, "
            "expected one of float32, float16 and bfloat16 for all three"
        )
    devices = {x.device for x in (q_THD, k_cache_GND, v_cache_GND, cos, sin)}
    if len(devices) > 1:
        raise InputError(f"the tensors are on {', '.join(sorted(map(str, devices)))}, expected one device")


def _check_options(
    q_THD: torch.Tensor,
    k_cache_GND: torch.Tensor,
    config: ReAttentionConfig,
    more_queries: int,
    gather: Gather | None,
    sketch: Sketch | None,
    votes: Votes | None,
    near: Near | None,
    winners: torch.Tensor | None,
) -> None:
    """The arguments that may be None, by themselves and with each other."""
    if sketch is not None:
        _check_sketch(sketch, k_cache_GND)
    if votes is not None:
        if sketch is not None:
            raise InputError("both sketch and votes are given, expected one: steps with votes read all keys")
        _check_votes(votes, q_THD, k_cache_GND, config, gather)
    if near is not None:
        _check_near(near, k_cache_GND, config, more_queries)
    if winners is not None:
        _check_winners(winners, q_THD, config, gather)


def _check_sketch(sketch: Sketch, k_cache_GND: torch.Tensor) -> None:
    (G, N, _), C = k_cache_GND.shape, width(k_cache_GND.shape[2])
    expected = ((torch.int8, [G, N, C]), (torch.int32, [G, N, 1]), (torch.float32, [G, C]))
    for name, tensor, (dtype, shape) in zip(Sketch._fields, sketch, expected, strict=True):
        fits = list(tensor.shape) == shape
        _check_tensor(f"sketch.{name}", tensor, fits, dtype, str(shape), k_cache_GND.device)


def _check_near(near: Near, k_cache_GND: torch.Tensor, config: ReAttentionConfig, more_queries: int) -> None:
    (G, _, D), least = k_cache_GND.shape, max(config.local_size, config.dense_size) + more_queries
    for name, rows_GRD in zip(Near._fields, near, strict=True):
        if rows_GRD is not None:
            fits = rows_GRD.dim() == 3 and (len(rows_GRD), rows_GRD.shape[2]) == (G, D) and rows_GRD.shape[1] >= least
            expected = k_cache_GND.dtype, f"[{G}, at least {least}, {D}]", k_cache_GND.device
            _check_tensor(f"near.{name}", rows_GRD, fits, *expected)


def _voting_heads(num_heads: int, config: ReAttentionConfig, gather: Gather | None) -> int:
    return num_heads * gather.ranks if gather is not None and config.span_scope == "layer" else num_heads


def _check_votes(
    votes: Votes, q_THD: torch.Tensor, k_cache_GND: torch.Tensor, config: ReAttentionConfig, gather: Gather | None
) -> None:
    (T, H, _), (G, N, _) = q_THD.shape, k_cache_GND.shape
    if T > 1:
        raise InputError(f"q_THD has {T} queries, expected one with votes")
    least = new_votes(_voting_heads(H, config, gather), G, config, 1, N, torch.device("meta"))
    for name, tensor, expected in zip(Votes._fields, votes, least, strict=True):
        fits = tensor.dim() == 2 and len(tensor) == len(expected) and tensor.shape[1] >= expected.shape[1]
        _check_tensor(f"votes.{name}", tensor, fits, torch.int32, f"{_shape(expected)} or longer", q_THD.device)


def _check_winners(
    winners: torch.Tensor, q_THD: torch.Tensor, config: ReAttentionConfig, gather: Gather | None
) -> None:
    R, *sizes = winners_shape(_voting_heads(q_THD.shape[1], config, gather), config, 1)
    fits = winners.dim() == 3 and len(winners) >= R and list(winners.shape[1:]) == sizes
    _check_tensor("winners", winners, fits, torch.int32, f"[at least {R}, {sizes[0]}, {sizes[1]}]", q_THD.device)


def _check_earlier(votes: Votes, winners: torch.Tensor, config: ReAttentionConfig) -> None:
    B, least = len(votes.counts), config.vote_window
    fits = winners.dim() == 4 and winners.shape[1] >= least and not winners.shape[2] % B
    expected = f"[layers, at least {least}, a multiple of {B}, winners]"
    _check_tensor("winners_LRHK", winners, fits, torch.int32, expected, votes.counts.device)
    width = 2 + winners.shape[0] * (least - 1) * winners.shape[2] // B * winners.shape[3]
    fits = votes.voted.dim() == 2 and votes.voted.shape[1] >= width
    _check_tensor("votes.voted", votes.voted, fits, torch.int32, f"[{B}, at least {width}]", votes.counts.device)


def _check_tensor(
    name: str, tensor: torch.Tensor, fits: bool, dtype: torch.dtype, shape: str, device: torch.device
) -> None:
    """Raises InputError unless a tensor has the dtype, is contiguous, `fits` the shape and is on the device."""
    if tensor.dtype != dtype or not fits or not tensor.is_contiguous():
        found = f"{tensor.dtype} {_shape(tensor)}{'' if tensor.is_contiguous() else ', not contiguous'}"
        raise InputError(f"{name} is {found}, expected {dtype} {shape}, contiguous")
    if tensor.device != device:
        raise InputError(f"{name} is on {tensor.device}, expected {device} like the other tensors")


def _check_seq_len(seq_len: int | torch.Tensor) -> None:
    if isinstance(seq_len, torch.Tensor):
        if seq_len.numel() != 1 or seq_len.is_floating_point() or seq_len.is_complex() or seq_len.dtype == torch.bool:
            raise InputError(f"seq_len is a {seq_len.dtype} tensor {_shape(seq_len)}, expected one integer")
    elif isinstance(seq_len, bool) or not isinstance(seq_len, Integral):
        raise InputError(f"seq_len is {seq_len!r}, expected an integer or an integer tensor of one element")


def _checked_chunk_size(chunk_size: int, num_queries: int, return_selection: bool) -> int:
    """At most num_queries."""
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, Integral) or chunk_size < 1:
        raise InputError(f"chunk_size is {chunk_size!r}, expected a positive integer")
    if return_selection and num_queries > chunk_size:
        raise InputError(
            f"q_THD has {num_queries} queries, expected at most one chunk of {chunk_size} with return_selection"
        )
    return min(int(chunk_size), num_queries)


def _check_lengths(num_queries: int, chunk_size: int, seq_len: int, capacity: int, config: ReAttentionConfig) -> None:
    if not num_queries <= seq_len <= capacity:
        raise InputError(
            f"seq_len is {seq_len}, expected at least the {num_queries} queries of this step and at most the cache's "
            f"capacity of {capacity}"
        )
    if seq_len > config.dense_size and chunk_size > config.local_size:
        raise InputError(
            f"a chunk has {chunk_size} queries, expected at most local_size ({config.local_size}) once seq_len "
            f"({seq_len}) exceeds dense_size ({config.dense_size}): early queries would see later tokens"
        )


def _check_tables(cos: torch.Tensor, seq_len: int | torch.Tensor, capacity: int, longest_scope: int) -> None:
    positions = min(longest_scope, seq_len if isinstance(seq_len, int) else capacity)
    if cos.shape[0] < positions:
        raise InputError(
            f"cos and sin have {cos.shape[0]} positions, expected at least {positions}: the scope can get that far"
        )


def _shape(x: torch.Tensor) -> str:
    return str(list(x.shape))
