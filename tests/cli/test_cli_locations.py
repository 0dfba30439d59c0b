"""Locations as they are typed, and cp's names."""

from __future__ import annotations

import os

import pytest

from amst_core.cli.locations import Local, Remote, final_names, parse_location, parse_server, source_name
from amst_core.errors import RefusedError, StorageError, UsageError
from amst_core.interfaces import Endpoint


def remote(text: str) -> Remote:
    location = parse_location(text)
    assert isinstance(location, Remote)
    return location


def local(text: str) -> Local:
    location = parse_location(text)
    assert isinstance(location, Local)
    return location


@pytest.mark.parametrize(
    ("text", "host", "port", "path", "slash"),
    [
        ("amst://host", "host", 9000, b"", True),
        ("amst://host/", "host", 9000, b"", True),
        ("amst://host:1/a", "host", 1, b"a", False),
        ("AMST://host:65535/a/b/", "host", 65535, b"a/b", True),
        ("amst://127.0.0.1:9000/a", "127.0.0.1", 9000, b"a", False),
        ("amst://[::1]/a", "::1", 9000, b"a", False),
        ("amst://[fe80::1%25eth0]:77/a", "fe80::1%eth0", 77, b"a", False),
        ("amst://h/a%20b%ff%3F", "h", 9000, b"a b\xff?", False),
        ("amst://h//a///./b", "h", 9000, b"a/b", False),
        ("amst://h/caf\u00e9", "h", 9000, "caf\u00e9".encode(), False),
        ("amst://h/" + os.fsdecode(b"caf\xe9"), "h", 9000, b"caf\xe9", False),
        ("amst://h/u@x:y", "h", 9000, b"u@x:y", False),
    ],
)
def test_a_url_is_host_port_and_path_in_bytes(text, host, port, path, slash):
    location = remote(text)
    assert location.endpoint == Endpoint("amst", host, port)
    assert (location.path, location.slash) == (path, slash)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("amst://u@h/a", "user name"),
        ("amst://u:p@h/a", "user name"),
        ("amst://h/a?b", "%3F"),
        ("amst://h?b", "%3F"),
        ("amst://h/a#b", "%23"),
        ("amst:///a", "no host"),
        ("amst://:9000/a", "no host"),
        ("amst://a b/c", "not a host name"),
        ("amst://a%20b/c", "not a host name"),
        ("amst://h:/a", "not a port"),
        ("amst://h:0/a", "not a port"),
        ("amst://h:65536/a", "not a port"),
        ("amst://h:1x/a", "not a port"),
        ("amst://h:\u0661/a", "not a port"),
        ("amst://h:" + "9" * 5000, "not a port"),
        ("amst://::1/a", "in brackets"),
        ("amst://[::1/a", "brackets"),
        ("amst://[::1]9000/a", "brackets"),
        ("amst://[host]/a", "not an IPv6 address"),
        ("amst://h/a%2", "two hex digits"),
        ("amst://h/100%", "%25"),
        ("http://h/a", "scheme http is unknown"),
        ("asmt://h/a", "amst://HOST"),
        ("user@host:path", "ssh locations are not built yet"),
        ("user@[::1]:path", "ssh locations are not built yet"),
        ("user@host:", "ssh locations are not built yet"),
        ("", "empty"),
    ],
)
def test_what_is_no_location_is_refused_and_the_message_says_why(text, says):
    with pytest.raises(UsageError) as caught:
        parse_location(text)
    assert says in str(caught.value)


@pytest.mark.parametrize("text", ["amst://h/../a", "amst://h/a/%2e%2e/b", "amst://h/a%00b", "amst://h/.amst-x"])
def test_a_remote_path_that_leaves_the_root_is_refused_before_anything_is_connected(text):
    with pytest.raises(RefusedError):
        parse_location(text)


def test_a_remote_name_that_is_too_long_is_a_storage_error():
    with pytest.raises(StorageError):
        parse_location("amst://h/" + "x" * 256)


