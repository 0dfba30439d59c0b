"""Transfers of unknown size: what is offered bit by bit, kept until it is released, and taken in order."""

from __future__ import annotations

import pytest

from amst_core.engine import Chunk, Engine, Limits, Verdict
from amst_core.engine.events import PrefixGrew, SourceDrained, SourceReleased, TransferWhole
from amst_core.errors import ProtocolError
from amst_core.wire import messages as m

LIMITS = Limits(max_chunk=100, max_open=8, initial_credit=1000)


def make(lanes: int = 2) -> Engine:
    engine = Engine(local=LIMITS, peer=LIMITS)
    for lane in range(1, lanes + 1):
        engine.lane_joined(lane)
    return engine


def opened(engine: Engine) -> int:
    pipe = engine.open(m.PIPE, size=None, flow="f", steady=True)
    engine.messages(0.0)
    assert not engine.events()
    return pipe


def take(engine: Engine, lane: int = 1) -> Chunk:
    chunk = engine.next_chunk(lane, 0.0)
    assert chunk is not None
    return chunk


def of(engine: Engine, kind: type) -> list[object]:
    return [event for event in engine.events() if isinstance(event, kind)]


def receiving() -> Engine:
    engine = make()
    engine.receive(m.Open(1, m.PIPE, m.SIZE_UNKNOWN, 0, "", {}), 0.0)
    engine.accept(1, window=None, ordered=True)
    engine.events()
    return engine


def fill(engine: Engine, start: int, end: int, *, intact: bool = True) -> None:
    placement = engine.place(1, 1, start, end - start)
    assert placement.verdict is Verdict.FILL
    engine.placed(placement, intact=intact, now=0.0)


def test_its_size_is_known_once_the_last_byte_is_offered() -> None:
    engine = make()
    pipe = opened(engine)
    engine.offer(pipe, 150)
    engine.chunk_left(take(engine))
    engine.offer(pipe, 150, last=True)
    assert not engine.events() and not engine.messages(0.0), "END comes when every byte has been handed out"
    engine.chunk_left(take(engine))
    assert of(engine, SourceDrained) == [SourceDrained(pipe)]
    engine.end(pipe)
    assert engine.messages(0.0) == [m.End(pipe, 150)]


def test_an_empty_one_is_drained_when_its_end_is_known() -> None:
    engine = make()
    pipe = opened(engine)
    engine.offer(pipe, 0, last=True)
    assert of(engine, SourceDrained) == [SourceDrained(pipe)]


def test_behind_the_last_nothing_is_offered() -> None:
    engine = make()
    pipe = opened(engine)
    engine.offer(pipe, 10, last=True)
    engine.offer(pipe, 20)
    assert take(engine).length == 10
    assert engine.next_chunk(1, 0.0) is None


def test_chunks_end_where_blocks_do() -> None:
    """So a source that keeps blocks of that size need not put a chunk together from two."""
    engine = make()
    pipe = opened(engine)
    engine.offer(pipe, 30)
    assert (take(engine).offset, engine.next_chunk(1, 0.0)) == (0, None)
    engine.offer(pipe, 250)
    chunks = [take(engine) for _ in range(3)]
    assert [(chunk.offset, chunk.length) for chunk in chunks] == [(30, 70), (100, 100), (200, 50)]


def test_bytes_are_released_from_the_start_when_the_peer_holds_them_and_no_lane_reads_them() -> None:
    engine = make()
    pipe = opened(engine)
    engine.offer(pipe, 300)
    first, second, third = take(engine), take(engine, 2), take(engine)
    engine.chunk_left(second)
    engine.chunk_left(third)
    engine.receive(m.Ack(((pipe, 0, ((100, 300),)),)), 0.0)
    assert not of(engine, SourceReleased), "what is held behind a gap does not count"
    engine.receive(m.Ack(((pipe, 300, ()),)), 0.0)
    assert not of(engine, SourceReleased), "a lane still sends the first chunk from where it lies"
    engine.chunk_left(first)
    assert of(engine, SourceReleased) == [SourceReleased(pipe, 300)]


def test_a_chunk_that_was_read_into_a_buffer_does_not_hold_its_bytes() -> None:
    engine = make()
    pipe = opened(engine)
    engine.offer(pipe, 100)
    take(engine).free = True
    engine.receive(m.Ack(((pipe, 60, ()),)), 0.0)
    assert of(engine, SourceReleased) == [SourceReleased(pipe, 60)]


def test_pipes_of_one_flow_take_turns() -> None:
    """The first one must not keep the others waiting for as long as it has something to send."""
    engine = make()
    pipes = [opened(engine), opened(engine)]
    for pipe in pipes:
        engine.offer(pipe, 300)
    assert [take(engine).transfer for _ in range(4)] == [*pipes, *pipes]


def test_the_prefix_is_told_as_it_grows_and_before_the_whole() -> None:
    engine = receiving()
    fill(engine, 100, 200)
    assert not of(engine, PrefixGrew)
    fill(engine, 0, 100, intact=False)
    assert not of(engine, PrefixGrew)
    fill(engine, 0, 100)
    assert of(engine, PrefixGrew) == [PrefixGrew(1, 200)]
    engine.receive(m.End(1, 250), 0.0)
    fill(engine, 200, 250)
    assert engine.events() == [PrefixGrew(1, 250), TransferWhole(1, 250)]


def test_it_may_send_what_is_granted_and_not_a_byte_more() -> None:
    engine = receiving()
    with pytest.raises(ProtocolError, match="passes its credit"):
        engine.place(1, 1, 950, 51)
    engine.grant(1, 1001)
    assert engine.place(1, 1, 950, 51).verdict is Verdict.FILL


def test_a_pipe_of_known_size_is_none() -> None:
    with pytest.raises(ProtocolError, match="nobody knows that beforehand"):
        make().receive(m.Open(1, m.PIPE, 10, 0, "", {}), 0.0)


def test_a_file_of_unknown_size_cannot_be_on_hold() -> None:
    with pytest.raises(ProtocolError, match="hold"):
        make().receive(m.Open(1, m.FILE, m.SIZE_UNKNOWN, 0, "", {"hold": True}), 0.0)
