"""Sessions whose lanes lie in memory: no plugin is installed for it, and every fault strikes where the test says."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from amst_core.errors import BrokenError, ConnectError
from amst_core.hookspecs import hookimpl
from amst_core.interfaces import Transport
from amst_core.plugins import Plugins
from amst_core.testing import (
    Cut,
    Delay,
    Direction,
    End,
    Fail,
    Fault,
    Flip,
    MemoryNetwork,
    MemoryTransport,
    Stall,
    faulty,
)
from amst_core.wire.frames import FrameKind

MIB = 1 << 20


def is_data(header: bytes) -> bool:
    return header[1] == FrameKind.DATA


class Faults:
    """The plugin of one side: lanes in memory, with faults in the first ones of them."""

    def __init__(self, network: MemoryNetwork, faults: list[list[Fault]]) -> None:
        self._network, self._faults = network, faults

    @hookimpl
    def amst_make_transport(self, name: str, options: Mapping[str, object]) -> Transport:
        return faulty(
            MemoryTransport(self._network), lambda number: self._faults[number] if number < len(self._faults) else []
        )


def plugins(plugin: object) -> Plugins:
    made = Plugins()
    made.register(plugin, "amst.transport", "memory")
    return made


def test_a_tree_is_copied_with_the_core_alone(net: Any, tmp_path: Path) -> None:
    network = MemoryNetwork()
    (tmp_path / "root").mkdir()
    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    files = {"large": os.urandom(9 * MIB + 1), "below/small": b"abc", "below/empty": b""}
    for name, data in files.items():
        (source / name).write_bytes(data)
    server = net.server(root=tmp_path / "root", plugins=plugins(network))
    session = net.connect(server, streams=3, plugins=plugins(network), transport="memory")
    session.send_file(source, "copy")
    session.recv_file("copy", tmp_path / "back")
    for name, data in files.items():
        assert (tmp_path / "root/copy" / name).read_bytes() == (tmp_path / "back" / name).read_bytes() == data
    assert session.report.transport == "memory"
    assert session.metrics().transport_type == "memory"
    assert {stream.transport for stream in session.metrics().streams} == {"memory"}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("plaintext", [False, True], ids=["encrypted", "plaintext"])
def test_everything_is_delivered_exactly_once_over_lanes_with_faults(net: Any, spawn: Any, plaintext: bool) -> None:
    def data(kind: type[Fault], **where: Any) -> Fault:
        return kind(matching=is_data, **where)

    # the first lanes at the client, then those that take their places at the server: each kind at several of them, for
    # one that is joined to a lane with a fault of the client's may end before its own comes
    near = [
        [data(Cut, after_frames=2, into=20_000), data(Cut, direction=Direction.RECEIVING, after_frames=2)],
        [data(End, after_frames=1)],
        [data(Flip, after_frames=1, into=700, bit=3)],
        [data(Stall, after_frames=1, into=5000)],
        [data(Fail, after_frames=1, error=BrokenError("planned"))],
        [data(Delay, seconds=0.002), data(Cut, after_frames=4)],
        [data(End, into=30_000)],
    ]
    ending: list[Fault] = [data(End, direction=Direction.RECEIVING, after_frames=2) for _ in range(3)]
    cutting: list[Fault] = [data(Cut, after_frames=1, into=40) for _ in range(3)]
    far: list[list[Fault]] = [[] for _ in near]
    for pair in zip(ending, cutting, strict=True):
        far += [[fault] for fault in pair]
    faults = [*near, ending, cutting]
    network = MemoryNetwork()
    quick = {"transport__amst__read_timeout": "1s"}  # what stalls inside a frame is given up after it
    server = net.server(plugins=plugins(Faults(network, far)), **quick)
    session = net.connect(
        server, streams=4, plugins=plugins(Faults(network, near)), transport="memory", plaintext=plaintext, **quick
    )
    ends = {session: server.accept(20)}
    ends[ends[session]] = session
    randomness = random.Random(7)
    total = dict.fromkeys(ends, 0)
    struck = [False] * len(faults)
    until = time.monotonic() + 60
    while not all(struck):
        assert time.monotonic() < until, f"lanes without their faults: {struck}"
        sent = {
            (end, channel): [randomness.randbytes(randomness.randrange(1, 2 * MIB)) for _ in range(6)]
            for end in ends
            for channel in ("a", "b")
        }
        receiving = {
            (end, channel): spawn(lambda at=ends[end], on=channel: [bytes(at.recv(on, timeout=30)) for _ in range(6)])
            for end, channel in sent
        }
        tickets = [end.send(message, channel=channel) for (end, channel), some in sent.items() for message in some]
        for key, task in receiving.items():
            assert task.outcome(60) == sent[key]
            total[key[0]] += sum(map(len, sent[key]))
        for ticket in tickets:
            ticket.wait(30)
        struck = [any(fault.struck.is_set() for fault in some) for some in faults]
    for end, peer in ends.items():
        assert peer.core.engine.bytes_verified == total[end], "nothing was counted twice"
        assert end.error is None
        net.wait_until(lambda end=end: end.metrics().active_streams == 4, "every stream to be back")
    # the slow one may live on
    net.wait_until(lambda: session.metrics().lane_failures >= len(faults) - 1, "all lanes with faults to be given up")
    assert session.metrics().retransmitted_bytes > 0


def test_two_networks_never_meet(net: Any) -> None:
    server = net.server(plugins=plugins(MemoryNetwork()))
    with pytest.raises(ConnectError, match="on the same MemoryNetwork"):
        net.connect(server, plugins=plugins(MemoryNetwork()), transport="memory")


def test_a_server_that_cannot_listen_closes_its_transports(net: Any) -> None:
    addresses: list[str] = []

    class Noted(MemoryNetwork):
        def listen(self, deliver: Any) -> str:
            addresses.append(super().listen(deliver))
            return addresses[-1]

    network = Noted()
    first = net.server(plugins=plugins(MemoryNetwork()))
    with pytest.raises(ConnectError):
        net.server(address=first.address, plugins=plugins(network))
    with pytest.raises(ConnectError, match="nobody listens there"):
        network.listener(addresses[0], 0.1)
