"""How long chunks are: as the profile has them, longer where their number would limit a session, by loss and delay.

All lanes of a session have the same, but for those that lose far more than the others or are far slower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median_high, median_low
from typing import Final

from ..interfaces import PathStats
from .loss import LossMeter

MOST_TIMES: Final = 4
"""How many times the configured size a chunk may become."""

STEP_S: Final = 5.0
"""Loss and delay change the size by one step in so long at most (requirements D3)."""

_PER_SECOND: Final = 700
"""Chunks a second, over all lanes, that do not limit a session yet: each costs about 100 µs of Python on a side."""

_LONG_STEP: Final = 256 << 10
_SHORT_STEP: Final = 16 << 10
_LEAST_CHANGE: Final = 4  # a quarter: a rate always varies a little
_LEAST_S: Final = 0.05
_MUCH_LOSS: Final = 0.05
_LITTLE_LOSS: Final = 0.01
_SHORT_DELAY_S: Final = 0.1

LEAST: Final = 16 << 10
"""No lane's chunks become shorter than so many bytes for its own sake (requirements D3)."""

_FAR_SLOWER: Final = 4
"""Lanes that share a path differ too, for a while; this much they do not."""

_SOON_S: Final = 0.1
"""A chunk that a lane takes no longer for holds nobody up, however fast the others are."""

_AT_ONCE_S: Final = 0.01
"""Chunks that a lane takes no longer for are not made shorter whatever it loses: their number would limit it."""

_ROOM_TO_GROW: Final = 0.75
"""Of what a chunk may take, what one twice as long must be within, so that a size once chosen stays."""

_FAR_LOSSIER: Final = 2
_MOST_IDLE: Final = 0.25  # of the looks at a lane: what has nothing to do is not slow
_LANE_SEGMENTS: Final = 300  # at 2 % loss, which is not much, more than 5 % of them are lost once in 2000 times


