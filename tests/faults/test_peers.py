"""Peers that stop (SIGSTOP) and lanes that die all the time: waited for and replaced, until it takes too long."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest
from waiting import wait_until

from .conftest import MIB, Lab, Running, Watch, assert_arrived, kept, make_big, stop
from .proxy import DOWN, LANE, UP, Action, proxied

pytestmark = pytest.mark.needs_transport

SIZE = 16 * MIB
FINE = ("--set", "transport.amst.chunk_size_kb=256")
SHORT = ("--set", "limits.session_timeout=3s")
RATE = ("--bwlimit", "8MB/s")


@pytest.mark.parametrize("victim", ["client", "server"])
def test_a_peer_that_stops_for_two_seconds_is_waited_for(victim: str, lab: Lab, figures: Callable[[str], None]) -> None:
    source = make_big(lab.home / "big", SIZE)
    server = lab.serve(lab.home / "root", *FINE)
    target = server.root / "big"
    with Watch(source, target):
        copy = lab.cp(*FINE, *RATE, source, f"{server.url}/")
        wait_until(lambda: kept(source, target) > 2 * MIB, "some of it")
        stopped: Running = copy if victim == "client" else server
        stop(stopped)
        time.sleep(2)
        stopped.send(signal.SIGCONT)
        report = copy.succeeds()
    assert_arrived(source, target)
    figures(f"{victim} stopped for 2 s: missing {SIZE}, resumed 0, retransmitted {report['retransmitted_bytes']}")


def test_a_server_that_stops_for_longer_than_the_session_timeout(lab: Lab, figures: Callable[[str], None]) -> None:
    source = make_big(lab.home / "big", SIZE)
    server = lab.serve(lab.home / "root", *FINE, *SHORT)
    target = server.root / "big"
    with Watch(source, target):
        copy = lab.cp(*FINE, *SHORT, *RATE, source, f"{server.url}/")
        wait_until(lambda: kept(source, target) > 2 * MIB, "some of it")
        stop(server)
        failed = copy.fails(5, timeout_s=20)
        assert failed["error"]["kind"] in ("timeout", "broken") and failed["error"]["retryable"] is True
        assert "limits.session_timeout" in failed["error"]["message"]
        server.send(signal.SIGCONT)
        there = kept(source, target)
        report = lab.cp(*FINE, source, f"{server.url}/").succeeds()
    assert report["resumed_bytes"] >= there > 0
    assert_arrived(source, target)
    figures(f"server stopped for good: missing {SIZE - there}, resumed {report['resumed_bytes']}")


def test_a_client_that_stops_for_longer_than_the_session_timeout(lab: Lab) -> None:
    source = make_big(lab.home / "big", SIZE)
    server = lab.serve(lab.home / "root", "-v", *FINE, *SHORT)
    target = server.root / "big"
    with Watch(source, target):
        copy = lab.cp(*FINE, *SHORT, *RATE, source, f"{server.url}/")
        wait_until(lambda: kept(source, target) > 2 * MIB, "some of it")
        stop(copy)
        wait_until(lambda: "could not be reached for 3 s" in server.err, "the server to give it up", timeout_s=20)
        there = kept(source, target)
        assert not target.exists()
        report = lab.cp(*FINE, source, f"{server.url}/").succeeds()  # the server does not mind the stopped one
        copy.send(signal.SIGCONT)
        failed = copy.fails(5)
        assert failed["error"]["retryable"] is True
    assert report["resumed_bytes"] >= there > 0
    assert_arrived(source, target)


@pytest.mark.parametrize("way", [UP, DOWN])
def test_lanes_reset_every_200_ms_all_through(way: str, lab: Lab, figures: Callable[[str], None]) -> None:
    source = make_big(lab.home / "served" / "big", SIZE)
    target = lab.home / "target" / "big"
    target.parent.mkdir()
    server = lab.serve(target.parent if way == UP else source.parent, *FINE)
    resets = 0
    with proxied(server.address) as proxy, Watch(source, target):
        names = (source, f"{proxy.url}/") if way == UP else (f"{proxy.url}/big", target.parent)
        copy = lab.cp(*FINE, *RATE, "--streams", 4, *names)
        while copy.alive:
            proxy.treat(Action.STALL, LANE, way)  # so that there is something on the lane that dies
            time.sleep(0.05)
            resets += proxy.reset(LANE, 1)
            proxy.release()
            time.sleep(0.15)
        report = copy.succeeds()
        sent = sum(end - start for _, start, end in proxy.spans(way))
    assert resets >= 5
    assert_arrived(source, target)
    figures(
        f"a lane reset every 200 ms, {way}, {resets} in all: missing {SIZE}, sent {sent}, "
        f"retransmitted {report['retransmitted_bytes']}, lanes lost {report['lane_failures']}"
    )
