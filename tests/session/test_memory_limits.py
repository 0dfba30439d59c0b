"""One memory budget for a whole server: kept whatever is sent, and shared so that nobody is starved."""

from __future__ import annotations

import itertools
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from amst_core.errors import ClosedError, ConnectError, DeadlineError
from amst_core.interfaces import Lane
from amst_core.wire.frames import FrameKind

pytestmark = [pytest.mark.needs_transport, pytest.mark.alone]

MIB = 1 << 20
DATA = int(FrameKind.DATA)
SMALL = {"limits__memory": "32MiB"}


@pytest.fixture
def watch() -> Iterator[Callable[[Callable[[], int], int], None]]:
    """Looks at a number all through the test: it never passes its limit."""
    stop = threading.Event()
    passed: list[str] = []
    threads = []

    def start(value: Callable[[], int], limit: int) -> None:
        def run() -> None:
            while not stop.is_set():
                if (now := value()) > limit:
                    passed.append(f"{now} bytes of {limit}")
                    return
                time.sleep(0.001)

        threads.append(threading.Thread(target=run))
        threads[-1].start()

    yield start
    stop.set()
    for thread in threads:
        thread.join()
    assert not passed


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4000
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"512 streams, both ends, need {wanted} descriptors; this process may have {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def used_by(session: Any) -> int:
    """What the whole budget of a client's session has in use."""
    return int(session.core.memory._budget.in_use)


def settled(net: Any, value: Callable[[], object], for_s: float = 0.5) -> None:
    """Wait until ``value()`` has stopped changing for a while."""
    last, since = value(), time.monotonic()
    deadline = time.monotonic() + 30
    while time.monotonic() - since < for_s:
        assert time.monotonic() < deadline, "still changing"
        time.sleep(0.01)
        if (now := value()) != last:
            last, since = now, time.monotonic()


def flood(session: Any, *, message: int, count: int, channel: str = "", begin: int = 0) -> None:
    """Send numbered messages, waiting where that is what `send` does."""
    payload = bytes(message - 8)
    for i in range(begin, count):
        session.send(i.to_bytes(8, "big") + payload, channel=channel)


def receive_all(session: Any, count: int, channel: str = "") -> None:
    """What `flood` sent arrives, whole and in order."""
    for i in range(count):
        assert session.recv(channel, timeout=30)[:8] == i.to_bytes(8, "big")


def works(near: Any, far: Any, size: int = MIB) -> None:
    """Messages of ``size`` go both ways."""
    data = os.urandom(size)
    for here, there in ((near, far), (far, near)):
        for _ in range(3):
            ticket = here.send(data, channel="works")
            assert there.recv("works", timeout=30) == data
            ticket.wait(20)


# ---- many lanes, many transfers ------------------------------------------------------------------


@pytest.mark.parametrize("plaintext", [False, True], ids=["encrypted", "plaintext"])
def test_512_streams_stay_inside_64_mib(net: Any, spawn: Any, watch: Any, many_files: None, plaintext: bool) -> None:
    limits: dict[str, object] = {"transport__amst__max_streams": 512, "limits__memory": "64MiB"}
    pair = net.pair(streams=512, plaintext=plaintext, server=limits, client=limits)
    watch(lambda: pair.server.memory_in_use, 64 * MIB)
    watch(lambda: used_by(pair.near), 64 * MIB)
    ways = ((pair.near, pair.far), (pair.far, pair.near))
    tasks = [spawn(flood, here, message=MIB, count=100) for here, _ in ways]
    tasks += [spawn(receive_all, there, 100) for _, there in ways]
    for task in tasks:
        task.outcome(60)
    for end in pair.ends:
        end.flush(20)
        assert end.error is None


def test_a_thousand_open_transfers_that_nobody_reads(net: Any, spawn: Any, watch: Any) -> None:
    """Memory stays bounded, the sender is slowed, others go on, and everything arrives in the end."""
    limits = {**SMALL, "limits__open_transfers": 1000}
    pair = net.pair(streams=4, server=limits, client={"limits__open_transfers": 1000})
    watch(lambda: pair.server.memory_in_use, 32 * MIB)
    assert pair.far.core.memory.max_open == 1000
    channels = [f"stopped {i}" for i in range(40)]
    sent = dict.fromkeys(channels, 0)
    in_vain = 0
    for channel in itertools.cycle(channels):  # in turn: the last place is for a channel that has none
        in_vain += 1
        if sent[channel] < 40 and pair.near.core.engine.has_turn(("message", channel)):
            flood(pair.near, message=100_000, begin=sent[channel], count=sent[channel] + 1, channel=channel)
            sent[channel] += 1
            in_vain = 0
        if in_vain == len(channels):
            break
    tasks = [spawn(flood, pair.near, message=100_000, begin=sent[c], count=40, channel=c) for c in channels]
    settled(net, lambda: pair.far.core.engine.bytes_verified)
    assert pair.near.core.engine.sending > 900, "all that the peer takes"
    assert any(task.running for task in tasks), "whoever wants to open more waits"
    assert pair.far.core.engine.bytes_verified < 32 * MIB
    for _ in range(20):
        ticket = pair.near.send(b"small", channel="open")
        assert pair.far.recv("open", timeout=20) == b"small"
        ticket.wait(20)
    other = net.connect(pair.server, streams=2)
    works(other, pair.server.accept(20))
    for channel in channels:
        receive_all(pair.far, 40, channel)
    for task in tasks:
        task.outcome()
    pair.near.flush(20)
    assert pair.near.error is None and pair.far.error is None


