"""Streams a checkpoint's safetensors files into tensors on the device.

A few threads read blocks of bounded size, with plain reads, straight into their destination or through a staging buffer
each where dtype, device or row order differ. On the way to a GPU every thread copies on a stream of its own, so that
disk, page cache and PCIe work at the same time. Files are never mapped: mapped pages count as resident memory, so a
mapped 16 GB checkpoint looks like a second copy of the model.

The format: an 8-byte little-endian length, a JSON header of that length that gives each tensor's dtype, shape and byte
range, then the tensors' bytes (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import reprlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, NamedTuple, TypeGuard

import torch

from minirea.config import ModelConfig, Packing
from minirea.errors import InputError, MemoryLimitError, MinireaWarning, MissingFileError, memory_limit_of
from minirea.files import check_regular, list_directory, unreadable
from minirea.json_object import JsonObject
from minirea.progress import bar_of_bytes
from minirea.quantize import QuantizedMatrix, bits_of, parts, quantized_bytes, rounding_bytes
from minirea.threads import thread_pool
from minirea.weights.names import NameTable, Place, is_ignored
from minirea.weights.packed import FORMS, GROUPS_OF_COLUMNS, SHAPES, Form

MAX_HEADER_BYTES: Final = 100_000_000  # the format's own
STAGING_BYTES: Final = 8 * 2**20  # of one reader
# A disk is fastest with several requests at a time; PCIe takes ten times what one core copies out of the page cache.
READERS: Final = {"cpu": 4, "cuda": 8}
UNPACKED_AT_ONCE: Final = 1 << 21  # weights of a matrix that comes in 4 bits

_DTYPES: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Of matrices with a scale.
_QUANTIZED_DTYPES: Final = {"F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8}
# What else a tensor that the model does not use may be stored in, by the bits of an element.
_OTHER_BITS: Final = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16"), 16),
    **dict.fromkeys(("U32", "I32"), 32),
    **dict.fromkeys(("U64", "I64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("F4",), 4),
}
_OTHER_FORMATS: Final = (".bin", ".pth", ".pt", ".gguf")
_LISTED: Final = 3  # how many names a message lists before it only counts

_repr = reprlib.Repr()  # names and shapes of hostile files: bounded, on one line
_repr.maxstring, _repr.maxother, _repr.maxlong = 120, 120, 40


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: `nbytes` bytes from byte `offset` of the file on, row-major.

    `stored_as` is the format's name of its dtype.
    """

    path: Path
    name: str
    stored_as: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.path}: tensor {_repr.repr(self.name)}"

    @property
    def is_readable(self) -> bool:
        """Whether it has a dtype that a weight may have. Others are buffers, or quantized."""
        return self.stored_as in _DTYPES

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES.get(self.stored_as) or _QUANTIZED_DTYPES[self.stored_as]


@dataclass(frozen=True)
class PackedTensor(StoredTensor):
    """A matrix of `shape` that comes in 4 bits: the tensor of its q, under the matrix's name, and what belongs to it.

    `zero` is absent where all zero points are 8, `groups` where columns are in order. See minirea.weights.packed.
    """

    form: Form
    group_size: int
    scale: StoredTensor
    zero: StoredTensor | None
    groups: StoredTensor | None


class Assigned(NamedTuple):
    """A tensor of a checkpoint and where it goes. `scale`, one number or one per row, makes quantized values wide."""

    tensor: StoredTensor
    place: Place
    scale: StoredTensor | None = None


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
    tensors, table = _tensors(Path(directory), config), NameTable(config)
    assigned = _assign(Path(directory), tensors, table)
    _warn_of_unused(Path(directory), tensors, assigned)
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
        name: QuantizedMatrix.empty(shape[0], shape[1], bits, device)
        if (bits := _bits(config, quantize, name, shape))
        else torch.empty(shape, dtype=other_dtypes.get(name, dtype), device=device)
        for name, shape in _shapes(config)
    }
    V, E = weights["embed.weight"].shape
    head_bits = _bits(config, quantize, "head.weight", (V, E))
    if config.tie_word_embeddings and head_bits:
        weights["head.weight"] = QuantizedMatrix.empty(V, E, head_bits, device)
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


def kept_weight_bytes(
    directory: str | Path,
    config: ModelConfig,
    dtype: torch.dtype,
    packed_bytes: Callable[[int, int], int] | None = None,
) -> int:
    """Like weight_bytes, with keep_half and, but for the embedding, such matrices [N, K] in `packed_bytes(N, K)`. Then
    a tied head is one of them.

    Raises what load_weights raises for the files' headers.
    """
    return quantized_weight_bytes(directory, config, dtype, None, True, packed_bytes=packed_bytes)


