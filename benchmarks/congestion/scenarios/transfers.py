"""One transfer from the first host of a lab to the second, by AMST or iperf3, and what can be seen beside it."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, Self

from harness.amst import AMST
from harness.errors import RunError
from harness.processes import clean_environment

from amst_core.testing.netlab import Host, Lab

AMST_PORT: Final = 9000
IPERF_PORT: Final = 5201
OTHER_PORT: Final = 5301
USERSPACE: Final = {"AMST_CONGESTION__BACKEND": "userspace", "AMST_CONGESTION__BASE": "cubic"}

_ESTABLISHED: Final = "01"  # as /proc/net/tcp writes it
_LOOK_S: Final = 0.1
_IN_BUFFERS: Final = 32 << 20
_START_LIMIT_S: Final = 30.0
_LIMIT_S: Final = 300.0


@dataclass(frozen=True)
class Load:
    """What is sent: ``size`` bytes, or for ``seconds``."""

    seconds: float | None = None
    size: int | None = None


@dataclass(frozen=True)
class Run:
    """One transfer.

    Attributes:
        mbits: payload, from the first byte offered to the last acknowledged; iperf3: at the receiver.
        seconds: in which time.
        bytes: how much arrived.
        congestion: what the kernel says that its connections ran, each name once.
        streams: how many there were at the end.
        trusted: whether the emulator kept its times.
        seen: what was measured beside it, by name.
    """

    mbits: float
    seconds: float
    bytes: int
    congestion: tuple[str, ...]
    streams: int
    trusted: bool = True
    seen: Mapping[str, float] = field(default_factory=dict)


class Sender(Protocol):
    """Something that sends. ``port`` is where its server listens, on the far host."""

    name: str
    port: int

    def send(self, lab: Lab, load: Load) -> Run:
        """One transfer, with a server of its own; `RunError` when it fails."""
        ...


class Amst:
    """`amst bench` with ``options``; ``variables`` are in the environment of client and server.

    ``expects`` is the congestion control that the kernel must say each stream has, with the backend that runs it.
    """

    port = AMST_PORT

    def __init__(
        self,
        name: str,
        *options: str,
        variables: Mapping[str, str] | None = None,
        expects: tuple[str, str] | None = None,
    ) -> None:
        self.name = name
        self._options = options
        self._variables = variables or {}
        self._expects = expects

    def send(self, lab: Lab, load: Load) -> Run:
        here, far = lab.hosts
        amount = ["--size", str(load.size)] if load.size is not None else ["--time", f"{load.seconds:g}s"]
        with tempfile.TemporaryDirectory() as state:
            env = clean_environment({"HOME": state, "AMST_STATE_DIR": state, **self._variables})
            with serving(far, self.port, [*AMST, "serve", "--listen", f"[::]:{self.port}"], env):
                url = f"amst://{far.address}:{self.port}"
                printed = client(here, [*AMST, "bench", "--json", *self._options, *amount, url], env)
        return parse_amst(printed, load, self._expects)


class UserspaceAmst(Amst):
    """`amst bench` paced in user space over the kernel's cubic."""

    def __init__(self, name: str, *options: str) -> None:
        super().__init__(name, *options, variables=USERSPACE, expects=("cubic", "userspace"))


class Iperf:
    """iperf3 with that congestion control (`-C`, read back) and so many connections."""

    port = IPERF_PORT

    def __init__(self, congestion: str, streams: int) -> None:
        self.name = f"iperf3 {congestion}×{streams}"
        self._congestion = congestion
        self._streams = streams

    def send(self, lab: Lab, load: Load) -> Run:
        here, far = lab.hosts
        if load.size is None:
            more = ["-t", f"{load.seconds:g}"]
        else:  # it ends when the last byte is in a buffer, not when it has arrived: send more, and see when it has
            more = ["-n", str(2 * load.size + _IN_BUFFERS), "-i", "0.1", "--get-server-output"]
        with serving(far, self.port, ["iperf3", "-s", "-1", "-J", "-i", "0.1", "-p", str(self.port)]):
            argv = ["iperf3", "-J", "-C", self._congestion, "-P", str(self._streams), "-p", str(self.port), *more]
            return parse_iperf(client(here, [*argv, "-c", far.address]), self._congestion, load)


PEERS: Final[Sequence[Iperf]] = [Iperf(name, streams) for name in ("cubic", "bbr") for streams in (1, 8)]


# ---- processes --------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(host: Host, port: int, argv: Sequence[str], env: Mapping[str, str] | None = None) -> Iterator[None]:
    """A server on ``host`` that listens, until the block ends."""
    server = host.popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: port in host.listening(), server, f"{argv[0]} listens on port {port}")
        yield
    finally:
        server.terminate()
        server.wait()


