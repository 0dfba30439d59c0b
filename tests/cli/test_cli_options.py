"""The command line as it is parsed, and what `main` makes of how a command ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from amst_core import errors
from amst_core.cli import bench, copy, exits, logs, options, signals
from amst_core.cli.main import main

KEYS = [
    "ok", "bytes", "files", "seconds", "setup_seconds", "throughput_bytes_per_s", "transport", "mode", "streams",
    "congestion", "congestion_backend", "encrypted", "verified", "retransmitted_bytes", "resumed_bytes",
    "lane_failures", "switches", "reason", "failed", "error", "congestion_reason", "streams_reason",
    "mode_reason", "lanes",
]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "operands"),
    [
        (["a", "b"], ["a", "b"]),
        (["a", "--json", "b"], ["a", "b"]),
        (["a", "b", "--json", "c"], ["a", "b", "c"]),
        (["--json", "--", "-x", "--json"], ["-x", "--json"]),
        (["a", "--", "-x", "--", "y"], ["a", "-x", "--", "y"]),
        (["--streams", "4", "a", "-r", "b"], ["a", "b"]),
        (["-", "b"], ["-", "b"]),
    ],
)
def test_options_and_operands_may_be_mixed_until_two_dashes(argv, operands):
    assert options.parse(["cp", *argv]).operands == operands


@pytest.mark.parametrize("argv", [["--", "--json"], ["a", "--", "b", "--json"]])
def test_what_looks_like_an_option_after_two_dashes_is_none(argv):
    assert not options.parse(["cp", *argv]).json
    assert not options.wants_json(["cp", *argv])


def test_values_of_options():
    parsed = options.parse(
        ["cp", "--streams", "512", "--set", "limits.memory=2GiB", "--set", "a.b=c=d", "--config", "x", "-vv", "-q"]
    )
    assert (parsed.streams, parsed.set) == (512, [("limits.memory", "2GiB"), ("a.b", "c=d")])
    assert (parsed.config, parsed.verbose, parsed.quiet, parsed.plaintext) == (["x"], 2, True, False)
    assert options.parse(["cp", "--streams", "auto"]).streams is None
    assert [options.parse(["cp", *argv]).verify for argv in ([], ["--verify", "none"])] == ["crc", "none"]
    assert options.parse(["bench", "--size", "4GiB"]).size == 4 << 30
    assert options.parse(["bench", "--time", "500ms"]).time == 0.5


@pytest.mark.parametrize(
    "argv",
    [
        [], ["nope"], ["--nope"], ["-x"], ["--json"],
        ["cp", "--nope", "a", "b"], ["cp", "--js", "a", "b"], ["cp", "--json=1", "a", "b"], ["cp", "--bwlimit", "1M"],
        ["cp", "--streams", "0"], ["cp", "--streams", "513"], ["cp", "--streams", "-1"], ["cp", "--streams", "1.5"],
        ["cp", "--streams", "\u0661"], ["cp", "--streams"], ["cp", "--set", "x"], ["cp", "--set", "=x"],
        ["cp", "--verify"], ["cp", "--verify", "md5"],
        ["bench", "--size", "0"], ["bench", "--size", "x"], ["bench", "--time", "0"], ["bench", "--time", "25h"],
        ["bench", "--size", "1", "--time", "1"], ["serve", "--json"], ["serve", "--streams", "2"],
        ["plugins", "--nope"], ["config", "--check"], ["lab", "--rate", "fast", "--", "true"], ["lab", "--loss", "2"],
        ["lab", "--seed", "-1"], ["lab", "--up-burst", "many"], ["lab", "--verbose"], ["lab"],
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_exit_2_with_one_line_of_advice(argv, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("amst: ")
    assert "--help" in err
    assert "Traceback" not in err
    if "--json" in argv:
        assert json.loads(out)["error"]["kind"] == "usage"
    else:
        assert out == ""


@pytest.mark.parametrize(
    "argv",
    [
        ["cp"], ["cp", "a"], ["cp", "amst://h/a", "amst://h/b"], ["cp", "-", "amst://h/"],
        ["cp", "amst://h/", "-"], ["cp", "-", "-"], ["cp", "-", "a"], ["cp", "a", "-"],
        ["cp", "--dry-run", "-", "amst://h/b"], ["cp", "-", "a", "amst://h/b"], ["cp", "amst://h/a", "amst://h/b", "-"],
        ["cp", "u@h:a", "."], ["cp", "a", "u@h:a"], ["cp", "a", "amst://h/b", "c"],
        ["cp", "amst://h/a", "amst://g/b", "c/"], ["cp", "a", "amst://h?x"],
        ["bench"], ["bench", "h"], ["bench", "amst://h/x"], ["bench", "amst://h", "amst://g"],
        ["serve", "x"], ["serve", "--root", "/nonexistent"],
        ["plugins", "new"], ["plugins", "list", "x"], ["config"], ["config", "check"], ["config", "check", "a", "b"],
    ],
)  # fmt: skip
def test_commands_refuse_operands_that_they_have_no_use_for(argv, capsys):
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith("amst: ")


def test_json_has_every_key_also_when_nothing_was_begun(capsys):
    assert main(["cp", "--json", "a"]) == 2
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    value = json.loads(out)
    assert list(value) == KEYS
    assert value["ok"] is False
    assert value["error"].keys() == {"kind", "message", "retryable"}
    assert value["failed"] == []


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("serve", ("--listen", "--root", "--config", "--set", "-q", "-v")),
        ("cp", ("-r", "--streams", "--transport", "--require", "--plaintext", "--verify", "--token-file", "--json")),
        ("ls", ("-l", "-R", "--json", "--token-file")),
        ("bench", ("--size", "--time", "--reverse", "--streams", "--json", "--plaintext")),
        ("plugins", ("--check", "--json")),
        ("config", ("--json", "--explain", "--set")),
        ("doctor", ("--leftovers", "--json", "--set")),
        ("lab", ("--rate", "--rtt", "--loss", "--up-delay", "--down-buffer", "--far", "--congestion", "--report")),
    ],
)
def test_help_names_every_flag(command, flags, capsys):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert not [flag for flag in flags if flag not in out]
    assert main([command, "-V"]) == 0


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert not [command for command in options._COMMANDS if f"\n  {command} " not in out]


def test_the_version_is_the_distributions_and_costs_no_heavy_import(amst):
    heavy = ("dynaconf", "rich", "structlog", "cryptography", "stevedore", "pluggy", "ssl", "asyncio", "logging")
    code = (
        "import sys; from amst_core.cli.main import main; code = main(['--version']); "
        f"print(code, [name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=amst.home, env=amst.env, check=False
    )
    assert done.stdout == "amst 0.1.0\n0 []\n", done.stderr


# ---- how commands end ---------------------------------------------------------------------


def ending(monkeypatch, error, *, arrived=False):
    def run(parsed, report):
        report.arrived_bytes = 1 << 20 if arrived else 0
        raise error

    monkeypatch.setattr(copy, "run", run)


@pytest.mark.parametrize(
    ("error", "before", "after"),
    [
        (errors.AmstError, 1, 1),
        (errors.UsageError, 2, 2),
        (errors.ConfigError, 2, 2),
        (errors.PluginError, 1, 1),
        (errors.UnavailableError, 8, 8),
        (errors.ConnectError, 4, 4),
        (errors.AuthError, 6, 6),
        (errors.ClosedError, 4, 5),
        (errors.BrokenError, 4, 5),
        (errors.DeadlineError, 4, 5),
        (errors.BusyError, 1, 1),
        (errors.ProtocolError, 4, 5),
        (errors.IntegrityError, 7, 7),
        (errors.NotFoundError, 3, 3),
        (errors.RefusedError, 6, 6),
        (errors.StorageError, 1, 1),
        (errors.SourceChangedError, 1, 1),
        (errors.CancelledError, 1, 1),
    ],
)
def test_every_kind_of_error_has_its_exit_code_before_and_after_the_first_byte(
    error, before, after, monkeypatch, capsys
):
    for arrived, code in ((False, before), (True, after)):
        ending(monkeypatch, error("what went wrong"), arrived=arrived)
        assert main(["cp", "--json", "a", "b"]) == code
        out, err = capsys.readouterr()
        assert err.startswith("amst: what went wrong")
        assert ("1.0 MiB had arrived; run the same command again and it goes on from there" in err) == (code == 5)
        reported = json.loads(out)["error"]
        assert reported["kind"] == error.kind
        assert reported["retryable"] == error("").retryable
        assert err == f"amst: {reported['message']}\n"


@pytest.mark.parametrize(
    ("error", "code", "name"), [(KeyboardInterrupt(), 130, "SIGINT"), (signals.Terminated(), 143, "SIGTERM")]
)
def test_signals_have_their_exit_codes(error, code, name, monkeypatch, capsys):
    ending(monkeypatch, error)
    assert main(["cp", "--json", "a", "b"]) == code
    out, err = capsys.readouterr()
    assert name in err
    assert json.loads(out)["error"]["kind"] == "cancelled"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_raise_in_a_command_and_are_put_back_after_it(number, code, monkeypatch):
    def run(parsed, report):
        os.kill(os.getpid(), number)
        threading.Event().wait(30)
        raise AssertionError("still here")

    monkeypatch.setattr(bench, "run", run)
    before = signal.getsignal(number)
    threads = threading.active_count()
    assert main(["bench", "amst://h"]) == code
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() == threads


def test_a_signal_that_the_main_thread_did_not_see_is_sent_again(monkeypatch):
    def run(parsed, report):
        # What a signal that comes just before a wait leaves behind: the wake-up byte, and no exception.
        os.write(signal.set_wakeup_fd(-1), bytes([signal.SIGTERM]))
        threading.Event().wait(30)
        raise AssertionError("still here")

    monkeypatch.setattr(bench, "run", run)
    assert main(["bench", "amst://h"]) == 143


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_comes_while_a_finalizer_runs_ends_the_command_too(number, code, monkeypatch, capsys):
    class Dropped:
        def __del__(self):
            os.kill(os.getpid(), number)
            for _ in range(1000):  # the exception comes here, and python lets it go no further
                pass

    def run(parsed, report):
        Dropped()
        threading.Event().wait(30)
        raise AssertionError("still here")

    monkeypatch.setattr(bench, "run", run)
    before = sys.unraisablehook
    assert main(["bench", "amst://h"]) == code
    assert sys.unraisablehook is before
    assert "Traceback" not in capsys.readouterr().err


def test_an_ignored_sigint_stays_ignored(monkeypatch):
    def run(parsed, report):
        os.kill(os.getpid(), signal.SIGINT)
        return 0

    monkeypatch.setattr(bench, "run", run)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert main(["bench", "amst://h"]) == 0
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("command", ["cp", "bench"])
def test_verbosity_reaches_the_logs(command, monkeypatch, amst):
    asked: list[int] = []
    monkeypatch.setattr(logs, "configure", asked.append)
    (amst.home / "a").write_bytes(b"a")
    operands = [str(amst.home / "a")] if command == "cp" else []
    assert main([command, "-vv", "--token-file", "/nonexistent", *operands, "amst://127.0.0.1:1"]) == 2
    assert asked == [2]


@pytest.mark.parametrize("flags", [[], ["-v"]])
def test_what_nobody_expected_is_called_a_bug_and_traced_on_request_only(flags, monkeypatch, capsys):
    ending(monkeypatch, ZeroDivisionError("oh"))
    assert main(["cp", "--json", *flags, "a", "b"]) == 1
    out, err = capsys.readouterr()
    assert "unexpected ZeroDivisionError: oh; this is a bug" in err
    assert ("Traceback" in err) == bool(flags)
    assert json.loads(out)["error"]["kind"] == "error"


@pytest.mark.parametrize(
    ("kinds", "code"),
    [
        ([], 0),
        (["storage"], 1),
        (["storage", "not_found"], 3),
        (["not_found", "broken"], 5),
        (["broken", "refused"], 6),
        (["refused", "integrity", "not_found"], 7),
        (["usage", "whatever"], 1),
    ],
)
def test_the_gravest_of_several_failures_counts(kinds, code):
    assert exits.for_failures(kinds) == code
    assert exits.for_failures(reversed(kinds)) == code


def test_a_reader_that_leaves_is_no_reason_to_complain(amst):
    with subprocess.Popen(
        [sys.executable, "-m", "amst_core", "plugins", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=amst.home, env=amst.env,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(30) == 1


# ---- plugins and config -------------------------------------------------------------------


def test_a_settings_file_is_checked(tmp_path, capsys):
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text("[limits]\nmemory = '64MiB'\n")
    bad.write_text("[limits]\nmemroy = 1\n\n[transport.amst]\nmax_streams = 1000\n")
    assert main(["config", "check", str(good)]) == 0
    assert capsys.readouterr().out == f"{good}: ok\n"
    assert main(["config", "check", str(bad)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{bad}:2: limits.memroy" in err
    assert f"{bad}:5: transport.amst.max_streams" in err


def test_a_settings_file_is_checked_for_scripts(tmp_path, capsys):
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text("")
    bad.write_text("[limits]\nmemroy = 1\n")
    assert main(["config", "check", "--json", str(good)]) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "file": str(good), "faults": [], "error": None}
    assert main(["config", "check", "--json", str(bad)]) == 2
    value = json.loads(capsys.readouterr().out)
    assert (value["ok"], value["error"]["kind"]) == (False, "config")
    assert value["faults"][0]["key"] == "limits.memroy"
    assert value["faults"][0]["source"] == f"{bad}:2"


def advertise(directory, name, target):
    info = directory / f"amst_{name}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: amst-{name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[amst.mode]\n{name} = {target}\n")


def test_plugins_are_listed_without_being_imported(tmp_path, amst):
    advertise(tmp_path, "broken", "amst_no_such_module")
    listed = amst("plugins", PYTHONPATH=str(tmp_path))
    assert (listed.returncode, listed.stderr) == (0, "")
    rows = [line.split() for line in listed.stdout.splitlines()]
    assert rows[0] == ["GROUP", "NAME", "DISTRIBUTION", "VERSION", "TARGET"]
    assert ["amst.mode", "broken", "amst-broken", "1.2", "amst_no_such_module"] in rows
    assert amst("plugins", "list", PYTHONPATH=str(tmp_path)).stdout == listed.stdout


def test_a_plugin_that_does_not_work_fails_the_check_by_name(tmp_path, amst):
    advertise(tmp_path, "broken", "amst_no_such_module")
    checked = amst("plugins", "list", "--check", PYTHONPATH=str(tmp_path))
    assert checked.returncode == 1
    assert "FAILED" in checked.stdout
    assert "'broken' (amst-broken 1.2) failed to import amst_no_such_module" in checked.stdout
    value = json.loads(amst("plugins", "--check", "--json", PYTHONPATH=str(tmp_path)).stdout)
    assert value["ok"] is False
    (row,) = [row for row in value["plugins"] if row["name"] == "broken"]
    assert (row["ok"], row["error"]["kind"]) == (False, "plugin")


def test_two_claims_to_one_name_are_shown(tmp_path, amst):
    for directory in ("one", "two"):
        (tmp_path / directory).mkdir()
    advertise(tmp_path / "one", "same", "x")
    info = tmp_path / "two" / "other-3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 3\n")
    (info / "entry_points.txt").write_text("[amst.mode]\nsame = y\n")
    path = os.pathsep.join(str(tmp_path / directory) for directory in ("one", "two"))
    assert "conflict: amst.mode same is claimed more than once" in amst("plugins", PYTHONPATH=path).stdout


def test_with_no_plugin_the_list_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("amst_core.plugins.installed", list)
    assert main(["plugins"]) == 0
    assert "pip install amst-tcp" in capsys.readouterr().out
