"""A hypothesis state machine drives two engines through any order of delivery, loss, damage and lane death."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from amst_core.engine import Chunk, Engine, Limits, Placement, Verdict
from amst_core.engine.events import (
    SourceDrained,
    TransferDone,
    TransferDropped,
    TransferOffered,
    TransferWhole,
)
from amst_core.wire import messages as m

LIMITS = Limits(max_chunk=7, max_open=4, initial_credit=5)


@dataclass
class OnLane:
    """A chunk as it travels: its bytes are copied when it is read from the source."""

    chunk: Chunk
    data: bytes


class Side:
    """One engine with sources and sinks of plain bytes: what a session does, without I/O."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.engine = Engine(local=LIMITS, peer=LIMITS)
        self.engine.chunk_size = 7
        self.sources: dict[int, bytearray] = {}
        self.open_ended: set[int] = set()
        self.done: dict[int, str] = {}
        self.sinks: dict[int, bytearray] = {}
        self.received: dict[int, bytes] = {}
        self.dropped: set[int] = set()
        self.offers = 0
        self.refuse_next = False
        self.filled: dict[int, list[tuple[int, int]]] = {}

    def open(self, data: bytes, *, known: bool) -> int:
        size = len(data) if known else None
        tid = self.engine.open(m.MESSAGE if known else m.PIPE, size=size, flow="f")
        self.sources[tid] = bytearray(data)
        if not known:
            self.open_ended.add(tid)
        return tid

    def work(self) -> None:
        for event in self.engine.events():
            match event:
                case TransferOffered(opened):
                    self.offers += 1
                    assert opened.transfer == self.offers, "offered out of order"
                    if self.refuse_next:
                        self.refuse_next = False
                        self.engine.refuse(opened.transfer, "refused", "no")
                        continue
                    self.sinks[opened.transfer] = bytearray(200)
                    self.engine.accept(opened.transfer, window=11)
                case TransferWhole(tid, total):
                    assert tid not in self.received, "whole twice"
                    self.received[tid] = bytes(self.sinks[tid][:total])
                    self.engine.finish(tid)
                case TransferDropped(tid):
                    self.dropped.add(tid)
                case SourceDrained(tid):
                    self.engine.end(tid)
                case TransferDone(tid, kind):
                    assert tid not in self.done, "done twice"
                    self.done[tid] = kind

    def store(self, placement: Placement, data: bytes) -> None:
        spans = self.filled.setdefault(placement.transfer, [])
        assert all(e <= placement.start or placement.end <= s for s, e in spans), "a held span was written again"
        self.sinks[placement.transfer][placement.start : placement.end] = data


