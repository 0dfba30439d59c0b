"""TLS in memory: two ends that agree, and everything else that may be on the other end."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amst_core.errors import (
    AmstError,
    BrokenError,
    ClosedError,
    ConfigError,
    ConnectError,
    IntegrityError,
    NotFoundError,
    ProtocolError,
)
from amst_core.security.identity import ServerIdentity
from amst_core.security.tls import ALPN, TlsStream, client_context, server_context


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> ServerIdentity:
    return ServerIdentity.load_or_create(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="module")
def server(identity: ServerIdentity) -> ssl.SSLContext:
    return server_context(identity.certificate_path, identity.key_path)


def client_end(context: ssl.SSLContext | None = None) -> TlsStream:
    return TlsStream(context or client_context(), server_side=False, peer="host:9000")


def server_end(context: ssl.SSLContext) -> TlsStream:
    return TlsStream(context, server_side=True, peer="10.0.0.1:5555")


def pump(source: TlsStream, sink: TlsStream, *, step: int = 1 << 20) -> None:
    data = source.outgoing()
    for at in range(0, len(data), step):
        sink.feed(data[at : at + step])


def shake(client: TlsStream, server: TlsStream) -> None:
    """Both handshakes to their end; neither needs more than a few flights."""
    for _ in range(4):
        done = client.handshake()
        pump(client, server)
        done &= server.handshake()
        pump(server, client)
        if done:
            return
    raise AssertionError("the handshake did not end")


@pytest.fixture
def pair(server: ssl.SSLContext) -> tuple[TlsStream, TlsStream]:
    client, peer = client_end(), server_end(server)
    shake(client, peer)
    return client, peer


def test_both_ends_agree_and_the_certificate_is_the_servers(identity: ServerIdentity, server: ssl.SSLContext) -> None:
    client, peer = client_end(), server_end(server)
    assert not client.handshake()
    assert not peer.handshake()
    shake(client, peer)
    assert client.handshake()
    assert peer.handshake()
    assert client.peer_certificate() == identity.certificate_der
    assert client.receive() == peer.receive() == b""
    assert not client.ended


def test_the_certificate_is_known_only_after_the_handshake(pair: tuple[TlsStream, TlsStream]) -> None:
    with pytest.raises(ProtocolError, match="no certificate"):
        client_end().peer_certificate()
    with pytest.raises(ProtocolError, match="no certificate"):
        pair[1].peer_certificate()  # clients have none


def test_a_handshake_survives_any_cutting_of_the_stream(server: ssl.SSLContext) -> None:
    client, peer = client_end(), server_end(server)
    client.handshake()
    for source, sink in ((client, peer), (peer, client), (client, peer)):
        for byte in source.outgoing():
            done = sink.handshake()
            sink.feed(bytes([byte]))
        done = sink.handshake()
    assert done
    assert client.handshake()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(sent=st.lists(st.binary(max_size=50_000), max_size=4), step=st.integers(1, 3000), back=st.booleans())
def test_bytes_arrive_whole_and_in_order(
    pair: tuple[TlsStream, TlsStream], sent: list[bytes], step: int, back: bool
) -> None:
    source, sink = reversed(pair) if back else pair
    for part in sent:
        source.send(part)
    got, data = b"", source.outgoing()
    for at in range(0, len(data), step):
        sink.feed(data[at : at + step])
        got += sink.receive()
    assert got == b"".join(sent)


def test_nothing_readable_leaves(pair: tuple[TlsStream, TlsStream]) -> None:
    pair[0].send(b"a secret that must not show")
    assert b"secret" not in pair[0].outgoing()


def test_an_orderly_end_comes_after_the_bytes_before_it(pair: tuple[TlsStream, TlsStream]) -> None:
    client, peer = pair
    client.send(b"last words")
    client.close()
    client.close()
    pump(client, peer)
    peer.feed_eof()
    assert peer.receive() == b"last words"
    assert peer.receive() == b""
    assert peer.ended
    with pytest.raises(ClosedError):
        client.send(b"too late")
    peer.send(b"an answer")  # the other direction is still open
    peer.close()
    pump(peer, client)
    assert client.receive() == b"an answer"
    assert client.receive() == b""
    assert client.ended


def test_a_cut_connection_is_not_an_end(pair: tuple[TlsStream, TlsStream]) -> None:
    client, peer = pair
    client.send(b"whole")
    client.send(b"torn apart")
    peer.feed(client.outgoing()[:-1])
    peer.feed_eof()
    assert peer.receive() == b"whole"
    for _ in range(2):
        with pytest.raises(BrokenError, match="cut without notice") as caught:
            peer.receive()
        assert caught.value.peer == "10.0.0.1:5555"
    assert not peer.ended
    with pytest.raises(BrokenError):
        peer.send(b"x")
    peer.close()


def test_a_changed_record_is_noticed_and_the_peer_told(pair: tuple[TlsStream, TlsStream]) -> None:
    client, peer = pair
    client.send(b"good")
    good = client.outgoing()
    client.send(b"changed")
    bad = bytearray(client.outgoing())
    bad[-1] ^= 1
    peer.feed(good + bytes(bad))
    assert peer.receive() == b"good"
    for _ in range(2):
        with pytest.raises(IntegrityError):
            peer.receive()
        with pytest.raises(IntegrityError):
            peer.send(b"as if nothing had happened")
    pump(peer, client)
    with pytest.raises(BrokenError, match="alert"):
        client.receive()


def test_a_replayed_record_is_noticed(pair: tuple[TlsStream, TlsStream]) -> None:
    client, peer = pair
    client.send(b"once")
    record = client.outgoing()
    peer.feed(record * 2)
    assert peer.receive() == b"once"
    with pytest.raises(IntegrityError):
        peer.receive()


def test_bytes_that_are_no_record_break_the_rules(pair: tuple[TlsStream, TlsStream]) -> None:
    pair[1].feed(b"\xff" * 64)
    with pytest.raises(ProtocolError, match="rules of TLS"):
        pair[1].receive()


STRANGERS = [
    b"GET / HTTP/1.0\r\n\r\n",
    b"SSH-2.0-OpenSSH_9.2\r\n",
    bytes(64),
    b"\x16\x03\x01\x00\x05hello",
    b"\xff" * 600,
]


@pytest.mark.parametrize("garbage", STRANGERS)
def test_a_peer_without_tls_is_no_amst_server(garbage: bytes) -> None:
    client = client_end()
    assert not client.handshake()
    client.feed(garbage)
    with pytest.raises(ConnectError, match="host:9000 is not an AMST server") as caught:
        client.handshake()
    assert not caught.value.retryable
    assert caught.value.peer == "host:9000"


@pytest.mark.parametrize("garbage", STRANGERS)
def test_a_peer_without_tls_is_no_amst_client(server: ssl.SSLContext, garbage: bytes) -> None:
    peer = server_end(server)
    peer.feed(garbage)
    with pytest.raises(ProtocolError, match="not an AMST client") as caught:
        peer.handshake()
    assert caught.value.peer == "10.0.0.1:5555"


def other_alpn(context: ssl.SSLContext) -> None:
    context.set_alpn_protocols(["h2"])


def no_alpn(context: ssl.SSLContext) -> None:
    context.set_alpn_protocols([])


def tls_1_2(context: ssl.SSLContext) -> None:
    context.set_alpn_protocols([ALPN])
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2


ODD = pytest.mark.parametrize("odd", [other_alpn, no_alpn, tls_1_2])


def outcome(end: TlsStream) -> AmstError | bool:
    try:
        return end.handshake()
    except AmstError as err:
        return err


@ODD
def test_a_client_of_another_protocol_is_refused(server: ssl.SSLContext, odd: Callable[[ssl.SSLContext], None]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    odd(context)
    # A bare OpenSSL end, so that the other side's own checks play no part.
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client, peer = context.wrap_bio(incoming, outgoing), server_end(server)
    result: AmstError | bool = False
    told: str | None = None
    for _ in range(4):
        try:
            client.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as err:
            told = err.reason
            break
        peer.feed(outgoing.read())
        if result is False:
            result = outcome(peer)
        incoming.write(peer.outgoing())
    assert isinstance(result, ProtocolError)
    assert "not an AMST client" in str(result)
    assert told == ("TLSV1_ALERT_PROTOCOL_VERSION" if odd is tls_1_2 else None)


@ODD
def test_a_server_of_another_protocol_is_refused(
    identity: ServerIdentity, odd: Callable[[ssl.SSLContext], None]
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity.certificate_path, identity.key_path)
    odd(context)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    peer, client = context.wrap_bio(incoming, outgoing, server_side=True), client_end()
    result: AmstError | bool = outcome(client)
    for _ in range(3):
        incoming.write(client.outgoing())
        try:
            peer.do_handshake()
        except ssl.SSLError:  # it wants more, or refuses us itself: then its alert decides
            client.feed(outgoing.read())
        else:
            client.feed(outgoing.read())
        result = outcome(client)
        if result is not False:
            break
    assert isinstance(result, ConnectError)
    assert "not an AMST server" in str(result)
    assert not result.retryable


def test_a_connection_closed_in_mid_handshake_is_told_apart(server: ssl.SSLContext) -> None:
    client, peer = client_end(), server_end(server)
    client.handshake()
    peer.feed(client.outgoing()[:100])
    for end in (client, peer):
        end.feed_eof()
    with pytest.raises(ConnectError, match="closed the connection") as caught:
        client.handshake()
    assert caught.value.retryable
    with pytest.raises(BrokenError, match="closed the connection"):
        peer.handshake()


def test_no_session_tickets_are_given_out(pair: tuple[TlsStream, TlsStream]) -> None:
    client = pair[0]
    assert client.receive() == b""  # takes in what came behind the handshake
    assert client._tls.session is not None
    assert not client._tls.session.has_ticket


def test_a_key_that_does_not_belong_to_the_certificate(identity: ServerIdentity, tmp_path: Path) -> None:
    other = ServerIdentity.load_or_create(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"certificate\.pem.*key\.pem.*mismatch"):
        server_context(identity.certificate_path, other.key_path)


def test_an_encrypted_key_fails_instead_of_asking(identity: ServerIdentity, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        PrivateFormat,
        load_pem_private_key,
    )

    key = load_pem_private_key(identity.key_path.read_bytes(), None)
    locked = tmp_path / "locked.pem"
    locked.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"something else")))
    with pytest.raises(ConfigError, match="unencrypted"):
        server_context(identity.certificate_path, locked)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="certificate and key"):
        server_context(tmp_path / "c.pem", tmp_path / "k.pem")
