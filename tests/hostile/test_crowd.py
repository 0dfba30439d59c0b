"""Hundreds of strangers hang on the port of a server: what its clients do goes on as if there were none."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hostile_peer import settings_with

import amst_core
from amst_core.security.identity import find_token

pytestmark = [pytest.mark.needs_transport, pytest.mark.alone]

MIB = 1 << 20
MEMORY = 64 * MIB
RATE = 20e6
"""Bytes/s that the honest client sends: far below what it could."""

SERVER = """
import hashlib, sys
import amst_core
from amst_core.settings.load import load_settings

def serve(session):
    while True:
        digest = hashlib.sha256()
        while message := session.recv():
            digest.update(message)
        session.send(digest.digest())

settings = load_settings(environ={}, overrides={"limits.memory": sys.argv[1], "limits.unauthenticated": sys.argv[2]})
with amst_core.listen("127.0.0.1:0", settings=settings, on_session=serve) as server:
    print(server.address, flush=True)
    sys.stdin.read()
"""


@contextmanager
def running(*command: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A process that ends when its stdin does."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline().strip()
    assert line, process.stderr.read()
    return line


@pytest.mark.parametrize("unauthenticated", [64, 1000], ids=["more than there is room for", "room for all"])
def test_a_client_at_a_steady_rate_is_not_held_up(tmp_path: Path, unauthenticated: int) -> None:
    state = str(tmp_path / "state")
    with running("-c", SERVER, str(MEMORY), str(unauthenticated), AMST_STATE_DIR=state) as server:
        address = said(server)
        token = find_token(environ={"AMST_STATE_DIR": state})
        with amst_core.connect(address, settings=settings_with({}), token=token, streams=4) as session:
            payload = os.urandom(MIB)
            session.send(payload).wait(30)
            session.send(b"").wait(30)
            assert session.recv(timeout=30) == hashlib.sha256(payload).digest()
            before = resident(server.pid)
            crowd_program = str(Path(__file__).with_name("strangers.py"))
            with running(crowd_program, address, "--crowd", "300", "--rate", "50") as crowd:
                assert said(crowd) == "ready"
                tickets, digest, most = [], hashlib.sha256(), 0
                began = time.monotonic()
                for number in range(60):
                    message = number.to_bytes(8, "big") + payload[8:]
                    digest.update(message)
                    tickets.append(session.send(message))
                    most = max(most, resident(server.pid))
                    time.sleep(max(0.0, began + (number + 1) * MIB / RATE - time.monotonic()))
                session.send(b"")
                for ticket in tickets:
                    ticket.wait(30)
                assert session.recv(timeout=30) == digest.digest()
                assert most - before < MEMORY
                # and there is a place for one who comes now
                with amst_core.connect(address, settings=settings_with({}), token=token, streams=2) as late:
                    late.send(b"late").wait(30)
                    late.send(b"").wait(30)
                    assert late.recv(timeout=30) == hashlib.sha256(b"late").digest()
                assert crowd.stdin is not None
                crowd.stdin.close()
                assert int(said(crowd)) > 300
            metrics = session.metrics()
            assert metrics.lane_failures == 0
            assert metrics.active_streams == 4
        assert server.stdin is not None
        server.stdin.close()
        assert server.wait(30) == 0
        assert server.stderr is not None
        assert "unexpected" not in server.stderr.read()
