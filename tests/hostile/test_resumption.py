"""Somebody takes up a session again: only who has the token and its secret may, once per epoch, and counts honestly."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hostile_peer import U64, Ended, RawClient, record
from waiting import wait_until

from amst_core.security import keys
from amst_core.wire.messages import MESSAGE, Close, End, LaneRequest, Open, Params, Proof, Result, Resume, Seen

pytestmark = pytest.mark.needs_transport

SETTINGS = {"limits.handshake_timeout": "2s"}


class World:
    """A hostile session whose control connection is up and about to be replaced."""

    def __init__(self, ground: Any) -> None:
        self.ground = ground
        self.client: RawClient = ground.client()
        self.far = ground.far(self.client)
        self.other: RawClient = ground.client()
        self.client.control.alive()

    def again(self, *, epoch: int = 1, **attributes: Any) -> RawClient:
        return self.ground.keep(self.client.again(epoch=epoch, **attributes))

    @property
    def received(self) -> int:
        """Counted messages of the server that the client took in."""
        return self.client.control.counted

    def goes_on(self) -> None:
        """The session is as it was: over the connection that it had."""
        assert self.far.error is None
        self.client.control.alive()
        self.client.control.send(Open(1, MESSAGE, 2, 0, "", {}))
        self.client.lanes[0].data(1, 0, b"ok")
        self.client.control.send(End(1, 2))
        assert self.client.control.await_(Result) == Result(1, "", "")


Lie = Callable[[World], RawClient]


def resuming(*, epoch: int = 1, more: int = 0, **lies: Any) -> Lie:
    """A RESUME on a connection that is right so far; ``more`` messages are said to have been received."""

    def lie(world: World) -> RawClient:
        connection = world.again(epoch=1)
        connection.resume(epoch=epoch, received=world.received + more, **lies)
        return connection

    return lie


def of_another_session(world: World) -> RawClient:
    """It has a session of its own, and names another's."""
    session = world.client.limits.attributes["session"]
    connection = world.ground.keep(world.other.again(epoch=1, session=session))
    connection.resume(epoch=1, received=world.received)
    return connection


def of_the_honest_session(world: World) -> RawClient:
    connection = world.again(session=bytes.fromhex(world.ground.bystander.id))
    connection.resume(epoch=1, received=0)
    return connection


def unknown(world: World) -> RawClient:
    connection = world.again(session=secrets.token_bytes(16))
    connection.resume(epoch=1, received=0)
    return connection


def instead(*what: Any) -> Lie:
    def lie(world: World) -> RawClient:
        connection = world.again()
        connection.control.send(*what)
        return connection

    return lie


REFUSED: dict[str, tuple[Lie, set[str]]] = {
    "an unknown session": (unknown, {"closed"}),
    "another session of the same peer": (of_another_session, {"auth"}),
    "the session of somebody else": (of_the_honest_session, {"auth"}),
    "a made-up mac": (resuming(mac=secrets.token_bytes(32)), {"auth"}),
    "a short mac": (resuming(mac=bytes(31)), {"auth", "protocol"}),
    "the mac of the other side": (resuming(by_client=False), {"auth"}),
    "another secret": (resuming(secret=bytes(32)), {"auth"}),
    "another certificate": (resuming(fingerprint=bytes(32)), {"auth"}),
    "another nonce": (resuming(client_nonce=bytes(32)), {"auth"}),
    "the nonces swapped": (lambda w: _swapped(w), {"auth"}),
    "another epoch than in HELLO": (resuming(epoch=2), {"auth", "protocol"}),
    "a count that the mac does not cover": (lambda w: _recounted(w), {"auth"}),
    "PARAMS instead": (instead(Params(bytes(32), 1 << 20, 1, 1, (), {})), {"protocol"}),
    "OPEN instead": (instead(Open(1, MESSAGE, 1, 0, "", {})), {"protocol"}),
    "SEEN instead": (instead(Seen(0)), {"protocol"}),
    "PROOF again": (instead(Proof(bytes(32))), {"protocol"}),
    "a record of 0": (instead(record(23, length=0)), {"protocol"}),
    "a record of 2^32-1": (instead(record(23, length=(1 << 32) - 1)), {"protocol"}),
}


