"""The fuzz targets without a fuzzer: every input in ``corpus/``, and some thousands of mutations, always the same."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
import tracemalloc
import zlib
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent
MUTATIONS = 1500
SLOW = {"listener": 25, "engine": 600}
"""How many of targets that take longer."""
MEMORY = 32 << 20


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("amst_fuzz_targets", HERE / "targets.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


targets = _load()
INPUTS = {
    f"{path.parent.name}/{path.name}": path for path in sorted((HERE / "corpus").glob("*/*")) if path.is_file()
}


@pytest.mark.parametrize("path", INPUTS.values(), ids=INPUTS)
def test_an_input(path: Path) -> None:
    targets.TARGETS[path.parent.name](path.read_bytes())


@pytest.mark.parametrize("name", targets.TARGETS)
def test_mutations(name: str) -> None:
    chance = random.Random(zlib.crc32(name.encode()))
    corpus = [path.read_bytes() for path in INPUTS.values() if path.parent.name == name and path.name[:6] != "failed"]
    assert corpus, "no seeds"
    for _ in range(SLOW.get(name, MUTATIONS)):
        data = targets.mutated(chance.choice(corpus), chance)
        try:
            targets.TARGETS[name](data)
        except BaseException as err:
            pytest.fail(f"{err!r} at {data.hex()}")


@pytest.mark.parametrize("name", sorted(set(targets.TARGETS) - {"listener"}))
def test_no_input_takes_memory_that_it_only_announces(name: str) -> None:
    corpus = [path for path in INPUTS.values() if path.parent.name == name and path.name[:6] != "failed"]
    targets.TARGETS[name](corpus[0].read_bytes())  # what is imported late
    tracemalloc.start()
    try:
        for path in corpus:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            targets.TARGETS[name](path.read_bytes())
            assert tracemalloc.get_traced_memory()[1] - before < MEMORY, path.name
    finally:
        tracemalloc.stop()


def test_every_target_has_the_seeds_of_the_vectors() -> None:
    vectors = json.loads((HERE.parent / "wire" / "vectors.json").read_text("utf-8"))
    for name, found in targets.seeds(vectors).items():
        there = {path.read_bytes() for path in INPUTS.values() if path.parent.name == name}
        assert there >= set(found), f"{name}: run tests/fuzz/seed.py"
