"""The Python examples in the documentation run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[str]:
    return BLOCK.findall((REPOSITORY / page).read_text())


@pytest.mark.needs_transport
@pytest.mark.parametrize("page", ["README.md", "docs/api.md"])
def test_the_examples_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMST_STATE_DIR", str(tmp_path / "state"))
    for name in ("AMST_TOKEN", "AMST_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    work = tmp_path / "work"
    (work / "served").mkdir(parents=True)
    monkeypatch.chdir(work)
    found = blocks(page)
    assert found, f"{page} has no Python example any more"
    namespace: dict[str, object] = {}
    for number, source in enumerate(found, 1):
        exec(compile(source, f"{page}, example {number}", "exec"), namespace)
