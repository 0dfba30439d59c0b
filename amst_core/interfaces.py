"""The plugin boundary: what a plugin implements (ABCs) and what crosses it (frozen dataclasses).

Standard library only, so that a plugin can be read and tested with this one module beside it. A transport
moves opaque frames; it never parses one, never sees a key and never touches a file's name.
"""

from __future__ import annotations

import enum
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import ClassVar, Final, Self, TypeAlias

from .errors import BrokenError, ProtocolError, UnavailableError

API_VERSION: Final = 1
"""Version of this boundary. A plugin object whose ``api_version`` differs is refused by name."""

HEADER_SIZE: Final = 32
"""Bytes of a frame header on every lane (docs/wire-format.md)."""


# ---- values -------------------------------------------------------------------------------


class Capability(enum.Flag):
    """What a transport can do beyond moving frames."""

    NONE = 0
    SECURE = enum.auto()
    """Its lanes encrypt and authenticate by themselves; the core then skips its own AEAD."""
    FILE_SPAN = enum.auto()
    """Its lanes have a `Lane.send_span` of their own, which copies less than reading and `Lane.send_frame` do."""


Placer: TypeAlias = Callable[[memoryview], memoryview]
"""Given a frame's header (valid during the call only), says where its payload goes and how long it is.

A transport fills the view to its last byte before ``recv_frame`` returns, and writes nowhere else."""


@dataclass(frozen=True, slots=True)
class FileSpan:
    """A payload that lies in an open file: ``nbytes`` of ``fd`` from ``offset`` on. Its position is left alone.

    ``read(offset, view)`` fills a view with the file's bytes from an offset of the file on, for where the system cannot
    send them by itself. It never raises: what the file does not have (any more), or cannot give, reads as zeros, and
    whoever made the span then knows.
    """

    fd: int
    offset: int
    nbytes: int
    read: Callable[[int, memoryview], None]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A parsed ``scheme://host:port``: where a peer's control listener is."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Advertisement:
    """How to reach one transport of the peer.

    ``tag`` is the number by which the peer's listener knows the transport; ``address`` is empty for a
    transport that lives on the core's TCP listener, otherwise the transport's own form of address.
    """

    transport: str
    tag: int
    address: str = ""


@dataclass(frozen=True, slots=True)
class LaneRequest:
    """What a transport needs to open one lane.

    ``host`` and ``port`` are where the control connection reached the peer. ``preamble`` must be the first
    bytes on a connection made to the core's TCP listener; a transport with its own listener ignores it.
    """

    advertisement: Advertisement
    host: str
    port: int
    preamble: bytes
    timeout_s: float


@dataclass(frozen=True, slots=True)
class LaneTimeouts:
    """Time limits of a lane's I/O, in seconds.

    ``read_s`` bounds a pause in the middle of a frame (an idle lane may wait for ever), ``write_s`` a send
    that makes no progress, ``unacknowledged_s`` how long sent bytes may stay unacknowledged by the
    peer's kernel, ``keepalive_s`` the idle time before the first keepalive probe.
    """

    read_s: float = 60.0
    write_s: float = 60.0
    unacknowledged_s: float = 120.0
    keepalive_s: float = 30.0


@dataclass(frozen=True, slots=True)
class PathStats:
    """What a lane knows about its path. None means unknown, which is not zero.

    Times in seconds, rates in bytes/s, ``cwnd`` in bytes; counters are totals since the lane opened.
    ``bytes_acknowledged`` and ``bytes_received`` tell progress inside a frame, ``bytes_waiting`` what is on its way
    and not acknowledged by the peer's end of the transport (not by the peer's program), without what the peer has no
    room for now: by these three the core tells a dead path from a peer that is busy. ``peer_limited_s``: for so long in
    all the peer had no room for more.
    """

    rtt_s: float | None = None
    min_rtt_s: float | None = None
    cwnd: int | None = None
    pacing_rate: float | None = None
    delivery_rate: float | None = None
    app_limited: bool | None = None
    segments_sent: int | None = None
    segments_retransmitted: int | None = None
    bytes_retransmitted: int | None = None
    bytes_acknowledged: int | None = None
    bytes_received: int | None = None
    bytes_waiting: int | None = None
    peer_limited_s: float | None = None
    mss: int | None = None
    congestion: str | None = None


