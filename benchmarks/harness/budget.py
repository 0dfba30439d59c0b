"""The budget of work: what `counting` found when it was recorded, and the most that it may find.

The file holds a table for each load and in it one for each metric: ``median``, ``least`` and ``most`` of the recorded
counts, and ``limit``.
"""

from __future__ import annotations

import statistics
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .counting import METRICS

FILE: Final = Path(__file__).resolve().parents[2] / "tests" / "budget" / "budget.toml"

MARGIN: Final[Mapping[str, float]] = {
    "calls": 1.5,
    "wakeups": 4.0,
    "switches": 4.0,
    "allocations": 1.3,
    "allocated_bytes": 4.0,
}
"""Limit over recorded median. Chunks of a quarter of the size pass those of calls and allocations (at half the size
1.8 and 1.45 times as many: the rest go with messages and acknowledgements); the spread under load stays below them.
What follows the timing (wakeups, switches) has an alarm for a loop that spins."""

_HEAD: Final = """\
# What a GiB (or a file) may cost in system calls, context switches and allocations, both sides together, with fixed
# streams: see benchmarks/harness/counting.py for what is counted and how. tests/budget fails when a limit is passed.
# Re-record after a change that is meant to cost more, or costs less: make budget BUDGET_ARGS=--record
"""


@dataclass(frozen=True, slots=True)
class Allowance:
    """What was recorded of one metric of one load, and its limit."""

    median: float
    least: float
    most: float
    limit: float


@dataclass(frozen=True, slots=True)
class Table:
    """The allowances of a load by metric; ``how`` says where they come from."""

    how: str
    metrics: Mapping[str, Allowance]


Budget = Mapping[str, Table]
"""By the name of the load."""


def record(counts: Mapping[str, Sequence[Mapping[str, float]]], *, how: str) -> Budget:
    """A budget from several counts of each load."""
    return {
        name: Table(how, {metric: _allow(metric, [one[metric] for one in some]) for metric in METRICS})
        for name, some in counts.items()
    }


def _allow(metric: str, values: Sequence[float]) -> Allowance:
    median = statistics.median(values)
    return Allowance(median, min(values), max(values), median * MARGIN[metric])


def excesses(counted: Mapping[str, float], table: Table) -> list[str]:
    """Each metric that passes its limit, as a sentence."""
    return [
        f"{name}: {counted[name]:,.0f}, over the limit of {one.limit:,.0f} (recorded: {one.median:,.0f})"
        for name, one in table.metrics.items()
        if counted[name] > one.limit
    ]


def read(path: Path = FILE) -> Budget:
    """The recorded budget.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    with path.open("rb") as file:
        tables = tomllib.load(file)
    return {
        load: Table(table["how"], {metric: Allowance(**table[metric]) for metric in METRICS})
        for load, table in tables.items()
    }


def write(budget: Budget, path: Path = FILE) -> None:
    lines = [_HEAD]
    for load, table in budget.items():
        lines += [f"[{load}]", f'how = "{table.how}"']
        for metric, one in table.metrics.items():
            values = ", ".join(f"{key} = {getattr(one, key):.1f}" for key in ("median", "least", "most", "limit"))
            lines.append(f"{metric} = {{ {values} }}")
        lines.append("")
    path.write_text("\n".join(lines))
