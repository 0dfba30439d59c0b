"""`amst doctor`: facts as they might be, what is said of them, and leftovers as they are told."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from amst_core.api.diagnosis import Facts, Finding, PluginFact, State, StateFact, gather, judge
from amst_core.errors import AmstError, NotFoundError
from amst_core.files.journal import SourceMark, encode_header
from amst_core.files.leftovers import Leftover, find_leftovers
from amst_core.files.partial import PartialPolicy, partial_names

GOOD = Facts(
    python=(3, 12, 1),
    system="Linux",
    kernel="6.8.0",
    machine="x86_64",
    versions={"amst-core": "0.1.0"},
    cpu_has_aes=True,
    open_files=1 << 20,
    locked_memory=-1,
    sysctls={
        "net.core.rmem_max": "212992", "net.core.wmem_max": "212992", "net.core.somaxconn": "4096",
        "net.ipv4.tcp_rmem": "4096 131072 6291456", "net.ipv4.tcp_wmem": "4096 16384 4194304",
        "net.ipv4.tcp_congestion_control": "cubic", "net.ipv4.tcp_available_congestion_control": "cubic bbr",
        "net.ipv4.ip_local_port_range": "32768 60999",
    },
    bbr="",
    is_root=True,
    has_tun=True,
    plugins=(PluginFact("amst.transport", "tcp", "amst-tcp 0.1.0"),),
    state=StateFact("/home/x/amst", 0o700, {"token": 0o600, "key.pem": 0o600, "certificate.pem": 0o644}),
)  # fmt: skip


def sysctls(**changes: str | None) -> dict[str, Any]:
    return {"sysctls": {**GOOD.sysctls, **{name.replace("__", "."): value for name, value in changes.items()}}}


def judged(**changes: Any) -> list[Finding]:
    """What is said of good facts with these changes, beyond "ok"."""
    return [finding for finding in judge(dataclasses.replace(GOOD, **changes)) if finding.state is not State.OK]


def test_a_good_machine_gets_no_note() -> None:
    assert judged() == []


@pytest.mark.parametrize(
    ("changes", "state", "area", "words"),
    [
        ({"python": (3, 10, 4)}, State.PROBLEM, "python", "3.11"),
        ({"system": "Darwin"}, State.PROBLEM, "kernel", "Linux only"),
        ({"cpu_has_aes": False}, State.NOTE, "encryption", "no AES"),
        ({"cpu_has_aes": None}, State.NOTE, "encryption", "not known"),
        ({"open_files": 100}, State.PROBLEM, "limit", "100"),
        ({"open_files": 1024}, State.NOTE, "limit", "1024"),
        (sysctls(net__ipv4__tcp_wmem="4096 16384 262144"), State.NOTE, "kernel", "256KiB"),
        (sysctls(net__ipv4__tcp_rmem="4096 16384 1048576"), State.NOTE, "kernel", "1MiB"),
        (sysctls(net__ipv4__tcp_rmem=None), State.NOTE, "kernel", "not to be seen"),
        (sysctls(net__core__somaxconn="128"), State.NOTE, "kernel", "128"),
        (sysctls(net__ipv4__ip_local_port_range="50000 50099"), State.NOTE, "kernel", "100 ports"),
        ({"bbr": "Operation not permitted"}, State.NOTE, "congestion", "Operation not permitted"),
        ({"bbr": "No such file or directory"}, State.NOTE, "congestion", "No such file"),
        ({"is_root": False}, State.NOTE, "labs", "root"),
        ({"has_tun": False}, State.NOTE, "labs", "/dev/net/tun"),
        ({"state": StateFact("/x", error="Permission denied")}, State.PROBLEM, "state", "Permission denied"),
        ({"state": StateFact("/x", 0o770)}, State.PROBLEM, "state", "chmod 700 /x"),
        ({"state": StateFact("/x", 0o700, {"token": 0o640})}, State.PROBLEM, "state", "/x/token"),
        ({"state": StateFact("/x", 0o700, {"key.pem": 0o644})}, State.PROBLEM, "state", "/x/key.pem"),
        ({"plugins": ()}, State.PROBLEM, "plugin", "pip install amst-tcp"),
    ],
)
def test_each_thing_that_matters_is_found(changes: dict[str, Any], state: State, area: str, words: str) -> None:
    (finding,) = judged(**changes)
    assert (finding.state, finding.area) == (state, area)
    assert words in finding.text + finding.advice


def test_a_directory_that_is_not_there_yet_is_fine() -> None:
    assert judged(state=StateFact("/x")) == []


def test_an_unusable_plugin_is_a_note_beside_another_transport_and_a_problem_alone() -> None:
    broken = PluginFact("amst.transport", "rdma", "amst-rdma 1", unusable="no device")
    worse = PluginFact("amst.transport", "quic", "amst-quic 1", error="ImportError: x")
    found = judged(plugins=(*GOOD.plugins, broken, worse))
    assert [finding.state for finding in found] == [State.NOTE, State.NOTE]
    assert ["no device" in found[0].text, "ImportError: x" in found[1].text] == [True, True]
    assert [finding.state for finding in judged(plugins=(broken, worse))] == [State.NOTE, State.NOTE, State.PROBLEM]


def test_facts_of_this_machine_are_gathered_and_nothing_is_made(tmp_path: Path) -> None:
    facts = gather(environ={"AMST_STATE_DIR": str(tmp_path / "state")})
    assert facts.system == "Linux"
    assert {"amst-core", "cryptography", "OpenSSL of Python"} <= set(facts.versions)
    assert facts.state == StateFact(str(tmp_path / "state"))
    assert list(tmp_path.iterdir()) == []
    assert judge(facts)


def test_the_modes_of_the_state_directory_are_told(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    (state / "token").touch(mode=0o600)
    (state / "token").chmod(0o644)
    facts = gather(environ={"AMST_STATE_DIR": str(state)})
    assert facts.state == StateFact(str(state), 0o700, {"token": 0o644})


@pytest.mark.needs_transport
def test_the_command_prints_findings_and_exits_by_them(amst: Any) -> None:
    done = amst("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    assert "amst-core" in done.stdout
    value = json.loads(amst("doctor", "--json").stdout)
    assert list(value) == ["ok", "findings", "error"]
    assert all(list(finding) == ["area", "state", "text", "advice"] for finding in value["findings"])
    (amst.home / "state").mkdir()
    (amst.home / "state").chmod(0o777)
    done = amst("doctor")
    assert done.returncode == 1
    assert "chmod 700" in done.stdout
    assert amst("doctor", "x").returncode == 2


# ---- leftovers --------------------------------------------------------------------------------


def make_leftover(folder: Path, leaf: bytes, *, journal: bool = True) -> tuple[Path, Path]:
    part, beside = (folder / os.fsdecode(name) for name in partial_names(leaf))
    part.write_bytes(bytes(1000))
    part.chmod(0o600)
    if journal:
        beside.write_bytes(encode_header(SourceMark(b"x", 5000, 7)))
        beside.chmod(0o600)
    return part, beside


def policy(after_s: float) -> PartialPolicy:
    """As if so much time had passed."""
    now = PartialPolicy().now()
    return PartialPolicy(keep_s=1000.0, orphan_s=100.0, now=lambda: now + after_s)


def found_in(top: Path, after_s: float = 0.0) -> list[Leftover]:
    found = list(find_leftovers(top, policy=policy(after_s)))
    return [item for item in found if not isinstance(item, AmstError)]


def test_leftovers_are_found_at_any_depth_and_told_what_they_belong_to(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "target").touch()
    (deep / ".amst-no-leftover").touch()
    (deep / "elsewhere").symlink_to(tmp_path)
    part, journal = make_leftover(deep, b"target")
    orphan, _ = make_leftover(tmp_path, b"unknown", journal=False)
    found = {Path(os.fsdecode(item.path)): item for item in found_in(tmp_path, 50)}
    assert set(found) == {part, journal, orphan}
    assert found[part].target == found[journal].target == b"target"
    assert found[part].source == SourceMark(b"x", 5000, 7)
    assert (found[orphan].target, found[orphan].source, found[orphan].size) == (None, None, 1000)
    assert 40 < found[orphan].age_s < 60 and 40 < found[orphan].left_s < 60
    assert 900 < found[part].left_s < 1000
    assert found_in(tmp_path, 2000)[0].left_s == 0
    assert all(item.ours and not item.in_use for item in found.values())
    assert [found[path].resumable for path in (part, journal, orphan)] == [True, True, False]


def test_what_is_in_use_or_anothers_is_told_so(tmp_path: Path) -> None:
    part, _ = make_leftover(tmp_path, b"x", journal=False)
    fd = os.open(part, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert [item.in_use for item in found_in(tmp_path)] == [True]
    finally:
        os.close(fd)
    part.chmod(0o666)
    assert [(item.in_use, item.ours) for item in found_in(tmp_path)] == [(False, False)]


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        list(find_leftovers(tmp_path / "nothing"))


def test_the_command_lists_leftovers(amst: Any) -> None:
    (amst.home / "top").mkdir()
    (amst.home / "top" / "disk.img").touch()
    make_leftover(amst.home / "top", b"disk.img")
    before = sorted(os.listdir(amst.home / "top"))
    done = amst("doctor", "--leftovers", "top")
    assert done.returncode == 0
    assert done.stdout.count("to replace disk.img") == 2
    assert "goes on from it" in done.stdout
    assert done.stderr.startswith("2 leftovers, ")
    value = json.loads(amst("doctor", "--json", "--leftovers", "top").stdout)
    assert [item["target"] for item in value["leftovers"]] == ["disk.img", "disk.img"]
    assert value["leftovers"][0]["source_size"] == 5000
    assert sorted(os.listdir(amst.home / "top")) == before
    assert amst("doctor", "--leftovers", "missing").returncode == 3
