"""Super-packets as TUN devices hand them over (virtio_net_hdr of linux/virtio_net.h, then IP), cut into their segments.

A checksum that is still to be completed holds the sum of the pseudo-header (VIRTIO_NET_HDR_F_NEEDS_CSUM); whoever
changes a packet's length changes that sum and the IPv4 header checksum, and nothing else needs to be computed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

HEADER: Final = struct.Struct("=BBHHHH")
"""flags, gso_type, hdr_len, gso_size, csum_start, csum_offset: before each packet."""

_NEEDS_CSUM: Final = 1
_GSO_NONE, _GSO_UDP_L4, _GSO_ECN = 0, 5, 0x80
_TCP, _UDP = 6, 17
_CWR, _FIN_PSH = 0x80, 0x09


@dataclass(slots=True)
class SuperPacket:
    """A packet of ``count`` segments, ``segment`` bytes of IP each; the last may be shorter. ``total``: all of them."""

    raw: bytes
    head: int
    transport: int
    size: int
    count: int
    total: int

    @property
    def segment(self) -> int:
        """Bytes of a full segment on the wire."""
        return self.head + self.size


def parse(raw: bytes) -> SuperPacket:
    """What a packet with a gso_type is made of."""
    _, gso, _, size, transport, _ = HEADER.unpack_from(raw)
    start = HEADER.size + transport
    head = transport + (8 if gso & ~_GSO_ECN == _GSO_UDP_L4 else (raw[start + 12] >> 4) * 4)
    payload = len(raw) - HEADER.size - head
    count = max(1, -(-payload // size))
    return SuperPacket(raw, head, transport, size, count, count * head + payload)


def piece(whole: SuperPacket, first: int, end: int) -> tuple[bytes, memoryview]:
    """Segments ``first`` up to ``end`` as a packet that is like the whole: its headers, and the payload in place."""
    raw, head, at = whole.raw, whole.head, whole.transport
    flags, gso, _, size, _, field = HEADER.unpack_from(raw)
    udp = gso & ~_GSO_ECN == _GSO_UDP_L4
    begin = HEADER.size + head + first * size
    stop = len(raw) if end == whole.count else HEADER.size + head + end * size
    payload = stop - begin
    ip = bytearray(raw[HEADER.size : HEADER.size + head])
    length = head - at + payload
    pseudo = length + (_UDP if udp else _TCP)
    if ip[0] >> 4 == 4:
        struct.pack_into("!HH", ip, 2, head + payload, (int.from_bytes(ip[4:6]) + first) & 0xFFFF)
        ip[10:12] = b"\0\0"
        struct.pack_into("!H", ip, 10, ~checksum(ip[: (ip[0] & 15) * 4]) & 0xFFFF)
        pseudo += checksum(ip[12:20])
    else:
        struct.pack_into("!H", ip, 4, head - 40 + payload)
        pseudo += checksum(ip[8:40])
    if udp:
        struct.pack_into("!H", ip, at + 4, length)
    else:
        sequence = int.from_bytes(ip[at + 4 : at + 8]) + first * size
        struct.pack_into("!I", ip, at + 4, sequence & 0xFFFFFFFF)
        if end < whole.count:
            ip[at + 13] &= ~_FIN_PSH
        if first:
            ip[at + 13] &= ~_CWR
    struct.pack_into("!H", ip, at + field, pseudo % 0xFFFF)
    if payload <= size:
        gso, size = _GSO_NONE, 0
    header = HEADER.pack(flags, gso, head, size, at, field)
    return header + ip, memoryview(raw)[begin:stop]


def plain(raw: bytes) -> Iterator[bytes]:
    """A packet as single ones with all checksums in place, for a device without offloads."""
    if raw[1] == _GSO_NONE:
        yield _complete(raw)
        return
    whole = parse(raw)
    for number in range(whole.count):
        yield _complete(b"".join(piece(whole, number, number + 1)))


def _complete(raw: bytes) -> bytes:
    flags, _, _, _, start, field = HEADER.unpack_from(raw)
    if not flags & _NEEDS_CSUM:
        return bytes(HEADER.size) + raw[HEADER.size :]
    packet = bytearray(raw)
    packet[: HEADER.size] = bytes(HEADER.size)
    # The sum mod 0xFFFF is never 0xFFFF, so that this is never the 0 that means "none" to UDP.
    sum_ = ~checksum(packet[HEADER.size + start :]) & 0xFFFF
    struct.pack_into("!H", packet, HEADER.size + start + field, sum_)
    return bytes(packet)


def checksum(data: bytes | bytearray | memoryview) -> int:
    """The ones' complement sum of RFC 1071, not complemented, 0 to 0xFFFE: 2^16 is 1 modulo 0xFFFF."""
    number = int.from_bytes(data, "big")
    return (number << 8 if len(data) & 1 else number) % 0xFFFF


def is_multicast(raw: bytes) -> bool:
    """Whether an IPv6 packet is to a group: what the kernel says to its neighbours, who are not there."""
    return raw[HEADER.size] >> 4 == 6 and raw[HEADER.size + 24] == 0xFF


def destination(raw: bytes) -> bytes:
    """The IP address that a packet goes to."""
    at = HEADER.size
    return raw[at + 16 : at + 20] if raw[at] >> 4 == 4 else raw[at + 24 : at + 40]
