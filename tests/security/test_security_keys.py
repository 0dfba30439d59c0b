"""The key schedule, against vectors computed here from hashlib and hmac alone."""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from amst_core.errors import ProtocolError
from amst_core.security import keys
from amst_core.security.keys import Direction

DOCUMENT = Path(__file__).parents[2] / "docs" / "security.md"


def run(start: int) -> bytes:
    return bytes(range(start, start + 32))


TOKEN, FINGERPRINT, CLIENT_NONCE, SERVER_NONCE = run(0), run(0x20), run(0x40), run(0x60)
CLIENT_HALF, SERVER_HALF, CHALLENGE = run(0x80), run(0xA0), run(0xC0)
INCARNATION = 0x0102030405060708

VECTORS = {
    "server proof": "1eba41fa52bf920818726554a8c62ce2b189761efb95d51f5f9c5db7168ea255",
    "client proof": "d51e8b7dd040283b0d040556b600b89767374ca2757473c82c99d897c18245fb",
    "session secret": "84d597c9306d69c5f8245b634fac629d7d52e29c696bb097b857723c82a8816e",
    "lane key c2s 1": "c07faaba0f0f2d8cc7d6e13085a4141aad3bc10d6d44cbc4939559f2cbaae362",
    "lane key s2c 1": "73d17116690338fcffb6a2a7c642a147e65258cda0f3cd53e66bba60ad545042",
    "admission 1": "d6918557e288aedde9b28865bb6b48d2f96a2a97544257bf60cf8593dd8fd80f",
    "resume client": "453f368f69b50a2f2d920ec5a3aa5154276aabda7d7c5821651077c06c1f2490",
    "resume server": "9e8daa9dfa3e549495884a232f39f766385645bc50f80c8d8bbbddac3cfcc335",
    "lane key c2s": "3a8693c887784b957efd5fe3c8a67fac5734409be55ba79d8660408fd4ddd14c",
    "lane key s2c": "374e0bc759479cefa1336619abdc3bc0275195c08746775d1490f2e0d4686883",
    "admission": "f985fe15e302acdba02740ecad43e258ffc567c14fedd9485ff847b17e154b8d",
}


def mac(key: bytes, message: bytes) -> bytes:
    return hmac.new(key, message, hashlib.sha256).digest()


