"""A server that lies to an honest client, before it has proven itself and after; none of the client's files suffers."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from hostile_peer import MAX_OFFSET, TIMEOUT_S, U64, RawControl, RawServer, record, resident, settings_with
from waiting import wait_until

import amst_core
from amst_core.engine import Verdict
from amst_core.errors import AmstError, AuthError, ConnectError, IntegrityError, ProtocolError, RefusedError
from amst_core.security.seal import Protection
from amst_core.wire.frames import FrameKind, encode_ack
from amst_core.wire.messages import (
    FILE,
    MESSAGE,
    PIPE,
    SIZE_UNKNOWN,
    Ack,
    Close,
    Credit,
    End,
    Hello,
    LaneGrant,
    LaneLost,
    LaneRequest,
    Missing,
    Open,
    Opened,
    Ping,
    Proof,
    Reply,
    Request,
    Result,
    Same,
    Seen,
)
from amst_core.wire.requests import encode_entry

pytestmark = pytest.mark.needs_transport

NOTABLE = 16 << 20

Script = Callable[[RawServer], object]


def connect(
    server: RawServer, *, streams: int = 1, plaintext: bool = False, verify: bool = True, **overrides: object
) -> Any:
    return amst_core.connect(
        server.address,
        settings=settings_with({"transport.amst.connect_timeout": "3s", "limits.memory": "32MiB", **overrides}),
        token=server.token,
        streams=streams,
        plaintext=plaintext,
        verify=verify,
    )


def hung_up(control: RawControl | None) -> None:
    """Hear the client out, so that it is not reset before it has said why."""
    assert control is not None
    control.ending()
    control.close()


# ---- the handshake ---------------------------------------------------------------------------------


def up_to(*steps: str) -> Script:
    def go(server: RawServer) -> None:
        for step in steps:
            getattr(server, step)()

    return go


TO_HELLO = up_to("tls", "heard_hello")
TO_PROOF = up_to("tls", "heard_hello", "hello", "heard_proof")
TO_PARAMS = up_to("tls", "heard_hello", "hello", "heard_proof", "proof")


def says(first: Script, *what: Any) -> Script:
    def go(server: RawServer) -> None:
        first(server)
        server._control.send(*what)

    return go


def lies(first: Script, step: str, **fields: Any) -> Script:
    def go(server: RawServer) -> None:
        first(server)
        getattr(server, step)(**fields)

    return go


LIARS: dict[str, tuple[Script, type[AmstError]]] = {
    **{
        f"version {versions}": (lies(TO_HELLO, "hello", versions=versions), ConnectError)
        for versions in ((), (0,), (2,), (1, 1), (1, 2), (65535,))
    },
    **{f"a nonce of {n}": (lies(TO_HELLO, "hello", nonce=bytes(n)), ConnectError) for n in (0, 31, 33, 3000)},
    "PROOF for HELLO": (says(TO_HELLO, Proof(bytes(32))), ConnectError),
    "PING for HELLO": (says(TO_HELLO, Ping(1)), ConnectError),
    **{
        f"a record of {n}": (says(TO_HELLO, record(1, bytes(50), length=n)), ConnectError)
        for n in (0, 4097, 1 << 20, (1 << 32) - 1)
    },
    "an unknown type": (says(TO_HELLO, record(99)), ConnectError),
    "a proof made up": (lies(TO_PROOF, "proof", mac=secrets.token_bytes(32)), AuthError),
    "a short proof": (lies(TO_PROOF, "proof", mac=bytes(31)), AuthError),
    "no proof": (lies(TO_PROOF, "proof", mac=b""), AuthError),
    "HELLO for PROOF": (says(TO_PROOF, Hello((1,), bytes(32), {})), ConnectError),
    **{f"a secret of {n}": (lies(TO_PARAMS, "params", secret=bytes(n)), ConnectError) for n in (0, 31, 33)},
    **{
        f"max_chunk {n}": (lies(TO_PARAMS, "params", max_chunk=n), AmstError)
        for n in (0, (1 << 24) + 1, (1 << 32) - 1)
    },
    "max_open 0": (lies(TO_PARAMS, "params", max_open=0), AmstError),
    **{f"initial_credit {n}": (lies(TO_PARAMS, "params", initial_credit=n), AmstError) for n in (0, 1 << 63, U64)},
    **{
        f"session {session!r}"[:24]: (lies(TO_PARAMS, "params", attributes={"session": session}), ConnectError)
        for session in (b"", bytes(15), bytes(17), "x" * 16, 1)
    },
    "no session": (lies(TO_PARAMS, "params", attributes={}), ConnectError),
    **{
        f"verify {verify!r}": (
            lies(TO_PARAMS, "params", attributes={"session": bytes(16), "verify": verify}), ConnectError
        )
        for verify in (False, 0, "none")
    },
    "no transport": (lies(TO_PARAMS, "params", transports=()), AmstError),
    "another transport": (lies(TO_PARAMS, "params", transports=(("carrier-pigeon", 1, ""),)), AmstError),
    **{
        f"CLOSE {kind!r}"[:24]: (says(step, Close(kind, "m" * 3000)), AmstError)
        for step, kind in ((TO_HELLO, "version"), (TO_PROOF, "auth"), (TO_PARAMS, "busy"), (TO_HELLO, "no such kind"))
    },
}  # fmt: skip


@pytest.mark.parametrize(("script", "error"), LIARS.values(), ids=LIARS)
def test_a_server_that_lies_in_the_handshake(
    raw_server: RawServer, spawn: Any, script: Script, error: type[AmstError]
) -> None:
    before = resident()
    connecting = spawn(connect, raw_server)
    script(raw_server)
    hung_up(raw_server.control)
    assert isinstance(connecting.error(), error), repr(connecting.error())
    assert resident() - before < NOTABLE


def test_a_server_that_knows_nothing_of_verification_is_checked(raw_server: RawServer, spawn: Any) -> None:
    connecting = spawn(connect, raw_server, plaintext=True, verify=False)
    raw_server.agree()
    session = connecting.outcome()
    with session:
        assert raw_server.client_hello.attributes["verify"] is False
        assert session.report.verified
        assert {worker.protection for worker in session.core.lanes.values()} == {Protection.CRC}
        session.abort()


def test_a_server_without_the_token_gets_nothing_of_the_session(raw_server: RawServer, spawn: Any) -> None:
    connecting = spawn(connect, raw_server)
    lies(TO_PROOF, "proof", mac=secrets.token_bytes(32))(raw_server)
    raw_server.params()
    hung_up(raw_server.control)
    assert isinstance(connecting.error(), AuthError)
    assert raw_server.control is not None
    assert not any(type(message).__name__ == "Params" for message in raw_server.control.heard)


@pytest.mark.parametrize("step", [0, 1, 2, 3, 4, 5])
def test_a_server_that_hangs_up_in_the_middle(raw_server: RawServer, spawn: Any, step: int) -> None:
    connecting = spawn(connect, raw_server)
    up_to(*("tls", "heard_hello", "hello", "heard_proof", "proof", "params")[: step + 1])(raw_server)
    assert raw_server.control is not None
    raw_server.control.close()
    raw_server._listener.close()
    assert isinstance(connecting.error(), AmstError)


@pytest.mark.parametrize(
    "lie",
    [LaneGrant(1, 2, "tcp"), LaneGrant(1, 65535, "tcp"), LaneGrant(U64, 65535, "tcp")],
    ids=["one more", "many", "at the end of numbers"],
)
def test_more_lanes_than_were_asked_for(raw_server: RawServer, spawn: Any, lie: LaneGrant) -> None:
    connecting = spawn(connect, raw_server)
    TO_PARAMS(raw_server)
    raw_server.params()
    raw_server.heard_params()
    raw_server._control.send(lie)
    assert isinstance(connecting.error(), AmstError)
    hung_up(raw_server.control)


@pytest.mark.parametrize(
    "lie",
    [LaneGrant(1, 0, "tcp"), LaneGrant(1, 1, "carrier-pigeon"), LaneGrant(1, 1, "")],
    ids=["none", "other", "empty"],
)
def test_no_lane_that_can_be_opened(raw_server: RawServer, spawn: Any, lie: LaneGrant) -> None:
    connecting = spawn(connect, raw_server)
    TO_PARAMS(raw_server)
    raw_server.params()
    raw_server.heard_params()
    raw_server._control.send(lie)
    assert isinstance(connecting.error(), AmstError)
    hung_up(raw_server.control)


CHALLENGES: dict[str, Callable[[Any], object]] = {
    "too short": lambda lane: lane.bare(FrameKind.CHALLENGE, payload=bytes(31)),
    "too long": lambda lane: lane.bare(FrameKind.CHALLENGE, payload=bytes(33)),
    "2^32-1 bytes": lambda lane: lane.bare(FrameKind.CHALLENGE, payload=bytes(32), wire_length=(1 << 32) - 1),
    "2^24 bytes": lambda lane: lane.bare(FrameKind.CHALLENGE, payload=bytes(32), wire_length=1 << 24),
    "an ADMIT": lambda lane: lane.bare(FrameKind.ADMIT, payload=bytes(32)),
    "DATA": lambda lane: lane.bare(FrameKind.DATA, payload=bytes(32), length=32),
    "noise": lambda lane: lane.raw(bytes(range(200))),
    "the end": lambda lane: lane.reset(),
}


@pytest.mark.parametrize("lie", CHALLENGES.values(), ids=CHALLENGES)
def test_a_challenge_that_is_none(raw_server: RawServer, spawn: Any, lie: Callable[[Any], object]) -> None:
    connecting = spawn(connect, raw_server)
    TO_PARAMS(raw_server)
    raw_server.params()
    raw_server.heard_params()
    raw_server._control.send(LaneGrant(1, 1, "tcp"))
    lane = raw_server.lane()
    lie(lane)
    assert isinstance(connecting.error(), AmstError)
    hung_up(raw_server.control)


# ---- a session -------------------------------------------------------------------------------------


@pytest.fixture
def session(raw_server: RawServer, spawn: Any) -> Iterator[Any]:
    """An honest client's session with the raw server, one lane up."""
    connecting = spawn(connect, raw_server)
    raw_server.agree()
    session = connecting.outcome()
    yield session
    session.abort()
    hung_up(raw_server.control)
    assert session.wait_closed(10)


