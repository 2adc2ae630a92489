"""Fingerprints that two people compare aloud, and what they are made of.

Twenty letters of Crockford's base 32 in five groups: 100 bits. Whoever would pass for a site has to find keys with the
groups that are read out, and three groups, the least that an approval takes, are 60 bits of work for each attempt at
one site's keys.
"""

from __future__ import annotations

import hashlib
from hmac import compare_digest

from fedsecure.errors import IdentityError

_LETTERS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_GROUP, _GROUPS, _LEAST = 4, 5, 3
# What is read out wrongly, or typed for its neighbour.
_ALIKE = str.maketrans({"O": "0", "I": "1", "L": "1", " ": None, "-": None, "\n": None})


def spoken(purpose: str, *parts: bytes) -> str:
    """Five groups of four letters over SHA-256 of ``parts``, each with its length, for this purpose."""
    digest = hashlib.sha256(f"fedsecure/fingerprint/{purpose}/v1".encode() + b"\0")
    for part in parts:
        digest.update(len(part).to_bytes(4, "big") + part)
    number = int.from_bytes(digest.digest(), "big")
    letters = "".join(_LETTERS[number >> (251 - 5 * i) & 31] for i in range(_GROUP * _GROUPS))
    return " ".join(letters[i : i + _GROUP] for i in range(0, len(letters), _GROUP))


def federation_print(coordinator_key: bytes, authority: bytes) -> str:
    """Of the coordinator's key (32 bytes) and the CA certificate (DER): the same for all sites."""
    return spoken("federation", coordinator_key, authority)


def site_print(site: str, identity_key: bytes, tls_key: bytes) -> str:
    """Of a site's two public keys: Ed25519 (32 bytes) and TLS (SubjectPublicKeyInfo, DER)."""
    return spoken("site", site.encode(), identity_key, tls_key)


def confirm(shown: str, typed: str) -> None:
    """Returns where ``typed`` is the beginning of ``shown``, at least three groups; IdentityError FS-1469 else."""
    wanted, given = shown.translate(_ALIKE), typed.upper().translate(_ALIKE)
    if len(given) < _GROUP * _LEAST or not compare_digest(wanted[: len(given)].encode(), given.encode()):
        raise IdentityError(
            "FS-1469",
            f"the confirmation {typed[:60]!r} is not the beginning of this request's fingerprint",
            expected=f"at least the first {_LEAST} groups, as the site reads them out from its own screen",
            cure="call the site by a number you know; if its groups are others, somebody else asked: refuse it",
        )
