"""One budget for the buffers of all sessions of a process side: `limits.memory` of a server, or of a client's session.

Whatever peers do, these together never pass the total, over all sessions:

- *Scratch*, a sixth for each direction: one chunk per lane while it is sealed, received or opened (`BufferPool`). A
  session can always have one chunk of the longest kind it was admitted with; beyond that, `most_of` what others leave.
  So lanes that stop in the middle of a chunk hold up their own session only.
- *Credit*: what a peer may send of each transfer as soon as it is open, promised at admission: transfers × credit.
- *Messages*, a half: what is granted to a message from its first byte until the application has dropped it. A session
  may have `most_of` what the others leave, a channel half of what they leave; and channels that have something already
  together `most_of` the session's part, so that one that has nothing finds room. One message may always have everything
  that is left, and the longest one fits whatever is promised and copied. Blocks that are kept to be used again count
  too, and yield.
- *Copies* of what is sent from mutable memory: what that leaves, and of it again `most_of` what others leave. What
  finds no room is sent without a copy, so that nobody waits for memory who may hold what others wait for.
- *Pipes*, out of the same part and at most `most_of` it: what a writer keeps until it is acknowledged, and what a
  reader's peer may send ahead. A pipe has at most half of what the session's others leave. The blocks in which small
  files are packed count as those of a pipe.

A session is admitted with terms that fit what is free: long chunks and much credit for the first ones, less for those
that come when there are many. A part is set aside for each of the sessions that may still come, so that with the
default settings the last one is admitted however much the others have taken.

Not counted: memory of transports and of TLS, what describes transfers and lanes, and messages that the application
received before they were granted, for which only the credit of their OPEN was used.

All methods are thread-safe and take locks of the budget only, never one of a session; so they may be called with a
session's lock held. Who waits for memory is told by a wake-up that some has come back (`MemoryShare.on_room`), and asks
again.
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from .buffers import Block, Borrower, BufferPool, MessageMemory, most_of
from .errors import BusyError

OVERHEAD: Final = 4096
"""What a message costs beside its bytes, an empty one too: a page, and the objects that describe it."""

CREDIT: Final = 64 << 10
"""Most credit that comes with each OPEN: a message or file of this size needs no round trip for it."""

LEAST_CREDIT: Final = 1 << 10
LEAST_OPEN: Final = 8
"""A session that could not have so many transfers open is not admitted, unless the settings allow no more."""

CHUNKS: Final = (4 << 20, 1 << 20, 256 << 10, 64 << 10)
"""Longest chunks that a session may be admitted with; the longest only while a quarter of the scratch memory has room
for one of each session that has them, for what is guaranteed to a session is taken from all others."""

TAG: Final = 16
"""What sealing adds to a chunk."""

NO_ROOM: Final = "too little memory is left for another session (limits.memory)"


class MemoryBudget:
    """``total`` bytes for at most ``sessions`` sessions at once.

    Each would like ``max_open`` transfers open at once and chunks of ``chunk_size`` bytes, and may be sent messages of
    ``max_message`` bytes, which are at most half of the total. A sole session gets everything.
    """

    def __init__(
        self, total: int, *, max_message: int, max_open: int, chunk_size: int = CHUNKS[0], sessions: int = 1
    ) -> None:
        scratch = total // 6
        self._send_pool = BufferPool(scratch, borrowers=sessions, least=CHUNKS[-1] + TAG)
        self._receive_pool = BufferPool(scratch, borrowers=sessions, least=CHUNKS[-1] + TAG)
        self._chunks = sorted({max(chunk_size, CHUNKS[0]), *CHUNKS}, reverse=True)
        self._long = max(chunk_size, CHUNKS[1])  # chunks beyond it are for few sessions
        self._most_long = scratch // 4
        self._promised_long = 0  # of each session that has them, one
        self._max_open = max_open
        self._sole = sessions == 1
        self._sessions = sessions
        self._pot = total - 2 * scratch  # everything but scratch
        self._longest = max_message + OVERHEAD
        self._messages = max(total // 2, self._longest)
        self._credit = (self._pot - self._longest) * 5 // 8  # most that is promised
        self._aside = min(LEAST_CREDIT * max_open, self._credit // 2 // sessions)  # for each that may still come
        self._lock = threading.Lock()
        self._shares = 0
        self._promised = 0
        self._copied = 0
        self._granted = 0
        self._memory = MessageMemory()
        self._waiting: dict[MemoryShare, int] = {}  # how much must be left for another try to be worth while
        self._late: deque[MemoryShare] = deque()  # those that something came back to: to closed ones, or of pipes

    @property
    def in_use(self) -> int:
        """Bytes in buffers, lent or kept for the next use, and promised to peers."""
        with self._lock:
            self._settle()
            rest = self._promised + self._copied + self._granted + self._memory.kept_bytes
            return rest + self._send_pool.in_use + self._receive_pool.in_use

    def share(self) -> MemoryShare:
        """Admit a session, on terms that fit what is free. Close the share when the session has ended.

        Raises:
            BusyError: too little is left for another one.
        """
        with self._lock:
            self._settle()
            credit = self._credit_for_next()
            if self._shares >= self._sessions or credit < LEAST_CREDIT * min(self._max_open, LEAST_OPEN):
                raise BusyError(NO_ROOM)
            for max_chunk in self._chunks:
                long = max_chunk if max_chunk > self._long else 0
                if long and not self._sole and self._promised_long + long > self._most_long:
                    continue
                send_pool = self._send_pool.admit(max_chunk + TAG)
                if send_pool is None:
                    continue
                receive_pool = self._receive_pool.admit(max_chunk + TAG)
                if receive_pool is not None:
                    break
                send_pool.close()
            else:
                raise BusyError(NO_ROOM)
            max_open = min(self._max_open, credit // LEAST_CREDIT)
            initial_credit = min(CREDIT, credit // max_open // LEAST_CREDIT * LEAST_CREDIT)
            self._shares += 1
            self._promised += max_open * initial_credit
            self._promised_long += long
            gone = self._memory.shed(self._room())
        del gone  # without the lock
        return MemoryShare(
            self,
            send_pool,
            receive_pool,
            max_chunk=max_chunk,
            max_open=max_open,
            initial_credit=initial_credit,
            promised_long=long,
        )

    # ---- with the lock held ------------------------------------------------------------------------

    def _most_of(self, left: int) -> int:
        return left if self._sole else most_of(left)

    def _reserved(self) -> int:
        """Credit that is promised, or set aside to be."""
        return self._promised + self._aside * (self._sessions - self._shares)

    def _credit_for_next(self) -> int:
        spare = min(self._credit, self._pot - self._copied - self._granted) - self._reserved()
        return self._aside + (self._most_of(spare) if spare > 0 else spare)

    def _room(self) -> int:
        """What may be kept for the next use."""
        return self._pot - self._promised - self._copied - self._granted

    def _left(self, share: MemoryShare) -> int:
        """What the other sessions leave to ``share`` for messages, and to those that may still come."""
        return min(self._messages, self._pot - self._reserved() - self._copied) - (self._granted - share.granted)

    def _needed(self, share: MemoryShare, cost: int, channel: int) -> int:
        """How much must be left before ``share`` may have ``cost`` more, ``channel`` being what the channel has."""
        needed = share.granted + cost
        if share.granted and not self._sole:
            needed = _makes_most(needed)
        return max(_makes_most(needed), 2 * (channel + cost)) if channel else needed

    def _come_back(self, share: MemoryShare, block: Block) -> list[Block]:
        charged = share._blocks.pop(id(block))
        share.granted -= charged
        self._granted -= charged
        return list(self._memory.take_back(block, room=self._room() if self._shares else 0))

    def _settle(self) -> None:
        """Take back what came to shares that were closed, and what the garbage collector took."""
        while self._late:
            share = self._late.popleft()
            while share._dropped:
                share._release_pipe(share._dropped.popleft())
            while share._closed and (block := share.pop_returned()) is not None:
                self._come_back(share, block)

    def _to_wake(self, besides: MemoryShare | None = None) -> list[MemoryShare]:
        """Those for which enough has come back meanwhile."""
        if not self._waiting:
            return []
        ready = [s for s, needed in self._waiting.items() if s is not besides and self._left(s) >= needed]
        for share in ready:
            del self._waiting[share]
        return ready


class MemoryShare:
    """One session's part of a `MemoryBudget`, and the terms that it was admitted with. Made by `MemoryBudget.share`.

    ``on_room`` is called when a `grant` that was denied may succeed now, or a block has come back (`has_news`), in any
    thread, also in the garbage collector: it may take no lock that others hold while they allocate.
    """

    def __init__(
        self,
        budget: MemoryBudget,
        send_pool: Borrower,
        receive_pool: Borrower,
        *,
        max_chunk: int,
        max_open: int,
        initial_credit: int,
        promised_long: int,
    ) -> None:
        self._budget = budget
        self._promised_long = promised_long
        self.send_pool = send_pool
        self.receive_pool = receive_pool
        self.max_chunk = max_chunk
        self.max_open = max_open
        self.initial_credit = initial_credit
        self.on_room: Callable[[], None] | None = None
        self.room_came = False
        self.copied = 0  # bytes, those of pipes among them
        self.piped = 0
        self.granted = 0
        self._blocks: dict[int, int] = {}  # of each lent block, by its id, what was granted for it
        self._returned: deque[Block] = deque()
        self._dropped: deque[int] = deque()  # bytes of pipes that the garbage collector took
        self._closed = False

    # ---- messages --------------------------------------------------------------------------------

    def grant(self, cost: int, *, channel: int, block: int | None = None) -> bool:
        """Count ``cost`` bytes for a message, if they may be had now; else have `on_room` called when it is time.

        ``channel`` is what has been granted to its channel before, ``block`` the one that was lent for it already.
        """
        budget = self._budget
        with budget._lock:
            budget._settle()
            needed = budget._needed(self, cost, channel)
            if self._closed or budget._left(self) < needed:
                if not self._closed and needed <= budget._messages:  # else only what is this session's own helps
                    budget._waiting[self] = min(needed, budget._waiting.get(self, needed))
                return False
            budget._granted += cost
            self.granted += cost
            if block is not None:
                self._blocks[block] = cost
            gone = budget._memory.shed(budget._room())
        del gone  # without the lock
        return True

    def ungrant(self, cost: int) -> None:
        """A message that no block was lent for counts no more."""
        budget = self._budget
        with budget._lock:
            if self._closed:
                return  # it went with all the others
            budget._granted -= cost
            self.granted -= cost
            ready = budget._to_wake(self)
        _wake(ready)

    def lend(self, size: int, *, granted: int | None) -> tuple[memoryview, int]:
        """A block for a message of ``size`` bytes, and its id; ``granted`` is the cost that was, None for none yet."""
        budget = self._budget
        with budget._lock:
            kept = budget._memory.kept_bytes
            promised = self.initial_credit if granted is None else None
            view, block = budget._memory.lend(size, self._came_back, promised=promised)
            charged = granted or 0
            if budget._memory.kept_bytes < kept:  # it was used before, maybe for a longer one: it counts as it is
                charged = max(charged, len(block))
                budget._granted += charged - (granted or 0)
                self.granted += charged - (granted or 0)
            self._blocks[id(block)] = charged
        return view, id(block)

    @property
    def has_news(self) -> bool:
        """A block has come back, or room for what was denied."""
        return self.room_came or bool(self._returned)

    def pop_returned(self) -> Block | None:
        """A block that has come back, to be given to `take_back`."""
        try:
            return self._returned.popleft()
        except IndexError:
            return None

    def take_back(self, block: Block) -> None:
        """A block came back, and with it what was granted for it."""
        budget = self._budget
        with budget._lock:
            gone = budget._come_back(self, block)
            ready = budget._to_wake(self)
        del gone  # without the lock
        _wake(ready)

    def _came_back(self, block: Block) -> None:
        """The last view of ``block`` is gone; called wherever that happens, so no lock is taken."""
        self._returned.append(block)
        if not self._closed:
            if self.on_room is not None:
                self.on_room()
            return
        self._budget._late.append(self)
        _wake(list(self._budget._waiting))

    # ---- copies ----------------------------------------------------------------------------------

    def reserve_copy(self, size: int) -> bool:
        """Count ``size`` bytes for a copy of what is to be sent, if they may be had now."""
        with self._budget._lock:
            gone = self._reserve(size, self._most_copied() - self.copied)
        return gone is not None  # what goes is dropped without the lock

    def release_copy(self, size: int) -> None:
        """A copy is not needed any more."""
        budget = self._budget
        with budget._lock:
            if self._closed:
                return  # it went with all the others
            budget._copied -= size
            self.copied -= size
            ready = budget._to_wake()
        _wake(ready)

    def _most_copied(self) -> int:
        """What copies may have in all (the budget's lock held)."""
        budget = self._budget
        budget._settle()
        credit = budget._reserved() if budget._sole else budget._credit
        return budget._most_of(budget._pot - credit - budget._longest - (budget._copied - self.copied))

    def _reserve(self, size: int, left: int) -> list[mmap.mmap] | None:
        """Count ``size`` bytes as copied if ``left`` has room for them; what goes instead, None if not."""
        budget = self._budget
        fits = size <= budget._pot - budget._reserved() - budget._copied - budget._granted
        if self._closed or not fits or size > left:
            return None
        budget._copied += size
        self.copied += size
        return budget._memory.shed(budget._room())

    # ---- pipes -----------------------------------------------------------------------------------

    def reserve_pipe(self, size: int, *, own: int) -> bool:
        """Count ``size`` bytes more for a pipe that has ``own`` bytes, if they may be had now."""
        with self._budget._lock:
            most = self._most_copied()
            half = (most_of(most) - (self.piped - own)) // 2
            gone = self._reserve(size, min(most - self.copied, half - own))
            self.piped += 0 if gone is None else size
        return gone is not None  # what goes is dropped without the lock

    def release_pipe(self, size: int) -> None:
        """A pipe needs ``size`` bytes no more. To be called after `close` too: until then they count."""
        budget = self._budget
        with budget._lock:
            self._release_pipe(size)
            ready = budget._to_wake()
        _wake(ready)

    def drop_pipe(self, size: int) -> None:
        """The same from the garbage collector: takes no lock, and counts at the next use of the budget."""
        self._dropped.append(size)
        self._budget._late.append(self)
        _wake(list(self._budget._waiting))

    def _release_pipe(self, size: int) -> None:
        self._budget._copied -= size
        self.copied -= size
        self.piped -= size

    # ---- the end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Give everything back but the messages and pipes that the application still holds: those as they come.

        Idempotent.

        No lane may be at work any more.
        """
        budget = self._budget
        with budget._lock:
            if self._closed:
                return
            self._closed = True
            budget._shares -= 1
            budget._promised -= self.max_open * self.initial_credit
            budget._promised_long -= self._promised_long
            budget._copied -= self.copied - self.piped
            unlent = self.granted - sum(self._blocks.values())
            budget._granted -= unlent
            self.granted -= unlent
            self.copied = self.piped
            budget._waiting.pop(self, None)
            self.send_pool.close()
            self.receive_pool.close()
            budget._late.append(self)
            budget._settle()
            gone = [] if budget._shares else budget._memory.shed(0)
            ready = budget._to_wake(self)
        del gone  # without the lock
        _wake(ready)


def _makes_most(size: int) -> int:
    """The least of which ``size`` is `most_of`."""
    return -(-4 * size // 3)


def _wake(shares: list[MemoryShare]) -> None:
    for share in shares:
        share.room_came = True
        if share.on_room is not None:
            share.on_room()
