"""Who has set what: the settings in force with their sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from amst_core.settings.explain import HIDDEN, explain_settings
from amst_core.settings.load import SettingsError, load_settings
from amst_core.settings.registry import KEYS


def test_without_any_source_all_is_default_and_as_loaded() -> None:
    found = explain_settings(environ={})
    assert [each.name for each in found] == [key.name for key in KEYS]
    assert all(each.is_default and not each.follows for each in found)
    assert {each.name: each.value for each in found} == {key.name: key.default for key in KEYS}


def test_each_source_beats_those_before_it_and_is_named(tmp_path: Path) -> None:
    first, second = tmp_path / "a.toml", tmp_path / "b.yaml"
    first.write_text("[limits]\nsessions = 1\nlanes = 10\nmemory = '64MiB'\nopen_transfers = 5\n")
    second.write_text("limits:\n  lanes: 20\n  memory: 128MiB\n  open_transfers: 6\n")
    found = {
        each.name: each
        for each in explain_settings(
            files=[first, second],
            environ={"AMST_LIMITS__MEMORY": "256MiB", "AMST_LIMITS__OPEN_TRANSFERS": "7"},
            overrides={"limits.open_transfers": "8"},
        )
    }
    assert (found["limits.sessions"].value, found["limits.sessions"].source) == (1, f"{first}:2")
    assert (found["limits.lanes"].value, found["limits.lanes"].source) == (20, f"{second}:2")
    memory = found["limits.memory"]
    assert (memory.value, memory.text, memory.source) == (256 << 20, "256MiB", "AMST_LIMITS__MEMORY")
    assert (found["limits.open_transfers"].value, found["limits.open_transfers"].source) == (8, "--set")


def test_a_default_that_another_setting_moves_says_so() -> None:
    found = {each.name: each for each in explain_settings(environ={}, overrides={"limits.memory": "64MiB"})}
    message = found["limits.max_message"]
    assert (message.value, message.is_default, message.follows) == (32 << 20, True, "limits.memory")
    assert message.value == load_settings(environ={}, overrides={"limits.memory": "64MiB"}).limits.max_message


@pytest.mark.parametrize("name", ["token", "api_token", "Password", "secret", "private.key", "auth_header", "key"])
def test_secrets_of_plugins_are_not_shown(name: str, tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text(f"[plugins.x]\n'{name}' = 'hush'\nsize = 5\nword = 'w'\nlist = ['hush']\nmonkey = 'm'\n")
    found = explain_settings(files=[file], environ={})
    options = {each.name: each for each in found if each.name.startswith("plugins")}
    assert options[f"plugins.x.{name.lower()}"].text == HIDDEN
    assert "hush" not in repr(options)
    assert (options["plugins.x.size"].value, options["plugins.x.size"].source) == (5, f"{file}:3")
    assert (options["plugins.x.word"].value, options["plugins.x.monkey"].value) == ("w", "m")


def test_faults_are_those_of_loading() -> None:
    with pytest.raises(SettingsError, match="nonsense"):
        explain_settings(environ={"AMST_LIMITS__NONSENSE": "1"})