FORBIDDEN: dict[str, Any] = {
    "HELLO": Hello((1,), bytes(32), {}),
    "an unknown type": record(99),
    "a record of 2^32-1": record(16, length=(1 << 32) - 1),
    "a grant that was not asked for": LaneGrant(2, 1, "tcp"),
    **{f"OPEN of {n}": Open(n, MESSAGE, 1, 0, "", {}) for n in (0, 2, U64)},
    "OPEN of 2^63": Open(1, MESSAGE, 1 << 63, 0, "", {}),
    "ACK of what never was": Ack(((1, 1, ()),)),
    "CREDIT for what never was": Credit(((1, 1),)),
    "RESULT of what never was": Result(1, "", ""),
    "MISSING of what never was": Missing(1, 0, 1),
    "OPENED of what never was": Opened(1, (), b""),
    "END of what never was": End(1, 0),
    "SAME of what never was": Same(1, True),
    "SEEN of what was never sent": Seen(1),
}


@pytest.mark.parametrize("lie", FORBIDDEN.values(), ids=FORBIDDEN)
def test_what_is_forbidden_ends_the_session(raw_server: RawServer, session: Any, lie: Any) -> None:
    raw_server._control.send(lie)
    assert raw_server._control.refused() == "protocol"
    assert session.wait_closed(10)
    assert isinstance(session.error, ProtocolError)


