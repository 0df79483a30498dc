"""The safetensors format: which files a checkpoint has, what their headers say, and reading them.

An 8-byte little-endian length, a JSON header of that length that gives each tensor's dtype, shape and byte range, then
the tensors' bytes (https://github.com/huggingface/safetensors). Files are never mapped: mapped pages count as resident
memory, so a mapped 16 GB checkpoint looks like a second copy of the model.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections import Counter
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Final, TypeGuard

import torch

from minirea.errors import InputError, MissingFileError
from minirea.files import check_regular, list_directory, unreadable
from minirea.json_object import JsonObject
from minirea.weights.names import is_ignored

MAX_HEADER_BYTES: Final = 100_000_000  # the format's own

DTYPES: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Of matrices with a scale.
QUANTIZED_DTYPES: Final = {"F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8}
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

_repr = reprlib.Repr()  # names and shapes of hostile files: bounded, on one line
_repr.maxstring, _repr.maxother, _repr.maxlong = 120, 120, 40
brief: Final = _repr.repr


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
        return f"{self.path}: tensor {brief(self.name)}"

    @property
    def is_readable(self) -> bool:
        """Whether it has a dtype that a weight may have. Others are buffers, or quantized."""
        return self.stored_as in DTYPES

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES.get(self.stored_as) or QUANTIZED_DTYPES[self.stored_as]


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
                f"{index.source}: {brief(tensor_name)} is in {brief(shard)}, which is not in {directory}"
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
        raise InputError(f"{path}: __metadata__ is {brief(metadata)}, expected an object of strings")
    return metadata, header


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{brief(repeated)} is there twice")
    return values


def _stored_tensor(path: Path, name: str, entry: Any, data_offset: int) -> StoredTensor:
    """Check one header entry by itself."""
    where = f"{path}: tensor {brief(name)}"
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not (isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise InputError(f"{where} is described as {brief(entry)}, expected a dtype, a shape and two data_offsets")
    begin, end = offsets
    bits = 8 * DTYPES[dtype].itemsize if dtype in DTYPES else _OTHER_BITS.get(dtype)
    if bits is None:
        known = ", ".join((*DTYPES, *_OTHER_BITS))
        raise InputError(f"{where} has dtype {brief(dtype)}, expected one of {known}")
    nbytes = -(-math.prod(shape) * bits // 8)
    if end - begin != nbytes:
        raise InputError(f"{where} has data_offsets {offsets}, expected {nbytes} bytes for {dtype} {brief(shape)}")
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


def read_whole(tensor: StoredTensor, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    """A tensor's numbers, on the CPU; with another shape than its own."""
    values = torch.empty(shape or tensor.shape, dtype=torch.int32 if tensor.stored_as == "I32" else tensor.dtype)
    with open_file(tensor.path) as file:
        read_into(file, tensor.offset, bytes_of(values))
    return values


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's memory. numpy has no bfloat16, hence the view."""
    return tensor.view(-1).view(torch.uint8).numpy().data
