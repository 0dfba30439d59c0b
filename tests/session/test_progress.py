"""Which late lanes are slow and which are stuck."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from amst_core.interfaces import PathStats
from amst_core.session.progress import WATCHED_S, LaneProgress


class Late:
    """A lane with a late chunk."""

    def __init__(self, id: int, *, handed: int, acknowledged: int | None = 0) -> None:
        self.id, self.bytes_handed, self.acknowledged = id, handed, acknowledged
        self.lane: Any = SimpleNamespace(path_stats=lambda: PathStats(bytes_acknowledged=self.acknowledged))


def test_a_lane_is_watched_for_a_while_before_it_is_judged():
    progress, stuck = LaneProgress(), Late(1, handed=1000)
    assert progress.soon_through([stuck], 1.0, 10.0) == {1}
    assert progress.soon_through([stuck], 1.0, 10.0 + WATCHED_S / 2) == {1}
    assert progress.soon_through([stuck], 1.0, 10.0 + WATCHED_S) == set()


def test_one_that_moves_is_soon_through_if_it_is_faster_than_a_copy():
    progress, lane = LaneProgress(), Late(1, handed=1_000_000)
    progress.soon_through([lane], 1.0, 0.0)
    lane.acknowledged = 500_000
    assert progress.soon_through([lane], 0.9, 1.0) == set(), "at 500 kB/s the rest takes a second"
    assert progress.soon_through([lane], 1.0, 1.0) == {1}


def test_each_is_judged_by_itself():
    progress, lanes = LaneProgress(), [Late(1, handed=100), Late(2, handed=100)]
    progress.soon_through(lanes, 1.0, 0.0)
    lanes[1].acknowledged = 90
    assert progress.soon_through(lanes, 1.0, 1.0) == {2}


def test_where_the_path_took_everything_it_is_the_peer_who_does_not_answer():
    progress, lane = LaneProgress(), Late(1, handed=1000, acknowledged=1000)
    progress.soon_through([lane], 1.0, 0.0)
    assert progress.soon_through([lane], 1.0, 1.0) == set()


def test_a_lane_that_tells_nothing_gets_no_patience():
    assert LaneProgress().soon_through([Late(1, handed=1000, acknowledged=None)], 1.0, 0.0) == set()


def test_who_was_not_late_for_a_moment_is_watched_anew():
    progress, lane = LaneProgress(), Late(1, handed=1000)
    progress.soon_through([lane], 1.0, 0.0)
    progress.soon_through([], 1.0, 0.1)
    assert progress.soon_through([lane], 1.0, 1.0) == {1}
