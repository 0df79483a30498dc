"""A directory of results: settings.json, records.jsonl (one line for each answer, written at once), summary.json."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

from minirea.errors import InputError, MissingFileError

Record = dict[str, Any]  # one line of records.jsonl; JSON values only
Place = Mapping[str, str | int | float]  # where a record stands: {"kind": "niah_single_1", "length": 4096, "sample": 3}

SETTINGS: Final = "settings.json"
RECORDS: Final = "records.jsonl"
SUMMARY: Final = "summary.json"


class Results:
    """The records of one evaluation, kept in a directory if there is one.

    A line that was torn when an earlier run was killed is cut off. While a run has the directory no other may.

    Args:
        folder: made if it is not there; None: records live in memory only.
        settings: what the records depend on. A directory that holds other settings is refused.

    Raises:
        InputError: the directory belongs to other settings or to a running evaluation, or its files cannot be used.
    """

    def __init__(self, folder: Path | None, settings: Record) -> None:
        self.folder = folder
        self._records: dict[str, Record] = {}
        self._file: IO[bytes] | None = None
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = _locked(folder / RECORDS)
            self._claim(folder, settings)
            self._read(folder / RECORDS)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise InputError(f"out is {str(folder)!r}, which cannot be written: {error.strerror}") from None
            raise

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others have the directory."""
        if self._file:
            self._file.close()

    def finished(self, record_id: str) -> bool:
        """Whether the record is there. One that was skipped is not: it is tried again."""
        return record_id in self._records and "skipped" not in self._records[record_id]

    def add(self, record: Record) -> None:
        """Keep a record, on disk before this returns."""
        self._records[record["id"]] = record
        if self._file:
            line = json.dumps(record, ensure_ascii=False, allow_nan=False)
            self._file.write(line.encode("utf-8", "replace") + b"\n")
            self._file.flush()

    def records(self, ids: list[str]) -> list[Record]:
        """Those records, in the order of `ids`."""
        return [self._records[record_id] for record_id in ids]

    def summarize(self, summary: Record) -> None:
        """Write summary.json."""
        if self.folder:
            _write_json(self.folder / SUMMARY, summary)

    def _claim(self, folder: Path, settings: Record) -> None:
        """Write down what the directory belongs to, or compare with what it says."""
        path = folder / SETTINGS
        settings = json.loads(json.dumps(settings))
        if not path.exists():
            if (folder / RECORDS).stat().st_size:
                raise InputError(
                    f"out is {str(folder)!r}, which has {RECORDS} but no {SETTINGS}; expected a new directory"
                )
            _write_json(path, settings)
            return
        if difference := _difference(_read_settings(folder), settings):
            raise InputError(
                f"out is {str(folder)!r}, which belongs to another evaluation: {difference}; expected a new directory"
            )

    def _read(self, path: Path) -> None:
        """Take over the records of an earlier run."""
        assert self._file is not None
        records, size = _read_records(path)
        self._file.truncate(size)
        self._records = {record["id"]: record for record in records}


def read_results(folders: Sequence[Path], differing: Sequence[str] = ()) -> tuple[Record, list[Record], Record]:
    """Settings, records and environment of directories that hold parts of one evaluation.

    The records are those of the first directory and what each next one adds, shortest first as in a single run.
    Settings named in `differing` need not agree: each becomes the list of its different values. So does what differs in
    the environment; every record names its own machine.

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
        for record in _read_records(folder / RECORDS)[0]:
            if "skipped" in records.setdefault(record["id"], record):
                records[record["id"]] = record
        environments.append(_read_environment(folder))
    settings = settings | _joined([{name: part.get(name) for name in differing} for part in parts])
    return settings, sorted(records.values(), key=lambda record: record.get("length", 0)), _joined(environments)


def _read_environment(folder: Path) -> Record:
    """Where a directory's records were made; empty if it was interrupted before it could say so."""
    summary = None
    with contextlib.suppress(OSError, ValueError):
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
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
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingFileError(f"{folder}: no {SETTINGS}, expected a directory of results") from None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a JSON object, expected the settings of an evaluation")
    return found


def _read_records(path: Path) -> tuple[list[Record], int]:
    """The records of a file and the bytes that they take: a last line that was torn does not count."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    whole = raw[: raw.rfind(b"\n") + 1]
    records = []
    for number, line in enumerate(whole.splitlines(), 1):
        record = None
        with contextlib.suppress(ValueError):
            record = json.loads(line)
        if not isinstance(record, dict) or not isinstance(record.get("id"), str):
            raise InputError(f"{path}: line {number} is no record, expected a JSON object with an id")
        records.append(record)
    return records, len(whole)


def _locked(path: Path) -> IO[bytes]:
    """The file, open for appending by this process only."""
    file = path.open("ab")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # not a POSIX system: trust the user
        pass
    except OSError:
        file.close()
        raise InputError(f"out is {str(path.parent)!r}, which another evaluation is writing to") from None
    return file


def _difference(found: Record, wanted: Record) -> str:
    """The first setting that differs, in words; "" if none does."""
    for name in {**wanted, **found}:
        if found.get(name) != wanted.get(name):
            return f"{name} is {_shown(found.get(name))} there and {_shown(wanted.get(name))} here"
    return ""


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _write_json(path: Path, value: Record) -> None:
    """Replace the file in one step, so that it is never half there."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
