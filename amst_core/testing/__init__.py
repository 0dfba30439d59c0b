"""For those who write transports: a conformance kit, a transport in memory, faults on purpose (docs/plugin-guide.md).

Plain functions that raise `ConformanceError`; no test runner is needed.
"""

from __future__ import annotations

from .conformance import Conformance, ConformanceError
from .faults import Cut, Delay, Direction, End, Fail, Fault, FaultyLane, Flip, Stall, faulty
from .lanes import LANE_RULES, check_lane_pair
from .memory import MemoryLane, MemoryNetwork, MemoryTransport, memory_lane_pair
from .transport import TRANSPORT_RULES, check_transport

__all__ = [
    "Conformance",
    "ConformanceError",
    "Cut",
    "Delay",
    "Direction",
    "End",
    "Fail",
    "Fault",
    "FaultyLane",
    "Flip",
    "MemoryLane",
    "MemoryNetwork",
    "MemoryTransport",
    "Stall",
    "check_lane_pair",
    "check_transport",
    "faulty",
    "memory_lane_pair",
    "rules",
]


def rules() -> dict[str, str]:
    """Every rule by name, in the order in which they are tried, with what it asks for in a line."""
    of_transports = {rule.name: rule.promise for rule in TRANSPORT_RULES}
    return of_transports | {rule.name: rule.promise for rule in LANE_RULES}
