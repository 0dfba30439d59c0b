"""The control connection breaks; the session does not. Every message arrives once and in order all the same."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from amst_core import Session
from amst_core.api import redial
from amst_core.control.channel import ControlChannel
from amst_core.errors import AmstError, AuthError, BrokenError, ClosedError, ProtocolError, UsageError
from amst_core.session import core as session_core
from amst_core.session.control_loop import Connection

pytestmark = pytest.mark.needs_transport

MIB = 1 << 20


def channel_of(session: Session) -> ControlChannel | None:
    return session._loop._channel


def cut(session: Session) -> None:
    """Break the control connection as a network would: neither side is told why."""
    channel = channel_of(session)
    if channel is not None:
        with contextlib.suppress(OSError):
            channel._sock.shutdown(socket.SHUT_RDWR)


class NoWay:
    """While it is on, no control connection can be made: what the network does, not the server."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on = False
        self.tried = 0
        attempt = redial.Redialer._attempt

        def maybe(redialer: redial.Redialer) -> None:
            if self.on:
                self.tried += 1
                raise BrokenError("no way, says the test")
            attempt(redialer)

        monkeypatch.setattr(redial.Redialer, "_attempt", maybe)


@pytest.fixture
def no_way(monkeypatch: pytest.MonkeyPatch) -> NoWay:
    return NoWay(monkeypatch)


@pytest.mark.parametrize("side", ["near", "far"])
def test_messages_arrive_once_and_in_order_however_often_it_breaks(net: Any, spawn: Any, side: str) -> None:
    pair = net.pair(streams=3)
    count = 300

    def receive() -> list[int]:
        return [int.from_bytes(pair.far.recv(timeout=20)[:8], "big") for _ in range(count)]

    received = spawn(receive)
    tickets = []
    for number in range(count):
        tickets.append(pair.near.send(number.to_bytes(8, "big") * 4096))
        if number % 40 == 20:
            cut(getattr(pair, side))
    assert received.outcome() == list(range(count))
    for ticket in tickets:
        ticket.wait(20)
    assert pair.far.epoch >= 1
    assert not pair.far.core.engine.receiving and not pair.near.core.engine.sending


def test_both_directions_and_many_threads_survive_it(net: Any, spawn: Any) -> None:
    pair = net.pair(streams=4)
    done = threading.Event()

    def talk(sender: Session, receiver: Session, channel: str) -> list[bytes]:
        got = []
        for number in range(40):
            ticket = sender.send(f"{channel} {number}".encode() * 500, channel=channel)
            got.append(bytes(receiver.recv(channel, timeout=20)))
            ticket.wait(20)
        return got

    def break_it() -> None:
        while not done.wait(0.05):
            cut(pair.near)

    breaking = spawn(break_it)
    talks = {
        (at, n): spawn(talk, *(pair.ends if at == "up" else pair.ends[::-1]), f"{at}{n}")
        for at in ("up", "down")
        for n in range(8)
    }
    for (at, n), task in talks.items():
        assert task.outcome(60) == [f"{at}{n} {number}".encode() * 500 for number in range(40)]
    done.set()
    breaking.outcome()
    assert pair.far.epoch > 1


