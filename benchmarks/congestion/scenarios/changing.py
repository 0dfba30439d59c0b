"""How soon a transfer carries what a path that has changed can carry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from harness.errors import RunError

from amst_core.testing.netlab import Lab, Path

from . import cells
from .bench import Bench, head, mark, median, row
from .transfers import Amst, Iperf, Load, Run, Sender, UserspaceAmst, Watch

MOST: Final = 0.8
SECOND: Final = 1.0
STEADY_S: Final = 4.0

SENDERS: Final[Sequence[Sender]] = (Amst("AMST"), UserspaceAmst("AMST, user space"), Iperf("bbr", 1))


def change(bench: Bench) -> None:
    """A path that changes when a third has been sent and back when two have: when 80 % of the new best is reached.

    The best is what the same sender carries over the unchanged new path in its last seconds, with the same seed and
    the same buffer. What counts is the first second that begins after the change: 1.0 s is at once.
    """
    head("change", "who", "80 % of the new best after", "and after changing back")
    before = cells.path_of(cells.CHANGING)
    known: dict[tuple[str, int], Run] = {}
    for name, values in bench.chosen(cells.CHANGES):
        after = before.changed(**values)
        for sender in bench.senders(SENDERS):
            runs = []
            for seed in bench.seeds:
                if (sender.name, seed) not in known:
                    known[sender.name, seed] = _unchanged(bench, before, seed, sender)
                bests = _unchanged(bench, after, seed, sender), known[sender.name, seed]
                measure = partial(_changed, values=values, bests=bests, seconds=bench.seconds)
                runs.append(bench.once(before, seed, sender, measure))
            row(name, sender.name, *(_time(runs, which) for which in ("there_s", "back_s")))
            bench.note(name, {sender.name: runs})


def _unchanged(bench: Bench, path: Path, seed: int, sender: Sender) -> Run:
    def measure(lab: Lab, sender: Sender) -> Run:
        with Watch(lab, sender.port) as watch:
            run = sender.send(lab, Load(seconds=bench.seconds))
        return replace(run, seen={"steady": carried(watch.samples, bench.seconds - STEADY_S, bench.seconds)})

    return bench.once(path, seed, sender, measure)


def _changed(lab: Lab, sender: Sender, values: cells.Values, bests: tuple[Run, Run], seconds: float) -> Run:
    back = {name: cells.CHANGING[name] for name in values}
    then = [(seconds, partial(lab.link.set, **values)), (2 * seconds, partial(lab.link.set, **back))]
    with Watch(lab, sender.port, then) as watch:
        run = sender.send(lab, Load(seconds=3 * seconds))
    if len(watch.done) != len(then):
        raise RunError(f"{sender.name} ended before the path had changed twice")
    there, again = watch.done
    best, best_again = (one.seen["steady"] for one in bests)
    seen = {
        "there_s": recovery(watch.samples, there, again, best),
        "back_s": recovery(watch.samples, again, 3 * seconds, best_again),
        "best": best,
        "best_back": best_again,
    }
    return replace(run, seen=seen, trusted=all(one.trusted for one in bests))


def carried(samples: Sequence[tuple[float, int]], since: float, until: float) -> float:
    """Bytes/s received between two moments.

    Raises:
        RunError: there are too few samples.
    """
    within = [(at, total) for at, total in samples if since <= at <= until]
    if len(within) < 2:
        raise RunError("the lab was looked at too seldom")
    return (within[-1][1] - within[0][1]) / (within[-1][0] - within[0][0])


def recovery(samples: Sequence[tuple[float, int]], since: float, until: float, best: float) -> float:
    """Seconds after ``since`` until the end of the first second that began after it and carried `MOST` of ``best``
    (bytes/s); infinite when there was none before ``until``."""
    within = [(at, total) for at, total in samples if since <= at <= until]
    first = 0
    for at, total in within:
        while first + 1 < len(within) and within[first + 1][0] <= at - SECOND:
            first += 1
        began, earlier = within[first]
        if at - began >= SECOND and total - earlier >= MOST * best * (at - began):
            return at - since
    return math.inf


def _time(runs: Sequence[Run], which: str) -> str:
    value = median(runs, which)
    return ("never" if math.isinf(value) else f"{value:.1f} s") + mark(runs)
