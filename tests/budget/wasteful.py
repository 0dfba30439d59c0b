"""Runs amst as ``python -m amst_core`` does, but copies each chunk once more than it must before it is sent."""

from __future__ import annotations

import sys

from amst_core.cli.main import main
from amst_tcp.lane import TcpLane

send_frame = TcpLane.send_frame


def copying_send_frame(self: TcpLane, header: bytes, payload: memoryview) -> None:
    send_frame(self, header, memoryview(bytes(payload)))


TcpLane.send_frame = copying_send_frame  # type: ignore[method-assign]
sys.exit(main())
