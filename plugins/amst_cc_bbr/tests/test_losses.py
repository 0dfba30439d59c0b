"""What losses do, and what they do not: recovery, timeouts, losses that were none, policers."""

from __future__ import annotations

import pytest


def test_an_isolated_loss_changes_neither_the_model_nor_the_pacing_rate(feed):
    feed.cruise()
    rate, before = feed.cc.pacing_rate, dict(feed.cc.state())
    feed.lose()
    feed.ack(lost=feed.MSS)
    after = feed.cc.state()
    assert feed.cc.pacing_rate == rate
    for name in ("mode", "btl_bw", "min_rtt", "pacing_gain", "cwnd_gain", "full_bw_reached"):
        assert after[name] == before[name]


def test_for_a_round_trip_as_much_may_be_sent_as_arrives(feed):
    feed.cruise()
    feed.lose(1000, in_flight=90_000)
    feed.ack(2000, lost=1000, in_flight=88_000)
    assert feed.cc.window == 90_000
    for left in (90_000, 90_000, 90_000):
        feed.ack(1000, in_flight=left - 1000)
        assert feed.cc.window == 90_000
    assert feed["packet_conservation"] == 1


def test_after_that_round_trip_the_window_grows_by_what_is_acknowledged_less_what_is_lost(feed):
    feed.cruise()
    entered = feed.now
    feed.lose(1000, in_flight=90_000)
    feed.ack(2000, lost=1000, in_flight=88_000)
    feed.round(sent_at=entered - 0.01)
    window = feed.cc.window
    feed.ack(3000, sent_at=entered - 0.01)
    assert feed.cc.window == window + 3000
    feed.ack(3000, lost=2000, sent_at=entered - 0.01)
    assert feed.cc.window == window + 3000 - 2000 + 3000


def test_what_was_sent_after_the_loss_brings_the_window_of_before_back(feed):
    feed.cruise()
    before, entered = feed.cc.window, feed.now
    feed.lose(1000, in_flight=90_000)
    feed.ack(2000, lost=1000, in_flight=88_000)
    assert (feed["recovery"], feed.cc.window) == ("recovery", 90_000)
    feed.ack(after=0.1, sent_at=entered - 1e-6)
    assert feed["recovery"] == "recovery"
    feed.ack(sent_at=entered)
    assert (feed["recovery"], feed["packet_conservation"]) == ("open", 0)
    assert before <= feed.cc.window <= before + feed.MSS


def test_more_losses_prolong_a_recovery_and_begin_none(feed):
    feed.cruise()
    before, entered = feed.cc.window, feed.now
    feed.lose(in_flight=90_000)
    feed.ack(lost=feed.MSS, in_flight=89_000)
    feed.now += 0.05
    feed.lose(sent_at=entered - 0.01, in_flight=88_000)
    feed.ack(lost=feed.MSS, in_flight=87_000)
    feed.ack(sent_at=entered + 0.01, after=0.06, in_flight=87_000)
    assert feed["recovery"] == "recovery", "what was lost last has not been sent again and acknowledged"
    feed.ack(sent_at=entered + 0.06, after=0.05)
    assert feed["recovery"] == "open"
    assert before <= feed.cc.window <= before + feed.MSS


def test_a_late_loss_of_what_had_left_before_begins_no_recovery(feed):
    feed.cruise()
    entered = feed.now
    feed.lose()
    feed.ack(lost=feed.MSS)
    feed.ack(sent_at=entered, after=0.1)
    feed.lose(sent_at=entered - 0.001)
    feed.ack(lost=feed.MSS)
    assert (feed["recovery"], feed["packet_conservation"]) == ("open", 0)
    feed.lose(sent_at=entered)
    feed.ack(lost=feed.MSS)
    assert (feed["recovery"], feed["packet_conservation"]) == ("recovery", 1)


def test_losses_round_after_round_do_not_conserve_again(feed):
    """As in Linux: only the first round trip of a recovery, which losses of new data prolong."""
    feed.cruise()
    feed.lose()
    feed.ack(lost=feed.MSS)
    assert feed["packet_conservation"] == 1
    for _ in range(8):
        feed.now += 0.1
        feed.lose(sent_at=feed.now - 0.05)
        feed.round(lost=feed.MSS, acked=20_000, after=0)
        assert feed["packet_conservation"] == 0
        assert feed["recovery"] == "recovery"
    assert feed.cc.window >= 2 * feed.BDP


def test_losses_in_that_round_trip_are_not_taken_off_twice(feed):
    """They are in flight no more, and that is all that the window counts."""
    feed.cruise()
    feed.lose(1000, in_flight=90_000)
    feed.ack(2000, lost=1000, in_flight=88_000)
    feed.lose(1000, in_flight=89_000)
    feed.ack(2000, lost=1000, in_flight=88_000)
    assert feed.cc.window == 90_000


