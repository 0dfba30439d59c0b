"""Registering, validating and calling plugins that are handed over as objects."""

from __future__ import annotations

import inspect
import logging
import re
import tomllib
import types
from pathlib import Path

import pytest

from amst_core import hookspecs
from amst_core.errors import ConfigError, PluginError, UsageError
from amst_core.hookspecs import hookimpl
from amst_core.interfaces import (
    Candidate,
    CongestionController,
    MetricsExporter,
    Mode,
    ModeDecision,
    ModeDetector,
    Transport,
)
from amst_core.plugins import GROUPS, Plugins

SPECS = {
    name: list(inspect.signature(function).parameters)
    for name, function in inspect.getmembers(hookspecs, inspect.isfunction)
    if name.startswith("amst_")
}


class FakeTransport(Transport):
    name = "fake"

    def probe(self, peer):
        return Candidate(self.name, True, "always")

    def advertise(self, tag, deliver):
        raise AssertionError("not advertised in these tests")

    def connect(self, request, timeouts):
        raise AssertionError("not connected in these tests")

    def close(self):
        pass


class FakeController(CongestionController):
    name = "fake"
    window = 10
    pacing_rate = None

    def __init__(self, mss):
        self.mss = mss

    def on_sent(self, *, now, size, in_flight, app_limited):
        pass

    def on_ack(self, sample):
        pass

    def on_loss(self, *, now, sent_at, lost, in_flight, persistent):
        pass

    def state(self):
        return {}


class FakeDetector(ModeDetector):
    name = "fake"

    def update(self, sample, *, now):
        return ModeDecision(Mode.DATACENTER, 1, "always")


class FakeExporter(MetricsExporter):
    name = "fake"

    def start(self, source):
        return "nowhere"

    def stop(self):
        pass


class All:
    """One plugin that makes everything."""

    @hookimpl
    def amst_make_transport(self, name, options):
        return FakeTransport()

    @hookimpl
    def amst_make_controller(self, name, options, mss):
        return FakeController(mss)

    @hookimpl
    def amst_make_detector(self, name):
        return FakeDetector()

    @hookimpl
    def amst_make_exporter(self, name, options):
        return FakeExporter()


def maker(result):
    class Maker:
        @hookimpl
        def amst_make_transport(self, name, options):
            if isinstance(result, BaseException):
                raise result
            return result

    return Maker()


def refused(plugin) -> str:
    plugins = Plugins()
    with pytest.raises(PluginError) as caught:
        plugins.register(plugin, "amst.transport", "bad")
    assert str(caught.value).startswith("transport plugin 'bad' (registered by the application) is refused: ")
    plugins.register(maker(FakeTransport()), "amst.transport", "fake")
    assert plugins.transport("fake", {}).name == "fake", "a refused plugin left something behind"
    return str(caught.value)


def test_each_group_makes_its_kind_from_one_plugin():
    plugins, plugin = Plugins(), All()
    for group in GROUPS:
        plugins.register(plugin, group, "fake")
        assert "fake" in plugins.names(group)
    assert isinstance(plugins.transport("fake", {}), FakeTransport)
    controller = plugins.controller("fake", {}, mss=1448)
    assert isinstance(controller, FakeController)
    assert controller.mss == 1448
    assert isinstance(plugins.detector("fake", {}), FakeDetector)
    assert isinstance(plugins.exporter("fake", {}), FakeExporter)


def test_two_objects_share_nothing():
    one, two = Plugins(), Plugins()
    one.register(maker(FakeTransport()), "amst.transport", "fake")
    assert "fake" not in two.names("amst.transport")
    with pytest.raises(PluginError, match="no transport plugin 'fake' is installed"):
        two.transport("fake", {})
    assert one.transport("fake", {}).name == "fake"


def test_a_name_is_registered_once():
    plugins = Plugins()
    plugins.register(maker(None), "amst.transport", "fake")
    with pytest.raises(PluginError, match="that name is already in use"):
        plugins.register(maker(None), "amst.transport", "fake")


def test_an_unknown_group_is_a_usage_error():
    with pytest.raises(UsageError, match=r"no plugin group 'amst\.sink'; the groups are amst\.transport, "):
        Plugins().names("amst.sink")


