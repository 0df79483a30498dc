"""Reading what benchmarks publish: files with one JSON object in each line, and files of prompt templates.

Everything here was written by others. Whatever is wrong with it is one line that names file, line and field.
"""

from __future__ import annotations

import hashlib
import os
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from minirea.checks import is_unicode
from minirea.errors import InputError
from minirea.files import check_regular, list_directory
from minirea.json_object import JsonObject

_DEPTH: Final = 4  # folders below the given one that are searched; L-Eval's own checkout has its files 2 deep


class Entry(JsonObject):
    """One line of a data file."""

    def string(self, key: str) -> str:
        """Raises InputError if it is absent or no text that can be a prompt."""
        value = self.values.get(key)
        if not is_unicode(value):
            raise self.fail(key, "a string of valid Unicode")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        """Raises InputError unless it is a list of at least one string."""
        value = self.values.get(key)
        if not isinstance(value, list) or not value or not all(map(is_unicode, value)):
            raise self.fail(key, "a list of strings of valid Unicode")
        return tuple(value)


def find(directory: Path, names: set[str]) -> dict[str, Path]:
    """Files of these names, in `directory` or a few folders down. Links to directories are not followed.

    Raises:
        MissingFileError: no such directory.
        InputError: it is no directory, or holds two files of one name.
    """
    list_directory(directory, "directory of data files")
    found: dict[str, Path] = {}
    for folder, folders, files in os.walk(directory):
        depth = len(Path(folder).relative_to(directory).parts)
        folders[:] = sorted(folders) if depth < _DEPTH else []
        for name in sorted(names.intersection(files)):
            if name in found:
                raise InputError(f"{directory}: holds {name} twice, in {found[name].parent} and {folder}, expected one")
            found[name] = Path(folder, name)
            check_regular(found[name], "data")  # opening a named pipe would wait for a writer
    return found


def entries(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """The lines of a file that are not blank: number from 1, where it begins, and the bytes.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, offset, line
                offset += len(line)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def entry_at(path: Path, number: int, offset: int) -> Entry:
    """Read one line again. Raises InputError as `parse` does."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return parse(path, number, file.readline())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def parse(path: Path, number: int, line: bytes) -> Entry:
    """Raises InputError if the line is no JSON object."""
    return Entry.parse(line, f"{path}, line {number}")


@dataclass(frozen=True)
class Template:
    """A prompt with fields in braces, as str.format has them ("{{" is a brace), and where it comes from.

    Args:
        text: of the template.
        origin: "minirea", or the name of the user's file.
        sha256: the first 16 digits of that file's SHA-256; "" for minirea's own wording.
    """

    text: str
    origin: str = "minirea"
    sha256: str = ""

    def fill(self, fields: Mapping[str, str]) -> str:
        """The text with every field replaced once; braces in what replaces them are left alone."""
        parts = string.Formatter().parse(self.text)
        return "".join(literal + (fields[name] if name is not None else "") for literal, name, _, _ in parts)

    def check(self, source: str, allowed: tuple[str, ...]) -> None:
        """Raise InputError unless it is well-formed, has the first of `allowed` and no field but those.

        Formats and attributes ({context!r:>1000000}, {context.x}) are not fields.
        """
        expected = ", ".join(f"{{{name}}}" for name in allowed)
        try:
            parts = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise InputError(f"{source}: {error}, expected a template with fields {expected}") from None
        for _, name, spec, conversion in parts:
            if name is not None and (name not in allowed or spec or conversion):
                raise InputError(f"{source}: has the field {{{name[:40]}}}, expected none but {expected}")
        if allowed[0] not in (name for _, name, _, _ in parts):
            raise InputError(f"{source}: has no {{{allowed[0]}}}, expected it once")


def read_templates(path: Path, allowed: tuple[str, ...]) -> dict[str, Template]:
    """Templates by dataset, from a JSON object of strings such as LongBench's dataset2prompt.json.

    Raises:
        MissingFileError, InputError: names file, dataset and what is wrong.
    """
    values = JsonObject.read(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    templates = {}
    for name, text in values.values.items():
        if not isinstance(text, str):
            raise values.fail(name, "a template, as a string")
        templates[name] = Template(text, path.name, digest)
        templates[name].check(f"{path}: {name}", allowed)
    return templates
