"""Every rule of detectors has a broken one, refused by that rule's name and keeping all rules before it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import broken_detectors
import pytest
from leftovers import no_leftovers

from amst_core.errors import UsageError
from amst_core.interfaces import ModeDecision, PathSample
from amst_core.modes import ThresholdDetector
from amst_core.testing import ConformanceError, check_detector, rules
from amst_core.testing.detectors import DETECTOR_RULES

NAMES = [rule.name for rule in DETECTOR_RULES]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    with no_leftovers():
        yield
        while broken_detectors.KeepsATrace.kept:
            os.close(broken_detectors.KeepsATrace.kept.pop())


def test_every_rule_of_detectors_has_a_mutant() -> None:
    assert list(broken_detectors.MUTANTS) == NAMES
    assert list(rules(check_detector)) == NAMES


@pytest.mark.parametrize(("rule", "mutant"), broken_detectors.MUTANTS.items())
def test_a_broken_detector_is_refused_by_the_name_of_the_rule_and_of_none_before(
    rule: str, mutant: type[ThresholdDetector]
) -> None:
    with pytest.raises(ConformanceError) as caught:
        check_detector(mutant)
    assert caught.value.rule == rule, caught.value
    assert caught.value.expected and caught.value.seen


def test_the_cores_own_keeps_every_rule() -> None:
    conformance = check_detector(ThresholdDetector)
    assert conformance.held == tuple(NAMES)
    assert not conformance.skipped


def test_a_detector_that_never_returns_breaks_the_rule_and_hangs_nobody() -> None:
    go_on = threading.Event()

    class Hangs(ThresholdDetector):
        def update(self, sample: PathSample, *, now: float) -> ModeDecision:
            go_on.wait()
            return super().update(sample, now=now)

    with pytest.raises(ConformanceError, match="still busy") as caught:
        check_detector(Hangs, only=["knows-a-datacenter"], patience_s=0.2)
    go_on.set()
    assert caught.value.rule == "knows-a-datacenter"


def test_a_detector_that_raises_breaks_the_rule() -> None:
    class Raises(ThresholdDetector):
        def update(self, sample: PathSample, *, now: float) -> ModeDecision:
            raise ZeroDivisionError("no rate")

    with pytest.raises(ConformanceError, match="ZeroDivisionError"):
        check_detector(Raises, only=["tells-its-reason"])


def test_a_rule_that_is_none_is_named() -> None:
    with pytest.raises(UsageError, match="no such rule: quickly"):
        check_detector(ThresholdDetector, only=["quickly"])
