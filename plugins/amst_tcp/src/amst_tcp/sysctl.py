"""What the kernel's network settings are; a namespace has its own of most of them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_NET: Final = Path("/proc/sys/net")


def sysctl(name: str) -> str | None:
    """The setting ``net.<name>``, written with slashes; None where it cannot be read.

    Those of IPv4 that are about TCP are IPv6's too.
    """
    try:
        return (_NET / name).read_text("ascii").strip()
    except OSError:
        return None
