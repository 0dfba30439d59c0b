"""Everything at once from many threads, and the end in the middle of anything."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from amst_core.errors import AmstError, BrokenError, ClosedError, DeadlineError, IntegrityError, ProtocolError

pytestmark = pytest.mark.needs_transport

MIB = 1 << 20


@pytest.fixture
def frantic() -> Iterator[None]:
    """Threads are switched as often as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_every_method_from_many_threads_at_once(net: Any, spawn: Any, frantic: None, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "file").write_bytes(os.urandom(300_000))
    pair = net.pair(streams=3, root=tmp_path / "root")
    stop = threading.Event()
    sent: list[bytes] = []
    received: list[bytes] = []

    def repeat(act: Callable[[int], object]) -> Any:
        def run() -> int:
            i = 0
            while not stop.is_set():
                act(i)
                i += 1
            return i

        return spawn(run)

    def send(i: int) -> None:
        body = os.urandom(8) + bytes(i % 3 * 100_000)
        pair.near.send(body if i % 2 else bytearray(body)).wait(20)
        sent.append(body[:8])

    def receive() -> None:
        while got := bytes(pair.far.recv(timeout=20)):
            received.append(got[:8])

    def copy(i: int) -> None:
        pair.near.send_file(tmp_path / "file", f"f{i % 3}")
        pair.near.recv_file(f"f{i % 3}", tmp_path / f"back{i % 3}")

    tasks = [repeat(send) for _ in range(3)]
    tasks += [repeat(lambda i: pair.near.metrics()), repeat(lambda i: pair.far.metrics())]
    tasks += [repeat(lambda i: pair.near.health_check(20)), repeat(lambda i: pair.far.health_check(20))]
    tasks += [repeat(lambda i: pair.near.adjust_streams(1 + i % 5)), repeat(lambda i: pair.near.flush(20))]
    tasks += [repeat(copy), repeat(lambda i: pair.near.stat("f0"))]
    receiver = spawn(receive)
    time.sleep(2.0)
    stop.set()
    counts = [task.outcome(30) for task in tasks]
    assert all(counts), counts
    pair.near.send(b"").wait(20)
    receiver.outcome()
    assert sorted(received) == sorted(sent)
    assert pair.near.error is None and pair.far.error is None
    assert pair.near.metrics().lane_failures == pair.far.metrics().lane_failures == 0


@pytest.mark.parametrize("end", ["close", "abort", "peer closes", "peer aborts"])
def test_the_end_in_the_middle_of_everything(net: Any, spawn: Any, frantic: None, end: str) -> None:
    pair = net.pair(streams=3)
    delivered: list[int] = []
    received: list[int] = []

    def repeat(act: Callable[[int], object]) -> Any:
        def run() -> None:
            i = 0
            while True:
                act(i)
                i += 1

        return spawn(run)

    def send(base: int) -> Callable[[int], None]:
        def act(i: int) -> None:
            number = base + i
            ticket = pair.near.send(number.to_bytes(8, "big") * 10_000)
            ticket.add_done_callback(lambda t: delivered.append(number) if t.error is None else None)

        return act

    tasks = [repeat(send(base)) for base in (0, 1 << 32)]
    tasks += [
        repeat(lambda i: received.append(int.from_bytes(pair.far.recv()[:8], "big"))),
        repeat(lambda i: pair.near.recv()),
        repeat(lambda i: pair.near.health_check()),
        repeat(lambda i: pair.near.adjust_streams(1 + i % 3)),
    ]
    net.wait_until(lambda: len(received) > 20, "traffic")
    started = time.monotonic()
    match end:
        case "close":
            closers = [spawn(pair.near.close) for _ in range(3)]
            for closer in closers:
                assert closer.error(40) is None
        case "abort":
            pair.near.abort()
        case "peer closes":
            pair.far.close()
        case "peer aborts":
            pair.far.abort()
    for task in tasks:
        error = task.error()
        assert error is None or isinstance(error, ClosedError), repr(error)
    assert time.monotonic() - started < 15
    assert pair.near.wait_closed(10) and pair.far.wait_closed(10)
    # what was told to be delivered was received, and nothing twice
    net.wait_until(lambda: not pair.near.core.unfinished(), "every ticket to have its answer")
    while True:
        try:
            received.append(int.from_bytes(pair.far.recv(timeout=0)[:8], "big"))
        except AmstError:
            break
    assert len(set(received)) == len(received)
    assert set(delivered) <= set(received)


def test_close_delivers_what_was_sent_before(net: Any, spawn: Any) -> None:
    pair = net.pair()
    tickets = [pair.near.send(bytes([i]) * MIB) for i in range(30)]
    receiving = spawn(lambda: [pair.far.recv(timeout=20)[0] for _ in range(30)])
    pair.near.close()
    assert receiving.outcome() == list(range(30))
    assert all(ticket.done and ticket.error is None for ticket in tickets)
    pair.near.close()  # again: nothing