@dataclass(frozen=True, slots=True)
class FlowSample:
    """What a lane's sending half has done so far and how it stands, for who paces a session by it.

    Sizes in bytes, times in seconds; ``delivered``, ``sent`` and ``lost`` are totals since the lane opened.

    Attributes:
        delivered: acknowledged by the peer's end of the transport, in order or not.
        sent: handed to the path, what went again included; ``lost``: what went again.
        in_flight: on its way, as far as the sender knows.
        window: how much the lane's own congestion control lets be in flight.
        unsent: what waits in the lane for room in the window, or for its turn.
        rtt_s: the smoothed round trip; ``min_rtt_s``: the shortest that the lane remembers.
        mss: payload of a full segment.
    """

    delivered: int
    sent: int
    lost: int
    in_flight: int
    window: int
    unsent: int
    rtt_s: float
    min_rtt_s: float
    mss: int


@dataclass(frozen=True, slots=True)
class CongestionInForce:
    """Which congestion control limits what a lane sends.

    Attributes:
        asked: the controller that was asked for.
        algorithm: the one in force by its name in the system, as that reads back; None where there is none to be read.
        backend: who limits the lane, ``kernel`` or ``userspace``; None where there is none.
        reason: why this one; what refused the others.
        controller: the plugin that paces the session in user space, on top of ``algorithm``; None in the kernel.
    """

    asked: str
    algorithm: str | None
    backend: str | None
    reason: str
    controller: str | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """What `Transport.probe` found: would it work here, how well, and why (not)."""

    transport: str
    usable: bool
    reason: str
    score: float = 0.0
    facts: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AckSample:
    """One acknowledgement as a congestion controller sees it. Times in seconds, sizes in bytes.

    The newest acknowledged packet is the one that was sent last of those that this acknowledgement covers.

    Attributes:
        now: when the acknowledgement arrived.
        sent_at: when the newest acknowledged packet left.
        acked: what it acknowledges for the first time, selectively or not.
        lost: what is taken for lost at this acknowledgement; ``on_loss`` has told of it before. What a timer finds
            between acknowledgements only ``on_loss`` tells of, so the sum of these is not all that was lost.
        rtt: of the newest acknowledged packet, None where it cannot be told (it was sent twice).
        in_flight: what is under way now; ``prior_in_flight`` what was before this acknowledgement.
        delivered: all that was ever acknowledged, ``acked`` included; ``prior_delivered`` the same when the newest
            acknowledged packet left. The difference is what was delivered during its round trip.
        delivery_rate: bytes/s, None when the sample allows no estimate (`amst_core.congestion`).
        app_limited: the newest acknowledged packet left while the sender had nothing more to send, so the rate
            may be below what the path allows.
        round_start: the newest acknowledged packet left after the last round trip began: a new one begins.
        ecn_ce: bytes of ``acked`` that were marked as having met congestion (RFC 3168).
    """

    now: float
    sent_at: float
    acked: int
    lost: int
    rtt: float | None
    in_flight: int
    prior_in_flight: int
    delivered: int
    prior_delivered: int
    delivery_rate: float | None
    app_limited: bool
    round_start: bool
    ecn_ce: int = 0


@dataclass(frozen=True, slots=True)
class PathSample:
    """One observation of a path by the core, for a `ModeDetector`: what was seen in about half a second.

    ``latency_s`` is the shortest round trip; ``bandwidth`` goodput in bytes/s, None when nothing limited it but the
    application, the peer or a limit that was asked for; ``loss`` the share of segments that went again, None when too
    few were sent to tell.
    """

    latency_s: float | None
    bandwidth: float | None
    loss: float | None


class Mode(enum.Enum):
    """Which profile carries the transfers."""

    DATACENTER = "datacenter"
    INTERNET = "internet"
    HYBRID = "hybrid"


@dataclass(frozen=True, slots=True)
class ModeDecision:
    """A detector's answer, its ``reason`` for people in one line.

    ``tier`` is 1–4 by latency (requirements F5), None while that is not known.
    """

    mode: Mode
    tier: int | None
    reason: str


