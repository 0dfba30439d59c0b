"""The state directory: one identity whatever happens, and tokens from where the user put them."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import amst_core
from amst_core.errors import (
    AmstError,
    AuthError,
    ConfigError,
    DeadlineError,
    RefusedError,
    StorageError,
    UsageError,
)
from amst_core.security import identity as module
from amst_core.security.identity import ServerIdentity, find_token, parse_token, state_dir

# The package under test, for subprocesses: the tree's or an installed wheel's.
ENVIRON = os.environ | {"PYTHONPATH": str(Path(amst_core.__file__).parents[1])}
HEX = "00112233445566778899aabbccddeeffFFEEDDCCBBAA99887766554433221100"
PHRASE = "correct horse battery staple, über"
FILES = {"token", "key.pem", "certificate.pem"}


def modes(directory: Path) -> dict[str, int]:
    return {entry.name: entry.stat().st_mode & 0o777 for entry in directory.iterdir()}


# ---- the server's identity ----------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_everything_is_made_once_and_private(tmp_path: Path, umask: int) -> None:
    directory = tmp_path / "a" / "state"
    before = os.umask(umask)
    try:
        made = ServerIdentity.load_or_create(directory)
    finally:
        os.umask(before)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert modes(directory) == dict.fromkeys(FILES | {"lock"}, 0o600)
    assert re.fullmatch("[0-9a-f]{64}\n", (directory / "token").read_text())
    assert made.token == bytes.fromhex((directory / "token").read_text())
    assert repr(made.token) not in repr(made)
    assert ServerIdentity.load_or_create(directory) == made
    assert ServerIdentity.load_or_create(tmp_path / "b").token != made.token


def test_the_certificate_is_ecdsa_p256_and_does_not_expire(tmp_path: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

    made = ServerIdentity.load_or_create(tmp_path / "state")
    certificate = x509.load_der_x509_certificate(made.certificate_der)
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"
    assert certificate.subject.rfc4514_string() == certificate.issuer.rfc4514_string() == "CN=amst"
    assert certificate.not_valid_after_utc.year == 9999
    certificate.verify_directly_issued_by(certificate)


def test_a_complete_directory_is_only_read(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    made = ServerIdentity.load_or_create(directory)
    (directory / "lock").unlink()
    assert ServerIdentity.load_or_create(directory) == made
    assert set(modes(directory)) == FILES


SHOW = """
import hashlib, sys
from pathlib import Path
from amst_core.security.identity import ServerIdentity
sys.stdin.read()  # until all are ready
made = ServerIdentity.load_or_create(Path(sys.argv[1]))
print(made.token.hex(), hashlib.sha256(made.certificate_der).hexdigest())
"""


def test_processes_that_start_together_get_the_same_identity(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    starting = [
        subprocess.Popen(
            [sys.executable, "-c", SHOW, str(directory)],
            env=ENVIRON,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    try:
        for process in starting:
            assert process.stdin is not None
            process.stdin.close()
            process.stdin = None
        ended = [process.communicate(timeout=60) for process in starting]
    finally:
        for process in starting:
            process.kill()
            process.wait()
    assert [stderr for _, stderr in ended] == [""] * 6
    made = ServerIdentity.load_or_create(directory)
    expected = f"{made.token.hex()} {hashlib.sha256(made.certificate_der).hexdigest()}\n"
    assert [stdout for stdout, _ in ended] == [expected] * 6


# Dies as by kill -9 at the Nth of the calls that change the directory.
DIE = """
import os, signal, sys
from pathlib import Path
from amst_core.security.identity import ServerIdentity
left = int(sys.argv[2])
def dying(real):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call
os.rename, os.fsync, os.open = dying(os.rename), dying(os.fsync), dying(os.open)
ServerIdentity.load_or_create(Path(sys.argv[1]))
"""


def test_a_crash_at_any_point_is_repaired(tmp_path: Path) -> None:
    left_behind = set()
    for calls in range(40):
        directory = tmp_path / str(calls)
        ended = subprocess.run([sys.executable, "-c", DIE, str(directory), str(calls)], env=ENVIRON, timeout=60)
        kept = {name: (directory / name).read_bytes() for name in FILES if (directory / name).exists()}
        left_behind.add(frozenset(modes(directory)) - {"lock"})
        made = ServerIdentity.load_or_create(directory)
        assert ServerIdentity.load_or_create(directory) == made
        assert set(modes(directory)) == FILES | {"lock"}
        for name, content in kept.items():
            assert (directory / name).read_bytes() == content
        if ended.returncode == 0:
            break
        assert ended.returncode == -signal.SIGKILL
    else:
        raise AssertionError("the process never got through")
    # It did die in between: with nothing, half-written, and with each prefix of the files.
    assert {
        frozenset(),
        frozenset({".token.new"}),
        frozenset({"token"}),
        frozenset({"token", "key.pem"}),
    } <= left_behind


@pytest.mark.parametrize("name", ["token", "key.pem"])
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610])
def test_a_secret_open_to_others_is_refused(tmp_path: Path, name: str, mode: int) -> None:
    directory = tmp_path / "state"
    ServerIdentity.load_or_create(directory)
    (directory / name).chmod(mode)
    with pytest.raises(AuthError, match=f"chmod 600 {directory / name}"):
        ServerIdentity.load_or_create(directory)
    (directory / name).chmod(0o400)
    ServerIdentity.load_or_create(directory)


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_directory_that_others_can_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    directory = tmp_path / "state"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(AuthError, match=f"chmod 700 {directory}"):
        ServerIdentity.load_or_create(directory)
    assert not list(directory.iterdir())


def test_a_certificate_of_another_key_is_a_clear_error(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    ServerIdentity.load_or_create(one)
    ServerIdentity.load_or_create(two)
    (one / "key.pem").write_bytes((two / "key.pem").read_bytes())
    with pytest.raises(ConfigError, match=r"certificate\.pem was not made for .*key\.pem; delete both"):
        ServerIdentity.load_or_create(one)


def test_a_certificate_without_its_key_is_not_overwritten(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    ServerIdentity.load_or_create(directory)
    certificate = (directory / "certificate.pem").read_bytes()
    (directory / "key.pem").unlink()
    with pytest.raises(ConfigError, match=r"has lost its key\.pem"):
        ServerIdentity.load_or_create(directory)
    assert (directory / "certificate.pem").read_bytes() == certificate
    (directory / "certificate.pem").unlink()
    assert ServerIdentity.load_or_create(directory).certificate_path.read_bytes() != certificate


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("key.pem", b"not a key\n", ConfigError, r"key\.pem is not an unencrypted PEM key"),
        ("certificate.pem", b"not one\n", ConfigError, r"certificate\.pem is not a PEM certificate"),
        ("token", b"short\n", UsageError, "has 5 characters"),
        ("token", b"", UsageError, "has 0 characters"),
        ("token", b"\xff" * 40, UsageError, "not UTF-8"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, error: type[AmstError], words: str) -> None:
    directory = tmp_path / "state"
    ServerIdentity.load_or_create(directory)
    (directory / name).write_bytes(content)
    with pytest.raises(error, match=words) as caught:
        ServerIdentity.load_or_create(directory)
    assert str(directory / name) in str(caught.value)


def test_keys_of_another_kind_are_named(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    directory = tmp_path / "state"
    ServerIdentity.load_or_create(directory)
    key = Ed25519PrivateKey.generate()
    (directory / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(ConfigError, match="not an elliptic-curve key"):
        ServerIdentity.load_or_create(directory)


def test_a_directory_or_fifo_in_place_of_a_file_does_no_harm(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    ServerIdentity.load_or_create(directory)
    (directory / "token").unlink()
    (directory / "token").mkdir(mode=0o700)
    with pytest.raises(RefusedError, match="token"):
        ServerIdentity.load_or_create(directory)
    (directory / "token").rmdir()
    os.mkfifo(directory / "token", 0o600)
    with pytest.raises(ConfigError, match="not a regular file"):
        ServerIdentity.load_or_create(directory)


def test_a_file_where_the_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    with pytest.raises(StorageError, match="cannot make the state directory"):
        ServerIdentity.load_or_create(tmp_path / "state")


def test_a_lock_held_for_ever_ends_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOCK_TIMEOUT_S", 0.05)
    with open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DeadlineError, match="another process"):
            ServerIdentity.load_or_create(tmp_path)
    assert ServerIdentity.load_or_create(tmp_path).token


# ---- tokens -------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [HEX, HEX.lower(), HEX.upper(), f"  {HEX}\r\n"])
def test_64_hex_digits_are_32_bytes(text: str) -> None:
    assert parse_token(text) == bytes.fromhex(HEX)


@given(st.binary(min_size=32, max_size=32))
def test_every_256_bit_token_is_read_as_written(token: bytes) -> None:
    assert parse_token(token.hex()) == token


@pytest.mark.parametrize("text", [PHRASE, "x" * 32, HEX[:-1], HEX + "0", HEX[:-1] + "g", "ü" * 32])
def test_other_tokens_are_their_text(text: str) -> None:
    assert parse_token(text + "\n") == text.encode()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "0 characters"),
        (" \n", "0 characters"),
        ("x" * 31, "31 characters"),
        (" " * 10 + "x" * 31, "31 characters"),
        ("x" * 20 + "\n" + "y" * 20, "one line of text"),
        ("x" * 40 + "\0", "one line of text"),
        ("x" * 40 + "\udcff", "one line of text"),
    ],
)
def test_malformed_tokens_are_refused_without_being_shown(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=f"the place.*{words}") as caught:
        parse_token(text, source="the place")
    assert "xxx" not in str(caught.value)


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, dict[str, str], bytes]:
    """A token file, an environment with AMST_TOKEN and a state directory, and the latter's token."""
    file = tmp_path / "file"
    file.write_text("f" * 40)
    state = ServerIdentity.load_or_create(tmp_path / "state")
    return file, {"AMST_TOKEN": "e" * 40, "AMST_STATE_DIR": str(tmp_path / "state")}, state.token