def quantized_weight_bytes(
    directory: str | Path,
    config: ModelConfig,
    dtype: torch.dtype,
    quantize: str | None,
    keep_half: bool,
    matrix_bytes: Callable[[int, int, int], int] = quantized_bytes,
    packed_bytes: Callable[[int, int], int] | None = None,
) -> int:
    """Like kept_weight_bytes, with `quantize`: a quantized matrix [N, K] takes `matrix_bytes(N, K, bits)`.

    Without `keep_half` all others are in `dtype`. Raises what load_weights raises for the files' headers.
    """
    assigned = _assign(Path(directory), _tensors(Path(directory), config), NameTable(config))
    kept = _kept_dtypes(assigned) if keep_half else {}
    packs = packed_bytes if keep_half else None
    shapes = dict(_shapes(config))
    packs_head = packs is not None and "embed.weight" in kept
    if config.tie_word_embeddings and (packs_head or _bits(config, quantize, "head.weight", shapes["embed.weight"])):
        shapes["head.weight"] = shapes["embed.weight"]
        kept |= {"head.weight": kept["embed.weight"]} if packs_head else {}

    def nbytes(name: str, shape: tuple[int, ...]) -> int:
        if bits := _bits(config, quantize, name, shape):
            return matrix_bytes(shape[0], shape[1], bits)
        if packs and name in kept and name != "embed.weight":
            return packs(shape[0], shape[1])
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


# --- Which files ------------------------------------------------------------------------------------------------------


def _weight_files(directory: Path) -> list[Path]:
    """The files of one set of weights: Hugging Face's or Mistral's, whole or in shards."""
    names = list_directory(directory, "model directory")
    stored = [name for name in names if name.endswith(".safetensors")]
    mistral = [name for name in stored if name.startswith("consolidated")]
    hugging_face = [name for name in stored if name not in mistral]
    # A directory that holds both sets holds the same weights twice; config.json describes Hugging Face's.
    chosen = (hugging_face or mistral) if "config.json" in names else (mistral or hugging_face)
    stem = "consolidated" if chosen and chosen is mistral else "model"
    if f"{stem}.safetensors" in chosen:
        return [directory / f"{stem}.safetensors"]
    if f"{stem}.safetensors.index.json" in names:
        return _indexed_files(directory, f"{stem}.safetensors.index.json", chosen)
    if not chosen:
        other = next((name for name in names if name.endswith(_OTHER_FORMATS)), "no weights")
        raise MissingFileError(f"{directory}: holds {other}, expected *.safetensors files: minirea reads only those")
    return [directory / name for name in chosen]


def _indexed_files(directory: Path, index_name: str, present: list[str]) -> list[Path]:
    """The shards that an index names. Nothing else in it counts: the shards' headers say what they hold."""
    index = JsonObject.read(directory / index_name)
    weight_map = index.child("weight_map")
    if weight_map is None or not weight_map.values:
        raise index.fail("weight_map", "an object of tensor and file names")
    for tensor_name, shard in weight_map.values.items():
        # Looking the name up among the directory's own also keeps paths that lead out of it from being opened.
        if shard not in present:
            raise MissingFileError(
                f"{index.source}: {_repr.repr(tensor_name)} is in {_repr.repr(shard)}, which is not in {directory}"
            )
    return [directory / shard for shard in sorted(set(weight_map.values.values()))]


# --- Headers ----------------------------------------------------------------------------------------------------------


def read_headers(directory: Path) -> list[StoredTensor]:
    """All tensors of a checkpoint, buffers left out, in the order in which they lie in the files."""
    by_name: dict[str, StoredTensor] = {}
    for path in _weight_files(directory):
        with open_file(path) as file:
            _, stored = read_header(file, path)
        for tensor in stored:
            if is_ignored(tensor.name):
                continue
            if tensor.name in by_name:
                raise InputError(f"{tensor} is also in {by_name[tensor.name].path}, expected it once")
            by_name[tensor.name] = tensor
    return list(by_name.values())


