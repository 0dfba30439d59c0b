"""Labs as they run: measured against what was asked, changed, cleaned up after every kind of end. Needs root.

Where a figure is compared, the run is rejected and made again when the emulator could not keep its times.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any

import pytest
from waiting import wait_until

from amst_core.errors import AmstError
from amst_core.testing.netlab import (
    Host,
    Lab,
    LabRejectedError,
    LabUnavailableError,
    Link,
    Path,
    access,
    kernel,
    missing,
    probes,
    repeated,
)
from amst_core.testing.netlab.lab import remove_leftovers
from amst_core.testing.netlab.pipe import Losses

CLOSE = 0.03
"""How far what is measured may be from what was asked."""

LATE_S = 1e-3
"""What a slow machine may take of its own for a round trip: a lab rejects its run when packets are later than this."""

PATIENCE_S = 30.0
ETH_P_ALL = 3


@pytest.fixture(autouse=True)
def _labs() -> None:
    reason = missing()
    if reason is not None:
        assert os.environ.get("CI") != "true", f"CI must run this: {reason}"
        pytest.skip(reason)


def close(value: float) -> Any:
    return pytest.approx(value, rel=CLOSE)


def close_time(value: float) -> Any:
    return pytest.approx(value, rel=CLOSE, abs=LATE_S)


# ---- what was asked for -----------------------------------------------------------------------


@pytest.mark.alone
@pytest.mark.parametrize(("rate", "together"), [("10Mbit/s", 1), ("100Mbit/s", 1), ("500Mbit/s", 40)])
def test_packets_arrive_at_the_rate(rate: str, together: int) -> None:
    path = Path(rate=rate, buffer="100MB")

    def measured(lab: Lab) -> float:
        a, b = lab.hosts
        return probes.send(a, b, b.address, 400 if rate == "10Mbit/s" else 4000, together=together).rate

    assert repeated(lambda: Lab(path), measured) == close(path.up.rate or 0)


@pytest.mark.alone
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("rtt", [0.02, 0.1])
def test_the_round_trip_takes_its_time(rtt: float, family: int) -> None:
    def measured(lab: Lab) -> float:
        a, b = lab.hosts
        return min(probes.ping(a, b.address if family == 4 else b.address6, 8))

    assert repeated(lambda: Lab(Path(rate="100Mbit/s", rtt=rtt)), measured) == close_time(rtt)


@pytest.mark.alone
def test_jitter_is_as_wide_as_asked_and_nothing_is_overtaken() -> None:
    def measured(lab: Lab) -> probes.Probes:
        a, b = lab.hosts
        return probes.send(a, b, b.address, 2000, size=100, interval=0.001)

    sent = repeated(lambda: Lab(Path(rtt="40ms", jitter="10ms")), measured)
    assert sent.loss == 0 and sent.in_order
    assert statistics.mean(sent.delays) == close(0.025)
    cuts = statistics.quantiles(sent.delays, n=100)
    assert cuts[-1] - cuts[0] == close(0.98 * 0.01)
    assert probes.spread(sent.delays) == close(0.01)


@pytest.mark.parametrize(("burst", "seed"), [(None, 3), (5.0, 1)])
def test_exactly_those_packets_are_lost_that_the_seed_says(burst: float | None, seed: int) -> None:
    count = 60_000
    with Lab(Path(loss="5%", burst=burst), seed=seed) as lab:
        a, b = lab.hosts
        sent = probes.send(a, b, b.address, count, size=200, together=50)
        report = lab.report()
    passing = Losses(0.05, burst, random.Random(f"{seed}/0")).runs(count)
    assert [arrival.number for arrival in sent.arrivals] == [n for first, end in passing for n in range(first, end)]
    assert sent.loss == close(0.05)
    assert sent.burst == close(burst or 1 / 0.95)
    assert report.way("up").dropped_by_loss == len(sent.lost)
    assert report.way("up").packets == count


def test_what_the_buffer_cannot_hold_is_dropped_and_counted() -> None:
    with Lab(Path(rate="10Mbit/s", buffer=100 * 1500)) as lab:
        a, b = lab.hosts
        sent = probes.send(a, b, b.address, 300)
        counts = lab.report().way("up")
    # What leaves while the burst comes in makes room for a few more.
    assert 100 <= len(sent.arrivals) < 200
    assert counts.dropped_by_queue == 300 - len(sent.arrivals)
    assert (counts.packets, counts.bytes) == (300, 450_000)
    assert (counts.delivered_packets, counts.delivered_bytes) == (len(sent.arrivals), len(sent.arrivals) * 1500)


@pytest.mark.alone
def test_each_direction_is_its_own() -> None:
    up = {"rate": "20Mbit/s", "delay": "30ms"}
    down = {"rate": "50Mbit/s", "delay": "10ms", "loss": 1.0}

    def measured(lab: Lab) -> tuple[float, float, float, float]:
        a, b = lab.hosts
        there = probes.send(a, b, b.address, 500)
        with b.enter(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as lost:
            lost.sendto(b"", (a.address, 9))
        wait_until(lambda: lab.report().way("down").dropped_by_loss == 1, "the packet to be lost")
        lab.link.set(down={"loss": 0})
        back = probes.send(b, a, a.address, 500)
        assert (there.loss, back.loss) == (0, 0)
        return there.rate, there.delays[0], back.rate, back.delays[0]

    found = repeated(lambda: Lab(Path(buffer="10MB", up=up, down=down)), measured)
    # A packet is there when its last byte is.
    assert found == (
        close(2.5e6), close_time(0.03 + 1500 / 2.5e6), close(6.25e6), close_time(0.01 + 1500 / 6.25e6)
    )  # fmt: skip


@pytest.mark.alone
def test_a_path_changes_while_packets_are_under_way() -> None:
    def measured(lab: Lab) -> tuple[float, float, float]:
        a, b = lab.hosts
        got: list[probes.Probes] = []
        sending = threading.Thread(target=lambda: got.append(probes.send(a, b, b.address, 1000)))
        sending.start()
        wait_until(lambda: lab.report().way("up").delivered_packets > 300, "a third of them to arrive")
        lab.link.set(rate="40Mbit/s")
        sending.join(PATIENCE_S)
        (sent,) = got
        assert sent.in_order and not sent.loss
        gaps = [after.arrived - before.arrived for before, after in itertools.pairwise(sent.arrivals)]
        lab.link.set(rtt="100ms")
        rtt = min(probes.ping(a, b.address, 5))
        return statistics.mean(gaps[50:250]), statistics.mean(gaps[-250:-50]), rtt

    path = Path(rate="20Mbit/s", rtt="20ms", buffer="10MB")
    assert repeated(lambda: Lab(path), measured) == (close(1500 / 2.5e6), close(1500 / 5e6), close_time(0.1))


# ---- several hosts and paths ------------------------------------------------------------------


@pytest.mark.alone
def test_two_paths_between_the_same_hosts_are_independent() -> None:
    def make() -> Lab:
        return Lab(
            Link("a", "b", Path(rate="10Mbit/s", rtt="40ms", buffer="10MB")),
            Link("a", "b", Path(rate="50Mbit/s", rtt="20ms", buffer="10MB")),
        )

    def measured(lab: Lab) -> list[tuple[float, float]]:
        a, b = lab.hosts
        rtts = [min(probes.ping(a, address, 5)) for address in b.addresses]
        rates = [0.0, 0.0]

        def send(number: int) -> None:
            rates[number] = probes.send(a, b, b.addresses[number], (300, 1500)[number]).rate

        sending = [threading.Thread(target=send, args=(number,)) for number in (0, 1)]
        for thread in sending:
            thread.start()
        for thread in sending:
            thread.join(PATIENCE_S)
        return list(zip(rtts, rates, strict=True))

    slow, quick = repeated(make, measured)
    assert slow == (close_time(0.04), close(1.25e6))
    assert quick == (close_time(0.02), close(6.25e6))


@pytest.mark.alone
def test_hosts_at_a_router_reach_each_other_over_both_their_links() -> None:
    def make() -> Lab:
        return Lab(
            access("a", Path(rate="80Mbit/s", rtt="20ms", buffer="10MB")),
            access("b", Path(rate="40Mbit/s", rtt="40ms", buffer="10MB")),
            access("c", Path(rate="20Mbit/s", rtt="60ms", buffer="10MB")),
        )

    def measured(lab: Lab) -> tuple[float, ...]:
        a, b, c = lab.hosts
        rtts = [min(probes.ping(a, host.address, 5)) for host in (b, c)]
        rtts.append(min(probes.ping(b, c.address6, 5)))
        rates = [probes.send(a, host, host.address, 800).rate for host in (b, c)]
        assert lab.report().way("down", 2).delivered_packets == 5 + 5 + 800
        return (*rtts, *rates)

    times = (close_time(0.06), close_time(0.08), close_time(0.1))
    assert repeated(make, measured) == (*times, close(5e6), close(2.5e6))


def test_pairs_of_hosts_have_paths_of_their_own_and_others_none() -> None:
    with Lab(Link("a", "b", Path()), Link("b", "c", Path())) as lab:
        a, b, c = lab.hosts
        for one, address in ((a, b.addresses[0]), (b, a.address), (b, c.address), (c, b.addresses[1])):
            assert len(probes.ping(one, address, 1)) == 1
        with pytest.raises(OSError, match="unreachable"):
            probes.ping(a, c.address, 1)


def test_a_host_sees_nothing_but_its_lab() -> None:
    with Lab(Path()) as lab:
        names = lab.hosts[0].run([sys.executable, "-c", "import socket; print(socket.if_nameindex())"]).stdout
        assert "'lo'" in names and "'wan0'" in names and names.count("(") == 2
        before = os.stat("/proc/self/ns/net").st_ino
        with lab.hosts[1].enter():
            assert os.stat("/proc/thread-self/ns/net").st_ino != before
        assert os.stat("/proc/thread-self/ns/net").st_ino == before


def test_several_labs_run_at_once_with_the_same_addresses() -> None:
    with contextlib.ExitStack() as stack:
        labs = [stack.enter_context(Lab(Path(rtt=delay))) for delay in (0.01, 0.03, 0.05)]
        assert len({lab.hosts[1].address for lab in labs}) == 1
        times = [min(probes.ping(*(lab.hosts[0], lab.hosts[1].address), 5)) for lab in labs]
    assert times == sorted(times)
    assert [0 < found - asked < 0.02 for found, asked in zip(times, (0.01, 0.03, 0.05), strict=True)] == [True] * 3


# ---- offloads ---------------------------------------------------------------------------------


def transfer(sender: Host, receiver: Host, address: str, data: bytes) -> str:
    """Send bytes over TCP; the digest of what has arrived."""
    digest = hashlib.sha256()
    with receiver.enter():
        listener = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)

    def receive() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(PATIENCE_S)
            while block := connection.recv(1 << 16):
                digest.update(block)

    with listener:
        listener.settimeout(PATIENCE_S)
        receiving = threading.Thread(target=receive)
        receiving.start()
        with sender.enter():
            connection = socket.create_connection(listener.getsockname()[:2], PATIENCE_S)
        with connection:
            connection.sendall(data)
        receiving.join(PATIENCE_S)
    return digest.hexdigest()


def damaged(host: Host) -> int:
    """TCP and UDP packets that the host's kernel refused for their checksum."""
    rows = [line.split() for line in host.proc_net("snmp").splitlines()]
    return sum(
        int(values[names.index("InCsumErrors")])
        for names, values in zip(rows[::2], rows[1::2], strict=True)
        if names[0] in ("Tcp:", "Udp:")
    )


