"""What `amst bench` offers: as much as the streams need, and nothing that is late when the time is up."""

from __future__ import annotations

from typing import Any

import pytest

from amst_core.cli.traffic import DATA, Load, Tally, drain, push

pytestmark = pytest.mark.needs_transport

KIB = 1 << 10


def test_what_was_not_begun_when_the_time_is_up_is_taken_back(net: Any, spawn: Any) -> None:
    pair = net.pair(streams=2)
    pair.near.limit_rate(1e6)
    load = Load(size=None, seconds=0.4, message=64 * KIB, window=200)
    sent, arrived = Tally(), Tally()
    draining = spawn(drain, pair.far, arrived)
    push(pair.near, load, sent)
    draining.outcome()
    assert 0 < sent.bytes == arrived.bytes < load.message * load.window / 2, "all of it would have taken 13 s"
    pair.near.send(b"on", channel=DATA[0]).wait(20)
    assert pair.far.recv(DATA[0], timeout=20) == b"on", "the session goes on"
    assert pair.near.metrics().lane_failures == 0


def test_a_size_is_sent_whole(net: Any, spawn: Any) -> None:
    pair = net.pair(streams=2)
    sent, arrived = Tally(), Tally()
    draining = spawn(drain, pair.far, arrived)
    push(pair.near, Load(size=5_000_001, seconds=None, message=64 * KIB, window=20), sent)
    draining.outcome()
    assert sent.bytes == arrived.bytes == 5_000_001


@pytest.mark.parametrize("rtt_s", [0.0001, 0.2])
def test_messages_and_what_is_ahead_follow_the_path(net: Any, monkeypatch: pytest.MonkeyPatch, rtt_s: float) -> None:
    from amst_core.cli import traffic

    class Metrics:
        average_latency_s = rtt_s

    class Session:
        def metrics(self) -> Metrics:
            return Metrics()

    now = 10.0
    monkeypatch.setattr(traffic.time, "monotonic", lambda: now)
    load = Load(size=None, seconds=1.0, message=16 << 20, window=6)
    ahead = traffic._Ahead(load, Session())  # type: ignore[arg-type]
    if rtt_s < 0.005:
        assert (ahead.size, ahead.message) == (96 << 20, 16 << 20)
        return
    assert (ahead.size, ahead.message) == (32 << 20, 256 * KIB)
    ahead.look(4 << 20, starved=False)
    assert ahead.size == 32 << 20, "a round trip has not passed"
    now += 0.25
    ahead.look(4 << 20, starved=False)
    assert (ahead.size, ahead.message) == (32 << 20, 256 * KIB)
    now += 0.25
    ahead.look(16 << 20, starved=False)
    assert (ahead.size, ahead.message) == (48 << 20, 384 * KIB)
    now += 0.25
    ahead.look(16 << 20, starved=True)
    assert (ahead.size, ahead.message) == (96 << 20, 768 * KIB)
