"""Results: runs, the lines of the table computed from them, and both as JSON.

The JSON file is one object::

    schema        1
    started       local time, ISO 8601
    machine       what `machine.describe` tells, by name
    directory     {"path", "file_system"} that files were copied in
    rounds        rounds measured after the warm-up
    versions      contender -> what its program calls itself
    workloads     [{"name", "group", "title", "bytes", "streams", "files"}], in the order of the table
    absent        [{"workload", "contender", "reason", "how_to_get"}]: peers and ways of ours that did not run
    runs          [`Run`], in the order in which they ran; the warm-up of each has round 0 and counts nowhere
    lines         [{"workload", `Comparison`}]

Sizes are bytes, times seconds, CPU seconds sum over cores. ``null`` means unknown.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from .machine import BUSY_CORES
from .workloads import Line, Workload

SCHEMA: Final = 1
ENOUGH_ROUNDS: Final = 5
GIB: Final = 1 << 30


@dataclass(slots=True)
class Run:
    """One contender doing one workload once.

    ``bytes`` and ``seconds`` are the contender's own figures where it has any, ``wall_seconds`` run from the start of
    its client to its end. CPU includes the client's start and not the server's. Peaks are VmHWM. ``busy_cores``: cores
    that others kept busy just before; ``others_cpu_s``: what others used meanwhile; ``steal_s``: what the hypervisor
    took.
    """

    workload: str
    contender: str
    round: int
    warmup: bool
    ok: bool = False
    error: str | None = None
    bytes: int = 0
    seconds: float = 0.0
    wall_seconds: float = 0.0
    client_cpu_s: float = 0.0
    server_cpu_s: float = 0.0
    client_peak_bytes: int = 0
    server_peak_bytes: int = 0
    load_1m: float = 0.0
    busy_cores: float = 0.0
    others_cpu_s: float = 0.0
    steal_s: float = 0.0

    @property
    def rate(self) -> float:
        """Bytes/s by the contender's clock."""
        return self.bytes / self.seconds if self.seconds else 0.0

    @property
    def wall_rate(self) -> float:
        """Bytes/s with starting up and ending."""
        return self.bytes / self.wall_seconds if self.wall_seconds else 0.0

    @property
    def cpu_s_per_gib(self) -> float:
        """Of both sides."""
        return (self.client_cpu_s + self.server_cpu_s) / (self.bytes / GIB) if self.bytes else 0.0

    @property
    def loaded(self) -> bool:
        """Whether it began, or went on, beside other work."""
        others = (self.others_cpu_s + self.steal_s) / self.wall_seconds if self.wall_seconds else 0.0
        return self.busy_cores > BUSY_CORES or others > BUSY_CORES


@dataclass(frozen=True, slots=True)
class Absent:
    """Somebody who did not take part, why, and how to get them."""

    workload: str
    contender: str
    reason: str
    how_to_get: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """A line of the table. Ratios are of one round each; ``median``, ``low`` and ``high`` are of them.

    ``wall_median`` is the same by the clock on the wall. ``best``: who was the peer in most rounds. ``verdict``:
    "goal", "floor" (reached), "short", "measured" (nothing is asked for) or "none" (no round has both).
    """

    ours: str
    against: Sequence[str]
    floor: float | None
    goal: float | None
    ratios: Sequence[float]
    median: float | None
    low: float | None
    high: float | None
    wall_median: float | None
    best: str | None
    verdict: str
    loaded_rounds: int


