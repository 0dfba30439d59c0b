"""Memory to memory over loopback: ``amst bench`` beside iperf3, interleaved in one run, as ratios.

    python benchmarks/memory.py [--streams 1,4,32] [--rounds 5] [--size 4GiB] [--json FILE]

Each round measures iperf3 at its default block size and with ``-l 1M``, then AMST in plaintext (with CRC) and
encrypted, all with the same number of streams and bytes. The better of the two iperf3 runs is the peer. The
machine should do nothing else meanwhile; what counts is the ratio, round by round, and its median.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from amst_core.units import parse_size

AMST = [sys.executable, "-m", "amst_core"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@contextmanager
def amst_server(state: str) -> Iterator[str]:
    """A server on loopback; yields its address."""
    with tempfile.TemporaryDirectory() as root:
        process = subprocess.Popen(
            [*AMST, "serve", "--listen", "127.0.0.1:0", "--root", root],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "AMST_STATE_DIR": state},
        )
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()
            process.wait()


@contextmanager
def iperf_server(port: int) -> Iterator[None]:
    process = subprocess.Popen(["iperf3", "-s", "-p", str(port)], stdout=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait()


def iperf(port: int, streams: int, size: int, *block: str) -> float:
    """Bytes/s that iperf3 received."""
    out = subprocess.run(
        ["iperf3", "-c", "127.0.0.1", "-p", str(port), "-n", str(size), "-P", str(streams), "-J", *block],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(json.loads(out.stdout)["end"]["sum_received"]["bits_per_second"]) / 8


def amst(address: str, state: str, streams: int, size: int, *flags: str) -> float:
    """Bytes/s that AMST delivered, first byte offered to last byte acknowledged as verified."""
    out = subprocess.run(
        [*AMST, "bench", f"amst://{address}", "--size", str(size), "--streams", str(streams), "--json", *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "AMST_STATE_DIR": state},
    )
    result = json.loads(out.stdout)
    if not result["ok"] or not result["verified"] or result["bytes"] != size:
        raise SystemExit(f"amst bench failed: {out.stdout}{out.stderr}")
    return float(result["throughput_bytes_per_s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="1,4,32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=parse_size, default=4 << 30)
    parser.add_argument("--json", type=Path, help="write every round there")
    args = parser.parse_args()
    if shutil.which("iperf3") is None:
        raise SystemExit("iperf3 is not installed; on Debian: apt-get install iperf3")
    port = free_port()
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as state, amst_server(state) as address, iperf_server(port):
        for number in range(args.rounds):
            for streams in map(int, args.streams.split(",")):
                row = {
                    "round": number,
                    "streams": streams,
                    "iperf3": iperf(port, streams, args.size),
                    "iperf3_1m": iperf(port, streams, args.size, "-l", "1M"),
                    "plaintext": amst(address, state, streams, args.size, "--plaintext"),
                    "encrypted": amst(address, state, streams, args.size),
                }
                row["peer"] = max(row["iperf3"], row["iperf3_1m"])
                rounds.append(row)
                print(" ".join(f"{k} {v / 1e9:.2f} GB/s" if v > 1e6 else f"{k} {v:g}" for k, v in row.items()))
    system = f"Linux {platform.release()}, Python {platform.python_version()}"
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, {system}"
    print(f"\n{machine}; medians of {args.rounds} interleaved rounds of {args.size / 2**30:g} GiB\n")
    print("| streams | better iperf3, GB/s | plaintext, GB/s | ratio | encrypted, GB/s | ratio |")
    print("|---|---|---|---|---|---|")
    for streams in map(int, args.streams.split(",")):
        mine = [row for row in rounds if row["streams"] == streams]

        def median(key: str, mine: list[dict[str, float]] = mine) -> float:
            return statistics.median(row[key] for row in mine)

        ratios = {key: statistics.median(row[key] / row["peer"] for row in mine) for key in ("plaintext", "encrypted")}
        print(
            f"| {streams} | {median('peer') / 1e9:.2f} | {median('plaintext') / 1e9:.2f} | {ratios['plaintext']:.2f} "
            f"| {median('encrypted') / 1e9:.2f} | {ratios['encrypted']:.2f} |"
        )
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rounds": rounds}, indent=1))


if __name__ == "__main__":
    main()
