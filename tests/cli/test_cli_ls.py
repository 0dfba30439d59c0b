"""`amst ls` against an `amst serve` of its own process."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from amst_core.cli import ls
from amst_core.cli.main import main

from .conftest import TIMEOUT_S, Serving, Shell, make_shell, serving

pytestmark = pytest.mark.needs_transport

ODD = b"caf\xe9\x1b[31m\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shell, Serving]]:
    shell = make_shell(tmp_path_factory.mktemp("ls"))
    shell.env["TZ"] = "UTC"
    root = shell.home / "root"
    (root / "dir" / "deep").mkdir(parents=True)
    (root / "dir" / "deep" / "leaf").write_bytes(b"12345")
    (root / "dir" / "deep" / "leaf").chmod(0o640)
    os.utime(root / "dir" / "deep" / "leaf", ns=(0, 1_000_000_000_123_456_789))
    (root / "dir" / "link").symlink_to("deep")
    (root / "plain").touch()
    Path(os.fsdecode(os.fsencode(root / "dir") + b"/" + ODD)).touch()
    with serving(shell, root) as running:
        yield shell, running


def test_a_directory_is_listed_sorted_and_marked(place):
    amst, server = place
    done = amst("ls", server.url)
    assert (done.returncode, done.stdout, done.stderr) == (0, "dir/\nplain\n", "")
    assert amst("ls", f"{server.url}/dir/deep/").stdout == "leaf\n"
    assert amst("ls", f"{server.url}/dir/deep/leaf").stdout == "leaf\n"


def test_names_are_raw_in_a_pipe_and_harmless_on_a_terminal(place):
    amst, server = place
    done = amst("ls", f"{server.url}/dir")
    assert os.fsencode(done.stdout) == ODD + b"\ndeep/\nlink\n"
    terminal, other = os.openpty()
    try:
        process = amst.start("ls", "-R", f"{server.url}/dir", stdout=other)
        os.close(other)
        _, errors = process.communicate(timeout=TIMEOUT_S)
        assert (process.returncode, errors) == (0, "")
        assert os.read(terminal, 65536) == b"caf\\xe9\\x1b[31m\\n\r\ndeep/\r\ndeep/leaf\r\nlink\r\n"
    finally:
        os.close(terminal)


def test_the_long_form_tells_mode_size_time_and_target(place):
    amst, server = place
    assert amst("ls", "-l", f"{server.url}/dir/deep").stdout == (
        "-rw-r-----               5 2001-09-09 01:46:40 leaf\n"
    )
    assert " link -> deep\n" in amst("ls", "-l", f"{server.url}/dir/link").stdout


def test_json_tells_all_of_it_and_urls_that_can_be_copied_from(place, tmp_path):
    amst, server = place
    done = amst("ls", "-R", "--json", f"{server.url}/dir")
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    value = json.loads(done.stdout)
    assert list(value) == ["url", "entries", "ok", "failed", "error"]
    assert (value["ok"], value["failed"], value["error"]) == (True, [], None)
    found = {entry["path"]: entry for entry in value["entries"]}
    assert list(found) == ["caf\\xe9\\x1b[31m\\n", "deep", "deep/leaf", "link"]
    assert found["deep/leaf"] == {
        "path": "deep/leaf", "url": f"{server.url}/dir/deep/leaf", "type": "file", "size": 5,
        "mtime_ns": 1_000_000_000_123_456_789, "mode": "0640",
    }  # fmt: skip
    assert found["link"]["target"] == "deep"
    odd = next(iter(found.values()))["url"]
    assert amst("cp", odd, tmp_path / "odd").returncode == 0
    assert (tmp_path / "odd").exists()


@pytest.mark.parametrize(
    ("path", "code", "kind"),
    [("/missing", 3, "not_found"), ("/dir/link/leaf", 6, "refused"), ("/plain/below", 6, "refused")],
)
def test_what_cannot_be_listed(place, path, code, kind):
    amst, server = place
    done = amst("ls", f"{server.url}{path}")
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("amst: ")
    done = amst("ls", "--json", f"{server.url}{path}")
    assert (done.returncode, done.stdout.count("\n")) == (code, 1)
    value = json.loads(done.stdout)
    assert (value["ok"], value["entries"], value["error"]["kind"]) == (False, [], kind)


def test_what_is_no_file_is_told_beside_the_others(place):
    amst, server = place
    os.mkfifo(server.root / "pipe")
    try:
        done = amst("ls", server.url)
        value = json.loads(amst("ls", "--json", server.url).stdout)
    finally:
        (server.root / "pipe").unlink()
    assert (done.returncode, done.stdout) == (6, "dir/\nplain\n")
    assert "pipe is a FIFO" in done.stderr
    assert value["ok"] is False
    assert [failure["path"] for failure in value["failed"]] == ["pipe"]


def test_a_server_that_can_tell_of_nothing_is_given_up(place, monkeypatch, capsys):
    amst, server = place
    monkeypatch.setenv("AMST_STATE_DIR", amst.env["AMST_STATE_DIR"])
    monkeypatch.setattr(ls, "MAX_FAILED", 2)
    pipes = [server.root / f"pipe{number}" for number in range(3)]
    for pipe in pipes:
        os.mkfifo(pipe)
    try:
        assert main(["ls", "--json", server.url]) == 6
    finally:
        for pipe in pipes:
            pipe.unlink()
    value = json.loads(capsys.readouterr().out)
    assert len(value["failed"]) == 2
    assert "pipe1" in value["error"]["message"]


def test_a_server_that_is_not_there(place):
    amst, _ = place
    done = amst("ls", "--json", "amst://127.0.0.1:1/x")
    assert done.returncode == 4
    assert json.loads(done.stdout)["error"]["kind"] == "connect"


@pytest.mark.parametrize("operands", [[], ["x"], ["amst://h/a", "amst://h/b"], ["-"]])
def test_operands_that_make_no_sense(place, operands):
    amst, _ = place
    done = amst("ls", *operands)
    assert (done.returncode, done.stdout) == (2, "")
