"""How a rate is shared out: max-min fairness, whatever the lanes want."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from amst_core.pacing import shares

rates = st.floats(0, 1e10)
wanted = st.dictionaries(st.integers(0, 100), rates, min_size=1, max_size=80)


def sent(wants: Mapping[int, float], cap: float) -> float:
    return sum(min(want, cap) for want in wants.values())


@example(8.0, {0: 1.0, 1: 1.0, 2: 5.0})
@given(rates, wanted)
def test_together_they_send_all_that_is_there_or_all_they_want(total: float, wants: dict[int, float]) -> None:
    assert sent(wants, shares(total, wants)) == pytest.approx(min(total, sum(wants.values())))


@given(rates, wanted)
def test_where_they_want_more_than_there_is_they_send_what_is_there(total: float, wants: dict[int, float]) -> None:
    wants[-1] = total  # so there is no more than they want
    assert sent(wants, shares(total, wants)) == pytest.approx(total)


@given(rates, wanted)
def test_they_never_send_more_than_there_is(total: float, wants: dict[int, float]) -> None:
    assert sent(wants, shares(total, wants)) <= total * (1 + 1e-9)


@given(rates, wanted)
def test_no_lane_is_held_below_its_part(total: float, wants: dict[int, float]) -> None:
    assert shares(total, wants) >= total / len(wants) * (1 - 1e-9)


@given(rates, wanted)
def test_lanes_that_are_served_leave_their_room_to_one_that_wakes_up(total: float, wants: dict[int, float]) -> None:
    """The cap is no less than what the others leave."""
    assert shares(total, wants) >= (total - sum(wants.values())) * (1 - 1e-9)


@given(rates, wanted, st.integers(0, 100), rates)
def test_one_that_wants_more_leaves_no_more_to_others(
    total: float, wants: dict[int, float], lane: int, more: float
) -> None:
    cap = shares(total, {**wants, -1: 1e10})  # all of it is wanted
    greedier = {**wants, lane: wants.get(lane, 0.0) + more}
    assert shares(total, {**greedier, -1: 1e10}) <= cap * (1 + 1e-9)


@pytest.mark.parametrize(
    ("total", "wants", "cap"),
    [
        (90.0, [100, 100, 100], 30),
        (90.0, [0, 100, 100], 45),
        (90.0, [10, 20, 100], 60),
        (90.0, [0, 0, 0], 90),
        (90.0, [10, 10, 10], 70),
        (90.0, [], 90),
        (0.0, [10, 10], 0),
    ],
    ids=["alike", "one idle", "each wants more", "all idle", "room for all", "none", "nothing to share"],
)
def test_what_each_may_send(total: float, wants: list[float], cap: float) -> None:
    assert shares(total, dict(enumerate(wants))) == pytest.approx(cap)
    assert shares(total, dict(enumerate(reversed(wants)))) == pytest.approx(cap)
