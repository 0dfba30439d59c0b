"""Processes of a run: servers and clients, started, waited for and ended."""

from __future__ import annotations

import contextlib
import os
import pwd
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from .errors import RunError

START_LIMIT_S: Final = 30.0
_END_LIMIT_S: Final = 20.0


def unwind_on_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does: with its servers stopped and its files removed. Main thread only."""

    def leave(*_: object) -> None:
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, leave)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def unprivileged() -> str | None:
    """Who runs a server that refuses to run as root; None when we are not root."""
    if os.geteuid():
        return None
    return pwd.getpwnam("nobody").pw_name


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without settings of AMST and in the C locale, so that output can be parsed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AMST_")}
    return {**kept, "LC_ALL": "C", **(extra or {})}


class Server:
    """A server process; its output goes to a file, so that it never waits for a reader."""

    def __init__(
        self, argv: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None, user: str | None = None
    ) -> None:
        self.argv = list(argv)
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                self.argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                env=clean_environment(env), user=user, group="nogroup" if user else None,
                extra_groups=[] if user else None, start_new_session=True,
            )  # fmt: skip
        self.used: resource.struct_rusage | None = None
        """Of it and of the children it waited for, once it has ended."""

    def said(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def wait_listening(self, port: int) -> None:
        """Until its port is taken, by the kernel's table: a connection would be a one-shot server's only client.

        Raises:
            RunError: it ended, or is not listening in time.
        """
        self._wait(lambda: port in listening_ports(), f"listen on port {port}")

    def wait_line(self, start: str) -> str:
        """The first line that begins with ``start``, once it was printed.

        Raises:
            RunError: it ended, or says nothing in time.
        """

        def found() -> str | None:
            return next((line for line in self.said().splitlines() if line.startswith(start)), None)

        self._wait(found, f"print {start!r}")
        return found() or ""

    def _wait(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while not condition():
            if self.process.poll() is not None:
                raise RunError(
                    f"{self.argv[0]} ended with {self.process.returncode} before it could {what}: {self._tail()}"
                )
            if time.monotonic() > deadline:
                raise RunError(f"{self.argv[0]} did not {what} within {START_LIMIT_S:g} s: {self._tail()}")
            time.sleep(0.02)

    def wait_end(self, limit_s: float = _END_LIMIT_S) -> None:
        """Until a one-shot server has ended of itself.

        Raises:
            RunError: it has not in time, or failed.
        """
        if not self._reap(limit_s):
            raise RunError(f"{self.argv[0]} had not ended {limit_s:g} s after its client")
        if self.process.returncode:
            raise RunError(f"{self.argv[0]} ended with {self.process.returncode}: {self._tail()}")

    def stop(self) -> None:
        """End it and what it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            if self._reap(_END_LIMIT_S):
                return

    def _reap(self, limit_s: float) -> bool:
        """Whether it has ended in time."""
        deadline = time.monotonic() + limit_s
        while self.process.returncode is None:
            pid, status, used = os.wait4(self.process.pid, os.WNOHANG)
            if pid:
                self.process.returncode = os.waitstatus_to_exitcode(status)
                self.used = used
            elif time.monotonic() > deadline:
                return False
            else:
                time.sleep(0.002)
        return True

    def _tail(self) -> str:
        return " ".join(self.said().split())[-300:] or "it printed nothing"


def listening_ports() -> set[int]:
    """TCP ports that somebody listens on, in this network namespace."""
    ports = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(table).read_text().splitlines()[1:]:
                _, local, _, state = line.split()[:4]
                if state == "0A":
                    ports.add(int(local.rpartition(":")[2], 16))
    return ports


@dataclass(frozen=True, slots=True)
class Finished:
    """Clients that ended well: what each printed on standard output, and what they used together.

    ``waits``: voluntary context switches.
    """

    printed: Sequence[str]
    wall_s: float
    cpu_s: float
    waits: int


def run_clients(
    commands: Sequence[Sequence[str]],
    *,
    scratch: Path,
    env: Mapping[str, str] | None,
    limit_s: float,
    started: Callable[[int], None],
) -> Finished:
    """Run ``commands`` at once to their ends; ``started`` is told of each process.

    Raises:
        RunError: one fails, or they take longer than ``limit_s``.
    """
    clients = []
    files: list[tuple[Path, IO[bytes], IO[bytes]]] = []
    with contextlib.ExitStack() as stack:
        for number in range(len(commands)):
            base = scratch / f"client-{number}"
            files.append(
                (base, stack.enter_context(open(f"{base}.out", "wb")), stack.enter_context(open(f"{base}.err", "wb")))
            )
        expired = threading.Event()
        began = time.monotonic()
        for argv, (_, out, err) in zip(commands, files, strict=True):
            client = subprocess.Popen(
                list(argv), stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=clean_environment(env),
                start_new_session=True,
            )  # fmt: skip
            clients.append(client)
            stack.callback(_end, client)
            started(client.pid)

        def expire() -> None:
            expired.set()
            for client in clients:
                _kill_group(client)

        watchdog = threading.Timer(limit_s, expire)
        watchdog.start()
        stack.callback(watchdog.cancel)
        cpu_s, waits = 0.0, 0
        for client in clients:
            _, status, used = os.wait4(client.pid, 0)
            client.returncode = os.waitstatus_to_exitcode(status)
            cpu_s += used.ru_utime + used.ru_stime
            waits += used.ru_nvcsw
        wall_s = time.monotonic() - began
    if expired.is_set():
        raise RunError(f"{commands[0][0]} took longer than {limit_s:g} s and was killed")
    for client, argv, (base, _, _) in zip(clients, commands, files, strict=True):
        if client.returncode:
            texts = [Path(f"{base}.{end}").read_text(errors="replace") for end in ("err", "out")]
            said = " ".join(next(filter(str.strip, texts), "it printed nothing").split())
            raise RunError(f"{argv[0]} ended with {client.returncode}: {said[-300:]}")
    return Finished([Path(f"{base}.out").read_text(errors="replace") for base, _, _ in files], wall_s, cpu_s, waits)


def _end(process: subprocess.Popen[bytes]) -> None:
    _kill_group(process)
    process.wait()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
