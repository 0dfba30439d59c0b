"""One broken controller for each rule of controllers: NewReno, with one fault that some author might leave in."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from typing import Any, ClassVar

from amst_core.interfaces import AckSample
from amst_core.testing import RenoController

MUTANTS: dict[str, type[RenoController]] = {}
MORE: list[tuple[str, type[RenoController]]] = []
"""Rules with faults of more kinds than one."""


def breaks(rule: str) -> Any:
    def add(controller: type[RenoController]) -> type[RenoController]:
        assert rule not in MUTANTS
        MUTANTS[rule] = controller
        return controller

    return add


def breaks_too(rule: str) -> Any:
    def add(controller: type[RenoController]) -> type[RenoController]:
        assert rule in MUTANTS
        MORE.append((rule, controller))
        return controller

    return add


# ---- what it says of itself -----------------------------------------------------------------------


@breaks("names-its-algorithm")
class AnotherVersionOfReno(RenoController):
    api_version = 2


@breaks("starts-with-a-window")
class CountsSegments(RenoController):
    @property
    def window(self) -> int:
        return self._window // self._mss


@breaks("holds-no-resources")
class KeepsATrace(RenoController):
    kept: ClassVar[list[int]] = []

    def __init__(self, mss: int) -> None:
        super().__init__(mss)
        self.kept.append(os.open(os.devnull, os.O_WRONLY))


@breaks("state-tells-what-all-tell")
class ForgetsLosses(RenoController):
    def state(self) -> Mapping[str, float | str]:
        return {**super().state(), "lost": 0}


@breaks("state-is-plain")
class InfiniteThreshold(RenoController):
    def state(self) -> Mapping[str, float | str]:
        return {"ssthresh": float("inf"), **super().state()}


# ---- what it may be told ----------------------------------------------------------------------------


@breaks("survives-odd-acks")
class NeedsEveryRoundTrip(RenoController):
    smoothed = 0.1

    def on_ack(self, sample: AckSample) -> None:
        super().on_ack(sample)
        self.smoothed += (sample.rtt - self.smoothed) / 8  # type: ignore[operator]


@breaks("one-segment-at-least")
class HalvesForEver(RenoController):
    def on_loss(self, *, now: float, sent_at: float, lost: int, in_flight: int, persistent: bool) -> None:
        half = self._window // 2
        super().on_loss(now=now, sent_at=sent_at, lost=lost, in_flight=in_flight, persistent=persistent)
        self._window = min(self._window, half)


@breaks("pacing-lets-packets-go")
class NoPaceWithoutARoundTrip(RenoController):
    @property
    def pacing_rate(self) -> float | None:
        rtt = self._account.rtt
        return 2 * self._window / rtt if rtt else 0.0

    def state(self) -> Mapping[str, float | str]:
        return {**super().state(), "pacing_rate": self.pacing_rate or 0.0}


@breaks("same-in-same-out")
class GrowsByChance(RenoController):
    def on_ack(self, sample: AckSample) -> None:
        super().on_ack(sample)
        self._window += random.randrange(2)


@breaks("any-clock-will-do")
class SinceTheClockBegan(RenoController):
    """Halves the window after a minute without looking, and thinks that it looked at time 0."""

    looked_at = 0.0

    def on_ack(self, sample: AckSample) -> None:
        super().on_ack(sample)
        if sample.now > self.looked_at + 60:
            self._window = max(self._window // 2, self._mss)
        self.looked_at = sample.now


@breaks("controllers-are-separate")
class OneWindowForAll(RenoController):
    windows: ClassVar[list[int]] = []

    @property
    def _window(self) -> int:
        return self.windows[-1]

    @_window.setter
    def _window(self, window: int) -> None:
        self.windows[:] = [window]


# ---- how it reacts --------------------------------------------------------------------------------


@breaks("once-per-round-trip")
class HalvesForEachLoss(RenoController):
    def on_loss(self, *, now: float, sent_at: float, lost: int, in_flight: int, persistent: bool) -> None:
        super().on_loss(now=now, sent_at=now, lost=lost, in_flight=in_flight, persistent=persistent)


@breaks_too("once-per-round-trip")
class HalvesForEachSampleThatHasLosses(RenoController):
    def on_ack(self, sample: AckSample) -> None:
        super().on_ack(sample)
        if sample.lost:
            self._halve(sample.now)


@breaks_too("once-per-round-trip")
class TakesTheNextFlightForTheLast(RenoController):
    """After the reaction, not at or after."""

    def on_loss(self, *, now: float, sent_at: float, lost: int, in_flight: int, persistent: bool) -> None:
        if sent_at == self._recovery_from:
            sent_at = float("-inf")
        super().on_loss(now=now, sent_at=sent_at, lost=lost, in_flight=in_flight, persistent=persistent)


@breaks("gives-up-on-timeouts")
class ATimeoutIsALoss(RenoController):
    def on_loss(self, *, now: float, sent_at: float, lost: int, in_flight: int, persistent: bool) -> None:
        super().on_loss(now=now, sent_at=sent_at, lost=lost, in_flight=in_flight, persistent=False)


@breaks("spurious-loss-costs-nothing")
class AnyNewsIsBad(RenoController):
    def on_spurious_loss(self, *, now: float) -> None:
        self._window = max(self._window // 2, self._mss)


# ---- on a path ------------------------------------------------------------------------------------


@breaks("starts-fast")
class NoSlowStart(RenoController):
    def __init__(self, mss: int) -> None:
        super().__init__(mss)
        self._ssthresh = self._window


@breaks("fills-the-path")
class CutsToTheBone(RenoController):
    def on_loss(self, *, now: float, sent_at: float, lost: int, in_flight: int, persistent: bool) -> None:
        before = self._window
        super().on_loss(now=now, sent_at=sent_at, lost=lost, in_flight=in_flight, persistent=persistent)
        if self._window < before:
            self._window = self._ssthresh = self._mss


class CutsItsOwnWay(RenoController):
    """Reacts when it should; ``cut`` says to what window."""

    def cut(self, window: int) -> int:
        return window // 2

    def on_loss(self, *, now: float, sent_at: float, lost: int, in_flight: int, persistent: bool) -> None:
        before, since = self._window, self._recovery_from
        super().on_loss(now=now, sent_at=sent_at, lost=lost, in_flight=in_flight, persistent=persistent)
        if not persistent and self._recovery_from > since:
            self._window = self._ssthresh = max(self.cut(before), 2 * self._mss)

    def first_bdp(self) -> float:
        """Bytes in flight that the path as it was first seen needs."""
        return (self._account.max_bandwidth or 0.0) * (self._account.min_rtt or 0.0)


@breaks("leaves-little-behind")
class LosesAndGoesOn(CutsItsOwnWay):
    def cut(self, window: int) -> int:
        return window


@breaks("unused-window-stays-small")
class GrowsWithoutNeed(RenoController):
    def on_ack(self, sample: AckSample) -> None:
        used = AckSample(
            sample.now, sample.sent_at, sample.acked, sample.lost, sample.rtt, sample.in_flight, self._window,
            sample.delivered, sample.prior_delivered, sample.delivery_rate, False, sample.round_start,
        )  # fmt: skip
        super().on_ack(used)


@breaks("follows-the-rate-down")
class NeverBelowItsBest(CutsItsOwnWay):
    def cut(self, window: int) -> int:
        return max(window // 2, int(1.6 * self.first_bdp()))


@breaks("follows-the-rate-up")
class NeverAboveItsFirst(CutsItsOwnWay):
    limit: int | None = None

    def cut(self, window: int) -> int:
        if self.limit is None:
            self.limit = int(1.5 * self.first_bdp())
        return window // 2

    @property
    def window(self) -> int:
        return self._window if self.limit is None else min(self._window, self.limit)


@breaks("comes-back-from-an-outage")
class StaysDown(RenoController):
    down = False

    def on_loss(self, *, now: float, sent_at: float, lost: int, in_flight: int, persistent: bool) -> None:
        super().on_loss(now=now, sent_at=sent_at, lost=lost, in_flight=in_flight, persistent=persistent)
        self.down = self.down or persistent

    @property
    def window(self) -> int:
        return self._mss if self.down else self._window


@breaks("shares-with-itself")
class TheLargeGiveLess(CutsItsOwnWay):
    def cut(self, window: int) -> int:
        return window * 19 // 20 if window > 30 * self._mss else window // 2
