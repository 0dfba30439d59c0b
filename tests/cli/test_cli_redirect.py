"""`amst cp` with `-`: standard input to a file of a server, and a file of a server to standard output."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import wait_until

from .conftest import AMST, TIMEOUT_S, Serving, Shell, ended, make_shell, on_a_terminal, read_terminal, serving
from .test_cli_options import KEYS

pytestmark = pytest.mark.needs_transport

CONTENT = os.urandom(5_000_017)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shell, Serving]]:
    shell = make_shell(tmp_path_factory.mktemp("shared"))
    options = ("--set", "limits.session_timeout=3s")
    with serving(shell, shell.home / "root", options=options) as running:
        yield shell, running


@pytest.fixture
def place(shared: tuple[Shell, Serving], tmp_path: Path) -> tuple[Shell, str, Path]:
    """amst with the shared server's token; a URL of the test's own; where that is."""
    shell, running = shared
    (running.root / tmp_path.name).mkdir()
    mine = make_shell(tmp_path)
    mine.env["AMST_STATE_DIR"] = shell.env["AMST_STATE_DIR"]
    return mine, f"{running.url}/{tmp_path.name}", running.root / tmp_path.name


def feed(amst: Shell, data: bytes | None, *args: object, **options: object) -> subprocess.CompletedProcess[bytes]:
    """Run ``amst ARGS`` with ``data`` on a pipe as its standard input; output as bytes."""
    given = {"stdin": subprocess.DEVNULL} if data is None else {"input": data}
    return subprocess.run(
        [*AMST, *map(str, args)], cwd=amst.home, env=amst.env, capture_output=True, timeout=TIMEOUT_S, check=False,
        **{**given, **options},
    )  # fmt: skip


def is_empty(there: Path) -> bool:
    """Nothing is left, temporary files neither."""
    return not list(there.iterdir())


@pytest.mark.parametrize("size", [0, 1, 65_536, len(CONTENT)])
@pytest.mark.parametrize("options", [(), ("--plaintext",), ("--streams", 1)], ids=["sealed", "plaintext", "1 stream"])
def test_what_goes_in_comes_out(place, size, options):
    amst, url, there = place
    data = CONTENT[:size]
    up = feed(amst, data, "cp", *options, "-", f"{url}/a/file")
    assert (up.returncode, up.stdout) == (0, b"")
    assert b"copied 1 file" in up.stderr and b"verified" in up.stderr
    assert (there / "a" / "file").read_bytes() == data
    down = feed(amst, None, "cp", *options, f"{url}/a/file", "-")
    assert (down.returncode, down.stdout) == (0, data)
    assert b"copied 1 file" in down.stderr


def test_a_file_as_standard_input_and_output(place, tmp_path):
    amst, url, there = place
    (tmp_path / "in").write_bytes(CONTENT)
    with (tmp_path / "in").open("rb") as source, (tmp_path / "out").open("wb") as target:
        assert feed(amst, None, "cp", "-q", "-", f"{url}/f", stdin=source).returncode == 0
        command = [*AMST, "cp", "-q", f"{url}/f", "-"]
        assert subprocess.run(command, env=amst.env, stdout=target, timeout=TIMEOUT_S, check=False).returncode == 0
    assert (there / "f").read_bytes() == (tmp_path / "out").read_bytes() == CONTENT


def test_the_file_has_the_mode_of_a_new_one_and_replaces_what_was_there(place):
    amst, url, there = place
    (there / "f").write_bytes(b"old")
    began = time.time()
    feed(amst, b"new", "cp", "-", f"{url}/f", umask=0o027)
    status = (there / "f").stat()
    assert ((there / "f").read_bytes(), status.st_mode & 0o777) == (b"new", 0o640)
    assert began - 1 <= status.st_mtime <= time.time() + 1


def test_json_stays_away_from_the_data(place):
    amst, url, _ = place
    up = feed(amst, CONTENT, "cp", "--json", "-", f"{url}/f")
    said = json.loads(up.stdout)
    assert list(said) == KEYS
    assert (said["ok"], said["bytes"], said["files"], said["verified"]) == (True, len(CONTENT), 1, True)
    assert said["retransmitted_bytes"] == said["resumed_bytes"] == 0 < said["seconds"]
    down = feed(amst, None, "cp", "--json", f"{url}/f", "-")
    assert down.stdout == CONTENT
    said = json.loads(down.stderr)
    assert (said["ok"], said["bytes"], said["files"]) == (True, len(CONTENT), 1)
    failed = feed(amst, None, "cp", "--json", f"{url}/nothing", "-")
    assert failed.stdout == b""
    assert json.loads(failed.stderr.splitlines()[-1])["error"]["kind"] == "not_found"
    wrong = feed(amst, None, "cp", "--json", "-", "-")
    assert (wrong.returncode, wrong.stdout) == (2, b"")
    assert json.loads(wrong.stderr.splitlines()[-1])["error"]["kind"] == "usage"


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["-", "{}/dir"], 2, "standard input has no name; write"),
        (["-", "{}/dir/"], 2, "standard input has no name; write"),
        (["{}/dir", "-"], 6, "is a directory; only a file can go to standard output"),
        (["{}/link", "-"], 6, "is a symbolic link"),
        (["{}/nothing", "-"], 3, "does not exist on the server"),
        (["-", "{}/file/below"], 6, "is not a directory"),
        (["-", "-"], 2, "nothing goes through a server"),
        (["-", "{}/file", "{}/dir/"], 2, "cannot be one of several sources"),
        (["{}/file", "{}/file", "-"], 2, "only one file can go to standard output"),
    ],
)
def test_what_cannot_be_done_is_said(place, args, code, says):
    amst, url, there = place
    (there / "dir").mkdir()
    (there / "file").write_bytes(b"file")
    (there / "link").symlink_to("file")
    ran = feed(amst, b"data", "cp", *(arg.format(url) for arg in args))
    assert (ran.returncode, ran.stdout) == (code, b"")
    assert says in ran.stderr.decode() and b"Traceback" not in ran.stderr
    assert sorted(path.name for path in there.iterdir()) == ["dir", "file", "link"]
    assert (there / "file").read_bytes() == b"file" and is_empty(there / "dir")


def begun(amst: Shell, url: str, there: Path, *options: object) -> subprocess.Popen[str]:
    """A copy from standard input that waits for more, some of which has arrived."""
    process = amst.start("cp", *options, "-", f"{url}/f", stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.buffer.write(CONTENT)
    process.stdin.buffer.flush()
    # its last bytes make no whole chunk, and go when all before them has been acknowledged
    wait_until(lambda: sum(path.stat().st_size for path in there.iterdir()) == len(CONTENT), "bytes at the server")
    assert not (there / "f").exists()
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_nothing_is_left_of_what_was_stopped(place, number, code):
    amst, url, there = place
    with ended(begun(amst, url, there)) as process:
        process.send_signal(number)
        assert process.wait(TIMEOUT_S) == code
        if number == signal.SIGINT:
            assert "nothing of it is kept" in process.stderr.read()
        process.stdin.close()
        wait_until(lambda: is_empty(there), "what had arrived to be dropped")


def test_standard_input_may_be_slow(place):
    """It is sent as it comes, and ends when it ends."""
    amst, url, there = place
    with ended(begun(amst, url, there, "-q")) as process:
        for _ in range(3):
            size = sum(path.stat().st_size for path in there.iterdir())
            process.stdin.buffer.write(b"and more")
            process.stdin.buffer.flush()
            wait_until(lambda s=size: sum(p.stat().st_size for p in there.iterdir()) > s, "it to be sent at once")
        process.stdin.close()
        assert process.wait(TIMEOUT_S) == 0
    assert (there / "f").read_bytes() == CONTENT + b"and more" * 3


def test_a_server_that_dies_ends_a_copy_that_waits_for_input(amst, tmp_path):
    with serving(amst, amst.home / "root") as running:
        options = ("--set", "limits.session_timeout=2s")
        with ended(begun(amst, running.url, running.root, *options)) as process:
            running.process.kill()
            running.process.wait(TIMEOUT_S)
            assert process.wait(TIMEOUT_S) == 5
            assert "nothing of it is kept" in process.stderr.read()
            process.stdin.close()
    assert not (amst.home / "root" / "f").exists()


def test_nobody_reads_what_is_written(place):
    amst, url, there = place
    (there / "f").write_bytes(CONTENT * 4)
    with ended(amst.start("cp", f"{url}/f", "-")) as process:
        assert len(process.stdout.buffer.read(1000)) == 1000
        process.stdout.close()
        assert process.wait(TIMEOUT_S) == 141
        said = process.stderr.read()
        assert "nobody reads standard output any more" in said and "Traceback" not in said


def test_a_full_disk_behind_standard_output(place):
    amst, url, there = place
    (there / "f").write_bytes(CONTENT)
    with Path("/dev/full").open("wb") as full:
        process = subprocess.run(
            [*AMST, "cp", f"{url}/f", "-"], env=amst.env, stdout=full, stderr=subprocess.PIPE, timeout=TIMEOUT_S,
            check=False,
        )  # fmt: skip
    assert process.returncode == 1
    assert b"cannot write standard output: No space left on device" in process.stderr


def test_closed_descriptors(place):
    amst, url, there = place
    (there / "f").write_bytes(b"x")
    command = " ".join(AMST)
    for line, says in (
        (f"{command} cp {url}/f - >&-", "standard output is closed"),
        (f"{command} cp - {url}/g <&-", "standard input is closed"),
    ):
        ran = subprocess.run(
            ["sh", "-c", line], env=amst.env, stderr=subprocess.PIPE, timeout=TIMEOUT_S, check=False
        )  # fmt: skip
        assert (ran.returncode, says in ran.stderr.decode()) == (2, True)
    assert not (there / "g").exists()


def test_a_limited_rate_holds(place):
    amst, url, _ = place
    began = time.monotonic()
    assert feed(amst, CONTENT[:1_500_000], "cp", "--bwlimit", "1MB/s", "-", f"{url}/f").returncode == 0
    assert feed(amst, None, "cp", "--bwlimit", "1MB/s", f"{url}/f", "-").stdout == CONTENT[:1_500_000]
    assert time.monotonic() - began > 2


def test_the_rate_of_the_settings_holds_until_the_command_line_has_another(place):
    amst, url, _ = place
    content = CONTENT[:1_500_000]
    began = time.monotonic()
    assert feed(amst, content, "cp", "--set", "transport.amst.pacing_rate=1MB/s", "-", f"{url}/f").returncode == 0
    assert time.monotonic() - began > 1
    slow = ("--set", "transport.amst.pacing_rate=16KiB/s")  # which would take longer than is waited for
    for limit in ("0", "100MB/s"):
        assert feed(amst, content, "cp", *slow, "--bwlimit", limit, "-", f"{url}/f").returncode == 0


def test_a_bar_on_the_terminal_and_the_data_elsewhere(place):
    amst, url, there = place
    (there / "f").write_bytes(CONTENT)
    with on_a_terminal(amst, "cp", "--bwlimit", "5MB/s", f"{url}/f", "-") as (process, terminal):
        digest = hashlib.sha256(process.stdout.buffer.read()).digest()
        assert digest == hashlib.sha256(CONTENT).digest()
        shown = read_terminal(terminal, b"copied 1 file")
        assert b"of 4.8 MiB" in shown
        assert process.wait(TIMEOUT_S) == 0


def test_two_of_them_make_a_pipe(place):
    """tar into one, and out of the other."""
    amst, url, _ = place
    (amst.home / "tree").mkdir()
    for number in range(50):
        (amst.home / "tree" / str(number)).write_bytes(CONTENT[: number * 1000])
    (amst.home / "back").mkdir()
    command = " ".join(AMST)
    line = f"tar c -C tree . | {command} cp -q - {url}/t.tar && {command} cp -q {url}/t.tar - | tar x -C back"
    ran = subprocess.run(["sh", "-c", line], cwd=amst.home, env=amst.env, timeout=TIMEOUT_S, check=False)
    assert ran.returncode == 0
    for number in range(50):
        assert (amst.home / "back" / str(number)).read_bytes() == CONTENT[: number * 1000]
