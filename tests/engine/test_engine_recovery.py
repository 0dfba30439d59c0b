"""What the engine does when lanes are slow, the control channel is gone, or a file was begun before."""

from __future__ import annotations

import pytest

from amst_core.engine import Chunk, Delivery, Engine, Limits, Verdict
from amst_core.engine.engine import ACK_ENTRIES, ACK_INTERVAL_S, ACK_SPANS
from amst_core.engine.events import (
    LaneOvertaken,
    Progress,
    SameAnswered,
    SameAsked,
    SourceDrained,
    TransferDone,
    TransferWhole,
)
from amst_core.errors import ProtocolError
from amst_core.wire import messages as m
from amst_core.wire.fields import Span

LIMITS = Limits(max_chunk=100, max_open=8, initial_credit=100)
DIGEST = bytes(range(32))


def make(lanes: int = 3) -> Engine:
    engine = Engine(local=LIMITS, peer=LIMITS)
    for lane in range(1, lanes + 1):
        engine.lane_joined(lane)
    return engine


def send(engine: Engine, lane: int, now: float = 0.0) -> Chunk:
    """``lane`` takes a chunk and is done with reading it."""
    chunk = engine.next_chunk(lane, now)
    assert chunk is not None
    engine.chunk_left(chunk)
    return chunk


def span_of(chunk: Chunk | None) -> tuple[int, int] | None:
    return None if chunk is None else (chunk.offset, chunk.offset + chunk.length)


def receiving(size: int = 300) -> Engine:
    engine = make()
    engine.receive(m.Open(1, m.MESSAGE, size, 0, "", {}), 0.0)
    engine.accept(1, window=1 << 20)
    engine.messages(0.0)
    engine.events()
    return engine


def hold(engine: Engine, size: int = 300) -> int:
    tid = engine.open(m.FILE, size=size, flow="f", attributes={"path": b"x"}, on_hold=True)
    assert engine.messages(0.0) == [m.Open(tid, m.FILE, size, 0, "", {"path": b"x", "hold": True})]
    return tid


def offered_on_hold(size: int = 300) -> Engine:
    engine = make()
    engine.receive(m.Open(1, m.FILE, size, 0, "", {"hold": True}), 0.0)
    engine.events()
    return engine


# ---- late chunks ----------------------------------------------------------------------------------


def sent_over_two_lanes() -> tuple[Engine, int]:
    """100 bytes, halves over lanes 1 and 2 at time 0, the second acknowledged after 10 ms: late is 0.2 s."""
    engine = make()
    engine.chunk_size = 50
    tid = engine.open(m.MESSAGE, size=100, flow="f")
    send(engine, 1)
    send(engine, 2)
    engine.receive(m.Ack(((tid, 0, ((50, 100),)),)), 0.01)
    return engine, tid


def test_the_last_chunks_go_again_over_another_lane_when_they_are_late() -> None:
    engine, _ = sent_over_two_lanes()
    engine.resend_late(0.19)
    assert engine.next_chunk(2, 0.19) is None, "not late yet"
    engine.resend_late(0.21)
    assert engine.next_chunk(1, 0.21) is None, "not over the slow lane itself"
    again = send(engine, 2, 0.21)
    assert (span_of(again), again.again) == ((0, 50), True)
    assert engine.bytes_retransmitted == 50
    assert engine.next_chunk(2, 0.21) is None


def test_while_there_is_something_else_to_send_late_is_four_times_later() -> None:
    engine, _ = sent_over_two_lanes()
    other = engine.open(m.MESSAGE, size=50, flow="g")
    engine.resend_late(0.79)
    assert span_of(engine.next_chunk(2, 0.79)) == (0, 50)
    assert engine.next_chunk(2, 0.79) is None, f"that was transfer {other}, and nothing was late"
    engine.open(m.MESSAGE, size=50, flow="g")
    engine.resend_late(0.81)
    assert engine.bytes_retransmitted == 0
    assert {engine.next_chunk(2, 0.81).again for _ in range(2)} == {True, False}


def test_there_is_patience_with_a_lane_that_moves() -> None:
    engine, _ = sent_over_two_lanes()
    assert engine.late_lanes(0.19) == set()
    assert engine.late_lanes(0.21) == {1}
    engine.resend_late(0.79, {1})
    assert engine.next_chunk(2, 0.79) is None
    engine.resend_late(0.81, {1})
    assert span_of(engine.next_chunk(2, 0.81)) == (0, 50)


def test_a_copy_may_be_late_too() -> None:
    engine, _ = sent_over_two_lanes()
    engine.resend_late(0.21)
    send(engine, 2, 0.21)
    engine.resend_late(0.6)
    assert engine.next_chunk(2, 0.6) is None, "each further copy waits twice as long"
    engine.resend_late(0.62)
    assert span_of(engine.next_chunk(2, 0.62)) == (0, 50)
    engine.resend_late(1.4)
    assert engine.next_chunk(2, 1.4) is None
    engine.resend_late(1.43)
    assert span_of(engine.next_chunk(2, 1.43)) == (0, 50)


