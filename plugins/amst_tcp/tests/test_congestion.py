"""The kernel's congestion control: set per lane, read back, and the reasons when it is refused."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys

import pytest

from amst_core.errors import ClosedError, UnavailableError
from amst_tcp.congestion import choose_congestion, congestion_of
from amst_tcp.sysctl import sysctl

ALLOWED = (sysctl("ipv4/tcp_allowed_congestion_control") or "").split()
AVAILABLE = (sysctl("ipv4/tcp_available_congestion_control") or "").split()


@pytest.fixture
def sock():
    with socket.socket() as sock:
        yield sock


@pytest.mark.parametrize("algorithm", ALLOWED)
def test_what_is_allowed_is_taken_and_reads_back(sock: socket.socket, algorithm: str) -> None:
    assert choose_congestion(sock, algorithm) == algorithm
    assert congestion_of(sock) == algorithm


def test_a_lane_changes_its_own_and_no_other(lane_pairs) -> None:
    near, far = lane_pairs()
    before = far.path_stats().congestion
    for algorithm in ALLOWED:
        assert near.set_congestion(algorithm) == algorithm
        assert near.path_stats().congestion == algorithm
    assert far.path_stats().congestion == before


def test_one_that_the_kernel_does_not_have_is_told_from_one_that_is_not_allowed(sock: socket.socket) -> None:
    before = congestion_of(sock)
    with pytest.raises(UnavailableError, match=r"this kernel has no amst_none \(it has .*reno.*\); as root: modprobe"):
        choose_congestion(sock, "amst_none")
    assert congestion_of(sock) == before


def test_a_name_that_is_too_long_is_none(sock: socket.socket) -> None:
    with pytest.raises(UnavailableError, match="no kernel has"):
        choose_congestion(sock, "x" * 16)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up its privileges")
def test_one_that_is_not_allowed_to_this_process_says_what_is() -> None:
    forbidden = [name for name in AVAILABLE if name not in ALLOWED]
    if not forbidden:
        pytest.skip(f"this kernel allows everyone all that it has: {' '.join(AVAILABLE)}")
    code = f"""
import encodings.ascii, os, socket  # what is imported later nobody may read
from amst_tcp.congestion import choose_congestion
from amst_core.errors import UnavailableError
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
try:
    choose_congestion(socket.socket(), {forbidden[0]!r})
except UnavailableError as err:
    print(err)
"""
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": path}
    )
    assert done.stdout.startswith(f"this process may not use {forbidden[0]} (allowed to it: {' '.join(ALLOWED)})")


def test_other_refusals_are_told_as_they_are() -> None:
    class Refusing(socket.socket):
        def setsockopt(self, *arguments):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    with Refusing() as sock, pytest.raises(UnavailableError, match=r"the kernel refuses reno: .*busy"):
        choose_congestion(sock, "reno")


def test_a_kernel_that_takes_one_and_runs_another_is_found_out() -> None:
    class Lying(socket.socket):
        def setsockopt(self, *arguments):
            pass

    with Lying() as sock:
        other = next(name for name in ("reno", "cubic") if name != congestion_of(sock))
        with pytest.raises(UnavailableError, match=f"the kernel took {other} and runs {congestion_of(sock)}"):
            choose_congestion(sock, other)


def test_a_closed_lane_has_none(lane_pairs) -> None:
    near, _ = lane_pairs()
    near.abort()
    with pytest.raises(ClosedError):
        near.set_congestion("reno")
