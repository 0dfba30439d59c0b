"""A peer that holds the token and lies in its pipes, or in files of unknown size."""

from __future__ import annotations

from typing import Any

import pytest
from hostile_peer import MAX_OFFSET, U64, RawClient, RawServer, resident
from waiting import wait_until

import amst_core
from amst_core.errors import CancelledError, ClosedError
from amst_core.wire.messages import (
    FILE,
    PIPE,
    SIZE_UNKNOWN,
    Ack,
    Close,
    Credit,
    End,
    LaneLost,
    Message,
    Open,
    Request,
    Reset,
    Result,
)

pytestmark = pytest.mark.needs_transport

SETTINGS = {"limits.memory": "32MiB", "limits.open_transfers": 16, "limits.handshake_timeout": "2s"}
PART = 10_000


class World:
    """A hostile session in which pipe 1 is under way: its first bytes are there, and it has been accepted."""

    def __init__(self, ground: Any) -> None:
        self.client: RawClient = ground.client(lanes=2)
        self.control = self.client.control
        self.lane, self.other = self.client.lanes
        self.far = ground.far(self.client)
        self.credit = self.client.limits.initial_credit
        self.control.send(Open(1, PIPE, SIZE_UNKNOWN, 0, "", {}))
        self.reader = ground.keep(self.far.accept_pipe(timeout=10))
        self.reader.timeout = 10
        credit = self.control.await_(Credit, lambda credit: credit.limits[0][0] == 1)
        self.granted = credit.limits[0][1]
        self.lane.data(1, 0, b"a" * PART)
        self.control.await_(Ack, lambda ack: (1, PART, ()) in ack.held)

    def complete(self) -> None:
        """The pipe comes to its end all the same."""
        self.other.data(1, PART, b"b" * PART)
        self.control.send(End(1, 2 * PART))
        assert self.control.await_(Result) == Result(1, "", "")
        assert self.reader.read() == b"a" * PART + b"b" * PART


BAD: dict[str, Message] = {
    **{f"a pipe of {n} bytes": Open(2, PIPE, n, 0, "", {}) for n in (0, 1, MAX_OFFSET, MAX_OFFSET + 1)},
    "a pipe on hold": Open(2, PIPE, SIZE_UNKNOWN, 0, "", {"hold": True}),
    "a pipe in a long channel": Open(2, PIPE, SIZE_UNKNOWN, 0, "c" * 256, {}),
    **{f"an end at {n}": End(1, n) for n in (0, PART - 1)},
    **{
        f"a {kind} of unknown size": Open(
            2, FILE, SIZE_UNKNOWN, 0, "", {"path": b"x", "type": kind, "mode": 0, "mtime_ns": 0, "target": b"y"}
        )
        for kind in ("directory", "symlink")
    },
    "a file of unknown size on hold": Open(
        2, FILE, SIZE_UNKNOWN, 0, "", {"path": b"x", "type": "file", "mode": 0, "mtime_ns": 0, "hold": True}
    ),
}


@pytest.mark.parametrize("lie", BAD.values(), ids=BAD)
def test_what_no_honest_peer_says_ends_the_session_and_never_the_pipe(ground: Any, lie: Message) -> None:
    world = World(ground)
    world.control.send(lie)
    assert world.control.refused() == "protocol"
    with pytest.raises(amst_core.AmstError):  # never a silent end
        world.reader.readall()


def test_two_ends(ground: Any) -> None:
    world = World(ground)
    world.control.send(End(1, 2 * PART), End(1, 2 * PART))
    assert world.control.refused() == "protocol"


@pytest.mark.parametrize("beyond", [1, 1 << 20, MAX_OFFSET - (1 << 40)])
def test_data_past_the_credit_costs_the_lane(ground: Any, beyond: int) -> None:
    world = World(ground)
    world.lane.data(1, world.granted + beyond - 10, b"x" * 10)
    assert world.client.lost(world.lane) == "protocol"
    world.complete()


def test_data_past_the_credit_of_what_nobody_has_accepted(ground: Any) -> None:
    world = World(ground)
    world.control.send(Open(2, PIPE, SIZE_UNKNOWN, 0, "late", {}))
    world.lane.data(2, world.credit - 9, b"x" * 10)
    assert world.client.lost(world.lane) == "protocol"
    world.complete()


def test_data_past_the_end(ground: Any) -> None:
    world = World(ground)
    world.control.send(End(1, 2 * PART))
    world.control.alive()
    world.lane.data(1, 2 * PART, b"x")
    assert world.client.lost(world.lane) == "protocol"
    world.other.data(1, PART, b"b" * PART)
    assert world.control.await_(Result) == Result(1, "", "")


def test_an_end_with_a_gap_before_it_is_no_end(ground: Any) -> None:
    world = World(ground)
    world.lane.data(1, PART + 1, b"b" * (PART - 1))
    world.control.send(End(1, 2 * PART))
    world.lane.alive()
    assert len(world.reader.read(1 << 20)) == PART
    world.reader.timeout = 0.2
    with pytest.raises(amst_core.errors.DeadlineError):
        world.reader.read(1)
    world.reader.timeout = 10
    world.other.data(1, PART, b"b")
    assert world.reader.read() == b"b" * PART


def test_other_bytes_for_what_is_held_are_dropped(ground: Any) -> None:
    world = World(ground)
    for start, size in ((0, PART), (1, 5), (PART - 1, 1)):
        world.other.data(1, start, b"z" * size)
    world.other.alive()
    world.complete()


