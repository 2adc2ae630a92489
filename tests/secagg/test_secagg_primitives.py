"""The parts under the protocol: known answers, and properties of shares, masks, seals and the ring."""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import struct

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsecure.errors import ProtocolError
from fedsecure.secagg import keys, prg, recovery, ring, sealing, shamir

CTX = hashlib.sha256(b"fedsecure test ctx").digest()
FIRST = X25519PrivateKey.from_private_bytes(bytes(range(32)))
SECOND = X25519PrivateKey.from_private_bytes(bytes(range(32, 64)))
secret32 = st.binary(min_size=32, max_size=32)


def public(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def hkdf(material: bytes, salt: bytes, info: bytes) -> bytes:
    """RFC 5869 for one block of output, written out a second time."""
    extracted = hmac.digest(salt, material, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def test_known_answer_of_the_pair_key_and_its_stream() -> None:
    assert CTX.hex().startswith("ec30711a")
    assert CTX.hex().endswith("fabd3")
    key = keys.pair_mask_key(FIRST, public(SECOND), ctx=CTX, own=1, peer=2)
    assert key.hex() == "8c1bbf2e839e932f3c37ce3b1802a2b78e2f9616867798dbbb9820d9c8265425"
    assert keys.pair_mask_key(SECOND, public(FIRST), ctx=CTX, own=2, peer=1) == key
    assert prg.keystream(key, 4).tobytes().hex() == "c42177f7ac607ecdad679162b76728b0"
    assert prg.keystream(key, 4).tolist() == [4151779780, 3447611564, 1653696429, 2955438007]


def test_nist_sp_800_38a_f_5_5() -> None:
    """AES-256-CTR counts from 0 here, so the vector is checked block by block through AES-ECB of the counter."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    assert block.update(counter).hex() == "0bdf7df1591716335e9a8b15c860c502"
    expected = b"".join(block.update(i.to_bytes(16, "big")) for i in range(5))
    assert prg.keystream(key, 20).tobytes() == expected


def test_derivations_match_a_second_implementation() -> None:
    shared = FIRST.exchange(SECOND.public_key())
    p, q = public(FIRST), public(SECOND)
    label = b"fedsecure/secagg/v1/"
    sending = keys.share_key(FIRST, q, ctx=CTX, sender=1, recipient=2, sending=True)
    assert sending == hkdf(shared, CTX, label + b"share-enc\0" + struct.pack(">II", 1, 2) + p + q)
    assert keys.share_key(SECOND, p, ctx=CTX, sender=1, recipient=2, sending=False) == sending
    back = keys.share_key(SECOND, p, ctx=CTX, sender=2, recipient=1, sending=True)
    assert back != sending
    seed = bytes(range(100, 132))
    assert keys.self_mask_key(seed, ctx=CTX, index=3) == hkdf(seed, CTX, label + b"self-mask\0" + struct.pack(">I", 3))
    commitment = hashlib.sha256(label + b"bcommit\0" + CTX + struct.pack(">I", 3) + seed).digest()
    assert keys.commit(seed, ctx=CTX, index=3) == commitment


def test_a_public_key_of_low_order_is_refused() -> None:
    for point in (bytes(32), b"\x01" + bytes(31)):
        with pytest.raises(ProtocolError, match="FS-1327"):
            keys.exchange(FIRST, point)
    keys.exchange(FIRST, public(SECOND))


@given(
    secret=secret32,
    points=st.lists(st.integers(1, 200) | st.integers(1, 1 << 32), min_size=1, max_size=9, unique=True),
    data=st.data(),
)
def test_any_t_shares_reconstruct(secret: bytes, points: list[int], data: st.DataObject) -> None:
    t = data.draw(st.integers(1, len(points)))
    shares = shamir.share(secret, t, points=points)
    assert all(len(value) == 33 for value in shares.values())
    chosen = data.draw(st.permutations(points))[: data.draw(st.integers(t, len(points)))]
    assert shamir.reconstruct({x: shares[x] for x in chosen}) == secret


@given(secret=secret32, other=secret32, t=st.integers(2, 6))
def test_fewer_than_t_shares_are_consistent_with_every_secret(secret: bytes, other: bytes, t: int) -> None:
    """t − 1 shares and any claimed secret lie on one polynomial; completing them gives the claim back."""
    shares = shamir.share(secret, t, points=range(1, t + 1))
    few = {x: shares[x] for x in range(1, t)}
    completed = {**few, t: _completion(few, other, t)}
    assert shamir.reconstruct(completed) == other


def _completion(few: dict[int, bytes], secret: bytes, at: int) -> bytes:
    points, p = [0, *few], shamir.PRIME
    values = [int.from_bytes(secret, "big"), *(int.from_bytes(v, "big") for v in few.values())]
    total = 0
    for x, y in zip(points, values, strict=True):
        term = y
        for other in points:
            if other != x:
                term = term * (at - other) * pow(x - other, -1, p) % p
        total += term
    return (total % p).to_bytes(33, "big")


def test_the_field_holds_every_32_byte_string_and_no_bad_share() -> None:
    assert pow(3, shamir.PRIME - 1, shamir.PRIME) == 1  # Fermat, as a guard against a mistyped constant
    for secret in (bytes(32), b"\xff" * 32):
        assert shamir.reconstruct(shamir.share(secret, 2, points=[1, 5, 9])) == secret
    for bad in (b"", bytes(32), bytes(34), shamir.PRIME.to_bytes(33, "big"), b"\xff" * 33):
        assert shamir.reconstruct({1: bad}) is None
    above = ((1 << 256) + 5).to_bytes(33, "big")
    assert shamir.reconstruct({1: above}) is None
    assert shamir.reconstruct({1: ((1 << 256) - 5).to_bytes(33, "big")}) is not None


@given(wrong=st.sets(st.integers(1, 7), max_size=3))
def test_recovery_names_the_wrong_shares(wrong: set[int]) -> None:
    secret = os.urandom(32)
    shares = shamir.share(secret, 4, points=range(1, 8))
    for holder in wrong:
        shares[holder] = bytes([shares[holder][0], *(b ^ 1 for b in shares[holder][1:])])
    assert recovery.recover(shares, 4, fits=secret.__eq__) == (secret, wrong)
    assert recovery.recover({x: shares[x] for x in (1, 2, 3)}, 4, fits=secret.__eq__) is None


@settings(deadline=None)
@given(
    words=st.integers(0, 300),
    chunk=st.sampled_from([4, 32, 64, 128, 1 << 15]),
    plus=st.lists(secret32, max_size=3),
    minus=st.lists(secret32, max_size=3),
)
def test_chunked_masks_equal_whole_streams(words: int, chunk: int, plus: list[bytes], minus: list[bytes]) -> None:
    start = np.arange(words, dtype=np.uint32) * np.uint32(2**31 - 1)
    vector = start.copy()
    prg.add_masks(vector, plus, minus, chunk=chunk)
    expected = start.astype(object)
    for key in plus:
        expected = expected + prg.keystream(key, words)
    for key in minus:
        expected = expected - prg.keystream(key, words).astype(object)
    assert vector.tolist() == [int(x) % 2**32 for x in expected]
    prg.add_masks(vector, minus, plus, chunk=chunk)
    assert vector.tolist() == start.tolist()


def test_masks_cross_the_chunk_boundary_of_the_default() -> None:
    key, words = bytes(range(32)), prg.CHUNK + 7
    vector = np.zeros(words, dtype=np.uint32)
    prg.add_masks(vector, [key], [])
    assert np.array_equal(vector, prg.keystream(key, words))


def test_a_sealed_share_opens_only_where_it_belongs() -> None:
    key, t1, shares = os.urandom(32), os.urandom(32), (bytes([1] * 33), bytes([2] * 33))
    where = {"ctx": CTX, "t1": t1, "sender": 1, "recipient": 2}
    sealed = sealing.seal(key, shares, **where)
    assert len(sealed) == sealing.SEALED_BYTES == 102
    assert sealing.unseal(key, sealed, **where) == shares
    for change in ({"ctx": os.urandom(32)}, {"t1": os.urandom(32)}, {"sender": 3}, {"recipient": 3}):
        assert sealing.unseal(key, sealed, **{**where, **change}) is None
    assert sealing.unseal(os.urandom(32), sealed, **where) is None
    assert sealing.unseal(key, sealed[:-1], **where) is None
    for bit in range(0, 8 * len(sealed), 37):
        bent = bytearray(sealed)
        bent[bit // 8] ^= 1 << (bit % 8)
        assert sealing.unseal(key, bytes(bent), **where) is None
    assert sealing.seal(key, shares, **where) != sealed  # fresh nonce


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=50))
def test_ring_words_and_lift_are_inverse(values: list[int]) -> None:
    array = np.array(values, dtype=np.int64)
    words = ring.to_ring(array)
    assert words.dtype == np.uint32
    assert words.tolist() == [v % 2**32 for v in values]
    lifted = ring.lift(words)
    assert lifted.dtype == np.int64
    assert lifted.tolist() == values


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**40])
def test_values_outside_the_ring_never_wrap_silently(value: int) -> None:
    with pytest.raises(ProtocolError, match="FS-1302"):
        ring.to_ring(np.array([0, value], dtype=np.int64))


def test_only_integers_become_ring_words() -> None:
    with pytest.raises(ProtocolError, match="FS-1303"):
        ring.to_ring(np.array([1.0]))
    with pytest.raises(ProtocolError, match="FS-1303"):
        ring.to_ring(np.zeros((2, 2), dtype=np.int64))


def test_wrap_probability() -> None:
    got = ring.wrap_probability_log2(5, 1000, clamp=2**20, noise_std=2.0**27)
    room = 2**31 - 5 * 2**20
    assert got == pytest.approx(math.log2(2 * 1000 * math.exp(-(room**2) / (2 * 5 * 2.0**54))))
    assert ring.wrap_probability_log2(5, 10, clamp=2**20, noise_std=0.0) == -math.inf
    assert ring.wrap_probability_log2(2, 10, clamp=2**30, noise_std=0.0) == 0.0
    assert ring.wrap_probability_log2(5, 10, clamp=1, noise_std=2.0**40) == 0.0
    assert ring.wrap_probability_log2(10, 10**6, clamp=2**30 // 10, noise_std=2.0**20) < -10_000


def test_the_wrap_bound_covers_what_happens() -> None:
    """Gaussian sums in a small ring wrap no more often than the bound says, and the bound is not vacuous."""
    n, d, bits, clamp, std = 4, 200_000, 10, 20, 80.0
    rng = np.random.default_rng(1)
    sums = n * clamp + rng.normal(0, std * math.sqrt(n), d)
    wrapped = np.mean(np.abs(sums) >= 2 ** (bits - 1))
    bound = 2 ** (ring.wrap_probability_log2(n, 1, clamp=clamp, noise_std=std, bits=bits))
    assert 0 < wrapped <= bound < 1
