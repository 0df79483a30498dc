"""Stretches of a text as they are, of any exact length, and how many bytes each of their tokens stands for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minirea.errors import InputError, printable
from minirea.evaluation.frame.tasks import require
from minirea.evaluation.text.encoder import Encoder
from minirea.evaluation.text.haystack import read_text

if TYPE_CHECKING:
    from minirea.tokenizer import Tokenizer


class Text:
    """A file as token ids, from which windows are cut.

    Attributes:
        name: the file's, without its folders.
        beginning: ids that the tokenizer puts before a text (BOS); every window starts with them.
        ids: of the whole text, without special tokens.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self.name = printable(path.name)
        self.beginning = Encoder(tokenizer).beginning
        self.ids = tokenizer.encode(read_text("text", path), add_special_tokens=False)

    def window(self, sample: int, tokens: int) -> list[int]:
        """`tokens` ids, the beginning included.

        Sample 0 lies in the middle of the text, the next ones at 1/4, 3/4, 1/8, 5/8, ... of it: however many are taken,
        they are spread evenly, and more of them leave the others where they are.
        """
        room = len(self.ids) - (tokens - len(self.beginning))
        start = int(radical_inverse(sample + 1) * room)
        return self.beginning + self.ids[start : start + tokens - len(self.beginning)]


def read_texts(paths: Sequence[Path], tokenizer: Tokenizer, tokens: int) -> list[Text]:
    """The files, each of which has to hold a window of `tokens` tokens.

    Raises:
        MissingFileError, InputError: no such file, not UTF-8, too short, or two of one name.
    """
    require("text", paths, bool(paths), "at least one file")
    texts = [Text(path, tokenizer) for path in paths]
    for path, text in zip(paths, texts, strict=True):
        found = len(text.ids) + len(text.beginning)
        if found < tokens:
            raise InputError(f"text is '{path}' with {found} tokens, expected {tokens}, the longest of lengths")
        if [other.name for other in texts].count(text.name) > 1:
            raise InputError(f"text is '{path}', expected names that tell the texts apart: another has this one")
    return texts


def radical_inverse(number: int) -> float:
    """The binary digits of a number mirrored at the point: 1, 2, 3, 4 give 1/2, 1/4, 3/4, 1/8 (van der Corput)."""
    mirrored, digit = 0.0, 0.5
    while number:
        mirrored += digit * (number & 1)
        number, digit = number >> 1, digit / 2
    return mirrored


def token_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """UTF-8 bytes of text that each token inside a text stands for. Part of a character counts as its own bytes.

    The tokens of a window, less its beginning, add up to its text. A tokenizer that rewrites what it reads, such as
    one that normalizes Unicode, is taken at its own word.
    """
    pieces = map(tokenizer.piece, ids)
    return [len(piece if isinstance(piece, bytes) else piece.encode()) for piece in pieces]
