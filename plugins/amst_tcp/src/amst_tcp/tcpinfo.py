"""What the kernel knows about a TCP connection: TCP_INFO and TCP_CONGESTION as `PathStats`.

The layout is ``struct tcp_info`` of the Linux user API (include/uapi/linux/tcp.h). It only ever grew at its
end, so a shorter answer from an older kernel leaves the later fields unknown.
"""

from __future__ import annotations

import socket
import struct
from typing import Final

from amst_core.interfaces import FlowSample, PathStats

from .congestion import congestion_of

_FIELDS: Final = {
    "flags": (7, struct.Struct("=B")),  # bit 0: delivery_rate_app_limited
    "snd_mss": (16, struct.Struct("=I")),
    "unacked": (24, struct.Struct("=I")),
    "rtt_us": (68, struct.Struct("=I")),
    "snd_cwnd": (80, struct.Struct("=I")),
    "total_retrans": (100, struct.Struct("=I")),
    "pacing_rate": (104, struct.Struct("=Q")),
    "bytes_acked": (120, struct.Struct("=Q")),
    "bytes_received": (128, struct.Struct("=Q")),
    "min_rtt_us": (148, struct.Struct("=I")),
    "data_segs_out": (156, struct.Struct("=I")),
    "delivery_rate": (160, struct.Struct("=Q")),
    "rwnd_limited_us": (176, struct.Struct("=Q")),
    "bytes_retrans": (208, struct.Struct("=Q")),
}
"""Offset and type of each field used here."""

_APP_LIMITED: Final = 1
_UNKNOWN_U32: Final = (1 << 32) - 1
_UNKNOWN_U64: Final = (1 << 64) - 1
_ASK_FOR: Final = 512
"""Bytes to ask for: more than any kernel returns today; it answers with what it has."""


_FLOW: Final = struct.Struct("=16xI4x4I28xI8xI16xI40x2I4xI32xI")
"""snd_mss, unacked, sacked, lost, retrans, rtt, snd_cwnd, total_retrans, notsent_bytes, min_rtt, data_segs_out,
delivered: in one go, for `read_flow` is called often."""


def read_path_stats(sock: socket.socket) -> PathStats:
    """Statistics of a connected TCP socket.

    Raises:
        OSError: the socket is closed.
    """
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ASK_FOR)
    return decode_tcp_info(info, congestion=congestion_of(sock) or None)


def decode_tcp_info(info: bytes, *, congestion: str | None) -> PathStats:
    """Decode ``struct tcp_info``; what it does not hold, or holds as "not measured yet", is None.

    Segments are those that carried data (``tcpi_data_segs_out``): pure acknowledgements are never sent
    again, so counting them would dilute a loss rate.
    """
    found = {
        name: layout.unpack_from(info, offset)[0]
        for name, (offset, layout) in _FIELDS.items()
        if offset + layout.size <= len(info)
    }
    mss = found.get("snd_mss") or None
    cwnd_segments = found.get("snd_cwnd")
    min_rtt_us = found.get("min_rtt_us")
    pacing_rate = found.get("pacing_rate")
    delivery_rate = found.get("delivery_rate") or None  # 0: no sample yet
    return PathStats(
        rtt_s=found["rtt_us"] / 1e6 if found.get("rtt_us") else None,
        min_rtt_s=None if min_rtt_us in (None, _UNKNOWN_U32) else min_rtt_us / 1e6,
        cwnd=cwnd_segments * mss if cwnd_segments and mss else None,
        pacing_rate=None if pacing_rate in (None, _UNKNOWN_U64) else float(pacing_rate),
        delivery_rate=None if delivery_rate is None else float(delivery_rate),
        app_limited=None if delivery_rate is None else bool(found["flags"] & _APP_LIMITED),
        segments_sent=found.get("data_segs_out"),
        segments_retransmitted=found.get("total_retrans"),
        bytes_retransmitted=found.get("bytes_retrans"),
        bytes_acknowledged=found.get("bytes_acked"),
        bytes_received=found.get("bytes_received"),
        # what the peer's window has no room for is not among them: its kernel answers, its program is busy
        bytes_waiting=found["unacked"] * (mss or 1) if "unacked" in found else None,
        peer_limited_s=found["rwnd_limited_us"] / 1e6 if "rwnd_limited_us" in found else None,
        mss=mss,
        congestion=congestion,
    )


def read_flow(sock: socket.socket) -> FlowSample | None:
    """How the sending half of a connected TCP socket stands; None on a kernel that does not tell (before 4.18).

    Raises:
        OSError: the socket is closed.
    """
    return decode_flow(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _FLOW.size))


def decode_flow(info: bytes) -> FlowSample | None:
    """Decode ``struct tcp_info`` as `FlowSample`; the kernel counts segments, and takes each for a full one."""
    if len(info) < _FLOW.size:
        return None
    mss, unacked, sacked, lost, again, rtt_us, cwnd, retransmitted, unsent, min_rtt_us, sent, delivered = (
        _FLOW.unpack_from(info)
    )
    if not (mss and rtt_us):
        return None
    return FlowSample(
        delivered=delivered * mss,
        sent=sent * mss,
        lost=retransmitted * mss,
        in_flight=max(0, unacked - sacked - lost + again) * mss,
        window=cwnd * mss,
        unsent=unsent,
        rtt_s=rtt_us / 1e6,
        min_rtt_s=(rtt_us if min_rtt_us in (0, _UNKNOWN_U32) else min_rtt_us) / 1e6,
        mss=mss,
    )
