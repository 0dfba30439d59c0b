"""Packets that get lost without a word, in network namespaces: some connections, all of them, for a while, for ever."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import pytest
from waiting import wait_until

from .conftest import (
    MIB,
    Copy,
    Lab,
    Play,
    Serving,
    Watch,
    ahead,
    assert_arrived,
    kept,
    laboratory,
    make_big,
)  # fmt: skip
from .netns import SERVER_ADDRESS, Pair, namespaces, of_ports, require_namespaces

pytestmark = pytest.mark.needs_transport

STREAMS = 4
SIZE = 24 * MIB
QUICK = (
    "--set", "transport.amst.chunk_size_kb=256",
    "--set", "transport.amst.health_check_interval=1s",
    "--set", "limits.session_timeout=6s",
)  # fmt: skip
NEW = "tcp flags & (syn|ack) == syn"
EVERYTHING = "meta l4proto tcp"


@pytest.fixture
def pair() -> Iterator[Pair]:
    require_namespaces()
    with namespaces() as made:
        yield made


@dataclass
class Scene:
    """A copy under way between two namespaces."""

    lab: Lab
    pair: Pair
    source: Path
    target: Path
    server: Serving
    options: tuple[str, ...]
    copy: Copy

    @property
    def port(self) -> int:
        return int(self.server.address.rpartition(":")[2])

    def again(self, *options: str) -> Copy:
        return start(self.lab, self.pair, self.source, self.server, *self.options, *options)

    def ports(self) -> tuple[int, list[int]]:
        """The client's ports: of its control connection, and of its lanes."""

        def found() -> list[int]:
            assert self.copy.alive, self.copy.err
            return self.pair.connections(self.copy.process.pid, self.port)

        wait_until(lambda: len(found()) == STREAMS + 1, "all connections")
        control, *lanes = found()
        return control, lanes


def start(lab: Lab, pair: Pair, source: Path, server: Serving, *options: str) -> Copy:
    url = f"amst://{SERVER_ADDRESS}:{server.address.rpartition(':')[2]}/"
    return lab.within(*pair.at_client).cp("--streams", STREAMS, *options, source, url)


def under_way(lab: Lab, pair: Pair, *options: str, rate: str = "4MB/s", name: str = "big") -> Scene:
    """A copy that has sent a part of its file."""
    source = make_big(lab.home / name, SIZE)
    server = lab.within(*pair.at_server).serve(lab.home / f"root-{name}", *options, listen=f"{SERVER_ADDRESS}:0")
    copy = start(lab, pair, source, server, *options, "--bwlimit", rate)
    scene = Scene(lab, pair, source, server.root / name, server, options, copy)
    wait_until(lambda: kept(source, scene.target) > MIB or not copy.alive, "some to arrive")
    assert copy.alive, copy.err
    return scene


def note(figures: Callable[[str], None], what: str, report: dict[str, object], missing: int) -> None:
    figures(
        f"{what}: missing {missing}, resumed {report['resumed_bytes']}, "
        f"retransmitted {report['retransmitted_bytes']}, lanes lost {report['lane_failures']}"
    )


@pytest.mark.parametrize("what", ["all", "lanes", "control"])
def test_a_copy_survives_a_path_that_is_silent_for_a_while(
    what: str, lab: Lab, pair: Pair, figures: Callable[[str], None]
) -> None:
    scene = under_way(lab, pair, *QUICK)
    control, lanes = scene.ports()
    with Watch(scene.source, scene.target):
        pair.drop(*{"all": (EVERYTHING,), "lanes": of_ports(*lanes), "control": of_ports(control)}[what])
        time.sleep(3.5 if what == "all" else 2.0)
        pair.restore()
        report = scene.copy.succeeds()
    assert_arrived(scene.source, scene.target)
    note(figures, f"packets of {what} lost for a while", report, SIZE)


