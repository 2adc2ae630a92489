"""The roster: who belongs to a federation, signed by its coordinator and checked out of band (secagg.md
§2.7, §3.1).

Its hash is part of every round's context. A closed roster is what makes claims against an active aggregator
possible: keys come from here, never from the aggregator.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsecure.errors import IdentityError
from fedsecure.identity import keys
from fedsecure.identity.certificates import AGGREGATOR

Role = Literal["train", "evaluate", "observe"]
FORMAT = "fedsecure-roster-1"
PURPOSE = "fedsecure/roster/v1"
MAX_SITES = 10_000
_SITE = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")


@dataclass(frozen=True, slots=True)
class RosterEntry:
    """One site: id, role, Ed25519 identity key (32 raw bytes), SHA-256 of its TLS certificate (32 bytes).

    ``previous`` is the fingerprint of the certificate before a renewal, which is still accepted; empty for none.
    """

    site: str
    role: Role
    identity_key: bytes
    tls_fingerprint: bytes
    previous: bytes = b""

    @property
    def fingerprints(self) -> tuple[bytes, ...]:
        """The certificates accepted from this site."""
        return (self.tls_fingerprint, self.previous) if self.previous else (self.tls_fingerprint,)


@dataclass(frozen=True, slots=True)
class Roster:
    """All members of a federation.

    Attributes:
        federation: name.
        version: counts up with every change, from 1.
        entries: the sites, in order of id; all ids and keys distinct.
        aggregator_key: Ed25519 identity key of the aggregator, 32 raw bytes; signs published results.
        aggregator_fingerprint: SHA-256 of the aggregator's TLS certificate.
        aggregator_previous: of the one before a renewal, while it is accepted; else empty.
    """

    federation: str
    version: int
    entries: tuple[RosterEntry, ...]
    aggregator_key: bytes
    aggregator_fingerprint: bytes
    aggregator_previous: bytes = b""

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise IdentityError(
                "FS-1422",
                f"the roster {problem}",
                expected="distinct sites in order, distinct 32-byte keys and fingerprints, version >= 1",
                cure="provision the federation again, or mend the arguments of the roster",
            )

    def _problem(self) -> str | None:
        if not 1 <= self.version < 1 << 32:
            return f"has version {self.version}"
        if len(self.entries) > MAX_SITES:
            return f"has {len(self.entries)} sites, more than {MAX_SITES}"
        for entry in self.entries:
            if not _SITE.fullmatch(entry.site) or entry.site == AGGREGATOR:
                return f"has the site id {entry.site!r}"
            if entry.role not in get_args(Role):
                return f"gives {entry.site!r} the role {entry.role!r}"
        if [e.site for e in self.entries] != sorted({e.site for e in self.entries}):
            return "has repeated or unordered sites"
        prints = [self.aggregator_fingerprint, *(p for entry in self.entries for p in entry.fingerprints)]
        prints += [self.aggregator_previous] if self.aggregator_previous else []
        for name, values in (
            ("identity keys", [self.aggregator_key, *(e.identity_key for e in self.entries)]),
            ("TLS fingerprints", prints),
        ):
            if any(len(value) != keys.KEY_BYTES for value in values) or len(set(values)) != len(values):
                return f"has repeated {name}, or some that are not of 32 bytes"
        return None

    def canonical(self) -> bytes:
        """The bytes that are hashed: fixed order, big-endian, strings with a u32 length."""
        out = _prefixed(PURPOSE.encode()) + _prefixed(self.federation.encode())
        out += struct.pack(">I", self.version) + self.aggregator_key + self.aggregator_fingerprint
        out += struct.pack(">I", len(self.entries))
        for entry in self.entries:
            out += _prefixed(entry.site.encode()) + _prefixed(entry.role.encode())
            out += entry.identity_key + entry.tls_fingerprint
        return out

    def signed(self) -> bytes:
        """The bytes that are signed: :meth:`canonical`, and the certificates still accepted after a renewal."""
        kept = [(entry.site, entry.previous) for entry in self.entries if entry.previous]
        kept += [(AGGREGATOR, self.aggregator_previous)] if self.aggregator_previous else []
        if not kept:
            return self.canonical()
        body = b"".join(_prefixed(member.encode()) + value for member, value in kept)
        return self.canonical() + _prefixed(b"previous") + struct.pack(">I", len(kept)) + body

    @property
    def hash(self) -> bytes:
        """SHA-256 of :meth:`canonical`."""
        return hashlib.sha256(self.canonical()).digest()

    def find(self, site: str) -> RosterEntry:
        """The entry of ``site``; FS-1423 where there is none."""
        for entry in self.entries:
            if entry.site == site:
                return entry
        raise IdentityError(
            "FS-1423",
            f"{site!r} is not in the roster of {self.federation!r} (version {self.version})",
            expected="a site of the roster",
            cure="ask the coordinator to add the site and to send out the new roster",
        )

    def sealed(self, coordinator: Ed25519PrivateKey) -> bytes:
        """The roster as a JSON file with the coordinator's signature."""
        raw = {
            "format": FORMAT,
            "federation": self.federation,
            "version": self.version,
            "aggregator": {
                "identity_key": self.aggregator_key.hex(),
                "tls_fingerprint": self.aggregator_fingerprint.hex(),
                **({"previous": self.aggregator_previous.hex()} if self.aggregator_previous else {}),
            },
            "entries": [
                {
                    "site": entry.site,
                    "role": entry.role,
                    "identity_key": entry.identity_key.hex(),
                    "tls_fingerprint": entry.tls_fingerprint.hex(),
                    **({"previous": entry.previous.hex()} if entry.previous else {}),
                }
                for entry in self.entries
            ],
            "signature": keys.sign(coordinator, PURPOSE, self.signed()).hex(),
        }
        return (json.dumps(raw, indent=2) + "\n").encode()

    def save(self, path: Path, coordinator: Ed25519PrivateKey) -> None:
        """Write :meth:`sealed`; an existing file is never replaced."""
        keys.write_new(path, self.sealed(coordinator), mode=0o644)

    @staticmethod
    def load(path: Path, coordinator_public_key: bytes) -> Roster:
        """Read a roster and check its signature; FS-1400 unreadable, else as :meth:`opened`."""
        return Roster.opened(keys.read(path), coordinator_public_key, name=str(path))

    @staticmethod
    def opened(sealed: bytes, coordinator_public_key: bytes, *, name: str = "the roster") -> Roster:
        """The roster of a file's bytes, its signature checked; ``name`` stands in the error.

        Raises:
            IdentityError: FS-1420 malformed, FS-1421 altered or signed by someone else, FS-1422 against the rules of a
                roster.
        """
        try:
            raw = json.loads(sealed)
            roster, signature = _parse(raw), bytes.fromhex(raw["signature"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise IdentityError(
                "FS-1420",
                f"{name} is no roster ({type(error).__name__})",
                expected=f"the JSON of a {FORMAT} file",
                cure="ask the coordinator for the roster again",
            ) from error
        if not keys.verify(coordinator_public_key, PURPOSE, roster.signed(), signature):
            raise IdentityError(
                "FS-1421",
                f"the signature of {name} does not match: it was altered, or signed by another coordinator",
                expected="a roster signed by the coordinator of coordinator.pub",
                cure="ask the coordinator for the roster again, and compare its hash by telephone",
            )
        return roster


def _parse(raw: Mapping[str, Any]) -> Roster:
    if raw["format"] != FORMAT:
        raise ValueError("unknown format")
    if type(raw["version"]) is not int:
        raise ValueError("version is no integer")
    return Roster(
        federation=str(raw["federation"]),
        version=raw["version"],
        entries=tuple(
            RosterEntry(
                site=str(entry["site"]),
                role=entry["role"],
                identity_key=bytes.fromhex(entry["identity_key"]),
                tls_fingerprint=bytes.fromhex(entry["tls_fingerprint"]),
                previous=bytes.fromhex(entry.get("previous", "")),
            )
            for entry in raw["entries"]
        ),
        aggregator_key=bytes.fromhex(raw["aggregator"]["identity_key"]),
        aggregator_fingerprint=bytes.fromhex(raw["aggregator"]["tls_fingerprint"]),
        aggregator_previous=bytes.fromhex(raw["aggregator"].get("previous", "")),
    )


def _prefixed(raw: bytes) -> bytes:
    return struct.pack(">I", len(raw)) + raw
