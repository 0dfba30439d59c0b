"""Hosts with a wide-area network between them, on one machine."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from types import TracebackType
from typing import IO, Any, Final, Self, TypeVar

from ...errors import AmstError, RefusedError, UsageError
from . import kernel
from .path import MTU, Path, Way
from .report import LabReport, WayCounts, faults

T = TypeVar("T")

ROUTER: Final = "router"
"""The name that stands for the lab's router at the second end of a `Link`."""

_MARK: Final = "AMST_LAB"
_READY_TIMEOUT_S: Final = 30.0
_ANSWER_TIMEOUT_S: Final = 10.0
_GRACE_S: Final = 3.0
_MOST_LINKS: Final = 200
_LISTENS: Final = "0A"  # TCP_LISTEN as /proc/net/tcp writes it


class LabUnavailableError(RefusedError):
    """There can be no lab here; the message says what is missing."""


class LabRejectedError(AmstError):
    """The emulator could not keep its times: what was measured means nothing. The same again may succeed."""

    kind = "rejected"
    default_retryable = True


class Link:
    """Two hosts, or a host and the `ROUTER`, joined by a path; its ``up`` is from the first to the second.

    Given to a `Lab`, which sets ``number`` and the addresses.

    Attributes:
        first, second: names of the ends.
        path: what it is like at the moment.
        number: which of the lab's links it is; its devices are called ``wan`` and that number.
        addresses, addresses6: the IPv4 and IPv6 address of each host on it, by name.
        offload: by name, whether the end's device takes super-packets and leaves checksums to the other side.
    """

    def __init__(self, first: str, second: str, path: Path, *, offload: bool | Mapping[str, bool] = True) -> None:
        if first == second or first == ROUTER or not first or not second:
            raise UsageError(f"a link joins two hosts, or a host and the router, not {first!r} and {second!r}")
        self.first, self.second = first, second
        self.path = path
        self.number = -1
        self.addresses: dict[str, str] = {}
        self.addresses6: dict[str, str] = {}
        self.offload = dict(offload) if isinstance(offload, Mapping) else dict.fromkeys((first, second), offload)
        self._lab: Lab | None = None

    def set(
        self,
        *,
        up: Way | Mapping[str, object] | None = None,
        down: Way | Mapping[str, object] | None = None,
        **both: object,
    ) -> None:
        """Change the path from now on: values for both directions, ``up`` and ``down`` for one, as for `Path`.

        What waits in a buffer is sent at the new rate; what is on its way arrives as it would have. A buffer that
        was not given in bytes follows the new bandwidth-delay product.

        Raises:
            UsageError: a value that makes no sense; nothing is changed then.
            AmstError: the emulator does not run (any more).
        """
        path = self.path.changed(up=up, down=down, **both)
        if self._lab is not None and self._lab.running:
            self._lab._set(self, path)
        self.path = path


def access(host: str, path: Path, *, offload: bool = True) -> Link:
    """The link of a host to the lab's router; ``up`` is towards the router.

    A packet between two such hosts passes the first's up, then the second's down: their delays add up, their rates and
    buffers are passed one after the other. The default buffer knows only the host's own delays.
    """
    return Link(host, ROUTER, path, offload=offload)