def _swapped(world: World) -> RawClient:
    connection = world.again()
    connection.resume(
        epoch=1, received=world.received, client_nonce=connection.server_nonce, server_nonce=connection.nonce
    )
    return connection


def _recounted(world: World) -> RawClient:
    connection = world.again()
    connection.control.send(Resume(1, world.received, _mac_of(connection, world.received + 1)))
    return connection


@pytest.mark.parametrize(("lie", "kinds"), REFUSED.values(), ids=REFUSED)
def test_who_cannot_prove_it_is_refused_and_the_session_goes_on(ground: Any, lie: Lie, kinds: set[str]) -> None:
    world = World(ground)
    close = lie(world).control.ending()
    assert close is not None and close.kind in kinds
    world.goes_on()


HELLOS: dict[str, dict[str, Any]] = {
    "no epoch": {"session": bytes(16)},
    "no session": {"epoch": 1},
    "epoch 0": {"session": bytes(16), "epoch": 0},
    "epoch -1": {"session": bytes(16), "epoch": -1},
    "epoch -2^63": {"session": bytes(16), "epoch": -(1 << 63)},
    "epoch true": {"session": bytes(16), "epoch": True},
    "epoch text": {"session": bytes(16), "epoch": "1"},
    "session text": {"session": "x" * 16, "epoch": 1},
    "session of 15": {"session": bytes(15), "epoch": 1},
    "session of 17": {"session": bytes(17), "epoch": 1},
    "session empty": {"session": b"", "epoch": 1},
}


@pytest.mark.parametrize("attributes", HELLOS.values(), ids=HELLOS)
def test_a_hello_that_takes_up_nothing_that_could_be(ground: Any, attributes: dict[str, Any]) -> None:
    client = ground.stranger()
    client.tls()
    client.hello(attributes=attributes)
    close = client.control.ending()
    assert close is not None and close.kind == "protocol"
    ground.honest_works()


def test_the_token_is_asked_for_first(ground: Any) -> None:
    """Who knows a session's id, and no token, learns nothing about it."""
    world = World(ground)
    stranger = ground.stranger()
    stranger.token = b"x" * 32
    stranger.tls()
    stranger.hello(attributes={"session": world.client.limits.attributes["session"], "epoch": 1})
    stranger.heard_hello()
    stranger.proof()
    close = stranger.control.ending()
    assert close is not None and close.kind == "auth"
    world.goes_on()


def test_an_epoch_is_taken_once(ground: Any) -> None:
    world = World(ground)
    first = world.again(epoch=5)
    first.resume(epoch=5, received=world.received)
    assert isinstance(first.control.recv(), Resume)
    first.control.alive()
    for epoch in (5, 4, 1):
        late = world.again(epoch=epoch)
        late.resume(epoch=epoch, received=world.received)
        close = late.control.ending()
        assert close is not None and close.kind in ("auth", "closed"), epoch
        first.control.alive()


def test_a_replayed_resumption_is_refused(ground: Any) -> None:
    """The same RESUME on another connection: its nonces are others."""
    world = World(ground)
    first = world.again(epoch=1)
    first.resume(epoch=1, received=world.received)
    first.control.await_(Resume)
    second = world.again(epoch=2)
    second.control.send(Resume(1, world.received, _mac_of(first, world.received)))
    close = second.control.ending()
    assert close is not None and close.kind == "auth"
    first.control.alive()


def _mac_of(connection: RawClient, received: int) -> bytes:
    return keys.resume_mac(
        connection.secret, by_client=True, epoch=1, received=received, fingerprint=connection.fingerprint,
        client_nonce=connection.nonce, server_nonce=connection.server_nonce,
    )  # fmt: skip


