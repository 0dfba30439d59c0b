"""The pace of a lane in memory, and what it tells of its sending half; the rest is what the conformance kit asks."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from leftovers import no_leftovers
from waiting import Task, wait_until

from amst_core.errors import ClosedError
from amst_core.interfaces import HEADER_SIZE, FlowSample, Lane, LaneTimeouts
from amst_core.testing import MemoryLane, memory, memory_lane_pair

HEADER = bytes(HEADER_SIZE)
CAPACITY = 1000


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    with no_leftovers():
        yield


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time of lanes in memory; ``now`` is set by the test."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(memory, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def send(lane: Lane, size: int) -> None:
    lane.send_frame(HEADER, memoryview(bytes(size)))


def receive(lane: Lane, size: int) -> None:
    assert lane.recv_frame(lambda _header: memoryview(bytearray(size))) == HEADER


def sample(lane: MemoryLane) -> FlowSample:
    found = lane.flow_sample()
    assert found is not None
    return found


def test_what_was_not_read_is_in_flight_and_what_there_is_no_room_for_unsent() -> None:
    near, far = memory_lane_pair(capacity=CAPACITY)
    size = 3 * CAPACITY
    sending = Task(send, near, size)
    wait_until(lambda: sample(near).in_flight == CAPACITY, "the queue to be full")
    full = sample(near)
    assert (full.delivered, full.sent, full.unsent) == (0, CAPACITY, HEADER_SIZE + 2 * CAPACITY)
    assert (full.window, full.lost) == (CAPACITY, 0)
    receive(far, size)
    sending.outcome()
    done = sample(near)
    assert done.delivered == done.sent == HEADER_SIZE + size
    assert done.in_flight == done.unsent == 0
    assert sample(far).sent == 0


def test_the_round_trip_is_how_long_bytes_wait_to_be_read(clock: SimpleNamespace) -> None:
    near, far = memory_lane_pair(capacity=CAPACITY)
    assert sample(near).rtt_s == sample(near).min_rtt_s > 0
    for waits_s in (0.5, 0.25):
        send(near, 10)
        clock.now += waits_s
        receive(far, 10)
    assert sample(near).rtt_s == pytest.approx(0.5 + (0.25 - 0.5) / 8)
    assert sample(near).min_rtt_s == pytest.approx(0.25)


def test_the_pace_in_force_is_that_of_one_direction() -> None:
    near, far = memory_lane_pair()
    near.set_pacing(1e6)
    assert (near.pace, far.pace) == (1e6, None)
    near.set_pacing(0.0)
    assert near.pace == 1, "a lane that may send nothing would never end"
    near.set_pacing(None)
    assert near.pace is None


def test_a_pace_is_no_timeout() -> None:
    near, far = memory_lane_pair(LaneTimeouts(write_s=0.002))
    near.set_pacing(20_000)
    sending = Task(send, near, 1000)
    receive(far, 1000)
    sending.outcome()


def test_the_end_wakes_a_sender_that_its_pace_holds_back() -> None:
    near, _far = memory_lane_pair()
    near.set_pacing(1)
    sending = Task(send, near, 1000)
    wait_until(lambda: sample(near).in_flight, "the first byte")
    near.abort()
    assert isinstance(sending.error(), ClosedError)
