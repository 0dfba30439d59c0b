"""BBR as a plugin: found, made with the user's options, refused with the wrong ones; what it exports; any input."""

from __future__ import annotations

import importlib.metadata
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amst_cc_bbr.controller import BbrController
from amst_cc_bbr.options import BbrOptions
from amst_cc_bbr.plugin import amst_make_controller
from amst_core.errors import ConfigError, UsageError
from amst_core.interfaces import API_VERSION, AckSample
from amst_core.plugins import Plugins, installed
from amst_core.settings.load import load_settings


def test_it_is_found_and_made_with_the_options_from_the_settings(tmp_path):
    file = tmp_path / "amst.toml"
    file.write_text("[plugins.bbr]\nseed = 7\nlong_term_bandwidth = false\n")
    settings = load_settings(files=[file], overrides={"plugins.bbr.initial_window": "32"}, environ={})
    made = Plugins().controller("bbr", settings.plugins["bbr"], mss=1448)
    assert isinstance(made, BbrController)
    assert made.window == 32 * 1448
    assert (made.name, made.kernel_name, made.api_version) == ("bbr", "bbr", API_VERSION)


def test_it_is_a_distribution_of_its_own_that_needs_the_core_only():
    rows = [row for row in installed() if row.name == "bbr"]
    assert [(row.group, row.dist, row.target) for row in rows] == [
        ("amst.congestion", "amst-cc-bbr", "amst_cc_bbr.plugin")
    ]
    assert importlib.metadata.requires("amst-cc-bbr") == ["amst-core<0.2,>=0.1"]


def test_it_works_when_it_is_checked():
    assert [report.error for report in Plugins.check() if report.plugin.name == "bbr"] == [None]


def test_the_entry_point_does_not_import_the_controller():
    code = "import sys, amst_cc_bbr.plugin; print('amst_cc_bbr.controller' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


def test_another_name_is_none_of_its_business():
    assert amst_make_controller("cubic", {}, 1448) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": -1}, "plugins.bbr.seed = -1 must be a whole number, 0 to"),
        ({"seed": True}, "plugins.bbr.seed = True must be a whole number"),
        ({"seed": "x"}, "plugins.bbr.seed = 'x' must be a whole number"),
        ({"initial_window": 0}, "plugins.bbr.initial_window = 0 must be a whole number, 1 to 1024"),
        ({"initial_window": 2.5}, "plugins.bbr.initial_window = 2.5 must be a whole number"),
        ({"long_term_bandwidth": 1}, "plugins.bbr.long_term_bandwidth = 1 must be true or false"),
        ({"gain": 2}, "plugins.bbr.gain is unknown; known are seed, initial_window, long_term_bandwidth"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_allowed(options, words):
    with pytest.raises(ConfigError) as caught:
        Plugins().controller("bbr", options, mss=1448)
    assert words in str(caught.value)


def test_every_fault_is_named_at_once():
    with pytest.raises(ConfigError) as caught:
        BbrOptions.checked({"seed": -1, "initial_window": "ten", "long_term_bandwidth": "no", "speed": 1})
    assert str(caught.value).count("plugins.bbr.") == 4


def test_a_segment_without_bytes_is_refused():
    with pytest.raises(UsageError, match="mss = 0"):
        BbrController({}, mss=0)


def test_it_exports_what_every_controller_does_and_its_own(feed):
    feed.cruise()
    feed.lose()
    state = feed.cc.state()
    every = {"algorithm", "cwnd", "ssthresh", "rtt", "min_rtt", "bandwidth", "max_bandwidth", "in_flight", "sent"}
    every |= {"acked", "lost", "loss_rate", "pacing_rate"}
    own = {"mode", "pacing_gain", "cwnd_gain", "btl_bw", "round_count", "cycle_index", "full_bw", "full_bw_count"}
    own |= {"full_bw_reached", "recovery", "packet_conservation", "prior_cwnd", "idle_restart", "extra_acked"}
    own |= {"lt_use_bw", "send_quantum"}
    assert set(state) == every | own
    assert (state["algorithm"], state["cwnd"], state["pacing_rate"]) == ("bbr", feed.cc.window, feed.cc.pacing_rate)
    assert (state["btl_bw"], state["min_rtt"], state["lost"]) == (feed.RATE, feed.RTT, feed.MSS)


def test_what_is_not_known_is_not_told():
    assert not {"btl_bw", "min_rtt", "rtt", "ssthresh", "bandwidth", "lt_bw"} & set(BbrController({}, mss=1).state())


SIZES = st.integers(0, 1 << 30)
TIMES = st.floats(0, 30)
SENT = st.tuples(st.just("sent"), TIMES, SIZES, SIZES, st.booleans())
LOST = st.tuples(st.just("lost"), TIMES, SIZES, SIZES, st.booleans(), TIMES)
ACKED = st.tuples(
    st.just("acked"), TIMES, SIZES, SIZES, st.booleans(), TIMES, st.none() | st.floats(1e-6, 100), SIZES,
    st.none() | st.floats(0, 1e12), SIZES,
)  # fmt: skip
SPURIOUS = st.tuples(st.just("spurious"), TIMES)


@given(st.lists(SENT | LOST | ACKED | SPURIOUS, max_size=60), st.integers(1, 65_536))
def test_whatever_it_is_told_there_is_a_window_and_a_rate(events, mss):
    controller, now, delivered = BbrController({}, mss=mss), 0.0, 0
    for kind, after, *rest in events:
        now += after
        if kind == "sent":
            size, in_flight, app_limited = rest
            controller.on_sent(now=now, size=size, in_flight=in_flight, app_limited=app_limited)
        elif kind == "lost":
            lost, in_flight, persistent, ago = rest
            controller.on_loss(now=now, sent_at=now - ago, lost=lost, in_flight=in_flight, persistent=persistent)
        elif kind == "spurious":
            controller.on_spurious_loss(now=now)
        else:
            acked, lost, app_limited, ago, rtt, in_flight, rate, back = rest
            delivered += acked
            controller.on_ack(
                AckSample(
                    now=now, sent_at=now - ago, acked=acked, lost=lost, rtt=rtt, in_flight=in_flight,
                    prior_in_flight=in_flight + acked, delivered=delivered, prior_delivered=max(delivered - back, 0),
                    delivery_rate=rate, app_limited=app_limited, round_start=False,
                )
            )  # fmt: skip
        assert controller.window >= mss
        assert 0 < controller.pacing_rate < math.inf
        assert all(isinstance(value, (int, float, str)) for value in controller.state().values())


def test_the_example_of_the_readme_runs(capsys):
    readme = Path(__file__).parents[1] / "README.md"
    (source,) = re.findall(r"^```python\n(.*?)^```", readme.read_text(), re.MULTILINE | re.DOTALL)
    exec(compile(source, str(readme), "exec"), {})
    words = capsys.readouterr().out.split()
    assert float(words[0]) > 90
    assert words[-1] == "probe_bw"
