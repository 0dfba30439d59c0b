"""Streams that die come back under their numbers; stuck ones are told from idle and from busy ones, and replaced."""

from __future__ import annotations

import logging
import os
import re
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import amst_core
from amst_core.errors import ConnectError
from amst_core.files.sink import FileSink
from amst_core.interfaces import Lane
from amst_core.session import lane_opener
from amst_core.session.backoff import FIRST_S, MOST_S, pause_s
from amst_core.wire.frames import FrameKind
from amst_core.wire.messages import LaneLost

pytestmark = pytest.mark.needs_transport

MIB = 1 << 20
DATA = int(FrameKind.DATA)
QUICK = {"transport__amst__health_check_interval": "300ms"}
"""The interval of health checks, and so the patience with a path on which nothing moves."""


@pytest.fixture(scope="module")
def payload() -> bytes:
    return os.urandom(64 * MIB)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    path.mkdir()
    return path


# ---- killed and replaced --------------------------------------------------------------------------


@pytest.mark.parametrize("plaintext", [False, True], ids=["encrypted", "plaintext"])
@pytest.mark.parametrize("side", ["near", "far"])
def test_every_stream_killed_again_and_again(
    net: Any,
    spawn: Any,
    root: Path,
    tmp_path: Path,
    payload: bytes,
    caplog: pytest.LogCaptureFixture,
    plaintext: bool,
    side: str,
) -> None:
    caplog.set_level(logging.INFO, "amst.session")
    (tmp_path / "file").write_bytes(payload)
    pair = net.pair(streams=3, root=root, plaintext=plaintext)
    engine = pair.far.core.engine
    pair.near.limit_rate(200 * MIB)  # so that each round comes before the end
    copying = spawn(pair.near.send_file, tmp_path / "file", "copy")
    killed: set[int] = set()  # one may be met twice before its end is noticed
    for round_ in range(1, 6):
        net.wait_until(lambda n=round_: engine.bytes_verified > 8 * n * MIB or not copying.running, "8 MiB more")
        for worker in list(getattr(pair, side).core.lanes.values()):
            worker.lane.abort()
            killed.add(worker.id)
    copying.outcome()
    assert len(killed) >= 3, "nothing was killed in the middle"
    assert (root / "copy").read_bytes() == payload
    for end in pair.ends:
        net.wait_until(lambda end=end: end.metrics().active_streams == 3, "all streams to be back")
        # one that is killed while it is admitted exists on one side only
        least = len(killed) if end is getattr(pair, side) else 0
        net.wait_until(lambda end=end, least=least: end.core.lane_failures >= least, "the count")
        metrics = end.metrics()
        assert [stream.id for stream in metrics.streams] == [1, 2, 3]
        assert sum(stream.reconnects for stream in metrics.streams) == metrics.total_streams - 3
        assert metrics.total_streams - 3 == metrics.lane_failures
        assert all(stream.last_error for stream in metrics.streams if stream.reconnects)
    assert pair.near.error is None
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if re.match(r"stream [123] \(tcp .*\) to .* failed: ", line)]
    assert [line for line in said if re.match(r"stream [123] to .* is back over tcp ", line)]


def test_replaced_lanes_keep_the_numbers_right(net: Any, payload: bytes) -> None:
    pair = net.pair(streams=3)
    for round_ in range(1, 5):
        pair.near.send(payload[: 4 * MIB]).wait(20)
        pair.far.recv(timeout=20)
        # it may have come before the thread that sent it has counted it
        net.wait_until(lambda n=round_: pair.near.metrics().bytes_sent == 4 * MIB * n, "all of it to be counted")
        for worker in list(pair.near.core.lanes.values())[:2]:
            worker.lane.abort()
        for end in pair.ends:
            net.wait_until(lambda end=end, n=round_: end.metrics().total_streams == 3 + 2 * n, "two new lanes")
    for end in pair.ends:
        net.wait_until(lambda end=end: end.metrics().active_streams == 3, "three streams")
        report = end.health_check()
        assert report.healthy and set(report.round_trips_s) == {1, 2, 3}
        metrics = end.metrics()
        assert [stream.id for stream in metrics.streams] == [1, 2, 3]
        assert all(stream.healthy for stream in metrics.streams)
        assert sum(stream.reconnects for stream in metrics.streams) == metrics.lane_failures == 8
        assert sum(stream.bytes_sent for stream in metrics.streams) == metrics.bytes_sent
        assert sum(stream.bytes_received for stream in metrics.streams) == metrics.bytes_received
    assert pair.near.metrics().bytes_sent == pair.far.metrics().bytes_received == 16 * MIB


