"""One-time invitations: what the coordinator signs, and the token that a site types (docs/enrolment.md).

A token holds 256 random bits. From them comes an Ed25519 key that signs one request; the invitation names its public
half, the site, the role and the end, under the coordinator's signature. So neither the token nor anything that equals
it is ever sent or kept: an aggregator checks a request by the coordinator's key alone, and whoever reads the
coordinator's register cannot enrol. (A MAC would need its key on both sides.) The token also carries the CA certificate
and the coordinator's public key, so that a site trusts nothing it is told on the way.
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import hashlib
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedsecure.errors import IdentityError
from fedsecure.identity import keys
from fedsecure.identity.roster import Role

PURPOSE = "fedsecure/invitation/v1"
SECRET_BYTES = 32
MAX_TOKEN = 6000
_MARK = "fs1-"
_CHECK_BYTES = 4
_ROLES = get_args(Role)
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class Invitation:
    """What the coordinator signs: ``site`` may enrol once with ``role`` until ``expires`` (Unix seconds).

    ``verifier`` is the public half of the token's key, 32 bytes; it names the invitation.
    """

    site: str
    role: Role
    expires: int
    verifier: bytes
    signature: bytes = b""

    def body(self) -> bytes:
        site = self.site.encode()
        return struct.pack(">BQH", _ROLES.index(self.role), self.expires, len(site)) + site + self.verifier

    def signed(self, coordinator: Ed25519PrivateKey) -> Invitation:
        signature = keys.sign(coordinator, PURPOSE, self.body())
        return Invitation(self.site, self.role, self.expires, self.verifier, signature)

    def genuine(self, coordinator_key: bytes) -> bool:
        """Whether the coordinator with this public key signed it."""
        return keys.verify(coordinator_key, PURPOSE, self.body(), self.signature)

    def to_dict(self) -> dict[str, Any]:
        return {
            "site": self.site,
            "role": self.role,
            "expires": self.expires,
            "verifier": self.verifier.hex(),
            "signature": self.signature.hex(),
        }

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> Invitation:
        """Raises KeyError, TypeError or ValueError where it is none."""
        site, role, expires = raw["site"], raw["role"], raw["expires"]
        if type(site) is not str or len(site) > 63 or role not in _ROLES or type(expires) is not int:
            raise ValueError("no invitation")
        if not 0 <= expires < 1 << 63:
            raise ValueError("no time")
        verifier, signature = bytes.fromhex(raw["verifier"]), bytes.fromhex(raw["signature"])
        if len(verifier) != keys.KEY_BYTES:
            raise ValueError("no key")
        return Invitation(site, role, expires, verifier, signature)


@dataclass(frozen=True, slots=True)
class Token:
    """What a site is given: the secret, its invitation, and what it pins.

    Attributes:
        secret: 32 bytes.
        address: ``host:port`` of the aggregator's enrolment service; empty where requests travel as files.
        coordinator_key: Ed25519, 32 bytes.
        authority: the CA certificate, DER.
    """

    invitation: Invitation
    secret: bytes = field(repr=False)
    address: str
    coordinator_key: bytes
    authority: bytes

    def key(self) -> Ed25519PrivateKey:
        """The key that signs the one request."""
        return _key_of(self.secret)

    def text(self) -> str:
        """About 850 letters of base64url that survive line breaks; a checksum notices what was copied wrongly."""
        body = struct.pack(">B", 1) + self.secret + self.coordinator_key + self.invitation.signature
        body += struct.pack(">BQ", _ROLES.index(self.invitation.role), self.invitation.expires)
        for part in (self.invitation.site.encode(), self.address.encode(), self.authority):
            body += struct.pack(">H", len(part)) + part
        body += hashlib.sha256(body).digest()[:_CHECK_BYTES]
        return _MARK + base64.urlsafe_b64encode(body).decode().rstrip("=")

    @staticmethod
    def parse(text: str) -> Token:
        """Inverse of :meth:`text`; IdentityError FS-1461 where it is no token, or not whole."""
        letters = _SPACE.sub("", text[: 2 * MAX_TOKEN])
        try:
            if not letters.startswith(_MARK) or len(letters) > MAX_TOKEN:
                raise ValueError("no token")
            letters = letters.removeprefix(_MARK)
            raw = base64.b64decode(letters + "=" * (-len(letters) % 4), altchars=b"-_", validate=True)
            token = _unpacked(raw)
        except (ValueError, IndexError, struct.error, binascii.Error) as error:
            raise IdentityError(
                "FS-1461",
                "this is no invitation of this release, or not the whole of it",
                expected=f"one text that begins with {_MARK}, as `fedsecure members invite` printed it",
                cure="copy all of it, or ask the coordinator for it again",
            ) from error
        return token


def invite(
    site: str, role: Role, *, expires: int, address: str, coordinator: Ed25519PrivateKey, authority: bytes
) -> Token:
    """A fresh token from the operating system's generator; ``authority`` is the CA certificate, DER."""
    secret = os.urandom(SECRET_BYTES)
    invitation = Invitation(site, role, expires, keys.public_bytes(_key_of(secret))).signed(coordinator)
    return Token(invitation, secret, address, keys.public_bytes(coordinator), authority)


def expired(site: str, end: int) -> IdentityError:
    moment = dt.datetime.fromtimestamp(end, dt.UTC)
    return IdentityError(
        "FS-1463",
        f"the invitation of {site!r} ended on {moment:%Y-%m-%d %H:%M} UTC",
        expected="an invitation that is used and approved before its end",
        cure="ask the coordinator for a new one; the keys made here can stay",
    )


def _key_of(secret: bytes) -> Ed25519PrivateKey:
    seed = HKDF(SHA256(), 32, salt=None, info=b"fedsecure/invitation-key/v1").derive(secret)
    return Ed25519PrivateKey.from_private_bytes(seed)


def _unpacked(raw: bytes) -> Token:
    body, check = raw[:-_CHECK_BYTES], raw[-_CHECK_BYTES:]
    if body[0] != 1 or hashlib.sha256(body).digest()[:_CHECK_BYTES] != check:
        raise ValueError("damaged")
    position = 1

    def take(length: int) -> bytes:
        nonlocal position
        if length > len(body) - position:
            raise ValueError("truncated")
        position += length
        return body[position - length : position]

    secret, coordinator_key, signature = take(SECRET_BYTES), take(keys.KEY_BYTES), take(keys.SIGNATURE_BYTES)
    role, expires = struct.unpack(">BQ", take(9))
    site, address, authority = (take(struct.unpack(">H", take(2))[0]) for _ in range(3))
    verifier = keys.public_bytes(_key_of(secret))
    invitation = Invitation(site.decode(), _ROLES[role], expires, verifier, signature)
    if position != len(body) or not invitation.genuine(coordinator_key):
        raise ValueError("not signed by its coordinator")
    return Token(invitation, secret, address.decode(), coordinator_key, authority)
