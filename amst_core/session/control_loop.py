"""The one thread that drives a session's control channel: messages in, messages out, liveness, and its loss.

A connection that breaks does not end the session. Messages that the peer must have are kept until it says that it
took them in (SEEN); on the next connection, which the opener dials and the acceptor is handed, they go again.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ..control.channel import ControlChannel
from ..errors import AmstError, BrokenError, ClosedError, DeadlineError, ProtocolError
from ..wire.messages import UNCOUNTED, Ack, Close, Credit, Message, Ping, Pong, Seen
from .core import SessionCore

_log = logging.getLogger("amst.session")

PING_AFTER_S: Final = 10.0
"""Silence on the control channel after which the peer is asked for a sign of life; at most a sixth of the timeout."""

LOST_AFTER_S: Final = 30.0
"""Silence after which the connection counts as lost; at most half of the session's timeout."""

SEEN_EVERY: Final = 64
"""Messages of the peer after which it is told that it need not keep them."""

MAX_KEPT: Final = 1 << 14
MAX_KEPT_BYTES: Final = 8 << 20
"""Messages, and bytes of them, kept for a peer that does not say that it has taken them in."""

MAX_UNSURE: Final = 64
"""Latest acknowledgements and credits that go over a lane too when they are held up; each says what went before."""

STALL_S: Final = 0.05
"""Least time without progress of what was written, after which acknowledgements go over a lane too."""


@dataclass(frozen=True, slots=True)
class Connection:
    """A control connection that has passed its handshake, and how many messages of ours the peer had taken in."""

    channel: ControlChannel
    received: int = 0


