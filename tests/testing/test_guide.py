"""The examples of the guide and of the page on congestion control run with the core alone; the tables are in step."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import broken_controllers
import broken_detectors
import broken_lanes
import broken_transports
import pytest
from leftovers import no_leftovers

from amst_core.testing import rules

DOCS = Path(__file__).resolve().parents[2] / "docs"
GUIDE = DOCS / "plugin-guide.md"
ROW = re.compile(r"^\| `([a-z-]+)` \| (.+?) \| `(\w+)` \|$", re.MULTILINE)
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    with no_leftovers():
        yield


def test_the_tables_of_rules_are_in_step_with_the_code() -> None:
    mutants = {**broken_transports.MUTANTS, **broken_lanes.MUTANTS, **broken_controllers.MUTANTS}
    mutants |= broken_detectors.MUTANTS  # type: ignore[arg-type]
    assert ROW.findall(GUIDE.read_text()) == [
        (name, promise, mutants[name].__name__) for name, promise in rules().items()
    ]


@pytest.mark.parametrize("page", [GUIDE, DOCS / "congestion-control.md"], ids=lambda page: page.stem)
def test_the_examples_run_and_print_what_the_page_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AMST_STATE_DIR", str(tmp_path / "state"))
    for name in ("AMST_TOKEN", "AMST_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for number, source in enumerate(BLOCK.findall(page.read_text()), 1):
        exec(compile(source, f"{page.name}, example {number}", "exec"), namespace)
    assert f"\n```\n{capsys.readouterr().out}```\n" in page.read_text()
    tests = [thing for name, thing in namespace.items() if name.startswith("test_")]
    assert bool(tests) == (page == GUIDE)
    for test in tests:
        cast(Callable[[], None], test)()


def test_the_kit_needs_no_test_runner() -> None:
    code = "import sys, amst_core.testing; print([name for name in ('pytest', 'unittest') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
