"""The report as a page and as text, from results made up here."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from harness.charts import Row, bars, tick_step
from harness.report import failures, render, text_table
from harness.results import Results, Run, compare
from harness.workloads import Line, workloads

GIB = 1 << 30


def run(contender: str, number: int, seconds: float, error: str | None = None) -> Run:
    return Run(
        "file", contender, number, number == 0, error is None, error, GIB, seconds, seconds, 0.5, 0.25, 1 << 20, 0
    )


def results(*extra: Run) -> Results:
    machine = {"cpu": "a <cpu>", "cores": "2", "kernel": "6.1"}
    made = Results("2026-01-02T03:04:05+0000", machine, {"path": "/x", "file_system": "tmpfs"}, 2)
    (workload,) = [one for one in workloads(size=GIB) if one.name == "file"]
    runs = [run("cp", 0, 1.0), run("cp", 1, 1.0), run("amst", 1, 2.0), run("cp", 2, 1.0), run("amst", 2, 1.0), *extra]
    made.add_workload(workload, runs)
    return made


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    page = render(results())
    for drawn in re.findall(r"<svg.*?</svg>", page):
        ElementTree.fromstring(drawn)
    assert page.count("<svg") == 2
    assert not re.search(r"https?://|<script|<link|src=", page)
    assert "a &lt;cpu&gt;" in page and "<cpu>" not in page


def test_a_line_has_ours_peer_ratio_floor_goal_and_verdict() -> None:
    page = render(results())
    row = next(row for row in re.findall(r"<tr>.*?</tr>", page) if ">amst</td>" in row and ">cp</td>" in row)
    expected = ("0.81, 1.07 GB/s", "<b>0.75</b>", "0.50–1.00", ">0.40<", ">0.50<", "goal reached")
    for text in (*expected, "0.75, 0.75 s/GiB", "1 + –, 1 + –"):
        assert text in row, (text, row)
    assert "not measured" in page
    assert "| file → file | amst | cp | 0.75 (0.50–1.00) | 0.40 | 0.50 | goal reached |" in text_table(results())


def test_few_rounds_are_no_result() -> None:
    assert "Only 2 rounds" in render(results())
    many = results()
    many.rounds = 5
    assert "Only" not in render(many)


def test_failed_runs_are_shown_and_ours_are_told() -> None:
    made = results(run("cp", 3, 1.0, "disk <full>"), run("amst", 3, 1.0, "what arrived is not what was sent"))
    page = render(made)
    assert "cp, round 3: disk &lt;full&gt;" in page and "2 runs failed" in page
    assert list(failures(made)) == ["file, amst, round 3: what arrived is not what was sent"]


def test_small_files_are_told_by_the_file() -> None:
    (workload,) = [one for one in workloads(files=1000) if one.name == "tree"]
    made = Results("", {"cpu": "", "cores": "", "kernel": ""}, {"path": "", "file_system": ""}, 1)
    one = Run("tree", "cp", 1, False, True, None, workload.size, 1.0, 1.0, 1.5, 0.5)
    made.add_workload(workload, [one])
    page = render(made)
    assert "<td>10.24</td>" in page and "CPU ms/file" in page and "<td>2.00</td>" in page


def test_who_did_not_take_part_is_named_with_how_to_get_them() -> None:
    from harness.results import Absent

    made = results()
    made.absent += [Absent("memory-1", "nuttcp", "nuttcp is not installed", "apt-get install nuttcp")]
    made.absent += [Absent("memory-4", "nuttcp", "nuttcp is not installed", "apt-get install nuttcp")]
    page = render(made)
    assert "memory-1, memory-4" in page and "<code>apt-get install nuttcp</code>" in page


@pytest.mark.parametrize(
    "largest, step", [(0.0, 1.0), (1.0, 0.2), (3.9, 0.5), (4.0, 1.0), (137.7, 20.0), (0.02, 0.005)]
)
def test_ticks_are_round(largest: float, step: float) -> None:
    assert tick_step(largest) == pytest.approx(step)


def test_a_bar_is_as_long_as_its_value() -> None:
    drawn = ElementTree.fromstring(bars([Row("a & b", 2.0, [1.0, 3.0]), Row("c", 4.0, ours=True)], unit="x", title="t"))
    short, long = (float(one.attrib["width"]) for one in drawn.iter("rect"))
    assert long == pytest.approx(2 * short)
    assert [one.text for one in drawn.iter("text") if "label" in one.attrib["class"]] == ["a & b", "c"]


def test_a_ratio_of_nothing_is_a_dash() -> None:
    assert compare(Line("amst", ("cp",)), []).median is None
