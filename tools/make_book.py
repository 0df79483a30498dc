"""A book with a fact hidden in it and a question at its end, as long as a model's tokenizer is asked for.

    python tools/make_book.py MODEL TOKENS FILE     prints the answer

The text is generated: the diary of a harbour station, which third parties have no rights in.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from minirea.checks import integer
from minirea.errors import MinireaError
from minirea.evaluation.text.diary import generate_text
from minirea.files import replace_file
from minirea.tokenizer import load_tokenizer

FACT: Final = "The special magic number for copper-lantern is 7402913."
QUESTION: Final = "What is the special magic number for copper-lantern?"
ANSWER: Final = "7402913"
DEPTH: Final = 0.4  # of the text before the fact
CHARACTERS: Final = 8  # of a token, at most: what a first stretch of text is cut from


def book(model: Path, num_tokens: int) -> str:
    """Whole paragraphs of about `num_tokens` tokens, the fact between two of them, the question last."""
    tokenizer = load_tokenizer(model)
    paragraphs = generate_text(0, CHARACTERS * num_tokens).split("\n\n")
    kept, length = [], 0
    for paragraph in paragraphs:
        length += len(tokenizer.encode(paragraph + "\n\n"))
        if length > num_tokens:
            break
        kept.append(paragraph)
    kept.insert(round(DEPTH * len(kept)), FACT)
    return "\n\n".join([*kept, QUESTION])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model directory: its tokenizer counts")
    parser.add_argument("tokens", type=int, help="length of the book")
    parser.add_argument("file", type=Path, help="where the prompt goes")
    arguments = parser.parse_args()
    try:
        text = book(arguments.model, integer("tokens", arguments.tokens, 1))
        replace_file(arguments.file, text.encode())
    except MinireaError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    print(ANSWER)


if __name__ == "__main__":
    main()
