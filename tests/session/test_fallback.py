"""No fallback is silent (invariant 7): what was asked for, what runs instead, and why."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import pytest

import amst_core
from amst_core.errors import UnavailableError
from amst_core.interfaces import Advertisement, Candidate, Endpoint, Lane, LaneRequest, LaneTimeouts, Transport
from amst_core.plugins import Plugins

pytestmark = pytest.mark.needs_transport


class Ghost(Transport):
    """A transport that is installed, and whose device is not."""

    name = "ghost"

    def probe(self, peer: Endpoint | None) -> Candidate:
        return Candidate(self.name, False, "there is no ghost in this machine")

    def advertise(self, tag: int, deliver: Callable[[Lane], None]) -> Advertisement:
        raise AssertionError("an unusable transport is not advertised")

    def connect(self, request: LaneRequest, timeouts: LaneTimeouts) -> Lane:
        raise AssertionError("an unusable transport is not used")

    def close(self) -> None:
        pass


@pytest.fixture
def haunted(monkeypatch: pytest.MonkeyPatch) -> None:
    names, transport = Plugins.names, Plugins.transport

    def more_names(self: Plugins, group: str) -> Any:
        return [*names(self, group), "ghost"] if group == "amst.transport" else names(self, group)

    def any_transport(self: Plugins, name: str, options: Mapping[str, object]) -> Transport:
        return Ghost() if name == "ghost" else transport(self, name, options)

    monkeypatch.setattr(Plugins, "names", more_names)
    monkeypatch.setattr(Plugins, "transport", any_transport)


def test_another_transport_than_the_one_asked_for_says_why(
    net: Any, haunted: None, caplog: pytest.LogCaptureFixture
) -> None:
    server = net.server()
    with (
        caplog.at_level(logging.WARNING, "amst"),
        amst_core.connect(server.address, settings=net.settings({}), token=server.token, transport="ghost") as session,
    ):
        expected = "ghost was asked for, tcp runs: there is no ghost in this machine"
        assert session.report.transport_reason == expected
        assert session.report.transport == "tcp"
        assert expected in caplog.text
        assert session.metrics().transport_type == "tcp"


def test_what_is_required_does_not_fall_back(net: Any, haunted: None) -> None:
    server = net.server()
    with pytest.raises(UnavailableError, match="there is no ghost in this machine"):
        amst_core.connect(server.address, settings=net.settings({}), token=server.token, require="ghost")
