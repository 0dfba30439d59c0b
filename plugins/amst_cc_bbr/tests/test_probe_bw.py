"""ProbeBW: the gain cycle, the bandwidth filter, and the window and rate that follow from the model."""

from __future__ import annotations

import pytest

GAINS = [1.25, 0.75, 1, 1, 1, 1, 1, 1]


def phase(feed, gain):
    """Go to the beginning of the next phase with ``gain``."""
    while feed["pacing_gain"] == gain:
        feed.round(in_flight=3 * feed.BDP)
    while feed["pacing_gain"] != gain:
        feed.round(in_flight=3 * feed.BDP)


def test_the_cycle_is_one_and_a_quarter_then_three_quarters_then_six_times_one(feed):
    feed.drain()
    phase(feed, 1.25)
    seen = []
    for _ in range(24):
        seen.append(feed["pacing_gain"])
        feed.round(in_flight=2 * feed.BDP, after=0.101)
    assert seen == GAINS * 3


def test_the_first_phase_is_any_but_the_one_that_drains(feeds):
    first = set()
    for seed in range(60):
        feed = feeds(seed=seed)
        feed.drain()
        first.add(feed["cycle_index"])
    assert first == {0, 2, 3, 4, 5, 6, 7}


def test_the_same_seed_gives_the_same_flow(feeds):
    one, other = feeds(seed=5), feeds(seed=5)
    for feed in (one, other):
        feed.probe_rtt()
    assert one.cc.state() == other.cc.state()


def test_cruising_takes_a_round_trip(feed):
    feed.cruise()
    phase(feed, 0.75)
    phase(feed, 1)
    index = feed["cycle_index"]
    feed.ack(after=0.1)
    assert feed["cycle_index"] == index
    feed.ack(after=0.001)
    assert feed["cycle_index"] == index + 1


def test_probing_goes_on_until_so_much_is_in_flight(feed):
    feed.drain()
    phase(feed, 1.25)
    target = 1.25 * feed.BDP + 3 * feed["send_quantum"]
    for _ in range(10):
        feed.ack(after=0.1, prior_in_flight=int(target) - feed["send_quantum"] - 1)
        assert feed["pacing_gain"] == 1.25
    feed.ack(prior_in_flight=int(target) + 2 * feed.MSS)
    assert feed["pacing_gain"] == 0.75


def test_probing_takes_a_round_trip_though_so_much_is_in_flight(feed):
    feed.drain()
    phase(feed, 1.25)
    feed.ack(after=0.09, prior_in_flight=2 * feed.BDP)
    assert feed["pacing_gain"] == 1.25
    feed.ack(after=0.02, prior_in_flight=2 * feed.BDP)
    assert feed["pacing_gain"] == 0.75


def test_a_loss_ends_probing_after_a_round_trip(feed):
    feed.drain()
    phase(feed, 1.25)
    feed.ack(after=0.05, lost=feed.MSS)
    assert feed["pacing_gain"] == 1.25
    feed.ack(after=0.06)
    assert feed["pacing_gain"] == 1.25, "the buffer may hold it after all"
    feed.ack(after=0.01, lost=feed.MSS)
    assert feed["pacing_gain"] == 0.75


def test_draining_ends_when_the_queue_is_gone(feed):
    feed.drain()
    phase(feed, 0.75)
    feed.ack(prior_in_flight=int(1.2 * feed.BDP))
    assert feed["pacing_gain"] == 0.75
    feed.ack(prior_in_flight=feed.BDP)
    assert feed["pacing_gain"] == 1


def test_draining_takes_no_longer_than_a_round_trip(feed):
    feed.drain()
    phase(feed, 0.75)
    feed.ack(after=0.101, prior_in_flight=2 * feed.BDP)
    assert feed["pacing_gain"] == 1


def test_the_pacing_rate_is_the_gain_times_the_bandwidth_less_one_percent(feed):
    feed.drain()
    for gain in (1.25, 0.75, 1):
        phase(feed, gain)
        assert feed.cc.pacing_rate == pytest.approx(0.99 * gain * feed.RATE)


