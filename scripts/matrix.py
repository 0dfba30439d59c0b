"""Run the tox matrix on every Python 3.11 to 3.13 that this machine has, and say which environments could not run.

Interpreters come from PATH and, where pyenv is installed, from its versions; of one minor version the newest counts.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINORS = ("3.11", "3.12", "3.13")
PLUGIN_SETS = ("core", "core-tcp", "core-bbr", "core-cubic", "core-tcp-bbr-cubic")


def main() -> int:
    """Run the environments whose Python is here; 0 only if at least one ran and all that ran passed."""
    ready, lacking, pythons = [], [], []
    for minor in MINORS:
        python = newest(minor)
        names = [f"py{minor.replace('.', '')}-{plugins}" for plugins in PLUGIN_SETS]
        if python is None:
            lacking += [f"NOT RUN: {name} (no Python {minor} found)" for name in names]
        else:
            print(f"Python {minor}: {python}", flush=True)
            ready += names
            pythons.append(python)
    code = 1
    if ready:
        shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # setuptools would pack what an older tree left there
        tox = [sys.executable, "-m", "tox", "run", "--discover", *pythons, "--root", str(ROOT), "-e", ",".join(ready)]
        code = subprocess.run([*tox, *sys.argv[1:]], cwd=ROOT, check=False).returncode
    outcome = "passed" if code == 0 else "FAILED, which of them stands above"
    print("\n".join([f"matrix: {outcome}: {', '.join(ready) or 'nothing ran'}", *lacking]))
    print("NOT RUN in the matrix: tests marked alone (tests/faults, tests/budget, others), tests/hostile, mutants, "
          "netlab (make test runs them once); where bbr or cubic is installed, what cannot notice it")  # fmt: skip
    return code


def newest(minor: str) -> str | None:
    """The newest working interpreter of one minor version, None if there is none."""
    found = {version: path for path in candidates(minor) if (version := version_of(path, minor)) is not None}
    return found[max(found)] if found else None


def candidates(minor: str) -> list[str]:
    """Where an interpreter of this minor version may be; the last of two equal ones is preferred."""
    paths = [str(path) for root in pyenv_roots() for path in sorted(root.glob(f"versions/{minor}.*/bin/python{minor}"))]
    folders = [Path(folder) for folder in os.get_exec_path() if "shims" not in Path(folder).parts]
    return paths + [str(folder / f"python{minor}") for folder in reversed(folders) if folder.is_absolute()]


def pyenv_roots() -> list[Path]:
    """The directories pyenv may keep its versions under; its own answer follows HOME, its place does not."""
    roots = [Path(os.environ["PYENV_ROOT"])] if "PYENV_ROOT" in os.environ else []
    pyenv = shutil.which("pyenv")
    if pyenv is not None:
        answer = subprocess.run([pyenv, "root"], capture_output=True, text=True, check=False).stdout.strip()
        roots += [Path(answer)] if answer else []
        roots.append(Path(pyenv).resolve().parent.parent)
    roots.append(Path.home() / ".pyenv")
    return list(dict.fromkeys(root for root in roots if (root / "versions").is_dir()))


def version_of(python: str, minor: str) -> tuple[int, ...] | None:
    """The version of a CPython that starts and is what its name says, else None."""
    code = "import sys, platform; print(platform.python_implementation(), platform.python_version())"
    try:
        answer = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=False, timeout=30)
    except OSError:
        return None
    match = re.fullmatch(rf"CPython ({re.escape(minor)}\.\d+)\s*", answer.stdout)
    return tuple(int(number) for number in match[1].split(".")) if match else None


if __name__ == "__main__":
    sys.exit(main())
