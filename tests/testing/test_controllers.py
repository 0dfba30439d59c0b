"""Every rule of controllers has a broken one, refused by that rule's name and keeping all rules before it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import broken_controllers
import pytest
from leftovers import no_leftovers

from amst_core.errors import UsageError
from amst_core.testing import (
    ConformanceError,
    RenoController,
    check_controller,
    check_detector,
    check_transport,
    rules,
)
from amst_core.testing.controllers import CONTROLLER_RULES

NAMES = [rule.name for rule in CONTROLLER_RULES]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    with no_leftovers():
        yield
        while broken_controllers.KeepsATrace.kept:
            os.close(broken_controllers.KeepsATrace.kept.pop())


def test_every_rule_of_controllers_has_a_mutant() -> None:
    assert list(broken_controllers.MUTANTS) == NAMES
    assert list(rules(check_controller)) == NAMES
    assert list(rules()) == [*rules(check_transport), *NAMES, *rules(check_detector)]
    with pytest.raises(UsageError, match="is no check"):
        rules(rules)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rule", "mutant"),
    [*broken_controllers.MUTANTS.items(), *broken_controllers.MORE],
    ids=lambda part: part if isinstance(part, str) else part.__name__,
)
def test_a_broken_controller_is_refused_by_the_name_of_the_rule_and_of_none_before(
    rule: str, mutant: type[RenoController]
) -> None:
    with pytest.raises(ConformanceError) as caught:
        check_controller(mutant)
    assert caught.value.rule == rule, caught.value
    assert caught.value.expected and caught.value.seen


def test_reno_keeps_every_rule() -> None:
    conformance = check_controller(RenoController)
    assert conformance.held == tuple(NAMES)
    assert not conformance.skipped


def test_a_controller_that_never_returns_breaks_the_rule_and_hangs_nobody() -> None:
    go_on = threading.Event()

    class Hangs(RenoController):
        def on_spurious_loss(self, *, now: float) -> None:
            go_on.wait()

    with pytest.raises(ConformanceError, match="still busy") as caught:
        check_controller(Hangs, only=["spurious-loss-costs-nothing"], patience_s=0.2)
    go_on.set()
    assert caught.value.rule == "spurious-loss-costs-nothing"


def test_a_controller_that_raises_breaks_the_rule() -> None:
    class Raises(RenoController):
        def on_loss(self, **_: object) -> None:
            raise ZeroDivisionError("no rate")

    with pytest.raises(ConformanceError, match="ZeroDivisionError"):
        check_controller(Raises, only=["one-segment-at-least"])


def test_a_rule_that_is_none_is_named() -> None:
    with pytest.raises(UsageError, match="no such rule: quickly"):
        check_controller(RenoController, only=["quickly"])
