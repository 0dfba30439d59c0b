"""What can go wrong with one run."""

from __future__ import annotations


class RunError(Exception):
    """A contender did not do its job; says what it printed."""
