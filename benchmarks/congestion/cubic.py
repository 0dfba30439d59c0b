"""CUBIC's average window against RFC 9438's tables 1 and 2, and what it does over time, in the link simulator.

    python benchmarks/congestion/cubic.py [--quick]

The tables are of a deterministic model: of every 1/P packets one is lost, and each loss finds the window where the
last one did. They are ``max(CUBIC's formula, Reno's 1.2/√P)``, without fast convergence, with which each loss would
change the next plateau. A flow comes to that steady state slowly. When its window is e too large, a loss comes before
the plateau by a time of the order of e; the cubic function is flat there, so that the window of the next loss is
nearer by the order of e³ only. After an ordinary slow start, which ends far above, hundreds of losses pass until the
average is within 10 %. So `response` measures from where the model says that losses happen, and `approach` shows that
this is the steady state: flows from above and from below come to it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from amst_cc_cubic.controller import ALPHA, BETA, C, CubicController
from amst_core.testing.simulator import FluidFlow, Link, Simulation

MSS = 1448
RATES = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
PUBLISHED = {
    0.01: dict(zip(RATES, (120, 379, 1200, 5926, 33325), strict=True)),
    0.1: dict(zip(RATES, (187, 1054, 5926, 33325, 187400), strict=True)),
}
"""Average windows in segments by round trip in seconds and loss rate (RFC 9438, tables 2 and 1, C = 0.4)."""

PACKET_LEVEL_DOWN_TO = 1e-5
_FAST_LINK = 12.5e9  # bytes/s: a queue never forms, the round trip is the link's delay


@dataclass(frozen=True, slots=True)
class Response:
    """One cell of the tables. Windows are averages in segments; ``ratio`` is of the measured to the published one."""

    loss_rate: float
    rtt_s: float
    published: int
    formula: float
    measured: float
    ratio: float
    model: str
    losses: int


@dataclass(frozen=True, slots=True)
class Approach:
    """How near flows come to the published average: ratios over the last ``losses``/10 losses of ``losses``.

    ``above``: from 1.5 × where the model says that losses happen; ``below``: from half of it; ``fast_convergence``:
    from above, with fast convergence, which the model leaves out.
    """

    loss_rate: float
    rtt_s: float
    losses: int
    above: float
    below: float
    fast_convergence: float


@dataclass(frozen=True, slots=True)
class BeginNear:
    """One early loss, which ends slow start at about as many segments, then one packet in ``every``."""

    segments: int
    every: int

    def gaps(self, random: Random) -> Iterator[int]:
        yield self.segments
        while True:
            yield self.every - 1


def average_window(loss_rate: float, rtt_s: float) -> float:
    """RFC 9438, figure 5, or Reno's √(3/2P) where that is more: segments."""
    return max(_cubic(loss_rate, rtt_s), _reno(loss_rate))


def window_at_loss(loss_rate: float, rtt_s: float) -> float:
    """Where the model's losses happen: the cubic function from β to 1 is (3 + β)/4 on the average, a line (1 + β)/2."""
    cubic, reno = _cubic(loss_rate, rtt_s), _reno(loss_rate)
    return cubic * 4 / (3 + BETA) if cubic > reno else reno * 2 / (1 + BETA)


def _cubic(loss_rate: float, rtt_s: float) -> float:
    return float((C * (3 + BETA) / (4 * (1 - BETA))) ** 0.25 * (rtt_s / loss_rate) ** 0.75)


def _reno(loss_rate: float) -> float:
    return math.sqrt(ALPHA * (1 + BETA) / (2 * (1 - BETA) * loss_rate))


def response(loss_rate: float, rtt_s: float, *, losses: int | None = None) -> Response:
    """Measure one cell: packet by packet down to 1e-5, below in portions of a 64th of the window."""
    packets = loss_rate >= PACKET_LEVEL_DOWN_TO
    if losses is None:
        losses = 30 if loss_rate >= 1e-4 else 12
    loss = BeginNear(round(window_at_loss(loss_rate, rtt_s)), round(1 / loss_rate))
    measured = (_by_packets if packets else _by_portions)(loss, rtt_s, losses) / MSS
    published = PUBLISHED[rtt_s][loss_rate]
    return Response(
        loss_rate, rtt_s, published, average_window(loss_rate, rtt_s), measured, measured / published,
        "packets" if packets else "fluid", losses,
    )  # fmt: skip


def _controller(*, fast_convergence: bool = False) -> CubicController:
    return CubicController({"fast_convergence": fast_convergence}, mss=MSS)


def _by_packets(loss: BeginNear, rtt_s: float, losses: int) -> float:
    """From the second loss on, as many whole cycles: bytes delivered in a round trip."""
    simulation = Simulation(Link(_FAST_LINK, rtt_s / 2, loss=loss), trace_interval=rtt_s)
    flow = simulation.add_flow(_controller(), mss=MSS)
    starts: list[tuple[float, int]] = []
    while len(starts) <= losses:
        lost = flow.lost
        simulation.run(until=simulation.now + rtt_s)
        if flow.lost > lost:
            starts.append((simulation.now, flow.delivered))
    (begin, before), (end, after) = starts[1], starts[-1]
    return (after - before) / ((end - begin) / rtt_s)


