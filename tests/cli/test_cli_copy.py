"""`amst cp` against an `amst serve` of its own process: what arrives, under which name, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import wait_until

from amst_core.wire.messages import MAX_HOLES

from .conftest import TIMEOUT_S, Serving, Shell, ended, make_shell, on_a_terminal, read_terminal, serving
from .test_cli_options import KEYS

pytestmark = pytest.mark.needs_transport

LONG = 64 << 30
"""Bytes of a file (with almost nothing in it) that takes longer to copy than any test waits."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shell, Serving]]:
    """A server for the tests that need nothing special of one; each uses names of its own below the root."""
    shell = make_shell(tmp_path_factory.mktemp("shared"))
    with serving(shell, shell.home / "root") as running:
        yield shell, running


@pytest.fixture
def place(shared: tuple[Shell, Serving], tmp_path: Path) -> tuple[Shell, str, Path]:
    """amst in the test's directory with the shared server's token; a URL of the test's own; where that is."""
    shell, running = shared
    name = tmp_path.name
    (running.root / name).mkdir()
    mine = make_shell(tmp_path)
    mine.env["AMST_STATE_DIR"] = shell.env["AMST_STATE_DIR"]
    return mine, f"{running.url}/{name}", running.root / name


def make_tree(top: Path) -> Path:
    """Every kind of thing that can be copied."""
    top.mkdir()
    (top / "file").write_bytes(b"content\n")
    (top / "none").write_bytes(b"")
    (top / "large").write_bytes(os.urandom((3 << 20) + 17))
    (top / "dir" / "deep" / "deeper").mkdir(parents=True)
    (top / "dir" / "deep" / "deeper" / "leaf").write_bytes(b"x")
    (top / "empty").mkdir()
    (top / "link").symlink_to("file")
    (top / "to-dir").symlink_to("dir")
    (top / "dangling").symlink_to("/nowhere/at all")
    for name in (b"caf\xe9", b"new\nline", b" space %41?#", "caf\u00e9".encode()):
        Path(os.fsdecode(os.fsencode(top) + b"/" + name)).write_bytes(name)
    (top / "file").chmod(0o640)
    (top / "none").chmod(0o400)
    (top / "large").chmod(0o755)
    (top / "empty").chmod(0o700)
    (top / "dir" / "deep").chmod(0o555)
    for number, path in enumerate(sorted(top.rglob("*"), reverse=True)):
        if not path.is_symlink():
            os.utime(path, ns=(1, 1_000_000_000_000_000_007 + number * 1_000_000_001))
    os.utime(top, ns=(1, 123_456_789_012))
    return top


def listing(top: Path) -> dict[bytes, tuple[object, ...]]:
    """Everything in and about a tree that a copy keeps."""
    found: dict[bytes, tuple[object, ...]] = {}
    for path in (top, *top.rglob("*")):
        about = path.lstat()
        key = os.fsencode(path.relative_to(top))
        if path.is_symlink():
            found[key] = ("link", os.fsencode(os.readlink(path)))
        else:
            content = path.read_bytes() if path.is_file() else b""
            found[key] = (stat.S_IFMT(about.st_mode), stat.S_IMODE(about.st_mode), about.st_mtime_ns, content)
    return found


