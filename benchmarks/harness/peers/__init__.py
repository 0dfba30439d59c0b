"""The peers: programs that users would pick instead of AMST. Each is named in the report, installed or not."""

from __future__ import annotations

from ..contender import Contender
from .copiers import Cp, GridFtp, Rclone, Rsync, Scp, XRootD
from .generators import Iperf2, Iperf3, Nuttcp, Ucx
from .mbuffer import Mbuffer

__all__ = [
    "NAMED_ONLY",
    "Contender",
    "Cp",
    "GridFtp",
    "Iperf2",
    "Iperf3",
    "Mbuffer",
    "Nuttcp",
    "Rclone",
    "Rsync",
    "Scp",
    "Ucx",
    "XRootD",
]

NAMED_ONLY = (
    ("Mooncake transfer engine", "pip install mooncake-transfer-engine-non-cuda"),
    ("NIXL", "pip install nixl"),
)
"""Peers that are libraries without a program that would do these jobs, and how to get them."""
