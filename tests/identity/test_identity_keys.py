"""Identity keys on disk and signatures with domain separation."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from fedsecure.errors import IdentityError
from fedsecure.identity import keys


def test_rfc_8032_vector_1() -> None:
    """RFC 8032 §7.1 test 1: the raw public key of a known secret."""
    secret = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert keys.public_bytes(Ed25519PrivateKey.from_private_bytes(secret)).hex() == public


@given(body=st.binary(max_size=200), flip=st.integers(0, 511))
def test_a_signature_holds_for_its_purpose_body_and_key_alone(body: bytes, flip: int) -> None:
    key, other = keys.generate(), keys.generate()
    public = keys.public_bytes(key)
    signature = keys.sign(key, "fedsecure/test/a", body)
    assert keys.verify(public, "fedsecure/test/a", body, signature)
    assert not keys.verify(public, "fedsecure/test/b", body, signature)
    assert not keys.verify(public, "fedsecure/test/a", body + b"\0", signature)
    assert not keys.verify(keys.public_bytes(other), "fedsecure/test/a", body, signature)
    bent = bytearray(signature)
    bent[flip // 8] ^= 1 << (flip % 8)
    assert not keys.verify(public, "fedsecure/test/a", body, bytes(bent))
    assert not keys.verify(public[:-1], "fedsecure/test/a", body, signature)
    assert not keys.verify(public, "fedsecure/test/a", body, signature[:-1])


def test_purpose_and_body_do_not_run_together() -> None:
    key = keys.generate()
    signature = keys.sign(key, "fedsecure/a", b"b")
    assert not keys.verify(keys.public_bytes(key), "fedsecure/", b"a\0b", signature)


def test_a_saved_key_comes_back_and_is_private(tmp_path: Path) -> None:
    key = keys.generate()
    keys.save_private_key(tmp_path / "k", key)
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
    assert keys.public_bytes(keys.load_private_key(tmp_path / "k")) == keys.public_bytes(key)
    keys.save_public_key(tmp_path / "p", key)
    assert keys.load_public_key(tmp_path / "p") == keys.public_bytes(key)


def test_an_existing_key_is_never_overwritten(tmp_path: Path) -> None:
    keys.save_private_key(tmp_path / "k", keys.generate())
    before = (tmp_path / "k").read_bytes()
    with pytest.raises(IdentityError, match="FS-1403"):
        keys.save_private_key(tmp_path / "k", keys.generate())
    assert (tmp_path / "k").read_bytes() == before


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o601])
def test_a_key_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "k"
    keys.save_private_key(path, keys.generate())
    path.chmod(mode)
    with pytest.raises(IdentityError, match="FS-1401") as caught:
        keys.load_private_key(path)
    assert "chmod 600" in caught.value.cure
    path.chmod(0o600)
    keys.load_private_key(path)


def test_missing_and_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="FS-1400"):
        keys.load_private_key(tmp_path / "absent")
    with pytest.raises(IdentityError, match="FS-1400"):
        keys.load_public_key(tmp_path / "absent")
    other = generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for name, content in (("junk", b"no key"), ("ec", other)):
        keys.write_new(tmp_path / name, content, mode=0o600)
        with pytest.raises(IdentityError, match="FS-1402"):
            keys.load_private_key(tmp_path / name)
        with pytest.raises(IdentityError, match="FS-1402"):
            keys.load_public_key(tmp_path / name)
