"""Load settings: defaults < files in order < ``AMST_<SECTION>__<KEY>`` variables < overrides, all faults at once.

Each source is read into leaves (path, value, where it stands), each leaf is checked against the registry, and
only what passed is merged, by dynaconf. dynaconf thus never sees a string: it has nothing to evaluate
(``@format``, ``@jinja``, ``@read_file``), no list to concatenate, and its own loaders, which would read the
host's ``*_FOR_DYNACONF`` and ``DYNACONF_*`` variables, never run.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol, TypeAlias

from ..errors import ConfigError, UsageError
from ..units import shown
from .registry import BY_NAME, KEYS, PLUGINS, PREFIX, RELATIONS, Key, variable
from .values import (
    AmstSettings,
    CongestionSettings,
    FileSettings,
    LimitSettings,
    ModeSettings,
    SecuritySettings,
    Settings,
    TransportSettings,
)

OVERRIDE: Final = "--set"
"""What faults in ``overrides`` give as their source."""

DEFAULT: Final = "default"
"""The source of what nobody has set."""

_SUFFIXES: Final = (".yaml", ".yml", ".toml")
_SECTIONS: Final = frozenset(
    part for key in KEYS for part in (key.section.partition(".")[0], key.section)
) | {PLUGINS}  # fmt: skip
_DEPTH: Final = 8
"""Levels of nesting that plugin options may have; a structure that contains itself ends here."""
_NODES: Final = 10_000
"""Values a YAML file may hold once its aliases are followed: ten lines of them can stand for billions."""

_YAML_KINDS: Final = frozenset({"map", "seq", "str", "int", "float", "bool", "null", "timestamp"})
_TOML_TABLE: Final = re.compile(r"\s*\[\[?([^\[\]#=]+)\]\]?")
_TOML_ENTRY: Final = re.compile(r"\s*([^\[\]#={}]+?)\s*=")
_LINE: Final = re.compile(r"line (\d+)")


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with the settings.

    ``key`` is the dotted name, empty when a whole file is meant; ``value`` what was given, None when that is
    not the point; ``source`` is ``file:line``, an environment variable, ``--set`` or ``default``.
    """

    key: str
    value: object
    source: str
    message: str

    def __str__(self) -> str:
        given = "" if self.value is None else f" = {shown(self.value)}"
        return f"{self.source}: {self.key}{given}: {self.message}" if self.key else f"{self.source}: {self.message}"


class SettingsError(ConfigError):
    """Everything that is wrong with the settings, of all sources at once, as ``faults``."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        lines = [str(fault) for fault in self.faults]
        if len(lines) > 1:
            lines.insert(0, f"{len(lines)} faults in the settings:")
        super().__init__("\n  ".join(lines))


@dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """A checked value and where it came from, opaque to dynaconf; ``follows`` is the setting that moved a default."""

    value: object
    source: str
    follows: str = ""


Tree: TypeAlias = dict[str, Any]
"""Leaves by section, nested."""


class _Store(Protocol):
    """What is used of a ``dynaconf.base.Settings``."""

    def get(self, key: str) -> Any: ...

    def update(
        self, data: Tree, *, loader_identifier: str, merge: bool, dotted_lookup: bool, validate: bool
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class _Given:
    """A value as a source has it, not yet checked. ``text``: the source knows no types, a string may be a number."""

    path: tuple[str, ...]
    value: object
    source: str
    text: bool = False

    @property
    def name(self) -> str:
        return ".".join(self.path)


def load_settings(
    *,
    files: Sequence[Path | str] = (),
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Load, check and freeze the settings: defaults, then ``files``, then ``environ``, then ``overrides``.

    ``files`` are YAML or TOML by suffix; ``overrides`` maps dotted keys to values or strings (``--set``, keyword
    arguments); ``environ`` is ``os.environ`` unless given. Nothing global is read or kept beyond that. Any thread.

    Raises:
        SettingsError: lists every fault of every source.
    """
    leaves, plugins = resolve(files=files, overrides=overrides, environ=environ)
    return _build({name: leaf.value for name, leaf in leaves.items()}, _thaw(plugins))