@pytest.mark.parametrize("what", ["lanes", "control"])
def test_connections_that_are_dead_for_ever_are_replaced(
    what: str, lab: Lab, pair: Pair, figures: Callable[[str], None]
) -> None:
    scene = under_way(lab, pair, *QUICK)
    control, lanes = scene.ports()
    with Watch(scene.source, scene.target):
        pair.drop(*of_ports(*(lanes if what == "lanes" else [control])))
        report = scene.copy.succeeds()
    if what == "lanes":
        assert report["lane_failures"] == STREAMS
    else:
        assert "control connection to" in scene.copy.err and "is back" in scene.copy.err
    assert_arrived(scene.source, scene.target)
    note(figures, f"packets of {what} lost for ever", report, SIZE)


def test_a_network_that_is_lost_for_good_ends_the_copy_and_when_it_is_back_the_same_command_goes_on(
    lab: Lab, pair: Pair, figures: Callable[[str], None]
) -> None:
    scene = under_way(lab, pair, *QUICK)
    with Watch(scene.source, scene.target):
        pair.drop(EVERYTHING)
        failed = scene.copy.fails(5, timeout_s=30)
        assert failed["error"]["kind"] in ("timeout", "broken") and failed["error"]["retryable"] is True
        assert "goes on from there" in scene.copy.err
        there = kept(scene.source, scene.target)
        pair.restore()
        report = scene.again().succeeds()
    assert report["resumed_bytes"] >= there > 0
    assert_arrived(scene.source, scene.target)
    note(figures, "network lost for good, then the same command", report, SIZE - there)


def test_lanes_killed_every_200_ms_all_through(lab: Lab, pair: Pair, figures: Callable[[str], None]) -> None:
    scene = under_way(lab, pair, *QUICK, rate="8MB/s")
    killed = 0
    with Watch(scene.source, scene.target):
        while scene.copy.alive:
            lanes = pair.connections(scene.copy.process.pid, scene.port)[1:]
            if lanes and scene.copy.alive:
                pair.kill_connections(lanes[killed % len(lanes)])
                killed += 1
            time.sleep(0.2)
        report = scene.copy.succeeds()
    assert killed >= 8 and report["lane_failures"] >= killed // 2
    assert_arrived(scene.source, scene.target)
    note(figures, f"a lane killed every 200 ms (ss -K), {killed} in all", report, SIZE)


CUTS_S = (1, 10, 50, 70)


def play_cuts(home: Path) -> list[str]:
    """At the default settings: 60 s. Established lanes go on meanwhile; new connections are lost as well."""
    require_namespaces()
    lines: list[str] = []
    with namespaces() as pair, laboratory(home) as lab:
        scenes = {cut: under_way(lab, pair, rate="1MB/s", name=f"cut{cut}") for cut in CUTS_S}
        rules = {}
        for cut, scene in scenes.items():
            control, _ = scene.ports()
            rules[cut] = [*of_ports(control), *[f"tcp {way} {scene.port} {NEW}" for way in ("dport", "sport")]]
        began = time.monotonic()
        cut_off = set(CUTS_S)
        pair.drop(*[rule for cut in CUTS_S for rule in rules[cut]])
        for cut in CUTS_S:
            time.sleep(max(0.0, began + cut - time.monotonic()))
            cut_off.discard(cut)
            pair.drop(*[rule for other in cut_off for rule in rules[other]])
        for cut, scene in scenes.items():
            missing = SIZE
            if cut < 60:
                report = scene.copy.succeeds()
            else:
                failed = scene.copy.fails(5, "timeout")
                assert "limits.session_timeout" in failed["error"]["message"]
                missing = SIZE - kept(scene.source, scene.target)
                report = scene.again().succeeds()
                assert report["resumed_bytes"] >= SIZE - missing
            assert_arrived(scene.source, scene.target)
            note(lines.append, f"control channel cut for {cut} s", report, missing)
    return lines


@ahead(play_cuts)
def test_the_control_channel_may_be_away_for_less_than_the_session_timeout(
    outcomes: dict[Play, Future[list[str]]], figures: Callable[[str], None]
) -> None:
    for line in outcomes[play_cuts].result():
        figures(line)