def test_patience_does_not_double_for_ever() -> None:
    engine, _ = sent_over_two_lanes()
    now = 0.0
    for _ in range(20):
        now += 0.2 * 64 + 0.01
        engine.resend_late(now)
        assert span_of(engine.next_chunk(2, now)) == (0, 50)


@pytest.mark.parametrize("dies", [1, 2])
def test_whichever_lane_dies_the_span_goes_again(dies: int) -> None:
    engine, tid = sent_over_two_lanes()
    engine.resend_late(0.21)
    send(engine, 2, 0.21)
    engine.lane_lost(dies)
    engine.resend_late(0.62)
    assert span_of(send(engine, 3, 0.62)) == (0, 50)
    engine.receive(m.Ack(((tid, 100, ()),)), 0.63)
    engine.resend_late(9.0)
    assert engine.next_chunk(3, 9.0) is None, "acknowledged is acknowledged"


def test_what_is_acknowledged_before_the_copy_went_is_not_sent_again() -> None:
    engine, tid = sent_over_two_lanes()
    engine.resend_late(0.21)
    engine.receive(m.Ack(((tid, 100, ()),)), 0.22)
    assert engine.next_chunk(2, 0.22) is None
    assert engine.bytes_retransmitted == 0


def test_only_the_tail_goes_again() -> None:
    """While there is more to send, lanes have better to do than to send what may come any moment."""
    engine = make()
    engine.chunk_size = 50
    tid = engine.open(m.MESSAGE, size=200, flow="f")
    engine.receive(m.Credit(((tid, 200),)), 0.0)
    send(engine, 1)
    send(engine, 2)
    engine.resend_late(5.0)
    assert span_of(send(engine, 2, 5.0)) == (100, 150)
    assert span_of(send(engine, 3, 5.0)) == (150, 200)
    assert engine.next_chunk(3, 5.0) is None
    engine.resend_late(5.5)
    assert {span_of(engine.next_chunk(3, 5.5)) for _ in range(3)} == {(0, 50), (50, 100), None}


def test_what_the_credit_ends_with_is_a_tail_too() -> None:
    """A receiver that takes bytes in order grants nothing more before the late ones have come."""
    engine = make()
    engine.chunk_size = 50
    engine.open(m.PIPE, size=None, flow="f")
    engine.offer(1, 1000)
    send(engine, 1)
    send(engine, 2)  # 100 bytes of credit
    engine.resend_late(5.0)
    assert {span_of(engine.next_chunk(3, 5.0)) for _ in range(3)} == {(0, 50), (50, 100), None}


def test_a_single_lane_is_not_asked_twice() -> None:
    engine = make(lanes=1)
    engine.open(m.MESSAGE, size=50, flow="f")
    send(engine, 1)
    engine.resend_late(60.0)
    assert engine.next_chunk(1, 60.0) is None


def test_a_slow_lane_gets_nothing_new_until_it_is_even() -> None:
    engine, tid = sent_over_two_lanes()
    engine.resend_late(0.21)
    send(engine, 2, 0.21)
    engine.open(m.MESSAGE, size=100, flow="g")
    assert not engine.may_send(1)
    assert engine.next_chunk(1, 0.22) is None
    send(engine, 3, 0.22)
    engine.receive(m.Ack(((tid, 100, ()),)), 0.25)
    assert engine.may_send(1)
    send(engine, 1, 0.25)


def test_what_is_asked_for_again_takes_nothing_else_out_of_flight() -> None:
    engine = make()
    tid = engine.open(m.MESSAGE, size=100, flow="f")
    assert span_of(send(engine, 1)) == (0, 100)
    engine.receive(m.Missing(tid, 40, 20), 0.1)
    assert span_of(send(engine, 2, 0.1)) == (40, 60)
    engine.lane_lost(1)
    again = [span_of(engine.next_chunk(3, 0.2)) for _ in range(3)]
    assert again == [(0, 40), (60, 100), None], "and what the second lane has on its way does not go a third time"


@pytest.mark.parametrize("how", ["asked for again", "given up"])
def test_a_lane_is_slow_no_longer_than_something_on_it_is_late(how: str) -> None:
    engine, tid = sent_over_two_lanes()
    engine.resend_late(0.21)
    assert not engine.may_send(1)
    if how == "given up":
        engine.reset(tid, "cancelled", "")
    else:
        engine.receive(m.Missing(tid, 0, 100), 0.22)
    engine.resend_late(0.23)
    assert engine.may_send(1)


