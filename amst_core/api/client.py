"""Opening a session: dial, prove, agree, open the first streams."""

from __future__ import annotations

import os
import socket
import time
from functools import partial

from ..congestion import Backend
from ..control import handshake
from ..control.channel import ControlChannel
from ..endpoint import parse_endpoint
from ..errors import AmstError, AuthError, BrokenError, ConnectError, DeadlineError, ProtocolError, UsageError
from ..files.root import Root
from ..interfaces import Endpoint, Mode
from ..modes import first_mode, first_reason, profile
from ..plugins import Plugins
from ..security.identity import find_token
from ..security.tls import TlsStream, client_context
from ..session.lane_opener import LaneOpener, Route
from ..session.mode import ASKED, ModePlan
from ..session.session import Session
from ..settings.load import load_settings
from ..settings.values import Settings
from ..wire.messages import LaneRequest
from .assembly import lane_timeouts, make_budget, make_core, own_terms, partial_policy, peer_limits, session_limits
from .attempt import Attempt
from .choice import TransportChoice
from .congestion import Controllers
from .modes import forced_mode, make_detector
from .redial import Redialer


def connect(
    address: str,
    *,
    settings: Settings | None = None,
    token: bytes | None = None,
    streams: int | None = None,
    max_streams: int | None = None,
    transport: str | None = None,
    require: str | None = None,
    plaintext: bool | None = None,
    verify: bool = True,
    congestion: str | None = None,
    polite: bool = False,
    mode: Mode | str | None = None,
    root: str | os.PathLike[str] | None = None,
    plugins: Plugins | None = None,
    attempt: Attempt | None = None,
) -> Session:
    """Open a session with the server at ``address`` (``amst://HOST:PORT`` or ``HOST:PORT``).

    Args:
        settings: as `load_settings` gives them; by default from the environment.
        token: the server's secret; by default ``AMST_TOKEN`` or the state directory's.
        streams: how many to use; by default the mode that the round trip calls for says how many to start with
            (``transport.modes``), and the path how many it needs.
        max_streams: how many it may become, instead of what the mode allows (16 where the round trip is above 50 ms).
        transport: the one preferred; another one runs, with a reason, when it cannot be used.
        require: the one that must run.
        plaintext: whether data travels unencrypted (checked by CRC-32C); the server must allow it.
        verify: False does without that check, in plaintext only. A server that knows no such thing checks all the same
            (see `SessionReport.verified`).
        congestion: the congestion control asked for, on both sides; by default ``congestion.algorithm``. What the
            system refuses falls back; `Session.streams` tells which one is in force, and why.
        polite: what either side sends takes no more from others than one flow does: all streams are paced together, by
            CUBIC unless another control is asked for; where they cannot be, there is one stream.
        mode: the one to be in, whatever the path calls for (see `Session.force_mode`); by default that of
            ``transport.modes.mode``, ``auto``: the one that the path calls for.
        root: a directory that the server may read and write, as the server's own root is for this side.
        plugins: where transports come from; by default the installed ones.
        attempt: lets another thread give it up.

    Raises:
        UsageError: the address, the number of streams, or the name of the transport, congestion control or mode makes
            no sense, or encrypted data is not to be verified.
        ConnectError: the server cannot be reached, is none, or is full.
        AuthError: there is no token, or the server does not accept it.
        UnavailableError: ``require`` cannot be met.
        PluginError: no transport is installed.
        CancelledError: ``attempt`` was given up.
    """
    with attempt or Attempt() as attempt:
        return _open(
            address,
            settings=settings,
            token=token,
            streams=streams,
            max_streams=max_streams,
            transport=transport,
            require=require,
            plaintext=plaintext,
            verify=verify,
            congestion=congestion,
            polite=polite,
            mode=mode,
            root=root,
            plugins=plugins or Plugins(),
            attempt=attempt,
        )


