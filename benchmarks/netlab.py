"""What Linux TCP reaches in the lab, beside figures of another machine; and how well the lab does what it is asked.

    python benchmarks/netlab.py [--all | --only '100Mbit/s 100ms 1%' ...] [--seconds 10] [--seeds 3]
    python benchmarks/netlab.py --accuracy

Needs root and iperf3. Each cell is iperf3 from one host to the other: cubic or bbr (`-C`, read back), 1 or 8 streams,
10 s with slow start, a buffer of one bandwidth-delay product, TCP buffers up to 128 MiB; Mbit/s at the receiver, the
median of the seeds. A run in which the emulator was late is made again, and marked by ! when it was late every time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from harness.machine import describe

from amst_core.testing.netlab import Lab, LabRejectedError, LabReport, Path, probes, repeated
from amst_core.units import parse_duration, parse_rate, parse_share

KINDS: Final = (("cubic", 1), ("cubic", 8), ("bbr", 1), ("bbr", 8))
TCP_MEMORY: Final = 128 << 20
TRIES: Final = 3
PORT: Final = 5201

T = TypeVar("T")

EARLIER: Final[dict[tuple[str, str, str], tuple[float | None, float | None, float | None, float | None]]] = {
    ("100Mbit/s", "20ms", "0%"): (96, 96, 95, 96),
    ("100Mbit/s", "20ms", "1%"): (7, 50, 94, 94),
    ("100Mbit/s", "20ms", "5%"): (2, 15, 88, 90),
    ("100Mbit/s", "100ms", "0%"): (90, 93, 90, 92),
    ("100Mbit/s", "100ms", "0.1%"): (18, 62, 89, 93),
    ("100Mbit/s", "100ms", "1%"): (2, 18, 83, 89),
    ("100Mbit/s", "100ms", "5%"): (1, 5, 75, 81),
    ("100Mbit/s", "200ms", "0%"): (83, 88, 82, 87),
    ("100Mbit/s", "200ms", "1%"): (2, 9, 68, 83),
    ("100Mbit/s", "200ms", "5%"): (0.3, 3, 46, 70),
    ("500Mbit/s", "20ms", "0%"): (450, 478, 475, 478),
    ("500Mbit/s", "20ms", "1%"): (8, 50, 463, 470),
    ("500Mbit/s", "20ms", "5%"): (2, 15, 415, 448),
    ("500Mbit/s", "100ms", "0%"): (441, 455, 438, 439),
    ("500Mbit/s", "100ms", "1%"): (3, 17, 394, 429),
    ("500Mbit/s", "100ms", "5%"): (0.4, 4, 361, 395),
    ("500Mbit/s", "200ms", "0%"): (377, 419, 387, 412),
    ("500Mbit/s", "200ms", "1%"): (1, 10, 273, 350),
    ("500Mbit/s", "200ms", "5%"): (0.3, 3, 248, 316),
    ("1Gbit/s", "100ms", "0%"): (872, None, 866, None),
    ("1Gbit/s", "100ms", "1%"): (3, None, 776, 839),
    ("1Gbit/s", "300ms", "0%"): (597, None, 585, None),
    ("1Gbit/s", "300ms", "1%"): (1, None, 283, 404),
}
"""Mbit/s for each of `KINDS`: measured earlier on another machine, with another emulator of the same model (one seed or
the mean of three, not noted which); None: not measured."""

DEFAULT: Final = (
    ("100Mbit/s", "20ms", "1%"),
    ("100Mbit/s", "100ms", "0%"),
    ("100Mbit/s", "100ms", "1%"),
    ("500Mbit/s", "100ms", "0%"),
    ("500Mbit/s", "100ms", "1%"),
)


@dataclass(frozen=True)
class Cell:
    """One run of iperf3."""

    mbits: float
    report: LabReport
    rejected: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="every row")
    which.add_argument("--only", action="append", metavar="'RATE RTT LOSS'", help="this row; may be repeated")
    which.add_argument("--accuracy", action="store_true", help="asked and measured, by small probes")
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=1, help="runs of a row with loss, each with another seed")
    options = parser.parse_args()
    about = describe()
    print(f"{about['cpu']}, {about['cores']} cores, Linux {about['kernel']}, Python {about['python']}", flush=True)
    if options.accuracy:
        show_accuracy()
        return
    rows = list(EARLIER) if options.all else [named(row) for row in options.only or ()] or list(DEFAULT)
    show_rows(rows, options.seconds, options.seeds)


def named(text: str) -> tuple[str, str, str]:
    for row in EARLIER:
        if list(row) == text.split():
            return row
    sys.exit(f"no row {text!r}; there are: {', '.join(repr(' '.join(row)) for row in EARLIER)}")


# ---- what TCP reaches -------------------------------------------------------------------------


def show_rows(rows: list[tuple[str, str, str]], seconds: int, seeds: int) -> None:
    print("Mbit/s here / measured earlier on another machine (ratio), by congestion control and streams\n")
    print(f"{'path':24}" + "".join(f"{f'{name} {streams}':>24}" for name, streams in KINDS) + "   late 99 %, max   CPU")
    for row in rows:
        line = f"{' '.join(row):24}"
        cells: list[Cell] = []
        for (name, streams), earlier in zip(KINDS, EARLIER[row], strict=True):
            lossy = parse_share(row[2]) > 0
            runs = [run(row, name, streams, seconds, seed) for seed in range(1, 1 + (seeds if lossy else 1))]
            cells += runs
            here = statistics.median(cell.mbits for cell in runs)
            mark = "!" if any(cell.rejected for cell in runs) else ""
            beside = f"{earlier:g} ({here / earlier:.2f})" if earlier is not None else "-"
            line += f"{f'{here:.{0 if here >= 10 else 1}f}{mark} / {beside}':>24}"
        late = max(cell.report.late_p99 for cell in cells), max(cell.report.late_max for cell in cells)
        busy = max(cell.report.cpu_seconds / cell.report.seconds for cell in cells)
        print(f"{line}   {late[0] * 1e3:5.2f} ms {late[1] * 1e3:5.1f} ms  {busy:.0%}", flush=True)


def run(row: tuple[str, str, str], congestion: str, streams: int, seconds: int, seed: int) -> Cell:
    """iperf3 once, or a few times until the lab can be trusted."""
    rate, rtt, loss = row
    for left in reversed(range(TRIES)):
        with Lab(Path(rate=rate, rtt=rtt, loss=loss), seed=seed, tcp_memory=TCP_MEMORY) as lab:
            mbits = iperf(lab, congestion, streams, seconds)
            try:
                return Cell(mbits, lab.check(), rejected=False)
            except LabRejectedError as err:
                print(f"again: {' '.join(row)}, {congestion} {streams}: {err}", file=sys.stderr, flush=True)
                if not left:
                    return Cell(mbits, lab.report(), rejected=True)
    raise AssertionError("not reached")


def iperf(lab: Lab, congestion: str, streams: int, seconds: int) -> float:
    """Mbit/s at the receiver."""
    here, far = lab.hosts
    server = far.popen(["iperf3", "-s", "-1", "-J"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while PORT not in far.listening():
        if server.poll() is not None:
            sys.exit("iperf3 -s does not run")
        time.sleep(0.01)
    argv = ["iperf3", "-J", "-C", congestion, "-c", far.address, "-t", str(seconds), "-P", str(streams)]
    end = json.loads(here.run(argv, timeout=seconds + 60).stdout)["end"]
    if end["sender_tcp_congestion"] != congestion:
        sys.exit(f"asked for {congestion}, iperf3 had {end['sender_tcp_congestion']}")
    return float(end["sum_received"]["bits_per_second"]) / 1e6


# ---- asked and measured -----------------------------------------------------------------------


def show_accuracy() -> None:
    print(f"\n{'what':40}{'asked':>14}{'measured':>14}{'off by':>10}")

    def show(what: str, asked: float, measured: float, scale: float, unit: str) -> None:
        off = measured / asked - 1
        mark = "" if abs(off) <= 0.03 else "  MORE THAN 3 %"
        shown = (f"{value * scale:.4g} {unit}" for value in (asked, measured))
        print(f"{what:40}" + "".join(f"{text:>14}" for text in shown) + f"{off:+10.2%}{mark}", flush=True)

    for rate, together in (("1Mbit/s", 1), ("10Mbit/s", 1), ("100Mbit/s", 1), ("500Mbit/s", 40), ("1Gbit/s", 40)):
        asked = parse_rate(rate)
        count = min(8000, int(asked / 1500))

        def rates(lab: Lab, count: int = count, together: int = together) -> tuple[float, float]:
            a, b = lab.hosts
            up = probes.send(a, b, b.address, count, together=together)
            return up.rate, probes.send(b, a, a.address6, count, together=together).rate

        up, down = measured(Path(rate=rate, buffer="1GB"), rates)
        show(f"rate up, IPv4{', super-packets' if together > 1 else ''}", asked, up, 8e-6, "Mbit/s")
        show(f"rate down, IPv6{', super-packets' if together > 1 else ''}", asked, down, 8e-6, "Mbit/s")
    for rtt in ("10ms", "20ms", "100ms", "300ms"):

        def times(lab: Lab) -> tuple[float, float]:
            a, b = lab.hosts
            six = statistics.median(probes.ping(a, b.address6, 10))
            return statistics.median(probes.ping(a, b.address, 10)), six

        four, six = measured(Path(rate="100Mbit/s", rtt=rtt), times)
        show("round trip, median of 10, IPv4", parse_duration(rtt), four, 1e3, "ms")
        show("round trip, median of 10, IPv6", parse_duration(rtt), six, 1e3, "ms")
    for jitter in ("5ms", "20ms"):

        def delays(lab: Lab) -> list[float]:
            a, b = lab.hosts
            return probes.send(a, b, b.address, 4000, size=100, interval=0.001).delays

        found = measured(Path(rtt="40ms", jitter=jitter), delays)
        asked = parse_duration(jitter)
        show(f"jitter {jitter}: mean delay", 0.02 + asked / 2, statistics.mean(found), 1e3, "ms")
        show(f"jitter {jitter}: width, from deviation", asked, probes.spread(found), 1e3, "ms")
    for loss, burst in (("1%", None), ("5%", None), ("5%", 5.0)):
        count = 400_000
        with Lab(Path(loss=loss, burst=burst), seed=1) as lab:
            a, b = lab.hosts
            sent = probes.send(a, b, b.address, count, size=200, together=50)
        rows = parse_share(loss)
        show(f"loss of {count}, {f'bursts of {burst:g}' if burst else 'each for itself'}", rows, sent.loss, 100, "%")
        show("    lost in a row", burst or 1 / (1 - rows), sent.burst, 1, "")


def measured(path: Path, measure: Callable[[Lab], T]) -> T:
    return repeated(lambda: Lab(path), measure)


if __name__ == "__main__":
    main()