def test_packets_are_conserved_until_what_was_sent_after_the_loss_is_acknowledged(feed):
    feed.cruise()
    feed.round(acked=10_000)
    feed.lose()
    feed.ack(10_000, lost=feed.MSS)
    entered = feed.delivered
    feed.ack(after=0.05, prior_delivered=entered - 1)
    assert feed["packet_conservation"] == 1
    feed.ack(after=0.05, prior_delivered=entered)
    assert feed["packet_conservation"] == 0


def test_more_losses_than_the_window_has_leave_a_segment_to_grow_from(feed):
    feed.ack()
    feed.lose(100_000, in_flight=0, persistent=True)
    feed.ack(20_000, lost=50_000, in_flight=0)
    assert feed.cc.window == 21_000


def test_an_acknowledgement_of_nothing_new_leaves_the_window(feed):
    feed.cruise()
    before = feed.cc.window
    feed.lose()
    feed.ack(0, lost=feed.MSS, rate=None, rtt=None)
    assert feed.cc.window == before


def test_the_window_is_never_less_than_a_segment(feed):
    feed.ack()
    feed.lose(10_000, in_flight=0)
    feed.ack(10, lost=10_000, in_flight=0)
    assert feed.cc.window == feed.MSS


def test_a_timeout_leaves_one_segment_more_than_is_in_flight(feed):
    feed.cruise()
    rate = feed.cc.pacing_rate
    feed.lose(feed.BDP, in_flight=0, persistent=True)
    assert feed.cc.window == feed.MSS
    assert feed["recovery"] == "timeout"
    assert (feed.cc.pacing_rate, feed["btl_bw"]) == (rate, feed.RATE)


def test_after_a_timeout_the_window_grows_from_four_segments_until_all_that_was_under_way_is_delivered(feed):
    feed.cruise()
    before = feed.cc.window
    feed.lose(10_000, in_flight=0, persistent=True)
    for count in range(1, 10):
        feed.ack(sent_at=feed.now, after=0.1, in_flight=0)
        assert (feed["recovery"], feed.cc.window) == ("timeout", (3 + count) * feed.MSS)
    feed.ack(sent_at=feed.now, after=0.1, in_flight=0)
    assert (feed["recovery"], feed.cc.window) == ("open", before)


def until_open(feed):
    """How much is delivered until the timeout is over."""
    before = feed.delivered
    while feed["recovery"] == "timeout":
        feed.ack(sent_at=feed.now, in_flight=0)
    return feed.delivered - before


def test_what_a_timeout_leaves_in_flight_must_be_delivered_too(feed):
    feed.cruise()
    feed.lose(4000, in_flight=6000, persistent=True)
    assert until_open(feed) == 10_000


def test_so_must_what_was_lost_before_and_has_not_left_again(feed):
    feed.cruise()
    feed.lose(5000, in_flight=5000)
    feed.sent(size=2000, in_flight=7000)
    feed.lose(7000, in_flight=0, persistent=True)
    assert until_open(feed) == 10_000


def test_what_left_again_long_ago_must_not(feed):
    feed.cruise()
    feed.lose(5000)
    for _ in range(10):
        feed.sent()
    feed.ack(sent_at=feed.now)
    feed.lose(7000, in_flight=0, persistent=True)
    assert until_open(feed) == 7000


def test_a_timeout_told_of_in_pieces_is_over_when_all_of_them_are_delivered(feed):
    feed.cruise()
    before = feed.cc.window
    for left in (6000, 3000, 0):
        feed.lose(3000, in_flight=left, persistent=True)
    assert until_open(feed) == 9000
    assert feed.cc.window == before


def test_a_second_timeout_that_gives_up_what_left_again_takes_no_longer(feed):
    feed.cruise()
    feed.lose(10_000, in_flight=0, persistent=True)
    feed.sent(in_flight=1000)
    feed.lose(1000, in_flight=0, persistent=True)
    assert until_open(feed) == 10_000


def test_a_second_timeout_waits_for_what_is_new_too(feed):
    feed.cruise()
    feed.lose(5000, in_flight=0, persistent=True)
    feed.sent(size=5000, in_flight=5000)
    feed.ack(2000, in_flight=3000)
    feed.sent(size=4000, in_flight=7000)
    feed.lose(7000, in_flight=0, persistent=True)
    assert until_open(feed) == 7000


