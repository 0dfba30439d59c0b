#!/usr/bin/env python3
"""BBR in the simulator on the path of its paper, 100 Mbit/s and 100 ms (Cardwell et al., ACM Queue 14(5), figure 8).

Each function runs one experiment and returns rows or a flow's trace; `main` prints them all as tables. The same
arguments give the same numbers on any machine.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from amst_cc_bbr.controller import BbrController
from amst_core.interfaces import CongestionController
from amst_core.testing.simulator import Bernoulli, Flow, Link, Simulation, TraceRecord

MSS = 1448
RATE = 100e6 / 8
RTT = 0.1
BDP = RATE * RTT
LOSSES = (1e-5, 1e-4, 1e-3, 0.003, 0.01, 0.02, 0.05, 0.08, 0.1, 0.12, 0.15, 0.17, 0.2, 0.25, 0.3)
POLICED = 0.12
"""From about here on the search for policers may make a difference."""

Make = Callable[[int], CongestionController]
"""Makes a controller, given a seed."""


def bbr(seed: int) -> CongestionController:
    """As it is by default."""
    return BbrController({"seed": seed}, mss=MSS)


def bbr_without_policer(seed: int) -> CongestionController:
    """Without the search for policers, which random loss of 16.3 % and more sets off."""
    return BbrController({"seed": seed, "long_term_bandwidth": False}, mss=MSS)


def path(*, loss: float = 0.0, buffer: float = 1.0, rate: float = RATE, rtt: float = RTT) -> Link:
    """``buffer`` in bandwidth-delay products."""
    return Link(rate, rtt / 2, buffer=buffer * rate * rtt, loss=Bernoulli(loss) if loss else None)


def run(link: Link, make: Make = bbr, *, seconds: float, seed: int = 1, interval: float = 0.1) -> Flow:
    """One flow alone on ``link``."""
    simulation = Simulation(link, seed=seed, trace_interval=interval)
    flow = simulation.add_flow(make(seed), mss=MSS)
    simulation.run(until=seconds)
    return flow


# ---- goodput against loss -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LossRow:
    """Goodput in bytes/s over whole flows, Startup included, as figure 8 has it.

    ``median``, ``least`` and ``most`` are over the seeds; ``limit`` is the rate times what arrives of each packet.
    """

    controller: str
    loss: float
    median: float
    least: float
    most: float
    limit: float


def goodput_against_loss(
    controllers: Mapping[str, Make],
    losses: Sequence[float] = LOSSES,
    *,
    seconds: float = 60.0,
    seeds: Sequence[int] = (1, 2, 3),
    rate: float = RATE,
) -> list[LossRow]:
    """Flows of a minute under random loss. Published: BBR meets the limit up to 5 % and is close to it up to 15 %."""
    rows = []
    for name, make in controllers.items():
        for loss in losses:
            found = [
                run(path(loss=loss, rate=rate), make, seconds=seconds, seed=seed, interval=1.0).goodput(0, seconds)
                for seed in seeds
            ]
            rows.append(LossRow(name, loss, statistics.median(found), min(found), max(found), rate * (1 - loss)))
    return rows


# ---- phases over time ---------------------------------------------------------------------


def phases(*, seconds: float = 35.0, interval: float = 0.01, buffer: float = 4.0) -> list[TraceRecord]:
    """A flow from its start over two ProbeRTTs: mode, pacing rate, in flight, round trip and queue at each time."""
    return run(path(buffer=buffer), seconds=seconds, interval=interval).trace


@dataclass(frozen=True, slots=True)
class Stay:
    """An uninterrupted stay in a mode. Seconds, bytes; the queue is the bottleneck's."""

    mode: str
    start: float
    end: float
    least_in_flight: int
    max_queue: float
    last_queue: float


def stays(trace: Sequence[TraceRecord]) -> list[Stay]:
    """The modes of ``trace`` in order, one after the other; as exact as its interval."""
    edges = [0, *(at for at, (one, other) in enumerate(pairwise(trace), 1) if one.mode != other.mode), len(trace) - 1]
    return [
        Stay(
            str(trace[first].mode),
            trace[first].time,
            trace[last].time,
            min(record.in_flight for record in trace[first : last + 1]),
            max(record.queue for record in trace[first : last + 1]),
            trace[last].queue,
        )
        for first, last in pairwise(edges)
    ]


# ---- when the path changes ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recovery:
    """How a flow took a change of its path at ``changed``.

    ``within`` is the time from then on to the first second in which goodput was within a tenth of ``expected``
    (bytes/s) and the mean round trip within a tenth of what it is without a queue; None: never. ``goodput`` is that
    from 15 s after the change on.
    """

    name: str
    changed: float
    expected: float
    within: float | None
    goodput: float
    max_queue: float
    lost: int
    trace: list[TraceRecord]


def _change(name: str, *, rate: float, rtt: float, buffer: float, seconds: float, at: float) -> Recovery:
    link = path(buffer=buffer)
    simulation = Simulation(link, seed=1)
    flow = simulation.add_flow(bbr(1), mss=MSS)
    simulation.at(at, lambda: link.set(rate=rate, delay=rtt / 2, back=rtt / 2))
    simulation.run(until=seconds)
    trace = flow.trace
    after = [record for record in trace if record.time >= at]
    within = None
    for record in after:
        if record.time + 1 > seconds:
            break
        trips = [one.rtt for one in after if record.time <= one.time <= record.time + 1 and one.rtt is not None]
        if flow.goodput(record.time, record.time + 1) >= 0.9 * rate and statistics.mean(trips) <= 1.1 * rtt:
            within = record.time - at
            break
    lost = trace[-1].lost - next(record.lost for record in reversed(trace) if record.time <= at)
    goodput = flow.goodput(at + 15, seconds)
    return Recovery(name, at, rate, within, goodput, max(record.queue for record in after), lost, trace)


