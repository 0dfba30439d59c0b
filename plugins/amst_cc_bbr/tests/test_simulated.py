"""BBR over simulated paths of 10 Mbit/s and 100 ms: what the paper promises. The full-size ones are in benchmarks/."""

from __future__ import annotations

from itertools import pairwise

import pytest

from amst_cc_bbr.controller import BbrController
from amst_core.testing.simulator import Bernoulli, Flow, Link, Simulation, TraceRecord

MSS = 1448
RATE = 10e6 / 8
RTT = 0.1
WITHOUT_POLICER: dict[str, object] = {"long_term_bandwidth": False}


def path(*, loss: float = 0.0, buffer: float = 1.0) -> Link:
    """``buffer`` in bandwidth-delay products."""
    return Link(RATE, RTT / 2, buffer=buffer * RATE * RTT, loss=Bernoulli(loss) if loss else None)


def one(link: Link, *, seconds: float, interval: float = 0.1, options: dict[str, object] | None = None) -> Flow:
    simulation = Simulation(link, seed=1, trace_interval=interval)
    flow = simulation.add_flow(BbrController(options or {}, mss=MSS), mss=MSS)
    simulation.run(until=seconds)
    return flow


def visits(trace: list[TraceRecord], mode: str) -> list[list[TraceRecord]]:
    """The records of each uninterrupted stay in ``mode``."""
    found: list[list[TraceRecord]] = []
    before = None
    for record in trace:
        if record.mode == mode:
            if before != mode:
                found.append([])
            found[-1].append(record)
        before = record.mode
    return found


def between(trace: list[TraceRecord], start: float, end: float) -> list[TraceRecord]:
    return [record for record in trace if start <= record.time <= end]


@pytest.mark.parametrize("loss", [0.0, 0.001, 0.01, 0.05])
def test_it_uses_nine_tenths_of_what_losses_leave_of_the_path(loss):
    flow = one(path(loss=loss), seconds=30)
    assert flow.goodput(3, 30) >= 0.9 * RATE * (1 - loss)


@pytest.mark.parametrize("buffer", [0.25, 8.0])
def test_it_does_so_with_small_and_with_large_buffers(buffer):
    flow = one(path(buffer=buffer), seconds=20)
    assert flow.goodput(5, 20) >= 0.9 * RATE


def test_a_large_buffer_is_not_filled_but_for_startup():
    flow = one(path(buffer=8.0), seconds=9)
    assert max(record.queue for record in between(flow.trace, 3, 9)) < 0.35 * RATE * RTT
    assert flow.lost == 0


def test_startup_doubles_with_each_round_trip_and_the_queue_it_made_is_drained():
    flow = one(path(), seconds=4, interval=0.01)
    (startup,), (drain,) = visits(flow.trace, "startup"), visits(flow.trace, "drain")
    assert startup[-1].time < 16 * RTT
    assert max(record.queue for record in startup) > 0.8 * RATE * RTT
    cruising = [record for record in flow.trace if record.time > drain[-1].time + RTT]
    quiet = [record.queue for record in cruising[: int(RTT / 0.01)]]
    assert max(quiet) <= 7 * MSS, "Drain ends with room for three bursts of two segments"
    assert min(quiet) < 0.1 * max(record.queue for record in startup)


def test_its_probes_make_a_queue_of_a_quarter_of_the_path_and_take_it_away():
    flow = one(path(), seconds=9, interval=0.01)
    steady = between(flow.trace, 3, 9)
    probing = [record.queue for record in steady if record.state["pacing_gain"] == 1.25]
    cruising = [record.queue for record in steady if record.state["cycle_index"] == 7]
    assert 0.1 * RATE * RTT < max(probing) < 0.35 * RATE * RTT
    assert max(cruising) <= 4 * MSS


def test_probe_rtt_comes_every_ten_seconds_and_takes_at_least_200_ms():
    flow = one(path(), seconds=40, interval=0.002)
    stays = visits(flow.trace, "probe_rtt")
    assert len(stays) == 3
    for stay in stays:
        quiet = [record for record in stay if record.in_flight <= 4 * MSS]
        assert quiet[-1].time - quiet[0].time >= 0.2 - 2 * 0.002
        assert stay[-1].time - stay[0].time <= 0.2 + 3 * RTT
    starts = [stay[0].time for stay in stays]
    assert all(9.9 < later - before < 12 for before, later in pairwise(starts))
    assert flow.goodput(10, 40) >= 0.93 * RATE


def test_when_the_rate_halves_the_queue_of_it_goes_and_the_new_rate_is_used():
    link = path(buffer=4.0)
    simulation = Simulation(link, seed=1)
    flow = simulation.add_flow(BbrController({}, mss=MSS), mss=MSS)
    simulation.at(5.0, lambda: link.set(rate=RATE / 2))
    simulation.run(until=30)
    assert flow.goodput(6, 30) >= 0.9 * RATE / 2
    assert max(record.queue for record in between(flow.trace, 5, 8)) > 0.3 * RATE * RTT
    assert max(record.queue for record in between(flow.trace, 20, 26)) < 0.3 * RATE * RTT
    assert flow.trace[-1].state["btl_bw"] == pytest.approx(RATE / 2, rel=0.05)


