"""A rate limit bounds what goes over all streams together, may change at any time, and the lower of two holds."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from amst_core import Session
from amst_core.engine.pace import BURST_S
from amst_core.errors import ProtocolError, UsageError
from amst_core.session.core import MIN_RATE
from amst_core.wire import requests as ops
from amst_core.wire.frames import FrameHeader, FrameKind

pytestmark = pytest.mark.needs_transport

MIB = 1 << 20
CHUNK = MIB


@pytest.fixture(scope="module")
def payload() -> bytes:
    return os.urandom(8 * MIB)


class Meter:
    """Watches a count of bytes; at every look it must be within what a rate allows since the meter was made."""

    def __init__(self, count: Callable[[], int], rate: float, *, slack: int = 0) -> None:
        self._count = count
        self._rate = rate
        self._slack = slack + 2 * rate * BURST_S  # the burst, and a chunk, which is no longer than one
        self._began_at, self._began = time.monotonic(), count()
        self.moved = 0

    def look(self) -> int:
        self.moved = self._count() - self._began  # before the time: so the bound can only be too large
        assert self.moved <= self._rate * (time.monotonic() - self._began_at) + self._slack, "faster than the limit"
        return self.moved

    def until(self, net: Any, condition: Callable[[], object], what: str) -> None:
        def looked() -> object:
            self.look()
            return condition()

        net.wait_until(looked, what)


def verified(session: Session) -> Callable[[], int]:
    return lambda: session.core.engine.bytes_verified


@pytest.mark.parametrize("streams", [1, 8])
@pytest.mark.parametrize("plaintext", [False, True], ids=["encrypted", "plaintext"])
def test_the_limit_holds_over_all_streams_together(net: Any, payload: bytes, streams: int, plaintext: bool) -> None:
    rate = 4 * MIB
    pair = net.pair(streams=streams, plaintext=plaintext)
    pair.near.limit_rate(rate)
    meter = Meter(verified(pair.far), rate)
    ticket = pair.near.send(payload)
    meter.until(net, lambda: ticket.done, "the message")
    assert meter.moved == len(payload)
    assert pair.far.recv(timeout=20) == payload
    ticket.wait(0)
    used = [stream for stream in pair.near.metrics().streams if stream.bytes_sent]
    assert len(used) > 1 or streams == 1, "streams take turns"


def test_many_small_messages_are_limited_too(net: Any) -> None:
    rate = 512 << 10
    pair = net.pair(streams=4)
    pair.near.limit_rate(rate)
    meter = Meter(verified(pair.far), rate)
    for i in range(600):
        pair.near.send(i.to_bytes(2, "big") * 1000)
        meter.look()
        pair.far.recv(timeout=20)
    meter.until(net, lambda: not pair.near.core.unfinished(), "the rest")
    assert meter.moved == 600 * 2000


def test_it_may_change_while_bytes_flow(net: Any, spawn: Any, payload: bytes) -> None:
    pair = net.pair(streams=4)
    stop = threading.Event()

    def send() -> None:
        while not stop.is_set():
            pair.near.send(payload).wait(60)
        pair.near.send(b"").wait(60)

    def receive() -> None:
        while pair.far.recv(timeout=60):
            pass

    tasks = [spawn(send), spawn(receive)]
    count = verified(pair.far)
    net.wait_until(lambda: count() > 64 * MIB, "traffic without a limit")
    for rate in (2 * MIB, 6 * MIB, MIB):
        pair.near.limit_rate(rate)
        # each stream may have one chunk of those cut before
        meter = Meter(count, rate, slack=8 * CHUNK)  # one more each may be in a socket
        meter.until(net, lambda meter=meter, rate=rate: meter.moved > 4 * CHUNK + rate // 2, f"some at {rate} bytes/s")
    pair.near.limit_rate(None)
    before = count()
    net.wait_until(lambda: count() > before + 64 * MIB, "traffic without a limit again", 15)
    stop.set()
    for task in tasks:
        task.outcome(30)
    assert pair.near.metrics().lane_failures == 0
    assert pair.near.metrics().retransmitted_bytes == 0, "what waits for its turn is not late"


def test_the_other_side_may_be_asked_to_hold_back(net: Any, tmp_path: Path, spawn: Any, payload: bytes) -> None:
    rate = 3 * MIB
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "file").write_bytes(payload)
    pair = net.pair(streams=4, root=tmp_path / "root")
    pair.near.limit_peer_rate(rate)
    meter = Meter(verified(pair.near), rate)
    copying = spawn(pair.near.recv_file, "file", tmp_path / "copy")
    meter.until(net, lambda: not copying.running, "the copy")
    copying.outcome()
    assert meter.moved == len(payload)
    assert (tmp_path / "copy").read_bytes() == payload
    pair.near.limit_peer_rate(None)
    pair.near.recv_file("file", tmp_path / "again")
    assert pair.far.core._rates == [None, None]


@pytest.mark.parametrize("lower", ["own", "the peer's"])
def test_the_lower_of_two_limits_holds(net: Any, payload: bytes, lower: str) -> None:
    low, high = 2 * MIB, 200 * MIB
    pair = net.pair(streams=2)
    pair.near.limit_rate(low if lower == "own" else high)
    pair.far.limit_peer_rate(high if lower == "own" else low)
    meter = Meter(verified(pair.far), low)
    ticket = pair.near.send(payload[: 4 * MIB])
    meter.until(net, lambda: ticket.done, "the message")
    pair.far.recv(timeout=20)
    # the other one holds when this one goes
    if lower == "own":
        pair.near.limit_rate(None)
        pair.far.limit_peer_rate(low)
    else:
        pair.far.limit_peer_rate(None)
        pair.near.limit_rate(low)
    meter = Meter(verified(pair.far), low)
    ticket = pair.near.send(payload[: 2 * MIB])
    meter.until(net, lambda: ticket.done, "the second message")


@pytest.mark.parametrize("rate", [0, 1, MIN_RATE - 1, -5])
def test_less_than_the_least_is_refused(net: Any, rate: float) -> None:
    pair = net.pair()
    for limit in (pair.near.limit_rate, pair.near.limit_peer_rate):
        with pytest.raises(UsageError, match="16384 is the least"):
            limit(rate)


def test_a_peer_cannot_slow_this_side_down_below_the_least(net: Any) -> None:
    pair = net.pair()
    pair.near.requests.ask(ops.PACE, {ops.RATE: 1}).wait(20)
    assert pair.far.core._rates == [None, MIN_RATE]
    for bad in (-1, "fast", True):
        with pytest.raises(ProtocolError):
            pair.near.requests.ask(ops.PACE, {ops.RATE: bad}).wait(20)
    assert pair.far.core._rates == [None, MIN_RATE]


def test_the_stream_that_waits_for_its_turn_may_be_stuck_in_a_frame_of_its_own(
    net: Any, wrap_lanes: Any, wrapped_lane: Any, payload: bytes
) -> None:
    over = threading.Event()
    stuck: list[Any] = []

    class StuckLane(wrapped_lane):  # type: ignore[misc]
        def send_frame(self, header: bytes, payload: memoryview) -> None:
            if header[1] == int(FrameKind.PING):
                stuck.append(self)
                assert over.wait(20)
            super().send_frame(header, payload)

        def abort(self) -> None:
            over.set()
            super().abort()

    wrap_lanes(near=StuckLane)
    pair = net.pair(streams=2)
    core = pair.near.core
    core.limit_rate(2 * MIB)
    ticket = pair.near.send(payload[: 3 * MIB])
    net.wait_until(lambda: core._paced is not None and pair.far.core.engine.bytes_verified > MIB, "one to wait")
    with core.lock:
        waiting = core._paced or core.live_lanes_locked()[0]
        waiting.send_frame_locked(FrameHeader(FrameKind.PING, offset=1))
    try:
        net.wait_until(lambda: stuck, "it to be stuck")
        ticket.wait(20)
        assert not over.is_set()
    finally:
        over.set()
    assert pair.far.recv(timeout=20) == payload[: 3 * MIB]


def test_the_end_of_a_session_does_not_wait_for_a_limit(net: Any, payload: bytes) -> None:
    pair = net.pair(streams=2)
    pair.near.limit_rate(MIN_RATE)
    ticket = pair.near.send(payload)
    pair.near.abort()
    assert pair.near.wait_closed(10)
    assert ticket.done
