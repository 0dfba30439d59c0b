"""A peer that holds the token and lies on the control channel: every message, every field, in several states."""

from __future__ import annotations

import dataclasses
import json
import time
import typing
from pathlib import Path
from typing import Any

import pytest
from hostile_peer import MAX_OFFSET, U64, Ended, RawClient, record, resident
from waiting import wait_until

from amst_core.errors import AmstError, IntegrityError, RefusedError
from amst_core.wire.frames import FrameKind
from amst_core.wire.messages import (
    FILE,
    MESSAGE,
    PIPE,
    SIZE_UNKNOWN,
    Accept,
    Ack,
    Close,
    Credit,
    End,
    Hello,
    LaneGrant,
    LaneLost,
    LaneRequest,
    Message,
    Missing,
    Open,
    Opened,
    Params,
    Ping,
    Pong,
    Proof,
    Propose,
    Reply,
    Request,
    Reset,
    Result,
    Resume,
    Same,
    Seen,
    encode,
)

pytestmark = pytest.mark.needs_transport

SETTINGS = {
    "limits.handshake_timeout": "3s",
    "limits.open_transfers": 16,
    "limits.memory": "32MiB",
    "limits.max_message": "1MiB",
    "transport.amst.max_streams": 8,
}
MEMORY = 32 << 20
NOTABLE = 16 << 20

PART = 50_000
SIZE = 100_000
"""Bytes of the transfers that are under way, and of what has been sent of them."""


class World:
    """A hostile session in which a transfer has ended, one was refused and one is under way, in each direction.

    Its own: 1 delivered, 2 half sent, 3 refused. The server's: 1 delivered, 2 sent as far as the credit goes.
    """

    def __init__(self, ground: Any) -> None:
        self.ground = ground
        self.client: RawClient = ground.client(credit=60_000)
        self.control = self.client.control
        self.far = ground.far(self.client)
        lane = self.client.lanes[0]
        self.control.send(
            Open(1, MESSAGE, 10, 0, "", {}),
            Open(2, MESSAGE, SIZE, 0, "two", {}),
            Open(3, MESSAGE, SIZE_UNKNOWN, 0, "", {}),
        )
        lane.data(1, 0, b"x" * 10)
        self.control.send(End(1, 10))
        self.delivered = self.far.send(b"y" * 10)
        self.ticket = self.far.send(bytes(SIZE), channel="long")  # behind nothing: it may begin before it has credit
        got = 0
        while got < 60_000 + 10:
            got += lane.await_(FrameKind.DATA)[0].length
        self.control.send(Result(1, "", ""))
        lane.data(2, 0, bytes(PART))
        self.results = {}
        while len(self.results) < 2:
            result = self.control.await_(Result)
            self.results[result.transfer] = result.kind
        assert self.results == {1: "", 3: "refused"}
        self.control.await_(Ack, lambda ack: any(entry[:2] == (2, PART) for entry in ack.held))
        self.delivered.wait(10)


def attributes(**changes: Any) -> dict[str, Any]:
    """A FILE's attributes; None takes one away."""
    whole = {"path": b"new", "type": "file", "mode": 0o644, "mtime_ns": 0, **changes}
    return {key: value for key, value in whole.items() if value is not None}


def opens(transfer: int = 4, kind: int = MESSAGE, size: int = 5, request: int = 0, **more: Any) -> Open:
    return Open(transfer, kind, size, request, "", more)


def opens_file(size: int = 5, **changes: Any) -> Open:
    return Open(4, FILE, size, 0, "", attributes(**changes))


NEVER_OPENED = {"0": 0, "not yet": 4, "2^63": 1 << 63, "2^64-1": U64}
NEVER_SENT = {"0": 0, "not yet": 3, "2^63": 1 << 63, "2^64-1": U64}

# ---- what ends the session ------------------------------------------------------------------------

