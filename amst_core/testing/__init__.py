"""For plugin authors: a conformance kit, a transport in memory, faults on purpose, a simulator (docs/plugin-guide.md).

Plain functions that raise `ConformanceError`; no test runner is needed.
"""

from __future__ import annotations

from collections.abc import Callable

from ..errors import UsageError
from .conformance import Conformance, ConformanceError
from .controllers import CONTROLLER_RULES, check_controller
from .detectors import DETECTOR_RULES, check_detector
from .faults import Cut, Delay, Direction, End, Fail, Fault, FaultyLane, Flip, Stall, faulty
from .lanes import LANE_RULES, check_lane_pair
from .memory import MemoryLane, MemoryNetwork, MemoryTransport, memory_lane_pair
from .reno import RenoController
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
    "RenoController",
    "Stall",
    "check_controller",
    "check_detector",
    "check_lane_pair",
    "check_transport",
    "faulty",
    "memory_lane_pair",
    "rules",
]


_OF_LANES = {rule.name: rule.promise for rule in LANE_RULES}
_OF_TRANSPORTS = {rule.name: rule.promise for rule in TRANSPORT_RULES} | _OF_LANES
_OF_CONTROLLERS = {rule.name: rule.promise for rule in CONTROLLER_RULES}
_OF_DETECTORS = {rule.name: rule.promise for rule in DETECTOR_RULES}


def rules(check: Callable[..., Conformance] | None = None) -> dict[str, str]:
    """Every rule by name, in the order in which they are tried, with what it asks for in a line.

    ``check`` asks for those that one of them tries: `check_transport`, `check_lane_pair`, `check_controller` or
    `check_detector`.

    Raises:
        UsageError: ``check`` is none of them.
    """
    if check is None:
        return _OF_TRANSPORTS | _OF_CONTROLLERS | _OF_DETECTORS
    for one, tried in (
        (check_transport, _OF_TRANSPORTS),
        (check_lane_pair, _OF_LANES),
        (check_controller, _OF_CONTROLLERS),
        (check_detector, _OF_DETECTORS),
    ):
        if check is one:
            return dict(tried)
    raise UsageError(
        f"rules: {check!r} is no check; pass check_transport, check_lane_pair, check_controller or check_detector"
    )
