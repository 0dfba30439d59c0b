"""What every test may rely on: tests marked ``needs_transport`` are skipped where no transport is installed."""

from __future__ import annotations

import importlib.metadata

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    try:
        importlib.metadata.distribution("amst-tcp")
    except importlib.metadata.PackageNotFoundError:
        skip = pytest.mark.skip(reason="amst-tcp is not installed")
        for item in items:
            if "needs_transport" in item.keywords:
                item.add_marker(skip)
