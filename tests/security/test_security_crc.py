"""The CRC of a part, reckoned from those of the whole and of what comes before it."""

from __future__ import annotations

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from amst_core.security.crc import crc_of_rest


@given(first=st.binary(max_size=80), rest=st.binary(max_size=300))
def test_it_is_that_of_the_part(first: bytes, rest: bytes) -> None:
    assert crc_of_rest(crc32c(first + rest), crc32c(first), len(rest)) == crc32c(rest)


@pytest.mark.parametrize("size", [1 << 16, (1 << 20) - 1, 1 << 20, (4 << 20) + 12345])
def test_sizes_of_chunks(size: int) -> None:
    rest = bytes(range(256)) * (size // 256 + 1)
    rest = rest[:size]
    assert crc_of_rest(crc32c(b"header" + rest), crc32c(b"header"), size) == crc32c(rest)
