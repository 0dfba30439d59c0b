"""A client held to a rate, with a crowd of strangers on the server's port and without: the rates achieved, as a ratio.

    python benchmarks/crowd.py [--strangers 1000] [--rate 100MB] [--seconds 5] [--rounds 5]

Each round measures both, one after the other. The strangers are those of tests/hostile/strangers.py: they hang idle in
every stage that a stranger gets to, and come back when they are cut, 50 a second in all.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.amst import amst_server

import amst_core
from amst_core.cli import traffic
from amst_core.security.identity import find_token
from amst_core.units import parse_size

STRANGERS = Path(__file__).parents[1] / "tests" / "hostile" / "strangers.py"
MESSAGE = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strangers", type=int, default=1000)
    parser.add_argument("--rate", type=parse_size, default=100_000_000, help="bytes per second")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    allow_descriptors()
    ratios = []
    with tempfile.TemporaryDirectory() as state, tempfile.TemporaryDirectory() as root:
        with amst_server(root, state) as address:
            for turn in range(options.rounds):
                alone = measure(address, state, options.rate, options.seconds)
                with crowd(address, options.strangers):
                    among = measure(address, state, options.rate, options.seconds)
                ratios.append(among / alone)
                print(f"round {turn + 1}: {alone / 1e6:7.1f} MB/s alone, {among / 1e6:7.1f} MB/s among "
                      f"{options.strangers} strangers: {among / alone:.3f}", flush=True)  # fmt: skip
    print(f"median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")


def allow_descriptors() -> None:
    """As many as may be, for the crowd and for the server."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def crowd(address: str, size: int) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, str(STRANGERS), address, "--crowd", str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        yield
    finally:
        process.kill()
        process.communicate()


def measure(address: str, state: str, rate: float, seconds: float) -> float:
    """Bytes/s that the server acknowledged of messages sent at ``rate``, to the end of the last one."""
    payload = os.urandom(MESSAGE)
    with amst_core.connect(address, token=find_token(environ={"AMST_STATE_DIR": state}), streams=8) as session:
        traffic._tell(session, {"send": False})
        traffic._answer(session)
        tickets = []
        began = time.monotonic()
        for number in range(round(rate * seconds / MESSAGE)):
            tickets.append(session.send(payload, channel=traffic.DATA[0]))
            time.sleep(max(0.0, began + (number + 1) * MESSAGE / rate - time.monotonic()))
        for ticket in tickets:
            ticket.wait()
        achieved = len(tickets) * MESSAGE / (time.monotonic() - began)
        for channel in traffic.DATA:
            session.send(b"", channel=channel).wait()
    return achieved


if __name__ == "__main__":
    main()
