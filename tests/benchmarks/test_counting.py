"""What strace and libmemusage print, as seen, and the budget's file."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import budget
from harness.counting import METRICS, parse_memusage, parse_strace
from harness.errors import RunError

STRACE = """\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ------------------
 35.72    0.777672       10232        76         4 recvfrom
 34.08    0.741839         141      5230       419 futex
 10.02    0.218087         599       364           sendmsg
------ ----------- ----------- --------- --------- ------------------
100.00    2.176886         168     12884      1186 total
"""
MEMUSAGE = (
    "listening on 127.0.0.1:36643\n\n"
    "\x1b[01;32mMemory usage summary:\x1b[0;0m heap total: 178166177, heap peak: 27757408, stack peak: 70160\n"
    "\x1b[04;34m         total calls   total memory   failed calls\x1b[0m\n"
    "\x1b[00;34m malloc|\x1b[0m     969419      145274072              0\x1b[00;00m\n"
    "\x1b[00;34mrealloc|\x1b[0m      98927       11239846              0\x1b[00;00m"
    "  (nomove:36448, dec:24242, free:0)\n"
    "\x1b[00;34m calloc|\x1b[0m     253723       21652259              0\x1b[00;00m\n"
    "\x1b[00;34m   free|\x1b[0m    1222985      172084144\n"
)


def test_system_calls_are_read_without_their_total() -> None:
    assert parse_strace(STRACE) == {"recvfrom": 76, "futex": 5230, "sendmsg": 364}


def test_allocations_are_added_up_without_what_was_freed() -> None:
    assert parse_memusage(MEMUSAGE) == (969419 + 98927 + 253723, 145274072 + 11239846 + 21652259)
    with pytest.raises(RunError, match="no summary"):
        parse_memusage("Killed\n")


def test_a_budget_survives_its_file(tmp_path: Path) -> None:
    counted = [dict.fromkeys(METRICS, value) for value in (100.0, 110.0, 300.0)]
    recorded = budget.record({"load": counted}, how="3 runs")
    budget.write(recorded, tmp_path / "budget.toml")
    assert budget.read(tmp_path / "budget.toml") == recorded
    calls = recorded["load"].metrics["calls"]
    assert (calls.median, calls.least, calls.most, calls.limit) == (110.0, 100.0, 300.0, 165.0)


def test_what_passes_its_limit_is_named() -> None:
    table = budget.record({"load": [dict.fromkeys(METRICS, 100.0)]}, how="")["load"]
    counted = dict.fromkeys(METRICS, 130.0)
    assert budget.excesses(counted, table) == []
    assert budget.excesses({**counted, "calls": 151.0}, table) == ["calls: 151, over the limit of 150 (recorded: 100)"]


def test_the_budget_in_the_repository_has_the_margins_of_today() -> None:
    for name, table in budget.read().items():
        for metric, one in table.metrics.items():
            assert one.limit == pytest.approx(one.median * budget.MARGIN[metric], abs=1), (name, metric)