class ControlLoop:
    """Reads and writes the control channel until the session ends, then closes it.

    ``handle`` gets every message that is not about liveness, ``tick`` the time whenever the loop turns; both
    run on this thread and must not block; ``next_tick`` says when at the latest. Without a connection for
    ``timeout_s`` the session ends. ``redial`` begins to look for another one and returns at once; the acceptor has
    none and waits to be handed one.
    """

    def __init__(
        self,
        core: SessionCore,
        channel: ControlChannel,
        handle: Callable[[Message], None],
        *,
        tick: Callable[[float], None],
        next_tick: Callable[[], float],
        timeout_s: float,
    ) -> None:
        self._core = core
        self._channel: ControlChannel | None = channel
        self._handle = handle
        self._tick = tick
        self._next_tick = next_tick
        self._timeout_s = timeout_s
        self._ping_after_s = min(PING_AFTER_S, timeout_s / 6)
        self._lost_after_s = min(LOST_AFTER_S, timeout_s / 2)
        self._pinged = False
        self.round_trip_s: float | None = None
        self._ping_sent_at = 0.0
        self._kept: deque[tuple[Message, int]] = deque()  # sent and not known to be taken in; sizes on the wire
        self._kept_bytes = 0
        self._kept_from = 0  # number of the first of them
        self._received = 0  # counted messages taken in
        self._seen_told = 0
        self.redial: Callable[[AmstError], None] | None = None
        self._offers = threading.Condition()
        self._offer: Connection | None = None
        self._must_yield = False
        self._thread = threading.Thread(target=self._run, name="amst-control", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout: float | None = None) -> None:
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)

    # ---- from other threads ----------------------------------------------------------------------

    def give_up_connection(self, timeout_s: float) -> int:
        """Drop the connection, for another one is about to take its place; how many messages were taken in.

        Raises:
            BrokenError: the session has ended.
        """
        with self._offers:
            if self._offer is not None:  # an earlier one that nobody has looked at yet
                self._offer.channel.abort()
                self._offer = None
            if self._channel is not None:
                self._must_yield = True
                self._core.wakeup.set()
                self._offers.wait_for(lambda: self._channel is None or self._core.error is not None, timeout_s)
            if self._channel is not None or self._core.error is not None:
                raise BrokenError(f"the session with {self._core.peer} has ended", peer=self._core.peer)
            return self._received

    @property
    def received(self) -> int:
        """Counted messages taken in; it stands still while there is no connection."""
        return self._received

    def connect(self, connection: Connection) -> None:
        """Go on over ``connection``; it is closed when the session has ended meanwhile."""
        with self._offers:
            if self._core.error is None:
                self._offer = connection
                self._core.wakeup.set()
                return
        connection.channel.abort()

    # ---- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop()
        except AmstError as err:
            self._core.fail(err)
        except Exception as err:
            _log.exception("session with %s: unexpected error in the control loop", self._core.peer)
            self._core.fail(AmstError(f"unexpected error, please report it: {err!r}", peer=self._core.peer))
        finally:
            with self._offers:
                offer, self._offer = self._offer, None
                self._offers.notify_all()
            if offer is not None:
                offer.channel.abort()
            if self._channel is not None:
                self._say_why(self._channel)
                self._channel.close()
            self._core.wakeup.close()

    def _loop(self) -> None:
        while self._core.error is None:
            if self._channel is None:
                self._wait_for_connection()
                continue
            try:
                self._exchange(self._channel)
            except BrokenError as err:
                if self._core.error is None and self._core.closing is None:
                    self._lose(err)
                else:
                    raise

    def _exchange(self, channel: ControlChannel) -> None:
        """Drive one connection until the session ends; raises `BrokenError` when the connection does."""
        core = self._core
        poll = select.poll()
        poll.register(channel, select.POLLIN)
        poll.register(core.wakeup, select.POLLIN)
        writing = False
        unsure: deque[Ack | Credit] = deque(maxlen=MAX_UNSURE)  # the peer's kernel may not have them yet
        while core.error is None:
            if self._must_yield:
                raise BrokenError(f"{core.peer} opened another control connection", peer=core.peer)
            now = time.monotonic()
            messages = core.take_messages(now)
            for message in messages:
                self._send(channel, message)
            left_s = max(STALL_S, 2 * (self.round_trip_s or 0.0)) - channel.stalled_s(now)
            if channel.settled:
                unsure.clear()
            unsure += [message for message in messages if isinstance(message, Ack | Credit)]
            if left_s < 0:
                # a lost segment holds them up here, and the sender must not wait for it
                core.report_by_lane(list(unsure))
                unsure.clear()
            self._watch(channel, now)
            self._tick(now)
            channel.flush()
            if channel.wants_write != writing:
                writing = channel.wants_write
                poll.modify(channel, select.POLLIN | (select.POLLOUT if writing else 0))
            quiet_until = core.heard_at + (self._lost_after_s if self._pinged else self._ping_after_s)
            stalls_at = now + left_s if unsure else quiet_until
            until = core.may_sleep(min(quiet_until, stalls_at, self._next_tick()))
            if self._sleep(poll, until):
                self._read(channel)

    def _wait_for_connection(self) -> None:
        """Without a connection: what lanes can carry goes by lane; time runs out after the timeout."""
        core = self._core
        poll = select.poll()
        poll.register(core.wakeup, select.POLLIN)
        deadline = self._core.heard_at + self._timeout_s
        while core.error is None:
            with self._offers:
                offer, self._offer = self._offer, None
            if offer is not None:
                self._take_up(offer)
                return
            now = time.monotonic()
            if now >= deadline:
                raise DeadlineError(
                    f"{core.peer} could not be reached for {self._timeout_s:g} s (limits.session_timeout)",
                    peer=core.peer,
                )
            self._watch_lanes(now)
            core.report_by_lane(core.take_reports(now))
            self._tick(now)
            self._sleep(poll, core.may_sleep(min(deadline, self._next_tick())))

    def _sleep(self, poll: select.poll, until: float | None) -> bool:
        """Wait for a wake-up, the connection or the time; whether it was the connection."""
        wait_s = 0.0 if until is None else max(0.0, until - time.monotonic())
        # poll takes whole milliseconds: round up, or it would spin through the last one
        readable = False
        for fd, _ in poll.poll(int(wait_s * 1000 + 0.999)):
            if fd == self._core.wakeup.fileno():
                self._core.wakeup.clear()
            else:
                readable = True
        return readable

    def _lose(self, error: AmstError) -> None:
        self._pinged = False
        self._core.control_lost(error)
        with self._offers:
            channel, self._channel = self._channel, None
            replaced, self._must_yield = self._must_yield, False
            self._offers.notify_all()
        assert channel is not None, "only a connection that was there is lost"
        channel.abort()
        level = logging.INFO if replaced else logging.WARNING
        _log.log(level, "control connection to %s lost (%s); the session goes on for %g s without it",
                 self._core.peer, error, self._timeout_s)  # fmt: skip
        if self.redial is not None:
            self.redial(error)

    def _take_up(self, connection: Connection) -> None:
        """Go on where the last connection ended: what the peer has not taken in goes again, then the whole state."""
        missing = connection.received - self._kept_from
        if not 0 <= missing <= len(self._kept):
            connection.channel.abort()
            raise ProtocolError(
                f"{self._core.peer} has taken in {connection.received} messages, of {self._kept_from} to "
                f"{self._kept_from + len(self._kept)}",
                peer=self._core.peer,
            )
        self._confirmed(connection.received)
        self._channel = channel = connection.channel
        self._core.heard_at = time.monotonic()
        for message, _ in self._kept:
            channel.send(message)
        self._core.control_resumed()
        _log.warning("control connection to %s is back", self._core.peer)

    # ---- messages ------------------------------------------------------------------------------------

    def _send(self, channel: ControlChannel, message: Message) -> None:
        size = channel.send(message)
        if not isinstance(message, UNCOUNTED):
            self._kept.append((message, size))
            self._kept_bytes += size
            if len(self._kept) > MAX_KEPT or self._kept_bytes > MAX_KEPT_BYTES:
                raise ProtocolError(f"{self._core.peer} does not confirm what it takes in", peer=self._core.peer)

    def _confirmed(self, count: int) -> None:
        """The peer has taken in ``count`` messages since the session began."""
        if not self._kept_from <= count <= self._kept_from + len(self._kept):
            raise ProtocolError(f"SEEN of {count} messages, of {self._kept_from + len(self._kept)} that were sent")
        while self._kept_from < count:
            self._kept_bytes -= self._kept.popleft()[1]
            self._kept_from += 1

    def _read(self, channel: ControlChannel) -> None:
        for message in channel.receive():
            if self._core.error is not None:
                return  # nothing counts behind a CLOSE
            self._core.heard_at = time.monotonic()
            match message:
                case Ping(token):
                    channel.send(Pong(token))
                    self._tell_seen(channel)
                case Pong():
                    self._pinged = False
                    self.round_trip_s = self._core.heard_at - self._ping_sent_at
                case Seen(count):
                    self._confirmed(count)
                case _:
                    self._pinged = False
                    if not isinstance(message, UNCOUNTED):
                        self._received += 1
                        if self._received - self._seen_told >= SEEN_EVERY:
                            self._tell_seen(channel)
                    try:
                        self._handle(message)
                    except BrokenError as err:
                        self._core.fail(err)  # it is not this connection that broke
                        return

    def _tell_seen(self, channel: ControlChannel) -> None:
        if self._received > self._seen_told:
            self._seen_told = self._received
            channel.send(Seen(self._received))

    def _watch(self, channel: ControlChannel, now: float) -> None:
        self._watch_lanes(now)
        silence = now - self._core.heard_at
        if silence >= self._lost_after_s and self._pinged:
            raise DeadlineError(f"{self._core.peer} has not answered for {silence:.0f} s", peer=self._core.peer)
        if silence >= self._ping_after_s and not self._pinged:
            self._pinged = True
            self._ping_sent_at = now
            channel.send(Ping(int(now * 1e6)))
            self._tell_seen(channel)

    def _watch_lanes(self, now: float) -> None:
        doom = self._core.doom
        if doom is not None and now >= doom[0]:
            self._core.fail(doom[1])

    def _say_why(self, channel: ControlChannel) -> None:
        """Tell the peer why the session ends, unless the connection itself is what failed."""
        error = self._core.error
        if error is None or isinstance(error, DeadlineError):
            return
        kind = "" if error.kind == ClosedError.kind else error.kind
        try:
            channel.send(Close(kind, error.message))
        except AmstError as err:
            _log.debug("could not say goodbye to %s: %s", self._core.peer, err)
