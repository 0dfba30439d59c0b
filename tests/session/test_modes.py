"""The mode of a session: forced, released, found by the path, agreed on; nothing is lost while it changes."""

from __future__ import annotations

import logging
import os
import socket
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from amst_core.errors import ClosedError, DeadlineError, ProtocolError, RefusedError, UsageError
from amst_core.hookspecs import hookimpl
from amst_core.interfaces import Mode, ModeDecision, ModeDetector, PathSample
from amst_core.plugins import Plugins
from amst_core.wire.messages import Accept, Propose

pytestmark = pytest.mark.needs_transport

MIB = 1 << 20
KIB = 1 << 10
FOLLOWS: dict[str, Any] = {"transport__modes__auto_mode": True}
DATACENTER, INTERNET, HYBRID = Mode.DATACENTER, Mode.INTERNET, Mode.HYBRID


class Says(ModeDetector):
    """Says what it is told to say."""

    name = "says"

    def __init__(self, mode: Mode = DATACENTER) -> None:
        self.mode = mode
        self.samples: list[PathSample] = []

    def update(self, sample: PathSample, *, now: float) -> ModeDecision:
        self.samples.append(sample)
        return ModeDecision(self.mode, 2, f"it looks like {self.mode.value}")


class Makes:
    """A plugin that makes this detector, and keeps what it is told of changes."""

    def __init__(self, detector: ModeDetector) -> None:
        self._detector = detector
        self.told: list[tuple[Mode, Mode, str]] = []

    @hookimpl
    def amst_make_detector(self, name: str, options: object) -> ModeDetector | None:
        return self._detector if name == self._detector.name else None

    @hookimpl
    def amst_mode_changed(self, session_id: str, old: Mode, new: Mode, reason: str) -> None:
        self.told.append((old, new, reason))


def plugins_with(detector: ModeDetector, plugin: Makes | None = None) -> Plugins:
    plugins = Plugins()
    plugins.register(plugin or Makes(detector), "amst.mode", detector.name)
    return plugins


class Senders:
    """Threads that send messages of all sizes either way, and check what arrives, until stopped."""

    def __init__(self, pair: Any, spawn: Any, count: int = 4, *, both: bool = True) -> None:
        self._stop = threading.Event()
        self.moved = 0
        ways = [(pair.near, pair.far)] + ([(pair.far, pair.near)] if both else [])
        self._tasks = [
            spawn(work, source if work == self._send else sink, f"{way}.{number}", number)
            for way, (source, sink) in enumerate(ways)
            for number in range(count)
            for work in (self._send, self._receive)
        ]

    def _send(self, session: Any, channel: str, number: int) -> None:
        sizes = (100, 60 * KIB, 3 * MIB, 0, MIB)
        at = number
        while not self._stop.is_set():
            at += 1
            session.send(at.to_bytes(8) + os.urandom(sizes[at % len(sizes)]), channel=channel).wait(60)
        session.send(b"", channel=channel).wait(60)

    def _receive(self, session: Any, channel: str, number: int) -> None:
        at = number
        while data := session.recv(channel, timeout=60):
            at += 1
            assert int.from_bytes(data[:8]) == at
            self.moved += len(data)

    def stop(self) -> None:
        self._stop.set()
        for task in self._tasks:
            task.outcome()


def in_mode(net: Any, pair: Any, mode: Mode) -> None:
    net.wait_until(lambda: {end.mode.mode for end in pair.ends} == {mode}, f"both sides to be in {mode.value}")


def test_a_session_begins_in_the_mode_of_its_round_trip(net: Any) -> None:
    pair = net.pair()
    state = pair.near.mode
    assert (state.mode, state.switches, state.forced) == (DATACENTER, 0, None)
    assert state.reason.startswith("the round trip of ") and state.reason.endswith(" is not above 50ms")
    assert pair.far.mode.mode is DATACENTER and pair.far.mode.reason == "the client asks for it"


# ---- by somebody's word ------------------------------------------------------------------------------


@pytest.mark.parametrize("who", [0, 1], ids=["client", "server"])
def test_either_side_may_force_a_mode(net: Any, caplog: pytest.LogCaptureFixture, who: int) -> None:
    caplog.set_level(logging.INFO, "amst.session")
    pair = net.pair()
    asking, other = pair.ends[who], pair.ends[1 - who]
    asking.force_mode("internet")
    in_mode(net, pair, INTERNET)
    assert asking.mode.forced is INTERNET
    assert other.mode.forced is None
    net.wait_until(lambda: other.mode.forced_by_peer, "the other one to know")
    assert asking.mode.switches == other.mode.switches == 1
    assert asking.metrics().mode == "internet" and asking.metrics().switches == 1

    def told() -> list[Any]:
        return [record for record in caplog.records if record.getMessage() == "mode changed"]

    net.wait_until(lambda: len(told()) == 2, "both to have said so")
    lines = told()
    assert [(line.old_mode, line.new_mode) for line in lines] == [("datacenter", "internet")] * 2
    assert all("asked for" in line.why for line in lines)
    asking.force_mode("datacenter")
    in_mode(net, pair, DATACENTER)