def test_requests_to_a_client_without_a_root_are_refused(raw_server: RawServer, session: Any) -> None:
    for number, operation in enumerate(("stat", "fetch", "measure"), 1):
        raw_server._control.send(Request(number, operation, {"path": b""}))
        assert raw_server._control.await_(Reply).kind == "refused"
    raw_server._control.send(Open(1, FILE, 5, 0, "", {"path": b"x", "type": "file", "mode": 0, "mtime_ns": 0}))
    assert raw_server._control.await_(Result).kind == "refused"


def test_a_wish_for_lanes_is_held_to_the_clients_own_limit(raw_server: RawServer, spawn: Any) -> None:
    connecting = spawn(connect, raw_server, **{"transport.amst.max_streams": 4, "transport.amst.min_streams": 1})
    raw_server.agree()
    session = connecting.outcome()
    raw_server._control.send(LaneRequest(65535, "tcp"))
    assert raw_server._control.await_(LaneRequest).count == 3
    session.abort()
    hung_up(raw_server.control)
    assert session.wait_closed(10)


def test_an_incarnation_granted_twice(raw_server: RawServer, session: Any, spawn: Any) -> None:
    """A number that a lane has already: its keys would seal two lanes. However that ends, nothing of it is left."""
    adjusting = spawn(session.adjust_streams, 2)
    raw_server._control.await_(LaneRequest)
    raw_server._control.send(LaneGrant(1, 1, "tcp"))
    assert raw_server._control.refused() == "protocol"
    assert session.wait_closed(10)
    assert isinstance(session.error, ProtocolError)
    assert isinstance(adjusting.error(), AmstError)


