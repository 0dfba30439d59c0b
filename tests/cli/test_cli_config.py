"""`amst config --explain`: what is in force, as a table and as JSON."""

from __future__ import annotations

import json

from amst_core.settings.registry import KEYS

from .conftest import Shell


def test_every_setting_has_a_line_with_its_source(amst: Shell) -> None:
    (amst.home / "site.toml").write_text("[limits]\nmemory = '64MiB'\n")
    done = amst("config", "--explain", "--set", "files.fsync=end", AMST_CONFIG="site.toml", AMST_LIMITS__LANES="9")
    assert (done.returncode, done.stderr) == (0, "")
    lines = {line.split()[0]: line.split(maxsplit=2)[1:] for line in done.stdout.splitlines()}
    assert list(lines) == [key.name for key in KEYS]
    assert lines["limits.memory"] == ["64MiB", "site.toml:2"]
    assert lines["limits.max_message"] == ["32MiB", "default, follows limits.memory"]
    assert lines["limits.lanes"] == ["9", "AMST_LIMITS__LANES"]
    assert lines["files.fsync"] == ["end", "--set"]


def test_json_has_values_in_bytes_and_seconds(amst: Shell) -> None:
    (amst.home / "site.toml").write_text("[plugins.tcp]\ntoken = 'hush'\n")
    done = amst("config", "--explain", "--json", "--config", "site.toml")
    value = json.loads(done.stdout)
    assert (done.returncode, value["ok"], value["error"]) == (0, True, None)
    rows = {row["key"]: row for row in value["settings"]}
    assert rows["limits.memory"] == {
        "key": "limits.memory", "value": 192 << 20, "text": "192MiB", "source": "default", "follows": None,
    }  # fmt: skip
    assert "hush" not in done.stdout


def test_what_makes_no_sense(amst: Shell) -> None:
    (amst.home / "x.toml").touch()
    one = ["--set", "limits.lanes=1"]
    for operands in (["--explain", "x.toml"], ["check", "x.toml", *one], one):
        assert amst("config", *operands).returncode == 2
    done = amst("config", "--explain", "--set", "limits.lans=1")
    assert done.returncode == 2
    assert "did you mean limits.lanes" in done.stderr