# ---- sessions among each other -------------------------------------------------------------------


def test_sessions_whose_consumers_stop_do_not_starve_a_new_one(net: Any, spawn: Any, watch: Any) -> None:
    server = net.server()
    watch(lambda: server.memory_in_use, 192 * MIB)
    stopped = []
    for _ in range(3):
        near = net.connect(server, streams=2)
        far = server.accept(20)
        stopped.append((near, far, spawn(flood, near, message=4 * MIB, count=40)))
        settled(net, lambda far=far: far.core.engine.bytes_verified)
        assert stopped[-1][2].running or near.core.unfinished()
    works(net.connect(server, streams=2), server.accept(20))
    for near, far, task in stopped:
        receive_all(far, 40)
        task.outcome()
        near.flush(20)


def test_a_message_waits_for_what_another_session_holds_and_comes_when_that_lets_go(net: Any) -> None:
    server = net.server(**SMALL)
    first = net.connect(server, streams=2)
    far = server.accept(20)
    held = []
    for _ in range(2):
        first.send(bytes(3 * MIB)).wait(20)
        held.append(far.recv(timeout=20))
    other = net.connect(server, streams=2)
    other_far = server.accept(20)
    ticket = other.send(bytes(12 * MIB))
    net.stays(lambda: not ticket.done and ticket.acknowledged < MIB, "there is no memory for it")
    held.clear()
    ticket.wait(20)
    assert len(other_far.recv(timeout=20)) == 12 * MIB


def test_a_message_waits_for_what_is_held_of_a_session_that_ended(net: Any) -> None:
    server = net.server(**SMALL)
    first = net.connect(server, streams=2)
    far = server.accept(20)
    first.send(bytes(8 * MIB)).wait(20)
    held = [far.recv(timeout=20)]
    first.close()
    assert far.wait_closed(20)
    other = net.connect(server, streams=2)
    other_far = server.accept(20)
    ticket = other.send(bytes(12 * MIB))
    net.stays(lambda: not ticket.done and ticket.acknowledged < MIB, "there is no memory for it")
    held.clear()
    ticket.wait(20)
    assert len(other_far.recv(timeout=20)) == 12 * MIB