def resolve(
    *,
    files: Sequence[Path | str] = (),
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> tuple[dict[str, Leaf], Tree]:
    """The values in force with their sources, as `load_settings` finds them, and the tree of the plugins' options.

    Raises:
        SettingsError: lists every fault of every source.
    """
    faults: list[Fault] = []
    store = _new_store()
    layer: Tree = {}
    for key in KEYS:
        _put(layer, key.name.split("."), Leaf(key.default, DEFAULT))
    _merge(store, layer, DEFAULT)
    for name, source in (
        *((os.fspath(file), _from_file(file, faults)) for file in files),
        ("environment", _from_environ(os.environ if environ is None else environ)),
        (OVERRIDE, _from_overrides({} if overrides is None else overrides)),
    ):
        layer = {}
        for given in source:
            fault = _take(layer, given)
            if fault is not None:
                faults.append(fault)
        _merge(store, layer, name)
    leaves = {key.name: _leaf(store, key) for key in KEYS}
    faults += _relate(leaves, {fault.key for fault in faults})
    if faults:
        raise SettingsError(faults)
    return leaves, store.get(PLUGINS) or {}


def check_file(path: Path | str) -> None:
    """Check one settings file by itself, over the defaults, without the environment.

    Raises:
        SettingsError: lists every fault of the file.
    """
    load_settings(files=[path], environ={})


# ---- reading the sources -------------------------------------------------------------------


def _from_file(file: Path | str, faults: list[Fault]) -> Iterator[_Given]:
    where = os.fspath(file)
    if not where.endswith(_SUFFIXES):
        faults.append(Fault("", None, where, "not a settings file: its name must end in " + ", ".join(_SUFFIXES)))
        return
    try:
        text = Path(where).read_bytes().decode("utf-8-sig")
        tree, lines = _read_toml(text) if where.endswith(".toml") else _read_yaml(text)
    except OSError as err:
        faults.append(Fault("", None, where, f"cannot read the settings file: {err.strerror or err}"))
    except RecursionError:
        faults.append(Fault("", None, where, "the settings file is nested too deeply"))
    except UnicodeDecodeError as err:
        line = err.object.count(b"\n", 0, err.start) + 1
        faults.append(Fault("", None, f"{where}:{line}", "the settings file is not UTF-8 text"))
    except ValueError as err:  # a syntax error; also a NUL in the path
        line_of_fault = _LINE.search(str(err))
        at = f"{where}:{line_of_fault[1]}" if line_of_fault else where
        faults.append(Fault("", None, at, f"not a valid settings file: {err}"))
    else:
        for path, value in _walk(tree, ()):
            line_number = _line_of(path, lines)
            yield _Given(path, value, f"{where}:{line_number}" if line_number else where)


def _from_environ(environ: Mapping[str, str]) -> Iterator[_Given]:
    for name in sorted(environ):
        rest = name.removeprefix(PREFIX)
        # One underscore is for the command line's own variables (AMST_TOKEN, AMST_STATE_DIR, AMST_CONFIG).
        if rest != name and "__" in rest:
            yield _Given(tuple(rest.lower().split("__")), environ[name], name, text=True)


def _from_overrides(overrides: Mapping[str, object]) -> Iterator[_Given]:
    for path, value in _walk(overrides, ()):
        yield _Given(path, value, OVERRIDE, text=True)


def _walk(tree: Mapping[Any, object], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], object]]:
    """Every value below ``tree`` with its path, in lower case. Sections that hold nothing yield nothing."""
    options = path[:1] == (PLUGINS,) and len(path) > 1
    for raw, value in tree.items():
        name = str(raw).lower()
        # A dotted name is a path (limits.memory), but a plugin's option may have a dot in its name.
        inner = (*path, name) if options else (*path, *name.split("."))
        plugin = inner[0] == PLUGINS
        section = len(inner) == 2 if plugin and len(inner) > 1 else ".".join(inner) in _SECTIONS
        if isinstance(value, Mapping) and (section or (plugin and value and len(inner) < _DEPTH)):
            yield from _walk(value, inner)
        elif not section or value is not None:
            yield inner, value


def _read_toml(text: str) -> tuple[Mapping[str, object], Mapping[str, int]]:
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as err:
        last = text.count("\n") + (not text.endswith("\n"))
        raise ValueError(str(err).replace("at end of document", f"at line {last}, the end")) from err
    # tomllib keeps no positions, so look for the names; inside a multi-line string this may be fooled.
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.split("\n"), start=1):
        if header := _TOML_TABLE.match(line):
            table = _toml_name(header[1])
            lines.setdefault(table, number)
        elif entry := _TOML_ENTRY.match(line):
            name = _toml_name(entry[1])
            lines.setdefault(f"{table}.{name}" if table else name, number)
    return tree, lines


