"""One broken transport for each rule of transports: one in memory, with one fault that some author might leave in."""

from __future__ import annotations

import os
import secrets
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from broken_lanes import HANG_S

from amst_core.errors import BrokenError, ConnectError
from amst_core.interfaces import (
    PREAMBLE,
    PREAMBLE_MAGIC,
    Advertisement,
    Candidate,
    Endpoint,
    Lane,
    LaneRequest,
    LaneTimeouts,
)
from amst_core.testing.memory import MemoryLane, MemoryNetwork, MemoryTransport, memory_lane_pair

KEY_SIZE = 8

MUTANTS: dict[str, type[MemoryTransport]] = {}


def breaks(rule: str) -> Any:
    def add(transport: type[MemoryTransport]) -> type[MemoryTransport]:
        assert rule not in MUTANTS
        MUTANTS[rule] = transport
        return transport

    return add


class Network(MemoryNetwork):
    """What the transports of one trial share: theirs only."""

    def __init__(self) -> None:
        super().__init__()
        self.far_ends: dict[bytes, Lane] = {}
        self.deliver: Callable[[Lane], None] | None = None


class AdoptingTransport(MemoryTransport):
    """Keeps every rule, and lives on the core's TCP listener: a connection only says which lane in memory it means."""

    name = "adopting"
    _network: Network

    def advertise(self, tag: int, deliver: Callable[[Lane], None]) -> Advertisement:
        return Advertisement(self.name, tag)

    def connect(self, request: LaneRequest, timeouts: LaneTimeouts) -> Lane:
        key = secrets.token_bytes(KEY_SIZE)
        near, self._network.far_ends[key] = memory_lane_pair(timeouts)
        try:
            with socket.create_connection((request.host, request.port), request.timeout_s) as sock:
                sock.sendall(request.preamble + key)
        except OSError as err:
            raise ConnectError(f"cannot connect to {request.host}:{request.port}: {err}") from err
        return near

    def adopt(self, sock: socket.socket, timeouts: LaneTimeouts) -> Lane:
        with sock:
            try:
                key = sock.recv(KEY_SIZE, socket.MSG_WAITALL)
            except OSError as err:
                raise BrokenError(f"the connection is gone: {err}") from err
        return self._network.far_ends.pop(key)


# ---- what it says of itself -----------------------------------------------------------------------


@breaks("says-who-it-is")
class AnotherVersion(MemoryTransport):
    api_version = 2


@breaks("construction-is-cheap")
class OpensAtOnce(MemoryTransport):
    def __init__(self, network: MemoryNetwork) -> None:
        super().__init__(network)
        self.device = os.open("/dev/null", os.O_RDONLY)

    def close(self) -> None:
        super().close()
        if self.device >= 0:
            os.close(self.device)
            self.device = -1


@breaks("probe-never-raises")
class ProbeResolves(MemoryTransport):
    def probe(self, peer: Endpoint | None) -> Candidate:
        if peer is not None and peer.host.endswith(".invalid"):
            raise OSError("Name or service not known")
        return super().probe(peer)


@breaks("probe-is-quick")
class ProbeConnects(MemoryTransport):
    def probe(self, peer: Endpoint | None) -> Candidate:
        if peer is not None and peer.host.startswith("192.0.2."):
            time.sleep(HANG_S)
        return super().probe(peer)


@breaks("candidate-says-why")
class NoReason(MemoryTransport):
    def probe(self, peer: Endpoint | None) -> Candidate:
        return Candidate(self.name, True, "")


@breaks("advertisement-names-it")
class ItsOwnTag(MemoryTransport):
    def advertise(self, tag: int, deliver: Callable[[Lane], None]) -> Advertisement:
        return replace(super().advertise(tag, deliver), tag=1)


# ---- lanes ----------------------------------------------------------------------------------------


class OneWay(MemoryLane):
    def send_frame(self, header: bytes, payload: memoryview) -> None:
        pass


@breaks("lanes-are-joined")
class OneWayLanes(MemoryTransport):
    def advertise(self, tag: int, deliver: Callable[[Lane], None]) -> Advertisement:
        def deliver_mute(lane: Lane) -> None:
            lane.__class__ = OneWay
            deliver(lane)

        return super().advertise(tag, deliver_mute)


@breaks("preamble-comes-first")
class ItsOwnPreamble(AdoptingTransport):
    def connect(self, request: LaneRequest, timeouts: LaneTimeouts) -> Lane:
        return super().connect(replace(request, preamble=PREAMBLE.pack(PREAMBLE_MAGIC, 1)), timeouts)


