"""What a journal and files.fsync cost: ``amst cp`` disk to disk beside ``cp``, interleaved, as ratios.

    python benchmarks/durability.py [--rounds 5] [--size 1GiB] [--files 1000] [--directory DIR]

One large file and a tree of small ones (100 KiB each), with each choice of ``files.fsync``. ``cp`` does not sync;
``cp`` followed by ``sync -f`` is what the choices that do compare with. ``--directory`` says on which disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from harness.amst import AMST, amst_server

from amst_core.units import parse_size

SMALL = 100 << 10
CHOICES = ("never", "end", "always")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=parse_size, default=1 << 30)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--directory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        place = Path(name)
        os.environ["AMST_STATE_DIR"] = str(place / "state")
        (place / "large").write_bytes(os.urandom(1 << 20) * (options.size >> 20))
        (place / "tree").mkdir()
        for number in range(options.files):
            (place / "tree" / f"{number}").write_bytes(os.urandom(SMALL))
        for source in ("large", "tree"):
            measure(place, source, options.rounds)


def measure(place: Path, source: str, rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in ("cp", "cp; sync", *CHOICES)}
    for _ in range(rounds):
        for name in seconds:
            target = place / "target"
            target.mkdir()
            if name.startswith("cp"):
                seconds[name].append(timed(copy(place / source, target, sync=name != "cp")))
            else:
                with amst_server(str(target), os.environ["AMST_STATE_DIR"], "--set", f"files.fsync={name}") as address:
                    command = [*AMST, "cp", "-q", str(place / source), f"amst://{address}/"]
                    seconds[name].append(timed([command]))
            shutil.rmtree(target)
            os.sync()
    base, synced = (statistics.median(seconds[name]) for name in ("cp", "cp; sync"))
    print(f"{source}: cp {base:.2f} s, cp and sync {synced:.2f} s (medians of {rounds})")
    for name in CHOICES:
        own = statistics.median(seconds[name])
        print(f"  files.fsync={name:7} {own:6.2f} s   {base / own:5.2f} x cp   {synced / own:5.2f} x cp and sync")


def copy(source: Path, target: Path, *, sync: bool) -> list[list[str]]:
    commands = [["cp", "-a", str(source), f"{target}/"]]
    return [*commands, ["sync", "-f", str(target)]] if sync else commands


def timed(commands: list[list[str]]) -> float:
    began = time.monotonic()
    for command in commands:
        subprocess.run(command, check=True)
    return time.monotonic() - began


if __name__ == "__main__":
    main()
