"""Pipes: ordered bytes of unknown length, whole or an error, whatever happens to lanes, control channel and peers."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from amst_core import PipeReader, PipeWriter, Session
from amst_core.errors import (
    AmstError,
    BrokenError,
    CancelledError,
    ClosedError,
    DeadlineError,
    UsageError,
)
from amst_core.session import ordered
from amst_core.units import MIN_RATE

pytestmark = pytest.mark.needs_transport

MIB = 1 << 20
SIZES = (1, 7, 4096, 65_535, 65_536, 70_000, MIB, MIB + 1, 2_500_000)


def pieces(seed: int, total: int, sizes: tuple[int, ...] = SIZES) -> Iterator[bytes]:
    """Random bytes, ``total`` in all, in pieces of mixed sizes."""
    rng = random.Random(seed)
    while total:
        size = min(total, rng.choice(sizes))
        yield rng.randbytes(size)
        total -= size


def write_all(pipe: PipeWriter, seed: int, total: int, sizes: tuple[int, ...] = SIZES) -> str:
    """Write through every way there is, close, and return the digest."""
    digest = hashlib.sha256()
    with pipe:
        for number, piece in enumerate(pieces(seed, total, sizes)):
            digest.update(piece)
            assert pipe.write(piece if number % 2 else bytearray(piece)) == len(piece)
    return digest.hexdigest()


def read_all(pipe: PipeReader, most: int = 300_000) -> str:
    digest, buffer = hashlib.sha256(), bytearray(most)
    with pipe:
        while size := pipe.readinto(buffer):
            digest.update(memoryview(buffer)[:size])
    return digest.hexdigest()


def accept(session: Session, channel: str = "") -> PipeReader:
    return session.accept_pipe(channel, timeout=20)


def until_it_stands(net: Any, value: Callable[[], int]) -> None:
    """Wait until a number that has begun to grow grows no more."""
    last, since = value(), time.monotonic()
    deadline = since + 30
    while time.monotonic() - since < 0.5 or not last:
        assert time.monotonic() < deadline, "it goes on and on"
        time.sleep(0.01)
        if (now := value()) != last:
            last, since = now, time.monotonic()


def nothing_kept(*sessions: Session) -> bool:
    return not any(session.core.memory.piped for session in sessions)


@pytest.mark.parametrize("plaintext", [False, True])
@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("total", [0, 1, 65_536, 30_000_000])
def test_what_is_written_is_read_in_order(net: Any, spawn: Any, plaintext: bool, streams: int, total: int) -> None:
    pair = net.pair(streams=streams, plaintext=plaintext)
    reading = spawn(lambda: read_all(accept(pair.far)))
    assert write_all(pair.near.open_pipe(), total, total) == reading.outcome()
    net.wait_until(lambda: nothing_kept(*pair.ends), "the memory to come back")
    assert not pair.near.core.engine.sending and not pair.far.core.engine.receiving


def test_both_directions_at_once(net: Any, spawn: Any) -> None:
    pair = net.pair(streams=3)
    reading = [spawn(lambda end=end: read_all(accept(end))) for end in pair.ends]
    writing = [spawn(write_all, end.open_pipe(), seed, 20_000_000) for seed, end in enumerate(pair.ends)]
    assert [task.outcome() for task in writing] == [task.outcome() for task in reversed(reading)]


def test_bytes_come_before_the_end(net: Any) -> None:
    pair = net.pair()
    with pair.near.open_pipe() as writer:
        reader = accept(pair.far)
        reader.timeout = 20
        for word in (b"one", b"two", b"three"):
            writer.write(word)
            assert reader.read(100) == word
        writer.write(b"a little")
        writer.write(b" and more")
        writer.flush()
        assert [len(reader.read(8)), len(reader.read(100))] == [8, 9]


def test_many_small_writes_make_few_chunks(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = net.pair(streams=1)
    taken = []
    take = pair.near.core.engine.next_chunk

    def counted(lane: int, now: float) -> Any:
        chunk = take(lane, now)
        taken.extend([chunk.length] if chunk is not None else [])
        return chunk

    monkeypatch.setattr(pair.near.core.engine, "next_chunk", counted)
    with pair.near.open_pipe() as writer:
        reader = accept(pair.far)
        for _ in range(2000):
            writer.write(bytes(100))
    assert len(taken) < 200
    assert len(reader.readall()) == 200_000


def test_it_is_a_file_of_python(net: Any, spawn: Any) -> None:
    pair = net.pair()

    def write() -> None:
        raw = pair.near.open_pipe()
        assert raw.writable() and not raw.readable() and not raw.seekable()
        with io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8") as text:
            text.writelines(f"line {number}\n" for number in range(100_000))
        assert raw.closed

    writing = spawn(write)
    raw = accept(pair.far)
    assert raw.readable() and not raw.writable()
    with io.TextIOWrapper(io.BufferedReader(raw), encoding="utf-8") as text:
        assert [line for line in text] == [f"line {number}\n" for number in range(100_000)]
    writing.outcome()


def test_other_buffers(net: Any) -> None:
    pair = net.pair()
    with pair.near.open_pipe() as writer:
        assert writer.write(memoryview(bytes(range(10)))[::2]) == 5
        assert writer.write(b"") == 0
        assert writer.write(memoryview(b"abcdefgh").cast("I")) == 8
        reader = accept(pair.far)
        assert reader.readinto(bytearray()) == 0
        assert reader.read(0) == b""
    assert reader.read() == bytes([0, 2, 4, 6, 8]) + b"abcdefgh"
    assert reader.read() == b"" and reader.read(5) == b""


def test_pipes_of_a_channel_are_accepted_in_the_order_they_were_opened(net: Any) -> None:
    pair = net.pair()
    writers = [pair.near.open_pipe(channel) for channel in ("a", "b", "a", "a")]
    for number, writer in reversed(list(enumerate(writers))):
        writer.write(b"%d" % number)
    read = [accept(pair.far, channel) for channel in ("a", "a", "b", "a")]
    assert [reader.read(10) for reader in read] == [b"0", b"2", b"1", b"3"]
    assert [reader.channel for reader in read] == ["a", "a", "b", "a"]
    for writer in writers:
        writer.close()


def test_a_whole_pipe_that_nobody_accepts_is_not_confirmed(net: Any) -> None:
    pair = net.pair()
    writer = pair.near.open_pipe()
    writer.write(b"little")
    with pytest.raises(DeadlineError):
        writer.close(timeout=0.3)
    assert not writer.closed
    reader = accept(pair.far)
    writer.close(timeout=20)
    assert writer.closed and reader.read() == b"little"


def test_no_pipe_comes(net: Any) -> None:
    pair = net.pair()
    with pytest.raises(DeadlineError, match="no pipe on channel 'x'"):
        pair.far.accept_pipe("x", timeout=0.05)
    with pytest.raises(UsageError, match="channel"):
        pair.near.open_pipe("x" * 256)


def test_a_read_has_a_deadline_if_it_is_given_one(net: Any) -> None:
    pair = net.pair()
    writer = pair.near.open_pipe()
    reader = accept(pair.far)
    reader.timeout = 0.05
    with pytest.raises(DeadlineError):
        reader.read(1)
    writer.write(b"late")
    reader.timeout = 20
    assert reader.read(10) == b"late"
    writer.close()


# ---- flow control --------------------------------------------------------------------------------------


@pytest.mark.parametrize("steady", [False, True])
def test_a_stopped_reader_stops_the_writer_and_nobody_else(net: Any, spawn: Any, steady: bool) -> None:
    pair = net.pair(streams=2)
    writer = pair.near.open_pipe("slow")
    reader = accept(pair.far, "slow")
    size, count = MIB, 200
    sent = threading.Event()

    def write() -> None:
        with writer:
            for number in range(count):
                piece = bytes([number]) * size
                writer.write(piece if steady else bytearray(piece))
            sent.set()

    writing = spawn(write)
    until_it_stands(net, lambda: writer._ticket.size)
    assert not sent.is_set()
    assert pair.near.core.memory.piped + pair.far.core.memory.piped < 100 * MIB
    # all else goes on: messages of all sizes, and another pipe
    for message in (b"x", os.urandom(5_000_000), bytearray(3_000_000)):
        ticket = pair.near.send(message)
        assert pair.far.recv(timeout=20) == message
        ticket.wait(20)
    other = spawn(lambda: read_all(accept(pair.far, "other")))
    assert write_all(pair.near.open_pipe("other"), 1, 5_000_000) == other.outcome()
    assert not sent.is_set()
    for number in range(count):
        part = bytearray()
        while len(part) < size:
            part += reader.read(size - len(part))
        assert part == bytes([number]) * size
    assert reader.read(1) == b""
    writing.outcome()


def test_unaccepted_pipes_leave_room_for_other_channels(net: Any) -> None:
    pair = net.pair(server={"limits__open_transfers": 16})
    stop = threading.Event()
    opened: list[PipeWriter] = []

    def open_many() -> None:
        with contextlib.suppress(AmstError):
            while not stop.is_set():
                opened.append(pair.near.open_pipe("nobody reads"))
                opened[-1].write(bytes(100_000))

    thread = threading.Thread(target=open_many)
    thread.start()
    try:
        until_it_stands(net, lambda: len(opened))
        assert len(opened) < 16
        pair.near.send(b"through", channel="x").wait(20)
        assert pair.far.recv("x", timeout=20) == b"through"
    finally:
        stop.set()
        for writer in opened:
            writer.abort()
        thread.join()


def test_without_memory_it_goes_on_slowly(net: Any, spawn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The credit that came with the OPEN is a window, and a write that cannot be copied waits until it has arrived."""
    pair = net.pair()
    for end in pair.ends:
        monkeypatch.setattr(type(end.core.memory), "reserve_pipe", lambda self, size, own: False)
    reading = spawn(lambda: read_all(accept(pair.far)))
    assert write_all(pair.near.open_pipe(), 3, 5_000_000) == reading.outcome()


