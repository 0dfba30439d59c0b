"""AMST beside iperf3 on emulated paths: what the benchmark reads, and four cells of it as they run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any

import paths
import pytest
from paths import Run, recovery

from amst_core.testing.netlab import missing
from amst_core.testing.netlab import repeated as in_a_lab


def told(**values: object) -> str:
    lanes = [{"congestion": "bbr"}, {"congestion": "cubic"}, {"congestion": "bbr"}]
    return json.dumps({"throughput_bytes_per_s": 1e6, "seconds": 12.5, "lanes": lanes, **values})


def test_what_amst_says_is_read() -> None:
    assert paths.parse_amst(told()) == Run(8.0, True, ("bbr", "cubic"), 3, 12.5)


def test_what_iperf3_says_is_read_and_checked() -> None:
    end = {"sender_tcp_congestion": "bbr", "sum_received": {"bits_per_second": 93.2e6, "seconds": 12.1}}
    text = json.dumps({"end": end})
    assert paths.parse_iperf(text, "bbr") == Run(93.2, True, ("bbr",), 0, 12.1)
    with pytest.raises(SystemExit, match="asked for cubic, iperf3 had bbr"):
        paths.parse_iperf(text, "cubic")


def test_a_run_that_could_not_be_trusted_is_marked() -> None:
    assert paths.shown([Run(93.26, True), Run(90.0, True), Run(95.0, True)]) == "93.3"
    assert paths.shown([Run(420.4, True), Run(90.0, False), Run(450.0, True)]) == "420!"


def counted(rates: list[tuple[float, float]]) -> list[tuple[float, int]]:
    """Totals every 100 ms of (seconds, rate) stretches."""
    found, total, now = [(0.0, 0)], 0.0, 0.0
    for seconds, rate in rates:
        for _ in range(round(seconds * 10)):
            now, total = now + 0.1, total + rate / 10
            found.append((now, int(total)))
    return found


def test_recovery_is_when_a_second_carries_most_of_the_best() -> None:
    samples = counted([(6, 100), (2, 0), (6, 50)])
    assert recovery(samples, 6.0, 14.0) == pytest.approx(2.8, abs=0.11)
    assert recovery(samples, 8.0, 14.0) == pytest.approx(1.0, abs=0.11)


def test_every_cell_is_a_path() -> None:
    cells = [*paths.GRID.values(), *(values for values, _, _ in paths.USERSPACE_CELLS.values())]
    for values in cells:
        path = paths.path_of(values, buffers=4)
        assert path.buffer(path.up) >= int(4 * (path.up.rate or 0) * path.rtt)
    assert len(paths.GRID) == 21


# ---- as it runs: needs root ----------------------------------------------------------------------


@pytest.fixture
def lab_run(tmp_path: FilePath) -> Callable[..., Run]:
    reason = missing()
    if reason is not None:
        assert os.environ.get("CI") != "true", f"CI must run this: {reason}"
        pytest.skip(reason)

    def run(values: dict[str, str], options: list[str], variables: dict[str, str] | None = None) -> Run:
        def measure(lab: Any) -> Run:
            return paths.amst(lab, str(tmp_path), options, variables)

        path = paths.path_of(values)
        return in_a_lab(lambda: paths.Lab(path, congestion="reno", tcp_memory=paths.TCP_MEMORY), measure)

    return run


LOSSY = {"rate": "50Mbit/s", "rtt": "60ms", "loss": "1%"}
RENO_MBITS = 1.6
"""What one loss-based flow carries at that loss and round trip: MSS/RTT · 0.87/√p (Mathis et al. 1997), in Mbit/s."""


@pytest.mark.alone
@pytest.mark.parametrize(
    ("options", "variables", "lanes"),
    [
        (["--time", "6s"], None, ("bbr",)),
        (["--time", "6s", "--reverse"], None, ("bbr",)),
        (["--time", "6s", "--max-streams", "32"], paths.USERSPACE, ("cubic",)),
        (["--time", "6s", "--reverse", "--max-streams", "32"], paths.USERSPACE, ("cubic",)),
    ],
    ids=["kernel", "kernel, the server sends", "user space", "user space, the server sends"],
)
def test_random_loss_does_not_stop_it(
    lab_run: Callable[..., Run], options: list[str], variables: dict[str, str] | None, lanes: tuple[str, ...]
) -> None:
    run = lab_run(LOSSY, options, variables)
    assert run.lanes == lanes
    assert run.mbits > 8 * RENO_MBITS


@pytest.mark.alone
def test_a_path_that_is_full_needs_few_streams(lab_run: Callable[..., Run]) -> None:
    run = lab_run({"rate": "50Mbit/s", "rtt": "60ms"}, ["--time", "12s"])
    assert run.streams < 8


@pytest.mark.alone
def test_a_polite_session_goes_by_cubic(lab_run: Callable[..., Run]) -> None:
    run = lab_run({"rate": "20Mbit/s", "rtt": "20ms"}, ["--size", "4MB", "--polite"])
    assert run.lanes == ("cubic",) or run.lanes == ("reno",)
    assert run.streams == 16