def compare(line: Line, runs: Sequence[Run]) -> Comparison:
    """``line`` computed from the runs of one workload; warm-ups and failures do not count."""
    by_round: dict[int, dict[str, Run]] = {}
    for run in runs:
        if run.ok and not run.warmup:
            by_round.setdefault(run.round, {})[run.contender] = run
    ratios, wall_ratios, bests, loaded = [], [], [], 0
    for _, present in sorted(by_round.items()):
        peers = [present[name] for name in line.against if name in present]
        own = present.get(line.ours)
        if own is None or not peers:
            continue
        best = max(peers, key=lambda run: run.rate)
        ratios.append(own.rate / best.rate)
        wall_ratios.append(own.wall_rate / max(peer.wall_rate for peer in peers))
        bests.append(best.contender)
        loaded += own.loaded or best.loaded
    if not ratios:
        return Comparison(line.ours, line.against, line.floor, line.goal, (), None, None, None, None, None, "none", 0)
    median = statistics.median(ratios)
    return Comparison(
        line.ours, line.against, line.floor, line.goal, ratios, median, min(ratios), max(ratios),
        statistics.median(wall_ratios), statistics.mode(bests), verdict(median, line.floor, line.goal), loaded,
    )  # fmt: skip


def verdict(median: float, floor: float | None, goal: float | None) -> str:
    """See `Comparison`."""
    if goal is not None and median >= goal:
        return "goal"
    if floor is not None:
        return "floor" if median >= floor else "short"
    return "measured" if goal is None else "short"


@dataclass(frozen=True, slots=True)
class Summary:
    """A contender's medians over the rounds of one workload, as the report shows them."""

    contender: str
    rates: Sequence[float]
    rate: float
    wall_rate: float
    cpu_s_per_gib: float
    client_peak_bytes: int
    server_peak_bytes: int


def summarise(runs: Sequence[Run]) -> list[Summary]:
    """Each contender of one workload that has a counted run, in order of appearance."""
    counted: dict[str, list[Run]] = {}
    for run in runs:
        if run.ok and not run.warmup:
            counted.setdefault(run.contender, []).append(run)
    return [
        Summary(
            name,
            [run.rate for run in mine],
            statistics.median(run.rate for run in mine),
            statistics.median(run.wall_rate for run in mine),
            statistics.median(run.cpu_s_per_gib for run in mine),
            max(run.client_peak_bytes for run in mine),
            max(run.server_peak_bytes for run in mine),
        )
        for name, mine in counted.items()
    ]


@dataclass(slots=True)
class Results:
    """All of it; see the head of this file."""

    started: str
    machine: Mapping[str, str]
    directory: Mapping[str, str]
    rounds: int
    workloads: list[Mapping[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    absent: list[Absent] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    lines: list[tuple[str, Comparison]] = field(default_factory=list)

    def add_workload(self, workload: Workload, runs: Sequence[Run]) -> None:
        """Note a workload that has been run to its end, and compute its lines."""
        self.workloads.append(
            {
                "name": workload.name,
                "group": workload.group,
                "title": workload.title,
                "bytes": workload.size,
                "streams": workload.streams,
                "files": workload.files,
            }
        )
        self.runs += runs
        self.lines += [(workload.name, compare(line, runs)) for line in workload.lines]

    def runs_of(self, workload: str) -> list[Run]:
        return [run for run in self.runs if run.workload == workload]

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "started": self.started,
            "machine": dict(self.machine),
            "directory": dict(self.directory),
            "rounds": self.rounds,
            "versions": self.versions,
            "workloads": [dict(workload) for workload in self.workloads],
            "absent": [dataclasses.asdict(one) for one in self.absent],
            "runs": [dataclasses.asdict(run) for run in self.runs],
            "lines": [{"workload": name, **dataclasses.asdict(line)} for name, line in self.lines],
        }


def load(value: Mapping[str, Any]) -> Results:
    """Results from their JSON.

    Raises:
        ValueError: it is of another schema.
    """
    if value.get("schema") != SCHEMA:
        raise ValueError(f"schema {value.get('schema')!r}; this program reads {SCHEMA}")
    return Results(
        started=value["started"],
        machine=value["machine"],
        directory=value["directory"],
        rounds=value["rounds"],
        workloads=list(value["workloads"]),
        versions=dict(value["versions"]),
        absent=[Absent(**one) for one in value["absent"]],
        runs=[Run(**one) for one in value["runs"]],
        lines=[
            (one["workload"], Comparison(**{k: v for k, v in one.items() if k != "workload"})) for one in value["lines"]
        ],
    )
