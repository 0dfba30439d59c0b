"""Fake installed distributions: a module and a .dist-info beside it, in a directory of the test's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import amst_core.errors

CORE = Path(amst_core.errors.__file__).parent.parent

PRELUDE = """
import json, logging, sys
from amst_core.errors import AmstError, PluginError
from amst_core.hookspecs import hookimpl
from amst_core.plugins import Plugins, installed

def error(call):
    try:
        call()
    except AmstError as err:
        return f"{type(err).__name__}: {err}"
    return None

def show(value):
    print("RESULT " + json.dumps(value))
"""

TRANSPORT = """
from amst_core.hookspecs import hookimpl
from amst_core.interfaces import Advertisement, Candidate, Transport

class Fake(Transport):
    name = "{name}"
    api_version = {api_version}
    options = None
    closed = False

    def probe(self, peer):
        return Candidate(self.name, True, "always")

    def advertise(self, tag, deliver):
        return Advertisement(self.name, tag)

    def connect(self, request, timeouts):
        raise AssertionError("not connected in these tests")

    def close(self):
        self.closed = True

@hookimpl
def amst_make_transport(name, options):
    if name != "{name}":
        return None
    made = Fake()
    made.options = dict(options)
    return made
"""


class FakeSite:
    """A directory that a child interpreter has on its path, and the children that were run with it."""

    def __init__(self, root: Path) -> None:
        self.path = root / "site"
        self.path.mkdir()
        self.home = root / "home"
        self.home.mkdir()

    def install(
        self, dist: str, module: str, source: str, points: Mapping[str, str], *, version: str = "1.0", also: str = ""
    ) -> None:
        """Write ``module``.py and the metadata of ``dist``; ``points`` maps "group:name" to a target."""
        (self.path / f"{module}.py").write_text(textwrap.dedent(source))
        info = self.path / f"{dist.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
        lines = []
        for key, target in points.items():
            group, name = key.split(":")
            lines.append(f"[{group}]\n{name} = {target}\n")
        (info / "entry_points.txt").write_text("".join(lines) + also)

    def transport(self, dist: str, name: str, *, api_version: int = 1, module: str | None = None) -> str:
        """Install a working transport ``name``; returns the name of its module."""
        module = module or f"{dist.replace('-', '_')}_plugin"
        source = TRANSPORT.format(name=name, api_version=api_version)
        self.install(dist, module, source, {f"amst.transport:{name}": module})
        return module

    def run(self, code: str) -> Any:
        """Run ``code`` in a new interpreter that sees this site; return what it passed to ``show``."""
        done = self.run_raw(PRELUDE + textwrap.dedent(code))
        assert done.returncode == 0, done.stderr
        assert not done.stderr, f"stevedore or pluggy was not quiet: {done.stderr}"
        return json.loads(done.stdout.rpartition("RESULT ")[2])

    def run_raw(self, code: str) -> subprocess.CompletedProcess[str]:
        env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "XDG_", "AMST_"))}
        env |= {"PYTHONPATH": os.pathsep.join((str(self.path), str(CORE))), "HOME": str(self.home)}
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            capture_output=True, text=True, env=env, cwd=self.home, timeout=60, check=False,
        )  # fmt: skip


@pytest.fixture
def site(tmp_path: Path) -> FakeSite:
    return FakeSite(tmp_path)