def test_lanes_that_are_all_slow_send_all_the_same() -> None:
    engine = make(lanes=2)
    engine.chunk_size = 50
    engine.open(m.MESSAGE, size=100, flow="f")
    send(engine, 1)
    send(engine, 2)
    engine.resend_late(2.0)
    assert engine.may_send(1)
    assert engine.may_send(2)
    engine.lane_joined(3)
    assert not engine.may_send(1), "now there is a better one"
    engine.lane_lost(3)
    assert engine.may_send(1)


def test_a_lane_that_is_stuck_in_sending_does_not_hold_the_end_up() -> None:
    """What it sends was read from the source long ago, and comes by another lane."""
    engine, tid = make(), 1
    engine.chunk_size = 50
    engine.open(m.FILE, size=100, flow="f")
    stuck = engine.next_chunk(1, 0.0)
    send(engine, 2)
    assert stuck is not None
    engine.receive(m.Ack(((tid, 0, ((50, 100),)),)), 0.01)
    engine.resend_late(0.1)
    assert SourceDrained(tid) not in engine.events(), "it may still be read, and change meanwhile"
    stuck.free = True
    engine.resend_late(0.3)
    assert engine.events()[-1] == SourceDrained(tid)
    engine.end(tid)
    assert span_of(send(engine, 2, 0.3)) == (0, 50)
    engine.receive(m.Result(tid, "", ""), 0.4)
    assert engine.events()[-1] == TransferDone(tid, "", "")
    engine.chunk_left(stuck)
    assert engine.events() == []


def test_a_source_that_was_lent_is_drained_when_all_of_it_has_arrived() -> None:
    """The system may read it until then."""
    engine, tid = make(), 1
    engine.open(m.FILE, size=50, flow="f")
    lent = engine.next_chunk(1, 0.0)
    assert lent is not None
    lent.lent = True
    engine.chunk_left(lent)
    assert SourceDrained(tid) not in engine.events()
    engine.receive(m.Ack(((tid, 50, ()),)), 0.1)
    assert engine.events()[-1] == SourceDrained(tid)


def test_a_lane_that_is_stuck_with_what_was_lent_does_not_hold_the_end_up() -> None:
    engine, tid = make(), 1
    engine.chunk_size = 50
    engine.open(m.FILE, size=100, flow="f")
    lent = engine.next_chunk(1, 0.0)
    assert lent is not None
    lent.lent = True
    engine.chunk_left(lent)
    stuck = engine.next_chunk(1, 0.01)
    assert stuck is not None
    stuck.lent = True
    engine.receive(m.Ack(((tid, 50, ()),)), 0.02)
    engine.resend_late(0.5)
    assert span_of(send(engine, 2, 0.5)) == (50, 100)
    assert SourceDrained(tid) not in engine.events(), "it may still be read, and change meanwhile"
    engine.receive(m.Ack(((tid, 100, ()),)), 0.6)
    assert engine.events()[-1] == SourceDrained(tid), "though a lane is stuck with a copy of it"
    engine.end(tid)
    engine.receive(m.Result(tid, "", ""), 0.7)
    engine.resend_late(0.7)
    engine.resend_late(1.7)
    assert LaneOvertaken(1) in engine.events()
    engine.chunk_left(stuck)
    assert engine.events() == [TransferDone(tid, "", "")]


def test_a_source_that_cannot_change_is_drained_when_all_is_handed_out() -> None:
    engine = make()
    tid = engine.open(m.MESSAGE, size=50, flow="f", steady=True)
    stuck = engine.next_chunk(1, 0.0)
    assert stuck is not None
    engine.resend_late(0.05)
    assert engine.events() == [SourceDrained(tid)]
    engine.end(tid)
    engine.resend_late(1.1)
    send(engine, 2, 1.1)
    engine.receive(m.Result(tid, "", ""), 1.2)
    assert TransferDone(tid, "", "") not in engine.events(), "the stuck lane views the message itself"
    engine.resend_late(1.3)
    assert engine.events() == []
    engine.resend_late(2.31)
    assert engine.events() == [LaneOvertaken(1)], "only its end makes it let go"
    engine.lane_lost(1)
    engine.chunk_left(stuck)
    assert engine.events() == [TransferDone(tid, "", "")]


def test_a_chunk_that_was_sent_twice_gives_no_sample() -> None:
    """Karn: the answer may be to either copy; one that takes minutes must not make everything patient."""
    engine, tid = sent_over_two_lanes()
    engine.resend_late(0.21)
    send(engine, 2, 0.21)
    engine.receive(m.Ack(((tid, 100, ()),)), 60.0)
    tid = engine.open(m.MESSAGE, size=50, flow="f")
    send(engine, 1, 60.0)
    engine.resend_late(60.21)
    assert span_of(engine.next_chunk(2, 60.21)) == (0, 50)


# ---- a copy takes a span over ---------------------------------------------------------------------


def test_a_right_to_write_is_given_once() -> None:
    placement = receiving().place(1, 1, 0, 100)
    assert placement.claim()
    assert not placement.claim()


