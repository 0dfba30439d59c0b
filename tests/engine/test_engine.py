"""The engine's rules one by one: the cases that a random walk reaches too rarely, and every refusal."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from amst_core.engine import Engine, Limits, Placement, Verdict
from amst_core.engine.events import (
    Progress,
    SourceDrained,
    TransferDone,
    TransferDropped,
    TransferOffered,
    TransferWhole,
)
from amst_core.errors import BrokenError, ProtocolError
from amst_core.wire import messages as m

LIMITS = Limits(max_chunk=100, max_open=3, initial_credit=100)


def make() -> Engine:
    engine = Engine(local=LIMITS, peer=LIMITS)
    engine.lane_joined(1)
    engine.lane_joined(2)
    return engine


def receiving(size: int = 300, *, window: int | None = 1000) -> Engine:
    """An engine that accepted transfer 1 of ``size`` bytes."""
    engine = make()
    engine.receive(m.Open(1, m.MESSAGE, size, 0, "", {}), 0.0)
    engine.accept(1, window=window)
    engine.messages(0.0)
    engine.events()
    return engine


def fill(engine: Engine, start: int, end: int, *, now: float = 0.0) -> None:
    placement = engine.place(7, 1, start, end - start)
    assert placement.verdict is Verdict.FILL
    engine.placed(placement, intact=True, now=now)


def span_of(placement: Placement) -> tuple[Verdict, int, int, int, int]:
    return placement.verdict, placement.transfer, placement.start, placement.end, placement.lane


def test_a_span_has_one_writer() -> None:
    engine = receiving()
    first = engine.place(7, 1, 0, 100)
    assert first.verdict is Verdict.FILL
    assert engine.place(7, 1, 0, 100).verdict is Verdict.COPY
    assert engine.place(7, 1, 50, 100).verdict is Verdict.COPY, "a partly overlapping span must not be written in place"
    assert engine.place(7, 1, 100, 100).verdict is Verdict.FILL
    engine.placed(first, intact=True, now=0.0)
    assert engine.place(7, 1, 0, 100).verdict is Verdict.COPY, "a verified span must never be written again"


def test_a_copy_replaces_the_span_whose_lane_failed_before() -> None:
    engine = receiving()
    first = engine.place(7, 1, 0, 100)
    copy = engine.place(8, 1, 0, 100)
    assert first.claim()
    engine.placed(first, intact=False, now=0.0)
    needed = engine.copied(copy)
    assert needed is not None and span_of(needed) == (Verdict.FILL, 1, 0, 100, 8)
    engine.placed(needed, intact=True, now=0.0)
    assert not [x for x in engine.messages(0.0) if isinstance(x, m.Missing)]


def test_a_dropped_copy_is_asked_for_when_the_filling_lane_fails() -> None:
    engine = receiving()
    first = engine.place(7, 1, 0, 100)
    assert first.claim()
    assert engine.copied(engine.place(8, 1, 0, 100)) is None
    engine.placed(first, intact=False, now=0.0)
    assert engine.messages(0.0) == [m.Missing(1, 0, 100)]


def test_a_dropped_copy_is_forgotten_when_the_filling_lane_succeeds() -> None:
    engine = receiving()
    first = engine.place(7, 1, 0, 100)
    assert first.claim()
    assert engine.copied(engine.place(8, 1, 0, 100)) is None
    engine.placed(first, intact=True, now=0.0)
    assert not [x for x in engine.messages(0.0) if isinstance(x, m.Missing)]


def test_a_partly_held_copy_asks_for_the_rest_at_once() -> None:
    engine = receiving()
    fill(engine, 0, 60)
    assert engine.copied(engine.place(7, 1, 50, 100)) is None
    assert m.Missing(1, 60, 90) in engine.messages(0.0)


def test_missing_makes_the_sender_send_again() -> None:
    engine = make()
    tid = engine.open(m.MESSAGE, size=100, flow="f")
    chunk = engine.next_chunk(1, 0.0)
    assert chunk is not None and not chunk.again
    engine.chunk_left(chunk)
    assert engine.next_chunk(2, 0.0) is None
    engine.receive(m.Missing(tid, 20, 30), 0.0)
    again = engine.next_chunk(2, 0.0)
    assert again is not None and (again.offset, again.length, again.again) == (20, 30, True)
    assert engine.bytes_retransmitted == 30


def test_a_dead_lane_gives_back_only_what_is_not_acknowledged() -> None:
    engine = make()
    tid = engine.open(m.MESSAGE, size=100, flow="f")
    engine.chunk_size = 25
    for _ in range(4):
        chunk = engine.next_chunk(1, 0.0)
        assert chunk is not None
        engine.chunk_left(chunk)
    engine.receive(m.Ack(((tid, 25, ((50, 75),)),)), 0.0)
    engine.lane_lost(1)
    assert engine.next_chunk(1, 0.0) is None, "a dead lane gets nothing"
    again = [engine.next_chunk(2, 0.0), engine.next_chunk(2, 0.0), engine.next_chunk(2, 0.0)]
    assert [(c.offset, c.length) for c in again if c] == [(25, 25), (75, 25)]


def test_a_leaving_lane_takes_nothing_new_and_still_gives_back_when_it_dies() -> None:
    engine = make()
    engine.chunk_size = 50
    engine.open(m.MESSAGE, size=100, flow="f")
    assert engine.next_chunk(1, 0.0) is not None
    engine.lane_left(1)
    assert engine.next_chunk(1, 0.0) is None
    engine.lane_lost(1)
    assert (c := engine.next_chunk(2, 0.0)) is not None and c.offset == 0 and c.again


def test_a_lane_with_a_size_of_its_own_gets_shorter_chunks_and_the_others_what_they_had() -> None:
    engine = make()
    engine.chunk_size = 40
    engine.set_chunk_sizes({2: 10, 3: 60})
    engine.open(m.MESSAGE, size=100, flow="f")
    assert [engine.chunk_size_of(lane) for lane in (1, 2, 3)] == [40, 10, 40], "never longer than the session's"
    found = [engine.next_chunk(lane, 0.0) for lane in (2, 1, 2, 1)]
    assert [(c.offset, c.length) for c in found if c] == [(0, 10), (10, 40), (50, 10), (60, 40)]


def test_what_a_short_lane_lost_goes_again_in_one_piece_over_another_and_the_reverse() -> None:
    engine = make()
    engine.chunk_size = 40
    engine.set_chunk_sizes({2: 20})
    tid = engine.open(m.MESSAGE, size=80, flow="f")
    for lane in (2, 2, 1):
        chunk = engine.next_chunk(lane, 0.0)
        assert chunk is not None
        engine.chunk_left(chunk)
    engine.lane_lost(2)
    again = engine.next_chunk(1, 0.0)
    assert again is not None and (again.offset, again.length, again.again) == (0, 40, True)
    engine.chunk_left(again)
    engine.lane_joined(2)
    engine.lane_lost(1)
    parts = [engine.next_chunk(2, 0.0) for _ in range(4)]
    assert [(c.offset, c.length) for c in parts if c] == [(0, 20), (20, 20), (40, 20), (60, 20)]
    engine.receive(m.Ack(((tid, 80, ()),)), 0.0)
    assert engine.next_chunk(2, 0.0) is None


def test_chunks_of_a_pipe_end_where_its_blocks_do_whoever_takes_them() -> None:
    engine = make()
    engine.chunk_size = 40
    engine.set_chunk_sizes({2: 10})
    tid = engine.open(m.PIPE, size=None, flow="f")
    engine.offer(tid, 100)
    found = [engine.next_chunk(lane, 0.0) for lane in (2, 1, 2, 2, 1)]
    assert [(c.offset, c.length) for c in found if c] == [(0, 10), (10, 30), (40, 10), (50, 10), (60, 20)]


def test_flows_take_turns_and_keep_their_own_order() -> None:
    engine = make()
    engine.chunk_size = 50
    a1 = engine.open(m.MESSAGE, size=100, flow="a")
    a2 = engine.open(m.MESSAGE, size=100, flow="a")
    b1 = engine.open(m.MESSAGE, size=100, flow="b")
    order = [c.transfer for _ in range(6) if (c := engine.next_chunk(1, 0.0))]
    assert order == [a1, b1, a1, b1, a2, a2]


def test_credit_stops_one_transfer_and_not_the_next() -> None:
    engine = make()
    first = engine.open(m.MESSAGE, size=500, flow="a")
    second = engine.open(m.MESSAGE, size=50, flow="a")
    assert [c.transfer for _ in range(3) if (c := engine.next_chunk(1, 0.0))] == [first, second]
    engine.receive(m.Credit(((first, 150),)), 0.0)
    assert (c := engine.next_chunk(1, 0.0)) is not None and (c.transfer, c.offset, c.length) == (first, 100, 50)
    assert engine.next_chunk(1, 0.0) is None


def test_a_long_transfer_in_line_waits_for_its_credit() -> None:
    """The peer gives it no memory before it is granted; what fits the credit of its OPEN goes at once."""
    engine = make()
    engine.open(m.MESSAGE, size=300, flow="a")
    behind = engine.open(m.MESSAGE, size=101, flow="a")
    engine.open(m.MESSAGE, size=100, flow="a")
    chunks = [chunk for _ in range(4) if (chunk := engine.next_chunk(1, 0.0)) is not None]
    assert [(chunk.transfer, chunk.offset) for chunk in chunks] == [(1, 0), (3, 0)]
    engine.receive(m.Credit(((behind, 101),)), 0.0)
    chunk = engine.next_chunk(1, 0.0)
    assert chunk is not None and (chunk.transfer, chunk.offset) == (behind, 0)


def test_a_transfer_in_line_hears_of_credit_that_is_no_more_than_it_had() -> None:
    engine = make()
    engine.receive(m.Open(1, m.FILE, 300, 0, "", {}), 0.0)
    engine.accept(1, window=50)
    assert m.Credit(((1, 100),)) in engine.messages(0.0)
    sender = make()
    sender.open(m.MESSAGE, size=10, flow="a")
    behind = sender.open(m.MESSAGE, size=300, flow="a")
    assert sender.next_chunk(1, 0.0) is not None and sender.next_chunk(1, 0.0) is None
    sender.receive(m.Credit(((behind, 100),)), 0.0)
    assert (chunk := sender.next_chunk(1, 0.0)) is not None and chunk.transfer == behind


def test_done_waits_until_no_lane_reads_the_source() -> None:
    engine = make()
    tid = engine.open(m.MESSAGE, size=10, flow="f")
    chunk = engine.next_chunk(1, 0.0)
    assert chunk is not None
    engine.reset(tid, "cancelled", "by the user")
    assert not [e for e in engine.events() if isinstance(e, TransferDone)]
    engine.chunk_left(chunk)
    assert engine.events() == [TransferDone(tid, "cancelled", "by the user")]


def test_dropped_waits_until_no_lane_fills_the_place() -> None:
    engine = receiving()
    placement = engine.place(7, 1, 0, 100)
    engine.receive(m.Reset(1, "cancelled", "why"), 0.0)
    assert engine.events() == []
    engine.placed(placement, intact=True, now=0.0)
    assert engine.events() == [TransferDropped(1, "cancelled", "why")]


def test_whole_needs_every_byte_and_the_end() -> None:
    engine = receiving(200)
    fill(engine, 100, 200)
    engine.receive(m.End(1, 200), 0.0)
    assert engine.events() == []
    fill(engine, 0, 100)
    assert engine.events() == [TransferWhole(1, 200)]
    engine.finish(1)
    assert engine.messages(1.0)[-1] == m.Result(1, "", "")
    assert engine.place(7, 1, 0, 100).verdict is Verdict.COPY, "a late duplicate of a finished transfer"


def test_empty_transfers_are_legal() -> None:
    engine = make()
    tid = engine.open(m.MESSAGE, size=0, flow="f")
    assert engine.events() == [SourceDrained(tid)]
    engine.end(tid)
    peer = receiving(0)
    peer.receive(m.End(1, 0), 0.0)
    assert peer.events() == [TransferWhole(1, 0)]
    engine.receive(m.Result(tid, "", ""), 0.0)
    assert engine.events() == [TransferDone(tid, "", "")]


def test_acknowledgements_are_batched_and_cumulative() -> None:
    engine = receiving(300)
    fill(engine, 0, 50, now=1.0)
    fill(engine, 100, 150, now=1.001)
    assert not [x for x in engine.messages(1.004) if isinstance(x, m.Ack)]
    assert engine.deadline == pytest.approx(1.005)
    assert m.Ack(((1, 50, ((100, 150),)),)) in engine.messages(1.005)
    assert engine.deadline is None


def test_an_ack_never_outgrows_a_record() -> None:
    limits = Limits(max_chunk=1, max_open=4096, initial_credit=100)
    engine = Engine(local=limits, peer=limits)
    for tid in range(1, 301):
        engine.receive(m.Open(tid, m.MESSAGE, 100, 0, "", {}), 0.0)
        engine.accept(tid, window=100)
        for offset in range(1, 100, 3):  # as many separate spans as one ACK would name
            engine.placed(engine.place(7, tid, offset, 1), intact=True, now=0.0)
    acks = [x for x in engine.messages(1.0) if isinstance(x, m.Ack)]
    assert len(acks) > 1
    assert [tid for ack in acks for tid, _, _ in ack.held] == list(range(1, 301))
    assert all(len(m.encode(ack)) < m.MAX_RECORD // 4 for ack in acks)


def test_data_far_beyond_the_last_open_parks_too() -> None:
    """Resets free their slots at once, so many OPENs and RESETs may be on their way when data arrives."""
    assert make().place(7, 1000, 0, 10).verdict is Verdict.PARK


def test_progress_counts_bytes_once() -> None:
    engine = make()
    tid = engine.open(m.MESSAGE, size=100, flow="f")
    engine.next_chunk(1, 0.0)
    engine.receive(m.Ack(((tid, 40, ()),)), 0.0)
    engine.receive(m.Ack(((tid, 40, ()),)), 0.0)
    engine.receive(m.Ack(((tid, 60, ()),)), 0.0)
    assert [e for e in engine.events() if isinstance(e, Progress)] == [Progress(tid, 40), Progress(tid, 60)]
    assert engine.bytes_acknowledged == 60


def test_opening_beyond_the_peers_limit_is_refused() -> None:
    engine = make()
    for _ in range(3):
        engine.open(m.MESSAGE, size=1, flow="f")
    assert not engine.can_open
    with pytest.raises(BrokenError):
        engine.open(m.MESSAGE, size=1, flow="f")


def test_a_transfer_that_was_refused_makes_room_while_a_lane_still_fills_it() -> None:
    """The peer frees its place when it reads the RESULT, and may open the next at once."""
    engine = make()
    for tid in (1, 2, 3):
        engine.receive(m.Open(tid, m.MESSAGE, 100, 0, "", {}), 0.0)
        engine.accept(tid, window=100)
    filling = engine.place(7, 1, 0, 50)
    engine.refuse(1, "storage", "full")
    engine.receive(m.Reset(2, "cancelled", ""), 0.0)
    engine.receive(m.Open(4, m.MESSAGE, 100, 0, "", {}), 0.0)
    engine.receive(m.Open(5, m.MESSAGE, 100, 0, "", {}), 0.0)
    with pytest.raises(ProtocolError, match="more than 3"):
        engine.receive(m.Open(6, m.MESSAGE, 100, 0, "", {}), 0.0)
    engine.placed(filling, intact=True, now=0.0)
    with pytest.raises(ProtocolError, match="more than 3"):
        engine.receive(m.Open(6, m.MESSAGE, 100, 0, "", {}), 0.0)


def test_a_flow_leaves_room_for_others() -> None:
    engine = Engine(local=LIMITS, peer=Limits(max_chunk=100, max_open=16, initial_credit=100))
    while engine.has_turn("greedy"):
        engine.open(m.MESSAGE, size=1, flow="greedy")
    opened = engine.sending
    assert 8 <= opened < 16
    for other in ("a", "b"):
        assert engine.has_turn(other)
        engine.open(m.MESSAGE, size=1, flow=other)
    assert not engine.has_turn("greedy")


Act = Callable[[Engine], object]


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(lambda e: e.place(7, 1, 250, 100), id="past the end"),
        pytest.param(lambda e: e.place(7, 1, 0, 101), id="chunk too long"),
        pytest.param(lambda e: e.place(7, 0, 0, 1), id="transfer zero"),
        pytest.param(lambda e: e.receive(m.Open(3, m.MESSAGE, 1, 0, "", {}), 0.0), id="id skipped"),
        pytest.param(lambda e: e.receive(m.Open(1, m.MESSAGE, 1, 0, "", {}), 0.0), id="id repeated"),
        pytest.param(lambda e: e.receive(m.Open(2, 99, 1, 0, "", {}), 0.0), id="kind unknown"),
        pytest.param(lambda e: e.receive(m.Open(2, m.FILE, 1 << 63, 0, "", {}), 0.0), id="size too large"),
        pytest.param(lambda e: e.receive(m.End(1, 299), 0.0), id="end contradicts size"),
        pytest.param(lambda e: e.receive(m.End(2, 1), 0.0), id="end of what was never opened"),
        pytest.param(lambda e: e.receive(m.Ack(((1, 1, ()),)), 0.0), id="ack of what was never sent"),
        pytest.param(lambda e: e.receive(m.Result(1, "", ""), 0.0), id="result for what was never sent"),
        pytest.param(lambda e: e.receive(m.Credit(((1, 1),)), 0.0), id="credit for what was never sent"),
        pytest.param(lambda e: e.receive(m.Ping(1), 0.0), id="not about transfers"),
    ],
)
def test_what_no_honest_peer_sends_is_refused(act: Act) -> None:
    with pytest.raises(ProtocolError):
        act(receiving(300))


def test_open_transfers_are_limited() -> None:
    engine = make()
    for tid in (1, 2, 3):
        engine.receive(m.Open(tid, m.MESSAGE, 1, 0, "", {}), 0.0)
    with pytest.raises(ProtocolError):
        engine.receive(m.Open(4, m.MESSAGE, 1, 0, "", {}), 0.0)


def test_sending_past_the_credit_is_refused() -> None:
    engine = receiving(300, window=None)
    engine.place(7, 1, 0, 100)
    with pytest.raises(ProtocolError):
        engine.place(7, 1, 100, 1)
    engine.grant(1, 101)
    assert engine.place(7, 1, 100, 1).verdict is Verdict.FILL


def test_an_ack_of_unsent_bytes_and_an_early_result_are_refused() -> None:
    engine = make()
    tid = engine.open(m.MESSAGE, size=100, flow="f")
    with pytest.raises(ProtocolError):
        engine.receive(m.Ack(((tid, 1, ()),)), 0.0)
    engine.next_chunk(1, 0.0)
    with pytest.raises(ProtocolError):
        engine.receive(m.Result(tid, "", ""), 0.0)


def test_data_before_its_open_parks_the_lane() -> None:
    engine = make()
    assert engine.place(7, 1, 0, 10).verdict is Verdict.PARK
    engine.receive(m.Open(1, m.MESSAGE, 10, 0, "", {}), 0.0)
    assert engine.place(7, 1, 0, 10).verdict is Verdict.PARK, "not accepted yet"
    assert engine.events() == [TransferOffered(m.Open(1, m.MESSAGE, 10, 0, "", {}))]
    engine.accept(1, window=10)
    assert engine.place(7, 1, 0, 10).verdict is Verdict.FILL