def read_header(file: FileIO, path: Path) -> tuple[dict[str, str], list[StoredTensor]]:
    """The metadata of an open safetensors file, and its tensors in the order in which they lie in it.

    Raises:
        InputError: the header is malformed, or its tensors do not fill the file; the message names `path`.
    """
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise InputError(f"{path}: holds {size} bytes, expected a safetensors file")
    prefix = bytearray(8)
    read_into(file, 0, memoryview(prefix))
    length = int.from_bytes(prefix, "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise InputError(
            f"{path}: the header claims {length} bytes, expected at most {min(size - 8, MAX_HEADER_BYTES)}: "
            "truncated, or not a safetensors file"
        )
    text = bytearray(length)
    read_into(file, 8, memoryview(text))
    metadata, header = _parse_header(path, text)
    tensors = [_stored_tensor(path, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_tiling(path, tensors, 8 + length, size)
    return metadata, tensors


def _parse_header(path: Path, text: bytearray) -> tuple[dict[str, str], dict[str, Any]]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:  # bad syntax and bad UTF-8 are both ValueErrors
        raise InputError(f"{path}: the header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: the header is a JSON {type(header).__name__}, expected an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: __metadata__ is {_repr.repr(metadata)}, expected an object of strings")
    return metadata, header


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{_repr.repr(repeated)} is there twice")
    return values


def _stored_tensor(path: Path, name: str, entry: Any, data_offset: int) -> StoredTensor:
    """Check one header entry by itself."""
    where = f"{path}: tensor {_repr.repr(name)}"
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not (isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise InputError(f"{where} is described as {_repr.repr(entry)}, expected a dtype, a shape and two data_offsets")
    begin, end = offsets
    bits = 8 * _DTYPES[dtype].itemsize if dtype in _DTYPES else _OTHER_BITS.get(dtype)
    if bits is None:
        known = ", ".join((*_DTYPES, *_OTHER_BITS))
        raise InputError(f"{where} has dtype {_repr.repr(dtype)}, expected one of {known}")
    nbytes = -(-math.prod(shape) * bits // 8)
    if end - begin != nbytes:
        raise InputError(f"{where} has data_offsets {offsets}, expected {nbytes} bytes for {dtype} {_repr.repr(shape)}")
    return StoredTensor(path, name, dtype, tuple(shape), data_offset + begin, nbytes)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    """A list of at most eight integers that a file can hold; the bounds keep products of hostile ones small."""
    return isinstance(value, list) and len(value) <= 8 and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_tiling(path: Path, tensors: list[StoredTensor], begin: int, end: int) -> None:
    """The sorted tensors must tile bytes [begin, end) of the file, as the format demands: else it is damaged."""
    for tensor in tensors:
        if tensor.offset + tensor.nbytes > end:
            last = tensor.offset + tensor.nbytes
            raise InputError(f"{tensor} ends at byte {last}, but the file has {end}: is the download complete?")
        if tensor.offset != begin:
            problem = "it overlaps another tensor" if tensor.offset < begin else "no tensor has the bytes between"
            raise InputError(f"{tensor} begins at byte {tensor.offset}, expected {begin}: {problem}")
        begin += tensor.nbytes
    if begin != end:
        raise InputError(f"{path}: has {end} bytes, but its header describes {begin}")


# --- From the checkpoint's tensors to ours ----------------------------------------------------------------------------


def _assign(directory: Path, tensors: list[StoredTensor], table: NameTable) -> list[Assigned]:
    """Each tensor of the model with its place. Every place of the table is taken, once, by a tensor of its shape."""
    assigned: dict[tuple[str, int], Assigned] = {}
    extra: list[StoredTensor] = []
    scales = _scales(tensors) if table.quantized else {}
    for tensor in tensors:
        place = table.find(tensor.name)
        if place is None:
            extra.append(tensor)
            continue
        scale = scales.get(tensor.name)
        _check_dtype(tensor, place, scale, table)
        if tensor.shape != place.shape:
            raise InputError(f"{tensor} has shape {list(tensor.shape)}, expected {list(place.shape)}")
        if place.slot in assigned:
            other = _repr.repr(assigned[place.slot].tensor.name)
            raise InputError(f"{tensor} is also there as {other}, expected it once")
        assigned[place.slot] = Assigned(tensor, place, None if tensor.is_readable else scale)
    head, embedding = assigned.get(("head.weight", 0)), ("embed.weight", 0)
    if head and table.is_redundant(head.place) and embedding not in assigned:  # a tied matrix under its other name
        del assigned[head.place.slot]
        kept = tuple(map(range, head.place.shape))
        assigned[embedding] = head._replace(place=head.place._replace(name="embed.weight", kept=kept))
    used = {entry.scale.name for entry in assigned.values() if entry.scale}
    extra = [tensor for tensor in extra if tensor.name not in used]
    expected = table.expected([tensor.name for tensor in tensors])
    missing = list(itertools.islice((name for name, place in expected if place.slot not in assigned), _LISTED))
    problems = []
    if missing:
        found = sum(1 for entry in assigned.values() if not table.is_redundant(entry.place))
        problems.append(f"lacks {_listed(missing, table.count() - found)}")
    # Integers are buffers, wherever they are, but for zero points. A parameter without a place means another model.
    parameters = [t.name for t in extra if t.is_readable or isinstance(t, PackedTensor) or table.quantized]
    suspects = [tensor.name for tensor in extra] if missing else parameters
    wrong = [name for name in suspects if missing or table.changes_the_model(name)]
    if wrong:
        problems.append(f"holds {_listed(wrong, len(wrong))}, for which the config has no place")
    if problems:
        raise InputError(f"{directory}: the checkpoint {' and '.join(problems)}")
    return list(assigned.values())


def _check_dtype(tensor: StoredTensor, place: Place, scale: StoredTensor | None, table: NameTable) -> None:
    """Raises InputError for a tensor whose dtype its place cannot have."""
    in_layer = len(place.shape) == 2 and place.name.startswith("layers.")
    if isinstance(tensor, PackedTensor) or (table.packed and in_layer):
        if not (isinstance(tensor, PackedTensor) and in_layer and not place.interleaved):
            here = "4 bits, as the config says" if in_layer else "another one: only layers come in 4 bits"
            raise InputError(f"{tensor} has dtype {tensor.stored_as}, expected {here}")
    elif not tensor.is_readable and not (scale and tensor.stored_as in _QUANTIZED_DTYPES):
        lacks = f", or {' or '.join(_QUANTIZED_DTYPES)} with a weight_scale" if table.quantized else ""
        raise InputError(
            f"{tensor} has dtype {tensor.stored_as}, expected one of {', '.join(_DTYPES)}{lacks}: "
            "other quantized weights are not supported"
        )


def _tensors(directory: Path, config: ModelConfig) -> list[StoredTensor]:
    """read_headers, with one tensor for each matrix in 4 bits."""
    tensors = read_headers(directory)
    if config.packing is None:
        return tensors
    table, form = NameTable(config), FORMS[config.packing.method]
    by_name = {tensor.name: tensor for tensor in tensors}
    merged: dict[str, StoredTensor] = {}
    for tensor in tensors:
        module, _, kind = tensor.name.rpartition(".")
        if kind == form.names[0]:
            merged[tensor.name] = _packed_tensor(tensor, table.find(f"{module}.weight"), by_name, config.packing)
            continue
        belongs = kind in (*form.names, *GROUPS_OF_COLUMNS, *SHAPES)
        # Some exporters give every module a bias, whether the model has one or not.
        belongs |= kind == "bias" and table.find(tensor.name) is None and _is_zero(tensor)
        if not belongs or f"{module}.{form.names[0]}" not in by_name:
            merged[tensor.name] = tensor
    return list(merged.values())


def _packed_tensor(
    q: StoredTensor, place: Place | None, by_name: Mapping[str, StoredTensor], packing: Packing
) -> PackedTensor:
    """A matrix from the tensor of its q, once those that belong to it are there and have the shapes that its place
    needs, or without a place those that q implies.
    """
    form, module = FORMS[packing.method], q.name.rpartition(".")[0]
    zero, scale = (by_name.get(f"{module}.{name}") for name in form.names[1:])
    groups = next((by_name[f"{module}.{name}"] for name in GROUPS_OF_COLUMNS if f"{module}.{name}" in by_name), None)
    absent = {form.names[2]: scale is None, form.names[1]: zero is None and not packing.symmetric}
    absent[form.groups] = groups is None and packing.act_order
    missing = next((name for name, is_absent in absent.items() if is_absent), None)
    if scale is None or missing:
        raise InputError(f"{q} comes without {_repr.repr(f'{module}.{missing}')}")
    stored = form.shape(q.shape) if len(q.shape) == 2 else (0, 0)
    N, K = place.shape if place and len(place.shape) == 2 else stored
    if not N or not K or N % 8 or K % 8:
        found = f"{q} is {q.stored_as} {_repr.repr(list(q.shape))}, of a matrix of shape {[N, K]}"
        raise InputError(f"{found}, expected multiples of 8 rows and columns")
    group_size = packing.group_size or K
    for tensor, shape in zip((q, zero, scale), form.shapes(N, K, group_size), strict=True):
        is_right = tensor is None or (tensor.is_readable if tensor is scale else tensor.stored_as == "I32")
        if tensor is not None and not (is_right and tensor.shape == shape):
            expected = f"{'floating-point numbers' if tensor is scale else 'I32'} {list(shape)}, groups of {group_size}"
            raise InputError(f"{tensor} is {tensor.stored_as} {_repr.repr(list(tensor.shape))}, expected {expected}")
    if groups is not None and (groups.stored_as, groups.shape) != ("I32", (K,)):
        raise InputError(f"{groups} is {groups.stored_as} {_repr.repr(list(groups.shape))}, expected I32 {[K]}")
    where = q.path, f"{module}.weight", q.stored_as, (N, K), q.offset, q.nbytes
    return PackedTensor(*where, form, group_size, scale, zero, groups)


def _is_zero(bias: StoredTensor) -> bool:
    return bias.is_readable and not _read_whole(bias).any()


def _scales(tensors: list[StoredTensor]) -> dict[str, StoredTensor]:
    """The scale of each quantized matrix by the matrix's name. One number or one per row, or an error."""
    by_name = {tensor.name: tensor for tensor in tensors}
    scales = {}
    for name, scale in by_name.items():
        weight = by_name.get(name.removesuffix("_scale"))
        if not name.endswith(".weight_scale") or weight is None:
            continue
        if not scale.is_readable or scale.shape not in ((), (1,), (1, 1), weight.shape[:1], (*weight.shape[:1], 1)):
            found = f"{scale.stored_as} {list(scale.shape)}"
            raise InputError(f"{scale} is {found}, expected floating-point numbers, one or one per row")
        scales[weight.name] = scale
    return scales


def _warn_of_unused(directory: Path, tensors: list[StoredTensor], assigned: list[Assigned]) -> None:
    used = {tensor.name for entry in assigned for tensor in (entry.tensor, entry.scale) if tensor}
    unused = [tensor.name for tensor in tensors if tensor.name not in used]
    if unused:
        listed = _listed(unused, len(unused))
        warnings.warn(f"{directory}: not used, the model has no such part: {listed}", MinireaWarning, stacklevel=3)


def _listed(names: list[str], count: int) -> str:
    more = f" and {count - _LISTED} more" if count > _LISTED else ""
    return ", ".join(map(_repr.repr, names[:_LISTED])) + more


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
            if not torch.equal(_read_whole(tensor.groups), in_order):
                raise InputError(f"{tensor.groups} mixes columns (act-order, desc_act), expected groups of neighbours")
        q, scale = _read_whole(tensor, form.shapes(N, K, tensor.group_size)[0]), _read_whole(tensor.scale)
        if not bool(scale.float().isfinite().all()):
            raise InputError(f"{tensor.scale} has a NaN or infinity, expected finite numbers")
        with workspace.on_stream, torch.inference_mode():
            q, scale = self._rows_first(q), self._rows_first(scale).float()
            zero = None if tensor.zero is None else self._rows_first(_read_whole(tensor.zero))
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


# --- Reading ----------------------------------------------------------------------------------------------------------


def open_file(path: Path, what: str = "tensors") -> FileIO:
    """An open regular file; `what` is expected there, for messages."""
    check_regular(path, what)
    try:
        return FileIO(path)
    except OSError as error:
        raise unreadable(path, error) from None


def read_into(file: FileIO, offset: int, buffer: memoryview) -> None:
    """Fill the buffer with the file's bytes from `offset` on."""
    try:
        file.seek(offset)
        while buffer:
            count = file.readinto(buffer)
            if not count:
                raise InputError(f"{file.name}: ends at byte {file.tell()}: it was cut short while it was being read")
            buffer = buffer[count:]
    except OSError as error:
        raise InputError(f"{file.name}: cannot be read: {error.strerror}") from None


def _read_whole(tensor: StoredTensor, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    """A tensor's numbers, on the CPU; with another shape than its own."""
    values = torch.empty(shape or tensor.shape, dtype=torch.int32 if tensor.stored_as == "I32" else tensor.dtype)
    with open_file(tensor.path) as file:
        read_into(file, tensor.offset, bytes_of(values))
    return values


def _read_scale(scale: StoredTensor, dimensions: int) -> torch.Tensor:
    """A quantized matrix's scale, float32 [1, ...] or [rows, 1, ...] with as many dimensions as the matrix."""
    return _read_whole(scale).float().view(-1, *(1,) * (dimensions - 1))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's memory. numpy has no bfloat16, hence the view."""
    return tensor.view(-1).view(torch.uint8).numpy().data