def test_a_copy_takes_over_what_nobody_has_begun_to_write() -> None:
    engine = receiving(100)
    first = engine.place(1, 1, 0, 100)
    copy = engine.copied(engine.place(2, 1, 0, 100))
    assert copy is not None
    assert (copy.verdict, copy.lane) == (Verdict.FILL, 2)
    assert not first.claim(), "the first lane must not write any more"
    engine.placed(copy, intact=True, now=0.0)
    assert engine.copied(first) is None, "its chunk is a copy now, and not needed"
    assert engine.bytes_verified == 100
    engine.receive(m.End(1, 100), 0.0)
    assert engine.events() == [TransferWhole(1, 100)]


def test_the_lane_that_was_overtaken_can_fill_in_when_the_copy_fails() -> None:
    engine = receiving(100)
    first = engine.place(1, 1, 0, 100)
    copy = engine.copied(engine.place(2, 1, 0, 100))
    assert copy is not None
    engine.placed(copy, intact=False, now=0.0)
    assert not first.claim()
    needed = engine.copied(first)
    assert needed is not None
    engine.placed(needed, intact=True, now=0.0)
    assert engine.bytes_verified == 100


def test_a_lane_that_writes_in_place_is_not_overtaken_but_dropped() -> None:
    engine = receiving(100)
    first = engine.place(1, 1, 0, 100)
    assert first.claim(in_place=True)
    assert engine.copied(engine.place(2, 1, 0, 100)) is None
    assert engine.events() == [LaneOvertaken(1)]
    engine.placed(first, intact=False, now=0.0)
    assert engine.messages(0.0) == [m.Missing(1, 0, 100)]


def test_a_lane_that_waits_for_a_disk_is_not_dropped_for_a_copy() -> None:
    engine = receiving(100)
    first = engine.place(1, 1, 0, 100)
    assert first.claim(), "its bytes are here, whole"
    assert engine.copied(engine.place(2, 1, 0, 100)) is None
    assert engine.events() == []
    engine.placed(first, intact=True, now=0.0)
    assert [x for x in engine.messages(0.0) if isinstance(x, m.Missing)] == []
    assert engine.bytes_verified == 100


def test_a_copy_that_is_being_stored_is_not_taken_over_by_another() -> None:
    engine = receiving(100)
    first = engine.place(1, 1, 0, 100)
    copy = engine.copied(engine.place(2, 1, 0, 100))
    assert copy is not None
    assert engine.copied(engine.place(3, 1, 0, 100)) is None
    assert not first.claim()
    assert engine.copied(first) is None
    assert engine.events() == [], "nobody is stuck"
    engine.placed(copy, intact=True, now=0.0)
    assert engine.bytes_verified == 100


def test_a_smaller_copy_takes_a_larger_span_over_and_the_rest_is_asked_for() -> None:
    engine = receiving(100)
    first = engine.place(1, 1, 0, 100)
    copy = engine.copied(engine.place(2, 1, 20, 30))
    assert copy is not None
    engine.placed(copy, intact=True, now=0.0)
    assert not first.claim()
    assert engine.copied(first) is None, "partly held"
    missing = [x for x in engine.messages(0.0) if isinstance(x, m.Missing)]
    assert missing == [m.Missing(1, 0, 20), m.Missing(1, 50, 50)]


def test_an_overtaken_fill_must_not_be_told_as_intact() -> None:
    engine = receiving(100)
    first = engine.place(1, 1, 0, 100)
    engine.copied(engine.place(2, 1, 0, 100))
    engine.placed(first, intact=False, now=0.0)  # no harm
    with pytest.raises(AssertionError, match="was not being filled"):
        engine.placed(first, intact=True, now=0.0)


# ---- files on hold --------------------------------------------------------------------------------


def test_a_file_on_hold_sends_nothing_before_it_knows_what_is_there() -> None:
    engine = make()
    tid = hold(engine)
    assert engine.next_chunk(1, 0.0) is None
    assert engine.events() == []
    engine.receive(m.Opened(tid, ((0, 50), (100, 250)), b""), 0.0)
    engine.receive(m.Credit(((tid, 300),)), 0.0)
    assert [span_of(send(engine, 1)) for _ in range(2)] == [(50, 100), (250, 300)]
    assert engine.next_chunk(1, 0.0) is None
    assert engine.events() == [Progress(tid, 200), SourceDrained(tid)]
    assert (engine.bytes_resumed, engine.bytes_acknowledged, engine.bytes_retransmitted) == (200, 0, 0)


def test_credit_that_overtakes_opened_moves_nothing() -> None:
    """Credit may come over a lane while OPENED waits on a control channel that is gone."""
    engine = make()
    tid = hold(engine)
    engine.receive(m.Credit(((tid, 300),)), 0.0)
    assert engine.next_chunk(1, 0.0) is None, "what the peer has already would be sent twice"
    engine.receive(m.Opened(tid, ((0, 250),), b""), 0.0)
    assert span_of(engine.next_chunk(1, 0.0)) == (250, 300)
    assert engine.next_chunk(1, 0.0) is None