# ---- what a transport plugin writes -------------------------------------------------------


class Lane(ABC):
    """One full-duplex pipe between two peers that keeps frames whole and in order.

    Thread rules: at most one thread sends and one receives at a time; ``close``, ``abort`` and the
    statistics may be called from any thread. After an exception from ``send_frame`` or ``recv_frame`` the
    lane is dead: the core aborts it and never uses it again.
    """

    @abstractmethod
    def send_frame(self, header: bytes, payload: memoryview) -> None:
        """Send ``header`` (`HEADER_SIZE` bytes) and ``payload`` whole, blocking while the path is full.

        Once it has returned, the payload's memory may be used for something else.

        Raises:
            ClosedError: this side closed or aborted the lane.
            BrokenError: the peer or the path is gone, or nothing moved for the write timeout.
        """

    def send_span(self, header: bytes, span: FileSpan) -> None:
        """As `send_frame`, with a payload that lies in a file. Here it is read into memory first.

        The core calls it where the transport declares `Capability.FILE_SPAN`. The frame is as long as it says,
        whatever becomes of the file meanwhile: what the system does not send of it comes from ``span.read``. The peer
        may get bytes that are written to the file after this has returned.
        """
        view = memoryview(bytearray(span.nbytes))
        span.read(span.offset, view)
        self.send_frame(header, view)

    @abstractmethod
    def recv_frame(self, place: Placer) -> bytes | None:
        """Wait for a frame, put its payload where ``place`` says; return its header, None at a clean end.

        An exception from ``place`` is passed on unchanged.

        Raises:
            ClosedError: this side closed or aborted the lane.
            BrokenError: the connection ended inside a frame, or paused there past the read timeout.
        """

    @abstractmethod
    def close(self) -> None:
        """Let what was sent reach the peer, then close. Idempotent, returns at once, wakes a blocked receiver."""

    @abstractmethod
    def abort(self) -> None:
        """Drop everything now and wake blocked threads. Idempotent, never blocks, never raises.

        The peer gets `BrokenError`, never a clean end.
        """

    def set_congestion(self, algorithm: str) -> str:
        """Have the system limit what this lane sends by its ``algorithm``, from now on; any thread.

        Returns the name of the one in force, read back. Here there is none.

        Raises:
            UnavailableError: the system refuses; says why, and what to do. What was in force stays.
            ClosedError: this side closed or aborted the lane.
        """
        raise UnavailableError(f"{self.description}: this kind of lane has no congestion control of the system's")

    def set_pacing(self, rate: float | None) -> None:
        """Spread what this lane sends so that it is at most ``rate`` bytes/s, from now on; None: no limit. Any thread.

        It holds over any time longer than a few segments take, and never blocks who sets it. Here there is no pacing.

        Raises:
            UnavailableError: this kind of lane cannot be paced.
            ClosedError: this side closed or aborted the lane.
        """
        raise UnavailableError(f"{self.description}: this kind of lane cannot be paced")

    def limit_unsent(self, nbytes: int) -> None:
        """Have about so many bytes at most wait in the lane for room in its window, from now on; any thread.

        What waits there no other lane can take over. A wish: a lane that cannot may leave things as they are; never
        raises.
        """

    def flow_sample(self) -> FlowSample | None:
        """How the sending half stands, cheap enough for a hundred calls a second; None where it is not known."""
        return None

    def path_stats(self) -> PathStats:
        """Statistics of the path, cheap enough for ten calls a second; never raises."""
        return PathStats()

    @property
    def description(self) -> str:
        """The two ends in a form a person can look up (``ss -t``), for logs and error messages."""
        return type(self).__name__

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


