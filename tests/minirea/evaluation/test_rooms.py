"""How the rooms of the evaluation depend on each other."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[3] / "minirea" / "evaluation"
# Room -> the rooms that it may import; "" is lengths.py. registry.py and the package itself may import all of them.
ROOMS = {
    "": set(),
    "frame": {"", "frame"},
    "text": {"", "frame", "text"},
    "tasks": {"", "frame", "text", "tasks"},
    "benchmarks": {"", "frame", "text", "benchmarks"},
}


def modules() -> dict[str, set[str]]:
    """Module -> the modules of the evaluation that it imports anywhere in it, by their names below the package."""
    found: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").removesuffix(".")
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minirea.evaluation."):
                base = (node.module or "").removeprefix("minirea.evaluation.")
                found[name] |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    return {name: {one for one in of if one in found and one != name} for name, of in found.items()}


def test_no_circle_and_no_room_imports_one_it_may_not() -> None:
    found = modules()
    assert len(found) > 20
    assert list(TopologicalSorter(found).static_order())  # raises CycleError
    for name, imported in found.items():
        if name in ("", "registry"):
            continue
        room = name.split(".")[0] if "." in name or name in ROOMS else ""
        assert {one.split(".")[0] if one != "lengths" else "" for one in imported} <= ROOMS[room], name
