"""Which mode a session begins with, and what that means."""

from __future__ import annotations

import pytest

from amst_core.interfaces import Mode
from amst_core.modes import agreed_streams, first_mode, first_reason, profile
from amst_core.pacing import Range
from amst_core.settings.load import load_settings

KIB = 1 << 10


@pytest.mark.parametrize(
    ("rtt_s", "mode"), [(None, "datacenter"), (0.0001, "datacenter"), (0.05, "datacenter"), (0.0501, "internet")]
)
def test_the_round_trip_decides(rtt_s: float | None, mode: str) -> None:
    assert first_mode(rtt_s) is Mode(mode)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (Mode.DATACENTER, (16, 1024 * KIB, 4096 * KIB, None)),
        (Mode.INTERNET, (8, 256 * KIB, 512 * KIB, 16 * KIB)),
        (Mode.HYBRID, (10, 256 * KIB, 512 * KIB, 16 * KIB)),
    ],
)
def test_by_default(mode: Mode, expected: tuple[object, ...]) -> None:
    found = profile(mode, load_settings(environ={}))
    assert (found.streams.start, found.chunk_size, found.longest_chunk, found.shortest_chunk) == expected
    assert found.mode is mode


def test_settings_are_kept_to() -> None:
    asked = {"transport.modes.internet_streams": 12, "transport.amst.chunk_size_kb": 64}
    found = profile(Mode.INTERNET, load_settings(environ={}, overrides=asked))
    assert (found.streams.start, found.chunk_size) == (12, 64 * KIB)


@pytest.mark.parametrize(("bound", "streams"), [("max_streams", 4), ("min_streams", 20)])
def test_the_default_moves_into_the_bounds(bound: str, streams: int) -> None:
    found = load_settings(environ={}, overrides={f"transport.amst.{bound}": streams})
    assert profile(Mode.INTERNET, found).streams.start == streams


def test_nothing_is_tuned_where_the_settings_say_so() -> None:
    settings = load_settings(environ={}, overrides={"transport.amst.auto_tune": False})
    assert profile(Mode.INTERNET, settings).streams == Range(8, 8, 8)
    assert agreed_streams(Range(8, 4, 16), settings) == Range(8, 8, 8)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({}, Range(8, 4, 16)),
        ({"max_streams": 64}, Range(8, 4, 64)),
        ({"max_streams": 3}, Range(3, 3, 3)),
        ({"max_streams": 500}, Range(8, 4, 256)),
        ({"streams": 20}, Range(20, 20, 20)),
    ],
    ids=str,
)
def test_how_many_streams_there_may_be_on_the_internet(asked: dict[str, int], found: Range) -> None:
    assert profile(Mode.INTERNET, load_settings(environ={}), **asked).streams == found


def test_hybrid_has_the_streams_of_the_internet_and_two_for_what_is_short() -> None:
    assert profile(Mode.HYBRID, load_settings(environ={})).streams == Range(10, 6, 18)


@pytest.mark.parametrize(
    ("rtt_s", "why"),
    [
        (None, "the round trip is not known"),
        (0.05, "the round trip of 50ms is not above 50ms"),
        (0.0801, "the round trip of 80.1ms is above 50ms"),
    ],
)
def test_why_it_begins_so(rtt_s: float | None, why: str) -> None:
    assert first_reason(rtt_s) == why


def test_a_datacenter_has_from_one_to_all() -> None:
    assert profile(Mode.DATACENTER, load_settings(environ={})).streams == Range(16, 1, 256)
    few = load_settings(environ={}, overrides={"transport.amst.min_streams": 4, "transport.amst.max_streams": 8})
    assert profile(Mode.DATACENTER, few).streams == Range(8, 4, 8)


@pytest.mark.parametrize(
    ("wish", "found"),
    [
        (Range(8, 4, 16), Range(8, 4, 10)),
        (Range(2, 2, 2), Range(2, 2, 2)),
        (Range(64, 64, 64), Range(10, 10, 10)),
        (Range(0, 0, 0), Range(1, 1, 1)),
    ],
    ids=["a range", "a number", "more than there may be", "none"],
)
def test_a_server_has_what_the_client_wishes_within_its_own_bounds(wish: Range, found: Range) -> None:
    settings = load_settings(environ={}, overrides={"transport.amst.max_streams": 10})
    assert agreed_streams(wish, settings) == found
