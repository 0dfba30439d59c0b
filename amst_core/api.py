"""Opening and accepting sessions: where plugins, settings and credentials come together."""

from __future__ import annotations

import itertools
import logging
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from .control import handshake
from .control.channel import ControlChannel
from .control.listener import Listener
from .endpoint import DEFAULT_PORT, parse_endpoint
from .engine import Limits
from .errors import (
    AmstError,
    AuthError,
    BusyError,
    ClosedError,
    ConnectError,
    DeadlineError,
    PluginError,
    ProtocolError,
    UnavailableError,
    UsageError,
)
from .files.root import Root
from .interfaces import Advertisement, Candidate, Endpoint, Lane, LaneTimeouts, Mode, Transport
from .plugins import FIRST_PARTY, Plugins
from .security.identity import ServerIdentity, find_token, state_dir
from .security.tls import TlsStream, client_context, server_context
from .session.admission import LaneIdentity, challenge, protection_for
from .session.core import INITIAL_CREDIT, SessionCore
from .session.lane_opener import LaneOpener, Route
from .session.session import Session
from .settings.load import load_settings
from .settings.values import Settings
from .wire.messages import LaneGrant, LaneRequest

_log = logging.getLogger("amst.api")

TRANSPORT_GROUP: Final = "amst.transport"

LOOPBACK: Final = ("127.", "[::1]", "[::ffff:127.")


def connect(
    address: str,
    *,
    settings: Settings | None = None,
    token: bytes | None = None,
    streams: int | None = None,
    transport: str | None = None,
    require: str | None = None,
    plaintext: bool | None = None,
    root: str | os.PathLike[str] | None = None,
) -> Session:
    """Open a session with the server at ``address`` (``amst://HOST:PORT`` or ``HOST:PORT``).

    Args:
        settings: as `load_settings` gives them; by default from the environment.
        token: the server's secret; by default ``AMST_TOKEN`` or the state directory's.
        streams: how many to start with; by default ``transport.modes.datacenter_streams``.
        transport: the one preferred; another one runs, with a reason, when it cannot be used.
        require: the one that must run.
        plaintext: whether data travels unencrypted (checked by CRC-32C); the server must allow it.
        root: a directory that the server may read and write, as the server's own root is for this side.

    Raises:
        UsageError: the address, the number of streams or the transport's name makes no sense.
        ConnectError: the server cannot be reached, is none, or is full.
        AuthError: there is no token, or the server does not accept it.
        UnavailableError: ``require`` cannot be met.
        PluginError: no transport is installed.
    """
    started = time.monotonic()
    endpoint = parse_endpoint(address)
    settings = settings if settings is not None else load_settings()
    amst = settings.transport.amst
    count = settings.transport.modes.datacenter_streams if streams is None else streams
    if not amst.min_streams <= count <= amst.max_streams:
        raise UsageError(
            f"{count} streams: {amst.min_streams} to {amst.max_streams} are possible (transport.amst.min_streams, "
            "transport.amst.max_streams)"
        )
    wants_plaintext = settings.security.plaintext if plaintext is None else plaintext
    choice = _Choice(Plugins(), settings, endpoint, preferred=transport, required=require)
    token = token if token is not None else find_token()
    if token is None:
        raise AuthError(
            f"no token for {endpoint}: set AMST_TOKEN, name a file with --token-file, or share the server's "
            "state directory (AMST_STATE_DIR)"
        )
    files = Root(root) if root is not None else None
    deadline = started + amst.connect_timeout
    sock = _dial(endpoint, amst.connect_timeout)
    channel = ControlChannel(sock, TlsStream(client_context(), server_side=False, peer=str(endpoint)), peer=str(endpoint))
    try:
        wish = handshake.Wish(wants_plaintext, count, tuple(choice.order))
        agreement = handshake.connect(channel, token=token, wish=wish, terms=_terms(settings), deadline=deadline)
        name = choice.settle([offer.transport for offer in agreement.peer.transports])
        core = _core(settings, agreement.peer, peer=str(endpoint), is_opener=True)
    except BaseException:
        channel.close()
        choice.close()
        raise
    session = Session(
        core,
        channel,
        session_id=agreement.session_id,
        encrypted=not wants_plaintext,
        root=files,
        max_message=settings.limits.max_message,
        max_streams=amst.max_streams,
        mode=Mode.DATACENTER.value,
        on_lane_request=lambda session, request: core.tell(LaneRequest(_missing(core, request), name)),
        on_end=lambda _: choice.ended(core.error),
    )
    host, port = channel.remote_address
    session.opener = LaneOpener(
        core,
        secret=agreement.secret,
        plaintext=wants_plaintext,
        route=Route(
            host,
            port,
            {offer.transport: offer for offer in agreement.peer.transports},
            amst.connect_timeout,
            _timeouts(settings),
        ),
        transports=choice.transports,
    )
    session.wanted_transport = name
    session.transport_reason = choice.reason
    session.start()
    try:
        session.opener.wait_first(max(0.1, deadline - time.monotonic()))
    except AmstError as err:
        session.abort()
        if core.error is not err and not isinstance(err, ConnectError | DeadlineError):
            raise ConnectError(f"cannot open a stream to {endpoint}: {err}", peer=str(endpoint)) from err
        raise
    session.setup_seconds = time.monotonic() - started
    choice.opened(session)
    return session


