"""Rows and tables of the mechanism studies, from their records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from minirea.evaluation.frame.records import Record
from minirea.evaluation.lengths import short_length

Numbers = list[list[float]]  # [L][H]


def summarize(records: Sequence[Record]) -> list[Record]:
    """One row for each study, setting, mode and length, with means over samples (and over layers and heads)."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record.get(name) for name in GROUPED_BY), []).append(record)
    rows = []
    for group, members in groups.items():
        head = {name: value for name, value in zip(GROUPED_BY, group, strict=True) if value is not None}
        whole = [record for record in members if "skipped" not in record]
        rows.append(head | {"records": len(whole), "skipped": len(members) - len(whole)})
        if whole:
            rows[-1] |= _MEASURES[head["study"]](whole)
    return rows


def _overlap(records: Sequence[Record]) -> Record:
    """Means over heads. Coverage is of the attention on the middle, so heads that pay it none do not count."""
    means = {
        name: mean(value for record in records for row in record["per_head"][name] for value in row)
        for name in records[0]["per_head"]
    }
    return {
        "shared": means["shared"],
        "shared_chance": mean(record["chance"]["shared"] for record in records),
        "found": means["found"],
        "middle": means["middle"],
        "coverage": means["covered"] / means["middle"],
        "coverage_by_rope": means["covered_by_rope"] / means["middle"],
        "coverage_chance": mean(record["chance"]["covered"] for record in records),
    }


def _spread(records: Sequence[Record]) -> Record:
    entropies = [value for record in records for row in record["entropy"] for value in row]
    return {
        "trained_context": records[0]["trained_context"],
        "bound": records[0]["bound"],
        "highest_position": max(record["highest_position"] for record in records),
        "widest_scope": max(record["widest_scope"] for record in records),
        "entropy": mean(entropies),
        "entropy_highest_head": max(map(mean, zip(*map(_flat, (r["entropy"] for r in records)), strict=True))),
    }


def _sweep(records: Sequence[Record]) -> Record:
    return {"score": mean(record["score"] for record in records)}


def _cost(records: Sequence[Record]) -> Record:
    return {name: mean(record[name] for record in records) for name in ("prefill_seconds", "token_seconds")}


def table(rows: Sequence[Record]) -> list[list[str]]:
    """Measures of each study by length."""
    lengths = sorted({row["length"] for row in rows})
    lines: dict[tuple[str, str, str, str], dict[int, str]] = {}
    for row in rows:
        subject = f"{row['field']}={row['value']}" if "field" in row else row.get("kind", "")
        for measure, show in _SHOWN[row["study"]].items():
            line = lines.setdefault((row["study"], row["attention"], subject, measure), {})
            line[row["length"]] = "skipped" if not row["records"] else show(row)
    heads = ["study", "attention", "of", "measure"]
    body = [[*head, *(line.get(length, "-") for length in lengths)] for head, line in lines.items()]
    return [[*heads, *map(short_length, lengths)], *body]


def mean(values: Iterable[float]) -> float:
    """The mean of at least one number."""
    numbers = list(values)
    return sum(numbers) / len(numbers)


def mean_per_head(numbers: Sequence[Numbers]) -> Numbers:
    """The mean of several [L][H], element by element."""
    return [[mean(values) for values in zip(*rows, strict=True)] for rows in zip(*numbers, strict=True)]


def _flat(numbers: Numbers) -> list[float]:
    return [value for row in numbers for value in row]


def _percent(name: str) -> Callable[[Record], str]:
    return lambda row: f"{row[name]:.1%}"


GROUPED_BY: Final = ("study", "attention", "kind", "field", "value", "length")
_MEASURES: Final = {"overlap": _overlap, "spread": _spread, "sweep": _sweep, "cost": _cost}
_SHOWN: Final[dict[str, dict[str, Callable[[Record], str]]]] = {
    "overlap": {
        "winners shared": _percent("shared"),
        "by chance": _percent("shared_chance"),
        "winners with RoPE found": _percent("found"),
        "attention on the middle": _percent("middle"),
        "of it covered": _percent("coverage"),
        "selecting with RoPE": _percent("coverage_by_rope"),
        "at random": _percent("coverage_chance"),
    },
    "spread": {
        "highest position": lambda row: f"{row['highest_position']}",
        "keys in scope": lambda row: f"{row['widest_scope']}",
        "entropy (nats)": lambda row: f"{row['entropy']:.2f}",
        "most of any head": lambda row: f"{row['entropy_highest_head']:.2f}",
    },
    "sweep": {"needle score": _percent("score")},
    "cost": {
        "prompt (s)": lambda row: f"{row['prefill_seconds']:.3f}",
        "token (ms)": lambda row: f"{1000 * row['token_seconds']:.2f}",
    },
}
