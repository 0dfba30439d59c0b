"""What every congestion controller tells of its flow, whatever its algorithm."""

from __future__ import annotations

from ..interfaces import AckSample

__all__ = ["FlowAccount"]


class FlowAccount:
    """The variables that all controllers export (`CongestionController.state`), kept from what they are told anyway.

    A controller passes on each of its three calls, and merges `state` into its own. Seconds, bytes, bytes/s.

    ``lost``, and ``loss_rate`` with it, counts what was ever taken for lost: what arrives after all is in ``acked`` too
    and is not taken back, for ``on_spurious_loss`` does not say how much it was.
    """

    __slots__ = ("acked", "bandwidth", "in_flight", "lost", "max_bandwidth", "min_rtt", "rtt", "sent")

    def __init__(self) -> None:
        self.sent = 0
        self.acked = 0
        self.lost = 0
        self.in_flight = 0
        self.rtt: float | None = None
        self.min_rtt: float | None = None
        self.bandwidth: float | None = None
        self.max_bandwidth: float | None = None

    def on_sent(self, size: int, in_flight: int) -> None:
        """``size`` bytes left, for the first time or again."""
        self.sent += size
        self.in_flight = in_flight

    def on_ack(self, sample: AckSample) -> None:
        """Bytes were acknowledged."""
        self.acked += sample.acked
        self.in_flight = sample.in_flight
        if sample.rtt is not None:
            self.rtt = sample.rtt
            if self.min_rtt is None or sample.rtt < self.min_rtt:
                self.min_rtt = sample.rtt
        rate = sample.delivery_rate
        if rate is not None:
            self.bandwidth = rate
            if self.max_bandwidth is None or rate > self.max_bandwidth:
                self.max_bandwidth = rate

    def on_loss(self, lost: int, in_flight: int) -> None:
        """``lost`` bytes are taken for lost."""
        self.lost += lost
        self.in_flight = in_flight

    def state(self, algorithm: str, *, window: int, pacing_rate: float | None) -> dict[str, float | str]:
        """What is known of it, under the names that `CongestionController.state` promises."""
        known: dict[str, float | str] = {
            "algorithm": algorithm,
            "cwnd": window,
            "in_flight": self.in_flight,
            "sent": self.sent,
            "acked": self.acked,
            "lost": self.lost,
            "loss_rate": self.lost / self.sent if self.sent else 0.0,
        }
        perhaps = {
            "rtt": self.rtt,
            "min_rtt": self.min_rtt,
            "bandwidth": self.bandwidth,
            "max_bandwidth": self.max_bandwidth,
            "pacing_rate": pacing_rate,
        }
        return known | {name: value for name, value in perhaps.items() if value is not None}
