"""What lanes tell, made by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from amst_core.interfaces import FlowSample

RTT = 0.1


@pytest.fixture
def tells() -> Callable[..., FlowSample]:
    """Makes what a lane tells; everything may be told otherwise."""

    def tell(delivered: int = 0, **more: float) -> FlowSample:
        said: dict[str, float] = dict(
            sent=delivered, lost=0, in_flight=0, window=100_000, unsent=1 << 20, rtt_s=RTT, min_rtt_s=RTT, mss=1000
        )
        return FlowSample(delivered, **(said | more))  # type: ignore[arg-type]

    return tell
