"""A wide-area network between hosts that are network namespaces of this machine (docs/lab.md). Needs root.

``Lab`` makes hosts and links, `Path` says what a link is like. Pure Python over TUN devices: no netem, no programs.
"""

from __future__ import annotations

from .lab import ROUTER, Host, Lab, LabRejectedError, LabUnavailableError, Link, access, missing, repeated
from .path import Path, Way
from .report import LabReport, WayCounts

__all__ = [
    "ROUTER",
    "Host",
    "Lab",
    "LabRejectedError",
    "LabReport",
    "LabUnavailableError",
    "Link",
    "Path",
    "Way",
    "WayCounts",
    "access",
    "missing",
    "repeated",
]
