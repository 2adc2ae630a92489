"""Long-term Ed25519 identity keys (RFC 8032) on disk, and signatures with domain separation (secagg.md §3.2).

A signature always covers ``purpose ‖ 0x00 ‖ body``, so that a signature made for one purpose says nothing in
another. Private keys are PKCS8 PEM files that only their owner may read; anything wider is refused.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from fedsecure.errors import IdentityError

KEY_BYTES = 32
SIGNATURE_BYTES = 64
MAX_FILE_BYTES = 1 << 24


def generate() -> Ed25519PrivateKey:
    """A fresh identity key from the operating system's generator."""
    return Ed25519PrivateKey.generate()


def public_bytes(key: Ed25519PrivateKey | Ed25519PublicKey) -> bytes:
    """The 32 raw bytes of the public key."""
    public = key.public_key() if isinstance(key, Ed25519PrivateKey) else key
    return public.public_bytes(Encoding.Raw, PublicFormat.Raw)


def sign(key: Ed25519PrivateKey, purpose: str, body: bytes) -> bytes:
    """64-byte Ed25519 signature over ``purpose ‖ 0x00 ‖ body``; ``purpose`` is ASCII without NUL."""
    return key.sign(_framed(purpose, body))


def verify(public_key: bytes, purpose: str, body: bytes, signature: bytes) -> bool:
    """Whether ``signature`` was made by the holder of ``public_key`` (32 bytes) for this purpose and body."""
    if len(public_key) != KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, _framed(purpose, body))
    except (InvalidSignature, ValueError):
        return False
    return True


def save_private_key(path: Path, key: Ed25519PrivateKey) -> None:
    """Write ``key`` as PKCS8 PEM with mode 0600; an existing file is never replaced (FS-1403)."""
    write_new(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600)


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """Read an identity key.

    Raises:
        IdentityError: FS-1400 unreadable, FS-1401 readable by others, FS-1402 no Ed25519 key.
    """
    raw = read_private(path)
    try:
        key = load_pem_private_key(raw, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise IdentityError(
            "FS-1402",
            f"{path} is no unencrypted Ed25519 private key",
            expected="a PKCS8 PEM file with an Ed25519 key",
            cure="put back the identity.key that provisioning made for this site",
        )
    return key


def save_public_key(path: Path, key: Ed25519PrivateKey | Ed25519PublicKey) -> None:
    """Write the public key as SubjectPublicKeyInfo PEM; an existing file is never replaced (FS-1403)."""
    public = Ed25519PublicKey.from_public_bytes(public_bytes(key))
    write_new(path, public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), mode=0o644)


def load_public_key(path: Path) -> bytes:
    """The 32 raw bytes of an Ed25519 public key in PEM; FS-1400 unreadable, FS-1402 no such key."""
    raw = read(path)
    try:
        key = load_pem_public_key(raw)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise IdentityError(
            "FS-1402",
            f"{path} is no Ed25519 public key",
            expected="a PEM file with an Ed25519 public key",
            cure="put back the coordinator.pub that provisioning made",
        )
    return public_bytes(key)


def write_new(path: Path, content: bytes, *, mode: int) -> None:
    """Create ``path`` with ``mode``; raises FS-1403 where it exists or cannot be created."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise IdentityError(
            "FS-1403",
            f"{path} cannot be created ({error.strerror})",
            expected="a writable folder without that file",
            cure="choose an empty folder; keys and certificates are never overwritten",
        ) from error


def read(path: Path) -> bytes:
    """The file's bytes; FS-1400 where it cannot be read or is larger than 16 MiB."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _unreadable(path, error.strerror or "unknown error") from error
    if len(raw) > MAX_FILE_BYTES:
        raise _unreadable(path, f"larger than {MAX_FILE_BYTES} bytes")
    return raw


def read_private(path: Path) -> bytes:
    """Like :func:`read` for a secret: FS-1401 where group or others have any access to the file."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise _unreadable(path, error.strerror or "unknown error") from error
    if mode & 0o077:
        raise IdentityError(
            "FS-1401",
            f"{path} has mode {mode:04o}: others than its owner can reach the private key",
            expected="mode 0600",
            cure=f"chmod 600 {path}, and make a new key if others may have read it",
        )
    return read(path)


def _unreadable(path: Path, reason: str) -> IdentityError:
    return IdentityError(
        "FS-1400",
        f"{path} cannot be read ({reason})",
        expected="a readable file of the identity folder",
        cure="check the identity path in the configuration and the file's permissions",
    )


def _framed(purpose: str, body: bytes) -> bytes:
    tag = purpose.encode("ascii")
    assert b"\0" not in tag
    return tag + b"\0" + body
