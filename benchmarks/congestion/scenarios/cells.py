"""The paths that are measured. Rates are of IP packets: TCP's payload is 96.5 % of them at most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from amst_core.testing.netlab import Path

Values = Mapping[str, Any]

LEAST_BUFFER: Final = 64 << 10

_LOSSES: Final[Mapping[tuple[str, str], str]] = {
    ("100Mbit/s", "20ms"): "0% 1% 5%",
    ("100Mbit/s", "100ms"): "0% 0.1% 1% 5%",
    ("100Mbit/s", "200ms"): "0% 1% 5%",
    ("500Mbit/s", "20ms"): "0% 1% 5%",
    ("500Mbit/s", "100ms"): "0% 1% 5%",
    ("500Mbit/s", "200ms"): "0% 1% 5%",
    ("1Gbit/s", "100ms"): "0% 1%",
    ("1Gbit/s", "300ms"): "0% 1%",
}
GRID: Final[Mapping[str, Values]] = {
    f"{rate} {rtt} {loss}": {"rate": rate, "rtt": rtt, "loss": loss}
    for (rate, rtt), losses in _LOSSES.items()
    for loss in losses.split()
} | {
    "bursts": {"rate": "100Mbit/s", "rtt": "100ms", "loss": "1%", "burst": 5.0},
    "jitter": {"rate": "100Mbit/s", "rtt": "50ms", "jitter": "10ms", "loss": "1%"},
}


@dataclass(frozen=True)
class UserspaceCell:
    """A path, how many streams there may be (None: as many as by default), which part of kernel BBR's rate is asked
    for, and for how many seconds or of how many bytes the transfer is (None: as the command line says)."""

    path: Values
    max_streams: int | None = None
    goal: float | None = None
    seconds: float | None = None
    size: int | None = None


USERSPACE: Final[Mapping[str, UserspaceCell]] = {
    "100Mbit/s 100ms 0.1%": UserspaceCell(GRID["100Mbit/s 100ms 0.1%"], 32, 0.95),
    "100Mbit/s 100ms 1%": UserspaceCell(GRID["100Mbit/s 100ms 1%"], 64, 0.90),
    "100Mbit/s 20ms 1%": UserspaceCell(GRID["100Mbit/s 20ms 1%"], 64, 0.95),
    "500Mbit/s 100ms 0.1%": UserspaceCell({"rate": "500Mbit/s", "rtt": "100ms", "loss": "0.1%"}, 64, 0.85),
    "100Mbit/s 100ms 0%": UserspaceCell(GRID["100Mbit/s 100ms 0%"], None, 0.97),
    "bursts": UserspaceCell(GRID["bursts"], 64),
    "jitter": UserspaceCell(GRID["jitter"], 64),
    "60 s": UserspaceCell(GRID["100Mbit/s 100ms 1%"], 64, seconds=60.0),
    "50 MB": UserspaceCell(GRID["100Mbit/s 100ms 0.1%"], 32, size=50_000_000),
}

QUEUE: Final[Mapping[str, Values]] = {"100Mbit/s 100ms": {"rate": "100Mbit/s", "rtt": "100ms"}}

CHANGING: Final[Values] = {"rate": "100Mbit/s", "rtt": "40ms", "loss": "0%"}
CHANGES: Final[Mapping[str, Values]] = {
    "rate halved": {"rate": "50Mbit/s"},
    "RTT doubled": {"rtt": "80ms"},
    "loss 1 %": {"loss": "1%"},
}
"""What becomes of `CHANGING`, and then is as before."""

SHARE: Final[Mapping[str, tuple[Values, str]]] = {
    f"100Mbit/s {rtt} {other}": ({"rate": "100Mbit/s", "rtt": rtt}, other)
    for rtt in ("40ms", "100ms")
    for other in ("cubic", "bbr")
}
"""The path, and the congestion control of the flow that is there already."""


def path_of(values: Values, buffers: float = 1.0) -> Path:
    """A path with ``buffers`` bandwidth-delay products of buffer."""
    path = Path(**values)
    if path.up.rate is None:
        raise ValueError("a cell has a rate")
    return path.changed(buffer=max(LEAST_BUFFER, round(buffers * path.up.rate * path.rtt)))
