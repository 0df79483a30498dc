"""Streams a checkpoint's safetensors files into tensors on the device.

A few threads read blocks of bounded size, with plain reads, straight into their destination or through a staging buffer
each where dtype, device or row order differ. On the way to a GPU every thread copies on a stream of its own, so that
disk, page cache and PCIe work at the same time.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, NamedTuple

import torch

from minirea.compact import compact_bytes, pays
from minirea.config import ModelConfig
from minirea.errors import InputError, MemoryLimitError, memory_limit_of
from minirea.progress import bar_of_bytes
from minirea.quantize import QuantizedMatrix, bits_of, parts, quantized_bytes, rounding_bytes
from minirea.threads import thread_pool
from minirea.weights.assign import Assigned, PackedTensor, assign, tensors_of, warn_of_unused
from minirea.weights.names import NameTable, Place
from minirea.weights.safetensors import StoredTensor, bytes_of, open_file, read_headers, read_into, read_whole

STAGING_BYTES: Final = 8 * 2**20  # of one reader
# A disk is fastest with several requests at a time; PCIe takes ten times what one core copies out of the page cache.
READERS: Final = {"cpu": 4, "cuda": 8}
UNPACKED_AT_ONCE: Final = 1 << 21  # weights of a matrix that comes in 4 bits


def load_weights(
    directory: str | Path,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    keep_half: bool = False,
    quantize: str | None = None,
) -> dict[str, Any]:
    """Read a checkpoint into frozen tensors under our names (names.py), q/k/v and gate/up stacked.

    Besides the result it holds a staging buffer of STAGING_BYTES per reader. All headers are checked before anything is
    allocated. On an error or Ctrl-C the readers finish the blocks they are at, and no thread remains.

    Args:
        directory: a model directory; its config has been read into `config`. Of a rank's part only that part is read.
        dtype: of the result; None means checkpoint_dtype.
        progress: show a bar of bytes read on stderr.
        keep_half: leave matrices that the files hold in float16 or bfloat16 so, whatever dtype says.
        quantize: "int8" or "int4": round every matrix but the embedding block by block, as it comes from the file.
            Where the config says that matrices come in 4 bits, "int4": they stay as they are, and others wide.

    Returns:
        Shapes in the project's letters: embed.weight and head.weight [V, E] (one tensor object if tied), norm.weight
        [E]; for each layer l, under layers.{l}: attn_norm.weight and mlp_norm.weight [E], qkv.weight [(H+2G)*D, E] (the
        query heads, the key heads, the value heads), o.weight [E, H*D], gate_up.weight [2F, E] and down.weight [E, F];
        the biases that the config declares. With `quantize` a QuantizedMatrix for every matrix but embed.weight, from
        which a tied head then differs.

    Warns (MinireaWarning) of tensors that the model has no use for, such as a value head.

    Raises:
        MissingFileError: no safetensors file, or a shard is not there.
        InputError: a malformed file, or a missing, misshapen, duplicated or non-finite tensor, or one of another model.
        MemoryLimitError: the weights do not fit on the device.
    """
    tensors, table = tensors_of(Path(directory), config), NameTable(config)
    assigned = assign(Path(directory), tensors, table)
    warn_of_unused(Path(directory), tensors, assigned)
    dtype = dtype or _declared_dtype(config) or _most_common_dtype(tensors)
    kept = _kept_dtypes(assigned) if keep_half else {}
    try:
        weights = empty_weights(config, dtype, device, kept, quantize)
        transfers: list[_Transfer | _PackedTransfer] = [
            _PackedTransfer(tensor, weights[place.name].rows(place.rows.start, place.rows.stop))
            if isinstance(tensor, PackedTensor)
            else _Transfer(
                tensor,
                *_targets(place, weights, table.is_redundant(place), config.tie_word_embeddings),
                place.kept,
                place.interleaved,
                compare=table.is_redundant(place),
                scale=None if scale is None else _read_scale(scale, len(tensor.shape)).to(device),
            )
            for tensor, place, scale in assigned
            if place.kept[0]
        ]
        with bar_of_bytes(sum(transfer.nbytes for transfer in transfers), "weights", progress) as bar:
            for nbytes in _fill(transfers, device):
                bar.update(nbytes)
    except RuntimeError as error:
        if memory_limit_of(error) is not None:
            raise MemoryLimitError(
                f"the weights need {weight_bytes(config, dtype) / 1e9:.2f} GB as {_short(dtype)}, more than is free on "
                f"{device}; use a smaller dtype or another device"
            ) from None
        raise
    return weights


def empty_weights(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    other_dtypes: Mapping[str, torch.dtype] | None = None,
    quantize: str | None = None,
) -> dict[str, Any]:
    """What load_weights returns, not filled. `other_dtypes`: name -> an exception."""
    other_dtypes = other_dtypes or {}
    weights: dict[str, Any] = {
        name: QuantizedMatrix.empty(shape[0], shape[1], bits, _group_size(config, shape[1]), device)
        if (bits := _bits(config, quantize, name, shape))
        else torch.empty(shape, dtype=other_dtypes.get(name, dtype), device=device)
        for name, shape in _shapes(config)
    }
    V, E = weights["embed.weight"].shape
    head_bits = _bits(config, quantize, "head.weight", (V, E))
    if config.tie_word_embeddings and head_bits:
        weights["head.weight"] = QuantizedMatrix.empty(V, E, head_bits, _group_size(config, E), device)
    elif config.tie_word_embeddings:
        rows = config.head_rows
        embedding = weights["embed.weight"]
        weights["head.weight"] = embedding[rows.start : rows.stop] if config.part else embedding
    return weights


def checkpoint_dtype(directory: str | Path, config: ModelConfig) -> torch.dtype:
    """The dtype that a checkpoint is meant to run in: what its config says, else what most of its elements are in.

    Raises what load_weights raises for the files' headers.
    """
    return _declared_dtype(config) or _most_common_dtype(read_headers(Path(directory)))


def weight_bytes(
    config: ModelConfig, dtype: torch.dtype, matrix_bytes: Callable[[str, int, int], int] | None = None
) -> int:
    """How many bytes load_weights allocates for its result; a tied embedding counts once.

    Args:
        matrix_bytes: what a matrix [N, K] takes instead, by its name ("*" for the layer), but for the embedding; a tied
            head is then one of them.
    """
    # Not by way of _shapes: the config may claim two billion layers, and no file has been read yet.
    shapes = NameTable(config).shapes
    if matrix_bytes and config.tie_word_embeddings:
        shapes = shapes | {"head.weight": shapes["embed.weight"]}

    def nbytes(pattern: str, shape: tuple[int, ...]) -> int:
        if matrix_bytes and len(shape) == 2 and pattern != "embed.weight":
            return matrix_bytes(pattern, shape[0], shape[1])
        return math.prod(shape) * dtype.itemsize

    layers = {pattern: config.num_layers if "*" in pattern else 1 for pattern in shapes}
    return sum(nbytes(pattern, shape) * layers[pattern] for pattern, shape in shapes.items())


def stored_weight_bytes(
    directory: str | Path,
    config: ModelConfig,
    dtype: torch.dtype,
    quantize: str | None = None,
    keep_half: bool = True,
    compact: bool = False,
) -> int:
    """Like weight_bytes, for arguments of load_weights that depend on how a checkpoint is stored.

    Args:
        compact: what they take at most when matrices of bfloat16, but for the embedding, have become CompactMatrix.

    Raises what load_weights raises for the files' headers.
    """
    assigned = assign(Path(directory), tensors_of(Path(directory), config), NameTable(config))
    kept = _kept_dtypes(assigned) if keep_half else {}
    shapes = dict(_shapes(config))

    def packs(name: str, columns: int) -> bool:
        return compact and kept.get(name) == torch.bfloat16 and pays(columns)

    if config.tie_word_embeddings and _bits(config, quantize, "head.weight", shapes["embed.weight"]):
        shapes["head.weight"] = shapes["embed.weight"]
    elif config.tie_word_embeddings and packs("embed.weight", config.hidden_size):
        shapes["head.weight"] = len(config.head_rows), config.hidden_size
        kept["head.weight"] = torch.bfloat16

    def nbytes(name: str, shape: tuple[int, ...]) -> int:
        if bits := _bits(config, quantize, name, shape):
            return quantized_bytes(shape[0], shape[1], bits, _group_size(config, shape[1]))
        if name != "embed.weight" and packs(name, shape[-1]):
            return compact_bytes(shape[0], shape[1])
        return math.prod(shape) * kept.get(name, dtype).itemsize

    return sum(nbytes(name, shape) for name, shape in shapes.items())


def quantizing_bytes(config: ModelConfig, device: torch.device) -> int:
    """What load_weights holds on the device besides its result to quantize: a block of every reader, in float32; or a
    matrix of each in 4 bits, a part of it unpacked.
    """
    shapes = NameTable(config).shapes.values()
    if config.packing:
        largest = max(math.prod(shape) for shape in shapes if len(shape) == 2)
        return READERS[device.type] * (largest + 8 * UNPACKED_AT_ONCE)
    columns = max(shape[-1] for shape in shapes)
    return READERS[device.type] * (STAGING_BYTES * torch.float32.itemsize + rounding_bytes(columns, device))


def _bits(config: ModelConfig, quantize: str | None, name: str, shape: tuple[int, ...]) -> int:
    """Of one of our tensors; 0: it is not quantized."""
    if not quantize or len(shape) != 2 or name == "embed.weight":
        return 0
    if config.packing:
        return 4 if name.startswith("layers.") else 0
    return bits_of(quantize, name, config.num_layers)


def _group_size(config: ModelConfig, K: int) -> int:
    """Columns that share scale and offset in a matrix of K from a checkpoint in 4 bits: as many as it has, or, where
    they are more than products take on any device, a part of them. 0: the matrix is rounded here.
    """
    if not config.packing:
        return 0
    columns = config.packing.group_size or K
    return next((size for size in (256, 128, 64) if columns % size == 0), 32)


def _targets(
    place: Place, weights: dict[str, Any], redundant: bool, tied: bool
) -> tuple[torch.Tensor, QuantizedMatrix | None]:
    """The rows that a tensor goes to, and those of a quantized matrix; of a matrix that is only quantized a shape."""
    if redundant:  # the embedding is whole on every rank; each compares its rows of the head
        return weights["embed.weight"][place.kept[0].start : place.kept[0].stop], None
    target = weights[place.name]
    if isinstance(target, QuantizedMatrix):
        quantized = target.rows(place.rows.start, place.rows.stop)
        return torch.empty(quantized.shape, dtype=torch.float32, device="meta"), quantized
    head = weights["head.weight"]
    rounds = tied and place.name == "embed.weight" and isinstance(head, QuantizedMatrix)
    return target[place.rows], head if rounds else None


def _shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Our names with their shapes, a tied head left out."""
    for pattern, shape in NameTable(config).shapes.items():
        for layer in range(config.num_layers if "*" in pattern else 1):
            yield pattern.replace("*", str(layer)), shape


