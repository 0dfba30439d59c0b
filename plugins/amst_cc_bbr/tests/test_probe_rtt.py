"""ProbeRTT, and the shortest round trip that it is for; restart after idling."""

from __future__ import annotations

import pytest


def test_it_comes_after_ten_seconds_without_a_round_trip_as_short(feed):
    feed.cruise()
    feed.ack(after=0.001)
    for _ in range(99):
        feed.ack(after=0.1, rtt=0.12)
    assert feed.mode == "probe_bw"
    feed.ack(after=0.09, rtt=0.12)
    assert feed.mode == "probe_bw"
    feed.ack(after=0.011, rtt=0.12)
    assert feed.mode == "probe_rtt"


def test_a_round_trip_as_short_as_the_shortest_puts_it_off(feed):
    feed.cruise()
    for step in range(400):
        feed.round(rtt=0.12 if step % 50 else 0.1)
        assert feed.mode == "probe_bw"


def test_the_window_is_four_segments_and_the_gains_are_one(feed):
    feed.probe_rtt()
    assert feed.cc.window == 4 * feed.MSS
    assert (feed["pacing_gain"], feed["cwnd_gain"]) == (1, 1)
    feed.ack(50_000, in_flight=50_000)
    assert feed.cc.window == 4 * feed.MSS


def test_it_lasts_200_ms_from_when_no_more_than_four_segments_are_in_flight(feed):
    feed.probe_rtt()
    for _ in range(10):
        feed.round(in_flight=5 * feed.MSS)
        assert feed.mode == "probe_rtt"
    feed.ack(in_flight=4 * feed.MSS)
    feed.round(in_flight=4 * feed.MSS, after=0.1)
    feed.ack(in_flight=4 * feed.MSS, after=0.099)
    assert feed.mode == "probe_rtt"
    feed.ack(in_flight=4 * feed.MSS, after=0.002)
    assert feed.mode == "probe_bw"


def test_it_lasts_a_round_trip_where_that_is_longer(feed):
    feed.probe_rtt()
    feed.ack(in_flight=4 * feed.MSS)
    for _ in range(10):
        feed.ack(in_flight=4 * feed.MSS, after=0.1)
        assert feed.mode == "probe_rtt"
    feed.round(in_flight=4 * feed.MSS)
    assert feed.mode == "probe_bw"


def test_a_round_trip_counts_that_began_with_four_segments_in_flight(feed):
    feed.probe_rtt()
    before = feed.delivered
    feed.ack(10_000, in_flight=4 * feed.MSS)
    feed.ack(in_flight=4 * feed.MSS, after=0.3, prior_delivered=before + 5000)
    assert feed.mode == "probe_rtt"
    feed.ack(in_flight=4 * feed.MSS, prior_delivered=before + 10_000)
    assert feed.mode == "probe_bw"


def test_a_second_one_takes_a_round_trip_as_the_first_did(feed):
    feed.probe_rtt()
    leave(feed)
    feed.settle()
    while feed.mode != "probe_rtt":
        feed.round(rtt=0.12)
    feed.ack(in_flight=4 * feed.MSS)
    for _ in range(5):
        feed.ack(in_flight=4 * feed.MSS, after=0.1)
        assert feed.mode == "probe_rtt"
    feed.round(in_flight=4 * feed.MSS)
    assert feed.mode == "probe_bw"


def leave(feed, **more):
    feed.ack(in_flight=4 * feed.MSS, **more)
    feed.round(in_flight=4 * feed.MSS, after=0.1, **more)
    feed.round(in_flight=4 * feed.MSS, after=0.11, **more)


def test_afterwards_the_window_of_before_is_back(feed):
    feed.cruise()
    while feed.mode != "probe_rtt":
        before = feed.cc.window
        feed.round(rtt=0.12)
    leave(feed)
    assert feed.mode == "probe_bw"
    assert feed.cc.window == pytest.approx(before, abs=2 * feed.MSS)


def test_a_longer_round_trip_is_believed_after_ten_seconds(feed):
    feed.cruise()
    while feed.mode != "probe_rtt":
        feed.round(rtt=0.25)
        assert feed["min_rtt"] == (0.1 if feed.mode == "probe_bw" else 0.25)
    leave(feed, rtt=0.2)
    assert feed["min_rtt"] == 0.2
    assert feed.mode == "probe_bw"


def test_the_next_one_is_ten_seconds_after_the_last_has_ended(feed):
    feed.probe_rtt()
    leave(feed, rtt=0.13)
    ended = feed.now
    while feed.mode != "probe_rtt":
        feed.round(rtt=0.13)
    assert feed.now - ended == pytest.approx(10.05, abs=0.06)


def test_it_goes_back_to_startup_where_the_pipe_was_not_full(feed):
    rate = 1e5
    while feed.mode != "probe_rtt":
        feed.round(rate, rtt=0.1 if feed["round_count"] == 0 else 0.12)
        rate *= 1.26
    leave(feed, rate=rate)
    assert feed.mode == "startup"
    assert feed["pacing_gain"] > 2.8


