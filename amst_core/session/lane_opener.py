"""The connecting side's lanes: it opens every lane of a session, for both directions."""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from .. import interfaces
from ..errors import AmstError, ConnectError, DeadlineError, ProtocolError
from ..interfaces import PREAMBLE, PREAMBLE_MAGIC, Advertisement, LaneTimeouts, Transport
from ..wire.messages import LaneGrant, LaneLost, LaneRequest
from .admission import LaneIdentity, answer_challenge, protection_for
from .backoff import pause_s
from .core import SessionCore
from .lanes import LaneWorker
from .streams import SETTLED_S

_log = logging.getLogger("amst.session")

MAX_DIALLING: Final = 64
"""Lanes that are opened at once: until it is admitted each is a stranger to the server, which bounds their number."""


@dataclass(frozen=True, slots=True)
class Route:
    """How lanes reach the peer: the address the control connection reached, and what it advertises."""

    host: str
    port: int
    advertisements: Mapping[str, Advertisement]
    connect_timeout_s: float
    timeouts: LaneTimeouts


REPLACE_S: Final = 5.0
"""How long replacing a lane may take at most: TCP asks a silent path ever more seldom, a new attempt at once."""


@dataclass(slots=True)
class _Asked:
    """One request for lanes: how many attempts each of them has failed before; ``replacing`` lanes that died."""

    attempts: list[int]
    replacing: bool = False


