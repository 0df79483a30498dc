"""The demo model's prompt files, made of generated text. They can be made again byte for byte:

python tools/demo_text.py --out weights/demo/prompts
"""

from __future__ import annotations

import argparse
from pathlib import Path

from minirea.evaluation.text.diary import generate_text

CHARS_PER_TOKEN = 3.5  # measured with the demo tokenizer on this text


def needle_prompt(seed: int, tokens: int, key: str, value: str, depth: float) -> str:
    """A needle prompt: generated text of about `tokens` tokens, the needle between two entries at `depth` (0 to 1)."""
    text = generate_text(seed, int(tokens * CHARS_PER_TOKEN))
    cut = text.index("\n\n", int(len(text) * depth))
    subject = f"special magic number for {key}"
    question = f"\nQuestion: What is the {subject}? Answer: The {subject} is"
    return f"{text[:cut]} The {subject} is {value}.{text[cut:].rstrip()}{question}"


def write_prompts(folder: Path) -> None:
    """The prompt files that ship with the model."""
    folder.mkdir(parents=True, exist_ok=True)
    needle = needle_prompt(seed=7, tokens=16_000, key="copper-lantern", value="604218", depth=0.4)
    (folder / "needle-16k.txt").write_text(needle, encoding="utf-8")
    (folder / "short.txt").write_text("The storm went on all night. In the morning", encoding="utf-8")
    (folder / "two-needles.txt").write_text(
        "The special magic number for green-river is 381920. " + generate_text(8, 1_500).split("\n\n")[0]
        + " The special magic number for blue-mountain is 557043.\n"
        "Question: What is the special magic number for green-river? "
        "Answer: The special magic number for green-river is",
        encoding="utf-8",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo model's prompt files.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    write_prompts(parser.parse_args().out)


if __name__ == "__main__":
    main()
