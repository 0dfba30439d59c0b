"""The one thread that drives a session's control channel: messages in, messages out, liveness."""

from __future__ import annotations

import logging
import select
import threading
import time
from collections.abc import Callable
from typing import Final

from ..control.channel import ControlChannel
from ..errors import AmstError, ClosedError, DeadlineError
from ..wire.messages import Close, Message, Ping, Pong
from .core import SessionCore

_log = logging.getLogger("amst.session")

PING_AFTER_S: Final = 10.0
"""Silence on the control channel after which the peer is asked for a sign of life."""

LOST_AFTER_S: Final = 30.0
"""Silence after which it counts as lost."""


class ControlLoop:
    """Reads and writes ``channel`` until the session ends, then closes it.

    ``handle`` gets every message that is not about liveness, ``tick`` the time whenever the loop turns; both
    run on this thread and must not block.
    """

    def __init__(
        self,
        core: SessionCore,
        channel: ControlChannel,
        handle: Callable[[Message], None],
        *,
        tick: Callable[[float], None],
    ) -> None:
        self._core = core
        self._channel = channel
        self._handle = handle
        self._tick = tick
        self._heard_at = time.monotonic()
        self._pinged = False
        self.round_trip_s: float | None = None
        self._ping_sent_at = 0.0
        self._thread = threading.Thread(target=self._run, name="amst-control", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout: float | None = None) -> None:
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        try:
            self._loop()
        except AmstError as err:
            self._core.fail(err)
        except Exception as err:
            _log.exception("session with %s: unexpected error in the control loop", self._core.peer)
            self._core.fail(AmstError(f"unexpected error, please report it: {err!r}", peer=self._core.peer))
        finally:
            self._say_why()
            self._channel.close()
            self._core.wakeup.close()

    def _loop(self) -> None:
        core, channel = self._core, self._channel
        poll = select.poll()
        poll.register(channel, select.POLLIN)
        poll.register(core.wakeup, select.POLLIN)
        writing = False
        while core.error is None:
            now = time.monotonic()
            for message in core.take_messages(now):
                channel.send(message)
            self._watch(now)
            self._tick(now)
            channel.flush()
            if channel.wants_write != writing:
                writing = channel.wants_write
                poll.modify(channel, select.POLLIN | (select.POLLOUT if writing else 0))
            until = core.may_sleep(self._heard_at + (LOST_AFTER_S if self._pinged else PING_AFTER_S))
            wait_s = 0.0 if until is None else max(0.0, until - time.monotonic())
            # poll takes whole milliseconds: round up, or it would spin through the last one
            ready = poll.poll(int(wait_s * 1000 + 0.999))
            for fd, _ in ready:
                if fd == core.wakeup.fileno():
                    core.wakeup.clear()
                else:
                    self._read()

    def _read(self) -> None:
        for message in self._channel.receive():
            self._heard_at = time.monotonic()
            match message:
                case Ping(token):
                    self._channel.send(Pong(token))
                case Pong():
                    self._pinged = False
                    self.round_trip_s = self._heard_at - self._ping_sent_at
                case _:
                    self._pinged = False
                    self._handle(message)

    def _watch(self, now: float) -> None:
        doom = self._core.doom
        if doom is not None and now >= doom[0]:
            raise doom[1]
        silence = now - self._heard_at
        if silence >= LOST_AFTER_S and self._pinged:
            raise DeadlineError(f"{self._core.peer} has not answered for {silence:.0f} s", peer=self._core.peer)
        if silence >= PING_AFTER_S and not self._pinged:
            self._pinged = True
            self._ping_sent_at = now
            self._channel.send(Ping(int(now * 1e6)))

    def _say_why(self) -> None:
        """Tell the peer why the session ends, unless the connection itself is what failed."""
        error = self._core.error
        if error is None or isinstance(error, DeadlineError):
            return
        kind = "" if error.kind == ClosedError.kind else error.kind
        try:
            self._channel.send(Close(kind, error.message))
        except AmstError as err:
            _log.debug("could not say goodbye to %s: %s", self._core.peer, err)