FORBIDDEN: dict[str, Message | bytes | tuple[Message | bytes, ...]] = {
    # handshake messages after the handshake
    "HELLO": Hello((1,), bytes(32), {}),
    "PROOF": Proof(bytes(32)),
    "PARAMS": Params(bytes(32), 1, 1, 1, (), {}),
    "RESUME": Resume(1, 0, bytes(32)),
    # records
    **{f"type {number}": record(number, bytes(9)) for number in (0, 25, 255)},
    **{f"a record of {n}": record(16, bytes(8), length=n) for n in (0, (1 << 20) + 1, (1 << 32) - 1)},
    # modes
    "PROPOSE of no mode": Propose(1, "warp", False, 1, 1, 1, ""),
    "PROPOSE of a long mode": Propose(1, "m" * 65535, False, 1, 1, 1, ""),
    "PROPOSE of no epoch": Propose(0, "internet", False, 1, 1, 1, ""),
    "PROPOSE of an epoch again": (Propose(7, "internet", False, 1, 1, 1, ""), Propose(7, "hybrid", False, 1, 1, 1, "")),
    "PROPOSE of no streams": Propose(1, "internet", False, 0, 0, 0, ""),
    "PROPOSE of a range upside down": Propose(1, "internet", False, 8, 9, 7, ""),
    "ACCEPT from the side that proposes": Accept(1, "internet", False, ""),
    # lanes
    "LANE_REQUEST of what was not advertised": LaneRequest(1, "carrier-pigeon"),
    "LANE_REQUEST of nothing": LaneRequest(1, ""),
    "LANE_REQUEST of a long name": LaneRequest(65535, "t" * 65535),
    **{f"LANE_GRANT of {first}": LaneGrant(first, 1, "tcp") for first in (0, 1, U64)},
    "LANE_GRANT of none": LaneGrant(1, 0, "tcp"),
    "LANE_GRANT of many": LaneGrant(1, 65535, "tcp"),
    # OPEN
    **{f"OPEN of transfer {n}": opens(transfer=n) for n in (0, 1, 2, 3, 5, 1 << 63, U64)},
    **{f"OPEN of kind {n}": opens(kind=n) for n in (0, 4, 255)},
    **{f"OPEN of {n} bytes": opens(size=n) for n in (1 << 63, (1 << 63) + 1, U64 - 1)},
    **{f"OPEN of a file of {n} bytes": opens_file(size=n) for n in (1 << 63, U64 - 1)},
    "a message on hold": opens(hold=True),
    "a pipe on hold": opens(kind=PIPE, size=SIZE_UNKNOWN, hold=True),
    "too many OPENs": tuple(opens(transfer=n, size=100_000) for n in range(4, 4 + 17)),
    **{f"a file without {key}": opens_file(**{key: None}) for key in attributes()},
    **{
        f"a file whose {key} is {value!r}": opens_file(**{key: value})
        for key, value in (
            ("path", "text"), ("path", 1), ("path", True), ("type", b"file"), ("type", 1), ("type", "fifo"),
            ("type", ""), ("mode", "644"), ("mode", True), ("mode", -1), ("mode", 0o10000), ("mode", (1 << 63) - 1),
            ("mtime_ns", b"0"), ("mtime_ns", False), ("hold", 1), ("hold", "true"), ("hold", b""), ("identity", "x"),
            ("identity", 1), ("identity", b"x" * 65),
        )
    },
    "a directory with bytes": opens_file(size=1, type="directory"),
    "a link with bytes": opens_file(size=1, type="symlink", target=b"x"),
    **{
        f"a link to {str(target)[:12]}": opens_file(size=0, type="symlink", target=target)
        for target in (None, b"", b"a\0b", b"x" * 4096, "text", 1)
    },
    # about the hostile peer's own transfers
    **{f"END of {what}": End(n, 5) for what, n in NEVER_OPENED.items()},
    **{f"RESET of {what}": Reset(n, "", "") for what, n in NEVER_OPENED.items()},
    **{f"SAME of {what}": Same(n, True) for what, n in NEVER_OPENED.items()},
    **{f"END at {total}": End(2, total) for total in (0, PART - 1, PART, SIZE - 1, SIZE + 1, 1 << 63, U64)},
    "END twice": (End(2, SIZE), End(2, SIZE)),
    "ENDs that contradict": (End(2, SIZE), End(2, SIZE - 1)),
    "SAME without a question": Same(2, True),
    # about the server's
    **{f"ACK of {what}": Ack(((n, 1, ()),)) for what, n in NEVER_SENT.items()},
    **{f"ACK of nothing of {what}": Ack(((n, 0, ()),)) for what, n in NEVER_SENT.items()},
    **{f"ACK of what was never sent, {n}": Ack(((2, n, ()),)) for n in (60_001, SIZE, SIZE + 1, 1 << 63, U64)},
    **{
        f"ACK of the span {spans}": Ack(((2, prefix, spans),))
        for prefix, spans in (
            (0, ((5, 5),)), (0, ((9, 5),)), (0, ((5, 0),)), (0, ((0, 0),)), (0, ((U64, 0),)),
            (10, ((30, 20),)), (10, ((20, 30), (50, 50))), (0, ((59_999, 60_001),)), (0, ((60_000, 60_001),)),
            (0, ((U64 - 1, U64),)), (0, ((1 << 63, U64),)),
        )
    },
    "ACK of one thing and of what never was": Ack(((2, 1, ()), (9, 1, ()))),
    **{f"CREDIT for {what}": Credit(((n, 5),)) for what, n in NEVER_SENT.items()},
    **{f"CREDIT of {n}": Credit(((2, n),)) for n in (1 << 63, U64)},
    "CREDIT that is fine, and one that is not": Credit(((2, 70_000), (2, U64))),
    **{f"RESULT of {what}": Result(n, "", "") for what, n in NEVER_SENT.items()},
    "RESULT before everything was sent": Result(2, "", ""),
    **{f"MISSING of {what}": Missing(n, 0, 1) for what, n in NEVER_SENT.items()},
    **{f"OPENED of {what}": Opened(n, (), b"") for what, n in NEVER_SENT.items()},
    "OPENED of a message": Opened(2, (), b""),
    "OPENED of a message, with spans": Opened(2, ((0, 10),), b""),
    "OPENED of a message, with a digest": Opened(2, (), bytes(32)),
    **{f"SEEN of {n}": Seen(n) for n in (1000, 1 << 63, U64)},
}  # fmt: skip