def listen(
    address: str = f"[::]:{DEFAULT_PORT}",
    *,
    root: str | os.PathLike[str] | None = None,
    settings: Settings | None = None,
    state_dir: str | os.PathLike[str] | None = None,
    on_session: Callable[[Session], None] | None = None,
) -> Server:
    """Accept sessions at ``address``.

    Args:
        root: the directory whose files the peers may read and write; None serves no files.
        state_dir: where token, key and certificate are kept, made when missing; by default
            ``AMST_STATE_DIR``, else ``~/.local/state/amst``.
        on_session: called with each new session on a thread of its own; without it use `Server.accept`.

    Raises:
        ConnectError: the address cannot be listened on.
        PluginError: no transport can be used.
    """
    return Server(
        parse_endpoint(address),
        root=root,
        settings=settings if settings is not None else load_settings(),
        state=Path(state_dir) if state_dir is not None else None,
        on_session=on_session,
    )


class Server:
    """Accepts sessions until closed. Made by `listen`. Thread-safe."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        root: str | os.PathLike[str] | None,
        settings: Settings,
        state: Path | None,
        on_session: Callable[[Session], None] | None,
    ) -> None:
        self._settings = settings
        self._on_session = on_session
        self._plugins = Plugins()
        directory = state if state is not None else state_dir(os.environ)
        identity = ServerIdentity.load_or_create(directory)
        self._identity = identity
        self._tls = server_context(identity.certificate_path, identity.key_path)
        held = directory.stat()
        self._root = Root(root, forbidden=[(held.st_dev, held.st_ino)]) if root is not None else None
        self._transports = _usable_transports(self._plugins, settings)
        self._advertised: dict[str, Advertisement] = {}
        self._by_tag: dict[int, Transport] = {}
        for tag, (name, transport) in enumerate(self._transports.items(), 1):
            self._by_tag[tag] = transport
            self._advertised[name] = transport.advertise(tag, lambda lane, t=transport: self._admit(lane, t))  # type: ignore[misc]
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}
        self._admitting = 0  # handshakes that count towards limits.sessions
        self._grants: dict[int, _Grant] = {}
        self._incarnations = itertools.count(secrets.randbits(48) + 1)
        self._accepted: queue.SimpleQueue[Session | None] = queue.SimpleQueue()
        self._closed = False
        self._listener = Listener(
            endpoint,
            on_control=self._on_control,
            on_lane=self._on_lane,
            handshake_timeout_s=settings.limits.handshake_timeout,
        )

    @property
    def address(self) -> str:
        """``HOST:PORT`` it listens on, port 0 resolved, an IPv6 host in brackets."""
        return self._listener.address

    @property
    def token(self) -> bytes:
        """The secret that clients must know."""
        return self._identity.token

    @property
    def sessions(self) -> list[Session]:
        """The live sessions."""
        with self._lock:
            return list(self._sessions.values())

    def accept(self, timeout: float | None = None) -> Session:
        """The next new session (only without ``on_session``).

        Raises:
            DeadlineError: none within ``timeout`` seconds.
            ClosedError: the server is closed.
        """
        try:
            session = self._accepted.get(timeout=timeout)
        except queue.Empty:
            raise DeadlineError(f"no session within {timeout} s") from None
        if session is None:
            self._accepted.put(None)  # for the next one who waits
            raise ClosedError("the server is closed")
        return session

    def __iter__(self) -> Iterator[Session]:
        while True:
            try:
                yield self.accept()
            except ClosedError:
                return

    def close(self, timeout_s: float = 30.0) -> None:
        """Stop accepting, let what is under way finish for ``timeout_s`` seconds, then end every session.

        Raises:
            DeadlineError: some transfers were not finished in time; says how many and with whom.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._listener.close()
        deadline = time.monotonic() + timeout_s
        late: list[str] = []
        sessions = self.sessions
        for session in sessions:
            try:
                session.drain(max(0.0, deadline - time.monotonic()))
                session.close(max(0.0, deadline - time.monotonic()))
            except AmstError as err:
                late.append(str(err))
                session.abort()
        for session in sessions:
            session.wait_closed(5.0)
        self._accepted.put(None)
        for transport in self._transports.values():
            transport.close()
        if self._root is not None:
            self._root.close()
        if late:
            raise DeadlineError("; ".join(late))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(30.0 if kind is None else 0.0)

    # ---- connections -----------------------------------------------------------------------------

    def _on_control(self, sock: socket.socket, peer: str) -> None:
        """A control connection: prove, agree, begin a session."""
        deadline = time.monotonic() + self._settings.limits.handshake_timeout
        channel = ControlChannel(sock, TlsStream(self._tls, server_side=True, peer=peer), peer=peer)
        counted = False

        def admit(wish: handshake.Wish) -> None:
            nonlocal counted
            if wish.plaintext and not (self._settings.security.allow_plaintext or peer.startswith(LOOPBACK)):
                raise AuthError("this server allows no plaintext from other machines (security.allow_plaintext)")
            with self._lock:
                if self._closed:
                    raise BusyError("the server is stopping")
                if len(self._sessions) + self._admitting >= self._settings.limits.sessions:
                    raise BusyError(f"the server has its {self._settings.limits.sessions} sessions (limits.sessions)")
                self._admitting += 1
                counted = True

        try:
            agreement = handshake.accept(
                channel,
                token=self._identity.token,
                certificate=self._identity.certificate_der,
                terms=_terms(self._settings, tuple(self._advertised.values())),
                admit=admit,
                deadline=deadline,
            )
            session = self._begin(channel, agreement, peer)
        except BaseException:
            channel.close()
            raise
        finally:
            if counted:
                with self._lock:
                    self._admitting -= 1
        self._plugins.notify(
            "amst_session_opened",
            session_id=session.id,
            peer=peer,
            transport=session.wanted_transport,
            mode=Mode.DATACENTER.value,
        )
        _log.info("session %s opened by %s", session.id[:8], peer)
        if self._on_session is not None:
            self._on_session(session)
        else:
            self._accepted.put(session)

    def _begin(self, channel: ControlChannel, agreement: handshake.Agreement, peer: str) -> Session:
        wish = agreement.wish
        core = _core(self._settings, agreement.peer, peer=peer, is_opener=False)
        session = Session(
            core,
            channel,
            session_id=agreement.session_id,
            encrypted=not wish.plaintext,
            root=self._root,
            max_message=self._settings.limits.max_message,
            max_streams=self._settings.transport.amst.max_streams,
            mode=Mode.DATACENTER.value,
            on_lane_request=lambda s, request: self._grant(s, request.count, request.transport, agreement),
            on_end=self._session_ended,
        )
        session.wanted_transport = next((name for name in wish.transports if name in self._transports), "")
        with self._lock:
            if self._closed:
                raise BusyError("the server is stopping")
            self._sessions[session.id] = session
        if session.wanted_transport:
            self._grant(session, wish.streams, session.wanted_transport, agreement)
        session.start()
        return session

    def _grant(self, session: Session, count: int, transport: str, agreement: handshake.Agreement) -> None:
        """Let the opener open ``count`` more lanes, as far as the limits allow."""
        if transport not in self._transports:
            raise ProtocolError(f"{session.peer} asks for lanes of {transport!r}, which was not advertised")
        with self._lock:
            held = sum(len(s.core.lanes) for s in self._sessions.values()) + len(self._grants)
            own = len(session.core.lanes) + sum(g.session is session for g in self._grants.values())
            most = min(self._settings.limits.lanes - held, self._settings.transport.amst.max_streams - own)
            granted = max(0, min(count, most))
            first = next(self._incarnations)
            for _ in range(granted - 1):
                next(self._incarnations)
            for incarnation in range(first, first + granted):
                self._grants[incarnation] = _Grant(session, transport, agreement)
        if granted < count:
            _log.warning("%s asked for %d streams and gets %d (limits.lanes, max_streams)", session.peer, count, granted)
        session.core.tell(LaneGrant(first, granted, transport))

    def _on_lane(self, sock: socket.socket, tag: int, peer: str) -> None:
        transport = self._by_tag.get(tag)
        if transport is None:
            raise ProtocolError(f"{peer} opened a lane for transport {tag}, which was not advertised")
        self._admit(transport.adopt(sock, _timeouts(self._settings)), transport)

    def _admit(self, lane: Lane, transport: Transport) -> None:
        """A new lane: whose is it, and was it granted?"""
        try:
            claim = challenge(lane, timeout_s=self._settings.limits.handshake_timeout)
            with self._lock:
                grant = self._grants.get(claim.incarnation)
            if grant is None or self._transports.get(grant.transport) is not transport:
                raise AuthError(f"stream {claim.incarnation} was not granted")
            claim.check(grant.agreement.secret)
            with self._lock:
                if self._grants.pop(claim.incarnation, None) is None:
                    raise AuthError(f"stream {claim.incarnation} was admitted before")
            identity = LaneIdentity(grant.agreement.secret, claim.incarnation, is_opener=False)
            core = grant.session.core
            worker = identity.make_worker(
                core,
                lane,
                transport=grant.transport,
                protection=protection_for(transport, plaintext=grant.agreement.wish.plaintext),
            )
            core.lane_joined(worker)
        except BaseException:
            lane.abort()
            raise
        worker.start()

    def _session_ended(self, session: Session) -> None:
        with self._lock:
            self._sessions.pop(session.id, None)
            for incarnation in [i for i, grant in self._grants.items() if grant.session is session]:
                del self._grants[incarnation]
        self._plugins.notify("amst_session_closed", session_id=session.id, error=session.error)
        _log.info("session %s with %s ended: %s", session.id[:8], session.peer, session.error)


