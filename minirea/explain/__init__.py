"""Where an answer came from, for people: sources.json, a picture, and a page that stands by itself."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from minirea.errors import InputError
from minirea.explain.page import render
from minirea.explain.picture import draw
from minirea.files import LONE_SURROGATES, check_replaceable, replace_file
from minirea.isolation import isolated
from minirea.sources import Votes
from minirea.tokenizer import Tokenizer

RECORDS: Final = "sources.json"
PAGE: Final = "page.html"
PICTURE: Final = "attention.png"


@dataclass(frozen=True)
class Explanation:
    """An answer and what it looked at.

    Attributes:
        model: its name, for headings.
        ids: the context with the answer, which is [answer_start, len(ids)).
        text: of the answer.
        votes: of its tokens.
        sources: as sources.json has them: start, end, share, line, text.
    """

    model: str
    ids: Sequence[int]
    answer_start: int
    text: str
    votes: Votes
    num_layers: int
    sources: Sequence[Mapping[str, Any]]

    @isolated()
    def write(self, folder: Path, tokenizer: Tokenizer) -> list[Path]:
        """Write all of it into a folder, which is made; returns what was written.

        The picture comes last.

        Raises:
            InputError: a file cannot be written; an old one of its name is left as it was.
            MissingExtraError: matplotlib is not installed; all but the picture is there.
        """
        make_folder(folder)
        record: dict[str, Any] = {
            "model": self.model,
            "text": self.text,
            "token_ids": list(self.ids[self.answer_start :]),
        }
        record |= {"prompt_tokens": self.answer_start, "sources": list(self.sources)}
        page = render(self.model, self.ids, self.answer_start, self.votes, self.sources, tokenizer)
        contents = {RECORDS: json.dumps(record, indent=1, ensure_ascii=False) + "\n", PAGE: page}
        for name, content in contents.items():
            replace_file(folder / name, content.encode("utf-8", LONE_SURROGATES))
        draw(folder / PICTURE, self.model, self.votes, self.answer_start, self.num_layers, self.token_names(tokenizer))
        return [folder / name for name in (*contents, PICTURE)]

    def token_names(self, tokenizer: Tokenizer) -> list[str]:
        return [tokenizer.decode([token_id], skip_special_tokens=False) for token_id in self.ids[self.answer_start :]]


def check_folder(folder: Path) -> None:
    """Raise at once what `Explanation.write` would raise for its folder. What this makes it removes."""
    missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        make_folder(folder)
        check_replaceable(folder / RECORDS)
    finally:
        for path in missing:
            with contextlib.suppress(OSError, ValueError):
                path.rmdir()


def make_folder(folder: Path) -> None:
    """Raises InputError where there can be none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no name that a folder can have"
        raise InputError(f"out is {str(folder)!r}, where no folder can be made: {reason}") from None
