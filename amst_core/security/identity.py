"""The state directory: the server's token, key and certificate, and where a client finds a token.

Only a server creates anything. All files are 0600 in a 0700 directory, written whole under a lock; one that
others can read is refused, as ssh refuses such a key.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import re
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..errors import AuthError, ConfigError, DeadlineError, NotFoundError, UsageError, error_from_os

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

TOKEN_FILE: Final = "token"
KEY_FILE: Final = "key.pem"
CERTIFICATE_FILE: Final = "certificate.pem"
_LOCK_FILE: Final = "lock"

MIN_TOKEN_CHARACTERS: Final = 32
_MAX_FILE: Final = 65536
_LOCK_TIMEOUT_S: Final = 10.0
_HEX_TOKEN: Final = re.compile("[0-9A-Fa-f]{64}")


def state_dir(environ: Mapping[str, str]) -> Path:
    """Where AMST keeps its state: ``$AMST_STATE_DIR``, by default ``~/.local/state/amst``.

    Raises:
        UsageError: neither ``AMST_STATE_DIR`` nor a home directory is known.
    """
    if chosen := environ.get("AMST_STATE_DIR"):
        return Path(chosen).absolute()
    home = environ.get("HOME")
    if not home:
        try:
            home = pwd.getpwuid(os.geteuid()).pw_dir
        except KeyError as err:
            raise UsageError("no home directory is known; set AMST_STATE_DIR") from err
    return Path(home, ".local", "state", "amst").absolute()


def parse_token(text: str, *, source: str = "the token") -> bytes:
    """The secret bytes of a token: of 64 hex digits the 32 bytes they spell, otherwise its UTF-8 text.

    White space around it is dropped. ``source`` names in errors where it came from; the token is never shown.

    Raises:
        UsageError: empty, shorter than 32 characters, or not one line of text.
    """
    token = text.strip()
    if _HEX_TOKEN.fullmatch(token):
        return bytes.fromhex(token)
    advice = f"a token is 64 hex digits, or at least {MIN_TOKEN_CHARACTERS} characters of your own choice"
    if len(token) < MIN_TOKEN_CHARACTERS:
        raise UsageError(f"{source} has {len(token)} characters; {advice}")
    if not token.isprintable():  # also what was no UTF-8 in the environment
        raise UsageError(f"{source} is not one line of text; {advice}")
    return token.encode()


def find_token(
    token_file: str | os.PathLike[str] | None = None, *, environ: Mapping[str, str] = os.environ
) -> bytes | None:
    """The token a client should prove: of ``token_file``, else of AMST_TOKEN, else of the state directory.

    None when the state directory has none either. Never creates anything.

    Raises:
        UsageError: the token is malformed or short, or ``token_file`` cannot be read.
        AuthError: others can read the state directory's token.
        RefusedError, StorageError: the state directory's token exists and cannot be read.
    """
    if token_file is not None:
        return _named_token(token_file)
    text = environ.get("AMST_TOKEN")
    if text is not None:
        return parse_token(text, source="AMST_TOKEN")
    try:
        return _state_token(state_dir(environ))
    except NotFoundError:
        return None


@dataclass(frozen=True, slots=True)
class ServerIdentity:
    """Who a server is: the token its clients must know, and the certificate it shows them."""

    token: bytes = field(repr=False)
    certificate_path: Path
    key_path: Path
    certificate_der: bytes = field(repr=False)

    @classmethod
    def load_or_create(cls, directory: Path) -> ServerIdentity:
        """The identity kept in ``directory``; what is missing is made, by one process at a time.

        Blocks for at most 10 s while another process makes it. A directory that is complete is only read.

        Raises:
            AuthError: others can read the token or the key, or write to the directory.
            ConfigError: certificate and key do not belong together, or one of them cannot be decoded.
            UsageError: the token is malformed or short.
            DeadlineError: another process holds the lock.
            NotFoundError, RefusedError, StorageError: the file system refused.
        """
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_directory(directory)
            if not _complete(directory):
                with _locked(directory):
                    _create_missing(directory)
        except OSError as err:
            raise error_from_os(err, "cannot make the state directory", path=str(directory)) from err
        key_path, certificate_path = directory / KEY_FILE, directory / CERTIFICATE_FILE
        der = _matching_certificate(certificate_path, key_path)
        return cls(_state_token(directory), certificate_path, key_path, der)


# ---- reading ------------------------------------------------------------------------------


def _named_token(path: str | os.PathLike[str]) -> bytes:
    # No look at permissions: the user named it, and mounted secrets and <(...) are what they are.
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            raw = file.read(_MAX_FILE + 1)
    except (OSError, ValueError) as err:
        raise UsageError(f"cannot read token file {name}: {getattr(err, 'strerror', None) or err}", path=name) from err
    return _decode_token(raw, name)


def _state_token(directory: Path) -> bytes:
    path = directory / TOKEN_FILE
    return _decode_token(_read_private(path), str(path))


def _decode_token(raw: bytes, name: str) -> bytes:
    source = f"token file {name}"
    if len(raw) > _MAX_FILE:
        raise UsageError(f"{source} is longer than {_MAX_FILE} bytes; that is no token", path=name)
    try:
        text = raw.decode()
    except UnicodeDecodeError as err:
        raise UsageError(f"{source} is not UTF-8 text", path=name) from err
    return parse_token(text, source=source)


def _read_private(path: Path) -> bytes:
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise ConfigError(f"{path} is not a regular file", path=str(path))
            if mode & 0o077:
                raise AuthError(
                    f"{path} is open to others (mode {stat.S_IMODE(mode):04o}), so its secret may be known: "
                    f"delete it to have a new one made, or trust it with: chmod 600 {path}",
                    path=str(path),
                )
            return file.read(_MAX_FILE + 1)
    except OSError as err:
        raise error_from_os(err, "cannot read", path=str(path)) from err


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a FIFO in the place of a file must not hang us


def _check_directory(directory: Path) -> None:
    mode = directory.stat().st_mode
    if mode & 0o022:
        raise AuthError(
            f"others can write to {directory} (mode {stat.S_IMODE(mode):04o}) and so replace the token; "
            f"use: chmod 700 {directory}",
            path=str(directory),
        )


def _matching_certificate(certificate_path: Path, key_path: Path) -> bytes:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    try:
        certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
        same = certificate.public_key() == _load_key(key_path).public_key()
    except OSError as err:
        raise error_from_os(err, "cannot read", path=str(certificate_path)) from err
    except ValueError as err:
        raise ConfigError(f"{certificate_path} is not a PEM certificate; {_START_OVER}") from err
    if not same:
        raise ConfigError(f"{certificate_path} was not made for {key_path}; {_START_OVER}")
    return certificate.public_bytes(Encoding.DER)


_START_OVER: Final = "delete both to have new ones made (tokens stay valid)"


def _load_key(path: Path) -> EllipticCurvePrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(_read_private(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as err:  # TypeError: it is encrypted
        raise ConfigError(f"{path} is not an unencrypted PEM key; {_START_OVER}", path=str(path)) from err
    if not isinstance(key, EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is not an elliptic-curve key; {_START_OVER}", path=str(path))
    return key


# ---- making -------------------------------------------------------------------------------


def _complete(directory: Path) -> bool:
    return all((directory / name).exists() for name in (TOKEN_FILE, KEY_FILE, CERTIFICATE_FILE))


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    fd = os.open(directory / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        until = time.monotonic() + _LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as err:
                if time.monotonic() > until:
                    raise DeadlineError(
                        f"another process has been holding {directory / _LOCK_FILE} for {_LOCK_TIMEOUT_S:g} s; "
                        "see which with: fuser -v on that file",
                        path=str(directory),
                    ) from err
                time.sleep(0.02)
        yield
    finally:
        os.close(fd)


def _create_missing(directory: Path) -> None:
    """Make what is not there, the key before its certificate: a crash leaves a prefix, which is completed."""
    token, key_file, certificate_file = (directory / name for name in (TOKEN_FILE, KEY_FILE, CERTIFICATE_FILE))
    if not token.exists():
        _write(token, secrets.token_hex(32).encode() + b"\n")
    if not key_file.exists():
        if certificate_file.exists():
            raise ConfigError(f"{certificate_file} has lost its {KEY_FILE}; put that back, or {_START_OVER}")
        _write(key_file, _new_key())
    if not certificate_file.exists():
        _write(certificate_file, _new_certificate(_load_key(key_file)))


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write(path: Path, content: bytes) -> None:
    """Put ``content`` under ``path`` whole or not at all. Under the lock, so the temporary name is ours."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)  # of a process that died here
    with open(temporary, "xb", opener=_private) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _new_key() -> bytes:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _new_certificate(key: EllipticCurvePrivateKey) -> bytes:
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding

    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "amst")])
    # Nobody looks at the dates, and a wrong clock must do no harm: the last is RFC 5280's "no expiration".
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC))
    )
    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM)
