"""For callers that must not block: room, arrivals, replies and ends call back once; copies can be given up."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from amst_core.errors import CancelledError, ClosedError
from amst_core.session.copying import Stop
from amst_core.session.endpoints import MemorySource
from amst_core.session.room import NotYet, Room
from amst_core.wire.messages import MESSAGE

pytestmark = pytest.mark.needs_transport

MIB = 1 << 20


class Calls:
    """Counts its calls."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *args: object) -> None:
        self.count += 1


def test_room_calls_each_watcher_once_and_none_that_was_taken_back() -> None:
    lock = threading.Lock()
    room = Room(lock)
    wanted, taken_back = Calls(), Calls()
    with lock:
        for watcher in (wanted, taken_back):
            with pytest.raises(NotYet):
                room.wait_or_watch(watcher)
        room.unwatch(taken_back)
        room.unwatch(taken_back)
        room.notify_all()
        room.notify_all()
    assert (wanted.count, taken_back.count) == (1, 0)


def test_a_transfer_that_the_peer_does_not_take_yet_is_tried_again_when_there_is_room(net: Any) -> None:
    pair = net.pair(server={"limits__open_transfers": 8})
    pair.near.limit_rate(16 << 10)
    room = Calls()
    tickets = []
    with pytest.raises(NotYet):
        while True:
            tickets.append(pair.near.open_message(memoryview(bytes(MIB)), "", when_room=room))
    assert 0 < len(tickets) < 8 and room.count == 0
    tickets[-1].cancel()
    net.wait_until(lambda: room.count == 1, "the call")
    pair.near.open_message(memoryview(b"x"), "", when_room=room)
    with pytest.raises(NotYet):
        while True:
            pair.near.open_message(memoryview(bytes(MIB)), "", when_room=room)
    pair.near.abort()
    net.wait_until(lambda: room.count >= 2, "the call at the end")
    with pytest.raises(ClosedError):
        pair.near.open_message(memoryview(b"x"), "", when_room=room)


def test_a_transfer_that_waits_for_its_place_can_be_given_up(net: Any, spawn: Any) -> None:
    pair = net.pair(server={"limits__open_transfers": 8})
    core = pair.near.core
    pair.near.limit_rate(16 << 10)
    with pytest.raises(NotYet):
        while True:
            pair.near.open_message(memoryview(bytes(MIB)), "", when_room=Calls())
    given_up = threading.Event()
    asked = Calls()

    def is_given_up() -> bool:
        asked()
        return given_up.is_set()

    source = MemorySource(memoryview(b"x"))
    opening = spawn(core.open, MESSAGE, source, size=1, flow=("message", ""), given_up=is_given_up)
    net.wait_until(lambda: asked.count, "it to wait")
    assert opening.running
    given_up.set()
    with core.lock:
        core.room.notify_all()
    assert isinstance(opening.error(), CancelledError)


def test_an_arrival_calls_the_one_that_has_waited_longest_and_the_next_when_that_withdraws(net: Any) -> None:
    pair = net.pair()
    inbox = pair.far.core.inbox
    first, second, other = Calls(), Calls(), Calls()
    assert inbox.take("c", first) is None and inbox.take("c", second) is None and inbox.take("d", other) is None
    pair.near.send(b"1", channel="c").wait(20)
    assert (first.count, second.count) == (1, 0)
    inbox.withdraw("c", first)
    assert (first.count, second.count) == (1, 1)
    third = Calls()
    assert inbox.take("c", third) == b"1" and third.count == 0
    assert inbox.take("c", third) is None
    inbox.withdraw("c", third)
    pair.near.send(b"2", channel="c").wait(20)
    assert third.count == 0 and inbox.take("c", third) == b"2"
    pair.far.abort()
    assert other.count == 1
    with pytest.raises(ClosedError):
        inbox.take("d", other)


def test_each_message_calls_one_also_when_two_come_whole_at_once(net: Any) -> None:
    pair = net.pair()
    inbox = pair.far.core.inbox
    waiting = [Calls() for _ in range(3)]
    for calls in waiting:
        assert inbox.take("", calls) is None
    for n in range(2):
        pair.near.send(b"%d" % n).wait(20)
    assert inbox.take("", Calls()) == b"0"
    assert inbox.take("", Calls()) == b"1"
    assert waiting[0].count == 1 and waiting[1].count == 1


def test_a_reply_and_the_end_call_back_also_late(net: Any, tmp_path: Path) -> None:
    pair = net.pair(root=tmp_path)
    asked = pair.near.ask_stat("nothing")
    told, told_late, ended, ended_late = (Calls() for _ in range(4))
    asked.add_done_callback(told)
    net.wait_until(lambda: told.count, "the reply")
    asked.add_done_callback(told_late)
    asked.cancel()
    assert (told.count, told_late.count) == (1, 1) and pair.near.told_stat(asked, 0) is None
    given_up = pair.near.ask_stat("nothing")
    given_up.cancel()
    with pytest.raises(CancelledError):
        given_up.wait(0)
    pair.near.add_end_callback(ended)
    assert ended.count == 0
    pair.near.close()
    pair.near.add_end_callback(ended_late)
    assert (ended.count, ended_late.count) == (1, 1)


@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
def test_a_copy_that_is_cancelled_leaves_nothing_incomplete(net: Any, spawn: Any, tmp_path: Path, up: bool) -> None:
    root, local = tmp_path / "root", tmp_path / "local"
    root.mkdir(), local.mkdir()
    source, target = (local, root) if up else (root, local)
    (source / "file").write_bytes(os.urandom(4 * MIB))
    pair = net.pair(root=root)
    sender = pair.near if up else pair.far
    sender.limit_rate(MIB)
    stop = Stop()
    copy = pair.near.send_file if up else pair.near.recv_file
    names = (local / "file", "file") if up else ("file", local / "file")
    copying = spawn(copy, *names, stop=stop)
    net.wait_until(lambda: sender.core.engine.bytes_acknowledged, "the first of it")
    stop.cancel()
    assert isinstance(copying.error(), CancelledError)
    net.wait_until(lambda: not list(target.iterdir()), "what there was of it to go")
    sender.limit_rate(None)
    copy(*names)
    assert (target / "file").read_bytes() == (source / "file").read_bytes()
