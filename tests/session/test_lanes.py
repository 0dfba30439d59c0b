"""Streams come, go, break, stall and lie; what was sent arrives all the same, whole and once."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from amst_core.errors import AmstError, BrokenError, ConnectError, IntegrityError, UsageError
from amst_core.interfaces import HEADER_SIZE, Lane
from amst_core.testing import FaultyLane, Flip
from amst_core.wire.frames import FrameHeader, FrameKind

pytestmark = pytest.mark.needs_transport

MIB = 1 << 20
DATA = int(FrameKind.DATA)


@pytest.fixture(scope="module")
def payload() -> bytes:
    return os.urandom(24 * MIB)


@pytest.fixture
def gate(wrapped_lane: Any) -> Any:
    """Lanes that stop before their second chunk until `go_on`; ``waiting`` counts those that have."""

    class Gate:
        def __init__(self) -> None:
            self.go_on = threading.Event()
            self.waiting = 0
            self._lock = threading.Lock()

        def wrap(self, inner: Lane) -> Lane:
            gate = self

            class GatedLane(wrapped_lane):  # type: ignore[misc]
                chunks = 0

                def send_frame(self, header: bytes, payload: memoryview) -> None:
                    if header[1] == DATA:
                        self.chunks += 1
                        if self.chunks == 2:
                            with gate._lock:
                                gate.waiting += 1
                            assert gate.go_on.wait(20)
                    super().send_frame(header, payload)

            return GatedLane(inner)

    return Gate()


def kill_with_ss(lane: Lane) -> None:
    """Have the kernel destroy the connection, as if the path had gone."""
    near, _, far = lane.description.removeprefix("tcp ").partition(" -> ")
    done = subprocess.run(
        ["ss", "-K", "-t", "-n", "-H", "src", near, "dst", far], capture_output=True, text=True, check=True
    )
    assert near in done.stdout, f"ss -K killed nothing: {done}"


def abort(lane: Lane) -> None:
    lane.abort()


needs_ss = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ss") is None, reason="ss -K needs root, and iproute2 installed"
)


@pytest.mark.parametrize("victims", [1, 3])
@pytest.mark.parametrize("kill", [abort, pytest.param(kill_with_ss, marks=needs_ss)])
@pytest.mark.parametrize("plaintext", [False, True], ids=["encrypted", "plaintext"])
def test_killed_lanes_lose_nothing(
    net: Any, spawn: Any, wrap_lanes: Any, gate: Any, payload: bytes, victims: int, kill: Any, plaintext: bool
) -> None:
    wrap_lanes(near=gate.wrap)
    pair = net.pair(streams=4, plaintext=plaintext)
    ticket = pair.near.send(payload)
    net.wait_until(lambda: gate.waiting == 4, "every lane to be in the middle")
    for worker in list(pair.near.core.lanes.values())[:victims]:
        kill(worker.lane)
    gate.go_on.set()
    assert hashlib.sha256(pair.far.recv(timeout=20)).digest() == hashlib.sha256(payload).digest()
    ticket.wait(20)
    net.wait_until(lambda: all(e.metrics().total_streams == 4 + victims for e in pair.ends), "others in their place")
    net.wait_until(lambda: all(end.metrics().lane_failures == victims for end in pair.ends), "both to have noticed")
    for end in pair.ends:
        metrics = end.metrics()
        assert metrics.active_streams == 4
        assert metrics.healthy and metrics.last_error
        assert [stream.id for stream in metrics.streams] == [1, 2, 3, 4]
        assert sorted(stream.reconnects for stream in metrics.streams) == [0] * (4 - victims) + [1] * victims
    assert pair.near.metrics().retransmitted_bytes >= victims * 256 * 1024
    pair.near.send(b"on").wait(20)
    assert pair.far.recv(timeout=20) == b"on"


def test_lanes_killed_at_the_receiver_during_a_file(net: Any, spawn: Any, tmp_path: Any, payload: bytes) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "file").write_bytes(payload)
    pair = net.pair(streams=5, root=tmp_path / "root")
    for round_ in range(4):
        victim = next(iter(pair.far.core.lanes.values()))
        task = spawn(pair.near.send_file, tmp_path / "file", f"copy{round_}")
        moved = pair.far.core.engine.bytes_verified
        net.wait_until(lambda moved=moved: pair.far.core.engine.bytes_verified > moved + 4 * MIB, "some to arrive")
        victim.lane.abort()
        task.outcome()
        assert (tmp_path / "root" / f"copy{round_}").read_bytes() == payload
    for end in pair.ends:
        net.wait_until(lambda end=end: end.metrics().lane_failures == 4, "it to have noticed")
        net.wait_until(lambda end=end: end.metrics().active_streams == 5, "the streams to be back")


@pytest.mark.parametrize("kill", [abort, pytest.param(kill_with_ss, marks=needs_ss)])
def test_all_lanes_dead_at_once_come_back(net: Any, wrap_lanes: Any, gate: Any, payload: bytes, kill: Any) -> None:
    wrap_lanes(near=gate.wrap)
    pair = net.pair(streams=3)
    ticket = pair.near.send(payload)
    net.wait_until(lambda: gate.waiting == 3, "every lane to be in the middle")
    for worker in list(pair.near.core.lanes.values()):
        kill(worker.lane)
    gate.go_on.set()
    assert pair.far.recv(timeout=20) == payload
    ticket.wait(20)
    for end in pair.ends:
        net.wait_until(lambda end=end: end.metrics().active_streams == 3, "all three to be back")
        metrics = end.metrics()
        assert (metrics.lane_failures, metrics.total_streams) == (3, 6)
        assert [(stream.id, stream.reconnects) for stream in metrics.streams] == [(1, 1), (2, 1), (3, 1)]
    assert pair.near.error is None and pair.far.error is None


@pytest.mark.parametrize("kill", [abort, pytest.param(kill_with_ss, marks=needs_ss)])
def test_all_lanes_dead_for_good_is_an_error_that_says_so(
    net: Any, spawn: Any, wrap_lanes: Any, gate: Any, payload: bytes, kill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from amst_tcp.transport import TcpTransport

    def refuse(*args: Any) -> Lane:
        raise ConnectError("no way through")

    wrap_lanes(near=gate.wrap)
    timeout = {"limits__session_timeout": "1s"}
    pair = net.pair(streams=3, server=timeout, client=timeout)
    monkeypatch.setattr(TcpTransport, "connect", refuse)
    ticket = pair.near.send(payload)
    receiving = spawn(pair.far.recv, timeout=20)
    net.wait_until(lambda: gate.waiting == 3, "every lane to be in the middle")
    for worker in list(pair.near.core.lanes.values()):
        kill(worker.lane)
    gate.go_on.set()
    net.wait_until(lambda: pair.near.metrics().active_streams == 0, "all of them to be gone")
    net.stays(lambda: pair.near.error is None, "it waits for one to come back")
    with pytest.raises(BrokenError, match=r"every stream .* none came back for 1 s"):
        ticket.wait(20)
    assert isinstance(receiving.error(), BrokenError)
    with pytest.raises(BrokenError, match="every stream") as error:
        pair.near.send(b"more")
    assert error.value.delivery is not None
    assert (error.value.delivery.delivered, error.value.delivery.undelivered) == ((), (ticket.transfer,))
    metrics = pair.near.metrics()
    assert not metrics.healthy
    assert metrics.failed_connections > 0


def test_lanes_that_die_one_by_one_are_replaced(net: Any, payload: bytes) -> None:
    pair = net.pair(streams=2)
    for round_ in range(1, 6):
        next(iter(pair.near.core.lanes.values())).lane.abort()
        for end in pair.ends:
            net.wait_until(lambda end=end, n=round_: end.metrics().total_streams == 2 + n, "another lane")
        pair.near.send(payload[:MIB]).wait(20)
        assert pair.far.recv(timeout=20) == payload[:MIB]
    for end in pair.ends:
        net.wait_until(lambda end=end: end.metrics().active_streams == 2, "both streams")
        metrics = end.metrics()
        assert (metrics.lane_failures, metrics.total_streams) == (5, 7)
        assert [stream.id for stream in metrics.streams] == [1, 2]
        assert sum(stream.reconnects for stream in metrics.streams) == 5


def damage(lanes: int, into: int, bit: int, *, after: int = 1) -> tuple[list[Flip], Callable[[Lane], Lane]]:
    """Flips a bit in one data frame of each of the first ``lanes`` lanes, and what wraps them."""
    flips = [Flip(matching=lambda header: header[1] == DATA, after_frames=after, into=into, bit=bit)
             for _ in range(lanes)]  # fmt: skip
    left = iter([[flip] for flip in flips])
    return flips, lambda inner: FaultyLane(inner, next(left, []))


FLIPS = {
    "payload": (HEADER_SIZE + 5000, 4),
    "version": (0, 0),
    "kind": (1, 2),
    "flags": (3, 0),
    "check": (5, 3),
    "transfer": (14, 6),
    "offset": (21, 6),
    "offset, by less than a chunk": (22, 6),
    "length": (26, 0),
    "wire length": (30, 0),
}
"""Byte of the frame, bit of the byte."""


@pytest.mark.parametrize(("into", "bit"), FLIPS.values(), ids=FLIPS.keys())
@pytest.mark.parametrize("plaintext", [False, True], ids=["encrypted", "plaintext"])
def test_a_bit_flipped_on_the_way_costs_a_lane_and_nothing_else(
    net: Any, wrap_lanes: Any, payload: bytes, into: int, bit: int, plaintext: bool
) -> None:
    (flip,), wrap = damage(1, into, bit)
    wrap_lanes(near=wrap)
    # the handshake timeout also bounds how long data for a transfer that nobody opened may wait
    pair = net.pair(streams=3, plaintext=plaintext, server={"limits__handshake_timeout": "1s"})
    sent = 0
    while not flip.struck.is_set():  # until the bad lane had its turn
        pair.near.send(payload)
        sent += 1
        assert hashlib.sha256(pair.far.recv(timeout=20)).digest() == hashlib.sha256(payload).digest()
    pair.near.flush(20)
    for end in pair.ends:
        net.wait_until(lambda end=end: end.metrics().lane_failures == 1, "the lane to be dropped")
        net.wait_until(lambda end=end: end.metrics().active_streams == 3, "another one in its place")
    assert pair.near.metrics().retransmitted_bytes > 0
    assert pair.near.error is None and pair.far.error is None


@pytest.mark.parametrize("plaintext", [False, True], ids=["encrypted", "plaintext"])
def test_damage_in_a_file_never_reaches_the_disk(
    net: Any, wrap_lanes: Any, tmp_path: Any, payload: bytes, plaintext: bool
) -> None:
    flips, wrap = damage(2, *FLIPS["payload"], after=0)
    wrap_lanes(near=wrap)
    (tmp_path / "root").mkdir()
    (tmp_path / "file").write_bytes(payload)
    pair = net.pair(streams=4, root=tmp_path / "root", plaintext=plaintext)
    round_ = 0
    while not all(flip.struck.is_set() for flip in flips):
        pair.near.send_file(tmp_path / "file", f"copy{round_}")
        assert (tmp_path / "root" / f"copy{round_}").read_bytes() == payload
        round_ += 1
    net.wait_until(lambda: pair.near.metrics().lane_failures == 2, "both lanes to be dropped")


@pytest.mark.parametrize("plaintext", [False, True], ids=["encrypted", "plaintext"])
def test_a_damaged_lane_keeps_no_memory_of_what_it_carried(
    net: Any, wrap_lanes: Any, payload: bytes, plaintext: bool
) -> None:
    """Its error is kept as the last one; the message's memory, which was in use when it was raised, is not."""
    wrap_lanes(near=damage(1, *FLIPS["payload"], after=0)[1])
    pair = net.pair(streams=2, plaintext=plaintext)
    ticket = pair.near.send(payload)
    assert pair.far.recv(timeout=20) == payload  # and dropped
    ticket.wait(20)
    net.wait_until(lambda: pair.far.metrics().lane_failures == 1, "the lane to be dropped")
    assert pair.far.metrics().last_error
    net.wait_until(lambda: pair.far.core.inbox.charged == 0, "the memory to be given back")


