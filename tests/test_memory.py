"""One budget for many sessions: never passed, and never all with those who came first."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from amst_core.errors import BusyError
from amst_core.memory import OVERHEAD, MemoryBudget, MemoryShare

KIB = 1 << 10
MIB = 1 << 20


def budget(
    total: int = 192 * MIB, *, max_message: int = 64 * MIB, max_open: int = 256, sessions: int = 64, **more: int
) -> MemoryBudget:
    """By default as a server has it with default settings."""
    return MemoryBudget(total, max_message=max_message, max_open=max_open, sessions=sessions, **more)


def hold_all(share: MemoryShare, *, size: int = MIB) -> list[memoryview]:
    """Lend messages of ``size``, each in a channel of its own, as long as they are granted."""
    held = []
    while share.grant(size + OVERHEAD, channel=0):
        held.append(share.lend(size, granted=size + OVERHEAD)[0])
    return held


def take_back_all(share: MemoryShare) -> None:
    while (block := share.pop_returned()) is not None:
        share.take_back(block)


# ---- admission -----------------------------------------------------------------------------------


def test_with_default_settings_every_session_is_admitted_and_the_budget_holds() -> None:
    memory = budget()
    shares = [memory.share() for _ in range(64)]
    assert (shares[0].max_chunk, shares[0].max_open, shares[0].initial_credit) == (4 * MIB, 256, 64 * KIB)
    assert all(share.max_open == 256 and share.initial_credit >= KIB for share in shares)
    assert {share.max_chunk for share in shares} == {4 * MIB, MIB, 256 * KIB, 64 * KIB}
    assert memory.in_use == sum(share.max_open * share.initial_credit for share in shares) <= 192 * MIB


def test_every_session_is_admitted_however_much_the_others_hold() -> None:
    memory = budget()
    held: list[Any] = []
    for _ in range(64):
        share = memory.share()
        held.append(hold_all(share))
        while share.reserve_copy(MIB):
            pass
        for pool in (share.send_pool, share.receive_pool):
            while pool._may(share.max_chunk + 4096):
                held.append(pool.acquire(share.max_chunk + 16))
        assert memory.in_use <= 192 * MIB


def test_a_sole_session_gets_everything() -> None:
    memory = budget(sessions=1)
    share = memory.share()
    assert share.send_pool.limit == share.receive_pool.limit == 32 * MIB
    assert (share.max_chunk, share.max_open, share.initial_credit) == (4 * MIB, 256, 64 * KIB)
    assert len(hold_all(share)) == 95
    with pytest.raises(BusyError):
        memory.share()


def test_the_first_of_many_sessions_is_not_much_worse_off() -> None:
    share = budget().share()
    assert share.send_pool.limit >= 20 * MIB and share.receive_pool.limit >= 20 * MIB
    assert len(hold_all(share)) == 71


@pytest.mark.parametrize("sessions", [1, 64, 65536])
@pytest.mark.parametrize("max_open", [1, 256, 4096])
@pytest.mark.parametrize("total", [32 * MIB, 192 * MIB])
@pytest.mark.parametrize("chunk", [16 * KIB, 4 * MIB])
def test_whatever_the_settings_are_the_first_session_can_work(
    total: int, max_open: int, sessions: int, chunk: int
) -> None:
    memory = budget(total, max_message=total // 2, max_open=max_open, sessions=sessions, chunk_size=chunk)
    share = memory.share()
    assert share.max_open >= min(max_open, 8) and share.initial_credit >= KIB
    buffers = [pool.acquire(share.max_chunk + 16) for pool in (share.send_pool, share.receive_pool)]
    assert share.grant(total // 2 + OVERHEAD, channel=0), "the longest message fits"
    assert memory.in_use <= total
    del buffers


def test_chunks_as_long_as_is_wished_where_there_is_room() -> None:
    assert budget(chunk_size=4 * MIB).share().max_chunk == 4 * MIB
    assert budget(chunk_size=16 * KIB).share().max_chunk == 4 * MIB, "the peer may like them longer"
    assert budget(32 * MIB, max_message=16 * MIB, chunk_size=4 * MIB, sessions=1).share().max_chunk == 4 * MIB
    assert budget(32 * MIB, max_message=16 * MIB, chunk_size=4 * MIB, sessions=2).share().max_chunk == MIB


def test_one_for_whom_too_little_is_left_is_refused_until_another_ends() -> None:
    memory = budget(32 * MIB, max_message=16 * MIB)
    shares = []
    with pytest.raises(BusyError, match=r"limits\.memory"):
        while True:
            shares.append(memory.share())
    assert len(shares) > 1
    shares.pop(0).close()
    memory.share()


# ---- messages ------------------------------------------------------------------------------------


def test_the_longest_message_fits_whatever_is_promised_and_copied() -> None:
    memory = budget()
    shares = [memory.share() for _ in range(64)]
    for share in shares:
        while share.reserve_copy(MIB):
            pass
    assert shares[-1].grant(64 * MIB + OVERHEAD, channel=0)
    assert memory.in_use <= 192 * MIB


def test_a_channel_gets_half_of_what_the_session_may_have() -> None:
    share = budget(sessions=1).share()
    channel = 0
    while share.grant(MIB, channel=channel):
        channel += MIB
    assert channel == 48 * MIB
    assert share.grant(MIB, channel=0), "another channel goes on"


def test_one_long_message_is_granted_to_a_channel_that_has_nothing() -> None:
    share = budget(sessions=1).share()
    assert share.grant(64 * MIB + OVERHEAD, channel=0)
    assert not share.grant(64 * MIB + OVERHEAD, channel=0), "two do not fit"


def test_who_was_denied_is_told_once_when_enough_has_come_back() -> None:
    memory = budget()
    greedy, other = memory.share(), memory.share()
    told: list[int] = []
    other.on_room = lambda: told.append(1)
    held = hold_all(greedy)
    assert not other.grant(40 * MIB, channel=0)
    for _ in range(10):
        del held[-1]
        gc.collect()
        take_back_all(greedy)
    assert not told, "too little, and who would only ask again is not woken"
    held.clear()
    take_back_all(greedy)
    assert told == [1] and other.has_news and other.room_came
    assert other.grant(40 * MIB, channel=0)


@pytest.mark.parametrize("comes_back", ["copy", "ungrant", "close", "message of a closed session"])
def test_whatever_comes_back_wakes_who_waits(comes_back: str) -> None:
    memory = budget(max_message=4 * MIB)
    first, other = memory.share(), memory.share()
    told = threading.Event()
    other.on_room = told.set
    held: list[memoryview] = []
    if comes_back == "copy":
        assert first.reserve_copy(30 * MIB)
    elif comes_back == "ungrant":
        assert first.grant(70 * MIB, channel=0)
    else:
        assert first.grant(70 * MIB, channel=0)
        held.append(first.lend(70 * MIB - OVERHEAD, granted=70 * MIB)[0])
    wanted = memory._left(other) + 18 * MIB
    assert not other.grant(wanted, channel=0)
    match comes_back:
        case "copy":
            first.release_copy(30 * MIB)
        case "ungrant":
            first.ungrant(70 * MIB)
        case "close":
            held.clear()
            first.close()
        case _:
            first.close()
            assert not told.is_set()
            held.clear()
    assert told.is_set()
    assert other.grant(wanted, channel=0)


def test_what_waits_for_its_own_session_only_is_not_woken_by_others() -> None:
    memory = budget()
    first, other = memory.share(), memory.share()
    told: list[int] = []
    other.on_room = lambda: told.append(1)
    assert other.grant(60 * MIB, channel=0)
    assert first.grant(10 * MIB, channel=0)
    assert not other.grant(40 * MIB, channel=0), "with what it has, no session could"
    first.ungrant(10 * MIB)
    assert not told


def test_blocks_kept_for_the_next_message_count_and_yield() -> None:
    memory = budget()
    first, other = memory.share(), memory.share()
    promised = memory.in_use
    held = hold_all(first, size=4 * MIB)
    assert memory.in_use > promised + 40 * MIB
    held.clear()
    take_back_all(first)
    assert first.granted == 0
    kept = memory.in_use - promised
    assert kept > 40 * MIB, "they are kept"
    assert other.grant(64 * MIB + OVERHEAD, channel=0)
    assert memory.in_use <= 192 * MIB
    assert memory.in_use - promised < kept + 64 * MIB, "and some went for it"


def test_a_message_in_a_longer_block_counts_as_much_as_the_block() -> None:
    memory = budget(sessions=1)
    share = memory.share()
    promised = memory.in_use
    share.grant(8 * MIB, channel=0)
    share.lend(8 * MIB - OVERHEAD, granted=8 * MIB)
    take_back_all(share)
    kept = memory.in_use - promised
    cost = 5 * MIB + OVERHEAD
    share.grant(cost, channel=0)
    view, _ = share.lend(5 * MIB, granted=cost)
    assert share.granted == memory.in_use - promised == kept
    del view
    take_back_all(share)
    assert share.granted == 0 and memory.in_use - promised == kept


def test_a_message_that_is_not_granted_is_covered_by_its_credit() -> None:
    memory = budget(sessions=1)
    share = memory.share()
    before = memory.in_use
    view, block = share.lend(32 * MIB, granted=None)
    assert memory.in_use == before
    assert share.grant(32 * MIB + OVERHEAD, channel=0, block=block)
    assert memory.in_use == before + 32 * MIB + OVERHEAD
    del view
    take_back_all(share)
    assert memory.in_use == before


# ---- copies --------------------------------------------------------------------------------------


def test_copies_leave_room_for_those_of_others() -> None:
    memory = budget()
    for _ in range(3):
        share = memory.share()
        assert share.reserve_copy(256 * KIB)
        while share.reserve_copy(MIB):
            pass
    assert memory.share().reserve_copy(256 * KIB)


def test_a_copy_that_is_too_long_is_denied() -> None:
    share = budget().share()
    assert not share.reserve_copy(64 * MIB)
    assert share.reserve_copy(16 * MIB)
    share.release_copy(16 * MIB)
    assert share.copied == 0


# ---- the end -------------------------------------------------------------------------------------


def test_when_all_have_ended_nothing_is_in_use() -> None:
    memory = budget()
    shares = [memory.share() for _ in range(5)]
    held = []
    for share in shares:
        held += hold_all(share)[:3]
        share.grant(OVERHEAD, channel=0)  # an empty message, which gets no block
        share.reserve_copy(MIB)
        share.send_pool.release(share.send_pool.acquire(MIB))
    take_back_all(shares[0])
    for share in shares:
        share.close()
        share.close()  # again: nothing
        share.ungrant(OVERHEAD)  # what its owner does too late
        share.release_copy(MIB)
        assert not share.grant(1, channel=0) and not share.reserve_copy(1)
    assert memory.in_use == sum(len(view) + OVERHEAD for view in held), "what the application holds counts"
    held.clear()
    assert memory.in_use == 0


class Sessions(RuleBasedStateMachine):
    """Sessions that come, take what they can get, and go."""

    @initialize(
        total=st.sampled_from([32 * MIB, 48 * MIB, 192 * MIB]),
        sessions=st.sampled_from([1, 2, 5, 64]),
        max_open=st.sampled_from([1, 16, 256, 4096]),
        share=st.integers(2, 64),
    )
    def begin(self, total: int, sessions: int, max_open: int, share: int) -> None:
        self.total, self.longest = total, total // share
        self.memory = budget(total, max_message=self.longest, max_open=max_open, sessions=sessions)
        self.sessions = sessions
        self.shares: list[MemoryShare] = []
        self.views: list[memoryview] = []
        self.copies: list[tuple[MemoryShare, int]] = []
        self.buffers: list[tuple[Any, memoryview]] = []

    def one(self, which: int) -> MemoryShare | None:
        return self.shares[which % len(self.shares)] if self.shares else None

    @rule()
    def come(self) -> None:
        if len(self.shares) < self.sessions:
            try:
                self.shares.append(self.memory.share())
            except BusyError:
                assert self.shares or self.views, "the first one is always admitted"

    @rule(which=st.integers(0), size=st.integers(1, 96 * MIB), prefix=st.booleans(), channel=st.integers(0, 2 * MIB))
    def message(self, which: int, size: int, prefix: bool, channel: int) -> None:
        share, size = self.one(which), min(size, self.longest)
        if share is None:
            return
        cost = size + OVERHEAD
        if prefix:
            view, block = share.lend(size, granted=None)
            share.grant(cost, channel=channel, block=block)
            self.views.append(view)
        elif share.grant(cost, channel=channel):
            self.views.append(share.lend(size, granted=cost)[0])

    @rule(which=st.integers(0))
    def drop(self, which: int) -> None:
        if self.views:
            self.views.pop(which % len(self.views))
            for share in self.shares:
                take_back_all(share)

    @rule(which=st.integers(0), size=st.integers(1, 96 * MIB))
    def copy(self, which: int, size: int) -> None:
        share = self.one(which)
        if share is not None and share.reserve_copy(size):
            self.copies.append((share, size))

    @rule(which=st.integers(0))
    def copied(self, which: int) -> None:
        if self.copies:
            share, size = self.copies.pop(which % len(self.copies))
            share.release_copy(size)

    @rule(which=st.integers(0), part=st.integers(1, 16), direction=st.booleans(), many=st.integers(1, 8))
    def acquire(self, which: int, part: int, direction: bool, many: int) -> None:
        share = self.one(which)
        if share is None:
            return
        pool, size = share.send_pool if direction else share.receive_pool, share.max_chunk // part + 16
        for _ in range(many):
            if pool._may(size + 64 * KIB + 4096):  # else it would wait
                self.buffers.append((pool, pool.acquire(size)))

    @rule(which=st.integers(0))
    def release(self, which: int) -> None:
        if self.buffers:
            pool, buffer = self.buffers.pop(which % len(self.buffers))
            pool.release(buffer)

    @rule(which=st.integers(0))
    def go(self, which: int) -> None:
        share = self.one(which)
        if share is not None:
            self.shares.remove(share)
            for pool, buffer in [b for b in self.buffers if b[0] in (share.send_pool, share.receive_pool)]:
                self.buffers.remove((pool, buffer))
                pool.release(buffer)
            share.close()

    @invariant()
    def the_budget_holds(self) -> None:
        if hasattr(self, "memory"):
            assert self.memory.in_use <= self.total

    @invariant()
    def each_may_have_a_chunk(self) -> None:
        for share in getattr(self, "shares", ()):
            for pool in (share.send_pool, share.receive_pool):
                if not any(b[0] is pool for b in self.buffers):
                    assert pool._may(share.max_chunk + 4096)

    def teardown(self) -> None:
        if not hasattr(self, "memory"):
            return
        self.views.clear()
        for share, size in self.copies:
            share.release_copy(size)
        while self.shares:
            self.go(0)
        assert self.memory.in_use == 0
        assert self.memory.share().grant(self.longest + OVERHEAD, channel=0)


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
