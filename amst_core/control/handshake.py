"""How two sides come to trust each other: HELLO, PROOF, PARAMS (docs/security.md, docs/wire-format.md).

The client proves first, so that a stranger learns nothing from a server; each side sends its half of the
session secret only after it has verified the other's proof. A refusal is CLOSE(kind, message).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from ..errors import AmstError, AuthError, BrokenError, ConnectError, ProtocolError, error_from_kind
from ..interfaces import Advertisement
from ..security import keys
from ..wire.fields import AttributeValue
from ..wire.messages import PROTOCOL_VERSION, Close, Hello, Message, Params, Proof
from .channel import ControlChannel

VERSION_REFUSED: Final = "version"
"""CLOSE kind: no common protocol version."""

SOFTWARE: Final = "software"
STREAMS: Final = "streams"
TRANSPORTS: Final = "transports"
PLAINTEXT: Final = "plaintext"
SESSION: Final = "session"


@dataclass(frozen=True, slots=True)
class Wish:
    """What the client asks for in its HELLO: data in plaintext, and lanes at once."""

    plaintext: bool
    streams: int
    transports: tuple[str, ...]  # in order of preference


@dataclass(frozen=True, slots=True)
class Terms:
    """What one side offers: its limits and the transports it can be reached by."""

    max_chunk: int
    max_open: int
    initial_credit: int
    transports: tuple[Advertisement, ...] = ()


@dataclass(frozen=True, slots=True)
class Agreement:
    """The outcome: the session's secret and what the peer offers."""

    session_id: str
    secret: bytes
    peer: Terms
    wish: Wish


def connect(channel: ControlChannel, *, token: bytes, wish: Wish, terms: Terms, deadline: float) -> Agreement:
    """The client's side, on a fresh connection.

    Raises:
        ConnectError: not an AMST server, no common version, or the server is full.
        AuthError, RefusedError: the token or the wish was not accepted, or the server could not prove itself.
        DeadlineError: no answer before ``deadline`` (monotonic seconds).
    """
    channel.establish(deadline)
    nonce = secrets.token_bytes(keys.NONCE_SIZE)
    attributes: dict[str, AttributeValue] = {
        SOFTWARE: "amst",
        STREAMS: wish.streams,
        TRANSPORTS: ",".join(wish.transports),
        PLAINTEXT: wish.plaintext,
    }
    channel.send(Hello((PROTOCOL_VERSION,), nonce, attributes))
    hello = _expect(channel, Hello, deadline)
    if hello.versions != (PROTOCOL_VERSION,):
        raise ConnectError(f"{channel.peer} chose protocol version {hello.versions}, not {PROTOCOL_VERSION}",
                           peer=channel.peer, retryable=False)  # fmt: skip
    fingerprint = keys.certificate_fingerprint(channel.certificate())
    proof = {"fingerprint": fingerprint, "client_nonce": nonce, "server_nonce": _nonce(hello)}
    channel.send(Proof(keys.client_proof(token, **proof)))
    answer = _expect(channel, Proof, deadline)
    if not keys.same_mac(keys.server_proof(token, **proof), answer.mac):
        raise AuthError(f"{channel.peer} accepted the token without knowing it: somebody sits in between; "
                        "check the network path", peer=channel.peer)  # fmt: skip
    channel.prove()
    theirs = _expect(channel, Params, deadline)
    half = secrets.token_bytes(keys.HALF_SIZE)
    channel.send(_params(half, terms, {}))
    channel.flush_all(deadline)
    session = theirs.attributes.get(SESSION)
    if not isinstance(session, bytes) or len(session) != 16:
        raise ProtocolError("PARAMS without a session id", peer=channel.peer)
    return Agreement(session.hex(), keys.session_secret(half, _half(theirs)), _terms(theirs), wish)


