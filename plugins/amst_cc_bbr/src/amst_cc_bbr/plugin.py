"""Entry point of BBR: light to import, the controller itself is imported on first use."""

from __future__ import annotations

from collections.abc import Mapping

from amst_core.hookspecs import hookimpl
from amst_core.interfaces import CongestionController


@hookimpl
def amst_make_controller(name: str, options: Mapping[str, object], mss: int) -> CongestionController | None:
    """Make the controller ``bbr``; None for any other name."""
    if name != "bbr":
        return None
    from .controller import BbrController

    return BbrController(options, mss=mss)
