"""Which of the model's tensors each tensor of a checkpoint fills, and the checks that all of them are there."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from minirea.config import ModelConfig, Packing
from minirea.errors import InputError, MinireaWarning
from minirea.weights.names import NameTable, Place
from minirea.weights.packed import FORMS, GROUPS_OF_COLUMNS, SHAPES, Form
from minirea.weights.safetensors import DTYPES, QUANTIZED_DTYPES, StoredTensor, brief, read_headers, read_whole

_LISTED: Final = 3  # how many names a message lists before it only counts


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


def assign(directory: Path, tensors: list[StoredTensor], table: NameTable) -> list[Assigned]:
    """Each tensor of the model with its place. Every place of the table is taken, once, by a tensor of its shape.

    Raises:
        InputError: a tensor is missing, doubled, of another shape or dtype, or one that only another model has.
    """
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
            other = brief(assigned[place.slot].tensor.name)
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
    elif not tensor.is_readable and not (scale and tensor.stored_as in QUANTIZED_DTYPES):
        lacks = f", or {' or '.join(QUANTIZED_DTYPES)} with a weight_scale" if table.quantized else ""
        raise InputError(
            f"{tensor} has dtype {tensor.stored_as}, expected one of {', '.join(DTYPES)}{lacks}: "
            "other quantized weights are not supported"
        )


def tensors_of(directory: Path, config: ModelConfig) -> list[StoredTensor]:
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
        raise InputError(f"{q} comes without {brief(f'{module}.{missing}')}")
    stored = form.shape(q.shape) if len(q.shape) == 2 else (0, 0)
    N, K = place.shape if place and len(place.shape) == 2 else stored
    if not N or not K or N % 8 or K % 8:
        found = f"{q} is {q.stored_as} {brief(list(q.shape))}, of a matrix of shape {[N, K]}"
        raise InputError(f"{found}, expected multiples of 8 rows and columns")
    group_size = packing.group_size or K
    for tensor, shape in zip((q, zero, scale), form.shapes(N, K, group_size), strict=True):
        is_right = tensor is None or (tensor.is_readable if tensor is scale else tensor.stored_as == "I32")
        if tensor is not None and not (is_right and tensor.shape == shape):
            expected = f"{'floating-point numbers' if tensor is scale else 'I32'} {list(shape)}, groups of {group_size}"
            raise InputError(f"{tensor} is {tensor.stored_as} {brief(list(tensor.shape))}, expected {expected}")
    if groups is not None and (groups.stored_as, groups.shape) != ("I32", (K,)):
        raise InputError(f"{groups} is {groups.stored_as} {brief(list(groups.shape))}, expected I32 {[K]}")
    where = q.path, f"{module}.weight", q.stored_as, (N, K), q.offset, q.nbytes
    return PackedTensor(*where, form, group_size, scale, zero, groups)


def _is_zero(bias: StoredTensor) -> bool:
    return bias.is_readable and not read_whole(bias).any()


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


def warn_of_unused(directory: Path, tensors: list[StoredTensor], assigned: list[Assigned]) -> None:
    """MinireaWarning, at load_weights' caller, of tensors that the model has no use for."""
    used = {tensor.name for entry in assigned for tensor in (entry.tensor, entry.scale) if tensor}
    unused = [tensor.name for tensor in tensors if tensor.name not in used]
    if unused:
        listed = _listed(unused, len(unused))
        warnings.warn(f"{directory}: not used, the model has no such part: {listed}", MinireaWarning, stacklevel=3)


def _listed(names: list[str], count: int) -> str:
    more = f" and {count - _LISTED} more" if count > _LISTED else ""
    return ", ".join(map(brief, names[:_LISTED])) + more