def test_a_misspelt_hook_is_refused():
    class Plugin:
        @hookimpl
        def amst_make_transprot(self, name): ...

    assert "unknown hook 'amst_make_transprot'" in refused(Plugin())


def test_an_unknown_argument_is_refused():
    class Plugin:
        @hookimpl
        def amst_session_opened(self, nope): ...

    assert "'nope'" in refused(Plugin())


def test_a_keyword_only_argument_is_refused():
    class Plugin:
        @hookimpl
        def amst_make_transport(self, *, name): ...

    assert "takes 'name' by keyword only" in refused(Plugin())


def test_a_hook_without_its_mark_is_refused():
    module = types.ModuleType("plugin")
    module.amst_make_transport = lambda name, options: None  # type: ignore[attr-defined]
    assert "amst_make_transport is not marked with amst_core.hookspecs.hookimpl" in refused(module)


def test_an_asynchronous_hook_is_refused():
    class Plugin:
        @hookimpl
        async def amst_session_closed(self, session_id): ...

    assert "hooks are synchronous" in refused(Plugin())


def test_a_plugin_without_the_hook_of_its_group_is_refused_and_does_not_observe():
    heard = []

    class Plugin:
        @hookimpl
        def amst_session_closed(self, session_id):
            heard.append(session_id)

    plugins = Plugins()
    with pytest.raises(PluginError, match="is refused: it implements no amst_make_transport; "):
        plugins.register(Plugin(), "amst.transport", "bad")
    plugins.notify("amst_session_closed", session_id="s", error=None)
    assert heard == []


def test_an_unhashable_plugin_is_refused():
    class Plugin(All):
        __hash__ = None  # type: ignore[assignment]

    assert "unhashable" in refused(Plugin())


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (None, "its amst_make_transport returned None for 'fake'"),
        (FakeDetector(), "returned a FakeDetector from amst_make_transport, not a Transport"),
        (RuntimeError("boom"), "failed in amst_make_transport: RuntimeError: boom"),
        (SystemExit(2), "failed in amst_make_transport: SystemExit: 2"),
        (type("Renamed", (FakeTransport,), {"name": "other"})(), "calls itself 'other', not 'fake'"),
        (type("Old", (FakeTransport,), {"api_version": 0})(), "speaks plugin API version 0, this amst-core speaks 1"),
        (type("Odd", (FakeTransport,), {"api_version": "x"})(), "speaks plugin API version x, this amst-core speaks 1"),
    ],
)
def test_what_a_hook_returns_is_checked(result, words):
    plugins = Plugins()
    plugins.register(maker(result), "amst.transport", "fake")
    with pytest.raises(PluginError, match=re.escape(words)) as caught:
        plugins.transport("fake", {})
    assert str(caught.value).startswith("transport plugin 'fake' (registered by the application) ")
    assert str(caught.value).endswith("; update the code that registers it")


def test_a_refusal_of_options_passes_unchanged():
    refusal = ConfigError("plugins.fake.depth must be positive")
    plugins = Plugins()
    plugins.register(maker(refusal), "amst.transport", "fake")
    with pytest.raises(ConfigError) as caught:
        plugins.transport("fake", {"depth": -1})
    assert caught.value is refusal


def test_no_plugin_answers_for_another_or_fails_it():
    plugins = Plugins()
    plugins.register(maker(None), "amst.transport", "fake")
    plugins.register(maker(FakeTransport()), "amst.transport", "greedy")
    plugins.register(maker(RuntimeError("boom")), "amst.transport", "broken")
    with pytest.raises(PluginError, match="returned None for 'fake'"):
        plugins.transport("fake", {})


class Observer(All):
    """Keeps what it was told in a list it shares with others; fails in the hooks named."""

    def __init__(self, tag, told, failing=None):
        self.tag, self.told, self.failing = tag, told, failing or {}

    def hear(self, hook):
        self.told.append((self.tag, hook))
        if hook in self.failing:
            raise self.failing[hook]

    @hookimpl
    def amst_session_opened(self, session_id, peer, transport, mode):
        self.hear("opened")

    @hookimpl
    def amst_session_closed(self, error):
        self.hear("closed")