def test_the_file_beats_the_variable_beats_the_state_directory(places: tuple[Path, dict[str, str], bytes]) -> None:
    file, environ, state_token = places
    assert find_token(file, environ=environ) == b"f" * 40
    assert find_token(str(file), environ=environ) == b"f" * 40
    assert find_token(environ=environ) == b"e" * 40
    del environ["AMST_TOKEN"]
    assert find_token(environ=environ) == state_token


def test_a_faulty_place_is_an_error_and_not_passed_over(places: tuple[Path, dict[str, str], bytes]) -> None:
    file, environ, _ = places
    with pytest.raises(UsageError, match=r"cannot read token file .*missing: No such file"):
        find_token(f"{file}.missing", environ=environ)
    with pytest.raises(UsageError, match="cannot read token file"):
        find_token("nul\0byte", environ=environ)
    file.write_text("short")
    with pytest.raises(UsageError, match=f"token file {file} has 5 characters"):
        find_token(file, environ=environ)
    file.write_bytes(b"x" * 70_000)
    with pytest.raises(UsageError, match="longer than"):
        find_token(file, environ=environ)
    for text in ("", "short"):
        with pytest.raises(UsageError, match="AMST_TOKEN has"):
            find_token(environ=environ | {"AMST_TOKEN": text})
    del environ["AMST_TOKEN"]
    token = Path(environ["AMST_STATE_DIR"], "token")
    token.chmod(0o644)
    with pytest.raises(AuthError, match="chmod 600"):
        find_token(environ=environ)
    token.chmod(0o600)
    token.write_text("short")
    with pytest.raises(UsageError, match=f"{token} has 5"):
        find_token(environ=environ)


