"""The numbers are true while traffic moves, and health checks find what is not."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.needs_transport

MIB = 1 << 20


class Traffic:
    """Messages from one end to the other until stopped; ``bytes`` counts what was delivered."""

    def __init__(self, pair: Any, spawn: Any) -> None:
        self._stop = threading.Event()
        self.bytes = 0

        def send() -> None:
            while not self._stop.is_set():
                pair.near.send(bytes(4 * MIB)).wait(20)
                self.bytes += 4 * MIB
            pair.near.send(b"")

        def receive() -> None:
            while pair.far.recv(timeout=20):
                pass

        self._tasks = [spawn(send), spawn(receive)]

    def stop(self) -> None:
        self._stop.set()
        for task in self._tasks:
            task.outcome()


@pytest.mark.parametrize("plaintext", [False, True], ids=["encrypted", "plaintext"])
def test_the_numbers_while_traffic_moves(net: Any, spawn: Any, plaintext: bool) -> None:
    pair = net.pair(streams=3, plaintext=plaintext)
    before = pair.near.metrics()
    assert (before.bytes_sent, before.bytes_received, before.retransmitted_bytes) == (0, 0, 0)
    assert before.last_health_check is None and before.last_error is None
    started = time.monotonic()
    traffic = Traffic(pair, spawn)
    net.wait_until(lambda: pair.near.metrics().bytes_sent >= 40 * MIB, "traffic")
    during, elapsed = pair.near.metrics(), time.monotonic() - started
    far = pair.far.metrics()
    traffic.stop()
    # a lane counts a chunk once it has sent it, which the peer may know sooner
    net.wait_until(lambda: pair.near.metrics().bytes_sent == traffic.bytes, "every lane to have counted")
    after = pair.near.metrics()
    assert 40 * MIB <= during.bytes_sent <= after.bytes_sent
    assert during.bytes_sent == sum(stream.bytes_sent for stream in during.streams) or during.bytes_sent > 0
    assert after.bytes_sent == traffic.bytes == pair.far.metrics().bytes_received
    assert (during.session_id, during.remote_addr) == (pair.near.id, pair.server.address)
    assert far.session_id == during.session_id
    assert during.transport_type == "tcp" and during.mode == "datacenter"
    assert during.active_streams == during.total_streams == len(during.streams) == 3
    assert during.failed_connections == during.lane_failures == during.retransmitted_bytes == 0
    assert during.healthy
    # the larger direction over the last five seconds, or since the session began
    assert 0 < during.throughput_mbps <= during.bytes_sent * 8 / 1e6 / max(elapsed * 0.5, 0.001)
    assert far.throughput_mbps > 0
    assert during.average_latency_s is not None and 0 < during.average_latency_s < 5
    assert during.packet_loss_rate is None or 0 <= during.packet_loss_rate < 0.5
    assert during.bandwidth_utilization_percent is None or 0 < during.bandwidth_utilization_percent <= 100


def test_each_stream_has_its_own_numbers(net: Any, spawn: Any) -> None:
    pair = net.pair(streams=3)
    begun = time.monotonic()
    traffic = Traffic(pair, spawn)
    net.wait_until(lambda: all(s.bytes_sent for s in pair.near.metrics().streams), "every stream to have its share")
    traffic.stop()
    net.wait_until(lambda: pair.near.metrics().bytes_sent == traffic.bytes, "every lane to have counted")
    near, far = pair.near.metrics().streams, pair.far.metrics().streams
    # each side counts its streams in the order in which they came up there; what they share is the incarnation
    same = {w.stream.id: pair.far.core.lanes[id].stream.id for id, w in pair.near.core.lanes.items()}
    assert {same[s.id]: s.bytes_sent for s in near} == {s.id: s.bytes_received for s in far}
    for stream in near:
        assert stream.healthy and stream.transport == "tcp" and stream.last_error is None
        assert stream.reconnects == stream.consecutive_failures == 0
        assert begun <= stream.last_active <= time.monotonic()
        assert stream.path.rtt_s is not None and stream.path.rtt_s > 0
        assert stream.path.cwnd and stream.path.mss


def test_the_congestion_control_is_what_the_kernel_says(net: Any) -> None:
    pair = net.pair()
    for end in pair.ends:
        for worker in end.core.lanes.values():
            raw = worker.lane._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
            name = raw.rstrip(b"\0").decode()
            assert name
            assert worker.stream.health().path.congestion == name
            assert end.metrics().congestion == name
        assert end.metrics().congestion_backend == "kernel"


def test_metrics_work_after_the_end_and_keep_the_totals(net: Any) -> None:
    pair = net.pair()
    pair.near.send(bytes(MIB)).wait(20)
    pair.far.recv(timeout=20)
    pair.near.close()
    assert pair.far.wait_closed(10)
    near, far = pair.near.metrics(), pair.far.metrics()
    assert near.bytes_sent == far.bytes_received == MIB
    assert not near.healthy and not far.healthy
    assert near.active_streams == 0 and near.total_streams == 2
    assert near.transport_type == "tcp" and near.congestion
    assert near.lane_failures == far.lane_failures == 0, "an orderly end is no failure"


def test_totals_survive_streams_that_leave(net: Any) -> None:
    pair = net.pair(streams=4)
    for count in (1, 4, 2):
        pair.near.send(bytes(3 * MIB)).wait(20)
        pair.far.recv(timeout=20)
        pair.near.adjust_streams(count)
    net.wait_until(lambda: len(pair.near.core.lanes) == len(pair.far.core.lanes) == 2, "both sides to agree")
    net.wait_until(lambda: pair.near.metrics().bytes_sent == 9 * MIB, "every lane to have counted")
    assert pair.far.metrics().bytes_received == 9 * MIB


def test_the_report_says_how_the_session_came_about(net: Any) -> None:
    pair = net.pair(streams=3)
    report = pair.near.report
    assert report.encrypted and report.transport == "tcp" and report.most_streams == 3
    assert 0 < report.setup_seconds < 20
    assert report.first_offered_at is None and report.last_done_at is None
    pair.near.send(bytes(MIB)).wait(20)
    report = pair.near.report
    assert report.first_offered_at is not None and report.last_done_at is not None
    assert report.first_offered_at < report.last_done_at


# ---- health ----------------------------------------------------------------------------------------


def test_a_healthy_session(net: Any, spawn: Any) -> None:
    pair = net.pair(streams=3)
    for end in pair.ends:
        report = end.health_check()
        assert report.healthy
        assert set(report.round_trips_s) == {1, 2, 3}
        assert all(trip is not None and 0 < trip < 5 for trip in report.round_trips_s.values())
        assert end.metrics().last_health_check is not None
    traffic = Traffic(pair, spawn)
    net.wait_until(lambda: traffic.bytes > 8 * MIB, "traffic")
    moved = pair.far.metrics().bytes_received
    assert pair.near.health_check().healthy
    traffic.stop()
    assert pair.far.metrics().bytes_received >= moved
    assert pair.far.core.engine.bytes_verified == pair.far.metrics().bytes_received, "no payload is touched"


def test_a_stream_that_does_not_answer_is_found(net: Any) -> None:
    pair = net.pair(streams=3)
    silent = next(iter(pair.far.core.lanes.values()))
    silent._own_frame = lambda header, payload: None
    number = pair.near.core.lanes[silent.id].stream.id
    report = pair.near.health_check(0.3)
    assert not report.healthy
    assert {id: trip is None for id, trip in report.round_trips_s.items()} == {id: id == number for id in (1, 2, 3)}


def test_a_stream_that_dies_during_the_check_is_found_at_once(net: Any, spawn: Any) -> None:
    pair = net.pair(streams=3)
    silent = next(iter(pair.far.core.lanes.values()))
    silent._own_frame = lambda header, payload: None
    number = pair.near.core.lanes[silent.id].stream.id
    task = spawn(pair.near.health_check, 30)
    task.join(0.1)
    assert task.running
    silent.lane.abort()
    report = task.outcome(10)
    assert not report.healthy
    assert report.round_trips_s[number] is None
    assert [id for id, trip in report.round_trips_s.items() if trip is None] == [number]
    (died,) = [stream for stream in report.streams if stream.id == number]
    assert died.last_error and died.consecutive_failures == 1


def test_a_dead_stream_leaves_its_mark(net: Any) -> None:
    pair = net.pair(streams=3)
    victim = next(iter(pair.near.core.lanes.values()))
    victim.lane.abort()
    net.wait_until(lambda: all(end.metrics().total_streams == 4 for end in pair.ends), "another lane in its place")
    net.wait_until(lambda: all(end.metrics().lane_failures == 1 for end in pair.ends), "both to have noticed")
    for end in pair.ends:
        metrics = end.metrics()
        assert metrics.active_streams == 3 and metrics.healthy and metrics.last_error
        (marked,) = [stream for stream in metrics.streams if stream.reconnects]
        assert (marked.reconnects, marked.last_error) == (1, metrics.last_error)
        assert end.health_check().healthy


def test_a_connection_that_fails_is_counted(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from amst_core.errors import ConnectError
    from amst_tcp.transport import TcpTransport

    pair = net.pair(streams=2)

    def failing(*args: Any) -> Any:
        raise ConnectError("no route to host")

    monkeypatch.setattr(TcpTransport, "connect", failing)
    started = time.monotonic()
    assert pair.near.adjust_streams(4) == 2
    assert time.monotonic() - started < 5, "what has failed is not waited for"
    assert pair.near.metrics().failed_connections >= 2
    assert pair.near.metrics().healthy
    monkeypatch.undo()
    net.wait_until(lambda: pair.near.adjust_streams(4) == 4, "they come when the way is free")


def test_progress_of_a_file_and_its_seconds(net: Any, tmp_path: Path) -> None:
    from amst_core.session.copying import upload

    (tmp_path / "root").mkdir()
    (tmp_path / "f").write_bytes(os.urandom(8 * MIB))
    pair = net.pair(root=tmp_path / "root")
    seen: list[Any] = []
    started = time.monotonic()
    result = upload(pair.near, [(tmp_path / "f", b"f")], progress=seen.append)
    assert 0 < result.seconds <= time.monotonic() - started
    assert (seen[-1].bytes_done, seen[-1].files_done) == (8 * MIB, 1)
    done = [state.bytes_done for state in seen]
    assert done == sorted(done)
