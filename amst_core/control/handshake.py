"""How two sides come to trust each other: HELLO, PROOF, PARAMS (docs/security.md, docs/wire-format.md).

The client proves first, so that a stranger learns nothing from a server; each side sends its half of the
session secret only after it has verified the other's proof. A refusal is CLOSE(kind, message).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from ..congestion import AUTO, NAME, Backend
from ..errors import AmstError, AuthError, BrokenError, ClosedError, ConnectError, ProtocolError, error_from_kind
from ..interfaces import Advertisement, Mode
from ..security import keys
from ..wire.fields import AttributeValue
from ..wire.messages import PROTOCOL_VERSION, Close, Hello, Message, Params, Proof, Resume
from .channel import ControlChannel

VERSION_REFUSED: Final = "version"
"""CLOSE kind: no common protocol version."""

SOFTWARE: Final = "software"
STREAMS: Final = "streams"
MIN_STREAMS: Final = "min_streams"
MAX_STREAMS: Final = "max_streams"
TRANSPORTS: Final = "transports"
PLAINTEXT: Final = "plaintext"
VERIFY: Final = "verify"
CONGESTION: Final = "congestion"
BACKEND: Final = "backend"
POLITE: Final = "polite"
MODE: Final = "mode"
SESSION: Final = "session"
EPOCH: Final = "epoch"

SESSION_ID_SIZE: Final = 16

MAX_COUNT: Final = 65535
"""Most streams that a HELLO may name."""

_Value = TypeVar("_Value", bool, int, str)
_Word = TypeVar("_Word", Mode, Backend)


@dataclass(frozen=True, slots=True)
class Wish:
    """What the client asks for in its HELLO: data in plaintext, lanes at once, a congestion control for what comes.

    The server may have ``least_streams`` to ``most_streams`` for what it sends; by default ``streams`` and no others.
    """

    plaintext: bool
    streams: int
    transports: tuple[str, ...]  # in order of preference
    verify: bool = True  # by CRC-32C what travels in plaintext; the rest is verified anyway
    congestion: str = AUTO  # of what the server sends
    mode: Mode = Mode.DATACENTER  # what the path looks like to the client
    least_streams: int | None = None
    most_streams: int | None = None
    backend: Backend = Backend.AUTO  # who runs the congestion control of what the server sends
    polite: bool = False  # what the server sends is to take no more than one flow's share

    @property
    def verified(self) -> bool:
        """Whether all that arrives is to be verified."""
        return self.verify or not self.plaintext


@dataclass(frozen=True, slots=True)
class Terms:
    """What one side offers: its limits and the transports it can be reached by."""

    max_chunk: int
    max_open: int
    initial_credit: int
    transports: tuple[Advertisement, ...] = ()


@dataclass(frozen=True, slots=True)
class Agreement:
    """The outcome: the session's secret, what the peer offers, and the certificate it showed.

    ``verified``: what arrives is, because the client wished for it or the server knows no other way.
    """

    session_id: str
    secret: bytes
    peer: Terms
    wish: Wish
    fingerprint: bytes = b""
    verified: bool = True


class Resumable(Protocol):
    """A session at the server that may be taken up again after its control channel broke."""

    @property
    def secret(self) -> bytes: ...

    @property
    def epoch(self) -> int: ...

    def yield_channel(self, epoch: int, timeout_s: float) -> int:
        """Drop the channel it has, if any, in favour of the one of ``epoch``; the messages taken in over all of them.

        Raises:
            AmstError: it has ended, or a later epoch came first.
        """
        ...


@dataclass(frozen=True, slots=True)
class Resumption:
    """A session that goes on over a new channel; the peer had taken in ``received`` messages before."""

    session_id: str
    received: int
    epoch: int


def connect(channel: ControlChannel, *, token: bytes, wish: Wish, terms: Terms, deadline: float) -> Agreement:
    """The client's side, on a fresh connection.

    Raises:
        ConnectError: not an AMST server, no common version, or the server is full.
        AuthError, RefusedError: the token or the wish was not accepted, or the server could not prove itself.
        DeadlineError: no answer before ``deadline`` (monotonic seconds).
    """
    binding = _prove_to_server(
        channel,
        token,
        {
            SOFTWARE: "amst",
            STREAMS: wish.streams,
            TRANSPORTS: ",".join(wish.transports),
            PLAINTEXT: wish.plaintext,
            VERIFY: wish.verified,
            CONGESTION: wish.congestion,
            MODE: wish.mode.value,
            MIN_STREAMS: wish.streams if wish.least_streams is None else wish.least_streams,
            MAX_STREAMS: wish.streams if wish.most_streams is None else wish.most_streams,
            BACKEND: wish.backend.value,
            POLITE: wish.polite,
        },
        deadline,
    )
    theirs = _expect(channel, Params, deadline)
    half = secrets.token_bytes(keys.HALF_SIZE)
    channel.send(_params(half, terms, {}))
    channel.flush_all(deadline)
    session = theirs.attributes.get(SESSION)
    if not isinstance(session, bytes) or len(session) != SESSION_ID_SIZE:
        raise ProtocolError("PARAMS without a session id", peer=channel.peer)
    verified = theirs.attributes.get(VERIFY, True)
    if type(verified) is not bool or verified < wish.verified:
        raise ProtocolError(f"PARAMS answers {verified!r} to the wish for verification", peer=channel.peer)
    secret = keys.session_secret(half, _half(theirs))
    return Agreement(session.hex(), secret, _terms(theirs), wish, binding.fingerprint, verified)


def resume(
    channel: ControlChannel, *, token: bytes, agreed: Agreement, epoch: int, received: int, deadline: float
) -> Resumption:
    """The client's side of taking the session of ``agreed`` up again, on a fresh connection.

    ``epoch`` rises with every attempt; ``received`` is how many of the server's messages have been taken in.

    Raises:
        ClosedError: the server has no such session (any more): it ended, or the server was started anew.
        AuthError: another certificate, or the server does not know the session's secret.
        AmstError: as `connect`.
    """
    session = bytes.fromhex(agreed.session_id)
    binding = _prove_to_server(channel, token, {SOFTWARE: "amst", SESSION: session, EPOCH: epoch}, deadline)
    if binding.fingerprint != agreed.fingerprint:
        raise AuthError(f"{channel.peer} shows another certificate than when the session began", peer=channel.peer)
    mac = binding.resume_mac(agreed.secret, by_client=True, epoch=epoch, received=received)
    channel.send(Resume(epoch, received, mac))
    answer = _expect(channel, Resume, deadline)
    expected = binding.resume_mac(agreed.secret, by_client=False, epoch=epoch, received=answer.received)
    if answer.epoch != epoch or not keys.same_mac(expected, answer.mac):
        raise AuthError(f"{channel.peer} does not know the secret of the session", peer=channel.peer)
    return Resumption(agreed.session_id, answer.received, epoch)


@dataclass(frozen=True, slots=True)
class _Binding:
    """What ties proofs to one handshake."""

    fingerprint: bytes
    client_nonce: bytes
    server_nonce: bytes

    def client_proof(self, token: bytes) -> bytes:
        return keys.client_proof(token, **self._fields())

    def server_proof(self, token: bytes) -> bytes:
        return keys.server_proof(token, **self._fields())

    def resume_mac(self, secret: bytes, *, by_client: bool, epoch: int, received: int) -> bytes:
        return keys.resume_mac(secret, by_client=by_client, epoch=epoch, received=received, **self._fields())

    def _fields(self) -> dict[str, bytes]:
        return {
            "fingerprint": self.fingerprint,
            "client_nonce": self.client_nonce,
            "server_nonce": self.server_nonce,
        }


def _prove_to_server(
    channel: ControlChannel, token: bytes, attributes: Mapping[str, AttributeValue], deadline: float
) -> _Binding:
    """The client's HELLO and both proofs."""
    channel.establish(deadline)
    nonce = secrets.token_bytes(keys.NONCE_SIZE)
    channel.send(Hello((PROTOCOL_VERSION,), nonce, attributes))
    hello = _expect(channel, Hello, deadline)
    if hello.versions != (PROTOCOL_VERSION,):
        raise ConnectError(f"{channel.peer} chose protocol version {hello.versions}, not {PROTOCOL_VERSION}",
                           peer=channel.peer, retryable=False)  # fmt: skip
    binding = _Binding(keys.certificate_fingerprint(channel.certificate()), nonce, _nonce(hello))
    channel.send(Proof(binding.client_proof(token)))
    answer = _expect(channel, Proof, deadline)
    if not keys.same_mac(binding.server_proof(token), answer.mac):
        raise AuthError(f"{channel.peer} accepted the token without knowing it: somebody sits in between; "
                        "check the network path", peer=channel.peer)  # fmt: skip
    channel.prove()
    return binding


