"""What a GiB or a file costs in system calls, context switches and allocations, against tests/budget/budget.toml.

    python benchmarks/budget.py [--only memory-plaintext,...] [--runs 3]
    python benchmarks/budget.py --record [--runs 10]

Counts, and prints each count beside its limit; exits with 1 if one is passed in every run. With --record the counts
become the budget. No clock is read: this may run on a busy machine. Needs strace and glibc.
"""

from __future__ import annotations

import argparse
import platform
import sys

from harness import budget
from harness.counting import LOADS, METRICS, Counter, Load, missing_tool
from harness.processes import unwind_on_sigterm


def main() -> int:
    """Count what the command line says; the exit code."""
    names = [load.name for load in LOADS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), default=names, help=", ".join(names))
    parser.add_argument("--runs", type=int, help="counts of each load (default: 1; 10 with --record)")
    parser.add_argument("--record", action="store_true", help="write what was counted, with margins, as the budget")
    options = parser.parse_args()
    unwind_on_sigterm()
    if unknown := set(options.only) - set(names):
        parser.error(f"no load {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if reason := missing_tool():
        raise SystemExit(reason)
    runs = options.runs or (10 if options.record else 1)
    allowed = budget.read() if budget.FILE.exists() else {}
    chosen = [load for load in LOADS if load.name in options.only]
    counts = {load.name: [_show(load, allowed) for _ in range(runs)] for load in chosen}
    if options.record:
        how = f"{runs} runs, Python {platform.python_version()}, Linux {platform.release()}"
        budget.write({**allowed, **budget.record(counts, how=how)})
        print(f"{budget.FILE} is recorded")
        return 0
    return int(any(all(budget.excesses(one, allowed[name]) for one in some) for name, some in counts.items()))


def _show(load: Load, allowed: budget.Budget) -> dict[str, float]:
    counted = Counter(load).count()
    per = "file" if load.per == 1 else "GiB"
    for metric in METRICS:
        allowance = allowed[load.name].metrics[metric] if load.name in allowed else None
        limit = f" of {allowance.limit:,.0f}" if allowance else ""
        over = "  OVER" if allowance and counted[metric] > allowance.limit else ""
        print(f"{load.name:18} {metric:16} {counted[metric]:>14,.0f}{limit} per {per}{over}", flush=True)
    return counted


if __name__ == "__main__":
    sys.exit(main())
