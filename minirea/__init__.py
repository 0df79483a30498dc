"""minirea: a minimal transformer inference engine that reads a million tokens with ReAttention (arXiv 2407.15176).

`load` a model directory, then `generate`, `stream` or compute `logits`; see minirea.api. `evaluate` measures what a
model finds in long contexts; see minirea.evaluation.
"""

from __future__ import annotations

import os
from importlib import import_module

from minirea.errors import (
    CudaError,
    InputError,
    MemoryLimitError,
    MinireaError,
    MinireaWarning,
    MissingExtraError,
    MissingFileError,
    RankError,
)

TYPE_CHECKING = (
    False  # as type checkers know it. The command handles Ctrl-C once this is imported: typing takes too long
)
if TYPE_CHECKING:
    from typing import Any

    from minirea.api import LLM, Generation, Session, load
    from minirea.evaluation import Evaluation, evaluate
    from minirea.generate import GenerationConfig, Piece, Stats

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CudaError",
    "Evaluation",
    "Generation",
    "GenerationConfig",
    "InputError",
    "MemoryLimitError",
    "MinireaError",
    "MinireaWarning",
    "MissingExtraError",
    "MissingFileError",
    "Piece",
    "RankError",
    "Session",
    "Stats",
    "evaluate",
    "load",
]

# In a clone kernels/ and weights/ lie next to this folder; where minirea is installed they lie in it.
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if not os.path.isdir(os.path.join(__path__[0], "kernels")) and os.path.isdir(os.path.join(_ROOT, "kernels")):
    __path__.append(_ROOT)

# Torch takes seconds to import, and the command line must answer `--help` without it.
_LAZY = {
    "LLM": "minirea.api",
    "Evaluation": "minirea.evaluation",
    "Generation": "minirea.api",
    "GenerationConfig": "minirea.generate",
    "Piece": "minirea.generate",
    "Session": "minirea.api",
    "Stats": "minirea.generate",
    "evaluate": "minirea.evaluation",
    "load": "minirea.api",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'minirea' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