def test_files_requests_and_stream_changes_survive_it(net: Any, spawn: Any, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    pair = net.pair(streams=3, root=tmp_path / "root")
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(60):
        (tree / f"{number}").write_bytes(os.urandom(1 + number * 7919))
    done = threading.Event()

    def break_it() -> None:
        while not done.wait(0.04):
            cut(pair.near)

    breaking = spawn(break_it)
    pair.near.send_file(tree, "up")
    for count in (5, 2, 4):
        net.wait_until(lambda count=count: pair.near.adjust_streams(count) == count, f"{count} streams")
    pair.near.recv_file("up", tmp_path / "back")
    for number in range(60):
        found = pair.near.stat(f"up/{number}")
        assert found is not None and found.size == 1 + number * 7919
    done.set()
    breaking.outcome()
    for directory in (tmp_path / "root" / "up", tmp_path / "back"):
        assert {p.name: p.read_bytes() for p in directory.iterdir()} == {p.name: p.read_bytes() for p in tree.iterdir()}


def test_a_file_goes_on_over_the_streams_while_there_is_no_control_channel(
    net: Any, spawn: Any, monkeypatch: pytest.MonkeyPatch, no_way: NoWay, tmp_path: Path
) -> None:
    """Acknowledgements and credit travel on lanes: far more than one window of credit arrives meanwhile."""
    monkeypatch.setattr(session_core, "FILE_WINDOW", 4 * MIB)
    (tmp_path / "root").mkdir()
    content = os.urandom(MIB) * 64
    (tmp_path / "file").write_bytes(content)
    pair = net.pair(streams=2, root=tmp_path / "root", client={"limits__session_timeout": "30s"},
                    server={"limits__session_timeout": "30s"})  # fmt: skip
    no_way.on = True
    pair.near.limit_rate(64 * MIB)
    task = spawn(pair.near.send_file, tmp_path / "file", "copy")
    engine = pair.far.core.engine
    net.wait_until(lambda: engine.bytes_verified > 4 * MIB, "the copy to be under way")
    cut(pair.near)
    net.wait_until(lambda: not pair.near.core.control_up and not pair.far.core.control_up, "both to notice")
    before = engine.bytes_verified
    assert before < 40 * MIB, "too late to show anything"
    net.wait_until(lambda: engine.bytes_verified >= before + 16 * MIB, "four windows to arrive without it")
    assert not pair.near.core.control_up and no_way.tried
    acknowledged = pair.near.core.engine.bytes_acknowledged
    assert acknowledged > before, "the sender does not know"
    no_way.on = False
    task.outcome()
    assert (tmp_path / "root" / "copy").read_bytes() == content
    assert pair.near.metrics().retransmitted_bytes == 0


def test_what_is_opened_meanwhile_waits_and_arrives(net: Any, no_way: NoWay) -> None:
    pair = net.pair(streams=2, client={"limits__session_timeout": "30s"}, server={"limits__session_timeout": "30s"})
    no_way.on = True
    cut(pair.near)
    net.wait_until(lambda: no_way.tried >= 2, "it to be tried again")
    tickets = [pair.near.send(b"%d" % number) for number in range(20)]
    net.stays(lambda: pair.far.core.engine.bytes_verified == 0, "data came before its OPEN")
    assert len(pair.far.core.lanes) == 2, "lanes were lost over it"
    no_way.on = False
    assert [bytes(pair.far.recv(timeout=20)) for _ in range(20)] == [b"%d" % number for number in range(20)]
    for ticket in tickets:
        ticket.wait(20)


def test_after_the_timeout_both_sides_end_and_say_what_arrived(net: Any, no_way: NoWay) -> None:
    pair = net.pair(streams=2, client={"limits__session_timeout": "2s"}, server={"limits__session_timeout": "2s"})
    first = pair.near.send(b"first")
    assert bytes(pair.far.recv(timeout=20)) == b"first"
    first.wait(20)
    no_way.on = True
    cut(pair.near)
    net.wait_until(lambda: not pair.near.core.control_up, "it to be noticed")
    late = pair.near.send(b"late")
    assert pair.near.wait_closed(20) and pair.far.wait_closed(20)
    for end in pair.ends:
        assert isinstance(end.error, BrokenError) and "limits.session_timeout" in str(end.error)
    with pytest.raises(BrokenError) as caught:
        late.wait(1)
    delivery: Any = caught.value.delivery
    assert delivery.delivered == ((first.transfer, first.transfer + 1),)
    assert late.transfer in (*delivery.undelivered, *delivery.unknown)
    with pytest.raises(BrokenError):
        pair.near.send(b"more")


def test_what_was_sent_whole_without_an_answer_is_unknown(net: Any, no_way: NoWay) -> None:
    pair = net.pair(streams=2, client={"limits__session_timeout": "2s"}, server={"limits__session_timeout": "2s"})
    ticket = pair.near.send(b"nobody reads this before the answer is lost")
    net.wait_until(lambda: pair.near.core.engine.delivery().unknown == (ticket.transfer,) or ticket.done, "END to go")
    if not ticket.done:
        no_way.on = True
        cut(pair.near)
        assert pair.near.wait_closed(20)
        if ticket.error is not None:
            assert ticket.error.delivery.unknown == (ticket.transfer,)


def test_a_server_that_was_started_anew_does_not_know_the_session(net: Any) -> None:
    first = net.server()
    near = net.connect(first)
    port = first.address.rpartition(":")[2]
    for session in first.sessions:
        session.core.on_failed = None
    channel = channel_of(near)
    assert channel is not None
    # a server that is killed says nothing: its sockets just go
    near._loop.redial, held = None, near._loop.redial
    for worker in list(near.core.lanes.values()):
        worker.lane.abort()
    cut(near)
    first.close(0.0)
    second = net.server(address=f"127.0.0.1:{port}")
    assert held is not None
    held(BrokenError("lost"))
    assert near.wait_closed(20)
    assert isinstance(near.error, BrokenError | ClosedError)
    assert net.connect(second).error is None


@pytest.mark.parametrize("lie", ["another secret", "an old epoch", "another session", "too many received"])
def test_a_resumption_that_lies_leaves_the_session_alone(net: Any, lie: str) -> None:
    pair = net.pair(streams=2)
    cut(pair.near)
    net.wait_until(lambda: pair.far.epoch == 1 and pair.far.core.control_up, "an honest resumption")
    net.wait_until(lambda: pair.near.core.control_up, "it at this side")
    redialer: Any = pair.near._loop.redial
    agreed = redialer._agreed
    changed = {
        "another secret": {"secret": bytes(32)},
        "another session": {"session_id": "00" * 16},
    }.get(lie, {})
    from dataclasses import replace

    from amst_core.control import handshake

    channel = redialer._dial(5.0)
    try:
        with pytest.raises(AmstError) as caught:
            handshake.resume(
                channel,
                token=redialer._token,
                agreed=replace(agreed, **changed),
                epoch=1 if lie == "an old epoch" else 7,
                received=1 << 40 if lie == "too many received" else pair.near.received,
                deadline=session_core.time.monotonic() + 5,
            )
            if lie == "too many received":
                raise ProtocolError("the handshake cannot know; the session does")
    finally:
        channel.abort()
    expected: dict[str, type[AmstError]] = {"another session": ClosedError, "too many received": ProtocolError}
    assert isinstance(caught.value, expected.get(lie, AuthError))
    if lie == "too many received":
        assert pair.far.wait_closed(20)
        assert isinstance(pair.far.error, ProtocolError)
    else:
        assert pair.far.epoch == 1
        pair.near.send(b"still here").wait(20)
        assert bytes(pair.far.recv(timeout=20)) == b"still here"


def test_a_connection_offered_after_the_end_is_closed(net: Any) -> None:
    pair = net.pair()
    left, right = socket.socketpair()
    pair.far.abort()
    assert pair.far.wait_closed(20)

    class Channel:
        aborted = False

        def abort(self) -> None:
            self.aborted = True

    channel: Any = Channel()
    pair.far._loop.connect(Connection(channel))
    assert channel.aborted
    left.close()
    right.close()


def test_a_silent_connection_is_replaced_though_nobody_reset_it(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half open: what this side writes goes nowhere, and nothing comes."""
    pair = net.pair(streams=2, client={"limits__session_timeout": "3s"}, server={"limits__session_timeout": "3s"})
    channel = channel_of(pair.near)
    assert channel is not None
    monkeypatch.setattr(channel, "flush", lambda: None)
    monkeypatch.setattr(channel, "receive", lambda: (channel._recv() and []) or [])
    ticket = pair.near.send(b"over the next one")
    assert bytes(pair.far.recv(timeout=20)) == b"over the next one"
    ticket.wait(20)
    assert pair.far.epoch == 1


def test_closing_while_there_is_no_control_channel_ends_in_time(net: Any, no_way: NoWay) -> None:
    pair = net.pair(streams=2, client={"limits__session_timeout": "30s"})
    no_way.on = True
    cut(pair.near)
    net.wait_until(lambda: not pair.near.core.control_up, "it to be noticed")
    pair.near.close(timeout=1.0)
    assert isinstance(pair.near.error, ClosedError)


def test_a_forked_child_is_refused_and_the_parent_goes_on(net: Any, tmp_path: Path) -> None:
    pair = net.pair(streams=2)
    calls: list[Callable[[], object]] = [
        lambda: pair.near.send(b"x"),
        lambda: pair.near.recv(timeout=1),
        lambda: pair.near.metrics(),
        lambda: pair.near.health_check(),
        lambda: pair.near.stat("x"),
        lambda: pair.near.adjust_streams(2),
        lambda: pair.server.accept(1),
    ]
    child = os.fork()
    if not child:
        outcome = 1
        try:
            refused = 0
            for call in calls:
                try:
                    call()
                except UsageError as err:
                    refused += "cannot be used after a fork" in str(err)
            pair.near.close()
            pair.near.abort()
            pair.server.close()
            outcome = 0 if refused == len(calls) else 2
        finally:
            os._exit(outcome)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    pair.near.send(b"still").wait(20)
    assert bytes(pair.far.recv(timeout=20)) == b"still"
    assert net.connect(pair.server).error is None
