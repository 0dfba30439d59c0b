"""What a path between two hosts is like: rate, delay, jitter, loss and buffer, for each direction.

Plain values: nothing here touches a network. Rates are bytes/s of IP packets, times seconds, buffers bytes; strings
are read as on the command line (``"100Mbit/s"``, ``"50ms"``, ``"1%"``, ``"256KiB"``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ...errors import UsageError
from ...units import format_duration, format_rate, format_size, parse_duration, parse_rate, parse_share, parse_size

LEAST_BUFFER: Final = 64 << 10
"""Bytes that a buffer has by default on a path whose bandwidth-delay product is less: one burst of the kernel's."""

MTU: Final = 1500

_LONGEST_DELAY_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Way:
    """One direction of a path.

    Attributes:
        rate: bytes/s of IP packets, headers included; None: no limit. TCP's payload is 96.5 % of it at 1500 bytes.
        delay: seconds each packet travels, after it has been sent at ``rate``.
        jitter: seconds that the delay grows to and shrinks again, in sweeps that take 2 to 6 times as long. So the
            extra delay is spread evenly from 0 to ``jitter``, half of it in the mean, and no packet overtakes another.
        loss: the part of the packets that is lost after the buffer, 0 to 1.
        burst: mean number of packets lost in a row (Gilbert-Elliott: a good state that loses none and a bad one that
            loses all; Gilbert 1960, Elliott 1963); None: each packet for itself (Bernoulli), 1/(1 - loss) in a row.
        buffer: bytes that may wait to be sent at ``rate``; what does not fit is dropped (droptail). None: the
            bandwidth-delay product, but 64 KiB at least.
    """

    rate: float | None = None
    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    burst: float | None = None
    buffer: int | None = None

    @classmethod
    def of(cls, **values: object) -> Way:
        """A way from values as people write them.

        Raises:
            UsageError: an unknown name, or a value that makes no sense; says which and what does.
        """
        return Way().changed(**values)

    def changed(self, **values: object) -> Way:
        """This way with other values; `UsageError` as for `of`."""
        read: dict[str, Any] = {}
        for name, value in values.items():
            reader = _READERS.get(name)
            if reader is None:
                raise UsageError(f"a path has no {name!r}; it has {', '.join(_READERS)}")
            try:
                read[name] = reader(value)
            except UsageError as err:
                raise UsageError(f"{name}: {err}") from err
        way = dataclasses.replace(self, **read)
        if way.burst is not None and way.loss < 1 and way.burst < max(1.0, way.loss / (1 - way.loss)):
            least = max(1.0, way.loss / (1 - way.loss))
            raise UsageError(f"burst: at a loss of {way.loss:g} it is {least:.3g} at least, not {way.burst:g}")
        return way

    def as_dict(self) -> dict[str, float | int | None]:
        """The attributes by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __str__(self) -> str:
        rate = "any rate" if self.rate is None else f"{self.rate * 8 / 1e6:g} Mbit/s ({format_rate(self.rate)})"
        parts = [rate, f"{format_duration(self.delay)} delay"]
        if self.jitter:
            parts.append(f"up to {format_duration(self.jitter)} more")
        if self.loss:
            how = f" in bursts of {self.burst:g}" if self.burst is not None else ""
            parts.append(f"{self.loss * 100:g} % lost{how}")
        if self.buffer is not None:
            parts.append(f"buffer {format_size(self.buffer)}")
        return ", ".join(parts)


@dataclass(frozen=True, init=False, slots=True)
class Path:
    """Both directions between two hosts: ``up`` from the first to the second, ``down`` back.

    Values given by name hold for both directions, ``rtt`` is shared out evenly; ``up`` and ``down`` are values that
    differ there, by name, or a whole `Way`::

        Path(rate="100Mbit/s", rtt="100ms", loss="1%")
        Path(rate="1Gbit/s", rtt=0.02, up={"rate": "50Mbit/s"}, down={"loss": 0.01, "burst": 5})

    Raises:
        UsageError: an unknown name, or a value that makes no sense; says which and what does.
    """

    up: Way
    down: Way

    def __init__(
        self,
        rate: float | str | None = None,
        *,
        up: Way | Mapping[str, object] | None = None,
        down: Way | Mapping[str, object] | None = None,
        **both: object,
    ) -> None:
        if rate is not None:
            both["rate"] = rate
        _fill(self, Way(), Way(), both, up, down)

    def changed(
        self,
        *,
        up: Way | Mapping[str, object] | None = None,
        down: Way | Mapping[str, object] | None = None,
        **both: object,
    ) -> Path:
        """This path with other values, named as when it was made."""
        path = object.__new__(Path)
        _fill(path, self.up, self.down, both, up, down)
        return path

    @property
    def rtt(self) -> float:
        """Seconds there and back, without queues and jitter."""
        return self.up.delay + self.down.delay

    def buffer(self, way: Way) -> int:
        """Bytes that the buffer of ``way`` (one of ours) holds: what it says, or the bandwidth-delay product."""
        if way.buffer is not None:
            return way.buffer
        return LEAST_BUFFER if way.rate is None else max(LEAST_BUFFER, round(way.rate * self.rtt))


def _fill(
    path: Path,
    up: Way,
    down: Way,
    both: dict[str, object],
    up_values: Way | Mapping[str, object] | None,
    down_values: Way | Mapping[str, object] | None,
) -> None:
    values = dict(both)
    if "rtt" in values:
        if "delay" in values:
            raise UsageError("rtt and delay both say how long packets travel; give one of them")
        try:
            values["delay"] = parse_duration(values.pop("rtt")) / 2  # type: ignore[arg-type]
        except UsageError as err:
            raise UsageError(f"rtt: {err}") from err
    for name, way, own in (("up", up, up_values), ("down", down, down_values)):
        if not isinstance(own, Way):
            try:
                own = way.changed(**{**values, **(own or {})})
            except UsageError as err:
                raise UsageError(f"{name}: {err}" if own else str(err)) from err
        object.__setattr__(path, name, own)


def _rate(value: Any) -> float | None:
    if value is None:
        return None
    rate = parse_rate(value)
    if rate < 1000:
        raise UsageError(f"{value!r} is less than 1 kB/s; a loss of 100% stops everything, no rate is no limit")
    return rate


def _delay(value: Any) -> float:
    delay = parse_duration(value)
    if delay > _LONGEST_DELAY_S:
        raise UsageError(f"{value!r} is more than {_LONGEST_DELAY_S:g}s")
    return delay


def _burst(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= 1e6:
        raise UsageError(f"{value!r} is not a mean number of packets from 1 to 1000000")
    return float(value)


def _buffer(value: Any) -> int | None:
    if value is None:
        return None
    size = parse_size(value)
    if size < MTU:
        raise UsageError(f"{value!r} holds no packet of {MTU} bytes")
    return size


_READERS: Final[dict[str, Any]] = {
    "rate": _rate, "delay": _delay, "jitter": _delay, "loss": parse_share, "burst": _burst, "buffer": _buffer,
}  # fmt: skip