def test_close_gives_up_in_time_and_says_what_was_not_delivered(net: Any) -> None:
    pair = net.pair(server={"limits__memory": "32MiB"})
    for _ in range(6):
        pair.near.send(bytes(4 * MIB))
    with pytest.raises(DeadlineError, match=r"\d transfers \(\d+ bytes\) not delivered"):
        pair.near.close(0.2)
    assert isinstance(pair.near.error, ClosedError)


def blocked_send(session: Any) -> None:
    while True:
        session.send(bytes(MIB))


def blocked_copy(session: Any) -> None:
    while True:
        session.send(bytearray(MIB))


BLOCKED = {
    "send": blocked_send,
    "send a copy": blocked_copy,
    "recv": lambda s: s.recv(),
    "flush": lambda s: (s.send(bytes(8 * MIB)), s.send(bytes(8 * MIB)), s.flush()),
    "ticket": lambda s: (s.send(bytes(8 * MIB)), s.send(bytes(8 * MIB)).wait()),
    "stat": lambda s: s.stat("x", timeout=None),
    "recv_file": lambda s: s.recv_file("x", "/tmp/never written by this test"),
    "adjust_streams": lambda s: s.adjust_streams(9),
    "health_check": lambda s: s.health_check(60),
}


@pytest.mark.parametrize("by", ["near", "far"])
@pytest.mark.parametrize("call", BLOCKED.values(), ids=BLOCKED.keys())
def test_abort_wakes_whatever_is_blocked(
    net: Any, spawn: Any, monkeypatch: pytest.MonkeyPatch, call: Callable[[Any], object], by: str
) -> None:
    pair = net.pair(server={"limits__memory": "32MiB", "limits__open_transfers": 8})
    # the server takes requests, pings and wishes for streams, and never answers
    pair.far._service.handle = lambda request: None
    pair.far._on_lane_request = lambda session, request: None
    for worker in pair.far.core.lanes.values():
        worker._own_frame = lambda header, payload: None
    task = spawn(call, pair.near)
    task.join(0.3)
    assert task.running, f"{call} is to block here"
    started = time.monotonic()
    getattr(pair, by).abort()
    error = task.error()
    if call is BLOCKED["health_check"]:
        assert error is None or isinstance(error, ClosedError)
    else:
        assert isinstance(error, ClosedError), repr(error)
    assert time.monotonic() - started < 5


def test_the_peer_is_told_of_an_abort(net: Any) -> None:
    for _ in range(5):
        pair = net.pair(streams=4)
        pair.near.send(bytes(4 * MIB))
        pair.near.abort()
        assert pair.far.wait_closed(10)
        assert isinstance(pair.far.error, ClosedError), repr(pair.far.error)


@pytest.mark.parametrize("error", [BrokenError, IntegrityError, ProtocolError])
def test_the_peer_is_told_why(net: Any, error: type[AmstError]) -> None:
    pair = net.pair(streams=4)
    pair.near.core.fail(error("because"))
    assert pair.far.wait_closed(10)
    assert type(pair.far.error) is error
    assert "because" in str(pair.far.error)


def test_after_the_end_every_call_says_so(net: Any, tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    pair = net.pair()
    ticket = pair.near.send(b"x")
    pair.far.recv(timeout=20)
    ticket.wait(20)
    pair.near.close()
    assert pair.far.wait_closed(10)
    calls: list[Callable[[Any], object]] = [
        lambda s: s.send(b"x"),
        lambda s: s.send(bytearray(b"x")),
        lambda s: s.recv(timeout=1),
        lambda s: s.send_file(tmp_path / "f", "g"),
        lambda s: s.recv_file("f", tmp_path / "g"),
        lambda s: s.stat("f"),
        lambda s: s.adjust_streams(3),
        lambda s: s.health_check(1),
    ]
    for end in pair.ends:
        for call in calls:
            with pytest.raises(ClosedError):
                call(end)
        end.flush(1)
        end.close()
        end.abort()
        assert end.wait_closed(0)
    ticket.cancel()  # too late, and no error


def test_a_context_closes_or_aborts(net: Any) -> None:
    server = net.server()
    with net.connect(server) as session:
        session.send(b"x").wait(20)
    assert isinstance(session.error, ClosedError)
    with pytest.raises(ValueError, match="mine"), net.connect(server) as session:
        raise ValueError("mine")
    assert "abort" in str(session.error)


def test_sessions_come_and_go(net: Any, spawn: Any, frantic: None) -> None:
    server = net.server(on_session=lambda session: session.send(bytes(session.recv(timeout=20))).wait(20))

    def one(i: int) -> None:
        with net.connect(server, streams=1 + i % 3, wait=False) as session:
            session.send(b"%d" % i * 1000)
            assert session.recv(timeout=20) == b"%d" % i * 1000

    for batch in range(3):
        for task in [spawn(one, batch * 8 + i) for i in range(8)]:
            task.outcome(30)
    net.wait_until(lambda: not server.sessions, "every session to be gone")
