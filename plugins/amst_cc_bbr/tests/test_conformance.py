"""The conformance kit of the core on this controller."""

from __future__ import annotations

from amst_cc_bbr.controller import BbrController
from amst_core.testing import check_controller, rules


def test_it_keeps_every_rule() -> None:
    conformance = check_controller(lambda mss: BbrController({}, mss=mss))
    assert set(conformance.held) == set(rules(check_controller))
    assert not conformance.skipped