@pytest.mark.parametrize("lie", FORBIDDEN.values(), ids=FORBIDDEN)
def test_what_is_forbidden_ends_that_session(ground: Any, lie: Any) -> None:
    before = resident()
    world = World(ground)
    world.control.send(*(lie if isinstance(lie, tuple) else (lie,)))
    assert world.control.refused() == "protocol"
    assert world.far.wait_closed(10)
    assert world.far.error.kind == "protocol"
    assert all(lane.hangs_up() for lane in world.client.lanes)
    assert resident() - before < NOTABLE


VECTORS = [
    bytes.fromhex(entry["record"])
    for entry in json.loads((Path(__file__).parents[1] / "wire" / "vectors.json").read_text("utf-8"))["messages"]
]
CUT = {f"{raw[4]} cut": record(raw[4], raw[5:-1]) for raw in VECTORS if len(raw) > 5}
LONG = {f"{raw[4]} too long": record(raw[4], raw[5:] + b"\0") for raw in VECTORS}


@pytest.mark.parametrize("lie", (CUT | LONG).values(), ids=CUT | LONG)
def test_records_that_do_not_end_where_their_fields_end(ground: Any, lie: bytes) -> None:
    client = ground.client(lanes=1)
    client.control.send(lie)
    assert client.control.refused() == "protocol"


# ---- what changes nothing ------------------------------------------------------------------------

