"""The speed table: AMST beside the programs that users would pick instead, on this machine, as ratios.

    python benchmarks/compare.py [--only memory,file] [--rounds 5] [--size 4GiB] [--streams 1,4,32,128,512]

Runs interleaved rounds of every workload and writes results.json (schema: benchmarks/harness/results.py) and
report.html. The machine should do nothing else meanwhile; runs that began on a busy one are marked. Peers that are not
installed are named in the report, with how to get them. Exits with 1 if a run of ours fails, or what arrived differs;
never for a ratio.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

from harness import machine
from harness.peers import NAMED_ONLY
from harness.processes import unwind_on_sigterm
from harness.report import Units, failures, render, text_table, units
from harness.results import Absent, Results, Run, load
from harness.rounds import Bench, choose_directory
from harness.workloads import LARGE, SMALL_FILES, STREAMS, Workload, workloads

from amst_core.units import parse_size


def main() -> int:
    """Run what the command line says; the exit code."""
    options = parse()
    unwind_on_sigterm()
    if options.report:
        return write(load(json.loads(options.report.read_text())), options.output)
    chosen = choose(workloads(size=options.size, files=options.files, streams=options.streams), options.only)
    if options.list:
        for workload in chosen:
            print(f"{workload.name:12} {workload.title}: {', '.join(one.name for one in workload.contenders)}")
        return 0
    with tempfile.TemporaryDirectory(
        prefix="amst-bench-", dir=options.directory or choose_directory(options.size)
    ) as name:
        results = measure(chosen, Path(name), options.rounds)
    return write(results, options.output)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", type=_names, default=[], metavar="NAMES", help="groups or workloads, e.g. memory,tree"
    )
    parser.add_argument("--rounds", type=_positive, default=5, help="after the warm-up (default: 5)")
    parser.add_argument("--size", type=parse_size, default=LARGE, help="of each large run (default: 4GiB)")
    parser.add_argument("--files", type=_positive, default=SMALL_FILES, help="in the tree (default: 10000)")
    parser.add_argument("--streams", type=_numbers, default=STREAMS, help="memory to memory (default: 1,4,32,128,512)")
    parser.add_argument("--directory", type=Path, help="where files are copied (default: /dev/shm if there is room)")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="directory (default: build/bench)")
    parser.add_argument("--report", type=Path, metavar="JSON", help="run nothing: make the report of an earlier result")
    parser.add_argument("--list", action="store_true", help="run nothing: print the workloads and who does them")
    return parser.parse_args()


def choose(all_workloads: list[Workload], only: list[str]) -> list[Workload]:
    """Those named by group or name, in the order of the table."""
    unknown = set(only) - {one.name for one in all_workloads} - {one.group for one in all_workloads}
    if unknown:
        known = ", ".join(dict.fromkeys(name for one in all_workloads for name in (one.group, one.name)))
        raise SystemExit(f"no workload {', '.join(sorted(unknown))}; there are {known}")
    return [one for one in all_workloads if not only or one.name in only or one.group in only]


def measure(chosen: list[Workload], directory: Path, rounds: int) -> Results:
    """Every round of every workload, each with a trial and a warm-up before."""
    place = {"path": str(directory.parent), "file_system": machine.file_system(directory)}
    results = Results(time.strftime("%Y-%m-%dT%H:%M:%S%z"), machine.describe(), place, rounds)
    results.absent += [
        Absent("", name, "not a program that does these jobs by itself", how) for name, how in NAMED_ONLY
    ]
    bench, began = Bench(directory), time.monotonic()
    for workload in chosen:
        print(f"{workload.title}:", flush=True)
        able, absent = bench.try_out(workload)
        results.absent += absent
        for one in absent:
            print(f"  without {one.contender}: {one.reason}", flush=True)
        results.versions |= {one.name: one.version() for one in able if one.name not in results.versions}
        runs: list[Run] = []
        written = units(workload.size, workload.files)

        def note(run: Run, runs: list[Run] = runs, written: Units = written) -> None:
            runs.append(run)
            rate, cpu = written.rate(run.rate), written.cpu(run.cpu_s_per_gib)
            said = (
                f"{rate:>7} {written.rate_name} {cpu:>7} CPU {written.cpu_name}" if run.ok else f"FAILED: {run.error}"
            )
            what = "warm-up" if run.warmup else f"round {run.round}"
            print(f"  {what:8} {run.contender:32} {said}{'  (loaded)' if run.loaded else ''}", flush=True)

        with bench.source(workload) as source:
            for number in range(rounds + 1):
                bench.round(able, workload, source, number, note)
        results.add_workload(dataclasses.replace(workload, contenders=tuple(able)), runs)
    print(f"took {(time.monotonic() - began) / 60:.0f} min", flush=True)
    return results


def write(results: Results, output: Path) -> int:
    """Both files, and the table to standard output."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(results.as_dict(), indent=1) + "\n")
    (output / "report.html").write_text(render(results))
    print(f"\n{text_table(results)}\n\n{output / 'report.html'} shows it, {output / 'results.json'} holds every run")
    failed = list(failures(results))
    for line in failed:
        print(f"FAILED: {line}", file=sys.stderr)
    return 1 if failed else 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_positive(part.strip()) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
