"""The layers of amst_core: what may import what, and what importing the package may not cost."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import amst_core.errors

PACKAGE = Path(amst_core.errors.__file__).parent
FACADE = "amst_core"

LAYERS = (
    ("errors", "interfaces", "hookspecs", "units", "endpoint", "process"),
    ("wire",),
    ("engine",),
    ("control", "files", "security", "settings", "plugins", "buffers", "memory", "congestion"),
    ("pacing", "modes"),
    ("session",),
    ("api",),
    ("aio",),
    (FACADE,),
    ("cli", "__main__", "testing"),
)
"""From the bottom up. A module or package of amst_core imports from its own row or from those before it."""

RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

MAY_IMPORT = {"stevedore": {"plugins.py"}, "pluggy": {"plugins.py", "hookspecs.py"}}

HEAVY = ("dynaconf", "rich", "cryptography", "stevedore", "pluggy")


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    """The top-level name below amst_core that a file belongs to."""
    inside = path.relative_to(PACKAGE)
    if inside == Path("__init__.py"):
        return FACADE
    return inside.parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """Every module that a file imports anywhere, as the parts of its absolute dotted name.

    A name imported from a package counts as a module of it where there is one.
    """
    package = (FACADE, *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:
                yield (*base, alias.name) if base[0] == FACADE and is_module((*base, alias.name)) else base


def is_module(dotted: tuple[str, ...]) -> bool:
    place = PACKAGE.joinpath(*dotted[1:])
    return place.is_dir() or place.with_suffix(".py").is_file()


def edges() -> set[tuple[str, str, str]]:
    """(importer, imported, file) for each import between two top-level parts of amst_core."""
    found = set()
    for path in sources():
        for name in imports(path):
            if name[0] == FACADE:
                target = name[1] if len(name) > 1 and is_module(name[:2]) else FACADE
                if target != part(path):
                    found.add((part(path), target, str(path.relative_to(PACKAGE))))
    return found


def test_every_part_has_a_place_in_the_layers():
    parts = {part(path) for path in sources()}
    assert {"errors", "interfaces", "wire", "plugins"} <= parts
    unplaced = sorted(parts - set(RANK))
    assert not unplaced, f"say in LAYERS of this file where these belong: {', '.join(unplaced)}"


def test_dependencies_point_down_only():
    upward = sorted(
        f"amst_core/{file} ({importer}) imports {imported}, which is above it"
        for importer, imported, file in edges()
        if importer in RANK and imported in RANK and RANK[imported] > RANK[importer]
    )
    assert not upward, "\n".join(upward)


def test_no_two_parts_import_each_other():
    graph: dict[str, set[str]] = {}
    for importer, imported, _ in edges():
        graph.setdefault(importer, set()).add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as err:
        pytest.fail("a circle of imports: " + " → ".join(err.args[1]))


def test_the_walk_sees_relative_and_absolute_imports_in_functions_too():
    assert ("plugins", "hookspecs", "plugins.py") in edges()
    assert ("interfaces", "errors", "interfaces.py") in edges()


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_only_the_plugin_module_touches_the_plugin_libraries(library):
    users = {str(path.relative_to(PACKAGE)) for path in sources() for name in imports(path) if name[0] == library}
    assert users == MAY_IMPORT[library]


def test_nothing_that_runs_needs_what_is_for_tests_but_the_command_that_makes_labs() -> None:
    users = {file for _, imported, file in edges() if imported == "testing"}
    assert users == {"cli/lab.py"}, f"{', '.join(sorted(users))} import amst_core.testing"


def test_the_core_imports_no_plugin_distribution():
    offenders = sorted(
        f"amst_core/{path.relative_to(PACKAGE)} imports {'.'.join(name)}"
        for path in sources()
        for name in imports(path)
        if name[0].startswith("amst_") and name[0] != FACADE
    )
    assert not offenders, "\n".join(offenders)


def test_interfaces_and_errors_need_the_standard_library_only():
    for file in ("interfaces.py", "errors.py"):
        foreign = {name[0] for name in imports(PACKAGE / file)} - set(sys.stdlib_module_names) - {FACADE}
        assert not foreign, f"amst_core/{file} imports {', '.join(sorted(foreign))}"


@pytest.mark.parametrize("module", ["amst_core", "amst_core.interfaces", "amst_core.errors"])
def test_importing_the_package_loads_no_heavy_library(module):
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_only_the_monotonic_clock_drives_timers() -> None:
    """What is set by people or by NTP may jump; ages and times of files are what is told by it."""
    allowed = {"partial.py", "redirect.py"}
    for path in sources():
        if path.name not in allowed:
            found = re.search(r"\btime\.time(_ns)?\(|\bdatetime\.now", path.read_text())
            assert not found, f"{path} looks at the wall clock"
