"""What netlab makes of packets, without a network: paths as they are given, pipes, losses, cut super-packets."""

from __future__ import annotations

import itertools
import random
import statistics
import struct
from typing import Any

import pytest

from amst_core.errors import UsageError
from amst_core.testing.netlab import Lab, Link, Path, Way, access, repeated
from amst_core.testing.netlab.packets import HEADER, checksum, parse, piece, plain
from amst_core.testing.netlab.path import LEAST_BUFFER
from amst_core.testing.netlab.pipe import LONGEST_QUANTUM_NS, QUANTUM_NS, Losses, Pipe
from amst_core.testing.netlab.probes import Arrival, Probes

MS = 1_000_000
SECOND = 1_000_000_000


# ---- paths ------------------------------------------------------------------------------------


def test_a_path_is_read_as_on_the_command_line() -> None:
    path = Path("100Mbit/s", rtt="100ms", loss="1%", jitter="5ms", burst=4, buffer="1MiB")
    assert path.up == path.down == Way(12.5e6, 0.05, 0.005, 0.01, 4.0, 1 << 20)
    assert path.rtt == 0.1


def test_each_direction_has_values_of_its_own() -> None:
    path = Path(rate=1e6, rtt=0.02, up={"rate": "2MB/s", "delay": "30ms"}, down=Way(rate=5e6))
    assert (path.up, path.down) == (Way(rate=2e6, delay=0.03), Way(rate=5e6))
    changed = path.changed(loss=0.5, down={"jitter": 0.1})
    assert (changed.up, changed.down) == (Way(2e6, 0.03, loss=0.5), Way(5e6, jitter=0.1, loss=0.5))