def accept(
    channel: ControlChannel,
    *,
    token: bytes,
    certificate: bytes,
    admit: Callable[[Wish], Terms],
    find: Callable[[str], Resumable | None],
    deadline: float,
) -> Agreement | Resumption:
    """The server's side, on an accepted connection.

    ``admit`` says on which terms a client gets the new session that it wishes for, or raises what it is refused with;
    it is asked once the client has proven itself. ``find`` knows the sessions that
    there are, by id, for one that takes its own up again.

    Raises:
        AmstError: the client is not one of ours or was refused; it has been told.
    """
    channel.establish(deadline)
    try:
        hello = _expect(channel, Hello, deadline)
        if PROTOCOL_VERSION not in hello.versions:
            raise _VersionRefused(f"this server speaks protocol version {PROTOCOL_VERSION}, not {hello.versions}")
        resuming = _resuming(hello.attributes)
        wish = _wish(hello.attributes)
        nonce = secrets.token_bytes(keys.NONCE_SIZE)
        channel.send(Hello((PROTOCOL_VERSION,), nonce, {SOFTWARE: "amst"}))
        binding = _Binding(keys.certificate_fingerprint(certificate), _nonce(hello), nonce)
        answer = _expect(channel, Proof, deadline)
        if not keys.same_mac(binding.client_proof(token), answer.mac):
            raise AuthError("the token is not the one this server has; copy the server's token file "
                            "and name it with --token-file")  # fmt: skip
        channel.prove()
        if resuming is not None:
            return _accept_resumption(channel, token, binding, find, *resuming, deadline)
        terms = admit(wish)
    except AmstError as err:
        kind = VERSION_REFUSED if isinstance(err, _VersionRefused) else err.kind
        refuse(channel, kind, err.message, deadline)
        raise
    half, session = secrets.token_bytes(keys.HALF_SIZE), secrets.token_bytes(SESSION_ID_SIZE)
    channel.send(Proof(binding.server_proof(token)))
    channel.send(_params(half, terms, {SESSION: session, VERIFY: wish.verified}))
    theirs = _expect(channel, Params, deadline)
    secret = keys.session_secret(_half(theirs), half)
    return Agreement(session.hex(), secret, _terms(theirs), wish, binding.fingerprint, wish.verified)


