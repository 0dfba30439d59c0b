"""Every rule has a broken implementation that the check refuses by the rule's name, and that keeps all other rules."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import broken_lanes
import broken_transports
import pytest
from leftovers import no_leftovers

from amst_core.interfaces import Advertisement, LaneRequest
from amst_core.testing import (
    Conformance,
    ConformanceError,
    MemoryTransport,
    check_lane_pair,
    check_transport,
    memory_lane_pair,
    rules,
)
from amst_core.testing.lanes import LANE_RULES
from amst_core.testing.transport import TRANSPORT_RULES

LANES = [rule.name for rule in LANE_RULES]
TRANSPORTS = [rule.name for rule in TRANSPORT_RULES]
MORE_THAN_HOLDS = 1 << 20
MUTANT_PATIENCE_S = 1.5

ALONE = {"nothing-outlives-a-lane", "construction-is-cheap", "close-releases-everything"}
"""Rules that count what the whole process has: tried while nothing else is."""

OWN_LISTENER = {
    "adopts-nothing-with-own-listener",
    "close-stops-listening",
    "deliver-may-raise",
    "slow-deliver-holds-up-nobody",
}
CORES_LISTENER = {"preamble-comes-first", "dead-connection-is-an-amst-error"}


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """What a check starts ends with it, also when the implementation is broken."""
    with no_leftovers():
        yield
        for kept in (broken_lanes.KeepsADescriptor.kept, broken_transports.KeepsItsListener.kept):
            while kept:
                os.close(kept.pop())


def check_lanes(lane: type[broken_lanes.MemoryLane], **arguments: object) -> Conformance:
    make_pair = partial(broken_lanes.make_pair, lane)
    return check_lane_pair(make_pair, more_than_holds=MORE_THAN_HOLDS, **arguments)  # type: ignore[arg-type]


def check_transports(transport: type[MemoryTransport], **arguments: object) -> Conformance:
    network = broken_transports.Network()
    unanswered = None
    if not issubclass(transport, broken_transports.AdoptingTransport):
        silent = Advertisement(transport.name, 1, network.silent_address())
        unanswered = partial(LaneRequest, silent, "127.0.0.1", 0, b"", 1.0)
    return check_transport(
        partial(transport, network),
        unanswered=unanswered,
        more_than_holds=MORE_THAN_HOLDS,
        **arguments,  # type: ignore[arg-type]
    )


def refused(check: Callable[..., Conformance], rule: str, others: Collection[str]) -> None:
    """``check`` names ``rule``, and none of the ``others``."""
    with pytest.raises(ConformanceError) as caught:
        check(only=[rule], patience_s=MUTANT_PATIENCE_S)
    assert caught.value.rule == rule
    assert rule in str(caught.value)
    assert caught.value.expected and caught.value.seen
    with ThreadPoolExecutor(12) as pool:  # they mostly wait
        found = [*pool.map(lambda name: check(only=[name]), [name for name in others if name not in ALONE])]
    found += [check(only=[name]) for name in others if name in ALONE]
    tried = {name for conformance in found for name in (*conformance.held, *conformance.skipped)}
    assert tried == set(others)


def test_every_rule_has_a_mutant() -> None:
    assert list(broken_lanes.MUTANTS) == LANES
    assert list(broken_transports.MUTANTS) == TRANSPORTS
    assert list(rules(check_transport)) == [*TRANSPORTS, *LANES]
    assert list(rules(check_lane_pair)) == LANES


@pytest.mark.parametrize("rule", LANES)
def test_a_broken_lane_is_refused_by_the_name_of_the_rule(rule: str) -> None:
    refused(partial(check_lanes, broken_lanes.MUTANTS[rule]), rule, [name for name in LANES if name != rule])


@pytest.mark.parametrize("rule", TRANSPORTS)
def test_a_broken_transport_is_refused_by_the_name_of_the_rule(rule: str) -> None:
    others = [name for name in TRANSPORTS if name != rule]
    refused(partial(check_transports, broken_transports.MUTANTS[rule]), rule, others)


def test_the_lane_in_memory_keeps_every_rule() -> None:
    conformance = check_lane_pair(memory_lane_pair, more_than_holds=MORE_THAN_HOLDS)
    assert conformance.held == tuple(LANES)
    assert not conformance.skipped


@pytest.mark.parametrize(
    ("transport", "skipped"),
    [(MemoryTransport, CORES_LISTENER), (broken_transports.AdoptingTransport, OWN_LISTENER)],
    ids=["own listener", "the core's listener"],
)
def test_transports_in_memory_keep_every_rule(transport: type[MemoryTransport], skipped: set[str]) -> None:
    conformance = check_transports(transport)
    assert set(conformance.skipped) == skipped
    assert set(conformance.held) == set(rules(check_transport)) - skipped
