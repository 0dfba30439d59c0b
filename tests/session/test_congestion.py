"""The congestion control of a session's lanes: both sides take the client's wish, as far as they can."""

from __future__ import annotations

import logging
from typing import Any

import pytest

import amst_core
from amst_core.congestion import FlowAccount
from amst_core.errors import PluginError, UnavailableError, UsageError
from amst_core.hookspecs import hookimpl
from amst_core.interfaces import CongestionController
from amst_core.plugins import Plugins

pytestmark = pytest.mark.needs_transport


class Controller(CongestionController):
    """Only asked what the system calls it."""

    window = 1 << 20
    pacing_rate = None

    def __init__(self, name: str, kernel_name: str | None) -> None:
        self.name = name  # type: ignore[misc]
        self.kernel_name = kernel_name  # type: ignore[misc]

    def on_sent(self, **_):
        raise AssertionError("the kernel does the work")

    on_ack = on_loss = on_sent

    def state(self):
        return FlowAccount().state(self.name, window=self.window, pacing_rate=None)


class Plugin:
    def __init__(self, name: str, kernel_name: str | None) -> None:
        self.name, self.kernel_name = name, kernel_name

    @hookimpl
    def amst_make_controller(self, name, options, mss):
        return Controller(name, self.kernel_name) if name == self.name else None


def offering(**names: str | None) -> Plugins:
    plugins = Plugins()
    for name, kernel_name in names.items():
        plugins.register(Plugin(name, kernel_name), "amst.congestion", name)
    return plugins


def congestion_of(session: Any) -> set[str]:
    return {stream.path.congestion for stream in session.streams()}


def test_both_sides_run_what_the_client_asks_for(net):
    plugins = offering(newreno="reno")  # every kernel has it, and allows it to everyone
    server = net.server(plugins=plugins)
    near = net.connect(server, plugins=plugins, congestion="newreno")
    far = server.accept(5)
    net.wait_until(lambda: len(far.core.lanes) == 2, "both streams")
    for session in (near, far):
        assert congestion_of(session) == {"reno"}
        in_force = [stream.congestion for stream in session.streams()]
        assert {(one.asked, one.algorithm, one.backend) for one in in_force} == {("newreno", "reno", "kernel")}
        metrics = session.metrics()
        assert (metrics.congestion, metrics.congestion_backend) == ("reno", "kernel")
        assert metrics.congestion_reason == "newreno, asked for"


def test_a_server_that_does_not_know_it_says_so_and_goes_on(net):
    server = net.server(plugins=offering())
    net.connect(server, plugins=offering(newreno="reno"), congestion="newreno")
    far = server.accept(5)
    net.wait_until(lambda: far.streams(), "a stream")
    assert all("no installed plugin offers newreno" in one.congestion.reason for one in far.streams())


def test_what_a_server_is_set_to_counts_more_than_a_wish(net):
    server = net.server(plugins=offering(newreno="reno", other="reno"), congestion__algorithm="other")
    net.connect(server, plugins=offering(newreno="reno"), congestion="newreno")
    far = server.accept(5)
    net.wait_until(lambda: far.streams(), "a stream")
    assert {one.congestion.asked for one in far.streams()} == {"other"}


def test_the_setting_asks_as_the_argument_does(net):
    plugins = offering(newreno="reno")
    near = net.connect(net.server(plugins=plugins), plugins=plugins, congestion__algorithm="newreno")
    assert congestion_of(near) == {"reno"}


def test_a_name_that_nobody_offers_is_an_error_when_given_and_a_warning_when_set(net, caplog):
    server = net.server()
    with pytest.raises(UsageError, match="no installed plugin offers congestion control 'fancy'"):
        net.connect(server, congestion="fancy")
    caplog.set_level(logging.WARNING, "amst.api")
    near = net.connect(server, congestion__algorithm="fancy")
    assert {one.congestion.asked for one in near.streams()} == {"auto"}
    assert "no installed plugin offers congestion control 'fancy'" in caplog.text


def test_a_lane_that_takes_the_place_of_another_runs_it_too(net):
    plugins = offering(newreno="reno")
    near = net.connect(net.server(plugins=plugins), plugins=plugins, congestion="newreno")
    victim = next(iter(near.core.lanes.values()))
    victim.lane.abort()
    net.wait_until(lambda: near.metrics().lane_failures == 1 and len(near.core.lanes) == 2, "its replacement")
    assert congestion_of(near) == {"reno"}
    assert sum(stream.reconnects for stream in near.streams()) == 1


@pytest.mark.parametrize(
    "fault", [RuntimeError("no"), UnavailableError("it needs numpy"), PluginError("broken")], ids=lambda e: e.args[0]
)
def test_a_controller_that_cannot_be_made_disturbs_nobody_who_did_not_ask(net, caplog, fault):
    class Broken:
        @hookimpl
        def amst_make_controller(self, name, options, mss):
            raise fault

    plugins = Plugins()
    plugins.register(Broken(), "amst.congestion", "broken")
    server = net.server(plugins=plugins)
    near = net.connect(server, plugins=plugins)
    assert {one.congestion.asked for one in near.streams()} == {"auto"}
    assert "congestion control broken cannot be used" in caplog.text
    with pytest.raises(UsageError, match="congestion control 'broken' cannot be used"):
        net.connect(server, plugins=plugins, congestion="broken")


@pytest.mark.parametrize("kernel_name", [5, "", "br\nb", "\ud800"])
def test_what_no_system_can_be_asked_for_is_refused_where_it_comes_from(net, caplog, kernel_name):
    near = net.connect(net.server(), plugins=offering(odd=kernel_name))
    assert near.streams()
    assert "congestion control odd cannot be used: its kernel_name is" in caplog.text


@pytest.mark.parametrize("name", ["BBR2", "auto", "x" * 64, "ledbat++"])
def test_a_plugin_with_a_name_that_cannot_be_asked_for_is_left_out(net, caplog, name):
    near = net.connect(net.server(), plugins=offering(**{name: "reno"}))
    assert near.streams()
    assert f"{name!r} is no name of a congestion control" in caplog.text


def test_amst_core_connect_takes_it():
    with pytest.raises(UsageError, match="fancy"):
        amst_core.connect("127.0.0.1:9", token=b"t" * 32, congestion="fancy")
