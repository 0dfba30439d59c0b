"""Finding and loading installed plugins, with fake distributions in an interpreter of their own."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest

from amst_core.plugins import FIRST_PARTY, Plugins, installed


def test_a_good_plugin_is_listed_and_used(site):
    module = site.transport("amst-good", "good")
    rows, options, same = site.run("""
        plugins = Plugins()
        rows = [[p.group, p.name, p.target, p.dist, p.version, p.conflict] for p in installed() if p.name == "good"]
        made = plugins.transport("good", {"depth": 3})
        show([rows, made.options, "good" in plugins.names("amst.transport") and made.name == "good"])
    """)
    assert rows == [["amst.transport", "good", module, "amst-good", "1.0", False]]
    assert options == {"depth": 3}
    assert same


def test_listing_imports_no_plugin(site):
    site.transport("amst-good", "good")
    site.install("amst-bad", "bad_plugin", "raise SystemExit(3)", {"amst.mode:bad": "bad_plugin"})
    names, imported = site.run("""
        names = [p.name for p in installed()] + Plugins().names("amst.transport") + Plugins().names("amst.mode")
        show([names, [m for m in sys.modules if m.endswith("_plugin") or m.startswith("amst_tcp")]])
    """)
    assert names.count("good") == names.count("bad") == 2
    assert imported == []


def test_only_the_plugin_asked_for_is_imported(site):
    site.transport("amst-good", "good")
    site.transport("amst-other", "other")
    assert site.run("""
        Plugins().transport("good", {})
        show([m for m in sys.modules if m.endswith("_plugin")])
    """) == ["amst_good_plugin"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import no_such_dependency", "ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("assert False, 'not here'", "AssertionError: not here"),
        ("class Odd(BaseException): pass\nraise Odd('odd')", "Odd: odd"),
        ("def broken(:", "SyntaxError: invalid syntax"),
    ],
)
def test_a_failing_import_is_reported_by_name_and_harms_nothing_else(site, source, words):
    site.transport("amst-good", "good")
    site.install("amst-bad", "bad_plugin", source, {"amst.transport:bad": "bad_plugin"})
    first, again, good = site.run("""
        plugins = Plugins()
        ask = lambda: plugins.transport("bad", {})
        show([error(ask), error(ask), plugins.transport("good", {}).name])
    """)
    assert first.startswith("PluginError: transport plugin 'bad' (amst-bad 1.0) failed to import bad_plugin: ")
    assert words in first
    assert "pip install --force-reinstall amst-bad" in first
    assert again == first
    assert good == "good"


def test_ctrl_c_during_an_import_stays_ctrl_c(site):
    site.install("amst-slow", "slow_plugin", "raise KeyboardInterrupt", {"amst.transport:slow": "slow_plugin"})
    assert site.run("""
        try:
            Plugins().transport("slow", {})
        except KeyboardInterrupt:
            show("interrupted")
    """) == "interrupted"


def test_two_distributions_with_one_name_are_a_conflict_and_neither_is_imported(site):
    site.transport("amst-one", "dup")
    site.transport("amst-two", "dup")
    site.transport("amst-good", "good")
    flags, message, imported = site.run("""
        flags = {p.dist: p.conflict for p in installed() if p.dist in ("amst-one", "amst-two", "amst-good")}
        message = error(lambda: Plugins().transport("dup", {}))
        show([flags, message, [m for m in sys.modules if m.endswith("_plugin")]])
    """)
    assert flags == {"amst-one": True, "amst-two": True, "amst-good": False}
    assert message == (
        "PluginError: transport plugin 'dup' is claimed by amst-one 1.0 (amst_one_plugin) and "
        "amst-two 1.0 (amst_two_plugin); neither is used; uninstall one: pip uninstall amst-one or amst-two"
    )
    assert imported == []


def test_one_name_in_two_groups_is_no_conflict(site):
    site.transport("amst-one", "dup")
    site.install("amst-two", "two_plugin", "", {"amst.mode:dup": "two_plugin"})
    assert site.run("""show([p.conflict for p in installed() if p.name == "dup"])""") == [False, False]


def test_a_distribution_installed_twice_counts_once(site, tmp_path):
    site.transport("amst-good", "good")
    second = type(site)(_made(tmp_path / "second"))
    second.transport("Amst.Good", "good")
    assert site.run(f"""
        sys.path.append({str(second.path)!r})
        show([p.dist for p in installed() if p.name == "good"])
    """) == ["amst-good"]


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def test_unreadable_metadata_of_one_distribution_hides_no_other(site):
    site.transport("amst-good", "good")
    site.install("amst-torn", "torn_plugin", "", {}, also="[amst.transport]\nno equals sign here\n")
    names, warned = site.run("""
        seen = []
        class Keep(logging.Handler):
            def emit(self, record):
                seen.append(record.getMessage())
        logging.getLogger("amst.plugins").addHandler(Keep())
        names = [p.name for p in installed()]
        show([names, seen])
    """)
    assert "good" in names
    assert len(warned) == 1
    assert "unreadable metadata" in warned[0]


@pytest.mark.parametrize(("version", "advice"), [(2, "upgrade amst-core"), (0, "upgrade amst-odd")])
def test_another_api_version_says_which_side_to_upgrade(site, version, advice):
    site.transport("amst-odd", "odd", api_version=version)
    message = site.run("""show(error(lambda: Plugins().transport("odd", {})))""")
    assert message.startswith(
        f"PluginError: transport plugin 'odd' (amst-odd 1.0) speaks plugin API version {version}, "
        "this amst-core speaks 1; "
    )
    assert message.endswith(advice)


def test_an_installed_plugin_with_a_wrong_hook_is_refused(site):
    source = """
    from amst_core.hookspecs import hookimpl

    @hookimpl
    def amst_make_transport(name, colour):
        return None
    """
    site.install("amst-bad", "bad_plugin", source, {"amst.transport:bad": "bad_plugin"})
    message = site.run("""show(error(lambda: Plugins().transport("bad", {})))""")
    assert message.startswith("PluginError: transport plugin 'bad' (amst-bad 1.0) is refused: ")
    assert "colour" in message
    assert "pip install --upgrade amst-bad" in message


def test_check_reports_one_row_for_each_and_registers_nothing(site):
    site.transport("amst-good", "good")
    site.transport("amst-old", "old", api_version=0)
    site.transport("amst-one", "dup")
    site.transport("amst-two", "dup")
    site.install("amst-bad", "bad_plugin", "import no_such_dependency", {"amst.mode:bad": "bad_plugin"})
    needy = """
    from amst_core.errors import ConfigError
    from amst_core.hookspecs import hookimpl

    @hookimpl
    def amst_make_exporter(name, options):
        raise ConfigError("plugins.needy.url is missing")
    """
    site.install("amst-needy", "needy_plugin", needy, {"amst.metrics:needy": "needy_plugin"})
    rows, loaded = site.run("""
        plugins = Plugins()
        rows = {r.plugin.dist: [r.ok, str(r.error)] for r in plugins.check()}
        show([rows, [repr(p) for _, p in plugins._hooks.list_name_plugin()]])
    """)
    assert loaded == []
    assert [rows[dist][0] for dist in ("amst-good", "amst-needy")] == [True, True]
    assert [rows[dist][0] for dist in ("amst-old", "amst-one", "amst-two", "amst-bad")] == [False] * 4
    assert "speaks plugin API version 0" in rows["amst-old"][1]
    assert "amst-two" in rows["amst-one"][1]
    assert "amst-one" in rows["amst-two"][1]
    assert "no_such_dependency" in rows["amst-bad"][1]


def test_a_plugin_installed_after_the_first_look_is_found_and_home_stays_untouched(site):
    site.transport("amst-late", "late")
    hidden = site.path.parent / "aside"
    (site.path / "amst_late-1.0.dist-info").rename(hidden)
    site.home.chmod(0o500)
    before, after = site.run(f"""
        import os
        plugins = Plugins()
        before = error(lambda: plugins.transport("late", {{}}))
        os.rename({str(hidden)!r}, {str(site.path / "amst_late-1.0.dist-info")!r})
        show([before, plugins.transport("late", {{}}).name])
    """)
    site.home.chmod(0o700)
    assert "no transport plugin 'late' is installed" in before
    assert after == "late"
    assert os.listdir(site.home) == []


@pytest.fixture
def only(monkeypatch):
    """Make this interpreter believe that nothing but what lies in one directory is installed."""
    everywhere = importlib.metadata.distributions

    def choose(path: Path) -> None:
        monkeypatch.setattr(importlib.metadata, "distributions", lambda: everywhere(path=[str(path)]))

    return choose


def test_a_missing_first_party_plugin_says_what_to_install(site, only):
    only(site.path)
    with pytest.raises(Exception, match=r"no transport plugin 'tcp' is installed \(installed: none\); ") as caught:
        Plugins().transport("tcp", {})
    assert str(caught.value).endswith("run: pip install amst-tcp")


def test_a_missing_third_party_plugin_lists_what_is_installed(site, only):
    site.transport("amst-good", "good")
    only(site.path)
    with pytest.raises(Exception, match=r"no transport plugin 'quic' is installed \(installed: good\); ") as caught:
        Plugins().transport("quic", {})
    assert str(caught.value).endswith("install the distribution that provides it, or use one of those")


def test_a_missing_plugin_where_none_is_installed_offers_a_first_party_one(site, only):
    only(site.path)
    with pytest.raises(Exception, match=r"or use tcp \(pip install amst-tcp\)$"):
        Plugins().transport("quic", {})


def test_first_party_advice_names_real_distributions():
    here = Path(__file__).parents[2] / "plugins"
    files = [(here / dist.replace("-", "_") / "pyproject.toml").read_text() for dist in FIRST_PARTY.values()]
    for ((group, name), dist), text in zip(FIRST_PARTY.items(), files, strict=True):
        assert f'name = "{dist}"' in text
        assert f'[project.entry-points."{group}"]\n{name} = ' in text


def test_exactly_the_expected_plugins_are_installed():
    wanted = os.environ.get("AMST_EXPECT_PLUGINS")
    if wanted is None:
        pytest.skip("AMST_EXPECT_PLUGINS is not set: nothing says what this environment should hold")
    assert sorted(f"{p.group}:{p.name}" for p in installed()) == sorted(filter(None, wanted.split(",")))


def test_every_installed_plugin_passes_its_check():
    assert {f"{r.plugin.group}:{r.plugin.name}": r.error for r in Plugins.check() if not r.ok} == {}
