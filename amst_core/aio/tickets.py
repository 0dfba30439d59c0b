"""What a coroutine holds while its message is under way."""

from __future__ import annotations

import asyncio
from collections.abc import Generator

from ..errors import AmstError
from ..session.tickets import Ticket as SessionTicket
from .threads import GRACE_S
from .waking import Once


class Ticket:
    """One outgoing message. ``await ticket`` waits until the peer holds it whole and verified, as `wait` does."""

    def __init__(self, ticket: SessionTicket) -> None:
        self._ticket = ticket
        self._completed: Once | None = None

    @property
    def size(self) -> int:
        """The message's bytes."""
        return self._ticket.size

    @property
    def transfer(self) -> int:
        """Its number, as in the ``delivery`` of an error."""
        return self._ticket.transfer

    @property
    def done(self) -> bool:
        """Completed, either way."""
        return self._ticket.done

    @property
    def error(self) -> AmstError | None:
        """Why it failed; None while under way and after success."""
        return self._ticket.error

    @property
    def acknowledged(self) -> int:
        """Bytes the peer holds, verified."""
        return self._ticket.acknowledged

    def __await__(self) -> Generator[object, None, None]:
        return self.wait().__await__()

    async def wait(self, timeout: float | None = None) -> None:
        """Wait until the message is delivered. A coroutine that is cancelled here cancels the message.

        So does `asyncio.timeout`; with ``timeout`` the message goes on.

        Raises:
            DeadlineError: not yet, after ``timeout`` seconds; it goes on.
            AmstError: it failed, and why.
        """
        try:
            await self.wait_only(timeout)
        except asyncio.CancelledError:
            self.cancel()
            raise

    async def wait_only(self, timeout: float | None = None) -> None:
        """As `wait`, and cancelling it leaves the message alone."""
        if not await self.wait_done(timeout):
            raise self._ticket.late(timeout)
        self._ticket.wait(0)

    async def wait_done(self, timeout: float | None = None) -> bool:
        """Wait until it has completed, either way; whether it has within ``timeout`` seconds."""
        return self.done or await self._completion().wait(timeout) or self.done

    async def release(self) -> None:
        """Wait until its memory may be changed; cancelled, the message is, and this waits a moment for that."""
        completion = self._completion()
        try:
            await completion.wait()
        except asyncio.CancelledError:
            self.cancel()
            await completion.wait(GRACE_S)
            raise

    def cancel(self) -> None:
        """Give the message up: the peer drops what it has of it. No effect once completed."""
        self._ticket.cancel()

    def _completion(self) -> Once:
        if self._completed is None:
            self._completed = completed = Once()
            self._ticket.add_done_callback(lambda _: completed.tell())
        return self._completed
