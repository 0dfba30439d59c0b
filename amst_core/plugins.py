"""stevedore finds and imports a plugin, pluggy checks and calls it; nothing else in the core touches either.

Listing plugins reads metadata only. A plugin is imported when it is first asked for, and whatever goes
wrong with it is a `PluginError` that names it and says what to do.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, cast

import pluggy
from stevedore.extension import ExtensionManager, error_on_conflict
from stevedore.named import NamedExtensionManager

from . import hookspecs
from .errors import AmstError, ConfigError, PluginError, UsageError
from .interfaces import API_VERSION, CongestionController, MetricsExporter, ModeDetector, Transport

_log = logging.getLogger("amst.plugins")


@dataclass(frozen=True, slots=True)
class _Kind:
    """What the plugins of one entry-point group are for."""

    noun: str
    hook: str
    makes: type[object]


_KINDS: Final[Mapping[str, _Kind]] = {
    "amst.transport": _Kind("transport", "amst_make_transport", Transport),
    "amst.congestion": _Kind("congestion control", "amst_make_controller", CongestionController),
    "amst.mode": _Kind("mode detector", "amst_make_detector", ModeDetector),
    "amst.metrics": _Kind("metrics exporter", "amst_make_exporter", MetricsExporter),
}

GROUPS: Final = tuple(_KINDS)
"""The entry-point groups that plugins are found in."""

FIRST_PARTY: Final[Mapping[tuple[str, str], str]] = {
    ("amst.transport", "tcp"): "amst-tcp",
    ("amst.congestion", "bbr"): "amst-cc-bbr",
    ("amst.congestion", "cubic"): "amst-cc-cubic",
}
"""Which of this project's own distributions provides which plugin, for the advice in error messages."""

_PREFIX: Final = f"{hookspecs.PROJECT}_"
_CHECK_MSS: Final = 1460


@dataclass(frozen=True, slots=True)
class Installed:
    """A plugin as its distribution advertises it; nothing of it has been imported.

    ``conflict`` is true when another advertisement in the same group has the same name: neither is used.
    """

    group: str
    name: str
    target: str
    dist: str
    version: str
    conflict: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """What `Plugins.check` found out about one installed plugin; ``error`` is None when it works."""

    plugin: Installed
    error: AmstError | None

    @property
    def ok(self) -> bool:
        """Whether the plugin could be used."""
        return self.error is None


def installed() -> list[Installed]:
    """List every advertised plugin, by group and name, importing none of them."""
    return [row for row, _ in _advertised()]


def _advertised() -> list[tuple[Installed, importlib.metadata.EntryPoint]]:
    rows = [
        (Installed(point.group, point.name, point.value, dist, version), point)
        for dist, version, points in _distributions()
        for point in points
    ]
    names = [(row.group, row.name) for row, _ in rows]
    rows = [
        (replace(row, conflict=True) if names.count((row.group, row.name)) > 1 else row, point) for row, point in rows
    ]
    return sorted(rows, key=lambda pair: (GROUPS.index(pair[0].group), pair[0].name, pair[0].dist))


def _distributions() -> Iterator[tuple[str, str, list[importlib.metadata.EntryPoint]]]:
    """Name, version and plugins of every distribution that has some; of two with one name the first counts.

    Not `importlib.metadata.entry_points`: there one unreadable entry_points.txt hides all the others.
    """
    seen: set[str] = set()
    for dist in importlib.metadata.distributions():
        try:
            points = [point for point in dist.entry_points if point.group in _KINDS]
            if not points:
                continue
            name, version = dist.metadata["Name"], dist.version
            key = re.sub(r"[-_.]+", "-", name).lower()
        except Exception as err:
            _log.warning("a distribution in %s has unreadable metadata, ignored: %r", dist.locate_file(""), err)
            continue
        if key not in seen:
            seen.add(key)
            yield name, version, points


