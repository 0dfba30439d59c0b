"""What every test may rely on: tests marked ``needs_transport`` are skipped where no transport is installed."""

from __future__ import annotations

import importlib.metadata
import signal

import pytest

ALONE = ("faults", "budget")
"""Folders whose tests overlap their own waits, or count what others would disturb."""


def pytest_configure() -> None:
    # A shell's background jobs ignore SIGINT, and so would the programs that tests start and interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name in ALONE:
            item.add_marker(pytest.mark.alone)
    try:
        importlib.metadata.distribution("amst-tcp")
    except importlib.metadata.PackageNotFoundError:
        skip = pytest.mark.skip(reason="amst-tcp is not installed")
        for item in items:
            if "needs_transport" in item.keywords:
                item.add_marker(skip)