def test_losses_after_a_timeout_come_off_the_window_and_begin_no_recovery(feed):
    feed.cruise()
    feed.lose(50_000, in_flight=0, persistent=True)
    feed.ack(20_000, sent_at=feed.now, after=0.1, in_flight=0)
    assert feed.cc.window == 21_000
    feed.lose(2000, sent_at=feed.now, in_flight=10_000)
    feed.ack(5000, lost=2000, in_flight=5000)
    assert (feed["recovery"], feed["packet_conservation"]) == ("timeout", 0)
    assert feed.cc.window == 21_000 - 2000 + 5000


def test_when_a_timeout_is_over_the_next_loss_begins_a_recovery(feed):
    feed.cruise()
    feed.lose(3000, in_flight=0, persistent=True)
    until_open(feed)
    feed.lose(sent_at=feed.now)
    assert feed["recovery"] == "recovery"


def test_a_timeout_in_startup_begins_the_count_of_full_rounds_anew(feed):
    feed.round()
    feed.round()
    feed.round()
    assert feed["full_bw_count"] == 2
    feed.lose(10_000, in_flight=0, persistent=True)
    feed.round()
    assert (feed.mode, feed["full_bw_count"]) == ("startup", 0)


def test_two_timeouts_in_a_row_remember_the_window_of_before_the_first(feed):
    feed.cruise()
    before = feed.cc.window
    for _ in range(3):
        feed.lose(1000, in_flight=0, persistent=True)
        feed.sent(in_flight=1000)
        feed.now += 1
    feed.ack(sent_at=feed.now, in_flight=0)
    assert (feed["recovery"], feed.cc.window) == ("open", before)


def test_a_loss_that_was_none_gives_the_window_back_at_once(feed):
    feed.cruise()
    before = feed.cc.window
    feed.lose(1000, in_flight=50_000)
    feed.ack(lost=1000, in_flight=50_000)
    assert feed.cc.window == 51_000
    feed.cc.on_spurious_loss(now=feed.now)
    assert (feed.cc.window, feed["recovery"], feed["packet_conservation"]) == (before, "open", 0)


def test_a_timeout_that_was_none_gives_the_window_back_at_once(feed):
    feed.cruise()
    before = feed.cc.window
    feed.lose(feed.BDP, in_flight=0, persistent=True)
    feed.ack(sent_at=feed.now, after=0.1, in_flight=0)
    assert feed.cc.window == 4 * feed.MSS
    feed.cc.on_spurious_loss(now=feed.now)
    assert (feed.cc.window, feed["recovery"]) == (before, "open")


def test_a_loss_that_was_none_widens_nothing_in_probe_rtt(feed):
    feed.probe_rtt()
    feed.lose()
    feed.cc.on_spurious_loss(now=feed.now)
    assert feed.cc.window == 4 * feed.MSS


def test_a_loss_in_probe_rtt_does_not_keep_it_from_ending(feed):
    feed.probe_rtt()
    feed.ack(in_flight=4 * feed.MSS)
    feed.lose(in_flight=3 * feed.MSS)
    for _ in range(3):
        feed.round(lost=0, in_flight=3 * feed.MSS, after=0.11, sent_at=feed.now)
    assert feed.mode == "probe_bw"
    assert feed.cc.window >= 2 * feed.BDP


def test_a_loss_that_was_none_begins_the_count_of_full_rounds_anew(feed):
    for _ in range(3):
        feed.round()
    assert feed["full_bw_count"] == 2
    feed.cc.on_spurious_loss(now=feed.now)
    assert (feed["full_bw_count"], feed["full_bw"]) == (0, 0)


# ---- policers -----------------------------------------------------------------------------


def lossy_rounds(feed, rounds, *, rate, loss, acked=10_000):
    """Rounds of 100 ms in which ``rate`` is delivered and ``loss`` of what was sent is lost."""
    lost = round(acked * loss / (1 - loss))
    for _ in range(rounds):
        for part in range(10):
            feed.lose(lost, sent_at=feed.now)
            more = {"prior_delivered": feed.delivered} if part == 0 else {}
            feed.ack(acked, after=acked / rate, rate=rate, lost=lost, **more)


def policed(feed):
    feed.cruise()
    lossy_rounds(feed, 12, rate=5e5, loss=0.3)
    assert feed["lt_use_bw"] == 1


def test_two_intervals_with_much_loss_and_one_rate_are_a_policer(feed):
    policed(feed)
    assert feed["lt_bw"] == pytest.approx(5e5, rel=0.05)
    assert feed.cc.pacing_rate == pytest.approx(0.99 * feed["lt_bw"])
    assert feed["pacing_gain"] == 1