@pytest.mark.parametrize("text", ["host:path", "a", "./-", "./u@h:p", "dir/u@h:p", "/a:b", "c:", "u@h", "@h:p"])
def test_all_else_is_a_local_path(text):
    assert local(text).path == os.fsencode(text)


@pytest.mark.parametrize(
    ("text", "path", "slash"), [("a/", b"a", True), ("a//", b"a", True), ("/", b"/", True), ("a", b"a", False)]
)
def test_a_trailing_slash_of_a_local_path_is_noted_and_taken_off(text, path, slash):
    assert (local(text).path, local(text).slash) == (path, slash)


def test_bytes_that_are_no_text_come_through():
    assert local(os.fsdecode(b"caf\xe9/")).path == b"caf\xe9"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a/b", b"b"), ("a/b/", b"b"), ("/", b""), (".", b""), ("a/.", b""), ("..", b""), ("/x", b"x"),
        ("amst://h/a/b", b"b"), ("amst://h/a/b/", b"b"), ("amst://h", b""), ("amst://h/a/.", b""),
    ],
)  # fmt: skip
def test_a_source_gives_its_last_component_as_the_name(text, name):
    assert source_name(parse_location(text)) == name


def test_an_address_can_be_connected_to():
    assert remote("amst://[::1]:5/x").address == "amst://[::1]:5"


def test_a_server_is_a_url_without_a_path():
    assert parse_server("amst://h:5/").endpoint.port == 5
    for text in ("amst://h/x", "h", "u@h:x"):
        with pytest.raises(UsageError):
            parse_server(text)


def names(sources: list[str], target: str, *, exists: bool = False, is_dir: bool = False) -> list[bytes]:
    return final_names(
        [parse_location(text) for text in sources], parse_location(target), exists=exists or is_dir, is_dir=is_dir
    )


@pytest.mark.parametrize(
    ("sources", "target", "is_dir", "expected"),
    [
        (["x/a"], "amst://h/b", False, [b"b"]),
        (["x/a"], "amst://h/b", True, [b"b/a"]),
        (["x/a/"], "amst://h/b", True, [b"b/a"]),
        (["x/a"], "amst://h/b/", False, [b"b/a"]),
        (["x/a"], "amst://h", True, [b"a"]),
        (["."], "amst://h/b", True, [b"b"]),
        (["."], "amst://h/b", False, [b"b"]),
        (["."], "amst://h", True, [b""]),
        (["a", "b"], "amst://h/d", True, [b"d/a", b"d/b"]),
        (["a", "b"], "amst://h/d/", False, [b"d/a", b"d/b"]),
        (["amst://h/x/a"], "b", False, [b"b"]),
        (["amst://h/x/a"], "b/", False, [b"b/a"]),
        (["amst://h/x/a"], "/", True, [b"/a"]),
        (["amst://h/x/a"], ".", True, [b"./a"]),
        (["amst://h"], "b", True, [b"b"]),
    ],
)
def test_names_are_cps(sources, target, is_dir, expected):
    assert names(sources, target, is_dir=is_dir) == expected


def test_a_file_takes_the_place_of_a_file():
    assert names(["a"], "amst://h/b", exists=True) == [b"b"]


@pytest.mark.parametrize(
    ("sources", "target", "exists", "error", "says"),
    [
        (["a", "b"], "amst://h/d", False, UsageError, "trailing /"),
        (["a", "b"], "amst://h/d", True, UsageError, "not a directory"),
        (["a"], "amst://h/d/", True, RefusedError, "not a directory"),
        (["x/a", "y/a"], "amst://h/d/", False, UsageError, "x/a and y/a would both become d/a"),
    ],
)
def test_names_that_cannot_be_are_errors(sources, target, exists, error, says):
    with pytest.raises(error) as caught:
        names(sources, target, exists=exists)
    assert says in str(caught.value)
