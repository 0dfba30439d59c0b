"""One fuzz target under atheris: ``python tests/fuzz/fuzz.py TARGET [libFuzzer's arguments]``; see ``make fuzz``."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

HERE = Path(__file__).parent


def main() -> None:
    with atheris.instrument_imports(include=["amst_core"]):
        sys.path.insert(0, str(HERE))
        import targets
    name, *arguments = sys.argv[1:]
    run = targets.TARGETS[name]
    atheris.Setup([sys.argv[0], *arguments, str(HERE / "corpus" / name)], lambda data: run(bytes(data)))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