def test_credit_that_overtakes_the_comparison_moves_nothing() -> None:
    engine = make()
    tid = hold(engine)
    engine.receive(m.Opened(tid, (), DIGEST), 0.0)
    engine.receive(m.Credit(((tid, 300),)), 0.0)
    assert engine.next_chunk(1, 0.0) is None
    engine.answer_same(tid, False)
    assert span_of(engine.next_chunk(1, 0.0)) == (0, 100)


def test_a_file_of_which_everything_is_there_is_drained_at_once() -> None:
    engine = make()
    tid = hold(engine)
    engine.receive(m.Opened(tid, ((0, 300),), b""), 0.0)
    assert engine.events() == [Progress(tid, 300), SourceDrained(tid)]
    engine.end(tid)
    engine.receive(m.Result(tid, "", ""), 0.0)
    assert TransferDone(tid, "", "") in engine.events()


@pytest.mark.parametrize("same", [True, False])
def test_a_whole_file_is_compared(same: bool) -> None:
    sender, receiver = make(), offered_on_hold()
    tid = hold(sender)
    receiver.claim(1, DIGEST)
    (opened,) = receiver.messages(0.0)
    assert opened == m.Opened(1, (), DIGEST)
    sender.receive(opened, 0.0)
    assert sender.events() == [SameAsked(tid, DIGEST)]
    assert sender.next_chunk(1, 0.0) is None, "not before the comparison"
    sender.answer_same(tid, same)
    sender.answer_same(tid, same)  # once is enough
    (answer,) = sender.messages(0.0)
    assert answer == m.Same(tid, same)
    receiver.receive(answer, 0.0)
    assert receiver.events() == [SameAnswered(1, same)]
    if same:
        receiver.adopted(1)
        assert sender.events() == [Progress(tid, 300), SourceDrained(tid)]
        sender.end(tid)
        receiver.receive(sender.messages(0.0)[0], 0.0)
        assert receiver.events() == [TransferWhole(1, 300)]
        assert sender.bytes_resumed == receiver.bytes_resumed == 300
    else:
        receiver.accept(1, window=1000)
        (credit,) = receiver.messages(0.0)
        assert credit == m.Credit(((1, 300),)), "and no second OPENED"
        sender.receive(credit, 0.0)
        assert span_of(sender.next_chunk(1, 0.0)) == (0, 100)
        assert sender.bytes_resumed == receiver.bytes_resumed == 0


def test_what_is_accepted_with_an_earlier_part_counts_it_as_held() -> None:
    engine = offered_on_hold()
    engine.accept(1, window=100, held=((0, 120), (200, 300)))
    assert engine.messages(0.0) == [m.Opened(1, ((0, 120), (200, 300)), b""), m.Credit(((1, 300),))]
    assert engine.place(1, 1, 100, 50).verdict is Verdict.COPY
    fill = engine.place(1, 1, 120, 80)
    assert fill.verdict is Verdict.FILL
    engine.receive(m.End(1, 300), 0.0)
    engine.placed(fill, intact=True, now=0.0)
    assert engine.events() == [TransferWhole(1, 300)]
    assert (engine.bytes_verified, engine.bytes_resumed) == (80, 220)


@pytest.mark.parametrize(
    ("held", "digest"),
    [
        pytest.param(((0, 301),), b"", id="past the end"),
        pytest.param(((10, 10),), b"", id="an empty span"),
        pytest.param(((20, 10),), b"", id="backwards"),
        pytest.param(((0, 20), (10, 30)), b"", id="overlapping"),
        pytest.param(((50, 60), (0, 10)), b"", id="out of order"),
        pytest.param((), DIGEST[:31], id="a short digest"),
        pytest.param((), DIGEST + b"x", id="a long digest"),
        pytest.param(((0, 10),), DIGEST, id="spans and a digest"),
    ],
)
def test_an_opened_that_makes_no_sense_is_refused(held: tuple[Span, ...], digest: bytes) -> None:
    engine = make()
    tid = hold(engine)
    with pytest.raises(ProtocolError, match="OPENED"):
        engine.receive(m.Opened(tid, held, digest), 0.0)


def test_opened_comes_once_and_only_where_it_is_awaited() -> None:
    engine = make()
    plain = engine.open(m.FILE, size=10, flow="f")
    with pytest.raises(ProtocolError, match="does not wait"):
        engine.receive(m.Opened(plain, (), b""), 0.0)
    with pytest.raises(ProtocolError, match="never opened"):
        engine.receive(m.Opened(9, (), b""), 0.0)
    tid = engine.open(m.FILE, size=10, flow="f", on_hold=True)
    engine.receive(m.Opened(tid, (), b""), 0.0)
    with pytest.raises(ProtocolError, match="does not wait"):
        engine.receive(m.Opened(tid, (), b""), 0.0)
    cancelled = engine.open(m.FILE, size=10, flow="f", on_hold=True)
    engine.reset(cancelled, "cancelled", "")
    engine.receive(m.Opened(cancelled, (), DIGEST), 0.0)  # they crossed
    assert not [e for e in engine.events() if isinstance(e, SameAsked)]


