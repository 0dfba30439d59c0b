"""What a TCP lane sends is spaced out by the kernel, and its sending half tells how it stands."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import pytest

from amst_core.errors import ClosedError, UnavailableError
from amst_core.interfaces import HEADER_SIZE, FlowSample
from amst_tcp.lane import SocketOptions, TcpLane

LanePairs = Callable[..., tuple[TcpLane, TcpLane]]
Spawn = Callable[[Callable[[], Any]], Any]
WaitUntil = Callable[[Callable[[], bool], str], None]

SO_MAX_PACING_RATE = 47
UNPACED = 2**64 - 1
LOWAT = 256 << 10
HEADER = bytes(range(HEADER_SIZE))


def pace(lane: TcpLane) -> int:
    """Bytes/s that the kernel lets the lane send at most."""
    raw = lane._sock.getsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, 8)
    return int(struct.unpack("=Q", raw)[0])


def lowat(lane: TcpLane) -> int:
    return lane._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)


def sample(lane: TcpLane) -> FlowSample:
    found = lane.flow_sample()
    assert found is not None
    return found


class Refusing:
    """A socket on which no option can be set, and none asked for."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def setsockopt(self, *_: object) -> None:
        raise OSError(errno.ENOPROTOOPT, os.strerror(errno.ENOPROTOOPT))

    def getsockopt(self, *_: object) -> bytes:
        raise OSError(errno.ENOPROTOOPT, os.strerror(errno.ENOPROTOOPT))


# ---- a pace ---------------------------------------------------------------------------------------


def test_a_pace_is_the_kernels_and_none_lifts_it(lane_pairs: LanePairs, family: socket.AddressFamily) -> None:
    near, far = lane_pairs(family=family)
    assert pace(near) == UNPACED
    for rate in (1_000_000, 20e9, 1234.9):
        near.set_pacing(rate)
        assert pace(near) == int(rate), "bytes/s, also above 32 bits"
    near.set_pacing(None)
    assert pace(near) == UNPACED
    assert pace(far) == UNPACED, "of one lane and one direction"


@pytest.mark.parametrize(("rate", "set_to"), [(0.0, 1), (0.25, 1), (2.0**70, UNPACED - 1)])
def test_a_rate_beyond_what_the_kernel_counts_is_the_nearest_one(
    lane_pairs: LanePairs, rate: float, set_to: int
) -> None:
    """Neither 0, by which nothing would ever go, nor what means no limit."""
    near, _far = lane_pairs()
    near.set_pacing(rate)
    assert pace(near) == set_to


@pytest.mark.parametrize("end", ["close", "abort"])
def test_a_closed_lane_is_not_paced(lane_pairs: LanePairs, end: str) -> None:
    near, _far = lane_pairs()
    getattr(near, end)()
    for rate in (1e6, None):
        with pytest.raises(ClosedError, match="closed the lane"):
            near.set_pacing(rate)


def test_a_kernel_that_does_not_pace_is_told_as_it_is(lane_pairs: LanePairs) -> None:
    near, far = lane_pairs()
    near._sock = Refusing(near._sock)  # type: ignore[assignment]
    with pytest.raises(UnavailableError, match=rf"{near.description}: the kernel does not pace: .*not available"):
        near.set_pacing(1e6)
    near.send_frame(HEADER, memoryview(b"abc"))
    buffer = bytearray(3)
    assert far.recv_frame(lambda _header: memoryview(buffer)) == HEADER
    assert buffer == b"abc", "the lane goes on"


# ---- what waits -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "set_to"), [(40_000, 40_000), (LOWAT, LOWAT), (1 << 30, LOWAT), (1, 1), (0, 1), (-5, 1)]
)
def test_what_may_wait_is_bounded_and_never_above_what_the_settings_have(
    lane_pairs: LanePairs, wanted: int, set_to: int
) -> None:
    """0 would be the kernel's own bound, which is none."""
    near, far = lane_pairs(options=SocketOptions(notsent_lowat=LOWAT))
    near.limit_unsent(20_000)
    near.limit_unsent(wanted)
    assert lowat(near) == set_to
    assert lowat(far) == LOWAT


def test_where_the_settings_leave_it_to_the_kernel_it_is_left(lane_pairs: LanePairs) -> None:
    near, far = lane_pairs(options=SocketOptions(notsent_lowat=0))
    near.limit_unsent(40_000)
    assert lowat(near) == lowat(far)


def test_a_bound_that_cannot_be_set_is_no_error(lane_pairs: LanePairs) -> None:
    near, far = lane_pairs()
    near._sock = Refusing(near._sock)  # type: ignore[assignment]
    near.limit_unsent(40_000)
    for end in (far.close, far.abort):
        end()
        far.limit_unsent(40_000)


# ---- how the sending half stands -------------------------------------------------------------------


def test_a_sample_follows_what_the_lane_sends(
    lane_pairs: LanePairs, family: socket.AddressFamily, spawn: Spawn, wait_until: WaitUntil
) -> None:
    near, far = lane_pairs(family=family)
    before, size = sample(near), 4 << 20
    assert before.in_flight == before.unsent == 0
    sending = spawn(lambda: near.send_frame(HEADER, memoryview(bytes(size))))
    assert far.recv_frame(lambda _header: memoryview(bytearray(size))) == HEADER
    sending.outcome()
    wait_until(lambda: not (sample(near).in_flight or sample(near).unsent), "all of it to be acknowledged")
    after, stats = sample(near), near.path_stats()
    assert after.unsent == 0
    assert after.mss == stats.mss
    assert after.window == stats.cwnd
    assert after.sent == stats.segments_sent * after.mss
    assert after.delivered >= size + HEADER_SIZE, "segments count as full ones"
    assert after.delivered <= after.sent + after.mss, "Linux counts the SYN"
    assert after.lost == stats.segments_retransmitted * after.mss
    assert (after.rtt_s, after.min_rtt_s) == (stats.rtt_s, stats.min_rtt_s)
    assert sample(far).sent == 0, "it is about the sending half"


def test_what_a_pace_holds_back_is_seen_to_wait(lane_pairs: LanePairs, spawn: Spawn, wait_until: WaitUntil) -> None:
    near, far = lane_pairs()
    near.set_pacing(1000)
    size = 16 << 20
    sending = spawn(lambda: near.send_frame(HEADER, memoryview(bytes(size))))
    receiving = spawn(lambda: far.recv_frame(lambda _header: memoryview(bytearray(size))))

    def at_rest() -> bool:
        before = sample(near)
        time.sleep(0.1)
        return before.unsent > 0 and not before.in_flight and before.sent == sample(near).sent

    wait_until(at_rest, "the pace to hold the rest back")
    assert sending.is_alive() and receiving.is_alive()
    near.abort()
    for task in (sending, receiving):
        task.join(20)
        assert not task.is_alive()


@pytest.mark.parametrize("end", ["close", "abort"])
def test_after_the_end_nothing_is_known(lane_pairs: LanePairs, end: str) -> None:
    near, _far = lane_pairs()
    getattr(near, end)()
    assert near.flow_sample() is None


def test_a_kernel_that_does_not_answer_is_no_error(lane_pairs: LanePairs) -> None:
    near, _far = lane_pairs()
    near._sock = Refusing(near._sock)  # type: ignore[assignment]
    assert near.flow_sample() is None