@pytest.mark.parametrize("six", [False, True])
@pytest.mark.parametrize("offload", [{}, {"far": False}, {"here": False}, {"here": False, "far": False}])
def test_what_is_sent_over_tcp_arrives_intact_through_every_kind_of_device(offload: dict[str, bool], six: bool) -> None:
    data = random.Random(1).randbytes(4 << 20)
    path = Path(rate="200Mbit/s", rtt="4ms", loss="0.5%")
    with Lab(Link("here", "far", path, offload=offload)) as lab:
        here, far = lab.hosts
        arrived = transfer(here, far, far.address6 if six else far.address, data)
        counts = lab.report().way("up")
        assert arrived == hashlib.sha256(data).hexdigest()
        assert damaged(here) == damaged(far) == 0
    # Whatever came in at once was counted, and lost, by packets of 1500 bytes.
    assert counts.packets > len(data) / 1500 and counts.dropped_by_loss > 0 and counts.refused == 0


def test_without_offloads_the_kernel_hands_over_single_packets() -> None:
    with Lab(Link("here", "far", Path(rtt="2ms"), offload=False)) as lab:
        here, far = lab.hosts
        with here.enter():
            tap = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
        with tap:
            tap.bind(("wan0", ETH_P_ALL))
            tap.setblocking(False)
            transfer(here, far, far.address, bytes(1 << 19))
            sizes = []
            with contextlib.suppress(BlockingIOError):
                while True:
                    sizes.append(len(tap.recv(1 << 16)))
    assert 1400 < max(sizes) <= 1500


