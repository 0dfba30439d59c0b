"""Which mode a session begins with, and what that means."""

from __future__ import annotations

import pytest

from amst_core.api.profiles import first_mode, profile
from amst_core.interfaces import Mode
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
        (Mode.HYBRID, (16, 1024 * KIB, 4096 * KIB, None)),
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
