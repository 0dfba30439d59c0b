"""The conformance kit of the core on CUBIC, paced and not."""

from __future__ import annotations

import pytest

from amst_cc_cubic.controller import CubicController
from amst_core.testing import check_controller, rules


@pytest.mark.parametrize("pacing", [True, False])
def test_it_keeps_every_rule(pacing: bool) -> None:
    conformance = check_controller(lambda mss: CubicController({"pacing": pacing}, mss=mss))
    assert set(conformance.held) == set(rules(check_controller))
    assert not conformance.skipped