def accept(
    channel: ControlChannel,
    *,
    token: bytes,
    certificate: bytes,
    terms: Terms,
    admit: Callable[[Wish], None],
    deadline: float,
) -> Agreement:
    """The server's side, on an accepted connection. ``admit`` raises what the client is refused with.

    Raises:
        AmstError: the client is not one of ours or was refused; it has been told.
    """
    channel.establish(deadline)
    try:
        hello = _expect(channel, Hello, deadline)
        if PROTOCOL_VERSION not in hello.versions:
            raise _VersionRefused(f"this server speaks protocol version {PROTOCOL_VERSION}, not {hello.versions}")
        wish = _wish(hello.attributes)
        nonce = secrets.token_bytes(keys.NONCE_SIZE)
        channel.send(Hello((PROTOCOL_VERSION,), nonce, {SOFTWARE: "amst"}))
        proof = {
            "fingerprint": keys.certificate_fingerprint(certificate),
            "client_nonce": _nonce(hello),
            "server_nonce": nonce,
        }
        answer = _expect(channel, Proof, deadline)
        if not keys.same_mac(keys.client_proof(token, **proof), answer.mac):
            raise AuthError("the token is not the one this server has; copy the server's token file "
                            "and name it with --token-file")  # fmt: skip
        channel.prove()
        admit(wish)
    except AmstError as err:
        kind = VERSION_REFUSED if isinstance(err, _VersionRefused) else err.kind
        refuse(channel, kind, err.message, deadline)
        raise
    half, session = secrets.token_bytes(keys.HALF_SIZE), secrets.token_bytes(16)
    channel.send(Proof(keys.server_proof(token, **proof)))
    channel.send(_params(half, terms, {SESSION: session}))
    theirs = _expect(channel, Params, deadline)
    return Agreement(session.hex(), keys.session_secret(_half(theirs), half), _terms(theirs), wish)


def refuse(channel: ControlChannel, kind: str, message: str, deadline: float) -> None:
    """Tell the peer why, as far as it still listens."""
    try:
        channel.send(Close(kind, message))
        channel.flush_all(min(deadline, time.monotonic() + 1.0))
    except AmstError:
        pass  # it is gone: there is nobody to tell


class _VersionRefused(ConnectError):
    """No common protocol version."""


_M = TypeVar("_M", Hello, Proof, Params)


def _expect(channel: ControlChannel, kind: type[_M], deadline: float) -> _M:
    message: Message = channel.wait_message(deadline)
    if isinstance(message, Close):
        raise _refusal(message, channel.peer)
    if not isinstance(message, kind):
        raise ProtocolError(
            f"{channel.peer} sent {type(message).__name__.upper()} where {kind.__name__.upper()} is due",
            peer=channel.peer,
        )
    return message


def _refusal(close: Close, peer: str) -> AmstError:
    what = f"{peer} refused the session: {close.message}"
    if close.kind in (VERSION_REFUSED, "", BrokenError.kind):
        return ConnectError(what, peer=peer, retryable=False)
    if close.kind in ("busy", ConnectError.kind):
        return ConnectError(what, peer=peer, retryable=True)
    return error_from_kind(close.kind, what, peer=peer)


def _nonce(hello: Hello) -> bytes:
    if len(hello.nonce) != keys.NONCE_SIZE:
        raise ProtocolError(f"HELLO with a nonce of {len(hello.nonce)} bytes, not {keys.NONCE_SIZE}")
    return hello.nonce


def _half(params: Params) -> bytes:
    if len(params.secret) != keys.HALF_SIZE:
        raise ProtocolError(f"PARAMS with {len(params.secret)} secret bytes, not {keys.HALF_SIZE}")
    return params.secret


def _wish(attributes: Mapping[str, AttributeValue]) -> Wish:
    streams = attributes.get(STREAMS, 1)
    transports = attributes.get(TRANSPORTS, "")
    plaintext = attributes.get(PLAINTEXT, False)
    if not isinstance(streams, int) or not isinstance(transports, str) or not isinstance(plaintext, bool):
        raise ProtocolError("HELLO attributes of the wrong type")
    if not 0 <= streams <= 65535:
        raise ProtocolError(f"HELLO asks for {streams} streams")
    return Wish(plaintext, streams, tuple(filter(None, transports.split(","))))


def _params(half: bytes, terms: Terms, attributes: Mapping[str, AttributeValue]) -> Params:
    transports = tuple((a.transport, a.tag, a.address) for a in terms.transports)
    return Params(half, terms.max_chunk, terms.max_open, terms.initial_credit, transports, attributes)


def _terms(params: Params) -> Terms:
    return Terms(
        params.max_chunk,
        params.max_open,
        params.initial_credit,
        tuple(Advertisement(name, tag, address) for name, tag, address in params.transports),
    )