def result_of(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    """The one object on standard output."""
    assert done.stdout.count("\n") == 1, done.stdout + done.stderr
    value = json.loads(done.stdout)
    assert list(value) == KEYS
    assert isinstance(value, dict)
    return value


# ---- what arrives -------------------------------------------------------------------------


def test_a_tree_goes_up_and_comes_down_as_it_was(place, tmp_path):
    amst, url, there = place
    tree = make_tree(tmp_path / "tree")
    up = amst("cp", tree, f"{url}/")
    assert (up.returncode, up.stdout) == (0, ""), up.stderr
    assert listing(there / "tree") == listing(tree)
    down = amst("cp", f"{url}/tree", tmp_path / "back")
    assert (down.returncode, down.stdout) == (0, ""), down.stderr
    assert listing(tmp_path / "back") == listing(tree)
    assert len(listing(tree)) == 16


def test_a_second_copy_of_a_tree_replaces_what_changed(place, tmp_path):
    amst, url, there = place
    tree = make_tree(tmp_path / "tree")
    assert amst("cp", tree, f"{url}/").returncode == 0
    (tree / "file").write_bytes(b"other content")
    (tree / "link").unlink()
    (tree / "link").symlink_to("none")
    assert amst("cp", tree, f"{url}/").returncode == 0
    assert listing(there / "tree") == listing(tree)


@pytest.mark.parametrize(
    "options", [[], ["--plaintext"], ["--streams", "1"], ["--streams", "64"], ["--streams", "auto"]]
)
def test_json_tells_what_was_done_and_nothing_else_is_on_standard_output(options, place, tmp_path):
    amst, url, there = place
    tree = make_tree(tmp_path / "tree")
    done = amst("cp", "--json", *options, tree, f"{url}/")
    assert (done.returncode, done.stderr) == (0, "")
    value = result_of(done)
    size = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file() and not path.is_symlink())
    assert (value["ok"], value["error"], value["failed"]) == (True, None, [])
    assert (value["bytes"], value["files"]) == (size, 11)
    assert value["encrypted"] is ("--plaintext" not in options)
    assert (value["verified"], value["transport"], value["mode"]) == (True, "tcp", "datacenter")
    wanted = options[1] if len(options) > 1 else "auto"
    # So little may have arrived before the last stream is open.
    assert 1 <= value["streams"] <= (16 if wanted == "auto" else int(wanted))
    assert value["seconds"] > 0
    assert value["setup_seconds"] > 0
    assert value["throughput_bytes_per_s"] == pytest.approx(size / value["seconds"])
    assert (value["congestion_backend"], bool(value["congestion"])) == ("kernel", True)
    assert (value["lane_failures"], value["switches"], value["resumed_bytes"], value["reason"]) == (0, 0, 0, None)
    assert listing(there / "tree") == listing(tree)


def test_what_is_not_verified_is_not_said_to_be(place, tmp_path):
    amst, url, there = place
    tree = make_tree(tmp_path / "tree")
    done = amst("cp", "--json", "--plaintext", "--verify", "none", tree, f"{url}/")
    value = result_of(done)
    assert (done.returncode, value["ok"], value["encrypted"], value["verified"]) == (0, True, False, False)
    assert listing(there / "tree") == listing(tree)
    down = amst("cp", "--plaintext", "--verify", "none", "--streams", "1", f"{url}/tree", "back")
    assert down.stderr.endswith("over 1 tcp stream, in plaintext, not verified\n")
    assert listing(amst.home / "back") == listing(tree)


def test_encrypted_data_cannot_go_unverified(place, tmp_path):
    amst, url, there = place
    done = amst("cp", "--json", "--verify", "none", make_tree(tmp_path / "tree"), f"{url}/")
    assert (done.returncode, result_of(done)["error"]["kind"]) == (2, "usage")
    assert not (there / "tree").exists()


def test_settings_come_from_the_environment_a_file_and_the_command_line(place, tmp_path):
    amst, url, _ = place
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "s.toml").write_text("[transport.amst]\nmax_streams = 3\n")
    (tmp_path / "t.toml").write_text("[transport.amst]\nmax_streams = 4\n")

    def limit(*options: str, **env: str) -> str:
        """The most streams there may be, as the complaint about too many tells it."""
        done = amst("cp", "--streams", "9", "a", f"{url}/", *options, **env)
        assert done.returncode == 2
        match = re.search("9 streams: 1 to ([0-9]+) are possible", done.stderr)
        assert match is not None, done.stderr
        return match[1]

    file, variable = {"AMST_CONFIG": "s.toml"}, {"AMST_TRANSPORT__AMST__MAX_STREAMS": "5"}
    assert limit(**file) == "3"
    assert limit("--config", "t.toml", **file) == "4"
    assert limit(**file, **variable) == "5"
    assert limit("--set", "transport.amst.max_streams=6", **file, **variable) == "6"
    copy = ("cp", "a", f"{url}/")
    assert amst(*copy, "--set", "limits.memroy=1").returncode == 2
    assert amst(*copy, AMST_CONFIG="nowhere.toml").returncode == 2
    assert amst(*copy, **file).returncode == 0


