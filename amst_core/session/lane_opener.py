"""The connecting side's lanes: it opens every lane of a session, for both directions."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from .. import interfaces
from ..errors import AmstError, ConnectError, DeadlineError, ProtocolError
from ..interfaces import PREAMBLE, PREAMBLE_MAGIC, Advertisement, LaneTimeouts, Transport
from ..wire.messages import LaneGrant, LaneRequest
from .admission import LaneIdentity, answer_challenge, protection_for
from .core import SessionCore

_log = logging.getLogger("amst.session")


@dataclass(frozen=True, slots=True)
class Route:
    """How lanes reach the peer: the address the control connection reached, and what it advertises."""

    host: str
    port: int
    advertisements: Mapping[str, Advertisement]
    connect_timeout_s: float
    timeouts: LaneTimeouts


class LaneOpener:
    """Turns grants into lanes, each on a short-lived thread of its own. ``asked`` is what HELLO wished for."""

    def __init__(
        self,
        core: SessionCore,
        *,
        secret: bytes,
        plaintext: bool,
        route: Route,
        transports: Mapping[str, Transport],
        asked: int,
    ) -> None:
        self._core = core
        self._secret = secret
        self._plaintext = plaintext
        self._route = route
        self._transports = transports
        self._changed = threading.Condition()
        self._opening = 0
        self._asked = deque([asked])  # what each grant that is due may have
        core.coming = asked
        self._answered = False
        self._first_failure: AmstError | None = None

    def ask(self, count: int, transport: str) -> None:
        """Ask the peer for ``count`` more lanes."""
        core = self._core
        with self._changed, core.lock:  # grants answer in the order of the requests
            self._asked.append(count)
            core.coming += count
            core.tell_locked(LaneRequest(count, transport))

    def granted(self, grant: LaneGrant) -> None:
        """The peer lets this side open lanes.

        Raises:
            ProtocolError: more than this side asked for.
        """
        with self._changed:
            asked = self._asked.popleft() if self._asked else 0
            if grant.count > asked:
                raise ProtocolError(f"{self._core.peer} granted {grant.count} streams where {asked} were asked for")
            self._answered = True
            self._opening += grant.count
            self._changed.notify_all()
        self._core.lanes_refused(asked - grant.count)
        for incarnation in range(grant.first, grant.first + grant.count):
            threading.Thread(
                target=self._open, args=(grant.transport, incarnation), name=f"amst-open-{incarnation}", daemon=True
            ).start()

    def wait_first(self, timeout_s: float) -> None:
        """Wait for the first lane.

        Raises:
            ConnectError: every attempt failed, or none was allowed.
            DeadlineError: none came up in time.
        """

        def settled() -> bool:
            core = self._core
            return bool(core.total_lanes or core.error or (self._answered and not self._opening))

        with self._changed:
            in_time = self._changed.wait_for(settled, timeout_s)
        if self._core.total_lanes:
            return
        if self._core.error is not None:
            raise self._core.error
        if not in_time:
            raise DeadlineError(f"no stream to {self._core.peer} within {timeout_s:g} s", peer=self._core.peer)
        raise self._first_failure or ConnectError(f"{self._core.peer} granted no streams", peer=self._core.peer)

    def wake(self) -> None:
        """The session has ended: let the waits look again."""
        with self._changed:
            self._changed.notify_all()

    def _open(self, transport: str, incarnation: int) -> None:
        failure: AmstError | None = None
        try:
            self._connect(transport, incarnation)
        except AmstError as err:
            failure = err
        except Exception as err:
            _log.exception("opening stream %d: unexpected error in transport %s", incarnation, transport)
            failure = ConnectError(f"transport {transport!r} failed unexpectedly: {err!r}", peer=self._core.peer)
        with self._changed:
            self._opening -= 1
            if failure is not None:
                self._first_failure = self._first_failure or failure
            self._changed.notify_all()
        if failure is not None:
            self._core.connection_failed()
        if failure is not None and self._core.error is None:
            _log.warning("stream %d to %s could not be opened: %s", incarnation, self._core.peer, failure)

    def _connect(self, name: str, incarnation: int) -> None:
        route = self._route
        advertisement = route.advertisements.get(name)
        transport = self._transports.get(name)
        if advertisement is None or transport is None:
            raise ConnectError(f"the peer granted a stream over {name!r}, which one side does not have")
        request = interfaces.LaneRequest(
            advertisement,
            route.host,
            route.port,
            PREAMBLE.pack(PREAMBLE_MAGIC, advertisement.tag),
            route.connect_timeout_s,
        )
        lane = transport.connect(request, route.timeouts)
        try:
            answer_challenge(
                lane, secret=self._secret, incarnation=incarnation, timeout_s=route.connect_timeout_s
            )
            identity = LaneIdentity(self._secret, incarnation, is_opener=True)
            protection = protection_for(transport, plaintext=self._plaintext)
            worker = identity.make_worker(self._core, lane, transport=name, protection=protection)
            self._core.lane_joined(worker)
        except BaseException:
            lane.abort()
            raise
        worker.start()
