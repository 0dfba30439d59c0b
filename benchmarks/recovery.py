"""Half of the streams killed in the middle: how far the rate falls, how soon it is back, how much travels twice.

    python benchmarks/recovery.py [--streams 16] [--rounds 5] [--seconds 6]

Needs root and ss (iproute2), which resets the connections from outside as a firewall would. The rate of the seconds
before the kill is the peer of those after it, in the same run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import threading
import time

from harness.amst import amst_server

import amst_core
from amst_core.cli import traffic
from amst_core.security.identity import find_token

STEP_S = 0.05
WINDOW_S = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0)
    options = parser.parse_args()
    rows = [measure(options.streams, options.seconds) for _ in range(options.rounds)]
    names = ("rate before, MB/s", "least 250 ms window", "first second after", "sent twice, MiB", "streams at the end")
    for name, values in zip(names, zip(*rows, strict=True), strict=True):
        print(f"{name:24} median {statistics.median(values):8.2f}   from {min(values):8.2f} to {max(values):8.2f}")


def measure(streams: int, seconds: float) -> tuple[float, float, float, float, float]:
    """One run; ratios are to the rate before the kill."""
    with tempfile.TemporaryDirectory() as root, tempfile.TemporaryDirectory() as state:
        os.environ["AMST_STATE_DIR"] = state
        with amst_server(root, state) as address:
            with amst_core.connect(address, token=find_token(), streams=streams) as session:
                load = traffic.Load(None, seconds, 8 << 20, 16)
                tally = traffic.Tally()
                sender = threading.Thread(
                    target=traffic.send, args=(session, load, tally), kwargs={"progress": lambda: None}
                )
                sender.start()
                samples: list[tuple[float, int]] = []
                killed_at = 0.0
                began = time.monotonic()
                while sender.is_alive():
                    now = time.monotonic()
                    samples.append((now, session.report.acknowledged_bytes))
                    if not killed_at and now - began > seconds / 2:
                        killed_at = now
                        kill_half(session)
                    time.sleep(STEP_S)
                report = session.metrics()
                return (*rates(samples, began, killed_at), report.retransmitted_bytes / 2**20, report.active_streams)


def kill_half(session: amst_core.Session) -> None:
    lanes = list(session.core.lanes.values())
    for worker in lanes[: len(lanes) // 2]:
        local = worker.lane.description.split()[1]
        subprocess.run(["ss", "-K", "src", local], stdout=subprocess.DEVNULL, check=True)


def rates(samples: list[tuple[float, int]], began: float, killed_at: float) -> tuple[float, float, float]:
    def between(start: float, end: float) -> float:
        inside = [s for s in samples if start <= s[0] <= end]
        return (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])

    before = between(began + 1.0, killed_at)
    steps = [killed_at + n * STEP_S for n in range(int(1.0 / STEP_S))]
    least = min(between(at, at + WINDOW_S) for at in steps)
    return before / 1e6, least / before, between(killed_at, killed_at + 1.0) / before


if __name__ == "__main__":
    main()