def _kept_dtypes(assigned: list[Assigned]) -> dict[str, torch.dtype]:
    """Those of our matrices all parts of which are stored in one half-precision dtype, with that dtype."""
    stored: dict[str, set[torch.dtype]] = {}
    for tensor, place, _ in assigned:
        if len(tensor.shape) == 2 and not isinstance(tensor, PackedTensor):
            stored.setdefault(place.name, set()).add(tensor.dtype)
    halves = ({torch.float16}, {torch.bfloat16})
    return {name: next(iter(dtypes)) for name, dtypes in stored.items() if dtypes in halves}


def _declared_dtype(config: ModelConfig) -> torch.dtype | None:
    return getattr(torch, config.dtype) if config.dtype else None


def _most_common_dtype(tensors: list[StoredTensor]) -> torch.dtype:
    """Weighted by elements. float64 files run in float32: nothing is computed in float64."""
    elements: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        if tensor.is_readable:
            elements[tensor.dtype] += math.prod(tensor.shape)
    most_common = elements.most_common(1)[0][0] if elements else torch.float32
    return torch.float32 if most_common == torch.float64 else most_common


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- From a file into tensors of ours ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Transfer:
    """One tensor's way from its file into its `rows` of ours, in blocks of bounded size.

    `kept` and `interleaved` are Place's. With `compare` the rows hold the values already, and the file's must be the
    same. They are rounded into `quantized`, and into nothing else if `rows` is on the device "meta". The values are
    multiplied by `scale`, float32 [1] or [the tensor's rows, 1] on the device.
    """

    tensor: StoredTensor
    rows: torch.Tensor
    quantized: QuantizedMatrix | None
    kept: tuple[range, ...]
    interleaved: int
    compare: bool
    scale: torch.Tensor | None = None

    @property
    def in_place(self) -> bool:
        """Whether the file's bytes are the destination's, so that they can be read straight into it."""
        same = self.rows.device.type == "cpu" and self.rows.dtype == self.tensor.dtype
        return same and not self.interleaved and not self.compare

    @property
    def row_bytes(self) -> int:
        """Of the part of a row that is kept."""
        return self.tensor.dtype.itemsize * math.prod(map(len, self.kept[1:]))

    @property
    def nbytes(self) -> int:
        """In the file."""
        return len(self.rows) * self.row_bytes

    @property
    def places(self) -> tuple[int, int]:
        """Where in the file the first kept byte is, and how far apart rows are."""
        stride = self.tensor.dtype.itemsize * math.prod(self.tensor.shape[1:])
        first_column = self.kept[1].start if len(self.kept) > 1 else 0
        return self.tensor.offset + self.kept[0].start * stride + first_column * self.tensor.dtype.itemsize, stride

    @property
    def block_rows(self) -> int:
        """Rows per block: whole heads where their rows change order."""
        unit = self.interleaved or 1
        return min(len(self.rows), max(1, STAGING_BYTES // (self.row_bytes * unit)) * unit)

    def blocks(self) -> Iterator[_Block]:
        """The tensor in pieces, in file order."""
        for first_row in range(0, len(self.rows), self.block_rows):
            yield _Block(self, first_row, self.rows[first_row : first_row + self.block_rows])

    def values(self, staging: torch.Tensor, first_row: int, device: torch.device) -> torch.Tensor:
        """The bytes of the rows from `first_row` on as numbers, those of a quantized matrix as float32."""
        staged = staging.view(self.tensor.dtype)
        if self.scale is None:
            return staged
        wide = staged.to(device, non_blocking=True).float().view(-1, *self.rows.shape[1:])
        first_row += self.kept[0].start
        return wide.mul_(self.scale[first_row : first_row + len(wide)] if len(self.scale) > 1 else self.scale)

    def unstage(self, rows: torch.Tensor, staged: torch.Tensor) -> None:
        """Put a block's values, in the file's dtype and row order, into `rows`, or compare them."""
        if self.interleaved:  # row half * D/2 + i of a head comes from row 2 * i + half
            rows = rows.unflatten(0, (-1, 2, self.interleaved // 2)).transpose(1, 2)
        staged = staged.view(rows.shape)
        if not rows.is_contiguous() or rows.dtype != staged.dtype or self.compare:
            # Converted on the device, which is faster there: the bytes cross over as they are.
            staged = staged.to(rows.device, non_blocking=True)
        if not self.compare:
            rows.copy_(staged, non_blocking=True)
        elif not torch.equal(rows, staged.to(rows.dtype)):
            raise InputError(f"{self.tensor} differs from the embedding, expected the same: the config ties the two")


class _Block(NamedTuple):
    """A part of a transfer that is read at once: `rows` of ours, from the kept row `first_row` of the tensor on."""

    transfer: _Transfer
    first_row: int
    rows: torch.Tensor

    @property
    def nbytes(self) -> int:
        """In the file."""
        return len(self.rows) * self.transfer.row_bytes

    def read(self, workspace: _Workspace) -> int:
        """Move the block; returns its size in the file. The GPU has then finished with the workspace."""
        transfer, tensor, rows, quantized = self.transfer, self.transfer.tensor, self.rows, self.transfer.quantized
        # Opened anew for every block: a file object has one position, which threads cannot share.
        with open_file(tensor.path) as file, workspace.on_stream, torch.inference_mode():
            if quantized and rows.is_meta:
                rows = torch.empty_like(rows, device=quantized.device)
            if transfer.in_place:
                self._read_into(file, bytes_of(rows))
            else:
                staging = workspace.staging[: self.nbytes]
                self._read_into(file, bytes_of(staging))
                transfer.unstage(rows, transfer.values(staging, self.first_row, rows.device))
            low, high = torch.aminmax(rows)  # NaN makes both NaN
            if quantized:
                quantized.rows(self.first_row, self.first_row + len(rows)).round(rows)
            if not math.isfinite(low) or not math.isfinite(high):  # reading them waits for the stream
                raise InputError(f"{tensor} has a NaN or infinity as {_short(rows.dtype)}, expected finite numbers")
        return self.nbytes

    def _read_into(self, file: FileIO, buffer: memoryview) -> None:
        """Fill the buffer with the kept columns of the block's rows."""
        size, (begin, stride) = self.transfer.row_bytes, self.transfer.places
        begin += self.first_row * stride
        if size == stride:
            read_into(file, begin, buffer)
            return
        for row in range(len(self.rows)):
            read_into(file, begin + row * stride, buffer[row * size : (row + 1) * size])


@dataclass(frozen=True)
class _PackedTransfer:
    """A matrix that comes in 4 bits, on its way into `quantized`: one block, since its rows may lie in columns."""

    tensor: PackedTensor
    quantized: QuantizedMatrix

    compare = False
    in_place = True  # nothing is staged

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def blocks(self) -> Iterator[_PackedTransfer]:
        yield self

    def read(self, workspace: _Workspace) -> int:
        """Read, check and rearrange it, some rows at a time."""
        tensor, form, device = self.tensor, self.tensor.form, self.quantized.device
        N, K = tensor.shape
        if tensor.groups is not None:
            in_order = torch.arange(K, dtype=torch.int32) // tensor.group_size
            if not torch.equal(read_whole(tensor.groups), in_order):
                raise InputError(f"{tensor.groups} mixes columns (act-order, desc_act), expected groups of neighbours")
        q, scale = read_whole(tensor, form.shapes(N, K, tensor.group_size)[0]), read_whole(tensor.scale)
        if not bool(scale.float().isfinite().all()):
            raise InputError(f"{tensor.scale} has a NaN or infinity, expected finite numbers")
        with workspace.on_stream, torch.inference_mode():
            q, scale = self._rows_first(q), self._rows_first(scale).float()
            zero = None if tensor.zero is None else self._rows_first(read_whole(tensor.zero))
            for start, stop in parts(N // 8, 8 * K, UNPACKED_AT_ONCE):
                rows, words = slice(8 * start, 8 * stop), slice(start, stop)
                zero_words = None if zero is None else zero[words]
                q_NK, zero_NG = form.unpack(q[words if form.packs_rows else rows], zero_words, scale[rows])
                self.quantized.rows(rows.start, rows.stop).fill(q_NK, scale[rows], zero_NG, tensor.group_size)
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        return self.nbytes

    def _rows_first(self, stored: torch.Tensor) -> torch.Tensor:
        """A tensor of the file, on the device."""
        on_device = stored.to(self.quantized.device)
        return on_device.t() if self.tensor.form.rows_last else on_device


class _Workspace(NamedTuple):
    """What a reader needs: bytes to stage a block in, pinned for a GPU, and a context that makes its stream current."""

    staging: torch.Tensor
    on_stream: AbstractContextManager[Any]


def _fill(transfers: Sequence[_Transfer | _PackedTransfer], device: torch.device) -> Iterator[int]:
    """Run all transfers; yields the bytes read, block by block in file order.

    So an error is that of the first bad block, whichever reader was faster. Leaving early cancels the blocks that no
    reader has begun and waits for the others.
    """
    on_gpu = device.type == "cuda"
    staged = max(
        (t.block_rows * t.row_bytes for t in transfers if isinstance(t, _Transfer) and not t.in_place), default=0
    )
    free: SimpleQueue[_Workspace] = SimpleQueue()
    readers = READERS["cuda" if on_gpu else "cpu"]
    for _ in range(readers):
        staging = torch.empty(staged, dtype=torch.uint8, pin_memory=on_gpu)
        free.put(_Workspace(staging, torch.cuda.stream(torch.cuda.Stream(device)) if on_gpu else nullcontext()))

    def read(block: _Block | _PackedTransfer) -> int:
        workspace = free.get()
        try:
            return block.read(workspace)
        finally:
            free.put(workspace)

    with thread_pool(readers, "reader") as pool:
        # A redundant head is compared with the embedding, which must be complete by then.
        for compare in (False, True):
            part = [transfer.blocks() for transfer in transfers if transfer.compare == compare]
            yield from pool.map(read, itertools.chain.from_iterable(part))
    if on_gpu:
        torch.cuda.empty_cache()  # what the readers' streams have cached can serve no other stream


def _read_scale(scale: StoredTensor, dimensions: int) -> torch.Tensor:
    """A quantized matrix's scale, float32 [1, ...] or [rows, 1, ...] with as many dimensions as the matrix."""
    return read_whole(scale).float().view(-1, *(1,) * (dimensions - 1))
