"""Answers in series: questions from several files, answered one after the other, one line of JSON each.

With a file for the answers an interrupted run goes on where it was: a line is complete or, as the last one, mended.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
from typing import Any, Final, NamedTuple

from minirea.errors import InputError
from minirea.files import check_regular, read_file, unwritable
from minirea.json_object import JsonObject

LIMIT: Final = 2**30  # bytes of a file of questions, or of answers
_EXAMPLE: Final = '{"id": 1, "prompt": "Who?"}'


class Question(NamedTuple):
    """`id` names its answer; no two questions of a series share one. `source` is where it stands, for messages."""

    id: str | int
    prompt: str
    source: str


def questions_in(data: bytes, name: str) -> list[Question]:
    """The questions of a text of JSON Lines, {"id": ..., "prompt": ...} each; empty lines are none.

    Args:
        name: of the text, for messages.

    Raises:
        InputError: a line that is no question, or an id that is there twice.
    """
    questions = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        source = f"{name}: line {number}"
        line_object = JsonObject.parse(line, source)
        question_id, prompt = line_object.values.get("id"), line_object.values.get("prompt")
        if isinstance(question_id, bool) or not isinstance(question_id, (str, int)):
            raise line_object.fail("id", "a string or an integer that names the answer, as in " + _EXAMPLE)
        if not isinstance(prompt, str) or not prompt:
            raise line_object.fail("prompt", "some text, as in " + _EXAMPLE)
        questions.append(Question(question_id, prompt, source))
    if not questions:
        raise InputError(f"{name}: holds no questions, expected lines such as {_EXAMPLE}")
    check_ids(questions)
    return questions


def check_ids(questions: list[Question]) -> None:
    """Raise InputError if two questions have the same id."""
    seen: dict[str | int, str] = {}
    for question in questions:
        if question.id in seen:
            raise InputError(f"{question.source}: id {question.id!r:.80} is also at {seen[question.id]}, expected once")
        seen[question.id] = question.source


def key_of(*parts: object) -> str:
    """Names a question with all that its answer depends on, so that no other run's answer is taken for this one's."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()[:16]


class Answers:
    """The file of a series' answers, locked while it is open.

    Attributes:
        keys: of the answers that are there, by id.
    """

    def __init__(self, path: str) -> None:
        """Open or make the file, and cut off an incomplete last line.

        Raises:
            InputError: another process writes to it, a line of it is no answer, or it cannot be written.
        """
        self.path = path
        self.keys: dict[str | int, str] = {}
        if os.path.lexists(path):
            check_regular(path, "answers")
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
        except (OSError, ValueError) as error:
            raise unwritable(path, error) from None
        try:
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):  # another one by now
                raise InputError(f"{path}: is no regular file, expected one for the answers")
            self._lock()
            self._read()
        except BaseException:
            os.close(self._descriptor)
            raise

    def add(self, record: dict[str, Any]) -> None:
        """Append one answer, and bring it to the disk. Raises InputError if that fails; earlier ones stay whole."""
        data = (json.dumps(record) + "\n").encode()
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        try:
            written = os.write(self._descriptor, data)
            while written < len(data):
                written += os.write(self._descriptor, data[written:])
            os.fsync(self._descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, end)
            raise InputError(f"{self.path}: cannot be written: {error.strerror}") from None
        self.keys[record["id"]] = record["key"]

    def has(self, question: Question, key: str) -> bool:
        """Whether a question is answered. Raises InputError if its id is, but for another question or run."""
        found = self.keys.get(question.id)
        if found not in (None, key):
            raise InputError(
                f"{self.path}: answers {question.id!r:.80} with another prompt, context, model or settings, expected "
                "those of this run: use another file"
            )
        return found is not None

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.path}: another process is writing its answers there") from None
        except OSError:  # a file system without locks
            pass

    def _read(self) -> None:
        data = read_file(self.path, LIMIT, "answers")
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].split(b"\n")[:-1], 1):
            source = f"{self.path}: line {number}"
            values = JsonObject.parse(line, source).values
            if not isinstance(values.get("id"), (str, int)) or not isinstance(values.get("key"), str):
                raise InputError(f"{source}: is no answer of a series, expected an id and a key")
            self.keys[values["id"]] = values["key"]
        os.ftruncate(self._descriptor, whole)

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
