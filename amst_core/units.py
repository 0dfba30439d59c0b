"""Sizes, rates, durations and shares as people write them, read into bytes, bytes/s, seconds and parts of 1.

k/M/G/T and kB/MB/GB/TB are powers of ten, KiB/MiB/GiB/TiB of two. A rate is bytes/s; ``bit`` says bits.
Upper and lower case matter (``Mb`` could be either bits or bytes, so it is neither).
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

from .errors import UsageError

SIZE_FORMS: Final = "a whole number of bytes, or a number with k, M, G, T, kB, MB, GB, TB, KiB, MiB, GiB or TiB"
RATE_FORMS: Final = "bytes per second with a unit as for sizes (10MiB/s, 100M), or bits per second (100Mbit/s)"
DURATION_FORMS: Final = "a number of seconds, or a number with ms, s, m, min, h or d"
SHARE_FORMS: Final = "a percentage (1%, 0.5%), or a part of one (0.01)"

MIN_RATE: Final = 16 << 10
"""Least bytes/s that anything may be held to."""

_LIMIT: Final = 2**63 - 1
_LONGEST_TEXT: Final = 64
"""No number up to the limit needs more; an endless digit string must not cost time or fill a message."""

_NUMBER: Final = r"(?P<number>[0-9]+(?:\.[0-9]+)?)\s*"
_PREFIX: Final = r"(?:(?P<prefix>[kKMGT])(?P<binary>i(?=B|bit))?)?"
_SIZE: Final = re.compile(_NUMBER + _PREFIX + "B?")
_RATE: Final = re.compile(_NUMBER + _PREFIX + "(?P<unit>B|bit)?(?:/s)?")
_DURATION: Final = re.compile(_NUMBER + r"(?P<unit>ms|s|min|m|h|d)?")
_SHARE: Final = re.compile(_NUMBER + r"(?P<unit>%)?")

_POWERS: Final = {"k": 1, "K": 1, "M": 2, "G": 3, "T": 4}
_SECONDS: Final = {
    "ms": Decimal("0.001"), "s": Decimal(1), "m": Decimal(60), "min": Decimal(60), "h": Decimal(3600),
    "d": Decimal(86400),
}  # fmt: skip


def parse_size(value: str | int) -> int:
    """Read a size (``"4GiB"``, ``"64k"``, ``4096``) into bytes; a fraction of a unit is rounded down to a byte.

    Raises:
        UsageError: not a size, negative, a fraction of a byte, or more than 2^63 - 1.
    """
    if isinstance(value, str):
        match = _match(_SIZE, value, "size", SIZE_FORMS)
        number = Decimal(match["number"])
        if match["prefix"] is None and number != number.to_integral_value():
            raise _fault(value, "size", SIZE_FORMS)
        size = number * _scale(match)
    elif isinstance(value, int) and not isinstance(value, bool):
        size = Decimal(value)
    else:
        raise _fault(value, "size", SIZE_FORMS)
    return int(_in_range(size, value, "size", SIZE_FORMS))


def parse_rate(value: str | int | float) -> float:
    """Read a rate (``"100Mbit/s"``, ``"100M"``, ``"10MiB/s"``) into bytes/s.

    Raises:
        UsageError: not a rate, negative, not finite, or more than 2^63 - 1 bytes/s.
    """
    if isinstance(value, str):
        match = _match(_RATE, value, "rate", RATE_FORMS)
        rate = Decimal(match["number"]) * _scale(match)
        if match["unit"] == "bit":
            rate /= 8
    else:
        rate = _number(value, "rate", RATE_FORMS)
    return float(_in_range(rate, value, "rate", RATE_FORMS))


def parse_duration(value: str | int | float) -> float:
    """Read a duration (``"30s"``, ``"1m"``, ``"500ms"``, or a number of seconds) into seconds.

    Raises:
        UsageError: not a duration, negative, not finite, or more than 2^63 - 1 seconds.
    """
    if isinstance(value, str):
        match = _match(_DURATION, value, "duration", DURATION_FORMS)
        duration = Decimal(match["number"]) * _SECONDS[match["unit"] or "s"]
    else:
        duration = _number(value, "duration", DURATION_FORMS)
    return float(_in_range(duration, value, "duration", DURATION_FORMS))


def parse_share(value: str | int | float) -> float:
    """Read a part of a whole (``"1%"``, ``"0.01"``, ``0.01``) into a number from 0 to 1.

    Raises:
        UsageError: not a share, negative, or more than the whole.
    """
    if isinstance(value, str):
        match = _match(_SHARE, value, "share", SHARE_FORMS)
        share = Decimal(match["number"]) / (100 if match["unit"] else 1)
    else:
        share = _number(value, "share", SHARE_FORMS)
    if not 0 <= share <= 1:
        raise _fault(value, "share", f"{SHARE_FORMS}, from 0 to 100%")
    return float(share)


def format_size(size: int) -> str:
    """Write a size in bytes with the largest binary unit below it and at most two decimals (``"1.5GiB"``)."""
    return _scaled(float(size), 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def format_rate(rate_bytes_per_s: float) -> str:
    """Write a rate in bytes/s with the largest decimal unit below it and at most two decimals (``"1.25GB/s"``)."""
    return _scaled(rate_bytes_per_s, 1000, ("B", "kB", "MB", "GB", "TB")) + "/s"


def format_bit_rate(rate_bytes_per_s: float) -> str:
    """Write a rate in bytes/s as links are named, in bits (``"100Mbit/s"``)."""
    return _scaled(rate_bytes_per_s * 8, 1000, ("bit", "kbit", "Mbit", "Gbit", "Tbit")) + "/s"


def format_duration(duration_s: float) -> str:
    """Write seconds as whole days, hours or minutes where exact, else as s or ms with at most two decimals.

    Days and minutes from two on: a day is 24h, a minute 60s.
    """
    if duration_s >= 2 * 86400 and duration_s % 86400 == 0:
        return f"{duration_s / 86400:.0f}d"
    if duration_s and duration_s % 3600 == 0:
        return f"{duration_s / 3600:.0f}h"
    if duration_s >= 120 and duration_s % 60 == 0:
        return f"{duration_s / 60:.0f}m"
    return _decimals(duration_s) + "s" if duration_s >= 1 or not duration_s else _decimals(duration_s * 1000) + "ms"


def _scaled(amount: float, base: int, units: tuple[str, ...]) -> str:
    power = 0
    # Compare what will be shown: 1023.999 KiB is written 1MiB, not 1024KiB.
    while round(amount, 2) >= base and power < len(units) - 1:
        amount /= base
        power += 1
    return _decimals(amount) + units[power]


def _decimals(amount: float) -> str:
    return f"{amount:.2f}".rstrip("0").rstrip(".")


def _scale(match: re.Match[str]) -> int:
    prefix = match["prefix"]
    return int((1024 if match["binary"] else 1000) ** _POWERS[prefix]) if prefix else 1


def _match(pattern: re.Pattern[str], text: str, what: str, forms: str) -> re.Match[str]:
    match = pattern.fullmatch(text.strip()) if len(text) <= _LONGEST_TEXT else None
    if match is None:
        raise _fault(text, what, forms)
    return match


def _number(value: object, what: str, forms: str) -> Decimal:
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = Decimal(value)
        if number.is_finite():
            return number
    raise _fault(value, what, forms)


def _in_range(amount: Decimal, value: object, what: str, forms: str) -> Decimal:
    if not 0 <= amount <= _LIMIT:
        raise _fault(value, what, f"{forms}, from 0 to 2^63 - 1")
    return amount


def shown(value: object) -> str:
    """A value as an error message shows it: its repr, cut so that it cannot flood the message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more than 4300 digits; a structure without end
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 3] + "..."


def _fault(value: object, what: str, forms: str) -> UsageError:
    return UsageError(f"{shown(value)} is not a {what}: write {forms}")
