"""`amst serve` as operators meet it, and `amst bench` against it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator

import pytest
from waiting import wait_until

import amst_core
from amst_core.cli import traffic
from amst_core.cli.main import main
from amst_core.errors import ProtocolError

from .conftest import TIMEOUT_S, Shell, ended, on_a_terminal, read_terminal, serving
from .test_cli_copy import arriving, make_long
from .test_cli_options import KEYS

pytestmark = pytest.mark.needs_transport


def refused(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), 5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_it_says_where_it_listens_and_nothing_more_and_makes_its_credentials(amst, server):
    assert re.fullmatch(r"127\.0\.0\.1:[1-9][0-9]*", server.address)
    assert re.fullmatch("[0-9a-f]{64}\n", (amst.home / "state" / "token").read_text())
    server.process.terminate()
    out, _ = server.process.communicate(timeout=TIMEOUT_S)
    assert (server.process.returncode, out) == (0, "")
    assert (amst.home / "serve.log").read_text() == ""


def test_the_default_root_is_the_working_directory(amst):
    (amst.home / "a").write_bytes(b"a")
    with ended(amst.start("serve", "--listen", "127.0.0.1:0")) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[2]
        assert amst("cp", f"amst://{address}/a", "b").returncode == 0


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no dual-stack IPv6 here")
def test_every_address_means_both_families(amst):
    with serving(amst, amst.home / "root", listen="[::]:0") as running:
        assert running.address.startswith("[::]:")
        port = running.address.rpartition(":")[2]
        (amst.home / "a").write_bytes(b"a")
        for host in ("127.0.0.1", "[::1]"):
            done = amst("cp", "a", f"amst://{host}:{port}/")
            assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_in_good_order(number, server):
    server.process.send_signal(number)
    assert server.process.wait(TIMEOUT_S) == 0
    assert refused(server.address)


def test_sigint_stops_it_also_where_a_shell_started_it_in_the_background(amst):
    def ignore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    with ended(amst.start("serve", "--listen", "127.0.0.1:0", preexec_fn=ignore)) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("listening on")
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT_S) == 0


def test_it_lets_a_copy_under_way_finish(amst, server):
    # Large enough to be under way when the signal comes, small enough to finish within the limit.
    (amst.home / "some").write_bytes(os.urandom(1 << 20) * 256)
    with ended(amst.start("cp", "some", f"{server.url}/")) as process:
        wait_until(lambda: arriving(server.root), "the first bytes")
        server.process.terminate()
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    assert (server.root / "some").read_bytes() == (amst.home / "some").read_bytes()
    assert server.process.wait(TIMEOUT_S) == 0


def test_a_second_signal_ends_it_at_once(amst, server):
    make_long(amst.home / "long")
    with ended(amst.start("cp", "--bwlimit", "50MB/s", "long", f"{server.url}/")) as process:
        wait_until(lambda: arriving(server.root), "the first bytes")
        server.process.terminate()
        wait_until(lambda: "stopping" in (amst.home / "serve.log").read_text(), "it to begin to stop")
        server.process.terminate()
        assert server.process.wait(10) == -signal.SIGTERM
        process.communicate(timeout=TIMEOUT_S)
    assert not (server.root / "long").exists()


def test_a_port_in_use_is_1_and_a_bad_address_2(amst):
    with socket.create_server(("127.0.0.1", 0)) as sock:
        taken = amst("serve", "--listen", f"127.0.0.1:{sock.getsockname()[1]}")
    assert (taken.returncode, taken.stdout) == (1, "")
    assert "in use" in taken.stderr
    for bad in ("127.0.0.1:99999", "::1:9000", "h:x"):
        done = amst("serve", "--listen", bad)
        assert (done.returncode, done.stdout) == (2, ""), bad


def test_a_state_directory_open_to_others_is_6(amst):
    (amst.home / "state").mkdir(mode=0o700)
    (amst.home / "state").chmod(0o777)
    done = amst("serve", "--listen", "127.0.0.1:0")
    assert (done.returncode, done.stdout) == (6, "")
    assert "chmod 700" in done.stderr


def test_verbose_it_logs_who_came(amst):
    (amst.home / "a").write_bytes(b"a")
    with serving(amst, amst.home / "root", options=("-v",)) as running:
        assert amst("cp", "a", f"{running.url}/").returncode == 0
        wait_until(lambda: "opened by 127.0.0.1" in (amst.home / "serve.log").read_text(), "the log line")


# ---- bench --------------------------------------------------------------------------------


def measured(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    value = json.loads(done.stdout)
    assert list(value) == KEYS
    assert value["ok"] is True
    assert value["files"] == 0
    assert value["seconds"] > 0
    assert value["throughput_bytes_per_s"] == pytest.approx(value["bytes"] / value["seconds"])
    return dict(value)


@pytest.mark.parametrize("direction", [[], ["--reverse"]])
@pytest.mark.parametrize("options", [[], ["--plaintext", "--streams", "1"], ["--streams", "64"]])
def test_a_size_is_moved_to_the_byte(direction, options, amst, server):
    size = (20 << 20) + 12345
    value = measured(amst("bench", "--json", server.url, "--size", size, *direction, *options))
    assert value["bytes"] == size
    assert value["encrypted"] is ("--plaintext" not in options)
    assert 1 <= value["streams"] <= (int(options[-1]) if options else 16)


@pytest.mark.parametrize("direction", [[], ["--reverse"]])
def test_a_time_is_kept(direction, amst, server):
    value = measured(amst("bench", "--json", f"{server.url}/", "--time", "300ms", *direction))
    assert value["bytes"] >= 8 << 20
    assert 0.3 <= value["seconds"] < 30


@pytest.mark.parametrize("streams", [1, 64])
def test_so_many_streams_run_as_were_asked_for(streams, amst, server):
    value = measured(amst("bench", "--json", server.url, "--time", "2s", "--streams", streams))
    assert value["streams"] == streams
    assert value["lane_failures"] == 0


@pytest.mark.parametrize(("direction", "verb"), [([], "sent"), (["--reverse"], "received")])
def test_a_measurement_ends_with_a_summary(direction, verb, amst, server):
    done = amst("bench", server.url, "--size", "16MiB", *direction)
    assert (done.returncode, done.stdout) == (0, "")
    assert re.fullmatch(
        rf"{verb} 16\.0 MiB in [0-9.]+ s \([0-9.]+ [MG]iB/s\) over [0-9]+ tcp streams?, encrypted, verified\n",
        done.stderr,
    )
    assert amst("bench", "-q", server.url, "--size", "1MiB", *direction).stderr == ""


def test_messages_shrink_to_what_the_settings_allow(amst, server):
    value = measured(amst("bench", "--json", server.url, "--size", "5000001", "--set", "limits.max_message=1MiB"))
    assert value["bytes"] == 5000001


def test_a_server_lost_in_mid_measurement_is_5_with_what_had_arrived(amst, server):
    with on_a_terminal(amst, "bench", "--time", "1h", server.url) as (process, terminal):
        read_terminal(terminal, b"iB/s")
        server.process.kill()
        read_terminal(terminal, b"run it again")
        assert process.wait(TIMEOUT_S) == 5


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_measurement(number, code, amst, server):
    with on_a_terminal(amst, "bench", "--time", "1h", "--reverse", server.url) as (process, terminal):
        read_terminal(terminal, b"iB/s")
        process.send_signal(number)
        assert process.wait(TIMEOUT_S) == code, read_terminal(terminal, b"")
    assert measured(amst("bench", "--json", server.url, "--size", "1MiB"))["bytes"] == 1 << 20


# ---- the protocol of bench, in this process -----------------------------------------------


@pytest.fixture
def service(amst: Shell, monkeypatch: pytest.MonkeyPatch) -> Iterator[amst_core.Session]:
    """A session with a server in this process that offers the bench service."""
    monkeypatch.setenv("AMST_STATE_DIR", str(amst.home / "state"))
    with amst_core.listen("127.0.0.1:0", on_session=traffic.offer) as there:
        with amst_core.connect(there.address, streams=2) as session:
            yield session


@pytest.mark.parametrize(
    "request_",
    [
        b"nonsense", b"[]", b"\xff", b'{"send": true}', b"{" * 5000,
        b'{"send": true, "size": 1, "seconds": 1, "message": 1, "window": 1}',
        b'{"send": true, "size": -1, "seconds": null, "message": 1, "window": 1}',
        b'{"send": true, "size": null, "seconds": 1e9, "message": 1, "window": 1}',
        b'{"send": true, "size": null, "seconds": NaN, "message": 1, "window": 1}',
        b'{"send": true, "size": 1, "seconds": null, "message": 1000000000000, "window": 1}',
        b'{"send": true, "size": 1, "seconds": null, "message": 1, "window": 0}',
        b'{"send": true, "size": true, "seconds": null, "message": 1, "window": 1}',
    ],
    ids=range(12),
)  # fmt: skip
def test_a_request_that_makes_no_sense_is_refused_and_the_next_one_served(request_, service):
    service.send(request_, channel=traffic.CONTROL)
    assert "error" in json.loads(bytes(service.recv(traffic.CONTROL, timeout=20)))
    tally = traffic.Tally()
    traffic.receive(service, traffic.Load(3, None, 2, 1), tally, progress=lambda: None)
    assert tally.bytes == 3


def test_several_measurements_can_follow_each_other_in_a_session(service):
    for _ in range(2):
        for act in (traffic.send, traffic.receive):
            tally = traffic.Tally()
            calls: list[int] = []
            load = traffic.Load(100_000, None, 30_000, 2)
            act(service, load, tally, progress=lambda calls=calls: calls.append(1))
            assert (tally.bytes, len(calls)) == (100_000, 4)
            assert tally.seconds > 0


def test_a_server_without_the_service_is_no_server_for_bench(amst, monkeypatch, capsys):
    monkeypatch.setenv("AMST_STATE_DIR", str(amst.home / "state"))
    monkeypatch.setattr(traffic, "_ANSWER_TIMEOUT_S", 0.2)
    with amst_core.listen("127.0.0.1:0") as there:
        assert main(["bench", f"amst://{there.address}"]) == 4
    assert "amst serve" in capsys.readouterr().err


def test_a_server_that_tells_another_amount_than_came_is_not_believed(amst, monkeypatch):
    monkeypatch.setenv("AMST_STATE_DIR", str(amst.home / "state"))

    def lie(session: amst_core.Session) -> None:
        session.recv(traffic.CONTROL)
        session.send(b'{"ready": true}', channel=traffic.CONTROL)
        session.send(b"abc", channel=traffic.DATA[0])
        for channel in traffic.DATA:
            session.send(b"", channel=channel)
        session.send(b'{"bytes": 4, "seconds": 1}', channel=traffic.CONTROL)

    with amst_core.listen("127.0.0.1:0", on_session=lie) as there:
        with amst_core.connect(there.address, streams=2) as session:
            with pytest.raises(ProtocolError, match="4 bytes, but 3"):
                traffic.receive(session, traffic.Load(3, None, 3, 1), traffic.Tally(), progress=lambda: None)