def test_same_comes_once_and_only_where_it_is_asked_for() -> None:
    engine = offered_on_hold()
    with pytest.raises(ProtocolError, match="not asked"):
        engine.receive(m.Same(1, True), 0.0)
    engine.claim(1, DIGEST)
    engine.receive(m.Same(1, True), 0.0)
    with pytest.raises(ProtocolError, match="not asked"):
        engine.receive(m.Same(1, True), 0.0)


@pytest.mark.parametrize(("kind", "value"), [(m.FILE, 1), (m.FILE, "yes"), (m.MESSAGE, True), (m.PIPE, True)])
def test_hold_is_a_truth_about_a_file(kind: int, value: int | str | bool) -> None:
    with pytest.raises(ProtocolError, match="hold"):
        make().receive(m.Open(1, kind, 10, 0, "", {"hold": value}), 0.0)


def test_data_before_the_answer_is_refused() -> None:
    """The initial credit of a file on hold is none."""
    with pytest.raises(ProtocolError, match="credit"):
        offered_on_hold().place(1, 1, 0, 1)


# ---- without a control channel --------------------------------------------------------------------


def test_what_is_opened_meanwhile_waits_and_what_was_goes_on() -> None:
    engine = make()
    engine.chunk_size = 50
    before = engine.open(m.MESSAGE, size=100, flow="f")
    assert len(engine.messages(0.0)) == 1
    unsaid = engine.open(m.MESSAGE, size=50, flow="f")
    engine.control_lost()
    during = engine.open(m.MESSAGE, size=50, flow="g")
    assert [c.transfer for _ in range(3) if (c := engine.next_chunk(1, 0.0))] == [before, before]
    engine.control_resumed()
    assert [c.transfer for _ in range(3) if (c := engine.next_chunk(1, 0.0))] == [unsaid, during]


def test_reports_go_without_the_rest() -> None:
    engine = receiving(300)
    engine.control_lost()
    engine.placed(engine.place(1, 1, 0, 100), intact=True, now=1.0)
    engine.refuse(1, "storage", "full")
    engine.receive(m.Open(2, m.MESSAGE, 300, 0, "", {}), 1.0)
    engine.accept(2, window=1000)
    engine.placed(engine.place(1, 2, 0, 100), intact=True, now=1.0)
    assert engine.reports(1.0) == [m.Credit(((2, 300),))]
    assert engine.reports(1.0 + ACK_INTERVAL_S) == [m.Ack(((2, 100, ()),))]
    assert engine.reports(9.0) == []
    assert engine.messages(9.0) == [m.Result(1, "storage", "full")]


def test_credit_that_may_be_lost_with_the_connection_or_a_lane_goes_again() -> None:
    """A sender that waits for it sends nothing that would have more told."""
    engine = make()
    for tid in (1, 2, 3):
        engine.receive(m.Open(tid, m.MESSAGE, 300, 0, "", {}), 0.0)
    engine.accept(1, window=1000)
    engine.accept(2, window=1000)
    assert m.Credit(((1, 300), (2, 300))) in engine.messages(0.0)
    engine.refuse(2, "storage", "full")
    engine.control_lost()
    assert engine.reports(1.0) == [m.Credit(((1, 300),))]
    assert engine.reports(2.0) == []
    engine.lane_lost(1)
    assert engine.reports(3.0) == [m.Credit(((1, 300),))]
    engine.control_resumed()
    engine.messages(4.0)
    engine.lane_lost(1)
    assert engine.reports(5.0) == []


def test_the_whole_state_is_told_again_after_the_loss() -> None:
    """What went over lanes in between may have been lost with them."""
    engine = receiving(300)
    engine.placed(engine.place(1, 1, 0, 100), intact=True, now=1.0)
    engine.placed(engine.place(1, 1, 200, 100), intact=True, now=1.0)
    engine.receive(m.Open(2, m.MESSAGE, 300, 0, "", {}), 1.0)
    engine.receive(m.Open(3, m.MESSAGE, 300, 0, "", {}), 1.0)
    engine.accept(2, window=1000)
    engine.control_lost()
    assert engine.reports(2.0)  # over a lane that dies
    engine.control_resumed()
    assert engine.messages(3.0) == [m.Ack(((1, 100, ((200, 300),)),)), m.Credit(((1, 300), (2, 300)))]
    assert engine.messages(4.0) == []


