"""The process that carries a lab's packets: ``python -m amst_core.testing.netlab.emulator DESCRIPTOR``.

It makes the namespaces and the devices, holds them, and talks to the process that wants the lab over a socket of
packets (SOCK_SEQPACKET), JSON both ways. When that process is gone, however it ended, it kills what still runs in
the namespaces and ends; nothing of a lab has a name, so nothing is left.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from typing import Any, Final

from . import kernel, packets
from .pipe import QUANTUM_NS, Pipe

LATE_STEP_NS: Final = 10_000
LATE_STEPS: Final = 2000
"""Lateness is counted in steps of 10 µs; the last step holds all that is beyond 20 ms."""

MOST_READ: Final = 65_800

_READ_FOR_NS: Final = 100_000
_AWAKE_NS: Final = 1_000_000
_LONGEST_SLEEP_NS: Final = 10_000_000
_LOOK_AT_CONTROL_NS: Final = 2_000_000
_TX_QUEUE: Final = 20_000
_PRIORITY: Final = 10


@dataclass(eq=False, slots=True)
class _End:
    """A device in a namespace."""

    fd: int
    offload: bool


@dataclass(eq=False, slots=True)
class _Way:
    """A pipe, what it leads to, and how late its packets left."""

    pipe: Pipe
    out: _End | None
    late: list[int]
    late_total: int = 0
    late_most: int = 0
    refused: int = 0

    def percentile(self, part: float) -> float:
        """Seconds within which that part of the packets left, rounded up to a step."""
        wanted = part * self.pipe.delivered_packets
        for step, passed in enumerate(itertools.accumulate(self.late)):
            if passed >= wanted:
                edge = (step + 1) * LATE_STEP_NS if step < LATE_STEPS else self.late_most
                return min(edge, self.late_most) / 1e9
        return 0.0


class Emulator:
    """All links of a lab, carried by one thread."""

    def __init__(self, control: socket.socket, controller: int) -> None:
        self._control = control
        self._controller = controller
        self._gone = os.pidfd_open(controller)
        self._namespaces: list[int] = []
        self._ways: list[_Way] = []
        self._reads: list[tuple[int, _Way]] = []
        self._routes: dict[bytes, _Way] = {}
        self._longest_stall = 0
        self._realtime = False
        self._began = 0

    def build(self, plan: dict[str, Any]) -> None:
        """Make what the plan of `Lab` says, and hand the namespaces over."""
        home = kernel.current_namespace()
        ends: list[_End] = []
        try:
            for host in plan["hosts"]:
                kernel.new_namespace()
                self._namespaces.append(kernel.current_namespace())
                six = os.path.isdir("/proc/sys/net/ipv6")
                kernel.set_up("lo")
                if six:
                    for name, value in (("addr_gen_mode", "1"), ("router_solicitations", "0")):
                        kernel.set_sysctl(f"net.ipv6.conf.default.{name}", value)
                for name, value in host["sysctls"]:
                    try:
                        kernel.set_sysctl(name, value)
                    except OSError as err:
                        raise OSError(err.errno, f"cannot set {name} to {value!r}: {err.strerror}") from err
                for end in host["ends"]:
                    ends.append(_End(kernel.open_tun(end["device"], offload=end["offload"]), end["offload"]))
                    kernel.set_up(end["device"], mtu=end["mtu"], queue=_TX_QUEUE)
                    for address in end["addresses"]:
                        if six or ":" not in address:
                            kernel.add_address(end["device"], address)
        finally:
            kernel.enter(home)
            os.close(home)
        for number, way in enumerate(plan["ways"]):
            pipe = Pipe(way["values"], f"{plan['seed']}/{number}")
            made = _Way(pipe, None if way["to"] is None else ends[way["to"]], [0] * (LATE_STEPS + 1))
            self._ways.append(made)
            if way["from"] is not None:
                self._reads.append((ends[way["from"]].fd, made))
            self._routes.update((bytes.fromhex(address), made) for address in way["routes"])
        kernel.exact_timers()
        if plan["realtime"]:
            with contextlib.suppress(OSError):
                os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(_PRIORITY))
                self._realtime = True
        gc.freeze()
        gc.disable()  # nothing here is circular, and a collection would make packets late
        self._began = time.monotonic_ns()
        socket.send_fds(self._control, [json.dumps({"ok": True}).encode()], self._namespaces)

    def run(self) -> None:
        """Carry packets until told to stop or the controller is gone."""
        clock, sleep, read = time.monotonic_ns, time.sleep, os.read
        ways, reads = self._ways, self._reads
        watched = [self._control.fileno(), self._gone, *(fd for fd, _ in reads)]
        active = looked = clock()
        while True:
            began = now = clock()
            moved = False
            for way in ways:
                queue = way.pipe.queue
                while queue and queue[0][0] <= now:
                    self._deliver(way)
                    moved = True
            for fd, way in reads:
                offer = way.pipe.offer
                now = clock()
                enough = now + _READ_FOR_NS
                try:
                    while now < enough:
                        packet = read(fd, MOST_READ)
                        if packet[1] or not packets.is_multicast(packet):
                            offer(now, packet)
                            moved = True
                        now = clock()
                except BlockingIOError:
                    pass
            now = clock()
            if moved:
                active = now
            if now - looked > _LOOK_AT_CONTROL_NS:
                looked = now
                if not self._obey():
                    return
            due = min((way.pipe.queue[0].due for way in ways if way.pipe.queue), default=now + _LONGEST_SLEEP_NS)
            pause = max(0, min(due - now, _LONGEST_SLEEP_NS))
            if now - active < _AWAKE_NS:
                # Under load a look every 200 us costs less than being woken by every packet.
                pause = min(pause, QUANTUM_NS)
                sleep(pause / 1e9)
                woken = clock()
            else:
                ready, _, _ = select.select(watched, [], [], pause / 1e9)
                woken = clock()
                if self._gone in ready:
                    return
            self._longest_stall = max(self._longest_stall, woken - now - pause, now - began)

    def _deliver(self, way: _Way) -> None:
        pipe = way.pipe
        entry = pipe.queue.popleft()
        due, count = entry.due, entry.segments
        parts = entry.parts()
        late = time.monotonic_ns() - due
        way.late[min(late // LATE_STEP_NS, LATE_STEPS)] += count
        way.late_total += late * count
        if late > way.late_most:
            way.late_most = late
        pipe.delivered_packets += count
        pipe.delivered_bytes += entry.size
        if way.out is None:
            raw = b"".join(parts)
            onward = self._routes.get(packets.destination(raw))
            if onward is not None:
                # At the time it is due, not at the one it is looked at: lateness must not add up.
                onward.pipe.offer(due, raw)
            else:
                way.refused += 1
            return
        try:
            if way.out.offload:
                os.writev(way.out.fd, parts)
            else:
                for single in packets.plain(b"".join(parts)):
                    os.write(way.out.fd, single)
        except OSError:
            way.refused += 1

    def _obey(self) -> bool:
        """Answer what was asked; False when it is time to stop."""
        try:
            message = self._control.recv(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not message:
            return False
        request = json.loads(message)
        answer: dict[str, Any] = {"ok": True}
        match request["do"]:
            case "set":
                now = time.monotonic_ns()
                for number, values in request["ways"]:
                    self._ways[number].pipe.set(values, now)
            case "count":
                answer = self._counts()
            case "stop":
                answer = self._counts()
        self._control.send(json.dumps({**answer, "number": request["number"]}).encode())
        return bool(request["do"] != "stop")

    def _counts(self) -> dict[str, Any]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "seconds": (time.monotonic_ns() - self._began) / 1e9,
            "cpu_seconds": used.ru_utime + used.ru_stime,
            "realtime": self._realtime,
            "stall": self._longest_stall / 1e9,
            "ways": [
                {
                    "packets": way.pipe.packets,
                    "bytes": way.pipe.bytes,
                    "dropped_by_queue": way.pipe.dropped_by_queue,
                    "dropped_by_loss": way.pipe.dropped_by_loss,
                    "delivered_packets": way.pipe.delivered_packets,
                    "delivered_bytes": way.pipe.delivered_bytes,
                    "refused": way.refused,
                    "late_mean": way.late_total / 1e9 / max(1, way.pipe.delivered_packets),
                    "late_p99": way.percentile(0.99),
                    "late_max": way.late_most / 1e9,
                }
                for way in self._ways
            ],
        }

    def clear(self) -> None:
        """Kill what runs in the namespaces, until nothing does."""
        for _ in itertools.repeat(None, 50):
            # The controller may have a thread, even its main one, in there.
            found = set(kernel.processes_in(self._namespaces)) - {os.getpid(), self._controller}
            if not found:
                return
            for pid in found:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)


def main(descriptor: int) -> None:
    """Serve the controller at the other end of the socket."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the controller decides, and its end is seen
    control = socket.socket(fileno=descriptor)
    plan = json.loads(control.recv(1 << 20))
    emulator = Emulator(control, plan["controller"])
    try:
        emulator.build(plan)
        emulator.run()
    except OSError as err:
        told = {"error": err.strerror or str(err), "errno": err.errno}
        _tell(control, told)
    except Exception:
        _tell(control, {"error": traceback.format_exc()})
    finally:
        with contextlib.suppress(OSError):  # less urgent than what it kills
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        emulator.clear()
        control.close()


def _tell(control: socket.socket, answer: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        control.send(json.dumps(answer).encode(), socket.MSG_DONTWAIT)


if __name__ == "__main__":
    main(int(sys.argv[1]))
