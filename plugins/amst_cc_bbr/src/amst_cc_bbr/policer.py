"""Whether a token-bucket policer is in the way, and how much it lets through (Linux 5.x, bbr_lt_bw_sampling)."""

from __future__ import annotations

from typing import Final

_MIN_ROUNDS: Final = 4
_MAX_ROUNDS: Final = 4 * _MIN_ROUNDS
_LOSS_THRESHOLD: Final = 50 / 256
_RATIO: Final = 1 / 8
_DIFFERENCE: Final = 4000 / 8 / 0.99  # 4 kbit/s, after the margin by which pacing stays below a rate
_USE_ROUNDS: Final = 48
_MIN_INTERVAL_S: Final = 0.001


class LongTermBandwidth:
    """Estimates the rate of a policer from two intervals with much loss that agree ("An Internet-Wide Analysis of
    Traffic Policing", SIGCOMM 2016).

    An interval begins and ends with a loss, when the policer's tokens are known to be used up, takes 4 to 16 round
    trips, none of them limited by the application, and counts when at least 50 bytes were lost for 256 delivered.
    When two in a row delivered at rates that differ by no more than an eighth (or 4 kbit/s), their mean is
    in use for 48 round trips. Random loss of 16.3 % and more (50 / 306 of what is sent) looks the same.
    """

    __slots__ = ("_enabled", "_rounds", "_sampling", "_since", "_since_delivered", "_since_lost", "bandwidth", "in_use")

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self.bandwidth: float | None = None
        """Bytes/s: in use, or what the last interval with enough loss delivered."""
        self.in_use = False
        self._sampling = False
        self._rounds = 0
        self._since = 0.0
        self._since_delivered = 0
        self._since_lost = 0

    def reset(self, now: float, delivered: int, all_lost: int) -> None:
        """Forget the estimate; begin again with the next loss."""
        self.bandwidth = None
        self.in_use = False
        self._sampling = False
        self._begin(now, delivered, all_lost)

    def expired(self, *, round_start: bool, probing: bool) -> bool:
        """Whether the estimate, in use, has just been so for long enough; ``probing`` is true in ProbeBW."""
        if not (self.in_use and probing and round_start):
            return False
        self._rounds += 1
        return self._rounds >= _USE_ROUNDS

    def sample(
        self, now: float, *, delivered: int, all_lost: int, lost: int, app_limited: bool, round_start: bool
    ) -> bool:
        """Take one acknowledgement or timeout into account; true when the estimate has come into use by it.

        ``delivered`` and ``all_lost`` are totals of the flow in bytes, ``lost`` is what is newly lost.
        """
        if not self._enabled or self.in_use:
            return False
        if not self._sampling:
            if not lost:
                return False
            self._begin(now, delivered, all_lost)
            self._sampling = True
        if app_limited:
            self.reset(now, delivered, all_lost)
            return False
        if round_start:
            self._rounds += 1
        if self._rounds < _MIN_ROUNDS:
            return False
        if self._rounds > _MAX_ROUNDS:
            self.reset(now, delivered, all_lost)
            return False
        got, took = delivered - self._since_delivered, now - self._since
        if not lost or got <= 0 or all_lost - self._since_lost < _LOSS_THRESHOLD * got or took < _MIN_INTERVAL_S:
            return False
        return self._interval_done(got / took, now, delivered, all_lost)

    def _interval_done(self, bandwidth: float, now: float, delivered: int, all_lost: int) -> bool:
        before = self.bandwidth
        if before is not None and abs(bandwidth - before) <= max(_RATIO * before, _DIFFERENCE):
            self.bandwidth = (bandwidth + before) / 2
            self.in_use = True
            self._rounds = 0
            return True
        self.bandwidth = bandwidth
        self._begin(now, delivered, all_lost)
        return False

    def _begin(self, now: float, delivered: int, all_lost: int) -> None:
        self._since = now
        self._since_delivered = delivered
        self._since_lost = all_lost
        self._rounds = 0
