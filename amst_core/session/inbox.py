"""Incoming messages: memory granted as it is there, delivery in order per channel."""

from __future__ import annotations

import mmap
import threading
import time
from collections import deque
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
class _Waiting:
    """A message whose memory is not granted yet: only the credit of its OPEN may arrive."""

    transfer: int
    size: int
    key: int
    channel: str


class Inbox:
    """The messages of one session. Methods ``..._locked`` expect the session's lock to be held.

    A channel takes at most half of the memory, so that one that nobody reads does not stop the others.
    """

    def __init__(self, lock: threading.Lock, engine: Engine, memory: MessageMemory, *, max_message: int) -> None:
        self._lock = lock
        self._engine = engine
        self._memory = memory
        self._max_message = max_message
        self._channels: dict[str, deque[_Slot]] = {}
        self._arrived = threading.Condition(lock)
        self._waiting: deque[_Waiting] = deque()
        self._granted: dict[int, tuple[str, int]] = {}  # block key → channel and bytes it was granted
        self._error: AmstError | None = None
        self.delivered = 0

    def owns(self, sink: Sink) -> bool:
        return isinstance(sink, MessageSink)

    def accept(self, opened: Open) -> MessageSink:
        """Take a message the peer opens (lock held): memory for all of it now, or credit later."""
        size = opened.size
        if size == SIZE_UNKNOWN or size > self._max_message:
            raise RefusedError(f"a message may have {self._max_message} bytes here (limits.max_message)")
        fits = not size or self._fits(opened.channel, size)
        view, key = self._memory.lend(size, charge=size if fits else 0)
        slot = _Slot()
        self._channels.setdefault(opened.channel, deque()).append(slot)
        if fits:
            if size:
                self._granted[key] = (opened.channel, size)
            self._engine.accept(opened.transfer, window=size)
        else:
            self._engine.accept(opened.transfer, window=None)
            self._waiting.append(_Waiting(opened.transfer, size, key, opened.channel))

        def deliver(data: memoryview | None) -> None:
            slot.ready, slot.data = True, data
            if data is None:
                self._forget_waiting(opened.transfer)
            self._arrived.notify_all()

        return MessageSink(view, deliver)

    def take_back_locked(self, block: mmap.mmap) -> None:
        """A message's memory was released by the application."""
        self._granted.pop(id(block), None)
        self._memory.take_back(block)
        for _ in range(len(self._waiting)):
            waiting = self._waiting.popleft()
            if self._fits(waiting.channel, waiting.size):
                self._memory.recharge(waiting.key, waiting.size)
                self._granted[waiting.key] = (waiting.channel, waiting.size)
                self._engine.grant(waiting.transfer, waiting.size)
            else:
                self._waiting.append(waiting)

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
                        self.delivered += 1
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

    def _fits(self, channel: str, size: int) -> bool:
        if not self._memory.fits(size):
            return False
        held = sum(granted for name, granted in self._granted.values() if name == channel)
        return held == 0 or held + size <= self._memory.budget // 2

    def _forget_waiting(self, transfer: int) -> None:
        self._waiting = deque(w for w in self._waiting if w.transfer != transfer)
