"""A directory of results: settings.json, records.jsonl (one line for each answer, written at once), summary.json."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, Final, NoReturn

from minirea.errors import InputError, MissingFileError
from minirea.files import LONE_SURROGATES, check_regular, read_file

Record = dict[str, Any]  # one line of records.jsonl; JSON values only
Place = Mapping[str, str | int | float]  # where a record stands: {"kind": "niah_single_1", "length": 4096, "sample": 3}

Check = Callable[[Record], object]
_UNCOMPARED: Final = ("model_name", "trained_context")  # told, but a model is the same under another name
SETTINGS: Final = "settings.json"
RECORDS: Final = "records.jsonl"
_LARGEST_FILE: Final = 2**32  # bytes; of 200,000 answers some 2**28
SUMMARY: Final = "summary.json"


class Results:
    """The records of one evaluation, kept in a directory if there is one.

    A line that was torn when an earlier run was killed is cut off. While a run has the directory no other may. A file
    of records that is deleted meanwhile is written anew.

    Args:
        folder: made if it is not there; None: records live in memory only.
        settings: what the records depend on. A directory that holds other settings is refused.
        check: raises an exception for a record that cannot be summarized; the default takes all.

    Raises:
        InputError: the directory belongs to other settings or to a running evaluation, its files cannot be used, or a
            record in it is none; later, in any method: it cannot be written.
    """

    def __init__(self, folder: Path | None, settings: Record, check: Check = lambda _: None) -> None:
        self.folder = folder
        self._records: dict[str, Record] = {}
        self._file: FileIO | None = None
        if folder is None:
            return
        try:
            with self._writing():
                folder.mkdir(parents=True, exist_ok=True)
                self._file = _locked(folder / RECORDS)
                self._claim(folder, settings)
                records, size = _read_records(folder / RECORDS, check)
                self._file.truncate(size)
                self._records = {record["id"]: record for record in records}
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unlock the directory."""
        if self._file:
            self._file.close()

    def finished(self, record_id: str) -> bool:
        """Whether the record is there. One that was skipped is not: it is tried again."""
        return record_id in self._records and "skipped" not in self._records[record_id]

    def add(self, record: Record) -> None:
        """Keep a record, written to its file before this returns."""
        self._records[record["id"]] = record
        if self._file:
            with self._writing():
                if not self._restored():
                    _write_lines(self._file, [record])

    def records(self, ids: Sequence[str]) -> list[Record]:
        """Those records in the order of `ids`, then all others that the directory holds; together shortest first."""
        wanted = set(ids)
        others = [record for record_id, record in self._records.items() if record_id not in wanted]
        return _shortest_first([*(self._records[record_id] for record_id in ids), *others])

    def environment(self, now: Record) -> Record:
        """Where the records were made: what an earlier summary says, and what is so now."""
        return _joined([_read_environment(self.folder), now]) if self.folder else now

    def summarize(self, summary: Record) -> None:
        """Write summary.json."""
        if self.folder:
            with self._writing():
                self._restored()
                _write_json(self.folder / SUMMARY, summary)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns the system's refusal to write into one line."""
        try:
            yield
        except OSError as error:
            reason = f"{error.strerror}; the answers that {RECORDS} holds stay" if self._records else error.strerror
            raise InputError(f"out is {str(self.folder)!r}, which cannot be written: {reason}") from None

    def _restored(self) -> bool:
        """Whether the file of records had been deleted; all of them are then in a new one.

        Raises:
            InputError: another file has its name.
        """
        assert self.folder is not None and self._file is not None
        path, ours = self.folder / RECORDS, os.fstat(self._file.fileno())
        try:
            there = path.stat()
        except FileNotFoundError:
            self._file.close()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = _locked(path)
            if not (self.folder / SETTINGS).exists():
                _write_json(self.folder / SETTINGS, self._settings)
            _write_lines(self._file, self._records.values())
            return True
        if (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
            raise InputError(f"out is {str(self.folder)!r}, whose {RECORDS} another program has replaced meanwhile")
        return False

    def _claim(self, folder: Path, settings: Record) -> None:
        """Write down what the directory belongs to, or compare with what it says."""
        self._settings = settings = json.loads(json.dumps(settings))
        if not (folder / SETTINGS).exists():
            if (folder / RECORDS).stat().st_size:
                raise InputError(
                    f"out is {str(folder)!r}, which has {RECORDS} but no {SETTINGS}; expected a new directory"
                )
            _write_json(folder / SETTINGS, settings)
            return
        check_settings(folder, settings)


def check_settings(folder: Path, settings: Record, some: bool = False) -> None:
    """Raise InputError if a directory of results belongs to other settings; with `some` only those given count."""
    if not (folder / SETTINGS).exists():
        return
    found, settings = _read_settings(folder), json.loads(json.dumps(settings))
    if some:
        found = {name: value for name, value in found.items() if name in settings or name in _UNCOMPARED}
    if difference := _difference(found, settings):
        raise InputError(
            f"out is {str(folder)!r}, which belongs to another evaluation: {difference}; expected a new directory"
        )


def read_results(
    folders: Sequence[Path], differing: Sequence[str], check_of: Callable[[Record], Check]
) -> tuple[Record, list[Record], Record]:
    """Settings, records and environment of directories that hold parts of one evaluation.

    The records are those of the first directory and what each next one adds, shortest first as in a single run.
    Settings named in `differing` need not agree: each becomes the list of its different values. So does what differs in
    the environment; every record names its own machine. Seeds that may differ become a part of the records' ids.
    `check_of` gives, for settings, what Results takes as `check`.

    Raises:
        MissingFileError, InputError: not a directory of results; those of different evaluations; `differing` names none
            of their settings.
    """
    parts = [_read_settings(folder) for folder in folders]
    for name in differing:
        if not any(name in part for part in parts):
            raise InputError(f"differing is {name!r}, expected settings of {folders[0]}: {', '.join(parts[0])}")
    settings, records, environments = parts[0], dict[str, Record](), list[Record]()
    for folder, part in zip(folders, parts, strict=True):
        if difference := _difference(_without(settings, differing), _without(part, differing)):
            raise InputError(f"{folders[0]} and {folder} hold different evaluations: {difference}")
        # The ids of parts that were joined before have their seeds.
        seed = f" seed={part['seed']}" if "seed" in differing and isinstance(part.get("seed"), int) else ""
        for record in _read_records(folder / RECORDS, check_of(part))[0]:
            record["id"] = record["id"].removesuffix(seed) + seed
            if "skipped" in records.setdefault(record["id"], record):
                records[record["id"]] = record
        environments.append(_read_environment(folder))
    settings = settings | _joined([{name: part.get(name) for name in differing} for part in parts])
    return settings, _shortest_first(records.values()), _joined(environments)


def _shortest_first(records: Iterable[Record]) -> list[Record]:
    """As in a single run."""
    return sorted(records, key=lambda record: record.get("length", 0))


def _read_environment(folder: Path) -> Record:
    """Where a directory's records were made; empty if it was interrupted before it could say so."""
    summary = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        summary = json.loads(read_file(folder / SUMMARY, _LARGEST_FILE, "a summary"))
    environment = summary.get("environment") if isinstance(summary, dict) else None
    return environment if isinstance(environment, dict) else {}


def _joined(parts: Sequence[Record]) -> Record:
    """Each value once, as a list where there are several."""
    joined: dict[str, list[Any]] = {}
    for part in parts:
        for name, value in part.items():
            known = joined.setdefault(name, [])
            known += [one for one in (value if isinstance(value, list) else [value]) if one not in known]
    return {name: known[0] if len(known) == 1 else known for name, known in joined.items()}


def _without(settings: Record, names: Sequence[str]) -> Record:
    return {name: value for name, value in settings.items() if name not in names}


def _read_settings(folder: Path) -> Record:
    path = folder / SETTINGS
    try:
        found = json.loads(read_file(path, _LARGEST_FILE, "the settings of an evaluation"))
    except FileNotFoundError:
        raise MissingFileError(f"{folder}: no {SETTINGS}, expected a directory of results") from None
    except InputError:
        raise
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a JSON object, expected the settings of an evaluation")
    return found


def _read_records(path: Path, check: Check) -> tuple[list[Record], int]:
    """The records of a file and the bytes that they take: a last line that was torn does not count.

    Of lines with one id the last counts, which only follows others that were skipped.
    """
    raw = read_file(path, _LARGEST_FILE, "records")
    whole = raw[: raw.rfind(b"\n") + 1]
    records: dict[str, Record] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = _record(line)
            check(record)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
            raise InputError(f"{path}: line {number} is no record of this task: {_fault(error)}") from None
        before = records.get(record["id"])
        if before is not None and "skipped" not in before and before.get("score") != record.get("score"):
            raise InputError(f"{path}: line {number} has the id of line {lines[record['id']]} and another score")
        records[record["id"]], lines[record["id"]] = record, number
    return list(records.values()), len(whole)


def _fault(error: Exception) -> str:
    """What an error says of a line that is no record, or that cannot be summarized."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error}"
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, ValueError):
        return str(error)
    return f"a field has another type or value than those of this task ({error})"


class _NoRecordError(ValueError):
    """Says what a record lacks."""


# Fields of every record, and of those that have them, with what they must be. bool is no number.
_FIELDS: Final[dict[str, tuple[tuple[type, ...], str]]] = {
    "id": ((str,), "text"),
    "attention": ((str,), "text"),
    "score": ((int, float, type(None)), "a number or null"),
    "skipped": ((str,), "text"),
    "length": ((int,), "an integer"),
    "depth": ((int, float), "a number"),
    "kind": ((str,), "text"),
}
_ALWAYS: Final = ("id", "attention", "score")


def _record(line: bytes) -> Record:
    """A line of the file. Raises _NoRecordError, or what json.loads raises."""
    record = json.loads(line, parse_constant=_no_constant)
    if not isinstance(record, dict):
        raise _NoRecordError("expected a JSON object with an id")
    for name, (types, expected) in _FIELDS.items():
        if name not in record:
            if name in _ALWAYS:
                raise _NoRecordError(f"it has no {name}, expected {expected}")
        elif not isinstance(record[name], types) or isinstance(record[name], bool):
            raise _NoRecordError(f"{name} is {_shown(record[name])}, expected {expected}")
    if record["score"] is not None and not 0 <= record["score"] <= 1:
        raise _NoRecordError(f"score is {_shown(record['score'])}, expected 0 to 1")
    return record


def _no_constant(name: str) -> NoReturn:
    raise _NoRecordError(f"it holds {name}, expected finite numbers")


def _write_lines(file: FileIO, records: Iterable[Record]) -> None:
    """Append records, a line each. After an error the file is as it was."""
    size = file.seek(0, os.SEEK_END)
    lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    data = memoryview("".join(lines).encode("utf-8", LONE_SURROGATES))
    try:
        while data:
            data = data[file.write(data) :]
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(size)
        raise


def _locked(path: Path) -> FileIO:
    """The file, open for appending by this process only."""
    if path.exists():
        check_regular(path, "records")  # opening a named pipe would wait for a reader
    file = FileIO(path, "ab")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # not a POSIX system: no lock
        pass
    except OSError:
        file.close()
        raise InputError(f"out is {str(path.parent)!r}, which another evaluation is writing to") from None
    return file


def _difference(found: Record, wanted: Record) -> str:
    """The first setting that differs, in words; "" if none does. A model is told by its name."""
    for name in {**wanted, **found}:
        if name in _UNCOMPARED or found.get(name) == wanted.get(name):
            continue
        if name == "model" or (name == "model_config" and name in found and name in wanted):
            there, here = (settings.get("model_name") or settings.get(name) for settings in (found, wanted))
            return f"model is {_shown(there)} there and {'another ' * (there == here)}{_shown(here)} here"
        if name != "model_config":
            return f"{name} is {_shown(found.get(name))} there and {_shown(wanted.get(name))} here"
    return ""


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _write_json(path: Path, value: Record) -> None:
    """Replace the file in one step, so that it is never half there."""
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8", LONE_SURROGATES)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
