"""How much arrives: AMST at its defaults beside the best of iperf3, and paced in user space beside kernel BBR."""

from __future__ import annotations

import statistics
from typing import Final

from . import cells
from .bench import Bench, head, median, of_best, ran, row, shown
from .transfers import PEERS, Amst, Iperf, Load, UserspaceAmst

LONG_S: Final = 0.2
LONG_SECONDS: Final = 20.0
"""Paths with a round trip of `LONG_S` or more are given so many seconds at least."""


def grid(bench: Bench) -> None:
    """`amst bench` at its defaults against the best of iperf3 with cubic and bbr, 1 and 8 streams."""
    ours = Amst("AMST")
    head("path", *(peer.name for peer in PEERS), ours.name, "of the best", "runs on")
    for name, values in bench.chosen(cells.GRID):
        path = cells.path_of(values)
        load = Load(seconds=bench.seconds if path.rtt < LONG_S else max(bench.seconds, LONG_SECONDS))
        found = bench.each(path, [*PEERS, ours], lambda lab, sender, load=load: sender.send(lab, load))
        peers = {who: runs for who, runs in found.items() if who != ours.name}
        ratio = of_best(found[ours.name], peers)
        row(name, *map(shown, found.values()), f"{ratio:.2f}", ran(found[ours.name]))
        bench.note(name, found, ratio=ratio)


def userspace(bench: Bench) -> None:
    """Paced in user space over the kernel's cubic, against one connection of the kernel's bbr."""
    kernel = Iperf("bbr", 1)
    head("path", kernel.name, "AMST, user space", "ratio", "goal", "seconds", "runs on")
    for name, cell in bench.chosen(cells.USERSPACE):
        ours = UserspaceAmst("AMST, user space", *_streams(cell))
        load = Load(size=cell.size) if cell.size is not None else Load(seconds=cell.seconds or bench.seconds)
        path = cells.path_of(cell.path)
        found = bench.each(path, [kernel, ours], lambda lab, sender, load=load: sender.send(lab, load))
        ratio = of_best(found[ours.name], {kernel.name: found[kernel.name]})
        took = [statistics.median(run.seconds for run in runs) for runs in found.values()]
        goal = "-" if cell.goal is None else f"{cell.goal:.2f}"
        seconds = " and ".join(f"{value:.1f}" for value in took)
        row(name, *map(shown, found.values()), f"{ratio:.2f}", goal, seconds, ran(found[ours.name]))
        bench.note(name, found, ratio=ratio, kernel=median(found[kernel.name]), userspace=median(found[ours.name]))


def _streams(cell: cells.UserspaceCell) -> list[str]:
    return [] if cell.max_streams is None else ["--max-streams", str(cell.max_streams)]
