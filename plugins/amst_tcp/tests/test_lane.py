"""What a TCP lane promises while all is well: frames whole, in place, in order; socket options; statistics."""

from __future__ import annotations

import fcntl
import gc
import os
import socket
import struct
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from amst_core.errors import BrokenError, BusyError, ClosedError
from amst_core.interfaces import HEADER_SIZE, LaneTimeouts, PathStats
from amst_tcp.lane import SocketOptions, TcpLane

SocketPairs = Callable[..., tuple[socket.socket, socket.socket]]
LanePairs = Callable[..., tuple[TcpLane, TcpLane]]
Spawn = Callable[[Callable[[], Any]], Any]
WaitUntil = Callable[[Callable[[], bool], str], None]

SIZES = [0, 1, 31, 64 << 10, (1 << 20) + 1]
EMPTY = memoryview(b"")


def header(number: int) -> bytes:
    return number.to_bytes(4, "big") * (HEADER_SIZE // 4)


def pattern(size: int, seed: int) -> memoryview:
    return memoryview(bytes((seed + i * 7) % 251 for i in range(1009)) * (size // 1009 + 1))[:size]


def open_sockets() -> int:
    """Descriptors of this process that are sockets."""
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            count += os.readlink(entry).startswith("socket:")
        except FileNotFoundError:
            continue  # the directory's own descriptor
    return count


def to(view: memoryview) -> Callable[[memoryview], memoryview]:
    return lambda _header: view


def test_frames_arrive_whole_and_in_order_both_ways_at_once(
    lane_pairs: LanePairs, family: socket.AddressFamily, spawn: Spawn
) -> None:
    near, far = lane_pairs(family=family)

    def send(lane: TcpLane, seed: int) -> None:
        for number, size in enumerate(SIZES * 3):
            lane.send_frame(header(number), pattern(size, seed))

    def receive(lane: TcpLane, seed: int) -> None:
        for number, size in enumerate(SIZES * 3):
            buffer = bytearray(size)
            assert lane.recv_frame(to(memoryview(buffer))) == header(number)
            assert buffer == pattern(size, seed)

    tasks = [spawn(lambda lane=lane, seed=seed: send(lane, seed)) for lane, seed in ((near, 1), (far, 2))]
    tasks += [spawn(lambda lane=lane, seed=seed: receive(lane, seed)) for lane, seed in ((near, 2), (far, 1))]
    for task in tasks:
        task.outcome()


def test_the_payload_goes_straight_where_place_says(lane_pairs: LanePairs) -> None:
    near, far = lane_pairs()
    near.send_frame(header(9), memoryview(b"payload"))
    memory = bytearray(b"." * 20)
    seen = []

    def place(head: memoryview) -> memoryview:
        seen.append(bytes(head))
        return memoryview(memory)[5:12]

    assert far.recv_frame(place) == header(9)
    assert seen == [header(9)]
    assert memory == b".....payload........"


def test_a_discarded_payload_leaves_the_next_frame_whole(lane_pairs: LanePairs, spawn: Spawn) -> None:
    near, far = lane_pairs()
    size = 300_000
    sending = spawn(lambda: [near.send_frame(header(1), memoryview(bytes(size))), near.send_frame(header(2), EMPTY)])
    assert far.recv_frame(lambda _header: memoryview(bytearray(size))) == header(1)
    assert far.recv_frame(lambda _header: memoryview(bytearray(0))) == header(2)
    sending.outcome()


def test_what_place_raises_passes_unchanged(lane_pairs: LanePairs) -> None:
    near, far = lane_pairs()
    near.send_frame(header(1), EMPTY)
    fault = OSError("the placer's own")

    def place(_header: memoryview) -> memoryview:
        raise fault

    with pytest.raises(OSError, match="the placer's own") as caught:
        far.recv_frame(place)
    assert caught.value is fault


QUEUED = 200_000


def queue_unsent(lane: TcpLane, peer: TcpLane) -> memoryview:
    """Sends a frame that the lane's socket holds in large part: the peer's small buffer is full."""
    payload = pattern(QUEUED, 3)
    peer._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    lane._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * QUEUED)
    lane.send_frame(header(1), payload)
    unacknowledged = struct.unpack("=i", fcntl.ioctl(lane._sock, termios.TIOCOUTQ, bytes(4)))[0]
    assert unacknowledged > QUEUED // 4
    return payload


def unread(lane: TcpLane) -> int:
    return int(struct.unpack("=i", fcntl.ioctl(lane._sock, termios.FIONREAD, bytes(4)))[0])


def test_close_lets_what_was_sent_arrive_and_then_ends_cleanly(lane_pairs: LanePairs, wait_until: WaitUntil) -> None:
    near, far = lane_pairs(options=SocketOptions(notsent_lowat=0))
    # The peer's own frame, unread here: closing over it must not reset what this side sent.
    far.send_frame(header(7), memoryview(bytes(1000)))
    wait_until(lambda: unread(near) == HEADER_SIZE + 1000, "the peer's frame lies unread")
    payload = queue_unsent(near, far)
    near.close()
    near.close()
    assert near._sock.fileno() == -1
    buffer = bytearray(QUEUED)
    assert far.recv_frame(to(memoryview(buffer))) == header(1)
    assert buffer == payload
    assert far.recv_frame(to(EMPTY)) is None


def test_abort_after_close_still_drops_what_was_not_sent(lane_pairs: LanePairs) -> None:
    near, far = lane_pairs(options=SocketOptions(notsent_lowat=0))
    far.send_frame(header(7), EMPTY)
    queue_unsent(near, far)

    def place(_header: memoryview) -> memoryview:
        near.close()
        near.abort()  # the descriptor is still open: this thread is inside
        return EMPTY

    near.recv_frame(place)
    with pytest.raises(BrokenError):
        far.recv_frame(lambda _header: memoryview(bytearray(QUEUED)))


def test_close_wakes_a_receiver_of_its_own_with_closed_error(
    lane_pairs: LanePairs, spawn: Spawn, wait_until: WaitUntil
) -> None:
    near, far = lane_pairs()
    reading = spawn(lambda: near.recv_frame(to(EMPTY)))
    wait_until(near._recv_gate.locked, "the receiver is inside")
    near.close()
    with pytest.raises(ClosedError):
        reading.outcome()
    assert far.recv_frame(to(EMPTY)) is None
    assert near._sock.fileno() == -1


@pytest.mark.parametrize("end", ["close", "abort"])
def test_a_lane_closed_by_this_side_says_so(lane_pairs: LanePairs, end: str) -> None:
    near, _far = lane_pairs()
    getattr(near, end)()
    with pytest.raises(ClosedError, match="this side closed"):
        near.send_frame(header(1), EMPTY)
    with pytest.raises(ClosedError, match="this side closed"):
        near.recv_frame(to(EMPTY))


def test_a_second_sender_or_receiver_is_told_busy_and_the_first_goes_on(
    lane_pairs: LanePairs, spawn: Spawn, wait_until: WaitUntil
) -> None:
    near, far = lane_pairs()
    size = 64 << 20
    sending = spawn(lambda: near.send_frame(header(1), memoryview(bytes(size))))
    wait_until(near._send_gate.locked, "the sender is inside")
    with pytest.raises(BusyError, match="sends"):
        near.send_frame(header(2), EMPTY)
    receiving = spawn(lambda: near.recv_frame(to(EMPTY)))
    wait_until(near._recv_gate.locked, "the receiver is inside")
    with pytest.raises(BusyError, match="receives"):
        near.recv_frame(to(EMPTY))
    far.send_frame(header(3), EMPTY)
    assert receiving.outcome() == header(3)
    assert far.recv_frame(lambda _header: memoryview(bytearray(size))) == header(1)
    sending.outcome()


def test_the_context_manager_closes_on_success_and_aborts_on_error(lane_pairs: LanePairs) -> None:
    near, far = lane_pairs()
    with near:
        near.send_frame(header(1), EMPTY)
    assert far.recv_frame(to(EMPTY)) == header(1)
    assert far.recv_frame(to(EMPTY)) is None


def test_no_descriptor_is_left_behind(
    lane_pairs: LanePairs, family: socket.AddressFamily, spawn: Spawn, wait_until: WaitUntil
) -> None:
    gc.collect()  # sockets that other tests dropped are not ours to count
    before = open_sockets()
    for number in range(100):
        near, far = lane_pairs(family=family)
        reading = spawn(lambda far=far: far.recv_frame(to(EMPTY)))
        if number % 2:
            near.close()
            assert reading.outcome() is None
            far.close()
        else:
            wait_until(far._recv_gate.locked, "the receiver is inside")
            far.abort()
            with pytest.raises(ClosedError):
                reading.outcome()
            near.abort()
    assert open_sockets() == before


# ---- the socket's options and the kernel's numbers --------------------------------------------


def tcp_option(lane: TcpLane, option: int) -> int:
    return lane._sock.getsockopt(socket.IPPROTO_TCP, option)


def test_every_lane_carries_its_socket_options(lane_pairs: LanePairs) -> None:
    timeouts = LaneTimeouts(read_s=1.5, write_s=2.25, unacknowledged_s=33.0, keepalive_s=12.0)
    for lane in lane_pairs(timeouts=timeouts):
        assert tcp_option(lane, socket.TCP_NODELAY)
        assert lane._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert tcp_option(lane, socket.TCP_KEEPIDLE) == 12
        assert tcp_option(lane, socket.TCP_KEEPINTVL) == 4
        assert tcp_option(lane, socket.TCP_KEEPCNT) == 6
        assert tcp_option(lane, socket.TCP_USER_TIMEOUT) == 33_000
        assert tcp_option(lane, socket.TCP_NOTSENT_LOWAT) == 256 << 10
        assert timeval(lane, socket.SO_RCVTIMEO) == pytest.approx(1.5, abs=0.02)  # the kernel counts in jiffies
        assert timeval(lane, socket.SO_SNDTIMEO) == pytest.approx(2.25, abs=0.02)
        assert lane._sock.gettimeout() is None


def timeval(lane: TcpLane, option: int) -> float:
    seconds, micros = struct.unpack("@ll", lane._sock.getsockopt(socket.SOL_SOCKET, option, 16))
    return float(seconds + micros / 1e6)


def test_zero_leaves_the_kernels_own_values(lane_pairs: LanePairs, socket_pairs: SocketPairs) -> None:
    plain, _ = socket_pairs()
    near, _far = lane_pairs(options=SocketOptions(notsent_lowat=0))
    assert tcp_option(near, socket.TCP_NOTSENT_LOWAT) == plain.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        assert near._sock.getsockopt(socket.SOL_SOCKET, option) == plain.getsockopt(socket.SOL_SOCKET, option)


def test_statistics_are_sane_after_traffic_and_kept_after_the_end(
    lane_pairs: LanePairs, family: socket.AddressFamily, spawn: Spawn
) -> None:
    near, far = lane_pairs(family=family)
    size = 1 << 20
    sending = spawn(lambda: [near.send_frame(header(n), memoryview(bytes(size))) for n in range(8)])
    for _ in range(8):
        far.recv_frame(lambda _header: memoryview(bytearray(size)))
    sending.outcome()
    stats = near.path_stats()
    assert stats.rtt_s is not None
    assert 0 < stats.rtt_s < 5
    assert stats.min_rtt_s is not None
    assert 0 < stats.min_rtt_s <= stats.rtt_s * 1.001 + 1e-3
    assert stats.mss is not None
    assert 500 < stats.mss <= 65536
    assert stats.cwnd is not None
    assert stats.cwnd >= stats.mss
    assert stats.pacing_rate is None or stats.pacing_rate > 0
    assert stats.delivery_rate is not None
    assert stats.delivery_rate > 0
    assert stats.app_limited is not None
    assert stats.segments_sent is not None
    assert stats.segments_sent >= 8 * size / 65536
    assert stats.segments_retransmitted is not None
    assert stats.bytes_retransmitted is not None
    assert stats.congestion in near._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).decode()
    near.abort()
    ended = near.path_stats()
    assert ended.mss == stats.mss
    assert ended.segments_sent is not None
    assert ended.segments_sent >= stats.segments_sent


def test_progress_is_told_inside_a_frame_and_a_closed_window_from_a_dead_path(
    lane_pairs: LanePairs, family: socket.AddressFamily, spawn: Spawn, wait_until: WaitUntil
) -> None:
    near, far = lane_pairs(family=family)
    size = 64 << 20  # more than both kernels hold
    sending = spawn(lambda: near.send_frame(header(size), memoryview(bytes(size))))

    def told(lane: TcpLane) -> tuple[int, int, int]:
        stats = lane.path_stats()
        assert stats.bytes_acknowledged is not None
        assert stats.bytes_received is not None
        assert stats.bytes_waiting is not None
        return stats.bytes_acknowledged, stats.bytes_received, stats.bytes_waiting

    def at_rest() -> bool:
        before = told(near)
        time.sleep(0.2)
        return before[0] > 64 << 10 and before == told(near)

    wait_until(at_rest, "the peer to have no room")
    assert sending.is_alive()
    before = told(near)
    assert before[2] == 0, "what the peer has no room for is not on its way"
    far.recv_frame(lambda _header: memoryview(bytearray(size)))
    sending.outcome()
    wait_until(lambda: told(near)[2] == 0, "all of them to be acknowledged")
    whole = size + len(header(size))
    assert before[0] < whole <= told(near)[0] <= whole + 1  # Linux counts the SYN
    assert told(far)[1] >= whole
    assert told(far)[2] == 0


@pytest.mark.parametrize("end", ["close", "abort"])
def test_the_last_statistics_are_taken_when_the_lane_ends(lane_pairs: LanePairs, end: str) -> None:
    near, _far = lane_pairs()
    near.send_frame(header(1), EMPTY)
    getattr(near, end)()
    stats = near.path_stats()
    assert stats.segments_sent == 1
    assert stats.rtt_s is not None


def test_statistics_never_raise_on_a_dead_socket(lane_pairs: LanePairs) -> None:
    near, _far = lane_pairs()
    near._sock.close()
    assert near.path_stats() == PathStats()


def test_the_description_names_both_ends(lane_pairs: LanePairs, family: socket.AddressFamily) -> None:
    near, far = lane_pairs(family=family)
    text = "127.0.0.1" if family == socket.AF_INET else "[::1]"
    near_port, far_port = near._sock.getsockname()[1], far._sock.getsockname()[1]
    assert near.description == f"tcp {text}:{near_port} -> {text}:{far_port}"
    assert far.description == f"tcp {text}:{far_port} -> {text}:{near_port}"
