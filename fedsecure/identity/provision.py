"""Make a federation's keys, certificates and roster in one step, and read one member's folder back with
every check.

The coordinator runs :func:`provision` once and hands each site its own folder over a channel it trusts.
``ca/`` holds the two keys that can add members; keep it offline afterwards.
"""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsecure.errors import IdentityError
from fedsecure.identity import certificates, keys
from fedsecure.identity.certificates import AGGREGATOR, Issued
from fedsecure.identity.roster import Role, Roster, RosterEntry


@dataclass(frozen=True, slots=True)
class Provisioned:
    """Where the folders are: the aggregator's identity, each site's identity, and the roster."""

    folder: Path
    aggregator: Path
    sites: Mapping[str, Path]
    roster: Roster


@dataclass(frozen=True, slots=True)
class Identity:
    """One member's checked identity.

    Attributes:
        site: site id, or ``"aggregator"``.
        signing_key: Ed25519 identity key; its public half is in the roster.
        certificate, tls_key, ca: PEM bytes for mutual TLS.
        roster: verified.
        coordinator_key: Ed25519 public key of the coordinator, 32 raw bytes.
    """

    site: str
    signing_key: Ed25519PrivateKey = field(repr=False)
    certificate: bytes
    tls_key: bytes = field(repr=False)
    ca: bytes
    roster: Roster
    coordinator_key: bytes


def provision(
    folder: Path,
    *,
    federation: str,
    sites: Mapping[str, Role],
    hosts: Sequence[str],
    days: int = 365,
    authority_days: int | None = None,
    now: dt.datetime | None = None,
) -> Provisioned:
    """Create ``ca/``, ``aggregator/identity/`` and ``sites/<site>/identity/`` under ``folder``.

    Args:
        folder: created where absent; existing keys are never overwritten.
        federation: name of the federation.
        sites: site id → role; none where all sites will enrol (docs/enrolment.md).
        hosts: DNS names and IP addresses under which sites reach the aggregator.
        days: validity of the members' certificates, ≥ 1.
        authority_days: of the CA's own; ``days`` by default.
        now: start of the validity; the present by default.

    Raises:
        IdentityError: FS-1403 a file exists or cannot be written, FS-1422 a site id or role is refused,
            FS-1441 no hosts or days < 1.
    """
    if not hosts or days < 1:
        raise IdentityError(
            "FS-1441",
            f"{len(hosts)} host name(s) and a validity of {days} day(s)",
            expected="at least one host name or address of the aggregator, and at least one day",
            cure="name the address that sites dial, such as 127.0.0.1 or fed.example.org",
        )
    coordinator = keys.generate()
    authority = certificates.make_authority(federation, days=authority_days or days, now=now)
    issued = {AGGREGATOR: certificates.issue_server(authority, hosts, days=days, now=now)}
    signing = {AGGREGATOR: keys.generate()}
    entries = []
    for site in sorted(sites):
        # A bad id is refused by the roster's own rules before any certificate carries it.
        probe = RosterEntry(site, sites[site], bytes(32), bytes([1] * 32))
        Roster(federation, 1, (probe,), bytes([2] * 32), bytes([3] * 32))
        issued[site] = certificates.issue_site(authority, site, days=days, now=now)
        signing[site] = keys.generate()
        print_of = certificates.fingerprint(issued[site].certificate)
        entries.append(RosterEntry(site, sites[site], keys.public_bytes(signing[site]), print_of))
    roster = Roster(
        federation=federation,
        version=1,
        entries=tuple(entries),
        aggregator_key=keys.public_bytes(signing[AGGREGATOR]),
        aggregator_fingerprint=certificates.fingerprint(issued[AGGREGATOR].certificate),
    )
    root = _make_folder(folder / "ca")
    keys.write_new(root / "ca.pem", authority.certificate, mode=0o644)
    keys.write_new(root / "ca-key.pem", authority.key, mode=0o600)
    keys.save_private_key(root / "coordinator.key", coordinator)
    keys.save_public_key(root / "coordinator.pub", coordinator)
    roster.save(root / "roster.json", coordinator)
    folders = {}
    for member, certificate in issued.items():
        base = folder / AGGREGATOR if member == AGGREGATOR else folder / "sites" / member
        folders[member] = _make_folder(base / "identity")
        _write_member(folders[member], authority, certificate, signing[member], roster, coordinator)
    return Provisioned(
        folder=folder,
        aggregator=folders.pop(AGGREGATOR),
        sites=folders,
        roster=roster,
    )


def load_identity(folder: Path, *, now: dt.datetime | None = None) -> Identity:
    """Read one member's identity folder and check everything in it against everything else.

    Raises:
        IdentityError: FS-1400…1402 a file is missing, open to others or no key; FS-1410…1414 the certificate
            is unreadable, expired, not yet valid, foreign or nameless; FS-1420…1422 the roster is malformed
            or altered; FS-1423 the own entry is missing; FS-1431 the identity key, FS-1432 the certificate,
            FS-1433 the TLS key does not match.
    """
    coordinator_key = keys.load_public_key(folder / "coordinator.pub")
    signing_key = keys.load_private_key(folder / "identity.key")
    tls_key = keys.read_private(folder / "tls-key.pem")
    certificate, ca = keys.read(folder / "certificate.pem"), keys.read(folder / "ca.pem")
    site = certificates.check(certificate, ca, now=now)
    roster = Roster.load(folder / "roster.json", coordinator_key)
    if site == AGGREGATOR:
        expected_key = roster.aggregator_key
        accepted: tuple[bytes, ...] = (roster.aggregator_fingerprint, roster.aggregator_previous)
    else:
        entry = roster.find(site)
        expected_key, accepted = entry.identity_key, entry.fingerprints
    if keys.public_bytes(signing_key) != expected_key:
        raise _mismatch("FS-1431", f"identity.key of {site!r} is not the key that the roster names")
    if certificates.fingerprint(certificate) not in accepted:
        raise _mismatch("FS-1432", f"certificate.pem of {site!r} is not the certificate that the roster names")
    if not certificates.key_matches(tls_key, certificate):
        raise _mismatch("FS-1433", f"tls-key.pem of {site!r} does not belong to certificate.pem")
    return Identity(
        site=site,
        signing_key=signing_key,
        certificate=certificate,
        tls_key=tls_key,
        ca=ca,
        roster=roster,
        coordinator_key=coordinator_key,
    )


def _mismatch(code: str, found: str) -> IdentityError:
    return IdentityError(
        code,
        found,
        expected="keys, certificate and roster of one and the same provisioning",
        cure="put back the whole identity folder, or ask the coordinator for a new roster",
    )


def _write_member(
    folder: Path,
    authority: Issued,
    issued: Issued,
    signing: Ed25519PrivateKey,
    roster: Roster,
    coordinator: Ed25519PrivateKey,
) -> None:
    keys.write_new(folder / "ca.pem", authority.certificate, mode=0o644)
    keys.write_new(folder / "certificate.pem", issued.certificate, mode=0o644)
    keys.write_new(folder / "tls-key.pem", issued.key, mode=0o600)
    keys.save_private_key(folder / "identity.key", signing)
    keys.save_public_key(folder / "coordinator.pub", coordinator)
    roster.save(folder / "roster.json", coordinator)


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.chmod(folder, 0o700)
    except OSError as error:
        raise IdentityError(
            "FS-1403",
            f"{folder} cannot be created ({error.strerror})",
            expected="a writable folder",
            cure="choose another folder or mend its permissions",
        ) from error
    return folder
