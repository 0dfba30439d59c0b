"""Build a wheel of each plugin that is named, and install it in the Python that runs this.

    python scripts/install_plugins.py WORK amst_tcp amst_cc_bbr

Each is built from a copy of its own below WORK: environments that run side by side must not build in one directory.
Nothing else is installed: the core is there already.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

PLUGINS = Path(__file__).resolve().parent.parent / "plugins"


def main() -> int:
    work, names = Path(sys.argv[1]), sys.argv[2:]
    wheels = work / "wheels"
    pip = [sys.executable, "-m", "pip"]
    for name in names:
        copy = work / name
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(PLUGINS / name, copy, ignore=shutil.ignore_patterns("build", "*.egg-info"))
        subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", wheels, copy], check=True)
        offline = ["--no-index", "--force-reinstall", "--no-deps", "--find-links", wheels]
        subprocess.run([*pip, "install", "--quiet", *offline, name.replace("_", "-")], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
