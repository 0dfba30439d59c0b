"""File systems that are small or cannot be written to. Needs root."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@functools.cache
def missing() -> str | None:
    """Why nothing can be mounted here; None when it can."""
    if os.geteuid() != 0:
        return "needs root to mount file systems"
    with tempfile.TemporaryDirectory() as directory:
        try:
            with small(Path(directory), 1 << 20):
                return None
        except (subprocess.CalledProcessError, OSError) as err:
            return f"cannot mount here: {err}"


def require_mounts() -> None:
    """Skip the test where nothing can be mounted. In CI it must be possible."""
    reason = missing()
    if reason is not None:
        assert os.environ.get("CI") != "true", f"CI must run this: {reason}"
        pytest.skip(reason)


@contextlib.contextmanager
def small(directory: Path, size: int) -> Iterator[Path]:
    """A file system of ``size`` bytes at ``directory``."""
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory))
    try:
        yield directory
    finally:
        _unmount(directory)


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[Path]:
    """``directory`` as it is, but not to be written to."""
    _mount("--bind", str(directory), str(directory))
    try:
        _mount("-o", "remount,ro,bind", str(directory))
        yield directory
    finally:
        _unmount(directory)


def _mount(*argv: str) -> None:
    subprocess.run(["mount", *argv], check=True, capture_output=True, timeout=30)


def _unmount(directory: Path) -> None:
    # whoever still has a file open there was killed a moment ago, or soon will be
    subprocess.run(["umount", "--lazy", str(directory)], check=True, capture_output=True, timeout=30)
