"""The rules of `CongestionController`, each tried by hand or on a simulated path; for controllers of any kind."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Final

from ..interfaces import API_VERSION, AckSample, CongestionController
from .conformance import Conformance, Counted, Rule, Trial, attempt, chosen
from .controller_trial import BDP, DELAY, MSS, RATE, ControllerTrial, Feed, MakeController, shifted, tell
from .simulator import Bernoulli, FluidFlow

PATIENCE_S: Final = 60.0
"""How long the trial of one rule may take; it is so much that only a controller that hangs needs it."""

_MANY: Final = 16
_SETTLED_S: Final = 1.0
"""How long what is in use may take to go: other parts of the process may be at work."""
_LARGEST_START: Final = 64
_LARGEST_AFTER_TIMEOUT: Final = 4


def check_controller(
    make_controller: MakeController, *, patience_s: float = PATIENCE_S, only: Collection[str] | None = None
) -> Conformance:
    """Try every rule of `CongestionController` on controllers that ``make_controller`` makes, given the packets' size.

    Deterministic, up to what a controller does at random in spite of the rules; takes a few seconds of one core.

    Args:
        patience_s: how long each rule may take.
        only: names of rules to try, None: all.

    Raises:
        ConformanceError: a rule is broken; no further one is tried.
        UsageError: ``only`` names a rule that is none.
    """
    held: list[str] = []
    for rule in chosen(CONTROLLER_RULES, only):
        with ControllerTrial(rule.name, patience_s, make_controller) as trial:
            attempt(trial, rule, "controller")
            held.append(rule.name)
    return Conformance(tuple(held), {})


# ---- what it says of itself -----------------------------------------------------------------------


def _names(t: ControllerTrial) -> None:
    controller = t.controller()
    t.check(
        isinstance(controller, CongestionController), "make_controller to return a CongestionController", controller
    )
    t.check(isinstance(controller.name, str) and controller.name, "a name", repr(controller.name))
    t.check(
        controller.api_version == API_VERSION,
        f"the api_version of this core, {API_VERSION}", repr(controller.api_version),
    )  # fmt: skip
    kernel = controller.kernel_name
    t.check(kernel is None or (isinstance(kernel, str) and kernel), "a kernel_name, or None", repr(kernel))


def _start(t: ControllerTrial) -> None:
    for mss in (536, MSS, 8948):
        window = t.controller(mss).window
        t.check(
            isinstance(window, int) and mss <= window <= _LARGEST_START * mss,
            f"a window of 1 to {_LARGEST_START} segments of {mss} bytes, in bytes", repr(window),
        )  # fmt: skip


def _resources(t: ControllerTrial) -> None:
    count = Counted(Trial(t.rule, min(t.patience_s, _SETTLED_S)))
    feeds = [t.feed() for _ in range(_MANY)]
    for feed in feeds:
        feed.rounds(2)
    count.nothing_of(_MANY, f"{_MANY} controllers")


def _known_state(t: ControllerTrial) -> None:
    feed = t.feed()
    feed.rounds(4)
    feed.lose(feed.send()[0])
    state = feed.controller.state()
    expected = {
        "algorithm": feed.controller.name,
        "cwnd": feed.controller.window,
        "in_flight": feed.in_flight,
        "sent": feed.sent,
        "acked": feed.acked,
        "lost": feed.lost,
        "loss_rate": feed.lost / feed.sent,
    }
    if feed.controller.pacing_rate is not None:
        expected["pacing_rate"] = feed.controller.pacing_rate
    for name, value in expected.items():
        seen = state.get(name)
        same = math.isclose(seen, value) if isinstance(seen, float) and isinstance(value, float) else seen == value
        t.check(same, f"state() to have {name} = {value!r}", repr(seen))
    for name in ("rtt", "min_rtt", "bandwidth", "max_bandwidth"):
        t.check(isinstance(state.get(name), float), f"state() to have {name}, which is known", repr(state.get(name)))


def _plain_state(t: ControllerTrial) -> None:
    feed = t.feed()

    def look(when: str) -> None:
        for name, value in feed.controller.state().items():
            plain = isinstance(value, str) or (type(value) in (int, float) and math.isfinite(value))
            t.check(
                isinstance(name, str) and plain, f"state() of texts and finite numbers, {when}", f"{name}: {value!r}"
            )

    look("before anything was sent")
    packets = feed.send(4)
    look("before anything was acknowledged")
    feed.now += feed.rtt
    feed.ack(packets[0])
    look("after the first acknowledgement")
    feed.rounds(3)
    packets = feed.send()
    feed.lose(packets[0])
    look("after a loss")
    feed.time_out(packets[-1])
    look("after a timeout")


# ---- what it may be told ----------------------------------------------------------------------------


def _odd_acks(t: ControllerTrial) -> None:
    odd: dict[str, Callable[[AckSample], AckSample]] = {
        "without rtt": lambda sample: replace(sample, rtt=None),
        "without delivery_rate": lambda sample: replace(sample, delivery_rate=None),
        "without either": lambda sample: replace(sample, rtt=None, delivery_rate=None),
        "of nothing": lambda sample: replace(sample, acked=0),
        "of all in flight": lambda sample: replace(sample, in_flight=0),
        "with app_limited": lambda sample: replace(sample, app_limited=True),
        "that begins a round trip": lambda sample: replace(sample, round_start=True),
        "with ecn_ce": lambda sample: replace(sample, ecn_ce=sample.acked),
        "of a round trip of no time": lambda sample: replace(sample, rtt=0.0, sent_at=sample.now),
    }
    for what, change in odd.items():
        for rounds in (0, 4):
            feed = t.feed()
            feed.rounds(rounds)
            packets = feed.send()
            feed.now += feed.rtt
            for packet in packets[:4]:  # all at the same time
                feed.controller.on_ack(change(feed.sample(packet)))
                t.window(feed.controller, f"after an acknowledgement {what}")
            feed.rounds(1)
            feed.controller.state()


def _one_segment(t: ControllerTrial) -> None:
    feed = t.feed()
    feed.rounds(2)
    for number in range(64):
        packets = feed.send(3) or t.fail(
            "room for a packet when nothing is in flight", f"{feed.controller.window} bytes"
        )
        feed.now += feed.rtt
        for packet in packets:
            feed.lose(packet)
            t.window(feed.controller, f"after {number + 1} flights that were lost")
    for number in range(8):
        packet = feed.send(1)[0]
        feed.now += 1.0
        feed.time_out(packet)
        t.window(feed.controller, f"after {number + 1} timeouts")


def _pacing(t: ControllerTrial) -> None:
    feed = t.feed()
    t.pacing(feed.controller, "before anything is known")
    packets = feed.send()
    t.pacing(feed.controller, "before anything is acknowledged")
    feed.now += feed.rtt
    for packet in packets:
        feed.ack(packet)
        t.pacing(feed.controller, "after the first round trip")
    feed.rounds(4)
    lost = feed.send()
    feed.now += feed.rtt
    feed.lose(lost[0])
    t.pacing(feed.controller, "after a loss")
    feed.time_out(lost[-1])
    t.pacing(feed.controller, "after a timeout")
    feed = t.feed()
    feed.time_out(feed.send()[-1])
    t.pacing(feed.controller, "after a timeout before anything was acknowledged")


def _same(t: ControllerTrial) -> None:
    told = t.recording()
    again = t.controller()
    for number, (call, arguments, window, pacing) in enumerate(told):
        if number == len(told) // 2:
            time.sleep(0.05)  # a clock would go on
        tell(again, call, arguments)
        t.check(
            (again.window, again.pacing_rate) == (window, pacing),
            f"window and pacing rate {(window, pacing)} after call {number} ({call}), as from another controller that "
            "was told the same",
            str((again.window, again.pacing_rate)),
        )  # fmt: skip


def _any_clock(t: ControllerTrial) -> None:
    near, far = t.controller(), t.controller()
    by = 2.0**20
    for number, (call, arguments, *_) in enumerate(t.recording()):
        tell(near, call, shifted(arguments, 0.0))
        tell(far, call, shifted(arguments, by))
        for what, one, other in (
            ("window", near.window, far.window),
            ("pacing rate", near.pacing_rate, far.pacing_rate),
        ):
            same = one == other or (one is not None and other is not None and math.isclose(one, other, rel_tol=1e-3))
            t.check(
                same or (what == "window" and abs(near.window - far.window) <= MSS),
                f"a {what} of {one} after call {number} ({call}), as when all times are {by:g} s earlier", other,
            )  # fmt: skip


def _independent(t: ControllerTrial) -> None:
    told = t.recording()
    watched, other = t.controller(), t.feed()
    for number, (call, arguments, window, pacing) in enumerate(told):
        tell(watched, call, arguments)
        if number % 64 == 0:
            other.rounds(1)
        elif number % 64 == 32 and (packets := other.send()):
            other.lose(packets[0])
            other.time_out(packets[-1])
        t.check(
            (watched.window, watched.pacing_rate) == (window, pacing),
            f"window and pacing rate {(window, pacing)} after call {number} ({call}), as without another controller",
            str((watched.window, watched.pacing_rate)),
        )  # fmt: skip


# ---- how it reacts --------------------------------------------------------------------------------


def _once(t: ControllerTrial) -> None:
    feed = t.feed()
    feed.rounds(4)
    packets = feed.send()
    feed.now += feed.rtt
    lost, kept = packets[: len(packets) // 2 : 2], packets[1 : len(packets) // 2 : 2]
    feed.lose(lost[0])
    first = feed.controller.window
    for more, packet in zip(lost[1:], kept, strict=False):
        feed.now += feed.rtt / 1000
        feed.lose(more)
        feed.ack(packet)
    gone = len(lost) * MSS  # with the first one, of which a controller may take account with the next sample only
    t.check(
        feed.controller.window >= first - gone,
        f"a window of at least {first} bytes, as after the flight's first loss, less {gone} that were lost",
        feed.controller.window,
    )  # fmt: skip
    # The next flight begins with what left when the controller reacted: it makes no difference whether then, or after.
    at_once, after = _next_flight(t, 0.0), _next_flight(t, Feed.rtt / 1e6)
    t.check(
        abs(at_once - after) <= MSS,
        f"a window of {after} bytes when the next flight, which left at the time of the reaction, loses a packet, as "
        "when it left a little later",
        at_once,
    )  # fmt: skip


def _next_flight(t: ControllerTrial, after: float) -> int:
    """The window when a flight lost a packet, and so did the next one, which left ``after`` seconds later."""
    feed = t.feed()
    feed.rounds(4)
    packets = feed.send()
    feed.now += feed.rtt
    feed.lose(packets[0])
    for packet in packets[1:]:
        feed.ack(packet)
    feed.now += after
    packets = feed.send()
    feed.now += feed.rtt
    feed.lose(packets[0])
    for packet in packets[1:]:
        feed.ack(packet)
    return feed.controller.window


def _persistent(t: ControllerTrial) -> None:
    feed = t.feed()
    feed.rounds(5)
    packets = feed.send()
    feed.now += 1.0
    before = feed.controller.window
    feed.time_out(packets[-1])
    t.check(
        feed.controller.window <= _LARGEST_AFTER_TIMEOUT * MSS,
        f"a window of at most {_LARGEST_AFTER_TIMEOUT} segments after persistent congestion, {before} bytes before",
        feed.controller.window,
    )  # fmt: skip


def _spurious(t: ControllerTrial) -> None:
    feed = t.feed()
    feed.controller.on_spurious_loss(now=feed.now)
    t.sane(feed.controller, "after a spurious loss that nobody had told of")
    feed.rounds(5)
    packets = feed.send()
    for persistent in (False, True):
        feed.now += 1.0
        if persistent:
            feed.time_out(packets[-1])
        else:
            feed.lose(packets[0])
        window = feed.controller.window
        feed.controller.on_spurious_loss(now=feed.now + feed.rtt)
        t.check(
            feed.controller.window >= window,
            f"a window of at least {window} bytes, as before the loss was found spurious", feed.controller.window,
        )  # fmt: skip


# ---- on a path ------------------------------------------------------------------------------------


def _starts_fast(t: ControllerTrial) -> None:
    controller = t.controller()
    before = controller.window
    flow = FluidFlow(controller, rtt=2 * DELAY, mss=MSS, acks_per_round=256)
    flow.run(seconds=2 * DELAY * 10)
    t.check(
        controller.window >= 4 * before,
        f"a window of at least 4 times the initial {before} bytes after ten round trips on a clear path",
        controller.window,
    )  # fmt: skip


def _fills(t: ControllerTrial) -> None:
    simulation, (flow,) = t.path()
    simulation.run(until=30.0)
    _uses(t, flow.goodput(5.0, 30.0), 0.9, RATE, "from 5 to 30 s, alone on a path with one BDP of buffer")


def _uses(t: ControllerTrial, goodput: float, share: float, rate: float, when: str) -> None:
    t.check(
        goodput >= share * rate,
        f"at least {share:.0%} of the rate {when}",
        f"{goodput / rate:.1%}",
    )  # fmt: skip


def _bounded_loss(t: ControllerTrial) -> None:
    simulation, (flow,) = t.path()
    simulation.run(until=10.0)
    sent, dropped = flow.sent, flow.dropped
    simulation.run(until=30.0)
    share = (flow.dropped - dropped) / (flow.sent - sent)
    t.check(share <= 0.05, "at most 5 % dropped by the queue from 10 to 30 s, alone on a path", f"{share:.1%}")


def _app_limited(t: ControllerTrial) -> None:
    simulation, (flow,) = t.path(app_rate=RATE / 10)
    simulation.run(until=20.0)
    t.check(
        flow.controller.window <= 4 * BDP,
        f"a window of at most 4 BDP ({4 * BDP:.0f} bytes) after 20 s with a tenth of the rate to send",
        flow.controller.window,
    )  # fmt: skip


def _rate_falls(t: ControllerTrial) -> None:
    simulation, (flow,) = t.path()
    simulation.at(10.0, lambda: simulation.link.set(rate=RATE / 4))
    simulation.run(until=30.0)
    sent, dropped = flow.sent, flow.dropped
    simulation.run(until=40.0)
    share = (flow.dropped - dropped) / (flow.sent - sent)
    _uses(t, flow.goodput(30.0, 40.0), 0.8, RATE / 4, "from 20 s after it fell to a quarter")
    t.check(
        share <= 0.05, "at most 5 % dropped by the queue from 20 s after the rate fell to a quarter", f"{share:.1%}"
    )


def _rate_rises(t: ControllerTrial) -> None:
    simulation, (flow,) = t.path()
    simulation.at(10.0, lambda: simulation.link.set(rate=4 * RATE))
    simulation.run(until=30.0)
    _uses(t, flow.goodput(20.0, 30.0), 0.7, 4 * RATE, "from 10 s after it rose fourfold")


def _outage(t: ControllerTrial) -> None:
    simulation, (flow,) = t.path()
    simulation.at(10.0, lambda: simulation.link.set(loss=Bernoulli(1.0)))
    simulation.at(13.0, lambda: simulation.link.set(loss=None))
    simulation.run(until=35.0)
    _uses(t, flow.goodput(25.0, 35.0), 0.8, RATE, "from 12 s after an outage of 3 s")


def _shares(t: ControllerTrial) -> None:
    simulation, _ = t.path(flows=2, apart=5.0)
    simulation.run(until=90.0)
    fairness = simulation.fairness(45.0, 90.0)
    t.check(fairness >= 0.8, "Jain's index of two flows from 45 to 90 s to be at least 0.8", f"{fairness:.2f}")


CONTROLLER_RULES: Final[tuple[Rule[ControllerTrial], ...]] = (
    Rule("names-its-algorithm", "name, api_version and kernel_name are there and of their types", _names),
    Rule("starts-with-a-window", "a new controller allows 1 to 64 segments, in bytes, whatever their size", _start),
    Rule("holds-no-resources", "controllers start no thread and open no descriptor", _resources),
    Rule("state-tells-what-all-tell", "state has what every controller has, and it is true", _known_state),
    Rule("state-is-plain", "state has texts and finite numbers at any time, nothing else", _plain_state),
    Rule("survives-odd-acks", "samples may lack rtt and rate, come at once, and acknowledge nothing or all", _odd_acks),
    Rule(
        "one-segment-at-least", "the window is whole bytes and has room for one segment, whatever is lost", _one_segment
    ),
    Rule("pacing-lets-packets-go", "the pacing rate is None, or finite and above 0, at any time", _pacing),
    Rule("same-in-same-out", "two controllers that are told the same do the same: no clock, no chance", _same),
    Rule("any-clock-will-do", "when all times are later by a constant, nothing else changes", _any_clock),
    Rule("controllers-are-separate", "what one controller is told changes no other", _independent),
    Rule(
        "once-per-round-trip",
        "further losses of a flight cost no more than what was lost; the next flight begins with the reaction",
        _once,
    ),
    Rule("gives-up-on-timeouts", "persistent congestion leaves a window of at most 4 segments", _persistent),
    Rule("spurious-loss-costs-nothing", "on_spurious_loss never makes the window smaller", _spurious),
    Rule("starts-fast", "on a clear path the window is 4 times the initial one after ten round trips", _starts_fast),
    Rule("fills-the-path", "alone with one BDP of buffer a flow uses 90 % of the rate", _fills),
    Rule("leaves-little-behind", "alone with one BDP of buffer the queue drops at most 5 %", _bounded_loss),
    Rule(
        "unused-window-stays-small",
        "while the application has little to send, the window stays below 4 BDP",
        _app_limited,
    ),
    Rule(
        "follows-the-rate-down",
        "20 s after the rate fell to a quarter it is used, with at most 5 % dropped",
        _rate_falls,
    ),
    Rule("follows-the-rate-up", "10 s after the rate rose fourfold 70 % of it is used", _rate_rises),
    Rule("comes-back-from-an-outage", "12 s after an outage of 3 s, 80 % of the rate is used", _outage),
    Rule("shares-with-itself", "of two flows, one later than the other, none starves (Jain's index 0.8)", _shares),
)
