"""Sparse files stay sparse, and their holes do not travel."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from amst_core.errors import AmstError
from amst_core.files.entries import Entry, EntryType, to_attributes
from amst_core.session.copying import download, upload
from amst_core.session.endpoints import MemorySource
from amst_core.session.redirect import download_to
from amst_core.wire.fields import SPANS
from amst_core.wire.messages import FILE, MAX_HOLES

pytestmark = pytest.mark.needs_transport

MIB = 1 << 20
SIZE = 64 * MIB
TOO_MANY = SPANS.encode(tuple((at, at + 1) for at in range(MAX_HOLES + 1)))


def make_sparse(path: Path, *, size: int = SIZE, data: dict[int, bytes] | None = None) -> Path:
    """A file of holes with ``data`` at some offsets."""
    with path.open("wb") as file:
        for offset, content in (data or {}).items():
            file.seek(offset)
            file.write(content)
        file.truncate(size)
    if path.stat().st_blocks * 512 > size // 2:
        pytest.skip("this file system keeps no holes")
    return path


def taken(path: Path) -> int:
    """Bytes that a file takes on the disk."""
    return path.stat().st_blocks * 512


SHAPES: dict[str, dict[int, bytes]] = {
    "nothing": {},
    "a start": {0: b"x" * 100},
    "an end": {SIZE - 3: b"end"},
    "a middle": {20 * MIB + 5: os.urandom(3 * MIB)},
    "islands": {at * 5 * MIB: os.urandom(200_000) for at in range(12)},
    "short holes": {at * 8192: b"y" for at in range(64)},
}


@pytest.mark.parametrize(
    ("plaintext", "verify"), [(False, True), (True, True), (True, False)], ids=["encrypted", "plaintext", "unverified"]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_stays_sparse_up_and_down(net: Any, tmp_path: Path, shape: str, plaintext: bool, verify: bool) -> None:
    source = make_sparse(tmp_path / "source", data=SHAPES[shape])
    (tmp_path / "root").mkdir()
    pair = net.pair(streams=3, plaintext=plaintext, verify=verify, root=tmp_path / "root")
    up = upload(pair.near, [(source, b"there")])
    down = download(pair.near, [(b"there", tmp_path / "back")])
    for copy, result, sender in (
        (tmp_path / "root" / "there", up, pair.near),
        (tmp_path / "back", down, pair.far),
    ):
        assert copy.read_bytes() == source.read_bytes()
        assert taken(copy) <= taken(source) + 2 * MIB
        assert (result.bytes, result.failed) == (SIZE, ())
        assert sender.metrics().bytes_sent <= taken(source) + 2 * MIB


@pytest.mark.parametrize("way", ["up", "down"])
def test_progress_ends_at_the_whole(net: Any, tmp_path: Path, way: str) -> None:
    source = make_sparse(tmp_path / "source", data=SHAPES["islands"])
    pair = net.pair(root=tmp_path)
    seen: list[int] = []

    def progress(now: Any) -> None:
        seen.append(now.bytes_done)

    if way == "up":
        upload(pair.near, [(source, b"there")], progress=progress)
    else:
        download(pair.near, [(b"source", tmp_path / "back")], progress=progress)
    assert seen == sorted(seen) and seen[-1] == SIZE


@pytest.mark.parametrize("way", ["up", "down"])
def test_the_same_again_is_known_by_its_content(net: Any, tmp_path: Path, way: str) -> None:
    source = make_sparse(tmp_path / "source", data=SHAPES["islands"])
    pair = net.pair(root=tmp_path)
    for _ in range(2):
        if way == "up":
            result = upload(pair.near, [(source, b"there")])
        else:
            result = download(pair.near, [(b"source", tmp_path / "there")])
    assert result.failed == ()
    for end in pair.ends:
        assert end.metrics().bytes_sent <= taken(source) + 2 * MIB


def test_a_hole_that_replaces_data_is_a_hole(net: Any, tmp_path: Path) -> None:
    """What lies under the name, or was left by an earlier try, never shows through."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "there").write_bytes(b"\xff" * SIZE)
    source = make_sparse(tmp_path / "source", data=SHAPES["a middle"])
    pair = net.pair(root=tmp_path / "root")
    upload(pair.near, [(source, b"there")])
    assert (tmp_path / "root" / "there").read_bytes() == source.read_bytes()


def test_standard_output_gets_the_zeros(net: Any, tmp_path: Path) -> None:
    source = make_sparse(tmp_path / "source", data=SHAPES["islands"])
    pair = net.pair(root=tmp_path)
    with (tmp_path / "out").open("wb") as out:
        download_to(pair.near, b"source", out.fileno())
    assert (tmp_path / "out").read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    "value",
    [
        True,
        "holes",
        b"",
        b"\0" * 3,
        SPANS.encode(((0, 0),)),
        SPANS.encode(((5, 3),)),
        SPANS.encode(((0, 4), (2, 6))),
        SPANS.encode(((0, 101),)),
        TOO_MANY,
        SPANS.encode(((0, 5),)) + b"x",
    ],
    ids=range(10),
)
def test_holes_that_make_no_sense_end_the_session(net: Any, tmp_path: Path, value: Any) -> None:
    pair = net.pair(root=tmp_path)
    size = 100 if value != TOO_MANY else 2 * MAX_HOLES
    entry = to_attributes(Entry(b"x", EntryType.FILE, 0o644, 0, size))
    ticket = pair.near.core.open(
        FILE, MemorySource(memoryview(bytes(size))), size=size, flow="f", attributes={**entry, "holes": value}
    )
    with pytest.raises(AmstError):
        ticket.wait(20)
    net.wait_until(lambda: pair.far.core.error is not None, "the session to end")
    assert pair.far.core.error.kind == "protocol"
    assert not (tmp_path / "x").exists()


def test_holes_of_what_is_no_file_end_the_session(net: Any, tmp_path: Path) -> None:
    pair = net.pair(root=tmp_path)
    entry = to_attributes(Entry(b"x", EntryType.DIRECTORY, 0o755, 0))
    pair.near.core.open(
        FILE, MemorySource(memoryview(b"")), size=0, flow="f", attributes={**entry, "holes": SPANS.encode(())}
    )
    net.wait_until(lambda: pair.far.core.error is not None, "the session to end")
    assert pair.far.core.error.kind == "protocol"
