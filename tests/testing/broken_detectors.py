"""One broken detector for each rule of detectors: the core's own, with one fault that some author might leave in."""

from __future__ import annotations

import os
import random
from collections import deque
from dataclasses import replace
from typing import Any, ClassVar

from amst_core.interfaces import Mode, ModeDecision, PathSample
from amst_core.modes import ThresholdDetector, Thresholds

MUTANTS: dict[str, type[ThresholdDetector]] = {}


def breaks(rule: str) -> Any:
    def add(detector: type[ThresholdDetector]) -> type[ThresholdDetector]:
        assert rule not in MUTANTS
        MUTANTS[rule] = detector
        return detector

    return add


# ---- what it says of itself, and how it answers ---------------------------------------------------


@breaks("detector-names-itself")
class AnotherVersion(ThresholdDetector):
    api_version = 2


@breaks("detector-holds-no-resources")
class KeepsATrace(ThresholdDetector):
    kept: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.kept.append(os.open(os.devnull, os.O_WRONLY))


@breaks("answers-every-sample")
class NeedsALatency(ThresholdDetector):
    def update(self, sample: PathSample, *, now: float) -> ModeDecision:
        assert sample.latency_s is not None
        return super().update(sample, now=now)


@breaks("tells-its-reason")
class IsSilent(ThresholdDetector):
    def update(self, sample: PathSample, *, now: float) -> ModeDecision:
        return replace(super().update(sample, now=now), reason="")


@breaks("tiers-by-latency")
class KnowsThreeTiers(ThresholdDetector):
    def update(self, sample: PathSample, *, now: float) -> ModeDecision:
        decision = super().update(sample, now=now)
        return replace(decision, tier=min(3, decision.tier or 1))


# ---- what it may depend on -------------------------------------------------------------------------


@breaks("same-samples-same-modes")
class Guesses(ThresholdDetector):
    def update(self, sample: PathSample, *, now: float) -> ModeDecision:
        decision = super().update(sample, now=now)
        return replace(decision, mode=random.choice(list(Mode))) if random.random() < 0.2 else decision


@breaks("any-time-will-do")
class GrowsOld(ThresholdDetector):
    def update(self, sample: PathSample, *, now: float) -> ModeDecision:
        decision = super().update(sample, now=now)
        return replace(decision, mode=Mode.HYBRID) if now > 1e6 else decision


@breaks("detectors-are-separate")
class LooksAtTheNewestSample(ThresholdDetector):
    newest: ClassVar[tuple[object, float, PathSample] | None] = None

    def update(self, sample: PathSample, *, now: float) -> ModeDecision:
        newest = self.newest
        if newest is not None and newest[0] is not self and 0 <= now - newest[1] <= 0.5:
            sample = newest[2]
        type(self).newest = (self, now, sample)
        return super().update(sample, now=now)


# ---- what it finds -----------------------------------------------------------------------------------


@breaks("knows-a-datacenter")
class FindsEverythingSlow(ThresholdDetector):
    def __init__(self) -> None:
        super().__init__(Thresholds(fast=1e12))


@breaks("knows-the-internet")
class FindsEverythingNear(ThresholdDetector):
    def __init__(self) -> None:
        super().__init__(Thresholds(near_s=10.0, far_s=10.0, fast=1.0, lossy=0.9))


@breaks("follows-the-path")
class MakesUpItsMind(ThresholdDetector):
    seen = 0
    first: ModeDecision | None = None

    def update(self, sample: PathSample, *, now: float) -> ModeDecision:
        self.seen += 1
        decision = super().update(sample, now=now)
        if self.seen == 60:
            self.first = decision
        return decision if self.first is None else replace(decision, mode=self.first.mode)


# ---- what must not move it ---------------------------------------------------------------------------


@breaks("unknown-changes-nothing")
class TakesSilenceForDistance(ThresholdDetector):
    silent = 0

    def update(self, sample: PathSample, *, now: float) -> ModeDecision:
        decision = super().update(sample, now=now)
        self.silent = self.silent + 1 if sample.latency_s is None and sample.bandwidth is None else 0
        return replace(decision, mode=Mode.INTERNET) if self.silent > 100 else decision


@breaks("one-odd-sample-changes-nothing")
class HasNoHistory(ThresholdDetector):
    def __init__(self) -> None:
        super().__init__()
        self._samples = deque(maxlen=1)


@breaks("keeps-still")
class HasNoHysteresis(ThresholdDetector):
    def __init__(self) -> None:
        super().__init__()
        for trigger, bound in ((self._distant, 0.01), (self._far, 0.05), (self._fast, 1.125e8), (self._lossy, 0.01)):
            trigger._on_above = trigger._off_below = bound

    def update(self, sample: PathSample, *, now: float) -> ModeDecision:
        self._changed_at = -1e9
        return super().update(sample, now=now)
