"""The registry agrees with itself, with the dataclasses and with the documentation."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from amst_core.errors import UsageError
from amst_core.files.journal import Fsync
from amst_core.settings import load
from amst_core.settings.load import SettingsError, load_settings
from amst_core.settings.registry import BY_NAME, KEYS, RELATIONS, Key, Kind, describe, table, variable
from amst_core.settings.values import Settings

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"


def fields_of(cls: type, path: str = "") -> dict[str, type]:
    """Every leaf field of the settings dataclasses, by dotted name."""
    hints = typing.get_type_hints(cls)
    found: dict[str, type] = {}
    for field in dataclasses.fields(cls):
        kind, name = hints[field.name], f"{path}{field.name}"
        if dataclasses.is_dataclass(kind):
            found |= fields_of(typing.cast(type, kind), f"{name}.")
        elif name != "plugins":
            found[name] = kind
    return found


def test_every_key_has_its_field_of_its_type_and_every_field_its_key() -> None:
    types = {
        Kind.COUNT: int, Kind.KIB: int, Kind.SIZE: int, Kind.DURATION: float, Kind.FLAG: bool, Kind.WORD: str,
        Kind.NAME: str, Kind.RATE: float, Kind.SHARE: float,
    }  # fmt: skip
    assert {f"{key.section}.{key.field}": types[key.kind] for key in KEYS} == fields_of(Settings)


def test_names_are_unique_and_lower_case() -> None:
    names = [key.name for key in KEYS]
    assert len(set(names)) == len(names) == len(BY_NAME)
    assert all(name == name.lower() and "__" not in name for name in names)


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_a_key_accepts_its_own_default_bounds_and_example(key: Key) -> None:
    for value in key.words or (key.default, key.low, key.high):
        read = key.parse(key.show(value))
        assert read == value
        assert type(read) is type(key.default)
    key.parse(key.example)
    assert key.help.endswith(".")


@pytest.mark.parametrize("key", [key for key in KEYS if key.bounds and not key.words], ids=lambda key: key.name)
def test_a_key_refuses_what_is_just_outside_its_bounds(key: Key) -> None:
    unit = 1024 if key.kind is Kind.KIB else 1
    for value in ((key.low - unit) / unit, (key.high + unit) / unit):
        written = value if key.kind in (Kind.DURATION, Kind.SHARE) else int(value)
        with pytest.raises(UsageError, match="must be"):
            key.parse(written)


@pytest.mark.parametrize(
    ("written", "rate", "shown"),
    [
        ("100Mbit/s", 12_500_000.0, "12.5MB/s"), ("16KiB/s", 16384.0, "16KiB/s"), (1 << 20, 1048576.0, "1MiB/s"),
        ("0", 0.0, "0B/s"), (0, 0.0, "0B/s"),
    ],
)  # fmt: skip
def test_a_rate_is_bytes_per_second_and_0_is_none(written: object, rate: float, shown: str) -> None:
    key = BY_NAME["transport.amst.pacing_rate"]
    read = key.parse(written)
    assert (read, type(read)) == (rate, float)
    assert key.parse(key.show(read)) == rate
    assert key.show(read) == shown


def test_what_is_too_slow_a_rate_is_told_what_may_be_said() -> None:
    for written in ("16383", "1", "-1", True):
        with pytest.raises(UsageError, match="must be a rate from 16KiB/s to 125GB/s, or 0, such as 100Mbit/s"):
            BY_NAME["transport.amst.pacing_rate"].parse(written)


@pytest.mark.parametrize("bad", ["", "sometimes", "nevermore", True, 1, 1.5, None, ["end"], b"end"])
def test_a_word_is_one_of_those_listed(bad: object) -> None:
    key = BY_NAME["files.fsync"]
    assert key.default in key.words
    assert key.parse(" ALWAYS ") == "always"
    with pytest.raises(UsageError, match="must be never, end or always"):
        key.parse(bad)


def test_the_words_of_fsync_are_those_that_sinks_know() -> None:
    assert set(BY_NAME["files.fsync"].words) == set(Fsync)


def test_the_defaults_keep_the_relations() -> None:
    for relation in RELATIONS:
        small, large = BY_NAME[relation.small], BY_NAME[relation.large]
        assert not isinstance(small.default, str) and not isinstance(large.default, str)
        assert small.default * relation.share <= large.default
        # A default that yields must not be pushed out of its own bounds.
        assert relation.yields in (None, small.name, large.name)
        if relation.yields == small.name:
            assert large.low // relation.share >= small.low
        if relation.yields == large.name:
            assert small.high * relation.share <= large.high


def test_the_defaults_loaded_are_those_of_the_registry() -> None:
    settings = load_settings(environ={})
    for key in KEYS:
        node: object = settings
        for part in key.section.split("."):
            node = getattr(node, part)
        assert getattr(node, key.field) == key.default
    assert settings.plugins == {}


def test_variables_are_named_by_the_rule() -> None:
    assert variable("limits.memory") == "AMST_LIMITS__MEMORY"
    assert variable("transport.amst.max_streams") == "AMST_TRANSPORT__AMST__MAX_STREAMS"
    for number, key in enumerate(KEYS):
        load_settings(environ={variable(key.name): key.show(key.default), f"AMST_OTHER{number}": "ignored"})


def test_the_document_holds_the_table_of_the_registry() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    _, begin, rest = text.partition("<!-- settings: begin -->\n")
    written, end, _ = rest.partition("<!-- settings: end -->")
    assert begin
    assert end
    assert written == table(), "run python -m amst_core.settings.registry and paste its output"
    assert [row.name for row in describe()] == [key.name for key in KEYS]


def test_the_module_prints_the_table_without_a_warning(tmp_path: Path) -> None:
    installed = Path(load.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "amst_core.settings.registry"],
        cwd=tmp_path, env={"PATH": os.defpath, "PYTHONPATH": str(installed)},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.stdout, done.stderr, done.returncode) == (table(), "", 0)


def test_the_document_example_of_faults_is_what_is_printed(tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text('\n\n[limits]\nmemroy = "2GiB"\n', encoding="utf-8")
    with pytest.raises(SettingsError) as caught:
        load_settings(files=[site], environ={"AMST_TRANSPORT__AMST__MAX_STREAMS": "1000"})
    assert str(caught.value).replace(f"{tmp_path}/", "") in DOCUMENT.read_text(encoding="utf-8")


def test_the_document_examples_of_files_load_and_agree(tmp_path: Path) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    loaded = []
    for suffix in ("toml", "yaml"):
        file = tmp_path / f"example.{suffix}"
        file.write_text(text.partition(f"```{suffix}\n")[2].partition("```")[0], encoding="utf-8")
        loaded.append(load_settings(files=[file], environ={}))
    assert loaded[0] == loaded[1] != load_settings(environ={})
    assert (loaded[0].transport.amst.max_streams, loaded[0].limits.memory) == (64, 512 * 2**20)


def test_the_lan_preset_loads_and_sets_what_it_says() -> None:
    settings = load_settings(files=[DOCUMENT.parents[1] / "configs" / "lan.toml"], environ={})
    assert settings.transport.modes.datacenter_streams == 8
    assert settings.transport.amst.connect_timeout == 5.0
    assert settings.limits.memory == 512 * 2**20