@pytest.mark.parametrize("plaintext", [False, True], ids=["encrypted", "plaintext"])
def test_three_damaged_lanes_end_the_session_with_an_integrity_error(
    net: Any, spawn: Any, wrap_lanes: Any, payload: bytes, plaintext: bool
) -> None:
    wrap_lanes(near=damage(4, *FLIPS["payload"], after=0)[1])
    pair = net.pair(streams=8, plaintext=plaintext)

    def receive() -> None:
        for _ in range(50):
            pair.far.recv(timeout=60)  # and drop it: the next one needs its memory

    receiving = spawn(receive)
    errors: list[AmstError] = []
    for _ in range(50):
        try:
            pair.near.send(payload).wait(60)
        except AmstError as err:
            errors.append(err)
            break
    assert [type(err) for err in errors] == [IntegrityError]
    assert type(receiving.error()) is IntegrityError
    assert type(pair.near.error) is type(pair.far.error) is IntegrityError


def test_a_lane_that_stalls_after_a_header_is_given_up(
    net: Any, wrap_lanes: Any, wrapped_lane: Any, payload: bytes
) -> None:
    stalled, released = threading.Event(), threading.Event()

    class StallingLane(wrapped_lane):  # type: ignore[misc]
        def send_frame(self, header: bytes, payload: memoryview) -> None:
            if header[1] != DATA or stalled.is_set():
                super().send_frame(header, payload)
                return
            stalled.set()
            self.inner.write([memoryview(header), payload[:1000]])
            assert released.wait(20)
            raise BrokenError("aborted while stalling")

        def abort(self) -> None:
            released.set()
            super().abort()

    wrap_lanes(near=StallingLane)
    pair = net.pair(streams=2, server={"transport__amst__read_timeout": "1s"})
    ticket = pair.near.send(payload)
    got = pair.far.recv(timeout=20)
    assert stalled.is_set()
    assert got == payload
    ticket.wait(20)
    net.wait_until(lambda: pair.far.metrics().lane_failures == 1, "the lane to be given up")


