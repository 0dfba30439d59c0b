"""The control connection fails at a message of each kind, on its way or just after; or it stalls and does not fail."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from amst_core.api import redial
from amst_core.control.channel import ControlChannel
from amst_core.errors import BrokenError, CancelledError
from amst_core.session import core as session_core
from amst_core.wire import messages as m

pytestmark = pytest.mark.needs_transport

MIB = 1 << 20
LONG = {"limits__session_timeout": "30s"}


class Cutter:
    """Breaks the control connection at the n-th message of a kind, whoever sends it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._lock = threading.Lock()
        self._kind: type[Any] | None = None
        self._left = 0
        self._arrives = False
        self.done = threading.Event()
        send = ControlChannel.send

        def sending(channel: ControlChannel, message: m.Message) -> int:
            size = send(channel, message)
            if self._is_it(message):
                if self._arrives:
                    channel.flush()
                else:
                    channel._plain.clear()  # and with it what was to go in the same breath
                with contextlib.suppress(OSError):  # the other side was cut in the same moment, and is gone
                    channel._sock.shutdown(socket.SHUT_WR if self._arrives else socket.SHUT_RDWR)
                self.done.set()
            return size

        monkeypatch.setattr(ControlChannel, "send", sending)

    def arm(self, kind: type[Any], nth: int, *, arrives: bool) -> None:
        with self._lock:
            self._kind, self._left, self._arrives = kind, nth, arrives

    def _is_it(self, message: m.Message) -> bool:
        with self._lock:
            if self._kind is None or type(message) is not self._kind:
                return False
            self._left -= 1
            if self._left:
                return False
            self._kind = None
            return True


@pytest.fixture
def cutter(monkeypatch: pytest.MonkeyPatch) -> Cutter:
    return Cutter(monkeypatch)


def exchange(pair: Any, message: bytes) -> None:
    """The message there and back."""
    for here, there in (pair.ends, pair.ends[::-1]):
        ticket = here.send(message)
        assert there.recv(timeout=20) == message
        ticket.wait(20)


def everything(net: Any, pair: Any, tmp_path: Path, tree: dict[str, bytes]) -> None:
    """A bit of all that travels on a control channel."""
    for number in range(5):
        exchange(pair, b"%d" % number * 50_000)
    exchange(pair, bytes(24 * MIB))
    for _ in range(2):  # the second time it is there already, and compared
        pair.near.send_file(tmp_path / "tree", "copy")
    pair.near.recv_file("copy", tmp_path / "back")
    pair.near.recv_file("copy", tmp_path / "back")
    for top in (tmp_path / "root" / "copy", tmp_path / "back"):
        assert {path.name: path.read_bytes() for path in top.iterdir()} == tree
    assert pair.near.stat("copy/1").size == len(tree["1"])
    assert pair.near.adjust_streams(4) == 4
    next(iter(pair.near.core.lanes.values())).lane.abort()
    net.wait_until(lambda: all(end.metrics().total_streams == 5 for end in pair.ends), "another lane in its place")
    cancelled = pair.near.send(bytes(8 * MIB), channel="nobody reads it")
    cancelled.cancel()
    with pytest.raises(CancelledError):
        cancelled.wait(20)
    assert pair.near.adjust_streams(2) == 2


