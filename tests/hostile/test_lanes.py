"""A peer that holds the token and lies on its lanes; their frames are sealed as they should be, but where that lies."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hostile_peer import HEADER, MAX_OFFSET, U64, Ended, RawClient, RawLane, hangs_up, host_port, resident
from waiting import wait_until

from amst_core.errors import IntegrityError
from amst_core.interfaces import PREAMBLE, PREAMBLE_MAGIC
from amst_core.security import keys
from amst_core.wire.fields import CREDITS, HELD
from amst_core.wire.frames import MAX_ACK, MAX_CHUNK, TAG_SIZE, FrameKind, encode_ack
from amst_core.wire.messages import (
    MESSAGE,
    SIZE_UNKNOWN,
    Ack,
    Close,
    Credit,
    End,
    LaneGrant,
    LaneLost,
    LaneRequest,
    Missing,
    Open,
    Reset,
    Result,
)

pytestmark = pytest.mark.needs_transport

SETTINGS = {
    "limits.handshake_timeout": "2s",
    "limits.memory": "32MiB",
    "limits.max_message": "4MiB",
    "transport.amst.read_timeout": "1s",
    "transport.amst.max_streams": 8,
}
NOTABLE = 16 << 20
SIZE = 200_000
DATA, PING, PONG, FIN, ACK = FrameKind.DATA, FrameKind.PING, FrameKind.PONG, FrameKind.FIN, FrameKind.ACK


class World:
    """A hostile session with two lanes. Its own transfers: 1 has ended, 2 is under way and half held."""

    def __init__(self, ground: Any, *, plaintext: bool = False) -> None:
        self.client: RawClient = ground.client(lanes=2, plaintext=plaintext)
        self.control = self.client.control
        self.far = ground.far(self.client)
        self.lane, self.other = self.client.lanes
        self.control.send(Open(1, MESSAGE, 10, 0, "", {}), Open(2, MESSAGE, SIZE, 0, "two", {}), End(1, 10))
        self.other.data(1, 0, b"x" * 10)
        assert self.control.await_(Result) == Result(1, "", "")
        self.other.data(2, 0, bytes(SIZE // 2))
        self.other.alive()

    def complete(self) -> None:
        """Transfer 2 comes to its end over the lane that is left."""
        self.other.data(2, SIZE // 2, bytes(SIZE - SIZE // 2))
        self.control.send(End(2, SIZE))
        assert self.control.await_(Result, lambda result: result.transfer == 2).kind == ""
        assert bytes(self.far.recv("two", timeout=10)) == bytes(SIZE)


Lie = Callable[[RawLane], object]


def data(transfer: int, offset: int, length: int = 10, **lies: int) -> Lie:
    return lambda lane: lane.data(transfer, offset, bytes(length), **lies)


def header(**lies: int) -> Lie:
    """DATA of transfer 2 under a header that lies; the seal covers the lie."""
    fields = {"kind": DATA, "transfer": 2, "offset": SIZE // 2, **lies}
    return lambda lane: lane.send(payload=bytes(10), **fields)


def ack(held: tuple[Any, ...] = (), credits: tuple[Any, ...] = (), **lies: int) -> Lie:
    return lambda lane: lane.send(ACK, payload=encode_ack(Ack(held), Credit(credits)), **lies)


PROTOCOL: dict[str, Lie] = {
    "DATA of transfer 0": data(0, 0),
    "DATA past the size": data(2, SIZE - 9),
    "DATA from the size on": data(2, SIZE),
    **{f"DATA at {n}": data(2, n) for n in (1 << 40, MAX_OFFSET - 10, MAX_OFFSET - 9, MAX_OFFSET, 1 << 63, U64)},
    "DATA longer than chunks may be": data(2, 0, (1 << 20) + 1),
    **{f"DATA that says {n} bytes": header(length=n) for n in (0, 9, 11, 1 << 20, MAX_CHUNK + 1, (1 << 32) - 1)},
    **{
        f"DATA that says {n} on the wire": header(wire_length=n)
        for n in (0, 9, 10, 25, 27, MAX_CHUNK + TAG_SIZE + 1, (1 << 32) - 1)
    },
    **{f"version {n}": header(version=n) for n in (0, 2, 255)},
    **{f"kind {n}": header(kind=n) for n in (0, 6, 7, 15, 18, 128, 255)},
    **{f"flag {bit}": header(flags=1 << bit) for bit in range(16)},
    "CHALLENGE": lambda lane: lane.bare(FrameKind.CHALLENGE, payload=bytes(32)),
    "ADMIT": lambda lane: lane.bare(FrameKind.ADMIT, transfer=1, payload=bytes(32)),
    "ADMIT, sealed": lambda lane: lane.send(FrameKind.ADMIT, payload=bytes(32), length=0),
    **{
        f"{kind.name} with bytes": (lambda lane, kind=kind: lane.send(kind, payload=b"xyz"))
        for kind in (PING, PONG, FIN)
    },
    **{
        f"{kind.name} with bytes it does not name": (lambda lane, kind=kind: lane.send(kind, payload=b"xyz", length=0))
        for kind in (PING, PONG, FIN)
    },
    "PING without its seal": lambda lane: lane.bare(PING),
    "DATA without its seal": lambda lane: lane.bare(DATA, transfer=2, payload=bytes(10)),
    # acknowledgements by lane
    "ACK of nothing at all": lambda lane: lane.send(ACK),
    "ACK that is too long": lambda lane: lane.send(ACK, payload=bytes(MAX_ACK + 1)),
    "ACK cut short": lambda lane: lane.send(ACK, payload=encode_ack(Ack(()), Credit(()))[:-1]),
    "ACK with bytes left over": lambda lane: lane.send(ACK, payload=encode_ack(Ack(()), Credit(())) + b"\0"),
    "ACK of half": lambda lane: lane.send(ACK, payload=HELD.encode(())),
    "ACK of 2^32-1 transfers": lambda lane: lane.send(ACK, payload=b"\xff\xff\xff\xff" + CREDITS.encode(())),
    "ACK of noise": lambda lane: lane.send(ACK, payload=bytes(range(1, 200))),
    **{f"ACK of transfer {n}": ack(((n, 1, ()),)) for n in (0, 1, 1 << 63, U64)},
    **{f"ACK credit for transfer {n}": ack((), ((n, 1),)) for n in (0, 1, 1 << 63, U64)},
}


@pytest.mark.parametrize("lie", PROTOCOL.values(), ids=PROTOCOL)
def test_a_frame_that_is_forbidden_ends_its_lane(ground: Any, lie: Lie) -> None:
    before = resident()
    world = World(ground)
    with suppress(Ended):  # it may be found out before all of it is sent
        lie(world.lane)
    assert world.client.lost(world.lane) == "protocol"
    world.complete()
    assert resident() - before < NOTABLE


def sent_before(ground: Any) -> tuple[World, Any]:
    """A world in which the server has sent 60 000 bytes, and has more."""
    world = World(ground)
    ticket = world.far.send(bytes(100_000))
    got = 0
    while got < 60_000:
        for lane in (world.lane, world.other):
            if not lane.quiet():
                frame, _ = lane.recv()
                got += frame.length if frame.kind is DATA else 0
    return world, ticket


ACKS: dict[str, Lie] = {
    "what was never sent": ack(((1, 60_001, ()),)),
    "2^64-1": ack(((1, U64, ()),)),
    "a span of what was never sent": ack(((1, 0, ((60_000, 60_001),)),)),
    "an inverted span": ack(((1, 5, ((30, 20),)),)),
    "an inverted span that ends at 0": ack(((1, 0, ((5, 0),)),)),
    "an empty span": ack(((1, 0, ((7, 7),)),)),
    "credit of 2^63": ack((), ((1, 1 << 63),)),
    "credit of 2^64-1": ack((), ((1, U64),)),
    "what is right, and what is not": ack(((1, 10, ()), (2, 1, ()))),
}


@pytest.mark.parametrize("lie", ACKS.values(), ids=ACKS)
def test_an_acknowledgement_by_lane_that_lies_ends_its_lane(ground: Any, lie: Lie) -> None:
    world, ticket = sent_before(ground)
    lie(world.lane)
    assert world.client.lost(world.lane) == "protocol"
    world.complete()
    assert not ticket.done


def test_an_acknowledgement_by_lane_counts_like_one_on_the_control_channel(ground: Any) -> None:
    world, ticket = sent_before(ground)
    ack(((1, 60_000, ()),), ((1, 100_000),))(world.lane)
    world.control.await_(End, lambda end: end.transfer == 1)
    world.control.send(Result(1, "", ""))
    ticket.wait(10)
    world.complete()


# ---- what makes no difference ---------------------------------------------------------------------

TOLERATED: dict[str, Lie] = {
    "DATA of a transfer that has ended": data(1, 0),
    "DATA past the end of one that has ended": data(1, 1 << 40),
    "DATA that is held": data(2, 0, 1000),
    "DATA partly held": data(2, SIZE // 2 - 5),
    "DATA without end": lambda lane: [lane.data(2, n, b"\0") for n in range(2000)],
    "PONG to nothing": lambda lane: lane.send(PONG, offset=12345),
    "fields that are not used": lambda lane: lane.send(PONG, transfer=U64, offset=U64),
    "pings whose answers are taken": lambda lane: [lane.alive() for _ in range(2000)],
}


@pytest.mark.parametrize("lie", TOLERATED.values(), ids=TOLERATED)
def test_what_is_sent_again_or_too_late_is_dropped(ground: Any, lie: Lie) -> None:
    world = World(ground)
    lie(world.lane)
    world.lane.alive()
    world.complete()
    assert len(world.far.core.lanes) == 2


def test_data_of_a_transfer_that_was_reset_or_refused_is_dropped(ground: Any) -> None:
    world = World(ground)
    world.control.send(Open(3, MESSAGE, SIZE_UNKNOWN, 0, "", {}), Open(4, MESSAGE, SIZE, 0, "", {}), Reset(4, "", ""))
    world.control.alive()
    for transfer in (3, 4):
        world.lane.data(transfer, 0, bytes(1000))
        world.lane.data(transfer, 1 << 50, bytes(1000))
    world.lane.alive()
    world.complete()


# ---- seals ----------------------------------------------------------------------------------------


def flipped(at: int) -> Lie:
    """An intact frame of which one bit was changed on its way."""

    def lie(lane: RawLane) -> None:
        raw = bytearray(lane.sealed(DATA, payload=bytes(100), transfer=2, offset=SIZE // 2))
        raw[at] ^= 1
        lane.raw(bytes(raw))

    return lie


def repeated(lane: RawLane) -> None:
    raw = lane.sealed(PING)
    lane.raw(raw + raw)


def swapped(lane: RawLane) -> None:
    first, second = lane.sealed(PING, offset=1), lane.sealed(PING, offset=2)
    lane.raw(second + first)


def missing(lane: RawLane) -> None:
    lane.sealed(PING)
    lane.send(PING)


def of_another_lane(lane: RawLane) -> None:
    lane.sealer._aead = type(lane.sealer)(secrets.token_bytes(32))._aead
    lane.send(PING)


INTEGRITY: dict[str, Lie] = {
    **{f"check, byte {n}": flipped(n) for n in range(4, 8)},
    "offset": flipped(23),
    "payload": flipped(HEADER.size),
    "payload's end": flipped(HEADER.size + 99),
    "tag": flipped(HEADER.size + 100),
    "tag's end": flipped(HEADER.size + 115),
    "repeated": repeated,
    "swapped": swapped,
    "missing": missing,
    "another key": of_another_lane,
}


@pytest.mark.parametrize("lie", INTEGRITY.values(), ids=INTEGRITY)
def test_a_frame_whose_tag_does_not_fit_ends_its_lane(ground: Any, lie: Lie) -> None:
    world = World(ground)
    with suppress(Ended):
        lie(world.lane)
    assert world.client.lost(world.lane) == "integrity"
    world.complete()


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31])
def test_a_bit_that_flips_in_a_header_is_found_whatever_it_meant(ground: Any, at: int) -> None:
    world = World(ground)
    with suppress(Ended):
        flipped(at)(world.lane)
        for _ in range(300):  # where more bytes were made to be expected, they come
            world.lane.data(2, SIZE // 2, bytes(10_000))
    assert world.client.lost(world.lane) in ("integrity", "protocol")
    world.complete()


@pytest.mark.parametrize("at", [3, 4, 7, 15, 23, 27, 31, 32, 131])
def test_a_bit_that_flips_on_a_lane_without_encryption(ground: Any, at: int) -> None:
    world = World(ground, plaintext=True)
    with suppress(Ended):
        flipped(at)(world.lane)
        for _ in range(300):
            world.lane.data(2, SIZE // 2, bytes(10_000))
    assert world.client.lost(world.lane) in ("integrity", "protocol")
    world.complete()


def test_three_damaged_lanes_end_the_session(ground: Any) -> None:
    client = ground.client(lanes=4)
    far = ground.far(client)
    for lane in client.lanes[:3]:
        with suppress(Ended):
            lane.raw(lane.sealed(PING)[:-1] + b"\xff")
    close = client.control.ending()
    assert close is not None and close.kind == "integrity"
    assert far.wait_closed(10) and isinstance(far.error, IntegrityError)


# ---- places ---------------------------------------------------------------------------------------


def test_data_past_its_credit_ends_its_lane(ground: Any) -> None:
    """A message for which there is no memory has no credit but what each begins with; a file has a window."""
    world = World(ground)
    world.control.send(Open(3, MESSAGE, 4 << 20, 0, "full", {}), Open(4, MESSAGE, 4 << 20, 0, "full", {}))
    world.control.send(Open(5, MESSAGE, 4 << 20, 0, "full", {}))
    world.control.alive()
    credit = world.client.limits.initial_credit
    world.lane.data(5, 0, bytes(credit))
    world.lane.alive()
    world.lane.data(5, credit, b"x")
    assert world.client.lost(world.lane) == "protocol"
    world.complete()


def test_data_far_ahead_of_its_open_waits_and_takes_no_memory(ground: Any) -> None:
    world = World(ground)
    before = resident()
    began = time.monotonic()
    world.lane.data(U64, 0, bytes(1 << 20))
    for transfer in (3, 4, 5):
        world.control.send(Open(transfer, MESSAGE, 5, 0, "", {}), Reset(transfer, "", ""))
    world.control.alive()
    assert resident() - before < 4 << 20
    world.complete()
    assert world.client.lost(world.lane) == "protocol"
    assert time.monotonic() - began > 1, "it has time to come"


def test_data_that_waits_for_its_open_is_taken_when_it_comes(ground: Any) -> None:
    world = World(ground)
    world.lane.data(3, 0, b"early")
    world.control.alive()
    world.control.send(Open(3, MESSAGE, 5, 0, "early", {}), End(3, 5))
    assert world.control.await_(Result) == Result(3, "", "")
    assert bytes(world.far.recv("early", timeout=10)) == b"early"
    world.complete()


@pytest.mark.parametrize("plaintext", [False, True], ids=["sealed", "plaintext"])
@pytest.mark.parametrize("cut", [(0, 100_000), (0, 1), (40_000, 60_000), (99_999, 100_000)], ids=str)
def test_a_copy_of_what_another_lane_is_still_bringing(ground: Any, cut: tuple[int, int], plaintext: bool) -> None:
    """One lane brings half a frame and stops; another brings some of the same bytes, whole; then the first one dies."""
    world = World(ground, plaintext=plaintext)
    content = secrets.token_bytes(SIZE)
    half = SIZE // 2
    world.control.send(Open(3, MESSAGE, SIZE, 0, "copy", {}))
    world.control.alive()
    wrong = bytearray(world.lane.sealed(DATA, payload=bytes(half), transfer=3, offset=0))
    world.lane.raw(bytes(wrong[: len(wrong) // 2]))
    time.sleep(0.02)  # so that it is mostly under way; either order must do
    start, end = cut
    with suppress(Ended):
        world.other.data(3, start, content[start:end])
    world.other.data(3, half, content[half:])
    world.other.alive()
    with suppress(Ended):
        world.lane.reset()
    world.control.send(End(3, SIZE))
    wait_until(lambda: len(world.far.core.lanes) == 1, "the half lane to be given up")
    # an honest sender sends again what it is not told to be held, and what it is asked for
    for piece in range(0, half, 10_000):
        world.other.data(3, piece, content[piece : piece + 10_000])
    while not isinstance(message := world.control.await_(Result | Missing), Result):
        if message.transfer == 3:
            end = message.offset + message.length
            world.other.data(3, message.offset, content[message.offset : end])
    assert message == Result(3, "", "")
    assert bytes(world.far.recv("copy", timeout=10)) == content


def test_copies_without_end_of_what_another_lane_is_bringing_cost_little(ground: Any) -> None:
    """They are remembered, if at all, in bounded memory and bounded time."""
    world = World(ground, plaintext=True)
    world.control.send(Open(3, MESSAGE, SIZE, 0, "", {}))
    raw = world.lane.sealed(DATA, payload=bytes(100_000), transfer=3, offset=0)
    world.lane.raw(raw[:1000])
    time.sleep(0.02)
    for n in range(3000):
        world.other.data(3, n, b"x")
    world.other.alive()
    with world.far.core.lock:
        incoming = world.far.core.engine._incoming.get(3)
        assert incoming is not None and len(incoming.dropped_copies) < 100


def test_spans_without_end_stay_within_memory(ground: Any) -> None:
    """Every other byte of a message: what is held of it is many spans."""
    world = World(ground)
    world.control.send(Open(3, MESSAGE, SIZE, 0, "", {}))
    world.control.alive()
    before = resident()
    for n in range(0, 20_000, 2):
        world.lane.data(3, n, b"x")
    world.lane.alive()
    assert resident() - before < NOTABLE
    world.complete()


# ---- floods and dawdling -----------------------------------------------------------------------------


def test_pings_whose_answers_nobody_reads_end_the_lane(ground: Any) -> None:
    world = World(ground)
    world.lane.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with suppress(Ended):
        while not any(isinstance(message, LaneLost) for message in world.control.heard):
            world.lane.raw(b"".join(world.lane.sealed(PING) for _ in range(2000)))
            world.control.alive()
    if not any(isinstance(message, LaneLost) for message in world.control.heard):
        world.client.lost(world.lane)
    lost = next(message for message in world.control.heard if isinstance(message, LaneLost))
    assert lost.incarnation == world.lane.incarnation
    # who reads nothing also loses the acknowledgements of what it sends, and may so come to a halt inside a frame
    assert lost.kind in ("protocol", "broken")
    world.complete()


@pytest.mark.parametrize("size", [1, 32, 5000])
def test_a_lane_that_pauses_inside_a_frame_is_given_up(ground: Any, size: int) -> None:
    world = World(ground)
    world.lane.raw(world.lane.sealed(DATA, payload=bytes(10_000), transfer=2, offset=SIZE // 2)[:size])
    world.complete()
    assert world.client.lost(world.lane) in ("broken", "timeout")


def test_a_lane_that_trickles_does_not_hold_up_the_session_or_its_end(ground: Any) -> None:
    world = World(ground)
    raw = world.lane.sealed(DATA, payload=bytes(10_000), transfer=2, offset=SIZE // 2)
    with suppress(Ended):
        for n in range(20):
            world.lane.raw(raw[n : n + 1] if n else raw[:40])
            time.sleep(0.02)
    world.complete()
    world.control.send(Close("", ""))
    assert world.far.wait_closed(5)


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 131])
@pytest.mark.parametrize("how", ["fin", "rst"])
def test_a_lane_that_is_cut_is_lost(ground: Any, size: int, how: str) -> None:
    world = World(ground)
    world.lane.raw(world.lane.sealed(DATA, payload=bytes(100), transfer=2, offset=SIZE // 2)[:size])
    if how == "rst":
        world.lane.reset()
    else:
        world.lane.sock.shutdown(socket.SHUT_WR)
    lost = world.control.await_(LaneLost)
    assert (lost.incarnation, lost.kind) == (world.lane.incarnation, "broken")
    world.complete()


def test_nothing_is_read_after_fin(ground: Any) -> None:
    world = World(ground)
    world.lane.raw(
        world.lane.sealed(FIN)
        + world.lane.sealed(DATA, payload=bytes(10), transfer=0)
        + world.lane.sealed(FIN)
        + secrets.token_bytes(10_000)
    )
    world.lane.await_(FIN)
    assert world.lane.hangs_up()
    world.control.alive()
    assert not any(isinstance(message, LaneLost) for message in world.control.heard)
    world.complete()


def test_the_last_lane_gone_by_fin_with_more_to_come(ground: Any) -> None:
    """All lanes leave while a transfer is under way: the session does not go on for ever, and others do."""
    world = World(ground)
    for lane in (world.lane, world.other):
        lane.send(FIN)
    for lane in (world.lane, world.other):
        lane.await_(FIN)
    wait_until(lambda: not world.far.core.lanes, "the lanes to be gone")


# ---- admission ----------------------------------------------------------------------------------------


def answer(lane: RawLane, *, incarnation: int, mac: bytes, **lies: int) -> None:
    lane.bare(FrameKind.ADMIT, transfer=incarnation, payload=mac, **lies)


def proof(secret: bytes, incarnation: int, challenge: bytes) -> bytes:
    return keys.admission_mac(secret, incarnation=incarnation, challenge=challenge)


class Granted:
    """A hostile session with one lane, and one grant that is still open; and another session of the same peer."""

    def __init__(self, ground: Any) -> None:
        self.client: RawClient = ground.client()
        self.stranger: RawClient = ground.client()
        self.client.control.send(LaneRequest(1, "tcp"))
        self.open = self.client.control.await_(LaneGrant).first
        self.live = self.client.lanes[0].incarnation
        self.secret = self.client.secret
        self.honest = list(ground.bystander.session.core.lanes)


Claim = Callable[[Granted, RawLane], object]

CLAIMS: dict[str, Claim] = {
    "made up": lambda g, lane: answer(lane, incarnation=g.open, mac=secrets.token_bytes(lane.challenged() and 32)),
    "of another session": lambda g, lane: answer(
        lane, incarnation=g.open, mac=proof(g.stranger.secret, g.open, lane.challenged())
    ),
    "of another incarnation": lambda g, lane: answer(
        lane, incarnation=g.open, mac=proof(g.secret, g.open + 1, lane.challenged())
    ),
    "of another challenge": lambda g, lane: answer(lane, incarnation=g.open, mac=proof(g.secret, g.open, bytes(32))),
    "of a live lane": lambda g, lane: answer(
        lane, incarnation=g.live, mac=proof(g.secret, g.live, lane.challenged())
    ),
    "of an honest lane": lambda g, lane: answer(
        lane, incarnation=g.honest[0], mac=proof(g.secret, g.honest[0], lane.challenged())
    ),
    **{
        f"never granted, {n}": (
            lambda g, lane, n=n: answer(lane, incarnation=n, mac=proof(g.secret, n, lane.challenged()))
        )
        for n in (0, 1 << 40, U64)
    },
    "too short": lambda g, lane: answer(lane, incarnation=g.open, mac=proof(g.secret, g.open, lane.challenged())[:31]),
    "too long": lambda g, lane: answer(lane, incarnation=g.open, mac=proof(g.secret, g.open, lane.challenged()) + b"x"),
    "a length of 2^32-1": lambda g, lane: answer(lane, incarnation=g.open, mac=bytes(32), wire_length=(1 << 32) - 1),
    "a length of 2^24": lambda g, lane: answer(lane, incarnation=g.open, mac=bytes(32), wire_length=1 << 24),
    "a flag": lambda g, lane: answer(
        lane, incarnation=g.open, mac=proof(g.secret, g.open, lane.challenged()), flags=1
    ),
    "another version": lambda g, lane: answer(
        lane, incarnation=g.open, mac=proof(g.secret, g.open, lane.challenged()), version=2
    ),
    "the challenge sent back": lambda g, lane: lane.bare(FrameKind.CHALLENGE, payload=lane.challenged()),
    "DATA": lambda g, lane: lane.bare(DATA, transfer=1, payload=bytes(100), length=100),
    "PING": lambda g, lane: lane.bare(PING),
    "FIN": lambda g, lane: lane.bare(FIN),
    "noise": lambda g, lane: lane.raw(bytes(range(200))),
    "half an ADMIT, and no more": lambda g, lane: (
        lane.raw(HEADER.pack(1, 17, 0, 0, g.open, 0, 0, 32) + bytes(20)), lane.sock.shutdown(socket.SHUT_WR)
    ),
}  # fmt: skip


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_an_admission_that_is_not_proven_is_refused_without_a_word(ground: Any, claim: Claim) -> None:
    granted = Granted(ground)
    far = ground.far(granted.client)
    lane = ground.keep(RawLane.dial(ground.server.address))
    with suppress(Ended):
        claim(granted, lane)
    assert lane.hangs_up(within_s=1.5)
    assert len(far.core.lanes) == 1
    # what was granted is still good, once
    granted.client.incarnations = [granted.open, granted.open]
    granted.client.open_lane().alive()
    again = RawLane.dial(ground.server.address)
    granted.client.lanes.append(again)
    again.admit(granted.secret, granted.open)
    assert again.hangs_up()
    assert len(far.core.lanes) == 2


def test_a_replayed_admission_is_refused(ground: Any) -> None:
    """Byte by byte what admitted a lane, a moment ago or after it has gone."""
    client = ground.client(lanes=0)
    client.control.send(LaneRequest(2, "tcp"))
    first = client.control.await_(LaneGrant).first
    used = RawLane.dial(ground.server.address)
    client.lanes.append(used)
    mac = proof(client.secret, first, used.challenged())
    answer(used, incarnation=first, mac=mac)
    used.key(client.secret, first)
    used.alive()
    client.incarnations = [first + 1]
    client.open_lane()

    def replay() -> None:
        lane = ground.keep(RawLane.dial(ground.server.address))
        answer(lane, incarnation=first, mac=mac)
        assert lane.hangs_up()

    replay()
    used.reset()
    client.control.await_(LaneLost)
    replay()


@pytest.mark.parametrize("tag", [0, 2, 255, 65535])
def test_a_lane_of_a_transport_that_was_not_advertised(ground: Any, tag: int) -> None:
    with socket.create_connection(host_port(ground.server.address), 5) as sock:
        sock.sendall(PREAMBLE.pack(PREAMBLE_MAGIC, tag))
        sock.settimeout(5)
        with suppress(OSError):
            assert sock.recv(100) == b"", "not even a challenge"


def test_grants_end_with_their_session(ground: Any) -> None:
    granted = Granted(ground)
    far = ground.far(granted.client)
    lane = ground.keep(RawLane.dial(ground.server.address))
    challenge = lane.challenged()
    granted.client.control.send(Close("", ""))
    granted.client.control.ending()
    assert far.wait_closed(10)
    wait_until(lambda: far not in ground.server.sessions, "the server to have forgotten it")
    answer(lane, incarnation=granted.open, mac=proof(granted.secret, granted.open, challenge))
    assert hangs_up(lane.sock, within_s=1.5)