def test_a_chunk_that_comes_twice_is_received_once(
    net: Any, wrap_lanes: Any, wrapped_lane: Any, payload: bytes
) -> None:
    """Every lane sends each chunk twice, and the last one of another lane again: late, early, at the same time."""
    last: list[tuple[bytes, bytes]] = []

    class RepeatingLane(wrapped_lane):  # type: ignore[misc]
        def send_frame(self, header: bytes, payload: memoryview) -> None:
            super().send_frame(header, payload)
            if header[1] == DATA:
                super().send_frame(header, payload)
                for other in last[-2:]:
                    super().send_frame(other[0], memoryview(other[1]))
                last.append((header, bytes(payload)))

    wrap_lanes(near=RepeatingLane)
    pair = net.pair(streams=4, plaintext=True)  # sealed frames cannot be repeated: their nonce counts
    ticket = pair.near.send(payload)
    assert pair.far.recv(timeout=20) == payload
    ticket.wait(20)
    for i in range(20):
        pair.near.send(b"%d" % i)
    assert [bytes(pair.far.recv(timeout=20)) for i in range(20)] == [b"%d" % i for i in range(20)]
    assert pair.far.core.engine.bytes_verified == len(payload) + sum(len(b"%d" % i) for i in range(20))


@pytest.mark.parametrize("plaintext", [False, True], ids=["encrypted", "plaintext"])
def test_a_copy_that_was_dropped_is_asked_for_when_the_first_one_fails(
    net: Any, wrap_lanes: Any, wrapped_lane: Any, payload: bytes, plaintext: bool
) -> None:
    """A chunk is sent again on a second lane while the receiver still waits for the rest of it on the first."""
    stalled: list[bytes] = []  # the header of that chunk
    copied, over = threading.Event(), threading.Event()
    opened: list[Lane] = []

    class HalfLane(wrapped_lane):  # type: ignore[misc]
        def send_frame(self, header: bytes, payload: memoryview) -> None:
            if header[1] == DATA and not stalled:
                stalled.append(header)
                self.inner.write([memoryview(header), payload[: len(payload) // 2]])
                opened.append(self.inner)
                raise BrokenError("this side gives the lane up")
            super().send_frame(header, payload)

        def abort(self) -> None:
            if self.inner not in opened or over.is_set():
                super().abort()

    class FarLane(wrapped_lane):  # type: ignore[misc]
        last = b""

        def recv_frame(self, place: Any) -> bytes | None:
            if stalled and self.last[8:28] == stalled[0][8:28]:
                copied.set()  # the copy has been dealt with
            self.last = super().recv_frame(place) or b""
            return self.last or None

        def abort(self) -> None:
            if stalled:
                copied.wait(5)
            super().abort()

    wrap_lanes(near=HalfLane, far=FarLane)
    pair = net.pair(streams=2, plaintext=plaintext)
    try:
        ticket = pair.near.send(payload)
        assert pair.far.recv(timeout=20) == payload
        ticket.wait(20)
        assert copied.is_set()
    finally:
        over.set()
        for lane in opened:
            lane.abort()


def test_a_peer_that_pings_without_taking_the_answers_loses_the_lane(
    net: Any, wrap_lanes: Any, wrapped_lane: Any
) -> None:
    go_on = threading.Event()

    class MuteLane(wrapped_lane):  # type: ignore[misc]
        def send_frame(self, header: bytes, payload: memoryview) -> None:
            if header[1] == int(FrameKind.PONG):
                assert go_on.wait(20)
            super().send_frame(header, payload)

        def abort(self) -> None:
            go_on.set()
            super().abort()

    wrap_lanes(near=MuteLane)
    pair = net.pair(streams=2)
    worker = next(iter(pair.far.core.lanes.values()))
    with pair.far.core.lock:
        for i in range(3000):
            worker.send_frame_locked(FrameHeader(FrameKind.PING, offset=i))
    net.wait_until(lambda: pair.near.metrics().lane_failures == 1, "the lane to be dropped")
    assert pair.near.error is None
    pair.near.send(b"on the other").wait(20)
    net.wait_until(lambda: pair.near.metrics().active_streams == 2, "another one in its place")


def test_answers_that_nobody_asked_for_are_forgotten(net: Any) -> None:
    pair = net.pair(streams=1)
    (near,) = pair.near.core.lanes.values()
    (far,) = pair.far.core.lanes.values()
    with pair.far.core.lock:
        for i in range(100):
            far.send_frame_locked(FrameHeader(FrameKind.PONG, offset=i))
    assert pair.near.health_check().healthy  # behind all of them
    assert near.pings == {}


# ---- adjusting -------------------------------------------------------------------------------------


class Traffic:
    """Messages in both directions, checked, until stopped."""

    def __init__(self, pair: Any, spawn: Any, size: int = MIB) -> None:
        self._pair, self._size = pair, size
        self._stop = threading.Event()
        self.moved = 0
        self._tasks = [spawn(self._send, end, name) for end, name in ((pair.near, "n"), (pair.far, "f"))]
        self._tasks += [spawn(self._receive, end, name) for end, name in ((pair.far, "n"), (pair.near, "f"))]

    def _send(self, end: Any, channel: str) -> None:
        i = 0
        while not self._stop.is_set():
            end.send(i.to_bytes(8, "big") * (self._size // 8), channel=channel).wait(20)
            i += 1
        end.send(b"", channel=channel)

    def _receive(self, end: Any, channel: str) -> None:
        i = 0
        while got := end.recv(channel, timeout=20):
            assert got == i.to_bytes(8, "big") * (self._size // 8)
            i += 1
            self.moved += 1

    def stop(self) -> None:
        self._stop.set()
        for task in self._tasks:
            task.outcome()


@pytest.mark.parametrize("plaintext", [False, True], ids=["encrypted", "plaintext"])
def test_streams_are_added_and_removed_under_load_by_both_sides(net: Any, spawn: Any, plaintext: bool) -> None:
    pair = net.pair(streams=4, plaintext=plaintext)
    traffic = Traffic(pair, spawn)
    for end, other, count in (
        (pair.near, pair.far, 8),
        (pair.near, pair.far, 2),
        (pair.far, pair.near, 6),
        (pair.far, pair.near, 1),
        (pair.near, pair.far, 5),
    ):
        assert end.adjust_streams(count) == count
        moved = traffic.moved
        net.wait_until(lambda other=other, count=count: other.metrics().active_streams == count, "the other side")
        net.wait_until(lambda moved=moved: traffic.moved >= moved + 4, "traffic to go on")
    traffic.stop()
    for end in pair.ends:
        metrics = end.metrics()
        assert metrics.lane_failures == 0
        assert metrics.retransmitted_bytes == 0
        assert metrics.active_streams == 5
        assert metrics.total_streams == 4 + 4 + 4 + 4


def test_fewer_streams_than_are_still_coming(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`connect` returns with the first one; what was asked for then and comes later is not wanted any more."""
    from amst_tcp.transport import TcpTransport

    go_on, first = threading.Event(), threading.Lock()
    opening = TcpTransport.connect

    def late(self: TcpTransport, *args: Any) -> Lane:
        if not first.acquire(blocking=False):
            assert go_on.wait(20)
        return opening(self, *args)

    monkeypatch.setattr(TcpTransport, "connect", late)
    server = net.server()
    near = net.connect(server, streams=8, wait=False)
    assert near.metrics().active_streams == 1
    try:
        assert near.adjust_streams(1) == 1
    finally:
        go_on.set()
    net.wait_until(lambda: near.metrics().total_streams == 8, "all of them to have come")
    net.wait_until(lambda: near.metrics().active_streams == 1, "the others to leave")
    near.send(b"x").wait(20)
    assert near.adjust_streams(3) == 3
    assert near.metrics().lane_failures == 0


def test_the_same_number_again_changes_nothing(net: Any) -> None:
    pair = net.pair(streams=2)
    assert pair.near.adjust_streams(2) == pair.far.adjust_streams(2) == 2
    assert pair.near.metrics().total_streams == 2


def test_many_adjustments_at_once_from_both_sides_leave_a_working_session(net: Any, spawn: Any) -> None:
    pair = net.pair(streams=4)
    traffic = Traffic(pair, spawn, size=200_000)
    tasks = [
        spawn(lambda end=end, counts=counts: [end.adjust_streams(count) for count in counts])
        for end, counts in (
            (pair.near, (1, 6, 1, 4)),
            (pair.far, (1, 5, 2, 1)),
            (pair.near, (3, 1, 8)),
            (pair.far, (2, 1, 7)),
        )
    ]
    for task in tasks:
        task.outcome(40)
    moved = traffic.moved
    net.wait_until(lambda: traffic.moved > moved + 10, "traffic to go on")
    traffic.stop()
    assert pair.near.error is None and pair.far.error is None
    assert pair.near.adjust_streams(3) == 3
    net.wait_until(lambda: pair.far.metrics().active_streams == 3, "the other side")
    assert pair.near.metrics().lane_failures == pair.far.metrics().lane_failures == 0


def test_both_sides_shrinking_at_once_keep_the_same_lane(net: Any, spawn: Any) -> None:
    for _ in range(5):
        pair = net.pair(streams=6)
        # the order in which lanes came up differs between the sides
        pair.far.core.lanes = dict(reversed(pair.far.core.lanes.items()))
        tasks = [spawn(end.adjust_streams, 1) for end in pair.ends]
        assert [task.outcome() for task in tasks] == [1, 1]
        net.wait_until(lambda pair=pair: [len(e.core.lanes) for e in pair.ends] == [1, 1], "one lane to be left")
        pair.near.send(b"still there").wait(20)
        assert pair.far.recv(timeout=20) == b"still there"
        pair.near.close()


def test_a_lane_that_leaves_takes_nobodys_wake_up_with_it(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk wakes one idle lane; if that one is told to leave in the same moment, another must go."""
    pair = net.pair(streams=2)
    core = pair.near.core
    net.wait_until(lambda: len(core._idle) == 2, "both lanes to be idle")
    kick = core.kick_locked
    left: list[int] = []

    def kick_and_leave() -> None:
        before = list(core._idle)
        kick()
        woken = [worker for worker in before if worker not in core._idle]
        if woken and not left:
            left.append(woken[0].id)
            woken[0].leave_locked()

    monkeypatch.setattr(core, "kick_locked", kick_and_leave)
    pair.near.send(b"through").wait(5)
    assert left
    assert pair.far.recv(timeout=5) == b"through"


def test_chunks_of_a_lane_that_had_left_here_and_broke_there_are_sent_again(
    net: Any, wrap_lanes: Any, wrapped_lane: Any, payload: bytes
) -> None:
    """The client ends a lane; the server's FIN is sent, but the path breaks before the client has read it all."""
    held, go_on = threading.Event(), threading.Event()
    deaf: list[Any] = []

    class DeafLane(wrapped_lane):  # type: ignore[misc]
        def recv_frame(self, place: Any) -> bytes | None:
            def placing(header: memoryview) -> Any:
                if header[1] == DATA and not deaf:
                    deaf.append(self)
                    held.set()
                    assert go_on.wait(20)
                    self.inner.abort()
                return place(header)

            return super().recv_frame(placing)  # type: ignore[no-any-return]

    wrap_lanes(near=DeafLane)
    # so little that all of it fits between the two kernels
    pair = net.pair(streams=2, server={"transport__amst__chunk_size_kb": 16})
    data = payload[: 256 * 1024]
    ticket = pair.far.send(data)
    assert held.wait(20)
    with pair.near.core.lock:
        next(w for w in pair.near.core.lanes.values() if w.lane is deaf[0]).leave_locked()
    net.wait_until(lambda: len(pair.far.core.lanes) == 1, "the server to have ended its side")
    go_on.set()
    assert pair.near.recv(timeout=20) == data
    ticket.wait(20)


@pytest.mark.parametrize("count", [0, -1, 9])
def test_a_number_of_streams_out_of_bounds_is_refused(net: Any, count: int) -> None:
    pair = net.pair(client={"transport__amst__max_streams": 8})
    with pytest.raises(UsageError, match="max_streams"):
        pair.near.adjust_streams(count)
    assert pair.near.metrics().active_streams == 2


@pytest.fixture
def many_files() -> Iterator[None]:
    """As many descriptors as this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if 0 <= hard < 3000:
        pytest.skip(f"512 streams, both ends, need 3000 descriptors; this process may have {hard}")
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("streams", [1, 64, pytest.param(512, marks=pytest.mark.alone)])
@pytest.mark.parametrize("plaintext", [False, True], ids=["encrypted", "plaintext"])
def test_any_number_of_streams(net: Any, many_files: None, payload: bytes, streams: int, plaintext: bool) -> None:
    limits: dict[str, object] = {"transport__amst__max_streams": 512}
    pair = net.pair(streams=streams, plaintext=plaintext, server=limits, client=limits)
    for here, there in (pair.ends, pair.ends[::-1]):
        ticket = here.send(payload)
        assert there.recv(timeout=30) == payload
        ticket.wait(20)
    metrics = pair.near.metrics()
    assert (metrics.active_streams, metrics.lane_failures) == (streams, 0)
    assert len(metrics.streams) == streams