def client(host: Host, argv: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """What it printed."""
    done = host.run(argv, env=env, check=False, timeout=_LIMIT_S)
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        raise RunError(f"{' '.join(argv)} ended with {done.returncode}: {said[-500:]}")
    return str(done.stdout)


def until(condition: Callable[[], object], process: subprocess.Popen[Any], what: str) -> None:
    """Wait for ``condition`` while ``process`` runs.

    Raises:
        RunError: the process has ended, or it takes too long.
    """
    deadline = time.monotonic() + _START_LIMIT_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RunError(f"waited in vain until {what}")
        time.sleep(0.02)


def connected(host: Host, port: int) -> bool:
    """Whether a connection has been established to ``port`` of ``host``."""
    rows = (row.split() for table in ("tcp", "tcp6") for row in host.proc_net(table).splitlines()[1:])
    return any(int(row[1].rpartition(":")[2], 16) == port and row[3] == _ESTABLISHED for row in rows)


# ---- what they print --------------------------------------------------------------------------


def parse_amst(text: str, load: Load, expects: tuple[str, str] | None = None) -> Run:
    """What `amst bench --json` printed.

    Raises:
        RunError: it failed, not all bytes were acknowledged, or a stream has another congestion control or backend.
    """
    told = json.loads(text)
    if not told["ok"] or (load.size is not None and told["bytes"] != load.size):
        raise RunError(f"amst bench moved {told['bytes']} of {load.size} bytes: {told['error']}")
    ran = {(str(lane["congestion"]), str(lane["congestion_backend"])) for lane in told["lanes"]}
    if expects is not None and ran != {expects}:
        raise RunError(f"the streams were to run {expects}, and ran {sorted(ran)}")
    names = tuple(sorted({name for name, _ in ran}))
    return Run(told["throughput_bytes_per_s"] * 8e-6, told["seconds"], told["bytes"], names, len(told["lanes"]))


def parse_iperf(text: str, congestion: str, load: Load) -> Run:
    """What `iperf3 -J` printed, at the receiver; of a size, until so many bytes had arrived.

    Raises:
        RunError: another congestion control ran, or less arrived.
    """
    told = json.loads(text)
    end = told["end"]
    if end["sender_tcp_congestion"] != congestion:
        raise RunError(f"asked for {congestion}, iperf3 had {end['sender_tcp_congestion']}")
    got = end["sum_received"]
    streams = len(end["streams"])
    if load.size is None:
        return Run(got["bits_per_second"] / 1e6, got["seconds"], got["bytes"], (congestion,), streams)
    seconds = arrival(told["server_output_json"]["intervals"], load.size)
    return Run(load.size * 8e-6 / seconds, seconds, load.size, (congestion,), streams)


def arrival(intervals: Sequence[Mapping[str, Any]], size: int) -> float:
    """After how many seconds the receiver had ``size`` bytes.

    Raises:
        RunError: it never had.
    """
    total = 0
    for part in (interval["sum"] for interval in intervals):
        if part["bytes"] and total + part["bytes"] >= size:
            return float(part["start"] + (size - total) / part["bytes"] * (part["end"] - part["start"]))
        total += part["bytes"]
    raise RunError(f"iperf3 received {total} of {size} bytes")


# ---- beside it --------------------------------------------------------------------------------


class Watch:
    """During the block, what the far host has received in each moment; and ``then`` is done when it is due.

    Its clock starts with the first connection to ``port`` of the far host, so that starting programs does not count.

    Attributes:
        samples: seconds on that clock, and bytes of IP packets received since the lab began.
        done: when each of ``then`` (seconds, action; in order) was done.
    """

    def __init__(self, lab: Lab, port: int, then: Sequence[tuple[float, Callable[[], None]]] = ()) -> None:
        self.samples: list[tuple[float, int]] = []
        self.done: list[float] = []
        self._lab, self._port = lab, port
        self._then = then
        self._began: float | None = None
        self._failed: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if kind is None and self._failed is not None:
            raise RunError(f"could not watch the lab: {self._failed}") from self._failed
        if kind is None and self._began is None:
            raise RunError(f"nobody connected to port {self._port}")

    @property
    def began(self) -> float:
        """When the clock started, by `time.monotonic`."""
        if self._began is None:
            raise RunError("it has not begun")
        return self._began

    def _run(self) -> None:
        try:
            while not self._ended.is_set():
                self._look()
                self._ended.wait(_LOOK_S)
        except BaseException as err:  # told to the one who waits
            self._failed = err

    def _look(self) -> None:
        if self._began is None:
            if not connected(self._lab.hosts[1], self._port):
                return
            self._began = time.monotonic()
        now = time.monotonic() - self._began
        self.samples.append((now, self._lab.report().way("up").delivered_bytes))
        while len(self.done) < len(self._then) and now >= self._then[len(self.done)][0]:
            self._then[len(self.done)][1]()
            self.done.append(time.monotonic() - self._began)


@contextlib.contextmanager
def pinging(lab: Lab) -> Iterator[list[tuple[float, float]]]:
    """When (`time.monotonic`) each answer came and after how many seconds, ten times a second, until the block ends."""
    here, far = lab.hosts
    found: list[tuple[float, float]] = []
    argv = ["ping", "-i", "0.1", far.address]
    ping = here.popen(argv, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def read() -> None:
        for line in ping.stdout:
            if (match := re.search(r"time=([\d.]+)", line)) is not None:
                found.append((time.monotonic(), float(match[1]) / 1000))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield found
    finally:
        ping.terminate()
        reader.join()
        ping.wait()