class Host:
    """A network namespace of a lab: what is started in it sees the lab's network and nothing else.

    Attributes:
        name: as in the links.
        addresses, addresses6: one IPv4 and one IPv6 address per link, in the order of the links; no IPv6 addresses
            where the kernel has none.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.addresses: list[str] = []
        self.addresses6: list[str] = []
        self._namespace: int | None = None
        self._mark = ""
        self._started: list[subprocess.Popen[Any]] = []

    @property
    def address(self) -> str:
        """Its IPv4 address on its first link."""
        return self.addresses[0]

    @property
    def address6(self) -> str:
        """Its IPv6 address on its first link."""
        return self.addresses6[0]

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        """Have the calling thread be on this host during the block.

        Sockets made in it stay on this host afterwards, so one test can hold both ends of a connection.

        Raises:
            UsageError: the lab does not run.
        """
        if self._namespace is None:
            raise UsageError(f"host {self.name} is there only while its lab runs: with Lab(...) as lab")
        with kernel.inside(self._namespace):
            yield

    def popen(self, argv: Sequence[str | bytes], **options: Any) -> subprocess.Popen[Any]:
        """Start a process on this host; ``options`` are those of `subprocess.Popen`.

        It and all its descendants end with the lab at the latest: SIGTERM, SIGKILL after 3 s.
        """
        environment = options.pop("env", None)
        environment = dict(os.environ if environment is None else environment)
        with self.enter():
            process = subprocess.Popen(argv, env={**environment, _MARK: self._mark}, **options)
        self._started.append(process)
        return process

    def run(
        self,
        argv: Sequence[str | bytes],
        *,
        check: bool = True,
        timeout: float | None = None,
        input: Any = None,
        **options: Any,
    ) -> subprocess.CompletedProcess[Any]:
        """Run a process on this host to its end, its output captured as text unless ``options`` say otherwise.

        Raises:
            subprocess.CalledProcessError, subprocess.TimeoutExpired: as of `subprocess.run`.
        """
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        options["stdin"] = subprocess.DEVNULL if input is None else subprocess.PIPE
        with self.popen(argv, **options) as process:
            try:
                out, err = process.communicate(input, timeout)
            except BaseException:
                process.kill()
                raise
        if check and process.returncode:
            raise subprocess.CalledProcessError(process.returncode, argv, out, err)
        return subprocess.CompletedProcess(argv, process.returncode, out, err)

    def proc_net(self, name: str) -> str:
        """The text of a file of this host's /proc/net, such as ``snmp`` or ``tcp``."""
        with self.enter():
            return FilePath(f"/proc/thread-self/net/{name}").read_text()

    def listening(self) -> set[int]:
        """The TCP ports of this host that somebody listens at."""
        tables = ("tcp", "tcp6") if self.addresses6 else ("tcp",)
        rows = (row.split() for table in tables for row in self.proc_net(table).splitlines()[1:])
        return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == _LISTENS}

    def sysctl(self, name: str, value: str | None = None) -> str:
        """A setting of this host's network (``net.ipv4.tcp_rmem``), set to ``value`` before if that is given."""
        with self.enter():
            if value is not None:
                kernel.set_sysctl(name, value)
            return kernel.get_sysctl(name)

    def _end_all(self) -> None:
        running = [process for process in self._started if process.poll() is None]
        for process in running:
            process.terminate()
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
            if process.poll() is None:
                process.kill()
                process.wait()
        self._started.clear()