class _Grant:
    """The right to open one lane."""

    __slots__ = ("agreement", "session", "transport")

    def __init__(self, session: Session, transport: str, agreement: handshake.Agreement) -> None:
        self.session = session
        self.transport = transport
        self.agreement = agreement


class _Choice:
    """Which transports the client can use towards a peer, and which one runs, with the reason."""

    def __init__(
        self, plugins: Plugins, settings: Settings, peer: Endpoint, *, preferred: str | None, required: str | None
    ) -> None:
        self._plugins = plugins
        self._required = required
        self._asked = required or preferred
        self._session: Session | None = None
        self.reason = ""
        installed = plugins.names(TRANSPORT_GROUP)
        if required is not None and required not in installed:
            raise UnavailableError(f"transport {required!r} is required and not installed{_hint(required)}")
        if preferred is not None and preferred not in installed:
            raise UsageError(
                f"no installed plugin offers transport {preferred!r}; installed: {', '.join(installed) or 'none'}"
                f"{_hint(preferred)}"
            )
        self.transports: dict[str, Transport] = {}
        candidates: list[Candidate] = []
        self._why_not: dict[str, str] = {}
        for name in [required] if required is not None else installed:
            try:
                transport = plugins.transport(name, settings.plugins.get(name, {}))
            except PluginError as err:
                self._why_not[name] = str(err)
                continue
            candidate = transport.probe(peer)
            if candidate.usable:
                self.transports[name] = transport
                candidates.append(candidate)
            else:
                transport.close()
                self._why_not[name] = candidate.reason
        for name, why in self._why_not.items():
            _log.warning("transport %s cannot be used: %s", name, why)
        if required is not None and required not in self.transports:
            raise UnavailableError(f"transport {required!r} is required and cannot be used: {self._why_not[required]}")
        if not self.transports:
            raise _no_transport(self._why_not)
        candidates.sort(key=lambda c: (c.transport != self._asked, -c.score))
        self.order = [candidate.transport for candidate in candidates]

    def settle(self, offered: Sequence[str]) -> str:
        """The transport that runs, given what the peer offers.

        Raises:
            UnavailableError: the required one is not among them.
            ConnectError: none is.
        """
        common = [name for name in self.order if name in offered]
        if self._required is not None and not common:
            raise UnavailableError(
                f"transport {self._required!r} is required; the peer offers {', '.join(offered) or 'none'}"
            )
        if not common:
            raise ConnectError(
                f"no common transport: this side has {', '.join(self.order)}, the peer {', '.join(offered) or 'none'}",
                retryable=False,
            )
        if self._asked is not None and common[0] != self._asked:
            why = self._why_not.get(self._asked, "the peer does not offer it")
            self.reason = f"{self._asked} was asked for, {common[0]} runs: {why}"
            _log.warning("%s", self.reason)
        return common[0]

    def opened(self, session: Session) -> None:
        self._session = session
        self._plugins.notify(
            "amst_session_opened",
            session_id=session.id,
            peer=session.peer,
            transport=session.wanted_transport,
            mode=Mode.DATACENTER.value,
        )

    def ended(self, error: AmstError | None) -> None:
        """The session is over."""
        if self._session is not None:
            self._plugins.notify("amst_session_closed", session_id=self._session.id, error=error)
        self.close()

    def close(self) -> None:
        for transport in self.transports.values():
            transport.close()


