"""What people and scripts get to read."""

from __future__ import annotations

import io
import json
import logging
import sys
import time

import pytest
from waiting import wait_until

from amst_core.cli import logs, output
from amst_core.cli.output import Failure, Report, clock, count, rate, size, summary
from amst_core.cli.progress import Display, Meter, words
from amst_core.interfaces import Mode
from amst_core.session.copying import CopyProgress
from amst_core.session.mode import ModeState


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"),
        (1536, "1.5 KiB"), (99.94 * 1024, "99.9 KiB"), (99.96 * 1024, "100 KiB"), (1023.4 * 1024, "1023 KiB"),
        (1023.6 * 1024, "1.0 MiB"), (1288490189, "1.2 GiB"), (5 << 50, "5.0 PiB"), (5000 << 50, "5000 PiB"),
    ],
)  # fmt: skip
def test_sizes(amount, text):
    assert size(amount) == text


def test_rates_counts_and_clocks():
    assert rate(1.5 * (1 << 30)) == "1.5 GiB/s"
    assert count(4321, "files") == "4 321 files"
    assert count(1234567, "files") == "1 234 567 files"
    assert [clock(s) for s in (0, 59.6, 61, 3723)] == ["0:00", "1:00", "1:01", "1:02:03"]


def report() -> Report:
    made = Report(ok=True, transport="tcp", streams=16, encrypted=True, verified=True)
    made.take_amount(1288490189, files=4321, seconds=0.84)
    return made


def test_the_summary_is_one_line():
    assert summary(report(), "copied", count_files=True) == (
        "copied 4 321 files, 1.2 GiB in 0.84 s (1.4 GiB/s) over 16 tcp streams, encrypted, verified"
    )
    plain = report()
    plain.encrypted, plain.streams = False, 1
    assert summary(plain, "sent", count_files=False) == (
        "sent 1.2 GiB in 0.84 s (1.4 GiB/s) over 1 tcp stream, in plaintext, verified"
    )


def test_no_time_is_no_rate():
    made = Report()
    made.take_amount(0, seconds=0.0)
    assert made.throughput_bytes_per_s == 0.0


def test_json_survives_names_that_are_no_text(capsys):
    made = report()
    made.failed.append(Failure("caf\udce9", "storage", "full"))
    output.print_json(made.as_dict())
    text = capsys.readouterr().out
    assert text.isascii()
    assert json.loads(text)["failed"] == [{"path": "caf\udce9", "kind": "storage", "message": "full"}]


def test_failures_name_their_file_once_and_do_not_flood(capsys):
    failed = [Failure(f"dir/{number}", "storage", "full") for number in range(30)]
    failed[0] = Failure("dir/0", "storage", "cannot write dir/0: full")
    output.complain_about(failed)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["amst: cannot write dir/0: full", "amst: dir/1: full"]
    assert len(lines) == 21
    assert lines[-1] == "amst: ... and 10 more (--json lists all)"


def test_the_rate_is_that_of_the_last_seconds():
    meter = Meter(now=0.0)
    assert meter.update(100, now=1.0) == 100
    for now in range(2, 8):
        meter.update(100 * now, now=float(now))
    assert meter.update(1700, now=8.0) == pytest.approx((1700 - 300) / 5)
    assert meter.update(1700, now=100.0) == pytest.approx(0.0, abs=1)
    assert meter.update(0, now=101.0) == 0.0


def test_no_time_passed_is_no_rate():
    assert Meter(now=1.0).update(5, now=1.0) == 0.0