@pytest.mark.parametrize(
    ("sources", "target", "names"),
    [
        (["a"], "new", ["new"]),
        (["a"], "dir", ["dir/a"]),
        (["a"], "made/", ["made/a"]),
        (["a"], "old", ["old"]),
        (["t"], "new", ["new/x"]),
        (["t/"], "dir", ["dir/t/x"]),
        (["-r", "t"], "made/", ["made/t/x"]),
        (["t/."], "dir", ["dir/x"]),
        (["a", "t"], "dir", ["dir/a", "dir/t/x"]),
        (["a", "t"], "made/", ["made/a", "made/t/x"]),
        (["l"], "dir", ["dir/l"]),
    ],
)
def test_names_are_cps_in_both_directions(sources, target, names, place, tmp_path):
    amst, url, there = place

    def fill(top: Path) -> None:
        (top / "t").mkdir()
        (top / "t" / "x").write_bytes(b"x")
        (top / "a").write_bytes(b"a")
        (top / "l").symlink_to("t")

    def prepare(top: Path) -> None:
        (top / "dir").mkdir()
        (top / "old").write_bytes(b"old")

    def found(top: Path) -> list[str]:
        every = (path for path in top.rglob("*") if path.is_symlink() or path.is_file())
        return sorted(str(path.relative_to(top)) for path in every)

    fill(tmp_path)
    prepare(there)
    up = amst("cp", *sources, f"{url}/{target}")
    assert up.returncode == 0, up.stderr
    assert found(there) == sorted({*names, "old"})
    assert (there / "old").read_bytes() == (b"a" if target == "old" else b"old")

    (there / "from").mkdir()
    fill(there / "from")
    (tmp_path / "to").mkdir()
    prepare(tmp_path / "to")
    remote = [source if source.startswith("-") else f"{url}/from/{source}" for source in sources]
    down = amst("cp", *remote, f"to/{target}")
    assert down.returncode == 0, down.stderr
    assert found(tmp_path / "to") == sorted({*names, "old"})


def test_the_root_itself_can_be_filled_and_fetched(amst, server):
    tree = make_tree(amst.home / "tree")
    up = amst("cp", f"{tree}/.", server.url)
    assert up.returncode == 0, up.stderr
    want = listing(tree)
    got = listing(server.root)
    assert {name: about for name, about in got.items() if name != b"."} == {
        name: about for name, about in want.items() if name != b"."
    }
    down = amst("cp", server.url, "back")
    assert down.returncode == 0, down.stderr
    assert listing(amst.home / "back").keys() == want.keys()


def test_a_local_target_that_is_a_link_to_a_directory_is_that_directory(place, tmp_path):
    amst, url, there = place
    (there / "a").write_bytes(b"a")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert amst("cp", f"{url}/a", "link").returncode == 0
    assert (tmp_path / "real" / "a").read_bytes() == b"a"
    (there / "dir").mkdir()
    (there / "dir" / "b").write_bytes(b"b")
    assert amst("cp", f"{url}/dir/.", "link").returncode == 0
    assert (tmp_path / "real" / "b").read_bytes() == b"b"
    assert (tmp_path / "link").is_symlink()


