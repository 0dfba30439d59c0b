"""NewReno, the controller of the kit: what the rules for controllers of any kind leave open."""

from __future__ import annotations

from amst_core.interfaces import AckSample
from amst_core.testing import RenoController

MSS = 1000


def ack(controller: RenoController, *, now: float, sent_at: float, packets: int = 1, marked: int = 0) -> None:
    """So many packets are acknowledged while the window is full."""
    acked, window = packets * MSS, controller.window
    controller.on_ack(
        AckSample(
            now, sent_at, acked=acked, lost=0, rtt=now - sent_at, in_flight=window - acked, prior_in_flight=window,
            delivered=acked, prior_delivered=0, delivery_rate=None, app_limited=False, round_start=False,
            ecn_ce=marked * MSS,
        )
    )  # fmt: skip


def lose(controller: RenoController, *, now: float, sent_at: float, persistent: bool = False) -> None:
    controller.on_loss(now=now, sent_at=sent_at, lost=MSS, in_flight=0, persistent=persistent)


def ssthresh(controller: RenoController) -> float | str | None:
    return controller.state().get("ssthresh")


def of(packets: int) -> RenoController:
    """In slow start with a window of so many packets, 10 or more."""
    controller = RenoController(MSS)
    for _ in range(packets - 10):
        ack(controller, now=0.1, sent_at=0.0)
    assert (controller.window, ssthresh(controller)) == (packets * MSS, None)
    return controller


def test_a_timeout_of_what_a_timeout_sent_again_leaves_ssthresh_alone() -> None:
    controller = of(100)
    for now in (1.0, 2.0, 4.0):
        lose(controller, now=now, sent_at=now - 0.5, persistent=True)
        assert (controller.window, ssthresh(controller)) == (MSS, 50 * MSS)
    for _ in range(19):
        ack(controller, now=5.0, sent_at=4.0)
    assert controller.window == 20 * MSS
    lose(controller, now=6.0, sent_at=5.0, persistent=True)
    assert (controller.window, ssthresh(controller)) == (MSS, 10 * MSS)


def test_what_left_when_it_reacted_is_of_the_next_flight() -> None:
    controller = of(100)
    lose(controller, now=1.0, sent_at=0.5)
    assert controller.window == 50 * MSS
    lose(controller, now=1.1, sent_at=0.9)
    ack(controller, now=1.1, sent_at=0.9, packets=50)
    assert controller.window == 50 * MSS
    ack(controller, now=1.2, sent_at=1.0, packets=50)
    assert controller.window == 51 * MSS
    lose(controller, now=1.2, sent_at=1.0)
    assert controller.window == 51 * MSS // 2


def test_marks_halve_the_window_once_in_a_round_trip() -> None:
    controller = of(100)
    for sent_at in (0.5, 0.6, 0.9):
        ack(controller, now=1.0, sent_at=sent_at, marked=1)
        assert (controller.window, ssthresh(controller)) == (50 * MSS, 50 * MSS)
    lose(controller, now=1.05, sent_at=0.95)
    assert controller.window == 50 * MSS
    ack(controller, now=1.1, sent_at=1.0, marked=1)
    assert controller.window == 25 * MSS
