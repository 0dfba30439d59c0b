"""No more lanes at work than help, and never fewer than there are while those at work are stuck."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest

from amst_core.interfaces import PathStats
from amst_core.session.crew import LEAST, PER_CORE, SHORT_PATH_S, STUCK_S, Crew

MIB = 1 << 20
MOST = max(LEAST, PER_CORE * len(os.sched_getaffinity(0)))


def crew(*, lanes: int, at: float = 0.0) -> Crew:
    made = Crew()
    made.found_path(SHORT_PATH_S / 2)
    for lane in range(lanes):
        made.began(lane, at)
    return made


def test_a_short_path_has_enough_of_some() -> None:
    assert not crew(lanes=MOST - 1).is_full(0.0)
    assert crew(lanes=MOST).is_full(0.0)


@pytest.mark.parametrize("min_rtt_s", [None, SHORT_PATH_S, 0.1])
def test_a_long_or_unknown_path_has_never_enough(min_rtt_s: float | None) -> None:
    made = crew(lanes=500)
    made.found_path(min_rtt_s)
    assert not made.is_full(0.0)


def test_who_has_done_makes_room() -> None:
    made = crew(lanes=MOST)
    made.ended(0)
    assert not made.is_full(0.0)
    made.ended(0)  # again: nothing
    made.began(0, 0.0)
    assert made.is_full(0.0)


def test_who_is_stuck_does_not_count() -> None:
    made = crew(lanes=MOST)
    assert made.is_full(STUCK_S * 0.9)
    assert not made.is_full(STUCK_S)
    for lane in range(MOST, 2 * MOST):
        made.began(lane, STUCK_S)
    assert made.is_full(STUCK_S)


def test_a_new_chunk_begins_anew() -> None:
    made = crew(lanes=MOST)
    for lane in range(MOST):
        made.ended(lane)
        made.began(lane, STUCK_S)
    assert made.is_full(STUCK_S)


@pytest.mark.needs_transport
def test_lanes_that_hang_are_made_up_for(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as may be at work hang in the middle of their chunks; the others finish everything else."""
    pair = net.pair(streams=MOST + 2, plaintext=True)
    core = pair.near.core
    go_on = threading.Event()
    hung: set[int] = set()

    def hanging(send: Any, lane: int) -> Any:
        def send_frame(header: bytes, payload: memoryview) -> None:
            if payload.nbytes and len(hung) < MOST:
                hung.add(lane)
                assert go_on.wait(60)
            send(header, payload)

        return send_frame

    for id, worker in core.lanes.items():
        monkeypatch.setattr(worker.lane, "send_frame", hanging(worker.lane.send_frame, id))
        monkeypatch.setattr(worker.lane, "path_stats", lambda: PathStats(min_rtt_s=1e-5))
    core._crew.found_path(1e-5)
    sent = os.urandom(MIB)
    first = [pair.near.send(sent) for _ in range(MOST)]
    net.wait_until(lambda: len(hung) == MOST, "enough of them to hang")
    second = [pair.near.send(sent) for _ in range(20)]
    for ticket in second:
        ticket.wait(60)
    go_on.set()
    for ticket in first:
        ticket.wait(60)


@pytest.mark.needs_transport
def test_on_a_short_path_few_lanes_do_the_work(net: Any) -> None:
    pair = net.pair(streams=4 * MOST, plaintext=True)
    core = pair.near.core
    at_work: list[int] = []
    began = core._crew.began

    def counting(lane: int, now: float) -> None:
        began(lane, now)
        at_work.append(sum(now - since < STUCK_S for since in core._crew._since.values()))

    core._crew.began = counting
    core._crew.found_path(1e-5)
    for ticket in [pair.near.send(os.urandom(8 * MIB)) for _ in range(20)]:
        pair.far.recv(timeout=60)
        ticket.wait(60)
    assert 1 <= max(at_work) <= MOST
