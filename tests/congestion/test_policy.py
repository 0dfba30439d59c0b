"""Which congestion control a lane gets, and what is said of it."""

from __future__ import annotations

import logging

import pytest

from amst_core.congestion import AUTO, CongestionPolicy
from amst_core.errors import UnavailableError
from amst_core.interfaces import Lane, PathStats

BOTH = {"bbr": "bbr", "cubic": "cubic"}


class Path(Lane):
    """A lane of a system that has some algorithms, and a round trip."""

    def __init__(self, *, has: tuple[str, ...] = ("bbr", "cubic", "reno"), rtt_s: float | None = 0.05) -> None:
        self.has = has
        self.rtt_s = rtt_s
        self.algorithm: str | None = "reno" if has else None

    def send_frame(self, header, payload):
        raise AssertionError("nothing is sent")

    def recv_frame(self, place):
        raise AssertionError("nothing is received")

    def close(self):
        pass

    def abort(self):
        pass

    def set_congestion(self, algorithm: str) -> str:
        if algorithm not in self.has:
            raise UnavailableError(f"it has no {algorithm}")
        self.algorithm = algorithm
        return algorithm

    def path_stats(self) -> PathStats:
        return PathStats(min_rtt_s=self.rtt_s, congestion=self.algorithm)


def test_the_one_that_was_asked_for_runs():
    lane = Path()
    found = CongestionPolicy("cubic", BOTH).apply(lane)
    assert (found.asked, found.algorithm, found.backend) == ("cubic", "cubic", "kernel")
    assert found.reason == "cubic, asked for"
    assert lane.algorithm == "cubic"


@pytest.mark.parametrize(("rtt_s", "expected"), [(0.0005, "cubic"), (0.0099, "cubic"), (0.01, "bbr"), (0.3, "bbr")])
def test_auto_goes_by_the_round_trip(rtt_s: float, expected: str):
    found = CongestionPolicy(AUTO, BOTH).apply(Path(rtt_s=rtt_s))
    assert found.algorithm == expected
    assert "round trip" in found.reason


def test_auto_without_a_round_trip_takes_the_one_for_short_ones():
    assert CongestionPolicy(AUTO, BOTH).apply(Path(rtt_s=None)).algorithm == "cubic"


def test_each_lane_is_judged_by_its_own_path():
    policy = CongestionPolicy(AUTO, BOTH)
    assert [policy.apply(Path(rtt_s=rtt_s)).algorithm for rtt_s in (0.001, 0.1)] == ["cubic", "bbr"]


@pytest.mark.parametrize(("has", "expected"), [(("cubic", "reno"), "cubic"), (("reno",), "reno")])
def test_what_the_system_refuses_falls_back_to_cubic_and_then_to_its_own(has: tuple[str, ...], expected: str):
    for asked in ("bbr", AUTO):
        found = CongestionPolicy(asked, BOTH).apply(Path(has=has))
        assert (found.algorithm, found.backend) == (expected, "kernel")
        assert "it has no bbr" in found.reason
        assert ("it has no cubic" in found.reason) == ("the system's own stays" in found.reason) == (expected == "reno")


def test_auto_leaves_the_systems_own_where_the_plugin_is_not_installed():
    found = CongestionPolicy(AUTO, {}).apply(Path())
    assert (found.algorithm, found.backend) == ("reno", "kernel")
    assert "no installed plugin offers bbr" in found.reason and "the system's own stays" in found.reason


def test_one_that_is_not_there_is_as_if_the_path_decided():
    found = CongestionPolicy("mine", BOTH).apply(Path(rtt_s=0.1))
    assert (found.asked, found.algorithm) == ("mine", "bbr")
    assert found.reason.startswith("no installed plugin offers mine; bbr, for the round trip")


def test_one_that_is_broken_says_so():
    found = CongestionPolicy("mine", BOTH, {"mine": "it needs numpy"}).apply(Path())
    assert "mine is installed and cannot be used: it needs numpy" in found.reason


def test_a_controller_that_no_system_has_falls_back():
    found = CongestionPolicy("mine", {"mine": None}).apply(Path())
    assert (found.asked, found.algorithm) == ("mine", "cubic")
    assert "no system has mine" in found.reason


def test_a_system_may_call_it_otherwise():
    assert CongestionPolicy("newreno", {"newreno": "reno"}).apply(Path()).algorithm == "reno"


def test_a_lane_without_any_has_no_backend():
    found = CongestionPolicy("bbr", BOTH).apply(Path(has=()))
    assert (found.algorithm, found.backend) == (None, None)


def test_each_outcome_is_logged_once(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "amst.session")
    policy = CongestionPolicy("bbr", BOTH)
    for _ in range(3):
        policy.apply(Path())
        policy.apply(Path(has=("cubic",)))
    assert [(record.levelno, record.args[0]) for record in caplog.records] == [
        (logging.INFO, "bbr"),
        (logging.WARNING, "cubic"),
    ]