def test_a_span_that_is_partly_held_is_not_written(ground: Any) -> None:
    world = World(ground)
    world.other.data(1, PART - 5, b"z" * 10)
    world.other.alive()
    world.complete()


def test_one_that_is_reset_in_the_middle_is_an_error(ground: Any) -> None:
    world = World(ground)
    world.control.send(Reset(1, "", "enough"))
    with pytest.raises(CancelledError, match="enough"):
        world.reader.readall()
    world.lane.data(1, PART, b"late")
    world.lane.alive()


def test_a_reset_after_the_end_that_was_not_confirmed(ground: Any) -> None:
    """Whole, but never accepted: then it is gone, and the place it had is free."""
    world = World(ground)
    for number in range(2, 100):
        world.control.send(Open(number, PIPE, SIZE_UNKNOWN, 0, "late", {}), End(number, 3))
        world.lane.data(number, 0, b"abc")
        world.lane.alive()
        world.control.send(Reset(number, "cancelled", ""))
    world.control.alive()
    wait_until(lambda: not world.far._pipes._waiting, "nothing to wait")
    world.complete()


def test_pipes_that_nobody_accepts_are_bounded(ground: Any) -> None:
    world = World(ground)
    most = world.client.limits.max_open
    before = resident()
    for number in range(2, most + 1):
        world.control.send(Open(number, PIPE, SIZE_UNKNOWN, 0, f"{number}", {}))
        world.lane.data(number, 0, bytes(world.credit))
    world.lane.alive()
    assert resident() - before < most * world.credit + (16 << 20)
    world.control.send(Open(most + 1, PIPE, SIZE_UNKNOWN, 0, "", {}))
    assert world.control.refused() == "protocol"


def test_more_than_the_reader_takes_is_not_granted(ground: Any) -> None:
    world = World(ground)
    before = resident()
    at, chunk = PART, 1 << 16
    while at + chunk <= world.granted:
        world.lane.data(1, at, bytes(chunk))
        at += chunk
    world.lane.alive()
    assert resident() - before < 32 << 20
    assert not any(isinstance(m, Credit) and m.limits[0][1] > world.granted for m in world.control.heard)
    world.lane.data(1, at, bytes(chunk))
    assert world.client.lost(world.lane) == "protocol"


def test_lanes_that_die_in_the_middle_of_a_chunk_leave_nothing_of_it(ground: Any) -> None:
    world = World(ground)
    world.lane.raw(world.lane._header(1, bytes(PART), 0, transfer=1, offset=PART, length=PART)[:32] + b"x" * 100)
    world.lane.close()
    world.control.await_(LaneLost)
    world.complete()


# ---- files of unknown size ---------------------------------------------------------------------------


def test_a_file_of_unknown_size_that_never_ends_appears_nowhere(ground: Any) -> None:
    world = World(ground)
    entry = {"path": b"endless", "type": "file", "mode": 0o644, "mtime_ns": 0, "identity": b"me"}
    world.control.send(Open(2, FILE, SIZE_UNKNOWN, 0, "", entry))
    world.lane.data(2, 0, bytes(2 << 10))
    world.lane.alive()
    assert not (ground.root / "endless").exists()
    world.client.close()
    world.far.abort()
    wait_until(lambda: not list(ground.root.glob(".amst-*endless*")), "the temporary file to go")
    assert not (ground.root / "endless").exists()


def test_an_answer_of_unknown_size_is_none(raw_server: RawServer, spawn: Any, tmp_path: Any) -> None:
    def fetch() -> None:
        with amst_core.connect(raw_server.address, token=raw_server.token, streams=1) as session:
            session.recv_file("x", tmp_path / "y")

    fetching = spawn(fetch)
    raw_server.agree()
    raw_server.control.await_(Request)
    entry = {"path": b"", "type": "file", "mode": 0o644, "mtime_ns": 0}
    raw_server.control.send(Open(1, FILE, SIZE_UNKNOWN, 1, "", entry))
    assert raw_server.control.await_(Close).kind == "protocol"
    raw_server.control.close()
    assert isinstance(fetching.error(), amst_core.AmstError)
    assert not (tmp_path / "y").exists()


# ---- against a writer --------------------------------------------------------------------------------


@pytest.fixture
def writing(raw_server: RawServer, spawn: Any) -> Any:
    """A real client that writes to its pipe 1 until it cannot."""

    def write() -> None:
        with (
            amst_core.connect(raw_server.address, token=raw_server.token, streams=1) as session,
            session.open_pipe() as pipe,
        ):
            while True:
                pipe.write(bytearray(1000))

    task = spawn(write)
    raw_server.agree()
    opened = raw_server.control.await_(Open)
    assert (opened.transfer, opened.kind, opened.size) == (1, PIPE, SIZE_UNKNOWN)
    return task


LIES: dict[str, Message] = {
    "everything is there": Result(1, "", ""),
    **{f"credit up to {n}": Credit(((1, n),)) for n in (MAX_OFFSET + 1, U64)},
    "more is held than was sent": Ack(((1, MAX_OFFSET, ()),)),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_receiver_that_lies_is_not_believed(raw_server: RawServer, writing: Any, lie: Message) -> None:
    raw_server.control.send(lie)
    assert raw_server.control.refused() == "protocol"
    assert writing.error().kind == "protocol"


def test_a_receiver_that_gives_up_is_believed(raw_server: RawServer, writing: Any) -> None:
    raw_server.control.send(Result(1, "closed", "no more"))
    raw_server.control.await_(Close)
    raw_server.control.send(Close("", ""))
    raw_server.control.close()
    assert isinstance(writing.error(), ClosedError | amst_core.AmstError)
