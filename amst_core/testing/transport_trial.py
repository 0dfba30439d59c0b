"""What the rules of transports do again and again: accept lanes as a server does, and open them."""

from __future__ import annotations

import queue
import socket
from collections.abc import Callable
from typing import Final, TypeAlias

from ..control.listener import Listener, Newcomer
from ..interfaces import (
    PREAMBLE,
    PREAMBLE_MAGIC,
    Advertisement,
    Endpoint,
    Lane,
    LaneRequest,
    LaneTimeouts,
    Transport,
)
from .conformance import NotApplicable
from .lane_trial import LaneTrial

TAG: Final = 1
MakeTransport: TypeAlias = Callable[[], Transport]

_STRANGERS: Final = 64


class TransportTrial(LaneTrial):
    """One rule tried once; every transport it made is closed afterwards. Its pairs are opened over the transport."""

    def __init__(
        self,
        rule: str,
        patience_s: float,
        make_transport: MakeTransport,
        more_than_holds: int,
        host: str,
        unanswered: Callable[[], LaneRequest] | None,
    ) -> None:
        super().__init__(rule, patience_s, self._open_pair, more_than_holds)
        self._make_transport = make_transport
        self._pairs_over: tuple[Transport, Accepting] | None = None
        self.host = host
        self.unanswered = unanswered

    def transport(self) -> Transport:
        """A new one."""
        transport: Transport = self.call("make_transport", self._make_transport)
        self.afterwards(transport.close)
        return transport

    def accepting(
        self, transport: Transport, *, tag: int = TAG, deliver: Callable[[Lane], None] | None = None
    ) -> Accepting:
        """Make ``transport`` reachable; lanes are kept, or go to ``deliver``."""
        return Accepting(self, transport, tag, deliver)

    def own_listener(self, accepting: Accepting) -> None:
        """The rule is about a transport with a listener of its own."""
        if not accepting.advertisement.address:
            raise NotApplicable("the transport lives on the core's TCP listener")

    def connect(self, transport: Transport, request: LaneRequest, timeouts: LaneTimeouts | None = None) -> Lane:
        """Open a lane."""
        lane = self.call(
            "connect", transport.connect, request, timeouts if timeouts is not None else LaneTimeouts()
        )
        if not isinstance(lane, Lane):
            self.fail("connect to return a Lane", repr(lane))
        self.afterwards(lane.abort)
        return lane

    def _open_pair(self, timeouts: LaneTimeouts, /) -> tuple[Lane, Lane]:
        if self._pairs_over is None:
            self._pairs_over = self.transport(), self.accepting(self.transport())
        opener, accepting = self._pairs_over
        accepting.timeouts = timeouts
        near = self.connect(opener, accepting.request(self.patience_s), timeouts)
        return near, accepting.lane()


class Accepting:
    """The accepting side of a trial, as the core's server is one: it advertises, and adopts where that is due."""

    def __init__(
        self, trial: TransportTrial, transport: Transport, tag: int, deliver: Callable[[Lane], None] | None
    ) -> None:
        self.tags: list[int] = []
        """The tag in the preamble of each connection to the core's listener."""
        self.timeouts = LaneTimeouts()
        self._trial = trial
        self._transport = transport
        self._lanes: queue.SimpleQueue[Lane] = queue.SimpleQueue()
        self._take = deliver if deliver is not None else self._lanes.put
        self._over = False
        trial.afterwards(self._end)
        self.advertisement: Advertisement = trial.call("advertise", transport.advertise, tag, self._deliver)
        self.host, self.port = trial.host, 0
        self._listener: Listener | None = None
        if not self.advertisement.address:
            self._listener = Listener(
                Endpoint("amst", trial.host, 0),
                on_control=_refuse,
                on_lane=self._adopt,
                handshake_timeout_s=trial.patience_s,
                unauthenticated=_STRANGERS,
            )
            trial.afterwards(self._listener.close)
            self.port = int(self._listener.address.rpartition(":")[2])
        self._preamble = PREAMBLE.pack(PREAMBLE_MAGIC, tag)

    def request(self, timeout_s: float) -> LaneRequest:
        """What a client needs to open a lane to here."""
        return LaneRequest(self.advertisement, self.host, self.port, self._preamble, timeout_s)

    def lane(self) -> Lane:
        """The next lane that arrived here."""
        try:
            lane = self._lanes.get(timeout=self._trial.patience_s)
        except queue.Empty:
            self._trial.fail(
                "the other end of each lane that connect returned, from deliver or adopt",
                f"none came within {self._trial.patience_s:g} s",
            )
        self._trial.check(isinstance(lane, Lane), "a Lane from deliver or adopt", repr(lane))
        return lane

    def stop(self) -> None:
        """Close the core's listener, where there is one."""
        if self._listener is not None:
            self._listener.close()

    def _deliver(self, lane: Lane) -> None:
        self._trial.afterwards(lane.abort)
        if self._over:
            lane.abort()
        self._take(lane)

    def _end(self) -> None:
        """Lanes that arrive from now on are nobody's."""
        self._over = True

    def _adopt(self, newcomer: Newcomer, tag: int) -> None:
        self.tags.append(tag)
        self._deliver(self._transport.adopt(newcomer.sock, self.timeouts))


def _refuse(newcomer: Newcomer) -> None:
    newcomer.sock.close()


def closed_port(host: str) -> tuple[socket.socket, int]:
    """A TCP port that refuses as long as the socket is open: bound, so that nobody else gets it, and not listening."""
    holder = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    holder.bind((host, 0))
    return holder, holder.getsockname()[1]


def silent_port(host: str) -> tuple[list[socket.socket], int]:
    """A TCP port whose queue is full: the kernel drops further attempts, as a firewall would.

    Raises:
        NotApplicable: the kernel goes on accepting.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    held = [socket.create_server((host, 0), family=family, backlog=0)]
    port: int = held[0].getsockname()[1]
    for _ in range(_STRANGERS):
        sock = socket.socket(family)
        held.append(sock)
        sock.settimeout(0.2)
        try:
            sock.connect((host, port))
        except TimeoutError:
            return held, port
    for sock in held:
        sock.close()
    raise NotApplicable("the kernel goes on accepting connections beyond the backlog")
