"""Accepting sessions on an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

from ..api.server import Server as BlockingServer
from ..endpoint import DEFAULT_PORT, parse_endpoint
from ..errors import AmstError, ClosedError, DeadlineError
from ..interfaces import Mode
from ..plugins import Plugins
from ..session.session import Session as BlockingSession
from ..settings.load import load_settings
from ..settings.values import Settings
from .opening import Opening
from .session import Session
from .threads import GRACE_S, in_thread, own_thread
from .waking import Once, post

_log = logging.getLogger("amst.aio")

Handler: TypeAlias = Callable[[Session], Coroutine[Any, Any, object]]

CLOSE_TIMEOUT_S: Final = 30.0


def listen(
    address: str = f"[::]:{DEFAULT_PORT}",
    *,
    root: str | os.PathLike[str] | None = None,
    settings: Settings | None = None,
    state_dir: str | os.PathLike[str] | None = None,
    mode: Mode | str | None = None,
    on_session: Handler | None = None,
    plugins: Plugins | None = None,
) -> Opening[Server]:
    """Accept sessions at ``address``: ``server = await listen(...)``, or ``async with listen(...) as server``.

    Args:
        root, settings, state_dir, mode, plugins: as for `amst_core.listen`.
        on_session: called with each new session, as a task of its own; without it use `Server.accept`. When it
            raises, its session is ended and the error logged; when it returns, the session goes on.

    Raises:
        AmstError: as `amst_core.listen`.
    """
    return Opening(partial(_listen, address, root, settings, state_dir, mode, on_session, plugins))


async def _listen(
    address: str,
    root: str | os.PathLike[str] | None,
    settings: Settings | None,
    state_dir: str | os.PathLike[str] | None,
    mode: Mode | str | None,
    on_session: Handler | None,
    plugins: Plugins | None,
) -> Server:
    endpoint = parse_endpoint(address)
    server = Server(on_session)

    def begin() -> BlockingServer:
        return BlockingServer(
            endpoint,
            root=root,
            settings=settings if settings is not None else load_settings(),
            state=Path(state_dir) if state_dir is not None else None,
            on_session=None,
            plugins=plugins or Plugins(),
            mode=mode,
            deliver=server.deliver,
        )

    server.inner = await in_thread(begin, own_thread("listen"), drop=_drop)
    return server


def _drop(server: BlockingServer) -> None:
    with contextlib.suppress(AmstError):
        server.close(0.0)


class Server:
    """Accepts sessions until it is closed. Made by `listen`; belongs to the event loop it was made in."""

    inner: BlockingServer

    def __init__(self, on_session: Handler | None) -> None:
        self._on_session = on_session
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._sessions: set[Session] = set()
        self._handlers: set[asyncio.Task[None]] = set()
        self._accepted: asyncio.Queue[Session | None] = asyncio.Queue()
        self._closing: Once | None = None
        self._closed = False

    @property
    def address(self) -> str:
        """``HOST:PORT`` it listens on, port 0 resolved, an IPv6 host in brackets."""
        return self.inner.address

    @property
    def token(self) -> bytes:
        """The secret that clients must know."""
        return self.inner.token

    @property
    def sessions(self) -> list[Session]:
        """The live sessions."""
        return [session for session in self._sessions if session.error is None]

    @property
    def memory_in_use(self) -> int:
        """Bytes of `limits.memory` in use by all sessions, what is promised to their peers included."""
        return self.inner.memory_in_use

    async def accept(self, timeout: float | None = None) -> Session:
        """The next new session (only without ``on_session``). Cancelling this loses no session.

        Raises:
            DeadlineError: none within ``timeout`` seconds.
            ClosedError: the server is closed.
        """
        try:
            async with asyncio.timeout(timeout):
                session = await self._accepted.get()
        except TimeoutError:
            raise DeadlineError(f"no session within {timeout} s") from None
        if session is None:
            self._accepted.put_nowait(None)  # for the next one who waits
            raise ClosedError("the server is closed")
        return session

    async def __aiter__(self) -> AsyncIterator[Session]:
        while True:
            try:
                session = await self.accept()
            except ClosedError:
                return
            yield session

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Take no new sessions, let what is under way finish for ``timeout_s`` seconds, then end every session.

        Handlers that have not returned by then are cancelled. Cancelled, this ends everything at once.

        Raises:
            DeadlineError: some transfers were not finished in time; says which, how far they are, and with whom.
        """
        if self._closing is not None:
            if asyncio.current_task() not in self._handlers:  # for those it waits
                await self._closing.wait()
            return
        self._closing = Once()
        deadline = time.monotonic() + timeout_s
        try:
            await in_thread(partial(self.inner.close, timeout_s), own_thread("close"), stop=self._abort_sessions)
            await self._wait_for_handlers(max(GRACE_S, deadline - time.monotonic()))
        finally:
            self._accepted.put_nowait(None)
            for task in self._others():
                task.cancel()
            self._closed = True
            await self._wait_for_handlers(GRACE_S)
            self._closing.tell()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close(CLOSE_TIMEOUT_S if kind is None else 0.0)

    def deliver(self, session: BlockingSession) -> None:
        """A session was opened (on a thread of the server)."""
        if not post(self._loop, self._begin, session):
            session.abort()

    def _begin(self, inner: BlockingSession) -> None:
        if self._closed:
            inner.abort()
            return
        session = Session(inner)
        self._sessions.add(session)
        inner.add_end_callback(lambda: self._ended(session))
        if self._on_session is None:
            self._accepted.put_nowait(session)
            return
        task = self._loop.create_task(
            self._serve(session, self._on_session),
            name=f"amst-session-{session.peer}",
            context=self._context.copy(),
        )
        self._handlers.add(task)
        task.add_done_callback(self._handlers.discard)

    async def _serve(self, session: Session, on_session: Handler) -> None:
        try:
            await on_session(session)
        except asyncio.CancelledError:
            session.abort()
            raise
        except Exception:
            if session.error is None:
                _log.exception("session %s: on_session raised; the session is ended", session.id[:8])
                session.abort()
            else:
                _log.info("session %s: on_session ended with the session: %s", session.id[:8], session.error)

    def _ended(self, session: Session) -> None:
        """(on a thread of the session)"""
        post(self._loop, self._sessions.discard, session)

    def _abort_sessions(self) -> None:
        for session in self.inner.sessions:
            session.abort()

    def _others(self) -> set[asyncio.Task[None]]:
        """The handlers, without the one that closes the server."""
        return {task for task in self._handlers if task is not asyncio.current_task()}

    async def _wait_for_handlers(self, timeout_s: float) -> None:
        others = self._others()
        if others:
            await asyncio.wait(others, timeout=timeout_s)
