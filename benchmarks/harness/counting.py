"""Work that does not depend on the clock: system calls, allocations and waits of `amst`, per GiB or per file.

Each load is run twice, small and large, and the difference counts, so that starting up and ending do not. Both sides
are added up. What is counted, and by whom:

- ``calls``: system calls but for those that wait, by ``strace -f -c``. The kernel reports them, so that what a library
  does counts too; /proc/PID/io knows nothing of sockets, and the tracepoints need root.
- ``wakeups``: the calls that wait or wake (futex, poll, epoll and their like), by the same. They follow the timing.
- ``switches``: voluntary context switches, by getrusage. They follow the timing too.
- ``allocations``, ``allocated_bytes``: all calls of malloc, calloc and realloc, and what they asked for, by glibc's
  libmemusage with ``PYTHONMALLOC=malloc``, which sends every Python object through them. A copy of a chunk shows here.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .amst import AMST, Amst
from .contender import Job, Servers, Work, find
from .errors import RunError
from .processes import run_clients
from .rounds import check_arrived, write_file, write_tree
from .workloads import SMALL_FILE

METRICS: Final = ("calls", "wakeups", "switches", "allocations", "allocated_bytes")

_WAITING: Final = frozenset(
    "futex poll ppoll select pselect6 epoll_wait epoll_pwait epoll_pwait2 sched_yield nanosleep clock_nanosleep pause"
    " restart_syscall rt_sigtimedwait rt_sigsuspend wait4 waitid".split()
)
_STEADY: Final = {"PYTHONHASHSEED": "0"}
_MEMUSAGE: Final = "libmemusage.so"
_LIMIT_S: Final = 300.0
_STREAMS: Final = 4
_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Load:
    """What is counted: ``large`` minus ``small``, bytes or files, in units of ``per``."""

    name: str
    work: Work
    flags: tuple[str, ...]
    small: int
    large: int
    per: int

    @property
    def units(self) -> float:
        return (self.large - self.small) / self.per


_FIXED: Final = ("--set", "transport.amst.chunk_size_kb=4096")
"""The longest chunk that grows by itself: how long others become depends on the clock."""

LOADS: Final = (
    Load("memory-plaintext", Work.MEMORY, ("--plaintext", *_FIXED), 64 * _MIB, 320 * _MIB, 1024 * _MIB),
    Load("memory-encrypted", Work.MEMORY, _FIXED, 64 * _MIB, 320 * _MIB, 1024 * _MIB),
    Load("file-encrypted", Work.FILE, _FIXED, 64 * _MIB, 320 * _MIB, 1024 * _MIB),
    Load("small-files", Work.TREE, _FIXED, 100, 1100, 1),
)


def missing_tool() -> str | None:
    """What must be installed before anything can be counted."""
    if find("strace") is None:
        return "strace is not installed; on Debian: apt-get install strace"
    probe = subprocess.run(
        ["true"], env={**os.environ, "LD_PRELOAD": _MEMUSAGE}, stderr=subprocess.PIPE, text=True, check=False
    )
    if "Memory usage summary" not in probe.stderr:
        return f"{_MEMUSAGE} cannot be loaded; glibc has it (Debian: libc6, Fedora: glibc-utils)"
    traced = subprocess.run(["strace", "-c", "-o", os.devnull, "true"], stderr=subprocess.PIPE, text=True, check=False)
    return f"strace may not trace here: {traced.stderr.strip()}" if traced.returncode else None


class Counter:
    """Counts a load, once or again and again; ``flags`` are added to amst's, ``command`` runs in its place.

    Now and then a run does something that the others do not, such as an import on a path seldom taken. That is no part
    of what a GiB costs, so the least of all runs of a size counts.
    """

    def __init__(self, load: Load, *, flags: Sequence[str] = (), command: Sequence[str] = AMST) -> None:
        self._load = load
        self._flags = flags
        self._command = command
        self._least: dict[int, dict[str, float]] = {}

    def count(self) -> dict[str, float]:
        """Run both sizes (again); every metric of `METRICS` so far, per GiB or file.

        Raises:
            RunError: a run fails, or what arrived is not what was sent.
        """
        load = self._load
        for amount in (load.small, load.large):
            arguments = (load, amount, self._flags, self._command)
            found = {**_traced(*arguments), **_allocating(*arguments)}
            before = self._least.get(amount, found)
            self._least[amount] = {name: min(found[name], before[name]) for name in METRICS}
        small, large = self._least[load.small], self._least[load.large]
        return {name: (large[name] - small[name]) / load.units for name in METRICS}


def _traced(load: Load, amount: int, flags: Sequence[str], command: Sequence[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="amst-counting-") as place:
        # Detached (-DD), strace leaves amst the process that was started: the one to signal and to wait for.
        traced = ["sh", "-c", 'exec strace -DD -f -qq -c -o "$0.$$" "$@"', f"{place}/strace", *command]
        _run(load, amount, Amst(load.name, *load.flags, *flags, command=traced, variables=_STEADY), Path(place))
        calls = wakeups = 0
        for path in _written(Path(place), "strace.*"):
            for name, number in parse_strace(path.read_text()).items():
                if name in _WAITING:
                    wakeups += number
                else:
                    calls += number
    return {"calls": calls, "wakeups": wakeups}


def _allocating(load: Load, amount: int, flags: Sequence[str], command: Sequence[str]) -> dict[str, float]:
    variables = {**_STEADY, "LD_PRELOAD": _MEMUSAGE, "PYTHONMALLOC": "malloc"}
    with tempfile.TemporaryDirectory(prefix="amst-counting-") as place:
        switches = _run(
            load, amount, Amst(load.name, *load.flags, *flags, command=command, variables=variables), Path(place)
        )
        sides = [
            parse_memusage((Path(place) / "scratch" / name).read_text()) for name in ("client-0.err", "server-0.log")
        ]
    return {
        "switches": switches,
        "allocations": sum(number for number, _ in sides),
        "allocated_bytes": sum(size for _, size in sides),
    }


def _run(load: Load, amount: int, amst: Amst, place: Path) -> int:
    """One run to the end of both sides; their voluntary context switches."""
    size = amount * SMALL_FILE if load.work is Work.TREE else amount
    job = Job(load.work, size, _STREAMS, place / "source", place / "target", place / "scratch")
    job.scratch.mkdir()
    job.target.mkdir()
    if load.work is Work.FILE:
        write_file(job.source, size)
    elif load.work is Work.TREE:
        write_tree(job.source, amount)
    with Servers(job.scratch) as servers:
        amst.serve(job, servers)
        finished = run_clients(
            amst.commands(job, servers),
            scratch=job.scratch,
            env=amst.environment(job),
            limit_s=_LIMIT_S,
            started=lambda _: None,
        )
        amst.outcome(job, finished.printed, finished.wall_s)
    check_arrived(job)
    used = servers.all[0].used
    if used is None or servers.all[0].process.returncode:
        raise RunError(f"the server ended with {servers.all[0].process.returncode}: {servers.all[0].said()[-300:]}")
    return finished.waits + used.ru_nvcsw


def _written(place: Path, pattern: str) -> list[Path]:
    """The files of both sides, once strace has finished them, which it does after amst's end."""
    deadline = time.monotonic() + _LIMIT_S
    while True:
        found = [path for path in place.glob(pattern) if path.read_text().rstrip().endswith(" total")]
        if len(found) == 2:
            return found
        if time.monotonic() > deadline:
            raise RunError("strace did not write what it counted")
        time.sleep(0.01)


def parse_strace(text: str) -> Mapping[str, int]:
    """System call to how often, from the table of ``strace -c``."""
    found = {}
    for line in text.splitlines():
        fields = line.split()
        if len(fields) in (5, 6) and fields[3].isdigit() and fields[-1] != "total":
            found[fields[-1]] = int(fields[3])
    return found


def parse_memusage(text: str) -> tuple[int, int]:
    """Calls and bytes of malloc, realloc and calloc together, from libmemusage's summary.

    Raises:
        RunError: there is none.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    found = re.findall(r"^\s*(?:malloc|realloc|calloc)\|\s+(\d+)\s+(\d+)", plain, re.MULTILINE)
    if len(found) != 3:
        raise RunError(f"no summary of memory usage in {plain[-300:]!r}")
    return sum(int(calls) for calls, _ in found), sum(int(size) for _, size in found)