def _usable_transports(plugins: Plugins, settings: Settings) -> dict[str, Transport]:
    """Every installed transport that works here; the others are reported by name."""
    usable: dict[str, Transport] = {}
    why_not: dict[str, str] = {}
    for name in plugins.names(TRANSPORT_GROUP):
        try:
            transport = plugins.transport(name, settings.plugins.get(name, {}))
        except PluginError as err:
            why_not[name] = str(err)
            continue
        candidate = transport.probe(None)
        if candidate.usable:
            usable[name] = transport
        else:
            transport.close()
            why_not[name] = candidate.reason
    for name, why in why_not.items():
        _log.warning("transport %s cannot be used: %s", name, why)
    if not usable:
        raise _no_transport(why_not)
    return usable


def _no_transport(why_not: Mapping[str, str]) -> PluginError:
    if why_not:
        reasons = "; ".join(f"{name}: {why}" for name, why in why_not.items())
        return PluginError(f"no transport can be used here ({reasons})")
    return PluginError("no transport plugin is installed; install one, for example: pip install amst-tcp")


def _hint(name: str) -> str:
    distribution = FIRST_PARTY.get((TRANSPORT_GROUP, name))
    return f"; pip install {distribution}" if distribution else ""


def _dial(endpoint: Endpoint, timeout_s: float) -> socket.socket:
    """A TCP connection to the control listener, trying each address of the name in turn."""
    try:
        return socket.create_connection((endpoint.host, endpoint.port), timeout_s, all_errors=True)
    except socket.gaierror as err:
        raise ConnectError(f"cannot find {endpoint.host}: {err.strerror}", peer=str(endpoint), retryable=False) from err
    except ExceptionGroup as group:
        reasons = "; ".join(sorted({str(err) for err in group.exceptions}))
        raise ConnectError(f"cannot connect to {endpoint}: {reasons}", peer=str(endpoint)) from group
    except OSError as err:
        raise ConnectError(f"cannot connect to {endpoint}: {err}", peer=str(endpoint)) from err


