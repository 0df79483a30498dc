"""Contexts in files: what a model has read, so that it is read once.

A file is in the safetensors format, so that other programs can look into it. Its metadata say what it is ("format",
"version"), which model has read it under which settings ("model", "model_name", "settings"), and what a program that
uses the session keeps with it ("notes"). Its tensors, for L layers, G key/value heads, N cached tokens, D dimensions:

    ids            I64 [N or N + 1]   all tokens; the last sampled one may not be cached yet
    checksums      I64 [1 + blocks]   of ids, then of the blocks of all others in this order
    k.0 ... k.L-1  [G, N, D]          keys without RoPE, or k_rotated.0 ... where only rotated keys are kept
    v.0 ... v.L-1  [G, N, D]
    winners.0 ...  I32 [1, R, H K]    of recent tokens, as KVCache.winners has them, where settings ask for any

Keys that are kept with RoPE as well are rotated again when a file is opened. A block is BLOCK_BYTES of one head; its
checksum is the sum of its bytes as 64-bit integers, which runs at the speed of memory and finds damage, not malice.
Blocks go between the file and their place in the cache, by a few threads, with no copy of the whole in between.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minirea.cache import NO_WINNERS, KVCache
from minirea.checks import shown
from minirea.config import DTYPES, MODES, QUANTIZE, ModelConfig, ReAttentionConfig, fields_of
from minirea.errors import InputError
from minirea.files import check_room, is_there, replacing, unreadable
from minirea.isolation import isolated
from minirea.pinned import wait_for_device
from minirea.progress import bar_of_bytes
from minirea.threads import thread_pool
from minirea.weights.safetensors import MAX_HEADER_BYTES, StoredTensor, bytes_of, open_file, read_header

FORMAT: Final = "minirea context"
VERSION: Final = "2"
_EXPECTED: Final = "expected a file that `minirea read --save` has written"
# Bytes behind the length of the header, as `_header` writes them.
_BEGINNING: Final = f'{{"__metadata__":{{"format":"{FORMAT}",'.encode()
BLOCK_BYTES: Final = 8 * 2**20
READERS: Final = 4
WRITERS: Final = 2  # more write too far apart: disks and file systems like one place after the other
_STORED_AS: Final = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
}


@dataclass(frozen=True)
class Origin:
    """What a context belongs to: it means nothing to another model, or under other settings.

    Args:
        model: what weights.fingerprint returns.
        model_name: for messages.
        settings: by the names of `load`'s arguments: attention, dtype, quantize, and the sizes that the mode
            depends on.
    """

    model: str
    model_name: str
    settings: dict[str, int | str | None]


class _Block(NamedTuple):
    """Rows of one head, [at most BLOCK_BYTES, D], contiguous, and where they lie in the file."""

    rows: Tensor
    offset: int


@isolated()
def save_context(
    path: str | Path, cache: KVCache, ids: Sequence[int], origin: Origin, notes: dict[str, str], progress: bool = False
) -> None:
    """Write a context to a file, which replaces an old one once it is complete.

    Raises:
        InputError: there is nothing to save, notes are not strings, the file is there and no context, or it cannot be
            written.
    """
    check_is_context_or_new(path)
    if not isinstance(notes, dict) or not all(isinstance(text, str) for note in notes.items() for text in note):
        raise InputError(f"{path}: not saved: notes are {shown(notes)}, expected a dictionary of strings")
    if not ids:
        raise InputError(f"{path}: not saved: the context is empty, expected at least one token")
    ids_M = torch.tensor(ids, dtype=torch.int64)
    if cache.placement.far_arrays and cache.device.type == "cuda":
        wait_for_device(cache.device)  # the last step may still write to the host's memory
    parts = _parts(cache, cache.seq_len)
    sums = torch.zeros(1 + _num_blocks(parts), dtype=torch.int64)
    shapes = {"ids": (ids_M.dtype, (len(ids),)), "checksums": (sums.dtype, tuple(sums.shape))}
    shapes |= {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()}
    header, offsets = _header(shapes, _metadata(origin, notes))
    if len(header) - 8 > MAX_HEADER_BYTES:  # no reader of the format would open it
        found = f"its notes take {len(header):,} bytes with what else is in the header"
        raise InputError(f"{path}: not saved: {found}, expected at most {MAX_HEADER_BYTES:,}")
    with replacing(path) as file:
        check_room(file, path, offsets["end"])
        _write_at(file, 0, memoryview(header))
        _write_at(file, offsets["ids"], bytes_of(ids_M))
        sums[0] = _checksum(bytes_of(ids_M))
        blocks = list(_blocks(parts, offsets))

        def write(block: _Block) -> int:
            with torch.inference_mode():
                view = bytes_of(block.rows.cpu().contiguous())
            _write_at(file, block.offset, view)
            return _checksum(view)

        sums[1:] = torch.tensor(list(_in_parallel(write, blocks, WRITERS, "saving", progress)), dtype=torch.int64)
        _write_at(file, offsets["checksums"], bytes_of(sums))


def check_is_context_or_new(path: str | Path) -> None:
    """Whether a context may be saved under a name: as of `--save book.txt`, what a file holds could be meant to stay.

    Raises:
        InputError: a file of that name holds something else.
    """
    if not os.path.isfile(path):
        return
    with open_file(Path(path), "a context") as file:
        size = os.fstat(file.fileno()).st_size
        start = _bytes_at(file, 0, min(size, 8 + len(_BEGINNING)))
        if not size or (size > 8 and _BEGINNING.startswith(start[8:])):
            return
        with contextlib.suppress(InputError):
            if read_header(file, Path(path))[0].get("format") == FORMAT:
                return
    raise InputError(f"{path}: not saved: is there and no context, expected a new name, or that of a context")


class StoredContext:
    """A context's file whose header has been checked; `read_into` reads the rest.

    The file stays open in between, so that one that replaces it meanwhile changes nothing.

    Attributes:
        ids: all tokens.
        num_cached: those of them whose keys and values it holds.
        notes: what was saved with it.
    """

    def __init__(
        self, path: str | Path, model: ModelConfig, origin: Origin, winners_shape: tuple[int, int, int] = NO_WINNERS
    ) -> None:
        """Open and check a file.

        Args:
            winners_shape: of the cache that it will be read into.

        Raises:
            MissingFileError: no such file.
            InputError: it is no context, damaged, or of another origin; the message names both values.
        """
        self.path = path
        if not is_there(path):
            raise unreadable(path, FileNotFoundError(2, ""))
        self._file = open_file(Path(path), "a context")
        try:
            metadata, tensors = self._header()
            self._check_origin(metadata, origin, model.trained_context)
            self.notes = self._notes(metadata)
            self._tensors = {tensor.name: tensor for tensor in tensors}
            self.num_cached = self._check_tensors(model, origin, winners_shape)
            self.ids = self._read_ids(model.vocab_size)
        except BaseException:
            self._file.close()
            raise

    def read_into(self, cache: KVCache, progress: bool = False) -> None:
        """Fill an empty cache of at least num_cached tokens, and close the file.

        Raises:
            InputError: the file is damaged.
        """
        offsets = {name: tensor.offset for name, tensor in self._tensors.items()}
        expected = self._read_small("checksums")[1:]
        parts = _parts(cache, self.num_cached)

        def read(block: _Block) -> int:
            with torch.inference_mode():
                in_place = block.rows.is_cpu and block.rows.is_contiguous()
                rows = block.rows if in_place else torch.empty(block.rows.shape, dtype=block.rows.dtype)
                view = bytes_of(rows)
                _read_at(self._file, block.offset, view)
                if not in_place:
                    block.rows.copy_(rows)
            return _checksum(view)

        with self._file:
            blocks = list(_blocks(parts, offsets))
            for index, found in enumerate(_in_parallel(read, blocks, READERS, "context", progress)):
                if found != expected[index]:
                    raise InputError(f"{self.path}: is damaged: bytes from {blocks[index].offset} on have changed")
        cache.filled(self.num_cached)

    def close(self) -> None:
        self._file.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def _header(self) -> tuple[dict[str, str], list[StoredTensor]]:
        try:
            return read_header(self._file, Path(self.path))
        except InputError as error:
            found = _not_whole(self._file)
            raise InputError(f"{self.path}: {found}" if found else str(error)) from None

    def _check_origin(self, metadata: dict[str, str], origin: Origin, trained_context: int) -> None:
        if metadata.get("format") != FORMAT:
            raise InputError(f"{self.path}: is no context, {_EXPECTED}")
        if metadata.get("version") != VERSION:
            found = metadata.get("version")
            raise InputError(f"{self.path}: is a context of version {found!r:.40}, expected {VERSION!r}: read it anew")
        if metadata.get("model") != origin.model:
            found = f"{metadata.get('model_name')!r:.80} ({metadata.get('model')!r:.40})"
            raise InputError(
                f"{self.path}: was read by the model {found}, expected {origin.model_name!r} ({origin.model!r}): "
                "other weights, or another config.json"
            )
        settings = {"quantize": None} | self._object(metadata, "settings")
        differing = [name for name, expected in origin.settings.items() if settings.get(name) != expected]
        if not differing:
            return
        needed = self._needed(settings, differing, trained_context)
        names = [name for name in differing if name in settings]
        found, expected = (_listed({name: x[name] for name in names}) for x in (settings, origin.settings))
        raise InputError(f"{self.path}: was read with {found}, expected {expected}: load the model {needed}")

    def _needed(self, settings: dict[str, Any], differing: list[str], trained_context: int) -> str:
        """What to load the model with for a file's settings: all of it at once."""
        for name, allowed in (("attention", MODES), ("dtype", DTYPES), ("quantize", (None, *QUANTIZE))):
            if settings.get(name) not in allowed:
                found = f"{name} {settings.get(name)!r:.40}"
                raise InputError(f"{self.path}: settings have {found}, expected one of {allowed}")
        mode = settings["attention"]
        missing = next((name for name in fields_of(mode) if settings.get(name) is None), None)
        if missing is not None:
            raise InputError(
                f"{self.path}: was read by a build without `{missing}`, expected one with it: read it anew"
            )
        arguments: dict[str, Any] = {
            name: settings[name] for name in ("attention", "dtype", "quantize") if name in differing
        }
        scope = {name: settings[name] for name in fields_of(mode)}
        try:
            arguments |= _arguments_for(mode, scope, differing, trained_context)
        except InputError as error:
            raise InputError(f"{self.path}: settings are none that a model can have: {error}") from None
        passed = {name: value for name, value in arguments.items() if value is not None}
        without = ["without `quantize`"] if len(passed) < len(arguments) else []
        return " and ".join([*([f"with {_listed(passed)}"] if passed else []), *without])

    def _notes(self, metadata: dict[str, str]) -> dict[str, str]:
        notes = self._object(metadata, "notes")
        if not all(isinstance(value, str) for value in notes.values()):
            raise InputError(f"{self.path}: notes are malformed, expected strings")
        return notes

    def _object(self, metadata: dict[str, str], key: str) -> dict[str, Any]:
        try:
            value = json.loads(metadata.get(key, ""))
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise InputError(f"{self.path}: {key} is {metadata.get(key)!r:.80}, expected a JSON object")
        return value

    def _check_tensors(self, model: ModelConfig, origin: Origin, winners_shape: tuple[int, int, int]) -> int:
        """Whether exactly those of this model are there; returns the number of cached tokens."""
        first = self._tensors.get("v.0")
        cached = first.shape[1] if first and len(first.shape) == 3 else 0
        kv_shape = (model.num_kv_heads, cached, model.head_dim)
        dtype = getattr(torch, str(origin.settings["dtype"]))
        keys = "k_rotated" if origin.settings["attention"] == "full" else "k"
        kinds = {keys: (dtype, kv_shape), "v": (dtype, kv_shape)}
        if winners_shape != NO_WINNERS:
            kinds["winners"] = torch.int32, (1, winners_shape[0], winners_shape[1] * winners_shape[2])
        expected: dict[str, tuple[str, list[tuple[int, ...]]]] = {
            f"{kind}.{layer}": (_STORED_AS[dtype], [shape])
            for kind, (dtype, shape) in kinds.items()
            for layer in range(model.num_layers)
        }
        blocks = model.num_layers * sum(_blocks_of(shape, dtype.itemsize) for dtype, shape in kinds.values())
        expected |= {"ids": ("I64", [(cached,), (cached + 1,)]), "checksums": ("I64", [(1 + blocks,)])}
        for name in sorted(expected.keys() | self._tensors.keys()):
            tensor = self._tensors.get(name)
            if tensor is None:
                raise InputError(f"{self.path}: tensor {name!r} is missing")
            if name not in expected:
                raise InputError(f"{tensor} is there, expected only those of this model's context")
            stored_as, shapes = expected[name]
            if tensor.stored_as != stored_as or tensor.shape not in shapes:
                found = f"{tensor.stored_as} {list(tensor.shape)}"
                raise InputError(f"{tensor} is {found}, expected {stored_as} {list(shapes[0])}")
        return cached

    def _read_ids(self, vocab_size: int) -> list[int]:
        ids = self._read_small("ids")
        if _checksum(bytes_of(ids)) != self._read_small("checksums")[0]:
            raise InputError(f"{self.path}: is damaged: its token ids have changed")
        if not len(ids) or not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise InputError(f"{self.path}: token ids are not all from 0 to {vocab_size - 1}")
        values: list[int] = ids.tolist()
        return values

    def _read_small(self, name: str) -> Tensor:
        tensor: StoredTensor = self._tensors[name]
        values = torch.empty(tensor.shape, dtype=torch.int64)
        _read_at(self._file, tensor.offset, bytes_of(values))
        return values


