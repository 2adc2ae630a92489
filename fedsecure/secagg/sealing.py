"""Shares on their way from one site to another: AES-256-GCM under a directional single-use key (secagg.md
§3.3, NIST
SP 800-38D).

The associated data name the round, the set of advertised keys and the direction; the plaintext repeats the
direction. The set-up of an epoch seals the shares of all its slots in one message (§3.7).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedsecure.secagg.shamir import SHARE_BYTES

NONCE_BYTES = 12
SEALED_BYTES = NONCE_BYTES + 8 + 2 * SHARE_BYTES + 16


def sealed_size(slots: int = 1) -> int:
    """Bytes of a sealed message with the two shares of each of ``slots`` slots."""
    return SEALED_BYTES + 2 * SHARE_BYTES * (slots - 1)


def seal(key: bytes, shares: Sequence[bytes], *, ctx: bytes, t1: bytes, sender: int, recipient: int) -> bytes:
    """Encrypt (share of s, share of b) of each slot, 33 bytes each; returns nonce ‖ ciphertext ‖ tag.

    One slot takes 102 bytes, each further one 66.
    """
    nonce = os.urandom(NONCE_BYTES)
    direction = struct.pack(">II", sender, recipient)
    return nonce + AESGCM(key).encrypt(nonce, direction + b"".join(shares), ctx + t1 + direction + b"share")


def unseal(
    key: bytes, sealed: bytes, *, ctx: bytes, t1: bytes, sender: int, recipient: int
) -> tuple[bytes, bytes] | None:
    """The two shares, or ``None`` where the ciphertext is not one of ``sender`` for ``recipient`` in this
    round."""
    opened = unseal_all(key, sealed, ctx=ctx, t1=t1, sender=sender, recipient=recipient, slots=1)
    return None if opened is None else (opened[0], opened[1])


def unseal_all(
    key: bytes, sealed: bytes, *, ctx: bytes, t1: bytes, sender: int, recipient: int, slots: int
) -> tuple[bytes, ...] | None:
    """As :func:`unseal`, the two shares of each slot end to end."""
    if len(sealed) != sealed_size(slots):
        return None
    direction = struct.pack(">II", sender, recipient)
    try:
        plain = AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], ctx + t1 + direction + b"share")
    except InvalidTag:
        return None
    if plain[:8] != direction:
        return None
    return tuple(plain[start : start + SHARE_BYTES] for start in range(8, len(plain), SHARE_BYTES))
