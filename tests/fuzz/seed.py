"""Writes the seeds of `targets.seeds` into ``corpus/``; what is there already, inputs that once failed, stays."""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    sys.path.insert(0, str(HERE))
    import targets

    vectors = json.loads((HERE.parent / "wire" / "vectors.json").read_text("utf-8"))
    for name, found in targets.seeds(vectors).items():
        folder = HERE / "corpus" / name
        folder.mkdir(parents=True, exist_ok=True)
        for data in found:
            (folder / f"seed-{zlib.crc32(data):08x}").write_bytes(data)


if __name__ == "__main__":
    main()