def test_names_are_percent_encoded_bytes_in_urls_only(place, tmp_path):
    amst, url, there = place
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 %41")).write_bytes(b"1")
    assert amst("cp", b"caf\xe9 %41", f"{url}/x%20%FF%2541").returncode == 0
    assert os.listdir(os.fsencode(there)) == [b"x \xff%41"]


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_ipv6(amst):
    (amst.home / "a").write_bytes(b"a")
    with serving(amst, amst.home / "root", listen="[::1]:0") as running:
        assert re.fullmatch(r"\[::1\]:[1-9][0-9]*", running.address)
        done = amst("cp", "a", f"{running.url}/b")
        assert done.returncode == 0, done.stderr
        assert (running.root / "b").read_bytes() == b"a"


# ---- what fails ---------------------------------------------------------------------------


def test_a_missing_source_is_3_and_the_others_arrive(place, tmp_path):
    amst, url, there = place
    (tmp_path / "a").write_bytes(b"a")
    done = amst("cp", "--json", "gone", "a", f"{url}/")
    assert done.returncode == 3
    assert "gone does not exist" in done.stderr
    value = result_of(done)
    assert [(f["path"], f["kind"]) for f in value["failed"]] == [("gone", "not_found")]
    assert (value["ok"], value["files"], value["error"]["kind"]) == (False, 1, "not_found")
    assert (there / "a").read_bytes() == b"a"

    done = amst("cp", "--json", f"{url}/gone", f"{url}/a", "back/")
    assert done.returncode == 3
    assert [f["kind"] for f in result_of(done)["failed"]] == ["not_found"]
    assert (tmp_path / "back" / "a").read_bytes() == b"a"


def test_a_single_missing_source_makes_nothing(place, tmp_path):
    amst, url, there = place
    assert amst("cp", "gone", f"{url}/b").returncode == 3
    assert amst("cp", f"{url}/gone", "b").returncode == 3
    assert os.listdir(there) == []
    assert not (tmp_path / "b").exists()


def test_the_gravest_failure_is_the_exit_code_and_the_rest_arrives(place, tmp_path):
    amst, url, there = place
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a").write_bytes(b"a")
    done = amst("cp", "--json", "gone", "pipe", "a", f"{url}/")
    assert done.returncode == 6
    value = result_of(done)
    assert sorted(f["kind"] for f in value["failed"]) == ["not_found", "refused"]
    assert value["error"]["kind"] == "refused"
    assert (there / "a").read_bytes() == b"a"


def test_nothing_outside_the_root_is_read_or_written(place, tmp_path):
    amst, url, there = place
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (there / "way").symlink_to(outside)
    (tmp_path / "a").write_bytes(b"a")
    for path in ("way/a", "way/", "../../../a", "..%2fa"):
        done = amst("cp", "a", f"{url}/{path}")
        assert done.returncode == 6, (path, done.stderr)
    assert amst("cp", f"{url}/way/secret", "got").returncode == 6
    assert not (tmp_path / "got").exists()
    assert os.listdir(outside) == ["secret"]


def test_a_directory_does_not_replace_a_file_nor_a_file_a_directory(place, tmp_path):
    amst, url, there = place
    (tmp_path / "t" / "a").mkdir(parents=True)
    (there / "f").write_bytes(b"f")
    assert amst("cp", "t", f"{url}/f").returncode == 6
    assert amst("cp", "t", f"{url}/f/").returncode == 6
    assert amst("cp", "t", "t", f"{url}/f").returncode == 2
    assert (there / "f").read_bytes() == b"f"


def test_an_unknown_transport_is_2_and_one_that_is_required_is_8(place, tmp_path):
    amst, url, there = place
    (tmp_path / "a").write_bytes(b"a")
    named = amst("cp", "--transport", "nosuch", "a", f"{url}/")
    assert (named.returncode, "nosuch" in named.stderr, "tcp" in named.stderr) == (2, True, True)
    for name in ("rdma", "nosuch"):
        required = amst("cp", "--json", "--require", name, "a", f"{url}/")
        assert (required.returncode, name in required.stderr) == (8, True)
        assert result_of(required)["error"]["kind"] == "unavailable"
    assert amst("cp", "--transport", "tcp", "a", f"{url}/b").returncode == 0
    assert amst("cp", "--require", "tcp", "a", f"{url}/c").returncode == 0
    assert sorted(os.listdir(there)) == ["b", "c"]


