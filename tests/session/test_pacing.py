"""A session that is paced in user space, and whose streams follow its path: who decides, who is told, what is set."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from amst_core.congestion import FAR_S, FlowAccount
from amst_core.errors import UnavailableError
from amst_core.hookspecs import hookimpl
from amst_core.interfaces import CongestionController, FlowSample
from amst_core.pacing import Range
from amst_core.plugins import Plugins

pytestmark = pytest.mark.needs_transport

RATE = 4_000_000.0
SO_MAX_PACING_RATE = 47
USERSPACE = {"congestion__backend": "userspace"}


class Controller(CongestionController):
    """Allows `RATE`, whatever happens."""

    window = 1 << 30
    pacing_rate = RATE

    def __init__(self, name: str, kernel_name: str | None) -> None:
        self.name = name  # type: ignore[misc]
        self.kernel_name = kernel_name  # type: ignore[misc]
        self.acknowledged = 0

    def on_sent(self, **_: object) -> None:
        pass

    def on_ack(self, sample: Any) -> None:
        self.acknowledged += sample.acked

    def on_loss(self, **_: object) -> None:
        pass

    def state(self) -> Any:
        return {**FlowAccount().state(self.name, window=self.window, pacing_rate=RATE), "mode": "steady"}


class Plugin:
    def __init__(self, name: str, kernel_name: str | None) -> None:
        self.name, self.kernel_name = name, kernel_name
        self.made: list[Controller] = []

    @hookimpl
    def amst_make_controller(self, name: str, options: object, mss: int) -> Controller | None:
        if name != self.name:
            return None
        self.made.append(Controller(name, self.kernel_name))
        return self.made[-1]


def offering(**names: str | None) -> Plugins:
    plugins = Plugins()
    for name, kernel_name in names.items():
        plugins.register(Plugin(name, kernel_name), "amst.congestion", name)
    return plugins


def caps(session: Any) -> list[int]:
    """What the system lets each stream send at most, bytes/s."""
    found = []
    for worker in list(session.core.lanes.values()):
        raw = worker.lane._sock.getsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, 8)
        found.append(int.from_bytes(raw, "little"))
    return found


@contextmanager
def traffic(sender: Any, receiver: Any) -> Iterator[None]:
    """Messages, one after the other, during the block."""
    ended = threading.Event()

    def send() -> None:
        while not ended.is_set():
            sender.send(bytes(1 << 18)).wait(20)
        sender.send(b"").wait(20)

    def receive() -> None:
        while receiver.recv(timeout=20):
            pass

    threads = [threading.Thread(target=send), threading.Thread(target=receive)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join(30)


def refuse(monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    """Have the one place that sets a congestion control answer as a kernel does that does not allow it."""
    from amst_tcp import lane

    choose = lane.choose_congestion

    def choosing(sock: socket.socket, algorithm: str) -> str:
        if algorithm == refused:
            raise UnavailableError(f"this process may not use {algorithm} (EPERM)")
        return choose(sock, algorithm)

    monkeypatch.setattr(lane, "choose_congestion", choosing)


def in_force(session: Any) -> set[tuple[str | None, str | None]]:
    return {(one.congestion.backend, one.congestion.controller) for one in session.streams()}


# ---- who paces ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sends", ["client", "server"])
def test_one_pace_is_shared_out_to_all_streams_of_whoever_sends(net: Any, sends: str) -> None:
    plugins = offering(steady=None)
    server = net.server(plugins=plugins)
    near = net.connect(server, plugins=plugins, congestion="steady", streams=3, **USERSPACE)
    far = server.accept(5)
    net.wait_until(lambda: len(far.core.lanes) == 3, "three streams")
    assert in_force(near) == in_force(far) == {("userspace", "steady")}
    assert near.metrics().congestion_backend == "userspace"
    sender, receiver = (near, far) if sends == "client" else (far, near)
    with traffic(sender, receiver):
        net.wait_until(lambda: sum(caps(sender)) < 4 * RATE, "the streams to be paced")
        net.wait_until(lambda: RATE * 0.97 <= sum(caps(sender)) or min(caps(sender)) >= RATE / 3, "all to have room")
    assert all(cap > 1 << 40 for cap in caps(receiver)), "what only answers is not paced"


def test_what_the_system_refuses_is_done_in_user_space(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "reno")
    plugins = offering(newreno="reno")
    near = net.connect(net.server(plugins=plugins), plugins=plugins, congestion="newreno")
    assert in_force(near) == {("userspace", "newreno")}
    reason = near.metrics().congestion_reason
    assert "newreno, asked for; this process may not use reno (EPERM); paced in user space over" in reason


def test_what_the_system_has_is_left_to_it(net: Any) -> None:
    plugins = offering(newreno="reno")
    near = net.connect(net.server(plugins=plugins), plugins=plugins, congestion="newreno")
    assert in_force(near) == {("kernel", None)}
    assert {one.congestion.algorithm for one in near.streams()} == {"reno"}


def test_the_system_alone_falls_back_when_it_refuses(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "reno")
    plugins = offering(newreno="reno")
    near = net.connect(
        net.server(plugins=plugins), plugins=plugins, congestion="newreno", congestion__backend="kernel"
    )
    assert in_force(near) <= {("kernel", None)}
    assert "this process may not use reno (EPERM)" in near.metrics().congestion_reason
    assert {one.congestion.algorithm for one in near.streams()} != {"reno"}


def test_the_base_is_what_the_setting_says(net: Any) -> None:
    plugins = offering(steady=None)
    near = net.connect(
        net.server(plugins=plugins), plugins=plugins, congestion="steady", congestion__base="reno", **USERSPACE
    )
    assert {one.congestion.algorithm for one in near.streams()} == {"reno"}
    assert "paced in user space over the system's reno" in near.metrics().congestion_reason


def test_what_a_server_is_set_to_counts_more_than_the_wish(net: Any) -> None:
    plugins = offering(newreno="reno")
    server = net.server(plugins=plugins, congestion__backend="kernel")
    net.connect(server, plugins=plugins, congestion="newreno", **USERSPACE)
    far = server.accept(5)
    net.wait_until(lambda: far.streams(), "a stream")
    assert in_force(far) == {("kernel", None)}


def test_a_controller_that_fails_takes_nothing_down(
    net: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(controller: Controller, sample: Any) -> None:
        raise RuntimeError("a mistake of mine")

    plugins = offering(steady=None)
    server = net.server(plugins=plugins)
    near = net.connect(server, plugins=plugins, congestion="steady", **USERSPACE)
    far = server.accept(5)
    with traffic(near, far):
        net.wait_until(lambda: sum(caps(near)) < 4 * RATE, "the streams to be paced")
        monkeypatch.setattr(Controller, "on_ack", fail)
        net.wait_until(lambda: all(cap > 1 << 40 for cap in caps(near)), "them to be paced no more")
    assert "the session is paced no more" in caplog.text
    assert near.error is None


# ---- polite ------------------------------------------------------------------------------------


def test_a_polite_session_is_one_flow_on_both_sides(net: Any) -> None:
    plugins = offering(cubic="cubic")
    server = net.server(plugins=plugins)
    near = net.connect(server, plugins=plugins, polite=True, streams=2)
    far = server.accept(5)
    net.wait_until(lambda: len(far.core.lanes) == 2, "both streams")
    assert in_force(near) == in_force(far) == {("userspace", "cubic")}
    assert "cubic, for the session is to be polite" in near.metrics().congestion_reason
    with traffic(near, far):
        net.wait_until(lambda: max(caps(near)) <= RATE, "the streams to be paced")


def test_one_that_cannot_be_paced_is_polite_with_one_stream(
    net: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from amst_tcp.lane import TcpLane

    def refuse(lane: TcpLane, bytes_per_s: float | None) -> None:
        raise UnavailableError("this system does not pace")

    monkeypatch.setattr(TcpLane, "set_pacing", refuse)
    caplog.set_level(logging.WARNING, "amst.session")
    plugins = offering(cubic="cubic")
    near = net.connect(net.server(plugins=plugins), plugins=plugins, polite=True, streams=4, wait=False)
    net.wait_until(lambda: not near.core.coming and len(near.core.lanes) == 1, "the others to come and to go")
    net.stays(lambda: len(near.core.lanes) == 1, "one stream")
    assert "polite with one stream: cubic, for the session is to be polite; this system does not pace" in caplog.text


# ---- how many streams --------------------------------------------------------------------------


def test_the_server_learns_how_many_streams_it_may_have(net: Any) -> None:
    server = net.server()
    net.connect(server, streams=None, max_streams=3, transport__modes__datacenter_streams=2)
    net.connect(server, streams=2)
    ranges = [server.accept(5).core._streams_range for _ in range(2)]
    assert ranges == [Range(2, 1, 3), Range(2, 2, 2)]


def test_streams_come_and_go_as_the_path_needs_them(net: Any) -> None:
    pair = net.pair(streams=2)
    pair.near.core.want_streams(5)
    net.wait_until(lambda: len(pair.far.core.live_lanes_locked()) == 5, "three more")
    pair.far.core.want_streams(7)
    net.wait_until(lambda: len(pair.near.core.live_lanes_locked()) == 7, "two more that the server asked for")
    pair.near.core.want_streams(3)
    net.wait_until(lambda: len(pair.far.core.lanes) == 3, "four to go")
    pair.near.send(bytes(1 << 20)).wait(20)
    assert len(pair.far.recv(timeout=20)) == 1 << 20


def test_both_sides_keep_the_same_streams_in_whatever_order_they_come(net: Any, wrap_lanes: Any) -> None:
    """Else each lets those go that the other keeps, and none is left."""
    came, may_join = threading.Event(), threading.Event()
    pair = net.pair(streams=2)

    def hold(lane: Any) -> Any:
        if not came.is_set():
            came.set()
            may_join.wait(20)
        return lane

    wrap_lanes(near=hold)
    core = pair.near.core
    core.want_streams(3)
    assert came.wait(20)
    core.want_streams(4)
    net.wait_until(lambda: len(core.lanes) == 3, "the second one, before the first")
    newest = max(core.lanes)
    core.want_streams(3)
    may_join.set()
    net.wait_until(lambda: core.total_lanes == 4 and len(core.lanes) == 3, "the first one to come, and one to go")
    assert newest not in core.lanes
    net.wait_until(lambda: set(pair.far.core.lanes) == set(core.lanes), "the server to have the same")


def test_none_goes_that_the_peer_sends_over(net: Any) -> None:
    payload = bytes(8 << 20)
    pair = net.pair(streams=3)
    pair.far.limit_rate(len(payload) / 4)
    ticket = pair.far.send(payload)
    net.wait_until(lambda: pair.near.core.engine.receiving, "something to come")
    pair.near.core.want_streams(1)
    assert len(pair.near.core.live_lanes_locked()) == 3
    pair.far.limit_rate(None)
    ticket.wait(20)
    assert pair.near.recv(timeout=20) == payload
    pair.near.core.want_streams(1)
    net.wait_until(lambda: len(pair.far.core.lanes) == 1, "two to go once nothing comes")


def test_who_says_how_many_streams_there_are_to_be_is_heard(net: Any) -> None:
    near = net.connect(net.server(), streams=None, transport__modes__datacenter_streams=2)
    assert near.metrics().streams_reason == "as many as the mode begins with"
    assert near.adjust_streams(3) == 3
    assert near.core._streams_range == Range(3, 3, 3)
    assert near.metrics().streams_reason == "as many as were asked for"


# ---- settings ----------------------------------------------------------------------------------


def test_nothing_is_paced_where_the_settings_say_so(net: Any) -> None:
    plugins = offering(steady=None)
    server = net.server(plugins=plugins)
    near = net.connect(
        server, plugins=plugins, congestion="steady", transport__amst__pacing_enabled=False, **USERSPACE
    )
    assert {backend for backend, _ in in_force(near)} <= {"kernel"}
    assert near.core._pacing is None


@pytest.mark.parametrize("paced", [True, False])
def test_nobody_looks_for_a_queue_where_the_settings_say_so(
    net: Any, monkeypatch: pytest.MonkeyPatch, paced: bool
) -> None:
    """A far path is guarded by default, also with as many streams as were asked for."""
    from amst_tcp.lane import TcpLane

    told = TcpLane.flow_sample

    def far_away(lane: TcpLane) -> FlowSample | None:
        sample = told(lane)
        return None if sample is None else replace(sample, rtt_s=2 * FAR_S, min_rtt_s=2 * FAR_S)

    monkeypatch.setattr(TcpLane, "flow_sample", far_away)
    server = net.server(transport__amst__pacing_enabled=paced)
    near = net.connect(server, transport__amst__pacing_enabled=paced)
    far = server.accept(5)
    net.wait_until(lambda: len(far.core.lanes) == 2, "both streams")
    for session in (near, far):
        assert (session.core._pacing is not None) == paced
        assert in_force(session) == {("kernel", None)}
