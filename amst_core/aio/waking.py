"""The event loop, told by other threads: nothing here polls or blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


def post(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *args: Any) -> bool:
    """Have ``loop`` call it soon (any thread); false when the loop is closed and nobody waits there any more."""
    try:
        loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:
        return False
    return True


def settle(waiter: asyncio.Future[None]) -> None:
    """Let whoever awaits it go on (on the loop's thread)."""
    if not waiter.done():
        waiter.set_result(None)


class Once:
    """Something that comes once: any thread may `tell`, any number of coroutines of one loop wait for it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._come = False
        self._waiters: set[asyncio.Future[None]] = set()

    def tell(self) -> None:
        """It has come (any thread, any number of times)."""
        post(self._loop, self._tell)

    def _tell(self) -> None:
        self._come = True
        for waiter in self._waiters:
            settle(waiter)

    async def wait(self, timeout: float | None = None) -> bool:
        """Wait for it, ``timeout`` seconds at most; whether it has come."""
        if not self._come:
            waiter = self._loop.create_future()
            self._waiters.add(waiter)
            timer = None if timeout is None else self._loop.call_later(timeout, settle, waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)
                if timer is not None:
                    timer.cancel()
        return self._come