def test_a_wrong_token_is_6_and_a_malformed_one_2(place, tmp_path):
    amst, url, there = place
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "right").write_text((Path(amst.env["AMST_STATE_DIR"]) / "token").read_text())
    (tmp_path / "wrong").write_text("0" * 64)
    copy = ("cp", "a", f"{url}/")
    wrong = amst(*copy, AMST_TOKEN="1" * 64)
    assert (wrong.returncode, "token" in wrong.stderr) == (6, True)
    assert amst(*copy, "--token-file", "wrong").returncode == 6
    assert amst(*copy, AMST_TOKEN="short").returncode == 2
    assert amst(*copy, "--token-file", "nowhere").returncode == 2
    assert os.listdir(there) == []
    assert amst(*copy, "--token-file", "right", AMST_TOKEN="1" * 64).returncode == 0


def test_a_client_without_a_token_hears_of_the_three_ways(place, tmp_path):
    amst, url, _ = place
    (tmp_path / "a").write_bytes(b"a")
    done = amst("cp", "a", f"{url}/", AMST_STATE_DIR=str(tmp_path / "nowhere"))
    assert done.returncode == 6
    assert not [way for way in ("--token-file", "AMST_TOKEN", "AMST_STATE_DIR") if way not in done.stderr]
    assert not (tmp_path / "nowhere").exists()


def test_nobody_on_the_port_is_4(place, tmp_path):
    amst, _, _ = place
    (tmp_path / "a").write_bytes(b"a")
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    done = amst("cp", "--json", "a", f"amst://127.0.0.1:{port}/")
    assert done.returncode == 4
    assert str(port) in done.stderr
    value = result_of(done)
    assert (value["error"]["kind"], value["error"]["retryable"], value["transport"]) == ("connect", True, None)


def test_a_server_of_another_kind_is_4(place, tmp_path):
    amst, _, _ = place
    (tmp_path / "a").write_bytes(b"a")

    def answer(listener: socket.socket) -> None:
        sock, _ = listener.accept()
        with sock:
            sock.recv(4096)
            sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        done = amst("cp", "--json", "a", f"amst://127.0.0.1:{listener.getsockname()[1]}/")
        thread.join(TIMEOUT_S)
    assert done.returncode == 4, done.stderr
    assert result_of(done)["error"]["retryable"] is False


# ---- what is interrupted ------------------------------------------------------------------


