"""A root to work in beside a place that nothing may reach, and a check that no descriptor is left open."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from amst_core.files.root import Root


@pytest.fixture
def top(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    path.mkdir()
    return path


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A directory beside the root with one file in it; at the end it must be as it was."""
    path = tmp_path / "outside"
    path.mkdir()
    (path / "precious").write_bytes(b"precious")
    before = path.stat().st_mtime_ns, path.stat().st_mode
    yield path
    assert os.listdir(path) == ["precious"]
    assert (path / "precious").read_bytes() == b"precious"
    assert (path.stat().st_mtime_ns, path.stat().st_mode) == before


@pytest.fixture
def root(top: Path) -> Iterator[Root]:
    with Root(top) as made:
        yield made


@pytest.fixture(autouse=True)
def no_descriptor_left(tmp_path: Path) -> Iterator[None]:
    gc.collect()
    before = _open_descriptors()
    yield
    assert _open_descriptors() == before


def _open_descriptors() -> dict[str, str]:
    found = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            found[number] = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:  # the one of this listing
            continue
    return found
