"""Memory that is used again: fresh anonymous memory is slow to touch, and what is counted can be bounded.

`BufferPool` lends scratch space for one chunk at a time, to several borrowers none of which can starve another.
`MessageMemory` lends blocks for whole messages, which the application holds as memoryviews; a block returns by itself
when its last view is gone.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final, TypeAlias

from .errors import ClosedError

_GRAIN: Final = 64 << 10
_HUGE_PAGE: Final = 2 << 20
_TAIL: Final = 4096
"""Sizes are rounded to grains plus a tail, so that a chunk with its tag fits the chunk's own class."""


def _rounded(size: int) -> int:
    return max(1, -(-(size - _TAIL) // _GRAIN)) * _GRAIN + _TAIL


def _map(size: int, *, sparse: bool = False) -> mmap.mmap:
    """Anonymous memory, by huge pages where the kernel has them: touching it then costs 512 times fewer faults.

    ``sparse`` memory may stay mostly untouched, and costs no more than what is touched. Private, because mmap's
    default here is shared, which gets no huge pages.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_NOHUGEPAGE if sparse else mmap.MADV_HUGEPAGE)
    return memory


def fresh_memory(size: int, *, sparse: bool = False) -> memoryview:
    """``size`` bytes of zeros that its views keep alive; ``sparse``: of which most may stay untouched for long."""
    return memoryview(_map(size, sparse=sparse))


def most_of(left: int) -> int:
    """What one of several may take of what is left: three quarters, so that whoever comes next finds something."""
    return max(0, 3 * left // 4)


class BufferPool:
    """Scratch buffers, in all never more than ``limit`` bytes, lent to at most ``borrowers`` at once.

    Each borrower is guaranteed one buffer of the size it was admitted with, and beyond that gets `most_of` what the
    others and all guarantees leave; a sole one gets everything. For each borrower that may still come, a buffer of
    ``least`` bytes is set aside, as far as a quarter of the limit goes. Free buffers are shared. Thread-safe.
    """

    def __init__(self, limit: int, *, borrowers: int = 1, least: int = 0) -> None:
        self._limit = limit
        self._sole = borrowers == 1
        self._least = _rounded(least)
        self._aside = 0 if self._sole else min(self._least, limit // 4 // borrowers)
        self._expected = borrowers
        self._borrowers = 0
        self._committed = 0  # of each borrower, what is lent or guaranteed: whichever is more
        self._free: dict[int, list[memoryview]] = defaultdict(list)
        self._total = 0  # bytes of all buffers, lent and free
        self._waiting: deque[_Waiter] = deque()  # of each borrower that waits, the first
        self._lock = threading.Lock()

    @property
    def in_use(self) -> int:
        """Bytes of the buffers that exist, lent or free."""
        return self._total

    def admit(self, size: int) -> Borrower | None:
        """A new borrower, guaranteed one buffer of ``size`` bytes, which is also the most it may ask for at once.

        None when that does not fit, or would leave others too little.
        """
        guarantee = _rounded(size)
        with self._lock:
            aside = self._aside if self._borrowers < self._expected else 0
            spare = self._limit - self._committed - self._set_aside()
            if guarantee > aside + (spare if guarantee <= self._least else self._most_of(spare)):
                return None
            self._borrowers += 1
            self._committed += guarantee
        return Borrower(self, guarantee)

    def _set_aside(self) -> int:
        """Bytes kept for those who may still come."""
        return self._aside * max(0, self._expected - self._borrowers)

    def _most_of(self, left: int) -> int:
        return left if self._sole else most_of(left)

    def _shed(self, wanted: int) -> None:
        """Drop free buffers of other sizes while ``wanted`` bytes do not fit."""
        for size, buffers in self._free.items():
            while buffers and self._total + wanted > self._limit:
                buffers.pop()
                self._total -= size

    def _serve(self) -> None:
        """Hand over what those who wait may have now, in turn."""
        in_vain = 0
        while in_vain < len(self._waiting):
            waiter = self._waiting.popleft()
            if waiter.borrower._serve(waiter):
                in_vain = 0
            else:
                self._waiting.append(waiter)
                in_vain += 1


class Borrower:
    """One borrower's access to a `BufferPool`. Thread-safe. `acquire` waits while it has what it may have."""

    def __init__(self, pool: BufferPool, guarantee: int) -> None:
        self._pool = pool
        self._guarantee = guarantee
        self._lent = 0
        self._waiting: deque[_Waiter] = deque()
        self._closed = False

    @property
    def limit(self) -> int:
        """Bytes that it may have lent in all, as things stand."""
        with self._pool._lock:
            return self._guarantee + self._beyond()

    def acquire(self, size: int) -> memoryview:
        """Borrow a buffer of at least ``size`` bytes; give it back with `release`.

        Raises:
            ClosedError: the borrower was closed meanwhile.
        """
        pool, rounded = self._pool, _rounded(size)
        with pool._lock:
            if self._closed:
                raise ClosedError("the buffer pool is closed")
            if not self._waiting and self._may(rounded):
                buffer = self._take(rounded)
            else:
                buffer = self._wait(rounded)
        return memoryview(_map(rounded)) if buffer is None else buffer

    def release(self, buffer: memoryview) -> None:
        """Return a buffer that nobody holds a view of any more."""
        pool, size = self._pool, buffer.nbytes
        with pool._lock:
            self._account(-size)
            if pool._borrowers:
                pool._free[size].append(buffer)
            else:
                pool._total -= size
            if pool._waiting:
                pool._serve()

    def close(self) -> None:
        """Wake those who wait, and give the guarantee up; what is lent still comes back. Idempotent."""
        pool = self._pool
        with pool._lock:
            if self._closed:
                return
            self._closed = True
            if self._waiting:
                pool._waiting.remove(self._waiting[0])
            for waiter in self._waiting:
                waiter.ready.notify()
            self._waiting.clear()
            pool._borrowers -= 1
            pool._committed -= max(0, self._guarantee - self._lent)
            self._guarantee = 0
            if not pool._borrowers:
                pool._total -= sum(size * len(buffers) for size, buffers in pool._free.items())
                pool._free.clear()
            pool._serve()

    # ---- with the pool's lock held ---------------------------------------------------------------

    def _beyond(self) -> int:
        """What it may have beyond its guarantee."""
        pool = self._pool
        others = pool._committed - max(self._lent, self._guarantee)
        return max(0, pool._most_of(pool._limit - others - pool._set_aside() - self._guarantee))

    def _may(self, size: int) -> bool:
        after = self._lent + size
        return after <= self._guarantee or after - self._guarantee <= self._beyond()

    def _account(self, change: int) -> None:
        before = max(self._lent, self._guarantee)
        self._lent += change
        self._pool._committed += max(self._lent, self._guarantee) - before

    def _take(self, size: int) -> memoryview | None:
        """Count a buffer as lent: a free one, or None for one that is to be made."""
        pool = self._pool
        self._account(size)
        if pool._free[size]:
            return pool._free[size].pop()
        pool._shed(size)
        pool._total += size
        return None

    def _wait(self, size: int) -> memoryview | None:
        waiter = _Waiter(self, size)
        self._waiting.append(waiter)
        if len(self._waiting) == 1:
            self._pool._waiting.append(waiter)
        while not waiter.served:
            waiter.ready.wait()
            if self._closed and not waiter.served:
                raise ClosedError("the buffer pool is closed")
        return waiter.buffer

    def _serve(self, waiter: _Waiter) -> bool:
        """Serve the first who waits if it may have what it wants; the next one takes its place."""
        if not self._may(waiter.size):
            return False
        waiter.buffer = self._take(waiter.size)
        waiter.served = True
        waiter.ready.notify()
        self._waiting.popleft()
        if self._waiting:
            self._pool._waiting.append(self._waiting[0])
        return True


class _Waiter:
    """A thread that waits for a buffer, and what it gets: None for one that it is to make."""

    __slots__ = ("borrower", "buffer", "ready", "served", "size")

    def __init__(self, borrower: Borrower, size: int) -> None:
        self.borrower = borrower
        self.size = size
        self.ready = threading.Condition(borrower._pool._lock)
        self.served = False
        self.buffer: memoryview | None = None


Block: TypeAlias = mmap.mmap | bytearray


class MessageMemory:
    """Blocks for incoming messages, kept for the next message of about the same size.

    The owner serialises all calls and does the accounting.
    """

    def __init__(self) -> None:
        self._kept: list[mmap.mmap] = []
        self._sparse: set[int] = set()  # ids of lent blocks that were made so
        self.kept_bytes = 0

    def lend(
        self, size: int, on_return: Callable[[Block], None], *, promised: int | None = None
    ) -> tuple[memoryview, Block]:
        """A block of ``size`` bytes (at least one), and a view of it.

        With ``promised`` only so many bytes may come for now, and no more memory than that is taken. ``on_return`` gets
        the block when its last view is gone, in whatever thread that happens (also in the garbage collector): it must
        not take a lock, and must have `take_back` called later.
        """
        block: Block
        if promised is not None and size > max(promised, _TAIL):
            block = _map(size, sparse=True)
            self._sparse.add(id(block))
        elif promised is not None or size < _GRAIN:
            # small ones from the heap: the kernel limits how many mappings a process may have
            block = bytearray(size)
        else:
            block = self._take(_rounded(size))
        holder = (ctypes.c_char * size).from_buffer(block)
        weakref.finalize(holder, on_return, block).atexit = False
        return memoryview(holder).cast("B"), block

    def take_back(self, block: Block, *, room: int) -> list[mmap.mmap]:
        """Keep a block that ``on_return`` was given, if all kept ones then fit into ``room`` bytes.

        Returns what goes instead, as `shed` does.
        """
        if isinstance(block, bytearray):
            return []
        if id(block) in self._sparse:
            self._sparse.discard(id(block))
            return [block]
        self._kept.append(block)
        self.kept_bytes += len(block)
        return self.shed(room)

    def shed(self, room: int) -> list[mmap.mmap]:
        """Give up the coldest blocks until ``room`` bytes hold the rest. To unmap them takes long: drop them outside
        of any lock."""
        gone = []
        while self._kept and self.kept_bytes > room:
            gone.append(self._kept.pop(0))
            self.kept_bytes -= len(gone[-1])
        return gone

    def _take(self, wanted: int) -> mmap.mmap:
        for i in range(len(self._kept) - 1, -1, -1):  # the last one returned is still warm
            if wanted <= len(self._kept[i]) <= 2 * wanted:
                block = self._kept.pop(i)
                self.kept_bytes -= len(block)
                return block
        return _map(wanted)