def make_long(path: Path) -> Path:
    """Far more than any test waits for, on little of the disk: with so many holes that most of them are sent."""
    with open(path, "wb") as file:
        for at in range(0, LONG, LONG // (8 * MAX_HOLES)):
            os.pwrite(file.fileno(), b"x", at)
        file.truncate(LONG)
    return path


def arriving(directory: Path, *, least: int = 1) -> bool:
    """Whether ``least`` bytes of a file have come into ``directory``, under whatever name."""
    for path in directory.iterdir():
        try:
            if path.stat().st_blocks * 512 >= least:
                return True
        except FileNotFoundError:
            continue  # it was there a moment ago
    return False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_signal_ends_a_copy_and_nothing_partial_has_its_final_name(direction, number, code, amst, server):
    here, there = amst.home / "here", server.root / "there"
    here.mkdir()
    there.mkdir()
    if direction == "up":
        make_long(here / "long")
        locations, target = (here / "long", f"{server.url}/there/"), there
    else:
        make_long(there / "long")
        locations, target = (f"{server.url}/there/long", here), here
    with ended(amst.start("cp", "--json", "--bwlimit", "50MB/s", *locations)) as process:
        wait_until(lambda: arriving(target, least=8 << 20), "enough bytes that some are acknowledged")
        process.send_signal(number)
        if number == signal.SIGTERM:  # the first one lets finish what is under way
            assert process.stderr is not None
            said = process.stderr.readline()
            assert "what is under way has 30 s" in said
            process.send_signal(number)
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert "run the same command again and it goes on from there" in err
    assert json.loads(out)["error"]["kind"] == "cancelled"
    assert all(name.startswith(".amst-") for name in os.listdir(target))
    (here / "a").write_bytes(b"a")
    assert amst("cp", here / "a", f"{server.url}/after").returncode == 0


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_server_that_is_gone_is_5_and_the_message_says_what_to_do(direction, amst, server):
    here, there = amst.home / "here", server.root / "there"
    here.mkdir()
    there.mkdir()
    if direction == "up":
        make_long(here / "long")
        locations, target = (here / "long", f"{server.url}/there/"), there
    else:
        make_long(there / "long")
        locations, target = (f"{server.url}/there/long", here), here
    with on_a_terminal(amst, "cp", "--bwlimit", "50MB/s", *locations) as (process, terminal):
        read_terminal(terminal, b"ETA")  # there is a rate: some of it has been acknowledged
        server.process.kill()
        read_terminal(terminal, b"run the same command again and it goes on from there")
        assert process.wait(TIMEOUT_S) == 5
    assert not (target / "long").exists()


# ---- what is shown ------------------------------------------------------------------------


def test_a_copy_ends_with_a_summary_unless_quiet(place, tmp_path):
    amst, url, _ = place
    tree = make_tree(tmp_path / "tree")
    loud = amst("cp", tree, f"{url}/")
    assert re.fullmatch(
        r"copied 11 files, 3\.0 MiB in [0-9.]+ s \([0-9.]+ [KMG]iB/s\) over [0-9]+ tcp streams?, encrypted, verified\n",
        loud.stderr,
    )
    assert loud.stdout == ""
    quiet = amst("cp", "-q", "--plaintext", tree, f"{url}/")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    plain = amst("cp", "--plaintext", "--streams", "1", tree, f"{url}/")
    assert plain.stderr.endswith("over 1 tcp stream, in plaintext, verified\n")


def test_quiet_errors_are_still_told(place):
    amst, url, _ = place
    done = amst("cp", "-q", "gone", f"{url}/")
    assert (done.returncode, done.stderr) == (3, "amst: gone does not exist\n")


def test_on_a_terminal_there_is_a_bar(amst, server):
    make_long(amst.home / "long")
    with on_a_terminal(amst, "cp", "--bwlimit", "50MB/s", "long", f"{server.url}/") as (process, terminal):
        seen = read_terminal(terminal, b"ETA")
        seen += read_terminal(terminal, b"16 tcp streams")
        process.send_signal(signal.SIGINT)
        read_terminal(terminal, b"stopped by SIGINT")
        assert process.wait(TIMEOUT_S) == 130
    assert b"iB of 64.0 GiB" in seen
    assert b"iB/s" in seen
    assert b" %" in seen


def test_elsewhere_there_are_lines_now_and_then(amst, server):
    make_long(amst.home / "long")
    with ended(amst.start("cp", "long", f"{server.url}/")) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT_S) == 130
    assert re.fullmatch(
        r"amst: [0-9]+ %, [0-9.]+ [KMG]iB of 64\.0 GiB, [0-9.]+ [KMG]iB/s, ETA [0-9:]+, [0-9]+ tcp streams?\n", line
    )


def test_rich_is_not_imported_where_there_is_no_terminal(place, tmp_path):
    amst, url, _ = place
    (tmp_path / "a").write_bytes(b"a")
    code = (
        "import sys; from amst_core.cli.main import main; "
        "print(main(sys.argv[1:]), [name for name in ('rich', 'structlog') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "cp", "a", f"{url}/"],
        capture_output=True, text=True, cwd=amst.home, env=amst.env, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.stdout == "0 []\n", done.stderr
