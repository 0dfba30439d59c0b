"""`amst cp --dry-run`: the same in all directions, true, and without a trace on either side."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import Serving, Shell, make_shell, serving
from .test_cli_copy import listing, make_tree, result_of
from .test_cli_options import KEYS

pytestmark = pytest.mark.needs_transport


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shell, Serving]]:
    shell = make_shell(tmp_path_factory.mktemp("plans"))
    with serving(shell, shell.home / "root") as server:
        yield shell, server


@pytest.fixture(params=["up", "down", "here"])
def sides(request: pytest.FixtureRequest, running: tuple[Shell, Serving], tmp_path: Path) -> Sides:
    shell, server = running
    served = server.root / tmp_path.name
    served.mkdir()
    (tmp_path / "local").mkdir()
    mine = make_shell(tmp_path)
    mine.env["AMST_STATE_DIR"] = shell.env["AMST_STATE_DIR"]
    url = f"{server.url}/{tmp_path.name}"
    local = str(tmp_path / "local")
    match request.param:
        case "up":
            return Sides(mine, tmp_path / "local", local, served, url)
        case "down":
            return Sides(mine, served, url, tmp_path / "local", local)
    (tmp_path / "other").mkdir()
    return Sides(mine, tmp_path / "local", local, tmp_path / "other", str(tmp_path / "other"))


class Sides:
    """Where copies come from and go to: as paths, and as they are written."""

    def __init__(self, amst: Shell, source: Path, source_url: str, target: Path, target_url: str) -> None:
        self.amst = amst
        self.source, self.source_url = source, source_url
        self.target, self.target_url = target, target_url

    def plan(self, source: str, target: str) -> dict[str, tuple[str, int]]:
        """Action and size by path below the target; the files of both sides are as they were."""
        before = listing(self.source), listing(self.target)
        done = self.amst("cp", "--dry-run", "--json", f"{self.source_url}/{source}", f"{self.target_url}/{target}")
        assert (listing(self.source), listing(self.target)) == before
        assert done.stdout.count("\n") == 1
        result: dict[str, Any] = json.loads(done.stdout)
        assert list(result) == [*KEYS, "dry_run"]
        assert done.returncode == (0 if result["ok"] else 6), done.stderr
        self.last = result
        steps = result["dry_run"]["entries"]
        assert all(step["source"].startswith(self.source_url) for step in steps)
        cut = len(self.target_url) + 1
        return {step["target"][cut:]: (step["action"], step["size"]) for step in steps}


def test_all_is_new(sides: Sides) -> None:
    make_tree(sides.source / "tree")
    plan = sides.plan("tree", "new")
    assert len(plan) == 16
    assert plan["new/large"] == ("copy", (3 << 20) + 17)
    assert (plan["new"], plan["new/dir/deep"], plan["new/link"]) == (("make", 0), ("make", 0), ("copy", 0))
    files = sum(1 for path in (sides.source / "tree").rglob("*") if path.is_symlink() or not path.is_dir())
    size = sum(p.stat().st_size for p in (sides.source / "tree").rglob("*") if p.is_file() and not p.is_symlink())
    assert (sides.last["files"], sides.last["bytes"]) == (files, size)
    assert sides.last["dry_run"]["copy"] == {"files": files, "bytes": size}


def test_what_is_there_is_told_apart_and_the_copy_does_it(sides: Sides) -> None:
    top = sides.source / "tree"
    (top / "dir").mkdir(parents=True)
    for name in ("same", "larger", "later", "dir/new"):
        (top / name).write_text(name)
        os.utime(top / name, ns=(0, 5))
    (top / "link").symlink_to("same")
    assert sides.amst("cp", f"{sides.source_url}/tree", f"{sides.target_url}/tree").returncode == 0
    there = sides.target / "tree"
    (there / "larger").write_text("more than before")
    os.utime(there / "larger", ns=(0, 5))
    os.utime(there / "later", ns=(0, 6))
    (there / "dir" / "new").unlink()
    (there / "extra").mkdir()
    (there / "extra" / "file").touch()
    plan = sides.plan("tree", "")
    assert {name.removeprefix("tree/"): action for name, (action, _) in plan.items()} == {
        "tree": "keep", "dir": "keep", "dir/new": "copy", "larger": "replace", "later": "replace", "link": "replace",
        "same": "compare",
    }  # fmt: skip
    assert sides.last["dry_run"]["compare"] == {"files": 1, "bytes": 4}
    assert sides.amst("cp", f"{sides.source_url}/tree", f"{sides.target_url}/").returncode == 0
    assert {action for action, _ in sides.plan("tree", "").values()} == {"keep", "compare", "replace"}


def test_what_would_fail_fails_there_too(sides: Sides) -> None:
    (sides.source / "tree" / "d").mkdir(parents=True)
    (sides.source / "tree" / "d" / "below").touch()
    (sides.source / "tree" / "f").touch()
    (sides.source / "tree" / "good").touch()
    os.mkfifo(sides.source / "tree" / "pipe")
    (sides.target / "tree" / "f").mkdir(parents=True)
    (sides.target / "tree" / "d").touch()
    plan = sides.plan("tree", "")
    os.unlink(sides.source / "tree" / "pipe")
    assert {name for name, (action, _) in plan.items() if action == "fail"} == {
        "tree/d", "tree/d/below", "tree/f", "tree/pipe",
    }  # fmt: skip
    assert plan["tree/good"] == ("copy", 0)
    done = result_of(sides.amst("cp", "--json", f"{sides.source_url}/tree", f"{sides.target_url}/"))
    assert {str(failure["path"]).rpartition("tree/")[2] for failure in done["failed"]} == {"d", "d/below", "f"}
    assert (sides.target / "tree" / "good").exists()


def test_a_directory_that_would_be_made(sides: Sides) -> None:
    (sides.source / "file").write_text("12345")
    assert sides.plan("file", "made/") == {"made/file": ("copy", 5)}
    assert sides.amst("cp", f"{sides.source_url}/file", f"{sides.target_url}/made/").returncode == 0
    assert sides.plan("file", "made/") == {"made/file": ("compare", 5)}


def test_a_missing_source_is_exit_3(sides: Sides) -> None:
    done = sides.amst("cp", "--dry-run", f"{sides.source_url}/missing", f"{sides.target_url}/x")
    assert done.returncode == 3
    assert "missing" in done.stderr


def test_people_get_a_line_each_and_a_sum(sides: Sides) -> None:
    (sides.source / "tree").mkdir()
    (sides.source / "tree" / "file").write_text("12345")
    done = sides.amst("cp", "--dry-run", f"{sides.source_url}/tree", f"{sides.target_url}/new")
    assert done.returncode == 0
    source, target = sides.source_url, sides.target_url
    assert done.stdout == (
        f"make    {source}/tree -> {target}/new\ncopy    {source}/tree/file -> {target}/new/file\n"
    )
    assert done.stderr == (
        "dry run, nothing was changed: 1 file (5 bytes) to copy, 0 files (0 bytes) to replace, "
        "0 files (0 bytes) to compare\n"
    )
