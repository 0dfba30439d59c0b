"""AMST beside iperf3 on emulated paths: what the benchmark reads and reckons, and cells of it as they run."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import pytest
from congestion.scenarios import bench, cells, changing, queueing, sharing, transfers
from congestion.scenarios.bench import Bench
from congestion.scenarios.transfers import Amst, Iperf, Load, Run, UserspaceAmst, parse_amst, parse_iperf
from harness.errors import RunError

from amst_core.testing.netlab import missing

RUN = Run(93.26, 12.0, 139_890_000, ("bbr",), 4)


# ---- what they print -----------------------------------------------------------------------------


def amst_told(*lanes: tuple[str, str], **values: object) -> str:
    told = [{"congestion": name, "congestion_backend": backend} for name, backend in lanes]
    about = {"ok": True, "error": None, "bytes": 12_500_000, "seconds": 12.5, "throughput_bytes_per_s": 1e6}
    return json.dumps({**about, "lanes": told, **values})


def iperf_told(**values: object) -> dict[str, Any]:
    received = {"bits_per_second": 93.2e6, "seconds": 12.1, "bytes": 140_965_000}
    return {"end": {"sender_tcp_congestion": "bbr", "sum_received": received, "streams": [{}, {}]}, **values}


def test_what_amst_says_is_read() -> None:
    text = amst_told(("bbr", "kernel"), ("cubic", "kernel"), ("bbr", "kernel"))
    assert parse_amst(text, Load(seconds=12)) == Run(8.0, 12.5, 12_500_000, ("bbr", "cubic"), 3)


def test_a_transfer_that_lost_bytes_or_failed_is_none() -> None:
    text = amst_told(("bbr", "kernel"))
    assert parse_amst(text, Load(size=12_500_000)).bytes == 12_500_000
    with pytest.raises(RunError, match="moved 12500000 of 12500001 bytes"):
        parse_amst(text, Load(size=12_500_001))
    with pytest.raises(RunError, match="the far side is gone"):
        parse_amst(amst_told(ok=False, error="the far side is gone"), Load(seconds=12))


@pytest.mark.parametrize("other", [("bbr", "userspace"), ("cubic", "kernel")])
def test_every_stream_must_run_what_is_measured(other: tuple[str, str]) -> None:
    ours = ("cubic", "userspace")
    assert parse_amst(amst_told(ours, ours), Load(seconds=12), ours).congestion == ("cubic",)
    with pytest.raises(RunError, match="were to run"):
        parse_amst(amst_told(ours, other), Load(seconds=12), ours)


def test_what_iperf3_says_is_read_and_checked() -> None:
    text = json.dumps(iperf_told())
    assert parse_iperf(text, "bbr", Load(seconds=12)) == Run(93.2, 12.1, 140_965_000, ("bbr",), 2)
    with pytest.raises(RunError, match="asked for cubic, iperf3 had bbr"):
        parse_iperf(text, "cubic", Load(seconds=12))


def intervals(*mbits: float) -> list[dict[str, Any]]:
    """Of a second each."""
    return [
        {"sum": {"start": float(at), "end": at + 1.0, "bytes": int(rate * 125_000)}} for at, rate in enumerate(mbits)
    ]


def test_a_size_has_been_sent_by_iperf3_when_it_has_arrived() -> None:
    told = iperf_told(server_output_json={"intervals": intervals(10, 90, 90, 90)})
    size = 145 * 125_000  # 10, 90, and half of 90
    run = parse_iperf(json.dumps(told), "bbr", Load(size=size))
    assert (run.seconds, run.mbits, run.bytes) == (pytest.approx(2.5), pytest.approx(145 / 2.5), size)
    with pytest.raises(RunError, match="received 35000000 of 35000001 bytes"):
        parse_iperf(json.dumps(told), "bbr", Load(size=280 * 125_000 + 1))


def test_the_other_flow_is_looked_at_while_both_send() -> None:
    told = iperf_told(intervals=intervals(90, 90, 40, 20, 60, 90))
    assert sharing.received(told, "bbr", 1.9, 5.1) == pytest.approx(40)
    with pytest.raises(RunError, match="was over before"):
        sharing.received(told, "bbr", 1.9, 6.1)
    with pytest.raises(RunError, match="asked for cubic"):
        sharing.received(told, "cubic", 1.9, 5.1)


# ---- what is reckoned ----------------------------------------------------------------------------


def runs(*mbits: float) -> list[Run]:
    return [replace(RUN, mbits=value) for value in mbits]


def test_figures_are_medians_and_doubtful_ones_are_marked() -> None:
    assert bench.shown(runs(93.26, 90.0, 95.0)) == "93.3"
    assert bench.shown([*runs(420.4, 450.0), replace(RUN, trusted=False)]) == "420!"
    seen = [replace(RUN, seen={"share": value}) for value in (0.5, 0.9, 0.6)]
    assert bench.median(seen, "share") == 0.6
    assert bench.ran([RUN, replace(RUN, congestion=("cubic",), streams=6)]) == "bbr+cubic×5"


def test_the_ratio_is_to_the_best_peer_by_medians() -> None:
    peers = {"a": runs(10, 200, 20), "b": runs(50, 40, 60)}
    assert bench.of_best(runs(90, 100, 110), peers) == pytest.approx(2.0)


def counted(*stretches: tuple[float, float]) -> list[tuple[float, int]]:
    """Totals every 100 ms of (seconds, bytes/s)."""
    found, total, ticks = [(0.0, 0)], 0.0, 0
    for seconds, rate in stretches:
        for _ in range(round(seconds * 10)):
            ticks, total = ticks + 1, total + rate / 10
            found.append((ticks / 10, int(total)))
    return found


def test_recovery_is_when_a_second_carries_most_of_the_best() -> None:
    samples = counted((6, 1000), (2, 0), (6, 500))
    # the second that ends 2.8 s after the change is the first to have 800 ms of the new rate
    assert changing.recovery(samples, 6.0, 14.0, 500) == pytest.approx(2.8, abs=0.11)
    assert changing.recovery(samples, 8.0, 14.0, 500) == pytest.approx(1.0, abs=0.11)


def test_what_came_before_the_change_does_not_count() -> None:
    samples = counted((6, 1000), (4, 100))
    assert changing.recovery(samples, 6.0, 10.0, 500) == math.inf


def test_what_comes_after_the_next_change_does_not_count() -> None:
    samples = counted((6, 1000), (4, 100), (4, 1000))
    assert changing.recovery(samples, 6.0, 10.0, 1000) == math.inf
    assert changing.recovery(samples, 6.0, 14.0, 1000) == pytest.approx(4.8, abs=0.11)


def test_what_a_stretch_carried() -> None:
    assert changing.carried(counted((2, 1000), (4, 300)), 2.0, 6.0) == pytest.approx(300, rel=0.01)
    with pytest.raises(RunError, match="too seldom"):
        changing.carried(counted((2, 1000)), 3.0, 6.0)


def test_round_trips_are_those_of_the_steady_state() -> None:
    found = [(at / 10, 0.1 if at < 40 else 0.2 if at < 120 else 0.3) for at in range(200)]
    assert queueing.waits(found, 4.0, 11.95) == pytest.approx((0.2, 0.2))
    with pytest.raises(RunError, match="ping had 0 answers"):
        queueing.waits(found, 30.0, 40.0)


# ---- cells and options ---------------------------------------------------------------------------


def test_every_cell_is_a_path_with_that_buffer() -> None:
    every = [
        *cells.GRID.values(), *cells.QUEUE.values(), *(cell.path for cell in cells.USERSPACE.values()),
        *(path for path, _ in cells.SHARE.values()), *({**cells.CHANGING, **to} for to in cells.CHANGES.values()),
    ]  # fmt: skip
    for values in every:
        path = cells.path_of(values, 4)
        assert path.up.rate is not None
        assert path.buffer(path.up) == max(cells.LEAST_BUFFER, round(4 * path.up.rate * path.rtt))
    assert len(cells.GRID) == 25
    assert cells.path_of(cells.GRID["bursts"]).down.burst == 5


def test_cells_are_chosen_by_patterns() -> None:
    def names(**values: Any) -> list[str]:
        return [name for name, _ in Bench(12, [1], **values).chosen(cells.GRID)]

    assert names() == list(cells.GRID)
    assert names(cells=["1Gbit/s 3*", "jitter"]) == ["1Gbit/s 300ms 0%", "1Gbit/s 300ms 1%", "jitter"]
    assert names(smoke=True, cells=["1Gbit/s*"]) == ["1Gbit/s 100ms 0%"]
    with pytest.raises(RunError, match="no such cell; there are: '100Mbit/s 20ms 0%'"):
        names(cells=["2Gbit/s*"])


def test_the_file_has_every_run_and_is_json(tmp_path: FilePath) -> None:
    file = tmp_path / "found.json"
    measured = Bench(12, [1], about={"what": "change"}, file=file)
    measured.note("loss 1 %", {"AMST": [replace(RUN, seen={"there_s": math.inf})]}, ratio=0.5)
    found = json.loads(file.read_text())
    assert found["what"] == "change"
    (row,) = found["rows"]
    assert row["ratio"] == 0.5
    (run,) = row["runs"]["AMST"]
    assert (run["mbits"], run["congestion"], run["seen"]) == (93.26, ["bbr"], {"there_s": None})


# ---- as it runs: needs root and iperf3 -----------------------------------------------------------

LOSSY = {"rate": "100Mbit/s", "rtt": "50ms", "loss": "1%"}
SHORT = Load(seconds=5)


@pytest.fixture(scope="module")
def run() -> Callable[..., Run]:
    """Sends over a path, of hosts whose own congestion control is reno."""
    reason = missing() or (None if shutil.which("iperf3") else "iperf3 is not installed")
    if reason is not None:
        assert os.environ.get("CI") != "true", f"CI must run this: {reason}"
        pytest.skip(reason)

    def once(values: cells.Values, sender: transfers.Sender, load: Load) -> Run:
        measured = Bench(load.seconds or 0.0, [1], default="reno")
        return measured.once(cells.path_of(values), 1, sender, lambda lab, sender: sender.send(lab, load))

    return once


@pytest.fixture(scope="module")
def one_cubic(run: Callable[..., Run]) -> Run:
    """What one connection of the kernel's cubic carries over the lossy path."""
    return run(LOSSY, Iperf("cubic", 1), SHORT)