def _terms(settings: Settings, advertised: tuple[Advertisement, ...] = ()) -> handshake.Terms:
    return handshake.Terms(
        max_chunk=max(settings.transport.amst.chunk_size, 1 << 20),
        max_open=settings.limits.open_transfers,
        initial_credit=INITIAL_CREDIT,
        transports=advertised,
    )


def _core(settings: Settings, peer_terms: handshake.Terms, *, peer: str, is_opener: bool) -> SessionCore:
    own = _terms(settings)
    return SessionCore(
        peer=peer,
        is_opener=is_opener,
        local=Limits(own.max_chunk, own.max_open, own.initial_credit),
        remote=Limits(peer_terms.max_chunk, peer_terms.max_open, peer_terms.initial_credit),
        memory=settings.limits.memory,
        max_message=settings.limits.max_message,
        chunk_size=settings.transport.amst.chunk_size,
        park_timeout_s=settings.limits.handshake_timeout,
    )


def _timeouts(settings: Settings) -> LaneTimeouts:
    amst = settings.transport.amst
    return LaneTimeouts(read_s=amst.read_timeout, write_s=amst.write_timeout)


def _missing(core: SessionCore, request: LaneRequest) -> int:
    """The acceptor wishes for so many lanes in all: how many to ask it for."""
    return max(0, request.count - len(core.lanes))
