"""docs/plugin-guide.md: its examples run with the core alone, and its table is the table of rules and mutants."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import broken_lanes
import broken_transports
import pytest
from leftovers import no_leftovers

from amst_core.testing import rules

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "plugin-guide.md"
ROW = re.compile(r"^\| `([a-z-]+)` \| (.+?) \| `(\w+)` \|$", re.MULTILINE)
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    with no_leftovers():
        yield


def test_the_table_of_rules_is_in_step_with_the_code() -> None:
    mutants = {**broken_transports.MUTANTS, **broken_lanes.MUTANTS}
    assert ROW.findall(GUIDE.read_text()) == [
        (name, promise, mutants[name].__name__) for name, promise in rules().items()
    ]


def test_the_examples_run_and_print_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AMST_STATE_DIR", str(tmp_path / "state"))
    for name in ("AMST_TOKEN", "AMST_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for number, source in enumerate(BLOCK.findall(GUIDE.read_text()), 1):
        exec(compile(source, f"{GUIDE.name}, example {number}", "exec"), namespace)
    assert f"\n```\n{capsys.readouterr().out}```\n" in GUIDE.read_text()
    tests = [thing for name, thing in namespace.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        cast(Callable[[], None], test)()


def test_the_kit_needs_no_test_runner() -> None:
    code = "import sys, amst_core.testing; print([name for name in ('pytest', 'unittest') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
