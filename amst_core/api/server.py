"""Accepting sessions: connections come in, are proven, admitted, served, and in the end drained."""

from __future__ import annotations

import itertools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from ..congestion import AUTO
from ..control import handshake
from ..control.channel import ControlChannel
from ..control.listener import Listener, Newcomer
from ..endpoint import DEFAULT_PORT, parse_endpoint
from ..errors import AmstError, AuthError, BusyError, ClosedError, DeadlineError, ProtocolError
from ..files.root import Root
from ..interfaces import Advertisement, Endpoint, Lane, Mode, Transport
from ..memory import MemoryShare
from ..modes import Profile, agreed_streams, profile
from ..pacing import Range
from ..plugins import Plugins
from ..process import Foreign, own
from ..security.identity import ServerIdentity, state_dir
from ..security.tls import TlsStream, server_context
from ..session.admission import LaneIdentity, challenge, protection_for
from ..session.mode import ModePlan
from ..session.session import Session
from ..settings.load import load_settings
from ..settings.values import Settings
from ..wire.messages import LaneGrant
from .assembly import lane_timeouts, make_budget, make_core, own_terms, partial_policy, session_limits
from .choice import usable_transports
from .congestion import Controllers
from .modes import forced_mode, make_detector

_log = logging.getLogger("amst.api")

GRANT_S: Final = 300.0
"""How long a granted lane counts towards the limits before it is opened."""

LOOPBACK: Final = ("127.", "[::1]", "[::ffff:127.")
"""How the address of a peer on this machine begins."""


