"""Each setting in force, and who has set it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..units import shown
from .load import DEFAULT, Leaf, resolve
from .registry import KEYS, PLUGINS

_SECRET: Final = re.compile(r"token|secret|passw|passphrase|credential|(^|[_.-])key($|[_.-])|auth", re.IGNORECASE)
"""Names of plugins' options that may hold what nobody shall read; no setting of the core does. Nor are lists shown."""

HIDDEN: Final = "(hidden)"


@dataclass(frozen=True, slots=True)
class Explained:
    """One setting. ``text`` is its value as a settings file would have it, ``value`` in bytes, seconds or plain.

    ``source`` is ``default``, a file with the line, an environment variable or ``--set``; ``follows`` names the
    setting that moved a default. A secret has `HIDDEN` for both.
    """

    name: str
    value: object
    text: str
    source: str
    follows: str = ""

    @property
    def is_default(self) -> bool:
        """Nobody has set it."""
        return self.source == DEFAULT


def explain_settings(
    *,
    files: Sequence[Path | str] = (),
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> tuple[Explained, ...]:
    """Every setting in the registry's order, then the options of plugins; takes what `load_settings` takes.

    Raises:
        SettingsError: lists every fault of every source.
    """
    leaves, plugins = resolve(files=files, overrides=overrides, environ=environ)
    found = []
    for key in KEYS:
        leaf = leaves[key.name]
        assert isinstance(leaf.value, bool | int | float | str), "the registry has no other kinds"
        found.append(Explained(key.name, leaf.value, key.show(leaf.value), leaf.source, leaf.follows))
    return (*found, *sorted(_options(plugins, PLUGINS), key=lambda option: option.name))


def _options(tree: Mapping[str, Any], path: str) -> Iterator[Explained]:
    for name, inner in tree.items():
        here = f"{path}.{str(name).lower()}"
        if not isinstance(inner, Leaf):
            yield from _options(inner, here)
        elif isinstance(inner.value, bool | int | float | str) and not _SECRET.search(here):
            yield Explained(here, inner.value, shown(inner.value), inner.source)
        else:
            yield Explained(here, HIDDEN, HIDDEN, inner.source)
