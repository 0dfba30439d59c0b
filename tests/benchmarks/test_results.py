"""Ratios round by round, verdicts, and the JSON that holds them."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from harness.results import Absent, Results, Run, compare, load, summarise, verdict
from harness.workloads import Line, Workload, workloads

GIB = 1 << 30
LINE = Line("amst", ("one", "two"), 0.5, 1.0)


def run(contender: str, number: int, seconds: float, *, ok: bool = True, busy: float = 0.0) -> Run:
    error = None if ok else "it broke"
    return Run(
        "file", contender, number, warmup=number == 0, ok=ok, error=error, bytes=GIB, seconds=seconds,
        wall_seconds=seconds + 1, client_cpu_s=0.5, server_cpu_s=0.25, client_peak_bytes=3 << 20,
        server_peak_bytes=4 << 20, busy_cores=busy,
    )  # fmt: skip


RUNS = [
    # The warm-up would give a ratio of 100.
    run("one", 0, 100.0), run("two", 0, 100.0), run("amst", 0, 1.0),
    run("one", 1, 1.0), run("two", 1, 2.0), run("amst", 1, 2.0),
    run("one", 2, 4.0), run("two", 2, 3.0), run("amst", 2, 4.0),
    run("one", 3, 1.0), run("two", 3, 2.0), run("amst", 3, 4.0),
]  # fmt: skip


def results(runs: Sequence[Run] = RUNS) -> Results:
    (workload,) = [one for one in workloads() if one.name == "file"]
    made = Results(
        "2026-01-02T03:04:05+0000",
        {"cpu": "a <cpu>", "cores": "2", "kernel": "6.1"},
        {"path": "/x", "file_system": "tmpfs"},
        3,
    )
    made.absent.append(Absent("file", "rclone", "rclone is not installed", "apt-get install rclone"))
    made.versions["one"] = "one 1.0 & more"
    made.add_workload(_with_lines(workload), runs)
    return made


def _with_lines(workload: Workload) -> Workload:
    return Workload(
        workload.name, workload.group, workload.title, workload.work, GIB, 0, 0, workload.contenders,
        (LINE, Line("amst", ("absent",), 0.5, 1.0)),
    )  # fmt: skip


def test_each_round_is_compared_with_the_better_peer_of_that_round() -> None:
    line = compare(LINE, RUNS)
    assert line.ratios == pytest.approx([0.5, 0.75, 0.25])
    assert (line.median, line.low, line.high) == pytest.approx((0.5, 0.25, 0.75))
    assert line.wall_median == pytest.approx(2 / 3)
    assert line.best == "one"
    assert line.verdict == "floor"


def test_failures_and_rounds_without_both_do_not_count() -> None:
    runs = [one for one in RUNS if (one.contender, one.round) != ("amst", 3)]
    runs += [run("amst", 3, 0.001, ok=False), run("amst", 4, 0.001)]
    assert compare(LINE, runs).ratios == pytest.approx([0.5, 0.75])
    nothing = compare(Line("amst", ("absent",), 0.5, 1.0), RUNS)
    assert (nothing.verdict, nothing.median, nothing.ratios) == ("none", None, ())


def test_rounds_on_a_busy_machine_are_counted() -> None:
    busy = [
        run("one", 1, 1.0, busy=1.0),
        run("two", 1, 2.0),
        run("amst", 1, 2.0),
        run("one", 2, 1.0),
        run("amst", 2, 1.0),
    ]
    assert compare(LINE, busy).loaded_rounds == 1
    stolen = run("one", 1, 1.0)
    assert not stolen.loaded
    stolen.steal_s = 1.0
    assert stolen.loaded


@pytest.mark.parametrize(
    "median, floor, goal, said",
    [
        (1.0, 0.5, 1.0, "goal"),
        (0.99, 0.5, 1.0, "floor"),
        (0.5, 0.5, 1.0, "floor"),
        (0.49, 0.5, 1.0, "short"),
        (0.49, None, None, "measured"),
        (0.49, None, 1.0, "short"),
    ],
)
def test_verdicts(median: float, floor: float | None, goal: float | None, said: str) -> None:
    assert verdict(median, floor, goal) == said


def test_a_summary_is_of_the_counted_rounds() -> None:
    one = summarise(RUNS)[0]
    assert (one.contender, len(one.rates), one.rate) == ("one", 3, GIB)
    assert one.cpu_s_per_gib == pytest.approx(0.75)
    assert (one.client_peak_bytes, one.server_peak_bytes) == (3 << 20, 4 << 20)


def test_results_survive_json() -> None:
    made = results()
    again = load(json.loads(json.dumps(made.as_dict())))
    assert again.as_dict() == json.loads(json.dumps(made.as_dict()))
    with pytest.raises(ValueError, match="schema"):
        load({"schema": 99})


def test_the_lines_of_the_table_name_contenders_of_their_workloads() -> None:
    for workload in workloads():
        names = [one.name for one in workload.contenders]
        assert len(set(names)) == len(names)
        for line in workload.lines:
            assert {line.ours, *line.against} <= set(names)
            assert next(one for one in workload.contenders if one.name == line.ours).ours
