"""What errors hold, and let go of."""

from __future__ import annotations

import traceback
import weakref

import pytest

from amst_core.errors import BrokenError, release_frames


class Buffer:
    """Something whose end can be seen."""


def test_an_error_that_is_kept_lets_go_of_what_its_frames_and_its_causes_held() -> None:
    seen: list[weakref.ref[Buffer]] = []

    def read() -> None:
        buffer = Buffer()
        seen.append(weakref.ref(buffer))
        raise OSError("reset")

    def receive() -> None:
        buffer = Buffer()
        seen.append(weakref.ref(buffer))
        try:
            read()
        except OSError as err:
            raise BrokenError("gone") from err

    with pytest.raises(BrokenError) as caught:
        receive()
    error = caught.value
    assert [ref() is not None for ref in seen] == [True, True]
    release_frames(error)
    assert [ref() for ref in seen] == [None, None]
    assert "in receive" in "".join(traceback.format_exception(error)), "the traceback still tells where it was"


def test_errors_that_came_from_each_other_are_released_once() -> None:
    one, other = BrokenError("one"), BrokenError("other")
    one.__cause__, other.__cause__ = other, one
    release_frames(one)
