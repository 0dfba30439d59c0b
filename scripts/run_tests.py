"""Run pytest with the arguments given; with AMST_RERUN=1, run what failed once more, by itself, and name it.

Thousands of tests that kill processes and cut connections, several files at a time on a shared machine, meet its
stalls. What fails by itself as well fails the run. What then passes is named as unsteady: it has to be mended all the
same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FAILED = 1  # pytest's exit code
MOST = 5
"""More failures than this are no accident."""


def main() -> int:
    """The exit code of pytest."""
    command = [sys.executable, "-m", "pytest", *sys.argv[1:]]
    stops_early = any(arg in ("-x", "--exitfirst") or arg.startswith("--maxfail") for arg in sys.argv[1:])
    if os.environ.get("AMST_RERUN") != "1" or stops_early:
        os.execv(command[0], command)
    with tempfile.TemporaryDirectory(prefix="amst-tests-") as cache:
        command += ["-o", f"cache_dir={cache}"]
        code = subprocess.run(command, check=False).returncode
        failed = last_failed(Path(cache))
        if code != FAILED or not 1 <= len(failed) <= MOST:
            return code
        print(f"\n== once more, by themselves: {', '.join(failed)}", flush=True)
        code = subprocess.run(
            [*command, "-n", "0", "--last-failed", "--last-failed-no-failures", "none", "-vv"], check=False
        ).returncode
        if code == 0 and last_failed(Path(cache)):
            code = FAILED  # something that failed was not found again
    if code == 0:
        print("\n".join(f"UNSTEADY {name}: failed, and passed by itself" for name in failed), flush=True)
    return code


def last_failed(cache: Path) -> list[str]:
    """The tests that failed in the last run."""
    try:
        return sorted(json.loads((cache / "v" / "cache" / "lastfailed").read_text()))
    except FileNotFoundError:
        return []


if __name__ == "__main__":
    sys.exit(main())