def test_a_timeout_counts_as_a_loss_and_as_a_round(feed):
    feed.drain()
    while feed["pacing_gain"] != 1.25:
        feed.round(in_flight=2 * feed.BDP)
    feed.lose()
    feed.ack(lost=feed.MSS)
    for interval in range(2):
        for _ in range(3):
            feed.round(after=0.01)
            assert feed["lt_use_bw"] == 0
        assert ("lt_bw" in feed.cc.state()) == bool(interval)
        feed.ack()
        feed.lose(4000, in_flight=0, persistent=True)
        assert feed["lt_bw"] == pytest.approx(4000 / 0.031)
    assert (feed["lt_use_bw"], feed["pacing_gain"]) == (1, 1)


def test_its_rate_is_kept_without_probing_for_48_rounds(feed):
    feed.cruise()
    while not feed["lt_use_bw"]:
        lossy_rounds(feed, 1, rate=5e5, loss=0.3)
    for _ in range(47):
        assert (feed["lt_use_bw"], feed["pacing_gain"]) == (1, 1)
        feed.round(in_flight=2 * feed.BDP)
    assert feed["lt_use_bw"] == 1
    feed.round(in_flight=2 * feed.BDP)
    assert (feed["lt_use_bw"], feed.mode) == (0, "probe_bw")


def test_its_rate_is_the_mean_of_both_intervals(feed):
    feed.cruise()
    while "lt_bw" not in feed.cc.state():
        lossy_rounds(feed, 1, rate=5e5, loss=0.3)
    first = feed["lt_bw"]
    while not feed["lt_use_bw"]:
        lossy_rounds(feed, 1, rate=5.4e5, loss=0.3)
    assert feed["lt_bw"] == pytest.approx((first + 5.4e5) / 2, rel=0.01)


def test_very_low_rates_agree_when_they_differ_by_4_kbit_per_second(feed):
    feed.cruise()
    while "lt_bw" not in feed.cc.state():
        lossy_rounds(feed, 1, rate=1000, loss=0.3, acked=100)
    lossy_rounds(feed, 5, rate=1400, loss=0.3, acked=100)
    assert feed["lt_use_bw"] == 1


def test_rounds_of_startup_do_not_count_towards_the_48(feed):
    rate = 1e4
    for count in range(70):
        feed.lose(5000, sent_at=feed.now)
        feed.round(rate, acked=10_000, lost=5000)
        rate *= 1.26
        assert feed.mode == "startup"
        assert feed["lt_use_bw"] == (count >= 7)


def test_an_interval_ends_with_a_loss(feed):
    feed.cruise()
    feed.lose(10_000)
    feed.ack(lost=10_000)
    feed.lose(10_000)
    feed.ack(lost=10_000)
    for _ in range(8):
        feed.round()
        assert "lt_bw" not in feed.cc.state()
    feed.lose()
    feed.ack(lost=feed.MSS)
    assert "lt_bw" in feed.cc.state()


def test_an_interval_of_more_than_16_rounds_is_given_up(feed):
    feed.cruise()
    feed.lose()
    feed.ack(lost=feed.MSS)
    for _ in range(17):
        feed.round()
    feed.lose(50_000)
    feed.ack(lost=50_000)
    assert "lt_bw" not in feed.cc.state()


def test_it_can_be_switched_off(feeds):
    feed = feeds(long_term_bandwidth=False)
    feed.cruise()
    lossy_rounds(feed, 40, rate=5e5, loss=0.3)
    assert feed["lt_use_bw"] == 0
    assert "lt_bw" not in feed.cc.state()


@pytest.mark.parametrize(("loss", "policer"), [(0.10, 0), (0.15, 0), (0.17, 1), (0.25, 1)])
def test_a_policer_loses_50_for_256_delivered_that_is_16_percent(feed, loss, policer):
    feed.cruise()
    lossy_rounds(feed, 30, rate=5e5, loss=loss)
    assert feed["lt_use_bw"] == policer


def test_intervals_that_disagree_are_no_policer(feed):
    feed.cruise()
    for step in range(12):
        lossy_rounds(feed, 4, rate=5e5 * (1 + step % 2), loss=0.3)
        assert feed["lt_use_bw"] == 0
    assert feed["lt_bw"] > 0


def test_an_application_that_runs_out_begins_the_interval_anew(feed):
    feed.cruise()
    for _ in range(20):
        lossy_rounds(feed, 3, rate=5e5, loss=0.3)
        assert "lt_bw" not in feed.cc.state()
        feed.ack(app_limited=True)


def test_a_loss_that_was_none_ends_the_suspicion(feed):
    policed(feed)
    feed.cc.on_spurious_loss(now=feed.now)
    assert feed["lt_use_bw"] == 0
