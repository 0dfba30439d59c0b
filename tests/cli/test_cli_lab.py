"""`amst lab`: a command whose network is a path, as users run it. Most of it needs root."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

from amst_core.cli import options
from amst_core.cli.main import main
from amst_core.testing import netlab

from .conftest import AMST, Shell, ended, read_terminal


@pytest.fixture
def root() -> None:
    reason = netlab.missing()
    if reason is not None:
        assert os.environ.get("CI") != "true", f"CI must run this: {reason}"
        pytest.skip(reason)


needs_root = pytest.mark.usefixtures("root")


def report(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The last line of standard error."""
    value = json.loads(done.stderr.splitlines()[-1])
    assert isinstance(value, dict)
    return value


def test_each_direction_has_options_of_its_own() -> None:
    parsed = options.parse(["lab", "--rate", "1MB/s", "--up-delay", "1s", "--down-loss", "2%", "--", "cp", "--json"])
    assert (parsed.rate, parsed.up_delay, parsed.down_loss, parsed.rtt) == (1e6, 1.0, 0.02, None)
    assert parsed.operands == ["cp", "--json"] and not parsed.json


def test_the_page_has_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "lab.md").read_text()
    assert main(["lab", "--help"]) == 0
    flags = set(re.findall(r"--[a-z-]+[a-z]", capsys.readouterr().out)) - {"--help", "--version", "--time"}
    missing = [flag for flag in flags if f"{flag}" not in page and flag.replace("--down-", "--up-") not in page]
    assert len(flags) > 20 and not missing


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "lab runs a command"),
        (["--loss", "90%", "--burst", "2", "--", "true"], "burst: at a loss of 0.9 it is 9 at least"),
        (["--congestion", "nonesuch", "--", "true"], "this kernel has no 'nonesuch'"),
        (["--rate", "10", "--", "true"], "rate: 10.0 is less than 1 kB/s"),
    ],
)
def test_labs_that_make_no_sense_are_exit_2(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", *argv]) == 2
    assert words in capsys.readouterr().err


def test_without_root_it_says_so_and_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["lab", "--json", "--", "echo", "here"]) == 6
    out, err = capfd.readouterr()
    assert out == ""
    complaint, line = err.splitlines()
    assert complaint == "amst: a lab needs root: it makes network namespaces and devices"
    assert json.loads(line)["error"] == {"kind": "refused", "message": complaint[6:], "retryable": False}