def _toml_name(text: str) -> str:
    return ".".join(part.strip().strip("\"'").lower() for part in text.split("."))


def _read_yaml(text: str) -> tuple[Mapping[str, object], Mapping[str, int]]:
    # The parser that dynaconf brings along: its nodes know their lines. Untyped, hence import_module.
    yaml = importlib.import_module("dynaconf.vendor.ruamel.yaml")
    lines: dict[str, int] = {}
    left = _NODES
    loader: Any = None

    def plain(node: Any, path: str) -> object:
        nonlocal left
        left -= 1
        line = node.start_mark.line + 1
        if left < 0:
            raise ValueError(f"it holds more than {_NODES} values")
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind not in _YAML_KINDS:
            raise ValueError(f"tags ({node.tag}) are not supported, line {line}")
        if isinstance(node, yaml.MappingNode):
            tree: dict[str, object] = {}
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
                    problem = "the name of a setting is text, and merge keys (<<) are not supported"
                    raise ValueError(f"{problem}, line {key.start_mark.line + 1}")
                name = f"{path}.{key.value.lower()}" if path else key.value.lower()
                lines[name] = key.start_mark.line + 1
                tree[key.value] = plain(value, name)
            return tree
        if isinstance(node, yaml.SequenceNode):
            return [plain(item, path) for item in node.value]
        if kind in ("str", "timestamp"):
            return node.value
        try:
            return loader.construct_object(node)
        except (ValueError, LookupError) as err:
            raise ValueError(f"{shown(node.value)} cannot be read as {kind}, line {line}") from err

    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        tree = {} if root is None else plain(root, "") or {}
    except yaml.error.MarkedYAMLError as err:
        line = f", line {err.problem_mark.line + 1}" if err.problem_mark else ""
        raise ValueError(f"{err.problem or err.context}{line}") from err
    except (yaml.error.YAMLError, Warning) as err:
        raise ValueError(str(err)) from err
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(tree, dict):
        raise ValueError("it must be a mapping of sections (limits:, transport:, ...), line 1")
    return tree, lines


def _line_of(path: tuple[str, ...], lines: Mapping[str, int]) -> int | None:
    """The line of ``path``, or of the nearest enclosing name that was found (inline tables)."""
    for length in range(len(path), 0, -1):
        line = lines.get(".".join(path[:length]))
        if line is not None:
            return line
    return None


# ---- checking ------------------------------------------------------------------------------


def _take(layer: Tree, given: _Given) -> Fault | None:
    """Check one value and put it into its source's layer; the fault if it cannot be used."""
    key = BY_NAME.get(given.name)
    if key is not None:
        try:
            value = key.parse(given.value)
        except UsageError as err:
            problem = f"has no value; it {err}" if given.value is None else str(err)
            return Fault(given.name, given.value, given.source, problem)
        _put(layer, given.path, Leaf(value, given.source))
        return None
    if given.path[0] != PLUGINS:
        return Fault(given.name, given.value, given.source, _unknown(given))
    try:
        _check_plugin(given.path)
        _put(layer, given.path, Leaf(_freeze(_scalar(given), _DEPTH), given.source))
    except UsageError as err:
        return Fault(given.name, given.value, given.source, str(err))
    return None


def _unknown(given: _Given) -> str:
    if given.name in _SECTIONS:
        return "is a section, not a setting; it holds " + ", ".join(
            key.name for key in KEYS if key.name.startswith(given.name + ".")
        )
    for length in range(1, len(given.path)):
        above = BY_NAME.get(".".join(given.path[:length]))
        if above is not None:
            return f"{above.name} is a setting, not a section; it must be {above.allowed}"
    # The right name in the wrong section (max_message at the top level) comes before a similar name.
    near = [name for name in BY_NAME if name.rpartition(".")[2] == given.path[-1]][:1]
    if not near:
        names = sorted(_SECTIONS) if isinstance(given.value, Mapping) else BY_NAME
        near = difflib.get_close_matches(given.name, names, n=1)
    if not near:
        return "unknown setting; docs/configuration.md lists them all"
    spelled = variable(near[0]) if given.source.startswith(PREFIX) else near[0]
    return f"unknown setting; did you mean {spelled}?"


