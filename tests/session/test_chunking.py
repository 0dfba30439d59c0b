"""Chunks grow on a path that is fast enough, fall back with it, and keep inside memory and what the peer takes."""

from __future__ import annotations

import os
from typing import Any

import pytest

from amst_core.interfaces import PathStats
from amst_core.session.chunking import ChunkTuner
from amst_core.session.loss import LossMeter

MIB = 1 << 20


def run(tuner: ChunkTuner, rate: float, *, start: tuple[float, float] = (0.0, 0.0)) -> tuple[float, float]:
    """A second at ``rate`` (bytes/s), looked at every 0.1 s; where it ended: time, bytes."""
    now, done = start
    for _ in range(10):
        now, done = now + 0.1, done + rate / 10
        tuner.observe(int(done), now)
    return now, done


@pytest.mark.parametrize(
    ("rate", "size"),
    [(0, MIB), (100e6, MIB), (700 * MIB, MIB), (1400 * MIB, 2 * MIB), (2.9e9, 4 * MIB), (100e9, 4 * MIB)],
)
def test_the_size_follows_the_rate(rate: float, size: int) -> None:
    tuner = ChunkTuner(MIB, most=16 * MIB)
    run(tuner, rate)
    assert tuner.size == size


def test_it_goes_down_again() -> None:
    tuner = ChunkTuner(MIB, most=16 * MIB)
    reached = run(tuner, 3e9)
    assert tuner.size == 4 * MIB
    run(tuner, 1e6, start=reached)
    assert tuner.size == MIB


@pytest.mark.parametrize(
    ("configured", "most", "size"), [(MIB, 2 * MIB, 2 * MIB), (MIB, MIB, MIB), (64 << 10, 16 * MIB, 256 << 10)]
)
def test_it_stays_within_bounds(configured: int, most: int, size: int) -> None:
    tuner = ChunkTuner(configured, most=most)
    run(tuner, 100e9)
    assert tuner.size == size


def test_small_changes_of_the_rate_change_nothing() -> None:
    tuner = ChunkTuner(MIB, most=16 * MIB)
    reached = run(tuner, 1400 * MIB)
    before = tuner.size
    for rate in (1300 * MIB, 1500 * MIB):
        reached = run(tuner, rate, start=reached)
        assert tuner.size == before


def test_looking_twice_at_once_says_nothing() -> None:
    tuner = ChunkTuner(MIB, most=16 * MIB)
    tuner.observe(0, 0.0)
    assert not tuner.observe(1 << 40, 0.001)
    assert tuner.size == MIB


# ---- by loss and delay (requirements D3) -----------------------------------------------------------


def steps(tuner: ChunkTuner, loss: float | None, rtt_s: float | None, *, seconds: int, start: float = 0.0) -> list[int]:
    """The sizes in KiB that it takes in so long, looked at every second."""
    sizes = []
    for second in range(seconds):
        if tuner.observe_path(loss, rtt_s, start + second):
            sizes.append(tuner.size >> 10)
    return sizes


def internet() -> ChunkTuner:
    return ChunkTuner(256 << 10, most=512 << 10, least=16 << 10)


def test_much_loss_shrinks_chunks_one_step_in_five_seconds() -> None:
    assert steps(internet(), 0.06, 0.05, seconds=11) == [128, 64, 32]
    assert steps(internet(), 0.06, 0.05, seconds=60) == [128, 64, 32, 16], "and no further"


def test_little_loss_on_a_short_way_lets_them_grow() -> None:
    tuner = internet()
    assert steps(tuner, 0.06, 0.05, seconds=6) == [128, 64]
    assert steps(tuner, 0.005, 0.05, seconds=60, start=100) == [128, 256, 512]


@pytest.mark.parametrize(("loss", "rtt_s"), [(0.03, 0.05), (0.005, 0.1), (0.005, None), (None, 0.05)])
def test_between_and_where_nothing_is_known_they_stay(loss: float | None, rtt_s: float | None) -> None:
    assert steps(internet(), loss, rtt_s, seconds=30) == []


def test_they_are_never_so_short_that_their_number_limits() -> None:
    tuner = internet()
    steps(tuner, 0.06, 0.05, seconds=60)
    run(tuner, 700 * (64 << 10))
    assert tuner.size == 64 << 10


def test_without_a_least_size_loss_changes_nothing() -> None:
    tuner = ChunkTuner(MIB, most=MIB)
    assert not tuner.follows_path
    assert steps(tuner, 0.5, 0.05, seconds=30) == []


def test_loss_is_of_what_was_sent_since_the_last_answer() -> None:
    meter = LossMeter()

    def look(**lanes: tuple[int | None, int | None]) -> float | None:
        paths = enumerate(PathStats(segments_sent=sent, segments_retransmitted=again) for sent, again in lanes.values())
        return meter.look(dict(paths))

    assert look(a=(5000, 5000), b=(0, 0)) is None, "what was before the first look does not count"
    assert look(a=(5900, 5009), b=(0, 0)) is None, "too little to tell"
    assert look(a=(6000, 5010), b=(1000, 90)) == pytest.approx(0.05)
    assert look(a=(7000, 5010), b=(None, None)) == 0.0


@pytest.mark.needs_transport
@pytest.mark.parametrize("plaintext", [False, True])
def test_long_chunks_carry_what_short_ones_did(net: Any, plaintext: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine can do: every look finds the path fast."""
    monkeypatch.setattr("amst_core.session.chunking._PER_SECOND", 1e-6)
    pair = net.pair(streams=2, plaintext=plaintext)
    longest = 0
    for _ in range(50):
        sent = os.urandom(9 * MIB + 7)
        ticket = pair.near.send(sent)
        assert bytes(pair.far.recv(timeout=20)) == sent
        ticket.wait(20)
        pair.near.core.look_for_late(pair.near.core._late_looked_at + 1)
        longest = max(longest, pair.near.core.engine.chunk_size)
        if longest == 4 * MIB:
            break
    assert longest == 4 * MIB


@pytest.mark.needs_transport
def test_chunks_times_streams_stay_inside_the_scratch_memory(net: Any) -> None:
    pair = net.pair(streams=8)
    core = pair.near.core
    with core.lock:
        core._chunks.size = 4 * MIB
        core._fit_chunks_locked()
        assert core.engine.chunk_size * 8 <= core.send_pool.limit
