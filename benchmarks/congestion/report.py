#!/usr/bin/env python3
"""BBR and CUBIC in the link simulator against what was published of them: one page with tables and plots.

    python benchmarks/congestion/report.py [--quick] [--output build/congestion] [--figures docs/figures]

Writes report.html, which needs nothing else, and results.json, every number in it. The same program gives the same
numbers on any machine; it takes some minutes of both cores. ``--figures`` writes the plots as SVG files too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from harness.charts import Band, Series, lines  # noqa: E402

from amst_cc_cubic.controller import CubicController  # noqa: E402
from amst_core.interfaces import CongestionController  # noqa: E402
from amst_core.testing.simulator import TraceRecord  # noqa: E402
from congestion import bbr, cubic  # noqa: E402

MBIT = 1e6 / 8
LOSSES = bbr.LOSSES
QUICK_LOSSES = (1e-5, 1e-3, 0.01, 0.05, 0.2)


def make_cubic(seed: int) -> CongestionController:
    """As it is by default; it draws nothing."""
    return CubicController({}, mss=bbr.MSS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows, one seed, 20 s: a look, not a result")
    parser.add_argument("--output", type=Path, default=Path("build/congestion"))
    parser.add_argument("--figures", type=Path, help="where the plots go as files too")
    options = parser.parse_args()
    results = measure(quick=options.quick)
    figures = draw(results)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "report.html").write_text(page(results, figures))
    (options.output / "results.json").write_text(json.dumps(results["tables"], indent=1) + "\n")
    if options.figures is not None:
        options.figures.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            (options.figures / f"{name}.svg").write_text(figure)
    print(f"{options.output}/report.html shows it")


# ---- measuring ----------------------------------------------------------------------------


def measure(*, quick: bool) -> dict[str, Any]:
    """Everything: ``tables`` of plain values, and what is only drawn."""
    losses = QUICK_LOSSES if quick else LOSSES
    seconds, seeds = (20.0, (1,)) if quick else (60.0, (1, 2, 3))
    rates = cubic.RATES[:3] if quick else cubic.RATES
    cells = [(rate, rtt_s) for rtt_s in cubic.PUBLISHED for rate in rates]
    against = partial(bbr.goodput_against_loss, seconds=seconds, seeds=seeds)
    with ProcessPoolExecutor(2) as pool:
        responses = [pool.submit(cubic.response, *cell) for cell in cells]
        approaches = [pool.submit(cubic.approach, *cell) for cell in cells]
        goodput = [
            pool.submit(against, {name: make}, [loss])
            for name, make in (("bbr", bbr.bbr), ("cubic", make_cubic))
            for loss in losses
        ]
        goodput += [
            pool.submit(against, {"bbr, no lt_bw": bbr.bbr_without_policer}, [loss])
            for loss in losses
            if loss >= bbr.POLICED
        ]
        phases = pool.submit(bbr.phases)
        changes, fairness, over_time = pool.submit(bbr.changes), pool.submit(bbr.fairness), pool.submit(cubic.over_time)
        rows = [row for future in goodput for row in future.result()]
        trace = phases.result()
        found: dict[str, Any] = {
            "phases": trace, "changes": changes.result(), "fairness": fairness.result(), "cubic": over_time.result(),
        }  # fmt: skip
        found["tables"] = {
            "cubic_response": [asdict(future.result()) for future in responses],
            "cubic_approach": [asdict(future.result()) for future in approaches],
            "goodput_against_loss": [asdict(row) for row in rows],
            "bbr_phases": [asdict(stay) for stay in bbr.stays(trace)],
            "bbr_changes": [_without_traces(row) for row in found["changes"]],
            "bbr_fairness": [_without_traces(row) for row in found["fairness"]],
        }
    return found


def _without_traces(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in row.__slots__ if not name.startswith("trace")}


# ---- drawing ------------------------------------------------------------------------------


def draw(results: dict[str, Any]) -> dict[str, str]:
    """Every plot by its name."""
    phases = results["phases"]
    figures = {
        "goodput-against-loss": _goodput(results["tables"]["goodput_against_loss"]),
        "bbr-phases": _phases(phases, "BBR from its start: what is in flight, and what waits", end=phases[-1].time),
        "bbr-startup": _phases(phases, "BBR: Startup and Drain", end=4.0),
        "cubic-over-time": _cubic(results["cubic"]),
        "bbr-fairness": _shares(results["fairness"][0]),
    }
    for row in results["changes"]:
        figures["bbr-" + row.name.replace(" ", "-")] = _change(row)
    return figures


def _goodput(rows: Sequence[dict[str, Any]]) -> str:
    limit = sorted({(row["loss"] * 100, row["limit"] / MBIT) for row in rows})
    names = list(dict.fromkeys(row["controller"] for row in rows))
    return lines(
        [
            *(Series(name, [(row["loss"] * 100, row["median"] / MBIT) for row in rows if row["controller"] == name])
              for name in names),
            Series("what arrives of a full path", limit, dashed=True),
        ],
        title="Goodput against random loss, 100 Mbit/s, 100 ms, buffer 1 BDP", x_label="loss, %", y_label="Mbit/s",
        log_x=True,
    )  # fmt: skip


def _phases(trace: Sequence[TraceRecord], title: str, *, end: float) -> str:
    shown = thin([record for record in trace if record.time <= end])
    bands = [
        Band(stay.mode, stay.start, stay.end)
        for stay in bbr.stays(trace)
        if stay.mode != "probe_bw" and stay.start < end
    ]
    return lines(
        [
            Series("in flight", [(record.time, record.in_flight / bbr.BDP) for record in shown]),
            Series("queue", [(record.time, record.queue / bbr.BDP) for record in shown]),
            Series("pacing rate / rate of the path",
                   [(record.time, (record.pacing_rate or 0) / bbr.RATE) for record in shown], dashed=True),
        ],
        title=title + ", 100 Mbit/s, 100 ms, buffer 4 BDP", x_label="seconds", y_label="BDP", bands=bands,
    )  # fmt: skip


def _cubic(rows: Sequence[dict[str, Any]]) -> str:
    return lines(
        [
            Series("window", [(row["time"], row["cwnd"]) for row in rows]),
            Series("W_max", [(row["time"], row["w_max"]) for row in rows if "w_max" in row], dashed=True),
            Series("queue", [(row["time"], row["queue"]) for row in rows]),
        ],
        title="CUBIC alone, 100 Mbit/s, 100 ms, buffer 1 BDP", x_label="seconds", y_label="segments",
    )  # fmt: skip


def _change(row: bbr.Recovery) -> str:
    shown = thin(row.trace)
    return lines(
        [
            Series("goodput, Mbit/s, over 1 s", rates(row.trace)),
            Series("round trip, ms", [(one.time, one.rtt * 1e3) for one in shown if one.rtt is not None]),
        ],
        title=f"BBR when the {row.name} at {row.changed:g} s", x_label="seconds", y_label="", high=200,
    )  # fmt: skip


def _shares(row: bbr.Shares) -> str:
    return lines(
        [Series(f"flow {number}", rates(trace)) for number, trace in enumerate(row.traces, 1)],
        title=f"BBR, {row.name}: Jain's index {row.index:.3f} from {row.start:g} s on", x_label="seconds",
        y_label="Mbit/s",
    )  # fmt: skip


def rates(trace: Sequence[TraceRecord], *, over: float = 1.0) -> list[tuple[float, float]]:
    """Goodput in Mbit/s over the ``over`` seconds before each moment, four times as often."""
    points, first = [], 0
    due = trace[0].time + over
    for record in trace:
        if record.time < due:
            continue
        due += over / 4
        while trace[first].time < record.time - over - 1e-9:
            first += 1
        elapsed = record.time - trace[first].time
        points.append((record.time, (record.delivered - trace[first].delivered) / elapsed / MBIT))
    return points


def thin(trace: Sequence[TraceRecord], most: int = 700) -> Sequence[TraceRecord]:
    """No more records than can be told apart in a plot."""
    return trace[:: max(1, len(trace) // most)]


# ---- the page -----------------------------------------------------------------------------


def page(results: dict[str, Any], figures: dict[str, str]) -> str:
    """Tables and plots in one page."""
    style = (HERE.parent / "harness" / "report.css").read_text()
    body = "".join(f"<p>{figure}</p>" for figure in figures.values())
    tables = "".join(
        f"<h2>{escape(name.replace('_', ' '))}</h2>{_table(rows)}" for name, rows in results["tables"].items()
    )
    title = "Congestion control in the simulator"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{style}</style></head><body><h1>{title}</h1>\n{body}{tables}</body></html>\n"
    )


def _table(rows: Sequence[dict[str, Any]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    lines_ = "".join("<tr>" + "".join(f"<td>{_shown(value)}</td>" for value in row.values()) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{lines_}</table>"


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return escape(str(value))


if __name__ == "__main__":
    main()
