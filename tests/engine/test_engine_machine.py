"""A hypothesis state machine drives two engines through any order of delivery, loss, damage and lane death.

Lanes are queues; the control channel is one too, and breaks: then what was on its way is gone, and what `ControlLoop`
keeps is sent again on the next one. Meanwhile reports travel over lanes.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import TypeAlias

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from amst_core.engine import Chunk, Engine, Limits, Placement, Verdict
from amst_core.engine.events import (
    LaneOvertaken,
    PrefixGrew,
    SameAnswered,
    SameAsked,
    SourceDrained,
    SourceReleased,
    TransferDone,
    TransferDropped,
    TransferOffered,
    TransferWhole,
)
from amst_core.engine.pace import BURST_S
from amst_core.wire import messages as m
from amst_core.wire.fields import Span

LIMITS = Limits(max_chunk=7, max_open=4, initial_credit=15)
SAME, OTHER = b"s" * 32, b"o" * 32
"""Digests of a whole file that is there: the one that is sent, or another."""
THERE = ("a part", "a part", "the same", "another", "nothing")
"""What a receiver finds of a file on hold."""

ACTS = (
    *(["send"] * 10 + ["arrive"] * 15 + ["complete"] * 3 + ["store"] * 2 + ["control"] * 12),
    *(["late"] * 5 + ["open"] * 3 + ["feed"] * 2 + ["recover"] * 3 + ["compare"] * 2 + ["read"] * 2),
    *("join", "join", "kill", "kill", "deaths", "overtaken", "rate", "confirm", "cut", "notice", "resume", "resume"),
    *("cancel", "refuse", "sizes", "sizes"),
)
"""What happens next, the frequent more often."""


@dataclass
class OnLane:
    """A chunk as it travels: its bytes are copied when it is read from the source."""

    chunk: Chunk
    data: bytes


Frame: TypeAlias = OnLane | m.Ack | m.Credit


@dataclass
class Arriving:
    """A chunk that a lane is in the middle of; ``in_place``: it writes to its place as it receives."""

    side: int
    lane: int
    placement: Placement
    data: bytes
    in_place: bool


@dataclass
class Control:
    """One side's end of the control channel: what `ControlLoop` keeps, without I/O."""

    up: bool = True
    kept: deque[m.Message] = field(default_factory=deque)
    kept_from: int = 0
    received: int = 0

    def confirmed(self, count: int) -> None:
        assert self.kept_from <= count <= self.kept_from + len(self.kept)
        while self.kept_from < count:
            self.kept.popleft()
            self.kept_from += 1