def test_progress_in_words():
    known = CopyProgress(1 << 29, 1 << 30, 1200, 4321)
    assert words(known, float(1 << 28), "16 tcp streams") == (
        "50 %, 512 MiB of 1.0 GiB, 1 200 of 4 321 files, 256 MiB/s, ETA 0:02, 16 tcp streams"
    )
    assert words(known, 0.0, "", percent=False) == "512 MiB of 1.0 GiB, 1 200 of 4 321 files, 0 bytes/s"
    assert words(CopyProgress(1 << 20, None, 3, None), 1024.0, "") == "1.0 MiB, 1.0 KiB/s"
    assert words(CopyProgress(0, 0, 0, 1), 0.0, "").startswith("100 %, 0 bytes of 0 bytes")


class View:
    """Notes what it is asked to draw; fails from the second time on if it should."""

    every_s = 0.001

    def __init__(self, *, fails: bool = False) -> None:
        self.drawn: list[CopyProgress] = []
        self.closed = False
        self._fails = fails

    def draw(self, progress, bytes_per_s, streams):
        self.drawn.append(progress)
        if self._fails:
            raise BrokenPipeError

    def close(self):
        self.closed = True
        if self._fails:
            raise BrokenPipeError


class Numbers:
    active_streams = 3
    transport_type = "tcp"


class Session:
    switches = 0

    def metrics(self):
        return Numbers()

    @property
    def mode(self):
        return ModeState(Mode.INTERNET, "", time.monotonic(), self.switches, None, forced_by_peer=False, tier=3)


@pytest.mark.parametrize("fails", [False, True])
def test_a_display_draws_the_latest_state_and_its_troubles_stay_its_own(fails):

    view = View(fails=fails)
    display = Display(view, Session())  # type: ignore[arg-type]
    try:
        display.update(CopyProgress(1, 2, 0, 1))
        wait_until(lambda: view.drawn, "a drawing")
        display.update(CopyProgress(2, 2, 1, 1))
        if not fails:
            wait_until(lambda: view.drawn[-1].bytes_done == 2, "the latest state")
    finally:
        display.close()
    assert view.closed
    assert not fails or len(view.drawn) == 1


def test_a_change_of_the_mode_is_shown_for_a_while(monkeypatch):
    drawn: list[str] = []

    class View:
        every_s = 0.01

        def draw(self, progress, bytes_per_s, streams):
            drawn.append(streams)

        def close(self):
            pass

    session = Session()
    display = Display(View(), session)  # type: ignore[arg-type]
    try:
        display.update(CopyProgress(1, 2, 0, 1))
        wait_until(lambda: drawn and drawn[-1] == "3 tcp streams", "what is usual")
        session.switches = 1
        wait_until(lambda: drawn[-1] == "3 tcp streams, now internet", "the news")
        monkeypatch.setattr("amst_core.cli.progress._NEWS_S", -1.0)
        wait_until(lambda: drawn[-1] == "3 tcp streams", "what is usual again")
    finally:
        display.close()


@pytest.mark.parametrize(
    ("verbose", "shown"),
    [(0, ["loud"]), (1, ["loud", "said"]), (2, ["loud", "said", "whispered"]), (5, ["loud", "said", "whispered"])],
)
def test_more_is_logged_when_asked_for(verbose, shown, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    logs.configure(verbose)
    logger = logging.getLogger("amst.test")
    logger.warning("loud %s", "words")
    logger.info("said")
    logger.debug("whispered")
    text = stream.getvalue()
    assert [word for word in ("loud", "said", "whispered") if word in text] == shown
    assert "warning" in text
    assert "loud words" in text
    assert "amst.test" in text


def test_configuring_logs_twice_says_nothing_twice(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    logs.configure(0)
    logs.configure(0)
    logging.getLogger("amst").warning("once")
    assert stream.getvalue().count("once") == 1


def test_a_logged_exception_shows_no_local_variables(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    logs.configure(0)

    def fail(secret):
        raise ZeroDivisionError("the reason")

    try:
        fail("hunter2" + "x")
    except ZeroDivisionError:
        logging.getLogger("amst").exception("it failed")
    assert "ZeroDivisionError: the reason" in stream.getvalue()
    assert "hunter2x" not in stream.getvalue()
