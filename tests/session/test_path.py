"""What a session sees of its path, by what its lanes tell."""

from __future__ import annotations

from typing import Any

import pytest

from amst_core.interfaces import PathSample, PathStats
from amst_core.session.path import PathMeter

MB = 1_000_000


class Lanes:
    """Lanes by hand, looked at every half second."""

    def __init__(self, count: int = 2, **tells: Any) -> None:
        self.now = 10.0
        self.meter = PathMeter()
        start: dict[str, Any] = dict(
            rtt_s=0.02, app_limited=False, bytes_acknowledged=0, segments_sent=0, segments_retransmitted=0,
            peer_limited_s=0.0,
        )  # fmt: skip
        self.tells = {lane: start | tells for lane in range(count)}
        self.limited = False
        self.look()

    def look(self, after: float = 0.5) -> PathSample:
        self.now += after
        lanes = {lane: PathStats(**tells) for lane, tells in self.tells.items()}
        return self.meter.sample(lanes, self.now, limited=self.limited)

    def deliver(self, *amounts: int, lost: int = 0) -> None:
        for lane, amount in enumerate(amounts):
            tells = self.tells[lane]
            tells["bytes_acknowledged"] += amount
            tells["segments_sent"] += amount // 1000
            tells["segments_retransmitted"] += lost


def test_the_bandwidth_is_what_all_lanes_delivered() -> None:
    lanes = Lanes()
    lanes.deliver(MB, 3 * MB)
    assert lanes.look() == PathSample(0.02, 8 * MB, None)
    lanes.deliver(MB, 0)
    assert lanes.look(0.25).bandwidth == 4 * MB


def test_an_idle_session_tells_nothing() -> None:
    lanes = Lanes()
    assert lanes.look() == PathSample(None, None, None)
    lanes.deliver(MB, MB)
    assert lanes.look(after=10.0).bandwidth is None, "nobody knows when of these ten seconds"


def test_the_round_trip_is_the_shortest_of_those_that_moved() -> None:
    lanes = Lanes(3)
    lanes.tells[0]["rtt_s"], lanes.tells[1]["rtt_s"], lanes.tells[2]["rtt_s"] = 0.001, 0.030, 0.025
    lanes.deliver(0, MB, MB)
    assert lanes.look().latency_s == 0.025, "that of the first one may be of long ago"


@pytest.mark.parametrize(
    ("limit", "seen"),
    [
        (lambda lanes: None, True),
        (lambda lanes: setattr(lanes, "limited", True), False),
        (lambda lanes: lanes.tells[1].update(app_limited=True), False),
        (lambda lanes: lanes.tells[0].update(app_limited=True), True),  # it had a quarter of the bytes
        (lambda lanes: lanes.tells[1].update(peer_limited_s=0.4), False),
        (lambda lanes: lanes.tells[0].update(peer_limited_s=0.4), True),
        (lambda lanes: lanes.tells[1].update(app_limited=None), False),
        (lambda lanes: [tells.update(peer_limited_s=None) for tells in lanes.tells.values()], True),
    ],
    ids=["nothing", "a limit", "the application", "of one lane", "the peer", "of one", "unknown", "never told"],
)
def test_what_something_else_limited_is_no_bandwidth(limit: Any, seen: bool) -> None:
    lanes = Lanes()
    lanes.deliver(MB, 3 * MB)
    limit(lanes)
    assert (lanes.look().bandwidth is not None) == seen


def test_losses_count_when_enough_was_sent_and_the_first_round_trips_are_over() -> None:
    lanes = Lanes(rtt_s=0.2)
    lanes.deliver(4 * MB, 4 * MB, lost=500)
    assert lanes.look().loss is None, "the senders look for the rate of the path"
    for _ in range(3):
        lanes.deliver(MB, MB, lost=10)
        assert lanes.look().loss is None
    lanes.deliver(MB, MB, lost=10)
    assert lanes.look().loss == 0.01
    lanes.deliver(100_000, 100_000)
    assert lanes.look().loss is None, "of so few segments nobody can tell"


def test_lanes_come_and_go() -> None:
    lanes = Lanes(2)
    lanes.deliver(MB, MB)
    lanes.tells[7] = lanes.tells[0] | {"bytes_acknowledged": 50 * MB}
    assert lanes.look().bandwidth == 4 * MB, "what a new one delivered before counts for nobody"
    del lanes.tells[0]
    lanes.tells[1]["bytes_acknowledged"] += MB
    assert lanes.look().bandwidth == 2 * MB
    lanes.tells.clear()
    assert lanes.look() == PathSample(None, None, None)