def _by_portions(loss: BeginNear, rtt_s: float, losses: int) -> float:
    flow = FluidFlow(_controller(), rtt=rtt_s, loss=loss, mss=MSS)
    flow.run(losses=2)
    return flow.run(losses=losses - 1)


def approach(loss_rate: float, rtt_s: float, *, losses: int = 300) -> Approach:
    """Let flows come to the steady state from both sides; in portions of an eighth of the window."""
    published = PUBLISHED[rtt_s][loss_rate]
    at_loss = window_at_loss(loss_rate, rtt_s)

    def ratio(start: float, *, fast_convergence: bool = False) -> float:
        loss = BeginNear(round(start * at_loss), round(1 / loss_rate))
        controller = _controller(fast_convergence=fast_convergence)
        flow = FluidFlow(controller, rtt=rtt_s, loss=loss, mss=MSS, acks_per_round=8)
        flow.run(losses=losses - losses // 10)
        return flow.run(losses=losses // 10) / MSS / published

    return Approach(loss_rate, rtt_s, losses, ratio(1.5), ratio(0.5), ratio(1.5, fast_convergence=True))


def after_a_loss(segments: int, rtt_s: float) -> list[dict[str, float]]:
    """The window after one loss at about ``segments``, up to twice K, beside the RFC's functions, in a hundred rows.

    Each row has ``t`` in seconds; ``cwnd``, ``w_cubic`` (figure 1, from this stage's own W_max and cwnd) and ``w_est``,
    in segments; and ``k``, in seconds, by figure 2.
    """
    loss = BeginNear(segments, 1 << 62)
    flow = FluidFlow(_controller(), rtt=rtt_s, loss=loss, mss=MSS)
    flow.run(losses=1)
    epoch = flow.controller.window / MSS
    w_max = float(flow.controller.state()["w_max"]) / MSS
    k = math.cbrt((w_max - epoch) / C)
    rows: list[dict[str, float]] = []
    while not rows or rows[-1]["t"] < 2 * k:
        flow.run(seconds=max(k / 50, rtt_s))
        state = flow.controller.state()
        if "t" in state:
            t = float(state["t"])
            rows.append({
                "t": t, "k": k, "cwnd": flow.controller.window / MSS, "w_cubic": C * (t - k) ** 3 + w_max,
                "w_est": float(state["w_est"]) / MSS,
            })  # fmt: skip
    return rows


def over_time(
    *, rate: float = 12.5e6, rtt_s: float = 0.1, buffer: float = 1.0, seconds: float = 60.0
) -> list[dict[str, float | str]]:
    """One flow alone on a link with a queue of ``buffer`` bandwidth-delay products, every 50 ms.

    Each row has ``time`` in seconds, ``cwnd``, ``w_max`` and ``queue`` in segments, ``rtt`` in seconds, ``mode`` and
    ``region``; what is not known is not there.
    """
    simulation = Simulation(Link(rate, rtt_s / 2, buffer=buffer * rate * rtt_s), trace_interval=0.05)
    flow = simulation.add_flow(CubicController({}, mss=MSS), mss=MSS)
    simulation.run(until=seconds)
    rows: list[dict[str, float | str]] = []
    for record in flow.trace:
        row: dict[str, float | str] = {
            "time": record.time, "cwnd": record.cwnd / MSS, "queue": record.queue / MSS, "mode": record.mode or "",
        }  # fmt: skip
        if record.rtt is not None:
            row["rtt"] = record.rtt
        if "w_max" in record.state:
            row["w_max"] = float(record.state["w_max"]) / MSS
        if "region" in record.state:
            row["region"] = record.state["region"]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1e-4 to 1e-6 only, and fewer losses")
    options = parser.parse_args()
    rates = RATES[:3] if options.quick else RATES
    cells = [(rtt_s, loss_rate) for rtt_s in PUBLISHED for loss_rate in rates]
    off = 0
    print("  RTT      P   RFC 9438   formula  measured  ratio  model    losses")
    for rtt_s, loss_rate in cells:
        row = response(loss_rate, rtt_s, losses=8 if options.quick else None)
        off += abs(row.ratio - 1) > 0.1
        print(
            f"{rtt_s * 1e3:3.0f}ms  {loss_rate:.0e} {row.published:9d} {row.formula:9.0f} {row.measured:9.0f}"
            f"  {row.ratio:5.3f}  {row.model:7s}  {row.losses:4d}",
            flush=True,
        )
    print("\n  RTT      P  losses  from above  from below  fast convergence   (ratios to RFC 9438)")
    for rtt_s, loss_rate in cells:
        near = approach(loss_rate, rtt_s, losses=100 if options.quick else 300)
        print(
            f"{rtt_s * 1e3:3.0f}ms  {loss_rate:.0e}  {near.losses:6d}  {near.above:10.3f}  {near.below:10.3f}"
            f"  {near.fast_convergence:16.3f}",
            flush=True,
        )
    if off:
        sys.exit(f"{off} of {len(cells)} averages are more than 10 % off")


if __name__ == "__main__":
    main()
