"""Figures of a benchmark: percentiles, and a table for people beside JSON for programs."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile; NaN for no values."""
    if not values:
        return math.nan
    rank = math.ceil(percent / 100 * len(values))
    return sorted(values)[max(0, rank - 1)]


def medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each figure over the repeats."""
    return {name: median(run[name] for run in runs) for name in runs[0]}


def totals(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each figure over the repeats."""
    return {name: sum(run[name] for run in runs) for name in runs[0]}


def print_table(title: str, columns: Mapping[str, Mapping[str, float | str]]) -> None:
    """One column for each server, one row for each figure."""
    names = list(next(iter(columns.values())))
    width = max(map(len, names)) + 2
    print(f"\n{title}")
    print(" " * (width + 2) + "".join(f"{name:>16}" for name in columns))
    for name in names:
        cells = "".join(f"{_cell(figures[name]):>16}" for figures in columns.values())
        print(f"  {name:<{width}}{cells}", flush=True)


def _cell(value: float | str) -> str:
    if isinstance(value, str):
        return value
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.2f}"


def write_json(path: Path, figures: Mapping[str, object]) -> None:
    """Figures with the machine they come from."""
    machine = {"machine": platform.machine(), "python": platform.python_version()}
    path.write_text(json.dumps({**machine, **figures}, indent=2) + "\n")