@pytest.mark.parametrize("more", [1, 1000, (1 << 63), U64 - 1000])
def test_a_count_above_what_was_sent_ends_that_session(ground: Any, more: int) -> None:
    world = World(ground)
    connection = world.again()
    connection.resume(epoch=1, received=world.received + more)
    with suppress(Ended):
        while not isinstance(connection.control.recv(), Close):
            pass
    assert world.far.wait_closed(10)
    assert world.far.error.kind == "protocol"


def test_a_count_below_what_was_confirmed_ends_that_session(ground: Any) -> None:
    """What was confirmed is not kept any more."""
    world = World(ground)
    for _ in range(3):
        world.client.control.send(LaneRequest(0, "tcp"))
    while world.received < 4:
        world.client.control.recv()
    world.client.control.send(Seen(4))
    world.client.control.alive()
    connection = world.again()
    connection.resume(epoch=1, received=0)
    with suppress(Ended):
        while not isinstance(connection.control.recv(), Close):
            pass
    assert world.far.wait_closed(10)
    assert world.far.error.kind == "protocol"


def test_connections_that_replace_each_other_leave_one(ground: Any) -> None:
    """Each is proven; all but the last are closed, and that one carries the session."""
    world = World(ground)
    connections = []
    for epoch in range(1, 11):
        connection = world.again(epoch=epoch)
        connection.resume(epoch=epoch, received=world.received)
        connections.append(connection)
    *old, last = connections
    last.control.await_(Resume)
    last.control.alive()
    for connection in (world.client, *old):
        connection.control.ending(within_s=5)
    assert world.far.error is None
    last.control.send(Open(1, MESSAGE, 2, 0, "", {}))
    world.client.lanes[0].data(1, 0, b"ok")
    last.control.send(End(1, 2))
    assert last.control.await_(Result) == Result(1, "", "")


def test_resumptions_at_once_leave_one_connection(ground: Any) -> None:
    """Several have proven themselves before any of them goes on, again and again."""
    world = World(ground)
    for turn in range(15):
        epochs = range(3 * turn + 1, 3 * turn + 4)
        rivals = [world.again(epoch=epoch) for epoch in epochs]
        for epoch, connection in zip(epochs, rivals, strict=True):
            connection.resume(epoch=epoch, received=world.received)
        *others, last = rivals
        last.control.await_(Resume)
        last.control.alive()
        for connection in others:
            connection.control.ending(within_s=5)
        last.control.alive()
        assert world.far.error is None


def test_what_the_peer_has_not_taken_in_is_sent_again_once(ground: Any) -> None:
    world = World(ground)
    world.client.control.send(Open(1, MESSAGE, 2, 0, "", {}))
    world.client.lanes[0].data(1, 0, b"ok")
    world.client.control.send(End(1, 2))
    assert world.client.control.await_(Result) == Result(1, "", "")
    connection = world.again()
    connection.resume(epoch=1, received=world.received - 1)
    resumed = connection.control.await_(Resume)
    assert resumed.received == 2, "OPEN and END"
    assert connection.control.await_(Result) == Result(1, "", "")
    connection.control.alive()
    assert sum(isinstance(message, Result) for message in connection.control.heard) == 1


def test_resuming_a_session_that_has_ended(ground: Any) -> None:
    world = World(ground)
    world.client.control.send(Close("", ""))
    world.client.control.ending()
    wait_until(lambda: world.far not in ground.server.sessions, "the server to have forgotten it")
    connection = world.again()
    connection.resume(epoch=1, received=world.received)
    close = connection.control.ending()
    assert close is not None and close.kind == "closed"


@pytest.mark.parametrize("step", ["proofs", "resume"])
def test_a_resumption_that_stops_half_way(ground: Any, step: str) -> None:
    """Cut before RESUME, it changes nothing; cut after it, the session waits for the next one."""
    world = World(ground)
    connection = world.again(epoch=1)
    if step == "resume":
        connection.resume(epoch=1, received=world.received)
        connection.control.await_(Resume)
    connection.close()
    if step == "proofs":
        world.goes_on()
    else:
        wait_until(lambda: not world.far.core.control_up, "the connection to be missed")
        last = world.again(epoch=2)
        last.resume(epoch=2, received=world.received)
        last.control.await_(Resume)
        last.control.alive()