def hkdf(secret: bytes, *, salt: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869, written out."""
    key, output, block = mac(salt, secret), b"", b""
    for counter in range(1, -(-length // 32) + 1):
        block = mac(key, block + info + bytes([counter]))
        output += block
    return output[:length]


def test_the_tests_own_hkdf_is_rfc_5869s() -> None:
    derived = hkdf(b"\x0b" * 22, salt=bytes(range(13)), info=bytes(range(0xF0, 0xFA)), length=42)
    assert derived.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"


def schedule() -> dict[str, bytes]:
    proofs = {"fingerprint": FINGERPRINT, "client_nonce": CLIENT_NONCE, "server_nonce": SERVER_NONCE}
    secret = keys.session_secret(CLIENT_HALF, SERVER_HALF)
    c2s, s2c = Direction.CLIENT_TO_SERVER, Direction.SERVER_TO_CLIENT
    return {
        "server proof": keys.server_proof(TOKEN, **proofs),
        "client proof": keys.client_proof(TOKEN, **proofs),
        "session secret": secret,
        "lane key c2s 1": keys.lane_key(secret, direction=c2s, incarnation=1),
        "lane key s2c 1": keys.lane_key(secret, direction=s2c, incarnation=1),
        "admission 1": keys.admission_mac(secret, incarnation=1, challenge=CHALLENGE),
        "resume client": keys.resume_mac(secret, by_client=True, epoch=1, received=2, **proofs),
        "resume server": keys.resume_mac(secret, by_client=False, epoch=1, received=2, **proofs),
        "lane key c2s": keys.lane_key(secret, direction=c2s, incarnation=INCARNATION),
        "lane key s2c": keys.lane_key(secret, direction=s2c, incarnation=INCARNATION),
        "admission": keys.admission_mac(secret, incarnation=INCARNATION, challenge=CHALLENGE),
    }


def independent_schedule() -> dict[str, bytes]:
    transcript = FINGERPRINT + CLIENT_NONCE + SERVER_NONCE
    secret = hkdf(CLIENT_HALF + SERVER_HALF, salt=bytes(32), info=b"amst session", length=32)
    results = {
        "server proof": mac(TOKEN, b"srv" + transcript),
        "client proof": mac(TOKEN, b"cli" + transcript),
        "session secret": secret,
    }
    for side, label in (("client", b"resume cli"), ("server", b"resume srv")):
        results[f"resume {side}"] = mac(secret, label + struct.pack(">QQ", 1, 2) + transcript)
    for suffix, number in ((" 1", 1), ("", INCARNATION)):
        u64 = struct.pack(">Q", number)
        for way in ("c2s", "s2c"):
            info = b"lane" + way.encode() + u64
            results[f"lane key {way}{suffix}"] = hkdf(secret, salt=bytes(32), info=info, length=32)
        results[f"admission{suffix}"] = mac(secret, b"admit" + u64 + CHALLENGE)
    return results


def test_known_answers() -> None:
    assert {name: value.hex() for name, value in schedule().items()} == VECTORS
    assert schedule() == independent_schedule()


def test_the_document_prints_the_same_vectors() -> None:
    text = DOCUMENT.read_text()
    assert [name for name, value in VECTORS.items() if value not in text] == []


def test_the_fingerprint_is_sha_256_of_the_certificate() -> None:
    assert keys.certificate_fingerprint(b"some DER").hex() == hashlib.sha256(b"some DER").hexdigest()


def test_proofs_depend_on_every_input_and_on_the_side() -> None:
    base = {"fingerprint": FINGERPRINT, "client_nonce": CLIENT_NONCE, "server_nonce": SERVER_NONCE}
    seen = {keys.server_proof(TOKEN, **base), keys.client_proof(TOKEN, **base), keys.client_proof(run(1), **base)}
    seen |= {keys.client_proof(TOKEN, **base | {name: run(0xE0)}) for name in base}
    seen.add(keys.client_proof(TOKEN, **base | {"client_nonce": SERVER_NONCE, "server_nonce": CLIENT_NONCE}))
    assert len(seen) == 7


def test_a_resumption_depends_on_every_input_and_on_the_side() -> None:
    base = {
        "by_client": True,
        "epoch": 1,
        "received": 2,
        "fingerprint": FINGERPRINT,
        "client_nonce": CLIENT_NONCE,
        "server_nonce": SERVER_NONCE,
    }
    other = {"by_client": False, "epoch": 2, "received": 1}
    seen = {keys.resume_mac(run(0), **base), keys.resume_mac(run(1), **base)}  # type: ignore[arg-type]
    for name in base:
        seen.add(keys.resume_mac(run(0), **base | {name: other.get(name, run(0xE0))}))  # type: ignore[arg-type]
    assert len(seen) == 2 + len(base)


def test_the_halves_are_not_interchangeable() -> None:
    assert keys.session_secret(CLIENT_HALF, SERVER_HALF) != keys.session_secret(SERVER_HALF, CLIENT_HALF)


def resumption(
    *,
    secret: bytes = run(0),
    epoch: int = 1,
    received: int = 1,
    fingerprint: bytes = run(0),
    client_nonce: bytes = run(0),
    server_nonce: bytes = run(0),
) -> bytes:
    return keys.resume_mac(
        secret,
        by_client=True,
        epoch=epoch,
        received=received,
        fingerprint=fingerprint,
        client_nonce=client_nonce,
        server_nonce=server_nonce,
    )


@pytest.mark.parametrize("size", [0, 31, 33])
@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("fingerprint", lambda v: keys.server_proof(TOKEN, fingerprint=v, client_nonce=run(0), server_nonce=run(0))),
        ("client nonce", lambda v: keys.client_proof(TOKEN, fingerprint=run(0), client_nonce=v, server_nonce=run(0))),
        ("server nonce", lambda v: keys.client_proof(TOKEN, fingerprint=run(0), client_nonce=run(0), server_nonce=v)),
        ("client half", lambda v: keys.session_secret(v, run(0))),
        ("server half", lambda v: keys.session_secret(run(0), v)),
        ("session secret", lambda v: keys.lane_key(v, direction=Direction.CLIENT_TO_SERVER, incarnation=1)),
        ("session secret", lambda v: keys.admission_mac(v, incarnation=1, challenge=CHALLENGE)),
        ("challenge", lambda v: keys.admission_mac(run(0), incarnation=1, challenge=v)),
        ("session secret", lambda v: resumption(secret=v)),
        ("fingerprint", lambda v: resumption(fingerprint=v)),
        ("client nonce", lambda v: resumption(client_nonce=v)),
        ("server nonce", lambda v: resumption(server_nonce=v)),
    ],
)
def test_inputs_of_another_size_are_refused(name: str, use: Callable[[bytes], bytes], size: int) -> None:
    with pytest.raises(ProtocolError, match=f"{name} of {size} bytes"):
        use(bytes(size))
    assert len(use(bytes(32))) == 32


@pytest.mark.parametrize("number", [-1, 1 << 64])
def test_incarnations_epochs_and_counts_are_u64(number: int) -> None:
    for use in (
        lambda: keys.lane_key(run(0), direction=Direction.CLIENT_TO_SERVER, incarnation=number),
        lambda: keys.admission_mac(run(0), incarnation=number, challenge=CHALLENGE),
        lambda: resumption(epoch=number),
        lambda: resumption(received=number),
    ):
        with pytest.raises(ProtocolError, match=f"{number} does not fit 64 bits"):
            use()


def test_macs_compare_by_value() -> None:
    good = keys.admission_mac(run(0), incarnation=1, challenge=CHALLENGE)
    assert keys.same_mac(good, bytes(bytearray(good)))
    assert not keys.same_mac(good, good[:-1] + bytes([good[-1] ^ 1]))
    assert not keys.same_mac(good, good[:-1])
    assert not keys.same_mac(good, b"")
