"""Short transfers apart from long ones: which lane is given what, and that neither starves."""

from __future__ import annotations

from amst_core.engine import Chunk, Engine, Limits
from amst_core.engine.outgoing import SHORT
from amst_core.wire import messages as m

KIB = 1 << 10
LIMITS = Limits(max_chunk=256 * KIB, max_open=100, initial_credit=1 << 40)
LANES = range(1, 7)
EXPRESS = (1, 2)
LONG, SMALL = 64 << 20, 4 * KIB


def make() -> Engine:
    engine = Engine(local=LIMITS, peer=LIMITS)
    for lane in LANES:
        engine.lane_joined(lane)
    return engine


def send(engine: Engine, size: int, flow: str) -> int:
    return engine.open(m.MESSAGE, size=size, flow=flow, steady=True)


def take(engine: Engine, lane: int) -> Chunk | None:
    has = engine.has_chunk_for(lane)
    chunk = engine.next_chunk(lane, 0.0)
    assert has == (chunk is not None)
    return chunk


def test_in_one_line_every_lane_takes_everything() -> None:
    engine = make()
    long, short = send(engine, LONG, "long"), send(engine, SMALL, "short")
    assert [chunk.transfer for lane in (1, 3) if (chunk := take(engine, lane))] == [long, short]


def test_express_lanes_take_what_is_short_and_the_others_the_rest() -> None:
    engine = make()
    engine.set_express(EXPRESS)
    long, short = send(engine, LONG, "long"), send(engine, SMALL, "short")
    chunk = take(engine, 3)
    assert chunk is not None and chunk.transfer == long
    chunk = take(engine, 1)
    assert chunk is not None and chunk.transfer == short
    assert take(engine, 2) is None, "there is nothing more that is short"


def test_a_transfer_is_short_below_a_mebibyte() -> None:
    engine = make()
    engine.set_express(EXPRESS)
    send(engine, SHORT, "long")
    pipe = engine.open(m.PIPE, size=None, flow="pipe")
    engine.offer(pipe, 10, last=True)
    assert take(engine, 1) is None
    send(engine, SHORT - 1, "short")
    assert take(engine, 1) is not None


def test_others_help_only_while_all_express_lanes_are_at_work() -> None:
    engine = make()
    engine.set_express(EXPRESS)
    for _ in range(4):
        send(engine, SMALL, "short")
    assert take(engine, 3) is None, "it could hold up what an express lane is free for"
    first = take(engine, 1)
    assert take(engine, 3) is None
    assert take(engine, 2) is not None
    assert take(engine, 3) is not None
    assert first is not None
    engine.chunk_left(first)
    assert take(engine, 4) is None, "the first one is free again"


def test_a_slow_express_lane_is_not_waited_for() -> None:
    engine = make()
    engine.set_express([1])
    engine.lane_left(1)  # it takes no more chunks, and nobody has said yet which is express in its place
    send(engine, SMALL, "short")
    assert take(engine, 3) is not None


def test_long_transfers_are_not_starved_by_those_who_help() -> None:
    engine = make()
    engine.set_express(EXPRESS)
    long = send(engine, LONG, "long")
    for _ in range(60):
        send(engine, SMALL, "short")
    assert take(engine, 1) is not None and take(engine, 2) is not None
    taken = [chunk.transfer for _ in range(27) if (chunk := take(engine, 3))]
    assert len(taken) == 27
    assert [at for at, transfer in enumerate(taken) if transfer == long] == [8, 17, 26]


def test_what_waits_changes_the_line_with_the_lanes() -> None:
    engine = make()
    long, short = send(engine, LONG, "long"), send(engine, SMALL, "short")
    engine.set_express(EXPRESS)
    chunk = take(engine, 1)
    assert chunk is not None and chunk.transfer == short
    other = send(engine, SMALL, "short")
    engine.set_express(())
    assert [chunk.transfer for lane in (4, 5, 2) if (chunk := take(engine, lane))] == [long, other, long]


def test_what_was_lost_goes_again_by_its_own_line() -> None:
    engine = make()
    engine.set_express(EXPRESS)
    short = send(engine, SMALL, "short")
    send(engine, LONG, "long")
    chunk = take(engine, 1)
    assert chunk is not None
    engine.chunk_left(chunk)
    engine.lane_lost(1)
    engine.set_express([2, 3])
    again = take(engine, 2)
    assert again is not None and (again.transfer, again.again) == (short, True)
