"""Incoming messages: memory granted as it is there, delivery in order per channel."""

from __future__ import annotations

import mmap
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ..buffers import MessageMemory
from ..engine import Engine
from ..errors import AmstError, DeadlineError, RefusedError
from ..wire.messages import SIZE_UNKNOWN, Open
from .endpoints import MessageSink, Sink


@dataclass(slots=True)
class _Slot:
    """One message's turn in its channel: whole, lost, or still coming."""

    ready: bool = False
    data: memoryview | None = None


@dataclass(slots=True)
class _Charge:
    """What one message counts against the budget; 0 while it waits for its grant."""

    transfer: int
    channel: str
    size: int
    granted: int = 0


class Inbox:
    """The messages of one session. Methods ``..._locked`` expect the session's lock to be held.

    A message is granted whole, or waits with the credit of its OPEN only. A channel takes at most half of the
    ``budget`` (bytes), so that one that nobody reads does not stop the others; one message always may.
    """

    def __init__(
        self,
        lock: threading.Lock,
        engine: Engine,
        *,
        budget: int,
        on_return: Callable[[mmap.mmap], None],
        max_message: int,
    ) -> None:
        self._lock = lock
        self._engine = engine
        self._memory = MessageMemory(on_return)
        self._budget = budget
        self._max_message = max_message
        self._channels: dict[str, deque[_Slot]] = {}
        self._arrived = threading.Condition(lock)
        self._waiting: deque[_Charge] = deque()
        self._charged: dict[str, int] = {}  # bytes granted, per channel
        self._lent: dict[int, _Charge] = {}  # by id of the block
        self._error: AmstError | None = None

    def owns(self, sink: Sink) -> bool:
        return isinstance(sink, MessageSink)

    def accept(self, opened: Open) -> MessageSink:
        """Take a message the peer opens (lock held): credit for all of it now, or later."""
        size = opened.size
        if size == SIZE_UNKNOWN or size > self._max_message:
            raise RefusedError(f"a message may have {self._max_message} bytes here (limits.max_message)")
        charge = _Charge(opened.transfer, opened.channel, size)
        slot = _Slot()
        self._channels.setdefault(opened.channel, deque()).append(slot)
        if self._grant(charge):
            self._engine.accept(opened.transfer, window=size)
        else:
            self._engine.accept(opened.transfer, window=None)
            self._waiting.append(charge)

        def lend() -> memoryview:
            view, block = self._memory.lend(size)
            self._lent[block] = charge
            return view

        def deliver(data: memoryview | None, *, used: bool) -> None:
            slot.ready, slot.data = True, data
            if not used:
                self._release(charge)  # otherwise when its block comes back
            self._arrived.notify_all()

        return MessageSink(lend, deliver)

    def take_back_locked(self, block: mmap.mmap) -> None:
        """A message's memory was released by the application."""
        charge = self._lent.pop(id(block))
        self._release(charge)
        self._memory.take_back(block, room=self._budget - sum(self._charged.values()))

    def receive(self, channel: str, timeout: float | None) -> memoryview:
        """The next message of ``channel``, waiting for it.

        Raises:
            DeadlineError: none within ``timeout`` seconds.
            AmstError: the session ended and everything that had arrived was received.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            while True:
                slots = self._channels.get(channel)
                while slots and slots[0].ready:
                    slot = slots.popleft()
                    if slot.data is not None:
                        return slot.data
                if self._error is not None:
                    raise self._error
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise DeadlineError(f"no message on channel {channel!r} within {timeout} s")
                self._arrived.wait(left)

    def end_locked(self, error: AmstError) -> None:
        """The session has ended: nothing more arrives."""
        self._error = error
        self._waiting.clear()
        self._arrived.notify_all()

    def _grant(self, charge: _Charge) -> bool:
        """Count a message in full, if the budget has room for it."""
        total, own = sum(self._charged.values()), self._charged.get(charge.channel, 0)
        if total and total + charge.size > self._budget:
            return False
        if own and own + charge.size > self._budget // 2:
            return False
        charge.granted = charge.size
        if charge.size:
            self._charged[charge.channel] = own + charge.size
        self._memory.shed(self._budget - total - charge.size)
        return True

    def _release(self, charge: _Charge) -> None:
        """A message does not count any more: others may."""
        if charge.granted:
            self._charged[charge.channel] -= charge.granted
            if not self._charged[charge.channel]:
                del self._charged[charge.channel]
            charge.granted = 0
        elif charge in self._waiting:
            self._waiting.remove(charge)
        for _ in range(len(self._waiting)):
            waiting = self._waiting.popleft()
            if self._grant(waiting):
                self._engine.grant(waiting.transfer, waiting.size)
            else:
                self._waiting.append(waiting)