@needs_root
@pytest.mark.needs_transport
def test_a_bench_in_a_lab_needs_nothing_else(amst: Shell) -> None:
    done = amst(
        "lab", "--rate", "100Mbit/s", "--rtt", "20ms", "--json", "--",
        "sh", "-c", "amst bench --json amst://$AMST_LAB_FAR:9000 --size 2MiB",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes"] == 2 << 20
    value = report(done)
    assert (value["ok"], value["exit_code"], value["error"]) == (True, 0, None)
    assert value["path"]["up"] == {
        "rate": 12.5e6, "delay": 0.01, "jitter": 0.0, "loss": 0.0, "burst": None, "buffer": 250_000
    }  # fmt: skip
    up = value["ways"][0]
    assert up["direction"] == "up" and up["bytes"] > 2 << 20 and up["packets"] > (2 << 20) / 1500
    assert value["trusted"] == (value["faults"] == [])
    assert value["lateness"].keys() == {"mean", "p99", "max"}


@needs_root
@pytest.mark.needs_transport
def test_a_copy_goes_to_the_far_host(amst: Shell) -> None:
    (amst.home / "a").write_bytes(os.urandom(1 << 20))
    script = 'amst cp -q a amst://$AMST_LAB_FAR/ && amst cp -q amst://[$AMST_LAB_FAR6]/a - | cmp - a && echo same'
    done = amst("lab", "--rtt", "5ms", "-q", "--", "sh", "-c", script)
    assert (done.returncode, done.stdout) == (0, "same\n"), done.stderr


@needs_root
def test_the_exit_code_is_the_commands_and_its_output_is_untouched(amst: Shell) -> None:
    def lab(*argv: str) -> subprocess.CompletedProcess[str]:
        return amst("lab", "--far", "", "-q", "--", *argv)

    done = lab("sh", "-c", "echo out; exit 7")
    assert (done.returncode, done.stdout) == (7, "out\n")
    assert lab("sh", "-c", "kill -9 $$").returncode == 137
    missing = lab("no-such-command")
    assert (missing.returncode, missing.stderr) == (127, "amst: no-such-command: command not found\n")
    (amst.home / "plain").touch()
    assert lab("./plain").returncode == 126


@needs_root
def test_the_report_says_what_was_asked_and_what_became_of_it(amst: Shell) -> None:
    code = "import socket as s, os; s.socket(2, 2).sendto(bytes(972), (os.environ['AMST_LAB_FAR'], 9))"
    done = amst(
        "lab", "--up-rate", "8Mbit/s", "--rtt", "6ms", "--down-loss", "5%", "--down-burst", "3", "--seed", "5",
        "--far", "", "--report", "report.json", "--", "python3", "-c", code,
    )  # fmt: skip
    assert done.returncode == 0
    first, second, third = done.stderr.splitlines()
    counts = "1 packet, 1000 bytes; 0 lost, 0 found the buffer full"
    assert first == f"lab: up   8 Mbit/s (1MB/s), 3ms delay, buffer 64KiB: {counts}"
    assert second.startswith("lab: down any rate, 3ms delay, 5 % lost in bursts of 3:")
    assert third.startswith("lab: seed 5, ") and "to be trusted" in third
    value = json.loads((amst.home / "report.json").read_text())
    assert value["ways"][0]["bytes"] == 1000 and value["seed"] == 5
    assert value["command"] == ["python3", "-c", code]
    assert amst("lab", "--far", "", "--report", "/nonexistent/x", "--", "true").returncode == 3


@needs_root
def test_the_far_host_runs_what_it_is_told(amst: Shell) -> None:
    listen = (
        "import socket, os; l = socket.create_server((os.environ['AMST_LAB_FAR'], 7)); print('noise');"
        " c, _ = l.accept(); c.sendall(c.getpeername()[0].encode())"
    )
    ask = "import socket, os; print(socket.create_connection((os.environ['AMST_LAB_FAR'], 7)).recv(99).decode())"
    done = amst("lab", "-q", "--far", f'python3 -c "{listen}"', "--", "python3", "-c", ask)
    assert (done.returncode, done.stdout) == (0, "10.99.0.1\n"), done.stderr
    done = amst("lab", "--far", "exit 3", "--", "echo", "here")
    assert (done.returncode, done.stdout) == (1, "")
    assert "the far host's command ended with exit code 3: exit 3" in done.stderr


@needs_root
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 44), (signal.SIGINT, 45)])
def test_signals_reach_the_command_which_decides(number: int, code: int, amst: Shell) -> None:
    script = "trap 'exit 44' TERM; trap 'exit 45' INT; echo $$; while :; do sleep 0.05; done"
    with ended(amst.start("lab", "--far", "", "--json", "--", "sh", "-c", script, start_new_session=True)) as process:
        assert int(process.stdout.readline()) > 0
        process.send_signal(number)
        assert process.wait(30) == code
        assert json.loads(process.stderr.read().splitlines()[-1])["exit_code"] == code


@needs_root
def test_ctrl_c_on_a_terminal_reaches_the_command_once(amst: Shell) -> None:
    script = (
        "n=0; trap 'n=$((n+1))' INT; echo $$; while [ $n = 0 ]; do sleep 0.05; done;"
        " sleep 0.3; sleep 0.05; exit $((40 + n))"
    )
    # A session of its own, whose terminal that is: then Ctrl-C goes to all of its foreground.
    begin = "import os, sys, fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    argv = [sys.executable, "-c", begin, *AMST, "lab", "--far", "", "-q", "--", "sh", "-c", script]
    terminal, other = os.openpty()
    try:
        process = subprocess.Popen(
            argv, cwd=amst.home, env=amst.env, stdin=other, stdout=other, stderr=other, start_new_session=True
        )
        os.close(other)
        with ended(process):
            assert read_terminal(terminal, b"\n").strip().isdigit()
            os.write(terminal, b"\x03")
            assert process.wait(30) == 41
    finally:
        os.close(terminal)


@needs_root
def test_a_killed_lab_takes_its_command_along(amst: Shell) -> None:
    # who is killed cannot remove the directory it made for the far host's server
    amst.env["TMPDIR"] = str(amst.home)
    started = amst.start("lab", "--far", "", "--", "sh", "-c", "echo $$; exec sleep 600")
    with ended(started) as process:
        command = int(process.stdout.readline())
        process.kill()
        wait_until(lambda: not Path(f"/proc/{command}").exists() or " Z " in stat(command), "the command to end")


def stat(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return " Z "