def test_when_the_rate_doubles_it_is_found_by_probing():
    link = path()
    simulation = Simulation(link, seed=1)
    flow = simulation.add_flow(BbrController({}, mss=MSS), mss=MSS)
    simulation.at(5.0, lambda: link.set(rate=RATE * 2))
    simulation.run(until=20)
    assert flow.goodput(10, 20) >= 0.9 * RATE * 2


def test_when_the_round_trip_doubles_the_model_has_it_after_a_probe_rtt_and_the_path_is_used():
    link = path()
    simulation = Simulation(link, seed=1)
    flow = simulation.add_flow(BbrController({}, mss=MSS), mss=MSS)
    simulation.at(5.0, lambda: link.set(delay=RTT, back=RTT))
    simulation.run(until=40)
    assert flow.trace[-1].state["min_rtt"] == pytest.approx(2 * RTT, rel=0.05)
    assert flow.goodput(20, 40) >= 0.9 * RATE


def test_two_flows_share_the_path():
    link = path(buffer=2.0)
    simulation = Simulation(link, seed=1)
    flows = [
        simulation.add_flow(BbrController({"seed": seed}, mss=MSS), mss=MSS, start=start)
        for seed, start in ((1, 0.0), (2, 3.0))
    ]
    simulation.run(until=60)
    rates = [flow.goodput(20, 60) for flow in flows]
    assert sum(rates) >= 0.9 * RATE
    assert sum(rates) ** 2 / (2 * sum(rate * rate for rate in rates)) >= 0.9, "Jain's index"


def test_an_application_slower_than_the_path_does_not_spoil_the_model():
    simulation = Simulation(path(), seed=1)
    flow = simulation.add_flow(BbrController({}, mss=MSS), mss=MSS, app_rate=RATE / 5)
    simulation.run(until=30)
    assert flow.delivered >= 0.97 * 30 * RATE / 5
    assert flow.trace[-1].state["btl_bw"] >= RATE / 5
    assert max(record.queue for record in flow.trace) <= 12 * MSS


def test_the_cliff_is_where_probing_cannot_see_through_the_loss():
    """1.25 × (1 - p) is below 1 from p = 0.2 on."""
    below = one(path(loss=0.12), seconds=60, options=WITHOUT_POLICER)
    above = one(path(loss=0.25), seconds=60, options=WITHOUT_POLICER)
    assert below.goodput(30, 60) >= 0.8 * RATE * 0.88
    assert above.goodput(30, 60) <= 0.4 * RATE * 0.75


def test_random_loss_above_a_sixth_is_taken_for_a_policer():
    with_it = one(path(loss=0.18), seconds=30)
    without = one(path(loss=0.18), seconds=30, options=WITHOUT_POLICER)
    assert any(record.state["lt_use_bw"] for record in with_it.trace)
    assert not any(record.state["lt_use_bw"] for record in without.trace)
    assert with_it.goodput(10, 30) < without.goodput(10, 30)


def test_a_path_that_is_gone_for_a_while_is_used_again():
    link = path()
    simulation = Simulation(link, seed=1)
    flow = simulation.add_flow(BbrController({}, mss=MSS), mss=MSS)
    simulation.at(5.0, lambda: link.set(loss=Bernoulli(1.0)))
    simulation.at(8.0, lambda: link.set(loss=None))
    simulation.run(until=30)
    assert flow.timeouts >= 2
    assert flow.goodput(12, 30) >= 0.9 * RATE


def test_after_a_timeout_the_window_grows_no_faster_than_data_arrives_until_all_given_up_has():
    """Nobody knows what the path is like now: here it has a twentieth of its rate."""
    link = path()
    simulation = Simulation(link, seed=1, trace_interval=0.02)
    flow = simulation.add_flow(BbrController({}, mss=MSS), mss=MSS)
    simulation.at(5.0, lambda: link.set(loss=Bernoulli(1.0)))
    simulation.at(5.6, lambda: link.set(loss=None, rate=RATE / 20))
    simulation.run(until=12)
    after = between(flow.trace, 5, 12)
    start = next(at for at, record in enumerate(after) if record.state["recovery"] == "timeout")
    end = next(at for at, record in enumerate(after) if at > start and record.state["recovery"] != "timeout")
    before = after[start - 1]
    assert before.in_flight > 100 * MSS
    for record in after[start:end]:
        assert record.cwnd <= 4 * MSS + record.delivered - before.delivered
    assert after[end].delivered - before.delivered >= before.in_flight


def test_the_same_seeds_give_the_same_flow():
    first, again, other = (one(path(loss=0.01), seconds=8, options={"seed": seed}) for seed in (3, 3, 5))
    assert first.trace == again.trace
    assert first.trace != other.trace