class ChunkTuner:
    """Chooses the size of chunks (bytes) by how fast the peer acknowledges them, and by what the path does to them.

    It begins with ``configured`` and is never more than ``most``. With a ``least`` below that it shrinks on a path that
    loses much, so that less waits behind a chunk that is held up, and grows on one that loses little; without, only the
    rate changes it, and never below ``configured``. Sans-IO; the caller serialises calls.
    """

    def __init__(self, configured: int, *, most: int, least: int | None = None) -> None:
        self.configured = configured
        self._most = max(configured, min(most, MOST_TIMES * configured))
        self._least = configured if least is None else min(least, configured)
        self._suits_path = configured  # by loss and delay
        self._suits_rate = 0  # so many would keep the number of chunks bearable
        self._since: float | None = None
        self._acknowledged = 0
        self._stepped_at: float | None = None
        self.size = configured

    @property
    def follows_path(self) -> bool:
        """Loss and delay matter."""
        return self._least < self.configured

    def observe(self, acknowledged: int, now: float) -> bool:
        """So many bytes were acknowledged in all; whether `size` has changed."""
        if self._since is None:
            self._since, self._acknowledged = now, acknowledged
        elapsed = now - self._since
        if elapsed < _LEAST_S:
            return False
        wanted = (acknowledged - self._acknowledged) / elapsed / _PER_SECOND
        self._since, self._acknowledged = now, acknowledged
        step = _LONG_STEP if wanted >= _LONG_STEP / 2 else _SHORT_STEP
        self._suits_rate = round(wanted / step) * step
        return self._choose()

    def observe_path(self, loss: float | None, rtt_s: float | None, now: float) -> bool:
        """A share of ``loss`` and a round trip, None where they are not known; whether `size` has changed."""
        if self._stepped_at is not None and now - self._stepped_at < STEP_S:
            return False
        before = self._suits_path
        if loss is not None and loss > _MUCH_LOSS:
            self._suits_path = max(self._least, before // 2)
        elif loss is not None and loss < _LITTLE_LOSS and rtt_s is not None and rtt_s < _SHORT_DELAY_S:
            self._suits_path = min(self._most, before * 2)
        if self._suits_path != before:
            self._stepped_at = now
        return self._choose()

    def _choose(self) -> bool:
        size = min(max(self._suits_path, self._suits_rate), self._most)
        if abs(size - self.size) * _LEAST_CHANGE < self.size:
            return False
        self.size = size
        return True


@dataclass(frozen=True, slots=True)
class LaneLook:
    """How one lane stands: its path, the payload it took so far (bytes), and whether it has nothing to do right now."""

    path: PathStats
    taken: int
    idle: bool

    @property
    def moved(self) -> int:
        """Bytes that it got through so far."""
        return self.taken if self.path.bytes_acknowledged is None else self.path.bytes_acknowledged


class _Lane:
    """What is known of one lane, and how often its chunks are halved for it."""

    __slots__ = ("_loss", "_meter", "halved_for_loss", "halved_for_speed", "idle", "loss", "moved", "news")

    def __init__(self, look: LaneLook) -> None:
        self.moved = look.moved  # when the window began
        self.idle = 0  # looks in the window
        self.loss: float | None = None  # the last that is known
        self.news = False  # it was not judged by that yet
        self.halved_for_loss = 0
        self.halved_for_speed = 0
        self._meter = LossMeter(_LANE_SEGMENTS)
        self._meter.look({0: look.path})

    @property
    def halved(self) -> int:
        return max(self.halved_for_loss, self.halved_for_speed)

    def look(self, look: LaneLook) -> None:
        self.idle += look.idle
        loss = self._meter.look({0: look.path})
        if loss is not None:
            self.loss, self.news = loss, True

    def judge_speed(self, rate: float, bound_s: float, size: int) -> None:
        """It moves ``rate`` bytes/s, and a chunk should not take it longer than ``bound_s``."""
        length = size >> self.halved_for_speed
        if length > rate * bound_s:
            self.halved_for_speed += length // 2 >= LEAST
        elif self.halved_for_speed and 2 * length < rate * bound_s * _ROOM_TO_GROW:
            self.halved_for_speed -= 1

    def judge_loss(self, usual: float, rate: float | None, size: int) -> None:
        """The others lose ``usual``, a share."""
        length, at_once = size >> self.halved_for_loss, (rate or 0.0) * _AT_ONCE_S
        loss, self.news = self.loss if self.news else None, False
        if self.halved_for_loss and 2 * length < at_once:
            self.halved_for_loss -= 1  # it got fast, whatever it loses
        elif loss is None:
            return
        elif loss > max(_MUCH_LOSS, _FAR_LOSSIER * usual):
            self.halved_for_loss += length // 2 >= max(LEAST, at_once)
        elif self.halved_for_loss and (loss < _LITTLE_LOSS or loss <= usual):
            self.halved_for_loss -= 1


class LaneChunks:
    """Chooses which lanes have shorter chunks than their session: who waits for a transfer waits for its last chunk.

    A lane's chunks are halved where it loses much, and far more than the others; and where one takes it far longer than
    the lane in the middle, by what the lanes get through while they have something to do. They are doubled again, up to
    the session's, when that is over. One step in `STEP_S` at most, as with the session's own (requirements D3).
    Sans-IO; the caller serialises calls.
    """

    def __init__(self) -> None:
        self._lanes: dict[int, _Lane] = {}
        self._since = 0.0  # the window began
        self._there: frozenset[int] = frozenset()  # the lanes that were there then
        self._looks = 0  # in the window
        self._looked_at = 0.0

    def observe(self, looks: Mapping[int, LaneLook], size: int, now: float) -> bool:
        """How the lanes stand, which the session gives chunks of ``size`` bytes; whether `sizes` has changed.

        To be told a few times in `STEP_S` while there is something to send.
        """
        before = {id: lane.halved for id, lane in self._lanes.items()}
        self._lanes = {id: self._lanes.get(id) or _Lane(look) for id, look in looks.items()}
        if now - self._looked_at > STEP_S / 2:  # there was nothing to send meanwhile
            self._begin(looks, now)
        self._looked_at = now
        self._looks += 1
        for id, look in looks.items():
            self._lanes[id].look(look)
        if now - self._since >= STEP_S:
            self._judge(looks, size, now - self._since)
            self._begin(looks, now)
        return any(lane.halved != before.get(id, 0) for id, lane in self._lanes.items())

    def sizes(self, size: int) -> dict[int, int]:
        """The lanes with shorter chunks than ``size``, which the others have, and theirs (bytes)."""
        most = max(0, (size // LEAST).bit_length() - 1)
        halved = {id: min(lane.halved, most) for id, lane in self._lanes.items()}
        return {id: size >> times for id, times in halved.items() if times}

    def _begin(self, looks: Mapping[int, LaneLook], now: float) -> None:
        """A window begins."""
        self._since, self._there, self._looks = now, frozenset(looks), 0
        for id, look in looks.items():
            self._lanes[id].moved, self._lanes[id].idle = look.moved, 0

    def _judge(self, looks: Mapping[int, LaneLook], size: int, elapsed_s: float) -> None:
        rates = {
            id: (looks[id].moved - lane.moved) / elapsed_s
            for id, lane in self._lanes.items()
            if id in self._there and lane.idle <= _MOST_IDLE * self._looks
        }
        usual = median_high(rates.values()) if rates else 0.0  # of two, the other is the measure
        if usual:
            bound_s = max(_FAR_SLOWER * size / usual, _SOON_S)
            for id, rate in rates.items():
                self._lanes[id].judge_speed(rate, bound_s, size)
        losses = [lane.loss for lane in self._lanes.values() if lane.loss is not None]
        if losses:
            usual_loss = median_low(losses)
            for id, lane in self._lanes.items():
                lane.judge_loss(usual_loss, rates.get(id), size)