def context_bytes(model: ModelConfig, num_tokens: int, dtype: torch.dtype) -> int:
    """Of keys and values in the file of a context."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * dtype.itemsize * num_tokens


def _arguments_for(mode: str, scope: dict[str, Any], differing: list[str], trained_context: int) -> dict[str, Any]:
    """Arguments of `load` that give all of `scope`, whatever others are passed with them.

    Those that are `differing`, and of the others each whose default, which may follow from the former, is another one.
    What else is passed has its value in `scope`, and so changes no default.

    Raises:
        InputError: no model can have this scope.
    """
    fixed = {"span_top_k": 0} if mode == "streaming" else {}
    whole = ReAttentionConfig.for_context(trained_context, **scope, **fixed)
    given = {name: value for name, value in scope.items() if name in differing}
    while True:
        try:
            found = ReAttentionConfig.for_context(trained_context, **given, **fixed)
        except InputError:  # these do not go with the defaults of the others
            given = scope
            break
        other = next((name for name, value in scope.items() if getattr(found, name) != value), None)
        if other is None:
            break
        given = given | {other: scope[other]}
    beyond = mode != "full" and whole.max_scope > trained_context
    return given | ({"allow_out_of_distribution": True} if beyond else {})


def _listed(settings: dict[str, Any]) -> str:
    """As Python's arguments."""
    named = (f"no `{name}`" if value is None else f"{name}={value!r:.40}" for name, value in settings.items())
    return ", ".join(named)