def _check_plugin(path: tuple[str, ...]) -> None:
    if len(path) < 3 or not all(path):
        raise UsageError(f"options of a plugin are {PLUGINS}.<name>.<option>")
    if any(part.startswith("dynaconf_") for part in path):
        raise UsageError("names that begin with dynaconf_ are reserved")


def _scalar(given: _Given) -> object:
    """A plugin's option from a variable or ``--set``: a number or truth value if TOML would read one, else text."""
    text = given.value
    if not given.text or not isinstance(text, str) or not re.fullmatch(r"true|false|[+-]?[0-9][\w.+-]*", text):
        return text
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float) else text


def _relate(leaves: dict[str, Leaf], faulty: Set[str]) -> Iterator[Fault]:
    """Hold the values against each other; defaults that yield are moved in ``leaves``."""
    for relation in RELATIONS:
        if relation.small in faulty or relation.large in faulty:
            continue
        small, large = leaves[relation.small], leaves[relation.large]
        if _number(small) * relation.share <= _number(large):
            continue
        if relation.yields == relation.small and small.source == DEFAULT:
            leaves[relation.small] = Leaf(int(_number(large)) // relation.share, DEFAULT, relation.large)
        elif relation.yields == relation.large and large.source == DEFAULT:
            leaves[relation.large] = Leaf(int(_number(small)) * relation.share, DEFAULT, relation.small)
        else:
            key, other = BY_NAME[relation.small], BY_NAME[relation.large]
            part = "" if relation.share == 1 else f"1/{relation.share} of "
            limit = f"{part}{other.name}, which is {other.show(_number(large))} ({large.source})"
            yield Fault(key.name, key.show(_number(small)), small.source, f"must be at most {limit}")


def _number(leaf: Leaf) -> int | float:
    assert isinstance(leaf.value, int | float)
    return leaf.value


# ---- merging and freezing ------------------------------------------------------------------


def _new_store() -> _Store:
    """An empty dynaconf store that reads nothing by itself."""
    try:
        # Imported here because it takes 130 ms. `Settings` and not `Dynaconf`, which may read a .env file.
        base = importlib.import_module("dynaconf.base")
    except Exception as err:  # it reads the host's variables when imported, and fails on bad ones as it happens
        message = f"dynaconf cannot be imported ({err}); are there *_FOR_DYNACONF variables that should not be?"
        raise SettingsError([Fault("", None, "environment", message)]) from err
    store: _Store = base.Settings(dynaconf_skip_loaders=True, dynaconf_skip_validators=True)
    return store


def _merge(store: _Store, layer: Tree, source: str) -> None:
    store.update(layer, loader_identifier=source, merge=True, dotted_lookup=False, validate=False)


def _put(layer: Tree, path: Sequence[str], leaf: Leaf) -> None:
    node = layer
    for part in path[:-1]:
        inner = node.get(part)
        if not isinstance(inner, dict):
            inner = node[part] = {}
        node = inner
    node[path[-1]] = leaf


def _leaf(store: _Store, key: Key) -> Leaf:
    node = store.get(key.name.split(".")[0])
    for part in key.name.split(".")[1:]:
        node = node[part]
    assert isinstance(node, Leaf)
    return node


def _thaw(node: Any) -> Any:
    """dynaconf's tree as read-only plain mappings."""
    if isinstance(node, dict):
        return MappingProxyType({name: _thaw(inner) for name, inner in node.items()})
    return node.value


def _freeze(value: object, depth: int) -> object:
    if depth == 0:
        raise UsageError(f"is nested more than {_DEPTH} levels deep")
    if isinstance(value, Mapping):
        return MappingProxyType({str(name): _freeze(inner, depth - 1) for name, inner in value.items()})
    if isinstance(value, list | tuple):
        return tuple(_freeze(inner, depth - 1) for inner in value)
    return value


def _build(values: Mapping[str, object], plugins: Mapping[str, Mapping[str, object]]) -> Settings:
    def section(name: str) -> dict[str, Any]:
        return {key.field: values[key.name] for key in KEYS if key.section == name}

    return Settings(
        transport=TransportSettings(
            amst=AmstSettings(**section("transport.amst")), modes=ModeSettings(**section("transport.modes"))
        ),
        congestion=CongestionSettings(**section("congestion")),
        security=SecuritySettings(**section("security")),
        limits=LimitSettings(**section("limits")),
        files=FileSettings(**section("files")),
        plugins=plugins,
    )
