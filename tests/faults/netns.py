"""Two network namespaces with a veth pair between them, and nftables to lose packets. Needs root."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import pytest

SERVER_ADDRESS: Final = "10.98.7.1"
CLIENT_ADDRESS: Final = "10.98.7.2"

_numbers = itertools.count()


@functools.cache
def missing() -> str | None:
    """Why there can be no namespaces here; None when there can."""
    if os.geteuid() != 0:
        return "needs root to make network namespaces"
    for program in ("ip", "nft", "ss"):
        if shutil.which(program, path=_path()) is None:
            return f"needs the program {program}"
    try:
        with namespaces() as pair:
            pair.drop("tcp dport 9")
            pair.restore()
    except (subprocess.CalledProcessError, OSError) as err:
        return f"cannot make network namespaces here: {err}"
    return None


def require_namespaces() -> None:
    """Skip the test where there are none. In CI there must be."""
    reason = missing()
    if reason is not None:
        assert os.environ.get("CI") != "true", f"CI must run this: {reason}"
        pytest.skip(reason)


@dataclass(frozen=True, slots=True)
class Pair:
    """Where a server and a client run: commands are prefixed by ``at_server`` or ``at_client``."""

    server: str
    client: str

    @property
    def at_server(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.server)

    @property
    def at_client(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.client)

    def drop(self, *matches: str) -> None:
        """Lose every packet, either way, that one of the nftables expressions matches; an empty one matches all."""
        rules = "".join(
            f"add rule inet faults {hook} {match} drop\n" for match in matches for hook in ("input", "output")
        )
        _run(*self.at_client, "nft", "-f", "-", text=f"{_CHAINS}{rules}")

    def restore(self) -> None:
        """Lose nothing any more."""
        _run(*self.at_client, "nft", "flush", "ruleset")

    def connections(self, pid: int, server_port: int) -> list[int]:
        """Ports of the client process's connections to the server, in the order of its descriptors: control first."""
        shown = _run(*self.at_client, "ss", "-Htnp", "state", "established", f"( dport = :{server_port} )")
        found = []
        for line in shown.splitlines():
            port = re.search(rf"{re.escape(CLIENT_ADDRESS)}:(\d+)", line)
            user = re.search(rf"pid={pid},fd=(\d+)", line)
            if port and user:
                found.append((int(user[1]), int(port[1])))
        return [port for _, port in sorted(found)]

    def kill_connections(self, *ports: int) -> None:
        """Reset these connections of the client, by its port (`ss -K`)."""
        for port in ports:
            _run(*self.at_client, "ss", "-K", "sport", "=", f":{port}")


_CHAINS: Final = """
add table inet faults
flush table inet faults
add chain inet faults input { type filter hook input priority 0; }
add chain inet faults output { type filter hook output priority 0; }
"""


def of_ports(*ports: int) -> tuple[str, str]:
    """Matches packets of connections that the client has from these ports, either way."""
    listed = ", ".join(map(str, ports))
    return f"tcp sport {{ {listed} }}", f"tcp dport {{ {listed} }}"


@contextlib.contextmanager
def namespaces() -> Iterator[Pair]:
    """A pair of namespaces, gone after the block; what runs in them must have ended before."""
    number = f"{os.getpid()}-{next(_numbers)}"
    pair = Pair(f"amst-s-{number}", f"amst-c-{number}")
    with contextlib.ExitStack() as stack:
        for name, address, link in ((pair.server, SERVER_ADDRESS, "veth-s"), (pair.client, CLIENT_ADDRESS, "veth-c")):
            _run("ip", "netns", "add", name)
            stack.callback(_run, "ip", "netns", "del", name)
            if link == "veth-s":
                _run("ip", "-n", name, "link", "add", "veth-s", "type", "veth", "peer", "name", "veth-c")
            else:
                _run("ip", "-n", pair.server, "link", "set", "veth-c", "netns", name)
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", link)
            _run("ip", "-n", name, "link", "set", link, "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
        yield pair


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _run(*argv: str, text: str | None = None) -> str:
    done = subprocess.run(
        argv, input=text, text=True, capture_output=True, timeout=30, env={**os.environ, "PATH": _path()}, check=False
    )
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, argv, done.stdout, f"{argv}: {done.stderr}")
    return done.stdout
