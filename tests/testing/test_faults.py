"""Faults strike where they are told to, once in each lane, and leave everything else as it was."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from queue import SimpleQueue
from typing import Any

import broken_transports
import pytest
from leftovers import no_leftovers
from waiting import Task, wait_until

from amst_core.errors import BrokenError, ClosedError, UsageError
from amst_core.interfaces import HEADER_SIZE, Lane, LaneRequest, LaneTimeouts, Placer, Transport
from amst_core.testing import (
    Cut,
    Delay,
    Direction,
    End,
    Fail,
    Fault,
    FaultyLane,
    Flip,
    MemoryNetwork,
    MemoryTransport,
    Stall,
    check_lane_pair,
    check_transport,
    faulty,
    memory_lane_pair,
    rules,
)

SENDING, RECEIVING = Direction.SENDING, Direction.RECEIVING
BOTH = pytest.mark.parametrize("direction", Direction)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    with no_leftovers():
        yield


def header(number: int) -> bytes:
    return bytes([number]) * HEADER_SIZE


def send(lane: Lane, number: int, payload: bytes = b"0123456789") -> None:
    lane.send_frame(header(number), memoryview(payload))


def receive(lane: Lane, size: int = 10) -> tuple[bytes, bytes] | None:
    buffer = bytearray(size)
    head = lane.recv_frame(lambda _head: memoryview(buffer))
    return None if head is None else (head, bytes(buffer))


def pair(*faults: Fault) -> tuple[Lane, Lane]:
    """A sender and a receiver, with ``faults`` on the side that they are of."""
    near, far = memory_lane_pair(LaneTimeouts(read_s=20, write_s=20))
    of = {direction: [fault for fault in faults if fault.direction is direction] for direction in Direction}
    return FaultyLane(near, of[SENDING]), FaultyLane(far, of[RECEIVING])


def whole(number: int) -> tuple[bytes, bytes]:
    return header(number), b"0123456789"


def test_without_faults_a_lane_keeps_every_rule() -> None:
    def make_pair(timeouts: LaneTimeouts) -> tuple[Lane, Lane]:
        near, far = memory_lane_pair(timeouts)
        return FaultyLane(near), FaultyLane(far)

    conformance = check_lane_pair(make_pair, more_than_holds=1 << 20)
    assert set(conformance.skipped) == {
        "slow-send-is-no-timeout",
        "slow-receive-is-no-timeout",
        "read-timeout-inside-a-frame",
        "end-inside-a-frame-is-broken",
    }, "those that need a StreamLane"


def test_a_bound_of_what_waits_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    near, _far = memory_lane_pair()
    asked: list[int] = []
    monkeypatch.setattr(near, "limit_unsent", asked.append)
    FaultyLane(near).limit_unsent(40_000)
    assert asked == [40_000]


@pytest.mark.parametrize("kind", ["own listener", "the core's listener"])
def test_without_faults_a_transport_keeps_every_rule(kind: str) -> None:
    def make_transport(network: Any) -> Transport:
        made = MemoryTransport if kind == "own listener" else broken_transports.AdoptingTransport
        return faulty(made(network), lambda _number: ())

    only = [name for name in rules(check_transport) if name not in ("probe-is-quick", "connect-keeps-its-deadline")]
    check_transport(partial(make_transport, broken_transports.Network()), more_than_holds=1 << 20, only=only)


# ---- cut, end ---------------------------------------------------------------------------------------


@BOTH
def test_a_cut_between_frames_lets_the_ones_before_it_pass(direction: Direction) -> None:
    fault = Cut(direction=direction, after_frames=2)
    near, far = pair(fault)
    for number in range(2):
        send(near, number)
        assert receive(far) == whole(number)
    assert not fault.struck.is_set()
    sending, receiving = Task(send, near, 2), Task(receive, far)
    assert isinstance(receiving.error(), BrokenError)
    assert fault.struck.is_set()
    if direction is SENDING:
        assert isinstance(sending.error(), BrokenError)
    for lane in (near, far):
        with pytest.raises(BrokenError):
            receive(lane)


def test_the_one_side_that_did_not_ask_for_it_sees_broken_and_the_one_that_ends_it_closed() -> None:
    near, _far = pair(Cut())
    with pytest.raises(BrokenError, match="cut by a fault of the test"):
        send(near, 0)
    near.abort()
    with pytest.raises(ClosedError):
        send(near, 1)


@pytest.mark.parametrize("into", [1, HEADER_SIZE, HEADER_SIZE + 3, 3 * (HEADER_SIZE + 10) + 5])
def test_bytes_count_over_frames_and_the_rest_of_a_frame_never_comes(into: int) -> None:
    near, far = pair(End(into=into))
    before = into // (HEADER_SIZE + 10)
    for number in range(before):
        send(near, number)
        assert receive(far) == whole(number)
    with pytest.raises(BrokenError, match="closed by a fault"):
        send(near, before)
    with pytest.raises(BrokenError, match="inside a frame"):
        receive(far)
    assert far.path_stats().bytes_received == into


def test_an_end_between_frames_is_clean_to_the_peer() -> None:
    near, far = pair(End(after_frames=1))
    send(near, 0)
    with pytest.raises(BrokenError):
        send(near, 1)
    assert receive(far) == whole(0)
    assert receive(far) is None


# ---- stall, delay, fail -----------------------------------------------------------------------------


@pytest.mark.parametrize("into", [0, 7, HEADER_SIZE + 4])
@BOTH
def test_a_stall_holds_a_frame_until_it_is_released(direction: Direction, into: int) -> None:
    fault = Stall(direction=direction, into=into)
    near, far = pair(fault)
    sending, receiving = Task(send, near, 0), Task(receive, far)
    wait_until(fault.struck.is_set, "the stall")
    assert receiving.running
    if direction is SENDING:
        assert sending.running
        assert far.path_stats().bytes_received == into
    fault.released.set()
    assert receiving.outcome() == whole(0)
    sending.outcome()
    send(near, 1)
    assert receive(far) == whole(1)


@BOTH
def test_the_end_of_a_lane_ends_its_stall(direction: Direction) -> None:
    fault = Stall(direction=direction, into=5)
    near, far = pair(fault)
    tasks = {SENDING: Task(send, near, 0), RECEIVING: Task(receive, far)}
    wait_until(fault.struck.is_set, "the stall")
    (near if direction is SENDING else far).abort()
    assert isinstance(tasks[direction].error(), ClosedError)
    tasks[RECEIVING].error()


@BOTH
def test_every_frame_from_there_on_is_delayed(direction: Direction, monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = pair(Delay(direction=direction, after_frames=1, seconds=5.0))
    slow = near if direction is SENDING else far
    waited: list[float] = []
    monkeypatch.setattr(slow._ended, "wait", waited.append)  # type: ignore[attr-defined]
    for number in range(4):
        send(near, number)
        assert receive(far) == whole(number)
    assert waited == [5.0, 5.0, 5.0]


@BOTH
def test_what_is_asked_for_is_raised_once_and_the_lane_itself_is_left(direction: Direction) -> None:
    near, far = pair(Fail(direction=direction, after_frames=1, error=RuntimeError("planned")))
    send(near, 0)
    assert receive(far) == whole(0)
    if direction is RECEIVING:
        send(near, 1)
    with pytest.raises(RuntimeError, match="planned"):
        send(near, 1) if direction is SENDING else receive(far)
    if direction is SENDING:
        send(near, 2)
        assert receive(far) == whole(2)


# ---- flip -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("into", [0, 31, 32, 41])
@BOTH
def test_one_bit_of_one_byte_is_another_one(direction: Direction, into: int) -> None:
    near, far = pair(Flip(direction=direction, after_frames=1, into=into, bit=6))
    mine = bytearray(b"0123456789")
    for number in range(3):
        near.send_frame(header(number), memoryview(mine))
        got = receive(far)
        assert got is not None
        expected = bytearray(b"".join(whole(number)))
        if number == 1:
            expected[into] ^= 1 << 6
        assert b"".join(got) == expected
    assert mine == b"0123456789", "the sender's own memory is left alone"


def test_place_sees_the_header_that_recv_frame_returns() -> None:
    near, far = pair(Flip(direction=RECEIVING, into=3))
    send(near, 1)
    seen: list[bytes] = []

    def place(head: memoryview) -> memoryview:
        seen.append(bytes(head))
        return memoryview(bytearray(10))

    assert seen == [far.recv_frame(place)] != [header(1)]


# ---- plans ------------------------------------------------------------------------------------------


def test_frames_that_do_not_match_pass_and_are_not_counted() -> None:
    near, far = pair(Flip(after_frames=1, into=40, matching=lambda head: head[0] == 7))
    for number in (1, 7, 2, 7, 7):
        send(near, number)
    got = [receive(far) for _ in range(5)]
    assert [frame == whole(number) for frame, number in zip(got, (1, 7, 2, 7, 7), strict=True)] == [
        True, True, True, False, True,
    ]  # fmt: skip


def test_several_faults_strike_one_lane() -> None:
    near, far = pair(Flip(into=33), Flip(into=34), Flip(after_frames=1, into=33), Cut(after_frames=2))
    for number in range(2):
        send(near, number)
    assert receive(far) == (header(0), b"0033456789")
    assert receive(far) == (header(1), b"0023456789"), "only the third one"
    with pytest.raises(BrokenError):
        send(near, 2)


def test_lanes_are_numbered_as_they_come() -> None:
    network = MemoryNetwork()
    arrived: SimpleQueue[Lane] = SimpleQueue()
    opener = faulty(MemoryTransport(network), lambda number: [Cut()] if number < 2 else [])
    advertisement = faulty(MemoryTransport(network), lambda number: [Flip(into=40)]).advertise(1, arrived.put)
    request = LaneRequest(advertisement, "", 0, b"", 5.0)
    for number in range(4):
        near = opener.connect(request, LaneTimeouts())
        far = arrived.get(timeout=20)
        if number < 2:
            with pytest.raises(BrokenError):
                send(near, number)
            continue
        send(near, number)
        assert receive(far) == whole(number)
        send(far, number)
        assert receive(near) != whole(number), "lanes that arrive have faults of their own"


def test_a_fault_inside_a_frame_takes_a_stream_lane() -> None:
    class WholeFramesOnly(Lane):
        def send_frame(self, header: bytes, payload: memoryview) -> None:
            raise AssertionError("nothing is sent")

        def recv_frame(self, place: Placer) -> bytes | None:
            return None

        def close(self) -> None:
            pass

        def abort(self) -> None:
            pass

    with pytest.raises(UsageError, match="whole frames only"):
        send(FaultyLane(WholeFramesOnly(), [Cut(into=5)]), 0)


def test_a_place_before_the_first_byte_is_refused() -> None:
    with pytest.raises(UsageError):
        Cut(after_frames=-1)
