"""What waits to be sent: all in one line, or short transfers apart from long ones, with lanes of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from .outgoing import Flows, Outgoing

_IN_A_ROW: Final = 8
"""After so many spans of short transfers, a lane for long ones takes one of those, if any waits."""


class SendQueues:
    """Hands out spans in turn (`Flows`).

    While they are `split`, what a lane for long transfers has taken on holds up no short one: those have ``express``
    lanes, which take nothing else; the others ``help`` while all of these are at work.
    """

    def __init__(self) -> None:
        self.split = False
        self._line = Flows()
        self._short = Flows()
        self._helped = 0  # spans of short transfers that other lanes took since one of a long transfer

    def __bool__(self) -> bool:
        return bool(self._line or self._short)

    def wake(self, transfer: Outgoing) -> None:
        """Queue ``transfer`` if it has something to send and is not queued yet."""
        (self._short if self.split and transfer.is_short else self._line).wake(transfer)

    def split_by_size(self, split: bool, transfers: Iterable[Outgoing]) -> None:
        """Keep short transfers apart from now on, or all in one line; ``transfers`` are all that there are."""
        if split == self.split:
            return
        self.split = split
        self._line, self._short = Flows(), Flows()
        for transfer in transfers:
            transfer.queued = False
            self.wake(transfer)

    def has_for(self, *, express: bool, help: bool) -> bool:
        """Whether `next` may have something for such a lane."""
        return bool(self._short) if express else bool(self._line or (help and self._short))

    def next(self, most: int, *, express: bool, help: bool) -> tuple[Outgoing, int, int, bool] | None:
        """The next span in turn, at most ``most`` bytes: transfer, start, end, retransmission."""
        if not self.split:
            return self._line.next(most)
        if express:
            return self._short.next(most)
        if help and self._helped < _IN_A_ROW:
            found = self._short.next(most)
            if found is not None:
                self._helped += 1
                return found
        self._helped = 0
        found = self._line.next(most)
        return self._short.next(most) if found is None and help else found
