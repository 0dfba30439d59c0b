"""How a simulated link loses packets at random. Models are plain data; a seeded generator makes them happen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Protocol, Self

from ...errors import UsageError

__all__ = ["Bernoulli", "GilbertElliott", "LossModel", "Periodic"]


class LossModel(Protocol):
    """Anything that says how many packets pass between losses."""

    def gaps(self, random: Random) -> Iterator[int]:
        """For each lost packet, in order, how many passed since the one lost before it. May be infinite."""


def _probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UsageError(f"{name} is {value!r}; it is a probability, from 0 to 1")


def _geometric(random: Random, probability: float) -> int:
    """How many failures before the first success."""
    if probability >= 1:
        return 0
    return int(math.log(1.0 - random.random()) / math.log1p(-probability))


@dataclass(frozen=True, slots=True)
class Bernoulli:
    """Each packet is lost with the same ``probability``, whatever became of others.

    Raises:
        UsageError: no probability.
    """

    probability: float

    def __post_init__(self) -> None:
        _probability("Bernoulli: probability", self.probability)

    def gaps(self, random: Random) -> Iterator[int]:
        while self.probability > 0:
            yield _geometric(random, self.probability)


@dataclass(frozen=True, slots=True)
class Periodic:
    """One packet in ``every`` is lost, at equal distances: what response functions are derived from (RFC 9438, 3649).

    Raises:
        UsageError: ``every`` is below 1.
    """

    every: int

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UsageError(f"Periodic: every is {self.every!r}; it is a number of packets, 1 or more")

    def gaps(self, random: Random) -> Iterator[int]:
        while True:
            yield self.every - 1


@dataclass(frozen=True, slots=True)
class GilbertElliott:
    """Bursts: a good and a bad state with a loss probability each, and a chance to change the state before each packet.

    `GilbertElliott.of` makes one from a mean loss rate and a mean length of bursts (Gilbert 1960, Elliott 1963; the
    parameters are netem's ``gemodel p r 1-h 1-k``). A packet is one step of the chain, however far apart packets are.

    Raises:
        UsageError: no probability, or a bad state that never ends.
    """

    to_bad: float
    to_good: float
    loss_in_bad: float = 1.0
    loss_in_good: float = 0.0

    def __post_init__(self) -> None:
        for name in ("to_bad", "to_good", "loss_in_bad", "loss_in_good"):
            _probability(f"GilbertElliott: {name}", getattr(self, name))
        if not self.to_good:
            raise UsageError("GilbertElliott: to_good is 0, so that the bad state never ends; use Bernoulli(1.0)")

    @classmethod
    def of(cls, *, loss: float, burst: float) -> Self:
        """Lose the share ``loss`` of all packets, ``burst`` in a row on the average.

        Raises:
            UsageError: ``burst`` is below 1, or the two cannot be had together (loss / (1 - loss) > burst).
        """
        _probability("GilbertElliott: loss", loss)
        if burst < 1:
            raise UsageError(f"GilbertElliott: burst is {burst!r}; it is a number of packets, 1 or more")
        if loss > burst * (1 - loss):
            raise UsageError(f"GilbertElliott: a loss of {loss!r} needs longer bursts than {burst!r}")
        return cls(to_bad=loss / ((1 - loss) * burst), to_good=1 / burst)

    @property
    def loss(self) -> float:
        """The share of packets that is lost in the long run."""
        if not self.to_bad:
            return self.loss_in_good
        bad = self.to_bad / (self.to_bad + self.to_good)
        return bad * self.loss_in_bad + (1 - bad) * self.loss_in_good

    def gaps(self, random: Random) -> Iterator[int]:
        if not self.to_bad:
            yield from Bernoulli(self.loss_in_good).gaps(random)
            return
        if not self.loss_in_good and not self.loss_in_bad:
            return
        passed = 0
        while True:
            for leave, loss in ((self.to_bad, self.loss_in_good), (self.to_good, self.loss_in_bad)):
                stay = 1 + _geometric(random, leave)
                while loss > 0 and (gap := _geometric(random, loss)) < stay:
                    yield passed + gap
                    passed = 0
                    stay -= gap + 1
                passed += stay
