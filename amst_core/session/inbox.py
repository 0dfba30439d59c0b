"""Incoming messages: memory granted as it is there, delivery in order per channel."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass

from ..buffers import Block
from ..engine import Engine
from ..errors import AmstError, DeadlineError, RefusedError
from ..memory import OVERHEAD, MemoryShare
from ..wire.messages import SIZE_UNKNOWN, Open
from .endpoints import MessageSink, Sink


@dataclass(slots=True, eq=False)
class _Message:
    """One message from its OPEN until the application has dropped it."""

    transfer: int
    channel: str
    size: int
    granted: bool = False  # counts against the budget
    block: int | None = None  # id of the memory it has, which will be returned
    data: memoryview | None = None  # whole, and not received yet
    unconfirmed: bool = False  # whole, but the peer has not been told

    @property
    def cost(self) -> int:
        return self.size + OVERHEAD


class Inbox:
    """The messages of one session. Methods ``..._locked`` expect the session's lock to be held.

    A message is granted whole, or waits with the credit of its OPEN only. A channel takes at most half of what the
    session may have (`memory`), so that one that nobody reads does not stop the others; one message always may. In a
    channel they are granted in order, for one behind must not hold what the first one waits for.

    A message so small that it came whole without a grant is confirmed to the peer when it is granted or
    received: until then it is one of the transfers that the peer may have open, so that their number is
    bounded too. ``on_change`` is called (lock held) when there may be something to tell the peer.
    """

    def __init__(
        self,
        lock: threading.Lock,
        engine: Engine,
        *,
        memory: MemoryShare,
        on_change: Callable[[], None],
        max_message: int,
    ) -> None:
        self._lock = lock
        self._engine = engine
        self._memory = memory
        self._on_change = on_change
        self._max_message = max_message
        self._channels: dict[str, deque[_Message]] = {}
        self._arrived = threading.Condition(lock)
        self._watchers: dict[str, deque[Callable[[], None]]] = {}  # who is called instead of waiting, by channel
        self._waiting: deque[_Message] = deque()
        self._charged: dict[str, int] = {}  # bytes granted, per channel
        self._lent: dict[int, _Message] = {}  # by id of the block
        self._error: AmstError | None = None

    @property
    def charged(self) -> int:
        """Bytes that count against the budget now."""
        return self._memory.granted

    def owns(self, sink: Sink) -> bool:
        return isinstance(sink, MessageSink)

    def accept(self, opened: Open) -> MessageSink:
        """Take a message the peer opens (lock held): credit for all of it now, or later."""
        size = opened.size
        if size == SIZE_UNKNOWN or size > self._max_message:
            raise RefusedError(f"a message may have {self._max_message} bytes here (limits.max_message)")
        message = _Message(opened.transfer, opened.channel, size)
        self._channels.setdefault(message.channel, deque()).append(message)
        if not any(w.channel == message.channel for w in self._waiting) and self._grant(message):
            self._engine.accept(message.transfer, window=size)
        else:
            self._engine.accept(message.transfer, window=None)
            self._waiting.append(message)

        def lend() -> memoryview:
            view, block = self._memory.lend(size, granted=message.cost if message.granted else None)
            message.block = block
            self._lent[block] = message
            return view

        def deliver(data: memoryview | None) -> None:
            message.data = data
            if data is None:
                self._forget(message)
            elif message.granted:
                self._engine.finish(message.transfer)
            else:
                message.unconfirmed = True
            self._arrived.notify_all()
            self._call_next(message.channel)

        return MessageSink(lend, deliver)

    def reclaim_locked(self) -> None:
        """Take back what the application has released, and grant what there is room for now."""
        while (block := self._memory.pop_returned()) is not None:
            self._take_back(block)
        if self._memory.room_came:
            self._memory.room_came = False
            self._grant_waiting()

    def _take_back(self, block: Block) -> None:
        message = self._lent.pop(id(block))
        self._memory.take_back(block)
        self._release(message)

    def receive(self, channel: str, timeout: float | None) -> memoryview:
        """The next message of ``channel``, waiting for it.

        Raises:
            DeadlineError: none within ``timeout`` seconds.
            AmstError: the session ended and everything that had arrived was received.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            while True:
                messages = self._channels.get(channel)
                if messages and messages[0].data is not None:
                    return self._receive(messages[0])
                if self._error is not None:
                    raise copy(self._error)
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise DeadlineError(f"no message on channel {channel!r} within {timeout} s")
                self._arrived.wait(left)

    def take(self, channel: str, notify: Callable[[], None]) -> memoryview | None:
        """The next message of ``channel``; None when there is none, and then ``notify`` is called once.

        It is called (lock held: it must be quick, and take no lock of the session) when there may be a message, or the
        session has ended: try again then. Each message calls one, the one that has waited longest. Whoever stops
        waiting must `withdraw`.

        Raises:
            AmstError: the session ended and everything that had arrived was received.
        """
        with self._lock:
            messages = self._channels.get(channel)
            if messages and messages[0].data is not None:
                data = self._receive(messages[0])
                self._call_next(channel)
                return data
            if self._error is not None:
                raise copy(self._error)
            self._watchers.setdefault(channel, deque()).append(notify)
            return None

    def withdraw(self, channel: str, notify: Callable[[], None]) -> None:
        """Do not call ``notify`` any more; where it has been, the next one is called in its place."""
        with self._lock:
            watchers = self._watchers.get(channel)
            if watchers is None or notify not in watchers:
                self._call_next(channel)
                return
            watchers.remove(notify)
            if not watchers:
                del self._watchers[channel]

    def _call_next(self, channel: str) -> None:
        """Call whoever has waited longest, if there is something for it."""
        messages = self._channels.get(channel)
        if channel in self._watchers and messages and messages[0].data is not None:
            watchers = self._watchers[channel]
            notify = watchers.popleft()
            if not watchers:
                del self._watchers[channel]
            notify()

    def end_locked(self, error: AmstError) -> None:
        """The session has ended: nothing more arrives."""
        self._error = error
        self._waiting.clear()
        # what never came whole does not hide what did, and was confirmed, behind it
        for channel, messages in list(self._channels.items()):
            whole = deque(message for message in messages if message.data is not None)
            if whole:
                self._channels[channel] = whole
            else:
                del self._channels[channel]
        self._arrived.notify_all()
        watchers, self._watchers = self._watchers, {}
        for waiting in watchers.values():
            for notify in waiting:
                notify()

    def _receive(self, message: _Message) -> memoryview:
        data, message.data = message.data, None
        assert data is not None, "only what is whole is received"
        self._dequeue(message)
        self._confirm(message)
        if message.block is None:
            self._release(message)  # otherwise when its block comes back
        self._on_change()
        return data

    def _forget(self, message: _Message) -> None:
        """It failed, and will not be received."""
        self._dequeue(message)
        if message.block is None:
            self._release(message)

    def _dequeue(self, message: _Message) -> None:
        messages = self._channels[message.channel]
        messages.remove(message)
        if not messages:
            del self._channels[message.channel]

    def _confirm(self, message: _Message) -> None:
        if message.unconfirmed:
            message.unconfirmed = False
            self._engine.finish(message.transfer)

    def _grant(self, message: _Message) -> bool:
        """Count a message in full, if the budget has room for it."""
        own, cost = self._charged.get(message.channel, 0), message.cost
        if not self._memory.grant(cost, channel=own, block=message.block):
            return False
        message.granted = True
        self._charged[message.channel] = own + cost
        return True

    def _release(self, message: _Message) -> None:
        """A message does not count any more: others may."""
        if message.granted:
            message.granted = False
            if message.block is None:
                self._memory.ungrant(message.cost)
            self._charged[message.channel] -= message.cost
            if not self._charged[message.channel]:
                del self._charged[message.channel]
        elif message in self._waiting:
            self._waiting.remove(message)
        self._grant_waiting()

    def _grant_waiting(self) -> None:
        behind: set[str] = set()
        for _ in range(len(self._waiting)):
            waiting = self._waiting.popleft()
            if waiting.channel not in behind and self._grant(waiting):
                self._engine.grant(waiting.transfer, waiting.size)
                self._confirm(waiting)
            else:
                behind.add(waiting.channel)
                self._waiting.append(waiting)
