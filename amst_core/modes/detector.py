"""The core's own mode detector: thresholds on what was seen of the path lately, each with hysteresis."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from typing import Final

from ..interfaces import Mode, ModeDecision, ModeDetector, PathSample
from ..settings.registry import THRESHOLD
from ..units import format_bit_rate, format_duration
from .thresholds import Thresholds, tier_of

HISTORY: Final = 10
"""Samples that count: five seconds of them, for the core takes two a second."""

_ENOUGH: Final = HISTORY // 2
"""Samples of the bandwidth that are needed to call a path slow: a transfer that has just begun is."""

_ENOUGH_LOSSES: Final = 3

DWELL_S: Final = 10.0
"""A mode does not go back to the one before it for so long at least."""

SETTLED_S: Final = 60.0
"""Before, it goes only for what is beyond a threshold by `_MARGIN`: noise at one changes it once a minute at most."""

_MARGIN: Final = 1.5

_LEAVE_NEAR: Final = 1.2
_LEAVE_FAR: Final = 0.8
_RISE: Final = 0.9
_FALL: Final = 0.75
_LEAVE_LOSSY: Final = 0.5
"""Parts of the thresholds, where the way back begins. Of a link's nominal rate 0.94 is the most that arrives."""

_PERCENTILE: Final = 0.9


class _Trigger:
    """On above one bound, off below another; what lies between changes nothing (Schmitt's trigger)."""

    __slots__ = ("_off_below", "_on_above", "on")

    def __init__(self, *, on_above: float, off_below: float, on: bool = False) -> None:
        self.on = on
        self._on_above = on_above
        self._off_below = off_below

    def show(self, value: float, margin: float) -> None:
        """It is so high; only ``margin`` times beyond a bound counts."""
        self.on = value * margin >= self._off_below if self.on else value > self._on_above * margin


class ThresholdDetector(ModeDetector):
    """Modes by round trip, bandwidth and loss (requirements F2).

    Of the last ten samples the shortest round trip counts, the 90th percentile of the bandwidth and the mean of all
    losses but the largest. What is not known changes nothing: a path whose bandwidth never showed is not slow, and one
    that was found slow stays so until it is seen to be faster, or its round trip becomes a datacenter's.
    """

    name = THRESHOLD

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self._bounds = bounds = thresholds or Thresholds()
        self._samples: deque[PathSample] = deque(maxlen=HISTORY)
        self._latency: float | None = None  # as they were when last known
        self._bandwidth: float | None = None
        self._loss: float | None = None
        self._distant = _Trigger(on_above=bounds.near_s * _LEAVE_NEAR, off_below=bounds.near_s)
        self._far = _Trigger(on_above=bounds.far_s, off_below=bounds.far_s * _LEAVE_FAR)
        self._fast = _Trigger(on_above=bounds.fast * _RISE, off_below=bounds.fast * _FALL, on=True)
        self._lossy = _Trigger(on_above=bounds.lossy, off_below=bounds.lossy * _LEAVE_LOSSY)
        self._decision: ModeDecision | None = None
        self._came_from: Mode | None = None
        self._changed_at = -math.inf  # by this detector: the first mode is nobody's change

    def update(self, sample: PathSample, *, now: float) -> ModeDecision:
        self._samples.append(sample)
        stayed_s = now - self._changed_at
        self._look(1.0 if stayed_s >= SETTLED_S else _MARGIN)
        fitting, last = self._fitting, self._decision
        tier = None if self._latency is None else tier_of(self._latency)
        if last is not None and fitting is not last.mode:
            if fitting is self._came_from and stayed_s < DWELL_S:
                self._decision = replace(last, tier=tier)
                return self._decision
            self._came_from, self._changed_at = last.mode, now
        self._decision = ModeDecision(fitting, tier, "; ".join(self._reasons()))
        return self._decision

    def _look(self, margin: float) -> None:
        """Have the triggers see what the samples come to."""
        latencies = [sample.latency_s for sample in self._samples if sample.latency_s is not None]
        if latencies:
            self._see_latency(min(latencies), margin)
        rates = sorted(sample.bandwidth for sample in self._samples if sample.bandwidth is not None)
        if rates:
            rate = rates[math.ceil(_PERCENTILE * len(rates)) - 1]
            if len(rates) >= _ENOUGH or rate > self._bounds.fast * _RISE:
                self._bandwidth = rate
                self._fast.show(rate, margin)
        losses = sorted(sample.loss for sample in self._samples if sample.loss is not None)
        if len(losses) >= _ENOUGH_LOSSES:
            losses.pop()  # a burst is no path
            self._loss = sum(losses) / len(losses)
            self._lossy.show(self._loss, margin)

    def _see_latency(self, latency: float, margin: float) -> None:
        if self._latency is None:  # what parts the modes by their names, for there is none to stay in
            self._distant.on = latency >= self._bounds.near_s
            self._far.on = latency > self._bounds.far_s
            self._latency = latency
            return
        self._latency = latency
        was_distant = self._distant.on
        self._distant.show(latency, margin)
        self._far.show(latency, margin)
        if was_distant and not self._distant.on:
            # it is another path: what the last one carried and lost says nothing of it
            self._fast.on, self._lossy.on = True, False
            self._bandwidth = self._loss = None
            self._samples = deque((replace(sample, bandwidth=None, loss=None) for sample in self._samples), HISTORY)

    @property
    def _fitting(self) -> Mode:
        if self._far.on or not self._fast.on or self._lossy.on:
            return Mode.INTERNET
        return Mode.HYBRID if self._distant.on else Mode.DATACENTER

    def _reasons(self) -> list[str]:
        """Why it is this mode: what calls for the internet's, or else all that is known."""
        bounds, internet = self._bounds, self._fitting is Mode.INTERNET
        said = []
        if self._latency is None:
            said.append("the round trip is not known")
        elif self._far.on or not internet:
            bound, above = (bounds.far_s, True) if self._far.on else (bounds.near_s, self._distant.on)
            shown = format_duration(self._latency), format_duration(bound)
            said.append(f"the round trip of {shown[0]} is {_beside(self._latency, bound, above)} {shown[1]}")
        if self._bandwidth is None:
            said += [] if internet else ["what it carries is not known"]
        elif not (internet and self._fast.on):
            shown = format_bit_rate(self._bandwidth), format_bit_rate(bounds.fast)
            said.append(f"it carries {shown[0]}, {'as' if self._fast.on else 'less than'} a link of {shown[1]} does")
        if self._loss is not None and self._lossy.on:
            said.append(f"of what is sent {self._loss:.1%} is lost, {_beside(self._loss, bounds.lossy, True)}"
                        f" {bounds.lossy:.0%}")  # fmt: skip
        return said


def _beside(value: float, bound: float, above: bool) -> str:
    """How ``value`` stands to the bound that it has passed, or has not come back over far enough."""
    if above:
        return "above" if value > bound else "not far enough below"
    return "below" if value < bound else "not far enough above"
