"""What processes and their descendants used: CPU time and peak memory, looked up while they run."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from .processes import Server

_STEP_S: Final = 0.1
_STEPS_PER_SEARCH: Final = 5
_TICKS: Final = os.sysconf("SC_CLK_TCK")


class Tree:
    """A process and its descendants, looked at again and again.

    CPU time is the larger of two counts, each of which may miss something: that of every process when it was last seen,
    and that of the living with the children they have waited for. Memory is the sum of VmHWM over those alive at once,
    so that pages which they share count for each.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.peak_bytes = 0
        self._members = [pid]
        self._own: dict[int, float] = {}
        self._with_children = 0.0

    def search(self, parents: Mapping[int, int]) -> None:
        """Find the descendants of today in a map of process to parent."""
        members = {self.pid}
        while more := {pid for pid, parent in parents.items() if parent in members} - members:
            members |= more
        self._members = sorted(members)

    def look(self) -> None:
        with_children = peak = 0.0
        for pid in self._members:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                own, waited = cpu_seconds(pid)
                self._own[pid] = own
                with_children += own + waited
                peak += peak_resident(pid)
        self._with_children = max(self._with_children, with_children)
        self.peak_bytes = max(self.peak_bytes, int(peak))

    @property
    def cpu_s(self) -> float:
        return max(sum(self._own.values()), self._with_children)


class Meter:
    """Watches servers, and the clients it is told of, while the block runs. One thread, a look every 100 ms."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers = {server.process.pid: (server, Tree(server.process.pid)) for server in servers}
        self._clients: list[Tree] = []
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="meter")

    def __enter__(self) -> Meter:
        self._look(search=True)
        self._before = {pid: tree.cpu_s for pid, (_, tree) in self._servers.items()}
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._look(search=True)

    def watch_client(self, pid: int) -> None:
        with self._lock:
            self._clients.append(Tree(pid))

    @property
    def server_cpu_s(self) -> float:
        """What the servers used within the block."""
        total = 0.0
        for pid, (server, tree) in self._servers.items():
            ended = server.used.ru_utime + server.used.ru_stime if server.used else 0.0
            total += max(tree.cpu_s, ended) - self._before[pid]
        return total

    @property
    def server_peak_bytes(self) -> int:
        return sum(tree.peak_bytes for _, tree in self._servers.values())

    @property
    def client_peak_bytes(self) -> int:
        return sum(tree.peak_bytes for tree in self._clients)

    def _watch(self) -> None:
        step = 0
        self._end.wait(_STEP_S / 4)
        while not self._end.is_set():
            self._look(search=step % _STEPS_PER_SEARCH == 0)
            step += 1
            self._end.wait(_STEP_S)

    def _look(self, *, search: bool) -> None:
        parents = dict(processes()) if search else {}
        with self._lock:
            trees = [tree for _, tree in self._servers.values()] + self._clients
        for tree in trees:
            if search:
                tree.search(parents)
            tree.look()


def processes() -> Iterator[tuple[int, int]]:
    """Every process and its parent."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                yield int(name), int(_stat(int(name))[1])


def cpu_seconds(pid: int) -> tuple[float, float]:
    """User and system time of a process, and of those children that it has waited for.

    Raises:
        FileNotFoundError, ProcessLookupError: it is gone.
    """
    utime, stime, cutime, cstime = (int(field) / _TICKS for field in _stat(pid)[11:15])
    return utime + stime, cutime + cstime


def peak_resident(pid: int) -> int:
    """VmHWM in bytes; 0 for a process that has ended and was not waited for.

    Raises:
        FileNotFoundError, ProcessLookupError: it is gone.
    """
    with open(f"/proc/{pid}/status") as file:
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:")), 0)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; the name before them may hold anything."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()
