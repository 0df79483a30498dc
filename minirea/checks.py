"""Numbers that a caller passes: numpy's are like Python's own, and what is none is refused by its field's name."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable
from typing import Any

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


def shown(value: Any) -> str:
    """`value` as Python writes it, cut; Python refuses to write integers of thousands of digits."""
    try:
        text = repr(value)
    except ValueError:
        text = f"an integer of {value.bit_length()} bits"
    return text if len(text) <= 100 else f"{text[:97]}..."