IGNORED: dict[str, Message | tuple[Message, ...]] = {
    "END of one that ended": End(1, 5),
    "END of one refused": End(3, U64),
    "RESET of one that ended": Reset(1, "cancelled", "late"),
    "SAME of one that ended": Same(1, True),
    "ACK of one that ended": Ack(((1, 10, ()),)),
    "ACK of more than one that ended had": Ack(((1, U64, ((9, 3),)),)),
    "ACK of nothing": Ack(()),
    "ACK that claims nothing": Ack(((2, 0, ()),)),
    "ACKs without end": tuple(Ack(((2, 60_000, ()),)) for _ in range(1000)),
    "CREDIT of one that ended": Credit(((1, MAX_OFFSET),)),
    "CREDIT that falls": Credit(((2, 0), (2, 1))),
    "RESULT of one that ended": Result(1, "error", "late"),
    "MISSING of one that ended": Missing(1, 0, 10),
    **{
        f"MISSING of {length} at {offset}": Missing(2, offset, length)
        for offset, length in ((60_000, 1), (SIZE, 1 << 31), (U64, (1 << 32) - 1), (1 << 63, 0), (0, 0), (60_001, 5))
    },
    "OPENED of one that ended": Opened(1, ((5, 1),), b"?"),
    "REPLY to nothing": (Reply(1, "", "", {}), Reply(0, "error", "?", {"a": 1}), Reply(U64, "", "", {})),
    "PONG to nothing": Pong(1),
    "SEEN of none": Seen(0),
    "LANE_LOST of lanes that never were": (LaneLost(0, "integrity", ""), LaneLost(U64, "integrity", "")) * 3,
    "LANE_LOST with words": LaneLost(1 << 60, "k" * 65535, "m" * 3000),
}


@pytest.mark.parametrize("lie", IGNORED.values(), ids=IGNORED)
def test_what_crosses_or_makes_no_difference_is_ignored(ground: Any, lie: Any) -> None:
    world = World(ground)
    world.control.send(*(lie if isinstance(lie, tuple) else (lie,)))
    world.control.alive()
    # and what was under way comes to its end
    lane = world.client.lanes[0]
    lane.data(2, PART, bytes(SIZE - PART))
    world.control.send(End(2, SIZE), Credit(((2, MAX_OFFSET),)))
    heard = [world.control.await_(Result | End) for _ in range(2)]
    assert Result(2, "", "") in heard and End(2, SIZE) in heard
    world.control.send(Result(2, "", ""))
    world.ticket.wait(10)


# ---- what fails one transfer only ------------------------------------------------------------------