def test_a_token_file_may_be_a_pipe_and_readable_by_others(places: tuple[Path, dict[str, str], bytes]) -> None:
    file, environ, _ = places
    file.chmod(0o644)
    assert find_token(file, environ=environ) == b"f" * 40
    reading, writing = os.pipe()
    try:
        os.write(writing, f"{HEX}\n".encode())
        os.close(writing)
        assert find_token(f"/dev/fd/{reading}", environ=environ) == bytes.fromhex(HEX)
    finally:
        os.close(reading)


def test_clients_create_nothing(tmp_path: Path) -> None:
    environ = {"AMST_STATE_DIR": str(tmp_path / "state")}
    assert find_token(environ=environ) is None
    (tmp_path / "state").mkdir()
    assert find_token(environ=environ) is None
    assert list(tmp_path.rglob("*")) == [tmp_path / "state"]


def test_where_the_state_directory_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert state_dir({"AMST_STATE_DIR": "/somewhere", "HOME": "/home/me"}) == Path("/somewhere")
    assert state_dir({"HOME": "/home/me", "AMST_STATE_DIR": ""}) == Path("/home/me/.local/state/amst")
    monkeypatch.chdir(tmp_path)
    assert state_dir({"AMST_STATE_DIR": "here"}) == tmp_path / "here"
    without_home = state_dir({})
    assert without_home.is_absolute()
    assert without_home.parts[-3:] == (".local", "state", "amst")