@pytest.mark.parametrize("offload", [True, False])
def test_datagrams_sent_at_once_arrive_one_by_one(offload: bool) -> None:
    path = Path(rate="100Mbit/s", buffer="1MB")
    with Lab(Link("here", "far", path, offload={"here": True, "far": offload})) as lab:
        here, far = lab.hosts
        sent = [probes.send(here, far, address, 200, together=25, size=1001) for address in (far.address, far.address6)]
        assert damaged(far) == 0
    assert [each.loss for each in sent] == [0, 0] and all(each.in_order for each in sent)


# ---- lateness ---------------------------------------------------------------------------------


def test_a_run_in_which_packets_were_late_is_rejected() -> None:
    with Lab(Path(rtt="20ms")) as lab:
        a, b = lab.hosts
        assert lab.report().faults == () or lab.report().late_p99 > 0
        os.kill(lab.emulator, signal.SIGSTOP)
        pinging = threading.Thread(target=probes.ping, args=(a, b.address, 1))
        pinging.start()
        wait_until(lambda: stopped(lab.emulator), "the emulator to stop")
        time.sleep(0.2)
        os.kill(lab.emulator, signal.SIGCONT)
        pinging.join(PATIENCE_S)
        with pytest.raises(LabRejectedError, match=r"cannot be trusted: .* is the bound") as caught:
            lab.check()
        assert caught.value.retryable
        assert not lab.report().trusted
    assert not lab.report().trusted  # the last word, after its end