def test_what_leaves_with_four_segments_in_flight_does_not_lower_the_bandwidth(feed):
    feed.probe_rtt()
    feed.ack(in_flight=4 * feed.MSS)
    for _ in range(15):
        feed.ack(in_flight=4 * feed.MSS, rate=4e4, prior_delivered=feed.delivered, after=0.01)
    assert feed.mode == "probe_rtt"
    feed.round(4e4, in_flight=4 * feed.MSS, after=0.2)
    feed.round(4e4, in_flight=4 * feed.MSS)
    assert feed["btl_bw"] == feed.RATE
    assert feed.mode == "probe_bw"


def test_what_left_before_it_counts_as_ever(feed):
    feed.cruise()
    while feed.mode != "probe_rtt":
        feed.round(1e5, rtt=0.12, app_limited=True)
    assert feed["btl_bw"] == feed.RATE, "measured more than ten rounds ago, and nothing since"
    feed.ack(rate=5e5, prior_delivered=feed.delivered - 2000)
    assert feed["btl_bw"] == 5e5


def test_what_leaves_after_it_counts_as_ever(feed):
    feed.probe_rtt()
    leave(feed)
    for _ in range(4):
        feed.round(5e5, acked=50_000)
        assert feed["btl_bw"] == feed.RATE
    for _ in range(10):
        feed.round(5e5)
    assert feed["btl_bw"] == 5e5


def unmeasured(feed):
    """On to ProbeRTT with a bandwidth that is older than ten rounds: the next sample that counts replaces it."""
    feed.cruise()
    while feed.mode != "probe_rtt":
        feed.round(1e5, rtt=0.12, app_limited=True)
    assert feed["btl_bw"] == feed.RATE


@pytest.mark.parametrize(("before", "counts"), [(1, True), (0, False)])
def test_what_leaves_upon_the_acknowledgement_that_begins_it_is_the_first_that_does_not_count(feed, before, counts):
    unmeasured(feed)
    feed.ack(rate=5e5, prior_delivered=feed.delivered - before)
    assert feed["btl_bw"] == (5e5 if counts else feed.RATE)


@pytest.mark.parametrize(("after", "counts"), [(0, False), (1, True)])
def test_what_leaves_when_all_in_flight_at_its_end_has_arrived_is_the_last_that_does_not_count(feed, after, counts):
    unmeasured(feed)
    leave(feed, rate=1e5, app_limited=True)
    assert feed.mode == "probe_bw"
    feed.ack(4 * feed.MSS, rate=1e5, app_limited=True)
    last = feed.delivered
    feed.ack(rate=5e5, prior_delivered=last + after)
    assert feed["btl_bw"] == (5e5 if counts else feed.RATE)


def test_after_idling_data_leaves_at_the_bandwidth_without_gain(feed):
    feed.drain()
    while feed["pacing_gain"] != 1.25:
        feed.round(in_flight=2 * feed.BDP)
    assert feed.cc.pacing_rate == pytest.approx(0.99 * 1.25 * feed.RATE)
    feed.ack(in_flight=0)
    feed.now += 5
    feed.sent(in_flight=feed.MSS, app_limited=True)
    assert feed.cc.pacing_rate == pytest.approx(0.99 * feed.RATE)
    assert feed["idle_restart"] == 1


def test_a_sender_that_ran_out_before_is_idle_though_it_has_much_to_send_now(feed):
    feed.drain()
    feed.sent(in_flight=feed.MSS * 4, app_limited=True)
    feed.ack(in_flight=0)
    feed.now += 5
    feed.sent(in_flight=feed.MSS, app_limited=False)
    assert feed["idle_restart"] == 1


def test_a_sender_with_something_in_flight_is_not_idle(feed):
    feed.drain()
    for _ in range(3):
        feed.sent(in_flight=2 * feed.MSS, app_limited=True)
    assert feed["idle_restart"] == 0


def test_what_came_in_a_burst_before_idling_says_nothing_of_what_comes_after_it(feed):
    feed.cruise()
    feed.round(after=0.101)
    feed.ack(30_000, after=0.0001, in_flight=0)
    burst = feed["extra_acked"]
    feed.sent(in_flight=feed.MSS, app_limited=True)
    feed.ack(20_000, after=0.0001)
    assert feed["extra_acked"] == burst


def test_a_sender_that_never_ran_out_is_not_idle_with_nothing_in_flight(feed):
    feed.drain()
    feed.lose(50_000, in_flight=0, persistent=True)
    feed.sent(in_flight=feed.MSS)
    assert feed["idle_restart"] == 0


def test_idling_for_long_is_no_reason_to_probe_but_refreshes_the_round_trip(feed):
    feed.drain()
    feed.sent(in_flight=feed.MSS, app_limited=True)
    feed.ack(in_flight=0)
    feed.now += 60
    feed.sent(in_flight=feed.MSS, app_limited=True)
    feed.ack(after=0.11, rtt=0.11)
    assert feed.mode == "probe_bw"
    assert feed["min_rtt"] == 0.11
    assert feed["idle_restart"] == 0


def test_idling_ends_it(feed):
    feed.probe_rtt()
    feed.ack(in_flight=4 * feed.MSS)
    feed.sent(in_flight=4 * feed.MSS, app_limited=True)
    feed.now += 0.1
    feed.sent(in_flight=feed.MSS, app_limited=True)
    assert feed.mode == "probe_rtt"
    feed.now += 0.2
    feed.sent(in_flight=feed.MSS, app_limited=True)
    assert feed.mode == "probe_bw"
    assert feed.cc.window >= 2 * feed.BDP
