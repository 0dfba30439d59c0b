"""Chunks grow on a path that is fast enough, fall back with it, and keep inside memory and what the peer takes.

Those of a lane that is worse than the others are shorter than theirs.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from amst_core.interfaces import Lane, PathStats
from amst_core.session.chunking import LEAST, ChunkTuner, LaneChunks, LaneLook
from amst_core.session.loss import LossMeter

MIB = 1 << 20
KIB = 1 << 10


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


@pytest.mark.needs_transport
def test_the_reason_for_shorter_chunks_is_told(net: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "amst.session")
    core = net.pair(streams=2).near.core
    core.bound_chunks(64 * KIB)
    assert core.engine.chunk_size == 64 * KIB
    core.bound_chunks(64 * MIB)
    with core.lock:
        core._chunks.size = 64 * MIB
        core._fit_chunks_locked()
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("chunks of ")]
    assert len(told) == 2
    assert told[0] == "chunks of 64 KiB for 2 streams, for what a stream has taken on cannot go by another"
    assert told[1].endswith(" KiB for 2 streams, to fit limits.memory")


# ---- lane by lane ----------------------------------------------------------------------------------


class Lanes:
    """Lanes that move bytes at their rates, and lose shares of their segments; looked at once a second."""

    def __init__(self, rates: Mapping[int, float], *, size: int = 256 * KIB, counts_loss: bool = True) -> None:
        self.rates = dict(rates)
        self.loss = dict.fromkeys(rates, 0.0)
        self.idle: set[int] = set()
        self.size = size
        self.chunks = LaneChunks()
        self.now = 1000.0
        self._counts_loss = counts_loss
        self._moved: dict[int, float] = {}
        self._sent: dict[int, float] = {}
        self._again: dict[int, float] = {}

    def go_on(self, seconds: int) -> list[dict[int, int]]:
        """The sizes in KiB of lanes with shorter chunks, each time that they change."""
        found = []
        for _ in range(seconds):
            looks = {}
            for id, rate in self.rates.items():
                self._moved[id] = self._moved.get(id, 0.0) + rate
                self._sent[id] = self._sent.get(id, 0.0) + 1000
                self._again[id] = self._again.get(id, 0.0) + 1000 * self.loss.get(id, 0.0)
                path = PathStats(bytes_acknowledged=int(self._moved[id]))
                if self._counts_loss:
                    counts = {"segments_sent": int(self._sent[id]), "segments_retransmitted": int(self._again[id])}
                    path = replace(path, **counts)
                looks[id] = LaneLook(path, 0, id in self.idle)
            if self.chunks.observe(looks, self.size, self.now):
                found.append(self.sizes)
            self.now += 1
        return found

    @property
    def sizes(self) -> dict[int, int]:
        return {id: size // KIB for id, size in self.chunks.sizes(self.size).items()}


def test_lanes_that_are_alike_have_the_same() -> None:
    lanes = Lanes({1: 1e6, 2: 2e6, 3: 0.6e6, 4: 1.4e6})
    lanes.loss = {1: 0.08, 2: 0.06, 3: 0.11, 4: 0.09}
    assert lanes.go_on(60) == [] and lanes.sizes == {}


def test_one_that_is_far_slower_gets_what_takes_it_little_longer() -> None:
    lanes = Lanes({1: 1e6, 2: 1e6, 3: 1e6, 4: 0.07e6})
    assert lanes.go_on(60) == [{4: 128}, {4: 64}], "a fourteenth as fast, a quarter as long"


def test_one_step_in_five_seconds() -> None:
    lanes = Lanes({1: 1e6, 2: 1e6, 3: 0.01e6})
    assert lanes.go_on(5) == []
    assert lanes.go_on(5) == [{3: 128}]
    assert lanes.go_on(5) == [{3: 64}]


@pytest.mark.parametrize("rates", [{1: 1e6, 2: 0.07e6}, {1: 1e6, 2: 0.07e6, 3: 1e6, 4: 0.07e6}])
def test_the_faster_half_is_the_measure(rates: dict[int, float]) -> None:
    lanes = Lanes(rates)
    lanes.go_on(60)
    assert lanes.sizes == {id: 64 for id, rate in rates.items() if rate < 1e6}


def test_a_lane_on_which_nothing_moves_gets_the_shortest() -> None:
    lanes = Lanes({1: 1e6, 2: 1e6, 3: 0.0})
    lanes.go_on(60)
    assert lanes.sizes == {3: LEAST // KIB}


def test_where_nothing_moves_at_all_none_is_worse() -> None:
    assert Lanes({1: 0.0, 2: 0.0}).go_on(60) == []


def test_a_slow_lane_that_its_chunks_do_not_occupy_for_long_keeps_them() -> None:
    assert Lanes({1: 1e9, 2: 1e9, 3: 50e6}, size=MIB).go_on(60) == []


def test_when_it_is_as_fast_as_the_others_again_its_chunks_are_as_long() -> None:
    lanes = Lanes({1: 1e6, 2: 1e6, 3: 0.07e6})
    lanes.go_on(60)
    assert lanes.sizes == {3: 64}
    lanes.rates[3] = 0.9e6
    assert lanes.go_on(60) == [{3: 128}, {}]


def test_when_the_fast_ones_have_gone_it_is_as_good_as_any() -> None:
    lanes = Lanes({1: 1e6, 2: 1e6, 3: 0.07e6})
    lanes.go_on(60)
    assert lanes.sizes
    lanes.rates = {3: 0.07e6}
    lanes.go_on(60)
    assert lanes.sizes == {}


def test_a_rate_that_varies_by_a_half_changes_a_size_once_at_most() -> None:
    lanes = Lanes({1: 1e6, 2: 1e6, 3: 0.25e6})
    changes = []
    for turn in range(20):
        lanes.rates[3] = 0.16e6 if turn % 2 else 0.3e6
        changes += lanes.go_on(5)
    assert changes == [{3: 128}]


def test_who_has_nothing_to_do_is_not_slow() -> None:
    lanes = Lanes({1: 1e6, 2: 1e6, 3: 0.01e6})
    lanes.idle = {3}
    assert lanes.go_on(60) == []


def test_a_pause_of_the_session_is_no_slowness() -> None:
    lanes = Lanes({1: 1e9, 2: 1e9, 3: 50e6}, size=MIB)
    lanes.go_on(7)
    lanes.now += 1000
    assert lanes.go_on(7) == []


def test_a_lane_that_came_late_is_judged_from_the_next_window_on() -> None:
    lanes = Lanes({1: 1e6, 2: 1e6})
    lanes.go_on(4)
    lanes.rates[3] = 1e6  # a second's worth when the window ends
    lanes.loss[3] = 0.0
    assert lanes.go_on(30) == []


def test_one_that_loses_much_gets_shorter_chunks_down_to_the_least_and_longer_ones_when_it_is_over() -> None:
    lanes = Lanes(dict.fromkeys((1, 2, 3), 0.2e6))
    lanes.loss[2] = 0.1
    assert lanes.go_on(60) == [{2: 128}, {2: 64}, {2: 32}, {2: 16}]
    lanes.loss[2] = 0.03
    assert lanes.go_on(30) == [], "neither much nor little"
    lanes.loss[2] = 0.005
    assert lanes.go_on(60) == [{2: 32}, {2: 64}, {2: 128}, {}]


def test_when_the_others_come_to_lose_as_much_they_are_alike() -> None:
    lanes = Lanes(dict.fromkeys((1, 2, 3), 0.2e6))
    lanes.loss[2] = 0.1
    lanes.go_on(30)
    assert lanes.sizes
    lanes.loss = dict.fromkeys(lanes.rates, 0.1)
    lanes.go_on(60)
    assert lanes.sizes == {}


def test_a_fast_lane_is_not_cut_into_chunks_that_limit_it_whatever_it_loses() -> None:
    lanes = Lanes(dict.fromkeys((1, 2, 3), 5e6))
    lanes.loss[2] = 0.1
    lanes.go_on(60)
    assert lanes.sizes == {2: 64}, "50 KB in a hundredth of a second"
    lanes.rates = dict.fromkeys((1, 2, 3), 50e6)
    lanes.go_on(60)
    assert lanes.sizes == {}


def test_lanes_that_tell_no_loss_go_by_their_rates() -> None:
    lanes = Lanes({1: 1e6, 2: 1e6, 3: 0.07e6}, counts_loss=False)
    assert lanes.go_on(60) == [{3: 128}, {3: 64}]


def test_a_lane_that_does_not_tell_what_was_acknowledged_goes_by_what_it_took() -> None:
    chunks, taken = LaneChunks(), {1: 0, 2: 0}
    for second in range(11):
        taken = {1: taken[1] + 1_000_000, 2: taken[2] + 30_000}
        chunks.observe({id: LaneLook(PathStats(), n, False) for id, n in taken.items()}, 256 * KIB, 50.0 + second)
    assert chunks.sizes(256 * KIB) == {2: 64 * KIB}


@pytest.mark.parametrize(("size", "least"), [(MIB, 64 * KIB), (48 * KIB, 24 * KIB), (20 * KIB, None), (10, None)])
def test_what_is_halved_stays_a_divisor_and_no_shorter_than_the_least(size: int, least: int | None) -> None:
    lanes = Lanes({1: 1e6, 2: 1e6, 3: 0.0})
    lanes.go_on(60)  # four times
    assert lanes.chunks.sizes(size) == ({} if least is None else {3: least})


class Path:
    """What lies behind one lane: a rate (bytes/s) until it is ``free``, and a share of lost segments."""

    def __init__(self, rate: float, loss: float) -> None:
        self.rate, self.loss = rate, loss
        self.free = threading.Event()


SLOW = [Path(4e6, 0.0), Path(4e6, 0.0), Path(0.4e6, 0.0), Path(4e6, 0.0)]
LOSSY = [Path(2e6, 0.001), Path(2e6, 0.0), Path(2e6, 0.2), Path(2e6, 0.002)]


@pytest.mark.needs_transport
@pytest.mark.parametrize("paths", [SLOW, LOSSY], ids=["slow", "lossy"])
def test_the_chunks_of_a_bad_lane_among_good_ones_are_shorter(
    net: Any, wrap_lanes: Any, wrapped_lane: Any, monkeypatch: pytest.MonkeyPatch, paths: list[Path]
) -> None:
    for name in ("chunking", "core"):
        monkeypatch.setattr(f"amst_core.session.{name}.STEP_S", 0.5)
    left = iter(paths)
    behind: dict[int, Path] = {}

    class Held(wrapped_lane):  # type: ignore[misc]
        """A lane that takes its time over a frame, and says how many segments it had to send again."""

        def __init__(self, inner: Lane) -> None:
            super().__init__(inner)
            self.path = behind[id(self)] = next(left)
            self.sent = 0

        def send_frame(self, header: bytes, payload: memoryview) -> None:
            self.path.free.wait(payload.nbytes / self.path.rate)
            super().send_frame(header, payload)
            self.sent += payload.nbytes

        def path_stats(self) -> PathStats:
            segments = self.sent // 100
            again = int(segments * self.path.loss)
            return replace(super().path_stats(), segments_sent=segments, segments_retransmitted=again)

    wrap_lanes(near=Held)
    pair = net.pair(streams=len(paths), client={"transport__amst__chunk_size_kb": 256})
    core = pair.near.core
    sent = os.urandom(64 * MIB)
    ticket = pair.near.send(sent)

    def sizes() -> dict[bool, list[int]]:
        """Those of the bad lane, and of the good ones."""
        found: dict[bool, list[int]] = {True: [], False: []}
        for worker in list(core.lanes.values()):
            found[worker.lane.path is paths[2]].append(worker.chunk_size)
        return found

    def is_shorter() -> bool:
        now = sizes()
        return max(now[True]) <= 64 * KIB < min(now[False])

    try:
        net.wait_until(is_shorter, "shorter chunks for the bad lane")
        told = {stream.chunk_size for stream in pair.near.streams()}
        assert min(told) <= 64 * KIB < max(told)
    finally:
        for path in paths:
            path.free.set()
    assert bytes(pair.far.recv(timeout=20)) == sent
    ticket.wait(20)