def test_a_mode_that_is_forced_from_the_start(net: Any) -> None:
    server = net.server()
    near = net.connect(server, mode="internet", streams=None)
    far = server.accept(20)
    assert near.mode.mode is far.mode.mode is INTERNET
    assert (near.mode.reason, near.mode.forced) == ("asked for", INTERNET)
    assert near.core.engine.chunk_size <= 512 * KIB
    net.wait_until(lambda: near.metrics().active_streams == 8, "the streams of the internet profile")


def test_settings_force_a_mode_too(net: Any) -> None:
    near = net.connect(net.server(), transport__modes__mode="hybrid")
    assert (near.mode.mode, near.mode.forced) == (HYBRID, HYBRID)


def test_the_servers_word_comes_first(net: Any) -> None:
    pair = net.pair(server={"transport__modes__mode": "internet"}, client={"mode": "datacenter"})
    in_mode(net, pair, INTERNET)
    assert pair.near.mode.forced_by_peer
    with pytest.raises(RefusedError, match="keeps to internet, which is forced there"):
        pair.near.force_mode("hybrid")
    assert pair.near.mode.mode is INTERNET
    pair.far.release_mode()
    in_mode(net, pair, HYBRID)  # what the client has asked for last


def test_the_server_of_a_program_may_be_told_at_its_start(net: Any) -> None:
    pair = net.pair(server={"mode": "internet"})
    in_mode(net, pair, INTERNET)
    assert pair.far.mode.forced is INTERNET


def test_a_mode_that_there_is_not(net: Any) -> None:
    pair = net.pair()
    with pytest.raises(UsageError, match="no mode 'fast'; there are datacenter, internet, hybrid"):
        pair.near.force_mode("fast")
    with pytest.raises(UsageError, match="no mode 'fast'"):
        net.connect(pair.server, mode="fast")
    with pytest.raises(UsageError, match="no mode 'fast'"):
        net.server(mode="fast")


def test_what_a_mode_means_for_the_lanes(net: Any) -> None:
    pair = net.pair(streams=4)
    pair.near.force_mode("internet")
    in_mode(net, pair, INTERNET)
    for end in pair.ends:
        assert end.core.engine.chunk_size <= 512 * KIB
        assert {stream.congestion.asked for stream in end.streams()} == {"auto"}
        assert all("the mode is internet" in stream.congestion.reason for stream in end.streams())
    assert len(pair.near.core.lanes) == 4, "so many were asked for"
    pair.near.force_mode("datacenter")
    in_mode(net, pair, DATACENTER)
    assert all("the round trip is below 10 ms" in s.congestion.reason for end in pair.ends for s in end.streams())
    assert pair.near.core.engine.chunk_size >= MIB


def test_streams_follow_the_mode_while_something_is_sent(net: Any, spawn: Any) -> None:
    server = net.server()
    near = net.connect(server, streams=None)
    pair = SimpleNamespace(near=near, far=server.accept(20))
    net.wait_until(lambda: near.metrics().active_streams == 16, "the streams of the datacenter profile")
    senders = Senders(pair, spawn, both=False)
    near.force_mode("internet")
    net.wait_until(lambda: 4 <= near.metrics().active_streams <= 8, "fewer streams")
    near.force_mode("datacenter")
    net.wait_until(lambda: near.metrics().active_streams > 8, "more streams again")
    senders.stop()
    assert near.metrics().lane_failures == 0


def test_a_hybrid_session_keeps_lanes_for_what_is_short(net: Any, spawn: Any) -> None:
    pair = net.pair(streams=6)
    pair.near.force_mode("hybrid")
    in_mode(net, pair, HYBRID)
    for end in pair.ends:
        oldest = sorted(end.core.lanes)[:2]
        assert sorted(end.core.engine._express) == oldest
    near = pair.near.core
    for number in range(20):
        pair.near.send(os.urandom(8 * MIB))
        pair.near.send(os.urandom(4 * KIB), channel="short")
        assert len(pair.far.recv("short", timeout=20)) == 4 * KIB
        assert len(pair.far.recv(timeout=20)) == 8 * MIB, number
    express = [near.lanes[id].bytes_sent for id in sorted(near.lanes)[:2]]
    assert sum(express) == 20 * 4 * KIB
    near.lanes[oldest[0]].lane.abort()
    net.wait_until(lambda: len(near.lanes) == 6 and oldest[0] not in near.lanes, "another lane in its place")
    assert sorted(near.engine._express) == sorted(near.lanes)[:2]
    pair.near.force_mode("datacenter")
    in_mode(net, pair, DATACENTER)
    assert not near.engine._express


