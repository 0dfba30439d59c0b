from __future__ import annotations

import posixpath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amst_core.errors import AmstError, ProtocolError, RefusedError, StorageError
from amst_core.files.entries import (
    Entry,
    EntryType,
    display_path,
    from_attributes,
    join_path,
    normalise_user_path,
    split_path,
    to_attributes,
)
from amst_core.wire.messages import FILE, Open, decode, encode

FILE_ATTRIBUTES: dict[str, Any] = {"path": b"a/b", "type": "file", "mode": 0o644, "mtime_ns": 5}
LINK_ATTRIBUTES: dict[str, Any] = {**FILE_ATTRIBUTES, "type": "symlink", "target": b"../x"}


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        (b"", ()),
        (b"a", (b"a",)),
        (b"a/b/c", (b"a", b"b", b"c")),
        (b"\xff\n/ ", (b"\xff\n", b" ")),
        (b"..a/...", (b"..a", b"...")),
        (b".amst", (b".amst",)),
        (b"x" * 255, (b"x" * 255,)),
        (b"/".join([b"d"] * 256), (b"d",) * 256),
        (b"/".join([b"y" * 255] * 16), (b"y" * 255,) * 16),
    ],
)
def test_split_takes_legal_paths(path: bytes, parts: tuple[bytes, ...]) -> None:
    assert split_path(path) == parts


@pytest.mark.parametrize(
    "path",
    [
        b"/", b"/etc/passwd", b"..", b"../x", b"a/..", b"a/../b", b".", b"./a", b"a/.", b"a//b", b"a/", b"a\0b", b"\0",
        b".amst-0011.part", b"a/.amst-x/b", b".amst-",
    ],
)  # fmt: skip
def test_split_refuses(path: bytes) -> None:
    with pytest.raises(RefusedError) as caught:
        split_path(path)
    assert caught.value.path == display_path(path)


def test_an_absolute_path_is_called_that() -> None:
    with pytest.raises(RefusedError, match="absolute"):
        split_path(b"/etc/passwd")


@pytest.mark.parametrize("path", [b"x" * 256, b"/".join([b"d"] * 257), b"/".join([b"y" * 254] * 17)])
def test_split_limits_lengths(path: bytes) -> None:
    with pytest.raises(StorageError, match="limit"):
        split_path(path)


_PIECES = st.sampled_from([b"..", b".", b"", b"/", b"a", b"\0", b"..\0", b".amst-", b"\xff", b"//", b"../", b"b"])


@given(
    st.one_of(st.binary(max_size=64), st.lists(_PIECES, max_size=12).map(b"/".join), st.lists(_PIECES).map(b"".join))
)
def test_split_never_lets_a_path_escape(path: bytes) -> None:
    try:
        parts = split_path(path)
    except (RefusedError, StorageError):
        return
    assert b"/".join(parts) == path
    joined = posixpath.join(b"/root/base", *parts)
    assert posixpath.normpath(joined) == joined
    assert joined == b"/root/base" or joined.startswith(b"/root/base/")
    assert b"\0" not in joined
    assert not any(part.startswith(b".amst-") for part in parts)


@pytest.mark.parametrize(
    ("path", "clean"),
    [(b"", b""), (b"/", b""), (b".", b""), (b"/a//b/", b"a/b"), (b"./a/./b/.", b"a/b"), (b"a/b", b"a/b")],
)
def test_user_paths_are_normalised(path: bytes, clean: bytes) -> None:
    assert normalise_user_path(path) == clean


@pytest.mark.parametrize("path", [b"a/../b", b"/..", b"a\0", b".amst-x"])
def test_user_paths_are_still_checked(path: bytes) -> None:
    with pytest.raises(RefusedError):
        normalise_user_path(path)


@given(st.binary(max_size=64))
def test_normalised_paths_split(path: bytes) -> None:
    try:
        clean = normalise_user_path(path)
    except AmstError:
        return
    assert normalise_user_path(clean) == clean
    assert split_path(clean) == tuple(part for part in path.split(b"/") if part not in (b"", b"."))


def test_join() -> None:
    assert [join_path(b"", b""), join_path(b"a", b""), join_path(b"", b"b"), join_path(b"a", b"b")] == [
        b"", b"a", b"b", b"a/b",
    ]  # fmt: skip


@given(st.binary())
def test_display_is_printable_text(path: bytes) -> None:
    shown = display_path(path)
    assert shown.isprintable()
    assert shown
    shown.encode("utf-8")