def test_the_window_is_twice_the_bdp_and_room_for_three_bursts(feed):
    feed.cruise()
    window, extra = feed.cc.window, 15 * feed.MSS
    assert (feed["extra_acked"], feed["send_quantum"]) == (extra, 2 * feed.MSS)
    assert window == 2 * feed.BDP + extra + 6 * feed.MSS + 1 * feed.MSS, "the last rounds it up to a pair"
    phase(feed, 1.25)
    for _ in range(3):
        feed.ack()
    room = -(-(feed["extra_acked"] + 6 * feed.MSS) // (2 * feed.MSS)) * 2 * feed.MSS
    assert feed.cc.window == 2 * feed.BDP + room + 2 * feed.MSS, "probing must get above the smallest BDP"


def test_the_window_grows_by_no_more_than_is_acknowledged(feed):
    feed.cruise()
    feed.round(2 * feed.RATE)
    before = feed.cc.window
    feed.ack(5000)
    assert feed.cc.window == before + 5000


def test_the_send_quantum_is_what_a_millisecond_of_pacing_carries(feed):
    assert feed["send_quantum"] == 27_000  # 28.56 MB/s / 1024
    feed.cruise()
    assert feed["send_quantum"] == 2000
    feed.round(1e9)
    assert feed["send_quantum"] == 65_000
    for _ in range(30):
        feed.round(1e5)
    assert feed["send_quantum"] == 1000


def test_the_bandwidth_is_the_largest_of_ten_rounds(feed):
    feed.drain()
    feed.round(2e6)
    for _ in range(10):
        feed.round(1e6)
        assert feed["btl_bw"] == 2e6
    feed.round(1e6)
    assert feed["btl_bw"] == 1e6


def test_samples_limited_by_the_application_only_raise_the_bandwidth(feed):
    feed.drain()
    for _ in range(30):
        feed.round(1e5, app_limited=True)
    assert feed["btl_bw"] == feed.RATE
    feed.round(3e6, app_limited=True)
    assert feed["btl_bw"] == 3e6


def test_a_sample_without_an_estimate_changes_neither_bandwidth_nor_rounds(feed):
    feed.drain()
    rounds = feed["round_count"]
    for _ in range(30):
        feed.round(None)
    assert (feed["btl_bw"], feed["round_count"]) == (feed.RATE, rounds)
    feed.round()
    assert feed["round_count"] == rounds + 1


def test_the_model_follows_a_path_that_grows(feed):
    """A probe of 1.25 that is delivered is the new bandwidth: tenfold takes eleven cycles."""
    feed.cruise()
    rounds = 0
    while feed["btl_bw"] < 10 * feed.RATE:
        feed.round(float(feed.cc.pacing_rate), in_flight=int(2 * feed["btl_bw"] * feed.RTT), after=0.101)
        rounds += 1
    assert 80 <= rounds <= 96


def test_bursts_of_acknowledgements_widen_the_window(feed):
    feed.drain()
    for _ in range(11):
        feed.round(after=0.101)
    plain = feed.cc.window
    for _ in range(3):
        feed.round(after=0.101)
        feed.ack(30_000, after=0.0001)
    assert 28_000 <= feed["extra_acked"] <= 32_000
    assert feed.cc.window >= plain + 20_000


def test_they_widen_it_by_no_more_than_100_ms_of_bandwidth(feed):
    feed.cruise()
    feed.round(after=0.101)
    feed.ack(10 * feed.BDP, after=0.0001)
    feed.ack(10 * feed.BDP, after=0.0001)
    assert feed["extra_acked"] > feed.BDP
    assert feed.cc.window <= 2 * feed.BDP + 0.1 * feed.RATE + 3 * feed["send_quantum"] + 4 * feed.MSS


def test_bursts_are_remembered_for_five_rounds_at_least_and_forgotten_after_ten(feeds):
    for before in range(14, 24):  # until the burst of cruise is forgotten
        feed = feeds()
        feed.cruise()
        for _ in range(before):
            feed.round(after=0.101)
        feed.ack(50_000, after=0.0001)
        for count in range(1, 11):
            feed.round(after=0.101)
            assert feed["extra_acked"] > 40_000 or count >= 5
        assert feed["extra_acked"] <= 2000
