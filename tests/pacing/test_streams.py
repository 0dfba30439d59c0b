"""How many lanes a session takes: by their windows, or by what more and fewer carried."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest

from amst_core.pacing import Range, RateTuner, SessionFlow, StreamTuner, WindowTuner

TICK = 0.02
RTT = 0.1
RATE = 10e6
OPENING_S = 0.3
WINDOW = 50_000
"""Of one lane: it allows RATE / 20."""


class Path:
    """A path that carries ``carries(lanes)`` bytes/s, with round trips of ``waits(lanes)`` shortest ones.

    Lanes that are wanted carry `OPENING_S` later, up to ``comes`` of them; those that are not wanted go at once. What
    is an attribute may be changed between runs.
    """

    def __init__(
        self,
        tuner: StreamTuner,
        *,
        carries: Callable[[int], float] = lambda lanes: RATE,
        waits: Callable[[int], float] = lambda lanes: 1.0,
        bandwidth: float = RATE,
        window: float = WINDOW,
    ) -> None:
        self.tuner, self.carries, self.waits, self.window = tuner, carries, waits, window
        self.settled = True
        self.idle = False
        self.starved = False
        self.comes = 1 << 30
        self.now = 0.0
        self.live = tuner.wanted
        self.changes: list[tuple[float, int]] = []
        self.flow = SessionFlow(None, tick_s=TICK)
        self.flow.bandwidth, self.flow.min_rtt_s = bandwidth, RTT
        self._coming: list[float] = []

    def run(self, duration: float) -> list[int]:
        """How many lanes are wanted at each look; ``changes`` gets each change with its time."""
        wanted = []
        for _ in range(round(duration / TICK)):
            before = self.tuner.wanted
            wanted.append(self.look())
            assert self.tuner.range.least <= wanted[-1] <= self.tuner.range.most
            if wanted[-1] != before:
                self.changes.append((self.now, wanted[-1]))
        return wanted

    def run_until(self, wanted: int, *, within_s: float) -> None:
        end = self.now + within_s
        while self.tuner.wanted != wanted:
            assert self.now < end, f"there are {self.tuner.wanted} lanes and not {wanted}"
            self.run(TICK)

    def look(self) -> int:
        flow, tuner = self.flow, self.tuner
        self.now += TICK
        while self._coming and self._coming[0] <= self.now:
            self._coming.pop(0)
            self.live = min(self.comes, self.live + 1)
        flow.delivered += round(self.carries(self.live) * TICK)
        flow.window = round(self.live * self.window)
        flow.rtt_s = self.waits(self.live) * RTT
        flow.unsent = 0 if self.starved else 1 << 20
        wanted = tuner.look(flow, self.live, self.now, settled=self.settled, idle=self.idle)
        assert wanted == tuner.wanted
        more = wanted - self.live - len(self._coming)
        if more > 0:
            self._coming += [self.now + OPENING_S] * more
        elif wanted < self.live:
            self.live = wanted
        return wanted


# ---- by their windows -------------------------------------------------------------------------


@pytest.mark.parametrize("start", [1, 4, 16])
def test_lanes_are_added_until_their_windows_allow_what_the_path_carries_and_some(start: int) -> None:
    path = Path(WindowTuner(Range(start, 1, 64)))
    path.run(20)
    assert 1.3 * RATE <= path.flow.capacity < 2.5 * RATE
    assert path.live == path.tuner.wanted
    settled = path.tuner.wanted
    assert set(path.run(60)) == {settled}, "it stops"


def test_lanes_are_added_within_a_second_or_two() -> None:
    path = Path(WindowTuner(Range(4, 1, 64)))
    path.run(3)
    assert path.flow.capacity >= 1.3 * RATE


def test_those_that_are_coming_are_not_asked_for_again() -> None:
    """The path needs twice as many as there are, and takes long to get them."""
    path = Path(WindowTuner(Range(16, 1, 64)), window=1.3 * RATE * RTT / 31.5)
    path.flow.bandwidth = RATE
    path.run(10)
    first = path.changes[0][1]
    assert 16 < first <= 32
    assert path.tuner.wanted <= 34


def test_never_more_than_the_range_has_whatever_the_windows_are() -> None:
    path = Path(WindowTuner(Range(4, 2, 24)), window=10)
    path.run(10)
    assert path.tuner.wanted == path.live == 24
    assert not path.tuner.wants_more


def test_while_there_are_too_few_more_are_wanted() -> None:
    path = Path(WindowTuner(Range(4, 2, 64)))
    path.look()
    assert path.tuner.wants_more
    path.run(20)
    assert not path.tuner.wants_more


@pytest.mark.parametrize("allowed", [1.4, 2.4])
def test_what_is_enough_and_no_more_stays(allowed: float) -> None:
    path = Path(WindowTuner(Range(10, 1, 64)), window=allowed * RATE * RTT / 10)
    assert set(path.run(60)) == {10}


def test_windows_that_allow_far_too_much_for_a_while_cost_lanes_one_by_one() -> None:
    path = Path(WindowTuner(Range(16, 1, 64)), window=5 * RATE * RTT / 16)
    assert set(path.run(2.0)) == {16}
    path.run(30)
    assert [lanes for _, lanes in path.changes] == [15, 14, 13, 12, 11, 10, 9, 8]
    assert 1.3 * RATE < path.flow.capacity <= 2.5 * RATE


def test_no_lane_goes_for_windows_that_are_large_for_a_moment() -> None:
    path = Path(WindowTuner(Range(16, 1, 64)))
    for _ in range(20):
        path.window = 4 * RATE * RTT / 16
        path.run(1.5)
        path.window = 2 * RATE * RTT / 16
        path.run(0.5)
    assert path.changes == []


def test_the_last_lanes_of_the_range_stay() -> None:
    path = Path(WindowTuner(Range(6, 4, 64)), window=100 * RATE * RTT)
    path.run(30)
    assert path.tuner.wanted == 4


def test_no_lane_goes_before_the_bandwidth_is_known() -> None:
    path = Path(WindowTuner(Range(16, 1, 64)), window=5 * RATE * RTT / 16)
    path.settled = False
    assert set(path.run(10)) == {16}


@pytest.mark.parametrize("window", [10, WINDOW, 100 * RATE * RTT])
@pytest.mark.parametrize("kind", [WindowTuner, RateTuner])
def test_a_fixed_number_stays(kind: type[StreamTuner], window: float) -> None:
    path = Path(kind(Range(8, 8, 8)), window=window, waits=lambda lanes: 1.5)
    assert set(path.run(60)) == {8}
    assert path.tuner.reason == "as many as were asked for"


@pytest.mark.parametrize("window", [10, 100 * RATE * RTT])
def test_an_application_that_sends_nothing_changes_nothing(window: float) -> None:
    path = Path(WindowTuner(Range(8, 1, 64)), window=window)
    path.idle = True
    assert set(path.run(20)) == {8}


@pytest.mark.parametrize("kind", [WindowTuner, RateTuner])
def test_a_number_that_somebody_asks_for_ends_the_choosing(kind: type[StreamTuner]) -> None:
    path = Path(kind(Range(8, 1, 64)))
    path.run(3)
    path.tuner.fix(Range(5, 5, 5))
    assert path.tuner.wanted == path.tuner.goal == 5
    assert set(path.run(60)) == {5}
    assert path.tuner.reason == "as many as were asked for"


# ---- by what they carry -----------------------------------------------------------------------


def full_above(lanes: int) -> Callable[[int], float]:
    """Packets wait where there are more than ``lanes``."""
    return lambda there: 1.3 if there > lanes else 1.0


def up_to(lanes: int) -> Callable[[int], float]:
    """Each lane carries its part up to ``lanes``, and more lanes carry no more."""
    return lambda there: RATE * min(there, lanes) / lanes


def test_on_a_full_path_lanes_leave_one_by_one_as_long_as_the_rest_carries_as_much() -> None:
    path = Path(RateTuner(Range(16, 1, 64)), waits=lambda lanes: 1.3)
    path.run(60)
    wanted = [lanes for _, lanes in path.changes]
    assert wanted == list(range(15, 0, -1))
    apart = [later - sooner for (sooner, _), (later, _) in pairwise(path.changes)]
    assert min(apart) > 2 * RTT, "so that the others can take over what it carried"
    assert "streams changed" in path.tuner.reason


@pytest.mark.parametrize(("left", "kept"), [(0.98, True), (0.96, False)])
def test_fewer_lanes_are_kept_if_they_carry_almost_as_much(left: float, kept: bool) -> None:
    path = Path(
        RateTuner(Range(16, 12, 16)), carries=lambda lanes: RATE if lanes >= 16 else left * RATE, waits=full_above(0)
    )
    path.run(9)
    assert min(lanes for _, lanes in path.changes) == 12
    assert path.tuner.wanted == path.tuner.goal == (12 if kept else 16)


@pytest.mark.parametrize(("gain", "kept"), [(1.05, True), (1.02, False)])
def test_more_lanes_are_kept_only_if_they_carry_more(gain: float, kept: bool) -> None:
    path = Path(
        RateTuner(Range(8, 1, 16)), carries=lambda lanes: RATE if lanes <= 8 else gain * RATE, window=0, bandwidth=1
    )
    path.run(2.5)
    assert path.tuner.wanted == 16
    path.run(7)
    assert path.tuner.wanted == (16 if kept else 8)


def test_a_path_with_room_gets_lanes_until_they_bring_nothing() -> None:
    path = Path(RateTuner(Range(4, 1, 256)), carries=up_to(64), bandwidth=1)
    for lanes in (8, 16, 32, 64, 128):
        path.run_until(lanes, within_s=5)
    path.run_until(64, within_s=30)
    assert path.tuner.goal == 64


def test_on_a_long_fat_path_more_come_at_once() -> None:
    """As many as its product wants, but no more than fourfold."""
    path = Path(RateTuner(Range(4, 1, 256)), bandwidth=100e6)
    path.run(3)
    assert path.changes[0][1] == 16
    path = Path(RateTuner(Range(4, 1, 256)), bandwidth=12 * (160 << 10) / RTT)
    path.run(3)
    assert path.changes[0][1] == 12


def tries(path: Path, lanes: int) -> list[float]:
    """When it left ``lanes``, for more or for fewer."""
    before = [path.tuner.range.start, *(wanted for _, wanted in path.changes)]
    return [now for (now, _), wanted in zip(path.changes, before, strict=False) if wanted == lanes]


def in_vain() -> Path:
    """A path with room that carries the same whatever comes, and less if any go."""
    return Path(RateTuner(Range(8, 1, 64)), carries=up_to(8), bandwidth=1)


def test_the_pause_after_a_try_in_vain_grows_to_a_limit() -> None:
    path = in_vain()
    path.run(500)
    tried = tries(path, 8)
    apart = [later - sooner for sooner, later in pairwise(tried)]
    pauses = [10, 20, 40, 80, 80]
    assert len(apart) >= len(pauses)
    assert apart[:5] == [pytest.approx(pause + 5, abs=4) for pause in pauses]  # a try takes some seconds itself


@pytest.mark.parametrize("queue", [full_above(8), full_above(0), lambda lanes: 1.0], ids=["at 8", "full", "room"])
def test_it_does_not_oscillate(queue: Callable[[int], float]) -> None:
    """Noise-free: below 8 lanes each carries its part. In the end little more than one try in 80 s is left."""
    path = Path(RateTuner(Range(16, 1, 64)), carries=up_to(8), waits=queue)
    path.run(300)
    begin = len(path.changes)
    wanted = path.run(320)
    ((settled, looks),) = Counter(wanted).most_common(1)
    assert settled >= 8
    assert looks > 0.85 * len(wanted)
    assert len([now for now in tries(path, settled) if now > path.changes[begin][0]]) <= 4


@pytest.mark.parametrize("upwards", [True, False])
def test_after_a_try_in_vain_the_other_way_is_tried(upwards: bool) -> None:
    path = Path(RateTuner(Range(8, 1, 64), upwards=upwards), carries=up_to(8), bandwidth=1)
    path.run(120)
    tried = [wanted > 8 for now, wanted in path.changes if now in tries(path, 8)]
    assert len(tried) >= 3
    assert tried == [upwards ^ (at % 2 == 1) for at in range(len(tried))]


def test_a_rate_that_has_changed_ends_the_pause() -> None:
    path = in_vain()
    path.run(90)  # the pause is of 80 s by now
    begin = len(path.changes)
    path.run(15)
    assert len(path.changes) == begin
    path.carries = lambda lanes: 0.5 * up_to(8)(lanes)
    path.run(8)
    assert len(path.changes) > begin


def test_a_rate_that_has_changed_a_little_ends_no_pause() -> None:
    path = in_vain()
    path.run(90)
    begin = len(path.changes)
    path.carries = lambda lanes: 0.8 * up_to(8)(lanes)
    path.run(20)
    assert len(path.changes) == begin


@pytest.mark.parametrize("limit", ["idle", "starved"])
def test_what_the_application_limits_is_not_judged(limit: str) -> None:
    path = Path(RateTuner(Range(8, 1, 64)), waits=lambda lanes: 1.3)
    setattr(path, limit, True)
    assert set(path.run(60)) == {8}


def test_a_try_that_the_application_limits_is_judged_when_it_does_so_no_more() -> None:
    path = Path(RateTuner(Range(8, 1, 16)), bandwidth=1)
    path.run(2.5)
    assert path.tuner.wanted == 16
    path.starved, path.carries = True, lambda lanes: 0.1 * RATE
    assert set(path.run(20)) == {16}
    path.starved, path.carries = False, lambda lanes: 1.2 * RATE
    path.run(5)
    assert path.tuner.wanted == 16
    assert "streams changed" in path.tuner.reason


def test_nothing_is_tried_before_the_bandwidth_is_known() -> None:
    path = Path(RateTuner(Range(8, 1, 64)))
    path.settled = False
    assert set(path.run(30)) == {8}
    path.settled = True
    assert set(path.run(10)) != {8}


def test_lanes_that_do_not_come_are_not_waited_for() -> None:
    path = Path(RateTuner(Range(8, 1, 64)), carries=up_to(10), bandwidth=1)
    path.comes = 10
    path.run(2.5)
    assert path.tuner.wanted == path.tuner.goal == 16
    path.run(4)
    assert path.tuner.goal == 16
    path.run(2)
    assert path.tuner.goal == 10
    assert path.tuner.reason == "no more than 10 came"
    while path.tuner.reason == "no more than 10 came":
        path.run(TICK)
    assert path.tuner.wanted == path.live == 10, "those that came carry more, and stay"


def test_lanes_stay_in_the_range() -> None:
    up = Path(RateTuner(Range(8, 6, 20)), carries=lambda lanes: lanes * 1e6, bandwidth=1)
    up.run(60)
    assert up.tuner.wanted == 20
    down = Path(RateTuner(Range(8, 6, 20)), waits=lambda lanes: 2.0)
    down.run(60)
    assert down.tuner.wanted == 6