def test_with_two_lanes_each_has_one_and_one_lane_has_all(net: Any) -> None:
    two = net.pair(streams=2)
    two.near.force_mode("hybrid")
    assert len(two.near.core.engine._express) == 1
    one = net.pair(streams=1)
    one.near.force_mode("hybrid")
    assert not one.near.core.engine._express
    one.near.send(b"short").wait(20)
    one.near.send(os.urandom(2 * MIB)).wait(20)


def test_fewer_streams_leave_none_without_a_way(net: Any) -> None:
    """The last stream of a hybrid session carries everything."""
    pair = net.pair(streams=2)
    pair.near.force_mode("hybrid")
    assert pair.near.adjust_streams(1) == 1
    assert not pair.near.core.engine._express
    pair.near.send(os.urandom(2 * MIB)).wait(20)
    assert pair.near.adjust_streams(6) == 6
    assert len(pair.near.core.engine._express) == 2


# ---- under load --------------------------------------------------------------------------------------


@pytest.mark.parametrize("plaintext", [False, True], ids=["encrypted", "plaintext"])
def test_200_changes_in_a_row_under_load(net: Any, spawn: Any, plaintext: bool) -> None:
    pair = net.pair(streams=6, plaintext=plaintext)
    senders = Senders(pair, spawn)
    modes = (INTERNET, HYBRID, DATACENTER)
    for at in range(200):
        pair.near.force_mode(modes[at % 3])
    assert pair.near.mode.switches == 200
    senders.stop()
    in_mode(net, pair, modes[199 % 3])
    assert pair.near.metrics().lane_failures == 0


def test_changes_by_both_sides_at_once_end_in_one_mode(net: Any, spawn: Any) -> None:
    pair = net.pair(streams=3)
    senders = Senders(pair, spawn, 2)

    def change(end: Any, modes: tuple[Mode, ...]) -> None:
        for at in range(40):
            try:
                end.force_mode(modes[at % len(modes)])
            except RefusedError:
                assert end is pair.near
            end.release_mode()

    tasks = [spawn(change, pair.near, (INTERNET, DATACENTER)), spawn(change, pair.far, (HYBRID, DATACENTER))]
    for task in tasks:
        task.outcome()
    senders.stop()
    pair.near.force_mode("internet")
    in_mode(net, pair, INTERNET)


def test_a_change_with_half_of_the_lanes_dead(net: Any, spawn: Any) -> None:
    pair = net.pair(streams=8)
    senders = Senders(pair, spawn)
    for mode in (INTERNET, HYBRID, DATACENTER, HYBRID, INTERNET):
        for worker in list(pair.near.core.lanes.values())[::2]:
            worker.lane.abort()
        pair.near.force_mode(mode)
    senders.stop()
    in_mode(net, pair, INTERNET)
    net.wait_until(lambda: len(pair.near.core.lanes) == 8, "all streams again")


def test_a_change_without_a_control_connection_comes_with_the_next_one(net: Any, spawn: Any) -> None:
    pair = net.pair(streams=3)
    senders = Senders(pair, spawn, 2)
    pair.near._loop._channel._sock.shutdown(socket.SHUT_RDWR)
    pair.near.force_mode("internet")
    in_mode(net, pair, INTERNET)
    senders.stop()


def test_a_change_while_closing(net: Any, spawn: Any) -> None:
    for _ in range(10):
        pair = net.pair(streams=3)
        sent = [pair.near.send(os.urandom(MIB)) for _ in range(8)]
        receiving = spawn(lambda far: [len(far.recv(timeout=20)) for _ in range(8)], pair.far)

        def change(near: Any) -> None:
            for mode in (INTERNET, HYBRID, DATACENTER) * 20:
                near.force_mode(mode)

        changing = spawn(change, pair.near)
        pair.near.close(20)
        error = changing.error()
        assert error is None or isinstance(error, ClosedError)
        assert [ticket.done for ticket in sent] == [True] * 8
        assert receiving.outcome() == [MIB] * 8


def test_a_peer_that_does_not_answer(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = net.pair()
    monkeypatch.setattr(pair.far._modes, "proposed", lambda message: None)
    with pytest.raises(DeadlineError, match=r"has not answered the change to internet within 0\.2 s"):
        pair.near.force_mode("internet", timeout=0.2)
    assert pair.near.mode.mode is DATACENTER


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (Propose(1, "warp", False, 1, 1, 1, ""), "mode 'warp' is unknown"),
        (Propose(0, "internet", False, 1, 1, 1, ""), "PROPOSE of epoch 0 after 0"),
        (Propose(1, "internet", False, 0, 0, 0, ""), "PROPOSE of 0 streams"),
        (Propose(1, "internet", False, 4, 8, 16, ""), "PROPOSE of 4 streams, within 8 and 16"),
        (Accept(1, "internet", False, ""), "ACCEPT of epoch 1, which was not proposed"),
    ],
    ids=["mode", "epoch", "streams", "range", "accept"],
)
def test_what_a_client_must_not_say(net: Any, message: Any, why: str) -> None:
    pair = net.pair()
    pair.near.core.tell(message)
    assert pair.far.wait_closed(20)
    assert isinstance(pair.far.error, ProtocolError) and why in str(pair.far.error)


