#!/usr/bin/env python3
"""What AMST carries over emulated paths, beside iperf3 in the same run.

    python benchmarks/congestion/paths.py grid|queue|userspace|change|share [--smoke] [--cells '500M*'] [--json FILE]

Needs root, iperf3 and ping. Each run is `amst bench` or iperf3 from one host of a lab (docs/lab.md) to the other, in a
lab of its own; with each seed all run one after the other over the same path. Goodput is from the first byte offered
to the last acknowledged (iperf3: at the receiver), slow start included. Figures are medians of the seeds; a run in
which the emulator was late is made again, and marked by ! when it was late every time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.errors import RunError
from harness.machine import describe

from congestion.scenarios.bench import Bench
from congestion.scenarios.changing import change
from congestion.scenarios.goodput import grid, userspace
from congestion.scenarios.queueing import queue
from congestion.scenarios.sharing import share

SUBCOMMANDS: Final[Mapping[str, tuple[Callable[[Bench], None], float]]] = {
    "grid": (grid, 12.0), "queue": (queue, 12.0), "userspace": (userspace, 12.0), "change": (change, 10.0),
    "share": (share, 20.0),
}  # fmt: skip
"""What each does, and for how many seconds it sends."""
SMOKE_S: Final = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subcommands = parser.add_subparsers(dest="what", required=True)
    for name, (act, seconds) in SUBCOMMANDS.items():
        text = (act.__doc__ or "").strip()
        sub = subcommands.add_parser(name, help=text.partition("\n")[0].replace("%", "%%"), description=text)
        sub.add_argument("--seconds", type=float, help=f"how long each transfer is (default: {seconds:g})")
        sub.add_argument("--seeds", type=int, metavar="N", help="runs, with the seeds 1 to N (default: 3)")
        sub.add_argument("--cells", nargs="+", default=[], metavar="PATTERN", help="these rows, as a shell's patterns")
        sub.add_argument("--who", nargs="+", default=[], metavar="PATTERN", help="these senders (queue, change, share)")
        sub.add_argument("--default", default="bbr", metavar="NAME", help="the hosts' own congestion control")
        sub.add_argument("--json", type=Path, metavar="FILE", help="every run, too; written after each row")
        sub.add_argument("--smoke", action="store_true", help=f"whether it runs: one cell, one seed, {SMOKE_S:g} s")
    options = parser.parse_args()
    act, seconds = SUBCOMMANDS[options.what]
    about = describe()
    print(f"{about['cpu']}, {about['cores']} cores, Linux {about['kernel']}, Python {about['python']}\n", flush=True)
    bench = Bench(
        seconds=options.seconds or (SMOKE_S if options.smoke else seconds),
        seeds=range(1, (options.seeds or (1 if options.smoke else 3)) + 1),
        default=options.default, cells=options.cells, who=options.who, smoke=options.smoke, file=options.json,
        about={"what": options.what, "machine": about, "default": options.default},
    )  # fmt: skip
    bench.about = {**bench.about, "seconds": bench.seconds, "seeds": list(bench.seeds)}
    try:
        act(bench)
    except RunError as err:
        sys.exit(f"{options.what}: {err}")


if __name__ == "__main__":
    main()