def _open(
    address: str,
    *,
    settings: Settings | None,
    token: bytes | None,
    streams: int | None,
    max_streams: int | None,
    transport: str | None,
    require: str | None,
    plaintext: bool | None,
    verify: bool,
    congestion: str | None,
    polite: bool,
    mode: Mode | str | None,
    root: str | os.PathLike[str] | None,
    plugins: Plugins,
    attempt: Attempt,
) -> Session:
    started = time.monotonic()
    endpoint = parse_endpoint(address)
    settings = settings if settings is not None else load_settings()
    amst = settings.transport.amst
    if streams is not None and not amst.min_streams <= streams <= amst.max_streams:
        raise UsageError(
            f"{streams} streams: {amst.min_streams} to {amst.max_streams} are possible (transport.amst.min_streams, "
            "transport.amst.max_streams)"
        )
    if max_streams is not None and not amst.min_streams <= max_streams <= amst.max_streams:
        raise UsageError(
            f"at most {max_streams} streams: {amst.min_streams} to {amst.max_streams} are possible "
            "(transport.amst.min_streams, transport.amst.max_streams)"
        )
    wants_plaintext = settings.security.plaintext if plaintext is None else plaintext
    if not (verify or wants_plaintext):
        raise UsageError("encrypted data is always verified: to verify none, ask for plaintext too (--plaintext)")
    controllers = Controllers(plugins, settings)
    algorithm = controllers.asked_for(settings, congestion)
    forced = forced_mode(settings, mode)
    detector = make_detector(plugins, settings)
    choice = TransportChoice(plugins, settings, endpoint, preferred=transport, required=require)
    token = token if token is not None else find_token()
    if token is None:
        raise AuthError(
            f"no token for {endpoint}: set AMST_TOKEN, name a file with --token-file, or share the server's "
            "state directory (AMST_STATE_DIR)"
        )
    files = Root(root, partials=partial_policy(settings)) if root is not None else None
    deadline = started + amst.connect_timeout

    redialer: Redialer | None = None

    def release() -> None:
        if redialer is not None:
            redialer.end()
        choice.close()
        if files is not None:
            files.close()

    try:
        channel = _dial(endpoint, amst.connect_timeout, attempt)
    except BaseException:
        release()
        raise
    try:
        begin = profile(forced or first_mode(channel.rtt_s), settings, streams=streams, max_streams=max_streams)
        count = begin.streams.start
        wish = handshake.Wish(
            wants_plaintext,
            count,
            tuple(choice.order),
            verify,
            algorithm,
            begin.mode,
            begin.streams.least,
            begin.streams.most,
            Backend(settings.congestion.backend),
            polite,
        )
        memory = make_budget(settings).share()
        agreement = _agree(channel, token=token, wish=wish, terms=own_terms(memory), deadline=deadline)
        name = choice.settle([offer.transport for offer in agreement.peer.transports])
        host, port = channel.remote_address
        core = make_core(
            settings,
            memory,
            agreement.peer,
            peer=str(endpoint),
            is_opener=True,
            congestion=controllers.policy(algorithm, polite=polite),
            profile=begin,
        )
    except BaseException:
        channel.close()
        release()
        raise
    session = Session(
        core,
        channel,
        session_id=agreement.session_id,
        secret=agreement.secret,
        encrypted=not wants_plaintext,
        verified=agreement.verified,
        root=files,
        limits=session_limits(settings),
        modes=ModePlan(
            begin,
            first_reason(channel.rtt_s) if forced is None else ASKED,
            forced,
            detector,
            settings.transport.modes.mode_check_interval,
            lambda mode, _: profile(mode, settings, streams=streams, max_streams=max_streams),
        ),
        on_mode_changed=choice.mode_changed,
        on_lane_request=_lanes_wished,
        on_end=lambda _: release(),
    )
    redialer = Redialer(session, dial=partial(_dial, endpoint), token=token, agreed=agreement)
    session.redial_with(redialer)
    session.opener = LaneOpener(
        core,
        secret=agreement.secret,
        plaintext=wants_plaintext,
        verified=agreement.verified,
        route=Route(
            host,
            port,
            {offer.transport: offer for offer in agreement.peer.transports},
            amst.connect_timeout,
            lane_timeouts(settings),
        ),
        transports=choice.transports,
        transport=name,
        asked=count,
    )
    session.wanted_transport = name
    session.transport_reason = choice.reason
    session.start()
    try:
        attempt.may_abort(session.abort)
        session.opener.wait_first(max(0.1, deadline - time.monotonic()))
    except BaseException as err:
        session.abort()
        if isinstance(err, AmstError) and core.error is not err and not isinstance(err, ConnectError | DeadlineError):
            raise ConnectError(f"cannot open a stream to {endpoint}: {err}", peer=str(endpoint)) from err
        raise
    session.setup_seconds = time.monotonic() - started
    choice.opened(session, begin.mode)
    return session


def _dial(endpoint: Endpoint, timeout_s: float, attempt: Attempt | None = None) -> ControlChannel:
    """A connection to the control listener, trying each address of the name in turn; TLS has not begun."""
    failures: list[OSError] = []
    try:
        addresses = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    except socket.gaierror as err:
        raise ConnectError(f"cannot find {endpoint.host}: {err.strerror}", peer=str(endpoint), retryable=False) from err
    for family, kind, protocol, _, address in addresses:
        sock = None
        try:
            sock = socket.socket(family, kind, protocol)
            sock.settimeout(timeout_s)
            if attempt is not None:
                attempt.may_shut(sock)
            sock.connect(address)
            tls = TlsStream(client_context(), server_side=False, peer=str(endpoint))
            return ControlChannel(sock, tls, peer=str(endpoint))
        except BaseException as err:
            if sock is not None:
                sock.close()
            if not isinstance(err, OSError):
                raise
            failures.append(err)
    reasons = "; ".join(sorted({str(err) for err in failures}))
    refused = bool(failures) and all(isinstance(err, ConnectionRefusedError) for err in failures)
    cause = failures[0] if refused else OSError(reasons)
    raise ConnectError(f"cannot connect to {endpoint}: {reasons}", peer=str(endpoint)) from cause


def _agree(
    channel: ControlChannel, *, token: bytes, wish: handshake.Wish, terms: handshake.Terms, deadline: float
) -> handshake.Agreement:
    """`handshake.connect`, where whatever is no AMST server is a `ConnectError`."""
    try:
        agreement = handshake.connect(channel, token=token, wish=wish, terms=terms, deadline=deadline)
        peer_limits(agreement.peer)  # raises if they make no sense
        return agreement
    except DeadlineError:
        raise
    except (BrokenError, ProtocolError) as err:
        raise ConnectError(
            f"no session with {channel.peer}: {err}; check that an AMST server listens there",
            peer=channel.peer,
            retryable=isinstance(err, BrokenError),
        ) from err


def _lanes_wished(session: Session, request: LaneRequest) -> None:
    """The acceptor wishes for so many lanes in all: ask it for those that are missing."""
    opener, core = session.opener, session.core
    assert opener is not None, "the client opens the lanes"
    with core.lock:
        missing = min(request.count, session.max_streams) - len(core.live_lanes_locked()) - core.coming
    if missing > 0:
        opener.ask(missing, session.wanted_transport)
