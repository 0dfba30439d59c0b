"""Pools stay inside their limits, and memory comes back when its last view is gone."""

from __future__ import annotations

import gc
import mmap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from amst_core.buffers import Borrower, BufferPool, MessageMemory
from amst_core.errors import ClosedError

KIB = 1024
CLASS = 64 * KIB + 4096
"""Bytes of a buffer for a chunk of 64 KiB."""


def sole(limit: int, size: int = 64 * KIB) -> Borrower:
    borrower = BufferPool(limit).admit(size)
    assert borrower is not None
    return borrower


def waits(borrower: Borrower, size: int) -> tuple[threading.Thread, list[memoryview]]:
    """A thread that wants a buffer and does not get it, and where it will be."""
    got: list[memoryview] = []
    thread = threading.Thread(target=lambda: got.append(borrower.acquire(size)), daemon=True)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive(), "it is to wait"
    return thread, got


def test_a_buffer_is_used_again() -> None:
    pool = sole(1 << 20)
    first = pool.acquire(100 * KIB)
    assert first.nbytes >= 100 * KIB
    pool.release(first)
    assert pool.acquire(100 * KIB) is first


def test_a_chunk_with_its_tag_fits_the_class_of_the_chunk() -> None:
    pool = sole(1 << 20)
    plain = pool.acquire(256 * KIB)
    pool.release(plain)
    assert pool.acquire(256 * KIB + 16) is plain


def test_the_limit_holds_and_whoever_waits_gets_what_is_released() -> None:
    pool = BufferPool(300 * KIB)
    borrower = pool.admit(100 * KIB)
    assert borrower is not None
    held = [borrower.acquire(100 * KIB), borrower.acquire(100 * KIB)]
    waiting, got = waits(borrower, 100 * KIB)
    assert pool.in_use <= 300 * KIB
    borrower.release(held.pop())
    waiting.join(10)
    assert len(got) == 1
    assert pool.in_use <= 300 * KIB


def test_those_who_wait_are_served_in_turn() -> None:
    borrower = sole(140 * KIB)
    held = [borrower.acquire(64 * KIB), borrower.acquire(64 * KIB)]
    waiting = [waits(borrower, 64 * KIB) for _ in range(4)]
    for thread, got in waiting:
        assert not got
        borrower.release(held.pop(0))
        thread.join(10)
        held += got
    assert len(held) == 2


def test_free_buffers_of_another_size_make_room() -> None:
    pool = BufferPool(300 * KIB)
    borrower = pool.admit(200 * KIB)
    assert borrower is not None
    borrower.release(borrower.acquire(200 * KIB))
    borrower.acquire(64 * KIB)
    borrower.acquire(100 * KIB)
    assert pool.in_use <= 300 * KIB


def test_closing_wakes_those_who_wait() -> None:
    borrower = sole(70 * KIB)
    borrower.acquire(64 * KIB)
    failed: list[BaseException] = []

    def wait() -> None:
        try:
            borrower.acquire(64 * KIB)
        except ClosedError as err:
            failed.append(err)

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    borrower.close()
    for thread in threads:
        thread.join(10)
    assert len(failed) == 3
    borrower.close()  # again: nothing
    with pytest.raises(ClosedError):
        borrower.acquire(1)


def test_a_sole_borrower_may_have_everything() -> None:
    assert sole(10 * CLASS).limit == 10 * CLASS


def test_each_borrower_gets_its_guarantee_whatever_the_others_hold() -> None:
    pool = BufferPool(4 << 20, borrowers=8, least=64 * KIB)
    borrowers = []
    for _ in range(8):
        borrower = pool.admit(64 * KIB)
        assert borrower is not None
        borrowers.append(borrower)
        while borrower._may(CLASS):
            borrower.acquire(64 * KIB)  # all that it can have
        assert pool.in_use <= 4 << 20
    assert pool.in_use > 2 << 20, "they do use what there is"


def test_more_borrowers_than_expected_come_only_while_there_is_room() -> None:
    pool = BufferPool(300 * KIB, borrowers=2, least=64 * KIB)
    admitted = [pool.admit(64 * KIB) for _ in range(10)]
    assert [b is not None for b in admitted] == [True] * 4 + [False] * 6
    first = admitted[0]
    assert first is not None
    first.close()
    assert pool.admit(64 * KIB) is not None


def test_a_long_guarantee_is_not_given_where_it_leaves_others_too_little() -> None:
    pool = BufferPool(1 << 20, borrowers=4, least=64 * KIB)
    assert pool.admit(1 << 20) is None
    assert pool.admit(512 * KIB) is not None
    assert pool.admit(512 * KIB) is None
    for _ in range(3):
        assert pool.admit(64 * KIB) is not None