def stopped(pid: int) -> bool:
    return FilePath(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_rejected_runs_are_made_again_until_one_is_good() -> None:
    bounds = iter((0.0, 0.0, 10.0))
    labs: list[Lab] = []

    def make() -> Lab:
        bound = next(bounds)
        labs.append(Lab(Path(rtt="2ms"), late_p99=bound, late_max=10.0))
        return labs[-1]

    assert repeated(make, lambda lab: len(probes.ping(lab.hosts[0], lab.hosts[1].address, 2))) == 2
    assert len(labs) == 3 and not any(lab.running for lab in labs)
    bounds = iter((0.0, 0.0, 10.0))
    with pytest.raises(LabRejectedError):
        repeated(make, lambda lab: probes.ping(lab.hosts[0], lab.hosts[1].address, 2), tries=2)


# ---- settings ---------------------------------------------------------------------------------


def test_settings_of_the_hosts_are_as_asked() -> None:
    with Lab(Path(), congestion="reno", tcp_memory=1 << 24, sysctls={"net.ipv4.tcp_sack": "0"}) as lab:
        for host in lab.hosts:
            assert host.sysctl("net.ipv4.tcp_no_metrics_save") == "1"
            assert host.sysctl("net.ipv4.tcp_congestion_control") == "reno"
            assert host.sysctl("net.ipv4.tcp_rmem") == "4096 131072 16777216"
            assert host.sysctl("net.ipv4.tcp_wmem") == "4096 65536 16777216"
            assert host.sysctl("net.ipv4.tcp_sack") == "0"
        assert lab.hosts[0].sysctl("net.ipv4.tcp_sack", "1") == "1"
        assert lab.hosts[1].sysctl("net.ipv4.tcp_sack") == "0"
        with lab.hosts[0].enter(), socket.socket() as made:
            assert made.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"reno"


def test_a_host_tells_where_somebody_listens() -> None:
    with Lab(Path()) as lab:
        here, far = lab.hosts
        with far.enter():
            listeners = [socket.create_server(("", 70)), socket.create_server(("::", 71), family=socket.AF_INET6)]
        with listeners[0], listeners[1]:
            assert (far.listening(), here.listening()) == ({70, 71}, set())


def test_a_setting_that_cannot_be_made_is_named() -> None:
    with pytest.raises(LabUnavailableError, match=r"cannot set net\.ipv4\.tcp_sack to 'x': Invalid argument"):
        Lab(Path(), sysctls={"net.ipv4.tcp_sack": "x"}).start()


def test_without_root_or_device_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 1000)
        with pytest.raises(LabUnavailableError, match="needs root"):
            Lab(Path()).start()
    monkeypatch.setattr(kernel, "TUN", "/dev/net/nothing")
    with pytest.raises(LabUnavailableError, match="/dev/net/nothing"):
        Lab(Path()).start()