def test_the_state_follows_the_opened_that_explains_it() -> None:
    """An ACK of what was never sent, before OPENED says that it is there, would be a protocol error."""
    sender, receiver = make(), make()
    tid = hold(sender, 300)
    receiver.receive(m.Open(tid, m.FILE, 300, 0, "", {"hold": True}), 0.0)
    receiver.control_lost()
    receiver.accept(tid, window=1000, held=((100, 300),))
    receiver.control_resumed()
    for message in receiver.messages(1.0):
        sender.receive(message, 1.0)
    assert span_of(sender.next_chunk(1, 1.0)) == (0, 100)


def test_any_number_of_spans_is_told_after_the_loss() -> None:
    limits = Limits(max_chunk=1, max_open=8, initial_credit=20_000)
    sender, receiver = Engine(local=limits, peer=limits), Engine(local=limits, peer=limits)
    sender.lane_joined(1)
    spans = {}
    for size, every in ((20_000, 2), (3, 2), (9_000, 3)):
        tid = sender.open(m.MESSAGE, size=size, flow="f")
        receiver.receive(m.Open(tid, m.MESSAGE, size, 0, "", {}), 0.0)
        receiver.accept(tid, window=size)
        for offset in range(0, size, every):
            receiver.placed(receiver.place(1, tid, offset, 1), intact=True, now=0.0)
        spans[tid] = len(range(0, size, every))
    while (chunk := sender.next_chunk(1, 0.0)) is not None:
        sender.chunk_left(chunk)
    receiver.messages(0.0)
    receiver.control_resumed()
    acks = [message for message in receiver.messages(0.0) if not isinstance(message, m.Credit)]
    assert len(acks) > 1
    for ack in acks:
        assert isinstance(ack, m.Ack)
        assert sum(1 + len(beyond) for _, _, beyond in ack.held) <= ACK_ENTRIES
        assert all(len(beyond) <= ACK_SPANS for _, _, beyond in ack.held)
        assert len(m.encode(ack)) < m.MAX_RECORD
        sender.receive(ack, 0.0)
    assert sender.bytes_acknowledged == sum(spans.values())
    sender.lane_joined(2)
    sender.lane_lost(1)
    again = 0
    while (chunk := sender.next_chunk(2, 0.0)) is not None:
        again += chunk.length
    assert again == 20_000 + 3 + 9_000 - sum(spans.values()), "nothing that is held goes again"


# ---- what became of everything --------------------------------------------------------------------


def test_delivery_tells_what_the_peer_has_may_have_and_has_not() -> None:
    engine = make()
    done = [engine.open(m.MESSAGE, size=0, flow="f") for _ in range(3)]
    for tid in done:
        engine.end(tid)
        engine.receive(m.Result(tid, "", ""), 0.0)
    sent = engine.open(m.MESSAGE, size=0, flow="f")
    engine.end(sent)
    half = engine.open(m.MESSAGE, size=100, flow="f")
    send(engine, 1)
    refused = engine.open(m.MESSAGE, size=0, flow="f")
    engine.receive(m.Result(refused, "storage", "full"), 0.0)
    cancelled = engine.open(m.MESSAGE, size=0, flow="f")
    engine.reset(cancelled, "cancelled", "")
    later = engine.open(m.MESSAGE, size=0, flow="f")
    engine.end(later)
    engine.receive(m.Result(later, "", ""), 0.0)
    assert engine.delivery() == Delivery(((1, 4), (later, later + 1)), (sent,), (half,))


def test_nothing_sent_is_nothing_to_tell() -> None:
    assert make().delivery() == Delivery((), (), ())


# ---- a rate limit ---------------------------------------------------------------------------------


def test_a_rate_limit_holds_chunks_back_and_cuts_them() -> None:
    engine = make()
    engine.limit_rate(80_000.0, now=0.0)  # a burst of 4000: chunks of 4096 at most
    engine.open(m.MESSAGE, size=100, flow="f")
    assert engine.paced_until(0.0) is None
    engine.chunk_size = 60
    assert send(engine, 1).length == 60
    assert engine.paced_until(0.0) == pytest.approx(60 / 80_000)
    assert engine.next_chunk(2, 0.0) is None, "in total, not per lane"
    assert engine.has_chunks
    engine.limit_rate(None, now=0.0)
    assert engine.paced_until(0.0) is None
    assert send(engine, 2).length == 40


def test_another_rate_limit_does_not_forget_what_went_under_the_one_before() -> None:
    engine = make()
    engine.limit_rate(100.0, now=0.0)
    engine.open(m.MESSAGE, size=100, flow="f")
    engine.chunk_size = 60
    send(engine, 1)
    engine.limit_rate(1e6, now=0.1)
    assert engine.paced_until(0.1) == pytest.approx(0.6)
    assert engine.next_chunk(2, 0.1) is None
    assert engine.paced_until(0.6) is None


def test_nothing_is_held_back_when_there_is_nothing() -> None:
    engine = make()
    engine.limit_rate(1000.0, now=0.0)
    engine.open(m.MESSAGE, size=100, flow="f")
    send(engine, 1)
    assert engine.paced_until(0.0) is None