class Side:
    """One engine with sources and sinks of plain bytes: what a session does, without I/O."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.engine = Engine(local=LIMITS, peer=LIMITS)
        self.engine.chunk_size = 7
        self.control = Control()
        self.sources: dict[int, bytearray] = {}
        self.released: dict[int, int] = {}  # up to where a source's bytes are gone
        self.in_order: dict[int, bytes] = {}  # of pipes, what is there without a gap
        self.open_ended: set[int] = set()
        self.done: dict[int, str] = {}
        self.sinks: dict[int, bytearray] = {}
        self.received: dict[int, bytes] = {}
        self.dropped: set[int] = set()
        self.offers = 0
        self.refuse_next = False
        self.filled: dict[int, list[Span]] = {}
        self.held_before: dict[int, list[Span]] = {}  # of transfers of the peer, from an earlier try
        self.recovering: list[int] = []  # the peer waits to hear what is there
        self.comparing: list[tuple[int, bytes]] = []
        self.overtaken: list[int] = []  # lanes to be dropped
        self.limited: tuple[float, float, int] | None = None  # rate, since, bytes sent since

    def open(self, data: bytes, *, known: bool, on_hold: bool) -> int:
        size = len(data) if known else None
        kind = m.FILE if on_hold else m.MESSAGE if known else m.PIPE
        tid = self.engine.open(kind, size=size, flow="f", on_hold=on_hold, steady=kind == m.MESSAGE)
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
                    self.sinks[opened.transfer] = bytearray(150)
                    if opened.attributes.get(m.HOLD):
                        self.recovering.append(opened.transfer)
                    elif opened.kind == m.PIPE:
                        self.in_order[opened.transfer] = b""
                        self.engine.accept(opened.transfer, window=None, ordered=True)
                        self.engine.grant(opened.transfer, 45)
                    else:
                        self.engine.accept(opened.transfer, window=45)
                case PrefixGrew(tid, end):
                    had, now = self.in_order[tid], bytes(self.sinks[tid][:end])
                    assert len(had) < end and now.startswith(had), "what came in order has changed"
                    self.in_order[tid] = now
                    self.engine.grant(tid, end + 45)
                case TransferWhole(tid, total):
                    assert tid not in self.received, "whole twice"
                    self.received[tid] = bytes(self.sinks[tid][:total])
                    assert self.in_order.get(tid, self.received[tid]) == self.received[tid], "told whole, not in order"
                    self.engine.finish(tid)
                case TransferDropped(tid):
                    self.dropped.add(tid)
                case SourceReleased(tid, end):
                    assert self.released.get(tid, 0) < end
                    self.released[tid] = end
                    self.sources[tid][:end] = bytes(end)
                case SourceDrained(tid):
                    self.engine.end(tid)
                case TransferDone(tid, kind):
                    assert tid not in self.done, "done twice"
                    self.done[tid] = kind
                case SameAsked(tid, digest):
                    self.comparing.append((tid, digest))
                case SameAnswered(tid, same):
                    if same:
                        self.engine.adopted(tid)
                    else:
                        self.sinks[tid] = bytearray(150)
                        self.held_before.pop(tid)
                        self.engine.accept(tid, window=45)
                case LaneOvertaken(lane):
                    self.overtaken.append(lane)

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
        self.cut = False  # the control connection; the sides may not know yet
        self.lanes: set[int] = set()
        self.next_lane = 0
        self.in_air: list[tuple[int, int, Frame]] = []  # (to side, lane, frame)
        self.receiving: list[Arriving] = []
        self.storing: list[Arriving] = []  # whole and verified, with the right to write: at the disk
        self.reading: list[tuple[int, int, Chunk]] = []
        self.expected: dict[tuple[int, int], bytes] = {}
        self.cancelled: set[tuple[int, int]] = set()
        self.dying: list[tuple[int, int]] = []  # (side, lane): dead, and that side does not know yet
        for _ in range(3):
            self.join_lane()
        self.open(0, 150, True, False)  # something to do from the first step on
        self.control_moves(0, False, 1, False)
        self.control_moves(1, False, 1, False)

    # -- what may happen

    @rule(
        steps=st.lists(st.tuples(st.sampled_from(ACTS), st.integers(0, 299), st.booleans()), min_size=20, max_size=80)
    )
    def go_on(self, steps: list[tuple[str, int, bool]]) -> None:
        """One rule for everything: hypothesis would leave some of many out of each run, and so most of what they do."""
        for act, pick, flag in steps:
            side, pick = pick % 2, pick // 2
            match act:
                case "open":
                    self.open(side, pick, pick % 4 > 0, flag)
                case "feed":
                    self.feed_pipes(side, 1 + pick % 30)
                case "recover":
                    self.recover(side, [pick % 60, 60 + pick % 20, 100, 100 + pick % 50], THERE[pick % len(THERE)])
                case "compare":
                    self.compare(side)
                case "join":
                    self.join_lane()
                case "kill":
                    self.kill_lane_for_one_side(pick)
                case "deaths":
                    self.learn_of_deaths()
                case "overtaken":
                    self.drop_overtaken()
                case "send":
                    for _ in range(1 + 4 * flag):
                        self.send(side, pick)
                case "read":
                    self.finish_reading()
                case "late":
                    self.resend_late(side, 1.1 if flag else 0.25)
                    self.send(side, pick)
                    self.send(side, pick + 1)
                case "rate":
                    self.limit_rate(side, 2000.0 if flag and pick % 2 else None)
                case "sizes":
                    self.sides[side].engine.set_chunk_sizes({lane: 1 + (pick + 3 * lane) % 7 for lane in self.lanes})
                case "arrive":
                    self.arrive(pick, flag, pick % 3 == 0)
                case "complete":
                    self.complete(pick, flag)
                case "store":
                    self.store(pick)
                case "control":
                    self.control_moves(side, flag, 1 + pick % 5, pick % 7 == 0)
                case "confirm":
                    self.confirm(side)
                case "cut":
                    self.cut_control()
                case "notice":
                    self.learn_of_the_cut(side)
                case "resume":
                    self.resume_control()
                case "cancel":
                    self.cancel(side, pick % 3)
                case "refuse":
                    self.sides[side].refuse_next = flag

    def open(self, side: int, size: int, known: bool, on_hold: bool) -> None:
        s = self.sides[side]
        if s.engine.can_open:
            data = bytes((len(self.expected) * 37 + i) % 251 for i in range(size))
            tid = s.open(data if known else b"", known=known, on_hold=known and on_hold)
            self.expected[side, tid] = data
            s.work()

    def feed_pipes(self, side: int, grow: int) -> None:
        s = self.sides[side]
        for tid in sorted(s.open_ended):
            whole = self.expected[side, tid]
            s.sources[tid] += whole[len(s.sources[tid]) : len(s.sources[tid]) + grow]
            last = len(s.sources[tid]) == len(whole)
            s.engine.offer(tid, len(s.sources[tid]), last=last)
            if last:
                s.open_ended.remove(tid)
        s.work()

    # -- files that were begun before

    def recover(self, side: int, cuts: list[int], there: str) -> None:
        """The receiver has looked what is there of a file on hold."""
        s = self.sides[side]
        if not s.recovering:
            return
        tid = s.recovering.pop(0)
        data = self.expected[1 - side, tid]
        if there in ("the same", "another"):
            same = there == "the same"
            s.sinks[tid][: len(data)] = data if same else bytes(len(data))
            s.held_before[tid] = [(0, len(data))]
            s.engine.claim(tid, SAME if same else OTHER)
        else:
            edges = sorted({min(cut, len(data)) for cut in cuts}) if there == "a part" else []
            spans = list(zip(edges[::2], edges[1::2], strict=False))
            for start, end in spans:
                s.sinks[tid][start:end] = data[start:end]
            s.held_before[tid] = spans
            s.filled[tid] = list(spans)
            s.engine.accept(tid, window=45, held=tuple(spans))
        s.work()

    def compare(self, side: int) -> None:
        s = self.sides[side]
        for tid, digest in s.comparing:
            s.engine.answer_same(tid, digest == SAME)
        s.comparing = []
        s.work()

    # -- lanes

    def join_lane(self) -> None:
        if len(self.lanes) < 4:
            self.next_lane += 1
            self.lanes.add(self.next_lane)
            for s in self.sides:
                s.engine.lane_joined(self.next_lane)

    def kill_lane_for_one_side(self, pick: int) -> None:
        """Both sides learn of a death at different times; what was in the air on it is gone."""
        if self.lanes:
            self._kill(sorted(self.lanes)[pick % len(self.lanes)], pick % 2)

    def drop_overtaken(self) -> None:
        """A lane that stands in the way of a verified copy is dropped by the side that receives on it."""
        for side, s in enumerate(self.sides):
            while s.overtaken:
                lane = s.overtaken.pop()
                if lane in self.lanes:
                    self._kill(lane, side)

    def _kill(self, lane: int, first: int) -> None:
        self.lanes.remove(lane)
        self.in_air = [x for x in self.in_air if x[1] != lane]
        self._lane_dead(first, lane)
        self.dying.append((1 - first, lane))

    def learn_of_deaths(self) -> None:
        for side, lane in self.dying:
            self._lane_dead(side, lane)
        self.dying = []

    def _lane_dead(self, side: int, lane: int) -> None:
        s = self.sides[side]
        s.engine.lane_lost(lane)
        for arriving in [r for r in self.receiving if (r.side, r.lane) == (side, lane)]:
            self.receiving.remove(arriving)
            if arriving.placement.verdict is Verdict.FILL:
                s.engine.placed(arriving.placement, intact=False, now=self.now)
        s.work()

    # -- sending

    def send(self, side: int, pick: int) -> None:
        if self.lanes:
            lane = sorted(self.lanes)[pick % len(self.lanes)]
            s = self.sides[side]
            chunk = s.engine.next_chunk(lane, self.now)
            if chunk is not None:
                start, end = chunk.offset, chunk.offset + chunk.length
                assert start >= s.released.get(chunk.transfer, 0), "sent again after it was released"
                data = bytes(s.sources[chunk.transfer][start:end])
                assert len(data) == chunk.length, "more was sent than offered"
                before = self.sides[1 - side].held_before.get(chunk.transfer, [])
                assert all(e <= start or end <= b for b, e in before), "the peer held this from an earlier try"
                self._count(s, chunk.length)
                self.in_air.append((1 - side, lane, OnLane(chunk, data)))
                chunk.lent = pick % 5 == 0
                if pick % 3:
                    s.engine.chunk_left(chunk)
                else:
                    self.reading.append((side, lane, chunk))
                    chunk.free = pick % 2 == 0
            s.work()

    def _count(self, s: Side, size: int) -> None:
        if s.limited is not None:
            rate, since, sent = s.limited
            s.limited = rate, since, sent + size
            most = rate * (self.now - since + BURST_S) + LIMITS.max_chunk
            assert sent + size <= most + 1e-6, "more than the limit allows"

    def finish_reading(self) -> None:
        for side, _, chunk in self.reading:
            s = self.sides[side]
            assert chunk.free or chunk.offset >= s.released.get(chunk.transfer, 0), "released while a lane reads it"
            s.engine.chunk_left(chunk)
            self.sides[side].work()
        self.reading = []

    def resend_late(self, side: int, later: float) -> None:
        self.now += later
        self.sides[side].engine.resend_late(self.now)
        self.sides[side].work()

    def limit_rate(self, side: int, rate: float | None) -> None:
        s = self.sides[side]
        s.engine.limit_rate(rate, now=self.now)
        s.limited = None if rate is None else (rate, self.now, 0)

    # -- receiving

    def arrive(self, pick: int, slow: bool, in_place: bool) -> None:
        if not self.in_air:
            return
        item = self.in_air[pick % len(self.in_air)]
        side, lane, frame = item
        if any(x is not item and x[:2] == (side, lane) for x in self.in_air[: self.in_air.index(item)]):
            return  # frames of one lane keep their order
        if any((r.side, r.lane) == (side, lane) for r in (*self.receiving, *self.storing)):
            return  # that lane is in the middle of a frame
        s = self.sides[side]
        if not isinstance(frame, OnLane):
            self.in_air.remove(item)
            s.engine.receive(frame, self.now)
            s.work()
            return
        placement = s.engine.place(lane, frame.chunk.transfer, frame.chunk.offset, frame.chunk.length)
        if placement.verdict is Verdict.PARK:
            return
        self.in_air.remove(item)
        in_place = in_place and placement.verdict is Verdict.FILL
        if in_place:
            assert placement.claim(in_place=True), "nobody can have taken a span over that was just given"
        self.receiving.append(Arriving(side, lane, placement, frame.data, in_place))
        if not slow:
            self.complete(0 if not pick else -1, False)

    def complete(self, pick: int, slow_disk: bool) -> None:
        """A chunk is whole and verified: it is written, if its lane has the right to, or is needed as a copy."""
        if not self.receiving:
            return
        arriving = self.receiving.pop(pick % len(self.receiving) if pick >= 0 else -1)
        s = self.sides[arriving.side]
        placement = arriving.placement
        fills = placement.verdict is Verdict.FILL and (arriving.in_place or placement.claim())
        if not fills:
            needed = s.engine.copied(placement)
            known = len(s.overtaken)
            s.work()
            writing = {r.lane for r in self.receiving if r.side == arriving.side and r.in_place}
            assert set(s.overtaken[known:]) <= writing, "only who writes as it receives can be stuck"
            if needed is None:
                return
            assert not needed.claim(), "who is given a copy's place has the right to write to it"
            arriving.placement = needed
        self.storing.append(arriving)
        if not slow_disk or arriving.in_place:
            self.store(-1)

    def store(self, pick: int) -> None:
        if self.storing:
            arriving = self.storing.pop(pick % len(self.storing) if pick >= 0 else -1)
            s = self.sides[arriving.side]
            placement = arriving.placement
            s.store(placement, arriving.data)
            s.filled[placement.transfer].append((placement.start, placement.end))
            s.engine.placed(placement, intact=True, now=self.now)
            s.work()

    # -- control

    def control_moves(self, side: int, tick: bool, most: int, by_lane: bool) -> None:
        if tick:
            self.now += 0.006
        s = self.sides[side]
        if s.control.up:
            messages = self._write(side)
            if by_lane:  # the control channel seems to be stuck
                self._report(side, [x for x in messages if isinstance(x, m.Ack | m.Credit)], most)
        else:
            self._report(side, s.engine.reports(self.now), most)
        for _ in range(min(most, len(self.control[side]))):
            self._take_in(side, self.control[side].popleft())

    def _write(self, side: int) -> list[m.Message]:
        s = self.sides[side]
        messages = s.engine.messages(self.now)
        s.control.kept += [message for message in messages if not isinstance(message, m.UNCOUNTED)]
        if not self.cut:
            self.control[1 - side].extend(messages)
        return messages

    def _report(self, side: int, reports: list[m.Ack | m.Credit], pick: int) -> None:
        if self.lanes:
            lane = sorted(self.lanes)[pick % len(self.lanes)]
            self.in_air += [(1 - side, lane, report) for report in reports]

    def _take_in(self, side: int, message: m.Message) -> None:
        s = self.sides[side]
        if isinstance(message, m.Seen):
            s.control.confirmed(message.count)
            return
        if not isinstance(message, m.UNCOUNTED):
            s.control.received += 1
        s.engine.receive(message, self.now)
        s.work()

    def confirm(self, side: int) -> None:
        s = self.sides[side]
        if s.control.up and not self.cut:
            self.control[1 - side].append(m.Seen(s.control.received))

    def cut_control(self) -> None:
        """What is on its way, in both directions, is gone; nobody knows yet."""
        if not self.cut:
            self.cut = True
            for queue in self.control:
                queue.clear()

    def learn_of_the_cut(self, side: int) -> None:
        s = self.sides[side]
        if self.cut and s.control.up:
            s.control.up = False
            s.engine.control_lost()

    def resume_control(self) -> None:
        if not self.cut:
            return
        for side in (0, 1):
            self.learn_of_the_cut(side)
        self.cut = False
        taken_in = [s.control.received for s in self.sides]
        for side, s in enumerate(self.sides):
            s.control.confirmed(taken_in[1 - side])
            self.control[1 - side].extend(s.control.kept)
            s.control.up = True
            s.engine.control_resumed()
            self._write(side)

    def cancel(self, side: int, pick: int) -> None:
        live = [t for (i, t) in self.expected if i == side and t not in self.sides[side].done]
        if live and pick == 0:
            self.cancelled.add((side, live[-1]))
            self.sides[side].engine.reset(live[-1], "cancelled", "by the test")
            self.sides[side].open_ended.discard(live[-1])
            self.sides[side].work()

    # -- what must hold

    @invariant()
    def only_whole_truth(self) -> None:
        for side, s in enumerate(self.sides):
            for tid, data in s.received.items():
                assert data == self.expected[1 - side, tid], "bytes differ"
            for tid, kind in s.done.items():
                if not kind:
                    assert tid in self.sides[1 - side].received, "done before the peer held it"
            delivery = s.engine.delivery()
            told = {tid for start, end in delivery.delivered for tid in range(start, end)}
            assert told == {tid for tid, kind in s.done.items() if not kind} or s.engine.sending, "delivered"
            assert told <= set(self.sides[1 - side].received), "told as delivered before the peer held it"
            assert not set(delivery.undelivered) & set(self.sides[1 - side].received), "told as lost, and it is there"

    @invariant()
    def nobody_reads_what_has_ended(self) -> None:
        for side, _, chunk in self.reading:
            assert chunk.free or chunk.transfer not in self.sides[side].done, "its owner may do with it as it likes"

    @invariant()
    def one_writer(self) -> None:
        """Of what is being written right now no two spans overlap."""
        writing = [(a.side, a.placement) for a in (*self.storing, *(r for r in self.receiving if r.in_place))]
        for i, (side, one) in enumerate(writing):
            for other_side, other in writing[:i]:
                apart = one.end <= other.start or other.end <= one.start
                assert side != other_side or one.transfer != other.transfer or apart, "two writers"

    def teardown(self) -> None:
        """Whatever happened: with one lane alive and control moving, everything comes to an end."""
        for side in (0, 1):
            self.sides[side].refuse_next = False
            self.limit_rate(side, None)
        self.resume_control()
        rng = random.Random(1)
        for turn in range(40_000):
            if all(not s.engine.sending for s in self.sides) and not self.in_air and not self.receiving:
                break
            self.drop_overtaken()
            self.learn_of_deaths()
            if not self.lanes or not turn:
                self.join_lane()
            for side in (0, 1):
                self.feed_pipes(side, 13)
                self.recover(side, [], "nothing")
                self.compare(side)
                self.send(side, rng.randrange(10))
                self.control_moves(side, True, 5, False)
            self.arrive(rng.randrange(100), False, True)
            self.complete(rng.randrange(10), False)
            self.store(-1)
            self.finish_reading()
        for (side, tid), data in self.expected.items():
            kind = self.sides[side].done.get(tid)
            assert kind is not None, f"transfer {tid} of {self.sides[side].name} never ended"
            if not kind:
                assert self.sides[1 - side].received[tid] == data
            else:
                assert kind == "refused" or (side, tid) in self.cancelled, kind
        super().teardown()


TwoEngines.TestCase.settings = settings(max_examples=100, stateful_step_count=10, deadline=None)
TestTwoEngines = TwoEngines.TestCase