class LaneOpener:
    """Turns grants into lanes, on a few short-lived threads, and replaces lanes that die.

    ``asked`` is what HELLO wished for, over ``transport``. A lane that dies, or cannot be opened, is asked for again
    after a pause (`backoff`) that starts anew once a lane has lived for a second.
    """

    def __init__(
        self,
        core: SessionCore,
        *,
        secret: bytes,
        plaintext: bool,
        verified: bool,
        route: Route,
        transports: Mapping[str, Transport],
        transport: str,
        asked: int,
    ) -> None:
        self._core = core
        self._secret = secret
        self._plaintext = plaintext
        self._verified = verified
        self._route = route
        self._transports = transports
        self._transport = transport
        self._changed = threading.Condition()
        self._opening = 0
        self._granted: deque[tuple[str, int]] = deque()  # to be opened: transport, incarnation
        self._dialling = 0  # threads that open them
        self._asked = deque([_Asked([0] * asked)])  # what each grant that is due may have
        self._attempts: dict[int, int] = {}  # failures in a row before each incarnation
        self._due: list[tuple[float, int]] = []  # when to ask for a replacement, and its failures; a heap
        self._thread: threading.Thread | None = None
        self._ended = False
        core.coming = asked
        core.on_lane_died = self._lane_died
        self._answered = False
        self._last_granted = -1
        self._first_failure: AmstError | None = None

    def ask(self, count: int, transport: str) -> None:
        """Ask the peer for ``count`` more lanes."""
        self._ask(_Asked([0] * count), transport)

    def granted(self, grant: LaneGrant) -> None:
        """The peer lets this side open lanes.

        Raises:
            ProtocolError: more than this side asked for.
        """
        with self._changed:
            asked = self._asked.popleft() if self._asked else _Asked([])
            if grant.count > len(asked.attempts):
                raise ProtocolError(
                    f"{self._core.peer} granted {grant.count} streams where {len(asked.attempts)} were asked for"
                )
            if grant.count and grant.first <= self._last_granted:
                raise ProtocolError(f"{self._core.peer} granted stream {grant.first} after {self._last_granted}")
            if grant.count:
                self._last_granted = grant.first + grant.count - 1
            self._answered = True
            self._opening += grant.count
            incarnations = range(grant.first, grant.first + grant.count)
            self._attempts.update(zip(incarnations, asked.attempts, strict=False))
            self._granted.extend((grant.transport, incarnation) for incarnation in incarnations)
            more = min(len(self._granted), MAX_DIALLING - self._dialling)
            self._dialling += more
            # before the next attempt is due: it must not find these lanes still counted as coming
            self._core.lanes_refused(len(asked.attempts) - grant.count)
            if asked.replacing:  # it may count the dead ones still
                for attempt in asked.attempts[grant.count :]:
                    self._schedule(attempt + 1)
            self._changed.notify_all()
        for _ in range(more):
            threading.Thread(target=self._dial, name="amst-open", daemon=True).start()

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

    def end(self) -> None:
        """The session has ended: nothing is replaced any more, and the waits look again."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    # ---- replacing -------------------------------------------------------------------------------

    def _lane_died(self, worker: LaneWorker) -> None:
        with self._changed:
            attempt = self._attempts.pop(worker.id, 0)
            self._schedule(0 if worker.lived_s >= SETTLED_S else attempt + 1)

    def _schedule(self, attempt: int) -> None:
        """Ask for a lane after a pause (the lock held)."""
        if self._ended:
            return
        heapq.heappush(self._due, (time.monotonic() + pause_s(attempt), attempt))
        if self._thread is None:
            self._thread = threading.Thread(target=self._replace, name="amst-lanes", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _replace(self) -> None:
        while True:
            with self._changed:
                while not self._ended and not (self._due and self._due[0][0] <= time.monotonic()):
                    self._changed.wait(max(0.0, self._due[0][0] - time.monotonic()) if self._due else None)
                if self._ended:
                    return
                attempts = []
                while self._due and self._due[0][0] <= time.monotonic():
                    attempts.append(heapq.heappop(self._due)[1])
            wanted = self._core.lanes_wanted(len(attempts))
            if wanted:
                self._ask(_Asked(attempts[:wanted], replacing=True), self._transport)

    def _ask(self, asked: _Asked, transport: str) -> None:
        core = self._core
        with self._changed, core.lock:  # grants answer in the order of the requests
            self._asked.append(asked)
            core.coming += len(asked.attempts)
            core.tell_locked(LaneRequest(len(asked.attempts), transport))

    # ---- opening -----------------------------------------------------------------------------------

    def _dial(self) -> None:
        while True:
            with self._changed:
                if not self._granted or self._ended:
                    self._dialling -= 1
                    return
                transport, incarnation = self._granted.popleft()
            self._open(transport, incarnation)

    def _open(self, transport: str, incarnation: int) -> None:
        failure: AmstError | None = None
        try:
            self._connect(transport, incarnation)
        except AmstError as err:
            failure = err
        except Exception as err:
            _log.exception("opening stream %d: unexpected error in transport %s", incarnation, transport)
            failure = ConnectError(f"transport {transport!r} failed unexpectedly: {err!r}", peer=self._core.peer)
        if failure is not None:
            # given back, before the next attempt is due: until then it counts as a lane that may come
            self._core.connection_failed(LaneLost(incarnation, failure.kind, failure.message))
        with self._changed:
            self._opening -= 1
            if failure is not None:
                self._first_failure = self._first_failure or failure
                if self._core.total_lanes:  # else the session has not begun, and will not
                    self._schedule(self._attempts.pop(incarnation, 0) + 1)
            self._changed.notify_all()
        if failure is not None and self._core.error is None:
            _log.warning("a stream to %s could not be opened: %s", self._core.peer, failure)

    def _connect(self, name: str, incarnation: int) -> None:
        route = self._route
        advertisement = route.advertisements.get(name)
        transport = self._transports.get(name)
        if advertisement is None or transport is None:
            raise ConnectError(f"the peer granted a stream over {name!r}, which one side does not have")
        timeout_s = route.connect_timeout_s
        if self._core.total_lanes:
            timeout_s = min(timeout_s, REPLACE_S)
        preamble = PREAMBLE.pack(PREAMBLE_MAGIC, advertisement.tag)
        request = interfaces.LaneRequest(advertisement, route.host, route.port, preamble, timeout_s)
        lane = transport.connect(request, route.timeouts)
        try:
            answer_challenge(lane, secret=self._secret, incarnation=incarnation, timeout_s=timeout_s)
            identity = LaneIdentity(self._secret, incarnation, is_opener=True)
            protection = protection_for(transport, plaintext=self._plaintext, verified=self._verified)
            worker = identity.make_worker(self._core, lane, transport=transport, protection=protection)
            self._core.lane_joined(worker)
        except BaseException:
            lane.abort()
            raise
        worker.start()