@pytest.mark.parametrize("failure", [RuntimeError("boom"), SystemExit(3)])
def test_a_failing_observer_stops_nobody_and_is_logged_once(caplog, failure):
    caplog.set_level(logging.INFO, "amst.plugins")
    told: list[tuple[str, str]] = []
    plugins = Plugins()
    for tag in ("first", "broken", "last"):
        failing = {"opened": failure} if tag == "broken" else {}
        plugins.register(Observer(tag, told, failing), "amst.transport", tag)
    for _ in range(2):
        plugins.notify("amst_session_opened", session_id="s", peer="h:1", transport="tcp", mode=Mode.DATACENTER)
    plugins.notify("amst_session_closed", session_id="s", error=None)
    assert told == [
        *[(tag, "opened") for tag in ("first", "broken", "last")] * 2,
        *[(tag, "closed") for tag in ("first", "broken", "last")],
    ]
    records = [r for r in caplog.records if r.name == "amst.plugins"]
    assert [r.getMessage() for r in records] == [
        f"plugin amst.transport:broken failed in amst_session_opened, ignored: {type(failure).__name__}: {failure}"
    ]
    assert records[0].exc_info is not None
    assert records[0].exc_info[1] is failure


def test_the_callers_ctrl_c_is_not_swallowed():
    plugins = Plugins()
    plugins.register(Observer("o", [], {"closed": KeyboardInterrupt()}), "amst.transport", "o")
    with pytest.raises(KeyboardInterrupt):
        plugins.notify("amst_session_closed", session_id="s", error=None)


@pytest.mark.parametrize("hook", ["amst_sesion_opened", "amst_make_transport"])
def test_only_observer_hooks_can_be_notified(hook):
    with pytest.raises(UsageError, match="is no observer hook"):
        Plugins().notify(hook, name="x", options={})


def test_a_notification_has_exactly_the_arguments_of_its_spec():
    with pytest.raises(UsageError, match="amst_session_closed takes session_id, error, not session_id"):
        Plugins().notify("amst_session_closed", session_id="s")


def test_the_contract_names_exactly_these_hooks():
    assert set(SPECS) == {
        "amst_make_transport", "amst_make_controller", "amst_make_detector", "amst_make_exporter",
        "amst_session_opened", "amst_session_closed", "amst_mode_changed",
    }  # fmt: skip
    assert GROUPS == ("amst.transport", "amst.congestion", "amst.mode", "amst.metrics")

GUIDE = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text()


def examples(language):
    return [inspect.cleandoc(text) for text in re.findall(rf"^ *```{language}\n(.*?)^ *```", GUIDE, re.S | re.M)]


def test_the_examples_of_the_guide_work():
    plugin, embedding = examples("python")
    module = types.ModuleType("amst_unix.plugin")
    exec(plugin, vars(module))
    plugins = Plugins()
    plugins.register(module, "amst.transport", "unix")
    (project,) = examples("toml")
    assert tomllib.loads(project)["project"]["entry-points"]["amst.transport"] == {"unix": module.__name__}
    mine = maker(type("Memory", (FakeTransport,), {"name": "memory"})())
    names = {"my_module": mine}
    exec(embedding, names)
    assert names["transport"].name == "memory"


@pytest.mark.parametrize("hook", SPECS)
def test_every_hook_is_typed_and_documented_with_its_arguments(hook):
    function = getattr(hookspecs, hook)
    assert inspect.getdoc(function)
    assert all(p.annotation is not p.empty for p in inspect.signature(function).parameters.values())
    documented = re.findall(rf"^#+ `{hook}\((.*?)\)", GUIDE, re.MULTILINE)
    assert [found.split(", ") for found in documented] == [SPECS[hook]]


def test_the_guide_documents_no_hook_that_does_not_exist():
    assert set(re.findall(r"amst_(?:make|session|mode)_\w+", GUIDE)) == set(SPECS)
    assert all(f"`{group}`" in GUIDE for group in GROUPS)