def test_failures_in_a_row_are_counted_and_forgotten_after_a_second_of_life(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = net.pair(streams=1)
    for round_ in range(1, 4):
        (worker,) = pair.near.core.lanes.values()
        worker.joined_at = worker.joined_at + 3600  # it has not lived for a second
        worker.lane.abort()
        net.wait_until(lambda n=round_: pair.near.metrics().total_streams == 1 + n, "another lane")
    (stream,) = pair.near.metrics().streams
    assert (stream.reconnects, stream.consecutive_failures) == (3, 3)
    net.wait_until(lambda: pair.near.metrics().streams[0].consecutive_failures == 0, "it to have settled")


# ---- asking for another one -----------------------------------------------------------------------


@pytest.mark.parametrize("attempt", [*range(12), 1000])
def test_pauses_double_with_jitter_up_to_a_second(attempt: int) -> None:
    middle = min(MOST_S, FIRST_S * 2**attempt)
    pauses = [pause_s(attempt) for _ in range(300)]
    assert all(middle * 0.5 <= pause <= middle * 1.5 for pause in pauses)
    assert max(pauses) - min(pauses) > middle / 2, "many that fail together must not return together"
    assert (FIRST_S, MOST_S) == (0.02, 1.0)


class Refusing:
    """While it is on, no lane can be opened; ``pauses`` are the attempts for which the opener was told to wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from amst_tcp.transport import TcpTransport

        self.on = False
        self.refused = 0
        self.pauses: list[int] = []
        connect = TcpTransport.connect

        def connecting(transport: TcpTransport, *args: Any) -> Lane:
            if self.on:
                self.refused += 1
                raise ConnectError("no way through")
            return connect(transport, *args)

        def pausing(attempt: int) -> float:
            self.pauses.append(attempt)
            return 0.01

        monkeypatch.setattr(TcpTransport, "connect", connecting)
        monkeypatch.setattr(lane_opener, "pause_s", pausing)


def test_each_failure_in_a_row_waits_longer_and_nobody_gives_up(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = Refusing(monkeypatch)
    pair = net.pair(streams=2)
    refusing.on = True
    victim = next(iter(pair.near.core.lanes.values()))
    victim.lane.abort()
    net.wait_until(lambda: refusing.refused >= 8, "it to be tried again and again")
    assert refusing.pauses[:8] == list(range(refusing.pauses[0], refusing.pauses[0] + 8))
    assert pair.near.metrics().healthy and pair.near.metrics().active_streams == 1
    pair.near.send(b"over the other one").wait(20)
    refusing.on = False
    net.wait_until(lambda: all(end.metrics().active_streams == 2 for end in pair.ends), "both streams")
    assert [stream.id for stream in pair.near.metrics().streams] == [1, 2]


def test_grants_that_are_not_used_are_given_back(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = Refusing(monkeypatch)
    pair = net.pair(streams=3)
    net.wait_until(lambda: not pair.server._grants, "the grants of the first lanes to be used")
    refusing.on = True
    for worker in list(pair.near.core.lanes.values())[:2]:
        worker.lane.abort()
    net.wait_until(lambda: refusing.refused >= 6, "attempts to fail")
    pair.near.adjust_streams(1)  # from here on none is missed
    net.wait_until(lambda: not pair.server._grants, "every grant to be back")
    refusing.on = False
    net.wait_until(lambda: pair.near.adjust_streams(3) == 3, "as many as before")
    net.wait_until(lambda: not pair.server._grants, "every grant to be used")


def test_nobody_gives_back_the_grants_of_another_session(net: Any, wrap_lanes: Any, wrapped_lane: Any) -> None:
    from amst_tcp.transport import TcpTransport

    pair = net.pair(streams=1)
    go_on = threading.Event()
    connect = TcpTransport.connect

    def slow(transport: TcpTransport, *args: Any) -> Lane:
        assert go_on.wait(20)
        return connect(transport, *args)

    stranger = net.connect(pair.server, streams=1)
    net.wait_until(lambda: not pair.server._grants, "the grants of the first lanes to be used")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TcpTransport, "connect", slow)
        try:
            assert pair.near.opener is not None
            pair.near.opener.ask(1, "tcp")
            net.wait_until(lambda: len(pair.server._grants) == 1, "a grant")
            (incarnation,) = pair.server._grants
            stranger.core.tell(LaneLost(incarnation, "broken", "not mine to give back"))
            stranger.send(b"behind it").wait(20)
            assert list(pair.server._grants) == [incarnation]
        finally:
            go_on.set()
    net.wait_until(lambda: pair.far.metrics().active_streams == 2, "the lane to come all the same")


# ---- idle, busy, stuck ----------------------------------------------------------------------------


def test_an_idle_lane_is_asked_and_left_alone(net: Any) -> None:
    pair = net.pair(streams=3, server=QUICK, client=QUICK)
    before = [dict(end.core.lanes) for end in pair.ends]
    heard = [worker.heard_at for lanes in before for worker in lanes.values()]
    net.stays(
        lambda: [dict(end.core.lanes) for end in pair.ends] == before, "an idle lane was replaced", for_s=2.0
    )
    assert all(now.heard_at > then for now, then in zip(
        [worker for lanes in before for worker in lanes.values()], heard, strict=True)), "none was asked"  # fmt: skip
    for end in pair.ends:
        assert end.metrics().lane_failures == 0
        assert end.metrics().last_health_check is not None
        assert all(stream.healthy for stream in end.metrics().streams)


def test_a_lane_in_the_middle_of_a_slow_frame_is_left_alone(
    net: Any, wrap_lanes: Any, wrapped_lane: Any, payload: bytes
) -> None:
    class SlowLane(wrapped_lane):  # type: ignore[misc]
        def send_frame(self, header: bytes, payload: memoryview) -> None:
            if header[1] != DATA:
                super().send_frame(header, payload)
                return
            self.inner.write([memoryview(header)])
            step = -(-payload.nbytes // 20)
            for at in range(0, payload.nbytes, step):
                threading.Event().wait(0.1)
                self.inner.write([payload[at : at + step]])

    wrap_lanes(near=SlowLane)
    pair = net.pair(streams=1, server=QUICK, client=QUICK)
    ticket = pair.near.send(payload[:MIB])
    assert pair.far.recv(timeout=20) == payload[:MIB]
    ticket.wait(20)
    for end in pair.ends:
        assert (end.metrics().lane_failures, end.metrics().total_streams) == (0, 1)


def test_a_lane_whose_receiver_waits_for_its_disk_is_left_alone(
    net: Any, root: Path, tmp_path: Path, payload: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its window is closed and nothing moves, for longer than a dead path is given; but the path is not dead."""
    write = FileSink.write

    def slow(sink: FileSink, *args: Any) -> None:
        threading.Event().wait(0.8)
        write(sink, *args)

    monkeypatch.setattr(FileSink, "write", slow)
    (tmp_path / "file").write_bytes(payload[: 24 * MIB])
    large = {**QUICK, "transport__amst__chunk_size_kb": 4096}  # more than what fits between the two kernels
    pair = net.pair(streams=1, root=root, server=large, client=large)
    pair.near.send_file(tmp_path / "file", "copy")
    assert (root / "copy").read_bytes() == payload[: 24 * MIB]
    for end in pair.ends:
        assert (end.metrics().lane_failures, end.metrics().total_streams) == (0, 1)


class Proxy:
    """Forwards TCP connections to a server until told to `stop_forwarding` some: then they stay up, and say nothing."""

    def __init__(self, server: str) -> None:
        host, _, port = server.rpartition(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._links: list[tuple[socket.socket, socket.socket]] = []
        self._stopped: set[int] = set()
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def stop_forwarding(self, lane: Lane) -> None:
        """The connection of ``lane``, the client's, is dead from now on, and nobody is told."""
        port = int(lane.description.partition(" -> ")[0].rpartition(":")[2])
        (at,) = [i for i, (near, _) in enumerate(self._links) if near.getpeername()[1] == port]
        self._stopped.add(at)

    def close(self) -> None:
        self._ended.set()
        for sock in (self._listener, *(sock for link in self._links for sock in link)):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has ended
        for thread in self._threads:
            thread.join(10)
        for sock in (self._listener, *(sock for link in self._links for sock in link)):
            sock.close()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self._links.append((near, socket.create_connection(self._server)))
            thread = threading.Thread(target=self._forward, args=(len(self._links) - 1,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _forward(self, at: int) -> None:
        near, far = self._links[at]
        poll = select.poll()
        poll.register(near, select.POLLIN)
        poll.register(far, select.POLLIN)
        while not self._ended.is_set():
            if at in self._stopped:
                self._ended.wait(0.05)
                continue
            for fd, _ in poll.poll(50):
                here, there = (near, far) if fd == near.fileno() else (far, near)
                try:
                    data = here.recv(1 << 16)
                    if not data:
                        raise ConnectionResetError
                    there.sendall(data)
                except OSError:
                    for sock in (near, far):
                        try:
                            sock.shutdown(socket.SHUT_RDWR)
                        except OSError:
                            pass  # it has ended
                    return


@pytest.fixture
def proxied(net: Any) -> Iterator[Callable[..., Any]]:
    """Makes a server, a proxy before it, and a session through that."""
    with ExitStack() as stack:

        def make(*, streams: int, root: Path | None = None, **overrides: object) -> Any:
            server = net.server(root=root, **overrides)
            proxy = Proxy(server.address)
            stack.callback(proxy.close)
            settings = net.settings({key.replace("__", "."): value for key, value in overrides.items()})
            near = amst_core.connect(proxy.address, settings=settings, token=server.token, streams=streams)
            stack.callback(near.abort)
            far = server.accept(20)
            net.wait_until(lambda: len(near.core.lanes) == len(far.core.lanes) == streams, "every stream")
            return proxy, near, far

        yield make


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_a_lane_that_nobody_answers_is_replaced(
    net: Any, spawn: Any, proxied: Any, root: Path, tmp_path: Path, payload: bytes, busy: bool
) -> None:
    """Between the two something takes every byte, or its window is full: nothing of TCP tells that it is dead."""
    stuck = {**QUICK, "transport__amst__read_timeout": "1s"}
    proxy, near, far = proxied(streams=3, root=root, **stuck)
    (tmp_path / "file").write_bytes(payload)
    victim = next(iter(near.core.lanes.values()))
    if busy:
        near.limit_rate(50 * MIB)
        task = spawn(near.send_file, tmp_path / "file", "copy")
        net.wait_until(lambda: far.core.engine.bytes_verified > 8 * MIB, "some to arrive")
    proxy.stop_forwarding(victim.lane)
    net.wait_until(lambda: victim.dead, "it to be given up")
    net.wait_until(lambda: near.metrics().active_streams == far.metrics().active_streams == 3, "another one")
    if busy:
        task.outcome()
        assert (root / "copy").read_bytes() == payload
    (stream,) = [stream for stream in near.metrics().streams if stream.reconnects]
    assert stream.id == victim.stream.id
    for end in (near, far):
        assert (end.metrics().lane_failures, end.metrics().total_streams) == (1, 4)


# ---- the tail -------------------------------------------------------------------------------------


class Tail:
    """Has one lane stall in the middle of the last chunk of a transfer of ``size`` bytes, until it is aborted."""

    def __init__(self, wrapped_lane: Any, size: int, where: str) -> None:
        self._wrapped_lane = wrapped_lane
        self._size = size
        self._where = where
        self._once = threading.Lock()
        self.stalled = threading.Event()
        self.released = threading.Event()
        self.over = threading.Event()

    def _is_last(self, header: bytes | memoryview) -> bool:
        end = int.from_bytes(header[16:24], "big") + int.from_bytes(header[24:28], "big")
        return header[1] == DATA and end == self._size and self._once.acquire(blocking=False)

    def wrap(self, inner: Lane) -> Lane:
        tail = self

        class StallingLane(self._wrapped_lane):  # type: ignore[misc,name-defined]
            stalls = False

            def send_frame(self, header: bytes, payload: memoryview) -> None:
                if tail._where != "receiving" and tail._is_last(header):
                    if tail._where == "sending":
                        self.inner.write([memoryview(header), payload[: payload.nbytes // 2]])
                    self.stall()
                super().send_frame(header, payload)

            def recv_frame(self, place: Any) -> bytes | None:
                def placing(header: memoryview) -> Any:
                    view = place(header)
                    if tail._where == "receiving" and tail._is_last(header):
                        self.stall()
                    return view

                return super().recv_frame(placing)  # type: ignore[no-any-return]

            def stall(self) -> None:
                self.stalls = True
                tail.stalled.set()
                assert tail.over.wait(20)
                tail.released.set()

            def abort(self) -> None:
                if self.stalls:
                    tail.over.set()
                super().abort()

        return StallingLane(inner)


@pytest.mark.parametrize("where", ["before sending", "sending", "receiving"])
@pytest.mark.parametrize("plaintext", [False, True], ids=["encrypted", "plaintext"])
@pytest.mark.parametrize("what", ["message", "file"])
def test_the_end_of_a_transfer_does_not_wait_for_a_stalled_lane(
    net: Any,
    wrap_lanes: Any,
    wrapped_lane: Any,
    root: Path,
    tmp_path: Path,
    payload: bytes,
    what: str,
    plaintext: bool,
    where: str,
) -> None:
    data = payload[: 12 * MIB]
    tail = Tail(wrapped_lane, len(data), where)
    wrap_lanes(**{"far" if where == "receiving" else "near": tail.wrap})
    pair = net.pair(streams=4, root=root, plaintext=plaintext)
    try:
        if what == "message":
            ticket = pair.near.send(data)
            assert pair.far.recv(timeout=15) == data
            ticket.wait(15)
        else:
            (tmp_path / "file").write_bytes(data)
            pair.near.send_file(tmp_path / "file", "copy")
            assert (root / "copy").read_bytes() == data
        assert tail.stalled.is_set()
        in_place = what == "message" and plaintext
        # a lane that sends from the message itself, or writes to it, must go first; all others are simply overtaken
        assert in_place or not tail.released.is_set(), "it waited for the lane to be given up"
        assert pair.near.metrics().retransmitted_bytes > 0
    finally:
        tail.over.set()
    assert pair.near.error is None and pair.far.error is None