def test_a_buffer_that_is_not_given_is_the_bandwidth_delay_product() -> None:
    path = Path(rate="100Mbit/s", rtt="20ms", down={"buffer": 3000})
    assert (path.buffer(path.up), path.buffer(path.down)) == (250_000, 3000)
    quick = Path(rate="1Mbit/s", rtt="1ms")
    assert quick.buffer(quick.up) == LEAST_BUFFER


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rate": "fast"}, "rate: 'fast' is not a rate"),
        ({"rate": 0}, "rate: 0 is less than 1 kB/s"),
        ({"rtt": "100"* 30}, "rtt: "),
        ({"rtt": 1, "delay": 1}, "give one of them"),
        ({"delay": "2min"}, "delay: '2min' is more than 60s"),
        ({"loss": "101%"}, "loss: '101%' is not a share"),
        ({"loss": -0.1}, "loss: -0.1 is not a share"),
        ({"loss": "1%", "burst": 0.5}, "burst: 0.5 is not a mean number"),
        ({"loss": "90%", "burst": 2}, "burst: at a loss of 0.9 it is 9 at least, not 2"),
        ({"buffer": 100}, "buffer: 100 holds no packet"),
        ({"speed": 1}, "a path has no 'speed'; it has rate, delay"),
        ({"up": {"rate": "x"}}, "up: rate: 'x' is not a rate"),
    ],
)
def test_what_makes_no_path_is_refused_by_name(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        Path(**values)
    assert words in str(caught.value)


def test_a_change_that_makes_no_sense_changes_nothing() -> None:
    link = Link("a", "b", Path(rate=1e6))
    before = link.path
    with pytest.raises(UsageError):
        link.set(rate=2e6, down={"loss": 2})
    assert link.path == before


@pytest.mark.parametrize(
    "make",
    [
        lambda: Lab(),
        lambda: Lab(Path(), Path()),
        lambda: Link("a", "a", Path()),
        lambda: Link("router", "a", Path()),
        lambda: Lab(Path(), congestion="nonesuch"),
        lambda: Lab(Path(), tcp_memory=1),
        lambda: Lab(Path()).host("nobody"),
        lambda: repeated(lambda: Lab(Path()), lambda lab: None, tries=0),
    ],
)
def test_labs_that_make_no_sense_are_refused(make: Any) -> None:
    with pytest.raises(UsageError):
        make()


def test_a_link_belongs_to_one_lab_and_numbers_its_hosts_addresses() -> None:
    slow, quick = Link("a", "b", Path()), Link("a", "b", Path())
    lab = Lab(slow, quick, access("b", Path()))
    assert [host.name for host in lab.hosts] == ["a", "b"]
    assert lab.host("b").addresses == ["10.99.0.2", "10.99.1.2", "10.98.0.3"]
    assert quick.addresses == {"a": "10.99.1.1", "b": "10.99.1.2"}
    with pytest.raises(UsageError):
        Lab(slow)


def test_a_lab_that_does_not_run_says_so() -> None:
    lab = Lab(Path())
    for use in (lab.report, lambda: lab.hosts[0].run(["true"]), lambda: lab.emulator):
        with pytest.raises(UsageError, match=r"runs?"):
            use()
    lab.close()


# ---- pipes ------------------------------------------------------------------------------------


def pipe(seed: str = "1", **values: Any) -> Pipe:
    path = Path(up=Way.of(**values))
    return Pipe({**path.up.as_dict(), "buffer": path.buffer(path.up)}, seed)


def single(size: int = 1500) -> bytes:
    return bytes(HEADER.size) + b"\x45" + bytes(size - 1)


def test_packets_leave_at_the_rate_and_arrive_after_the_delay() -> None:
    way = pipe(rate=1.5e6, delay=0.05)
    for _ in range(3):
        way.offer(5 * SECOND, single())
    way.offer(6 * SECOND, single(600))
    assert [entry.due for entry in way.queue] == [
        5 * SECOND + 51 * MS, 5 * SECOND + 52 * MS, 5 * SECOND + 53 * MS, 6 * SECOND + 50 * MS + 400_000
    ]  # fmt: skip


def test_without_a_rate_nothing_waits() -> None:
    way = pipe(delay=0.01)
    for _ in range(100):
        way.offer(SECOND, single())
    assert {entry.due for entry in way.queue} == {SECOND + 10 * MS}


def test_what_does_not_fit_into_the_buffer_is_dropped_and_what_was_sent_makes_room() -> None:
    way = pipe(rate=1.5e6, buffer=4500)
    for _ in range(5):
        way.offer(SECOND, single())
    assert (way.packets, way.dropped_by_queue, len(way.queue)) == (5, 2, 3)
    way.offer(SECOND + MS, single())
    way.offer(SECOND + MS, single())
    assert (way.dropped_by_queue, len(way.queue)) == (3, 4)


def test_what_is_lost_has_used_the_link() -> None:
    way = pipe(rate=1.5e6, loss=0.5, buffer="1GB")
    for _ in range(1000):
        way.offer(SECOND, single())
    assert way.dropped_by_loss + len(way.queue) == 1000
    assert 400 < way.dropped_by_loss < 600
    assert all(entry.due % MS == 0 for entry in way.queue)
    assert len({entry.due for entry in way.queue}) == len(way.queue)


def test_jitter_is_spread_evenly_and_nothing_is_overtaken() -> None:
    way = pipe(delay=0.02, jitter=0.01)
    times = [SECOND + number * MS // 2 for number in range(200_000)]
    for time in times:
        way.offer(time, single(100))
    due = [entry.due for entry in way.queue]
    assert due == sorted(due)
    extra = [(arrives - time) / MS - 20 for arrives, time in zip(due, times, strict=True)]
    assert min(extra) == pytest.approx(0, abs=0.1) and max(extra) == pytest.approx(10, rel=0.01)
    assert min(extra) >= 0
    assert statistics.mean(extra) == pytest.approx(5, rel=0.02)
    assert statistics.pstdev(extra) == pytest.approx(10 / 12**0.5, rel=0.02)
    quarters = [sum(low <= value < low + 2.5 for value in extra) / len(extra) for low in (0, 2.5, 5, 7.5)]
    assert quarters == pytest.approx([0.25] * 4, rel=0.05)


def test_jitter_costs_no_more_after_a_long_pause() -> None:
    way = pipe(jitter=1e-6)
    way.offer(0, single())
    way.offer(3600 * SECOND, single())  # some 900 million sweeps later
    assert 0 <= way.queue[1].due - 3600 * SECOND <= 1000


def test_a_new_rate_holds_for_what_waits_and_a_new_delay_for_what_is_not_sent_yet() -> None:
    way = pipe(rate=1.5e6, delay=0.01, buffer="1MB")
    for _ in range(5):
        way.offer(SECOND, single())
    way.set({"rate": 0.75e6, "delay": 0.1, "jitter": 0.0, "loss": 0.0, "burst": None, "buffer": 1e6}, SECOND + 2 * MS)
    way.offer(SECOND + 2 * MS, single())
    since = [(entry.due - SECOND) / MS for entry in way.queue]
    assert since == [11, 12, 104, 106, 108, 110]


def test_a_shorter_delay_lets_nothing_overtake() -> None:
    way = pipe(delay=0.1)
    way.offer(SECOND, single())
    way.set({"rate": None, "delay": 0.001, "jitter": 0.0, "loss": 0.0, "burst": None, "buffer": 1e6}, SECOND + MS)
    way.offer(SECOND + MS, single())
    way.offer(2 * SECOND, single())
    assert [entry.due for entry in way.queue] == [SECOND + 100 * MS, SECOND + 100 * MS, 2 * SECOND + MS]


def test_the_same_seed_gives_the_same_fates() -> None:
    def fates(seed: str) -> list[int]:
        way = pipe(seed, loss=0.3, jitter=0.01)
        for number in range(200):
            way.offer(number * MS, single())
        return [entry.due for entry in way.queue]

    assert fates("1/0") == fates("1/0") != fates("1/1")


def test_a_rate_is_measured_while_packets_wait_for_the_link() -> None:
    # Sent at once, then after a pause: 1 ms each on the link, 10 ms on the way.
    sent = [0.0] * 5 + [1.0] * 5
    arrived = [0.011 + number * 0.001 for number in range(5)] + [1.011 + number * 0.001 for number in range(5)]
    arrivals = [Arrival(number, *times) for number, times in enumerate(zip(sent, arrived, strict=True))]
    assert Probes(10, 1500, tuple(arrivals)).rate == pytest.approx(1.5e6)
    assert Probes(2, 1500, (arrivals[0], arrivals[5])).rate == 0


def test_lost_probes_are_told_with_their_rows() -> None:
    arrivals = tuple(Arrival(number, 0.0, 1.0) for number in (0, 3, 4, 6))
    probes = Probes(8, 1500, arrivals)
    assert (probes.lost, probes.loss, probes.burst, probes.in_order) == ([1, 2, 5, 7], 0.5, 4 / 3, True)
    assert not Probes(8, 1500, arrivals[::-1]).in_order


# ---- losses -----------------------------------------------------------------------------------


def lost_rows(losses: Losses, count: int) -> list[int]:
    """Lengths of the rows of lost packets among ``count``."""
    runs = losses.runs(count)
    edges = [0, *itertools.chain.from_iterable(runs), count]
    return [end - begin for begin, end in zip(edges[::2], edges[1::2], strict=True) if end > begin]


@pytest.mark.parametrize(
    ("loss", "burst"), [(0.001, None), (0.01, None), (0.3, None), (0.01, 1.0), (0.01, 5.0), (0.05, 20.0), (0.5, 3.0)]
)
def test_mean_loss_and_mean_burst_are_what_was_asked_for(loss: float, burst: float | None) -> None:
    count = round(50_000 * (burst or 1) / loss)  # 50 000 bursts or so
    rows = lost_rows(Losses(loss, burst, random.Random(5)), count)
    assert sum(rows) / count == pytest.approx(loss, rel=0.03)
    assert statistics.mean(rows) == pytest.approx(burst if burst is not None else 1 / (1 - loss), rel=0.03)


def test_bursts_are_geometric_as_gilbert_and_elliott_have_them() -> None:
    rows = lost_rows(Losses(0.05, 4.0, random.Random(6)), 4_000_000)
    for length in (1, 2, 3, 4):
        share = sum(row == length for row in rows) / len(rows)
        assert share == pytest.approx(0.25 * 0.75 ** (length - 1), rel=0.03)


@pytest.mark.parametrize("burst", [None, 3.0])
def test_one_at_a_time_or_many_the_fates_are_the_same(burst: float | None) -> None:
    many, one = Losses(0.2, burst, random.Random(7)), Losses(0.2, burst, random.Random(7))
    for count in (1, 7, 44, 2000):
        passing = [number for first, end in many.runs(count) for number in range(first, end)]
        assert passing == [number for number in range(count) if not one.lost()]


def test_a_loss_of_all_lets_nothing_pass() -> None:
    for losses in (Losses(1.0, None, random.Random(1)), Losses(1.0, 4.0, random.Random(1))):
        assert losses.runs(1000) == []
        assert losses.lost()


# ---- super-packets ----------------------------------------------------------------------------


def super_packet(version: int = 4, *, udp: bool = False, payload: bytes, size: int, options: bytes = b"") -> bytes:
    """As a TUN device with offloads hands it over: one header for all, its checksum the pseudo-header's sum."""
    if udp:
        head = struct.pack("!HHHH", 1111, 2222, 8 + len(payload), 0)
    else:
        offset = (20 + len(options)) // 4
        flags = 0x80 | 0x10 | 0x08 | 0x01  # CWR, ACK, PSH, FIN
        head = struct.pack("!HHIIBBHHH", 1111, 2222, 0xFFFFFF00, 77, offset << 4, flags, 500, 0, 0) + options
    length = len(head) + len(payload)
    protocol = 17 if udp else 6
    if version == 4:
        ip = bytearray(struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + length, 0xFFFE, 0x4000, 64, protocol, 0,
                                   bytes([10, 99, 0, 1]), bytes([10, 99, 0, 2])))  # fmt: skip
        struct.pack_into("!H", ip, 10, ~checksum(ip) & 0xFFFF)
    else:
        addresses = bytes(range(16)), bytes(range(16, 32))
        ip = bytearray(struct.pack("!IHBB16s16s", 6 << 28, length, protocol, 64, *addresses))
    gso = 5 if udp else 1 if version == 4 else 4
    header = HEADER.pack(1, gso, len(ip) + len(head), size, len(ip), 6 if udp else 16)
    return header + bytes(ip) + head + payload


def words(data: bytes) -> int:
    """The Internet checksum the long way: what a receiver computes; 0xFFFF when all is well."""
    padded = data + bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def assert_valid(raw: bytes, *, udp: bool) -> bytes:
    """A single packet whose checksums a receiver accepts; its payload."""
    assert raw[: HEADER.size] == bytes(HEADER.size)
    packet = raw[HEADER.size :]
    if packet[0] >> 4 == 4:
        assert words(packet[:20]) == 0xFFFF
        assert int.from_bytes(packet[2:4]) == len(packet)
        addresses, segment = packet[12:20], packet[20:]
    else:
        assert int.from_bytes(packet[4:6]) == len(packet) - 40
        addresses, segment = packet[8:40], packet[40:]
    pseudo = addresses + struct.pack("!HH", 17 if udp else 6, len(segment))
    assert words(pseudo + segment) == 0xFFFF
    if udp:
        assert int.from_bytes(segment[4:6]) == len(segment)
        return segment[8:]
    return segment[(segment[12] >> 4) * 4 :]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("udp", [False, True])
@pytest.mark.parametrize("length", [10_000, 7 * 1001, 1001, 1002, 500])
def test_each_segment_has_the_checksums_a_receiver_wants(version: int, udp: bool, length: int) -> None:
    payload = random.Random(length).randbytes(length)
    raw = super_packet(version, udp=udp, payload=payload, size=1001, options=b"" if udp else bytes(12))
    singles = list(plain(raw))
    assert len(singles) == -(-length // 1001)
    assert b"".join(assert_valid(single, udp=udp) for single in singles) == payload


def test_a_checksum_of_zero_is_written_as_udp_wants_it() -> None:
    for payload in (value.to_bytes(2, "big") for value in range(0x10000)):
        raw = super_packet(udp=True, payload=payload, size=1000)
        whole = bytes([1, 0]) + raw[2:]
        pseudo = whole[22:30] + struct.pack("!HH", 17, 10)
        start = HEADER.size + 20
        whole = whole[: start + 6] + struct.pack("!H", words(pseudo)) + whole[start + 8 :]
        (single,) = plain(whole)
        if single[start + 6 : start + 8] == b"\xff\xff":
            assert_valid(single, udp=True)
            return
        assert single[start + 6 : start + 8] != b"\0\0"
    raise AssertionError("no payload had that checksum")


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("cuts", [(0, 3, 10), (0, 1, 2, 9, 10), (0, 10)])
def test_pieces_are_super_packets_that_come_to_the_same(version: int, cuts: tuple[int, ...]) -> None:
    payload = random.Random(8).randbytes(9_500)
    raw = super_packet(version, payload=payload, size=1000)
    whole = parse(raw)
    head = (20 if version == 4 else 40) + 20
    assert (whole.count, whole.segment, whole.total) == (10, 1000 + head, 9_500 + 10 * head)
    pieces = [b"".join(piece(whole, first, end)) for first, end in itertools.pairwise(cuts)]
    assert [single for cut in pieces for single in plain(cut)] == list(plain(raw))


def test_flags_and_numbers_are_those_of_the_segments_place() -> None:
    raw = super_packet(payload=bytes(3000), size=1000)
    segments = [single[HEADER.size :] for single in plain(raw)]
    assert [int.from_bytes(segment[24:28]) for segment in segments] == [0xFFFFFF00, 744, 1744]  # around 2^32
    assert [int.from_bytes(segment[4:6]) for segment in segments] == [0xFFFE, 0xFFFF, 0]
    # CWR on the first only, PSH and FIN on the last.
    assert [segment[33] for segment in segments] == [0x90, 0x10, 0x19]


def test_a_pipe_decides_for_each_segment_of_a_super_packet() -> None:
    def fates(raws: list[bytes], **values: Any) -> tuple[list[bytes], int, int, int]:
        way = pipe(**values)
        for raw in raws:
            way.offer(SECOND, raw)
        arrived = [single for entry in way.queue for single in plain(b"".join(entry.parts()))]
        return arrived, way.packets, way.dropped_by_loss, way.dropped_by_queue

    raw = super_packet(payload=random.Random(9).randbytes(40_000), size=1460)
    for values in ({"loss": 0.3}, {"rate": 1e6, "buffer": 20_000}, {"rate": 1e6, "buffer": 30_000, "loss": 0.2}):
        assert fates([raw] * 3, **values) == fates(list(plain(raw)) * 3, **values)


@pytest.mark.parametrize(("delay", "together"), [(0.0, QUANTUM_NS), (0.05, 500_000), (1.0, LONGEST_QUANTUM_NS)])
def test_the_pieces_of_a_super_packet_are_spread_over_its_time_on_the_link(delay: float, together: int) -> None:
    raw = super_packet(payload=bytes(43_800), size=1460)
    way = pipe(rate=12.5e6, delay=delay, buffer="1MB")
    way.offer(SECOND, raw)
    start = SECOND + round(delay * SECOND)
    due = [entry.due for entry in way.queue]
    assert due[-1] == start + 30 * 1500 * 80
    assert all(0 < after - before <= together for before, after in itertools.pairwise([start, *due]))
    assert sum(entry.segments for entry in way.queue) == 30
    assert sum(entry.size for entry in way.queue) == 45_000
