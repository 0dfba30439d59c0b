"""The service in examples/ as its users run it: two processes, a hundred transfers at once, a stop by signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs_transport

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/asyncio_service.py"


def test_the_service_answers_a_hundred_transfers_at_once_and_stops_in_good_order(tmp_path: Path) -> None:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("AMST_")}
    environ["AMST_STATE_DIR"] = str(tmp_path)
    command = [sys.executable, "-W", "error", str(EXAMPLE)]
    service = subprocess.Popen(
        [*command, "serve", "127.0.0.1:0"], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert service.stdout is not None
        address = service.stdout.readline().removeprefix("listening on ").strip()
        done = subprocess.run(
            [*command, "drive", address, "--size", "100000"],
            env=environ, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("100 of 100 digests are right: 100 messages of 100000 bytes at once in ")
        assert done.stderr == ""
        service.send_signal(signal.SIGTERM)
        out, err = service.communicate(timeout=60)
        assert (service.returncode, out, err) == (0, "stopped\n", "")
    finally:
        service.kill()
        service.communicate()
