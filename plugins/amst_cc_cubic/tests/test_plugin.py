"""The plugin as the core sees it: found, made with options from the settings, and refused in words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from amst_core.errors import ConfigError, UsageError
from amst_core.plugins import Plugins, installed
from amst_core.settings.load import load_settings

EVERY_STATE = {
    "algorithm", "cwnd", "ssthresh", "rtt", "min_rtt", "bandwidth", "max_bandwidth", "in_flight", "sent", "acked",
    "lost", "loss_rate", "pacing_rate",
}  # fmt: skip


def test_it_is_found_under_its_name_and_distribution() -> None:
    rows = [(row.group, row.name, row.dist) for row in installed() if row.name == "cubic"]
    assert rows == [("amst.congestion", "cubic", "amst-cc-cubic")]


def test_the_core_makes_it_and_finds_no_fault() -> None:
    controller = Plugins().controller("cubic", {}, mss=1448)
    assert (controller.name, controller.kernel_name, controller.window) == ("cubic", "cubic", 14480)
    report = next(report for report in Plugins.check() if report.plugin.name == "cubic")
    assert report.ok, report.error


def test_options_come_from_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "amst.toml"
    file.write_text("[plugins.cubic]\ninitial_window = 32\npacing = false\n")
    settings = load_settings(files=[file], environ={"AMST_PLUGINS__CUBIC__HYSTART": "false"})
    controller = Plugins().controller("cubic", settings.plugins["cubic"], mss=1000)
    assert controller.window == 32_000
    assert dict(settings.plugins["cubic"]) == {"initial_window": 32, "pacing": False, "hystart": False}


def test_two_controllers_share_nothing() -> None:
    plugins = Plugins()
    first, second = (plugins.controller("cubic", {}, mss=1000) for _ in range(2))
    first.on_loss(now=1.0, sent_at=0.0, lost=1000, in_flight=9000, persistent=True)
    assert (first.window, second.window) == (1000, 10_000)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fast_convergance": True}, "plugins.cubic.fast_convergance is unknown; known are fast_convergence,"),
        ({"hystart": 1}, "plugins.cubic.hystart = 1 must be true or false"),
        ({"initial_window": 0}, "plugins.cubic.initial_window = 0 must be a whole number of segments, 1 to 1000"),
        ({"initial_window": True}, "plugins.cubic.initial_window = True must be a whole number"),
        ({"initial_window": 2.5}, "plugins.cubic.initial_window = 2.5 must be a whole number"),
    ],
)
def test_a_wrong_option_is_refused_by_its_name(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Plugins().controller("cubic", options, mss=1448)
    assert words in str(caught.value)


def test_all_wrong_options_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"plugins\.cubic\.speed .*; plugins\.cubic\.pacing"):
        Plugins().controller("cubic", {"speed": 1, "pacing": "yes"}, mss=1448)


def test_a_segment_has_bytes() -> None:
    with pytest.raises(UsageError, match="mss = 0"):
        Plugins().controller("cubic", {}, mss=0)


def test_its_entry_point_is_light_and_answers_to_its_name_only() -> None:
    code = (
        "import sys, amst_cc_cubic.plugin as plugin; "
        "assert plugin.amst_make_controller('reno', {}, 1448) is None; "
        "assert 'amst_cc_cubic.controller' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_its_state_has_what_every_controller_has_and_its_own(sender) -> None:  # type: ignore[no-untyped-def]
    flow = sender()
    flow.grow_to(100)
    flow.lose()
    flow.round()
    state = set(flow.controller.state())
    assert EVERY_STATE - state == {"bandwidth", "max_bandwidth"}  # no sample had a rate
    assert {"mode", "region", "w_max", "k", "beta", "w_est", "cwnd_prior", "t"} <= state
    assert flow.controller.state()["beta"] == 0.7