class Lab:
    """Hosts and links between them, while the block runs::

        with Lab(Path(rate="100Mbit/s", rtt="100ms", loss="1%")) as lab:
            here, far = lab.hosts
            far.popen(["iperf3", "-s"])
            here.run(["iperf3", "-c", far.address])
            lab.check()

    ``links`` are `Link`s, or a single `Path` between hosts ``here`` and ``far``. Several links between the same two
    hosts are several paths, with an address of each host on each. Each lab is by itself: any number run at once.
    An emulator process carries the packets; when the process that made the lab ends, however it does, the
    emulator kills what runs on the hosts and ends too. Namespaces have no names, so none can be left.

    Args:
        seed: what losses and jitter are drawn from; the same packets at the same times have the same fate.
        congestion: congestion control of the hosts' sockets (TCP_CONGESTION), None: this machine's default.
        tcp_memory: bytes that a TCP socket may buffer either way, None: this machine's limit.
        sysctls: more settings of every host's network, by name.
        realtime: run the emulator at real-time priority where that is permitted.
        late_p99, late_max: seconds of lateness (of 99 % of the packets, of every one) beyond which a run is rejected.

    Raises, when it starts:
        UsageError: links that make no sense.
        LabUnavailableError: no root, no /dev/net/tun or the like; says which.
    """

    def __init__(
        self,
        *links: Link | Path,
        seed: int = 1,
        congestion: str | None = None,
        tcp_memory: int | None = None,
        sysctls: Mapping[str, str] | None = None,
        realtime: bool = True,
        late_p99: float = 1e-3,
        late_max: float = 20e-3,
    ) -> None:
        if len(links) == 1 and isinstance(links[0], Path):
            links = (Link("here", "far", links[0]),)
        if not links or len(links) > _MOST_LINKS:
            raise UsageError(f"a lab has 1 to {_MOST_LINKS} links, not {len(links)}")
        self.links: list[Link] = []
        for link in links:
            if not isinstance(link, Link) or link._lab is not None:
                raise UsageError("a lab takes one Path between two hosts, or Links that no other lab has")
            self.links.append(link)
        self.seed = seed
        self._bounds = {"late_p99": late_p99, "late_max": late_max}
        self._realtime = realtime
        self._sysctls = _sysctls(congestion, tcp_memory, sysctls or {})
        self._by_name: dict[str, Host] = {}
        self._lock = threading.Lock()
        self._asked = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._final: LabReport | None = None
        for number, link in enumerate(self.links):
            self._take(number, link)

    def _take(self, number: int, link: Link) -> None:
        link._lab, link.number = self, number
        for place, name in enumerate((link.first, link.second), 1):
            if name == ROUTER:
                continue
            host = self._by_name.setdefault(name, Host(name))
            if link.second == ROUTER:  # one network that all links to the router share
                four, six = f"10.98.{(number + 1) >> 8}.{(number + 1) & 255}", f"fd98::{number + 1:x}"
            else:
                four, six = f"10.99.{number}.{place}", f"fd99:{number:x}::{place}"
            link.addresses[name], link.addresses6[name] = four, six
            host.addresses.append(four)
            if os.path.isdir("/proc/sys/net/ipv6"):
                host.addresses6.append(six)

    # ---- what it consists of --------------------------------------------------------------

    @property
    def hosts(self) -> list[Host]:
        """The hosts, in the order in which the links name them."""
        return list(self._by_name.values())

    def host(self, name: str) -> Host:
        """The host of that name.

        Raises:
            UsageError: there is none.
        """
        try:
            return self._by_name[name]
        except KeyError:
            raise UsageError(f"no host {name!r} in this lab; it has {', '.join(self._by_name)}") from None

    @property
    def link(self) -> Link:
        """The first link."""
        return self.links[0]

    # ---- life -----------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether it has been started and not been closed."""
        return self._control is not None

    @property
    def emulator(self) -> int:
        """The id of the process that carries the packets."""
        if self._process is None:
            raise UsageError("the lab does not run")
        return self._process.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Make namespaces and devices, and begin to carry packets. A lab starts once."""
        if self._process is not None:
            raise UsageError("a lab starts once; make another one")
        _require()
        remove_leftovers()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._control = ours
            try:
                self._process = _spawn(theirs.fileno())
                ours.settimeout(_READY_TIMEOUT_S)
                ours.send(json.dumps(self._plan()).encode())
                theirs.close()
                message, namespaces, _, _ = socket.recv_fds(ours, 65536, len(self._by_name))
                answer = json.loads(message) if message else {"error": "the emulator ended", "errno": None}
                if "error" in answer:
                    raise _unavailable(answer)
            except BaseException:
                self._abandon()
                raise
        ours.settimeout(_ANSWER_TIMEOUT_S)
        mark = _mark(self._process.pid)
        for host, namespace in zip(self.hosts, namespaces, strict=True):
            host._namespace, host._mark = namespace, mark

    def close(self) -> None:
        """End the processes that were started on the hosts, then the network. May be called again."""
        if self._control is None or self._process is None:
            return
        try:
            for host in self.hosts:
                host._end_all()
            with contextlib.suppress(AmstError):
                self._final = self._report(self._ask({"do": "stop"}))
        finally:
            self._abandon()

    def _abandon(self) -> None:
        """Let go of everything, whatever state it is in."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            try:
                self._process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        held = [host._namespace for host in self.hosts if host._namespace is not None]
        for pid in set(kernel.processes_in(held)) - {os.getpid()}:  # left over when the emulator was killed
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for host in self.hosts:
            if host._namespace is not None:
                os.close(host._namespace)
                host._namespace = None

    # ---- what it has seen -----------------------------------------------------------------

    def report(self) -> LabReport:
        """What it has counted so far; after its end, what it had counted.

        Raises:
            AmstError: it was never started, or its emulator has died.
        """
        if self._final is not None:
            return self._final
        return self._report(self._ask({"do": "count"}))

    def check(self) -> LabReport:
        """`report`, if the run can be trusted.

        Raises:
            LabRejectedError: packets were late, or were lost where no loss was asked for; says how.
        """
        report = self.report()
        if report.faults:
            raise LabRejectedError(f"this run of the lab cannot be trusted: {'; '.join(report.faults)}")
        return report

    def _report(self, answer: dict[str, Any]) -> LabReport:
        ways = tuple(
            WayCounts(link=number // 2, direction=("up", "down")[number % 2], **values)
            for number, values in enumerate(answer["ways"])
        )
        report = LabReport(
            seed=self.seed,
            seconds=answer["seconds"],
            cpu_seconds=answer["cpu_seconds"],
            realtime=answer["realtime"],
            stall=answer["stall"],
            device_drops=sum(_device_drops(host.proc_net("dev")) for host in self.hosts),
            ways=ways,
            faults=(),
        )
        return dataclasses.replace(report, faults=faults(report, **self._bounds))

    # ---- the emulator ---------------------------------------------------------------------

    def _set(self, link: Link, path: Path) -> None:
        ways = [[2 * link.number, _values(path, path.up)], [2 * link.number + 1, _values(path, path.down)]]
        self._ask({"do": "set", "ways": ways})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            if self._control is None:
                raise UsageError("the lab does not run: with Lab(...) as lab")
            self._asked += 1
            answer: dict[str, Any] = {}
            try:
                self._control.send(json.dumps({**request, "number": self._asked}).encode())
                while "error" not in answer and answer.get("number") != self._asked:  # a late answer to an earlier one
                    message = self._control.recv(1 << 20)
                    answer = json.loads(message) if message else {"error": "it has died"}
            except OSError as err:
                raise AmstError(f"the lab's emulator does not answer: {err}") from err
        if "error" in answer:
            raise AmstError(f"the lab's emulator has failed: {answer['error']}")
        return answer

    def _plan(self) -> dict[str, Any]:
        ends: dict[str, list[dict[str, Any]]] = {name: [] for name in self._by_name}
        for link in self.links:
            prefixes = ("16", "16") if link.second == ROUTER else ("24", "64")
            for name in link.addresses:
                addresses = [f"{link.addresses[name]}/{prefixes[0]}", f"{link.addresses6[name]}/{prefixes[1]}"]
                offload = link.offload.get(name, True)
                ends[name].append(
                    {"device": f"wan{link.number}", "addresses": addresses, "offload": offload, "mtu": MTU}
                )
        order = [(name, end["device"]) for name, listed in ends.items() for end in listed]
        numbers = {key: number for number, key in enumerate(order)}
        ways: list[dict[str, Any]] = []
        for link in self.links:
            first = numbers[link.first, f"wan{link.number}"]
            second = None if link.second == ROUTER else numbers[link.second, f"wan{link.number}"]
            routed = [link.addresses[link.first], link.addresses6[link.first]] if second is None else []
            routes = [socket.inet_pton(socket.AF_INET6 if ":" in a else socket.AF_INET, a).hex() for a in routed]
            up, down = _values(link.path, link.path.up), _values(link.path, link.path.down)
            ways.append({"from": first, "to": second, "values": up, "routes": []})
            ways.append({"from": second, "to": first, "values": down, "routes": routes})
        return {
            "controller": os.getpid(),
            "hosts": [{"ends": ends[name], "sysctls": self._sysctls} for name in self._by_name],
            "ways": ways,
            "seed": self.seed,
            "realtime": self._realtime,
        }


def repeated(make: Callable[[], Lab], measure: Callable[[Lab], T], *, tries: int = 5) -> T:
    """What ``measure`` says of a lab that could be trusted while it measured; others are rejected and made anew.

    Raises:
        LabRejectedError: none of so many could.
    """
    for left in reversed(range(tries)):
        with make() as lab:
            result = measure(lab)
            try:
                lab.check()
            except LabRejectedError:
                if not left:
                    raise
            else:
                return result
    raise UsageError("a measurement needs at least one try")


@functools.cache
def missing() -> str | None:
    """Why there can be no lab here, found out by making one; None when there can."""
    try:
        with Lab(Path()):
            return None
    except LabUnavailableError as err:
        return str(err)


def remove_leftovers() -> list[int]:
    """Kill what still runs on the hosts of labs whose emulator and whose controller were killed; the process ids.

    Such a process carries the lab's mark in its environment and is in a network namespace that is not this one's.
    """
    home = os.stat("/proc/self/ns/net").st_ino
    killed = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):
            environment = FilePath(f"/proc/{entry}/environ").read_bytes()
            _, found, rest = (b"\0" + environment).partition(f"\0{_MARK}=".encode())
            mark = rest.partition(b"\0")[0].decode(errors="replace")
            pid, _, space = (*mark.split("-"), "", "", "")[:3]
            if not found or not pid.isdigit() or space != _process_space():
                continue
            if os.stat(f"/proc/{entry}/ns/net").st_ino != home and _mark(int(pid)) != mark:
                os.kill(int(entry), signal.SIGKILL)
                killed.append(int(entry))
    return killed


