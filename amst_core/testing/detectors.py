"""The rules of `ModeDetector`, each tried on paths that are made up; for detectors of any kind."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from typing import Final

from ..interfaces import API_VERSION, Mode, ModeDecision, ModeDetector, PathSample
from .conformance import Conformance, Counted, Rule, Trial, attempt, chosen

MakeDetector = Callable[[], ModeDetector]
"""Makes a new detector."""

PATIENCE_S: Final = 60.0
"""How long the trial of one rule may take; it is so much that only a detector that hangs needs it."""

STEP_S: Final = 0.5
"""From one sample to the next, in seconds."""

SEEN_WITHIN_S: Final = 20.0
"""How soon a detector must have seen what a path has become."""

_MANY: Final = 16
_SETTLED_S: Final = 1.0
_LONGEST_REASON: Final = 400
_MINUTE_S: Final = 60.0
_START: Final = 1000.0

DATACENTER: Final = PathSample(0.0003, 1.2e9, 0.0)
INTERNET: Final = PathSample(0.150, 6e6, 0.0)
UNKNOWN: Final = PathSample(None, None, None)
"""Paths that nobody can mistake, and a session that sends nothing."""


def check_detector(
    make_detector: MakeDetector, *, patience_s: float = PATIENCE_S, only: Collection[str] | None = None
) -> Conformance:
    """Try every rule of `ModeDetector` on detectors that ``make_detector`` makes.

    Deterministic, up to what a detector does at random in spite of the rules; takes a second or two of one core.

    Args:
        patience_s: how long each rule may take.
        only: names of rules to try, None: all.

    Raises:
        ConformanceError: a rule is broken; no further one is tried.
        UsageError: ``only`` names a rule that is none.
    """
    held: list[str] = []
    for rule in chosen(DETECTOR_RULES, only):
        with DetectorTrial(rule.name, patience_s, make_detector) as trial:
            attempt(trial, rule, "detector")
            held.append(rule.name)
    return Conformance(tuple(held), {})


class DetectorTrial(Trial):
    """One rule of `ModeDetector`, tried on detectors that the caller makes."""

    def __init__(self, rule: str, patience_s: float, make_detector: MakeDetector) -> None:
        super().__init__(rule, patience_s)
        self._make = make_detector

    def detector(self) -> ModeDetector:
        """A new one."""
        return self._make()

    def watch(self) -> _Watch:
        """A new one, and the time; what it says is written down."""
        return _Watch(self, self.detector())


class _Watch:
    """Shows samples to a detector, two a second."""

    def __init__(self, trial: DetectorTrial, detector: ModeDetector) -> None:
        self._trial = trial
        self._detector = detector
        self.now = _START
        self.changes: list[float] = []
        self.mode: Mode | None = None

    def show(self, sample: PathSample) -> ModeDecision:
        """The answer to one sample, which must be one."""
        self.now += STEP_S
        decision = self._detector.update(sample, now=self.now)
        self._trial.check(
            isinstance(decision, ModeDecision) and isinstance(decision.mode, Mode),
            f"a ModeDecision with a Mode, of {sample}", repr(decision),
        )  # fmt: skip
        if self.mode is not None and decision.mode is not self.mode:
            self.changes.append(self.now)
        self.mode = decision.mode
        return decision

    def stay(self, sample: PathSample, seconds: float) -> ModeDecision:
        """The last answer, after the path was like that for so long."""
        for _ in range(max(1, round(seconds / STEP_S))):
            decision = self.show(sample)
        return decision


def _shown(sample: PathSample) -> str:
    def part(value: float | None, scale: float, unit: str) -> str:
        return f"unknown {unit}" if value is None else f"{value * scale:.4g} {unit}"

    return (
        f"{part(sample.latency_s, 1e3, 'ms')}, {part(sample.bandwidth, 8e-6, 'Mbit/s')},"
        f" {part(sample.loss, 100, '% lost')}"
    )


def _mixture() -> Iterator[PathSample]:
    """A path with everything that may happen to one, for 200 s."""
    chance = random.Random(7)
    yield UNKNOWN
    for path in (INTERNET, DATACENTER, PathSample(0.02, 3e8, 0.0), PathSample(0.001, 2e6, 0.03), UNKNOWN) * 4:
        for _ in range(20):
            latency, bandwidth, loss = path.latency_s, path.bandwidth, path.loss
            yield PathSample(
                None if latency is None or chance.random() < 0.2 else latency * chance.uniform(1, 3),
                None if bandwidth is None or chance.random() < 0.3 else bandwidth * chance.uniform(0.2, 1.1),
                None if loss is None or chance.random() < 0.5 else loss,
            )


def _noisy(path: PathSample, seconds: float, seed: int) -> Iterator[PathSample]:
    """``path`` as measuring it shows it: round trips above the shortest, bandwidth about what it is, some loss."""
    chance = random.Random(seed)
    for _ in range(round(seconds / STEP_S)):
        latency, bandwidth, loss = path.latency_s, path.bandwidth, path.loss
        yield PathSample(
            None if latency is None else latency * (1 + chance.expovariate(10)),
            None if bandwidth is None else bandwidth * chance.gauss(1.0, 0.06),
            None if loss is None else max(0.0, chance.gauss(loss, loss * 0.4)),
        )


# ---- what it says of itself, and how it answers ---------------------------------------------------


def _names(t: DetectorTrial) -> None:
    detector = t.detector()
    t.check(isinstance(detector, ModeDetector), "make_detector to return a ModeDetector", detector)
    t.check(isinstance(detector.name, str) and detector.name, "a name", repr(detector.name))
    t.check(
        detector.api_version == API_VERSION,
        f"the api_version of this core, {API_VERSION}", repr(detector.api_version),
    )  # fmt: skip


def _resources(t: DetectorTrial) -> None:
    count = Counted(Trial(t.rule, min(t.patience_s, _SETTLED_S)))
    watches = [t.watch() for _ in range(_MANY)]
    for watch in watches:
        watch.stay(DATACENTER, 5.0)
    count.nothing_of(_MANY, f"{_MANY} detectors")


def _answers(t: DetectorTrial) -> None:
    for known in range(8):
        sample = PathSample(
            *(value if known >> bit & 1 else None for bit, value in enumerate((0.02, 1e8, 0.002)))
        )  # fmt: skip
        t.watch().show(sample)
    watch = t.watch()
    for sample in _mixture():
        watch.show(sample)


def _reasons(t: DetectorTrial) -> None:
    watch = t.watch()
    for sample in _mixture():
        reason = watch.show(sample).reason
        t.check(
            isinstance(reason, str) and reason and reason.isprintable() and len(reason) <= _LONGEST_REASON,
            f"a reason in one line of at most {_LONGEST_REASON} characters, of {_shown(sample)}", repr(reason),
        )  # fmt: skip


def _tiers(t: DetectorTrial) -> None:
    for latency_s, tier in ((0.001, 1), (0.02, 2), (0.1, 3), (0.3, 4)):
        seen = t.watch().stay(PathSample(latency_s, None, None), SEEN_WITHIN_S).tier
        t.check(seen == tier, f"tier {tier} of a path of {latency_s * 1e3:g} ms", seen)


# ---- what it may depend on -------------------------------------------------------------------------


def _decisions(
    detector: ModeDetector, samples: Iterable[PathSample], start: float
) -> list[tuple[Mode, int | None]]:
    decisions = [detector.update(s, now=start + at * STEP_S) for at, s in enumerate(samples)]
    return [(decision.mode, decision.tier) for decision in decisions]


def _alike(t: DetectorTrial, one: list[tuple[Mode, int | None]], other: list[tuple[Mode, int | None]]) -> None:
    for at, (first, second) in enumerate(zip(one, other, strict=True)):
        t.check(first == second, f"the same at sample {at}", f"{first} and {second}")


def _same(t: DetectorTrial) -> None:
    _alike(t, _decisions(t.detector(), _mixture(), _START), _decisions(t.detector(), _mixture(), _START))


def _any_clock(t: DetectorTrial) -> None:
    later = _START + 2.0**20
    _alike(t, _decisions(t.detector(), _mixture(), _START), _decisions(t.detector(), _mixture(), later))


def _separate(t: DetectorTrial) -> None:
    alone = _decisions(t.detector(), _mixture(), _START)
    one, other = t.detector(), t.detector()
    beside = []
    for at, sample in enumerate(_mixture()):
        now = _START + at * STEP_S
        decision = one.update(sample, now=now)
        beside.append((decision.mode, decision.tier))
        other.update(INTERNET if at % 40 < 20 else DATACENTER, now=now)
    _alike(t, alone, beside)


# ---- what it finds -----------------------------------------------------------------------------------


def _expect(t: DetectorTrial, watch: _Watch, path: PathSample, mode: Mode, when: str) -> None:
    decision = watch.stay(path, SEEN_WITHIN_S)
    t.check(
        decision.mode is mode,
        f"{mode.value} {SEEN_WITHIN_S:g} s after {when} ({_shown(path)})", f"{decision.mode.value}: {decision.reason}",
    )  # fmt: skip


def _knows_a_datacenter(t: DetectorTrial) -> None:
    _expect(t, t.watch(), DATACENTER, Mode.DATACENTER, "the beginning")


def _knows_the_internet(t: DetectorTrial) -> None:
    _expect(t, t.watch(), INTERNET, Mode.INTERNET, "the beginning")


def _follows(t: DetectorTrial) -> None:
    watch = t.watch()
    watch.stay(DATACENTER, _MINUTE_S)
    for _ in range(2):
        _expect(t, watch, INTERNET, Mode.INTERNET, "the path became the internet's")
        watch.stay(INTERNET, _MINUTE_S)
        _expect(t, watch, DATACENTER, Mode.DATACENTER, "the path became a datacenter's")
        watch.stay(DATACENTER, _MINUTE_S)


# ---- what must not move it ---------------------------------------------------------------------------


def _unknown(t: DetectorTrial) -> None:
    for path in (DATACENTER, INTERNET):
        watch = t.watch()
        before = watch.stay(path, _MINUTE_S).mode
        after = watch.stay(UNKNOWN, 2 * _MINUTE_S)
        t.check(
            after.mode is before and not watch.changes,
            f"{before.value} as before while nothing is sent for two minutes ({_shown(path)})",
            f"{after.mode.value}: {after.reason}",
        )  # fmt: skip


def _odd_one(t: DetectorTrial) -> None:
    for path, odd in ((DATACENTER, INTERNET), (DATACENTER, replace(DATACENTER, loss=0.5))):
        watch = t.watch()
        before = watch.stay(path, _MINUTE_S).mode
        decision = watch.show(odd)
        for _ in range(20):
            t.check(
                decision.mode is before,
                f"{before.value} in spite of one sample of {_shown(odd)} among those of {_shown(path)}",
                f"{decision.mode.value}: {decision.reason}",
            )  # fmt: skip
            decision = watch.show(path)


def _steady(t: DetectorTrial) -> None:
    latencies = [0.0005 * 1.3**step for step in range(24)]  # 0.5 to 209 ms
    rates = [12.5e6 * 1.35**step for step in range(16)]  # 0.1 to 9 Gbit/s
    paths = [PathSample(latency, None, None) for latency in latencies]
    paths += [PathSample(0.001, rate, 0.0) for rate in rates]
    paths += [PathSample(0.02, 5e8, loss) for loss in (0.004, 0.007, 0.009, 0.01, 0.011, 0.013, 0.02)]
    paths += [PathSample(latency, 1.1e8, 0.01) for latency in (0.0095, 0.0115, 0.041, 0.049)]
    for number, path in enumerate(paths):
        watch = t.watch()
        for sample in _noisy(path, 5 * _MINUTE_S, number):
            watch.show(sample)
        for one, other in zip(watch.changes, watch.changes[1:], strict=False):
            t.check(
                other - one >= _MINUTE_S,
                f"at most one change a minute on a path that is about the same ({_shown(path)})",
                f"changes {other - one:g} s apart",
            )  # fmt: skip


DETECTOR_RULES: Final[tuple[Rule[DetectorTrial], ...]] = (
    Rule("detector-names-itself", "name and api_version are there and of their types", _names),
    Rule("detector-holds-no-resources", "detectors start no thread and open no descriptor", _resources),
    Rule("answers-every-sample", "update returns a ModeDecision whatever is known, from the first sample on", _answers),
    Rule("tells-its-reason", "each decision says in one line why", _reasons),
    Rule("tiers-by-latency", "the tier is 1 below 5 ms, 2 below 50 ms, 3 below 150 ms, 4 above", _tiers),
    Rule("same-samples-same-modes", "two detectors that are shown the same say the same: no clock, no chance", _same),
    Rule("any-time-will-do", "when all times are later by a constant, nothing else changes", _any_clock),
    Rule("detectors-are-separate", "what one detector is shown changes no other", _separate),
    Rule("knows-a-datacenter", "a path of 0.3 ms and 10 Gbit/s is a datacenter's after 20 s", _knows_a_datacenter),
    Rule("knows-the-internet", "a path of 150 ms and 48 Mbit/s is the internet's after 20 s", _knows_the_internet),
    Rule("follows-the-path", "20 s after a path became another it is seen, there and back again", _follows),
    Rule("unknown-changes-nothing", "a session that sends nothing stays in its mode", _unknown),
    Rule("one-odd-sample-changes-nothing", "one sample that does not fit the others changes no mode", _odd_one),
    Rule("keeps-still", "noise on a path that stays the same brings at most one change a minute", _steady),
)
