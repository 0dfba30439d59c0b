"""What a TCP lane promises when things go wrong: every wait ends, with the right error, on both sides."""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

import amst_tcp.lane
from amst_core.errors import BrokenError, ClosedError
from amst_core.interfaces import HEADER_SIZE, LaneTimeouts
from amst_tcp.lane import TcpLane

LanePairs = Callable[..., tuple[TcpLane, TcpLane]]
Spawn = Callable[[Callable[[], Any]], Any]
WaitUntil = Callable[[Callable[[], bool], str], None]

EMPTY = memoryview(b"")
MORE_THAN_BUFFERS = 256 << 20
SHORT = LaneTimeouts(read_s=0.2, write_s=0.2)


def header(number: int) -> bytes:
    return number.to_bytes(4, "big") * (HEADER_SIZE // 4)


def receive(lane: TcpLane) -> bytes | None:
    return lane.recv_frame(lambda _header: memoryview(bytearray(0)))


@pytest.fixture
def fill(spawn: Spawn, wait_until: WaitUntil) -> Callable[[TcpLane], Any]:
    """Starts a thread that sends until the path is full, and returns when it is."""

    def start(lane: TcpLane) -> Any:
        task = spawn(lambda: lane.send_frame(header(1), memoryview(bytes(MORE_THAN_BUFFERS))))
        poller = select.poll()
        poller.register(lane._sock, select.POLLOUT)
        wait_until(lambda: lane._send_gate.locked() and not poller.poll(0), "the path is full")
        return task

    return start


@pytest.fixture(params=["reset", "shutdown"])
def way_of_abort(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to abort: the reset, and what serves where a kernel refuses it while a thread waits."""
    if request.param == "shutdown":
        monkeypatch.setattr(amst_tcp.lane, "_reset", lambda _sock: False)
    way: str = request.param
    return way


def test_abort_wakes_reader_and_writer_and_frees_the_descriptor(
    lane_pairs: LanePairs, way_of_abort: str, spawn: Spawn, wait_until: WaitUntil, fill: Callable[[TcpLane], Any]
) -> None:
    near, far = lane_pairs()
    reading, writing = spawn(lambda: receive(near)), fill(near)
    wait_until(near._recv_gate.locked, "the receiver is inside")
    near.abort()
    near.abort()
    for task in (reading, writing):
        with pytest.raises(ClosedError):
            task.outcome()
    assert near._sock.fileno() == -1
    with pytest.raises(BrokenError):
        far.recv_frame(lambda _header: memoryview(bytearray(MORE_THAN_BUFFERS)))


def test_between_frames_the_peer_of_an_abort_sees_an_error_and_no_end(
    lane_pairs: LanePairs, way_of_abort: str, spawn: Spawn, wait_until: WaitUntil
) -> None:
    near, far = lane_pairs()
    near.send_frame(header(1), EMPTY)
    assert receive(far) == header(1)
    reading, waiting = spawn(lambda: receive(near)), spawn(lambda: receive(far))
    wait_until(lambda: near._recv_gate.locked() and far._recv_gate.locked(), "both receivers are inside")
    near.abort()
    with pytest.raises(ClosedError):
        reading.outcome()
    with pytest.raises(BrokenError, match="reset") as caught:
        waiting.outcome()
    assert far.description in str(caught.value)
    assert caught.value.peer == far.description.rpartition(" ")[2]


def test_an_aborted_lane_is_closed_at_once_its_descriptor_when_the_last_thread_has_left(
    lane_pairs: LanePairs, way_of_abort: str
) -> None:
    near, far = lane_pairs()
    seen: list[int] = []

    def place(_header: memoryview) -> memoryview:
        near.abort()
        seen.append(near._sock.fileno())
        with pytest.raises(ClosedError):
            near.send_frame(header(2), EMPTY)
        with pytest.raises(ClosedError):
            near.recv_frame(place)
        return memoryview(bytearray(1000))

    far._sock.sendall(header(1))
    with pytest.raises(ClosedError):
        near.recv_frame(place)
    assert seen[0] >= 0
    assert near._sock.fileno() == -1


@pytest.mark.parametrize("sent", [1, 31, 32, 40], ids=lambda n: f"{n}-bytes")
def test_a_peer_that_ends_inside_a_frame_is_broken_not_finished(lane_pairs: LanePairs, sent: int) -> None:
    near, far = lane_pairs()
    near._sock.sendall((header(1) + bytes(100))[:sent])
    near.close()
    with pytest.raises(BrokenError, match="inside a frame") as caught:
        far.recv_frame(lambda _header: memoryview(bytearray(100)))
    assert far.description in str(caught.value)


def test_sending_to_a_peer_that_is_gone_is_broken(lane_pairs: LanePairs, fill: Callable[[TcpLane], Any]) -> None:
    near, far = lane_pairs()
    writing = fill(near)
    far.abort()
    with pytest.raises(BrokenError, match=r"reset|Broken pipe") as caught:
        writing.outcome()
    assert near.description in str(caught.value)


class CountingSocket:
    """A socket that counts how often a read ran into the kernel's timeout."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.timeouts = 0

    def recv_into(self, *args: Any) -> int:
        try:
            return self._sock.recv_into(*args)
        except BlockingIOError:
            self.timeouts += 1
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def test_an_idle_lane_outlives_its_read_timeout(
    lane_pairs: LanePairs, monkeypatch: pytest.MonkeyPatch, spawn: Spawn, wait_until: WaitUntil
) -> None:
    near, far = lane_pairs(timeouts=LaneTimeouts(read_s=0.02))
    counting = CountingSocket(far._sock)
    monkeypatch.setattr(far, "_sock", counting)
    reading = spawn(lambda: receive(far))
    wait_until(lambda: counting.timeouts >= 3, "three read timeouts went by")
    near.send_frame(header(1), EMPTY)
    assert reading.outcome() == header(1)


@pytest.mark.parametrize("sent", [10, 32, 50], ids=["in-header", "after-header", "in-payload"])
def test_a_pause_inside_a_frame_is_broken(lane_pairs: LanePairs, sent: int) -> None:
    near, far = lane_pairs(timeouts=SHORT)
    near._sock.sendall((header(1) + bytes(100))[:sent])
    with pytest.raises(BrokenError, match=r"nothing arrived for 0\.2 s inside a frame"):
        far.recv_frame(lambda _header: memoryview(bytearray(100)))


def test_a_peer_that_reads_nothing_is_broken(lane_pairs: LanePairs) -> None:
    near, _far = lane_pairs(timeouts=SHORT)
    payload = memoryview(bytes(MORE_THAN_BUFFERS))
    with pytest.raises(BrokenError, match=r"could send nothing for 0\.2 s"):
        near.send_frame(header(1), payload)


def test_a_frame_slower_than_the_write_timeout_goes_through_as_long_as_it_moves(
    lane_pairs: LanePairs, spawn: Spawn, wait_until: WaitUntil
) -> None:
    near, far = lane_pairs(timeouts=LaneTimeouts(write_s=0.05))
    size = 64 << 20
    writing = spawn(lambda: near.send_frame(header(1), memoryview(bytes(size))))
    left = 32 + size
    waits = 0

    def read_some() -> bool:
        nonlocal left, waits
        left -= len(far._sock.recv(min(left, 4 << 20)))
        waits += 1
        return not left

    wait_until(read_some, "the frame has gone through")
    writing.outcome()
    assert waits > 1


def test_killed_from_outside_both_ends_are_broken(
    lane_pairs: LanePairs, family: socket.AddressFamily, spawn: Spawn, wait_until: WaitUntil
) -> None:
    if os.geteuid() != 0 or not shutil.which("ss"):
        pytest.skip("needs root and ss")
    near, far = lane_pairs(family=family)
    reading, waiting = spawn(lambda: receive(near)), spawn(lambda: receive(far))
    wait_until(lambda: near._recv_gate.locked() and far._recv_gate.locked(), "both receivers are inside")
    near_port, far_port = near._sock.getsockname()[1], far._sock.getsockname()[1]
    kill = ["ss", "-K", "-H", "-t", f"sport = :{near_port} and dport = :{far_port}"]
    killed = subprocess.run(kill, capture_output=True, text=True, check=False, timeout=20)
    if str(near_port) not in killed.stdout:
        pytest.skip(f"the kernel does not let ss kill connections: {killed.stderr or killed.returncode}")
    for task, lane in ((reading, near), (waiting, far)):
        with pytest.raises(BrokenError) as caught:
            task.outcome()
        assert lane.description in str(caught.value)
        with pytest.raises(BrokenError):
            lane.send_frame(header(1), EMPTY)
