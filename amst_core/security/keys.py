"""The key schedule: proofs of the token, the session secret, lane keys, admission (docs/security.md).

Pure functions on bytes. Every input but the token has one fixed size, which is checked, so that no two
different inputs ever run together into the same message.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import struct
from typing import Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ..errors import ProtocolError

NONCE_SIZE: Final = 32
"""Bytes of the nonce in HELLO."""

HALF_SIZE: Final = 32
"""Bytes of each side's half of the session secret in PARAMS."""

CHALLENGE_SIZE: Final = 32
"""Bytes of the payload of a CHALLENGE frame."""

KEY_SIZE: Final = 32
"""Bytes of every secret, key, fingerprint and MAC here (SHA-256, AES-256)."""

_U64: Final = struct.Struct("!Q")


class Direction(enum.Enum):
    """Which way a lane key seals. The client is the side that opened the session."""

    CLIENT_TO_SERVER = b"c2s"
    SERVER_TO_CLIENT = b"s2c"


def certificate_fingerprint(der: bytes) -> bytes:
    """SHA-256 of a certificate's DER encoding, 32 bytes: what the proofs bind the TLS channel by."""
    return hashlib.sha256(der).digest()


def server_proof(token: bytes, *, fingerprint: bytes, client_nonce: bytes, server_nonce: bytes) -> bytes:
    """The server's proof that it holds ``token``, 32 bytes, for this TLS channel and these nonces.

    Raises:
        ProtocolError: a nonce or the fingerprint is not 32 bytes.
    """
    return _proof(b"srv", token, fingerprint, client_nonce, server_nonce)


def client_proof(token: bytes, *, fingerprint: bytes, client_nonce: bytes, server_nonce: bytes) -> bytes:
    """The client's proof that it holds ``token``; otherwise as `server_proof`."""
    return _proof(b"cli", token, fingerprint, client_nonce, server_nonce)


def same_mac(expected: bytes, received: bytes) -> bool:
    """Whether a proof or an admission received is the one expected, in time that tells nothing."""
    return hmac.compare_digest(expected, received)


def session_secret(client_half: bytes, server_half: bytes) -> bytes:
    """The session secret S, 32 bytes, from both sides' random halves (exchanged inside TLS, after the proofs).

    Raises:
        ProtocolError: a half is not 32 bytes.
    """
    halves = _sized("client half", client_half, HALF_SIZE) + _sized("server half", server_half, HALF_SIZE)
    return _hkdf(halves, b"amst session")


def lane_key(secret: bytes, *, direction: Direction, incarnation: int) -> bytes:
    """The AES-256 key of one direction of one lane, 32 bytes.

    Raises:
        ProtocolError: the secret is not 32 bytes, or the incarnation is no u64.
    """
    info = b"lane" + direction.value + _u64(incarnation)
    return _hkdf(_sized("session secret", secret, KEY_SIZE), info)


def admission_mac(secret: bytes, *, incarnation: int, challenge: bytes) -> bytes:
    """The opener's answer to a lane's challenge, 32 bytes.

    Raises:
        ProtocolError: the secret or the challenge is not 32 bytes, or the incarnation is no u64.
    """
    message = b"admit" + _u64(incarnation) + _sized("challenge", challenge, CHALLENGE_SIZE)
    return hmac.digest(_sized("session secret", secret, KEY_SIZE), message, "sha256")


def resume_mac(
    secret: bytes,
    *,
    by_client: bool,
    epoch: int,
    received: int,
    fingerprint: bytes,
    client_nonce: bytes,
    server_nonce: bytes,
) -> bytes:
    """One side's proof, 32 bytes, that it holds the secret of the session that it takes up again.

    ``epoch`` counts the control channels of the session, ``received`` the peer's messages that this side took in.

    Raises:
        ProtocolError: a size is wrong, or a number is no u64.
    """
    message = (
        (b"resume cli" if by_client else b"resume srv")
        + _u64(epoch)
        + _u64(received)
        + _sized("certificate fingerprint", fingerprint, KEY_SIZE)
        + _sized("client nonce", client_nonce, NONCE_SIZE)
        + _sized("server nonce", server_nonce, NONCE_SIZE)
    )
    return hmac.digest(_sized("session secret", secret, KEY_SIZE), message, "sha256")


def _proof(label: bytes, token: bytes, fingerprint: bytes, client_nonce: bytes, server_nonce: bytes) -> bytes:
    message = (
        label
        + _sized("certificate fingerprint", fingerprint, KEY_SIZE)
        + _sized("client nonce", client_nonce, NONCE_SIZE)
        + _sized("server nonce", server_nonce, NONCE_SIZE)
    )
    return hmac.digest(token, message, "sha256")


def _hkdf(secret: bytes, info: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=KEY_SIZE, salt=None, info=info).derive(secret)


def _sized(what: str, value: bytes, size: int) -> bytes:
    if len(value) != size:
        raise ProtocolError(f"{what} of {len(value)} bytes; the protocol has {size}")
    return value


def _u64(number: int) -> bytes:
    if not 0 <= number < 1 << 64:
        raise ProtocolError(f"{number} does not fit 64 bits")
    return _U64.pack(number)