def _parts(cache: KVCache, num_tokens: int) -> dict[str, Tensor]:
    """The cache's tensors by their names in a file, of so many tokens, [heads, rows, D] each.

    The layers' keys and values in turn, then their winners.
    """
    layers = range(len(cache.v))
    parts = {f"{name}.{layer}": part[:, :num_tokens] for layer in layers for name, part in cache.stored(layer).items()}
    winners = enumerate(cache.winners.flatten(2)) if cache.recent_size else ()
    return parts | {f"winners.{layer}": winner_RX[None] for layer, winner_RX in winners}  # X = H K


def _rows_per_block(row_bytes: int) -> int:
    return max(1, BLOCK_BYTES // row_bytes)


def _num_blocks(parts: dict[str, Tensor]) -> int:
    return sum(_blocks_of(tuple(part.shape), part.dtype.itemsize) for part in parts.values())


def _blocks_of(shape: tuple[int, ...], itemsize: int) -> int:
    heads, rows, D = shape
    return heads * -(-rows // _rows_per_block(D * itemsize))


def _blocks(parts: dict[str, Tensor], offsets: dict[str, int]) -> Iterator[_Block]:
    for name, part_GND in parts.items():
        num_tokens = part_GND.shape[1]
        row_bytes = part_GND.shape[2] * part_GND.dtype.itemsize
        size = _rows_per_block(row_bytes)
        for head, part_ND in enumerate(part_GND):
            for start in range(0, num_tokens, size):
                rows = part_ND[start : start + size]
                yield _Block(rows, offsets[name] + (head * num_tokens + start) * row_bytes)


def _in_parallel(
    do: Callable[[_Block], int], blocks: list[_Block], threads: int, what: str, progress: bool
) -> Iterator[int]:
    """Results of `do`, in the order of the blocks, by so many threads, with a bar of bytes on stderr."""
    total = sum(block.rows.nbytes for block in blocks)
    with bar_of_bytes(total, what, progress) as bar, thread_pool(threads, what) as pool:
        for block, result in zip(blocks, pool.map(do, blocks), strict=True):
            bar.update(block.rows.nbytes)
            yield result


def _metadata(origin: Origin, notes: dict[str, str]) -> dict[str, str]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": origin.model,
        "model_name": origin.model_name,
        "settings": json.dumps(origin.settings),
        "notes": json.dumps(notes),
    }


def _header(
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The beginning of the file, and each tensor's offset in it; "end" is the file's size."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    ends = [0]
    for name, (dtype, shape) in shapes.items():
        ends.append(ends[-1] + math.prod(shape) * dtype.itemsize)
        entries[name] = {"dtype": _STORED_AS[dtype], "shape": shape, "data_offsets": ends[-2:]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    begin = 8 + len(text)
    offsets = dict(zip([*shapes, "end"], (begin + end for end in ends), strict=True))
    return len(text).to_bytes(8, "little") + text, offsets


def _not_whole(file: FileIO) -> str | None:
    """What a file is that is no safetensors file, or only the beginning of a context; None of others."""
    size = os.fstat(file.fileno()).st_size
    start = bytes(_bytes_at(file, 0, min(size, 8 + len(_BEGINNING))))
    begin = 8 + int.from_bytes(start[:8], "little")
    if not _BEGINNING.startswith(start[8:]) or size <= 8:
        kind = "no context" if size else "empty"
        return f"is {kind}, {_EXPECTED}" if start[8:9] != b"{" else None
    if begin > 8 + MAX_HEADER_BYTES:
        return None
    found = f"is cut short: it has {size:,} bytes, expected"
    if size < begin:
        return f"{found} more than {begin:,}"
    try:
        entries = json.loads(_bytes_at(file, 8, begin - 8))
        whole = begin + max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    return f"{found} {whole:,}" if isinstance(whole, int) and size < whole < 2**63 else None


def _bytes_at(file: FileIO, offset: int, count: int) -> bytearray:
    """Errors as of _read_at."""
    data = bytearray(count)
    _read_at(file, offset, memoryview(data))
    return data


def _checksum(data: memoryview) -> int:
    """The sum of the bytes as signed 64-bit integers, modulo 2**64; of single bytes where they are no multiple of 8."""
    if not data.nbytes:
        return 0
    return int(np.frombuffer(data, dtype=np.int64 if data.nbytes % 8 == 0 else np.uint8).sum(dtype=np.int64))


def _write_at(file: FileIO, offset: int, data: memoryview) -> None:
    while data:
        count = os.pwrite(file.fileno(), data, offset)
        data, offset = data[count:], offset + count


def _read_at(file: FileIO, offset: int, data: memoryview) -> None:
    """Unlike weights.safetensors.read_into for threads that share a file, whose position stays."""
    try:
        while data:
            count = os.preadv(file.fileno(), [data], offset)
            if not count:
                raise InputError(f"{file.name}: ends at byte {offset}: it was cut short while it was being read")
            data, offset = data[count:], offset + count
    except OSError as error:
        raise InputError(f"{file.name}: cannot be read: {error.strerror}") from None