def _accept_resumption(
    channel: ControlChannel,
    token: bytes,
    binding: _Binding,
    find: Callable[[str], Resumable | None],
    session_id: str,
    epoch: int,
    deadline: float,
) -> Resumption:
    channel.send(Proof(binding.server_proof(token)))
    theirs = _expect(channel, Resume, deadline)
    session = find(session_id)
    if session is None:
        raise ClosedError("this server has no such session: it has ended, or the server was started anew")
    expected = binding.resume_mac(session.secret, by_client=True, epoch=epoch, received=theirs.received)
    if theirs.epoch != epoch or not keys.same_mac(expected, theirs.mac):
        raise AuthError("the session's secret was not proven")
    # only now may the channel that the session has be touched
    received = session.yield_channel(epoch, max(0.0, deadline - time.monotonic()))
    channel.send(Resume(epoch, received, binding.resume_mac(session.secret, by_client=False, epoch=epoch,
                                                            received=received)))  # fmt: skip
    channel.flush_all(deadline)
    return Resumption(session_id, theirs.received, epoch)


def refuse(channel: ControlChannel, kind: str, message: str, deadline: float) -> None:
    """Tell the peer why, as far as it still listens."""
    try:
        channel.send(Close(kind, message))
        channel.flush_all(min(deadline, time.monotonic() + 1.0))
    except AmstError:
        pass  # it is gone: there is nobody to tell


class _VersionRefused(ConnectError):
    """No common protocol version."""


_M = TypeVar("_M", Hello, Proof, Params, Resume)


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
    def read(key: str, default: _Value) -> _Value:
        value = attributes.get(key, default)
        if type(value) is not type(default):  # a truth value is an int for isinstance
            raise ProtocolError(f"HELLO has {key} of the wrong type")
        return value

    def read_word(key: str, words: type[_Word], default: _Word) -> _Word:
        try:
            return words(read(key, default.value))
        except ValueError:
            raise ProtocolError(f"HELLO names a {key} that does not exist") from None

    read(SOFTWARE, "")
    congestion = read(CONGESTION, AUTO)
    if congestion != AUTO and not NAME.fullmatch(congestion):
        raise ProtocolError("HELLO asks for a congestion control by what is no name")
    streams = read(STREAMS, 1)
    least, most = read(MIN_STREAMS, streams), read(MAX_STREAMS, streams)
    for count in (streams, least, most):
        if not 0 <= count <= MAX_COUNT:
            raise ProtocolError(f"HELLO asks for {count} streams")
    if not least <= streams <= most:
        raise ProtocolError(f"HELLO asks for {streams} streams, which are to be {least} to {most}")
    return Wish(
        read(PLAINTEXT, False),
        streams,
        tuple(filter(None, read(TRANSPORTS, "").split(","))),
        read(VERIFY, True),
        congestion,
        read_word(MODE, Mode, Mode.DATACENTER),
        least,
        most,
        read_word(BACKEND, Backend, Backend.AUTO),
        read(POLITE, False),
    )


def _resuming(attributes: Mapping[str, AttributeValue]) -> tuple[str, int] | None:
    """The session that a client wants to take up again, and in which epoch."""
    session, epoch = attributes.get(SESSION), attributes.get(EPOCH)
    if session is None and epoch is None:
        return None
    if not isinstance(session, bytes) or len(session) != SESSION_ID_SIZE or type(epoch) is not int or epoch < 1:
        raise ProtocolError("HELLO takes up a session without naming it and its epoch")
    return session.hex(), epoch


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
