"""The kernel's congestion control of one socket: set, and read back."""

from __future__ import annotations

import errno
import socket
from typing import Final

from amst_core.errors import UnavailableError

from .sysctl import sysctl

_NAME_SIZE: Final = 16  # TCP_CA_NAME_MAX, with the NUL


def choose_congestion(sock: socket.socket, algorithm: str) -> str:
    """Have the kernel run ``algorithm`` on ``sock``; the one in force, read back.

    Raises:
        UnavailableError: it is not in this kernel, or not allowed to this process; says what there is and what to do.
    """
    if len(algorithm) >= _NAME_SIZE:
        raise UnavailableError(f"no kernel has a congestion control called {algorithm!r}")
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, algorithm.encode())
    except OSError as err:
        raise UnavailableError(_why_not(algorithm, err)) from err
    in_force = congestion_of(sock)
    if in_force != algorithm:
        raise UnavailableError(f"the kernel took {algorithm} and runs {in_force}")
    return in_force


def congestion_of(sock: socket.socket) -> str:
    """The congestion control in force on a socket."""
    name = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _NAME_SIZE)
    return name.partition(b"\0")[0].decode("ascii", "replace")


def _why_not(algorithm: str, err: OSError) -> str:
    match err.errno:
        case errno.ENOENT:
            there = sysctl("ipv4/tcp_available_congestion_control") or "unknown"
            return f"this kernel has no {algorithm} (it has {there}); as root: modprobe tcp_{algorithm}"
        case errno.EPERM:
            allowed = sysctl("ipv4/tcp_allowed_congestion_control") or "unknown"
            return (
                f"this process may not use {algorithm} (allowed to it: {allowed}); as root, name it in"
                " net.ipv4.tcp_allowed_congestion_control"
            )
        case _:
            return f"the kernel refuses {algorithm}: {err.strerror or err}"
