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
from contextlib import suppress
from typing import Final, TypeAlias

from .errors import ClosedError

_GRAIN: Final = 64 << 10
_HUGE_PAGE: Final = 2 << 20
_TAIL: Final = 4096
"""Sizes are rounded to grains plus a tail, so that a chunk with its tag fits the chunk's own class."""


def _rounded(size: int) -> int:
    return max(1, -(-(size - _TAIL) // _GRAIN)) * _GRAIN + _TAIL


def _map(size: int) -> mmap.mmap:
    """Anonymous memory, by huge pages where the kernel has them: touching it then costs 512 times fewer faults.

    Private, because mmap's default here is shared, which gets none.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


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
        return memoryview(_map(rounded))

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


Block: TypeAlias = mmap.mmap | bytearray


class MessageMemory:
    """Blocks for incoming messages, kept for the next message of about the same size.

    The owner serialises all calls and does the accounting. ``on_return`` gets a block when its last view is
    gone, in whatever thread that happens (also in the garbage collector): it must not take a lock, and must
    have `take_back` called later.
    """

    def __init__(self, on_return: Callable[[Block], None]) -> None:
        self._kept: list[mmap.mmap] = []
        self._kept_bytes = 0
        self._on_return = on_return

    def lend(self, size: int) -> tuple[memoryview, int]:
        """A block of ``size`` bytes (at least one), and the ``id`` of the block that will be returned."""
        # small ones from the heap: the kernel limits how many mappings a process may have
        block = bytearray(size) if size < _GRAIN else self._take(_rounded(size))
        holder = (ctypes.c_char * size).from_buffer(block)
        weakref.finalize(holder, self._on_return, block).atexit = False
        return memoryview(holder).cast("B"), id(block)

    def take_back(self, block: Block, *, room: int) -> None:
        """Keep a block that ``on_return`` was given, if all kept ones then fit into ``room`` bytes."""
        if isinstance(block, bytearray):
            return
        self._kept.append(block)
        self._kept_bytes += len(block)
        self.shed(room)

    def shed(self, room: int) -> None:
        """Let the coldest blocks go until ``room`` bytes hold the rest."""
        while self._kept and self._kept_bytes > room:
            self._kept_bytes -= len(self._kept.pop(0))

    def _take(self, wanted: int) -> mmap.mmap:
        for i in range(len(self._kept) - 1, -1, -1):  # the last one returned is still warm
            if wanted <= len(self._kept[i]) <= 2 * wanted:
                block = self._kept.pop(i)
                self._kept_bytes -= len(block)
                return block
        return _map(wanted)
