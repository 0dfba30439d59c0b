"""Startup and Drain: when the pipe counts as full, at which gains, and how the first windows and rates come about."""

from __future__ import annotations

import math

import pytest

HIGH_GAIN = 2 / math.log(2)


def test_the_first_acknowledgement_does_not_end_startup(feed):
    feed.ack()
    assert feed.mode == "startup"
    assert feed["full_bw_reached"] == 0
    assert feed["round_count"] == 1


def test_startup_has_a_gain_of_two_over_ln_two_and_drain_its_inverse(feed):
    feed.ack()
    assert feed["pacing_gain"] == feed["cwnd_gain"] == pytest.approx(2.885, abs=0.001)
    assert feed["pacing_gain"] == HIGH_GAIN
    feed.fill()
    assert feed["pacing_gain"] == pytest.approx(math.log(2) / 2)
    assert feed["pacing_gain"] == pytest.approx(0.3466, abs=0.0001)
    assert feed["cwnd_gain"] == HIGH_GAIN


def test_startup_goes_on_while_the_bandwidth_grows_by_a_quarter_each_round(feed):
    rate = feed.RATE
    for _ in range(30):
        feed.round(rate)
        rate *= 1.25
    assert feed.mode == "startup"
    assert feed["full_bw_count"] == 0


def test_startup_ends_after_three_rounds_that_grew_by_less(feed):
    feed.round(1.0e6)
    feed.round(1.2e6, in_flight=400_000)
    feed.round(1.24e6, in_flight=400_000)
    assert (feed.mode, feed["full_bw_count"]) == ("startup", 2)
    feed.round(1.24e6, in_flight=400_000)
    assert (feed.mode, feed["full_bw_reached"]) == ("drain", 1)


def test_growth_within_three_rounds_begins_the_count_anew(feed):
    for rate in (1e6, 1e6, 1e6, 1.3e6, 1.3e6, 1.3e6):
        feed.round(rate)
        assert feed.mode == "startup"
    feed.round(1.3e6, in_flight=400_000)
    assert feed.mode == "drain"


def test_rounds_limited_by_the_application_do_not_count(feed):
    for _ in range(20):
        feed.round(app_limited=True)
    assert (feed.mode, feed["full_bw_count"]) == ("startup", 0)


def test_only_the_first_acknowledgement_of_a_round_counts(feed):
    feed.round()
    for _ in range(50):
        feed.ack()
    assert (feed.mode, feed["full_bw_count"], feed["round_count"]) == ("startup", 0, 1)


def test_a_round_begins_with_what_was_sent_when_the_last_one_began(feed):
    feed.round(acked=5000)
    feed.ack(prior_delivered=4999)
    assert feed["round_count"] == 1
    feed.ack(prior_delivered=5000)
    assert feed["round_count"] == 2


def test_before_a_round_trip_was_measured_the_pacing_rate_takes_it_for_a_millisecond(feed):
    assert feed.cc.pacing_rate == pytest.approx(0.99 * HIGH_GAIN * 10_000 / 0.001)
    assert feed.cc.window == 10_000


def test_the_first_round_trip_gives_the_first_real_pacing_rate(feed):
    feed.ack(rate=1.0)
    assert feed.cc.pacing_rate == pytest.approx(0.99 * HIGH_GAIN * 10_000 / feed.RTT)


def test_without_a_round_trip_the_first_pacing_rate_stays(feed):
    before = feed.cc.pacing_rate
    feed.ack(rtt=None)
    assert feed.cc.pacing_rate == before


def test_the_pacing_rate_never_falls_in_startup(feed):
    feed.round(5e6)
    high = feed.cc.pacing_rate
    assert high == pytest.approx(0.99 * HIGH_GAIN * 5e6)
    for _ in range(30):
        feed.round(1e5, app_limited=True)
        assert feed.cc.pacing_rate == high


def test_the_window_grows_by_what_is_acknowledged_and_is_not_cut_to_a_target(feed):
    feed.ack(1000)
    assert feed.cc.window == 11_000
    feed.ack(300_000)
    wide = feed.cc.window
    assert wide == 311_000
    feed.ack(1000)
    assert feed.cc.window == wide, "above the target it stays, until the pipe is known to be full"


def test_before_any_round_trip_the_target_is_the_first_window(feed):
    for _ in range(300):
        feed.ack(rtt=None, rate=1e9)
    assert feed["send_quantum"] == 65_000
    assert feed.cc.window == 10_000 + 3 * 65_000 + feed.MSS, "rounded up to a pair"


def test_the_first_ten_segments_widen_the_window_whatever_the_target(feeds):
    feed = feeds(initial_window=100)
    for count in range(1, 10):
        feed.ack(rate=1e4)
        assert feed.cc.window == (100 + count) * feed.MSS
    feed.ack(rate=1e4)
    assert feed.cc.window == 109 * feed.MSS


def test_drain_lasts_until_no_more_is_in_flight_than_the_path_holds(feed):
    feed.fill()
    target = feed.BDP + 3 * feed["send_quantum"]
    assert feed["ssthresh"] == target
    for _ in range(5):
        feed.ack(in_flight=target + 1)
        assert feed.mode == "drain"
    feed.ack(in_flight=target)
    assert feed.mode == "probe_bw"


def test_drain_does_not_shrink_the_window_below_the_target_of_startup(feed):
    feed.fill()
    feed.ack(1_000_000, in_flight=300_000)
    assert feed.mode == "drain"
    assert feed.cc.window >= HIGH_GAIN * feed.BDP


def test_a_pipe_that_is_full_without_a_queue_goes_on_to_probe_bw_at_once(feed):
    for _ in range(4):
        feed.round(in_flight=10_000)
    assert feed.mode == "probe_bw"


def test_before_startup_has_ended_there_is_no_ssthresh(feed):
    feed.ack()
    assert "ssthresh" not in feed.cc.state()