def test_what_one_releases_serves_another_that_waits() -> None:
    pool = BufferPool(20 * CLASS, borrowers=2, least=64 * KIB)
    greedy, other = pool.admit(64 * KIB), pool.admit(64 * KIB)
    assert greedy is not None and other is not None
    held = []
    while greedy._may(CLASS):
        held.append(greedy.acquire(64 * KIB))
    own = []
    while other._may(CLASS):
        own.append(other.acquire(64 * KIB))
    assert own
    waiting, got = waits(other, 64 * KIB)
    for buffer in held:
        greedy.release(buffer)
    waiting.join(10)
    assert len(got) == 1


def test_when_the_last_borrower_is_gone_nothing_is_kept() -> None:
    pool = BufferPool(1 << 20, borrowers=2)
    one, two = pool.admit(64 * KIB), pool.admit(64 * KIB)
    assert one is not None and two is not None
    held = one.acquire(64 * KIB)
    two.release(two.acquire(100 * KIB))
    two.close()
    one.close()
    assert pool.in_use == held.nbytes, "what is lent counts until it is back"
    one.release(held)
    assert pool.in_use == 0


# ---- messages ----------------------------------------------------------------------------------


@pytest.fixture
def returned() -> Iterator[list[mmap.mmap]]:
    blocks: list[mmap.mmap] = []
    yield blocks


def test_a_block_returns_when_the_last_view_is_gone(returned: list[mmap.mmap]) -> None:
    memory = MessageMemory()
    view, block = memory.lend(100_000, returned.append)
    assert view.nbytes == 100_000 and view.format == "B" and not view.readonly
    view[5:10] = b"12345"
    part = view[5:10]
    del view
    gc.collect()
    assert not returned, "a slice still holds it"
    assert bytes(part) == b"12345"
    del part
    gc.collect()
    assert [id(came) for came in returned] == [id(block)]


def lend_and_drop(memory: MessageMemory, size: int, returned: list[mmap.mmap]) -> int:
    """The id of the block that served."""
    return id(memory.lend(size, returned.append)[1])


def test_a_returned_block_is_lent_again(returned: list[mmap.mmap]) -> None:
    memory = MessageMemory()
    key = lend_and_drop(memory, 100_000, returned)
    memory.take_back(returned.pop(), room=1 << 20)
    assert lend_and_drop(memory, 100_000, returned) == key


@pytest.mark.parametrize("shed_later", [False, True])
def test_a_returned_block_is_dropped_when_there_is_no_room(returned: list[mmap.mmap], shed_later: bool) -> None:
    memory = MessageMemory()
    lend_and_drop(memory, 100_000, returned)
    block = returned.pop()
    block[:4] = b"used"
    memory.take_back(block, room=1 << 20 if shed_later else 1000)
    del block
    if shed_later:
        memory.shed(0)
    view, _ = memory.lend(100_000, returned.append)
    assert bytes(view[:4]) == bytes(4), "fresh memory, not the block that had to go"


def test_a_much_larger_block_is_not_wasted_on_a_small_message(returned: list[mmap.mmap]) -> None:
    memory = MessageMemory()
    large = lend_and_drop(memory, 4 << 20, returned)
    memory.take_back(returned.pop(), room=8 << 20)
    assert lend_and_drop(memory, 100_000, returned) != large


def test_what_is_not_granted_yet_gets_no_memory_that_was_used_before(returned: list[mmap.mmap]) -> None:
    memory = MessageMemory()
    key = lend_and_drop(memory, 4 << 20, returned)
    memory.take_back(returned.pop(), room=8 << 20)
    assert lend_and_drop(memory, 4 << 20, returned) == key
    memory.take_back(returned.pop(), room=8 << 20)
    view, block = memory.lend(4 << 20, returned.append, promised=64 * KIB)
    assert id(block) != key and memory.kept_bytes > 0
    del view
    assert memory.take_back(returned.pop(), room=1 << 30) == [block], "nor is its own kept"


@pytest.mark.parametrize("size", [1, 4096, 5000, 64 * KIB, 64 * KIB + 1, 32 << 20])
def test_what_is_not_granted_yet_costs_no_more_than_what_comes(returned: list[mmap.mmap], size: int) -> None:
    memory = MessageMemory()
    lent = [memory.lend(size, returned.append, promised=64 * KIB)[0] for _ in range(20)]
    before = resident()
    for view in lent:
        view[: min(size, 64 * KIB)] = bytes(min(size, 64 * KIB))
    assert resident() - before <= 20 * (64 * KIB + 8192) + (1 << 20)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
