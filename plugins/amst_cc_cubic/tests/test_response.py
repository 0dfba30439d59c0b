"""On simulated paths: RFC 9438's average windows, and what slow start costs. All cells: benchmarks/congestion."""

from __future__ import annotations

import pytest
from congestion.cubic import PUBLISHED, after_a_loss, approach, average_window, response

from amst_cc_cubic.controller import CubicController
from amst_core.testing.simulator import Link, Simulation


@pytest.mark.parametrize("rtt_s", PUBLISHED)
def test_the_formula_is_that_of_the_tables(rtt_s: float) -> None:
    for loss_rate, published in PUBLISHED[rtt_s].items():
        assert average_window(loss_rate, rtt_s) == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize(("loss_rate", "rtt_s"), [(1e-4, 0.01), (1e-4, 0.1)])
def test_the_average_window_is_that_of_the_rfc_packet_by_packet(loss_rate: float, rtt_s: float) -> None:
    row = response(loss_rate, rtt_s, losses=8)
    assert row.model == "packets"
    assert row.ratio == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("loss_rate", "rtt_s"), [(1e-6, 0.1), (1e-7, 0.1)])
def test_the_average_window_is_that_of_the_rfc_in_portions(loss_rate: float, rtt_s: float) -> None:
    row = response(loss_rate, rtt_s, losses=4)
    assert row.model == "fluid"
    assert row.ratio == pytest.approx(1, abs=0.1)


def test_flows_come_to_that_average_from_above_and_from_below() -> None:
    near, far = approach(1e-4, 0.1, losses=80), approach(1e-4, 0.1, losses=20)
    assert 1 < near.above < far.above
    assert far.below < near.below < 1
    assert near.above - near.below < 0.25


@pytest.mark.parametrize("pacing", [True, False])
def test_hystart_halves_what_the_first_slow_start_loses(pacing: bool) -> None:
    def dropped(hystart: bool) -> int:
        simulation = Simulation(Link(2.5e6, 0.05, buffer=2.5e5))
        flow = simulation.add_flow(CubicController({"hystart": hystart, "pacing": pacing}, mss=1000), mss=1000)
        simulation.run(until=4.0)
        assert flow.goodput(1.0, 4.0) > 0.9 * 2.5e6
        return flow.dropped // 1000

    assert 0 < dropped(True) < 0.6 * dropped(False)


def test_in_the_simulator_too_the_window_follows_the_cubic_function_past_k() -> None:
    rows = after_a_loss(1000, 0.05)
    assert len(rows) > 80 and rows[-1]["t"] > 2 * rows[-1]["k"] > 15
    for row in rows[2:]:
        assert row["cwnd"] == pytest.approx(row["w_cubic"], rel=0.002)
