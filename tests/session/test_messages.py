"""Messages between two processes' worth of sessions: whole, once, in order, in bounded memory."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from typing import Any

import pytest

from amst_core.errors import AmstError, CancelledError, ClosedError, DeadlineError, UsageError
from amst_core.wire.frames import FrameHeader

pytestmark = pytest.mark.needs_transport

MIB = 1 << 20
SMALL = {"limits__memory": "32MiB"}
CHANNEL = 8 * MIB
"""Of it, what one channel of a sole session may have."""


@pytest.mark.parametrize("plaintext", [False, True], ids=["encrypted", "plaintext"])
@pytest.mark.parametrize("size", [0, 1, 65536, 65537, MIB, 5 * MIB + 17])
def test_a_message_arrives_as_it_was_sent_in_both_directions(net: Any, plaintext: bool, size: int) -> None:
    pair = net.pair(plaintext=plaintext)
    data = os.urandom(size)
    for here, there in (pair.ends, pair.ends[::-1]):
        ticket = here.send(data)
        got = there.recv(timeout=20)
        assert isinstance(got, memoryview)
        assert got == data
        ticket.wait(20)
        assert ticket.done and ticket.error is None and ticket.acknowledged == ticket.size == size


def test_each_channel_keeps_its_order_under_concurrent_senders(net: Any, spawn: Any) -> None:
    pair = net.pair(streams=4)
    count = 60
    # every message of one sender is its number; sizes vary so that later ones could overtake
    sizes = (10, 300_000, 0, 70_000, 5)

    def send(sender: int) -> None:
        for i in range(count):
            body = b"%d:%d:" % (sender, i) + bytes(sizes[i % len(sizes)])
            pair.near.send(body, channel=f"c{sender % 3}")

    tasks = [spawn(send, sender) for sender in range(8)]
    seen: dict[int, list[int]] = {sender: [] for sender in range(8)}

    def receive(channel: int) -> None:
        senders = sum(sender % 3 == channel for sender in range(8))
        for _ in range(count * senders):
            got = bytes(pair.far.recv(f"c{channel}", timeout=20))
            sender, number, rest = got.split(b":", 2)
            assert rest == bytes(sizes[int(number) % len(sizes)])
            seen[int(sender)].append(int(number))

    readers = [spawn(receive, channel) for channel in range(3)]
    for task in [*tasks, *readers]:
        task.outcome(60)
    assert seen == {sender: list(range(count)) for sender in range(8)}
    pair.near.flush(10)


def test_a_thousand_small_messages(net: Any, spawn: Any) -> None:
    pair = net.pair(streams=4)
    tickets = [pair.near.send(b"%d" % i) for i in range(1000)]
    assert [bytes(pair.far.recv(timeout=20)) for _ in range(1000)] == [b"%d" % i for i in range(1000)]
    for ticket in tickets:
        ticket.wait(20)


def test_bytes_are_sent_from_where_they_are_and_mutable_ones_are_copied(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = net.pair()
    taken: list[memoryview] = []
    open_transfer = pair.near.core.open

    def spying(kind: int, source: Any, **more: Any) -> Any:
        taken.append(source.view(0, 1))
        return open_transfer(kind, source, **more)

    monkeypatch.setattr(pair.near.core, "open", spying)
    fixed, mutable, borrowed = b"fixed" * 9, bytearray(b"mutable"), bytearray(b"borrowed")
    pair.near.send(fixed)
    pair.near.send(mutable)
    lent = pair.near.send(borrowed, borrow=True)
    assert taken[0].obj is fixed
    assert taken[1].obj is not mutable
    assert taken[2].obj is borrowed
    mutable[:] = b"changed"  # allowed at once
    assert [bytes(pair.far.recv(timeout=20)) for _ in range(3)] == [fixed, b"mutable", b"borrowed"]
    lent.wait(20)


def test_a_mutable_buffer_may_be_changed_while_it_waits_to_be_sent(net: Any) -> None:
    pair = net.pair(server=SMALL)
    blocker = [pair.near.send(bytes(4 * MIB)) for _ in range(6)]  # more than the peer takes unread
    data = bytearray(os.urandom(MIB))
    sent = bytes(data)
    ticket = pair.near.send(data)
    assert not ticket.done
    data[:] = bytes(MIB)
    for _ in blocker:
        pair.far.recv(timeout=20)
    assert pair.far.recv(timeout=20) == sent


def test_a_view_that_is_not_contiguous_or_not_of_bytes_arrives_as_its_bytes(net: Any) -> None:
    import array

    pair = net.pair()
    numbers = array.array("I", range(1000))
    every_other = memoryview(bytes(range(256)))[::2]
    pair.near.send(memoryview(numbers), borrow=True).wait(20)
    pair.near.send(every_other).wait(20)
    assert pair.far.recv(timeout=20) == numbers.tobytes()
    assert pair.far.recv(timeout=20) == every_other.tobytes()


def test_too_long_a_message_is_refused_before_anything_is_sent(net: Any) -> None:
    pair = net.pair(client={"limits__max_message": "1MiB"})
    with pytest.raises(UsageError, match="max_message"):
        pair.near.send(bytes(MIB + 1))
    pair.near.send(bytes(MIB)).wait(20)
    assert len(pair.far.recv(timeout=20)) == MIB
    with pytest.raises(DeadlineError):
        pair.far.recv(timeout=0)


def test_a_message_longer_than_the_peer_takes_fails_its_ticket_only(net: Any) -> None:
    pair = net.pair(server={"limits__max_message": "1MiB"})
    ticket = pair.near.send(bytes(2 * MIB))
    after = pair.near.send(b"after")
    with pytest.raises(AmstError, match="max_message") as caught:
        ticket.wait(20)
    assert caught.value.kind == "refused"
    after.wait(20)
    assert pair.far.recv(timeout=20) == b"after"


def test_recv_gives_up_at_its_deadline_and_the_message_is_not_lost(net: Any) -> None:
    pair = net.pair()
    started = time.monotonic()
    with pytest.raises(DeadlineError, match="quiet"):
        pair.far.recv("quiet", timeout=0.05)
    assert 0.05 <= time.monotonic() - started < 5
    pair.near.send(b"late", channel="quiet").wait(20)
    assert pair.far.recv("quiet", timeout=0) == b"late"


def test_several_threads_may_receive_from_one_channel(net: Any, spawn: Any) -> None:
    pair = net.pair()
    tasks = [spawn(pair.far.recv, timeout=20) for _ in range(4)]
    for i in range(4):
        pair.near.send(b"%d" % i)
    assert sorted(bytes(task.outcome()) for task in tasks) == [b"0", b"1", b"2", b"3"]


# ---- memory ---------------------------------------------------------------------------------------


def test_a_message_that_is_held_stays_intact_while_hundreds_more_use_the_memory(net: Any, spawn: Any) -> None:
    pair = net.pair(server=SMALL)
    data = os.urandom(2 * MIB)
    pair.near.send(data)
    held = pair.far.recv(timeout=20)
    slice_of_it = held[MIB : MIB + 1000]
    digest = hashlib.sha256(data).digest()

    def send() -> None:
        for i in range(300):
            pair.near.send(bytes([i % 251]) * (2 * MIB if i % 3 else 70_000))

    task = spawn(send)
    for i in range(300):
        assert pair.far.recv(timeout=20)[-1] == i % 251
    task.outcome()
    assert hashlib.sha256(held).digest() == digest
    del held
    for _ in range(3):
        pair.near.send(bytes(2 * MIB))
    for _ in range(3):
        pair.far.recv(timeout=20)
    assert slice_of_it == data[MIB : MIB + 1000]  # a part keeps the whole


def test_a_consumer_that_does_not_receive_slows_the_sender_and_nothing_is_lost(net: Any, spawn: Any) -> None:
    pair = net.pair(server=SMALL)
    digests = []

    def send() -> None:
        for i in range(60):
            data = bytes([i]) * MIB
            digests.append(hashlib.sha256(data).digest())
            pair.near.send(data, channel="slow")

    task = spawn(send)
    task.join(10)
    received = pair.far.core
    _settled(net, lambda: received.engine.bytes_verified)
    assert received.engine.bytes_verified <= 32 * MIB
    assert 0 < received.inbox.charged <= 16 * MIB
    assert pair.server.memory_in_use <= 32 * MIB
    got = [hashlib.sha256(pair.far.recv("slow", timeout=20)).digest() for _ in range(60)]
    task.outcome()
    assert got == digests
    pair.near.flush(20)
    _settled(net, lambda: received.inbox.charged)
    net.wait_until(lambda: received.inbox.charged == 0, "all memory given back")


def test_many_small_messages_that_nobody_receives_are_bounded_too(net: Any, spawn: Any) -> None:
    """Small enough to travel on the credit of their OPEN, they must count all the same."""
    pair = net.pair(server={**SMALL, "limits__open_transfers": 64})
    assert pair.far.core.memory.initial_credit >= 10_000
    stop = threading.Event()
    sent = 0

    def send() -> None:
        nonlocal sent
        while not stop.is_set() and sent < 6000:
            pair.near.send(bytes(10_000), channel="slow")
            sent += 1

    task = spawn(send)
    _settled(net, lambda: pair.far.core.engine.bytes_verified)
    assert pair.far.core.engine.bytes_verified <= 16 * MIB, f"{sent} messages of 10 kB"
    assert task.running
    stop.set()
    while True:
        try:
            pair.far.recv("slow", timeout=1.0)
        except DeadlineError:
            break
    task.outcome()
    pair.near.flush(20)


def test_tiny_messages_that_nobody_receives_are_bounded_too(net: Any, spawn: Any) -> None:
    """What a message costs is more than its bytes."""
    pair = net.pair(server={**SMALL, "limits__open_transfers": 16})
    stop = threading.Event()
    sent = 0

    def send() -> None:
        nonlocal sent
        while not stop.is_set() and sent < 20_000:
            pair.near.send(b"x" * (sent % 2), channel="slow")
            sent += 1

    task = spawn(send)
    _settled(net, lambda: sent, for_s=0.5)
    assert sent < 20_000
    stop.set()
    received = 0
    while True:
        try:
            pair.far.recv("slow", timeout=0.5)
        except DeadlineError:
            break
        received += 1
    task.outcome()
    assert received == sent


def test_memory_that_is_given_back_after_a_message_came_without_any_is_accounted_for(net: Any) -> None:
    """A small message that arrived on its OPEN's credit alone, while the memory was full, and is then dropped."""
    pair = net.pair(server=SMALL)
    held = []
    for _ in range(2):  # half of what a channel may have
        pair.near.send(bytes(CHANNEL // 4), channel="a").wait(20)
        held.append(pair.far.recv("a", timeout=20))
    waiting = pair.near.send(bytes(4 * MIB), channel="a")  # no memory for it
    for _ in range(20):
        pair.near.send(b"small", channel="a")
    held.clear()
    assert len(pair.far.recv("a", timeout=20)) == 4 * MIB
    for _ in range(20):
        assert pair.far.recv("a", timeout=20) == b"small"
    waiting.wait(20)
    pair.near.flush(20)
    assert pair.far.error is None
    net.wait_until(lambda: pair.far.core.inbox.charged == 0, "all memory given back")


def test_a_small_message_is_received_while_its_channel_has_no_memory_left(net: Any) -> None:
    pair = net.pair(server={**SMALL, "limits__open_transfers": 64})
    assert pair.far.core.memory.initial_credit >= 10_000
    held = []
    for size in (CHANNEL - 12_000, 2_000):  # all that a channel may have, overhead included
        pair.near.send(bytes(size), channel="a").wait(20)
        held.append(pair.far.recv("a", timeout=20))
    pair.near.send(bytes(10_000), channel="a")
    small = pair.far.recv("a", timeout=20)
    assert len(small) == 10_000
    del small
    held.clear()
    pair.near.send(bytes(4 * MIB), channel="a").wait(20)
    assert len(pair.far.recv("a", timeout=20)) == 4 * MIB
    assert pair.far.error is None


@pytest.mark.parametrize(
    "limits",
    [
        {"limits__memory": "32MiB", "limits__max_message": "16MiB"},
        {"limits__memory": "64MiB"},
        {"limits__memory": "32MiB", "limits__open_transfers": 4096},
        {"limits__open_transfers": 4096},
    ],
)
def test_the_longest_message_that_is_allowed_fits(net: Any, limits: dict[str, object]) -> None:
    """Whatever settings pass their check, no legal message waits for memory that never comes."""
    pair = net.pair(server=limits, client=limits)
    size = min(net.settings({k.replace("__", "."): v for k, v in limits.items()}).limits.max_message, 32 * MIB)
    for _ in range(2):
        ticket = pair.near.send(bytes(size))
        assert len(pair.far.recv(timeout=20)) == size
        ticket.wait(20)


def test_a_small_message_behind_a_large_one_does_not_take_what_that_one_waits_for(net: Any) -> None:
    pair = net.pair(server=SMALL)
    held = []
    for _ in range(2):
        pair.near.send(bytes(MIB)).wait(20)
        held.append(pair.far.recv(timeout=20))
    large = pair.near.send(bytes(CHANNEL - 8_000))  # needs all that a channel may have
    small = pair.near.send(bytes(MIB))
    while held:
        net.stays(lambda: not small.done and not large.done, "granted out of turn")
        held.pop()
    assert len(pair.far.recv(timeout=20)) == CHANNEL - 8_000
    assert len(pair.far.recv(timeout=20)) == MIB


def test_a_full_channel_does_not_stop_another(net: Any, spawn: Any) -> None:
    pair = net.pair(server=SMALL)
    task = spawn(lambda: [pair.near.send(bytes(MIB), channel="full") for _ in range(40)])
    task.outcome()
    _settled(net, lambda: pair.far.core.engine.bytes_verified)
    for _ in range(5):
        ticket = pair.near.send(bytes(MIB), channel="open")
        assert len(pair.far.recv("open", timeout=20)) == MIB
        ticket.wait(20)


def test_a_channel_with_more_messages_than_may_be_open_does_not_stop_another(net: Any, spawn: Any) -> None:
    pair = net.pair(server={**SMALL, "limits__open_transfers": 16})
    full = spawn(lambda: [pair.near.send(bytes(MIB), channel="full") for _ in range(40)])
    _settled(net, lambda: pair.far.core.engine.bytes_verified)
    assert full.running
    other = spawn(lambda: pair.near.send(b"through", channel="open").wait(20))
    assert pair.far.recv("open", timeout=20) == b"through"
    other.outcome()
    for _ in range(40):
        pair.far.recv("full", timeout=20)
    full.outcome()


def test_copies_of_mutable_buffers_are_bounded(net: Any, spawn: Any) -> None:
    """`send` returns when queued within the memory limit, and its copies count."""
    pair = net.pair(server=SMALL, client=SMALL)
    sent = 0

    def send() -> None:
        nonlocal sent
        for _ in range(30):
            pair.near.send(bytearray(2 * MIB))
            sent += 1

    task = spawn(send)
    _settled(net, lambda: sent, for_s=0.5)
    assert task.running
    assert sent * 2 <= 32
    for _ in range(30):
        pair.far.recv(timeout=20)
    task.outcome()


# ---- tickets --------------------------------------------------------------------------------------


def test_a_cancelled_message_never_arrives_and_the_next_one_does(net: Any) -> None:
    pair = net.pair(server=SMALL)
    first = [pair.near.send(bytes([i]) * (4 * MIB)) for i in range(5)]
    net.wait_until(lambda: first[0].done, "the first delivered")
    waiting = first[-1]  # no memory for it yet
    assert not waiting.done
    waiting.cancel()
    with pytest.raises(CancelledError):
        waiting.wait(20)
    waiting.cancel()  # no effect
    last = pair.near.send(b"last")
    assert [bytes(pair.far.recv(timeout=20))[:1] for _ in range(5)] == [b"\0", b"\1", b"\2", b"\3", b"l"]
    last.wait(20)
    assert pair.near.error is None and pair.far.error is None


def test_cancelling_what_is_delivered_has_no_effect(net: Any) -> None:
    pair = net.pair()
    ticket = pair.near.send(b"there")
    ticket.wait(20)
    ticket.cancel()
    ticket.wait(0)
    assert pair.far.recv(timeout=20) == b"there"


def test_cancel_under_load_leaves_the_session_whole(net: Any, spawn: Any) -> None:
    """The peer may still receive a chunk of what is given up when the next transfer is opened already."""
    pair = net.pair(streams=4, server={"limits__open_transfers": 2}, client={"limits__open_transfers": 2})
    kept = [b"%d" % i * 1000 for i in range(40)]

    def read() -> list[bytes]:
        got: list[bytes] = []
        while not got or got[-1] != kept[-1]:
            message = bytes(pair.far.recv(timeout=20))
            if len(message) < 3 * MIB:  # else it was whole before it was given up
                got.append(message)
        return got

    reader = spawn(read)
    for body in kept:
        doomed = pair.near.send(bytes(3 * MIB))
        pair.near.send(body)
        doomed.cancel()
    assert reader.outcome() == kept
    assert pair.near.error is None and pair.far.error is None


def test_progress_and_done_callbacks(net: Any) -> None:
    pair = net.pair()
    called: list[Any] = []
    ticket = pair.near.send(bytes(8 * MIB))
    ticket.add_done_callback(called.append)
    pair.far.recv(timeout=20)
    ticket.wait(20)
    net.wait_until(lambda: called, "the callback")
    ticket.add_done_callback(called.append)  # completed: called at once
    assert called == [ticket, ticket]


def test_a_callback_that_raises_harms_nobody(net: Any) -> None:
    pair = net.pair()

    def bad(_: object) -> None:
        raise ValueError("a bug of the user's")

    called = threading.Event()
    ticket = pair.near.send(bytes(MIB))
    ticket.add_done_callback(bad)
    ticket.add_done_callback(lambda _: called.set())
    pair.far.recv(timeout=20)
    ticket.wait(20)
    assert called.wait(20)
    pair.near.send(b"on").wait(20)
    assert pair.near.error is None and pair.near.metrics().lane_failures == 0


def test_flush_waits_for_everything_and_says_what_is_missing(net: Any, spawn: Any) -> None:
    pair = net.pair(server=SMALL)
    pair.near.flush(1)  # nothing to wait for
    tickets = [pair.near.send(bytes(4 * MIB)) for _ in range(6)]
    with pytest.raises(DeadlineError, match="not delivered"):
        pair.near.flush(0.2)
    task = spawn(pair.near.flush)
    for _ in tickets:
        assert task.running
        pair.far.recv(timeout=20)
    task.outcome()
    assert all(ticket.done and ticket.error is None for ticket in tickets)


# ---- the end --------------------------------------------------------------------------------------


def test_what_arrived_before_the_end_is_received_after_it(net: Any) -> None:
    pair = net.pair()
    for i in range(3):
        pair.near.send(b"%d" % i).wait(20)
    pair.near.close()
    assert pair.far.wait_closed(20)
    assert [bytes(pair.far.recv(timeout=20)) for _ in range(3)] == [b"0", b"1", b"2"]
    for _ in range(2):
        with pytest.raises(ClosedError):
            pair.far.recv(timeout=20)
    with pytest.raises(ClosedError):
        pair.far.send(b"too late")
    with pytest.raises(ClosedError):
        pair.near.send(b"too late")


def test_a_message_received_before_the_receiver_closes_is_delivered(net: Any) -> None:
    """The RESULT of what was received goes out before CLOSE does."""
    for _ in range(10):
        pair = net.pair()
        ticket = pair.near.send(b"received")
        assert pair.far.recv(timeout=20) == b"received"
        pair.far.close()
        ticket.wait(20)
        pair.near.close()
        pair.server.close()


def test_a_message_outlives_its_session(net: Any) -> None:
    pair = net.pair()
    data = os.urandom(MIB)
    pair.near.send(data)
    held = pair.far.recv(timeout=20)
    pair.near.close()
    assert pair.far.wait_closed(20)
    assert held == data
    del held


def test_what_was_confirmed_behind_a_message_that_never_came_whole_is_received(
    net: Any, wrap_lanes: Any, wrapped_lane: Any
) -> None:
    go_on = threading.Event()

    class HoldingLane(wrapped_lane):  # type: ignore[misc]
        def send_frame(self, header: bytes, payload: memoryview) -> None:
            frame = FrameHeader.unpack(header)
            if frame.transfer == 1 and frame.offset and not go_on.wait(20):
                return
            super().send_frame(header, payload)

        def abort(self) -> None:
            go_on.set()
            super().abort()

    wrap_lanes(near=HoldingLane)
    pair = net.pair(streams=4)
    first = pair.near.send(bytes(2 * MIB))
    second = pair.near.send(b"second")
    second.wait(20)
    pair.near.abort()
    assert pair.far.wait_closed(10)
    assert pair.far.recv(timeout=1) == b"second"
    for call in (lambda: pair.far.recv(timeout=1), first.wait):
        with pytest.raises(ClosedError):
            call()


def test_the_error_of_an_ended_session_does_not_grow_with_each_call(net: Any) -> None:
    pair = net.pair()
    pair.near.close()
    depths = []
    for _ in range(50):
        with pytest.raises(ClosedError) as caught:
            pair.near.recv(timeout=0)
        depth, trace = 0, caught.value.__traceback__
        while trace is not None:
            depth, trace = depth + 1, trace.tb_next
        depths.append(depth)
    assert max(depths) == min(depths)


def _settled(net: Any, value: Any, for_s: float = 0.3) -> None:
    """Wait until ``value()`` has stopped changing for a while."""
    last, since = value(), time.monotonic()
    deadline = time.monotonic() + 20
    while time.monotonic() - since < for_s:
        assert time.monotonic() < deadline, "still changing"
        time.sleep(0.01)
        now = value()
        if now != last:
            last, since = now, time.monotonic()


def held_to(session: Any) -> float | None:
    """Payload that ``session`` sends at most, bytes/s."""
    bucket = session.core.engine._bucket
    return None if bucket is None else bucket.rate


def test_each_side_begins_with_the_rate_of_its_settings_until_it_is_told_another(net: Any) -> None:
    server = net.server(transport__amst__pacing_rate="64MiB/s")
    near = net.connect(server, transport__amst__pacing_rate="32MiB/s")
    far = server.accept(5)
    assert (held_to(near), held_to(far)) == (32 * MIB, 64 * MIB)
    near.limit_peer_rate(128 * MIB)
    assert held_to(far) == 64 * MIB, "the lower one holds"
    near.limit_peer_rate(16 * MIB)
    assert held_to(far) == 16 * MIB
    near.limit_peer_rate(None)
    assert held_to(far) == 64 * MIB
    near.limit_rate(100 * MIB)
    assert held_to(near) == 100 * MIB
    near.limit_rate(None)
    assert held_to(near) is None
    plain = net.connect(net.server())
    assert held_to(plain) is None


def test_a_ticket_says_how_much_the_peer_holds(net: Any) -> None:
    """Without a progress callback too."""
    pair = net.pair()
    pair.near.limit_rate(1 << 20)
    ticket = pair.near.send(bytes(32 * MIB))
    net.wait_until(lambda: 0 < ticket.acknowledged < ticket.size, "a part of it")
    with pytest.raises(DeadlineError, match=r"[1-9]\d* of 33554432 bytes"):
        ticket.wait(0.01)
    pair.near.limit_rate(None)
    assert len(pair.far.recv(timeout=20)) == 32 * MIB
    ticket.wait(30)
    assert ticket.acknowledged == ticket.size