def test_memory_that_is_short_is_shared(net: Any, spawn: Any) -> None:
    """More pipes than there are blocks for, in the smallest session there can be."""
    small = {"limits__memory": "32MiB"}
    pair = net.pair(streams=3, client=small, server=small)
    count, total = 12, 3_000_000
    reading = [spawn(lambda c=str(c): read_all(accept(pair.far, c))) for c in range(count)]
    writing = [spawn(write_all, pair.near.open_pipe(str(c)), c, total) for c in range(count)]
    assert [task.outcome() for task in writing] == [task.outcome() for task in reading]
    for end in pair.ends:
        assert not end.core.memory.piped


def test_a_chunk_that_goes_around_the_ring(net: Any, spawn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credit is told by quarters of the window, and so ends between the reader's steps and the ring's end."""
    monkeypatch.setattr(ordered, "MOST_AHEAD", 200_000)
    stored = []
    store = ordered.OrderedSink.store
    monkeypatch.setattr(ordered.OrderedSink, "store", lambda *args: (stored.append(args[1]), store(*args))[1])
    pair = net.pair(streams=2)
    reading = spawn(lambda: read_all(accept(pair.far), 30_000))
    assert write_all(pair.near.open_pipe(), 5, 10_000_000, (1000, 70_001, 300_007)) == reading.outcome()
    assert len(stored) > 10


# ---- who gives up ------------------------------------------------------------------------------------------


def test_a_writer_that_gives_up_is_an_error_in_the_reader(net: Any, spawn: Any) -> None:
    pair = net.pair()
    writer = pair.near.open_pipe()
    reader = accept(pair.far)
    writer.write(b"begun")
    assert reader.read(5) == b"begun"
    waiting = spawn(reader.read, 1)
    writer.abort()
    assert isinstance(waiting.error(), CancelledError)
    with pytest.raises(CancelledError):
        reader.read()
    writer.close()
    with pytest.raises(ClosedError):
        writer.write(b"more")
    reader.close()
    net.wait_until(lambda: nothing_kept(*pair.ends), "the memory to come back")


def test_a_block_that_raises_gives_the_pipe_up(net: Any) -> None:
    pair = net.pair()
    with pytest.raises(ZeroDivisionError), pair.near.open_pipe() as writer:
        writer.write(b"begun")
        reader = accept(pair.far)
        raise ZeroDivisionError
    with pytest.raises(CancelledError):
        reader.readall()


def test_giving_up_wakes_a_blocked_write(net: Any, spawn: Any) -> None:
    pair = net.pair()
    writer = pair.near.open_pipe()
    reader = accept(pair.far)

    def write() -> None:
        while True:
            writer.write(bytearray(MIB))

    writing = spawn(write)
    until_it_stands(net, lambda: writer._ticket.size)
    writer.abort()
    assert isinstance(writing.error(), CancelledError | ClosedError)
    with pytest.raises(CancelledError):
        reader.readall()


def test_one_that_was_given_up_before_is_passed_over(net: Any) -> None:
    pair = net.pair()
    first, second = pair.near.open_pipe(), pair.near.open_pipe()
    first.abort()
    second.write(b"second")
    engine = pair.far.core.engine
    net.wait_until(lambda: engine._opened_in == 2 and engine.receiving == 1, "the first to be gone")
    reader = accept(pair.far)
    assert reader.read(6) == b"second"
    second.close()


def test_giving_up_while_the_end_is_not_confirmed(net: Any) -> None:
    pair = net.pair()
    writer = pair.near.open_pipe()
    writer.write(b"whole")
    with pytest.raises(DeadlineError):
        writer.close(timeout=0.1)
    writer.abort()
    net.wait_until(lambda: not pair.far._pipes._waiting, "it to be gone")
    with pytest.raises(DeadlineError):
        pair.far.accept_pipe(timeout=0.05)


def test_a_reader_that_closes_stops_the_writer(net: Any, spawn: Any) -> None:
    pair = net.pair()
    writer = pair.near.open_pipe()
    reader = accept(pair.far)

    def write() -> None:
        while True:
            writer.write(bytearray(MIB))

    writing = spawn(write)
    reader.read(10)
    reader.close()
    error = writing.error()
    assert isinstance(error, ClosedError) and "the receiver closed it after" in str(error)
    with pytest.raises(ClosedError):
        writer.close()
    with pytest.raises(ClosedError):
        reader.read(1)
    net.wait_until(lambda: nothing_kept(*pair.ends), "the memory to come back")
    pair.near.send(b"and on").wait(20)


def test_closing_wakes_a_blocked_read(net: Any, spawn: Any) -> None:
    pair = net.pair()
    writer = pair.near.open_pipe()
    reader = accept(pair.far)
    reading = spawn(reader.read, 1)
    net.wait_until(reader._reading.locked, "the read to begin")
    reader.close()
    assert isinstance(reading.error(), ClosedError)
    with pytest.raises(ClosedError):
        writer.close()


def test_a_reader_may_close_at_the_end(net: Any) -> None:
    pair = net.pair()
    with pair.near.open_pipe() as writer:
        reader = accept(pair.far)
        writer.write(bytes(100_000))
    reader.close()
    assert nothing_kept(pair.far)


def test_a_forgotten_writer_is_one_that_gave_up(net: Any) -> None:
    pair = net.pair()
    writer = pair.near.open_pipe()
    writer.write(b"begun")
    reader = accept(pair.far)
    del writer
    gc.collect()
    reader.timeout = 20
    with pytest.raises(CancelledError):
        reader.readall()


def test_a_forgotten_reader_is_one_that_closed(net: Any) -> None:
    pair = net.pair()
    writer = pair.near.open_pipe()
    accept(pair.far)
    gc.collect()
    with pytest.raises(ClosedError):
        while True:
            writer.write(bytearray(MIB))
    again = pair.near.open_pipe()
    reader = accept(pair.far)
    again.write(b"whole")
    again.close()
    del reader
    gc.collect()
    assert pair.far.core.memory._budget.in_use >= 0 and nothing_kept(pair.far)


# ---- what breaks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plaintext", [False, True])
def test_lanes_may_die_all_the_time(net: Any, spawn: Any, plaintext: bool) -> None:
    pair = net.pair(streams=4, plaintext=plaintext)
    stop = threading.Event()

    def kill() -> int:
        rng, killed = random.Random(1), 0
        while not stop.wait(0.05):
            workers = list(rng.choice(pair.ends).core.lanes.values())
            if workers:
                rng.choice(workers).lane.abort()
                killed += 1
        return killed

    killing = spawn(kill)
    reading = spawn(lambda: read_all(accept(pair.far)))
    try:
        assert write_all(pair.near.open_pipe(), 2, 60_000_000) == reading.outcome()
    finally:
        stop.set()
    assert killing.outcome() > 0
    assert nothing_kept(*pair.ends)


@pytest.mark.parametrize("side", ["near", "far"])
def test_the_control_channel_may_break_again_and_again(net: Any, spawn: Any, side: str) -> None:
    pair = net.pair(streams=3)
    stop = threading.Event()

    def cut() -> None:
        while not stop.wait(0.1):
            channel = getattr(pair, side)._loop._channel
            if channel is not None:
                with contextlib.suppress(OSError):
                    channel._sock.shutdown(socket.SHUT_RDWR)

    cutting = spawn(cut)
    reading = spawn(lambda: [read_all(accept(pair.far)) for _ in range(3)])
    try:
        written = [write_all(pair.near.open_pipe(), seed, 15_000_000) for seed in range(3)]
        assert written == reading.outcome()
    finally:
        stop.set()
    cutting.outcome()
    assert pair.near.epoch


def test_it_goes_on_while_there_is_no_control_channel(net: Any, spawn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Acknowledgements and credit travel on lanes meanwhile."""
    from amst_core.api import redial

    pair = net.pair(streams=2, client={"limits__session_timeout": "20s"}, server={"limits__session_timeout": "20s"})
    attempt, on = redial.Redialer._attempt, threading.Event()

    def maybe(redialer: redial.Redialer) -> None:
        if on.is_set():
            raise BrokenError("no way, says the test")
        attempt(redialer)

    monkeypatch.setattr(redial.Redialer, "_attempt", maybe)
    writer = pair.near.open_pipe()
    reader = accept(pair.far)
    writer.write(b"x")
    assert reader.read(1) == b"x"
    on.set()
    pair.near._loop._channel._sock.shutdown(socket.SHUT_RDWR)
    net.wait_until(lambda: not (pair.near.core.control_up or pair.far.core.control_up), "both to lose it")
    total = 150 * MIB  # more than both sides have memory for

    def write() -> None:
        piece = bytearray(MIB)
        for _ in range(total // MIB):
            writer.write(piece)

    writing = spawn(write)
    buffer, had = bytearray(MIB), 0
    while had < total:
        had += reader.readinto(buffer)
    writing.outcome()
    assert not pair.near.core.control_up
    on.clear()
    writer.close(timeout=20)
    assert reader.read() == b""


@pytest.mark.parametrize("ending", ["abort", "close", "far"])
def test_the_sessions_end_ends_every_wait(net: Any, spawn: Any, ending: str) -> None:
    pair = net.pair()
    writer, idle = pair.near.open_pipe("w"), pair.near.open_pipe("r")
    stopped = accept(pair.far, "w")
    reader = accept(pair.far, "r")

    def write() -> None:
        while True:
            writer.write(bytearray(MIB))

    tasks = [spawn(write), spawn(reader.read, 1), spawn(pair.far.accept_pipe, "none")]
    until_it_stands(net, lambda: writer._ticket.size)
    if ending == "far":
        pair.far.abort()
    elif ending == "abort":
        pair.near.abort()
    else:
        with pytest.raises(DeadlineError):
            pair.near.close(timeout=0.2)
    for task in tasks:
        assert isinstance(task.error(), ClosedError | BrokenError)
    reads = (lambda: reader.read(1), stopped.readall, lambda: accept(pair.far))
    for act in (idle.close, lambda: writer.write(b"x"), *reads):
        with pytest.raises((ClosedError, BrokenError)):
            act()
    net.wait_until(lambda: nothing_kept(*pair.ends), "the memory to come back")


def test_what_was_confirmed_is_read_after_the_session(net: Any) -> None:
    pair = net.pair()
    data = os.urandom(3_000_000)
    with pair.near.open_pipe() as writer:
        reader = accept(pair.far)
        writer.write(data)
    pair.near.close()
    net.wait_until(lambda: pair.far.error is not None, "the end to be seen")
    pair.far.wait_closed(20)
    assert pair.far.core.memory.piped, "it counts until it is read"
    assert reader.read() == data
    reader.close()
    assert not pair.far.core.memory.piped


def test_what_was_written_and_not_confirmed_is_told(net: Any) -> None:
    pair = net.pair()
    writer = pair.near.open_pipe()
    reader = accept(pair.far)
    writer.write(b"begun")
    assert reader.read(1) == b"b"
    pair.far.abort()
    net.wait_until(lambda: pair.near.core.error is not None, "the end here")  # once END is sent, it is unknown
    with pytest.raises((ClosedError, BrokenError)) as caught:
        writer.close()
    assert caught.value.delivery.undelivered == (writer.transfer,)


def test_a_side_that_stops_takes_no_new_ones(net: Any, spawn: Any) -> None:
    pair = net.pair()
    writer = pair.near.open_pipe()
    reader = accept(pair.far)
    draining = spawn(pair.far.drain, 20)
    net.wait_until(lambda: pair.far.core.draining, "it to stop")
    late = pair.near.open_pipe()
    with pytest.raises(AmstError, match="takes nothing new"):
        late.close(timeout=20)
    writer.write(b"what was open ends")
    writer.close(timeout=20)
    assert reader.read() == b"what was open ends"
    draining.outcome()


def test_a_forked_child_leaves_the_parents_pipes_alone(net: Any) -> None:
    pair = net.pair()
    writer = pair.near.open_pipe()
    reader = accept(pair.far)
    child = os.fork()
    if not child:
        code = 1
        with contextlib.suppress(BaseException):
            for act in (lambda: writer.write(b"x"), lambda: reader.read(1)):
                try:
                    act()
                except UsageError:
                    code += 1
            writer.abort()
            writer.close()
            reader.close()
            gc.collect()
            code -= 3
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    writer.write(b"still ours")
    writer.close(timeout=20)
    assert reader.read() == b"still ours"


def test_rates_hold_for_pipes(net: Any, spawn: Any) -> None:
    pair = net.pair()
    assert MIN_RATE <= 2_000_000
    pair.near.limit_rate(2_000_000)
    began = time.monotonic()
    reading = spawn(lambda: read_all(accept(pair.far)))
    assert write_all(pair.near.open_pipe(), 9, 2_000_000) == reading.outcome()
    assert time.monotonic() - began > 0.7
