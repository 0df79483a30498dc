"""JSON objects of files, read key by key: an error names file, key, what was found and what was expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, Self

from minirea.errors import InputError
from minirea.files import as_text, read_file

_LIMIT_BYTES: Final = 2**24  # the largest config or index of a published model has some 500,000
_LARGEST_INTEGER: Final = 2**31 - 1
_SHOWN: Final = 80  # characters of a value that a message quotes


class JsonObject:
    """A JSON object with typed access. null counts as absent."""

    def __init__(self, values: dict[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    @classmethod
    def read(cls, path: Path, limit_bytes: int = _LIMIT_BYTES) -> Self:
        """Parse `path`. Raises MissingFileError or InputError naming it."""
        return cls.parse(read_file(path, limit_bytes, "a JSON object"), str(path))

    @classmethod
    def parse(cls, text: bytes, source: str) -> Self:
        """The object that JSON text holds. Raises InputError naming `source`."""
        decoded = as_text(text, source, "surrogatepass")
        try:
            values = json.loads(decoded)
        except (ValueError, RecursionError) as error:
            found = str(error)
            if isinstance(error, json.JSONDecodeError) and b"\n" not in text:  # whose line `source` may name
                found = f"{error.msg.removesuffix(' at')} at column {error.colno}"
            raise InputError(f"{source}: not valid JSON: {found}") from None
        if not isinstance(values, dict):
            raise InputError(f"{source}: holds a JSON {type(values).__name__}, expected an object")
        return cls(values, source)

    def fail(self, key: str, expected: str) -> InputError:
        """The error to raise for the value of `key`."""
        found = shown(self.values[key]) if key in self.values else "absent"
        return InputError(f"{self.source}: {key} is {found}, expected {expected}")

    def integer(self, key: str, default: int | None = None, lowest: int = 1, highest: int = _LARGEST_INTEGER) -> int:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
            too_large = isinstance(value, int) and value > highest
            most = f" and at most {highest}" if too_large or highest != _LARGEST_INTEGER else ""
            raise self.fail(key, f"an integer of at least {lowest}{most}")
        return value

    def number(self, key: str, default: float | None = None, *, lowest: float, highest: float) -> float:
        """Of the closed interval from `lowest` to `highest`; an integer may have any number of digits."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not lowest <= value <= highest:
            raise self.fail(key, f"a number from {lowest:g} to {highest:g}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def child(self, key: str) -> JsonObject | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(key, "an object")
        return JsonObject(value, f"{self.source}: {key}")

    def token_ids(self, key: str) -> frozenset[int]:
        """An id, a list of ids, or nothing."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.fail(key, "a token id or a list of token ids")
        return frozenset(ids)

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value


def shown(value: Any) -> str:
    """The beginning of a value as JSON writes it."""
    try:
        return json.dumps(value[:_SHOWN] if isinstance(value, (str, list)) else value)[:_SHOWN]
    except RecursionError:  # it could be read at a smaller depth of the stack
        return f"a deeply nested {type(value).__name__}"
