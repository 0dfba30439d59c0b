"""Decoding ``struct tcp_info``, whole and short, for statistics and for whoever paces."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

import pytest

from amst_core.interfaces import FlowSample, PathStats
from amst_tcp.tcpinfo import decode_flow, decode_tcp_info, read_flow, read_path_stats

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
    (176, "=Q", 1_500_000),
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
        peer_limited_s=1.5,
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


# ---- the sending half -----------------------------------------------------------------------------

MSS = 1448
DELIVERED_AT = 192
FLOW = (
    (28, "=I", 4),  # sacked
    (32, "=I", 2),  # lost
    (36, "=I", 1),  # retrans
    (24, "=I", 20),  # unacked
    (144, "=I", 70_001),  # notsent_bytes
    (192, "=I", 1200),  # delivered
)


def test_every_field_of_a_flow_is_read_from_its_place_and_unit() -> None:
    assert decode_flow(info(*FLOW)) == FlowSample(
        delivered=1200 * MSS,
        sent=1234 * MSS,
        lost=3 * MSS,
        in_flight=(20 - 4 - 2 + 1) * MSS,  # RFC 6675's pipe
        window=10 * MSS,
        unsent=70_001,
        rtt_s=0.0205,
        min_rtt_s=0.02,
        mss=MSS,
    )


def test_no_other_field_matters_to_a_flow() -> None:
    used = {16, 24, 28, 32, 36, 68, 80, 100, 144, 148, 156, 192}
    others = tuple((offset, "=I", 0x5A5A5A5A) for offset in range(0, LENGTH, 4) if offset not in used)
    assert decode_flow(info(*others, *FLOW)) == decode_flow(info(*FLOW))


def test_what_is_counted_out_twice_leaves_nothing_in_flight_and_not_less() -> None:
    found = decode_flow(info(*FLOW, (28, "=I", 19), (36, "=I", 0)))
    assert found is not None
    assert found.in_flight == 0


@pytest.mark.parametrize("unknown", [0, 2**32 - 1])
def test_the_shortest_round_trip_is_the_one_of_now_until_it_is_known(unknown: int) -> None:
    found = decode_flow(info(*FLOW, (148, "=I", unknown)))
    assert found is not None
    assert found.min_rtt_s == found.rtt_s == 0.0205


@pytest.mark.parametrize("offset", [16, 68], ids=["mss", "rtt"])
def test_without_a_segment_or_a_round_trip_no_flow_is_known(offset: int) -> None:
    assert decode_flow(info(*FLOW, (offset, "=I", 0))) is None


@pytest.mark.parametrize(
    ("length", "known"), [(0, False), (DELIVERED_AT, False), (DELIVERED_AT + 3, False), (DELIVERED_AT + 4, True)]
)
def test_before_linux_4_18_no_flow_is_known(length: int, known: bool) -> None:
    assert (decode_flow(info(*FLOW)[:length]) is not None) == known


def test_the_kernels_answer_is_read_for_a_flow_as_for_statistics(
    socket_pairs: Callable[..., tuple[socket.socket, socket.socket]],
    family: socket.AddressFamily,
    wait_until: Callable[[Callable[[], bool], str], None],
) -> None:
    near, far = socket_pairs(family)
    near.sendall(bytes(100_000))
    assert len(far.recv(100_000, socket.MSG_WAITALL)) == 100_000
    wait_until(lambda: not read_path_stats(near).bytes_waiting, "all of it to be acknowledged")
    flow, stats = read_flow(near), read_path_stats(near)
    assert flow is not None
    assert (flow.mss, flow.window) == (stats.mss, stats.cwnd)
    assert flow.sent == stats.segments_sent * flow.mss >= 100_000
    near.close()
    with pytest.raises(OSError):
        read_flow(near)