@pytest.fixture
def stuck(wrapped_lane: Any, wrap_lanes: Any) -> Iterator[Any]:
    """Client lanes that stop in the middle of a frame, both ways, while ``stalling``; until the end of the test."""

    class Stuck:
        def __init__(self) -> None:
            self.stalling = False
            self.over = threading.Event()
            self.sending = 0
            self._lock = threading.Lock()

        def wrap(self, inner: Lane) -> Lane:
            stuck, stalls = self, self.stalling

            class StuckLane(wrapped_lane):  # type: ignore[misc]
                def send_frame(self, header: bytes, payload: memoryview) -> None:
                    if stalls and header[1] == DATA:
                        self.inner.write([memoryview(header), payload[: len(payload) // 2]])
                        with stuck._lock:
                            stuck.sending += 1
                        stuck.over.wait()
                    super().send_frame(header, payload)

                def recv_frame(self, place: Any) -> bytes | None:
                    def slow(header: memoryview) -> Any:
                        if stalls and header[1] == DATA:
                            stuck.over.wait()
                        return place(header)

                    return super().recv_frame(slow)

                def abort(self) -> None:
                    super().abort()
                    if stalls:
                        stuck.over.set()

            return StuckLane(inner)

    made = Stuck()
    wrap_lanes(near=made.wrap)
    yield made
    made.over.set()


def test_streams_that_stop_inside_a_chunk_hold_up_their_own_session_only(net: Any, stuck: Any) -> None:
    server = net.server(**SMALL)
    stuck.stalling = True
    slow = net.connect(server, streams=16)
    slow_far = server.accept(20)
    stuck.stalling = False
    for i in range(12):
        slow.send(bytes(MIB), channel=str(i))  # each stream holds a buffer that never fills
    net.wait_until(lambda: stuck.sending >= 4, "streams to stop inside their chunks")
    settled(net, lambda: slow_far.core.receive_pool._lent)
    assert slow_far.core.receive_pool._lent > 2 * MIB
    slow_far.send(bytes(16 * MIB))  # and each of these a buffer that is never sent
    settled(net, lambda: slow_far.core.send_pool._lent)
    assert slow_far.core.send_pool._lent > 2 * MIB
    for _ in range(3):
        other = net.connect(server, streams=4)
        other_far = server.accept(20)
        works(other, other_far)
        for pool in (server._memory._send_pool, server._memory._receive_pool):
            assert pool.in_use <= 32 * MIB // 6, "what they got was left for them"
    assert slow.error is None and slow_far.error is None
    slow.abort()


def test_a_session_that_there_is_no_memory_for_is_refused_until_another_ends(net: Any) -> None:
    server = net.server(limits__memory="32MiB", limits__open_transfers=4096)
    sessions = []
    with pytest.raises(ConnectError, match=r"limits\.memory") as caught:
        for _ in range(65):
            sessions.append(net.connect(server, streams=1))
    assert caught.value.retryable
    assert sessions
    works(sessions[-1], [server.accept(20) for _ in sessions][-1], 10_000)
    sessions[0].close()
    net.wait_until(lambda: len(server.sessions) < len(sessions), "the session to be gone")
    net.connect(server, streams=1)


# ---- copies --------------------------------------------------------------------------------------


def test_what_there_is_no_room_to_copy_is_sent_before_send_returns(net: Any, watch: Any) -> None:
    pair = net.pair(client=SMALL)
    watch(lambda: used_by(pair.near), 32 * MIB)
    data = bytearray(os.urandom(10 * MIB))
    sent = bytes(data)
    ticket = pair.near.send(data)
    assert ticket.done and ticket.error is None
    data[:] = bytes(len(data))
    assert pair.far.recv(timeout=20) == sent


def test_the_end_of_the_session_wakes_a_send_without_a_copy(net: Any, spawn: Any) -> None:
    pair = net.pair(server=SMALL, client=SMALL)
    pair.near.send(bytes(12 * MIB))
    net.wait_until(lambda: pair.far.core.inbox.charged, "the memory of the peer to be taken")
    task = spawn(pair.near.send, bytearray(12 * MIB))
    task.join(0.3)
    assert task.running, "nobody reads at the other end"
    pair.near.abort()
    ticket = task.outcome()
    assert ticket.done and ticket.error is not None


def test_echoing_long_messages_from_where_they_lie_does_not_lock_up(net: Any, spawn: Any, watch: Any) -> None:
    """What is received holds the memory that a copy of it would need."""

    def echo(session: Any) -> None:
        while True:
            session.send(session.recv(timeout=60))

    server = net.server(on_session=echo, **SMALL)
    watch(lambda: server.memory_in_use, 32 * MIB)

    def ask() -> None:
        session = net.connect(server, streams=2)
        for i in range(3):
            session.send(bytes([i]) * (10 * MIB))
            assert session.recv(timeout=40)[-1] == i
        session.close()

    for task in [spawn(ask) for _ in range(3)]:
        task.outcome(60)


# ---- the end -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "abort"])
def test_when_all_sessions_have_ended_nothing_is_in_use(net: Any, spawn: Any, tmp_path: Any, how: str) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "file").write_bytes(os.urandom(3 * MIB))
    server = net.server(root=tmp_path / "root")
    assert server.memory_in_use == 0
    pairs = []
    tasks = []
    for i in range(3):
        near = net.connect(server, streams=3)
        far = server.accept(20)
        pairs.append((near, far))
        near.send_file(tmp_path / "file", f"copy{i}")
        near.send(bytes(5 * MIB)).wait(20)  # nobody receives it
        far.send(bytearray(2 * MIB)).wait(20)
        near.recv(timeout=20)
        tasks.append(spawn(flood, near, message=4 * MIB, count=40, channel="stopped"))
        settled(net, lambda far=far: far.core.engine.bytes_verified)
    assert server.memory_in_use > 0
    held = [pairs[0][1].recv("stopped", timeout=20)]
    for near, _ in pairs:
        if how == "close":
            with pytest.raises(DeadlineError):
                near.close(0.1)
        else:
            near.abort()
    for _, far in pairs:
        assert far.wait_closed(20)
        for channel in ("", "stopped"):  # what nobody received goes now, or with the session
            with pytest.raises(ClosedError):
                while True:
                    far.recv(channel, timeout=0)
    net.wait_until(lambda: not server.sessions, "every session to be gone")
    net.wait_until(lambda: server.memory_in_use <= len(held[0]) + 4096, "all but what is held to be given back")
    assert server.memory_in_use > 0
    held.clear()
    assert server.memory_in_use == 0
    for task in tasks:
        task.error()