def test_a_copy_that_melted_with_what_another_lane_lost_is_not_forgotten_with_its_lane() -> None:
    engine = Engine(local=Limits(100, 4, 1000), peer=Limits(100, 4, 1000))
    for lane in (1, 2, 3):
        engine.lane_joined(lane)
    tid = engine.open(m.MESSAGE, size=100, flow="f")
    engine.chunk_size = 50
    for lane in (1, 2):
        chunk = engine.next_chunk(lane, 0.0)
        assert chunk is not None
        engine.chunk_left(chunk)
    engine.chunk_size = 100
    engine.resend_late(10.0)  # both are late
    engine.lane_lost(2)
    again = engine.next_chunk(3, 10.0)
    assert again is not None and (again.offset, again.length) == (0, 100)
    engine.chunk_left(again)
    engine.lane_lost(3)
    engine.receive(m.Ack(((tid, 50, ()),)), 11.0)  # the first lane's chunk did arrive
    rest = engine.next_chunk(1, 11.0)
    assert rest is not None and (rest.offset, rest.length) == (50, 50), "half of it is forgotten"


def test_a_part_that_is_sent_again_does_not_make_the_rest_forgotten() -> None:
    engine = Engine(local=Limits(100, 4, 1000), peer=Limits(100, 4, 1000))
    engine.lane_joined(1)
    engine.lane_joined(2)
    tid = engine.open(m.MESSAGE, size=100, flow="f")
    engine.chunk_size = 100
    chunk = engine.next_chunk(1, 0.0)
    assert chunk is not None
    engine.chunk_left(chunk)
    engine._outgoing[tid].lost.add(0, 50)  # as a copy cut at other offsets leaves it
    engine._queues.wake(engine._outgoing[tid])
    part = engine.next_chunk(2, 1.0)
    assert part is not None and part.length == 50
    engine.chunk_left(part)
    engine.lane_lost(1)
    rest = engine.next_chunk(2, 2.0)
    assert rest is not None and rest.offset + rest.length == 100, "the other half is forgotten"


# ---- holes ----------------------------------------------------------------------------------------


def tell(sender: Engine, receiver: Engine, now: float) -> None:
    for message in sender.messages(now):
        receiver.receive(message, now)


def test_holes_are_told_of_and_not_sent_also_after_the_control_channel_was_lost() -> None:
    sender, receiver = make(), make()
    tid = sender.open(m.FILE, size=400, flow="f", holes=((0, 100), (200, 400)))
    tell(sender, receiver, 0.0)
    receiver.accept(tid, window=1000)
    tell(receiver, sender, 0.0)
    assert span_of(send(sender, 1)) == (100, 200)
    assert sender.next_chunk(2, 0.0) is None
    receiver.placed(receiver.place(1, tid, 100, 100), intact=True, now=0.0)
    for engine in (sender, receiver):
        engine.control_lost()
        engine.control_resumed()
    tell(receiver, sender, 1.0)
    assert SourceDrained(tid) in sender.events()
    sender.end(tid)
    tell(sender, receiver, 1.0)
    assert TransferWhole(tid, 400) in receiver.events()
    assert (receiver.bytes_verified, receiver.bytes_resumed, sender.bytes_resumed) == (100, 0, 0)


def test_a_file_that_is_one_hole_has_nothing_to_send() -> None:
    sender, receiver = make(), make()
    tid = sender.open(m.FILE, size=400, flow="f", holes=((0, 400),))
    assert sender.next_chunk(1, 0.0) is None
    assert SourceDrained(tid) in sender.events()
    sender.end(tid)
    tell(sender, receiver, 0.0)
    receiver.accept(tid, window=1000)
    assert TransferWhole(tid, 400) in receiver.events()


def test_what_an_earlier_try_left_counts_beside_the_holes() -> None:
    sender, receiver = make(), make()
    tid = sender.open(m.FILE, size=300, flow="f", on_hold=True, holes=((0, 100),))
    tell(sender, receiver, 0.0)
    receiver.accept(tid, window=1000, held=((100, 150),))
    tell(receiver, sender, 0.0)
    assert (sender.bytes_resumed, receiver.bytes_resumed) == (50, 50)
    assert span_of(send(sender, 1)) == (150, 250)


def test_a_hole_that_is_sent_all_the_same_is_dropped() -> None:
    engine = make()
    engine.receive(m.Open(1, m.FILE, 300, 0, "", {"holes": m.SPANS.encode(((0, 100),))}), 0.0)
    engine.accept(1, window=1000)
    assert engine.place(1, 1, 0, 50).verdict is Verdict.COPY
    assert engine.place(1, 1, 50, 100).verdict is Verdict.COPY
    assert engine.place(1, 1, 150, 100).verdict is Verdict.FILL
