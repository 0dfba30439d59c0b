"""The fault matrix: every fault at every moment of a copy, up and down. docs/reliability.md shows its cells.

A cell holds the copy at its moment, does its fault, lets go, and looks how the command ends. Where it cannot go on by
itself, it must say so by the right exit code, and the same command must finish. The cells run several at a time.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from waiting import wait_until

from .conftest import (
    MIB,
    Copy,
    Lab,
    Serving,
    Watch,
    assert_arrived,
    kept,
    laboratory,
    make_big,
    stop,
)
from .proxy import CONTROL, DOWN, LANE, UP, Action, Proxy, proxied

pytestmark = pytest.mark.needs_transport

AT_ONCE: Final = 4
SIZE: Final = 8 * MIB
QUICK: Final = (
    "--set", "transport.amst.chunk_size_kb=128",
    "--set", "transport.amst.read_timeout=2s",
    "--set", "transport.amst.health_check_interval=500ms",
    "--set", "transport.amst.connect_timeout=4s",
    "--set", "limits.session_timeout=8s",
)  # fmt: skip
"""Settings with which silence is noticed within seconds."""

BEFORE_PROOF: Final = "before-proof"
AFTER_PROOF: Final = "after-proof"
FIRST: Final = "first-chunk"
MIDDLE: Final = "middle"
TAIL: Final = "tail"
ACK_PENDING: Final = "ack-pending"
RENAME: Final = "rename"
RENAMED: Final = "renamed"
MOMENTS: Final = (BEFORE_PROOF, AFTER_PROOF, FIRST, MIDDLE, TAIL, ACK_PENDING, RENAME, RENAMED)

KILL_CLIENT: Final = "kill-client"
KILL_SERVER: Final = "kill-server"
RESET_CONTROL: Final = "reset-control"
RESET_LANES: Final = "reset-all-lanes"
RESET_LANE: Final = "reset-one-lane"
DEAF_LANES: Final = "lanes-half-open"
DEAF_CONTROL: Final = "control-half-open"
STOP_CLIENT: Final = "stop-client"
STOP_SERVER: Final = "stop-server"
FAULTS: Final = (
    KILL_CLIENT, KILL_SERVER, RESET_CONTROL, RESET_LANES, RESET_LANE, DEAF_LANES, DEAF_CONTROL, STOP_CLIENT,
    STOP_SERVER,
)  # fmt: skip

BY_ITSELF: Final = 0
KILLED: Final = -signal.SIGKILL

STREAMS: Final = 4
STOPPED_S: Final = 1.0
SETTLED_S: Final = 0.1
"""When nothing passes for so long, what had passed was confirmed too."""


@dataclass(frozen=True, slots=True)
class Cell:
    fault: str
    moment: str
    way: str

    def __str__(self) -> str:
        return f"{self.fault}-{self.moment}-{self.way}"

    @property
    def back(self) -> str:
        return DOWN if self.way == UP else UP

    @property
    def exists(self) -> bool:
        """Before the proof there are no lanes to break, and no difference between up and down."""
        if self.moment == BEFORE_PROOF and "lane" in self.fault:
            return False
        if self.moment in (BEFORE_PROOF, AFTER_PROOF) and self.way == DOWN:
            return False
        return not (self.moment == RENAMED and "kill" not in self.fault)  # else it is as ack-pending

    @property
    def code(self) -> int:
        """How the command ends: 4 before the first byte was confirmed, 5 after it."""
        if self.fault == KILL_CLIENT:
            return KILLED
        if self.fault == KILL_SERVER:
            return 4 if self.moment in (BEFORE_PROOF, AFTER_PROOF, FIRST) else 5
        if self.moment == BEFORE_PROOF and self.fault in (RESET_CONTROL, DEAF_CONTROL):
            return 4  # there is no session to be taken up yet
        if self.moment == AFTER_PROOF and self.fault in (RESET_LANES, DEAF_LANES):
            return 4  # the first streams decide whether the server can be reached
        return BY_ITSELF


CELLS: Final = [c for f in FAULTS for m in MOMENTS for w in (UP, DOWN) if (c := Cell(f, m, w)).exists]


def play(cell: Cell, base: Path, shared: Serving) -> str:
    """What happened, in a line of figures. ``shared`` serves ``base``; cells that hurt their server have their own."""
    source, home = base / "source" / "big", base / str(cell)
    with laboratory(home, state=base / "state") as lab:
        here, there, hook = home / "here", home / "there", home / "hook"
        for directory in (here, there, hook):
            directory.mkdir()
        target = (there if cell.way == UP else here) / source.name
        hooked = {RENAME: ("before", hook), RENAMED: ("after", hook)}.get(cell.moment)
        server = shared
        if "server" in cell.fault or (hooked and cell.way == UP):
            server = lab.serve(base, *QUICK, hook=hooked if cell.way == UP else None)

        def copy(url: str, *, hook: tuple[str, Path] | None = None) -> Copy:
            names = (source, f"{url}/{cell}/there/") if cell.way == UP else (f"{url}/source/big", here)
            return lab.cp(*QUICK, "--streams", STREAMS, *names, hook=hook)

        with Watch(source, target), proxied(server.address) as proxy:
            prepare(cell, proxy)
            first = copy(proxy.url, hook=hooked if cell.way == DOWN else None)
            wait_until(lambda: reached(cell, proxy, target, hook) or not first.alive, f"the moment {cell.moment}")
            assert first.alive, first.err
            server = strike(cell, lab, server, first, proxy)
            proxy.release()
            (hook / "go").touch()
            if cell.code == BY_ITSELF:
                report = first.succeeds()
                missing = SIZE
            elif cell.code == KILLED:
                assert first.end() == KILLED
            else:
                failed = first.fails(cell.code)
                assert failed["error"]["kind"] in ("broken", "connect", "timeout", "closed"), failed
                assert ("goes on from there" in first.err) == (cell.code == 5), first.err
            if cell.code != BY_ITSELF:
                missing = SIZE - (had := kept(source, target))
                report = copy(proxy.url).succeeds()
                assert report["resumed_bytes"] >= had, (report, had)
        assert_arrived(source, target)
    return (
        f"{cell.fault} {cell.moment} {cell.way}: exit {cell.code}, missing {missing}, "
        f"resumed {report['resumed_bytes']}, retransmitted {report['retransmitted_bytes']}, "
        f"lanes lost {report['lane_failures']}"
    )


def prepare(cell: Cell, proxy: Proxy) -> None:
    """Have the copy wait for us at its moment."""
    match cell.moment:
        case "before-proof":
            proxy.treat(Action.STALL, CONTROL, DOWN, new=True)
        case "after-proof":
            proxy.treat(Action.STALL, LANE, UP, new=True)
        case "first-chunk":
            proxy.hold(cell.way, 1000)
        case "middle":
            proxy.hold(cell.way, SIZE // 2)
        case "tail":
            proxy.hold(cell.way, SIZE - 1000)
        case "ack-pending":
            proxy.hold(cell.way, SIZE - 1000)


def reached(cell: Cell, proxy: Proxy, target: Path, hook: Path) -> bool:
    match cell.moment:
        case "before-proof":
            return proxy.alive(CONTROL) > 0
        case "after-proof":
            return proxy.alive(LANE) == STREAMS
        case "ack-pending":
            if proxy.holding and proxy.quiet_s > SETTLED_S:  # what came before is acknowledged
                # the last bytes may pass now, but nobody hears that they have come
                proxy.treat(Action.STALL, CONTROL, cell.back)
                proxy.unhold()
            return target.exists()
        case "rename" | "renamed":
            return (hook / "reached").exists()
        case _:
            return proxy.holding and proxy.quiet_s > SETTLED_S


def strike(cell: Cell, lab: Lab, server: Serving, client: Copy, proxy: Proxy) -> Serving:
    """Do it; the server that runs afterwards."""
    match cell.fault:
        case "kill-client":
            client.kill()
        case "kill-server":
            server.kill()
            proxy.reset(LANE)  # what it had sent and the proxy still holds is not to come afterwards
            proxy.reset(CONTROL)
            return lab.again(server, *QUICK)
        case "reset-control":
            assert proxy.reset(CONTROL) == 1
        case "reset-all-lanes":
            assert proxy.reset(LANE) > 0
        case "reset-one-lane":
            assert proxy.reset(LANE, 1) == 1
        case "lanes-half-open":
            proxy.treat(Action.SWALLOW, LANE)
        case "control-half-open":
            proxy.treat(Action.SWALLOW, CONTROL)
        case "stop-client" | "stop-server":
            victim = client if cell.fault == STOP_CLIENT else server
            stop(victim)
            proxy.release()
            time.sleep(STOPPED_S)
            victim.send(signal.SIGCONT)
    return server


@pytest.fixture(scope="module")
def cells(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Cell, Future[str]]]:
    """The outcomes of all cells that this run is to report."""
    chosen = [
        item.callspec.params["cell"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == "test_a_fault_at_a_moment"
    ]
    base = tmp_path_factory.mktemp("cells")
    make_big(base / "source" / "big", SIZE)
    pool = ThreadPoolExecutor(AT_ONCE)
    with laboratory(base) as lab:
        server = lab.serve(base, *QUICK)
        try:
            yield {cell: pool.submit(play, cell, base, server) for cell in chosen}
        finally:
            pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_fault_at_a_moment(cell: Cell, cells: dict[Cell, Future[str]], figures: Callable[[str], None]) -> None:
    figures(cells[cell].result())