def _mark(pid: int) -> str:
    """Names a process for all times: its id, when it was started, where ids are counted. Empty when there is none."""
    try:
        fields = FilePath(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return f"{pid}-{fields[19]}-{_process_space()}" if fields[0] not in "ZX" else ""


def _process_space() -> str:
    """The namespace of process ids: a container's ids mean nothing outside it."""
    return str(os.stat("/proc/self/ns/pid").st_ino)


def _require() -> None:
    if not hasattr(os, "pidfd_open"):
        raise LabUnavailableError("a lab needs Linux")
    if os.geteuid() != 0:
        raise LabUnavailableError("a lab needs root: it makes network namespaces and devices")
    if not os.path.exists(kernel.TUN):
        raise LabUnavailableError(f"a lab needs {kernel.TUN}: the kernel has no TUN, or the container hides it")


def _unavailable(answer: Mapping[str, Any]) -> AmstError:
    if answer.get("errno") is None:
        return AmstError(f"the lab's emulator has failed: {answer['error']}")
    advice = "; it needs CAP_SYS_ADMIN and CAP_NET_ADMIN" if answer["errno"] in (errno.EPERM, errno.EACCES) else ""
    return LabUnavailableError(f"no lab can be made here: {answer['error']}{advice}")


def _spawn(control: int) -> subprocess.Popen[bytes]:
    package = str(FilePath(__file__).parents[3])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    null: IO[bytes] | int = subprocess.DEVNULL
    return subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.emulator", str(control)],
        pass_fds=[control], stdin=null, stdout=null, stderr=null, cwd="/", start_new_session=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def _values(path: Path, way: Way) -> dict[str, Any]:
    return {**way.as_dict(), "buffer": path.buffer(way)}


def _sysctls(congestion: str | None, tcp_memory: int | None, more: Mapping[str, str]) -> list[tuple[str, str]]:
    # What one connection learned of a path must not change how the next one begins.
    listed = {"net.ipv4.tcp_no_metrics_save": "1"}
    if tcp_memory is not None:
        if not 1 << 16 <= tcp_memory < 1 << 31:
            raise UsageError(f"tcp_memory: {tcp_memory} bytes is not within 64KiB and 2GiB")
        listed["net.ipv4.tcp_rmem"] = f"4096 131072 {tcp_memory}"
        listed["net.ipv4.tcp_wmem"] = f"4096 65536 {tcp_memory}"
    if congestion is not None:
        _require_congestion(congestion)
        listed["net.ipv4.tcp_congestion_control"] = congestion
    listed.update(more)
    return list(listed.items())


def _require_congestion(name: str) -> None:
    known = _words("available")
    if name not in known:
        raise UsageError(f"congestion: this kernel has no {name!r}; it has {', '.join(sorted(known))}")
    if name not in _words("allowed") | _words(""):
        # tcp_set_default_congestion_control in net/ipv4/tcp_cong.c
        raise UsageError(
            f"congestion: Linux lets a network namespace have {name} as its default only when it is in"
            " net.ipv4.tcp_allowed_congestion_control or is this machine's default; add it there, or set it per socket"
        )


def _words(which: str) -> set[str]:
    name = f"tcp_{which}_congestion_control" if which else "tcp_congestion_control"
    return set(FilePath(f"/proc/sys/net/ipv4/{name}").read_text().split())


def _device_drops(table: str) -> int:
    rows = (line.partition(":") for line in table.splitlines())
    return sum(int(counts.split()[11]) for name, colon, counts in rows if colon and name.strip().startswith("wan"))
