"""A TCP proxy on loopback that spoils connections: told apart by their first bytes, control from lanes.

Frame headers of lanes are in the clear, also where payload is encrypted. So the proxy knows, from outside, which
spans of which transfers travelled, and can stop after a given number of payload bytes, to the byte.
"""

from __future__ import annotations

import contextlib
import enum
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

CONTROL: Final = "control"
LANE: Final = "lane"
UP: Final = "up"
"""From the client to the server."""
DOWN: Final = "down"

_PREAMBLE: Final = 8
_HEADER: Final = struct.Struct("!BBHIQQII")
_DATA: Final = 1
_READ: Final = 1 << 16


class Action(enum.Enum):
    """What becomes of bytes."""

    FORWARD = enum.auto()
    STALL = enum.auto()
    """They are not read: the sender's window fills."""
    SWALLOW = enum.auto()
    """They are read, and gone."""


@dataclass(frozen=True, slots=True)
class Sent:
    """The payload of one DATA frame that began to pass."""

    way: str
    transfer: int
    start: int
    end: int


class Proxy:
    """Forwards connections to ``server`` (host, port) until told otherwise. Any thread; `close` it."""

    def __init__(self, server: tuple[str, int]) -> None:
        self.server = server
        self.sent: list[Sent] = []
        self.links: list[_Link] = []
        self._lock = threading.RLock()
        self._new: dict[tuple[str, str], Action] = {}
        self._hold_at: dict[str, int] = {}
        self._passed = {UP: 0, DOWN: 0}
        self._wake, self._woken = socket.socketpair()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._moved_at = time.monotonic()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"amst://127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        """Close everything; ends the thread."""
        self._ended = True
        self._wake.send(b"x")
        self._thread.join(10)
        for link in list(self.links):
            link.close()
        for sock in (self._listener, self._wake, self._woken):
            sock.close()
        self._selector.close()

    # ---- what it knows -----------------------------------------------------------------------------

    def passed(self, way: str) -> int:
        """Payload bytes of DATA frames that were forwarded that way."""
        return self._passed[way]

    def alive(self, kind: str) -> int:
        """Connections of that kind that are open."""
        with self._lock:
            return sum(link.kind == kind for link in self.links)

    def spans(self, way: str) -> list[tuple[int, int, int]]:
        """(transfer, start, end) of the DATA frames that began to pass that way."""
        with self._lock:
            return [(sent.transfer, sent.start, sent.end) for sent in self.sent if sent.way == way]

    @property
    def quiet_s(self) -> float:
        """How long nothing has passed."""
        return time.monotonic() - self._moved_at

    @property
    def holding(self) -> bool:
        """Whether a `hold` has been reached."""
        with self._lock:
            return any(self._passed[way] >= at for way, at in self._hold_at.items())

    # ---- what it does ------------------------------------------------------------------------------

    def treat(self, action: Action, kind: str, *ways: str, new: bool = False) -> None:
        """Do that to the open connections of ``kind``; with ``new`` to later ones as well."""
        with self._lock:
            for way in ways or (UP, DOWN):
                for link in self.links:
                    if link.kind == kind:
                        link.flows[way].treat(action)
                if new:
                    self._new[kind, way] = action
        self._wake.send(b"x")

    def hold(self, way: str, at: int) -> None:
        """Let ``at`` payload bytes pass that way, then stall the lanes that way, new ones too."""
        with self._lock:
            self._hold_at[way] = at

    def unhold(self) -> None:
        """Forget `hold`; what it stalled goes on."""
        with self._lock:
            for way in self._hold_at:
                self.treat(Action.FORWARD, LANE, way)
            self._hold_at.clear()

    def release(self) -> None:
        """Forward everything that is not swallowed, from now on."""
        with self._lock:
            self._hold_at.clear()
            self._new.clear()
            for link in self.links:
                for flow in link.flows.values():
                    if flow.action is Action.STALL:
                        flow.action = Action.FORWARD
        self._wake.send(b"x")

    def reset(self, kind: str, most: int = 1 << 30) -> int:
        """Reset ``most`` open connections of ``kind``, the busiest first; how many that were."""
        with self._lock:
            found = sorted((link for link in self.links if link.kind == kind), key=lambda link: -link.moved)[:most]
            for link in found:
                link.doomed = True
        self._wake.send(b"x")
        return len(found)

    # ---- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._ended:
            ready = self._selector.select(0.5)
            with self._lock:
                for key, mask in ready:
                    if key.fileobj is self._woken:
                        self._woken.recv(4096)
                    elif key.fileobj is self._listener:
                        self._accept()
                    elif key.data in self.links:
                        key.data.move(key.fileobj, mask)
                for link in list(self.links):
                    if link.doomed:
                        link.close(reset=True)
                        self.links.remove(link)
                    elif link.ended:
                        link.close()
                        self.links.remove(link)
                    else:
                        link.watch()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(self.server, 5)
        except OSError:
            _reset(client)
            return
        self.links.append(_Link(self, client, server))

    def _allow(self, flow: _Flow, data: bytes) -> int:
        """Follow the frames in ``data``; how many of its bytes may pass, before a `hold` is reached."""
        at, size = 0, len(data)
        while at < size:
            if flow.skip:
                step = min(flow.skip, size - at)
                if flow.in_data:
                    limit = self._hold_at.get(flow.way)
                    if limit is not None:
                        step = min(step, limit - self._passed[flow.way])
                        if step <= 0:
                            flow.action = Action.STALL
                            return at
                    self._passed[flow.way] += step
                flow.skip -= step
                at += step
                continue
            step = min(_HEADER.size - len(flow.header), size - at)
            flow.header += data[at : at + step]
            at += step
            if len(flow.header) == _HEADER.size:
                _, kind, _, _, transfer, offset, length, wire_length = _HEADER.unpack(flow.header)
                flow.header = b""
                flow.skip, flow.in_data = wire_length, kind == _DATA
                if flow.in_data:
                    self.sent.append(Sent(flow.way, transfer, offset, offset + length))
        return at


class _Flow:
    """One direction of a connection."""

    def __init__(self, way: str, source: socket.socket, sink: socket.socket) -> None:
        self.way, self.source, self.sink = way, source, sink
        self.action = Action.FORWARD
        self.waiting = b""  # read, and not allowed or not possible to write yet
        self.allowed = 0  # of that, what may be written
        self.skip = 0  # bytes until the next frame header
        self.in_data = False
        self.header = b""
        self.eof = False

    def treat(self, action: Action) -> None:
        self.action = action
        if action is Action.SWALLOW:  # also what was read already
            self.waiting, self.allowed = b"", 0


class _Link:
    """A connection of a client and the one to the server that belongs to it."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._sockets = (client, server)
        self.kind = ""  # until the first bytes tell
        self.moved = 0
        self.doomed = False
        self.ended = False
        self.flows = {UP: _Flow(UP, client, server), DOWN: _Flow(DOWN, server, client)}
        self._watched: dict[socket.socket, int] = {}
        for sock in self._sockets:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def watch(self) -> None:
        """Wait for what can be done: nothing is read that cannot be passed on."""
        wanted = dict.fromkeys(self._sockets, 0)
        for flow in self.flows.values():
            if flow.action is Action.STALL or flow.eof:
                continue
            if not flow.waiting or not self.kind or flow.action is Action.SWALLOW:
                wanted[flow.source] |= selectors.EVENT_READ
            if flow.waiting and self.kind:
                wanted[flow.sink] |= selectors.EVENT_WRITE
        for sock, mask in wanted.items():
            before = self._watched.get(sock, 0)
            if mask != before:
                if not before:
                    self._proxy._selector.register(sock, mask, self)
                elif mask:
                    self._proxy._selector.modify(sock, mask, self)
                else:
                    self._proxy._selector.unregister(sock)
                self._watched[sock] = mask

    def move(self, sock: object, mask: int) -> None:
        try:
            for flow in self.flows.values():
                if flow.action is Action.STALL:
                    continue
                if flow.source is sock and mask & selectors.EVENT_READ:
                    self._read(flow)
                elif flow.sink is sock and mask & selectors.EVENT_WRITE:
                    self._write(flow)
        except BlockingIOError:
            pass
        except OSError:
            self.doomed = True  # what breaks on one side breaks on the other

    def _read(self, flow: _Flow) -> None:
        data = flow.source.recv(_READ)
        if flow.action is Action.SWALLOW:
            flow.eof = not data
            return
        if not data:
            flow.eof = True
            if not flow.waiting:
                flow.sink.shutdown(socket.SHUT_WR)
            self.ended = all(other.eof for other in self.flows.values())
            return
        flow.waiting += data
        if not self.kind:
            if flow.way == DOWN or len(flow.waiting) < _PREAMBLE:
                return
            self._tell()
            if flow.action is Action.STALL:
                return
        self._write(flow)

    def _tell(self) -> None:
        first = self.flows[UP].waiting
        self.kind = CONTROL if first[:2] == b"\x16\x03" else LANE
        if self.kind == LANE:
            assert first[:5] == b"AMSTL", first
            self.flows[UP].skip = _PREAMBLE
        for way, flow in self.flows.items():
            flow.action = self._proxy._new.get((self.kind, way), Action.FORWARD)

    def _write(self, flow: _Flow) -> None:
        if self.kind == LANE and len(flow.waiting) > flow.allowed:
            flow.allowed += self._proxy._allow(flow, flow.waiting[flow.allowed :])
        elif self.kind == CONTROL:
            flow.allowed = len(flow.waiting)
        if flow.allowed:
            done = flow.sink.send(flow.waiting[: flow.allowed])
            flow.waiting = flow.waiting[done:]
            flow.allowed -= done
            self.moved += done
            self._proxy._moved_at = time.monotonic()
        if flow.eof and not flow.waiting:
            flow.sink.shutdown(socket.SHUT_WR)

    def close(self, *, reset: bool = False) -> None:
        for sock in self._sockets:
            if self._watched.pop(sock, 0):
                self._proxy._selector.unregister(sock)
            _reset(sock) if reset else sock.close()


def _reset(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@contextlib.contextmanager
def proxied(address: str) -> Iterator[Proxy]:
    """A proxy before the server at ``address`` (HOST:PORT)."""
    host, _, port = address.rpartition(":")
    proxy = Proxy((host, int(port)))
    try:
        yield proxy
    finally:
        proxy.close()
