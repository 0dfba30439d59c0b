"""One pace for all lanes: what follows from a look, and what becomes of a path when lanes obey."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
from paced import MSS, PacedSession

from amst_core.interfaces import AckSample, CongestionController, FlowSample
from amst_core.pacing import ControllerPacer, GuardPacer, Pace, Range, SessionPacer
from amst_core.pacing.pacer import SHORT_PATH_S, TICK_S
from amst_core.testing import RenoController
from amst_core.testing.simulator import Bernoulli, Link

RATE = 1_000_000
RTT = 0.1
BDP = RATE * RTT
LANES = 4
Tells = Callable[..., FlowSample]


# ---- one look ---------------------------------------------------------------------------------


class Said(CongestionController):
    """Says what it was told to say, and keeps what it hears."""

    name = "said"

    def __init__(self) -> None:
        self.allows = round(10 * BDP)
        self.rate: float | None = RATE
        self.mode = "probe_bw"
        self.acks: list[AckSample] = []

    @property
    def window(self) -> int:
        return self.allows

    @property
    def pacing_rate(self) -> float | None:
        return self.rate

    def on_sent(self, **what: object) -> None:
        pass

    def on_ack(self, sample: AckSample) -> None:
        self.acks.append(sample)

    def on_loss(self, **what: object) -> None:
        pass

    def state(self) -> Mapping[str, float | str]:
        return {"mode": self.mode}


@pytest.fixture
def said() -> Said:
    return Said()


class Looked:
    """Lanes that deliver `RATE` together, told of to ``pacer`` at each tick; what they tell may be changed."""

    def __init__(self, tells: Tells, pacer: SessionPacer) -> None:
        self.tells, self.pacer = tells, pacer
        self.now = 0.0
        self.lost = 0
        self.windows = 3 * BDP
        self.in_flight = BDP
        self.rtt_s = RTT
        self.idle_lanes: tuple[int, ...] = ()
        self.idle = False

    def run(self, duration: float) -> list[Pace]:
        return [self.look() for _ in range(round(duration / TICK_S))]

    def look(self) -> Pace:
        self.now += TICK_S
        lanes = {}
        for lane in range(LANES):
            idle = lane in self.idle_lanes
            lanes[lane] = self.tells(
                round(RATE * self.now / LANES),
                lost=round(self.lost / LANES), window=round(self.windows / LANES), rtt_s=self.rtt_s,
                unsent=0 if idle else 1 << 20, in_flight=0 if idle else round(self.in_flight / LANES),
            )  # fmt: skip
        return self.pacer.look(lanes, LANES, self.now, idle=self.idle)


@pytest.fixture
def looked(tells: Tells, said: Said) -> Looked:
    """Lanes whose number is fixed, paced by what is `said`."""
    return Looked(tells, ControllerPacer(said, Range(LANES, LANES, LANES)))


def free(pace: Pace) -> bool:
    return all(cap is None for cap in pace.caps.values())


def test_nobody_is_held_back_before_anything_is_known(looked: Looked) -> None:
    pace = looked.look()
    assert free(pace)
    assert pace.total is None
    assert pace.caps.keys() == set(range(LANES))


def test_lanes_alike_get_the_same_part_of_what_the_controller_allows(looked: Looked) -> None:
    pace = looked.run(2)[-1]
    assert pace.total == pytest.approx(RATE)
    assert pace.caps == dict.fromkeys(range(LANES), pytest.approx(RATE / LANES))


def test_lanes_that_have_nothing_to_send_lend_their_part_and_find_room_when_they_have(looked: Looked) -> None:
    looked.idle_lanes = (0, 3)
    pace = looked.run(2)[-1]
    assert pace.caps == dict.fromkeys(range(LANES), pytest.approx(RATE / 2))


@pytest.mark.parametrize("rate", [None, RATE])
def test_no_more_than_the_window_of_the_controller_is_under_way(looked: Looked, said: Said, rate: float | None) -> None:
    said.allows, said.rate = round(0.6 * BDP), rate
    looked.run(1)
    looked.rtt_s = 1.2 * RTT
    assert looked.look().total == pytest.approx(0.6 * BDP / (1.2 * RTT))


def test_lanes_with_hardly_more_window_than_the_path_takes_are_free(looked: Looked) -> None:
    """Their windows grow only while those are what limits them."""
    looked.windows = 1.5 * BDP
    assert free(looked.run(2)[-1])
    looked.windows = 1.7 * BDP
    assert not free(looked.run(2)[-1])


@pytest.mark.parametrize("windows", [1.5 * BDP, 3 * BDP])
def test_a_standing_queue_is_drained(looked: Looked, windows: float) -> None:
    looked.run(2)
    looked.windows, looked.in_flight = windows, 2 * BDP
    looked.run(4 * RTT)
    assert looked.pacer.guard.draining
    pace = looked.look()
    assert pace.total == pytest.approx(0.7 * RATE)
    assert pace.caps == dict.fromkeys(range(LANES), pytest.approx(0.7 * RATE / LANES))
    looked.in_flight = BDP
    assert looked.run(2 * RTT)[-1].total == pytest.approx(RATE)


def test_a_controller_that_looks_for_the_bandwidth_is_let_do_so(looked: Looked, said: Said) -> None:
    said.mode = "startup"
    looked.in_flight = 2 * BDP
    assert all(pace.total is None or pace.total == pytest.approx(RATE) for pace in looked.run(4))


def test_where_losses_are_no_queue_lanes_may_send_more_than_the_controller_says(looked: Looked) -> None:
    looked.run(2)
    looked.lost += 2 * 1400
    assert looked.look().total == pytest.approx(RATE), "so few may be the last of a queue that is gone"
    looked.lost += 1400
    assert looked.look().total == pytest.approx(1.25 * RATE)
    assert looked.run(3)[-1].total == pytest.approx(RATE), "that is long ago"


@pytest.mark.parametrize("rtt_s", [RTT, 1.2 * RTT])
@pytest.mark.parametrize("in_flight", [BDP, 1.2 * BDP])
def test_where_losses_may_be_those_of_a_queue_they_may_not(looked: Looked, rtt_s: float, in_flight: float) -> None:
    looked.run(2)
    looked.lost += 3 * 1400
    looked.rtt_s, looked.in_flight = rtt_s, in_flight
    queue = (rtt_s, in_flight) != (RTT, BDP)
    assert (looked.look().total == pytest.approx(RATE)) == queue


def test_no_lane_goes_while_the_controller_looks_for_the_bandwidth(tells: Tells, said: Said) -> None:
    looked = Looked(tells, ControllerPacer(said, Range(LANES, 1, 64)))
    said.mode = "startup"
    assert looked.run(5)[-1].streams == LANES
    said.mode = "drain"
    assert looked.run(5)[-1].streams < LANES


def test_the_controller_hears_that_lanes_are_too_few(tells: Tells, said: Said) -> None:
    looked = Looked(tells, ControllerPacer(said, Range(LANES, 1, 64)))
    looked.windows = BDP
    assert looked.run(2)[-1].streams > LANES
    assert said.acks[-1].app_limited
    looked.windows = 2 * BDP
    looked.run(0.1)
    assert not said.acks[-1].app_limited
    looked.idle = True
    looked.run(0.1)
    assert said.acks[-1].app_limited


def test_a_polite_session_never_sends_more_than_the_controller_says(tells: Tells, said: Said) -> None:
    looked = Looked(tells, ControllerPacer(said, Range(LANES, 1, 64), polite=True))
    said.rate = None
    for window, windows in ((0.5, 0.5), (0.9, 1.2), (1.0, 9.0)):
        said.allows, looked.windows = round(window * BDP), windows * BDP
        looked.run(2)
        looked.lost += 10 * 1400
        for pace in looked.run(1):
            assert pace.total == pytest.approx(window * RATE)
            assert not free(pace)
            assert pace.streams == LANES
    assert sum(filter(None, pace.caps.values())) == pytest.approx(pace.total)


def test_the_system_is_left_alone_but_for_a_standing_queue(tells: Tells) -> None:
    looked = Looked(tells, GuardPacer(Range(LANES, LANES, LANES)))
    assert all(free(pace) and pace.total is None for pace in looked.run(5))
    looked.in_flight = 2 * BDP
    looked.run(4 * RTT)
    pace = looked.look()
    assert pace.total == pytest.approx(0.7 * RATE)
    assert pace.caps == dict.fromkeys(range(LANES), pytest.approx(0.7 * RATE / LANES))
    looked.in_flight = BDP
    assert free(looked.look())


def test_on_a_near_path_nobody_is_held_back_and_looks_are_rare(tells: Tells) -> None:
    pacer = GuardPacer(Range(LANES, LANES, LANES), near=True)
    looked = Looked(tells, pacer)
    looked.in_flight, looked.rtt_s = 50 * BDP, 0.0002
    assert all(map(free, looked.run(10)))
    assert pacer.tick_s > 4 * TICK_S
    assert pacer.patience_s > 0
    assert not pacer.bounds


def test_the_system_is_left_alone_until_the_bandwidth_is_known(tells: Tells) -> None:
    """As long as each round trip brings a quarter more, a queue is what finding the bandwidth makes."""
    pacer = GuardPacer(Range(1, 1, 1))
    delivered, paces = 0.0, []
    for tick in range(60):
        delivered += 0.4 * 1.3 ** (tick * TICK_S / RTT) * RATE * TICK_S
        lane = tells(round(delivered), in_flight=round(8 * BDP))
        paces.append(pacer.look({1: lane}, 1, tick * TICK_S, idle=False))
    assert pacer.flow.rounds > 8
    assert all(map(free, paces))


def test_short_paths_are_looked_at_more_often(looked: Looked) -> None:
    assert looked.pacer.tick_s == TICK_S
    looked.look()
    assert looked.pacer.tick_s == TICK_S
    looked.rtt_s = SHORT_PATH_S
    looked.look()
    assert looked.pacer.tick_s == TICK_S / 2


# ---- lanes that obey, over a path -------------------------------------------------------------


@pytest.fixture
def bbr() -> Callable[[], CongestionController]:
    controller = pytest.importorskip("amst_cc_bbr.controller", reason="amst-cc-bbr is not installed")
    return lambda: controller.BbrController({}, mss=MSS)


@pytest.fixture
def cubic() -> Callable[[], CongestionController]:
    controller = pytest.importorskip("amst_cc_cubic.controller", reason="amst-cc-cubic is not installed")
    return lambda: controller.CubicController({}, mss=MSS)


def reno() -> CongestionController:
    return RenoController(MSS)


def link(*, loss: float = 0.0, buffer: float = 4.0, rate: float = 12.5e6) -> Link:
    """100 Mbit/s and 100 ms; ``buffer`` in bandwidth-delay products."""
    return Link(rate, RTT / 2, buffer=int(buffer * rate * RTT), loss=Bernoulli(loss) if loss else None)


@pytest.mark.parametrize("loss", [0.0, 0.001, 0.01])
def test_bbr_over_cubic_uses_the_path_and_fills_no_buffer(
    bbr: Callable[[], CongestionController], cubic: Callable[[], CongestionController], loss: float
) -> None:
    session = PacedSession(link(loss=loss), cubic, ControllerPacer(bbr(), Range(8, 1, 64)))
    session.run(20)
    assert session.utilisation(8, 20) >= 0.9
    assert session.round_trip(8, 20) <= 1.25
    streams = session.streams(8, 20)
    if loss == 0.01:
        assert min(streams) > 32, "their windows have collapsed"
    else:
        assert max(streams) < 32, "so many are not needed"
    if not loss:
        assert session.round_trip(8, 20) <= 1.1
        assert max(streams) <= 4


def test_what_bbr_over_cubic_keeps_short_cubic_alone_fills(cubic: Callable[[], CongestionController]) -> None:
    session = PacedSession(link(), cubic, None, lanes=8)
    session.run(10)
    assert session.round_trip(5, 10) > 3


@pytest.mark.parametrize("lanes", [16, 32])
def test_bbr_lanes_do_not_keep_the_queue_that_they_make(bbr: Callable[[], CongestionController], lanes: int) -> None:
    session = PacedSession(link(), bbr, GuardPacer(Range(lanes, lanes, lanes)))
    session.run(14)
    assert session.round_trip(5, 14) <= 1.4
    assert session.utilisation(5, 14) >= 0.93
    without = PacedSession(link(), bbr, None, lanes=lanes)
    without.run(14)
    assert without.round_trip(5, 14) > 1.1 * session.round_trip(5, 14)


@pytest.mark.parametrize("loss", [0.0, 0.01])
def test_bbr_lanes_become_as_few_as_carry_as_much(bbr: Callable[[], CongestionController], loss: float) -> None:
    session = PacedSession(link(loss=loss), bbr, GuardPacer(Range(16, 2, 64)))
    session.run(25)
    assert session.utilisation(8, 25) >= 0.9
    assert session.round_trip(8, 25) <= 1.4
    assert max(session.streams(15, 25)) <= 12


@pytest.mark.parametrize("name", ["reno", "cubic"])
def test_a_polite_session_of_many_lanes_takes_what_one_flow_takes(name: str, request: pytest.FixtureRequest) -> None:
    """Beside a flow of the same controller, which is not paced, over a queue of one product."""
    make = reno if name == "reno" else request.getfixturevalue(name)
    controller = make()
    allowed: list[float] = []

    class Polite(ControllerPacer):
        def look(self, lanes: Mapping[int, FlowSample], live: int, now: float, *, idle: bool) -> Pace:
            pace = super().look(lanes, live, now, idle=idle)
            allowed.append(controller.window / self.flow.rtt_s)
            return pace

    session = PacedSession(link(buffer=1, rate=2.5e6), make, Polite(controller, Range(8, 1, 64), polite=True))
    other = session.simulation.add_flow(make(), mss=MSS)
    session.run(60)
    paces = [pace for _, pace in session.looks]
    assert all(
        pace.total is None or pace.total <= most * (1 + 1e-9) for pace, most in zip(paces, allowed, strict=True)
    )
    assert sum(pace.total is None for pace in paces) * TICK_S < 3 * RTT
    assert {pace.streams for pace in paces} == {8}
    part = other.goodput(20, 60) / session.link.rate
    assert 0.4 < part < 0.75
    assert session.utilisation(20, 60) > 0.9