class _Finder(NamedExtensionManager[object]):
    """stevedore's loading by name, over entry points read just now.

    stevedore itself would take them from a cache, one per process and one on disk under HOME, whose coarse
    time stamps miss a re-install.
    """

    def __init__(self, group: str, name: str, points: Sequence[importlib.metadata.EntryPoint]) -> None:
        self.failures: list[BaseException] = []
        self._points = [point for point in points if point.group == group]
        super().__init__(
            group,
            [name],
            on_load_failure_callback=self._failed,
            on_missing_entrypoints_callback=None,
            conflict_resolver=error_on_conflict,
        )

    def list_entry_points(self) -> list[importlib.metadata.EntryPoint]:
        return self._points

    def _failed(
        self, manager: ExtensionManager[object], point: importlib.metadata.EntryPoint, error: BaseException
    ) -> None:
        self.failures.append(error)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A registered plugin object, and in words which one it is and how to replace it."""

    plugin: object
    label: str
    dist: str | None

    @property
    def upgrade(self) -> str:
        return f"run: pip install --upgrade {self.dist}" if self.dist else "update the code that registers it"


class Plugins:
    """The plugins in use by one owner (a session, a server, a test); nothing is shared between two objects.

    Thread rules: any thread may call any method.
    """

    def __init__(self) -> None:
        self._hooks = pluggy.PluginManager(hookspecs.PROJECT)
        self._hooks.add_hookspecs(hookspecs)
        self._loaded: dict[tuple[str, str], _Loaded] = {}
        self._complained: set[tuple[object, str]] = set()
        self._lock = threading.RLock()

    def names(self, group: str) -> list[str]:
        """Names that can be asked for in ``group``: installed or registered, none imported for this."""
        _kind(group)
        with self._lock:
            registered = {name for where, name in self._loaded if where == group}
        return sorted(registered | {row.name for row in installed() if row.group == group})

    def transport(self, name: str, options: Mapping[str, object]) -> Transport:
        """Make the transport called ``name``, loading its plugin if need be.

        Raises:
            PluginError: the plugin is missing, broken, in conflict or speaks another API version.
            ConfigError: the plugin refuses ``options``.
        """
        return cast(Transport, self._make("amst.transport", name, options=options))

    def controller(self, name: str, options: Mapping[str, object], *, mss: int) -> CongestionController:
        """Make a congestion controller for a path whose segments carry ``mss`` bytes; raises as `transport`."""
        return cast(CongestionController, self._make("amst.congestion", name, options=options, mss=mss))

    def detector(self, name: str, options: Mapping[str, object]) -> ModeDetector:
        """Make the mode detector called ``name``; raises as `transport`."""
        return cast(ModeDetector, self._make("amst.mode", name, options=options))

    def exporter(self, name: str, options: Mapping[str, object]) -> MetricsExporter:
        """Make the metrics exporter called ``name``, not yet started; raises as `transport`."""
        return cast(MetricsExporter, self._make("amst.metrics", name, options=options))

    def register(self, plugin: object, group: str, name: str) -> None:
        """Use ``plugin``, a module or object with hooks, under ``name`` whatever is installed (embedding, tests).

        Raises:
            PluginError: it implements its hooks wrongly, or the name is already in use in this object.
        """
        label = f"{_kind(group).noun} plugin {name!r} (registered by the application)"
        with self._lock:
            if (group, name) in self._loaded:
                raise PluginError(f"{label} cannot be added: that name is already in use; choose another")
            self._add(_Loaded(plugin, label, None), group, name)

    def notify(self, hook: str, **arguments: object) -> None:
        """Tell every loaded plugin that implements ``hook`` (``amst_session_opened`` and its like).

        Each is guarded by itself. The first failure of a plugin in a hook is logged with its traceback, later
        ones of the same kind at DEBUG; none of them reaches the caller or the other plugins.

        Raises:
            UsageError: no such observer hook, or other arguments than those in its spec.
        """
        caller = getattr(self._hooks.hook, hook, None)
        if caller is None or caller.spec is None or caller.spec.opts["firstresult"]:
            raise UsageError(f"{hook!r} is no observer hook; amst_core/hookspecs.py lists them")
        if set(caller.spec.argnames) != set(arguments):
            raise UsageError(f"{hook} takes {', '.join(caller.spec.argnames)}, not {', '.join(arguments)}")
        for impl in caller.get_hookimpls():
            try:
                self._only(impl.plugin, hook)(**arguments)
            except KeyboardInterrupt:
                raise
            except BaseException as err:
                self._complain(impl.plugin, impl.plugin_name, hook, err)

    @staticmethod
    def check() -> list[Report]:
        """Try every installed plugin: import it, check its hooks, make one object with no options, close it.

        Works on a manager of its own, so nothing that is loaded here becomes an observer elsewhere. A plugin
        that refuses to be made without options counts as working.
        """
        scratch = Plugins()
        return [Report(row, scratch._trial(row)) for row in installed()]

    def _trial(self, row: Installed) -> AmstError | None:
        more = {"mss": _CHECK_MSS} if row.group == "amst.congestion" else {}
        try:
            made = self._make(row.group, row.name, options={}, **more)
        except ConfigError:
            return None
        except AmstError as err:
            return err
        try:
            if isinstance(made, Transport):
                made.close()
            elif isinstance(made, MetricsExporter):
                made.stop()
        except KeyboardInterrupt:
            raise
        except BaseException as err:
            return PluginError(f"{_label(row)} failed while it was closed unused: {_words(err)}")
        return None

    def _make(self, group: str, name: str, **arguments: object) -> object:
        kind = _kind(group)
        loaded = self._load(group, name)
        try:
            made = self._only(loaded.plugin, kind.hook)(name=name, **arguments)
        except (AmstError, KeyboardInterrupt):
            raise
        except BaseException as err:
            raise PluginError(f"{loaded.label} failed in {kind.hook}: {_words(err)}; {loaded.upgrade}") from err
        if made is None:
            raise PluginError(
                f"{loaded.label} is installed, but its {kind.hook} returned None for {name!r}; "
                f"its author must name the entry point as the hook expects; {loaded.upgrade}"
            )
        if not isinstance(made, kind.makes):
            raise PluginError(
                f"{loaded.label} returned a {type(made).__name__} from {kind.hook}, not a {kind.makes.__name__}; "
                f"its author must subclass amst_core.interfaces.{kind.makes.__name__}; {loaded.upgrade}"
            )
        _check_identity(loaded, kind, made, name)
        return made

    def _load(self, group: str, name: str) -> _Loaded:
        with self._lock:
            known = self._loaded.get((group, name))
            if known is not None:
                return known
            found = _advertised()
            rows = [row for row, _ in found if (row.group, row.name) == (group, name)]
            if not rows:
                raise _missing(group, name, sorted({row.name for row, _ in found if row.group == group}))
            if len(rows) > 1:
                raise _conflict(rows)
            plugin = _import(rows[0], [point for _, point in found])
            return self._add(_Loaded(plugin, _label(rows[0]), rows[0].dist), group, name)

    def _add(self, loaded: _Loaded, group: str, name: str) -> _Loaded:
        """Register with pluggy as ``group:name``, unless the same module already is under another name."""
        plugin, key = loaded.plugin, f"{group}:{name}"
        if not self._hooks.is_registered(plugin):
            try:
                self._validate(plugin)
                self._hooks.register(plugin, key)
                self._hooks.check_pending()
            except Exception as err:
                if self._hooks.has_plugin(key):
                    self._hooks.unregister(name=key)
                words = " ".join(str(err).split())
                raise PluginError(f"{loaded.label} is refused: {words}; {loaded.upgrade}") from err
        hook = _kind(group).hook
        if not any(impl.plugin is plugin for impl in getattr(self._hooks.hook, hook).get_hookimpls()):
            if self._hooks.get_plugin(key) is plugin:
                self._hooks.unregister(name=key)
            raise PluginError(f"{loaded.label} is refused: it implements no {hook}; {loaded.upgrade}")
        self._loaded[group, name] = loaded
        return loaded

    def _validate(self, plugin: object) -> None:
        """Refuse what pluggy would accept and then never call, or call wrongly."""
        hash(plugin)
        for name in dir(plugin):
            if self._hooks.parse_hookimpl_opts(plugin, name) is None:
                if name.startswith(_PREFIX) and inspect.isroutine(getattr(plugin, name)):
                    raise TypeError(f"{name} is not marked with amst_core.hookspecs.hookimpl")
                continue
            implementation = getattr(plugin, name)
            if inspect.iscoroutinefunction(implementation):
                raise TypeError(f"{name} is a coroutine function, but hooks are synchronous")
            for parameter in inspect.signature(implementation).parameters.values():
                if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
                    raise TypeError(f"{name} takes {parameter.name!r} by keyword only, but pluggy calls by position")

    def _only(self, plugin: object, hook: str) -> pluggy.HookCaller:
        """The hook as if ``plugin`` were alone, so that no other plugin can answer for it or fail it."""
        others = [other for _, other in self._hooks.list_name_plugin() if other is not plugin]
        return self._hooks.subset_hook_caller(hook, others)

    def _complain(self, plugin: object, name: str, hook: str, err: BaseException) -> None:
        with self._lock:
            first = (plugin, hook) not in self._complained
            self._complained.add((plugin, hook))
        level = logging.ERROR if first else logging.DEBUG
        _log.log(level, "plugin %s failed in %s, ignored: %s", name, hook, _words(err), exc_info=err)


def _kind(group: str) -> _Kind:
    try:
        return _KINDS[group]
    except KeyError:
        raise UsageError(f"no plugin group {group!r}; the groups are {', '.join(GROUPS)}") from None


def _import(row: Installed, points: Sequence[importlib.metadata.EntryPoint]) -> object:
    cause: BaseException | None = None
    try:
        found = _Finder(row.group, row.name, points)
        cause = found.failures[0] if found.failures else None
    except KeyboardInterrupt:
        raise
    except BaseException as err:  # stevedore lets a plugin's SystemExit and AssertionError through
        cause = err
    if cause is not None:
        raise PluginError(
            f"{_label(row)} failed to import {row.target}: {_words(cause)}; "
            f"reinstall it with what it needs (pip install --force-reinstall {row.dist}) "
            f"or remove it (pip uninstall {row.dist})"
        ) from cause
    return found[row.name].plugin


def _label(row: Installed) -> str:
    return f"{_kind(row.group).noun} plugin {row.name!r} ({row.dist} {row.version})"


def _words(err: BaseException) -> str:
    return f"{type(err).__name__}: {err}" if str(err) else type(err).__name__


def how_to_get(group: str, name: str) -> str:
    """The end of a message about a plugin that is not installed: how to install it, empty where it is none of ours."""
    distribution = FIRST_PARTY.get((group, name))
    return f"; pip install {distribution}" if distribution else ""


def _missing(group: str, name: str, have: Sequence[str]) -> PluginError:
    message = f"no {_kind(group).noun} plugin {name!r} is installed (installed: {', '.join(have) or 'none'})"
    dist = FIRST_PARTY.get((group, name))
    if dist is not None:
        return PluginError(f"{message}; run: pip install {dist}")
    ours = [f"{known} (pip install {dist})" for (where, known), dist in FIRST_PARTY.items() if where == group]
    other = ", or use one of those" if have else f", or use {ours[0]}" if ours else ""
    return PluginError(f"{message}; install the distribution that provides it{other}")


def _conflict(rows: Sequence[Installed]) -> PluginError:
    claims = " and ".join(f"{row.dist} {row.version} ({row.target})" for row in rows)
    removal = " or ".join(sorted({row.dist for row in rows}))
    return PluginError(
        f"{_kind(rows[0].group).noun} plugin {rows[0].name!r} is claimed by {claims}; neither is used; "
        f"uninstall one: pip uninstall {removal}"
    )


def _check_identity(loaded: _Loaded, kind: _Kind, made: object, name: str) -> None:
    speaks = getattr(made, "api_version", None)
    if speaks != API_VERSION:
        newer = isinstance(speaks, int) and speaks > API_VERSION
        raise PluginError(
            f"{loaded.label} speaks plugin API version {speaks}, this amst-core speaks {API_VERSION}; "
            + ("run: pip install --upgrade amst-core" if newer else loaded.upgrade)
        )
    called = getattr(made, "name", None)
    if called != name:
        raise PluginError(
            f"{loaded.label} made a {kind.makes.__name__} that calls itself {called!r}, not {name!r}; {loaded.upgrade}"
        )
