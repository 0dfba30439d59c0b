"""What is left of a path beside one flow of the kernel's that is there already."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from harness.errors import RunError

from amst_core.testing.netlab import Lab

from . import cells
from .bench import Bench, head, mark, median, row, shown
from .transfers import OTHER_PORT, Amst, Iperf, Load, Run, Sender, UserspaceAmst, Watch, connected, serving, until

LEAD_S: Final = 3.0
"""For so long the other flow is alone."""
_AFTER_S: Final = 8.0
"""Starting and ending programs takes less."""

SENDERS: Final[Sequence[Sender]] = (
    Amst("AMST"),
    UserspaceAmst("AMST, user space"),
    Amst("AMST, --polite", "--polite"),
    Iperf("cubic", 1),
    Iperf("bbr", 1),
)


def share(bench: Bench) -> None:
    """What one flow of iperf3, there for 3 s, has left beside a transfer, and what that gets, while both send."""
    head("path, the other flow", "who", "gets, Mbit/s", "leaves, Mbit/s", "share")
    for name, (values, other) in bench.chosen(cells.SHARE):
        path = cells.path_of(values)
        for sender in bench.senders(SENDERS):
            found = bench.each(path, [sender], partial(_beside, other=other, seconds=bench.seconds))
            runs = found[sender.name]
            part = median(runs, "share")
            row(name, sender.name, shown(runs), f"{median(runs, 'leaves'):.1f}", f"{part:.2f}{mark(runs)}")
            bench.note(name, found, share=part)


def _beside(lab: Lab, sender: Sender, other: str, seconds: float) -> Run:
    # The other flow's client is on the far host and asks to be sent to (-R), so that it tells what arrived and when.
    here, far = lab.hosts
    argv = ["iperf3", "-J", "-R", "-C", other, "-p", str(OTHER_PORT), "-i", "0.2", "-c", here.address]
    argv += ["-t", f"{LEAD_S + seconds + _AFTER_S:g}"]
    with serving(here, OTHER_PORT, ["iperf3", "-s", "-1", "-p", str(OTHER_PORT)]):
        client = far.popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        printed: list[str] = []
        reader = threading.Thread(target=lambda: printed.append(client.stdout.read()))
        reader.start()
        until(lambda: connected(here, OTHER_PORT), client, "the other flow runs")
        began = time.monotonic()
        time.sleep(LEAD_S)
        with Watch(lab, sender.port) as watch:
            run = sender.send(lab, Load(seconds=seconds))
        client.wait()
        reader.join()
    since = watch.began - began
    leaves = received(json.loads(printed[0]), other, since, since + seconds)
    return replace(run, seen={"leaves": leaves, "share": run.mbits / (run.mbits + leaves)})


def received(told: Mapping[str, Any], other: str, since: float, until: float) -> float:
    """Mbit/s that `iperf3 -J -R` had between two moments, in seconds since it began.

    Raises:
        RunError: another congestion control ran, or it did not run that long.
    """
    if told["end"]["sender_tcp_congestion"] != other:
        raise RunError(f"asked for {other}, iperf3 had {told['end']['sender_tcp_congestion']}")
    parts = [part["sum"] for part in told["intervals"] if since <= part["sum"]["start"] and part["sum"]["end"] <= until]
    if not parts or told["intervals"][-1]["sum"]["end"] < until:
        raise RunError("the other flow was over before the transfer")
    return float(sum(part["bytes"] for part in parts) * 8e-6 / (parts[-1]["end"] - parts[0]["start"]))
