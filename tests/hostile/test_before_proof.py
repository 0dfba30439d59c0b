"""Strangers: what a server does with a client that lies before it has proven anything, and in its first words after."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import ssl
import struct
import time
from collections.abc import Callable
from typing import Any

import pytest
from hostile_peer import U64, Ended, RawClient, hangs_up, host_port, record, resident

from amst_core.interfaces import PREAMBLE, PREAMBLE_MAGIC
from amst_core.security import keys
from amst_core.wire.messages import Close, Hello, LaneGrant, LaneRequest, Open, Params, Ping, Proof, encode

pytestmark = pytest.mark.needs_transport

SETTINGS = {"limits.handshake_timeout": "2s"}
NOTABLE = 16 << 20
"""Bytes: more than a case may cost the process; far below what the records announce."""

Script = Callable[[RawClient], object]


def hello(attributes: bytes, *, versions: bytes = b"\0\0\0\x01\0\x01", nonce: bytes | None = None) -> Script:
    """A HELLO of hand-made fields."""
    body = versions + (b"\0\0\0\x20" + bytes(32) if nonce is None else nonce) + attributes
    return lambda c: c.control.send(record(1, body))


def attribute(key: str, tag: int, value: bytes) -> bytes:
    raw = key.encode()
    return struct.pack("!H", len(raw)) + raw + bytes([tag]) + value


def one(key: str, tag: int, value: bytes) -> Script:
    return hello(b"\0\x01" + attribute(key, tag, value))


def i64(value: int) -> bytes:
    return struct.pack("!q", value)


def text(value: bytes) -> bytes:
    return struct.pack("!H", len(value)) + value


def sends(*what: Any) -> Script:
    return lambda c: c.control.send(*what)


OVERSIZE = {
    f"length {length}": sends(record(1, bytes(100), length=length)) for length in (0, 4097, 1 << 20, (1 << 32) - 1)
}
UNKNOWN = {f"type {number}": sends(record(number, bytes(40))) for number in (0, 18, 19, 25, 99, 255)}
WRONG_ORDER = {
    "PING": sends(Ping(1)),
    "OPEN": sends(Open(1, 1, 10, 0, "", {})),
    "LANE_REQUEST": sends(LaneRequest(1, "tcp")),
    "LANE_GRANT": sends(LaneGrant(1, 1, "tcp")),
    "PARAMS": sends(Params(bytes(32), 1, 1, 1, (), {})),
}

FIRST: dict[str, tuple[Script, str]] = {
    **{
        f"versions {versions[:3]}": (lambda c, v=versions: c.hello(versions=v), "version")
        for versions in ((), (0,), (2,), (65535,), tuple(range(2, 1900)))
    },
    **{
        f"nonce of {size}": (lambda c, n=size: c.hello(nonce=secrets.token_bytes(n)), "protocol")
        for size in (0, 31, 33, 3000)
    },
    **{what: (script, "protocol") for what, script in (OVERSIZE | UNKNOWN | WRONG_ORDER).items()},
    "PROOF": (sends(Proof(bytes(32))), "protocol"),
    "streams is text": (one("streams", 1, text(b"1")), "protocol"),
    "streams is bytes": (one("streams", 2, b"\0\0\0\0"), "protocol"),
    "streams is true": (one("streams", 3, b"\x01"), "protocol"),
    "streams -1": (one("streams", 0, i64(-1)), "protocol"),
    "streams 65536": (one("streams", 0, i64(65536)), "protocol"),
    "streams 2^63-1": (one("streams", 0, i64(2**63 - 1)), "protocol"),
    "transports is a number": (one("transports", 0, i64(1)), "protocol"),
    "plaintext is a number": (one("plaintext", 0, i64(1)), "protocol"),
    "plaintext is text": (one("plaintext", 1, text(b"yes")), "protocol"),
    "verify is a number": (one("verify", 0, i64(0)), "protocol"),
    "software is a number": (one("software", 0, i64(1)), "protocol"),
    "min_streams is text": (one("min_streams", 1, text(b"1")), "protocol"),
    "min_streams -1": (one("min_streams", 0, i64(-1)), "protocol"),
    "fewest streams above those asked for": (one("min_streams", 0, i64(2)), "protocol"),
    "most streams below those asked for": (one("max_streams", 0, i64(0)), "protocol"),
    "max_streams 65536": (one("max_streams", 0, i64(65536)), "protocol"),
    "backend is true": (one("backend", 3, b"\x01"), "protocol"),
    "an unknown backend": (one("backend", 1, text(b"gpu")), "protocol"),
    "an unknown mode": (one("mode", 1, text(b"space")), "protocol"),
    "congestion is no name": (one("congestion", 1, text(b"BBR!")), "protocol"),
    "polite is a number": (one("polite", 0, i64(1)), "protocol"),
    "an attribute twice": (hello(b"\0\x02" + 2 * attribute("streams", 0, i64(1))), "protocol"),
    "65535 attributes": (hello(b"\xff\xff"), "protocol"),
    "attribute type 4": (one("x", 4, b""), "protocol"),
    "attribute type 255": (one("x", 255, b""), "protocol"),
    "truth 2": (one("plaintext", 3, b"\x02"), "protocol"),
    "text that is no UTF-8": (one("software", 1, text(b"\xff\xfe")), "protocol"),
    "a surrogate": (one("software", 1, text(b"\xed\xa0\x80")), "protocol"),
    "text past the end": (one("software", 1, b"\xff\xffx"), "protocol"),
    "bytes past the end": (one("software", 2, b"\xff\xff\xff\xffx"), "protocol"),
    "2^32-1 versions": (hello(b"\0\0", versions=b"\xff\xff\xff\xff"), "protocol"),
    "a nonce of 2^32-1": (hello(b"\0\0", nonce=b"\xff\xff\xff\xff"), "protocol"),
    "bytes left over": (hello(b"\0\0\0"), "protocol"),
}


@pytest.mark.parametrize(("script", "kind"), FIRST.values(), ids=FIRST)
def test_a_hello_that_lies(ground: Any, script: Script, kind: str) -> None:
    before = resident()
    client = ground.stranger()
    client.tls()
    script(client)
    close = client.control.ending()
    assert close is not None and close.kind == kind
    assert resident() - before < NOTABLE
    ground.honest_works()


def replayed(c: RawClient) -> None:
    """The proof of another connection, whose nonces were others."""
    other = RawClient(c.address, c.token)
    try:
        other.tls()
        other.hello()
        other.heard_hello()
        c.proof(other.mac())
    finally:
        other.close()


def of_the_server(c: RawClient) -> None:
    c.proof(
        keys.server_proof(
            c.token, fingerprint=c.fingerprint, client_nonce=c.nonce, server_nonce=c.server_nonce
        )
    )


def of_another_certificate(c: RawClient) -> None:
    c.fingerprint = secrets.token_bytes(32)
    c.proof()


def of_another_token(c: RawClient) -> None:
    c.token = b"x" * 32
    c.proof()


SECOND: dict[str, tuple[Script, set[str]]] = {
    **{f"mac of {size}": (lambda c, n=size: c.proof(bytes(n)), {"auth", "protocol"}) for size in (0, 31, 33, 4000)},
    "a made-up mac": (lambda c: c.proof(secrets.token_bytes(32)), {"auth"}),
    "one bit off": (lambda c: c.proof(bytes([c.mac()[0] ^ 1]) + c.mac()[1:]), {"auth"}),
    "cut short": (lambda c: c.proof(c.mac()[:31]), {"auth", "protocol"}),
    "too long": (lambda c: c.proof(c.mac() + b"\0"), {"auth", "protocol"}),
    "replayed": (replayed, {"auth"}),
    "the server's": (of_the_server, {"auth"}),
    "of another certificate": (of_another_certificate, {"auth"}),
    "of another token": (of_another_token, {"auth"}),
    "HELLO again": (lambda c: c.hello(), {"protocol"}),
    **{what: (script, {"protocol"}) for what, script in (OVERSIZE | UNKNOWN | WRONG_ORDER).items()},
}


@pytest.mark.parametrize(("script", "kinds"), SECOND.values(), ids=SECOND)
def test_a_proof_that_lies(ground: Any, script: Script, kinds: set[str]) -> None:
    before = resident()
    client = ground.stranger()
    client.tls()
    client.hello()
    client.heard_hello()
    script(client)
    close = client.control.ending()
    assert close is not None and close.kind in kinds
    assert not any(isinstance(message, Proof | Params) for message in client.control.heard), "nothing to try tokens on"
    assert resident() - before < NOTABLE
    ground.honest_works()


THIRD: dict[str, Script] = {
    **{f"secret of {n}": (lambda c, n=n: c.params(secret=bytes(n))) for n in (0, 31, 33, 100_000)},
    **{f"max_chunk {n}": (lambda c, n=n: c.params(max_chunk=n)) for n in (0, (1 << 24) + 1, (1 << 32) - 1)},
    "max_open 0": lambda c: c.params(max_open=0),
    **{f"initial_credit {n}": (lambda c, n=n: c.params(initial_credit=n)) for n in (0, 1 << 63, U64)},
    "HELLO again": lambda c: c.hello(),
    "PROOF again": lambda c: c.proof(),
    "PING": sends(Ping(1)),
    "OPEN": sends(Open(1, 1, 10, 0, "", {})),
    "a record of 2^20 + 1": sends(record(3, length=(1 << 20) + 1)),
    "a record of 0": sends(record(3, length=0)),
    "2^32-1 transports": sends(record(3, b"\0\0\0\x20" + bytes(32 + 16) + b"\xff\xff\xff\xff")),
    "CLOSE": sends(Close("", "changed my mind")),
}


@pytest.mark.parametrize("script", THIRD.values(), ids=THIRD)
def test_params_that_lie(ground: Any, script: Script) -> None:
    """From here on the server may just close; no session comes of it."""
    before = resident()
    client = ground.stranger()
    client.tls()
    client.hello()
    client.heard_hello()
    client.proof()
    client.heard_proof()
    script(client)
    close = client.control.ending()
    assert close is None or close.kind in ("protocol", "")
    assert len(ground.server.sessions) == 1
    assert not any(isinstance(message, LaneGrant) for message in client.control.heard)
    assert resident() - before < NOTABLE
    ground.honest_works()


@pytest.mark.parametrize(
    "extreme",
    [
        {"max_chunk": 1}, {"max_chunk": 1 << 24}, {"max_open": 1}, {"max_open": (1 << 32) - 1},
        {"initial_credit": 1}, {"initial_credit": (1 << 63) - 1}, {"attributes": {"unknown": "is ignored"}},
    ],
    ids=str,
)  # fmt: skip
def test_params_at_their_bounds_make_a_session(ground: Any, extreme: dict[str, Any]) -> None:
    client = ground.stranger()
    client.tls()
    client.hello(versions=(0, 1, 65535), attributes={"streams": 1, "transports": "ipoac,tcp", "x": b"?"})
    client.heard_hello()
    client.proof()
    client.heard_proof()
    client.params(**extreme)
    client.control.await_(LaneGrant)
    client.control.alive()


def until(step: str) -> Script:
    """An honest handshake that goes as far as ``step``."""

    def go(c: RawClient) -> None:
        for name in ("tls", "hello", "heard_hello", "proof", "heard_proof", "params"):
            getattr(c, name)()
            if name == step:
                return

    return go


HALF_MESSAGES = {
    "tls": encode(Hello((1,), bytes(32), {}))[:20],
    "heard_hello": encode(Proof(bytes(32)))[:20],
    "heard_proof": encode(Params(bytes(32), 1, 1, 1, (), {}))[:20],
}


@pytest.mark.parametrize("how", ["notify", "fin", "rst"])
@pytest.mark.parametrize(
    ("step", "half"),
    [(step, False) for step in ("tls", "hello", "heard_hello", "proof", "heard_proof", "params")]
    + [(step, True) for step in HALF_MESSAGES],
)
def test_a_client_that_leaves_in_the_middle(ground: Any, step: str, half: bool, how: str) -> None:
    client = ground.stranger()
    until(step)(client)
    if half:
        client.control.send(HALF_MESSAGES[step])
    sock = client.control.sock
    if how == "notify":
        with contextlib.suppress(OSError, ssl.SSLError):
            sock.settimeout(5)
            sock.unwrap()
    elif how == "rst":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
    sock.close()
    ground.honest_works()


@pytest.mark.parametrize("size", [1, 2, 5, 7, 8, 100])
@pytest.mark.parametrize(
    "first",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01" + bytes(512),
        PREAMBLE.pack(PREAMBLE_MAGIC, 1) + bytes(100),
        b"AMSTL\x02\x00\x01" + bytes(100),
        bytes(range(100, 200)),
    ],
    ids=["ClientHello", "preamble", "preamble of another version", "noise"],
)
def test_a_connection_that_ends_after_its_first_bytes(ground: Any, first: bytes, size: int) -> None:
    with socket.create_connection(host_port(ground.server.address), 5) as sock:
        sock.sendall(first[:size])
        with contextlib.suppress(OSError):  # what nobody speaks is closed at once
            sock.shutdown(socket.SHUT_WR)
        assert hangs_up(sock)
    ground.honest_works()


def test_tls_that_is_not_ours(ground: Any) -> None:
    for alpn, version in (([], None), (["h2"], None), (["amst/2"], None), (["amst/1"], ssl.TLSVersion.TLSv1_2)):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if alpn:
            context.set_alpn_protocols(alpn)
        if version is not None:
            context.maximum_version = version
        with socket.create_connection(host_port(ground.server.address), 5) as sock:
            with contextlib.suppress(ssl.SSLError, OSError), context.wrap_socket(sock) as secure:
                secure.sendall(encode(Hello((1,), bytes(32), {})))
                assert hangs_up(secure)
    ground.honest_works()


@pytest.mark.parametrize("step", ["tls", "heard_hello", "heard_proof", "params"])
def test_bytes_that_are_no_tls_record(ground: Any, step: str) -> None:
    client = ground.stranger()
    until(step)(client)
    bare = socket.socket(fileno=os.dup(client.control.sock.fileno()))
    try:
        bare.sendall(b"\x17\x03\x03\x00\x20" + os.urandom(32))
        assert hangs_up(bare)
    finally:
        bare.close()
    ground.honest_works()


def test_a_trickled_handshake_is_as_good_as_another(ground: Any) -> None:
    """Records and TLS records may be cut anyhow."""
    client = ground.stranger()
    client.tls()
    send = client.control.send

    def trickle(*what: Any) -> None:
        for message in what:
            for byte in encode(message):
                send(bytes([byte]))

    client.control.send = trickle
    client.hello()
    client.heard_hello()
    client.proof()
    client.heard_proof()
    client.params()
    client.control.await_(LaneGrant)
    client.control.alive()


def test_all_who_dawdle_are_cut_when_their_time_is_up(ground: Any) -> None:
    """Silence at every step, and bytes that come so slowly that each alone would be in time."""
    started = time.monotonic()
    silent: list[tuple[str, Any]] = []
    for first in (b"", b"\x16", b"AMST", b"\x16\x03\x01\x02\x00\x01\x00\x01"):
        sock = ground.keep(socket.create_connection(host_port(ground.server.address), 5))
        sock.sendall(first)
        silent.append((repr(first), sock))
    lane = ground.keep(socket.create_connection(host_port(ground.server.address), 5))
    lane.sendall(PREAMBLE.pack(PREAMBLE_MAGIC, 1) + bytes(10))
    silent.append(("half an ADMIT", lane))
    told = []
    for step in ("tls", "heard_hello", "heard_proof"):
        client = ground.stranger()
        until(step)(client)
        told.append((step, client))
    slow = ground.stranger()
    slow.tls()
    hello_ = encode(Hello((1,), bytes(32), {"software": "x" * 200}))
    with contextlib.suppress(Ended):
        for byte in hello_:
            slow.control.send(bytes([byte]))
            if time.monotonic() - started > 6:
                break
            time.sleep(0.05)
    close = slow.control.ending()
    assert close is not None and close.kind == "timeout"
    for what, sock in silent:
        assert hangs_up(sock, within_s=4), what
    for step, client in told:
        close = client.control.ending(within_s=4)
        assert (close is not None and close.kind == "timeout") or step == "heard_proof", step
    assert time.monotonic() - started < 12
    ground.honest_works()