def test_an_incarnation_granted_again_after_its_lane_has_gone(raw_server: RawServer, session: Any, spawn: Any) -> None:
    """The same key, and the same nonces from the beginning."""
    control = raw_server._control
    raw_server.lanes[0].reset()
    request = control.await_(LaneRequest)
    control.send(LaneGrant(1, request.count, "tcp"))
    assert control.refused() == "protocol"
    assert session.wait_closed(10)


LANE_LIES: dict[str, Callable[[Any], object]] = {
    "DATA of transfer 0": lambda lane: lane.data(0, 0, b"x"),
    "DATA past every end": lambda lane: lane.data(1, U64, b"x"),
    "an unknown kind": lambda lane: lane.send(99),
    "a flag": lambda lane: lane.send(FrameKind.PING, flags=1),
    "another version": lambda lane: lane.send(FrameKind.PING, version=9),
    "CHALLENGE again": lambda lane: lane.bare(FrameKind.CHALLENGE, payload=bytes(32)),
    "ACK of noise": lambda lane: lane.send(FrameKind.ACK, payload=bytes(range(100))),
    "ACK of what never was": lambda lane: lane.send(FrameKind.ACK, payload=encode_ack(Ack(((1, 0, ()),)), Credit(()))),
}


@pytest.mark.parametrize("lie", LANE_LIES.values(), ids=LANE_LIES)
def test_a_lane_that_lies_is_lost_and_replaced(raw_server: RawServer, session: Any, lie: Any) -> None:
    lie(raw_server.lanes[0])
    lost = raw_server._control.await_(LaneLost)
    assert (lost.incarnation, lost.kind) == (1, "protocol")
    assert raw_server.lanes[0].hangs_up()
    raw_server._control.await_(LaneRequest)
    raw_server._control.send(LaneGrant(2, 1, "tcp"))
    raw_server.admitted_lane()
    raw_server._control.alive()


def test_damage_on_three_lanes_ends_the_session(raw_server: RawServer, session: Any) -> None:
    for incarnation in (1, 2, 3):
        lane = raw_server.lanes[-1]
        lane.raw(lane.sealed(FrameKind.PING)[:-1] + b"\xff")
        if incarnation < 3:
            raw_server._control.await_(LaneRequest)
            raw_server._control.send(LaneGrant(incarnation + 1, 1, "tcp"))
            raw_server.admitted_lane()
    assert session.wait_closed(10)
    assert isinstance(session.error, IntegrityError)


# ---- what it says about messages -----------------------------------------------------------------------


RESULTS: dict[str, Any] = {
    "RESULT before everything was sent": Result(1, "", ""),
    "ACK of more than was sent": Ack(((1, 60_001, ()),)),
    "ACK of an inverted span": Ack(((1, 0, ((50, 40),)),)),
    "CREDIT past everything": Credit(((1, 1 << 63),)),
    "OPENED": Opened(1, (), b""),
}


