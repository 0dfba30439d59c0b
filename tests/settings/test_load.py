"""Loading settings: who beats whom, what is refused and how that is said, and what the host cannot do to it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amst_core.errors import ConfigError
from amst_core.settings import load
from amst_core.settings.load import Fault, SettingsError, check_file, load_settings
from amst_core.settings.registry import BY_NAME, KEYS, Key, Kind
from amst_core.settings.values import Settings

INSTALLED = Path(load.__file__).parents[2]
"""Where the package under test was imported from: a source tree or site-packages."""
MAX_STREAMS = "AMST_TRANSPORT__AMST__MAX_STREAMS"

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def faults_of(
    *,
    files: list[Path] | None = None,
    environ: dict[str, str] | None = None,
    overrides: dict[str, object] | None = None,
) -> tuple[Fault, ...]:
    with pytest.raises(SettingsError) as caught:
        load_settings(files=files or [], environ=environ or {}, overrides=overrides)
    return caught.value.faults


# ---- precedence ----------------------------------------------------------------------------


def test_each_source_beats_those_before_it(write: Write) -> None:
    first = write("first.toml", "[limits]\nsessions = 1\nlanes = 1\nopen_transfers = 1\nmax_message = '1MiB'\n")
    second = write("second.yaml", "limits:\n  lanes: 2\n  open_transfers: 2\n  max_message: 2MiB\n")
    loaded = load_settings(
        files=[first, str(second)],
        environ={"AMST_LIMITS__OPEN_TRANSFERS": "3", "AMST_LIMITS__MAX_MESSAGE": "3MiB"},
        overrides={"limits.max_message": "4MiB"},
    )
    limits = loaded.limits
    assert (limits.sessions, limits.lanes, limits.open_transfers, limits.max_message) == (1, 2, 3, 4 * 2**20)
    assert limits.memory == BY_NAME["limits.memory"].default


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMST_LIMITS__SESSIONS", "7")
    assert load_settings().limits.sessions == 7
    assert load_settings(environ={}).limits.sessions == 64


def test_values_become_bytes_seconds_and_truth_values() -> None:
    loaded = load_settings(
        environ={"AMST_TRANSPORT__AMST__CHUNK_SIZE_KB": "64", "AMST_SECURITY__PLAINTEXT": "yes"},
        overrides={"transport.amst.connect_timeout": "1500ms", "transport.amst.read_timeout": 2, "limits.memory": 2**30,
                   "security": {"allow_plaintext": True}},
    )  # fmt: skip
    assert loaded.transport.amst.chunk_size == 64 * 1024
    assert loaded.transport.amst.connect_timeout == 1.5
    assert type(loaded.transport.amst.read_timeout) is float
    assert loaded.limits.memory == 2**30
    assert loaded.security.plaintext is True
    assert loaded.security.allow_plaintext is True


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", "[Limits]\nSESSIONS = 5\n"),
        ("a.toml", "limits.sessions = 5\n"),
        ("a.toml", "\ufefflimits.sessions = 5\r\n"),
        ("a.toml", "'limits.sessions' = 5\n"),
        ("a.toml", "limits = { sessions = 5 }\n"),
        ("a.yaml", "LIMITS:\n  Sessions: 5\n"),
        ("a.yml", "limits.sessions: 5\n"),
        ("a.yaml", '{"limits": {"sessions": "5"}}\n'),
        ("a.yaml", "\ufefflimits:\n  sessions: 5\ntransport:\nsecurity: {}\n"),
    ],
)
def test_names_may_be_written_in_any_case_and_dotted(write: Write, name: str, text: str) -> None:
    assert load_settings(files=[write(name, text)], environ={}) == load_settings(
        environ={}, overrides={"limits.sessions": 5}
    )


@pytest.mark.parametrize(("name", "text"), [("a.yaml", ""), ("a.yaml", "---\n# nothing\n"), ("a.toml", "")])
def test_an_empty_file_changes_nothing(write: Write, name: str, text: str) -> None:
    assert load_settings(files=[write(name, text)], environ={}) == load_settings(environ={})


def test_a_relative_file_is_looked_up_in_the_working_directory_only(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("a.toml", "limits.sessions = 5\n")
    monkeypatch.chdir(tmp_path)
    assert load_settings(files=["a.toml"], environ={}).limits.sessions == 5
    below = tmp_path / "below"
    below.mkdir()
    monkeypatch.chdir(below)  # dynaconf by itself would find the file above
    with pytest.raises(SettingsError, match="No such file"):
        load_settings(files=["a.toml"], environ={})


def test_a_sibling_local_file_is_not_read(write: Write) -> None:
    write("a.local.toml", "limits.sessions = 6\n")
    assert load_settings(files=[write("a.toml", "limits.sessions = 5\n")], environ={}).limits.sessions == 5


# ---- what is not a setting -----------------------------------------------------------------


def test_variables_of_the_command_line_are_not_settings() -> None:
    environ = {"AMST_TOKEN": "x", "AMST_STATE_DIR": "/x", "AMST_CONFIG": "/x", "AMSTERDAM__X": "1", "PATH": "/bin"}
    assert load_settings(environ=environ) == load_settings(environ={})


@pytest.mark.parametrize(
    "variable", ["AMST_LIMITS__MEMROY", "AMST_NO__SUCH", "AMST___", "AMST_LIMITS__", "AMST_TOKEN__X"]
)
def test_an_unknown_variable_with_two_underscores_is_a_fault(variable: str) -> None:
    (fault,) = faults_of(environ={variable: "1"})
    assert fault.source == variable
    assert fault.value == "1"
    assert "unknown setting" in fault.message


# ---- faults --------------------------------------------------------------------------------


def test_every_fault_of_every_source_is_reported_with_its_place(write: Write) -> None:
    toml = write("a.toml", "# settings\n[limits]\nmemory = 'lots'\n\n[transport.amst]\nmax_streams = [1]\nstreams=1\n")
    yaml = write("b.yaml", "limits:\n  sessions: 0\n\n  lanes: true\n  memory: 1GiB\n")
    faults = faults_of(
        files=[toml, yaml, toml.with_name("gone.toml")],
        environ={MAX_STREAMS: "many", "AMST_LIMITS__HANDSHAKE_TIMEOUT": "1h"},
        overrides={"limits.open_transfers": 1.5, "security.plaintext": 1, "limits.max_message": None},
    )
    assert [(fault.source, fault.key, fault.value) for fault in faults] == [
        (f"{toml}:3", "limits.memory", "lots"),  # although the next file would have replaced it
        (f"{toml}:6", "transport.amst.max_streams", [1]),
        (f"{toml}:7", "transport.amst.streams", 1),
        (f"{yaml}:2", "limits.sessions", 0),
        (f"{yaml}:4", "limits.lanes", True),
        (f"{toml.with_name('gone.toml')}", "", None),
        ("AMST_LIMITS__HANDSHAKE_TIMEOUT", "limits.handshake_timeout", "1h"),
        (MAX_STREAMS, "transport.amst.max_streams", "many"),
        ("--set", "limits.open_transfers", 1.5),
        ("--set", "security.plaintext", 1),
        ("--set", "limits.max_message", None),
    ]
    error = SettingsError(faults)
    assert isinstance(error, ConfigError)
    assert str(error).startswith("11 faults in the settings:\n")
    assert all(str(fault) in str(error) for fault in faults)
    assert f"{toml}:3: limits.memory = 'lots': must be a size from 32MiB to 1TiB, such as 2GiB" in str(error)


def test_a_single_fault_is_one_line() -> None:
    (fault,) = faults_of(overrides={"limits.sessions": "x"})
    assert (
        str(SettingsError([fault])) == "--set: limits.sessions = 'x': must be an integer from 1 to 65536, such as 256"
    )


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
@pytest.mark.parametrize(
    "bad", [None, [], [1], {"a": 1}, b"1", "", "x", "-1", -1, float("nan"), 1e300, 10**400, object()]
)
def test_no_key_takes_a_value_of_another_type(key: Key, bad: object) -> None:
    if key.kind is Kind.NAME and bad == "x":
        return  # it may be the name of a plugin
    (fault,) = faults_of(overrides={key.name: bad})
    assert fault.key == key.name
    assert fault.value is bad
    assert key.allowed in fault.message


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("limits.memroy", 1, "did you mean limits.memory?"),
        ("limit.memory", 1, "did you mean limits.memory?"),
        ("max_streams", 1, "did you mean transport.amst.max_streams?"),
        ("transport.max_streams", 1, "did you mean transport.amst.max_streams?"),
        ("limts", {"lanes": 1}, "did you mean limits?"),
        ("qqqqqqqq", 1, "unknown setting; docs/configuration.md lists them all"),
        ("limits", 5, "is a section, not a setting; it holds limits.memory, limits.max_message"),
        ("limits", [], "is a section"),
        ("transport.amst", "x", "it holds transport.amst.chunk_size_kb"),
        ("limits.memory.size", 5, "limits.memory is a setting, not a section"),
        ("", 5, "unknown setting"),
        ("..", 5, "unknown setting"),
        ("plugins", 5, "plugins.<name>.<option>"),
        ("plugins.tcp", 5, "plugins.<name>.<option>"),
        ("plugins..x", 5, "plugins.<name>.<option>"),
        ("plugins.tcp.dynaconf_merge", False, "reserved"),
    ],
)
def test_an_unknown_name_is_refused_with_what_was_meant(name: str, value: object, expected: str) -> None:
    (fault,) = faults_of(overrides={name: value})
    assert expected in fault.message


def test_a_suggestion_for_a_variable_is_a_variable() -> None:
    (fault,) = faults_of(environ={"AMST_LIMITS__MEMROY": "1GiB"})
    assert "did you mean AMST_LIMITS__MEMORY?" in fault.message


BILLION = "a: &a [1]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + inner] * 9)}]\n" for inner, name in zip("abcdefgh", "bcdefghi", strict=True)
)
"""Nine lines whose aliases stand for a list of 43 million items."""


@pytest.mark.parametrize(
    ("name", "text", "line", "message"),
    [
        ("a.toml", "[limits]\nmemory = \n", 2, "not a valid settings file"),
        ("a.toml", "[limits]\nsessions = 1\nsessions = 2\n", 3, "overwrite"),
        ("a.toml", "[limits\n", 1, "not a valid settings file"),
        ("a.toml", "x = '''\n\n", 2, "not a valid settings file"),
        ("a.toml", "x = " + "[" * 5000, None, "nested too deeply"),
        ("a.toml", "x = " + "9" * 5000, None, "not a valid settings file"),
        ("a.yaml", "limits:\n\tmemory: 1\n", 2, "not a valid settings file"),
        ("a.yaml", "limits: [1\n", 2, "not a valid settings file"),
        ("a.yaml", "a: 1\n---\nb: 2\n", 2, "another document"),
        ("a.yaml", "limits:\n  memory: *nowhere\n", 2, "undefined alias"),
        ("a.yaml", "limits:\n  memory: !!python/object:os.system 1\n", 2, "tags"),
        ("a.yaml", "limits:\n  sessions: !!int many\n", 2, "'many' cannot be read as int"),
        ("a.yaml", "limits:\n  sessions: !!int\n", 2, "'' cannot be read as int"),
        ("a.yaml", "security:\n  plaintext: !!bool maybe\n", 2, "'maybe' cannot be read as bool"),
        ("a.yaml", "plugins: !!omap {}\n", 1, "tags"),
        ("a.yaml", "plugins.x.y: " + "9" * 5000, 1, "cannot be read as int"),
        ("a.yaml", "limits:\n  <<: {memory: 1GiB}\n", 2, "merge keys"),
        ("a.yaml", "limits:\n  [a]: 1\n", 2, "name of a setting is text"),
        ("a.yaml", "- limits\n", 1, "a mapping of sections"),
        ("a.yaml", "\x00", None, "not a valid settings file"),
        ("a.yaml", "a: &a [*a]\n", None, "more than 10000 values|nested too deeply"),
        ("a.yaml", "[" * 5000, None, "nested too deeply"),
        ("a.yaml", BILLION, None, "more than 10000 values"),
    ],
)  # fmt: skip
def test_a_broken_file_is_a_fault_with_its_line(
    write: Write, name: str, text: str, line: int | None, message: str
) -> None:
    path = write(name, text)
    with pytest.raises(SettingsError, match=message) as caught:
        check_file(path)
    (fault,) = caught.value.faults
    assert fault.source == (f"{path}:{line}" if line else str(path))
    assert fault.key == ""


def test_a_file_that_cannot_be_read_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "dir.toml").mkdir()
    (tmp_path / "latin.toml").write_bytes(b"\n# caf\xe9\n")
    for path, source, message in (
        (tmp_path / "none.yaml", tmp_path / "none.yaml", "No such file"),
        (tmp_path / "dir.toml", tmp_path / "dir.toml", "Is a directory"),
        (tmp_path / "latin.toml", f"{tmp_path / 'latin.toml'}:2", "not UTF-8"),
        (tmp_path / "a.ini", tmp_path / "a.ini", "must end in .yaml, .yml, .toml"),
        ("nul\0.toml", "nul\0.toml", "null"),
    ):
        with pytest.raises(SettingsError, match=message) as caught:
            check_file(path)
        assert caught.value.faults[0].source == str(source)


def test_check_file_looks_at_that_file_alone(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMST_LIMITS__SESSIONS", "nonsense")
    check_file(write("good.toml", "limits.sessions = 1\n"))
    with pytest.raises(SettingsError, match=r"bad\.toml:1: limits\.sessions"):
        check_file(write("bad.toml", "limits.sessions = 0\n"))


def test_a_name_in_an_inline_table_is_reported_at_the_line_of_the_table(write: Write) -> None:
    path = write("a.toml", "\n[transport]\namst = { max_streams = 0 }\n")
    (fault,) = faults_of(files=[path])
    assert (fault.source, fault.key) == (f"{path}:3", "transport.amst.max_streams")
    path = write("b.toml", "\n\n[limits . sessions]\n")
    (fault,) = faults_of(files=[path])
    assert (fault.source, fault.key) == (f"{path}:3", "limits.sessions")


# ---- relations -----------------------------------------------------------------------------


def test_settings_that_contradict_each_other_are_refused_with_both_places(write: Write) -> None:
    path = write("a.yaml", "transport:\n  amst:\n    max_streams: 8\n    min_streams: 4\n")
    (fault,) = faults_of(files=[path], overrides={"transport.amst.min_streams": 9})
    assert str(fault) == (
        "--set: transport.amst.min_streams = '9': "
        f"must be at most transport.amst.max_streams, which is 8 ({path}:3)"
    )  # fmt: skip
    for overrides in (
        {"transport.modes.datacenter_streams": 3},
        {"transport.modes.datacenter_streams": 9},
        {"limits.max_message": "97MiB"},
        {"limits.memory": "64MiB", "limits.max_message": "33MiB"},
    ):
        assert len(faults_of(files=[path], overrides=dict(overrides))) == 1
    load_settings(files=[path], environ={}, overrides={"limits.memory": "64MiB", "limits.max_message": "32MiB"})


@pytest.mark.parametrize(
    ("overrides", "streams", "message"),
    [
        ({"transport.amst.max_streams": 4}, 4, 64 * 2**20),
        ({"transport.amst.min_streams": 40}, 40, 64 * 2**20),
        ({"transport.amst.min_streams": 2, "transport.amst.max_streams": 2}, 2, 64 * 2**20),
        ({"limits.memory": "32MiB"}, 16, 16 * 2**20),
        ({"limits.memory": "2GiB"}, 16, 64 * 2**20),
    ],
)
def test_a_default_follows_what_was_set(overrides: dict[str, object], streams: int, message: int) -> None:
    loaded = load_settings(environ={}, overrides=overrides)
    assert loaded.transport.modes.datacenter_streams == streams
    assert loaded.limits.max_message == message


def test_a_bad_value_does_not_cause_a_second_fault_elsewhere() -> None:
    faults = faults_of(overrides={"transport.amst.max_streams": "x", "transport.modes.datacenter_streams": 400})
    assert [fault.key for fault in faults] == ["transport.amst.max_streams"]


# ---- plugins -------------------------------------------------------------------------------


def test_options_of_plugins_pass_through_merged_and_frozen(write: Write) -> None:
    toml = write("a.toml", "[plugins.tcp]\nlist = [1, 'x']\nkeep = 'yes'\nnothing = {}\ndeep = { a = 1, 'b.c' = 2 }\n")
    tcp = "  TCP:\n    Deep:\n      a: [2]\n    none: null\n    day: 2020-13-45\n"
    yaml = write("b.yaml", f"plugins:\n{tcp}  rdma:\n    device: mlx5_0\n  bare:\n")
    plugins = load_settings(
        files=[toml, yaml],
        environ={"AMST_PLUGINS__TCP__LIST": "x", "AMST_PLUGINS__OTHER__A__B": "7"},
        overrides={"plugins.other.c": True},
    ).plugins
    assert plugins == {
        "tcp": {
            "list": "x",
            "keep": "yes",
            "nothing": {},
            "deep": {"a": (2,), "b.c": 2},
            "none": None,
            "day": "2020-13-45",
        },
        "rdma": {"device": "mlx5_0"},
        "other": {"a": {"b": 7}, "c": True},
    }
    assert isinstance(plugins["tcp"], MappingProxyType)
    with pytest.raises(TypeError):
        plugins["tcp"]["deep"]["a"] = 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7), ("-7", -7), ("0x10", 16), ("1_000", 1000), ("1.5", 1.5), ("1e3", 1000.0), ("true", True),
        ("false", False), ("True", "True"), ("yes", "yes"), ("", ""), ("007", "007"), ("nan", "nan"), ("inf", "inf"),
        ("1.", "1."), ("2020-01-01", "2020-01-01"), ("10.0.0.1", "10.0.0.1"),
        ("[1]", "[1]"), ("'x'", "'x'"),
        ("1 # x", "1 # x"),
        ("1\nx = 2", "1\nx = 2"), ("@int 7", "@int 7"), ("@format {env[HOME]}", "@format {env[HOME]}"),
        ("@jinja {{ env.HOME }}", "@jinja {{ env.HOME }}"), ("@read_file /etc/hostname", "@read_file /etc/hostname"),
        ("@del", "@del"), ("@merge a=b", "@merge a=b"), ("@none", "@none"), ("9" * 5000, "9" * 5000),
    ],
)  # fmt: skip
def test_text_for_a_plugin_is_a_number_or_stays_as_it_is(write: Write, text: str, value: object) -> None:
    for loaded in (
        load_settings(environ={"AMST_PLUGINS__X__Y": text}),
        load_settings(environ={}, overrides={"plugins.x.y": text}),
    ):
        assert loaded.plugins["x"]["y"] == value
        assert type(loaded.plugins["x"]["y"]) is type(value)
    if "@" in text:
        file = write("a.yaml", f'plugins.x.y: "{text}"\n')
        assert load_settings(files=[file], environ={}).plugins == {"x": {"y": text}}


def test_an_option_without_end_is_a_fault_and_not_a_crash() -> None:
    mapping: dict[str, object] = {}
    mapping["again"] = mapping
    items: list[object] = []
    items.append(items)
    for endless in (mapping, items):
        (fault,) = faults_of(overrides={"plugins.x": {"y": endless}})
        assert "levels deep" in fault.message


# ---- frozen, and nothing global ------------------------------------------------------------


def test_settings_are_frozen_comparable_and_hashable() -> None:
    one, other = load_settings(environ={}), load_settings(environ={})
    assert one == other
    assert hash(one) == hash(other)
    assert one != load_settings(environ={}, overrides={"limits.sessions": 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.limits.memory = 1  # type: ignore[misc]
    assert not hasattr(one, "__dict__")


def test_loading_leaves_what_it_was_given_and_the_environment_alone(write: Write) -> None:
    before = dict(os.environ)
    nested: dict[str, object] = {"limits": {"sessions": 2}, "plugins": {"x": {"y": [1]}}}
    environ = {"AMST_LIMITS__LANES": "3"}
    load_settings(files=[write("a.toml", "limits.sessions = 1\n")], environ=environ, overrides=nested)
    assert nested == {"limits": {"sessions": 2}, "plugins": {"x": {"y": [1]}}}
    assert environ == {"AMST_LIMITS__LANES": "3"}
    assert dict(os.environ) == before
    assert load_settings(environ={}).limits.sessions == 64


def run(code: str, *, cwd: Path, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=cwd, env={"PATH": os.defpath, "PYTHONPATH": str(INSTALLED), **environ},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_settings_does_not_import_dynaconf(tmp_path: Path) -> None:
    code = (
        "import sys, amst_core.settings, amst_core.settings.load, amst_core.settings.registry\n"
        "print('dynaconf' in sys.modules)\n"
        "amst_core.settings.load.load_settings(environ={})\n"
        "print('dynaconf' in sys.modules)"
    )
    assert run(code, cwd=tmp_path).split() == ["False", "True"]


HOSTILE = {
    "DYNACONF_LIMITS__SESSIONS": "1",
    "DYNACONF_LIMITS": "@json {\"sessions\": 1}",
    "SETTINGS_FILE_FOR_DYNACONF": "{dir}/host.toml",
    "PRELOAD_FOR_DYNACONF": "['{dir}/host.toml']",
    "INCLUDES_FOR_DYNACONF": "['{dir}/host.toml']",
    "SECRETS_FOR_DYNACONF": "{dir}/host.toml",
    "ROOT_PATH_FOR_DYNACONF": "{dir}",
    "ENVVAR_PREFIX_FOR_DYNACONF": "AMST",
    "ENVIRONMENTS_FOR_DYNACONF": "true",
    "ENV_FOR_DYNACONF": "production",
    "FORCE_ENV_FOR_DYNACONF": "production",
    "LOAD_DOTENV_FOR_DYNACONF": "true",
    "DOTENV_OVERRIDE_FOR_DYNACONF": "true",
    "MERGE_ENABLED_FOR_DYNACONF": "false",
    "DOTTED_LOOKUP_FOR_DYNACONF": "false",
    "AUTO_CAST_FOR_DYNACONF": "true",
    "LOWERCASE_READ_FOR_DYNACONF": "false",
    "NESTED_SEPARATOR_FOR_DYNACONF": "_",
    "INDEX_SEPARATOR_FOR_DYNACONF": "_",
    "SYSENV_FALLBACK_FOR_DYNACONF": "true",
    "FRESH_VARS_FOR_DYNACONF": "['LIMITS']",
    "LOADERS_FOR_DYNACONF": "['antigravity']",
    "CORE_LOADERS_FOR_DYNACONF": "['PY']",
    "YAML_LOADER_FOR_DYNACONF": "unsafe_load",
    "ENCODING_FOR_DYNACONF": "utf-16",
    "VALIDATE_ON_UPDATE_FOR_DYNACONF": "all",
}  # fmt: skip
"""What an application that uses dynaconf itself, or a mischievous one, may have in its environment."""


def test_the_host_cannot_steer_the_load_by_its_own_dynaconf_variables(tmp_path: Path) -> None:
    (tmp_path / "host.toml").write_text("[production.limits]\nsessions = 1\n[limits]\nsessions = 1\n", encoding="utf-8")
    (tmp_path / ".env").write_text("AMST_LIMITS__SESSIONS=1\nPLANTED=1\n", encoding="utf-8")
    (tmp_path / "settings.toml").write_text("[default.limits]\nsessions = 1\n", encoding="utf-8")
    (tmp_path / "ours.yaml").write_text(
        "limits: {lanes: 9}\nplugins: {x: {a: '@jinja x', b_0: [1]}}\n", encoding="utf-8"
    )
    (tmp_path / "more.toml").write_text("[plugins.x]\nc = 1\n", encoding="utf-8")
    code = (
        "import os\n"
        "from amst_core.settings.load import load_settings\n"
        "print(load_settings(files=['ours.yaml', 'more.toml']), 'PLANTED' in os.environ)"
    )
    environ = {name: value.replace("{dir}", str(tmp_path)) for name, value in HOSTILE.items()}
    expected = load_settings(files=[tmp_path / "ours.yaml", tmp_path / "more.toml"], environ={})
    assert expected.limits.sessions == 64
    assert run(code, cwd=tmp_path, **environ) == f"{expected} False"


def test_variables_that_keep_dynaconf_from_starting_are_named(tmp_path: Path) -> None:
    code = (
        "from amst_core.settings.load import load_settings, SettingsError\n"
        "try: load_settings(environ={})\n"
        "except SettingsError as err: print(err)"
    )
    said = run(code, cwd=tmp_path, REDIS_PORT_FOR_DYNACONF="abc")
    assert said.startswith("environment: dynaconf cannot be imported")
    assert "_FOR_DYNACONF" in said


# ---- garbage -------------------------------------------------------------------------------

NAMES = st.one_of(
    st.sampled_from([*BY_NAME, "limits", "transport", "transport.amst", "plugins", "plugins.x", "plugins.x.y", "memory",
                     "amst", "x", "", ".", "dynaconf_merge", "@format", "__"]),
    st.text(max_size=8),
)  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.binary(max_size=4), st.dates(),
    st.sampled_from(["@format {this}", "@del", "@reset x", "@merge", "@insert 0 x", "1GiB", "30s", "true", "16"]),
)  # fmt: skip
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=4)),
    max_leaves=12,
)


def loaded_or_refused(**sources: Any) -> Settings | SettingsError:
    try:
        return load_settings(**sources)
    except SettingsError as err:
        return err


@given(
    overrides=st.dictionaries(NAMES, TREES, max_size=5), environ=st.dictionaries(NAMES, st.text(max_size=8), max_size=3)
)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_garbage_is_loaded_or_refused_and_nothing_else(overrides: dict[str, object], environ: dict[str, str]) -> None:
    variables = {"AMST_" + name.upper().replace(".", "__"): value for name, value in environ.items()}
    loaded = loaded_or_refused(environ=variables, overrides=overrides)
    if isinstance(loaded, Settings):
        assert not any(
            isinstance(value, dict | list) for options in loaded.plugins.values() for value in options.values()
        )
    else:
        assert loaded.faults
        assert all(fault.message and str(fault) in str(loaded) for fault in loaded.faults)


WORDS = (
    "limits memory plugins x : = . [ ] { } , ' \" # *a << | > - ... 1 1e3 0o7 1:30 ~ true 2020-01-01 \\ @ `"
    " !!int !!float !!bool !!binary !!timestamp !!set !!omap !x"
).split()
SPACES = ["\n", "\n  ", "\t", " ", ": ", "- ", "? ", "&a ", "---\n", "%YAML 1.1\n", "\u2028", "é"]
FRAGMENTS = st.lists(st.sampled_from([*WORDS, *SPACES]), max_size=14).map("".join)


@given(text=st.one_of(FRAGMENTS, st.text(max_size=30)), suffix=st.sampled_from([".yaml", ".toml"]))
@settings(deadline=None, max_examples=300)
def test_a_garbage_file_is_loaded_or_refused_and_nothing_else(text: str, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"garbage{suffix}"
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        loaded = loaded_or_refused(files=[path], environ={})
        if isinstance(loaded, SettingsError):
            assert loaded.faults
            assert all(fault.source.startswith(str(path)) for fault in loaded.faults)
