"""A deterministic simulator of flows that share a bottleneck, for those who write congestion controllers.

docs/congestion-control.md shows it at work and says what it leaves out.
"""

from __future__ import annotations

from .flow import Flow
from .fluid import FluidFlow
from .link import Link
from .loss import Bernoulli, GilbertElliott, LossModel, Periodic
from .simulation import Simulation
from .trace import TraceRecord

__all__ = [
    "Bernoulli",
    "Flow",
    "FluidFlow",
    "GilbertElliott",
    "Link",
    "LossModel",
    "Periodic",
    "Simulation",
    "TraceRecord",
]
