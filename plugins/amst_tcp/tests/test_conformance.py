"""The conformance kit of the core on this transport, over real sockets on loopback."""

from __future__ import annotations

from amst_core.testing import check_transport, rules
from amst_tcp.transport import TcpTransport

OWN_LISTENER = {
    "adopts-nothing-with-own-listener",
    "close-stops-listening",
    "deliver-may-raise",
    "slow-deliver-holds-up-nobody",
}
"""Rules for transports with a listener of their own; TCP's lanes come to the core's."""


def test_it_keeps_every_rule() -> None:
    conformance = check_transport(lambda: TcpTransport({}))
    not_told = {rule for rule, reason in conformance.skipped.items() if "too busy" in reason}
    assert set(conformance.skipped) - not_told == OWN_LISTENER
    assert set(conformance.held) == set(rules(check_transport)) - OWN_LISTENER - not_told
