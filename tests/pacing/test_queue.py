"""A standing queue: one's own is taken down, that of others is left alone, a passing one is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

from amst_core.pacing import QueueGuard, SessionFlow
from amst_core.pacing.queue import DRAIN_GAIN, GONE

TICK = 0.02
BANDWIDTH = 1e6
RTT = 0.1
BDP = BANDWIDTH * RTT


class Queued:
    """A guard over a path on which ``queue`` bytes wait of what the session sends.

    While the guard drains, less is sent than arrives and the queue falls, unless others make it and take the room.
    """

    def __init__(self, queue: float, *, others: bool = False, bandwidth: float = BANDWIDTH, rtt: float = RTT) -> None:
        self.guard = QueueGuard()
        self.queue = queue
        self.others = others
        self.now = 0.0
        self.flow = SessionFlow(None, tick_s=TICK)
        self.flow.bandwidth, self.flow.min_rtt_s = bandwidth, rtt

    def look(self) -> bool:
        flow, before = self.flow, self.now
        self.now += TICK
        flow.rounds += self.now // flow.min_rtt_s != before // flow.min_rtt_s
        flow.in_flight = round(flow.bdp + self.queue)
        drains = self.guard.look(flow, self.now)
        assert drains == self.guard.draining
        if drains and not self.others:
            self.queue = max(0.0, self.queue - (1 - DRAIN_GAIN) * flow.bandwidth * TICK)
        return drains

    def run(self, duration: float, change: Callable[[float], float] | None = None) -> list[bool]:
        """Whether it drains at each look of ``duration`` seconds; ``change`` gives the queue by the time."""
        drains = []
        for _ in range(round(duration / TICK)):
            if change is not None:
                self.queue = change(self.now)
            drains.append(self.look())
        return drains

    def attempts(self, duration: float) -> Iterator[tuple[float, float]]:
        """When each attempt to drain began and ended, within ``duration`` seconds."""
        began = None
        for _ in range(round(duration / TICK)):
            drains = self.look()
            if drains and began is None:
                began = self.now
            elif not drains and began is not None:
                yield began, self.now
                began = None


def test_a_standing_queue_is_taken_down() -> None:
    path = Queued(BDP)
    ((began, ended),) = path.attempts(30)
    assert began < 3.5 * RTT
    assert path.flow.in_flight <= GONE * BDP
    assert ended - began == pytest.approx(0.95 * BDP / ((1 - DRAIN_GAIN) * BANDWIDTH), abs=2 * TICK)


def test_no_queue_is_taken_down_further_than_it_must_be() -> None:
    path = Queued(BDP)
    list(path.attempts(30))
    assert path.queue > 0.03 * BDP, "the path would run empty"


@pytest.mark.parametrize("queue", [0.0, 0.25 * BDP])
def test_what_controllers_keep_waiting_is_no_standing_queue(queue: float) -> None:
    assert not any(Queued(queue).run(20))


def test_a_queue_that_goes_once_in_each_round_trip_is_not_standing() -> None:
    """Bursts make such."""
    assert not any(Queued(0).run(20, lambda now: 0.0 if now % RTT < TICK else 2 * BDP))


def test_a_queue_of_less_than_a_round_trip_is_not_standing() -> None:
    assert not any(Queued(0).run(20, lambda now: 2 * BDP if 0.5 <= now % 1 < 0.57 else 0.0))


def test_on_a_short_path_a_few_milliseconds_of_data_are_no_standing_queue() -> None:
    bdp = BANDWIDTH * 0.001
    assert not any(Queued(3.5 * bdp, rtt=0.001).run(10))
    assert any(Queued(4.5 * bdp, rtt=0.001).run(10))


def test_nothing_is_drained_before_the_path_is_known() -> None:
    assert not any(Queued(BDP, bandwidth=0).run(10))


def test_a_queue_that_does_not_shrink_is_left_alone_for_longer_each_time() -> None:
    attempts = list(Queued(BDP, others=True).attempts(200))
    pauses = [began - ended for (_, ended), (began, _) in pairwise(attempts)]
    assert pauses[:6] == [pytest.approx(pause, abs=3 * RTT) for pause in (4, 8, 16, 32, 32, 32)]
    needs = BDP / ((1 - DRAIN_GAIN) * BANDWIDTH)
    assert all(needs < ended - began < 3 * needs for began, ended in attempts)


def test_a_queue_that_went_ends_the_patience_with_others() -> None:
    path = Queued(BDP, others=True)
    assert len(list(path.attempts(20))) == 3  # the next pause would be of 16 s
    path.others = False
    (_,) = path.attempts(30)
    path.queue, path.others = BDP, True
    (_, ended), (began, _), *_ = path.attempts(20)
    assert began - ended == pytest.approx(4, abs=3 * RTT)


def test_a_queue_that_comes_back_is_taken_down_again_at_once() -> None:
    path = Queued(BDP)
    for _ in range(3):
        path.queue = BDP
        ((began, ended),) = path.attempts(6)
        assert ended - began < 0.5
        assert path.queue < 0.06 * BDP
