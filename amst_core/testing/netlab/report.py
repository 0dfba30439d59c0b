"""What a lab has counted, and whether its figures can be trusted."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ...units import format_duration


@dataclass(frozen=True, slots=True)
class WayCounts:
    """One direction of a link. Packets are those on the wire: 1500 bytes at most, whatever the kernel put together.

    Attributes:
        link, direction: which link (its number) and ``up`` or ``down``.
        packets, bytes: what its sender put on it; IP bytes.
        dropped_by_queue, dropped_by_loss: packets that found no room in the buffer, and that were lost on the way.
        delivered_packets, delivered_bytes: what has arrived.
        late_mean, late_p99, late_max: seconds by which packets arrived later than they should have.
        refused: writes that the receiver's kernel did not take, or packets to nobody.
    """

    link: int
    direction: str
    packets: int
    bytes: int
    dropped_by_queue: int
    dropped_by_loss: int
    delivered_packets: int
    delivered_bytes: int
    late_mean: float
    late_p99: float
    late_max: float
    refused: int


@dataclass(frozen=True, slots=True)
class LabReport:
    """A lab's counts since it was started.

    Attributes:
        seed: what the losses and the jitter were drawn from.
        seconds: age of the lab.
        cpu_seconds: processor time that the emulator used.
        realtime: whether it ran at real-time priority (SCHED_FIFO).
        stall: seconds for which it did not look at its devices, beyond what it meant to, at most.
        device_drops: packets that the kernel dropped before the emulator saw them.
        ways: up and down of each link.
        faults: why the run cannot be trusted; empty when it can.
    """

    seed: int
    seconds: float
    cpu_seconds: float
    realtime: bool
    stall: float
    device_drops: int
    ways: tuple[WayCounts, ...]
    faults: tuple[str, ...]

    @property
    def trusted(self) -> bool:
        """Whether packets left when they should have."""
        return not self.faults

    @property
    def late_mean(self) -> float:
        """Seconds by which a packet was late, in the mean over all ways."""
        packets = sum(way.delivered_packets for way in self.ways)
        return sum(way.late_mean * way.delivered_packets for way in self.ways) / packets if packets else 0.0

    @property
    def late_p99(self) -> float:
        """Seconds within which 99 % of the packets left, on the worst way."""
        return max(way.late_p99 for way in self.ways)

    @property
    def late_max(self) -> float:
        """Seconds by which the latest packet was late."""
        return max(way.late_max for way in self.ways)

    def way(self, direction: str, link: int = 0) -> WayCounts:
        """The counts of one direction, ``up`` or ``down``, of the link of that number."""
        return next(way for way in self.ways if (way.link, way.direction) == (link, direction))

    def as_dict(self) -> dict[str, object]:
        """Everything, for JSON."""
        values = dataclasses.asdict(self)
        lateness = {"mean": self.late_mean, "p99": self.late_p99, "max": self.late_max}
        return {**values, "lateness": lateness, "trusted": self.trusted}


def faults(report: LabReport, *, late_p99: float, late_max: float) -> tuple[str, ...]:
    """What makes the figures of a run worthless, in words."""
    found = []
    if report.late_p99 > late_p99:
        found.append(f"1 % of the packets were {_shown(report.late_p99)} late ({_shown(late_p99)} is the bound)")
    if report.late_max > late_max:
        found.append(f"a packet was {_shown(report.late_max)} late ({_shown(late_max)} is the bound)")
    if report.stall > late_max:
        found.append(f"the emulator stood still for {_shown(report.stall)} ({_shown(late_max)} is the bound)")
    if report.device_drops:
        found.append(f"the kernel dropped {report.device_drops} packets before the emulator saw them")
    refused = sum(way.refused for way in report.ways)
    if refused:
        found.append(f"{refused} packets could not be delivered")
    return tuple(found)


def _shown(seconds: float) -> str:
    return format_duration(round(seconds, 5))
