"""Pools stay inside their limits, and memory comes back when its last view is gone."""

from __future__ import annotations

import gc
import mmap
import threading
from collections.abc import Iterator

import pytest

from amst_core.buffers import BufferPool, MessageMemory
from amst_core.errors import ClosedError

KIB = 1024


def test_a_buffer_is_used_again() -> None:
    pool = BufferPool(1 << 20)
    first = pool.acquire(100 * KIB)
    assert first.nbytes >= 100 * KIB
    pool.release(first)
    assert pool.acquire(100 * KIB) is first


def test_a_chunk_with_its_tag_fits_the_class_of_the_chunk() -> None:
    pool = BufferPool(1 << 20)
    plain = pool.acquire(256 * KIB)
    pool.release(plain)
    assert pool.acquire(256 * KIB + 16) is plain


def test_the_limit_holds_and_whoever_waits_gets_what_is_released() -> None:
    pool = BufferPool(300 * KIB)
    held = [pool.acquire(100 * KIB), pool.acquire(100 * KIB)]
    got: list[memoryview] = []
    waiting = threading.Thread(target=lambda: got.append(pool.acquire(100 * KIB)))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive(), "a third buffer would pass the limit"
    assert pool.in_use <= 300 * KIB
    pool.release(held.pop())
    waiting.join(10)
    assert len(got) == 1
    assert pool.in_use <= 300 * KIB


def test_free_buffers_of_another_size_make_room() -> None:
    pool = BufferPool(300 * KIB)
    pool.release(pool.acquire(200 * KIB))
    pool.acquire(64 * KIB)
    pool.acquire(100 * KIB)
    assert pool.in_use <= 300 * KIB


def test_one_buffer_larger_than_the_limit_is_lent_rather_than_waited_for() -> None:
    assert BufferPool(64 * KIB).acquire(1 << 20).nbytes >= 1 << 20


def test_closing_wakes_those_who_wait() -> None:
    pool = BufferPool(70 * KIB)
    pool.acquire(64 * KIB)
    failed: list[BaseException] = []

    def wait() -> None:
        try:
            pool.acquire(64 * KIB)
        except ClosedError as err:
            failed.append(err)

    thread = threading.Thread(target=wait)
    thread.start()
    pool.close()
    thread.join(10)
    assert len(failed) == 1


@pytest.fixture
def returned() -> Iterator[list[mmap.mmap]]:
    blocks: list[mmap.mmap] = []
    yield blocks


def test_a_block_returns_when_the_last_view_is_gone(returned: list[mmap.mmap]) -> None:
    memory = MessageMemory(returned.append)
    view, key = memory.lend(100_000)
    assert view.nbytes == 100_000 and view.format == "B" and not view.readonly
    view[5:10] = b"12345"
    part = view[5:10]
    del view
    gc.collect()
    assert not returned, "a slice still holds it"
    assert bytes(part) == b"12345"
    del part
    gc.collect()
    assert [id(block) for block in returned] == [key]


def lend_and_drop(memory: MessageMemory, size: int) -> int:
    """The id of the block that served."""
    return memory.lend(size)[1]


def test_a_returned_block_is_lent_again(returned: list[mmap.mmap]) -> None:
    memory = MessageMemory(returned.append)
    key = lend_and_drop(memory, 100_000)
    memory.take_back(returned.pop(), room=1 << 20)
    assert lend_and_drop(memory, 100_000) == key


@pytest.mark.parametrize("shed_later", [False, True])
def test_a_returned_block_is_dropped_when_there_is_no_room(returned: list[mmap.mmap], shed_later: bool) -> None:
    memory = MessageMemory(returned.append)
    lend_and_drop(memory, 100_000)
    block = returned.pop()
    block[:4] = b"used"
    memory.take_back(block, room=1 << 20 if shed_later else 1000)
    del block
    if shed_later:
        memory.shed(0)
    view, _ = memory.lend(100_000)
    assert bytes(view[:4]) == bytes(4), "fresh memory, not the block that had to go"


def test_a_much_larger_block_is_not_wasted_on_a_small_message(returned: list[mmap.mmap]) -> None:
    memory = MessageMemory(returned.append)
    large = lend_and_drop(memory, 4 << 20)
    memory.take_back(returned.pop(), room=8 << 20)
    assert lend_and_drop(memory, 100_000) != large
