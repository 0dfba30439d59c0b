"""What can be set under ``plugins.bbr``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final, Self

from amst_core.errors import ConfigError

_MAX_SEED: Final = (1 << 63) - 1
_MAX_INITIAL_WINDOW: Final = 1024


@dataclass(frozen=True, slots=True)
class BbrOptions:
    """How a `BbrController` is made; everything else about BBR is the kernel's constant.

    Attributes:
        seed: decides in which phase gain cycling begins, each time that it does. Flows that share a bottleneck should
            not share a seed, or they may probe for bandwidth at the same moment.
        initial_window: segments that may be in flight at first (RFC 6928).
        long_term_bandwidth: whether a token-bucket policer is looked for (`LongTermBandwidth`). Linux always does.
    """

    seed: int = 0
    initial_window: int = 10
    long_term_bandwidth: bool = True

    @classmethod
    def checked(cls, options: Mapping[str, object]) -> Self:
        """Take the settings under ``plugins.bbr``.

        Raises:
            ConfigError: an unknown option, or a value of the wrong type or out of bounds; names every fault.
        """
        default, known = cls(), [field.name for field in fields(cls)]
        faults = [f"plugins.bbr.{key} is unknown; known are {', '.join(known)}" for key in options if key not in known]

        def whole(key: str, usual: int, low: int, high: int) -> int:
            value = options.get(key, usual)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                faults.append(f"plugins.bbr.{key} = {value!r} must be a whole number, {low} to {high}")
                return usual
            return value

        seed = whole("seed", default.seed, 0, _MAX_SEED)
        initial_window = whole("initial_window", default.initial_window, 1, _MAX_INITIAL_WINDOW)
        long_term = options.get("long_term_bandwidth", default.long_term_bandwidth)
        if not isinstance(long_term, bool):
            faults.append(f"plugins.bbr.long_term_bandwidth = {long_term!r} must be true or false")
            long_term = default.long_term_bandwidth
        if faults:
            raise ConfigError("; ".join(faults))
        return cls(seed, initial_window, long_term)