@pytest.mark.alone
@pytest.mark.parametrize(
    "sender",
    [
        Amst("AMST", expects=("bbr", "kernel")),
        Amst("AMST, the server sends", "--reverse", expects=("bbr", "kernel")),
        UserspaceAmst("AMST, user space", "--max-streams", "32"),
        UserspaceAmst("AMST, user space, the server sends", "--reverse", "--max-streams", "32"),
    ],
    ids=lambda sender: sender.name,
)
def test_random_loss_does_not_stop_it(run: Callable[..., Run], one_cubic: Run, sender: Amst) -> None:
    assert run(LOSSY, sender, SHORT).mbits > 2 * one_cubic.mbits


@pytest.mark.alone
def test_all_bytes_of_a_transfer_are_acknowledged(run: Callable[..., Run]) -> None:
    size = 20_000_000
    assert run(cells.GRID["bursts"], Amst("AMST"), Load(size=size)).bytes == size
    assert run(cells.GRID["jitter"], UserspaceAmst("AMST, user space"), Load(size=size)).bytes == size


@pytest.mark.alone
def test_a_path_that_is_full_needs_few_streams(run: Callable[..., Run]) -> None:
    assert run({"rate": "50Mbit/s", "rtt": "60ms"}, Amst("AMST"), Load(seconds=12)).streams < 8


@pytest.mark.alone
def test_a_polite_session_goes_by_cubic(run: Callable[..., Run]) -> None:
    polite = run({"rate": "20Mbit/s", "rtt": "20ms"}, Amst("AMST", "--polite"), Load(size=4_000_000))
    assert polite.congestion in (("cubic",), ("reno",))
    assert polite.streams == 16
