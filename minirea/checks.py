"""Values that a caller passes: numpy's numbers are like Python's own, and what is no value is refused by its name."""

from __future__ import annotations

import difflib
import numbers
import operator
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

from minirea.errors import InputError


def integer(name: str, value: Any, lowest: int, highest: int | None = None) -> int:
    """`value` as an int from `lowest` to `highest`, for which True and 1.0 do not pass. Raises InputError."""
    try:
        number = lowest - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = lowest - 1
    if number < lowest or (highest is not None and number > highest):
        expected = f"of at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise InputError(f"{name} is {shown(value)}, expected an integer {expected}")
    return number


def real(name: str, value: Any, valid: Callable[[float], bool], expected: str) -> float:
    """`value` as a float for which `valid` holds. Raises InputError with what is `expected`."""
    try:
        number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else None
    except OverflowError:
        number = None
    if number is None or not valid(number):
        raise InputError(f"{name} is {shown(value)}, expected {expected}")
    return number


def choice(name: str, value: Any, expected: tuple[str, ...]) -> None:
    """Raises InputError unless `value` is one of the strings that are `expected`."""
    if not isinstance(value, str) or value not in expected:
        raise InputError(f"{name} is {shown(value)}, expected one of {', '.join(expected)}")


def known_options(given: Iterable[str], known: Iterable[str], of: str = "") -> None:
    """Raises InputError with the first name of those `given` that is not `known`, and the one that it is like."""
    known = tuple(known)
    for name in sorted(set(given) - set(known)):
        nearest = "".join(f"; the nearest is {one}" for one in difflib.get_close_matches(name, known, 1))
        raise InputError(f"unknown option {name!r}{of}, expected one of {', '.join(known)}{nearest}")


def switch(name: str, value: Any) -> bool:
    """`value` itself, True or False. Raises InputError for what is only like one of them."""
    if not isinstance(value, bool):
        raise InputError(f"{name} is {shown(value)}, expected True or False")
    return value


def path_like(name: str, value: Any, expected: str) -> str | Path:
    """`value`, the name of a file or directory, as a str or Path. Raises InputError if it is none, or empty."""
    path = value.__fspath__() if isinstance(value, os.PathLike) and not isinstance(value, Path) else value
    if not isinstance(path, (str, Path)) or not str(path):
        raise InputError(f"{name} is {shown(value)}, expected {expected}")
    return path


def items(name: str, value: Any, expected: str) -> Iterator[Any]:
    """What is in `value`. Raises InputError for bytes, a dict, and what has no items, as an array of no dimensions."""
    try:
        if not isinstance(value, (bytes, bytearray, dict)):
            return iter(value)
    except TypeError:
        pass
    raise InputError(f"{name} is {shown(value)}, expected {expected}")


def is_unicode(text: Any) -> TypeGuard[str]:
    r"""Whether it is text without half of a surrogate pair, as "\ud800" in JSON gives: no native library takes one."""
    try:
        return isinstance(text, str) and text.encode() is not None
    except UnicodeEncodeError:
        return False


def valid_id(value: Any, vocab_size: int) -> int | None:
    """`value`, an integer of any library, as an int below vocab_size; None if it is none."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
    return number if 0 <= number < vocab_size else None


def unicode_text(name: str, text: Any) -> str:
    """`text` itself. Raises InputError if it is none, or holds half of a surrogate pair, which no tokenizer has."""
    if not isinstance(text, str):
        raise InputError(f"{name} is {shown(text)}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"character {error.start} is the lone surrogate {text[error.start]!r}"
        raise InputError(f"{name}: {found}, expected valid Unicode") from None
    return text


def shown(value: Any) -> str:
    """`value` as Python writes it, cut; Python refuses to write integers of thousands of digits."""
    try:
        text = repr(value)
    except ValueError:
        text = f"an integer of {value.bit_length()} bits"
    return text if len(text) <= 100 else f"{text[:97]}..."
