"""Which congestion control each lane of a session gets: the one asked for, or the one that its path calls for."""

from __future__ import annotations

import enum
import logging
import re
import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from ..errors import UnavailableError
from ..interfaces import CongestionController, CongestionInForce, Lane, Mode

_log = logging.getLogger("amst.session")

AUTO: Final = "auto"
"""What asks for the controller that the path calls for."""

NAME: Final = re.compile(r"(?!auto$)[a-z0-9][a-z0-9_.-]{0,62}")
"""What a controller may be called, in settings and on the wire; a plugin with another name cannot be asked for."""

FAR_S: Final = 0.010
"""A round trip from here on is no datacenter's (requirements F1): there loss does not mean that a queue is full."""

NEAR: Final = "cubic"
FAR: Final = "bbr"
POLITE: Final = "cubic"
FALLBACK: Final = "cubic"
"""What is tried where the system refuses the one asked for (requirements B2)."""


_PACING_THEMSELVES: Final = frozenset({"bbr", "bbr2", "bbr3"})

BASES: Final = ("cubic", "reno")
"""What runs in the kernel under a session that is paced in user space, where its own is bbr, which paces as well."""


class Backend(enum.StrEnum):
    """Who limits a lane: the system, or the controller in user space that paces the session."""

    AUTO = "auto"
    """The system where it has the controller, else user space."""
    KERNEL = "kernel"
    USERSPACE = "userspace"


class CongestionPolicy:
    """The choice for the lanes of one session. Any thread.

    ``asked`` is the name of a controller, or `AUTO`, which one that is not there comes to as well; ``installed`` tells
    of each that works what the system calls it, None where no system has it, and ``broken`` of the others why not. The
    system's own stays where the one that the path calls for is not there.

    ``mode`` is that of the session, which `AUTO` follows where the round trip is short; whoever changes it applies the
    policy to the lanes anew.

    Of a controller in user space ``make`` makes one for a session; ``base`` is what then runs in the system, `AUTO` its
    own unless that is bbr. A ``polite`` session is paced in user space wherever that is possible.
    """

    def __init__(
        self,
        asked: str,
        installed: Mapping[str, str | None],
        broken: Mapping[str, str] = MappingProxyType({}),
        *,
        backend: Backend = Backend.KERNEL,
        base: str = AUTO,
        make: Callable[[str], CongestionController] | None = None,
        polite: bool = False,
    ) -> None:
        self.polite = polite
        self.mode = Mode.DATACENTER
        self._asked = asked
        self._backend = Backend.KERNEL if make is None else Backend.USERSPACE if polite else backend
        self._base = base
        self._make = make
        self._installed = installed
        self._broken = broken
        self._lock = threading.Lock()
        self._told: set[tuple[str | None, str]] = set()

    def apply(self, lane: Lane) -> CongestionInForce:
        """Give ``lane`` its congestion control, by the system; what is refused falls back, and the result says why."""
        name, why, said = self._asked, "asked for", []
        if name != AUTO and name not in self._installed:
            said.append(self._missing(name))
        if said or name == AUTO:
            name, why = self._by_path(lane)
        said.append(f"{name}, {why}")
        candidates, system_name = [], self._installed.get(name)
        if name in self._installed and self._backend is not Backend.KERNEL:
            result = self._in_user_space(lane, name, system_name, said)
            if result is not None:
                self._tell(result, kept=True)
                return result
        if name in self._installed:
            candidates = list(dict.fromkeys((system_name or FALLBACK, FALLBACK)))
            if system_name is None:
                said.append(f"no system has {name}")
        else:
            said.append(self._missing(name))
        result = self._first_taken(lane, candidates, said)
        self._tell(result, kept=result.algorithm == system_name)
        return result

    def make_controller(self, name: str) -> CongestionController:
        """One that paces a session in user space, of those that `apply` has named."""
        assert self._make is not None, "apply names none where none can be made"
        return self._make(name)

    def _in_user_space(
        self, lane: Lane, name: str, system_name: str | None, said: list[str]
    ) -> CongestionInForce | None:
        """The lane as one that user space paces; None where the system has the controller, or it cannot be paced."""
        if self._backend is Backend.AUTO:
            if name == FALLBACK:
                return None  # under itself it would back off twice
            if system_name is not None:
                try:
                    algorithm = lane.set_congestion(system_name)
                except UnavailableError as err:
                    said.append(err.message)
                else:
                    return CongestionInForce(self._asked, algorithm, "kernel", "; ".join(said))
        if lane.flow_sample() is None:
            said.append("this kind of lane tells too little to be paced in user space")
            return None
        try:
            lane.set_pacing(None)
        except UnavailableError as err:
            said.append(err.message)
            return None
        base = self._take_base(lane, said)
        said.append(f"paced in user space over the system's {base}")
        return CongestionInForce(self._asked, base, "userspace", "; ".join(said), name)

    def _take_base(self, lane: Lane, said: list[str]) -> str | None:
        own = lane.path_stats().congestion
        wanted = (self._base,) if self._base != AUTO else BASES if own in _PACING_THEMSELVES else ()
        for candidate in wanted:
            try:
                return lane.set_congestion(candidate)
            except UnavailableError as err:
                said.append(err.message)
        return own

    def _missing(self, name: str) -> str:
        if name in self._broken:
            return f"{name} is installed and cannot be used: {self._broken[name]}"
        return f"no installed plugin offers {name}"

    def _by_path(self, lane: Lane) -> tuple[str, str]:
        if self.polite:
            return POLITE, "for the session is to be polite"
        stats = lane.path_stats()
        rtt_s = stats.min_rtt_s if stats.min_rtt_s is not None else stats.rtt_s
        if rtt_s is not None and rtt_s >= FAR_S:
            return FAR, f"for the round trip is {FAR_S * 1000:g} ms or more"
        if self.mode is Mode.INTERNET:
            return FAR, "for the mode is internet"
        if rtt_s is None:
            return NEAR, "for the round trip is not known"
        return NEAR, f"for the round trip is below {FAR_S * 1000:g} ms"

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