def listen(
    address: str = f"[::]:{DEFAULT_PORT}",
    *,
    root: str | os.PathLike[str] | None = None,
    settings: Settings | None = None,
    state_dir: str | os.PathLike[str] | None = None,
    mode: Mode | str | None = None,
    on_session: Callable[[Session], None] | None = None,
    plugins: Plugins | None = None,
) -> Server:
    """Accept sessions at ``address``.

    Args:
        root: the directory whose files the peers may read and write; None serves no files.
        state_dir: where token, key and certificate are kept, made when missing; by default
            ``AMST_STATE_DIR``, else ``~/.local/state/amst``.
        mode: of all sessions, whatever their paths call for and their clients ask for; by default that of
            ``transport.modes.mode``, ``auto``: the one that each path calls for.
        on_session: called with each new session on a thread of its own; without it use `Server.accept`.
        plugins: where transports come from; by default the installed ones.

    Raises:
        UsageError: there is no such mode, or it is not clear which plugin is to find it.
        ConnectError: the address cannot be listened on.
        PluginError: no transport can be used.
    """
    return Server(
        parse_endpoint(address),
        root=root,
        settings=settings if settings is not None else load_settings(),
        state=Path(state_dir) if state_dir is not None else None,
        mode=mode,
        on_session=on_session,
        plugins=plugins or Plugins(),
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
        plugins: Plugins,
        mode: Mode | str | None = None,
        deliver: Callable[[Session], None] | None = None,
    ) -> None:
        """``deliver`` is given each new session instead of a thread or `accept`; it must return quickly."""
        self._settings = settings
        self._on_session = on_session
        self._plugins = plugins
        directory = state if state is not None else state_dir(os.environ)
        identity = ServerIdentity.load_or_create(directory)
        self._identity = identity
        self._tls = server_context(identity.certificate_path, identity.key_path)
        held = directory.stat()
        self._root: Root | None = None
        if root is not None:
            self._root = Root(root, forbidden=[(held.st_dev, held.st_ino)], partials=partial_policy(settings))
        self._controllers = Controllers(plugins, settings)
        self._congestion = self._controllers.asked_for(settings, None)
        self._forced = forced_mode(settings, mode)
        make_detector(plugins, settings)  # what is wrong with it is told now, and not with the first session
        self._transports = usable_transports(self._plugins, settings)
        self._advertised: dict[str, Advertisement] = {}
        self._by_tag: dict[int, Transport] = {}
        self._lock = threading.Lock()
        self._memory = make_budget(settings, sessions=settings.limits.sessions)
        self._sessions: dict[str, Session] = {}
        self._admitting = 0  # handshakes that count towards limits.sessions
        self._grants: dict[int, _Grant] = {}
        self._incarnations = itertools.count(1)  # secret they need not be, only never the same again
        self._accepted: queue.SimpleQueue[Session | None] = queue.SimpleQueue()
        self._deliver = deliver or self._accepted.put
        self._closed = False
        own(self)
        try:
            # from here on lanes may come
            for tag, (name, transport) in enumerate(self._transports.items(), 1):
                self._by_tag[tag] = transport
                self._advertised[name] = transport.advertise(tag, partial(self._admit, transport=transport))
            self._listener = Listener(
                endpoint,
                on_control=self._on_control,
                on_lane=self._on_lane,
                handshake_timeout_s=settings.limits.handshake_timeout,
                unauthenticated=settings.limits.unauthenticated,
            )
        except BaseException:
            for transport in self._transports.values():
                transport.close()
            if self._root is not None:
                self._root.close()
            raise

    def forked(self, foreign: Foreign) -> None:
        """This is a forked child's copy: refuse to work, and leave the parent's listener alone."""
        self._closed = True
        self._lock = threading.Lock()  # the parent's may be held by one of its threads
        self._sessions = {}
        self._listener = self._accepted = foreign  # type: ignore[assignment]

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

    @property
    def memory_in_use(self) -> int:
        """Bytes of `limits.memory` in use by all sessions, what is promised to their peers included."""
        return self._memory.in_use

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
        """Take no new sessions, let what is under way finish for ``timeout_s`` seconds, then end every session.

        Raises:
            DeadlineError: some transfers were not finished in time; says which, how far they are, and with whom.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        # it goes on to listen: lanes and control channels that break now may come back, new sessions are refused
        deadline = time.monotonic() + timeout_s
        late: list[str] = []
        sessions = self.sessions
        for session in sessions:
            session.core.draining = True  # all of them before the first is waited for
        for session in sessions:
            try:
                session.drain(max(0.0, deadline - time.monotonic()))
                session.close(max(0.0, deadline - time.monotonic()))
            except AmstError as err:
                late.append(str(err))
                session.abort()
        self._listener.close()
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

    def _on_control(self, newcomer: Newcomer) -> None:
        """A control connection: prove, agree, begin a session."""
        peer = newcomer.peer
        channel = ControlChannel(newcomer.sock, TlsStream(self._tls, server_side=True, peer=peer), peer=peer)
        counted = False
        memory: MemoryShare | None = None

        def admit(wish: handshake.Wish) -> handshake.Terms:
            nonlocal counted, memory
            if wish.plaintext and not (self._settings.security.allow_plaintext or peer.startswith(LOOPBACK)):
                raise AuthError("this server allows no plaintext from other machines (security.allow_plaintext)")
            with self._lock:
                if self._closed:
                    raise BusyError("the server is stopping")
                if len(self._sessions) + self._admitting >= self._settings.limits.sessions:
                    raise BusyError(f"the server has its {self._settings.limits.sessions} sessions (limits.sessions)")
                self._admitting += 1
                counted = True
            memory = self._memory.share()
            return own_terms(memory, tuple(self._advertised.values()))

        try:
            agreement = handshake.accept(
                channel,
                token=self._identity.token,
                certificate=self._identity.certificate_der,
                admit=admit,
                find=self._session,
                deadline=newcomer.deadline,
            )
            newcomer.proven()
            if isinstance(agreement, handshake.Resumption):
                self._go_on(channel, agreement, peer)
                return
            assert memory is not None, "a session that was agreed on was admitted"
            session = self._begin(channel, agreement, memory, peer)
        except BaseException:
            if memory is not None:
                memory.close()
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
            mode=agreement.wish.mode.value,
        )
        _log.info("session %s opened by %s", session.id[:8], peer)
        if self._on_session is not None:
            # not on this thread: those that serve handshakes are few
            threading.Thread(
                target=self._serve, args=(session, self._on_session), name=f"amst-session-{peer}", daemon=True
            ).start()
        else:
            self._deliver(session)

    def _session(self, session_id: str) -> Session | None:
        with self._lock:
            return self._sessions.get(session_id)

    def _go_on(self, channel: ControlChannel, resumption: handshake.Resumption, peer: str) -> None:
        session = self._session(resumption.session_id)
        if session is None:
            raise ClosedError("the session ended while it was taken up again")
        session.go_on(channel, resumption.received, epoch=resumption.epoch)
        _log.info("session %s goes on, from %s", session.id[:8], peer)

    def _serve(self, session: Session, on_session: Callable[[Session], None]) -> None:
        try:
            on_session(session)
        except Exception:
            if session.error is None:
                _log.exception("session %s: on_session raised; the session is ended", session.id[:8])
                session.abort()
            else:
                _log.info("session %s: on_session ended with the session: %s", session.id[:8], session.error)

    def _begin(
        self, channel: ControlChannel, agreement: handshake.Agreement, memory: MemoryShare, peer: str
    ) -> Session:
        wish = agreement.wish
        begin = self._profile(wish.mode, _streams_of(wish))
        core = make_core(
            self._settings,
            memory,
            agreement.peer,
            peer=peer,
            is_opener=False,
            congestion=self._controllers.policy(
                self._congestion if self._congestion != AUTO else wish.congestion,
                backend=wish.backend,
                polite=wish.polite,
            ),
            profile=begin,
        )
        session = Session(
            core,
            channel,
            session_id=agreement.session_id,
            secret=agreement.secret,
            encrypted=not wish.plaintext,
            verified=agreement.verified,
            root=self._root,
            limits=session_limits(self._settings),
            modes=ModePlan(
                begin,
                "the client asks for it",
                self._forced,
                make_detector(self._plugins, self._settings),
                self._settings.transport.modes.mode_check_interval,
                self._profile,
            ),
            on_mode_changed=self._mode_changed,
            on_lane_request=lambda s, request: self._grant(s, request.count, request.transport, agreement),
            on_end=self._session_ended,
        )
        session.on_lane_lost = partial(self._grant_returned, session)
        session.wanted_transport = next((name for name in wish.transports if name in self._transports), "")
        with self._lock:
            if self._closed:
                core.wakeup.close()
                raise BusyError("the server is stopping")
            self._sessions[session.id] = session
        if session.wanted_transport:
            self._grant(session, wish.streams, session.wanted_transport, agreement)
        session.start()
        return session

    def _profile(self, mode: Mode, wished: Range | None) -> Profile:
        """What this side sends in ``mode`` to a client that wishes for so many streams; None: for as many as here."""
        own = profile(mode, self._settings)
        return own if wished is None else replace(own, streams=agreed_streams(wished, self._settings))

    def _mode_changed(self, session: Session, old: Mode, new: Mode, reason: str) -> None:
        self._plugins.notify("amst_mode_changed", session_id=session.id, old=old, new=new, reason=reason)

    def _grant(self, session: Session, count: int, transport: str, agreement: handshake.Agreement) -> None:
        """Let the opener open ``count`` more lanes, as far as the limits allow."""
        if transport not in self._transports:
            raise ProtocolError(f"{session.peer} asks for lanes of {transport!r}, which was not advertised")
        with self._lock:
            for incarnation in [i for i, grant in self._grants.items() if grant.expired()]:
                del self._grants[incarnation]
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
            _log.warning(
                "%s asked for %d streams and gets %d (limits.lanes, max_streams)", session.peer, count, granted
            )
            session.core.lanes_refused(count - granted)
        session.core.tell(LaneGrant(first, granted, transport))

    def _grant_returned(self, session: Session, incarnation: int) -> None:
        """A lane was granted to ``session``, and will not come."""
        with self._lock:
            grant = self._grants.get(incarnation)
            if grant is not None and grant.session is session:
                del self._grants[incarnation]

    def _on_lane(self, newcomer: Newcomer, tag: int) -> None:
        transport = self._by_tag.get(tag)
        if transport is None:
            raise ProtocolError(f"{newcomer.peer} opened a lane for transport {tag}, which was not advertised")
        lane = transport.adopt(newcomer.sock, lane_timeouts(self._settings))
        self._admit(lane, transport, newcomer)

    def _admit(self, lane: Lane, transport: Transport, newcomer: Newcomer | None = None) -> None:
        """A new lane: whose is it, and was it granted?"""
        try:
            timeout_s = self._settings.limits.handshake_timeout
            if newcomer is not None:
                timeout_s = max(0.0, newcomer.deadline - time.monotonic())
            claim = challenge(lane, timeout_s=timeout_s)
            with self._lock:
                grant = self._grants.get(claim.incarnation)
            if grant is None or self._transports.get(grant.transport) is not transport:
                raise AuthError(f"stream {claim.incarnation} was not granted")
            claim.check(grant.agreement.secret)
            with self._lock:
                if self._grants.pop(claim.incarnation, None) is None:
                    raise AuthError(f"stream {claim.incarnation} was admitted before")
            if newcomer is not None:
                newcomer.proven()
            identity = LaneIdentity(grant.agreement.secret, claim.incarnation, is_opener=False)
            core = grant.session.core
            worker = identity.make_worker(
                core,
                lane,
                transport=transport,
                protection=protection_for(
                    transport, plaintext=grant.agreement.wish.plaintext, verified=grant.agreement.verified
                ),
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


def _streams_of(wish: handshake.Wish) -> Range:
    """The streams that a client wishes for in what is sent to it."""
    streams = wish.streams
    least = streams if wish.least_streams is None else wish.least_streams
    return Range(streams, least, wish.most_streams or streams)


class _Grant:
    """The right to open one lane."""

    __slots__ = ("_until", "agreement", "session", "transport")

    def __init__(self, session: Session, transport: str, agreement: handshake.Agreement) -> None:
        self.session = session
        self.transport = transport
        self.agreement = agreement
        self._until = time.monotonic() + GRANT_S

    def expired(self) -> bool:
        return time.monotonic() > self._until