@pytest.mark.parametrize("lie", RESULTS.values(), ids=RESULTS)
def test_a_message_is_not_delivered_by_a_lie(raw_server: RawServer, session: Any, lie: Any) -> None:
    ticket = session.send(bytes(100_000))
    got = 0
    while got < 60_000:
        got += raw_server.lanes[0].await_(FrameKind.DATA)[0].length
    raw_server._control.send(lie)
    assert raw_server._control.refused() == "protocol"
    with pytest.raises(ProtocolError):
        ticket.wait(10)


# ---- what it says about files that are sent to it ---------------------------------------------------------


@pytest.fixture
def sending(raw_server: RawServer, session: Any, spawn: Any, tmp_path: Path) -> Any:
    """The client sends a file, and waits to hear what the server has of it."""
    (tmp_path / "source").write_bytes(b"s" * 200_000)
    task = spawn(session.send_file, tmp_path / "source", "target")
    look = raw_server._control.await_(Request)
    assert look.operation == "look"
    raw_server._control.send(Reply(look.request, "", "", {"present": True}))
    opened = raw_server._control.await_(Open)
    assert opened.attributes["hold"] is True
    return task


OPENED: dict[str, Any] = {
    "spans past the size": Opened(1, ((0, 200_001),), b""),
    "spans far past it": Opened(1, ((0, MAX_OFFSET), ), b""),
    "2^64-1": Opened(1, ((0, U64),), b""),
    "an inverted span": Opened(1, ((10, 5),), b""),
    "an empty span": Opened(1, ((5, 5),), b""),
    "spans that overlap": Opened(1, ((0, 10), (5, 20)), b""),
    "spans out of order": Opened(1, ((50, 60), (0, 10)), b""),
    "a short digest": Opened(1, (), bytes(31)),
    "a long digest": Opened(1, (), bytes(33)),
    "spans and a digest": Opened(1, ((0, 10),), bytes(32)),
    "OPENED twice": (Opened(1, (), b""), Opened(1, (), b"")),
    "OPENED of another": Opened(2, (), b""),
    "RESULT at once": Result(1, "", ""),
    "ACK before anything was sent": Ack(((1, 10, ()),)),
}


@pytest.mark.parametrize("lie", OPENED.values(), ids=OPENED)
def test_what_a_server_claims_to_have_is_checked(raw_server: RawServer, session: Any, sending: Any, lie: Any) -> None:
    raw_server._control.send(*(lie if isinstance(lie, tuple) else (lie,)))
    assert raw_server._control.refused() == "protocol"
    assert isinstance(sending.error(), AmstError)


def test_a_digest_that_is_anothers_makes_the_client_send_all(raw_server: RawServer, session: Any, sending: Any) -> None:
    control = raw_server._control
    control.send(Opened(1, (), secrets.token_bytes(32)))
    assert control.await_(Same) == Same(1, False)
    control.send(Credit(((1, 200_000),)))
    got = 0
    while got < 200_000:
        got += raw_server.lanes[0].await_(FrameKind.DATA)[0].length
    control.await_(End)
    control.send(Result(1, "", ""))
    sending.outcome()


# ---- what it sends for files that were asked for -----------------------------------------------------------


