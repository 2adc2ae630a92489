"""Ephemeral X25519 keys and what HKDF-SHA256 makes of them (RFC 7748, RFC 5869; secagg.md §3.3).

The salt of every derivation is the round context, so keys of another round, attempt, model or configuration
have nothing in common with these. Share keys are directional; pair keys are the same on both sides.
"""

from __future__ import annotations

import hashlib
import struct

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedsecure.errors import ProtocolError

PREFIX = b"fedsecure/secagg/v1/"
KEY_BYTES = 32


def derive(material: bytes, ctx: bytes, info: bytes) -> bytes:
    """32 bytes of HKDF-SHA256 with the round context as salt."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=ctx, info=info).derive(material)


def exchange(private: X25519PrivateKey, public: bytes) -> bytes:
    """X25519 shared secret, 32 bytes; FS-1327 for a public key of low order."""
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise ProtocolError(
            "FS-1327",
            "an advertised public key is of low order",
            expected="X25519 public keys made from random private keys",
            cure="leave out the site that sent it, and tell the coordinator",
        ) from error


def pair_mask_key(private: X25519PrivateKey, peer_public: bytes, *, ctx: bytes, own: int, peer: int) -> bytes:
    """k_ij, the same for i and j; ``own`` and ``peer`` are protocol indices, ``private`` belongs to
    ``own``."""
    public = private.public_key().public_bytes_raw()
    (low, low_key), (high, high_key) = sorted([(own, public), (peer, peer_public)])
    info = PREFIX + b"pair-mask\0" + struct.pack(">II", low, high) + low_key + high_key
    return derive(exchange(private, peer_public), ctx, info)


def self_mask_key(seed: bytes, *, ctx: bytes, index: int) -> bytes:
    """k_i from b_i (32 bytes)."""
    return derive(seed, ctx, PREFIX + b"self-mask\0" + struct.pack(">I", index))


def share_key(
    private: X25519PrivateKey, peer_public: bytes, *, ctx: bytes, sender: int, recipient: int, sending: bool
) -> bytes:
    """K_ij for shares from ``sender`` to ``recipient``; ``sending`` says whose private key it is."""
    public = private.public_key().public_bytes_raw()
    pair = public + peer_public if sending else peer_public + public
    info = PREFIX + b"share-enc\0" + struct.pack(">II", sender, recipient) + pair
    return derive(exchange(private, peer_public), ctx, info)


def commit(seed: bytes, *, ctx: bytes, index: int) -> bytes:
    """commit_b = SHA-256("…/bcommit" ‖ 0 ‖ ctx ‖ u32 i ‖ b_i); hiding, since b_i has 256 random bits."""
    return hashlib.sha256(PREFIX + b"bcommit\0" + ctx + struct.pack(">I", index) + seed).digest()
