"""Which congestion control each lane of a session gets: the one asked for, or the one that its path calls for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Final

from ..errors import UnavailableError
from ..interfaces import CongestionInForce, Lane

_log = logging.getLogger("amst.session")

AUTO: Final = "auto"
"""What asks for the controller that the path calls for."""

FAR_S: Final = 0.010
"""A round trip from here on is no datacenter's (requirements F1): there loss does not mean that a queue is full."""

NEAR: Final = "cubic"
FAR: Final = "bbr"
FALLBACK: Final = "cubic"
"""What is tried where the system refuses the one asked for (requirements B2)."""


class CongestionPolicy:
    """The choice for the lanes of one session. Any thread.

    ``asked`` is the name of a controller, or `AUTO`; ``installed`` tells of each that a plugin offers what the system
    calls it, None where no system has it. With `AUTO` the system's own stays where the one to be chosen is not
    installed.
    """

    def __init__(self, asked: str, installed: Mapping[str, str | None]) -> None:
        self._asked = asked
        self._installed = installed
        self._lock = threading.Lock()
        self._told: set[tuple[str | None, str]] = set()

    def apply(self, lane: Lane) -> CongestionInForce:
        """Give ``lane`` its congestion control, by the system; what is refused falls back, and the result says why."""
        name, why = (self._asked, "asked for") if self._asked != AUTO else self._by_path(lane)
        said = [f"{name}, {why}"]
        candidates = [] if self._asked == AUTO else [FALLBACK]
        system_name = self._installed.get(name)
        if system_name is not None:
            candidates = list(dict.fromkeys((system_name, FALLBACK)))
        elif name in self._installed:
            said.append(f"no system has {name}")
        else:
            said.append(f"no installed plugin offers {name}")
        result = self._first_taken(lane, candidates, said)
        self._tell(result, kept=result.algorithm == system_name)
        return result

    def _by_path(self, lane: Lane) -> tuple[str, str]:
        stats = lane.path_stats()
        rtt_s = stats.min_rtt_s if stats.min_rtt_s is not None else stats.rtt_s
        if rtt_s is None:
            return NEAR, "for the round trip is not known"
        if rtt_s < FAR_S:
            return NEAR, f"for the round trip is below {FAR_S * 1000:g} ms"
        return FAR, f"for the round trip is {FAR_S * 1000:g} ms or more"

    def _first_taken(self, lane: Lane, candidates: list[str], said: list[str]) -> CongestionInForce:
        for candidate in candidates:
            try:
                algorithm = lane.set_congestion(candidate)
            except UnavailableError as err:
                said.append(err.message)
            else:
                return CongestionInForce(self._asked, algorithm, "kernel", "; ".join(said))
        own = lane.path_stats().congestion
        if own is None:
            return CongestionInForce(self._asked, None, None, "; ".join(said))
        return CongestionInForce(self._asked, own, "kernel", "; ".join([*said, "the system's own stays"]))

    def _tell(self, result: CongestionInForce, *, kept: bool) -> None:
        """Log each outcome once, not with every lane."""
        with self._lock:
            if (result.algorithm, result.reason) in self._told:
                return
            self._told.add((result.algorithm, result.reason))
        level = logging.INFO if kept or self._asked == AUTO else logging.WARNING
        _log.log(level, "congestion control %s (%s)", result.algorithm, result.reason)
