"""What can only be done by waiting, on threads that end with it. The loop's own executor would keep its threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import Final, Generic, TypeAlias, TypeVar

from .waking import Once

T = TypeVar("T")

Start: TypeAlias = Callable[[Callable[[], None]], None]
"""Has a function run on a thread, now or in its turn."""

GRACE_S: Final = 1.0
"""How long a coroutine that is cancelled waits for its thread to end, once that was told to."""


def own_thread(name: str) -> Start:
    """Start a thread for it. It does not keep the interpreter from ending."""
    return lambda run: threading.Thread(target=run, name=f"amst-aio-{name}", daemon=True).start()


async def in_thread(
    call: Callable[[], T],
    start: Start,
    *,
    stop: Callable[[], None] | None = None,
    drop: Callable[[T], None] | None = None,
) -> T:
    """What ``call()`` returns or raises, on a thread.

    When the coroutine is cancelled ``stop`` is called, which must not block and makes ``call`` return soon; without it
    nobody waits for what has begun. A value that nobody takes any more is given to ``drop``, on a thread.
    """
    errand = _Errand(call, drop)
    start(errand.run)
    try:
        await errand.done.wait()
        return errand.result()
    except (asyncio.CancelledError, GeneratorExit) as err:
        if stop is not None:
            stop()
            if isinstance(err, asyncio.CancelledError):
                await errand.done.wait(GRACE_S)
        raise
    finally:
        errand.abandon(start)


class _Errand(Generic[T]):
    def __init__(self, call: Callable[[], T], drop: Callable[[T], None] | None) -> None:
        self._call = call
        self._drop = drop
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._abandoned = False
        self._values: list[T] = []
        self._error: BaseException | None = None
        self.done = Once()

    def run(self) -> None:
        if self._abandoned:
            return
        try:
            value = self._call()
        except BaseException as err:
            self._error = err
        else:
            if not self._keep(value) and self._drop is not None:
                self._drop(value)
        self.done.tell()

    def _keep(self, value: T) -> bool:
        with self._lock:
            wanted = not self._abandoned and not self._loop.is_closed()
            if wanted:
                self._values.append(value)
            return wanted

    def abandon(self, start: Start) -> None:
        """Nobody takes the outcome any more."""
        with self._lock:
            self._abandoned = True
            values, self._values = self._values, []
        if values and self._drop is not None:
            start(partial(self._drop, values[0]))

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return self._values.pop()
