"""How long packets of others wait beside a transfer."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from harness.errors import RunError

from amst_core.testing.netlab import Lab

from . import cells
from .bench import Bench, head, mark, median, row, shown
from .transfers import Amst, Iperf, Load, Run, Sender, UserspaceAmst, Watch, pinging

BUFFERS: Final = 4.0
STEADY_S: Final = 4.0
"""Slow start and its queue are over by then."""

SENDERS: Final[Sequence[Sender]] = (
    Amst("AMST"),
    UserspaceAmst("AMST, user space"),
    Amst("AMST, --polite", "--polite"),
    Iperf("cubic", 1),
    Iperf("cubic", 8),
    Iperf("bbr", 1),
    Iperf("bbr", 8),
)


def queue(bench: Bench) -> None:
    """Round trips (ping) beside a transfer over a path with a buffer of four bandwidth-delay products, from 4 s on."""
    head("path", "who", "Mbit/s", "median, of the path's round trip", "95 %")
    load = Load(seconds=max(bench.seconds, STEADY_S + 1))
    for name, values in bench.chosen(cells.QUEUE):
        path = cells.path_of(values, BUFFERS)
        for sender in bench.senders(SENDERS):
            found = bench.each(path, [sender], lambda lab, sender: _pinged(lab, sender, load))
            runs = found[sender.name]
            half, most = median(runs, "p50_s") / path.rtt, median(runs, "p95_s") / path.rtt
            row(name, sender.name, shown(runs), f"{half:.2f}{mark(runs)}", f"{most:.2f}{mark(runs)}")
            bench.note(name, found, p50=half, p95=most)


def _pinged(lab: Lab, sender: Sender, load: Load) -> Run:
    with pinging(lab) as found, Watch(lab, sender.port) as watch:
        run = sender.send(lab, load)
    p50, p95 = waits(found, watch.began + STEADY_S, watch.began + (load.seconds or 0.0))
    return replace(run, seen={"p50_s": p50, "p95_s": p95})


def waits(found: Sequence[tuple[float, float]], since: float, until: float) -> tuple[float, float]:
    """Median and 95 % in seconds of the answers that came in that time.

    Raises:
        RunError: there are too few.
    """
    times = [rtt_s for at, rtt_s in found if since <= at <= until]
    if len(times) < 5:
        raise RunError(f"ping had {len(times)} answers beside the transfer")
    return statistics.median(times), statistics.quantiles(times, n=20)[-1]