# ---- docs/lab.md ------------------------------------------------------------------------------


def test_the_examples_of_the_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    page = FilePath(__file__).resolve().parents[2] / "docs" / "lab.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    namespace: dict[str, Any] = {}
    for number, source in enumerate(blocks, 1):
        exec(compile(source, f"docs/lab.md, example {number}", "exec"), namespace)
    assert "runs with the path to 10.99.0.2" in capsys.readouterr().out
    for lab in (namespace["two_paths"], namespace["star"]):
        with lab:
            hosts = lab.hosts
            assert all(len(probes.ping(hosts[0], address, 1)) == 1 for address in hosts[-1].addresses)


# ---- how labs end -----------------------------------------------------------------------------


def test_processes_end_with_their_lab_also_their_children() -> None:
    with Lab(Path()) as lab:
        script = "setsid sleep 600 & echo $!; wait"
        started = lab.hosts[0].popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True)
        assert started.stdout is not None
        with started.stdout as out:
            child = int(out.readline())
        emulator = lab.emulator
    assert started.returncode == -signal.SIGTERM
    assert not alive(child) and not alive(emulator)


def test_an_exception_ends_the_lab() -> None:
    with pytest.raises(ZeroDivisionError), Lab(Path()) as lab:
        sleeper = lab.hosts[1].popen(["sleep", "600"])
        emulator = lab.emulator
        raise ZeroDivisionError
    assert not alive(emulator) and sleeper.returncode is not None and not lab.running


HOLDER = """
import sys, time
from amst_core.testing.netlab import Lab, Path
lab = Lab(Path())
lab.start()
sleepers = [host.popen(["sleep", "600"]) for host in lab.hosts]
print(lab.emulator, *(sleeper.pid for sleeper in sleepers), flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def holder() -> Iterator[tuple[subprocess.Popen[str], int, list[int]]]:
    """A process that holds a lab; the ids of its emulator and of what it has started on its hosts."""
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        emulator, *sleepers = map(int, process.stdout.readline().split())
        try:
            yield process, emulator, sleepers
        finally:
            process.kill()


def alive(pid: int) -> bool:
    try:
        return FilePath(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_lab_is_gone_when_the_process_that_holds_it_is_killed(number: int) -> None:
    with holder() as (process, emulator, sleepers):
        spaces = [os.open(f"/proc/{pid}/ns/net", os.O_RDONLY) for pid in sleepers]
        try:
            process.send_signal(number)
            wait_until(lambda: not any(map(alive, (emulator, *sleepers))), "all of it to end")
            assert kernel.processes_in(spaces) == []
        finally:
            for space in spaces:
                os.close(space)


def test_what_a_lab_left_whose_emulator_was_killed_too_is_removed_by_the_next() -> None:
    with holder() as (process, emulator, sleepers):
        os.kill(emulator, signal.SIGSTOP)
        process.kill()
        process.wait()
        os.kill(emulator, signal.SIGKILL)
        wait_until(lambda: not alive(emulator), "the emulator to end")
        assert all(map(alive, sleepers))
        with Lab(Path()) as lab:
            mine = lab.hosts[0].popen(["sleep", "600"])
            wait_until(lambda: not any(map(alive, sleepers)), "the leftovers to end")
            assert mine.pid not in remove_leftovers() and mine.poll() is None


def test_the_death_of_the_emulator_is_told() -> None:
    with Lab(Path()) as lab:
        sleeper = lab.hosts[0].popen(["sleep", "600"])
        os.kill(lab.emulator, signal.SIGKILL)
        with pytest.raises(AmstError, match="emulator"):
            lab.check()
        with pytest.raises(AmstError, match="emulator"):
            lab.link.set(rate=1e6)
    assert sleeper.returncode is not None
    with pytest.raises(AmstError):
        lab.report()


def test_a_lab_starts_once_and_closes_as_often_as_asked() -> None:
    lab = Lab(Path())
    lab.start()
    with pytest.raises(AmstError, match="starts once"):
        lab.start()
    lab.close()
    lab.close()
    assert lab.report().ways[0].packets == 0


def test_nothing_is_left_open() -> None:
    missing()
    before = sorted(os.listdir("/proc/self/fd"))
    with Lab(Path()) as lab:
        lab.hosts[0].run(["true"])
    assert sorted(os.listdir("/proc/self/fd")) == before