@pytest.mark.parametrize("arrives", [False, True], ids=["on its way", "just after"])
@pytest.mark.parametrize(
    ("kind", "nth"),
    [
        (m.Open, 1),
        (m.Open, 12),
        (m.End, 1),
        (m.End, 8),
        (m.Result, 1),
        (m.Result, 15),
        (m.Opened, 1),
        (m.Same, 1),
        (m.Same, 2),
        (m.Request, 1),
        (m.Reply, 1),
        (m.Reply, 3),
        (m.LaneRequest, 1),
        (m.LaneGrant, 1),
        (m.LaneGrant, 2),
        (m.LaneLost, 1),
        (m.Reset, 1),
        (m.Ack, 1),
        (m.Ack, 4),
        (m.Credit, 2),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
def test_it_breaks_at_a_message(
    net: Any, tmp_path: Path, cutter: Cutter, kind: type[Any], nth: int, arrives: bool
) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "tree").mkdir()
    tree = {str(number): os.urandom(number * 300_000) for number in range(4)}
    for name, content in tree.items():
        (tmp_path / "tree" / name).write_bytes(content)
    pair = net.pair(streams=2, root=tmp_path / "root", server=LONG, client=LONG)
    cutter.arm(kind, nth, arrives=arrives)
    everything(net, pair, tmp_path, tree)
    while not cutter.done.is_set():  # how many acknowledgements it takes is the scheduler's choice
        exchange(pair, bytes(24 * MIB))
    net.wait_until(lambda: pair.far.epoch >= 1, "another connection")
    for end in pair.ends:
        net.wait_until(lambda end=end: end.core.control_up, "it to be taken up")
        net.wait_until(lambda end=end: not end.core.engine.receiving, "what was cancelled to be forgotten")
    for end in pair.ends:
        assert end.error is None
        assert not end.core.engine.sending
    assert not list(tmp_path.rglob(".amst-*"))


def test_it_breaks_at_every_nth_message_while_many_threads_send(net: Any, spawn: Any, cutter: Cutter) -> None:
    """Whatever kind it is; and again as soon as it is back."""
    pair = net.pair(streams=3, server=LONG, client=LONG)
    stop = threading.Event()

    def cut_on() -> None:
        kinds = (m.Open, m.End, m.Result, m.Ack)
        at = 0
        while not stop.wait(0.01):
            cutter.arm(kinds[at % 4], 1 + at % 7, arrives=at % 3 == 0)
            cutter.done.wait(1.0)
            cutter.done.clear()
            at += 1

    def talk(channel: str) -> list[int]:
        tickets = []
        got = []
        for number in range(25):
            tickets.append(pair.near.send(number.to_bytes(4, "big") * 5000, channel=channel))
            got.append(int.from_bytes(pair.far.recv(channel, timeout=30)[:4], "big"))
        for ticket in tickets:
            ticket.wait(30)
        return got

    cutting = spawn(cut_on)
    talks = [spawn(talk, f"channel {number}") for number in range(16)]
    for task in talks:
        assert task.outcome(90) == list(range(25))
    stop.set()
    cutting.outcome()
    assert pair.far.epoch >= 3
    assert pair.near.core.engine.delivery().delivered == ((1, 16 * 25 + 1),)


def test_others_are_served_meanwhile(net: Any, spawn: Any, cutter: Cutter) -> None:
    pair = net.pair(streams=2, server=LONG, client=LONG)
    other = net.connect(pair.server, streams=2)
    far = pair.server.accept(20)
    for number in range(10):
        cutter.done.clear()
        cutter.arm(m.Open, 1, arrives=False)
        ticket = pair.near.send(b"broken")
        assert cutter.done.wait(20)
        other.send(b"%d" % number).wait(20)
        assert bytes(far.recv(timeout=20)) == b"%d" % number
        assert bytes(pair.far.recv(timeout=20)) == b"broken"
        ticket.wait(20)
    assert far.epoch == 0 and pair.far.epoch >= 10


class StuckSocket:
    """A socket that takes nothing while it is told not to: what TCP does behind a lost segment."""

    def __init__(self, sock: socket.socket, stuck: threading.Event) -> None:
        self._sock = sock
        self._stuck = stuck

    def send(self, data: bytes) -> int:
        if self._stuck.is_set():
            raise BlockingIOError
        return self._sock.send(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


@pytest.mark.alone
@pytest.mark.parametrize("window", [4 * MIB, MIB], ids=["while it stalls", "used up before that is known"])
def test_a_control_channel_that_stalls_holds_nothing_up(
    net: Any, spawn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    """Acknowledgements and credit go over a lane as well, long before anybody takes the connection for lost."""
    monkeypatch.setattr(session_core, "FILE_WINDOW", window)
    (tmp_path / "root").mkdir()
    content = os.urandom(MIB) * 48
    (tmp_path / "file").write_bytes(content)
    pair = net.pair(streams=2, root=tmp_path / "root", server=LONG, client=LONG)
    pair.near.limit_rate(64 * MIB)
    stuck = threading.Event()
    channel = pair.far._loop._channel
    monkeypatch.setattr(channel, "_sock", StuckSocket(channel._sock, stuck))
    copying = spawn(pair.near.send_file, tmp_path / "file", "copy")
    engine = pair.far.core.engine
    net.wait_until(lambda: engine.bytes_verified > 4 * MIB, "the copy to be under way")
    stuck.set()
    before = engine.bytes_verified
    assert before < 28 * MIB, "too late to show anything"
    try:
        net.wait_until(lambda: engine.bytes_verified >= before + 16 * MIB, "several windows to arrive meanwhile")
        assert pair.near.core.engine.bytes_acknowledged > before + 8 * MIB, "the sender does not know"
        assert pair.near.core.control_up and pair.far.core.control_up
    finally:
        stuck.clear()
    copying.outcome()
    assert (tmp_path / "root" / "copy").read_bytes() == content
    assert pair.far.epoch == 0
    assert pair.near.metrics().retransmitted_bytes == 0


def test_credit_that_is_lost_with_the_connection_goes_over_a_lane(
    net: Any, spawn: Any, cutter: Cutter, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt, may = redial.Redialer._attempt, threading.Event()

    def maybe(redialer: redial.Redialer) -> None:
        if not may.is_set():
            raise BrokenError("no way, says the test")
        attempt(redialer)

    monkeypatch.setattr(redial.Redialer, "_attempt", maybe)
    pair = net.pair(streams=2, server=LONG, client=LONG)
    cutter.arm(m.Credit, 1, arrives=False)
    writer = pair.near.open_pipe()
    reader = pair.far.accept_pipe(timeout=20)
    assert cutter.done.wait(20), "accepting it tells credit"
    net.wait_until(lambda: not (pair.near.core.control_up or pair.far.core.control_up), "both to lose it")
    total = 24 * MIB  # more than the sender may send unasked
    writing = spawn(lambda: writer.write(bytes(total)))
    had = 0
    while had < total:
        had += len(reader.read(MIB))
    assert writing.outcome() == total
    assert not pair.near.core.control_up
    may.set()
    writer.close(timeout=20)
    assert reader.read() == b""