def test_display_keeps_readable_names() -> None:
    assert display_path("é b".encode()) == "é b"
    assert display_path(b"\xff\n") == "\\xff\\n"


@pytest.mark.parametrize(
    "entry",
    [
        Entry(b"a/\xff\n", EntryType.FILE, 0o640, -1, 7),
        Entry(b"f", EntryType.FILE, 0o640, -1, 7, identity=b"\0\xff" * 32),
        Entry(b"", EntryType.DIRECTORY, 0o755, 1 << 60),
        Entry(b"l", EntryType.SYMLINK, 0o777, 0, 0, b"../\xfe"),
    ],
)
def test_attributes_survive_the_wire(entry: Entry) -> None:
    record = encode(Open(1, FILE, entry.size, 0, "", to_attributes(entry)))
    message = decode(record[4], record[5:])
    assert isinstance(message, Open)
    assert from_attributes(message.attributes, size=message.size) == entry


@pytest.mark.parametrize(("mtime_ns", "sent"), [(1 << 63, (1 << 63) - 1), (-(1 << 64), -(1 << 63))])
def test_times_out_of_range_travel_as_the_nearest(mtime_ns: int, sent: int) -> None:
    assert to_attributes(Entry(b"a", EntryType.FILE, 0, mtime_ns))["mtime_ns"] == sent


def test_peers_do_not_get_setuid() -> None:
    assert from_attributes({**FILE_ATTRIBUTES, "mode": 0o7755}).mode == 0o755


@pytest.mark.parametrize("identity", [b"x" * 65, "text", 1, True, {}])
def test_hostile_identities_are_refused(identity: Any) -> None:
    with pytest.raises(ProtocolError, match="identity"):
        from_attributes({**FILE_ATTRIBUTES, "identity": identity})


def test_only_files_have_an_identity() -> None:
    assert from_attributes({**FILE_ATTRIBUTES, "identity": b"x" * 64}).identity == b"x" * 64
    assert from_attributes(FILE_ATTRIBUTES).identity == b""
    assert from_attributes({**LINK_ATTRIBUTES, "identity": b"x"}).identity == b""
    assert "identity" not in to_attributes(Entry(b"", EntryType.DIRECTORY, 0o755, 0, identity=b"x"))
    assert "identity" not in to_attributes(Entry(b"", EntryType.FILE, 0o644, 0))


def test_keys_of_others_are_ignored() -> None:
    assert from_attributes({**FILE_ATTRIBUTES, "other": True}).path == b"a/b"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("path", "text"), ("path", 1), ("type", "fifo"), ("type", b"file"), ("type", "FILE"), ("mode", -1),
        ("mode", 0o10000), ("mode", True), ("mode", "644"), ("mtime_ns", True), ("mtime_ns", 1 << 63),
        ("mtime_ns", -(1 << 63) - 1), ("target", b""), ("target", b"a\0b"), ("target", "text"), ("target", b"t" * 4096),
    ],
)  # fmt: skip
def test_hostile_attributes_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ProtocolError):
        from_attributes({**LINK_ATTRIBUTES, key: value})


@pytest.mark.parametrize("key", sorted(LINK_ATTRIBUTES))
def test_missing_attributes_are_refused(key: str) -> None:
    with pytest.raises(ProtocolError, match=key):
        from_attributes({k: v for k, v in LINK_ATTRIBUTES.items() if k != key})


def test_hostile_entry_paths_are_refused() -> None:
    with pytest.raises(RefusedError):
        from_attributes({**FILE_ATTRIBUTES, "path": b"../x"})


@pytest.mark.parametrize(("kind", "size"), [("file", -1), ("directory", 1), ("symlink", 1)])
def test_sizes_that_cannot_be_are_refused(kind: str, size: int) -> None:
    with pytest.raises(ProtocolError):
        from_attributes({**LINK_ATTRIBUTES, "type": kind}, size=size)


_VALUES = st.one_of(
    st.integers(), st.text("file\0/.", max_size=9), st.binary(max_size=9), st.booleans(), st.just("file")
)


@given(st.dictionaries(st.sampled_from(["path", "type", "mode", "mtime_ns", "target", "identity"]), _VALUES))
def test_any_attributes_give_an_entry_or_a_named_error(attributes: dict[str, Any]) -> None:
    try:
        entry = from_attributes({**FILE_ATTRIBUTES, **attributes})
    except (ProtocolError, RefusedError, StorageError):
        return
    assert 0 <= entry.mode <= 0o777
    split_path(entry.path)
