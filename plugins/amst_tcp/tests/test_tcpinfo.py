"""Decoding ``struct tcp_info``, whole and short."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from amst_core.interfaces import PathStats
from amst_tcp.tcpinfo import decode_tcp_info

LENGTH = 256
VALUES = [
    (7, "=B", 0b0101),
    (16, "=I", 1448),
    (24, "=I", 3),
    (68, "=I", 20_500),
    (80, "=I", 10),
    (100, "=I", 3),
    (104, "=Q", 5_000_000_000),
    (120, "=Q", 70_001),
    (128, "=Q", 80_002),
    (148, "=I", 20_000),
    (156, "=I", 1234),
    (160, "=Q", 12_500_000),
    (208, "=Q", 4344),
]


def info(*changes: tuple[int, str, int]) -> bytes:
    raw = bytearray(LENGTH)
    for offset, layout, value in (*VALUES, *changes):
        struct.pack_into(layout, raw, offset, value)
    return bytes(raw)


def test_every_field_is_read_from_its_place_and_unit() -> None:
    assert decode_tcp_info(info(), congestion="bbr") == PathStats(
        rtt_s=0.0205,
        min_rtt_s=0.02,
        cwnd=14480,
        pacing_rate=5e9,
        delivery_rate=12.5e6,
        app_limited=True,
        segments_sent=1234,
        segments_retransmitted=3,
        bytes_retransmitted=4344,
        bytes_acknowledged=70_001,
        bytes_received=80_002,
        bytes_waiting=3 * 1448,
        mss=1448,
        congestion="bbr",
    )
    assert decode_tcp_info(info((7, "=B", 0b0110)), congestion="bbr").app_limited is False


OLDEST = {"rtt_s", "cwnd", "mss", "segments_retransmitted", "bytes_waiting"}
LINUX_4_6 = {
    *OLDEST,
    "pacing_rate",
    "bytes_acknowledged",
    "bytes_received",
    "min_rtt_s",
    "segments_sent",
}


@pytest.mark.parametrize(
    ("length", "known"),
    [
        (0, set()),
        (104, OLDEST),  # Linux 3.14
        (136, {*OLDEST, "pacing_rate", "bytes_acknowledged", "bytes_received"}),  # Linux 4.1
        (160, LINUX_4_6),
        (163, LINUX_4_6),
    ],
)
def test_an_older_kernels_shorter_struct_leaves_the_rest_unknown(length: int, known: set[str]) -> None:
    stats = decode_tcp_info(info()[:length], congestion=None)
    assert {name for name in PathStats.__dataclass_fields__ if getattr(stats, name) is not None} == known


@pytest.mark.parametrize(
    ("change", "unknown"),
    [
        ((68, "=I", 0), lambda stats: stats.rtt_s),
        ((148, "=I", 2**32 - 1), lambda stats: stats.min_rtt_s),
        ((104, "=Q", 2**64 - 1), lambda stats: stats.pacing_rate),
        ((160, "=Q", 0), lambda stats: (stats.delivery_rate, stats.app_limited)),
    ],
    ids=["rtt", "min_rtt", "pacing_rate", "delivery_rate"],
)
def test_what_the_kernel_has_not_measured_is_unknown_and_not_a_number(
    change: tuple[int, str, int], unknown: Callable[[PathStats], object]
) -> None:
    assert unknown(decode_tcp_info(info(change), congestion=None)) in (None, (None, None))