class StreamLane(Lane):
    """Frames over any byte stream: a stream transport fills in `write` and `read_into`."""

    def __init__(self) -> None:
        self._header = bytearray(HEADER_SIZE)
        self._header_view = memoryview(self._header)

    @abstractmethod
    def write(self, parts: Sequence[memoryview]) -> int:
        """Write some of ``parts`` (gathered, none empty), at least one byte; return how many went out."""

    @abstractmethod
    def read_into(self, view: memoryview, *, idle: bool) -> int:
        """Read at least one byte into ``view``; 0 means the peer finished.

        ``idle`` is true between frames, where waiting is legitimate; otherwise the read timeout applies.
        """

    def send_frame(self, header: bytes, payload: memoryview) -> None:
        self.write_whole([memoryview(header), payload] if payload.nbytes else [memoryview(header)])

    def write_whole(self, parts: list[memoryview]) -> None:
        """Write all of ``parts`` (none empty), which is used up."""
        left = sum(part.nbytes for part in parts)
        while True:
            done = self.write(parts)
            left -= done
            if not left:
                return
            while done >= parts[0].nbytes:
                done -= parts.pop(0).nbytes
            parts[0] = parts[0][done:]

    def recv_frame(self, place: Placer) -> bytes | None:
        if not self._fill(self._header_view, idle=True):
            return None
        target = place(self._header_view)
        if target.nbytes:
            self._fill(target, idle=False)
        return bytes(self._header)

    def _fill(self, view: memoryview, *, idle: bool) -> bool:
        got, size = 0, view.nbytes
        while got < size:
            step = self.read_into(view[got:] if got else view, idle=idle and not got)
            if not step:
                if idle and not got:
                    return False
                raise BrokenError("the peer closed the connection inside a frame")
            got += step
        return True


class Transport(ABC):
    """A way to open lanes to a peer. Construction is cheap and touches no device."""

    name: ClassVar[str]
    api_version: ClassVar[int] = API_VERSION
    capabilities: ClassVar[Capability] = Capability.NONE

    @abstractmethod
    def probe(self, peer: Endpoint | None) -> Candidate:
        """Say whether this transport would work here (towards ``peer`` if given). Never raises, quick."""

    @abstractmethod
    def advertise(self, tag: int, deliver: Callable[[Lane], None]) -> Advertisement:
        """Make this side reachable and say how.

        A transport with a listener of its own starts it now and hands each new lane to ``deliver`` (any
        thread). ``deliver`` lets the lane prove itself: it may take as long as a handshake, in which other
        lanes must not wait, and it may raise, which costs that lane only (it is aborted by then). A transport that
        lives on the core's TCP listener only answers; its lanes come through `adopt`.
        """

    @abstractmethod
    def connect(self, request: LaneRequest, timeouts: LaneTimeouts) -> Lane:
        """Open one lane to the peer.

        Raises:
            ConnectError: the peer cannot be reached within ``request.timeout_s``; says what was tried.
        """

    def adopt(self, sock: socket.socket, timeouts: LaneTimeouts) -> Lane:
        """Turn a connection that the core's listener accepted (preamble already read) into a lane.

        Raises:
            ProtocolError: this transport takes no connections from the core's listener.
        """
        raise ProtocolError(f"transport {self.name!r} takes no connections from the TCP listener")

    @abstractmethod
    def close(self) -> None:
        """Release listeners, devices and threads. Idempotent. Lanes already handed out live on."""


# ---- congestion control, modes, metrics ---------------------------------------------------


