"""Runs amst as ``python -m amst_core`` does, with one thing changed: ``hooked.py HOOK DIRECTORY ARGS``.

``before``, ``after``: the first file that gets its final name waits before, or after that. Makes DIRECTORY/reached and
goes on once DIRECTORY/go is there. ``later``: it is 8 days later than it is.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

hook, directory = sys.argv[1:3]
rename = os.rename
now = time.time
first = threading.Lock()


def wait() -> None:
    with open(f"{directory}/reached", "x"):
        pass
    while not os.path.exists(f"{directory}/go"):
        time.sleep(0.01)


def waiting_rename(source: Any, target: Any, **kwargs: Any) -> None:
    waits = os.fsencode(source).startswith(b".amst-") and first.acquire(blocking=False)
    if waits and hook == "before":
        wait()
    rename(source, target, **kwargs)
    if waits and hook == "after":
        wait()


if hook == "later":
    time.time = lambda: now() + 8 * 86400.0
else:
    os.rename = waiting_rename

from amst_core.cli.main import main  # noqa: E402 – it takes over time.time as it is now

sys.exit(main(sys.argv[3:]))