@breaks("lanes-are-separate")
class PoolsLanes(MemoryTransport):
    opened: tuple[Lane, ...] = ()

    def connect(self, request: LaneRequest, timeouts: LaneTimeouts) -> Lane:
        lane = super().connect(request, timeouts)
        self.opened += (lane,)
        return lane if len(self.opened) <= 4 else self.opened[0]


@breaks("connect-from-any-thread")
class OneAttemptAtATime(MemoryTransport):
    connecting = False

    def connect(self, request: LaneRequest, timeouts: LaneTimeouts) -> Lane:
        if self.connecting:
            raise ConnectError("another attempt is under way")
        self.connecting = True
        try:
            time.sleep(0.05)
            return super().connect(request, timeouts)
        finally:
            self.connecting = False


@breaks("listeners-are-separate")
class OneListener(MemoryTransport):
    _network: Network

    def advertise(self, tag: int, deliver: Callable[[Lane], None]) -> Advertisement:
        def deliver_to_the_last(lane: Lane) -> None:
            assert self._network.deliver is not None
            self._network.deliver(lane)

        self._network.deliver = deliver
        return super().advertise(tag, deliver_to_the_last)


@breaks("slow-deliver-holds-up-nobody")
class DeliversItself(MemoryTransport):
    def connect(self, request: LaneRequest, timeouts: LaneTimeouts) -> Lane:
        near, far = memory_lane_pair(timeouts)
        self._network.listener(request.advertisement.address, request.timeout_s)(far)
        return near


@breaks("deliver-may-raise")
class ListenerDiesOfIt(MemoryTransport):
    def advertise(self, tag: int, deliver: Callable[[Lane], None]) -> Advertisement:
        dead = False

        def fragile(lane: Lane) -> None:
            nonlocal dead
            if dead:
                return
            try:
                deliver(lane)
            except Exception:
                dead = True
                raise

        return super().advertise(tag, fragile)


# ---- no lane --------------------------------------------------------------------------------------


@breaks("connect-keeps-its-deadline")
class WaitsAsLongAsItTakes(MemoryTransport):
    def connect(self, request: LaneRequest, timeouts: LaneTimeouts) -> Lane:
        return super().connect(replace(request, timeout_s=HANG_S), timeouts)


@breaks("refusal-is-a-connect-error")
class BareErrors(MemoryTransport):
    def connect(self, request: LaneRequest, timeouts: LaneTimeouts) -> Lane:
        try:
            return super().connect(request, timeouts)
        except ConnectError as err:
            if "nobody listens" in str(err):
                raise ConnectionRefusedError(str(err)) from err
            raise


@breaks("connect-error-says-what-was-tried")
class SaysNothing(MemoryTransport):
    def connect(self, request: LaneRequest, timeouts: LaneTimeouts) -> Lane:
        try:
            return super().connect(request, timeouts)
        except ConnectError as err:
            raise ConnectError("connection refused") from err


@breaks("adopts-nothing-with-own-listener")
class AdoptsAnything(MemoryTransport):
    def adopt(self, sock: socket.socket, timeouts: LaneTimeouts) -> Lane:
        return memory_lane_pair(timeouts)[0]


@breaks("dead-connection-is-an-amst-error")
class AdoptRaisesBareErrors(AdoptingTransport):
    def adopt(self, sock: socket.socket, timeouts: LaneTimeouts) -> Lane:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 60, 0))
        sock.getpeername()
        return super().adopt(sock, timeouts)


# ---- the end of a transport -----------------------------------------------------------------------


@breaks("lanes-outlive-their-transport")
class TakesItsLanesAlong(MemoryTransport):
    opened: tuple[Lane, ...] = ()

    def connect(self, request: LaneRequest, timeouts: LaneTimeouts) -> Lane:
        self.opened += (super().connect(request, timeouts),)
        return self.opened[-1]

    def close(self) -> None:
        super().close()
        for lane in self.opened:
            lane.abort()


@breaks("close-stops-listening")
class ListensOn(MemoryTransport):
    used = False

    def advertise(self, tag: int, deliver: Callable[[Lane], None]) -> Advertisement:
        def noted(lane: Lane) -> None:
            self.used = True
            deliver(lane)

        return super().advertise(tag, noted)

    def close(self) -> None:
        if not self.used:
            super().close()


@breaks("transport-close-idempotent")
class ClosesOnce(MemoryTransport):
    closed = False

    def close(self) -> None:
        if self.closed:
            raise OSError("already closed")
        self.closed = True
        super().close()


@breaks("close-releases-everything")
class KeepsItsListener(MemoryTransport):
    kept: list[int] = []  # noqa: RUF012  (the test closes them)

    def advertise(self, tag: int, deliver: Callable[[Lane], None]) -> Advertisement:
        self.kept.append(os.open("/dev/null", os.O_RDONLY))
        return super().advertise(tag, deliver)