class TwoEngines(RuleBasedStateMachine):
    """Lanes and control channels are queues between two sides; rules choose what moves, dies or breaks."""


    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.sides = (Side("a"), Side("b"))
        self.control: tuple[deque[m.Message], deque[m.Message]] = (deque(), deque())  # towards side i
        self.lanes: set[int] = set()
        self.next_lane = 0
        self.in_air: list[tuple[int, int, OnLane]] = []  # (to side, lane, chunk)
        self.receiving: list[tuple[int, int, Placement, bytes]] = []  # (side, lane, placement, data)
        self.reading: list[tuple[int, int, Chunk]] = []
        self.expected: dict[tuple[int, int], bytes] = {}
        self.cancelled: set[tuple[int, int]] = set()
        self.dying: list[tuple[int, int]] = []  # (side, lane): dead, and that side does not know yet
        for _ in range(3):
            self.join_lane()
        self.open(0, bytes(range(40)), True)  # something to do from the first step on
        self.control_moves(0, False, 1)
        self.control_moves(1, False, 1)

    # -- what may happen

    @rule(side=st.integers(0, 1), data=st.binary(max_size=40), known=st.booleans())
    def open(self, side: int, data: bytes, known: bool) -> None:
        s = self.sides[side]
        if s.engine.can_open:
            tid = s.open(data if known else b"", known=known)
            self.expected[side, tid] = data
            s.work()

    @rule(side=st.integers(0, 1), grow=st.integers(1, 13))
    def feed_pipes(self, side: int, grow: int) -> None:
        s = self.sides[side]
        for tid in sorted(s.open_ended):
            whole = self.expected[side, tid]
            s.sources[tid] = bytearray(whole[: len(s.sources[tid]) + grow])
            s.engine.offer(tid, len(s.sources[tid]))
            if len(s.sources[tid]) == len(whole):
                s.open_ended.remove(tid)
                s.engine.end(tid)
        s.work()

    @rule()
    def join_lane(self) -> None:
        if len(self.lanes) < 4:
            self.next_lane += 1
            self.lanes.add(self.next_lane)
            for s in self.sides:
                s.engine.lane_joined(self.next_lane)

    @rule(pick=st.integers(0, 9))
    def kill_lane_for_one_side(self, pick: int) -> None:
        """Both sides learn of a death at different times; what was in the air on it is gone."""
        if self.lanes:
            lane = sorted(self.lanes)[pick % len(self.lanes)]
            self.lanes.remove(lane)
            self.in_air = [x for x in self.in_air if x[1] != lane]
            first, second = (0, 1) if pick % 2 else (1, 0)
            self._lane_dead(first, lane)
            self.dying.append((second, lane))

    @rule()
    def learn_of_deaths(self) -> None:
        for side, lane in self.dying:
            self._lane_dead(side, lane)
        self.dying = []

    def _lane_dead(self, side: int, lane: int) -> None:
        s = self.sides[side]
        s.engine.lane_lost(lane)
        for item in [r for r in self.receiving if r[:2] == (side, lane)]:
            self.receiving.remove(item)
            s.engine.placed(item[2], intact=False, now=self.now)
        s.work()

    @rule(side=st.integers(0, 1), picks=st.lists(st.integers(0, 9), min_size=1, max_size=4))
    def send_some(self, side: int, picks: list[int]) -> None:
        for pick in picks:
            self.send(side, pick)

    def send(self, side: int, pick: int) -> None:
        if self.lanes:
            lane = sorted(self.lanes)[pick % len(self.lanes)]
            s = self.sides[side]
            chunk = s.engine.next_chunk(lane)
            if chunk is not None:
                data = bytes(s.sources[chunk.transfer][chunk.offset : chunk.offset + chunk.length])
                assert len(data) == chunk.length, "more was sent than offered"
                self.in_air.append((1 - side, lane, OnLane(chunk, data)))
                if pick % 3:
                    s.engine.chunk_left(chunk)
                else:
                    self.reading.append((side, lane, chunk))
            s.work()

    @rule()
    def finish_reading(self) -> None:
        for side, _, chunk in self.reading:
            self.sides[side].engine.chunk_left(chunk)
            self.sides[side].work()
        self.reading = []

    @rule(picks=st.lists(st.integers(0, 99), min_size=1, max_size=4), slow=st.booleans())
    def arrive_some(self, picks: list[int], slow: bool) -> None:
        for pick in picks:
            self.arrive(pick, slow)

    def arrive(self, pick: int, slow: bool) -> None:
        if not self.in_air:
            return
        item = self.in_air[pick % len(self.in_air)]
        side, lane, on = item
        if any(x is not item and x[:2] == (side, lane) for x in self.in_air[: self.in_air.index(item)]):
            return  # frames of one lane keep their order
        if any(r[:2] == (side, lane) for r in self.receiving):
            return  # that lane is in the middle of a frame
        s = self.sides[side]
        placement = s.engine.place(on.chunk.transfer, on.chunk.offset, on.chunk.length)
        if placement.verdict is Verdict.PARK:
            return
        self.in_air.remove(item)
        if placement.verdict is Verdict.COPY:
            again = s.engine.copied(placement)
            if again is None:
                s.work()
                return
            placement = again
        self.receiving.append((side, lane, placement, on.data))
        if not slow:
            self.complete(0 if not pick else -1)

    @rule(pick=st.integers(0, 9))
    def complete(self, pick: int) -> None:
        if self.receiving:
            side, _, placement, data = self.receiving.pop(pick % len(self.receiving) if pick >= 0 else -1)
            s = self.sides[side]
            s.store(placement, data)
            s.filled[placement.transfer].append((placement.start, placement.end))
            s.engine.placed(placement, intact=True, now=self.now)
            s.work()

    @rule(side=st.integers(0, 1), tick=st.booleans(), most=st.integers(1, 5))
    def control_moves(self, side: int, tick: bool, most: int) -> None:
        if tick:
            self.now += 0.006
        self.control[1 - side].extend(self.sides[side].engine.messages(self.now))
        for _ in range(min(most, len(self.control[side]))):
            self.sides[side].engine.receive(self.control[side].popleft())
            self.sides[side].work()

    @rule(side=st.integers(0, 1), pick=st.integers(0, 9))
    def cancel(self, side: int, pick: int) -> None:
        live = [t for (i, t) in self.expected if i == side and t not in self.sides[side].done]
        if live and pick == 0:
            self.cancelled.add((side, live[-1]))
            self.sides[side].engine.reset(live[-1], "cancelled", "by the test")
            self.sides[side].open_ended.discard(live[-1])
            self.sides[side].work()

    @rule(side=st.integers(0, 1))
    def refuse(self, side: int) -> None:
        self.sides[side].refuse_next = True

    # -- what must hold

    @invariant()
    def only_whole_truth(self) -> None:
        for side, s in enumerate(self.sides):
            for tid, data in s.received.items():
                assert data == self.expected[1 - side, tid], "bytes differ"
            for tid, kind in s.done.items():
                if not kind:
                    assert tid in self.sides[1 - side].received, "done before the peer held it"

    def teardown(self) -> None:
        """Whatever happened: with one lane alive and control moving, everything comes to an end."""
        self.learn_of_deaths()
        for side in (0, 1):
            self.sides[side].refuse_next = False
        self.join_lane()
        rng = random.Random(1)
        for _ in range(600):
            if all(not s.engine.sending for s in self.sides) and not self.in_air and not self.receiving:
                break
            for side in (0, 1):
                self.feed_pipes(side, 13)
                self.send(side, rng.randrange(10))
                self.control_moves(side, True, 5)
            self.arrive(rng.randrange(100), False)
            self.complete(rng.randrange(10))
            self.finish_reading()
        for (side, tid), data in self.expected.items():
            kind = self.sides[side].done.get(tid)
            assert kind is not None, f"transfer {tid} of {self.sides[side].name} never ended"
            if not kind:
                assert self.sides[1 - side].received[tid] == data
            else:
                assert kind == "refused" or (side, tid) in self.cancelled, kind
        super().teardown()


TwoEngines.TestCase.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
TestTwoEngines = TwoEngines.TestCase
