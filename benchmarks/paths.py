"""What AMST carries over emulated paths, beside iperf3 in the same run.

    python benchmarks/paths.py grid|userspace|queue|change|share [--only NAME ...] [--seconds 12] [--seeds 3]

Needs root, iperf3 and ping. Every run is `amst bench` or iperf3 from one host of a lab to the other, in a lab of its
own with the same seed: goodput from the first byte offered to the last acknowledged (iperf3: at the receiver), slow
start included. Medians of the seeds; a run in which the emulator was late is made again, and marked by ! when it was
late every time. `--default reno` makes that the hosts' own congestion control instead of bbr.

grid: `amst bench` at its defaults against the best of iperf3 with cubic and bbr, 1 and 8 streams.
userspace: paced in user space over the kernel's cubic, against one stream of the kernel's bbr.
queue: round trips (ping) beside a transfer, with a buffer of four bandwidth-delay products, from 4 s on.
change: a path that changes while something is sent, and changes back: when 80 % of the new best is reached.
share: what is left of the path beside one flow of iperf3 for 20 s, and what that gets.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path as FilePath
from typing import Any, Final, TypeVar

from harness.amst import AMST
from harness.machine import describe

from amst_core.testing.netlab import Host, Lab, LabRejectedError, Path

TCP_MEMORY: Final = 128 << 20
TRIES: Final = 3
PORT: Final = 5201
SIDE_PORT: Final = 5301
AMST_PORT: Final = 9000
LEAST_BUFFER: Final = 64 << 10
PEERS: Final = (("cubic", 1), ("cubic", 8), ("bbr", 1), ("bbr", 8))
USERSPACE: Final = {"AMST_CONGESTION__BACKEND": "userspace", "AMST_CONGESTION__BASE": "cubic"}
LONG_S: Final = 0.2
"""Paths with such a round trip are given 20 s."""

GRID: Final[Mapping[str, Mapping[str, Any]]] = {
    f"{rate} {rtt} {loss}": {"rate": rate, "rtt": rtt, "loss": loss}
    for rate, rtts in (("100Mbit/s", "20 100 200"), ("500Mbit/s", "20 100 200"))
    for rtt in (f"{ms}ms" for ms in rtts.split())
    for loss in (("0%", "0.1%", "1%", "5%") if (rate, rtt) == ("100Mbit/s", "100ms") else ("0%", "1%", "5%"))
} | {
    "bursts": {"rate": "100Mbit/s", "rtt": "100ms", "loss": "1%", "burst": 5.0},
    "jitter": {"rate": "100Mbit/s", "rtt": "50ms", "jitter": "10ms", "loss": "1%"},
}
USERSPACE_CELLS: Final[Mapping[str, tuple[Mapping[str, Any], Sequence[str], float | None]]] = {
    "0.1%": ({"rate": "100Mbit/s", "rtt": "100ms", "loss": "0.1%"}, ["--max-streams", "32"], 0.95),
    "1%": ({"rate": "100Mbit/s", "rtt": "100ms", "loss": "1%"}, ["--max-streams", "64"], 0.90),
    "20ms 1%": ({"rate": "100Mbit/s", "rtt": "20ms", "loss": "1%"}, ["--max-streams", "64"], 0.95),
    "500M 0.1%": ({"rate": "500Mbit/s", "rtt": "100ms", "loss": "0.1%"}, ["--max-streams", "64"], 0.85),
    "no loss": ({"rate": "100Mbit/s", "rtt": "100ms"}, [], 0.97),
    "bursts": (GRID["bursts"], ["--max-streams", "64"], None),
    "jitter": (GRID["jitter"], ["--max-streams", "64"], None),
}
CHANGES: Final[Mapping[str, tuple[Mapping[str, str], Mapping[str, str]]]] = {
    "rate halved": ({"rate": "50Mbit/s"}, {"rate": "100Mbit/s"}),
    "RTT doubled": ({"rtt": "80ms"}, {"rtt": "40ms"}),
    "loss 1 %": ({"loss": "1%"}, {"loss": "0%"}),
}
CHANGE_AT: Final = (6.0, 14.0, 22.0)  # s: the change, the change back, the end
RECOVERED: Final = 0.8
STEADY_S: Final = 4.0

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """One transfer: payload bits/s, what the emulator said of itself, and what its own report told."""

    mbits: float
    trusted: bool
    lanes: tuple[str, ...] = ()
    streams: int = 0
    seconds: float = 0.0


# ---- one transfer -----------------------------------------------------------------------------


def amst(lab: Lab, state: str, options: Sequence[str], variables: Mapping[str, str] | None = None) -> Run:
    """`amst bench` with a server of its own."""
    here, far = lab.hosts
    env = {**os.environ, "HOME": state, "AMST_STATE_DIR": state, **(variables or {})}
    argv = [*AMST, "serve", "--listen", f"[::]:{AMST_PORT}"]
    server = far.popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    listening(far, AMST_PORT, server)
    argv = [*AMST, "bench", "--json", *options, f"amst://{far.address}:{AMST_PORT}"]
    done = here.run(argv, env=env, check=False, timeout=300)
    server.terminate()
    server.wait()
    if done.returncode:
        sys.exit(f"amst bench: {done.stderr.strip()}")
    return parse_amst(done.stdout)


def parse_amst(text: str) -> Run:
    """What `amst bench --json` printed."""
    told = json.loads(text)
    lanes = tuple(sorted({str(lane["congestion"]) for lane in told["lanes"]}))
    return Run(told["throughput_bytes_per_s"] * 8e-6, True, lanes, len(told["lanes"]), told["seconds"])


def iperf(lab: Lab, congestion: str, streams: int, options: Sequence[str], port: int = PORT) -> Run:
    """iperf3 with a server of its own."""
    here, far = lab.hosts
    argv = ["iperf3", "-s", "-1", "-p", str(port)]
    listening(far, port, far.popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    argv = ["iperf3", "-J", "-C", congestion, "-c", far.address, "-p", str(port), "-P", str(streams), *options]
    return parse_iperf(here.run(argv, timeout=300).stdout, congestion)


def iperf_for(congestion: str, streams: int, options: Sequence[str]) -> Callable[[Lab], Run]:
    return partial(iperf, congestion=congestion, streams=streams, options=options)


def parse_iperf(text: str, congestion: str) -> Run:
    """What `iperf3 -J` printed; ends the program when another congestion control ran."""
    end = json.loads(text)["end"]
    if end["sender_tcp_congestion"] != congestion:
        sys.exit(f"asked for {congestion}, iperf3 had {end['sender_tcp_congestion']}")
    received = end["sum_received"]
    return Run(received["bits_per_second"] / 1e6, True, (congestion,), 0, received["seconds"])


def listening(host: Host, port: int, server: subprocess.Popen[Any]) -> None:
    while port not in host.listening():
        if server.poll() is not None:
            sys.exit(f"nobody listens at port {port} of {host.name}")
        time.sleep(0.02)


def repeated(make: Callable[[], Lab], measure: Callable[[Lab], T], what: str) -> tuple[T, bool]:
    """What was measured in a lab that could be trusted, or in the last of `TRIES`, and whether it could."""
    for left in reversed(range(TRIES)):
        with make() as lab:
            found = measure(lab)
            try:
                lab.check()
                return found, True
            except LabRejectedError as err:
                print(f"again: {what}: {err}", file=sys.stderr, flush=True)
                if not left:
                    return found, False
    raise AssertionError("not reached")


def path_of(values: Mapping[str, Any], buffers: float = 1.0) -> Path:
    """A path with ``buffers`` bandwidth-delay products of buffer."""
    path = Path(**values)
    assert path.up.rate is not None, "every cell has one"
    return path.changed(buffer=max(LEAST_BUFFER, int(buffers * path.up.rate * path.rtt)))


class Bench:
    """What all subcommands need: where credentials are, how long, how often, on what."""

    def __init__(self, options: argparse.Namespace, state: str) -> None:
        self.state = state
        self.seconds: float = options.seconds
        self.seeds = range(1, options.seeds + 1)
        self.default: str = options.default
        self.only: Sequence[str] = options.only or ()
        self.results: list[dict[str, Any]] = []

    def wanted(self, name: str) -> bool:
        return not self.only or name in self.only

    def lab(self, path: Path, seed: int) -> Lab:
        return Lab(path, seed=seed, congestion=self.default, tcp_memory=TCP_MEMORY)

    def time(self, path: Path) -> list[str]:
        return [f"{max(self.seconds, 20) if path.rtt >= LONG_S else self.seconds:g}"]

    def each(self, path: Path, what: str, measure: Callable[[Lab], T], seeds: Sequence[int]) -> list[tuple[T, bool]]:
        """What was measured with each seed, and whether that could be trusted."""
        return [repeated(partial(self.lab, path, seed), measure, what) for seed in seeds]

    def runs(self, path: Path, measure: Callable[[Lab], Run], seeds: Sequence[int] | None = None) -> list[Run]:
        found = self.each(path, f"{path.up}", measure, self.seeds if seeds is None else seeds)
        return [replace(run, trusted=trusted) for run, trusted in found]

    def amst(self, options: Sequence[str], variables: Mapping[str, str] | None = None) -> Callable[[Lab], Run]:
        return partial(amst, state=self.state, options=options, variables=variables)

    def note(self, **values: Any) -> None:
        self.results.append(values)


def median(runs: Sequence[Run]) -> float:
    return statistics.median(run.mbits for run in runs)


def shown(runs: Sequence[Run]) -> str:
    value = median(runs)
    return f"{value:.{0 if value >= 100 else 1}f}{'' if all(run.trusted for run in runs) else '!'}"


# ---- the subcommands --------------------------------------------------------------------------


def grid(bench: Bench) -> None:
    names = " | ".join(f"iperf3 {name}×{streams}" for name, streams in PEERS)
    print(f"| path | {names} | AMST | of the best | runs on |\n" + "|---" * (len(PEERS) + 4) + "|")
    for name, values in GRID.items():
        if not bench.wanted(name):
            continue
        path = path_of(values)
        lossy = bool(path.up.loss or path.up.jitter)
        seeds = bench.seeds if lossy else bench.seeds[:1]
        time_s = bench.time(path)
        peers = {
            f"{cc}×{streams}": bench.runs(path, iperf_for(cc, streams, ["-t", *time_s]), seeds)
            for cc, streams in PEERS
        }
        ours = bench.runs(path, bench.amst(["--time", f"{time_s[0]}s"]), seeds)
        ratio = median(ours) / max(map(median, peers.values()))
        lanes = "+".join(sorted({cc for run in ours for cc in run.lanes}))
        streams = statistics.median(run.streams for run in ours)
        row = [name, *map(shown, peers.values()), shown(ours), f"{ratio:.2f}", f"{lanes}×{streams:g} at the end"]
        print("| " + " | ".join(row) + " |", flush=True)
        best = {who: median(runs) for who, runs in peers.items()}
        bench.note(cell=name, peers=best, amst=median(ours), ratio=ratio)


def userspace(bench: Bench) -> None:
    print("| path | bbr×1 | user space | ratio | asked | streams |\n|---|---|---|---|---|---|")
    for name, (values, options, asked) in USERSPACE_CELLS.items():
        if bench.wanted(name):
            path = path_of(values)
            time_s = bench.time(path)
            _userspace_row(bench, name, path, ["--time", f"{time_s[0]}s", *options], ["-t", *time_s], asked)
    path = path_of(GRID["100Mbit/s 100ms 0.1%"])
    if bench.wanted("60 s"):
        _userspace_row(bench, "60 s", path, ["--time", "60s", "--max-streams", "32"], ["-t", "60"], None)
    if bench.wanted("50 MB"):
        _userspace_row(bench, "50 MB", path, ["--size", "50MB", "--max-streams", "32"], ["-n", "50M"], None)


def _userspace_row(
    bench: Bench, name: str, path: Path, ours: Sequence[str], theirs: Sequence[str], asked: float | None
) -> None:
    kernel = bench.runs(path, iperf_for("bbr", 1, theirs))
    runs = bench.runs(path, bench.amst(ours, USERSPACE))
    ratio = median(runs) / median(kernel)
    if any(run.lanes != ("cubic",) for run in runs):
        sys.exit(f"{name}: the streams ran {[run.lanes for run in runs]}, not the kernel's cubic")
    streams = statistics.median(run.streams for run in runs)
    goal = "-" if asked is None else f"{asked:.2f}"
    print(f"| {name} | {shown(kernel)} | {shown(runs)} | {ratio:.2f} | {goal} | {streams:g} |", flush=True)
    bench.note(cell=name, bbr1=median(kernel), userspace=median(runs), ratio=ratio, asked=asked)


def queue(bench: Bench) -> None:
    path = path_of({"rate": "100Mbit/s", "rtt": "100ms"}, buffers=4)
    time_s = bench.time(path)
    ours = ["--time", f"{time_s[0]}s"]
    who = {
        "AMST": bench.amst(ours),
        "AMST, user space": bench.amst(ours, USERSPACE),
        "AMST, --polite": bench.amst([*ours, "--polite"]),
        **{f"iperf3 {cc}×{streams}": iperf_for(cc, streams, ["-t", *time_s]) for cc, streams in PEERS},
    }
    print("| who | Mbit/s | round trip, median | 95 % |\n|---|---|---|---|")
    for name, measure in who.items():
        if not bench.wanted(name):
            continue
        found = [item for item, _ in bench.each(path, name, partial(_pinged, measure), bench.seeds)]
        times = [[statistics.median(rtts), statistics.quantiles(rtts, n=20)[-1]] for _, rtts in found]
        half, most = (statistics.median(column) / path.rtt for column in zip(*times, strict=True))
        print(f"| {name} | {shown([run for run, _ in found])} | {half:.2f} × | {most:.2f} × |", flush=True)
        bench.note(who=name, mbits=median([run for run, _ in found]), p50=half, p95=most)


def _pinged(measure: Callable[[Lab], Run], lab: Lab) -> tuple[Run, list[float]]:
    with pinging(lab) as times:
        run = measure(lab)
    return run, [rtt_s for at, rtt_s in times if at >= STEADY_S]


@contextlib.contextmanager
def pinging(lab: Lab) -> Iterator[list[tuple[float, float]]]:
    """Seconds since the beginning and of the round trip, ten times a second."""
    here, far = lab.hosts
    found: list[tuple[float, float]] = []
    began = time.monotonic()
    ping = here.popen(["ping", "-i", "0.1", far.address], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def read() -> None:
        for line in ping.stdout:
            if (match := re.search(r"time=([\d.]+)", line)) is not None:
                found.append((time.monotonic() - began, float(match[1]) / 1000))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield found
    finally:
        ping.terminate()
        reader.join()


def change(bench: Bench) -> None:
    print("| change | backend | 80 % of the new best after | and after changing back |\n|---|---|---|---|")
    start = {"rate": "100Mbit/s", "rtt": "40ms"}
    for name, (there, back) in CHANGES.items():
        for backend, variables in (("kernel", {}), ("user space", USERSPACE)):
            if not (bench.wanted(name) or bench.wanted(f"{name}, {backend}")):
                continue
            measure = partial(_changed, bench, there=there, back=back, variables=variables)
            found = [item for item, _ in bench.each(path_of(start), name, measure, bench.seeds)]
            first, second = (statistics.median(column) for column in zip(*found, strict=True))
            print(f"| {name} | {backend} | {first:.1f} s | {second:.1f} s |", flush=True)
            bench.note(change=name, backend=backend, seconds=first, seconds_back=second)


def _changed(
    bench: Bench, lab: Lab, there: Mapping[str, str], back: Mapping[str, str], variables: Mapping[str, str]
) -> tuple[float, float]:
    at, at_back, end = CHANGE_AT
    ended = threading.Event()
    counted: list[tuple[float, int]] = []
    changed: list[float] = []

    def watch() -> None:
        began = time.monotonic()
        counted.append((0.0, 0))
        while not ended.wait(0.1):
            now = time.monotonic() - began
            counted.append((now, lab.report().way("up").delivered_bytes))
            for due, values in ((at, there), (at_back, back)):
                if len(changed) < (1 if due == at else 2) and now >= due:
                    lab.link.set(**values)
                    changed.append(now)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        amst(lab, bench.state, ["--time", f"{end:g}s"], variables)
    finally:
        ended.set()
        watcher.join()
    # The best of each stretch is what its last seconds carried, or, where that is less, what the path has.
    return recovery(counted, changed[0], changed[1]), recovery(counted, changed[1], end)


def recovery(counted: Sequence[tuple[float, int]], since: float, until: float) -> float:
    """Seconds after ``since`` until a second carried `RECOVERED` of what the best one before ``until`` did."""
    rates = []
    for at, total in counted:
        before = [item for item in counted if item[0] <= at - 1.0]
        if before and since < at - 1.0 and at <= until:
            rates.append((at, (total - before[-1][1]) / (at - before[-1][0])))
    best = max(rate for _, rate in rates)
    return next(at for at, rate in rates if rate >= RECOVERED * best) - since


def share(bench: Bench) -> None:
    print("| path | beside | who | gets, Mbit/s | leaves, Mbit/s | share |\n|---|---|---|---|---|---|")
    for rtt in ("40ms", "100ms"):
        path = path_of({"rate": "100Mbit/s", "rtt": rtt})
        ours = ["--time", f"{max(bench.seconds, 20):g}s"]
        seconds = ["-t", f"{max(bench.seconds, 20):g}"]
        for beside in ("cubic", "bbr"):
            who = {
                f"iperf3 {beside}×1": iperf_for(beside, 1, seconds),
                "AMST": bench.amst(ours),
                "AMST, user space": bench.amst(ours, USERSPACE),
                "AMST, --polite": bench.amst([*ours, "--polite"]),
            }
            for name, measure in who.items():
                if not bench.wanted(name):
                    continue
                both = partial(_beside, beside, seconds, measure)
                found = [item for item, _ in bench.each(path, f"{name} beside {beside}", both, bench.seeds)]
                gets, leaves = (statistics.median(column) for column in zip(*found, strict=True))
                part = gets / (gets + leaves)
                print(f"| {rtt} | {beside}×1 | {name} | {gets:.1f} | {leaves:.1f} | {part:.2f} |", flush=True)
                bench.note(rtt=rtt, beside=beside, who=name, gets=gets, leaves=leaves, share=part)


def _beside(beside: str, seconds: Sequence[str], measure: Callable[[Lab], Run], lab: Lab) -> tuple[float, float]:
    other: list[Run] = []
    thread = threading.Thread(target=lambda: other.append(iperf(lab, beside, 1, seconds, SIDE_PORT)))
    thread.start()
    run = measure(lab)
    thread.join()
    return run.mbits, other[0].mbits


SUBCOMMANDS: Final[Mapping[str, Callable[[Bench], None]]] = {
    "grid": grid, "userspace": userspace, "queue": queue, "change": change, "share": share,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=SUBCOMMANDS)
    parser.add_argument("--only", action="append", metavar="NAME", help="this row; may be repeated")
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--default", default="bbr", help="the hosts' own congestion control")
    parser.add_argument("--json", type=FilePath, metavar="FILE", help="the numbers, too")
    options = parser.parse_args()
    about = describe()
    print(f"{about['cpu']}, {about['cores']} cores, Linux {about['kernel']}, Python {about['python']}\n", flush=True)
    with tempfile.TemporaryDirectory() as state:
        bench = Bench(options, state)
        SUBCOMMANDS[options.what](bench)
    if options.json is not None:
        options.json.write_text(json.dumps(bench.results, indent=1) + "\n")


if __name__ == "__main__":
    main()