def test_what_a_server_must_not_say(net: Any) -> None:
    pair = net.pair()
    pair.far.core.tell(Accept(1, "internet", False, ""))
    assert pair.near.wait_closed(20)
    assert isinstance(pair.near.error, ProtocolError)


# ---- by the path -------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", [0, 1], ids=["client", "server"])
def test_who_sends_is_who_finds_the_mode(net: Any, spawn: Any, who: int) -> None:
    says = Says()
    plugin = Makes(says)
    side = {**FOLLOWS, "plugins": plugins_with(says, plugin), "transport__modes__mode_check_interval": "1s"}
    pair = net.pair(**{"client": FOLLOWS, "server": FOLLOWS, ("client", "server")[who]: side})
    sender, receiver = pair.ends[who], pair.ends[1 - who]
    stop = threading.Event()

    def send() -> None:
        while not stop.is_set():
            sender.send(os.urandom(MIB)).wait(20)
        sender.send(b"")

    def receive() -> None:
        while receiver.recv(timeout=20):
            pass

    tasks = [spawn(send), spawn(receive)]
    says.mode = INTERNET
    in_mode(net, pair, INTERNET)
    assert "it looks like internet" in pair.near.mode.reason
    assert pair.ends[who].mode.tier == 2
    net.wait_until(lambda: plugin.told, "observers to be told")
    assert plugin.told[0][:2] == (DATACENTER, INTERNET) and "it looks like internet" in plugin.told[0][2]
    assert any(sample.latency_s is not None for sample in says.samples)
    says.mode = HYBRID
    in_mode(net, pair, HYBRID)
    pair.near.force_mode("datacenter")
    in_mode(net, pair, DATACENTER)
    seen = len(says.samples)
    net.wait_until(lambda: len(says.samples) > seen + 4, "two checks")
    assert pair.near.mode.mode is DATACENTER, "a forced mode stays"
    pair.near.release_mode()
    in_mode(net, pair, HYBRID)
    stop.set()
    for task in tasks:
        task.outcome()


def test_where_the_settings_say_so_the_mode_stays(net: Any) -> None:
    says = Says(INTERNET)
    near = net.connect(net.server(), plugins=plugins_with(says), transport__modes__auto_mode=False)
    assert near._modes._detector is None
    assert not says.samples
    near.force_mode("internet")
    assert near.mode.mode is INTERNET


class Breaks(Says):
    name = "breaks"

    def update(self, sample: PathSample, *, now: float) -> ModeDecision:
        super().update(sample, now=now)
        raise ZeroDivisionError("no path")


class Mumbles(Says):
    name = "mumbles"

    def update(self, sample: PathSample, *, now: float) -> ModeDecision:
        super().update(sample, now=now)
        return "internet"  # type: ignore[return-value]


@pytest.mark.parametrize("detector", [Breaks, Mumbles])
def test_a_detector_that_fails_is_replaced_by_the_cores_own(
    net: Any, caplog: pytest.LogCaptureFixture, detector: type[Says]
) -> None:
    one = detector(INTERNET)
    near = net.connect(net.server(), plugins=plugins_with(one), **FOLLOWS)
    net.wait_until(lambda: near._modes._detector.name == "threshold", "the core's own")
    assert len(one.samples) == 1
    assert f"mode detector {one.name} failed; the core's own decides" in caplog.text
    assert near.error is None


def test_several_detectors_must_be_chosen_from(net: Any) -> None:
    plugins = plugins_with(Says(INTERNET))
    plugins.register(Makes(Breaks()), "amst.mode", "breaks")
    with pytest.raises(UsageError, match=r"several mode detectors are installed \(breaks, says\)"):
        net.server(plugins=plugins, **FOLLOWS)
    server = net.server(plugins=plugins, transport__modes__detector="threshold", **FOLLOWS)
    near = net.connect(server, **FOLLOWS)
    assert near._modes._detector.name == "threshold"


def test_a_detector_that_is_not_installed_is_a_warning(net: Any, caplog: pytest.LogCaptureFixture) -> None:
    near = net.connect(net.server(), transport__modes__detector="oracle", **FOLLOWS)
    assert "no installed plugin offers mode detector 'oracle'" in caplog.text
    assert near._modes._detector.name == "threshold"