def changes(*, seconds: float = 40.0, at: float = 12.0, buffer: float = 2.0) -> list[Recovery]:
    """The rate halves; it doubles; the round trip doubles; it halves."""
    how = {"seconds": seconds, "at": at, "buffer": buffer}
    return [
        _change("rate halves", rate=RATE / 2, rtt=RTT, **how),
        _change("rate doubles", rate=RATE * 2, rtt=RTT, **how),
        _change("round trip doubles", rate=RATE, rtt=RTT * 2, **how),
        _change("round trip halves", rate=RATE, rtt=RTT / 2, **how),
    ]


# ---- several flows ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shares:
    """Flows that share a path: goodput of each from ``start`` to ``end`` in bytes/s, and Jain's index of them."""

    name: str
    start: float
    end: float
    goodput: tuple[float, ...]
    index: float
    traces: tuple[list[TraceRecord], ...]


def shares(
    name: str,
    makes: Sequence[Make],
    *,
    starts: Sequence[float],
    seconds: float,
    settled: float,
    buffer: float = 1.0,
) -> Shares:
    """One flow of each of ``makes``, begun at its time; what each got from ``settled`` on."""
    simulation = Simulation(path(buffer=buffer), seed=1)
    flows = [
        simulation.add_flow(make(seed), mss=MSS, start=start)
        for seed, (make, start) in enumerate(zip(makes, starts, strict=True), 1)
    ]
    simulation.run(until=seconds)
    rates = tuple(flow.goodput(settled, seconds) for flow in flows)
    index = sum(rates) ** 2 / (len(rates) * sum(rate * rate for rate in rates))
    return Shares(name, settled, seconds, rates, index, tuple(flow.trace for flow in flows))


def fairness() -> list[Shares]:
    """Two flows begun 5 s apart with buffers of one and four BDP, and five begun 2 s apart."""
    return [
        shares("two, buffer 1 BDP", [bbr] * 2, starts=(0, 5), seconds=80, settled=30),
        shares("two, buffer 4 BDP", [bbr] * 2, starts=(0, 5), seconds=80, settled=30, buffer=4.0),
        shares("five, buffer 2 BDP", [bbr] * 5, starts=(0, 2, 4, 6, 8), seconds=80, settled=30, buffer=2.0),
    ]


# ---- tables -------------------------------------------------------------------------------


def _mbit(rate: float) -> str:
    return f"{rate * 8 / 1e6:.1f}"


def _print_loss(losses: Sequence[float], seconds: float, seeds: Sequence[int]) -> None:
    print("\n| controller | loss | goodput, Mbit/s: median | least | most | limit | median / limit |")
    print("|---|---|---|---|---|---|---|")
    makes = [("bbr", bbr, loss) for loss in losses]
    makes += [("bbr, no lt_bw", bbr_without_policer, loss) for loss in losses if loss >= POLICED]
    for name, make, loss in makes:
        (row,) = goodput_against_loss({name: make}, [loss], seconds=seconds, seeds=seeds)
        numbers = " | ".join(_mbit(rate) for rate in (row.median, row.least, row.most, row.limit))
        print(f"| {name} | {loss:.3%} | {numbers} | {row.median / row.limit:.3f} |", flush=True)


def _print_phases() -> None:
    trace = phases()
    print("\n| mode | from, s | to, s | least in flight, packets | largest queue, packets | queue at its end |")
    print("|---|---|---|---|---|---|")
    for stay in stays(trace):
        packets = " | ".join(f"{size / MSS:.0f}" for size in (stay.least_in_flight, stay.max_queue, stay.last_queue))
        print(f"| {stay.mode} | {stay.start:.2f} | {stay.end:.2f} | {packets} |")


def _print_changes() -> None:
    print("\n| at 12 s the | used, no queue, after s | Mbit/s from 27 s on | largest queue, BDP | lost, packets |")
    print("|---|---|---|---|---|")
    for row in changes():
        within = "never" if row.within is None else f"{row.within:.1f}"
        numbers = f"{_mbit(row.goodput)} | {row.max_queue / BDP:.2f} | {row.lost / MSS:.0f}"
        print(f"| {row.name} | {within} | {numbers} |")


def _print_fairness() -> None:
    print("\n| flows | from, s | goodput, Mbit/s | Jain's index |")
    print("|---|---|---|---|")
    for row in fairness():
        print(f"| {row.name} | {row.start:.0f} | {', '.join(map(_mbit, row.goodput))} | {row.index:.3f} |")


def main() -> None:
    """Print everything; it takes minutes."""
    parser = argparse.ArgumentParser(description="BBR in the simulator, 100 Mbit/s and 100 ms")
    parser.add_argument("--losses", type=float, nargs="*", default=LOSSES, help="loss rates, as fractions")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the flows under loss")
    parser.add_argument("--seeds", type=int, nargs="*", default=(1, 2, 3), help="one flow for each")
    options = parser.parse_args()
    _print_phases()
    _print_changes()
    _print_fairness()
    _print_loss(options.losses, options.seconds, options.seeds)


if __name__ == "__main__":
    main()
