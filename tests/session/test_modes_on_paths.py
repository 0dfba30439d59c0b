"""The mode follows an emulated path that becomes another while twenty senders and a file use it; nothing is lost."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path as FilePath
from typing import Any

import pytest
from waiting import Task, wait_until

import amst_core
from amst_core.interfaces import Mode
from amst_core.settings.load import load_settings
from amst_core.testing.netlab import Lab, Path, missing

pytestmark = [pytest.mark.needs_transport, pytest.mark.alone]

MIB = 1 << 20
NEAR: dict[str, Any] = {"rate": "240Mbit/s", "rtt": "2ms"}
FAR: dict[str, Any] = {"rate": "60Mbit/s", "rtt": "80ms"}
SENDERS = 20

# the emulator takes its part of two cores: rates are a tenth of a datacenter's, and so is what counts as one
SETTINGS = load_settings(environ={}, overrides={"transport.modes.datacenter_bandwidth": "120Mbit/s"})


class Numbered:
    """Messages of one channel, each with its number, until stopped; what arrives is checked against the next one."""

    def __init__(self, near: Any, far: Any, channel: str) -> None:
        self._near, self._far, self._channel = near, far, channel
        self._stop = threading.Event()
        self.arrived = 0
        self._body = os.urandom(48 << 10)
        self._tasks = [Task(self._send), Task(self._receive)]

    def _send(self) -> int:
        number = 0
        while not self._stop.is_set():
            self._near.send(number.to_bytes(8) + self._body, channel=self._channel).wait(60)
            number += 1
        self._near.send(b"", channel=self._channel).wait(60)
        return number

    def _receive(self) -> int:
        while data := self._far.recv(self._channel, timeout=60):
            assert data[:8] == self.arrived.to_bytes(8) and data[8:] == self._body
            self.arrived += 1
        return self.arrived

    def stop(self) -> None:
        self._stop.set()

    def check(self) -> None:
        sent, arrived = (task.outcome() for task in self._tasks)
        assert sent == arrived > 0


@pytest.fixture
def lab() -> Any:
    if (reason := missing()) is not None:
        assert os.environ.get("CI") != "true", f"CI must run this: {reason}"
        pytest.skip(reason)
    with Lab(Path(**NEAR, buffer="1MiB")) as place:
        yield place


def test_a_path_that_becomes_another_kind_and_back(lab: Any, tmp_path: FilePath) -> None:
    here, there = lab.hosts
    root = tmp_path / "root"
    root.mkdir()
    source = tmp_path / "file"
    source.write_bytes(os.urandom(8 * MIB))
    with there.enter():
        server = amst_core.listen("[::]:9000", root=root, settings=SETTINGS, state_dir=tmp_path / "state")
    stop = threading.Event()

    def copy(near: Any) -> int:
        copies = 0
        while not stop.is_set():
            near.send_file(source, f"copy{copies % 3}")
            copies += 1
        return copies

    with server:
        with here.enter():
            near = amst_core.connect(f"{there.address}:9000", settings=SETTINGS, token=server.token)
        with near:
            far = server.accept(20)
            assert near.mode.mode is Mode.DATACENTER
            senders = [Numbered(near, far, f"channel {number}") for number in range(SENDERS)]
            copying = Task(copy, near)
            wait_until(lambda: all(sender.arrived > 10 for sender in senders), "all senders to be at work")
            lab.link.set(**FAR)
            wait_until(lambda: near.mode.mode is Mode.INTERNET, "internet")
            assert "80" in near.mode.reason or "carries" in near.mode.reason
            wait_until(lambda: far.mode.mode is Mode.INTERNET, "the server to know")
            wait_until(lambda: near.metrics().active_streams <= 16, "the streams of the profile")
            seen = [sender.arrived for sender in senders]
            wait_until(
                lambda: all(sender.arrived > before + 5 for sender, before in zip(senders, seen, strict=True)),
                "all senders to go on",
            )
            lab.link.set(**NEAR)
            wait_until(lambda: near.mode.mode is Mode.DATACENTER, "datacenter")
            stop.set()
            for sender in senders:
                sender.stop()
            for sender in senders:
                sender.check()
            copies = copying.outcome()
            assert copies > 0
            assert 2 <= near.mode.switches <= 3, "by way of hybrid, perhaps, while the round trip becomes longer"
            assert near.metrics().lane_failures == 0
            expected = hashlib.sha256(source.read_bytes()).digest()
            for name in {f"copy{number % 3}" for number in range(copies)}:
                assert hashlib.sha256((root / name).read_bytes()).digest() == expected