@pytest.fixture
def fetching(raw_server: RawServer, session: Any, spawn: Any, tmp_path: Path) -> Iterator[Any]:
    """The client asks for a file; nothing but its target may come of it."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (inside / "victim").write_bytes(b"victim")
    (inside / "link").symlink_to(outside)
    task = spawn(session.recv_file, "asked", inside / "target")
    asked = {"path": b"asked", "hold": False, "holes": True}
    assert raw_server._control.await_(Request) == Request(1, "fetch", asked)
    yield task
    assert (outside / "secret").read_bytes() == b"secret"
    assert (inside / "victim").read_bytes() == b"victim"
    assert [path.name for path in outside.iterdir()] == ["secret"]
    left = {path.name for path in inside.iterdir() if not path.name.startswith(".amst-")}
    assert left <= {"victim", "link", "target"}


def entry(path: bytes = b"", **changes: Any) -> dict[str, Any]:
    return {"path": path, "type": "file", "mode": 0o644, "mtime_ns": 0, **changes}


def answers(transfer: int = 1, *, kind: int = FILE, size: int = 6, request: int = 1, attributes: Any = None) -> Open:
    return Open(transfer, kind, size, request, "", entry() if attributes is None else attributes)


ELSEWHERE = {
    path.decode(): path
    for path in (
        b"/etc/amst", b"..", b"../victim", b"../../outside/secret", b"a/../../victim", b".", b"./x", b"a//b",
        b".amst-x", b"x" * 256,
    )
}  # fmt: skip


@pytest.mark.parametrize("path", ELSEWHERE.values(), ids=ELSEWHERE)
def test_an_answer_that_goes_elsewhere(raw_server: RawServer, fetching: Any, path: bytes) -> None:
    control, lane = raw_server._control, raw_server.lanes[0]
    control.send(answers(attributes=entry(path)))
    assert control.await_(Result).kind in ("refused", "storage")
    lane.data(1, 0, b"poison")
    lane.alive()
    control.send(Reply(1, "refused", "", {}))
    assert fetching.error().kind in ("refused", "storage")


def test_an_answer_that_was_refused_is_not_reported_as_copied(raw_server: RawServer, fetching: Any) -> None:
    control = raw_server._control
    control.send(answers(attributes=entry(b"../victim")))
    assert control.await_(Result).kind == "refused"
    control.send(Reply(1, "", "", {}))
    assert isinstance(fetching.error(), AmstError)


def test_an_answer_through_a_link_that_it_sent_itself(raw_server: RawServer, fetching: Any, tmp_path: Path) -> None:
    control, lane = raw_server._control, raw_server.lanes[0]
    target = str(tmp_path / "outside").encode()
    control.send(answers(size=0, attributes=entry(type="symlink", target=target)), End(1, 0))
    assert control.await_(Result).kind == ""
    control.send(answers(2, attributes=entry(b"secret")))
    lane.data(2, 0, b"poison")
    control.send(End(2, 6))
    assert control.await_(Result, lambda result: result.transfer == 2).kind == "refused"
    control.send(Reply(1, "", "", {}))
    assert isinstance(fetching.error(), AmstError)


@pytest.mark.parametrize(("kind", "size"), [(MESSAGE, 6), (MESSAGE, SIZE_UNKNOWN), (PIPE, SIZE_UNKNOWN)])
def test_an_answer_that_is_no_file(raw_server: RawServer, session: Any, fetching: Any, kind: int, size: int) -> None:
    """Only a FILE answers a request for files."""
    control, lane = raw_server._control, raw_server.lanes[0]
    control.send(answers(kind=kind, size=size))
    lane.data(1, 0, b"poison")
    control.send(End(1, 6))
    assert control.await_(Result) == Result(1, "refused", ANY)
    lane.alive()
    control.send(Reply(1, "", "", {}))
    assert isinstance(fetching.error(), AmstError)
    control.alive()


def test_data_before_an_answer_that_is_refused_waits_no_longer(
    raw_server: RawServer, session: Any, fetching: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    control, lane = raw_server._control, raw_server.lanes[0]
    core, parked = session.core, threading.Event()
    place = core.engine.place

    def placing(*args: int) -> Any:
        placement = place(*args)
        if placement.verdict is Verdict.PARK:
            parked.set()
        return placement

    monkeypatch.setattr(core.engine, "place", placing)
    monkeypatch.setattr(core, "_park_timeout_s", 1000.0)
    lane.data(1, 0, b"poison")
    assert parked.wait(TIMEOUT_S)
    with core.lock:  # the lane has it until it waits
        pass
    control.send(answers(kind=MESSAGE), End(1, 6))
    lane.alive()
    assert control.await_(Result) == Result(1, "refused", ANY)


def test_a_reply_without_an_answer(raw_server: RawServer, fetching: Any) -> None:
    """Nothing came, and nothing is reported as copied."""
    raw_server._control.send(Reply(1, "", "", {}))
    assert isinstance(fetching.error(), AmstError)


def test_an_answer_that_stops_half_way(raw_server: RawServer, session: Any, fetching: Any, tmp_path: Path) -> None:
    control, lane = raw_server._control, raw_server.lanes[0]
    control.send(answers(size=1000))
    lane.data(1, 0, b"half")
    lane.alive()
    control.send(Close("", "that is all"))
    assert isinstance(fetching.error(), AmstError)
    assert not (tmp_path / "inside" / "target").exists()


def test_an_answer_that_contradicts_itself(raw_server: RawServer, session: Any, fetching: Any) -> None:
    control = raw_server._control
    control.send(answers(size=1000), End(1, 999))
    assert control.refused() == "protocol"
    assert isinstance(fetching.error(), AmstError)


def test_an_answer_to_what_was_not_asked(raw_server: RawServer, fetching: Any) -> None:
    control = raw_server._control
    control.send(answers(request=2))
    assert control.await_(Result).kind == "refused"
    control.send(answers(2, request=0))
    assert control.await_(Result).kind == "refused"
    control.send(Reply(1, "not_found", "", {}))
    assert fetching.error().kind == "not_found"


def test_more_answers_after_the_reply(raw_server: RawServer, fetching: Any, tmp_path: Path) -> None:
    control, lane = raw_server._control, raw_server.lanes[0]
    control.send(answers(), End(1, 6))
    lane.data(1, 0, b"honest")
    assert control.await_(Result).kind == ""
    control.send(Reply(1, "", "", {}))
    fetching.outcome()
    control.send(answers(2))
    assert control.await_(Result).kind == "refused"
    assert (tmp_path / "inside" / "target").read_bytes() == b"honest"


@pytest.mark.parametrize("present", ["yes", 1, b"", None], ids=repr)
def test_a_look_that_makes_no_sense(
    raw_server: RawServer, session: Any, spawn: Any, tmp_path: Path, present: Any
) -> None:
    (tmp_path / "source").write_bytes(b"s")
    sending = spawn(session.send_file, tmp_path / "source", "target")
    look = raw_server._control.await_(Request)
    raw_server._control.send(Reply(look.request, "", "", {} if present is None else {"present": present}))
    opened = raw_server._control.await_(Open)
    raw_server._control.send(Result(opened.transfer, "refused", ""))
    assert sending.error().kind == "refused"


@pytest.mark.parametrize(
    "attributes",
    [
        {}, {"size": "x"}, {"path": "text", "type": "file", "mode": 0, "mtime_ns": 0},
        {**entry(b"../x"), "size": 1}, {**entry(b"x"), "type": "door", "size": 1}, {**entry(b"x"), "size": -5},
        {**entry(b"x"), "mode": -1, "size": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_stat_that_makes_no_sense(raw_server: RawServer, session: Any, spawn: Any, attributes: Any) -> None:
    asking = spawn(session.stat, "x")
    number = raw_server._control.await_(Request).request
    raw_server._control.send(Reply(number, "", "", attributes))
    assert isinstance(asking.error(), AmstError)
    raw_server._control.alive()


def page(*entries: dict[str, Any]) -> bytes:
    return b"".join(encode_entry(attributes) for attributes in entries)


def listing_entry(path: bytes, **changes: Any) -> dict[str, Any]:
    return {**entry(path), "size": 1, **changes}


TOP = listing_entry(b"", type="directory", size=0)
LISTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "no entries": {"more": False},
    "entries of text": {"entries": "x", "more": False},
    "more of another type": {"entries": page(TOP), "more": 1},
    "nothing and more": {"entries": b"", "more": True},
    "bytes that are no entries": {"entries": b"\xff" * 100, "more": False},
    "an entry cut off": {"entries": page(TOP)[:-1], "more": False},
    "an entry of nothing": {"entries": bytes(2), "more": False},
    "half a million entries of nothing": {"entries": bytes(1_000_000), "more": False},
    "another top": {"entries": page(listing_entry(b"a")), "more": False},
    "the top twice": {"entries": page(TOP, TOP), "more": False},
    "an entry twice": {"entries": page(TOP, listing_entry(b"a"), listing_entry(b"a")), "more": False},
    "entries out of order": {"entries": page(TOP, listing_entry(b"b"), listing_entry(b"a")), "more": False},
    "an entry below": {"entries": page(TOP, listing_entry(b"a/b")), "more": False},
    "an entry outside": {"entries": page(TOP, listing_entry(b"../x")), "more": False},
    "an absolute entry": {"entries": page(TOP, listing_entry(b"/etc")), "more": False},
    "an entry without a size": {"entries": page({**entry(b""), "type": "directory"}), "more": False},
    "a negative size": {"entries": page(TOP, listing_entry(b"a", size=-1)), "more": False},
    "a directory with a size": {"entries": page(TOP, listing_entry(b"a", type="directory")), "more": False},
    "a door": {"entries": page(TOP, listing_entry(b"a", type="door")), "more": False},
    "a failure without words": {"entries": page(TOP, {"path": b"a", "kind": "refused"}), "more": False},
    "a failure of another type": {"entries": page(TOP, {"path": b"a", "kind": 1, "message": ""}), "more": False},
    "a failure outside": {"entries": page(TOP, {"path": b"../a", "kind": "refused", "message": ""}), "more": False},
}


@pytest.mark.parametrize("answer", LISTS.values(), ids=LISTS)
def test_a_list_that_makes_no_sense(raw_server: RawServer, session: Any, spawn: Any, answer: dict[str, Any]) -> None:
    asking = spawn(lambda: list(session.list("x")))
    asked = raw_server._control.await_(Request)
    assert (asked.operation, asked.attributes) == ("list", {"path": b"x", "after": b"", "recursive": False})
    raw_server._control.send(Reply(asked.request, "", "", answer))
    assert isinstance(asking.error(), ProtocolError | RefusedError)
    raw_server._control.alive()


def test_a_list_that_never_ends_takes_no_more_than_is_wanted(
    raw_server: RawServer, session: Any, spawn: Any
) -> None:
    asking = spawn(lambda: [found.path for found, _ in zip(session.list("x"), range(300), strict=False)])
    for number in range(3):
        asked = raw_server._control.await_(Request)
        assert asked.attributes["after"] == (b"%05d" % (number * 100 - 1) if number else b"")
        entries = [listing_entry(b"%05d" % (number * 100 + n)) for n in range(100)]
        raw_server._control.send(
            Reply(asked.request, "", "", {"entries": page(*([] if number else [TOP]), *entries), "more": True})
        )
    assert asking.outcome() == [b"", *[b"%05d" % n for n in range(299)]]
    raw_server._control.alive()


def test_the_words_of_a_server_command_no_terminal(raw_server: RawServer, session: Any, spawn: Any) -> None:
    evil = "\x1b]0;owned\x07\r\nok: all arrived\u202e"
    answer = {"entries": page(TOP, {"path": b"a", "kind": "refused", "message": evil}), "more": False}
    asking = spawn(lambda: list(session.list("x")))
    raw_server._control.send(Reply(raw_server._control.await_(Request).request, "", "", answer))
    told = asking.outcome()[1].error.message
    assert told == "\\x1b]0;owned\\x07\\r\\nok: all arrived\\u202e"
    asking = spawn(session.stat, "x")
    raw_server._control.send(Reply(raw_server._control.await_(Request).request, "refused", evil, {}))
    assert asking.error().message == told


def test_an_answer_to_a_list_that_repeats_itself_ends_it(raw_server: RawServer, session: Any, spawn: Any) -> None:
    asking = spawn(lambda: list(session.list("x")))
    answer = {"entries": page(TOP, listing_entry(b"a")), "more": True}
    for _ in range(2):
        raw_server._control.send(Reply(raw_server._control.await_(Request).request, "", "", answer))
    assert isinstance(asking.error(), ProtocolError)
    raw_server._control.alive()


def test_the_sessions_server_is_gone_for_good(raw_server: RawServer, session: Any) -> None:
    """It hangs up and listens no more: the client looks for it, and can be closed meanwhile."""
    raw_server._control.close()
    raw_server._listener.close()
    raw_server.lanes[0].reset()
    wait_until(lambda: not session.core.control_up, "the connection to be missed")
    session.abort()
    assert session.wait_closed(5)
