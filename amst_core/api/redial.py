"""The opener's side of a lost control channel: dial, prove, take the session up again; over and over until it works."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from ..control import handshake
from ..control.channel import ControlChannel
from ..errors import AmstError, BrokenError, ConnectError
from ..session.backoff import pause_s
from ..session.session import Session

_log = logging.getLogger("amst.api")

ATTEMPT_S: Final = 10.0
"""How long one attempt may take."""

CONNECT_S: Final = 3.0
"""And of that, to connect: TCP asks again after 1 and 3 s, and then too seldom for a path that has just come back."""

REFUSED_S: Final = 3.0
"""When nobody has listened at the server's address for so long, and no stream lives, the server's process is gone."""


class Redialer:
    """Takes ``session`` up again whenever its control channel is lost. ``dial`` opens a connection within seconds."""

    def __init__(
        self,
        session: Session,
        *,
        dial: Callable[[float], ControlChannel],
        token: bytes,
        agreed: handshake.Agreement,
    ) -> None:
        self._session = session
        self._dial = dial
        self._token = token
        self._agreed = agreed
        self._epoch = 0
        self._ended = threading.Event()

    def __call__(self, error: AmstError) -> None:
        """The channel was lost with ``error``; returns at once."""
        threading.Thread(target=self._run, name="amst-redial", daemon=True).start()

    def end(self) -> None:
        """The session is over."""
        self._ended.set()

    def _run(self) -> None:
        session = self._session
        refused_since: float | None = None
        attempt = 0
        while not self._ended.wait(pause_s(attempt)) and session.error is None:
            attempt += 1
            try:
                self._attempt()
                return
            except ConnectError as err:
                _log.info("cannot take the session with %s up again yet: %s", session.peer, err)
                if not isinstance(err.__cause__, ConnectionRefusedError):
                    refused_since = None
                    continue
                now = time.monotonic()
                refused_since = refused_since or now
                if now - refused_since >= REFUSED_S and not session.core.lanes:
                    self._give_up(f"nobody listens at {session.peer} any more: the server's process has ended")
                    return
            except BrokenError as err:
                _log.info("cannot take the session with %s up again yet: %s", session.peer, err)
            except AmstError as err:
                self._give_up(f"the session with {session.peer} cannot be taken up again: {err}")
                return

    def _attempt(self) -> None:
        deadline = time.monotonic() + ATTEMPT_S
        channel = self._dial(CONNECT_S)
        self._epoch += 1
        try:
            resumption = handshake.resume(
                channel,
                token=self._token,
                agreed=self._agreed,
                epoch=self._epoch,
                received=self._session.received,
                deadline=deadline,
            )
        except BaseException:
            channel.abort()
            raise
        self._session.epoch = resumption.epoch
        self._session.go_on(channel, resumption.received, epoch=resumption.epoch)

    def _give_up(self, why: str) -> None:
        self._session.core.fail(BrokenError(why, peer=self._session.peer))
