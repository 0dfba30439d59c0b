"""Memory that is used again: fresh anonymous memory is slow to touch, and what is counted can be bounded.

`BufferPool` lends scratch space for one chunk at a time. `MessageMemory` lends blocks for whole messages,
which the application holds as memoryviews; a block returns by itself when its last view is gone.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Final

from .errors import ClosedError

_GRAIN: Final = 64 << 10
_TAIL: Final = 4096
"""Sizes are rounded to grains plus a tail, so that a chunk with its tag fits the chunk's own class."""


def _rounded(size: int) -> int:
    return max(1, -(-(size - _TAIL) // _GRAIN)) * _GRAIN + _TAIL


class BufferPool:
    """Scratch buffers, in all never more than ``limit`` bytes (or one buffer, if that is larger).

    Thread-safe. `acquire` waits while the limit is reached.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._free: dict[int, list[memoryview]] = defaultdict(list)
        self._total = 0  # bytes of all buffers, lent and free
        self._lent = 0
        self._closed = False
        self._room = threading.Condition()

    @property
    def in_use(self) -> int:
        """Bytes of the buffers that exist, lent or free."""
        return self._total

    def acquire(self, size: int) -> memoryview:
        """Borrow a buffer of at least ``size`` bytes; give it back with `release`.

        Raises:
            ClosedError: the pool was closed meanwhile.
        """
        rounded = _rounded(size)
        with self._room:
            while True:
                if self._closed:
                    raise ClosedError("the buffer pool is closed")
                if self._free[rounded]:
                    self._lent += 1
                    return self._free[rounded].pop()
                self._shed(rounded)
                if self._total + rounded <= self._limit or not self._lent:
                    self._total += rounded
                    self._lent += 1
                    break
                self._room.wait()
        return memoryview(mmap.mmap(-1, rounded))

    def release(self, buffer: memoryview) -> None:
        """Return a buffer that nobody holds a view of any more."""
        with self._room:
            self._lent -= 1
            self._free[buffer.nbytes].append(buffer)
            self._room.notify()

    def close(self) -> None:
        """Drop the free buffers and wake those who wait. Idempotent."""
        with self._room:
            self._closed = True
            self._free.clear()
            self._room.notify_all()

    def _shed(self, wanted: int) -> None:
        """Drop free buffers of other sizes while ``wanted`` bytes do not fit."""
        for size, buffers in self._free.items():
            while buffers and self._total + wanted > self._limit:
                buffers.pop()
                self._total -= size


class MessageMemory:
    """Blocks for incoming messages, kept for the next message of about the same size.

    ``budget`` bounds what is charged; the owner serialises all calls. ``on_return`` gets a block when its
    last view is gone, in whatever thread that happens (also in the garbage collector): it must not take a
    lock, and must have `take_back` called later.
    """

    def __init__(self, budget: int, on_return: Callable[[mmap.mmap], None]) -> None:
        self.budget = budget
        self.charged = 0
        self._charges: dict[int, int] = {}  # id of a lent block → what it counts
        self._kept: list[mmap.mmap] = []
        self._kept_bytes = 0
        self._on_return = on_return

    def fits(self, size: int) -> bool:
        """``size`` more bytes may be charged. One message always may, however large."""
        return not self.charged or self.charged + size <= self.budget

    def lend(self, size: int, *, charge: int) -> tuple[memoryview, int]:
        """A block of ``size`` bytes and its key for `recharge`; ``charge`` bytes count until it returns."""
        if not size:
            return memoryview(bytearray()), 0
        block = self._take(size)
        self.charged += charge
        self._charges[id(block)] = charge
        holder = (ctypes.c_char * size).from_buffer(block)
        weakref.finalize(holder, self._on_return, block).atexit = False
        return memoryview(holder).cast("B"), id(block)

    def recharge(self, key: int, charge: int) -> None:
        """A lent block now counts ``charge`` bytes."""
        self.charged += charge - self._charges[key]
        self._charges[key] = charge

    def take_back(self, block: mmap.mmap) -> None:
        """Account for a block that ``on_return`` was given."""
        self.charged -= self._charges.pop(id(block))
        if self.charged + self._kept_bytes + len(block) <= self.budget:
            self._kept.append(block)
            self._kept_bytes += len(block)

    def _take(self, size: int) -> mmap.mmap:
        wanted = _rounded(size)
        for i in range(len(self._kept) - 1, -1, -1):  # the last one returned is still warm
            if wanted <= len(self._kept[i]) <= 2 * wanted:
                block = self._kept.pop(i)
                self._kept_bytes -= len(block)
                return block
        while self._kept and self.charged + self._kept_bytes + wanted > self.budget:
            self._kept_bytes -= len(self._kept.pop(0))
        return mmap.mmap(-1, wanted)
