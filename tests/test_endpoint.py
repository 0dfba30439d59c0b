"""Addresses as users write them."""

from __future__ import annotations

import pytest

from amst_core.endpoint import DEFAULT_PORT, parse_endpoint
from amst_core.errors import UsageError


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("amst://example.org", "example.org", DEFAULT_PORT),
        ("amst://example.org:1234", "example.org", 1234),
        ("AMST://example.org:1234/", "example.org", 1234),
        ("10.0.0.1:0", "10.0.0.1", 0),
        ("localhost", "localhost", DEFAULT_PORT),
        ("[::]:9000", "::", 9000),
        ("amst://[fe80::1%eth0]:65535", "fe80::1%eth0", 65535),
    ],
)
def test_forms(text: str, host: str, port: int) -> None:
    endpoint = parse_endpoint(text)
    assert (endpoint.scheme, endpoint.host, endpoint.port) == ("amst", host, port)


@pytest.mark.parametrize(
    "text",
    ["", ":9000", "amst://", "http://x", "x:65536", "x:-1", "x:port", "::1", "a b", "amst://u@h", "amst://h/p", "[::1"],
)
def test_what_is_no_address_is_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_endpoint(text)
    assert repr(text) in str(caught.value)


def test_an_endpoint_prints_as_it_is_written() -> None:
    assert str(parse_endpoint("amst://[::1]:9000")) == "[::1]:9000"
    assert str(parse_endpoint("host:1")) == "host:1"