REFUSED: dict[str, tuple[Open, str]] = {
    "a message of unknown size": (opens(size=SIZE_UNKNOWN), "refused"),
    "a message of 2^63-1": (opens(size=MAX_OFFSET), "refused"),
    "a message of 2^60": (opens(size=1 << 60), "refused"),
    "a message one too long": (opens(size=(1 << 20) + 1), "refused"),
    "a message for no request": (opens(request=1), "refused"),
    "a pipe for no request": (opens(kind=PIPE, size=SIZE_UNKNOWN, request=U64), "refused"),
    **{
        f"the answer to request {n}": (Open(4, FILE, 5, n, "", attributes()), "refused") for n in (1, 1 << 63, U64)
    },
    **{
        f"a file at {path!r}"[:40]: (opens_file(path=path), kind)
        for path, kind in (
            (b"/etc/passwd", "refused"), (b"/", "refused"), (b"..", "refused"), (b".", "refused"),
            (b"../outside/secret", "refused"), (b"directory/../victim", "refused"), (b"directory/./x", "refused"),
            (b"directory//x", "refused"), (b"directory/", "refused"), (b"a\0b", "refused"), (b"\0", "refused"),
            (b".amst-x", "refused"), (b".amst-", "refused"), (b"directory/.amst-x.part", "refused"),
            (b".amst-d/x", "refused"), (b"x" * 256, "storage"), (b"d/" * 300 + b"x", "storage"),
            (b"x/" * 2047 + b"yyy", "storage"), (b"x" * 100_000, "storage"),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize(("lie", "kind"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_taken_is_refused_and_nothing_else_suffers(ground: Any, lie: Open, kind: str) -> None:
    world = World(ground)
    world.control.send(lie)
    result = world.control.await_(Result)
    assert (result.transfer, result.kind) == (4, kind)
    world.client.lanes[0].data(4, 0, b"x")  # what was under way already is dropped
    world.client.lanes[0].alive()
    world.control.alive()


@pytest.mark.parametrize(
    ("lie", "kinds"),
    [
        (attributes(path=b"victim/below"), {"refused", "storage"}),
        (attributes(path=b"link/new"), {"refused"}),
        (attributes(path=b"directory"), {"refused", "storage"}),
        (attributes(path=b""), {"refused", "storage"}),
    ],
    ids=["below a file", "through a link", "over a directory", "the root itself"],
)
def test_files_that_cannot_be_where_they_should(ground: Any, lie: dict[str, Any], kinds: set[str]) -> None:
    world = World(ground)
    world.control.send(Open(4, FILE, 5, 0, "", lie))
    world.client.lanes[0].data(4, 0, b"12345")
    world.control.send(End(4, 5))
    assert world.control.await_(Result, lambda result: result.transfer == 4).kind in kinds
    world.control.alive()


@pytest.mark.parametrize("size", [1 << 50, 1 << 60, MAX_OFFSET])
def test_a_file_larger_than_any_disk(ground: Any, size: int) -> None:
    """It takes as much of the disk as has come of it, and its credit bounds that."""
    world = World(ground)
    lane = world.client.lanes[0]
    world.control.send(opens_file(size=size))
    lane.data(4, 0, bytes(1000))
    lane.alive()
    world.control.alive()
    on_disk = sum(path.stat().st_blocks * 512 for path in ground.root.rglob(".amst-*"))
    assert on_disk < 4 << 20
    world.control.send(Reset(4, "cancelled", ""))
    world.control.alive()


def test_a_file_given_up_leaves_the_one_that_is_there(ground: Any) -> None:
    world = World(ground)
    lane = world.client.lanes[0]
    world.control.send(opens_file(size=10, path=b"victim"))
    lane.data(4, 0, b"worse")
    lane.alive()
    world.control.send(Reset(4, "\udc80".encode("utf-8", "replace").decode(), "never mind"))
    lane.data(4, 5, b"worse")
    world.control.send(End(4, 10))
    lane.alive()
    world.control.alive()
    assert (ground.root / "victim").read_bytes() == b"victim"


@pytest.mark.parametrize("kind", ["refused", "no such kind", "k" * 60000])
def test_a_result_that_gives_the_servers_transfer_up(ground: Any, kind: str) -> None:
    world = World(ground)
    world.control.send(Result(2, kind, "m" * 60000))
    with pytest.raises(AmstError) as caught:
        world.ticket.wait(10)
    assert isinstance(caught.value, RefusedError) == (kind == "refused")
    world.control.alive()


# ---- lanes by control message ----------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 7, 8, 65535])
def test_lanes_are_granted_up_to_the_limit(ground: Any, count: int) -> None:
    world = World(ground)
    world.control.send(LaneRequest(count, "tcp"))
    grant = world.control.await_(LaneGrant)
    assert grant.count == min(count, 7), "one of 8 is there"
    world.control.send(LaneRequest(65535, "tcp"))
    assert world.control.await_(LaneGrant).count == 7 - grant.count
    world.control.alive()


def test_a_flood_of_lane_requests_is_answered_and_gets_no_more(ground: Any) -> None:
    world = World(ground)
    world.control.send(*[LaneRequest(65535, "tcp")] * 500)
    grants = [world.control.await_(LaneGrant) for _ in range(500)]
    assert sum(grant.count for grant in grants) == 7
    world.control.alive()


def test_a_lane_of_another_session_is_not_lost_by_ones_word(ground: Any) -> None:
    world = World(ground)
    honest = list(ground.bystander.session.core.lanes)
    assert len(honest) == 2
    world.control.send(*[LaneLost(incarnation, "integrity", "stolen") for incarnation in honest * 3])
    world.control.alive()
    assert list(ground.bystander.session.core.lanes) == honest


def test_ones_own_lane_is_lost_by_ones_word(ground: Any) -> None:
    client = ground.client(lanes=2)
    client.control.send(LaneLost(client.lanes[0].incarnation, "no such kind", ""))
    assert client.lanes[0].hangs_up()
    client.lanes[1].alive()
    client.control.alive()


def test_three_lanes_lost_by_damage_end_the_session(ground: Any) -> None:
    client = ground.client(lanes=4)
    far = ground.far(client)
    client.control.send(*[LaneLost(lane.incarnation, "integrity", "") for lane in client.lanes[:3]])
    close = client.control.ending()
    assert close is not None and close.kind == "integrity"
    assert far.wait_closed(10) and isinstance(far.error, IntegrityError)


# ---- requests --------------------------------------------------------------------------------------

REQUESTS: dict[str, tuple[Request, set[str]]] = {
    **{f"request {n}": (Request(n, "stat", {"path": b"victim"}), {""}) for n in (0, 1, 1 << 63, U64)},
    **{
        f"operation {name[:8]!r}": (Request(1, name, {"path": b"victim"}), {"protocol"})
        for name in ("", "erase", "STAT", "stat\0", "x" * 65535, "\0" * 65535)
    },
    **{
        f"{operation} without a path": (Request(1, operation, {}), {"protocol"})
        for operation in ("stat", "look", "list", "fetch", "measure", "pace")
    },
    **{
        f"pace {rate!r}": (Request(1, "pace", {"rate": rate}), {"protocol", "usage"})
        for rate in (-1, -(1 << 63), True, "1", b"1")
    },
    **{f"pace {rate}": (Request(1, "pace", {"rate": rate}), {""}) for rate in (0, 1 << 20, (1 << 63) - 1)},
    **{
        f"hold {hold!r}": (Request(1, "fetch", {"path": b"nothing", "hold": hold}), {"protocol"})
        for hold in (1, "true", b"")
    },
    **{
        f"list after {str(after)[:12]!r}": (Request(1, "list", {"path": b"directory", "after": after}), kinds)
        for after, kinds in (
            ("text", {"protocol"}), (1, {"protocol"}), (True, {"protocol"}), (b"file/below", {"protocol"}),
            (b"../outside", {"refused"}), (b"/etc", {"refused"}), (b"\0", {"refused"}), (b".amst-x", {"refused"}),
            (b"x" * 256, {"storage"}), (b"x" * 500_000, {"storage"}), (b"zzz", {""}), (b"", {""}),
        )
    },
    **{
        f"list recursive {wish!r}": (Request(1, "list", {"path": b"directory", "recursive": wish}), {"protocol"})
        for wish in (1, "true", b"")
    },
    "list after a path through a link": (
        Request(1, "list", {"path": b"", "after": b"link/secret", "recursive": True}), {""}
    ),
    **{
        f"{operation} of {str(path)[:24]}": (Request(1, operation, {"path": path}), kinds)
        for operation in ("stat", "list", "fetch", "measure")
        for path, kinds in (
            ("text", {"protocol"}), (1, {"protocol"}), (True, {"protocol"}),
            (b"/etc/passwd", {"refused"}), (b"../outside/secret", {"refused"}), (b"a\0", {"refused"}),
            (b".amst-x", {"refused"}), (b"link/secret", {"refused", "not_found"}), (b"nothing", {"not_found"}),
            (b"x" * 256, {"storage"}), (b"x" * 500_000, {"storage"}),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize(("request_", "kinds"), REQUESTS.values(), ids=REQUESTS)
def test_a_request_gets_its_one_reply(ground: Any, request_: Request, kinds: set[str]) -> None:
    client = ground.client()
    client.control.send(request_)
    reply = client.control.await_(Reply)
    assert reply.request == request_.request
    assert reply.kind in kinds
    assert not any(b"secret" in value for value in reply.attributes.values() if isinstance(value, bytes))
    client.control.alive()
    assert not any(isinstance(message, Open) for message in client.control.heard), "nothing is sent"
    assert sum(isinstance(message, Reply) for message in client.control.heard) == 1


def test_the_same_request_twice_is_answered_twice(ground: Any) -> None:
    client = ground.client()
    client.control.send(*[Request(7, "stat", {"path": b"victim"})] * 2)
    assert [client.control.await_(Reply).kind for _ in range(2)] == ["", ""]


def test_a_flood_of_unknown_operations_is_answered(ground: Any) -> None:
    client = ground.client()
    before = resident()
    for batch in range(100):
        client.control.send(*[Request(batch * 100 + i, "erase", {}) for i in range(100)])
    for number in range(10_000):
        reply = client.control.await_(Reply)
        assert (reply.request, reply.kind) == (number, "protocol")
    client.control.alive()
    assert resident() - before < NOTABLE


def test_a_flood_of_tree_operations_is_held_to_a_number(ground: Any) -> None:
    client = ground.client()
    client.control.send(*[Request(n, "fetch", {"path": b"victim"}) for n in range(1, 201)])
    kinds = set()
    replies = opened = 0
    while replies < 200:
        message = client.control.recv()
        if isinstance(message, Open):
            opened += 1
            client.control.send(Result(message.transfer, "refused", ""))
        elif isinstance(message, Reply):
            replies += 1
            kinds.add(message.kind)
    assert kinds <= {"", "busy"}
    assert opened <= 200
    client.control.alive()


def test_a_flood_of_lists_is_held_to_a_number_and_to_memory(ground: Any) -> None:
    names = [ground.root / "directory" / f"{number:05}{'x' * 200}" for number in range(2000)]
    for name in names:
        name.touch()
    try:
        client = ground.client()
        before = resident()
        for batch in range(20):
            first = batch * 100
            client.control.send(*[Request(first + n, "list", {"path": b"", "recursive": True}) for n in range(100)])
            kinds = [client.control.await_(Reply).kind for _ in range(100)]
            assert set(kinds) <= {"", "busy"} and "" in kinds
        client.control.alive()
        assert resident() - before < MEMORY
    finally:
        for name in names:
            name.unlink()


def test_lists_that_nobody_reads_end_the_connection_in_bounded_memory(ground: Any) -> None:
    names = [ground.root / "directory" / f"{number:05}{'x' * 200}" for number in range(1000)]
    for name in names:
        name.touch()
    try:
        client = ground.client()
        far = ground.far(client)
        client.control.sock.settimeout(1.0)
        before = resident()
        number = 0
        try:
            while far.error is None and far.core.control_up and number < 100_000:
                number += 1
                client.control.sock.send(encode(Request(number, "list", {"path": b"directory"})))
        except OSError:
            pass  # it reads no more, or has hung up
        wait_until(lambda: far.error is not None or not far.core.control_up, "the connection to be cut")
        assert resident() - before < MEMORY
    finally:
        for name in names:
            name.unlink()


def test_answers_that_are_never_confirmed_cost_no_more_memory_than_allowed(ground: Any) -> None:
    """What waits to be sent again is kept: each answer quotes what was asked, so that must be bounded too."""
    client = ground.client()
    client.control.confirms = False
    before = resident()
    try:
        for number in range(1000):
            client.control.send(Request(number, "\0" * 65535, {}))
            client.control.await_(Reply)
    except (Ended, AssertionError):
        pass  # it may be ended for that
    assert resident() - before < MEMORY


# ---- floods ----------------------------------------------------------------------------------------


def test_pings_that_are_answered_are_answered_in_order(ground: Any) -> None:
    client = ground.client()
    client.control.send(b"".join(encode(Ping(n)) for n in range(20_000)))
    for n in range(20_000):
        assert client.control.await_(Pong).token == n


@pytest.mark.parametrize(
    "flood",
    [
        encode(Ping(1)) * 5000,
        encode(Request(1, "stat", {})) * 1000,
        encode(Request(1, "\0" * 4000, {})) * 20,
        encode(LaneRequest(1, "tcp")) * 5000,
    ],
    ids=["PING", "REQUEST", "long REQUEST", "LANE_REQUEST"],
)
def test_answers_that_nobody_reads_end_the_connection_in_bounded_memory(ground: Any, flood: bytes) -> None:
    client = ground.client()
    far = ground.far(client)
    client.control.sock.settimeout(1.0)

    def connected() -> bool:
        return far.error is None and far.core.control_up

    before = resident()
    sent, left, deadline = 0, memoryview(flood), time.monotonic() + 60
    while connected() and sent < 400 << 20 and time.monotonic() < deadline:
        try:
            done = client.control.sock.send(left)
        except TimeoutError:
            continue  # it reads slowly, or no more
        except OSError:
            break  # it has hung up
        sent += done
        left = left[done:] or memoryview(flood)
    wait_until(lambda: not connected(), "the connection to be cut")
    assert resident() - before < MEMORY


def test_nothing_counts_after_close(ground: Any) -> None:
    world = World(ground)
    world.control.send(
        Close("", ""), opens_file(size=0, path=b"after"), End(4, 0), record(99), Request(1, "stat", {"path": b"victim"})
    )
    close = world.control.ending()
    assert close is not None and close.kind == ""
    assert world.far.wait_closed(10)
    assert not (ground.root / "after").exists()


@pytest.mark.parametrize("kind", ["protocol", "integrity", "no such kind", "k" * 65535, "auth", "closed"])
def test_close_with_any_kind_ends_that_session_with_it(ground: Any, kind: str) -> None:
    world = World(ground)
    world.control.send(Close(kind, "m" * 60000))
    world.control.ending()
    assert world.far.wait_closed(10)
    assert world.far.error is not None


# ---- memory ----------------------------------------------------------------------------------------


def test_names_of_channels_count_too(ground: Any) -> None:
    """Empty messages that nobody receives, each of a channel of its own with the longest of names."""
    client = ground.client()
    before = resident()
    name = "\U0001f600" + "x" * 65000  # four bytes a character in memory, because of the first
    try:
        for n in range(1, 2001):
            client.control.send(Open(n, MESSAGE, 0, 0, f"{name}{n}", {}), End(n, 0))
            if n % 10 == 0:
                client.control.alive()
            if resident() - before > 2 * MEMORY:
                break
    except (Ended, AssertionError):
        pass  # refusing it, and ending the session for it, are both fine
    assert resident() - before < MEMORY


@pytest.mark.parametrize("kind", [MESSAGE, FILE])
def test_attributes_of_what_is_open_count_too(ground: Any, kind: int) -> None:
    """Transfers that are opened and left so, with all the attributes that a record holds."""
    client = ground.client()
    many = {f"{n:x}": True for n in range(65_000)}
    if kind == FILE:
        many = {**many, **attributes(path=b"victim")}
    raw = encode(Open(0, kind, 10, 0, "", many))
    before = resident()
    try:
        for n in range(1, 17):
            client.control.send(raw[:5] + n.to_bytes(8, "big") + raw[13:])
            client.control.alive()
    except (Ended, AssertionError):
        pass
    assert resident() - before < MEMORY


def test_a_list_of_transports_from_a_client_is_not_kept(ground: Any) -> None:
    """A client's list is empty by the rules; a long one must not stay in memory as long as the session does."""
    client = ground.stranger()
    client.tls()
    client.hello()
    client.heard_hello()
    client.proof()
    client.heard_proof()
    before = resident()
    client.params(transports=(("", 0, ""),) * 170_000)
    try:
        client.control.await_(LaneGrant)
        client.control.alive()
    except (Ended, AssertionError):
        pass  # as a protocol error
    assert resident() - before < NOTABLE


def test_asking_for_the_same_bytes_again_and_again_queues_them_once(ground: Any) -> None:
    """MISSING of what is not acknowledged, many times, while no lane takes anything."""
    client = ground.client(credit=MAX_OFFSET)
    far = ground.far(client)
    ticket = far.send(bytes(1 << 20))
    far.send(bytes(1 << 20))
    wait_until(lambda: 1 in far.core.engine._outgoing, "the transfer")
    wait_until(lambda: far.core.engine._outgoing[1].cursor > 0, "some of it to be sent")
    client.control.send(b"".join(encode(Missing(1, 0, (1 << 32) - 1)) for _ in range(10_000)))
    client.control.alive()
    with far.core.lock:
        queued = sum(end - start for start, end in far.core.engine._outgoing[1].lost)
    assert queued <= 1 << 20, "no byte waits twice"
    assert not ticket.done


# ---- the kit itself --------------------------------------------------------------------------------


def test_every_message_is_lied_about() -> None:
    """The tables above name each class of messages that there is."""
    said: set[type] = set()

    def collect(thing: Any) -> None:
        if isinstance(thing, tuple):
            for item in thing:
                collect(item)
        elif dataclasses.is_dataclass(thing):
            said.add(type(thing))

    for table in (FORBIDDEN, IGNORED, REFUSED, REQUESTS):
        collect(tuple(table.values()))
    missing = set(typing.get_args(Message)) - said
    assert missing <= {Ping, Close}, "these have tests of their own"
