"""Operations that travel in REQUEST, and their attributes (docs/wire-format.md, "Requests")."""

from __future__ import annotations

from typing import Final

STAT: Final = "stat"
"""``path`` → REPLY with the entry's attributes and ``size``, kind ``not_found`` when there is none."""

FETCH: Final = "fetch"
"""``path`` → one OPEN per entry below it, each naming the request, then REPLY."""

MEASURE: Final = "measure"
"""``path`` → REPLY with ``total_bytes`` and ``total_files`` of what FETCH would send."""

PATH: Final = "path"
SIZE: Final = "size"
TOTAL_BYTES: Final = "total_bytes"
TOTAL_FILES: Final = "total_files"
