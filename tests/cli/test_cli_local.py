"""`amst cp` from this machine to this machine: as any other copy, through a server that only this process can use."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
from pathlib import Path

import pytest
from leftovers import no_leftovers
from waiting import DEADLINE_S, wait_until

import amst_core
from amst_core.api.loopback import private_server
from amst_core.errors import AuthError

from .conftest import TIMEOUT_S, Shell, ended
from .test_cli_copy import listing, make_tree, result_of

pytestmark = pytest.mark.needs_transport


def test_a_tree_arrives_as_it_was_and_nothing_is_left(amst: Shell) -> None:
    tree = make_tree(amst.home / "tree")
    (amst.home / "temporary").mkdir()
    amst.env["TMPDIR"] = str(amst.home / "temporary")
    done = amst("cp", tree, "copy")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert listing(amst.home / "copy") == listing(tree)
    assert "in plaintext, verified" in done.stderr
    assert list((amst.home / "temporary").iterdir()) == []
    assert not (amst.home / "state").exists(), "no token is needed, and none is made"


def test_the_names_are_cps(amst: Shell) -> None:
    for name in ("a", "b"):
        (amst.home / name).write_text(name)
    (amst.home / "dir").mkdir()
    (amst.home / "to-dir").symlink_to("dir")
    assert amst("cp", "a", "renamed").returncode == 0
    assert amst("cp", "a", "b", "to-dir").returncode == 0
    assert amst("cp", "a", "b", "made/").returncode == 0
    assert amst("cp", "dir/.", "whole").returncode == 0
    found = {str(path.relative_to(amst.home)) for path in amst.home.rglob("*") if not path.is_dir()}
    assert found == {"a", "b", "renamed", "dir/a", "dir/b", "made/a", "made/b", "whole/a", "whole/b"}
    assert (amst.home / "renamed").read_text() == "a"


def test_json_is_that_of_other_copies(amst: Shell) -> None:
    (amst.home / "a").write_bytes(b"12345")
    first = result_of(amst("cp", "--json", "a", "b"))
    assert (first["ok"], first["bytes"], first["files"], first["encrypted"]) == (True, 5, 1, False)
    again = result_of(amst("cp", "--json", "a", "b"))
    assert again["resumed_bytes"] == 5, "it is compared, and does not travel again"
    unverified = result_of(amst("cp", "--json", "--verify", "none", "a", "c"))
    assert (first["verified"], unverified["verified"]) == (True, False)


@pytest.mark.parametrize(
    ("operands", "words"),
    [
        (["file", "file"], "same file"),
        (["file", "."], "same file"),
        (["file", "hard"], "same file"),
        (["link", "file"], "same file"),
        (["file", "link"], "same file"),
        (["dir", "."], "same directory"),
        (["dir", "dir"], "into itself"),
        (["dir", "dir/deep/new"], "into itself"),
        (["dir", "dir/deep/new/"], "into itself"),
        (["dir", "to-deep"], "into itself"),
        ([".", "dir"], "into itself"),
    ],
    ids=str,
)
def test_what_would_meet_itself_is_refused(amst: Shell, operands: list[str], words: str) -> None:
    (amst.home / "dir" / "deep").mkdir(parents=True)
    (amst.home / "file").write_text("file")
    os.link(amst.home / "file", amst.home / "hard")
    (amst.home / "link").symlink_to("file")
    (amst.home / "to-deep").symlink_to("dir/deep")
    before = listing(amst.home)
    done = amst("cp", *operands)
    assert done.returncode == 6
    assert words in done.stderr
    assert listing(amst.home) == before


def test_what_is_refused_or_missing_does_not_stop_the_others(amst: Shell) -> None:
    (amst.home / "good").write_text("good")
    (amst.home / "dir").mkdir()
    result = result_of(amst("cp", "--json", "dir", "missing", "good", "dir"))
    assert (amst.home / "dir" / "good").read_text() == "good"
    assert [(failure["path"], failure["kind"]) for failure in result["failed"]] == [
        ("dir", "refused"), ("missing", "not_found"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("operands", "code"),
    [(["missing", "x"], 3), (["a", "no/such/x"], 6), (["a", "b/"], 6), (["a", "b", "c"], 2), (["a", "a/below"], 6)],
)
def test_what_cannot_be_copied(amst: Shell, operands: list[str], code: int) -> None:
    for name in ("a", "b"):
        (amst.home / name).touch()
    before = listing(amst.home)
    done = amst("cp", *operands)
    assert done.returncode == code
    assert done.stderr.startswith("amst: ")
    assert listing(amst.home) == before


def test_an_interrupted_copy_goes_on(amst: Shell) -> None:
    (amst.home / "large").write_bytes(os.urandom(48 << 20))
    with ended(amst.start("cp", "--bwlimit", "16MiB/s", "large", "copy")) as process:
        wait_until(
            lambda: sum(path.stat().st_size for path in amst.home.glob(".amst-*.journal")) > 200, "a part to arrive"
        )
        process.send_signal(signal.SIGKILL)
        process.wait(TIMEOUT_S)
    assert not (amst.home / "copy").exists()
    result = result_of(amst("cp", "--json", "large", "copy"))
    assert result["ok"] is True
    assert 0 < int(str(result["resumed_bytes"])) < 48 << 20
    assert (amst.home / "copy").read_bytes() == (amst.home / "large").read_bytes()


def test_ctrl_c_stops_a_copy_without_complaints_of_its_own_server(amst: Shell) -> None:
    (amst.home / "large").write_bytes(bytes(48 << 20))
    with ended(amst.start("cp", "--bwlimit", "8MiB/s", "large", "copy")) as process:
        wait_until(lambda: list(amst.home.glob(".amst-*.part")), "the copy to begin")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    lines = [line for line in errors.splitlines() if " %, " not in line]
    assert len(lines) == 1 and lines[0].startswith("amst: stopped by SIGINT"), errors


def test_a_copy_of_the_directory_for_temporary_files_takes_no_key_along(amst: Shell) -> None:
    (amst.home / "temporary").mkdir()
    (amst.home / "temporary" / "file").touch()
    amst.env["TMPDIR"] = str(amst.home / "temporary")
    assert amst("cp", "temporary", "copy").returncode == 0
    assert os.listdir(amst.home / "copy") == ["file"]


# ---- who may use it ---------------------------------------------------------------------------


def test_a_private_server_is_on_loopback_and_knows_only_its_own_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMST_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # nobody else's servers
    (tmp_path / "root").mkdir()
    (tmp_path / "file").write_bytes(b"content")
    with amst_core.listen("127.0.0.1:0") as usual, no_leftovers():
        with private_server(tmp_path / "root") as server:
            host, port = server.address.rsplit(":", 1)
            assert host == "127.0.0.1"
            assert server.token != usual.token
            for token in (usual.token, bytes(32)):
                with pytest.raises(AuthError):
                    amst_core.connect(server.address, token=token)
            assert list(Path(tempfile.gettempdir()).glob(".amst-*/token")) == []
            with amst_core.connect(server.address, token=server.token, streams=1) as session:
                session.send_file(tmp_path / "file", "copy")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)), DEADLINE_S)
    assert (tmp_path / "root" / "copy").read_bytes() == b"content"
    assert not any(thread.name.startswith("amst-") for thread in threading.enumerate())