class CongestionController(ABC):
    """A pure state machine: no clock, no I/O, no logging. ``now`` is passed in; bytes and seconds."""

    name: ClassVar[str]
    api_version: ClassVar[int] = API_VERSION
    kernel_name: ClassVar[str | None] = None
    """What TCP_CONGESTION calls this algorithm, None when no kernel has it."""

    @property
    @abstractmethod
    def window(self) -> int:
        """Bytes that may be in flight (cwnd)."""

    @property
    @abstractmethod
    def pacing_rate(self) -> float | None:
        """Bytes/s, or None to let the pacer use window / smoothed RTT."""

    @abstractmethod
    def on_sent(self, *, now: float, size: int, in_flight: int, app_limited: bool) -> None:
        """``size`` bytes left; ``in_flight`` counts them."""

    @abstractmethod
    def on_ack(self, sample: AckSample) -> None:
        """Bytes were acknowledged."""

    @abstractmethod
    def on_loss(self, *, now: float, sent_at: float, lost: int, in_flight: int, persistent: bool) -> None:
        """``lost`` bytes are gone, the newest of them sent at ``sent_at``; ``in_flight`` counts them no more.

        ``sent_at`` lets a controller react once per round trip: what left before it last reacted says nothing new.
        ``persistent``: nothing came back for so long that what is known of the path is out of date (a retransmission
        timeout of TCP; RFC 9002 7.6).
        """

    def on_spurious_loss(self, *, now: float) -> None:
        """What ``on_loss`` told of since the last congestion event has arrived after all (RFC 4015, RFC 9438 4.9)."""

    @abstractmethod
    def state(self) -> Mapping[str, float | str]:
        """The controller's variables for metrics and traces (``ssthresh``, ``btl_bw``, ``mode``...).

        Every controller has ``algorithm``, ``cwnd``, ``ssthresh``, ``rtt``, ``min_rtt``, ``bandwidth`` (the last
        sample), ``max_bandwidth``, ``in_flight``, ``sent``, ``acked``, ``lost`` (bytes), ``loss_rate`` (lost / sent)
        and ``pacing_rate``; what it does not know is not there. Seconds, bytes, bytes/s.
        """


class ModeDetector(ABC):
    """Decides which mode fits a path. Pure: ``now`` is passed in. Must have hysteresis."""

    name: ClassVar[str]
    api_version: ClassVar[int] = API_VERSION

    @abstractmethod
    def update(self, sample: PathSample, *, now: float) -> ModeDecision:
        """Take one sample and answer with the mode that fits now, and why.

        ``now`` is in monotonic seconds and never goes back. What a sample does not know (None) is no reason for a
        change.
        """


@dataclass(frozen=True, slots=True)
class StreamHealth:
    """Health of one stream, i.e. lane (requirements A3).

    ``last_active`` is a monotonic time; ``chunk_size``: the longest chunk that this side sends over it now, in bytes.
    """

    id: int
    transport: str
    healthy: bool
    bytes_sent: int
    bytes_received: int
    last_active: float
    last_error: str | None
    reconnects: int
    consecutive_failures: int
    path: PathStats
    chunk_size: int
    congestion: CongestionInForce | None = None


@dataclass(frozen=True, slots=True)
class SessionMetrics:
    """A session's numbers at one instant (requirements A2); totals since it opened.

    Throughput is the larger direction over the last 5 s; utilisation relates it to the sum of the
    lanes' estimated delivery rates; ``streams_reason`` says why there are as many as there are, ``mode_reason`` why it
    is this mode, ``switches`` how often that has changed; None means not yet known.
    """

    session_id: str
    remote_addr: str
    transport_type: str
    mode: str
    mode_reason: str
    switches: int
    congestion: str | None
    congestion_backend: str | None
    congestion_reason: str | None
    active_streams: int
    streams_reason: str
    total_streams: int
    failed_connections: int
    bytes_sent: int
    bytes_received: int
    retransmitted_bytes: int
    throughput_mbps: float
    average_latency_s: float | None
    packet_loss_rate: float | None
    bandwidth_utilization_percent: float | None
    lane_failures: int
    healthy: bool
    last_error: str | None
    last_health_check: float | None
    streams: tuple[StreamHealth, ...] = ()


class MetricsSource(ABC):
    """Where an exporter reads numbers when it is scraped."""

    @abstractmethod
    def collect(self) -> Sequence[SessionMetrics]:
        """Numbers of every live session."""


class MetricsExporter(ABC):
    """Publishes a `MetricsSource`; pulls when scraped, is never called per chunk."""

    name: ClassVar[str]
    api_version: ClassVar[int] = API_VERSION

    @abstractmethod
    def start(self, source: MetricsSource) -> str:
        """Begin to publish ``source``; return where, for the log."""

    @abstractmethod
    def stop(self) -> None:
        """Stop publishing. Idempotent."""


# ---- framing constants a stream transport may need -----------------------------------------

PREAMBLE: Final = struct.Struct("!6sH")
"""First bytes of a lane's connection to the core's listener: magic, then the transport's tag."""

PREAMBLE_MAGIC: Final = b"AMSTL\x01"
